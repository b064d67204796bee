//! Time as the pure part sees it: an argument, never a clock.
//!
//! `Time` is nanoseconds of CLOCK_MONOTONIC, which all processes of a host share, so an
//! inspector can tell how old a published time is. Times of two hosts are never compared.

use std::time::Duration;

/// Nanoseconds of the host's monotonic clock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Time(pub u64);

impl Time {
    /// Later than every time that a clock will show.
    pub const NEVER: Time = Time(u64::MAX);

    /// The time `span` after this one; `NEVER` stays `NEVER`.
    pub fn after(self, span: Duration) -> Time {
        Time(self.0.saturating_add(span.as_nanos().min(u64::MAX as u128) as u64))
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Whole seconds, the begun one counted.
    pub fn begun_seconds(self) -> u32 {
        self.0.div_ceil(1_000_000_000).min(u32::MAX as u64) as u32
    }

    /// The second that is so many after the begun one; 0 for none.
    pub fn second_after(self, seconds: u32) -> u32 {
        if seconds == 0 { 0 } else { self.begun_seconds().saturating_add(seconds) }
    }

    /// The second that is so many before the begun one; 0, if the clock had not begun then.
    pub fn second_before(self, seconds: u32) -> u32 {
        self.begun_seconds().saturating_sub(seconds)
    }

    /// Whether a deadline at this time has come.
    pub fn reached(self, now: Time) -> bool {
        self <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_is_never_reached() {
        assert!(!Time::NEVER.after(Duration::from_secs(1)).reached(Time(u64::MAX - 1)));
        assert_eq!(Time(5).since(Time(9)), Duration::ZERO);
    }
}
