//! The queue of events: what the kernel says, message by message, and its table when it is asked to
//! dump it.
//!
//! A trait, so that the simulator can put a model of the kernel in place of netlink.

use std::os::fd::BorrowedFd;

use super::codec::{Decoded, Origin, decode, expecting, is_expectation, origin};
use super::dump::{Dump, DumpProgress};
use super::netlink::{Mailbox, Socket};
use super::{KernelError, filter};
use crate::conn::Tuple;
use crate::source::SourceEvent;

/// Groups of conntrack events: `NFNLGRP_CONNTRACK_NEW`, `_UPDATE`, `_DESTROY`.
const GROUPS: [i32; 3] = [1, 2, 3];
/// `NFNLGRP_CONNTRACK_EXP_NEW`. Every shard hears of all expectations, which are few.
const EXPECTATIONS: i32 = 4;

/// Bytes of the largest event: tuples, NAT, helper, labels and a security context stay far below.
const EVENT_MAX: usize = 4096;

/// A message.
#[allow(clippy::large_enum_variant)] // One at a time, and never kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Heard {
    /// Something happened to an entry.
    Event {
        /// What.
        event: SourceEvent,
        /// Who did it.
        origin: Origin,
        /// Attributes that made no sense and were left out.
        skipped: u8,
    },
    /// A helper expects a connection for the one with this original tuple, its zone left out.
    Expects(Tuple),
    /// It makes no sense.
    Malformed,
}

/// What one read took.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Batch {
    /// Messages.
    pub taken: usize,
    /// Whether nothing waits behind them.
    pub is_last: bool,
    /// Whether the read failed, for want of memory.
    pub failed: bool,
}

/// Somebody's events.
pub trait Queue {
    /// Takes up to `wanted` messages, or fewer.
    fn receive(&mut self, wanted: usize, f: &mut dyn FnMut(Heard)) -> Batch;

    /// Messages that were lost because too many waited, since the queue was opened.
    fn overruns(&self) -> u32;

    /// Whether a dump is under way.
    fn is_dumping(&self) -> bool;

    /// Asks for the whole table; only when no dump is under way.
    fn start_dump(&mut self) -> Result<(), KernelError>;

    /// Reads pieces of the dump until `cap` entries were looked at; `f` says whether it used the
    /// entry.
    fn drain_dump(&mut self, cap: usize, f: &mut dyn FnMut(SourceEvent) -> bool) -> DumpProgress;
}

/// The kernel's own, by netlink.
pub struct NetlinkQueue {
    socket: Socket,
    mailbox: Mailbox,
    dump: Dump,
}

impl NetlinkQueue {
    pub(super) fn open(
        shard: u8,
        shards: u8,
        own_port_ids: &[u32],
        receive_buffer: usize,
    ) -> Result<NetlinkQueue, KernelError> {
        let socket = Socket::open()?;
        socket.set_receive_buffer(receive_buffer)?;
        socket.set_netlink_option(libc::NETLINK_NO_ENOBUFS, 1, "set up a netlink socket")?;
        // The filter before the groups: nothing of other shards is ever queued.
        socket.attach_filter(&filter::program(own_port_ids, shard, shards))?;
        for group in GROUPS.into_iter().chain([EXPECTATIONS]) {
            socket.set_netlink_option(
                libc::NETLINK_ADD_MEMBERSHIP,
                group,
                "listen to conntrack events",
            )?;
        }
        let mailbox = Mailbox::new(Mailbox::BATCH, EVENT_MAX);
        Ok(NetlinkQueue { socket, mailbox, dump: Dump::open()? })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }
}

impl Queue for NetlinkQueue {
    fn receive(&mut self, wanted: usize, f: &mut dyn FnMut(Heard)) -> Batch {
        let wanted = wanted.min(Mailbox::BATCH);
        let received = self.mailbox.receive(&self.socket, wanted);
        for message in self.mailbox.messages() {
            f(if is_expectation(message) {
                expecting(message).map_or(Heard::Malformed, Heard::Expects)
            } else {
                decode(message).map_or(Heard::Malformed, |Decoded { event, skipped }| {
                    Heard::Event { event, origin: origin(message), skipped }
                })
            });
        }
        let taken = received.as_ref().map_or(0, |taken| *taken);
        Batch { taken, is_last: taken < wanted, failed: received.is_err() }
    }

    /// One system call.
    fn overruns(&self) -> u32 {
        self.socket.drops()
    }

    fn is_dumping(&self) -> bool {
        self.dump.is_running()
    }

    fn start_dump(&mut self) -> Result<(), KernelError> {
        self.dump.start()
    }

    fn drain_dump(&mut self, cap: usize, f: &mut dyn FnMut(SourceEvent) -> bool) -> DumpProgress {
        self.dump.drain(cap, f)
    }
}
