//! Receive: datagrams become copies. An ack means applied.
//!
//! A datagram is checked as a whole before any of it is applied. One that brings something that
//! cannot be applied (no lease, an older state, no room for a request) is not acknowledged: the
//! sender is told which delta was refused, finds another backup for that connection, sends the
//! rest again otherwise, and says skip. So nothing is ever acknowledged that is not held.

use std::net::IpAddr;

use super::contests::{Doubt, Rival};
use super::mutation::{Mutation, is};
use super::replica::Replica;
use super::requests::Rank;
use super::stream::{Refusal, stream_index, stream_member, stream_shard};
use super::walks::Walk;
use crate::ccp::Reject;
use crate::ccp::bytes::Reader;
use crate::ccp::header::{Header, OPCODE_SYNC};
use crate::ccp::message::{Message, Place, Places, Reason};
use crate::ccp::sync::SyncHeader;
use crate::conn::slot::{Line, groups};
use crate::conn::table::{On, Written};
use crate::conn::tuple::shards_can_meet;
use crate::conn::{Connection, Coordinate, Extra, Kind, Stamp, State, Tuple};
use crate::counters::Counter;
use crate::limits::{DATAGRAM_MAX, WINDOW};
use crate::seq::Seq;
use crate::source::{Commit, CommitMode};
use crate::time::Time;

/// What became of a delta.
enum Verdict {
    Applied,
    Refused(Reason),
    /// Not now: the datagram will come again.
    Busy,
}

use Verdict::{Applied, Busy, Refused};

