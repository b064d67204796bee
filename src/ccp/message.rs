//! The messages in a synchronization datagram.
//!
//! A datagram is a row of messages; a zero byte where a type should stand ends it. Every
//! message begins with eight bytes: the type, and for deltas the field groups and the slot
//! that the message is for.
//!
//! ```text
//!   63    58 57    52 51                        26 25                         0
//!  +--------+--------+----------------------------+---------------------------+
//!  |  type  | groups |        target slot         |        generation         |
//!  +--------+--------+----------------------------+---------------------------+
//! ```
//!
//! That is a coordinate whose member and shard, which the datagram names already, gave way
//! to type and groups. docs/PROTOCOL.md draws every message.

use super::Reject;
use super::bytes::{Reader, Writer};
use super::value::{
    EXTRA_MAX, get_extra, get_stamp, get_state, get_tuples, put_extra, put_stamp, put_state,
    put_tuples,
};
use crate::conn::slot::groups;
use crate::conn::{Connection, Coordinate, Extra, Generation, Stamp, State};
use crate::limits::{LEASE_GRANT_MAX, WINDOW};
use crate::seq::Seq;

/// Largest "new" of a connection without an [`Extra`]: translated IPv6, in zones, with a previous
/// backup.
pub const NEW_MAX: usize = 8 + 10 + 8 + 8 + 4 + 4 + 8 + 64 + 16;

/// Largest encoded delta: a [`NEW_MAX`] with everything that only few connections have.
pub const DELTA_MAX: usize = NEW_MAX + EXTRA_MAX;

/// Group bit on the wire: the previous backup's coordinate follows.
const PREVIOUS: u8 = 1 << 4;

/// Of a close: nobody saw the end.
const UNSEEN: u8 = 1 << 0;
/// Of a close that nobody saw: the age of the last packet follows.
const AGE: u8 = 1 << 1;
/// Of a close that nobody saw: the address has left.
const LEFT: u8 = 1 << 2;

/// Sums of a digest.
pub const DIGEST_SUMS: usize = 256;

/// The groups that every "new" brings.
const WHOLE: u8 = groups::ALL & !groups::EXTRA;

/// Slot and generation in the receiver's shard (or, in answers, in the sender's).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The slot.
    pub slot: u32,
    /// The life of the slot.
    pub generation: Generation,
}

impl Place {
    /// The place that a coordinate names in its shard.
    pub fn of(c: Coordinate) -> Place {
        Place { slot: c.slot(), generation: c.generation() }
    }

    fn raw(self) -> u64 {
        (self.slot as u64) << 26 | self.generation.raw() as u64
    }

    fn from_raw(raw: u64) -> Place {
        Place {
            slot: (raw >> 26) as u32 & ((1 << 26) - 1),
            generation: Generation::from_low_bits(raw as u32),
        }
    }
}

/// Why a delta was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Reason {
    /// The slot is not leased to this stream, or not in this session.
    NotLeased = 1,
    /// An update for a copy that is not there.
    NotHere = 2,
    /// The receiver holds a newer state of this connection.
    Superseded = 3,
    /// The receiver gave way to another member's claim just now, and looks for packets of the
    /// connection before a copy takes its entry: to be asked again.
    InDoubt = 4,
}

/// What the active of a connection knows of its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// It saw the end.
    Seen,
    /// Its kernel has the connection no more, and that is all.
    Unseen {
        /// At most so many seconds ago a packet passed its kernel's entry; `None`: that is not
        /// known.
        age_s: Option<u32>,
    },
    /// The same, since the address that it was translated to has left that host.
    Left,
}

/// Why a backup's kernel does not have a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Fault {
    /// Another connection holds the translated tuple.
    Clash = 1,
    /// The kernel's table is full, or as full as it may be made.
    NoRoom = 2,
    /// The kernel refused it for another reason.
    Refused = 3,
}

