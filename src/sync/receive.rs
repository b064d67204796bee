//! Receive: datagrams become copies. An ack means applied.
//!
//! A datagram is checked as a whole before any of it is applied, and it is acknowledged only if
//! all of it was. There are two reasons why a delta may not be applied:
//!
//! - *Refused* (no lease, an older state): it never will be. The sender is told which delta it is,
//!   finds another backup for that connection, sends the rest of the datagram in another one, and
//!   says skip.
//! - *Busy* (no room for a request that would follow from it, or the source is still being read
//!   after the start): not now. Nobody is told; the sender's timeout brings the same datagram
//!   again.
//!
//! So nothing is ever acknowledged that is not held.

use std::net::IpAddr;

use super::delta::DeltaResult::{Applied, Busy, Refused};
use super::delta::New;
use super::inbox::{Refusal, Session};
use super::mutation::{Mutation, is};
use super::replica::Replica;
use super::stream::{stream_index, stream_member, stream_shard};
use super::walks::Walk;
use crate::ccp::Reject;
use crate::ccp::bytes::Reader;
use crate::ccp::header::{Header, OPCODE_SYNC};
use crate::ccp::message::{Message, Place, Places};
use crate::ccp::sync::SyncHeader;
use crate::conn::slot::Line;
use crate::conn::tuple::shards_can_meet;
use crate::conn::{Coordinate, Kind};
use crate::counters::Counter;
use crate::limits::{DATAGRAM_MAX, WINDOW};
use crate::seq::Seq;
use crate::time::Time;

