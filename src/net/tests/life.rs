//! The life of sockets: opened, closed, refused, joined to a group.

use std::collections::HashSet;

use super::*;

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn opening_and_closing_streams_leaks_nothing_and_every_send_is_reported_once() {
    let (local, peer) = (ip("127.81.8.1"), ip("127.81.8.2"));
    // A child process has no other tests that open files at the same time.
    if std::env::var_os("HYPERSYNC_TEST_ALONE").is_none() {
        alone(
            "net::tests::life::opening_and_closing_streams_leaks_nothing_and_every_send_is_reported_once",
            &[],
        );
        return;
    }
    for mode in [SendMode::Fixed, SendMode::ZeroCopy, SendMode::Copy] {
        let arena = arena();
        let config = PortConfig { send: mode, ..config(local, &arena) };
        let mut port = Port::new(&config, only(local), None).unwrap();
        let drain = UdpSocket::bind((peer, PORT)).unwrap();
        let before = open_files();
        let mut seen = Seen::default();
        for round in 0..500u64 {
            let stream = (round % 3) as usize;
            port.open(stream, peer).unwrap();
            while port.send(Target::Stream(stream), 0, 3000, round).is_err() {
                port.submit().unwrap();
                port.reap(&mut |event| seen.events.push(event));
            }
            // Closed before the kernel has seen the send.
            port.close(stream);
            if round % 50 == 0 {
                port.submit().unwrap();
            }
        }
        let mut ports = [port];
        run(&mut ports, &mut seen, |seen| seen.events.len() >= 500);
        let tokens: HashSet<u64> =
            seen.events.iter().filter_map(|event| sent_token(*event)).collect();
        assert_eq!((tokens.len(), seen.events.len()), (500, 500));
        // Where sockets were closed with room in the queue, the sends went out.
        assert!(seen.events.iter().all(|event| matches!(event, Event::Sent { result: 3000, .. })));
        ports[0].submit().unwrap();
        assert_eq!((open_files(), ports[0].in_flight()), (before, 1), "{mode:?}");
        drop(drain);
    }
}

fn sent_token(event: Event) -> Option<u64> {
    match event {
        Event::Sent { token, .. } => Some(token),
        _ => None,
    }
}

#[test]
fn a_dead_peer_and_a_closed_stream_are_reported_and_harm_nothing() {
    let (local, peer) = (ip("127.81.9.1"), ip("127.81.9.2"));
    let arena = arena();
    let port = Port::new(&config(local, &arena), only(local), None).unwrap();
    let mut ports = [port];
    let mut seen = Seen::default();
    ports[0].open(0, peer).unwrap();
    // Nobody listens: the first send draws an ICMP message, a later one reports it.
    for token in 0..2 {
        ports[0].send(Target::Stream(0), 0, 500, token).unwrap();
        run(&mut ports, &mut seen, |seen| !seen.sent(token).is_empty());
    }
    assert_eq!((seen.sent(0), seen.sent(1)), (vec![500], vec![-libc::ECONNREFUSED]));
    ports[0].send(Target::Stream(9), 0, 500, 9).unwrap();
    run(&mut ports, &mut seen, |seen| !seen.sent(9).is_empty());
    assert_eq!(seen.sent(9), [-libc::ENOTCONN]);
    let back = UdpSocket::bind((peer, PORT)).unwrap();
    back.set_read_timeout(Some(PATIENCE)).unwrap();
    ports[0].send(Target::Stream(0), 0, 500, 10).unwrap();
    run(&mut ports, &mut seen, |seen| seen.sent(10) == [500]);
    assert_eq!(back.recv(&mut [0; 2000]).unwrap(), 500);
}

/// Runs one test in a process of its own, behind `wrapper`.
fn alone(test: &str, wrapper: &[&str]) {
    let this = std::env::current_exe().unwrap();
    let mut words: Vec<&str> = wrapper.to_vec();
    words.push(this.to_str().unwrap());
    let output = std::process::Command::new(words[0])
        .args(&words[1..])
        .args(["--exact", test, "--nocapture"])
        .env("HYPERSYNC_TEST_ALONE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn heartbeats_reach_all_members_of_the_multicast_group() {
    if std::env::var_os("HYPERSYNC_TEST_ALONE").is_none() {
        if !is_root() {
            println!("skipped: needs root for a network namespace");
            return;
        }
        // Both members on one end of a cable, whose other end nobody listens at.
        let script = "ip link add sync0 type veth peer name sync1 && ip link set lo up && \
                      ip link set sync0 up && ip link set sync1 up && \
                      ip address add 10.81.14.1/24 dev sync0 && ip address add 10.81.14.2/24 dev sync0 && \
                      ip address add fd00:81::1/64 dev sync0 nodad && ip address add fd00:81::2/64 dev sync0 nodad && \
                      exec \"$@\"";
        alone(
            "net::tests::life::heartbeats_reach_all_members_of_the_multicast_group",
            &["unshare", "-n", "sh", "-c", script, "sh"],
        );
        return;
    }
    for (group, locals) in [
        ("224.0.0.116", ["10.81.14.1", "10.81.14.2"]),
        ("ff02::8116", ["fd00:81::1", "fd00:81::2"]),
    ] {
        let arena = arena();
        let mut ports: Vec<Port> = locals
            .iter()
            .map(|local| {
                let link = LinkConfig {
                    local: ip(local),
                    interface: Some("sync0".to_owned()),
                    multicast: Some(ip(group)),
                    udp_port: PORT,
                    shards: 1,
                };
                let (link, Receivers { mut shards, group: joined }) = Link::open(link).unwrap();
                let config = PortConfig {
                    interface: link.interface().index,
                    multicast: Some(ip(group)),
                    ..config(ip(local), &arena)
                };
                Port::new(&config, shards.remove(0), joined).unwrap()
            })
            .collect();
        write_arena(&arena, 0, &datagram(8, 0, 200));
        ports[0].send(Target::Heartbeat(0), 0, 200, 1).unwrap();
        let mut seen = Seen::default();
        run(&mut ports, &mut seen, |seen| seen.datagrams.len() == 2 && seen.sent(1) == [200]);
        let mut at: Vec<usize> = seen.datagrams.iter().map(|(index, ..)| *index).collect();
        at.sort_unstable();
        assert_eq!(at, [0, 1], "once at each, the sender included");
        assert!(
            seen.datagrams
                .iter()
                .all(|(_, source, bytes)| *source == ip(locals[0]) && bytes.len() == 200)
        );
    }
}

#[allow(unsafe_code)]
fn is_root() -> bool {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::geteuid() == 0 }
}
