//! When a member is ready: once it has every copy that the others want it to have.
//!
//! ```text
//!   Starting ------------------------> Syncing ------------------------> Ready
//!             own source read, and              nobody is waited for,
//!             listened for the dead time        and the copies are in the kernel
//! ```
//!
//! As long as another host has its number, and nobody takes this one for the member, it is
//! starting.
//!
//! A starting member takes no copies. A syncing one does, and waits for every other member that is
//! heard and has begun itself (is syncing, ready or leaving) to say in its heartbeats that all is
//! here. Whether it says so depends on its own sending and on this member's leases, never on
//! anybody being ready: so no two can wait for each other. Whoever can send nothing (it does not
//! hear this member, or only its small heartbeats; or this member is full) is waited for only as
//! long as there is progress.

use std::time::Duration;

use super::view::{Status, View};
use crate::time::Time;

/// Without a further copy, and without anybody saying that all is here, for so long (or three dead
/// times), a syncing member is ready with what it has.
pub const STALL: Duration = Duration::from_secs(5);

/// What a member knows of itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Own {
    /// Whether its source was read to the end.
    pub complete: bool,
    /// Copies that it holds.
    pub copies: u64,
    /// The present version of the group.
    pub version: u64,
    /// The version of the group for which the kernel is owed no more commits.
    pub settled: u64,
}

/// Where a member stands until it leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// It reads its source and listens for the others.
    Starting,
    /// It takes copies.
    Syncing,
    /// It can carry the group's traffic.
    Ready,
}

/// The way of one member to being ready.
#[derive(Clone, Copy, Debug)]
pub struct Readiness {
    stage: Stage,
    /// The dead time.
    dead_time: Duration,
    /// Since when the member has this stage.
    since: Time,
    /// Since when nobody else is heard.
    alone: Option<Time>,
    /// Members that were heard to say that not all is here: so what they say now is about this
    /// life.
    denied: u64,
    awaited: u64,
    most: u64,
    progress: Time,
    /// The version of the group at which nobody was waited for any more.
    settling: Option<u64>,
}

impl Readiness {
    /// A member that starts now; `dead_time` is what it is taken for dead after.
    pub fn new(dead_time: Duration, now: Time) -> Readiness {
        Readiness {
            stage: Stage::Starting,
            dead_time,
            since: now,
            alone: Some(now),
            denied: 0,
            awaited: 0,
            most: 0,
            progress: now,
            settling: None,
        }
    }

    /// Where the member stands.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Members that have not yet said that all is here, as bits. Once ready: those that never did.
    pub fn awaited(&self) -> u64 {
        self.awaited
    }

    /// Another host has this member's number: it begins again once that has ended. Returns whether
    /// it was ready.
    pub fn dispute(&mut self, now: Time) -> bool {
        let was_ready = self.stage == Stage::Ready;
        *self = Readiness::new(self.dead_time, now);
        was_ready
    }

    /// Looks at the group again. Returns the next stage when it is reached: to be called until it
    /// returns none.
    pub fn tick(&mut self, now: Time, view: &View, own: &Own) -> Option<Stage> {
        let mut alone = true;
        for (id, member) in view.others().filter(|(_, m)| m.status.is_alive()) {
            alone = false;
            if !member.has_synced_me {
                self.denied |= 1 << id;
            }
        }
        self.alone = alone.then(|| self.alone.unwrap_or(now));
        let (is_over, next) = match self.stage {
            Stage::Starting => {
                (own.complete && now.since(self.since) >= self.dead_time, Stage::Syncing)
            }
            Stage::Syncing => (self.has_all(now, view, own), Stage::Ready),
            Stage::Ready => (false, Stage::Ready),
        };
        if !is_over {
            return None;
        }
        (self.stage, self.since, self.progress) = (next, now, now);
        Some(next)
    }

