//! An inspector is a guest that nobody notices; and what `check` says of a real process.

use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hypersync::load::rng::Rng;
use hypersync::source::SourceEvent;
use serde_json::Value;

use crate::common::copies::{Wanted, connection, push, push_all, wait_for_agreement};
use crate::common::member::{Lab, Member, SOON, dies_with_us, wait_until_ready};
use crate::common::wait_for;

const CONNECTIONS: u32 = 1000;

/// The round's value of a connection: mark and timeout say the same, so that a torn record shows;
/// they grow, because a timeout that only runs down does not travel.
fn in_round(n: u32, round: u32) -> hypersync::conn::Connection {
    let mut c = connection(n);
    c.state.mark = round << 12 | n;
    c.state.timeout_s = c.state.mark;
    c
}

#[test]
fn a_hundred_inspectors_under_load_change_nothing_and_never_show_a_torn_record() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2], &["--shards", "2"]);
    let mut two = lab.start(2, &[1], &["--shards", "1"]);
    wait_until_ready(&[&one, &two]);
    let first: Wanted = (0..CONNECTIONS).map(|n| in_round(n, 0)).map(|c| (c.original, c)).collect();
    let mut producers = one.producers();
    push_all(&mut producers, first.values());
    wait_for_agreement("both have them", &[&one, &two], &first, SOON);

    let (stop, mut rng) = (AtomicBool::new(false), Rng::new(100));
    let last_round = std::thread::scope(|scope| {
        let (stop, producers) = (&stop, &mut producers);
        let load = scope.spawn(move || {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                for n in 0..CONNECTIONS {
                    push(producers, &SourceEvent::seen(in_round(n, round)));
                }
                producers.flush();
                // 100,000 changes a second at most: the rest of the processor is the inspectors'.
                std::thread::sleep(Duration::from_millis(10));
            }
            round
        });
        // Set even if an assertion below fails, or the scope would wait for the load for ever.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let guard = Stop(stop);
        let mut rounds = HashSet::new();
        for i in 0..100 {
            let member = if i % 2 == 0 { &one } else { &two };
            let mut command = Command::new(env!("CARGO_BIN_EXE_hypersync-inspect"));
            command.arg("--shm").arg(&member.shm).args(["connections", "--json"]);
            dies_with_us(&mut command).stdout(Stdio::piped()).stderr(Stdio::piped());
            if i % 4 < 2 {
                let mut child =
                    command.stdout(Stdio::null()).spawn().expect("the inspector is built");
                std::thread::sleep(Duration::from_micros(rng.below(8000).into()));
                child.kill().expect("it is ours");
                child.wait().expect("it was killed");
                continue;
            }
            let output = command.output().expect("the inspector is built");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let mut seen = 0;
            for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                let record: Value = serde_json::from_slice(line).expect("each line is a record");
                let number = |name: &str| {
                    record["state"][name].as_u64().unwrap_or_else(|| panic!("{record}")) as u32
                };
                let (mark, timeout) = (number("mark"), number("timeout_s"));
                assert_eq!(timeout, mark, "torn: {record}");
                let expected = in_round(mark & 0xfff, mark >> 12);
                assert_eq!(
                    record["original"]["text"].as_str(),
                    Some(expected.original.to_string().as_str()),
                    "torn: {record}"
                );
                assert_eq!(
                    record["reply"]["text"].as_str(),
                    Some(expected.reply.to_string().as_str()),
                    "torn: {record}"
                );
                rounds.insert(mark >> 12);
                seen += 1;
            }
            assert!(
                seen <= CONNECTIONS && seen > CONNECTIONS / 2,
                "{seen} of {CONNECTIONS} were shown"
            );
        }
        assert!(rounds.len() > 10, "the load went on meanwhile: {rounds:?}");
        drop(guard);
        load.join().expect("the load does not fail")
    });
    let last: Wanted =
        (0..CONNECTIONS).map(|n| in_round(n, last_round)).map(|c| (c.original, c)).collect();
    wait_for_agreement("the newest is on both", &[&one, &two], &last, SOON);
    assert!(one.is_running() && two.is_running());
    assert!(
        one.events().iter().chain(&two.events()).all(|event| !event.contains("dead")),
        "nobody was late"
    );
}

/// What `hypersync-inspect check` answers: its exit status, and the word that it begins with.
fn check(member: &Member) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypersync-inspect"));
    command.arg("--shm").arg(&member.shm).arg("check");
    let output = command.output().expect("the inspector is built");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said.lines().count(), 1, "{said}");
    (output.status.code(), said.split(':').next().unwrap_or_default().to_owned())
}

#[test]
fn the_check_follows_a_member_from_its_start_to_its_end() {
    let lab = Lab::new();
    let is = |status, word: &str| (Some(status), word.to_owned());
    // It listens for 2 s before it says that it is ready.
    let started = Instant::now();
    let mut one = lab.start(1, &[2], &["--heartbeat", "200ms", "--dead-after", "10"]);
    let first = check(&one);
    if started.elapsed() < Duration::from_secs(1) {
        assert_eq!(first, is(2, "not-ready"));
    }
    wait_for("member 1 is ready", SOON, || check(&one) == is(0, "ready"));
    assert!(started.elapsed() >= Duration::from_secs(2), "it was not ready before it could be");

    // Stopped, it cannot care for its connections, and says nothing of itself.
    one.signal(libc::SIGSTOP);
    wait_for("a member that hangs is noticed", SOON, || check(&one) == is(2, "stale"));
    one.signal(libc::SIGCONT);
    wait_for("member 1 is ready again", SOON, || check(&one) == is(0, "ready"));

    one.kill();
    assert_eq!(check(&one), is(1, "not-running"));
}
