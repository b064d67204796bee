//! Full sync, as this shard sees it: what [`super::full_sync`] is to know of each member, and how
//! much of a full sync may stand before live deltas.

use super::full_sync::Sight;
use super::replica::Replica;
use super::stream::{stream_index, stream_member};
use super::walks::Walk;
use crate::conn::MemberId;
use crate::group::view::Status;
use crate::limits::{MEMBERS_MAX, SHARDS_MAX, STREAMS_MAX};
use crate::time::Time;

/// Connections that may be dirty or unacknowledged before those that wait for a backup have to go
/// on waiting: a live change queues behind no more. At a round trip of 1 ms that is two million
/// connections a second.
pub(super) const AHEAD: u64 = 2048;

/// How many of those that wait get a backup at each try all the same, so that live changes alone
/// never keep them out: at least 8000 a second, as long as what was sent before is acknowledged.
pub(super) const TRICKLE: usize = 8;

impl Replica<'_> {
    /// The members that have every copy that this shard wants them to have, as bits. A bit stays
    /// until the member is silent, takes no copies, or comes with another table.
    pub fn synced(&self) -> u64 {
        self.full_syncs.done()
    }

    /// Connections that wait for a backup.
    pub fn waiting(&self) -> u64 {
        self.ledger.waiting()
    }

    /// How many connections that wait may get a backup now.
    pub(super) fn waiting_budget(&self) -> usize {
        let ahead = (self.ledger.all_dirty_actives() + self.outbox.unacknowledged())
            .saturating_sub(self.dirty_for_the_silent());
        let stuck = |s: &u16| {
            let stream = *s as usize;
            self.is_up(stream_member(stream)) && self.outbox.has_timed_out(stream)
        };
        let trickle = if self.busy.iter().any(stuck) { 0 } else { TRICKLE };
        (AHEAD.saturating_sub(ahead) as usize).max(trickle).min(self.ledger.waiting() as usize)
    }

    /// Looks at how far each full sync is.
    pub(super) fn tick_full_syncs(&mut self, now: Time) {
        let is_published = self.full_syncs.begin(now);
        for member in 1..=MEMBERS_MAX as MemberId {
            let seen = Seen { replica: self, member };
            if let Some(step) = self.full_syncs.look(now, member, &seen, is_published)
                && let Some(figures) = self.full_syncs.go(member, step)
            {
                self.durable(stream_index(member, 0)).set_full_sync(&figures);
            }
        }
    }
}

/// A member, and what goes there.
struct Seen<'r, 'm> {
    replica: &'r Replica<'m>,
    member: MemberId,
}

impl Seen<'_, '_> {
    fn streams(&self) -> std::ops::Range<usize> {
        let first = stream_index(self.member, 0);
        first..first + SHARDS_MAX
    }
}

impl Sight for Seen<'_, '_> {
    fn takes(&self) -> bool {
        let seen = self.replica.peers.seen(self.member);
        let is_able = seen.status.is_able() || seen.status == Status::Leaving;
        self.replica.is_up(self.member) && seen.hears_me && is_able
    }

    fn is_given(&self) -> bool {
        self.replica.is_verified(self.member) && self.replica.walks.is_empty()
    }

    fn has_waiting(&self) -> bool {
        self.replica.waiting() > 0
    }

    fn given_up(&self) -> u64 {
        let each = self.streams().map(|stream| {
            let durable = self.replica.durable(stream);
            durable.given_up().raw().wrapping_add((durable.session() as u64) << 48)
        });
        each.fold(0, u64::wrapping_add)
    }

    fn is_sent(&self, by: Time) -> bool {
        // The list is in the order in which they became dirty.
        let mut firsts =
            self.streams().filter_map(|stream| self.replica.ledger.first_dirty(stream));
        firsts.all(|slot| self.replica.ledger.since(slot) > by)
    }

    fn is_acknowledged(&self, by: Time) -> bool {
        let mut oldest = self.streams().filter_map(|stream| self.replica.outbox.oldest(stream));
        oldest.all(|(_, entry)| entry.first_sent > by)
    }

    fn counts(&self) -> (u64, u64) {
        let Replica { ledger, walks, .. } = self.replica;
        let (mut actives, mut dirty) = (0, 0);
        for stream in self.streams() {
            actives += ledger.actives(stream);
            dirty += ledger.dirty(stream) as u64; // Closes among them: a few.
        }
        // Of all members: what flies to others makes this a few too many.
        let open = (dirty + self.replica.outbox.unacknowledged()).min(actives);
        let mut coming = ledger.waiting();
        if self.replica.peers.ranked().first() == Some(&self.member) {
            for walk in walks.iter() {
                if let Walk::Rehome { away_from, .. } = walk {
                    let all = (0..STREAMS_MAX).filter(|s| away_from >> stream_member(*s) & 1 == 1);
                    coming += all.map(|s| ledger.actives(s)).sum::<u64>();
                }
            }
        }
        (actives - open, coming + open)
    }
}
