//! Conntrack on the real kernel: every test in a network namespace of its own, of which
//! nothing outside notices anything.

mod kinds;
mod listening;
mod namespace;
mod nat;
mod real;
mod resuming;
mod settings;
mod traffic;
#[path = "../protocol/world.rs"]
#[allow(dead_code)] // Only a pair with a few connections is needed.
mod world;
mod writing;

use std::net::Ipv4Addr;

use hypersync::conn::{Connection, State, Tuple};
use hypersync::conntrack::codec::Origin;
use hypersync::conntrack::commit::{CommitResult, Committer, FlushFirst, Lifetime, Outcome};
use hypersync::conntrack::dump::{DumpProgress, DumpState};
use hypersync::conntrack::events::Source;
use hypersync::source::SourceEvent;
use namespace::{in_namespace, run};

const BUFFER: usize = 8 << 20;

fn connection(original: &str, reply: &str) -> Connection {
    let state = State {
        status: 0x19e,
        tcp_state: 3,
        tcp_scale: 0x7a,
        tcp_flags_original: 0x23,
        tcp_flags_reply: 0x23,
        timeout_s: 1,
        mark: 7,
    };
    let tuple = |text: &str| text.parse().expect("a tuple");
    Connection::new(tuple(original), tuple(reply), state)
}

/// One of many connections behind one address.
fn numbered(n: u16) -> Connection {
    let client = Ipv4Addr::from(0x0a00_0100 + n as u32 % 50);
    connection(
        &format!("tcp {client}:{} > 198.51.100.7:443", 1000 + n),
        &format!("tcp 198.51.100.7:443 > 203.0.113.1:{}", 20_000 + n),
    )
}

fn outcomes(committer: &mut Committer) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    committer.flush(&mut |CommitResult { index, outcome, .. }| {
        assert_eq!(index, outcomes.len());
        outcomes.push(outcome);
    });
    outcomes
}

fn write(committer: &mut Committer, connection: &Connection) -> Outcome {
    committer.write(connection, Lifetime::Kept).expect("an empty batch");
    outcomes(committer)[0]
}

fn delete(committer: &mut Committer, original: &Tuple) -> Outcome {
    committer.delete(original).expect("an empty batch");
    outcomes(committer)[0]
}

fn write_all(committer: &mut Committer, numbers: std::ops::Range<u16>) {
    for n in numbers {
        if committer.write(&numbered(n), Lifetime::Kept) == Err(FlushFirst) {
            assert!(outcomes(committer).iter().all(|o| *o == Outcome::Written));
            committer.write(&numbered(n), Lifetime::Kept).expect("an empty batch");
        }
    }
    assert!(outcomes(committer).iter().all(|o| *o == Outcome::Written));
}

fn delete_all(committer: &mut Committer, numbers: std::ops::Range<u16>) {
    for n in numbers {
        assert_eq!(delete(committer, &numbered(n).original), Outcome::Absent);
    }
}

/// What is waiting now, and who caused it: events come with the request that caused them, so
/// nothing is late.
fn heard(source: &mut Source) -> Vec<(SourceEvent, Origin)> {
    let mut heard = Vec::new();
    let drained = source.drain(100_000, &mut |event, origin| heard.push((event, origin)));
    assert_eq!((drained.events, drained.malformed, drained.more), (heard.len(), 0, false));
    heard
}

fn events(source: &mut Source) -> Vec<SourceEvent> {
    heard(source).into_iter().map(|(event, _)| event).collect()
}

fn dump(source: &mut Source) -> Vec<Connection> {
    assert_eq!(source.start_dump(), Ok(true));
    let mut found = Vec::new();
    loop {
        let DumpProgress { malformed, state, .. } =
            source.drain_dump(100, &mut |event| match event {
                SourceEvent::Seen { connection, .. } => found.push(connection),
                SourceEvent::Gone { .. } => panic!("a dump has no ends"),
            });
        assert_eq!(malformed, 0);
        match state {
            DumpState::Done => return found,
            DumpState::Running => {}
            DumpState::Failed(errno) => panic!("errno {errno}"),
        }
    }
}