    fn has_all(&mut self, now: Time, view: &View, own: &Own) -> bool {
        // Whoever still means an earlier life of this member finds out within the dead time.
        let told = now.since(self.since) >= self.dead_time;
        let awaited = view.others().filter(|(id, m)| {
            let has_begun = m.status.is_alive() && (m.has_begun || m.status == Status::Leaving);
            let is_done = m.has_synced_me && (told || self.denied >> *id & 1 == 1);
            has_begun && !is_done
        });
        let awaited = awaited.fold(0, |bits, (id, _)| bits | 1 << id);
        if awaited != self.awaited || own.copies > self.most {
            (self.awaited, self.progress) = (awaited, now);
            self.most = self.most.max(own.copies);
        }
        // Who fell silent a moment ago may be back in the next.
        let alone = self.alone.is_some_and(|since| now.since(since) < self.dead_time);
        let stalled = now.since(self.progress) >= STALL.max(self.dead_time * 3);
        if alone || awaited != 0 && !stalled {
            self.settling = None;
            return false;
        }
        // Copies that were acknowledged may wait for the kernel.
        own.settled >= *self.settling.get_or_insert(own.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::view::Member;

    const SETTLE: Duration = Duration::from_millis(300);

    fn at(ms: u64) -> Time {
        Time(1_000_000_000).after(Duration::from_millis(ms))
    }

    fn member(status: Status, has_begun: bool, has_synced_me: bool) -> Member {
        Member { status, has_begun, has_synced_me, ..Member::default() }
    }

    fn view(members: &[(u8, Member)]) -> View {
        let mut view = View::new(9);
        members.iter().for_each(|(id, m)| view.set(*id, *m));
        view
    }

    const OWN: Own = Own { complete: true, copies: 0, version: 1, settled: 1 };

    fn stage_at(readiness: &mut Readiness, ms: u64, view: &View, own: &Own) -> Stage {
        while readiness.tick(at(ms), view, own).is_some() {}
        readiness.stage()
    }

    #[test]
    fn alone_it_is_ready_after_the_dead_time_and_not_before_its_source_is_read() {
        let (mut r, nobody) = (Readiness::new(SETTLE, at(0)), view(&[]));
        assert_eq!(stage_at(&mut r, 299, &nobody, &OWN), Stage::Starting);
        assert_eq!(
            stage_at(&mut r, 300, &nobody, &Own { complete: false, ..OWN }),
            Stage::Starting
        );
        assert_eq!(stage_at(&mut r, 301, &nobody, &OWN), Stage::Ready);
    }

    #[test]
    fn who_shares_its_number_begins_again_when_the_other_is_gone() {
        let (mut r, nobody) = (Readiness::new(SETTLE, at(0)), view(&[]));
        assert_eq!(stage_at(&mut r, 300, &nobody, &OWN), Stage::Ready);
        assert!(r.dispute(at(400)), "it was ready");
        assert!(!r.dispute(at(500)));
        assert_eq!(stage_at(&mut r, 799, &nobody, &OWN), Stage::Starting);
        assert_eq!(stage_at(&mut r, 800, &nobody, &OWN), Stage::Ready);
    }

    #[test]
    fn it_waits_for_everybody_who_has_begun_and_for_its_kernel() {
        let mut r = Readiness::new(SETTLE, at(0));
        let starting = (3, member(Status::Joining, false, false));
        let waits = view(&[
            (1, member(Status::Ready, true, false)),
            (2, member(Status::Syncing, true, false)),
            starting,
        ]);
        assert_eq!(stage_at(&mut r, 300, &waits, &OWN), Stage::Syncing);
        assert_eq!(r.awaited(), 1 << 1 | 1 << 2);
        let one = view(&[
            (1, member(Status::Ready, true, true)),
            (2, member(Status::Syncing, true, false)),
            starting,
        ]);
        assert_eq!(stage_at(&mut r, 310, &one, &OWN), Stage::Syncing);
        let done = view(&[
            (1, member(Status::Ready, true, true)),
            (2, member(Status::Ready, true, true)),
            starting,
        ]);
        let owes = Own { version: 7, settled: 6, ..OWN };
        assert_eq!(
            stage_at(&mut r, 320, &done, &owes),
            Stage::Syncing,
            "the kernel does not have all"
        );
        // The group goes on, and so does what is committed for it.
        assert_eq!(
            stage_at(&mut r, 330, &done, &Own { version: 9, settled: 7, ..OWN }),
            Stage::Ready
        );
        assert_eq!(r.awaited(), 0);
        assert_eq!(stage_at(&mut r, 340, &waits, &OWN), Stage::Ready, "it stays so");
    }

    #[test]
    fn what_was_said_to_an_earlier_life_does_not_count() {
        let mut r = Readiness::new(SETTLE, at(0));
        let stale = view(&[(1, member(Status::Ready, true, true))]);
        assert_eq!(stage_at(&mut r, 300, &stale, &OWN), Stage::Syncing);
        assert_eq!(stage_at(&mut r, 400, &stale, &OWN), Stage::Syncing);
        let denied = view(&[(1, member(Status::Ready, true, false))]);
        assert_eq!(stage_at(&mut r, 450, &denied, &OWN), Stage::Syncing);
        assert_eq!(stage_at(&mut r, 500, &stale, &OWN), Stage::Ready);
    }

    #[test]
    fn who_falls_silent_in_the_middle_is_waited_for_a_dead_time_longer() {
        let mut r = Readiness::new(SETTLE, at(0));
        let (there, gone) = (
            view(&[(1, member(Status::Ready, true, false))]),
            view(&[(1, member(Status::Dead, true, false))]),
        );
        assert_eq!(stage_at(&mut r, 300, &there, &OWN), Stage::Syncing);
        assert_eq!(stage_at(&mut r, 600, &gone, &OWN), Stage::Syncing);
        assert_eq!(stage_at(&mut r, 899, &there, &OWN), Stage::Syncing);
        assert_eq!(stage_at(&mut r, 1000, &gone, &OWN), Stage::Syncing);
        assert_eq!(stage_at(&mut r, 1300, &gone, &OWN), Stage::Ready);
    }

    #[test]
    fn who_sends_nothing_more_is_not_waited_for_for_ever_and_slow_progress_is_progress() {
        let mut r = Readiness::new(SETTLE, at(0));
        let one_way = view(&[
            (1, member(Status::Joining, true, false)),
            (2, member(Status::Ready, true, false)),
        ]);
        for second in 1..20 {
            let own = Own { copies: second, ..OWN };
            assert_eq!(stage_at(&mut r, 4000 * second, &one_way, &own), Stage::Syncing);
        }
        let own = Own { copies: 19, ..OWN };
        assert_eq!(stage_at(&mut r, 76_000 + 4999, &one_way, &own), Stage::Syncing);
        assert_eq!(stage_at(&mut r, 76_000 + 5000, &one_way, &own), Stage::Ready);
        assert_eq!(r.awaited(), 1 << 1 | 1 << 2, "it knows without whom");
    }
}
