//! Committed entries: before a takeover, at one, and when somebody removes them.

use std::time::{Duration, Instant};

use hypersync::conntrack::commit::KEPT_TIMEOUT_S;
use hypersync::counters::Counter;

use crate::common::member::{Member, wait_until_ready};
use crate::common::{may_make_namespaces, run, wait_for};
use crate::conntrack::{Churn, Hand, Plan, Table, connections, count, difference, table};
use crate::gateways::{
    Gateways, LATEST, REPROTECT_AFTER, check_dumps, is_protected, print_passes, stays,
};

/// The kernel's timeout of an established connection.
const ESTABLISHED_S: u32 = 432_000;

/// Gateways 1 and 2 with their appliances.
fn pair(extra: &[&str]) -> (Gateways, Member, Member) {
    let gateways = Gateways::build(2);
    let (one, two) = (gateways.start(1, extra), gateways.start(2, extra));
    wait_until_ready(&[&one, &two]);
    (gateways, one, two)
}

fn timeouts(table: &Table) -> (u32, u32) {
    let all = table.values().map(|c| c.state.timeout_s);
    (all.clone().min().unwrap_or(0), all.max().unwrap_or(0))
}

#[test]
fn what_is_flushed_at_the_backup_comes_back_and_what_is_flushed_at_the_active_is_closed() {
    if !may_make_namespaces("flushed tables") {
        return;
    }
    const COUNT: u32 = 4000;
    let (gateways, one, two) = pair(&[]);
    let (kernel1, kernel2) = (gateways.gateway(1), gateways.gateway(2));
    Hand::on(kernel1).open(connections(0..COUNT));
    let is_whole = || is_protected(&one, COUNT as u64) && count(kernel2) == COUNT as u64;
    wait_for("all are copied", LATEST, is_whole);

    run(kernel2.command("conntrack").arg("-F"));
    let flushed = Instant::now();
    wait_for("the backup's entries come back", Duration::from_secs(10), is_whole);
    println!("{COUNT} entries came back within {} ms", flushed.elapsed().as_millis());
    assert_eq!(difference(&table(kernel1), &table(kernel2)), None);
    assert_eq!(two.counter(Counter::Claims), 0);
    stays("nothing is closed", Duration::from_secs(1), || {
        is_whole() && two.counter(Counter::ConnectionsBackup) == COUNT as u64
    });

    run(kernel1.command("conntrack").arg("-F"));
    let flushed = Instant::now();
    wait_for("the active's connections are closed everywhere", Duration::from_secs(10), || {
        one.counter(Counter::ConnectionsActive) == 0
            && two.counter(Counter::ConnectionsBackup) == 0
            && count(kernel2) == 0
    });
    println!("{COUNT} closes were carried out within {} ms", flushed.elapsed().as_millis());
    stays("they stay closed", Duration::from_secs(1), || {
        count(kernel1) == 0 && count(kernel2) == 0
    });
    check_dumps(&[&one, &two]);
}

#[test]
fn with_commit_takeover_the_entries_are_there_when_the_death_is_told() {
    if !may_make_namespaces("commits at a takeover") {
        return;
    }
    const COUNT: u32 = 20_000;
    let (gateways, mut one, two) = pair(&["--commit", "takeover"]);
    let (kernel1, kernel2) = (gateways.gateway(1), gateways.gateway(2));
    Hand::on(kernel1).open(connections(0..COUNT));
    wait_for("all are copied", LATEST, || is_protected(&one, COUNT as u64));
    assert_eq!(two.counter(Counter::ConnectionsBackup), COUNT as u64);
    assert_eq!(count(kernel2), 0, "the active lives");
    let wanted = table(kernel1);

    one.kill();
    let killed = Instant::now();
    while !two.was_told("member-dead 1") {
        assert!(killed.elapsed() < LATEST, "the death is told");
        std::thread::sleep(Duration::from_millis(1));
    }
    let (told, there) = (killed.elapsed(), count(kernel2));
    assert_eq!(there, COUNT as u64, "the death is told when the entries are there");
    println!("{COUNT} entries were there {} ms after the kill", told.as_millis());
    let entries = table(kernel2);
    assert_eq!(difference(&wanted, &entries), None);
    let (_, most) = timeouts(&entries);
    assert!(most <= ESTABLISHED_S, "a dead active closes nothing: {most} s");
    check_dumps(&[&two]);
}

