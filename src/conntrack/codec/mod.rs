//! ctnetlink messages: bytes to meaning and back, nothing else.
//!
//! Pure: no socket, no clock, no allocation. [`decode()`] reads one message that the kernel sent,
//! the `encode_*` functions write the requests that a commit or a dump needs. Which messages
//! are sent, and what an answer means for a commit, is decided in `commit` and `dump`.
//!
//! The layout of a message, counted from its first byte (all of ctnetlink's own fields are
//! big-endian, the netlink header is in the host's order):
//!
//! ```text
//!  0 length u32 | 4 type u16 | 6 flags u16 | 8 sequence u32 | 12 port id u32     nlmsghdr
//! 16 family u8 | 17 version u8 | 18 resource u16                                 nfgenmsg
//! 20 attributes: length u16 (with this header) | type u16 | payload | padding to 4
//! ```

#![forbid(unsafe_code)]

mod attribute;
mod decode;
mod encode;
mod extra;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod storm;
#[cfg(test)]
mod tests;
mod writer;

pub use attribute::{Attributes, Malformed};
pub use decode::{
    Answer, Decoded, Origin, answer, decode, decode_entry, end_of, expecting, is_expectation,
    origin,
};
pub use encode::{
    encode_create, encode_delete, encode_dump, encode_get, encode_statistics, encode_update,
    request_ack,
};
pub use writer::MESSAGE_MAX;

/// Bytes of a netlink header.
pub const HEADER: usize = 16;
/// Bytes of a netlink header and nfnetlink's own behind it.
pub const HEADERS: usize = HEADER + 4;

/// `NLMSG_ERROR`: an error, or with code 0 an acknowledgement.
pub const TYPE_ERROR: u16 = 2;
/// `NLMSG_DONE`: the end of a dump.
pub const TYPE_DONE: u16 = 3;

/// `NFNL_SUBSYS_CTNETLINK_EXP`: the high byte of the type of messages about expectations.
pub const SUBSYSTEM_EXPECT: u8 = 2;

const SUBSYSTEM: u16 = 1 << 8; // NFNL_SUBSYS_CTNETLINK
const TYPE_NEW: u16 = SUBSYSTEM;
const TYPE_GET: u16 = SUBSYSTEM | 1;
const TYPE_DELETE: u16 = SUBSYSTEM | 2;
const TYPE_GET_STATS: u16 = SUBSYSTEM | 5;

/// A longer timeout is taken for one that only we give: an entry has it until a packet passes,
/// which gives it the normal one. What is committed has at least
/// [`KEPT_TIMEOUT_S`](super::commit::KEPT_TIMEOUT_S), less the time after which it is written again
/// while a member runs.
pub const GIVEN_MAX_S: u32 = 6 * 24 * 3600;

/// Attribute and flag numbers of `linux/netfilter/nfnetlink_conntrack.h`, without the prefixes.
mod number {
    pub const TUPLE_ORIG: u16 = 1;
    pub const TUPLE_REPLY: u16 = 2;
    pub const STATUS: u16 = 3;
    pub const PROTOINFO: u16 = 4;
    pub const HELP: u16 = 5;
    pub const NAT_SRC: u16 = 6;
    pub const TIMEOUT: u16 = 7;
    pub const MARK: u16 = 8;
    pub const NAT_DST: u16 = 13;
    pub const SEQ_ADJ_ORIGINAL: u16 = 15;
    pub const SEQ_ADJ_REPLY: u16 = 16;
    pub const ZONE: u16 = 18;
    pub const LABELS: u16 = 22;
    pub const LABELS_MASK: u16 = 23;
    pub const SYNPROXY: u16 = 24;

    pub const EXPECT_MASTER: u16 = 1;

    pub const TUPLE_IP: u16 = 1;
    pub const TUPLE_PROTO: u16 = 2;
    pub const TUPLE_ZONE: u16 = 3;

    pub const IP_V4_SRC: u16 = 1;
    pub const IP_V4_DST: u16 = 2;
    pub const IP_V6_SRC: u16 = 3;
    pub const IP_V6_DST: u16 = 4;

    pub const PROTO_NUM: u16 = 1;
    pub const PROTO_SRC_PORT: u16 = 2;
    pub const PROTO_DST_PORT: u16 = 3;
    pub const PROTO_ICMP_ID: u16 = 4;
    pub const PROTO_ICMP_TYPE: u16 = 5;
    pub const PROTO_ICMP_CODE: u16 = 6;
    pub const PROTO_ICMPV6_ID: u16 = 7;
    pub const PROTO_ICMPV6_TYPE: u16 = 8;
    pub const PROTO_ICMPV6_CODE: u16 = 9;

    pub const PROTOINFO_TCP: u16 = 1;
    pub const PROTOINFO_DCCP: u16 = 2;
    pub const PROTOINFO_SCTP: u16 = 3;

    pub const TCP_STATE: u16 = 1;
    pub const TCP_WSCALE_ORIGINAL: u16 = 2;
    pub const TCP_WSCALE_REPLY: u16 = 3;
    pub const TCP_FLAGS_ORIGINAL: u16 = 4;
    pub const TCP_FLAGS_REPLY: u16 = 5;

    pub const DCCP_STATE: u16 = 1;
    pub const DCCP_ROLE: u16 = 2;
    pub const DCCP_HANDSHAKE_SEQ: u16 = 3;

    pub const SCTP_STATE: u16 = 1;
    pub const SCTP_VTAG_ORIGINAL: u16 = 2;
    pub const SCTP_VTAG_REPLY: u16 = 3;

    pub const HELP_NAME: u16 = 1;

    pub const NAT_V4_MINIP: u16 = 1;
    pub const NAT_PROTO: u16 = 3;
    pub const NAT_V6_MINIP: u16 = 4;
    pub const PROTONAT_PORT_MIN: u16 = 1;
    pub const PROTONAT_PORT_MAX: u16 = 2;

    /// Set on the type of an attribute that holds attributes.
    pub const NESTED: u16 = 0x8000;
    /// What remains of a type without NESTED and NET_BYTEORDER.
    pub const TYPE_MASK: u16 = 0x3fff;
}

/// Bits of conntrack's status (`IPS_*`).
pub mod status {
    /// Packets have been seen both ways.
    pub const SEEN_REPLY: u32 = 1 << 1;
    /// Not to be dropped early when the table is full.
    pub const ASSURED: u32 = 1 << 2;
    /// Another connection's helper expected it.
    pub const EXPECTED: u32 = 1;
    /// In the table.
    pub const CONFIRMED: u32 = 1 << 3;
    /// The source is translated.
    pub const SRC_NAT: u32 = 1 << 4;
    /// The destination is translated.
    pub const DST_NAT: u32 = 1 << 5;
    /// Sequence numbers are shifted.
    pub const SEQ_ADJUST: u32 = 1 << 6;
    /// On its way out.
    pub const DYING: u32 = 1 << 9;
    /// Packets do not refresh the timeout, and nothing can change it.
    pub const FIXED_TIMEOUT: u32 = 1 << 10;
    /// Forwarded past conntrack, by a flow table.
    pub const OFFLOADED: u32 = 1 << 14;
}

/// `TCP_CONNTRACK_ESTABLISHED`.
pub const TCP_ESTABLISHED: u8 = 3;

/// The kernel's TCP state of a connection that was reset.
pub const TCP_CLOSE: u8 = 8;

fn family_number(family: crate::conn::Family) -> u8 {
    match family {
        crate::conn::Family::V4 => libc::AF_INET as u8,
        crate::conn::Family::V6 => libc::AF_INET6 as u8,
    }
}
