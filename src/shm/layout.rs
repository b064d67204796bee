//! Where everything lies in the region: one function from sizes to offsets, used by whoever
//! creates it and by whoever reads it.
//!
//! ```text
//!  byte 0        header, 4096 bytes (below)
//!       4096     group table and shard status, 16384 bytes (see `group`)
//!      20480     shard 0: slots      128 x capacity
//!                         former       8 x capacity
//!                         extra of     4 x capacity
//!                         extras      96 x extras
//!                         index        8 x buckets_for(capacity)
//!                         streams    384 x 3328
//!                         leases      16 x (capacity * 5/4 + 1024)
//!                         history     32 x arena / 512
//!                         manifest     8 x arena / 16
//!                         journal      8 x 64
//!                         arena        1 x arena
//!                         counters     8 x (their number + buckets of the delay histogram)
//!                         ring      4096 + 128 x ring records (see `ingest`)
//!                shard 1: the same, and so on
//! ```
//!
//! Every part starts at a multiple of 4096, so that it can be mapped or registered alone, and
//! so does every shard. The header is one word a field, in the host's byte order:
//!
//! ```text
//!  word 0  magic "hypersnc"         7  ring records a shard       14  index key
//!       1  layout version           8  counter words a shard         15  group id
//!       2  bytes in all             9  pid of the appliance       16  member id
//!       3  bytes of this header    10  boot id, first 8 bytes     17  started, CLOCK_MONOTONIC ns
//!       4  shards                  11  boot id, last 8 bytes      18  extras a shard
//!       5  slots a shard           12  table id (never 0)         19  READY, or RESUMING: written last
//!       6  arena bytes a shard     13  incarnation                20  old values of sysctls (see `old_values`)
//!                                                               23  ended: not 0 once the member said goodbye
//!                                                               24  back within, ms: written by `hypersync restart`
//!                                                               25.. zero
//! ```

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::group::GroupWords;
use super::ingest::{RecordWords, RingWords};
use super::old_values::OLD_VALUES_WORDS;
use crate::conn::{MemberId, Slot};
use crate::counters::COUNTER_WORDS;
use crate::limits::{INGEST_RECORDS_MAX, INGEST_RECORDS_MIN, MEMBERS_MAX, SHARDS_MAX, STREAMS_MAX};
use crate::memory::{ExtraWords, HistoryWords, JOURNAL_WORDS, LeaseWords, MemorySize, StreamWords};
use crate::time::Time;
use crate::word::Word;

/// The layout's version. A region of another version is refused and left alone.
pub const VERSION: u64 = 3;

/// What every region begins with. Read with the wrong byte order it is something else.
pub const MAGIC: u64 = u64::from_be_bytes(*b"hypersnc");

/// Bytes of the header.
pub const HEADER_BYTES: usize = 4096;

/// Every part starts at a multiple of this.
pub const PAGE: usize = 4096;

/// What the READY word holds once the region may be read.
const READY: u64 = u64::from_be_bytes(*b"ready\0\0\0");

/// What it holds while a start takes the region up again, plus how often in a row one did so in
/// vain.
const RESUMING: u64 = u64::from_be_bytes(*b"resume\0\0");

/// A region that as many starts in a row could not bring to READY is not taken up once more.
const TRIES: u64 = 3;

/// Words of the header before READY.
pub const HEADER_WORDS: usize = 19;

/// The word with the pid.
pub const PID: usize = 9;

/// The word with the incarnation.
pub const INCARNATION: usize = 13;

/// The words behind READY that hold the old values of sysctls.
pub const OLD_VALUES: std::ops::Range<usize> =
    HEADER_WORDS + 1..HEADER_WORDS + 1 + OLD_VALUES_WORDS;

/// The word that says that the member left the group: its table is not taken up again.
pub const ENDED: usize = OLD_VALUES.end;

/// The word in which a restart is told how long it may take, in ms; 0: nobody has said.
pub const BACK_WITHIN: usize = ENDED + 1;

/// What the layout follows from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Shards, 1 to 64.
    pub shards: u8,
    /// Of each shard's memory.
    pub memory: MemorySize,
    /// Records of each shard's ingest ring, a power of two.
    pub ring_records: usize,
}

impl Sizes {
    /// Whether the sizes lie within the limits.
    pub fn is_valid(&self) -> bool {
        (1..=SHARDS_MAX).contains(&(self.shards as usize))
            && self.memory.is_valid()
            && self.ring_records.is_power_of_two()
            && (INGEST_RECORDS_MIN..=INGEST_RECORDS_MAX).contains(&self.ring_records)
    }
}

/// A part of the region: where it starts and how many items it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Bytes from the start of the region.
    pub offset: usize,
    /// Items, not bytes.
    pub items: usize,
}

