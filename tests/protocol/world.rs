//! A world of a few members in one process: the shipped protocol over memory of its own, a
//! network that loses, repeats and delays, and simulated time. Everything follows from a seed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use hypersync::ccp::bytes::{Reader, Writer};
use hypersync::ccp::header::{Header, OPCODE_HEARTBEAT};
use hypersync::ccp::heartbeat::Heartbeat;
use hypersync::ccp::message::{Fault, Message};
use hypersync::ccp::sync::SyncHeader;
use hypersync::conn::extra::{Extra, parts};
use hypersync::conn::table::Written;
use hypersync::conn::{Connection, Coordinate, Kind, MemberId, Stamp, State, Tuple, shard_of};
use hypersync::counters::{Counter, Counters};
use hypersync::group::readiness::{Own, Readiness, Stage};
use hypersync::group::{Event, Group, Identity, Tables};
use hypersync::limits::{ARENA_MIN, DATAGRAM_MAX};
use hypersync::memory::{Memory, MemorySize, OwnedMemory, read_arena};
use hypersync::source::{Commit, CommitMode, LookShows, SourceEvent};
use hypersync::sync::stream::stream_member;
use hypersync::sync::{Replica, ReplicaConfig};
use hypersync::time::Time;

pub mod story;

/// One step of simulated time.
pub const STEP: Duration = Duration::from_micros(250);
pub const HOLD: Duration = Duration::from_millis(50);
pub const HEARTBEAT: Duration = Duration::from_millis(20);
pub const REPROTECT: Duration = Duration::from_millis(200);
pub const FLUSH: Duration = Duration::from_millis(1);
pub const COMPARE: Duration = Duration::from_millis(100);

/// The times that members which start from now on keep.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub heartbeat: Duration,
    pub hold: Duration,
    pub reprotect_after: Duration,
    pub compare: Duration,
}

/// A small generator (splitmix64) whose stream never changes between versions.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// What the network does to a datagram, and a kernel to a commit, in percent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Network {
    pub loss: u64,
    pub repeats: u64,
    pub late: u64,
    /// Commits that the kernel has no room for.
    pub refusals: u64,
}

/// A shard's end of a kernel that is played, in place of [`Host::kernel`].
pub trait Feed {
    /// As [`KernelFeed::ingest`](hypersync::feed::KernelFeed::ingest).
    fn ingest(&mut self, now: Time, replica: &mut Replica<'_>, counters: &Counters<'_>) -> bool;
    /// As [`KernelFeed::commit`](hypersync::feed::KernelFeed::commit).
    fn commit(&mut self, now: Time, replica: &mut Replica<'_>, counters: &Counters<'_>);
    /// When to look by itself.
    fn wake_at(&self, now: Time) -> Time;
    /// Whether everything that existed before the start was read.
    fn is_complete(&self) -> bool;
    /// Whether events wait and their arrival ends the shard's wait; they are read in the pass that
    /// follows.
    fn hear(&mut self, now: Time) -> bool;
}

/// Makes the feed of a shard: for a member, a shard of so many, with a table of so many slots, one
/// that goes on with a table or begins one.
pub type MakeFeed = dyn Fn(MemberId, u8, u8, u32, bool) -> Box<dyn Feed>;

/// A member that is running, or was.
pub struct Host<'m> {
    pub member: MemberId,
    pub identity: Identity,
    pub group: Group,
    pub shards: Vec<Replica<'m>>,
    pub memory: Vec<Memory<'m>>,
    pub running: bool,
    pub leaving: bool,
    /// Its shards' ends of a kernel that is played.
    pub feeds: Vec<Box<dyn Feed>>,
    /// What was committed to its kernel.
    pub kernel: HashMap<Tuple, Connection>,
    /// Entries that packets have passed since they were written, or that never were.
    pub touched: HashMap<Tuple, Connection>,
    /// Connections whose packets pass here all the time, without an event: their entries' timeouts
    /// stay high.
    pub passing: HashMap<Tuple, Connection>,
    /// This life of its table.
    pub table_id: u32,
    /// Its kernel takes no entries.
    pub full: bool,
    /// No pass is made; what arrives waits.
    pub paused: bool,
    /// How much faster its clock runs than time does, millionths.
    pub drift_ppm: i64,
    mail: VecDeque<Packet>,
    /// Where there are feeds, what arrived for each shard waits for its next pass, as in the
    /// appliance: the source's news of that pass come first.
    inboxes: Vec<VecDeque<Packet>>,
    /// When each shard makes its next pass by its own clock, if nothing arrives before.
    wake_at: Vec<Time>,
    /// Shards for which something arrived, or which have something left to do, as bits.
    awake: u64,
    /// Commits wait: its kernel is not asked at all.
    pub stalled: bool,
    pub readiness: Readiness,
    view_version: u64,
    /// Its process is killed after so many stores to its memory.
    pub doomed: Option<u64>,
}

/// What a shard of this member is told at its start.
fn config(identity: &Identity, shard: u8, commit: CommitMode, timing: Timing) -> ReplicaConfig {
    ReplicaConfig {
        group: 7,
        member: identity.member,
        shard,
        shards: identity.shards,
        site: 0,
        table_id: identity.table_id,
        index_key: identity.table_id as u64,
        hold: timing.hold,
        reprotect_after: timing.reprotect_after,
        flush: FLUSH,
        compare: timing.compare,
        commit,
    }
}

/// Pause between two pieces of a feed's work.
const FEED_PAUSE: Duration = Duration::from_millis(1);

/// Nothing follows sooner than this after something else, where time goes from one to the next:
/// what a pass takes.
const SHORTEST: Duration = Duration::from_micros(20);

