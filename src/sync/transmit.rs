//! Transmit: dirty connections become deltas, deltas fill datagrams, datagrams leave as trains.
//!
//! A delta carries the newest value of every group that changed since the last acknowledged
//! one, so it makes up for any that was lost. Datagrams are written to the arena once and stay
//! there as the history: a gap is repaired by sending the same bytes again. When the arena needs
//! the room of a datagram that was never acknowledged, its connections become dirty first, and
//! only then is the peer told to skip it.

use std::time::Duration;

use super::history::{Content, Datagram, EpochBits, MANIFEST_PER_DATAGRAM};
use super::inbox::Refusal;
use super::mutation::{Mutation, is};
use super::outbox::{NOT_TAKEN, Room};
use super::replica::Replica;
use super::sends::{Named, Token, Transmit};
use super::stream::{stream_member, stream_shard};
use crate::ccp::bytes::Writer;
use crate::ccp::header::{Header, OPCODE_SYNC};
use crate::ccp::message::{
    DELTA_MAX, Ended, Message, NEW_MAX, Place, encode_ack, encode_give_back, encode_lease,
    forget_ages,
};
use crate::ccp::sync::{MESSAGES_AT, SyncHeader};
use crate::ccp::value::EXTRA_MAX;
use crate::conn::slot::groups;
use crate::conn::{Coordinate, Extra, Kind};
use crate::counters::Counter;
use crate::limits::{DATAGRAM_MAX, LEASE_GRANT_MAX, SEGMENTS_MAX, TRANSMIT_PER_PASS};
use crate::seq::Seq;
use crate::source::End;
use crate::time::Time;

/// Bytes of an update at most: head, stamp, previous backup, every group but the tuples.
const UPDATE_MAX: usize = 8 + 10 + 8 + 16;
/// Bytes of a close, release or offer at most.
const SMALL_MAX: usize = 8 + 10 + 8;

/// How long the ages in a datagram are taken for true, from its first sending on.
const AGES_LAST: Duration = Duration::from_secs(1);

/// What may still be built in this pass.
struct Budget {
    /// So many deltas.
    deltas: usize,
    /// Something else than the cap ended it, and whatever ends that wakes the loop.
    is_blocked: bool,
}

impl Budget {
    fn is_left(&self) -> bool {
        self.deltas > 0 && !self.is_blocked
    }
}

