//! The outbox: what was sent on each stream, what of it is acknowledged, and what is to be sent
//! again.
//!
//! It stands on the [history](super::history), which has the bytes. Of each stream the datagrams
//! that are neither acknowledged nor given up form a chain, oldest first. A cumulative ack (the
//! *floor*) retires all up to it; what arrived beyond is known by its bits; what several later ones
//! overtook, or what no ack came for in time, is retransmitted.
//!
//! What always holds, and is asserted where it could break:
//!
//! 1. *The chain of a stream is what lies above its floor and above what was given up*, in order,
//!    without a gap.
//! 2. *Every connection in a chain counts as unacknowledged*, of its stream and of all, until it is
//!    retired.
//! 3. *A datagram is given up only after what it carried is dirty again*: the caller sees its
//!    contents first.
//! 4. *Where anything is outstanding there is a time to retransmit*: at most one retransmission
//!    timeout after the floor last moved, after the last retransmission, or after a datagram was
//!    sent while nothing else was outstanding. Where the peer waits for what was given up, or has
//!    not answered yet in this session, there is a time to say skip.
//! 5. *The window is halved once for all that was on its way when a loss was noticed*, and is never
//!    below its least.

use std::time::Duration;

use super::history::{Content, Datagram, History, NoRoom};
use super::stream::Durable;
use crate::few::Few;
use crate::limits::{STREAMS_MAX, WINDOW, WINDOW_MIN};
use crate::memory::StreamWords;
use crate::seq::Seq;
use crate::time::Time;

/// A datagram that this many later ones overtook is taken for lost.
const OVERTAKEN: u64 = 3;

/// Datagrams that may wait at once to be retransmitted without waiting for the timeout. Further
/// ones wait for it.
const OVERTAKEN_MAX: usize = WINDOW as usize;

/// Datagrams that a timeout retransmits.
const PER_TIMEOUT: usize = 4;

/// How long a datagram may stay unacknowledged before the arena takes its room back.
const PRESSURE: Duration = Duration::from_millis(200);

/// How long a send that the kernel's queue did not take waits.
pub(super) const NOT_TAKEN: Duration = Duration::from_millis(1);

/// Room for a datagram in the arena.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Room {
    /// Here, bytes from its begin.
    At(u32),
    /// If everything up to this datagram of this stream is given up, there may be.
    IfGivenUp(usize, Seq),
    /// Not now.
    None,
}

/// What is private to the process of one stream.
struct SendState {
    /// The datagrams that are outstanding: the first of the chain, and the last.
    oldest: Option<u32>,
    newest: Option<u32>,
    /// Datagrams that may be on their way.
    window: u64,
    /// From here on the window grows slowly.
    slow_from: u64,
    /// Acknowledged datagrams that did not yet add up to a larger window.
    grown: u64,
    /// The number up to which a loss was already answered with a smaller window.
    shrunk_at: Seq,
    /// Smoothed round trip, ns; 0 before the first sample.
    round_trip: u64,
    /// When to retransmit what was not acknowledged.
    retransmit_at: Time,
    /// How often that was done without any progress.
    timeouts: u32,
    /// When to say what to skip, if the peer is to be told that.
    skip_at: Time,
    /// How often that was said without any progress.
    skips: u32,
    /// Whether the peer has acknowledged anything in this session, so that it knows of it.
    is_established: bool,
    /// Connections in what is outstanding.
    unacknowledged: u64,
}

impl SendState {
    fn new() -> SendState {
        SendState {
            oldest: None,
            newest: None,
            window: 128,
            slow_from: WINDOW,
            grown: 0,
            shrunk_at: Seq::NONE,
            round_trip: 0,
            retransmit_at: Time::NEVER,
            timeouts: 0,
            skip_at: Time(0),
            skips: 0,
            is_established: true,
            unacknowledged: 0,
        }
    }