/// The longest wait of a shard, as the appliance's is half of its heartbeats' interval.
const WAIT_MAX: Duration = Duration::from_millis(10);

/// Datagrams that wait for a member that makes no pass; further ones are lost.
const MAIL_MAX: usize = 300;

/// Datagrams that a pass may send, as of the real loop.
const SEND_ROOM: usize = 1024;

/// When every clock showed the same.
const BEGINNING: Time = Time(1_000_000_000);

impl Host<'_> {
    /// Shards that have a pass to make, as bits.
    fn due(&self, now: Time) -> u64 {
        let now = self.clock(now);
        let come = self.wake_at.iter().enumerate().filter(|(_, at)| at.reached(now));
        come.fold(self.awake, |bits, (shard, _)| bits | 1 << shard)
    }

    /// The time that this member's clock shows.
    pub fn clock(&self, now: Time) -> Time {
        let passed = now.since(BEGINNING).as_nanos() as i64;
        Time((BEGINNING.0 as i64 + passed + passed / 1_000_000 * self.drift_ppm) as u64)
    }
}

/// What happens on the way from one member to another, besides what the whole network does.
#[derive(Clone, Copy, Default)]
pub struct Link {
    /// Nothing arrives before.
    pub clogged_until: Time,
    /// Datagrams of more than 1200 bytes are lost before.
    pub narrow_until: Time,
}

/// A datagram as it left its sender.
pub struct Sent {
    pub from: MemberId,
    pub to: MemberId,
    pub bytes: Vec<u8>,
}

type Packet = Sent;

/// A connection as its user knows it.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub owner: MemberId,
    pub opened: Time,
    pub mark: u32,
}

pub struct World<'m> {
    pub now: Time,
    pub rng: Rng,
    pub network: Network,
    pub hosts: BTreeMap<MemberId, Host<'m>>,
    pub open: HashMap<Tuple, Known>,
    pub closed: Vec<Tuple>,
    pub cut: Vec<(MemberId, MemberId)>,
    pub links: HashMap<(MemberId, MemberId), Link>,
    /// What was sent in this step, if anybody wants to know.
    pub sent: Option<Vec<Sent>>,
    /// Told of everything that happens, a line each: member, what, detail.
    pub log: Option<fn(Time, MemberId, &str, std::fmt::Arguments<'_>)>,
    /// Bytes that each member's protocol has allocated and not freed since it was made, measured by
    /// this.
    pub allocated: Option<fn() -> isize>,
    pub grown: HashMap<MemberId, isize>,
    pub events: Vec<(MemberId, Event)>,
    pub fresh: u32,
    /// How members that start from now on commit.
    pub commit: CommitMode,
    pub timing: Timing,
    /// Passes are made when something arrives or a timer that was announced has come, as the
    /// appliance does, not at every step.
    pub as_announced: bool,
    /// What was found due at a time that nobody had announced.
    pub unannounced: Option<String>,
    /// Heartbeats go to members 1 to this one.
    pub highest: MemberId,
    /// Kernels are played by whoever made this.
    pub make_feed: Option<Box<MakeFeed>>,
    commit_rng: Rng,
    packets: BTreeMap<(Time, u64), Packet>,
    sequence: u64,
    memories: std::slice::Iter<'m, OwnedMemory>,
}

pub fn size() -> MemorySize {
    MemorySize::new(2048, ARENA_MIN)
}

pub fn memories(n: usize) -> Vec<OwnedMemory> {
    memories_of(n, size())
}

pub fn memories_of(n: usize, size: MemorySize) -> Vec<OwnedMemory> {
    (0..n).map(|_| OwnedMemory::new(&size)).collect()
}

pub fn address(member: MemberId) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 9, 0, member))
}

