//! The appliance's end of a ring: takes records out, believes nothing.

use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::record::{BadRecord, decode};
use super::{ASLEEP, AWAKE, Ring};
use crate::source::SourceEvent;

/// The only reader of a shard's ring.
pub struct Consumer<'m> {
    ring: Ring<'m>,
    /// The next record to read; the word in memory is a copy.
    tail: u64,
    /// The producer's position when last looked at: it never goes back.
    head_seen: u64,
}

impl<'m> Consumer<'m> {
    /// The consumer of a new ring, or of one whose consumer is gone. That goes on where the last
    /// one said that it was, which it said once a drain: what the last drain before a kill handed
    /// over, at most its `cap` records, is handed over again, in the same order, and nothing is
    /// left out. The region must be writable (the appliance's).
    pub fn new(ring: Ring<'m>) -> Consumer<'m> {
        let tail = ring.words.tail.load(Ordering::Relaxed);
        Consumer { ring, tail, head_seen: tail }
    }

    /// Takes at most `cap` records out of the ring and hands each to `f`, checked. If the
    /// producer's position makes no sense, `f` is told once and what the ring holds is skipped.
    /// Returns how often `f` was called.
    pub fn drain(
        &mut self,
        cap: usize,
        f: &mut dyn FnMut(Result<SourceEvent, BadRecord>),
    ) -> usize {
        // Pairs with the release in `Producer::flush`: the records before `head` are visible.
        let head = self.ring.words.head.load(Ordering::Acquire);
        let waiting = head.wrapping_sub(self.tail);
        if waiting > self.ring.records.len() as u64
            || waiting < self.head_seen.wrapping_sub(self.tail)
        {
            self.move_to(head);
            self.head_seen = head;
            f(Err(BadRecord::Position));
            return 1;
        }
        self.head_seen = head;
        let taken = waiting.min(cap as u64);
        for n in 0..taken {
            f(self.read(self.tail.wrapping_add(n)));
        }
        // Also if nothing was taken: a producer may have scribbled over the copy of our position,
        // and the next one would find the ring full for ever.
        if self.ring.words.tail.load(Ordering::Relaxed) != self.tail || taken > 0 {
            self.move_to(self.tail.wrapping_add(taken));
        }
        taken as usize
    }

    fn read(&self, position: u64) -> Result<SourceEvent, BadRecord> {
        let record = &self.ring.records[position as usize & (self.ring.records.len() - 1)];
        let copy = std::array::from_fn(|i| record.0[i].load(Ordering::Relaxed));
        decode(&copy, position, self.ring.shard, self.ring.shards)
    }

    fn move_to(&mut self, tail: u64) {
        self.tail = tail;
        // Pairs with the acquire in `Producer::push`: the records before `tail` have been read.
        self.ring.words.tail.store(tail, Ordering::Release);
    }

    /// Announces that the consumer is about to sleep. `None`: there is work, do not. Otherwise the
    /// futex word and the value to wait for with FUTEX_WAIT (shared, 32 bits). A wait armed earlier
    /// that has not completed still serves: arm one only if there is none. After waking up, for
    /// whatever reason, call [`awake`](Consumer::awake).
    pub fn prepare_sleep(&self) -> Option<(&'m AtomicU32, u32)> {
        let doorbell = &self.ring.words.doorbell;
        doorbell.store(ASLEEP, Ordering::Relaxed);
        // Pairs with the fence in `Producer::wake`: either we see its head or it sees our doorbell.
        fence(Ordering::SeqCst);
        if self.ring.words.head.load(Ordering::Relaxed) != self.tail {
            self.awake();
            return None;
        }
        Some((doorbell, ASLEEP))
    }

    /// Tells the producer that it need not ring.
    pub fn awake(&self) {
        self.ring.words.doorbell.store(AWAKE, Ordering::Relaxed);
    }

    /// Records that the ring holds.
    pub fn size(&self) -> usize {
        self.ring.records.len()
    }
}
