//! A shard that is offered more than it takes.

use std::time::{Duration, Instant};

use hypersync::counters::Counter;
use hypersync::shm::ingest::Producers;
use hypersync::source::SourceEvent;

use crate::common::copies::connection;
use crate::common::member::{Lab, Member, SOON};
use crate::common::wait_for;

/// Offers changes of a few connections until a ring was full so many times, each time again after this pause.
fn fill(producers: &mut Producers, times: u32, pause: Duration) {
    let (start, mut full) = (Instant::now(), 0);
    for n in 0_u32.. {
        let mut connection = connection(n % 16);
        connection.state.mark = n;
        while producers.push(&SourceEvent::seen(connection)).is_err() {
            full += 1;
            if full == times {
                return;
            }
            assert!(start.elapsed() < SOON * 3, "the shard reads its ring");
            std::thread::sleep(pause);
        }
    }
}

/// Passes, waits and waits with company so far.
fn passes(member: &Member) -> [u64; 3] {
    [Counter::Passes, Counter::Waits, Counter::WaitsGathered].map(|counter| member.counter(counter))
}

fn since(before: [u64; 3], member: &Member) -> [u64; 3] {
    let now = passes(member);
    [0, 1, 2].map(|i| now[i] - before[i])
}

fn start(lab: &Lab, ring: &str) -> Member {
    let member = lab.start(1, &[2], &["--shards", "1", "--ring", ring]);
    wait_for("it is ready", SOON, || member.was_told("self-ready 1"));
    member
}

#[test]
fn a_shard_does_not_wait_while_its_ring_holds_more_than_a_pass_takes() {
    let lab = Lab::new();
    let member = start(&lab, "16384");
    let mut producers = member.producers();
    fill(&mut producers, 1, Duration::ZERO);
    let before = passes(&member);
    fill(&mut producers, 500, Duration::from_micros(50));
    let [passes, waits, _] = since(before, &member);
    println!("16384 records: {passes} passes, {waits} waits");
    // Some, for a busy machine may keep the producer from its processor for longer than the ring lasts.
    assert!(waits * 10 <= passes, "{waits} waits in {passes} passes");
}

#[test]
fn a_shard_does_not_wait_for_company_while_a_small_ring_fills_again() {
    // Once a full ring of 64 records lay there for half a millisecond, and the shard slept: 107,000 events a
    // second of the 400,000 that it can take from such a ring.
    let lab = Lab::new();
    let member = start(&lab, "64");
    let mut producers = member.producers();
    fill(&mut producers, 1, Duration::ZERO);
    let before = passes(&member);
    let fills = 4000;
    fill(&mut producers, fills, Duration::from_micros(50));
    let [passes, waits, gathered] = since(before, &member);
    println!(
        "64 records, full {fills} times: {passes} passes, {waits} waits, {gathered} of them for company"
    );
    assert!(gathered * 10 <= u64::from(fills), "{gathered} waits for company in {waits}");
}
