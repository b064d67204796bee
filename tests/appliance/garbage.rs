//! What must not harm a member: datagrams that are cut, forged, foreign, repeated or plain noise.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use hypersync::ccp::UDP_PORT;
use hypersync::counters::{COUNTERS, Counter};
use hypersync::limits::DATAGRAM_MAX;
use hypersync::load::rng::Rng;
use hypersync::memory::read_arena;

use crate::common::copies::{connections, copies, push_all, wait_for_agreement};
use crate::common::member::{Lab, Member, SOON, wait_until_ready};
use crate::common::wait_for;

const SEED: u64 = 8116;
/// Datagrams of each kind.
const EACH: usize = 100;
/// Datagrams on the way at once: few enough for the smallest receive buffer.
const AT_ONCE: usize = 25;

/// Everything that counts a datagram that was ignored, by name.
fn ignored(member: &Member) -> Vec<(&'static str, u64)> {
    COUNTERS
        .iter()
        .filter(|info| info.name.starts_with("reject_") || info.counter == Counter::DuplicateMember)
        .map(|info| (info.name, member.counter(info.counter)))
        .collect()
}

fn sum(counts: &[(&'static str, u64)]) -> u64 {
    counts.iter().map(|(_, n)| n).sum()
}

/// Sends them to a member, a few at a time, and waits until each was counted as ignored. Returns
/// what was counted, by name, without zeroes.
fn send(
    to: &Member,
    address: IpAddr,
    from: &UdpSocket,
    datagrams: &[Vec<u8>],
) -> Vec<(&'static str, u64)> {
    let to_address = SocketAddr::new(address, UDP_PORT);
    let before = ignored(to);
    for (i, few) in datagrams.chunks(AT_ONCE).enumerate() {
        for datagram in few {
            from.send_to(datagram, to_address).expect("loopback takes it");
        }
        let expected = sum(&before) + (i * AT_ONCE + few.len()) as u64;
        let start = Instant::now();
        while sum(&ignored(to)) < expected {
            assert!(start.elapsed() < SOON, "{} of {expected} were counted", sum(&ignored(to)));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let after = ignored(to);
    after.iter().zip(&before).map(|(a, b)| (a.0, a.1 - b.1)).filter(|(_, n)| *n > 0).collect()
}

/// Sequenced datagrams that a member sent, as its arena still has them: every one from `shard` to a
/// shard of `to`.
fn sent_by(member: &Member, shard: u8, to: u8) -> Vec<Vec<u8>> {
    let arena = member.view().shard(shard).arena;
    let mut bytes = vec![0; arena.len() * 8];
    read_arena(arena, 0, &mut bytes);
    let begins: Vec<usize> = (0..bytes.len() - 64)
        .step_by(8)
        .filter(|at| bytes[*at..].starts_with(&[0x1a, 0x90, 0x0b, 0x68, 0, 7, 0, 10]))
        .collect();
    let sequenced = |d: &[u8]| d[15] == to && d[21] == shard && d[23] == 1;
    begins
        .iter()
        .enumerate()
        .map(|(i, at)| {
            let end = begins.get(i + 1).copied().unwrap_or(*at + 64).min(at + DATAGRAM_MAX);
            bytes[*at..end].to_vec()
        })
        .filter(|d| sequenced(d))
        .collect()
}

#[test]
fn cut_foreign_forged_and_repeated_datagrams_are_counted_by_reason_and_change_nothing() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2], &["--shards", "2"]);
    let mut two = lab.start(2, &[1], &["--shards", "2"]);
    wait_until_ready(&[&one, &two]);
    let mut wanted = connections(0..500);
    let mut producers = one.producers();
    push_all(&mut producers, wanted.values());
    wait_for_agreement("both have them", &[&one, &two], &wanted, SOON);

    let real: Vec<Vec<u8>> = (0..2).flat_map(|shard| sent_by(&one, shard, 2)).collect();
    assert!(!real.is_empty(), "member 1 sent something");
    let tables = (copies(&one).unwrap(), copies(&two).unwrap());
    let lines = two.log().lines().count();

    let mut rng = Rng::new(SEED);
    let forger =
        UdpSocket::bind((lab.address(1), 0)).expect("a port of member 1's address is free");
    let stranger = UdpSocket::bind((lab.address(66), 0)).expect("a port is free");
    let mut changed =
        |from: &UdpSocket, reason: &str, change: &mut dyn FnMut(&mut Rng, &mut Vec<u8>)| {
            let datagrams: Vec<Vec<u8>> = (0..EACH)
                .map(|i| {
                    let mut datagram = real[i % real.len()].clone();
                    change(&mut rng, &mut datagram);
                    datagram
                })
                .collect();
            let counted = send(&two, lab.address(2), from, &datagrams);
            assert_eq!(counted, [(reason, EACH as u64)], "what was counted for {reason}");
        };
    // A number from `low` on, `high` excluded.
    let number = |rng: &mut Rng, low: u32, high: u32| low + rng.below(high - low);
    changed(&forger, "reject_short", &mut |rng, d| d.truncate(number(rng, 1, 56) as usize));
    changed(&forger, "reject_magic", &mut |rng, d| d[0] = number(rng, 0x1b, 0x100) as u8);
    changed(&forger, "reject_group", &mut |rng, d| d[5] = number(rng, 8, 256) as u8);
    changed(&forger, "reject_version", &mut |rng, d| d[3] = number(rng, 0x69, 0x100) as u8);
    changed(&forger, "reject_version", &mut |rng, d| d[20] = number(rng, 2, 256) as u8);
    changed(&forger, "reject_opcode", &mut |rng, d| d[7] = number(rng, 2, 10) as u8);
    changed(&forger, "reject_member", &mut |rng, d| d[13] = number(rng, 53, 256) as u8);
    changed(&forger, "reject_member", &mut |_, d| d[13] = 2);
    changed(&forger, "reject_member", &mut |rng, d| d[15] = number(rng, 3, 53) as u8);
    changed(&forger, "reject_shard", &mut |rng, d| d[19] = number(rng, 2, 256) as u8);
    changed(&forger, "reject_shard", &mut |rng, d| d[21] = number(rng, 2, 256) as u8);
    changed(&forger, "reject_key", &mut |rng, d| d[22] = number(rng, 1, 256) as u8);
    changed(&forger, "reject_message", &mut |_, d| d[23] = 0);
    changed(&forger, "reject_table", &mut |rng, d| d[24] ^= number(rng, 1, 256) as u8);
    changed(&forger, "reject_table", &mut |rng, d| d[28] ^= number(rng, 1, 256) as u8);
    changed(&forger, "reject_message", &mut |_, d| d[56] = 0xff);
    changed(&forger, "reject_window", &mut |rng, d| d[37] = number(rng, 1, 256) as u8);
    changed(&forger, "reject_repeated", &mut |_, _| {});
    changed(&stranger, "reject_source", &mut |_, _| {});
    // A heartbeat cannot have these sizes; one to another shard than 0 has no business there.
    changed(&forger, "reject_shard", &mut |_, d| (d[7], d[19]) = (1, 1));
    changed(&forger, "reject_message", &mut |rng, d| {
        (d[7], d[19]) = (1, 0);
        d[22] = number(rng, 4, 256) as u8;
    });

    assert_eq!((copies(&one).unwrap(), copies(&two).unwrap()), tables, "nothing changed");
    assert!(one.is_running() && two.is_running());
    let more = two.log().lines().count() - lines;
    assert!(more < 5, "{more} lines were logged:\n{}", two.log());
    assert_eq!((one.counter(Counter::MembersDied), two.counter(Counter::MembersDied)), (0, 0));

    let news = connections(500..600);
    push_all(&mut producers, news.values());
    wanted.extend(news);
    wait_for_agreement("the pair goes on", &[&one, &two], &wanted, SOON);
}

#[test]
fn noise_by_the_thousand_is_counted_and_changes_nothing() {
    let lab = Lab::new();
    let one = lab.start(1, &[2], &["--shards", "2"]);
    let mut two = lab.start(2, &[1], &["--shards", "2"]);
    wait_until_ready(&[&one, &two]);
    let wanted = connections(0..500);
    let mut producers = one.producers();
    push_all(&mut producers, wanted.values());
    wait_for_agreement("both have them", &[&one, &two], &wanted, SOON);
    let real: Vec<Vec<u8>> = (0..2).flat_map(|shard| sent_by(&one, shard, 2)).collect();
    let tables = (copies(&one).unwrap(), copies(&two).unwrap());
    let (lines, size) = (two.log().lines().count(), two.log().len());

    let mut rng = Rng::new(SEED);
    let forger =
        UdpSocket::bind((lab.address(1), 0)).expect("a port of member 1's address is free");
    let stranger = UdpSocket::bind((lab.address(66), 0)).expect("a port is free");
    // How much of each is real: nothing, the magic number, the first header, all up to the table
    // ids.
    for (from, keep) in
        [(&stranger, 0), (&forger, 0), (&forger, 4), (&forger, 20), (&forger, 24), (&stranger, 36)]
    {
        let datagrams: Vec<Vec<u8>> = (0..700)
            .map(|i| {
                let len = 1 + rng.below(DATAGRAM_MAX as u32) as usize;
                let mut datagram: Vec<u8> = (0..len).map(|_| rng.next_u64() as u8).collect();
                let kept = &real[i % real.len()][..keep.min(len)];
                datagram[..kept.len()].copy_from_slice(kept);
                // Two noises in four billion would be a heartbeat's opcode; none is the tables'
                // ids.
                datagram
            })
            .collect();
        let counted = send(&two, lab.address(2), from, &datagrams);
        assert_eq!(sum(&counted), 700, "of {keep} real bytes each: {counted:?}");
    }
    // A real heartbeat's beginning with noise behind is no heartbeat either, or a foreign host's.
    let datagrams: Vec<Vec<u8>> = (0..300)
        .map(|_| {
            let mut datagram: Vec<u8> = (0..200).map(|_| rng.next_u64() as u8).collect();
            datagram[..20].copy_from_slice(&real[0][..20]);
            (datagram[7], datagram[19]) = (1, 0);
            datagram
        })
        .collect();
    assert_eq!(sum(&send(&two, lab.address(2), &stranger, &datagrams)), 300);

    assert_eq!((copies(&one).unwrap(), copies(&two).unwrap()), tables, "nothing changed");
    assert!(two.is_running());
    assert_eq!((one.counter(Counter::MembersDied), two.counter(Counter::MembersDied)), (0, 0));
    let log = two.log();
    let more = (log.lines().count() - lines, log.len() - size);
    assert!(more.0 < 5 && more.1 < 1000, "{more:?} lines and bytes were logged:\n{log}");
    wait_for_agreement("the pair is as it was", &[&one, &two], &wanted, SOON);
}

#[test]
fn what_a_full_receive_socket_drops_is_counted() {
    let lab = Lab::new();
    let one = lab.start(1, &[2], &["--shards", "1"]);
    wait_for("it is ready", SOON, || one.was_told("self-ready 1"));
    wait_for("heartbeats of nobody are no loss", SOON, || one.counter(Counter::Passes) > 10);
    assert_eq!(one.counter(Counter::ReceiveDrops), 0);
    let socket = UdpSocket::bind((lab.address(9), 0)).expect("a loopback address");
    let to = SocketAddr::new(lab.address(1), UDP_PORT);
    // More than the socket and all receive buffers hold, while nobody reads.
    one.signal(libc::SIGSTOP);
    for _ in 0..60_000 {
        socket.send_to(&[0x5a; 1400], to).expect("loopback takes it");
    }
    one.signal(libc::SIGCONT);
    wait_for("what did not fit is counted", SOON, || one.counter(Counter::ReceiveDrops) > 1000);
    wait_for("what did is read", SOON, || one.counter(Counter::RejectMagic) > 1000);
    let (drops, read) = (one.counter(Counter::ReceiveDrops), one.counter(Counter::RejectMagic));
    let (trains, no_buffer) =
        (one.counter(Counter::ReceiveTrains), one.counter(Counter::ReceiveNoBuffer));
    println!(
        "{drops} dropped, {read} read in {trains} receives; no buffer was left {no_buffer} times"
    );
    assert!(trains > 0 && no_buffer > 0);
}
