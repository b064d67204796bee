//! Sums: what each stream's copies add up to, as sent and as held.
//!
//! Of every copy a hash over both coordinates, the stamp and all fields goes, by exclusive or, into
//! one of 256 buckets, chosen by the backup's slot. What changes a copy moves its sum from the hash
//! of before to that of now; nothing is summed up anew. The hash is the same on every kind of host,
//! for two members compare it.

use crate::ccp::message::Place;
use crate::conn::tuple::{Family, Tuple};
use crate::conn::{Connection, Stamp};
use crate::limits::STREAMS_MAX;

/// Buckets of a digest.
pub const BUCKETS: usize = 256;

/// A bit for each bucket.
pub type Mask = [u64; BUCKETS / 64];

/// What both sides must agree on, as a number that is never 0.
pub(super) fn hash(backup: Place, active: Place, stamp: Stamp, connection: &Connection) -> u32 {
    // Folded multiplication, as in the index, without a secret: two sides of one pair compare it.
    fn fold(a: u64, b: u64) -> u64 {
        let wide = (a ^ 0xa076_1d64_78bd_642f) as u128 * (b ^ 0xe703_7ed1_a0b4_28db) as u128;
        (wide >> 64) as u64 ^ wide as u64
    }
    let pair = |high: u32, low: u32| (high as u64) << 32 | low as u64;
    let place = |p: Place| pair(p.slot, p.generation.raw());
    let tuple = |t: &Tuple| {
        let ports = pair(
            (t.sport as u32) << 16 | t.dport as u32,
            (t.zone as u32) << 16 | t.protocol as u32,
        );
        let low = fold(t.src as u64 ^ ports, t.dst as u64);
        match t.family {
            Family::V4 => low,
            Family::V6 => fold(low ^ (t.src >> 64) as u64, (t.dst >> 64) as u64),
        }
    };
    let s = &connection.state;
    let tcp =
        u32::from_be_bytes([s.tcp_state, s.tcp_scale, s.tcp_flags_original, s.tcp_flags_reply]);
    let mut h = fold(place(backup), place(active));
    h ^= fold(pair(stamp.epoch, stamp.version), pair(s.status, tcp)).rotate_left(7);
    h ^= fold(pair(s.mark, s.timeout_s), tuple(&connection.original)).rotate_left(23);
    h = fold(h, tuple(&connection.reply));
    if !connection.extra.is_none() {
        let e = &connection.extra;
        let half = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        for bytes in [&e.labels[..8], &e.labels[8..], &e.helper[..8], &e.helper[8..]] {
            h = fold(h, half(bytes));
        }
        for adjustment in &e.seqadj {
            h = fold(
                h ^ adjustment.correction_position as u64,
                pair(adjustment.offset_before, adjustment.offset_after),
            );
        }
        h = fold(h ^ pair(e.synproxy.isn, e.synproxy.its), pair(e.synproxy.tsoff, e.parts as u32));
        h = fold(h ^ e.protoinfo.value, pair(e.protoinfo.state as u32, e.protoinfo.role as u32));
    }
    ((h >> 32) as u32 ^ h as u32).max(1)
}

/// The bucket of a backup's slot.
fn bucket(slot: u32) -> usize {
    slot as usize % BUCKETS
}

/// Whether the bucket of a backup's slot is among these.
pub(super) fn has(mask: &Mask, slot: u32) -> bool {
    mask[bucket(slot) / 64] >> (bucket(slot) % 64) & 1 == 1
}

/// Those that are in both.
pub(super) fn both(a: &Mask, b: &Mask) -> Mask {
    std::array::from_fn(|i| a[i] & b[i])
}

/// Those that are in the first and not in the second.
pub(super) fn without(a: &Mask, b: &Mask) -> Mask {
    std::array::from_fn(|i| a[i] & !b[i])
}

/// Those that are in either.
pub(super) fn either(a: &Mask, b: &Mask) -> Mask {
    std::array::from_fn(|i| a[i] | b[i])
}

/// The sums of every stream, in one direction. Untouched ones take up no memory.
#[derive(PartialEq, Eq)]
pub(super) struct Sums(Vec<u32>);

impl Sums {
    pub(super) fn new() -> Sums {
        Sums(vec![0; STREAMS_MAX * BUCKETS])
    }

