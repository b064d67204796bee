//! What a connection costs in groups of 2 to 52 members at the same load per member, beside what it
//! would cost if every member kept everything, and what one more member costs the others.

use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::time::Duration;

use hypersync::ccp::bytes::Reader;
use hypersync::ccp::header::{Header, OPCODE_HEARTBEAT};
use hypersync::ccp::message::Message;
use hypersync::ccp::sync::SyncHeader;
use hypersync::conn::{MemberId, Tuple};
use hypersync::counters::Counter;
use hypersync::group::view::Status;
use hypersync::limits::{ARENA_MIN, MEMBERS_MAX};
use hypersync::memory::MemorySize;

use crate::world::{Rng, STEP, Sent, Timing, World, memories_of};

/// The appliance's own, but for the hold time: 0.5 s instead of 3 s, so that less has to be
/// simulated.
const TIMING: Timing = Timing {
    heartbeat: Duration::from_millis(100),
    hold: Duration::from_millis(500),
    reprotect_after: Duration::from_secs(2),
    compare: Duration::from_millis(100),
};

/// Ethernet, IPv4 and UDP headers of a datagram, bytes.
const HEADERS: u64 = 14 + 20 + 8;

/// Leases, first backups and the table's fill settle in this time.
const WARM_UP: Duration = Duration::from_secs(3);
/// 32 heartbeats of each member, of which 8 have full size.
const MEASURED: Duration = Duration::from_millis(3200);

/// What one more member may cost the others.
const ALLOWED: f64 = 0.01;

/// Connections a second and member that outlive the hold time and are sent; as many again end
/// before.
const RATE: u64 = 2000;
/// Changes of each connection that is sent.
const CHANGES: u64 = 2;
/// How long connections live, milliseconds: short ones, and how long after the hold time the
/// others.
const SHORT: std::ops::Range<u64> = 1..400;
const LONG: std::ops::Range<u64> = 100..1500;
/// Slots of a shard that are filled to 8 %: the room of all members lies in one and the same
/// eighth.
const ROOMY: usize = 32_768;

const SHARDS: u8 = 2;
/// Steps ahead for which something can be planned.
const PLANNED: usize = 2048 * 4;

#[derive(Clone, Copy)]
enum Do {
    Change,
    Close,
}

/// The traffic of one member. It is the same in a group of any size.
struct Traffic {
    member: MemberId,
    rng: Rng,
    steps: u64,
    opened: u64,
    /// What happens in which step, modulo its length.
    due: Vec<Vec<(Tuple, Do)>>,
}

impl Traffic {
    fn new(member: MemberId) -> Traffic {
        Traffic {
            member,
            rng: Rng(member.into()),
            steps: 0,
            opened: 0,
            due: vec![Vec::new(); PLANNED],
        }
    }

    fn step(&mut self, world: &mut World<'_>) {
        self.steps += 1;
        while self.opened < self.steps * RATE * STEP.as_micros() as u64 / 1_000_000 {
            self.opened += 1;
            let short = self.open(world, 11);
            let life = self.draw(SHORT);
            self.after(life, short, Do::Close);
            let long = self.open(world, 10);
            let hold = TIMING.hold.as_millis() as u64;
            let life = self.draw(LONG);
            for _ in 0..CHANGES {
                let after = self.rng.below(life);
                self.after(hold + after, long, Do::Change);
            }
            self.after(hold + life, long, Do::Close);
        }
        let at = self.steps as usize % PLANNED;
        for (tuple, what) in std::mem::take(&mut self.due[at]) {
            match what {
                Do::Change => world.change(tuple),
                Do::Close => world.close(tuple),
            }
        }
    }

    fn draw(&mut self, of: std::ops::Range<u64>) -> u64 {
        of.start + self.rng.below(of.end - of.start)
    }

