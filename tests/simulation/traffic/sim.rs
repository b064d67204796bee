//! One run: flows and faults drawn from a seed, then peace, and in the end nothing may be left.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::rc::Rc;
use std::time::Duration;

use hypersync::ccp::bytes::Reader;
use hypersync::ccp::header::{Header, OPCODE_SYNC};
use hypersync::ccp::message::Message;
use hypersync::ccp::sync::SyncHeader;
use hypersync::conn::extra::HELPER_NAME;
use hypersync::conn::tuple::{TCP, UDP};
use hypersync::conn::{Connection, Kind, MemberId, Phase, Tuple, shard_of};
use hypersync::conntrack::codec::GIVEN_MAX_S;
use hypersync::group::readiness::Stage;
use hypersync::limits::ARENA_MIN;
use hypersync::memory::{MemorySize, OwnedMemory};
use hypersync::time::Time;

use super::flow::{End, Flow, GIVES_UP, Manner, Step};
use super::kernel::{Ends, Kernel};
use super::model::{Nat, Settings, Table, Timeouts, Verdict, tcp};
use crate::checkers::Broken;
use crate::world::story::ms;
use crate::world::{Network, Rng, Timing, World, memories_of};

/// How long a connection is held before it is sent.
const HOLD: Duration = Duration::from_millis(400);
/// Everything has settled so long after the last thing that happened.
const SETTLES: Duration = Duration::from_secs(4);
/// Whether packets pass an entry shows within so long where it had its normal timeout before: whole
/// seconds are told, and one more is none. And what was refused meanwhile backs off for a second.
const DOUBT_LASTS: Duration = Duration::from_secs(5);
/// A connection whose address has left has its two copies again so long after.
pub(super) const LEFT_FOR: Duration = Duration::from_secs(7);
/// What has ended is gone so long after the kernel would have let it go.
const BOUND: Duration = Duration::from_secs(5);
/// A connection may be sent so long after its end was there to be seen.
const SEEN_LATE: Duration = Duration::from_millis(20);
/// Processes that may be started after the first ones: each fault may cost one.
const STARTS: usize = FAULTS_MAX as usize;
/// Faults in a run.
const FAULTS_MAX: u64 = 5;
/// After a start without a table it takes so long to find which entries of the process before have
/// traffic.
const LEFTOVERS_FOUND_AFTER: Duration = Duration::from_secs(15);
/// SYNs of a flow that may be sent again because their answers did not pass.
const SYNS_MAX: u32 = 8;
/// An entry whose time was shortened is missed at once when that is over, and so long after.
const MISSED_FOR: Duration = Duration::from_secs(10);
/// `nf_conntrack_max` of a kernel that has room for everything.
const WIDE: usize = 4096;

/// Drawn from a seed before anything starts.
#[derive(Debug)]
pub struct Plan {
    /// Shards of each member.
    pub shards: Vec<u8>,
    /// Of each member's shards, and of processes that start later.
    sizes: Vec<MemorySize>,
    size: MemorySize,
    /// Whether connections are translated, and by masquerade.
    pub(super) nat: Option<bool>,
    /// `nf_conntrack_events`.
    events: u8,
    timeouts: Timeouts,
    /// `nf_conntrack_max` of each member.
    pub(super) max: Vec<usize>,
    /// Whether each member's kernel has the helper of FTP, and room for labels.
    pub(super) has_helper: Vec<bool>,
    pub(super) has_labels: Vec<bool>,
    /// Events that wait for a shard at most.
    room: usize,
    /// Groups of clients whose routes move together.
    routes: usize,
    /// Flows at most, and pause between two that begin, at most.
    flows: usize,
    begins: Duration,
    /// Clients and ports of each: few, so that tuples are used again.
    clients: u64,
    ports: u64,
    network: Network,
    faults: u64,
}

/// Short enough for a run: what matters is their order.
fn timeouts() -> Timeouts {
    //        none, SYN_SENT, SYN_RECV, ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE, SYN_SENT2
    let tcp = [6, 6, 5, 30, 8, 7, 4, 8, 2, 6];
    Timeouts { tcp, unacknowledged: 20, udp: 5, udp_stream: 9, icmp: 5, icmpv6: 5 }
}

