//! Traffic that moves to the other gateway while both live. Established traffic raises no event
//! there; then the old gateway's entry ends, as it is idle or because an operator removes it, and
//! the traffic goes on. (That each kind of flow breaks when it moves to a gateway that has no copy
//! is shown in `kinds`.)

use std::time::{Duration, Instant};

use hypersync::conntrack::codec::GIVEN_MAX_S;
use hypersync::counters::Counter;

use crate::appliance::{Appliances, Discovery};
use crate::common::{may_make_namespaces, run, wait_for};
use crate::entries;
use crate::mix::Mix;
use crate::one_at_a_time;
use crate::topology::Topology;

/// Flows of each protocol: some of every kind.
const FLOWS: usize = 32;
/// How long an idle entry lasts at the old gateway.
const IDLE: Duration = Duration::from_secs(5);
/// A flow of which nothing was heard for so long is cut.
const CUT: Duration = Duration::from_secs(4);
const SOON: Duration = Duration::from_secs(20);

#[test]
fn traffic_that_moved_is_not_cut_when_the_old_gateways_entry_times_out() {
    if !may_make_namespaces("traffic that moved, and idle entries at the old gateway") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    // Every packet there gives its entry so much.
    for state in [
        "tcp_timeout_established",
        "tcp_timeout_unacknowledged",
        "udp_timeout_stream",
        "udp_timeout",
    ] {
        topology
            .gateway(1)
            .sysctl(&format!("net/netfilter/nf_conntrack_{state}"), &IDLE.as_secs().to_string());
    }
    traffic_moves(&topology, 3 * IDLE, |_| {});
}

#[test]
fn traffic_that_moved_is_not_cut_by_a_flush_at_the_old_gateway() {
    if !may_make_namespaces("traffic that moved, and a flush at the old gateway") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    traffic_moves(&topology, Duration::from_secs(6), |_| {
        run(topology.gateway(1).command("conntrack").arg("-F"));
    });
}

#[test]
fn traffic_that_moved_is_not_cut_by_single_deletes_at_the_old_gateway() {
    if !may_make_namespaces("traffic that moved, and entries deleted at the old gateway") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    traffic_moves(&topology, Duration::from_secs(6), |mix| {
        for entry in mix.entries(&entries::read(topology.gateway(1))) {
            let (name, reply) = (entry.original, entry.reply);
            let protocol = if name.protocol == hypersync::conn::tuple::TCP { "tcp" } else { "udp" };
            let family = if name.from.is_ipv4() { "ipv4" } else { "ipv6" };
            let [source, port] = [name.from.ip().to_string(), name.from.port().to_string()];
            let to = reply.to.port().to_string();
            run(topology
                .gateway(1)
                .command("conntrack")
                .args(["-D", "-f", family, "-p", protocol])
                .args(["--orig-src", &source, "--orig-port-src", &port, "--reply-port-dst", &to]));
        }
    });
}

/// Somebody gives the entries of copies a short timeout. It looks like that of a packet: believed,
/// it would be the claim of a gateway that has no traffic, whose entries are about to run out.
#[test]
fn a_short_timeout_that_somebody_gives_the_entries_of_copies_claims_nothing() {
    if !may_make_namespaces("timeouts that somebody writes at the backup") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let mix;
    let mut appliances = Appliances::start(&topology, Discovery::Peers, &[2, 2]);
    appliances.wait_until_ready();
    mix = Mix::start(&topology, FLOWS, FLOWS);
    let at = |member| entries::read(topology.gateway(member));
    appliances.wait_for("both gateways' kernels have every flow", SOON, || {
        [1, 2].iter().all(|member| mix.are_established(&at(*member)))
    });
    let before = at(2);
    for (family, protocol) in [("ipv4", "tcp"), ("ipv4", "udp"), ("ipv6", "tcp"), ("ipv6", "udp")] {
        run(topology
            .gateway(2)
            .command("conntrack")
            .args(["-U", "-f", family, "-p", protocol, "-t", "2"]));
    }
    let lasting = |entries: &entries::Entries| {
        mix.entries(entries).iter().filter(|entry| entry.timeout_s > GIVEN_MAX_S).count()
    };
    assert_eq!(lasting(&before), mix.count(), "they were copies");
    wait_for("they last as copies again", SOON, || lasting(&at(2)) == mix.count());
    mix.wait_for_more(20, SOON, "every flow goes on");
    assert_eq!(appliances.counter(2, Counter::Claims), 0);
    assert_eq!(appliances.counter(1, Counter::ConnectionsActive), mix.count() as u64);
    appliances.power_off(1);
    appliances.wait_until_told_dead(2, 1);
    topology.route_through(2);
    mix.wait_for_more_at_clients(20, SOON, "every flow goes on through gateway 2");
    mix.finish(Duration::from_secs(10));
    appliances.assert_running("the survivor survives");
}

