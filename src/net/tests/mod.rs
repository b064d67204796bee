//! Real datagrams over loopback, each test on its own addresses.

use std::net::{IpAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

mod life;

use super::steering::bind_group;
use super::*;
use crate::clock::now;
use crate::limits::{ARENA_MIN, DATAGRAM_MAX, SEGMENTS_MAX};
use crate::memory::write_arena;
use crate::ring::Features;

const PORT: u16 = 8116;
const PATIENCE: Duration = Duration::from_secs(10);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn arena() -> Vec<AtomicU64> {
    (0..ARENA_MIN / 8).map(|_| AtomicU64::new(0)).collect()
}

fn config<'m>(local: IpAddr, arena: &'m [AtomicU64]) -> PortConfig<'m> {
    PortConfig {
        local,
        shard: 0,
        udp_port: PORT,
        interface: 0,
        multicast: None,
        heartbeat_peers: Vec::new(),
        arena,
        send: SendMode::Fixed,
        features: Features::all(),
        receive_buffers: 8,
    }
}

fn only(local: IpAddr) -> OwnedFd {
    bind_group(local, PORT, 1, 0).unwrap().remove(0)
}

/// Bytes of a datagram of a test: a number, and the destination shard where the steering looks.
fn datagram(number: u32, shard: u8, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| (i as u32 ^ number) as u8).collect();
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    bytes[19] = shard;
    bytes
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

/// What came of a run: datagrams by port, and events.
#[derive(Default)]
struct Seen {
    datagrams: Vec<(usize, IpAddr, Vec<u8>)>,
    events: Vec<Event>,
}

impl Seen {
    fn sent(&self, token: u64) -> Vec<i32> {
        let results = self.events.iter().filter_map(|event| match event {
            Event::Sent { token: t, result } if *t == token => Some(*result),
            _ => None,
        });
        results.collect()
    }
}

/// Passes over all ports until the condition holds.
fn run(ports: &mut [Port], seen: &mut Seen, mut enough: impl FnMut(&Seen) -> bool) {
    let end = now().after(PATIENCE);
    while !enough(seen) {
        assert!(
            !end.reached(now()),
            "{} datagrams, events {:?}",
            seen.datagrams.len(),
            seen.events
        );
        for (index, port) in ports.iter_mut().enumerate() {
            port.reap(&mut |event| seen.events.push(event));
            port.receive(64, &mut |source, bytes| {
                seen.datagrams.push((index, source, bytes.to_vec()))
            });
            port.wait(now().after(Duration::from_millis(1))).unwrap();
        }
    }
}

/// A train of `full` datagrams and a short one from a port to itself.
fn train_arrives(local: IpAddr, send: SendMode, features: Features, full: usize) -> PortCounts {
    let arena = arena();
    let mut config = config(local, &arena);
    config.send = send;
    config.features = features;
    let mut port = Port::new(&config, only(local), None).unwrap();
    port.open(5, local).unwrap();
    let mut expected = Vec::new();
    for i in 0..full {
        expected.push(datagram(i as u32, 0, DATAGRAM_MAX));
    }
    expected.push(datagram(full as u32, 0, 100));
    let bytes = expected.concat();
    write_arena(&arena, 4096, &bytes);
    port.send(Target::Stream(5), 4096, bytes.len() as u32, 77).unwrap();
    let mut seen = Seen::default();
    let mut ports = [port];
    run(&mut ports, &mut seen, |seen| seen.datagrams.len() > full && !seen.sent(77).is_empty());
    assert_eq!(seen.sent(77), [bytes.len() as i32], "{send:?}");
    for (got, expected) in seen.datagrams.iter().zip(&expected) {
        assert!(got.1 == local && got.2 == *expected);
    }
    assert_eq!(seen.datagrams.len(), expected.len());
    let [port] = ports;
    // One receive operation, and nothing else, stays.
    assert_eq!(port.in_flight(), 1);
    port.counts()
}

#[test]
fn a_train_arrives_whole_and_in_order_in_one_completion() {
    let counts =
        train_arrives(ip("127.81.1.1"), SendMode::Fixed, Features::all(), SEGMENTS_MAX - 1);
    assert_eq!(counts.trains, 1);
    assert_eq!(counts.truncated, 0);
}

#[test]
fn every_way_of_sending_delivers_the_same() {
    for (i, mode) in [SendMode::Fixed, SendMode::ZeroCopy, SendMode::Copy, SendMode::Auto]
        .into_iter()
        .enumerate()
    {
        train_arrives(ip(&format!("127.81.2.{}", i + 1)), mode, Features::all(), 7);
    }
}