impl<'m> World<'m> {
    pub fn new(seed: u64, memories: &'m [OwnedMemory]) -> World<'m> {
        World {
            now: BEGINNING,
            rng: Rng(seed),
            commit_rng: Rng(!seed),
            network: Network::default(),
            hosts: BTreeMap::new(),
            open: HashMap::new(),
            closed: Vec::new(),
            cut: Vec::new(),
            links: HashMap::new(),
            sent: None,
            log: None,
            allocated: None,
            grown: HashMap::new(),
            events: Vec::new(),
            fresh: 0,
            commit: CommitMode::Eager,
            timing: Timing {
                heartbeat: HEARTBEAT,
                hold: HOLD,
                reprotect_after: REPROTECT,
                compare: COMPARE,
            },
            as_announced: false,
            unannounced: None,
            highest: 8,
            make_feed: None,
            packets: BTreeMap::new(),
            sequence: 0,
            memories: memories.iter(),
        }
    }

    /// Members that start from now on take these memories, one after the other.
    pub fn supply(&mut self, memories: &'m [OwnedMemory]) {
        self.memories = memories.iter();
    }

    /// Starts a member with an empty table.
    pub fn start(&mut self, member: MemberId, shards: u8, priority: u8) {
        let incarnation = self.rng.next() | 1;
        let table_id = incarnation as u32;
        let identity = Identity {
            member,
            shards,
            priority,
            site: 0,
            table_id,
            incarnation,
            heartbeat: self.timing.heartbeat,
            dead_after: 3,
        };
        let memory: Vec<Memory<'m>> =
            (0..shards).map(|_| self.memories.next().expect("enough memories").parts()).collect();
        let feeds = self.make_feeds(member, &memory, false);
        let (commit, timing) = (self.commit, self.timing);
        let replicas = memory.iter().enumerate().map(|(shard, memory)| {
            Replica::new(config(&identity, shard as u8, commit, timing), *memory)
        });
        let host = Host {
            member,
            shards: replicas.collect(),
            group: Group::new(identity.clone(), self.now),
            identity,
            memory,
            running: true,
            leaving: false,
            feeds,
            kernel: HashMap::with_capacity(8192),
            touched: HashMap::with_capacity(8192),
            passing: HashMap::with_capacity(64),
            table_id,
            full: false,
            paused: false,
            drift_ppm: 0,
            mail: VecDeque::new(),
            inboxes: (0..shards).map(|_| VecDeque::new()).collect(),
            wake_at: vec![Time(0); shards as usize],
            awake: 0,
            stalled: false,
            readiness: Readiness::new(self.timing.heartbeat * 3, self.now),
            view_version: 0,
            doomed: None,
        };
        self.grown.insert(member, 0);
        self.hosts.insert(member, host);
    }

    fn make_feeds(
        &self,
        member: MemberId,
        memory: &[Memory<'_>],
        is_resumed: bool,
    ) -> Vec<Box<dyn Feed>> {
        let Some(make) = &self.make_feed else { return Vec::new() };
        let shards = memory.len() as u8;
        let feed = |(shard, memory): (usize, &Memory<'_>)| {
            make(member, shard as u8, shards, memory.slots.len() as u32, is_resumed)
        };
        memory.iter().enumerate().map(feed).collect()
    }

    /// The member dies with its table. What its users had there moves to the others by `move_to`.
    pub fn kill(&mut self, member: MemberId) {
        let host = self.host(member);
        host.running = false;
        host.feeds.clear();
        self.packets.retain(|_, p| p.to != member);
    }

    /// The process of a member that was killed starts again and takes up the memory that was left
    /// behind. Its kernel went on: what was owed to it is found by look-ups, as the feed makes
    /// them. If it is doomed it may be killed again before it is ready; then it starts once more.
    pub fn resume(&mut self, member: MemberId) {
        while self.mortal(member, |world| world.take_up(member)).is_none() {}
    }

    fn take_up(&mut self, member: MemberId) {
        let incarnation = self.rng.next() | 1;
        let (true_now, commit, timing) = (self.now, self.commit, self.timing);
        let is_played = self.make_feed.is_some();
        let feeds = self.make_feeds(member, &self.hosts[&member].memory, true);
        let host = self.host(member);
        assert!(!host.running);
        host.feeds = feeds;
        let now = host.clock(true_now);
        host.identity.incarnation = incarnation;
        let mut group = Group::new(host.identity.clone(), now);
        for (id, known) in host.group.view().others() {
            group.remember(now, id, known);
        }
        host.group = group;
        host.shards.clear();
        let mut lost = 0;
        for (shard, memory) in host.memory.iter().enumerate() {
            let (replica, torn) =
                Replica::resume(config(&host.identity, shard as u8, commit, timing), *memory, now);
            host.shards.push(replica);
            lost += torn;
        }
        let Host { shards, kernel, .. } = host;
        if commit == CommitMode::Eager && !is_played {
            for shard in shards.iter_mut() {
                for slot in 0..shard.table().capacity() {
                    let connection = shard.table().connection(slot);
                    let is_copy = shard.table().kind(slot) == Kind::Backup;
                    if is_copy && kernel.get(&connection.original) != Some(&connection) {
                        shard.recommit(now, slot);
                    }
                }
            }
        }
        let count = shards.len() as u8;
        kernel.retain(|tuple, _| {
            shards[shard_of(tuple, count) as usize].table().find_original(tuple).is_some()
        });
        (host.running, host.paused) = (true, false);
        host.readiness = Readiness::new(timing.heartbeat * 3, now);
        host.view_version = 0;
        host.awake = u64::MAX;
        host.mail.clear();
        host.inboxes.iter_mut().for_each(VecDeque::clear);
        self.note(member, "resume", format_args!("{lost} slots were torn"));
        self.grown.insert(member, 0);
    }

    /// Lets a member that is doomed do something; `None` if its process was killed meanwhile.
    fn mortal<R>(&mut self, member: MemberId, act: impl FnOnce(&mut Self) -> R) -> Option<R> {
        #[cfg(not(feature = "mutations"))]
        {
            let _ = member;
            Some(act(self))
        }
        #[cfg(feature = "mutations")]
        {
            use hypersync::kill;
            let doomed = self.hosts.get_mut(&member).and_then(|host| host.doomed.take());
            if doomed.is_none() {
                return Some(act(self));
            }
            kill::arm(doomed);
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| act(self)));
            let left = kill::disarm();
            match result {
                Ok(result) => {
                    self.host(member).doomed = left;
                    Some(result)
                }
                Err(payload) if payload.is::<kill::Killed>() => {
                    self.note(member, "killed", format_args!("in the middle of a store"));
                    self.kill(member);
                    None
                }
                Err(payload) => std::panic::resume_unwind(payload),
            }
        }
    }

