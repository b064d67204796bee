//! CCP, the protocol on UDP 8116: bytes to meaning and back, and nothing else.
//!
//! Every datagram starts with the 20-byte CPHA header, so that stock decoders show it. Two
//! opcodes are used: MY_STATE is a heartbeat, SYNC carries synchronization. The layouts are
//! drawn in docs/PROTOCOL.md.

pub mod bytes;
pub mod header;
pub mod heartbeat;
pub mod message;
pub mod sync;
pub mod value;

use crate::counters::Counter;

/// Version of what lies behind the CPHA header. Members of one group must agree.
pub const PROTOCOL_VERSION: u8 = 1;

/// The UDP port of everything.
pub const UDP_PORT: u16 = 8116;

/// Why a datagram, or a message in one, was ignored. One reason, one counter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reject {
    /// Shorter than what it claims to be.
    Short,
    /// Not CCP.
    Magic,
    /// Another group's.
    Group,
    /// Another protocol version.
    Version,
    /// An opcode that is not used here.
    Opcode,
    /// From or to a member number that does not fit.
    Member,
    /// From or to a shard that does not exist.
    Shard,
    /// From an address that is not the sender's.
    Source,
    /// For or from a table that is no more, or from an earlier session of the stream.
    Table,
    /// Received before.
    Repeated,
    /// Too far ahead of the floor.
    Window,
    /// A message that makes no sense.
    Message,
    /// A key id that is not configured.
    Key,
}

impl Reject {
    /// The counter of this reason.
    pub fn counter(self) -> Counter {
        match self {
            Reject::Short => Counter::RejectShort,
            Reject::Magic => Counter::RejectMagic,
            Reject::Group => Counter::RejectGroup,
            Reject::Version => Counter::RejectVersion,
            Reject::Opcode => Counter::RejectOpcode,
            Reject::Member => Counter::RejectMember,
            Reject::Shard => Counter::RejectShard,
            Reject::Source => Counter::RejectSource,
            Reject::Table => Counter::RejectTable,
            Reject::Repeated => Counter::RejectRepeated,
            Reject::Window => Counter::RejectWindow,
            Reject::Message => Counter::RejectMessage,
            Reject::Key => Counter::RejectKey,
        }
    }
}
