//! Committing: writing copies into the kernel's table, and removing them.
//!
//! A batch is not a transaction: each request succeeds or fails alone
//! ([`entries`](super::entries)). What may happen to one entry, round after round:
//!
//! ```text
//!  write --> CREATE --ok--------------------------------> Written
//!               | EEXIST                     same reply
//!               +--> GET --found----> compare --------> UPDATE --ok--> Written
//!               |     | ENOENT           | other reply
//!               |     v                  v
//!               |   Clash            DELETE, CREATE --ok--> Written, EEXIST --> Clash
//!               + no room: GET; what is not there is refused (NoRoom)
//!  delete -> DELETE --ok, ENOENT--> Removed
//!  replace -> DELETE, CREATE, as above
//!  keep ---> GET --found, packets have passed it--> AsItWas, or UPDATE of its timeout if it is to last longer --> Written
//!               | found as it was written: UPDATE or DELETE, CREATE, as above;  ENOENT: CREATE, as above
//!  look ---> GET --found--> Present, ENOENT --> Removed
//! ```
//!
//! A **clash**: the kernel has no entry with this original tuple, and still refuses it, because
//! another connection holds the translated tuple (two gateways behind one address that hand out the
//! same ports). Comparing the reply tuples matters since an update by original tuple succeeds on an
//! entry with another translation, and a translation cannot be changed.
//!
//! **What packets have passed** is somebody's connection, who may be alive. An entry with the
//! original tuple and another translation, which has not the timeout of copies and has not ended,
//! is never removed for a copy: that is a clash as well. Not even for a connection that was taken
//! over, if a packet has passed it just now.
//!
//! A **shift** of sequence numbers that the kernel has made further is never taken back: its helper
//! did that, with a packet that passed here. A connection that is shifted, and of which nobody
//! knows by how much, is not written, and an entry that is there is removed: its stream is cut
//! rather than altered ([`Outcome::Unshifted`]).
//!
//! A **helper** can be given to a new entry only, and only if this kernel has it: an entry without
//! it is replaced, and where there is no such helper the entry is written without, which is
//! counted.

use std::net::IpAddr;

use super::KernelError;
use super::codec::{GIVEN_MAX_S, status};
use super::entries::{Answers, Entries, NetlinkEntries, Request};
use super::timeouts::Timeouts;
use crate::conn::extra::{HELPER_NAME, parts};
use crate::conn::tuple::GRE;
use crate::conn::{Connection, Phase, Tuple};
use crate::limits::COMMIT_PER_PASS;

/// The timeout of an entry whose active lives: it must outlast any silence, because refreshes
/// raise no events and only the active's close may end it. Longer than the kernel's longest
/// default (5 days for an established TCP connection); short enough that what a crash leaves
/// behind goes away by itself.
pub const KEPT_TIMEOUT_S: u32 = 24 * 24 * 3600;

/// Whether a packet has passed an entry since it was written as a copy: it no longer has the
/// timeout that only we give. What GRE entries show is always ours.
pub fn is_touched(there: &Connection) -> bool {
    there.state.timeout_s <= GIVEN_MAX_S && there.original.protocol != GRE
}

/// How long a restored GRE entry lives once its active is dead, whatever passes: its timeout is
/// fixed, since the kernel lets nobody set those that GRE entries carry. The packet after that
/// begins a new one.
pub const GRE_TIMEOUT_S: u32 = 3600;

/// What an entry has left is known to so many seconds: whole ones are told, and some time after the
/// pass began.
const READ_LATE_S: u32 = 2;

/// A packet has passed just now if its entry has lost no more than so many seconds since.
const FRESH_S: u32 = 5;

/// A packet that passes within a second after its entry was given the normal timeout cannot be told
/// from none: the kernel tells whole seconds. If a commit then writes over the entry, a packet is
/// taken to have passed for so many seconds.
const UNTOLD_S: u32 = 30;

/// Helpers remembered as refused: a kernel has about a dozen.
const HELPERS_MAX: usize = 16;

/// Rounds that one entry may take; more means that somebody else keeps changing it.
const ROUNDS_MAX: usize = 6;

