//! The ingest ring, as a shard reads it.

use std::time::Duration;

use super::admission::admits;
use crate::counters::{Counter, Counters};
use crate::limits::INGEST_PER_PASS;
use crate::net::Port;
use crate::rules::Rules;
use crate::shm::ingest::{BadRecord, Consumer};
use crate::sync::Replica;
use crate::time::Time;

/// Where the futex is not available, how often the ring is looked at.
const RING_PAUSE: Duration = Duration::from_millis(1);

/// A shard's end of the ring.
pub struct RingFeed<'m> {
    consumer: Consumer<'m>,
    rules: Rules,
    /// What a pass takes at most. A smaller ring that was full is the same: its producer waits.
    cap: usize,
}

impl<'m> RingFeed<'m> {
    pub(super) fn new(consumer: Consumer<'m>, rules: Rules) -> RingFeed<'m> {
        RingFeed { cap: INGEST_PER_PASS.min(consumer.size()), consumer, rules }
    }

    /// Returns whether the cap was hit.
    pub(super) fn ingest(
        &mut self,
        now: Time,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) -> bool {
        self.consumer.awake();
        let RingFeed { consumer, rules, cap } = self;
        let taken = consumer.drain(*cap, &mut |record| match record {
            Ok(event) if !admits(now, rules, None, &event, replica, counters) => {}
            Ok(event) => replica.handle_source(now, &event),
            Err(BadRecord::Position) => counters.count(Counter::SourceOverruns),
            Err(_) => counters.count(Counter::SourceRejected),
        });
        taken == self.cap
    }

    pub(super) fn arm(&mut self, now: Time, port: &mut Port<'m>) -> Time {
        match self.consumer.prepare_sleep() {
            None => now,
            Some((word, expected)) if port.futex_wait(word, expected) => Time::NEVER,
            Some(_) => now.after(RING_PAUSE),
        }
    }
}
