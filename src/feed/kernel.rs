//! The kernel's conntrack, as a shard reads and writes it.
//!
//! Waking up per event is what costs: under load events are drained in batches a millisecond apart,
//! at once when a single one arrives after silence.

use std::time::Duration;

use super::admission::admits;
use super::asking::{BATCH_PAUSE, CHECK_PERIOD};
use super::claims::Told;
use super::leaving::Leaving;
use super::repair::Repair;
use super::shifts::Shifts;
use super::verify::Verify;
use super::writer::EntryWriter;
use crate::conn::Tuple;
use crate::conntrack::codec::{Origin, status};
use crate::conntrack::commit::Committer;
use crate::conntrack::entries::{Entries, NetlinkEntries};
use crate::conntrack::events::Source;
use crate::conntrack::local::{LocalAddresses, LocalView};
use crate::conntrack::queue::{NetlinkQueue, Queue};
use crate::counters::{Counter, Counters};
use crate::limits::{COMMIT_PER_PASS, INGEST_PER_PASS};
use crate::net::Port;
use crate::rules::Rules;
use crate::source::{CommitMode, End, SourceEvent};
use crate::sync::Replica;
use crate::time::Time;

/// After a pause of this length between two passes the kernel's events are read although nothing
/// told that there are any.
const STANDSTILL: Duration = Duration::from_millis(50);
/// The shortest time in which lost events count.
const LOST_FOR: Duration = Duration::from_secs(1);
/// Events are taken for late if they may be older than this.
const LATE_MIN: Duration = Duration::from_millis(250);
/// The longest time that a dump, or the deletion of entries, is put off because events wait that
/// are older.
const BEHIND_MAX: Duration = Duration::from_secs(1);
/// The longest time that lost events keep this member from taking copies. The dump that makes up
/// for them comes to 256 entries a pass: that of a very large table, or of a busy shard, lasts
/// longer, and then copies are taken before it is read.
const UNREAD_MAX: Duration = Duration::from_secs(3);
/// Between two such times at least: who loses events all the time still takes copies.
const UNREAD_PAUSE: Duration = Duration::from_secs(10);
/// The kernel's timeouts that are read again each time: all of them within a second.
const TIMEOUTS_PER_CHECK: usize = 4;
/// The watch key of the kernel's events: of [`Source::fd`](crate::conntrack::events::Source::fd).
pub const EVENTS_KEY: u64 = 1;

/// What a shard's end of the kernel is made of.
pub struct KernelParts<Q = NetlinkQueue, E = NetlinkEntries> {
    /// Where events come from.
    pub source: Source<Q>,
    /// How entries are written and asked for.
    pub committer: Committer<E>,
    /// This host's addresses.
    pub addresses: &'static LocalAddresses,
    /// What is copied.
    pub rules: Rules,
    /// When copies are written.
    pub commit: CommitMode,
    /// Whether connections may exist that raise no events, because they were born while nobody
    /// listened.
    pub may_be_unheard: bool,
    /// How long the walk takes that checks the kernel's entries of copies; zero: there is none.
    /// Only where copies are written at once.
    pub verify: Duration,
    /// The table was not empty at the start: this process goes on with what an earlier one held.
    pub resumed: bool,
    /// Slots of the shard.
    pub capacity: u32,
}

/// A shard's end of the kernel, or of what takes its place in the simulator.
pub struct KernelFeed<Q = NetlinkQueue, E = NetlinkEntries> {
    source: Source<Q>,
    addresses: &'static LocalAddresses,
    local: LocalView,
    rules: Rules,
    commit: CommitMode,
    /// When to drain; `NEVER` while the socket is watched.
    drain_at: Time,
    /// When the last pass was made.
    passed_at: Time,
    /// All that the kernel had to tell by then was read.
    heard_until: Time,
    overruns: u32,
    /// When it was last noticed that events were lost.
    lost_at: Time,
    /// While events wait that are older than an overrun, the dump that makes up for it is put off,
    /// until this time at most: what it shows must not be taken back by those events.
    behind_until: Option<Time>,
    /// Copies are taken from then on although lost events are not made up for.
    unread_until: Option<Time>,
    /// When entries are deleted although there is more to hear; `NEVER` if there is not.
    deletes_at: Time,
    check_at: Time,
    repair: Repair,
    verify: Verify,
    shifts: Shifts,
    leaving: Leaving,
    writer: EntryWriter<E>,
}

