//! A member that joins says that it is ready once it has everything, and how far it is until then.

use std::process::Command;
use std::time::Duration;

use hypersync::conn::Kind;
use hypersync::counters::Counter;
use hypersync::shm::group::Standing;
use serde_json::Value;

use crate::common::copies::{Wanted, connections, copies, push_all, wait_for_agreement};
use crate::common::member::{Lab, Member, SOON, wait_until_ready};
use crate::common::wait_for;

const CONNECTIONS: u64 = 30_000;

/// So many connections; one number in between makes none that a source accepts (a translated port
/// of 0).
fn wanted() -> Wanted {
    let wanted: Wanted =
        connections(0..20_000).into_iter().chain(connections(21_000..31_000)).collect();
    assert_eq!(wanted.len() as u64, CONNECTIONS);
    wanted
}

/// Exit status and answer of `hypersync-inspect`.
fn inspect(member: &Member, words: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypersync-inspect"));
    let output =
        command.arg("--shm").arg(&member.shm).args(words).output().expect("the inspector is built");
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The full sync of `member` to `other`, as it can be read.
fn full_sync(member: &Member, other: u8) -> Option<Value> {
    let (status, answer) = inspect(member, &["sync", "--json"]);
    assert_eq!(status, Some(0), "{answer}");
    let answer: Value = serde_json::from_str(&answer).expect("it is JSON");
    let rows = answer["full_syncs"].as_array().expect("a list").clone();
    rows.into_iter().find(|row| row["member"] == other)
}

#[test]
fn a_joining_member_is_ready_once_it_has_everything_and_its_progress_can_be_read() {
    let lab = Lab::new();
    let one = lab.start(1, &[2], &["--shards", "2", "--capacity", "50000"]);
    wait_for("member 1 is ready alone", SOON, || inspect(&one, &["check"]).0 == Some(0));
    assert_eq!(full_sync(&one, 2), None);
    let (wanted, all) = (wanted(), CONNECTIONS);
    push_all(&mut one.producers(), wanted.values());
    wait_for("member 1 has them, without a copy", SOON, || {
        one.counter(Counter::Unprotected) == all
    });

    let two = lab.start(2, &[1], &["--shards", "3", "--capacity", "40000"]);
    let (status, said) = inspect(&two, &["check"]);
    assert_eq!(status, Some(2), "{said}");
    // At no moment does it call itself ready with less.
    let line = two.view().group().shard(0);
    let (mut seen_syncing, mut seen_partial) = (false, false);
    let started = std::time::Instant::now();
    loop {
        let standing = line.standing();
        let has = two.counter(Counter::ConnectionsBackup);
        seen_syncing |= standing == Standing::Syncing;
        seen_partial |= standing == Standing::Syncing && has > 0 && has < all;
        match standing {
            Standing::Ready => {
                assert_eq!(two.counter(Counter::ConnectionsBackup), all, "ready with all of them");
                break;
            }
            _ => assert!(started.elapsed() < SOON, "{standing:?} with {has} copies"),
        }
    }
    assert!(seen_syncing && seen_partial, "it was seen on the way: {seen_syncing} {seen_partial}");
    assert_eq!(one.counter(Counter::Exposure), 0);
    assert_eq!(inspect(&two, &["check"]).0, Some(0));
    wait_until_ready(&[&one, &two]);
    wait_for_agreement("both have them", &[&one, &two], &wanted, SOON);
    let row = full_sync(&one, 2).expect("there was a full sync");
    assert_eq!((row["state"].as_str(), row["done"].as_u64()), (Some("done"), Some(all)), "{row}");
    assert_eq!((row["to_do"].as_u64(), &row["left_ns"]), (Some(0), &Value::Null), "{row}");
    let (rate, took) = (row["connections_per_second"].as_f64(), row["took_ns"].as_u64());
    println!(
        "{all} connections in {:?}: {rate:.0?} a second",
        Duration::from_nanos(took.unwrap_or(0))
    );
    assert!(rate.is_some_and(|rate| rate > 1000.0), "{row}");
}

#[test]
fn a_peer_that_hangs_in_the_middle_of_a_full_sync_gets_the_rest_when_it_goes_on() {
    let lab = Lab::new();
    // Nothing is let go of in the time for which the peer hangs.
    let patient = ["--shards", "2", "--capacity", "50000", "--reprotect-after", "60s"];
    let one = lab.start(1, &[2], &patient);
    wait_for("member 1 is ready alone", SOON, || inspect(&one, &["check"]).0 == Some(0));
    let (wanted, all) = (wanted(), CONNECTIONS);
    push_all(&mut one.producers(), wanted.values());
    wait_for("member 1 has them, without a copy", SOON, || {
        one.counter(Counter::Unprotected) == all
    });

    let two = lab.start(2, &[1], &patient);
    let started = std::time::Instant::now();
    // No pause between two looks: the whole takes a few hundredths of a second.
    while two.counter(Counter::ConnectionsBackup) < all / 10 {
        assert!(started.elapsed() < SOON, "nothing arrives");
    }
    two.signal(libc::SIGSTOP);
    let arrived = two.counter(Counter::ConnectionsBackup);
    assert!(arrived < all, "it was stopped too late to prove anything");
    wait_for("the sync is interrupted", SOON, || {
        full_sync(&one, 2).is_some_and(|row| row["state"] == "interrupted" && row["to_do"] != 0)
    });
    assert_ne!(inspect(&two, &["check"]).0, Some(0), "a member that hangs is not ready");
    two.signal(libc::SIGCONT);
    wait_for("the rest is there", SOON, || two.counter(Counter::ConnectionsBackup) == all);
    wait_until_ready(&[&one, &two]);
    wait_for_agreement("both have them", &[&one, &two], &wanted, SOON);
    assert!(copies(&two).unwrap().values().all(|copy| copy.kind == Kind::Backup));
    // What was on its way at the stop goes again, in either shard what may stand there, and a
    // little for the time in which nobody knew.
    let sent = one.counter(Counter::DeltasNew);
    println!("{sent} were sent for {all}, of which {arrived} had arrived at the stop");
    assert!(sent <= all + 2 * 2048 + 2000, "{sent} were sent for {all}");
}
