//! Two gateways with one shared SNAT address; one dies, and its connections go on through the other.
//!
//! Every box is a network namespace with its own kernel conntrack, and the links are veth pairs
//! on three bridges:
//!
//! ```text
//!                          +----------- gw1 ------------+
//!               10.1.0.1   | SNAT to 10.3.0.1           |   10.2.0.1
//!            +--------- cl0| no passage without a       |sv0 --------+
//!            |             | connection                 |            |
//!   client --+             +------------ sy0 -----------+            +-- server
//!   .10      |                            | 10.9.0.1                 |    .10
//!            |              hypersync, UDP 8116                      |
//! 10.1.0.0/24|                            | 10.9.0.2                 |10.2.0.0/24
//!            |             +------------ sy0 -----------+            |
//!            +--------- cl0| the same rules             |sv0 --------+
//!               10.1.0.2   |                            |   10.2.0.2
//!                          +----------- gw2 ------------+
//!
//!   client: 10.2.0.0/24 via 10.1.0.1        these two routes are moved to gw2
//!   server: 10.3.0.1    via 10.2.0.1        by gw2's notify script on `member-dead`
//! ```
//!
//! The gateways do not pick up connections in the middle (`tcp_loose=0`) and drop what is INVALID.
//! Without that a failover test passes with no replication at all, so the first test shows that
//! here the connections do break when nobody replicates them.

#[path = "gateway/appliance.rs"]
mod appliance;
mod common;
#[path = "gateway/entries.rs"]
mod entries;
#[path = "gateway/topology.rs"]
mod topology;
#[path = "gateway/traffic.rs"]
mod traffic;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use appliance::{Appliances, Discovery};
use common::{may_make_namespaces, wait_for};
use entries::{are_replicated, has_entry};
use topology::{SERVER, SHARED, Topology};
use traffic::Traffic;

const CONNECTIONS: usize = 100;
const PORT: u16 = 7000;

/// A connection on which nothing was heard for so long counts as broken: TCP has sent again three
/// or four times by then.
const SILENCE: Duration = Duration::from_secs(5);

/// How long the client may have heard nothing when a gateway died: the dead time of 300 ms, and TCP's
/// own wait before it sends again, which doubles each time it was in vain.
const GAP_MAX: Duration = Duration::from_secs(4);

/// The tests measure time, so they take turns.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn without_hypersync_the_connections_break() {
    if !may_make_namespaces("that connections break without hypersync") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build();
    let traffic = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), CONNECTIONS);
    assert!(are_replicated(&topology.gateways[0].tcp_entries(), &traffic, SHARED), "gateway 1 translates");

    topology.unplug(1);
    topology.route_through(2);

    // The road through gateway 2 is good: what is new gets through.
    let new = Traffic::start(&topology.client, &topology.server, (SERVER, PORT + 1), 3);
    // What there was does not.
    wait_for(
        "all old connections are reset or silent (they survive with no replication!)",
        SILENCE * 3,
        || {
            let broken =
                |side: &traffic::Progress| side.fault.is_some() || side.last_heard.elapsed() > SILENCE;
            traffic.client().iter().all(broken) && traffic.server().iter().all(broken)
        },
    );
    new.finish(SILENCE);
}

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
    let topology = Topology::build();
    // Declared first, so that it is alive when the appliances of a failing test tell what they saw.
    let traffic;
    let mut appliances = Appliances::start(&topology, discovery, shards);
    traffic = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), CONNECTIONS);
    appliances.wait_for("both gateways' kernels have every connection", Duration::from_secs(30), || {
        topology.gateways.iter().all(|gateway| are_replicated(&gateway.tcp_entries(), &traffic, SHARED))
    });
    traffic.wait_for_more(20, Duration::from_secs(10), "traffic flows with two copies of each connection");

    assert!(!appliances.is_told_dead(2, 1), "gateway 1 is alive and carries the traffic");

    appliances.power_off(1);
    wait_for("gateway 2 tells of the death, its copies ready", Duration::from_secs(10), || {
        appliances.is_told_dead(2, 1)
    });
    traffic.wait_for_more(100, Duration::from_secs(20), "every connection goes on through gateway 2");
    traffic.finish(Duration::from_secs(10));
    assert!(appliances.is_running(2), "the survivor survives");

    let gap = traffic.client().iter().map(|side| side.longest_gap).max().unwrap_or_default();
    println!("{discovery:?}, shards {shards:?}: the client heard nothing for {} ms at most", gap.as_millis());
    assert!(gap < GAP_MAX, "the client heard nothing for {gap:?}");
}

#[test]
fn connections_of_the_gateways_themselves_are_never_copied() {
    if !may_make_namespaces("that a gateway's own connections are not copied") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build();
    let (own, talking, silent);
    let mut appliances = Appliances::start(&topology, Discovery::Multicast, [2, 2]);
    let (client, server, gateway) = (&topology.client, &topology.server, topology.gateway(1));
    // An operator's login to the gateway, and the gateway asking the server something.
    own = [
        Traffic::start(client, gateway, ("10.1.0.1", 22), 3),
        Traffic::start(gateway, server, (SERVER, PORT + 1), 3),
    ];
    // Connections through the gateway, younger than those, show when copying is due: some that talk on,
    // so that events announce them, and some that fall silent at once, so that only a search of
    // the whole kernel table finds them.
    talking = Traffic::start(client, server, (SERVER, PORT), 10);
    silent = Traffic::start(client, server, (SERVER, PORT + 2), 10);
    silent.finish(Duration::from_secs(1));
    appliances.wait_for("the connections through gateway 1 are copied", Duration::from_secs(30), || {
        topology.gateways.iter().map(|gateway| gateway.tcp_entries()).all(|entries| {
            are_replicated(&entries, &talking, SHARED) && are_replicated(&entries, &silent, SHARED)
        })
    });
    assert!(!appliances.is_told_dead(2, 1), "gateway 1 is alive and carries the traffic");
    let entries = topology.gateway(2).tcp_entries();
    for own in &own {
        own.wait_for_more(5, Duration::from_secs(10), "the gateway's own connections are alive");
        for &from in &own.client_addresses {
            assert!(has_entry(&gateway.tcp_entries(), from, own.server_address), "gateway 1 knows its own");
            assert!(!has_entry(&entries, from, own.server_address), "{from} was copied");
        }
    }
}