impl Plan {
    pub fn draw(rng: &mut Rng) -> Plan {
        let members = [2, 2, 2, 2, 3, 4][rng.below(6) as usize];
        let nat = [None, Some(false), Some(true)][rng.below(3) as usize];
        let mut size = || {
            let capacity = [512, 1024, 2048][rng.below(3) as usize];
            MemorySize { extras: capacity, ..MemorySize::new(capacity, ARENA_MIN) }
        };
        let (sizes, size) = ((0..members).map(|_| size()).collect(), size());
        Plan {
            shards: (0..members).map(|_| 1 + rng.below(2) as u8).collect(),
            sizes,
            size,
            nat,
            events: 1 + rng.below(2) as u8,
            timeouts: timeouts(),
            max: (0..members)
                .map(|_| if rng.chance(10) { 8 + rng.below(16) as usize } else { WIDE })
                .collect(),
            has_helper: (0..members).map(|_| rng.chance(70)).collect(),
            has_labels: (0..members).map(|_| rng.chance(50)).collect(),
            room: [4, 64, 4096][rng.below(3) as usize],
            routes: if nat.is_some() || members > 2 { 1 } else { 1 + rng.below(3) as usize },
            flows: [3, 10, 30][rng.below(3) as usize],
            begins: Duration::from_millis([20, 100, 500][rng.below(3) as usize]),
            clients: 1 + rng.below(3),
            ports: [3, 10, 100][rng.below(3) as usize],
            network: Network {
                loss: if rng.chance(30) { rng.below(5) } else { 0 },
                repeats: if rng.chance(30) { rng.below(5) } else { 0 },
                late: if rng.chance(30) { rng.below(10) } else { 0 },
                refusals: 0,
            },
            faults: 1 + rng.below(FAULTS_MAX),
        }
    }

    /// Whether a full table may give this flow's entry up: it is not assured.
    fn may_give_up(&self, flow: &Flow) -> bool {
        let may_be_full = self.max.iter().any(|max| *max < WIDE);
        may_be_full && !(flow.is_tcp() && flow.established.is_some())
    }

    /// The memory that this plan can need, in the order in which it is taken.
    pub fn memories(&self) -> Vec<OwnedMemory> {
        let firsts = self.shards.iter().zip(&self.sizes);
        let all =
            firsts.map(|(shards, size)| (*shards as usize, size)).chain([(STARTS * 2, &self.size)]);
        all.flat_map(|(pieces, size)| memories_of(pieces, *size)).collect()
    }
}

type Kernels = Rc<RefCell<BTreeMap<MemberId, Rc<Kernel>>>>;

pub struct Sim<'m> {
    pub world: World<'m>,
    pub(super) plan: Plan,
    pub(super) rng: Rng,
    /// Of gateways that live.
    pub(super) kernels: Kernels,
    pub(super) flows: Vec<Flow>,
    /// Tuples of connections that ended for both sides.
    free: Vec<Tuple>,
    /// Who carries each group of clients.
    pub(super) routes: Vec<MemberId>,
    /// When a packet of a tuple last passed a gateway, and whether it said something.
    passed_at: BTreeMap<(Tuple, MemberId), (Time, bool)>,
    /// Until when an entry lasts to which a program gave a timeout, and which no packet has passed
    /// since.
    pub(super) shortened: BTreeMap<(Tuple, MemberId), Time>,
    /// The slots whose connection was sent, each with its life.
    sent: BTreeSet<(MemberId, u8, u32, u32)>,
    /// Tuples that were brought to somebody.
    copied: BTreeSet<(Tuple, MemberId)>,
    /// What every original tuple stands for at the moment.
    lives: BTreeMap<Tuple, Life>,
    pub(super) numbers: u32,
    fresh: u16,
    /// What operators have set the kernels' timeouts to, one after the other.
    pub(super) timeouts: Vec<Timeouts>,
    /// Entries of other programs.
    pub(super) planted: Vec<Planted>,
    /// When a process last began without a table over entries of the one before.
    pub(super) anew_at: BTreeMap<MemberId, Time>,
    /// Gateways that lose their address, and when.
    pub(super) leaving: Vec<(Time, MemberId)>,
    begin_at: Time,
    collect_at: Time,
    /// When something was last not as it should be.
    disturbed_at: Time,
    pub steps: u64,
}

/// An entry that another program created, of a connection without packets.
pub(super) struct Planted {
    pub number: u32,
    pub connection: Connection,
    pub at: MemberId,
    pub since: Time,
    pub until: Time,
}

/// The latest connection of a tuple.
#[derive(Clone, Copy)]
struct Life {
    number: u32,
    began: Time,
    /// When it ended and in whose kernel, if all of it passed there.
    ended: Option<(Time, MemberId)>,
    /// Whether every kernel where an entry was made for it told that.
    is_heard: bool,
}

/// How long the entry of this flow lives without packets.
/// (Unacknowledged: the last packet there was data that nobody has acknowledged there.)
fn idle_of(timeouts: &Timeouts, flow: &Flow, is_unacknowledged: bool) -> Duration {
    let seconds = match (flow.is_tcp(), flow.is_talking()) {
        (true, true) if is_unacknowledged => timeouts.unacknowledged,
        (true, true) => timeouts.tcp[tcp::ESTABLISHED as usize],
        (true, false) => timeouts.tcp[tcp::LAST_ACK as usize],
        (false, _) => timeouts.udp_stream,
    };
    Duration::from_secs(seconds as u64)
}

/// The name of a helper, as the kernel has it.
pub(super) const FTP: [u8; HELPER_NAME] = *b"ftp\0\0\0\0\0\0\0\0\0\0\0\0\0";