/// How long an entry lives without traffic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lifetime {
    /// Until the active closes it.
    Kept,
    /// As long as this kernel gives a connection in this state, or as the active's kernel had last
    /// given it, if that is more: the active is dead.
    Normal,
    /// So many seconds, but no longer than that: it has those left from its last packet.
    Rest(u32),
}

/// What became of one entry of the batch.
#[allow(clippy::large_enum_variant)] // A batch has one at a time, and a box would be an allocation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is in the kernel as it should be.
    Written,
    /// It is in the kernel, and packets may have passed it: it was left as it is.
    AsItWas,
    /// It was asked for, and is there like this.
    Present(Connection),
    /// It is not in the kernel: it was removed, or was not there.
    Absent,
    /// Another connection holds the translated tuple.
    Clash,
    /// Another connection has the original tuple, and a packet has passed it just now.
    Another(Connection),
    /// It is shifted, nobody knows by how much, and so it is not in the kernel.
    Unshifted,
    /// The kernel's table is as full as we may make it, or full.
    NoRoom,
    /// The kernel refused, for this reason.
    Failed(i32),
}

/// The result for one entry of the batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CommitResult {
    /// Its place in the batch, from 0.
    pub index: usize,
    /// Its original tuple.
    pub original: Tuple,
    /// What became of it.
    pub outcome: Outcome,
    /// It was there before, and may raise no events.
    pub was_there: bool,
    /// The normal timeout, in seconds, that it has now, and no packet has passed it; 0: not so.
    pub silent_s: u32,
    /// The seconds that packets had left it, or may have, if it has the timeout of copies now; 0:
    /// none had passed it.
    pub passed_s: u32,
}

/// What happened on the way to the results of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Entries that were there already and were brought up to date.
    pub updated: u64,
    /// Entries that were there with another translation, or without their helper or any shift, and
    /// were replaced.
    pub replaced: u64,
    /// Entries that went away while they were brought up to date.
    pub vanished: u64,
    /// Entries that changed while they were brought up to date.
    pub busy: u64,
    /// Entries written without their helper, which this kernel does not have.
    pub without_helper: u64,
    /// Entries that have no room for labels, because no rule here uses labels.
    pub without_labels: u64,
}

/// The batch takes no more, or has an entry with this original tuple: flush first. (Entries
/// take rounds of different lengths, so two of one name would not stay in order.)
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlushFirst;

#[allow(clippy::large_enum_variant)] // As above.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Create,
    /// As it is, if packets have passed it.
    Keep {
        /// What it has left at most if it was given its normal timeout and no packet has passed
        /// since; 0: it was not given that.
        silent_s: u32,
    },
    Compare,
    Look,
    Update {
        present: u32,
    },
    Replace,
    Delete,
    /// A delete, in place of a write.
    Withdraw,
    Done(Outcome),
}

#[derive(Clone, Copy)]
struct BatchEntry {
    connection: Connection, // of a delete, only the original tuple means anything
    timeout_s: u32,
    may_create: bool,
    step: Step,
    was_there: bool,
    /// The entry that was there had packets.
    is_touched: bool,
    /// What it had left, if that was not the timeout of copies; 0: there was none.
    left_s: u32,
    /// Its last packet passed just now.
    is_fresh: bool,
}

/// A shard's pen: one batch, and the kernel's entries behind it.
pub struct Committer<E = NetlinkEntries> {
    kernel: E,
    entries: Vec<BatchEntry>,
    tally: Tally,
    /// Helpers that this kernel refused, at most [`HELPERS_MAX`].
    refused: Vec<[u8; HELPER_NAME]>,
}

impl Committer {
    /// Entries in a batch.
    pub const BATCH: usize = COMMIT_PER_PASS;

    /// Opens a socket in the network namespace of the calling thread, and asks the kernel
    /// whether it will answer.
    pub fn open() -> Result<Committer, KernelError> {
        Ok(Committer::over(NetlinkEntries::open()?))
    }

