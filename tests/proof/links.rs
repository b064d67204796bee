//! Faults of the sync link: loss, cuts, a way that is shut in one direction, small datagrams only.

use std::time::{Duration, Instant};

use hypersync::conn::Kind;
use hypersync::counters::Counter;
use hypersync::group::view::Status;

use crate::churn::{Churn, slots_of};
use crate::common::member::{Member, SOON, wait_until_ready};
use crate::common::{may_make_namespaces, wait_for};
use crate::field::{AGREE_WITHIN, Fault, Field, inspect, memory_kb};

const SECOND: Duration = Duration::from_secs(1);

fn sum(members: &[&Member], counters: &[Counter]) -> u64 {
    members.iter().flat_map(|m| counters.iter().map(|counter| m.counter(*counter))).sum()
}

/// Deltas that were sent for the first time.
fn deltas(members: &[&Member]) -> u64 {
    sum(
        members,
        &[Counter::DeltasNew, Counter::DeltasUpdate, Counter::DeltasClose, Counter::DeltasRelease],
    )
}

#[test]
fn five_percent_loss_both_ways_under_churn_loses_nothing() {
    if !may_make_namespaces("5 % loss on the sync link") {
        return;
    }
    let field = Field::build(2);
    let (one, two) = (field.start(1, &[]), field.start(2, &[]));
    let members = [&one, &two];
    wait_until_ready(&members);
    let mut churn = Churn::begin(&members);
    let faults = [1, 2].map(|host| field.fault(host, "numgen random mod 100 < 5"));
    let before = sum(&members, &[Counter::DatagramsSent]);
    churn.go_on(SECOND * 10);
    let dropped: Vec<u64> = faults.iter().map(Fault::hits).collect();
    assert!(dropped.iter().all(|n| *n > 20), "dropped {dropped:?}: this tests nothing");
    // Still losing: what is exposed in the end gets through all the same.
    churn.finish(&members);
    churn.settle("5 % loss, still there", &members, AGREE_WITHIN);
    drop(faults);
    let sent = sum(&members, &[Counter::DatagramsSent]) - before;
    let resent = sum(&members, &[Counter::DatagramsResent]);
    println!("5 % loss: {dropped:?} dropped, {sent} datagrams sent, {resent} repaired");
    assert!(resent > 0, "what was dropped was sent again");
}

/// Memory and slots of both ends, as a cut goes on.
struct Sample {
    at: Duration,
    rss_kb: Vec<(u64, u64)>,
    used: Vec<u64>,
    closing: Vec<u64>,
}

fn sample(since: Instant, members: &[&Member]) -> Sample {
    let used = |member: &&Member| {
        [Kind::Held, Kind::Active, Kind::Backup, Kind::Closing]
            .map(|kind| slots_of(member, kind))
            .iter()
            .sum()
    };
    Sample {
        at: since.elapsed(),
        rss_kb: members.iter().map(|member| memory_kb(member.pid())).collect(),
        used: members.iter().map(used).collect(),
        closing: members.iter().map(|member| slots_of(member, Kind::Closing)).collect(),
    }
}

#[test]
fn thirty_seconds_without_the_sync_link_cost_no_memory_and_heal() {
    if !may_make_namespaces("30 s without the sync link") {
        return;
    }
    let field = Field::build(2);
    let (one, two) = (field.start(1, &[]), field.start(2, &[]));
    let members = [&one, &two];
    wait_until_ready(&members);
    let mut churn = Churn::begin(&members);
    churn.go_on(SECOND * 2);
    let lost_before = sum(&members, &[Counter::StreamsLost]);
    let states = churn.states();
    let mut samples = vec![sample(Instant::now(), &members)];

    let (faults, cut) = ([1, 2].map(|host| field.fault(host, "")), Instant::now());
    churn.go_on_until(
        "both find the other dead, and every shard lets go of what was agreed",
        SOON,
        || {
            one.sees(2) == Status::Dead
                && two.sees(1) == Status::Dead
                && sum(&members, &[Counter::StreamsLost]) >= lost_before + 3
        },
    );
    println!("30 s cut: streams declared lost after {} ms", cut.elapsed().as_millis());
    while cut.elapsed() < SECOND * 30 {
        churn.go_on(SECOND * 5);
        samples.push(sample(cut, &members));
    }
    let dropped: Vec<u64> = faults.iter().map(Fault::hits).collect();
    assert!(dropped.iter().all(|n| *n > 200), "dropped {dropped:?}: this tests nothing");
    churn.finish(&members);
    let now = churn.states();
    let opened = now.keys().filter(|tuple| !states.contains_key(tuple)).count();
    let closed = states.keys().filter(|tuple| !now.contains_key(tuple)).count();
    let changed = now
        .iter()
        .filter(|(tuple, mark)| states.get(tuple).is_some_and(|old| old != *mark))
        .count();
    let sent = Sent::by(&members);
    drop(faults);
    churn.settle("30 s cut, healed", &members, AGREE_WITHIN);
    println!(
        "30 s cut: caught up with {}; meanwhile {opened} had opened, {closed} closed, {changed} of {} changed",
        sent.until_now(&members),
        now.len() - opened
    );
    samples.push(sample(cut, &members));
    for s in &samples {
        let at = s.at.as_secs();
        println!(
            "30 s cut: at {at} s RSS (all, private) KB {:?}, slots used {:?}, closing {:?}",
            s.rss_kb, s.used, s.closing
        );
    }
    is_flat(&samples);

    // Once more, long enough for the streams to be lost, and nothing changes meanwhile.
    let lost = sum(&members, &[Counter::StreamsLost]);
    let faults = [1, 2].map(|host| field.fault(host, ""));
    wait_for("every shard has let go of what was agreed", SOON, || {
        sum(&members, &[Counter::StreamsLost]) >= lost + 3
    });
    let sent = Sent::by(&members);
    drop(faults);
    wait_for("both are backups again", SOON, || {
        one.sees(2) == Status::Ready && two.sees(1) == Status::Ready
    });
    churn.settle("short cut without traffic, healed", &members, AGREE_WITHIN);
    println!("short cut: caught up with {}; nothing had changed", sent.until_now(&members));
}

