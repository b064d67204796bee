//! The pace of a shard's loop: whether the next pass follows at once, and otherwise how it is
//! waited for.
//!
//! A stage that hit its cap has more to do, and then nothing is waited for. Otherwise the loop
//! waits for whatever completes first, or for the nearest deadline. Under load, which is when
//! passes follow each other closely, a lone wake-up waits a little for company: what waking up
//! costs is shared. After a pass that was full there is nothing to share, and it may not wait: what
//! comes meanwhile may be more than a pass takes, or than a ring holds.

use std::time::Duration;

use crate::time::Time;

/// How long a lone wake-up waits for company. Passes that begin within twice this of each other are
/// load.
pub const GATHER: Duration = Duration::from_micros(500);

/// Which stages of a pass hit their cap, so that more waits for them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Left {
    /// The source has more events, or its ring was full.
    pub ingest: bool,
    /// More datagrams have arrived, or the kernel is owed so much that none can be taken.
    pub receive: bool,
    /// The view was just being written.
    pub view: bool,
    /// The kernel is owed more.
    pub commit: bool,
    /// More is to be sent, and may be.
    pub transmit: bool,
}

impl Left {
    /// Whether any stage has more to do.
    pub fn any(self) -> bool {
        self != Left::default()
    }
}

/// What follows a pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// The next one.
    Pass,
    /// A wait.
    Wait {
        /// No longer than this.
        until: Time,
        /// So long a lone wake-up waits for company.
        gather: Duration,
    },
}

/// How passes have followed each other.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    last_pass: Time,
    was_full: bool,
}

impl Pace {
    /// Before the first pass.
    pub fn new() -> Pace {
        Pace { last_pass: Time(0), was_full: false }
    }

    /// What follows the pass that began at `now`. Call it once in each. `until`: the nearest
    /// deadline.
    pub fn next(&mut self, now: Time, left: Left, until: Time) -> Next {
        let is_load = now.since(self.last_pass) < GATHER * 2 && !self.was_full;
        (self.last_pass, self.was_full) = (now, left.any());
        if left.any() || until.reached(now) {
            return Next::Pass;
        }
        Next::Wait { until, gather: if is_load { GATHER } else { Duration::ZERO } }
    }
}

impl Default for Pace {
    fn default() -> Pace {
        Pace::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Left =
        Left { ingest: false, receive: false, view: false, commit: false, transmit: false };

    fn at(us: u64) -> Time {
        Time(1_000_000_000).after(Duration::from_micros(us))
    }

    fn waits(gather: Duration) -> Next {
        Next::Wait { until: at(50_000), gather }
    }

    /// What follows passes that begin at these times, us.
    fn paced(passes: &[(u64, Left)]) -> Vec<Next> {
        let mut pace = Pace::new();
        passes.iter().map(|(us, left)| pace.next(at(*us), *left, at(50_000))).collect()
    }

    #[test]
    fn a_stage_that_hit_its_cap_means_no_wait() {
        for left in [
            Left { ingest: true, ..NOTHING },
            Left { receive: true, ..NOTHING },
            Left { view: true, ..NOTHING },
            Left { commit: true, ..NOTHING },
            Left { transmit: true, ..NOTHING },
        ] {
            assert_eq!(paced(&[(0, left), (900, left)]), [Next::Pass, Next::Pass], "{left:?}");
        }
        assert_eq!(paced(&[(0, NOTHING)]), [waits(Duration::ZERO)]);
        assert_eq!(Pace::new().next(at(7), NOTHING, at(7)), Next::Pass, "the deadline has come");
    }

    #[test]
    fn wake_ups_are_gathered_while_passes_follow_each_other_closely() {
        let close = paced(&[(0, NOTHING), (999, NOTHING), (1998, NOTHING)]);
        assert_eq!(close, [waits(Duration::ZERO), waits(GATHER), waits(GATHER)]);
        assert_eq!(
            paced(&[(0, NOTHING), (1000, NOTHING)])[1],
            waits(Duration::ZERO),
            "an idle shard"
        );
    }

    #[test]
    fn passes_that_did_not_wait_count_as_load_as_well() {
        let mut pace = Pace::new();
        for us in 0..3000 {
            assert_eq!(pace.next(at(us), NOTHING, at(us)), Next::Pass, "something is due at once");
        }
        assert_eq!(pace.next(at(3001), NOTHING, at(50_000)), waits(GATHER));
    }

    #[test]
    fn after_a_full_pass_nothing_is_gathered() {
        // Gathered, a source that fills its ring again at once would stand still for the rest of
        // that time.
        let full = Left { ingest: true, ..NOTHING };
        let next = paced(&[(0, NOTHING), (100, full), (200, NOTHING), (300, NOTHING)]);
        assert_eq!(next, [waits(Duration::ZERO), Next::Pass, waits(Duration::ZERO), waits(GATHER)]);
    }
}
