//! The checker on hand-made tables: a whole group passes, and each kind of violation is found.

use std::time::Duration;

use super::*;
use crate::conn::{Coordinate, Generation, Stamp};
use crate::load::flow::Traits;
use crate::load::rng::Rng;

/// Victim 2, survivors 1 and 3, and what the load told them.
struct World {
    rng: Rng,
    flows: Vec<(MemberId, Flow)>,
    victim: TableCopy,
    survivors: [TableCopy; 2],
}

const NEW: Stamp = Stamp { epoch: 0, version: 5 };

impl World {
    fn new() -> World {
        let table = |member| TableCopy { member, found: Vec::new() };
        World { rng: Rng::new(9), flows: vec![], victim: table(2), survivors: [table(1), table(3)] }
    }

    fn flow(&mut self, member: MemberId, is_short: bool) -> usize {
        let traits = Traits {
            is_short,
            is_nat: self.flows.len().is_multiple_of(2),
            is_v6: false,
            is_tcp: true,
        };
        let n = self.flows.len() as u64;
        let mut flow = Flow::new(member, n, traits, Duration::ZERO, &mut self.rng);
        flow.change(&mut self.rng);
        self.flows.push((member, flow));
        self.flows.len() - 1
    }

    fn found(&self, n: usize, member: MemberId, kind: Kind, peer: MemberId) -> Found {
        let at = |member| Coordinate::new(member, 0, n as u32, Generation::default());
        Found {
            at: at(member),
            kind,
            is_torn: false,
            stamp: NEW,
            peer: at(peer),
            connection: self.flows[n].1.connection(),
            acknowledged: Acknowledged::Newest,
        }
    }

    /// On both survivors, active at `active`.
    fn pair(&mut self, n: usize, active: MemberId) {
        let other = 4 - active;
        let (a, b) = (
            self.found(n, active, Kind::Active, other),
            self.found(n, other, Kind::Backup, active),
        );
        for (table, member) in self.survivors.iter_mut().zip([1, 3]) {
            table.found.push(if member == active { a } else { b });
        }
    }

    /// A connection of the victim, acknowledged this far.
    fn victims(&mut self, acknowledged: Acknowledged) -> usize {
        let n = self.flow(2, false);
        let found = Found { acknowledged, ..self.found(n, 2, Kind::Active, 3) };
        self.victim.found.push(found);
        n
    }

    /// The victim's connection as it ends well.
    fn protected(&mut self) -> usize {
        let n = self.victims(Acknowledged::Newest);
        self.pair(n, 3);
        n
    }

    /// A survivor's own connection as it ends well.
    fn own(&mut self, member: MemberId) -> usize {
        let n = self.flow(member, false);
        self.pair(n, member);
        n
    }

    fn check(&self) -> Report {
        let open: Vec<Open<'_>> = self
            .flows
            .iter()
            .map(|(member, flow)| Open { member: *member, flow, is_recent: false })
            .collect();
        check(&self.victim, &[&self.survivors[0], &self.survivors[1]], &open)
    }

    fn wrongs(&self) -> Vec<Wrong> {
        self.check().violations.iter().map(|v| v.wrong).collect()
    }
}

#[test]
fn a_group_in_which_everything_holds_passes() {
    let mut w = World::new();
    w.protected();
    w.own(1);
    w.own(3);
    let n = w.victims(Acknowledged::Earlier);
    w.pair(n, 1);
    w.victims(Acknowledged::Nothing);
    let young = w.flow(2, false);
    let held = w.found(young, 2, Kind::Held, 2);
    w.victim.found.push(held);
    let verdict = w.check();
    assert_eq!(verdict.violations, []);
    assert_eq!((verdict.protected, verdict.exposed_state, verdict.exposed_whole), (1, 1, 1));
    assert_eq!(
        (verdict.exposed(), verdict.exposed_alive, verdict.young, verdict.own),
        (2, 1, 1, 2)
    );
    assert_eq!(verdict.compared, 8);
}

#[test]
fn a_missing_copy_is_found() {
    let mut w = World::new();
    w.protected();
    w.own(1);
    w.survivors[0].found.remove(0);
    w.survivors[1].found.pop();
    assert_eq!(w.wrongs(), [Wrong::Missing, Wrong::Missing]);
    // Acknowledged in an earlier state: exposed, but it must live on.
    let mut w = World::new();
    w.victims(Acknowledged::Earlier);
    assert_eq!(w.wrongs(), [Wrong::Missing]);
}