    /// The port id in the events that this committer's writes cause.
    pub fn port_id(&self) -> u32 {
        self.kernel.port_id()
    }
}

impl<E: Entries> Committer<E> {
    /// A pen for these entries.
    pub fn over(kernel: E) -> Committer<E> {
        Committer {
            kernel,
            entries: Vec::with_capacity(Committer::BATCH),
            tally: Tally::default(),
            refused: Vec::with_capacity(HELPERS_MAX),
        }
    }

    /// Entries that may still be inserted, and entries that the kernel allows (0: any number).
    pub fn room_and_limit(&self) -> (u64, u64) {
        self.kernel.room_and_limit()
    }

    /// Whether this address is this host's now, of an interface that is up: several system calls.
    pub fn has_address(&mut self, address: IpAddr) -> bool {
        self.kernel.has_address(address)
    }

    /// What timeouts the kernel gives, as far as it was read.
    pub fn timeouts(&self) -> &Timeouts {
        self.kernel.timeouts()
    }

    /// Reads some of the kernel's timeouts again, in turn, and tells what they are now.
    pub fn read_timeouts_again(&mut self, count: usize) -> &Timeouts {
        self.kernel.read_timeouts_again(count);
        self.kernel.timeouts()
    }

    /// The timeout of an entry whose active is dead. What the active's kernel had last given it, by
    /// a timeout policy perhaps, which cannot be restored, is what it last reported: kernels report
    /// the timeout with every change of state, and so right after the packet that brought it about.
    /// One that was read at another time had run down, and is less.
    fn normal_timeout(&self, connection: &Connection) -> u32 {
        let own = match connection.original.protocol {
            GRE => GRE_TIMEOUT_S,
            _ => self.kernel.timeouts().of(connection),
        };
        match connection.state.timeout_s {
            given if given <= GIVEN_MAX_S => own.max(given),
            _ => own,
        }
    }

    /// Entries in the batch.
    pub fn pending(&self) -> usize {
        self.entries.len()
    }

    /// Adds an entry to be written, created or brought up to date.
    pub fn write(&mut self, connection: &Connection, lifetime: Lifetime) -> Result<(), FlushFirst> {
        self.add_written(connection, lifetime, Step::Create)
    }

    /// Adds an entry to be written in place of whatever has its original tuple: for what an update
    /// cannot change.
    pub fn replace(
        &mut self,
        connection: &Connection,
        lifetime: Lifetime,
    ) -> Result<(), FlushFirst> {
        self.add_written(connection, lifetime, Step::Replace)
    }

    /// Adds an entry to be written unless packets have passed it since it was: then the kernel
    /// knows it better. One that was given its normal timeout has at most `silent_s` left if none
    /// has; 0: it was not.
    pub fn keep(
        &mut self,
        connection: &Connection,
        lifetime: Lifetime,
        silent_s: u32,
    ) -> Result<(), FlushFirst> {
        // What a packet gives may be what is left without one, as in the first second after that:
        // then nothing tells of it.
        let given_s = self.kernel.timeouts().of(connection);
        let is_told = silent_s + 1 < self.normal_timeout(connection)
            && !(silent_s.saturating_sub(READ_LATE_S)..=silent_s + 1).contains(&given_s);
        self.add_written(
            connection,
            lifetime,
            Step::Keep { silent_s: if is_told { silent_s } else { 0 } },
        )
    }

    /// Adds an entry to be brought up to date if it is there.
    pub fn update(
        &mut self,
        connection: &Connection,
        lifetime: Lifetime,
    ) -> Result<(), FlushFirst> {
        self.add_written(connection, lifetime, Step::Compare)
    }

    fn add_written(
        &mut self,
        connection: &Connection,
        lifetime: Lifetime,
        step: Step,
    ) -> Result<(), FlushFirst> {
        let timeout_s = match lifetime {
            Lifetime::Kept => KEPT_TIMEOUT_S,
            Lifetime::Normal => self.normal_timeout(connection),
            Lifetime::Rest(left_s) => left_s.min(self.normal_timeout(connection)),
        };
        let step = if is_shift_unknown(connection) { Step::Withdraw } else { step };
        let mut connection = *connection;
        let extra = &mut connection.extra;
        let is_without = extra.has(parts::HELPER) && self.refused.contains(&extra.helper);
        if is_without {
            extra.parts &= !parts::HELPER;
        }
        self.add(BatchEntry::new(connection, timeout_s, step != Step::Compare, step))?;
        self.tally.without_helper += is_without as u64;
        Ok(())
    }

