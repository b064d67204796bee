//! Digests: two copies that differ find that out, whatever made them differ.
//!
//! For each stream the active's side keeps sums over what it has **sent**, and the backup's side over what it
//! **holds**: of every copy a hash over both coordinates, the stamp and all fields, added up (exclusive or) in 256
//! buckets by the backup's slot. A delta that is built or applied moves its sums; nothing is ever summed up anew.
//!
//! ```text
//!  active                                            backup
//!    digest(number sent last, sums)  ----------->    floor there and nothing beyond? compare
//!                                    <-----------    differ(buckets)    twice in a row, or after an absence
//!    item(place, own place, hash)..  ----------->    held as it says? else
//!    end(buckets)                    <-----------    resend(own place): all of it goes out again, as a delta
//!                                                    held and not named: offered to its active
//! ```
//!
//! Sums are comparable at one moment only: when the backup has applied exactly what was sent before the digest. They differ for a
//! moment when a claim or a release is on its way; so a difference counts only if the next digest shows it in
//! the same bucket again. What follows is proportional to the buckets that differ, and every step of
//! it is one that may be taken at any time: a delta sent again, an offer.
//!
//! After an absence in which either side let go of something (or a process was killed), a pair is **unverified** until
//! a digest agreed: one difference is enough then, and connections of that stream count as exposed.

use std::collections::VecDeque;
use std::time::Duration;

use super::mutation::{Mutation, is};
use super::replica::Replica;
use super::stream::{stream_index, stream_member};
use super::transmit::Transmit;
use super::walks::Walk;
use crate::ccp::Reject;
use crate::ccp::bytes::Writer;
use crate::ccp::message::{Bitmap, Doubt, Message, Place, encode_digest};
use crate::conn::slot::groups;
#[cfg(any(test, feature = "mutations"))]
use crate::conn::table::On;
use crate::conn::table::Written;
use crate::conn::tuple::{Family, Tuple, shards_can_meet};
use crate::conn::{Connection, Coordinate, Kind, MemberId, Stamp};
use crate::counters::Counter;
use crate::limits::{
    DATAGRAM_MAX, FINDINGS_MAX, ITEMS_MAX, MOVES_MAX, RESENDS_MAX, SHARDS_MAX, STREAMS_MAX, WINDOW,
};
use crate::seq::Seq;
use crate::time::Time;

/// Buckets of a digest.
pub const BUCKETS: usize = 256;

/// A bit for each bucket.
pub type Mask = [u64; BUCKETS / 64];

/// Bytes of an item, and of an end.
pub(super) const ITEM_BYTES: usize = 20;
pub(super) const END_BYTES: usize = 40;

/// Seen of a copy that was not compared yet: this and how often a comparison had been asked for when it came, modulo 4.
/// Its active may have named its copies before it sent this one. (Sessions are seen as 1 to 64.)
const FRESH: u8 = u8::MAX - 3;

/// A pair that has not agreed after so many digests counts as verified all the same.
const TRIES: u32 = 40;

/// Digests of streams that carry nothing go out this much more rarely.
const IDLE: u32 = 8;

/// Instead of a hash: whatever the copy is, it is to be kept for now.
const KEPT: u32 = 0;

/// What both sides must agree on, as a number that is never 0. The same on every kind of host.
fn hash(backup: Place, active: Place, stamp: Stamp, connection: &Connection) -> u32 {
    // Folded multiplication, as in the index, without a secret: two sides of one pair compare it.
    fn fold(a: u64, b: u64) -> u64 {
        let wide = (a ^ 0xa076_1d64_78bd_642f) as u128 * (b ^ 0xe703_7ed1_a0b4_28db) as u128;
        (wide >> 64) as u64 ^ wide as u64
    }
    let pair = |high: u32, low: u32| (high as u64) << 32 | low as u64;
    let place = |p: Place| pair(p.slot, p.generation.raw());
    let tuple = |t: &Tuple| {
        let ports = pair((t.sport as u32) << 16 | t.dport as u32, (t.zone as u32) << 16 | t.protocol as u32);
        let low = fold(t.src as u64 ^ ports, t.dst as u64);
        match t.family {
            Family::V4 => low,
            Family::V6 => fold(low ^ (t.src >> 64) as u64, (t.dst >> 64) as u64),
        }
    };
    let s = &connection.state;
    let tcp = u32::from_be_bytes([s.tcp_state, s.tcp_scale, s.tcp_flags_original, s.tcp_flags_reply]);
    let mut h = fold(place(backup), place(active));
    h ^= fold(pair(stamp.epoch, stamp.version), pair(s.status, tcp)).rotate_left(7);
    h ^= fold(pair(s.mark, s.timeout_s), tuple(&connection.original)).rotate_left(23);
    h = fold(h, tuple(&connection.reply));
    if !connection.extra.is_none() {
        let e = &connection.extra;
        let half = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        for bytes in [&e.labels[..8], &e.labels[8..], &e.helper[..8], &e.helper[8..]] {
            h = fold(h, half(bytes));
        }
        for adjustment in &e.seqadj {
            h = fold(
                h ^ adjustment.correction_position as u64,
                pair(adjustment.offset_before, adjustment.offset_after),
            );
        }
        h = fold(h ^ pair(e.synproxy.isn, e.synproxy.its), pair(e.synproxy.tsoff, e.parts as u32));
        h = fold(h ^ e.protoinfo.value, pair(e.protoinfo.state as u32, e.protoinfo.role as u32));
    }
    ((h >> 32) as u32 ^ h as u32).max(1)
}