/// What members had sent at some time.
struct Sent([u64; 3]);

impl Sent {
    fn by(members: &[&Member]) -> Sent {
        let datagrams = [Counter::DatagramsSent, Counter::DatagramsResent];
        Sent([deltas(members), sum(members, &datagrams), sum(members, &[Counter::BytesSent])])
    }

    fn until_now(&self, members: &[&Member]) -> String {
        let [deltas, datagrams, bytes] =
            std::array::from_fn(|i| Sent::by(members).0[i] - self.0[i]);
        format!("{deltas} deltas in {datagrams} datagrams of {} KB", bytes / 1024)
    }
}

/// Memory that was touched before the cut is all that is ever needed, but for pages of the shared
/// memory (reserved at the start) that were not touched before: slots are used oldest first, and
/// datagrams go round the whole arena.
fn is_flat(samples: &[Sample]) {
    let (first, during) = (&samples[0], &samples[1..samples.len() - 1]);
    for member in 0..first.used.len() {
        for s in &samples[1..] {
            let grown = s.rss_kb[member].0.saturating_sub(first.rss_kb[member].0);
            assert!(grown <= 1024, "member {}: {grown} KB more at {:?}", member + 1, s.at);
            let grown = s.rss_kb[member].1.saturating_sub(first.rss_kb[member].1);
            assert!(
                grown <= 256,
                "member {}: {grown} KB of its own more at {:?}",
                member + 1,
                s.at
            );
        }
        for s in during {
            assert_eq!(
                s.closing[member], 0,
                "closes are forgotten at once, there is nobody to tell: {:?}",
                s.at
            );
            // What was copied before stays, what is open here comes and goes.
            assert!(s.used[member] < first.used[member] * 11 / 10, "slots pile up: {:?}", s.used);
        }
    }
}

#[test]
fn one_of_three_without_the_sync_link_heals_under_churn() {
    if !may_make_namespaces("one of three without the sync link") {
        return;
    }
    let field = Field::build(3);
    let (one, two, three) = (field.start(1, &[]), field.start(2, &[]), field.start(3, &[]));
    let members = [&one, &two, &three];
    wait_until_ready(&members);
    let mut churn = Churn::begin(&members);
    churn.go_on(SECOND);
    let from_two = "ip saddr 10.9.0.2";
    let faults = [field.fault(1, from_two), field.fault(2, ""), field.fault(3, from_two)];
    let cut = Instant::now();
    churn.go_on_until("the one and the others find each other dead", SOON, || {
        [&one, &three].iter().all(|m| m.sees(2) == Status::Dead && two.sees(m.id) == Status::Dead)
    });
    let alone =
        churn.go_on_until("the one has nobody left: all that it has is exposed", SOON, || {
            let active = two.counter(Counter::ConnectionsActive);
            // Its own, and what it presumes.
            let all =
                two.counter(Counter::ConnectionsActive) + two.counter(Counter::ConnectionsBackup);
            active > 0
                && two.counter(Counter::Exposure) * 10 > all * 9
                && two.counter(Counter::StreamsLost) > 0
        });
    println!("one of three cut: all that it has is exposed {} ms after it knew", alone.as_millis());
    churn.go_on_until("the others protect each other meanwhile", SOON, || {
        cut.elapsed() > SECOND * 6 && sum(&[&one, &three], &[Counter::Unprotected]) < 50
    });
    let dropped: Vec<u64> = faults.iter().map(Fault::hits).collect();
    assert!(dropped.iter().all(|n| *n > 40), "dropped {dropped:?}: this tests nothing");
    let lost: Vec<u64> =
        members.iter().map(|member| member.counter(Counter::StreamsLost)).collect();
    assert!(lost.iter().all(|n| *n > 0), "streams lost: {lost:?}");
    drop(faults);
    let healed = Instant::now();
    churn.go_on_until("everybody is everybody's backup again", SOON, || {
        members
            .iter()
            .all(|m| members.iter().all(|o| o.id == m.id || m.sees(o.id) == Status::Ready))
    });
    println!(
        "one of three cut: streams lost {lost:?}; ready {} ms after the heal",
        healed.elapsed().as_millis()
    );
    churn.go_on(SECOND * 2);
    churn.finish(&members);
    churn.settle("one of three cut, healed", &members, AGREE_WITHIN);
}

