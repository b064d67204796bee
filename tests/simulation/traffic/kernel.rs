//! A kernel that is played, and a shard's ends of it: the model's table behind the appliance's own
//! feed.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Arguments;
use std::net::IpAddr;
use std::rc::Rc;

use hypersync::conn::slot::groups;
use hypersync::conn::{Connection, MemberId, State, Tuple, shard_of};
use hypersync::conntrack::KernelError;
use hypersync::conntrack::codec::Origin;
use hypersync::conntrack::commit::Committer;
use hypersync::conntrack::dump::{DumpProgress, DumpState};
use hypersync::conntrack::entries::{Answers, Entries, Request};
use hypersync::conntrack::events::Source;
use hypersync::conntrack::fill::FILL_MAX_PERCENT;
use hypersync::conntrack::local::LocalAddresses;
use hypersync::conntrack::queue::{Batch, Heard, Queue};
use hypersync::conntrack::timeouts::Timeouts;
use hypersync::counters::Counters;
use hypersync::feed::{KernelFeed, KernelParts};
use hypersync::limits::COMMIT_PER_PASS;
use hypersync::rules::Rules;
use hypersync::source::{CommitMode, SourceEvent};
use hypersync::sync::Replica;
use hypersync::time::Time;

use super::model::{By, Event, Settings, Table, What};
use crate::world::Feed;

/// Nobody has an address of ours: all connections are forwarded.
static ADDRESSES: LocalAddresses = LocalAddresses::new();

/// Entries in a piece of a dump.
const PIECE: usize = 6;

/// A gateway's kernel.
pub struct Kernel {
    table: RefCell<Table>,
    now: Cell<Time>,
    /// What waits for each shard of the process that listens.
    queues: RefCell<Vec<VecDeque<Event>>>,
    /// Events that may wait for a shard.
    pub room: Cell<usize>,
    lost: RefCell<Vec<u32>>,
    /// When an event of a connection was last lost.
    untold: RefCell<BTreeMap<Tuple, Time>>,
    /// When the entry of a connection was last collected, its time being over.
    ran_out: RefCell<BTreeMap<Tuple, Time>>,
    max: Cell<usize>,
    /// Whether the address that connections are translated to is this host's.
    pub has_address: Cell<bool>,
    /// Told of events and requests, a line each.
    log: Cell<Option<Log>>,
    member: MemberId,
}

