//! Verify: a walk that asks the kernel for the entry of every copy whose active lives.
//!
//! Everything else here goes by what was done: an entry was written, and no event said that it went
//! away. This goes by what is there. Slowly, once a period over the whole table, each copy's entry
//! is asked for and compared: is it there, does it translate as the copy says, are status, mark,
//! labels and TCP state those of the copy, and will it last until the next walk? What is not so is
//! written again and counted.
//!
//! **What may be somebody else's.** An entry with the copy's original tuple and another translation
//! may be a connection that this kernel opened itself, whose event was lost. Destroying it would
//! break whoever uses it, so it must first be dead weight: either it has the long timeout that only
//! we give and that any packet puts back, or its timeout has done nothing but run down since the
//! walk before. If packets pass it, it stays and is counted; its next event decides, as ever.
//!
//! **A TCP state that a packet gave**, to an entry that was written since, is news that no event
//! told: it is taken like one. Such an entry was there before anybody listened, and may be another
//! connection's by now.
//!
//! **A timeout that a packet gave** says, more often than not, that the copy's traffic is here now:
//! an established connection that moves raises no event. It is counted and no claim. Where the two
//! directions of a connection take different gateways it is the same at both of them, for ever, and
//! each walk would turn the pair around; an entry that was written while the active was silent has
//! such a timeout too. It is left so: should its active lose the connection, that packets passed
//! here is what keeps it. If it runs out, its DESTROY is the copy's loss, and it is written again.
//!
//! **Cost.** A step asks for 32 entries at most, steps are 16 ms apart at least, and one waits
//! while traffic keeps the shard busy: then, or with a table too large for its period, a walk takes
//! longer.
//!
//! **After a warm restart** the first walk goes over everything of which the kernel's entry says
//! nothing about traffic (also what was taken over, and copies whose active is not heard yet), and
//! fast: what waited to be written in the process before is lost.

use std::collections::VecDeque;
use std::time::Duration;

use super::asking::{BATCH_PAUSE, told_by_answer};
use crate::conn::extra::parts;
use crate::conn::slot::groups;
use crate::conn::table::{On, Written};
use crate::conn::tuple::GRE;
use crate::conn::{Connection, Generation, Kind, Tuple};
use crate::conntrack::codec::{GIVEN_MAX_S, status};
use crate::conntrack::commit::translates;
use crate::counters::{Counter, Counters};
use crate::limits::COMMIT_PER_PASS;
use crate::logging::Sparse;
use crate::source::SourceEvent;
use crate::sync::Replica;
use crate::time::Time;

/// Entries that a step asks for at most.
const LOOKS_PER_STEP: u32 = COMMIT_PER_PASS as u32;
/// The least pause between two steps: 2000 entries a second.
const PAUSE_MIN: Duration = Duration::from_millis(16);
/// The pause between two steps after a warm restart: 8000 entries a second.
const PAUSE_RESUMED: Duration = Duration::from_millis(4);
/// Slots that a step after a warm restart looks at.
const STEP_RESUMED: u32 = 4096;
/// Timeouts are told in whole seconds. One that is further than so many from where it would be
/// without a packet was put there by one: a shorter one too, of a state in which things end.
const MARGIN_S: u64 = 2;
/// Entries of other connections remembered from one walk to the next.
const SUSPECTS_MAX: usize = 1024;
/// The kernel tells timeouts in whole seconds: over less than this, one that runs down cannot be
/// told from one that a packet has put back.
const SILENCE_MIN: Duration = Duration::from_secs(5);
/// Pause between two lines in the log.
const TELL_PAUSE: Duration = Duration::from_secs(10);

