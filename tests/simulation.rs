//! The simulator: the protocol that ships, in simulated time, driven by a seed through whatever may
//! happen to a group, with a checker for each promise of the design that it could break.
//!
//! A run has phases of faults, in which what must hold at any time is checked after every step, and
//! phases of peace, in which everything has to agree within a stated simulated time.
//!
//! Here the truth tells the sources what there is. `all_traffic` (tests/simulation/traffic) has
//! kernels and packets instead.
//!
//! `SEED=n` replays one seed with a line an event on stderr (time, member, what, detail); `SEEDS=n`
//! sets how many are run, `FIRST=n` the first of them. Every failure is told, a line each, with
//! what replays it. `tests/soak` runs any range for as long as one likes. With the feature
//! `mutations`, `MUTATION=name` tries one deliberate fault only.
//!
//! In half of the seeds a shard makes a pass only when something arrives or the time that its
//! `poll_at` announced has come, as the appliance's loop does. A shard that something arrives for
//! makes one more pass first, as a loop may that is woken for nothing: if that sends anything, a
//! timer was not announced.
//!
//! In part of the seeds the members' tables, arenas and rooms for extras are of different size,
//! also from one start of a member to the next. Where an extra may find no room it is left out, so
//! there extras are not compared.
//!
//! In part of the seeds traffic of a connection shows up at its active and at its backup within one
//! round trip, in any order. Of their states the one with the highest stamp stays, of equal ones
//! the higher member's: what the other one saw since is lost.
//!
//! In part of the seeds traffic moves to a member that has no copy of its connection. Nobody there
//! asks for one: it begins there, exposed where its backup would be one of the pair, until the
//! kernels of the pair, which see no packets any more, have forgotten it. Until then the pair's
//! older state outranks the new one, also in the kernel of the third, and its next packet there has
//! to tell all of it again.
//!
//! In part of the seeds a process that was killed takes its memory up again only after 3 to 22
//! times `reprotect_after`, under much traffic. Meanwhile its gateway goes on, or the routes lead
//! elsewhere, and what was its moves, closes and opens again. What ended elsewhere meanwhile nobody
//! can tell it: its kernel forgets that.
//!
//! In part of the seeds generations of slots, sessions of streams and numbers of declines begin
//! shortly before they wrap, and when all is at rest all processes are restarted over memories in
//! which versions of states (and the ten bits of an epoch that a history keeps) are about to wrap,
//! and numbers of streams stand short of 32 bits or far up in their 48.
//!
//! What the protocol does not handle yet is not generated. Two members may end up as actives of one
//! connection that neither sends to the other: when traffic moves to a member whose claim the
//! former one cannot hear, or that nobody told of the connection, when it shows up at once at two
//! of three that have a copy, when a member dies in the middle of a move, in seeds whose faults
//! overlap. There, and for closes that died with the only member that knew of them, kernels forget
//! entries without traffic, as real ones do. A datagram cut exactly where a message ends reads like
//! a whole one, for nothing in it tells its length (UDP does): such cuts are not made.

#[path = "simulation/checkers.rs"]
mod checkers;
#[path = "simulation/plan.rs"]
mod plan;
#[path = "simulation/scale.rs"]
mod scale;
#[path = "simulation/sim.rs"]
mod sim;
#[path = "simulation/traffic/mod.rs"]
mod traffic;
#[path = "simulation/truth.rs"]
mod truth;
#[path = "protocol/world.rs"]
#[allow(dead_code)]
mod world;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Arguments;
use std::io::Write;
use std::ops::{ControlFlow, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
#[cfg(feature = "mutations")]
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use hypersync::conn::MemberId;
use hypersync::time::Time;
use plan::Plan;
use sim::Sim;
use world::Rng;

/// Counts the bytes that each thread has allocated and not freed.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<isize> = const { Cell::new(0) };
    static LAST_PANIC: Cell<Option<String>> = const { Cell::new(None) };
}

