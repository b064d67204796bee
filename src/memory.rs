//! The memory of one shard: what it consists of, and how long each part is.
//!
//! Everything that must survive the process lies here, as slices of atomics. The appliance
//! gets the slices from shared memory (`shm::region`), tests and the simulator from a `Vec`
//! ([`OwnedMemory`]); the code that works on them is the same and is safe either way.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::conn::index::buckets_for;
use crate::conn::slot::Slot;
use crate::counters::COUNTER_WORDS;
use crate::limits::{
    ARENA_MAX, ARENA_MIN, HISTORY_BYTES_PER_ENTRY, SLOTS_MAX, SLOTS_MIN, STREAMS_MAX,
};
use crate::word::Word;

/// Words of a stream's durable state; the names are in `sync::stream`.
#[repr(C, align(128))]
pub struct StreamWords<W = AtomicU64>(pub [W; 48]);

/// A history entry's durable state; the names are in `sync::history`.
#[repr(C, align(32))]
pub struct HistoryWords<W = AtomicU64>(pub [W; 4]);

/// One slot leased to this shard, chained into the list of its stream; see `sync::lease`.
#[repr(C, align(16))]
pub struct LeaseWords<W = AtomicU64>(pub [W; 2]);

/// What only few connections have, for one of them; the fields are drawn in `conn::extras`.
#[repr(C, align(32))]
pub struct ExtraWords<W = AtomicU64>(pub [W; 12]);

impl Default for StreamWords {
    fn default() -> Self {
        StreamWords(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

/// Words that a shard which takes up its memory again cannot derive from the rest.
pub const JOURNAL_WORDS: usize = 64;

/// Journal word: datagrams ever entered into the history.
pub const JOURNAL_HEAD: usize = 0;
/// Journal word: datagrams ever retired from it.
pub const JOURNAL_TAIL: usize = 1;
/// Journal word: words of the manifest ever given back.
pub const JOURNAL_MANIFEST_TAIL: usize = 2;
/// Journal word: the number of the last decline.
pub const JOURNAL_DECLINES: usize = 3;

/// How large a shard's memory is; every part's length follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemorySize {
    /// Slots of the table slice.
    pub capacity: usize,
    /// Bytes of the send arena, control buffers included; a multiple of 4096.
    pub arena: usize,
    /// Connections that may have an [`Extra`](crate::conn::Extra).
    pub extras: usize,
}

impl MemorySize {
    /// The usual share of connections with an [`Extra`](crate::conn::Extra): one in eight.
    pub fn new(capacity: usize, arena: usize) -> MemorySize {
        MemorySize { capacity, arena, extras: capacity.div_ceil(8) }
    }

    /// Whether the sizes lie within the limits.
    pub fn is_valid(&self) -> bool {
        (SLOTS_MIN..=SLOTS_MAX).contains(&self.capacity)
            && (ARENA_MIN..=ARENA_MAX).contains(&self.arena)
            && self.arena.is_multiple_of(4096)
            && (1..=self.capacity).contains(&self.extras)
    }

    /// Buckets of the index.
    pub fn index(&self) -> usize {
        buckets_for(self.capacity)
    }

    /// Entries of the lease pool: as many slots at peers as there can be connections here, and a
    /// reserve.
    pub fn leases(&self) -> usize {
        self.capacity + self.capacity / 4 + 1024
    }

    /// Entries of the history.
    pub fn history(&self) -> usize {
        self.arena / HISTORY_BYTES_PER_ENTRY
    }

    /// Entries of the manifest: one for each delta, granted slot, slot given back and request in a
    /// datagram of the history. Deltas take 18 bytes and more, so that the arena is full before the
    /// manifest is; where there are only smaller messages, the manifest ends the history.
    pub fn manifest(&self) -> usize {
        self.arena / 16
    }

    /// Words of the arena.
    pub fn arena_words(&self) -> usize {
        self.arena / 8
    }
}

/// The parts of one shard's memory.
pub struct Memory<'m, W: Word = AtomicU64> {
    /// The table slice.
    pub slots: &'m [Slot<W>],
    /// Beside each slot a coordinate: an active's previous backup until that is released, a
    /// promoted copy's former active, or the previous backup that an active named to its new one.
    /// 0: none.
    pub former: &'m [W],
    /// Beside each slot the number of a record in `extras`, counted from 1; 0: none.
    pub extra_of: &'m [W::Half],
    /// What only few connections have.
    pub extras: &'m [ExtraWords<W>],
    /// Buckets of the index.
    pub index: &'m [W],
    /// The streams, by `stream_index(member, shard)`.
    pub streams: &'m [StreamWords<W>],
    /// The lease pool.
    pub leases: &'m [LeaseWords<W>],
    /// What was sent lately.
    pub history: &'m [HistoryWords<W>],
    /// Which slots the deltas of the history's datagrams belong to; see `sync::history`.
    pub manifest: &'m [W],
    /// What a shard that takes up its memory again cannot derive from the rest: see
    /// [`JOURNAL_HEAD`] and below.
    pub journal: &'m [W],
    /// The send arena: the bytes of the history's datagrams, then the control buffers.
    pub arena: &'m [W],
    /// One word a counter, in the order of [`crate::counters::COUNTERS`], then the delay histogram.
    pub counters: &'m [W],
}

impl<W: Word> Clone for Memory<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W: Word> Copy for Memory<'_, W> {}

impl<W: Word> Memory<'_, W> {
    /// Panics unless the parts are as long as `size` says: a guard for whoever put them together.
    pub fn assert_size(&self, size: &MemorySize) {
        assert!(size.is_valid());
        assert_eq!(self.slots.len(), size.capacity);
        assert_eq!(self.former.len(), size.capacity);
        assert_eq!(self.extra_of.len(), size.capacity);
        assert_eq!(self.extras.len(), size.extras);
        assert_eq!(self.index.len(), size.index());
        assert_eq!(self.streams.len(), STREAMS_MAX);
        assert_eq!(self.leases.len(), size.leases());
        assert_eq!(self.history.len(), size.history());
        assert_eq!(self.manifest.len(), size.manifest());
        assert_eq!(self.journal.len(), JOURNAL_WORDS);
        assert_eq!(self.arena.len(), size.arena_words());
        assert_eq!(self.counters.len(), COUNTER_WORDS);
    }
}

