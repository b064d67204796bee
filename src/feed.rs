//! The feed: a shard's end of its source, and of the kernel's table where copies are committed.
//!
//! Waking up per event is what costs: under load the kernel's events are drained in batches a
//! millisecond apart, at once when a single one arrives after silence.

use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::conn::Kind;
use crate::conn::slot::groups;
use crate::conntrack::KernelError;
use crate::conntrack::commit::{CommitResult, Committer, Lifetime, Outcome};
use crate::conntrack::dump::DumpState;
use crate::conntrack::events::Source;
use crate::conntrack::local::{LocalAddresses, LocalView};
use crate::conntrack::sysctl::Timeouts;
use crate::counters::{Counter, Counters};
use crate::limits::{COMMIT_PER_PASS, INGEST_PER_PASS};
use crate::net::Port;
use crate::shm::ingest::{BadRecord, Consumer};
use crate::source::{Commit, SourceEvent};
use crate::sync::Replica;
use crate::time::Time;

/// Pause between two batches of kernel events under load.
const BATCH_PAUSE: Duration = Duration::from_millis(1);
/// How often overruns are looked for.
const OVERRUN_PERIOD: Duration = Duration::from_millis(100);
/// Where the futex is not available, how often the ring is looked at.
const RING_PAUSE: Duration = Duration::from_millis(1);
/// Entries of a dump in one pass.
const DUMP_PER_PASS: usize = 1024;
/// The watch key of the kernel's events.
pub const EVENTS_KEY: u64 = 1;

/// Who tells of connections.
pub enum Feed<'m> {
    /// The kernel.
    Kernel(Box<KernelFeed>),
    /// The ingest ring.
    Ring(RingFeed<'m>),
}

/// The ingest ring, as a shard reads it.
pub struct RingFeed<'m> {
    consumer: Consumer<'m>,
    more: bool,
    poll: bool,
}

/// The kernel's conntrack, as a shard reads and writes it.
pub struct KernelFeed {
    source: Source,
    committer: Option<Committer>,
    addresses: &'static LocalAddresses,
    local: LocalView,
    /// When to drain; `NEVER` while the socket is watched.
    drain_at: Time,
    overruns: u32,
    overruns_at: Time,
    dump: Dump,
    /// When a dump that could not begin is tried again.
    dump_at: Time,
    timeouts: Timeouts,
}

#[derive(PartialEq, Eq)]
enum Dump {
    Wanted,
    Running,
    Done,
}

impl<'m> Feed<'m> {
    /// A shard's end of the ring.
    pub fn ring(consumer: Consumer<'m>) -> Feed<'m> {
        Feed::Ring(RingFeed { consumer, more: false, poll: false })
    }

    /// A shard's end of the kernel. Without a committer nothing is written there.
    pub fn kernel(
        source: Source,
        committer: Option<Committer>,
        addresses: &'static LocalAddresses,
    ) -> Feed<'m> {
        Feed::Kernel(Box::new(KernelFeed {
            source,
            committer,
            addresses,
            local: LocalView::new(),
            drain_at: Time(0),
            overruns: 0,
            overruns_at: Time(0),
            dump: Dump::Wanted,
            dump_at: Time(0),
            timeouts: Timeouts::read(),
        }))
    }

    /// Whether everything that existed before the start was read.
    pub fn is_complete(&self) -> bool {
        match self {
            Feed::Kernel(kernel) => kernel.dump == Dump::Done,
            Feed::Ring(_) => true,
        }
    }

    /// Events wait in the socket.
    pub fn ready(&mut self, now: Time) {
        if let Feed::Kernel(kernel) = self {
            kernel.drain_at = now;
        }
    }

    /// Takes what the source has, up to the cap of a pass.
    pub fn ingest(
        &mut self,
        now: Time,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) -> Result<(), KernelError> {
        match self {
            Feed::Ring(ring) => {
                ring.consumer.awake();
                let taken = ring.consumer.drain(INGEST_PER_PASS, &mut |record| match record {
                    Ok(event) => replica.handle_source(now, &event),
                    Err(BadRecord::Position) => counters.count(Counter::SourceOverruns),
                    Err(_) => counters.count(Counter::SourceRejected),
                });
                ring.more = taken == INGEST_PER_PASS;
                Ok(())
            }
            Feed::Kernel(kernel) => kernel.ingest(now, replica, counters),
        }
    }

    /// Arms what wakes the shard when the source has something. Returns when to look by itself.
    pub fn arm(&mut self, now: Time, port: &mut Port<'_>) -> Time {
        match self {
            Feed::Ring(ring) if ring.more => now,
            Feed::Ring(ring) => match ring.consumer.prepare_sleep() {
                None => now,
                Some((word, expected)) => {
                    ring.poll = !port.futex_wait(word, expected);
                    if ring.poll { now.after(RING_PAUSE) } else { Time::NEVER }
                }
            },
            Feed::Kernel(kernel) => {
                if kernel.drain_at == Time::NEVER {
                    return kernel.overruns_at;
                }
                kernel.drain_at
            }
        }
    }

    /// Writes up to a pass's share of commits.
    pub fn commit(&mut self, replica: &mut Replica<'_>, counters: &Counters<'_>) {
        let Feed::Kernel(kernel) = self else { return };
        let Some(committer) = &mut kernel.committer else { return };
        for _ in 0..COMMIT_PER_PASS {
            let Some(commit) = replica.poll_commit() else { break };
            commit_one(committer, replica, counters, &commit);
        }
        flush(committer, counters);
    }
}

