//! Takeover: what a change of the view means for the table.
//!
//! A death costs nothing at first: copies of a dead member are presumed active because the view
//! says so. Work begins `reprotect_after` later, or with traffic: a walk over the table, a few
//! thousand slots a tick, gives every connection of that member a new backup. Walks also move
//! backups away from a member that leaves, and compare with a member that was away.
//!
//! ```text
//!            heard                 silent                  reprotect_after, goodbye,
//!  Vacant ----------> Up <------------------> Down ------> or another table ----> Purge
//!    ^                        heard again                                           |
//!    +--------------------------- the walk is done --------------------------------+
//! ```
//!
//! What happens in `Down` can be taken back: streams stand still, nothing agreed on is let go. As
//! soon as anything is (a connection that found another backup), the member is `left_behind`: when
//! it returns, streams begin a new session, and both sides ask by coordinate what still stands.

use std::time::Duration;

use super::mutation::{Mutation, is};
use super::peers::{PeerState, members_in};
use super::replica::{Candidate, Replica};
use super::requests::Rank;
use super::stream::{stream_index, stream_member};
use super::walks::Walk;
use crate::ccp::message::Place;
use crate::conn::slot::groups;
use crate::conn::table::On;
use crate::conn::tuple::shards_can_meet;
use crate::conn::{Coordinate, Generation, Kind, MemberId, Tuple, shard_of};
use crate::counters::Counter;
use crate::group::view::{Status, View};
use crate::limits::{MEMBERS_MAX, SHARDS_MAX, WALK_PER_TICK};
use crate::seq::Seq;
use crate::source::{Commit, CommitMode};
use crate::time::Time;

/// Connections that may wait to be sent before a walk pauses, so that live deltas do not queue
/// behind it for long.
const WALK_AHEAD: u64 = 8192;

/// How long a walk pauses that must wait for leases, requests or acknowledgements.
const WALK_PAUSE: Duration = Duration::from_micros(500);

/// How long an offer waits for its answer before it is made again.
const OFFER_AGAIN: Duration = Duration::from_secs(1);

/// How long a leaving member's copies that found no other place wait for the next walk.
const REHOME_PAUSE: Duration = Duration::from_millis(50);

