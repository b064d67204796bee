//! What a shard holds of the network: one ring, its sockets, and verbs for the loop.
//!
//! A pass calls `reap` (completions become events and received trains), `receive` (trains
//! become datagrams), `send` as often as it likes, and `submit` or `wait`. Receive operations
//! and watches are armed there and only there: what a completion ended is noted, and
//! no error or full queue in between can make a socket silent for good.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use slab::Slab;

use super::error::NetError;
use super::link::Renewal;
use super::segmentation::{Broken, Train, receive_header};
use super::senders::{HEARTBEATS_RESERVED, NotSent, SENDS_MAX, SendMode, Senders, Sending, Target};
use super::sockets;
use crate::limits::{PEERS_MAX, STREAMS_MAX};
use crate::ring::{Completion, Features, Full, Operation, Ring};
use crate::time::Time;

/// Descriptors that can be watched at once.
const WATCHES_MAX: usize = 64;
/// Receive sockets that can wait for their end; the link is not made anew more often than a pass is
/// made.
const RETIRED_MAX: usize = 8;
/// Failed sends that can wait for `reap`.
const FAILED_MAX: usize = 4 * (PEERS_MAX + 1);

/// Failed sends whose targets wait to be asked for. Further ones come again.
const REFUSED_MAX: usize = 64;

/// How a shard uses the network.
#[derive(Clone, Debug)]
pub struct PortConfig<'m> {
    /// The sync address of this member.
    pub local: IpAddr,
    /// This shard.
    pub shard: u8,
    /// The group's UDP port, 8116 by default.
    pub udp_port: u16,
    /// The index of the sync link's interface.
    pub interface: u32,
    /// The multicast group. Shard 0 sends.
    pub multicast: Option<IpAddr>,
    /// Further heartbeat targets, where there is no multicast. Shard 0 sends.
    pub heartbeat_peers: Vec<IpAddr>,
    /// The send arena, on tmpfs, hugetlbfs or anonymous memory. Its pages get locked.
    pub arena: &'m [AtomicU64],
    /// How bytes leave it.
    pub send: SendMode,
    /// What to use of the kernel.
    pub features: Features,
    /// Receive buffers of 64 KB each, rounded up to a power of two; 32 is a good number.
    pub receive_buffers: usize,
}

/// What `reap` reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A send is over, and its bytes may be written over.
    Sent {
        /// What the caller called it.
        token: u64,
        /// Bytes sent, or a negative errno.
        result: i32,
    },
    /// A watched descriptor became readable. Watch it again to hear of it again.
    Ready {
        /// What the caller called it.
        key: u64,
    },
    /// The futex was woken or its word is not as expected.
    Woken,
}

/// What a port has seen, since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortCounts {
    /// Trains received: completions with datagrams in them.
    pub trains: u64,
    /// Buffers dropped because a datagram in them was cut.
    pub truncated: u64,
    /// Buffers dropped because they made no sense.
    pub senseless: u64,
    /// Times that all receive buffers were in use at once.
    pub no_buffer: u64,
    /// Receive operations that ended with any other error.
    pub receive_errors: u64,
}

/// What an operation in flight is for.
enum InFlight {
    Receive,
    Cancel,
    Send(Sending),
    Watch(u64),
    Futex,
}

struct Receiver {
    fd: OwnedFd,
    /// The receive operation in the kernel.
    operation: Option<usize>,
}

impl Receiver {
    fn new(fd: OwnedFd) -> Receiver {
        Receiver { fd, operation: None }
    }
}

/// A receive socket that another has replaced: it is closed when its operation has ended.
struct Retired {
    receiver: Receiver,
    is_cancelled: bool,
}