#[test]
fn a_further_copy_is_found() {
    let mut w = World::new();
    let n = w.own(1);
    let further = Found {
        at: Coordinate::new(3, 1, 9, Default::default()),
        ..w.found(n, 3, Kind::Backup, 1)
    };
    w.survivors[1].found.push(further);
    assert_eq!(w.wrongs(), [Wrong::Further]);
}

#[test]
fn an_older_state_is_found() {
    let mut w = World::new();
    let (a, b) = (w.protected(), w.own(3));
    w.survivors[0].found[0].stamp.version -= 1;
    assert_eq!(w.wrongs(), [Wrong::Older]);
    w.survivors[0].found[0].stamp.version += 1;
    // The survivor's own connection changed, and the backup did not hear of it.
    let mut rng = w.rng.clone();
    w.flows[b].1.change(&mut rng);
    w.survivors[1].found[1].connection = w.flows[b].1.connection();
    assert_eq!(w.wrongs(), [Wrong::Older]);
    // An exposed one may be older, if that state ever was.
    w.survivors[0].found[1].connection = w.flows[b].1.connection();
    assert_eq!(w.wrongs(), []);
    w.victim.found[0].acknowledged = Acknowledged::Earlier;
    w.flows[a].1.change(&mut rng);
    assert_eq!(w.wrongs(), []);
}

#[test]
fn every_field_is_compared() {
    let changes: [&dyn Fn(&mut Connection); 8] = [
        &|c| c.state.status ^= 4,
        &|c| c.state.tcp_state ^= 1,
        &|c| c.state.tcp_scale ^= 1,
        &|c| c.state.tcp_flags_original ^= 1,
        &|c| c.state.tcp_flags_reply ^= 1,
        &|c| c.state.timeout_s ^= 1,
        &|c| c.state.mark ^= 1,
        &|c| c.reply.dst ^= 1,
    ];
    for change in changes {
        for exposed in [false, true] {
            let mut w = World::new();
            w.protected();
            if exposed {
                w.victim.found[0].acknowledged = Acknowledged::Earlier;
            }
            change(&mut w.survivors[1].found[0].connection);
            assert_eq!(w.wrongs(), [Wrong::Differs]);
        }
    }
}

#[test]
fn a_closed_connection_that_is_there_is_found() {
    let mut w = World::new();
    w.own(1);
    w.flows.pop();
    assert_eq!(w.wrongs(), [Wrong::ClosedPresent]);
    // The victim's: an acknowledged close and one that is gone altogether must leave nothing ...
    let mut w = World::new();
    w.protected();
    w.flows.pop();
    w.victim.found[0].kind = Kind::Closing;
    assert_eq!(w.wrongs(), [Wrong::ClosedPresent]);
    // ... one that was not acknowledged, or not even read, is exposure.
    w.victim.found[0].acknowledged = Acknowledged::Nothing;
    assert_eq!((w.wrongs(), w.check().exposed_closes), (vec![], 1));
    w.victim.found[0].kind = Kind::Active;
    assert_eq!((w.wrongs(), w.check().exposed_closes), (vec![], 1));
    w.victim.found.clear();
    assert_eq!(w.wrongs(), [Wrong::ClosedPresent]);
}

#[test]
fn a_short_lived_connection_that_was_copied_is_found_even_at_the_victim() {
    let mut w = World::new();
    let n = w.flow(1, true);
    w.victim.found.push(w.found(n, 2, Kind::Backup, 1));
    w.flows.clear();
    assert_eq!(w.wrongs(), [Wrong::ShortCopied]);
}

#[test]
fn two_actives_or_copies_that_name_others_are_found() {
    let mut w = World::new();
    w.own(1);
    w.survivors[1].found[0].kind = Kind::Active;
    assert_eq!(w.wrongs(), [Wrong::Roles]);
    w.survivors[1].found[0].kind = Kind::Backup;
    w.survivors[1].found[0].peer = Coordinate::new(2, 0, 0, Default::default());
    assert_eq!(w.wrongs(), [Wrong::Roles]);
}

#[test]
fn a_connection_that_its_member_never_stored_is_found() {
    let mut w = World::new();
    w.flow(2, false);
    assert_eq!(w.wrongs(), [Wrong::Missing]);
}
