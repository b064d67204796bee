//! The history: what was sent lately, byte for byte, in the arena that io_uring sends from.
//!
//! Three rings move together. The **arena** holds the datagrams, one behind the other. An
//! **entry** a datagram says where it lies, on which stream and with which number. The
//! **manifest** says which slots its deltas belong to, so that they can be marked for sending
//! again if the datagram is given up. The oldest entry makes room for the newest, but only when
//! the kernel is done with its bytes and it is acknowledged or given up.
//!
//! A shard that takes up its memory again goes on with all three: how many datagrams were entered
//! and retired stands in the journal, the first written last when a datagram is entered. So one
//! that a killed process was composing is not there.
//!
//! A manifest word is a tag in the top two bits, then (of a delta) the low ten bits of the epoch
//! that it carried, then slot and generation (26 bits each), or the number of a control request.
//!
//! Behind the ring of datagrams lie the control buffers: heartbeats, acks and the like, which
//! nobody repeats.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::ccp::message::Place;
use crate::conn::{Generation, Stamp};
use crate::kill::kill_point;
use crate::limits::{CONTROL_BUFFER_SIZE, CONTROL_BUFFERS, DATAGRAM_MAX};
use crate::memory::{
    HistoryWords, JOURNAL_HEAD, JOURNAL_MANIFEST_TAIL, JOURNAL_TAIL, Memory, read_arena,
    write_arena,
};
use crate::seq::Seq;
use crate::time::Time;

/// Most manifest words that one datagram can need: a full one of the smallest messages (10 bytes).
pub const MANIFEST_PER_DATAGRAM: usize = DATAGRAM_MAX / 10;

/// What one message in a datagram was about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// A delta of the connection in this slot.
    Delta {
        /// The slot.
        place: Place,
        /// Of the state that it carried.
        epoch: EpochBits,
    },
    /// This slot was granted to the peer.
    Granted(Place),
    /// Control request number n.
    Request(u32),
    /// This slot of the peer, which it had leased to us, was given back.
    GivenBack(Place),
}

/// The low bits of an epoch, as many as a manifest word has room for. Whether a connection was
/// claimed since.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EpochBits(u16);

const EPOCH_MASK: u16 = (1 << 10) - 1;

impl EpochBits {
    /// Those of a stamp.
    pub fn of(stamp: Stamp) -> EpochBits {
        EpochBits(stamp.epoch as u16 & EPOCH_MASK)
    }
}

impl Content {
    fn raw(self) -> u64 {
        let word =
            |tag: u64, p: Place| tag << 62 | (p.slot as u64) << 26 | p.generation.raw() as u64;
        match self {
            Content::Delta { place, epoch } => word(0, place) | (epoch.0 as u64) << 52,
            Content::Granted(place) => word(1, place),
            Content::Request(n) => 2 << 62 | n as u64,
            Content::GivenBack(place) => word(3, place),
        }
    }

    fn from_raw(raw: u64) -> Content {
        let place = Place {
            slot: (raw >> 26) as u32 & ((1 << 26) - 1),
            generation: Generation::from_low_bits(raw as u32),
        };
        match raw >> 62 {
            0 => Content::Delta { place, epoch: EpochBits((raw >> 52) as u16 & EPOCH_MASK) },
            1 => Content::Granted(place),
            2 => Content::Request(raw as u32),
            _ => Content::GivenBack(place),
        }
    }
}

/// What is known of a datagram besides its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Datagram {
    /// Its stream.
    pub stream: usize,
    /// The session of that stream in which it has its number.
    pub session: u16,
    /// Its number.
    pub seq: Seq,
    /// Where it lies in the arena.
    pub offset: u32,
    /// Its bytes.
    pub len: u32,
    /// When it was sent first.
    pub first_sent: Time,
}

/// What changes of an entry, private to the process.
#[derive(Clone, Copy, Default)]
struct Flight {
    next: Option<u32>,
    in_flight: u16,
    outstanding: bool,
    arrived: bool,
    sends: u32,
    last_sent: Time,
    oldest_change: Time,
    connections: u32,
    manifest_end: u64,
}

/// Why there is no room in the arena.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoRoom {
    /// The kernel still sends from the oldest entry.
    InFlight,
    /// The oldest entry, this one, is not acknowledged.
    Unacknowledged(u32),
}

/// The three rings of one shard.
pub struct History<'m> {
    entries: &'m [HistoryWords],
    flights: Vec<Flight>,
    manifest: &'m [AtomicU64],
    journal: &'m [AtomicU64],
    arena: &'m [AtomicU64],
    /// Entries made and retired, counted for ever.
    head: u64,
    tail: u64,
    manifest_head: u64,
    manifest_tail: u64,
    /// Where the next datagram goes, bytes.
    at: usize,
    control_free: Vec<u16>,
}

