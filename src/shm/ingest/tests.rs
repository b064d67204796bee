//! Stories of a shard and its producer, who may be anybody.
#![allow(unsafe_code)]

use super::*;
use crate::conn::{Connection, State, Tuple, shard_of};
use crate::shm::region::tests::{TestDir, config};
use crate::shm::{Location, Region, RegionConfig, ShmError, Sizes};
use crate::source::SourceEvent;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

fn region(dir: &TestDir, shards: u8, ring_records: usize) -> Region {
    let mut config: RegionConfig = config();
    config.sizes.shards = shards;
    config.sizes.ring_records = ring_records;
    let region = Region::create(&dir.0, &config).unwrap();
    region.publish_ready();
    region
}

fn event(n: u32) -> SourceEvent {
    let original = Tuple::v4(6, (Ipv4Addr::from(n), 1000), (Ipv4Addr::new(10, 0, 0, 2), 80));
    let state = State { mark: n, timeout_s: !n, ..State::default() };
    match n % 5 {
        4 => SourceEvent::gone(original),
        _ => SourceEvent::seen(Connection::new(original, original.mirrored(), state)),
    }
}

fn push(producer: &mut Producer, event: &SourceEvent) {
    while producer.push(event) == Err(Full) {
        std::thread::yield_now();
    }
}

#[test]
fn a_million_events_arrive_once_and_in_order() {
    let dir = TestDir::new("million");
    let region = region(&dir, 1, 1024);
    let mut producer = Producer::open(&dir.0, 0).unwrap();
    let mut consumer = Consumer::new(region.ring(0));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for n in 0..1_000_000 {
                push(&mut producer, &event(n));
                if n % 64 == 0 {
                    producer.flush();
                }
            }
        });
        let mut next = 0;
        while next < 1_000_000 {
            let taken = consumer.drain(512, &mut |got| {
                assert_eq!(got, Ok(event(next)));
                next += 1;
            });
            if taken == 0 {
                std::thread::yield_now();
            }
        }
        assert_eq!((next, consumer.drain(512, &mut |got| panic!("{got:?}"))), (1_000_000, 0));
    });
}

#[test]
fn a_batch_is_seen_when_it_is_flushed_and_a_full_ring_says_so() {
    let dir = TestDir::new("batch");
    let region = region(&dir, 1, 32);
    let mut producer = Producer::open(&dir.0, 0).unwrap();
    let mut consumer = Consumer::new(region.ring(0));
    let count = |consumer: &mut Consumer| consumer.drain(99, &mut |r| assert!(r.is_ok()));
    for n in 0..32 {
        producer.push(&event(n)).unwrap();
    }
    assert_eq!(count(&mut consumer), 0);
    assert_eq!(producer.push(&event(32)), Err(Full));
    assert_eq!(count(&mut consumer), 32, "a full ring is published, or it would stay full");
    producer.push(&event(32)).unwrap();
    drop(producer);
    assert_eq!(count(&mut consumer), 1, "whoever goes properly leaves nothing behind");
}

#[test]
fn events_find_the_ring_of_their_shard() {
    let dir = TestDir::new("shards");
    let region = region(&dir, 3, 256);
    let mut producers = Producers::open(&dir.0).unwrap();
    for n in 0..300 {
        producers.push(&event(n)).unwrap();
    }
    producers.flush();
    let mut total = 0;
    for shard in 0..3 {
        total += Consumer::new(region.ring(shard)).drain(999, &mut |got| match got.unwrap() {
            SourceEvent::Seen { connection, .. } => {
                assert_eq!(shard_of(&connection.original, 3), shard)
            }
            SourceEvent::Gone { original, .. } => assert_eq!(shard_of(&original, 3), shard),
        });
    }
    assert_eq!((total, producers.shards(), producers.is_current()), (300, 3, true));
    assert!(matches!(
        Producer::open(&dir.0, 3),
        Err(ShmError::NoSuchShard { shard: 3, shards: 3 })
    ));
    drop(region);
    let _next = Region::create(&dir.0, &config()).unwrap();
    assert!(!producers.is_current());
}

