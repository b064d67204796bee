//! All kinds of flows at once through two gateways, with zones and labels too.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::appliance::{Appliances, Discovery};
use crate::common::{may_make_namespaces, wait_for};
use crate::entries::{self, Entry};
use crate::mix::Mix;
use crate::topology::{LABELS, Topology, ZONES};
use crate::{GAP_MAX, SILENCE, one_at_a_time};

const TCP_FLOWS: usize = 200;
const UDP_FLOWS: usize = 50;

#[test]
fn without_hypersync_every_kind_of_flow_breaks() {
    if !may_make_namespaces("that connections break without hypersync") {
        return;
    }
    let _turn = one_at_a_time();
    all_break(&[]);
}

#[test]
fn without_hypersync_every_kind_of_flow_breaks_in_zones() {
    if !may_make_namespaces("that connections in zones break without hypersync") {
        return;
    }
    let _turn = one_at_a_time();
    all_break(&[ZONES, LABELS]);
}

fn all_break(rules: &[&str]) {
    let topology = Topology::build_with(2, rules);
    let old = Mix::start(&topology, TCP_FLOWS, UDP_FLOWS);
    wait_until_established(&topology, &old, rules);
    old.silence_udp_clients(true);

    topology.unplug(1);
    topology.route_through(2);

    let unplugged = Instant::now();
    wait_for("all flows are reset or silent", SILENCE * 4, || {
        let working = old.working(SILENCE);
        let survived = unplugged.elapsed() > SILENCE * 3;
        assert!(working.is_empty() || !survived, "these survive with no replication: {working:#?}");
        working.is_empty()
    });
    assert_eq!(
        old.entries(&entries::read(topology.gateway(2))),
        Vec::<&Entry>::new(),
        "gateway 2 has taken up old flows"
    );
    drop(old);

    // The road through gateway 2 is good: what is new gets through.
    let new = Mix::start(&topology, 16, 16);
    new.finish(Duration::from_secs(5));
}

#[test]
fn every_kind_of_flow_survives_the_death_of_its_gateway() {
    if may_make_namespaces(
        "the death of a gateway with TCP and UDP, IPv4 and IPv6, all translations",
    ) {
        let _turn = one_at_a_time();
        a_gateway_dies("every kind", &[]);
    }
}

#[test]
fn every_kind_of_flow_survives_in_zones() {
    if may_make_namespaces("the death of a gateway with zones, in both directions and in one") {
        let _turn = one_at_a_time();
        a_gateway_dies("in zones", &[ZONES]);
    }
}

fn a_gateway_dies(which: &str, rules: &[&str]) {
    let topology = Topology::build_with(2, rules);
    // Declared first, so that it is alive when the appliances of a failing test tell what they saw.
    let mix;
    let mut appliances = Appliances::start(&topology, Discovery::Multicast, &[2, 2]);
    mix = Mix::start(&topology, TCP_FLOWS, UDP_FLOWS);
    wait_until_established(&topology, &mix, rules);
    wait_until_replicated(&topology, &mix, &mut appliances);
    mix.wait_for_more(
        20,
        Duration::from_secs(10),
        "traffic flows with two copies of each connection",
    );
    mix.silence_udp_clients(true);

    appliances.power_off(1);
    appliances.wait_until_told_dead(2, 1);
    // The server speaks first. Its packets pass gateway 2 only by the entries that were committed
    // there.
    mix.wait_for_more_at_udp_clients(20, Duration::from_secs(10), "the server reaches its clients");
    mix.silence_udp_clients(false);
    mix.wait_for_more(50, Duration::from_secs(20), "every flow goes on through gateway 2");
    mix.finish(Duration::from_secs(10));
    appliances.assert_running("the survivor survives");

    let [tcp, udp] = mix.longest_gaps();
    let (tcp_ms, udp_ms) = (tcp.as_millis(), udp.as_millis());
    println!(
        "{which}: the client heard nothing for {tcp_ms} ms at most with TCP, {udp_ms} ms with UDP"
    );
    assert!(tcp < GAP_MAX && udp < GAP_MAX, "the client heard nothing for {tcp:?} and {udp:?}");
}

#[test]
fn labels_are_copied() {
    if !may_make_namespaces("that labels are copied") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build_with(2, &[LABELS]);
    let mix;
    let mut appliances = Appliances::start(&topology, Discovery::Multicast, &[2, 2]);
    mix = Mix::start(&topology, TCP_FLOWS, UDP_FLOWS);
    wait_until_established(&topology, &mix, &[LABELS]);
    wait_until_replicated(&topology, &mix, &mut appliances);
}

/// Waits until gateway 1's kernel has an established entry of every flow, and checks that its rules
/// have given them what is to be copied.
fn wait_until_established(topology: &Topology, mix: &Mix, rules: &[&str]) {
    let mut entries = HashMap::new();
    wait_for("gateway 1 has an established entry of every flow", Duration::from_secs(10), || {
        entries = entries::read(topology.gateway(1));
        mix.are_established(&entries)
    });
    let flows = mix.entries(&entries);
    let zones: BTreeSet<[u16; 2]> = flows.iter().map(|entry| entry.zones).collect();
    let expected = match rules.contains(&ZONES) {
        true => BTreeSet::from([[0, 0], [5, 5], [6, 6], [7, 0], [8, 0]]),
        false => BTreeSet::from([[0, 0]]),
    };
    assert_eq!(zones, expected, "the zones that the rules set");
    assert!(flows.iter().all(|entry| entry.mark != 0), "every flow has a mark");
    let has_labels = rules.contains(&LABELS);
    assert!(
        flows.iter().all(|entry| entry.labels.is_empty() != has_labels),
        "labels follow the rules"
    );
}

/// Waits until gateway 2's kernel has the same entries as gateway 1's, which carries the flows.
fn wait_until_replicated(topology: &Topology, mix: &Mix, appliances: &mut Appliances) {
    let limit = Duration::from_secs(15);
    let start = Instant::now();
    appliances.wait_for("both gateways' kernels have the same entries", limit * 2, || {
        let differences = mix.differences(topology.gateway(1), topology.gateway(2));
        assert!(
            differences.is_empty() || start.elapsed() < limit,
            "after {limit:?} the kernels still differ, kind by kind: {differences:#?}"
        );
        differences.is_empty()
    });
}
