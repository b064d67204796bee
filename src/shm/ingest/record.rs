//! A record of the ring: 128 bytes that say what a data plane saw.
//!
//! ```text
//!  word 63                             32 31                              0
//!   0   | orig. zone   | reply zone       | protocol | family | known | kind |
//!   1   | orig. sport  | orig. dport      |  reply sport  |   reply dport   |
//!   2   |             mark                |      timeout, seconds           |
//!   3   |    conntrack status             | tcp: state | scale | fl.o | fl.r|
//!   4,5   original source           6,7   original destination
//!   8,9   reply source             10,11  reply destination                    (low word first)
//!  12-14  zero
//!  15   check: a mix of words 0 to 14 and the record's position
//! ```
//!
//! Kind 1 is "seen", 2 is "gone" (of which only the original tuple counts; bit 0 of `known`: nobody
//! saw the end, and the timeout is what was left then); the family is 4 or 6; `known` are the
//! groups of [`crate::conn::slot::groups`]. The check word finds mistakes, a record of an earlier
//! round and one that is written while it is read; it keeps no attacker out.

use crate::conn::slot::groups;
use crate::conn::tuple::{DCCP, ICMP, ICMPV6, SCTP, TCP, has_keys};
use crate::conn::{Connection, Family, State, Tuple, shard_of};
use crate::source::{End, SourceEvent};

/// Why a record, or the producer's position, was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadRecord {
    /// The producer's position jumped ahead or back: what lay between is lost.
    Position,
    /// The check word does not fit.
    Check,
    /// Neither "seen" nor "gone", unknown groups, or something where zero belongs.
    Kind,
    /// Neither IPv4 nor IPv6, or an IPv4 address of more than 32 bits.
    Family,
    /// Protocol 0, or one of the other family.
    Protocol,
    /// Ports where the protocol has none, or none where it needs them.
    Ports,
    /// The connection belongs to another shard.
    Shard,
}

/// A record outside the ring, which nobody else changes.
pub type Words = [u64; 16];

const SEEN: u64 = 1;
const GONE: u64 = 2;

/// Writes an event as the record at `position`.
pub fn encode(event: &SourceEvent, position: u64) -> Words {
    let mut w = [0; 16];
    match event {
        SourceEvent::Seen { connection, known } => {
            w[0] = SEEN | (*known as u64) << 8 | (connection.reply.zone as u64) << 32;
            put_tuple(&mut w, &connection.original, 4, 32);
            put_tuple(&mut w, &connection.reply, 8, 0);
            let s = &connection.state;
            let tcp = [s.tcp_state, s.tcp_scale, s.tcp_flags_original, s.tcp_flags_reply];
            w[2] = (s.mark as u64) << 32 | s.timeout_s as u64;
            w[3] = (s.status as u64) << 32 | u32::from_be_bytes(tcp) as u64;
            put_small(&mut w, &connection.original);
        }
        SourceEvent::Gone { original, end } => {
            w[0] = GONE;
            if let End::Unseen { left_s } = end {
                w[0] |= 1 << 8;
                w[2] = *left_s as u64;
            }
            put_tuple(&mut w, original, 4, 32);
            put_small(&mut w, original);
        }
    }
    w[15] = check(&w, position);
    w
}

fn put_small(w: &mut Words, original: &Tuple) {
    let family = if original.family == Family::V4 { 4 } else { 6 };
    w[0] |= family << 16 | (original.protocol as u64) << 24 | (original.zone as u64) << 48;
}

fn put_tuple(w: &mut Words, t: &Tuple, at: usize, ports_at: u32) {
    w[1] |= ((t.sport as u64) << 16 | t.dport as u64) << ports_at;
    for (i, address) in [t.src, t.dst].into_iter().enumerate() {
        w[at + 2 * i] = address as u64;
        w[at + 2 * i + 1] = (address >> 64) as u64;
    }
}

/// Reads the record at `position`, in the ring of `shard` (of `shards`).
pub fn decode(w: &Words, position: u64, shard: u8, shards: u8) -> Result<SourceEvent, BadRecord> {
    if w[15] != check(w, position) {
        return Err(BadRecord::Check);
    }
    let (kind, known) = (w[0] & 0xff, (w[0] >> 8) as u8);
    let has_zeros = w[12..15].iter().all(|&word| word == 0);
    if !matches!(kind, SEEN | GONE) || known & !groups::ALL != 0 || !has_zeros {
        return Err(BadRecord::Kind);
    }
    let family = match w[0] >> 16 & 0xff {
        4 => Family::V4,
        6 => Family::V6,
        _ => return Err(BadRecord::Family),
    };
    let protocol = (w[0] >> 24) as u8;
    let original = take_tuple(w, family, protocol, 4, 32, (w[0] >> 48) as u16);
    check_tuple(&original)?;
    if shard_of(&original, shards) != shard {
        return Err(BadRecord::Shard);
    }
    if kind == GONE {
        let end = match known & 1 {
            0 => End::Seen,
            _ => End::Unseen { left_s: w[2] as u32 },
        };
        return Ok(SourceEvent::Gone { original, end });
    }
    let reply = take_tuple(w, family, protocol, 8, 0, (w[0] >> 32) as u16);
    check_tuple(&reply)?;
    let tcp = (w[3] as u32).to_be_bytes();
    let state = State {
        status: (w[3] >> 32) as u32,
        tcp_state: tcp[0],
        tcp_scale: tcp[1],
        tcp_flags_original: tcp[2],
        tcp_flags_reply: tcp[3],
        timeout_s: w[2] as u32,
        mark: (w[2] >> 32) as u32,
    };
    Ok(SourceEvent::Seen { connection: Connection::new(original, reply, state), known })
}

