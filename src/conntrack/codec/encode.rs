//! From a connection to the kernel's bytes.
//!
//! The NAT trap that shapes a create: the kernel wants the reply tuple **as if nothing were
//! translated**, and the translation as CTA_NAT_SRC/DST. Given the reply tuple as an event
//! shows it, it answers success and leaves an entry that does not translate (status 0x18e
//! instead of 0x19e). The ports must be there too, or the kernel picks others in silence; for
//! the same reason both directions are written out as soon as one of them is translated: a
//! direction left out gets a "null binding", which may move a source port that is taken.
//!
//! Every function writes one message at the start of the caller's buffer, which has at least
//! [`MESSAGE_MAX`] bytes, and returns its length.

use super::number::*;
use super::{
    HEADERS, TCP_ESTABLISHED, TYPE_DELETE, TYPE_GET, TYPE_GET_STATS, TYPE_NEW, family_number, status,
};
use crate::conn::extra::{HELPER_NAME, parts};
use crate::conn::tuple::{DCCP, ICMP, ICMPV6, SCTP, TCP, has_keys};
use crate::conn::{Connection, Extra, Family, Tuple};

/// Room that any request fits: the longest, a translated IPv6 connection with everything that only few have.
pub const MESSAGE_MAX: usize = 640;

const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const ACK: u16 = libc::NLM_F_ACK as u16;

/// `IP_CT_TCP_FLAG_*` that describe the connection (window scale, SACK, who closes); the
/// others go with windows, which are not replicated.
const TCP_FLAGS_COPIED: u8 = 0x01 | 0x02 | 0x04;
/// `IP_CT_TCP_FLAG_BE_LIBERAL`: without windows the kernel must not judge by them.
const TCP_BE_LIBERAL: u8 = 0x08;