/// What may be left of a copy that is none any more.
enum Rest {
    /// Its active saw it end.
    Nothing,
    /// Its packets may take their way through here, although its active has it no more, or another backup. With the stamp that it
    /// had there, whether this member's own source saw it, and what becomes of its entry if no packets show.
    Perhaps(Stamp, bool, Doubt),
}

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
        let member = &self.view.members[header.from as usize];
        if !self.is_up(header.from) {
            return Err(Reject::Table);
        }
        if source.is_some() && member.address != source && !is(Mutation::SourceUnchecked) {
            return Err(Reject::Source);
        }
        if sync.from_shard >= member.shards
            || !shards_can_meet(self.config.shard, self.config.shards, sync.from_shard, member.shards)
        {
            return Err(Reject::Shard);
        }
        let same_tables = sync.from_table == member.table_id && sync.to_table == self.config.table_id;
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

    /// The sender's half of the stream is in this session. A new one ends what was agreed on before.
    fn accept_session(&mut self, stream: usize, session: u16) -> Result<(), Reject> {
        let durable = self.durable(stream);
        let known = durable.peer_session();
        if session == known && session != 0 {
            return Ok(());
        }
        if is(Mutation::SessionUnchecked)
            && session != 0
            && known != 0
            && session.wrapping_sub(known) > u16::MAX / 2
        {
            return Ok(());
        }
        if session == 0 || (known != 0 && session.wrapping_sub(known) > u16::MAX / 2) {
            return Err(Reject::Table);
        }
        durable.begin_peer_session(session);
        self.streams[stream].refusals.clear();
        self.credit.drop_all(stream);
        if known != 0 {
            // It may have let go of our copies, too.
            self.unverify_stream(stream);
            self.walks.push(Walk::Verify { stream });
        }
        Ok(())
    }

    fn sequenced(&mut self, now: Time, stream: usize, seq: Seq, mut r: Reader<'_>) -> Result<(), Reject> {
        let durable = self.durable(stream);
        self.streams[stream].ack_due = true; // Also for repeated ones: the ack may have been lost.
        self.wake(stream);
        if durable.is_received(seq) && !is(Mutation::RepeatedApplied) {
            return Err(Reject::Repeated);
        }
        if seq.beyond(durable.receive_floor()) > WINDOW && !is(Mutation::WindowUnchecked) {
            return Err(Reject::Window);
        }
        self.counters.count(Counter::DatagramsReceived);
        let mut complete = true;
        let mut again = r;
        while let Some(message) = Message::decode(&mut r)? {
            let verdict = match message {
                Message::New { target, stamp, own, previous, connection } => {
                    let own = self.sender(stream, own);
                    self.apply_new(now, stream, target, stamp, own, previous, &connection)
                }
                Message::Update { target, stamp, groups, previous, state, extra } => {
                    self.apply_update(stream, target, stamp, groups, previous, (&state, &extra))
                }
                Message::Close { target, stamp, seen } => self.apply_close(now, stream, target, stamp, seen),
                Message::Release { target, stamp } => self.apply_release(now, stream, target, stamp),
                Message::Decline { target, own, number, fault } => {
                    let own = self.sender(stream, own);
                    self.apply_decline(now, target, own, number, fault);
                    Applied
                }
                Message::Offer { target, own, stamp, claimed } => {
                    let own = self.sender(stream, own);
                    self.apply_offer(now, target, stamp, own, claimed)
                }
                Message::Item { .. } if !self.has_room_for_items() => Busy,
                Message::Item { target, own, hash, round } => {
                    let own = self.sender(stream, own);
                    let in_order = self.is_in_order(stream, seq);
                    self.apply_item(now, stream, (target, own), hash, round, in_order);
                    Applied
                }
                // It speaks of items before it: they come first.
                Message::End { .. } if seq != durable.receive_floor().next() => Busy,
                Message::End { round, mask } => {
                    self.apply_end(stream, round, mask);
                    Applied
                }
                _ => Applied,
            };
            match (verdict, message) {
                (Applied, _) => {}
                (Busy, _) => complete = false,
                (Refused(reason), Message::New { target, .. } | Message::Update { target, .. }) => {
                    let own = match message {
                        Message::New { own, .. } => Some(own),
                        _ => None,
                    };
                    complete = false;
                    self.counters.count(Counter::Refused);
                    if !self.refusals_full(stream) {
                        self.streams[stream].refusals.push(Refusal { seq, target, reason, own });
                    }
                }
                (Refused(_), _) => unreachable!("only new and update are refused"),
            }
        }
        complete |= is(Mutation::RefusedAcknowledged);
        if complete {
            // Leases come last: a datagram that comes again must not grant twice, and what is given back in one
            // that is refused is the sender's again.
            while let Some(message) = Message::decode(&mut again)? {
                match message {
                    Message::Lease(places) => self.take_grant(now, stream, places),
                    Message::GiveBack(places) => self.take_back(stream, places),
                    _ => {}
                }
            }
            durable.receive(seq);
        }
        Ok(())
    }

    fn sender(&self, stream: usize, own: Place) -> Coordinate {
        Coordinate::new(stream_member(stream), stream_shard(stream), own.slot, own.generation)
    }

    fn target(&self, target: Place) -> Option<Line> {
        (target.slot < self.table.capacity()).then(|| self.table.line(target.slot))
    }

    fn is_leased_to(&self, line: &Line, stream: usize) -> bool {
        line.kind() == Kind::Leased
            && self.stream_of(line.peer()) == stream
            && line.session() == self.durable(stream).peer_session()
    }

    #[allow(clippy::too_many_arguments)]
    fn apply_new(
        &mut self,
        now: Time,
        stream: usize,
        target: Place,
        stamp: Stamp,
        own: Coordinate,
        previous: Option<Coordinate>,
        connection: &Connection,
    ) -> Verdict {
        let Some(mut line) = self.target(target) else { return Refused(Reason::NotLeased) };
        if target.generation != line.generation() && !is(Mutation::NoGenerationCheck) {
            // Closed before, or never ours to fill: the sender knows which.
            return Refused(Reason::NotLeased);
        }
        let slot = target.slot;
        self.epoch = self.epoch.max(stamp.epoch);
        let here =
            line.kind().is_connection() && self.table.tuples(slot) == (connection.original, connection.reply);
        match line.kind() {
            Kind::Leased if self.is_leased_to(&line, stream) => {
                let witnessed = match self.give_way(now, connection, stamp, own, previous) {
                    Ok(witnessed) => witnessed,
                    Err(verdict) => {
                        if matches!(verdict, Refused(_)) {
                            // A repeated datagram must not be taken once the reason is gone: by then
                            // the connection has its copy elsewhere.
                            self.revoke(target);
                        }
                        return verdict;
                    }
                };
                line.set_session(0);
                line.set_kind(Kind::Backup);
                line.set_peer(own);
                line.set_stamp(stamp);
                line.set_claimed(witnessed);
                line.set_groups(0);
                line.set_last(Seq::NONE);
                self.table.set_former(slot, previous.unwrap_or(Coordinate::NOWHERE));
                self.table.fill(slot, line, connection);
                self.begin_copy(slot);
            }
            Kind::Backup if here && line.peer() == own => {
                if stamp <= line.stamp() && !is(Mutation::OlderWins) {
                    self.counters.count(Counter::DeltasOld);
                    if stamp == line.stamp() {
                        // Its active may be back from another backup, and believe an old decline: what is so is told again.
                        self.table.set_declined(slot, true);
                        self.commit(Commit::Write { slot, generation: line.generation() });
                    }
                    return Applied;
                }
                self.overwrite(slot, stamp, previous, (&connection.state, &connection.extra), groups::ALL);
            }
            // Another member is the active now: the one that took over, or that claimed. Of two that claimed at once the other one counts
            // on this copy as well, and is told; with equal stamps it has the copy.
            Kind::Backup
                if here
                    && (stamp > line.stamp() || stamp == line.stamp() && !self.is_of_another(slot, own)) =>
            {
                let former = line.peer();
                if self.is_of_another(slot, own) && !self.release(Rank::Consequence, former, stamp) {
                    return Busy;
                }
                self.table.set_declined(slot, false); // The new one was not told.
                self.end_copy(slot);
                self.table.update(slot, |line| line.set_peer(own));
                self.begin_copy(slot);
                self.overwrite(slot, stamp, previous, (&connection.state, &connection.extra), groups::ALL);
            }
            Kind::Active if here => {
                let presumed_from = self.is_presumed(slot) && self.table.former(slot) == own;
                let outranks = stamp > line.stamp()
                    || stamp == line.stamp() && (presumed_from || own.member() > self.config.member);
                if !outranks {
                    return if self.tell_outranked(now, slot, stamp, own) {
                        Refused(Reason::Superseded)
                    } else {
                        Busy
                    };
                }
                if !self.requests.has_room(Rank::Consequence) {
                    return Busy;
                }
                self.step_down(slot, own, stamp);
                // Who has it is settled: its next packet here is a claim like any other.
                self.contests.decide(slot, line.generation());
                self.table.update(slot, |line| {
                    line.set_kind(Kind::Backup);
                    line.set_peer(own);
                    line.set_claimed(false);
                    line.set_groups(0);
                });
                self.table.set_former(slot, Coordinate::NOWHERE);
                // It may believe what was said before the roles changed: a commit that succeeds is told.
                self.table.set_declined(slot, true);
                self.begin_copy(slot);
                self.overwrite(slot, stamp, previous, (&connection.state, &connection.extra), groups::ALL);
            }
            Kind::Backup if here && stamp == line.stamp() => {
                // Nothing that follows would tell the one that comes second: nobody else knows of both.
                if !self.release(Rank::Consequence, own, stamp.changed()) {
                    return Busy;
                }
                return Refused(Reason::Superseded);
            }
            Kind::Backup | Kind::Active if here => return Refused(Reason::Superseded),
            // Another connection's place by now, or nobody's; or closed here while it was claimed there.
            _ => return Refused(Reason::NotLeased),
        }
        self.counters.count(Counter::DeltasApplied);
        self.commit(Commit::Write { slot, generation: line.generation() });
        Applied
    }

    /// Whether the active of the copy in this slot lives, and is at another member than this one.
    fn is_of_another(&self, slot: u32, active: Coordinate) -> bool {
        let member = self.table.line(slot).peer().member();
        member != active.member() && self.is_up(member)
    }

    /// A copy is about to come in. If this member holds the same connection as its own, the newer
    /// state stays: (epoch, version, member). Tells whether it held one: then its own source sees
    /// the connection as well, and a close by the other member does not end it here.
    fn give_way(
        &mut self,
        now: Time,
        connection: &Connection,
        stamp: Stamp,
        own: Coordinate,
        previous: Option<Coordinate>,
    ) -> Result<bool, Verdict> {
        let Some(slot) = self.table.find_original(&connection.original) else { return Ok(false) };
        let line = self.table.line(slot);
        if line.kind() == Kind::Backup && self.is_up(line.peer().member()) {
            let is_kept = previous == Some(self.coordinate(slot));
            if line.peer() == own && stamp > line.stamp() && !is_kept {
                // Its active took this member for silent, turned away, and is back with a newer state.
                self.end_missing(slot);
                self.end_copy(slot);
                self.table.forget(slot);
                self.table.recycle(slot);
            } else if line.peer().member() != own.member()
                && self.table.tuples(slot) == (connection.original, connection.reply)
            {
                // Two members carry on one connection, and may not know of each other. Of two that know as much one may
                // have taken over from the other, and it is not for the third to say which.
                if stamp < line.stamp() {
                    self.counters.count(Counter::Conflicts);
                    return Err(Refused(Reason::Superseded));
                }
                if stamp > line.stamp() && !self.release(Rank::Consequence, line.peer(), stamp) {
                    return Err(Busy);
                }
            }
            return Ok(false); // The close of the older one is on its way.
        }
        let is_same = self.table.tuples(slot) == (connection.original, connection.reply);
        let rival = Rival { stamp, place: if is_same { own } else { Coordinate::NOWHERE } };
        if line.kind() == Kind::Held && line.is_unseen() && is_same {
            if self.is_looked_for(now, slot, rival) {
                self.counters.count(Counter::Conflicts);
                return Err(Refused(Reason::Superseded));
            }
            // Whether its packets pass here was just to be found out: now it has an active again.
            self.table.forget(slot);
            self.table.recycle(slot);
            return Ok(false);
        }
        if line.kind() == Kind::Held && !is_same {
            // Another life of the tuple. The one that comes in had outlived its hold before it was sent: it is the elder.
            self.counters.count(Counter::Conflicts);
            return Err(Refused(Reason::Superseded));
        }
        // Taken over without any traffic seen here since: then this member has not witnessed it.
        // (Of a copy what is remembered is its previous backup.)
        let presumed = line.kind() == Kind::Active && self.is_presumed(slot);
        let presumed_from_it = presumed && self.table.former(slot) == own;
        // What began here is younger than anything that outlived its hold before it was sent; and stamps say nothing of two connections.
        let knows_as_much = line.kind() == Kind::Held
            || !is_same
            || stamp.epoch == line.stamp().epoch
            || self.contests.has_rival(slot, line.generation());
        if knows_as_much && self.contest(now, slot, Some(rival)) {
            self.counters.count(Counter::Conflicts);
            return Err(Refused(Reason::Superseded));
        }
        if !presumed_from_it && (stamp, own.member()) < (line.stamp(), self.config.member) {
            if is_same && !self.tell_outranked(now, slot, stamp, own) {
                return Err(Busy);
            }
            self.counters.count(Counter::Conflicts);
            return Err(Refused(Reason::Superseded));
        }
        if !self.requests.has_room(Rank::Consequence) {
            return Err(Busy);
        }
        self.counters.count(Counter::Conflicts);
        if line.kind() == Kind::Backup {
            // Its active is gone, and the sender took over with the same state or a newer one.
            self.end_missing(slot);
            self.end_copy(slot);
            self.leave_behind(line.peer().member());
        } else {
            self.step_down(slot, own, stamp);
        }
        self.table.forget(slot);
        self.table.recycle(slot);
        Ok(is_same && !presumed && line.kind() != Kind::Backup)
    }

    /// Traffic showed up at the active of this copy. Another member that carries on the same connection, and has its copy here
    /// as well, is told. `false` if there is no room for a request.
    fn outrank(&mut self, slot: u32, stamp: Stamp) -> bool {
        let (original, reply) = self.table.tuples(slot);
        let active = self.table.line(slot).peer().member();
        let rivals = |other: u32| {
            let line = self.table.line(other);
            line.kind() == Kind::Backup
                && line.peer().member() != active
                && self.is_up(line.peer().member())
                && line.stamp() < stamp
                && self.table.tuples(other) == (original, reply)
        };
        let Some(other) = self.table.index.find(&original, rivals) else { return true };
        let told = self.release(Rank::Consequence, self.table.line(other).peer(), stamp);
        self.counters.add(Counter::Conflicts, told as u64);
        told
    }

    /// An active connection here gives way to `winner`: its backup is released, it stands in no list.
    fn step_down(&mut self, slot: u32, winner: Coordinate, stamp: Stamp) {
        self.counters.count(Counter::ClaimsLost);
        self.commits.may_hold_entries();
        self.end_move(slot);
        let line = self.table.line(slot);
        let peer = line.peer();
        // Where it was taken over from stays until the slot is something else: what ends it may come once more.
        self.unassign(slot);
        if peer.is_somewhere() && peer != winner && !is(Mutation::LoserKeepsBackup) {
            let taken = self.release(Rank::Consequence, peer, stamp);
            assert!(taken, "the caller made sure of room");
        }
    }

    /// The active in this slot refuses a claim that does not outrank it. Who sent it is told so, unless it is the backup by now, perhaps in another slot,
    /// or the previous one: nothing else would tell it. Of an earlier epoch it may be another connection's: traffic here is to decide first, if there is
    /// a kernel to ask. Of two within one epoch that know a different number of changes the next claims decide. `false`: there is no room for a request.
    fn tell_outranked(&mut self, now: Time, slot: u32, stamp: Stamp, own: Coordinate) -> bool {
        let line = self.table.line(slot);
        let hears_otherwise = line.kind() != Kind::Active
            || line.peer().member() == own.member()
            || self.table.former(slot) == own
            || self.is_presumed(slot);
        let is_tie = stamp == line.stamp();
        if hears_otherwise || !is_tie && stamp.epoch == line.stamp().epoch {
            return true;
        }
        if is_tie {
            return self.release(Rank::Consequence, own, stamp.changed());
        }
        self.contest(now, slot, Some(Rival { stamp, place: own }))
            || self.release(Rank::Consequence, own, line.stamp())
    }

    fn overwrite(
        &mut self,
        slot: u32,
        stamp: Stamp,
        previous: Option<Coordinate>,
        (state, extra): (&State, &Extra),
        mask: u8,
    ) {
        if mask & groups::EXTRA != 0 {
            self.table.set_extra(slot, extra);
        }
        self.table.set_former(slot, previous.unwrap_or(Coordinate::NOWHERE));
        self.table.update(slot, |line| {
            let old = line.state();
            let mut new = if mask & groups::STATE != 0 { *state } else { old };
            new.timeout_s = if mask & groups::TIMEOUT != 0 { state.timeout_s } else { old.timeout_s };
            new.mark = if mask & groups::MARK != 0 && !is(Mutation::UpdateIncomplete) {
                state.mark
            } else {
                old.mark
            };
            line.set_state(&new);
            line.set_stamp(stamp);
        });
        self.account_held(slot);
    }

    fn apply_update(
        &mut self,
        stream: usize,
        target: Place,
        stamp: Stamp,
        mask: u8,
        previous: Option<Coordinate>,
        value: (&State, &Extra),
    ) -> Verdict {
        let Some(line) = self.target(target) else { return Refused(Reason::NotHere) };
        if target.generation != line.generation() && !is(Mutation::NoGenerationCheck) {
            return Refused(Reason::NotHere);
        }
        self.epoch = self.epoch.max(stamp.epoch);
        match line.kind() {
            Kind::Backup if self.stream_of(line.peer()) == stream => {
                if stamp <= line.stamp() && !is(Mutation::OlderWins) {
                    self.counters.count(Counter::DeltasOld);
                    return Applied;
                }
                if stamp.epoch > line.stamp().epoch && !self.outrank(target.slot, stamp) {
                    return Busy;
                }
                self.overwrite(target.slot, stamp, previous, value, mask);
                self.counters.count(Counter::DeltasApplied);
                self.commit(Commit::Write { slot: target.slot, generation: target.generation });
                Applied
            }
            Kind::Active if stamp < line.stamp() && self.tells(target.slot, stream) => {
                // The sender does not know yet that its connection was claimed here.
                self.counters.count(Counter::DeltasOld);
                Applied
            }
            _ => Refused(Reason::NotHere),
        }
    }

    /// Whether the sender of this stream is still to hear that the connection in this slot is active here. If it refused to,
    /// it must not believe that its copy is here.
    fn tells(&self, slot: u32, stream: usize) -> bool {
        let peer = self.table.line(slot).peer();
        peer.is_somewhere() && self.stream_of(peer) == stream || self.table.former(slot).is_somewhere()
    }

    /// The slot that a close or a release is for, if it still is in the life that it names. If not, what
    /// should end has ended.
    fn ending(&self, target: Place) -> Option<Line> {
        let line = self.target(target);
        let counter = if line.is_none() { Counter::RejectTarget } else { Counter::DeltasClosed };
        let line =
            line.filter(|line| line.generation() == target.generation || is(Mutation::NoGenerationCheck));
        if line.is_none() {
            self.counters.count(counter);
        }
        line
    }

    /// Whether this active connection was only presumed dead at the sender: no traffic was seen here since.
    fn is_presumed_from(&self, slot: u32, stream: usize) -> bool {
        self.is_presumed(slot) && self.stream_of(self.table.former(slot)) == stream
    }

    /// Whether a close or release with this stamp comes from who claimed the connection in this slot, which is active here: above what is here, and
    /// after it, or at the same time. (An equal stamp may be one's own that comes back.)
    fn is_claimed_above(&self, slot: u32, stamp: Stamp) -> bool {
        let own = self.table.line(slot).stamp();
        stamp.epoch > own.epoch || stamp > own && !self.is_presumed(slot)
    }

    fn apply_close(&mut self, now: Time, stream: usize, target: Place, stamp: Stamp, seen: bool) -> Verdict {
        let Some(line) = self.ending(target) else { return Applied };
        let from_pair = line.peer().is_somewhere() && self.stream_of(line.peer()) == stream;
        // Whether what is left is agreed to be the sender's lease.
        let mut is_lease = true;
        match line.kind() {
            // The new never came and never will: its place remembers that.
            Kind::Leased if self.is_leased_to(&line, stream) => self.table.update(target.slot, |line| {
                let next = target.generation.next();
                line.set_generation(if is(Mutation::NoTombstone) { target.generation } else { next });
            }),
            Kind::Backup if from_pair => {
                let rest = match (seen || is(Mutation::EndsUnasked)) && !line.is_claimed() {
                    true => Rest::Nothing,
                    false => Rest::Perhaps(stamp, line.is_claimed(), Doubt::Closed),
                };
                self.drop_copy(now, target.slot, stream, rest);
            }
            Kind::Active if self.is_claimed_above(target.slot, stamp) && !is(Mutation::EarlyCloseIgnored) => {
                // Claimed and closed there. This member may have let go of the pair before it heard of that,
                // or have found another slot for the copy.
                if !self.requests.has_room(Rank::Consequence) {
                    return Busy;
                }
                self.drop_active(now, target.slot, stream, stamp, Doubt::Closed);
                is_lease = from_pair;
            }
            Kind::Active
                if self.is_presumed_from(target.slot, stream) && stamp.epoch >= line.stamp().epoch =>
            {
                // Presumed while the former active lived: closed means closed.
                if !self.requests.has_room(Rank::Consequence) {
                    return Busy;
                }
                self.step_down(target.slot, Coordinate::NOWHERE, stamp);
                let original = self.drop_to_lease(target.slot, stream);
                self.delete_entry(&original);
            }
            Kind::Backup | Kind::Active => {
                // Its sender takes the slot's next life for its own when this is acknowledged.
                self.table.update(target.slot, |line| line.set_spent(true));
                self.counters.count(Counter::DeltasOld);
                return Applied;
            }
            Kind::Closing => return Applied,
            Kind::Free | Kind::Leased | Kind::Held => {
                self.counters.count(Counter::RejectTarget);
                return Applied;
            }
        }
        if !is_lease || line.is_spent() {
            self.table.recycle(target.slot);
        }
        self.counters.count(Counter::DeltasApplied);
        Applied
    }

    fn apply_release(&mut self, now: Time, stream: usize, target: Place, stamp: Stamp) -> Verdict {
        let Some(line) = self.ending(target) else { return Applied };
        let member = stream_member(stream);
        match line.kind() {
            Kind::Leased if self.is_leased_to(&line, stream) => {
                self.table.recycle(target.slot);
                self.counters.count(Counter::DeltasApplied);
                return Applied;
            }
            // From its active, or, if that is gone, from whoever took over.
            Kind::Backup
                if (line.peer().member() == member || !self.is_up(line.peer().member()))
                    && stamp >= line.stamp() =>
            {
                self.drop_copy(now, target.slot, stream, Rest::Perhaps(stamp, false, Doubt::Taken));
            }
            Kind::Active
                if self.is_claimed_above(target.slot, stamp) && !is(Mutation::EarlyReleaseIgnored)
                    || self.is_presumed_from(target.slot, stream) && stamp.epoch == line.stamp().epoch =>
            {
                // Presumed while the former active lived: its answer wins. Or claimed there, and moved on
                // to another backup, before the claim arrived here: late, it must not find its place.
                if !self.requests.has_room(Rank::Consequence) {
                    return Busy;
                }
                self.drop_active(now, target.slot, stream, stamp, Doubt::Taken);
            }
            Kind::Active if self.is_presumed(target.slot) && stamp > line.stamp() => {
                // Only presumed, and somebody else carries it on who knows it better.
                if !self.requests.has_room(Rank::Consequence) {
                    return Busy;
                }
                let backup = line.peer();
                self.unassign(target.slot);
                if backup.is_somewhere() {
                    let taken = self.release(Rank::Consequence, backup, stamp);
                    assert!(taken, "there was room for a request");
                }
                self.drop_presumed(target.slot);
                self.counters.count(Counter::DeltasApplied);
                return Applied;
            }
            _ => {
                self.counters.count(Counter::DeltasOld);
                return Applied;
            }
        }
        // Unlike a close: a release may be ignored, or come twice, and its sender does not learn which.
        // So the slot is nobody's lease afterwards, and the name that one would have had never fits.
        self.table.recycle(target.slot);
        self.counters.count(Counter::DeltasApplied);
        Applied
    }

    /// The copy in this slot is none any more. What its kernel entry shows of packets is asked first, where there is an entry.
    fn drop_copy(&mut self, now: Time, slot: u32, stream: usize, rest: Rest) {
        let is_eager = self.config.commit == CommitMode::Eager;
        let is_missing = self.table.on(slot) == On::Missing;
        let written = if is_eager && !is_missing { self.table.written(slot) } else { Written::No };
        self.end_missing(slot);
        self.end_copy(slot);
        if let Rest::Perhaps(stamp, is_witnessed, doubt) = rest {
            self.keep_rest(now, slot, written, (stamp, is_witnessed, doubt));
        }
        let original = self.drop_to_lease(slot, stream);
        match is_eager && is_missing && self.table.find_original(&original).is_none() {
            true => self.commit(Commit::DeleteUntouched { original }),
            false => self.delete_entry(&original),
        }
    }

    /// What is left of the copy in this slot, which goes, is held in another one while it is found out whether its packets pass here.
    fn keep_rest(
        &mut self,
        now: Time,
        slot: u32,
        written: Written,
        (stamp, is_witnessed, doubt): (Stamp, bool, Doubt),
    ) {
        let connection = self.table.connection(slot);
        if self.lives_besides(slot, &connection.original) {
            return; // The entry is that one's by now.
        }
        match (written, doubt) {
            (Written::No, _) if is_witnessed => self.open(now, &connection, Some(stamp)),
            (Written::No, _) => {}
            // It lives on elsewhere: what may be the packets of before does not outdo that.
            (Written::AsItWas, Doubt::Taken) => self.doubt(now, &connection, stamp, doubt),
            (Written::AsItWas | Written::Yes, _) => self.ask_for_packets(&connection, stamp),
        }
    }

    /// The active in this slot gives way to a claim elsewhere; if its traffic was here, the kernel is asked whether it still is.
    fn drop_active(&mut self, now: Time, slot: u32, stream: usize, stamp: Stamp, doubt: Doubt) {
        let (is_ours, connection) = (!self.is_presumed(slot), self.table.connection(slot));
        let line = self.table.line(slot);
        // The backup's place may be the very claim that this gives way to: what outranks this active must not come back there and outrank that.
        let is_there = line.peer().is_somewhere() && self.stream_of(line.peer()) == stream;
        self.step_down(slot, Coordinate::NOWHERE, if is_there { line.stamp() } else { stamp });
        if is_ours && !self.lives_besides(slot, &connection.original) {
            self.doubt(now, &connection, stamp, doubt);
        }
        let original = self.drop_to_lease(slot, stream);
        self.delete_entry(&original);
    }

    /// The connection in this slot is no more; one life later the slot belongs to the sender's lease. Tells its original tuple: what becomes of the
    /// kernel's entry is the caller's.
    fn drop_to_lease(&mut self, slot: u32, stream: usize) -> Tuple {
        let original = self.table.tuples(slot).0;
        self.table.forget(slot);
        let session = self.durable(stream).peer_session();
        let lessee = Coordinate::new(stream_member(stream), stream_shard(stream), 0, Default::default());
        self.table.update(slot, |line| {
            line.set_generation(line.generation().next());
            line.set_kind(Kind::Leased);
            line.set_peer(lessee);
            line.set_last(Seq::NONE);
            line.set_session(session);
            line.set_claimed(false);
        });
        self.table.set_former(slot, Coordinate::NOWHERE);
        self.table.set_extra(slot, &Extra::NONE);
        original
    }

    /// The kernel is to forget a connection. Another one may have the same tuple by now: then its entry stays.
    pub(super) fn delete_entry(&mut self, original: &Tuple) {
        match self.table.find_original(original) {
            None => self.commit(Commit::Delete { original: *original }),
            Some(_) => self.write_besides(original),
        }
    }

    /// The entry of a connection that is none here any more is that of another copy with this tuple, if there is one.
    fn write_besides(&mut self, original: &Tuple) {
        if let Some(slot) =
            self.table.find_original(original).filter(|slot| self.table.kind(*slot) == Kind::Backup)
        {
            let generation = self.table.line(slot).generation();
            self.commit(Commit::Write { slot, generation });
        }
    }

    /// A connection without a backup that is only presumed to be ours gives way to whoever else carries it on. Its kernel
    /// entry stays: packets may pass it, of which no event tells.
    pub(super) fn drop_presumed(&mut self, slot: u32) {
        self.counters.count(Counter::ClaimsLost);
        self.end_move(slot);
        let original = self.table.tuples(slot).0;
        self.table.forget(slot);
        self.table.recycle(slot);
        self.write_besides(&original);
    }

    fn apply_offer(
        &mut self,
        now: Time,
        target: Place,
        stamp: Stamp,
        own: Coordinate,
        claimed: bool,
    ) -> Verdict {
        // A claimed offer is settled now: its sender takes the ack for the answer. Any other is made again after a
        // while, so it need not be kept: were the floor to wait for an answer here and there at once, it
        // would wait for ever.
        if claimed && !self.requests.has_room(Rank::Consequence) {
            return Busy;
        }
        if !claimed && !self.requests.has_room(Rank::Answer) {
            self.counters.count(Counter::OffersPutOff);
            return Applied;
        }
        if is(Mutation::OffersUnanswered) {
            return Applied;
        }
        let line = self.target(target).filter(|line| line.generation() == target.generation);
        match line {
            Some(line) if line.kind() == Kind::Active && claimed && stamp.epoch > line.stamp().epoch => {
                self.step_down(target.slot, own, stamp);
                self.table.forget(target.slot);
                self.table.recycle(target.slot);
            }
            Some(line) if line.kind() == Kind::Active && line.peer() == own => {
                let session = self.durable(self.stream_of(own)).peer_session();
                self.table.update(target.slot, |line| line.set_session(session));
                self.mark_dirty(now, target.slot, groups::ALL);
            }
            // Its previous backup: released once the new one has acknowledged.
            Some(_) if self.table.is_moving(target.slot) && self.table.former(target.slot) == own => {}
            Some(line) if line.kind().is_connection() => {
                let _ = self.release(Rank::Answer, own, stamp.max(line.stamp()));
            }
            _ if claimed => {} // Closed here, but traffic went on there.
            _ => {
                let _ = self.release(Rank::Answer, own, stamp);
            }
        }
        Applied
    }

    fn take_grant(&mut self, now: Time, stream: usize, places: Places<'_>) {
        if self.credit.on_grant(now, stream, places.iter()) {
            self.wake(stream);
        }
        self.retry_at = now;
    }

    /// Slots leased to the stream that it does not need. Two lives later they are free: a new for one that is on its
    /// way nevertheless misses. What is counted as granted stays, at both ends alike.
    fn take_back(&mut self, stream: usize, places: Places<'_>) {
        for place in places.iter() {
            let leased = self.target(place).is_some_and(|line| {
                line.generation() == place.generation && self.is_leased_to(&line, stream)
            });
            if leased {
                self.table.recycle(place.slot);
                self.counters.count(Counter::LeasesGivenBack);
            }
        }
    }
}

#[cfg(test)]
#[path = "receive_tests.rs"]
mod tests;