/// The parts of one shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShardLayout {
    /// [`Slot`]s.
    pub slots: Part,
    /// A word beside each slot.
    pub former: Part,
    /// A 32-bit number beside each slot.
    pub extra_of: Part,
    /// [`ExtraWords`].
    pub extras: Part,
    /// Words.
    pub index: Part,
    /// [`StreamWords`].
    pub streams: Part,
    /// [`LeaseWords`].
    pub leases: Part,
    /// [`HistoryWords`].
    pub history: Part,
    /// Words.
    pub manifest: Part,
    /// Words.
    pub journal: Part,
    /// Words.
    pub arena: Part,
    /// Words.
    pub counters: Part,
    /// One [`RingWords`].
    pub ring: Part,
    /// [`RecordWords`], right behind `ring`.
    pub records: Part,
    /// The first byte behind the shard.
    pub end: usize,
}

/// The header.
pub const HEADER: Part = Part { offset: 0, items: HEADER_BYTES / 8 };

/// The group table.
pub const GROUP: Part = Part { offset: HEADER_BYTES, items: 1 };

const SHARDS_AT: usize = HEADER_BYTES + size_of::<GroupWords>();

const _: () = assert!(size_of::<GroupWords>() == 16384 && SHARDS_AT.is_multiple_of(PAGE));
const _: () = assert!(size_of::<RingWords>() == PAGE && size_of::<RecordWords>() == 128);
const _: () = assert!(size_of::<Slot>() == 128 && size_of::<StreamWords>() == 384);
const _: () = assert!(size_of::<ExtraWords>() == 96);
const _: () = assert!(size_of::<LeaseWords>() == 16 && size_of::<HistoryWords>() == 32);

/// Where the parts of a shard lie. `sizes` are valid and the shard is one of theirs.
pub fn shard_layout(sizes: &Sizes, shard: u8) -> ShardLayout {
    assert!(sizes.is_valid() && shard < sizes.shards);
    let first = shard_layout_at(sizes, SHARDS_AT);
    shard_layout_at(sizes, SHARDS_AT + shard as usize * (first.end - SHARDS_AT))
}

/// Bytes of the whole region. `sizes` are valid.
pub fn total_bytes(sizes: &Sizes) -> usize {
    shard_layout(sizes, sizes.shards - 1).end
}

fn shard_layout_at(sizes: &Sizes, start: usize) -> ShardLayout {
    let mut end = start;
    let mut place = |items: usize, bytes_each: usize| {
        let part = Part { offset: end, items };
        end = (end + items * bytes_each).next_multiple_of(PAGE);
        part
    };
    let memory = &sizes.memory;
    ShardLayout {
        slots: place(memory.capacity, size_of::<Slot>()),
        former: place(memory.capacity, 8),
        extra_of: place(memory.capacity, 4),
        extras: place(memory.extras, size_of::<ExtraWords>()),
        index: place(memory.index(), 8),
        streams: place(STREAMS_MAX, size_of::<StreamWords>()),
        leases: place(memory.leases(), size_of::<LeaseWords>()),
        history: place(memory.history(), size_of::<HistoryWords>()),
        manifest: place(memory.manifest(), 8),
        journal: place(JOURNAL_WORDS, 8),
        arena: place(memory.arena_words(), 8),
        counters: place(COUNTER_WORDS, 8),
        ring: place(1, size_of::<RingWords>()),
        records: place(sizes.ring_records, size_of::<RecordWords>()),
        end,
    }
}

/// The published header: what the region is and whose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Sizes.
    pub sizes: Sizes,
    /// Process id of the appliance.
    pub pid: u32,
    /// The host's boot, in which `pid` and `started` mean something.
    pub boot_id: [u8; 16],
    /// Name of this life of the table; never 0.
    pub table_id: u32,
    /// Which run of the process this is.
    pub incarnation: u64,
    /// Key of the index.
    pub index_key: u64,
    /// The group.
    pub group: u16,
    /// The member that this appliance is.
    pub member: MemberId,
    /// When the appliance started.
    pub started: Time,
}

/// Why words are not a header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotAHeader {
    /// Another magic.
    Foreign,
    /// Another layout version, this one.
    Version(u64),
    /// The file has another length than the header says, this one.
    WrongSize(u64),
    /// Sizes out of bounds, or other parts than this build knows.
    OtherBuild,
}

impl Header {
    /// Writes everything but the READY word.
    pub fn write(&self, words: &[AtomicU64]) {
        let [boot_0, boot_1] = halves(&self.boot_id);
        let fields = [
            MAGIC,
            VERSION,
            total_bytes(&self.sizes) as u64,
            HEADER_BYTES as u64,
            self.sizes.shards as u64,
            self.sizes.memory.capacity as u64,
            self.sizes.memory.arena as u64,
            self.sizes.ring_records as u64,
            COUNTER_WORDS as u64,
            self.pid as u64,
            boot_0,
            boot_1,
            self.table_id as u64,
            self.incarnation,
            self.index_key,
            self.group as u64,
            self.member as u64,
            self.started.0,
            self.sizes.memory.extras as u64,
        ];
        for (word, field) in words.iter().zip(fields) {
            word.store(field, Ordering::Relaxed);
        }
    }

