//! Every kind of entry that conntrack has, written and read back field by field.

use hypersync::conn::extra::{Extra, HELPER_NAME, ProtoInfo, SeqAdj, Synproxy, parts};
use hypersync::conn::tuple::{DCCP, GRE, ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE};
use hypersync::conn::{Connection, Family, State, Tuple};
use hypersync::conntrack::codec::{self, MESSAGE_MAX, status};
use hypersync::conntrack::commit::KEPT_TIMEOUT_S;
use hypersync::conntrack::netlink::{Mailbox, Socket};

use super::*;

const ESP: u8 = 50;
const OSPF: u8 = 89;
const L2TP: u8 = 115;

/// With a rule that sets labels in the ruleset, the kernel gives every new entry room for them.
pub const LABEL_RULE: &str =
    "nft 'add table inet labels; add chain inet labels k; add rule inet labels k ct label set 127'";

/// Who is translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Nat {
    None,
    Source,
    Destination,
    Both,
}

/// A connection as an active would know it; `n` keeps several apart.
fn kind(protocol: u8, family: Family, nat: Nat, n: u32) -> Connection {
    let address = |net: u32, host: u32| match family {
        Family::V4 => (net << 16 | host) as u128,
        Family::V6 => 0x2001_0db8 << 96 | (net as u128) << 16 | host as u128,
    };
    let (sport, dport) = match (protocol, family) {
        (ICMP, _) => (77 + n as u16, 8 << 8),
        (ICMPV6, _) => (77 + n as u16, 128 << 8),
        (GRE, _) => (0x1234, 0x5678),
        (TCP | UDP | UDPLITE | SCTP, _) => (40_000 + n as u16, 21),
        _ => (0, 0),
    };
    let tuple =
        |src, dst, sport, dport| Tuple { src, dst, sport, dport, zone: 0, protocol, family };
    let original = tuple(address(0x0a00, n), address(0xc633, n), sport, dport);
    let mut reply = original.mirrored();
    let has_ports = matches!(protocol, TCP | UDP | UDPLITE | SCTP);
    if matches!(nat, Nat::Source | Nat::Both) {
        reply.dst = address(0xcb00, n);
        match protocol {
            ICMP | ICMPV6 => reply.sport += 1000,
            _ if has_ports => reply.dport += 1000,
            _ => {}
        }
    }
    if matches!(nat, Nat::Destination | Nat::Both) {
        reply.src = address(0xc0a8, n);
        reply.sport += if has_ports { 2000 } else { 0 };
    }
    let mut c = Connection::new(
        original,
        reply,
        State {
            status: status::CONFIRMED | status::SEEN_REPLY | status::ASSURED,
            timeout_s: 9,
            ..State::default()
        },
    );
    match protocol {
        TCP => {
            let State { status, timeout_s, .. } = c.state;
            c.state = State {
                status,
                tcp_state: 3,
                tcp_scale: 0x7a,
                tcp_flags_original: 0x03, // without its bit 0 on both sides, the kernel drops the scales
                tcp_flags_reply: 0x01,
                timeout_s,
                mark: 0,
            };
        }
        SCTP => {
            c.extra.parts = parts::PROTOINFO;
            c.extra.protoinfo = ProtoInfo { state: 4, role: 0, value: 0x0102_0304_0a0b_0c0d };
        }
        _ => {}
    }
    c
}

/// What the kernel makes of the status: the translation's bits are its own.
fn expected_status(c: &Connection) -> u32 {
    const NAT_DONE: u32 = 0x180;
    let mirrored = c.original.mirrored();
    let mut bits = c.state.status;
    if c.is_translated() {
        bits |= NAT_DONE;
        let is_icmp = matches!(c.original.protocol, ICMP | ICMPV6);
        let source = c.reply.dst != mirrored.dst || c.reply.dport != mirrored.dport;
        bits |=
            if source || is_icmp && c.reply.sport != mirrored.sport { status::SRC_NAT } else { 0 };
        let destination =
            c.reply.src != mirrored.src || !is_icmp && c.reply.sport != mirrored.sport;
        bits |= if destination { status::DST_NAT } else { 0 };
    }
    bits |= if c.extra.has(parts::SEQADJ) { status::SEQ_ADJUST } else { 0 };
    bits |= if c.extra.has(parts::HELPER) { 0x2000 } else { 0 };
    bits |= if c.original.protocol == GRE { status::FIXED_TIMEOUT } else { 0 };
    bits
}

