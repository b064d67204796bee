//! From the kernel's bytes to a [`SourceEvent`].
//!
//! Every length is checked where it is used. An attribute that we do not know is skipped; so is one that
//! we know and that has another form than we do (a newer kernel's), and that is counted: only what names the
//! connection must be right. One that is left out is left out of `known` too: ctnetlink omits what has not changed, and the
//! timeout and TCP state of offloaded flows altogether.

use super::number::*;
use super::{HEADER, HEADERS, SUBSYSTEM_EXPECTATIONS, TYPE_DELETE, TYPE_DONE, TYPE_ERROR, TYPE_NEW};
use crate::conn::extra::{HELPER_NAME, parts};
use crate::conn::slot::groups;
use crate::conn::tuple::TCP;
use crate::conn::{Connection, Extra, Family, State, Tuple};
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

/// A message's meaning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decoded {
    /// What it says.
    pub event: SourceEvent,
    /// Attributes that are known here and made no sense, so that they were left out.
    pub skipped: u8,
}

/// Decodes one event. What it leaves out has not changed. The bytes may be followed by others: the
/// header's length counts.
pub fn decode(message: &[u8]) -> Result<Decoded, Malformed> {
    decode_as(message, false)
}

/// Decodes a message that describes a whole entry: one of a dump, or the answer to a GET. There the kernel
/// leaves out a mark of 0.
pub fn decode_entry(message: &[u8]) -> Result<Decoded, Malformed> {
    decode_as(message, true)
}

fn decode_as(message: &[u8], is_whole: bool) -> Result<Decoded, Malformed> {
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
    let mut value = Value::default();
    let mut skipped = 0u8;
    for attribute in Attributes::new(body) {
        let (kind, payload) = attribute?;
        match kind {
            TUPLE_ORIG => original = Some(decode_tuple(payload, family)?),
            TUPLE_REPLY => reply = Some(decode_tuple(payload, family)?),
            ZONE => zone = be16(payload)?,
            _ => {
                // What it changed before it failed is not named as known.
                let before = value;
                if value.take(kind, payload).is_err() {
                    value = before;
                    skipped = skipped.saturating_add(1);
                }
            }
        }
    }

    let (mut original, own_zone) = original.ok_or(Malformed::NoOriginal)?;
    original.zone = own_zone.unwrap_or(zone);
    if kind == TYPE_DELETE {
        return Ok(Decoded { event: SourceEvent::Gone { original }, skipped });
    }
    let (mut reply, own_zone) = reply.ok_or(Malformed::NoReply)?;
    reply.zone = own_zone.unwrap_or(zone);
    if original.protocol != reply.protocol {
        return Err(Malformed::TwoProtocols);
    }
    let Value { state, extra, mut known, has_status, has_tcp } = value;
    known |= groups::TUPLES;
    // Status and TCP are one group: half of it is not known.
    if has_status && (has_tcp || original.protocol != TCP) {
        known |= groups::STATE;
    }
    if is_whole {
        known |= groups::MARK;
    }
    let connection = Connection { original, reply, state, extra };
    Ok(Decoded { event: SourceEvent::Seen { connection, known }, skipped })
}

/// What a message says besides the tuples.
#[derive(Clone, Copy, Default)]
struct Value {
    state: State,
    extra: Extra,
    known: u8,
    has_status: bool,
    has_tcp: bool,
}

