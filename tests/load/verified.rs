//! Entries of copies that vanish or change without an event, and the walk that finds them.
//!
//! Entries that are made while the sysctl `nf_conntrack_events` is 0 raise no event, whatever
//! happens to them: so nothing but the walk can know.

use std::time::{Duration, Instant};

use hypersync::conn::Connection;
use hypersync::conntrack::commit::{KEPT_TIMEOUT_S, Lifetime};
use hypersync::counters::Counter;

use crate::common::member::{Member, wait_until_ready};
use crate::common::{may_make_namespaces, wait_for};
use crate::conntrack::{Hand, connection, connections, count, difference, table};
use crate::gateways::{Gateways, LATEST, check_dumps, is_protected, print_passes, stays};

/// Gateways 1 and 2, the second with a walk of this period, a deaf kernel, and copies of so many
/// connections.
fn pair(period: &str, copies: u32) -> (Gateways, Member, Member) {
    let gateways = Gateways::build(2);
    let (one, two) = (gateways.start(1, &[]), gateways.start(2, &["--verify", period]));
    wait_until_ready(&[&one, &two]);
    gateways.gateway(2).sysctl("net/netfilter/nf_conntrack_events", "0");
    Hand::on(gateways.gateway(1)).open(connections(0..copies));
    let is_there = || count(gateways.gateway(2)) == copies as u64;
    wait_for("all are copied", LATEST, || is_protected(&one, copies as u64) && is_there());
    (gateways, one, two)
}

/// Nothing of what was found was taken for traffic or for a close.
fn check_roles(one: &Member, two: &Member, copies: u32) {
    assert_eq!(two.counter(Counter::Claims), 0);
    assert_eq!(two.counter(Counter::ConnectionsBackup), copies as u64);
    assert_eq!(one.counter(Counter::ConnectionsActive), copies as u64);
    check_dumps(&[one, two]);
}

/// A whole walk begins and ends.
fn wait_for_a_walk(member: &Member) {
    // Each shard walks for itself, and the one under way may have passed by already.
    let walks = member.counter(Counter::VerifyWalks);
    wait_for("a walk", LATEST, || member.counter(Counter::VerifyWalks) >= walks + 6);
}

#[test]
fn an_entry_that_vanishes_in_silence_stays_away_until_a_walk_finds_it() {
    if !may_make_namespaces("entries that vanish") {
        return;
    }
    const COPIES: u32 = 4000;
    const GONE: u32 = 100;
    for (period, comes_back) in [("0s", false), ("1s", true)] {
        let (gateways, one, two) = pair(period, COPIES);
        let kernel2 = gateways.gateway(2);
        Hand::on(kernel2).close(connections(0..GONE));
        let deleted = Instant::now();
        if comes_back {
            wait_for("the walk writes them again", LATEST, || count(kernel2) == COPIES as u64);
            println!(
                "{GONE} of {COPIES} were there again {} ms later",
                deleted.elapsed().as_millis()
            );
            assert_eq!(two.counter(Counter::VerifyMissing), GONE as u64);
            assert_eq!(difference(&table(gateways.gateway(1)), &table(kernel2)), None);
            assert!(table(kernel2).values().all(|c| c.state.timeout_s > KEPT_TIMEOUT_S - 120));
            let log = two.log();
            assert!(log.contains("was gone: it is written again"), "{log}");
        } else {
            stays("nobody notices", Duration::from_secs(4), || {
                count(kernel2) == (COPIES - GONE) as u64
            });
            assert_eq!(two.counter(Counter::VerifyLooks), 0);
        }
        check_roles(&one, &two, COPIES);
    }
}