    /// Adds an entry to be removed.
    pub fn delete(&mut self, original: &Tuple) -> Result<(), FlushFirst> {
        self.add_named(original, Step::Delete)
    }

    /// Adds an entry to be asked for.
    pub fn look(&mut self, original: &Tuple) -> Result<(), FlushFirst> {
        self.add_named(original, Step::Look)
    }

    fn add_named(&mut self, original: &Tuple, step: Step) -> Result<(), FlushFirst> {
        let connection = Connection::new(*original, original.mirrored(), Default::default());
        self.add(BatchEntry::new(connection, 0, false, step))
    }

    fn add(&mut self, entry: BatchEntry) -> Result<(), FlushFirst> {
        let name = &entry.connection.original;
        let is_there = self.entries.iter().any(|e| e.connection.original == *name);
        if is_there || self.entries.len() == Committer::BATCH {
            return Err(FlushFirst);
        }
        self.entries.push(entry);
        Ok(())
    }

    /// Hands the batch to the kernel and tells what became of each entry, in their order.
    pub fn flush(&mut self, results: &mut dyn FnMut(CommitResult)) -> Tally {
        if self.entries.is_empty() {
            return Tally::default();
        }
        self.respect_the_limit();
        for _ in 0..ROUNDS_MAX {
            if self.entries.iter().all(|e| matches!(e.step, Step::Done(_))) {
                break;
            }
            self.round();
        }
        for (index, entry) in self.entries.drain(..).enumerate() {
            let outcome = match entry.step {
                Step::Done(outcome) => outcome,
                _ => Outcome::Failed(libc::EAGAIN),
            };
            let (original, was_there) = (entry.connection.original, entry.was_there);
            let (silent_s, passed_s) = match (outcome, entry.is_touched) {
                (Outcome::Written, _) if entry.timeout_s > GIVEN_MAX_S => {
                    (0, entry.left_s.min(if entry.is_touched { u32::MAX } else { UNTOLD_S }))
                }
                (Outcome::Written, false) => (entry.timeout_s, 0),
                _ => (0, 0),
            };
            results(CommitResult { index, original, outcome, was_there, silent_s, passed_s });
        }
        std::mem::take(&mut self.tally)
    }

    /// Entries beyond the room in the kernel's table are only brought up to date.
    fn respect_the_limit(&mut self) {
        if !self.entries.iter().any(|e| e.step == Step::Create) {
            return;
        }
        let room = self.kernel.room_and_limit().0.min(Committer::BATCH as u64) as usize;
        for entry in self.entries.iter_mut().filter(|e| e.step == Step::Create).skip(room) {
            entry.may_create = false;
            entry.step = Step::Compare;
        }
    }

