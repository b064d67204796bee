//! The CPHA header: the first 20 bytes of every datagram, as Wireshark's packet-cpha.c reads them.
//!
//! ```text
//!  0  magic 0x1A90           10  random id: 0
//!  2  CPHA version 0x0B68    12  source machine id: the member
//!  4  cluster number: group  14  destination machine id: the member, 0xffff for all
//!  6  opcode                 16  policy id: 0
//!  8  source interface: 1    18  filler: 0, then the destination shard (offset 19)
//! ```
//!
//! The destination shard lies in the filler's low byte, where the classic BPF program that
//! steers datagrams to shards finds it.

use super::Reject;
use super::bytes::{Reader, Writer};
use crate::conn::MemberId;
use crate::limits::MEMBERS_MAX;

/// First two bytes of every datagram.
pub const MAGIC: u16 = 0x1a90;
/// CPHA version: one that stock decoders list.
pub const CPHA_VERSION: u16 = 0x0b68;
/// Bytes of the header.
pub const HEADER_SIZE: usize = 20;
/// Where the opcode lies.
const OPCODE_OFFSET: usize = 6;
/// Where the destination shard lies.
pub const SHARD_OFFSET: usize = 19;
/// Opcode of heartbeats (FWHA_MY_STATE).
pub const OPCODE_HEARTBEAT: u16 = 1;
/// Opcode of synchronization (FWHAP_SYNC to Wireshark).
pub const OPCODE_SYNC: u16 = 10;
/// Destination of heartbeats.
pub const EVERYONE: u16 = 0xffff;

/// Whom a datagram is for, as far as its header says: a look before it is decoded, and trusted no
/// further.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Addressee {
    /// A heartbeat, for the whole group.
    Everyone,
    /// This shard.
    Shard(u8),
    /// It is too short to say.
    Nobody,
}

impl Addressee {
    /// That of these bytes.
    pub fn of(bytes: &[u8]) -> Addressee {
        match (bytes.get(OPCODE_OFFSET..OPCODE_OFFSET + 2), bytes.get(SHARD_OFFSET)) {
            (Some(opcode), _) if opcode == OPCODE_HEARTBEAT.to_be_bytes() => Addressee::Everyone,
            (_, Some(shard)) => Addressee::Shard(*shard),
            (_, None) => Addressee::Nobody,
        }
    }
}

/// The header's meaning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The group's number.
    pub group: u16,
    /// [`OPCODE_HEARTBEAT`] or [`OPCODE_SYNC`].
    pub opcode: u16,
    /// The sending member.
    pub from: MemberId,
    /// The receiving member, `None` for everyone.
    pub to: Option<MemberId>,
    /// The receiving shard; 0 for heartbeats.
    pub to_shard: u8,
}

impl Header {
    /// Writes the 20 bytes.
    pub fn encode(&self, w: &mut Writer<'_>) {
        w.u16(MAGIC);
        w.u16(CPHA_VERSION);
        w.u16(self.group);
        w.u16(self.opcode);
        w.u16(1);
        w.u16(0);
        w.u16(self.from as u16);
        w.u16(self.to.map_or(EVERYONE, u16::from));
        w.u16(0);
        w.u8(0);
        w.u8(self.to_shard);
    }

    /// Reads and checks the header of a datagram for `group`.
    pub fn decode(r: &mut Reader<'_>, group: u16) -> Result<Header, Reject> {
        if r.u16()? != MAGIC {
            return Err(Reject::Magic);
        }
        if r.u16()? != CPHA_VERSION {
            return Err(Reject::Version);
        }
        if r.u16()? != group {
            return Err(Reject::Group);
        }
        let opcode = r.u16()?;
        if !matches!(opcode, OPCODE_HEARTBEAT | OPCODE_SYNC) {
            return Err(Reject::Opcode);
        }
        let _interface = r.u16()?;
        let _random = r.u16()?;
        let from = member(r.u16()?)?;
        let to = match r.u16()? {
            EVERYONE => None,
            number => Some(member(number)?),
        };
        let _policy = r.u16()?;
        let [_, to_shard] = r.array()?;
        Ok(Header { group, opcode, from, to, to_shard })
    }
}

fn member(number: u16) -> Result<MemberId, Reject> {
    match (1..=MEMBERS_MAX as u16).contains(&number) {
        true => Ok(number as MemberId),
        false => Err(Reject::Member),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_a_datagram_is_for_is_seen_before_it_is_decoded() {
        let header = |opcode, to_shard| Header { group: 7, opcode, from: 1, to: Some(2), to_shard };
        for (header, addressee) in [
            (header(OPCODE_HEARTBEAT, 3), Addressee::Everyone),
            (header(OPCODE_SYNC, 0), Addressee::Shard(0)),
            (header(OPCODE_SYNC, 3), Addressee::Shard(3)),
        ] {
            let mut buffer = [0xa5; HEADER_SIZE];
            header.encode(&mut Writer::new(&mut buffer));
            assert_eq!(Addressee::of(&buffer), addressee);
        }
        assert_eq!(Addressee::of(&[0; SHARD_OFFSET]), Addressee::Nobody);
        assert_eq!(Addressee::of(&[]), Addressee::Nobody);
    }

    #[test]
    fn the_header_is_golden() {
        let header = Header { group: 7, opcode: OPCODE_SYNC, from: 1, to: Some(2), to_shard: 3 };
        let mut buffer = [0xa5; HEADER_SIZE];
        header.encode(&mut Writer::new(&mut buffer));
        let golden = [0x1a, 0x90, 0x0b, 0x68, 0, 7, 0, 10, 0, 1, 0, 0, 0, 1, 0, 2, 0, 0, 0, 3];
        assert_eq!(buffer, golden);
        assert_eq!(Header::decode(&mut Reader::new(&golden), 7), Ok(header));
        assert_eq!(Header::decode(&mut Reader::new(&golden), 8), Err(Reject::Group));
        for cut in 0..HEADER_SIZE {
            assert_eq!(Header::decode(&mut Reader::new(&golden[..cut]), 7), Err(Reject::Short));
        }
        for (at, value, reason) in [
            (0, 0, Reject::Magic),
            (3, 0, Reject::Version),
            (7, 3, Reject::Opcode),
            (13, 53, Reject::Member),
        ] {
            let mut bad = golden;
            bad[at] = value;
            assert_eq!(Header::decode(&mut Reader::new(&bad), 7), Err(reason));
        }
    }
}