    /// A sample of the round trip.
    fn sample(&mut self, round_trip: Duration) {
        let ns = round_trip.as_nanos() as u64;
        self.round_trip =
            if self.round_trip == 0 { ns } else { self.round_trip - self.round_trip / 8 + ns / 8 };
    }

    /// The retransmission timeout.
    fn timeout(&self) -> Duration {
        self.backed_off(self.timeouts)
    }

    /// Four round trips, at least 10 ms (a peer may be in the middle of a long pass), doubled each
    /// time without progress, at most 400 ms.
    fn backed_off(&self, times: u32) -> Duration {
        let base = (4 * self.round_trip).clamp(10_000_000, 100_000_000);
        Duration::from_nanos((base << times.min(5)).min(400_000_000))
    }

    /// Progress of the floor by `n` datagrams widens the window: by as many up to `slow_from`, then
    /// by one a window.
    fn widen(&mut self, n: u64) {
        if self.window < self.slow_from {
            self.window += n;
        } else {
            self.grown += n;
            if self.grown >= self.window {
                self.grown -= self.window;
                self.window += 1;
            }
        }
        self.window = self.window.min(WINDOW);
    }

    /// Loss among what was sent up to `seq` halves the window, once for all that was on its way
    /// when it was noticed (`sent` is the newest number then).
    fn shrink(&mut self, seq: Seq, sent: Seq) {
        if seq.is_after(self.shrunk_at) {
            self.window = (self.window / 2).max(WINDOW_MIN);
            self.slow_from = self.window;
            self.shrunk_at = sent;
        }
    }
}

/// What a shard has sent.
pub(super) struct Outbox<'m> {
    history: History<'m>,
    words: &'m [StreamWords],
    streams: Vec<SendState>,
    /// Datagrams that later ones overtook: to be retransmitted without waiting, the last one first.
    overtaken: Vec<(u32, Seq)>,
    unacknowledged: u64,
}