    /// Asks for what every unfinished entry needs next, and takes the answers.
    fn round(&mut self) {
        for (index, entry) in self.entries.iter().enumerate() {
            let BatchEntry { connection, timeout_s, .. } = entry;
            let (original, timeout_s) = (&connection.original, *timeout_s);
            let mut put = |request| self.kernel.put(index, request);
            match entry.step {
                Step::Create => put(Request::Create { connection, timeout_s }),
                Step::Keep { .. } | Step::Compare | Step::Look => put(Request::Get { original }),
                Step::Update { present } => put(Request::Update { connection, timeout_s, present }),
                Step::Replace => {
                    put(Request::Delete { original });
                    put(Request::Create { connection, timeout_s });
                }
                Step::Delete | Step::Withdraw => put(Request::Delete { original }),
                Step::Done(_) => {}
            }
        }
        let timeouts = *self.kernel.timeouts();
        match self.kernel.carry_out() {
            Ok(answers) => {
                for (entry, answer) in self.entries.iter_mut().zip(answers) {
                    if let Some(there) = answer.found.filter(is_touched) {
                        entry.is_touched |= entry.has_packets(&there);
                        if there.reply == entry.connection.reply && there.phase() != Phase::Over {
                            entry.left_s = there.state.timeout_s.max(1);
                        }
                        let given_s = timeouts.of(&there);
                        entry.is_fresh = there.state.timeout_s + FRESH_S >= given_s;
                    }
                    let next = entry.next_step(answer, &mut self.tally, &mut self.refused);
                    entry.was_there |= matches!(
                        (entry.step, next),
                        (Step::Update { .. }, Step::Done(Outcome::Written))
                            | (_, Step::Done(Outcome::AsItWas))
                    );
                    entry.step = next;
                }
            }
            Err(errno) => {
                for entry in &mut self.entries {
                    if !matches!(entry.step, Step::Done(_)) {
                        entry.step = Step::Done(Outcome::Failed(errno));
                    }
                }
            }
        }
    }
}

/// Whether this entry of the kernel translates anything: one that was made with a translated reply
/// tuple and without a translation looks as if it did.
pub fn translates(entry: &Connection) -> bool {
    entry.state.status & (status::SRC_NAT | status::DST_NAT) != 0
}

/// Whether the connection's sequence numbers are shifted, and by how much is not known.
fn is_shift_unknown(connection: &Connection) -> bool {
    connection.state.status & status::SEQ_ADJUST != 0 && !connection.extra.has(parts::SEQADJ)
}

impl BatchEntry {
    fn new(connection: Connection, timeout_s: u32, may_create: bool, step: Step) -> BatchEntry {
        BatchEntry {
            connection,
            timeout_s,
            may_create,
            step,
            was_there: false,
            is_touched: false,
            left_s: 0,
            is_fresh: false,
        }
    }

    /// Whether packets have passed the entry that is there.
    fn has_packets(&self, there: &Connection) -> bool {
        // A packet may give it less than the active's kernel had.
        let is_silent = |silent_s: u32| {
            silent_s > 0
                && (silent_s.saturating_sub(READ_LATE_S)..=silent_s)
                    .contains(&there.state.timeout_s)
        };
        is_touched(there) && !matches!(self.step, Step::Keep { silent_s } if is_silent(silent_s))
    }

    /// Without its helper, if it has one and this is how a kernel refuses a helper.
    fn drop_helper(
        &mut self,
        errno: i32,
        tally: &mut Tally,
        refused: &mut Vec<[u8; HELPER_NAME]>,
    ) -> bool {
        let is_helpers_fault = matches!(errno, libc::EOPNOTSUPP | libc::EAGAIN);
        let extra = &mut self.connection.extra;
        if !is_helpers_fault || !extra.has(parts::HELPER) {
            return false;
        }
        extra.parts &= !parts::HELPER;
        tally.without_helper += 1;
        // EAGAIN: a module was loaded just now, and the next one may have it.
        if errno == libc::EOPNOTSUPP
            && refused.len() < HELPERS_MAX
            && !refused.contains(&extra.helper)
        {
            refused.push(extra.helper);
        }
        true
    }

    /// Whether the entry that is there lacks the helper that this one should have.
    fn wants_a_helper_besides(&self, there: &Connection) -> bool {
        let wanted = &self.connection.extra;
        wanted.has(parts::HELPER)
            && (!there.extra.has(parts::HELPER) || there.extra.helper != wanted.helper)
    }

    /// Whether the entry that is there has no shift, and perhaps no room for one, of which no
    /// answer would tell.
    fn wants_a_shift_besides(&self, there: &Connection) -> bool {
        self.connection.extra.has(parts::SEQADJ) && !there.extra.has(parts::SEQADJ)
    }

    /// Whether the entry that is there is this connection's, and packets have passed it. One that
    /// has ended is no living copy's.
    fn is_known_better(&self, there: &Connection) -> bool {
        there.reply == self.connection.reply
            && self.has_packets(there)
            && (self.timeout_s != KEPT_TIMEOUT_S || there.phase() != Phase::Over)
    }

