//! Every kind of entry that conntrack has, written and read back field by field.

use hypersync::conn::extra::{Extra, HELPER_NAME, ProtoInfo, SeqAdj, Synproxy, parts};
use hypersync::conn::tuple::{GRE, ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE};
use hypersync::conn::{Connection, Family, State, Tuple};
use hypersync::conntrack::codec::status;
use hypersync::conntrack::commit::KEPT_TIMEOUT_S;

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
    let tuple = |src, dst, sport, dport| Tuple { src, dst, sport, dport, zone: 0, protocol, family };
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
        bits |= if source || is_icmp && c.reply.sport != mirrored.sport { status::SRC_NAT } else { 0 };
        let destination = c.reply.src != mirrored.src || !is_icmp && c.reply.sport != mirrored.sport;
        bits |= if destination { status::DST_NAT } else { 0 };
    }
    bits |= if c.extra.has(parts::SEQADJ) { status::SEQ_ADJUST } else { 0 };
    bits |= if c.extra.has(parts::HELPER) { 0x2000 } else { 0 };
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
        let list = run("conntrack -L -o extended 2>/dev/null; conntrack -L -f ipv6 -o extended 2>/dev/null");
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
            assert_eq!(delete(&mut committer, &c.original), Outcome::Removed);
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
            SeqAdj { correction_position: 2000, offset_before: u32::MAX, offset_after: u32::MAX - 2 },
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
        c.extra.seqadj[1].correction_position = 3;
        c.extra.synproxy = Synproxy { isn: 1, its: 2, tsoff: 3 };
        assert_eq!(write(&mut committer, &c), Outcome::Written);
        check(&dump(&mut source), &c).expect("as written");
        c.extra.labels = [0; 16];
        assert_eq!(write(&mut committer, &c), Outcome::Written);
        c.extra.parts &= !parts::LABELS;
        check(&dump(&mut source), &c).expect("as written");
    });
}

#[test]
fn what_the_kernel_cannot_restore() {
    in_namespace("what conntrack refuses, or takes and forgets", || {
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack");

        // Two zones in one entry: the kernel has one zone, for either direction or for both.
        let mut zones = kind(TCP, Family::V4, Nat::None, 1);
        (zones.original.zone, zones.reply.zone) = (1, 2);
        println!("zones {:?}", write(&mut committer, &zones));

        // Labels without a rule that sets any: a new entry is made without them, an update fails at
        // them, after everything else in it was done.
        let mut labels = kind(UDP, Family::V4, Nat::None, 2);
        labels.extra = Extra { parts: parts::LABELS, labels: [1; 16], ..Extra::NONE };
        println!("labels {:?}", write(&mut committer, &labels));
        println!("{:x?}", dump(&mut source));
        labels.state.mark = 77;
        println!("labels again {:?}", write(&mut committer, &labels));
        println!("{:x?}", dump(&mut source).iter().map(|c| c.state.mark).collect::<Vec<_>>());

        // A helper that this kernel does not have: refused altogether.
        let mut helper = everything(3);
        helper.extra.parts = parts::HELPER;
        helper.extra.helper[..4].copy_from_slice(b"nosu");
        println!("helper {:?}", write(&mut committer, &helper));
        helper.extra.helper[..4].copy_from_slice(b"tftp");
        println!("helper of UDP {:?}", write(&mut committer, &helper));
        println!("{}", run("conntrack -L -o extended,id,labels 2>/dev/null"));
        // A helper for an entry that has none
        let mut later = kind(TCP, Family::V4, Nat::None, 4);
        println!("{:?}", write(&mut committer, &later));
        later.extra = Extra { parts: parts::HELPER, helper: everything(3).extra.helper, ..Extra::NONE };
        println!("{:?}", write(&mut committer, &later));
        println!("{}", run("conntrack -L -o extended,id,labels 2>/dev/null"));

        // GRE with other keys
        let mut gre = kind(GRE, Family::V4, Nat::Source, 5);
        gre.reply.dport += 9;
        println!("gre {:?}", write(&mut committer, &gre));
        println!("{}", run("conntrack -L -p gre -o extended,id,labels 2>/dev/null"));
        // DCCP
        let mut dccp = kind(TCP, Family::V4, Nat::None, 6);
        (dccp.original.protocol, dccp.reply.protocol) = (33, 33);
        dccp.state.tcp_state = 0;
        dccp.extra = Extra {
            parts: parts::PROTOINFO,
            protoinfo: ProtoInfo { state: 4, role: 1, value: 77 },
            ..Extra::NONE
        };
        println!("dccp {:?}", write(&mut committer, &dccp));
        println!("dccp {:?}", write(&mut committer, &dccp));
        println!("{}", run("conntrack -L -p 33 -o extended,id,labels 2>/dev/null"));
        // SCTP bad state
        for state in 0..12 {
            let mut sctp = kind(SCTP, Family::V4, Nat::None, 60 + state as u32);
            sctp.extra.protoinfo.state = state;
            println!("sctp {state} {:?}", write(&mut committer, &sctp));
        }
        println!("{}", run("conntrack -L -p sctp -o extended,id,labels 2>/dev/null"));
        // ICMP types
        let mut icmp = kind(ICMP, Family::V4, Nat::None, 7);
        icmp.original.dport = 3 << 8;
        icmp.reply = icmp.original.mirrored();
        println!("icmp 3 {:?}", write(&mut committer, &icmp));
        // GRE timeouts
        run(
            "nft 'add table inet t; add chain inet t c { type filter hook input priority 0; }; add rule inet t c ct state invalid drop'",
        );
        let original: Tuple = "gre 127.0.0.1:0 > 127.0.0.2:0".parse().unwrap();
        let mut g = kind(GRE, Family::V4, Nat::None, 5);
        g.original = original;
        g.reply = original.mirrored();
        println!("gre {:?}", write(&mut committer, &g));
        let esp: Tuple = "50 127.0.0.1:0 > 127.0.0.2:0".parse().unwrap();
        println!(
            "esp {:?}",
            write(&mut committer, &Connection { original: esp, reply: esp.mirrored(), ..g })
        );
        println!("{}", run("conntrack -L -o extended,id,labels 2>/dev/null | grep -E ' (gre|unknown) '"));
        run("python3 -c \"
import socket
for p in (47, 50):
  s=socket.socket(socket.AF_INET,socket.SOCK_RAW,p); s.bind(('127.0.0.1',0)); s.sendto(bytes(8),('127.0.0.2',0))
\"");
        println!("{}", run("conntrack -L -o extended,id,labels 2>/dev/null | grep -E ' (gre|unknown) '"));
        std::thread::sleep(std::time::Duration::from_secs(2));
        println!("{}", run("conntrack -L -o extended,id,labels 2>/dev/null | grep -E ' (gre|unknown) '"));
    });
}
