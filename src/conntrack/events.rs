//! Listening: the kernel's conntrack events of one shard.
//!
//! The kernel drops what is not ours ([`filter`](super::filter)); what passes is checked again
//! here, so that the caller sees connections of its shard only, whatever the filter let
//! through. Waking up per event is what costs, so events are drained in batches.
//!
//! If the queue overflows, the kernel goes on delivering what comes later (NETLINK_NO_ENOBUFS;
//! without it everything is discarded until the queue is empty) and [`Source::overruns`]
//! grows: a dump repairs what was missed.
//!
//! **A dump can be older than an event.** The kernel prepares the next piece of a dump while
//! the previous one is read, so an entry in it may have closed since, and its DESTROY may have
//! been drained already: taken as it is, the closed connection would come back for ever. So
//! while a dump is under way the tuples of drained events are remembered until its next piece
//! has been read, and entries among them are skipped. The memory is bounded: when it is full,
//! `drain` pauses until [`Source::drain_dump`] has run, which a caller does in every pass.

use std::collections::{HashSet, VecDeque};
use std::os::fd::BorrowedFd;

use super::KernelError;
use super::codec::{Origin, status};
use super::dump::DumpProgress;
use super::queue::{Heard, NetlinkQueue, Queue};
use crate::conn::slot::groups;
use crate::conn::{Tuple, shard_of};
use crate::limits::{COMMIT_PER_PASS, INGEST_PER_PASS};
use crate::source::SourceEvent;

/// Tuples remembered while a dump is under way: several passes' worth of events.
const RECENT_MAX: usize = 4 * INGEST_PER_PASS;

/// Connections that expect another one and were not asked for yet.
const EXPECTING_MAX: usize = INGEST_PER_PASS;

/// What a drain did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Drained {
    /// Messages read, those of no interest included.
    pub taken: usize,
    /// Events handed to the caller.
    pub events: usize,
    /// Messages that made no sense.
    pub malformed: usize,
    /// Reads that failed: for want of memory, since overruns are told by [`Source::overruns`].
    pub failed: usize,
    /// Attributes that made no sense and were left out.
    pub skipped: usize,
    /// Expectations that helpers created for this shard's connections.
    pub expectations: usize,
    /// Whether more may be waiting.
    pub more: bool,
}

/// One shard's ear to the kernel.
pub struct Source<Q = NetlinkQueue> {
    queue: Q,
    share: OwnShard,
    recent: HashSet<Tuple>,
    expecting: VecDeque<Tuple>,
}

/// Which connections are this shard's.
#[derive(Clone, Copy)]
pub(super) struct OwnShard {
    shard: u8,
    shards: u8,
}

impl OwnShard {
    /// Whether the caller wants to hear of this: its shard, and an entry that is in the table and
    /// stays there.
    pub(super) fn wants(&self, event: &SourceEvent) -> bool {
        let original = match event {
            SourceEvent::Seen { connection, known } => {
                let bits = connection.state.status;
                let lives = bits & status::CONFIRMED != 0 && bits & status::DYING == 0;
                if known & groups::STATE != 0 && !lives {
                    return false;
                }
                &connection.original
            }
            SourceEvent::Gone { original, .. } => original,
        };
        self.has(original)
    }

    fn has(&self, original: &Tuple) -> bool {
        shard_of(original, self.shards) == self.shard
    }
}

impl Source {
    /// Listens, in the network namespace of the calling thread, to shard `shard` of `shards`.
    /// `own_port_ids` are the commit sockets of all shards, whose echo is not to be heard;
    /// `receive_buffer` is how many bytes of events may wait (an event takes about 1300).
    pub fn open(
        shard: u8,
        shards: u8,
        own_port_ids: &[u32],
        receive_buffer: usize,
    ) -> Result<Source, KernelError> {
        let queue = NetlinkQueue::open(shard, shards, own_port_ids, receive_buffer)?;
        Ok(Source::over(queue, shard, shards))
    }

    /// The descriptor that is readable when events wait.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.queue.fd()
    }
}

impl<Q: Queue> Source<Q> {
    /// What shard `shard` of `shards` makes of this queue.
    pub fn over(queue: Q, shard: u8, shards: u8) -> Source<Q> {
        Source {
            queue,
            share: OwnShard { shard, shards },
            recent: HashSet::with_capacity(RECENT_MAX + COMMIT_PER_PASS),
            expecting: VecDeque::with_capacity(EXPECTING_MAX),
        }
    }