/// The sums of every stream, in both directions. Untouched ones take up no memory.
pub(super) struct Digests {
    sent: Vec<u32>,
    held: Vec<u32>,
}

impl Digests {
    pub(super) fn new() -> Digests {
        Digests { sent: vec![0; STREAMS_MAX * BUCKETS], held: vec![0; STREAMS_MAX * BUCKETS] }
    }
}

fn sums_of(all: &[u32], stream: usize) -> &[u32; BUCKETS] {
    all.as_chunks().0.get(stream).expect("every stream has its sums")
}

fn bucket(slot: u32) -> usize {
    slot as usize % BUCKETS
}

fn has(mask: &Mask, slot: u32) -> bool {
    mask[bucket(slot) / 64] >> (bucket(slot) % 64) & 1 == 1
}

/// A message of a comparison that waits to be sent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Line {
    Item { own: Place, session: u8 },
    End { session: u8, mask: Mask },
}

/// A copy that was not what its active takes it for: found by a digest, and being repaired.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finding {
    /// The active has it at `active`; the copy at `here` is not that, or none. Found by the active.
    Differs {
        /// Where the copy should be.
        here: Coordinate,
        /// Where its active has it.
        active: Coordinate,
    },
    /// A copy here that its active does not count on. Found by the copy's member.
    Orphan {
        /// Where the copy is.
        here: Coordinate,
        /// Where its active was.
        active: Coordinate,
    },
}

/// What a stream's comparisons have come to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Comparing {
    /// Sending: whether some of what was sent may not be what the sums say, until everything dirty went out.
    pub unsure: bool,
    /// Sending: whether the pair must agree before its connections count as protected.
    pub unverified: bool,
    /// Sending: whether a digest is to be sent.
    pub due: bool,
    /// Sending: sweeps since the last digest.
    pub rested: u32,
    /// Sending: digests since the stream became unverified.
    pub tries: u32,
    /// Sending: the number of the first digest that was not answered: an answer to an earlier one says nothing any more.
    asked: Option<Seq>,
    /// Sending: the buckets of the walk under way, if `walking`.
    mask: Mask,
    walking: bool,
    session: u8,
    /// Receiving: digests in a row that differed, and the buckets of the last one.
    differed: u32,
    suspect: Mask,
    /// Receiving: buckets that were compared since they differ.
    compared: Mask,
    /// Receiving: how often a comparison was asked for, modulo 4; all that is asked between two ends counts as once.
    asks: u8,
    /// Receiving: whether one was since the last end.
    is_asked: bool,
    /// Receiving: what `asks` was before the last end. The next one may belong to that, too.
    asked_before: Option<u8>,
    /// Receiving: copies that came since `asks` was this the last end does not judge.
    judged_until: u8,
    /// Receiving: the answer that is due.
    answer: Option<(Seq, Mask)>,
    /// Receiving: what is left to be offered after the end of a comparison.
    unseen: Mask,
    unseen_session: u8,
    /// Receiving: whether this side took the other for silent, or either let go of something, and no digest agreed since.
    pub apart: bool,
    /// Receiving: whether differences are no surprise, since the pair was apart.
    expected: bool,
}

/// Lines that wait, of one stream after the other, and what was found.
pub(super) struct Comparison {
    lines: VecDeque<(u16, Line)>,
    /// Connections that their active has to send again.
    resends: Vec<(u16, Place, Doubt)>,
    findings: VecDeque<(Finding, bool)>,
    /// When the streams are looked at next.
    sweep_at: Time,
}

