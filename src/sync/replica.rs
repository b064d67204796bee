//! The state of one shard's protocol, and the verbs that its parts share: mark dirty, give a
//! connection a backup, count what is exposed.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::commits::Commits;
use super::compare::Comparisons;
use super::contests::Contests;
use super::credit::Credit;
use super::full_sync::FullSyncs;
use super::history::History;
use super::inbox::Inbox;
use super::ledger::Ledger;
use super::mutation::{Mutation, is};
use super::outbox::Outbox;
use super::peers::Peers;
use super::requests::Requests;
use super::sends::Sends;
use super::stream::{Durable, Stream, stream_index, stream_member};
use super::walks::Walks;
use crate::ccp::message::Place;
use crate::conn::slot::groups;
use crate::conn::table::{On, Table};
use crate::conn::tuple::shards_met;
use crate::conn::{Coordinate, Kind, MemberId, Phase, Tuple, shard_of};
use crate::counters::{Counter, Counters};
use crate::group::view::Member;
use crate::limits::STREAMS_MAX;
use crate::memory::{JOURNAL_DECLINES, Memory};
use crate::seq::Seq;
use crate::source::{Commit, CommitMode};
use crate::time::Time;

/// How long a member without a leased slot is waited for before the next best is asked.
const STARVED: Duration = Duration::from_millis(100);

/// How often connections that found no backup are looked at again.
const RETRY: Duration = Duration::from_millis(10);

/// How long a connection that was refused as older waits before it asks again.
pub(super) const BACK_OFF: Duration = Duration::from_secs(1);

/// Whether a connection can have a backup.
pub(super) enum Candidate {
    /// In this slot.
    At(Coordinate),
    /// The best member was asked for slots a moment ago.
    Soon,
    /// Not now.
    Nobody,
}

/// What a shard's protocol is told at its start.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    /// The group's number.
    pub group: u16,
    /// This member.
    pub member: MemberId,
    /// This shard.
    pub shard: u8,
    /// Shards of this member.
    pub shards: u8,
    /// Its site, 0 if unused.
    pub site: u8,
    /// This life of its table.
    pub table_id: u32,
    /// Key of the index.
    pub index_key: u64,
    /// Connections younger than this are never sent.
    pub hold: Duration,
    /// How long after a member's death its connections get new backups.
    pub reprotect_after: Duration,
    /// How long a change may wait for others to travel with.
    pub flush: Duration,
    /// How often two sides of a stream compare what they hold.
    pub compare: Duration,
    /// When copies are written to the kernel.
    pub commit: CommitMode,
}

/// What the unit tests of the parts tell a shard.
#[cfg(test)]
pub(crate) fn test_config() -> ReplicaConfig {
    ReplicaConfig {
        group: 7,
        member: 1,
        shard: 0,
        shards: 1,
        site: 0,
        table_id: 1,
        index_key: 1,
        hold: Duration::ZERO,
        reprotect_after: Duration::from_secs(2),
        flush: Duration::ZERO,
        compare: Duration::from_secs(1),
        commit: CommitMode::Takeover,
    }
}

