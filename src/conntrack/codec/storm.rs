//! A storm of broken and strange messages: what no kernel sends today, and what one may send
//! tomorrow.

use super::tests::{TRANSLATED, bytes};
use super::*;
use crate::conn::extra::parts;
use crate::conn::slot::groups;
use crate::source::SourceEvent;

/// Numbers that a seed reproduces.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

fn all() -> Vec<Vec<u8>> {
    golden::EVENTS.iter().chain(&golden::ENTRIES).chain(&TRANSLATED).map(|hex| bytes(hex)).collect()
}

/// The outermost attributes of a message, each with its padding.
fn attributes(message: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = &message[HEADERS..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let length = u16::from_ne_bytes([rest[0], rest[1]]) as usize;
        let (attribute, behind) = rest.split_at(length.next_multiple_of(4));
        found.push(attribute.to_vec());
        rest = behind;
    }
    found
}

fn assembled(message: &[u8], attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut whole = message[..HEADERS].to_vec();
    whole.extend(attributes.concat());
    let length = whole.len() as u32;
    whole[..4].copy_from_slice(&length.to_ne_bytes());
    whole
}

fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut attribute = (payload.len() as u16 + 4).to_ne_bytes().to_vec();
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(payload);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// Whatever was understood can be written again, and means the same then.
fn assert_fits(decoded: &Decoded) {
    let mut buffer = [0xa5; MESSAGE_MAX];
    match decoded.event {
        SourceEvent::Seen { connection, .. } => {
            let length = encode_create(&mut buffer, 1, &connection, 5);
            let Ok(Decoded { event: SourceEvent::Seen { connection: again, .. }, skipped: 0 }) =
                decode(&buffer[..length])
            else {
                panic!("{connection:?} was written so that it cannot be read")
            };
            let name = |c: &crate::conn::Connection| {
                (c.original.src, c.original.dst, c.original.protocol, c.original.zone, c.reply.zone)
            };
            assert_eq!(name(&again), name(&connection));
            assert_eq!(again.extra.parts & !connection.extra.parts, 0, "nothing is added");
            encode_update(&mut buffer, 1, &connection, 5, u32::MAX);
            encode_get(&mut buffer, 1, &connection.original);
        }
        SourceEvent::Gone { original, .. } => {
            encode_delete(&mut buffer, 1, &original);
        }
    }
}

#[test]
fn no_broken_message_is_more_than_an_error() {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let goldens = all();
    let mut outcomes = [0; 3];
    for _ in 0..300_000 {
        let mut message = goldens[dice.below(goldens.len())].clone();
        for _ in 0..dice.below(8) {
            let at = dice.below(message.len());
            match dice.below(3) {
                0 => message[at] ^= 1 << dice.below(8),
                // Small values and extremes are what lengths and types stumble over.
                _ => {
                    message[at] =
                        [dice.below(256), dice.below(16), 0, 255, 128][dice.below(5)] as u8
                }
            }
        }
        match dice.below(5) {
            0 => message.truncate(dice.below(message.len() + 1)),
            1 => {
                let length = (dice.below(message.len()) as u32).to_ne_bytes();
                message[..4].copy_from_slice(&length);
            }
            _ => {}
        }
        answer(&message);
        is_expectation(&message);
        for decoded in [decode(&message), decode_entry(&message)] {
            match decoded {
                Ok(decoded) => {
                    assert_fits(&decoded);
                    outcomes[(decoded.skipped > 0) as usize] += 1;
                }
                Err(_) => outcomes[2] += 1,
            }
        }
    }
    assert!(outcomes.iter().all(|&n| n > 10_000), "every path is walked: {outcomes:?}");
}

#[test]
fn neither_order_nor_unknown_attributes_change_what_a_message_says() {
    let mut dice = Dice(7);
    for message in all() {
        let meaning = decode(&message);
        assert!(meaning.is_ok());
        for _ in 0..500 {
            let mut parts = attributes(&message);
            for _ in 0..dice.below(4) {
                let (a, b) = (dice.below(parts.len()), dice.below(parts.len()));
                parts.swap(a, b);
            }
            for _ in 0..dice.below(4) {
                let payload: Vec<u8> = (0..dice.below(40)).map(|_| dice.below(256) as u8).collect();
                let flags = [0, 0x8000, 0x4000][dice.below(3)];
                let unknown = attribute((27 + dice.below(1000) as u16) | flags, &payload);
                parts.insert(dice.below(parts.len() + 1), unknown);
            }
            assert_eq!(decode(&assembled(&message, &parts)), meaning);
        }
    }
}

#[test]
fn an_attribute_of_an_unexpected_size_costs_that_attribute_only() {
    let everything = bytes(golden::EVERYTHING_ENTRY);
    let sctp = bytes(golden::SCTP_ENTRY);
    let meaning_of = |message: &[u8]| match decode_entry(message) {
        Ok(Decoded { event: SourceEvent::Seen { connection, known }, skipped }) => {
            (connection, known, skipped)
        }
        other => panic!("{other:?}"),
    };
    for (message, kind, group, part) in [
        (&everything, number::STATUS, groups::STATE, 0),
        (&everything, number::PROTOINFO, groups::STATE, 0),
        (&everything, number::TIMEOUT, groups::TIMEOUT, 0),
        (&everything, number::MARK, groups::MARK, 0),
        (&everything, number::LABELS, 0, parts::LABELS),
        (&everything, number::HELP, 0, parts::HELPER),
        (&everything, number::SEQ_ADJ_REPLY, 0, 0),
        (&everything, number::SYNPROXY, 0, parts::SYNPROXY),
        (&sctp, number::PROTOINFO, groups::EXTRA, parts::PROTOINFO),
    ] {
        let (whole, known, skipped) = meaning_of(message);
        assert_eq!(skipped, 0);
        for payload in [&[1u8, 0, 1][..], &[9; 7], &[0; 18]] {
            let mut attributes = attributes(message);
            for one in &mut attributes {
                if u16::from_ne_bytes([one[2], one[3]]) & number::TYPE_MASK == kind {
                    *one = attribute(kind, payload);
                }
            }
            let (rest, known_now, skipped) = meaning_of(&assembled(message, &attributes));
            assert_eq!((known_now, skipped), (known & !group, 1), "{kind}: {payload:?}");
            assert_eq!(rest.extra.parts, whole.extra.parts & !part, "{kind}");
            assert_eq!((rest.original, rest.reply), (whole.original, whole.reply), "{kind}");
        }
    }
}
