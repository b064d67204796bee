#![allow(unsafe_code)]
//! A netlink socket to netfilter: the system calls, and nothing of what the bytes mean.
//!
//! Every call here returns at once. Messages are taken in batches into memory that a
//! [`Mailbox`] allocates when it is made.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::KernelError;
use super::filter::Instruction;

// The kernel reads a slice of instructions as an array of `struct sock_filter`.
const _: () = assert!(size_of::<Instruction>() == size_of::<libc::sock_filter>());

/// A socket of NETLINK_NETFILTER with a port id of its own.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    port_id: u32,
}

impl Socket {
    /// Opens a socket in the network namespace of the calling thread.
    pub fn open() -> Result<Socket, KernelError> {
        // SAFETY: takes no pointers.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                libc::NETLINK_NETFILTER,
            )
        };
        if fd < 0 {
            let (doing, error) = ("open a netfilter netlink socket", io::Error::last_os_error());
            return Err(match error.raw_os_error() {
                // No capability is asked for here: it is a policy that forbids it.
                Some(errno @ (libc::EPERM | libc::EACCES)) => KernelError::Refused { doing, errno },
                _ => KernelError::new(doing, &error),
            });
        }
        // SAFETY: `fd` was just made, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all-zero is a valid sockaddr_nl: port id 0, which lets the kernel choose one.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as u16;
        let mut length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        let pointer = (&raw mut address).cast::<libc::sockaddr>();
        // SAFETY: `pointer` and `length` describe `address`, which outlives both calls.
        let failed = unsafe {
            libc::bind(fd.as_raw_fd(), pointer, length) < 0
                || libc::getsockname(fd.as_raw_fd(), pointer, &mut length) < 0
        };
        if failed {
            return Err(KernelError::last("bind a netlink socket"));
        }
        Ok(Socket { fd, port_id: address.nl_pid })
    }

    /// What the kernel writes into the events that this socket's requests cause.
    pub fn port_id(&self) -> u32 {
        self.port_id
    }

    /// The descriptor, for polling.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn set_option<T: Copy>(&self, level: i32, name: i32, value: &T) -> io::Result<()> {
        // SAFETY: pointer and length describe `value`, which outlives the call; the kernel only
        // reads it.
        let result = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                name,
                (value as *const T).cast(),
                size_of::<T>() as libc::socklen_t,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Sets an option of netlink itself, a switch or a group to join.
    pub fn set_netlink_option(
        &self,
        name: i32,
        value: i32,
        doing: &'static str,
    ) -> Result<(), KernelError> {
        self.set_option(libc::SOL_NETLINK, name, &value).map_err(|e| KernelError::new(doing, &e))
    }

    /// Makes room for `bytes` of waiting messages, beyond net.core.rmem_max where that is
    /// permitted.
    pub fn set_receive_buffer(&self, bytes: usize) -> Result<(), KernelError> {
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        self.set_option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &bytes)
            .or_else(|_| self.set_option(libc::SOL_SOCKET, libc::SO_RCVBUF, &bytes))
            .map_err(|e| KernelError::new("set the netlink receive buffer", &e))
    }

    /// Runs `program` on every message before it is queued.
    pub fn attach_filter(&self, program: &[Instruction]) -> Result<(), KernelError> {
        let fprog = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_ptr().cast::<libc::sock_filter>().cast_mut(),
        };
        // The kernel copies the program before `setsockopt` returns, and does not write to it.
        self.set_option(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &fprog)
            .map_err(|e| KernelError::new("attach a filter to a netlink socket", &e))
    }

    /// Messages that the kernel dropped because this socket's queue was full, since it was opened.
    pub fn drops(&self) -> u32 {
        const DROPS: usize = 8; // SK_MEMINFO_DROPS
        let mut info = [0u32; DROPS + 1];
        let mut length = size_of_val(&info) as libc::socklen_t;
        // SAFETY: pointer and length describe `info`, which outlives the call.
        unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                info.as_mut_ptr().cast(),
                &mut length,
            );
        }
        info[DROPS] // 0 if the kernel does not say
    }

    /// Sends requests to the kernel, which has acted on all of them when this returns.
    pub fn send(&self, requests: &[u8]) -> io::Result<()> {
        // SAFETY: pointer and length describe `requests`.
        let sent = unsafe {
            libc::send(
                self.fd.as_raw_fd(),
                requests.as_ptr().cast(),
                requests.len(),
                libc::MSG_DONTWAIT,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// A number for the calling thread's network namespace that no other one of this boot ever has; the
/// inode number of its file is given to another one once it is gone.
pub fn namespace_cookie() -> Result<u64, KernelError> {
    const SO_NETNS_COOKIE: libc::c_int = 71; // Linux 5.14
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(KernelError::last("open a socket"));
    }
    // SAFETY: `fd` was just made, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    let pointer = (&raw mut cookie).cast();
    // SAFETY: pointer and length describe `cookie`, which outlives the call.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, pointer, &mut length)
    };
    match result {
        0 => Ok(cookie),
        _ => Err(KernelError::last("ask for the cookie of the network namespace")),
    }
}

/// Memory for a batch of datagrams.
pub struct Mailbox {
    bytes: Vec<u8>,
    size: usize,
    lengths: [u32; Mailbox::BATCH],
    filled: usize,
}

impl Mailbox {
    /// Datagrams that one call takes at most.
    pub const BATCH: usize = 32;

    /// Room for `count` datagrams of up to `size` bytes.
    pub fn new(count: usize, size: usize) -> Mailbox {
        assert!((1..=Mailbox::BATCH).contains(&count));
        Mailbox { bytes: vec![0; count * size], size, lengths: [0; Mailbox::BATCH], filled: 0 }
    }

    /// Takes up to `most` waiting datagrams and returns how many there were; 0 if none.
    /// [`ENOBUFS`](libc::ENOBUFS), where it is not switched off, comes as an error.
    pub fn receive(&mut self, socket: &Socket, most: usize) -> io::Result<usize> {
        self.filled = 0;
        let most = most.min(self.bytes.len() / self.size);
        // SAFETY: all-zero is valid for both: null pointers with no lengths.
        let mut vectors: [libc::iovec; Mailbox::BATCH] = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut headers: [libc::mmsghdr; Mailbox::BATCH] = unsafe { std::mem::zeroed() };
        for (i, buffer) in self.bytes.chunks_exact_mut(self.size).take(most).enumerate() {
            vectors[i] =
                libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            headers[i].msg_hdr.msg_iov = &mut vectors[i];
            headers[i].msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: the first `most` headers point to one iovec each, and those to disjoint pieces of
        // `self.bytes`; all of it is borrowed by this function and outlives the call.
        let got = unsafe {
            libc::recvmmsg(
                socket.fd.as_raw_fd(),
                headers.as_mut_ptr(),
                most as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        if got < 0 {
            let e = io::Error::last_os_error();
            return match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(0),
                _ => Err(e),
            };
        }
        self.filled = got as usize;
        for (length, header) in self.lengths.iter_mut().zip(&headers[..self.filled]) {
            // A datagram that did not fit is as good as empty: its reader finds it too short.
            let is_whole = header.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
            *length = if is_whole { header.msg_len } else { 0 };
        }
        Ok(self.filled)
    }

    /// The messages of the datagrams that the last call took. A datagram that was cut, or
    /// whose rest makes no sense, yields one slice that is too short to be a message.
    pub fn messages(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes
            .chunks_exact(self.size)
            .zip(self.lengths)
            .take(self.filled)
            .flat_map(|(buffer, length)| Messages(Some(&buffer[..length as usize])))
    }
}

/// The messages in one datagram.
struct Messages<'a>(Option<&'a [u8]>);

impl<'a> Iterator for Messages<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.0.take()?;
        let Some(header) = rest.first_chunk::<4>() else { return Some(rest) };
        let length = u32::from_ne_bytes(*header) as usize;
        if length < super::codec::HEADER || length > rest.len() {
            return Some(&rest[..0]);
        }
        self.0 = rest.get(length.next_multiple_of(4)..).filter(|rest| !rest.is_empty());
        Some(&rest[..length])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_is_taken_apart_however_it_is_cut() {
        let mut datagram = vec![20, 0, 0, 0];
        datagram.resize(20, 1);
        datagram.extend([17, 0, 0, 0]);
        datagram.resize(37, 2); // without the last padding
        let lengths = |bytes| Messages(Some(bytes)).map(<[u8]>::len).collect::<Vec<_>>();
        assert_eq!(lengths(&datagram), [20, 17]);
        assert_eq!(lengths(&datagram[..36]), [20, 0]);
        assert_eq!(lengths(&datagram[..22]), [20, 2]);
        assert_eq!(lengths(&[]), [0]);
        assert_eq!(lengths(&[0; 40]), [0]);
    }
}