#[test]
fn everything_works_with_every_optional_feature_off() {
    let counts = train_arrives(ip("127.81.3.1"), SendMode::Auto, Features::none(), 9);
    assert_eq!(counts.trains, 10, "without segmentation each datagram travels alone");
    train_arrives(ip("127.81.3.2"), SendMode::ZeroCopy, Features::none(), 3);
}

#[test]
fn a_train_arrives_over_ipv6() {
    let counts = train_arrives(ip("::1"), SendMode::Fixed, Features::all(), 20);
    assert_eq!(counts.trains, 1);
}

#[test]
fn each_datagram_reaches_the_shard_that_it_names() {
    for shards in [2u8, 3] {
        let local = ip(&format!("127.81.4.{shards}"));
        let arena = arena();
        let group = bind_group(local, PORT, shards, 0).unwrap();
        let config = |shard| PortConfig { shard, ..config(local, &arena) };
        let mut ports: Vec<Port> = (0..shards)
            .zip(group)
            .map(|(shard, fd)| Port::new(&config(shard), fd, None).unwrap())
            .collect();
        // A stream for each destination shard, as trains must not mix shards.
        for shard in 0..shards {
            ports[0].open(usize::from(shard), local).unwrap();
            let train: Vec<u8> = (0..10)
                .flat_map(|i| datagram(i + 100 * u32::from(shard), shard, DATAGRAM_MAX))
                .collect();
            let offset = u32::from(shard) * 16384;
            write_arena(&arena, offset as usize, &train);
            let to = Target::Stream(usize::from(shard));
            ports[0].send(to, offset, train.len() as u32, u64::from(shard)).unwrap();
        }
        let mut seen = Seen::default();
        run(&mut ports, &mut seen, |seen| seen.datagrams.len() == 10 * usize::from(shards));
        for (at, _, bytes) in &seen.datagrams {
            assert_eq!((*at as u8, number(bytes) / 100), (bytes[19], u32::from(bytes[19])));
        }
    }
}

#[test]
fn a_socket_whose_buffers_ran_out_receives_again() {
    let local = ip("127.81.5.1");
    let arena = arena();
    let config = PortConfig { receive_buffers: 2, ..config(local, &arena) };
    let mut port = Port::new(&config, only(local), None).unwrap();
    let sender = UdpSocket::bind((ip("127.81.5.2"), 0)).unwrap();
    // Datagrams from many sends do not merge: each takes a buffer, and the third finds none.
    for i in 0..20 {
        sender.send_to(&datagram(i, 0, 64), (local, PORT)).unwrap();
    }
    let end = now().after(PATIENCE);
    while port.counts().no_buffer == 0 {
        assert!(!end.reached(now()));
        port.submit().unwrap();
        port.reap(&mut |_| ());
    }
    let mut seen = Seen::default();
    let mut ports = [port];
    run(&mut ports, &mut seen, |seen| seen.datagrams.len() == 20);
    let numbers: Vec<u32> = seen.datagrams.iter().map(|(_, _, bytes)| number(bytes)).collect();
    assert_eq!(numbers, (0..20).collect::<Vec<_>>(), "nothing lost, nothing out of order");
    assert_eq!(ports[0].receive_drops(), 0);
}

#[test]
fn a_cap_stops_in_the_middle_of_a_train() {
    let local = ip("127.81.6.1");
    let arena = arena();
    let mut port = Port::new(&config(local, &arena), only(local), None).unwrap();
    port.open(0, local).unwrap();
    let train: Vec<u8> = (0..10).flat_map(|i| datagram(i, 0, DATAGRAM_MAX)).collect();
    write_arena(&arena, 0, &train);
    port.send(Target::Stream(0), 0, train.len() as u32, 1).unwrap();
    let mut numbers = Vec::new();
    let end = now().after(PATIENCE);
    while numbers.len() < 10 {
        assert!(!end.reached(now()));
        port.wait(now().after(Duration::from_millis(1))).unwrap();
        port.reap(&mut |_| ());
        let count = port.receive(3, &mut |_, bytes| numbers.push(number(bytes)));
        assert!(count <= 3);
    }
    assert_eq!(numbers, (0..10).collect::<Vec<_>>());
}

#[test]
fn a_port_in_use_and_a_foreign_address_are_told_apart() {
    let local = ip("127.81.7.1");
    let group = bind_group(local, PORT, 2, 0).unwrap();
    let error = bind_group(local, PORT, 2, 0).unwrap_err();
    assert_eq!(error, NetError::PortInUse((local, PORT).into()));
    assert!(error.to_string().starts_with("UDP 127.81.7.1:8116 is in use"));
    drop(group);
    bind_group(local, PORT, 2, 0).unwrap();
    let foreign = ip("192.0.2.7");
    assert_eq!(bind_group(foreign, PORT, 1, 0).unwrap_err(), NetError::AddressNotLocal(foreign));
}

