//! The one place that reads the host's clock.
//!
//! The pure part takes time as an argument; the loop reads it here once a pass and hands
//! it down. CLOCK_MONOTONIC, because every process of the host shares it and io_uring's
//! absolute deadlines use it.

#![allow(unsafe_code)]

use crate::time::Time;

/// Nanoseconds of CLOCK_MONOTONIC now.
pub fn now() -> Time {
    let mut spec = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec into the place just made for it.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut spec) };
    assert_eq!(result, 0, "every Linux has CLOCK_MONOTONIC");
    Time(spec.tv_sec as u64 * 1_000_000_000 + spec.tv_nsec as u64)
}
