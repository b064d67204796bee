//! Ingest: what the source saw becomes a change of the table.
//!
//! A new connection is held: it stays here until it has outlived the hold time, so that
//! short-lived connections are never sent. An event for a connection that this member holds as a
//! backup is a claim, its traffic is here now. (A source that cannot be sure, as the kernel's, asks
//! first and tells only then: see `feed::claims`.)
//!
//! What changed is noted as dirty before the new state is stored: a process that is killed between
//! the two sends a state again that was sent before, and loses none.

use std::time::Duration;

use super::contests::Doubt;
use super::mutation::{Mutation, is};
use super::peers::PeerState;
use super::replica::Replica;
use super::requests::Rank;
use super::stream::stream_index;
use crate::conn::slot::groups;
use crate::conn::table::{On, Written};
use crate::conn::tuple::TCP;
use crate::conn::{
    Connection, Coordinate, Extra, Generation, Kind, Phase, Stamp, State, Tuple, phase, shard_of,
};
use crate::counters::Counter;
use crate::source::{Commit, Elsewhere, End, LookShows, SourceEvent};
use crate::time::Time;

/// For so long at most the ends of holds wait for a source that has more to tell.
const HOLD_EXTENSION: Duration = Duration::from_secs(1);

/// What is known of the last packets of a copy: seconds of the monotonic clock.
pub(super) struct LastPackets {
    /// Those here, as [`Table::passed_until`](crate::conn::table::Table::passed_until) has it.
    pub passed_until: u32,
    /// As [`Table::written_at`](crate::conn::table::Table::written_at) has it.
    pub written_at: u32,
    /// Those at its active.
    pub elsewhere: Elsewhere,
}

/// What the source says of a connection that the slot does not say yet.
struct News {
    /// The state that the slot is to have.
    state: State,
    /// The optional attributes, if they are to be changed.
    extra: Option<Extra>,
    /// The groups of fields that differ from what the slot says.
    changed: u8,
}

