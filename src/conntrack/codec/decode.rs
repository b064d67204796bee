//! From the kernel's bytes to a [`SourceEvent`].
//!
//! What names a connection (tuples, zones, protocol) has to be right, or the message is refused.
//! Anything else is of use without the rest: an attribute that we do not know is passed over, one
//! that we know and that has another shape than expected is counted in [`Decoded::skipped`], and
//! what is not there is left out of `known` (or of the extra's parts).
//!
//! **What is left out** means one thing in an event and another in an entry. Events tell what has
//! changed: a mark, labels, helper, TCP or SCTP state, shifts that are not there keep their last
//! known value. A dump or the answer to a GET describes the whole entry: a mark that is not there,
//! for some kernels leave out one of zero, is zero ([`decode_entry`]). In both, the kernel leaves
//! out labels that are all zero, and timeout and protocol state of offloaded flows.

use super::attribute::{Attributes, Malformed, be16, be32, byte, field};
use super::extra::{decode_extra, find};
use super::number::*;
use super::{
    GIVEN_MAX_S, HEADER, HEADERS, SUBSYSTEM_EXPECT, TYPE_DELETE, TYPE_DONE, TYPE_ERROR, TYPE_NEW,
};
use crate::conn::extra::{Extra, ProtoInfo, parts};
use crate::conn::slot::groups;
use crate::conn::tuple::{DCCP, SCTP, TCP};
use crate::conn::{Connection, Family, Phase, State, Tuple};
use crate::source::{End, SourceEvent};

/// Who changed an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// The kernel itself: a packet, a timeout, an address that went away.
    Kernel,
    /// Another program, by netlink. (What this one writes is not heard.)
    Program,
}

/// What a message says, and how much of it could not be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decoded {
    /// What it says.
    pub event: SourceEvent,
    /// Attributes that we know, but not in this shape: a kernel newer than this program.
    pub skipped: u8,
}

/// Decodes one event. The bytes may be followed by others: the header's length counts.
pub fn decode(message: &[u8]) -> Result<Decoded, Malformed> {
    read(message, 0)
}

/// Decodes one message that describes a whole entry: out of a dump, or the answer to a GET.
pub fn decode_entry(message: &[u8]) -> Result<Decoded, Malformed> {
    read(message, groups::MARK)
}

/// Who caused this event: `nlmsg_pid` is the port id of the program that asked for it, or zero.
pub fn origin(message: &[u8]) -> Origin {
    match message.get(12..HEADER) {
        None | Some([0, 0, 0, 0]) => Origin::Kernel,
        Some(_) => Origin::Program,
    }
}

/// Whether this message is about an expectation, not about a connection.
pub fn is_expectation(message: &[u8]) -> bool {
    message
        .get(4..6)
        .is_some_and(|kind| u16::from_ne_bytes([kind[0], kind[1]]) >> 8 == SUBSYSTEM_EXPECT as u16)
}

/// The original tuple of the connection on whose behalf this message's expectation is made; its
/// zone is not told.
pub fn expecting(message: &[u8]) -> Result<Tuple, Malformed> {
    let header = message.get(..HEADERS).ok_or(Malformed::Short)?;
    let family = family(header)?;
    let master = find(body(message)?, EXPECT_MASTER)?.ok_or(Malformed::NoOriginal)?;
    decode_tuple(master, family).map(|(original, _)| original)
}

fn family(header: &[u8]) -> Result<Family, Malformed> {
    match header[HEADER] as i32 {
        libc::AF_INET => Ok(Family::V4),
        libc::AF_INET6 => Ok(Family::V6),
        _ => Err(Malformed::Family),
    }
}

/// The attributes of a message.
fn body(message: &[u8]) -> Result<&[u8], Malformed> {
    let length = message.first_chunk::<4>().ok_or(Malformed::Short)?;
    message.get(HEADERS..u32::from_ne_bytes(*length) as usize).ok_or(Malformed::Short)
}

/// `zero` are the groups of which silence says that they are zero.
fn read(message: &[u8], zero: u8) -> Result<Decoded, Malformed> {
    let header = message.get(..HEADERS).ok_or(Malformed::Short)?;
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    let body = body(message)?;
    if kind != TYPE_NEW && kind != TYPE_DELETE {
        return Err(Malformed::Type);
    }
    let family = family(header)?;

    let (mut original, mut reply, mut zone) = (None, None, 0);
    let mut rest = Rest { known: groups::TUPLES | zero, ..Rest::default() };
    let mut skipped = 0u8;
    for attribute in Attributes::new(body) {
        let (kind, payload) = attribute?;
        match kind {
            TUPLE_ORIG => original = Some(decode_tuple(payload, family)?),
            TUPLE_REPLY => reply = Some(decode_tuple(payload, family)?),
            ZONE => zone = be16(payload)?,
            kind => skipped = skipped.saturating_add(rest.take(kind, payload).is_err() as u8),
        }
    }

    let (mut original, own_zone) = original.ok_or(Malformed::NoOriginal)?;
    original.zone = own_zone.unwrap_or(zone);
    if kind == TYPE_DELETE {
        // It carries the state that the entry was in; whether a timeout, a person or a closing
        // connection ended it follows from that alone.
        let Rest { state, extra, .. } = rest.completed(original.protocol);
        let end = end_of(&Connection { original, reply: original, state, extra });
        return Ok(Decoded { event: SourceEvent::Gone { original, end }, skipped });
    }
    let (mut reply, own_zone) = reply.ok_or(Malformed::NoReply)?;
    reply.zone = own_zone.unwrap_or(zone);
    if original.protocol != reply.protocol {
        return Err(Malformed::TwoProtocols);
    }
    let Rest { state, extra, known, .. } = rest.completed(original.protocol);
    let connection = Connection { original, reply, state, extra };
    Ok(Decoded { event: SourceEvent::Seen { connection, known }, skipped })
}

