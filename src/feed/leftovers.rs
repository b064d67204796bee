//! Leftovers: entries that have the timeout of copies, and no copy here.
//!
//! A process that goes on with the table of the one before knows that they are deletes which that
//! one owed: they are asked for once more, and removed. After a start without a table they may have
//! traffic that is yet to come: they are *aged*, which gives them the timeout that the kernel gives
//! a connection in their state. Packets of an established connection raise no event. So after each
//! of some pauses the kernel's table is read once more: an aged entry that nobody else brought a
//! copy of, and that has more left than it would have without a packet, is a connection of ours.

use std::collections::VecDeque;
use std::time::Duration;

use super::asking::LOOKS_MAX;
use crate::conn::Connection;
use crate::conntrack::codec::GIVEN_MAX_S;
use crate::conntrack::timeouts::Timeouts;
use crate::counters::{Counter, Counters};
use crate::sync::Replica;
use crate::time::Time;

/// Pauses between the ageing and the first look back, and between one and the next. What has its
/// first packet later is told by its next change of state.
const LOOK_BACK_AFTER: [Duration; 3] =
    [Duration::from_secs(3), Duration::from_secs(10), Duration::from_secs(60)];

/// An entry is known to be without a packet to so many seconds: whole ones are told, and it was
/// aged some time before the last one was.
const MARGIN_S: u64 = 2;

/// What is to be done about an entry that has the timeout of copies and is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LeftoverStep {
    /// It is looked at once more.
    Look,
    /// It is removed.
    Remove,
    /// So is one that was written for a copy which its kernel did not take in the end.
    RemoveCopys,
    /// It gets the normal timeout.
    Age,
}

/// A shard's leftovers.
pub(super) struct Leftovers {
    waiting: VecDeque<(Connection, LeftoverStep)>,
    /// When the last one was aged.
    aged_at: Time,
    /// When to look back at those that were; `NEVER` if there are none.
    look_back_at: Time,
    /// How often that was done.
    looked_back: usize,
}

impl Leftovers {
    pub(super) fn new() -> Leftovers {
        Leftovers {
            waiting: VecDeque::with_capacity(LOOKS_MAX),
            aged_at: Time(0),
            look_back_at: Time::NEVER,
            looked_back: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// A dump has shown one. What does not fit is found by the next dump, or expires.
    pub(super) fn found(
        &mut self,
        there: &Connection,
        step: LeftoverStep,
        counters: &Counters<'_>,
    ) {
        counters.count(Counter::SourceLeftovers);
        match self.waiting.len() < LOOKS_MAX {
            true => self.waiting.push_back((*there, step)),
            false => counters.count(Counter::LeftoversFull),
        }
    }

    /// This entry goes, unless it comes to life before.
    pub(super) fn remove(
        &mut self,
        there: &Connection,
        step: LeftoverStep,
        counters: &Counters<'_>,
    ) {
        match self.waiting.len() < LOOKS_MAX {
            true => self.waiting.push_front((*there, step)),
            false => counters.count(Counter::LeftoversFull),
        }
    }

    /// The next one, and what is to be done about it.
    pub(super) fn next(
        &mut self,
        now: Time,
        replica: &Replica<'_>,
    ) -> Option<(Connection, LeftoverStep)> {
        while let Some((there, step)) = self.waiting.pop_front() {
            // Unless it came to life again: then the entry belongs to that connection.
            if replica.table().find_original(&there.original).is_none() {
                if step == LeftoverStep::Age {
                    (self.aged_at, self.looked_back) = (now, 0);
                    self.look_back_at = now.after(LOOK_BACK_AFTER[0]);
                }
                return Some((there, step));
            }
        }
        None
    }

    /// It cannot be asked for, or removed, just now.
    pub(super) fn later(&mut self, leftover: (Connection, LeftoverStep)) {
        self.waiting.push_front(leftover);
    }

    /// When the kernel's table is to be read for aged entries that packets have passed; `NEVER`
    /// while some wait.
    pub(super) fn look_back_at(&self) -> Time {
        if self.waiting.is_empty() { self.look_back_at } else { Time::NEVER }
    }

    /// It begins to be read.
    pub(super) fn look_back(&mut self, now: Time) {
        self.looked_back += 1;
        self.look_back_at =
            LOOK_BACK_AFTER.get(self.looked_back).map_or(Time::NEVER, |pause| now.after(*pause));
    }

    /// Whether this entry, which is in no table, may be one that was aged, and that no packet has
    /// passed since.
    pub(super) fn may_be_silent(&self, now: Time, timeouts: &Timeouts, there: &Connection) -> bool {
        let given = timeouts.of(there) as u64;
        there.state.timeout_s as u64 + now.since(self.aged_at).as_secs() <= given + MARGIN_S
    }
}

/// Whether only we can have given the entry its timeout, and no packet has passed it since.
pub(super) fn is_leftover(timeouts: &Timeouts, there: &Connection) -> bool {
    there.state.timeout_s > timeouts.of(there).max(GIVEN_MAX_S)
}