impl Value {
    /// Takes what one attribute says.
    fn take(&mut self, kind: u16, payload: &[u8]) -> Result<(), Malformed> {
        let Value { state, extra, .. } = self;
        match kind {
            STATUS => {
                state.status = be32(payload)?;
                self.has_status = true;
            }
            TIMEOUT => {
                state.timeout_s = be32(payload)?;
                self.known |= groups::TIMEOUT;
            }
            MARK => {
                state.mark = be32(payload)?;
                self.known |= groups::MARK;
            }
            PROTOINFO => self.take_protoinfo(payload)?,
            LABELS => {
                extra.labels = field(payload)?;
                extra.parts |= parts::LABELS;
            }
            HELP => {
                if let Some(name) = find(payload, HELP_NAME)? {
                    // The last byte is always zero.
                    let text = name.split(|b| *b == 0).next().unwrap_or(&[]);
                    let room = extra.helper[..HELPER_NAME - 1].get_mut(..text.len());
                    room.ok_or(Malformed::FieldSize)?.copy_from_slice(text);
                    extra.parts |= parts::HELPER;
                }
            }
            SEQ_ADJ_ORIG | SEQ_ADJ_REPLY => {
                let direction = &mut extra.seqadj[(kind == SEQ_ADJ_REPLY) as usize];
                for attribute in Attributes::new(payload) {
                    let (kind, payload) = attribute?;
                    match kind {
                        CORRECTION_POSITION => direction.correction_position = be32(payload)?,
                        OFFSET_BEFORE => direction.offset_before = be32(payload)?,
                        OFFSET_AFTER => direction.offset_after = be32(payload)?,
                        _ => {}
                    }
                }
                extra.parts |= parts::SEQADJ;
            }
            SYNPROXY => {
                for attribute in Attributes::new(payload) {
                    let (kind, payload) = attribute?;
                    match kind {
                        SYNPROXY_ISN => extra.synproxy.isn = be32(payload)?,
                        SYNPROXY_ITS => extra.synproxy.its = be32(payload)?,
                        SYNPROXY_TSOFF => extra.synproxy.tsoff = be32(payload)?,
                        _ => {}
                    }
                }
                extra.parts |= parts::SYNPROXY;
            }
            _ => {}
        }
        Ok(())
    }

    fn take_protoinfo(&mut self, payload: &[u8]) -> Result<(), Malformed> {
        for attribute in Attributes::new(payload) {
            let (kind, payload) = attribute?;
            match kind {
                PROTOINFO_TCP => self.has_tcp |= take_tcp(payload, &mut self.state)?,
                PROTOINFO_SCTP => {
                    let info = &mut self.extra.protoinfo;
                    let (mut original, mut reply) = (0, 0);
                    for attribute in Attributes::new(payload) {
                        let (kind, payload) = attribute?;
                        match kind {
                            SCTP_STATE => info.state = byte(payload)?,
                            SCTP_VTAG_ORIGINAL => original = be32(payload)?,
                            SCTP_VTAG_REPLY => reply = be32(payload)?,
                            _ => {}
                        }
                    }
                    info.value = (original as u64) << 32 | reply as u64;
                    self.extra.parts |= parts::PROTOINFO;
                }
                PROTOINFO_DCCP => {
                    let info = &mut self.extra.protoinfo;
                    for attribute in Attributes::new(payload) {
                        let (kind, payload) = attribute?;
                        match kind {
                            DCCP_STATE => info.state = byte(payload)?,
                            DCCP_ROLE => info.role = byte(payload)?,
                            DCCP_HANDSHAKE_SEQ => info.value = u64::from_be_bytes(field(payload)?),
                            _ => {}
                        }
                    }
                    self.extra.parts |= parts::PROTOINFO;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The first attribute of this type.
fn find(payload: &[u8], wanted: u16) -> Result<Option<&[u8]>, Malformed> {
    for attribute in Attributes::new(payload) {
        let (kind, payload) = attribute?;
        if kind == wanted {
            return Ok(Some(payload));
        }
    }
    Ok(None)
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
fn take_tcp(payload: &[u8], state: &mut State) -> Result<bool, Malformed> {
    let mut found = false;
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
    Ok(found)
}

/// Whether a message is about an expectation, not about a connection.
pub fn is_expectation(message: &[u8]) -> bool {
    message
        .get(4..6)
        .is_some_and(|kind| u16::from_ne_bytes([kind[0], kind[1]]) >> 8 == SUBSYSTEM_EXPECTATIONS)
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
