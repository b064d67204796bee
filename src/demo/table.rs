//! What a member's memory holds, copied out for the checker.
//!
//! Of a living member every copy is consistent. Of a killed one a slot may be half written: then it
//! counts as torn, and only its tuples are believed.

use std::sync::atomic::{Ordering, fence};

use crate::conn::slot::groups;
use crate::conn::{Connection, Coordinate, Kind, MemberId, Slot, Stamp};
use crate::seq::Seq;
use crate::shm::RegionView;
use crate::sync::stream::{Durable, stream_index};
use crate::word::ReadWord;

/// How often a slot that is being written is read again before it counts as torn.
const TRIES: u32 = 100_000;

/// What of an active connection (or of its close) its backup has acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Acknowledged {
    /// Its newest state.
    Newest,
    /// An earlier one.
    Earlier,
    /// Nothing, to its present backup.
    Nothing,
}

/// One slot that holds something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// Where.
    pub at: Coordinate,
    /// Held, active, backup or closing.
    pub kind: Kind,
    /// Half written: only the tuples are believed.
    pub is_torn: bool,
    /// How new it is.
    pub stamp: Stamp,
    /// The other copy.
    pub peer: Coordinate,
    /// What it holds.
    pub connection: Connection,
    /// Of an active or closing one.
    pub acknowledged: Acknowledged,
}

/// Everything that a member's table holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TableCopy {
    /// Whose.
    pub member: MemberId,
    /// Slots that are neither free nor leased.
    pub found: Vec<Found>,
}

/// Copies a member's table.
pub fn copy(view: &RegionView) -> TableCopy {
    let member = view.header().member;
    let mut found = Vec::new();
    for shard in 0..view.header().sizes.shards {
        let memory = view.shard(shard);
        let floor = |peer: Coordinate| match peer.is_plausible() {
            true => Durable(&memory.streams[stream_index(peer.member(), peer.shard())]).floor(),
            false => Seq::NONE,
        };
        for (slot, words) in memory.slots.iter().enumerate() {
            let (line, addresses, is_torn) = read(words);
            if matches!(line.kind(), Kind::Free | Kind::Leased) {
                continue;
            }
            // `last` names the datagram of the newest delta, and is none while a change waits to be
            // sent.
            let acknowledged = match line.last().is_passed_by(floor(line.peer())) {
                true => Acknowledged::Newest,
                // The tuples stay in the mask until a delta that carried them was acknowledged.
                false if line.groups() & groups::TUPLES == 0 => Acknowledged::Earlier,
                false => Acknowledged::Nothing,
            };
            let (original, reply) = line.tuples(&addresses);
            found.push(Found {
                at: Coordinate::new(member, shard, slot as u32, line.generation()),
                kind: line.kind(),
                is_torn,
                stamp: line.stamp(),
                peer: line.peer(),
                connection: Connection::new(original, reply, line.state()),
                acknowledged,
            });
        }
    }
    TableCopy { member, found }
}

fn read(slot: &Slot<ReadWord>) -> (crate::conn::slot::Line, crate::conn::slot::Addresses, bool) {
    for _ in 0..TRIES {
        if let Some((line, addresses)) = slot.snapshot() {
            return (line, addresses, false);
        }
        std::hint::spin_loop();
    }
    // Its writer is dead.
    fence(Ordering::Acquire);
    (slot.line(), slot.addresses(), true)
}