/// A shard's memory on the heap, for tests and the simulator.
pub struct OwnedMemory {
    slots: Vec<Slot>,
    former: Vec<AtomicU64>,
    extra_of: Vec<AtomicU32>,
    extras: Vec<ExtraWords>,
    index: Vec<AtomicU64>,
    streams: Vec<StreamWords>,
    leases: Vec<LeaseWords>,
    history: Vec<HistoryWords>,
    manifest: Vec<AtomicU64>,
    journal: Vec<AtomicU64>,
    arena: Vec<AtomicU64>,
    counters: Vec<AtomicU64>,
}

impl OwnedMemory {
    /// Zeroed memory of this size.
    pub fn new(size: &MemorySize) -> OwnedMemory {
        assert!(size.is_valid());
        fn words(n: usize) -> Vec<AtomicU64> {
            (0..n).map(|_| AtomicU64::new(0)).collect()
        }
        OwnedMemory {
            slots: (0..size.capacity).map(|_| Slot::default()).collect(),
            former: words(size.capacity),
            extra_of: (0..size.capacity).map(|_| AtomicU32::new(0)).collect(),
            extras: (0..size.extras).map(|_| ExtraWords(Default::default())).collect(),
            index: words(size.index()),
            streams: (0..STREAMS_MAX).map(|_| StreamWords::default()).collect(),
            leases: (0..size.leases()).map(|_| LeaseWords(Default::default())).collect(),
            history: (0..size.history()).map(|_| HistoryWords(Default::default())).collect(),
            manifest: words(size.manifest()),
            journal: words(JOURNAL_WORDS),
            arena: words(size.arena_words()),
            counters: words(COUNTER_WORDS),
        }
    }

    /// The parts.
    pub fn parts(&self) -> Memory<'_> {
        Memory {
            slots: &self.slots,
            former: &self.former,
            extra_of: &self.extra_of,
            extras: &self.extras,
            index: &self.index,
            streams: &self.streams,
            leases: &self.leases,
            history: &self.history,
            manifest: &self.manifest,
            journal: &self.journal,
            arena: &self.arena,
            counters: &self.counters,
        }
    }
}

/// Copies bytes out of the arena; for tests and tools (the appliance's kernel reads it by itself).
pub fn read_arena<W: Word>(arena: &[W], offset: usize, into: &mut [u8]) {
    assert!(offset.is_multiple_of(8));
    for (word, chunk) in arena[offset / 8..].iter().zip(into.chunks_mut(8)) {
        chunk.copy_from_slice(&word.get().to_ne_bytes()[..chunk.len()]);
    }
}

/// Copies bytes into the arena; `offset` is a multiple of 8.
pub fn write_arena(arena: &[AtomicU64], offset: usize, bytes: &[u8]) {
    assert!(offset.is_multiple_of(8) && offset + bytes.len() <= arena.len() * 8);
    for (word, chunk) in arena[offset / 8..].iter().zip(bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..chunk.len()].copy_from_slice(chunk);
        word.store(u64::from_ne_bytes(whole), Ordering::Relaxed);
    }
}