/// One shard's protocol.
pub struct Replica<'m> {
    pub(super) config: ReplicaConfig,
    pub(super) memory: Memory<'m>,
    pub(super) counters: Counters<'m>,
    pub(super) ledger: Ledger<'m>,
    pub(super) streams: Vec<Stream>,
    pub(super) busy: VecDeque<u16>,
    pub(super) credit: Credit<'m>,
    pub(super) outbox: Outbox<'m>,
    pub(super) sends: Sends,
    pub(super) inbox: Inbox<'m>,
    pub(super) requests: Requests,
    pub(super) contests: Contests,
    pub(super) peers: Peers,
    /// Members that do not hear us and whose copies of ours were given up, as bits.
    pub(super) abandoned: u64,
    /// Silent members, since a resume, whose copies may have to be written to the kernel, as bits.
    pub(super) unwritten: u64,
    pub(super) walks: Walks,
    /// Members to which connections are offered again if nobody answered by then, as bits.
    pub(super) offered: u64,
    pub(super) offer_at: Time,
    /// Since when the source has had more to tell than was read: of what is held, some may have
    /// ended.
    pub(super) source_behind_since: Option<Time>,
    /// Nothing is held back any more.
    pub(super) is_leaving: bool,
    /// What the source had at the start was read.
    pub(super) source_is_read: bool,
    /// Events were lost, and what they told is not found out yet.
    pub(super) source_has_lost: bool,
    /// Everything that had arrived by then was taken.
    pub(super) received_until: Time,
    /// Declines said so far.
    pub(super) declines: u32,
    /// Whether the kernel's table has room for further copies.
    pub(super) kernel_has_room: bool,
    /// See [`Replica::set_longest_timeout`].
    pub(super) longest_timeout_s: u32,
    pub(super) retry_at: Time,
    pub(super) commits: Commits,
    pub(super) goodbyes: u64,
    pub(super) comparisons: Comparisons,
    /// Streams whose sides must agree before their connections count as protected.
    pub(super) unverified: u32,
    /// How far the full sync to each member is.
    pub(super) full_syncs: FullSyncs,
}

impl<'m> Replica<'m> {
    /// A shard with an empty table over zeroed memory.
    pub fn new(config: ReplicaConfig, memory: Memory<'m>) -> Replica<'m> {
        let table = Table::new(&memory, config.index_key);
        let (credit, history) = (Credit::new(memory.leases, memory.streams), History::new(&memory));
        Replica::over(config, memory, table, credit, history)
    }

    pub(super) fn over(
        config: ReplicaConfig,
        memory: Memory<'m>,
        table: Table<'m>,
        credit: Credit<'m>,
        history: History<'m>,
    ) -> Replica<'m> {
        assert!(config.table_id != 0 && config.shard < config.shards);
        Replica {
            counters: Counters::new(memory.counters),
            ledger: Ledger::over(table),
            streams: (0..STREAMS_MAX).map(|_| Stream::new()).collect(),
            busy: VecDeque::with_capacity(STREAMS_MAX),
            credit,
            outbox: Outbox::new(history, memory.streams),
            sends: Sends::new(),
            inbox: Inbox::new(memory.streams),
            requests: Requests::new(),
            contests: Contests::new(),
            peers: Peers::new(config.member),
            abandoned: 0,
            unwritten: 0,
            walks: Walks::new(),
            offered: 0,
            offer_at: Time::NEVER,
            source_behind_since: None,
            is_leaving: false,
            source_is_read: true,
            source_has_lost: false,
            received_until: Time(0),
            declines: memory.journal[JOURNAL_DECLINES].load(Ordering::Relaxed) as u32,
            kernel_has_room: true,
            longest_timeout_s: 0,
            retry_at: Time(0),
            commits: Commits::new(config.commit),
            goodbyes: 0,
            comparisons: Comparisons::new(),
            unverified: 0,
            full_syncs: FullSyncs::new(),
            memory,
            config,
        }
    }

