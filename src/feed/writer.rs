//! The commit stage: batches of entries for the kernel, and of questions to it.

use std::time::Duration;

use super::claims::{self, Claims, Question, Told};
use super::leftovers::{LeftoverStep, Leftovers};
use super::repair::Repair;
use super::shifts::{LOOKS_PER_STEP, Shifts};
use super::verify::Verify;
use crate::ccp::message::Fault;
use crate::conn::table::Written;
use crate::conn::{Generation, Kind, Tuple};
use crate::conntrack::commit::{
    CommitResult, Committer, FlushFirst, Lifetime, Outcome, is_touched,
};
use crate::conntrack::entries::Entries;
use crate::conntrack::timeouts::Timeouts;
use crate::counters::{Counter, Counters};
use crate::limits::COMMIT_PER_PASS;
use crate::logging::Sparse;
use crate::source::Commit;
use crate::sync::Replica;
use crate::sync::mutation::{Mutation, is};
use crate::time::Time;

/// Questions in a batch, even if commits could fill it.
const LOOKS_MIN: usize = COMMIT_PER_PASS / 4;

/// Pause between two lines in the log about refusals.
const TELL_PAUSE: Duration = Duration::from_secs(10);

/// What an entry of the batch is for.
#[derive(Clone, Copy)]
enum For {
    /// The copy in this slot.
    Copy(u32, Generation),
    /// The connection in this slot, which was taken over.
    Own(u32, Generation),
    /// The question whether packets passed the entry of what is left of a copy, in this slot; and
    /// when the last one passed its active's.
    Rest(u32, Generation, u32),
    /// The question whether packets pass the entry of a contested connection, in this slot.
    Watch(u32, Generation),
    /// The question what an event about a copy meant.
    Claim(Question),
    /// Removing an entry.
    Nobody,
    /// The question whether the connection in this slot is there.
    Look(u32, Generation),
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
}

/// A shard's pen.
pub(super) struct Writer<E> {
    committer: Committer<E>,
    claims: Claims,
    had_room: bool,
    batch: Vec<For>,
    /// Of each slot: the millisecond in which the entry of its copy runs out that was given its
    /// normal timeout, its active being silent, if no packet passes; 0: it was not given that.
    runs_out: Vec<u32>,
    /// Entries that the last [`write`](Self::write) deleted.
    deleted: Vec<Tuple>,
    lines: Sparse,
}

/// An entry is written up to so many milliseconds after the time that its pass is said to have. (If
/// it took longer, packets are believed that there were not.)
const WRITTEN_LATE: u32 = 20;

/// The last packets of two gateways' entries may be so many seconds apart although both see all of
/// the traffic, each one direction: an answer takes its time, and whole seconds are told.
const APART_S: u32 = 5;

/// The millisecond that a time is in; they wrap after 49 days.
fn millisecond(time: Time) -> u32 {
    (time.0 / 1_000_000) as u32
}

impl<E: Entries> Writer<E> {
    pub(super) fn new(committer: Committer<E>, capacity: u32) -> Writer<E> {
        Writer {
            committer,
            claims: Claims::new(),
            had_room: true,
            batch: Vec::with_capacity(Committer::BATCH),
            runs_out: vec![0; capacity as usize],
            deleted: Vec::with_capacity(COMMIT_PER_PASS),
            lines: Sparse::new(TELL_PAUSE),
        }
    }

    /// Whether the kernel's table has room for further copies: a pass's share, and after it had
    /// none a fiftieth of the table, so that a table that is nearly full does not change its mind
    /// all the time.
    pub(super) fn has_room(&mut self) -> bool {
        let (room, limit) = self.committer.room_and_limit();
        let least = if self.had_room { 0 } else { limit / 50 };
        self.had_room = room > least.max(COMMIT_PER_PASS as u64);
        self.had_room
    }

    /// Reads some of the kernel's timeouts again, and tells what they are now.
    pub(super) fn read_timeouts_again(&mut self, count: usize) -> &Timeouts {
        self.committer.read_timeouts_again(count)
    }

    /// An event about the living copy in this slot: the kernel is asked what it means. `false`: too
    /// many questions wait.
    pub(super) fn ask(&mut self, slot: u32, replica: &Replica<'_>, told: Told) -> bool {
        self.claims.ask(slot, replica, told)
    }

    /// Whether such questions wait.
    pub(super) fn has_questions(&self) -> bool {
        !self.claims.is_empty()
    }

    /// Entries that were deleted the last time, by their original tuples.
    pub(super) fn deleted(&self) -> &[Tuple] {
        &self.deleted
    }

