//! The inbox: what was received on each stream, and what the sender is to be told of it.
//!
//! The numbers received lie in memory that outlives the process: everything up to the *floor* is
//! received and applied, or was skipped, and one bit each tells of those beyond. Acks and refusals
//! wait here for the next control datagram.
//!
//! What always holds:
//!
//! 1. *A number is received once*, and only within the window: what comes again, or from far ahead,
//!    is refused before anything of it is applied.
//! 2. *An ack means applied*: a number is noted after all of its datagram was.
//! 3. *The floor never goes back* within a session of the peer's; a new session begins at zero.
//! 4. *Refusals are bounded*; one that finds no room is found again when its datagram is repeated.

use super::mutation::{Mutation, is};
use super::stream::Durable;
use crate::ccp::Reject;
use crate::ccp::message::{Place, Reason};
use crate::limits::{REFUSALS_MAX, STREAMS_MAX, WINDOW};
use crate::memory::StreamWords;
use crate::seq::Seq;

/// A refusal that waits to be told to the active.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The datagram that brought the delta.
    pub seq: Seq,
    /// The target that it named.
    pub target: Place,
    /// Why.
    pub reason: Reason,
    /// Where the active has the connection, if it was a new.
    pub own: Option<Place>,
}

/// Bits of the numbers received beyond the floor, 64 a word.
pub(super) type Beyond = [u64; (WINDOW / 64) as usize];

/// What the session that a datagram names is to the one that is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Session {
    /// The session that is known.
    Known,
    /// The first one.
    First,
    /// A later one: what was agreed on in the one before has ended.
    Anew,
}

/// What is private to the process of one stream.
struct Receiving {
    is_ack_due: bool,
    refusals: Vec<Refusal>,
}

/// What a shard has received.
pub(super) struct Inbox<'m> {
    words: &'m [StreamWords],
    streams: Vec<Receiving>,
}

impl<'m> Inbox<'m> {
    pub(super) fn new(words: &'m [StreamWords]) -> Inbox<'m> {
        let stream = || Receiving { is_ack_due: false, refusals: Vec::with_capacity(REFUSALS_MAX) };
        Inbox { words, streams: (0..STREAMS_MAX).map(|_| stream()).collect() }
    }

    fn durable(&self, stream: usize) -> Durable<'m> {
        Durable(&self.words[stream])
    }

    // Sessions.

    /// The sender says that its half of the stream is in this session. A later one begins now; an
    /// earlier one is refused.
    pub(super) fn on_session(&mut self, stream: usize, session: u16) -> Result<Session, Reject> {
        let known = self.durable(stream).peer_session();
        if session == known && session != 0 {
            return Ok(Session::Known);
        }
        let is_earlier = known != 0 && session.wrapping_sub(known) > u16::MAX / 2;
        if is_earlier && session != 0 && is(Mutation::SessionUnchecked) {
            return Ok(Session::Known);
        }
        if session == 0 || is_earlier {
            return Err(Reject::Table);
        }
        self.durable(stream).begin_peer_session(session);
        self.streams[stream].refusals.clear();
        Ok(if known == 0 { Session::First } else { Session::Anew })
    }

    /// The peer has another table: its first datagram begins a session.
    pub(super) fn await_session(&self, stream: usize) {
        self.durable(stream).begin_peer_session(0);
    }

    /// The peer is silent: it is told nothing.
    pub(super) fn fall_silent(&mut self, stream: usize) {
        self.streams[stream].refusals.clear();
        self.streams[stream].is_ack_due = false;
    }

    /// The process was killed and goes on: it says what it has.
    pub(super) fn resume(&mut self, stream: usize) {
        self.durable(stream).resume_floor();
        self.streams[stream].is_ack_due = self.durable(stream).peer_session() != 0;
    }

    // Receiving.

    /// A datagram with this number came: whether it is to be applied. An ack is due even if it came
    /// before, for the ack that was sent then may have been lost.
    pub(super) fn on_datagram(&mut self, stream: usize, seq: Seq) -> Result<(), Reject> {
        self.streams[stream].is_ack_due = true;
        let durable = self.durable(stream);
        if durable.is_received(seq) && !is(Mutation::RepeatedApplied) {
            return Err(Reject::Repeated);
        }
        if seq.beyond(durable.receive_floor()) > WINDOW && !is(Mutation::WindowUnchecked) {
            return Err(Reject::Window);
        }
        Ok(())
    }

    /// All of the datagram with this number was applied.
    pub(super) fn applied(&mut self, stream: usize, seq: Seq) {
        self.durable(stream).receive(seq);
    }

    /// The sender does not wait for what is missing up to this number.
    pub(super) fn skip(&mut self, stream: usize, to: Seq) -> Result<(), Reject> {
        if to.beyond(self.durable(stream).receive_floor()) > WINDOW {
            return Err(Reject::Window);
        }
        self.durable(stream).skip(to);
        self.streams[stream].is_ack_due = true;
        Ok(())
    }

    /// A delta in it was refused.
    pub(super) fn refuse(&mut self, stream: usize, refusal: Refusal) {
        let refusals = &mut self.streams[stream].refusals;
        if refusals.len() < REFUSALS_MAX {
            refusals.push(refusal);
        }
    }

    /// Whether everything before this number is received, or was skipped.
    pub(super) fn is_next(&self, stream: usize, seq: Seq) -> bool {
        self.durable(stream).receive_floor().next() == seq
    }

    /// Whether exactly what was sent up to this number is received, or was skipped.
    pub(super) fn is_at(&self, stream: usize, seq: Seq) -> bool {
        self.durable(stream).receive_floor() == seq && self.has_no_gap(stream)
    }