impl Comparison {
    pub(super) fn new() -> Comparison {
        Comparison {
            // Beside items there may be what waits for its release, and an end.
            lines: VecDeque::with_capacity(ITEMS_MAX + MOVES_MAX + 1),
            resends: Vec::with_capacity(RESENDS_MAX),
            findings: VecDeque::with_capacity(FINDINGS_MAX),
            sweep_at: Time(0),
        }
    }
}

impl Replica<'_> {
    /// The sums take this copy for sent as it is now.
    pub(super) fn account_sent(&mut self, stream: usize, slot: u32) {
        let line = self.table.line(slot);
        let own = Place { slot, generation: line.generation() };
        let hash = hash(Place::of(line.peer()), own, line.stamp(), &self.table.connection(slot));
        self.set_sent(stream, slot, line.peer().slot(), hash);
    }

    /// The sums take this slot's connection for unsent, or for closed there.
    pub(super) fn account_unsent(&mut self, stream: usize, slot: u32) {
        let peer = self.table.line(slot).peer();
        self.set_sent(stream, slot, peer.slot(), 0);
    }

    fn set_sent(&mut self, stream: usize, slot: u32, backup: u32, hash: u32) {
        let old = self.table.set_digest(slot, hash);
        self.digests.sent[stream * BUCKETS + bucket(backup)] ^= old ^ hash;
    }

    /// The sums take the copy in this slot for what it is now.
    pub(super) fn account_held(&mut self, slot: u32) {
        if is(Mutation::DigestStands) {
            return;
        }
        let line = self.table.line(slot);
        let own = Place { slot, generation: line.generation() };
        let hash = hash(own, Place::of(line.peer()), line.stamp(), &self.table.connection(slot));
        self.set_held(slot, hash);
    }

    fn set_held(&mut self, slot: u32, hash: u32) {
        let stream = self.stream_of(self.table.line(slot).peer());
        let old = self.table.set_digest(slot, hash);
        self.digests.held[stream * BUCKETS + bucket(slot)] ^= old ^ hash;
    }

    /// The copy in this slot counts from now on.
    pub(super) fn begin_copy(&mut self, slot: u32) {
        let stream = self.stream_of(self.table.line(slot).peer());
        let s = &mut self.streams[stream];
        s.copies += 1;
        self.table.set_written(slot, Written::No);
        self.table.set_seen(slot, FRESH + s.comparing.asks);
        self.account_held(slot);
    }

    /// The copy in this slot, whose line still says so, is about to be none.
    pub(super) fn end_copy(&mut self, slot: u32) {
        let stream = self.stream_of(self.table.line(slot).peer());
        self.streams[stream].copies -= 1;
        self.set_held(slot, 0);
    }

    /// A close that nobody waits for any more.
    pub(super) fn drop_closing(&mut self, slot: u32) {
        let stream = self.stream_of(self.table.line(slot).peer());
        self.unlist(slot);
        self.account_unsent(stream, slot);
        self.table.forget(slot);
        self.table.recycle(slot);
    }

    /// What was agreed with this member may have been let go on either side.
    pub(super) fn unverify(&mut self, member: MemberId) {
        let shards = self.view.members[member as usize].shards;
        for shard in 0..shards {
            if shards_can_meet(self.config.shard, self.config.shards, shard, shards) {
                self.unverify_stream(stream_index(member, shard));
            }
        }
    }

    /// What was agreed on this stream may have been let go on either side.
    pub(super) fn unverify_stream(&mut self, stream: usize) {
        let s = &mut self.streams[stream].comparing;
        self.unverified += !s.unverified as u32;
        (s.unverified, s.tries, s.apart) = (true, 0, true);
        s.asked = None;
    }

    fn verify(&mut self, stream: usize) {
        let s = &mut self.streams[stream].comparing;
        self.unverified -= s.unverified as u32;
        s.unverified = false;
    }

    /// The member is not there: nothing is compared with it.
    pub(super) fn stop_comparing(&mut self, member: MemberId) {
        for shard in 0..SHARDS_MAX as u8 {
            let stream = stream_index(member, shard);
            self.verify(stream);
            let s = &mut self.streams[stream];
            let Comparing { session, asks, is_asked, asked_before, .. } = s.comparing;
            // An end may still be on its way.
            let asked_before = asked_before.or(is_asked.then_some(asks));
            s.comparing = Comparing { session, asks, asked_before, ..Comparing::default() };
            (s.comparing.unsure, s.comparing.apart) = (true, true);
        }
        self.comparison.lines.retain(|(stream, _)| stream_member(*stream as usize) != member);
        self.comparison.resends.retain(|(stream, ..)| stream_member(*stream as usize) != member);
        if let Some((next, _)) = self.comparison.lines.front() {
            self.wake(*next as usize);
        }
        let of_member = |stream: &usize| stream_member(*stream) == member;
        self.walks.drop_those(
            |walk| matches!(walk, Walk::Compare { stream } | Walk::Unseen { stream } if of_member(stream)),
        );
    }

    /// Whether what was agreed with this member surely is as both sides believe.
    pub(super) fn is_verified(&self, member: MemberId) -> bool {
        let first = stream_index(member, 0);
        self.unverified == 0
            || !self.streams[first..first + SHARDS_MAX].iter().any(|s| s.comparing.unverified)
    }

    /// Connections whose stream is unverified, and that are not counted as exposed otherwise.
    pub(super) fn unverified_connections(&self) -> u64 {
        if self.unverified == 0 {
            return 0;
        }
        // Only those of members that are there: this is asked at every tick.
        let up = (1..self.peers.len() as MemberId).filter(|member| self.is_up(*member));
        let streams = up.flat_map(|member| {
            let first = stream_index(member, 0);
            first..first + self.view.members[member as usize].shards as usize
        });
        let unverified = streams.filter(|stream| self.streams[*stream].comparing.unverified);
        unverified.map(|stream| self.uncounted(stream)).sum()
    }

    /// Says which streams are due for a digest.
    pub(super) fn tick_digests(&mut self, now: Time) {
        if !self.comparison.sweep_at.reached(now) {
            return;
        }
        self.comparison.sweep_at = now.after(self.sweep_period());
        let (me, shards) = (self.config.shard, self.config.shards);
        for member in 1..self.peers.len() as u8 {
            if !self.is_up(member) {
                continue;
            }
            let theirs = self.view.members[member as usize].shards;
            for shard in (0..theirs).filter(|shard| shards_can_meet(me, shards, *shard, theirs)) {
                let stream = stream_index(member, shard);
                let s = &mut self.streams[stream];
                s.comparing.rested += 1;
                let rest = match (s.comparing.unverified, s.actives) {
                    (true, _) => 1,
                    (false, 0) => 4 * IDLE,
                    (false, _) => 4,
                };
                if s.comparing.rested >= rest {
                    s.comparing.due = true;
                    self.wake(stream);
                }
            }
        }
    }

    fn sweep_period(&self) -> Duration {
        self.config.compare / 4
    }

    /// When [`tick_digests`](Self::tick_digests) has something to do.
    pub(super) fn digests_at(&self) -> Time {
        let anybody = (1..self.peers.len() as u8).any(|member| self.is_up(member));
        if anybody { self.comparison.sweep_at } else { Time::NEVER }
    }

    /// The sums over what was sent, at the number sent last.
    pub(super) fn send_digest(&mut self, stream: usize, send: &mut dyn FnMut(Transmit) -> bool) {
        let s = &mut self.streams[stream];
        if s.dirty.is_empty() {
            s.comparing.unsure = false;
        }
        if !s.comparing.due || s.comparing.unsure || !self.outbox.is_greeted(stream) {
            return;
        }
        if self.requests.first_due(stream).is_some() {
            return; // What a release that could not leave yet will end is in no sum any more.
        }
        let (session, seq) = (self.durable(stream).session(), self.durable(stream).sent());
        let (header, sync) = self.headers(stream, Seq::NONE);
        let mut scratch = [0; DATAGRAM_MAX];
        let mut w = Writer::new(&mut scratch);
        sync.encode(&header, &mut w);
        let sums = sums_of(&self.digests.sent, stream);
        encode_digest(session, seq, self.streams[stream].comparing.unverified, sums, &mut w);
        let len = w.len();
        if self.send_control_bytes(stream, &scratch[..len], send) {
            self.counters.count(Counter::DigestsSent);
            let s = &mut self.streams[stream].comparing;
            (s.due, s.rested, s.tries) = (false, 0, s.tries.saturating_add(1));
            let is_hopeless = s.unverified && s.tries > TRIES;
            s.asked.get_or_insert(seq);
            // What differs still cannot be mended: it does not keep the rest exposed.
            if is_hopeless {
                self.counters.count(Counter::DigestsUnresolved);
                self.verify(stream);
            }
        }
    }

    /// The active says what its copies here should add up to.
    pub(super) fn handle_digest(
        &mut self,
        stream: usize,
        (session, seq): (u16, Seq),
        unverified: bool,
        sums: Bitmap<'_>,
    ) -> Result<(), Reject> {
        let durable = self.durable(stream);
        if session != durable.peer_session() {
            return Err(Reject::Table);
        }
        let mut beyond = [0; (WINDOW / 64) as usize];
        if durable.receive_floor() != seq || durable.beyond(&mut beyond) != 0 {
            return Ok(()); // Not the moment that it speaks of. There will be another.
        }
        self.counters.count(Counter::DigestsCompared);
        let mut mask = Mask::default();
        let mut words = sums.words();
        for (pair, held) in sums_of(&self.digests.held, stream).chunks(2).enumerate() {
            let theirs = words.next().unwrap_or(0);
            let differs = [(theirs >> 32) as u32 != held[0], theirs as u32 != held[1]];
            let bits = differs[0] as u64 | (differs[1] as u64) << 1;
            mask[pair / 32] |= bits << (pair % 32 * 2);
        }
        let s = &mut self.streams[stream].comparing;
        if mask == Mask::default() {
            (s.differed, s.suspect, s.compared) = (0, mask, mask);
            s.apart = false;
            if unverified {
                s.answer = Some((seq, mask));
                self.wake(stream);
            }
            return Ok(());
        }
        let again: Mask = std::array::from_fn(|i| mask[i] & s.suspect[i]);
        s.suspect = mask;
        s.compared = std::array::from_fn(|i| mask[i] & s.compared[i]);
        s.expected = unverified || s.apart;
        let mut report = if unverified { mask } else { again };
        s.differed = if report == Mask::default() { 0 } else { s.differed.saturating_add(1) };
        // What cannot be repaired is looked at ever more rarely; what differs anew does not wait for that.
        if !s.differed.is_power_of_two() {
            report = std::array::from_fn(|i| report[i] & !s.compared[i]);
        }
        if report != Mask::default() {
            s.answer = Some((seq, report));
            self.counters.count(Counter::DigestsDiffered);
            self.wake(stream);
        }
        Ok(())
    }

    /// The answer to a digest, for the next control datagram.
    pub(super) fn take_answer(&mut self, stream: usize) -> Option<Message<'static>> {
        let session = self.durable(stream).peer_session();
        let s = &mut self.streams[stream].comparing;
        let (seq, mask) = s.answer.take()?;
        if mask != Mask::default() && !std::mem::replace(&mut s.is_asked, true) {
            s.asks = (s.asks + 1) % 4;
        }
        Some(Message::Differ { session, seq, mask })
    }

    /// The backup compared: in these buckets it holds something else.
    pub(super) fn handle_differ(
        &mut self,
        stream: usize,
        (session, seq): (u16, Seq),
        mask: Mask,
    ) -> Result<(), Reject> {
        if session != self.durable(stream).session() {
            return Err(Reject::Table);
        }
        let s = &mut self.streams[stream].comparing;
        if s.asked.is_none_or(|asked| asked.is_after(seq)) {
            return Ok(()); // The answer to a question of before, or to none.
        }
        s.asked = None;
        if mask == Mask::default() {
            self.verify(stream);
            return Ok(());
        }
        let s = &mut self.streams[stream].comparing;
        if !s.walking {
            s.walking = true;
            s.mask = mask;
            s.session = (s.session + 1) % 64;
            self.walks.push(Walk::Compare { stream });
        }
        Ok(())
    }

    /// One slot of the walk that names what the backup should hold. `false`: no room for another line.
    pub(super) fn compare_slot(&mut self, stream: usize, slot: u32) -> bool {
        let s = &self.streams[stream].comparing;
        let named = self.item(stream, slot).filter(|(target, _)| has(&s.mask, target.slot));
        if named.is_none() || !self.is_up(stream_member(stream)) {
            return true;
        }
        if self.comparison.lines.len() >= ITEMS_MAX {
            return false;
        }
        let own = Place { slot, generation: self.table.line(slot).generation() };
        let item = Line::Item { own, session: s.session };
        self.comparison.lines.push_back((stream as u16, item));
        self.counters.count(Counter::CompareItems);
        self.wake(stream);
        true
    }

    /// That walk is done.
    pub(super) fn compared(&mut self, stream: usize) {
        let s = &mut self.streams[stream].comparing;
        s.walking = false;
        let (session, mask) = (s.session, s.mask);
        if !self.is_up(stream_member(stream)) {
            return;
        }
        let Comparison { lines, .. } = &mut self.comparison;
        if lines.len() > ITEMS_MAX {
            return; // Other comparisons are behind: the next digest begins this one anew.
        }
        for (own, previous) in self.requests.previous_backups() {
            if stream_index(previous.member(), previous.shard()) == stream {
                lines.push_back((stream as u16, Line::Item { own, session }));
                self.counters.count(Counter::CompareItems);
            }
        }
        lines.push_back((stream as u16, Line::End { session, mask }));
        self.wake(stream);
    }

    /// Where on this stream the connection at `own` has a copy that waits for its release, whatever stands beside its slot.
    fn kept_item(&self, stream: usize, own: Place) -> Option<(Place, u32)> {
        let mut previous = self.requests.previous_backups().filter(|(of, _)| *of == own);
        previous.find(|(_, at)| self.stream_of(*at) == stream).map(|(_, at)| (Place::of(at), KEPT))
    }

    /// Whether the next line is for this stream.
    pub(super) fn has_lines(&self, stream: usize) -> bool {
        self.comparison.lines.front().is_some_and(|(of, _)| *of as usize == stream)
    }

    /// Writes lines of this stream into a datagram, as many as fit. The last of a comparison waits until all that ends copies
    /// has left: what it did not name nobody counts on.
    pub(super) fn build_lines(&mut self, stream: usize, w: &mut Writer<'_>) {
        while let Some((of, line)) = self.comparison.lines.front().copied()
            && of as usize == stream
            && w.room() >= END_BYTES
        {
            if matches!(line, Line::End { .. })
                && (self.requests.first_due(stream).is_some() || !self.streams[stream].dirty.is_empty())
            {
                return;
            }
            match line {
                // As it is now: a delta may have left since the walk passed it.
                Line::Item { own, session } => {
                    let line = self.table.line(own.slot);
                    let named = self.item(stream, own.slot).filter(|_| line.generation() == own.generation);
                    if let Some((target, hash)) = named.or_else(|| self.kept_item(stream, own)) {
                        Message::Item { target, own, hash, session }.encode(w);
                    }
                }
                Line::End { session, mask } => Message::End { session, mask }.encode(w),
            }
            self.comparison.lines.pop_front();
            if let Some((next, _)) = self.comparison.lines.front() {
                self.wake(*next as usize);
            }
        }
    }

    /// Where on this stream a copy of the connection in this slot should be, and what it should be.
    fn item(&self, stream: usize, slot: u32) -> Option<(Place, u32)> {
        let line = self.table.line(slot);
        let is_on_it = |at: Coordinate| at.is_somewhere() && self.stream_of(at) == stream;
        match self.table.digest(slot) {
            _ if line.kind() != Kind::Active => None,
            hash if hash != 0 && is_on_it(line.peer()) => Some((Place::of(line.peer()), hash)),
            // Its previous backup keeps what it has until it is released.
            _ if self.table.is_moving(slot) && is_on_it(self.table.former(slot)) => {
                Some((Place::of(self.table.former(slot)), KEPT))
            }
            // One that went back to it may find its copy still there, and has no digest before its delta is acknowledged.
            _ if is_on_it(line.peer()) => Some((Place::of(line.peer()), KEPT)),
            _ => None,
        }
    }

    /// Whether as many differences as a datagram can bring can be answered.
    pub(super) fn has_room_for_items(&self) -> bool {
        self.comparison.resends.len() + DATAGRAM_MAX / ITEM_BYTES <= RESENDS_MAX
    }

    /// Whether this datagram is applied right after all before it, and before all behind it.
    pub(super) fn is_in_order(&self, stream: usize, seq: Seq) -> bool {
        let durable = self.durable(stream);
        durable.receive_floor().next() == seq && durable.beyond(&mut [0; (WINDOW / 64) as usize]) == 0
    }

    /// The active has a connection at `own` and takes the copy at `target` for this.
    pub(super) fn apply_item(
        &mut self,
        now: Time,
        stream: usize,
        (target, own): (Place, Coordinate),
        hash: u32,
        session: u8,
        in_order: bool,
    ) {
        if target.slot >= self.table.capacity() {
            return self.counters.count(Counter::RejectTarget);
        }
        let line = self.table.line(target.slot);
        let is_here = line.generation() == target.generation;
        match line.kind() {
            Kind::Backup if is_here && line.peer() == own => {
                self.table.set_seen(target.slot, session + 1);
                if self.table.digest(target.slot) == hash {
                    return;
                }
            }
            // Claimed or presumed here, or closed after that: the two sides settle it between them.
            Kind::Active | Kind::Closing if is_here => {
                let is_told = line.peer() == own || self.table.former(target.slot).is_somewhere();
                if line.kind() == Kind::Active && line.is_claimed() && !is_told {
                    // The claim was not heard of there, and has found another backup since.
                    self.table.set_former(target.slot, own);
                    self.ask_soon(now, own.member());
                }
                return;
            }
            _ => {}
        }
        if hash == KEPT || self.requests.released(own).is_some() {
            return;
        }
        let s = &self.streams[stream].comparing;
        let doubt = match in_order {
            false => Doubt::Order,
            true if s.expected || s.apart => Doubt::Apart,
            true => Doubt::None,
        };
        self.comparison.resends.push((stream as u16, Place::of(own), doubt));
        self.wake(stream);
    }

    /// The active has named all its copies in these buckets: what else is here it does not count on.
    pub(super) fn apply_end(&mut self, stream: usize, session: u8, mask: Mask) {
        let s = &mut self.streams[stream].comparing;
        (s.unseen, s.unseen_session) = (mask, session + 1);
        s.judged_until = s.asked_before.unwrap_or(s.asks);
        if std::mem::replace(&mut s.is_asked, false) {
            s.asked_before = Some(s.asks);
        }
        s.compared = std::array::from_fn(|i| s.compared[i] | mask[i]);
        self.walks.push(Walk::Unseen { stream });
    }

    /// One slot of the walk that follows. `false`: there is no room for a request.
    pub(super) fn unseen_slot(&mut self, stream: usize, slot: u32) -> bool {
        let line = self.table.line(slot);
        let s = &self.streams[stream].comparing;
        if line.kind() != Kind::Backup || self.stream_of(line.peer()) != stream {
            return true;
        }
        let mut seen = self.table.seen(slot);
        if seen >= FRESH {
            let age = |asks: u8| (s.asks + 4 - asks) % 4;
            if age(seen - FRESH) <= age(s.judged_until) {
                return true;
            }
            seen = 0;
            self.table.set_seen(slot, seen);
        }
        let unseen = has(&s.unseen, slot) && seen != s.unseen_session && self.is_up(stream_member(stream));
        if !unseen {
            return true;
        }
        let own = Place { slot, generation: line.generation() };
        let offered = self.offer(line.peer(), own);
        if offered {
            self.counters.count(Counter::CompareOffered);
            let s = &self.streams[stream].comparing;
            let apart = s.expected || s.apart;
            self.find(Finding::Orphan { here: self.coordinate(slot), active: line.peer() }, apart);
        }
        offered
    }

    /// The backup does not hold this connection as it should: all of it goes out again.
    pub(super) fn handle_resend(&mut self, now: Time, stream: usize, own: Place, doubt: Doubt) {
        if own.slot >= self.table.capacity() {
            return self.counters.count(Counter::RejectTarget);
        }
        let line = self.table.line(own.slot);
        let ours = line.generation() == own.generation
            && line.kind() == Kind::Active
            && line.peer().is_somewhere()
            && self.stream_of(line.peer()) == stream;
        if ours {
            self.counters.count(Counter::CompareResent);
            // Only here it is known that the copy should be what was named: the other side may have claimed it, and closed
            // it, while the item was on its way.
            if doubt != Doubt::Order {
                let (here, active) = (line.peer(), self.coordinate(own.slot));
                let apart = doubt == Doubt::Apart || self.streams[stream].comparing.unverified;
                self.find(Finding::Differs { here, active }, apart);
            }
            self.mark_dirty(now, own.slot, groups::ALL);
            // It may hold something else under the same stamp, and takes nothing that is not newer. What is only
            // presumed here does not become newer than what its former active has.
            if !self.is_presumed(own.slot) {
                self.table.update(own.slot, |line| line.set_stamp(line.stamp().changed()));
            }
        }
    }

    fn find(&mut self, finding: Finding, expected: bool) {
        if self.comparison.findings.len() < FINDINGS_MAX {
            self.comparison.findings.push_back((finding, expected));
        }
    }

    /// The next copy that differed, for the log; and whether that is no surprise, since the pair was apart or one of
    /// its processes was killed.
    pub fn poll_finding(&mut self) -> Option<(Finding, bool)> {
        self.comparison.findings.pop_front()
    }

    /// The sums follow from the table: of what was sent and is not dirty, and of what is held.
    pub(super) fn resume_digests(&mut self) {
        for slot in 0..self.table.capacity() {
            let line = self.table.line(slot);
            match line.kind() {
                Kind::Active if line.peer().is_somewhere() && line.last() != Seq::NONE => {
                    self.account_sent(self.stream_of(line.peer()), slot);
                }
                Kind::Backup => self.account_held(slot),
                _ => {}
            }
        }
        for s in &mut self.streams {
            s.comparing.unsure = true;
        }
    }

    /// Whether the sums, and the counts beside them, are what the table says; for tests: it looks at every slot.
    #[cfg(any(test, feature = "mutations"))]
    pub fn check_sums(&self) -> Result<(), String> {
        let mut expected = Digests::new();
        let mut counts = vec![(0u64, 0u64, 0u64); STREAMS_MAX];
        for slot in 0..self.table.capacity() {
            let (line, digest) = (self.table.line(slot), self.table.digest(slot));
            let (peer, own) = (line.peer(), Place { slot, generation: line.generation() });
            let at = || format!("slot {slot}, {:?} of {peer}, on {:?}", line.kind(), self.table.on(slot));
            let now = |backup, active| hash(backup, active, line.stamp(), &self.table.connection(slot));
            match line.kind() {
                Kind::Backup => {
                    let stream = self.stream_of(peer);
                    if digest != now(own, Place::of(peer)) {
                        return Err(format!("{}: a copy that is not what was added up", at()));
                    }
                    expected.held[stream * BUCKETS + bucket(slot)] ^= digest;
                    counts[stream].1 += 1;
                }
                Kind::Active | Kind::Closing if peer.is_somewhere() => {
                    let stream = self.stream_of(peer);
                    let is_sent = line.kind() == Kind::Active && self.table.on(slot) == On::None;
                    if is_sent && digest != now(Place::of(peer), own) {
                        return Err(format!("{}: what was sent is not what was added up", at()));
                    }
                    expected.sent[stream * BUCKETS + bucket(peer.slot())] ^= digest;
                    let is_active = line.kind() == Kind::Active;
                    counts[stream].0 += is_active as u64;
                    counts[stream].2 += (is_active && self.table.on(slot) == On::Dirty) as u64;
                }
                _ if digest != 0 => return Err(format!("{}: still part of a digest", at())),
                _ => {}
            }
        }
        if expected.sent != self.digests.sent || expected.held != self.digests.held {
            return Err("the sums are not those of what was added up".to_owned());
        }
        for (stream, s) in self.streams.iter().enumerate() {
            let is = (s.actives, s.copies, s.dirty_actives);
            if is != counts[stream] {
                return Err(format!("stream {stream} counts {is:?} and has {:?}", counts[stream]));
            }
        }
        let dirty: u64 = counts.iter().map(|(_, _, dirty)| dirty).sum();
        let unverified = self.streams.iter().filter(|s| s.comparing.unverified).count() as u32;
        if (dirty, unverified) != (self.dirty_actives, self.unverified) {
            return Err(format!("{} dirty, {} unverified", self.dirty_actives, self.unverified));
        }
        Ok(())
    }

    /// The next connection that the peer of this stream has to send again.
    pub(super) fn take_resend(&mut self, stream: usize) -> Option<Message<'static>> {
        let at = self.comparison.resends.iter().position(|(of, ..)| *of as usize == stream)?;
        let (_, target, doubt) = self.comparison.resends.swap_remove(at);
        Some(Message::Resend { target, doubt })
    }

    /// Whether a digest, or what one found, has to be answered.
    pub(super) fn has_answers(&self, stream: usize) -> bool {
        self.streams[stream].comparing.answer.is_some()
            || self.comparison.resends.iter().any(|(of, ..)| *of as usize == stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::{Generation, State};
    use crate::memory::{MemorySize, OwnedMemory};
    use crate::source::SourceEvent;
    use crate::sync::test_config;

    /// Seed 941004509: a connection that went back to the copy that its previous backup still has was not named before its delta was acknowledged, and
    /// that copy counted as one too many.
    #[test]
    fn what_is_not_acknowledged_is_named_as_kept() {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let mut replica = Replica::new(test_config(), memory.parts());
        let original = Tuple::v4(6, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2));
        let connection = Connection::new(original, original.mirrored(), State::default());
        replica.handle_source(Time(1), &SourceEvent::seen(connection));
        let slot = replica.table.find_original(&original).expect("it is held");
        let copy = Coordinate::new(2, 0, 5, Generation::default());
        let stream = replica.stream_of(copy);
        assert_eq!(replica.item(stream, slot), None);
        replica.unlist(slot);
        replica.table.update(slot, |line| line.set_kind(Kind::Active));
        assert_eq!(replica.item(stream, slot), None, "it has no backup");
        replica.table.update(slot, |line| line.set_peer(copy));
        assert_eq!(replica.item(stream, slot).map(|(place, hash)| (place.slot, hash)), Some((5, KEPT)));
    }
}