    /// Tuples that do not depend on the group's size. One in eight connections has labels.
    fn open(&self, world: &mut World<'_>, net: u8) -> Tuple {
        let n = self.opened as u32;
        let client = Ipv4Addr::new(net, self.member, (n >> 8) as u8, n as u8);
        let tuple =
            Tuple::v4(6, (client, 1024 + (n % 50_000) as u16), (Ipv4Addr::new(192, 0, 2, 1), 443));
        world.reopen_at(self.member, tuple);
        tuple
    }

    /// A close comes after the changes of the same step: they were planned before it.
    fn after(&mut self, ms: u64, tuple: Tuple, what: Do) {
        let steps = ms * 1000 / STEP.as_micros() as u64;
        self.due[(self.steps + steps) as usize % PLANNED].push((tuple, what));
    }
}

/// What was counted in the measured stretch, of all members together.
#[derive(Clone, Copy, Default)]
struct Sums {
    members: u64,
    /// Connections that were opened and outlived the hold time.
    connections: u64,
    seconds: f64,
    new: u64,
    update: u64,
    close: u64,
    lease: u64,
    ack: u64,
    want: u64,
    /// Release, refuse, skip, offer and decline: none in peace.
    other: u64,
    /// Of synchronization: datagrams, and bytes with [`HEADERS`].
    datagrams: u64,
    bytes: u64,
    /// Multicast: one sending for all others.
    heartbeats_sent: u64,
    heartbeats_heard: u64,
    heartbeat_bytes_sent: u64,
    heartbeat_bytes_heard: u64,
    /// Table work, by where it comes from.
    events: u64,
    built: u64,
    applied: u64,
    granted: u64,
    walked: u64,
    /// Times that a connection found no leased slot at the member that it wanted.
    starved: u64,
    /// Connections and leases for which the table had no slot.
    refused: u64,
    /// Empty slots that peers hold leases of, at the end.
    leased: u64,
}

/// A look at the counters of all members.
fn counted(world: &World<'_>) -> [u64; 7] {
    use Counter::*;
    let groups: [&[Counter]; 7] = [
        &[SourceEvents],
        &[DeltasNew, DeltasUpdate, DeltasClose, DeltasRelease],
        &[DeltasApplied, DeltasOld, DeltasClosed, Refused],
        &[LeasesGranted],
        &[SlotsWalked],
        &[NoLease],
        &[TableFull],
    ];
    let of =
        |counter: &Counter| world.live().iter().map(|m| world.counter(*m, *counter)).sum::<u64>();
    groups.map(|group| group.iter().map(of).sum())
}

impl Sums {
    fn take(&mut self, datagram: &Sent) {
        let bytes = datagram.bytes.len() as u64 + HEADERS;
        let mut r = Reader::new(&datagram.bytes);
        let header = Header::decode(&mut r, 7).expect("it was sent");
        if header.opcode == OPCODE_HEARTBEAT {
            self.heartbeats_heard += 1;
            self.heartbeat_bytes_heard += bytes;
            // The world sends a copy to each: of those one counts as sent.
            if datagram.to == if datagram.from == 1 { 2 } else { 1 } {
                self.heartbeats_sent += 1;
                self.heartbeat_bytes_sent += bytes;
            }
            return;
        }
        self.datagrams += 1;
        self.bytes += bytes;
        SyncHeader::decode(&mut r).expect("it was sent");
        while let Ok(Some(message)) = Message::decode(&mut r) {
            *match message {
                Message::New { .. } => &mut self.new,
                Message::Update { .. } => &mut self.update,
                Message::Close { .. } => &mut self.close,
                Message::Lease(_) => &mut self.lease,
                Message::Ack { .. } => &mut self.ack,
                Message::Want { .. } => &mut self.want,
                _ => &mut self.other,
            } += 1;
        }
    }

    /// Per connection that was sent.
    fn per(&self, n: u64) -> f64 {
        n as f64 / self.connections as f64
    }

    /// Per member and second.
    fn rate(&self, n: u64) -> f64 {
        n as f64 / self.members as f64 / self.seconds
    }

    /// Bytes that pass a member, out and in, per second.
    fn member_bytes(&self) -> f64 {
        self.rate(2 * self.bytes + self.heartbeat_bytes_sent + self.heartbeat_bytes_heard)
    }

