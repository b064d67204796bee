//! Compare: how far the two sides of each stream are with finding out what differs.
//!
//! A digest is a question: "after number n my copies at you add up to this". An answer names the
//! buckets that differ. Then the active's side names what it has there, a **round** of items and an
//! end, and the backup's side asks again for what it does not hold so, and offers what was not
//! named.
//!
//! What always holds:
//!
//! 1. *A difference counts only if the next digest shows it again, in the same bucket*: claims and
//!    releases on their way make sums differ for a moment. While a pair is unverified, or was
//!    apart, one is enough.
//! 2. *An answer to a digest before the first that is unanswered says nothing*, and a comparison is
//!    asked for once at a time.
//! 3. *A copy that came after a comparison was asked for is not judged by its end*: its active may
//!    have named its copies before it sent this one.
//! 4. *What cannot be repaired is looked at ever more rarely*; what differs anew does not wait for
//!    that.
//! 5. *Lines, resends and findings have room for what is asked for at once*, and never grow.

use std::collections::VecDeque;
use std::time::Duration;

use super::sums::{Mask, both, either, has, without};
use crate::ccp::message::{Doubt, Place};
use crate::conn::Coordinate;
use crate::limits::{FINDINGS_MAX, ITEMS_MAX, MOVES_MAX, RESENDS_MAX};
use crate::seq::Seq;
use crate::time::Time;

/// How often a comparison was asked for is counted modulo this: walks that judge copies may be
/// behind, or dropped with their member, and a copy that came so many times ago must not be taken
/// for one that came just now.
const ASKS: u8 = 128;

/// Seen of a copy that was not compared yet: this and how often a comparison had been asked for
/// when it came. (Rounds are seen as 1 to 64.)
const FRESH: u8 = u8::MAX - (ASKS - 1);
const _: () = assert!(ROUNDS < FRESH);

/// A pair that has not agreed after so many digests counts as verified all the same.
const TRIES: u32 = 40;

/// Sweeps between two digests of a stream that is verified.
const REST: u32 = 4;

/// Digests of streams that carry nothing go out this much more rarely.
const IDLE: u32 = 8;

/// Rounds, before their number begins anew.
const ROUNDS: u8 = 64;

/// What an answer to a digest means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    /// Nothing: it is one to a question of before, or the walk that names what is there is under
    /// way.
    Nothing,
    /// Both sides agree.
    Agreed,
    /// What the active has in these buckets is to be named: a round begins.
    Differs,
}

/// What a digest of the active's says here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Heard {
    /// Both sides agree.
    Agrees,
    /// They differ, which may be for a moment only, or was answered before.
    MayDiffer,
    /// They differ, and the active is to be told where.
    Differs,
}

/// What the end of a round says of a copy here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Judgement {
    /// It was named, or is not in these buckets.
    Stands,
    /// It came too late to be judged.
    TooLate,
    /// Its active did not name it.
    Unseen,
}

/// How far the comparisons of one stream are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Comparing {
    /// Sending: whether some of what was sent may not be what the sums say, until everything dirty
    /// went out.
    is_unsure: bool,
    /// Sending: whether the pair must agree before its connections count as protected.
    is_unverified: bool,
    /// Sending: whether a digest is to be sent.
    is_due: bool,
    /// Sending: sweeps since the last digest.
    rested: u32,
    /// Sending: digests since the stream became unverified.
    tries: u32,
    /// Sending: the number of the first digest that was not answered.
    asked: Option<Seq>,
    /// Sending: the buckets of the walk under way, if `is_walking`, and its round.
    mask: Mask,
    is_walking: bool,
    round: u8,
    /// Receiving: digests in a row that differed, and the buckets of the last one.
    differed: u32,
    suspect: Mask,
    /// Receiving: buckets that were compared since they differ.
    compared: Mask,
    /// Receiving: how often a comparison was asked for, modulo [`ASKS`]; all that is asked between
    /// two ends counts as once.
    asks: u8,
    /// Receiving: whether one was since the last end.
    is_asked: bool,
    /// Receiving: what `asks` was before the last end. The next one may belong to that, too.
    asked_before: Option<u8>,
    /// Receiving: copies that came since `asks` was this the last end does not judge.
    judged_until: u8,
    /// Receiving: the answer that is due.
    answer: Option<(Seq, Mask)>,
    /// Receiving: what is left to be offered after the end of a round.
    unseen: Mask,
    unseen_seen: u8,
    /// Receiving: whether this side took the other for silent, or either let go of something, and
    /// no digest agreed since.
    is_apart: bool,
    /// Receiving: whether differences are no surprise, since the pair was apart.
    is_expected: bool,
}

