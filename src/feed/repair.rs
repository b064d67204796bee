//! Repair: what events did not tell.
//!
//! Events are lost when too many wait, and connections that were born while nobody listened never
//! raise any. A **dump** of the kernel's table finds the connections that are missing here; a
//! **sweep** over our own table finds those that the dump did not show. A dump walks the table
//! while it changes, so what it did not show may be there all the same: each is **looked up**
//! before anything is believed. The same look-ups follow, once a minute, connections that raise no
//! events, or may raise none: what a dump found, a copy whose entry was there before it is written,
//! and what goes on in another slot because packets were found to pass; and what had
//! [ended](super::ended) may go on unheard as well.
//!
//! **After a warm restart** the table is there and nobody listened for a while: connections have
//! changed, closed and begun. So the first dump is followed by a sweep as well, and the source
//! counts as read to its end when all the look-ups of that are answered. Entries that only we
//! write, of connections that the table does not have, are deletes that the earlier process owed:
//! they are made up for. What is a copy, or was taken over without traffic, is no business of that
//! sweep: `verify` walks over all of those then, at once.
//!
//! Dumps are a repair: after the one at the start, which finds what was there before, there is none
//! unless events were lost, or that one found [leftovers](super::leftovers). They are counted
//! (`source_dumps`).

use std::collections::VecDeque;
use std::fmt::Display;
use std::time::Duration;

use super::admission::admits;
use super::asking::{BATCH_PAUSE, CHECK_PERIOD, LOOKS_MAX, told_by_answer};
use super::ended::Ended;
use super::leaving::Leaving;
use super::leftovers::{LeftoverStep, Leftovers, is_leftover};
use super::shifts::Shifts;
use crate::conn::slot::groups;
use crate::conn::{Connection, Generation, Kind, Phase, Tuple};
use crate::conntrack::codec::{GIVEN_MAX_S, TCP_ESTABLISHED};
use crate::conntrack::commit::{KEPT_TIMEOUT_S, is_touched};
use crate::conntrack::dump::DumpState;
use crate::conntrack::events::Source;
use crate::conntrack::local::LocalView;
use crate::conntrack::queue::Queue;
use crate::conntrack::timeouts::Timeouts;
use crate::counters::{Counter, Counters};
use crate::rules::Rules;
use crate::source::{CommitMode, End, SourceEvent};
use crate::sync::{REWRITE_PERIOD, Replica};
use crate::time::Time;

/// Entries of a dump in one pass: well below two milliseconds.
const DUMP_PER_PASS: usize = 256;
/// Slots that one pass of a sweep looks at.
const SWEEP_PER_PASS: u32 = 4096;
/// Pause between two dumps.
const DUMP_PAUSE: Duration = Duration::from_millis(500);
const _: () = assert!(REWRITE_PERIOD.as_secs() as u32 * 2 < KEPT_TIMEOUT_S - GIVEN_MAX_S);

/// How long it takes to look up every connection that raises no events.
const UNHEARD_PERIOD: Duration = Duration::from_secs(60);
/// The first round after the start, and each further one takes twice as long: those that were found
/// in the middle of opening or closing are asked for soon, as their state goes on without an event.
const UNHEARD_FIRST: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, Eq)]
enum RepairStage {
    Wanted,
    Dumping,
    /// The sweep has come to this slot.
    Sweeping(u32),
    Idle,
}

/// What a shard does about missed events.
pub(super) struct Repair {
    stage: RepairStage,
    /// More events were lost since the dump under way began.
    again: bool,
    /// The dump at the start is done.
    read: bool,
    /// The dump at the start is done, and after a warm restart the sweep behind it as well.
    complete: bool,
    /// The table was not empty at the start.
    resumed: bool,
    /// The sweep after a warm restart has asked for everything.
    swept: bool,
    leftovers: Leftovers,
    ended: Ended,
    /// The dump that is wanted, or under way, is for leftovers that were aged.
    looks_back: bool,
    /// When a dump may begin.
    dump_at: Time,
    /// It was said that a dump cannot be made.
    complained: bool,
    /// Slots whose connection the dump has shown, as bits.
    shown: Vec<u64>,
    /// Slots whose connection raises no events, as bits; empty if there can be none.
    unheard: Vec<u64>,
    unheard_slot: u32,
    unheard_at: Time,
    unheard_period: Duration,
    looks: VecDeque<(u32, Generation)>,
    capacity: u32,
    commit: CommitMode,
    timeouts: Timeouts,
}