    fn table_work(&self) -> u64 {
        self.events + self.built + self.applied + self.granted + self.walked
    }

    /// Table work, and datagrams handled (sent or received, heartbeats too), of a member per
    /// second.
    fn member_work(&self) -> f64 {
        self.rate(
            self.table_work() + 2 * self.datagrams + self.heartbeats_sent + self.heartbeats_heard,
        )
    }
}

/// Runs a group whose shards have this many slots; its figures.
fn measure(members: MemberId, capacity: usize) -> Sums {
    let memories =
        memories_of(members as usize * SHARDS as usize, MemorySize::new(capacity, ARENA_MIN * 2));
    let mut world = World::new(1, &memories);
    (world.timing, world.highest) = (TIMING, members);
    for member in 1..=members {
        world.start(member, SHARDS, 100);
        // Members that were not started together do not send their heartbeats together.
        world.run_for(TIMING.heartbeat / members.into());
    }
    world.run_until(Duration::from_secs(3), "everybody is ready for everybody", |world| {
        let is_ready = |host: &crate::world::Host<'_>| {
            let ready =
                host.group.view().others().filter(|(_, other)| other.status == Status::Ready);
            ready.count() == members as usize - 1
        };
        world.hosts.values().all(is_ready)
    });
    let mut traffic: Vec<Traffic> = (1..=members).map(Traffic::new).collect();
    let mut run = |world: &mut World<'_>, span: Duration, sums: &mut Sums| {
        let end = world.now.after(span);
        while !end.reached(world.now) {
            traffic.iter_mut().for_each(|t| t.step(world));
            world.step();
            world.closed.clear();
            world.events.clear();
            if let Some(sent) = &mut world.sent {
                sent.drain(..).for_each(|datagram| sums.take(&datagram));
            }
        }
    };
    run(&mut world, WARM_UP, &mut Sums::default());
    let before = counted(&world);
    let seconds = MEASURED.as_secs_f64();
    let connections = (f64::from(members) * RATE as f64 * seconds) as u64;
    let mut sums = Sums { members: members.into(), seconds, connections, ..Sums::default() };
    world.sent = Some(Vec::new());
    run(&mut world, MEASURED, &mut sums);
    let after = counted(&world);
    let [events, built, applied, granted, walked, starved, refused] =
        std::array::from_fn(|i| after[i] - before[i]);
    let leased = world.live().iter().map(|m| world.counter(*m, Counter::SlotsLeased)).sum();
    // Everybody is protected and nothing is left over: what was measured did its job.
    world.sent = None;
    world.run_for(TIMING.hold * 2);
    if refused == 0 {
        world.run_until(Duration::from_secs(1), "everything is acknowledged", |w| w.is_quiet());
        world.check();
    }
    Sums { events, built, applied, granted, walked, starved, refused, leased, ..sums }
}

/// What one more member costs, between two sizes of the group.
fn growth(fewer: &Sums, more: &Sums, of: fn(&Sums) -> f64) -> f64 {
    (of(more) / of(fewer) - 1.0) / (more.members - fewer.members) as f64
}

/// Figures of groups of several sizes, two at a time, the largest first.
fn measure_all(sizes: &[MemberId], capacity: usize) -> Vec<Sums> {
    let (left, done) = (Mutex::new(sizes.to_vec()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(members) = left.lock().expect("nobody panicked").pop() else { break };
                    let sums = measure(members, capacity);
                    done.lock().expect("nobody panicked").push(sums);
                }
            });
        }
    });
    let mut done = done.into_inner().expect("nobody panicked");
    done.sort_by_key(|sums: &Sums| sums.members);
    print(&done);
    done
}

fn assert_cheap(all: &[Sums]) {
    for (a, b) in all.iter().zip(&all[1..]) {
        for (what, of) in
            [("bytes", Sums::member_bytes as fn(&Sums) -> f64), ("work", Sums::member_work)]
        {
            let growth = growth(a, b, of);
            assert!(
                growth <= ALLOWED,
                "from {} to {} members each added one costs {:.2} % in {what}",
                a.members,
                b.members,
                growth * 100.0
            );
        }
    }
}

