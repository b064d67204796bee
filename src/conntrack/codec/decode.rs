//! From the kernel's bytes to a [`SourceEvent`].
//!
//! Every length is checked where it is used; an attribute that we do not know is skipped, one
//! that is left out is left out of `known` too: ctnetlink omits what has not changed, and the
//! timeout and TCP state of offloaded flows altogether.

use super::number::*;
use super::{HEADER, HEADERS, TYPE_DELETE, TYPE_DONE, TYPE_ERROR, TYPE_NEW};
use crate::conn::slot::groups;
use crate::conn::tuple::TCP;
use crate::conn::{Connection, Family, State, Tuple};
use crate::source::SourceEvent;

/// Why a message makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Malformed {
    /// Shorter than its headers, or than its header says.
    Short,
    /// Neither NEW nor DELETE of conntrack.
    Type,
    /// Neither IPv4 nor IPv6.
    Family,
    /// An attribute that claims to be shorter than its header or longer than what is left.
    AttributeLength,
    /// A field that has not the size of its kind.
    FieldSize,
    /// No original tuple.
    NoOriginal,
    /// No reply tuple, in a message that is not a DELETE.
    NoReply,
    /// A tuple without both addresses.
    NoAddress,
    /// A tuple without a protocol.
    NoProtocol,
    /// Two tuples of different protocols.
    TwoProtocols,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Malformed::Short => "message shorter than it claims",
            Malformed::Type => "not a conntrack message",
            Malformed::Family => "neither IPv4 nor IPv6",
            Malformed::AttributeLength => "attribute with an impossible length",
            Malformed::FieldSize => "field of the wrong size",
            Malformed::NoOriginal => "no original tuple",
            Malformed::NoReply => "no reply tuple",
            Malformed::NoAddress => "tuple without addresses",
            Malformed::NoProtocol => "tuple without a protocol",
            Malformed::TwoProtocols => "tuples of two protocols",
        })
    }
}

impl std::error::Error for Malformed {}

/// The attributes in a piece of a message, one after the other: `(type, payload)`.
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// The attributes in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Attributes<'a> {
        Attributes(bytes)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let rest = std::mem::take(&mut self.0); // after an error the iteration ends
        let Some((header, _)) = rest.split_first_chunk::<4>() else {
            return Some(Err(Malformed::AttributeLength));
        };
        let length = u16::from_ne_bytes([header[0], header[1]]) as usize;
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let Some(payload) = rest.get(4..length) else {
            return Some(Err(Malformed::AttributeLength));
        };
        // The last attribute may come without its padding.
        self.0 = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Ok((kind, payload)))
    }
}

fn field<const N: usize>(payload: &[u8]) -> Result<[u8; N], Malformed> {
    payload.try_into().map_err(|_| Malformed::FieldSize)
}

fn be16(payload: &[u8]) -> Result<u16, Malformed> {
    field(payload).map(u16::from_be_bytes)
}

fn be32(payload: &[u8]) -> Result<u32, Malformed> {
    field(payload).map(u32::from_be_bytes)
}

fn byte(payload: &[u8]) -> Result<u8, Malformed> {
    field::<1>(payload).map(|b| b[0])
}

/// Decodes one conntrack message (an event, an entry of a dump, or the answer to a GET). The
/// bytes may be followed by others: the header's length counts.
pub fn decode(message: &[u8]) -> Result<SourceEvent, Malformed> {
    let header = message.get(..HEADERS).ok_or(Malformed::Short)?;
    let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    let body = message.get(HEADERS..length).ok_or(Malformed::Short)?;
    if kind != TYPE_NEW && kind != TYPE_DELETE {
        return Err(Malformed::Type);
    }
    let family = match header[HEADER] as i32 {
        libc::AF_INET => Family::V4,
        libc::AF_INET6 => Family::V6,
        _ => return Err(Malformed::Family),
    };

    let (mut original, mut reply, mut zone) = (None, None, 0);
    let (mut has_status, mut has_tcp) = (false, false);
    let mut state = State::default();
    let mut known = groups::TUPLES;
    for attribute in Attributes::new(body) {
        let (kind, payload) = attribute?;
        match kind {
            TUPLE_ORIG => original = Some(decode_tuple(payload, family)?),
            TUPLE_REPLY => reply = Some(decode_tuple(payload, family)?),
            ZONE => zone = be16(payload)?,
            STATUS => {
                state.status = be32(payload)?;
                has_status = true;
            }
            TIMEOUT => {
                state.timeout_s = be32(payload)?;
                known |= groups::TIMEOUT;
            }
            MARK => {
                state.mark = be32(payload)?;
                known |= groups::MARK;
            }
            PROTOINFO => has_tcp |= decode_protoinfo(payload, &mut state)?,
            _ => {}
        }
    }

    let (mut original, own_zone) = original.ok_or(Malformed::NoOriginal)?;
    original.zone = own_zone.unwrap_or(zone);
    if kind == TYPE_DELETE {
        return Ok(SourceEvent::Gone { original });
    }
    let (mut reply, own_zone) = reply.ok_or(Malformed::NoReply)?;
    reply.zone = own_zone.unwrap_or(zone);
    if original.protocol != reply.protocol {
        return Err(Malformed::TwoProtocols);
    }
    // Status and TCP are one group: half of it is not known.
    if has_status && (has_tcp || original.protocol != TCP) {
        known |= groups::STATE;
    }
    Ok(SourceEvent::Seen { connection: Connection::new(original, reply, state), known })
}

