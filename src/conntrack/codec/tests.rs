//! Golden messages of translated connections, both ways, and what may be written.

use super::*;
use crate::conn::extra::{HELPER_NAME, ProtoInfo, SeqAdj, Synproxy, parts};
use crate::conn::slot::groups;
use crate::conn::tuple::{DCCP, TCP};
use crate::conn::{Connection, Extra, State, Tuple};
use crate::source::{End, SourceEvent};

// Taken from a kernel 6.18 (x86-64): one TCP connection over lo with DNAT and SNAT by nftables
// from its first packet to `conntrack -D`, then entries made with `conntrack -I`.
const TCP_NEW: &str = "\
    c4000000000100060000000000000000020000003400018014000180080001007f000001080002007f0000051c000280\
    0500010006000000060002009c400000060003001f9000003400028014000180080001007f000001080002007f000009\
    1c00028005000100060000000600020000500000060003009c40000008000c006248708508000300000001b808000700\
    00000078300004802c0001800500010001000000050002000a0000000500030000000000060004000300000006000500\
    00000000";
const TCP_SYN_RECV: &str = "\
    c4000000000100000000000000000000020000003400018014000180080001007f000001080002007f0000051c000280\
    0500010006000000060002009c400000060003001f9000003400028014000180080001007f000001080002007f000009\
    1c00028005000100060000000600020000500000060003009c40000008000c006248708508000300000001ba08000700\
    0000003c300004802c0001800500010002000000050002000a000000050003000a000000060004000300000006000500\
    23000000";
const TCP_ESTABLISHED_UPDATE: &str = "\
    c4000000000100000000000000000000020000003400018014000180080001007f000001080002007f0000051c000280\
    0500010006000000060002009c400000060003001f9000003400028014000180080001007f000001080002007f000009\
    1c00028005000100060000000600020000500000060003009c40000008000c006248708508000300000001be08000700\
    00069780300004802c0001800500010003000000050002000a000000050003000a000000060004002300000006000500\
    23000000";
const TCP_DESTROY: &str = "\
    a400000002010000000000001d43b9a4020000003400018014000180080001007f000001080002007f0000051c000280\
    0500010006000000060002009c400000060003001f9000003400028014000180080001007f000001080002007f000009\
    1c00028005000100060000000600020000500000060003009c40000008000c006248708508000300000003be08000700\
    0006977f100004800c0001800500010003000000";
const UDP_ZONE: &str = "\
    c000000000010006000000001e150000020000003400018014000180080001000a000001080002000a0000021c000280\
    0500010011000000060002000005000006000300003500003400028014000180080001000a000002080002000a000001\
    1c000280050001001100000006000200003500000600030000050000060012000005000008000c000e49133e08000300\
    00000008080007000000003c1c0018800800010000000000080002000000000008000300000000000800080000000009";
const TCP_V6: &str = "\
    180100000001000600000000201500000a0000004c0001802c0001801400030020010db8000000000000000000000001\
    1400040020010db80000000000000000000000021c000280050001000600000006000200000500000600030000350000\
    4c0002802c0001801400030020010db80000000000000000000000021400040020010db8000000000000000000000001\
    1c00028005000100060000000600020000350000060003000005000008000c002ad26391080003000000000e08000700\
    0000003c300004802c000180050001000300000005000200000000000500030000000000060004000a00000006000500\
    0a0000001c0018800800010000000000080002000000000008000300000000000800080000000000";
const SNAT_ORIGINAL_ZONE: &str = "\
    f0000000000100060000000022150000020000003c00018014000180080001000a000001080002000a0000021c000280\
    05000100060000000600020000050000060003000035000006000300000300003400028014000180080001000a000002\
    08000200c00002011c00028005000100060000000600020000350000060003000309000008000c00bb3ba7e508000300\
    0000019e080007000000003c300004802c00018005000100030000000500020000000000050003000000000006000400\
    0a000000060005000a0000001c0018800800010000000000080002000000000008000300000000000800080000000000";
const RESTORED: &str = "\
    04010000000101060102030400000000020000003400018014000180080001000a00000108000200c63364071c000280\
    05000100060000000600020003e800000600030000500000340002801400018008000100c6336407080002000a000001\
    1c000280050001000600000006000200005000000600030003e80000080003000000000e080007000000025808000800\
    00000007300004802c0001800500010003000000050002000a0000000500030007000000060004000b0f000006000500\
    090f000020000d8008000100c633640714000380060001000050000006000200005000002000068008000100cb007101\
    140003800600010007d000000600020007d00000";

