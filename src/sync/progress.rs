//! Full sync: how far this shard is with giving each member what it should have, and how much of it may stand
//! before live deltas.
//!
//! A full sync is nothing of its own on the wire: connections that wait for a backup get one, walks move
//! backups to better places, and all of it travels as deltas do. What is done is acknowledged and stays done: an
//! interrupted sync goes on with what is left. Here is only watched when all of it has arrived:
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

use std::time::Duration;

use super::replica::Replica;
use super::stream::{stream_index, stream_member};
use super::walks::Walk;
use crate::conn::MemberId;
use crate::group::view::Status;
use crate::limits::{MEMBERS_MAX, SHARDS_MAX};
use crate::time::Time;

/// Connections that may be dirty or unacknowledged before those that wait for a backup have to go on waiting: a live
/// change queues behind no more. At a round trip of 1 ms that is two million connections a second.
pub(super) const AHEAD: u64 = 2048;

/// How many of those that wait get a backup at each try all the same, so that live changes alone never keep them out:
/// at least 8000 a second, as long as what was sent before is acknowledged.
pub(super) const TRICKLE: usize = 8;

/// How long nothing that waits found a place before a member counts as one that takes no more.
const FULL: Duration = Duration::from_secs(1);

/// How often the figures are published while a full sync is under way.
const PUBLISH: Duration = Duration::from_millis(10);

/// How far a full sync to a member is, as an inspector reads it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Phase {
    /// There was none yet, or the member is gone.
    #[default]
    Idle = 0,
    /// It is under way.
    Syncing = 1,
    /// The member has all that it should have.
    Done = 2,
    /// The member has all that it takes: connections still wait for a backup, and it leases no more slots.
    Full = 3,
    /// The member fell silent, or takes no copies any more. It goes on when that is over.
    Interrupted = 4,
}

impl Phase {
    /// The phase that a number stands for.
    pub fn from_raw(raw: u64) -> Phase {
        match raw {
            1 => Phase::Syncing,
            2 => Phase::Done,
            3 => Phase::Full,
            4 => Phase::Interrupted,
            _ => Phase::Idle,
        }
    }

    /// The word for an operator.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Idle => "idle",
            Phase::Syncing => "syncing",
            Phase::Done => "done",
            Phase::Full => "full",
            Phase::Interrupted => "interrupted",
        }
    }
}

/// The figures of a full sync, of one shard to one member.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    /// How far it is.
    pub phase: Phase,
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
enum Stage {
    Idle,
    Giving,
    /// Everything that was dirty then is to be sent. What was given up by then, added up.
    Draining(Time, u64),
    /// Everything that was sent by then is to be acknowledged.
    Flying(Time, u64),
    Done,
}

/// Every member's full sync.
pub(super) struct Progress {
    members: Vec<(Stage, Figures)>,
    /// Since when nothing that waits for a backup found one, although it was tried.
    pub(super) barren_since: Option<Time>,
    publish_at: Time,
}

impl Progress {
    /// Nobody has anything.
    pub(super) fn new() -> Progress {
        Progress {
            members: vec![(Stage::Idle, Figures::default()); MEMBERS_MAX + 1],
            barren_since: None,
            publish_at: Time(0),
        }
    }
}

