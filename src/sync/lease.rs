//! The lease pool: slots at peers that this member may fill.
//!
//! A peer grants slots to a stream, with their generations; the active takes one whenever it
//! needs a backup there and gets it back, one life later, once the close of that connection was
//! acknowledged. In steady state nothing about leases travels. All streams share one pool of
//! entries; each has its chain, oldest first.
//!
//! An entry is two words: what it holds, and the next entry's number plus one.
//!
//! ```text
//!   63                        38 37                       12 11          0
//!  +----------------------------+---------------------------+-------------+
//!  |            slot            |        generation         | stream + 1  |    all zero: free
//!  +----------------------------+---------------------------+-------------+
//! ```
//!
//! A shard that takes up its memory again makes the chains anew from these.

use std::sync::atomic::Ordering;

use crate::ccp::message::Place;
use crate::conn::Generation;
use crate::kill::kill_point;
use crate::limits::STREAMS_MAX;
use crate::memory::LeaseWords;

const NIL: u32 = u32::MAX;

const STREAM_MASK: u64 = (1 << 12) - 1;

const _: () = assert!(STREAMS_MAX < STREAM_MASK as usize);

/// One stream's chain in the pool.
#[derive(Clone, Copy, Debug)]
pub struct LeaseList {
    head: u32,
    tail: u32,
    len: u32,
}

impl Default for LeaseList {
    fn default() -> Self {
        LeaseList { head: NIL, tail: NIL, len: 0 }
    }
}

impl LeaseList {
    /// Slots in it.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether no slot is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// All entries, used and free.
pub struct LeasePool<'m> {
    entries: &'m [LeaseWords],
    free: LeaseList,
}

