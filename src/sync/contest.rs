//! Contests: two members that each take a connection for theirs, while neither knows how the other
//! came by it.
//!
//! (epoch, version, member) orders the states of one connection. It says nothing about two that
//! have one tuple after the other (a member stood still while its connection ended elsewhere, and
//! its port was used again), nor about two members that heard nothing of each other's claims. There
//! the later traffic decides, and nobody's kernel entry is touched before: with equal epochs
//! whoever is asked to take the other's copy refuses (*superseded*), and both watch their own
//! entry. Its timeout runs down by itself and goes up with a packet; so does what an event tells.
//! Who has traffic claims the connection once more and tells the other one at once, which gives way
//! to the higher epoch. Where nobody has any, both stay as they are: what has ended goes by its own
//! time.

use super::contests::{Doubt, Rival, Shown};
use super::mutation::{Mutation, is};
use super::replica::Replica;
use super::requests::Rank;
use crate::conn::slot::groups;
use crate::conn::{Connection, Generation, Kind, MemberId, Phase, Stamp, Tuple};
use crate::counters::Counter;
use crate::source::{Commit, CommitMode, End};
use crate::time::Time;

impl Replica<'_> {
    /// Somebody else takes the connection in this slot for its own, and knows as much. Whether
    /// traffic is to decide; without a kernel to ask for any, the stamp does.
    pub(super) fn contest(&mut self, now: Time, slot: u32, rival: Option<Rival>) -> bool {
        let line = self.ledger.line(slot);
        let is_ours = match line.kind() {
            Kind::Held => !line.is_unseen(),
            Kind::Active => !self.is_presumed(slot),
            _ => false,
        };
        is_ours
            && self.config.commit == CommitMode::Eager
            && !is(Mutation::StampsDecide)
            && self.contests.note(now, (slot, line.generation()), line.stamp(), rival, None)
    }

    /// An active here was told that its connection was claimed elsewhere, with this stamp, and
    /// closed or let go there. Packets that pass here say otherwise: it is held above that until
    /// they have had time to. Where nobody can be asked it ends here as well.
    pub(super) fn doubt(&mut self, now: Time, connection: &Connection, over: Stamp, doubt: Doubt) {
        if self.config.commit == CommitMode::Eager
            && self.contests.has_room()
            && let Some(slot) = self.fill_held(connection, Some(over), true)
        {
            let generation = self.ledger.line(slot).generation();
            let noted = self.contests.note(now, (slot, generation), over, None, Some(doubt));
            assert!(noted, "there was room for a contest");
        }
    }

    /// The connection in this slot was only taken over, and another member refuses it, for it has
    /// it itself: packets that pass here, of which no event tells, are looked for before that one's
    /// copy takes their entry.
    pub(super) fn doubt_presumed(&mut self, now: Time, slot: u32, refused_by: MemberId) {
        let (connection, stamp) = (self.ledger.connection(slot), self.ledger.line(slot).stamp());
        self.drop_presumed(slot);
        if self.ledger.find_original(&connection.original).is_none() {
            self.doubt(now, &connection, stamp, Doubt::Presumed(refused_by));
        }
    }

    /// Another member brings the connection in this slot, which is looked for packets here. Whether
    /// it has to wait.
    pub(super) fn is_looked_for(&mut self, now: Time, slot: u32, rival: Rival) -> bool {
        let line = self.ledger.line(slot);
        self.contests.is_looked_for(slot, line.generation())
            && self.contests.note(now, (slot, line.generation()), line.stamp(), Some(rival), None)
    }

    /// Another program wrote the entry of this connection. Whether that is contested, or doubted:
    /// then what the entry tells of packets is compared with what it has left now.
    pub fn handle_written(&mut self, original: &Tuple) -> bool {
        let Some(slot) = self.ledger.find_original(original) else { return false };
        let is_contested = self.contests.restart(slot, self.ledger.line(slot).generation());
        self.counters.add(Counter::ClaimsUnfounded, is_contested as u64);
        is_contested
    }

    fn drop_doubted(&mut self, slot: u32, generation: Generation, doubt: Option<Doubt>) {
        let line = self.ledger.line(slot);
        if line.generation() != generation || line.kind() != Kind::Held || !line.is_unseen() {
            return;
        }
        let original = self.ledger.tuples(slot).0;
        self.ledger.clear(slot);
        if doubt == Some(Doubt::Closed) {
            self.delete_entry(&original);
        }
    }

    pub(super) fn tick_contests(&mut self, now: Time) {
        if !self.contests.look_at().reached(now) {
            return;
        }
        let table = &self.ledger;
        self.contests.drop_those(now, |slot, generation| {
            let line = table.line(slot);
            line.generation() != generation || !matches!(line.kind(), Kind::Held | Kind::Active)
        });
        let commits = &mut self.commits;
        self.contests.look(now, |slot, generation| {
            if commits.room() > 0 {
                commits.ask(Commit::Watch { slot, generation }, || false);
            }
        });
    }

    /// Whether it is known where the other one has it, and somebody hears it there.
    pub(super) fn can_be_told(&self, rival: &Rival) -> bool {
        rival.place.is_somewhere() && self.is_up(rival.place.member())
    }

    /// Packets of the connection in this slot, which is active here, decided its contest. The other
    /// one is told at once, before the connection may end: by the delta that it now has the copy,
    /// or, if somebody else has that, by a release.
    pub(super) fn tell_rival(&mut self, now: Time, slot: u32, rival: Rival) {
        let peer = self.ledger.line(slot).peer();
        if !peer.is_somewhere() {
            self.ledger.unlist(slot);
            self.assign(now, slot, rival.place);
        } else if peer != rival.place {
            // Without room for a request it hears of it when it asks again.
            let _ = self.release(Rank::Consequence, rival.place, self.ledger.line(slot).stamp());
        }
    }

    /// Who had the connection in this slot is dead, and no packets showed elsewhere: it is presumed
    /// to be ours, as when its copy was taken over.
    fn presume_again(&mut self, now: Time, slot: u32, generation: Generation) {
        let Some(rival) = self.contests.decide(slot, generation) else { return };
        self.counters.count(Counter::Promotions);
        let own = self.coordinate(slot);
        self.ledger.set_former(slot, own);
        self.ledger.activate_unseen(slot, |line| line.set_stamp(rival.stamp));
        self.protect(now, slot);
    }

    /// The kernel's entry of a contested connection, as it is.
    pub fn handle_watch(
        &mut self,
        now: Time,
        slot: u32,
        generation: Generation,
        there: Option<&Connection>,
    ) {
        let tuples = self.ledger.tuples(slot);
        let is_ours = matches!(self.ledger.kind(slot), Kind::Held | Kind::Active);
        let is_it = |there: &&Connection| {
            (there.original, there.reply) == tuples && there.phase() != Phase::Over
        };
        let entry = there.filter(is_it);
        let left_s = entry.map(|entry| entry.state.timeout_s);
        match (self.contests.on_entry(now, (slot, generation), there.is_some(), left_s), entry) {
            (Some(Shown::Packets), Some(entry)) => {
                let known = groups::TUPLES | groups::STATE | groups::TIMEOUT | groups::MARK;
                self.change(now, slot, entry, known);
            }
            // Of what is ours an event tells; but not if this member's own delete, asked for before
            // the connection began, has hit it.
            (Some(Shown::Gone), _) if is_ours => {
                self.contests.decide(slot, generation);
                self.gone(now, slot, End::UNTOLD);
            }
            (Some(Shown::DoubtedAndGone), _) => {
                self.contests.decide(slot, generation);
                self.drop_doubted(slot, generation, None);
            }
            (Some(Shown::Silence { doubt: Doubt::Presumed(refused_by), .. }), _)
                if is_ours && !self.is_up(refused_by) =>
            {
                self.presume_again(now, slot, generation);
            }
            // No packet has dispelled it, up to now.
            (Some(Shown::Silence { doubt, is_settled: true }), _) => {
                self.contests.decide(slot, generation);
                self.drop_doubted(slot, generation, Some(doubt));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::conn::{Coordinate, State};
    use crate::memory::{MemorySize, OwnedMemory};
    use crate::source::SourceEvent;
    use crate::sync::peers::PeerState;
    use crate::sync::{ReplicaConfig, test_config};

    fn replica(memory: &OwnedMemory) -> Replica<'_> {
        let hold = Duration::from_secs(3600);
        Replica::new(
            ReplicaConfig { hold, commit: CommitMode::Eager, ..test_config() },
            memory.parts(),
        )
    }

    fn connection(timeout_s: u32) -> Connection {
        let original = Tuple::v4(6, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2));
        let state = State { tcp_state: 3, timeout_s, ..State::default() };
        Connection::new(original, original.mirrored(), state)
    }

    fn at(seconds: u64) -> Time {
        Time(1).after(Duration::from_secs(seconds))
    }

    fn rival(epoch: u32, version: u32) -> Rival {
        Rival { stamp: Stamp { epoch, version }, place: Coordinate::NOWHERE }
    }

    /// A shard that holds the connection, in this slot.
    fn held(memory: &OwnedMemory) -> (Replica<'_>, u32) {
        let mut replica = replica(memory);
        replica.handle_source(at(0), &SourceEvent::seen(connection(300)));
        let slot = replica.ledger.find_original(&connection(0).original).expect("it is held");
        (replica, slot)
    }

    /// What the kernel tells of the entry at these times, `None`: that it is gone.
    fn watch(replica: &mut Replica<'_>, slot: u32, told: &[(u64, Option<u32>)]) {
        let generation = replica.ledger.line(slot).generation();
        for (seconds, timeout_s) in told {
            let there = timeout_s.map(connection);
            replica.handle_watch(at(*seconds), slot, generation, there.as_ref());
        }
    }

    #[test]
    fn who_has_traffic_goes_above_the_other_one_and_who_has_none_does_not() {
        for (told, has_traffic) in [
            (&[(0, Some(300)), (1, Some(299)), (4, Some(296)), (9, Some(290))][..], false),
            (&[(0, Some(300)), (1, Some(300)), (2, Some(299))], false), // Whole seconds: one more is none.
            (&[(0, Some(300)), (4, Some(298))], true),
            (&[(0, Some(200)), (1, Some(300))], true),
            (&[(0, Some(300)), (1, Some(120))], true), // What this kernel gives.
            (&[(0, Some(300)), (4, None)], false),     // Its end is told by an event.
        ] {
            let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
            let (mut replica, slot) = held(&memory);
            let rival = rival(7, 9);
            assert!(replica.contest(at(0), slot, Some(rival)));
            watch(&mut replica, slot, told);
            let stamp = replica.ledger.line(slot).stamp();
            assert_eq!(stamp > rival.stamp, has_traffic, "{told:?}: {stamp:?}");
        }
    }

    /// Traffic seed 1000021453: another program set timeouts, and that of an entry in doubt, of a
    /// connection that had ended, was taken for a packet: it outdid the next one of its port.
    #[test]
    fn what_another_program_writes_decides_no_contest() {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let (mut replica, slot) = held(&memory);
        let original = connection(0).original;
        assert!(!replica.handle_written(&original), "nobody contests it");
        let rival = rival(7, 9);
        assert!(replica.contest(at(0), slot, Some(rival)));
        watch(&mut replica, slot, &[(0, Some(300)), (1, Some(299))]);
        assert!(replica.handle_written(&original));
        watch(&mut replica, slot, &[(2, Some(20)), (4, Some(18))]);
        assert!(replica.ledger.line(slot).stamp() < rival.stamp);
        watch(&mut replica, slot, &[(5, Some(300))]);
        assert!(replica.ledger.line(slot).stamp() > rival.stamp, "that was a packet");
    }

    #[test]
    fn who_was_claimed_since_the_contest_began_has_shown_its_traffic() {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let (mut replica, slot) = held(&memory);
        let rival = |epoch| Some(rival(epoch, 1));
        assert!(!replica.is_no_news(slot));
        assert!(replica.contest(at(0), slot, None), "refused, and not told by what");
        assert!(replica.is_no_news(slot), "that its entry is there is no traffic");
        assert!(replica.contest(at(1), slot, rival(5)) && replica.contest(at(2), slot, rival(5)));
        assert!(!replica.contest(at(3), slot, rival(6)));
    }

    #[test]
    fn an_event_decides_a_contest_too() {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let (mut replica, slot) = held(&memory);
        assert!(replica.contest(at(0), slot, Some(rival(3, 1))));
        replica.handle_source(at(1), &SourceEvent::seen(connection(299)));
        assert_eq!(replica.ledger.line(slot).stamp().epoch, 4);
    }

    #[test]
    fn what_is_doubted_goes_on_with_traffic_and_ends_without() {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let mut replica = replica(&memory);
        let original = connection(0).original;
        let over = Stamp { epoch: 2, version: 5 };
        for (doubt, told, lives, deletes) in [
            (Doubt::Closed, [(0, Some(300)), (4, Some(299)), (11, None)], true, false),
            (Doubt::Closed, [(0, Some(300)), (4, Some(296)), (11, Some(289))], false, true),
            (Doubt::Taken, [(0, Some(300)), (4, Some(296)), (11, Some(289))], false, false),
            (Doubt::Closed, [(0, Some(300)), (4, None), (11, None)], false, false),
            // Traffic seed 600000412: a packet passed after the last look but one.
            (Doubt::Closed, [(0, Some(300)), (9, Some(291)), (11, Some(299))], true, false),
        ] {
            replica.doubt(at(0), &connection(300), over, doubt);
            let slot = replica.ledger.find_original(&original).expect("it is held");
            assert!(replica.is_unclaimed(slot), "its entry is no news");
            watch(&mut replica, slot, &told);
            assert_eq!(
                replica.ledger.find_original(&original).is_some(),
                lives,
                "{doubt:?} {told:?}"
            );
            let asked: Vec<Commit> = std::iter::from_fn(|| replica.poll_commit(true)).collect();
            assert_eq!(asked.contains(&Commit::Delete { original }), deletes, "{doubt:?} {told:?}");
            if lives {
                assert!(!replica.is_unclaimed(slot) && replica.ledger.line(slot).stamp() > over);
                replica.handle_source(at(12), &SourceEvent::gone(original));
            }
        }
    }

    /// A shard that has taken the connection over from 2, which is there and has refused it: it is
    /// held, in this slot.
    fn refused(memory: &OwnedMemory) -> (Replica<'_>, u32) {
        let (mut replica, slot) = held(memory);
        replica.peers.set(2, PeerState::Up);
        replica.ledger.unlist(slot);
        replica.ledger.activate(slot);
        replica.ledger.set_former(slot, Coordinate::new(2, 0, 5, Generation::default()));
        assert!(replica.is_presumed(slot));
        replica.doubt_presumed(at(0), slot, 2);
        let slot = replica.ledger.find_original(&connection(0).original).expect("it is held");
        assert!(
            replica.is_looked_for(at(1), slot, rival(5, 1)),
            "the other one's copy has to wait"
        );
        (replica, slot)
    }

    /// Traffic seeds 600001570, 910001754: a member came back without its table, and refused for
    /// its idle entry who had taken the connection over and had its packets. Its copy took the
    /// place of their entry at once.
    #[test]
    fn what_was_taken_over_and_is_refused_is_looked_for_packets_before_a_copy_takes_its_entry() {
        for (told, goes_on) in [
            ([(0, Some(300)), (3, Some(300)), (5, Some(299))], true),
            ([(0, Some(300)), (3, Some(297)), (5, Some(295))], false),
        ] {
            let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
            let (mut replica, slot) = refused(&memory);
            let original = connection(0).original;
            watch(&mut replica, slot, &told);
            assert_eq!(replica.ledger.line(slot).stamp() > rival(5, 1).stamp, goes_on);
            assert!(!replica.is_looked_for(at(6), slot, rival(5, 1)), "a copy has to wait no more");
            assert_eq!(replica.is_unclaimed(slot), !goes_on);
            watch(&mut replica, slot, &[(11, Some(289))]);
            assert_eq!(replica.ledger.find_original(&original).is_some(), goes_on);
            assert!(
                !std::iter::from_fn(|| replica.poll_commit(true))
                    .any(|c| c == Commit::Delete { original })
            );
        }
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let (mut replica, slot) = held(&memory);
        assert!(!replica.is_looked_for(at(1), slot, rival(5, 1)), "nobody looks");
    }

    /// Traffic seeds 920002157, 920002106: who had refused it died before its copy was here. Nobody
    /// had the connection any more, and the packets that came here passed an entry without a copy.
    #[test]
    fn what_was_refused_by_a_member_that_died_is_presumed_to_be_ours_again() {
        for dies_at in [1, 5, 11] {
            let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
            let (mut replica, slot) = refused(&memory);
            for seconds in 0..dies_at {
                watch(&mut replica, slot, &[(seconds, Some(300 - seconds as u32))]);
            }
            replica.peers.set(2, PeerState::Vacant);
            watch(&mut replica, slot, &[(dies_at, Some(300 - dies_at as u32))]);
            let is_ours = dies_at < 10;
            assert_eq!(replica.ledger.find_original(&connection(0).original).is_some(), is_ours);
            if is_ours {
                assert!(replica.is_presumed(slot) && replica.ledger.kind(slot) == Kind::Active);
                assert_eq!(
                    replica.ledger.line(slot).stamp(),
                    rival(5, 1).stamp,
                    "only packets outdo the other one"
                );
            }
        }
    }

    /// Traffic seed 920002725: a delete that was asked for before the connection began hit its
    /// entry. No event tells of that, and it stayed for good.
    #[test]
    fn what_is_contested_and_has_no_entry_for_two_looks_is_gone() {
        for (told, stays) in [
            ([(0, Some(300)), (1, None), (2, None)], false),
            ([(0, None), (1, Some(300)), (2, None)], true),
        ] {
            let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
            let (mut replica, slot) = held(&memory);
            assert!(replica.contest(at(0), slot, Some(rival(7, 9))));
            watch(&mut replica, slot, &told);
            assert_eq!(
                replica.ledger.find_original(&connection(0).original).is_some(),
                stays,
                "{told:?}"
            );
        }
    }
}