/// One message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message<'b> {
    /// A whole connection for a leased slot, or for the copy in it.
    New {
        /// Where the copy belongs.
        target: Place,
        /// Epoch and version.
        stamp: Stamp,
        /// Where the sender has it.
        own: Place,
        /// The previous backup, until that is released.
        previous: Option<Coordinate>,
        /// The connection.
        connection: Connection,
    },
    /// The newest value of the groups that changed.
    Update {
        /// Where the copy is.
        target: Place,
        /// Epoch and version.
        stamp: Stamp,
        /// Which groups `state` brings.
        groups: u8,
        /// The previous backup, until that is released.
        previous: Option<Coordinate>,
        /// Their values.
        state: State,
        /// The value of the group that only few connections have; none if `groups` does not name
        /// it.
        extra: Extra,
    },
    /// The connection is closed: the copy goes, the slot's generation moves on.
    Close {
        /// Where the copy is.
        target: Place,
        /// Epoch and version.
        stamp: Stamp,
        /// What is known of the end.
        ended: Ended,
    },
    /// The copy is no longer needed: another member holds it. Else like a close.
    Release {
        /// Where the copy is.
        target: Place,
        /// Epoch and version.
        stamp: Stamp,
    },
    /// After a stream was lost: "I hold this copy of yours; does it still stand?"
    Offer {
        /// Where the former active had the connection.
        target: Place,
        /// Where the sender has it.
        own: Place,
        /// Epoch and version of the sender's copy.
        stamp: Stamp,
        /// Whether the sender saw traffic of it since.
        claimed: bool,
    },
    /// The backup's kernel does not have this copy, or has it after all.
    Decline {
        /// Where the active has the connection.
        target: Place,
        /// Where the sender has the copy.
        own: Place,
        /// Counts the declines of the sender's shard, never 0: an earlier one may arrive later.
        number: u32,
        /// Why the kernel does not have it; `None` if it has.
        fault: Option<Fault>,
    },
    /// Slots that the receiver may fill from now on.
    Lease(Places<'b>),
    /// Slots that the sender had leased from the receiver and does not need: it will not fill them.
    GiveBack(Places<'b>),
    /// What the sender has received and applied of the stream in the other direction.
    Ack {
        /// The session of that stream.
        session: u16,
        /// Everything up to here.
        floor: Seq,
        /// Beyond the floor, 64 numbers a word from floor + 1 on, lowest bit first.
        beyond: Bitmap<'b>,
    },
    /// How many slots the sender wants to have been granted in this session of its stream.
    Want {
        /// Slots, counted from the session's begin.
        total: u64,
    },
    /// A delta was not applied; its datagram is not acknowledged either.
    Refuse {
        /// The session of the stream that brought it.
        session: u16,
        /// The datagram.
        seq: Seq,
        /// The target that it named.
        target: Place,
        /// Why.
        reason: Reason,
        /// The refused new's place at its active; an update has none.
        own: Option<Place>,
    },
    /// Do not wait for anything up to here: what it carried is sent again otherwise.
    Skip {
        /// The last number given up.
        to: Seq,
    },
    /// What the sender's copies at the receiver add up to.
    Digest {
        /// The session of the sender's stream.
        session: u16,
        /// After which datagram that is so.
        seq: Seq,
        /// Whether the pair was apart: an answer is wanted in any case.
        unverified: bool,
        /// Two sums a word, the first in the high half; no word at all: all sums are zero.
        sums: Bitmap<'b>,
    },
    /// The answer: in which buckets the receiver holds something else; in none: they agree.
    Differ {
        /// The session of the stream whose digest it was.
        session: u16,
        /// The digest's number.
        seq: Seq,
        /// A bit for each bucket.
        mask: [u64; 4],
    },
    /// What one copy should be.
    Item {
        /// Where the copy should be.
        target: Place,
        /// Where the sender has the connection.
        own: Place,
        /// The hash that a digest adds up.
        hash: u32,
        /// Which round of the comparison this belongs to, 0 to 63.
        round: u8,
    },
    /// All copies in these buckets were named.
    End {
        /// Which round.
        round: u8,
        /// A bit for each bucket.
        mask: [u64; 4],
    },
    /// The copy of this connection is not what it should be: send all of it again.
    Resend {
        /// Where the receiver has the connection.
        target: Place,
        /// What speaks against a fault of the program, if the copy still should be what was named.
        doubt: Doubt,
    },
    /// The sending member leaves the group now.
    Goodbye,
}

/// What a copy that is not as it was named says of the two members that hold it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doubt {
    /// It should have been as named.
    None = 0,
    /// The two were apart, or one of their processes was killed: no surprise.
    Apart = 1,
    /// Earlier or later deltas may be on their way: then nothing need be wrong.
    Order = 2,
}

impl Doubt {
    fn from_raw(bits: u8) -> Doubt {
        match bits {
            0 => Doubt::None,
            1 => Doubt::Apart,
            _ => Doubt::Order,
        }
    }
}

