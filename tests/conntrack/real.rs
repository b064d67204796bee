//! Real packets of every kind, and what is heard of them.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};

use hypersync::conn::extra::{ProtoInfo, parts};
use hypersync::conn::slot::groups;
use hypersync::conntrack::commit::KEPT_TIMEOUT_S;

use super::*;
use crate::kinds::{send_raw, try_raw};

/// Zones, labels, a mark and a helper, as an operator's rules set them.
const RULES: &str = "nft -f - <<'END'
table inet t {
  ct helper ftp { type \"ftp\" protocol tcp; }
  chain leaving { type filter hook output priority raw;
    udp dport 5353 ct zone set 7
    udp sport 5353 ct zone set 7
    udp dport 5354 ct original zone set 9
  }
  chain arriving { type filter hook prerouting priority raw;
    udp dport 5353 ct zone set 7
    udp sport 5353 ct zone set 7
    udp dport 5354 ct original zone set 9
  }
  chain rules { type filter hook output priority filter;
    udp dport 5353 ct label set 5 ct mark set 0x1234
    tcp dport 2121 ct helper set \"ftp\"
  }
}
END
sysctl -qw net.netfilter.nf_conntrack_events=1 net.netfilter.nf_conntrack_checksum=0";

/// What all events together said of each connection, and how many expectations there were.
fn heard(source: &mut Source) -> (HashMap<Tuple, Connection>, usize) {
    let mut all: HashMap<Tuple, Connection> = HashMap::new();
    let drained = source.drain(100_000, &mut |event, _| {
        let SourceEvent::Seen { connection: new, known } = event else { return };
        let c = all.entry(new.original).or_insert(new);
        c.extra.merge(&new.extra);
        let timeout_s =
            if known & groups::TIMEOUT != 0 { new.state.timeout_s } else { c.state.timeout_s };
        let mark = if known & groups::MARK != 0 { new.state.mark } else { c.state.mark };
        if known & groups::STATE != 0 {
            c.state = new.state;
        }
        (c.state.timeout_s, c.state.mark) = (timeout_s, mark);
    });
    assert_eq!((drained.malformed, drained.skipped), (0, 0));
    (all, drained.expectations)
}

fn expect<'a>(all: &'a HashMap<Tuple, Connection>, original: &str) -> &'a Connection {
    let original: Tuple = original.parse().expect("a tuple");
    all.get(&original).unwrap_or_else(|| panic!("{original} in {:?}", all.keys()))
}

#[test]
fn zones_labels_marks_and_helpers_of_real_connections_are_heard() {
    in_namespace("events of real packets and what rules set", || {
        let mut source = Source::open(0, 1, &[], BUFFER).expect("conntrack");
        run(RULES);
        for (near, far) in [("127.0.0.1", "127.0.0.2"), ("[::1]", "[::1]")] {
            for (own, port) in [(41_000, 5353), (41_001, 5354)] {
                let server = UdpSocket::bind(format!("{far}:{port}")).expect("an address");
                let client = UdpSocket::bind(format!("{near}:{own}")).expect("an address");
                server.set_read_timeout(Some(namespace::DEADLINE)).expect("a timeout");
                client.send_to(b"x", server.local_addr().expect("an address")).expect("to send");
                let (_, peer) = server.recv_from(&mut [0; 8]).expect("to arrive");
                server.send_to(b"y", peer).expect("to send");
            }
        }
        let (all, expectations) = heard(&mut source);
        let mut labels = [0; 16];
        labels[0] = 1 << 5;
        for (zoned, one_way) in [
            (
                "udp 127.0.0.1:41000 > 127.0.0.2:5353 zone 7",
                "udp 127.0.0.1:41001 > 127.0.0.2:5354 zone 9",
            ),
            ("udp [::1]:41000 > [::1]:5353 zone 7", "udp [::1]:41001 > [::1]:5354 zone 9"),
        ] {
            let c = expect(&all, zoned);
            assert_eq!((c.reply.zone, c.state.mark, c.extra.parts), (7, 0x1234, parts::LABELS));
            assert_eq!((c.extra.labels, c.state.status), (labels, 0xa));
            let c = expect(&all, one_way);
            assert_eq!((c.reply.zone, c.extra.parts, c.state.status), (0, 0, 0xa));
        }
        assert_eq!(expectations, 0);

        // An FTP client names a port: its connection has the helper, and the helper expects another
        // one.
        let listener = TcpListener::bind("127.0.0.2:2121").expect("an address");
        let mut client = TcpStream::connect("127.0.0.2:2121").expect("to connect");
        let (mut server, peer) = listener.accept().expect("a connection");
        for line in ["USER x\r\n", "PORT 127,0,0,1,200,10\r\n"] {
            client.write_all(line.as_bytes()).expect("to send");
            server.read_exact(&mut vec![0; line.len()]).expect("to arrive");
        }
        let (all, expectations) = heard(&mut source);
        let c = expect(&all, &format!("tcp {peer} > 127.0.0.2:2121"));
        assert_eq!(
            (c.extra.helper_name(), c.state.tcp_state, c.state.status),
            (Some("ftp"), 3, 0x200e)
        );
        assert!(expectations > 0, "its packets pass twice over lo");

        // A dump says the same of those that still live.
        let there = dump(&mut source);
        let zoned = there.iter().find(|c| c.original.zone == 7).expect("in the dump");
        assert_eq!((zoned.extra.labels, zoned.state.mark), (labels, 0x1234));
        let ftp = there.iter().find(|c| c.original.dport == 2121).expect("in the dump");
        assert_eq!(ftp.extra.helper_name(), Some("ftp"));
    });
}