/// Flows of every kind move from gateway 1 to gateway 2, both alive; then `end_at_the_old_one`
/// happens there. They go on for so long and much longer, and are protected: gateway 2 may die.
fn traffic_moves(topology: &Topology, and_lasts: Duration, end_at_the_old_one: impl FnOnce(&Mix)) {
    let mix;
    let mut appliances = Appliances::start(topology, Discovery::Peers, &[2, 2]);
    appliances.wait_until_ready();
    mix = Mix::start(topology, FLOWS, FLOWS);
    let flows = mix.count() as u64;
    let are_in_both =
        || topology.gateways.iter().all(|gateway| mix.are_established(&entries::read(gateway)));
    appliances.wait_for("both gateways' kernels have every flow", SOON, are_in_both);
    let roles = |appliances: &Appliances| {
        [
            (1, Counter::ConnectionsBackup),
            (2, Counter::ConnectionsActive),
            (1, Counter::ConnectionsActive),
        ]
        .map(|(member, counter)| appliances.counter(member, counter))
    };
    assert_eq!(roles(&appliances), [0, 0, flows], "gateway 1 carries the traffic");
    // What a UDP client sends makes a new entry where there is none. A server's words need the old
    // one.
    mix.silence_udp_clients(true);

    topology.route_through(2);
    mix.wait_for_more_at_clients(10, SOON, "every flow goes on through gateway 2");
    let moved = Instant::now();
    end_at_the_old_one(&mix);

    wait_for("the flows go on", 4 * and_lasts, || {
        // The kernel collects what has timed out when it is listed, or else within a minute.
        let at_the_old_one = mix.entries(&entries::read(topology.gateway(1))).len();
        let cut = mix.cut(CUT);
        assert!(
            cut.is_empty(),
            "{:.1} s after the move to gateway 2, of {flows} flows are cut: {cut:#?}; kernel 1 has {at_the_old_one} \
             of them, kernel 2 {}; closes sent by gateway 1: {}, entries deleted at gateway 2: {}",
            moved.elapsed().as_secs_f64(),
            mix.entries(&entries::read(topology.gateway(2))).len(),
            appliances.counter(1, Counter::DeltasClose),
            appliances.counter(2, Counter::CommitDeletes)
        );
        moved.elapsed() > and_lasts
    });
    mix.wait_for_more_at_clients(20, SOON, "every flow still goes on through gateway 2");

    let mut last = [0; 3];
    let start = Instant::now();
    while last != [flows, flows, 0] || !are_in_both() {
        assert!(
            start.elapsed() < SOON,
            "of {flows} flows through gateway 2, {} are copies at gateway 1, {} active at gateway 2, {} at 1; \
             kernel 1 has {} of them",
            last[0],
            last[1],
            last[2],
            mix.entries(&entries::read(topology.gateway(1))).len()
        );
        std::thread::sleep(Duration::from_millis(50));
        last = roles(&appliances);
    }
    println!("protected {:.1} s after the move", moved.elapsed().as_secs_f64());
    appliances.power_off(2);
    appliances.wait_until_told_dead(1, 2);
    topology.route_through(1);
    mix.wait_for_more_at_clients(
        20,
        SOON,
        "every flow goes on through gateway 1, as gateway 2 has died",
    );
    mix.silence_udp_clients(false);
    mix.wait_for_more(20, SOON, "every client is heard");
    mix.finish(Duration::from_secs(10));
    appliances.assert_running("the survivor survives");
}
