//! Commits: what is to be asked of the kernel for copies, in order; what waits to be tried again;
//! how much of it is done.
//!
//! The protocol asks for commits, and the source adapter takes them. A commit that was taken counts
//! as done here, whether it was carried out or not: what became of it comes back by
//! [`Replica::handle_commit`](super::Replica::handle_commit).
//!
//! What always holds:
//!
//! 1. *Nothing is asked for that the mode does not make*: with `--commit off` nothing; with
//!    `takeover` no entry of a copy whose active lives, and no delete of what cannot be there.
//! 2. *The queue never grows*: a datagram is taken only while there is [room](Commits::room) for
//!    all that it may ask for.
//! 3. *A delete is not carried out* once its tuple has come to life again: the entry is that
//!    connection's.
//! 4. *What is done was asked for*, in the same order; only deletes that wait for the source come
//!    later, in any order.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use super::history::MANIFEST_PER_DATAGRAM;
use crate::conn::{Generation, Tuple};
use crate::limits::COMMIT_QUEUE;
use crate::source::{Commit, CommitMode};
use crate::time::Time;

/// How long what the kernel refused waits before it is tried again.
pub(super) const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Refused ones that are tried again in one tick.
pub(super) const TRIES_PER_TICK: usize = 64;

/// Connections taken over that wait for their entry.
const OWED_MAX: usize = 4096;

/// Every copy's entry is written again within this time, whatever happens.
pub const REWRITE_PERIOD: Duration = Duration::from_secs(6 * 24 * 3600);

/// Slots that one step of that walk looks at.
const REWRITE_STEP: u32 = 64;

/// A connection taken over whose entry the kernel refused, and since when.
struct Owed {
    slot: u32,
    generation: Generation,
    since: Time,
}

/// The commits of a shard.
pub(super) struct Commits {
    mode: CommitMode,
    queue: VecDeque<Commit>,
    /// How many in the queue are deletes.
    deletes: usize,
    /// Commits asked for since the start.
    asked: u64,
    /// What `asked` was when the last walk that writes copies of a dead member was done.
    taken_over_at: u64,
    owed: VecDeque<Owed>,
    /// Whether the kernel may have entries of copies although they are not written while their
    /// active lives: an active died, or one of ours gave way.
    may_hold_entries: bool,
    /// The next slots whose entries are written again, and when.
    rewrite_slot: u32,
    rewrite_at: Time,
}

impl Commits {
    pub(super) fn new(mode: CommitMode) -> Commits {
        Commits {
            mode,
            queue: VecDeque::with_capacity(COMMIT_QUEUE),
            deletes: 0,
            asked: 0,
            taken_over_at: 0,
            owed: VecDeque::with_capacity(OWED_MAX),
            may_hold_entries: false,
            rewrite_slot: 0,
            rewrite_at: Time(0),
        }
    }

    /// The process was killed and goes on: nobody knows what it had written.
    pub(super) fn resume(&mut self) {
        self.may_hold_entries = self.mode == CommitMode::Takeover;
    }

    /// Whether copies are written while their active lives.
    pub(super) fn are_eager(&self) -> bool {
        self.mode == CommitMode::Eager
    }

    /// Asks for a commit if it is one that this mode makes. `is_silent` tells of a copy to be
    /// written whether its active is.
    pub(super) fn ask(&mut self, commit: Commit, is_silent: impl FnOnce() -> bool) {
        let is_due = match (self.mode, commit) {
            (CommitMode::Off, _) => false,
            (CommitMode::Eager, _) => true,
            (CommitMode::Takeover, Commit::Look { .. } | Commit::Watch { .. }) => false,
            (CommitMode::Takeover, Commit::Again { .. } | Commit::DeleteUntouched { .. }) => false,
            (CommitMode::Takeover, Commit::Write { .. }) => is_silent(),
            // It was written with the normal timeout already.
            (CommitMode::Takeover, Commit::Refresh { .. }) => false,
            (CommitMode::Takeover, Commit::Delete { .. }) => self.may_hold_entries,
        };
        if is_due {
            self.push(commit);
        }
    }

