//! The examples of docs/GATEWAYS.md, run: two gateways whose addresses keepalived moves (VRRP), or
//! whose routes a script moves. The files under docs/examples are used as they are, but for
//! the places of programs and hosts.
//!
//! ```text
//!                      10.1.0.2  +------- gateway 1 -------+  203.0.113.2
//!                  +---------lan0| SNAT to 203.0.113.1     |wan0---------+
//!   client         |             +----------sync0----------+             |        server
//!   10.1.0.10 -----+                          | 10.9.0.1                 +----- 203.0.113.10
//!   default via    |  10.1.0.1                |            203.0.113.1   |
//!   10.1.0.1       |   moves                  | 10.9.0.2      moves      |
//!                  |             +----------sync0----------+             |
//!                  +---------lan0| the same                |wan0---------+
//!                      10.1.0.3  +------- gateway 2 -------+  203.0.113.3
//! ```

mod common;
#[allow(dead_code)] // Only TCP here.
#[path = "gateway/datagrams.rs"]
mod datagrams;
#[path = "keepalived/gateway.rs"]
mod gateway;
#[path = "keepalived/topology.rs"]
mod topology;
#[allow(dead_code)]
#[path = "gateway/traffic.rs"]
mod traffic;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::{may_make_namespaces, wait_for};
use gateway::Gateways;
use topology::{OUTSIDE, SERVER, Topology};
use traffic::{Progress, Traffic};

const CONNECTIONS: usize = 50;
const PORT: u16 = 7000;
const LOG_ONLY: &str = include_str!("../docs/examples/keepalived/notify.sh");
const MOVE_ROUTES: &str = include_str!("../docs/examples/routes/notify.sh");

/// A connection on which nothing was heard for so long counts as broken.
const SILENCE: Duration = Duration::from_secs(5);

/// The tests measure time, so they take turns.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The example's script, but without the log of this host.
fn log_only(gateways: &Gateways<'_>, number: u8) -> std::path::PathBuf {
    gateways.script(number, LOG_ONLY, &[("logger ".to_owned(), ": logger ".to_owned())])
}

fn wait_for_copies(topology: &Topology, traffic: &Traffic) {
    let to = traffic.server_address.port();
    let ports: Vec<(u16, u16)> =
        traffic.client_addresses.iter().map(|from| (from.port(), to)).collect();
    wait_for("both gateways' kernels have every connection", Duration::from_secs(30), || {
        [1, 2].iter().all(|number| topology.has_entries(*number, &ports))
    });
}

/// Prints how long the client has heard nothing at most.
fn tell_gap(what: &str, traffic: &Traffic) {
    let gap = traffic.client().iter().map(|side| side.longest_gap).max().unwrap_or_default();
    println!("{what}: the client heard nothing for {} ms at most", gap.as_millis());
}

#[test]
fn without_hypersync_the_connections_break_when_keepalived_moves_the_addresses() {
    if !may_make_namespaces("that connections break when addresses move without hypersync") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build();
    let mut gateways = Gateways::new(&topology);
    gateways.start_keepalived(1);
    // The check fails on both, so neither is better: somebody must forward.
    gateways.wait_until_master(1, "it is alone");
    gateways.start_keepalived(2);
    let traffic = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), CONNECTIONS);

    gateways.power_off(1);
    gateways.wait_until_master(2, "the other is gone");
    // The road through gateway 2 is good: what is new gets through.
    let new = Traffic::start(&topology.client, &topology.server, (SERVER, PORT + 1), 3);
    wait_for(
        "all old connections are silent (they survive with no replication!)",
        SILENCE * 3,
        || {
            let broken =
                |side: &Progress| side.fault.is_some() || side.last_heard.elapsed() > SILENCE;
            traffic.client().iter().all(broken) && traffic.server().iter().all(broken)
        },
    );
    new.finish(SILENCE);
}

#[test]
fn every_connection_survives_when_keepalived_moves_the_addresses_of_a_dead_gateway() {
    if !may_make_namespaces("the death of a gateway under keepalived") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build();
    // Declared first, so that it is alive when the processes of a failing test tell what they saw.
    let traffic;
    let mut gateways = Gateways::new(&topology);
    for number in [1, 2] {
        gateways.start_hypersync(number, &log_only(&gateways, number));
        gateways.start_keepalived(number);
        gateways.wait_until_master(1, "it came first");
    }
    traffic = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), CONNECTIONS);
    wait_for_copies(&topology, &traffic);
    assert!(!topology.has_addresses(2), "gateway 1 has them");

    gateways.power_off(1);
    gateways.wait_until_master(2, "the other is gone");
    traffic.wait_for_more(
        100,
        Duration::from_secs(20),
        "every connection goes on through gateway 2",
    );
    wait_for("gateway 2 tells of the death", Duration::from_secs(10), || {
        gateways.was_told(2, "member-dead 1")
    });
    traffic.finish(Duration::from_secs(10));
    tell_gap("keepalived, a gateway dies", &traffic);
}

