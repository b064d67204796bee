//! The index: from a tuple to the slot that holds its connection.
//!
//! Open addressing with linear probing over 8-byte entries in shared memory, so that an
//! inspector can look a tuple up as well. An entry keeps the slot and 37 bits of the hash,
//! from which the home bucket of any table size follows: removal can close the gap (backward
//! shift) without touching a slot, and there are no tombstones to clean up.
//!
//! ```text
//!   63    62                              26 25            0
//!  | used |          hash, 37 bits          |     slot      |
//! ```
//!
//! The hash is keyed, since an attacker chooses ports. A slot is entered twice, by its
//! original and its reply tuple. Two slots may have the same tuple for a moment (a new
//! connection that overtook the close of the old one), so look-ups take a predicate.

use std::sync::atomic::{AtomicU64, Ordering};

use super::tuple::{Family, Tuple};
use crate::word::Word;

const USED: u64 = 1 << 63;
const SLOT_BITS: u32 = 26;
const HASH_MASK: u64 = (1 << 37) - 1;

/// The index over its part of the memory.
pub struct Index<'m, W = AtomicU64> {
    buckets: &'m [W],
    key: u64,
}

/// Buckets for a slice of `capacity` slots: two entries a slot at a load of at most 2/3.
pub const fn buckets_for(capacity: usize) -> usize {
    (capacity * 3).next_power_of_two()
}

impl<'m, W: Word> Index<'m, W> {
    /// An index over `buckets`, whose number is a power of two; `key` is secret to attackers.
    pub fn new(buckets: &'m [W], key: u64) -> Index<'m, W> {
        assert!(buckets.len().is_power_of_two() && buckets.len() < 1 << 37);
        Index { buckets, key }
    }

    /// 37 bits of a keyed hash of the tuple.
    fn hash(&self, t: &Tuple) -> u64 {
        // Folded multiplication, as in wyhash: fast, and unpredictable without the key.
        fn fold(a: u64, b: u64) -> u64 {
            let wide = a as u128 * b as u128;
            (wide >> 64) as u64 ^ wide as u64
        }
        let family = matches!(t.family, Family::V6) as u64;
        let small = (t.sport as u64) << 48
            | (t.dport as u64) << 32
            | (t.zone as u64) << 16
            | (t.protocol as u64) << 8
            | family;
        let k0 = self.key ^ 0xa076_1d64_78bd_642f;
        let k1 = self.key.rotate_left(32) ^ 0xe703_7ed1_a0b4_28db;
        let mut h = fold(t.src as u64 ^ k0, t.dst as u64 ^ k1);
        if t.family == Family::V6 {
            h = fold((t.src >> 64) as u64 ^ k1 ^ h, (t.dst >> 64) as u64 ^ k0);
        }
        fold(h ^ k0, small ^ k1) & HASH_MASK
    }

    fn mask(&self) -> usize {
        self.buckets.len() - 1
    }

    fn home(&self, entry: u64) -> usize {
        (entry >> SLOT_BITS & HASH_MASK) as usize & self.mask()
    }

    /// The first slot entered under this tuple that `is_it` accepts.
    pub fn find(&self, t: &Tuple, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let hash = self.hash(t);
        let mut at = hash as usize & self.mask();
        // Bounded even if another process scribbled over the index while this one reads it.
        for _ in 0..self.buckets.len() {
            let entry = self.buckets[at].get();
            if entry == 0 {
                return None;
            }
            let slot = entry as u32 & ((1 << SLOT_BITS) - 1);
            if entry >> SLOT_BITS & HASH_MASK == hash && is_it(slot) {
                return Some(slot);
            }
            at = (at + 1) & self.mask();
        }
        None
    }
}

impl Index<'_> {
    /// Empties it.
    pub fn clear(&self) {
        self.buckets.iter().for_each(|bucket| bucket.store(0, Ordering::Relaxed));
    }

    /// Enters a slot under a tuple.
    pub fn insert(&self, t: &Tuple, slot: u32) {
        let hash = self.hash(t);
        let mut at = hash as usize & self.mask();
        for _ in 0..self.buckets.len() {
            if self.buckets[at].load(Ordering::Relaxed) == 0 {
                let entry = USED | hash << SLOT_BITS | slot as u64;
                self.buckets[at].store(entry, Ordering::Relaxed);
                return;
            }
            at = (at + 1) & self.mask();
        }
        panic!("the index has room for two entries a slot");
    }

    /// Removes a slot's entry under a tuple; it must be there.
    pub fn remove(&self, t: &Tuple, slot: u32) {
        let entry = USED | self.hash(t) << SLOT_BITS | slot as u64;
        let mut gap = self.home(entry);
        for _ in 0..self.buckets.len() {
            if self.buckets[gap].load(Ordering::Relaxed) == entry {
                break;
            }
            gap = (gap + 1) & self.mask();
        }
        assert!(
            self.buckets[gap].load(Ordering::Relaxed) == entry,
            "slot {slot} is not in the index"
        );
        // Close the gap: move up every follower that its home bucket allows to.
        let mut at = gap;
        loop {
            at = (at + 1) & self.mask();
            let follower = self.buckets[at].load(Ordering::Relaxed);
            if follower == 0 {
                break;
            }
            let from_home = at.wrapping_sub(self.home(follower)) & self.mask();
            let from_gap = at.wrapping_sub(gap) & self.mask();
            if from_home >= from_gap {
                self.buckets[gap].store(follower, Ordering::Relaxed);
                gap = at;
            }
        }
        self.buckets[gap].store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::net::Ipv4Addr;

    #[test]
    fn entries_survive_any_order_of_removals() {
        let memory: Vec<AtomicU64> = (0..buckets_for(300)).map(|_| AtomicU64::new(0)).collect();
        let index = Index::new(&memory, 42);
        let tuple =
            |n: u32| Tuple::v4(17, (Ipv4Addr::from(n), n as u16), (Ipv4Addr::from(n ^ 99), 53));
        let mut model: HashMap<u32, u32> = HashMap::new();
        let mut rng = 1u64;
        for step in 0..if cfg!(miri) { 400 } else { 20_000u32 } {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let n = (rng >> 40) as u32 % 600;
            match model.remove(&n) {
                Some(slot) => index.remove(&tuple(n), slot),
                None if model.len() < 600 => {
                    index.insert(&tuple(n), step);
                    model.insert(n, step);
                }
                None => {}
            }
            if step % 500 == 0 {
                for n in 0..600 {
                    let found = index.find(&tuple(n), |_| true);
                    assert_eq!(found, model.get(&n).copied(), "tuple {n} at step {step}");
                }
            }
        }
        for (n, slot) in model {
            index.remove(&tuple(n), slot);
        }
        assert!(memory.iter().all(|b| b.load(Ordering::Relaxed) == 0), "nothing stays behind");
    }

    #[test]
    fn two_slots_under_one_tuple_are_told_apart() {
        let memory: Vec<AtomicU64> = (0..16).map(|_| AtomicU64::new(0)).collect();
        let index = Index::new(&memory, 1);
        let t = Tuple::v4(6, (Ipv4Addr::from(1), 1), (Ipv4Addr::from(2), 2));
        index.insert(&t, 3);
        index.insert(&t, 4);
        assert_eq!(index.find(&t, |s| s == 4), Some(4));
        index.remove(&t, 3);
        assert_eq!(index.find(&t, |_| true), Some(4));
    }
}
