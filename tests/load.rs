//! The kernel's side under load and with faults: real appliances, real conntrack, two shards each.
//!
//! Gateways are network namespaces on one bridge. Most tests make their connections by ctnetlink,
//! in a gateway's own namespace: to the appliance there that is traffic, and it takes no other
//! host. Every test prints what it measured.
//!
//! | where | what |
//! |---|---|
//! | `load/gateways.rs` | gateways and their appliances |
//! | `load/conntrack.rs` | making, closing and listing connections in a gateway's kernel; churn at a rate |
//! | `load/overruns.rs` | events that are lost, and 100,000 a second of which none may stay lost |
//! | `load/refusals.rs` | what a kernel does not take: a full table, a translation that is in use |
//! | `load/committed.rs` | committed entries: flushed, before and after a takeover, their timeouts, many at once |
//! | `load/verified.rs` | entries that vanish or change without an event, and the walk that finds them |
//! | `load/deaths.rs` | ten deaths in a row with traffic and churn |
//! | `load/restarts.rs` | appliances killed under traffic that go on with their tables |

#[path = "load/committed.rs"]
mod committed;
mod common;
#[path = "load/conntrack.rs"]
mod conntrack;
#[path = "gateway/datagrams.rs"]
#[allow(dead_code)] // Of the gateways' tests only TCP traffic is needed, and what that is made of.
mod datagrams;
#[path = "load/deaths.rs"]
mod deaths;
#[path = "load/gateways.rs"]
mod gateways;
#[path = "load/overruns.rs"]
mod overruns;
#[path = "load/refusals.rs"]
mod refusals;
#[path = "load/restarts.rs"]
mod restarts;
#[path = "gateway/traffic.rs"]
#[allow(dead_code)]
mod traffic;
#[path = "load/verified.rs"]
mod verified;
