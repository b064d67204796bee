//! The sub-header of synchronization datagrams, behind the CPHA header.
//!
//! ```text
//!  20  protocol version   u8       28  table id of the destination  u32
//!  21  source shard       u8       32  session u16, sequence number 48 bits
//!  22  key id             u8       40  authentication tag, 16 bytes, zero without a key
//!  23  flags              u8       56  messages
//!  24  table id of source u32
//! ```
//!
//! Bit 0 of the flags: the datagram is sequenced. Deltas and leases travel in sequenced
//! datagrams, which are repaired; acks, skips and the like in others, with sequence number 0.

use super::bytes::{Reader, Writer};
use super::header::{Header, OPCODE_SYNC};
use super::{PROTOCOL_VERSION, Reject};
use crate::limits::SHARDS_MAX;
use crate::seq::Seq;

/// Where the messages begin.
pub const MESSAGES_AT: usize = 56;

const SEQUENCED: u8 = 1 << 0;

/// The sub-header's meaning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SyncHeader {
    /// The sending shard.
    pub from_shard: u8,
    /// This life of the sender's table.
    pub from_table: u32,
    /// The receiver's table as the sender knows it.
    pub to_table: u32,
    /// This session of the stream from sender to receiver.
    pub session: u16,
    /// The datagram's place in the stream; `Seq::NONE` if it is not sequenced.
    pub seq: Seq,
}

impl SyncHeader {
    /// Writes both headers.
    pub fn encode(&self, header: &Header, w: &mut Writer<'_>) {
        debug_assert!(header.opcode == OPCODE_SYNC);
        header.encode(w);
        w.u8(PROTOCOL_VERSION);
        w.u8(self.from_shard);
        w.u8(0);
        w.u8(if self.seq == Seq::NONE { 0 } else { SEQUENCED });
        w.u32(self.from_table);
        w.u32(self.to_table);
        w.u64((self.session as u64) << 48 | self.seq.raw());
        w.put(&[0; 16]);
    }

    /// Reads the sub-header behind a checked CPHA header.
    pub fn decode(r: &mut Reader<'_>) -> Result<SyncHeader, Reject> {
        if r.u8()? != PROTOCOL_VERSION {
            return Err(Reject::Version);
        }
        let from_shard = r.u8()?;
        if from_shard as usize >= SHARDS_MAX {
            return Err(Reject::Shard);
        }
        if r.u8()? != 0 {
            return Err(Reject::Key);
        }
        let flags = r.u8()?;
        let (from_table, to_table) = (r.u32()?, r.u32()?);
        let word = r.u64()?;
        r.bytes(16)?;
        let seq = Seq::from_low_bits(word);
        if (flags & SEQUENCED != 0) != (seq != Seq::NONE) {
            return Err(Reject::Message);
        }
        Ok(SyncHeader { from_shard, from_table, to_table, session: (word >> 48) as u16, seq })
    }
}
