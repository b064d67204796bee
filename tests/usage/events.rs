//! What the notify command is told, how a member leaves, and two members with one number.

use std::time::{Duration, Instant};

use hypersync::counters::Counter;
use hypersync::group::view::Status;

use crate::common::copies::{connections, copies, push_all, wait_for_agreement};
use crate::common::member::{Lab, Member, SOON, dies_with_us, hypersync, wait_until_ready, with};
use crate::common::wait_for;

/// How soon after a goodbye the notify command must have been told.
const AT_ONCE: Duration = Duration::from_secs(1);

fn was_told_at_once(members: &[&Member], event: &str) {
    wait_for(&format!("{event} is told at once"), AT_ONCE, || {
        members.iter().all(|member| member.was_told(event))
    });
}

#[test]
fn the_events_of_a_life_are_told_in_order() {
    let lab = Lab::new();
    let mut two = lab.start(2, &[1], &["--shards", "2"]);
    wait_for("member 2 is ready alone", SOON, || two.was_told("self-ready 2"));
    let mut one = lab.start(1, &[2], &["--shards", "1"]);
    wait_for("member 1 is ready", SOON, || two.was_told("member-ready 1"));
    let killed = Instant::now();
    one.kill();
    wait_for("member 1 is dead", SOON, || two.was_told("member-dead 1"));
    // Five heartbeats of 100 ms.
    assert!(killed.elapsed() > Duration::from_millis(350), "dead after {:?}", killed.elapsed());
    drop(one);

    let mut one = lab.start(1, &[2], &["--shards", "1"]);
    let ready =
        |events: Vec<String>| events.iter().filter(|event| *event == "member-ready 1").count();
    wait_for("member 1 is back", SOON, || ready(two.events()) == 2);
    wait_until_ready(&[&one, &two]);
    one.signal(libc::SIGTERM);
    assert!(one.end(SOON).success());
    was_told_at_once(&[&two], "member-left 1");
    two.signal(libc::SIGINT);
    assert!(two.end(SOON).success());
    let life = [
        "self-ready 2",
        "member-up 1",
        "member-ready 1",
        "member-dead 1",
        "member-up 1",
        "member-ready 1",
        "member-leaving 1",
        "member-left 1",
        "self-not-ready 2",
    ];
    assert_eq!(two.events(), life);
}

#[test]
fn a_member_that_is_told_to_end_moves_its_copies_away_and_says_goodbye() {
    let lab = Lab::new();
    let one = lab.start(1, &[2, 3], &["--shards", "2"]);
    let mut two = lab.start(2, &[1, 3], &["--shards", "1", "--priority", "200"]);
    let three = lab.start(3, &[1, 2], &["--shards", "1"]);
    wait_until_ready(&[&one, &two, &three]);
    let wanted = connections(0..1000);
    push_all(&mut one.producers(), wanted.values());
    wait_for_agreement("all have them", &[&one, &two, &three], &wanted, SOON);
    assert_eq!(
        two.counter(Counter::ConnectionsBackup),
        1000,
        "the highest priority has the copies"
    );

    two.signal(libc::SIGTERM);
    let status = two.end(SOON);
    assert!(status.success(), "{status}");
    assert_eq!(two.counter(Counter::ConnectionsBackup), 0, "its copies were moved away before");
    assert_eq!(copies(&three).unwrap().len(), 1000);
    assert_eq!(one.counter(Counter::Exposure), 0, "there always were two copies");
    was_told_at_once(&[&one, &three], "member-left 2");
    wait_for_agreement("everything is on the others", &[&one, &three], &wanted, SOON);
    for member in [&one, &three] {
        assert!(!member.was_told("member-dead 2"), "leaving is no death: {:?}", member.events());
        assert_eq!((member.sees(2), member.counter(Counter::MembersDied)), (Status::Left, 0));
    }
    assert_eq!(two.events().last().map(String::as_str), Some("self-not-ready 2"));
}

#[test]
fn drain_copies_what_is_young_and_says_what_it_left_without_a_copy() {
    let lab = Lab::new();
    let drain = |member: &str| {
        let mut command = hypersync();
        command.arg("drain").arg("--shm").arg(lab.path(member));
        let output = dies_with_us(&mut command).output().expect("the program is built");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).trim().to_owned())
    };
    let (status, said) = drain("m1");
    assert!(status == Some(1) && said.contains("there is nothing to drain"), "{said}");

    let mut one = lab.start(1, &[2], &["--shards", "2", "--hold", "1h"]);
    let mut two = lab.start(2, &[1], &["--shards", "1", "--hold", "1h"]);
    wait_until_ready(&[&one, &two]);
    let young = connections(0..200);
    push_all(&mut one.producers(), young.values());
    wait_for("it holds them", SOON, || one.counter(Counter::ConnectionsHeld) == 200);
    let (status, said) = drain("m1");
    assert!(status == Some(0) && said.ends_with("nothing was exposed"), "{said}: {}", one.log());
    assert!(one.end(SOON).success() && one.log().contains("drained in"), "{}", one.log());
    assert!(two.was_told("member-leaving 1"), "{:?}", two.events());
    wait_for_agreement("the other one has everything", &[&two], &young, SOON);

    let (status, said) = drain("m2");
    assert!(status == Some(1) && said.contains("200 connections had no copy"), "{said}");
    assert!(two.end(SOON).success() && two.log().contains("nobody is there"), "{}", two.log());
}

