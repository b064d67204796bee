//! The shard's side of the wire: everything about UDP that the loop need not know.
//!
//! ```text
//!   arena ──send──> Senders ── one connected socket a stream, UDP_SEGMENT ──> peer:8116
//!                      └────── one a heartbeat target, DSCP CS6
//!
//!   local:8116 ── one socket a shard, steered by the shard byte ──┐
//!   group:8116 ── heartbeats, shard 0 ────────────────────────────┴─> Train ──> datagrams
//! ```
//!
//! [`Port`] is the one object that a shard holds. Before the shards start, one thread calls
//! [`bind_group`], because the sockets of a steered group must be bound in shard order.
//!
//! What the bytes mean is left to `ccp` and `sync`; when to send is left to the loop.

mod error;
mod interface;
mod port;
mod refusals;
mod segmentation;
mod senders;
mod sockets;
mod steering;
#[cfg(test)]
mod tests;

pub use error::NetError;
pub use interface::{Interface, interface_of};
pub use port::{Event, Port, PortConfig, PortCounts};
pub use refusals::Refusals;
pub use senders::{SENDS_MAX, SendMode, Target};
pub use steering::bind_group;
