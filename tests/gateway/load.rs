//! Many connections a second, routes that move to and fro, a gateway whose appliance sleeps
//! meanwhile: in the end nothing is left of any of them, and none that lived was touched.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::appliance::Appliances;
use crate::calls::{self, Call, wait_until_all_are_gone};
use crate::common::{may_make_namespaces, wait_for};
use crate::one_at_a_time;
use crate::topology::Topology;

/// How long calls are opened.
const LOAD: Duration = Duration::from_secs(30);
/// Between one call and the next: 300 a second.
const PAUSE: Duration = Duration::from_micros(3333);
/// Between words of a call.
const WORDS: Duration = Duration::from_millis(300);
/// Between moves of the routes.
const STAY: Duration = Duration::from_secs(3);
/// The moves, to gateway 2, before which gateway 1's appliance falls asleep: the first is then made
/// by gateway 2's script, the other one by an operator at once.
const SLEEPS: [usize; 2] = [2, 4];
/// For how long.
const SLEEP: Duration = Duration::from_secs(2);
/// The hold, and what it takes to copy a connection then.
const COPIED: Duration = Duration::from_secs(2);
/// How long a move may take.
const MOVING: Duration = Duration::from_millis(200);
/// The client's ports: few, so that each is used again within about a second.
const PORTS: std::ops::Range<u16> = 20_000..20_650;
/// How long entries last in a state that begins or ends a connection.
const FINAL_S: u32 = 5;

/// What became of a call.
pub struct Outcome {
    port: u16,
    pub began: Instant,
    pub ended: Instant,
    pub fault: Option<String>,
    pub slowest_word: Duration,
}

/// One call that lives so long.
fn call(port: u16, life: Duration) -> Outcome {
    let began = Instant::now();
    let mut slowest_word = Duration::ZERO;
    let mut live = || -> io::Result<()> {
        let mut call = Call::open(port)?;
        loop {
            let said = Instant::now();
            call.say()?;
            slowest_word = slowest_word.max(said.elapsed());
            let left = life.saturating_sub(began.elapsed());
            if left.is_zero() {
                return call.close();
            }
            std::thread::sleep(left.min(WORDS));
        }
    };
    let fault = live().err().map(|error| error.to_string());
    Outcome { port, began, ended: Instant::now(), fault, slowest_word }
}

/// Opens calls at a steady pace for so long and returns what became of each: half of them end
/// within the hold. To be called on a thread of the client's namespace.
pub fn call_for(time: Duration) -> Vec<Outcome> {
    let free = Mutex::new(PORTS.collect::<VecDeque<u16>>());
    let outcomes = Mutex::new(Vec::new());
    let start = Instant::now();
    std::thread::scope(|scope| {
        let mut number = 0;
        while start.elapsed() < time {
            let port = {
                let mut free = free.lock().expect("nobody panics with it");
                if number % 2 == 0 { free.pop_front() } else { free.pop_back() }
            };
            let life = Duration::from_millis([100, 1500, 100, 4000][number % 4]);
            if let Some(port) = port {
                let (free, outcomes) = (&free, &outcomes);
                scope.spawn(move || {
                    let outcome = call(port, life);
                    // Who gave up still sends its last words from its port.
                    if outcome.fault.is_none() {
                        free.lock().expect("nobody panics with it").push_back(port);
                    }
                    outcomes.lock().expect("nobody panics with it").push(outcome);
                });
                number += 1;
            }
            std::thread::sleep(
                (PAUSE * number as u32).saturating_sub(start.elapsed()).max(PAUSE / 4),
            );
        }
    });
    outcomes.into_inner().expect("nobody panics with it")
}

