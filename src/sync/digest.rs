//! Digests: two copies that differ find that out, whatever made them differ.
//!
//! For each stream the active's side keeps sums over what it has **sent**, and the backup's side
//! over what it **holds**: of every copy a hash over both coordinates, the stamp and all fields,
//! added up (exclusive or) in 256 buckets by the backup's slot. A delta that is built or applied
//! moves its sums; nothing is ever summed up anew.
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
//! Sums are comparable at one moment only: when the backup has applied exactly what was sent before
//! the digest. They differ for a moment when a claim or a release is on its way; so a difference
//! counts only if the next digest shows it in the same bucket again. What follows is proportional
//! to the buckets that differ, and every step of it is one that may be taken at any time: a delta
//! sent again, an offer.
//!
//! After an absence in which either side let go of something (or a process was killed), a pair is
//! **unverified** until a digest agreed: one difference is enough then, and connections of that
//! stream count as exposed.

use super::compare::{Answer, Comparing, Finding, Heard, Judgement, RoundPart};
use super::replica::Replica;
use super::stream::{stream_index, stream_member};
use super::sums::Mask;
use super::walks::Walk;
use crate::ccp::Reject;
use crate::ccp::bytes::Writer;
use crate::ccp::message::{Bitmap, Doubt, Message, Place, encode_digest};
use crate::conn::slot::groups;
use crate::conn::tuple::shards_can_meet;
use crate::conn::{Coordinate, Kind, MemberId};
use crate::counters::Counter;
use crate::limits::{DATAGRAM_MAX, SHARDS_MAX};
use crate::seq::Seq;
use crate::time::Time;

/// Bytes of an item, and of an end.
pub(super) const ITEM_BYTES: usize = 20;
pub(super) const END_BYTES: usize = 40;

/// Instead of a hash: whatever the copy is, it is to be kept for now.
const KEPT: u32 = 0;