#[test]
fn an_entry_with_another_translation_mark_or_timeout_is_put_right() {
    if !may_make_namespaces("entries that change") {
        return;
    }
    const COPIES: u32 = 1000;
    let (gateways, one, two) = pair("1s", COPIES);
    let kernel2 = gateways.gateway(2);
    let mut hand = Hand::on(kernel2);
    let is_whole = || {
        difference(&table(gateways.gateway(1)), &table(kernel2)).is_none()
            && table(kernel2).values().all(|c| c.state.timeout_s > KEPT_TIMEOUT_S - 120)
    };
    assert!(is_whole());
    wait_for_a_walk(&two);
    let found = || {
        [Counter::VerifyMissing, Counter::VerifyDiffered, Counter::VerifyTouched]
            .map(|c| two.counter(c))
    };
    assert_eq!(found(), [0; 3], "nothing is found where nothing is wrong");

    let elsewhere = |n: u32| {
        let mut c = connection(n);
        c.reply.dst += 1;
        c
    };
    let marked = |n: u32| {
        let mut c = connection(n);
        c.state.mark = 99;
        c
    };
    // Entries with our timeout, so that it is certain that no packet has passed them.
    hand.write((0..50).map(elsewhere), Lifetime::Kept);
    wait_for("the translations are as they were", LATEST, is_whole);
    assert_eq!(found(), [0, 50, 0]);
    hand.write((50..100).map(marked), Lifetime::Kept);
    wait_for("the marks are as they were", LATEST, is_whole);
    assert_eq!(found(), [0, 100, 0]);
    // The timeout that a packet gives shows that one passed here: it is noticed, by each walk, and
    // stays.
    hand.open((100..150).map(connection));
    wait_for("they are noticed", LATEST, || found()[2] >= 100);
    let [missing, differed, _] = found();
    assert_eq!((missing, differed), (0, 100));
    assert!(difference(&table(gateways.gateway(1)), &table(kernel2)).is_none());
    let kept = table(kernel2).values().filter(|c| c.state.timeout_s > KEPT_TIMEOUT_S - 120).count();
    assert_eq!(kept, COPIES as usize - 50);

    check_roles(&one, &two, COPIES);
    println!("{}", two.log());
}

#[test]
fn another_connections_entry_is_left_alone_while_it_has_traffic() {
    if !may_make_namespaces("entries of others") {
        return;
    }
    const COPIES: u32 = 100;
    let (gateways, one, two) = pair("1s", COPIES);
    let kernel2 = gateways.gateway(2);
    let mut hand = Hand::on(kernel2);
    let stranger = |timeout| -> Connection {
        let mut c = connection(7);
        (c.reply.dst, c.state.timeout_s) = (c.reply.dst + 1, timeout);
        c
    };
    // Whoever opened it goes on: each packet puts the timeout back.
    let started = Instant::now();
    while two.counter(Counter::VerifyForeign) == 0 {
        assert!(started.elapsed() < LATEST, "it is noticed");
        hand.open([stranger(0)]);
        let there = table(kernel2)[&connection(7).original];
        assert_eq!(there.reply, stranger(0).reply, "it has traffic");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(two.log().contains("is another connection's, with traffic here: it is left alone"));
    // Then it falls silent.
    wait_for("the copy's entry is back", LATEST, || {
        difference(&table(gateways.gateway(1)), &table(kernel2)).is_none()
    });
    println!("the stranger was replaced {} ms after it had begun", started.elapsed().as_millis());
    check_roles(&one, &two, COPIES);
}

#[test]
fn a_walk_over_many_copies_keeps_to_its_budget() {
    if !may_make_namespaces("a walk over many copies") {
        return;
    }
    const COPIES: u32 = 60_000;
    /// Of both shards, a second.
    const LOOKS_MAX: u64 = 2 * 2000;
    // What the process takes without a walk, then at the highest pace.
    for period in ["0s", "1s"] {
        let (gateways, one, two) = pair(period, COPIES);
        let processor = || -> u64 {
            let stat =
                std::fs::read_to_string(format!("/proc/{}/stat", two.pid())).expect("it runs");
            let fields: Vec<&str> = stat[stat.rfind(')').expect("a name")..].split(' ').collect();
            // In ticks of 10 ms: user, system.
            fields[12..14].iter().map(|ticks| ticks.parse::<u64>().expect("a number") * 10).sum()
        };
        let (looks, used, since) = (two.counter(Counter::VerifyLooks), processor(), Instant::now());
        wait_for("a few seconds of it", LATEST, || {
            let is_walking = two.counter(Counter::VerifyLooks) > looks || period == "0s";
            since.elapsed() > Duration::from_secs(5) && is_walking
        });
        let (looks, took) =
            (two.counter(Counter::VerifyLooks) - looks, since.elapsed().as_secs_f64());
        println!(
            "--verify {period}, {COPIES} copies in two shards: {} look-ups and {} ms of processor time a second",
            (looks as f64 / took) as u64,
            ((processor() - used) as f64 / took) as u64,
        );
        // Two steps may have been due at the edges of the second.
        assert!(looks as f64 <= LOOKS_MAX as f64 * took + 128.0, "{looks} look-ups in {took} s");
        print_passes(&two);
        assert_eq!(count(gateways.gateway(2)), COPIES as u64);
        check_roles(&one, &two, COPIES);
    }
}
