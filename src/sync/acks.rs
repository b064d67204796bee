//! Acks and what else comes unsequenced: the answer to what this shard sent.
//!
//! An ack moves one floor; nothing is done per connection, except that closes free their slots.
//! What arrived beyond the floor need not be repeated; what several later datagrams overtook is
//! repeated without waiting. A refusal sends one connection elsewhere and the rest of its
//! datagram again.

use super::history::{Content, EpochBits};
use super::mutation::{Mutation, is};
use super::replica::{AGAIN_MAX, Replica};
use super::requests::Rank;
use super::stream::{Refusal, stream_member, stream_shard};
use crate::ccp::Reject;
use crate::ccp::bytes::Reader;
use crate::ccp::message::{Bitmap, Message, Reason};
use crate::conn::{Coordinate, Kind};
use crate::counters::Counter;
use crate::limits::WINDOW;
use crate::seq::Seq;
use crate::time::Time;

/// A datagram that this many later ones overtook is taken for lost.
const OVERTAKEN: u64 = 3;

impl Replica<'_> {
    /// Messages of an unsequenced datagram.
    pub(super) fn control(&mut self, now: Time, stream: usize, mut r: Reader<'_>) -> Result<(), Reject> {
        let session = self.durable(stream).session();
        let mut refused = Seq::NONE;
        while let Some(message) = Message::decode(&mut r)? {
            match message {
                // Before anything was received there is nothing to acknowledge: session 0.
                Message::Ack { session: 0, .. } => {}
                Message::Ack { session: of, floor, beyond } if of == session => {
                    self.streams[stream].greeted = true;
                    self.handle_ack(now, stream, floor, beyond)?;
                }
                Message::Refuse { session: of, seq, target, reason, own } if of == session => {
                    self.handle_refusal(now, stream, Refusal { seq, target, reason, own });
                    refused = refused.max(seq);
                }
                Message::Ack { .. } | Message::Refuse { .. } => return Err(Reject::Table),
                Message::Want { total } => {
                    self.credit.on_want(stream, total);
                    self.wake(stream);
                }
                Message::Skip { to } => {
                    if to.beyond(self.durable(stream).receive_floor()) > WINDOW {
                        return Err(Reject::Window);
                    }
                    self.durable(stream).skip(to);
                    self.streams[stream].ack_due = true;
                    self.wake(stream);
                }
                Message::Digest { session, seq, unverified, sums } => {
                    self.handle_digest(stream, (session, seq), unverified, sums)?;
                }
                Message::Differ { session, seq, mask } => self.handle_differ(stream, (session, seq), mask)?,
                Message::Resend { target, doubt } => self.handle_resend(now, stream, target, doubt),
                Message::Goodbye => self.goodbyes |= 1 << stream_member(stream),
                _ => return Err(Reject::Message),
            }
        }
        // Only now: several refusals may name one datagram.
        self.give_up(now, stream, refused);
        Ok(())
    }

    fn handle_ack(&mut self, now: Time, stream: usize, floor: Seq, beyond: Bitmap<'_>) -> Result<(), Reject> {
        let durable = self.durable(stream);
        let sent = durable.sent();
        if floor.is_after(sent) {
            return Err(Reject::Message);
        }
        self.counters.count(Counter::AcksReceived);
        if is(Mutation::MemoryGrows) {
            std::mem::forget(std::hint::black_box(vec![1u8; 64]));
        }
        if floor.is_after(durable.floor()) {
            let progress = floor.beyond(durable.floor());
            durable.set_floor(floor);
            self.settle_below(now, stream, floor);
            let s = &mut self.streams[stream];
            s.widen(progress);
            s.repeats = 0;
            if s.oldest.is_some() {
                s.repeat_at = now.after(s.patience());
            }
            self.free_closed(stream, floor);
        }
        self.note_beyond(now, stream, durable.floor(), beyond);
        Ok(())
    }

    fn settle_below(&mut self, now: Time, stream: usize, floor: Seq) {
        while let Some(id) = self.streams[stream].oldest {
            let entry = self.history.entry(id);
            if entry.seq.is_after(floor) {
                break;
            }
            let delay = now.since(self.history.oldest_change(id)).as_micros() as u64;
            let connections = self.history.connections(id) as u64;
            if connections > 0 {
                self.counters.delay(delay, connections);
                self.counters.set(Counter::DelayUs, delay);
            }
            if self.history.sends(id) == 1 {
                self.streams[stream].sample(now.since(entry.first_sent));
            }
            self.settle_oldest(stream, id);
        }
    }

    /// Closes that are acknowledged: both slots are free again, theirs for this stream's lease.
    pub(super) fn free_closed(&mut self, stream: usize, floor: Seq) {
        while let Some(slot) = self.streams[stream].closing.first() {
            let line = self.table.line(slot);
            if !line.last().is_passed_by(floor) && !is(Mutation::EarlyReuse) {
                break;
            }
            self.table.unlink(&mut self.streams[stream].closing, slot);
            self.return_lease(line.peer(), line.session());
            self.table.forget(slot);
            self.table.recycle(slot);
        }
    }

    /// What arrived beyond the floor need not be repeated; what several later ones overtook is
    /// repeated at once.
    fn note_beyond(&mut self, now: Time, stream: usize, floor: Seq, beyond: Bitmap<'_>) {
        let mut words = [0u64; (WINDOW / 64) as usize];
        let mut highest = 0;
        for (i, word) in beyond.words().enumerate() {
            words[i] = word;
            if word != 0 {
                highest = 64 * i as u64 + 64 - word.leading_zeros() as u64;
            }
        }
        let mut next = self.streams[stream].oldest;
        let patience = self.streams[stream].round_trip.max(500_000);
        while let Some(id) = next
            && highest > 0
        {
            let seq = self.history.entry(id).seq;
            let at = seq.beyond(floor);
            if at == 0 || at > highest {
                break;
            }
            let bit = at - 1;
            if words[(bit / 64) as usize] >> (bit % 64) & 1 == 1 {
                self.history.set_arrived(id);
            } else if highest - at >= OVERTAKEN
                && now.since(self.history.last_sent(id)).as_nanos() as u64 >= patience
                && self.again.len() < AGAIN_MAX
                && !self.again.contains(&(id, seq))
            {
                self.again.push((id, seq));
                let sent = self.durable(stream).sent();
                self.streams[stream].shrink(seq, sent);
            }
            next = self.history.next(id);
        }
    }

    /// A backup refused a delta: its connection finds another one, the rest of the datagram is sent again.
    pub(super) fn handle_refusal(&mut self, now: Time, stream: usize, refusal: Refusal) {
        let Refusal { seq, target, reason, own } = refusal;
        let mut next = self.streams[stream].oldest;
        let entry = loop {
            match next {
                Some(id) if self.history.entry(id).seq == seq => break id,
                Some(id) => next = self.history.next(id),
                None => return, // Settled before.
            }
        };
        let member = stream_member(stream);
        let backup = Coordinate::new(member, stream_shard(stream), target.slot, target.generation);
        for content in self.history.contents(entry) {
            let Content::Delta { place, epoch } = content else { continue };
            if own.is_some_and(|own| own != place) {
                continue; // A place that stands in the lease twice: only one of the two was refused.
            }
            let line = self.table.line(place.slot);
            // It was claimed there and claimed back here since: what was refused was of before all that.
            let is_current = epoch == EpochBits::of(line.stamp());
            let is_ours =
                line.generation() == place.generation && line.peer() == backup && line.kind() == Kind::Active;
            if is_ours && is_current {
                // Another delta of it may be on its way and find that slot as it should be: whatever it
                // leaves there must go. (A slot that is not leased any more takes nothing.) It may have been claimed there with
                // an equal stamp, and the release come first: the higher member's counts.
                let told = match self.config.member > member {
                    true => line.stamp().changed(),
                    false => line.stamp(),
                };
                if reason != Reason::NotLeased && !self.release(Rank::Consequence, backup, told) {
                    continue; // There is no room for a request: it is refused again.
                }
                self.counters.count(Counter::RefusedByPeer);
                self.unassign(place.slot);
                match reason {
                    // Nobody's packets were seen here, and somebody carries it on who knows it better.
                    Reason::Superseded if self.is_presumed(place.slot) => {
                        self.doubt_presumed(now, place.slot, backup.member())
                    }
                    // There it is newer: asking again at once would be refused again.
                    Reason::Superseded => {
                        // What the other one's is was not told.
                        self.contest(now, place.slot, None);
                        self.shelve(now, place.slot);
                    }
                    Reason::NotLeased | Reason::NotHere => self.protect(now, place.slot),
                }
            }
        }
    }
}