#[test]
fn ctrl_c_says_goodbye_too_and_the_backup_goes_on() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2], &["--shards", "1"]);
    let two = lab.start(2, &[1], &["--shards", "2"]);
    wait_until_ready(&[&one, &two]);
    let wanted = connections(0..500);
    push_all(&mut one.producers(), wanted.values());
    wait_for_agreement("both have them", &[&one, &two], &wanted, SOON);
    one.signal(libc::SIGINT);
    assert!(one.end(SOON).success());
    was_told_at_once(&[&two], "member-left 1");
    assert!(!two.was_told("member-dead 1"));
    wait_for_agreement("the backup has everything", &[&two], &wanted, SOON);
}

#[test]
fn two_members_with_one_number_both_say_so_and_keep_what_they_have() {
    let lab = Lab::new();
    // A second member 1 will come from address 9, with a table of its own.
    let mut one = lab.start(1, &[2, 9], &["--shards", "1"]);
    let mut two = lab.start(2, &[1, 9], &["--shards", "1"]);
    wait_until_ready(&[&one, &two]);
    let wanted = connections(0..300);
    push_all(&mut one.producers(), wanted.values());
    wait_for_agreement("both have them", &[&one, &two], &wanted, SOON);
    let before = (copies(&one).unwrap(), copies(&two).unwrap());

    let words = with(lab.words(9, &[1, 2]), &["--member", "1", "--shards", "1"]);
    let mut rival = Member::start(&lab, "rival", 1, hypersync(), &words);
    let others = connections(1000..1100);
    push_all(&mut rival.producers(), others.values());

    let says = |member: &Member, words: [&str; 2]| {
        let log = member.log();
        log.lines()
            .any(|line| line.contains("ERROR") && words.iter().all(|word| line.contains(word)))
    };
    let (first, second) = (lab.address(1).to_string(), lab.address(9).to_string());
    wait_for("everybody says so", SOON, || {
        says(&one, [&second, "also is member 1"])
            && says(&rival, [&first, "also is member 1"])
            && says(&two, [&second, "two hosts are member 1"])
    });
    // The first is taken for the member by the others, and they say so. The second is not ready,
    // and says why.
    let reason =
        format!("another host, {first}, also is member 1, and nobody says that it takes this one");
    wait_for("the second says that it is not ready", SOON, || {
        let (status, line) = rival.check();
        status == Some(2) && line.starts_with("not-ready") && line.contains(&reason)
    });
    assert!(!rival.was_told("self-ready 1"), "{:?}", rival.events());
    wait_for("the rival's connections are past the hold", SOON, || {
        rival.counter(Counter::ConnectionsActive) == 100
    });
    for member in [&one, &two] {
        assert!(member.counter(Counter::DuplicateMember) > 0);
    }
    assert_eq!(
        two.view().group().read(1).unwrap().address,
        Some(lab.address(1)),
        "the first is kept"
    );
    assert_eq!((copies(&one).unwrap(), copies(&two).unwrap()), before, "nothing changed");
    assert_eq!(copies(&rival).unwrap().len(), 100, "the second keeps what it has");
    let lines = two.log().lines().filter(|line| line.contains("two hosts")).count();
    assert!(lines <= 3, "{lines} lines, not one a heartbeat");
    assert!(one.is_running() && two.is_running() && rival.is_running());
    assert_eq!(one.check().0, Some(0), "{}", one.check().1);
    assert!(!one.was_told("self-not-ready 1"), "{:?}", one.events());
    assert!(!rival.was_told("self-ready 1"), "{:?}", rival.events());

    // With one of them gone, the other is taken up.
    one.kill();
    wait_for("the second is accepted", SOON, || {
        two.view()
            .group()
            .read(1)
            .is_some_and(|m| m.address == Some(lab.address(9)) && m.status == Status::Ready)
    });
}

#[test]
fn two_hosts_with_one_number_are_both_not_ready_until_one_is_gone() {
    let lab = Lab::new();
    let start = |name: &str, last: u8, other: u8| {
        let words = with(lab.words(last, &[other]), &["--member", "1", "--shards", "1"]);
        Member::start(&lab, name, 1, hypersync(), &words)
    };
    let one = start("one", 1, 9);
    wait_for("the first is ready", SOON, || {
        one.was_told("self-ready 1") && one.check().0 == Some(0)
    });
    let mut rival = start("rival", 9, 1);
    for (member, other) in [(&one, 9), (&rival, 1)] {
        let reason = format!("another host, {}, also is member 1", lab.address(other));
        wait_for("each says that it is not ready, and why", SOON, || {
            let (status, line) = member.check();
            status == Some(2) && line.starts_with("not-ready") && line.contains(&reason)
        });
    }
    wait_for("who was ready is told", SOON, || one.was_told("self-not-ready 1"));
    assert!(!rival.was_told("self-ready 1"), "{:?}", rival.events());
    rival.kill();
    wait_for("the first is ready again by itself", SOON, || one.check().0 == Some(0));
    wait_for("and that is told", SOON, || {
        one.events() == ["self-ready 1", "self-not-ready 1", "self-ready 1"].map(str::to_owned)
    });
}
