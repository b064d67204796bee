//! The load: made-up connections that open, change and close at a constant rate, told to an
//! appliance through its ingest rings, as a user-space data plane would.
//!
//! [`rng`] (random numbers from a seed), [`flow`] (one connection and every state it had),
//! [`flows`] (which connection does what next; pure, time is an argument), [`driver`] (the rings),
//! [`interrupt`] (Ctrl-C as a flag).

pub mod driver;
pub mod flow;
pub mod flows;
pub mod interrupt;
pub mod rng;

pub use driver::Load;
pub use flow::Flow;
pub use flows::{Flows, FlowsConfig, Told};