impl Comparing {
    /// What was sent may not be what the sums say: a datagram was given up, or memory taken up
    /// again.
    pub(super) fn doubt_sums(&mut self) {
        self.is_unsure = true;
    }

    /// Nothing is dirty any more: what was sent is what the sums say.
    pub(super) fn trust_sums(&mut self) {
        self.is_unsure = false;
    }

    /// What was agreed on may have been let go on either side. Whether it was verified before.
    pub(super) fn unverify(&mut self) -> bool {
        let was_verified = !self.is_unverified;
        (self.is_unverified, self.tries, self.is_apart) = (true, 0, true);
        self.asked = None;
        was_verified
    }

    /// Both sides agree, or nothing more can be done about it. Whether that is news.
    pub(super) fn verify(&mut self) -> bool {
        std::mem::replace(&mut self.is_unverified, false)
    }

    /// Whether the pair must agree before its connections count as protected.
    pub(super) fn is_unverified(&self) -> bool {
        self.is_unverified
    }

    /// The member is not there: nothing is compared with it. What is counted of rounds goes on: an
    /// end may still be on its way.
    pub(super) fn cut_off(&mut self) {
        let Comparing { round, asks, is_asked, asked_before, .. } = *self;
        let asked_before = asked_before.or(is_asked.then_some(asks));
        *self = Comparing { round, asks, asked_before, ..Comparing::default() };
        (self.is_unsure, self.is_apart) = (true, true);
    }

    // The active's side.

    /// Time passes, of which a stream that carries connections sends a digest after four sweeps.
    /// Whether one is due.
    pub(super) fn rest(&mut self, carries: bool) -> bool {
        self.rested += 1;
        let enough = match (self.is_unverified, carries) {
            (true, _) => 1,
            (false, false) => REST * IDLE,
            (false, true) => REST,
        };
        let has_rested = self.rested >= enough;
        self.is_due |= has_rested;
        has_rested
    }

    /// Whether a digest is to be sent.
    pub(super) fn is_due(&self) -> bool {
        self.is_due
    }

    /// Whether one can be: the sums surely say what was sent.
    pub(super) fn can_ask(&self) -> bool {
        self.is_due && !self.is_unsure
    }

    /// A digest was sent, at this number. Whether it is hopeless that this pair will agree: what
    /// differs still cannot be mended, and must not keep the rest exposed.
    pub(super) fn asked(&mut self, seq: Seq) -> bool {
        (self.is_due, self.rested, self.tries) = (false, 0, self.tries.saturating_add(1));
        self.asked.get_or_insert(seq);
        self.is_unverified && self.tries > TRIES
    }

    /// The backup's side says where it holds something else.
    pub(super) fn on_answer(&mut self, seq: Seq, mask: Mask) -> Answer {
        if self.asked.is_none_or(|asked| asked.is_after(seq)) {
            return Answer::Nothing;
        }
        self.asked = None;
        if mask == Mask::default() {
            return Answer::Agreed;
        }
        if self.is_walking {
            return Answer::Nothing;
        }
        (self.is_walking, self.mask, self.round) = (true, mask, (self.round + 1) % ROUNDS);
        Answer::Differs
    }

    /// The round under way, if the copy in this slot of the backup belongs to it.
    pub(super) fn round_of(&self, slot: u32) -> Option<u8> {
        has(&self.mask, slot).then_some(self.round)
    }

    /// All of the round was named: what its end says.
    pub(super) fn end_round(&mut self) -> (u8, Mask) {
        self.is_walking = false;
        (self.round, self.mask)
    }

    // The backup's side.

    /// The active's digest, as of this number, differs from what is held here in these buckets;
    /// `unverified`: it must agree before its connections count as protected.
    pub(super) fn on_digest(&mut self, seq: Seq, mask: Mask, unverified: bool) -> Heard {
        if mask == Mask::default() {
            (self.differed, self.suspect, self.compared) = (0, mask, mask);
            self.is_apart = false;
            if unverified {
                self.answer = Some((seq, mask));
            }
            return Heard::Agrees;
        }
        let again = both(&mask, &self.suspect);
        self.suspect = mask;
        self.compared = both(&mask, &self.compared);
        self.is_expected = unverified || self.is_apart;
        let mut report = if unverified { mask } else { again };
        self.differed = if report == Mask::default() { 0 } else { self.differed.saturating_add(1) };
        if !self.differed.is_power_of_two() {
            report = without(&report, &self.compared);
        }
        if report == Mask::default() {
            return Heard::MayDiffer;
        }
        self.answer = Some((seq, report));
        Heard::Differs
    }

