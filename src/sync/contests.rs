//! Contests: connections that two members take for theirs, and what their kernel entries have shown
//! of packets.
//!
//! What a contest means is [`super::contest`]'s. Here is kept who contests what, above which stamp,
//! and whether the entry's timeout, which runs down by itself, was put back by a packet.
//!
//! What always holds:
//!
//! 1. *A slot has one contest at most*, and one of an earlier life of the slot counts as none.
//! 2. *Their number is bounded*; of further ones the stamp decides.
//! 3. *A contest of which nobody speaks is forgotten*; a doubt lasts until the entry has told.
//! 4. *A single look that finds no entry says nothing of what is ours*: a delete of this member's
//!    own may have hit it.

use std::time::Duration;

use crate::conn::{Coordinate, Generation, MemberId, Stamp};
use crate::time::Time;

/// Contests at once. Of further ones the stamp decides.
const CONTESTS_MAX: usize = 1024;

/// How often the entries are looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// A contest that nobody spoke of for so long is over: members ask again each second.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(10);

/// A contest that nobody's packets have decided for so long the stamp decides: what has begun to
/// end is over by then.
const LASTS_AT_MOST: Duration = Duration::from_secs(120);

/// How long a member that took a connection over looks for its packets when another one has it,
/// before it takes that one's copy.
const PRESUMED_FOR: Duration = Duration::from_secs(4);

/// Timeouts are told in whole seconds: one that is higher by so many than it would be without a
/// packet was put back by one. So was one that is lower: at a takeover an entry may have been given
/// more than this kernel gives it.
const MARGIN_S: u64 = 2;

struct Contest {
    slot: u32,
    generation: Generation,
    /// It was ended or let go elsewhere, and is held here until the entry has told whether it goes
    /// on; what the entry itself is to become if not.
    doubt: Option<Doubt>,
    /// The stamp that was heard of first for the other one, and the highest.
    first: Option<Stamp>,
    rival: Rival,
    /// When it began, and when it was last spoken of.
    since: Time,
    at: Time,
    /// When the entry is to be looked at.
    look_at: Time,
    /// What the entry had left to live, and when.
    timeout: Option<(u32, Time)>,
    /// The last look found no entry.
    is_missing: bool,
    /// No packets showed for long enough that another member's copy may have the entry.
    yields: bool,
}

/// Who else takes a connection for its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Rival {
    pub stamp: Stamp,
    /// Where it has it; nowhere: that is not known, or its translation is another one.
    pub place: Coordinate,
}

impl Rival {
    /// The stamp of a claim by this member, which has that one, above it. Two that outdo each other
    /// at once never have equal ones: of two equal stamps the higher member's new is taken, and its
    /// release is not, which may come first.
    pub(super) fn outdone(&self, own: Stamp, by: MemberId) -> Stamp {
        let mut stamp = own.max(self.stamp).claimed();
        if self.place.is_somewhere() && by > self.place.member() {
            stamp = stamp.claimed();
        }
        stamp
    }
}

/// What becomes of the kernel's entry of a connection that had an active here, was claimed
/// elsewhere, and shows no packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Doubt {
    /// It was closed there: it goes.
    Closed,
    /// Another member has it: it stays for its own time, and may become a copy's.
    Taken,
    /// The same, but told by a third member, of which that one's stamp was higher, and perhaps was
    /// only presumed: it becomes a copy's not at once.
    Outranked,
    /// It was only taken over, and this member has it and refused it, perhaps without packets
    /// either: the same, but it becomes a copy's not at once. If that member dies it is presumed to
    /// be ours again.
    Presumed(MemberId),
}

/// The contests of a shard.
pub(super) struct Contests {
    /// By their slots: each event of what is ours asks for its own.
    contests: Vec<Contest>,
    /// The earliest of all.
    look_at: Time,
}

impl Contests {
    pub(super) fn new() -> Contests {
        Contests { contests: Vec::with_capacity(CONTESTS_MAX), look_at: Time::NEVER }
    }

    /// Whether another one can be.
    pub(super) fn has_room(&self) -> bool {
        self.contests.len() < CONTESTS_MAX
    }

