//! Claims: an event at a copy says that something happened to its entry here, perhaps that its
//! traffic is here now.
//!
//! Events are read late: those of a process that stood still tell of a connection that ended long
//! ago, whose ports are used by another one since, and whose copy lies in this very entry. And an
//! entry changes without any packet: an operator marks it, or deletes it. So nothing is believed of
//! a copy whose active lives before the kernel was asked for its entry as it is now:
//!
//! | there is | the event is |
//! |---|---|
//! | an entry that a packet has passed since it was written | a claim, with the state that the entry has now |
//! | an entry whose timeout or mark another program wrote, and no packet told since | nobody's traffic, whatever timeout it has: it is written again |
//! | an entry as it was written | of before, or nobody's traffic: nothing is done |
//! | none, and its end was seen | a claim and a close |
//! | none, and its end was not seen | a copy without its entry: it is written again |
//! | none, and the event was another | nothing is done: the event of its end comes behind |
//!
//! If its active is dead an end is asked about as well: the entry may have been written again
//! since. Where there is none the copy has ended, unless the entry went that was written when its
//! active lived: somebody had shortened its time, and it is written again, with the normal one.
//! What was taken over, and has shown no traffic since, is asked about when its end was not seen:
//! its entry may have been written again as well.
//!
//! A copy may end between the event and the question, as its active tells that. Then what the event
//! told is of no copy; but if a connection began by it, that is the next one of the tuple, on the
//! very entry that is to be deleted. So it is looked for, and nothing is written or deleted before
//! all questions have been answered.

use std::collections::VecDeque;

use super::asking::told_by_answer;
use super::leaving::Leaving;
use crate::conn::slot::groups;
use crate::conn::table::Written;
use crate::conn::{Connection, Generation, Kind, Tuple};
use crate::conntrack::commit::is_touched;
use crate::counters::{Counter, Counters};
use crate::limits::INGEST_PER_PASS;
use crate::source::{End, SourceEvent};
use crate::sync::Replica;
use crate::time::Time;

/// Questions that may wait: what a pass can bring. With less room fewer events are read.
const QUESTIONS_MAX: usize = INGEST_PER_PASS;

/// What is to be asked about a copy.
#[derive(Clone, Copy)]
pub(super) struct Question {
    pub(super) slot: u32,
    pub(super) generation: Generation,
    original: Tuple,
    told: Told,
    /// An event said that a connection was just being opened.
    is_opening: bool,
}

/// What an event said of a copy's entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    Changed,
    /// By another program: no packet.
    Written,
    Ended(End),
}

impl Question {
    /// Whether its slot still has the copy that it is about.
    fn is_current(&self, replica: &Replica<'_>) -> bool {
        let line = replica.table().line(self.slot);
        line.generation() == self.generation
            && match self.told {
                Told::Ended(_) => replica.is_unclaimed(self.slot),
                Told::Written => line.kind() == Kind::Backup,
                Told::Changed => replica.is_living_copy(self.slot),
            }
    }
}

/// A shard's questions about copies.
pub(super) struct Claims {
    questions: VecDeque<Question>,
}

impl Claims {
    pub(super) fn new() -> Claims {
        Claims { questions: VecDeque::with_capacity(QUESTIONS_MAX) }
    }

    /// Questions that may be asked now. An event asks one at most.
    pub(super) fn room(&self) -> usize {
        QUESTIONS_MAX - self.questions.len()
    }

    /// An event about the copy in this slot, or about the connection in it that was taken over:
    /// the kernel is to be asked what it means.
    pub(super) fn ask(&mut self, slot: u32, replica: &Replica<'_>, told: Told, is_opening: bool) {
        let generation = replica.table().line(slot).generation();
        // Of one entry events come in a row.
        if let Some(last) = self.questions.back_mut()
            && (last.slot, last.generation) == (slot, generation)
        {
            if (last.told, told) != (Told::Changed, Told::Written) {
                last.told = told;
            }
            last.is_opening |= is_opening;
            return;
        }
        assert!(self.room() > 0, "no more events are read than may be asked about");
        let original = replica.table().tuples(slot).0;
        self.questions.push_back(Question { slot, generation, original, told, is_opening });
    }

    /// The next tuple whose entry is to be asked for: with the question, if its slot still has the
    /// same copy; without one, if a connection was opened over a copy which has ended since.
    pub(super) fn next(&mut self, replica: &Replica<'_>) -> Option<(Tuple, Option<Question>)> {
        while let Some(question) = self.questions.pop_front() {
            if question.is_current(replica) {
                return Some((question.original, Some(question)));
            }
            let has_ended = replica.table().line(question.slot).generation() != question.generation;
            if question.is_opening && has_ended {
                return Some((question.original, None));
            }
        }
        None
    }
}

/// The answer: the entry as it is, or that there is none.
pub(super) fn found(
    now: Time,
    question: Question,
    there: Option<&Connection>,
    leaving: &mut Leaving,
    replica: &mut Replica<'_>,
    counters: &Counters<'_>,
) {
    if !question.is_current(replica) {
        return;
    }
    let Question { slot, told, .. } = question;
    let lives = replica.is_living_copy(slot);
    let (original, line) = (replica.table().tuples(slot).0, replica.table().line(slot));
    let (state, is_copy) = (line.state(), line.kind() == Kind::Backup);
    let was_kept = !matches!(replica.table().written(slot), Written::No | Written::Normal);
    match (there, told) {
        // A timeout or a mark that another program writes is no packet; its active says what
        // belongs there.
        (Some(there), Told::Written) if there.state.tcp_state == state.tcp_state => {
            counters.count(Counter::ClaimsUnfounded);
            replica.recommit(now, slot);
        }
        // (Written while its active is silent, an entry has the normal timeout, which says
        // nothing.)
        (Some(there), told) if is_touched(there) && (lives || told == Told::Written) => {
            let known = groups::MARK | told_by_answer(slot, there, replica);
            replica.handle_source(now, &SourceEvent::Seen { connection: *there, known });
        }
        (Some(_), _) => counters.count(Counter::ClaimsUnfounded),
        (None, Told::Ended(End::Seen)) => replica.handle_source(now, &SourceEvent::gone(original)),
        (None, Told::Ended(End::Unseen { .. } | End::Left)) if lives || is_copy && was_kept => {
            replica.recommit(now, slot)
        }
        (None, Told::Ended(End::Unseen { left_s }))
            if leaving.ended(&original, left_s, replica) => {}
        (None, Told::Ended(end @ (End::Unseen { .. } | End::Left))) => {
            replica.handle_source(now, &SourceEvent::Gone { original, end })
        }
        (None, Told::Changed | Told::Written) => {} // Its end is told by an event behind this one; should that be lost, by the walk.
    }
}