#[test]
fn a_gateway_whose_hypersync_is_not_ready_gives_the_addresses_to_one_that_is() {
    if !may_make_namespaces("that keepalived follows the check") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build();
    let (traffic, later);
    let mut gateways = Gateways::new(&topology);
    // A gateway without hypersync forwards as long as there is none better.
    gateways.start_keepalived(2);
    gateways.wait_until_master(2, "it is alone");
    gateways.start_hypersync(1, &log_only(&gateways, 1));
    gateways.start_keepalived(1);
    gateways.wait_until_master(1, "the other is not ready");
    gateways.start_hypersync(2, &log_only(&gateways, 2));
    traffic = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), CONNECTIONS);
    wait_for_copies(&topology, &traffic);
    assert!(
        topology.has_addresses(1) && !topology.has_addresses(2),
        "equals take nothing from each other"
    );

    // The appliance dies, the gateway lives.
    gateways.kill_hypersync(1);
    assert_eq!(gateways.check(1), Some(1));
    gateways.wait_until_master(2, "hypersync is gone at the other");
    traffic.wait_for_more(
        100,
        Duration::from_secs(20),
        "every connection goes on through gateway 2",
    );
    wait_for("gateway 1 has given the addresses up", Duration::from_secs(5), || {
        !topology.has_addresses(1)
    });
    tell_gap("keepalived, hypersync killed", &traffic);

    // What begins now is known to gateway 2 alone, until gateway 1's hypersync is back.
    later = Traffic::start(&topology.client, &topology.server, (SERVER, PORT + 1), CONNECTIONS);
    // It starts again and takes nothing away, even when it is as good as the other.
    gateways.start_hypersync(1, &log_only(&gateways, 1));
    wait_for_copies(&topology, &later);
    traffic.wait_for_more(150, Duration::from_secs(20), "traffic goes on through gateway 2");
    assert!(
        topology.has_addresses(2) && !topology.has_addresses(1),
        "gateway 1 takes nothing back"
    );

    // The other one's turn, in good order: it leaves, and everything moves back.
    gateways.stop_hypersync(2);
    gateways.wait_until_master(1, "hypersync has left the other");
    for traffic in [&traffic, &later] {
        traffic.wait_for_more(
            100,
            Duration::from_secs(20),
            "every connection goes on through gateway 1",
        );
        tell_gap("keepalived, there and back", traffic);
        traffic.finish(Duration::from_secs(10));
    }
}

#[test]
fn every_connection_survives_when_a_script_moves_the_routes_of_a_dead_gateway() {
    if !may_make_namespaces("the death of a gateway whose routes a script moves") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build();
    let traffic;
    let mut gateways = Gateways::new(&topology);
    topology.client.ip("route replace default via 10.1.0.2");
    topology.server.ip(&format!("route replace {OUTSIDE}/32 via 203.0.113.2"));
    let leads_through = |own: u8| {
        let route = common::run(topology.client.command("ip").args(["route", "show", "default"]));
        route.contains(&format!("via 10.1.0.{own} "))
    };
    let mut scripts = Vec::new();
    for number in [1, 2] {
        let word = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        let host = |name| format!("ip netns exec {name}");
        let mut words = vec![
            word("ssh root@inside-router", &host(topology.client.name())),
            word("ssh root@outside-router", &host(topology.server.name())),
            word("logger ", ": logger "),
        ];
        if number == 1 {
            // The example is gateway 2's.
            words.push(word(
                "inside=10.1.0.3 outside=203.0.113.3\nother_inside=10.1.0.2 other_outside=203.0.113.2",
                "inside=10.1.0.2 outside=203.0.113.2\nother_inside=10.1.0.3 other_outside=203.0.113.3",
            ));
        }
        scripts.push(gateways.script(number, MOVE_ROUTES, &words));
        gateways.start_hypersync(number, &scripts[scripts.len() - 1]);
    }
    traffic = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), CONNECTIONS);
    wait_for_copies(&topology, &traffic);

    // Only the sync link fails: each says of the other that it is dead, and the routes stay.
    topology.gateway(1).ip("link set sync0 down");
    wait_for("each tells of the other's death", Duration::from_secs(10), || {
        gateways.was_told(1, "member-dead 2") && gateways.was_told(2, "member-dead 1")
    });
    traffic.wait_for_more(100, Duration::from_secs(10), "traffic goes on");
    assert!(leads_through(2), "the routes stay");
    topology.gateway(1).ip("link set sync0 up");
    wait_for("each has heard the other again", Duration::from_secs(10), || {
        [(1, "member-up 2"), (2, "member-up 1")]
            .iter()
            .all(|(number, event)| gateways.was_told(*number, event))
    });
    traffic.wait_for_more(50, Duration::from_secs(10), "traffic goes on after the link is back");
    wait_for_copies(&topology, &traffic);

    // Gateway 1 is told to stop: the routes move although it answers.
    gateways.stop_hypersync(1);
    wait_for("the routes lead through gateway 2", Duration::from_secs(10), || leads_through(3));
    traffic.wait_for_more(
        50,
        Duration::from_secs(20),
        "every connection goes on through gateway 2",
    );
    tell_gap("routes moved by a script, a gateway leaves", &traffic);

    // It comes back and takes nothing, until the other dies.
    gateways.start_hypersync(1, &scripts[0]);
    wait_for_copies(&topology, &traffic);
    traffic.wait_for_more(50, Duration::from_secs(10), "traffic goes on through gateway 2");
    assert!(leads_through(3), "gateway 1 takes nothing back");
    gateways.power_off(2);
    wait_for("the routes lead through gateway 1", Duration::from_secs(10), || leads_through(2));
    traffic.wait_for_more(
        100,
        Duration::from_secs(20),
        "every connection goes on through gateway 1",
    );
    tell_gap("routes moved by a script, a gateway dies", &traffic);
    traffic.finish(Duration::from_secs(10));
}
