//! A delta that arrives, and what can become of it.

use crate::ccp::message::{Place, Reason};
use crate::conn::{Connection, Coordinate, Stamp};

/// What became of a delta.
#[cfg_attr(test, derive(PartialEq, Debug))]
pub(super) enum DeltaResult {
    /// The copy is what the delta says, or newer.
    Applied,
    /// It never will be: the sender is told, and finds another backup.
    Refused(Reason),
    /// Not now. The sender is not told: its timeout brings the same datagram again.
    Busy,
}

/// A new, as it arrived.
#[derive(Clone, Copy)]
pub(super) struct New<'c> {
    /// The slot here that it is for.
    pub target: Place,
    /// The state that it brings.
    pub stamp: Stamp,
    /// Where the sender has the connection.
    pub active: Coordinate,
    /// Its previous backup, as long as that was not released.
    pub previous: Option<Coordinate>,
    /// The whole of it.
    pub connection: &'c Connection,
}
