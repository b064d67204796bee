//! The simulator's model of a kernel's connection table (`model.rs`), held against the real one: random scripts of
//! packets, writes, deletes, flushes and timeouts are played into both, and entries and events compared.

#[path = "../common/mod.rs"]
mod common;
mod gateway;
mod model;
#[path = "../conntrack/namespace.rs"]
#[allow(dead_code)] // No hosts are needed.
mod namespace;
mod packet;
mod script;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::Rng;
use namespace::in_namespace;
use script::{Broken, Play, SETTINGS, nat};

/// Scripts that are played side by side: they sleep most of the time.
const SIDE_BY_SIDE: u64 = 6;
/// How long each of them goes on.
const SPAN: Duration = Duration::from_secs(8);
/// A script that the machine interrupted is played again so often.
const ATTEMPTS: usize = 10;

#[derive(Default)]
struct Tally {
    scripts: AtomicUsize,
    steps: AtomicUsize,
    compared: AtomicUsize,
    stalled: AtomicUsize,
}

/// Plays a script until it comes to an end or shows a difference.
fn play(seed: u64, tally: &Tally, script: impl Fn(u64) -> (Result<(), Broken>, Play)) {
    for _ in 0..ATTEMPTS {
        let (result, play) = script(seed);
        match result {
            Ok(()) => {
                tally.scripts.fetch_add(1, Ordering::Relaxed);
                tally.steps.fetch_add(play.steps, Ordering::Relaxed);
                tally.compared.fetch_add(play.compared, Ordering::Relaxed);
                return;
            }
            Err(Broken::Stalled) => tally.stalled.fetch_add(1, Ordering::Relaxed),
            Err(Broken::Differs(how)) => panic!("seed {seed}:\n{how}"),
        };
    }
    panic!("seed {seed}: interrupted {ATTEMPTS} times; this machine is too slow for this test");
}

fn random(seed: u64) -> (Result<(), Broken>, Play) {
    let mut rng = Rng(seed);
    let nat = match seed % 3 {
        0 => None,
        1 => Some(nat(false)),
        _ => Some(nat(true)),
    };
    let mut play = Play::new(nat);
    play.add_flows();
    let result = (|| {
        for setting in SETTINGS {
            play.set_timeout_of_state(setting, [1, 2, 3, 100, 100][rng.below(5) as usize])?;
        }
        let end = Instant::now() + SPAN;
        while Instant::now() < end {
            play.random(&mut rng)?;
        }
        play.compare_tables()
    })();
    (result, play)
}

#[test]
fn random_scripts_have_the_same_entries_and_events_in_the_kernel_and_in_the_model() {
    let first = std::env::var("KERNEL_SEED").ok().map_or(1, |seed| seed.parse().expect("a number"));
    let start = Instant::now();
    let tally = Tally::default();
    std::thread::scope(|scope| {
        for seed in first..first + SIDE_BY_SIDE {
            let tally = &tally;
            scope.spawn(move || {
                play(seed, tally, |seed| {
                    let mut played = None;
                    in_namespace("the model against the kernel", || played = Some(random(seed)));
                    played.expect("root")
                });
            });
        }
    });
    let Tally { scripts, steps, compared, stalled } = tally;
    println!(
        "{scripts:?} scripts, {steps:?} steps, {compared:?} entries and events compared, {stalled:?} interrupted, {:?}",
        start.elapsed()
    );
}