impl Replica<'_> {
    /// The view changed.
    pub fn handle_view(&mut self, now: Time, view: &View) {
        assert_eq!(view.me, self.config.member);
        let old_best = self.peers.ranked().first().map(|m| (*m, self.peers.seen(*m).priority));
        // A process that took its memory up again may have lost what it was writing.
        let resumed = self.peers.view().others().filter(|(id, old)| {
            let new = &view.members[*id as usize];
            old.incarnation != 0
                && old.incarnation != new.incarnation
                && old.table_id == new.table_id
        });
        let resumed: u64 = resumed.fold(0, |bits, (id, _)| bits | 1 << id);
        self.peers.on_view(view, self.config.site);
        for member in 1..=MEMBERS_MAX as MemberId {
            if member != self.config.member {
                self.review(now, member);
            }
        }
        for member in members_in(resumed) {
            if self.is_up(member) {
                self.unverify(member);
                if self.ledger.declined().0 > 0 {
                    self.walks.push(Walk::Declined { member });
                }
            }
        }
        let leaving = self.bits(|m| m.status == Status::Leaving);
        if leaving != 0 {
            self.walks.push_rehome(leaving, true);
        }
        let best = self.peers.ranked().first().map(|m| (*m, self.peers.seen(*m).priority));
        if let Some((_, priority)) = best
            && best != old_best
        {
            self.retry_at = now;
            let lower = self.bits(|m| m.status.is_alive() && m.priority < priority);
            if lower != 0 {
                self.walks.push_rehome(lower, false);
            }
        }
    }

    fn bits(&self, is_it: impl Fn(&crate::group::view::Member) -> bool) -> u64 {
        self.peers.view().others().filter(|(_, m)| is_it(m)).fold(0, |bits, (id, _)| bits | 1 << id)
    }

    /// What this shard makes of a member, now that the view changed.
    fn review(&mut self, now: Time, member: MemberId) {
        let seen = *self.peers.seen(member);
        let same_table = seen.table_id == self.peers.table(member);
        match self.peers.state(member) {
            PeerState::Vacant if seen.status.is_alive() => self.come_up(now, member),
            PeerState::Up if seen.status.is_alive() && same_table => {}
            PeerState::Up => {
                // What was to be verified, or offered, still is when it returns.
                let left_behind = !self.is_verified(member)
                    || self.offered >> member & 1 == 1
                    || self.walks.contains(Walk::Offer { member });
                self.peers.set(member, PeerState::Down { since: now, left_behind, lost: false });
                self.ledger.pass_unheard_claim();
                if self.config.commit == CommitMode::Takeover {
                    self.unwritten |= 1 << member;
                }
                self.write_copies(member);
                for shard in 0..SHARDS_MAX as u8 {
                    let stream = stream_index(member, shard);
                    self.inbox.fall_silent(stream);
                }
                self.stop_comparing(member);
                self.review_down(now, member);
            }
            PeerState::Down { .. } => self.review_down(now, member),
            PeerState::Vacant | PeerState::Purge => {}
        }
    }

    fn review_down(&mut self, now: Time, member: MemberId) {
        let PeerState::Down { since, left_behind, lost } = self.peers.state(member) else {
            return;
        };
        let seen = *self.peers.seen(member);
        let same_table = seen.table_id == self.peers.table(member);
        let is_late = since.after(self.config.reprotect_after).reached(now);
        let is_back = seen.status.is_alive() && same_table;
        if !is_back && (is_late || seen.status != Status::Absent) {
            self.write_copies(member);
        }
        if is_back {
            self.unwritten &= !(1 << member);
            if left_behind {
                // What was on its way may be for places that were let go since: what still stands
                // is sent anew.
                self.give_up_all(now, member);
            }
            self.go_on(now, member);
            if left_behind {
                self.unverify(member);
                self.walks.push(Walk::Offer { member });
            }
            if lost {
                self.walks.drop_those(|walk| *walk == Walk::Lose { member });
                self.walks.push(Walk::Rewrite { member });
            }
        } else if seen.status.is_alive()
            || seen.status == Status::Left
            || is_late && self.has_another(member)
        {
            self.purge(now, member);
        } else if is_late && !lost {
            self.lose(now, member);
        }
    }

    /// The member is gone: its copies are written to the kernel, unless they were, or are there all
    /// the time.
    pub(super) fn write_copies(&mut self, member: MemberId) {
        if self.unwritten >> member & 1 == 1 {
            self.unwritten &= !(1 << member);
            self.commits.may_hold_entries();
            self.walks.push(Walk::Commit { member });
        }
    }

    /// Whether a connection could have its copy at another member than this one.
    pub(super) fn has_another(&self, member: MemberId) -> bool {
        self.peers.ranked().iter().any(|other| *other != member && self.is_up(*other))
    }

    /// A silent member is back with its table: the streams go on where they stood. It gets what it
    /// missed from the history, and what was changed since then as deltas.
    fn go_on(&mut self, now: Time, member: MemberId) {
        self.peers.set(member, PeerState::Up);
        for shard in 0..SHARDS_MAX as u8 {
            let stream = stream_index(member, shard);
            self.counters.add(Counter::CatchUpDatagrams, self.outbox.catch_up(now, stream));
            self.streams[stream].flush_at = now;
            self.enqueue(stream);
        }
        self.outbox.oldest_first();
    }

    /// A member is silent for long, and there is nobody else to turn to. What it holds for us stays
    /// agreed, and so does what we hold for it; but closes do not pile up for it, nor datagrams.
    /// When it returns it finds out by comparing.
    fn lose(&mut self, now: Time, member: MemberId) {
        self.peers.lose(member);
        self.counters.count(Counter::StreamsLost);
        self.give_up_all(now, member);
        self.walks.push(Walk::Lose { member });
    }

    fn give_up_all(&mut self, now: Time, member: MemberId) {
        for shard in 0..SHARDS_MAX as u8 {
            let stream = stream_index(member, shard);
            let sent = self.durable(stream).sent();
            self.give_up(now, stream, sent);
        }
    }

    fn come_up(&mut self, now: Time, member: MemberId) {
        let seen = *self.peers.seen(member);
        let known = self.peers.table(member);
        let returned = known == seen.table_id;
        self.peers.set_table(member, seen.table_id);
        self.peers.set(member, PeerState::Up);
        if !returned && known != 0 {
            // Before anything says that this is the table: who goes on from here must forget the
            // other one as well.
            self.durable(stream_index(member, 0)).set_forgetting(true);
        }
        for shard in (0..SHARDS_MAX as u8).filter(|_| !returned) {
            let stream = stream_index(member, shard);
            let exists = shard < seen.shards
                && shards_can_meet(self.config.shard, self.config.shards, shard, seen.shards);
            match exists {
                true => self.inbox.await_session(stream),
                false => self.durable(stream).forget(),
            }
        }
        self.begin_lives(now, member);
        self.retry_at = now;
        if returned {
            self.unverify(member);
            self.walks.push(Walk::Offer { member });
        } else if known != 0 {
            self.walks.push(Walk::Forget { member });
        }
    }

    /// Something agreed on with a silent member was let go.
    pub(super) fn leave_behind(&mut self, member: MemberId) {
        self.peers.leave_behind(member);
    }

    pub(super) fn purge(&mut self, now: Time, member: MemberId) {
        self.peers.set(member, PeerState::Purge);
        self.give_up_all(now, member);
        // Before it can be Up again, with another table perhaps.
        self.drop_requests(member);
        self.contests.forget_places(member);
        self.walks.drop_those(|walk| *walk == Walk::Lose { member });
        self.counters.count(Counter::StreamsLost);
        for shard in 0..SHARDS_MAX as u8 {
            self.durable(stream_index(member, shard)).let_go();
            self.credit.drop_all(stream_index(member, shard));
        }
        self.walks.push(Walk::Purge { member });
    }

    /// Silent members whose time has come, and a stretch of the walk that is under way.
    pub(super) fn tick_walk(&mut self, now: Time) {
        for member in self.peers.down() {
            self.review_down(now, member);
        }
        self.abandon_one_way_peers(now);
        self.offer_again(now);
        let Some((walk, first)) = self.walks.next(now) else { return };
        let mut slot = first;
        let end = (slot + WALK_PER_TICK as u32).min(self.ledger.capacity());
        let stuck = self.dirty_for_the_silent();
        while slot < end && !self.is_walk_ahead(walk, stuck) {
            if slot + 8 < end {
                self.ledger.prefetch(slot + 8);
            }
            if !self.step(now, walk, slot) {
                break; // There is no room for a request, or no lease: go on here at the next tick.
            }
            slot += 1;
        }
        self.counters.add(Counter::SlotsWalked, (slot - first) as u64);
        // One that could not go on looks again a little later.
        let next_at = if slot == end { now } else { now.after(WALK_PAUSE) };
        if let Some(walk) = self.walks.come_to(slot, self.ledger.capacity(), next_at) {
            self.walk_done(now, walk);
        }
    }

    /// What was offered, and neither taken back nor released, is offered again.
    fn offer_again(&mut self, now: Time) {
        if !self.offer_at.reached(now) {
            return;
        }
        self.offer_at = Time::NEVER;
        let offered = std::mem::take(&mut self.offered);
        for member in members_in(offered) {
            if self.is_up(member) && !self.walks.contains(Walk::Offer { member }) {
                self.walks.push(Walk::Offer { member });
            }
        }
    }

    /// Connections here whose former active is this member are offered to it at the next tick.
    pub(super) fn ask_soon(&mut self, now: Time, member: MemberId) {
        self.offered |= 1 << member;
        self.offer_at = self.offer_at.min(now);
    }

    /// Who does not hear us acknowledges nothing.
    fn abandon_one_way_peers(&mut self, now: Time) {
        for member in self.peers.up_or(self.abandoned) {
            let seen = self.peers.seen(member);
            let hears_me = seen.hears_me;
            let one_way = self.is_up(member)
                && seen.status.is_alive()
                && !hears_me
                && seen.since.after(self.config.reprotect_after).reached(now);
            let bit = 1u64 << member;
            if one_way && self.abandoned & bit == 0 {
                self.abandoned |= bit;
                self.walks.push(Walk::Abandon { member });
            } else if hears_me && self.abandoned & bit != 0 {
                self.abandoned &= !bit;
                // What was claimed from it meanwhile it does not know.
                self.ask_soon(now, member);
            }
        }
    }

    fn abandon_slot(&mut self, now: Time, member: MemberId, slot: u32) -> bool {
        let line = self.ledger.line(slot);
        if line.peer().member() != member {
            return true;
        }
        match line.kind() {
            Kind::Active => {
                self.turn_away(slot);
                self.protect(now, slot);
            }
            Kind::Closing => self.ledger.drop_closing(slot),
            // What it was lent it lets go as well, with our new session.
            Kind::Leased => self.ledger.free(slot),
            _ => {}
        }
        true
    }

    /// Sending begins anew: what the member holds for us it must ask about.
    fn begin_lives(&mut self, now: Time, member: MemberId) {
        let seen = *self.peers.seen(member);
        for shard in 0..seen.shards {
            let stream = stream_index(member, shard);
            if !shards_can_meet(self.config.shard, self.config.shards, shard, seen.shards) {
                continue;
            }
            let sent = self.durable(stream).sent();
            self.give_up(now, stream, sent);
            self.durable(stream).begin_session(seen.table_id);
            self.credit.drop_leases(stream);
            self.outbox.begin_session(now, stream);
            self.enqueue(stream);
        }
    }

    /// Whether a walk must pause. What waits for a member that is not there, or does not hear us,
    /// and so is not acknowledged before a walk has found it another backup, holds up no walk.
    /// Before copies of a dead member become connections of ours they must be in the kernel: it is
    /// taken to know those better.
    fn is_walk_ahead(&self, walk: Walk, stuck: u64) -> bool {
        let unwritten = matches!(walk, Walk::Purge { .. }) && !self.commits.is_taken_over();
        self.ledger.all_dirty_actives() > WALK_AHEAD + stuck || !self.can_receive() || unwritten
    }

    /// Connections and closes that wait to be sent to members that are not there, or do not hear
    /// us.
    pub(super) fn dirty_for_the_silent(&self) -> u64 {
        let silent = self.busy.iter().filter(|stream| {
            let member = stream_member(**stream as usize);
            !self.is_up(member) || self.abandoned >> member & 1 == 1
        });
        silent.map(|stream| self.ledger.dirty(*stream as usize) as u64).sum()
    }

    /// When the next silent member's time has come; at once while a walk is under way.
    pub(super) fn walk_at(&self) -> Time {
        if !self.walks.is_empty() {
            return self.walks.next_at();
        }
        let again = self.offer_at;
        let downs = self.peers.down().filter_map(|member| match self.peers.state(member) {
            PeerState::Down { since, lost: false, .. } => {
                Some(since.after(self.config.reprotect_after))
            }
            _ => None,
        });
        let one_way = self.peers.view().others().filter(|(id, m)| {
            m.status.is_alive() && !m.hears_me && self.is_up(*id) && self.abandoned >> *id & 1 == 0
        });
        let one_way = one_way.map(|(_, m)| m.since.after(self.config.reprotect_after));
        downs.chain(one_way).fold(again, Time::min)
    }

    fn walk_done(&mut self, now: Time, walk: Walk) {
        match walk {
            Walk::Purge { member } => {
                for shard in 0..SHARDS_MAX as u8 {
                    assert!(
                        self.ledger.is_without(stream_index(member, shard)),
                        "something still refers to member {member}"
                    );
                }
                self.peers.set(member, PeerState::Vacant);
                self.review(now, member);
            }
            Walk::Rehome { away_from, .. } => {
                let leaving = self.bits(|m| m.status == Status::Leaving) & away_from;
                if members_in(leaving).any(|member| self.has_actives(member)) {
                    // Somebody is left who could not move yet.
                    self.walks.push_rehome(leaving, true);
                    self.walks.pause(now.after(REHOME_PAUSE));
                }
            }
            Walk::Forget { member } => {
                self.durable(stream_index(member, 0)).set_forgetting(false);
                self.retry_at = now;
            }
            Walk::Abandon { member } if self.is_up(member) => self.begin_lives(now, member),
            Walk::Commit { .. } => self.commits.end_takeover(),
            Walk::Compare { stream } => self.compared(stream),
            Walk::Offer { member } if self.offered >> member & 1 == 1 => {
                self.offer_at = now.after(OFFER_AGAIN);
            }
            Walk::Abandon { .. }
            | Walk::Verify { .. }
            | Walk::Offer { .. }
            | Walk::Lose { .. }
            | Walk::Unseen { .. }
            | Walk::Declined { .. }
            | Walk::Rewrite { .. } => {}
        }
    }

    fn has_actives(&self, member: MemberId) -> bool {
        let first = stream_index(member, 0);
        (first..first + SHARDS_MAX).any(|stream| self.ledger.actives(stream) > 0)
    }

    /// One slot of a walk; `false` if it must be looked at again.
    fn step(&mut self, now: Time, walk: Walk, slot: u32) -> bool {
        match walk {
            Walk::Purge { member } => self.purge_slot(now, member, slot),
            Walk::Commit { member } => self
                .commit_slot(member, slot, |slot, generation| Commit::Write { slot, generation }),
            Walk::Rehome { away_from, .. } => self.rehome_slot(now, away_from, slot),
            Walk::Abandon { member } => self.abandon_slot(now, member, slot),
            Walk::Verify { stream } => self.verify_slot(stream, slot),
            Walk::Offer { member } => self.offer_slot(member, slot),
            Walk::Lose { member } => self.lose_slot(member, slot),
            Walk::Compare { stream } => self.compare_slot(stream, slot),
            Walk::Unseen { stream } => self.unseen_slot(stream, slot),
            Walk::Rewrite { member } => self
                .commit_slot(member, slot, |slot, generation| Commit::Again { slot, generation }),
            Walk::Declined { member } => self.ask_declined(now, member, slot),
            Walk::Forget { member } => {
                if self.ledger.former(slot).member() == member && !self.ledger.is_moving(slot) {
                    // Nobody asks for it back any more. Until traffic shows up it is presumed all
                    // the same: then its own place stands there.
                    let own = self.coordinate(slot);
                    let former = if self.is_presumed(slot) { own } else { Coordinate::NOWHERE };
                    self.ledger.set_former(slot, former);
                }
                true
            }
        }
    }

    fn purge_slot(&mut self, now: Time, member: MemberId, slot: u32) -> bool {
        let line = self.ledger.line(slot);
        let peer = line.peer();
        if peer.member() != member {
            return true;
        }
        match line.kind() {
            Kind::Active => {
                self.turn_away(slot);
                self.protect(now, slot);
            }
            Kind::Backup => {
                let has_no_entry = self.ledger.on(slot) == On::Missing;
                if self.drop_outlived(slot) {
                    return true;
                }
                self.end_missing(slot);
                self.counters.count(Counter::Promotions);
                let previous = self.ledger.promote(slot, |line| {
                    if is(Mutation::PromotionOutranks) {
                        line.set_stamp(line.stamp().claimed());
                    }
                });
                self.protect_promoted(now, slot, previous);
                self.ask_commit(Commit::Refresh { slot, generation: line.generation() });
                if has_no_entry && self.config.commit == CommitMode::Takeover {
                    self.owe(now, slot);
                }
            }
            Kind::Closing => self.ledger.drop_closing(slot),
            Kind::Leased => self.ledger.free(slot),
            Kind::Held | Kind::Free => {}
        }
        true
    }

    /// If the tuple of the copy in this slot lives on in another one, the copy goes: it was of a
    /// connection before, or of an older state. The kernel's entry is that one's.
    fn drop_outlived(&mut self, slot: u32) -> bool {
        let original = self.ledger.tuples(slot).0;
        let goes_on =
            |other| self.lives(other, slot, &original) && !self.is_older_copy(other, slot);
        let is_outlived = self.ledger.index.find(&original, goes_on).is_some();
        if is_outlived {
            self.end_missing(slot);
            self.ledger.end_copy(slot);
            self.ledger.clear(slot);
            self.delete_entry(&original);
        }
        is_outlived
    }

    /// What waits only for a member that is lost goes; the kernel may forget copies of its
    /// connections as any other.
    fn lose_slot(&mut self, member: MemberId, slot: u32) -> bool {
        let line = self.ledger.line(slot);
        if line.peer().member() == member
            && matches!(self.peers.state(member), PeerState::Down { .. })
        {
            match line.kind() {
                Kind::Closing => self.ledger.drop_closing(slot),
                Kind::Backup if self.drop_outlived(slot) => {}
                Kind::Backup => {
                    self.ask_commit(Commit::Refresh { slot, generation: line.generation() })
                }
                _ => {}
            }
        }
        true
    }

    fn commit_slot(
        &mut self,
        member: MemberId,
        slot: u32,
        commit: fn(u32, Generation) -> Commit,
    ) -> bool {
        let line = self.ledger.line(slot);
        if line.kind() == Kind::Backup && line.peer().member() == member {
            self.ask_commit(commit(slot, line.generation()));
        }
        true
    }

    /// Whether copies of a member that is gone are still to be written to the kernel.
    pub fn is_taking_over(&self) -> bool {
        self.walks.iter().any(|walk| matches!(walk, Walk::Commit { .. }))
    }

    /// Whether this member, or a living one that it is the backup of, has a connection with this
    /// tuple in another slot.
    pub(super) fn lives_besides(&self, slot: u32, original: &Tuple) -> bool {
        self.ledger.index.find(original, |other| self.lives(other, slot, original)).is_some()
    }

    fn lives(&self, other: u32, slot: u32, original: &Tuple) -> bool {
        let line = self.ledger.line(other);
        other != slot
            && line.kind().is_connection()
            && self.ledger.tuples(other).0 == *original
            && (line.kind() != Kind::Backup || self.is_up(line.peer().member()))
    }

    /// Whether the other slot has a copy of the very connection in this one, in an older state: two
    /// members took it for theirs, and what the other active does not know is here alone.
    fn is_older_copy(&self, other: u32, slot: u32) -> bool {
        self.ledger.kind(other) == Kind::Backup
            && self.ledger.tuples(other) == self.ledger.tuples(slot)
            && self.ledger.line(other).stamp() < self.ledger.line(slot).stamp()
    }

    /// A copy became active here, and its former active is gone. If that had named a `previous`
    /// backup, the pair with it is the one that is left, so that only one of the two carries on.
    pub(super) fn protect_promoted(&mut self, now: Time, slot: u32, previous: Coordinate) {
        assert!(self.ledger.on(slot) == On::None);
        // A member that came back with other shards has nothing there.
        let shards = self.peers.seen(previous.member().min(MEMBERS_MAX as MemberId)).shards.max(1);
        let fits = previous.shard() == shard_of(&self.ledger.tuples(slot).0, shards);
        let ours = previous.member() == self.config.member;
        if previous.is_somewhere() && fits && !ours && self.is_up(previous.member()) {
            self.assign(now, slot, previous);
        } else {
            self.ledger.amend(slot, |line| {
                line.set_groups(groups::ALL);
                line.set_last(Seq::NONE);
            });
            self.protect(now, slot);
        }
    }

    fn rehome_slot(&mut self, now: Time, away_from: u64, slot: u32) -> bool {
        let line = self.ledger.line(slot);
        let member = line.peer().member();
        let concerned = line.kind() == Kind::Active
            && away_from >> member & 1 == 1
            && self.is_up(member)
            && !self.ledger.is_moving(slot)
            && matches!(self.ledger.on(slot), On::None | On::Dirty);
        if !concerned {
            return true;
        }
        if !self.requests.has_room(Rank::Question) {
            return false;
        }
        match self.lease_for(now, slot, away_from) {
            Candidate::At(backup) => {
                let taken = self.move_backup(now, slot, backup);
                assert!(taken, "there was room for a request");
                true
            }
            Candidate::Soon => false,
            Candidate::Nobody => true,
        }
    }

    fn verify_slot(&mut self, stream: usize, slot: u32) -> bool {
        if !self.is_up(stream_member(stream)) {
            return true;
        }
        let line = self.ledger.line(slot);
        let (peer, former) = (line.peer(), self.ledger.former(slot));
        let own = Place { slot, generation: line.generation() };
        let on_stream = |c: Coordinate| c.is_somewhere() && self.stream_of(c) == stream;
        match line.kind() {
            Kind::Leased
                if on_stream(peer) && line.session() != self.durable(stream).peer_session() =>
            {
                self.ledger.free(slot);
            }
            Kind::Backup if on_stream(peer) => return self.offer(peer, own),
            Kind::Active if on_stream(former) && !self.ledger.is_moving(slot) => {
                return self.offer(former, own);
            }
            _ => {}
        }
        true
    }

    fn offer_slot(&mut self, member: MemberId, slot: u32) -> bool {
        let line = self.ledger.line(slot);
        let former = self.ledger.former(slot);
        let concerned = line.kind() == Kind::Active
            && former.member() == member
            && !self.ledger.is_moving(slot)
            && self.is_up(member);
        if !concerned {
            return true;
        }
        if self.offered == 0 {
            self.offer_at = Time::NEVER; // Until the walk is done.
        }
        self.offered |= 1 << member;
        self.offer(former, Place { slot, generation: line.generation() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::Stamp;
    use crate::group::view::Member;
    use crate::memory::{MemorySize, OwnedMemory};
    use crate::sync::replica::test_config as config;
    use crate::sync::requests::Task;

    #[test]
    fn a_member_that_comes_and_goes_all_the_time_leaves_no_pile_of_walks() {
        // Each return once put a walk behind those that waited, and each silence one before them.
        let owned = OwnedMemory::new(&MemorySize::new(256, 512 << 10));
        let mut replica = Replica::new(config(), owned.parts());
        let mut view = View::new(1);
        for n in 0..4000 {
            for (member, status) in
                [(2, Status::Ready), (3, Status::Ready), (2, Status::Dead), (3, Status::Leaving)]
            {
                let (table_id, priority) = (7, n as u8);
                view.set(
                    member,
                    Member { status, table_id, priority, shards: 1, room: 1, ..Member::default() },
                );
                replica.handle_view(Time(1), &view);
                replica.leave_behind(member);
            }
        }
        // Of each kind one; two that move backups away from those who leave, or have a lower
        // priority.
        assert!(replica.walks.iter().count() < 12);
    }

    /// Seed 60002087: a late pass purged a silent member to the end, and the next view brought it
    /// back with another table before any request was looked at again.
    #[test]
    fn what_a_member_was_to_be_told_is_not_told_to_its_next_table() {
        let owned = OwnedMemory::new(&MemorySize::new(256, 512 << 10));
        let mut replica = Replica::new(config(), owned.parts());
        let mut view = View::new(1);
        let mut see = |replica: &mut Replica<'_>, now, member, status, table_id| {
            view.set(member, Member { status, table_id, shards: 1, room: 1, ..Member::default() });
            replica.handle_view(now, &view);
        };
        let now = Time(1);
        see(&mut replica, now, 2, Status::Ready, 7);
        see(&mut replica, now, 3, Status::Ready, 8);
        see(&mut replica, now, 2, Status::Dead, 7);
        replica.tick(now);
        let target = Coordinate::new(2, 0, 5, Generation::default());
        let own = Place { slot: 6, generation: Generation::default() };
        assert!(replica.release(Rank::Consequence, target, Stamp { epoch: 0, version: 1 }));
        assert!(replica.request(
            Rank::Question,
            Task::Decline { own, number: 1, fault: None },
            target
        ));
        let late = now.after(replica.config.reprotect_after);
        replica.tick(late);
        assert_eq!(replica.peers.state(2), PeerState::Vacant, "nothing here refers to it any more");
        see(&mut replica, late, 2, Status::Ready, 9);
        assert!(replica.is_up(2));
        replica.transmit(late, usize::MAX);
        assert_eq!(
            replica.counters.get(Counter::DeltasRelease),
            0,
            "the place is another table's now"
        );
        assert_eq!(replica.requests.len(), 0);
    }
}
