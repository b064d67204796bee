//! Finding out that a member is dead, from nothing but its silence.
//!
//! A member promises a heartbeat every interval. After `dead_after` intervals without one it is
//! taken for dead: at once, so that its connections go on, and at the risk of being wrong, which
//! the protocol is made to survive. Full-size heartbeats are watched apart: a path that loses
//! large datagrams and passes small ones (an MTU trap) must not become a backup.

use std::time::Duration;

use crate::time::Time;

/// What was heard of one member.
#[derive(Clone, Copy, Debug)]
pub struct Detector {
    silence: Duration,
    full_size_silence: Duration,
    last: Time,
    last_full_size: Option<Time>,
    /// When the first heartbeat of this presence arrived.
    first: Option<Time>,
    /// When a pause of the listener was excused first since the last one arrived.
    excused: Option<Time>,
}

impl Detector {
    /// A member is dead after `silence`, and no backup after `full_size_silence` without a
    /// full-size heartbeat.
    pub fn new(silence: Duration, full_size_silence: Duration) -> Detector {
        Detector {
            silence,
            full_size_silence,
            last: Time(0),
            last_full_size: None,
            first: None,
            excused: None,
        }
    }

    /// What silence means follows from the longer of two rhythms: the listener's and the sender's.
    pub fn expect(&mut self, silence: Duration, full_size_silence: Duration) {
        (self.silence, self.full_size_silence) = (silence, full_size_silence);
    }

    /// A heartbeat arrived.
    pub fn heard(&mut self, now: Time, full_size: bool) {
        self.last = now;
        self.excused = None;
        self.first.get_or_insert(now);
        if full_size {
            self.last_full_size = Some(now);
        }
    }

    /// The listener was not listening: the member has until `interval` from now to be heard.
    pub fn excuse(&mut self, now: Time, interval: Duration) {
        let spared = self.silence.saturating_sub(interval);
        self.last = self.last.max(Time(now.0.saturating_sub(spared.as_nanos() as u64)));
    }

    /// The listener was paused: excused the same way, but not for longer than silence may last. A
    /// listener that is late at each of its passes reads its mail all the same, and a dead member
    /// would be excused for ever.
    pub fn excuse_pause(&mut self, now: Time, interval: Duration) {
        let first = *self.excused.get_or_insert(now);
        if now.since(first) <= self.silence {
            self.excuse(now, interval);
        }
    }

    /// When the last one arrived.
    pub fn last_heard(&self) -> Time {
        self.last
    }

    /// When the member is dead unless it is heard before.
    pub fn silent_at(&self) -> Time {
        self.last.after(self.silence)
    }

    /// Whether full-size heartbeats arrive.
    pub fn hears_full_size(&self, now: Time) -> bool {
        !self.full_size_missed_at().is_none_or(|at| at.reached(now))
    }

    /// When that ends unless one is heard before; `None` if none was heard.
    pub fn full_size_missed_at(&self) -> Option<Time> {
        self.last_full_size.map(|last| last.after(self.full_size_silence))
    }

    /// Whether heartbeats arrive, and none of full size for so long that the path must be losing
    /// those.
    pub fn hears_only_small(&self, now: Time) -> bool {
        let since = self.last_full_size.or(self.first);
        since.is_some_and(|since| now.since(since) > self.full_size_silence)
    }

    /// The member is gone: what it said before counts no more.
    pub fn forget(&mut self) {
        (self.last_full_size, self.first) = (None, None);
    }
}
