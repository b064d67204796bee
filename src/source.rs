//! What a source tells the protocol, and what the protocol asks of the kernel in return.
//!
//! A source (kernel conntrack, or the ingest ring) reports what it sees of this member's own
//! traffic; it knows nothing of roles. A commit is the way back: write this copy into the
//! kernel, or remove it there.

use crate::conn::slot::groups;
use crate::conn::{Connection, Generation, Tuple};

/// Something a source saw.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SourceEvent {
    /// A connection that is new or has changed.
    Seen {
        /// Its tuples and what is known of its state.
        connection: Connection,
        /// Which groups of `connection.state` the source knew (see [`groups`]); the others keep
        /// their last known value.
        known: u8,
    },
    /// A connection that is gone, by its original tuple.
    Gone {
        /// The original tuple.
        original: Tuple,
        /// What that says of the connection.
        end: End,
    },
}

/// What the end of an entry says of its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// It has ended: both sides said so here, or one broke it off.
    Seen,
    /// This source has it no more: its timeout ran out, somebody deleted it, its address went away.
    /// Its packets may take another way.
    Unseen {
        /// What its timeout had left, seconds; 0: nothing, or it is not known.
        left_s: u32,
    },
    /// The same, since the address that it was translated to has left this host. Whoever has that
    /// now can go on with it.
    Left,
}

impl End {
    /// Nobody saw it, and nothing is known of its last packet.
    pub const UNTOLD: End = End::Unseen { left_s: 0 };

    /// The same, if it may have been so many seconds ago: by now its timeout would have that much
    /// less left.
    pub fn read_late(self, seconds: u32) -> End {
        match self {
            End::Seen | End::Left => self,
            End::Unseen { left_s } => End::Unseen { left_s: left_s.saturating_sub(seconds) },
        }
    }
}

impl SourceEvent {
    /// An event that knows everything.
    pub fn seen(connection: Connection) -> SourceEvent {
        SourceEvent::Seen { connection, known: groups::ALL }
    }

    /// A connection whose end was seen.
    pub fn gone(original: Tuple) -> SourceEvent {
        SourceEvent::Gone { original, end: End::Seen }
    }

    /// The original tuple of the connection that it is about.
    pub fn original(&self) -> &Tuple {
        match self {
            SourceEvent::Seen { connection, .. } => &connection.original,
            SourceEvent::Gone { original, .. } => original,
        }
    }
}

/// When copies are written to the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CommitMode {
    /// At once: a takeover needs no work.
    Eager,
    /// When their active has died.
    Takeover,
    /// Never.
    Off,
}

/// What is known of the entry that the active of a copy has no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Elsewhere {
    /// Nothing of its last packet.
    Unknown,
    /// No earlier than in this second of the monotonic clock, begun ones counted, the last packet
    /// passed it.
    PassedAt(u32),
    /// The address that its connection is translated to has left that host.
    Left,
}

/// What the kernel's entry of what was a copy shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LookShows {
    /// Nothing that would be this member's.
    Nothing,
    /// Packets have passed it since it was written.
    Packets,
    /// None have, but the address that it is translated to has come to this host.
    Address,
}

/// Something to be written to the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Commit {
    /// Write the copy in this slot, if it still has this generation when its turn comes.
    Write {
        /// The slot.
        slot: u32,
        /// Its life when the commit was asked for.
        generation: Generation,
    },
    /// Write the copy in this slot once more, unless packets have passed its entry since it was
    /// written.
    Again {
        /// The slot.
        slot: u32,
        /// Its life when the commit was asked for.
        generation: Generation,
    },
    /// The connection in this slot is ours now: its entry gets the protocol's normal timeout again,
    /// if it has that of copies.
    Refresh {
        /// The slot.
        slot: u32,
        /// Its life when the commit was asked for.
        generation: Generation,
    },
    /// Tell what the kernel has of the connection in this slot, and whether packets have passed it
    /// since its entry was written: by [`Replica::handle_look`](crate::sync::Replica::handle_look).
    Look {
        /// The slot.
        slot: u32,
        /// Its life when this was asked for.
        generation: Generation,
        /// What is known of the entry that its active has no more.
        elsewhere: Elsewhere,
    },
    /// Tell what the kernel has of the connection in this slot, by
    /// [`Replica::handle_watch`](crate::sync::Replica::handle_watch).
    Watch {
        /// The slot.
        slot: u32,
        /// Its life when this was asked for.
        generation: Generation,
    },
    /// Remove the entry with this original tuple.
    Delete {
        /// The original tuple.
        original: Tuple,
    },
    /// Remove the entry with this original tuple, if it is one that was written for a copy, and no
    /// packet has passed it. Otherwise it is another connection's, which was in the way of the
    /// copy.
    DeleteUntouched {
        /// The original tuple.
        original: Tuple,
    },
}
