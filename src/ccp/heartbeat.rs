//! Heartbeats: FWHA_MY_STATE as stock decoders show it, with our own fields behind.
//!
//! ```text
//!  20  N, number of members shown   u16     the highest member number in use
//!  22  report code                  u16     3: members and interfaces
//!  24  HA mode                      u16     2: more than one active
//!  26  time unit                    u16     ms: the heartbeat interval
//!  28  member states                N x u8  0 down, 1 initializing, 2 standby, 3 ready, 4 active
//!      interfaces                   4 x i8  in up, in assumed up, out up, out assumed up: 1 0 1 0
//!      last heard                   N x i8  time units ago, 0 to 127
//!  --  our fields, OWN_SIZE bytes
//!   0  protocol version  u8         20  hears     u64  bit m: I hear member m
//!   1  flags             u8         28  incarnation u64
//!   2  shards            u8         36  capacity  u64  slots
//!   3  priority          u8         44  room      u64  slots
//!   4  site              u8         52  key id    u8, 3 bytes zero
//!   5  zero              u8         56  authentication tag  16 bytes, zero without a key
//!   6  own size          u16
//!   8  table id          u32
//!  12  interval          u32 ms
//!  16  dead after        u32 ms    72  synced    u64  bit m: member m has what it should have of mine
//!                                  80  back in   u32  ms: about to restart, back within this; 0: not
//!                                  84  accepted  u32  member << 24 | low bits of its incarnation: of two hosts
//!                                                     with that number, the one that I hear; 0: no such two
//! ```
//!
//! A heartbeat with `FULL_SIZE` is padded with zeros to the size of a full datagram.

use super::bytes::{Reader, Writer};
use super::header::{Header, OPCODE_HEARTBEAT};
use super::{PROTOCOL_VERSION, Reject};
use crate::conn::MemberId;
use crate::limits::{DATAGRAM_MAX, MEMBERS_MAX, SHARDS_MAX};

/// Bytes of our own fields.
pub const OWN_SIZE: usize = 88;

const READY: u8 = 1 << 0;
const LEAVING: u8 = 1 << 1;
const FULL_SIZE: u8 = 1 << 2;
const SYNCING: u8 = 1 << 3;

/// What stock decoders show of one member.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Shown {
    /// Not there.
    #[default]
    Down = 0,
    /// There, not ready.
    Initializing = 1,
    /// Leaving.
    Standby = 2,
    /// Ready.
    Active = 4,
}

/// One member's heartbeat.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Heartbeat {
    /// The sender.
    pub from: MemberId,
    /// Whether the sender can take over connections and hold copies.
    pub ready: bool,
    /// Whether the sender can hold copies but does not have all yet that it should have.
    pub syncing: bool,
    /// Whether the sender is about to leave.
    pub leaving: bool,
    /// Whether the datagram is padded to full size.
    pub full_size: bool,
    /// Shards of the sender, 1 to 64.
    pub shards: u8,
    /// Priority as a backup: higher is preferred.
    pub priority: u8,
    /// Site of the sender; 0 if unused.
    pub site: u8,
    /// This life of the sender's table.
    pub table_id: u32,
    /// Heartbeat interval, ms.
    pub interval_ms: u32,
    /// Silence after which the sender calls a member dead, ms.
    pub dead_ms: u32,
    /// Bit m set: the sender hears member m.
    pub hears: u64,
    /// This run of the sender's process.
    pub incarnation: u64,
    /// Slots of the sender.
    pub capacity: u64,
    /// Free slots of the sender.
    pub room: u64,
    /// Bit m set: member m has every copy that the sender wants it to have.
    pub synced: u64,
    /// Two hosts have one number: which, and the low bits of the incarnation that the sender takes
    /// for that member.
    pub accepted: Option<Accepted>,
    /// The sender is about to restart with its table and will be back within this time, ms. 0: it
    /// is not.
    pub back_ms: u32,
}

/// Whom a member hears of two hosts with one number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Accepted {
    member: MemberId,
    incarnation: u32,
}

impl Accepted {
    /// This run of this member's process.
    pub fn new(member: MemberId, incarnation: u64) -> Accepted {
        Accepted { member, incarnation: incarnation as u32 & 0xff_ffff }
    }

    fn to_word(self) -> u32 {
        (self.member as u32) << 24 | self.incarnation
    }

    fn from_word(word: u32) -> Option<Accepted> {
        (word >> 24 != 0)
            .then_some(Accepted { member: (word >> 24) as MemberId, incarnation: word & 0xff_ffff })
    }
}

impl Heartbeat {
    /// Whether the sender says that it hears this member.
    pub fn hears(&self, member: MemberId) -> bool {
        self.hears >> member & 1 == 1
    }