impl Repair {
    pub(super) fn new(
        capacity: u32,
        may_be_unheard: bool,
        resumed: bool,
        commit: CommitMode,
        timeouts: &Timeouts,
    ) -> Repair {
        let words = capacity.div_ceil(64) as usize;
        Repair {
            stage: RepairStage::Wanted,
            again: false,
            read: false,
            complete: false,
            resumed,
            swept: false,
            leftovers: Leftovers::new(),
            ended: Ended::new(),
            looks_back: false,
            dump_at: Time(0),
            complained: false,
            shown: vec![0; words],
            unheard: vec![0; if may_be_unheard { words } else { 0 }],
            unheard_slot: 0,
            unheard_at: if may_be_unheard { Time(0) } else { Time::NEVER },
            unheard_period: UNHEARD_FIRST,
            looks: VecDeque::with_capacity(LOOKS_MAX),
            capacity,
            commit,
            timeouts: *timeouts,
        }
    }

    /// The kernel's timeouts are these now.
    pub(super) fn set_timeouts(&mut self, timeouts: &Timeouts) {
        self.timeouts = *timeouts;
    }

    /// What was there before the start was read.
    pub(super) fn is_read(&self) -> bool {
        self.read
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.complete && self.stage == RepairStage::Idle && self.looks.is_empty()
    }

    /// What lost events told is found out: no dump is wanted or under way.
    pub(super) fn is_made_up_for(&self) -> bool {
        !matches!(self.stage, RepairStage::Wanted | RepairStage::Dumping)
    }

    /// The table was taken over from an earlier process, and not all of what that one may have
    /// missed is known yet.
    fn is_resuming(&self) -> bool {
        self.resumed && !self.complete
    }

    /// Events were lost.
    pub(super) fn want(&mut self) {
        match self.stage {
            RepairStage::Wanted if self.looks_back => self.looks_back = false,
            RepairStage::Idle => self.stage = RepairStage::Wanted,
            RepairStage::Wanted => {}
            RepairStage::Dumping | RepairStage::Sweeping(_) => self.again = true,
        }
    }

    /// When [`step`](Self::step) has something to do.
    pub(super) fn wake_at(&self, now: Time) -> Time {
        let at = match self.stage {
            RepairStage::Wanted => self.dump_at.max(now.after(BATCH_PAUSE)),
            RepairStage::Dumping | RepairStage::Sweeping(_) => now.after(BATCH_PAUSE),
            RepairStage::Idle
                if !self.looks.is_empty() || !self.leftovers.is_empty() || !self.complete =>
            {
                now.after(BATCH_PAUSE)
            }
            RepairStage::Idle => self.leftovers.look_back_at(),
        };
        at.min(self.unheard_at).min(self.ended.wake_at(now))
    }