#[test]
fn a_consumer_that_was_killed_is_followed_by_one_that_repeats_but_skips_nothing() {
    let dir = TestDir::new("again");
    let first = region(&dir, 1, 64);
    first.publish_ready();
    let mut producer = Producer::open(&dir.0, 0).unwrap();
    let mut next = 0..;
    let mut push = |count: usize| {
        next.by_ref().take(count).for_each(|n| producer.push(&event(n)).unwrap());
        producer.flush();
        producer.is_current()
    };
    let ports = |consumer: &mut Consumer<'_>, cap: usize| {
        let mut seen = Vec::new();
        consumer.drain(cap, &mut |got| match got.unwrap() {
            SourceEvent::Seen { connection, .. } => seen.push(connection.original),
            SourceEvent::Gone { original, .. } => seen.push(original),
        });
        seen
    };
    let original = |n: u32| match event(n) {
        SourceEvent::Seen { connection, .. } => connection.original,
        SourceEvent::Gone { original, .. } => original,
    };
    push(30);
    let mut consumer = Consumer::new(first.ring(0));
    assert_eq!(ports(&mut consumer, 10).len(), 10);
    assert!(consumer.prepare_sleep().is_none());
    // Killed in the middle of a drain: five of ten were handed over, and the position was not
    // moved.
    let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut left = 5;
        consumer.drain(10, &mut |_| {
            left -= 1;
            if left == 0 {
                std::panic::resume_unwind(Box::new(()));
            }
        })
    }));
    assert!(killed.is_err());
    drop(first);
    assert!(push(20), "the producer notices nothing");
    let config =
        RegionConfig { sizes: Sizes { shards: 1, ring_records: 64, ..config().sizes }, ..config() };
    let second = Region::resume(Location::claim(&dir.0).unwrap(), &config).unwrap();
    assert!(push(10));
    let seen = ports(&mut Consumer::new(second.ring(0)), 99);
    assert_eq!(seen, (10..60).map(original).collect::<Vec<_>>(), "from 10 on: 10 to 14 come again");
}

#[test]
fn whatever_a_producer_scribbles_the_consumer_carries_on() {
    let dir = TestDir::new("hostile");
    let region = region(&dir, 1, 64);
    let ring = region.ring(0);
    let mut consumer = Consumer::new(ring);
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut refused = 0;
    for _ in 0..200_000 {
        match next() % 8 {
            0 => ring.words.head.store(next(), Ordering::Relaxed),
            1 => ring.words.tail.store(next(), Ordering::Relaxed),
            2 => ring.words.doorbell.store(next() as u32, Ordering::Relaxed),
            3 => ring.words.records.store(next(), Ordering::Relaxed),
            4 => {
                let head = ring.words.head.load(Ordering::Relaxed);
                ring.words.head.store(head.wrapping_add(next() % 70), Ordering::Relaxed);
            }
            5 => {
                let head = ring.words.head.load(Ordering::Relaxed);
                ring.words.head.store(head.wrapping_sub(next() % 70), Ordering::Relaxed);
            }
            _ => {
                // A record that is right but for one word, its check word made to fit.
                let at = next() % 64;
                let head = ring.words.head.load(Ordering::Relaxed);
                let mut words = record::encode(&event(next() as u32), head);
                words[(next() % 16) as usize] ^= next() & next();
                for (word, value) in ring.records[at as usize].0.iter().zip(words) {
                    word.store(value, Ordering::Relaxed);
                }
            }
        }
        let taken = consumer.drain(16, &mut |got| refused += got.is_err() as u32);
        assert!(taken <= 16);
        let _ = consumer.prepare_sleep();
        consumer.awake();
    }
    assert!(refused > 100_000);

    // And once the scribbler is gone, an honest one is heard again.
    while consumer.drain(16, &mut |_| {}) > 0 {}
    ring.words.tail.store(next(), Ordering::Relaxed);
    assert_eq!(consumer.drain(16, &mut |_| {}), 0);
    let mut producer = Producer::open(&dir.0, 0).unwrap();
    push(&mut producer, &event(5));
    producer.flush();
    let mut heard = Vec::new();
    consumer.drain(16, &mut |got| heard.push(got));
    assert_eq!(heard, [Ok(event(5))]);
}

