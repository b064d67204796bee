//! hypersync keeps every connection of a group of stateful gateways on exactly two of them.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod appliance;
pub mod ccp;
pub mod clock;
pub mod config;
pub mod conn;
pub mod conntrack;
pub mod counters;
pub mod demo;
pub mod feed;
pub mod group;
pub mod limits;
pub mod load;
pub mod logging;
pub mod membership;
pub mod memory;
pub mod net;
pub mod notify;
pub mod prefetch;
pub mod ring;
pub mod seq;
pub mod shard;
pub mod shm;
pub mod source;
pub mod sync;
pub mod time;