type Log = fn(Time, MemberId, &str, Arguments<'_>);

impl Kernel {
    pub fn new(member: MemberId, settings: Settings, room: usize) -> Rc<Kernel> {
        let max = settings.max;
        Rc::new(Kernel {
            table: RefCell::new(Table::new(settings)),
            now: Cell::new(Time(0)),
            queues: RefCell::new(Vec::new()),
            room: Cell::new(room),
            lost: RefCell::new(Vec::new()),
            untold: RefCell::default(),
            ran_out: RefCell::default(),
            max: Cell::new(max),
            has_address: Cell::new(true),
            log: Cell::new(None),
            member,
        })
    }

    pub fn log_to(&self, log: Option<Log>) {
        self.log.set(log);
    }

    fn note(&self, what: &str, detail: Arguments<'_>) {
        if let Some(log) = self.log.get() {
            log(self.now.get(), self.member, what, detail);
        }
    }

    /// Something happens to the table, at this time; what it has to tell goes to the shards.
    pub fn act<R>(&self, now: Time, act: impl FnOnce(&mut Table, Time) -> R) -> R {
        self.now.set(now);
        self.again(act)
    }

    fn again<R>(&self, act: impl FnOnce(&mut Table, Time) -> R) -> R {
        let mut table = self.table.borrow_mut();
        let result = act(&mut table, self.now.get());
        self.max.set(table.settings().max);
        let (mut queues, mut lost) = (self.queues.borrow_mut(), self.lost.borrow_mut());
        while let Some(event) = table.next_event() {
            let Event { what, by, connection, .. } = &event;
            if (*what, *by, connection.state.timeout_s) == (What::Destroy, By::Kernel, 0) {
                self.ran_out.borrow_mut().insert(connection.original, self.now.get());
            }
            if event.by == By::Ours || queues.is_empty() {
                continue; // The filter of the sockets.
            }
            let Connection { original, reply, state, .. } = &event.connection;
            let shard = shard_of(original, queues.len() as u8) as usize;
            let State { tcp_state, timeout_s, status, .. } = state;
            self.note(
                "event",
                format_args!(
                    "{original} {:?} by {:?}: state {tcp_state} {timeout_s} s, status {status:x}, answers {reply}",
                    event.what, event.by
                ),
            );
            match queues[shard].len() < self.room.get() {
                true => queues[shard].push_back(event),
                false => {
                    lost[shard] += 1;
                    self.untold.borrow_mut().insert(*original, self.now.get());
                }
            }
        }
        result
    }

    /// Whether an event of this connection was lost at that time, or later.
    pub fn was_untold_since(&self, original: &Tuple, at: Time) -> bool {
        self.untold.borrow().get(original).is_some_and(|lost| *lost >= at)
    }

    /// Whether the entry of this connection was collected at that time, or later, because its time
    /// was over.
    pub fn ran_out_since(&self, original: &Tuple, at: Time) -> bool {
        self.ran_out.borrow().get(original).is_some_and(|ran_out| *ran_out >= at)
    }

    /// A process with so many shards listens from now on, or none.
    pub fn listen(&self, shards: u8) {
        self.table.borrow_mut().listen((shards > 0).then_some(usize::MAX));
        *self.queues.borrow_mut() = vec![VecDeque::new(); shards as usize];
        *self.lost.borrow_mut() = vec![0; shards as usize];
    }

    /// The entries as they are.
    pub fn entries(&self, now: Time) -> Vec<Connection> {
        self.table.borrow().entries(now).collect()
    }
}

/// A shard's events.
pub struct Events {
    kernel: Rc<Kernel>,
    shard: u8,
    /// The piece of a dump that was prepared, and the number of the entry behind it.
    dump: Option<(Vec<Connection>, Option<u64>)>,
}

impl Events {
    fn prepare(&mut self, from: u64) {
        self.dump = Some(self.kernel.again(|table, now| table.dump_piece(now, from, PIECE)));
    }
}

impl Queue for Events {
    fn receive(&mut self, wanted: usize, f: &mut dyn FnMut(Heard)) -> Batch {
        let mut queues = self.kernel.queues.borrow_mut();
        let queue = &mut queues[self.shard as usize];
        let taken = wanted.min(queue.len());
        for event in queue.drain(..taken) {
            let origin = if event.by == By::Kernel { Origin::Kernel } else { Origin::Program };
            f(Heard::Event { event: event.seen(), origin, skipped: 0 });
        }
        Batch { taken, is_last: taken < wanted, failed: false }
    }

    fn overruns(&self) -> u32 {
        self.kernel.lost.borrow()[self.shard as usize]
    }

    fn is_dumping(&self) -> bool {
        self.dump.is_some()
    }

    fn start_dump(&mut self) -> Result<(), KernelError> {
        self.prepare(0);
        Ok(())
    }

    fn drain_dump(&mut self, _: usize, f: &mut dyn FnMut(SourceEvent) -> bool) -> DumpProgress {
        let state = DumpState::Done;
        let mut progress = DumpProgress { events: 0, entries: 0, malformed: 0, skipped: 0, state };
        let Some((piece, next)) = self.dump.take() else { return progress };
        // The next piece is prepared as this one is read: before anything is made of it.
        if let Some(next) = next {
            self.prepare(next);
            progress.state = DumpState::Running;
        }
        for connection in piece {
            progress.entries += 1;
            let known = match connection.extra.is_none() {
                true => groups::ALL & !groups::EXTRA,
                false => groups::ALL,
            };
            progress.events += f(SourceEvent::Seen { connection, known }) as usize;
        }
        progress
    }
}

/// A request that waits for the batch.
enum Asked {
    Create(Connection, u32),
    Update(Connection, u32, u32),
    Get(Tuple),
    Delete(Tuple),
}

/// A shard's pen.
pub struct Pen {
    kernel: Rc<Kernel>,
    timeouts: Timeouts,
    asked: Vec<(usize, Asked)>,
}

impl Pen {
    fn new(kernel: Rc<Kernel>) -> Pen {
        let timeouts = timeouts_of(&kernel);
        Pen { kernel, timeouts, asked: Vec::new() }
    }
}

/// What the kernel's settings are now.
fn timeouts_of(kernel: &Kernel) -> Timeouts {
    let mut table = kernel.table.borrow_mut();
    let of = &table.settings().timeouts;
    Timeouts::told(&|name| {
        Some(match name {
            "tcp_timeout_syn_sent" => of.tcp[1],
            "tcp_timeout_syn_recv" => of.tcp[2],
            "tcp_timeout_established" => of.tcp[3],
            "tcp_timeout_fin_wait" => of.tcp[4],
            "tcp_timeout_close_wait" => of.tcp[5],
            "tcp_timeout_last_ack" => of.tcp[6],
            "tcp_timeout_time_wait" => of.tcp[7],
            "tcp_timeout_close" => of.tcp[8],
            "tcp_timeout_max_retrans" | "tcp_timeout_unacknowledged" => of.unacknowledged,
            "udp_timeout" => of.udp,
            "udp_timeout_stream" => of.udp_stream,
            _ => return None,
        })
    })
}

impl Entries for Pen {
    fn put(&mut self, index: usize, request: Request<'_>) {
        let asked = match request {
            Request::Create { connection, timeout_s } => Asked::Create(*connection, timeout_s),
            Request::Update { connection, timeout_s, present } => {
                Asked::Update(*connection, timeout_s, present)
            }
            Request::Get { original } => Asked::Get(*original),
            Request::Delete { original } => Asked::Delete(*original),
        };
        self.asked.push((index, asked));
    }

    fn carry_out(&mut self) -> Result<[Answers; COMMIT_PER_PASS], i32> {
        let mut answers = [Answers::default(); COMMIT_PER_PASS];
        let mut last = None;
        for (index, asked) in self.asked.drain(..) {
            let of_entry = &mut answers[index];
            let errno = &mut of_entry.errno[(last == Some(index)) as usize];
            last = Some(index);
            let done = self.kernel.again(|table, now| match &asked {
                Asked::Create(connection, timeout_s) => {
                    table.create(now, By::Ours, connection, *timeout_s)
                }
                Asked::Update(connection, timeout_s, present) => {
                    table.update(now, By::Ours, connection, *timeout_s, *present)
                }
                Asked::Get(original) => {
                    of_entry.found = table.get(now, original);
                    of_entry.found.map(|_| ()).ok_or(libc::ENOENT)
                }
                Asked::Delete(original) => table.delete(now, By::Ours, original),
            });
            *errno = done.err().unwrap_or(0);
            let found = of_entry.found.map(|there| (there.state.tcp_state, there.state.timeout_s));
            self.kernel.note(
                "request",
                format_args!(
                    "{} {}",
                    match &asked {
                        Asked::Create(c, t) =>
                            format!("{} create {} for {t} s", c.original, c.state.tcp_state),
                        Asked::Update(c, t, _) => {
                            format!("{} update {} for {t} s", c.original, c.state.tcp_state)
                        }
                        Asked::Get(original) => format!("{original} get {found:?}"),
                        Asked::Delete(original) => format!("{original} delete"),
                    },
                    *errno
                ),
            );
        }
        Ok(answers)
    }

    fn has_address(&mut self, _: IpAddr) -> bool {
        self.kernel.has_address.get()
    }

    fn room_and_limit(&self) -> (u64, u64) {
        let (max, now) = (self.kernel.max.get(), self.kernel.now.get());
        let count = self.kernel.table.borrow().entries(now).count();
        ((max as u64 * FILL_MAX_PERCENT / 100).saturating_sub(count as u64), max as u64)
    }

    fn timeouts(&self) -> &Timeouts {
        &self.timeouts
    }

    fn read_timeouts_again(&mut self, _: usize) {
        self.timeouts.set(&timeouts_of(&self.kernel));
    }
}

/// A shard's end of its kernel.
pub struct Ends {
    feed: KernelFeed<Events, Pen>,
    kernel: Rc<Kernel>,
    shard: usize,
}

impl Ends {
    pub fn new(
        kernel: Rc<Kernel>,
        shard: u8,
        shards: u8,
        capacity: u32,
        resumed: bool,
        has_entries: bool,
    ) -> Ends {
        let events = Events { kernel: kernel.clone(), shard, dump: None };
        let feed = KernelFeed::new(KernelParts {
            source: Source::over(events, shard, shards),
            committer: Committer::over(Pen::new(kernel.clone())),
            addresses: &ADDRESSES,
            rules: Rules::default(),
            commit: CommitMode::Eager,
            may_be_unheard: has_entries,
            verify: super::VERIFY,
            resumed,
            capacity,
        });
        Ends { feed, kernel, shard: shard as usize }
    }
}

impl Feed for Ends {
    fn ingest(&mut self, now: Time, replica: &mut Replica<'_>, counters: &Counters<'_>) -> bool {
        self.kernel.now.set(now);
        self.feed.ingest(now, replica, counters)
    }

    fn commit(&mut self, now: Time, replica: &mut Replica<'_>, counters: &Counters<'_>) {
        self.kernel.now.set(now);
        self.feed.commit(now, replica, counters);
    }

    fn wake_at(&self, now: Time) -> Time {
        self.feed.wake_at(now)
    }

    fn is_complete(&self) -> bool {
        self.feed.is_complete()
    }

    fn hear(&mut self, now: Time) -> bool {
        let hears = self.feed.is_drained() && !self.kernel.queues.borrow()[self.shard].is_empty();
        if hears {
            self.feed.ready(now);
        }
        hears
    }
}
