//! A slot: 128 bytes of shared memory that hold one copy of a connection.
//!
//! What changes lies in the first cache line, what does not (the addresses) in the second, which an
//! update leaves alone:
//!
//! ```text
//!  word  63                             32 31                              0
//!   0   | kind 6 |      generation 26     |        seqlock (odd: torn)      |
//!   1   |             epoch               |             version             |  stamp
//!   2   |      peer: the coordinate of the other copy (or the lessee)       |
//!   3   | orig. sport  | orig. dport      |  reply sport  |   reply dport   |
//!   4   |             mark                |      timeout, seconds           |
//!   5   |    conntrack status             | tcp: state | scale | fl.o | fl.r|
//!   6   | orig. zone   | reply zone       | protocol | family | groups | flags |   claimed 1, moving 2, unseen 4, spent 8
//!   7   | session of stream 16 |  last: sequence number of the last delta  |
//!   8,9   original source          10,11  original destination
//!  12,13  reply source             14,15  reply destination                    (low word first)
//! ```
//!
//! One thread writes a slot, any process may read it: the seqlock in word 0 is odd while a
//! write is under way, and after a crash an odd one marks a torn slot. All words are atomics
//! and all of this is safe code, over shared memory or over a `Vec`.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::coordinate::{Coordinate, Generation};
use super::extra::Extra;
use super::tuple::{Family, Tuple};
use crate::kill::kill_point;
use crate::seq::Seq;
use crate::word::Word;

/// What a slot holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Nothing; this shard may use it.
    Free = 0,
    /// Nothing; a peer's shard, named in `peer`, may fill it with a copy.
    Leased = 1,
    /// A connection younger than the hold time: known here only.
    Held = 2,
    /// A connection whose traffic this member sees.
    Active = 3,
    /// A copy for another member, named in `peer`. Once that member is dead, a walk over the table
    /// makes this one the active (presumed).
    Backup = 4,
    /// A closed connection whose close the backup has not acknowledged yet.
    Closing = 5,
}

impl Kind {
    /// The kind that a number stands for.
    pub fn from_raw(raw: u8) -> Option<Kind> {
        Some(match raw {
            0 => Kind::Free,
            1 => Kind::Leased,
            2 => Kind::Held,
            3 => Kind::Active,
            4 => Kind::Backup,
            5 => Kind::Closing,
            _ => return None,
        })
    }

    /// Whether a connection lives in the slot.
    pub fn is_connection(self) -> bool {
        matches!(self, Kind::Held | Kind::Active | Kind::Backup)
    }

    /// The word for an operator.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Free => "free",
            Kind::Leased => "leased",
            Kind::Held => "held",
            Kind::Active => "active",
            Kind::Backup => "backup",
            Kind::Closing => "closing",
        }
    }
}

/// What decides which of two states is newer: a claim outranks any version, a version any
/// earlier one. Versions go on counting through claims.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Stamp {
    /// Raised by a claim only.
    pub epoch: u32,
    /// Raised by every change.
    pub version: u32,
}

/// A copy is behind its active by fewer versions than this.
const UNHEARD_MAX: u32 = 1 << 16;

impl Stamp {
    /// The stamp of the next change. After 2^32 - 1 versions the epoch moves on instead.
    pub fn changed(self) -> Stamp {
        match self.version.checked_add(1) {
            Some(version) => Stamp { version, ..self },
            None => Stamp { epoch: self.epoch.saturating_add(1), version: 0 },
        }
    }

    /// The stamp of a claim over this one. Changes that the claimant has not heard of may have
    /// moved the epoch on: over those as well.
    pub fn claimed(self) -> Stamp {
        let may_have_moved = self.version > u32::MAX - UNHEARD_MAX;
        Stamp {
            epoch: self.epoch.saturating_add(1 + u32::from(may_have_moved)),
            version: self.changed().version,
        }
    }
}

