//! Draining: what a member that was told to end waits for before it says goodbye.
//!
//! From the moment that it is told, it says that it is leaving: what moves the traffic moves it
//! now, and others move their copies away. It holds nothing back any more, so that what is younger
//! than the hold, and what begins until the traffic has moved, gets a copy like the rest. It leaves
//! when nothing is exposed and nothing has begun here for a while, or when the limit is reached.

use std::time::Duration;

use crate::time::Time;

/// Nothing begins here any more if nothing did for so long: longer than a moment in which a busy
/// gateway has no new connection.
pub const QUIET: Duration = Duration::from_millis(500);

/// How things are with a member that leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Situation {
    /// Other members that are heard.
    pub others: usize,
    /// Of these, who can take copies.
    pub able: usize,
    /// Copies that this member has for others.
    pub copies: u64,
    /// Connections that nobody else has, or not up to date.
    pub exposed: u64,
    /// Connections that have begun here, since the start.
    pub opened: u64,
}

/// How far a drain is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Drained {
    /// It goes on.
    NotYet,
    /// Nothing is left that somebody could take over.
    Empty,
    /// The limit is reached.
    AtLimit,
}

/// A drain under way.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    since: Time,
    limit: Duration,
    opened: u64,
    opened_at: Time,
    /// When it was looked at last.
    looked_at: Time,
}

impl Drain {
    /// It begins, and lasts so long at most.
    pub fn new(now: Time, limit: Duration, opened: u64) -> Drain {
        Drain { since: now, limit, opened, opened_at: now, looked_at: now }
    }

    /// Since when it has lasted.
    pub fn since(&self) -> Time {
        self.since
    }

    /// Looks at how things are.
    pub fn look(&mut self, now: Time, is: &Situation) -> Drained {
        self.looked_at = now;
        if is.opened != self.opened {
            (self.opened, self.opened_at) = (is.opened, now);
        }
        // Copies can move only if there is a third member; what is ours can reach a second.
        let copies_moved = is.copies == 0 || is.able < 2;
        let is_quiet = self.opened_at.after(QUIET).reached(now);
        let ours_are_safe = is.able == 0 || is.exposed == 0 && is_quiet;
        if is.others == 0 || copies_moved && ours_are_safe {
            Drained::Empty
        } else if self.since.after(self.limit).reached(now) {
            Drained::AtLimit
        } else {
            Drained::NotYet
        }
    }

    /// When to look again, if nothing happens. (That copies move, or arrive, others tell.)
    pub fn poll_at(&self) -> Time {
        let (quiet_at, limit_at) = (self.opened_at.after(QUIET), self.since.after(self.limit));
        if quiet_at.reached(self.looked_at) { limit_at } else { quiet_at.min(limit_at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);
    const BUSY: Situation = Situation { others: 1, able: 1, copies: 3, exposed: 5, opened: 100 };

    fn at(ms: u64) -> Time {
        Time(1).after(Duration::from_millis(ms))
    }

    #[test]
    fn it_ends_when_nothing_is_exposed_and_nothing_has_begun_for_a_while() {
        let mut drain = Drain::new(at(0), LIMIT, 100);
        assert_eq!(drain.look(at(600), &BUSY), Drained::NotYet, "some are exposed");
        let busy = Situation { exposed: 0, opened: 101, ..BUSY };
        assert_eq!(drain.look(at(700), &busy), Drained::NotYet, "one has just begun");
        assert_eq!(drain.poll_at(), at(1200));
        assert_eq!(drain.look(at(1199), &busy), Drained::NotYet);
        assert_eq!(drain.look(at(1200), &busy), Drained::Empty);
    }

    #[test]
    fn what_waits_for_others_is_not_looked_at_all_the_time() {
        let mut drain = Drain::new(at(0), LIMIT, 100);
        assert_eq!(drain.poll_at(), at(500));
        assert_eq!(drain.look(at(500), &BUSY), Drained::NotYet, "some are exposed");
        assert_eq!(drain.poll_at(), at(10_000));
    }

    #[test]
    fn it_ends_at_the_limit_whatever_is_left() {
        let mut drain = Drain::new(at(0), LIMIT, 0);
        for second in 1..10 {
            let busy = Situation { opened: second, ..BUSY };
            assert_eq!(drain.look(at(second * 1000), &busy), Drained::NotYet);
        }
        assert_eq!(drain.look(at(10_000), &BUSY), Drained::AtLimit);
    }

    #[test]
    fn it_waits_for_nobody_who_could_not_take_anything() {
        for (is, drained) in [
            (Situation { others: 0, able: 0, ..BUSY }, Drained::Empty),
            (Situation { able: 0, ..BUSY }, Drained::Empty),
            // Two others: they move their copies to each other.
            (Situation { others: 2, able: 2, exposed: 0, ..BUSY }, Drained::NotYet),
            (Situation { others: 2, able: 2, exposed: 0, copies: 0, ..BUSY }, Drained::Empty),
        ] {
            assert_eq!(Drain::new(at(0), LIMIT, 100).look(at(600), &is), drained, "{is:?}");
        }
    }
}
