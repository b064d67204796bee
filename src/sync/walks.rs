//! Walks: what is to be done with every slot of the table, a stretch at a time, and in which order.
//!
//! A walk looks at each slot from the first to the last; what it does there is `takeover`'s. One is
//! under way at a time, the first; the others wait behind it.
//!
//! What always holds, and is asserted:
//!
//! 1. *The queue is in order of [urgency](Walk::urgency)*: whoever waits for nobody goes before
//!    those that may have to wait for somebody. Among equals the one that was asked for first goes
//!    first.
//! 2. *One that waits is not asked for twice*, so the queue is bounded by the kinds that there are.
//!    One that is under way may be asked for again: it may have passed what it must see again.
//! 3. *A walk that is overtaken begins anew* behind the one that overtakes it; each may.

use std::collections::VecDeque;

use crate::conn::MemberId;
use crate::limits::{MEMBERS_MAX, STREAMS_MAX};
use crate::time::Time;

/// Walks that can wait at once: three kinds for a stream, eight for a member, and two that move
/// backups away; as many of those had begun and were overtaken; and one is under way.
const WALKS_MAX: usize = 3 * STREAMS_MAX + 8 * MEMBERS_MAX + 2 * 2 + 1;

/// A walk over the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Walk {
    /// Copies of this member are written to the kernel, for it is gone.
    Commit { member: MemberId },
    /// Every connection whose other copy was at this member finds a new one.
    Purge { member: MemberId },
    /// This member is heard and does not hear us: our connections find other backups. Its copies
    /// here stay.
    Abandon { member: MemberId },
    /// Backups at these members (bits) move to better ones: the members leave, or have a lower
    /// priority.
    Rehome { away_from: u64, leave: bool },
    /// The sender of this stream let go of what was agreed on: leases end, copies are offered.
    Verify { stream: usize },
    /// This member came with another table than it had: what was taken over from that is simply
    /// ours.
    Forget { member: MemberId },
    /// This member is back with the table that connections here were taken over from.
    Offer { member: MemberId },
    /// This member is silent for long, and nobody can take its place: closes do not wait for it any
    /// more.
    Lose { member: MemberId },
    /// The backup of this stream is named what it should hold, as far as digests differ.
    Compare { stream: usize },
    /// What the active of this stream did not name is offered to it.
    Unseen { stream: usize },
    /// Its process was killed and goes on, and knows no more which of our copies it declined: it is
    /// asked.
    Declined { member: MemberId },
    /// It is back: its copies' entries in the kernel get the timeout of copies again.
    Rewrite { member: MemberId },
}

impl Walk {
    /// Which walks come first: the lower number.
    fn urgency(&self) -> u8 {
        match self {
            // Packets go that way already.
            Walk::Commit { .. } => 0,
            // What waits for members that are gone, or do not hear us: others may wait for that.
            Walk::Purge { .. } => 1,
            Walk::Abandon { .. } => 2,
            _ => 3,
        }
    }
}

/// The walks of a shard.
pub(super) struct Walks {
    queue: VecDeque<Walk>,
    /// The slot that the first one looks at next. 0: it has not begun.
    slot: u32,
    next_at: Time,
}

impl Walks {
    pub(super) fn new() -> Walks {
        Walks { queue: VecDeque::with_capacity(WALKS_MAX), slot: 0, next_at: Time(0) }
    }

    /// A walk is to be made.
    pub(super) fn push(&mut self, walk: Walk) {
        if self.queue.iter().skip(self.under_way()).any(|waiting| *waiting == walk) {
            return;
        }
        let at = self.queue.iter().take_while(|other| other.urgency() <= walk.urgency()).count();
        if at == 0
            && self.under_way() == 1
            && let Some(overtaken) = self.queue.pop_front()
        {
            self.slot = 0;
            // Who begins anew need not be there twice.
            self.queue.retain(|waiting| *waiting != overtaken);
            self.queue.push_front(overtaken);
        }
        assert!(self.queue.len() < WALKS_MAX, "a walk that waits is not asked for twice");
        self.queue.insert(at, walk);
        assert!(
            self.queue.iter().is_sorted_by_key(Walk::urgency),
            "the more urgent ones come first"
        );
    }