    /// The connection in this slot is contested, or doubted. `false`: the other one was claimed
    /// meanwhile, above this stamp; or there are too many.
    pub(super) fn note(
        &mut self,
        now: Time,
        (slot, generation): (u32, Generation),
        own: Stamp,
        rival: Option<Rival>,
        doubt: Option<Doubt>,
    ) -> bool {
        let at = match self.find(slot) {
            Ok(at) if self.contests[at].generation == generation => {
                let contest = &mut self.contests[at];
                if contest.doubt.is_none() {
                    contest.at = now;
                }
                let Some(rival) = rival else { return true };
                let former = contest.rival.place;
                if rival.place != former && rival.place.member() == former.member() {
                    contest.first = None; // That member's next connection: it has claimed nothing.
                }
                contest.rival =
                    Rival { stamp: contest.rival.stamp.max(rival.stamp), place: rival.place };
                let first = *contest.first.get_or_insert(rival.stamp);
                return rival.stamp.epoch <= first.epoch.max(own.epoch);
            }
            Ok(at) => {
                self.contests.remove(at); // Of another connection, which is no more.
                at
            }
            Err(at) => at,
        };
        let has_room = self.has_room();
        if has_room {
            let first = rival.map(|rival| rival.stamp);
            let place = rival.map_or(Coordinate::NOWHERE, |rival| rival.place);
            let rival = Rival { stamp: own.max(first.unwrap_or(own)), place };
            let contest = Contest {
                slot,
                generation,
                doubt,
                first,
                rival,
                since: now,
                at: now,
                look_at: now,
                timeout: None,
                is_missing: false,
                yields: false,
            };
            self.contests.insert(at, contest);
            self.look_at = self.look_at.min(now);
        }
        has_room
    }

    fn find(&self, slot: u32) -> Result<usize, usize> {
        self.contests.binary_search_by_key(&slot, |contest| contest.slot)
    }

    fn place_of(&self, slot: u32, generation: Generation) -> Option<usize> {
        self.find(slot).ok().filter(|at| self.contests[*at].generation == generation)
    }

    /// Whether the connection in this slot is contested, or doubted.
    pub(super) fn has(&self, slot: u32, generation: Generation) -> bool {
        self.place_of(slot, generation).is_some()
    }

    /// Whether the connection in this slot is contested by somebody whose stamp is known. It goes
    /// on when what was held is sent.
    pub(super) fn has_rival(&self, slot: u32, generation: Generation) -> bool {
        self.place_of(slot, generation).is_some_and(|at| self.contests[at].first.is_some())
    }

    /// Whether the connection in this slot has been contested for so long, without packets at
    /// either, that the stamp decides.
    pub(super) fn has_outlasted(&self, now: Time, slot: u32, generation: Generation) -> bool {
        let at = self.place_of(slot, generation);
        at.is_some_and(|at| now.since(self.contests[at].since) >= LASTS_AT_MOST)
    }

    /// The contest about the connection in this slot is over; whom it is to outdo, if there was
    /// one.
    pub(super) fn decide(&mut self, slot: u32, generation: Generation) -> Option<Rival> {
        let at = self.place_of(slot, generation)?;
        Some(self.contests.remove(at).rival)
    }

    /// The entry of the connection in this slot was written by somebody: what it had left says
    /// nothing any more. `false`: nobody contests or doubts it.
    pub(super) fn restart(&mut self, slot: u32, generation: Generation) -> bool {
        let at = self.place_of(slot, generation);
        at.map(|at| self.contests[at].timeout = None).is_some()
    }

    /// Whether a third member told that the connection in this slot was outranked.
    pub(super) fn is_outranked(&self, slot: u32, generation: Generation) -> bool {
        let at = self.place_of(slot, generation);
        at.is_some_and(|at| self.contests[at].doubt == Some(Doubt::Outranked))
    }

    /// What this member had is no more: its places are nobody's, or somebody else's.
    pub(super) fn forget_places(&mut self, member: MemberId) {
        for contest in
            self.contests.iter_mut().filter(|contest| contest.rival.place.member() == member)
        {
            contest.rival.place = Coordinate::NOWHERE;
        }
    }

    /// Whether the connection in this slot was only taken over, or its tuple's next one may have
    /// begun on its entry, or a third member told that it was outranked, and packets are still
    /// looked for.
    pub(super) fn is_looked_for(&self, slot: u32, generation: Generation) -> bool {
        self.place_of(slot, generation).is_some_and(|at| {
            let contest = &self.contests[at];
            contest.doubt.is_some_and(|doubt| doubt != Doubt::Taken) && !contest.yields
        })
    }

    /// When the entries are to be looked at.
    pub(super) fn look_at(&self) -> Time {
        if self.contests.is_empty() { Time::NEVER } else { self.look_at }
    }

    /// Contests of connections that are no more, and those of which nobody spoke for long, are
    /// over.
    pub(super) fn drop_those(&mut self, now: Time, is_void: impl Fn(u32, Generation) -> bool) {
        self.contests.retain(|contest| {
            let is_spoken_of = contest.doubt.is_some() || now.since(contest.at) < FORGOTTEN_AFTER;
            is_spoken_of && !is_void(contest.slot, contest.generation)
        });
    }

