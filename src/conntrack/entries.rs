//! The kernel's entries, one request at a time: what [`Committer`](super::commit::Committer)
//! decides, carried out.
//!
//! Requests are gathered and sent together; the kernel acts on all of them before the call returns,
//! and its answers are waiting by then, so nothing here blocks. Only failures are answered (and the
//! last request, which shows that the answers are complete).
//!
//! A trait, so that the simulator can put a model of the kernel in place of netlink.

use std::net::IpAddr;

use super::KernelError;
use super::addresses;
use super::codec::{
    self, Decoded, MESSAGE_MAX, TYPE_ERROR, decode_entry, encode_create, encode_delete, encode_get,
    encode_statistics, encode_update, request_ack,
};
use super::fill::TableFill;
use super::netlink::{Mailbox, Socket};
use super::timeouts::Timeouts;
use crate::conn::{Connection, Tuple};
use crate::limits::COMMIT_PER_PASS;
use crate::source::SourceEvent;

/// What is asked of the kernel about one entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request<'a> {
    /// To make it, where there is none.
    Create {
        /// What it is to be.
        connection: &'a Connection,
        /// How long it lives without packets.
        timeout_s: u32,
    },
    /// To bring it up to date.
    Update {
        /// What it is to be.
        connection: &'a Connection,
        /// How long it lives without packets.
        timeout_s: u32,
        /// The status that it had when it was asked for.
        present: u32,
    },
    /// To tell what it is.
    Get {
        /// Its original tuple.
        original: &'a Tuple,
    },
    /// To remove it.
    Delete {
        /// Its original tuple.
        original: &'a Tuple,
    },
}

/// What the kernel said to the one or two requests about an entry; silence is success.
#[derive(Clone, Copy, Default)]
pub struct Answers {
    /// Why each was refused; zero if it was not.
    pub errno: [i32; 2],
    /// The entry, if it was asked for and is there.
    pub found: Option<Connection>,
}

/// Somebody's entries.
pub trait Entries {
    /// Adds a request about the entry at this place of a batch of at most [`COMMIT_PER_PASS`], in
    /// rising order. A second one about the same entry is carried out after the first.
    fn put(&mut self, index: usize, request: Request<'_>);

    /// Carries out what was put, and tells what became of it by the entries' places; or why none of
    /// it can be known.
    fn carry_out(&mut self) -> Result<[Answers; COMMIT_PER_PASS], i32>;

    /// Entries that may still be inserted, and entries that are allowed (0: any number).
    fn room_and_limit(&self) -> (u64, u64);

    /// Whether this address is this host's now, of an interface that is up.
    fn has_address(&mut self, address: IpAddr) -> bool;

    /// The timeouts that entries get by packets, as they were read last.
    fn timeouts(&self) -> &Timeouts;

    /// Reads so many of the timeouts again, in turn.
    fn read_timeouts_again(&mut self, count: usize);
}

/// The kernel's own, by netlink.
pub struct NetlinkEntries {
    socket: Socket,
    mailbox: Mailbox,
    requests: Vec<u8>,
    /// Where the requests end, and where the last one begins.
    end: usize,
    last: usize,
    last_sequence: u32,
    /// The sequence number of the batch's first request.
    base: u32,
    timeouts: Timeouts,
    fill: TableFill,
}

impl NetlinkEntries {
    pub(super) fn open() -> Result<NetlinkEntries, KernelError> {
        let socket = Socket::open()?;
        // An answer without the request in it: 36 bytes whatever we sent.
        socket.set_netlink_option(libc::NETLINK_CAP_ACK, 1, "set up a netlink socket")?;
        // Every answer of a batch waits at once: 32 entries asked for take less than 8 KB each.
        socket.set_receive_buffer(1 << 20)?;
        let mut entries = NetlinkEntries {
            socket,
            mailbox: Mailbox::new(Mailbox::BATCH, 4096),
            requests: vec![0; (2 * COMMIT_PER_PASS + 1) * MESSAGE_MAX],
            end: 0,
            last: 0,
            last_sequence: 0,
            base: 1,
            timeouts: Timeouts::read(),
            fill: TableFill::open()
                .map_err(|_| KernelError::NoConntrack { doing: "read conntrack's limits" })?,
        };
        entries.probe()?;
        Ok(entries)
    }

