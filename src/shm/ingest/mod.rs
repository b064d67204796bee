//! The ring source: how a user-space data plane on this host tells a shard what it sees.
//!
//! One ring a shard, one producer a ring, in the shared region:
//!
//! ```text
//!  byte    0  magic "hsring01"        written by the appliance before the region is ready
//!          8  records, a power of two
//!        128  tail: records read so far                          written by the consumer
//!        256  head: records written so far                       written by the producer
//!        384  doorbell (u32): 1 while the consumer sleeps on it      written by both
//!        512  pid of the producer, for people (0: none so far)   written by the producer
//!       4096  records, 128 bytes each; number n lies at n modulo records (see `record`)
//! ```
//!
//! Positions count records for ever (u64) and are never reduced. Records behind `head` are
//! the producer's until it publishes a batch by moving `head`. Who may produce is decided by a
//! file lock on the ring's first byte, which the kernel takes back when the process dies.
//!
//! **Waking up**, without a lost wake-up and without a system call while the consumer is busy:
//!
//! ```text
//!   consumer                          producer
//!   doorbell = 1                          head = n
//!   fence                             fence
//!   head moved? then doorbell = 0, work   doorbell == 1? then doorbell = 0, FUTEX_WAKE
//!   else FUTEX_WAIT(doorbell, 1)
//! ```
//!
//! Of the two fences one comes first, so one side sees what the other wrote. If the producer
//! rings between the consumer's check and its wait, the doorbell is 0 and the wait returns at once.
//!
//! **Producers are not trusted.** A record is copied out once and checked then; `head` is only
//! a claim. The consumer's own position is private, the word in memory is a copy for the
//! producer. The first two words are for programs that are not built with this crate: nothing here
//! relies on them. Whatever the pages hold, a drain ends after at most `cap` calls.

mod consumer;
mod producer;
pub mod record;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

pub use consumer::Consumer;
pub use producer::{Full, Producer, Producers};
pub use record::BadRecord;

const MAGIC: u64 = u64::from_be_bytes(*b"hsring01");

const AWAKE: u32 = 0;
const ASLEEP: u32 = 1;

/// The ring's first page. What consumer and producer write lies in cache line pairs of its own, so
/// that they do not push lines to and fro.
#[repr(C, align(4096))]
pub struct RingWords {
    magic: AtomicU64,
    records: AtomicU64,
    _behind_records: [AtomicU64; 14],
    tail: AtomicU64,
    _behind_tail: [AtomicU64; 15],
    head: AtomicU64,
    _behind_head: [AtomicU64; 15],
    doorbell: AtomicU32,
    _behind_doorbell: [AtomicU32; 31],
    pid: AtomicU32,
    _behind_pid: [AtomicU32; 895],
}

const _: () = assert!(std::mem::offset_of!(RingWords, tail) == 128);
const _: () = assert!(std::mem::offset_of!(RingWords, head) == 256);
const _: () = assert!(std::mem::offset_of!(RingWords, doorbell) == 384);
const _: () = assert!(std::mem::offset_of!(RingWords, pid) == 512);
// No padding: the fields, as many bytes as they have, fill the page, as `shm::mapping` asks.
const _: () =
    assert!(size_of::<RingWords>() == 8 * (2 + 14 + 1 + 15 + 1 + 15) + 4 * (1 + 31 + 1 + 895));

impl RingWords {
    /// Writes what never changes; the rest begins as zero.
    pub(super) fn set_up(&self, records: u64) {
        self.magic.store(MAGIC, Ordering::Relaxed);
        self.records.store(records, Ordering::Relaxed);
    }
}

/// A record in memory.
#[repr(C, align(128))]
pub struct RecordWords([AtomicU64; 16]);

/// A shard's ring in the region, handed to its consumer.
#[derive(Clone, Copy)]
pub struct Ring<'m> {
    pub(super) words: &'m RingWords,
    pub(super) records: &'m [RecordWords],
    pub(super) shard: u8,
    pub(super) shards: u8,
}

#[cfg(test)]
mod tests;