    /// Tells `look` each connection whose entry is to be looked at now: once a second.
    pub(super) fn look(&mut self, now: Time, mut look: impl FnMut(u32, Generation)) {
        self.look_at = Time::NEVER;
        for contest in &mut self.contests {
            if contest.look_at.reached(now) {
                contest.look_at = now.after(PERIOD);
                look(contest.slot, contest.generation);
            }
            self.look_at = self.look_at.min(contest.look_at);
        }
    }

    /// What the entry of the connection in this slot shows: seconds that it has left, if it is
    /// there and the connection's. `exists`: whether there is one at all. `None`: nobody contests
    /// or doubts it.
    pub(super) fn on_entry(
        &mut self,
        now: Time,
        (slot, generation): (u32, Generation),
        exists: bool,
        left_s: Option<u32>,
    ) -> Option<Shown> {
        let at = self.place_of(slot, generation)?;
        let contest = &mut self.contests[at];
        let was_missing = std::mem::replace(&mut contest.is_missing, !exists);
        let Some(left) = left_s else {
            let is_gone = was_missing && !exists;
            return Some(match contest.doubt {
                Some(_) => Shown::DoubtedAndGone,
                None if is_gone => Shown::Gone,
                None => Shown::Nothing,
            });
        };
        let (before, since) = *contest.timeout.get_or_insert((left, now));
        let silent = (before as u64).saturating_sub(now.since(since).as_secs());
        // (One that is about to run out was not put there by a packet.)
        if left > 0 && (left as u64).abs_diff(silent) >= MARGIN_S {
            return Some(Shown::Packets);
        }
        let Some(doubt) = contest.doubt else { return Some(Shown::Nothing) };
        let lasted = now.since(contest.at);
        contest.yields = lasted >= PRESUMED_FOR;
        Some(Shown::Silence { doubt, is_settled: lasted >= FORGOTTEN_AFTER })
    }
}

