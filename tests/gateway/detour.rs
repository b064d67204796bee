//! A detour: traffic goes through the backup for a moment, comes back, and raises no event on the
//! way. The entries of copies there have had packets from then on, as those of traffic that moved
//! have.

use std::ops::Range;
use std::time::Duration;

use crate::appliance::{Appliances, Discovery};
use crate::calls::{COPYS_TIMEOUT_S, Server, original, say_all, wait_until_all_are_gone};
use crate::common::{may_make_namespaces, run};
use crate::entries;
use crate::one_at_a_time;
use crate::reused::{SOON, open_and_copy};
use crate::topology::Topology;

/// The client's ports.
const PORTS: Range<u16> = 23_000..23_020;
/// By so much the last packets at the active are later: more than the two may be apart.
const LATER_S: u32 = 8;
/// Data that is not acknowledged shortens an entry's time to that.
const UNACKNOWLEDGED_S: u32 = 300;

#[test]
fn what_is_flushed_at_its_gateway_after_a_detour_is_gone_from_every_kernel() {
    if !may_make_namespaces("a flush after a detour of the packets") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let mut appliances = Appliances::start(&topology, Discovery::Peers, &[2, 2]);
    let _server = Server::start(&topology.server);
    let mut calls = open_and_copy(&topology, &mut appliances, PORTS);

    topology.route_through(2);
    say_all(&mut calls, "through gateway 2");
    topology.route_through(1);
    let left_s = |gateway| {
        let entries = entries::read(topology.gateway(gateway));
        PORTS.map(|port| entries[&original(port)].timeout_s).collect::<Vec<_>>()
    };
    assert!(left_s(2).iter().all(|left| *left < COPYS_TIMEOUT_S), "packets have passed gateway 2");
    appliances.wait_for("the last packets have passed gateway 1 for long", SOON, || {
        say_all(&mut calls, "through gateway 1");
        std::thread::sleep(Duration::from_millis(200)); // Until the last word is acknowledged.
        let pairs = left_s(1).into_iter().zip(left_s(2));
        pairs.clone().all(|(here, there)| here > UNACKNOWLEDGED_S && here > there + LATER_S)
    });

    run(topology.gateway(1).command("conntrack").arg("-F"));
    wait_until_all_are_gone(&topology, &mut appliances, SOON, |_| false);
}
