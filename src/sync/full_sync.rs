//! Full sync: how far this shard is with giving each member what it should have, and how much of it
//! may stand before live deltas.
//!
//! A full sync is nothing of its own on the wire: connections that wait for a backup get one, walks
//! move backups to better places, and all of it travels as deltas do. What is done is acknowledged
//! and stays done: an interrupted sync goes on with what is left. Here is only watched when all of
//! it has arrived:
//!
//! ```text
//!   Idle -----------> Giving -----------> Draining ------------> Flying ------------> Done
//!         the member         nothing waits         all that was          all of it is
//!         takes copies       for a backup,         dirty then is         acknowledged
//!                            no walk is under way  sent
//!    ^                          ^                      |                     |
//!    |                          +----------------------+---------------------+ a datagram was given up
//!    +--- from everywhere: the member takes no copies any more, is silent, or came with another table
//! ```
//!
//! What becomes dirty later is live traffic, and does not undo it.
//!
//! Of a member only what [`Sight`] shows is looked at.

use std::time::Duration;

use crate::conn::MemberId;
use crate::limits::MEMBERS_MAX;
use crate::time::Time;

/// How long nothing that waits found a place before a member counts as one that takes no more.
const FULL: Duration = Duration::from_secs(1);

/// How often the figures are published while a full sync is under way.
const PUBLISH: Duration = Duration::from_millis(10);

/// How far a full sync to a member is, as an inspector reads it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum SyncPhase {
    /// There was none yet, or the member is gone.
    #[default]
    Idle = 0,
    /// It is under way.
    Syncing = 1,
    /// The member has all that it should have.
    Done = 2,
    /// The member has all that it takes: connections still wait for a backup, and it leases no more
    /// slots.
    Full = 3,
    /// The member fell silent, or takes no copies any more. It goes on when that is over.
    Interrupted = 4,
}

impl SyncPhase {
    /// The phase that a number stands for.
    pub fn from_raw(raw: u64) -> SyncPhase {
        match raw {
            1 => SyncPhase::Syncing,
            2 => SyncPhase::Done,
            3 => SyncPhase::Full,
            4 => SyncPhase::Interrupted,
            _ => SyncPhase::Idle,
        }
    }

    /// The word for an operator.
    pub fn name(self) -> &'static str {
        match self {
            SyncPhase::Idle => "idle",
            SyncPhase::Syncing => "syncing",
            SyncPhase::Done => "done",
            SyncPhase::Full => "full",
            SyncPhase::Interrupted => "interrupted",
        }
    }
}

/// The figures of a full sync, of one shard to one member.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    /// How far the full sync is.
    pub phase: SyncPhase,
    /// When it began, or went on after an interruption.
    pub begun: Time,
    /// When it was done, or interrupted; 0 while it is under way.
    pub ended: Time,
    /// Connections whose acknowledged copy the member held when it began.
    pub before: u64,
    /// Connections whose acknowledged copy it holds.
    pub done: u64,
    /// Connections that are still to be sent there, or not acknowledged.
    pub to_do: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SyncStage {
    Idle,
    Giving,
    /// Everything that was dirty then is to be sent. What was given up by then, added up.
    Draining(Time, u64),
    /// Everything that was sent by then is to be acknowledged.
    Flying(Time, u64),
    Done,
}

/// What is to be seen of one member and of what goes there.
pub(super) trait Sight {
    /// Whether it takes copies.
    fn takes(&self) -> bool;
    /// Whether all that is to go there is there, or dirty, but for what waits for a backup: nothing
    /// is unverified, and no walk is under way.
    fn is_given(&self) -> bool;
    /// Whether connections wait for a backup.
    fn has_waiting(&self) -> bool;
    /// A number that moves on whenever a datagram to it is given up, and when a session begins.
    fn given_up(&self) -> u64;
    /// Whether all that was dirty at that time is sent.
    fn is_sent(&self, by: Time) -> bool;
    /// Whether all that was sent at that time is acknowledged.
    fn is_acknowledged(&self, by: Time) -> bool;
    /// Connections whose acknowledged copy it holds, and those that are still to go there.
    fn counts(&self) -> (u64, u64);
}

/// How far a full sync has come.
pub(super) struct Step {
    stage: SyncStage,
    figures: Figures,
    /// Whether the figures are to be written down.
    is_told: bool,
}

/// Every member's full sync.
pub(super) struct FullSyncs {
    members: Vec<(SyncStage, Figures)>,
    /// Since when nothing that waits for a backup found one, although it was tried.
    no_progress_since: Option<Time>,
    publish_at: Time,
}

impl FullSyncs {
    /// Nobody has anything.
    pub(super) fn new() -> FullSyncs {
        FullSyncs {
            members: vec![(SyncStage::Idle, Figures::default()); MEMBERS_MAX + 1],
            no_progress_since: None,
            publish_at: Time(0),
        }
    }