impl KernelFeed {
    fn ingest(
        &mut self,
        now: Time,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) -> Result<(), KernelError> {
        self.local.follow(self.addresses);
        let local = &self.local;
        if self.drain_at.reached(now) {
            let drained = self.source.drain(INGEST_PER_PASS, &mut |event| match &event {
                SourceEvent::Seen { connection, .. } if local.is_local(connection) => {
                    counters.count(Counter::SourceLocal);
                }
                // Somebody removed an entry that we keep for its active: it is written again.
                SourceEvent::Gone { original } if replica.is_living_copy(original).is_some() => {
                    replica.recommit(original);
                }
                _ => replica.handle_source(now, &event),
            });
            counters.add(Counter::SourceRejected, drained.malformed as u64);
            self.drain_at = if drained.more {
                now
            } else if drained.taken > 0 || self.dump == Dump::Running {
                // The first after silence was read at once; what follows it comes in batches.
                now.after(BATCH_PAUSE)
            } else {
                Time::NEVER
            };
        }
        if self.overruns_at.reached(now) {
            self.overruns_at = now.after(OVERRUN_PERIOD);
            let overruns = self.source.overruns();
            if overruns != self.overruns {
                counters.add(Counter::SourceOverruns, overruns.wrapping_sub(self.overruns) as u64);
                self.overruns = overruns;
                self.dump = Dump::Wanted;
            }
        }
        self.dump(now, replica, counters)
    }

    fn dump(
        &mut self,
        now: Time,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) -> Result<(), KernelError> {
        match self.dump {
            Dump::Done => return Ok(()),
            Dump::Wanted => {
                if !self.dump_at.reached(now) {
                    self.drain_at = self.drain_at.min(self.dump_at);
                    return Ok(());
                }
                match self.source.start_dump() {
                    Ok(true) => {
                        counters.count(Counter::SourceDumps);
                        self.dump = Dump::Running;
                    }
                    Ok(false) => {}
                    Err(e) => {
                        log::warn!("{e}; it is tried again");
                        self.dump_at = now.after(OVERRUN_PERIOD);
                        return Ok(());
                    }
                }
            }
            Dump::Running => {}
        }
        let (local, timeouts) = (&self.local, &self.timeouts);
        let progress = self.source.drain_dump(DUMP_PER_PASS, &mut |event| match &event {
            SourceEvent::Seen { connection, .. } if local.is_local(connection) => {
                counters.count(Counter::SourceLocal);
            }
            // An entry that we committed is in the dump as well: it says nothing about traffic.
            SourceEvent::Seen { connection, .. } if replica.is_copy(&connection.original) => {}
            // One with a longer timeout than the kernel gives was committed, by a run before this one, and
            // has seen no packet here since: not ours, and its active may have closed it long ago.
            SourceEvent::Seen { connection, known }
                if known & groups::TIMEOUT != 0 && connection.state.timeout_s > timeouts.of(connection) =>
            {
                counters.count(Counter::SourceLeftovers);
            }
            _ => replica.handle_source(now, &event),
        });
        counters.add(Counter::SourceRejected, progress.malformed as u64);
        match progress.state {
            DumpState::Running => self.drain_at = self.drain_at.min(now.after(BATCH_PAUSE)),
            DumpState::Done => self.dump = Dump::Done,
            DumpState::Failed(errno) => {
                log::warn!("reading the kernel's table broke off (errno {errno}); it begins again");
                self.dump = Dump::Wanted;
                self.dump_at = now.after(OVERRUN_PERIOD);
                self.drain_at = self.drain_at.min(self.dump_at);
            }
        }
        Ok(())
    }

    /// Watches the socket again if it was drained.
    pub fn watch(&self, port: &mut Port<'_>) -> bool {
        let idle = self.drain_at == Time::NEVER;
        if idle {
            port.watch(self.source.fd().as_raw_fd(), EVENTS_KEY);
        }
        idle
    }
}

fn commit_one(committer: &mut Committer, replica: &Replica<'_>, counters: &Counters<'_>, commit: &Commit) {
    // Twice at most: an empty batch takes everything.
    for _ in 0..2 {
        let taken = match commit {
            Commit::Write { slot, generation } | Commit::Refresh { slot, generation } => {
                let line = replica.table().line(*slot);
                let lifetime = match (line.kind(), commit) {
                    _ if line.generation() != *generation => return,
                    (Kind::Backup, _) => Lifetime::Kept,
                    (Kind::Active, Commit::Refresh { .. }) => Lifetime::Normal,
                    _ => return, // Ours by now: the kernel knows it better.
                };
                committer.write(&replica.table().connection(*slot), lifetime)
            }
            Commit::Delete { original } => committer.delete(original),
        };
        if taken.is_ok() {
            return;
        }
        flush(committer, counters);
    }
}

fn flush(committer: &mut Committer, counters: &Counters<'_>) {
    if committer.pending() == 0 {
        return;
    }
    committer.flush(&mut |result: CommitResult| {
        counters.count(match result.outcome {
            Outcome::Written => Counter::Commits,
            Outcome::Removed => Counter::CommitDeletes,
            Outcome::Clash => Counter::CommitClashes,
            Outcome::NoRoom | Outcome::Failed(_) => Counter::CommitErrors,
        });
    });
}