    /// Writes and asks, up to the cap of a pass; `may_delete`: all that was to be heard before an
    /// entry is deleted was heard.
    pub(super) fn write(
        &mut self,
        (now, may_delete): (Time, bool),
        repair: &mut Repair,
        verify: &mut Verify,
        shifts: &mut Shifts,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) {
        self.deleted.clear();
        let shifts_due = if shifts.is_due(now) { LOOKS_PER_STEP } else { 0 };
        let claims_due = if self.claims.is_empty() { 0 } else { LOOKS_MIN };
        let looks = (repair.looks_waiting() + shifts_due + claims_due).min(LOOKS_MIN);
        for _ in 0..COMMIT_PER_PASS - looks {
            let Some(commit) = replica.poll_commit(may_delete) else { break };
            if self.add(now, replica, shifts, &commit).is_err() {
                self.flush(now, repair, verify, shifts, replica, counters);
                let added = self.add(now, replica, shifts, &commit);
                assert!(added.is_ok(), "an empty batch takes everything");
            }
        }
        while self.batch.len() < COMMIT_PER_PASS
            && let Some(question) = self.claims.next(replica)
        {
            if self.committer.look(&replica.table().tuples(question.slot).0).is_err() {
                self.claims.later(question); // It is being written just now.
                break;
            }
            self.batch.push(For::Claim(question));
        }
        while self.batch.len() < COMMIT_PER_PASS
            && let Some((slot, generation)) = shifts.next_look(now, replica)
        {
            if self.committer.look(&replica.table().tuples(slot).0).is_err() {
                shifts.look_later(now, slot, generation); // It is being written just now.
                break;
            }
            counters.count(Counter::ShiftLooks);
            self.batch.push(For::Shift(slot, generation));
        }
        while self.batch.len() < COMMIT_PER_PASS
            && let Some((slot, generation)) = repair.next_look(replica)
        {
            let original = replica.table().tuples(slot).0;
            if self.committer.look(&original).is_err() {
                repair.look_later(slot, generation); // It is being written just now.
                break;
            }
            self.batch.push(For::Look(slot, generation));
        }
        self.remove_leftovers(now, repair.leftovers(), replica);
        self.verify(now, verify, replica, counters);
        self.flush(now, repair, verify, shifts, replica, counters);
    }

    /// Entries that an earlier process owed a delete: asked for first, then removed. Those of a run
    /// whose table is no more get the timeout that the kernel gives a connection in their state.
    fn remove_leftovers(&mut self, now: Time, leftovers: &mut Leftovers, replica: &Replica<'_>) {
        while self.batch.len() < COMMIT_PER_PASS
            && let Some((there, step)) = leftovers.next(now, replica)
        {
            let (added, entry) = match step {
                LeftoverStep::Remove => (self.committer.delete(&there.original), For::LeftoverGone),
                LeftoverStep::RemoveCopys => (self.committer.delete(&there.original), For::Nobody),
                LeftoverStep::Look => (self.committer.look(&there.original), For::Leftover),
                LeftoverStep::Age => {
                    (self.committer.update(&there, Lifetime::Normal), For::LeftoverAged)
                }
            };
            if added.is_err() {
                return leftovers.later((there, step));
            }
            self.batch.push(entry);
        }
    }

    /// What the walk that verifies has to write, then what it has to ask.
    fn verify(
        &mut self,
        now: Time,
        verify: &mut Verify,
        replica: &Replica<'_>,
        counters: &Counters<'_>,
    ) {
        while self.batch.len() < COMMIT_PER_PASS
            && let Some((slot, generation)) = verify.next_write(replica)
        {
            let connection = replica.table().connection(slot);
            let (added, entry) = match replica.table().kind(slot) {
                Kind::Backup if replica.is_living_copy(slot) => (
                    self.committer.replace(&connection, Lifetime::Kept),
                    For::Copy(slot, generation),
                ),
                Kind::Backup => (
                    self.committer.replace(&connection, Lifetime::Normal),
                    For::Copy(slot, generation),
                ),
                _ => (
                    self.committer.write(&connection, Lifetime::Normal),
                    For::Own(slot, generation),
                ),
            };
            if added.is_err() {
                return verify.write_later(slot, generation); // It is being written just now.
            }
            self.batch.push(entry);
        }
        while self.batch.len() < COMMIT_PER_PASS
            && let Some((slot, generation)) = verify.next_look(now, replica, counters)
        {
            if self.committer.look(&replica.table().tuples(slot).0).is_ok() {
                counters.count(Counter::VerifyLooks);
                self.batch.push(For::Verify(slot, generation));
            } // Or it is being written just now: nothing is to be found out.
        }
    }

