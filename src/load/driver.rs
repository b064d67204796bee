//! The driver: flows on one side, an appliance's ingest rings on the other.

use std::path::Path;
use std::time::Duration;

use super::flows::{Flows, FlowsConfig};
use crate::shm::ShmError;
use crate::shm::ingest::Producers;
use crate::time::Time;

/// Events told in one batch at most, so that a driver that was held up does not flood the rings.
const BATCH_MAX: usize = 4096;

/// A load on one appliance.
pub struct Load {
    /// The connections.
    pub flows: Flows,
    producers: Producers,
    started: Time,
    full: u64,
}

impl Load {
    /// A load on the appliance in `dir`, which begins at `now`.
    ///
    /// # Errors
    /// The appliance is not there, or its rings have a producer.
    pub fn open(dir: &Path, config: FlowsConfig, now: Time) -> Result<Load, ShmError> {
        Ok(Load {
            flows: Flows::new(config),
            producers: Producers::open(dir)?,
            started: now,
            full: 0,
        })
    }

    /// How long the load has been running.
    pub fn age(&self, now: Time) -> Duration {
        now.since(self.started)
    }

    /// Tells what is due, and publishes it. Returns whether the rings took it; what they did not
    /// take comes first the next time.
    pub fn batch(&mut self, now: Time) -> bool {
        let age = self.age(now);
        let producers = &mut self.producers;
        let taken = self.flows.run(age, BATCH_MAX, &mut |event| producers.push(event).is_ok());
        self.full += !taken as u64;
        producers.flush();
        taken
    }

    /// Batches that ended early because a ring was full.
    pub fn full(&self) -> u64 {
        self.full
    }

    /// Whether the appliance still reads what is told; see [`Producers::is_current`].
    pub fn is_current(&self) -> bool {
        self.producers.is_current()
    }
}