/// What a look at an entry shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Shown {
    /// Nothing that decides.
    Nothing,
    /// Packets pass it.
    Packets,
    /// Of a connection that is contested: at two looks there was none.
    Gone,
    /// Of one that is doubted: it is not there.
    DoubtedAndGone,
    /// Of one that is doubted: no packet passed. `is_settled`: for long enough.
    Silence { doubt: Doubt, is_settled: bool },
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { epoch: 3, version: 9 };
    const NONE: Option<Doubt> = None;

    fn at(seconds: u64) -> Time {
        Time(1).after(Duration::from_secs(seconds))
    }

    fn slot(n: u32) -> (u32, Generation) {
        (n, Generation::default())
    }

    fn rival(epoch: u32) -> Option<Rival> {
        let place = Coordinate::new(2, 0, 5, Generation::default());
        Some(Rival { stamp: Stamp { epoch, version: 1 }, place })
    }

    fn other_place() -> Coordinate {
        Coordinate::new(2, 0, 8, Generation::default())
    }

    #[test]
    fn one_that_claims_once_more_during_a_contest_has_shown_its_packets() {
        let mut contests = Contests::new();
        assert!(contests.note(at(0), slot(1), STAMP, rival(3), NONE));
        assert!(contests.note(at(1), slot(1), STAMP, rival(3), NONE), "asked again");
        assert!(!contests.note(at(2), slot(1), STAMP, rival(4), NONE));
        let outdone = contests.decide(1, Generation::default()).expect("it was contested");
        assert_eq!(outdone.stamp.epoch, 4);
        assert!(!contests.has(1, Generation::default()));
    }

    /// Traffic seed 1610008119: a connection had ended elsewhere and the next one of its port begun
    /// there, above it. That was taken for one that claims once more.
    #[test]
    fn the_next_connection_of_the_other_member_has_claimed_nothing() {
        let mut contests = Contests::new();
        let next = |epoch| rival(epoch).map(|rival| Rival { place: other_place(), ..rival });
        assert!(contests.note(at(0), slot(1), STAMP, rival(4), NONE));
        assert!(contests.note(at(1), slot(1), STAMP, next(6), NONE), "it is another one");
        assert!(contests.note(at(1), slot(1), STAMP, next(6), NONE));
        assert!(!contests.note(at(2), slot(1), STAMP, next(7), NONE));
    }

    #[test]
    fn a_contest_of_the_slots_life_before_is_none() {
        let mut contests = Contests::new();
        assert!(contests.note(at(0), slot(1), STAMP, rival(7), NONE));
        let next = Generation::default().next();
        assert!(!contests.has(1, next));
        assert!(contests.note(at(0), (1, next), STAMP, None, NONE));
        assert!(
            contests.has(1, next)
                && !contests.has_rival(1, next)
                && !contests.has(1, Generation::default())
        );
    }

    #[test]
    fn of_more_contests_than_can_be_the_stamp_decides() {
        let mut contests = Contests::new();
        let generation = Generation::default();
        let rival = rival(3).expect("a rival");
        for slot in (0..CONTESTS_MAX as u32).rev() {
            assert!(contests.note(at(0), (slot, generation), rival.stamp, Some(rival), None));
        }
        assert!(!contests.note(
            at(0),
            (CONTESTS_MAX as u32, generation),
            rival.stamp,
            Some(rival),
            None
        ));
        assert!(
            contests.note(at(1), (5, generation.next()), rival.stamp, Some(rival), None),
            "the slot has another connection"
        );
        assert_eq!(contests.decide(5, generation), None);
        assert_eq!(contests.decide(5, generation.next()), Some(rival));
        assert_eq!(contests.decide(6, generation), Some(rival));
    }

    /// Seed 800000784: of two equal stamps the release of a new that was still on its way was
    /// ignored, and the new then taken.
    #[test]
    fn two_claims_at_once_differ_in_epoch() {
        let stamp = Stamp { epoch: 3, version: 7 };
        let at_member =
            |member| Rival { stamp, place: Coordinate::new(member, 0, 5, Generation::default()) };
        assert!(at_member(1).outdone(stamp, 2).epoch > at_member(2).outdone(stamp, 1).epoch);
        let unknown = Rival { stamp, place: Coordinate::NOWHERE };
        assert!(unknown.outdone(stamp, 1).epoch > stamp.epoch);
    }

    #[test]
    fn entries_are_looked_at_once_a_second_until_nobody_speaks_of_them() {
        let mut contests = Contests::new();
        contests.note(at(0), slot(1), STAMP, rival(3), NONE);
        contests.note(at(0), slot(2), STAMP, None, Some(Doubt::Closed));
        let mut looked = Vec::new();
        for second in 0..12 {
            contests.drop_those(at(second), |_, _| false);
            contests.look(at(second), |slot, _| looked.push(slot));
        }
        assert_eq!(looked.iter().filter(|slot| **slot == 1).count(), 10);
        assert_eq!(looked.iter().filter(|slot| **slot == 2).count(), 12, "a doubt lasts");
        assert_eq!(contests.look_at(), at(12));
    }

    #[test]
    fn a_timeout_that_did_not_run_down_tells_of_packets() {
        let mut contests = Contests::new();
        contests.note(at(0), slot(1), STAMP, rival(3), NONE);
        for (second, left, shown) in [
            (0, 300, Shown::Nothing),
            (1, 299, Shown::Nothing),
            (2, 299, Shown::Nothing), // Whole seconds: that may be the same.
            (5, 299, Shown::Packets),
            (5, 120, Shown::Packets), // Put back, by another kind of packet.
            (400, 0, Shown::Nothing),
        ] {
            assert_eq!(
                contests.on_entry(at(second), slot(1), true, Some(left)),
                Some(shown),
                "{second}"
            );
        }
        assert_eq!(contests.on_entry(at(6), slot(2), true, Some(9)), None, "nobody contests that");
    }

    #[test]
    fn one_look_without_an_entry_says_nothing_of_what_is_ours_and_ends_what_is_doubted() {
        let mut contests = Contests::new();
        contests.note(at(0), slot(1), STAMP, rival(3), NONE);
        contests.note(at(0), slot(2), STAMP, None, Some(Doubt::Taken));
        for (n, exists, shown) in [
            (1, false, Shown::Nothing),
            (1, true, Shown::Nothing), // Another connection's.
            (1, false, Shown::Nothing),
            (1, false, Shown::Gone),
            (2, false, Shown::DoubtedAndGone),
        ] {
            assert_eq!(contests.on_entry(at(1), slot(n), exists, None), Some(shown));
        }
    }

    #[test]
    fn what_was_only_taken_over_yields_after_four_seconds_of_silence_and_is_settled_after_ten() {
        let mut contests = Contests::new();
        let doubt = Doubt::Presumed(2);
        contests.note(at(0), slot(1), STAMP, None, Some(doubt));
        for (second, is_looked_for, is_settled) in
            [(0, true, false), (3, true, false), (4, false, false), (10, false, true)]
        {
            let shown = contests.on_entry(at(second), slot(1), true, Some(300 - second as u32));
            assert_eq!(shown, Some(Shown::Silence { doubt, is_settled }));
            assert_eq!(contests.is_looked_for(1, Generation::default()), is_looked_for);
        }
    }

    #[test]
    fn places_at_a_member_that_is_gone_are_nobodys() {
        let mut contests = Contests::new();
        contests.note(at(0), slot(1), STAMP, rival(3), NONE);
        contests.forget_places(2);
        let rival = contests.decide(1, Generation::default()).expect("it was contested");
        assert!(!rival.place.is_somewhere());
    }
}