/// How a connection ended whose entry, which was like this at last, is no more. If it still had the
/// timeout of copies, no packet had passed it since it was written: whatever its state, nobody saw
/// the end here, and the age of the last packet is not known.
pub fn end_of(entry: &Connection) -> End {
    match entry.phase() {
        Phase::Ending | Phase::Over if entry.state.timeout_s <= GIVEN_MAX_S => End::Seen,
        _ if entry.state.timeout_s > GIVEN_MAX_S => End::UNTOLD,
        _ => End::Unseen { left_s: entry.state.timeout_s },
    }
}

/// What a message says besides names.
#[derive(Default)]
struct Rest {
    state: State,
    extra: Extra,
    known: u8,
    has_status: bool,
    protocol_state: Option<ProtocolState>,
}

impl Rest {
    /// Takes what one attribute says; nothing, if that is an error.
    fn take(&mut self, kind: u16, payload: &[u8]) -> Result<(), Malformed> {
        match kind {
            STATUS => {
                self.state.status = be32(payload)?;
                self.has_status = true;
            }
            TIMEOUT => {
                self.state.timeout_s = be32(payload)?;
                self.known |= groups::TIMEOUT;
            }
            MARK => {
                self.known &= !groups::MARK; // it is there, so it is not zero by silence
                self.state.mark = be32(payload)?;
                self.known |= groups::MARK;
            }
            PROTOINFO => self.protocol_state = decode_protoinfo(payload)?,
            kind => decode_extra(kind, payload, &mut self.extra)?,
        }
        Ok(())
    }

    /// Brings together what depends on the protocol.
    fn completed(mut self, protocol: u8) -> Rest {
        match (protocol, self.protocol_state) {
            (TCP, Some(ProtocolState::Tcp { tcp_state, scale, flags })) => {
                self.state.tcp_state = tcp_state;
                self.state.tcp_scale = scale;
                [self.state.tcp_flags_original, self.state.tcp_flags_reply] = flags;
            }
            // Status and TCP are one group: half of it is not known.
            (TCP, _) => self.has_status = false,
            (SCTP, Some(ProtocolState::Sctp(info))) | (DCCP, Some(ProtocolState::Dccp(info))) => {
                self.extra.protoinfo = info;
                self.extra.parts |= parts::PROTOINFO;
            }
            _ => {}
        }
        if self.has_status {
            self.known |= groups::STATE;
        }
        if !self.extra.is_none() {
            self.known |= groups::EXTRA;
        }
        self
    }
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
                        PROTO_ICMP_CODE | PROTO_ICMPV6_CODE => {
                            dport = dport & 0xff00 | byte(payload)? as u16
                        }
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

/// What PROTOINFO says of a protocol that has states.
#[derive(Clone, Copy)]
enum ProtocolState {
    Tcp { tcp_state: u8, scale: u8, flags: [u8; 2] },
    Sctp(ProtoInfo),
    Dccp(ProtoInfo),
}

/// `None` if it is about none of those protocols, or says less than all.
fn decode_protoinfo(payload: &[u8]) -> Result<Option<ProtocolState>, Malformed> {
    if let Some(tcp) = find(payload, PROTOINFO_TCP)? {
        return decode_tcp(tcp);
    }
    if let Some(sctp) = find(payload, PROTOINFO_SCTP)? {
        let state = find(sctp, SCTP_STATE)?.map(byte).transpose()?;
        let original = find(sctp, SCTP_VTAG_ORIGINAL)?.map(be32).transpose()?;
        let reply = find(sctp, SCTP_VTAG_REPLY)?.map(be32).transpose()?;
        return Ok(state.zip(original).zip(reply).map(|((state, original), reply)| {
            let value = (original as u64) << 32 | reply as u64;
            ProtocolState::Sctp(ProtoInfo { state, role: 0, value })
        }));
    }
    if let Some(dccp) = find(payload, PROTOINFO_DCCP)? {
        let state = find(dccp, DCCP_STATE)?.map(byte).transpose()?;
        let role = find(dccp, DCCP_ROLE)?.map(byte).transpose()?;
        let handshake =
            find(dccp, DCCP_HANDSHAKE_SEQ)?.map(field).transpose()?.map(u64::from_be_bytes);
        return Ok(state
            .zip(role)
            .zip(handshake)
            .map(|((state, role), value)| ProtocolState::Dccp(ProtoInfo { state, role, value })));
    }
    Ok(None)
}

/// `None` without a state, as in what the kernel says of offloaded flows.
fn decode_tcp(payload: &[u8]) -> Result<Option<ProtocolState>, Malformed> {
    let (mut tcp_state, mut scale, mut flags) = (None, 0, [0; 2]);
    for attribute in Attributes::new(payload) {
        let (kind, payload) = attribute?;
        match kind {
            TCP_STATE => tcp_state = Some(byte(payload)?),
            TCP_WSCALE_ORIGINAL => scale = scale & 0xf0 | byte(payload)? & 15,
            TCP_WSCALE_REPLY => scale = scale & 0x0f | (byte(payload)? & 15) << 4,
            // Flags, then a mask that matters in requests only.
            TCP_FLAGS_ORIGINAL => flags[0] = field::<2>(payload)?[0],
            TCP_FLAGS_REPLY => flags[1] = field::<2>(payload)?[0],
            _ => {}
        }
    }
    Ok(tcp_state.map(|tcp_state| ProtocolState::Tcp { tcp_state, scale, flags }))
}

/// What every answer has, whatever it says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    /// Its type: [`TYPE_ERROR`](super::TYPE_ERROR), [`TYPE_DONE`](super::TYPE_DONE), or a conntrack
    /// message.
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