    /// Goes on with whatever is under way. A dump begins only if it `may`: what was told before it
    /// has been read.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn step<Q: Queue>(
        &mut self,
        now: Time,
        may_begin: bool,
        source: &mut Source<Q>,
        (rules, local): (&Rules, &LocalView),
        (shifts, leaving): (&mut Shifts, &mut Leaving),
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) {
        if self.unheard_at.reached(now) {
            self.ask_for_the_unheard(now, replica);
        }
        self.complete |= self.swept && self.looks.is_empty();
        if self.stage == RepairStage::Idle && self.leftovers.look_back_at().reached(now) {
            self.leftovers.look_back(now);
            (self.stage, self.looks_back) = (RepairStage::Wanted, true);
        }
        match self.stage {
            RepairStage::Wanted if may_begin && self.dump_at.reached(now) => {
                match source.start_dump() {
                    Ok(true) => {
                        counters.count(Counter::SourceDumps);
                        self.shown.fill(0);
                        self.again = false;
                        self.stage = RepairStage::Dumping;
                        self.dump(
                            now,
                            source,
                            (rules, local),
                            (shifts, leaving),
                            replica,
                            counters,
                        );
                    }
                    Ok(false) => unreachable!("a dump that runs has its own stage"),
                    Err(e) => {
                        counters.count(Counter::SourceDumpsFailed);
                        self.complain(&e);
                        self.dump_at = now.after(CHECK_PERIOD);
                    }
                }
            }
            RepairStage::Dumping => {
                self.dump(now, source, (rules, local), (shifts, leaving), replica, counters)
            }
            RepairStage::Sweeping(slot) => self.sweep(now, slot, replica),
            RepairStage::Wanted | RepairStage::Idle => {}
        }
    }

    fn dump<Q: Queue>(
        &mut self,
        now: Time,
        source: &mut Source<Q>,
        (rules, local): (&Rules, &LocalView),
        (shifts, leaving): (&mut Shifts, &mut Leaving),
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) {
        let is_resuming = self.is_resuming();
        let is_at_the_start = !self.complete;
        let Repair { shown, unheard, timeouts, leftovers, ended, looks_back, commit, .. } = self;
        let progress = source.drain_dump(DUMP_PER_PASS, &mut |event| {
            let SourceEvent::Seen { connection, known } = &event else { return };
            if !admits(now, rules, Some(local), &event, replica, counters) {
                return;
            }
            if is_at_the_start && !unheard.is_empty() {
                ended.note(connection, counters);
            }
            leaving.begins(now, &connection.original, replica);
            let mut known_here = replica.table().find_original(&connection.original);
            if known_here.is_some_and(|slot| takes_the_place_of(connection, slot, replica)) {
                give_place(now, &connection.original, replica);
                known_here = replica.table().find_original(&connection.original);
            }
            match known_here {
                Some(slot) => {
                    set(shown, slot);
                    shifts.note(now, slot, connection);
                    // An entry that we committed is in the dump as well: it says nothing about
                    // traffic.
                    if !replica.is_no_news(slot) {
                        replica.handle_source(now, &event);
                    }
                    if is_resuming {
                        mark_unheard(unheard, &connection.original, replica);
                    }
                }
                // It was read before it ended here.
                None if replica.deletes(&connection.original) => {}
                // Not ours, and its active may have closed it long ago.
                None if known & groups::TIMEOUT != 0 && is_leftover(timeouts, connection) => {
                    // What the process before had no time to remove goes; what a run left whose
                    // table is no more may have traffic that is yet to come.
                    let step = match is_resuming && *commit == CommitMode::Eager {
                        true => LeftoverStep::Look,
                        false => LeftoverStep::Age,
                    };
                    leftovers.found(connection, step, counters);
                }
                None if *looks_back && leftovers.may_be_silent(now, timeouts, connection) => {}
                None => {
                    replica.handle_source(now, &event);
                    if let Some(slot) = replica.table().find_original(&connection.original) {
                        set(shown, slot);
                        shifts.note(now, slot, connection);
                    }
                    // No event has told of it.
                    mark_unheard(unheard, &connection.original, replica);
                }
            }
        });
        counters.add(Counter::SourceRejected, progress.malformed as u64);
        counters.add(Counter::SourceSkipped, progress.skipped as u64);
        match progress.state {
            DumpState::Running => {}
            DumpState::Done => {
                self.complained = false;
                self.dumped(now);
            }
            DumpState::Failed(errno) => {
                counters.count(Counter::SourceDumpsFailed);
                self.complain(&format_args!(
                    "reading the kernel's table broke off (errno {errno})"
                ));
                self.stage = RepairStage::Wanted;
                self.dump_at = now.after(CHECK_PERIOD);
            }
        }
    }

    /// A dump is complete.
    fn dumped(&mut self, now: Time) {
        self.read = true;
        let is_first = !self.complete && !self.resumed;
        self.complete |= is_first;
        let looked_back = std::mem::take(&mut self.looks_back);
        self.stage = if self.again {
            // What was lost meanwhile this dump may have passed before.
            self.dump_at = now.after(DUMP_PAUSE);
            RepairStage::Wanted
        } else if is_first || looked_back {
            // It found an empty table: nothing can be in it that is gone. Or nothing was lost.
            RepairStage::Idle
        } else {
            RepairStage::Sweeping(0)
        };
    }

    /// Says once why a dump cannot be made, until one can.
    fn complain(&mut self, why: &dyn Display) {
        if !std::mem::replace(&mut self.complained, true) {
            log::warn!("{why}; it is tried again");
        }
    }

    /// Connections that should be in the kernel and that the dump did not show are looked up.
    fn sweep(&mut self, now: Time, from: u32, replica: &Replica<'_>) {
        let end = (from + SWEEP_PER_PASS).min(self.capacity);
        let mut slot = from;
        while slot < end && self.looks.len() < LOOKS_MAX {
            let line = replica.table().line(slot);
            let is_shown =
                is_set(&self.shown, slot) || self.is_resuming() && replica.is_unclaimed(slot);
            if !is_shown && self.belongs_in_the_kernel(slot, line.kind(), replica) {
                self.looks.push_back((slot, line.generation()));
            }
            slot += 1;
        }
        self.swept |= slot == self.capacity;
        self.stage = match slot == self.capacity {
            false => RepairStage::Sweeping(slot),
            true if self.again => {
                self.dump_at = now.after(DUMP_PAUSE);
                RepairStage::Wanted
            }
            true => RepairStage::Idle,
        };
    }

    fn belongs_in_the_kernel(&self, slot: u32, kind: Kind, replica: &Replica<'_>) -> bool {
        match kind {
            Kind::Held => true,
            // What was only presumed is in the kernel if it was written there.
            Kind::Active => self.commit != CommitMode::Off || !replica.is_unclaimed(slot),
            Kind::Backup => self.commit == CommitMode::Eager && replica.is_living_copy(slot),
            Kind::Free | Kind::Leased | Kind::Closing => false,
        }
    }

    fn ask_for_the_unheard(&mut self, now: Time, replica: &Replica<'_>) {
        let end = (self.unheard_slot + SWEEP_PER_PASS).min(self.capacity);
        let pause = self.unheard_period / self.capacity.div_ceil(SWEEP_PER_PASS);
        while self.unheard_slot < end {
            if self.looks.len() == LOOKS_MAX {
                // It goes on here as soon as some are answered.
                self.unheard_at = now.after(BATCH_PAUSE);
                return;
            }
            let slot = self.unheard_slot;
            self.unheard_slot += 1;
            if is_set(&self.unheard, slot) {
                let line = replica.table().line(slot);
                let stands = matches!(line.state().tcp_state, 0 | TCP_ESTABLISHED);
                match line.kind() {
                    Kind::Held | Kind::Active if stands && self.unheard_period < UNHEARD_PERIOD => {
                    }
                    Kind::Held | Kind::Active => self.looks.push_back((slot, line.generation())),
                    Kind::Backup => {} // Should it become ours, it raises no events either.
                    _ => self.unheard[slot as usize / 64] &= !(1 << (slot % 64)),
                }
            }
        }
        self.unheard_slot = end;
        if end == self.capacity {
            self.unheard_slot = 0;
            if self.complete {
                self.unheard_period = (self.unheard_period * 2).min(UNHEARD_PERIOD);
            }
        }
        self.unheard_at = now.after(pause);
    }

    /// The entry of the connection in this slot was there before the connection, or its copy, had
    /// this slot: whether it raises events is not known.
    pub(super) fn may_be_unheard(&mut self, slot: u32) {
        if !self.unheard.is_empty() {
            set(&mut self.unheard, slot);
        }
    }

    /// Look-ups waiting.
    pub(super) fn looks_waiting(&self) -> usize {
        self.looks.len()
    }

    /// A look-up could not be made just now.
    pub(super) fn look_later(&mut self, slot: u32, generation: Generation) {
        self.looks.push_back((slot, generation));
    }

    /// The next look-up whose slot still is in the same life.
    pub(super) fn next_look(&mut self, replica: &Replica<'_>) -> Option<(u32, Generation)> {
        while let Some((slot, generation)) = self.looks.pop_front() {
            let line = replica.table().line(slot);
            if line.generation() == generation && line.kind().is_connection() {
                return Some((slot, generation));
            }
        }
        None
    }

    /// Closed connections that may go on unheard.
    pub(super) fn ended(&mut self) -> &mut Ended {
        &mut self.ended
    }

    /// The entry of such a one, as it is now. Whether the tuple's next connection goes on with it.
    pub(super) fn found_ended(
        &mut self,
        now: Time,
        original: &Tuple,
        there: Option<&Connection>,
        replica: &mut Replica<'_>,
    ) -> bool {
        if there.is_some_and(|there| there.phase() == Phase::Over) || !self.ended.take(original) {
            return false;
        }
        let next = there.filter(|there| is_touched(there));
        if let Some(next) = next {
            self.found_instead(now, next, replica);
        }
        next.is_some()
    }

    /// Entries that an earlier process left.
    pub(super) fn leftovers(&mut self) -> &mut Leftovers {
        &mut self.leftovers
    }

    /// Such an entry is still there: it goes, if no packet has passed it.
    pub(super) fn found_leftover(&mut self, there: &Connection, counters: &Counters<'_>) {
        if is_leftover(&self.timeouts, there) {
            self.leftovers.remove(there, LeftoverStep::Remove, counters);
        }
    }

    /// An entry was in the way of what was a copy, or of what is contested here, and packets had
    /// passed it: it is a connection of its own, of which no event may tell.
    pub(super) fn found_besides(
        &mut self,
        now: Time,
        there: &Connection,
        replica: &mut Replica<'_>,
    ) {
        match replica.table().find_original(&there.original) {
            Some(slot) if takes_the_place_of(there, slot, replica) => {
                give_place(now, &there.original, replica);
            }
            Some(_) => return,
            None if there.phase() == Phase::Over => return,
            None => {}
        }
        self.found_instead(now, there, replica);
    }

    /// The kernel has this connection, which has not ended, in place of one with the same original
    /// tuple.
    pub(super) fn found_instead(
        &mut self,
        now: Time,
        there: &Connection,
        replica: &mut Replica<'_>,
    ) {
        replica.handle_source(now, &SourceEvent::seen(*there));
        mark_unheard(&mut self.unheard, &there.original, replica);
    }

    /// The answer to a look-up.
    pub(super) fn found(
        &mut self,
        now: Time,
        (slot, generation): (u32, Generation),
        there: Option<&Connection>,
        leaving: &mut Leaving,
        replica: &mut Replica<'_>,
    ) {
        if replica.table().line(slot).generation() != generation {
            return;
        }
        let original = replica.table().tuples(slot).0;
        match there {
            None if replica.is_living_copy(slot) => replica.recommit(now, slot),
            None if leaving.ended(&original, 0, replica) => {}
            None => replica.handle_source(now, &SourceEvent::Gone { original, end: End::UNTOLD }),
            Some(_) if replica.is_no_news(slot) => {}
            Some(connection) => {
                let known = groups::MARK | told_by_answer(slot, connection, replica);
                replica.handle_source(now, &SourceEvent::Seen { connection: *connection, known });
                if self.is_resuming() {
                    mark_unheard(&mut self.unheard, &original, replica);
                }
            }
        }
    }
}

