//! The ring itself: push, submit, wait, collect.
//!
//! Completions go through a bounded queue before anybody acts on them: what an action pushes
//! can then never change the set that is being worked through, and a pass has an end.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use io_uring::types::{CancelBuilder, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue};

use super::buffers::BufferPool;
use super::error::{RingError, errno_of};
use super::operation::{Completion, Full, Operation};
use super::probe::{Features, build};
use crate::clock;
use crate::time::Time;

/// Operations that can be queued between two submissions. When full, `push` submits.
pub const SUBMISSIONS: usize = 512;
/// Completions that can wait for us: two for each zero-copy send in flight, and room.
const COMPLETIONS: usize = 8 * SUBMISSIONS;
/// Completions that end a gathering wait early.
const GATHER_COMPLETIONS: usize = 16;
/// How long the end of a ring waits for the kernel to let go of what is in flight.
const GOODBYE: Duration = Duration::from_secs(1);

/// An io_uring for the thread that made it.
pub struct Ring {
    // Closed before the pool's memory goes away: fields are dropped in order.
    uring: IoUring,
    pool: Rc<BufferPool>,
    features: Features,
    collected: VecDeque<Completion>,
}

impl Ring {
    /// A ring with `buffers` receive buffers, rounded up to a power of two.
    pub fn new(wanted: Features, buffers: usize) -> Result<Ring, RingError> {
        let (uring, features) = build(SUBMISSIONS as u32, COMPLETIONS as u32, wanted)?;
        let needed = (buffers * (64 << 10)) as u64;
        let what = "the receive buffers";
        let pool =
            BufferPool::new(buffers).map_err(|error| RingError::register(what, needed, &error))?;
        let (address, count) = pool.ring();
        // SAFETY: the pool maps `count` entries at `address` and lives until after the ring (drop
        // order of the fields; `drop` leaks it if the kernel does not let go).
        unsafe {
            uring.submitter().register_buf_ring_with_flags(address, count, super::buffers::GROUP, 0)
        }
        .map_err(|error| RingError::register(what, needed, &error))?;
        let collected = VecDeque::with_capacity(COMPLETIONS);
        Ok(Ring { uring, pool, features, collected })
    }

    /// Registers the send arena, whose pages are locked from here on.
    pub fn register_arena(&mut self, arena: &[AtomicU64]) -> Result<(), RingError> {
        let len = size_of_val(arena);
        let vector = libc::iovec { iov_base: arena.as_ptr() as *mut libc::c_void, iov_len: len };
        // SAFETY: the address and length are those of a live slice. The kernel pins its pages, so
        // they stay even if the mapping goes; it only reads them (no operation receives into
        // registered memory), and concurrent writes by us go through atomics.
        unsafe { self.uring.submitter().register_buffers(&[vector]) }
            .map_err(|error| RingError::register("the send arena", len as u64, &error))
    }

    /// What is in use of what was wanted.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Whether the kernel has a receive buffer left.
    pub fn has_free_buffer(&self) -> bool {
        self.pool.has_free()
    }

    /// Operations pushed that the kernel has not seen yet.
    pub fn unsubmitted(&mut self) -> usize {
        self.uring.submission().len()
    }

    /// Makes room for `count` operations, submitting if need be.
    pub fn reserve(&mut self, count: usize) -> Result<(), Full> {
        if SUBMISSIONS - self.unsubmitted() < count {
            // An error here will come again from the next wait, which reports it.
            let _ = self.submit();
        }
        if SUBMISSIONS - self.unsubmitted() < count { Err(Full) } else { Ok(()) }
    }

    /// Queues an operation whose completions will carry `token`.
    ///
    /// # Safety
    ///
    /// Until the operation's last completion (or the end of the ring) every pointer in it stays
    /// valid, and until it is submitted its descriptor stays open.
    pub unsafe fn push(&mut self, operation: Operation, token: u64) -> Result<(), Full> {
        self.reserve(1)?;
        let entry = operation.entry().user_data(token);
        // SAFETY: the caller promises that what the entry points to stays valid.
        unsafe { self.uring.submission().push(&entry) }.map_err(|_| Full)
    }

