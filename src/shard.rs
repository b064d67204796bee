//! The loop of one shard: a thread, its ring, its slice of the table.
//!
//! One pass is the data flow, and reads like it: reap, ingest, receive, tick, commit, transmit,
//! publish. Every stage has a cap, so heartbeats are never late because another stage was busy.
//! Nothing in a pass waits but the one wait at its end, and that only if no stage has more to do
//! ([`crate::pace`]).

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use crate::ccp::Reject;
use crate::ccp::header::Addressee;
use crate::clock;
use crate::conn::MemberId;
use crate::counters::{Counter, Counters};
use crate::doorbell::Doorbell;
use crate::feed::{EVENTS_KEY, Feed};
use crate::group::view::View;
use crate::limits::{DATAGRAM_MAX, MEMBERS_MAX, RECEIVE_PER_PASS, STRAYS};
use crate::logging::Sparse;
use crate::membership::{Farewell, Membership, Shared};
use crate::net::{Event, NetError, Port, PortCounts, Target};
use crate::pace::{Left, Next, Pace};
use crate::shm::Region;
use crate::sync::stream::stream_member;
use crate::sync::{Finding, Replica, Token, Transmit};
use crate::time::Time;

/// The watch key of the shard's doorbell.
pub const DOORBELL_KEY: u64 = EVENTS_KEY + 1;
/// A pass that takes longer makes heartbeats late.
const LATE: Duration = Duration::from_millis(10);
/// The longest wait: the words that ask the process to end are looked at this often.
const WAIT_MAX: Duration = Duration::from_millis(50);

/// How often the receive sockets are asked what they dropped.
const DROPS_PAUSE: Duration = Duration::from_secs(1);

/// Copies that differ are named in the log at most this often.
const DIFFERS_PAUSE: Duration = Duration::from_secs(1);

/// A datagram that arrived at the wrong shard. It is handed over by value: the queue has room for
/// so many.
pub struct Stray {
    source: IpAddr,
    len: usize,
    bytes: [u8; DATAGRAM_MAX],
}

/// What a shard is made of.
pub struct ShardParts<'m> {
    /// This shard.
    pub shard: u8,
    /// This member.
    pub member: MemberId,
    /// The protocol.
    pub replica: Replica<'m>,
    /// The network. It has the shard's doorbell, and the kernel's events if that is the source, as
    /// what can be watched.
    pub port: Port<'m>,
    /// The source.
    pub feed: Feed<'m>,
    /// The duties of shard 0.
    pub membership: Option<Membership<'m>>,
    /// The shared memory.
    pub region: &'m Region,
    /// The words that all threads share.
    pub shared: &'m Shared,
    /// Strays for this shard.
    pub strays: Receiver<Stray>,
    /// Where strays of other shards go.
    pub handover: Vec<SyncSender<Stray>>,
    /// The doorbells of all shards of this member.
    pub doorbells: &'m [Doorbell],
}

/// A shard: what it is made of ([`ShardParts`]), and what it remembers from pass to pass.
pub struct Shard<'m> {
    shard: u8,
    member: MemberId,
    replica: Replica<'m>,
    port: Port<'m>,
    feed: Feed<'m>,
    membership: Option<Membership<'m>>,
    region: &'m Region,
    shared: &'m Shared,
    strays: Receiver<Stray>,
    handover: Vec<SyncSender<Stray>>,
    doorbells: &'m [Doorbell],
    /// This shard's counters.
    counters: Counters<'m>,
    view_version: u64,
    complete: bool,
    longest: Duration,
    /// The last two passes. What had arrived before the earlier of them has been taken since: the
    /// ring shows what has come when it is waited on, and a wait may end by a signal.
    passed_at: [Time; 2],
    watching: bool,
    listening: bool,
    /// A view acted on, and the commits asked for by then.
    settling: Option<(u64, u64)>,
    torn_view: bool,
    /// Whether a stream's socket could not be opened, and that was said, in this view.
    unopened: bool,
    pace: Pace,
    /// What the port had seen, as far as the counters say.
    counted: PortCounts,
    drops: u64,
    drops_at: Time,
    /// Lines about copies that differ.
    differs: Sparse,
}