/// Marks a place that is there, in a word of its own.
const OWN: u64 = 1 << 63;

const NEW: u64 = 1;
const UPDATE: u64 = 2;
const CLOSE: u64 = 3;
const RELEASE: u64 = 4;
const LEASE: u64 = 5;
const ACK: u64 = 6;
const WANT: u64 = 7;
const REFUSE: u64 = 8;
const SKIP: u64 = 9;
const GOODBYE: u64 = 10;
const OFFER: u64 = 11;
const DECLINE: u64 = 12;
const DIGEST: u64 = 13;
const DIFFER: u64 = 14;
const ITEM: u64 = 15;
const END: u64 = 16;
const RESEND: u64 = 17;
const GIVE_BACK: u64 = 18;

/// A row of places in a datagram, eight bytes each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Places<'b>(&'b [u8]);

impl Places<'_> {
    /// The places.
    pub fn iter(&self) -> impl Iterator<Item = Place> + '_ {
        words(self.0).map(Place::from_raw)
    }
}

/// Bits in a datagram, in words of eight bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bitmap<'b>(&'b [u8]);

impl Bitmap<'_> {
    /// The words.
    pub fn words(&self) -> impl Iterator<Item = u64> + '_ {
        words(self.0)
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|c| c.iter().fold(0, |word, byte| word << 8 | *byte as u64))
}

fn head(kind: u64, groups: u8, low: u64) -> u64 {
    kind << 58 | (groups as u64) << 52 | low
}

impl<'b> Message<'b> {
    /// Writes the message. A delta takes at most [`DELTA_MAX`] bytes, any other at most 32 that is
    /// not a list (acks, leases, places given back, digests).
    pub fn encode(&self, w: &mut Writer<'_>) {
        match self {
            Message::New { target, stamp, own, previous, connection } => {
                let extra = if previous.is_some() { PREVIOUS } else { 0 };
                let rare = if connection.extra.is_none() { 0 } else { groups::EXTRA };
                w.u64(head(NEW, WHOLE | rare | extra, target.raw()));
                put_stamp(w, *stamp);
                w.u64(own.raw());
                if let Some(previous) = previous {
                    w.u64(previous.raw());
                }
                put_tuples(w, connection);
                put_state(w, groups::ALL, &connection.state);
                if rare != 0 {
                    put_extra(w, &connection.extra);
                }
            }
            Message::Update { target, stamp, groups, previous, state, extra: rare } => {
                let extra = if previous.is_some() { PREVIOUS } else { 0 };
                w.u64(head(UPDATE, groups | extra, target.raw()));
                put_stamp(w, *stamp);
                if let Some(previous) = previous {
                    w.u64(previous.raw());
                }
                put_state(w, *groups, state);
                if groups & groups::EXTRA != 0 {
                    put_extra(w, rare);
                }
            }
            Message::Close { target, stamp, ended } => {
                let (bits, age_s) = match ended {
                    Ended::Seen => (0, None),
                    Ended::Unseen { age_s: None } => (UNSEEN, None),
                    Ended::Unseen { age_s } => (UNSEEN | AGE, *age_s),
                    Ended::Left => (UNSEEN | LEFT, None),
                };
                w.u64(head(CLOSE, bits, target.raw()));
                put_stamp(w, *stamp);
                if let Some(age_s) = age_s {
                    w.u32(age_s);
                }
            }
            Message::Release { target, stamp } => {
                w.u64(head(RELEASE, 0, target.raw()));
                put_stamp(w, *stamp);
            }
            Message::Offer { target, own, stamp, claimed } => {
                w.u64(head(OFFER, *claimed as u8, target.raw()));
                put_stamp(w, *stamp);
                w.u64(own.raw());
            }
            Message::Decline { target, own, number, fault } => {
                w.u64(head(DECLINE, fault.map_or(0, |fault| fault as u8), target.raw()));
                w.u64(own.raw());
                w.u32(*number);
            }
            Message::Lease(_) | Message::GiveBack(_) => {
                unreachable!(
                    "places are written one by one, see `encode_lease` and `encode_give_back`"
                )
            }
            Message::Ack { .. } => {
                unreachable!("acks are written from the receive window, see `encode_ack`")
            }
            Message::Want { total } => {
                w.u64(head(WANT, 0, 0));
                w.u64(*total);
            }
            Message::Refuse { session, seq, target, reason, own } => {
                w.u64(head(REFUSE, *reason as u8, target.raw()));
                w.u64((*session as u64) << 48 | seq.raw());
                w.u64(own.map_or(0, |own| OWN | own.raw()));
            }
            Message::Skip { to } => w.u64(head(SKIP, 0, to.raw())),
            Message::Digest { .. } => {
                unreachable!("digests are written from the sums, see `encode_digest`")
            }
            Message::Differ { session, seq, mask } => {
                w.u64(head(DIFFER, 0, *session as u64));
                w.u64(seq.raw());
                mask.iter().for_each(|word| w.u64(*word));
            }
            Message::Item { target, own, hash, round } => {
                w.u64(head(ITEM, *round, target.raw()));
                w.u64(own.raw());
                w.u32(*hash);
            }
            Message::End { round, mask } => {
                w.u64(head(END, *round, 0));
                mask.iter().for_each(|word| w.u64(*word));
            }
            Message::Resend { target, doubt } => w.u64(head(RESEND, *doubt as u8, target.raw())),
            Message::Goodbye => w.u64(head(GOODBYE, 0, 0)),
        }
    }

