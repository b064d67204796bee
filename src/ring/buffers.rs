//! Receive buffers that the kernel takes from a ring and that give themselves back.
//!
//! Each buffer holds whatever one completion can bring: io_uring's header, the sender's
//! address, the control message and a whole train of datagrams that GRO merged (64 KB).
//! The kernel fills buffers that lie in the ring; a [`Buffer`] is one that it has handed
//! to us, and dropping it is the only way to put it back, so none can be forgotten or put
//! back twice.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::fmt;
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

use memmap2::{MmapMut, MmapOptions};

/// The buffer group's id; there is one.
pub(super) const GROUP: u16 = 0;
/// Room for the sender's address, bytes: sockaddr_in6 has 28.
pub const NAME_ROOM: usize = 32;
/// Room for control data, bytes: one message with an i32 takes 24.
pub const CONTROL_ROOM: usize = 64;
/// Bytes of io_uring_recvmsg_out, before name and control data.
const HEADER: usize = 16;
/// Bytes of a buffer. UDP carries at most 65,527; a multiple of 64 keeps buffers aligned.
const BUFFER_SIZE: usize = HEADER + NAME_ROOM + CONTROL_ROOM + 16 + (64 << 10);
/// Most buffers that a ring of the kernel can hold.
const BUFFERS_MAX: usize = 1 << 15;

const _: () = assert!(BUFFER_SIZE.is_multiple_of(64));

/// An entry of the ring as the kernel defines it (struct io_uring_buf). The tail of the ring
/// lies in the last field of the first entry.
#[repr(C)]
struct RingEntry {
    address: u64,
    len: u32,
    id: u16,
    tail: u16,
}

/// All buffers and the ring that lends them to the kernel.
pub(super) struct BufferPool {
    /// Owns the memory; used through the pointers below only.
    _memory: MmapMut,
    entries: *mut RingEntry,
    buffers: *mut u8,
    count: u16,
    tail: Cell<u16>,
    held: Cell<usize>,
}

impl BufferPool {
    /// A pool of at least `count` buffers, all in the ring. A power of two, as the kernel wants.
    pub(super) fn new(count: usize) -> io::Result<Rc<BufferPool>> {
        let count = count.clamp(1, BUFFERS_MAX).next_power_of_two();
        let ring_len = (count * size_of::<RingEntry>()).next_multiple_of(4096);
        // Populated, so that no page is missing when the first datagrams arrive.
        let mut memory =
            MmapOptions::new().len(ring_len + count * BUFFER_SIZE).populate().map_anon()?;
        let entries = memory.as_mut_ptr().cast::<RingEntry>();
        // SAFETY: the mapping is ring_len and more bytes long.
        let buffers = unsafe { memory.as_mut_ptr().add(ring_len) };
        let pool = BufferPool {
            _memory: memory,
            entries,
            buffers,
            count: count as u16,
            tail: Cell::new(0),
            held: Cell::new(0),
        };
        for id in 0..pool.count {
            pool.give(id);
        }
        Ok(Rc::new(pool))
    }

    /// Address and length of the ring, to register it.
    pub(super) fn ring(&self) -> (u64, u16) {
        (self.entries as u64, self.count)
    }

    /// Whether the kernel has a buffer left, as far as completions were taken.
    pub(super) fn has_free(&self) -> bool {
        self.held.get() < usize::from(self.count)
    }

    /// A buffer that the kernel has just handed out, with `len` bytes in it.
    pub(super) fn take(self: &Rc<Self>, id: u16, len: usize) -> Buffer {
        assert!(id < self.count && len <= BUFFER_SIZE, "the kernel names buffers of the pool only");
        self.held.set(self.held.get() + 1);
        Buffer { pool: Rc::clone(self), id, len }
    }

    fn start(&self, id: u16) -> *mut u8 {
        // SAFETY: id < count (checked in `take`, counted in `new`), and the mapping holds count
        // buffers.
        unsafe { self.buffers.add(usize::from(id) * BUFFER_SIZE) }
    }

    /// Puts a buffer into the ring. Each id is in the ring or out as one `Buffer`, so there is
    /// always room.
    fn give(&self, id: u16) {
        let tail = self.tail.get();
        let slot = usize::from(tail & (self.count - 1));
        // SAFETY: slot < count entries of the mapping, page-aligned. The kernel reads an entry
        // only after it has seen the tail beyond it, which is stored below; we are the
        // only writer (the pool is not Sync). Field by field, because the tail shares the
        // first entry.
        unsafe {
            let entry = self.entries.add(slot);
            (&raw mut (*entry).address).write(self.start(id) as u64);
            (&raw mut (*entry).len).write(BUFFER_SIZE as u32);
            (&raw mut (*entry).id).write(id);
        }
        self.tail.set(tail.wrapping_add(1));
        // SAFETY: the tail is an aligned u16 within the mapping that only we write; the kernel
        // reads it with an acquire load, the pair of this release.
        unsafe { AtomicU16::from_ptr(&raw mut (*self.entries).tail) }
            .store(tail.wrapping_add(1), Ordering::Release);
    }
}

/// A filled receive buffer. Dropping it gives it back to the kernel.
pub struct Buffer {
    pool: Rc<BufferPool>,
    id: u16,
    len: usize,
}

impl Buffer {
    /// What the kernel wrote.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: start(id) is valid for BUFFER_SIZE >= len bytes (checked in `take`), initialized
        // (mapped as zeroes), and not written by the kernel until `drop` puts the id back.
        unsafe { std::slice::from_raw_parts(self.pool.start(self.id), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.held.set(self.pool.held.get() - 1);
        self.pool.give(self.id);
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer {} ({} bytes)", self.id, self.len)
    }
}
