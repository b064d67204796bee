//! A shard that is offered more than it takes.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use hypersync::ccp::UDP_PORT;
use hypersync::ccp::header::SHARD_OFFSET;
use hypersync::counters::{Counter, Counters};
use hypersync::shm::ingest::Producers;
use hypersync::source::SourceEvent;

use crate::common::copies::connection;
use crate::common::member::{Lab, Member, SOON};
use crate::common::wait_for;

/// Offers changes of a few connections until a ring was full so many times, each time again after
/// this pause.
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
    // Some, for a busy machine may keep the producer from its processor for longer than the ring
    // lasts.
    assert!(waits * 10 <= passes, "{waits} waits in {passes} passes");
}

#[test]
fn a_shard_does_not_wait_for_company_while_a_small_ring_fills_again() {
    // Once a full ring of 64 records lay there for half a millisecond, and the shard slept: 107,000
    // events a second of the 400,000 that it can take from such a ring.
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

#[test]
fn a_datagram_at_the_wrong_shard_is_handed_over_or_counted_as_lost() {
    // Trains of which the first datagram is for shard 0, and with it the whole arrives there; the
    // others are for shard 1.
    const IN_TRAIN: usize = 44;
    const BYTES: usize = 64;
    let lab = Lab::new();
    let member = lab.start(1, &[2], &["--shards", "2"]);
    wait_for("it is ready", SOON, || member.was_told("self-ready 1"));
    let socket = UdpSocket::bind((lab.address(9), 0)).expect("an address of ours");
    let (size, len) = (BYTES as i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the option's value is an i32, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const size).cast(),
            len,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    let mut train = [0; IN_TRAIN * BYTES];
    train.chunks_mut(BYTES).skip(1).for_each(|datagram| datagram[SHARD_OFFSET] = 1);
    // What arrives is no datagram of a group.
    let arrived = || Counters::new(member.view().shard(1).counters).get(Counter::RejectMagic);
    // More at once than the other shard's queue holds.
    let mut sent = 0;
    wait_for("the other shard was behind", SOON, || {
        for _ in 0..6 {
            socket.send_to(&train, (lab.address(1), UDP_PORT)).expect("loopback takes it");
            sent += IN_TRAIN as u64 - 1;
        }
        wait_for("all were read", SOON, || member.counter(Counter::Strays) == sent);
        member.counter(Counter::StraysLost) > 0
    });
    wait_for("each arrived or is counted", SOON, || {
        arrived() + member.counter(Counter::StraysLost) == sent
    });
}
