//! Two gateways: one dies, and its connections go on through the other.

use std::time::Duration;

use hypersync::counters::Counter;

use crate::appliance::{Appliances, Discovery};
use crate::common::{may_make_namespaces, run, wait_for};
use crate::entries::{self, are_replicated, count};
use crate::topology::{SERVER, SHARED, Topology};
use crate::traffic::Traffic;
use crate::{CONNECTIONS, GAP_MAX, PORT, one_at_a_time};

#[test]
fn every_connection_survives_the_death_of_its_gateway() {
    if may_make_namespaces("the death of a gateway, over multicast, two shards each") {
        let _turn = one_at_a_time();
        a_gateway_dies(Discovery::Multicast, [2, 2]);
    }
}

#[test]
fn every_connection_survives_when_the_other_gateway_has_more_shards_and_there_is_no_multicast() {
    if may_make_namespaces("the death of a gateway, over unicast, two shards and three") {
        let _turn = one_at_a_time();
        a_gateway_dies(Discovery::Peers, [2, 3]);
    }
}

fn a_gateway_dies(discovery: Discovery, shards: [u8; 2]) {
    let topology = Topology::build(2);
    // Declared first, so that it is alive when the appliances of a failing test tell what they saw.
    let traffic;
    let mut appliances = Appliances::start(&topology, discovery, &shards);
    traffic = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), CONNECTIONS);
    appliances.wait_for(
        "both gateways' kernels have every connection",
        Duration::from_secs(30),
        || {
            topology
                .gateways
                .iter()
                .all(|gateway| are_replicated(&entries::read(gateway), &traffic, SHARED))
        },
    );
    traffic.wait_for_more(
        20,
        Duration::from_secs(10),
        "traffic flows with two copies of each connection",
    );

    assert!(!appliances.is_told_dead(2, 1), "gateway 1 is alive and carries the traffic");

    appliances.power_off(1);
    appliances.wait_until_told_dead(2, 1);
    traffic.wait_for_more(
        100,
        Duration::from_secs(20),
        "every connection goes on through gateway 2",
    );
    traffic.finish(Duration::from_secs(10));
    appliances.assert_running("the survivor survives");

    let gap = traffic.longest_gap();
    println!(
        "{discovery:?}, shards {shards:?}: the client heard nothing for {} ms at most",
        gap.as_millis()
    );
    assert!(gap < GAP_MAX, "the client heard nothing for {gap:?}");
}

#[test]
fn connections_of_the_gateways_themselves_are_never_copied() {
    if !may_make_namespaces("that a gateway's own connections are not copied") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let (own, talking, silent);
    let mut appliances = Appliances::start(&topology, Discovery::Multicast, &[2, 2]);
    let (client, server, gateway) = (&topology.client, &topology.server, topology.gateway(1));
    // An operator's login to the gateway, and the gateway asking the server something.
    own = [
        Traffic::start(client, gateway, ("10.1.0.1", 22), 3),
        Traffic::start(gateway, server, (SERVER, PORT + 1), 3),
    ];
    // Connections through the gateway, younger than those, show when copying is due: some that talk
    // on, so that events announce them, and some that fall silent at once, so that only a search of
    // the whole kernel table finds them.
    talking = Traffic::start(client, server, (SERVER, PORT), 10);
    silent = Traffic::start(client, server, (SERVER, PORT + 2), 10);
    silent.finish(Duration::from_secs(1));
    appliances.wait_for(
        "the connections through gateway 1 are copied",
        Duration::from_secs(30),
        || {
            topology.gateways.iter().map(entries::read).all(|entries| {
                are_replicated(&entries, &talking, SHARED)
                    && are_replicated(&entries, &silent, SHARED)
            })
        },
    );
    assert!(!appliances.is_told_dead(2, 1), "gateway 1 is alive and carries the traffic");
    let copied = entries::read(topology.gateway(2));
    for own in &own {
        own.wait_for_more(5, Duration::from_secs(10), "the gateway's own connections are alive");
        assert_eq!(count(&entries::read(gateway), own), 3, "gateway 1 knows its own");
        assert_eq!(count(&copied, own), 0, "connections with {} were copied", own.server_address);
    }
}

#[test]
fn traffic_that_moves_to_the_backup_without_a_death_is_noticed_by_the_walk_and_entries_that_run_out_are_written_again()
 {
    if !may_make_namespaces("traffic that moves while both gateways live") {
        return;
    }
    /// What a packet gives an entry; a copy has more as long as its active lives.
    const NORMAL_S: u64 = 432_000;
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let traffic;
    let mut appliances =
        Appliances::start_with(&topology, Discovery::Multicast, &[2, 2], &["--verify", "1s"]);
    traffic = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), CONNECTIONS);
    appliances.wait_for(
        "both gateways' kernels have every connection",
        Duration::from_secs(30),
        || {
            topology
                .gateways
                .iter()
                .all(|gateway| are_replicated(&entries::read(gateway), &traffic, SHARED))
        },
    );
    assert_eq!(appliances.counter(2, Counter::VerifyTouched), 0, "gateway 2 has seen no packet");
    topology.gateway(2).sysctl("net/netfilter/nf_conntrack_tcp_timeout_established", "3");
    topology.route_through(2);
    traffic.wait_for_more(
        20,
        Duration::from_secs(20),
        "every connection goes on through gateway 2",
    );
    let noticed = || appliances.counter(2, Counter::VerifyTouched) >= CONNECTIONS as u64;
    wait_for("the walk notices every connection", Duration::from_secs(10), noticed);
    traffic.finish(Duration::from_secs(10));
    let timeouts = || -> Vec<u64> {
        let list = run(topology.gateway(2).command("conntrack").args([
            "-L",
            "-p",
            "tcp",
            "--dport",
            &PORT.to_string(),
        ]));
        list.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse().ok()).collect()
    };
    wait_for(
        "entries that ran out there are those of copies again",
        Duration::from_secs(20),
        || {
            let timeouts = timeouts();
            timeouts.len() == CONNECTIONS && timeouts.iter().all(|seconds| *seconds > NORMAL_S)
        },
    );
    assert!(are_replicated(&entries::read(topology.gateway(2)), &traffic, SHARED));
    println!(
        "of {CONNECTIONS} connections that moved, {} were claimed; the walk saw packets {} times",
        appliances.counter(2, Counter::Claims),
        appliances.counter(2, Counter::VerifyTouched),
    );
    appliances.assert_running("both live");
}