#[test]
fn protocols_without_sockets_are_heard_as_well() {
    in_namespace("events of raw packets", || {
        let mut source = Source::open(0, 1, &[], BUFFER).expect("conntrack");
        run(RULES);
        let (near, far) = ("127.0.0.1", "127.0.0.2");
        send_raw(50, near, far, &[0; 8]);
        send_raw(89, near, far, &[0; 8]);
        send_raw(47, near, far, &[0; 8]);
        // GRE of PPTP, call 0x0102.
        send_raw(47, near, "127.0.0.3", &[0x30, 0x01, 0x88, 0x0b, 0, 0, 1, 2, 0, 0, 0, 1]);
        // The four steps by which SCTP connects: INIT, INIT ACK, COOKIE ECHO, COOKIE ACK.
        let packet = |ports: [u16; 2], tag: u32, chunk: &[u8]| {
            let [from, to] = ports.map(u16::to_be_bytes);
            [&from[..], &to, &tag.to_be_bytes(), &[0; 4], chunk].concat()
        };
        let (ours, theirs) = (0x1122_3344u32, 0x5566_7788u32);
        let init = |kind: u8, tag: u32, rest: &[u8]| {
            let length = 20 + rest.len() as u8;
            let fixed = [0, 0, 5, 220, 0, 10, 0, 10, 0, 0, 0, 1];
            [&[kind, 0, 0, length][..], &tag.to_be_bytes(), &fixed, rest].concat()
        };
        let (there, back) = ([5000, 6000], [6000, 5000]);
        send_raw(132, near, far, &packet(there, 0, &init(1, ours, &[])));
        send_raw(132, far, near, &packet(back, ours, &init(2, theirs, &[0, 7, 0, 4])));
        send_raw(132, near, far, &packet(there, theirs, &[10, 0, 0, 4]));
        send_raw(132, far, near, &packet(back, ours, &[11, 0, 0, 4]));

        let (all, _) = heard(&mut source);
        for counted in ["50 127.0.0.1:0 > 127.0.0.2:0", "89 127.0.0.1:0 > 127.0.0.2:0"] {
            assert_eq!(
                (expect(&all, counted).state.status, expect(&all, counted).state.timeout_s),
                (8, 600)
            );
        }
        for gre in ["gre 127.0.0.1:0 > 127.0.0.2:0", "gre 127.0.0.1:0 > 127.0.0.3:258"] {
            assert_eq!(expect(&all, gre).state.status, 8);
        }
        let sctp = expect(&all, "sctp 127.0.0.1:5000 > 127.0.0.2:6000");
        let value = (theirs as u64) << 32 | ours as u64;
        assert_eq!(sctp.extra.protoinfo, ProtoInfo { state: 4, role: 0, value });
        assert_eq!((sctp.state.status, sctp.extra.parts), (0xe, parts::PROTOINFO));

        // It goes on where it was restored with its tags: DATA passes with the right one only.
        run("nft 'add rule inet t rules ct state invalid drop'");
        let mut committer = Committer::open().expect("conntrack");
        assert_eq!(delete(&mut committer, &sctp.original), Outcome::Absent);
        assert_eq!(write(&mut committer, sctp), Outcome::Written);
        let restored = |source: &mut Source| {
            let c = dump(source)
                .into_iter()
                .find(|c| c.original == sctp.original)
                .expect("in the dump");
            (c.extra, c.state.timeout_s)
        };
        assert_eq!(restored(&mut source).0, sctp.extra);
        let data = [0, 3, 0, 20, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4];
        let send = |tag| try_raw(132, near, far, &packet(there, tag, &data));
        assert!(!send(theirs + 1), "a wrong tag is invalid");
        assert!(restored(&mut source).1 > KEPT_TIMEOUT_S / 2);
        assert!(send(theirs));
        assert!(restored(&mut source).1 < KEPT_TIMEOUT_S / 2, "the packet refreshed it");
    });
}
