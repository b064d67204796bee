//! A typed io_uring: operations in, completions out, buffers that find their way home.
//!
//! ```text
//!   Operation ──push──> SQ ──submit/wait──> kernel ──> CQ ──collect──> queue ──take──> Completion
//!                                             │                                        │
//!                                             └──<── BufferPool <──drop── Buffer ──<───┘
//! ```
//!
//! A [`Ring`] belongs to the thread that made it (it is not `Send`), waits with a deadline
//! instead of timeout operations, and hands every receive buffer out as a [`Buffer`] that
//! gives itself back. Linux 6.1 is the floor; whatever came later, or may be refused, is
//! a switch in [`Features`] that is turned off when the kernel says no.
//!
//! What the operations mean (sockets, retries, what a token stands for) is left to `net`.

mod buffers;
mod error;
mod operation;
mod probe;
mod uring;

pub use buffers::{Buffer, CONTROL_ROOM, NAME_ROOM};
pub use error::RingError;
pub use operation::{Completion, Full, Operation};
pub use probe::Features;
pub use uring::{Ring, SUBMISSIONS};