    /// Reads the next message; `Ok(None)` at the end of the row.
    pub fn decode(r: &mut Reader<'b>) -> Result<Option<Message<'b>>, Reject> {
        if r.peek().is_none_or(|first| first == 0) {
            return Ok(None);
        }
        let word = r.u64()?;
        let bits = (word >> 52) as u8 & 63;
        let low = word & ((1 << 52) - 1);
        let target = Place::from_raw(low);
        let previous = |r: &mut Reader<'b>| match bits & PREVIOUS != 0 {
            true => match Coordinate::from_raw(r.u64()?) {
                previous if previous.is_plausible() => Ok(Some(previous)),
                _ => Err(Reject::Message),
            },
            false => Ok(None),
        };
        let message = match word >> 58 {
            NEW => {
                if bits & !PREVIOUS & !groups::EXTRA != WHOLE {
                    return Err(Reject::Message);
                }
                let stamp = get_stamp(r)?;
                let own = Place::from_raw(r.u64()?);
                let previous = previous(r)?;
                let (original, reply) = get_tuples(r)?;
                let state = get_state(r, groups::ALL)?;
                let extra = if bits & groups::EXTRA != 0 { get_extra(r)? } else { Extra::NONE };
                let connection = Connection { original, reply, state, extra };
                Message::New { target, stamp, own, previous, connection }
            }
            UPDATE => {
                let groups = bits & !PREVIOUS;
                if groups & !(groups::ALL & !groups::TUPLES) != 0 {
                    return Err(Reject::Message);
                }
                let stamp = get_stamp(r)?;
                let previous = previous(r)?;
                let state = get_state(r, groups)?;
                let extra = if groups & groups::EXTRA != 0 { get_extra(r)? } else { Extra::NONE };
                Message::Update { target, stamp, groups, previous, state, extra }
            }
            CLOSE => {
                let stamp = get_stamp(r)?;
                let ended = match bits {
                    0 => Ended::Seen,
                    UNSEEN => Ended::Unseen { age_s: None },
                    _ if bits == UNSEEN | AGE => Ended::Unseen { age_s: Some(r.u32()?) },
                    _ if bits == UNSEEN | LEFT => Ended::Left,
                    _ => return Err(Reject::Message),
                };
                Message::Close { target, stamp, ended }
            }
            RELEASE => Message::Release { target, stamp: get_stamp(r)? },
            OFFER => {
                let stamp = get_stamp(r)?;
                Message::Offer {
                    target,
                    own: Place::from_raw(r.u64()?),
                    stamp,
                    claimed: bits & 1 == 1,
                }
            }
            DECLINE => {
                let fault = match bits {
                    0 => None,
                    1 => Some(Fault::Clash),
                    2 => Some(Fault::NoRoom),
                    3 => Some(Fault::Refused),
                    _ => return Err(Reject::Message),
                };
                Message::Decline { target, own: Place::from_raw(r.u64()?), number: r.u32()?, fault }
            }
            kind @ (LEASE | GIVE_BACK) => {
                if low == 0 || low > LEASE_GRANT_MAX as u64 {
                    return Err(Reject::Message);
                }
                let places = Places(r.bytes(low as usize * 8)?);
                if kind == LEASE { Message::Lease(places) } else { Message::GiveBack(places) }
            }
            ACK => {
                let count = (low >> 16) as usize;
                if count as u64 > WINDOW / 64 {
                    return Err(Reject::Message);
                }
                let floor = Seq::from_raw(r.u64()?).ok_or(Reject::Message)?;
                Message::Ack { session: low as u16, floor, beyond: Bitmap(r.bytes(count * 8)?) }
            }
            WANT => Message::Want { total: r.u64()? },
            REFUSE => {
                let place = r.u64()?;
                let own = r.u64()?;
                let reason = match bits {
                    1 => Reason::NotLeased,
                    2 => Reason::NotHere,
                    3 => Reason::Superseded,
                    4 => Reason::InDoubt,
                    _ => return Err(Reject::Message),
                };
                Message::Refuse {
                    session: (place >> 48) as u16,
                    seq: Seq::from_low_bits(place),
                    target,
                    reason,
                    own: (own & OWN != 0).then_some(Place::from_raw(own)),
                }
            }
            SKIP => Message::Skip { to: Seq::from_raw(low).ok_or(Reject::Message)? },
            DIGEST => {
                let count = (low >> 16) as usize;
                if count != 0 && count != DIGEST_SUMS / 2 {
                    return Err(Reject::Message);
                }
                let seq = Seq::from_raw(r.u64()?).ok_or(Reject::Message)?;
                let sums = Bitmap(r.bytes(count * 8)?);
                Message::Digest { session: low as u16, seq, unverified: bits & 1 == 1, sums }
            }
            DIFFER => {
                let seq = Seq::from_raw(r.u64()?).ok_or(Reject::Message)?;
                Message::Differ { session: low as u16, seq, mask: mask(r)? }
            }
            ITEM => Message::Item {
                target,
                own: Place::from_raw(r.u64()?),
                hash: r.u32()?,
                round: bits,
            },
            END => Message::End { round: bits, mask: mask(r)? },
            RESEND => Message::Resend { target, doubt: Doubt::from_raw(bits) },
            GOODBYE => Message::Goodbye,
            _ => return Err(Reject::Message),
        };
        Ok(Some(message))
    }
}