    /// The copy in this slot of the backup was worth `old` and is `new` now; 0: it is not counted.
    pub(super) fn replace(&mut self, stream: usize, slot: u32, old: u32, new: u32) {
        self.0[stream * BUCKETS + bucket(slot)] ^= old ^ new;
    }

    /// All sums of a stream.
    pub(super) fn of(&self, stream: usize) -> &[u32; BUCKETS] {
        self.0.as_chunks().0.get(stream).expect("every stream has its sums")
    }

    /// The buckets whose sums are not these, of which a word has two, the first in its high half.
    /// Words that are left out are zero.
    pub(super) fn differing(&self, stream: usize, mut words: impl Iterator<Item = u64>) -> Mask {
        let mut mask = Mask::default();
        for (pair, own) in self.of(stream).chunks(2).enumerate() {
            let theirs = words.next().unwrap_or(0);
            let differs = [(theirs >> 32) as u32 != own[0], theirs as u32 != own[1]];
            let bits = differs[0] as u64 | (differs[1] as u64) << 1;
            mask[pair / 32] |= bits << (pair % 32 * 2);
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::State;

    fn connection() -> Connection {
        let original = Tuple::v4(6, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2));
        Connection::new(original, original.mirrored(), State { timeout_s: 300, ..State::default() })
    }

    fn place(slot: u32) -> Place {
        Place { slot, generation: Default::default() }
    }

    #[test]
    fn whatever_both_sides_must_agree_on_changes_the_hash() {
        let (stamp, same) = (Stamp { epoch: 1, version: 2 }, connection());
        let of = |backup, active, stamp, connection: &Connection| {
            hash(place(backup), place(active), stamp, connection)
        };
        let known = of(1, 2, stamp, &same);
        assert_ne!(known, 0);
        assert_eq!(known, of(1, 2, stamp, &connection()));
        let changed = |change: fn(&mut Connection)| {
            let mut connection = connection();
            change(&mut connection);
            of(1, 2, stamp, &connection)
        };
        let others = [
            of(3, 2, stamp, &same),
            of(1, 3, stamp, &same),
            of(2, 1, stamp, &same),
            of(1, 2, Stamp { epoch: 2, ..stamp }, &same),
            of(1, 2, stamp.changed(), &same),
            changed(|c| c.state.status = 1),
            changed(|c| c.state.mark = 1),
            changed(|c| c.state.timeout_s = 301),
            changed(|c| c.state.tcp_state = 3),
            changed(|c| c.reply.dport += 1),
            changed(|c| c.original.zone += 1),
            changed(|c| c.extra.helper[0] = 1),
            changed(|c| (c.extra.parts, c.extra.labels[15]) = (1, 1)),
        ];
        for (n, other) in others.iter().enumerate() {
            // (Without its part no field of an extra is there.)
            assert_eq!(*other == known, n == 11, "{n}");
        }
    }

    #[test]
    fn what_was_added_and_taken_away_again_leaves_nothing() {
        let mut sums = Sums::new();
        sums.replace(7, 5, 0, 0xabcd);
        sums.replace(7, 5 + BUCKETS as u32, 0, 0x1234);
        assert_eq!(sums.of(7)[5], 0xabcd ^ 0x1234);
        sums.replace(7, 5, 0xabcd, 0x7777);
        sums.replace(7, 5 + BUCKETS as u32, 0x1234, 0);
        sums.replace(7, 5, 0x7777, 0);
        assert!(sums == Sums::new());
    }

    #[test]
    fn the_buckets_that_differ_are_those_whose_sums_do() {
        let mut sums = Sums::new();
        for slot in [0, 1, 63, 64, 255] {
            sums.replace(3, slot, 0, slot + 1);
        }
        assert_eq!(sums.differing(3, std::iter::empty()), [1 << 63 | 0b11, 1, 0, 1 << 63]);
        let mut words = vec![0u64; BUCKETS / 2];
        for slot in [0, 1, 63, 64, 255usize] {
            words[slot / 2] |= (slot as u64 + 1) << if slot % 2 == 0 { 32 } else { 0 };
        }
        assert_eq!(sums.differing(3, words.iter().copied()), Mask::default());
        assert_eq!(
            sums.differing(4, words.into_iter()),
            [1 << 63 | 0b11, 1, 0, 1 << 63],
            "another stream's"
        );
        let mask = [1 << 63 | 0b11, 1, 0, 1 << 63];
        assert!(has(&mask, 63) && has(&mask, 64 + BUCKETS as u32) && !has(&mask, 2));
    }
}
