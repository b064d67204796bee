//! Contests: two members that each take a connection for theirs, while neither knows how the other came by it.
//!
//! (epoch, version, member) orders the states of one connection. It says nothing about two that have one tuple after the other (a member
//! stood still while its connection ended elsewhere, and its port was used again), nor about two members that heard nothing of each
//! other's claims. There the later traffic decides, and nobody's kernel entry is touched before: with equal epochs whoever is asked to take the
//! other's copy refuses (*superseded*), and both watch their own entry. Its timeout runs down by itself and goes up
//! with a packet; so does what an event tells. Who has traffic claims the connection once more, and the other one gives way to the higher
//! epoch. Where nobody has any, both stay as they are: what has ended goes by its own time.

use std::time::Duration;

use super::replica::Replica;
use crate::conn::slot::groups;
use crate::conn::{Connection, Generation, Kind, Phase, Stamp};
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
    /// It was ended or let go elsewhere, and is held here until the entry has told whether it goes on; what the entry itself is to
    /// become if not.
    doubt: Option<Doubt>,
    /// The highest stamp that was heard of for the other one.
    rival: Stamp,
    /// When it was last spoken of.
    at: Time,
    /// What the entry had left to live, and when.
    timeout: Option<(u32, Time)>,
}

/// What becomes of the kernel's entry of a connection that had an active here, was claimed elsewhere, and shows no packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Doubt {
    /// It was closed there: it goes.
    Closed,
    /// Another member has it: it stays for its own time, and may become a copy's.
    Taken,
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
    fn note(
        &mut self,
        now: Time,
        (slot, generation): (u32, Generation),
        rival: Stamp,
        doubt: Option<Doubt>,
    ) -> bool {
        if let Some(contest) = self.find(slot, generation) {
            contest.at = now;
            contest.rival = contest.rival.max(rival);
            return true;
        }
        let has_room = self.contests.len() < CONTESTS_MAX;
        if has_room {
            self.contests.push(Contest { slot, generation, doubt, rival, at: now, timeout: None });
            self.look_at = self.look_at.min(now);
        }
        has_room
    }

    fn find(&mut self, slot: u32, generation: Generation) -> Option<&mut Contest> {
        self.contests.iter_mut().find(|contest| (contest.slot, contest.generation) == (slot, generation))
    }

    /// The contest about the connection in this slot is over; the stamp that it is to outdo, if there was one.
    pub(super) fn decide(&mut self, slot: u32, generation: Generation) -> Option<Stamp> {
        let is_it = |contest: &Contest| (contest.slot, contest.generation) == (slot, generation);
        let at = self.contests.iter().position(is_it)?;
        Some(self.contests.swap_remove(at).rival)
    }

    /// When the entries are to be looked at.
    pub(super) fn look_at(&self) -> Time {
        if self.contests.is_empty() { Time::NEVER } else { self.look_at }
    }
}

impl Replica<'_> {
    /// Somebody else takes the connection in this slot for its own, with this stamp, and knows as much. Whether traffic is to decide; without a kernel
    /// to ask for any, the stamp does.
    pub(super) fn contest(&mut self, now: Time, slot: u32, rival: Stamp) -> bool {
        let line = self.table.line(slot);
        let is_ours = match line.kind() {
            Kind::Held => !line.is_unseen(),
            Kind::Active => !self.is_presumed(slot),
            _ => false,
        };
        is_ours
            && self.config.commit == CommitMode::Eager
            && self.contests.note(now, (slot, line.generation()), rival, None)
    }

    /// An active here was told that its connection was claimed elsewhere, with this stamp, and closed or let go there. Packets that pass here
    /// say otherwise: it is held above that until they have had time to. `false`: nobody can be asked.
    pub(super) fn doubt(&mut self, now: Time, connection: &Connection, over: Stamp, doubt: Doubt) -> bool {
        if self.config.commit != CommitMode::Eager || self.contests.contests.len() == CONTESTS_MAX {
            return false;
        }
        let Some(slot) = self.fill_held(connection, Some(over), true) else { return false };
        self.contests.note(now, (slot, self.table.line(slot).generation()), over, Some(doubt))
    }

    /// Doubts that no packet has dispelled.
    fn end_doubts(&mut self, now: Time) {
        let is_over = |contest: &Contest| contest.doubt.is_some() && now.since(contest.at) >= FORGOTTEN_AFTER;
        while let Some(at) = self.contests.contests.iter().position(is_over) {
            let Contest { slot, generation, doubt, .. } = self.contests.contests.swap_remove(at);
            self.drop_doubted(slot, generation, doubt);
        }
    }

    fn drop_doubted(&mut self, slot: u32, generation: Generation, doubt: Option<Doubt>) {
        let line = self.table.line(slot);
        if line.generation() != generation || line.kind() != Kind::Held || !line.is_unseen() {
            return;
        }
        let original = self.table.tuples(slot).0;
        self.table.forget(slot);
        self.table.recycle(slot);
        if doubt == Some(Doubt::Closed) {
            self.delete_entry(&original);
        }
    }

    pub(super) fn tick_contests(&mut self, now: Time) {
        if !self.contests.look_at().reached(now) {
            return;
        }
        self.end_doubts(now);
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
    pub fn handle_watch(&mut self, now: Time, slot: u32, generation: Generation, there: Option<&Connection>) {
        let tuples = self.table.tuples(slot);
        let Some(contest) = self.contests.find(slot, generation) else { return };
        let is_it =
            |there: &&Connection| (there.original, there.reply) == tuples && there.phase() != Phase::Over;
        let Some(there) = there.filter(is_it) else {
            // Of what is ours an event tells.
            if contest.doubt.is_some() {
                self.contests.decide(slot, generation);
                self.drop_doubted(slot, generation, None);
            }
            return;
        };
        let left = there.state.timeout_s;
        let Some((before, at)) = contest.timeout else {
            contest.timeout = Some((left, now));
            return;
        };
        let silent = (before as u64).saturating_sub(now.since(at).as_secs());
        if left as u64 >= silent + MARGIN_S {
            let known = groups::TUPLES | groups::STATE | groups::TIMEOUT | groups::MARK;
            self.change(now, slot, there, known);
        }
    }
}
