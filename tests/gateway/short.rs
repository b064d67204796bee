//! Connections that end within the hold are not copied, though the kernel keeps their entries for
//! two minutes.

use std::time::{Duration, Instant};

use hypersync::counters::Counter;

use crate::appliance::{Appliances, Discovery};
use crate::calls::{Call, Server, TIME_WAIT, describe, of_calls};
use crate::common::{may_make_namespaces, wait_for};
use crate::entries::{self, Entry, are_replicated};
use crate::one_at_a_time;
use crate::topology::{SERVER, SHARED, Topology};
use crate::traffic::Traffic;

const SHORT: u16 = 3000;
/// The client's ports: from here on.
const FROM: u16 = 10_000;
const HOLD: Duration = Duration::from_secs(1);

/// Opens and closes all short connections, eight at a time. Returns the ports of those that took
/// too long.
fn call_shortly(topology: &Topology) -> Vec<u16> {
    let worker = |first: u16| {
        let mut late = Vec::new();
        for port in (FROM + first..FROM + SHORT).step_by(8) {
            let start = Instant::now();
            let mut call = Call::open(port).expect("the way is open");
            call.say().expect("the way is open");
            call.close().expect("the way is open");
            if start.elapsed() > HOLD / 2 {
                late.push(port);
            }
        }
        late
    };
    topology.client.inside(|| {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..8).map(|first| scope.spawn(move || worker(first))).collect();
            workers
                .into_iter()
                .flat_map(|worker| worker.join().expect("every call went well"))
                .collect()
        })
    })
}

#[test]
fn short_connections_are_never_copied() {
    if !may_make_namespaces("short connections by the thousand") {
        return;
    }
    const LONG: usize = 10;
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let (beside, later);
    let mut appliances = Appliances::start(&topology, Discovery::Peers, &[2, 2]);
    let _server = Server::start(&topology.server);
    appliances.wait_until_ready();
    beside = Traffic::start(&topology.client, &topology.server, (SERVER, 7000), LONG);
    let is_copied =
        |traffic: &Traffic| are_replicated(&entries::read(topology.gateway(2)), traffic, SHARED);
    appliances
        .wait_for("long connections are copied", Duration::from_secs(20), || is_copied(&beside));

    let counters = |appliances: &Appliances| {
        [(1, Counter::DeltasNew), (2, Counter::Commits)]
            .map(|(member, c)| appliances.counter(member, c))
    };
    let times = |appliances: &Appliances| [1, 2].map(|member| appliances.processor_time(member));
    let (before, times_before) = (counters(&appliances), times(&appliances));
    let start = Instant::now();
    let late = call_shortly(&topology);
    let (took, ended) = (start.elapsed(), Instant::now());
    let is_short = |entry: &Entry| !late.contains(&entry.original.from.port());
    assert!(late.len() < usize::from(SHORT) / 10, "{} calls took half the hold", late.len());
    // Younger than all of them: once these are copied, it was decided about those.
    later = Traffic::start(&topology.client, &topology.server, (SERVER, 8000), LONG);
    appliances.wait_for("later connections are copied", Duration::from_secs(20), || {
        let entries = entries::read(topology.gateway(2));
        entries::originals(&later).all(|original| entries.contains_key(&original))
    });
    wait_for("some seconds more", Duration::from_secs(10), || ended.elapsed() > 4 * HOLD);

    let cost: Vec<String> = std::iter::zip(times(&appliances), times_before)
        .map(|(after, before)| {
            format!("{:.1}", (after - before).as_secs_f64() * 1e6 / f64::from(SHORT))
        })
        .collect();
    println!(
        "{SHORT} short connections in {} ms ({} took long): the appliances took {} us of processor for each",
        took.as_millis(),
        late.len(),
        cost.join(" and ")
    );
    let at_home = of_calls(entries::read(topology.gateway(1)));
    let lingering = at_home.iter().filter(|entry| entry.tcp_state == TIME_WAIT).count();
    assert_eq!(
        lingering,
        usize::from(SHORT),
        "gateway 1's kernel keeps them: {}",
        describe(&at_home)
    );
    let mut copied = of_calls(entries::read(topology.gateway(2)));
    copied.retain(is_short);
    let [sent, committed] = std::array::from_fn(|i| counters(&appliances)[i] - before[i])
        .map(|n| n.saturating_sub(LONG as u64));
    assert!(
        copied.is_empty() && sent.max(committed) <= late.len() as u64,
        "of {SHORT} short connections {sent} were sent, {committed} committed, kernel 2 has {}",
        describe(&copied)
    );
    let backups = appliances.counter(2, Counter::ConnectionsBackup);
    assert!(
        backups <= 2 * LONG as u64 + late.len() as u64,
        "gateway 2's table has {backups} copies"
    );

    appliances.power_off(1);
    appliances.wait_until_told_dead(2, 1);
    for long in [&beside, &later] {
        long.wait_for_more(20, Duration::from_secs(20), "long connections go on through gateway 2");
        long.finish(Duration::from_secs(10));
    }
    appliances.assert_running("the survivor survives");
}