    /// Members that have every copy that they should have, as bits.
    pub(super) fn done(&self) -> u64 {
        let done =
            self.members.iter().enumerate().filter(|(_, (stage, _))| *stage == SyncStage::Done);
        done.fold(0, |bits, (member, _)| bits | 1 << member)
    }

    /// What waits for a backup was tried, and whether all of it in vain.
    pub(super) fn tried(&mut self, now: Time, is_in_vain: bool) {
        self.no_progress_since = is_in_vain.then(|| self.no_progress_since.unwrap_or(now));
    }

    /// Whether the figures are to be published now.
    pub(super) fn begin(&mut self, now: Time) -> bool {
        let is_due = self.publish_at.reached(now);
        if is_due {
            self.publish_at = now.after(PUBLISH);
        }
        is_due
    }

    /// Looks at how far the member's is; [`go`](Self::go) follows. The figures are to be written
    /// down because it has begun or ended, or because they are [published](Self::begin) while it is
    /// under way.
    pub(super) fn look(
        &self,
        now: Time,
        member: MemberId,
        sight: &impl Sight,
        is_published: bool,
    ) -> Option<Step> {
        let (old, mut figures) = self.members[member as usize];
        let stage = self.next(now, old, sight, &mut figures);
        if (stage, old) == (SyncStage::Idle, SyncStage::Idle) {
            return None;
        }
        let has_changed = (stage == SyncStage::Done) != (old == SyncStage::Done)
            || (stage == SyncStage::Idle) != (old == SyncStage::Idle);
        let is_told = has_changed || is_published && stage != SyncStage::Done;
        if is_told {
            (figures.done, figures.to_do) = sight.counts();
            if stage == SyncStage::Done && figures.phase == SyncPhase::Done {
                figures.to_do = 0; // What is dirty now is live traffic.
            }
        }
        Some(Step { stage, figures, is_told })
    }

    /// The member's is so far. Tells the figures that are to be written down.
    pub(super) fn go(&mut self, member: MemberId, step: Step) -> Option<Figures> {
        self.members[member as usize] = (step.stage, step.figures);
        step.is_told.then_some(step.figures)
    }

