//! What can be asked of the kernel, and what comes back.

use std::os::fd::RawFd;

use io_uring::{cqueue, opcode, squeue, types};

use super::buffers::{Buffer, GROUP};

/// The index under which the send arena is registered.
const ARENA: u16 = 0;
/// IORING_SEND_ZC_REPORT_USAGE: the notification says whether the bytes were copied after all.
const REPORT_USAGE: u16 = 1 << 3;
/// In a notification with REPORT_USAGE: the kernel copied.
const COPIED: u32 = 1 << 31;
/// FUTEX2_SIZE_U32, without FUTEX2_PRIVATE: a word that processes share.
const FUTEX_SHARED_U32: u32 = 0x02;
const FUTEX_MATCH_ANY: u64 = 0xffff_ffff;

/// One request to the kernel. Pointers must stay valid until its last completion.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// Receive into provided buffers until told otherwise. The header gives the room for
    /// name and control data.
    Receive {
        /// The socket.
        fd: RawFd,
        /// `msg_namelen` and `msg_controllen` count.
        header: *const libc::msghdr,
    },
    /// Send from the registered arena on a connected socket.
    WriteFixed {
        /// The socket.
        fd: RawFd,
        /// Within the arena.
        bytes: *const u8,
        /// Bytes.
        len: u32,
    },
    /// Send from the registered arena without copying; a notification ends it.
    SendZeroCopy {
        /// The socket.
        fd: RawFd,
        /// Within the arena.
        bytes: *const u8,
        /// Bytes.
        len: u32,
    },
    /// Send with a copy, now or not at all.
    Send {
        /// The socket.
        fd: RawFd,
        /// Anywhere.
        bytes: *const u8,
        /// Bytes.
        len: u32,
    },
    /// End the operation that carries this token, which completes as cancelled.
    Cancel {
        /// Its token.
        token: u64,
    },
    /// Complete once when the descriptor becomes readable.
    Readable {
        /// The descriptor.
        fd: RawFd,
    },
    /// Complete when woken, or at once if the word is not `expected`.
    FutexWait {
        /// In memory that processes share.
        word: *const u32,
        /// The value seen last.
        expected: u32,
    },
}

impl Operation {
    pub(super) fn entry(self) -> squeue::Entry {
        match self {
            Operation::Receive { fd, header } => {
                opcode::RecvMsgMulti::new(types::Fd(fd), header, GROUP).build()
            }
            Operation::WriteFixed { fd, bytes, len } => {
                opcode::WriteFixed::new(types::Fd(fd), bytes, len, ARENA).build()
            }
            Operation::SendZeroCopy { fd, bytes, len } => {
                opcode::SendZc::new(types::Fd(fd), bytes, len)
                    .buf_index(Some(ARENA))
                    .zc_flags(REPORT_USAGE)
                    .build()
            }
            Operation::Send { fd, bytes, len } => {
                opcode::Send::new(types::Fd(fd), bytes, len).flags(libc::MSG_DONTWAIT).build()
            }
            Operation::Cancel { token } => opcode::AsyncCancel::new(token).build(),
            Operation::Readable { fd } => {
                opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build()
            }
            Operation::FutexWait { word, expected } => {
                opcode::FutexWait::new(word, expected.into(), FUTEX_MATCH_ANY, FUTEX_SHARED_U32)
                    .build()
            }
        }
    }
}

/// No room for another operation; ask again after completions were taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// One answer of the kernel.
#[derive(Debug)]
pub struct Completion {
    /// What was given with the operation.
    pub token: u64,
    /// Bytes, or a negative errno. Meaningless in a notification.
    pub result: i32,
    /// Whether further completions of the same operation follow.
    pub more: bool,
    /// Whether this is the notification that a zero-copy send's bytes are free again.
    pub notification: bool,
    /// In a notification: whether the kernel copied after all.
    pub copied: bool,
    /// What was received.
    pub buffer: Option<Buffer>,
}

impl Completion {
    pub(super) fn new(entry: &cqueue::Entry, buffer: Option<Buffer>) -> Completion {
        let notification = cqueue::notif(entry.flags());
        Completion {
            token: entry.user_data(),
            result: entry.result(),
            more: cqueue::more(entry.flags()),
            notification,
            copied: notification && entry.result() as u32 & COPIED != 0,
            buffer,
        }
    }
}