    fn push(&mut self, commit: Commit) {
        self.deletes += matches!(commit, Commit::Delete { .. }) as usize;
        self.queue.push_back(commit);
        self.asked += 1;
    }

    /// The next commit. With `may_delete` false deletes stay for later: the source has more to
    /// tell, and what they name may be another connection's entry by now. A delete whose tuple
    /// `lives` again is dropped.
    pub(super) fn poll(
        &mut self,
        may_delete: bool,
        lives: impl Fn(&Tuple) -> bool,
    ) -> Option<Commit> {
        for _ in 0..self.queue.len() {
            match self.queue.pop_front()? {
                Commit::Delete { original } if lives(&original) => self.deletes -= 1,
                delete @ Commit::Delete { .. } if !may_delete => self.queue.push_back(delete),
                commit => {
                    self.deletes -= matches!(commit, Commit::Delete { .. }) as usize;
                    return Some(commit);
                }
            }
        }
        None
    }

    /// Whether entries wait to be deleted.
    pub(super) fn has_deletes(&self) -> bool {
        self.deletes > 0
    }

    /// Whether the entry with this original tuple waits to be deleted.
    pub(super) fn deletes(&self, tuple: &Tuple) -> bool {
        let is_it =
            |commit: &Commit| matches!(commit, Commit::Delete { original } if original == tuple);
        self.has_deletes() && self.queue.iter().any(is_it)
    }

    /// Commits waiting.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Commits asked for since the start.
    pub(super) fn asked(&self) -> u64 {
        self.asked
    }

    /// Commits taken by the kernel's side, or dropped, since the start.
    pub(super) fn done(&self) -> u64 {
        self.asked - self.queue.len() as u64
    }

    /// How many datagrams can be taken now: each may ask for as many commits as it has deltas.
    pub(super) fn room(&self) -> usize {
        COMMIT_QUEUE.saturating_sub(self.queue.len()) / MANIFEST_PER_DATAGRAM
    }

    /// Whether so little waits that what may be refused again can be tried. (What arrives comes
    /// first.)
    pub(super) fn may_try(&self) -> bool {
        self.queue.len() < TRIES_PER_TICK
    }

    /// The kernel may have entries of copies from now on although they are not written while their
    /// active lives.
    pub(super) fn may_hold_entries(&mut self) {
        self.may_hold_entries = true;
    }

    /// The copies of a dead member have all been asked to be written.
    pub(super) fn end_takeover(&mut self) {
        self.taken_over_at = self.asked;
    }

    /// Whether all of these are written.
    pub(super) fn is_taken_over(&self) -> bool {
        self.done() >= self.taken_over_at
    }

    /// A connection taken over has no entry: it is to be written again, as ours now. `false` beyond
    /// the limit: it is left to its own traffic and to the next sweep.
    pub(super) fn owe(&mut self, now: Time, slot: u32, generation: Generation) -> bool {
        let has_room = self.owed.len() < OWED_MAX;
        if has_room {
            self.owed.push_back(Owed { slot, generation, since: now });
        }
        has_room
    }

    /// Connections that wait for that.
    pub(super) fn owed(&self) -> usize {
        self.owed.len()
    }

    /// Since when the first of them waits.
    pub(super) fn owed_since(&self) -> Option<Time> {
        self.owed.front().map(|owed| owed.since)
    }

    /// Asks for those whose time has come, and which are still [`ours`](Owed).
    pub(super) fn tick_owed(&mut self, now: Time, is_ours: impl Fn(u32, Generation) -> bool) {
        for _ in 0..TRIES_PER_TICK {
            let is_due = self.owed_since().is_some_and(|since| since.after(TRY_AGAIN).reached(now));
            if !is_due || !self.may_try() {
                break;
            }
            let Some(Owed { slot, generation, .. }) = self.owed.pop_front() else { break };
            if is_ours(slot, generation) {
                self.push(Commit::Refresh { slot, generation });
            }
        }
    }

