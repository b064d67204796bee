//! Synchronization: keeping every connection on exactly two members.
//!
//! [`Replica`] is the protocol of one shard, without clock, socket or thread: source events,
//! datagrams, views and the time go in; datagrams and commits come out. Its parts, in the order
//! in which data flows:
//!
//! - `ingest`: what the source saw becomes a change of the table; the hold time;
//! - `replica`: which backup a connection gets, what is dirty, what is exposed;
//! - `transmit`: dirty connections become deltas in datagrams; repeats, acks, skips;
//! - `receive`: datagrams are checked and taken apart; what is refused, what moves the floor;
//! - `arrivals`: news and updates become copies; who gives way to whom;
//! - `contest`: two members both have a connection; whose packets were later;
//! - `endings`: closes and releases, and what is left of a copy;
//! - `acks`: what comes back for what was sent: floors, repeats, refusals;
//! - `takeover`: a member dies, leaves, comes: walks over the table;
//! - `digest`: both sides of a stream compare what they hold, and repair what differs; what each
//!   copy adds to the sums;
//! - `resume`: the memory that a killed process left behind becomes a shard's again;
//! - `progress`: what is to be seen of each member's full sync, and how much goes before live
//!   changes;
//! - `moves`: a connection changes its backup, make before break; what becomes of control requests;
//! - `declined`: what became of each commit (`handle_commit`); copies that the kernel does not
//!   take are told to their active, tried again and shown;
//! - `timers`: when a shard does something by itself.
//!
//! Parts that own their state, and know of no other:
//!
//! - `commits`: what the kernel is to be told, and is owed;
//! - `compare`: how far each stream's comparison by digests is;
//! - `contests`: what two members take for theirs, and what their entries have shown;
//! - `credit`: slots at peers that this member may fill, and those here that peers may;
//! - `delta`: a new as it arrived, and what can become of a delta;
//! - `full_sync`: who has all that it should have;
//! - `inbox`: what was received, and what its sender is to be told;
//! - `ledger`: what stands in each slot, in which list, and what all of it adds up to;
//! - `outbox`: what was sent, what of it is acknowledged, what goes again;
//! - `peers`: what each member is to this shard;
//! - `requests`: releases, offers and declines, which belong to no single delta;
//! - `sends`: what a pass hands to the loop;
//! - `sums`: what each stream's copies add up to, for the ledger;
//! - `walks`: walks over the table, under way and waiting.
//!
//! They stand on what lies in memory that outlives the process:
//!
//! - `stream`: where sending and receiving stand, and the timers of one stream;
//! - `lease`: slots at peers that this member may fill;
//! - `history`: what was sent lately, byte for byte, and what it was about.
//!
//! `mutation` has the deliberate faults that the simulator must notice; without the feature
//! `mutations` there is none.

mod acks;
mod arrivals;
mod commits;
mod compare;
mod contest;
mod contests;
mod credit;
mod declined;
mod delta;
mod digest;
mod endings;
pub mod full_sync;
pub mod history;
mod inbox;
mod ingest;
pub mod lease;
mod ledger;
mod moves;
#[cfg(feature = "mutations")]
pub mod mutation;
#[cfg(not(feature = "mutations"))]
#[allow(dead_code)]
pub(crate) mod mutation;
mod outbox;
mod peers;
mod progress;
mod receive;
mod replica;
mod requests;
mod resume;
mod sends;
pub mod stream;
mod sums;
mod takeover;
mod timers;
mod transmit;
mod walks;

pub use commits::REWRITE_PERIOD;
pub use compare::Finding;
#[cfg(test)]
pub(crate) use replica::test_config;
pub use replica::{Replica, ReplicaConfig};
pub use sends::{Token, Transmit};