fn take_tuple(
    w: &Words,
    family: Family,
    protocol: u8,
    at: usize,
    ports_at: u32,
    zone: u16,
) -> Tuple {
    let ports = (w[1] >> ports_at) as u32;
    let wide = |i: usize| (w[i + 1] as u128) << 64 | w[i] as u128;
    Tuple {
        src: wide(at),
        dst: wide(at + 2),
        sport: (ports >> 16) as u16,
        dport: ports as u16,
        zone,
        protocol,
        family,
    }
}

fn check_tuple(t: &Tuple) -> Result<(), BadRecord> {
    if t.family == Family::V4 && (t.src | t.dst) >> 32 != 0 {
        return Err(BadRecord::Family);
    }
    let fits = match t.protocol {
        0 => false,
        ICMP => t.family == Family::V4,
        ICMPV6 => t.family == Family::V6,
        _ => true,
    };
    if !fits {
        return Err(BadRecord::Protocol);
    }
    let fits = match t.protocol {
        TCP | DCCP | SCTP => t.sport != 0 && t.dport != 0,
        // An ICMP identifier, type and code, the source port of one-way UDP, or GRE's keys may be
        // anything.
        ICMP | ICMPV6 => true,
        p if has_keys(p) => true,
        _ => t.sport == 0 && t.dport == 0,
    };
    if fits { Ok(()) } else { Err(BadRecord::Ports) }
}

fn check(w: &Words, position: u64) -> u64 {
    let mix = |h: u64, word: &u64| (h ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    w[..15].iter().fold(position ^ 0x6a09_e667_f3bc_c908, mix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen() -> Connection {
        let mut original = Tuple::v6(
            TCP,
            ("2001:db8::1".parse().unwrap(), 40_000),
            ("2001:db8::2".parse().unwrap(), 443),
        );
        original.zone = 7;
        let reply = Tuple { dst: 5 << 100, dport: 9, zone: 8, ..original.mirrored() };
        let state = State {
            status: 0x19e,
            tcp_state: 3,
            tcp_scale: 0x7a,
            tcp_flags_original: 0x23,
            tcp_flags_reply: 0x31,
            timeout_s: 432_000,
            mark: 0xdead_beef,
        };
        Connection::new(original, reply, state)
    }

    #[test]
    fn events_read_back_at_their_own_position_only() {
        let v4 = Tuple::v4(17, ([10, 0, 0, 1].into(), 0), ([10, 0, 0, 2].into(), 53));
        let gre = Tuple::v4(47, ([10, 0, 0, 1].into(), 5), ([10, 0, 0, 2].into(), 9));
        let events = [
            SourceEvent::Seen { connection: seen(), known: groups::TUPLES | groups::MARK },
            SourceEvent::gone(gre),
            SourceEvent::Gone { original: v4, end: End::UNTOLD },
            SourceEvent::Gone { original: v4, end: End::Unseen { left_s: u32::MAX } },
            SourceEvent::gone(seen().original),
        ];
        for event in events {
            let words = encode(&event, 77);
            assert_eq!(decode(&words, 77, 0, 1), Ok(event));
            assert_eq!(decode(&words, 78, 0, 1), Err(BadRecord::Check));
        }
    }

    #[test]
    fn what_makes_no_sense_has_a_name() {
        let refusal = |change: &dyn Fn(&mut Words)| {
            let mut w = encode(&SourceEvent::seen(seen()), 3);
            change(&mut w);
            w[15] = check(&w, 3);
            decode(&w, 3, 0, 1).unwrap_err()
        };
        assert_eq!(refusal(&|w| w[0] = w[0] & !0xff | 3), BadRecord::Kind);
        assert_eq!(refusal(&|w| w[0] |= 0x80 << 8), BadRecord::Kind);
        assert_eq!(refusal(&|w| w[13] = 1), BadRecord::Kind);
        assert_eq!(refusal(&|w| w[0] |= 1 << 16), BadRecord::Family);
        assert_eq!(refusal(&|w| w[0] &= !(2 << 16)), BadRecord::Family);
        assert_eq!(refusal(&|w| w[0] &= !(0xff << 24)), BadRecord::Protocol);
        assert_eq!(refusal(&|w| w[0] = w[0] & !(0xff << 24) | 1 << 24), BadRecord::Protocol);
        assert_eq!(refusal(&|w| w[0] = w[0] & !(0xff << 24) | 50 << 24), BadRecord::Ports);
        assert_eq!(refusal(&|w| w[1] &= !0xffff), BadRecord::Ports);
        let w = encode(&SourceEvent::seen(seen()), 3);
        let own = shard_of(&seen().original, 64);
        assert_eq!(decode(&w, 3, (own + 1) % 64, 64), Err(BadRecord::Shard));
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let w = encode(&SourceEvent::seen(seen()), 3);
        for bit in (0..1024).step_by(if cfg!(miri) { 17 } else { 1 }) {
            let mut spoilt = w;
            spoilt[bit / 64] ^= 1 << (bit % 64);
            assert_eq!(decode(&spoilt, 3, 0, 1), Err(BadRecord::Check), "bit {bit}");
        }
    }
}
