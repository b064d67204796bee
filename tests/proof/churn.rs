//! Churn: connections that open, change and close at some thousands of events a second, told to the
//! members through their rings; and what the tables must hold of them in the end.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hypersync::clock;
use hypersync::conn::{Kind, Tuple};
use hypersync::counters::Counter;
use hypersync::demo::check::{Open, check_at_rest};
use hypersync::demo::table;
use hypersync::load::{FlowsConfig, Load};

use crate::common::copies::{Wanted, agree};
use crate::common::member::Member;

/// Connections that are open at each member, most of the time.
pub const CONNECTIONS: usize = 1500;
/// Events a second at each member: four in five change a connection, the others open or close one.
pub const RATE: u32 = 2000;

/// The load of one data plane, and at which member its traffic is.
struct Plane {
    number: u8,
    load: Load,
    active: u8,
}

/// The loads of a group.
pub struct Churn {
    planes: Vec<Plane>,
}

impl Churn {
    /// One load a member; returns when all their connections are open.
    pub fn begin(members: &[&Member]) -> Churn {
        let mut churn = Churn { planes: Vec::new() };
        for member in members {
            churn.add(member.id, member);
        }
        churn.ramp();
        churn
    }

    /// A further load, at this member.
    pub fn add(&mut self, plane: u8, member: &Member) {
        let config = FlowsConfig {
            plane,
            seed: 1,
            connections: CONNECTIONS,
            rate: RATE,
            ramp: Duration::from_secs(1),
            short_percent: 30,
            short_life: Duration::from_millis(40),
            nat_percent: 20,
            v6_percent: 10,
        };
        let load = Load::open(&member.shm, config, clock::now());
        let load = load.unwrap_or_else(|e| panic!("member {}: {e}", member.id));
        self.planes.push(Plane { number: plane, load, active: member.id });
    }

    /// Goes on until all connections that are open most of the time have opened.
    pub fn ramp(&mut self) {
        let start = Instant::now();
        while !self.planes.iter().all(|plane| plane.load.flows.is_ramped()) {
            assert!(start.elapsed() < Duration::from_secs(20), "the rings are read");
            self.beat();
        }
    }

    fn beat(&mut self) {
        for plane in &mut self.planes {
            plane.load.batch(clock::now());
        }
        std::thread::sleep(Duration::from_millis(2));
    }

    /// Goes on for this long.
    pub fn go_on(&mut self, span: Duration) {
        let start = Instant::now();
        while start.elapsed() < span {
            self.beat();
        }
    }

    /// Goes on until `condition` holds; returns how long that took. The condition is asked 50 times
    /// a second.
    pub fn go_on_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut() -> bool,
    ) -> Duration {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
            self.go_on(Duration::from_millis(20));
        }
        start.elapsed()
    }

    /// Ends: the short-lived close, all others stay as they are now. Returns when the members have
    /// read all of it.
    pub fn finish(&mut self, members: &[&Member]) {
        let start = Instant::now();
        self.planes.iter_mut().for_each(|plane| plane.load.flows.finish(true));
        let is_read = |churn: &Churn| {
            members.iter().all(|member| {
                let planes = churn.planes.iter().filter(|plane| plane.active == member.id);
                let told: u64 = planes.map(|plane| plane.load.flows.told().events()).sum();
                member.counter(Counter::SourceEvents) >= told
            }) && churn.planes.iter().all(|plane| plane.load.flows.is_finished())
        };
        while !is_read(self) {
            assert!(start.elapsed() < Duration::from_secs(20), "the rings are read");
            self.beat();
        }
    }

    /// The member of this load is dead; its connections, as last told, are another member's from
    /// now on.
    pub fn inherit(&mut self, plane: u8, heir: u8) {
        self.planes.iter_mut().filter(|p| p.number == plane).for_each(|p| p.active = heir);
    }

    /// Every connection that is open, as last told.
    pub fn wanted(&self) -> Wanted {
        let flows = self.planes.iter().flat_map(|plane| plane.load.flows.open());
        flows.map(|flow| (flow.original, flow.connection())).collect()
    }

    /// Which state every open connection has.
    pub fn states(&self) -> HashMap<Tuple, u32> {
        self.wanted().into_iter().map(|(original, c)| (original, c.state.mark)).collect()
    }

    /// Connections that opened so far, but for those that are never copied.
    pub fn opened(&self) -> u64 {
        let told = self.planes.iter().map(|plane| plane.load.flows.told());
        told.map(|told| told.opened - told.opened_short).sum()
    }

    /// Connections that closed so far.
    pub fn closed(&self) -> u64 {
        self.planes.iter().map(|plane| plane.load.flows.told().closed).sum()
    }

    /// Waits until the members hold exactly what is open, and nothing is left half done; then
    /// checks it all, field by field, as the demo does. Returns how long the group took.
    pub fn settle(&self, what: &str, members: &[&Member], limit: Duration) -> Duration {
        let (start, wanted) = (Instant::now(), self.wanted());
        loop {
            let verdict = agree(members, &wanted).and_then(|()| is_at_rest(members));
            let Err(why) = verdict else { break };
            assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}: {why}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let took = start.elapsed();
        if members.len() > 1 {
            let tables: Vec<_> = members.iter().map(|member| table::copy(member.view())).collect();
            let open = self.planes.iter().flat_map(|plane| {
                let member = plane.active;
                plane.load.flows.open().map(move |flow| Open { member, flow, is_recent: false })
            });
            let verdict =
                check_at_rest(&tables.iter().collect::<Vec<_>>(), &open.collect::<Vec<_>>());
            assert!(verdict.violations.is_empty(), "{what}: {:?}", verdict.violations);
            println!(
                "{what}: agreed {} ms after the churn: {} connections, {} copies compared, {} closed ones nowhere",
                took.as_millis(),
                verdict.own,
                verdict.compared,
                self.closed()
            );
        }
        took
    }
}

/// Whether no close waits and every slot is accounted for.
fn is_at_rest(members: &[&Member]) -> Result<(), String> {
    for member in members {
        match slots_of(member, Kind::Closing) {
            0 => {}
            n => return Err(format!("{n} closes wait at member {}", member.id)),
        }
        let kinds = [Kind::Free, Kind::Leased];
        let counted = [Counter::SlotsFree, Counter::SlotsLeased];
        for (kind, counter) in kinds.into_iter().zip(counted) {
            let (found, counted) = (slots_of(member, kind), member.counter(counter));
            if found != counted {
                return Err(format!(
                    "member {} has {found} {} slots, not {counted}",
                    member.id,
                    kind.name()
                ));
            }
        }
    }
    Ok(())
}

/// Slots of this kind in a member's table.
pub fn slots_of(member: &Member, kind: Kind) -> u64 {
    let shards = 0..member.view().header().sizes.shards;
    let kinds = shards
        .flat_map(|shard| member.view().shard(shard).slots.iter().map(|slot| slot.line().kind()));
    kinds.filter(|found| *found == kind).count() as u64
}