fn mask(r: &mut Reader<'_>) -> Result<[u64; 4], Reject> {
    Ok([r.u64()?, r.u64()?, r.u64()?, r.u64()?])
}

/// Writes a digest: 16 bytes, and 1024 more unless all sums are zero.
pub fn encode_digest(
    session: u16,
    seq: Seq,
    unverified: bool,
    sums: &[u32; DIGEST_SUMS],
    w: &mut Writer<'_>,
) {
    let words = if sums.iter().all(|sum| *sum == 0) { 0 } else { DIGEST_SUMS / 2 };
    w.u64(head(DIGEST, unverified as u8, (words as u64) << 16 | session as u64));
    w.u64(seq.raw());
    for pair in sums.chunks_exact(2).take(words) {
        w.u64((pair[0] as u64) << 32 | pair[1] as u64);
    }
}

/// Writes a lease of these places: 8 bytes and 8 more a place; at most [`LEASE_GRANT_MAX`] places.
pub fn encode_lease(places: &[Place], w: &mut Writer<'_>) {
    encode_places(LEASE, places, w);
}

/// Writes that these places are given back; like a lease.
pub fn encode_give_back(places: &[Place], w: &mut Writer<'_>) {
    encode_places(GIVE_BACK, places, w);
}

fn encode_places(kind: u64, places: &[Place], w: &mut Writer<'_>) {
    assert!((1..=LEASE_GRANT_MAX).contains(&places.len()));
    w.u64(head(kind, 0, places.len() as u64));
    places.iter().for_each(|place| w.u64(place.raw()));
}

/// The age in a close that is not true any more: longer than any.
pub const AGE_LONGEST: u32 = u32::MAX;

/// Makes the ages in these messages the longest of all. Returns whether there were others.
pub fn forget_ages(messages: &mut [u8]) -> bool {
    let (mut at, mut has_changed) = (0, false);
    loop {
        let mut r = Reader::new(&messages[at..]);
        let before = r.left();
        let Ok(Some(message)) = Message::decode(&mut r) else { return has_changed };
        let is_aged = match message {
            Message::Close { ended: Ended::Unseen { age_s }, .. } => {
                age_s.is_some_and(|age_s| age_s != AGE_LONGEST)
            }
            _ => false,
        };
        at += before - r.left();
        if is_aged {
            // It is the last that a close has.
            messages[at - 4..at].copy_from_slice(&AGE_LONGEST.to_be_bytes());
            has_changed = true;
        }
    }
}