    /// Takes header words apart that lie in a file of `file_bytes`.
    pub fn read(w: &[u64; HEADER_WORDS], file_bytes: u64) -> Result<Header, NotAHeader> {
        check_identity(w, file_bytes)?;
        let byte = |word: u64| u8::try_from(word).map_err(|_| NotAHeader::OtherBuild);
        let sizes = Sizes {
            shards: byte(w[4])?,
            memory: MemorySize {
                capacity: w[5] as usize,
                arena: w[6] as usize,
                extras: w[18] as usize,
            },
            ring_records: w[7] as usize,
        };
        let member = byte(w[16])?;
        let fits = sizes.is_valid() && (1..=MEMBERS_MAX).contains(&(member as usize));
        if !fits || w[3] != HEADER_BYTES as u64 || w[8] != COUNTER_WORDS as u64 {
            return Err(NotAHeader::OtherBuild);
        }
        if total_bytes(&sizes) as u64 != w[2] {
            return Err(NotAHeader::OtherBuild);
        }
        Ok(Header {
            sizes,
            pid: w[9] as u32,
            boot_id: boot_id_of(w),
            table_id: w[12] as u32,
            incarnation: w[13],
            index_key: w[14],
            group: w[15] as u16,
            member,
            started: Time(w[17]),
        })
    }
}

/// Whether header words are those of a whole region of this layout version, of any size.
pub fn check_identity(w: &[u64; HEADER_WORDS], file_bytes: u64) -> Result<(), NotAHeader> {
    if w[0] != MAGIC {
        return Err(NotAHeader::Foreign);
    }
    if w[1] != VERSION {
        return Err(NotAHeader::Version(w[1]));
    }
    if w[2] != file_bytes {
        return Err(NotAHeader::WrongSize(w[2]));
    }
    Ok(())
}

/// The boot that header words name.
pub fn boot_id_of(w: &[u64; HEADER_WORDS]) -> [u8; 16] {
    ((w[10] as u128) << 64 | w[11] as u128).to_be_bytes()
}

/// Copies the header's words, READY excepted.
pub fn copy_words<W: Word>(words: &[W]) -> [u64; HEADER_WORDS] {
    std::array::from_fn(|i| words[i].get())
}

/// Says that the region may be read. Whoever sees it sees everything written before.
pub fn publish_ready(words: &[AtomicU64]) {
    words[HEADER_WORDS].store(READY, Ordering::Release);
}

/// Says that nobody may read the region for now, because a start takes it up. What is written after
/// this is not seen by who saw READY.
pub fn begin_resume(words: &[AtomicU64]) {
    let ready = words[HEADER_WORDS].load(Ordering::Relaxed);
    let tries = if ready == READY { 0 } else { ready.wrapping_sub(RESUMING) };
    words[HEADER_WORDS].store(RESUMING + tries.wrapping_add(1), Ordering::Relaxed);
    // Pairs with the fences of a reader, which looks at the word before and after the header.
    fence(Ordering::Release);
}

/// Whether a READY word is that of a region that was ready, or that too few starts in a row failed
/// to take up.
pub fn may_resume(ready: u64) -> bool {
    ready == READY || ready.wrapping_sub(RESUMING) < TRIES
}

/// Whether the region may be read. Pairs with `publish_ready`.
pub fn is_ready<W: Word>(words: &[W]) -> bool {
    let ready = words[HEADER_WORDS].get() == READY;
    fence(Ordering::Acquire);
    ready
}

fn halves(id: &[u8; 16]) -> [u64; 2] {
    let wide = u128::from_be_bytes(*id);
    [(wide >> 64) as u64, wide as u64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_on_whole_pages() {
        let memory = MemorySize::new(1000, 1 << 20);
        let sizes = Sizes { shards: 3, memory, ring_records: 64 };
        let mut end = SHARDS_AT;
        for shard in 0..3 {
            let l = shard_layout(&sizes, shard);
            let parts = [
                (l.slots, 128),
                (l.former, 8),
                (l.extra_of, 4),
                (l.extras, 96),
                (l.index, 8),
                (l.streams, 384),
                (l.leases, 16),
                (l.history, 32),
                (l.manifest, 8),
                (l.journal, 8),
                (l.arena, 8),
                (l.counters, 8),
                (l.ring, 4096),
                (l.records, 128),
            ];
            for (part, bytes) in parts {
                assert_eq!(part.offset, end);
                end = (part.offset + part.items * bytes).next_multiple_of(PAGE);
            }
            assert_eq!(l.end, end);
            assert_eq!(l.records.offset, l.ring.offset + PAGE);
        }
        assert_eq!(total_bytes(&sizes), end);
    }

    #[test]
    fn the_largest_region_has_an_offset_for_every_part() {
        let memory = MemorySize::new(crate::limits::SLOTS_MAX, crate::limits::ARENA_MAX);
        let sizes = Sizes { shards: 64, memory, ring_records: INGEST_RECORDS_MAX };
        assert!(sizes.is_valid() && total_bytes(&sizes) > 1 << 39);
    }
}
