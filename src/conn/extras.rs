//! The sparse table of what only few connections have.
//!
//! Beside every slot there is the number of a record, 0 for none; the records are a pool. One
//! thread writes, any process may read: a record carries a seqlock of its own and the slot that it
//! belongs to.
//!
//! ```text
//!  word  63                             32 31                              0
//!   0   | parts 8 | state 8 | role 8 | 0 8 |   seqlock (odd: torn)          |
//!   1,2 | labels                                        (as ctnetlink has the bytes)
//!   3   | original: correction position    |   original: offset before      |
//!   4   | original: offset after           |   reply: correction position   |
//!   5   | reply: offset before             |   reply: offset after          |
//!   6,7 | helper's name
//!   8   | SYN proxy: isn                   |   its                          |
//!   9   | SYN proxy: tsoff                 |   the slot, plus one; 0: free  |
//!  10   | SCTP verification tags, or DCCP handshake sequence number
//!  11   | zero
//! ```

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::extra::{Extra, ProtoInfo, SeqAdj, Synproxy};
use crate::kill::kill_point;
use crate::memory::ExtraWords;
use crate::word::{HalfWord, Word};

/// One shard's records.
pub struct Extras<'m> {
    records: &'m [ExtraWords],
    of: &'m [AtomicU32],
    free: Vec<u32>,
}

impl<'m> Extras<'m> {
    /// The records of zeroed memory: all are free.
    pub fn new(records: &'m [ExtraWords], of: &'m [AtomicU32]) -> Extras<'m> {
        assert!(
            of.iter().all(|link| link.load(Ordering::Relaxed) == 0),
            "a new table starts in zeroed memory"
        );
        Extras { records, of, free: (0..records.len() as u32).rev().collect() }
    }

    /// The records of memory that a shard takes up again. What the killed process was in the middle
    /// of is dropped: a link of a slot that holds no connection, and a record that is not its
    /// slot's.
    pub fn resume(
        records: &'m [ExtraWords],
        of: &'m [AtomicU32],
        is_connection: impl Fn(u32) -> bool,
    ) -> Extras<'m> {
        let mut used = vec![false; records.len()];
        for (slot, link) in of.iter().enumerate() {
            let record = (link.load(Ordering::Relaxed) as usize).wrapping_sub(1);
            let fits = used.get(record) == Some(&false)
                && is_connection(slot as u32)
                && records[record].0[9].load(Ordering::Relaxed) as u32 == slot as u32 + 1
                && records[record].0[0].load(Ordering::Relaxed) & 1 == 0;
            if fits {
                used[record] = true;
            } else {
                link.store(0, Ordering::Relaxed);
            }
        }
        let free: Vec<u32> =
            (0..records.len() as u32).rev().filter(|r| !used[*r as usize]).collect();
        for record in &free {
            store(&records[*record as usize].0, &Extra::NONE, 0);
        }
        Extras { records, of, free }
    }

    /// Whether the connection in this slot has a record.
    pub fn has(&self, slot: u32) -> bool {
        self.of[slot as usize].load(Ordering::Relaxed) != 0
    }

    /// What the connection in this slot has.
    pub fn get(&self, slot: u32) -> Extra {
        match self.of[slot as usize].load(Ordering::Relaxed) {
            0 => Extra::NONE,
            link => load(&self.records[link as usize - 1].0),
        }
    }

    /// Replaces it. `false` if a record is needed and none is free: then nothing has changed.
    #[must_use]
    pub fn set(&mut self, slot: u32, extra: &Extra) -> bool {
        let link = &self.of[slot as usize];
        match (link.load(Ordering::Relaxed), extra.is_none()) {
            (0, true) => true,
            (0, false) => {
                let Some(record) = self.free.pop() else { return false };
                store(&self.records[record as usize].0, extra, slot + 1);
                kill_point();
                // Pairs with the first load in `snapshot`: who sees the link sees the record.
                link.store(record + 1, Ordering::Release);
                true
            }
            (held, true) => {
                link.store(0, Ordering::Relaxed);
                store(&self.records[held as usize - 1].0, extra, 0);
                self.free.push(held - 1);
                true
            }
            (held, false) => {
                store(&self.records[held as usize - 1].0, extra, slot + 1);
                true
            }
        }
    }

    /// Records that are free.
    pub fn room(&self) -> usize {
        self.free.len()
    }
}

