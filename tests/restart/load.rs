//! A data plane that never stops, whatever becomes of the member that it feeds.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hypersync::conn::{Connection, Tuple};
use hypersync::shm::ingest::Producers;
use hypersync::source::SourceEvent;

use crate::common::copies::{
    Copy, Wanted, connection, connections, copies, push_all, wait_for_agreement,
};
use crate::common::member::{Member, SOON};

/// Connections that live as long as the load, by number from 0.
pub const LASTING: u32 = 2000;

/// Connections that come and go beside them, in each round.
const PASSING: u32 = 50;

/// The lasting ones as they are opened.
pub fn stable() -> Wanted {
    connections(0..LASTING)
}

/// A lasting connection in a round. Marks and timeouts grow: a timeout that only runs down does not
/// travel.
fn in_round(n: u32, round: u32) -> Connection {
    let mut c = connection(n);
    c.state.mark = round << 12 | n;
    c.state.timeout_s = 432_000 + round;
    c
}

/// The load; it ends when it is dropped.
pub struct Load {
    thread: Option<JoinHandle<Wanted>>,
    changes: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
}

impl Load {
    /// Opens the lasting connections at a member.
    pub fn start(member: &Member) -> Load {
        let mut producers = member.producers();
        push_all(&mut producers, stable().values());
        let (changes, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let rounds = Arc::new(AtomicU64::new(0));
        let shared = (changes.clone(), stop.clone(), rounds.clone());
        let thread = std::thread::spawn(move || {
            let (changes, stop, rounds) = shared;
            let (mut wanted, mut round) = (stable(), 0);
            while !stop.load(Ordering::Relaxed) {
                if changes.load(Ordering::Relaxed) {
                    round += 1;
                    change(&mut producers, round, &mut wanted);
                    rounds.store(round.into(), Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            assert!(producers.is_current(), "the ring is another one");
            wanted
        });
        Load { thread: Some(thread), changes, stop, rounds }
    }

    /// Opens the lasting connections at the first of a pair; returns once both have them, and where
    /// each does.
    pub fn at_rest(one: &Member, two: &Member) -> (Load, [HashMap<Tuple, Copy>; 2]) {
        let load = Load::start(one);
        wait_for_agreement("the lasting ones are on both", &[one, two], &stable(), SOON);
        (load, [one, two].map(|member| copies(member).expect("both run")))
    }

    /// From now on connections change, come and go.
    pub fn change(&mut self) {
        self.changes.store(true, Ordering::Relaxed);
    }

    /// Rounds of changes that the rings took whole.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Ends it; returns what should be in the tables.
    pub fn stop(mut self) -> Wanted {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("it runs until here").join().expect("the load does not fail")
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A failed test is told by itself; a thread that goes on would feed a member of the next
        // one.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// One round: a tenth of the lasting ones change, and some of the passing ones come, the last
/// round's go.
fn change(producers: &mut Producers, round: u32, wanted: &mut Wanted) {
    let mut push = |event: SourceEvent| {
        let start = Instant::now();
        // While the member is away the ring is full, and waits.
        while producers.push(&event).is_err() {
            assert!(start.elapsed() < SOON, "nobody reads the ring");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    for n in (round % 10..LASTING).step_by(10) {
        let c = in_round(n, round);
        push(SourceEvent::seen(c));
        wanted.insert(c.original, c);
    }
    let passing =
        |round: u32| (0..PASSING).map(move |n| LASTING + (round % 8) * PASSING + n).map(connection);
    for c in passing(round) {
        push(SourceEvent::seen(c));
        wanted.insert(c.original, c);
    }
    for c in passing(round.wrapping_sub(1)).filter(|_| round > 1) {
        push(SourceEvent::gone(c.original));
        wanted.remove(&c.original);
    }
    producers.flush();
}

/// Checks that each lasting connection is where it was: the same slot, generation, role and other
/// copy.
pub fn same_places(before: &HashMap<Tuple, Copy>, after: &HashMap<Tuple, Copy>) {
    for original in stable().keys() {
        let place =
            |all: &HashMap<Tuple, Copy>| all.get(original).map(|c| (c.kind, c.here, c.peer));
        assert_eq!(place(after), place(before), "{original}");
    }
}
