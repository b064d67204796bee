//! Contests: two members that each take a connection for theirs, while neither knows how the other came by it.
//!
//! (epoch, version, member) orders the states of one connection. It says nothing about two that have one tuple after the other (a member
//! stood still while its connection ended elsewhere, and its port was used again), nor about two members that heard nothing of each
//! other's claims. There the later traffic decides, and nobody's kernel entry is touched before: with equal epochs whoever is asked to take the
//! other's copy refuses (*superseded*), and both watch their own entry. Its timeout runs down by itself and goes up
//! with a packet; so does what an event tells. Who has traffic claims the connection, and the other one gives way to the higher
//! epoch. Where nobody has any, both stay as they are: what has ended goes by its own time.

use std::time::Duration;

use super::replica::Replica;
use crate::conn::{Connection, Generation, Kind};
use crate::counters::Counter;
use crate::source::{Commit, CommitMode};
use crate::time::Time;

/// Contests at once. Of further ones the stamp decides.
const CONTESTS_MAX: usize = 1024;

/// How often the entries are looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// A contest that nobody spoke of for so long is over: members ask again each second.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(10);

/// Timeouts are told in whole seconds: one that is higher by so many than it would be without a packet was put back by one.
const MARGIN_S: u64 = 2;

struct Contest {
    slot: u32,
    generation: Generation,
    /// When it was last spoken of.
    at: Time,
    /// What the entry had left to live, and when.
    timeout: Option<(u32, Time)>,
}

/// The contests of a shard.
pub(super) struct Contests {
    contests: Vec<Contest>,
    look_at: Time,
}

impl Contests {
    pub(super) fn new() -> Contests {
        Contests { contests: Vec::with_capacity(CONTESTS_MAX), look_at: Time::NEVER }
    }

    /// The connection in this slot is contested. `false`: there are too many.
    fn note(&mut self, now: Time, slot: u32, generation: Generation) -> bool {
        if let Some(contest) = self.find(slot, generation) {
            contest.at = now;
            return true;
        }
        let has_room = self.contests.len() < CONTESTS_MAX;
        if has_room {
            self.contests.push(Contest { slot, generation, at: now, timeout: None });
            self.look_at = self.look_at.min(now);
        }
        has_room
    }

    fn find(&mut self, slot: u32, generation: Generation) -> Option<&mut Contest> {
        self.contests.iter_mut().find(|contest| (contest.slot, contest.generation) == (slot, generation))
    }

    /// Whether the connection in this slot is contested; it is no more.
    pub(super) fn decide(&mut self, slot: u32, generation: Generation) -> bool {
        let before = self.contests.len();
        self.contests.retain(|contest| (contest.slot, contest.generation) != (slot, generation));
        self.contests.len() < before
    }

    /// When the entries are to be looked at.
    pub(super) fn look_at(&self) -> Time {
        if self.contests.is_empty() { Time::NEVER } else { self.look_at }
    }
}

impl Replica<'_> {
    /// Somebody else takes the connection in this slot for its own, and knows as much. Whether traffic decides it; without a kernel
    /// to ask for any, the stamp does.
    pub(super) fn contest(&mut self, now: Time, slot: u32) -> bool {
        let line = self.table.line(slot);
        let is_ours = match line.kind() {
            Kind::Held => !line.is_unseen(),
            Kind::Active => !self.is_presumed(slot),
            _ => false,
        };
        is_ours && self.config.commit == CommitMode::Eager && self.contests.note(now, slot, line.generation())
    }

    pub(super) fn tick_contests(&mut self, now: Time) {
        if !self.contests.look_at().reached(now) {
            return;
        }
        self.contests.look_at = now.after(PERIOD);
        let table = &self.table;
        self.contests.contests.retain(|contest| {
            let line = table.line(contest.slot);
            line.generation() == contest.generation
                && matches!(line.kind(), Kind::Held | Kind::Active)
                && now.since(contest.at) < FORGOTTEN_AFTER
        });
        for n in 0..self.contests.contests.len() {
            let Contest { slot, generation, .. } = self.contests.contests[n];
            if self.can_receive() {
                self.commit(Commit::Watch { slot, generation });
            }
        }
    }

    /// The kernel's entry of a contested connection, as it is.
    pub fn handle_watch(&mut self, now: Time, slot: u32, generation: Generation, there: &Connection) {
        let is_it = there.original == self.table.tuples(slot).0;
        let Some(contest) = self.contests.find(slot, generation).filter(|_| is_it) else { return };
        let left = there.state.timeout_s;
        let Some((before, at)) = contest.timeout else {
            contest.timeout = Some((left, now));
            return;
        };
        let silent = (before as u64).saturating_sub(now.since(at).as_secs());
        if left as u64 >= silent + MARGIN_S {
            self.outdo(now, slot);
        }
    }

    /// Traffic of a contested connection shows up here: whoever else has it gives way.
    fn outdo(&mut self, now: Time, slot: u32) {
        let line = self.table.line(slot);
        if !self.contests.decide(slot, line.generation()) {
            return;
        }
        self.counters.count(Counter::Claims);
        self.counters.count(Counter::ClaimsContested);
        let stamp = line.stamp().claimed();
        self.epoch_seen = self.epoch_seen.max(stamp.epoch);
        if line.kind() == Kind::Active {
            self.send_change(now, slot, 0);
        }
        self.table.update(slot, |line| line.set_stamp(stamp));
    }
}
