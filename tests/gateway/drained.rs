//! A planned stop under load: the gateway that is told to end says so, its traffic moves, and it
//! leaves when everything has a copy, what is young included.

use std::time::{Duration, Instant};

use hypersync::counters::Counter;

use crate::appliance::{Appliances, Discovery};
use crate::calls::Server;
use crate::common::may_make_namespaces;
use crate::load::{Outcome, call_for};
use crate::one_at_a_time;
use crate::topology::Topology;

/// How long calls are opened, and when gateway 1 is told to end.
const LOAD: Duration = Duration::from_secs(8);
const TOLD_AFTER: Duration = Duration::from_secs(4);

/// What became of the calls that were open when gateway 1 was told to end, or began until it had
/// ended; and whether nothing was exposed then, and what it said.
fn drain_under_load(drain_limit: &str) -> (Vec<Outcome>, bool, String) {
    let topology = Topology::build(2);
    let flags = ["--drain-limit", drain_limit];
    let mut appliances = Appliances::start_with(&topology, Discovery::Peers, &[2, 2], &flags);
    let _server = Server::start(&topology.server);
    appliances.wait_until_ready();
    let (mut outcomes, told, ended, (is_safe, said)) = std::thread::scope(|scope| {
        let calling = scope.spawn(|| topology.client.inside(|| call_for(LOAD)));
        let start = Instant::now();
        appliances.wait_for("calls are open", 2 * TOLD_AFTER, || start.elapsed() > TOLD_AFTER);
        let told = Instant::now();
        let said = appliances.drain(1);
        let ended = Instant::now();
        (calling.join().expect("no call panics"), told, ended, said)
    });
    println!("drain limit {drain_limit}, {} ms: {said}", (ended - told).as_millis());
    assert!(outcomes.len() as u64 > 200 * LOAD.as_secs(), "the load was there");
    assert!(appliances.counter(2, Counter::SourceOpened) > 100, "the traffic has moved");
    outcomes.retain(|call| call.ended > told && call.began < ended);
    (outcomes, is_safe, said)
}

#[test]
fn a_planned_stop_under_load_breaks_nothing() {
    if !may_make_namespaces("a planned stop under load") {
        return;
    }
    let _turn = one_at_a_time();
    let broken = |outcomes: &[Outcome]| {
        let faults = outcomes.iter().filter_map(|call| call.fault.as_deref()).count();
        let slowest = outcomes.iter().map(|call| call.slowest_word).max().unwrap_or_default();
        println!(
            "{faults} of {} calls broken, slowest word {} ms",
            outcomes.len(),
            slowest.as_millis()
        );
        faults
    };
    // Who leaves at once breaks what is younger than the hold.
    let (at_once, _, _) = drain_under_load("0s");
    assert!(broken(&at_once) > at_once.len() / 50, "nothing shows without draining");
    let (drained, is_safe, said) = drain_under_load("10s");
    assert_eq!(broken(&drained), 0);
    assert!(is_safe && said.ends_with("nothing was exposed"), "{said}");
}