impl<'m> Shard<'m> {
    /// Puts a shard together.
    pub fn new(parts: ShardParts<'m>) -> Shard<'m> {
        let ShardParts { shard, member, replica, port, feed, membership, .. } = parts;
        let ShardParts { region, shared, strays, handover, doorbells, .. } = parts;
        Shard {
            shard,
            replica,
            port,
            feed,
            membership,
            region,
            shared,
            strays,
            handover,
            doorbells,
            counters: Counters::new(region.shard(shard).counters),
            member,
            view_version: 0,
            complete: false,
            longest: Duration::ZERO,
            passed_at: [Time(0); 2],
            watching: false,
            listening: false,
            settling: None,
            torn_view: false,
            unopened: false,
            pace: Pace::new(),
            counted: PortCounts::default(),
            drops: 0,
            drops_at: Time(0),
            differs: Sparse::new(DIFFERS_PAUSE),
        }
    }

    /// Runs until the process ends.
    pub fn run(&mut self) -> Result<(), NetError> {
        while !self.shared.finished.load(Ordering::Relaxed)
            && !self.shared.failed.load(Ordering::Relaxed)
        {
            let now = clock::now();
            self.reap(now);
            let ingest = self.feed.ingest(now, &mut self.replica, &self.counters);
            self.replica.set_source_behind(now, ingest);
            let receive = self.receive(now);
            let view = self.tick(now);
            let commit = self.feed.commit(now, &mut self.replica, &self.counters);
            let transmit = self.transmit(now);
            self.publish(now);
            self.passed_at = [now, self.passed_at[0]];
            let left = Left { ingest, receive, view, commit, transmit };
            self.wait(now, left)?;
        }
        self.port.submit()
    }

    /// Completions: buffers come back, sources wake.
    fn reap(&mut self, now: Time) {
        self.follow_link();
        let Shard { port, replica, feed, watching, listening, doorbells, shard, .. } = self;
        port.reap(&mut |event| match event {
            Event::Sent { token, result } => replica.on_send_complete(Token(token), result < 0),
            Event::Ready { key: EVENTS_KEY } => {
                *watching = false;
                feed.ready(now);
            }
            Event::Ready { .. } => {
                *listening = false;
                doorbells[*shard as usize].hear();
            }
            Event::Woken => {}
        });
        while let Some((to, errno)) = self.port.poll_refusal() {
            if let Some(line) = self.shared.refusals.note(now, to, errno) {
                log::warn!("{line}");
            }
        }
    }

    /// Takes the sockets of a sync link that was made anew.
    fn follow_link(&mut self) {
        let Some(renewal) = self.shared.renewals[self.shard as usize].take() else { return };
        self.port.renew(renewal);
        if self.membership.is_some() {
            self.counters.count(Counter::LinkRenewals);
        }
    }

    /// Datagrams: heartbeats to the group, synchronization to the protocol. Returns whether more
    /// may wait.
    fn receive(&mut self, now: Time) -> bool {
        let Shard { port, replica, membership, counters, handover, shard, doorbells, .. } = self;
        let cap = RECEIVE_PER_PASS.min(replica.receive_room());
        let received = port.receive(cap, &mut |source, bytes| {
            match (Addressee::of(bytes), membership.as_mut()) {
                (Addressee::Everyone, Some(membership)) => {
                    membership.handle_heartbeat(now, source, bytes)
                }
                (Addressee::Everyone, None) => counters.count(Reject::Shard.counter()),
                (Addressee::Shard(to), _)
                    if to != *shard
                        && (to as usize) < handover.len()
                        && bytes.len() <= DATAGRAM_MAX =>
                {
                    counters.count(Counter::Strays);
                    let mut stray = Stray { source, len: bytes.len(), bytes: [0; DATAGRAM_MAX] };
                    stray.bytes[..bytes.len()].copy_from_slice(bytes);
                    // A full queue loses it: it is repeated like any other that was lost.
                    match handover[to as usize].try_send(stray) {
                        Ok(()) => doorbells[to as usize].ring(),
                        Err(_) => counters.count(Counter::StraysLost),
                    }
                }
                (Addressee::Shard(_) | Addressee::Nobody, _) => {
                    replica.handle_datagram(now, Some(source), bytes);
                }
            }
        });
        for _ in 0..STRAYS.min(self.replica.receive_room()) {
            let Ok(stray) = self.strays.try_recv() else {
                if received < cap {
                    self.replica.received_all(self.passed_at[1]);
                }
                return received == cap;
            };
            self.replica.handle_datagram(now, Some(stray.source), &stray.bytes[..stray.len]);
        }
        true
    }

    /// Timers: of the group, then of this shard. Returns whether the view must be read again at
    /// once.
    fn tick(&mut self, now: Time) -> bool {
        if let Some(membership) = &mut self.membership {
            membership.handle_goodbyes(now, self.replica.take_goodbyes());
            if membership.tick(now, self.replica.receive_room() == 0) {
                self.doorbells[1..].iter().for_each(Doorbell::ring);
            }
        }
        self.follow_view(now);
        self.replica.tick(now);
        while let Some((finding, expected)) = self.replica.poll_finding() {
            let Some(more) = self.differs.tell(now) else { continue };
            let level = if expected { log::Level::Info } else { log::Level::Warn };
            log::log!(level, "{}{more}", describe(finding));
        }
        if !self.complete && self.feed.is_complete() {
            self.complete = true;
            self.shared.complete.fetch_add(1, Ordering::Relaxed);
        }
        self.torn_view
    }

    /// Acts on the view that shard 0 published, if it changed.
    fn follow_view(&mut self, now: Time) {
        let version = self.region.group().version();
        if version == self.view_version {
            return;
        }
        let mut view = View::new(self.member);
        for member in 1..=MEMBERS_MAX as MemberId {
            // A record that is being written is read at the next pass: the version moves on then.
            let Some(seen) = self.region.group().read(member) else {
                self.torn_view = true;
                return;
            };
            view.set(member, seen);
        }
        self.view_version = version;
        self.torn_view = false;
        self.unopened = false;
        self.replica.handle_view(now, &view);
        // The notify event of a death waits for the commits asked for up to here (the takeover's),
        // not for those that copies ask for which come in later.
        self.settling.get_or_insert((version, self.replica.commits_asked()));
        let replica = &self.replica;
        self.port.close_unless(|stream, peer| {
            let member = replica.seen(stream_member(stream));
            member.status.is_alive() && member.address == Some(peer)
        });
    }

    /// Heartbeats first, then everything that the protocol has to send. Returns whether more may
    /// wait.
    fn transmit(&mut self, now: Time) -> bool {
        self.send_heartbeat(now);
        let has_more = self.replica.transmit(now, self.port.room());
        self.leave(now);
        while let Some(transmit) = self.replica.poll_transmit() {
            let Transmit { stream, offset, len, token } = transmit;
            self.counters.count(Counter::SendsQueued);
            let is_open = self.open(stream);
            let target = Target::Stream(stream);
            if !is_open || self.port.send(target, offset, len, token.0).is_err() {
                self.replica.on_send_complete(token, true);
            }
        }
        has_more
    }

    fn send_heartbeat(&mut self, now: Time) {
        let mut bytes = [0; DATAGRAM_MAX];
        let membership = self.membership.as_mut();
        let Some(len) = membership.and_then(|m| m.poll_heartbeat(now, &mut bytes)) else { return };
        for target in 0..self.port.heartbeat_targets() {
            let Some((offset, token)) = self.replica.control_datagram(&bytes[..len]) else { break };
            let target = Target::Heartbeat(target);
            if self.port.send(target, offset, len as u32, token.0).is_err() {
                self.replica.on_send_complete(token, true);
            }
        }
    }

    /// Opens the stream's socket, if it is not. Whether it is.
    fn open(&mut self, stream: usize) -> bool {
        let Some(peer) = self.replica.seen(stream_member(stream)).address else { return false };
        let opened = self.port.open(stream, peer);
        if let Err(e) = &opened
            && !std::mem::replace(&mut self.unopened, true)
        {
            log::error!("{e}");
        }
        opened.is_ok()
    }

    /// The way out, if the process is to end, or to end and come back.
    fn leave(&mut self, now: Time) {
        if self.shared.stop.load(Ordering::Relaxed) {
            self.replica.handle_leaving();
        }
        let Some(membership) = &mut self.membership else { return };
        let back_ms = self.shared.restart.load(Ordering::Relaxed);
        if self.shared.stop.load(Ordering::Relaxed) {
            match membership.leave(now) {
                Farewell::NotYet => {}
                Farewell::Goodbye => self.replica.send_goodbyes(),
                Farewell::Done => self.shared.finished.store(true, Ordering::Relaxed),
            }
        } else if back_ms != 0
            && membership.announce_restart(now, Duration::from_millis(back_ms as u64))
        {
            self.shared.restarts.store(true, Ordering::Relaxed);
            self.shared.finished.store(true, Ordering::Relaxed);
        }
    }

    /// Words for the other shards and for inspectors.
    fn publish(&mut self, now: Time) {
        self.counters.count(Counter::Passes);
        self.count_received(now);
        let status = self.region.group().shard(self.shard);
        status.set_last_pass(now);
        // Before the version: whoever sees that this view was acted on sees what became of it.
        status.set_synced(self.replica.synced());
        status.set_view_version(self.view_version);
        if let Some((_, asked)) = &mut self.settling {
            if self.replica.is_taking_over() {
                *asked = u64::MAX; // What the walk will ask for belongs to the death as well.
            } else if *asked == u64::MAX {
                *asked = self.replica.commits_asked();
            }
        }
        if let Some((version, asked)) = self.settling
            && self.replica.commits_done() >= asked
        {
            status.set_settled_version(version);
            self.doorbells[0].ring(); // A death may wait to be told.
            let next = (self.view_version, self.replica.commits_asked());
            self.settling = (version != self.view_version).then_some(next);
        }
        let took = clock::now().since(now);
        if took > LATE {
            self.counters.count(Counter::PassesLate);
        }
        if took > self.longest {
            self.longest = took;
            self.counters.set(Counter::PassLongestUs, took.as_micros() as u64);
        }
    }

    /// What the port has seen since the last time; what its sockets dropped costs system calls, so
    /// only now and then.
    fn count_received(&mut self, now: Time) {
        let counts = self.port.counts();
        let before = std::mem::replace(&mut self.counted, counts);
        self.counters.add(Counter::ReceiveTrains, counts.trains - before.trains);
        self.counters.add(Counter::ReceiveCut, counts.truncated - before.truncated);
        self.counters.add(Counter::ReceiveSenseless, counts.senseless - before.senseless);
        self.counters.add(Counter::ReceiveNoBuffer, counts.no_buffer - before.no_buffer);
        self.counters.add(Counter::ReceiveErrors, counts.receive_errors - before.receive_errors);
        if self.drops_at.reached(now) {
            self.drops_at = now.after(DROPS_PAUSE);
            let drops = self.port.receive_drops();
            self.counters.add(Counter::ReceiveDrops, drops.saturating_sub(self.drops));
            self.drops = drops;
        }
    }

    /// The only wait: until something completes, or the nearest deadline, if no stage has anything
    /// left to do.
    fn wait(&mut self, now: Time, left: Left) -> Result<(), NetError> {
        if let Feed::Kernel(kernel) = &self.feed
            && !self.watching
        {
            self.watching = kernel.watch(&mut self.port);
        }
        if !self.listening {
            self.listening = true;
            self.port.watch(DOORBELL_KEY);
        }
        let source = self.feed.arm(now, &mut self.port);
        let mut at = now.after(WAIT_MAX).min(source).min(self.replica.poll_at());
        if let Some(membership) = &self.membership {
            at = at.min(membership.poll_at());
        }
        match self.pace.next(now, left, at) {
            Next::Pass => self.port.submit(),
            Next::Wait { until, gather } => {
                self.counters.count(Counter::Waits);
                self.counters.add(Counter::WaitsGathered, !gather.is_zero() as u64);
                self.port.wait_gather(until, gather)
            }
        }
    }
}

/// What the log says of a copy that differs.
fn describe(finding: Finding) -> String {
    match finding {
        Finding::Differs { here, active } => {
            format!("copy {here} is not what its active {active} sent: it is sent again whole")
        }
        Finding::Orphan { here, active } => {
            format!(
                "copy {here} is not known to its active {active}: that is asked whether it still stands"
            )
        }
    }
}
