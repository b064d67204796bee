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
//! [`Port`] is the one object that a shard holds. Before the shards start, one thread makes the
//! [`Link`], because the sockets of a steered group must be bound in shard order; it keeps an eye
//! on it from then on.
//!
//! What the bytes mean is left to `ccp` and `sync`; when to send is left to the loop.

mod address;
mod error;
mod interface;
mod link;
mod port;
mod refusals;
mod segmentation;
mod senders;
mod sockets;
mod steering;
#[cfg(test)]
mod tests;

pub use address::{ScopedAddress, is_link_local};
pub use error::NetError;
pub use interface::Interface;
pub use link::{Handover, Link, LinkConfig, Receivers, Renewal};
pub use port::{Event, Port, PortConfig, PortCounts};
pub use refusals::Refusals;
pub use senders::{SENDS_MAX, SendMode, Target};