/// What is to be done about a kernel's entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum VerifyResult {
    /// Nothing.
    Same,
    /// It has another value that an update changes.
    Differs(&'static str),
    /// It has another value that no update changes.
    MustGo(&'static str),
    /// Its timeout is a packet's, not ours.
    Touched,
    /// So is its TCP state.
    WentOn,
    /// It is another connection's, and not of our making.
    Foreign,
}

/// An entry of another connection.
#[derive(Clone, Copy)]
struct Suspect {
    slot: u32,
    generation: Generation,
    reply: Tuple,
    timeout_s: u32,
    at: Time,
}

/// A shard's walk.
pub(super) struct Verify {
    capacity: u32,
    period: Duration,
    /// This walk is the first after a warm restart.
    is_resuming: bool,
    /// The next slot, and where the step under way ends.
    slot: u32,
    end: u32,
    looks_left: u32,
    /// When the next step is due.
    at: Time,
    /// Found in the walk before, and in this one.
    suspects_before: Vec<Suspect>,
    suspects: Vec<Suspect>,
    /// What no commit of the protocol's does: entries to be replaced, and those of connections
    /// taken over.
    writes: VecDeque<(u32, Generation)>,
    lines: Sparse,
}

impl Verify {
    /// A walk over `capacity` slots in each `period`; without one (zero) there is only the walk
    /// after a warm restart, if `resumed`.
    pub(super) fn new(capacity: u32, period: Duration, resumed: bool) -> Verify {
        let walks = resumed || !period.is_zero();
        Verify {
            capacity,
            period,
            is_resuming: resumed,
            slot: 0,
            end: 0,
            looks_left: 0,
            at: if walks { Time(0) } else { Time::NEVER },
            suspects_before: Vec::with_capacity(if walks { SUSPECTS_MAX } else { 0 }),
            suspects: Vec::with_capacity(if walks { SUSPECTS_MAX } else { 0 }),
            writes: VecDeque::with_capacity(LOOKS_PER_STEP as usize),
            lines: Sparse::new(TELL_PAUSE),
        }
    }

    /// When [`step`](Self::step) has something to do, or what was found is to be written.
    pub(super) fn wake_at(&self, now: Time) -> Time {
        if self.writes.is_empty() { self.at } else { self.at.min(now.after(BATCH_PAUSE)) }
    }

    /// Slots of a step, and the pause behind it.
    fn pace(&self) -> (u32, Duration) {
        if self.is_resuming {
            return (STEP_RESUMED, PAUSE_RESUMED);
        }
        let capacity = self.capacity as u128;
        let fitting = capacity * PAUSE_MIN.as_nanos() / self.period.as_nanos().max(1) + 1;
        let slots = (fitting.min(capacity) as u32).max(LOOKS_PER_STEP);
        (slots, (self.period * slots / self.capacity).max(PAUSE_MIN))
    }

    /// Begins the next step, if it is due and there is time for it.
    pub(super) fn step(&mut self, now: Time, has_time: bool) {
        if !self.at.reached(now) {
            return;
        }
        if !has_time || !self.writes.is_empty() {
            self.at = now.after(BATCH_PAUSE);
            return;
        }
        let (slots, pause) = self.pace();
        if self.slot == self.end {
            self.end = self.slot.saturating_add(slots).min(self.capacity);
        } // Otherwise the step before had more copies than it might ask for.
        self.looks_left = LOOKS_PER_STEP;
        self.at = now.after(pause);
    }

    /// The next copy whose entry is to be asked for in this step.
    pub(super) fn next_look(
        &mut self,
        now: Time,
        replica: &Replica<'_>,
        counters: &Counters<'_>,
    ) -> Option<(u32, Generation)> {
        while self.looks_left > 0 && self.slot < self.end {
            let slot = self.slot;
            let is_wanted = self.is_wanted(slot, replica);
            self.slot += 1;
            self.looks_left -= is_wanted as u32;
            if self.slot == self.capacity {
                self.walked(now, counters);
            }
            if is_wanted {
                return Some((slot, replica.table().line(slot).generation()));
            }
        }
        None
    }

    /// The last slot was reached.
    fn walked(&mut self, now: Time, counters: &Counters<'_>) {
        counters.count(Counter::VerifyWalks);
        (self.slot, self.end, self.looks_left) = (0, 0, 0);
        std::mem::swap(&mut self.suspects, &mut self.suspects_before);
        self.suspects.clear();
        self.is_resuming = false;
        self.at = if self.period.is_zero() { Time::NEVER } else { now.after(self.pace().1) };
    }

    fn is_wanted(&self, slot: u32, replica: &Replica<'_>) -> bool {
        let table = replica.table();
        let is_of_interest = if self.is_resuming {
            replica.is_unclaimed(slot)
        } else {
            replica.is_living_copy(slot)
        };
        is_of_interest
            // What is left of a copy is being asked about.
            && table.kind(slot) != Kind::Held
            // An older copy of the same name is about to be closed: the entry is the newer one's.
            && table.find_original(&table.tuples(slot).0) == Some(slot)
    }

    /// The next connection whose entry this walk writes itself.
    pub(super) fn next_write(&mut self, replica: &Replica<'_>) -> Option<(u32, Generation)> {
        while let Some((slot, generation)) = self.writes.pop_front() {
            let line = replica.table().line(slot);
            if line.generation() == generation && replica.is_unclaimed(slot) {
                return Some((slot, generation));
            }
        }
        None
    }

    /// It cannot be written just now.
    pub(super) fn write_later(&mut self, slot: u32, generation: Generation) {
        self.writes.push_front((slot, generation));
    }

    /// The kernel's answer: the entry, or that there is none.
    pub(super) fn found(
        &mut self,
        now: Time,
        (slot, generation): (u32, Generation),
        there: Option<&Connection>,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) {
        let line = replica.table().line(slot);
        if line.generation() != generation || !replica.is_unclaimed(slot) {
            return;
        }
        if line.kind() == Kind::Active {
            // Taken over by the process before: the kernel knows it better, if it knows it and may
            // let it go.
            if there.is_none_or(|there| there.state.timeout_s > GIVEN_MAX_S) {
                counters.count(if there.is_none() {
                    Counter::VerifyMissing
                } else {
                    Counter::VerifyDiffered
                });
                self.writes.push_back((slot, generation));
            }
            return;
        }
        if there.is_none() && replica.table().on(slot) == On::Missing {
            return; // It is tried again as it is.
        }
        let wanted = replica.table().connection(slot);
        let finding = there.map(|there| compare(&wanted, there, replica.is_living_copy(slot)));
        match (finding, there) {
            (None, _) | (_, None) => {
                counters.count(Counter::VerifyMissing);
                replica.recommit(now, slot);
                self.tell(now, slot, replica, "was gone", "it is written again");
            }
            (Some(VerifyResult::Same), _) => {}
            (Some(VerifyResult::Differs(what)), _) => {
                counters.count(Counter::VerifyDiffered);
                replica.recommit(now, slot);
                self.tell(now, slot, replica, what, "it is written again");
            }
            (Some(VerifyResult::MustGo(what)), _) => {
                counters.count(Counter::VerifyDiffered);
                self.writes.push_back((slot, generation));
                self.tell(now, slot, replica, what, "it is replaced");
            }
            (Some(VerifyResult::Touched), _) => {
                counters.count(Counter::VerifyTouched);
            }
            // Since it was written, and no event told: it raises none.
            (Some(VerifyResult::WentOn), Some(there))
                if !matches!(replica.table().written(slot), Written::No | Written::Normal) =>
            {
                counters.count(Counter::VerifyWentOn);
                let known = groups::MARK | told_by_answer(slot, there, replica);
                replica.handle_source(now, &SourceEvent::Seen { connection: *there, known });
            }
            (Some(VerifyResult::WentOn), _) => {
                counters.count(Counter::VerifyDiffered);
                replica.recommit(now, slot);
                self.tell(now, slot, replica, "had another TCP state", "it is written again");
            }
            (Some(VerifyResult::Foreign), Some(there)) => {
                let suspect = Suspect {
                    slot,
                    generation,
                    reply: there.reply,
                    timeout_s: there.state.timeout_s,
                    at: now,
                };
                match self.suspicion(
                    &suspect,
                    there.state.status & status::OFFLOADED != 0,
                    counters,
                ) {
                    Suspicion::Early => {}
                    Suspicion::Silent => {
                        counters.count(Counter::VerifyDiffered);
                        self.writes.push_back((slot, generation));
                        self.tell(
                            now,
                            slot,
                            replica,
                            "had another translation, and no traffic",
                            "it is replaced",
                        );
                    }
                    Suspicion::Alive => {
                        counters.count(Counter::VerifyForeign);
                        let what = "is another connection's, with traffic here";
                        self.tell(now, slot, replica, what, "it is left alone");
                    }
                }
            }
        }
    }

    /// What is known of another connection's entry since the walk before; remembers it for the
    /// next.
    fn suspicion(
        &mut self,
        now: &Suspect,
        is_offloaded: bool,
        counters: &Counters<'_>,
    ) -> Suspicion {
        if is_offloaded {
            return Suspicion::Alive;
        }
        let is_same = |s: &&Suspect| {
            s.slot == now.slot && s.generation == now.generation && s.reply == now.reply
        };
        let before = self.suspects_before.iter().find(is_same).copied();
        let (keep, suspicion) = match before {
            None => (*now, Suspicion::Early),
            Some(before) => {
                let elapsed = now.at.since(before.at);
                let silent = (before.timeout_s as u64).saturating_sub(elapsed.as_secs());
                if elapsed < SILENCE_MIN {
                    (before, Suspicion::Early)
                } else if (now.timeout_s as u64).abs_diff(silent) <= MARGIN_S {
                    return Suspicion::Silent;
                } else {
                    (*now, Suspicion::Alive)
                }
            }
        };
        // What does not fit is found out by a later walk.
        match self.suspects.len() < SUSPECTS_MAX {
            true => self.suspects.push(keep),
            false => counters.count(Counter::VerifyFull),
        }
        suspicion
    }

    /// Says what was found, at most once in a while: of many the first, and how many there were
    /// since.
    fn tell(&mut self, now: Time, slot: u32, replica: &Replica<'_>, what: &str, deed: &str) {
        let Some(more) = self.lines.tell(now) else { return };
        let (copy, original) = (replica.coordinate(slot), replica.table().tuples(slot).0);
        log::warn!("the kernel's entry of copy {copy}, {original}, {what}: {deed}{more}");
    }
}

/// What two looks at another connection's entry say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Suspicion {
    /// Nothing yet.
    Early,
    /// No packet passed in between.
    Silent,
    /// One did.
    Alive,
}