/// One shard's network. Stays on the thread that made it.
pub struct Port<'m> {
    // Dropped first: it cancels what is in flight, while all that this names still exists.
    ring: Ring,
    senders: Senders<'m>,
    /// The one on the sync address, and of shard 0 that of the multicast group.
    receivers: Vec<Receiver>,
    retired: Vec<Retired>,
    /// Boxed: the kernel reads it whenever a receive is armed.
    header: Box<libc::msghdr>,
    operations: Slab<InFlight>,
    arrived: VecDeque<Train>,
    failed: VecDeque<(u64, i32)>,
    refused: Vec<(IpAddr, i32)>,
    /// What can be watched, by key.
    watched: Vec<(u64, OwnedFd)>,
    /// Of these, which wait to be armed.
    watches: VecDeque<usize>,
    futex_armed: bool,
    counts: PortCounts,
    /// What sockets dropped that are retired.
    drops_before: u64,
}

impl<'m> Port<'m> {
    /// The port of a shard, with its socket of those that the [`Link`](super::Link) made, and for
    /// shard 0 with the multicast group's. Call it on the shard's own thread.
    pub fn new(
        config: &PortConfig<'m>,
        receiver: OwnedFd,
        group: Option<OwnedFd>,
    ) -> Result<Port<'m>, NetError> {
        let mut ring = Ring::new(config.features, config.receive_buffers)?;
        ring.register_arena(config.arena)?;
        let mut senders = Senders::new(
            config.local,
            config.udp_port,
            config.interface,
            config.arena,
            config.send,
            &ring,
        );
        let receivers: Vec<Receiver> =
            [Some(receiver), group].into_iter().flatten().map(Receiver::new).collect();
        if config.shard == 0 {
            for target in config.multicast.iter().chain(&config.heartbeat_peers) {
                same_family(config.local, *target)?;
                senders.add_heartbeat(*target);
            }
        }
        if ring.features().gro {
            receivers.iter().for_each(|receiver| sockets::enable_gro(&receiver.fd));
        }
        let mut port = Port {
            ring,
            senders,
            receivers,
            retired: Vec::with_capacity(RETIRED_MAX),
            header: Box::new(receive_header()),
            operations: Slab::with_capacity(
                SENDS_MAX + HEARTBEATS_RESERVED + WATCHES_MAX + 4 + 2 * RETIRED_MAX,
            ),
            arrived: VecDeque::with_capacity(config.receive_buffers.next_power_of_two()),
            failed: VecDeque::with_capacity(FAILED_MAX),
            refused: Vec::with_capacity(REFUSED_MAX),
            watched: Vec::new(),
            watches: VecDeque::with_capacity(WATCHES_MAX),
            futex_armed: false,
            counts: PortCounts::default(),
            drops_before: 0,
        };
        port.submit()?;
        Ok(port)
    }

    /// What is in use of what the kernel has.
    pub fn features(&self) -> Features {
        self.ring.features()
    }

    /// How sends leave now; `Auto` while that is being found out.
    pub fn mode(&self) -> SendMode {
        self.senders.mode()
    }

    /// Targets for `Target::Heartbeat`, from 0: the multicast group if there is one, then the
    /// peers. None on shards other than 0.
    pub fn heartbeat_targets(&self) -> usize {
        self.senders.heartbeat_targets()
    }

    /// What this port has seen so far.
    pub fn counts(&self) -> PortCounts {
        self.counts
    }

    /// Datagrams that the kernel dropped because a receive socket was full. One system call a
    /// socket.
    pub fn receive_drops(&self) -> u64 {
        let drops = |receiver: &Receiver| u64::from(sockets::drops(&receiver.fd));
        self.drops_before + self.receivers.iter().map(drops).sum::<u64>()
    }

    /// Operations in the kernel, receive operations and watches included.
    pub fn in_flight(&self) -> usize {
        self.operations.len()
    }

    /// Datagrams that [`send`](Self::send) takes for streams at the moment.
    pub fn room(&self) -> usize {
        self.senders.room()
    }

    /// Gives a stream a socket to `peer`, in place of one to somebody else that it may have had.
    pub fn open(&mut self, stream: usize, peer: IpAddr) -> Result<(), NetError> {
        if self.senders.peer(stream) == Some(peer) {
            return Ok(());
        }
        self.close(stream);
        self.senders.open(stream, peer)
    }

    /// Takes the sockets of streams away that lead to a peer that is none of theirs any more.
    pub fn close_unless(&mut self, is_peer: impl Fn(usize, IpAddr) -> bool) {
        for stream in 0..STREAMS_MAX {
            if self.senders.peer(stream).is_some_and(|peer| !is_peer(stream, peer)) {
                self.close(stream);
            }
        }
    }

    /// Takes a stream's socket away. Sends on their way are still reported.
    pub fn close(&mut self, stream: usize) {
        if self.senders.should_release() {
            // An error here will come again from the next wait, which reports it.
            let _ = self.submit();
        }
        self.senders.close(stream);
    }

    /// The sync link was made anew: takes the new receive sockets in place of the old ones. Send
    /// sockets may be bound to the old interface: those of heartbeats are made anew, those of
    /// streams closed.
    pub fn renew(&mut self, renewal: Renewal) {
        // An error here will come again from the next wait, which reports it.
        let _ = self.submit();
        self.senders.renew(renewal.interface);
        for (index, fd) in [renewal.receiver, renewal.group].into_iter().enumerate() {
            let Some(fd) = fd else { continue };
            if self.ring.features().gro {
                sockets::enable_gro(&fd);
            }
            let receiver = std::mem::replace(&mut self.receivers[index], Receiver::new(fd));
            self.drops_before += u64::from(sockets::drops(&receiver.fd));
            if receiver.operation.is_some() {
                self.retired.push(Retired { receiver, is_cancelled: false });
            }
        }
    }

    /// Sends `len` bytes at `offset` of the arena, as a train of full datagrams of which the last
    /// may be short. The bytes must stay as they are until `Event::Sent` with this token, which
    /// comes exactly once. A stream that is not open is reported that way too (ENOTCONN).
    pub fn send(&mut self, to: Target, offset: u32, len: u32, token: u64) -> Result<(), Full> {
        let entry = self.operations.vacant_entry();
        match self.senders.send(&mut self.ring, entry.key() as u64, to, (offset, len), token) {
            Ok(sending) => {
                entry.insert(InFlight::Send(sending));
                Ok(())
            }
            Err(NotSent::Failed(result)) if self.failed.len() < FAILED_MAX => {
                if let Target::Heartbeat(target) = to {
                    let address = self.senders.heartbeat_address(target);
                    self.refuse(address, result);
                }
                self.failed.push_back((token, result));
                Ok(())
            }
            Err(NotSent::Failed(_) | NotSent::Full) => Err(Full),
        }
    }

    /// Where a send failed, and the errno. The same is kept once until it is asked for.
    pub fn poll_refusal(&mut self) -> Option<(IpAddr, i32)> {
        self.refused.pop()
    }

    fn refuse(&mut self, to: IpAddr, result: i32) {
        let refusal = (to, -result);
        if result < 0 && self.refused.len() < REFUSED_MAX && !self.refused.contains(&refusal) {
            self.refused.push(refusal);
        }
    }

    /// Takes a descriptor that [`watch`](Self::watch) will name by this key, and keeps it open. A
    /// duplicate of the one that is read from does: what is watched is the open file.
    pub fn add_watch(&mut self, key: u64, fd: OwnedFd) {
        assert!(self.watched.iter().all(|(other, _)| *other != key), "a key names one descriptor");
        self.watched.push((key, fd));
    }

    /// Reports once, as `Event::Ready`, when the descriptor of this key is readable.
    pub fn watch(&mut self, key: u64) {
        assert!(
            self.watches.len() < WATCHES_MAX,
            "a watch is asked for again only after it was reported"
        );
        let index = self.watched.iter().position(|(other, _)| *other == key);
        self.watches.push_back(index.expect("the descriptor was added before"));
    }

    /// Reports once, as `Event::Woken`, when somebody wakes the futex `word` (in memory that
    /// processes share), at once if it is not `expected`. False if the kernel cannot: look at
    /// the word at short intervals instead. Does nothing if one is under way already.
    ///
    /// ```
    /// # use std::sync::atomic::AtomicU32;
    /// # use hypersync::net::Port;
    /// fn wait<'m>(port: &mut Port<'m>, word: &'m AtomicU32) -> bool {
    ///     port.futex_wait(word, 0)
    /// }
    /// ```
    ///
    /// The word must live as long as what the port was made over:
    ///
    /// ```compile_fail,E0597
    /// # use std::sync::atomic::AtomicU32;
    /// # use hypersync::net::Port;
    /// fn wait(port: &mut Port<'static>) -> bool {
    ///     let word = AtomicU32::new(0);
    ///     port.futex_wait(&word, 0)
    /// }
    /// ```
    pub fn futex_wait(&mut self, word: &'m AtomicU32, expected: u32) -> bool {
        if self.futex_armed {
            return true;
        }
        if !self.ring.features().futex_wait {
            return false;
        }
        let key = self.operations.insert(InFlight::Futex);
        let operation = Operation::FutexWait { word: word.as_ptr().cast_const(), expected };
        // SAFETY: the kernel only reads the word, which is there as long as `'m`, and checks its
        // address itself.
        self.futex_armed = unsafe { self.ring.push(operation, key as u64) }.is_ok();
        if !self.futex_armed {
            self.operations.remove(key);
        }
        self.futex_armed
    }

    /// Hands what was queued to the kernel. Never waits.
    pub fn submit(&mut self) -> Result<(), NetError> {
        self.arm();
        self.ring.submit()?;
        self.release_closed();
        Ok(())
    }

    /// Submits, then waits until something completes or `deadline` has come. Returns at once
    /// if trains or failures wait already.
    pub fn wait(&mut self, deadline: Time) -> Result<(), NetError> {
        self.wait_gather(deadline, Duration::ZERO)
    }

    /// Like `wait`, but a lone completion waits up to `gather` for company, if the kernel can
    /// do that: fewer, fuller passes under load.
    pub fn wait_gather(&mut self, deadline: Time, gather: Duration) -> Result<(), NetError> {
        if !self.arrived.is_empty() || !self.failed.is_empty() {
            return self.submit();
        }
        self.arm();
        self.ring.wait(deadline, gather)?;
        self.release_closed();
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn refuse_segmentation(&mut self, stream: usize) {
        self.senders.refuse_segmentation(stream);
    }

    fn release_closed(&mut self) {
        if self.ring.unsubmitted() == 0 {
            self.senders.release_closed();
        }
    }

    /// Arms what waits to be armed. What finds no room stays noted for the next time.
    fn arm(&mut self) {
        for retired in self.retired.iter_mut().filter(|retired| !retired.is_cancelled) {
            let Some(token) = retired.receiver.operation else { continue };
            let key = self.operations.insert(InFlight::Cancel);
            let operation = Operation::Cancel { token: token as u64 };
            // SAFETY: no pointers and no descriptor.
            retired.is_cancelled = unsafe { self.ring.push(operation, key as u64) }.is_ok();
            if !retired.is_cancelled {
                self.operations.remove(key);
            }
        }
        for receiver in &mut self.receivers {
            // Without a free buffer the operation would end at once, again and again.
            if receiver.operation.is_some() || !self.ring.has_free_buffer() {
                continue;
            }
            let key = self.operations.insert(InFlight::Receive);
            let operation =
                Operation::Receive { fd: receiver.fd.as_raw_fd(), header: &raw const *self.header };
            // SAFETY: the header lives as long as the port, whose ring is dropped first, and the
            // socket until the operation has ended.
            let is_armed = unsafe { self.ring.push(operation, key as u64) }.is_ok();
            receiver.operation = is_armed.then_some(key);
            if !is_armed {
                self.operations.remove(key);
            }
        }
        while let Some(&index) = self.watches.front() {
            let (watched, fd) = &self.watched[index];
            let key = self.operations.insert(InFlight::Watch(*watched));
            let operation = Operation::Readable { fd: fd.as_raw_fd() };
            // SAFETY: no pointers; the descriptor stays open as long as the port.
            if unsafe { self.ring.push(operation, key as u64) }.is_err() {
                self.operations.remove(key);
                break;
            }
            self.watches.pop_front();
        }
    }

    /// Works through what the kernel has completed: reports events, and keeps trains for `receive`.
    pub fn reap(&mut self, report: &mut dyn FnMut(Event)) {
        while let Some((token, result)) = self.failed.pop_front() {
            report(Event::Sent { token, result });
        }
        self.ring.collect();
        while let Some(completion) = self.ring.take() {
            self.act(completion, report);
        }
    }

    fn act(&mut self, completion: Completion, report: &mut dyn FnMut(Event)) {
        let key = completion.token as usize;
        let over = !completion.more;
        match &mut self.operations[key] {
            InFlight::Receive => {
                if over {
                    self.operations.remove(key);
                    let ended = |receiver: &Receiver| receiver.operation == Some(key);
                    match self.receivers.iter_mut().find(|receiver| ended(receiver)) {
                        Some(receiver) => receiver.operation = None,
                        None => self.retired.retain(|retired| !ended(&retired.receiver)),
                    }
                }
                self.received(completion);
            }
            InFlight::Cancel => {
                self.operations.remove(key);
            }
            InFlight::Send(sending) => {
                let result =
                    self.senders.complete(&mut self.ring, key as u64, sending, &completion);
                if let Some(result) = result {
                    let (token, address) = (sending.token, sending.address);
                    self.operations.remove(key);
                    self.refuse(address, result);
                    report(Event::Sent { token, result });
                }
            }
            InFlight::Watch(watched) => {
                let watched = *watched;
                self.operations.remove(key);
                report(Event::Ready { key: watched });
            }
            InFlight::Futex => {
                self.operations.remove(key);
                self.futex_armed = false;
                report(Event::Woken);
            }
        }
    }

    fn received(&mut self, completion: Completion) {
        match completion.buffer {
            Some(buffer) if completion.result > 0 => match Train::new(buffer, &self.header) {
                Ok(train) => {
                    self.counts.trains += 1;
                    self.arrived.push_back(train);
                }
                Err(Broken::Truncated) => self.counts.truncated += 1,
                Err(Broken::Senseless) => self.counts.senseless += 1,
            },
            _ if completion.result == -libc::ENOBUFS => self.counts.no_buffer += 1,
            // A retired socket's operation ends so.
            _ if completion.result == -libc::ECANCELED => {}
            _ if completion.result < 0 => self.counts.receive_errors += 1,
            _ => {}
        }
    }

    /// Hands out up to `cap` received datagrams with their source, in the order in which they came.
    /// Returns how many. What is left comes first the next time.
    pub fn receive(&mut self, cap: usize, handle: &mut dyn FnMut(IpAddr, &[u8])) -> usize {
        let mut count = 0;
        while count < cap {
            let Some(train) = self.arrived.front_mut() else { break };
            let source = train.source();
            if let Some(datagram) = train.next() {
                handle(source, datagram);
                count += 1;
            }
            if train.is_done() {
                self.arrived.pop_front();
            }
        }
        count
    }
}

fn same_family(local: IpAddr, other: IpAddr) -> Result<(), NetError> {
    if local.is_ipv4() == other.is_ipv4() {
        return Ok(());
    }
    Err(sockets::error("send heartbeats from the sync address", other, libc::EAFNOSUPPORT))
}