    /// Whether an answer is due.
    pub(super) fn has_answer(&self) -> bool {
        self.answer.is_some()
    }

    /// The answer that is due, on its way now.
    pub(super) fn take_answer(&mut self) -> Option<(Seq, Mask)> {
        let (seq, mask) = self.answer.take()?;
        if mask != Mask::default() && !std::mem::replace(&mut self.is_asked, true) {
            self.asks = (self.asks + 1) % ASKS;
        }
        Some((seq, mask))
    }

    /// What is to be noted of a copy that comes now, as seen.
    pub(super) fn seen_fresh(&self) -> u8 {
        FRESH + self.asks
    }

    /// What is to be noted of a copy that was named in this round.
    pub(super) fn seen_in(round: u8) -> u8 {
        round + 1
    }

    /// What is to be noted of a copy that was judged, so that it is not taken for a fresh one when
    /// the count comes round.
    pub(super) fn seen_aged(seen: u8) -> u8 {
        if seen >= FRESH { 0 } else { seen }
    }

    /// The active has named all its copies in these buckets.
    pub(super) fn on_end(&mut self, round: u8, mask: Mask) {
        (self.unseen, self.unseen_seen) = (mask, Comparing::seen_in(round));
        self.judged_until = self.asked_before.unwrap_or(self.asks);
        if std::mem::replace(&mut self.is_asked, false) {
            self.asked_before = Some(self.asks);
        }
        self.compared = either(&self.compared, &mask);
    }

    /// What the last end says of the copy in this slot, of which this was noted as seen.
    pub(super) fn judge(&self, slot: u32, seen: u8) -> Judgement {
        if seen >= FRESH {
            let age = |asks: u8| (self.asks + (ASKS - asks)) % ASKS;
            if age(seen - FRESH) <= age(self.judged_until) {
                return Judgement::TooLate;
            }
        }
        match has(&self.unseen, slot) && seen != self.unseen_seen {
            true => Judgement::Unseen,
            false => Judgement::Stands,
        }
    }

    /// Whether what differs here is no surprise: the pair was apart, or one of its processes was
    /// killed.
    pub(super) fn is_expected(&self) -> bool {
        self.is_expected || self.is_apart
    }
}

/// A message of a round that waits to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum RoundPart {
    /// This connection, as it is then.
    Item { own: Place, round: u8 },
    /// All in these buckets was named.
    End { round: u8, mask: Mask },
}

/// A copy that was not what its active takes it for: found by a digest, and being repaired.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finding {
    /// The active has it at `active`; the copy at `here` is not that, or none. Found by the active.
    Differs {
        /// Where the copy should be.
        here: Coordinate,
        /// Where its active has it.
        active: Coordinate,
    },
    /// A copy here that its active does not count on. Found by the copy's member.
    Orphan {
        /// Where the copy is.
        here: Coordinate,
        /// Where its active was.
        active: Coordinate,
    },
}

/// What waits of all streams' comparisons: lines, of one stream after the other; connections that
/// their active has to send again; and what was found, for the log.
pub(super) struct Comparisons {
    lines: VecDeque<(u16, RoundPart)>,
    resends: Vec<(u16, Place, Doubt)>,
    findings: VecDeque<(Finding, bool)>,
    /// When the streams are looked at next.
    sweep_at: Time,
}

impl Comparisons {
    pub(super) fn new() -> Comparisons {
        Comparisons {
            // Beside items there may be what waits for its release, and an end.
            lines: VecDeque::with_capacity(ITEMS_MAX + MOVES_MAX + 1),
            resends: Vec::with_capacity(RESENDS_MAX),
            findings: VecDeque::with_capacity(FINDINGS_MAX),
            sweep_at: Time(0),
        }
    }

    /// Whether the streams are to be looked at now; if so, they are again after this period.
    pub(super) fn begin_sweep(&mut self, now: Time, period: Duration) -> bool {
        let is_due = self.sweep_at.reached(now);
        if is_due {
            self.sweep_at = now.after(period);
        }
        is_due
    }

    /// When the streams are looked at next.
    pub(super) fn sweep_at(&self) -> Time {
        self.sweep_at
    }

    /// This is to be sent on a stream, behind what waits.
    pub(super) fn say(&mut self, stream: usize, line: RoundPart) {
        self.lines.push_back((stream as u16, line));
    }

    /// The next line is on its way.
    pub(super) fn said(&mut self) {
        self.lines.pop_front();
    }