impl<Q: Queue, E: Entries> KernelFeed<Q, E> {
    /// Listens and writes from now on.
    pub fn new(parts: KernelParts<Q, E>) -> KernelFeed<Q, E> {
        let is_eager = parts.commit == CommitMode::Eager;
        let period = if is_eager { parts.verify } else { Duration::ZERO };
        KernelFeed {
            source: parts.source,
            addresses: parts.addresses,
            local: LocalView::new(),
            rules: parts.rules,
            commit: parts.commit,
            drain_at: Time(0),
            overruns: 0,
            passed_at: Time(0),
            heard_until: Time(0),
            lost_at: Time(0),
            behind_until: None,
            unread_until: None,
            deletes_at: Time::NEVER,
            check_at: Time(0),
            repair: Repair::new(
                parts.capacity,
                parts.may_be_unheard,
                parts.resumed,
                parts.commit,
                parts.committer.timeouts(),
            ),
            verify: Verify::new(parts.capacity, period, parts.resumed && is_eager),
            shifts: Shifts::new(parts.capacity),
            leaving: Leaving::new(),
            writer: EntryWriter::new(parts.committer, parts.capacity),
        }
    }

    /// Whether everything that existed before the start was read.
    pub fn is_complete(&self) -> bool {
        self.repair.is_complete()
    }

    /// Events wait.
    pub fn ready(&mut self, now: Time) {
        self.drain_at = now;
    }

    /// Takes what the source has, up to the cap of a pass. Returns whether that was hit.
    pub fn ingest(
        &mut self,
        now: Time,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) -> bool {
        self.local.follow(self.addresses);
        let stood_still = now.since(self.passed_at) > STANDSTILL;
        self.passed_at = now;
        if self.drain_at == Time::NEVER && !stood_still {
            self.heard_until = now; // Watched, and silent.
        } else if stood_still {
            self.drain_at = now; // It may not be known yet that events wait.
        }
        let has_more = self.drain_at.reached(now) && self.drain(now, replica, counters);
        // Where events wait by the thousand they may have been lost: what peers told may come next.
        if has_more || stood_still || self.check_at.reached(now) {
            self.look_for_losses(now, replica, counters);
        }
        if self.check_at.reached(now) {
            self.check(now, replica);
        }
        if !has_more && self.drain_at != now
            || self.behind_until.is_some_and(|until| until.reached(now))
        {
            self.behind_until = None;
        }
        let admission = (&self.rules, &self.local);
        let may_begin = self.behind_until.is_none();
        self.repair.step(
            now,
            may_begin,
            &mut self.source,
            admission,
            (&mut self.shifts, &mut self.leaving),
            replica,
            counters,
        );
        let mut has_address = |reply: &Tuple| self.writer.has_address(now, reply);
        self.leaving.step(now, &mut has_address, replica, counters);
        for (slot, generation) in self.leaving.unsure() {
            self.repair.look_later(*slot, *generation);
        }
        replica.set_source_read(self.is_read(now));
        // What peers told of it meanwhile is still to come.
        if self.repair.is_made_up_for() && self.lost_at.after(LOST_FOR).reached(now) {
            replica.handle_made_up_for();
        }
        has_more
    }

    /// What the kernel had at the start was read, and what events that were lost had told. Until
    /// then an entry may be there of which nobody knows here: the copy of its tuple's former life
    /// would be written over it.
    fn is_read(&self, now: Time) -> bool {
        let is_missing =
            !self.repair.is_made_up_for() && self.unread_until.is_some_and(|until| until > now);
        self.repair.is_read() && !is_missing
    }

