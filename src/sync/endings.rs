//! Endings: closes and releases, and what is left of a copy when its active ends it or lets it go.

use super::contests::Doubt;
use super::delta::DeltaResult::{self, Applied, Busy};
use super::ingest::LastPackets;
use super::mutation::{Mutation, is};
use super::replica::Replica;
use super::requests::Rank;
use super::stream::{stream_member, stream_shard};
use crate::ccp::message::{Ended, Place};
use crate::conn::slot::Line;
use crate::conn::table::{On, Written};
use crate::conn::{Coordinate, Kind, Stamp, Tuple};
use crate::counters::Counter;
use crate::source::{Commit, CommitMode, Elsewhere};
use crate::time::Time;

/// What may be left of a copy that is none any more.
enum Rest {
    /// Its active saw it end.
    Nothing,
    /// Its packets may take their way through here, although its active has it no more, or another
    /// backup.
    Perhaps {
        /// What it had there.
        stamp: Stamp,
        /// Whether this member's own source saw it.
        is_witnessed: bool,
        /// What becomes of its entry if no packets show.
        doubt: Doubt,
        /// What is known of the entry of its active.
        elsewhere: Elsewhere,
    },
}

impl Replica<'_> {
    /// The slot that a close or a release is for, if it still is in the life that it names. If not,
    /// what should end has ended.
    fn ending(&self, target: Place) -> Option<Line> {
        let line = self.line_at(target);
        let counter = if line.is_none() { Counter::RejectTarget } else { Counter::DeltasClosed };
        let line = line.filter(|line| {
            line.generation() == target.generation || is(Mutation::NoGenerationCheck)
        });
        if line.is_none() {
            self.counters.count(counter);
        }
        line
    }

    /// Whether this active connection was only presumed dead at the sender: no traffic was seen
    /// here since.
    fn is_presumed_from(&self, slot: u32, stream: usize) -> bool {
        self.is_presumed(slot) && self.stream_of(self.ledger.former(slot)) == stream
    }

    /// Whether a close or release with this stamp comes from who claimed the connection in this
    /// slot, which is active here: above what is here, and after it, or at the same time. (An equal
    /// stamp may be one's own that comes back.)
    fn is_claimed_above(&self, slot: u32, stamp: Stamp) -> bool {
        let own = self.ledger.line(slot).stamp();
        stamp.epoch > own.epoch || stamp > own && !self.is_presumed(slot)
    }

    pub(super) fn apply_close(
        &mut self,
        now: Time,
        stream: usize,
        target: Place,
        stamp: Stamp,
        ended: Ended,
    ) -> DeltaResult {
        let seen = ended == Ended::Seen;
        let Some(line) = self.ending(target) else { return Applied };
        let from_pair = line.peer().is_somewhere() && self.stream_of(line.peer()) == stream;
        let is_presumed_from =
            line.kind() == Kind::Active && self.is_presumed_from(target.slot, stream);
        // Whether what is left is agreed to be the sender's lease.
        let mut is_lease = true;
        match line.kind() {
            // The new never came and never will: its place remembers that.
            Kind::Leased if self.is_leased_to(&line, stream) => {
                if !is(Mutation::NoTombstone) {
                    self.ledger.skip_life(target.slot);
                }
            }
            Kind::Backup if from_pair => {
                if seen {
                    self.ledger.set_passed_until(target.slot, 0);
                }
                if self.source_has_lost && self.ledger.written(target.slot) == Written::No {
                    // It was this member's own until just now.
                    self.ledger.set_written(target.slot, Written::Resumed);
                }
                let was_away = self.ledger.written(target.slot) == Written::Resumed;
                let is_over = seen && !was_away || is(Mutation::EndsUnasked);
                let rest = match is_over && !line.is_claimed() {
                    true => Rest::Nothing,
                    false => Rest::Perhaps {
                        stamp,
                        is_witnessed: line.is_claimed(),
                        doubt: Doubt::Closed,
                        elsewhere: self.elsewhere(ended),
                    },
                };
                if !seen && was_away {
                    // Whichever connection has passed it, nobody saw that end.
                    self.ledger.set_written(target.slot, Written::Yes);
                }
                self.drop_copy(now, target.slot, stream, rest);
            }
            // Claimed and closed there: this member may have let go of the pair before it heard of
            // that, or have found another slot for the copy. Or presumed while the former active
            // lived.
            Kind::Active
                if self.is_claimed_above(target.slot, stamp)
                    && !is(Mutation::EarlyCloseIgnored)
                    || is_presumed_from && stamp.epoch >= line.stamp().epoch =>
            {
                if !self.requests.has_room(Rank::Consequence) {
                    return Busy;
                }
                self.drop_active(now, target.slot, stream, stamp, (Doubt::Closed, seen));
                is_lease = from_pair || is_presumed_from;
            }
            Kind::Backup | Kind::Active => {
                // Its sender takes the slot's next life for its own when this is acknowledged.
                self.ledger.amend(target.slot, |line| line.set_spent(true));
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
            self.ledger.free(target.slot);
        }
        self.counters.count(Counter::DeltasApplied);
        Applied
    }

    /// What this close tells of the entry that its active had. (It may have waited here for as long
    /// as this process stood still.)
    fn elsewhere(&self, ended: Ended) -> Elsewhere {
        match ended {
            Ended::Left => Elsewhere::Left,
            Ended::Unseen { age_s: Some(age_s) } => {
                match self.received_until.second_before(age_s) {
                    0 => Elsewhere::Unknown,
                    second => Elsewhere::PassedAt(second),
                }
            }
            Ended::Unseen { age_s: None } | Ended::Seen => Elsewhere::Unknown,
        }
    }

    pub(super) fn apply_release(
        &mut self,
        now: Time,
        stream: usize,
        target: Place,
        stamp: Stamp,
    ) -> DeltaResult {
        let Some(line) = self.ending(target) else { return Applied };
        let member = stream_member(stream);
        match line.kind() {
            Kind::Leased if self.is_leased_to(&line, stream) => {
                self.ledger.free(target.slot);
                self.counters.count(Counter::DeltasApplied);
                return Applied;
            }
            // From its active, or, if that is gone, from whoever took over.
            Kind::Backup
                if (line.peer().member() == member || !self.is_up(line.peer().member()))
                    && stamp >= line.stamp() =>
            {
                let doubt = Doubt::Taken;
                let rest = Rest::Perhaps {
                    stamp,
                    is_witnessed: false,
                    doubt,
                    elsewhere: Elsewhere::Unknown,
                };
                self.drop_copy(now, target.slot, stream, rest);
            }
            Kind::Active
                if self.is_claimed_above(target.slot, stamp)
                    && !is(Mutation::EarlyReleaseIgnored)
                    || self.is_presumed_from(target.slot, stream)
                        && stamp.epoch == line.stamp().epoch =>
            {
                // Presumed while the former active lived: its answer wins. Or claimed there, and
                // moved on to another backup, before the claim arrived here: late, it must not find
                // its place.
                if !self.requests.has_room(Rank::Consequence) {
                    return Busy;
                }
                let doubt = match self.is_presumed(target.slot) {
                    true => Doubt::Taken,
                    false => Doubt::Outranked,
                };
                self.drop_active(now, target.slot, stream, stamp, (doubt, false));
            }
            Kind::Active if self.is_presumed(target.slot) && stamp > line.stamp() => {
                // Only presumed, and somebody else carries it on who knows it better.
                if !self.requests.has_room(Rank::Consequence) {
                    return Busy;
                }
                let backup = line.peer();
                self.ledger.unassign(target.slot);
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
        // Unlike a close: a release may be ignored, or come twice, and its sender does not learn
        // which. So the slot is nobody's lease afterwards, and the name that one would have had
        // never fits.
        self.ledger.free(target.slot);
        self.counters.count(Counter::DeltasApplied);
        Applied
    }

    /// The copy in this slot is none any more. What its kernel entry shows of packets is asked
    /// first, where there is an entry.
    fn drop_copy(&mut self, now: Time, slot: u32, stream: usize, rest: Rest) {
        let is_eager = self.config.commit == CommitMode::Eager;
        let is_missing = self.ledger.on(slot) == On::Missing;
        let written = if is_eager && !is_missing { self.ledger.written(slot) } else { Written::No };
        self.end_missing(slot);
        self.ledger.end_copy(slot);
        self.keep_rest(now, slot, written, rest);
        let original = self.drop_to_lease(slot, stream);
        match is_eager && is_missing && self.ledger.find_original(&original).is_none() {
            true => self.ask_commit(Commit::DeleteUntouched { original }),
            false => self.delete_entry(&original),
        }
    }

    /// What is left of the copy in this slot, which goes, is held in another one while it is found
    /// out whether its packets pass here.
    fn keep_rest(&mut self, now: Time, slot: u32, written: Written, rest: Rest) {
        let Rest::Perhaps { stamp, is_witnessed, doubt, elsewhere } = rest else { return };
        let connection = self.ledger.connection(slot);
        if self.lives_besides(slot, &connection.original) {
            return; // The entry is that one's by now.
        }
        match (written, doubt) {
            (Written::No, _) if is_witnessed => self.open(now, &connection, Some(stamp)),
            (Written::No, _) => {}
            (Written::Normal, _) if elsewhere != Elsewhere::Left && self.contests.has_room() => {
                self.doubt(now, &connection, stamp, doubt)
            }
            // It lives on elsewhere: what may be the packets of before does not outdo that.
            (Written::AsItWas, Doubt::Taken) => self.doubt(now, &connection, stamp, doubt),
            (Written::Normal | Written::AsItWas | Written::Resumed | Written::Yes, _) => {
                // Only an end leaves a tuple to another connection.
                let may_be_anothers = written == Written::Resumed && doubt == Doubt::Closed;
                let packets = LastPackets {
                    passed_until: self.ledger.passed_until(slot),
                    written_at: self.ledger.written_at(slot),
                    elsewhere,
                };
                self.ask_for_packets(&connection, stamp, packets, may_be_anothers);
            }
        }
    }

    /// The active in this slot gives way to who has it elsewhere, or had, and to what it saw there.
    /// If that was no end, the kernel is asked whether its traffic is here: of what was only
    /// presumed no event may tell.
    fn drop_active(
        &mut self,
        now: Time,
        slot: u32,
        stream: usize,
        stamp: Stamp,
        (doubt, is_end_seen): (Doubt, bool),
    ) {
        let (is_presumed, connection) = (self.is_presumed(slot), self.ledger.connection(slot));
        let line = self.ledger.line(slot);
        // The backup's place may be the very claim that this gives way to: what outranks this
        // active must not come back there and outrank that.
        let is_there = line.peer().is_somewhere() && self.stream_of(line.peer()) == stream;
        self.demote(slot, Coordinate::NOWHERE, if is_there { line.stamp() } else { stamp });
        let has_ended = is_presumed && is_end_seen;
        if !has_ended && !self.lives_besides(slot, &connection.original) {
            self.doubt(now, &connection, stamp, doubt);
        }
        let original = self.drop_to_lease(slot, stream);
        match is_presumed && doubt == Doubt::Taken {
            true => self.write_besides(&original), // Packets may pass its entry, which stays.
            false => self.delete_entry(&original),
        }
    }

    /// The connection in this slot is no more; one life later the slot belongs to the sender's
    /// lease. Tells its original tuple: what becomes of the kernel's entry is the caller's.
    fn drop_to_lease(&mut self, slot: u32, stream: usize) -> Tuple {
        let original = self.ledger.tuples(slot).0;
        let session = self.durable(stream).peer_session();
        let lessee =
            Coordinate::new(stream_member(stream), stream_shard(stream), 0, Default::default());
        self.ledger.drop_to_lease(slot, lessee, session);
        original
    }

    /// The kernel is to forget a connection. Another one may have the same tuple by now: then its
    /// entry stays.
    pub(super) fn delete_entry(&mut self, original: &Tuple) {
        match self.ledger.find_original(original) {
            None => self.ask_commit(Commit::Delete { original: *original }),
            Some(_) => self.write_besides(original),
        }
    }

    /// The entry of a connection that is none here any more is that of another copy with this
    /// tuple, if there is one.
    fn write_besides(&mut self, original: &Tuple) {
        if let Some(slot) = self
            .ledger
            .find_original(original)
            .filter(|slot| self.ledger.kind(*slot) == Kind::Backup)
        {
            let generation = self.ledger.line(slot).generation();
            self.ask_commit(Commit::Write { slot, generation });
        }
    }

    /// A connection without a backup that is only presumed to be ours gives way to whoever else
    /// carries it on. Its kernel entry stays: packets may pass it, of which no event tells.
    pub(super) fn drop_presumed(&mut self, slot: u32) {
        self.counters.count(Counter::ClaimsLost);
        self.end_move(slot);
        let original = self.ledger.tuples(slot).0;
        self.ledger.clear(slot);
        self.write_besides(&original);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::conn::{Connection, State};
    use crate::memory::{MemorySize, OwnedMemory};
    use crate::source::LookShows;
    use crate::sync::delta::New;
    use crate::sync::peers::PeerState;
    use crate::sync::stream::stream_index;
    use crate::sync::{ReplicaConfig, test_config};

    const NOW: Time = Time(1);

    fn ended_by(seen: bool) -> Ended {
        if seen { Ended::Seen } else { Ended::Unseen { age_s: None } }
    }

    /// A shard with a copy of member 2's connection, written over an entry that packets had left
    /// so many seconds, and the copy's place.
    fn with_a_copy_written_over(
        memory: &OwnedMemory,
        passed_s: u32,
    ) -> (Replica<'_>, Connection, Place) {
        let config = ReplicaConfig { commit: CommitMode::Eager, ..test_config() };
        let mut replica = Replica::new(config, memory.parts());
        replica.peers.set(2, PeerState::Up);
        let original = Tuple::v4(6, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2));
        let state = State { tcp_state: 3, timeout_s: 300, ..State::default() };
        let connection = Connection::new(original, original.mirrored(), state);
        let slot = replica.ledger.allocate().expect("there is room");
        let own = Coordinate::new(2, 0, 5, Default::default());
        replica.ledger.lend(slot, Coordinate::new(2, 0, 0, Default::default()), 0);
        let target = Place { slot, generation: replica.ledger.line(slot).generation() };
        let stamp = Stamp { epoch: 1, version: 1 };
        let new = New { target, stamp, active: own, previous: None, connection: &connection };
        assert!(matches!(replica.apply_new(NOW, stream_index(2, 0), &new), Applied));
        replica.handle_commit(NOW, slot, target.generation, Ok(Written::Yes));
        replica.handle_overwritten(NOW, slot, target.generation, passed_s);
        while replica.poll_commit(true).is_some() {}
        (replica, connection, target)
    }

    /// The active of the copy closes it: what the kernel is asked, and what it is told when it has
    /// answered that no packet has passed since.
    #[test]
    fn packets_from_before_a_copy_was_written_over_count_if_nobody_saw_the_end() {
        for (after_s, seen, is_witnessed, lives) in [
            (10, false, false, true),
            (20, false, false, false), // It would have run out by now.
            (10, true, false, false),
            // Traffic seed 1000010280: its own source had seen it as well.
            (10, true, true, false),
            (10, false, true, true),
        ] {
            let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
            let (mut replica, connection, target) = with_a_copy_written_over(&memory, 15);
            let original = connection.original;
            replica.ledger.amend(target.slot, |line| line.set_claimed(is_witnessed));
            let now = NOW.after(Duration::from_secs(after_s));
            let stamp = Stamp { epoch: 1, version: 2 };
            let closed =
                replica.apply_close(now, stream_index(2, 0), target, stamp, ended_by(seen));
            assert!(matches!(closed, Applied));
            let asked = std::iter::from_fn(|| replica.poll_commit(true)).collect::<Vec<_>>();
            if let [Commit::Look { slot, generation, .. }] = asked[..] {
                let shows = match replica.ledger.passed_s(slot, now) {
                    0 => LookShows::Nothing,
                    _ => LookShows::Packets,
                };
                replica.handle_look(now, slot, generation, Some(&connection), shows);
            }
            let told = std::iter::from_fn(|| replica.poll_commit(true)).collect::<Vec<_>>();
            let told = if told.is_empty() { asked } else { told };
            let slot = replica.ledger.find_original(&original);
            assert_eq!(slot.is_some(), lives, "{after_s} {seen} {is_witnessed}");
            match slot {
                Some(slot) => {
                    let generation = replica.ledger.line(slot).generation();
                    assert_eq!(replica.ledger.kind(slot), Kind::Active);
                    assert_eq!(told, [Commit::Refresh { slot, generation }], "no copy any more");
                    assert_eq!(replica.ledger.passed_s(slot, now), 5);
                    replica.handle_commit(now, slot, generation, Ok(Written::Yes));
                    assert_eq!(replica.ledger.passed_s(slot, now), 0, "it has that now");
                }
                None => assert_eq!(told, [Commit::Delete { original }]),
            }
        }
    }

    /// What passed a copy's entry while no process was there may be the next connection's only if
    /// the one before has ended: that was seen, so it is watched. Let go, or gone unseen, it is the
    /// same one, and goes on.
    #[test]
    fn what_had_packets_after_a_restart_is_watched_only_if_its_end_was_seen() {
        for (is_release, seen, is_watched) in
            [(false, true, true), (false, false, false), (true, false, false)]
        {
            let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
            let (mut replica, connection, target) = with_a_copy_written_over(&memory, 0);
            replica.ledger.set_written(target.slot, Written::Resumed);
            let (stream, stamp) = (stream_index(2, 0), Stamp { epoch: 1, version: 2 });
            let result = match is_release {
                true => replica.apply_release(NOW, stream, target, stamp),
                false => replica.apply_close(NOW, stream, target, stamp, ended_by(seen)),
            };
            assert!(matches!(result, Applied));
            let Some(Commit::Look { slot, generation, .. }) = replica.poll_commit(true) else {
                panic!("its entry is asked for");
            };
            replica.handle_look(NOW, slot, generation, Some(&connection), LookShows::Packets);
            let kind = if is_watched { Kind::Held } else { Kind::Active };
            assert_eq!(replica.ledger.kind(slot), kind, "{is_release} {seen}");
            assert_eq!(replica.contests.has(slot, generation), is_watched);
        }
    }

    /// What the active tells of its last packet goes with the question, as a time of this clock:
    /// as if the close had arrived as soon as it can have.
    #[test]
    fn the_age_of_the_actives_last_packet_goes_with_the_question() {
        let now = NOW.after(Duration::from_secs(100));
        for (age_s, elsewhere) in [
            (None, Elsewhere::Unknown),
            (Some(0), Elsewhere::PassedAt(81)),
            (Some(30), Elsewhere::PassedAt(51)),
            (Some(9999), Elsewhere::Unknown),
        ] {
            let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
            let (mut replica, _, target) = with_a_copy_written_over(&memory, 0);
            replica.received_all(NOW.after(Duration::from_secs(80)));
            let stamp = Stamp { epoch: 1, version: 2 };
            let closed = replica.apply_close(
                now,
                stream_index(2, 0),
                target,
                stamp,
                Ended::Unseen { age_s },
            );
            assert!(matches!(closed, Applied));
            let Some(Commit::Look { elsewhere: told, .. }) = replica.poll_commit(true) else {
                panic!("its entry is asked for");
            };
            assert_eq!(told, elsewhere);
        }
    }

    /// Traffic seed 1000055670: the first that was heard of an active that had been silent was an
    /// end that it had not seen. The copy had its normal timeout by then, and packets had passed.
    #[test]
    fn what_has_its_normal_timeout_is_watched_before_an_end_that_nobody_saw_is_believed() {
        for (told, lives) in
            [(&[(0, 300), (1, 300), (3, 300)][..], true), (&[(0, 300), (5, 295), (11, 289)], false)]
        {
            let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
            let (mut replica, connection, target) = with_a_copy_written_over(&memory, 0);
            let original = connection.original;
            let silent = PeerState::Down { since: NOW, left_behind: false, lost: false };
            replica.peers.set(2, silent);
            replica.handle_commit(NOW, target.slot, target.generation, Ok(Written::Yes));
            replica.peers.set(2, PeerState::Up);
            let stamp = Stamp { epoch: 1, version: 2 };
            let closed =
                replica.apply_close(NOW, stream_index(2, 0), target, stamp, ended_by(false));
            assert!(matches!(closed, Applied));
            let slot = replica.ledger.find_original(&original).expect("it is watched");
            let generation = replica.ledger.line(slot).generation();
            for (seconds, left_s) in told {
                let mut there = connection;
                there.state.timeout_s = *left_s;
                let now = NOW.after(Duration::from_secs(*seconds));
                replica.handle_watch(now, slot, generation, Some(&there));
            }
            let deleted = std::iter::from_fn(|| replica.poll_commit(true))
                .any(|commit| commit == Commit::Delete { original });
            assert_eq!(
                (replica.ledger.find_original(&original).is_some(), deleted),
                (lives, !lives)
            );
        }
    }
}