    pub fn host(&mut self, member: MemberId) -> &mut Host<'m> {
        self.hosts.get_mut(&member).expect("the member was started")
    }

    /// What a member sent and has not arrived by then never does.
    pub fn forget_mail_of(&mut self, member: MemberId, by: Time) {
        self.packets.retain(|(at, _), p| p.from != member || at.reached(by));
    }

    /// A datagram arrives that nobody in the group sent, or not like this.
    pub fn inject(&mut self, member: MemberId, source: IpAddr, shard: u8, bytes: &[u8]) {
        let now = self.now;
        let host = self.host(member);
        let now = host.clock(now);
        host.awake |= 1 << shard;
        host.shards[shard as usize].handle_datagram(now, Some(source), bytes);
    }

    pub fn counter(&self, member: MemberId, counter: Counter) -> u64 {
        self.hosts[&member].memory.iter().map(|m| Counters::new(m.counters).get(counter)).sum()
    }

    /// A tuple that no connection ever had.
    pub fn fresh_tuple(&mut self) -> Tuple {
        self.fresh += 1;
        let client = Ipv4Addr::from(0x0a00_0000 + self.fresh);
        Tuple::v4(
            6,
            (client, 1024 + self.fresh as u16 % 50_000),
            (Ipv4Addr::new(192, 0, 2, 1), 443),
        )
    }

    fn connection(tuple: Tuple, mark: u32) -> Connection {
        let state =
            State { status: 0xe, tcp_state: 3, timeout_s: 432_000, mark, ..State::default() };
        let mut connection = Connection::new(tuple, Tuple { dport: 9, ..tuple.mirrored() }, state);
        if tuple.sport.is_multiple_of(8) {
            let labels = u128::from(mark).to_ne_bytes();
            connection.extra = Extra { parts: parts::LABELS, labels, ..Extra::NONE };
        }
        connection
    }

    pub fn tell(&mut self, member: MemberId, event: &SourceEvent) {
        let original = *event.original();
        let touched = &mut self.host(member).touched;
        match event {
            SourceEvent::Seen { connection, .. } => drop(touched.insert(original, *connection)),
            SourceEvent::Gone { .. } => drop(touched.remove(&original)),
        }
        match event {
            SourceEvent::Seen { connection, .. } => {
                self.note(
                    member,
                    "seen",
                    format_args!(
                        "{original} status {} mark {} timeout {}",
                        connection.state.status, connection.state.mark, connection.state.timeout_s
                    ),
                );
            }
            SourceEvent::Gone { .. } => self.note(member, "gone", format_args!("{original}")),
        }
        let shard = shard_of(&original, self.hosts[&member].shards.len() as u8);
        self.rouse(member, shard);
        let now = self.now;
        let before = self.allocated.map_or(0, |allocated| allocated());
        let host = self.host(member);
        let now = host.clock(now);
        self.mortal(member, |world| {
            world.host(member).shards[shard as usize].handle_source(now, event)
        });
        self.account(member, before);
    }

    /// Tells the log, if there is one.
    pub fn note(&self, member: MemberId, what: &str, detail: std::fmt::Arguments<'_>) {
        if let Some(log) = self.log {
            log(self.now, member, what, detail);
        }
    }

    fn account(&mut self, member: MemberId, before: isize) {
        if let Some(allocated) = self.allocated {
            *self.grown.entry(member).or_default() += allocated() - before;
        }
    }

    pub fn open_at(&mut self, member: MemberId) -> Tuple {
        let tuple = self.fresh_tuple();
        self.reopen_at(member, tuple);
        tuple
    }

    pub fn reopen_at(&mut self, member: MemberId, tuple: Tuple) {
        let mark = self.rng.next() as u32;
        self.tell(member, &SourceEvent::seen(Self::connection(tuple, mark)));
        self.open.insert(tuple, Known { owner: member, opened: self.now, mark });
    }

    pub fn change(&mut self, tuple: Tuple) {
        let mark = self.rng.next() as u32;
        let known = self.open.get_mut(&tuple).expect("it is open");
        known.mark = mark;
        let owner = known.owner;
        self.tell(owner, &SourceEvent::seen(Self::connection(tuple, mark)));
    }

    /// What the feed of a resumed member learns from its kernel by a dump and look-ups. It takes
    /// nothing for news where the table says that the traffic is somebody else's.
    pub fn read_kernel(&mut self, member: MemberId) {
        let open =
            self.open.iter().filter(|(_, k)| k.owner == member).map(|(t, k)| (*t, Some(k.mark)));
        let mut tuples: Vec<(Tuple, Option<u32>)> =
            open.chain(self.closed.iter().map(|t| (*t, None))).collect();
        tuples.sort();
        for (original, mark) in tuples {
            let shards = &self.hosts[&member].shards;
            let shard = &shards[shard_of(&original, shards.len() as u8) as usize];
            let found = shard.table().find_original(&original);
            match mark {
                _ if found.is_some_and(|slot| shard.is_unclaimed(slot)) => {}
                Some(mark) => {
                    self.tell(member, &SourceEvent::seen(Self::connection(original, mark)))
                }
                None if found.is_some() => self.tell(member, &SourceEvent::gone(original)),
                None => {}
            }
        }
    }

    pub fn close(&mut self, tuple: Tuple) {
        let known = self.open.remove(&tuple).expect("it is open");
        self.tell(known.owner, &SourceEvent::gone(tuple));
        self.closed.push(tuple);
    }

    /// A random one of the open connections.
    pub fn any_open(&mut self) -> Option<Tuple> {
        // Sorted: a map's order is not part of the seed.
        let mut tuples: Vec<&Tuple> = self.open.keys().collect();
        if tuples.is_empty() {
            return None;
        }
        tuples.sort();
        let n = self.rng.below(tuples.len() as u64) as usize;
        Some(*tuples[n])
    }

    fn post(&mut self, from: MemberId, to: MemberId, bytes: Vec<u8>) {
        let link = self.links.get(&(from, to)).copied().unwrap_or_default();
        let narrow = !link.narrow_until.reached(self.now) && bytes.len() > 1200;
        if self.log.is_some() {
            self.note(from, "send", format_args!("to {to}: {}", describe_datagram(&bytes)));
        }
        if let Some(sent) = &mut self.sent {
            sent.push(Sent { from, to, bytes: bytes.clone() });
        }
        let copies = 1 + self.rng.chance(self.network.repeats) as u32;
        for _ in 0..copies {
            if self.rng.chance(self.network.loss) || self.cut.contains(&(from, to)) || narrow {
                self.note(from, "lost", format_args!("to {to}: {}", describe_head(&bytes)));
                continue;
            }
            let mut delay = 50 + self.rng.below(100);
            if self.rng.chance(self.network.late) {
                delay += self.rng.below(20_000);
            }
            self.sequence += 1;
            let at = self.now.max(link.clogged_until).after(Duration::from_micros(delay));
            self.packets.insert((at, self.sequence), Packet { from, to, bytes: bytes.clone() });
        }
    }

    /// A kernel that is played has something to tell this member.
    pub fn hear(&mut self, member: MemberId) {
        let (now, host) = (self.now, self.host(member));
        if !host.running || host.paused {
            return;
        }
        let now = host.clock(now);
        for (shard, feed) in host.feeds.iter_mut().enumerate() {
            host.awake |= u64::from(feed.hear(now)) << shard;
        }
    }

    /// One step of time for everybody.
    pub fn step(&mut self) {
        self.step_to(self.now.after(STEP));
    }

    /// When the next thing happens by itself, if passes are made as announced: something arrives,
    /// or a timer comes.
    pub fn next_at(&self) -> Time {
        let arrival = self.packets.first_key_value().map(|((at, _), _)| *at);
        let wakes = self.hosts.values().filter(|host| host.running && !host.paused).map(|host| {
            let now = host.clock(self.now);
            let at = host.wake_at.iter().copied().min().unwrap_or(Time::NEVER);
            if host.awake != 0 { self.now } else { self.now.after(at.since(now)) }
        });
        wakes.chain(arrival).min().unwrap_or(Time::NEVER).max(self.now.after(SHORTEST))
    }

    /// Time goes on to then.
    pub fn step_to(&mut self, now: Time) {
        self.now = now;
        while let Some(entry) = self.packets.first_entry() {
            if !entry.key().0.reached(self.now) {
                break;
            }
            let packet = entry.remove();
            let to = packet.to;
            self.mortal(to, |world| world.deliver(packet));
        }
        for member in self.hosts.keys().copied().collect::<Vec<_>>() {
            let host = &self.hosts[&member];
            let shards = if self.as_announced { host.due(self.now) } else { u64::MAX };
            if host.running && !host.paused && shards != 0 {
                self.pass(member, shards);
            }
        }
    }

    /// A pass of these shards (bits) of a member; returns what it sent.
    fn pass(&mut self, member: MemberId, shards: u64) -> usize {
        let before = self.allocated.map_or(0, |allocated| allocated());
        let out = self.mortal(member, |world| world.run(member, shards)).unwrap_or_default();
        self.account(
            member,
            before
                + out.iter().map(|(_, bytes)| bytes.capacity() as isize).sum::<isize>()
                + (out.capacity() * size_of::<(MemberId, Vec<u8>)>()) as isize,
        );
        let sent = out.len();
        for (to, bytes) in out {
            self.post(member, to, bytes);
        }
        sent
    }

    /// Something is about to arrive for a shard. If it sleeps it makes a pass first, as a loop may
    /// that is woken for nothing: whatever that finds to do should have been announced.
    fn rouse(&mut self, member: MemberId, shard: u8) {
        let host = &self.hosts[&member];
        if !self.as_announced || !host.running || host.paused {
            return;
        }
        if host.due(self.now) >> shard & 1 == 0 {
            let (at, now) = (host.wake_at[shard as usize], host.clock(self.now));
            let sent = self.pass(member, 1 << shard);
            // (What a feed does piece by piece, with a pause between two, it does sooner if it is
            // called sooner.)
            let is_paced = !self.hosts[&member].feeds.is_empty() && at.since(now) <= FEED_PAUSE;
            if sent > 0 && !is_paced {
                self.unannounced.get_or_insert_with(|| {
                    format!(
                        "shard {shard} of {member} sent {sent} datagrams {:?} too early",
                        at.since(now)
                    )
                });
            }
        }
        self.host(member).awake |= 1 << shard;
    }

    fn deliver(&mut self, packet: Packet) {
        if self.log.is_some() {
            let Sent { from, to, bytes } = &packet;
            self.note(*to, "arrive", format_args!("from {from}: {}", describe_head(bytes)));
        }
        let mut r = Reader::new(&packet.bytes);
        let Ok(header) = Header::decode(&mut r, 7) else { return };
        let shards = self.hosts.get(&packet.to).map_or(0, |host| host.shards.len());
        if (header.to_shard as usize) < shards {
            self.rouse(packet.to, header.to_shard);
        }
        let now = self.now;
        let before = self.allocated.map_or(0, |allocated| allocated());
        let Some(host) = self.hosts.get_mut(&packet.to).filter(|h| h.running) else { return };
        if host.paused {
            if host.mail.len() < MAIL_MAX {
                host.mail.push_back(packet);
            }
            return;
        }
        let (now, member) = (host.clock(now), packet.to);
        if header.opcode == OPCODE_HEARTBEAT {
            if let Ok(heartbeat) = Heartbeat::decode(&header, &mut r, packet.bytes.len()) {
                host.group.handle_heartbeat(now, address(packet.from), &heartbeat);
            }
        } else if (header.to_shard as usize) < host.shards.len() {
            let to = header.to_shard as usize;
            match host.feeds.is_empty() {
                true => {
                    host.shards[to].handle_datagram(now, Some(address(packet.from)), &packet.bytes)
                }
                false => host.inboxes[to].push_back(packet),
            }
        }
        self.account(member, before);
    }

    /// A pass of these shards (bits) of a member; what it sends.
    fn run(&mut self, member: MemberId, mut shards: u64) -> Vec<(MemberId, Vec<u8>)> {
        let (now, log) = (self.now, self.log);
        let true_now = now;
        let host = self.hosts.get_mut(&member).expect("it exists");
        let now = host.clock(now);
        let mut out: Vec<(MemberId, Vec<u8>)> = Vec::new();
        if shards & 1 == 1 {
            host.group.begin_pass(now, false);
            for shard in &mut host.shards {
                let goodbyes = shard.take_goodbyes();
                for gone in (1..64).filter(|m| goodbyes >> m & 1 == 1) {
                    host.group.handle_goodbye(now, gone);
                }
            }
            host.group.tick(now);
            while let Some(event) = host.group.poll_event() {
                if let Some(log) = log {
                    log(true_now, member, "group", format_args!("{event:?}"));
                }
                self.events.push((member, event));
            }
            if host.group.view().version != host.view_version {
                host.view_version = host.group.view().version;
                for shard in &mut host.shards {
                    shard.handle_view(now, host.group.view());
                }
                shards = u64::MAX; // Their doorbells ring.
            }
            // As in the appliance's membership.
            let version = host.group.view().version;
            let own = Own {
                complete: host.feeds.iter().all(|feed| feed.is_complete()),
                copies: host
                    .memory
                    .iter()
                    .map(|m| Counters::new(m.counters).get(Counter::ConnectionsBackup))
                    .sum(),
                version,
                settled: if host.shards.iter().all(|s| s.commits_waiting() == 0) {
                    version
                } else {
                    0
                },
            };
            while let Some(stage) = host.readiness.tick(now, host.group.view(), &own) {
                if let Some(log) = log {
                    log(true_now, member, "stage", format_args!("{stage:?}"));
                }
            }
            let stage = host.readiness.stage();
            let leased =
                host.memory.iter().map(|m| Counters::new(m.counters).get(Counter::SlotsLeased));
            let room =
                leased.sum::<u64>() + host.shards.iter().map(|s| s.room() as u64).sum::<u64>();
            let capacity = host.memory.iter().map(|m| m.slots.len() as u64).sum();
            let leaving = host.leaving;
            let tables = Tables {
                capacity,
                room,
                ready: stage == Stage::Ready && !leaving,
                syncing: stage == Stage::Syncing && !leaving,
                synced: host.shards.iter().fold(u64::MAX, |bits, shard| bits & shard.synced()),
                leaving,
            };
            if let Some((heartbeat, shown)) = host.group.poll_heartbeat(now, &tables) {
                let mut bytes = vec![0; DATAGRAM_MAX];
                let mut w = Writer::new(&mut bytes);
                heartbeat.encode(7, &shown, &mut w);
                let len = w.len();
                bytes.truncate(len);
                out.extend(
                    (1..=self.highest).filter(|to| *to != member).map(|to| (to, bytes.clone())),
                );
            }
        }
        host.awake &= !shards;
        if !out.is_empty() {
            host.awake |= 1; // As after every send.
        }
        for (index, memory) in
            host.memory.iter().enumerate().filter(|(index, _)| shards >> index & 1 == 1)
        {
            let shard = &mut host.shards[index];
            let counters = Counters::new(memory.counters);
            let feed = host.feeds.get_mut(index);
            let mut feed_busy = false;
            if let Some(feed) = feed {
                feed_busy = feed.ingest(now, shard, &counters);
                shard.set_source_behind(now, feed_busy);
            }
            let inbox = &mut host.inboxes[index];
            while shard.receive_room() > 0
                && let Some(Packet { from, bytes, .. }) = inbox.pop_front()
            {
                shard.handle_datagram(now, Some(address(from)), &bytes);
            }
            if inbox.is_empty() {
                shard.received_all(now);
            }
            shard.tick(now);
            if let Some(feed) = host.feeds.get_mut(index) {
                feed.commit(now, shard, &counters);
            }
            while !host.stalled
                && host.feeds.is_empty()
                && let Some(commit) = shard.poll_commit(true)
            {
                let refused = host.full || self.commit_rng.chance(self.network.refusals);
                match commit {
                    Commit::Delete { original } => {
                        host.kernel.remove(&original);
                        host.touched.remove(&original);
                    }
                    Commit::DeleteUntouched { original } => {
                        host.kernel.remove(&original);
                    }
                    Commit::Look { slot, generation, .. } => {
                        let original = shard.table().tuples(slot).0;
                        let (touched, written) =
                            (host.touched.get(&original), host.kernel.get(&original));
                        let shows = match touched {
                            Some(_) => LookShows::Packets,
                            None => LookShows::Nothing,
                        };
                        shard.handle_look(now, slot, generation, touched.or(written), shows);
                    }
                    // Timeouts do not run down here: but for what passes now, events tell.
                    Commit::Watch { slot, generation } => {
                        let mut own = shard.table().connection(slot);
                        own.state.timeout_s = 0;
                        let silent = (!shard.table().line(slot).is_unseen()).then_some(&own);
                        let there = host.passing.get(&own.original).or(silent);
                        shard.handle_watch(now, slot, generation, there);
                    }
                    // What is active by now the kernel knows better.
                    Commit::Write { slot, .. } if shard.table().kind(slot) == Kind::Active => {}
                    Commit::Write { slot, generation }
                    | Commit::Again { slot, generation }
                    | Commit::Refresh { slot, generation } => {
                        if shard.table().line(slot).generation() == generation {
                            let connection = shard.table().connection(slot);
                            if !refused {
                                host.kernel.insert(connection.original, connection);
                                host.touched.remove(&connection.original);
                            }
                            let outcome =
                                if refused { Err(Fault::NoRoom) } else { Ok(Written::Yes) };
                            shard.handle_commit(now, slot, generation, outcome);
                        }
                    }
                }
            }
            let mut landed = Vec::new();
            shard.transmit(now, SEND_ROOM);
            while let Some(transmit) = shard.poll_transmit() {
                let mut bytes = vec![0; transmit.len as usize];
                read_arena(memory.arena, transmit.offset as usize, &mut bytes);
                let to = stream_member(transmit.stream);
                out.extend(bytes.chunks(DATAGRAM_MAX).map(|datagram| (to, datagram.to_vec())));
                landed.push(transmit.token);
            }
            // What was sent, and commits that wait, end the wait that follows.
            let busy = feed_busy
                || !host.inboxes[index].is_empty()
                || !landed.is_empty()
                || shard.commits_waiting() > 0
                || shard.receive_room() == 0;
            host.awake |= u64::from(busy) << index;
            for token in landed {
                shard.on_send_complete(token, false);
            }
            if self.as_announced {
                let at = now.after(WAIT_MAX).min(shard.poll_at());
                let at = host.feeds.get(index).map_or(at, |feed| at.min(feed.wake_at(now)));
                host.wake_at[index] = if index == 0 { at.min(host.group.poll_at()) } else { at };
            }
        }
        out
    }

    /// The member makes no pass from now on, or goes on and reads what waited.
    pub fn pause(&mut self, member: MemberId, paused: bool) {
        let host = self.host(member);
        host.paused = paused;
        // What its kernel had to tell meanwhile, its loop finds with the datagrams.
        self.hear(member);
        let host = self.host(member);
        for packet in std::mem::take(&mut host.mail) {
            self.deliver(packet);
        }
    }

    /// The member is told to end: its shards are woken.
    pub fn drain(&mut self, member: MemberId) {
        for shard in 0..self.hosts[&member].shards.len() {
            self.rouse(member, shard as u8);
        }
        let host = self.host(member);
        host.leaving = true;
        host.shards.iter_mut().for_each(Replica::handle_leaving);
    }

    /// Says goodbye at once; the member is gone afterwards.
    pub fn goodbye(&mut self, member: MemberId) {
        let host = self.host(member);
        let memory = host.memory[0];
        let mut out = Vec::new();
        host.shards[0].send_goodbyes();
        while let Some(transmit) = host.shards[0].poll_transmit() {
            let mut bytes = vec![0; transmit.len as usize];
            read_arena(memory.arena, transmit.offset as usize, &mut bytes);
            out.push((stream_member(transmit.stream), bytes));
        }
        for (to, bytes) in out {
            self.post(member, to, bytes);
        }
        self.host(member).running = false;
    }

    pub fn run_for(&mut self, span: Duration) {
        let end = self.now.after(span);
        while !end.reached(self.now) {
            self.step();
        }
    }

    /// Runs until the condition holds; panics after `limit`.
    pub fn run_until(
        &mut self,
        limit: Duration,
        what: &str,
        mut holds: impl FnMut(&World<'m>) -> bool,
    ) {
        let end = self.now.after(limit);
        while !holds(self) {
            assert!(
                !end.reached(self.now),
                "after {limit:?} still not: {what}\n{}",
                self.describe()
            );
            self.step();
        }
    }

    pub fn live(&self) -> Vec<MemberId> {
        self.hosts.values().filter(|h| h.running).map(|h| h.member).collect()
    }

    /// Whether nobody has anything left to send. Who is alone stays exposed, and says so.
    pub fn is_quiet(&self) -> bool {
        if let [alone] = self.live()[..] {
            let held = [Counter::ConnectionsActive, Counter::ConnectionsBackup];
            return self.counter(alone, Counter::Exposure)
                == held.map(|c| self.counter(alone, c)).iter().sum::<u64>();
        }
        let settled = |h: &Host<'_>| h.shards.iter().all(|s| s.exposure() == 0);
        self.hosts.values().filter(|h| h.running).all(settled)
            && self.live().iter().all(|member| self.counter(*member, Counter::ReleasesPending) == 0)
    }

    /// Everything that live members hold, by original tuple.
    pub fn copies(&self) -> HashMap<Tuple, Vec<Copy>> {
        let mut copies: HashMap<Tuple, Vec<Copy>> = HashMap::new();
        for host in self.hosts.values().filter(|h| h.running) {
            for (shard, replica) in host.shards.iter().enumerate() {
                for slot in 0..replica.table().capacity() {
                    if !replica.table().kind(slot).is_connection() {
                        continue;
                    }
                    let copy = Copy::of(host.member, replica, slot);
                    let original = copy.connection.original;
                    assert_eq!(shard_of(&original, host.shards.len() as u8) as usize, shard);
                    copies.entry(original).or_default().push(copy);
                }
            }
        }
        copies
    }

    /// What live members hold of one tuple.
    pub fn copies_of(&self, tuple: &Tuple) -> Vec<Copy> {
        let mut copies = Vec::new();
        for host in self.hosts.values().filter(|h| h.running) {
            let replica = &host.shards[shard_of(tuple, host.shards.len() as u8) as usize];
            let table = replica.table();
            let is_it =
                |slot: &u32| table.kind(*slot).is_connection() && table.tuples(*slot).0 == *tuple;
            let found = (0..table.capacity()).filter(is_it);
            copies.extend(found.map(|slot| Copy::of(host.member, replica, slot)));
        }
        copies
    }

    /// Each open connection past its hold time is on exactly two members (or on one, if only one
    /// lives), these agree and name each other; nothing else is anywhere.
    pub fn check(&self) {
        let copies = self.copies();
        let expected = self.live().len().min(2);
        for (tuple, known) in &self.open {
            let empty = Vec::new();
            let found = copies.get(tuple).unwrap_or(&empty);
            let held = found.len() == 1 && found[0].kind == Kind::Held;
            if held {
                continue;
            }
            assert_eq!(found.len(), expected, "{tuple}: {known:?}, copies {found:?}");
            let actives = found.iter().filter(|c| c.kind == Kind::Active).count();
            // Who is alone and was the backup is presumed active.
            assert!(actives == 1 || expected == 1 && actives == 0, "{tuple}: {found:?}");
            for copy in found {
                assert_eq!(
                    copy.connection,
                    Self::connection(*tuple, known.mark),
                    "{tuple}: {found:?}"
                );
                assert_eq!(copy.stamp, found[0].stamp, "{tuple}: {found:?}");
                if copy.kind == Kind::Backup && self.commit == CommitMode::Eager && expected == 2 {
                    let entry = self.hosts[&copy.member].kernel.get(tuple);
                    assert_eq!(entry, Some(&copy.connection), "{tuple}: the backup's kernel");
                }
                if expected == 2 {
                    let other =
                        found.iter().find(|c| c.member != copy.member).expect("two members");
                    assert_eq!(copy.peer, other.place, "{tuple}: {found:?}");
                }
            }
        }
        for (tuple, found) in &copies {
            assert!(self.open.contains_key(tuple), "{tuple} is closed and still at {found:?}");
        }
    }

    pub fn describe(&self) -> String {
        let mut text = String::new();
        for host in self.hosts.values() {
            text += &format!(
                "member {} {} exposure {:?} unprotected {} busy since {} us\n",
                host.member,
                if host.running { "running" } else { "gone" },
                host.shards.iter().map(|s| s.exposure()).collect::<Vec<_>>(),
                self.counter(host.member, Counter::Unprotected),
                self.counter(host.member, Counter::ExposureOldestUs),
            );
            for info in hypersync::counters::COUNTERS {
                let value = self.counter(host.member, info.counter);
                if value > 0 {
                    text += &format!("    {} {value}\n", info.name);
                }
            }
        }
        text
    }
}