/// Whether the entry that is there is another connection's than what is contested here, or was
/// taken over, or has a silent active, in this slot: in another translation, and packets have
/// passed it.
fn takes_the_place_of(there: &Connection, slot: u32, replica: &Replica<'_>) -> bool {
    !replica.is_living_copy(slot)
        && replica.is_no_news(slot)
        && there.reply != replica.table().tuples(slot).1
        && is_touched(there)
        && there.phase() != Phase::Over
}

/// This kernel has the connection no more whose place another one has taken.
fn give_place(now: Time, original: &Tuple, replica: &mut Replica<'_>) {
    replica.handle_source(now, &SourceEvent::Gone { original: *original, end: End::UNTOLD });
}

/// The connection with this tuple may raise no events. (Another slot may have it by now than the
/// one that was looked up.)
fn mark_unheard(unheard: &mut [u64], original: &Tuple, replica: &Replica<'_>) {
    if let Some(slot) = replica.table().find_original(original)
        && !unheard.is_empty()
    {
        set(unheard, slot);
    }
}

fn set(bits: &mut [u64], slot: u32) {
    bits[slot as usize / 64] |= 1 << (slot % 64);
}

fn is_set(bits: &[u64], slot: u32) -> bool {
    bits[slot as usize / 64] >> (slot % 64) & 1 == 1
}

#[cfg(test)]
#[path = "repair_tests.rs"]
mod tests;
