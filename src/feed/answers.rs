//! Answers: what the kernel says to each entry of a batch, and whose that is.

use super::claims::{self, Question};
use super::leaving::Leaving;
use super::leftovers::LeftoverStep;
use super::repair::Repair;
use super::shifts::Shifts;
use super::verify::Verify;
use crate::ccp::message::Fault;
use crate::conn::table::Written;
use crate::conn::{Connection, Generation};
use crate::conntrack::commit::{CommitResult, Outcome, is_touched};
use crate::conntrack::timeouts::Timeouts;
use crate::counters::{Counter, Counters};
use crate::logging::Sparse;
use crate::source::{Elsewhere, LookShows};
use crate::sync::Replica;
use crate::sync::mutation::{Mutation, is};
use crate::time::Time;

/// An entry is written up to so many milliseconds after the time that its pass is said to have. (If
/// it took longer, packets are believed that there were not.)
const WRITTEN_LATE: u32 = 20;

/// The last packets of two gateways' entries may be so many seconds apart although both see all of
/// the traffic, each one direction: an answer takes its time, and whole seconds are told.
const APART_S: u32 = 5;

/// What an entry of the batch is for.
#[derive(Clone, Copy)]
pub(super) enum For {
    /// The copy in this slot.
    Copy(u32, Generation),
    /// The connection in this slot, which was taken over.
    Own(u32, Generation),
    /// The question whether packets passed the entry of what is left of a copy, in this slot; and
    /// what is known of its active's, and whether the address that it is translated to is this
    /// host's.
    Rest(u32, Generation, Elsewhere, bool),
    /// The question whether packets pass the entry of a contested connection, in this slot.
    Watch(u32, Generation),
    /// The question what an event about a copy meant.
    Claim(Question),
    /// Removing an entry.
    Nobody,
    /// The question whether the connection in this slot is there.
    Repair(u32, Generation),
    /// The question whether the entry of this copy is there, for the walk that verifies.
    Verify(u32, Generation),
    /// The question by how much the connection in this slot is shifted.
    Shift(u32, Generation),
    /// The question whether an entry that an earlier process owed a delete is there.
    Leftover,
    /// Removing it.
    LeftoverGone,
    /// Giving it its normal timeout.
    LeftoverAged,
    /// The question whether packets have passed an entry that goes if not.
    Untouched,
    /// The question what became of a connection that was opened over a copy which has ended since.
    Begun,
    /// The question whether a closed connection has gone on unheard.
    Ended,
    /// The same, before the copy in this slot is written over its entry.
    EndedBefore(u32, Generation),
}

/// When the entries of copies run out that were given their normal timeout, their actives being
/// silent, if no packet passes.
pub(super) struct RunsOut(Vec<u32>);

impl RunsOut {
    pub(super) fn new(capacity: u32) -> RunsOut {
        RunsOut(vec![0; capacity as usize])
    }

    /// The millisecond that a time is in; they wrap after 49 days.
    fn millisecond(time: Time) -> u32 {
        (time.0 / 1_000_000) as u32
    }

    /// What the kernel tells that the slot's entry has left, if no packet has passed: whole
    /// seconds, what is begun left out. 0: it was not given that timeout.
    pub(super) fn left_s(&self, now: Time, slot: u32) -> u32 {
        match self.0[slot as usize] {
            0 => 0,
            at => (at.wrapping_sub(RunsOut::millisecond(now)) as i32).max(0) as u32 / 1000,
        }
    }

    /// It was given so many seconds; 0: it was not.
    fn set(&mut self, now: Time, slot: u32, seconds: u32) {
        let at = RunsOut::millisecond(now).wrapping_add(WRITTEN_LATE + seconds * 1000);
        self.0[slot as usize] = if seconds == 0 { 0 } else { at.max(1) };
    }
}

/// Whether the entry with the original tuple of the connection in this slot is another
/// connection's, in another translation, which packets have passed.
fn is_another(
    there: &Connection,
    slot: u32,
    generation: Generation,
    replica: &Replica<'_>,
) -> bool {
    replica.table().line(slot).generation() == generation
        && there.reply != replica.table().tuples(slot).1
        && is_touched(there)
}