/// What conntrack knows of a connection besides its tuples: the fields that change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct State {
    /// `IPS_*` bits of conntrack's status.
    pub status: u32,
    /// `TCP_CONNTRACK_*` state; 0 for other protocols.
    pub tcp_state: u8,
    /// Window scales: original direction in the low four bits, reply in the high four.
    pub tcp_scale: u8,
    /// `IP_CT_TCP_FLAG_*` of the original direction.
    pub tcp_flags_original: u8,
    /// `IP_CT_TCP_FLAG_*` of the reply direction.
    pub tcp_flags_reply: u8,
    /// Seconds until the entry expires, as last reported.
    pub timeout_s: u32,
    /// The connection mark.
    pub mark: u32,
}

/// A connection's whole replicated value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    /// The direction that opened the connection, as its first packet arrived.
    pub original: Tuple,
    /// What an answer looks like when it arrives: the mirrored original, unless translated.
    pub reply: Tuple,
    /// What changes.
    pub state: State,
    /// What only few connections have; it changes as well.
    pub extra: Extra,
}

impl Connection {
    /// A connection without an [`Extra`].
    pub fn new(original: Tuple, reply: Tuple, state: State) -> Connection {
        Connection { original, reply, state, extra: Extra::NONE }
    }

    /// Whether any address or port is translated.
    pub fn is_translated(&self) -> bool {
        self.reply != Tuple { zone: self.reply.zone, ..self.original.mirrored() }
    }
}

/// Groups of fields that travel together. A mask of them says what a delta carries, and in a
/// slot which groups changed since the last acknowledged delta.
pub mod groups {
    /// Both tuples and the sender's coordinate; with it a delta is a "new".
    pub const TUPLES: u8 = 1 << 0;
    /// Status and TCP.
    pub const STATE: u8 = 1 << 1;
    /// Timeout.
    pub const TIMEOUT: u8 = 1 << 2;
    /// Mark.
    pub const MARK: u8 = 1 << 3;
    /// What only few connections have, see [`Extra`](super::Extra).
    pub const EXTRA: u8 = 1 << 5;
    /// Every group.
    pub const ALL: u8 = TUPLES | STATE | TIMEOUT | MARK | EXTRA;
}

/// A copy of a slot's first cache line, taken apart by its methods.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Line([u64; 8]);

/// A copy of a slot's second cache line: the four addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Addresses([u64; 8]);

const FAMILY_V6: u64 = 1;

impl Line {
    /// What the slot holds. An unknown number, which only foreign memory can have, reads as free.
    pub fn kind(&self) -> Kind {
        Kind::from_raw((self.0[0] >> 58) as u8).unwrap_or(Kind::Free)
    }

    /// Sets what the slot holds.
    pub fn set_kind(&mut self, kind: Kind) {
        self.0[0] = self.0[0] & !(63 << 58) | (kind as u64) << 58;
    }

    /// The life of the slot.
    pub fn generation(&self) -> Generation {
        Generation::from_low_bits((self.0[0] >> 32) as u32)
    }

    /// Sets the life of the slot.
    pub fn set_generation(&mut self, generation: Generation) {
        self.0[0] = self.0[0] & !(((1 << 26) - 1) << 32) | (generation.raw() as u64) << 32;
    }

    /// Epoch and version.
    pub fn stamp(&self) -> Stamp {
        Stamp { epoch: (self.0[1] >> 32) as u32, version: self.0[1] as u32 }
    }

    /// Sets epoch and version.
    pub fn set_stamp(&mut self, stamp: Stamp) {
        self.0[1] = (stamp.epoch as u64) << 32 | stamp.version as u64;
    }

    /// The other copy: an active's backup, a backup's active, a leased slot's lessee.
    pub fn peer(&self) -> Coordinate {
        Coordinate::from_raw(self.0[2])
    }

    /// Sets the other copy.
    pub fn set_peer(&mut self, peer: Coordinate) {
        self.0[2] = peer.raw();
    }