    /// Items that a walk may still add.
    pub(super) fn items_left(&self) -> usize {
        ITEMS_MAX.saturating_sub(self.lines.len())
    }

    /// Whether so much waits that no round can end now.
    pub(super) fn is_behind(&self) -> bool {
        self.lines.len() > ITEMS_MAX
    }

    /// The peer of this stream has to send a connection of its own again.
    pub(super) fn resend(&mut self, stream: usize, own: Place, doubt: Doubt) {
        self.resends.push((stream as u16, own, doubt));
    }

    /// How many more of those may wait.
    pub(super) fn resends_left(&self) -> usize {
        RESENDS_MAX.saturating_sub(self.resends.len())
    }

    /// Nothing of these streams waits any more.
    pub(super) fn drop_those(&mut self, is_void: impl Fn(usize) -> bool) {
        self.lines.retain(|(stream, _)| !is_void(*stream as usize));
        self.resends.retain(|(stream, ..)| !is_void(*stream as usize));
    }

    /// The stream whose line is next.
    pub(super) fn next_stream(&self) -> Option<usize> {
        self.lines.front().map(|(stream, _)| *stream as usize)
    }

    /// The next line, if it is this stream's.
    pub(super) fn next_line(&self, stream: usize) -> Option<RoundPart> {
        self.lines.front().filter(|(of, _)| *of as usize == stream).map(|(_, line)| *line)
    }

    /// The next connection that the peer of this stream has to send again.
    pub(super) fn take_resend(&mut self, stream: usize) -> Option<(Place, Doubt)> {
        let at = self.resends.iter().position(|(of, ..)| *of as usize == stream)?;
        let (_, own, doubt) = self.resends.swap_remove(at);
        Some((own, doubt))
    }

    /// Whether the peer of this stream has any connection to send again.
    pub(super) fn has_resend(&self, stream: usize) -> bool {
        self.resends.iter().any(|(of, ..)| *of as usize == stream)
    }

