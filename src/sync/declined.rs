//! Copies that the kernel does not take: told to their active, tried again, and shown.
//!
//! An ack says that a copy is in the table. Its entry in the kernel is written a little later, and
//! may be refused: the kernel's table is full, or another connection holds the translated tuple.
//! Such a copy cannot carry traffic. The backup keeps it, tries again once a second, and
//! **declines** it: its active counts the connection as exposed, and moves it to another backup if
//! there is one. When the kernel takes the entry after all, the backup says that too.
//!
//! Entries that are there are written again long before their timeout ends, for refreshes raise no
//! events, and no event means alive.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::commits::{TRIES_PER_TICK, TRY_AGAIN};
use super::mutation::{Mutation, is};
use super::replica::{Candidate, Replica};
use super::requests::{Rank, Task};
use crate::ccp::message::{Fault, Place};
use crate::conn::slot::groups;
use crate::conn::table::{DeclineOrder, On, Written};
use crate::conn::{Coordinate, Generation, Kind, MemberId};
use crate::counters::Counter;
use crate::memory::JOURNAL_DECLINES;
use crate::source::{Commit, CommitMode, End};
use crate::time::Time;

impl Replica<'_> {
    /// What became of the commit of the copy, or of the connection taken over, in this slot.
    pub fn handle_commit(
        &mut self,
        now: Time,
        slot: u32,
        generation: Generation,
        outcome: Result<Written, Fault>,
    ) {
        let line = self.ledger.line(slot);
        if line.generation() != generation {
            return;
        }
        match (line.kind(), outcome) {
            (Kind::Backup, _) => {}
            (Kind::Active, Err(_)) => return self.owe(now, slot),
            (Kind::Active, Ok(_)) => return self.ledger.set_passed_until(slot, 0),
            _ => return,
        }
        let is_missing = match self.ledger.on(slot) {
            On::None => false,
            On::Missing => true,
            on => panic!("a copy stands in {on:?}"),
        };
        match outcome {
            Ok(written) => {
                // (Written while its active is silent it has the normal timeout, which says
                // nothing.)
                match self.is_living_copy(slot) {
                    false => self.ledger.set_written(slot, Written::Normal),
                    // As it was since it was written.
                    true if written == Written::AsItWas
                        && matches!(self.ledger.written(slot), Written::Resumed | Written::Yes) => {
                    }
                    true => self.ledger.set_written(slot, written),
                }
                // (What packets had left before it was written over came after it was written
                // before.)
                let has_passed =
                    self.ledger.written_at(slot) > 0 && self.ledger.passed_s(slot, now) > 0;
                if written == Written::Yes && !has_passed {
                    self.ledger.set_written_at(slot, now.begun_seconds());
                }
                if is_missing {
                    self.ledger.unlist(slot);
                }
                if self.ledger.is_declined(slot) {
                    match self.decline(slot, None) {
                        true => self.ledger.set_success_due(slot, false),
                        // There is no room for a request, or nobody hears it: it is tried, and
                        // told, again.
                        false if self.may_return(line.peer().member()) => {
                            self.ledger.miss(now, slot);
                        }
                        // Lost: when it is back all its copies are written again, and this is told
                        // then.
                        false => {}
                    }
                }
            }
            Err(fault) => {
                if !is_missing {
                    self.ledger.miss(now, slot);
                }
                if self.decline(slot, Some(fault)) {
                    self.ledger.set_success_due(slot, true);
                }
            }
        }
    }

    /// The copy in this slot was written over an entry that packets had left so many seconds.
    pub fn handle_overwritten(
        &mut self,
        now: Time,
        slot: u32,
        generation: Generation,
        passed_s: u32,
    ) {
        let line = self.ledger.line(slot);
        if line.generation() == generation && line.kind() == Kind::Backup {
            let until = now.after(Duration::from_secs(passed_s.into()));
            self.ledger.set_passed_until(slot, until.begun_seconds());
        }
    }

    /// The kernel's entry of this living copy is gone, or there was no time to write it: it is
    /// written again.
    pub(super) fn write_again(&mut self, now: Time, slot: u32) {
        let generation = self.ledger.line(slot).generation();
        if self.config.commit != CommitMode::Eager {
            return;
        }
        if self.can_receive() {
            self.ask_commit(Commit::Write { slot, generation });
        } else if self.ledger.on(slot) == On::None {
            self.ledger.miss(now, slot);
        }
    }

    /// A copy stops being one: whether the kernel has it does not matter any more.
    pub(super) fn end_missing(&mut self, slot: u32) {
        if self.ledger.on(slot) == On::Missing {
            self.ledger.unlist(slot);
        }
        self.ledger.set_success_due(slot, false);
    }

    /// A connection that was taken over has no entry: it is written again, as ours now. Beyond the
    /// limit it is left to its own traffic and to the next sweep.
    /// Without an entry no packet passes: it ends when that would have run out.
    pub(super) fn owe(&mut self, now: Time, slot: u32) {
        match (self.ledger.passed_until(slot), self.ledger.line(slot).state().timeout_s) {
            (0, 0) => {} // Its active's kernel did not tell.
            (0, left_s) => {
                let until = now.after(Duration::from_secs(left_s.into()));
                self.ledger.set_passed_until(slot, until.begun_seconds());
            }
            _ if self.ledger.passed_s(slot, now) == 0 => return self.gone(now, slot, End::UNTOLD),
            _ => {}
        }
        if !self.commits.owe(now, slot, self.ledger.line(slot).generation()) {
            self.counters.count(Counter::CommitOwedFull);
        }
    }

    fn decline(&mut self, slot: u32, fault: Option<Fault>) -> bool {
        let line = self.ledger.line(slot);
        if self.config.commit != CommitMode::Eager {
            return true; // It counts on no entry while it lives.
        }
        if !self.is_up(line.peer().member()) {
            // Nobody to tell; who takes over sees by itself. But one that comes back still believes
            // what it was told before.
            return fault.is_some();
        }
        let own = Place { slot, generation: line.generation() };
        if !self.requests.has_room(Rank::Question) {
            return false;
        }
        self.declines = self.declines.wrapping_add(1).max(1);
        let number = self.declines;
        self.memory.journal[JOURNAL_DECLINES].store(number as u64, Ordering::Relaxed);
        self.request(Rank::Question, Task::Decline { own, number, fault }, line.peer())
    }

    /// The backup of one of our connections says whether its kernel has it.
    pub(super) fn apply_decline(
        &mut self,
        now: Time,
        target: Place,
        own: Coordinate,
        number: u32,
        fault: Option<Fault>,
    ) {
        if target.slot >= self.ledger.capacity() {
            return self.counters.count(Counter::RejectTarget);
        }
        let slot = target.slot;
        let line = self.ledger.line(slot);
        if line.generation() != target.generation
            || line.kind() != Kind::Active
            || line.peer() != own
        {
            return; // It has another backup by now, or none.
        }
        let heard = self.ledger.hear_decline(slot, number);
        if heard == DeclineOrder::Overtaken {
            return;
        }
        if fault.is_none() && is(Mutation::DeclinedForever) {
            return;
        }
        if fault.is_none() {
            return self.ledger.set_declined_by_backup(now, slot, false);
        }
        self.counters.count(Counter::DeclinedByPeer);
        self.ledger.set_declined_by_backup(now, slot, true);
        let may_move = !self.ledger.is_moving(slot)
            && matches!(self.ledger.on(slot), On::None | On::Dirty)
            && self.requests.has_room(Rank::Question);
        if may_move && let Candidate::At(backup) = self.lease_for(now, slot, 1 << own.member()) {
            let taken = self.move_backup(now, slot, backup);
            assert!(taken, "there was room for a request");
        } else if heard == DeclineOrder::PerhapsNewest {
            self.ask_again(now, slot);
        }
    }

    /// Whether the backup's kernel has this connection is not known for sure. Who is sent what it
    /// has already writes it to its kernel once more, and tells what became of that.
    fn ask_again(&mut self, now: Time, slot: u32) {
        if matches!(self.ledger.on(slot), On::None | On::Dirty) {
            self.mark_dirty(now, slot, groups::ALL);
        }
    }

    /// One slot of the walk over what a member declined before its process was killed.
    pub(super) fn ask_declined(&mut self, now: Time, member: MemberId, slot: u32) -> bool {
        let line = self.ledger.line(slot);
        if line.kind() == Kind::Active
            && line.peer().member() == member
            && self.ledger.is_declined(slot)
        {
            self.ask_again(now, slot);
        }
        true
    }

    /// Copies that the kernel refused, and those whose entry is due to be written again.
    pub(super) fn tick_missing(&mut self, now: Time) {
        let table = &self.ledger;
        self.commits.tick_owed(now, |slot, generation| {
            let line = table.line(slot);
            line.generation() == generation && line.kind() == Kind::Active
        });
        for _ in 0..TRIES_PER_TICK {
            // What arrives comes first: only a short queue takes what may be refused again.
            let due = self
                .ledger
                .first_missing()
                .is_some_and(|slot| self.ledger.since(slot).after(TRY_AGAIN).reached(now));
            if !due || !self.commits.may_try() {
                break;
            }
            let Some(slot) = self.ledger.take_missing() else { break };
            let generation = self.ledger.line(slot).generation();
            self.ask_commit(Commit::Write { slot, generation });
        }
        for slot in self.commits.rewrite(now, self.ledger.capacity()) {
            let line = self.ledger.line(slot);
            if line.kind() == Kind::Backup && self.is_up(line.peer().member()) {
                self.ask_commit(Commit::Again { slot, generation: line.generation() });
            }
        }
    }

    /// When [`tick_missing`](Self::tick_missing) has something to do.
    pub(super) fn missing_at(&self) -> Time {
        let missing = self.ledger.first_missing().map(|slot| self.ledger.since(slot));
        missing
            .into_iter()
            .chain(self.commits.owed_since())
            .min()
            .map_or(Time::NEVER, |since| since.after(TRY_AGAIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::{Connection, State, Tuple};
    use crate::memory::{MemorySize, OwnedMemory};
    use crate::source::SourceEvent;
    use crate::sync::{ReplicaConfig, test_config};

    /// Traffic seed 1000010807: a connection was taken over whose entry the kernel took only when
    /// nobody spoke of it any more. There it had all its time before it.
    #[test]
    fn what_has_no_entry_for_as_long_as_that_would_have_lasted_has_ended() {
        let at = |seconds| Time(1).after(Duration::from_secs(seconds));
        for (timeout_s, refused, taken, lives) in [
            (30, &[0, 10, 29][..], None, true),
            (30, &[0, 10, 29, 32], None, false),
            (30, &[0, 10, 40], Some(20), true), // It had an entry meanwhile.
            (0, &[0, 10, 1000], None, true),    // Nobody knows how long.
        ] {
            let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
            let config = ReplicaConfig { commit: CommitMode::Eager, ..test_config() };
            let mut replica = Replica::new(config, memory.parts());
            let original = Tuple::v4(6, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2));
            let state = State { tcp_state: 3, timeout_s, ..State::default() };
            let connection = Connection::new(original, original.mirrored(), state);
            replica.handle_source(at(0), &SourceEvent::seen(connection));
            let slot = replica.ledger.find_original(&original).expect("it is held");
            replica.ledger.unlist(slot);
            replica.ledger.activate(slot);
            let generation = replica.ledger.line(slot).generation();
            for seconds in refused {
                if taken.is_some_and(|taken| taken < *seconds) {
                    replica.handle_commit(at(20), slot, generation, Ok(Written::Yes));
                }
                replica.handle_commit(at(*seconds), slot, generation, Err(Fault::Clash));
            }
            assert_eq!(
                replica.ledger.find_original(&original).is_some(),
                lives,
                "{timeout_s} {refused:?} {taken:?}"
            );
        }
    }
}