impl Replica<'_> {
    /// The members that have every copy that this shard wants them to have, as bits. A bit stays until the member is
    /// silent, takes no copies, or comes with another table.
    pub fn synced(&self) -> u64 {
        let done = self.progress.members.iter().enumerate().filter(|(_, (stage, _))| *stage == Stage::Done);
        done.fold(0, |bits, (member, _)| bits | 1 << member)
    }

    /// Connections that wait for a backup.
    pub fn waiting(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// How many connections that wait may get a backup now.
    pub(super) fn waiting_budget(&self) -> usize {
        let ahead =
            (self.dirty_actives + self.outbox.unacknowledged()).saturating_sub(self.dirty_for_the_silent());
        let stuck = |s: &u16| {
            let stream = *s as usize;
            self.is_up(stream_member(stream)) && self.outbox.has_timed_out(stream)
        };
        let trickle = if self.busy.iter().any(stuck) { 0 } else { TRICKLE };
        (AHEAD.saturating_sub(ahead) as usize).max(trickle).min(self.waiting.len() as usize)
    }

    /// Looks at how far each full sync is.
    pub(super) fn tick_progress(&mut self, now: Time) {
        let publish = self.progress.publish_at.reached(now);
        if publish {
            self.progress.publish_at = now.after(PUBLISH);
        }
        for member in 1..=MEMBERS_MAX as MemberId {
            let (old, mut figures) = self.progress.members[member as usize];
            let stage = self.next_stage(now, member, old, &mut figures);
            if stage == Stage::Idle && old == Stage::Idle {
                continue;
            }
            let changed = (stage == Stage::Done) != (old == Stage::Done)
                || (stage == Stage::Idle) != (old == Stage::Idle);
            if changed || publish && stage != Stage::Done {
                self.measure(member, &mut figures);
                if stage == Stage::Done && figures.phase == Phase::Done {
                    figures.to_do = 0; // What is dirty now is live traffic.
                }
                self.durable(stream_index(member, 0)).set_full_sync(&figures);
            }
            self.progress.members[member as usize] = (stage, figures);
        }
    }

    fn next_stage(&self, now: Time, member: MemberId, stage: Stage, figures: &mut Figures) -> Stage {
        let seen = &self.view.members[member as usize];
        let takes =
            self.is_up(member) && seen.hears_me && (seen.status.is_able() || seen.status == Status::Leaving);
        match stage {
            Stage::Idle if takes => {
                let mut before = Figures::default();
                self.measure(member, &mut before);
                *figures =
                    Figures { phase: Phase::Syncing, begun: now, before: before.done, ..Figures::default() };
                Stage::Giving
            }
            Stage::Idle => Stage::Idle,
            _ if !takes => {
                let done = stage == Stage::Done;
                figures.phase = if done { Phase::Idle } else { Phase::Interrupted };
                figures.ended = if done { figures.ended } else { now };
                Stage::Idle
            }
            Stage::Giving => {
                let tried_since = self.progress.barren_since.map(|since| since.max(figures.begun));
                let takes_no_more = tried_since.is_some_and(|since| now.since(since) >= FULL);
                let is_verified = self.is_verified(member);
                if is_verified && self.walks.is_empty() && (self.waiting.is_empty() || takes_no_more) {
                    Stage::Draining(now, self.given_up_to(member))
                } else {
                    Stage::Giving
                }
            }
            Stage::Draining(_, given_up) | Stage::Flying(_, given_up)
                if given_up != self.given_up_to(member) =>
            {
                Stage::Giving // What it carried is dirty again, or waits for a backup.
            }
            Stage::Draining(mark, given_up) if self.is_sent(member, mark) => Stage::Flying(now, given_up),
            Stage::Flying(mark, _) if self.is_acknowledged(member, mark) => {
                figures.ended = now;
                figures.phase = if self.waiting.is_empty() { Phase::Done } else { Phase::Full };
                Stage::Done
            }
            stage => stage,
        }
    }

    fn streams_to(&self, member: MemberId) -> &[super::stream::Stream] {
        let first = stream_index(member, 0);
        &self.streams[first..first + SHARDS_MAX]
    }

    fn is_sent(&self, member: MemberId, mark: Time) -> bool {
        // The list is in the order in which they became dirty.
        let mut firsts = self.streams_to(member).iter().filter_map(|s| s.dirty.first());
        firsts.all(|slot| self.table.since(slot) > mark)
    }

    fn is_acknowledged(&self, member: MemberId, mark: Time) -> bool {
        let first = stream_index(member, 0);
        let mut oldest = (first..first + SHARDS_MAX).filter_map(|stream| self.outbox.oldest(stream));
        oldest.all(|(_, entry)| entry.first_sent > mark)
    }

    /// Moves on whenever a datagram to the member is given up, and when a session begins.
    fn given_up_to(&self, member: MemberId) -> u64 {
        let first = stream_index(member, 0);
        let each = (first..first + SHARDS_MAX).map(|stream| {
            let durable = self.durable(stream);
            durable.given_up().raw().wrapping_add((durable.session() as u64) << 48)
        });
        each.fold(0, u64::wrapping_add)
    }

    /// What the member has, and what is still to go there.
    fn measure(&self, member: MemberId, figures: &mut Figures) {
        let (mut actives, mut dirty) = (0, 0);
        for s in self.streams_to(member) {
            actives += s.actives;
            dirty += s.dirty.len() as u64; // Closes among them: a few.
        }
        // Of all members: what flies to others makes this a few too many.
        let open = (dirty + self.outbox.unacknowledged()).min(actives);
        let mut coming = self.waiting.len() as u64;
        if self.ranked.first() == Some(&member) {
            for walk in self.walks.iter() {
                if let Walk::Rehome { away_from, .. } = walk {
                    let all = (0..self.streams.len()).filter(|s| away_from >> stream_member(*s) & 1 == 1);
                    coming += all.map(|s| self.streams[s].actives).sum::<u64>();
                }
            }
        }
        (figures.done, figures.to_do) = (actives - open, coming + open);
    }
}