#[test]
fn one_more_member_costs_the_others_at_most_one_percent() {
    assert_cheap(&measure_all(&[2, 3, 4, 8, 16, 32, MEMBERS_MAX as MemberId], ROOMY));
}

/// The same with tables that are filled to two thirds.
#[test]
fn it_does_not_cost_more_with_tables_that_are_well_filled() {
    let all = measure_all(&[2, 4, 8, 16], ROOMY / 8);
    assert!(all.iter().all(|sums| sums.refused == 0), "tables were full");
    assert_cheap(&all);
}

fn print(all: &[Sums]) {
    let pair = &all[0];
    println!("\nPer connection that outlives the hold time, sent by all members together:\n");
    println!(
        "members    new update  close  lease    ack   want  other  datagrams  bytes   events  built  applied  \
         granted  walked  table work   full mesh: deltas  bytes  table work"
    );
    for s in all {
        let others = (s.members - 1) as f64;
        println!(
            "{:7} {:6.2} {:6.2} {:6.2} {:6.4} {:6.3} {:6.4} {:6.4} {:10.3} {:6.1} {:8.2} {:6.2} {:8.2} {:8.4} {:7.4} \
             {:11.2} {:19.0} {:6.0} {:11.1}",
            s.members,
            s.per(s.new),
            s.per(s.update),
            s.per(s.close),
            s.per(s.lease),
            s.per(s.ack),
            s.per(s.want),
            s.per(s.other),
            s.per(s.datagrams),
            s.per(s.bytes),
            s.per(s.events),
            s.per(s.built),
            s.per(s.applied),
            s.per(s.granted),
            s.per(s.walked),
            s.per(s.table_work()),
            pair.per(pair.built) * others,
            pair.per(pair.bytes) * others,
            pair.per(pair.events + pair.built) + pair.per(pair.applied) * others,
        );
    }
    println!("\nPer member and second (kB, sent and received):\n");
    println!(
        "members  synchronization  heartbeats sent  heard   all bytes  all work  starved  no slot  leased now   \
         full mesh: bytes     work   each added member: bytes     work"
    );
    for (i, s) in all.iter().enumerate() {
        let others = (s.members - 1) as f64;
        let heartbeats = s.rate(s.heartbeat_bytes_sent + s.heartbeat_bytes_heard);
        let mesh_bytes = pair.rate(2 * pair.bytes) * others + heartbeats;
        let mesh_work = pair.rate(pair.events + pair.built)
            + pair.rate(pair.applied + 2 * pair.datagrams) * others
            + s.rate(s.heartbeats_sent + s.heartbeats_heard);
        let growth = |of| match i {
            0 => String::new(),
            i => format!("{:+.2} %", growth(&all[i - 1], s, of) * 100.0),
        };
        println!(
            "{:7} {:16.1} {:16.1} {:6.1} {:11.1} {:9.0} {:8.1} {:8.1} {:11.0} {:18.0} {:8.0} {:26} {:>8}",
            s.members,
            s.rate(2 * s.bytes) / 1e3,
            s.rate(s.heartbeat_bytes_sent) / 1e3,
            s.rate(s.heartbeat_bytes_heard) / 1e3,
            s.member_bytes() / 1e3,
            s.member_work(),
            s.rate(s.starved),
            s.rate(s.refused),
            s.leased as f64 / s.members as f64,
            mesh_bytes / 1e3,
            mesh_work,
            growth(Sums::member_bytes),
            growth(Sums::member_work),
        );
    }
    let most = all.last().expect("sizes");
    let heard = most.rate(most.heartbeat_bytes_heard) / (most.members - 1) as f64;
    println!(
        "\nHeartbeats of one more member: {:.1} kB/s heard by each other, which is 1 % of what {:.0} connections/s \
         a member make of synchronization.",
        heard / 1e3,
        heard / ALLOWED / (2.0 * most.per(most.bytes)),
    );
}