impl Replica<'_> {
    /// The copy in this slot counts from now on.
    pub(super) fn begin_copy(&mut self, slot: u32) {
        let stream = self.stream_of(self.ledger.line(slot).peer());
        let seen = self.streams[stream].comparing.seen_fresh();
        self.ledger.begin_copy(slot, seen);
    }

    /// What was agreed with this member may have been let go on either side.
    pub(super) fn unverify(&mut self, member: MemberId) {
        let shards = self.peers.seen(member).shards;
        for shard in 0..shards {
            if shards_can_meet(self.config.shard, self.config.shards, shard, shards) {
                self.unverify_stream(stream_index(member, shard));
            }
        }
    }

    /// What was agreed on this stream may have been let go on either side.
    pub(super) fn unverify_stream(&mut self, stream: usize) {
        self.unverified += self.streams[stream].comparing.unverify() as u32;
    }

    fn verify(&mut self, stream: usize) {
        self.unverified -= self.streams[stream].comparing.verify() as u32;
    }

    /// The member is not there: nothing is compared with it.
    pub(super) fn stop_comparing(&mut self, member: MemberId) {
        for shard in 0..SHARDS_MAX as u8 {
            let stream = stream_index(member, shard);
            self.verify(stream);
            self.streams[stream].comparing.cut_off();
        }
        self.comparisons.drop_those(|stream| stream_member(stream) == member);
        if let Some(next) = self.comparisons.next_stream() {
            self.enqueue(next);
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
            || !self.streams[first..first + SHARDS_MAX].iter().any(|s| s.comparing.is_unverified())
    }

    /// Connections whose stream is unverified, and that are not counted as exposed otherwise.
    pub(super) fn unverified_connections(&self) -> u64 {
        if self.unverified == 0 {
            return 0;
        }
        // Only those of members that are there: this is asked at every tick.
        let streams = self.peers.up().flat_map(|member| {
            let first = stream_index(member, 0);
            first..first + self.peers.seen(member).shards as usize
        });
        let unverified = streams.filter(|stream| self.streams[*stream].comparing.is_unverified());
        unverified.map(|stream| self.uncounted(stream)).sum()
    }

    /// Says which streams are due for a digest.
    pub(super) fn tick_digests(&mut self, now: Time) {
        if !self.comparisons.begin_sweep(now, self.config.compare / 4) {
            return;
        }
        let (me, shards) = (self.config.shard, self.config.shards);
        for member in self.peers.up() {
            let theirs = self.peers.seen(member).shards;
            for shard in (0..theirs).filter(|shard| shards_can_meet(me, shards, *shard, theirs)) {
                let stream = stream_index(member, shard);
                let has_actives = self.ledger.actives(stream) > 0;
                if self.streams[stream].comparing.rest(has_actives) {
                    self.enqueue(stream);
                }
            }
        }
    }

    /// When [`tick_digests`](Self::tick_digests) has something to do.
    pub(super) fn digests_at(&self) -> Time {
        if self.peers.up().next().is_some() { self.comparisons.sweep_at() } else { Time::NEVER }
    }

    /// The sums over what was sent, at the number sent last.
    pub(super) fn send_digest(&mut self, stream: usize) {
        let s = &mut self.streams[stream];
        if self.ledger.dirty(stream) == 0 {
            s.comparing.trust_sums();
        }
        if !s.comparing.can_ask() || !self.outbox.is_established(stream) {
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
        let is_unverified = self.streams[stream].comparing.is_unverified();
        encode_digest(session, seq, is_unverified, self.ledger.sent_sums().of(stream), &mut w);
        let len = w.len();
        if self.send_control_bytes(stream, &scratch[..len]) {
            self.counters.count(Counter::DigestsSent);
            if self.streams[stream].comparing.asked(seq) {
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
        if !self.inbox.is_at(stream, seq) {
            return Ok(()); // Not the moment that it speaks of. There will be another.
        }
        self.counters.count(Counter::DigestsCompared);
        let mask = self.ledger.copy_sums().differing(stream, sums.words());
        if self.streams[stream].comparing.on_digest(seq, mask, unverified) == Heard::Differs {
            self.counters.count(Counter::DigestsDiffered);
        }
        if self.streams[stream].comparing.has_answer() {
            self.enqueue(stream);
        }
        Ok(())
    }

    /// The answer to a digest, for the next control datagram.
    pub(super) fn take_answer(&mut self, stream: usize) -> Option<Message<'static>> {
        let session = self.durable(stream).peer_session();
        let (seq, mask) = self.streams[stream].comparing.take_answer()?;
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
        match self.streams[stream].comparing.on_answer(seq, mask) {
            Answer::Nothing => {}
            Answer::Agreed => self.verify(stream),
            Answer::Differs => self.walks.push(Walk::Compare { stream }),
        }
        Ok(())
    }

    /// One slot of the walk that names what the backup should hold. `false`: no room for another
    /// line.
    pub(super) fn compare_slot(&mut self, stream: usize, slot: u32) -> bool {
        let comparing = &self.streams[stream].comparing;
        let round = self.item(stream, slot).and_then(|(target, _)| comparing.round_of(target.slot));
        let Some(round) = round.filter(|_| self.is_up(stream_member(stream))) else { return true };
        if self.comparisons.items_left() == 0 {
            return false;
        }
        let own = Place { slot, generation: self.ledger.line(slot).generation() };
        self.comparisons.say(stream, RoundPart::Item { own, round });
        self.counters.count(Counter::CompareItems);
        self.enqueue(stream);
        true
    }

    /// That walk is done.
    pub(super) fn compared(&mut self, stream: usize) {
        let (round, mask) = self.streams[stream].comparing.end_round();
        if !self.is_up(stream_member(stream)) {
            return;
        }
        if self.comparisons.is_behind() {
            return; // Other comparisons are behind: the next digest begins this one anew.
        }
        for (own, previous) in self.requests.previous_backups() {
            if stream_index(previous.member(), previous.shard()) == stream {
                self.comparisons.say(stream, RoundPart::Item { own, round });
                self.counters.count(Counter::CompareItems);
            }
        }
        self.comparisons.say(stream, RoundPart::End { round, mask });
        self.enqueue(stream);
    }

    /// Where on this stream the connection at `own` has a copy that waits for its release, whatever
    /// stands beside its slot.
    fn kept_item(&self, stream: usize, own: Place) -> Option<(Place, u32)> {
        let mut previous = self.requests.previous_backups().filter(|(of, _)| *of == own);
        previous.find(|(_, at)| self.stream_of(*at) == stream).map(|(_, at)| (Place::of(at), KEPT))
    }

    /// Whether the next line is for this stream.
    pub(super) fn has_lines(&self, stream: usize) -> bool {
        self.comparisons.next_stream() == Some(stream)
    }

    /// Writes lines of this stream into a datagram, as many as fit. The last of a comparison waits
    /// until all that ends copies has left: what it did not name nobody counts on.
    pub(super) fn build_lines(&mut self, stream: usize, w: &mut Writer<'_>) {
        while let Some(line) = self.comparisons.next_line(stream)
            && w.room() >= END_BYTES
        {
            if matches!(line, RoundPart::End { .. })
                && (self.requests.first_due(stream).is_some() || self.ledger.dirty(stream) > 0)
            {
                return;
            }
            match line {
                // As it is now: a delta may have left since the walk passed it.
                RoundPart::Item { own, round } => {
                    let line = self.ledger.line(own.slot);
                    let named =
                        self.item(stream, own.slot).filter(|_| line.generation() == own.generation);
                    if let Some((target, hash)) = named.or_else(|| self.kept_item(stream, own)) {
                        Message::Item { target, own, hash, round }.encode(w);
                    }
                }
                RoundPart::End { round, mask } => Message::End { round, mask }.encode(w),
            }
            self.comparisons.said();
            if let Some(next) = self.comparisons.next_stream() {
                self.enqueue(next);
            }
        }
    }

    /// Where on this stream a copy of the connection in this slot should be, and what it should be.
    fn item(&self, stream: usize, slot: u32) -> Option<(Place, u32)> {
        let line = self.ledger.line(slot);
        let is_on_it = |at: Coordinate| at.is_somewhere() && self.stream_of(at) == stream;
        match self.ledger.digest(slot) {
            _ if line.kind() != Kind::Active => None,
            hash if hash != 0 && is_on_it(line.peer()) => Some((Place::of(line.peer()), hash)),
            // Its previous backup keeps what it has until it is released.
            _ if self.ledger.is_moving(slot) && is_on_it(self.ledger.former(slot)) => {
                Some((Place::of(self.ledger.former(slot)), KEPT))
            }
            // One that went back to it may find its copy still there, and has no digest before its
            // delta is acknowledged.
            _ if is_on_it(line.peer()) => Some((Place::of(line.peer()), KEPT)),
            _ => None,
        }
    }

    /// Whether as many differences as a datagram can bring can be answered.
    pub(super) fn has_room_for_items(&self) -> bool {
        self.comparisons.resends_left() >= DATAGRAM_MAX / ITEM_BYTES
    }

    /// Whether this datagram is applied right after all before it, and before all behind it.
    pub(super) fn is_in_order(&self, stream: usize, seq: Seq) -> bool {
        self.inbox.is_next(stream, seq) && self.inbox.has_no_gap(stream)
    }

    /// The active has a connection at `own` and takes the copy at `target` for this.
    pub(super) fn apply_item(
        &mut self,
        now: Time,
        stream: usize,
        (target, own): (Place, Coordinate),
        hash: u32,
        round: u8,
        in_order: bool,
    ) {
        if target.slot >= self.ledger.capacity() {
            return self.counters.count(Counter::RejectTarget);
        }
        let line = self.ledger.line(target.slot);
        let is_here = line.generation() == target.generation;
        match line.kind() {
            Kind::Backup if is_here && line.peer() == own => {
                self.ledger.set_seen(target.slot, Comparing::seen_in(round));
                if self.ledger.digest(target.slot) == hash {
                    return;
                }
            }
            // Claimed or presumed here, or closed after that: the two sides decide between them.
            Kind::Active | Kind::Closing if is_here => {
                let is_told = line.peer() == own || self.ledger.former(target.slot).is_somewhere();
                if line.kind() == Kind::Active && line.is_claimed() && !is_told {
                    // The claim was not heard of there, and has found another backup since.
                    self.ledger.set_former(target.slot, own);
                    self.ask_soon(now, own.member());
                }
                return;
            }
            _ => {}
        }
        if hash == KEPT || self.requests.released(own).is_some() {
            return;
        }
        let doubt = match in_order {
            false => Doubt::Order,
            true if self.streams[stream].comparing.is_expected() => Doubt::Apart,
            true => Doubt::None,
        };
        self.comparisons.resend(stream, Place::of(own), doubt);
        self.enqueue(stream);
    }

    /// The active has named all its copies in these buckets: what else is here it does not count
    /// on.
    pub(super) fn apply_end(&mut self, stream: usize, round: u8, mask: Mask) {
        self.streams[stream].comparing.on_end(round, mask);
        self.walks.push(Walk::Unseen { stream });
    }

    /// One slot of the walk that follows. `false`: there is no room for a request.
    pub(super) fn unseen_slot(&mut self, stream: usize, slot: u32) -> bool {
        let line = self.ledger.line(slot);
        if line.kind() != Kind::Backup || self.stream_of(line.peer()) != stream {
            return true;
        }
        let seen = self.ledger.seen(slot);
        let judgement = self.streams[stream].comparing.judge(slot, seen);
        if judgement != Judgement::TooLate {
            self.ledger.set_seen(slot, Comparing::seen_aged(seen));
        }
        if judgement != Judgement::Unseen || !self.is_up(stream_member(stream)) {
            return true;
        }
        let own = Place { slot, generation: line.generation() };
        let offered = self.offer(line.peer(), own);
        if offered {
            self.counters.count(Counter::CompareOffered);
            let is_expected = self.streams[stream].comparing.is_expected();
            let orphan = Finding::Orphan { here: self.coordinate(slot), active: line.peer() };
            self.comparisons.find(orphan, is_expected);
        }
        offered
    }

    /// The backup does not hold this connection as it should: all of it goes out again.
    pub(super) fn handle_resend(&mut self, now: Time, stream: usize, own: Place, doubt: Doubt) {
        if own.slot >= self.ledger.capacity() {
            return self.counters.count(Counter::RejectTarget);
        }
        let line = self.ledger.line(own.slot);
        let ours = line.generation() == own.generation
            && line.kind() == Kind::Active
            && line.peer().is_somewhere()
            && self.stream_of(line.peer()) == stream;
        if ours {
            self.counters.count(Counter::CompareResent);
            // Only here it is known that the copy should be what was named: the other side may have
            // claimed it, and closed it, while the item was on its way.
            if doubt != Doubt::Order {
                let (here, active) = (line.peer(), self.coordinate(own.slot));
                let is_unverified = self.streams[stream].comparing.is_unverified();
                let is_expected = doubt == Doubt::Apart || is_unverified;
                self.comparisons.find(Finding::Differs { here, active }, is_expected);
            }
            self.mark_dirty(now, own.slot, groups::ALL);
            // It may hold something else under the same stamp, and takes nothing that is not newer.
            // What is only presumed here does not become newer than what its former active has.
            if !self.is_presumed(own.slot) {
                self.ledger.amend(own.slot, |line| line.set_stamp(line.stamp().changed()));
            }
        }
    }

    /// The next copy that differed, for the log; and whether that is no surprise, since the pair
    /// was apart or one of its processes was killed.
    pub fn poll_finding(&mut self) -> Option<(Finding, bool)> {
        self.comparisons.poll_finding()
    }

    /// The sums follow from the table: of what was sent and is not dirty, and of what is held.
    pub(super) fn resume_digests(&mut self) {
        for slot in 0..self.ledger.capacity() {
            let line = self.ledger.line(slot);
            match line.kind() {
                Kind::Active if line.peer().is_somewhere() && line.last() != Seq::NONE => {
                    self.ledger.account_sent(slot);
                }
                Kind::Backup => self.ledger.account_copy(slot),
                _ => {}
            }
        }
        for s in &mut self.streams {
            s.comparing.doubt_sums();
        }
    }

    /// Whether the sums, and the counts beside them, are what the table says; for tests: it looks
    /// at every slot.
    #[cfg(any(test, feature = "mutations"))]
    pub fn check_sums(&self) -> Result<(), String> {
        let unverified = self.streams.iter().filter(|s| s.comparing.is_unverified()).count() as u32;
        match unverified == self.unverified {
            true => self.ledger.check(),
            false => Err(format!("{} unverified, and has {unverified}", self.unverified)),
        }
    }

    /// The next connection that the peer of this stream has to send again.
    pub(super) fn take_resend(&mut self, stream: usize) -> Option<Message<'static>> {
        let (target, doubt) = self.comparisons.take_resend(stream)?;
        Some(Message::Resend { target, doubt })
    }

    /// Whether a digest, or what one found, has to be answered.
    pub(super) fn has_answers(&self, stream: usize) -> bool {
        self.streams[stream].comparing.has_answer() || self.comparisons.has_resend(stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::{Connection, Generation, State, Tuple};
    use crate::memory::{MemorySize, OwnedMemory};
    use crate::source::SourceEvent;
    use crate::sync::test_config;

    /// Seed 941004509: a connection that went back to the copy that its previous backup still has
    /// was not named before its delta was acknowledged, and that copy counted as one too many.
    #[test]
    fn what_is_not_acknowledged_is_named_as_kept() {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let mut replica = Replica::new(test_config(), memory.parts());
        let original = Tuple::v4(6, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2));
        let connection = Connection::new(original, original.mirrored(), State::default());
        replica.handle_source(Time(1), &SourceEvent::seen(connection));
        let slot = replica.ledger.find_original(&original).expect("it is held");
        let copy = Coordinate::new(2, 0, 5, Generation::default());
        let stream = replica.stream_of(copy);
        assert_eq!(replica.item(stream, slot), None);
        replica.ledger.unlist(slot);
        replica.ledger.activate(slot);
        assert_eq!(replica.item(stream, slot), None, "it has no backup");
        replica.ledger.assign(slot, copy, 0);
        assert_eq!(
            replica.item(stream, slot).map(|(place, hash)| (place.slot, hash)),
            Some((5, KEPT))
        );
    }
}
