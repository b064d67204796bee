//! Moves: a connection changes its backup, make before break; and what becomes of control requests.
//!
//! Whoever is to be told something that belongs to no delta is told so by a
//! [request](super::requests). What a request means for the connection that it is about is decided
//! here: when a release may leave, what an offer still asks, and what follows when either has
//! arrived.

use super::contests::Doubt;
use super::delta::DeltaResult::{self, Applied, Busy};
use super::history::Content;
use super::mutation::{Mutation, is};
use super::replica::Replica;
use super::requests::{Delivery, Rank, Request, Task};
use crate::ccp::message::{Message, Place};
use crate::conn::slot::groups;
use crate::conn::table::On;
use crate::conn::{Coordinate, Kind, MemberId, Stamp};
use crate::counters::Counter;
use crate::seq::Seq;
use crate::time::Time;

impl Replica<'_> {
    /// Begins a request that is to be sent at once. `false` if there is no room for another.
    pub(super) fn request(&mut self, rank: Rank, task: Task, target: Coordinate) -> bool {
        let has_begun = self.requests.begin(rank, task, target, true);
        if has_begun {
            self.enqueue(self.stream_of(target));
        }
        has_begun
    }

    /// Tells a member to let its copy go. `false` if there is no room for another request.
    pub(super) fn release(&mut self, rank: Rank, target: Coordinate, stamp: Stamp) -> bool {
        if !self.may_return(target.member()) {
            return true; // Its table is gone, or asks by itself when it returns.
        }
        self.request(rank, Task::Release { of: None, stamp }, target)
    }

    /// Asks a former active whether our copy still stands. `false` if there is no room.
    pub(super) fn offer(&mut self, target: Coordinate, own: Place) -> bool {
        let claimed = self.is_claimed_here(own.slot);
        self.request(Rank::Question, Task::Offer { own, claimed }, target)
    }

    /// Whether this member is the active because of traffic here. A copy that its own source saw as
    /// well is still its active's.
    fn is_claimed_here(&self, slot: u32) -> bool {
        let line = self.ledger.line(slot);
        line.kind() == Kind::Active && line.is_claimed()
    }

    /// Gives the connection a new backup and keeps the previous one until the new one has
    /// acknowledged.
    pub(super) fn move_backup(&mut self, now: Time, slot: u32, backup: Coordinate) -> bool {
        let line = self.ledger.line(slot);
        let (previous, generation) = (line.peer(), line.generation());
        assert!(previous.is_somewhere() && !self.ledger.is_moving(slot));
        let task = Task::Release { of: Some(Place { slot, generation }), stamp: line.stamp() };
        if !self.requests.begin(Rank::Question, task, previous, false) {
            return false;
        }
        self.ledger.unassign(slot);
        // A promoted connection remembers its former active there instead, and does not name its
        // previous backup to the new one.
        if !self.ledger.former(slot).is_somewhere() {
            self.ledger.begin_move(slot, previous);
        }
        self.assign(now, slot, backup);
        true
    }

    /// The new backup of a connection that is changing it is none, and nobody else is to be had:
    /// its previous one, which was not released yet, goes on. `false` if there is none.
    pub(super) fn go_back(&mut self, now: Time, slot: u32) -> bool {
        if !self.ledger.former(slot).is_somewhere() {
            return false; // As of nearly all.
        }
        let own = Place { slot, generation: self.ledger.line(slot).generation() };
        let Some((id, previous)) = self.requests.waiting_for(own) else { return false };
        if !self.is_up(previous.member()) {
            return false;
        }
        self.requests.remove(id);
        self.end_move(slot);
        self.assign(now, slot, previous);
        true
    }

    /// The connection goes while it changes its backup. The release of the previous one goes its
    /// own way.
    pub(super) fn end_move(&mut self, slot: u32) {
        if self.ledger.is_moving(slot) {
            self.ledger.end_move(slot);
        }
    }

    /// A connection of memory taken up again was changing its backup: the release of the previous
    /// one waits for the new one, as before.
    pub(super) fn resume_move(&mut self, slot: u32) {
        let (line, previous) = (self.ledger.line(slot), self.ledger.former(slot));
        let of = Some(Place { slot, generation: line.generation() });
        let task = Task::Release { of, stamp: line.stamp() };
        if !previous.is_plausible()
            || !self.requests.begin(Rank::Consequence, task, previous, false)
        {
            self.end_move(slot);
        }
    }

    /// What this member was to be told is about a table that it may not have any more.
    pub(super) fn drop_requests(&mut self, member: MemberId) {
        while let Some(id) = self.requests.first_for(member) {
            self.end_request(id, false);
        }
    }

    /// Moves on what can move on.
    pub(super) fn tick_requests(&mut self) {
        for id in self.requests.ids() {
            let Some(request) = self.requests.get(id) else { continue };
            if !self.may_return(request.target.member()) {
                self.end_request(id, false);
                continue;
            }
            let stream = request.stream();
            match request.delivery {
                Delivery::AwaitBackup => {
                    let own = request
                        .moved()
                        .expect("only a release of a previous backup waits for a new one");
                    if self.is_moved(own) || is(Mutation::EarlyRelease) {
                        self.requests.set_due(id);
                        self.enqueue(stream);
                    }
                }
                Delivery::Sent(seq) if seq.is_passed_by(self.durable(stream).floor()) => {
                    self.end_request(id, true);
                }
                Delivery::Due | Delivery::Sent(_) => {}
            }
        }
    }

    /// Whether the connection of ours that was here has its new backup, or has ended: its previous
    /// one can go.
    fn is_moved(&self, own: Place) -> bool {
        let line = self.ledger.line(own.slot);
        let has_ended = line.generation() != own.generation || line.kind() != Kind::Active;
        has_ended
            || self.ledger.on(own.slot) == On::None
                && line.last().is_passed_by(self.durable(self.stream_of(line.peer())).floor())
    }

    fn end_request(&mut self, id: u32, has_arrived: bool) {
        let request = self.requests.remove(id);
        match request.task {
            Task::Release { of: None, .. } => {}
            Task::Decline { own, .. } => {
                // Its active may believe what was said before: when it is back, and the copy is
                // written again, it is told.
                let line = self.ledger.line(own.slot);
                if !has_arrived
                    && line.generation() == own.generation
                    && line.kind() == Kind::Backup
                {
                    self.ledger.set_success_due(own.slot, true);
                }
            }
            Task::Release { of: Some(own), .. } => {
                if self.ledger.line(own.slot).generation() == own.generation {
                    self.end_move(own.slot);
                }
            }
            Task::Offer { own, claimed } => {
                let line = self.ledger.line(own.slot);
                let still = line.generation() == own.generation
                    && line.is_claimed()
                    && self.ledger.former(own.slot) == request.target
                    && !self.ledger.is_moving(own.slot);
                if has_arrived && still && claimed {
                    // Outranked, and it knows.
                    self.ledger.set_former(own.slot, Coordinate::NOWHERE);
                } else if has_arrived && still {
                    // Traffic came after the offer left: it has to know that as well.
                    let again = Task::Offer { own, claimed: true };
                    let taken = self.request(Rank::Consequence, again, request.target);
                    assert!(taken, "the request that just ended made room");
                }
            }
        }
    }

    /// The next request of this stream, which leaves in datagram `seq`: its message, and what the
    /// manifest says of it.
    pub(super) fn next_request(
        &mut self,
        stream: usize,
        seq: Seq,
    ) -> Option<(Message<'static>, Content)> {
        while let Some((id, request)) = self.requests.first_due(stream) {
            if let Some((task, message)) = self.message_of(&request) {
                self.requests.sent(id, task, seq);
                return Some((message, Content::Request(id)));
            }
            self.requests.remove(id); // It has lost its object.
        }
        None
    }

    /// What a request says as things are now, and the task that it is then.
    fn message_of(&self, request: &Request) -> Option<(Task, Message<'static>)> {
        let target = Place::of(request.target);
        let message = match request.task {
            Task::Release { stamp, .. } => Message::Release { target, stamp },
            Task::Decline { own, number, fault } => Message::Decline { target, own, number, fault },
            Task::Offer { own, .. } => {
                let line = self.ledger.line(own.slot);
                // Who has become a copy for somebody else meanwhile does not ask a former active
                // any more: the answer would take away what another one counts on.
                let asks = match line.kind() {
                    Kind::Backup => line.peer() == request.target,
                    Kind::Active => self.ledger.former(own.slot) == request.target,
                    _ => false,
                };
                if line.generation() != own.generation || !asks {
                    return None;
                }
                let claimed = self.is_claimed_here(own.slot);
                let message = Message::Offer { target, own, stamp: line.stamp(), claimed };
                return Some((Task::Offer { own, claimed }, message));
            }
        };
        Some((request.task, message))
    }

    /// A member asks whether its copy of one of our connections still stands.
    pub(super) fn apply_offer(
        &mut self,
        now: Time,
        target: Place,
        stamp: Stamp,
        copy: Coordinate,
        claimed: bool,
    ) -> DeltaResult {
        // A claimed offer is decided now: its sender takes the ack for the answer. Any other is
        // made again after a while, so it need not be kept: were the floor to wait for an answer
        // here and there at once, it would wait for ever.
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
        let line = self.line_at(target).filter(|line| line.generation() == target.generation);
        match line {
            Some(line)
                if line.kind() == Kind::Active && claimed && stamp.epoch > line.stamp().epoch =>
            {
                let connection = self.ledger.connection(target.slot);
                self.demote(target.slot, copy, stamp);
                self.ledger.clear(target.slot);
                // As after a release: its packets may have come back since, without an event.
                if self.ledger.find_original(&connection.original).is_none() {
                    self.doubt(now, &connection, stamp, Doubt::Taken);
                }
            }
            Some(line) if line.kind() == Kind::Active && line.peer() == copy => {
                let session = self.durable(self.stream_of(copy)).peer_session();
                self.ledger.amend(target.slot, |line| line.set_session(session));
                self.mark_dirty(now, target.slot, groups::ALL);
            }
            // Its previous backup: released once the new one has acknowledged.
            Some(_)
                if self.ledger.is_moving(target.slot)
                    && self.ledger.former(target.slot) == copy => {}
            Some(line) if line.kind().is_connection() => {
                let _ = self.release(Rank::Answer, copy, stamp.max(line.stamp()));
            }
            _ if claimed => {} // Closed here, but traffic went on there.
            _ => {
                let _ = self.release(Rank::Answer, copy, stamp);
            }
        }
        Applied
    }
}