pub(super) const VIP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(super) const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

impl<'m> Sim<'m> {
    pub fn new(seed: u64, plan: Plan, memories: &'m [OwnedMemory]) -> Sim<'m> {
        let mut world = World::new(seed, memories);
        world.sent = Some(Vec::new());
        world.as_announced = true;
        world.highest = plan.shards.len() as MemberId;
        world.network = plan.network;
        world.timing =
            Timing { heartbeat: ms(100), hold: HOLD, reprotect_after: ms(1000), compare: ms(1000) };
        let kernels: Kernels = Rc::default();
        let (of_feeds, may_be_unheard) = (kernels.clone(), plan.events == 2);
        world.make_feed = Some(Box::new(move |member, shard, shards, capacity, resumed| {
            let kernel = of_feeds.borrow()[&member].clone();
            if shard == 0 {
                kernel.listen(shards);
            }
            Box::new(Ends::new(kernel, shard, shards, capacity, resumed, may_be_unheard))
        }));
        let now = world.now;
        let mut sim = Sim {
            world,
            rng: Rng(seed ^ 0x7aff_1c00),
            kernels,
            flows: Vec::new(),
            free: Vec::new(),
            routes: vec![1; plan.routes],
            passed_at: BTreeMap::new(),
            shortened: BTreeMap::new(),
            sent: BTreeSet::new(),
            copied: BTreeSet::new(),
            lives: BTreeMap::new(),
            numbers: 0,
            fresh: 0,
            timeouts: vec![plan.timeouts.clone()],
            planted: Vec::new(),
            anew_at: BTreeMap::new(),
            leaving: Vec::new(),
            begin_at: now,
            collect_at: now,
            disturbed_at: now,
            steps: 0,
            plan,
        };
        for route in 0..sim.routes.len() {
            sim.routes[route] = 1 + sim.rng.below(sim.plan.shards.len() as u64) as MemberId;
        }
        sim
    }

    /// A gateway's kernel begins, with nothing in it.
    pub(super) fn boot(&mut self, member: MemberId) {
        let of = member as usize - 1;
        let nat = self.plan.nat.map(|is_masquerade| Nat {
            v4: Some(u32::from(VIP) as u128),
            v6: None,
            is_masquerade,
        });
        let settings = Settings {
            timeouts: self.timeouts.last().expect("there is one").clone(),
            max: self.plan.max[of],
            nat,
            events: self.plan.events,
            helpers: if self.plan.has_helper[of] { vec![(TCP, FTP)] } else { Vec::new() },
            has_labels: self.plan.has_labels[of],
        };
        let kernel = Kernel::new(member, settings, self.plan.room);
        kernel.log_to(self.world.log);
        kernel.has_address.set(self.routes.contains(&member));
        self.kernels.borrow_mut().insert(member, kernel);
    }

    pub(super) fn start(&mut self, member: MemberId) {
        let shards = self.plan.shards[member as usize - 1];
        self.world.note(member, "start", format_args!("{shards} shards"));
        self.world.start(member, shards, 100);
    }

    // The run.

    /// A whole run.
    pub fn run(&mut self) -> Result<(), Broken> {
        for member in 1..=self.plan.shards.len() as MemberId {
            self.boot(member);
            self.start(member);
        }
        self.run_for(SETTLES + ms(1000), true)?;
        for _ in 0..self.plan.faults {
            let span = ms(self.rng.below(4000));
            self.run_for(span, true)?;
            self.fault()?;
            if self.rng.chance(70) {
                self.heal()?;
                self.settle()?;
            }
        }
        self.heal()?;
        self.settle()?;
        self.run_out()
    }

    pub(super) fn run_for(&mut self, span: Duration, traffic: bool) -> Result<(), Broken> {
        let end = self.world.now.after(span);
        while !end.reached(self.world.now) {
            self.step(end, traffic)?;
        }
        Ok(())
    }

    fn step(&mut self, end: Time, traffic: bool) -> Result<(), Broken> {
        self.steps += 1;
        let flows = self.flows.iter().map(|flow| flow.at).min().unwrap_or(Time::NEVER);
        let begin = if traffic { self.begin_at } else { Time::NEVER };
        let leaving = self.leaving.iter().map(|(at, _)| *at).min().unwrap_or(Time::NEVER);
        let at =
            self.world.next_at().min(flows).min(begin).min(leaving).min(self.collect_at).min(end);
        self.world.step_to(at.max(self.world.now));
        let now = self.world.now;
        if self.is_disturbed() {
            self.disturbed_at = now;
        }
        if begin.reached(now) {
            self.begin();
        }
        if leaving.reached(now) {
            self.addresses_leave();
        }
        self.speak()?;
        if self.collect_at.reached(now) {
            self.collect_at = now.after(ms(200 + self.rng.below(3000)));
            self.each_kernel(|table, now| table.collect(now));
        }
        for member in self.world.live() {
            self.world.hear(member);
        }
        if let Some(found) = self.world.unannounced.take() {
            return Err(format!("timers are announced: {found}"));
        }
        self.world.events.clear();
        self.what_was_sent()
    }

    fn each_kernel(&self, act: impl Fn(&mut super::model::Table, Time)) {
        let now = self.world.now;
        for kernel in self.kernels.borrow().values() {
            kernel.act(now, &act);
        }
    }

    pub(super) fn kernel(&self, member: MemberId) -> Option<Rc<Kernel>> {
        self.kernels.borrow().get(&member).cloned()
    }

    /// Whether something is not as it should be right now.
    fn is_disturbed(&self) -> bool {
        let members = self.plan.shards.len();
        let view = |member: MemberId| {
            self.world.hosts.get(&member).is_some_and(|host| {
                let others = (1..=members as MemberId).filter(|other| *other != member);
                let mut seen = others.map(|other| &host.group.view().members[other as usize]);
                host.running
                    && !host.paused
                    && host.readiness.stage() == Stage::Ready
                    && seen.all(|seen| seen.status.is_alive() && seen.hears_me)
            })
        };
        self.kernels.borrow().len() < members
            || !self.world.cut.is_empty()
            || !(1..=members as MemberId).all(view)
    }

    pub(super) fn is_calm(&self) -> bool {
        self.world.now.since(self.disturbed_at) >= SETTLES
    }

    /// Something is about to happen: what had settled by now has to survive it.
    pub(super) fn disturb(&mut self) {
        let (now, is_calm) = (self.world.now, self.is_calm());
        // (What is left of an earlier copy in doubt is none.)
        let having = self.flows.iter().map(|flow| {
            let having = self.having(&flow.original, flow.leaving).into_iter();
            having.filter(|member| self.has_it(*member, &flow.original)).count()
        });
        let having: Vec<usize> = having.collect();
        for (flow, having) in self.flows.iter_mut().zip(having) {
            let is_old = flow.established.is_some_and(|at| now.since(at) >= HOLD + SETTLES);
            // One that is cut off already is no concern of what follows. (Nor what counts as
            // exposed: that there is nothing else without two copies is checked when all has
            // settled.)
            flow.is_safe = is_calm && is_old && flow.tries == 0 && having >= 2;
            flow.lacking.clear();
        }
        self.disturbed_at = now;
    }

    // Flows.

    fn begin(&mut self) {
        let now = self.world.now;
        let pause = self.plan.begins.mul_f64(self.rng.below(1000) as f64 / 1000.0) + ms(1);
        self.begin_at = now.after(pause);
        if self.flows.len() >= self.plan.flows {
            return;
        }
        let route = self.rng.below(self.routes.len() as u64) as usize;
        let protocol = if self.rng.chance(75) { TCP } else { UDP };
        let again = self.rng.chance(60).then(|| self.free.pop()).flatten();
        let original = again.unwrap_or_else(|| {
            let client = Ipv4Addr::from(
                0x0a00_0001 + self.rng.below(self.plan.clients) as u32 + (route as u32) * 16,
            );
            // With several gateways at work behind one address, each port is somebody's alone.
            let port = match self.plan.shards.len() > 2 {
                true => {
                    self.fresh += 1;
                    self.fresh % 20_000
                }
                false => self.rng.below(self.plan.ports) as u16,
            };
            let mut tuple = Tuple::v4(protocol, (client, 10_000 + port), (SERVER, 443));
            tuple.protocol = protocol;
            tuple
        });
        if self.flows.iter().any(|flow| flow.original == original) {
            return;
        }
        let protocol = original.protocol;
        // Where the address of the client says.
        let route = ((original.src as u32 - 0x0a00_0001) / 16) as usize;
        let end = if self.rng.chance(50) { End::Client } else { End::Server };
        let manner = match self.rng.below(10) {
            _ if protocol != TCP => Manner::Silence,
            0..4 => Manner::Fin(end),
            4..6 => Manner::Half(end),
            6..8 => Manner::Reset(end),
            _ => Manner::Silence,
        };
        let exchanges = [0, 1, 3, 20, 60][self.rng.below(5) as usize];
        let exchanges = if protocol == TCP { exchanges } else { exchanges.max(1) };
        self.numbers += 1;
        self.flows.push(Flow {
            original,
            number: self.numbers,
            route,
            step: if protocol == TCP { Step::Syn } else { Step::Say(End::Client) },
            exchanges: if exchanges > 0 { 1 + self.rng.below(exchanges) } else { 0 },
            rest: self.rng.below(4),
            manner,
            pause: ms([20, 300, 1500][self.rng.below(3) as usize]),
            at: now,
            tries: 0,
            syns: 0,
            since: now,
            leaving: None,
            way: None,
            established: None,
            passed: None,
            ended: None,
            is_intact: true,
            is_safe: false,
            is_mistaken: false,
            lacking: Vec::new(),
            left: None,
        });
    }

    /// Every packet that is due is sent.
    fn speak(&mut self) -> Result<(), Broken> {
        let now = self.world.now;
        for n in 0..self.flows.len() {
            if self.flows[n].at.reached(now) && self.flows[n].step != Step::Over {
                self.send(n)?;
            }
        }
        let (over, going): (Vec<Flow>, Vec<Flow>) =
            std::mem::take(&mut self.flows).into_iter().partition(|flow| flow.step == Step::Over);
        self.flows = going;
        for flow in over {
            // Silence leaves a server that goes on for a while: nobody takes that client's port at
            // once.
            if flow.ended.is_some() && !matches!(flow.manner, Manner::Silence) {
                self.free.push(flow.original);
            }
            let life = self.lives.entry(flow.original).or_insert(Life {
                number: 0,
                began: now,
                ended: None,
                is_heard: true,
            });
            if life.number == flow.number {
                let is_seen = flow.is_intact && !matches!(flow.manner, Manner::Silence);
                life.ended = flow.passed.filter(|_| is_seen);
            }
            self.world.note(0, "over", format_args!("{} {:?}", flow.original, flow.manner));
        }
        Ok(())
    }

    /// Whether a member's table has the connection, and not only what is left of an earlier copy
    /// and in doubt.
    pub(super) fn has_it(&self, member: MemberId, original: &Tuple) -> bool {
        let Some(host) = self.world.hosts.get(&member) else { return false };
        let shard = shard_of(original, host.shards.len().max(1) as u8) as usize;
        host.shards.get(shard).map(|shard| shard.table()).is_some_and(|table| {
            table
                .find_original(original)
                .is_some_and(|slot| table.kind(slot) != Kind::Held || !table.line(slot).is_unseen())
        })
    }

    /// Which gateway the next packet of this flow takes. In a group of more than two, when the
    /// routes have moved, it is one that has it, if any has: what a third one makes of it is not
    /// promised yet.
    fn way_of(&self, flow: &Flow) -> MemberId {
        let route = self.routes[flow.route];
        let Some((way, routed)) = flow.way.filter(|_| self.plan.shards.len() > 2) else {
            return route;
        };
        if routed == route && self.kernels.borrow().contains_key(&way) {
            return way;
        }
        let now = self.world.now;
        let has = |member: &MemberId| {
            self.has_it(*member, &flow.original)
                && self.kernel(*member).is_some_and(|kernel| {
                    kernel.act(now, |table, now| table.get(now, &flow.original).is_some())
                })
        };
        let all = [route, way].into_iter().chain(1..=self.plan.shards.len() as MemberId);
        all.into_iter().find(has).unwrap_or(route)
    }

    fn send(&mut self, n: usize) -> Result<(), Broken> {
        let now = self.world.now;
        let way = self.way_of(&self.flows[n]);
        let Some((end, packet)) = self.flows[n].packet() else { return Ok(()) };
        let kernel = self.kernel(way);
        let route = self.routes[self.flows[n].route];
        let flow = &mut self.flows[n];
        flow.way = Some((way, route));
        if now.since(flow.since) > GIVES_UP {
            self.world.note(way, "gives up", format_args!("{} {:?}", flow.original, flow.step));
            (flow.step, flow.manner) = (Step::Over, Manner::Silence);
            flow.ended = Some(now);
            return Ok(());
        }
        let Some(kernel) = kernel else {
            flow.lost(now);
            return Ok(());
        };
        if flow.passed.is_some_and(|(_, at)| at != way) {
            flow.is_intact = false;
            // No third member is asked for it yet: it may be nobody's by then.
            flow.is_mistaken |= !flow.is_safe && self.world.copies_of(&flow.original).is_empty();
        }
        let is_first = flow.passed.is_none();
        let had_entry = kernel.act(now, |table, now| table.get(now, &flow.original)).is_some();
        let verdict = kernel.act(now, |table, now| {
            // Who is outside begins nothing, and inside nothing but TCP's SYN begins a connection.
            // (What comes for the port of a connection that is lost may meet that port's next one:
            // its ends know better.)
            let there = table.get(now, &packet.tuple);
            if !packet.is_from_inside && there.is_none_or(|there| there.original != flow.original) {
                return Verdict::Dropped;
            }
            table.packet(now, &packet)
        });
        let entry = kernel.act(now, |table, now| table.get(now, &flow.original));
        // Where its packets have not passed for long its entry may have run out, though this member
        // still is its active: only a packet elsewhere that raised an event would have told.
        let has_run_out =
            self.passed_at.get(&(flow.original, way)).is_some_and(|(at, was_data)| {
                let lives = self.timeouts.iter().map(|of| idle_of(of, flow, *was_data)).min();
                now.since(*at) + ms(2000) >= lives.unwrap_or_default()
            });
        // So it may where this member took over because it believed that the other one is dead, and
        // no packet ever came. Its backup, which it asks then, may be dead already, and the routes
        // may not have moved yet.
        let just_now = Time(now.0.saturating_sub(ms(4000).as_nanos() as u64));
        let never_passed = !self.passed_at.contains_key(&(flow.original, way));
        let has_run_out =
            has_run_out || never_passed && kernel.ran_out_since(&flow.original, just_now);
        if !had_entry && has_run_out {
            flow.is_safe = false;
        }
        // So it may where a program has shortened its time.
        let shortened = self.shortened.get(&(flow.original, way));
        let is_missed = |until: &Time| {
            (*until..until.after(MISSED_FOR + ms(2000))).contains(&now.after(ms(2000)))
        };
        if !had_entry && shortened.is_some_and(is_missed) {
            flow.is_safe = false;
        }
        let is_lacking = !had_entry && flow.lacking.contains(&way);
        if is_lacking || self.plan.may_give_up(flow) {
            (flow.is_intact, flow.is_safe) = (false, false);
        }
        let has_to_pass = flow.is_intact || flow.is_safe;
        let why = if flow.is_intact {
            "nothing is cut that nothing happened to"
        } else {
            "one death cuts nothing"
        };
        let flow = &mut self.flows[n];
        let told = format!("{} {:?}", flow.original, flow.step);
        let wanted = match end {
            End::Client => flow.leaving,
            End::Server => Some(flow.original.mirrored()),
        };
        self.world.note(way, "packet", format_args!("{told} {verdict:?}"));
        match verdict {
            Verdict::Passed(leaving) if wanted.is_none_or(|wanted| wanted == leaving) => {
                if end == End::Client {
                    flow.leaving = Some(leaving);
                }
                let (was_talking, was_data) =
                    (flow.is_talking(), matches!(flow.step, Step::Say(_)));
                flow.arrived(now, way, &mut self.rng);
                if !had_entry && !is_first {
                    // For this kernel it begins here, and is held.
                    flow.established = flow.established.map(|_| now);
                }
                self.passed_at.insert((flow.original, way), (now, was_data));
                self.shortened.remove(&(flow.original, way));
                // (A SYN may pass the entry of the connection before.)
                let is_heard = (self.world.hosts[&way].running || self.plan.events == 1)
                    && kernel.act(now, |table, now| table.is_heard(now, &flow.original));
                if !had_entry
                    && !is_heard
                    && let Some(life) = self.lives.get_mut(&flow.original)
                {
                    life.is_heard = false;
                }
                if is_first {
                    // (What passes an entry that is there goes on with it, for the kernel.)
                    let was_heard = self.lives.get(&flow.original).is_none_or(|life| life.is_heard);
                    let is_heard = is_heard && (was_heard || !had_entry);
                    self.lives.insert(
                        flow.original,
                        Life { number: flow.number, began: now, ended: None, is_heard },
                    );
                }
                let state = entry.map(|entry| entry.state.tcp_state);
                if was_talking
                    && flow.is_tcp()
                    && state != Some(tcp::ESTABLISHED)
                    && !flow.is_mistaken
                {
                    if has_to_pass {
                        return Err(format!(
                            "one life changes no other: {told} passed {way}, whose entry is in {state:?}"
                        ));
                    }
                    flow.is_mistaken = true;
                }
                Ok(())
            }
            Verdict::Passed(leaving) => {
                if has_to_pass {
                    return Err(format!(
                        "{why}: {told} leaves {way} as {leaving}, not as {wanted:?}"
                    ));
                }
                // Another connection for whoever gets it.
                (flow.step, flow.manner) = (Step::Over, Manner::Silence);
                Ok(())
            }
            // An entry that stood in the way of the SYN went at this very moment, or while its
            // answer was on the way: the client sends it again.
            Verdict::Invalid | Verdict::Dropped
                if matches!(flow.step, Step::SynAck) && flow.syns < SYNS_MAX =>
            {
                (flow.step, flow.leaving) = (Step::Syn, None);
                flow.syns += 1;
                flow.lost(now);
                Ok(())
            }
            Verdict::Invalid | Verdict::Dropped => {
                if has_to_pass {
                    return Err(format!(
                        "{why}: {told} does not pass {way}: {verdict:?}, entry {entry:?}"
                    ));
                }
                flow.is_mistaken |= flow.established.is_some();
                flow.lost(now);
                Ok(())
            }
        }
    }

    // Checks.

    /// No datagram brings a connection whose end was there to be seen before it was ever sent.
    fn what_was_sent(&mut self) -> Result<(), Broken> {
        let now = self.world.now;
        let sent = self.world.sent.replace(Vec::new()).unwrap_or_default();
        for datagram in sent {
            let mut r = Reader::new(&datagram.bytes);
            let Ok(header) = Header::decode(&mut r, 7) else { continue };
            if header.opcode != OPCODE_SYNC || SyncHeader::decode(&mut r).is_err() {
                continue;
            }
            while let Ok(Some(message)) = Message::decode(&mut r) {
                let Message::New { connection, own, .. } = message else { continue };
                self.copied.insert((connection.original, datagram.to));
                let Some(life) = self.lives.get(&connection.original) else { continue };
                // (It may be an earlier one of the tuple that the sender took over.)
                let is_own = !self.copied.contains(&(connection.original, datagram.from));
                let is_first = self.sent.insert((
                    datagram.from,
                    header.to_shard,
                    own.slot,
                    own.generation.raw(),
                ));
                let ended = life
                    .ended
                    .filter(|(at, by)| now.since(*at) > SEEN_LATE && *by == datagram.from);
                // What events did not tell, the sender has to find out.
                let is_told = life.is_heard
                    && !self.kernels.borrow()[&datagram.from]
                        .was_untold_since(&connection.original, life.began);
                if let Some((ended, _)) = ended.filter(|_| is_first && is_own && is_told) {
                    return Err(format!(
                        "short connections are never sent: {} was over for {:?} when {} sent it to {}",
                        connection.original,
                        now.since(ended),
                        datagram.from,
                        datagram.to
                    ));
                }
            }
        }
        Ok(())
    }

    /// Faults end; some time later all has settled.
    fn settle(&mut self) -> Result<(), Broken> {
        let limit = self.world.now.after(ms(30_000));
        while !self.is_calm() {
            self.run_for(ms(100), true)?;
            if limit.reached(self.world.now) {
                return Err(format!("it settles: still not\n{}", self.world.describe()));
            }
        }
        // For a moment one may be missing: the entry of an active that is idle, while its traffic
        // is elsewhere, runs out. And what has no copy because another connection's entry is in the
        // way counts as exposed.
        let exposure = |sim: &Self| {
            let shards = sim.world.hosts.values().flat_map(|host| &host.shards);
            shards.map(|shard| shard.exposure()).sum::<u64>() as usize
        };
        let (alone, unexplained) = (self.without_two_copies(), self.unexplained());
        if alone.is_empty() && unexplained.is_empty() {
            return Ok(());
        }
        // The entry of an idle active has run out, and its backup looks for packets. Or it may have
        // gone with its address.
        let doubted = |sim: &Self, alone: &BTreeMap<u32, (Tuple, Vec<MemberId>)>| {
            let is_doubted = |tuple: &Tuple| sim.is_in_doubt(tuple) || sim.may_have_left(tuple);
            let doubted = alone.iter().filter(|(_, (tuple, _))| is_doubted(tuple));
            doubted.map(|(n, _)| *n).collect::<BTreeSet<u32>>()
        };
        let mut in_doubt = doubted(self, &alone);
        self.run_for(ms(1000), true)?;
        let (mut alone, before) = (self.without_two_copies(), alone);
        alone.retain(|n, _| before.contains_key(n));
        in_doubt.append(&mut doubted(self, &alone));
        let doubted = in_doubt;
        let exposed = exposure(self);
        if !doubted.is_empty() {
            self.run_for(DOUBT_LASTS.max(LEFT_FOR), true)?;
            let after = self.without_two_copies();
            alone.retain(|n, _| !doubted.contains(n) || after.contains_key(n));
        }
        if let Some((_, (tuple, having))) = alone.into_iter().nth(exposed) {
            let copies = self.world.copies().remove(&tuple);
            return Err(format!(
                "two copies: {tuple} is in the kernels of {having:?} only: {copies:?}"
            ));
        }
        // (A close may be on its way at two moments, of two connections of one port.)
        let again = self.unexplained();
        self.run_for(ms(100), true)?;
        let mut found = self.unexplained().into_iter();
        let is_still =
            |at: &(MemberId, Tuple)| unexplained.contains_key(at) && again.contains_key(at);
        match found.find(|(at, _)| is_still(at)) {
            Some((_, what)) => Err(format!("what has ended goes: {what}")),
            None => Ok(()),
        }
    }

    /// Whether a member holds this connection: it is looked for packets, and takes no copy.
    fn is_in_doubt(&self, tuple: &Tuple) -> bool {
        let tables =
            self.world.hosts.values().flat_map(|host| &host.shards).map(|shard| shard.table());
        tables.into_iter().any(|table| {
            table.find_original(tuple).is_some_and(|slot| table.kind(slot) == Kind::Held)
        })
    }

    /// Whether the active of this connection has neither its entry nor the address that it is
    /// translated to.
    fn may_have_left(&self, tuple: &Tuple) -> bool {
        self.plan.nat.is_some()
            && self.world.copies_of(tuple).iter().any(|copy| {
                copy.kind == Kind::Active
                    && self.kernel(copy.member).is_some_and(|kernel| {
                        let get = |table: &mut Table, now| table.get(now, tuple).is_none();
                        !kernel.has_address.get() && kernel.act(self.world.now, get)
                    })
            })
    }

    /// The kernels that have an entry of this connection, in this translation.
    fn having(&self, original: &Tuple, leaving: Option<Tuple>) -> Vec<MemberId> {
        let kernels = self.kernels.borrow();
        let having = kernels.iter().filter(|(_, kernel)| {
            let entry = kernel.act(self.world.now, |table, now| table.get(now, original));
            // (What has ended there is an earlier one's.)
            entry.is_some_and(|entry| {
                Some(entry.reply.mirrored()) == leaving && entry.phase() != Phase::Over
            })
        });
        having.map(|(member, _)| *member).collect()
    }

    /// Flows that are past their hold and have no entry in two kernels.
    fn without_two_copies(&self) -> BTreeMap<u32, (Tuple, Vec<MemberId>)> {
        let now = self.world.now;
        let mut alone = BTreeMap::new();
        for flow in &self.flows {
            let is_old = flow.established.is_some_and(|at| now.since(at) >= HOLD + SETTLES);
            // What its kernel did not tell of is found in a minute.
            let is_heard = self.lives.get(&flow.original).is_some_and(|life| life.is_heard);
            // What passes an entry that was left there is found then.
            let is_found = flow.passed.is_none_or(|(_, at)| {
                self.anew_at.get(&at).is_none_or(|anew| now.since(*anew) > LEFTOVERS_FOUND_AFTER)
            });
            if !is_found
                || self.plan.may_give_up(flow)
                || !is_old
                || !is_heard
                || !flow.is_talking()
                || flow.tries > 0
                || flow.is_mistaken
                || flow.left.is_some_and(|at| now.since(at) < LEFT_FOR)
            {
                continue;
            }
            let having = self.having(&flow.original, flow.leaving);
            if having.len() < 2 {
                alone.insert(flow.number, (flow.original, having));
            }
        }
        for planted in &self.planted {
            let Connection { original, reply, .. } = &planted.connection;
            let is_there =
                now.since(planted.since) >= HOLD + SETTLES && planted.until.since(now) > ms(2000);
            let having = self.having(original, Some(reply.mirrored()));
            if is_there && having == [planted.at] {
                alone.insert(planted.number, (*original, having));
            }
        }
        alone
    }

    /// Entries with the timeout of a copy that are none.
    fn unexplained(&self) -> BTreeMap<(MemberId, Tuple), String> {
        let now = self.world.now;
        let mut found = BTreeMap::new();
        for (member, kernel) in self.kernels.borrow().iter() {
            for entry in kernel.entries(now) {
                if entry.state.timeout_s > GIVEN_MAX_S && !self.is_copy(*member, &entry) {
                    let copies = self.world.copies().remove(&entry.original);
                    let what = format!(
                        "{} at {member} has the timeout of a copy, and no active lives: {copies:?}",
                        entry.original
                    );
                    found.insert((*member, entry.original), what);
                }
            }
        }
        found
    }

    /// Whether the table of this member says that the entry is a copy, and that of another one that
    /// it is the active.
    fn is_copy(&self, member: MemberId, entry: &Connection) -> bool {
        let copies = self.world.copies();
        let found = copies.get(&entry.original).map_or(&[][..], |found| &found[..]);
        found.iter().any(|copy| copy.member == member && copy.kind == Kind::Backup)
            && found.iter().any(|copy| copy.member != member && copy.kind == Kind::Active)
    }

    /// No new flows: the last ones come to their end, and then nothing is left anywhere.
    fn run_out(&mut self) -> Result<(), Broken> {
        self.world.note(0, "run out", format_args!("{} flows", self.flows.len()));
        for flow in &mut self.flows {
            flow.exchanges = flow.exchanges.min(2);
        }
        let limit = self.world.now.after(ms(60_000));
        while !self.flows.is_empty() && !limit.reached(self.world.now) {
            self.run_for(ms(100), false)?;
        }
        if let Some(flow) = self.flows.first() {
            return Err(format!("flows end: {flow:?}"));
        }
        let all =
            self.timeouts.iter().flat_map(|of| of.tcp.iter().chain([&of.udp, &of.udp_stream]));
        let longest = all.max().copied().unwrap_or_default();
        let unheard = if self.plan.events == 2 { 62 } else { 0 };
        // Whose end was lost may have gone with the address, and goes on for its time elsewhere.
        let again = if self.plan.nat.is_some() { LEFT_FOR.as_secs() as u32 + longest } else { 0 };
        self.run_for(Duration::from_secs((longest + unheard + again) as u64) + BOUND, false)?;
        self.each_kernel(|table, now| table.collect(now));
        let now = self.world.now;
        let copies = self.world.copies();
        for (member, kernel) in self.kernels.borrow().iter() {
            if let Some(entry) = kernel.entries(now).first() {
                return Err(format!(
                    "what has ended goes: {member} still has {} in state {} for {} s: {:?}",
                    entry.original,
                    entry.state.tcp_state,
                    entry.state.timeout_s,
                    copies.get(&entry.original)
                ));
            }
        }
        match copies.iter().next() {
            Some((tuple, found)) => {
                Err(format!("what has ended goes: {tuple} is still at {found:?}"))
            }
            None => Ok(()),
        }
    }
}
