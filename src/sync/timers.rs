//! Timers: what a shard does at a time of its own, if nothing arrives before.
//!
//! Each part owns its times, and [`Replica::tick`] asks each whether one has come. Here they are
//! put together, and nowhere else: who waits until [`Replica::poll_at`] misses none.

use super::mutation::{Mutation, is};
use super::replica::{BACK_OFF, Replica};
use super::stream::stream_member;
use crate::time::Time;

/// One deadline each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Timer {
    /// When to end the hold of the connection that is held longest.
    Hold,
    /// When to ask again for a place for the connection that was refused as older first.
    BackOff,
    /// When to look for backups again for those that have none.
    Waiting,
    /// When to review what is leased.
    Leases,
    /// When to try again to write what the kernel does not have.
    Missing,
    /// When to write copies again that have their timeout for long.
    Rewrite,
    /// When to look at the entries of contested connections.
    Contests,
    /// When to go on with a walk; without one, when a member has been silent, or has not heard this
    /// one, for so long that one begins.
    Walk,
    /// When to compare sums with the peers.
    Digests,
    /// When to send: what goes again, what waited for others, what is asked for again.
    Streams,
}

const TIMERS: [Timer; 10] = [
    Timer::Hold,
    Timer::BackOff,
    Timer::Waiting,
    Timer::Leases,
    Timer::Missing,
    Timer::Rewrite,
    Timer::Contests,
    Timer::Walk,
    Timer::Digests,
    Timer::Streams,
];
const _: () = assert!(TIMERS.len() == Timer::Streams as usize + 1, "none is left out");

impl Replica<'_> {
    /// When [`tick`](Self::tick) or the transmit stage has something to do next, if nothing arrives
    /// before.
    pub fn poll_at(&self) -> Time {
        TIMERS.iter().fold(Time::NEVER, |at, timer| at.min(self.timer(*timer)))
    }

    fn timer(&self, timer: Timer) -> Time {
        match timer {
            Timer::Hold => self.hold_at(),
            Timer::BackOff => self.back_off_at(),
            Timer::Waiting if self.ledger.waiting() == 0 => Time::NEVER,
            Timer::Waiting => self.retry_at,
            Timer::Leases => self.credit.review_at(),
            Timer::Missing => self.missing_at(),
            Timer::Rewrite => self.commits.rewrite_at(),
            Timer::Contests => self.contests.look_at(),
            Timer::Walk => self.walk_at(),
            Timer::Digests => self.digests_at(),
            Timer::Streams => {
                let busy = self.busy.iter().map(|stream| usize::from(*stream));
                busy.fold(Time::NEVER, |at, stream| at.min(self.send_at(stream)))
            }
        }
    }

    /// When the connection that was refused as older first asks again.
    pub(super) fn back_off_at(&self) -> Time {
        let first = self.ledger.first_backing_off();
        first.map_or(Time::NEVER, |slot| self.ledger.since(slot).after(BACK_OFF))
    }

    /// When there is something to send on this stream, which is busy.
    fn send_at(&self, stream: usize) -> Time {
        if !self.is_up(stream_member(stream)) {
            return Time::NEVER; // Nothing is sent there, whatever is due.
        }
        let again_at = match is(Mutation::RepeatsUnannounced) {
            true => Time::NEVER,
            false => self.outbox.retransmit_at(stream),
        };
        let skip_at = self.outbox.skip_at(stream);
        let is_sendable = self.ledger.dirty(stream) > 0 && self.outbox.has_window(stream);
        let flush_at = if is_sendable { self.streams[stream].flush_at } else { Time::NEVER };
        again_at.min(skip_at).min(self.credit.ask_at(stream)).min(flush_at)
    }
}
