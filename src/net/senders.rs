//! The sending side: one connected socket a stream or heartbeat target, and the way a send takes.
//!
//! A send is one operation from the registered arena, cut into datagrams by UDP_SEGMENT, and is
//! over when its last completion has come: a zero-copy send answers twice, and its bytes
//! are busy until the second. Two things can be refused only when it is too late to ask,
//! so a refused send is tried once more without, and the answer is remembered: segmentation
//! (by the path: the socket then sends datagram by datagram) and, in mode `Auto`, the
//! way of sending (by kernel or device: the port then uses the next plainer one). Every other
//! failure, such as a dead peer's ECONNREFUSED, is the caller's to see: what was lost lies in
//! the history.

#![allow(unsafe_code)]

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use super::error::NetError;
use super::sockets;
use crate::limits::{DATAGRAM_MAX, PEERS_MAX, SEGMENTS_MAX, STREAMS_MAX};
use crate::ring::{Completion, Full, Operation, Ring};

/// Send operations that can be in flight to streams at once; `send` answers `Full` beyond.
pub const SENDS_MAX: usize = 1024;
/// Room beyond that for heartbeats, which must not wait for bulk.
pub(super) const HEARTBEATS_RESERVED: usize = 128;
/// Sends to streams that mode `Auto` makes without copy to see whether the kernel really does not.
const PROBES: u8 = 4;

/// How bytes leave the arena.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SendMode {
    /// WRITE_FIXED: from registered memory, copied, one completion.
    Fixed,
    /// SEND_ZC: not copied where the device allows. `Fixed` if the kernel has no such operation.
    ZeroCopy,
    /// SEND with MSG_DONTWAIT: always works.
    Copy,
    /// `ZeroCopy` if the first sends show that it really does not copy, else `Fixed`, or
    /// `Copy` if that is refused.
    Auto,
}

/// Where a send goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// The peer of a stream, by the stream's index.
    Stream(usize),
    /// A heartbeat target: the multicast group if there is one, then the unicast peers.
    Heartbeat(usize),
}

/// Why `send` did not start a send.
pub(super) enum NotSent {
    /// No room.
    Full,
    /// There is no socket for it.
    Failed(i32),
}

impl From<Full> for NotSent {
    fn from(_: Full) -> NotSent {
        NotSent::Full
    }
}

/// A send in flight.
pub(super) struct Sending {
    to: Target,
    /// Whose address that is.
    pub(super) address: IpAddr,
    /// Which socket: the target may have been closed and opened since.
    socket: u64,
    offset: u32,
    len: u32,
    /// What the caller calls it.
    pub(super) token: u64,
    how: SendMode,
    gso: bool,
    /// Operations not finished.
    pending: usize,
    /// Bytes sent, or the first error.
    result: i32,
    copied: bool,
}

struct Socket {
    fd: OwnedFd,
    id: u64,
    address: IpAddr,
    gso: bool,
}

struct Heartbeat {
    to: SocketAddr,
    socket: Option<Socket>,
}

/// All send sockets of a shard.
pub(super) struct Senders<'m> {
    local: IpAddr,
    port: u16,
    /// The index of the sync link's interface.
    scope: u32,
    arena: &'m [AtomicU64],
    streams: Vec<Option<Socket>>,
    heartbeats: Vec<Heartbeat>,
    choice: Choice,
    gso: bool,
    sockets_made: u64,
    /// Operations in the kernel or on their way.
    in_flight: usize,
    /// Closed, but perhaps named by an operation that the kernel has not seen yet: were the number
    /// used again before, that operation would go to a stranger.
    closing: Vec<OwnedFd>,
}

