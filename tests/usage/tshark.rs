//! Stock tshark shows the state of the group.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hypersync::ccp::UDP_PORT;

use crate::common::copies::{connections, push_all, wait_for_agreement};
use crate::common::member::{Lab, SOON, wait_until_ready};
use crate::common::{bind, run, wait_for};

/// A datagram as it came off the wire.
struct Caught {
    from: SocketAddr,
    to: SocketAddr,
    payload: Vec<u8>,
}

/// tshark as it comes, without anybody's own settings.
fn tshark(lab: &Lab) -> Command {
    let mut command = Command::new("tshark");
    command.env("HOME", lab.path("")).env_remove("XDG_CONFIG_HOME").arg("-n");
    command
}

/// Whether tshark is here. If not, the test says so in a line and passes, except under `CI=true`.
fn has_tshark() -> bool {
    let here = Command::new("tshark").arg("--version").output().is_ok();
    if !here {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "CI needs tshark");
        println!("left out, needs tshark: what stock decoders show");
    }
    here
}

fn socket_at(address: SocketAddr) -> UdpSocket {
    let socket = bind(address);
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    socket
}

/// Receives until the condition holds for what came.
fn catch(
    socket: &UdpSocket,
    what: &str,
    mut is_enough: impl FnMut(&[Caught]) -> bool,
) -> Vec<Caught> {
    let (mut all, start, mut buffer) = (Vec::new(), Instant::now(), [0; 65_536]);
    while !is_enough(&all) {
        assert!(start.elapsed() < SOON, "{} datagrams, but not {what}", all.len());
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            all.push(Caught {
                from,
                to: socket.local_addr().unwrap(),
                payload: buffer[..len].to_vec(),
            });
        }
    }
    all
}

/// Writes a capture file of raw IPv4 packets.
fn write_pcap(path: &Path, caught: &[Caught]) {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 101] {
        file.extend(word.to_ne_bytes());
    }
    for (i, c) in caught.iter().enumerate() {
        let (SocketAddr::V4(from), SocketAddr::V4(to)) = (c.from, c.to) else {
            panic!("IPv4 only")
        };
        let len = 28 + c.payload.len();
        for word in [i as u32, 0, len as u32, len as u32] {
            file.extend(word.to_ne_bytes());
        }
        file.extend([0x45, 0]);
        file.extend((len as u16).to_be_bytes());
        file.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        file.extend(from.ip().octets());
        file.extend(to.ip().octets());
        file.extend(from.port().to_be_bytes());
        file.extend(to.port().to_be_bytes());
        file.extend(((len - 20) as u16).to_be_bytes());
        file.extend([0, 0]);
        file.extend(&c.payload);
    }
    fs::write(path, file).unwrap();
}

/// What tshark makes of these fields, a row a datagram; values of one field are joined by commas.
fn decode(lab: &Lab, caught: &[Caught], fields: &[&str]) -> Vec<Vec<String>> {
    let path = lab.path("caught.pcap");
    write_pcap(&path, caught);
    let mut command = tshark(lab);
    command.args(["-T", "fields", "-E", "separator=|", "-E", "occurrence=a", "-r"]).arg(&path);
    for field in fields {
        command.args(["-e", field]);
    }
    let text = run(&mut command);
    let rows: Vec<Vec<String>> =
        text.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect();
    assert_eq!(rows.len(), caught.len(), "a row each");
    rows
}

fn is_heartbeat(payload: &[u8]) -> bool {
    payload.get(7) == Some(&1)
}

const FIELDS: [&str; 18] = [
    "cpha.magic_number",
    "cpha.version",
    "cpha.cluster_number",
    "cpha.opcode",
    "cpha.src_id",
    "cpha.dst_id",
    "cpha.policy_id",
    "cpha.id_num",
    "cpha.report_code",
    "cpha.ha_mode",
    "cpha.ha_time_unit",
    "cpha.state_node",
    "cpha.in_up",
    "cpha.in_assume_up",
    "cpha.out_up",
    "cpha.out_assume_up",
    "cpha.cluster_last_packet",
    "_ws.malformed",
];

