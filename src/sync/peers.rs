//! Peers: what this shard makes of each member.
//!
//! ```text
//!            heard                 silent                  reprotect_after, goodbye,
//!  Vacant ----------> Up <------------------> Down ------> or another table ----> Purge
//!    ^                        heard again                                           |
//!    +--------------------------- the walk is done --------------------------------+
//! ```

use crate::time::Time;

/// What this shard makes of a member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PeerState {
    /// Nothing here refers to it.
    Vacant,
    /// Alive, with the table that this shard knows.
    Up,
    /// Silent.
    Down {
        /// Since when.
        since: Time,
        /// Whether something agreed on with it was let go.
        left_behind: bool,
        /// Whether its streams were declared lost: it is silent for long, and there is nobody else
        /// to turn to.
        lost: bool,
    },
    /// A walk lets go of everything agreed on with it.
    Purge,
}