    /// Hands everything queued to the kernel and lets it finish what is ready. Never waits.
    pub fn submit(&mut self) -> Result<(), RingError> {
        let queue = self.uring.submission();
        if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(());
        }
        drop(queue);
        self.enter(0, EnterFlags::GETEVENTS, None::<&SubmitArgs>)
    }

    /// Submits, then waits for a completion until `deadline`. With a `gather` above zero (and
    /// the feature) a lone completion waits that long for company.
    pub fn wait(&mut self, deadline: Time, gather: Duration) -> Result<(), RingError> {
        let now = clock::now();
        let ready = !self.collected.is_empty() || !self.uring.completion().is_empty();
        if ready || deadline.reached(now) {
            return self.submit();
        }
        let mut flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
        flags.set(EnterFlags::NO_IOWAIT, self.features.no_iowait);
        flags.set(EnterFlags::ABS_TIMER, self.features.abs_timer);
        let until = if self.features.abs_timer {
            Duration::from_nanos(deadline.0)
        } else {
            deadline.since(now)
        };
        let timespec = Timespec::from(until);
        let mut arguments = SubmitArgs::new().timespec(&timespec);
        let mut want = 1;
        // The kernel would let the gathering outlast the deadline.
        let gather = gather.min(deadline.since(now));
        if self.features.min_wait && gather >= Duration::from_micros(1) {
            arguments = arguments.min_wait_usec(gather.as_micros() as u32);
            want = GATHER_COMPLETIONS as u32;
        }
        match self.enter(want, flags, Some(&arguments)) {
            // The flag is checked before anything is submitted, so nothing is lost by a second try.
            Err(RingError::Enter { errno: libc::EINVAL }) if self.features.abs_timer => {
                self.features.abs_timer = false;
                self.wait(deadline, gather)
            }
            result => result,
        }
    }

    fn enter(
        &mut self,
        want: u32,
        flags: EnterFlags,
        arguments: Option<&SubmitArgs>,
    ) -> Result<(), RingError> {
        let submissions = self.uring.submission().len() as u32;
        // SAFETY: with EXT_ARG the argument is a live SubmitArgs (the kernel's
        // io_uring_getevents_arg) whose timespec the caller keeps on its stack; without, there is
        // none. What the queued operations point to is promised by the callers of `push`.
        let result =
            unsafe { self.uring.submitter().enter(submissions, want, flags.bits(), arguments) };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match errno_of(&error) {
                // The deadline, a signal, or too many completions that we have not taken: all
                // are answered by going on with the pass.
                libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY => Ok(()),
                errno => Err(RingError::Enter { errno }),
            },
        }
    }

    /// Moves the kernel's completions to the queue, as many as it has room for.
    pub fn collect(&mut self) {
        let room = COMPLETIONS - self.collected.len();
        for entry in self.uring.completion().take(room) {
            let id = cqueue::buffer_select(entry.flags());
            let buffer = id.map(|id| self.pool.take(id, entry.result().max(0) as usize));
            self.collected.push_back(Completion::new(&entry, buffer));
        }
    }

    /// The next collected completion.
    pub fn take(&mut self) -> Option<Completion> {
        self.collected.pop_front()
    }
}

impl Drop for Ring {
    /// Cancels everything in flight, so that the kernel writes to no buffer that is about to be
    /// freed.
    fn drop(&mut self) {
        self.collected.clear();
        let submitter = self.uring.submitter();
        let cancelled = submitter.register_sync_cancel(Some(GOODBYE.into()), CancelBuilder::any());
        let gone = match cancelled {
            Ok(()) => true,
            Err(error) => errno_of(&error) == libc::ENOENT,
        };
        // SAFETY: submits nothing and passes no argument; it runs the cancellations.
        let _: io::Result<usize> =
            unsafe { submitter.enter::<libc::sigset_t>(0, 0, EnterFlags::GETEVENTS.bits(), None) };
        if !gone {
            std::mem::forget(Rc::clone(&self.pool));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_wait_ends_at_its_deadline_with_and_without_features() {
        for features in [Features::all(), Features::none()] {
            let mut ring = Ring::new(features, 2).unwrap();
            let deadline = clock::now().after(Duration::from_millis(20));
            ring.wait(deadline, Duration::ZERO).unwrap();
            assert!(deadline.reached(clock::now()), "{features:?}");
            let deadline = clock::now().after(Duration::from_millis(5));
            ring.wait(deadline, Duration::from_millis(50)).unwrap();
            assert!(
                clock::now().since(deadline) < Duration::from_millis(40),
                "gathering outlasts no deadline"
            );
        }
    }

    #[test]
    fn refused_setup_flags_are_left_out_and_the_rest_is_kept() {
        let mut wanted = Features::all();
        wanted.single_issuer = false;
        let ring = Ring::new(wanted, 2).unwrap();
        assert!(!ring.features().defer_taskrun, "deferring needs a single issuer");
    }

    #[test]
    fn a_readable_descriptor_ends_the_wait() {
        let mut ring = Ring::new(Features::all(), 2).unwrap();
        let (mut near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        // SAFETY: no pointers; `far` lives to the end of the test.
        unsafe { ring.push(Operation::Readable { fd: far.as_raw_fd() }, 7) }.unwrap();
        ring.submit().unwrap();
        io::Write::write_all(&mut near, b"x").unwrap();
        ring.wait(Time::NEVER, Duration::ZERO).unwrap();
        ring.collect();
        let completion = ring.take().unwrap();
        assert_eq!((completion.token, completion.more), (7, false));
    }
}
