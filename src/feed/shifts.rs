//! Shifts: by how much helpers have moved sequence numbers, of which no event tells.
//!
//! A helper (FTP, SIP, IRC ...) that writes a translated address into a TCP stream makes it longer
//! or shorter, and from there on the kernel shifts the sequence numbers of the connection. A copy
//! without that shift, or with an older one, is worse than none: bytes would vanish from the
//! stream, or come twice, and nobody would notice. The kernel raises no event when a helper shifts,
//! so connections that have a helper are asked for:
//!
//! - right after an **expectation** of theirs. That has an event, and what a helper writes is
//!   mostly the address of a connection that it expects: so the shift is known within milliseconds;
//! - after an **event** that says that they are shifted, and does not say by how much;
//! - by a **walk** over all of them, once a second: there are protocols in which helpers write
//!   without expecting anything (SIP), and a question may come too early or find no place.
//!
//! What only may be carried here is asked for as well: copies whose active is silent, and what was
//! taken over from it. Their entries were written by us and say nothing about traffic, except if
//! they are shifted further than the copy: then the helper of this kernel did that, with a packet
//! that passed here.
//!
//! **Cost.** A question takes some 7 us. The walk asks 8 in a pass and 500 a second at most; with
//! more connections that have helpers it takes longer than a second. `shift_looks` counts the
//! questions, `shifts` the answers that were news.

use std::collections::VecDeque;
use std::time::Duration;

use super::asking::told_by_answer;
use crate::conn::extra::parts;
use crate::conn::slot::groups;
use crate::conn::tuple::TCP;
use crate::conn::{Connection, Generation, Kind, Tuple};
use crate::conntrack::codec::status;
use crate::counters::{Counter, Counters};
use crate::source::SourceEvent;
use crate::sync::Replica;
use crate::time::Time;

/// A helper shifts in the same breath in which it expects: so long after the event it has.
const PAUSE: Duration = Duration::from_millis(2);
/// The time from one walk's beginning to the next.
const WALK_PERIOD: Duration = Duration::from_secs(1);
/// The time from one walk's beginning to the next, if an expectation told of a connection that is
/// not known by that name.
const WALK_PERIOD_MIN: Duration = Duration::from_millis(100);
/// The pause between two steps of the walk.
const STEP_PAUSE: Duration = Duration::from_millis(16);
/// Connections that a step asks for at most.
pub(super) const LOOKS_PER_STEP: usize = 8;
/// Connections that a step meets at most: copies of others are not asked for.
const MEETINGS_PER_STEP: usize = 512;
/// Questions that wait for their time. What does not fit is left to the walk, which begins at once.
const DUE_MAX: usize = 1024;

/// What a shard does about shifts.
pub(super) struct Shifts {
    /// Slots whose connection may have a helper that shifts, as bits.
    helped: Vec<u64>,
    /// Connections to be asked for, and when; in the order of time.
    due: VecDeque<(Time, u32, Generation)>,
    /// Where the walk is, when it began, and whether it has met anybody.
    slot: u32,
    begun: Time,
    has_met: bool,
    /// How many it may still ask for, and meet, in this step.
    looks_left: usize,
    meetings_left: usize,
    /// The next walk begins soon.
    hurries: bool,
    /// When its next step is due; `NEVER` while nobody has a helper.
    at: Time,
}

impl Shifts {
    pub(super) fn new(capacity: u32) -> Shifts {
        Shifts {
            helped: vec![0; capacity.div_ceil(64) as usize],
            due: VecDeque::with_capacity(DUE_MAX),
            slot: 0,
            begun: Time(0),
            has_met: false,
            looks_left: 0,
            meetings_left: 0,
            hurries: false,
            at: Time::NEVER,
        }
    }

    /// When there is something to ask.
    pub(super) fn wake_at(&self) -> Time {
        self.due.front().map_or(self.at, |(at, ..)| self.at.min(*at))
    }

    /// Whether there is something to ask now.
    pub(super) fn is_due(&self, now: Time) -> bool {
        self.wake_at().reached(now)
    }

    /// The connection in this slot has, or is given, this: it is asked for from now on, if it has a
    /// helper that may shift.
    pub(super) fn note(&mut self, now: Time, slot: u32, connection: &Connection) {
        if connection.extra.has(parts::HELPER) && may_shift(connection) {
            self.helped[slot as usize / 64] |= 1 << (slot % 64);
            if self.at == Time::NEVER {
                self.at = now.after(WALK_PERIOD);
            }
        }
    }

    /// An event of the connection in this slot was acted on. One that says that it is shifted, and
    /// not by how much, makes it be asked for in this very pass: before the change travels.
    pub(super) fn saw(&mut self, now: Time, seen: &Connection, replica: &Replica<'_>) {
        let is_shifted =
            seen.state.status & status::SEQ_ADJUST != 0 && !seen.extra.has(parts::SEQADJ);
        if !seen.extra.has(parts::HELPER) && !is_shifted {
            return;
        }
        let Some(slot) = replica.table().find_original(&seen.original) else { return };
        let extra = replica.table().extra(slot);
        self.note(now, slot, &Connection { extra, ..*seen });
        // What has no helper (a SYN proxy's) is shifted once.
        if is_shifted && (extra.has(parts::HELPER) || !extra.has(parts::SEQADJ)) {
            self.ask(now, slot, replica);
        }
    }