/// One copy of a connection.
#[derive(Clone, Copy)]
pub struct Copy {
    pub member: MemberId,
    pub kind: Kind,
    pub stamp: Stamp,
    pub place: u64,
    pub peer: u64,
    pub connection: Connection,
}

impl Copy {
    fn of(member: MemberId, replica: &Replica<'_>, slot: u32) -> Copy {
        let line = replica.table().line(slot);
        Copy {
            member,
            kind: line.kind(),
            stamp: line.stamp(),
            place: replica.coordinate(slot).raw(),
            peer: line.peer().raw(),
            connection: replica.table().connection(slot),
        }
    }
}

/// The heads of a datagram, for the log.
fn describe_head(bytes: &[u8]) -> String {
    let mut r = Reader::new(bytes);
    let Ok(header) = Header::decode(&mut r, 7) else { return "garbage".to_owned() };
    if header.opcode == OPCODE_HEARTBEAT {
        return format!("heartbeat, {} bytes", bytes.len());
    }
    match SyncHeader::decode(&mut r) {
        Ok(sync) => format!(
            "shard {} to {} session {} seq {} ({} bytes)",
            sync.from_shard,
            header.to_shard,
            sync.session,
            sync.seq.raw(),
            bytes.len()
        ),
        Err(_) => "garbage".to_owned(),
    }
}