// SAFETY: everything is handed on to the system's allocator; the count is a thread-local without a
// destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.set(ALLOCATED.get() + layout.size() as isize);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        ALLOCATED.set(ALLOCATED.get() - layout.size() as isize);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn print_event(now: Time, member: MemberId, what: &str, detail: Arguments<'_>) {
    eprintln!("{:>12.6} {member:>2} {what:<8} {detail}", (now.0 - 1_000_000_000) as f64 / 1e9);
}

/// Runs one seed; what broke, if anything did, and after how many steps.
fn run(seed: u64, log: bool) -> Result<u64, String> {
    let mut rng = Rng(seed);
    let plan = Plan::draw(&mut rng);
    tell_plan(&plan, log);
    let memories = plan.memories();
    survive(log, |steps| {
        let mut sim = Sim::new(rng.next(), plan, &memories);
        sim.world.allocated = Some(|| ALLOCATED.get());
        sim.world.log = log.then_some(print_event);
        let outcome = sim.run();
        *steps = sim.steps;
        outcome.map_err(|broken| (broken, sim.world.describe()))
    })
}

/// The same of the simulator with its kernel.
fn run_traffic(seed: u64, log: bool) -> Result<u64, String> {
    let mut rng = Rng(seed);
    let plan = traffic::Plan::draw(&mut rng);
    tell_plan(&plan, log);
    let memories = plan.memories();
    survive(log, |steps| {
        let mut sim = traffic::Sim::new(rng.next(), plan, &memories);
        sim.world.log = log.then_some(print_event);
        let outcome = sim.run();
        *steps = sim.steps;
        outcome.map_err(|broken| (broken, sim.world.describe()))
    })
}

fn tell_plan(plan: &dyn std::fmt::Debug, log: bool) {
    if log {
        eprintln!("{plan:#?}");
    }
}

/// Makes of what a run says, its members described, or of its panic, what [`run`] tells.
fn survive(
    log: bool,
    run: impl FnOnce(&mut u64) -> Result<(), (checkers::Broken, String)>,
) -> Result<u64, String> {
    let mut steps = 0;
    match catch_unwind(AssertUnwindSafe(|| run(&mut steps))) {
        Ok(Ok(())) => Ok(steps),
        Ok(Err((broken, members))) => {
            Err(format!("step {steps}: {broken}\n{}", if log { members } else { String::new() }))
        }
        Err(_) => Err(format!("an assertion: {}", LAST_PANIC.take().unwrap_or_default())),
    }
}

/// Panics of this program are told with the seed, not where they happen.
fn keep_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().name() == Some("seeds") {
            LAST_PANIC.set(Some(panic.to_string()));
        } else {
            usual(panic);
        }
    }));
}

/// A seed that failed, and what broke.
type Failure = (u64, String);

