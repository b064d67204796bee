//! Coordinates: a 64-bit name for the place where one copy of a connection lives.
//!
//! ```text
//!   63    58 57    52 51                        26 25                         0
//!  +--------+--------+----------------------------+---------------------------+
//!  | member | shard  |            slot            |        generation         |
//!  +--------+--------+----------------------------+---------------------------+
//! ```
//!
//! The generation counts the lives of a slot: it moves on at every close, so a coordinate
//! never names another connection by accident. All zero means "nowhere": members are
//! counted from 1.

use crate::limits::{GENERATIONS, MEMBERS_MAX, SHARDS_MAX};

/// A member's number in its group, 1 to 52.
pub type MemberId = u8;

/// The life count of a slot: 26 bits, wrapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Generation(u32);

impl Generation {
    /// The low 26 bits of `raw`.
    pub const fn from_low_bits(raw: u32) -> Generation {
        Generation(raw & (GENERATIONS - 1))
    }

    /// The number as stored.
    pub fn raw(self) -> u32 {
        self.0
    }

    /// The next life of the slot.
    pub fn next(self) -> Generation {
        Generation((self.0 + 1) & (GENERATIONS - 1))
    }
}

/// Where one copy of a connection lives.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Coordinate(u64);

impl Coordinate {
    /// No copy anywhere.
    pub const NOWHERE: Coordinate = Coordinate(0);

    /// The coordinate of a slot in one of its lives.
    pub fn new(member: MemberId, shard: u8, slot: u32, generation: Generation) -> Coordinate {
        debug_assert!(
            member as usize <= MEMBERS_MAX && (shard as usize) < SHARDS_MAX && slot < 1 << 26
        );
        Coordinate(
            (member as u64) << 58
                | (shard as u64) << 52
                | (slot as u64) << 26
                | generation.raw() as u64,
        )
    }

    /// A word from memory or from the wire, unchecked: see [`Coordinate::is_plausible`].
    pub fn from_raw(raw: u64) -> Coordinate {
        Coordinate(raw)
    }

    /// The word.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// 1 to 52; 0 for [`Coordinate::NOWHERE`].
    pub fn member(self) -> MemberId {
        (self.0 >> 58) as u8
    }

    /// The shard of the member.
    pub fn shard(self) -> u8 {
        (self.0 >> 52) as u8 & 63
    }

    /// The slot in the shard's table slice.
    pub fn slot(self) -> u32 {
        (self.0 >> 26) as u32 & ((1 << 26) - 1)
    }

    /// The life of the slot.
    pub fn generation(self) -> Generation {
        Generation::from_low_bits(self.0 as u32)
    }

    /// Whether this names a place at all.
    pub fn is_somewhere(self) -> bool {
        self.member() != 0
    }

    /// Whether the member number is one that a group can have.
    pub fn is_plausible(self) -> bool {
        (1..=MEMBERS_MAX).contains(&(self.member() as usize))
    }

    /// The same slot, one life later: what the name becomes once the copy is closed.
    pub fn next_life(self) -> Coordinate {
        Coordinate::new(self.member(), self.shard(), self.slot(), self.generation().next())
    }
}

impl std::fmt::Display for Coordinate {
    /// `member/shard/slot.generation`, or `-` for nowhere.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.is_somewhere() {
            return f.write_str("-");
        }
        write!(f, "{}/{}/{}.{}", self.member(), self.shard(), self.slot(), self.generation().raw())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinate_keeps_its_four_parts() {
        let c = Coordinate::new(52, 63, (1 << 26) - 1, Generation::from_low_bits(u32::MAX));
        assert_eq!((c.member(), c.shard(), c.slot()), (52, 63, (1 << 26) - 1));
        assert_eq!(c.generation().raw(), GENERATIONS - 1);
        assert_eq!(c.next_life().generation().raw(), 0);
        assert_eq!(Coordinate::from_raw(c.raw()), c);
    }
}
