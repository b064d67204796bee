//! Ended: closed TCP connections that the dump at the start found, and whose entries may be used
//! again without an event.
//!
//! A SYN that finds an entry in the state CLOSE may go on with it. If that entry was made while
//! nobody listened it raises no events, not even then, and the dump is over: nobody would hear of
//! the connection. So each of these entries is looked at once a second until it is gone (ten
//! seconds, by default), and before a copy is written in its place.

use std::collections::HashSet;
use std::time::Duration;

use super::asking::BATCH_PAUSE;
use crate::conn::tuple::TCP;
use crate::conn::{Connection, Tuple};
use crate::conntrack::codec::TCP_CLOSE;
use crate::counters::{Counter, Counters};
use crate::time::Time;

/// Connections remembered. Further ones are counted: what goes on with their entries is not heard
/// of before a dump finds it.
const ENDED_MAX: usize = 1024;

/// How often they are looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// A shard's ended connections.
pub(super) struct Ended {
    tuples: HashSet<Tuple>,
    /// What is still to be asked in this round.
    round: Vec<Tuple>,
    /// When the next round begins.
    at: Time,
}

impl Ended {
    pub(super) fn new() -> Ended {
        Ended {
            tuples: HashSet::with_capacity(ENDED_MAX),
            round: Vec::with_capacity(ENDED_MAX),
            at: Time(0),
        }
    }

    /// The dump has shown this entry.
    pub(super) fn note(&mut self, there: &Connection, counters: &Counters<'_>) {
        let is_closed = there.original.protocol == TCP && there.state.tcp_state == TCP_CLOSE;
        match is_closed {
            false => {}
            true if self.tuples.len() < ENDED_MAX => drop(self.tuples.insert(there.original)),
            true => counters.count(Counter::EndedFull),
        }
    }

    /// The next one whose entry is to be asked for.
    pub(super) fn next(&mut self, now: Time) -> Option<Tuple> {
        if self.round.is_empty() && self.at.reached(now) {
            self.at = now.after(PERIOD);
            self.round.extend(&self.tuples);
        }
        while let Some(tuple) = self.round.pop() {
            if self.tuples.contains(&tuple) {
                return Some(tuple);
            }
        }
        None
    }

    /// Whether this one is to be asked for.
    pub(super) fn has(&self, tuple: &Tuple) -> bool {
        !self.tuples.is_empty() && self.tuples.contains(tuple)
    }

    /// This one is not to be asked for any more. Whether it was.
    pub(super) fn take(&mut self, tuple: &Tuple) -> bool {
        self.tuples.remove(tuple)
    }

    /// When [`next`](Self::next) has one.
    pub(super) fn wake_at(&self, now: Time) -> Time {
        match (self.tuples.is_empty(), self.round.is_empty()) {
            (true, _) => Time::NEVER,
            (false, false) => now.after(BATCH_PAUSE),
            (false, true) => self.at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::State;
    use crate::memory::{MemorySize, OwnedMemory};

    fn closed(port: u16, tcp_state: u8) -> Connection {
        let original = Tuple::v4(TCP, ([10, 0, 0, 1].into(), port), ([10, 0, 0, 2].into(), 2));
        let state = State { tcp_state, ..State::default() };
        Connection::new(original, original.mirrored(), state)
    }

    #[test]
    fn what_is_closed_is_asked_for_once_a_second_until_it_is_taken() {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let counters = Counters::new(memory.parts().counters);
        let mut ended = Ended::new();
        let at = |seconds| Time(1).after(Duration::from_secs(seconds));
        assert_eq!(ended.wake_at(at(0)), Time::NEVER);
        ended.note(&closed(1, TCP_CLOSE), &counters);
        ended.note(&closed(2, 7), &counters); // In TIME_WAIT a SYN makes a new entry.
        let tuple = closed(1, TCP_CLOSE).original;
        assert_eq!((ended.next(at(0)), ended.next(at(0))), (Some(tuple), None));
        assert_eq!(ended.wake_at(at(0)), at(1));
        assert_eq!((ended.next(at(1)), ended.next(at(1))), (Some(tuple), None));
        assert!(ended.take(&tuple) && !ended.take(&tuple));
        assert_eq!((ended.next(at(2)), ended.wake_at(at(2))), (None, Time::NEVER));
        (0..=ENDED_MAX as u16).for_each(|port| ended.note(&closed(port, TCP_CLOSE), &counters));
        assert_eq!((ended.tuples.len(), counters.get(Counter::EndedFull)), (ENDED_MAX, 1));
    }
}