    /// The fields that change.
    pub fn state(&self) -> State {
        let tcp = (self.0[5] as u32).to_be_bytes();
        State {
            status: (self.0[5] >> 32) as u32,
            tcp_state: tcp[0],
            tcp_scale: tcp[1],
            tcp_flags_original: tcp[2],
            tcp_flags_reply: tcp[3],
            timeout_s: self.0[4] as u32,
            mark: (self.0[4] >> 32) as u32,
        }
    }

    /// Sets the fields that change.
    pub fn set_state(&mut self, s: &State) {
        let tcp =
            u32::from_be_bytes([s.tcp_state, s.tcp_scale, s.tcp_flags_original, s.tcp_flags_reply]);
        self.0[4] = (s.mark as u64) << 32 | s.timeout_s as u64;
        self.0[5] = (s.status as u64) << 32 | tcp as u64;
    }

    /// Groups changed since the last acknowledged delta.
    pub fn groups(&self) -> u8 {
        (self.0[6] >> 8) as u8
    }

    /// Sets the groups changed since the last acknowledged delta.
    pub fn set_groups(&mut self, groups: u8) {
        self.0[6] = self.0[6] & !0xff00 | (groups as u64) << 8;
    }

    /// Of an active: whether its claim rests on traffic seen here, not on presumption. Of a copy:
    /// whether this member's own source saw the connection as well.
    pub fn is_claimed(&self) -> bool {
        self.0[6] & 1 == 1
    }

    /// Notes whether traffic was seen here.
    pub fn set_claimed(&mut self, claimed: bool) {
        self.0[6] = self.0[6] & !1 | claimed as u64;
    }

    /// Whether the connection is changing its backup: the coordinate beside the slot is its
    /// previous one.
    pub fn is_moving(&self) -> bool {
        self.0[6] & 2 == 2
    }

    /// Notes whether the connection is changing its backup.
    pub fn set_moving(&mut self, moving: bool) {
        self.0[6] = self.0[6] & !2 | (moving as u64) << 1;
    }

    /// Of a connection that is closing: whether nobody saw its end. Of a held one: whether it is
    /// what is left of a copy whose end nobody saw, and its kernel entry is still to be looked at.
    pub fn is_unseen(&self) -> bool {
        self.0[6] & 4 == 4
    }

    /// Sets what [`is_unseen`](Self::is_unseen) tells.
    pub fn set_unseen(&mut self, unseen: bool) {
        self.0[6] = self.0[6] & !4 | (unseen as u64) << 2;
    }

    /// Whether a close of this life was taken although the slot went on: whoever sent it believes
    /// that the next life is its lease, and it must never be.
    pub fn is_spent(&self) -> bool {
        self.0[6] & 8 == 8
    }

    /// Sets what [`is_spent`](Self::is_spent) tells.
    pub fn set_spent(&mut self, spent: bool) {
        self.0[6] = self.0[6] & !8 | (spent as u64) << 3;
    }

    /// The datagram that carries the newest delta; `Seq::NONE` if the newest state is in none.
    pub fn last(&self) -> Seq {
        Seq::from_low_bits(self.0[7])
    }

    /// Sets the datagram of the newest delta.
    pub fn set_last(&mut self, last: Seq) {
        self.0[7] = self.0[7] & !Seq::LAST.raw() | last.raw();
    }

    /// The session of the peer's half of the stream (see `sync::stream`) in which this slot was
    /// leased to the peer or, of an active, in which the peer leased the place of its backup.
    pub fn session(&self) -> u16 {
        (self.0[7] >> 48) as u16
    }

    /// Sets the session of the lessee's stream.
    pub fn set_session(&mut self, session: u16) {
        self.0[7] = self.0[7] & Seq::LAST.raw() | (session as u64) << 48;
    }

    /// Both tuples, with the addresses of the second line.
    pub fn tuples(&self, a: &Addresses) -> (Tuple, Tuple) {
        let wide = |i: usize| (a.0[i + 1] as u128) << 64 | a.0[i] as u128;
        let family = if self.0[6] >> 16 & 0xff == FAMILY_V6 { Family::V6 } else { Family::V4 };
        let protocol = (self.0[6] >> 24) as u8;
        let tuple = |src, dst, ports: u32, zone| Tuple {
            src,
            dst,
            sport: (ports >> 16) as u16,
            dport: ports as u16,
            zone,
            protocol,
            family,
        };
        (
            tuple(wide(0), wide(2), (self.0[3] >> 32) as u32, (self.0[6] >> 48) as u16),
            tuple(wide(4), wide(6), self.0[3] as u32, (self.0[6] >> 32) as u16),
        )
    }

