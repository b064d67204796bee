//! Connections that are masqueraded behind an address that moves, as VRRP does at a switchover: the
//! kernel of the gateway that loses it drops their entries. The other gateway goes on with them,
//! also with those that were silent.

use std::time::{Duration, Instant};

use hypersync::counters::Counter;

use crate::appliance::Appliances;
use crate::calls::{Call, are_established, close_all, cut, open_all, say_all, start_pair};
use crate::calls::{Server, wait_until_all_are_gone};
use crate::common::{may_make_namespaces, wait_for};
use crate::one_at_a_time;
use crate::topology::Topology;

const PORTS: std::ops::Range<u16> = 40_000..40_060;
const SOON: Duration = Duration::from_secs(10);
/// For so long the address is nobody's.
const ELECTION: Duration = Duration::from_secs(1);
/// Longer than the end of a connection waits whose address has left.
const SILENCE: Duration = Duration::from_secs(7);

/// What leaves for the calls' server is masqueraded, before any other translation.
const RULES: &str = "
table ip hides {
    chain postrouting {
        type nat hook postrouting priority srcnat - 1;
        oifname sv0 tcp dport 7080 masquerade
    }
}
";

/// How the address goes: it is removed, or its link goes down.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Goes {
    Removed,
    LinkDown,
}

/// A pair of gateways whose only address in the server's network is the one that moves.
fn build() -> Topology {
    let topology = Topology::build_with(2, &[RULES]);
    for member in topology.members() {
        topology.gateway(member).ip(&format!(
            "address del 10.2.0.{member}/24 dev sv0\naddress add 10.5.0.{member}/24 dev sv0\n"
        ));
    }
    topology.gateway(1).ip("address add 10.2.0.100/24 dev sv0\n");
    topology
}

/// The address moves to gateway 2, and so does the traffic; nobody says a word meanwhile.
fn switch_over(topology: &Topology, goes: Goes) {
    topology.gateway(1).ip(match goes {
        Goes::Removed => "address del 10.2.0.100/24 dev sv0\n",
        Goes::LinkDown => "link set sv0 down\n",
    });
    std::thread::sleep(ELECTION);
    topology.gateway(2).ip("address add 10.2.0.100/24 dev sv0\n");
    // What a gratuitous ARP would do.
    topology.server.ip("neighbour flush dev eth0\n");
    topology.route_through(2);
}

fn open(topology: &Topology) -> Vec<Call> {
    let mut calls = open_all(topology, PORTS);
    say_all(&mut calls, "the way is open");
    calls
}

#[test]
fn masqueraded_connections_go_on_where_their_address_goes() {
    if !may_make_namespaces("masqueraded connections at a switchover") {
        return;
    }
    let _turn = one_at_a_time();
    for goes in [Goes::Removed, Goes::LinkDown] {
        let topology = build();
        let _server = Server::start(&topology.server);
        let mut calls = open(&topology);
        switch_over(&topology, goes);
        assert_eq!(cut(&mut calls).len(), PORTS.len(), "{goes:?}: without copies all are cut");
        drop(calls);

        let topology = build();
        let (mut appliances, _server) = start_pair(&topology, 5);
        appliances.wait_until_ready();
        let mut calls = open(&topology);
        appliances.wait_for("both kernels have every call", SOON, || {
            [1, 2].iter().all(|member| are_established(&topology, *member, PORTS))
        });
        switch_over(&topology, goes);
        let start = Instant::now();
        wait_for("they were silent for long enough", 2 * SILENCE, || start.elapsed() > SILENCE);
        say_all(&mut calls, &format!("{goes:?}: at gateway 2"));
        assert_eq!(left(&appliances), PORTS.len() as u64, "{goes:?}");
        appliances.wait_for("there are two copies again", SOON, || {
            [1, 2].iter().all(|member| are_established(&topology, *member, PORTS))
        });
        assert_eq!(appliances.counter(2, Counter::ConnectionsActive), PORTS.len() as u64);
        close_all(calls);
        wait_until_all_are_gone(&topology, &mut appliances, 4 * SOON, |_| false);
    }
}

fn left(appliances: &Appliances) -> u64 {
    appliances.counter(1, Counter::SourceLeft)
}
