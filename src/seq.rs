//! Sequence numbers of a stream.
//!
//! A sequence number counts the datagrams of one session of a stream, from 1. It has 48 bits on
//! the wire: at a million datagrams a second it lasts nine years, so it never wraps (at the end an
//! assertion fails). `Seq::NONE` (0) means "in no datagram". Comparisons go through the methods
//! here, so that what a comparison means has a name.

/// A position in a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seq(u64);

impl Seq {
    /// In no datagram; also the floor of a stream on which nothing was acknowledged.
    pub const NONE: Seq = Seq(0);
    /// The last number of a session.
    pub const LAST: Seq = Seq((1 << 48) - 1);

    /// A number read from the wire or from shared memory; `None` past 48 bits.
    pub fn from_raw(raw: u64) -> Option<Seq> {
        (raw <= Self::LAST.0).then_some(Seq(raw))
    }

    /// The low 48 bits, for words that keep something else above them.
    pub fn from_low_bits(word: u64) -> Seq {
        Seq(word & Self::LAST.0)
    }

    /// The number as it stands on the wire.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The number after this one.
    pub fn next(self) -> Seq {
        assert!(self.0 < Self::LAST.0, "a stream outlived its sequence numbers");
        Seq(self.0 + 1)
    }

    /// The number `n` after this one.
    pub fn plus(self, n: u64) -> Seq {
        Seq(self.0 + n)
    }

    /// Whether a floor has passed this number: at or below the floor, and a number at all.
    pub fn is_passed_by(self, floor: Seq) -> bool {
        self != Seq::NONE && self.0 <= floor.0
    }

    /// Whether this number comes after `other`.
    pub fn is_after(self, other: Seq) -> bool {
        self.0 > other.0
    }

    /// How many numbers this one lies beyond `floor`; 0 if it does not.
    pub fn beyond(self, floor: Seq) -> u64 {
        self.0.saturating_sub(floor.0)
    }

    /// The later of two numbers.
    pub fn max(self, other: Seq) -> Seq {
        Seq(self.0.max(other.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_floor_passes_a_connection_that_was_never_sent() {
        assert!(!Seq::NONE.is_passed_by(Seq::LAST));
        assert!(Seq(7).is_passed_by(Seq(7)));
        assert!(!Seq(8).is_passed_by(Seq(7)));
    }

    #[test]
    fn numbers_past_48_bits_are_refused() {
        assert_eq!(Seq::from_raw(1 << 48), None);
        assert_eq!(Seq::from_raw(9), Some(Seq(9)));
    }
}