    /// Whether nothing was received beyond the floor.
    pub(super) fn has_no_gap(&self, stream: usize) -> bool {
        self.durable(stream).beyond(&mut [0; (WINDOW / 64) as usize]) == 0
    }

    // What the sender is told.

    /// Whether the sender is to be told anything.
    pub(super) fn is_busy(&self, stream: usize) -> bool {
        self.streams[stream].is_ack_due || !self.streams[stream].refusals.is_empty()
    }

    /// The floor, and the bits of what was received beyond it, of which so many words are to be
    /// told.
    pub(super) fn received(&self, stream: usize) -> (Seq, Beyond, usize) {
        let mut beyond = [0; (WINDOW / 64) as usize];
        let words = self.durable(stream).beyond(&mut beyond);
        let floor = self.durable(stream).receive_floor();
        let is_wrong = is(Mutation::AckSkipsGap) && words > 0;
        (if is_wrong { floor.next() } else { floor }, beyond, words)
    }

    /// The refusals that wait, each once.
    pub(super) fn take_refusals(&mut self, stream: usize) -> impl Iterator<Item = Refusal> + '_ {
        self.streams[stream].refusals.drain(..)
    }

    /// The ack is on its way.
    pub(super) fn acked(&mut self, stream: usize) {
        self.streams[stream].is_ack_due = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: usize = 5;

    fn words() -> Vec<StreamWords> {
        (0..STREAM + 1).map(|_| StreamWords::default()).collect()
    }

    fn seq(n: u64) -> Seq {
        Seq::NONE.plus(n)
    }

    fn receive(inbox: &mut Inbox<'_>, n: u64) -> Result<(), Reject> {
        inbox.on_datagram(STREAM, seq(n))?;
        inbox.applied(STREAM, seq(n));
        Ok(())
    }

    #[test]
    fn a_number_is_received_once_and_asks_for_an_ack_each_time() {
        let words = words();
        let mut inbox = Inbox::new(&words);
        assert!(!inbox.is_busy(STREAM));
        assert_eq!(receive(&mut inbox, 1), Ok(()));
        inbox.acked(STREAM);
        assert_eq!(receive(&mut inbox, 1), Err(Reject::Repeated));
        assert!(inbox.is_busy(STREAM), "the ack may have been lost");
        assert_eq!(receive(&mut inbox, 1 + WINDOW), Ok(()));
        assert_eq!(receive(&mut inbox, 2 + WINDOW), Err(Reject::Window));
    }

    #[test]
    fn what_was_refused_is_not_received_and_comes_again() {
        let words = words();
        let mut inbox = Inbox::new(&words);
        let place = Place { slot: 3, generation: Default::default() };
        let refusal = Refusal { seq: seq(1), target: place, reason: Reason::NotHere, own: None };
        assert_eq!(inbox.on_datagram(STREAM, seq(1)), Ok(()));
        for _ in 0..REFUSALS_MAX + 1 {
            inbox.refuse(STREAM, refusal);
        }
        inbox.acked(STREAM);
        assert!(inbox.is_busy(STREAM));
        assert_eq!(inbox.take_refusals(STREAM).count(), REFUSALS_MAX, "the rest is found again");
        assert!(!inbox.is_busy(STREAM));
        assert_eq!(inbox.on_datagram(STREAM, seq(1)), Ok(()));
    }

    #[test]
    fn the_floor_waits_for_a_gap_and_a_skip_ends_that() {
        let words = words();
        let mut inbox = Inbox::new(&words);
        for n in [1, 3] {
            assert_eq!(receive(&mut inbox, n), Ok(()));
        }
        let (floor, beyond, words) = inbox.received(STREAM);
        assert_eq!((floor, beyond[0], words), (seq(1), 0b10, 1));
        assert!(inbox.is_next(STREAM, seq(2)) && !inbox.is_at(STREAM, seq(1)), "3 is there");
        assert_eq!(inbox.skip(STREAM, seq(2)), Ok(()));
        assert!(inbox.is_at(STREAM, seq(3)));
        assert_eq!(inbox.skip(STREAM, seq(4 + WINDOW)), Err(Reject::Window));
    }

    #[test]
    fn a_later_session_begins_anew_and_an_earlier_one_is_refused() {
        let words = words();
        let mut inbox = Inbox::new(&words);
        assert_eq!(inbox.on_session(STREAM, 0), Err(Reject::Table));
        assert_eq!(inbox.on_session(STREAM, 7), Ok(Session::First));
        assert_eq!(receive(&mut inbox, 1), Ok(()));
        assert_eq!(inbox.on_session(STREAM, 7), Ok(Session::Known));
        assert_eq!(inbox.on_session(STREAM, 6), Err(Reject::Table));
        assert_eq!(inbox.on_session(STREAM, 9), Ok(Session::Anew));
        assert_eq!(inbox.received(STREAM).0, Seq::NONE);
        assert_eq!(receive(&mut inbox, 1), Ok(()));
        inbox.await_session(STREAM);
        assert_eq!(inbox.on_session(STREAM, 3), Ok(Session::First), "another table's");
    }

    #[test]
    fn who_is_silent_is_told_nothing_and_who_goes_on_says_what_it_has() {
        let words = words();
        let mut inbox = Inbox::new(&words);
        assert_eq!(inbox.on_session(STREAM, 7), Ok(Session::First));
        assert_eq!(receive(&mut inbox, 1), Ok(()));
        inbox.fall_silent(STREAM);
        assert!(!inbox.is_busy(STREAM));
        let mut inbox = Inbox::new(&words);
        inbox.resume(STREAM);
        assert!(inbox.is_busy(STREAM) && inbox.is_at(STREAM, seq(1)));
    }
}
