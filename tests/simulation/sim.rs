//! One run: traffic and faults drawn from a seed, then peace, and everything must agree.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::Ordering;
use std::time::Duration;

use hypersync::ccp::bytes::Reader;
use hypersync::ccp::header::{Header, OPCODE_SYNC};
use hypersync::ccp::message::Message;
use hypersync::ccp::sync::{MESSAGES_AT, SyncHeader};
use hypersync::conn::{Coordinate, Kind, MemberId, Stamp, Tuple, shard_of};
use hypersync::counters::Counter;
use hypersync::memory::OwnedMemory;
use hypersync::seq::Seq;
use hypersync::source::{End, SourceEvent};
use hypersync::sync::stream::{Durable, WORD_RECEIVE_FLOOR, stream_index};
use hypersync::time::Time;

use crate::checkers::{Broken, Checks, fingerprint, rejects};
use crate::plan::{Plan, RESTARTS, SHARDS_OF_RESTART, fault_time};
use crate::truth::{Open, Repair, Truth, life_of};
use crate::world::story::ms;
use crate::world::{Copy, Link, REPROTECT, Rng, STEP, Sent, World, address};

/// Once all faults are over everything agrees again within this time.
pub const CONVERGES: Duration = Duration::from_secs(8);

/// How long after a death its traffic shows up elsewhere at the earliest: datagrams of the dead
/// have arrived.
const MOVES_AFTER: Duration = Duration::from_millis(40);

/// An entry in a kernel that sees no traffic is forgotten after this time.
const EXPIRES: Duration = Duration::from_millis(300);

/// Where numbers of streams stand that have been counted for years: short of 32 bits, and of the 48
/// that they have.
const AGED_SEQ: [u64; 2] = [u32::MAX as u64 - 100, (1 << 48) - 200_000];

/// For so long both of two members that took over the same state may carry it on before a packet
/// shows up.
const SPEAKS: Duration = Duration::from_secs(3);

pub struct Sim<'m> {
    pub world: World<'m>,
    plan: Plan,
    rng: Rng,
    truth: Truth,
    checks: Checks,
    repairs: Vec<Repair>,
    /// Members that died, and when their connections' traffic shows up elsewhere.
    orphans: Vec<(Time, MemberId)>,
    /// Tuples closed lately, which may be used again.
    lately: VecDeque<Tuple>,
    /// Datagrams of which forgeries are made.
    samples: VecDeque<Sent>,
    /// Connections whose traffic moved lately. If the one who had it cannot be told, its kernel
    /// forgets it in time.
    moved: VecDeque<(Time, Tuple)>,
    /// Packets that show up at any of the members that have a copy, and in which life of their
    /// tuple.
    contended: Vec<(Time, Tuple, u32)>,
    at_once: Rng,
    strays: Rng,
    absences: Rng,
    /// Traffic is at least this much: in how many of 1000 steps something happens.
    busy: u64,
    /// Connections that two members carried on in the same state during this peace, and since when.
    doubled: BTreeMap<Tuple, Time>,
    impaired: bool,
    /// Whether a process was killed and took its memory up again.
    killed: bool,
    restarts: usize,
    /// What restarts with a new table begin with, `SHARDS_OF_RESTART` for each.
    spare: &'m [OwnedMemory],
    expire_at: Time,
    pub steps: u64,
}

