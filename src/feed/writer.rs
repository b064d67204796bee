//! The commit stage: batches of entries for the kernel, and of questions to it.

use std::net::IpAddr;
use std::time::Duration;

use super::answers::{Answers, For, RunsOut};
use super::claims::Claims;
use super::leaving::Leaving;
use super::leftovers::{LeftoverStep, Leftovers};
use super::repair::Repair;
use super::shifts::{LOOKS_PER_STEP, Shifts};
use super::verify::Verify;
use crate::conn::table::Written;
use crate::conn::{Kind, Tuple};
use crate::conntrack::commit::{Committer, FlushFirst, Lifetime};
use crate::conntrack::entries::Entries;
use crate::conntrack::timeouts::Timeouts;
use crate::counters::{Counter, Counters};
use crate::limits::COMMIT_PER_PASS;
use crate::logging::Sparse;
use crate::source::{Commit, Elsewhere};
use crate::sync::Replica;
use crate::sync::mutation::{Mutation, is};
use crate::time::Time;

/// Questions in a batch, even if commits could fill it.
const LOOKS_MIN: usize = COMMIT_PER_PASS / 4;

/// Pause between two lines in the log about refusals.
const TELL_PAUSE: Duration = Duration::from_secs(10);

/// For so long it is known that an address is not this host's: entries are asked about by the
/// thousand. (That it is here is known for this pass only: it may have left since.)
const ADDRESS_KNOWN_FOR: Duration = Duration::from_millis(100);

/// What writes a shard's entries into the kernel.
pub(super) struct EntryWriter<E> {
    committer: Committer<E>,
    claims: Claims,
    had_room: bool,
    batch: Vec<For>,
    runs_out: RunsOut,
    /// The address that was asked for last, when, and whether it was this host's.
    address: Option<(IpAddr, Time, bool)>,
    /// Entries that the last [`write`](Self::write) deleted.
    deleted: Vec<Tuple>,
    lines: Sparse,
}

impl<E: Entries> EntryWriter<E> {
    pub(super) fn new(committer: Committer<E>, capacity: u32) -> EntryWriter<E> {
        EntryWriter {
            committer,
            claims: Claims::new(),
            had_room: true,
            batch: Vec::with_capacity(Committer::BATCH),
            runs_out: RunsOut::new(capacity),
            address: None,
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

    /// Whether the address that what answers this connection is sent to is this host's.
    pub(super) fn has_address(&mut self, now: Time, reply: &Tuple) -> bool {
        let address = reply.dst_ip();
        if let Some((known, at, is_here)) = self.address
            && known == address
            && (at == now || !is_here && now.since(at) < ADDRESS_KNOWN_FOR)
        {
            return is_here;
        }
        let is_here = self.committer.has_address(address);
        self.address = Some((address, now, is_here));
        is_here
    }

    /// Reads some of the kernel's timeouts again, and tells what they are now.
    pub(super) fn read_timeouts_again(&mut self, count: usize) -> &Timeouts {
        self.committer.read_timeouts_again(count)
    }

    /// What is to be asked about copies.
    pub(super) fn claims(&mut self) -> &mut Claims {
        &mut self.claims
    }

    /// Entries that were deleted the last time, by their original tuples.
    pub(super) fn deleted(&self) -> &[Tuple] {
        &self.deleted
    }

    /// Asks what events about copies meant, all of it; then writes, deletes and asks otherwise, up
    /// to the cap of a pass. `may_delete`: all that was to be heard before an
    /// entry is deleted was heard.
    pub(super) fn write(
        &mut self,
        (now, may_delete): (Time, bool),
        repair: &mut Repair,
        verify: &mut Verify,
        (shifts, leaving): (&mut Shifts, &mut Leaving),
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) {
        self.deleted.clear();
        // Before anything is written or deleted: what began on the entry of a copy is not to be
        // overwritten by what that one's active has told meanwhile, nor to go with it.
        while let Some((original, what)) = self.claims.next(replica) {
            if self.committer.look(&original).is_err() {
                self.flush(now, repair, verify, (shifts, leaving), replica, counters);
                let added = self.committer.look(&original);
                assert!(added.is_ok(), "an empty batch takes everything");
            }
            self.batch.push(what.map_or(For::Begun, For::Claim));
        }
        self.flush(now, repair, verify, (shifts, leaving), replica, counters);
        let shifts_due = if shifts.is_due(now) { LOOKS_PER_STEP } else { 0 };
        let looks = (repair.looks_waiting() + shifts_due).min(LOOKS_MIN);
        for _ in 0..COMMIT_PER_PASS - looks {
            let Some(commit) = replica.poll_commit(may_delete) else { break };
            if self.add(now, replica, repair, shifts, &commit).is_err() {
                self.flush(now, repair, verify, (shifts, leaving), replica, counters);
                let added = self.add(now, replica, repair, shifts, &commit);
                assert!(added.is_ok(), "an empty batch takes everything");
            }
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
            self.batch.push(For::Repair(slot, generation));
        }
        while self.batch.len() < COMMIT_PER_PASS
            && let Some(original) = repair.ended().next(now)
        {
            if self.committer.look(&original).is_ok() {
                self.batch.push(For::Ended);
            } // Or it is being written just now: it is asked for in the next round.
        }
        self.remove_leftovers(now, repair.leftovers(), replica);
        self.verify(now, verify, replica, counters);
        self.flush(now, repair, verify, (shifts, leaving), replica, counters);
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
        repair: &mut Repair,
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
                if repair.ended().has(&connection.original) {
                    self.committer.look(&connection.original)?;
                    self.batch.push(For::EndedBefore(*slot, *generation));
                    return Ok(());
                }
                let is_resumed = replica.table().written(*slot) == Written::Resumed;
                match commit {
                    Commit::Write { .. } if !is_resumed => {
                        self.committer.write(&connection, lifetime)?
                    }
                    _ if is(Mutation::KeepOverwrites) => {
                        self.committer.write(&connection, lifetime)?
                    }
                    _ => {
                        let silent_s = self.runs_out.left_s(now, *slot);
                        self.committer.keep(&connection, lifetime, silent_s)?;
                    }
                }
                shifts.note(now, *slot, &connection);
                entry
            }
            Commit::Look { slot, generation, elsewhere } => {
                if replica.table().line(*slot).generation() != *generation {
                    return Ok(());
                }
                let (original, reply) = replica.table().tuples(*slot);
                self.committer.look(&original)?;
                let came = *elsewhere == Elsewhere::Left && self.has_address(now, &reply);
                For::Rest(*slot, *generation, *elsewhere, came)
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
        (shifts, leaving): (&Shifts, &mut Leaving),
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) {
        let EntryWriter { committer, batch, lines, runs_out, .. } = self;
        if batch.is_empty() {
            return;
        }
        let timeouts = *committer.timeouts();
        let mut answers = Answers {
            now,
            timeouts,
            repair,
            verify,
            shifts,
            leaving,
            runs_out,
            lines,
            replica,
            counters,
        };
        let tally = committer.flush(&mut |result| answers.take(batch[result.index], &result));
        batch.clear();
        counters.add(Counter::CommitUpdates, tally.updated);
        counters.add(Counter::CommitReplaced, tally.replaced);
        counters.add(Counter::CommitVanished, tally.vanished);
        counters.add(Counter::CommitBusy, tally.busy);
        counters.add(Counter::CommitWithoutHelper, tally.without_helper);
        counters.add(Counter::CommitWithoutLabels, tally.without_labels);
    }
}