#[test]
fn heartbeats_are_what_stock_tshark_takes_them_for() {
    if !has_tshark() {
        return;
    }
    let lab = Lab::new();
    // This test is a peer of both, at address 9.
    let ear = socket_at(SocketAddr::new(lab.address(9), UDP_PORT));
    let one = lab.start(1, &[3, 9], &["--shards", "1"]);
    let mut three = lab.start(3, &[1, 9], &["--shards", "2"]);
    let first = catch(&ear, "both are heard", |all| {
        [1, 3].iter().all(|last| all.iter().any(|c| c.from.ip() == lab.address(*last)))
    });
    let beginning = decode(&lab, &first, &FIELDS);
    let row = |rows: &[Vec<String>], n: usize, id: u8| {
        rows.iter().filter(|row| row[4] == id.to_string()).nth(n).cloned()
    };
    assert_eq!(
        row(&beginning, 0, 1).unwrap()[11],
        "1",
        "a member that has just begun is initializing"
    );

    wait_until_ready(&[&one, &three]);
    while ear.set_nonblocking(true).is_ok() && ear.recv_from(&mut [0; 2000]).is_ok() {}
    ear.set_nonblocking(false).unwrap();
    let full_size = |c: &Caught| c.payload.len() == hypersync::limits::DATAGRAM_MAX;
    let caught = catch(&ear, "eight heartbeats of each, small ones and padded ones", |all| {
        [1, 3].iter().all(|last| {
            let its = || all.iter().filter(|c| c.from.ip() == lab.address(*last));
            its().count() >= 8 && its().any(full_size) && !its().all(full_size)
        })
    });
    assert!(caught.iter().all(|c| is_heartbeat(&c.payload)), "only heartbeats go to everybody");
    let rows = decode(&lab, &caught, &FIELDS);
    for row in &rows {
        let id: u8 = row[4].parse().expect("a number");
        assert!(id == 1 || id == 3, "{row:?}");
        let fixed = [
            ("0x1a90", 0),
            ("2920", 1),
            ("7", 2),
            ("1", 3),
            ("65535", 5),
            ("0", 6),
            ("3", 7),
            ("3", 8),
            ("2", 9),
            ("100", 10),
            // Member 2 is not there; 4 is Active, 0 is Down.
            ("4,0,4", 11),
            ("1", 12),
            ("0", 13),
            ("1", 14),
            ("0", 15),
            ("", 17),
        ];
        for (value, at) in fixed {
            assert_eq!(row[at], value, "{} of {row:?}", FIELDS[at]);
        }
        let ages: Vec<i32> = row[16].split(',').map(|age| age.parse().expect("a number")).collect();
        assert_eq!(ages.len(), 3);
        let (own, other) = if id == 1 { (ages[0], ages[2]) } else { (ages[2], ages[0]) };
        assert_eq!((own, ages[1]), (0, 127), "itself now, member 2 never: {row:?}");
        assert!((0..=5).contains(&other), "{row:?}");
    }
    // The words that a person sees.
    let words = run(tshark(&lab).args(["-V", "-r"]).arg(lab.path("caught.pcap")));
    for word in ["Check Point High Availability Protocol", "FWHA_MY_STATE", "Active", "HA mode"] {
        assert!(words.contains(word), "{word} is not in\n{}", &words[..words.len().min(4000)]);
    }
    assert!(!words.contains("Malformed"));

    three.kill();
    wait_for("member 1 is told", SOON, || one.was_told("member-dead 3"));
    let mut after = Vec::new();
    catch(&ear, "member 1 shows member 3 as down", |all| {
        let from_one: Vec<&Caught> = all.iter().filter(|c| c.from.ip() == lab.address(1)).collect();
        if let Some(last) = from_one.last() {
            after = decode(
                &lab,
                &[Caught { from: last.from, to: last.to, payload: last.payload.clone() }],
                &["cpha.state_node", "cpha.cluster_last_packet", "_ws.malformed"],
            );
        }
        after.first().is_some_and(|row| row[0] == "4,0,0")
    });
    let age: i32 = after[0][1].split(',').next_back().unwrap().parse().unwrap();
    assert!((4..=127).contains(&age), "silent for a while: {after:?}");
    assert_eq!(after[0][2], "");
}

#[test]
fn synchronization_is_what_stock_tshark_takes_for_it() {
    if !has_tshark() {
        return;
    }
    let lab = Lab::new();
    // Member 1 calls another one dead only after three seconds, and itself ready as late.
    let one = lab.start(1, &[2], &["--shards", "1", "--dead-after", "30"]);
    let mut two = lab.start(2, &[1], &["--shards", "1"]);
    wait_until_ready(&[&one, &two]);
    let first = connections(0..50);
    let mut producers = one.producers();
    push_all(&mut producers, first.values());
    wait_for_agreement("both have them, and slots are leased", &[&one, &two], &first, SOON);
    // Its place is taken while member 1 believes that it lives.
    two.kill();
    let ear = socket_at(SocketAddr::new(lab.address(2), UDP_PORT));
    let mut changed = first;
    changed.values_mut().for_each(|c| c.state.mark ^= 0xff00_0000);
    push_all(&mut producers, changed.values());
    let caught = catch(&ear, "sequenced synchronization", |all| {
        all.iter().any(|c| !is_heartbeat(&c.payload) && c.payload[23] == 1)
    });
    let sync: Vec<Caught> = caught.into_iter().filter(|c| !is_heartbeat(&c.payload)).collect();
    let fields = [
        "cpha.opcode",
        "cpha.cluster_number",
        "cpha.src_id",
        "cpha.dst_id",
        "cpha.magic_number",
        "_ws.malformed",
    ];
    for row in decode(&lab, &sync, &fields) {
        assert_eq!(row, ["10", "7", "1", "2", "0x1a90", ""]);
    }
    let words = run(tshark(&lab).args(["-V", "-r"]).arg(lab.path("caught.pcap")));
    assert!(
        words.contains("FWHAP_SYNC - New Sync packet") && !words.contains("Malformed"),
        "{}",
        &words[..words.len().min(4000)]
    );
}
