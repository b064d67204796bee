//! Ports that are used again around a gateway whose appliance sleeps: a tuple is not a connection.
//! What the sleeper knows of the connections that had these ports before may neither keep entries
//! for ever nor touch the connections that have the ports now.

use std::ops::Range;
use std::time::{Duration, Instant};

use hypersync::counters::Counter;

use crate::appliance::Appliances;
use crate::calls::{
    self, COPYS_TIMEOUT_S, Call, ESTABLISHED, are_established, close_all, describe, of_calls,
    open_all, say_all, wait_until_all_are_gone,
};
use crate::common::{may_make_namespaces, wait_for};
use crate::entries;
use crate::one_at_a_time;
use crate::topology::Topology;

/// The client's ports.
const PORTS: Range<u16> = 20_000..20_020;
/// How long entries last in a state that ends a connection.
const FINAL_S: u32 = 5;
/// How much longer than that anything may be found.
const BOUND: Duration = Duration::from_secs(10);
pub const SOON: Duration = Duration::from_secs(20);

/// Opens a call from each port through gateway 1 and waits until gateway 2 has it too.
pub fn open_and_copy(
    topology: &Topology,
    appliances: &mut Appliances,
    ports: Range<u16>,
) -> Vec<Call> {
    appliances.wait_until_ready();
    let calls = open_all(topology, ports.clone());
    appliances.wait_for("both gateways' kernels have every call", SOON, || {
        topology.members().all(|gateway| are_established(topology, gateway, ports.clone()))
    });
    assert!(!appliances.is_told_dead(2, 1), "gateway 1 is alive and carries the traffic");
    calls
}

/// Lets gateway 1's appliance sleep; its kernel forwards on. The routes have moved once this
/// returns.
fn put_to_sleep(appliances: &mut Appliances) {
    appliances.signal(1, libc::SIGSTOP);
    appliances.wait_until_told_dead(2, 1);
}

#[test]
fn closed_while_their_gateway_slept_they_are_gone_from_every_kernel() {
    if !may_make_namespaces("connections that close while their gateway sleeps") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let (mut appliances, _server) = calls::start_pair(&topology, FINAL_S);
    let mut calls = open_and_copy(&topology, &mut appliances, PORTS);

    put_to_sleep(&mut appliances);
    say_all(&mut calls, "through gateway 2");
    close_all(calls);
    assert!(are_established(&topology, 1, PORTS), "gateway 1's kernel has seen nothing of it");
    appliances.signal(1, libc::SIGCONT);

    let limit = Duration::from_secs(FINAL_S.into()) + BOUND;
    wait_until_all_are_gone(&topology, &mut appliances, limit, |_| false);
}

#[test]
fn closed_again_while_the_gateway_of_their_first_life_slept_they_are_gone_from_every_kernel() {
    if !may_make_namespaces("ports used again and closed while a gateway sleeps") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let (mut appliances, _server) = calls::start_pair(&topology, FINAL_S);
    close_all(open_and_copy(&topology, &mut appliances, PORTS));

    put_to_sleep(&mut appliances);
    close_all(open_all(&topology, PORTS));
    appliances.signal(1, libc::SIGCONT);

    let limit = Duration::from_secs(FINAL_S.into()) + BOUND;
    wait_until_all_are_gone(&topology, &mut appliances, limit, |_| false);
}

#[test]
fn a_dead_connection_does_not_touch_the_one_that_has_its_port() {
    if !may_make_namespaces("ports used again while a gateway sleeps") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let (mut appliances, _server) = calls::start_pair(&topology, FINAL_S);
    close_all(open_and_copy(&topology, &mut appliances, PORTS));

    put_to_sleep(&mut appliances);
    let calls = open_all(&topology, PORTS);
    let opened = Instant::now();
    wait_for("the new ones are past the hold", SOON, || {
        opened.elapsed() > Duration::from_millis(1500)
    });
    appliances.signal(1, libc::SIGCONT);
    live_on(&topology, &mut appliances, calls, PORTS, Duration::from_secs(8));
}

#[test]
fn a_port_that_is_used_again_at_once_through_the_other_gateway_carries_a_living_connection() {
    if !may_make_namespaces("ports used again at once through the other gateway") {
        return;
    }
    const MANY: Range<u16> = 20_000..20_200;
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let (mut appliances, _server) = calls::start_pair(&topology, FINAL_S);
    close_all(open_and_copy(&topology, &mut appliances, MANY));

    topology.route_through(2);
    // One after the other, so that gateway 2's appliance is awake for each and reads its events as
    // they come: the old entry's end, then that of the new one.
    let calls: Vec<Call> = MANY.map(|port| open_all(&topology, port..port + 1).remove(0)).collect();
    live_on(&topology, &mut appliances, calls, MANY, Duration::from_secs(3));
}

/// Calls from these ports, through gateway 2, talk for so long and are silent for a while; then
/// gateway 2 dies. They are not cut.
fn live_on(
    topology: &Topology,
    appliances: &mut Appliances,
    mut calls: Vec<Call>,
    ports: Range<u16>,
    talk: Duration,
) {
    let count = calls.len();
    let start = Instant::now();
    // What kernel 2 said when most of them were in another state.
    let mut worst = (0, "all of them established".to_owned());
    wait_for("they talk for seconds", SOON, || {
        say_all(&mut calls, "through gateway 2");
        let entries = entries::read(topology.gateway(2));
        let is_established =
            |port| entries.get(&calls::original(port)).is_some_and(|e| e.tcp_state == ESTABLISHED);
        let wrong = count - ports.clone().filter(|port| is_established(*port)).count();
        if wrong > worst.0 {
            let entries = describe(&of_calls(entries));
            worst = (wrong, format!("{entries} after {:.1} s", start.elapsed().as_secs_f64()));
        }
        std::thread::sleep(Duration::from_millis(400));
        start.elapsed() > talk
    });
    let silent = Instant::now();
    wait_for("a silence longer than a closed connection's entry lasts", SOON, || {
        // Listing collects what has timed out.
        entries::read(topology.gateway(2));
        silent.elapsed() > Duration::from_secs(u64::from(FINAL_S) + 1)
    });
    let cut = calls::cut(&mut calls).len();
    assert!(
        (worst.0, cut) == (0, 0),
        "of {count} living calls through gateway 2, its kernel had {}; after a silence {cut} were cut",
        worst.1
    );

    let roles = |appliances: &Appliances| {
        [
            (1, Counter::ConnectionsBackup),
            (2, Counter::ConnectionsActive),
            (1, Counter::ConnectionsActive),
        ]
        .map(|(member, counter)| appliances.counter(member, counter))
    };
    let mut last = [0; 3];
    let start = Instant::now();
    while last != [count as u64, count as u64, 0] || !are_established(topology, 1, ports.clone()) {
        assert!(
            start.elapsed() < SOON,
            "of {count} calls through gateway 2, {} are copies at gateway 1, {} active at gateway 2, {} at 1; \
             kernel 1 has {}",
            last[0],
            last[1],
            last[2],
            describe(&of_calls(entries::read(topology.gateway(1))))
        );
        std::thread::sleep(Duration::from_millis(50));
        last = roles(appliances);
    }
    appliances.power_off(2);
    appliances.wait_until_told_dead(1, 2);
    topology.route_through(1);
    say_all(&mut calls, "through gateway 1, as gateway 2 has died");
    close_all(calls);
    appliances.wait_for("their entries get a kernel's own timeout", SOON, || {
        let entries = of_calls(entries::read(topology.gateway(1)));
        entries.iter().all(|entry| entry.timeout_s <= COPYS_TIMEOUT_S)
    });
}