/// The request that restores a connection; EEXIST if the entry, or another one with the same
/// translated tuple, is there already.
pub fn encode_create(buffer: &mut [u8], sequence: u32, connection: &Connection, timeout_s: u32) -> usize {
    let flags = REQUEST | (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    let Connection { original, reply, state, extra } = connection;
    let mut w = Writer::new(buffer, TYPE_NEW, flags, sequence, Some(original.family));
    let mirrored = original.mirrored();
    let (both, only_original, only_reply) = match (original.zone, reply.zone) {
        (a, b) if a == b => (a, 0, 0),
        (a, b) => (0, a, b),
    };
    w.tuple(TUPLE_ORIG, original, only_original);
    w.tuple(TUPLE_REPLY, &mirrored, only_reply);
    w.zone(ZONE, both);
    w.field(STATUS, &copied_status(state.status).to_be_bytes());
    w.field(TIMEOUT, &timeout_s.to_be_bytes());
    if state.mark != 0 {
        w.field(MARK, &state.mark.to_be_bytes());
    }
    w.protoinfo(connection);
    w.extra(extra, false);
    if connection.is_translated() {
        // ICMP has one identifier, which conntrack keeps (and translates) with the source.
        let source_port = match original.protocol {
            ICMP | ICMPV6 => reply.sport,
            _ => reply.dport,
        };
        w.nat(NAT_DST, reply.src, has_keys(original.protocol).then_some(reply.sport), reply.family);
        let has_source = has_keys(original.protocol) || matches!(original.protocol, ICMP | ICMPV6);
        w.nat(NAT_SRC, reply.dst, has_source.then_some(source_port), reply.family);
    }
    w.finish()
}

/// The request that brings an entry up to date; ENOENT if it is not there. `present` is the
/// status that the entry has: bits of it that were set cannot be taken back (EBUSY).
/// Translations cannot be changed: delete and create instead.
pub fn encode_update(
    buffer: &mut [u8],
    sequence: u32,
    connection: &Connection,
    timeout_s: u32,
    present: u32,
) -> usize {
    let Connection { original, state, extra, .. } = connection;
    let mut w = Writer::new(buffer, TYPE_NEW, REQUEST, sequence, Some(original.family));
    w.tuple(TUPLE_ORIG, original, 0);
    w.zone(ZONE, original.zone);
    // Bits that cannot be changed must be as they are, and the kernel looks at EXPECTED and DYING as well.
    w.field(STATUS, &(present | copied_status(state.status)).to_be_bytes());
    w.field(TIMEOUT, &timeout_s.to_be_bytes());
    w.field(MARK, &state.mark.to_be_bytes());
    w.protoinfo(connection);
    w.extra(extra, true);
    w.finish()
}

/// The request that removes the entry with this original tuple.
pub fn encode_delete(buffer: &mut [u8], sequence: u32, original: &Tuple) -> usize {
    encode_named(buffer, TYPE_DELETE, sequence, original)
}

/// The request that asks for the entry with this original tuple.
pub fn encode_get(buffer: &mut [u8], sequence: u32, original: &Tuple) -> usize {
    encode_named(buffer, TYPE_GET, sequence, original)
}

fn encode_named(buffer: &mut [u8], kind: u16, sequence: u32, original: &Tuple) -> usize {
    let mut w = Writer::new(buffer, kind, REQUEST, sequence, Some(original.family));
    w.tuple(TUPLE_ORIG, original, 0);
    w.zone(ZONE, original.zone);
    w.finish()
}

/// The request for a dump of the table, of one family or of all.
pub fn encode_dump(buffer: &mut [u8], sequence: u32, family: Option<Family>) -> usize {
    Writer::new(buffer, TYPE_GET, REQUEST | libc::NLM_F_DUMP as u16, sequence, family).finish()
}

/// A request that changes nothing and that any kernel with ctnetlink answers.
pub fn encode_statistics(buffer: &mut [u8], sequence: u32) -> usize {
    Writer::new(buffer, TYPE_GET_STATS, REQUEST, sequence, None).finish()
}

/// Asks for an acknowledgement of the message at the start of `message`.
pub fn request_ack(message: &mut [u8]) {
    let flags = u16::from_ne_bytes([message[6], message[7]]) | ACK;
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
}

/// What a restored entry may claim: no more than the active had.
fn copied_status(active: u32) -> u32 {
    status::CONFIRMED | active & (status::SEEN_REPLY | status::ASSURED)
}

struct Writer<'a> {
    buffer: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    fn new(buffer: &'a mut [u8], kind: u16, flags: u16, sequence: u32, family: Option<Family>) -> Writer<'a> {
        assert!(buffer.len() >= MESSAGE_MAX, "a request needs room for MESSAGE_MAX bytes");
        buffer[..HEADERS].fill(0);
        buffer[4..6].copy_from_slice(&kind.to_ne_bytes());
        buffer[6..8].copy_from_slice(&flags.to_ne_bytes());
        buffer[8..12].copy_from_slice(&sequence.to_ne_bytes());
        buffer[16] = family.map_or(0, family_number);
        Writer { buffer, at: HEADERS }
    }

    fn finish(self) -> usize {
        self.buffer[..4].copy_from_slice(&(self.at as u32).to_ne_bytes());
        self.at
    }

    /// One attribute with its padding.
    fn field(&mut self, kind: u16, payload: &[u8]) {
        let end = self.at + 4 + payload.len();
        self.header(self.at, end, kind);
        self.buffer[self.at + 4..end].copy_from_slice(payload);
        let padded = end.next_multiple_of(4);
        self.buffer[end..padded].fill(0);
        self.at = padded;
    }

    /// An attribute that holds what `inside` writes.
    fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) {
        let start = self.at;
        self.at += 4;
        inside(self);
        self.header(start, self.at, kind | NESTED);
    }

    fn header(&mut self, start: usize, end: usize, kind: u16) {
        self.buffer[start..start + 2].copy_from_slice(&((end - start) as u16).to_ne_bytes());
        self.buffer[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
    }

    fn address(&mut self, v4: u16, v6: u16, family: Family, address: u128) {
        match family {
            Family::V4 => self.field(v4, &(address as u32).to_be_bytes()),
            Family::V6 => self.field(v6, &address.to_be_bytes()),
        }
    }

    fn zone(&mut self, kind: u16, zone: u16) {
        if zone != 0 {
            self.field(kind, &zone.to_be_bytes());
        }
    }

    fn tuple(&mut self, kind: u16, t: &Tuple, own_zone: u16) {
        self.nest(kind, |w| {
            w.nest(TUPLE_IP, |w| {
                w.address(IP_V4_SRC, IP_V6_SRC, t.family, t.src);
                w.address(IP_V4_DST, IP_V6_DST, t.family, t.dst);
            });
            w.nest(TUPLE_PROTO, |w| {
                w.field(PROTO_NUM, &[t.protocol]);
                let (id, code_of, type_of) = match t.protocol {
                    ICMP => (PROTO_ICMP_ID, PROTO_ICMP_CODE, PROTO_ICMP_TYPE),
                    ICMPV6 => (PROTO_ICMPV6_ID, PROTO_ICMPV6_CODE, PROTO_ICMPV6_TYPE),
                    protocol if has_keys(protocol) => {
                        w.field(PROTO_SRC_PORT, &t.sport.to_be_bytes());
                        w.field(PROTO_DST_PORT, &t.dport.to_be_bytes());
                        return;
                    }
                    _ => return,
                };
                let [icmp_type, code] = t.dport.to_be_bytes();
                w.field(id, &t.sport.to_be_bytes());
                w.field(type_of, &[icmp_type]);
                w.field(code_of, &[code]);
            });
            w.zone(TUPLE_ZONE, own_zone);
        });
    }

    fn protoinfo(&mut self, connection: &Connection) {
        let info = connection.extra.protoinfo;
        let is_known = connection.extra.has(parts::PROTOINFO);
        match connection.original.protocol {
            TCP => self.tcp(connection),
            SCTP if is_known => self.nest(PROTOINFO, |w| {
                w.nest(PROTOINFO_SCTP, |w| {
                    w.field(SCTP_STATE, &[info.state]);
                    w.field(SCTP_VTAG_ORIGINAL, &((info.value >> 32) as u32).to_be_bytes());
                    w.field(SCTP_VTAG_REPLY, &(info.value as u32).to_be_bytes());
                });
            }),
            DCCP if is_known => self.nest(PROTOINFO, |w| {
                w.nest(PROTOINFO_DCCP, |w| {
                    w.field(DCCP_STATE, &[info.state]);
                    w.field(DCCP_ROLE, &[info.role]);
                    w.field(DCCP_HANDSHAKE_SEQ, &info.value.to_be_bytes());
                });
            }),
            _ => {}
        }
    }

    fn tcp(&mut self, connection: &Connection) {
        let s = connection.state;
        // A state that was never reported: an assured connection had been established; about others nothing is said.
        let tcp_state = match s.tcp_state {
            0 if s.status & status::ASSURED != 0 => TCP_ESTABLISHED,
            0 => return,
            state => state,
        };
        let mask = TCP_FLAGS_COPIED | TCP_BE_LIBERAL;
        let flags = |of: u8| [of & TCP_FLAGS_COPIED | TCP_BE_LIBERAL, mask];
        self.nest(PROTOINFO, |w| {
            w.nest(PROTOINFO_TCP, |w| {
                w.field(TCP_STATE, &[tcp_state]);
                w.field(TCP_WSCALE_ORIGINAL, &[s.tcp_scale & 15]);
                w.field(TCP_WSCALE_REPLY, &[s.tcp_scale >> 4]);
                w.field(TCP_FLAGS_ORIGINAL, &flags(s.tcp_flags_original));
                w.field(TCP_FLAGS_REPLY, &flags(s.tcp_flags_reply));
            });
        });
    }

    /// What only few connections have, except protocol state. A new entry has no labels; those of one that is
    /// there are replaced.
    fn extra(&mut self, extra: &Extra, is_there: bool) {
        if extra.has(parts::LABELS) && (is_there || extra.labels != [0; 16]) {
            self.field(LABELS, &extra.labels);
            self.field(LABELS_MASK, &[0xff; 16]);
        }
        if extra.has(parts::HELPER) {
            let end = extra.helper.iter().position(|b| *b == 0).unwrap_or(HELPER_NAME - 1);
            let mut name = [0; HELPER_NAME];
            name[..end].copy_from_slice(&extra.helper[..end]);
            self.nest(HELP, |w| w.field(HELP_NAME, &name[..=end]));
        }
        if extra.has(parts::SEQADJ) {
            for (kind, direction) in [SEQ_ADJ_ORIG, SEQ_ADJ_REPLY].into_iter().zip(extra.seqadj) {
                self.nest(kind, |w| {
                    w.field(CORRECTION_POSITION, &direction.correction_position.to_be_bytes());
                    w.field(OFFSET_BEFORE, &direction.offset_before.to_be_bytes());
                    w.field(OFFSET_AFTER, &direction.offset_after.to_be_bytes());
                });
            }
        }
        if extra.has(parts::SYNPROXY) {
            self.nest(SYNPROXY, |w| {
                w.field(SYNPROXY_ISN, &extra.synproxy.isn.to_be_bytes());
                w.field(SYNPROXY_ITS, &extra.synproxy.its.to_be_bytes());
                w.field(SYNPROXY_TSOFF, &extra.synproxy.tsoff.to_be_bytes());
            });
        }
    }

    fn nat(&mut self, kind: u16, address: u128, port: Option<u16>, family: Family) {
        self.nest(kind, |w| {
            w.address(NAT_V4_MINIP, NAT_V6_MINIP, family, address);
            if let Some(port) = port {
                w.nest(NAT_PROTO, |w| {
                    w.field(PROTONAT_PORT_MIN, &port.to_be_bytes());
                    w.field(PROTONAT_PORT_MAX, &port.to_be_bytes());
                });
            }
        });
    }
}
