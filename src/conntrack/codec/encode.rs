//! From a connection to the kernel's bytes.
//!
//! The NAT trap that shapes a create: the kernel wants the reply tuple **as if nothing were
//! translated**, and the translation as CTA_NAT_SRC/DST. Given the reply tuple as an event
//! shows it, it answers success and leaves an entry that does not translate (status 0x18e
//! instead of 0x19e). The ports must be there too, or the kernel picks others in silence; for
//! the same reason both directions are written out as soon as one of them is translated: a
//! direction left out gets a "null binding", which may move a source port that is taken.
//!
//! What no request restores (seen on 6.18; tests/conntrack/kinds.rs): different zones for the two
//! directions (EINVAL); keys of GRE that PPTP's helper translated (they stay as they were); that an
//! entry was expected by another; TCP windows (hence BE_LIBERAL), and window scales unless both
//! sides' flags say that they are used; labels where no rule sets any; a helper that this kernel
//! does not have (EOPNOTSUPP), and what a helper remembers besides its name; counters, the time of
//! birth, a timeout policy, a security context, offloading. A GRE entry has timeouts of its own,
//! which are zero in one that was restored: its first packet ends it, and the next one begins
//! another.
//!
//! Every function writes one message at the start of the caller's buffer, which has at least
//! [`MESSAGE_MAX`](super::MESSAGE_MAX) bytes, and returns its length.

use super::number::*;
use super::writer::RequestWriter;
use super::{TCP_ESTABLISHED, TYPE_DELETE, TYPE_GET, TYPE_GET_STATS, TYPE_NEW, status};
use crate::conn::tuple::{GRE, ICMP, ICMPV6, TCP, has_keys};
use crate::conn::{Connection, Family, Tuple};

const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const ACK: u16 = libc::NLM_F_ACK as u16;

/// `IP_CT_TCP_FLAG_*` that describe the connection (window scale, SACK, who closes); the
/// others go with windows, which are not replicated.
const TCP_FLAGS_COPIED: u8 = 0x01 | 0x02 | 0x04;
/// `IP_CT_TCP_FLAG_BE_LIBERAL`: without windows the kernel must not judge by them.
const TCP_BE_LIBERAL: u8 = 0x08;

/// The request that restores a connection; EEXIST if the entry, or another one with the same
/// translated tuple, is there already.
pub fn encode_create(
    buffer: &mut [u8],
    sequence: u32,
    connection: &Connection,
    timeout_s: u32,
) -> usize {
    let flags = REQUEST | (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    let Connection { original, reply, state, extra } = connection;
    let mut w = RequestWriter::new(buffer, TYPE_NEW, flags, sequence, Some(original.family));
    let mirrored = original.mirrored();
    let (both, only_original, only_reply) = match (original.zone, reply.zone) {
        (a, b) if a == b => (a, 0, 0),
        (a, b) => (0, a, b),
    };
    w.tuple(TUPLE_ORIG, original, only_original);
    w.tuple(TUPLE_REPLY, &mirrored, only_reply);
    w.zone(ZONE, both);
    // GRE entries carry their timeouts with them, which their first packet sets and ctnetlink
    // cannot: with zeros, the first packet after a takeover would end the entry. One with a fixed
    // timeout no packet ends.
    let fixed = if original.protocol == GRE { status::FIXED_TIMEOUT } else { 0 };
    w.field(STATUS, &(copied_status(state.status) | fixed).to_be_bytes());
    w.field(TIMEOUT, &timeout_s.to_be_bytes());
    if state.mark != 0 {
        w.field(MARK, &state.mark.to_be_bytes());
    }
    w.tcp(connection);
    w.extra_of_new(extra, original.protocol);
    if connection.is_translated() {
        let has_keys = has_keys(original.protocol);
        // ICMP has one identifier, which conntrack keeps (and translates) with the source.
        let source_port = match original.protocol {
            ICMP | ICMPV6 => reply.sport,
            _ => reply.dport,
        };
        w.nat(NAT_DST, reply.src, has_keys.then_some(reply.sport), reply.family);
        let has_source = has_keys || matches!(original.protocol, ICMP | ICMPV6);
        w.nat(NAT_SRC, reply.dst, has_source.then_some(source_port), reply.family);
    }
    w.finish()
}

/// The request that brings an entry up to date; ENOENT if it is not there. `present` is the status
/// that the entry has: bits of it that were set cannot be taken back (EBUSY), and a fixed timeout
/// stays as it is. Translations cannot be changed: delete and create instead.
pub fn encode_update(
    buffer: &mut [u8],
    sequence: u32,
    connection: &Connection,
    timeout_s: u32,
    present: u32,
) -> usize {
    let Connection { original, state, extra, .. } = connection;
    let mut w = RequestWriter::new(buffer, TYPE_NEW, REQUEST, sequence, Some(original.family));
    w.tuple(TUPLE_ORIG, original, 0);
    w.zone(ZONE, original.zone);
    // Bits that cannot be changed must be as they are, and the kernel looks at EXPECTED and DYING
    // as well.
    w.field(STATUS, &(present | copied_status(state.status)).to_be_bytes());
    if present & status::FIXED_TIMEOUT == 0 {
        w.field(TIMEOUT, &timeout_s.to_be_bytes()); // EPERM otherwise
    }
    w.field(MARK, &state.mark.to_be_bytes());
    w.tcp(connection);
    w.extra_of_present(extra, original.protocol);
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
    let mut w = RequestWriter::new(buffer, kind, REQUEST, sequence, Some(original.family));
    w.tuple(TUPLE_ORIG, original, 0);
    w.zone(ZONE, original.zone);
    w.finish()
}

/// The request for a dump of the table, of one family or of all.
pub fn encode_dump(buffer: &mut [u8], sequence: u32, family: Option<Family>) -> usize {
    RequestWriter::new(buffer, TYPE_GET, REQUEST | libc::NLM_F_DUMP as u16, sequence, family)
        .finish()
}

/// A request that changes nothing and that any kernel with ctnetlink answers.
pub fn encode_statistics(buffer: &mut [u8], sequence: u32) -> usize {
    RequestWriter::new(buffer, TYPE_GET_STATS, REQUEST, sequence, None).finish()
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

impl RequestWriter<'_> {
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

    fn tcp(&mut self, connection: &Connection) {
        let s = connection.state;
        if connection.original.protocol != TCP {
            return;
        }
        // A state that was never reported: an assured connection had been established; about others
        // nothing is said.
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