/// Those of them that the kernel sent.
pub const TRANSLATED: [&str; 7] = [
    TCP_NEW,
    TCP_SYN_RECV,
    TCP_ESTABLISHED_UPDATE,
    TCP_DESTROY,
    UDP_ZONE,
    TCP_V6,
    SNAT_ORIGINAL_ZONE,
];

pub fn bytes(hex: &str) -> Vec<u8> {
    let digit = |c: u8| (c as char).to_digit(16).unwrap() as u8;
    hex.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn tuple(text: &str) -> Tuple {
    text.parse().unwrap()
}

fn event(message: &[u8]) -> Result<SourceEvent, Malformed> {
    decode(message).map(|decoded| decoded.event)
}

fn seen(message: &str) -> (Connection, u8) {
    match event(&bytes(message)) {
        Ok(SourceEvent::Seen { connection, known }) => (connection, known),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_translated_tcp_connection_is_followed_from_its_birth_to_its_end() {
    let original = tuple("tcp 127.0.0.1:40000 > 127.0.0.5:8080");
    let reply = tuple("tcp 127.0.0.1:80 > 127.0.0.9:40000");
    for (message, status, timeout_s, tcp_state, tcp_scale, flags) in [
        (TCP_NEW, 0x1b8, 120, 1, 0x0a, (3, 0)),
        (TCP_SYN_RECV, 0x1ba, 60, 2, 0xaa, (3, 0x23)),
        (TCP_ESTABLISHED_UPDATE, 0x1be, 432_000, 3, 0xaa, (0x23, 0x23)),
    ] {
        let (tcp_flags_original, tcp_flags_reply) = flags;
        let state = State {
            status,
            tcp_state,
            tcp_scale,
            tcp_flags_original,
            tcp_flags_reply,
            timeout_s,
            mark: 0,
        };
        let known = groups::TUPLES | groups::STATE | groups::TIMEOUT;
        assert_eq!(seen(message), (Connection::new(original, reply, state), known));
    }
    let end = End::Unseen { left_s: 431_999 };
    assert_eq!(event(&bytes(TCP_DESTROY)), Ok(SourceEvent::Gone { original, end }));
}

#[test]
fn zones_marks_and_families_are_read() {
    let (udp, known) = seen(UDP_ZONE);
    assert_eq!(udp.original, tuple("udp 10.0.0.1:5 > 10.0.0.2:53 zone 5"));
    assert_eq!((udp.reply.zone, udp.state.mark, known), (5, 9, groups::ALL & !groups::EXTRA));
    let (six, _) = seen(TCP_V6);
    assert_eq!(six.reply, tuple("tcp [2001:db8::2]:53 > [2001:db8::1]:5"));
    let (snat, _) = seen(SNAT_ORIGINAL_ZONE);
    assert_eq!(snat.original, tuple("tcp 10.0.0.1:5 > 10.0.0.2:53 zone 3"));
    assert_eq!(snat.reply, tuple("tcp 10.0.0.2:53 > 192.0.2.1:777"));
    assert_eq!(snat.state.status, 0x19e);
}

#[test]
fn what_a_message_leaves_out_is_not_known() {
    // Attributes turned into others that nobody knows (200).
    for (kind, missing) in
        [(3, groups::STATE), (4, groups::STATE), (7, groups::TIMEOUT), (8, groups::MARK)]
    {
        let mut message = bytes(SNAT_ORIGINAL_ZONE);
        let mut at = HEADERS;
        while at < message.len() {
            let length = u16::from_ne_bytes([message[at], message[at + 1]]) as usize;
            if message[at + 2] == kind {
                message[at + 2] = 200;
            }
            at += length.next_multiple_of(4);
        }
        let Ok(SourceEvent::Seen { known, .. }) = event(&message) else {
            panic!("still a connection")
        };
        assert_eq!(known & missing, 0, "attribute {kind}");
    }
}

#[test]
fn each_kind_of_nonsense_has_its_name() {
    let whole = bytes(TCP_NEW);
    let patched = |at: usize, value: u8| {
        let mut message = whole.clone();
        message[at] = value;
        event(&message)
    };
    assert_eq!(event(&whole[..19]), Err(Malformed::Short));
    assert_eq!(event(&whole[..40]), Err(Malformed::Short), "the header says more");
    assert_eq!(patched(5, 2), Err(Malformed::Type), "an expectation");
    assert_eq!(patched(16, 9), Err(Malformed::Family));
    assert_eq!(patched(16, 10), Err(Malformed::NoAddress), "IPv4 addresses are not IPv6 ones");
    assert_eq!(patched(20, 3), Err(Malformed::AttributeLength));
    assert_eq!(patched(21, 9), Err(Malformed::AttributeLength));
    assert_eq!(patched(22, 99), Err(Malformed::NoOriginal));
    assert_eq!(patched(48, 6), Err(Malformed::FieldSize), "a protocol of two bytes");
    assert_eq!(patched(50, 99), Err(Malformed::NoProtocol));
    assert_eq!(patched(52, 17), Err(Malformed::TwoProtocols));
    assert_eq!(patched(74, 99), Err(Malformed::NoReply));
}

fn snat() -> Connection {
    Connection::new(
        tuple("tcp 10.0.0.1:1000 > 198.51.100.7:80"),
        tuple("tcp 198.51.100.7:80 > 203.0.113.1:2000"),
        State {
            status: 0x19e,
            tcp_state: 3,
            tcp_scale: 0x7a,
            tcp_flags_original: 0x23,
            tcp_flags_reply: 0x21,
            timeout_s: 1,
            mark: 7,
        },
    )
}

#[test]
fn a_restored_connection_has_a_mirrored_reply_and_its_translation_apart() {
    // Entries made from these bytes were seen to translate real traffic
    // (tests/conntrack/traffic.rs).
    let mut buffer = [0xa5; MESSAGE_MAX];
    let length = encode_create(&mut buffer, 0x0403_0201, &snat(), 600);
    assert_eq!(hex(&buffer[..length]), RESTORED);
    assert_eq!(&buffer[length..], &[0xa5; MESSAGE_MAX][length..], "nothing is written beyond");
}

#[test]
fn an_update_has_no_translation_and_takes_nothing_back() {
    let mut buffer = [0xa5; MESSAGE_MAX];
    let mut connection = snat();
    connection.state.status = status::CONFIRMED | status::SEEN_REPLY;
    let length = encode_update(&mut buffer, 1, &connection, 600, 0x19e);
    let kinds: Vec<u16> = Attributes::new(&buffer[HEADERS..length]).map(|a| a.unwrap().0).collect();
    assert_eq!(
        kinds,
        [number::TUPLE_ORIG, number::STATUS, number::TIMEOUT, number::MARK, number::PROTOINFO]
    );
    let status = Attributes::new(&buffer[HEADERS..length]).nth(1).unwrap().unwrap().1;
    assert_eq!(status, 0x19eu32.to_be_bytes());
}

#[test]
fn a_restored_connection_claims_no_more_than_the_active_had() {
    let mut buffer = [0xa5; MESSAGE_MAX];
    let mut connection = snat();
    for (active, restored) in [(0x19e, 0xe), (0x19a, 0xa), (0x198, 8), (0x99e, 0xe), (0x21e, 0xe)] {
        connection.state.status = active;
        let length = encode_create(&mut buffer, 1, &connection, 600);
        let status = Attributes::new(&buffer[HEADERS..length])
            .map(|a| a.unwrap())
            .find_map(|(kind, payload)| (kind == number::STATUS).then_some(payload));
        assert_eq!(status, Some(&u32::to_be_bytes(restored)[..]), "{active:#x}");
    }
}

#[test]
fn whatever_is_encoded_decodes_to_the_mirrored_connection_and_fits() {
    let six = "tcp [2001:db8::1]:1000 > [2001:db8::2]:80 zone 5";
    let ping = "icmp 10.0.0.1:77 > 10.0.0.2:2048";
    for text in [
        "tcp 10.0.0.1:1 > 10.0.0.2:2",
        "gre 10.0.0.1:7 > 10.0.0.2:9",
        "50 10.0.0.1:0 > 10.0.0.2:0",
        six,
        ping,
    ] {
        let original = tuple(text);
        let mut reply = original.mirrored();
        reply.dst += 1; // translated
        let mut buffer = [0xa5; MESSAGE_MAX];
        let length = encode_create(&mut buffer, 1, &Connection { original, reply, ..snat() }, 5);
        assert!(length < 430, "{length}");
        let Ok(SourceEvent::Seen { connection, known }) = event(&buffer[..length]) else {
            panic!("{text}")
        };
        assert_eq!(
            (connection.original, connection.reply),
            (original, original.mirrored()),
            "{text}"
        );
        assert_eq!(
            (connection.state.mark, connection.state.timeout_s, known),
            (7, 5, groups::ALL & !groups::EXTRA)
        );
        let length = encode_delete(&mut buffer, 1, &original);
        assert_eq!(event(&buffer[..length]), Ok(SourceEvent::Gone { original, end: End::UNTOLD }));
    }
}

#[test]
fn the_longest_request_fits() {
    // All that a translated TCP connection over IPv6 can have, in zones of its own.
    let original = tuple("tcp [2001:db8::1]:1000 > [2001:db8::2]:80 zone 5");
    let reply = tuple("tcp [2001:db8::3]:81 > [2001:db8::4]:1001 zone 6");
    let extra = Extra { parts: parts::ALL, labels: [0xff; 16], helper: [b'x'; 16], ..Extra::NONE };
    let mut buffer = [0xa5; MESSAGE_MAX];
    let mut lengths = [0; 2];
    for protocol in 0..=255 {
        for state in [snat().state, State { mark: 1, ..snat().state }] {
            let mut connection = Connection { original, reply, state, extra };
            (connection.original.protocol, connection.reply.protocol) = (protocol, protocol);
            let short = encode_create(&mut buffer, 1, &connection, 5);
            // Sixteen bytes without a zero behind are no name.
            connection.extra.helper[15] = 0;
            let length = encode_create(&mut buffer, 1, &connection, 5);
            assert_eq!(length - short, 24);
            lengths[0] = lengths[0].max(length);
            lengths[1] = lengths[1].max(encode_update(&mut buffer, 1, &connection, 5, 0x19e));
        }
    }
    assert_eq!(lengths, [LONGEST_CREATE, LONGEST_UPDATE]);
    assert!(lengths.iter().all(|length| *length <= MESSAGE_MAX));
}
const LONGEST_CREATE: usize = 476;
const LONGEST_UPDATE: usize = 324;

#[test]
fn labels_are_replaced_and_a_helper_that_has_no_name_is_not_handed_on() {
    let mut connection = snat();
    connection.extra = Extra {
        parts: parts::LABELS | parts::HELPER,
        helper: *b"ftp\0\0\0\0\0\0\0\0\0\0\0\0\0",
        ..Extra::NONE
    };
    let mut buffer = [0xa5; MESSAGE_MAX];
    let length = encode_update(&mut buffer, 1, &connection, 600, 0x19e);
    let last: Vec<_> =
        Attributes::new(&buffer[HEADERS..length]).map(|a| a.unwrap()).skip(6).collect();
    assert_eq!(last, [(number::LABELS, &[0; 16][..]), (number::LABELS_MASK, &[0xff; 16][..])]);
    let length = encode_create(&mut buffer, 1, &connection, 600);
    let kinds: Vec<u16> = Attributes::new(&buffer[HEADERS..length]).map(|a| a.unwrap().0).collect();
    assert!(
        kinds.contains(&number::HELP) && !kinds.contains(&number::LABELS),
        "a new entry has no labels"
    );
    // The kernel loads modules by this name: what is no name is not handed on.
    for bad in [[0; 16], [b'x'; 16], *b"a b\0\0\0\0\0\0\0\0\0\0\0\0\0", [200; 16]] {
        connection.extra.helper = bad;
        let length = encode_create(&mut buffer, 1, &connection, 600);
        assert!(
            Attributes::new(&buffer[HEADERS..length]).all(|a| a.unwrap().0 != number::HELP),
            "{bad:?}"
        );
    }
}

fn rich() -> Extra {
    let mut helper = [0; HELPER_NAME];
    helper[..15].copy_from_slice(b"fifteen-letters");
    let adjustment =
        |n| SeqAdj { correction_position: n, offset_before: n + 1, offset_after: u32::MAX };
    Extra {
        parts: parts::ALL,
        labels: std::array::from_fn(|i| i as u8 + 1),
        seqadj: [adjustment(1000), adjustment(2000)],
        helper,
        synproxy: Synproxy { isn: 7, its: 8, tsoff: 9 },
        protoinfo: ProtoInfo { state: 3, role: 0, value: 0x1234_5678_9abc_def0 },
    }
}

#[test]
fn what_only_few_connections_have_reads_back_and_fits() {
    for text in [
        "tcp 10.0.0.1:1 > 10.0.0.2:2",
        "sctp [2001:db8::1]:1000 > [2001:db8::2]:80",
        "dccp 10.0.0.1:1 > 10.0.0.2:2",
    ] {
        let mut original = tuple(text);
        original.zone = 3;
        let mut reply = Tuple { zone: 4, ..original.mirrored() };
        (reply.src, reply.dst) = (reply.src + 1, reply.dst + 1);
        let protocol = original.protocol;
        let mut extra = rich();
        match protocol {
            TCP => {
                (extra.parts, extra.protoinfo) =
                    (parts::ALL & !parts::PROTOINFO, ProtoInfo::default())
            }
            DCCP => extra.protoinfo.role = 1,
            _ => {}
        }
        let connection = Connection { original, reply, extra, ..snat() };
        // One byte more than is said to be enough would be overwritten.
        let mut buffer = [0x55; MESSAGE_MAX + 1];
        for length in [
            encode_create(&mut buffer[..MESSAGE_MAX], 1, &connection, 5),
            encode_update(&mut buffer[..MESSAGE_MAX], 1, &connection, 5, 0),
        ] {
            assert!(length <= MESSAGE_MAX && buffer[MESSAGE_MAX] == 0x55);
        }
        let length = encode_create(&mut buffer, 1, &connection, 5);
        let Ok(SourceEvent::Seen { connection: read, .. }) = event(&buffer[..length]) else {
            panic!("{text}")
        };
        assert_eq!((read.extra, read.original), (extra, original), "{text}");
        assert_eq!(read.reply.zone, 4);
    }
}

#[test]
fn what_a_newer_kernel_writes_in_another_form_is_left_out_and_counted() {
    let connection = Connection { extra: rich(), ..snat() };
    let mut buffer = [0xa5; MESSAGE_MAX];
    let length = encode_create(&mut buffer, 1, &connection, 5);
    let (mut at, mut cut) = (HEADERS, 0);
    while at < length {
        let size = u16::from_ne_bytes([buffer[at], buffer[at + 1]]) as usize;
        let kind = u16::from_ne_bytes([buffer[at + 2], buffer[at + 3]]) & number::TYPE_MASK;
        if !matches!(
            kind,
            number::TUPLE_ORIG | number::TUPLE_REPLY | number::ZONE | number::LABELS_MASK
        ) && !matches!(kind, number::NAT_SRC | number::NAT_DST)
        {
            // Its payload ends in the middle of a field.
            let mut message = buffer[..at].to_vec();
            message.extend(((size - 2) as u16).to_ne_bytes());
            message.extend(&buffer[at + 2..length]);
            let decoded = decode(&message).expect("the rest is used");
            assert_eq!(decoded.skipped, 1, "attribute {kind}");
            let SourceEvent::Seen { connection: read, .. } = decoded.event else { panic!() };
            assert_eq!(
                (read.original, read.reply),
                (connection.original, connection.original.mirrored())
            );
            cut += 1;
        }
        at += size.next_multiple_of(4);
    }
    assert_eq!(
        cut, 9,
        "status, timeout, mark, protoinfo, labels, helper, two adjustments, SYN proxy"
    );
}

#[test]
fn an_entry_without_a_mark_has_none_and_an_event_without_one_leaves_it() {
    let mut connection = snat();
    connection.state.mark = 0;
    let mut buffer = [0xa5; MESSAGE_MAX];
    let length = encode_create(&mut buffer, 1, &connection, 5);
    let known = |decoded: Decoded| match decoded.event {
        SourceEvent::Seen { known, .. } => known,
        gone => panic!("{gone:?}"),
    };
    assert_eq!(known(decode(&buffer[..length]).unwrap()) & groups::MARK, 0);
    assert_eq!(known(decode_entry(&buffer[..length]).unwrap()) & groups::MARK, groups::MARK);
}

#[test]
fn the_end_of_an_entry_is_seen_in_a_final_state_unless_no_packet_had_passed_it() {
    let end = |tcp_state: u8, timeout_s: u32| {
        let original: Tuple = "tcp 10.0.0.1:1 > 10.0.0.2:2".parse().expect("a tuple");
        let state = State { tcp_state, timeout_s, ..State::default() };
        end_of(&Connection::new(original, original.mirrored(), state))
    };
    assert_eq!([6, 7, 8].map(|state| end(state, 30)), [End::Seen; 3]);
    assert_eq!([0, 1, 2, 3, 4, 5].map(|state| end(state, 30)), [End::Unseen { left_s: 30 }; 6]);
    // Somebody deleted a copy, whose active was closing: here it has the timeout that only we give.
    assert_eq!([6, 7, 8].map(|state| end(state, GIVEN_MAX_S + 1)), [End::UNTOLD; 3]);
}
