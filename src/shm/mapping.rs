//! The one cast from mapped bytes to atomics.
//!
//! Nothing else in the crate turns an address of shared memory into a reference. Only types made of
//! atomics come out of here ([`Words`]), so a reference never claims that the memory behind it
//! stands still, whatever other threads and processes do to it. A mapping and all that comes out of
//! it is of one kind of word: of `AtomicU64` if it was mapped for writing, and otherwise of
//! [`ReadWord`], which can only be loaded. So no safe code can store to a read-only mapping.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, AtomicU64};

use memmap2::{MmapOptions, MmapRaw};

use super::group::GroupWords;
use super::ingest::{RecordWords, RingWords};
use super::layout::Part;
use crate::conn::Slot;
use crate::memory::{ExtraWords, HistoryWords, LeaseWords, StreamWords};
use crate::word::{ReadHalf, ReadWord, Word};

/// A type that may lie in shared memory, in a mapping of words `W`.
///
/// # Safety
/// It consists of such words, or of `W::Half`, and of nothing else: no padding either. So every bit
/// pattern is a value, and a change by another process is no data race. It owns nothing.
pub unsafe trait Words<W: Word> {}

// SAFETY: the word itself.
unsafe impl Words<AtomicU64> for AtomicU64 {}
// SAFETY: its half.
unsafe impl Words<AtomicU64> for AtomicU32 {}
// SAFETY: the word itself, `#[repr(transparent)]` over an `AtomicU64`.
unsafe impl Words<ReadWord> for ReadWord {}
// SAFETY: its half, `#[repr(transparent)]` over an `AtomicU32`.
unsafe impl Words<ReadWord> for ReadHalf {}
// SAFETY: `#[repr(C)]`, sixteen words, no padding (asserted in `conn::slot`).
unsafe impl<W: Word> Words<W> for Slot<W> {}
// SAFETY: `#[repr(C)]`, an array of words that fills its alignment (asserted in `layout`).
unsafe impl<W: Word> Words<W> for StreamWords<W> {}
// SAFETY: as above.
unsafe impl<W: Word> Words<W> for ExtraWords<W> {}
// SAFETY: as above.
unsafe impl<W: Word> Words<W> for HistoryWords<W> {}
// SAFETY: as above.
unsafe impl<W: Word> Words<W> for LeaseWords<W> {}
// SAFETY: `#[repr(C)]`, arrays of words, no padding (asserted in `group`).
unsafe impl<W: Word> Words<W> for GroupWords<W> {}
// SAFETY: `#[repr(C)]`, words and halves, no padding (asserted in `ingest`).
unsafe impl Words<AtomicU64> for RingWords {}
// SAFETY: `#[repr(C)]`, sixteen `AtomicU64`, no padding (asserted in `layout`).
unsafe impl Words<AtomicU64> for RecordWords {}

/// A shared mapping of a file, or of a range of it.
pub struct Mapping<W: Word> {
    map: MmapRaw,
    starts_at: usize,
    word: PhantomData<W>,
}

impl Mapping<AtomicU64> {
    /// Maps `bytes` from `offset` (a multiple of the page size) for reading and writing.
    pub fn read_write(file: &File, offset: usize, bytes: usize) -> io::Result<Mapping<AtomicU64>> {
        let map = MmapOptions::new().offset(offset as u64).len(bytes).map_raw(file)?;
        Ok(Mapping { map, starts_at: offset, word: PhantomData })
    }
}

impl Mapping<ReadWord> {
    /// Maps the first `bytes` for reading.
    pub fn read_only(file: &File, bytes: usize) -> io::Result<Mapping<ReadWord>> {
        let map = MmapOptions::new().len(bytes).map_raw_read_only(file)?;
        Ok(Mapping { map, starts_at: 0, word: PhantomData })
    }
}

impl<W: Word> Mapping<W> {
    /// The items of a part, which lies in the mapped range (or this panics).
    pub fn slice<T: Words<W>>(&self, part: Part) -> &[T] {
        let at = self.address(part, size_of::<T>());
        assert!(at.cast::<T>().is_aligned(), "parts start on pages");
        // SAFETY: `address` has checked that `items` lie inside the mapping, which lives as long as
        // `self`; the address is aligned; T is `Words<W>`: any bytes are a value and changes from
        // outside are no data race; and what is mapped read-only is of `ReadWord`s, whose one
        // operation, a relaxed load of at most 8 bytes, is defined there. The file keeps its
        // length: this crate never cuts one (a new region is a new file), and a stranger who did
        // would cause SIGBUS, nothing worse.
        unsafe { std::slice::from_raw_parts(at.cast::<T>(), part.items) }
    }

    fn address(&self, part: Part, bytes_each: usize) -> *const u8 {
        let from =
            part.offset.checked_sub(self.starts_at).expect("the part lies in the mapped range");
        let end = part.items.checked_mul(bytes_each).and_then(|bytes| bytes.checked_add(from));
        assert!(end.is_some_and(|end| end <= self.map.len()), "the part lies in the mapped range");
        // `wrapping_add` keeps the mapping's provenance; the range was checked above.
        self.map.as_mut_ptr().wrapping_add(from).cast_const()
    }
}