impl<'m> Senders<'m> {
    /// Senders from `local` to `port` of whoever is opened, on the interface with the index
    /// `scope`.
    pub(super) fn new(
        local: IpAddr,
        port: u16,
        scope: u32,
        arena: &'m [AtomicU64],
        mode: SendMode,
        ring: &Ring,
    ) -> Senders<'m> {
        let features = ring.features();
        Senders {
            local,
            port,
            scope,
            arena,
            streams: (0..STREAMS_MAX).map(|_| None).collect(),
            heartbeats: Vec::new(),
            choice: Choice::new(mode, features.zero_copy),
            gso: features.gso,
            sockets_made: 0,
            in_flight: 0,
            closing: Vec::with_capacity(STREAMS_MAX + PEERS_MAX + 1),
        }
    }

    /// Adds a heartbeat target. Its socket is made now if the network allows, or at a later send.
    pub(super) fn add_heartbeat(&mut self, to: IpAddr) {
        let to = SocketAddr::new(to, self.port);
        let socket = self.heartbeat_socket(to).ok();
        self.heartbeats.push(Heartbeat { to, socket });
    }

    fn heartbeat_socket(&mut self, to: SocketAddr) -> Result<Socket, NetError> {
        let fd = sockets::heartbeat_sender(self.local, to, self.scope)?;
        self.sockets_made += 1;
        Ok(Socket { fd, id: self.sockets_made, address: to.ip(), gso: false })
    }

    /// Heartbeat targets.
    pub(super) fn heartbeat_targets(&self) -> usize {
        self.heartbeats.len()
    }

    /// Datagrams that can be sent to streams for certain, each perhaps by an operation of its own.
    pub(super) fn room(&self) -> usize {
        SENDS_MAX.saturating_sub(self.in_flight)
    }

    /// Where a stream's socket leads, if it is open.
    pub(super) fn peer(&self, stream: usize) -> Option<IpAddr> {
        self.streams[stream].as_ref().map(|socket| socket.address)
    }

    /// Opens a stream's socket.
    pub(super) fn open(&mut self, stream: usize, peer: IpAddr) -> Result<(), NetError> {
        let fd = sockets::stream_sender(self.local, SocketAddr::new(peer, self.port), self.scope)?;
        let gso = self.gso && sockets::set_gso(&fd, true);
        self.sockets_made += 1;
        self.streams[stream] = Some(Socket { fd, id: self.sockets_made, address: peer, gso });
        Ok(())
    }

    /// Closes a stream's socket, if it is open.
    pub(super) fn close(&mut self, stream: usize) {
        self.closing.extend(self.streams[stream].take().map(|socket| socket.fd));
    }

    /// The sync link's interface has this index now. Sockets that may be bound to the old one are
    /// closed; those of heartbeats are made anew when they are needed.
    pub(super) fn renew(&mut self, scope: u32) {
        self.scope = scope;
        let heartbeats = self.heartbeats.iter_mut().filter_map(|h| h.socket.take());
        let streams = self.streams.iter_mut().filter_map(Option::take);
        self.closing.extend(heartbeats.chain(streams).map(|socket| socket.fd));
    }

    /// Lets go of closed sockets, once the kernel has seen every operation.
    pub(super) fn release_closed(&mut self) {
        self.closing.clear();
    }

    /// Whether so many sockets wait to be released that it should be done now.
    pub(super) fn should_release(&self) -> bool {
        self.closing.len() >= STREAMS_MAX
    }

    /// Where a heartbeat target is.
    pub(super) fn heartbeat_address(&self, target: usize) -> IpAddr {
        self.heartbeats[target].to.ip()
    }

    fn socket(&mut self, to: Target) -> Option<&mut Socket> {
        match to {
            Target::Stream(stream) => self.streams[stream].as_mut(),
            Target::Heartbeat(target) => self.heartbeats[target].socket.as_mut(),
        }
    }

    /// Starts a send under the key under which the caller keeps it from then on.
    pub(super) fn send(
        &mut self,
        ring: &mut Ring,
        key: u64,
        to: Target,
        bytes: (u32, u32),
        token: u64,
    ) -> Result<Sending, NotSent> {
        let (offset, len) = bytes;
        assert!(
            len > 0 && offset as usize + len as usize <= size_of_val(self.arena),
            "within the arena"
        );
        let most = match to {
            Target::Stream(_) => SEGMENTS_MAX * DATAGRAM_MAX,
            Target::Heartbeat(_) => DATAGRAM_MAX,
        };
        assert!(len as usize <= most, "no longer than what one send may hold");
        if let Target::Heartbeat(target) = to
            && self.heartbeats[target].socket.is_none()
        {
            let socket = self
                .heartbeat_socket(self.heartbeats[target].to)
                .map_err(|e| NotSent::Failed(-e.errno()))?;
            self.heartbeats[target].socket = Some(socket);
        }
        let Some(socket) = self.socket(to) else { return Err(NotSent::Failed(-libc::ENOTCONN)) };
        let Socket { id: socket, address, gso, .. } = *socket;
        let how = self.choice.peek(to);
        let mut sending = Sending {
            to,
            address,
            socket,
            offset,
            len,
            token,
            how,
            gso,
            pending: 0,
            result: 0,
            copied: false,
        };
        self.launch(ring, key, &mut sending)?;
        self.choice.started(to, how);
        Ok(sending)
    }

    /// Queues the operations of a send: one, or one a datagram where the path refuses segmentation.
    fn launch(&mut self, ring: &mut Ring, key: u64, sending: &mut Sending) -> Result<(), Full> {
        let step = if sending.gso { sending.len as usize } else { DATAGRAM_MAX };
        let count = (sending.len as usize).div_ceil(step);
        let room = match sending.to {
            Target::Stream(_) => SENDS_MAX,
            Target::Heartbeat(_) => SENDS_MAX + HEARTBEATS_RESERVED,
        };
        if self.in_flight + count > room {
            return Err(Full);
        }
        ring.reserve(count)?;
        let Some(fd) = self.socket(sending.to).map(|socket| socket.fd.as_raw_fd()) else {
            return Err(Full);
        };
        let start = self.arena.as_ptr().cast::<u8>().wrapping_add(sending.offset as usize);
        for at in (0..sending.len as usize).step_by(step) {
            let len = step.min(sending.len as usize - at) as u32;
            let bytes = start.wrapping_add(at);
            let operation = match sending.how {
                SendMode::Fixed | SendMode::Auto => Operation::WriteFixed { fd, bytes, len },
                SendMode::ZeroCopy => Operation::SendZeroCopy { fd, bytes, len },
                SendMode::Copy => Operation::Send { fd, bytes, len },
            };
            // SAFETY: the bytes lie within the arena (checked in `send`), which is borrowed for as
            // long as this object lives, and the port drops the ring first. The descriptor
            // stays open until submitted: `close` parks it.
            unsafe { ring.push(operation, key) }?;
        }
        sending.pending = count;
        sending.result = 0;
        sending.copied = false;
        self.in_flight += count;
        Ok(())
    }

    /// Takes one completion of a send. When it was the last, says what came of the send;
    /// the caller then forgets it and may write over the bytes.
    pub(super) fn complete(
        &mut self,
        ring: &mut Ring,
        key: u64,
        sending: &mut Sending,
        completion: &Completion,
    ) -> Option<i32> {
        if completion.notification {
            sending.copied |= completion.copied;
        } else if completion.result < 0 {
            sending.result = sending.result.min(0);
            if sending.result == 0 {
                sending.result = completion.result;
            }
        } else if sending.result >= 0 {
            sending.result += completion.result;
        }
        if completion.more {
            return None;
        }
        sending.pending -= 1;
        self.in_flight -= 1;
        if sending.pending > 0 {
            return None;
        }
        if sending.how == SendMode::ZeroCopy {
            self.choice.learn(sending.result, sending.copied);
        }
        let result = sending.result;
        if result < 0 && self.adapt(sending) && self.launch(ring, key, sending).is_ok() {
            return None;
        }
        Some(result)
    }

    /// Changes what the kernel refused; false if there is nothing to change.
    fn adapt(&mut self, sending: &mut Sending) -> bool {
        let errno = -sending.result;
        let (id, used_gso) = (sending.socket, sending.gso);
        let Some(socket) = self.socket(sending.to).filter(|socket| socket.id == id) else {
            return false;
        };
        // EINVAL can mean either; segmentation is refused more often, by tunnels and small paths.
        if used_gso && matches!(errno, libc::EIO | libc::EINVAL | libc::EMSGSIZE) {
            if socket.gso {
                sockets::set_gso(&socket.fd, false);
                socket.gso = false;
                log::warn!(
                    "the path of {:?} refuses UDP segmentation, sending datagrams singly",
                    sending.to
                );
            }
            sending.gso = false;
            return true;
        }
        match self.choice.refused(sending.how, errno) {
            Some(how) => {
                sending.how = how;
                true
            }
            None => false,
        }
    }

    /// Makes the kernel refuse segmentation on a stream's socket: it needs checksums.
    #[cfg(test)]
    pub(super) fn refuse_segmentation(&mut self, stream: usize) {
        let socket = self.streams[stream].as_ref().expect("the test opened it");
        sockets::set(&socket.fd, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1)
            .expect("Linux has SO_NO_CHECK");
    }

    /// How the next send would leave: for tests and for those who want to show it.
    pub(super) fn mode(&self) -> SendMode {
        if self.choice.probing { SendMode::Auto } else { self.choice.how }
    }
}

