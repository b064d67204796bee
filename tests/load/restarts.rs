//! Warm restarts with the kernel as the source: the appliance of the active gateway, then that of
//! its backup, is killed under traffic and goes on with its table. What their kernels did meanwhile
//! nobody told anyone.

use std::collections::HashSet;
use std::time::Instant;

use hypersync::conn::Tuple;
use hypersync::counters::Counter;

use crate::common::member::{Member, wait_until_ready};
use crate::common::{may_make_namespaces, wait_for};
use crate::conntrack::{Hand, connections, difference, table};
use crate::deaths::{SERVER, Site};
use crate::gateways::LATEST;
use crate::traffic::Traffic;

const TRAFFIC: usize = 50;

#[test]
fn a_killed_appliance_goes_on_with_its_table_and_its_kernel_whichever_role_it_had() {
    if !may_make_namespaces("warm restarts under traffic") {
        return;
    }
    let site = Site::build();
    let start = |number: u8| site.gateways.start(number, &["--dead-after", "5"]);
    let kernel = |number: u8| site.gateways.gateway(number);
    let mut members = [start(1), start(2)];
    wait_until_ready(&[&members[0], &members[1]]);
    site.route_through(1);
    let traffic = Traffic::start(&site.client, &site.server, SERVER, TRAFFIC);
    // Nothing but those: what is in a kernel is wanted there.
    let mut wanted: HashSet<Tuple> = HashSet::new();
    let open = |wanted: &mut HashSet<Tuple>, numbers: std::ops::Range<u32>| {
        Hand::on(kernel(1)).open(connections(numbers.clone()));
        wanted.extend(connections(numbers).map(|c| c.original));
    };
    let equal = |what: &str, members: &[Member; 2], wanted: &HashSet<Tuple>| {
        let (started, mut why) = (Instant::now(), None);
        let mut is_equal = || {
            let tables = [1, 2].map(|number| table(kernel(number)));
            let lost = wanted.iter().find(|name| !tables[0].contains_key(name));
            let has = tables[0].len() == wanted.len() + TRAFFIC;
            why = lost
                .map(|name| format!("{name} is lost"))
                .or_else(|| {
                    (!has)
                        .then(|| format!("{} entries, {}", tables[0].len(), wanted.len() + TRAFFIC))
                })
                .or_else(|| difference(&tables[0], &tables[1]))
                .or_else(|| {
                    members
                        .iter()
                        .find_map(|m| (m.counter(Counter::Exposure) != 0).then(|| "exposed".into()))
                });
            why.is_none()
        };
        while !is_equal() {
            assert!(started.elapsed() < LATEST, "{what}: the two kernels' tables differ: {why:?}");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        println!(
            "{what}: equal {} ms later, {} entries",
            started.elapsed().as_millis(),
            wanted.len() + TRAFFIC
        );
    };
    for (round, (victim, other, until_dead)) in
        [(1, 2, false), (1, 2, true), (2, 1, false), (2, 1, true)].into_iter().enumerate()
    {
        let what = format!(
            "member {victim} killed, {}",
            if until_dead { "and dead" } else { "and back at once" }
        );
        let base = round as u32 * 1000;
        open(&mut wanted, base..base + 300);
        equal("before", &members, &wanted);
        let at = |number: u8| usize::from(number) - 1;
        let died = members[at(other)].counter(Counter::MembersDied);
        let table_id = members[at(victim)].view().header().table_id;
        let pid = members[at(victim)].pid();
        members[at(victim)].kill();
        // Some end, some begin. If it is the backup's: somebody deletes some of the entries that it
        // keeps.
        Hand::on(kernel(1)).finish(connections(base..base + 100));
        connections(base..base + 100).for_each(|c| _ = wanted.remove(&c.original));
        open(&mut wanted, base + 300..base + 400);
        if victim == 2 {
            Hand::on(kernel(2)).close(connections(base + 100..base + 150));
        }
        if until_dead {
            wait_for("the other one finds it dead", LATEST, || {
                members[at(other)].counter(Counter::MembersDied) > died
            });
        }
        members[at(victim)] = start(victim);
        let header = *members[at(victim)].view().header();
        assert!(
            header.pid != pid && header.table_id == table_id,
            "another process, the same table"
        );
        wait_until_ready(&[&members[0], &members[1]]);
        traffic.wait_for_more(10, LATEST, "every connection goes on");
        equal(&what, &members, &wanted);
    }
    assert_eq!(
        members[0].counter(Counter::Claims) + members[1].counter(Counter::Claims),
        0,
        "no traffic moved"
    );
    // Now the backup has to carry on: none breaks.
    let dead =
        |member: &Member| member.events().iter().filter(|event| **event == "member-dead 1").count();
    let told = dead(&members[1]);
    members[0].kill();
    site.set_links(1, "down");
    wait_for("the death is told", LATEST, || dead(&members[1]) > told);
    site.route_through(2);
    traffic.wait_for_more(50, LATEST, "every connection goes on through the backup");
    let there = table(kernel(2));
    assert_eq!(wanted.iter().find(|name| !there.contains_key(name)), None);
    assert_eq!(there.len(), wanted.len() + TRAFFIC, "what ended is nowhere");
    traffic.finish(LATEST);
}