#[test]
fn who_is_heard_and_does_not_hear_is_no_backup() {
    if !may_make_namespaces("a member that is heard and does not hear") {
        return;
    }
    let field = Field::build(3);
    let (one, two, three) = (field.start(1, &[]), field.start(2, &[]), field.start(3, &[]));
    let members = [&one, &two, &three];
    wait_until_ready(&members);
    let mut churn = Churn::begin(&members);
    churn.go_on(SECOND);
    let fault = field.fault(2, "");
    churn.go_on_until("it is no backup for the others, and alive", SOON, || {
        [&one, &three]
            .iter()
            .all(|m| m.sees(2) == Status::Joining && two.sees(m.id) == Status::Dead)
    });
    let said = format!("member 2 at {} does not hear this member", Field::address(2));
    let told = churn.go_on_until("the others say why", SOON, || {
        one.log().contains(&said) && three.log().contains(&said)
    });
    let moved = churn.go_on_until(
        "the others' connections have other backups, its own have none",
        SOON,
        || {
            let active = two.counter(Counter::ConnectionsActive);
            sum(&[&one, &three], &[Counter::Unprotected]) < 50
                && two.counter(Counter::Unprotected) * 10 > active * 9
        },
    );
    assert!(fault.hits() > 20, "{} dropped: this tests nothing", fault.hits());
    assert!(two.was_told("member-dead 1") && two.was_told("member-dead 3"), "{:?}", two.events());
    assert!(!one.was_told("member-dead 2") && !three.was_told("member-dead 2"), "it is heard");
    println!("deaf: told after {} ms, moved {} ms later", told.as_millis(), moved.as_millis());
    drop(fault);
    churn.go_on_until("all are ready again", SOON, || {
        members
            .iter()
            .all(|m| members.iter().all(|o| o.id == m.id || m.sees(o.id) == Status::Ready))
    });
    churn.go_on(SECOND);
    churn.finish(&members);
    churn.settle("deaf, healed", &members, AGREE_WITHIN);
    assert_eq!(one.log().matches(&said).count(), 1, "told once");
}

#[test]
fn a_path_that_passes_small_datagrams_only_is_noticed_and_told() {
    if !may_make_namespaces("an MTU trap on the sync link") {
        return;
    }
    let field = Field::build(2);
    field.set_port_mtu(2, 1300);
    assert!(
        field.passes(1, 2, 1300) && !field.passes(1, 2, 1476),
        "a trap: small ones pass, large ones do not"
    );
    let (one, two) = (field.start(1, &[]), field.start(2, &[]));
    let members = [&one, &two];
    let said =
        |n: u8| format!("member {n} at {}: only its small heartbeats arrive", Field::address(n));
    wait_for("both are alive and ready", SOON, || {
        members.iter().all(|m| m.was_told(&format!("self-ready {}", m.id)))
            && one.sees(2) == Status::Joining
            && two.sees(1) == Status::Joining
    });
    let mut churn = Churn::begin(&members);
    let told = churn.go_on_until("both say that it is the MTU", SOON, || {
        one.log().contains(&said(2)) && two.log().contains(&said(1))
    });
    assert!(inspect(&one, "state").contains("joining"), "{}", inspect(&one, "state"));
    assert!(
        !one.was_told("member-ready 2") && !two.was_told("member-ready 1"),
        "neither is a backup"
    );
    assert_eq!(sum(&members, &[Counter::ConnectionsBackup]), 0, "nothing is copied into a trap");
    println!("MTU trap at the start: told {} ms after the churn began", told.as_millis());
    field.set_port_mtu(2, 1500);
    churn.go_on_until("both are backups", SOON, || {
        one.sees(2) == Status::Ready && two.sees(1) == Status::Ready
    });
    churn.go_on(SECOND);
    // And under traffic, one way only: what 1 sends to 2 is what 2 cannot say of its own
    // heartbeats.
    let fault = field.fault(2, "meta length > 1300");
    churn.go_on_until("both know", SOON, || {
        two.sees(1) == Status::Joining && one.sees(2) == Status::Joining
    });
    churn.go_on_until("who does not get the large ones says so", SOON, || {
        two.log().matches(&said(1)).count() == 2
    });
    let exposed = churn.go_on_until("nothing of 1's new ones is thought safe", SOON, || {
        one.counter(Counter::Unprotected) * 10 > one.counter(Counter::ConnectionsActive) * 9
    });
    assert!(fault.hits() > 5, "{} dropped: this tests nothing", fault.hits());
    println!("MTU trap one way: exposed {} ms after it was told", exposed.as_millis());
    drop(fault);
    churn.go_on_until("both are backups", SOON, || {
        one.sees(2) == Status::Ready && two.sees(1) == Status::Ready
    });
    churn.go_on(SECOND);
    churn.finish(&members);
    churn.settle("MTU trap, healed", &members, AGREE_WITHIN);
}
