//! A stream: one shard of this member to one shard of a peer, and back.
//!
//! The durable half of a stream lies in shared memory: where sending and receiving stand. The
//! private half is what can be built again: lists, timers, the window.
//!
//! A stream has **sessions**. Numbers start from 1 in each; when a peer stays away so long that
//! what waits for it must be let go, the session ends, and with it everything that the pair had
//! agreed on: numbers, floor and leases. Every datagram names its session.

use std::sync::atomic::{AtomicU64, Ordering};

use super::compare::Comparing;
use super::full_sync::{Figures, SyncPhase};
use crate::conn::MemberId;
use crate::kill::kill_point;
use crate::limits::{SHARDS_MAX, WINDOW};
use crate::memory::StreamWords;
use crate::seq::Seq;
use crate::time::Time;
use crate::word::Word;

/// The stream to (and from) this shard of this member.
pub fn stream_index(member: MemberId, shard: u8) -> usize {
    (member as usize - 1) * SHARDS_MAX + shard as usize
}

/// The member of a stream.
pub fn stream_member(index: usize) -> MemberId {
    (index / SHARDS_MAX) as MemberId + 1
}

/// The peer's shard of a stream.
pub fn stream_shard(index: usize) -> u8 {
    (index % SHARDS_MAX) as u8
}

/// Word: this session of the sending half in the low 16 bits, of the receiving half above.
pub const WORD_SESSIONS: usize = 0;
/// Word: the number of the datagram sent last.
pub const WORD_SENT: usize = 1;
/// Word: the send floor: everything up to here is acknowledged.
pub const WORD_SEND_FLOOR: usize = 2;
/// Word: everything up to here that is not acknowledged was given up.
pub const WORD_GIVEN_UP: usize = 3;
/// Word: slots granted to this member since a session of either half began.
pub const WORD_GRANTED_TO_US: usize = 4;
/// Word: the peer's table id.
pub const WORD_PEER_TABLE: usize = 5;
/// Word: 1 while what was agreed with the peer is being let go, until the next session begins.
pub const WORD_LET_GO: usize = 6;
/// Word, of the stream to shard 0 of a member: 1 while what was taken over from a table before is
/// being forgotten.
pub const WORD_FORGETTING: usize = 7;
/// Word: the receive floor: everything up to here is received and applied, or was skipped.
pub const WORD_RECEIVE_FLOOR: usize = 8;
/// Word: slots granted to the peer since a session of either half began.
pub const WORD_GRANTED_BY_US: usize = 9;
/// Words, of the stream to shard 0 of a member, for the full sync to the member: phase, begin, end,
/// copies before, done, to do; see [`Figures`].
pub const WORD_FULL_SYNC: usize = 10;
/// Words: one bit for each number beyond the receive floor, in a ring of `WINDOW` bits.
pub const WORD_RECEIVED: usize = 16;

const _: () = assert!(WORD_FULL_SYNC + 6 <= WORD_RECEIVED);
const _: () = assert!(WORD_RECEIVED + (WINDOW / 64) as usize <= 48);

/// Accessors of a stream's durable half. One thread writes; an inspector reads words that stand
/// for themselves.
pub struct Durable<'m, W = AtomicU64>(pub &'m StreamWords<W>);

impl<W> Clone for Durable<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for Durable<'_, W> {}

impl<W: Word> Durable<'_, W> {
    fn get(&self, word: usize) -> u64 {
        self.0.0[word].get()
    }

    /// The send floor.
    pub fn floor(&self) -> Seq {
        Seq::from_low_bits(self.get(WORD_SEND_FLOOR))
    }

    /// How far the full sync to the stream's member is; of the stream to its shard 0.
    pub fn full_sync(&self) -> Figures {
        let [phase, begun, ended, before, done, to_do] =
            std::array::from_fn(|i| self.get(WORD_FULL_SYNC + i));
        let phase = SyncPhase::from_raw(phase);
        Figures { phase, begun: Time(begun), ended: Time(ended), before, done, to_do }
    }
}