#[test]
fn positions_that_jump_are_reported_once_and_skipped() {
    let dir = TestDir::new("jump");
    let region = region(&dir, 1, 64);
    let ring = region.ring(0);
    let mut consumer = Consumer::new(ring);
    let mut drain = |head: u64| {
        ring.words.head.store(head, Ordering::Relaxed);
        let mut said = Vec::new();
        let taken = consumer.drain(8, &mut |got| said.push(got.unwrap_err()));
        assert_eq!(taken, said.len());
        (said, ring.words.tail.load(Ordering::Relaxed))
    };
    assert_eq!(drain(65), (vec![BadRecord::Position], 65), "more than the ring holds");
    assert_eq!(drain(75), (vec![BadRecord::Check; 8], 73));
    assert_eq!(drain(74), (vec![BadRecord::Position], 74), "one step back");
    assert_eq!(drain(10), (vec![BadRecord::Position], 10), "behind the consumer");
    assert_eq!(drain(u64::MAX), (vec![BadRecord::Position], u64::MAX));
    assert_eq!(drain(3), (vec![BadRecord::Check; 4], 3), "across the wrap");
}

fn futex_wait(word: &AtomicU32, expected: u32, at_most: Duration) {
    let timeout = libc::timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: 0 };
    // SAFETY: a live word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &timeout) };
}

#[test]
fn no_wake_up_is_ever_lost() {
    let dir = TestDir::new("wake");
    let region = region(&dir, 1, 64);
    let mut producer = Producer::open(&dir.0, 0).unwrap();
    let mut consumer = Consumer::new(region.ring(0));
    const ROUNDS: u32 = 50_000;
    std::thread::scope(|scope| {
        let (answer, answered) = std::sync::mpsc::channel();
        scope.spawn(move || {
            for n in 0..ROUNDS {
                push(&mut producer, &event(n));
                producer.flush();
                // Every other round waits for the answer, so that the consumer really falls asleep.
                if n % 2 == 0 {
                    while answered.recv().unwrap() < n {}
                }
            }
        });
        let (mut next, mut slept) = (0, 0);
        while next < ROUNDS {
            let taken = consumer.drain(512, &mut |got| {
                assert_eq!(got, Ok(event(next)));
                next += 1;
            });
            if taken > 0 {
                let _ = answer.send(next - 1);
                continue;
            }
            if let Some((word, expected)) = consumer.prepare_sleep() {
                let before = Instant::now();
                futex_wait(word, expected, Duration::from_secs(20));
                assert!(
                    before.elapsed() < Duration::from_secs(10),
                    "a wake-up was lost in round {next}"
                );
                consumer.awake();
                slept += 1;
            }
        }
        assert!(slept > 100, "the test did not sleep: {slept}");
    });
}

const CHILD: &str = "HYPERSYNC_TEST_PRODUCER_DIR";

fn produce_until_killed(dir: &Path) {
    let mut producer = Producer::open(dir, 0).unwrap();
    for n in 0..10 {
        producer.push(&event(n)).unwrap();
    }
    producer.flush();
    producer.push(&event(10)).unwrap();
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[test]
fn a_killed_producer_is_succeeded() {
    // This test runs itself once more, as the process that it kills.
    if let Ok(dir) = std::env::var(CHILD) {
        produce_until_killed(Path::new(&dir));
    }
    let dir = TestDir::new("killed");
    let region = region(&dir, 1, 64);
    let mut consumer = Consumer::new(region.ring(0));
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "shm::ingest::tests::a_killed_producer_is_succeeded"])
        .env(CHILD, &dir.0)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut next = 0;
    let deadline = Instant::now() + Duration::from_secs(20);
    while next < 10 && Instant::now() < deadline {
        consumer.drain(16, &mut |got| {
            assert_eq!(got, Ok(event(next)));
            next += 1;
        });
        std::thread::yield_now();
    }
    let second = Producer::open(&dir.0, 0).err().expect("the ring has a producer").to_string();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(next, 10);
    assert!(second.contains(&format!("process {}", child.id())), "{second}");

    let mut heir = Producer::open(&dir.0, 0).unwrap();
    heir.push(&event(77)).unwrap();
    heir.flush();
    let mut heard = Vec::new();
    consumer.drain(16, &mut |got| heard.push(got));
    assert_eq!(heard, [Ok(event(77))], "what the dead one had not published is lost, nothing else");
}