/// The way of sending, and what is still to be learnt about it.
struct Choice {
    auto: bool,
    /// Used when not probing; never `Auto`.
    how: SendMode,
    probing: bool,
    probes: u8,
    uncopied: u8,
}

impl Choice {
    fn new(mode: SendMode, zero_copy: bool) -> Choice {
        let how = match mode {
            SendMode::Auto => SendMode::Fixed,
            SendMode::ZeroCopy if !zero_copy => SendMode::Fixed,
            how => how,
        };
        let auto = mode == SendMode::Auto;
        Choice { auto, how, probing: auto && zero_copy, probes: 0, uncopied: 0 }
    }

    /// How a send to `to` leaves. Heartbeats prove nothing about bulk.
    fn peek(&self, to: Target) -> SendMode {
        let probe = self.probing && self.probes < PROBES && matches!(to, Target::Stream(_));
        if probe { SendMode::ZeroCopy } else { self.how }
    }

    fn started(&mut self, to: Target, how: SendMode) {
        if self.probing && how == SendMode::ZeroCopy && matches!(to, Target::Stream(_)) {
            self.probes += 1;
        }
    }

    /// What a finished zero-copy send says. One copy is enough to stop: the notification's
    /// cost buys nothing then.
    fn learn(&mut self, result: i32, copied: bool) {
        if self.auto && result >= 0 && copied {
            self.probing = false;
            self.how = SendMode::Fixed;
        } else if self.probing && result >= 0 {
            self.uncopied += 1;
            if self.uncopied == PROBES {
                self.probing = false;
                self.how = SendMode::ZeroCopy;
            }
        } else if self.probing {
            // A second try that failed too was counted once only.
            self.probes = self.probes.saturating_sub(1);
        }
    }

    /// What to use instead of a refused way, if the refusal is one and there is a choice.
    fn refused(&mut self, how: SendMode, errno: i32) -> Option<SendMode> {
        let refusal = matches!(
            errno,
            libc::EINVAL
                | libc::EOPNOTSUPP
                | libc::EFAULT
                | libc::ENOMEM
                | libc::ENXIO
                | libc::EBADFD
        );
        if !self.auto || !refusal {
            return None;
        }
        let next = match how {
            SendMode::ZeroCopy => SendMode::Fixed,
            SendMode::Fixed => SendMode::Copy,
            SendMode::Copy | SendMode::Auto => return None,
        };
        self.probing = false;
        if self.how == how || self.how == SendMode::ZeroCopy {
            self.how = next;
        }
        Some(next)
    }
}