/// Runs seeds on all processors, each failure told to `tell`, which says whether to go on. Returns
/// how many steps all took.
fn run_seeds(
    seeds: Range<u64>,
    run: fn(u64, bool) -> Result<u64, String>,
    prepare: &(dyn Fn() + Sync),
    tell: &(dyn Fn(Failure) -> ControlFlow<()> + Sync),
) -> u64 {
    let (next, steps, ended) =
        (AtomicU64::new(seeds.start), AtomicU64::new(0), AtomicBool::new(false));
    let work = || {
        prepare();
        while !ended.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if !seeds.contains(&seed) {
                return;
            }
            match run(seed, false) {
                Ok(n) => drop(steps.fetch_add(n, Ordering::Relaxed)),
                Err(broken) => {
                    if tell((seed, broken)).is_break() {
                        ended.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            let thread = std::thread::Builder::new().name("seeds".to_owned());
            thread.spawn_scoped(scope, work).expect("a thread");
        }
    });
    steps.into_inner()
}

/// How this build's seeds are replayed, with the name of their test behind it.
const REPLAY: &str = if cfg!(feature = "mutations") {
    "cargo test --release --features mutations --test simulation"
} else {
    "cargo test --release --test simulation"
};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|n| n.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn every_seed_keeps_every_promise() {
    run_all("every_seed", 600, run);
}

#[test]
fn all_traffic_passes_and_all_that_has_ended_goes() {
    run_all("all_traffic", 300, run_traffic);
}

/// Runs the seeds that were asked for, or so many, of the test with this name; tells every failure.
fn run_all(name: &str, usual: u64, run: fn(u64, bool) -> Result<u64, String>) {
    if let Some(seed) = number("SEED") {
        if let Err(broken) = run(seed, true) {
            panic!("SEED={seed}: {broken}");
        }
        return;
    }
    keep_panics();
    let first = number("FIRST").unwrap_or(1);
    let seeds = first..first.saturating_add(number("SEEDS").unwrap_or(usual));
    let began = Instant::now();
    let failed = AtomicU64::new(0);
    let steps = run_seeds(seeds.clone(), run, &|| {}, &|(seed, broken)| {
        failed.fetch_add(1, Ordering::Relaxed);
        // Straight to the terminal: what a test prints is shown when it ends, and a soak may be
        // stopped before.
        let broken: String = broken.lines().next().unwrap_or_default().chars().take(300).collect();
        let line = format!("SEED={seed} {REPLAY} {name} -- --nocapture  # {broken}\n");
        let _ = std::io::stdout().write_all(line.as_bytes());
        ControlFlow::Continue(())
    });
    let failed = failed.into_inner();
    let n = seeds.end - seeds.start;
    let line = format!(
        "{n} seeds from {first} on, {failed} failed, {steps} steps, {:.1} s",
        began.elapsed().as_secs_f64()
    );
    println!("{line}");
    assert!(failed == 0, "{line}: each with a line above");
}

/// What runs a seed, and tells its steps.
#[cfg(feature = "mutations")]
type Run = fn(u64, bool) -> Result<u64, String>;

/// The checkers bite: each of these faults is noticed, in some seed.
#[cfg(feature = "mutations")]
#[test]
fn every_deliberate_fault_is_caught() {
    use hypersync::sync::mutation::Mutation::*;
    use hypersync::sync::mutation::{MUTATIONS, set};
    let only = std::env::var("MUTATION").ok();
    keep_panics();
    let mut missed = Vec::new();
    for (mutation, what) in MUTATIONS {
        if only.as_ref().is_some_and(|only| *only != format!("{mutation:?}")) {
            continue;
        }
        // What the truth would not show: the kernel is in it. (One rule stands behind the other
        // there, so that some faults seldom show.)
        let (run, most): (Run, u64) = match mutation {
            LingeringSent | EndsUnasked | KeptForever | StampsDecide | LeftIsEnded
            | KeepOverwrites => (run_traffic, 700),
            _ => (run, 300),
        };
        let seeds = 1..1 + number("SEEDS").unwrap_or(most);
        let first: Mutex<Option<Failure>> = Mutex::new(None);
        run_seeds(seeds, run, &|| set(Some(*mutation)), &|(seed, broken)| {
            let mut first = first.lock().expect("nobody panicked");
            if first.as_ref().is_none_or(|(other, _)| seed < *other) {
                *first = Some((seed, broken));
            }
            ControlFlow::Break(())
        });
        match first.into_inner().expect("nobody panicked") {
            Some((seed, broken)) => {
                let line = broken.lines().next().unwrap_or_default();
                let (step, promise) = line.split_once(": ").unwrap_or(("", line));
                let promise: String = promise.chars().take(60).collect();
                println!("{mutation:?}: {seed} seeds, {step}, {promise}");
            }
            None => missed.push(format!("{mutation:?}: {what}")),
        }
    }
    assert!(missed.is_empty(), "not caught:\n{}", missed.join("\n"));
}