/// A tuple and the zone that belongs to its direction only, if there is one.
fn decode_tuple(payload: &[u8], family: Family) -> Result<(Tuple, Option<u16>), Malformed> {
    let (mut src, mut dst, mut protocol, mut zone) = (None, None, None, None);
    let (mut sport, mut dport) = (0, 0);
    for attribute in Attributes::new(payload) {
        let (kind, payload) = attribute?;
        match kind {
            TUPLE_IP => {
                for attribute in Attributes::new(payload) {
                    let (kind, payload) = attribute?;
                    match (kind, family) {
                        (IP_V4_SRC, Family::V4) => src = Some(be32(payload)? as u128),
                        (IP_V4_DST, Family::V4) => dst = Some(be32(payload)? as u128),
                        (IP_V6_SRC, Family::V6) => src = Some(u128::from_be_bytes(field(payload)?)),
                        (IP_V6_DST, Family::V6) => dst = Some(u128::from_be_bytes(field(payload)?)),
                        _ => {}
                    }
                }
            }
            TUPLE_PROTO => {
                for attribute in Attributes::new(payload) {
                    let (kind, payload) = attribute?;
                    match kind {
                        PROTO_NUM => protocol = Some(byte(payload)?),
                        PROTO_SRC_PORT | PROTO_ICMP_ID | PROTO_ICMPV6_ID => sport = be16(payload)?,
                        PROTO_DST_PORT => dport = be16(payload)?,
                        PROTO_ICMP_TYPE | PROTO_ICMPV6_TYPE => {
                            dport = dport & 0xff | (byte(payload)? as u16) << 8
                        }
                        PROTO_ICMP_CODE | PROTO_ICMPV6_CODE => dport = dport & 0xff00 | byte(payload)? as u16,
                        _ => {}
                    }
                }
            }
            TUPLE_ZONE => zone = Some(be16(payload)?),
            _ => {}
        }
    }
    let (src, dst) = src.zip(dst).ok_or(Malformed::NoAddress)?;
    let protocol = protocol.ok_or(Malformed::NoProtocol)?;
    Ok((Tuple { src, dst, sport, dport, zone: 0, protocol, family }, zone))
}

/// Whether there was a TCP state.
fn decode_protoinfo(payload: &[u8], state: &mut State) -> Result<bool, Malformed> {
    let mut found = false;
    for attribute in Attributes::new(payload) {
        let (kind, payload) = attribute?;
        if kind != PROTOINFO_TCP {
            continue;
        }
        for attribute in Attributes::new(payload) {
            let (kind, payload) = attribute?;
            match kind {
                TCP_STATE => {
                    state.tcp_state = byte(payload)?;
                    found = true;
                }
                TCP_WSCALE_ORIGINAL => state.tcp_scale = state.tcp_scale & 0xf0 | byte(payload)? & 15,
                TCP_WSCALE_REPLY => state.tcp_scale = state.tcp_scale & 0x0f | (byte(payload)? & 15) << 4,
                // Flags, then a mask that matters in requests only.
                TCP_FLAGS_ORIGINAL => state.tcp_flags_original = field::<2>(payload)?[0],
                TCP_FLAGS_REPLY => state.tcp_flags_reply = field::<2>(payload)?[0],
                _ => {}
            }
        }
    }
    Ok(found)
}

/// What every answer has, whatever it says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    /// Its type: [`TYPE_ERROR`](super::TYPE_ERROR), [`TYPE_DONE`](super::TYPE_DONE), or a conntrack message.
    pub kind: u16,
    /// The sequence number of the request that it answers.
    pub sequence: u32,
    /// In an error or at the end of a dump: the reason, 0 for success.
    pub errno: i32,
}

/// Reads the head of an answer; `None` if it is too short for one.
pub fn answer(message: &[u8]) -> Option<Answer> {
    let header = message.first_chunk::<HEADER>()?;
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
    let errno = match kind {
        TYPE_ERROR | TYPE_DONE => {
            let code = message.get(HEADER..)?.first_chunk::<4>()?;
            i32::from_ne_bytes(*code).wrapping_neg()
        }
        _ => 0,
    };
    Some(Answer { kind, sequence, errno })
}
