//! hypersync keeps every connection of a group of stateful gateways on exactly two of them.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod ccp;
pub mod clock;
pub mod conn;
pub mod conntrack;
pub mod counters;
pub mod demo;
pub mod group;
pub mod limits;
pub mod load;
pub mod memory;
pub mod prefetch;
pub mod seq;
pub mod shm;
pub mod source;
pub mod sync;
pub mod time;