impl<'m> History<'m> {
    /// The history that a killed process left behind. Nothing of it is outstanding until
    /// [`take_up`](Self::take_up) says so. If the newest datagram was not `counted` as sent it is
    /// taken out: its number goes to another one.
    pub fn resume(memory: &Memory<'m>, counted: impl Fn(&Datagram) -> bool) -> History<'m> {
        let mut history = History::new(memory);
        let journal = |word: usize| memory.journal[word].load(Ordering::Relaxed);
        let (mut head, tail) = (journal(JOURNAL_HEAD), journal(JOURNAL_TAIL));
        if head > tail && !counted(&history.entry(history.id_of(head - 1))) {
            head -= 1;
            history.note_journal(JOURNAL_HEAD, head);
        }
        if head == 0 {
            return history;
        }
        let size = history.entries.len() as u64;
        let end_of = |id: u32| history.entries[id as usize].0[3].load(Ordering::Relaxed);
        let (newest, manifest_head) = (history.id_of(head - 1), end_of(history.id_of(head - 1)));
        let manifest_tail = journal(JOURNAL_MANIFEST_TAIL);
        assert!(
            tail <= head && head - tail <= size && manifest_tail <= manifest_head,
            "the history in memory is not one: {tail} to {head}, manifest {manifest_tail} to {manifest_head}"
        );
        for count in tail.max(head.saturating_sub(size))..head {
            let id = history.id_of(count);
            let first_sent = history.entry(id).first_sent;
            history.flights[id as usize] = Flight {
                // Never sampled: nobody knows when it was sent last.
                sends: 2,
                last_sent: first_sent,
                oldest_change: first_sent,
                manifest_end: history.entries[id as usize].0[3].load(Ordering::Relaxed),
                ..Flight::default()
            };
        }
        let last = history.entry(newest);
        history.at = (last.offset as usize + last.len as usize).next_multiple_of(8);
        (history.head, history.tail) = (head, tail);
        (history.manifest_head, history.manifest_tail) = (manifest_head, manifest_tail);
        history
    }

    /// All entries, oldest first.
    pub fn ids(&self) -> impl Iterator<Item = u32> + use<> {
        let size = self.entries.len() as u64;
        (self.tail..self.head).map(move |count| (count % size) as u32)
    }

    /// The entry, of a history that was resumed, waits for its acknowledgement.
    pub fn take_up(&mut self, id: u32, connections: u32) {
        let flight = &mut self.flights[id as usize];
        (flight.outstanding, flight.connections) = (true, connections);
    }

    fn note_journal(&self, word: usize, value: u64) {
        kill_point();
        // After everything that it stands for.
        self.journal[word].store(value, Ordering::Release);
    }

    /// An empty history.
    pub fn new(memory: &Memory<'m>) -> History<'m> {
        History {
            entries: memory.history,
            flights: vec![Flight::default(); memory.history.len()],
            manifest: memory.manifest,
            journal: memory.journal,
            arena: memory.arena,
            head: 0,
            tail: 0,
            manifest_head: 0,
            manifest_tail: 0,
            at: 0,
            control_free: (0..CONTROL_BUFFERS as u16).rev().collect(),
        }
    }

    fn ring_bytes(&self) -> usize {
        self.arena.len() * 8 - CONTROL_BUFFERS * CONTROL_BUFFER_SIZE
    }

    fn id_of(&self, count: u64) -> u32 {
        (count % self.entries.len() as u64) as u32
    }

    /// Makes room for a full datagram and tells where it goes. Retires old entries on the way.
    pub fn make_room(&mut self) -> Result<u32, NoRoom> {
        loop {
            if let Some(offset) = self.free_at() {
                return Ok(offset);
            }
            let oldest = self.id_of(self.tail);
            let flight = &self.flights[oldest as usize];
            if flight.in_flight > 0 {
                return Err(NoRoom::InFlight);
            }
            if flight.outstanding {
                return Err(NoRoom::Unacknowledged(oldest));
            }
            self.manifest_tail = flight.manifest_end;
            self.tail += 1;
            // In this order: an entry whose manifest is gone carries nothing.
            self.note_journal(JOURNAL_MANIFEST_TAIL, self.manifest_tail);
            self.note_journal(JOURNAL_TAIL, self.tail);
        }
    }

    fn free_at(&self) -> Option<u32> {
        if self.head - self.tail >= self.entries.len() as u64
            || self.manifest_head - self.manifest_tail + MANIFEST_PER_DATAGRAM as u64
                > self.manifest.len() as u64
        {
            return None;
        }
        if self.head == self.tail {
            return Some(0);
        }
        let oldest = self.entry(self.id_of(self.tail)).offset as usize;
        if self.at > oldest {
            if self.at + DATAGRAM_MAX <= self.ring_bytes() {
                return Some(self.at as u32);
            }
            return (DATAGRAM_MAX <= oldest).then_some(0);
        }
        (self.at + DATAGRAM_MAX <= oldest).then_some(self.at as u32)
    }

    /// Notes what the datagram being built carries; at most [`MANIFEST_PER_DATAGRAM`] times.
    pub fn note(&mut self, content: Content) {
        let at = (self.manifest_head % self.manifest.len() as u64) as usize;
        self.manifest[at].store(content.raw(), Ordering::Relaxed);
        self.manifest_head += 1;
    }

    /// Copies a datagram to where [`make_room`](Self::make_room) said and makes its entry, which is
    /// outstanding and in flight once. `stride` bytes (at least `bytes.len()`) are used up; those
    /// beyond the datagram become zeros.
    pub fn append(
        &mut self,
        entry: &Datagram,
        bytes: &[u8],
        stride: usize,
        oldest_change: Time,
        connections: u32,
    ) -> u32 {
        assert!(
            bytes.len() == entry.len as usize && stride >= bytes.len() && stride <= DATAGRAM_MAX
        );
        let offset = entry.offset as usize;
        write_arena(self.arena, offset, bytes);
        for word in &self.arena[(offset + bytes.len()).div_ceil(8)..(offset + stride).div_ceil(8)] {
            word.store(0, Ordering::Relaxed);
        }
        self.at = offset + stride.next_multiple_of(8);
        let id = self.id_of(self.head);
        self.head += 1;
        kill_point();
        let words = &self.entries[id as usize].0;
        words[0].store(
            (entry.stream as u64) << 48 | (entry.len as u64) << 32 | offset as u64,
            Ordering::Relaxed,
        );
        words[1].store((entry.session as u64) << 48 | entry.seq.raw(), Ordering::Relaxed);
        words[2].store(entry.first_sent.0, Ordering::Relaxed);
        words[3].store(self.manifest_head, Ordering::Relaxed);
        self.note_journal(JOURNAL_HEAD, self.head);
        self.flights[id as usize] = Flight {
            next: None,
            in_flight: 1,
            outstanding: true,
            arrived: false,
            sends: 1,
            last_sent: entry.first_sent,
            oldest_change,
            connections,
            manifest_end: self.manifest_head,
        };
        id
    }

    /// The entry's durable half.
    pub fn entry(&self, id: u32) -> Datagram {
        let words = &self.entries[id as usize].0;
        let first = words[0].load(Ordering::Relaxed);
        let second = words[1].load(Ordering::Relaxed);
        Datagram {
            stream: (first >> 48) as usize,
            len: (first >> 32) as u32 & 0xffff,
            offset: first as u32,
            session: (second >> 48) as u16,
            seq: Seq::from_low_bits(second),
            first_sent: Time(words[2].load(Ordering::Relaxed)),
        }
    }

    /// Entries that it has room for.
    pub fn size(&self) -> u32 {
        self.entries.len() as u32
    }

    /// What the entry's datagram carries.
    pub fn contents(&self, id: u32) -> impl Iterator<Item = Content> + use<'m> {
        let end = self.flights[id as usize].manifest_end;
        let before = (id as usize + self.entries.len() - 1) % self.entries.len();
        // The entry before, if it is still there, ended where this one began.
        let begin = match id == self.id_of(self.tail) {
            true => self.manifest_tail,
            false => self.flights[before].manifest_end,
        };
        let manifest = self.manifest;
        (begin..end).map(move |at| {
            Content::from_raw(
                manifest[(at % manifest.len() as u64) as usize].load(Ordering::Relaxed),
            )
        })
    }

    /// The entry after this one in its stream.
    pub fn next(&self, id: u32) -> Option<u32> {
        self.flights[id as usize].next
    }

    /// Sets the entry after this one in its stream.
    pub fn set_next(&mut self, id: u32, next: u32) {
        self.flights[id as usize].next = Some(next);
    }

    /// Whether the entry waits for its acknowledgement.
    pub fn is_outstanding(&self, id: u32) -> bool {
        self.flights[id as usize].outstanding
    }

    /// The entry is acknowledged or given up. Returns how many connections it carried.
    pub fn retire(&mut self, id: u32) -> u32 {
        let flight = &mut self.flights[id as usize];
        flight.outstanding = false;
        std::mem::take(&mut flight.connections)
    }

    /// The peer has it, but something before it is missing: no need to repeat it.
    pub fn set_arrived(&mut self, id: u32) {
        self.flights[id as usize].arrived = true;
    }

    /// Whether the peer has it.
    pub fn has_arrived(&self, id: u32) -> bool {
        self.flights[id as usize].arrived
    }

    /// When it was sent last.
    pub fn last_sent(&self, id: u32) -> Time {
        self.flights[id as usize].last_sent
    }

    /// When the oldest change that it carries was made.
    pub fn oldest_change(&self, id: u32) -> Time {
        self.flights[id as usize].oldest_change
    }

    /// How often it was sent.
    pub fn sends(&self, id: u32) -> u32 {
        self.flights[id as usize].sends
    }

    /// Connections that it carries and that are not acknowledged.
    pub fn connections(&self, id: u32) -> u32 {
        self.flights[id as usize].connections
    }

    /// Changes something in a datagram, in place, if `change` says so: nothing that its receiver
    /// goes by when it comes again.
    pub fn amend(&mut self, id: u32, change: impl FnOnce(&mut [u8]) -> bool) {
        let Datagram { offset, len, .. } = self.entry(id);
        let mut scratch = [0; DATAGRAM_MAX];
        let bytes = &mut scratch[..len as usize];
        read_arena(self.arena, offset as usize, bytes);
        if change(bytes) {
            write_arena(self.arena, offset as usize, bytes);
        }
    }

    /// It is sent again.
    pub fn repeat(&mut self, id: u32, now: Time) {
        let flight = &mut self.flights[id as usize];
        flight.in_flight += 1;
        flight.sends += 1;
        flight.last_sent = now;
    }

    /// The kernel is done with one send of it.
    pub fn on_send_complete(&mut self, id: u32) {
        let flight = &mut self.flights[id as usize];
        assert!(flight.in_flight > 0, "entry {id} was sent less often than its sends completed");
        flight.in_flight -= 1;
    }

    /// Takes a control buffer; `None` if all are on their way out.
    pub fn take_control(&mut self) -> Option<u16> {
        self.control_free.pop()
    }

    /// Gives a control buffer back.
    pub fn give_control(&mut self, buffer: u16) {
        assert!(self.control_free.len() < CONTROL_BUFFERS && !self.control_free.contains(&buffer));
        self.control_free.push(buffer);
    }

    /// Copies a datagram into a control buffer and tells where it lies in the arena.
    pub fn write_control(&mut self, buffer: u16, bytes: &[u8]) -> u32 {
        assert!(bytes.len() <= CONTROL_BUFFER_SIZE);
        let offset = self.ring_bytes() + buffer as usize * CONTROL_BUFFER_SIZE;
        write_arena(self.arena, offset, bytes);
        offset as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::ARENA_MIN;
    use crate::memory::{MemorySize, OwnedMemory};

    fn append(history: &mut History<'_>, n: u64, len: usize) -> Result<u32, NoRoom> {
        let offset = history.make_room()?;
        history.note(Content::Request(n as u32));
        let entry = Datagram {
            stream: 3,
            session: 1,
            seq: Seq::NONE.plus(n),
            offset,
            len: len as u32,
            first_sent: Time(n),
        };
        Ok(history.append(&entry, &vec![n as u8; len], len, Time(n), 1))
    }

    #[test]
    fn bytes_stay_until_acknowledged_and_sent() {
        let size = MemorySize::new(64, ARENA_MIN);
        let memory = OwnedMemory::new(&size);
        let mut history = History::new(&memory.parts());
        let mut ids = Vec::new();
        let stuck = loop {
            match append(&mut history, ids.len() as u64 + 1, 1001) {
                Ok(id) => ids.push(id),
                Err(stuck) => break stuck,
            }
        };
        assert_eq!(stuck, NoRoom::InFlight);
        history.on_send_complete(ids[0]);
        assert_eq!(append(&mut history, 9, 10), Err(NoRoom::Unacknowledged(ids[0])));
        for (n, id) in ids.iter().enumerate() {
            let mut bytes = vec![0; 1001];
            read_arena(memory.parts().arena, history.entry(*id).offset as usize, &mut bytes);
            assert!(bytes.iter().all(|b| *b == (n + 1) as u8), "entry {n} was overwritten");
            assert!(history.contents(*id).eq([Content::Request(n as u32 + 1)]));
        }
        history.retire(ids[0]);
        for id in &ids[1..] {
            history.on_send_complete(*id);
            history.retire(*id);
        }
        for n in 0..5000 {
            let id = append(&mut history, n, 1 + n as usize % DATAGRAM_MAX).unwrap();
            assert!(history.contents(id).eq([Content::Request(n as u32)]));
            history.on_send_complete(id);
            history.retire(id);
        }
    }
}