#[test]
fn with_commit_off_nothing_is_ever_written() {
    if !may_make_namespaces("no commits") {
        return;
    }
    const COUNT: u32 = 2000;
    let (gateways, mut one, two) = pair(&["--commit", "off"]);
    Hand::on(gateways.gateway(1)).open(connections(0..COUNT));
    wait_for("all are copied", LATEST, || is_protected(&one, COUNT as u64));
    one.kill();
    wait_for("the death is told", LATEST, || two.was_told("member-dead 1"));
    wait_for("nobody else can take member 1's place", LATEST, || {
        two.counter(Counter::StreamsLost) > 0
    });
    let presumed = (two.counter(Counter::ConnectionsBackup), two.counter(Counter::Promotions));
    assert_eq!(
        presumed,
        (COUNT as u64, 0),
        "its copies are presumed active, and stay where they are"
    );
    stays("the kernel's table stays empty", Duration::from_secs(1), || {
        count(gateways.gateway(2)) == 0
    });
    assert_eq!(two.counter(Counter::Commits), 0);
    check_dumps(&[&two]);
}

#[test]
fn entries_never_run_out_while_the_active_lives_and_do_so_once_it_is_dead() {
    if !may_make_namespaces("timeouts of committed entries") {
        return;
    }
    const COUNT: u32 = 10_000;
    let (gateways, mut one, two) = pair(&[]);
    let kernel2 = gateways.gateway(2);
    Hand::on(gateways.gateway(1)).open(connections(0..COUNT));
    wait_for("all are copied", LATEST, || {
        is_protected(&one, COUNT as u64) && count(kernel2) == COUNT as u64
    });
    let (least, most) = timeouts(&table(kernel2));
    println!("while the active lives: {least} to {most} s");
    assert!(most <= KEPT_TIMEOUT_S && least >= KEPT_TIMEOUT_S - 120);

    one.kill();
    wait_for("the death is told", LATEST, || two.was_told("member-dead 1"));
    let told = Instant::now();
    let has_normal = || {
        let (least, most) = timeouts(&table(kernel2));
        (ESTABLISHED_S - 120..=ESTABLISHED_S).contains(&least) && most <= ESTABLISHED_S
    };
    wait_for(
        "the entries have normal timeouts",
        REPROTECT_AFTER + Duration::from_secs(5),
        has_normal,
    );
    let (least, most) = timeouts(&table(kernel2));
    println!("{} ms after its death was told: {least} to {most} s", told.elapsed().as_millis());
    assert_eq!(count(kernel2), COUNT as u64);
    check_dumps(&[&two]);
}

#[test]
fn heartbeats_are_on_time_while_many_copies_are_written() {
    if !may_make_namespaces("many commits") {
        return;
    }
    const COUNT: u32 = 60_000;
    let (gateways, one, two) = pair(&[]);
    let kernel2 = gateways.gateway(2);
    let plan = Plan { rate: 20_000, first: 0, open: COUNT, keep_one_of: 1, most: COUNT };
    let started = Instant::now();
    let made = Churn::start(gateways.gateway(1), plan).wait();
    wait_for("all are copied", LATEST, || {
        is_protected(&one, COUNT as u64) && count(kernel2) == COUNT as u64
    });
    println!(
        "{COUNT} connections at {} a second; all were in the backup's kernel after {} ms",
        (made.opened as f64 / made.took.as_secs_f64()) as u64,
        started.elapsed().as_millis()
    );
    for member in [&one, &two] {
        print_passes(member);
        assert_eq!(member.counter(Counter::MembersDied), 0);
        // A processor that is shared with others can make a pass late by itself.
        let (late, passes) = (member.counter(Counter::PassesLate), member.counter(Counter::Passes));
        assert!(
            late * 100 <= passes,
            "{late} of {passes} passes of member {} were late",
            member.id
        );
    }
    check_dumps(&[&one, &two]);
}