    /// Takes up to `cap` waiting messages from the kernel. It pauses while
    /// [`next_expecting`](Self::next_expecting) has too many to tell.
    pub fn drain(&mut self, cap: usize, f: &mut dyn FnMut(SourceEvent, Origin)) -> Drained {
        let mut drained = Drained::default();
        let Source { queue, share, recent, expecting } = self;
        let is_dumping = queue.is_dumping();
        let mut left = cap;
        if is_dumping {
            left = left.min(RECENT_MAX.saturating_sub(recent.len()));
        }
        while left > 0 && expecting.len() < EXPECTING_MAX {
            let wanted = left.min(EXPECTING_MAX - expecting.len());
            let batch = queue.receive(wanted, &mut |heard| match heard {
                Heard::Event { event, origin, skipped } => {
                    drained.skipped += skipped as usize;
                    if share.wants(&event) {
                        if is_dumping && recent.len() < RECENT_MAX {
                            recent.extend(newer_than_a_dump(&event));
                        }
                        drained.events += 1;
                        f(event, origin);
                    }
                }
                Heard::Expects(original) if share.has(&original) => {
                    drained.expectations += 1;
                    expecting.push_back(original);
                }
                Heard::Expects(_) => {}
                Heard::Malformed => drained.malformed += 1,
            });
            drained.failed += batch.failed as usize;
            left -= batch.taken;
            drained.taken += batch.taken;
            if batch.is_last {
                return drained;
            }
        }
        drained.more = true;
        drained
    }

    /// The next connection, by its original tuple without its zone, that a helper expects another
    /// one for, in the order in which [`drain`](Self::drain) met them.
    pub fn next_expecting(&mut self) -> Option<Tuple> {
        self.expecting.pop_front()
    }

    /// Messages that were lost because too many waited, since the socket was opened. One
    /// system call.
    pub fn overruns(&self) -> u32 {
        self.queue.overruns()
    }

    /// Asks the kernel for its whole table. Returns false if a dump is under way already; what
    /// it has passed by then is not repeated, so ask again when it is done.
    pub fn start_dump(&mut self) -> Result<bool, KernelError> {
        if self.queue.is_dumping() {
            return Ok(false);
        }
        self.recent.clear();
        self.queue.start_dump().map(|()| true)
    }

    /// An entry was deleted by this program, of which no event is heard: a piece of a dump that the
    /// kernel has prepared may still show it. At most a pass's share of them between two calls of
    /// [`drain_dump`](Self::drain_dump).
    pub fn deleted(&mut self, original: &Tuple) {
        if self.queue.is_dumping() {
            self.recent.insert(*original);
        }
    }

    /// Takes the next pieces of the dump, until at least `cap` entries have been looked at or the
    /// dump is done; a piece has up to 200. While a dump runs, call this in every pass.
    pub fn drain_dump(&mut self, cap: usize, f: &mut dyn FnMut(SourceEvent)) -> DumpProgress {
        let Source { queue, share, recent, .. } = self;
        let progress = queue.drain_dump(cap, &mut |event| {
            let SourceEvent::Seen { connection, .. } = &event else { return false };
            let is_news = share.wants(&event) && !recent.contains(&connection.original);
            if is_news {
                f(event);
            }
            is_news
        });
        // What the kernel has prepared by now is newer than every event drained so far.
        recent.clear();
        progress
    }
}

/// The tuple of an event after which an older dump has nothing to add.
fn newer_than_a_dump(event: &SourceEvent) -> Option<Tuple> {
    match event {
        SourceEvent::Gone { original, .. } => Some(*original),
        SourceEvent::Seen { connection, known } => {
            (known & groups::STATE != 0).then_some(connection.original)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::{Connection, State};
    use crate::conntrack::dump::DumpState;
    use crate::conntrack::queue::Batch;

    /// A kernel that has prepared a piece of a dump with these entries.
    struct Prepared(Vec<Connection>);

    impl Queue for Prepared {
        fn receive(&mut self, _: usize, _: &mut dyn FnMut(Heard)) -> Batch {
            Batch { taken: 0, is_last: true, failed: false }
        }

        fn overruns(&self) -> u32 {
            0
        }

        fn is_dumping(&self) -> bool {
            !self.0.is_empty()
        }

        fn start_dump(&mut self) -> Result<(), KernelError> {
            Ok(())
        }

        fn drain_dump(&mut self, _: usize, f: &mut dyn FnMut(SourceEvent) -> bool) -> DumpProgress {
            let entries = self.0.len();
            let events = self.0.drain(..).filter(|entry| f(SourceEvent::seen(*entry))).count();
            DumpProgress { events, entries, malformed: 0, skipped: 0, state: DumpState::Done }
        }
    }

    /// Traffic seed 966001785: what was closed elsewhere while a dump ran was deleted here, read
    /// out of that dump, and taken for a connection that had begun. It had no entry, and so no end.
    #[test]
    fn what_was_deleted_here_is_not_read_out_of_an_older_dump() {
        let entry = |port| {
            let original = Tuple::v4(17, ([10, 0, 0, 1].into(), port), ([10, 0, 0, 2].into(), 53));
            let state = State { status: status::CONFIRMED, ..State::default() };
            Connection::new(original, original.mirrored(), state)
        };
        let mut source = Source::over(Prepared(vec![entry(1), entry(2)]), 0, 1);
        source.deleted(&entry(1).original);
        let mut read = Vec::new();
        source.drain_dump(10, &mut |event| read.push(*event.original()));
        assert_eq!(read, [entry(2).original]);
    }
}