    /// Asks something harmless: says at the start what every request would say later.
    fn probe(&mut self) -> Result<(), KernelError> {
        const DOING: &str = "ask the kernel about its connection table";
        let length = encode_statistics(&mut self.requests, self.base);
        request_ack(&mut self.requests);
        self.socket.send(&self.requests[..length]).map_err(|e| KernelError::new(DOING, &e))?;
        let mut errno = libc::ENODATA;
        while self
            .mailbox
            .receive(&self.socket, Mailbox::BATCH)
            .map_err(|e| KernelError::new(DOING, &e))?
            > 0
        {
            for answer in self.mailbox.messages().filter_map(codec::answer) {
                if answer.kind == TYPE_ERROR {
                    errno = answer.errno;
                }
            }
        }
        match errno {
            0 => Ok(()),
            // What nfnetlink says about a subsystem that nobody has registered.
            libc::EINVAL | libc::EOPNOTSUPP => Err(KernelError::NoConntrack { doing: DOING }),
            errno => Err(KernelError::from_errno(DOING, errno)),
        }
    }

    /// The port id in the events that these requests cause.
    pub(super) fn port_id(&self) -> u32 {
        self.socket.port_id()
    }

    /// The answers, by entry. All of them wait already: an empty queue before the last one
    /// means that answers were lost.
    fn read_answers(&mut self, base: u32, last: u32) -> Result<[Answers; COMMIT_PER_PASS], i32> {
        let mut answers = [Answers::default(); COMMIT_PER_PASS];
        loop {
            let taken = self
                .mailbox
                .receive(&self.socket, Mailbox::BATCH)
                .map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
            if taken == 0 {
                return Err(libc::ENODATA);
            }
            let mut is_complete = false;
            for message in self.mailbox.messages() {
                let Some(answer) = codec::answer(message) else { continue };
                let offset = answer.sequence.wrapping_sub(base) as usize;
                let Some(of_entry) = answers.get_mut(offset / 2) else { continue };
                if answer.kind == TYPE_ERROR {
                    of_entry.errno[offset % 2] = answer.errno;
                    is_complete |= answer.sequence == last;
                } else if let Ok(Decoded { event: SourceEvent::Seen { connection, .. }, .. }) =
                    decode_entry(message)
                {
                    of_entry.found = Some(connection);
                }
            }
            if is_complete {
                return Ok(answers);
            }
        }
    }
}

impl Entries for NetlinkEntries {
    fn put(&mut self, index: usize, request: Request<'_>) {
        // Two requests an entry at most: sequence base + 2 * index, and one more for the second.
        let first = self.base.wrapping_add(2 * index as u32);
        let sequence = match self.end > 0 && self.last_sequence == first {
            true => first.wrapping_add(1),
            false => first,
        };
        let to = &mut self.requests[self.end..];
        let length = match request {
            Request::Create { connection, timeout_s } => {
                encode_create(to, sequence, connection, timeout_s)
            }
            Request::Update { connection, timeout_s, present } => {
                encode_update(to, sequence, connection, timeout_s, present)
            }
            Request::Get { original } => encode_get(to, sequence, original),
            Request::Delete { original } => encode_delete(to, sequence, original),
        };
        (self.last, self.last_sequence) = (self.end, sequence);
        self.end += length;
    }

    fn carry_out(&mut self) -> Result<[Answers; COMMIT_PER_PASS], i32> {
        assert!(self.end > 0, "somebody asks for something");
        request_ack(&mut self.requests[self.last..]);
        let sent = self.socket.send(&self.requests[..self.end]);
        let base = self.base;
        self.base = base.wrapping_add(2 * COMMIT_PER_PASS as u32);
        self.end = 0;
        sent.map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
        self.read_answers(base, self.last_sequence)
    }

    fn room_and_limit(&self) -> (u64, u64) {
        (self.fill.room(), self.fill.limit_and_count().0)
    }

    fn has_address(&mut self, address: IpAddr) -> bool {
        // What cannot be read counts as not here: then an end waits, and is no end yet. (The thread
        // that publishes the addresses says why, in the log.)
        addresses::has_address(address).unwrap_or(false)
    }

    fn timeouts(&self) -> &Timeouts {
        &self.timeouts
    }

    fn read_timeouts_again(&mut self, count: usize) {
        self.timeouts.read_again(count);
    }
}