#[test]
fn bulk_beyond_the_limit_is_refused_but_heartbeats_still_go() {
    let (local, peer) = (ip("127.81.10.1"), ip("127.81.10.2"));
    let arena = arena();
    let config = PortConfig { heartbeat_peers: vec![peer], ..config(local, &arena) };
    let mut port = Port::new(&config, only(local), None).unwrap();
    let there = UdpSocket::bind((peer, PORT)).unwrap();
    there.set_read_timeout(Some(PATIENCE)).unwrap();
    port.open(0, peer).unwrap();
    let mut sends = 0;
    while port.send(Target::Stream(0), 0, 100, sends).is_ok() {
        sends += 1;
    }
    assert_eq!(sends as usize, SENDS_MAX);
    assert_eq!(port.heartbeat_targets(), 1);
    port.send(Target::Heartbeat(0), 8192, 60, 1_000_000).unwrap();
    let mut ports = [port];
    let mut seen = Seen::default();
    run(&mut ports, &mut seen, |seen| seen.events.len() == SENDS_MAX + 1);
    assert_eq!(seen.sent(1_000_000), [60]);
    ports[0].send(Target::Stream(0), 0, 100, 1).unwrap();
}

#[test]
fn a_path_that_refuses_segmentation_gets_single_datagrams() {
    let local = ip("127.81.11.1");
    let arena = arena();
    let mut port = Port::new(&config(local, &arena), only(local), None).unwrap();
    port.open(0, local).unwrap();
    // UDP without checksums cannot be segmented: the kernel answers EINVAL, as a tunnel would EIO.
    port.refuse_segmentation(0);
    let train: Vec<u8> = (0..6).flat_map(|i| datagram(i, 0, DATAGRAM_MAX)).collect();
    write_arena(&arena, 0, &train);
    let mut ports = [port];
    let mut seen = Seen::default();
    for token in 0..2 {
        ports[0].send(Target::Stream(0), 0, train.len() as u32, token).unwrap();
        run(&mut ports, &mut seen, |seen| {
            seen.datagrams.len() == 6 * (token as usize + 1) && !seen.sent(token).is_empty()
        });
        assert_eq!(seen.sent(token), [train.len() as i32]);
    }
    assert_eq!(ports[0].in_flight(), 1);
}

#[test]
fn auto_settles_on_what_loopback_really_does() {
    let local = ip("127.81.12.1");
    let arena = arena();
    let config = PortConfig { send: SendMode::Auto, ..config(local, &arena) };
    let mut ports = [Port::new(&config, only(local), None).unwrap()];
    ports[0].open(0, local).unwrap();
    let mut seen = Seen::default();
    assert_eq!(ports[0].mode(), SendMode::Auto);
    for token in 0..6 {
        ports[0].send(Target::Stream(0), 0, 2000, token).unwrap();
        run(&mut ports, &mut seen, |seen| seen.sent(token) == [2000]);
    }
    assert_eq!(ports[0].mode(), SendMode::Fixed, "loopback copies");
}

#[test]
fn a_watch_and_a_futex_wake_the_wait_once() {
    let local = ip("127.81.13.1");
    let arena = arena();
    let word = AtomicU32::new(5);
    let mut port = Port::new(&config(local, &arena), only(local), None).unwrap();
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    // Nobody but the port has its end from here on.
    port.add_watch(42, far.into());
    port.watch(42);
    let futex = port.futex_wait(&word, 5);
    assert!(futex == port.features().futex_wait && futex == port.futex_wait(&word, 5));
    let mut ports = [port];
    let mut seen = Seen::default();
    ports[0].submit().unwrap();
    std::io::Write::write_all(&mut &near, b"x").unwrap();
    run(&mut ports, &mut seen, |seen| seen.events == [Event::Ready { key: 42 }]);
    if futex {
        word.store(6, Ordering::SeqCst);
        wake(&word);
        run(&mut ports, &mut seen, |seen| seen.events.len() == 2);
        assert_eq!(seen.events[1], Event::Woken);
        // Not as expected: reported at once.
        assert!(ports[0].futex_wait(&word, 5));
        run(&mut ports, &mut seen, |seen| seen.events.len() == 3);
    }
    assert_eq!(ports[0].in_flight(), 1);
}

#[allow(unsafe_code)]
fn wake(word: &AtomicU32) {
    // SAFETY: a live word; FUTEX_WAKE without FUTEX_PRIVATE_FLAG wakes shared waiters.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}