    /// Sets both tuples and returns what belongs into the second line.
    pub fn set_tuples(&mut self, original: &Tuple, reply: &Tuple) -> Addresses {
        let ports = |t: &Tuple| (t.sport as u64) << 16 | t.dport as u64;
        self.0[3] = ports(original) << 32 | ports(reply);
        let family = if original.family == Family::V6 { FAMILY_V6 } else { 0 };
        self.0[6] = (original.zone as u64) << 48
            | (reply.zone as u64) << 32
            | (original.protocol as u64) << 24
            | family << 16
            | self.0[6] & 0xffff;
        let mut a = [0; 8];
        for (i, v) in [original.src, original.dst, reply.src, reply.dst].into_iter().enumerate() {
            a[2 * i] = v as u64;
            a[2 * i + 1] = (v >> 64) as u64;
        }
        Addresses(a)
    }
}

/// 128 bytes of the table.
#[repr(C, align(128))]
pub struct Slot<W = AtomicU64> {
    words: [W; 16],
}

const _: () = assert!(size_of::<Slot>() == 128);

impl Default for Slot {
    fn default() -> Slot {
        Slot { words: Default::default() }
    }
}

impl<W: Word> Slot<W> {
    /// The first line, as its writer sees it.
    pub fn line(&self) -> Line {
        Line(std::array::from_fn(|i| self.words[i].get()))
    }

    /// The second line, as its writer sees it.
    pub fn addresses(&self) -> Addresses {
        Addresses(std::array::from_fn(|i| self.words[8 + i].get()))
    }

    /// The tuples, as their writer sees them.
    pub fn tuples(&self) -> (Tuple, Tuple) {
        self.line().tuples(&self.addresses())
    }

    /// The whole connection, as its writer sees it.
    pub fn connection(&self) -> Connection {
        let line = self.line();
        let (original, reply) = line.tuples(&self.addresses());
        Connection::new(original, reply, line.state())
    }

    /// Both lines as another thread or process may read them, or `None` while (or since) a
    /// write is unfinished.
    pub fn snapshot(&self) -> Option<(Line, Addresses)> {
        let before = self.words[0].get();
        if before & 1 == 1 {
            return None;
        }
        fence(Ordering::Acquire);
        let copy = (self.line(), self.addresses());
        fence(Ordering::Acquire);
        (self.words[0].get() == before).then_some(copy)
    }

    /// Whether a crash left this slot half written. Only for memory that nobody writes.
    pub fn is_torn(&self) -> bool {
        self.words[0].get() & 1 == 1
    }
}

impl Slot {
    /// Replaces the first line.
    pub fn store(&self, line: &Line) {
        self.write(line, None);
    }

    /// Replaces both lines.
    pub fn store_with(&self, line: &Line, addresses: &Addresses) {
        self.write(line, Some(addresses));
    }

    /// Changes the first line in place.
    pub fn update(&self, change: impl FnOnce(&mut Line)) {
        let mut line = self.line();
        change(&mut line);
        self.store(&line);
    }