impl Replica<'_> {
    /// Composes everything that is due, as far as the loop takes it (`room` datagrams): what later
    /// datagrams have overtaken first, on whichever stream; then, stream by stream, acks and what
    /// goes with them, what had no ack in time, what is dirty, and a digest. The loop takes it by
    /// [`poll_transmit`](Self::poll_transmit). Returns whether the cap of a pass was hit, so that
    /// more may wait.
    pub fn transmit(&mut self, now: Time, room: usize) -> bool {
        self.sends.begin(room);
        let mut budget = Budget { deltas: TRANSMIT_PER_PASS, is_blocked: false };
        while let Some(id) = self.outbox.next_overtaken()
            && self.retransmit(now, id)
        {}
        for _ in 0..self.busy.len() {
            let Some(stream) = self.busy.pop_front() else { break };
            let stream = stream as usize;
            self.streams[stream].busy = false;
            if self.is_up(stream_member(stream)) {
                self.send_control(now, stream);
                self.send_retransmissions(now, stream);
                self.send_data(now, stream, &mut budget);
                self.send_digest(stream);
            }
            if self.is_stream_busy(stream) {
                self.enqueue(stream);
            }
        }
        budget.deltas == 0
    }

    fn is_stream_busy(&self, stream: usize) -> bool {
        let s = &self.streams[stream];
        self.ledger.dirty(stream) > 0
            || self.outbox.is_outstanding(stream)
            || self.inbox.is_busy(stream)
            || s.comparing.is_due()
            || self.has_answers(stream)
            || self.has_lines(stream)
            || self.credit.is_busy(stream)
            || self.outbox.skip_due(stream).is_some()
            || self.requests.first_due(stream).is_some()
    }

    /// The next of what [`transmit`](Self::transmit) has composed. It counts as sent: if it cannot
    /// be, it is lost, like any other, and goes again in time.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.sends.pop()
    }

    /// The kernel is done with a send.
    pub fn on_send_complete(&mut self, token: Token, error: bool) {
        self.counters.add(Counter::SendErrors, error as u64);
        match token.names() {
            Named::Control(buffer) => self.outbox.give_control(buffer),
            Named::Entries(first, count) => self.outbox.on_send_complete(first, count),
        }
    }

    pub(super) fn headers(&self, stream: usize, seq: Seq) -> (Header, SyncHeader) {
        let member = stream_member(stream);
        let durable = self.durable(stream);
        (
            Header {
                group: self.config.group,
                opcode: OPCODE_SYNC,
                from: self.config.member,
                to: Some(member),
                to_shard: stream_shard(stream),
            },
            SyncHeader {
                from_shard: self.config.shard,
                from_table: self.config.table_id,
                to_table: self.peers.seen(member).table_id,
                session: durable.session(),
                seq,
            },
        )
    }

    /// Acks, refusals, wishes, skips and what follows from digests: one unsequenced datagram. It is
    /// not retransmitted: what is still due when its time comes is composed anew.
    fn send_control(&mut self, now: Time, stream: usize) {
        let want = self.credit.ask_due(now, stream);
        let skip = self.outbox.skip_due(stream);
        let skip = skip.filter(|_| self.outbox.skip_at(stream).reached(now));
        let has_answers = self.inbox.is_busy(stream) || self.has_answers(stream);
        if !has_answers && want.is_none() && skip.is_none() {
            return;
        }
        let (header, sync) = self.headers(stream, Seq::NONE);
        let mut scratch = [0; DATAGRAM_MAX];
        let mut w = Writer::new(&mut scratch);
        sync.encode(&header, &mut w);
        let session = self.durable(stream).peer_session();
        let (floor, beyond, words) = self.inbox.received(stream);
        encode_ack(session, floor, &beyond[..words], &mut w);
        for Refusal { seq, target, reason, own } in self.inbox.take_refusals(stream) {
            Message::Refuse { session, seq, target, reason, own }.encode(&mut w);
        }
        if let Some(total) = want {
            Message::Want { total }.encode(&mut w);
        }
        if let Some(to) = skip {
            Message::Skip { to }.encode(&mut w);
        }
        // They may be lost: the next digest shows what was not sent again.
        if let Some(answer) = self.take_answer(stream) {
            answer.encode(&mut w);
        }
        while w.room() >= 16
            && let Some(resend) = self.take_resend(stream)
        {
            resend.encode(&mut w);
        }
        let len = w.len();
        let sent = self.send_control_bytes(stream, &scratch[..len]);
        if sent {
            self.counters.count(Counter::AcksSent);
            self.inbox.acked(stream);
        }
        match (skip, sent) {
            (Some(_), true) => self.outbox.skip_said(now, stream),
            (Some(_), false) => self.outbox.skip_not_taken(now, stream),
            (None, _) => {}
        }
    }

    /// Puts bytes into a control buffer and hands them to the loop. `false` if no buffer was free,
    /// or the loop takes no more in this pass: the caller leaves what is due as it is.
    pub(super) fn send_control_bytes(&mut self, stream: usize, bytes: &[u8]) -> bool {
        let Some((buffer, offset)) = self.outbox.control(bytes) else {
            self.counters.count(Counter::ControlFull);
            return false;
        };
        let token = Token::control(buffer);
        let transmit = Transmit { stream, offset, len: bytes.len() as u32, token };
        let taken = self.sends.push(transmit);
        if !taken {
            self.outbox.give_control(buffer);
            self.counters.count(Counter::ControlFull);
        }
        taken
    }

    /// A control buffer with these bytes for the loop to send by itself (heartbeats); its token
    /// comes back through [`on_send_complete`](Self::on_send_complete).
    pub fn control_datagram(&mut self, bytes: &[u8]) -> Option<(u32, Token)> {
        let Some((buffer, offset)) = self.outbox.control(bytes) else {
            self.counters.count(Counter::ControlFull);
            return None;
        };
        Some((offset, Token::control(buffer)))
    }

    /// Says goodbye to every member that is there, behind what this pass sends otherwise.
    pub fn send_goodbyes(&mut self) {
        for member in self.peers.up() {
            let stream = super::stream::stream_index(member, 0);
            let (header, sync) = self.headers(stream, Seq::NONE);
            let mut bytes = [0; 64];
            let mut w = Writer::new(&mut bytes);
            sync.encode(&header, &mut w);
            Message::Goodbye.encode(&mut w);
            let len = w.len();
            self.send_control_bytes(stream, &bytes[..len]);
        }
    }

    /// Nothing was acknowledged for too long: the oldest datagrams go again.
    fn send_retransmissions(&mut self, now: Time, stream: usize) {
        if is(Mutation::NothingRepeated) {
            return;
        }
        let Some(due) = self.outbox.due_again(now, stream) else { return };
        match due.iter().all(|id| self.retransmit(now, *id)) {
            true => self.outbox.timed_out(now, stream),
            false => self.outbox.not_taken(now, stream),
        }
    }

    /// Sends a datagram of the history again. What it says of ages is not true any more after a
    /// while.
    fn retransmit(&mut self, now: Time, id: u32) -> bool {
        let Datagram { stream, offset, len, first_sent, .. } = self.outbox.entry(id);
        if now.since(first_sent) > AGES_LAST {
            self.outbox.amend(id, |datagram| forget_ages(&mut datagram[MESSAGES_AT..]));
        }
        let token = Token::entries(id, 1);
        let taken = self.sends.push(Transmit { stream, offset, len, token });
        if taken {
            self.outbox.retransmitted(now, id);
            self.counters.count(Counter::DatagramsResent);
        }
        taken
    }

    fn has_data(&self, now: Time, stream: usize, started: bool) -> bool {
        let dirty = self.ledger.dirty(stream) as usize;
        let flush =
            started || self.streams[stream].flush_at.reached(now) || dirty >= DATAGRAM_MAX / 48;
        (dirty > 0 && flush)
            || self.credit.has_places(stream)
            || self.requests.first_due(stream).is_some()
            || self.has_lines(stream)
    }

    /// Grants, requests and dirty connections, in trains of datagrams: a train is one send, whose
    /// datagrams lie side by side in the arena and have the same size, but for the last one.
    fn send_data(&mut self, now: Time, stream: usize, budget: &mut Budget) {
        let mut started = false;
        let mut stuck = false;
        let mut is_full = false; // This stream's window; others go on.
        while budget.is_left() && !is_full && self.has_data(now, stream, started) {
            started = true;
            let mut train: Option<(u32, u32, u32)> = None; // first entry, offset, bytes
            let mut count = 0;
            let room = self.sends.room();
            if room == 0 {
                stuck = true;
                budget.is_blocked = true;
            }
            while (count as usize) < SEGMENTS_MAX.min(room)
                && budget.is_left()
                && self.has_data(now, stream, true)
            {
                if !self.outbox.has_window(stream) {
                    self.counters.count(Counter::WindowFull);
                    is_full = true;
                    break;
                }
                let Some(offset) = self.arena_room(now) else {
                    stuck = true;
                    budget.is_blocked = true;
                    break;
                };
                if train.is_some_and(|(_, at, len)| at + len != offset) {
                    break; // The ring wrapped: a train lies in one piece.
                }
                let Some((id, len, deltas)) = self.build(now, stream, offset) else { break };
                budget.deltas = budget.deltas.saturating_sub(deltas.max(1));
                count += 1;
                let (first, at, bytes) = train.unwrap_or((id, offset, 0));
                train = Some((first, at, bytes + len));
                if (len as usize) < DATAGRAM_MAX {
                    break; // Only the last datagram of a train may be short.
                }
            }
            let Some((first, offset, len)) = train else { break };
            let token = Token::entries(first, count);
            let taken = self.sends.push(Transmit { stream, offset, len, token });
            assert!(taken, "there was room for each of its datagrams");
        }
        if started && self.ledger.dirty(stream) > 0 {
            // An ack, or a send that is over, makes room and wakes the loop by itself.
            self.streams[stream].flush_at = if stuck { now.after(NOT_TAKEN) } else { now };
        }
    }

    /// Room for a datagram in the arena, if need be by giving up the oldest one.
    fn arena_room(&mut self, now: Time) -> Option<u32> {
        loop {
            match self.outbox.room(now) {
                Room::At(offset) => return Some(offset),
                Room::IfGivenUp(stream, seq) => self.give_up(now, stream, seq),
                Room::None => {
                    self.counters.count(Counter::ArenaFull);
                    return None;
                }
            }
        }
    }

    /// Builds one datagram at `offset` of the arena. Returns its entry, the bytes it takes up and
    /// its deltas.
    fn build(&mut self, now: Time, stream: usize, offset: u32) -> Option<(u32, u32, usize)> {
        let seq = self.durable(stream).sent().next();
        let (header, sync) = self.headers(stream, seq);
        let mut scratch = [0; DATAGRAM_MAX];
        let mut w = Writer::new(&mut scratch);
        sync.encode(&header, &mut w);
        let empty = w.len();
        let mut noted = 0;
        let mut places = [Place { slot: 0, generation: Default::default() }; LEASE_GRANT_MAX];
        let granted = self.build_grants(stream, &mut places, &mut w);
        noted += granted;
        let given_back = if granted == 0 { self.build_give_back(stream, &mut w) } else { 0 };
        noted += given_back;
        noted += self.build_requests(stream, seq, &mut w, MANIFEST_PER_DATAGRAM - noted);
        self.build_lines(stream, &mut w);
        let mut oldest_change = now;
        let mut connections = 0;
        let mut deltas = 0;
        while noted < MANIFEST_PER_DATAGRAM
            && let Some(slot) = self.ledger.first_dirty(stream)
            && w.room() >= self.delta_room(slot)
        {
            oldest_change = oldest_change.min(self.ledger.since(slot));
            connections += self.build_delta(now, slot, seq, &mut w);
            noted += 1;
            deltas += 1;
        }
        if self.ledger.dirty(stream) == 0 {
            self.streams[stream].comparing.trust_sums();
            self.build_lines(stream, &mut w);
        }
        let len = w.len();
        if len == empty {
            return None;
        }
        // If more follows, this datagram is not the last of its train: it takes up its full size.
        let more = self.ledger.dirty(stream) > 0
            || self.credit.owed(stream) > granted as u64
            || self.credit.to_give_back(stream) > given_back as u32;
        let stride = if more { DATAGRAM_MAX } else { len };
        let session = self.durable(stream).session();
        let entry = Datagram { stream, session, seq, offset, len: len as u32, first_sent: now };
        let id = self.outbox.append(&entry, &scratch[..len], stride, oldest_change, connections);
        // Only now: a process that is killed before it has lent nothing.
        self.lend(stream, &places[..granted]);
        self.credit.given_back(stream, given_back);
        self.counters.count(Counter::DatagramsSent);
        self.counters.add(Counter::BytesSent, len as u64);
        Some((id, stride as u32, deltas))
    }

    fn delta_room(&self, slot: u32) -> usize {
        let line = self.ledger.line(slot);
        match (line.kind(), line.groups() & groups::TUPLES != 0) {
            (Kind::Active, true) if self.ledger.has_extra(slot) => DELTA_MAX,
            (Kind::Active, true) => NEW_MAX,
            (Kind::Active, false) if line.groups() & groups::EXTRA != 0 => UPDATE_MAX + EXTRA_MAX,
            (Kind::Active, false) => UPDATE_MAX,
            _ => SMALL_MAX,
        }
    }

    /// One delta; returns how many connections it exposes until it is acknowledged (a close: none).
    fn build_delta(&mut self, now: Time, slot: u32, seq: Seq, w: &mut Writer<'_>) -> u32 {
        let line = self.ledger.line(slot);
        let own = Place { slot, generation: line.generation() };
        let (mut target, stamp) = (Place::of(line.peer()), line.stamp());
        if is(Mutation::TargetOff) {
            target.slot ^= 1;
        }
        let previous: Option<Coordinate> =
            self.ledger.is_moving(slot).then(|| self.ledger.former(slot));
        self.outbox.note(Content::Delta { place: own, epoch: EpochBits::of(stamp) });
        self.ledger.unlist(slot);
        self.ledger.amend(slot, |line| line.set_last(seq));
        match line.kind() {
            Kind::Active if line.groups() & groups::TUPLES != 0 => {
                let connection = self.ledger.connection(slot);
                Message::New { target, stamp, own, previous, connection }.encode(w);
                self.ledger.account_sent(slot);
                self.counters.count(Counter::DeltasNew);
                1
            }
            Kind::Active => {
                let (groups, state) = (line.groups(), line.state());
                let extra =
                    if groups & groups::EXTRA != 0 { self.ledger.extra(slot) } else { Extra::NONE };
                Message::Update { target, stamp, groups, previous, state, extra }.encode(w);
                self.ledger.account_sent(slot);
                self.counters.count(Counter::DeltasUpdate);
                1
            }
            Kind::Closing => {
                let longest_s = self.longest_timeout_s;
                let ended = match self.ledger.end_of(slot, now) {
                    End::Seen => Ended::Seen,
                    End::Left => Ended::Left,
                    End::Unseen { left_s } => Ended::Unseen {
                        age_s: longest_s.checked_sub(left_s).filter(|_| left_s > 0),
                    },
                };
                Message::Close { target, stamp, ended }.encode(w);
                self.ledger.account_unsent(slot);
                self.counters.count(Counter::DeltasClose);
                self.ledger.await_ack(now, slot);
                0
            }
            kind => panic!("a {kind:?} slot is never dirty"),
        }
    }

    /// Slots that the peer asked for.
    fn build_grants(
        &mut self,
        stream: usize,
        places: &mut [Place; LEASE_GRANT_MAX],
        w: &mut Writer<'_>,
    ) -> usize {
        let due = self.credit.owed(stream).min(LEASE_GRANT_MAX as u64) as usize;
        if due == 0 {
            return 0;
        }
        // An eighth of the table stays for connections that open here.
        let spare = self.room().saturating_sub(self.ledger.capacity() / 8) as usize;
        let count = due.min(spare);
        if count == 0 {
            self.credit.grant_nothing(stream);
            self.counters.count(if self.kernel_has_room {
                Counter::TableFull
            } else {
                Counter::KernelFull
            });
            return 0;
        }
        for place in &mut places[..count] {
            let slot = self.ledger.allocate().expect("room was counted");
            *place = Place { slot, generation: self.ledger.line(slot).generation() };
            self.outbox.note(Content::Granted(*place));
        }
        encode_lease(&places[..count], w);
        count
    }

    /// These slots, which are in a datagram of the history, are the peer's from now on.
    fn lend(&mut self, stream: usize, places: &[Place]) {
        let count = places.len() as u64;
        if count == 0 {
            return;
        }
        let durable = self.durable(stream);
        let lessee =
            Coordinate::new(stream_member(stream), stream_shard(stream), 0, Default::default());
        for place in places {
            self.ledger.lend(place.slot, lessee, durable.peer_session());
            self.credit.granted(stream);
        }
        self.counters.add(Counter::LeasesGranted, count);
    }

    /// Slots leased from the peer that are not needed here.
    fn build_give_back(&mut self, stream: usize, w: &mut Writer<'_>) -> usize {
        let mut places = [Place { slot: 0, generation: Default::default() }; LEASE_GRANT_MAX];
        let count = self.credit.first_to_give_back(stream, &mut places);
        if count > 0 {
            encode_give_back(&places[..count], w);
            places[..count].iter().for_each(|place| self.outbox.note(Content::GivenBack(*place)));
        }
        count
    }

    fn build_requests(
        &mut self,
        stream: usize,
        seq: Seq,
        w: &mut Writer<'_>,
        most: usize,
    ) -> usize {
        let mut built = 0;
        while built < most
            && w.room() >= SMALL_MAX
            && let Some((message, content)) = self.next_request(stream, seq)
        {
            message.encode(w);
            self.outbox.note(content);
            built += 1;
            if matches!(message, Message::Release { .. }) {
                self.counters.count(Counter::DeltasRelease);
            }
        }
        built
    }

    /// Everything up to `to` on this stream that is not acknowledged is given up: what it carried
    /// becomes dirty, then the peer may skip it.
    pub(super) fn give_up(&mut self, now: Time, stream: usize, to: Seq) {
        while let Some((id, entry)) = self.outbox.oldest(stream)
            && !entry.seq.is_after(to)
        {
            self.counters.count(Counter::DatagramsGivenUp);
            self.streams[stream].comparing.doubt_sums();
            for content in self.outbox.contents(id) {
                match content {
                    Content::Delta { place, .. } => {
                        self.delta_given_up(now, stream, place, entry.seq)
                    }
                    Content::Granted(place) => {
                        // Grants of an earlier session are not counted any more.
                        if self.revoke(place) == Some(self.durable(stream).peer_session()) {
                            self.credit.grant_failed(stream);
                        }
                    }
                    Content::Request(id) => self.requests.given_up(id, entry.seq),
                    // Ours again, unless the peer had taken it back all the same: then it refuses
                    // whatever is sent there.
                    Content::GivenBack(place) => self.credit.put(stream, place),
                }
            }
            self.outbox.give_up_oldest(now, stream);
            self.enqueue(stream);
        }
    }

    fn delta_given_up(&mut self, now: Time, stream: usize, place: Place, seq: Seq) {
        let line = self.ledger.line(place.slot);
        if is(Mutation::SkipUnmarked) {
            return;
        }
        let ours = line.generation() == place.generation
            && matches!(line.kind(), Kind::Active | Kind::Closing)
            && line.peer().is_somewhere()
            && self.stream_of(line.peer()) == stream
            && line.last() == seq;
        if ours {
            self.ledger.amend(place.slot, |line| line.set_last(Seq::NONE));
            self.mark_dirty(now, place.slot, 0);
        }
    }

    /// A slot that was granted in a datagram which may or may not arrive: two lives later, so that
    /// nobody takes the old grant for a copy that was closed. Tells in which session of the peer's
    /// half it was granted, if it was not filled yet.
    pub(super) fn revoke(&mut self, place: Place) -> Option<u16> {
        let line = self.ledger.line(place.slot);
        let empty = line.kind() == Kind::Leased && line.generation() == place.generation;
        empty.then(|| {
            self.ledger.free(place.slot);
            line.session()
        })
    }
}