impl<'m> Outbox<'m> {
    pub(super) fn new(history: History<'m>, words: &'m [StreamWords]) -> Outbox<'m> {
        Outbox {
            history,
            words,
            streams: (0..STREAMS_MAX).map(|_| SendState::new()).collect(),
            overtaken: Vec::with_capacity(OVERTAKEN_MAX),
            unacknowledged: 0,
        }
    }

    fn durable(&self, stream: usize) -> Durable<'m> {
        Durable(&self.words[stream])
    }

    // What is outstanding.

    /// Whether anything is.
    pub(super) fn is_outstanding(&self, stream: usize) -> bool {
        self.streams[stream].oldest.is_some()
    }

    /// Connections in what is outstanding, on all streams.
    pub(super) fn unacknowledged(&self) -> u64 {
        self.unacknowledged
    }

    /// Connections in what is outstanding, on this stream.
    pub(super) fn unacknowledged_on(&self, stream: usize) -> u64 {
        self.streams[stream].unacknowledged
    }

    /// The oldest datagram that is outstanding.
    pub(super) fn oldest(&self, stream: usize) -> Option<(u32, Datagram)> {
        self.streams[stream].oldest.map(|id| (id, self.history.entry(id)))
    }

    /// When the oldest change was made that the oldest of them carries.
    pub(super) fn oldest_change(&self, stream: usize) -> Option<Time> {
        self.streams[stream].oldest.map(|id| self.history.oldest_change(id))
    }

    /// The datagram with this number, if it is outstanding.
    pub(super) fn find(&self, stream: usize, seq: Seq) -> Option<u32> {
        self.chain(stream).find(|id| self.history.entry(*id).seq == seq)
    }

    fn chain(&self, stream: usize) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(self.streams[stream].oldest, |id| self.history.next(*id))
    }

    /// What a datagram carries.
    pub(super) fn contents(&self, id: u32) -> impl Iterator<Item = Content> + use<'m> {
        self.history.contents(id)
    }

    /// All datagrams that the history has, oldest first.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> + use<'m> {
        self.history.ids()
    }

    /// What is known of a datagram.
    pub(super) fn entry(&self, id: u32) -> Datagram {
        self.history.entry(id)
    }

    /// Changes something in a datagram that is to be sent again; see [`History::amend`].
    pub(super) fn amend(&mut self, id: u32, change: impl FnOnce(&mut [u8]) -> bool) {
        self.history.amend(id, change);
    }

    // Sending.

    /// Whether the stream may send another datagram now.
    pub(super) fn has_window(&self, stream: usize) -> bool {
        let durable = self.durable(stream);
        durable.sent().beyond(durable.floor()) < self.streams[stream].window.min(WINDOW)
    }

    /// Where the next datagram goes.
    pub(super) fn room(&mut self, now: Time) -> Room {
        match self.history.make_room() {
            Ok(offset) => Room::At(offset),
            Err(NoRoom::Unacknowledged(id)) => {
                let entry = self.history.entry(id);
                let is_late = now.since(entry.first_sent) >= PRESSURE;
                if is_late { Room::IfGivenUp(entry.stream, entry.seq) } else { Room::None }
            }
            Err(NoRoom::InFlight) => Room::None,
        }
    }

    /// Notes what the datagram being built carries.
    pub(super) fn note(&mut self, content: Content) {
        self.history.note(content);
    }

    /// A datagram, the next one of its stream, is sent: see [`History::append`]. Returns its number
    /// in the history.
    pub(super) fn append(
        &mut self,
        entry: &Datagram,
        bytes: &[u8],
        stride: usize,
        oldest_change: Time,
        connections: u32,
    ) -> u32 {
        assert!(
            entry.seq == self.durable(entry.stream).sent().next(),
            "a stream's datagrams have no gap"
        );
        let id = self.history.append(entry, bytes, stride, oldest_change, connections);
        self.durable(entry.stream).set_sent(entry.seq);
        if !self.is_outstanding(entry.stream) {
            let sending = &mut self.streams[entry.stream];
            sending.retransmit_at = entry.first_sent.after(sending.timeout());
        }
        self.link(entry.stream, id, connections);
        id
    }

    /// A datagram of memory that is taken up again is outstanding, the newest one of its stream.
    pub(super) fn take_up(&mut self, id: u32, connections: u32) {
        self.history.take_up(id, connections);
        self.link(self.history.entry(id).stream, id, connections);
    }

    fn link(&mut self, stream: usize, id: u32, connections: u32) {
        self.unacknowledged += connections as u64;
        let sending = &mut self.streams[stream];
        sending.unacknowledged += connections as u64;
        match sending.newest {
            Some(newest) => self.history.set_next(newest, id),
            None => sending.oldest = Some(id),
        }
        sending.newest = Some(id);
    }

    /// The kernel is done with one send of so many datagrams from this one on, of those that are
    /// one behind the other.
    pub(super) fn on_send_complete(&mut self, first: u32, count: u32) {
        for i in 0..count {
            self.history.on_send_complete((first + i) % self.history.size());
        }
    }

    /// A control buffer with these bytes, and where it lies in the arena; `None` if all are on
    /// their way out.
    pub(super) fn control(&mut self, bytes: &[u8]) -> Option<(u16, u32)> {
        let buffer = self.history.take_control()?;
        Some((buffer, self.history.write_control(buffer, bytes)))
    }

    /// A control buffer is free again.
    pub(super) fn give_control(&mut self, buffer: u16) {
        self.history.give_control(buffer);
    }

    // Acks.

    /// The peer has everything up to this number. `retired` is told of each datagram since when the
    /// oldest change that it carried had waited, and how many connections it carried. Whether that
    /// is news.
    pub(super) fn on_floor(
        &mut self,
        now: Time,
        stream: usize,
        floor: Seq,
        mut retired: impl FnMut(Duration, u32),
    ) -> bool {
        let durable = self.durable(stream);
        assert!(!floor.is_after(durable.sent()), "the caller saw that it was sent");
        if !floor.is_after(durable.floor()) {
            return false;
        }
        let progress = floor.beyond(durable.floor());
        durable.set_floor(floor);
        while let Some((id, entry)) = self.oldest(stream)
            && !entry.seq.is_after(floor)
        {
            retired(now.since(self.history.oldest_change(id)), self.history.connections(id));
            if self.history.sends(id) == 1 {
                self.streams[stream].sample(now.since(entry.first_sent));
            }
            self.settle_oldest(stream);
        }
        let sending = &mut self.streams[stream];
        sending.widen(progress);
        (sending.timeouts, sending.skips) = (0, 0);
        if sending.oldest.is_some() {
            sending.retransmit_at = now.after(sending.timeout());
        }
        true
    }

    /// What arrived beyond the floor, 64 numbers a word, need not be retransmitted; what several
    /// later ones overtook is retransmitted at once.
    pub(super) fn on_beyond(
        &mut self,
        now: Time,
        stream: usize,
        beyond: impl Iterator<Item = u64>,
    ) {
        let mut words = [0u64; (WINDOW / 64) as usize];
        let mut highest = 0;
        for (i, (into, word)) in words.iter_mut().zip(beyond).enumerate() {
            *into = word;
            if word != 0 {
                highest = 64 * i as u64 + 64 - word.leading_zeros() as u64;
            }
        }
        let (floor, sent) = (self.durable(stream).floor(), self.durable(stream).sent());
        let round_trip = self.streams[stream].round_trip.max(500_000);
        let mut next = self.streams[stream].oldest;
        while let Some(id) = next
            && highest > 0
        {
            let seq = self.history.entry(id).seq;
            let at = seq.beyond(floor);
            if at == 0 || at > highest {
                break;
            }
            let bit = at - 1;
            if words[(bit / 64) as usize] >> (bit % 64) & 1 == 1 {
                self.history.set_arrived(id);
            } else if highest - at >= OVERTAKEN
                && now.since(self.history.last_sent(id)).as_nanos() as u64 >= round_trip
                && self.overtaken.len() < OVERTAKEN_MAX
                && !self.overtaken.contains(&(id, seq))
            {
                self.overtaken.push((id, seq));
                self.streams[stream].shrink(seq, sent);
            }
            next = self.history.next(id);
        }
    }

    /// The oldest datagram of the stream is given up: what it carried is dirty again.
    pub(super) fn give_up_oldest(&mut self, now: Time, stream: usize) {
        let (_, entry) = self.oldest(stream).expect("the caller saw what it carried");
        self.settle_oldest(stream);
        self.durable(stream).set_given_up(entry.seq);
        self.streams[stream].skip_at = now;
    }

    fn settle_oldest(&mut self, stream: usize) {
        let id = self.streams[stream].oldest.expect("something is outstanding");
        let connections = self.history.retire(id) as u64;
        self.unacknowledged -= connections;
        let sending = &mut self.streams[stream];
        sending.unacknowledged -= connections;
        sending.oldest = self.history.next(id);
        if sending.oldest.is_none() {
            sending.newest = None;
            sending.retransmit_at = Time::NEVER;
        }
    }

    // Retransmission.

    /// The next of those that were overtaken, if it is still outstanding.
    pub(super) fn next_overtaken(&mut self) -> Option<u32> {
        while let Some((id, seq)) = self.overtaken.pop() {
            if self.history.is_outstanding(id) && self.history.entry(id).seq == seq {
                return Some(id);
            }
        }
        None
    }

    /// What a timeout retransmits now; `None` before its time, or if nothing is outstanding.
    pub(super) fn due_again(&mut self, now: Time, stream: usize) -> Option<Few<u32, PER_TIMEOUT>> {
        if !self.streams[stream].retransmit_at.reached(now) {
            return None;
        }
        assert!(self.is_outstanding(stream), "there is a time for what is outstanding only");
        let mut due = Few::new();
        // The oldest goes even if it arrived: it asks for the ack that was lost.
        let missing = self
            .chain(stream)
            .enumerate()
            .filter(|(n, id)| *n == 0 || !self.history.has_arrived(*id));
        missing.take(PER_TIMEOUT).for_each(|(_, id)| due.push(id));
        Some(due)
    }

    /// All that was due again is on its way once more: the next timeout is later, and the window
    /// smaller.
    pub(super) fn timed_out(&mut self, now: Time, stream: usize) {
        let sent = self.durable(stream).sent();
        let oldest = self.oldest(stream).map(|(_, entry)| entry.seq);
        let sending = &mut self.streams[stream];
        if let Some(seq) = oldest {
            sending.shrink(seq, sent);
        }
        sending.timeouts += 1;
        sending.retransmit_at = now.after(sending.timeout());
    }

    /// The kernel's queue did not take what was due: a little later.
    pub(super) fn not_taken(&mut self, now: Time, stream: usize) {
        self.streams[stream].retransmit_at = now.after(NOT_TAKEN);
    }

    /// The datagram is sent again.
    pub(super) fn retransmitted(&mut self, now: Time, id: u32) {
        self.history.repeat(id, now);
    }

    /// When to retransmit.
    pub(super) fn retransmit_at(&self, stream: usize) -> Time {
        self.streams[stream].retransmit_at
    }

    /// Whether the last timeout, or what was said again, brought no progress so far.
    pub(super) fn has_timed_out(&self, stream: usize) -> bool {
        self.streams[stream].timeouts > 0 || self.streams[stream].skips > 1
    }

    // Sessions.

    /// What was given up and is still waited for by the peer. A new session greets the peer the
    /// same way.
    pub(super) fn skip_due(&self, stream: usize) -> Option<Seq> {
        let durable = self.durable(stream);
        let is_waited_for = durable.given_up().is_after(durable.floor());
        (is_waited_for || !self.is_established(stream)).then(|| durable.given_up())
    }

    /// When to say that; `NEVER` if nothing is to be said.
    pub(super) fn skip_at(&self, stream: usize) -> Time {
        self.skip_due(stream).map_or(Time::NEVER, |_| self.streams[stream].skip_at)
    }

    /// The peer was told to skip. It is told again, unless it answers.
    pub(super) fn skip_said(&mut self, now: Time, stream: usize) {
        let sending = &mut self.streams[stream];
        sending.skips += 1;
        sending.skip_at = now.after(sending.backed_off(sending.skips));
    }

    /// It could not be told: a little later.
    pub(super) fn skip_not_taken(&mut self, now: Time, stream: usize) {
        self.streams[stream].skip_at = now.after(NOT_TAKEN);
    }

    /// Whether the peer has acknowledged anything in this session.
    pub(super) fn is_established(&self, stream: usize) -> bool {
        self.streams[stream].is_established
    }

    /// The peer has acknowledged something of this session.
    pub(super) fn establish(&mut self, stream: usize) {
        self.streams[stream].is_established = true;
    }

    /// Sending begins anew: the peer is to be told so. Everything of the session before was given
    /// up.
    pub(super) fn begin_session(&mut self, now: Time, stream: usize) {
        assert!(!self.is_outstanding(stream), "the caller gave up what was outstanding");
        let sending = &mut self.streams[stream];
        (sending.is_established, sending.timeouts) = (false, 0);
        (sending.skips, sending.skip_at) = (0, now);
    }

    /// The process was killed and goes on: it says skip until the peer has answered, so both know
    /// at once where they stand.
    pub(super) fn resume_session(&mut self, now: Time, stream: usize) {
        let is_established = self.durable(stream).peer_table() == 0;
        let sending = &mut self.streams[stream];
        (sending.is_established, sending.skip_at) = (is_established, now);
        if sending.oldest.is_some() {
            sending.retransmit_at = now;
        }
    }

    /// The peer was away and is back: what it missed is sent at once. Tells how many datagrams that
    /// are. [`oldest_first`](Self::oldest_first) follows.
    pub(super) fn catch_up(&mut self, now: Time, stream: usize) -> u64 {
        let before = self.overtaken.len();
        let mut next = self.streams[stream].oldest;
        while let Some(id) = next
            && self.overtaken.len() < OVERTAKEN_MAX
        {
            if !self.history.has_arrived(id) {
                self.overtaken.push((id, self.history.entry(id).seq));
            }
            next = self.history.next(id);
        }
        let sending = &mut self.streams[stream];
        (sending.timeouts, sending.skips, sending.skip_at) = (0, 0, now);
        if sending.oldest.is_some() {
            sending.retransmit_at = now;
        }
        (self.overtaken.len() - before) as u64
    }

    /// Of what is to be retransmitted the oldest goes first.
    pub(super) fn oldest_first(&mut self) {
        self.overtaken.reverse();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::DATAGRAM_MAX;
    use crate::memory::{MemorySize, OwnedMemory};

    const STREAM: usize = 5;

    fn memory() -> OwnedMemory {
        OwnedMemory::new(&MemorySize::new(64, 1 << 20))
    }

    fn outbox(memory: &OwnedMemory) -> Outbox<'_> {
        let parts = memory.parts();
        Outbox::new(History::new(&parts), parts.streams)
    }

    fn at(ms: u64) -> Time {
        Time(1).after(Duration::from_millis(ms))
    }

    fn seq(n: u64) -> Seq {
        Seq::NONE.plus(n)
    }

    /// Sends a datagram with so many connections, whose change was made just then.
    fn send(outbox: &mut Outbox<'_>, now: Time, connections: u32) -> u32 {
        let Room::At(offset) = outbox.room(now) else { panic!("the arena has room") };
        let seq = outbox.durable(STREAM).sent().next();
        let entry = Datagram { stream: STREAM, session: 1, seq, offset, len: 100, first_sent: now };
        let id = outbox.append(&entry, &[0xa5; 100], DATAGRAM_MAX, now, connections);
        outbox.on_send_complete(id, 1);
        id
    }

    fn ack(outbox: &mut Outbox<'_>, now: Time, floor: u64) -> Vec<(Duration, u32)> {
        let mut retired = Vec::new();
        outbox.on_floor(now, STREAM, seq(floor), |delay, connections| {
            retired.push((delay, connections))
        });
        retired
    }

    fn again(outbox: &mut Outbox<'_>, now: Time) -> Vec<u64> {
        let due = outbox.due_again(now, STREAM);
        due.iter().flat_map(|due| due.iter()).map(|id| outbox.entry(*id).seq.raw()).collect()
    }

    #[test]
    fn an_ack_settles_all_up_to_it_and_says_how_long_that_took() {
        let memory = memory();
        let mut outbox = outbox(&memory);
        for n in 0..3 {
            send(&mut outbox, at(n), 10);
        }
        assert_eq!((outbox.unacknowledged(), outbox.unacknowledged_on(STREAM)), (30, 30));
        let retired = ack(&mut outbox, at(5), 2);
        assert_eq!(retired, [(Duration::from_millis(5), 10), (Duration::from_millis(4), 10)]);
        assert_eq!((outbox.unacknowledged(), outbox.oldest_change(STREAM)), (10, Some(at(2))));
        assert_eq!(ack(&mut outbox, at(6), 2), [], "known");
        ack(&mut outbox, at(6), 3);
        assert!(!outbox.is_outstanding(STREAM));
        assert_eq!(outbox.retransmit_at(STREAM), Time::NEVER, "nothing waits");
    }

    #[test]
    fn what_is_not_acknowledged_in_time_goes_again_each_time_later() {
        let memory = memory();
        let mut outbox = outbox(&memory);
        for _ in 0..6 {
            send(&mut outbox, at(0), 1);
        }
        let mut now = outbox.retransmit_at(STREAM);
        assert_eq!(now, at(10));
        for timeout in [20, 40, 80, 160, 320, 320] {
            assert_eq!(again(&mut outbox, Time(now.0 - 1)), [0; 0]);
            assert_eq!(again(&mut outbox, now), [1, 2, 3, 4]);
            outbox.timed_out(now, STREAM);
            assert!(outbox.has_timed_out(STREAM));
            assert_eq!(outbox.retransmit_at(STREAM), now.after(Duration::from_millis(timeout)));
            now = outbox.retransmit_at(STREAM);
        }
        ack(&mut outbox, now, 1);
        assert!(!outbox.has_timed_out(STREAM), "that is progress");
        outbox.not_taken(now, STREAM);
        assert_eq!(outbox.retransmit_at(STREAM), now.after(NOT_TAKEN));
    }

    #[test]
    fn a_timeout_leaves_out_what_arrived_but_for_the_oldest_which_asks_for_the_ack() {
        let memory = memory();
        let mut outbox = outbox(&memory);
        for _ in 0..5 {
            send(&mut outbox, at(0), 1);
        }
        outbox.on_beyond(at(0), STREAM, [0b01011].into_iter());
        assert_eq!(again(&mut outbox, at(10)), [1, 3, 5]);
    }

    #[test]
    fn what_three_later_ones_overtook_goes_again_at_once_unless_it_was_sent_just_now() {
        let memory = memory();
        let mut outbox = outbox(&memory);
        for _ in 0..6 {
            send(&mut outbox, at(0), 1);
        }
        let window = outbox.streams[STREAM].window;
        outbox.on_beyond(at(0), STREAM, [0b111000].into_iter());
        assert_eq!(outbox.next_overtaken(), None, "sent just now");
        for _ in 0..2 {
            outbox.on_beyond(at(1), STREAM, [0b111000].into_iter());
        }
        assert_eq!(outbox.streams[STREAM].window, window / 2, "once for all that was on its way");
        outbox.oldest_first();
        let mut gone = Vec::new();
        while let Some(id) = outbox.next_overtaken() {
            outbox.retransmitted(at(1), id);
            gone.push(outbox.entry(id).seq.raw());
        }
        assert_eq!(gone, [1, 2, 3]);
        outbox.on_beyond(at(1), STREAM, [0b111000].into_iter());
        assert_eq!(outbox.next_overtaken(), None);
    }

    #[test]
    fn what_was_acknowledged_since_it_was_overtaken_does_not_go_again() {
        let memory = memory();
        let mut outbox = outbox(&memory);
        for _ in 0..4 {
            send(&mut outbox, at(0), 1);
        }
        outbox.on_beyond(at(1), STREAM, [0b1000].into_iter());
        ack(&mut outbox, at(1), 4);
        assert_eq!(outbox.next_overtaken(), None);
    }

    #[test]
    fn what_is_given_up_is_skipped_until_the_peer_says_so() {
        let memory = memory();
        let mut outbox = outbox(&memory);
        for _ in 0..2 {
            send(&mut outbox, at(0), 10);
        }
        assert_eq!(outbox.skip_due(STREAM), None);
        outbox.give_up_oldest(at(3), STREAM);
        assert_eq!((outbox.skip_due(STREAM), outbox.unacknowledged()), (Some(seq(1)), 10));
        assert_eq!(outbox.skip_at(STREAM), at(3), "at once");
        // That one was refused says nothing of those behind it: they are not late.
        let window = outbox.streams[STREAM].window;
        assert_eq!((again(&mut outbox, at(3)), outbox.retransmit_at(STREAM)), (vec![], at(10)));
        outbox.give_up_oldest(at(3), STREAM);
        assert_eq!(outbox.retransmit_at(STREAM), Time::NEVER, "nothing is outstanding");
        for (now, next) in [(3, 23), (23, 63)] {
            outbox.skip_said(at(now), STREAM);
            assert_eq!((outbox.skip_at(STREAM), outbox.has_timed_out(STREAM)), (at(next), now > 3));
        }
        ack(&mut outbox, at(64), 2);
        assert_eq!((outbox.skip_due(STREAM), outbox.skip_at(STREAM)), (None, Time::NEVER));
        assert!(!outbox.has_timed_out(STREAM) && outbox.streams[STREAM].window >= window);
        assert_eq!(again(&mut outbox, at(500)), [0; 0]);
    }

    #[test]
    fn a_new_session_is_said_again_until_the_peer_answers() {
        let memory = memory();
        let mut outbox = outbox(&memory);
        outbox.begin_session(at(0), STREAM);
        assert_eq!((outbox.skip_due(STREAM), outbox.skip_at(STREAM)), (Some(Seq::NONE), at(0)));
        outbox.skip_said(at(0), STREAM);
        send(&mut outbox, at(1), 1);
        ack(&mut outbox, at(2), 1);
        assert_ne!(outbox.skip_at(STREAM), Time::NEVER, "it has not named the session yet");
        outbox.establish(STREAM);
        assert_eq!(outbox.skip_at(STREAM), Time::NEVER);
    }

    #[test]
    fn who_was_away_gets_all_that_it_missed_oldest_first() {
        let memory = memory();
        let mut outbox = outbox(&memory);
        for _ in 0..4 {
            send(&mut outbox, at(0), 1);
        }
        outbox.on_beyond(at(0), STREAM, [0b0010].into_iter());
        assert_eq!(outbox.catch_up(at(900), STREAM), 3);
        outbox.oldest_first();
        let gone: Vec<_> = std::iter::from_fn(|| outbox.next_overtaken()).collect();
        let numbers: Vec<_> = gone.iter().map(|id| outbox.entry(*id).seq.raw()).collect();
        assert_eq!(numbers, [1, 3, 4]);
        assert_eq!(outbox.retransmit_at(STREAM), at(900));
    }

    #[test]
    fn the_window_opens_with_acks_and_is_never_wider_than_a_peer_can_note() {
        let memory = memory();
        let mut outbox = outbox(&memory);
        let mut sent = 0;
        while outbox.has_window(STREAM) {
            send(&mut outbox, at(0), 0);
            sent += 1;
        }
        assert_eq!(sent, 128);
        ack(&mut outbox, at(1), 128);
        while outbox.has_window(STREAM) {
            send(&mut outbox, at(1), 0);
            sent += 1;
        }
        assert_eq!(sent, 128 + 256);
        let sending = &mut outbox.streams[STREAM];
        sending.widen(10 * WINDOW);
        assert_eq!(sending.window, WINDOW);
        for n in 1..20 {
            sending.shrink(seq(1000 * n), seq(1000 * n));
        }
        assert_eq!(sending.window, WINDOW_MIN);
        sending.widen(WINDOW_MIN - 1);
        assert_eq!(sending.window, WINDOW_MIN, "slowly, where it was lost before");
        sending.widen(1);
        assert_eq!(sending.window, WINDOW_MIN + 1);
    }

    #[test]
    fn a_full_arena_takes_back_what_has_waited_longest_after_a_while() {
        let memory = memory();
        let mut outbox = outbox(&memory);
        let full = loop {
            match outbox.room(at(0)) {
                Room::At(_) => send(&mut outbox, at(0), 0),
                full => break full,
            };
        };
        assert_eq!(full, Room::None);
        assert_eq!(outbox.room(at(199)), Room::None);
        assert_eq!(outbox.room(at(200)), Room::IfGivenUp(STREAM, seq(1)));
        outbox.give_up_oldest(at(200), STREAM);
        assert!(matches!(outbox.room(at(200)), Room::At(_)));
    }
}
