//! The host's monotonic clock, for the edges: the shard loop reads it when a pass begins, when it
//! has done its work and before it waits, tools when they need an age. The pure part never does
//! (see [`crate::time`]).
#![allow(unsafe_code)]

use crate::time::Time;

/// Nanoseconds of CLOCK_MONOTONIC, the same in every process of this host.
pub fn now() -> Time {
    let mut at = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `at` is a valid timespec that the call may write; nothing else is touched.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut at) };
    assert_eq!(result, 0, "CLOCK_MONOTONIC exists on every Linux");
    Time(at.tv_sec as u64 * 1_000_000_000 + at.tv_nsec as u64)
}