/// Whom the answers go to.
pub(super) struct Answers<'a, 'm, 'c> {
    pub(super) now: Time,
    pub(super) timeouts: Timeouts,
    pub(super) repair: &'a mut Repair,
    pub(super) verify: &'a mut Verify,
    pub(super) shifts: &'a Shifts,
    pub(super) leaving: &'a mut Leaving,
    pub(super) runs_out: &'a mut RunsOut,
    pub(super) lines: &'a mut Sparse,
    pub(super) replica: &'a mut Replica<'m>,
    pub(super) counters: &'a Counters<'c>,
}

impl Answers<'_, '_, '_> {
    pub(super) fn take(&mut self, what: For, result: &CommitResult) {
        let there = match &result.outcome {
            Outcome::Present(connection) => Some(connection),
            _ => None,
        };
        let is_answered = there.is_some() || result.outcome == Outcome::Absent;
        let Answers { now, repair, replica, counters, .. } = self;
        match what {
            For::Copy(slot, generation) | For::Own(slot, generation) => {
                let is_copy = matches!(what, For::Copy(..));
                self.written(is_copy, slot, generation, result)
            }
            // That it is there no more, or cannot be asked for, leaves nothing to keep.
            For::Rest(slot, generation, elsewhere, came) => {
                self.rest(slot, generation, (elsewhere, came), there)
            }
            // If it cannot be asked for, it is asked again.
            For::Watch(slot, generation) if is_answered => {
                if there.is_some() {
                    repair.may_be_unheard(slot);
                }
                let another = there.filter(|there| is_another(there, slot, generation, replica));
                replica.handle_watch(*now, slot, generation, there);
                if let Some(another) = another {
                    repair.found_besides(*now, another, replica);
                }
            }
            For::Watch(..) => {}
            For::Repair(slot, generation) if is_answered => {
                repair.found(*now, (slot, generation), there, self.leaving, replica)
            }
            For::Verify(slot, generation) if is_answered => {
                self.verify.found(*now, (slot, generation), there, replica, counters)
            }
            For::Claim(question) if is_answered => {
                claims::found(*now, question, there, self.leaving, replica, counters)
            }
            // (Of one that has gone events tell.)
            For::Shift(slot, generation) if is_answered => {
                if let Some(there) = there {
                    self.shifts.found(*now, (slot, generation), there, replica, counters)
                }
            }
            For::Leftover | For::Untouched if is_answered => match there {
                Some(there) if matches!(what, For::Leftover) => {
                    repair.found_leftover(there, counters)
                }
                Some(there) if is_touched(there) => repair.found_besides(*now, there, replica),
                Some(there) => {
                    repair.leftovers().remove(there, LeftoverStep::RemoveCopys, counters)
                }
                None => {}
            },
            For::Begun => {
                if let Some(there) = there {
                    repair.found_besides(*now, there, replica)
                }
            }
            For::Ended if is_answered => {
                repair.found_ended(*now, &result.original, there, replica);
            }
            For::EndedBefore(slot, generation) => {
                let goes_on = repair.found_ended(*now, &result.original, there, replica);
                repair.ended().take(&result.original);
                if !goes_on && replica.table().line(slot).generation() == generation {
                    replica.recommit(*now, slot);
                }
            }
            For::LeftoverGone if result.outcome == Outcome::Absent => {
                counters.count(Counter::LeftoversDeleted)
            }
            // If not, it has gone by itself.
            For::LeftoverAged => {
                let is_aged = result.outcome == Outcome::Written;
                counters.add(Counter::LeftoversAged, is_aged as u64)
            }
            _ => drop(self.outcome(result)),
        }
    }

    /// What is left of a copy is asked for packets. What was written over had been touched; and
    /// those of its active may be later. Without any it goes on if the address that it is
    /// translated to has left its active's host, and `came` to this one.
    fn rest(
        &mut self,
        slot: u32,
        generation: Generation,
        (elsewhere, came): (Elsewhere, bool),
        there: Option<&Connection>,
    ) {
        let Answers { now, timeouts, repair, replica, .. } = self;
        let has_passed = there.is_some_and(|there| {
            let passed_s = replica.table().passed_s(slot, *now);
            let left_s = if is_touched(there) { there.state.timeout_s } else { passed_s };
            // So long ago, at least, the last packet passed here. But if that is longer ago than
            // the entry was written, the kernel has given it a timeout that is not known here: by a
            // policy, say, or before this process was there.
            let age_s = timeouts.youngest_s(there, left_s);
            let written_at = replica.table().written_at(slot);
            let is_known =
                written_at > 0 && written_at.saturating_add(age_s) <= now.begun_seconds() + 1;
            let is_over = match elsewhere {
                Elsewhere::PassedAt(second) => {
                    let elsewhere_s = now.begun_seconds().saturating_sub(second);
                    is_known && age_s > elsewhere_s.saturating_add(APART_S)
                }
                Elsewhere::Unknown | Elsewhere::Left => false,
            };
            (is_touched(there) || passed_s > 0) && !is_over
        });
        let shows = match (has_passed, came) {
            (true, _) => LookShows::Packets,
            (false, true) => LookShows::Address,
            (false, false) => LookShows::Nothing,
        };
        if shows != LookShows::Nothing {
            repair.may_be_unheard(slot);
        }
        let another = there.filter(|there| is_another(there, slot, generation, replica));
        replica.handle_look(*now, slot, generation, there, shows);
        if let Some(another) = another {
            repair.found_besides(*now, another, replica);
        }
    }

    /// The entry of a copy, or of what was taken over, was to be written.
    fn written(&mut self, is_copy: bool, slot: u32, generation: Generation, result: &CommitResult) {
        // What only a dead member had gives way to what the kernel has.
        if let Outcome::Another(there) = &result.outcome
            && self.replica.table().line(slot).generation() == generation
            && !self.replica.is_living_copy(slot)
        {
            self.counters.count(Counter::CommitClashes);
            return self.repair.found_instead(self.now, there, self.replica);
        }
        let Some(outcome) = self.outcome(result) else { return };
        let Answers { now, repair, replica, runs_out, .. } = self;
        runs_out.set(*now, slot, result.silent_s);
        if result.passed_s > 0 && !is(Mutation::KeepOverwrites) {
            replica.handle_overwritten(*now, slot, generation, result.passed_s);
        }
        let is_first = matches!(replica.table().written(slot), Written::No | Written::Normal);
        if result.was_there && is_first && is_copy {
            repair.may_be_unheard(slot);
        }
        replica.handle_commit(*now, slot, generation, outcome);
    }

    /// What became of a write, counted; `None`: it was a delete.
    fn outcome(&mut self, result: &CommitResult) -> Option<Result<Written, Fault>> {
        let (counter, outcome) = match result.outcome {
            Outcome::Written => (Counter::Commits, Ok(Written::Yes)),
            Outcome::AsItWas => return Some(Ok(Written::AsItWas)),
            Outcome::Absent => {
                self.counters.count(Counter::CommitDeletes);
                return None;
            }
            Outcome::Clash | Outcome::Another(_) => (Counter::CommitClashes, Err(Fault::Clash)),
            Outcome::Unshifted => (Counter::CommitWithoutShift, Err(Fault::Refused)),
            Outcome::NoRoom => (Counter::CommitNoRoom, Err(Fault::NoRoom)),
            Outcome::Present(_) => (Counter::CommitErrors, Err(Fault::Refused)),
            Outcome::Failed(errno) => {
                if let Some(more) = self.lines.tell(self.now) {
                    let reason = std::io::Error::from_raw_os_error(errno);
                    log::warn!(
                        "the kernel refuses what is asked of entry {}: {reason}{more}",
                        result.original
                    );
                }
                (Counter::CommitErrors, Err(Fault::Refused))
            }
        };
        self.counters.count(counter);
        Some(outcome)
    }
}
