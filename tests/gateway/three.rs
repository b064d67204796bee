//! Three gateways: each connection is in the kernels of two, the one that carries it and its
//! backup.

use std::time::Duration;

use crate::appliance::{Appliances, Discovery};
use crate::common::may_make_namespaces;
use crate::entries::{self, are_replicated, count};
use crate::topology::{SERVER, SHARED, Topology};
use crate::traffic::Traffic;
use crate::{CONNECTIONS, GAP_MAX, PORT, one_at_a_time};

#[test]
fn every_connection_is_in_two_kernels_and_survives_the_death_of_two_gateways() {
    if !may_make_namespaces("the death of two gateways of three, one after the other") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(3);
    // Declared first, so that it is alive when the appliances of a failing test tell what they saw.
    let traffic;
    let mut appliances = Appliances::start(&topology, Discovery::Multicast, &[2, 2, 2]);
    traffic = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), CONNECTIONS);
    let known = |gateway| count(&entries::read(topology.gateway(gateway)), &traffic);
    let are_in =
        |gateway| are_replicated(&entries::read(topology.gateway(gateway)), &traffic, SHARED);

    appliances.wait_for("every connection is in kernels 1 and 2", Duration::from_secs(30), || {
        assert_eq!(known(3), 0, "gateway 3 is neither active nor the backup by priority");
        are_in(1) && are_in(2)
    });
    traffic.wait_for_more(
        20,
        Duration::from_secs(10),
        "traffic flows with two copies of each connection",
    );
    assert_eq!(known(3), 0, "gateway 3 has got connections for which there are two others");

    appliances.power_off(1);
    appliances.wait_until_told_dead(2, 1);
    traffic.wait_for_more(
        50,
        Duration::from_secs(20),
        "every connection goes on through gateway 2",
    );
    let first_gap = traffic.longest_gap();
    appliances.wait_for(
        "every connection is in two kernels again",
        Duration::from_secs(20),
        || are_in(2) && are_in(3),
    );

    assert!(!appliances.is_told_dead(3, 2), "gateway 2 is alive and carries the traffic");
    appliances.power_off(2);
    appliances.wait_until_told_dead(3, 2);
    traffic.wait_for_more(
        50,
        Duration::from_secs(20),
        "every connection goes on through gateway 3",
    );
    traffic.finish(Duration::from_secs(10));
    appliances.assert_running("the last one survives");

    let gap = traffic.longest_gap();
    println!(
        "three gateways: the client heard nothing for {} ms at most at the first death, {} ms in all",
        first_gap.as_millis(),
        gap.as_millis()
    );
    assert!(gap < GAP_MAX, "the client heard nothing for {gap:?}");
}