impl Replica<'_> {
    /// The source saw something.
    pub fn handle_source(&mut self, now: Time, event: &SourceEvent) {
        self.counters.count(Counter::SourceEvents);
        let original = event.original();
        if shard_of(original, self.config.shards) != self.config.shard {
            self.counters.count(Counter::SourceRejected);
            return;
        }
        let found = self.ledger.find_original(original);
        match (event, found) {
            (SourceEvent::Seen { connection, known }, _)
                if connection.phase() == Phase::Over && !is(Mutation::LingeringSent) =>
            {
                self.ended(now, connection, *known, found)
            }
            (SourceEvent::Seen { connection, .. }, None) => self.open(now, connection, None),
            (SourceEvent::Seen { connection, known }, Some(slot)) => {
                self.change(now, slot, connection, *known)
            }
            (SourceEvent::Gone { .. }, None) => self.counters.count(Counter::SourceUnknownGone),
            (SourceEvent::Gone { end, .. }, Some(slot)) => self.gone(now, slot, *end),
        }
    }

    /// The connection has ended, though the source may keep its entry for minutes.
    fn ended(&mut self, now: Time, seen: &Connection, known: u8, found: Option<u32>) {
        let is_it =
            |slot: &u32| known & groups::TUPLES == 0 || self.ledger.tuples(*slot).1 == seen.reply;
        match (
            found.filter(is_it).or_else(|| self.ledger.find_exact(&seen.original, &seen.reply)),
            found,
        ) {
            (Some(slot), _) => {
                // Its last packets passed here: who contested it is told.
                if self.contests.has_rival(slot, self.ledger.line(slot).generation()) {
                    self.change(now, slot, seen, known);
                }
                self.gone(now, slot, End::Seen);
            }
            // A source has one connection to a tuple: the one that it had before is no more, and
            // nobody saw its end.
            (None, Some(slot)) if !self.is_unclaimed(slot) => self.gone(now, slot, End::UNTOLD),
            (None, _) => self.counters.count(Counter::SourceUnknownGone),
        }
    }

    /// The slot of a copy with this original tuple, if its active lives: its kernel entry is ours
    /// to keep, and its disappearance is no close.
    pub fn living_copy(&self, original: &Tuple) -> Option<u32> {
        self.ledger.find_original(original).filter(|slot| self.is_living_copy(*slot))
    }

    /// The slot of a copy with this original tuple.
    pub fn copy(&self, original: &Tuple) -> Option<u32> {
        self.ledger.find_original(original).filter(|slot| self.ledger.kind(*slot) == Kind::Backup)
    }

    /// The slot of a connection with this original tuple that was taken over without any traffic
    /// of it seen here since.
    pub fn taken_over(&self, original: &Tuple) -> Option<u32> {
        let is_it = |slot: &u32| self.ledger.kind(*slot) == Kind::Active && self.is_presumed(*slot);
        self.ledger.find_original(original).filter(is_it)
    }

    /// Whether this slot holds a copy whose active lives.
    pub fn is_living_copy(&self, slot: u32) -> bool {
        let line = self.ledger.line(slot);
        line.kind() == Kind::Backup && self.is_up(line.peer().member())
    }

    /// Whether the connection in this slot is a copy, or what is left of one, or was taken over
    /// without any traffic of it seen here since: that the kernel has an entry says nothing about
    /// its traffic.
    pub fn is_unclaimed(&self, slot: u32) -> bool {
        match self.ledger.kind(slot) {
            Kind::Backup => true,
            Kind::Held => self.ledger.line(slot).is_unseen(),
            Kind::Active => self.is_presumed(slot),
            _ => false,
        }
    }

    /// Whether that the kernel has an entry of the connection in this slot is no news: it would be
    /// taken for traffic, and says nothing of it.
    pub fn is_no_news(&self, slot: u32) -> bool {
        self.is_unclaimed(slot) || self.contests.has(slot, self.ledger.line(slot).generation())
    }

    /// The kernel's entry of this copy is gone and must be written again.
    pub fn recommit(&mut self, now: Time, slot: u32) {
        match self.is_living_copy(slot) {
            true => self.write_again(now, slot),
            false => {
                let generation = self.ledger.line(slot).generation();
                self.ask_commit(Commit::Refresh { slot, generation });
            }
        }
    }

    /// A connection begins. If it has the tuple of another one that members may still hold (`over`
    /// is that one's stamp, or it is closing here), it begins above it: whatever of that one is
    /// still on its way, or looks for a place here, is older.
    pub(super) fn open(&mut self, now: Time, connection: &Connection, over: Option<Stamp>) {
        self.counters.count(Counter::SourceOpened);
        if let Some(slot) = self.fill_held(connection, over, false) {
            self.ledger.hold(now, slot);
        }
    }

    /// What is left of a copy is held above its stamp until the kernel has told whether packets
    /// pass its entry here, and were later than those of its active. What had passed it may be
    /// another connection's, if the process that wrote it is no more, or lost events.
    pub(super) fn ask_for_packets(
        &mut self,
        connection: &Connection,
        over: Stamp,
        packets: LastPackets,
        may_be_anothers: bool,
    ) {
        let LastPackets { passed_until, written_at, elsewhere } = packets;
        if let Some(slot) = self.fill_held(connection, Some(over), true) {
            self.ledger.set_passed_until(slot, passed_until);
            self.ledger.set_written_at(slot, written_at);
            let written = if may_be_anothers { Written::Resumed } else { Written::No };
            self.ledger.set_written(slot, written);
            let generation = self.ledger.line(slot).generation();
            self.ask_commit(Commit::Look { slot, generation, elsewhere });
        }
    }

    /// A slot with a connection that is held and stands in no list yet. `None`: no slot is free.
    pub(super) fn fill_held(
        &mut self,
        connection: &Connection,
        over: Option<Stamp>,
        is_unseen: bool,
    ) -> Option<u32> {
        let slot = self.ledger.open(connection, over, is_unseen);
        if slot.is_none() {
            self.counters.count(Counter::TableFull);
        }
        slot
    }

    /// The source saw the connection in this slot, of which it knows so much. It may be another one
    /// of the same tuple.
    pub(super) fn change(&mut self, now: Time, slot: u32, seen: &Connection, known: u8) {
        let line = self.ledger.line(slot);
        let (original, reply) = self.ledger.tuples(slot);
        if reply != seen.reply && known & groups::TUPLES != 0 {
            // The same original tuple with another translation is another connection: one that has
            // a copy here beside that of the one before, or a new one.
            self.gone(now, slot, End::Seen);
            return match self.ledger.find_exact(&original, &seen.reply) {
                Some(copy) => self.change(now, copy, seen, known),
                None => self.open(now, &Connection { original, ..*seen }, Some(line.stamp())),
            };
        }
        if known & groups::STATE != 0
            && matches!(line.kind(), Kind::Active | Kind::Backup)
            && phase::begins_anew(&line.state(), &seen.state)
        {
            // The port was used again, and the entry of the one before stood in the way: the kernel
            // makes it the next one's.
            self.gone(now, slot, End::Seen);
            return self.open(now, &Connection { original, reply, ..*seen }, Some(line.stamp()));
        }
        let news = self.news(slot, seen, known);
        match line.kind() {
            Kind::Held => self.update_held(now, slot, &news),
            Kind::Active => self.update_active(now, slot, &news),
            Kind::Backup => {
                // First the claim with its stamp: no state is ever seen under the stamp of another
                // one.
                self.claim(now, slot);
                self.take_extra(slot, &news);
                self.ledger.amend(slot, |line| line.set_state(&news.state));
            }
            kind => panic!("a {kind:?} slot is not in the index"),
        }
    }

    /// What the source, which knows so much, says of this slot's connection that is not here yet.
    fn news(&self, slot: u32, seen: &Connection, known: u8) -> News {
        let old = self.ledger.line(slot).state();
        let (mut state, mut changed) = (old, 0);
        if known & groups::STATE != 0 {
            state = State { timeout_s: old.timeout_s, mark: old.mark, ..seen.state };
            if state != old {
                changed |= groups::STATE;
            }
        }
        if known & groups::MARK != 0 && seen.state.mark != old.mark {
            state.mark = seen.state.mark;
            changed |= groups::MARK;
        }
        // A timeout runs down by itself: it travels with other changes, and alone only if it grew.
        let grew = seen.state.timeout_s > old.timeout_s;
        if known & groups::TIMEOUT != 0
            && (grew || changed != 0 && seen.state.timeout_s != old.timeout_s)
        {
            state.timeout_s = seen.state.timeout_s;
            changed |= groups::TIMEOUT;
        }
        let extra = self.new_extra(slot, seen);
        if extra.is_some() {
            changed |= groups::EXTRA;
        }
        News { state, extra, changed }
    }

    fn take_extra(&mut self, slot: u32, news: &News) {
        if let Some(extra) = &news.extra {
            self.ledger.set_extra(slot, extra);
        }
    }

    /// Nobody has heard of the connection in this slot: what is new of it stays here. If it is
    /// contested, that was traffic, which decides.
    fn update_held(&mut self, now: Time, slot: u32, news: &News) {
        let line = self.ledger.line(slot);
        let contested = self.contests.decide(slot, line.generation());
        let mut stamp = line.stamp();
        if let Some(rival) = contested {
            self.counters.count(Counter::ClaimsContested);
            stamp = rival.outdone(stamp, self.config.member);
            self.ledger.raise_epoch(stamp.epoch);
        }
        self.ledger.amend(slot, |line| {
            line.set_unseen(false);
            line.set_state(&news.state);
            line.set_stamp(stamp);
        });
        self.take_extra(slot, news);
        if let Some(rival) = contested.filter(|rival| self.can_be_told(rival)) {
            self.ledger.unlist(slot);
            self.ledger.activate(slot);
            self.tell_rival(now, slot, rival);
        } else if self.ledger.on(slot) == On::None {
            self.ledger.hold(now, slot);
        }
    }

    /// The connection in this slot is ours: what is new of it is sent. If it was only presumed to
    /// be, or is contested, that was traffic, which claims it.
    fn update_active(&mut self, now: Time, slot: u32, news: &News) {
        let changed = news.changed;
        let contested = self.contests.decide(slot, self.ledger.line(slot).generation());
        self.counters.add(Counter::ClaimsContested, contested.is_some() as u64);
        let is_claim = self.is_presumed(slot) || contested.is_some();
        self.counters.add(Counter::Claims, is_claim as u64);
        // First the slot says that its newest state is not acknowledged, then it has one: whoever
        // reads what a killed process left behind never takes the new state for acknowledged.
        if changed != 0 || is_claim {
            self.mark_changed(now, slot, changed);
        }
        if is_claim && self.ledger.former(slot).member() == self.config.member {
            self.ledger.set_former(slot, Coordinate::NOWHERE);
        }
        // Who was its backup may have claimed it before it fell silent, unheard: what is seen since
        // is newer.
        let (epoch, member) = (self.ledger.epoch(), self.config.member);
        let has_backup = self.ledger.line(slot).peer().is_somewhere();
        self.ledger.amend(slot, |line| {
            line.set_state(&news.state);
            if is_claim {
                line.set_claimed(true);
                let own = line.stamp();
                line.set_stamp(contested.map_or(own.claimed(), |rival| rival.outdone(own, member)));
            } else if changed != 0 && !is(Mutation::VersionStands) {
                let mut stamp = line.stamp().changed();
                if !has_backup {
                    stamp.epoch = stamp.epoch.max(epoch);
                }
                line.set_stamp(stamp);
            }
        });
        // Behind its stamp: the source tells again what is not here, and that is a further change.
        self.take_extra(slot, news);
        if let Some(rival) = contested.filter(|rival| self.can_be_told(rival)) {
            self.tell_rival(now, slot, rival);
        }
    }

    /// What only few connections have, if the source tells anything new of it. If no record is free
    /// it stays as it is, and nothing is new.
    fn new_extra(&self, slot: u32, seen: &Connection) -> Option<Extra> {
        if seen.extra.is_none() {
            return None;
        }
        let known = self.ledger.extra(slot);
        let mut extra = known;
        extra.merge(&seen.extra);
        (extra != known && self.ledger.may_set_extra(slot)).then_some(extra)
    }

    /// Whether the connection was taken over without any traffic of it seen here since.
    pub(super) fn is_presumed(&self, slot: u32) -> bool {
        self.ledger.former(slot).is_somewhere()
            && !self.ledger.is_moving(slot)
            && !self.ledger.line(slot).is_claimed()
    }

    /// An active connection changed.
    pub(super) fn mark_changed(&mut self, now: Time, slot: u32, changed: u8) {
        let peer = self.ledger.line(slot).peer();
        if !peer.is_somewhere() {
            self.ledger.amend(slot, |line| line.set_groups(groups::ALL));
        } else if self.is_up(peer.member()) || !self.has_another(peer.member()) {
            // Its backup is there, or nobody else could be: the change waits for it.
            self.mark_dirty(now, slot, changed);
        } else {
            // Traffic does not wait for the walk.
            self.leave_behind(peer.member());
            self.turn_away(slot);
            self.protect(now, slot);
        }
    }

    /// Traffic of a copy showed up here: this member is its active from now on.
    fn claim(&mut self, now: Time, slot: u32) {
        self.counters.count(Counter::Claims);
        self.end_missing(slot);
        let line = self.ledger.line(slot);
        let (peer, stamp) = (line.peer(), line.stamp());
        let stamp = if is(Mutation::ClaimKeepsEpoch) { stamp.changed() } else { stamp.claimed() };
        let waits = matches!(self.peers.state(peer.member()), PeerState::Down { .. })
            && !self.has_another(peer.member());
        // The former active is the backup then: the pair stays, only its direction turns. If it is
        // silent, and nobody else could be the backup, the claim waits for it, and so does the
        // close that may follow.
        let is_pair_kept = self.is_up(peer.member()) || waits;
        let session = self.durable(self.stream_of(peer)).peer_session();
        let previous = self.ledger.claim(slot, stamp, session, is_pair_kept);
        if is_pair_kept {
            self.mark_dirty(now, slot, groups::ALL);
        } else {
            self.leave_behind(peer.member());
            self.protect_promoted(now, slot, previous);
        }
    }

    pub(super) fn gone(&mut self, now: Time, slot: u32, end: End) {
        let (line, original) = (self.ledger.line(slot), self.ledger.tuples(slot).0);
        match line.kind() {
            Kind::Held => {
                self.counters.count(Counter::SourceShort);
                self.ledger.unlist(slot);
                self.ledger.clear(slot);
            }
            Kind::Active => self.close(now, slot, end),
            Kind::Backup if self.is_up(line.peer().member()) => {
                self.claim(now, slot);
                self.close(now, slot, end);
            }
            Kind::Backup => {
                // Presumed: no living member but the previous backup, if any, knows it.
                self.leave_behind(line.peer().member());
                self.end_missing(slot);
                self.ledger.end_copy(slot);
                let previous = self.ledger.former(slot);
                if previous.is_somewhere() && previous.member() != self.config.member {
                    // Without room for a request it presumes by itself, until its own source sees
                    // the end.
                    let _ = self.release(Rank::Consequence, previous, line.stamp().changed());
                }
                self.ledger.clear(slot);
            }
            kind => panic!("a {kind:?} slot is not in the index"),
        }
        // The entry that is gone was another copy's as well, if there is one.
        let is_such = |other| self.is_living_copy(other) && self.ledger.tuples(other).0 == original;
        if self.commits.are_eager()
            && let Some(other) = self.ledger.index.find(&original, is_such)
        {
            self.recommit(now, other);
        }
    }

    fn close(&mut self, now: Time, slot: u32, end: End) {
        let line = self.ledger.line(slot);
        self.end_move(slot);
        let (peer, former) = (line.peer(), self.ledger.former(slot));
        // (A place in a table that it does not have any more is another connection's by now.)
        let is_told = former.is_somewhere()
            && line.is_claimed()
            && !self.durable(stream_index(former.member(), 0)).is_forgetting();
        if is_told {
            // It may still take itself for the active. Without room for a request it finds out by
            // asking.
            let _ = self.release(Rank::Question, former, line.stamp().changed());
        }
        if !peer.is_somewhere() || !self.may_return(peer.member()) || is(Mutation::CloseUnsent) {
            // No backup, or a dead one: when it returns it asks by coordinate, and the generation
            // says no.
            self.ledger.unassign(slot);
            self.ledger.clear(slot);
            return;
        }
        let is_tcp = self.ledger.tuples(slot).0.protocol == TCP;
        let end = match end {
            // Other entries run out soon, and tell little. (Of what was here before this process,
            // it is not known what the kernel had given it.)
            End::Unseen { .. } if !is_tcp || self.ledger.is_taken_up(slot) => End::UNTOLD,
            end => end,
        };
        self.ledger.begin_closing(slot, now, end);
        self.mark_dirty(now, slot, 0);
    }

    /// Connections that outlived the hold time get a backup.
    pub(super) fn tick_holds(&mut self, now: Time) {
        while let Some(slot) = self.ledger.first_held() {
            if !self.hold_at().reached(now) {
                break;
            }
            self.ledger.unlist(slot);
            if self.ledger.connection(slot).phase() == Phase::Ending {
                continue; // Who has never heard of it need not any more: it stays here until its end is told.
            }
            self.ledger.activate(slot);
            self.protect(now, slot);
        }
    }

    /// What the kernel has of a connection whose copy was to go here, and what that shows. Whose
    /// traffic is here goes on, as ours.
    pub fn handle_look(
        &mut self,
        now: Time,
        slot: u32,
        generation: Generation,
        there: Option<&Connection>,
        shows: LookShows,
    ) {
        let line = self.ledger.line(slot);
        if line.generation() != generation || line.kind() != Kind::Held || !line.is_unseen() {
            return;
        }
        let (original, reply) = self.ledger.tuples(slot);
        let lives = there
            .filter(|there| there.reply == reply && there.phase() != Phase::Over)
            .filter(|_| shows != LookShows::Nothing);
        if lives.is_some()
            && self.ledger.written(slot) == Written::Resumed
            && self.contests.has_room()
        {
            // The end was seen, but while this process was not there the next connection of the
            // tuple may have begun on this very entry: its packets tell.
            let stamp = self.ledger.line(slot).stamp();
            let noted =
                self.contests.note(now, (slot, generation), stamp, None, Some(Doubt::Closed));
            assert!(noted, "there was room for a contest");
        } else if let Some(there) = lives {
            self.counters.count(Counter::Claims);
            self.counters.count(Counter::ClaimsByLook);
            if let Some(extra) = self.new_extra(slot, there) {
                self.ledger.set_extra(slot, &extra);
            }
            let is_untouched = shows == LookShows::Address;
            self.ledger.activate_unseen(slot, |line| {
                line.set_claimed(true);
                if !is_untouched {
                    line.set_state(&there.state);
                }
            });
            if is_untouched || self.ledger.passed_s(slot, now) > 0 {
                self.ask_commit(Commit::Refresh { slot, generation });
            }
            self.protect(now, slot);
        } else {
            self.ledger.clear(slot);
            if shows != LookShows::Packets {
                self.delete_entry(&original);
            }
        }
    }

    /// When the oldest held connection outlives the hold time, and the source is no more behind, or
    /// too long.
    pub(super) fn hold_at(&self) -> Time {
        let Some(slot) = self.ledger.first_held() else { return Time::NEVER };
        let hold = if self.is_leaving { Duration::ZERO } else { self.config.hold };
        let outlives_at = self.ledger.since(slot).after(hold);
        self.source_behind_since
            .map_or(outlives_at, |since| outlives_at.max(since.after(HOLD_EXTENSION)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Memory, MemorySize, OwnedMemory};
    use crate::source::CommitMode;
    use crate::sync::replica::{ReplicaConfig, test_config};

    const HOLD: Duration = Duration::from_secs(3);

    fn replica(memory: Memory<'_>) -> Replica<'_> {
        let config = ReplicaConfig { hold: HOLD, commit: CommitMode::Eager, ..test_config() };
        Replica::new(config, memory)
    }

    fn seen(tcp_state: u8) -> SourceEvent {
        let original = Tuple::v4(6, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2));
        SourceEvent::seen(Connection::new(
            original,
            original.mirrored(),
            State { tcp_state, ..State::default() },
        ))
    }

    #[test]
    fn a_connection_that_is_over_under_the_tuple_of_ours_is_another_one_and_ours_is_no_more() {
        let owned = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let mut replica = replica(owned.parts());
        let SourceEvent::Seen { connection, .. } = seen(3) else { panic!("it is seen") };
        for reply in [connection.reply, Tuple { dport: 99, ..connection.reply }] {
            replica.handle_source(Time(1), &seen(3));
            assert!(replica.ledger.find_original(&connection.original).is_some());
            let over = Connection {
                reply,
                state: State { tcp_state: 7, ..State::default() },
                ..connection
            };
            replica.handle_source(Time(2), &SourceEvent::seen(over));
            assert!(replica.ledger.find_original(&connection.original).is_none(), "{reply}");
        }
    }

    /// What the connection of [`seen`] is after the steps, each with its time in seconds.
    fn kind_after(steps: &[(u64, Option<u8>, bool)]) -> Option<Kind> {
        let owned = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let mut replica = replica(owned.parts());
        for (at, state, is_behind) in steps {
            let now = Time(1).after(Duration::from_secs(*at));
            if let Some(state) = state {
                replica.handle_source(now, &seen(*state));
            }
            replica.set_source_behind(now, *is_behind);
            replica.tick_holds(now);
        }
        let slot = replica.ledger.find_original(seen(3).original())?;
        Some(replica.ledger.kind(slot))
    }

    #[test]
    fn a_connection_that_ends_within_its_hold_is_forgotten_however_long_its_entry_stays() {
        assert_eq!(kind_after(&[(0, Some(3), false), (4, None, false)]), Some(Kind::Active));
        for over in [7, 8] {
            assert_eq!(kind_after(&[(0, Some(3), false), (1, Some(over), false)]), None);
            assert_eq!(
                kind_after(&[(0, Some(3), false), (4, None, false), (5, Some(over), false)]),
                None
            );
            assert_eq!(
                kind_after(&[(0, Some(over), false), (4, None, false)]),
                None,
                "found by a dump"
            );
        }
    }

    #[test]
    fn one_that_awaits_its_last_answer_when_its_hold_ends_is_not_sent_and_one_that_is_half_closed_is()
     {
        let last_ack =
            [(0, Some(3), false), (1, Some(6), false), (4, None, false), (60, None, false)];
        assert_eq!(kind_after(&last_ack), Some(Kind::Held));
        assert_eq!(
            kind_after(&[(0, Some(3), false), (1, Some(5), false), (4, None, false)]),
            Some(Kind::Active)
        );
        // Should it go on after all, its hold begins anew.
        let mut goes_on = last_ack.to_vec();
        goes_on.extend([(61, Some(3), false), (62, None, false)]);
        assert_eq!(kind_after(&goes_on), Some(Kind::Held));
        goes_on.push((65, None, false));
        assert_eq!(kind_after(&goes_on), Some(Kind::Active));
    }

    #[test]
    fn no_hold_ends_while_the_source_has_more_to_tell_but_for_a_second_at_most() {
        assert_eq!(kind_after(&[(0, Some(3), false), (3, None, true)]), Some(Kind::Held));
        assert_eq!(kind_after(&[(0, Some(3), false), (3, None, true), (3, Some(7), false)]), None);
        assert_eq!(
            kind_after(&[(0, Some(3), false), (3, None, true), (4, None, true)]),
            Some(Kind::Active)
        );
        // It stood still for longer than that: the second begins when it goes on.
        assert_eq!(kind_after(&[(0, Some(3), false), (9, None, true), (9, Some(7), false)]), None);
    }
}
