//! Acks and what else comes unsequenced: the answer to what this shard sent.
//!
//! An ack moves one floor; nothing is done per connection, except that closes free their slots.
//! What arrived beyond the floor need not be repeated; what several later datagrams overtook is
//! repeated without waiting. A refusal sends one connection elsewhere and the rest of its
//! datagram again. Control requests (releases, offers, declines) see for themselves that the floor
//! has passed them: `Replica::tick_requests`.

use super::history::{Content, EpochBits};
use super::inbox::Refusal;
use super::mutation::{Mutation, is};
use super::replica::Replica;
use super::requests::Rank;
use super::stream::{stream_member, stream_shard};
use crate::ccp::Reject;
use crate::ccp::bytes::Reader;
use crate::ccp::message::{Bitmap, Message, Reason};
use crate::conn::{Coordinate, Kind};
use crate::counters::Counter;
use crate::seq::Seq;
use crate::time::Time;

impl Replica<'_> {
    /// Messages of an unsequenced datagram.
    pub(super) fn control(
        &mut self,
        now: Time,
        stream: usize,
        mut r: Reader<'_>,
    ) -> Result<(), Reject> {
        let session = self.durable(stream).session();
        let mut refused = Seq::NONE;
        while let Some(message) = Message::decode(&mut r)? {
            match message {
                // Before anything was received there is nothing to acknowledge: session 0.
                Message::Ack { session: 0, .. } => {}
                Message::Ack { session: of, floor, beyond } if of == session => {
                    self.outbox.establish(stream);
                    self.handle_ack(now, stream, floor, beyond)?;
                }
                Message::Refuse { session: of, seq, target, reason, own } if of == session => {
                    self.handle_refusal(now, stream, Refusal { seq, target, reason, own });
                    refused = refused.max(seq);
                }
                Message::Ack { .. } | Message::Refuse { .. } => return Err(Reject::Table),
                Message::Want { total } => {
                    self.credit.on_want(stream, total);
                    self.enqueue(stream);
                }
                Message::Skip { to } => {
                    self.inbox.skip(stream, to)?;
                    self.enqueue(stream);
                }
                Message::Digest { session, seq, unverified, sums } => {
                    self.handle_digest(stream, (session, seq), unverified, sums)?;
                }
                Message::Differ { session, seq, mask } => {
                    self.handle_differ(stream, (session, seq), mask)?
                }
                Message::Resend { target, doubt } => self.handle_resend(now, stream, target, doubt),
                Message::Goodbye => self.goodbyes |= 1 << stream_member(stream),
                _ => return Err(Reject::Message),
            }
        }
        // Only now: several refusals may name one datagram.
        self.give_up(now, stream, refused);
        Ok(())
    }

    fn handle_ack(
        &mut self,
        now: Time,
        stream: usize,
        floor: Seq,
        beyond: Bitmap<'_>,
    ) -> Result<(), Reject> {
        if floor.is_after(self.durable(stream).sent()) {
            return Err(Reject::Message);
        }
        self.counters.count(Counter::AcksReceived);
        if is(Mutation::MemoryGrows) {
            std::mem::forget(std::hint::black_box(vec![1u8; 64]));
        }
        let counters = &self.counters;
        let is_progress = self.outbox.on_floor(now, stream, floor, |delay, connections| {
            if connections > 0 {
                let us = delay.as_micros() as u64;
                counters.delay(us, connections as u64);
                counters.set(Counter::DelayUs, us);
            }
        });
        if is_progress {
            self.free_closed(stream, floor);
        }
        self.outbox.on_beyond(now, stream, beyond.words());
        Ok(())
    }

    /// Closes that are acknowledged: both slots are free again, theirs for this stream's lease.
    pub(super) fn free_closed(&mut self, stream: usize, floor: Seq) {
        while let Some(slot) = self.ledger.first_closing(stream) {
            let line = self.ledger.line(slot);
            if !line.last().is_passed_by(floor) && !is(Mutation::EarlyReuse) {
                break;
            }
            self.ledger.unlist(slot);
            self.return_lease(line.peer(), line.session());
            self.ledger.clear(slot);
        }
    }

    /// A backup refused a delta: its connection finds another one, the rest of the datagram is sent
    /// again.
    pub(super) fn handle_refusal(&mut self, now: Time, stream: usize, refusal: Refusal) {
        let Refusal { seq, target, reason, own } = refusal;
        let Some(datagram) = self.outbox.find(stream, seq) else { return }; // Settled before.
        let member = stream_member(stream);
        let backup = Coordinate::new(member, stream_shard(stream), target.slot, target.generation);
        for content in self.outbox.contents(datagram) {
            let Content::Delta { place, epoch } = content else { continue };
            if own.is_some_and(|own| own != place) {
                continue; // A place that stands in the lease twice: only one of the two was refused.
            }
            let line = self.ledger.line(place.slot);
            // If the epoch is another one, the peer claimed the connection and this member claimed
            // it back since the refused delta was sent: the refusal says nothing of it now.
            let is_current = epoch == EpochBits::of(line.stamp());
            let is_ours = line.generation() == place.generation
                && line.peer() == backup
                && line.kind() == Kind::Active;
            if is_ours && is_current {
                // Another delta of this connection may be on its way, and be applied in that slot:
                // the copy that it makes is released. (A slot that is not leased any more takes
                // nothing.) The peer may have claimed the connection with an equal stamp, and the
                // release may reach it before its claim reaches this member: of equal stamps the
                // higher member's counts.
                let told = match self.config.member > member {
                    true => line.stamp().changed(),
                    false => line.stamp(),
                };
                if reason != Reason::NotLeased && !self.release(Rank::Consequence, backup, told) {
                    continue; // There is no room for a request: it is refused again.
                }
                self.counters.count(Counter::RefusedByPeer);
                self.ledger.unassign(place.slot);
                match reason {
                    // Nobody's packets were seen here, and somebody carries it on who knows it
                    // better.
                    Reason::Superseded if self.is_presumed(place.slot) => {
                        self.doubt_presumed(now, place.slot, backup.member())
                    }
                    // There it is newer, or may be: asking again at once would be refused again.
                    Reason::Superseded | Reason::InDoubt => {
                        // What the other one's is was not told.
                        self.contest(now, place.slot, None);
                        self.ledger.back_off(now, place.slot);
                    }
                    Reason::NotLeased | Reason::NotHere => self.protect(now, place.slot),
                }
            }
        }
    }
}
