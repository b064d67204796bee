//! Arrivals: news and updates become copies; whoever must gives way.
//!
//! What a receiver does in each case is the table of docs/PROTOCOL.md. Where two members both have
//! a connection, it is [`super::contest`] that asks who sees its packets.

use super::contests::Rival;
use super::delta::DeltaResult::{self, Applied, Busy, Refused};
use super::delta::New;
use super::mutation::{Mutation, is};
use super::replica::Replica;
use super::requests::Rank;
use crate::ccp::message::{Place, Reason};
use crate::conn::slot::groups;
use crate::conn::table::Written;
use crate::conn::{Connection, Coordinate, Extra, Kind, Stamp, State};
use crate::counters::Counter;
use crate::source::Commit;
use crate::time::Time;

/// What became of the slot that a new is for.
enum Outcome {
    /// It is the copy of this connection, in this state: it is to be written.
    Changed,
    /// Nothing is to be written; the delta's result.
    Stays(DeltaResult),
}

use Outcome::{Changed, Stays};

impl Replica<'_> {
    /// A connection of the sender's, for a slot that was leased to it, or for the copy in it.
    pub(super) fn apply_new(&mut self, now: Time, stream: usize, new: &New<'_>) -> DeltaResult {
        let New { target, stamp, active, connection, .. } = *new;
        let Some(line) = self.line_at(target) else { return Refused(Reason::NotLeased) };
        if target.generation != line.generation() && !is(Mutation::NoGenerationCheck) {
            // Closed before, or never ours to fill: the sender knows which.
            return Refused(Reason::NotLeased);
        }
        let slot = target.slot;
        self.ledger.raise_epoch(stamp.epoch);
        let here = line.kind().is_connection()
            && self.ledger.tuples(slot) == (connection.original, connection.reply);
        let result = match line.kind() {
            Kind::Leased if self.is_leased_to(&line, stream) => self.fill_lease(now, new),
            Kind::Backup if here && line.peer() == active => self.renew_copy(new),
            // Another member is the active now: it took over, or it claimed. If the copy's active
            // lives, both count on this copy: the higher stamp has it and the other member is told;
            // with equal stamps it stays with the one that has it.
            Kind::Backup
                if here
                    && (stamp > line.stamp()
                        || stamp == line.stamp() && !self.is_of_another(slot, active)) =>
            {
                self.change_active(new)
            }
            Kind::Active if here => self.give_way_to_pair(now, new),
            Kind::Backup if here && stamp == line.stamp() => {
                // The one that comes second is told here: no other member knows of both, and
                // neither of the two hears of the other.
                if !self.release(Rank::Consequence, active, stamp.changed()) {
                    return Busy;
                }
                return Refused(Reason::Superseded);
            }
            Kind::Backup if here => return Refused(Reason::Superseded),
            // Another connection's place by now, or nobody's; or closed here while it was claimed
            // there.
            _ => return Refused(Reason::NotLeased),
        };
        match result {
            Changed => {
                self.counters.count(Counter::DeltasApplied);
                self.ask_commit(Commit::Write { slot, generation: line.generation() });
                Applied
            }
            Stays(result) => result,
        }
    }

    /// An empty slot that was leased to the sender becomes its copy.
    fn fill_lease(&mut self, now: Time, new: &New<'_>) -> Outcome {
        let New { target, stamp, active, previous, connection } = *new;
        let beside = self.ledger.find_original(&connection.original);
        // The kernel has one entry for both copies: what may have passed it, may have been another
        // connection's for this one as well.
        let is_doubted = beside.is_some_and(|beside| {
            self.ledger.kind(beside) == Kind::Backup
                && self.ledger.written(beside) == Written::Resumed
        });
        let given_way = beside.map_or(Ok(false), |beside| {
            self.give_way(now, beside, connection, stamp, active, previous)
        });
        let witnessed = match given_way {
            Ok(witnessed) => witnessed,
            Err(result) => {
                if matches!(result, Refused(_)) {
                    // A repeated datagram must not be taken once the reason is gone: by then
                    // the connection has its copy elsewhere.
                    self.revoke(target);
                }
                return Stays(result);
            }
        };
        let previous = previous.unwrap_or(Coordinate::NOWHERE);
        self.ledger.fill_copy(target.slot, (active, stamp), witnessed, previous, connection);
        self.begin_copy(target.slot);
        if is_doubted {
            self.ledger.set_written(target.slot, Written::Resumed);
        }
        Changed
    }

    /// The copy in this slot is sent whole once more.
    fn renew_copy(&mut self, new: &New<'_>) -> Outcome {
        let New { target: Place { slot, generation }, stamp, .. } = *new;
        let known = self.ledger.line(slot).stamp();
        if stamp <= known && !is(Mutation::OlderWins) {
            self.counters.count(Counter::DeltasOld);
            if stamp == known {
                // Its active may be back from another backup, and believe an old decline: what is
                // so is told again.
                self.ledger.set_success_due(slot, true);
                self.ask_commit(Commit::Write { slot, generation });
            }
            return Stays(Applied);
        }
        self.overwrite_whole(new);
        Changed
    }

    /// The copy in this slot has another active from now on. Who had it before is told, if that
    /// lives elsewhere.
    fn change_active(&mut self, new: &New<'_>) -> Outcome {
        let New { target: Place { slot, .. }, stamp, active, .. } = *new;
        let former = self.ledger.line(slot).peer();
        if self.is_of_another(slot, active) && !self.release(Rank::Consequence, former, stamp) {
            return Stays(Busy);
        }
        self.ledger.set_success_due(slot, false); // The new one was not told.
        self.ledger.end_copy(slot);
        self.ledger.turn_to(slot, active);
        self.begin_copy(slot);
        self.overwrite_whole(new);
        Changed
    }

    /// The connection in this slot is active here, and its backup, or who else knows its place, has
    /// claimed it. If that outranks this active, it is the copy from now on.
    fn give_way_to_pair(&mut self, now: Time, new: &New<'_>) -> Outcome {
        let New { target: Place { slot, .. }, stamp, active, .. } = *new;
        let line = self.ledger.line(slot);
        let presumed_from = self.is_presumed(slot) && self.ledger.former(slot) == active;
        let outranks = stamp > line.stamp()
            || stamp == line.stamp() && (presumed_from || active.member() > self.config.member);
        if !outranks {
            return match self.tell_outranked(now, slot, stamp, active) {
                true => Stays(Refused(Reason::Superseded)),
                false => Stays(Busy),
            };
        }
        if !self.requests.has_room(Rank::Consequence) {
            return Stays(Busy);
        }
        // If this process was not there all the time, its tuple's next one may have begun on its
        // entry. (Where it is contested, that entry was watched.)
        let is_doubted =
            self.ledger.is_taken_up(slot) && !self.contests.has(slot, line.generation());
        self.demote(slot, active, stamp);
        // Who has it is decided: its next packet here is a claim like any other.
        self.contests.decide(slot, line.generation());
        self.ledger.become_copy(slot, active);
        // It may believe what was said before the roles changed: a commit that succeeds is told.
        self.ledger.set_success_due(slot, true);
        self.begin_copy(slot);
        if is_doubted {
            self.ledger.set_written(slot, Written::Resumed);
        }
        self.overwrite_whole(new);
        Changed
    }

    fn overwrite_whole(&mut self, new: &New<'_>) {
        let New { target, stamp, previous, connection, .. } = *new;
        self.overwrite(
            target.slot,
            stamp,
            previous,
            (&connection.state, &connection.extra),
            groups::ALL,
        );
    }

    /// Whether the active of the copy in this slot lives, and at another member than `active`.
    fn is_of_another(&self, slot: u32, active: Coordinate) -> bool {
        let member = self.ledger.line(slot).peer().member();
        member != active.member() && self.is_up(member)
    }

    /// A copy is about to come in, and this slot has its original tuple. If this member holds the
    /// same connection as its own, the newer state stays: (epoch, version, member). Tells whether
    /// it held one: then its own source sees the connection as well, and a close by the other
    /// member does not end it here.
    fn give_way(
        &mut self,
        now: Time,
        slot: u32,
        connection: &Connection,
        stamp: Stamp,
        active: Coordinate,
        previous: Option<Coordinate>,
    ) -> Result<bool, DeltaResult> {
        let line = self.ledger.line(slot);
        if line.kind() == Kind::Backup && self.is_up(line.peer().member()) {
            let is_kept = previous == Some(self.coordinate(slot));
            if line.peer() == active && stamp > line.stamp() && !is_kept {
                // Its active took this member for silent, turned away, and is back with a newer
                // state.
                self.end_missing(slot);
                self.ledger.end_copy(slot);
                self.ledger.clear(slot);
            } else if line.peer().member() != active.member()
                && self.ledger.tuples(slot) == (connection.original, connection.reply)
            {
                // Two members carry on one connection, and may not know of each other. Of two that
                // know as much one may have taken over from the other, and it is not for the third
                // to say which.
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
        let is_same = self.ledger.tuples(slot) == (connection.original, connection.reply);
        let rival = Rival { stamp, place: if is_same { active } else { Coordinate::NOWHERE } };
        if line.kind() == Kind::Held && line.is_unseen() && is_same {
            if self.is_looked_for(now, slot, rival) {
                self.counters.count(Counter::Conflicts);
                let reason = match self.contests.is_outranked(slot, line.generation()) {
                    true => Reason::InDoubt,
                    false => Reason::Superseded,
                };
                return Err(Refused(reason));
            }
            // Whether its packets pass here was just to be found out: now it has an active again.
            self.ledger.clear(slot);
            return Ok(false);
        }
        if line.kind() == Kind::Held && !is_same {
            // Another life of the tuple. The one that comes in had outlived its hold before it was
            // sent: it is the elder.
            self.counters.count(Counter::Conflicts);
            return Err(Refused(Reason::Superseded));
        }
        // Taken over without any traffic seen here since: then this member has not witnessed it.
        // (Of a copy what is remembered is its previous backup.)
        let presumed = line.kind() == Kind::Active && self.is_presumed(slot);
        let presumed_from_it = presumed && self.ledger.former(slot) == active;
        // What began here is younger than anything that outlived its hold before it was sent; and
        // stamps say nothing of two connections, nor of two whose epochs went up apart from each
        // other.
        let is_of_this = active == line.peer() || active == self.ledger.former(slot);
        let is_decided_by_now = self.contests.has_outlasted(now, slot, line.generation());
        let knows_as_much = line.kind() == Kind::Held
            || !is_same
            || stamp.epoch == line.stamp().epoch
            || !is_decided_by_now
                && (!is_of_this || self.contests.has_rival(slot, line.generation()));
        if knows_as_much && self.contest(now, slot, Some(rival)) {
            self.counters.count(Counter::Conflicts);
            return Err(Refused(Reason::Superseded));
        }
        if !presumed_from_it && (stamp, active.member()) < (line.stamp(), self.config.member) {
            if is_same && !self.tell_outranked(now, slot, stamp, active) {
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
            self.ledger.end_copy(slot);
            self.leave_behind(line.peer().member());
        } else {
            self.demote(slot, active, stamp);
        }
        self.ledger.clear(slot);
        Ok(is_same && !presumed && line.kind() != Kind::Backup)
    }

    /// Traffic showed up at the active of this copy. Another member that carries on the same
    /// connection, and has its copy here as well, is told. `false` if there is no room for a
    /// request.
    fn outrank(&mut self, slot: u32, stamp: Stamp) -> bool {
        let (original, reply) = self.ledger.tuples(slot);
        let active = self.ledger.line(slot).peer().member();
        let rivals = |other: u32| {
            let line = self.ledger.line(other);
            line.kind() == Kind::Backup
                && line.peer().member() != active
                && self.is_up(line.peer().member())
                && line.stamp() < stamp
                && self.ledger.tuples(other) == (original, reply)
        };
        let Some(other) = self.ledger.index.find(&original, rivals) else { return true };
        let told = self.release(Rank::Consequence, self.ledger.line(other).peer(), stamp);
        self.counters.add(Counter::Conflicts, told as u64);
        told
    }

    /// An active connection here gives way to `winner`: its backup is released, it stands in no
    /// list.
    pub(super) fn demote(&mut self, slot: u32, winner: Coordinate, stamp: Stamp) {
        self.counters.count(Counter::ClaimsLost);
        self.commits.may_hold_entries();
        self.end_move(slot);
        let line = self.ledger.line(slot);
        let peer = line.peer();
        // Where it was taken over from stays until the slot is something else: what ends it may
        // come once more.
        self.ledger.unassign(slot);
        if peer.is_somewhere() && peer != winner && !is(Mutation::LoserKeepsBackup) {
            let taken = self.release(Rank::Consequence, peer, stamp);
            assert!(taken, "the caller made sure of room");
        }
    }

    /// The active in this slot refuses a claim that does not outrank it. Who sent it is told so,
    /// unless it is the backup by now, perhaps in another slot, or the previous one: nothing else
    /// would tell it. Of an earlier epoch it may be another connection's: traffic here is to decide
    /// first, if there is a kernel to ask. Of two within one epoch that know a different number of
    /// changes the next claims decide. `false`: there is no room for a request.
    fn tell_outranked(&mut self, now: Time, slot: u32, stamp: Stamp, active: Coordinate) -> bool {
        let line = self.ledger.line(slot);
        let hears_otherwise = line.kind() != Kind::Active
            || line.peer().member() == active.member()
            || self.ledger.former(slot) == active
            || self.is_presumed(slot);
        let is_tie = stamp == line.stamp();
        if hears_otherwise || !is_tie && stamp.epoch == line.stamp().epoch {
            return true;
        }
        if is_tie {
            return self.release(Rank::Consequence, active, stamp.changed());
        }
        self.contest(now, slot, Some(Rival { stamp, place: active }))
            || self.release(Rank::Consequence, active, line.stamp())
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
            self.ledger.set_extra(slot, extra);
        }
        let previous = previous.unwrap_or(Coordinate::NOWHERE);
        self.ledger.overwrite(slot, stamp, previous, |old| {
            let mut new = if mask & groups::STATE != 0 { *state } else { old };
            new.timeout_s =
                if mask & groups::TIMEOUT != 0 { state.timeout_s } else { old.timeout_s };
            new.mark = if mask & groups::MARK != 0 && !is(Mutation::UpdateIncomplete) {
                state.mark
            } else {
                old.mark
            };
            new
        });
    }

    pub(super) fn apply_update(
        &mut self,
        stream: usize,
        target: Place,
        stamp: Stamp,
        mask: u8,
        previous: Option<Coordinate>,
        value: (&State, &Extra),
    ) -> DeltaResult {
        let Some(line) = self.line_at(target) else { return Refused(Reason::NotHere) };
        if target.generation != line.generation() && !is(Mutation::NoGenerationCheck) {
            return Refused(Reason::NotHere);
        }
        self.ledger.raise_epoch(stamp.epoch);
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
                self.ask_commit(Commit::Write { slot: target.slot, generation: target.generation });
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

    /// Whether the sender of this stream is still to hear that the connection in this slot is
    /// active here. If it refused to, it must not believe that its copy is here.
    fn tells(&self, slot: u32, stream: usize) -> bool {
        let peer = self.ledger.line(slot).peer();
        let is_senders =
            |place: Coordinate| place.is_somewhere() && self.stream_of(place) == stream;
        is_senders(peer) || is_senders(self.ledger.former(slot)) && !self.ledger.is_moving(slot)
    }
}

#[cfg(test)]
#[path = "arrivals_tests.rs"]
mod tests;
