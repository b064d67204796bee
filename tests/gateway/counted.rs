//! `ct count`, which counts what its own rule has seen: what a takeover makes of a limit on
//! connections.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::appliance::{Appliances, Discovery};
use crate::common::may_make_namespaces;
use crate::entries;
use crate::one_at_a_time;
use crate::topology::{SERVER, SHARED, Topology};
use crate::traffic::Traffic;

const PORT: u16 = 7000;
const LIMIT: usize = 5;

/// The limit, with the condition under which a packet is counted.
fn limit(condition: &str) -> String {
    format!(
        "table inet counted {{
            chain forward {{
                type filter hook forward priority filter - 1
                iifname cl0 tcp dport {PORT} {condition} ct count over {LIMIT} drop
            }}
        }}\n"
    )
}

/// Opens connections until one is refused, and returns how many there are.
fn open_all(topology: &Topology) -> Vec<TcpStream> {
    let to: SocketAddr = format!("{SERVER}:{PORT}").parse().expect("an address");
    let open = || {
        topology.client.inside(|| TcpStream::connect_timeout(&to, Duration::from_millis(1500)).ok())
    };
    std::iter::from_fn(open).take(2 * LIMIT).collect()
}

#[test]
fn a_limit_on_connections_does_not_count_those_that_were_restored() {
    for condition in ["ct state new", ""] {
        if may_make_namespaces("ct count and the death of a gateway") {
            let more = more_at_the_survivor(condition);
            assert_eq!(
                more, LIMIT,
                "as GATEWAYS.md says, whatever packets the rule looks at: {condition:?}"
            );
        }
    }
}

/// How many more get in at the survivor when as many as may be were restored, and talk.
fn more_at_the_survivor(condition: &str) -> usize {
    let _turn = one_at_a_time();
    let topology = Topology::build_with(2, &[&limit(condition)]);
    let traffic;
    let mut appliances = Appliances::start(&topology, Discovery::Multicast, &[1, 1]);
    traffic = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), LIMIT);
    assert_eq!(open_all(&topology).len(), 0, "the limit is reached");
    appliances.wait_for("gateway 2 has the connections", Duration::from_secs(20), || {
        entries::are_replicated(&entries::read(topology.gateway(2)), &traffic, SHARED)
    });

    appliances.power_off(1);
    appliances.wait_until_told_dead(2, 1);
    traffic.wait_for_more(20, Duration::from_secs(20), "the connections go on through gateway 2");
    let more = open_all(&topology);
    appliances.assert_running("the survivor survives");
    more.len()
}