    /// Whether the entry that is there would go before its time: its active is dead, whose last
    /// packet may have been this moment.
    fn lasts_longer_than(&self, there: &Connection) -> bool {
        self.timeout_s != KEPT_TIMEOUT_S
            && self.timeout_s > there.state.timeout_s
            && self.connection.state.tcp_state == there.state.tcp_state
    }

    /// Whether the entry that is there is another connection's, and packets have passed it: whether
    /// that lives nobody knows here.
    fn is_anothers(&self, there: &Connection) -> bool {
        there.reply != self.connection.reply && is_touched(there) && there.phase() != Phase::Over
    }

    /// Whether the entry that is there shows the translated tuple, but translates nothing.
    fn wants_a_translation_besides(&self, there: &Connection) -> bool {
        self.connection.is_translated() && !translates(there)
    }

    /// Whether the entry that is there has a fixed timeout that is not, or will not be for long,
    /// the wanted one.
    fn wants_another_fixed_timeout(&self, there: &Connection) -> bool {
        let rest = there.state.timeout_s;
        there.state.status & status::FIXED_TIMEOUT != 0
            && (self.timeout_s < rest || self.timeout_s / 2 > rest)
    }

    fn next_step(
        &mut self,
        answers: Answers,
        tally: &mut Tally,
        refused_helpers: &mut Vec<[u8; HELPER_NAME]>,
    ) -> Step {
        let refused = |errno| {
            Step::Done(match errno {
                libc::ENOMEM | libc::ENOSPC => Outcome::NoRoom,
                errno => Outcome::Failed(errno),
            })
        };
        match (self.step, answers.errno) {
            (Step::Done(outcome), _) => Step::Done(outcome),
            (Step::Create, [0, _]) => Step::Done(Outcome::Written),
            (Step::Update { .. }, [0, _]) => {
                tally.updated += 1;
                Step::Done(Outcome::Written)
            }
            (Step::Replace, [0 | libc::ENOENT, 0]) => {
                tally.replaced += 1;
                Step::Done(Outcome::Written)
            }
            (Step::Create, [errno, _]) if self.drop_helper(errno, tally, refused_helpers) => {
                Step::Create
            }
            (Step::Replace, [_, errno]) if self.drop_helper(errno, tally, refused_helpers) => {
                Step::Create
            }
            // The entry has no room for labels; everything else was applied.
            (Step::Update { .. }, [libc::ENOSPC, _])
                if self.connection.extra.has(parts::LABELS) =>
            {
                tally.without_labels += 1;
                Step::Done(Outcome::Written)
            }
            (Step::Look, [0, _]) => match answers.found {
                Some(there) => Step::Done(Outcome::Present(there)),
                None => refused(libc::EBADMSG),
            },
            (Step::Look, [libc::ENOENT, _]) => Step::Done(Outcome::Absent),
            (Step::Create, [libc::EEXIST, _]) => Step::Compare,
            (Step::Keep { .. }, [libc::ENOENT, _]) => Step::Create,
            (Step::Keep { .. }, [0, _])
                if answers.found.is_some_and(|there| self.is_known_better(&there)) =>
            {
                match answers.found {
                    Some(there) if self.lasts_longer_than(&there) => {
                        self.connection.state = there.state;
                        self.connection.extra.parts &= !parts::SEQADJ;
                        Step::Update { present: there.state.status }
                    }
                    _ => Step::Done(Outcome::AsItWas),
                }
            }
            (Step::Keep { .. } | Step::Compare, [0, _]) => match answers.found {
                Some(there) if self.is_anothers(&there) && self.is_fresh => {
                    Step::Done(Outcome::Another(there))
                }
                // (Its active is dead who had that one copied: it may be what packets come for.)
                Some(there) if self.is_anothers(&there) && self.step == Step::Compare => {
                    Step::Done(Outcome::Clash)
                }
                // A translation, a helper, a first shift or a fixed timeout cannot be given to an
                // entry that is there.
                Some(there)
                    if there.reply == self.connection.reply
                        && !self.wants_a_translation_besides(&there)
                        && !self.wants_a_helper_besides(&there)
                        && !self.wants_a_shift_besides(&there)
                        && !self.wants_another_fixed_timeout(&there) =>
                {
                    if there.extra.is_shifted_beyond(&self.connection.extra) {
                        self.connection.extra.parts &= !parts::SEQADJ;
                    }
                    Step::Update { present: there.state.status }
                }
                Some(_) => Step::Replace,
                None => refused(libc::EBADMSG),
            },
            (Step::Compare, [libc::ENOENT, _]) if self.may_create => Step::Done(Outcome::Clash),
            (Step::Compare, [libc::ENOENT, _]) => Step::Done(Outcome::NoRoom),
            // It went away, or changed its status, between two rounds.
            (Step::Update { .. }, [libc::ENOENT, _]) if self.may_create => {
                tally.vanished += 1;
                Step::Create
            }
            (Step::Update { .. }, [libc::EBUSY, _]) => {
                tally.busy += 1;
                Step::Compare
            }
            (Step::Replace, [0 | libc::ENOENT, libc::EEXIST]) => Step::Done(Outcome::Clash),
            (Step::Replace, [0 | libc::ENOENT, errno]) => refused(errno),
            (Step::Delete, [0 | libc::ENOENT, _]) => Step::Done(Outcome::Absent),
            (Step::Withdraw, [0 | libc::ENOENT, _]) => Step::Done(Outcome::Unshifted),
            (_, [errno, _]) => refused(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::State;

    /// A kernel with one entry at most, which answers as a real one does.
    struct Fake {
        there: Option<Connection>,
        timeouts: Timeouts,
        asked: Vec<(usize, Asked)>,
    }

    enum Asked {
        Create(Connection),
        Update(Connection),
        Get,
        Delete,
    }

    impl Entries for Fake {
        fn put(&mut self, index: usize, request: Request<'_>) {
            let asked = match request {
                Request::Create { connection, timeout_s } => {
                    Asked::Create(with_timeout(*connection, timeout_s))
                }
                Request::Update { connection, timeout_s, .. } => {
                    Asked::Update(with_timeout(*connection, timeout_s))
                }
                Request::Get { .. } => Asked::Get,
                Request::Delete { .. } => Asked::Delete,
            };
            self.asked.push((index, asked));
        }

        fn carry_out(&mut self) -> Result<[Answers; COMMIT_PER_PASS], i32> {
            let mut answers = [Answers::default(); COMMIT_PER_PASS];
            let mut last = None;
            for (index, asked) in self.asked.drain(..) {
                let errno = match (&asked, self.there) {
                    (Asked::Create(_), Some(_)) => libc::EEXIST,
                    (Asked::Create(_), None) | (_, Some(_)) => 0,
                    (_, None) => libc::ENOENT,
                };
                match asked {
                    _ if errno != 0 => {}
                    Asked::Get => answers[index].found = self.there,
                    Asked::Delete => self.there = None,
                    Asked::Create(connection) | Asked::Update(connection) => {
                        self.there = Some(connection)
                    }
                }
                answers[index].errno[(last == Some(index)) as usize] = errno;
                last = Some(index);
            }
            Ok(answers)
        }

        fn room_and_limit(&self) -> (u64, u64) {
            (100, 100)
        }

        fn has_address(&mut self, _: IpAddr) -> bool {
            false
        }

        fn timeouts(&self) -> &Timeouts {
            &self.timeouts
        }

        fn read_timeouts_again(&mut self, _: usize) {}
    }

    const ESTABLISHED_S: u32 = 300;

    fn connection(outside: u16, timeout_s: u32) -> Connection {
        let original = Tuple::v4(6, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2));
        let reply = Tuple::v4(6, ([10, 0, 0, 2].into(), 2), ([10, 0, 0, 9].into(), outside));
        let state = State { tcp_state: 3, status: 0xe, timeout_s, ..State::default() };
        Connection::new(original, reply, state)
    }

    fn with_timeout(mut connection: Connection, timeout_s: u32) -> Connection {
        connection.state.timeout_s = timeout_s;
        connection
    }

    fn committer(there: Connection) -> Committer<Fake> {
        let timeouts =
            Timeouts::told(&|name| (name == "tcp_timeout_established").then_some(ESTABLISHED_S));
        Committer::over(Fake { there: Some(there), timeouts, asked: Vec::new() })
    }

    fn result(committer: &mut Committer<Fake>) -> CommitResult {
        let mut result = None;
        committer.flush(&mut |of_entry| result = Some(of_entry));
        result.expect("one was asked for")
    }

    /// Traffic seed 1000021863: a gateway had taken over a connection in another translation than
    /// its own kernel's, whose packets passed there: the entry was replaced under them.
    #[test]
    fn another_connections_entry_that_a_packet_has_passed_just_now_is_not_replaced() {
        const FRESH: u32 = ESTABLISHED_S - FRESH_S;
        let wanted = connection(1, 0);
        for (left_s, kept, written) in [
            (FRESH, true, true),
            (FRESH - 1, false, true),
            (KEPT_TIMEOUT_S, false, false), // What another copy had.
        ] {
            let there = connection(2, left_s);
            let mut committer = self::committer(there);
            let is_there = |of: &Committer<Fake>| of.kernel.there == Some(there);
            assert_eq!(committer.write(&wanted, Lifetime::Kept), Ok(()));
            let outcome = result(&mut committer).outcome;
            assert_eq!(is_there(&committer), written, "{left_s}: {outcome:?}");
            assert_eq!(outcome == Outcome::Another(there), kept);
            committer.kernel.there = Some(there);
            assert_eq!(committer.keep(&wanted, Lifetime::Normal, 0), Ok(()));
            let outcome = result(&mut committer).outcome;
            assert_eq!(is_there(&committer), kept, "{left_s}: {outcome:?}");
            assert_eq!(outcome == Outcome::Another(there), kept);
        }
    }

    #[test]
    fn what_packets_had_left_an_entry_is_told_when_that_is_written_over() {
        let wanted = connection(1, 0);
        for (left_s, lifetime, told) in [
            (250, Lifetime::Kept, (0, 250)),
            (0, Lifetime::Kept, (0, 1)),
            (KEPT_TIMEOUT_S - 9, Lifetime::Kept, (0, 0)),
            (KEPT_TIMEOUT_S - 9, Lifetime::Normal, (ESTABLISHED_S, 0)),
            (KEPT_TIMEOUT_S - 9, Lifetime::Rest(20), (20, 0)),
            (KEPT_TIMEOUT_S - 9, Lifetime::Rest(2000), (ESTABLISHED_S, 0)),
            (250, Lifetime::Normal, (0, 0)),
        ] {
            let mut committer = self::committer(connection(1, left_s));
            assert_eq!(committer.write(&wanted, lifetime), Ok(()));
            let CommitResult { outcome, silent_s, passed_s, .. } = result(&mut committer);
            assert_eq!(outcome, Outcome::Written);
            assert_eq!((silent_s, passed_s), told, "{left_s} {lifetime:?}");
        }
        // What another connection had left, which is over (traffic seed 1000050600).
        let mut over = connection(2, 110);
        over.state.tcp_state = 7;
        let mut committer = self::committer(over);
        assert_eq!(committer.write(&wanted, Lifetime::Kept), Ok(()));
        let CommitResult { outcome, silent_s, passed_s, .. } = result(&mut committer);
        assert_eq!((outcome, silent_s, passed_s), (Outcome::Written, 0, 0));
        // It had been given its normal timeout, and no packet has passed, as far as can be told.
        for (left_s, told) in [(290, UNTOLD_S), (20, 20)] {
            let mut committer = self::committer(connection(1, left_s));
            assert_eq!(committer.keep(&wanted, Lifetime::Kept, left_s), Ok(()));
            let CommitResult { outcome, silent_s, passed_s, .. } = result(&mut committer);
            assert_eq!((outcome, silent_s, passed_s), (Outcome::Written, 0, told));
        }
    }
}