/// Writes an ack: 16 bytes and 8 more a word of the bitmap, at most `WINDOW / 64` words.
pub fn encode_ack(session: u16, floor: Seq, beyond: &[u64], w: &mut Writer<'_>) {
    assert!(beyond.len() as u64 <= WINDOW / 64);
    w.u64(head(ACK, 0, (beyond.len() as u64) << 16 | session as u64));
    w.u64(floor.raw());
    beyond.iter().for_each(|word| w.u64(*word));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::Tuple;
    use crate::conn::extra::{ProtoInfo, SeqAdj, Synproxy, parts};
    use std::net::Ipv4Addr;

    fn place(slot: u32, generation: u32) -> Place {
        Place { slot, generation: Generation::from_low_bits(generation) }
    }

    fn samples() -> Vec<Message<'static>> {
        let original =
            Tuple::v4(6, (Ipv4Addr::new(10, 0, 0, 1), 1000), (Ipv4Addr::new(10, 0, 0, 2), 80));
        let state = State {
            status: 0x19e,
            tcp_state: 3,
            tcp_scale: 0x77,
            tcp_flags_original: 0x2b,
            tcp_flags_reply: 0x2b,
            timeout_s: 432_000,
            mark: 0xcafe_f00d,
        };
        let plain = Connection::new(original, original.mirrored(), state);
        let mut six =
            Tuple::v6(17, ("2001:db8::1".parse().unwrap(), 1), ("2001:db8::2".parse().unwrap(), 2));
        six.zone = 3;
        let wide = Connection::new(six, Tuple { dport: 9, zone: 4, ..six.mirrored() }, state);
        let extra = Extra {
            parts: parts::ALL,
            labels: [0x81; 16],
            seqadj: [1, 2].map(|n| SeqAdj {
                correction_position: n,
                offset_before: 3,
                offset_after: u32::MAX,
            }),
            helper: *b"ftp\0\0\0\0\0\0\0\0\0\0\0\0\0",
            synproxy: Synproxy { isn: 4, its: 5, tsoff: 6 },
            protoinfo: ProtoInfo { state: 7, role: 1, value: u64::MAX },
        };
        let target = place((1 << 26) - 1, (1 << 26) - 1);
        let (own, stamp) = (place(5, 6), Stamp { epoch: 0, version: 1 });
        let high = Stamp { epoch: u32::MAX, version: u32::MAX };
        let previous = Some(Coordinate::new(3, 1, 2, Generation::from_low_bits(9)));
        vec![
            Message::New { target, stamp, own, previous: None, connection: plain },
            Message::New { target, stamp: high, own, previous, connection: wide },
            Message::Update {
                target,
                stamp,
                groups: groups::MARK,
                previous: None,
                state: State { mark: 7, ..State::default() },
                extra: Extra::NONE,
            },
            Message::Update {
                target,
                stamp,
                groups: groups::ALL & !groups::TUPLES,
                previous,
                state,
                extra,
            },
            Message::New {
                target,
                stamp: high,
                own,
                previous,
                connection: Connection { extra, ..wide },
            },
            Message::Close { target, stamp: high, ended: Ended::Seen },
            Message::Close { target, stamp, ended: Ended::Unseen { age_s: None } },
            Message::Close { target, stamp: high, ended: Ended::Unseen { age_s: Some(431_999) } },
            Message::Close { target, stamp, ended: Ended::Left },
            Message::Release { target, stamp },
            Message::Offer { target, own, stamp: high, claimed: true },
            Message::Decline { target, own, number: u32::MAX, fault: None },
            Message::Decline { target, own, number: 1, fault: Some(Fault::NoRoom) },
            Message::Want { total: 64 },
            Message::Refuse {
                session: 9,
                seq: Seq::LAST,
                target,
                reason: Reason::Superseded,
                own: Some(own),
            },
            Message::Refuse {
                session: 9,
                seq: Seq::LAST,
                target,
                reason: Reason::NotHere,
                own: None,
            },
            Message::Skip { to: Seq::LAST },
            Message::Goodbye,
        ]
    }

    #[test]
    fn ages_are_forgotten_and_nothing_else() {
        let place = |slot| Place { slot, generation: Generation::default() };
        let stamp = Stamp { epoch: 3, version: 4 };
        let told = |age_s: [Option<u32>; 2]| {
            let mut bytes = [0xa5; 256];
            let mut w = Writer::new(&mut bytes);
            Message::Release { target: place(1), stamp }.encode(&mut w);
            let unseen = |n: usize| Ended::Unseen { age_s: age_s[n] };
            Message::Close { target: place(2), stamp, ended: unseen(0) }.encode(&mut w);
            Message::Close { target: place(3), stamp, ended: Ended::Seen }.encode(&mut w);
            Message::Close { target: place(4), stamp, ended: unseen(1) }.encode(&mut w);
            let len = w.len();
            bytes[..len].to_vec()
        };
        let mut bytes = told([Some(7), Some(0)]);
        assert!(forget_ages(&mut bytes));
        assert_eq!(bytes, told([Some(AGE_LONGEST); 2]));
        assert!(!forget_ages(&mut bytes), "they are forgotten");
        let mut untold = told([None; 2]);
        assert!(!forget_ages(&mut untold));
        assert_eq!(untold, told([None; 2]));
    }

    #[test]
    fn every_message_reads_back_and_every_cut_is_refused() {
        for message in samples() {
            let mut buffer = [0xa5; DELTA_MAX];
            let mut w = Writer::new(&mut buffer);
            message.encode(&mut w);
            let len = w.len();
            let mut r = Reader::new(&buffer[..len]);
            assert_eq!(Message::decode(&mut r), Ok(Some(message)));
            assert_eq!(r.left(), 0);
            for cut in 1..len {
                assert_eq!(
                    Message::decode(&mut Reader::new(&buffer[..cut])),
                    Err(Reject::Short),
                    "{message:?}"
                );
            }
        }
    }

    #[test]
    fn deltas_are_as_small_as_the_design_says() {
        let sizes: Vec<usize> = samples()
            .iter()
            .map(|m| {
                let mut buffer = [0xa5; DELTA_MAX];
                let mut w = Writer::new(&mut buffer);
                m.encode(&mut w);
                w.len()
            })
            .collect();
        assert_eq!(sizes[0], 48, "a new IPv4 connection");
        assert_eq!(sizes[2], 14, "an update of one mark");
        assert!(sizes[1] <= NEW_MAX && sizes[4] <= DELTA_MAX);
        assert_eq!(sizes[4] - sizes[1], EXTRA_MAX);
    }

    #[test]
    fn rows_of_places_and_bits_read_back() {
        let places: Vec<Place> = (0..LEASE_GRANT_MAX as u32).map(|n| place(n, n * 3)).collect();
        let mut buffer = [0xa5; 4096];
        let mut w = Writer::new(&mut buffer);
        encode_lease(&places, &mut w);
        encode_give_back(&places[1..], &mut w);
        encode_ack(4, Seq::NONE.plus(77), &[1, u64::MAX], &mut w);
        w.u8(0);
        let len = w.len();
        let mut r = Reader::new(&buffer[..len]);
        let Ok(Some(Message::Lease(got))) = Message::decode(&mut r) else { panic!() };
        assert!(got.iter().eq(places.iter().copied()));
        let Ok(Some(Message::GiveBack(got))) = Message::decode(&mut r) else { panic!() };
        assert!(got.iter().eq(places[1..].iter().copied()));
        let Ok(Some(Message::Ack { session, floor, beyond })) = Message::decode(&mut r) else {
            panic!()
        };
        assert_eq!((session, floor.raw()), (4, 77));
        assert!(beyond.words().eq([1, u64::MAX]));
        assert_eq!(Message::decode(&mut r), Ok(None));
    }

    #[test]
    fn garbage_never_panics() {
        let mut rng = 9u64;
        for _ in 0..if cfg!(miri) { 200 } else { 200_000 } {
            let mut buffer = [0u8; 200];
            for b in &mut buffer {
                rng = rng
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                *b = (rng >> 56) as u8;
            }
            // Types beyond the known ones are refused at once: make known ones likely.
            buffer[0] %= 52;
            let mut r = Reader::new(&buffer[..(rng >> 32) as usize % 200]);
            while let Ok(Some(_)) = Message::decode(&mut r) {}
        }
    }
}