    /// Notes what was found, for the log; of what is found faster than it is logged the rest is
    /// left out.
    pub(super) fn find(&mut self, finding: Finding, is_expected: bool) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push_back((finding, is_expected));
        }
    }

    /// The next one of those.
    pub(super) fn poll_finding(&mut self) -> Option<(Finding, bool)> {
        self.findings.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Mask = [0; 4];
    const SOME: Mask = [0b1, 0, 0, 0];
    const OTHER: Mask = [0b10, 0, 0, 0];

    fn seq(n: u64) -> Seq {
        Seq::NONE.plus(n)
    }

    /// A backup that was apart from its active no more.
    fn agreed() -> Comparing {
        let mut comparing = Comparing::default();
        assert_eq!(comparing.on_digest(seq(1), NONE, false), Heard::Agrees);
        comparing
    }

    #[test]
    fn a_difference_counts_if_the_next_digest_shows_it_in_the_same_bucket() {
        let mut backup = agreed();
        assert_eq!(backup.on_digest(seq(2), SOME, false), Heard::MayDiffer);
        assert_eq!(
            backup.on_digest(seq(3), OTHER, false),
            Heard::MayDiffer,
            "another one, for a moment"
        );
        assert_eq!(backup.on_digest(seq(4), NONE, false), Heard::Agrees);
        assert_eq!(backup.on_digest(seq(5), SOME, false), Heard::MayDiffer);
        assert!(!backup.has_answer());
        assert_eq!(backup.on_digest(seq(6), either(&SOME, &OTHER), false), Heard::Differs);
        assert_eq!(backup.take_answer(), Some((seq(6), SOME)));
        assert!(!backup.is_expected());
    }

    #[test]
    fn while_a_pair_is_unverified_one_difference_is_enough_and_agreement_is_answered() {
        let mut backup = agreed();
        assert_eq!(backup.on_digest(seq(2), SOME, true), Heard::Differs);
        assert!(backup.is_expected());
        assert_eq!(backup.take_answer(), Some((seq(2), SOME)));
        assert_eq!(backup.on_digest(seq(3), NONE, true), Heard::Agrees);
        assert_eq!(backup.take_answer(), Some((seq(3), NONE)));
    }

    #[test]
    fn what_cannot_be_repaired_is_looked_at_ever_more_rarely_and_what_is_new_at_once() {
        let mut backup = agreed();
        let mut told = Vec::new();
        for n in 0..40 {
            if backup.on_digest(seq(2 + n), SOME, true) == Heard::Differs {
                backup.take_answer();
                backup.on_end(0, SOME);
                told.push(n + 1);
            }
        }
        assert_eq!(told, [1, 2, 4, 8, 16, 32]);
        assert_eq!(backup.on_digest(seq(50), either(&SOME, &OTHER), true), Heard::Differs);
        assert_eq!(backup.take_answer(), Some((seq(50), OTHER)));
    }

    #[test]
    fn a_digest_is_due_by_what_the_stream_carries_and_not_before_its_sums_are_sure() {
        for (unverified, carries, sweeps) in
            [(false, true, 4), (false, false, 32), (true, true, 1), (true, false, 1)]
        {
            let mut active = Comparing::default();
            active.cut_off();
            if unverified {
                assert!(active.unverify());
            }
            let due = (1..).find(|_| active.rest(carries)).expect("it is due in time");
            assert_eq!(due, sweeps, "{unverified} {carries}");
            assert!(active.is_due() && !active.can_ask(), "something may be on its way");
            active.trust_sums();
            assert!(active.can_ask());
            active.asked(seq(1));
            assert!(!active.is_due());
        }
    }

    #[test]
    fn only_an_answer_to_a_question_of_now_begins_a_round_and_one_at_a_time() {
        let mut active = Comparing::default();
        assert_eq!(active.on_answer(seq(9), SOME), Answer::Nothing, "nobody asked");
        active.asked(seq(5));
        active.asked(seq(7));
        assert_eq!(active.on_answer(seq(4), SOME), Answer::Nothing, "to one before");
        assert_eq!(active.on_answer(seq(5), SOME), Answer::Differs);
        assert_eq!((active.round_of(0), active.round_of(1)), (Some(1), None));
        active.asked(seq(8));
        assert_eq!(active.on_answer(seq(8), OTHER), Answer::Nothing, "it is being named");
        assert_eq!(active.end_round(), (1, SOME));
        active.asked(seq(9));
        assert_eq!(active.on_answer(seq(9), OTHER), Answer::Differs);
        assert_eq!(active.end_round(), (2, OTHER));
        active.asked(seq(10));
        assert_eq!(active.on_answer(seq(10), NONE), Answer::Agreed);
    }

    #[test]
    fn a_pair_that_never_agrees_is_given_up_after_a_while() {
        let mut active = Comparing::default();
        active.unverify();
        let tries = (1..).find(|n| active.asked(seq(*n)));
        assert_eq!(tries, Some(TRIES as u64 + 1));
        assert!(active.verify() && !active.verify());
        assert!(!active.asked(seq(99)));
    }

    #[test]
    fn an_end_judges_what_was_there_when_the_comparison_was_asked_for() {
        let mut backup = agreed();
        let before = backup.seen_fresh();
        backup.on_digest(seq(2), SOME, true);
        backup.take_answer();
        let after = backup.seen_fresh();
        backup.on_end(3, SOME);
        assert_eq!(backup.judge(0, before), Judgement::Unseen);
        assert_eq!(backup.judge(0, after), Judgement::TooLate);
        assert_eq!(backup.judge(0, Comparing::seen_in(3)), Judgement::Stands);
        assert_eq!(
            backup.judge(0, Comparing::seen_in(2)),
            Judgement::Unseen,
            "named once, and not now"
        );
        assert_eq!(backup.judge(1, before), Judgement::Stands, "not in these buckets");
    }

    /// Seed 992010016: the walks that judge copies were behind, and a copy that nobody counted on
    /// came to look as if it had just come, since a comparison had been asked for four times.
    #[test]
    fn a_copy_does_not_grow_young_while_the_walks_that_judge_it_are_behind() {
        for asked in 2..100 {
            let mut backup = agreed();
            let came = backup.seen_fresh();
            for n in 0..asked {
                backup.on_digest(seq(2 + n), [1 << (n % 64), n, 0, 0], true);
                backup.take_answer();
                backup.on_end(3, SOME);
            }
            assert_eq!(backup.judge(0, came), Judgement::Unseen, "asked for {asked} times");
        }
    }

    #[test]
    fn an_end_that_was_on_its_way_when_the_pair_came_apart_judges_nothing_that_came_later() {
        let mut backup = agreed();
        backup.on_digest(seq(2), SOME, true);
        backup.take_answer();
        backup.cut_off();
        let late = backup.seen_fresh();
        backup.on_digest(seq(3), SOME, true);
        backup.take_answer();
        backup.on_end(1, SOME);
        assert_eq!(
            backup.judge(0, late),
            Judgement::TooLate,
            "it may be the end of the one before"
        );
        assert!(backup.is_expected());
    }
}