    /// A helper expects a connection, on behalf of the one with this original tuple. In which zone
    /// that is the event does not tell.
    pub(super) fn expected(&mut self, now: Time, master: &Tuple, replica: &Replica<'_>) {
        match replica.table().find_original(master) {
            Some(slot) => self.ask(now.after(PAUSE), slot, replica),
            None => self.hurry(),
        }
    }

    fn ask(&mut self, at: Time, slot: u32, replica: &Replica<'_>) {
        let generation = replica.table().line(slot).generation();
        if self.due.iter().any(|(_, waits, of)| (*waits, *of) == (slot, generation)) {
            return;
        }
        if self.due.len() == DUE_MAX {
            return self.hurry();
        }
        // In the order of time: what has to be asked at once is few.
        let behind = self.due.iter().rposition(|(other, ..)| *other <= at).map_or(0, |i| i + 1);
        self.due.insert(behind, (at, slot, generation));
    }

    /// Somebody is to be asked for, and only the walk knows the way.
    fn hurry(&mut self) {
        self.hurries = true;
        if self.at != Time::NEVER && self.slot == 0 {
            self.at = self.at.min(self.begun.after(WALK_PERIOD_MIN));
        }
    }

    /// A question could not be put just now.
    pub(super) fn look_later(&mut self, now: Time, slot: u32, generation: Generation) {
        match self.due.len() == DUE_MAX {
            true => self.hurry(),
            false => self.due.push_front((now, slot, generation)),
        }
    }

    /// The next connection to be asked for.
    pub(super) fn next_look(
        &mut self,
        now: Time,
        replica: &Replica<'_>,
    ) -> Option<(u32, Generation)> {
        while let Some((at, slot, generation)) = self.due.front().copied()
            && at.reached(now)
        {
            self.due.pop_front();
            let line = replica.table().line(slot);
            if line.generation() == generation && line.kind().is_connection() {
                return Some((slot, generation));
            }
        }
        if self.at.reached(now) {
            if self.slot == 0 {
                (self.begun, self.has_met, self.hurries) = (now, false, false);
            }
            (self.looks_left, self.meetings_left) = (LOOKS_PER_STEP, MEETINGS_PER_STEP);
            self.at = now.after(STEP_PAUSE);
        }
        while self.looks_left > 0 && self.meetings_left > 0 {
            self.meetings_left -= 1;
            let Some(slot) = self.next_helped() else {
                self.walked(now);
                break;
            };
            self.slot = slot + 1;
            let table = replica.table();
            let kind = table.kind(slot);
            if !kind.is_connection()
                || !table.extra(slot).has(parts::HELPER)
                || !may_shift(&table.connection(slot))
            {
                self.helped[slot as usize / 64] &= !(1 << (slot % 64));
                continue;
            }
            self.has_met = true;
            let may_have_traffic = matches!(kind, Kind::Held | Kind::Active)
                || kind == Kind::Backup && !replica.is_living_copy(slot);
            if may_have_traffic {
                self.looks_left -= 1;
                return Some((slot, table.line(slot).generation()));
            }
        }
        None
    }

    /// The next slot of the walk that has its bit.
    fn next_helped(&self) -> Option<u32> {
        let first = self.slot as usize / 64;
        let words = self.helped.iter().enumerate().skip(first);
        words
            .map(|(i, word)| {
                (i, if i == first { word & u64::MAX << (self.slot % 64) } else { *word })
            })
            .find(|(_, word)| *word != 0)
            .map(|(i, word)| 64 * i as u32 + word.trailing_zeros())
    }

    /// The walk has come to the end.
    fn walked(&mut self, now: Time) {
        (self.slot, self.looks_left) = (0, 0);
        let period = if self.hurries { WALK_PERIOD_MIN } else { WALK_PERIOD };
        self.at = match self.has_met {
            true => self.begun.after(period).max(now.after(STEP_PAUSE)),
            false => Time::NEVER,
        };
    }

    /// The kernel's answer: the entry is there, like this.
    pub(super) fn found(
        &self,
        now: Time,
        (slot, generation): (u32, Generation),
        there: &Connection,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) {
        let table = replica.table();
        if table.line(slot).generation() != generation || table.tuples(slot).1 != there.reply {
            return;
        }
        let known = table.extra(slot);
        let is_news = match replica.is_unclaimed(slot) {
            true => there.extra.is_shifted_beyond(&known),
            false => {
                there.extra.has(parts::SEQADJ)
                    && (!known.has(parts::SEQADJ) || there.extra.seqadj != known.seqadj)
            }
        };
        if is_news {
            counters.count(Counter::Shifts);
            let known = groups::EXTRA | told_by_answer(slot, there, replica);
            replica.handle_source(now, &SourceEvent::Seen { connection: *there, known });
        }
    }
}

/// Whether a helper of this connection could shift: helpers write where something is translated,
/// and only TCP counts bytes.
fn may_shift(connection: &Connection) -> bool {
    connection.original.protocol == TCP && connection.is_translated()
}

#[cfg(test)]
#[path = "shifts_tests.rs"]
mod tests;
