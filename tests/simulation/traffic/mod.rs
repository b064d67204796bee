//! The simulator with its kernel: gateways whose conntrack is the model that tests/kernel holds
//! against the real one, each with the appliance's own feed and protocol, and flows that send
//! packets along routes.
//!
//! Here nobody tells the protocol the truth. Entries linger when their connection has ended,
//! traffic moves without an event, idle entries run out while their connection lives elsewhere,
//! ports are used again at once, operators flush and delete, and change timeouts; other programs
//! write entries, some with helpers or labels that not every kernel has; tables are full; the
//! address goes with the routes, and what was masqueraded behind it; processes stand still, are
//! killed and come back, kernels die. What is checked is what a user would see: packets that pass,
//! in the translation that they had, and entries that are there or gone.
//!
//! | promise | how it is checked |
//! |---|---|
//! | nothing is cut that nothing happened to | every packet of a flow whose gateway lives and that never moved passes |
//! | one death cuts nothing | every packet of a flow that had settled before passes at whoever has it then |
//! | an end elsewhere ends nothing (11) | the same, while its entry at another member runs out, is flushed or deleted |
//! | what has ended goes | no entry outlives what the kernel gives its state, but copies whose active lives |
//! | one life changes no other | the entry of a living flow is in the state that its packets brought about |
//! | short connections are never sent | no datagram brings a connection that was over before |
//! | two copies | once settled, two kernels have the entry |

mod faults;
pub mod flow;
mod kernel;
#[path = "../../kernel/model.rs"]
#[allow(dead_code)]
pub mod model;
mod scripts;
mod sim;

use std::time::Duration;

pub use sim::{Plan, Sim};

/// Pause between two walks that verify entries.
const VERIFY: Duration = Duration::from_secs(3);