    /// The durable half of a stream.
    pub(super) fn durable(&self, stream: usize) -> Durable<'m> {
        Durable(&self.memory.streams[stream])
    }

    /// The stream to the place that a coordinate names.
    pub(super) fn stream_of(&self, peer: Coordinate) -> usize {
        stream_index(peer.member(), peer.shard())
    }

    /// Whether the member's table, as far as this shard knows it, still lives.
    pub(super) fn is_up(&self, member: MemberId) -> bool {
        self.peers.is_up(member)
    }

    /// Whether the member may come back with the table that this shard knows, and nothing that was
    /// agreed with it has been let go.
    pub(super) fn may_return(&self, member: MemberId) -> bool {
        self.peers.may_return(member)
    }

    /// The coordinate of one of our own slots.
    pub fn coordinate(&self, slot: u32) -> Coordinate {
        Coordinate::new(
            self.config.member,
            self.config.shard,
            slot,
            self.ledger.line(slot).generation(),
        )
    }

    /// How a member looks, as the last view said.
    pub fn seen(&self, member: MemberId) -> &Member {
        self.peers.seen(member)
    }

    /// Read access to the table, for commits, tests and tools.
    pub fn table(&self) -> &Table<'m> {
        &self.ledger
    }

    /// Slots that copies of other members may have: none while the kernel has no room for their
    /// entries.
    pub fn room(&self) -> u32 {
        if self.kernel_has_room { self.ledger.room() } else { 0 }
    }

    /// Says whether the kernel's table has room for further copies. Without it no slots are leased.
    pub fn set_kernel_room(&mut self, has_room: bool) {
        self.kernel_has_room = has_room;
    }

    /// Says what this kernel gives a TCP connection's entry at most, in seconds: what lacks of it
    /// tells how old its last packet is. Until then nothing is told of that.
    pub fn set_longest_timeout(&mut self, seconds: u32) {
        self.longest_timeout_s = seconds;
    }

    /// Says whether the source has more to tell than was read. While it has, no hold ends, for a
    /// second at most: the end of what would be sent may wait to be read.
    pub fn set_source_behind(&mut self, now: Time, is_behind: bool) {
        self.source_behind_since = is_behind.then(|| self.source_behind_since.unwrap_or(now));
    }

    /// This member is about to leave: connections are sent however young they are.
    pub fn handle_leaving(&mut self) {
        self.is_leaving = true;
    }

    /// Says whether what the source had at the start was read. Until then no copy is taken: in its
    /// place the source may have a connection of which it told nobody.
    pub fn set_source_read(&mut self, is_read: bool) {
        self.source_is_read = is_read;
    }

    /// Events were lost: the next connection of a tuple may have begun on the entry of a copy, or
    /// on what is to be one's, unheard.
    pub fn handle_lost(&mut self) {
        self.source_has_lost = true;
        self.ledger.doubt_written();
    }

    /// What the source has was read anew since.
    pub fn handle_made_up_for(&mut self) {
        self.source_has_lost = false;
    }

    /// Everything that had arrived by then was taken. What comes next arrived later.
    pub fn received_all(&mut self, until: Time) {
        self.received_until = until;
    }

    /// The next commit that the kernel is owed. With `may_delete` false deletes stay for later: the
    /// source has more to tell, and what they name may be another connection's entry by now.
    pub fn poll_commit(&mut self, may_delete: bool) -> Option<Commit> {
        let table = &self.ledger;
        self.commits.poll(may_delete, |original| table.find_original(original).is_some())
    }

    /// Whether entries wait to be deleted.
    pub fn has_deletes(&self) -> bool {
        self.commits.has_deletes()
    }

    /// Whether the entry with this original tuple waits to be deleted: what was read of it before
    /// says nothing any more.
    pub fn deletes(&self, original: &Tuple) -> bool {
        self.commits.deletes(original)
    }

    /// Commits waiting.
    pub fn commits_waiting(&self) -> usize {
        self.commits.waiting()
    }

    /// Commits asked for since the start. Once [`commits_done`](Self::commits_done) has reached
    /// what this was, the kernel was asked for everything until then, and has answered.
    pub fn commits_asked(&self) -> u64 {
        self.commits.asked()
    }

    /// Commits taken by the kernel's side since the start.
    pub fn commits_done(&self) -> u64 {
        self.commits.done()
    }

    /// How many datagrams can be taken now: each may ask for as many commits as it has deltas.
    pub fn receive_room(&self) -> usize {
        self.commits.room()
    }

    /// Whether a datagram can be taken now.
    pub(super) fn can_receive(&self) -> bool {
        self.receive_room() > 0
    }

    /// Members that said goodbye since the last call, as bits.
    pub fn take_goodbyes(&mut self) -> u64 {
        std::mem::take(&mut self.goodbyes)
    }

    /// Queues a stream for the transmit stage.
    pub(super) fn enqueue(&mut self, stream: usize) {
        if !self.streams[stream].busy {
            self.streams[stream].busy = true;
            self.busy.push_back(stream as u16);
        }
    }

    /// A connection (or its close) must be sent: `changed` groups are new since the last delta.
    pub(super) fn mark_dirty(&mut self, now: Time, slot: u32, changed: u8) {
        let stream = self.stream_of(self.ledger.line(slot).peer());
        let (floor, was_empty) = (self.durable(stream).floor(), self.ledger.dirty(stream) == 0);
        let is_known = |last: Seq| {
            let is_sent = is(Mutation::MaskSinceSent) && last != Seq::NONE;
            is_sent || last.is_passed_by(floor)
        };
        if self.ledger.mark_dirty(now, slot, changed, is_known) {
            self.send_soon(now, stream, was_empty);
        }
    }

    /// Something is dirty: unless there `was` before, it waits a little for others.
    pub(super) fn send_soon(&mut self, now: Time, stream: usize, was_empty: bool) {
        if was_empty {
            self.streams[stream].flush_at = now.after(self.config.flush);
        }
        self.enqueue(stream);
    }

    /// An active connection without a backup gets one, or waits for one.
    pub(super) fn protect(&mut self, now: Time, slot: u32) {
        let line = self.ledger.line(slot);
        assert!(
            line.kind() == Kind::Active
                && !line.peer().is_somewhere()
                && self.ledger.on(slot) == On::None
        );
        if self.is_best_left(slot) && self.go_back(now, slot) {
            return;
        }
        match self.lease_for(now, slot, 0) {
            Candidate::At(backup) => self.assign(now, slot, backup),
            Candidate::Soon | Candidate::Nobody if self.go_back(now, slot) => {}
            Candidate::Soon | Candidate::Nobody => self.ledger.wait(now, slot),
        }
    }

    /// Whether the connection in this slot changes its backup, and the previous one is the best by
    /// now.
    fn is_best_left(&self, slot: u32) -> bool {
        let best = self.peers.ranked().iter().find(|member| self.is_up(**member));
        self.ledger.is_moving(slot) && best == Some(&self.ledger.former(slot).member())
    }

    /// Takes a slot at the best member that has leased one, except the members in `except` (bits).
    pub(super) fn lease_for(&mut self, now: Time, slot: u32, except: u64) -> Candidate {
        let original = self.ledger.tuples(slot).0;
        let former = self.ledger.former(slot);
        // What is only presumed is offered to its former active, never sent there as if it were
        // ours; and one that changes its backup goes back to the copy that its previous one still
        // has, or elsewhere: of two copies at one member only one would be named.
        let not_there = former.is_somewhere()
            && (self.ledger.is_moving(slot) || !self.ledger.line(slot).is_claimed());
        let except = if not_there { except | 1 << former.member() } else { except };
        for i in 0..self.peers.ranked().len() {
            let member = self.peers.ranked()[i];
            if except >> member & 1 == 1 || !self.is_up(member) {
                continue;
            }
            let shard = shard_of(&original, self.peers.seen(member).shards);
            let stream = stream_index(member, shard);
            if let Some(place) = self.take_lease(now, stream) {
                return Candidate::At(Coordinate::new(member, shard, place.slot, place.generation));
            }
            self.counters.count(Counter::NoLease);
            if self.credit.starved_for(now, stream) < STARVED {
                return Candidate::Soon; // It was asked just now: the best backup is worth a short wait.
            }
        }
        Candidate::Nobody
    }

    /// A slot at a peer is empty again, one life later: it goes back to the stream's lease, if it
    /// was leased in the session that the peer's half of the stream is in now. In an earlier one it
    /// was taken back.
    pub(super) fn return_lease(&mut self, slot: Coordinate, session: u16) {
        let stream = self.stream_of(slot);
        if session == self.durable(stream).peer_session() {
            self.credit.put(stream, Place::of(slot.next_life()));
        }
    }

    fn take_lease(&mut self, now: Time, stream: usize) -> Option<Place> {
        let place = self.credit.take(stream);
        if self.credit.replenish(now, stream, self.waiting_share(stream)) {
            self.enqueue(stream);
        }
        place
    }

    /// Of what waits for a backup, the stream's share: what one stream hoards another may lack.
    fn waiting_share(&self, stream: usize) -> u64 {
        let met = shards_met(self.config.shards, self.peers.seen(stream_member(stream)).shards);
        (self.ledger.waiting()).div_ceil(met as u64)
    }

    fn tick_leases(&mut self, now: Time) {
        if !self.credit.begin_review(now) {
            return;
        }
        let best = self.peers.ranked().first().copied();
        for stream in 0..self.streams.len() {
            let is_first_choice = best == Some(stream_member(stream));
            if self.credit.has_leases(stream)
                && self.credit.review(now, stream, is_first_choice, self.waiting_share(stream))
            {
                self.enqueue(stream);
            }
        }
    }

    /// The connection's backup is there from now on; everything must be sent to it.
    pub(super) fn assign(&mut self, now: Time, slot: u32, backup: Coordinate) {
        let session = self.durable(self.stream_of(backup)).peer_session();
        self.ledger.assign(slot, backup, session);
        self.mark_dirty(now, slot, groups::ALL);
    }

    /// The connection turns to somebody else than the member that has its other copy. If that was
    /// its active, and never heard of the claim, it goes on taking itself for the active: it is
    /// remembered, to be told when it is back.
    pub(super) fn turn_away(&mut self, slot: u32) {
        let line = self.ledger.line(slot);
        let peer = line.peer();
        let unheard = line.is_claimed()
            && line.groups() & groups::TUPLES != 0
            && !(self.ledger.on(slot) == On::None
                && line.last().is_passed_by(self.durable(self.stream_of(peer)).floor()));
        let former = if unheard && !self.ledger.former(slot).is_somewhere() {
            peer
        } else {
            Coordinate::NOWHERE
        };
        self.ledger.unassign(slot);
        if former.is_somewhere() {
            self.ledger.set_former(slot, former);
        }
    }

    /// Asks for a commit if it is one that this mode makes.
    pub(super) fn ask_commit(&mut self, commit: Commit) {
        let (table, peers) = (&self.ledger, &self.peers);
        self.commits.ask(commit, || {
            let Commit::Write { slot, .. } = commit else { return false };
            !peers.is_up(table.line(slot).peer().member())
        });
    }

    /// Every timer that has come.
    pub fn tick(&mut self, now: Time) {
        self.tick_holds(now);
        self.tick_waiting(now);
        self.tick_leases(now);
        self.tick_missing(now);
        self.tick_contests(now);
        self.tick_requests();
        self.tick_walk(now);
        self.tick_digests(now);
        self.tick_full_syncs(now);
        self.publish_gauges(now);
    }

    fn tick_waiting(&mut self, now: Time) {
        while self.back_off_at().reached(now)
            && let Some(slot) = self.ledger.take_backing_off()
        {
            self.protect(now, slot);
        }
        if self.ledger.waiting() == 0 {
            self.full_syncs.tried(now, false);
        }
        if self.ledger.waiting() == 0 || !self.retry_at.reached(now) {
            return;
        }
        // Live changes first; who finds no backup goes to the end of the queue.
        let mut failed = 0;
        let budget = self.waiting_budget();
        for _ in 0..budget {
            let since = self.ledger.first_waiting().map_or(now, |slot| self.ledger.since(slot));
            let Some(slot) = self.ledger.take_waiting() else { break };
            if !self.ledger.former(slot).is_somewhere()
                && self.ledger.connection(slot).phase() == Phase::Ending
            {
                // Nobody has heard of it, or lives who has, and need not any more: it stays here
                // until its end is told.
                self.ledger.hold_to_the_end(slot);
                continue;
            }
            match self.lease_for(now, slot, 0) {
                Candidate::At(backup) => {
                    // What waits is asked for by its number; only what comes anew makes a rate.
                    self.credit.discount(self.stream_of(backup));
                    self.assign(now, slot, backup);
                }
                Candidate::Soon | Candidate::Nobody if self.go_back(now, slot) => {}
                Candidate::Soon | Candidate::Nobody => {
                    self.ledger.wait(since, slot);
                    failed += 1;
                    if failed > 64 {
                        break;
                    }
                }
            }
        }
        if budget > 0 {
            self.full_syncs.tried(now, failed == budget || failed > 64);
        }
        // A lease that arrives ends the pause.
        self.retry_at = now.after(if failed == 0 { Duration::from_millis(1) } else { RETRY });
    }

    /// Connections past the hold time that have no up-to-date acknowledged second copy.
    pub fn exposure(&self) -> u64 {
        let orphaned: u64 = self.peers.gone().map(|member| self.of_member(member)).sum();
        let waiting = self.ledger.unprotected();
        let unacknowledged =
            if is(Mutation::ExposureForgets) { 0 } else { self.outbox.unacknowledged() };
        self.ledger.all_dirty_actives()
            + unacknowledged
            + waiting
            + orphaned
            + self.ledger.declined().0
            + self.unverified_connections()
    }

    /// Connections whose other copy is at this member.
    fn of_member(&self, member: MemberId) -> u64 {
        let first = stream_index(member, 0);
        let shards = first..first + crate::limits::SHARDS_MAX;
        shards.map(|stream| self.ledger.copies(stream) + self.uncounted(stream)).sum()
    }

    /// Connections on this stream that do not count as exposed by themselves: neither dirty nor in
    /// a datagram that is not acknowledged. Closes that wait are none of them.
    pub(super) fn uncounted(&self, stream: usize) -> u64 {
        let (actives, dirty) = (self.ledger.actives(stream), self.ledger.dirty_actives(stream));
        actives - (dirty + self.outbox.unacknowledged_on(stream)).min(actives)
    }

    fn publish_gauges(&mut self, now: Time) {
        let exposure = self.exposure();
        self.counters.set(Counter::Exposure, exposure);
        self.counters.set(Counter::Unprotected, self.ledger.unprotected());
        self.counters.set(Counter::ReleasesPending, self.requests.len() as u64);
        self.counters.set(Counter::CommitPending, self.commits.waiting() as u64);
        self.counters
            .set(Counter::CommitMissing, self.ledger.missing() + self.commits.owed() as u64);
        let (declined, declined_since) = self.ledger.declined();
        self.counters.set(Counter::Declined, declined);
        let mut oldest = now;
        if exposure > 0 {
            for slot in
                [self.ledger.first_waiting(), self.ledger.first_backing_off()].into_iter().flatten()
            {
                oldest = oldest.min(self.ledger.since(slot));
            }
            for i in 0..self.busy.len() {
                if let Some(slot) = self.ledger.first_dirty(self.busy[i] as usize) {
                    oldest = oldest.min(self.ledger.since(slot));
                }
                if let Some(since) = self.outbox.oldest_change(self.busy[i] as usize) {
                    oldest = oldest.min(since);
                }
            }
            if declined > 0 {
                oldest = oldest.min(declined_since);
            }
            oldest = oldest.min(self.peers.silent_since().unwrap_or(now));
        }
        self.counters.set(Counter::ExposureOldestUs, now.since(oldest).as_micros() as u64);
    }
}
