//! The one cast from mapped bytes to atomics.
//!
//! Nothing else in the crate turns an address of shared memory into a reference. Only types
//! made of atomics come out of here ([`Words`]), so a reference never claims that the memory
//! behind it stands still, whatever other threads and processes do to it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::group::GroupWords;
use super::ingest::{RecordWords, RingWords};
use super::layout::Part;
use crate::conn::Slot;
use crate::memory::{ExtraWords, HistoryWords, LeaseWords, StreamWords};

/// A type that may lie in shared memory.
///
/// # Safety
/// It consists of atomic integers only (padding included), so that every bit pattern is a value
/// and a change by another process is no data race. It owns nothing.
pub unsafe trait Words {}

// SAFETY: an atomic integer.
unsafe impl Words for AtomicU64 {}
// SAFETY: an atomic integer.
unsafe impl Words for AtomicU32 {}
// SAFETY: `#[repr(C)]`, sixteen `AtomicU64`, no padding (asserted in `conn::slot`).
unsafe impl Words for Slot {}
// SAFETY: `#[repr(C)]`, an array of `AtomicU64` that fills its alignment (asserted in `layout`).
unsafe impl Words for StreamWords {}
// SAFETY: as above.
unsafe impl Words for ExtraWords {}
// SAFETY: as above.
unsafe impl Words for HistoryWords {}
// SAFETY: as above.
unsafe impl Words for LeaseWords {}
// SAFETY: `#[repr(C)]`, arrays of atomics; what padding it has is never referred to.
unsafe impl Words for GroupWords {}
// SAFETY: `#[repr(C)]`, atomics; what padding it has is never referred to.
unsafe impl Words for RingWords {}
// SAFETY: `#[repr(C)]`, sixteen `AtomicU64`, no padding (asserted in `layout`).
unsafe impl Words for RecordWords {}

/// A shared mapping of a file, or of a range of it.
pub struct Mapping {
    map: MmapRaw,
    starts_at: usize,
}

impl Mapping {
    /// Maps `bytes` from `offset` (a multiple of the page size) for reading and writing.
    pub fn read_write(file: &File, offset: usize, bytes: usize) -> io::Result<Mapping> {
        let map = MmapOptions::new().offset(offset as u64).len(bytes).map_raw(file)?;
        Ok(Mapping { map, starts_at: offset })
    }

    /// Maps the first `bytes` for reading. Through such a mapping only relaxed loads of at most
    /// 8 bytes are allowed; a store ends the process.
    pub fn read_only(file: &File, bytes: usize) -> io::Result<Mapping> {
        let map = MmapOptions::new().len(bytes).map_raw_read_only(file)?;
        Ok(Mapping { map, starts_at: 0 })
    }

    /// Asks the kernel for huge pages; a wish, so nothing fails.
    pub fn advise_huge_pages(&self) {
        if let Err(error) = self.map.advise(Advice::HugePage) {
            log::info!("no huge pages for shared memory: {error}");
        }
    }

    /// The items of a part, which lies in the mapped range (or this panics).
    pub fn slice<T: Words>(&self, part: Part) -> &[T] {
        let at = self.address(part, size_of::<T>());
        assert!(at.cast::<T>().is_aligned(), "parts start on pages");
        // SAFETY: `address` has checked that `items` lie inside the mapping, which lives as long as
        // `self`; the address is aligned; T is `Words`: any bytes are a value and changes from
        // outside are no data race. The file keeps its length: this crate never cuts one
        // (a new region is a new file), and a stranger who did would cause SIGBUS, nothing worse.
        unsafe { std::slice::from_raw_parts(at.cast::<T>(), part.items) }
    }

    /// Address and bytes of a part of `bytes_each` an item, for handing to the kernel. Valid as
    /// long as the mapping lives.
    pub fn bytes_of(&self, part: Part, bytes_each: usize) -> (*const u8, usize) {
        (self.address(part, bytes_each), part.items * bytes_each)
    }

    fn address(&self, part: Part, bytes_each: usize) -> *const u8 {
        let from = part.offset.checked_sub(self.starts_at).expect("the part lies in the mapped range");
        let end = part.items.checked_mul(bytes_each).and_then(|bytes| bytes.checked_add(from));
        assert!(end.is_some_and(|end| end <= self.map.len()), "the part lies in the mapped range");
        // `wrapping_add` keeps the mapping's provenance; the range was checked above.
        self.map.as_mut_ptr().wrapping_add(from).cast_const()
    }
}
