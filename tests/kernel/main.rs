//! The simulator's model of a kernel's connection table (`model.rs`), held against the real one:
//! random scripts of packets, writes, deletes, flushes and timeouts are played into both, and
//! entries and events compared.

#[path = "../common/mod.rs"]
mod common;
mod gateway;
mod model;
#[path = "../conntrack/namespace.rs"]
#[allow(dead_code)] // No hosts are needed.
mod namespace;
mod packet;
mod script;
mod stories;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::may_make_namespaces;
use hypersync::load::rng::Rng;
use namespace::in_namespace;
use script::{Broken, Play, SETTINGS, Tally, nat};

/// Scripts that are played side by side: they sleep most of the time.
const SIDE_BY_SIDE: u64 = 12;
/// How long each of them goes on.
const SPAN: Duration = Duration::from_secs(8);
/// What scripts show, among other things: without it they would show nothing.
const EXPECTED: [&str; 12] = [
    "new",
    "new, other port",
    "opened again",
    "ran out",
    "refused",
    "removed",
    "state 1 to 2",
    "state 2 to 3",
    "state 3 to 4",
    "create: File exists (os error 17)",
    "delete: No such file or directory (os error 2)",
    "update: Device or resource busy (os error 16)",
];

/// A script that the machine interrupted is played again so often.
const ATTEMPTS: usize = 10;

/// Plays a script in a namespace of its own until it comes to an end or shows a difference.
fn play(what: &str, script: impl Fn() -> (Result<(), Broken>, Play) + Sync) -> Tally {
    for attempt in 0..ATTEMPTS {
        let mut played = None;
        in_namespace(what, || played = Some(script()));
        let (result, play) = played.expect("a script was played");
        match result {
            Ok(()) => {
                let mut tally = play.tally;
                *tally.met.entry("interrupted".into()).or_default() += attempt;
                return tally;
            }
            Err(Broken::Stalled) => {}
            Err(Broken::Differs(how)) => panic!("{what}:\n{how}"),
        };
    }
    panic!("{what}: interrupted {ATTEMPTS} times; this machine is too slow for this test");
}

fn random(seed: u64) -> (Result<(), Broken>, Play) {
    let mut rng = Rng::new(seed);
    let nat = match seed % 3 {
        0 => None,
        1 => Some(nat(false)),
        _ => Some(nat(true)),
    };
    let mut play = Play::new(nat, seed.is_multiple_of(2));
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
    if !may_make_namespaces("the model against the kernel") {
        return;
    }
    let first = std::env::var("KERNEL_SEED").ok().map_or(1, |seed| seed.parse().expect("a number"));
    let start = Instant::now();
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for seed in first..first + SIDE_BY_SIDE {
            let tally = &tally;
            scope.spawn(move || {
                let of_script = play(&format!("seed {seed}"), || random(seed));
                tally.lock().expect("nobody panics here").add(&of_script);
            });
        }
    });
    let Tally { steps, compared, met } = tally.into_inner().expect("nobody panicked");
    for what in EXPECTED {
        assert!(met.contains_key(what), "no script showed: {what}; these were shown: {met:#?}");
    }
    println!(
        "{SIDE_BY_SIDE} scripts, {steps} steps, {compared} entries and events compared, {:?}\n{met:#?}",
        start.elapsed()
    );
}