    fn add(
        &mut self,
        now: Time,
        replica: &Replica<'_>,
        shifts: &mut Shifts,
        commit: &Commit,
    ) -> Result<(), FlushFirst> {
        let entry = match commit {
            Commit::Write { slot, generation }
            | Commit::Again { slot, generation }
            | Commit::Refresh { slot, generation } => {
                let line = replica.table().line(*slot);
                let (lifetime, entry) = match (line.kind(), commit) {
                    _ if line.generation() != *generation => return Ok(()),
                    (Kind::Backup, _) if replica.is_living_copy(*slot) => {
                        (Lifetime::Kept, For::Copy(*slot, *generation))
                    }
                    (Kind::Backup, _) => (Lifetime::Normal, For::Copy(*slot, *generation)),
                    (Kind::Active | Kind::Held, Commit::Refresh { .. }) => {
                        let lifetime = match replica.table().passed_s(*slot, now) {
                            0 => Lifetime::Normal,
                            left_s => Lifetime::Rest(left_s),
                        };
                        (lifetime, For::Own(*slot, *generation))
                    }
                    _ => return Ok(()), // Ours by now: the kernel knows it better.
                };
                let lifetime = if is(Mutation::KeptForever) { Lifetime::Kept } else { lifetime };
                let connection = replica.table().connection(*slot);
                let is_resumed = replica.table().written(*slot) == Written::Resumed;
                match commit {
                    Commit::Write { .. } if !is_resumed => {
                        self.committer.write(&connection, lifetime)?
                    }
                    _ if is(Mutation::KeepOverwrites) => {
                        self.committer.write(&connection, lifetime)?
                    }
                    _ => {
                        let silent_s = match self.runs_out[*slot as usize] {
                            0 => 0,
                            // The kernel tells what is left in whole seconds, what is begun left
                            // out.
                            at => (at.wrapping_sub(millisecond(now)) as i32).max(0) as u32 / 1000,
                        };
                        self.committer.keep(&connection, lifetime, silent_s)?;
                    }
                }
                shifts.note(now, *slot, &connection);
                entry
            }
            Commit::Look { slot, generation, elsewhere_at } => {
                if replica.table().line(*slot).generation() != *generation {
                    return Ok(());
                }
                self.committer.look(&replica.table().tuples(*slot).0)?;
                For::Rest(*slot, *generation, *elsewhere_at)
            }
            Commit::Watch { slot, generation } => {
                if replica.table().line(*slot).generation() != *generation {
                    return Ok(());
                }
                self.committer.look(&replica.table().tuples(*slot).0)?;
                For::Watch(*slot, *generation)
            }
            Commit::Delete { original } => {
                self.committer.delete(original)?;
                self.deleted.push(*original);
                For::Nobody
            }
            Commit::DeleteUntouched { original } => {
                self.committer.look(original)?;
                For::Untouched
            }
        };
        self.batch.push(entry);
        Ok(())
    }