impl<'m> Sim<'m> {
    pub fn new(seed: u64, plan: Plan, memories: &'m [OwnedMemory]) -> Sim<'m> {
        let (first, spare) = memories.split_at(memories.len() - RESTARTS * SHARDS_OF_RESTART);
        let mut world = World::new(seed, first);
        world.sent = Some(Vec::new());
        world.commit = plan.commit;
        world.as_announced = plan.as_announced;
        let mut sim = Sim {
            expire_at: world.now,
            world,
            rng: Rng(seed ^ 0x5eed_5eed),
            truth: Truth::default(),
            checks: Checks::default(),
            repairs: Vec::new(),
            orphans: Vec::new(),
            lately: VecDeque::new(),
            samples: VecDeque::new(),
            moved: VecDeque::new(),
            contended: Vec::new(),
            at_once: Rng(seed ^ 0xa7_0ce),
            strays: Rng(seed ^ 0x57_2a75),
            absences: Rng(seed ^ 0xab_5e4c),
            busy: 0,
            doubled: BTreeMap::new(),
            impaired: false,
            killed: false,
            restarts: 0,
            spare,
            steps: 0,
            plan,
        };
        sim.checks.extras_lack = sim.plan.lacks_extras();
        for n in 0..sim.plan.members.len() {
            sim.start(n as MemberId + 1);
        }
        sim
    }

    fn start(&mut self, member: MemberId) {
        let (shards, priority) = self.plan.members[member as usize - 1];
        let shards = if self.restarts > 0 && self.rng.chance(30) {
            1 + self.rng.below(3) as u8
        } else {
            shards
        };
        if self.restarts > 0 {
            self.world.supply(&self.spare[(self.restarts - 1) * SHARDS_OF_RESTART..]);
        }
        self.world.note(member, "start", format_args!("{shards} shards, priority {priority}"));
        self.world.start(member, shards, priority);
        let drift = self.rng.below(2001) as i64 - 1000;
        self.world.host(member).drift_ppm = if self.plan.drift { drift } else { 0 };
        self.checks.forget(member);
    }

    /// A whole run.
    pub fn run(&mut self) -> Result<(), Broken> {
        self.run_for(ms(100), false)?;
        let network = self.plan.network;
        for _ in 0..self.plan.episodes {
            self.world.network = network;
            let span = ms(20 + self.rng.below(200));
            self.run_for(span, true)?;
            self.episode()?;
            if !self.plan.tangled {
                self.peace()?;
                if self.plan.aged {
                    self.age();
                }
            }
        }
        self.world.network = network;
        self.run_for(ms(100), true)?;
        self.peace()
    }

    fn run_for(&mut self, span: Duration, traffic: bool) -> Result<(), Broken> {
        let end = self.world.now.after(span);
        while !end.reached(self.world.now) {
            self.step(traffic)?;
        }
        Ok(())
    }

    fn step(&mut self, traffic: bool) -> Result<(), Broken> {
        self.steps += 1;
        self.move_orphans();
        self.repair();
        if traffic && self.rng.below(1000) < self.plan.traffic.max(self.busy) {
            for _ in 0..self.rng.below(self.plan.burst) + 1 {
                self.some_traffic();
            }
        }
        if self.plan.at_once {
            self.contend(traffic);
        }
        if self.plan.strays && traffic && self.strays.below(4000) < self.plan.traffic {
            self.stray();
        }
        if self.rng.below(1000) < self.plan.forged {
            self.forge()?;
        }
        self.world.step();
        let sent = std::mem::take(self.world.sent.as_mut().expect("it is watched"));
        if let Some(found) = self.world.unannounced.take() {
            return Err(format!("timers are announced: {found}"));
        }
        self.checks.after_step(&self.world, &self.truth, &sent)?;
        self.nothing_is_found()?;
        if self.impaired || self.checks.anybody_is_apart {
            let lately = self.moved.drain(..).filter(|(at, _)| self.world.now.since(*at) < ms(300));
            self.truth.expiring.extend(lately.map(|(_, tuple)| tuple));
        }
        for datagram in sent {
            if datagram.bytes.len() > MESSAGES_AT && self.rng.chance(5) {
                self.samples.push_back(datagram);
                if self.samples.len() > 32 {
                    self.samples.pop_front();
                }
            }
        }
        self.world.sent = Some(Vec::new());
        self.world.events.clear();
        Ok(())
    }

    /// 1: digests find nothing, unless a process was killed in the middle of something: copies
    /// never differ by the protocol's own doing. (Between pairs that were apart they are expected
    /// to, and that is no finding.)
    fn nothing_is_found(&mut self) -> Result<(), Broken> {
        for host in self.world.hosts.values_mut().filter(|host| host.running) {
            for shard in &mut host.shards {
                while let Some((finding, expected)) = shard.poll_finding() {
                    if !self.killed && !expected && !self.plan.lacks_extras() {
                        return Err(format!(
                            "1 copies never drift: member {} found {finding:?}",
                            host.member
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    // Traffic.

    fn able(&self) -> Vec<MemberId> {
        let able = |m: &MemberId| !self.world.hosts[m].paused && !self.world.hosts[m].leaving;
        self.world.live().into_iter().filter(able).collect()
    }

    fn any<T: std::marker::Copy>(&mut self, of: &[T]) -> Option<T> {
        (!of.is_empty()).then(|| of[self.rng.below(of.len() as u64) as usize])
    }

    fn any_open(&mut self) -> Option<Tuple> {
        let n = self.truth.open.len() as u64;
        if n == 0 {
            return None;
        }
        let at = self.rng.below(n) as usize;
        self.truth.open.keys().nth(at).copied()
    }

    /// The connection ends at its owner. Who saw packets of it at the same time has it until it is
    /// idle there, even if it gave way.
    fn close(&mut self, tuple: Tuple, owner: MemberId) -> SourceEvent {
        let copies = self.copies_of(&tuple);
        let another = copies.iter().any(|(member, ..)| *member != owner);
        if another && self.truth.contended.contains(&tuple) {
            self.truth.expiring.insert(tuple);
        }
        let event = self.truth.close(tuple);
        self.go_on();
        event
    }

    fn some_traffic(&mut self) {
        let able = self.able();
        match self.rng.below(100) {
            0..35 if self.truth.open.len() < self.plan.open_max => {
                let Some(owner) = self.any(&able) else { return };
                let again = self.rng.chance(20).then(|| self.lately.pop_front()).flatten();
                let reusable = |tuple: &Tuple| {
                    !self.truth.open.contains_key(tuple)
                        && !self.truth.expiring.contains(tuple)
                        && !self.repairs.iter().any(|repair| repair.tuple == *tuple)
                };
                let again = again.filter(reusable).filter(|_| !self.plan.tangled);
                if let Some(again) = again.filter(|_| self.impaired) {
                    self.truth.expiring.insert(again);
                }
                let tuple = again.unwrap_or_else(|| self.truth.fresh_tuple());
                let event = self.truth.open(tuple, owner);
                self.tell(owner, tuple, event);
            }
            35..80 => {
                let Some((tuple, owner)) = self.any_with_owner() else { return };
                let n = self.rng.next();
                let event = self.truth.change(tuple, n);
                self.tell(owner, tuple, event);
            }
            80..92 => {
                let Some((tuple, owner)) = self.any_with_owner() else { return };
                self.lately.push_back(tuple);
                let is_unseen = self.truth.open[&tuple].life % 10 < 3;
                let event = self.close(tuple, owner);
                // Whether a kernel saw the end, or just has it no more. Then one that had its
                // packets lately has it until it is idle there as well.
                let event = match is_unseen {
                    true => {
                        self.truth.expiring.insert(tuple);
                        SourceEvent::Gone { original: tuple, end: End::UNTOLD }
                    }
                    false => event,
                };
                self.tell(owner, tuple, event);
                if self.lately.len() > 16 {
                    self.lately.pop_front();
                }
            }
            92..97 => {
                // The same tuple again, at once, as another connection.
                let Some((tuple, owner)) = self.any_with_owner() else { return };
                let event = self.close(tuple, owner);
                self.tell(owner, tuple, event);
                let event = self.truth.open(tuple, owner);
                self.tell(owner, tuple, event);
            }
            _ => {
                // Its traffic moves to where its copy is.
                let Some((tuple, owner)) = self.any_with_owner() else { return };
                let copies = self.copies_of(&tuple);
                let life = self.truth.open[&tuple].life;
                let active = copies.iter().find(|c| c.0 == owner && c.1 == Kind::Active);
                // Not within the round trip of another claim: of two at once either may stay.
                let copy = copies.iter().find(|(member, kind, stamp, of, peer)| {
                    *kind == Kind::Backup
                        && *of == life
                        && *peer == owner
                        && able.contains(member)
                        && active.is_some_and(|active| active.2.epoch == stamp.epoch)
                });
                let together =
                    |to: MemberId| self.world.live().len() > 1 && self.is_calm(owner, to);
                if let Some((to, ..)) = copy.copied()
                    && together(to)
                {
                    self.world.note(to, "moved", format_args!("{tuple} from {owner}"));
                    self.moved.push_back((self.world.now, tuple));
                    self.truth.open.get_mut(&tuple).expect("it is open").owner = Some(to);
                    self.go_on();
                    // A packet there shows all that its kernel knows.
                    let n = (self.rng.next() >> 8) * 12;
                    let event = self.truth.change(tuple, n);
                    self.world.tell(to, &event);
                }
            }
        }
    }

    /// Traffic of a connection moves to a member that knows nothing of it: there it begins.
    fn stray(&mut self) {
        let n = self.strays.below(self.truth.open.len().max(1) as u64) as usize;
        let Some(tuple) = self.truth.open.keys().nth(n).copied() else { return };
        let copies = self.copies_of(&tuple);
        let mut able = self.able();
        able.retain(|member| copies.iter().all(|copy| copy.0 != *member));
        if self.truth.open[&tuple].owner.is_none() || able.is_empty() {
            return;
        }
        let to = able[self.strays.below(able.len() as u64) as usize];
        self.world.note(to, "strays", format_args!("{tuple}"));
        self.truth.strayed.insert(tuple);
        self.truth.expiring.insert(tuple);
        self.truth.open.get_mut(&tuple).expect("it is open").owner = Some(to);
        let n = (self.strays.next() >> 8) * 12;
        let event = self.truth.change(tuple, n);
        self.world.tell(to, &event);
    }

    /// Traffic of a connection shows up at both of its members within a round trip, here and there
    /// in any order.
    fn contend(&mut self, traffic: bool) {
        let now = self.world.now;
        if traffic && self.at_once.below(2000) < self.plan.traffic {
            let n = self.at_once.below(self.truth.open.len().max(1) as u64) as usize;
            if let Some((tuple, life)) =
                self.truth.open.iter().nth(n).map(|(tuple, open)| (*tuple, open.life))
                && let Some((a, b)) = self.pair_of(&tuple)
                && self.is_calm(a, b)
            {
                let mut at = now;
                for _ in 0..2 + self.at_once.below(4) {
                    self.contended.push((at, tuple, life));
                    at = at.after(STEP * self.at_once.below(4) as u32);
                }
            }
        }
        let (due, later): (Vec<_>, _) =
            std::mem::take(&mut self.contended).into_iter().partition(|(at, ..)| at.reached(now));
        self.contended = later;
        let has_due = !due.is_empty();
        for (_, tuple, life) in due {
            self.appear(tuple, life);
        }
        if has_due || traffic && self.steps.is_multiple_of(32) {
            self.go_on();
        }
    }

    /// Packets of connections that showed up at two members at once go on at the owner: they raise
    /// no event, and show to who watches the entry.
    fn go_on(&mut self) {
        if self.truth.contended.is_empty() {
            return;
        }
        for host in self.world.hosts.values_mut() {
            let is_owner = |tuple: &&Tuple| self.truth.open[*tuple].owner == Some(host.member);
            let open =
                self.truth.contended.iter().filter(|tuple| self.truth.open.contains_key(tuple));
            host.passing.clear();
            host.passing.extend(
                open.filter(is_owner).map(|tuple| (*tuple, self.truth.open[tuple].connection)),
            );
        }
    }

    /// Both members of a connection, if nobody else has a copy and each names the other.
    fn pair_of(&self, tuple: &Tuple) -> Option<(MemberId, MemberId)> {
        let life = self.truth.open[tuple].life;
        let copies: Vec<_> =
            self.copies_of(tuple).into_iter().filter(|copy| copy.3 == life).collect();
        let [a, b] = copies[..] else { return None };
        (a.4 == b.0 && b.4 == a.0).then_some((a.0, b.0))
    }

    /// A packet of a connection shows up at one of those that have a copy. Of several actives the
    /// one with the highest stamp stays, of equal ones the higher member's.
    fn appear(&mut self, tuple: Tuple, life: u32) {
        if self.truth.open.get(&tuple).is_none_or(|open| open.life != life || open.owner.is_none())
        {
            return;
        }
        let able = self.able();
        let mut copies = self.copies_of(&tuple);
        copies.retain(|(member, kind, _, of, _)| {
            *of == life && *kind != Kind::Held && able.contains(member)
        });
        if copies.len() < 2 {
            return;
        }
        if self.pair_of(&tuple).is_none() {
            // It is changing its backup, or lost its active. Of three that know it two may go on
            // that neither sends to the other: the kernel of the one that the traffic left forgets
            // it in time.
            self.truth.expiring.insert(tuple);
        }
        let (to, ..) = copies[self.at_once.below(copies.len() as u64) as usize];
        self.world.note(to, "appears", format_args!("{tuple}"));
        self.moved.push_back((self.world.now, tuple));
        self.truth.contended.insert(tuple);
        // A packet shows all that its kernel knows.
        let n = (self.at_once.next() >> 8) * 12;
        let event = self.truth.change(tuple, n);
        self.world.tell(to, &event);
        let mut actives = self.world.copies_of(&tuple);
        actives.retain(|copy| copy.kind == Kind::Active && life_of(&copy.connection) == life);
        let Some(first) = actives.iter().max_by_key(|copy| (copy.stamp, copy.member)) else {
            return;
        };
        let rival = |copy: &&Copy| copy.stamp == first.stamp && copy.member != first.member;
        let has_common_backup = |copy: &Copy| {
            let peers = [first, copy].map(|copy| Coordinate::from_raw(copy.peer).member());
            peers[0] == peers[1] && ![first.member, copy.member].contains(&peers[0])
        };
        if actives.iter().filter(rival).any(has_common_backup) {
            self.truth.tied.insert(tuple);
        }
        let open = self.truth.open.get_mut(&tuple).expect("it is open");
        (open.owner, open.connection) = (Some(first.member), first.connection);
    }

    /// Of what was tied whoever has it by now is the owner.
    fn untie(&mut self) {
        let copies: BTreeMap<Tuple, _> = self.world.copies().into_iter().collect();
        self.truth.tied.retain(|tuple| {
            let found = copies.get(tuple).map_or(&[][..], |found| &found[..]);
            // (One that looks for its packets may have it yet.)
            let mut actives =
                found.iter().filter(|copy| matches!(copy.kind, Kind::Active | Kind::Held));
            let (Some(one), None) = (actives.next(), actives.next()) else { return true };
            if let Some(open) = self.truth.open.get_mut(tuple)
                && life_of(&one.connection) == open.life
            {
                (open.owner, open.connection) = (Some(one.member), one.connection);
                // (Its packets were to pass at the other one.)
                for host in self.world.hosts.values_mut() {
                    host.passing.remove(tuple);
                }
            }
            false
        });
    }

    /// Whether two members take each other for alive.
    fn is_calm(&self, a: MemberId, b: MemberId) -> bool {
        let sees = |a: MemberId, b: MemberId| {
            let seen = &self.world.hosts[&a].group.view().members[b as usize];
            seen.status.is_alive()
                && seen.hears_me
                && seen.table_id == self.world.hosts[&b].table_id
        };
        self.plan.tangled || sees(a, b) && sees(b, a)
    }

    fn any_with_owner(&mut self) -> Option<(Tuple, MemberId)> {
        let tuple = self.any_open()?;
        let owner = self.truth.open[&tuple].owner?;
        Some((tuple, self.find_owner(tuple, owner)))
    }

    /// Who sees the traffic: where the entry is, if its owner has lost it to another member.
    fn find_owner(&mut self, tuple: Tuple, owner: MemberId) -> MemberId {
        let holds = |m: MemberId| {
            let shards = &self.world.hosts[&m].shards;
            shards[shard_of(&tuple, shards.len() as u8) as usize]
                .table()
                .find_original(&tuple)
                .is_some()
        };
        if holds(owner) {
            return owner;
        }
        let life = self.truth.open[&tuple].life;
        let newest =
            self.copies_of(&tuple).into_iter().filter(|c| c.3 == life).max_by_key(|c| (c.2, c.0));
        let Some((to, ..)) = newest else { return owner };
        self.world.note(to, "moved", format_args!("{tuple} from {owner}, which has lost it"));
        self.truth.open.get_mut(&tuple).expect("it is open").owner = Some(to);
        // A packet there shows all that its kernel knows.
        if self.world.hosts[&to].paused {
            self.repairs.push(Repair { at: self.world.now, member: to, tuple });
        } else {
            self.world.tell(to, &self.truth.dumped(tuple));
        }
        to
    }

    /// Who has a copy: member, kind, stamp, life, and who has the other one.
    fn copies_of(&self, tuple: &Tuple) -> Vec<(MemberId, Kind, Stamp, u32, MemberId)> {
        let copies = self.world.copies_of(tuple).into_iter();
        let peer = |copy: &Copy| Coordinate::from_raw(copy.peer).member();
        copies.map(|c| (c.member, c.kind, c.stamp, life_of(&c.connection), peer(&c))).collect()
    }

    /// The owner's source sees an event, unless it misses it and finds out later.
    fn tell(&mut self, owner: MemberId, tuple: Tuple, event: SourceEvent) {
        let host = &self.world.hosts[&owner];
        if !host.running {
            return;
        }
        if host.paused || self.rng.below(1000) < self.plan.missed {
            self.world.note(owner, "missed", format_args!("{tuple}"));
            let at = self.world.now.after(ms(5 + self.rng.below(100)));
            self.repairs.push(Repair { at, member: owner, tuple });
            return;
        }
        self.world.tell(owner, &event);
    }

    fn repair(&mut self) {
        let now = self.world.now;
        let hosts = &self.world.hosts;
        let ready = |r: &Repair| {
            r.at.reached(now) && !(hosts[&r.member].running && hosts[&r.member].paused)
        };
        let (due, later) = std::mem::take(&mut self.repairs).into_iter().partition(ready);
        self.repairs = later;
        for Repair { member, tuple, .. } in due {
            let to = match self.truth.open.get(&tuple) {
                Some(open) => open.owner.map(|owner| self.find_owner(tuple, owner)),
                None => Some(member),
            };
            if let Some(to) =
                to.filter(|to| self.world.hosts[to].running && !self.world.hosts[to].paused)
            {
                self.world.tell(to, &self.truth.dumped(tuple));
            } else if let Some(at) = to.filter(|to| self.world.hosts[to].running) {
                self.repairs.push(Repair { at: now.after(ms(5)), member: at, tuple });
            }
        }
    }

    // Faults.

    fn episode(&mut self) -> Result<(), Broken> {
        let able = self.able();
        let Some(victim) = self.any(&able) else { return Ok(()) };
        let others: Vec<MemberId> =
            self.world.live().into_iter().filter(|m| *m != victim).collect();
        let Some(other) = self.any(&others) else { return Ok(()) };
        let span = fault_time(&mut self.rng);
        let until = self.world.now.after(span);
        self.impaired = true;
        match self.rng.below(12) {
            10 | 11 => self.restart(victim, span)?,
            0 | 1 => {
                self.crash(victim)?;
                self.come_back(victim, span)?;
            }
            2 => {
                self.world.note(victim, "pause", format_args!("{span:?}"));
                self.world.pause(victim, true);
                let span = span.min(ms(200));
                self.run_for(span, true)?;
                self.world.note(victim, "resume", format_args!(""));
                self.world.pause(victim, false);
            }
            3 | 4 => {
                // Some on one side, the rest on the other.
                let side: Vec<MemberId> = others
                    .iter()
                    .copied()
                    .filter(|_| self.rng.chance(20))
                    .chain([victim])
                    .collect();
                self.world.note(victim, "cut", format_args!("{side:?} from all others, {span:?}"));
                for a in self.world.live() {
                    for b in self.world.live() {
                        if side.contains(&a) != side.contains(&b) {
                            self.world.cut.push((a, b));
                        }
                    }
                }
                self.run_for(span, true)?;
            }
            5 => {
                self.world.note(victim, "cut", format_args!("to {other}, one way, {span:?}"));
                self.world.cut.push((victim, other));
                self.run_for(span, true)?;
            }
            6 => self.leave(victim)?,
            7 => {
                let clog = if self.rng.chance(50) { span.min(ms(30)) } else { span };
                self.world.note(victim, "clog", format_args!("to {other}, {clog:?}"));
                let link = Link { clogged_until: self.world.now.after(clog), ..Link::default() };
                self.world.links.insert((victim, other), link);
                self.run_for(span, true)?;
            }
            8 => {
                self.world.note(victim, "narrow", format_args!("to {other}, {span:?}"));
                let link = Link { narrow_until: until, ..Link::default() };
                self.world.links.insert((victim, other), link);
                self.run_for(span, true)?;
            }
            _ => {
                self.world.note(victim, "kernel", format_args!("refuses all, {span:?}"));
                self.world.host(victim).full = true;
                self.run_for(span, true)?;
                if !self.plan.tangled || self.rng.chance(50) {
                    self.world.host(victim).full = false;
                }
            }
        }
        if !self.plan.tangled || self.rng.chance(50) {
            self.world.note(0, "heal", format_args!("all links"));
            self.world.cut.clear();
        }
        Ok(())
    }

    fn come_back(&mut self, victim: MemberId, span: Duration) -> Result<(), Broken> {
        self.run_for(span, true)?;
        if self.restarts < RESTARTS && (self.rng.chance(60) || self.world.live().len() < 2) {
            self.restarts += 1;
            self.start(victim);
            self.run_for(ms(50), true)?;
        }
        Ok(())
    }

    fn crash(&mut self, victim: MemberId) -> Result<(), Broken> {
        for shard in 0..self.world.hosts[&victim].shards.len() {
            self.checks.shard(&self.world, &self.truth, victim, shard)?;
        }
        self.world.note(victim, "crash", format_args!("its table is lost"));
        self.world.kill(victim);
        self.bereave(victim);
        Ok(())
    }

    /// The process dies and comes back over its memory. Its kernel goes on: what its source missed
    /// it finds by a dump and look-ups, and what was owed to the kernel is made up for.
    fn restart(&mut self, victim: MemberId, span: Duration) -> Result<(), Broken> {
        // With the feature it is killed between two stores.
        self.killed = true;
        let stores = self.rng.below(3000);
        self.world.note(victim, "doomed", format_args!("after {stores} stores, for {span:?}"));
        self.world.host(victim).doomed = Some(stores);
        self.run_for(ms(20), true)?;
        self.world.host(victim).doomed = None;
        if self.world.hosts[&victim].running {
            self.world.kill(victim);
        }
        if self.plan.absences && self.absences.chance(70) {
            self.be_absent(victim)?;
        } else {
            self.run_for(span, true)?;
        }
        self.world.resume(victim);
        self.checks.resumed(victim);
        let owned = self.truth.open.iter().filter(|(_, open)| open.owner == Some(victim));
        let mut tuples: Vec<Tuple> = owned.map(|(tuple, _)| *tuple).collect();
        let live = self.world.live();
        for shard in &self.world.hosts[&victim].shards {
            let table = shard.table();
            let own = |slot: &u32| match table.kind(*slot) {
                Kind::Active | Kind::Held => true,
                Kind::Backup => !live.contains(&table.line(*slot).peer().member()),
                _ => false,
            };
            let gone = (0..table.capacity()).filter(own).map(|slot| table.tuples(slot).0);
            tuples.extend(gone.filter(|tuple| !self.truth.open.contains_key(tuple)));
        }
        tuples.sort();
        tuples.dedup();
        let now = self.world.now;
        self.repairs.extend(tuples.into_iter().map(|tuple| Repair {
            at: now,
            member: victim,
            tuple,
        }));
        self.run_for(ms(50), true)
    }

    /// The process of this member is gone for several times the time after which its connections
    /// have other members, and much happens meanwhile. Either its gateway goes on, or the routes
    /// lead elsewhere.
    fn be_absent(&mut self, victim: MemberId) -> Result<(), Broken> {
        let span = REPROTECT * (3 + self.absences.below(20)) as u32;
        let routes_move = self.absences.chance(60);
        self.world.note(victim, "absent", format_args!("for {span:?}, routes move: {routes_move}"));
        self.busy = 600;
        if routes_move {
            let mut moved = Vec::new();
            for (tuple, open) in
                self.truth.open.iter_mut().filter(|(_, open)| open.owner == Some(victim))
            {
                open.owner = None;
                moved.push((*tuple, open.life));
            }
            self.truth.left.extend(moved.iter().map(|(_, life)| *life));
            self.orphans.push((self.world.now.after(MOVES_AFTER), victim));
            self.run_for(MOVES_AFTER + STEP, true)?;
            for (tuple, life) in moved {
                let Some(Open { owner: Some(owner), .. }) =
                    self.truth.open.get(&tuple).filter(|open| open.life == life).copied()
                else {
                    continue;
                };
                // A packet there shows all that its kernel knows.
                let owner = self.find_owner(tuple, owner);
                let n = (self.absences.next() >> 8) * 12;
                let event = self.truth.change(tuple, n);
                if self.able().contains(&owner) {
                    self.world.tell(owner, &event);
                } else {
                    self.repairs.push(Repair { at: self.world.now, member: owner, tuple });
                }
            }
        }
        self.run_for(span, true)?;
        self.busy = 0;
        Ok(())
    }

    fn bereave(&mut self, victim: MemberId) {
        self.world.forget_mail_of(victim, self.world.now.after(MOVES_AFTER - ms(10)));
        for open in self.truth.open.values_mut() {
            if open.owner == Some(victim) {
                open.owner = None;
            }
        }
        self.repairs.retain(|repair| repair.member != victim);
        self.orphans.push((self.world.now.after(MOVES_AFTER), victim));
    }

    fn leave(&mut self, victim: MemberId) -> Result<(), Broken> {
        self.world.note(victim, "leave", format_args!(""));
        self.world.drain(victim);
        let limit = self.world.now.after(ms(600));
        while self.world.counter(victim, Counter::ConnectionsBackup) > 0
            && !limit.reached(self.world.now)
        {
            self.step(true)?;
        }
        for shard in 0..self.world.hosts[&victim].shards.len() {
            self.checks.shard(&self.world, &self.truth, victim, shard)?;
        }
        for _ in 0..3 {
            self.world.goodbye(victim);
        }
        self.world.note(victim, "left", format_args!(""));
        self.bereave(victim);
        let span = fault_time(&mut self.rng);
        self.come_back(victim, span)
    }

    /// Who died has been silent long enough: the traffic of its connections goes where the newest
    /// copy is, with the state that this has. What only the dead knew is lost, or ends unheard.
    fn move_orphans(&mut self) {
        let now = self.world.now;
        if !self.orphans.iter().any(|(at, _)| at.reached(now)) {
            return;
        }
        self.orphans.retain(|(at, _)| !at.reached(now));
        let mut newest: BTreeMap<Tuple, (Stamp, MemberId, hypersync::conn::Connection)> =
            BTreeMap::new();
        let copies: BTreeMap<Tuple, _> = self.world.copies().into_iter().collect();
        for (tuple, found) in copies {
            if found.len() > 1 {
                self.truth.expiring.insert(tuple); // It died in the middle of a move: an older copy may stay.
            }
            for copy in found {
                let life = life_of(&copy.connection);
                if self.truth.open.get(&tuple).is_some_and(|open| open.life == life) {
                    let this = (copy.stamp, copy.member, copy.connection);
                    let best = newest.entry(tuple).or_insert(this);
                    if (this.0, this.1) > (best.0, best.1) {
                        *best = this;
                    }
                } else {
                    self.truth.expiring.insert(tuple);
                }
            }
        }
        let mut lost = Vec::new();
        for (tuple, open) in self.truth.open.iter_mut().filter(|(_, open)| open.owner.is_none()) {
            match newest.get(tuple) {
                Some((_, member, connection)) => {
                    (open.owner, open.connection) = (Some(*member), *connection);
                }
                None => lost.push(*tuple),
            }
        }
        for tuple in lost {
            self.world.note(0, "lost", format_args!("{tuple}"));
            let _ = self.truth.close(tuple);
        }
    }

    /// A datagram arrives that was forged or cut: it changes nothing and is counted.
    fn forge(&mut self) -> Result<(), Broken> {
        let n = self.rng.below(self.samples.len().max(1) as u64) as usize;
        let Some(sample) = self.samples.get(n) else { return Ok(()) };
        let (from, to, mut bytes) = (sample.from, sample.to, sample.bytes.clone());
        let Some(host) = self.world.hosts.get(&to).filter(|h| h.running && !h.paused) else {
            return Ok(());
        };
        let mut r = Reader::new(&bytes);
        let Ok(header) = Header::decode(&mut r, 7) else { return Ok(()) };
        if header.opcode != OPCODE_SYNC || header.to_shard as usize >= host.shards.len() {
            return Ok(());
        }
        let mut source = address(from);
        let sync = SyncHeader::decode(&mut r).expect("it was sent");
        let stream = stream_index(from, sync.from_shard);
        let known_session =
            Durable(&host.memory[header.to_shard as usize].streams[stream]).peer_session();
        let kind = self.rng.below(8);
        match kind {
            0 => {
                // Cut, but not where a message ends: no byte of a datagram tells how many follow.
                let mut ends = vec![];
                while let Ok(Some(_)) = Message::decode(&mut r) {
                    ends.push(bytes.len() - r.left());
                }
                let at = self.rng.below(bytes.len() as u64 - 1) as usize;
                let zero = bytes.get(at..).is_some_and(|rest| rest.iter().all(|byte| *byte == 0));
                if ends.contains(&at) || zero || at == MESSAGES_AT {
                    return Ok(());
                }
                bytes.truncate(at);
            }
            1 => source = address(60),
            2 => bytes[24 + self.rng.below(4) as usize] ^= 1 + self.rng.below(255) as u8, // its table
            3 => bytes[28 + self.rng.below(4) as usize] ^= 1 + self.rng.below(255) as u8, // our table
            4 => bytes[4] ^= 0x40,                                                        // group
            5 if sync.session > 0 && known_session == sync.session => {
                let life = sync.session.wrapping_sub(1 + self.rng.below(100) as u16);
                bytes[32..34].copy_from_slice(&life.to_be_bytes());
            }
            6 if sync.seq.raw() > 0 => {
                let seq = (sync.seq.raw() + 5000 + self.rng.below(1 << 40)).to_be_bytes();
                bytes[34..40].copy_from_slice(&seq[2..]);
            }
            7 => bytes.extend(std::iter::repeat_n(0, 1449 - bytes.len().min(1448))),
            _ => return Ok(()),
        }
        let shard = header.to_shard as usize;
        let peers: Vec<MemberId> = self.world.hosts.keys().copied().filter(|m| *m != to).collect();
        let before = (fingerprint(&self.world, to, shard, &peers), rejects(&self.world, to, shard));
        self.world.inject(to, source, header.to_shard, &bytes);
        let after = (fingerprint(&self.world, to, shard, &peers), rejects(&self.world, to, shard));
        self.world.note(to, "forged", format_args!("kind {kind}, from {from}"));
        if after.0 != before.0 {
            return Err(format!(
                "5 forged changes nothing: kind {kind} from {from} to {to} changed something"
            ));
        }
        if after.1 <= before.1 {
            return Err(format!("5 forged is counted: kind {kind} from {from} to {to}"));
        }
        Ok(())
    }

    // Peace.

    /// Faults and traffic end; everything has to agree within the time that is stated.
    fn peace(&mut self) -> Result<(), Broken> {
        self.world.note(0, "peace", format_args!(""));
        Checks::sums_are_true(&self.world)?;
        self.world.cut.clear();
        self.world.links.clear();
        self.world.network = Default::default();
        for member in self.world.live() {
            self.world.host(member).full = false;
        }
        let end = self.world.now.after(CONVERGES);
        loop {
            self.run_for(ms(60), false)?;
            self.expire();
            self.dump();
            self.untie();
            self.speak();
            let awaited = self.repairs.iter().any(|repair| !repair.at.reached(self.world.now));
            let busy = awaited || !self.orphans.is_empty();
            let rest = self.checks.at_rest(&self.world, &self.truth);
            if !busy && rest.is_ok() {
                break;
            }
            if end.reached(self.world.now) {
                return rest.map_err(|broken| format!("after {CONVERGES:?} still: {broken}"));
            }
        }
        Checks::sums_are_true(&self.world)?;
        self.impaired = false;
        self.moved.clear();
        self.world.hosts.values_mut().for_each(|host| host.passing.clear());
        self.truth.contended.clear();
        self.truth.expired.clear();
        self.truth.tied.clear();
        self.doubled.clear();
        // (Where the next one of a tuple found a full table, nobody was told that the one before is
        // over.)
        let held: BTreeSet<u32> =
            self.world.copies().values().flatten().map(|copy| life_of(&copy.connection)).collect();
        self.truth.buried.extend(self.truth.closed.difference(&held));
        Ok(())
    }

    /// Everything is at rest. All processes are restarted over their memory, in which versions of
    /// states and numbers of streams have come as far as in years.
    fn age(&mut self) {
        self.world.note(0, "aged", format_args!(""));
        let members = self.world.live();
        for member in &members {
            self.world.kill(*member);
        }
        for (tuple, open) in &self.truth.open {
            // As many changes of a connection at both of its copies, and as many claims (a history
            // keeps ten bits of them).
            let version = u32::MAX - open.life % 5;
            for member in &members {
                let host = &self.world.hosts[member];
                let shard = shard_of(tuple, host.shards.len() as u8) as usize;
                for slot in host.memory[shard].slots {
                    if slot.line().kind().is_connection() && slot.tuples().0 == *tuple {
                        slot.update(|line| {
                            line.set_stamp(Stamp { epoch: line.stamp().epoch + 1020, version })
                        });
                    }
                }
            }
        }
        for from in &members {
            for to in members.iter().filter(|to| *to != from) {
                let (sender, receiver) = (&self.world.hosts[from], &self.world.hosts[to]);
                for (i, a) in sender.memory.iter().enumerate() {
                    for (j, b) in receiver.memory.iter().enumerate() {
                        let sending = Durable(&a.streams[stream_index(*to, j as u8)]);
                        let words = &b.streams[stream_index(*from, i as u8)];
                        let receiving = Durable(words);
                        let agree = sending.session() != 0
                            && sending.session() == receiving.peer_session()
                            && sending.sent() == sending.floor()
                            && sending.sent() == receiving.receive_floor();
                        let seq = Seq::from_raw(AGED_SEQ[(i + j) % 2]).expect("48 bits");
                        if agree && seq.is_after(sending.sent()) {
                            sending.set_sent(seq);
                            sending.set_floor(seq);
                            words.0[WORD_RECEIVE_FLOOR].store(seq.raw(), Ordering::Relaxed);
                        }
                    }
                }
            }
        }
        for member in members {
            self.world.resume(member);
            self.checks.resumed(member);
        }
    }

    /// A connection for which there was no slot, or that had to give way to another life of its
    /// tuple, is found by a dump. Where the older state of a pair was taken for that of a
    /// connection that strayed, or a claim was heard of late that was made before its traffic left,
    /// its next packet tells.
    fn dump(&mut self) {
        let copies = self.world.copies();
        let may_be_older = |(tuple, open): &(&Tuple, &Open)| {
            self.truth.strayed.contains(tuple) || self.truth.left.contains(&open.life)
        };
        for (tuple, open) in self.truth.open.iter().filter(may_be_older) {
            let found = copies.get(tuple).map_or(&[][..], |found| &found[..]);
            let at_owner = found.iter().find(|copy| Some(copy.member) == open.owner);
            if let Some(copy) =
                at_owner.filter(|copy| !self.checks.alike(&copy.connection, &open.connection))
            {
                self.repairs.push(Repair {
                    at: self.world.now,
                    member: copy.member,
                    tuple: *tuple,
                });
            }
        }
        for (tuple, open) in &self.truth.open {
            let Some(owner) = open.owner.filter(|_| !copies.contains_key(tuple)) else { continue };
            if self.world.counter(owner, Counter::TableFull) > 0
                || self.truth.expiring.contains(tuple)
            {
                self.repairs.push(Repair { at: self.world.now, member: owner, tuple: *tuple });
            }
        }
    }

    /// Two members that took over a connection, of which no packet shows up anywhere, both carry it
    /// on, and nobody can tell which of them should: the first packet at one of them settles it. Of
    /// two that both saw packets the owner goes on seeing them; they raise no event, and show to
    /// who watches its entry.
    fn speak(&mut self) {
        let mut doubled = Vec::new();
        for (tuple, found) in self.world.copies() {
            let open = self.truth.open.get(&tuple).copied();
            let Some(Open { owner: Some(owner), connection, .. }) = open else { continue };
            // (What was told to give way looks for its packets while it is held.)
            let actives: Vec<_> = found
                .iter()
                .filter(|copy| matches!(copy.kind, Kind::Active | Kind::Held))
                .collect();
            if actives.len() < 2 {
                continue;
            }
            let alike = actives.windows(2).all(|pair| pair[0].stamp == pair[1].stamp);
            if actives.iter().any(|copy| copy.member == owner) {
                self.world.host(owner).passing.insert(tuple, connection);
            } else if (alike || self.truth.expiring.contains(&tuple))
                && self.world.now.since(*self.doubled.entry(tuple).or_insert(self.world.now))
                    > SPEAKS
            {
                doubled.push(tuple);
            }
        }
        doubled.sort();
        for tuple in doubled {
            let Some(owner) = self.truth.open.get(&tuple).and_then(|open| open.owner) else {
                continue;
            };
            let to = self.find_owner(tuple, owner);
            self.world.note(to, "speaks", format_args!("{tuple}"));
            self.world.tell(to, &self.truth.dumped(tuple));
        }
    }

    /// Kernels forget entries that see no traffic.
    fn expire(&mut self) {
        if !self.expire_at.after(EXPIRES).reached(self.world.now) {
            return;
        }
        self.expire_at = self.world.now;
        let copies: BTreeMap<Tuple, _> = self.world.copies().into_iter().collect();
        let live = self.world.live();
        for (tuple, found) in copies {
            let open = self.truth.open.get(&tuple).copied();
            // A copy whose active is dead is one as well, if nobody has room for another copy.
            let is_active = |copy: &Copy| {
                let of = Coordinate::from_raw(copy.peer).member();
                copy.kind == Kind::Active || copy.kind == Kind::Backup && !live.contains(&of)
            };
            for copy in found.iter().filter(|copy| is_active(copy)) {
                let life = life_of(&copy.connection);
                let forgotten = self.plan.tangled || self.truth.expiring.contains(&tuple);
                let left = self.truth.left.contains(&life);
                let idle = match open {
                    None => forgotten || left,
                    Some(open) if open.life != life => forgotten || left,
                    Some(open) => {
                        let owner = open.owner;
                        let another =
                            found.iter().any(|c| Some(c.member) == owner && c.kind == Kind::Active);
                        let strayed = self.truth.strayed.contains(&tuple);
                        forgotten && owner != Some(copy.member) && (another || strayed)
                    }
                };
                if idle {
                    if let Some(Open { owner: Some(owner), connection, .. }) = open
                        && self.truth.strayed.contains(&tuple)
                        && self.world.host(owner).kernel.contains_key(&tuple)
                    {
                        // Its packets pass there all the time, and raise no event.
                        self.world.host(owner).touched.insert(tuple, connection);
                    }
                    self.world.note(copy.member, "expired", format_args!("{tuple}"));
                    self.truth.expired.insert((copy.member, life));
                    self.world.tell(
                        copy.member,
                        &SourceEvent::Gone { original: tuple, end: End::UNTOLD },
                    );
                    if let Some(owner) = open.and_then(|open| open.owner) {
                        // What was in its way is gone: the next dump tells of it.
                        self.repairs.push(Repair {
                            at: self.world.now.after(ms(20)),
                            member: owner,
                            tuple,
                        });
                    }
                }
            }
        }
    }
}