    fn write(&self, line: &Line, addresses: Option<&Addresses>) {
        let before = self.words[0].load(Ordering::Relaxed);
        let odd = (before as u32) | 1;
        kill_point();
        self.words[0].store(before & !0xffff_ffff | odd as u64, Ordering::Relaxed);
        // Pairs with the acquire fence in `snapshot`: whoever sees a word written below also sees
        // the odd count.
        fence(Ordering::Release);
        for i in 1..8 {
            self.words[i].store(line.0[i], Ordering::Relaxed);
        }
        kill_point();
        if let Some(a) = addresses {
            for i in 0..8 {
                self.words[8 + i].store(a.0[i], Ordering::Relaxed);
            }
        }
        kill_point();
        // Pairs with the first load in `snapshot`: whoever sees the even count sees all of the
        // above.
        self.words[0]
            .store(line.0[0] & !0xffff_ffff | odd.wrapping_add(1) as u64, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn sample() -> (Line, Addresses, Connection) {
        let mut original = Tuple::v6(
            6,
            ("2001:db8::1".parse().unwrap(), 40_000),
            ("2001:db8::2".parse().unwrap(), 443),
        );
        original.zone = 7;
        let mut reply = original.mirrored();
        reply.dst = 5 << 100;
        reply.zone = 8;
        let state = State {
            status: 0x19e,
            tcp_state: 3,
            tcp_scale: 0x7a,
            tcp_flags_original: 0x23,
            tcp_flags_reply: 0x31,
            timeout_s: 432_000,
            mark: 0xdead_beef,
        };
        let mut line = Slot::default().line();
        let addresses = line.set_tuples(&original, &reply);
        line.set_state(&state);
        (line, addresses, Connection::new(original, reply, state))
    }

    #[test]
    fn a_slot_keeps_every_field_apart() {
        let (mut line, addresses, connection) = sample();
        line.set_kind(Kind::Backup);
        line.set_generation(Generation::from_low_bits(u32::MAX));
        line.set_stamp(Stamp { epoch: 3, version: u32::MAX });
        line.set_peer(Coordinate::new(52, 63, 9, Generation::default()));
        line.set_groups(groups::ALL);
        line.set_last(Seq::LAST);
        line.set_session(0xabcd);
        let slot = Slot::default();
        slot.store_with(&line, &addresses);
        let (got, a) = slot.snapshot().unwrap();
        assert_eq!(got.kind(), Kind::Backup);
        assert_eq!(got.generation().raw(), (1 << 26) - 1);
        assert_eq!(got.stamp(), Stamp { epoch: 3, version: u32::MAX });
        assert_eq!((got.peer().member(), got.peer().slot()), (52, 9));
        assert_eq!((got.groups(), got.last(), got.session()), (groups::ALL, Seq::LAST, 0xabcd));
        assert_eq!(got.tuples(&a), (connection.original, connection.reply));
        assert_eq!(slot.connection(), connection);
        assert!(connection.is_translated());
    }

    #[test]
    fn a_reader_never_sees_half_a_write() {
        let slot = Slot::default();
        let rounds: u32 = if cfg!(miri) { 300 } else { 200_000 };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..rounds {
                    let t =
                        Tuple::v4(6, (Ipv4Addr::from(n), n as u16), (Ipv4Addr::from(n), n as u16));
                    let mut line = slot.line();
                    line.set_stamp(Stamp { epoch: n, version: n });
                    let a = line.set_tuples(&t, &t);
                    slot.store_with(&line, &a);
                }
            });
            let mut seen = 0;
            while seen < rounds - 1 {
                let Some((line, a)) = slot.snapshot() else { continue };
                seen = line.stamp().version;
                let (original, reply) = line.tuples(&a);
                assert_eq!((original.src, reply.dst), (seen as u128, seen as u128));
                assert_eq!(line.stamp().epoch, seen);
            }
        });
    }

    #[test]
    fn a_claim_outranks_any_version() {
        let old = Stamp { epoch: 0, version: u32::MAX };
        assert!(old.claimed() > old);
        assert!(old.changed() > old);
        // Also one of an earlier state over all that the other member makes of this one until it
        // hears of the claim.
        assert!(Stamp { epoch: 0, version: u32::MAX - 3 }.claimed().epoch > old.changed().epoch);
        assert!(old.claimed().epoch > old.changed().epoch);
        assert!(Stamp { epoch: 1, version: 0 } > Stamp { epoch: 0, version: 9 });
        assert_eq!(Stamp { epoch: 2, version: 5 }.claimed(), Stamp { epoch: 3, version: 6 });
    }
}