    /// Backups at these members are to move away: in the walk that waits for that, if there is one.
    pub(super) fn push_rehome(&mut self, away_from: u64, leave: bool) {
        if self.contains(Walk::Rehome { away_from, leave }) {
            return;
        }
        let under_way = self.under_way();
        for walk in self.queue.iter_mut().skip(under_way) {
            if let Walk::Rehome { away_from: others, leave: other } = walk
                && *other == leave
            {
                *others |= away_from;
                return;
            }
        }
        self.push(Walk::Rehome { away_from, leave });
    }

    /// How many walks are under way: the first, if it has begun.
    fn under_way(&self) -> usize {
        usize::from(self.slot > 0 && !self.queue.is_empty())
    }

    /// These walks need not be made any more.
    pub(super) fn drop_those(&mut self, is_void: impl Fn(&Walk) -> bool) {
        if self.queue.front().is_some_and(&is_void) {
            self.slot = 0;
        }
        self.queue.retain(|walk| !is_void(walk));
    }

    /// Whether this one is under way or waits.
    pub(super) fn contains(&self, walk: Walk) -> bool {
        self.queue.contains(&walk)
    }

    /// Whether no walk is under way, and none waits.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// All of them, in their order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Walk> {
        self.queue.iter()
    }

    /// When the next stretch is due.
    pub(super) fn next_at(&self) -> Time {
        if self.queue.is_empty() { Time::NEVER } else { self.next_at }
    }

    /// The walk that is under way, or begins now, and the slot that it looks at next; `None` before
    /// its time.
    pub(super) fn next(&self, now: Time) -> Option<(Walk, u32)> {
        let walk = self.queue.front().copied()?;
        self.next_at.reached(now).then_some((walk, self.slot))
    }

    /// The first walk has come as far as before this slot, of so many, and goes on then. Tells it
    /// if it is done.
    pub(super) fn come_to(&mut self, slot: u32, capacity: u32, next_at: Time) -> Option<Walk> {
        assert!(self.slot <= slot && slot <= capacity, "a walk goes forwards");
        (self.slot, self.next_at) = (slot, next_at);
        if slot < capacity {
            return None;
        }
        self.slot = 0;
        self.queue.pop_front()
    }

    /// No walk goes on before then.
    pub(super) fn pause(&mut self, until: Time) {
        self.next_at = until;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: u32 = 100;
    const NOW: Time = Time(1);
    const OFFER: Walk = Walk::Offer { member: 2 };
    const FORGET: Walk = Walk::Forget { member: 2 };
    const PURGE: Walk = Walk::Purge { member: 3 };
    const COMMIT: Walk = Walk::Commit { member: 3 };

    fn with(walks: &[Walk]) -> Walks {
        let mut all = Walks::new();
        walks.iter().for_each(|walk| all.push(*walk));
        all
    }

    fn order(walks: &Walks) -> Vec<Walk> {
        walks.iter().copied().collect()
    }

    #[test]
    fn walks_are_made_one_after_the_other_in_stretches() {
        let mut walks = with(&[OFFER, FORGET]);
        assert_eq!(walks.next(NOW), Some((OFFER, 0)));
        assert_eq!(walks.come_to(60, CAPACITY, Time(5)), None);
        assert_eq!((walks.next(NOW), walks.next_at()), (None, Time(5)));
        assert_eq!(walks.next(Time(5)), Some((OFFER, 60)));
        assert_eq!(walks.come_to(CAPACITY, CAPACITY, Time(5)), Some(OFFER));
        assert_eq!(walks.next(Time(5)), Some((FORGET, 0)));
        walks.pause(Time(9));
        assert_eq!(walks.next(Time(8)), None);
        assert_eq!(walks.come_to(CAPACITY, CAPACITY, Time(9)), Some(FORGET));
        assert_eq!((walks.next(Time(9)), walks.next_at()), (None, Time::NEVER));
    }

    #[test]
    fn one_that_waits_is_not_asked_for_twice_and_one_under_way_may_be() {
        let mut walks = with(&[OFFER, OFFER]);
        assert_eq!(order(&walks), [OFFER], "it has not begun");
        walks.come_to(17, CAPACITY, NOW);
        [OFFER, FORGET, OFFER].into_iter().for_each(|walk| walks.push(walk));
        assert_eq!(
            order(&walks),
            [OFFER, OFFER, FORGET],
            "it may have passed what it must see again"
        );
    }

    #[test]
    fn one_that_is_overtaken_begins_anew_once() {
        let mut walks = with(&[OFFER]);
        walks.come_to(17, CAPACITY, NOW);
        [OFFER, FORGET, COMMIT].into_iter().for_each(|walk| walks.push(walk));
        assert_eq!(
            (order(&walks), walks.next(NOW)),
            (vec![COMMIT, OFFER, FORGET], Some((COMMIT, 0)))
        );
    }

    #[test]
    fn the_more_urgent_come_first_and_equals_in_the_order_in_which_they_were_asked_for() {
        let deaf = Walk::Abandon { member: 4 };
        let again = Walk::Commit { member: 5 };
        let mut walks = with(&[OFFER, deaf, PURGE, COMMIT]);
        assert_eq!(order(&walks), [COMMIT, PURGE, deaf, OFFER]);
        walks.come_to(17, CAPACITY, NOW);
        walks.push(again);
        // (A second death does not make the first one's walk begin anew.)
        assert_eq!((order(&walks)[1], walks.next(NOW)), (again, Some((COMMIT, 17))));
    }

    #[test]
    fn what_is_dropped_leaves_the_others_where_they_are() {
        let mut walks = with(&[OFFER, FORGET]);
        walks.come_to(17, CAPACITY, NOW);
        walks.drop_those(|walk| *walk == FORGET);
        assert_eq!(walks.next(NOW), Some((OFFER, 17)));
        walks.push(FORGET);
        walks.drop_those(|walk| *walk == OFFER);
        assert_eq!(walks.next(NOW), Some((FORGET, 0)));
    }

    #[test]
    fn who_leaves_next_joins_the_walk_that_waits_for_those_who_leave() {
        let rehome = |away_from, leave| Walk::Rehome { away_from, leave };
        let mut walks = Walks::new();
        walks.push_rehome(0b0100, true);
        walks.push_rehome(0b0100, true);
        walks.push_rehome(0b1000, true);
        walks.push_rehome(0b1000, false);
        assert_eq!(order(&walks), [rehome(0b1100, true), rehome(0b1000, false)]);
        walks.come_to(17, CAPACITY, NOW);
        walks.push_rehome(0b10_0000, true);
        assert_eq!(order(&walks)[2], rehome(0b10_0000, true), "the one under way has passed some");
    }

    #[test]
    fn however_often_it_is_asked_for_the_queue_does_not_grow() {
        let mut walks = Walks::new();
        let room = walks.queue.capacity();
        for n in 0..100_000u32 {
            let (stream, member) =
                (n as usize % STREAMS_MAX, (n % MEMBERS_MAX as u32) as MemberId + 1);
            for walk in [
                Walk::Verify { stream },
                Walk::Compare { stream },
                Walk::Unseen { stream },
                Walk::Offer { member },
                Walk::Forget { member },
                Walk::Purge { member },
                Walk::Commit { member },
                Walk::Abandon { member },
                Walk::Lose { member },
                Walk::Declined { member },
                Walk::Rewrite { member },
            ] {
                walks.push(walk);
            }
            walks.push_rehome(1 << member, n % 2 == 0);
            if n == 50_000 {
                walks.come_to(1, CAPACITY, NOW);
            }
        }
        assert_eq!(walks.queue.capacity(), room);
    }
}