impl Durable<'_> {
    fn set(&self, word: usize, value: u64) {
        kill_point();
        self.0.0[word].store(value, Ordering::Relaxed);
    }

    /// The number sent last.
    pub fn sent(&self) -> Seq {
        Seq::from_low_bits(self.get(WORD_SENT))
    }

    /// Sets the number sent last.
    pub fn set_sent(&self, seq: Seq) {
        self.set(WORD_SENT, seq.raw());
    }

    /// Moves the send floor.
    pub fn set_floor(&self, seq: Seq) {
        self.set(WORD_SEND_FLOOR, seq.raw());
    }

    /// What was given up.
    pub fn given_up(&self) -> Seq {
        Seq::from_low_bits(self.get(WORD_GIVEN_UP))
    }

    /// Notes what was given up.
    pub fn set_given_up(&self, seq: Seq) {
        self.set(WORD_GIVEN_UP, seq.raw());
    }

    /// Slots granted to this member.
    pub fn granted_to_us(&self) -> u64 {
        self.get(WORD_GRANTED_TO_US)
    }

    /// Counts slots granted to this member.
    pub fn add_granted_to_us(&self, n: u64) {
        self.set(WORD_GRANTED_TO_US, self.granted_to_us() + n);
    }

    /// Slots granted to the peer.
    pub fn granted_by_us(&self) -> u64 {
        self.get(WORD_GRANTED_BY_US)
    }

    /// Says how far the full sync to the stream's member is.
    pub fn set_full_sync(&self, figures: &Figures) {
        let Figures { phase, begun, ended, before, done, to_do } = *figures;
        let words = [phase as u64, begun.0, ended.0, before, done, to_do];
        words.iter().enumerate().for_each(|(i, word)| self.set(WORD_FULL_SYNC + i, *word));
    }

    /// Counts slots granted to the peer.
    pub fn add_granted_by_us(&self, n: u64) {
        self.set(WORD_GRANTED_BY_US, self.granted_by_us() + n);
    }

    /// A slot granted to the peer was taken back before it could know. (A process that was killed
    /// when it had lent a slot and not yet counted it leaves the count one too low: that is one
    /// slot more for the peer.)
    pub fn sub_granted_by_us(&self) {
        self.set(WORD_GRANTED_BY_US, self.granted_by_us().saturating_sub(1));
    }

    /// The session of the sending half; 0 before the first.
    pub fn session(&self) -> u16 {
        self.get(WORD_SESSIONS) as u16
    }

    /// The session of the receiving half, as the peer named it; 0 before the first datagram.
    pub fn peer_session(&self) -> u16 {
        (self.get(WORD_SESSIONS) >> 16) as u16
    }

    /// The table id of the peer when this session of the sending half began.
    pub fn peer_table(&self) -> u32 {
        self.get(WORD_PEER_TABLE) as u32
    }

    /// Whether what was agreed with the peer is being let go, or has been, and no new session has
    /// begun.
    pub fn is_let_go(&self) -> bool {
        self.get(WORD_LET_GO) != 0
    }

    /// Notes that what was agreed with the peer is being let go.
    pub fn let_go(&self) {
        self.set(WORD_LET_GO, 1);
    }

    /// Begins the next session of the sending half.
    pub fn begin_session(&self, peer_table: u32) {
        let session = self.session().wrapping_add(1).max(1);
        // Until all of it is done: a session that has begun in half is let go at a resume.
        self.let_go();
        self.set(WORD_SESSIONS, self.get(WORD_SESSIONS) & !0xffff | session as u64);
        self.set(WORD_PEER_TABLE, peer_table as u64);
        // What was granted either way is taken back, and counted anew.
        for word in
            [WORD_SENT, WORD_SEND_FLOOR, WORD_GIVEN_UP, WORD_GRANTED_TO_US, WORD_GRANTED_BY_US]
        {
            self.set(word, 0);
        }
        self.set(WORD_LET_GO, 0);
    }

    /// Whether it is still to be forgotten what was taken over from a table that the member does
    /// not have any more.
    pub fn is_forgetting(&self) -> bool {
        self.get(WORD_FORGETTING) != 0
    }

    /// Notes that it is still to be forgotten, or that this is done.
    pub fn set_forgetting(&self, forgetting: bool) {
        self.set(WORD_FORGETTING, forgetting as u64);
    }

    /// Forgets a table of the peer in which this stream does not exist any more. Its sessions go on
    /// being counted: what the history still holds of an earlier one must never be taken for a
    /// later one's.
    pub fn forget(&self) {
        for word in (0..48).filter(|word| ![WORD_FORGETTING, WORD_SESSIONS].contains(word)) {
            self.set(word, 0);
        }
        self.set(WORD_SESSIONS, self.session() as u64);
    }

    /// Whether anything was agreed on this stream, with the table that the peer has or had.
    pub fn is_known(&self) -> bool {
        self.peer_table() != 0 || self.peer_session() != 0
    }

    /// Begins a session of the receiving half; 0 waits for the first datagram of a new table.
    pub fn begin_peer_session(&self, session: u16) {
        self.set(WORD_RECEIVE_FLOOR, 0);
        self.set(WORD_GRANTED_BY_US, 0);
        self.set(WORD_GRANTED_TO_US, 0);
        for word in 0..(WINDOW / 64) as usize {
            self.set(WORD_RECEIVED + word, 0);
        }
        // Last: what was received in the session before must never be acknowledged in this one.
        self.set(WORD_SESSIONS, self.get(WORD_SESSIONS) & 0xffff | (session as u64) << 16);
    }

    /// The receive floor.
    pub fn receive_floor(&self) -> Seq {
        Seq::from_low_bits(self.get(WORD_RECEIVE_FLOOR))
    }

    fn bit(seq: Seq) -> (usize, u64) {
        let at = seq.raw() % WINDOW;
        (WORD_RECEIVED + (at / 64) as usize, 1 << (at % 64))
    }

    /// Whether a number was received or skipped.
    pub fn is_received(&self, seq: Seq) -> bool {
        if !seq.is_after(self.receive_floor()) {
            return true;
        }
        let (word, bit) = Self::bit(seq);
        seq.beyond(self.receive_floor()) <= WINDOW && self.get(word) & bit != 0
    }

    /// Notes a number as received and moves the floor over all that now follow it without a gap.
    /// The number must lie within the window.
    pub fn receive(&self, seq: Seq) {
        let floor = self.receive_floor();
        assert!(seq.is_after(floor) && seq.beyond(floor) <= WINDOW);
        let (word, bit) = Self::bit(seq);
        self.set(word, self.get(word) | bit);
        self.advance(floor);
    }

    /// A process that was killed may have noted a number as received and not have moved the floor
    /// over it. It would be repeated for ever, and never received again.
    pub fn resume_floor(&self) {
        self.advance(self.receive_floor());
    }

    /// Moves the floor to at least `to`: the sender does not wait for what is missing below.
    pub fn skip(&self, to: Seq) {
        let mut floor = self.receive_floor();
        while to.is_after(floor) && floor.raw() < to.raw() {
            if to.beyond(floor) > WINDOW {
                // Nothing received lies this far ahead: forget the ring in one go.
                for word in 0..(WINDOW / 64) as usize {
                    self.set(WORD_RECEIVED + word, 0);
                }
                floor = to;
                break;
            }
            floor = floor.next();
            let (word, bit) = Self::bit(floor);
            self.set(word, self.get(word) & !bit);
        }
        self.advance(floor);
    }

    fn advance(&self, mut floor: Seq) {
        loop {
            let (word, bit) = Self::bit(floor.next());
            if self.get(word) & bit == 0 {
                break;
            }
            self.set(word, self.get(word) & !bit);
            floor = floor.next();
        }
        self.set(WORD_RECEIVE_FLOOR, floor.raw());
    }

    /// The numbers received beyond the floor, as an ack carries them: 64 from floor + 1 on in each
    /// word, without empty words at the end. Returns how many words were filled.
    pub fn beyond(&self, into: &mut [u64; (WINDOW / 64) as usize]) -> usize {
        let any = (0..(WINDOW / 64) as usize).any(|w| self.get(WORD_RECEIVED + w) != 0);
        if !any {
            return 0;
        }
        let first = self.receive_floor().next();
        let mut used = 0;
        for (i, out) in into.iter_mut().enumerate() {
            // A word of the ack is 64 bits of the ring from any bit on: two words, shifted.
            let at = (first.raw() + 64 * i as u64) % WINDOW;
            let (low, shift) = ((at / 64) as usize, at % 64);
            let high = (low + 1) % (WINDOW / 64) as usize;
            let low = self.get(WORD_RECEIVED + low) >> shift;
            let high = if shift == 0 { 0 } else { self.get(WORD_RECEIVED + high) << (64 - shift) };
            *out = low | high;
            if *out != 0 {
                used = i + 1;
            }
        }
        used
    }
}