/// Moves the routes to and fro while calls are opened. Before some moves gateway 1's appliance
/// falls asleep. Returns when each move was.
fn move_to_and_fro(topology: &Topology, appliances: &mut Appliances) -> Vec<Instant> {
    let start = Instant::now();
    let mut moves = Vec::new();
    let stay = |appliances: &mut Appliances, time: Duration| {
        let now = Instant::now();
        appliances.wait_for("the routes stay for a while", 2 * LOAD, || now.elapsed() > time);
    };
    for gateway in [2, 1].into_iter().cycle() {
        stay(appliances, STAY);
        if start.elapsed() + STAY > LOAD {
            break;
        }
        let sleeps = SLEEPS.iter().position(|number| *number == moves.len());
        let deaths = appliances.deaths_told(2, 1);
        if sleeps.is_some() {
            appliances.signal(1, libc::SIGSTOP);
        }
        let slept = Instant::now();
        match sleeps {
            Some(0) => wait_for("gateway 2's script moves the routes", LOAD, || {
                appliances.deaths_told(2, 1) > deaths
            }),
            _ => topology.route_through(gateway),
        }
        moves.push(Instant::now());
        if sleeps.is_some() {
            stay(appliances, SLEEP.saturating_sub(slept.elapsed()));
            appliances.signal(1, libc::SIGCONT);
        }
    }
    moves
}

#[test]
fn under_load_with_routes_that_move_every_entry_of_both_kernels_is_explained() {
    if !may_make_namespaces("load, and routes that move") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let (mut appliances, _server) = calls::start_pair(&topology, FINAL_S);
    appliances.wait_until_ready();
    let (outcomes, moves) = std::thread::scope(|scope| {
        let calling = scope.spawn(|| topology.client.inside(|| call_for(LOAD)));
        let moves = move_to_and_fro(&topology, &mut appliances);
        (calling.join().expect("no call panics"), moves)
    });

    // How old a call was when the routes moved. What was not copied yet then is cut until it is
    // copied or the routes are back: more is not promised, and what a call leaves that gave up then
    // is explained.
    let ages = |outcome: &Outcome| -> Vec<Duration> {
        let met = moves
            .iter()
            .filter(|moved| outcome.began < **moved + MOVING && **moved < outcome.ended);
        met.map(|moved| moved.saturating_duration_since(outcome.began)).collect()
    };
    let was_young = |outcome: &&Outcome| ages(outcome).iter().any(|age| *age < COPIED);
    let has_moved = |outcome: &&&Outcome| ages(outcome).iter().any(|age| *age >= COPIED);
    let (young, grown): (Vec<&Outcome>, Vec<&Outcome>) = outcomes.iter().partition(was_young);
    let given_up: HashSet<u16> =
        young.iter().filter(|o| o.fault.is_some()).map(|o| o.port).collect();
    let broken: Vec<&&Outcome> = grown.iter().filter(|o| o.fault.is_some()).collect();
    let slowest =
        |outcomes: &[&Outcome]| outcomes.iter().map(|o| o.slowest_word).max().unwrap_or_default();
    let moved = grown.iter().filter(has_moved).count();
    println!(
        "{} calls and {} moves: {moved} moved, slowest word of these and quiet ones {} ms, {} broken; \
         {} were not copied yet, slowest word {} ms, {} gave up",
        outcomes.len(),
        moves.len(),
        slowest(&grown).as_millis(),
        broken.len(),
        young.len(),
        slowest(&young).as_millis(),
        given_up.len()
    );
    assert!(outcomes.len() as u64 > 200 * LOAD.as_secs() && moved > 100, "the load was there");

    let limit = Duration::from_secs(u64::from(FINAL_S) + 15);
    wait_until_all_are_gone(&topology, &mut appliances, limit, |entry| {
        given_up.contains(&entry.original.from.port())
    });
    let tell = |o: &&&Outcome| {
        let of_outcome = |o: &Outcome| {
            let lived = (o.ended - o.began).as_millis();
            let ages: Vec<u128> = ages(o).iter().map(Duration::as_millis).collect();
            format!("{lived} ms, at moves {ages:?} ms: {}", o.fault.as_deref().unwrap_or("well"))
        };
        let before = outcomes
            .iter()
            .filter(|b| b.port == o.port && b.ended <= o.began)
            .max_by_key(|b| b.ended);
        let before = before.map_or("nothing".to_string(), of_outcome);
        format!("port {} after {}; the one before it after {before}", o.port, of_outcome(o))
    };
    let faults: Vec<String> = broken.iter().take(10).map(tell).collect();
    assert!(
        broken.is_empty(),
        "of {} calls {} that lived were broken: {faults:#?}",
        grown.len(),
        broken.len()
    );
    assert!(given_up.len() < outcomes.len() / 100, "{} young calls gave up", given_up.len());
}