    fn drain(&mut self, now: Time, replica: &mut Replica<'_>, counters: &Counters<'_>) -> bool {
        let KernelFeed { source, rules, local, shifts, leaving, writer, commit, .. } = self;
        let cap = INGEST_PER_PASS.min(writer.claims().room());
        // Of copies that are written to the kernel, and of what was taken over: the entry as it is
        // now says what an event about it means.
        let mut ask = |original: &Tuple, told: Told, is_opening: bool, replica: &Replica<'_>| {
            let slot = match told {
                Told::Ended(End::Unseen { .. } | End::Left) => {
                    replica.copy(original).or_else(|| replica.taken_over(original))
                }
                Told::Ended(End::Seen) | Told::Written => replica.copy(original),
                Told::Changed => replica.living_copy(original),
            };
            let slot = slot.filter(|_| *commit == CommitMode::Eager);
            if let Some(slot) = slot {
                writer.claims().ask(slot, replica, told, is_opening);
            }
            slot.is_some()
        };
        // How long ago the oldest event may have been.
        let late = now.since(self.heard_until);
        let late_s = if late > LATE_MIN { late.as_secs() as u32 + 1 } else { 0 };
        // What cannot be asked about yet is not read yet.
        let drained = source.drain(cap, &mut |event, origin| {
            let had_time = match event {
                SourceEvent::Gone { end: End::Unseen { left_s }, .. } => left_s > 0,
                _ => false,
            };
            let event = match event {
                SourceEvent::Gone { original, end } => {
                    SourceEvent::Gone { original, end: end.read_late(late_s) }
                }
                seen => seen,
            };
            match &event {
                SourceEvent::Seen { connection, .. } => {
                    if !admits(now, rules, Some(local), &event, replica, counters) {
                        return;
                    }
                    if connection.state.status & status::OFFLOADED != 0 {
                        counters.count(Counter::SourceOffloaded);
                    }
                    leaving.begins(now, &connection.original, replica);
                    let told =
                        if origin == Origin::Program { Told::Written } else { Told::Changed };
                    if ask(&connection.original, told, connection.is_opening(), replica)
                        || told == Told::Written && replica.handle_written(&connection.original)
                    {
                        return;
                    }
                }
                SourceEvent::Gone { original, end } => {
                    if ask(original, Told::Ended(*end), false, replica) {
                        return;
                    }
                    // Somebody removed an entry that we keep for its active: it is written again.
                    if let Some(slot) = replica.living_copy(original) {
                        return replica.recommit(now, slot);
                    }
                    // (Not what a program deleted, nor what has run out.)
                    if had_time
                        && let End::Unseen { left_s } = *end
                        && origin == Origin::Kernel
                        && *commit == CommitMode::Eager
                        && leaving.ended(original, left_s, replica)
                    {
                        return;
                    }
                }
            }
            replica.handle_source(now, &event);
            if let SourceEvent::Seen { connection, .. } = &event {
                shifts.saw(now, connection, replica);
            }
        });
        while let Some(original) = source.next_expecting() {
            shifts.expected(now, &original, replica);
        }
        counters.add(Counter::SourceRejected, drained.malformed as u64);
        counters.add(Counter::SourceErrors, drained.failed as u64);
        counters.add(Counter::SourceSkipped, drained.skipped as u64);
        counters.add(Counter::SourceExpectations, drained.expectations as u64);
        if !drained.more {
            self.heard_until = now;
        }
        self.drain_at = if drained.more {
            now
        } else if drained.taken > 0 {
            // The first after silence was read at once; what follows it comes in batches.
            now.after(BATCH_PAUSE)
        } else {
            Time::NEVER
        };
        drained.more
    }

    /// Whether events were lost: one system call.
    fn look_for_losses(&mut self, now: Time, replica: &mut Replica<'_>, counters: &Counters<'_>) {
        let overruns = self.source.overruns();
        if overruns != self.overruns {
            counters.add(Counter::SourceOverruns, overruns.wrapping_sub(self.overruns) as u64);
            self.overruns = overruns;
            self.lost_at = now;
            replica.handle_lost();
            self.repair.want();
            self.behind_until = Some(now.after(BEHIND_MAX));
            if self.unread_until.is_none_or(|until| until.after(UNREAD_PAUSE).reached(now)) {
                self.unread_until = Some(now.after(UNREAD_MAX));
            }
            self.drain_at = now;
        }
    }

    /// What timeouts the kernel gives, and whether its table has room for copies.
    fn check(&mut self, now: Time, replica: &mut Replica<'_>) {
        self.check_at = now.after(CHECK_PERIOD);
        let timeouts = self.writer.read_timeouts_again(TIMEOUTS_PER_CHECK);
        self.repair.set_timeouts(timeouts);
        replica.set_longest_timeout(timeouts.longest_tcp_s());
        if self.commit == CommitMode::Eager {
            replica.set_kernel_room(self.writer.has_room());
        }
    }

    /// When to look by itself.
    pub fn wake_at(&self, now: Time) -> Time {
        let at = if self.drain_at == Time::NEVER { self.check_at } else { self.drain_at };
        at.min(self.repair.wake_at(now))
            .min(self.verify.wake_at(now))
            .min(self.shifts.wake_at())
            .min(self.leaving.wake_at())
    }

    /// Writes up to a pass's share of commits, and asks what is to be asked.
    pub fn commit(&mut self, now: Time, replica: &mut Replica<'_>, counters: &Counters<'_>) {
        // What traffic asks for comes first: the walk has time.
        let has_room = replica.commits_waiting() < COMMIT_PER_PASS / 2;
        let has_time = self.drain_at != now && self.repair.is_idle() && has_room;
        self.verify.step(now, has_time);
        let may_delete = self.may_delete(now, replica, counters);
        let KernelFeed { source, writer, repair, verify, shifts, leaving, .. } = self;
        writer.write((now, may_delete), repair, verify, (shifts, leaving), replica, counters);
        writer.deleted().iter().for_each(|original| source.deleted(original));
    }

    /// An entry is deleted by its tuple, and may be another connection's by now: what the source
    /// has to tell until now is heard before. A source that always has more is not waited for.
    fn may_delete(
        &mut self,
        now: Time,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) -> bool {
        let has_more = replica.has_deletes() && self.drain(now, replica, counters);
        if !has_more {
            self.deletes_at = Time::NEVER;
            return true;
        }
        self.deletes_at = self.deletes_at.min(now.after(BEHIND_MAX));
        self.deletes_at.reached(now)
    }

    /// Whether the queue was drained, so that the next event is waited for.
    pub fn is_drained(&self) -> bool {
        self.drain_at == Time::NEVER
    }

    /// Watches the socket again if it was drained.
    pub fn watch(&self, port: &mut Port<'_>) -> bool {
        if self.is_drained() {
            port.watch(EVENTS_KEY);
        }
        self.is_drained()
    }
}
