//! The feed: a shard's end of its source, and of the kernel's table where copies are committed.
//!
//! ```text
//!  ring    records -------------> rules ---------> Replica
//!  kernel  events, in batches --> rules ---------> Replica
//!          repair: dump, sweep, look-ups --------> Replica     only when something was missed
//!          verify: look-ups of copies -----------> Replica     slowly, all the time
//!          ended: look-ups of closed ones -------> Replica     after a start
//!          leaving: ends that are told later ----> Replica     when an address has left
//!          claims: look-ups of copies -----------> Replica     after events about them
//!          shifts: look-ups of what has a helper > Replica     after expectations, and once a second
//!          writer <--- commits ------------------- Replica
//!          answers: what became of them ---------> Replica     and who asked is told
//! ```

mod admission;
mod answers;
mod asking;
mod claims;
mod ended;
mod kernel;
mod leaving;
mod leftovers;
mod repair;
mod ring;
mod shifts;
mod verify;
mod writer;

pub use kernel::{EVENTS_KEY, KernelFeed, KernelParts};

use crate::counters::Counters;
use crate::net::Port;
use crate::rules::Rules;
use crate::shm::ingest::Consumer;
use crate::sync::Replica;
use crate::time::Time;
use ring::RingFeed;

/// Who tells of connections.
pub enum Feed<'m> {
    /// The kernel.
    Kernel(Box<KernelFeed>),
    /// The ingest ring.
    Ring(RingFeed<'m>),
}

impl<'m> Feed<'m> {
    /// A shard's end of the ring.
    pub fn ring(consumer: Consumer<'m>, rules: Rules) -> Feed<'m> {
        Feed::Ring(RingFeed::new(consumer, rules))
    }

    /// A shard's end of the kernel.
    pub fn kernel(parts: KernelParts) -> Feed<'m> {
        Feed::Kernel(Box::new(KernelFeed::new(parts)))
    }

    /// Whether everything that existed before the start was read.
    pub fn is_complete(&self) -> bool {
        match self {
            Feed::Kernel(kernel) => kernel.is_complete(),
            Feed::Ring(_) => true,
        }
    }

    /// Events wait in the socket.
    pub fn ready(&mut self, now: Time) {
        if let Feed::Kernel(kernel) = self {
            kernel.ready(now);
        }
    }

    /// Takes what the source has, up to the cap of a pass. Returns whether that was hit, so that
    /// more may wait.
    pub fn ingest(
        &mut self,
        now: Time,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) -> bool {
        match self {
            Feed::Ring(ring) => ring.ingest(now, replica, counters),
            Feed::Kernel(kernel) => kernel.ingest(now, replica, counters),
        }
    }

    /// Arms what wakes the shard when the source has something. Returns when to look by itself.
    pub fn arm(&mut self, now: Time, port: &mut Port<'m>) -> Time {
        match self {
            Feed::Ring(ring) => ring.arm(now, port),
            Feed::Kernel(kernel) => kernel.wake_at(now),
        }
    }

    /// Writes up to a pass's share of commits. Returns whether more wait.
    pub fn commit(
        &mut self,
        now: Time,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) -> bool {
        if let Feed::Kernel(kernel) = self {
            kernel.commit(now, replica, counters);
        }
        replica.commits_waiting() > 0
    }
}