impl<'m> LeasePool<'m> {
    /// A pool in which every entry is free.
    pub fn new(entries: &'m [LeaseWords]) -> LeasePool<'m> {
        let mut pool = LeasePool { entries, free: LeaseList::default() };
        let mut free = LeaseList::default();
        for entry in 0..entries.len() as u32 {
            pool.append(&mut free, entry);
        }
        pool.free = free;
        pool
    }

    /// The pool that a killed process left behind, and each stream's chain. An entry that `keep`
    /// does not want is free afterwards.
    pub fn resume(
        entries: &'m [LeaseWords],
        mut keep: impl FnMut(usize, Place) -> bool,
    ) -> (LeasePool<'m>, Vec<LeaseList>) {
        let mut pool = LeasePool { entries, free: LeaseList::default() };
        let mut lists = vec![LeaseList::default(); STREAMS_MAX];
        let mut free = LeaseList::default();
        for entry in 0..entries.len() as u32 {
            let word = entries[entry as usize].0[0].load(Ordering::Relaxed);
            let (stream, place) = (((word & STREAM_MASK) as usize).wrapping_sub(1), place_of(word));
            if stream < STREAMS_MAX && keep(stream, place) {
                pool.append(&mut lists[stream], entry);
            } else {
                pool.clear(entry);
                pool.append(&mut free, entry);
            }
        }
        pool.free = free;
        (pool, lists)
    }

    fn clear(&self, entry: u32) {
        kill_point();
        self.entries[entry as usize].0[0].store(0, Ordering::Relaxed);
    }

    /// Entries that no stream uses.
    pub fn room(&self) -> u32 {
        self.free.len
    }

    /// Adds a slot to the lease of a stream, whose chain this is: the last to be used. `false` if
    /// the pool is full.
    pub fn put(&mut self, stream: usize, list: &mut LeaseList, place: Place) -> bool {
        let mut free = self.free;
        let Some(entry) = self.detach(&mut free) else { return false };
        self.free = free;
        let word =
            (place.slot as u64) << 38 | (place.generation.raw() as u64) << 12 | (stream as u64 + 1);
        kill_point();
        self.entries[entry as usize].0[0].store(word, Ordering::Relaxed);
        self.append(list, entry);
        true
    }

    /// Takes the slot that has been in a stream's lease longest.
    pub fn take(&mut self, list: &mut LeaseList) -> Option<Place> {
        let entry = self.detach(list)?;
        let place = place_of(self.entries[entry as usize].0[0].load(Ordering::Relaxed));
        self.clear(entry);
        let mut free = self.free;
        self.append(&mut free, entry);
        self.free = free;
        Some(place)
    }

    /// The slots that [`take`](Self::take) would take next, as many as there are and `into` has
    /// room for.
    pub fn first(&self, list: &LeaseList, into: &mut [Place]) -> usize {
        let (mut entry, count) = (list.head, into.len().min(list.len as usize));
        for place in &mut into[..count] {
            *place = place_of(self.entries[entry as usize].0[0].load(Ordering::Relaxed));
            entry = self.next(entry);
        }
        count
    }

    /// Drops a stream's whole lease at once.
    pub fn drop_all(&mut self, list: &mut LeaseList) {
        if list.is_empty() {
            return;
        }
        let mut next = list.head;
        while next != NIL {
            self.clear(next);
            next = self.next(next);
        }
        match self.free.tail {
            NIL => self.free.head = list.head,
            tail => self.link(tail, list.head),
        }
        self.free.tail = list.tail;
        self.free.len += list.len;
        *list = LeaseList::default();
    }

    fn link(&self, entry: u32, next: u32) {
        self.entries[entry as usize].0[1].store(next.wrapping_add(1) as u64, Ordering::Relaxed);
    }

    fn next(&self, entry: u32) -> u32 {
        (self.entries[entry as usize].0[1].load(Ordering::Relaxed) as u32).wrapping_sub(1)
    }

    fn append(&mut self, list: &mut LeaseList, entry: u32) {
        self.link(entry, NIL);
        match list.tail {
            NIL => list.head = entry,
            tail => self.link(tail, entry),
        }
        list.tail = entry;
        list.len += 1;
    }

    fn detach(&mut self, list: &mut LeaseList) -> Option<u32> {
        if list.head == NIL {
            return None;
        }
        let entry = list.head;
        list.head = self.next(entry);
        list.len -= 1;
        if list.head == NIL {
            list.tail = NIL;
        }
        Some(entry)
    }
}

fn place_of(word: u64) -> Place {
    Place { slot: (word >> 38) as u32, generation: Generation::from_low_bits((word >> 12) as u32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_used_oldest_first_and_dropped_at_once() {
        let words: Vec<LeaseWords> = (0..4).map(|_| LeaseWords(Default::default())).collect();
        let mut pool = LeasePool::new(&words);
        let place = |n| Place { slot: n, generation: Generation::from_low_bits(n * 7) };
        let (mut a, mut b) = (LeaseList::default(), LeaseList::default());
        for n in 0..3 {
            assert!(pool.put(0, &mut a, place(n)));
        }
        assert!(pool.put(3327, &mut b, place(9)));
        assert!(!pool.put(3327, &mut b, place(10)), "the pool is full");
        let mut first = [place(99); 4];
        assert_eq!(pool.first(&a, &mut first[..2]), 2);
        assert_eq!(
            (pool.first(&a, &mut first), first),
            (3, [place(0), place(1), place(2), place(99)])
        );
        assert_eq!(pool.take(&mut a), Some(place(0)));
        pool.drop_all(&mut a);
        assert_eq!((pool.room(), a.len(), pool.take(&mut a)), (3, 0, None));
        for n in 0..3 {
            assert!(pool.put(0, &mut a, place(n)));
        }
        let (mut pool, mut lists) = LeasePool::resume(&words, |_, at| at != place(1));
        let (mut a, mut b) = (lists[0], std::mem::take(&mut lists[3327]));
        assert_eq!((pool.room(), a.len(), b.len()), (1, 2, 1), "what a killed process left behind");
        assert!(pool.take(&mut a).is_some());
        assert_eq!(pool.take(&mut b), Some(place(9)));
        assert_eq!(pool.take(&mut b), None);
    }
}