fn store(words: &[AtomicU64; 12], extra: &Extra, owner: u32) {
    let pair = |high: u32, low: u32| (high as u64) << 32 | low as u64;
    let half = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
    let [original, reply] = extra.seqadj;
    let odd = words[0].load(Ordering::Relaxed) as u32 | 1;
    kill_point();
    words[0].store(odd as u64, Ordering::Relaxed);
    // Pairs with the acquire fence in `snapshot`: who sees a word written below also sees the odd
    // count.
    fence(Ordering::Release);
    let values = [
        half(&extra.labels[..8]),
        half(&extra.labels[8..]),
        pair(original.correction_position, original.offset_before),
        pair(original.offset_after, reply.correction_position),
        pair(reply.offset_before, reply.offset_after),
        half(&extra.helper[..8]),
        half(&extra.helper[8..]),
        pair(extra.synproxy.isn, extra.synproxy.its),
        pair(extra.synproxy.tsoff, owner),
        extra.protoinfo.value,
    ];
    for (word, value) in words[1..].iter().zip(values) {
        word.store(value, Ordering::Relaxed);
    }
    kill_point();
    let high = u32::from_be_bytes([extra.parts, extra.protoinfo.state, extra.protoinfo.role, 0]);
    // Pairs with the first load of a record in `snapshot`.
    words[0].store(pair(high, odd.wrapping_add(1)), Ordering::Release);
}

fn load<W: Word>(words: &[W; 12]) -> Extra {
    let word = |i: usize| words[i].get();
    let (high, low) = (|i: usize| (word(i) >> 32) as u32, |i: usize| word(i) as u32);
    let bytes = |i: usize| {
        let mut both = [0; 16];
        both[..8].copy_from_slice(&word(i).to_ne_bytes());
        both[8..].copy_from_slice(&word(i + 1).to_ne_bytes());
        both
    };
    let [parts, state, role, _] = high(0).to_be_bytes();
    let adjustment = |correction_position, offset_before, offset_after| SeqAdj {
        correction_position,
        offset_before,
        offset_after,
    };
    Extra {
        parts,
        labels: bytes(1),
        seqadj: [adjustment(high(3), low(3), high(4)), adjustment(low(4), high(5), low(5))],
        helper: bytes(6),
        synproxy: Synproxy { isn: high(8), its: low(8), tsoff: high(9) },
        protoinfo: ProtoInfo { state, role, value: word(10) },
    }
}

/// What the connection in a slot has, as another thread or process may read it; `None` while it is
/// being written or has just gone elsewhere.
pub fn snapshot<W: Word>(records: &[ExtraWords<W>], of: &[W::Half], slot: u32) -> Option<Extra> {
    let link = of[slot as usize].get();
    if link == 0 {
        return Some(Extra::NONE);
    }
    fence(Ordering::Acquire);
    let words = &records.get(link as usize - 1)?.0;
    let before = words[0].get();
    fence(Ordering::Acquire);
    let extra = load(words);
    let owner = words[9].get() as u32;
    fence(Ordering::Acquire);
    (before & 1 == 0 && words[0].get() == before && owner == slot + 1).then_some(extra)
}

#[cfg(test)]
mod tests {
    use super::super::extra::parts;
    use super::*;

    #[test]
    fn a_record_keeps_every_field_apart_and_goes_back_to_the_pool() {
        let records: Vec<ExtraWords> = (0..2).map(|_| ExtraWords(Default::default())).collect();
        let of: Vec<AtomicU32> = (0..8).map(|_| AtomicU32::new(0)).collect();
        let mut extras = Extras::new(&records, &of);
        let full = Extra {
            parts: parts::ALL,
            labels: std::array::from_fn(|i| i as u8),
            seqadj: [1, 4].map(|n| SeqAdj {
                correction_position: n,
                offset_before: n + 1,
                offset_after: n + 2,
            }),
            helper: std::array::from_fn(|i| 100 + i as u8),
            synproxy: Synproxy { isn: 7, its: 8, tsoff: 9 },
            protoinfo: ProtoInfo { state: 10, role: 11, value: 12 << 40 | 13 },
        };
        let label = Extra { parts: parts::LABELS, labels: [1; 16], ..Extra::NONE };
        assert!(extras.set(3, &full) && extras.set(4, &label) && extras.set(5, &Extra::NONE));
        assert_eq!((extras.get(3), extras.get(4), extras.get(5)), (full, label, Extra::NONE));
        assert_eq!(snapshot(&records, &of, 3), Some(full));
        assert!(!extras.set(5, &label), "the pool is empty");
        assert!(extras.set(3, &label) && extras.set(4, &Extra::NONE) && extras.set(5, &full));
        assert_eq!((extras.get(3), extras.get(4), extras.get(5)), (label, Extra::NONE, full));
        assert_eq!(extras.room(), 0);
    }
}