    fn next(
        &self,
        now: Time,
        stage: SyncStage,
        sight: &impl Sight,
        figures: &mut Figures,
    ) -> SyncStage {
        match stage {
            SyncStage::Idle if sight.takes() => {
                let (before, _) = sight.counts();
                *figures =
                    Figures { phase: SyncPhase::Syncing, begun: now, before, ..Figures::default() };
                SyncStage::Giving
            }
            SyncStage::Idle => SyncStage::Idle,
            _ if !sight.takes() => {
                let was_done = stage == SyncStage::Done;
                figures.phase = if was_done { SyncPhase::Idle } else { SyncPhase::Interrupted };
                figures.ended = if was_done { figures.ended } else { now };
                SyncStage::Idle
            }
            SyncStage::Giving => {
                let tried_since = self.no_progress_since.map(|since| since.max(figures.begun));
                let takes_no_more = tried_since.is_some_and(|since| now.since(since) >= FULL);
                match sight.is_given() && (!sight.has_waiting() || takes_no_more) {
                    true => SyncStage::Draining(now, sight.given_up()),
                    false => SyncStage::Giving,
                }
            }
            SyncStage::Draining(_, given_up) | SyncStage::Flying(_, given_up)
                if given_up != sight.given_up() =>
            {
                SyncStage::Giving // What it carried is dirty again, or waits for a backup.
            }
            SyncStage::Draining(by, given_up) if sight.is_sent(by) => {
                SyncStage::Flying(now, given_up)
            }
            SyncStage::Flying(by, _) if sight.is_acknowledged(by) => {
                figures.ended = now;
                figures.phase = if sight.has_waiting() { SyncPhase::Full } else { SyncPhase::Done };
                SyncStage::Done
            }
            stage => stage,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMBER: MemberId = 2;

    /// A member as a test wants it to be seen.
    struct Seen {
        takes: bool,
        is_given: bool,
        waiting: u64,
        given_up: u64,
        dirty_since: Option<Time>,
        outstanding_since: Option<Time>,
        copies: u64,
    }

    impl Sight for Seen {
        fn takes(&self) -> bool {
            self.takes
        }
        fn is_given(&self) -> bool {
            self.is_given
        }
        fn has_waiting(&self) -> bool {
            self.waiting > 0
        }
        fn given_up(&self) -> u64 {
            self.given_up
        }
        fn is_sent(&self, by: Time) -> bool {
            self.dirty_since.is_none_or(|since| since > by)
        }
        fn is_acknowledged(&self, by: Time) -> bool {
            self.outstanding_since.is_none_or(|since| since > by)
        }
        fn counts(&self) -> (u64, u64) {
            (self.copies, self.waiting)
        }
    }

    fn at(ms: u64) -> Time {
        Time(1).after(Duration::from_millis(ms))
    }

    /// A member that has just come, and is to get ten copies.
    fn joined() -> Seen {
        Seen {
            takes: true,
            is_given: false,
            waiting: 10,
            given_up: 0,
            dirty_since: None,
            outstanding_since: None,
            copies: 0,
        }
    }

    fn figures(syncs: &mut FullSyncs, ms: u64, seen: &Seen, is_published: bool) -> Option<Figures> {
        let step = syncs.look(at(ms), MEMBER, seen, is_published)?;
        syncs.go(MEMBER, step)
    }

    fn step(syncs: &mut FullSyncs, ms: u64, seen: &Seen) -> Option<SyncPhase> {
        figures(syncs, ms, seen, false).map(|figures| figures.phase)
    }

    #[test]
    fn a_full_sync_is_done_when_all_that_was_to_go_there_is_acknowledged() {
        let (mut syncs, mut seen) = (FullSyncs::new(), joined());
        assert_eq!(step(&mut syncs, 0, &seen), Some(SyncPhase::Syncing));
        assert_eq!(step(&mut syncs, 1, &seen), None, "they wait for a backup");
        (seen.is_given, seen.waiting, seen.dirty_since) = (true, 0, Some(at(1)));
        assert_eq!(step(&mut syncs, 2, &seen), None);
        assert_eq!(step(&mut syncs, 3, &seen), None, "some are not sent");
        (seen.dirty_since, seen.outstanding_since) = (Some(at(4)), Some(at(4)));
        assert_eq!(step(&mut syncs, 5, &seen), None, "sent, but for what was changed later");
        assert_eq!(step(&mut syncs, 6, &seen), None, "not acknowledged");
        (seen.outstanding_since, seen.copies) = (Some(at(6)), 10);
        let figures = figures(&mut syncs, 7, &seen, false).expect("it is done");
        let expected = Figures {
            phase: SyncPhase::Done,
            begun: at(0),
            ended: at(7),
            before: 0,
            done: 10,
            to_do: 0,
        };
        assert_eq!((figures, syncs.done()), (expected, 1 << MEMBER));
        assert_eq!(step(&mut syncs, 8, &seen), None, "live traffic does not undo it");
    }

    #[test]
    fn what_was_given_up_on_the_way_begins_anew() {
        let (mut syncs, mut seen) = (FullSyncs::new(), joined());
        (seen.is_given, seen.waiting, seen.outstanding_since) = (true, 0, Some(at(0)));
        for ms in 0..5 {
            step(&mut syncs, ms, &seen);
        }
        (seen.given_up, seen.outstanding_since) = (1, None);
        step(&mut syncs, 5, &seen);
        assert_eq!(syncs.done(), 0, "what it carried is dirty again");
        let done = (6..).find(|ms| step(&mut syncs, *ms, &seen).is_some());
        assert_eq!((done, syncs.done()), (Some(8), 1 << MEMBER));
    }

    #[test]
    fn a_member_that_leases_no_more_is_full_after_a_second_of_trying() {
        let (mut syncs, mut seen) = (FullSyncs::new(), joined());
        seen.is_given = true;
        syncs.tried(at(0), false);
        step(&mut syncs, 0, &seen);
        let mut last = None;
        for ms in 1..2000 {
            syncs.tried(at(ms), ms != 500);
            if let Some(phase) = step(&mut syncs, ms, &seen) {
                last = Some((ms, phase));
            }
        }
        assert_eq!(
            last,
            Some((1503, SyncPhase::Full)),
            "a second after the last one that found a place"
        );
    }

    #[test]
    fn one_that_falls_silent_interrupts_and_one_that_had_all_is_idle() {
        let (mut syncs, mut seen) = (FullSyncs::new(), joined());
        step(&mut syncs, 0, &seen);
        seen.takes = false;
        assert_eq!(step(&mut syncs, 1, &seen), Some(SyncPhase::Interrupted));
        assert_eq!(step(&mut syncs, 2, &seen), None);
        (seen.takes, seen.is_given, seen.waiting) = (true, true, 0);
        for ms in 3..7 {
            step(&mut syncs, ms, &seen);
        }
        assert_eq!(syncs.done(), 1 << MEMBER);
        seen.takes = false;
        assert_eq!((step(&mut syncs, 7, &seen), syncs.done()), (Some(SyncPhase::Idle), 0));
    }

    #[test]
    fn figures_are_published_while_it_is_under_way_and_not_too_often() {
        let (mut syncs, seen) = (FullSyncs::new(), joined());
        let mut told = 0;
        for ms in 0..100 {
            let is_published = syncs.begin(at(ms));
            told += figures(&mut syncs, ms, &seen, is_published).is_some() as u32;
        }
        assert_eq!(told, 10);
        assert!(syncs.begin(at(100)));
        let away = Seen { takes: false, ..joined() };
        assert!(syncs.look(at(100), 3, &away, true).is_none(), "nothing goes there");
    }
}