impl Replica<'_> {
    /// A synchronization datagram arrived, from this address if known.
    pub fn handle_datagram(&mut self, now: Time, source: Option<IpAddr>, bytes: &[u8]) {
        if let Err(reject) = self.receive(now, source, bytes) {
            self.counters.count(reject.counter());
        }
    }

    fn receive(&mut self, now: Time, source: Option<IpAddr>, bytes: &[u8]) -> Result<(), Reject> {
        if bytes.len() > DATAGRAM_MAX {
            return Err(Reject::Message); // No member sends these; what one may ask for is limited by its size.
        }
        let mut r = Reader::new(bytes);
        let header = Header::decode(&mut r, self.config.group)?;
        if header.opcode != OPCODE_SYNC {
            return Err(Reject::Opcode);
        }
        if header.from == self.config.member || header.to != Some(self.config.member) {
            return Err(Reject::Member);
        }
        if header.to_shard != self.config.shard {
            return Err(Reject::Shard);
        }
        let sync = SyncHeader::decode(&mut r)?;
        let member = self.peers.seen(header.from);
        if !self.is_up(header.from) {
            return Err(Reject::Table);
        }
        if source.is_some() && member.address != source && !is(Mutation::SourceUnchecked) {
            return Err(Reject::Source);
        }
        if sync.from_shard >= member.shards
            || !shards_can_meet(
                self.config.shard,
                self.config.shards,
                sync.from_shard,
                member.shards,
            )
        {
            return Err(Reject::Shard);
        }
        let same_tables =
            sync.from_table == member.table_id && sync.to_table == self.config.table_id;
        if !same_tables && !is(Mutation::TableUnchecked) {
            return Err(Reject::Table);
        }
        let mut check = r;
        while let Some(message) = Message::decode(&mut check)? {
            let unsequenced = matches!(
                message,
                Message::Ack { .. }
                    | Message::Want { .. }
                    | Message::Refuse { .. }
                    | Message::Skip { .. }
                    | Message::Digest { .. }
                    | Message::Differ { .. }
                    | Message::Resend { .. }
                    | Message::Goodbye
            );
            if unsequenced != (sync.seq == Seq::NONE) {
                return Err(Reject::Message);
            }
        }
        let stream = stream_index(header.from, sync.from_shard);
        if sync.session != self.durable(stream).peer_session() && sync.seq.raw() > WINDOW {
            return Err(Reject::Window); // No session begins so far on.
        }
        self.accept_session(stream, sync.session)?;
        match sync.seq {
            Seq::NONE => self.control(now, stream, r),
            seq => self.sequenced(now, stream, seq, r),
        }
    }

    /// The sender's half of the stream is in this session. A new one ends what was agreed on
    /// before.
    fn accept_session(&mut self, stream: usize, session: u16) -> Result<(), Reject> {
        match self.inbox.on_session(stream, session)? {
            Session::Known => return Ok(()),
            Session::First => {}
            Session::Anew => {
                // It may have let go of our copies, too.
                self.unverify_stream(stream);
                self.walks.push(Walk::Verify { stream });
            }
        }
        self.credit.drop_all(stream);
        Ok(())
    }

    fn sequenced(
        &mut self,
        now: Time,
        stream: usize,
        seq: Seq,
        mut r: Reader<'_>,
    ) -> Result<(), Reject> {
        if !self.source_is_read {
            return Ok(());
        }
        self.enqueue(stream);
        self.inbox.on_datagram(stream, seq)?;
        self.counters.count(Counter::DatagramsReceived);
        let mut complete = true;
        let mut again = r;
        while let Some(message) = Message::decode(&mut r)? {
            let result = match message {
                Message::New { target, stamp, own, previous, connection } => {
                    let active = self.coordinate_of_sender(stream, own);
                    self.apply_new(
                        now,
                        stream,
                        &New { target, stamp, active, previous, connection: &connection },
                    )
                }
                Message::Update { target, stamp, groups, previous, state, extra } => {
                    self.apply_update(stream, target, stamp, groups, previous, (&state, &extra))
                }
                Message::Close { target, stamp, ended } => {
                    self.apply_close(now, stream, target, stamp, ended)
                }
                Message::Release { target, stamp } => {
                    self.apply_release(now, stream, target, stamp)
                }
                Message::Decline { target, own, number, fault } => {
                    let own = self.coordinate_of_sender(stream, own);
                    self.apply_decline(now, target, own, number, fault);
                    Applied
                }
                Message::Offer { target, own, stamp, claimed } => {
                    let own = self.coordinate_of_sender(stream, own);
                    self.apply_offer(now, target, stamp, own, claimed)
                }
                Message::Item { .. } if !self.has_room_for_items() => Busy,
                Message::Item { target, own, hash, round } => {
                    let own = self.coordinate_of_sender(stream, own);
                    let in_order = self.is_in_order(stream, seq);
                    self.apply_item(now, stream, (target, own), hash, round, in_order);
                    Applied
                }
                // It speaks of items before it: they come first.
                Message::End { .. } if !self.inbox.is_next(stream, seq) => Busy,
                Message::End { round, mask } => {
                    self.apply_end(stream, round, mask);
                    Applied
                }
                _ => Applied,
            };
            match (result, message) {
                (Applied, _) => {}
                (Busy, _) => complete = false,
                (Refused(reason), Message::New { target, .. } | Message::Update { target, .. }) => {
                    let own = match message {
                        Message::New { own, .. } => Some(own),
                        _ => None,
                    };
                    complete = false;
                    self.counters.count(Counter::Refused);
                    self.inbox.refuse(stream, Refusal { seq, target, reason, own });
                }
                (Refused(_), _) => unreachable!("only new and update are refused"),
            }
        }
        complete |= is(Mutation::RefusedAcknowledged);
        if complete {
            // Leases come last: a datagram that comes again must not grant twice, and what is given
            // back in one that is refused is the sender's again.
            while let Some(message) = Message::decode(&mut again)? {
                match message {
                    Message::Lease(places) => self.take_grant(now, stream, places),
                    Message::GiveBack(places) => self.take_back(stream, places),
                    _ => {}
                }
            }
            self.inbox.applied(stream, seq);
        }
        Ok(())
    }

    pub(super) fn coordinate_of_sender(&self, stream: usize, own: Place) -> Coordinate {
        Coordinate::new(stream_member(stream), stream_shard(stream), own.slot, own.generation)
    }

    pub(super) fn line_at(&self, target: Place) -> Option<Line> {
        (target.slot < self.ledger.capacity()).then(|| self.ledger.line(target.slot))
    }

    pub(super) fn is_leased_to(&self, line: &Line, stream: usize) -> bool {
        line.kind() == Kind::Leased
            && self.stream_of(line.peer()) == stream
            && line.session() == self.durable(stream).peer_session()
    }

    fn take_grant(&mut self, now: Time, stream: usize, places: Places<'_>) {
        if self.credit.on_grant(now, stream, places.iter()) {
            self.enqueue(stream);
        }
        self.retry_at = now;
    }

    /// Slots leased to the stream that it does not need. Two lives later they are free: a new for
    /// one that is on its way nevertheless misses. What is counted as granted stays, at both ends
    /// alike.
    fn take_back(&mut self, stream: usize, places: Places<'_>) {
        for place in places.iter() {
            let leased = self.line_at(place).is_some_and(|line| {
                line.generation() == place.generation && self.is_leased_to(&line, stream)
            });
            if leased {
                self.ledger.free(place.slot);
                self.counters.count(Counter::LeasesGivenBack);
            }
        }
    }
}

#[cfg(test)]
#[path = "receiver_tests.rs"]
mod tests;
