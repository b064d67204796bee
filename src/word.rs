//! Words of shared memory, as a writer and as a reader have them.
//!
//! A reader that maps shared memory read-only must not store to it, and of the operations of an
//! atomic only relaxed loads are defined there. So its words are of another type, [`ReadWord`],
//! which can do nothing else. What a reader and a writer do alike is written once, for any
//! [`Word`]; what stores is there for `AtomicU64` only.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::AtomicU64 {}
    impl Sealed for super::AtomicU32 {}
    impl Sealed for super::ReadWord {}
    impl Sealed for super::ReadHalf {}
}

/// A word of 64 bits that somebody else may change at any time: the writer's `AtomicU64`, or a
/// [`ReadWord`]. There are no others: what `shm::mapping` promises of every word rests on that.
pub trait Word: sealed::Sealed {
    /// The word of 32 bits that goes with it.
    type Half: HalfWord;

    /// Loads it, in relaxed order.
    fn get(&self) -> u64;
}

/// A word of 32 bits that somebody else may change at any time.
pub trait HalfWord: sealed::Sealed {
    /// Loads it, in relaxed order.
    fn get(&self) -> u32;
}

/// A word in a read-only mapping: it can be loaded in relaxed order, and nothing else.
#[repr(transparent)]
#[derive(Debug)]
pub struct ReadWord(AtomicU64);

/// A word of 32 bits in a read-only mapping.
#[repr(transparent)]
#[derive(Debug)]
pub struct ReadHalf(AtomicU32);

impl Word for AtomicU64 {
    type Half = AtomicU32;

    #[inline]
    fn get(&self) -> u64 {
        self.load(Ordering::Relaxed)
    }
}

impl HalfWord for AtomicU32 {
    #[inline]
    fn get(&self) -> u32 {
        self.load(Ordering::Relaxed)
    }
}

impl Word for ReadWord {
    type Half = ReadHalf;

    #[inline]
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl HalfWord for ReadHalf {
    #[inline]
    fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}