    /// Writes the whole datagram; `shown` has a state and an age in time units per member, from
    /// member 1 on.
    pub fn encode(&self, group: u16, shown: &[(Shown, u8)], w: &mut Writer<'_>) {
        assert!((1..=MEMBERS_MAX).contains(&shown.len()));
        Header { group, opcode: OPCODE_HEARTBEAT, from: self.from, to: None, to_shard: 0 }
            .encode(w);
        w.u16(shown.len() as u16);
        w.u16(3);
        w.u16(2);
        w.u16(self.interval_ms.min(u16::MAX as u32) as u16);
        shown.iter().for_each(|(state, _)| w.u8(*state as u8));
        w.put(&[1, 0, 1, 0]);
        shown.iter().for_each(|(_, age)| w.u8((*age).min(127)));
        let flag = |set, bit| if set { bit } else { 0 };
        w.u8(PROTOCOL_VERSION);
        w.u8(flag(self.ready, READY)
            | flag(self.leaving, LEAVING)
            | flag(self.full_size, FULL_SIZE)
            | flag(self.syncing, SYNCING));
        w.u8(self.shards);
        w.u8(self.priority);
        w.u8(self.site);
        w.u8(0);
        w.u16(OWN_SIZE as u16);
        w.u32(self.table_id);
        w.u32(self.interval_ms);
        w.u32(self.dead_ms);
        w.u64(self.hears);
        w.u64(self.incarnation);
        w.u64(self.capacity);
        w.u64(self.room);
        w.put(&[0; 4]);
        w.put(&[0; 16]);
        w.u64(self.synced);
        w.u32(self.back_ms);
        w.u32(self.accepted.map_or(0, Accepted::to_word));
        if self.full_size {
            w.pad_to(DATAGRAM_MAX);
        }
    }

    /// Reads a heartbeat behind its checked header; `len` is the length of the whole datagram.
    pub fn decode(header: &Header, r: &mut Reader<'_>, len: usize) -> Result<Heartbeat, Reject> {
        let n = r.u16()? as usize;
        if r.u16()? != 3 || n == 0 || n > MEMBERS_MAX {
            return Err(Reject::Message);
        }
        r.bytes(4 + n + 4 + n)?;
        if r.u8()? != PROTOCOL_VERSION {
            return Err(Reject::Version);
        }
        let flags = r.u8()?;
        let mut heartbeat = Heartbeat {
            from: header.from,
            ready: flags & READY != 0,
            syncing: flags & SYNCING != 0,
            leaving: flags & LEAVING != 0,
            full_size: flags & FULL_SIZE != 0,
            shards: r.u8()?,
            priority: r.u8()?,
            site: r.u8()?,
            table_id: {
                r.u8()?;
                if (r.u16()? as usize) < OWN_SIZE {
                    return Err(Reject::Message);
                }
                r.u32()?
            },
            interval_ms: r.u32()?,
            dead_ms: r.u32()?,
            hears: r.u64()?,
            incarnation: r.u64()?,
            capacity: r.u64()?,
            room: r.u64()?,
            synced: 0,
            accepted: None,
            back_ms: 0,
        };
        if r.u8()? != 0 {
            return Err(Reject::Key);
        }
        r.bytes(3 + 16)?;
        heartbeat.synced = r.u64()?;
        heartbeat.back_ms = r.u32()?;
        heartbeat.accepted = Accepted::from_word(r.u32()?);
        if heartbeat.full_size && len != DATAGRAM_MAX {
            return Err(Reject::Short);
        }
        if !(1..=SHARDS_MAX).contains(&(heartbeat.shards as usize)) {
            return Err(Reject::Shard);
        }
        if heartbeat.table_id == 0 || heartbeat.interval_ms == 0 {
            return Err(Reject::Message);
        }
        Ok(heartbeat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(full_size: bool) -> Heartbeat {
        Heartbeat {
            from: 2,
            ready: true,
            syncing: true,
            leaving: false,
            full_size,
            shards: 3,
            priority: 100,
            site: 1,
            table_id: 0xdead_beef,
            interval_ms: 100,
            dead_ms: 300,
            hears: 1 << 1 | 1 << 3,
            incarnation: 0x0123_4567_89ab_cdef,
            capacity: 1_000_000,
            room: 999_999,
            synced: 1 << 52 | 1 << 1,
            accepted: Some(Accepted::new(52, 0x0123_4567_89ab_cdef)),
            back_ms: 30_000,
        }
    }

    #[test]
    fn a_heartbeat_reads_back_and_every_cut_is_refused() {
        for full_size in [false, true] {
            let heartbeat = sample(full_size);
            let mut buffer = [0xa5; DATAGRAM_MAX];
            let mut w = Writer::new(&mut buffer);
            heartbeat.encode(
                7,
                &[(Shown::Active, 0), (Shown::Active, 200), (Shown::Down, 127)],
                &mut w,
            );
            let len = w.len();
            assert_eq!(len, if full_size { DATAGRAM_MAX } else { 20 + 8 + 3 + 4 + 3 + OWN_SIZE });
            let decode = |bytes: &[u8]| {
                let mut r = Reader::new(bytes);
                let header = Header::decode(&mut r, 7)?;
                Heartbeat::decode(&header, &mut r, bytes.len())
            };
            assert_eq!(decode(&buffer[..len]), Ok(heartbeat));
            for cut in (0..len).step_by(if cfg!(miri) { 20 } else { 1 }) {
                assert!(decode(&buffer[..cut]).is_err(), "cut at {cut}");
            }
            assert_eq!(buffer[36], 127, "ages stay positive as signed bytes");
        }
    }
}