/// A datagram with its messages, for the log.
fn describe_datagram(bytes: &[u8]) -> String {
    let mut text = describe_head(bytes);
    let mut r = Reader::new(bytes);
    let Ok(header) = Header::decode(&mut r, 7) else { return text };
    if header.opcode == OPCODE_HEARTBEAT || SyncHeader::decode(&mut r).is_err() {
        return text;
    }
    while let Ok(Some(message)) = Message::decode(&mut r) {
        text += &match message {
            Message::New { target, stamp, own, connection, .. } => format!(
                " | new {}.{} from {}.{} at {}.{} mark {}",
                target.slot,
                target.generation.raw(),
                own.slot,
                own.generation.raw(),
                stamp.epoch,
                stamp.version,
                connection.state.mark
            ),
            Message::Lease(places) => format!(" | lease of {}", places.iter().count()),
            Message::GiveBack(places) => format!(" | {} given back", places.iter().count()),
            Message::Ack { session, floor, .. } => {
                format!(" | ack {} of session {session}", floor.raw())
            }
            other => format!(" | {other:?}"),
        };
    }
    text
}

impl std::fmt::Debug for Copy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = |raw| {
            let at = Coordinate::from_raw(raw);
            format!("{}/{}/{}.{}", at.member(), at.shard(), at.slot(), at.generation().raw())
        };
        let State { status, mark, timeout_s, .. } = self.connection.state;
        write!(f, "{:?} at {} of {}, ", self.kind, place(self.place), place(self.peer))?;
        write!(
            f,
            "stamp {}.{}, status {status} mark {mark} ",
            self.stamp.epoch, self.stamp.version
        )?;
        write!(f, "timeout {timeout_s} reply {:#x}", self.connection.reply.dst)
    }
}