    /// The slots, of so many, whose copies are to be written again now, long before their timeout
    /// ends; none if it is not time yet.
    pub(super) fn rewrite(&mut self, now: Time, capacity: u32) -> Range<u32> {
        if !self.are_eager() || !self.rewrite_at.reached(now) || self.room() == 0 {
            return 0..0;
        }
        let mut slots = 0..0;
        // Not before the first period has begun: at the start there is nothing to write again.
        if self.rewrite_at != Time(0) {
            slots = self.rewrite_slot..(self.rewrite_slot + REWRITE_STEP).min(capacity);
            self.rewrite_slot = if slots.end == capacity { 0 } else { slots.end };
        }
        self.rewrite_at = now.after(REWRITE_PERIOD / capacity.div_ceil(REWRITE_STEP));
        slots
    }

    /// When [`rewrite`](Self::rewrite) has the next ones.
    pub(super) fn rewrite_at(&self) -> Time {
        if self.are_eager() { self.rewrite_at } else { Time::NEVER }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Elsewhere;
    use CommitMode::{Eager, Off, Takeover};

    const ANY: Generation = Generation::from_low_bits(7);

    fn tuple(port: u16) -> Tuple {
        Tuple::v4(6, ([10, 0, 0, 1].into(), port), ([10, 0, 0, 2].into(), 80))
    }

    fn delete(port: u16) -> Commit {
        Commit::Delete { original: tuple(port) }
    }

    fn write(slot: u32) -> Commit {
        Commit::Write { slot, generation: ANY }
    }

    fn at(seconds: u64) -> Time {
        Time(1).after(Duration::from_secs(seconds))
    }

    #[test]
    fn each_mode_makes_its_own_commits() {
        let slot = 1;
        let (generation, original) = (ANY, tuple(1));
        // Commit, of a silent active; whether entries may be there; made with `eager` and with
        // `takeover`.
        let cases = [
            (Commit::Write { slot, generation }, false, true, (true, false)),
            (Commit::Write { slot, generation }, true, false, (true, true)),
            (Commit::Again { slot, generation }, true, true, (true, false)),
            (Commit::Refresh { slot, generation }, true, true, (true, false)),
            (
                Commit::Look { slot, generation, elsewhere: Elsewhere::Unknown },
                true,
                true,
                (true, false),
            ),
            (Commit::Watch { slot, generation }, true, true, (true, false)),
            (Commit::Delete { original }, true, false, (true, false)),
            (Commit::Delete { original }, false, true, (true, true)),
            (Commit::DeleteUntouched { original }, true, true, (true, false)),
        ];
        for (commit, is_silent, may_hold_entries, (eager, takeover)) in cases {
            for (mode, is_made) in [(Off, false), (Eager, eager), (Takeover, takeover)] {
                let mut commits = Commits::new(mode);
                if may_hold_entries {
                    commits.may_hold_entries();
                }
                commits.ask(commit, || is_silent);
                let expected = is_made.then_some(commit);
                assert_eq!(
                    commits.poll(true, |_| false),
                    expected,
                    "{mode:?} {is_silent} {may_hold_entries}"
                );
            }
        }
    }

    #[test]
    fn a_delete_waits_for_the_source_and_others_pass_it() {
        let mut commits = Commits::new(Eager);
        for commit in [delete(1), write(1), delete(2)] {
            commits.ask(commit, || false);
        }
        assert_eq!(commits.poll(false, |_| false), Some(write(1)));
        assert_eq!(commits.poll(false, |_| false), None);
        assert!(commits.has_deletes());
        assert_eq!((commits.asked(), commits.done(), commits.waiting()), (3, 1, 2));
        let mut left: Vec<_> = std::iter::from_fn(|| commits.poll(true, |_| false)).collect();
        left.sort_by_key(|commit| *commit == delete(2));
        assert_eq!(left, [delete(1), delete(2)]);
        assert!(!commits.has_deletes());
    }

    /// Traffic seed 1300012453: a dump that had begun before showed an entry whose delete was asked
    /// for. The connection opened anew, its tuple lived again, and the entry stayed for good.
    #[test]
    fn what_waits_to_be_deleted_is_known_until_it_is() {
        let mut commits = Commits::new(Eager);
        let tuple = |port| Tuple::v4(6, ([10, 0, 0, 1].into(), port), ([10, 0, 0, 2].into(), 2));
        commits.ask(Commit::Delete { original: tuple(1) }, || false);
        assert!(commits.deletes(&tuple(1)) && !commits.deletes(&tuple(2)));
        assert!(commits.poll(false, |_| false).is_none(), "the source has more to tell");
        assert!(commits.deletes(&tuple(1)));
        assert!(commits.poll(true, |_| false).is_some());
        assert!(!commits.deletes(&tuple(1)));
    }

    #[test]
    fn what_lives_again_is_not_deleted_and_counts_as_done() {
        let mut commits = Commits::new(Eager);
        for commit in [delete(1), delete(2)] {
            commits.ask(commit, || false);
        }
        assert_eq!(commits.poll(true, |original| *original == tuple(1)), Some(delete(2)));
        assert_eq!((commits.done(), commits.has_deletes()), (2, false));
    }

    #[test]
    fn a_takeover_is_over_when_all_that_it_asked_for_was_taken() {
        let mut commits = Commits::new(Takeover);
        assert!(commits.is_taken_over());
        commits.ask(write(1), || true);
        commits.ask(write(2), || true);
        commits.end_takeover();
        commits.ask(write(3), || true);
        for is_over in [false, false, true] {
            assert_eq!(commits.is_taken_over(), is_over);
            commits.poll(true, |_| false);
        }
    }

    #[test]
    fn there_is_room_for_a_datagram_only_if_all_that_it_may_ask_for_has_room() {
        let mut commits = Commits::new(Eager);
        while commits.room() > 0 {
            (0..MANIFEST_PER_DATAGRAM as u32).for_each(|slot| commits.ask(write(slot), || false));
        }
        assert!(commits.waiting() <= COMMIT_QUEUE);
        assert!(!commits.may_try());
        assert_eq!(commits.rewrite(at(1), 4096), 0..0, "nothing is asked for by itself meanwhile");
    }

    #[test]
    fn what_is_owed_is_asked_for_after_a_second_unless_it_is_another_one_by_then() {
        let mut commits = Commits::new(Takeover);
        assert!(commits.owe(at(0), 1, ANY) && commits.owe(at(0), 2, ANY));
        commits.tick_owed(Time(at(1).0 - 1), |_, _| true);
        assert_eq!((commits.waiting(), commits.owed_since()), (0, Some(at(0))));
        commits.tick_owed(at(1), |slot, _| slot == 2);
        // Whatever the mode: it is ours, and has no entry.
        assert_eq!(
            commits.poll(true, |_| false),
            Some(Commit::Refresh { slot: 2, generation: ANY })
        );
        assert_eq!((commits.owed(), commits.owed_since()), (0, None));
        while commits.owe(at(2), 3, ANY) {}
        assert_eq!(commits.owed(), OWED_MAX);
    }

    #[test]
    fn every_slot_is_written_again_once_a_period_and_none_at_the_start() {
        let mut commits = Commits::new(Eager);
        let capacity = 1000;
        assert_eq!(commits.rewrite(at(0), capacity), 0..0);
        let mut walked = Vec::new();
        while commits.rewrite_at() <= at(0).after(REWRITE_PERIOD) {
            let now = commits.rewrite_at();
            assert_eq!(commits.rewrite(Time(now.0 - 1), capacity), 0..0);
            walked.extend(commits.rewrite(now, capacity));
        }
        assert_eq!(walked, (0..capacity).collect::<Vec<_>>());
        assert_eq!(Commits::new(Takeover).rewrite_at(), Time::NEVER);
    }
}
