//! Reading the kernel's whole table, in pieces.
//!
//! A dump has a socket of its own: its answers do not queue behind events, and no filter
//! touches them. The kernel prepares one piece (up to 32 KB, about 150 entries) when the one
//! before it is read, so reading slowly costs nothing but time. It walks the table in hash order
//! without stopping it: an entry that comes or goes meanwhile may or may not be in the dump,
//! which is why the events must be listened to before it starts.

use super::KernelError;
use super::codec::{self, Decoded, MESSAGE_MAX, TYPE_DONE, TYPE_ERROR, decode_entry, encode_dump};
use super::netlink::{Mailbox, Socket};
use crate::source::SourceEvent;

/// Bytes of the largest piece: what the kernel offers a reader with buffers this large.
const PIECE_MAX: usize = 32 << 10;

/// Where a dump stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DumpState {
    /// None is under way: the last one is complete, or none was asked for.
    Done,
    /// There is more to read.
    Running,
    /// The kernel broke it off, for this reason. Start another.
    Failed(i32),
}

/// What one call read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DumpProgress {
    /// Entries handed to the caller.
    pub events: usize,
    /// Entries looked at, those of other shards included.
    pub entries: usize,
    /// Messages that made no sense.
    pub malformed: usize,
    /// Attributes that made no sense and were left out.
    pub skipped: usize,
    /// Where the dump stands now.
    pub state: DumpState,
}

/// The socket of the dump and the request under way.
pub(super) struct Dump {
    socket: Socket,
    mailbox: Mailbox,
    sequence: u32,
    is_running: bool,
}

impl Dump {
    pub(super) fn open() -> Result<Dump, KernelError> {
        let socket = Socket::open()?;
        Ok(Dump { socket, mailbox: Mailbox::new(1, PIECE_MAX), sequence: 0, is_running: false })
    }

    pub(super) fn is_running(&self) -> bool {
        self.is_running
    }

    /// Asks for the table; only when no dump is under way.
    pub(super) fn start(&mut self) -> Result<(), KernelError> {
        assert!(!self.is_running, "one dump at a time");
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = [0; MESSAGE_MAX];
        let length = encode_dump(&mut request, self.sequence, None);
        self.socket
            .send(&request[..length])
            .map_err(|e| KernelError::new("dump the kernel's connection table", &e))?;
        self.is_running = true;
        Ok(())
    }

    /// Reads pieces until `cap` entries were looked at; `f` says whether it used the entry.
    pub(super) fn drain(
        &mut self,
        cap: usize,
        f: &mut dyn FnMut(SourceEvent) -> bool,
    ) -> DumpProgress {
        let mut progress = DumpProgress {
            events: 0,
            entries: 0,
            malformed: 0,
            skipped: 0,
            state: DumpState::Done,
        };
        while self.is_running && progress.entries < cap {
            match self.mailbox.receive(&self.socket, 1) {
                // Every piece is there as soon as the one before it was read: an empty queue is a
                // lost piece.
                Ok(0) => return self.fail(progress, libc::ENODATA),
                Ok(_) => {}
                Err(e) => return self.fail(progress, e.raw_os_error().unwrap_or(libc::EIO)),
            }
            let mut end = None;
            for message in self.mailbox.messages() {
                match codec::answer(message) {
                    // What is left of a dump that failed earlier.
                    Some(answer) if answer.sequence != self.sequence => {}
                    Some(answer) if answer.kind == TYPE_DONE || answer.kind == TYPE_ERROR => {
                        end = Some(answer.errno)
                    }
                    _ => {
                        progress.entries += 1;
                        match decode_entry(message) {
                            Ok(Decoded { event, skipped }) => {
                                progress.skipped += skipped as usize;
                                progress.events += f(event) as usize;
                            }
                            Err(_) => progress.malformed += 1,
                        }
                    }
                }
            }
            match end {
                Some(0) => self.is_running = false,
                Some(errno) => return self.fail(progress, errno),
                None => {}
            }
        }
        if self.is_running {
            progress.state = DumpState::Running;
        }
        progress
    }

    fn fail(&mut self, progress: DumpProgress, errno: i32) -> DumpProgress {
        self.is_running = false;
        DumpProgress { state: DumpState::Failed(errno), ..progress }
    }
}