/// Compares what is in the kernel with what was written, and says every difference.
fn check(there: &[Connection], written: &Connection) -> Result<(), String> {
    let Some(found) = there.iter().find(|c| c.original == written.original) else {
        return Err(format!("{}: not there", written.original));
    };
    let mut want = *written;
    want.state.status = expected_status(written);
    want.state.timeout_s = found.state.timeout_s;
    if written.original.protocol == TCP {
        // Windows are not copied: the kernel must not judge by them.
        want.state.tcp_flags_original |= 8;
        want.state.tcp_flags_reply |= 8;
    }
    if !(KEPT_TIMEOUT_S - 30..=KEPT_TIMEOUT_S).contains(&found.state.timeout_s) {
        return Err(format!("{}: timeout {}", written.original, found.state.timeout_s));
    }
    match *found == want {
        true => Ok(()),
        false => Err(format!("{}:\n   got {found:x?}\n  want {want:x?}", written.original)),
    }
}

#[test]
fn every_kind_is_restored_field_by_field() {
    in_namespace("every protocol, family and translation in conntrack", || {
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack");
        let mut written = Vec::new();
        for (family, icmp) in [(Family::V4, ICMP), (Family::V6, ICMPV6)] {
            for protocol in [TCP, UDP, UDPLITE, icmp, SCTP, GRE, ESP, OSPF, L2TP] {
                for nat in [Nat::None, Nat::Source, Nat::Destination, Nat::Both] {
                    let mut c = kind(protocol, family, nat, written.len() as u32 + 1);
                    c.state.mark = written.len() as u32;
                    written.push(c);
                }
            }
        }
        // Zones of both directions and of either, translated.
        for (both, original, reply) in [(5, 0, 0), (0, 6, 0), (0, 0, 7)] {
            for (protocol, family) in
                [(TCP, Family::V4), (UDP, Family::V6), (ICMP, Family::V4), (ESP, Family::V6)]
            {
                let mut c = kind(protocol, family, Nat::Both, written.len() as u32 + 1);
                (c.original.zone, c.reply.zone) = (both | original, both | reply);
                written.push(c);
            }
        }
        let mut wrong = Vec::new();
        for c in &written {
            let outcome = write(&mut committer, c);
            if outcome != Outcome::Written {
                wrong.push(format!("{} {outcome:?}", c.original));
            }
        }
        let there = dump(&mut source);
        for c in &written {
            wrong.extend(check(&there, c).err());
        }
        // And as another program reads it.
        let list = run(
            "conntrack -L -o extended 2>/dev/null; conntrack -L -f ipv6 -o extended 2>/dev/null",
        );
        for line in [
            "tcp 6 2073 ESTABLISHED src=10.0.0.4 dst=198.51.0.4 sport=40004 dport=21 \
             src=192.168.0.4 dst=203.0.0.4 sport=2021 dport=41004 [ASSURED] mark=3",
            "gre 47 2073 src=10.0.0.24 dst=198.51.0.24 srckey=0x1234 dstkey=0x5678 \
             src=192.168.0.24 dst=203.0.0.24 srckey=0x5678 dstkey=0x1234 [ASSURED] mark=23",
            "icmpv6 58 2073 src=2001:db8::a00:32 dst=2001:db8::c633:32 type=128 code=0 id=127 \
             src=2001:db8::c633:32 dst=2001:db8::cb00:32 type=129 code=0 id=1127 [ASSURED] mark=49",
        ] {
            let has_words = |text: &str| {
                let words: Vec<&str> = text.split_whitespace().collect();
                line.split_whitespace().all(|w| words.iter().any(|other| other.starts_with(w)))
            };
            assert!(list.lines().any(has_words), "{line} in {list}");
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        // Written again, they are brought up to date.
        for c in &mut written {
            c.state.mark += 1000;
            assert_eq!(write(&mut committer, c), Outcome::Written);
        }
        let there = dump(&mut source);
        wrong.extend(written.iter().filter_map(|c| check(&there, c).err()));
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        for c in &written {
            assert_eq!(delete(&mut committer, &c.original), Outcome::Absent);
        }
        assert_eq!(dump(&mut source), []);
        assert_eq!(events(&mut source), [], "all of this was our own");
    });
}

/// A connection that has everything that any can have.
fn everything(n: u32) -> Connection {
    let mut c = kind(TCP, Family::V4, Nat::Both, n);
    let mut helper = [0; HELPER_NAME];
    helper[..3].copy_from_slice(b"ftp");
    c.extra = Extra {
        parts: parts::ALL & !parts::PROTOINFO,
        labels: *b"\x01\0\0\0\0\0\0\x80\0\0\x02\0\0\0\0\x40",
        seqadj: [
            SeqAdj { correction_position: 1000, offset_before: 5, offset_after: 12 },
            SeqAdj {
                correction_position: 2000,
                offset_before: u32::MAX,
                offset_after: u32::MAX - 2,
            },
        ],
        helper,
        synproxy: Synproxy { isn: 0xdead_beef, its: 7, tsoff: 0xffff_0000 },
        protoinfo: ProtoInfo::default(),
    };
    c
}

#[test]
fn what_only_few_have_is_restored_and_brought_up_to_date() {
    in_namespace("labels, helpers, shifts and SYN proxies in conntrack", || {
        run(LABEL_RULE);
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack");
        let mut c = everything(1);
        assert_eq!(write(&mut committer, &c), Outcome::Written);
        check(&dump(&mut source), &c).expect("as written");
        c.extra.labels = [0x55; 16];
        c.extra.seqadj[0].offset_after = 99;
        c.extra.seqadj[1].correction_position += 3; // never back: the kernel shifts on
        c.extra.synproxy = Synproxy { isn: 1, its: 2, tsoff: 3 };
        assert_eq!(write(&mut committer, &c), Outcome::Written);
        check(&dump(&mut source), &c).expect("as written");
        c.extra.labels = [0; 16];
        assert_eq!(write(&mut committer, &c), Outcome::Written);
        c.extra.parts &= !parts::LABELS;
        check(&dump(&mut source), &c).expect("as written");
    });
}

/// A bare conversation with the kernel, without what a `Committer` makes of refusals.
struct Wire(Socket, Mailbox);

impl Wire {
    fn open() -> Wire {
        Wire(Socket::open().expect("conntrack"), Mailbox::new(Mailbox::BATCH, 4096))
    }

    /// The kernel's reason for refusing this request, 0 if it does not.
    fn errno(&mut self, encode: impl FnOnce(&mut [u8]) -> usize) -> i32 {
        let mut request = [0; MESSAGE_MAX];
        let length = encode(&mut request);
        codec::request_ack(&mut request);
        self.0.send(&request[..length]).expect("to send");
        assert!(self.1.receive(&self.0, Mailbox::BATCH).expect("an answer") > 0);
        let answers: Vec<codec::Answer> = self.1.messages().filter_map(codec::answer).collect();
        let [answer] = answers[..] else { panic!("one answer: {answers:?}") };
        answer.errno
    }

    fn create(&mut self, c: &Connection) -> i32 {
        self.errno(|b| codec::encode_create(b, 1, c, 600))
    }

    fn update(&mut self, c: &Connection, present: u32) -> i32 {
        self.errno(|b| codec::encode_update(b, 1, c, 600, present))
    }
}

fn found(source: &mut Source, original: &Tuple) -> Option<Connection> {
    dump(source).into_iter().find(|c| c.original == *original)
}

fn helper(name: &[u8]) -> Extra {
    let mut extra = Extra { parts: parts::HELPER, ..Extra::NONE };
    extra.helper[..name.len()].copy_from_slice(name);
    extra
}

#[test]
fn what_the_kernel_refuses() {
    in_namespace("what conntrack refuses", || {
        let mut wire = Wire::open();
        let mut source = Source::open(0, 1, &[], BUFFER).expect("conntrack");

        // Two zones in one entry: the kernel has one, for a direction or for both.
        let mut zones = kind(TCP, Family::V4, Nat::None, 1);
        (zones.original.zone, zones.reply.zone) = (1, 2);
        assert_eq!(wire.create(&zones), libc::EINVAL);
        // A kind of ICMP that opens no connection, and states that no kernel has yet.
        let mut unreachable = kind(ICMP, Family::V4, Nat::None, 2);
        unreachable.original.dport = 3 << 8;
        unreachable.reply = unreachable.original.mirrored();
        assert_eq!(wire.create(&unreachable), libc::EINVAL);
        for state in 0..12 {
            let mut sctp = kind(SCTP, Family::V4, Nat::None, 100 + state as u32);
            sctp.extra.protoinfo.state = state;
            assert_eq!(wire.create(&sctp), if state <= 8 { 0 } else { libc::ERANGE }, "{state}");
        }

        // A helper that this kernel does not have, or has for another protocol: nothing is created.
        let plain = kind(TCP, Family::V4, Nat::None, 3);
        for name in [&b"nobody"[..], b"tftp"] {
            assert_eq!(wire.create(&Connection { extra: helper(name), ..plain }), libc::EOPNOTSUPP);
        }
        // A helper for an entry that was made without one, or with another: nothing is changed.
        assert_eq!(wire.create(&plain), 0);
        let marked = |extra| {
            let mut c = Connection { extra, ..plain };
            c.state.mark = 5;
            c
        };
        assert_eq!(wire.update(&marked(helper(b"ftp")), 0xe), libc::EOPNOTSUPP);
        assert_eq!(wire.errno(|b| codec::encode_delete(b, 1, &plain.original)), 0);
        assert_eq!(wire.create(&Connection { extra: helper(b"ftp"), ..plain }), 0);
        assert_eq!(wire.update(&marked(helper(b"irc")), 0x200e), libc::EBUSY);
        assert_eq!(found(&mut source, &plain.original).map(|c| c.state.mark), Some(0));
        assert_eq!(wire.update(&marked(helper(b"ftp")), 0x200e), 0);
        assert_eq!(found(&mut source, &plain.original).map(|c| c.state.mark), Some(5));

        // Labels where no rule uses any: a new entry is made without them; an update fails at them,
        // after everything else in it was done.
        let mut labelled = kind(UDP, Family::V4, Nat::None, 4);
        labelled.extra = Extra { parts: parts::LABELS, labels: [1; 16], ..Extra::NONE };
        assert_eq!(wire.create(&labelled), 0);
        assert_eq!(found(&mut source, &labelled.original).map(|c| c.extra), Some(Extra::NONE));
        labelled.state.mark = 77;
        assert_eq!(wire.update(&labelled, 0xe), libc::ENOSPC);
        assert_eq!(found(&mut source, &labelled.original).map(|c| c.state.mark), Some(77));
    });
}

#[test]
fn what_the_kernel_takes_and_does_not_keep() {
    in_namespace("what conntrack cannot restore", || {
        let mut wire = Wire::open();
        let mut source = Source::open(0, 1, &[], BUFFER).expect("conntrack");

        // GRE keys are translated for the connections that PPTP's helper expects, and those are not
        // to be had.
        let mut gre = kind(GRE, Family::V4, Nat::Source, 1);
        gre.reply.dport += 9;
        assert_eq!(wire.create(&gre), 0);
        let there = found(&mut source, &gre.original).expect("an entry");
        assert_eq!((there.reply.dst, there.reply.dport), (gre.reply.dst, gre.original.sport));

        // That an entry was expected by another one is not restored.
        let mut related = kind(TCP, Family::V4, Nat::None, 2);
        related.state.status |= status::EXPECTED;
        assert_eq!(wire.create(&related), 0);
        assert_eq!(found(&mut source, &related.original).map(|c| c.state.status), Some(0xe));

        // Window scales are kept only if both sides' flags say that they are used.
        let mut scaled = kind(TCP, Family::V4, Nat::None, 3);
        scaled.state.tcp_flags_reply = 0;
        assert_eq!(wire.create(&scaled), 0);
        assert_eq!(found(&mut source, &scaled.original).map(|c| c.state.tcp_scale), Some(0));

        // A kernel without DCCP (6.17 and later) has one entry for all DCCP between two hosts.
        let mut dccp = kind(TCP, Family::V4, Nat::None, 4);
        (dccp.original.protocol, dccp.reply.protocol) = (DCCP, DCCP);
        dccp.extra.parts = parts::PROTOINFO;
        assert_eq!(wire.create(&dccp), 0);
        let there =
            dump(&mut source).into_iter().find(|c| c.original.protocol == DCCP).expect("an entry");
        if there.original.dport == 0 {
            assert_eq!((there.original.sport, there.extra), (0, Extra::NONE));
            dccp.original.sport += 1;
            dccp.reply = dccp.original.mirrored();
            assert_eq!(wire.create(&dccp), libc::EEXIST);
        }
    });
}

#[test]
fn a_restored_gre_entry_survives_packets_and_gets_another_timeout() {
    // GRE entries carry their own timeouts, set when their first packet is tracked. In one that
    // ctnetlink made they are zero, so that the first packet, which ought to refresh it, would end
    // it. Hence the fixed timeout.
    in_namespace("GRE through a restored entry", || {
        run("nft 'add table inet t; add chain inet t c { type filter hook input priority 0; }'
             nft 'add rule inet t c ct state invalid drop'");
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[], BUFFER).expect("conntrack");
        let assured = State { status: 0xe, mark: 1, ..State::default() };
        for (text, protocol) in
            [("gre 127.0.0.1:0 > 127.0.0.2:0", 47), ("50 127.0.0.1:0 > 127.0.0.2:0", 50)]
        {
            let original: Tuple = text.parse().expect("a tuple");
            let mut c = Connection::new(original, original.mirrored(), assured);
            assert_eq!(write(&mut committer, &c), Outcome::Written);
            for _ in 0..3 {
                send_raw(protocol, "127.0.0.1", "127.0.0.2", &[0; 8]);
                assert!(found(&mut source, &original).is_some(), "{text}");
            }
            c.state.mark = 2;
            assert_eq!(write(&mut committer, &c), Outcome::Written);
            assert_eq!(found(&mut source, &original).expect("an entry").state.mark, 2);
            committer.write(&c, Lifetime::Normal).expect("an empty batch");
            assert_eq!(outcomes(&mut committer), [Outcome::Written]);
            let rest = found(&mut source, &original).expect("an entry").state.timeout_s;
            assert!(rest <= 3600, "{text}: {rest}");
            send_raw(protocol, "127.0.0.1", "127.0.0.2", &[0; 8]);
            assert!(found(&mut source, &original).is_some(), "{text}");
        }
    });
}

/// Sends one packet of any protocol over lo.
pub fn send_raw(protocol: i32, from: &str, to: &str, payload: &[u8]) {
    assert!(try_raw(protocol, from, to, payload), "dropped by a rule");
}

/// The same, and whether it left: what a rule drops on its way out is EPERM.
pub fn try_raw(protocol: i32, from: &str, to: &str, payload: &[u8]) -> bool {
    let address = |text: &str| {
        let ip: Ipv4Addr = text.parse().expect("an address");
        libc::sockaddr_in {
            sin_family: libc::AF_INET as u16,
            sin_port: 0,
            sin_addr: libc::in_addr { s_addr: u32::from(ip).to_be() },
            sin_zero: [0; 8],
        }
    };
    let size = size_of::<libc::sockaddr_in>() as u32;
    // SAFETY: a fresh descriptor; both addresses and the payload outlive the calls that read them.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol);
        assert!(fd >= 0, "a raw socket");
        let (near, far) = (address(from), address(to));
        assert_eq!(libc::bind(fd, (&raw const near).cast(), size), 0);
        let sent = libc::sendto(
            fd,
            payload.as_ptr().cast(),
            payload.len(),
            0,
            (&raw const far).cast(),
            size,
        );
        libc::close(fd);
        sent == payload.len() as isize
    }
}
