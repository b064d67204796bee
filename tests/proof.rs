//! The awkward cases on real processes: appliances in network namespaces, on a sync link that
//! loses, is cut, passes one way only or small datagrams only, and appliances that stop, share a
//! number, die or are alone. All of it under churn, and at the end of each the demo's check, field
//! by field. Every test first shows that its fault is there, and prints what it measured.
//!
//! | where | what |
//! |---|---|
//! | `proof/field.rs` | hosts on a switch, members on them, and faults of the link between |
//! | `proof/churn.rs` | connections that open, change and close, and what the tables must hold of them in the end |
//! | `proof/links.rs` | faults of the sync link |
//! | `proof/members.rs` | faults of a member; a group of one |
//! | `proof/restarts.rs` | a member's process is killed, or restarts, and goes on with its table |

#[path = "proof/churn.rs"]
mod churn;
mod common;
#[path = "proof/field.rs"]
mod field;
#[path = "proof/links.rs"]
mod links;
#[path = "proof/members.rs"]
mod members;
#[path = "proof/restarts.rs"]
mod restarts;
