//! Bells: how one shard's thread wakes another's. An eventfd that the other's ring watches.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// One shard's doorbell. Everybody may ring it; its shard hears it.
pub struct Doorbell(OwnedFd);

impl Doorbell {
    /// A doorbell that nobody rang.
    pub fn new() -> io::Result<Doorbell> {
        // SAFETY: the call takes two numbers and returns a new descriptor or -1.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        Ok(Doorbell(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// What to watch: readable once the doorbell was rung.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Wakes its shard, now or when it is about to sleep. Never blocks: a counter that is full
    /// rings as well.
    pub fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the buffer is eight bytes long, as an eventfd asks, and lives through the call.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Heard: the next ring wakes again.
    pub fn hear(&self) {
        let mut count = [0u8; 8];
        // SAFETY: the buffer is eight bytes long, as an eventfd asks, and lives through the call.
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}
