//! Real links: multicast, IPv6, and a link that loses. Two hosts as network namespaces, joined by
//! veth.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use hypersync::counters::Counter;
use hypersync::source::SourceEvent;

use crate::common::copies::{connection, connections, push, push_all, wait_for_agreement};
use crate::common::may_make_namespaces;
use crate::common::member::{Lab, Member, SOON, hypersync, wait_until_ready, words};
use crate::common::namespace::{Namespace, two_hosts};

/// A member on each host; `others` says how member n finds the other one.
fn pair(
    lab: &Lab,
    hosts: &[Namespace; 2],
    sync: &str,
    others: impl Fn(u8) -> [String; 2],
) -> [Member; 2] {
    let start = |n: u8| {
        let address: IpAddr = format!("{sync}{n}").parse().expect("an address");
        let mut words = words(n, address);
        words.extend(others(n));
        words.extend(["--interface", "sy0", "--shards", &n.to_string()].map(str::to_owned));
        let mut command = hosts[usize::from(n) - 1].command("env");
        command.arg(hypersync().get_program());
        Member::start(lab, &format!("m{n}"), n, command, &words)
    };
    [start(1), start(2)]
}

fn becomes_ready_and_syncs(what: &str, sync: &str, others: impl Fn(u8) -> [String; 2]) {
    if !may_make_namespaces(what) {
        return;
    }
    let lab = Lab::new();
    let hosts = two_hosts();
    let [one, two] = pair(&lab, &hosts, sync, others);
    wait_until_ready(&[&one, &two]);
    let wanted = connections(0..1000);
    push_all(&mut one.producers(), wanted.values());
    wait_for_agreement(what, &[&one, &two], &wanted, SOON);
    assert_eq!(
        one.counter(Counter::DuplicateMember),
        0,
        "its own heartbeats are known for what they are"
    );
}

#[test]
fn a_pair_finds_itself_by_multicast() {
    becomes_ready_and_syncs("multicast", "10.9.0.", |_| {
        ["--multicast".into(), "224.0.0.116".into()]
    });
}

#[test]
fn a_pair_finds_itself_by_ipv6_multicast() {
    becomes_ready_and_syncs("IPv6 multicast", "fd00::", |_| {
        ["--multicast".into(), "ff02::74".into()]
    });
}

#[test]
fn a_pair_finds_itself_by_ipv6_peers() {
    becomes_ready_and_syncs("IPv6 peers", "fd00::", |n| {
        ["--peer".into(), format!("fd00::{}", 3 - n)]
    });
}

#[test]
fn a_link_that_loses_five_percent_under_load_leaves_no_difference() {
    if !may_make_namespaces("loss on the sync link") {
        return;
    }
    let lab = Lab::new();
    let hosts = two_hosts();
    let [one, two] =
        pair(&lab, &hosts, "10.9.0.", |n| ["--peer".into(), format!("10.9.0.{}", 3 - n)]);
    wait_until_ready(&[&one, &two]);
    for host in &hosts {
        host.nft(
            "table ip loss {\n chain in {\n type filter hook input priority 0\n \
             udp dport 8116 numgen random mod 100 < 5 drop\n }\n }",
        );
    }
    const CONNECTIONS: u32 = 3000;
    let mut producers = one.producers();
    let mut wanted = connections(0..0);
    let (start, mut round) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(4) {
        round += 1;
        for n in 0..CONNECTIONS {
            let mut c = connection(n);
            // One in a hundred closes each round and is opened again in the next: all live well
            // beyond the hold time.
            if n % 100 == round % 100 {
                push(&mut producers, &SourceEvent::gone(c.original));
                wanted.remove(&c.original);
                continue;
            }
            c.state.mark = round;
            push(&mut producers, &SourceEvent::seen(c));
            wanted.insert(c.original, c);
            if n % 100 == 0 {
                producers.flush();
            }
        }
        producers.flush();
        // Several flushes a round: many datagrams that can be lost one by one.
        std::thread::sleep(Duration::from_millis(10));
    }
    for host in &hosts {
        host.nft("delete table ip loss");
    }
    wait_for_agreement("no difference is left", &[&one, &two], &wanted, Duration::from_secs(30));
    let resent = one.counter(Counter::DatagramsResent);
    println!(
        "{round} rounds, {} datagrams, {resent} sent again",
        one.counter(Counter::DatagramsSent)
    );
    assert!(resent > 0, "nothing was lost: this tested nothing");
}