    fn flush(
        &mut self,
        now: Time,
        repair: &mut Repair,
        verify: &mut Verify,
        shifts: &Shifts,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) {
        let Writer { committer, batch, lines, runs_out, .. } = self;
        if batch.is_empty() {
            return;
        }
        let timeouts = *committer.timeouts();
        let tally = committer.flush(&mut |result: CommitResult| {
            let outcome = match (result.outcome, batch[result.index]) {
                (Outcome::Present(connection), For::Look(slot, generation)) => {
                    return repair.found(now, slot, generation, Some(&connection), replica);
                }
                (Outcome::Removed, For::Look(slot, generation)) => {
                    return repair.found(now, slot, generation, None, replica);
                }
                (Outcome::Present(connection), For::Verify(slot, generation)) => {
                    return verify.found(
                        now,
                        (slot, generation),
                        Some(&connection),
                        replica,
                        counters,
                    );
                }
                (Outcome::Removed, For::Verify(slot, generation)) => {
                    return verify.found(now, (slot, generation), None, replica, counters);
                }
                (Outcome::Present(connection), For::Shift(slot, generation)) => {
                    return shifts.found(now, (slot, generation), &connection, replica, counters);
                }
                (Outcome::Removed, For::Shift(..)) => return, // Events tell.
                (Outcome::Present(connection), For::Rest(slot, generation, elsewhere_at)) => {
                    let own_s =
                        if is_touched(&connection) { connection.state.timeout_s } else { 0 };
                    // What was written over had been touched.
                    let left_s = own_s.max(replica.table().passed_s(slot, now));
                    let age_s = now.begun_seconds().saturating_sub(elsewhere_at);
                    let is_over = elsewhere_at > 0
                        && timeouts.youngest_s(&connection, left_s) > age_s.saturating_add(APART_S);
                    let touched = left_s > 0 && !is_over;
                    if touched {
                        repair.may_be_unheard(slot);
                    }
                    return replica.handle_look(now, slot, generation, Some(&connection), touched);
                }
                (Outcome::Present(connection), For::Watch(slot, generation)) => {
                    repair.may_be_unheard(slot);
                    return replica.handle_watch(now, slot, generation, Some(&connection));
                }
                (Outcome::Removed, For::Watch(slot, generation)) => {
                    return replica.handle_watch(now, slot, generation, None);
                }
                (_, For::Watch(..)) => return, // It is asked again.
                (Outcome::Present(connection), For::Claim(question)) => {
                    return claims::found(now, question, Some(&connection), replica, counters);
                }
                (Outcome::Removed, For::Claim(question)) => {
                    return claims::found(now, question, None, replica, counters);
                }
                (Outcome::Written, For::LeftoverAged) => {
                    return counters.count(Counter::LeftoversAged);
                }
                (_, For::LeftoverAged) => return, // It has gone by itself.
                // That it is there no more, or cannot be asked for, leaves nothing to keep.
                (_, For::Rest(slot, generation, _)) => {
                    return replica.handle_look(now, slot, generation, None, false);
                }
                (Outcome::Present(connection), For::Leftover) => {
                    return repair.found_leftover(&connection, counters);
                }
                (Outcome::Present(connection), For::Untouched) if is_touched(&connection) => {
                    return repair.found_besides(now, &connection, replica);
                }
                (Outcome::Present(connection), For::Untouched) => {
                    return repair.leftovers().remove(
                        &connection,
                        LeftoverStep::RemoveCopys,
                        counters,
                    );
                }
                (Outcome::Removed, For::Leftover | For::Untouched) => return,
                (Outcome::Removed, For::LeftoverGone) => {
                    return counters.count(Counter::LeftoversDeleted);
                }
                (Outcome::Written, _) => {
                    counters.count(Counter::Commits);
                    Ok(Written::Yes)
                }
                (Outcome::AsItWas, _) => Ok(Written::AsItWas),
                (Outcome::Removed, _) => return counters.count(Counter::CommitDeletes),
                // What only a dead member had gives way to what the kernel has.
                (
                    Outcome::Another(there),
                    For::Copy(slot, generation) | For::Own(slot, generation),
                ) if replica.table().line(slot).generation() == generation
                    && !replica.is_living_copy(slot) =>
                {
                    counters.count(Counter::CommitClashes);
                    return repair.found_instead(now, &there, replica);
                }
                (Outcome::Clash | Outcome::Another(_), _) => {
                    counters.count(Counter::CommitClashes);
                    Err(Fault::Clash)
                }
                (Outcome::Unshifted, _) => {
                    counters.count(Counter::CommitWithoutShift);
                    Err(Fault::Refused)
                }
                (Outcome::NoRoom, _) => {
                    counters.count(Counter::CommitNoRoom);
                    Err(Fault::NoRoom)
                }
                (Outcome::Failed(errno), _) => {
                    if let Some(more) = lines.tell(now) {
                        let reason = std::io::Error::from_raw_os_error(errno);
                        log::warn!(
                            "the kernel refuses what is asked of entry {}: {reason}{more}",
                            result.original
                        );
                    }
                    counters.count(Counter::CommitErrors);
                    Err(Fault::Refused)
                }
                (Outcome::Present(_), _) => {
                    counters.count(Counter::CommitErrors);
                    Err(Fault::Refused)
                }
            };
            if let For::Copy(slot, generation) | For::Own(slot, generation) = batch[result.index] {
                runs_out[slot as usize] = match result.silent_s {
                    0 => 0,
                    silent_s => {
                        (millisecond(now).wrapping_add(WRITTEN_LATE + silent_s * 1000)).max(1)
                    }
                };
                if result.passed_s > 0 && !is(Mutation::KeepOverwrites) {
                    replica.handle_overwritten(now, slot, generation, result.passed_s);
                }
                let written = replica.table().written(slot);
                let is_first = matches!(written, Written::No | Written::Normal);
                if result.was_there && is_first && matches!(batch[result.index], For::Copy(..)) {
                    repair.may_be_unheard(slot);
                }
                replica.handle_commit(now, slot, generation, outcome);
            }
        });
        batch.clear();
        counters.add(Counter::CommitUpdates, tally.updated);
        counters.add(Counter::CommitReplaced, tally.replaced);
        counters.add(Counter::CommitVanished, tally.vanished);
        counters.add(Counter::CommitBusy, tally.busy);
        counters.add(Counter::CommitWithoutHelper, tally.without_helper);
        counters.add(Counter::CommitWithoutLabels, tally.without_labels);
    }
}