/// The private half of a stream.
pub struct Stream {
    /// When to send what is dirty.
    pub flush_at: Time,
    /// How far its digests are.
    pub comparing: Comparing,
    /// Whether the stream stands in the shard's list of busy ones.
    pub busy: bool,
}

impl Stream {
    /// A stream on which nothing happened yet.
    pub fn new() -> Stream {
        Stream { flush_at: Time::NEVER, comparing: Comparing::default(), busy: false }
    }
}

impl Default for Stream {
    fn default() -> Self {
        Stream::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_moves_over_what_arrived_early_and_over_what_was_skipped() {
        let words = StreamWords::default();
        let d = Durable(&words);
        let seq = |n| Seq::NONE.plus(n);
        for n in [1, 3, 4, 7] {
            d.receive(seq(n));
        }
        assert_eq!(d.receive_floor(), seq(1));
        assert!(d.is_received(seq(4)) && !d.is_received(seq(2)) && !d.is_received(seq(5)));
        let mut beyond = [0; (WINDOW / 64) as usize];
        assert_eq!(d.beyond(&mut beyond), 1);
        assert_eq!(beyond[0], 0b100110, "3, 4 and 7, counted from 2");
        d.receive(seq(2));
        assert_eq!(d.receive_floor(), seq(4));
        d.skip(seq(6));
        assert_eq!(d.receive_floor(), seq(7));
        d.skip(seq(5));
        assert_eq!(d.receive_floor(), seq(7), "a late skip changes nothing");
        assert_eq!(d.beyond(&mut beyond), 0);
    }

    #[test]
    fn the_ring_of_received_bits_wraps() {
        let words = StreamWords::default();
        let d = Durable(&words);
        let seq = |n| Seq::NONE.plus(n);
        for n in 1..=5 * WINDOW {
            // Every pair in the wrong order.
            d.receive(seq(if n % 2 == 1 { n + 1 } else { n - 1 }));
        }
        assert_eq!(d.receive_floor(), seq(5 * WINDOW));
        d.receive(seq(6 * WINDOW));
        let mut beyond = [0; (WINDOW / 64) as usize];
        assert_eq!(d.beyond(&mut beyond), (WINDOW / 64) as usize);
        assert_eq!(beyond[31], 1 << 63);
        d.skip(seq(9 * WINDOW));
        assert_eq!(d.receive_floor(), seq(9 * WINDOW));
        assert_eq!(d.beyond(&mut beyond), 0);
    }
}