/// Compares the entry that is `there` with the copy; `lives` says whether the copy's active does.
fn compare(wanted: &Connection, there: &Connection, lives: bool) -> VerifyResult {
    const COPIED: u32 = status::SEEN_REPLY | status::ASSURED;
    // The timeout is ours, so no packet has passed since it was written, and it lasts.
    let is_ours = there.state.timeout_s > GIVEN_MAX_S;
    let is_offloaded = there.state.status & status::OFFLOADED != 0; // reported without timeout and TCP state
    if !has_reply(wanted, &there.reply) {
        return if is_ours {
            VerifyResult::MustGo("had another translation")
        } else {
            VerifyResult::Foreign
        };
    }
    if wanted.is_translated() && !translates(there) {
        return VerifyResult::MustGo("had no translation");
    }
    let has_other_state = wanted.state.tcp_state != 0
        && !is_offloaded
        && wanted.state.tcp_state != there.state.tcp_state;
    if has_other_state && lives && !is_ours {
        return VerifyResult::WentOn;
    }
    if is_ours && there.state.status & COPIED & !wanted.state.status != 0 {
        return VerifyResult::MustGo("had a status that claims more than its active had");
    }
    if wanted.state.status & COPIED & !there.state.status != 0 {
        return VerifyResult::Differs("had less status");
    }
    if wanted.state.mark != there.state.mark {
        return VerifyResult::Differs("had another mark");
    }
    // An entry without labels may have no room for any.
    let (a, b) = (&wanted.extra, &there.extra);
    if a.has(parts::LABELS) && b.has(parts::LABELS) && a.labels != b.labels {
        return VerifyResult::Differs("had other labels");
    }
    if has_other_state {
        return VerifyResult::Differs("had another TCP state");
    }
    if lives && !is_ours && !is_offloaded { VerifyResult::Touched } else { VerifyResult::Same }
}

/// Whether an entry with this reply tuple translates as the copy says. Keys of GRE cannot be
/// translated here.
fn has_reply(wanted: &Connection, reply: &Tuple) -> bool {
    if wanted.original.protocol == GRE {
        return Tuple { sport: 0, dport: 0, ..wanted.reply }
            == Tuple { sport: 0, dport: 0, ..*reply };
    }
    wanted.reply == *reply
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
