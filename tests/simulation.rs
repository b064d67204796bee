//! The simulator: the protocol that ships, in simulated time, driven by a seed through whatever may
//! happen to a group, with a checker for each promise of the design that it could break.
//!
//! A run has phases of faults, in which what must hold at any time is checked after every step, and
//! phases of peace, in which everything has to agree within a stated simulated time.
//!
//! `SEED=n` replays one seed with a line an event on stderr (time, member, what, detail); `SEEDS=n` sets
//! how many are run, `FIRST=n` the first of them; with `ALL=1` every failure is listed, a line each. With the
//! feature `mutations`, `MUTATION=name` tries one deliberate fault only.
//!
//! In half of the seeds a shard makes a pass only when something arrives or the time that its `poll_at` announced
//! has come, as the appliance's loop does. A shard that something arrives for makes one more pass first, as a
//! loop may that is woken for nothing: if that sends anything, a timer was not announced.
//!
//! What the protocol does not handle yet is not generated: traffic shows up only where the other copy of
//! its connection is, or where nobody has one, and not at two members within one round trip. Two members may
//! end up as actives of one connection that neither sends to the other: when traffic moves to a member whose
//! claim the former one cannot hear, when a member dies in the middle of a move, in seeds whose faults
//! overlap. There, and for closes that died with the only member that knew of them, kernels forget entries
//! without traffic, as real ones do. A datagram cut exactly where a message ends reads like a whole one, for
//! nothing in it tells its length (UDP does): such cuts are not made.

#[path = "simulation/checkers.rs"]
mod checkers;
#[path = "simulation/plan.rs"]
mod plan;
#[path = "simulation/scale.rs"]
mod scale;
#[path = "simulation/sim.rs"]
mod sim;
#[path = "simulation/truth.rs"]
mod truth;
#[path = "protocol/world.rs"]
#[allow(dead_code)]
mod world;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Arguments;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use hypersync::conn::MemberId;
use hypersync::time::Time;
use plan::Plan;
use sim::Sim;
use world::{Rng, memories_of};

/// Counts the bytes that each thread has allocated and not freed.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<isize> = const { Cell::new(0) };
    static LAST_PANIC: Cell<Option<String>> = const { Cell::new(None) };
}

// SAFETY: everything is handed on to the system's allocator; the count is a thread-local without a destructor.
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
    if log {
        eprintln!("{plan:#?}");
    }
    let memories = memories_of(plan.memories(), plan.size);
    let mut steps = 0;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut sim = Sim::new(rng.next(), plan, &memories);
        sim.world.allocated = Some(|| ALLOCATED.get());
        sim.world.log = log.then_some(print_event);
        let outcome = sim.run();
        steps = sim.steps;
        outcome.map_err(|broken| {
            format!("step {steps}: {broken}\n{}", if log { sim.world.describe() } else { String::new() })
        })
    }));
    match outcome {
        Ok(outcome) => outcome.map(|()| steps),
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

/// Runs seeds on two threads until one fails; the first that did, and what broke, and how many steps all took.
fn first_failure(seeds: &[u64], prepare: &(dyn Fn() + Sync)) -> (Option<(u64, String)>, u64) {
    let (next, steps) = (AtomicU64::new(0), AtomicU64::new(0));
    let failed: Mutex<Option<(u64, String)>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let work = || {
                prepare();
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize)
                    && failed.lock().expect("nobody panicked").is_none()
                {
                    match run(*seed, false) {
                        Ok(n) => drop(steps.fetch_add(n, Ordering::Relaxed)),
                        Err(broken) if std::env::var_os("ALL").is_some() => {
                            let broken: String = broken.chars().take(300).collect();
                            println!("{seed}: {}", broken.replace('\n', " "));
                        }
                        Err(broken) => {
                            let mut failed = failed.lock().expect("nobody panicked");
                            if failed.as_ref().is_none_or(|(other, _)| seed < other) {
                                *failed = Some((*seed, broken));
                            }
                        }
                    }
                }
            };
            let thread = std::thread::Builder::new().name("seeds".to_owned());
            thread.spawn_scoped(scope, work).expect("a thread");
        }
    });
    (failed.into_inner().expect("nobody panicked"), steps.load(Ordering::Relaxed))
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|n| n.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn every_seed_keeps_every_promise() {
    if let Some(seed) = number("SEED") {
        if let Err(broken) = run(seed, true) {
            panic!("SEED={seed}: {broken}");
        }
        return;
    }
    keep_panics();
    let first = number("FIRST").unwrap_or(1);
    let seeds: Vec<u64> = (first..first + number("SEEDS").unwrap_or(600)).collect();
    let began = std::time::Instant::now();
    let (failed, steps) = first_failure(&seeds, &|| {});
    if let Some((seed, broken)) = failed {
        panic!("{broken}\nreplay with SEED={seed}");
    }
    println!("{} seeds, {steps} steps, {:.1} s", seeds.len(), began.elapsed().as_secs_f64());
}

/// The checkers bite: each of these faults is noticed, in some seed.
#[cfg(feature = "mutations")]
#[test]
fn every_deliberate_fault_is_caught() {
    use hypersync::sync::mutation::{MUTATIONS, set};
    let only = std::env::var("MUTATION").ok();
    keep_panics();
    let mut missed = Vec::new();
    for (mutation, what) in MUTATIONS {
        if only.as_ref().is_some_and(|only| *only != format!("{mutation:?}")) {
            continue;
        }
        let seeds: Vec<u64> = (1..=number("SEEDS").unwrap_or(150)).collect();
        match first_failure(&seeds, &|| set(Some(*mutation))).0 {
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
