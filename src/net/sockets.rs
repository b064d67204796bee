//! UDP sockets with the options that hypersync needs, and the traps of each option.

#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::error::NetError;
use crate::limits::DATAGRAM_MAX;

/// Bytes of a receive socket's buffer: what arrives while the loop is busy elsewhere.
const RECEIVE_BUFFER: i32 = 8 << 20;
/// Bytes of a send socket's buffer: a whole window of one stream.
const SEND_BUFFER: i32 = 4 << 20;
/// DSCP CS6 (network control) in the place it has in the TOS byte.
const TOS_CS6: i32 = 48 << 2;
/// Not in every libc: <linux/udp.h>.
const UDP_SEGMENT: i32 = 103;
/// Not in every libc: <linux/udp.h>. Also the type of the control message.
pub(super) const UDP_GRO: i32 = 104;
const IPV6_MULTICAST_ALL: i32 = 29;
const SO_MEMINFO: i32 = 55;
/// Words of SO_MEMINFO, and which of them counts drops.
const MEMINFO_WORDS: usize = 9;
const MEMINFO_DROPS: usize = 8;

/// A multicast group and the interface on which it lives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    /// The group's address.
    pub address: IpAddr,
    /// The interface's index.
    pub interface: u32,
}

/// A UDP socket of the family of `like`, closed on exec. `flags`: 0 or SOCK_NONBLOCK.
pub(super) fn udp(like: IpAddr, flags: i32) -> Result<OwnedFd, NetError> {
    let family = if like.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | flags, 0) };
    if fd < 0 {
        return Err(failed("open a UDP socket", like));
    }
    // SAFETY: the descriptor was just made and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if like.is_ipv6() {
        // Or an IPv6 member would take the port from an IPv4 one.
        set(&fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)
            .map_err(|errno| error("set IPV6_V6ONLY", like, errno))?;
    }
    Ok(fd)
}

/// A receive socket, not bound yet: big buffer, GRO, no multicast that others joined.
pub(super) fn receiver(local: IpAddr) -> Result<OwnedFd, NetError> {
    let fd = udp(local, libc::SOCK_NONBLOCK)?;
    enlarge(&fd, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_BUFFER);
    // Multicast reaches every socket bound to the port, whatever the steering program says, even
    // those that did not join, unless this is off.
    let (level, option) = match local {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MULTICAST_ALL),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, IPV6_MULTICAST_ALL),
    };
    set(&fd, level, option, 0)
        .map_err(|errno| error("switch off IP_MULTICAST_ALL", local, errno))?;
    Ok(fd)
}

/// Asks the kernel to hand over trains whole. A kernel that cannot hands over each datagram.
pub(super) fn enable_gro(fd: &OwnedFd) {
    let _ = set(fd, libc::IPPROTO_UDP, UDP_GRO, 1);
}

/// A socket that receives what is sent to the group.
pub(super) fn group_receiver(group: Group, port: u16) -> Result<OwnedFd, NetError> {
    let fd = receiver(group.address)?;
    let what = "join the multicast group";
    // Every member on this host gets a copy: tests and demos run several.
    set(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)
        .map_err(|errno| error(what, group.address, errno))?;
    bind(&fd, SocketAddr::new(group.address, port), group.interface)?;
    join(&fd, group).map_err(|errno| error(what, group.address, errno))?;
    Ok(fd)
}

fn join(fd: &OwnedFd, group: Group) -> Result<(), i32> {
    membership(fd, group, libc::IP_ADD_MEMBERSHIP, libc::IPV6_ADD_MEMBERSHIP)
}

/// Leaves a group that was joined. That the interface is gone is no obstacle.
pub(super) fn leave(fd: &OwnedFd, group: Group) {
    // A socket that is no member any more has left.
    let _ = membership(fd, group, libc::IP_DROP_MEMBERSHIP, libc::IPV6_DROP_MEMBERSHIP);
}

fn membership(fd: &OwnedFd, group: Group, v4: i32, v6: i32) -> Result<(), i32> {
    match group.address {
        IpAddr::V4(address) => {
            let request = libc::ip_mreqn {
                imr_multiaddr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
                imr_address: libc::in_addr { s_addr: 0 },
                imr_ifindex: group.interface as i32,
            };
            set(fd, libc::IPPROTO_IP, v4, request)
        }
        IpAddr::V6(address) => {
            let request = libc::ipv6_mreq {
                ipv6mr_multiaddr: libc::in6_addr { s6_addr: address.octets() },
                ipv6mr_interface: group.interface,
            };
            set(fd, libc::IPPROTO_IPV6, v6, request)
        }
    }
}

/// A send socket of a stream: from `local` and any port to `peer`. It blocks in the eyes of
/// io_uring, which then waits for room in the socket and not in our thread. Link-local addresses
/// are those of the interface with the index `scope`.
pub(super) fn stream_sender(
    local: IpAddr,
    peer: SocketAddr,
    scope: u32,
) -> Result<OwnedFd, NetError> {
    let fd = udp(local, 0)?;
    enlarge(&fd, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SEND_BUFFER);
    bind(&fd, SocketAddr::new(local, 0), scope)?;
    connect(&fd, peer, scope)?;
    Ok(fd)
}

/// Cuts sends into datagrams of DATAGRAM_MAX bytes, or stops doing so; false if refused.
pub(super) fn set_gso(fd: &OwnedFd, on: bool) -> bool {
    let size = if on { DATAGRAM_MAX as i32 } else { 0 };
    set(fd, libc::IPPROTO_UDP, UDP_SEGMENT, size).is_ok()
}

/// A send socket for heartbeats to a peer or a group on the interface with the index `scope`. A
/// heartbeat that finds no room is dropped: a late one says the wrong thing.
pub(super) fn heartbeat_sender(
    local: IpAddr,
    to: SocketAddr,
    scope: u32,
) -> Result<OwnedFd, NetError> {
    let fd = udp(local, libc::SOCK_NONBLOCK)?;
    let (level, option) = match local {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    };
    // A mark, no more: a host that refuses it still sends.
    let _ = set(&fd, level, option, TOS_CS6);
    if to.ip().is_multicast() {
        send_on(&fd, local, scope)
            .map_err(|errno| error("choose the multicast interface", to.ip(), errno))?;
    }
    bind(&fd, SocketAddr::new(local, 0), scope)?;
    connect(&fd, to, scope)?;
    Ok(fd)
}

/// Multicast leaves on this interface, no further than its link, and also reaches members on
/// this host; a sender knows its own by its machine id.
fn send_on(fd: &OwnedFd, local: IpAddr, index: u32) -> Result<(), i32> {
    match local {
        IpAddr::V4(address) => {
            let request = libc::ip_mreqn {
                imr_multiaddr: libc::in_addr { s_addr: 0 },
                imr_address: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
                imr_ifindex: index as i32,
            };
            set(fd, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, request)?;
            set(fd, libc::IPPROTO_IP, libc::IP_MULTICAST_TTL, 1)?;
            set(fd, libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP, 1)
        }
        IpAddr::V6(_) => {
            set(fd, libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, index as i32)?;
            set(fd, libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS, 1)?;
            set(fd, libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP, 1)
        }
    }
}

/// Datagrams that the kernel dropped because the socket's buffer was full, since it was made.
pub(super) fn drops(fd: &OwnedFd) -> u32 {
    let mut words = [0u32; MEMINFO_WORDS];
    let mut len = size_of::<[u32; MEMINFO_WORDS]>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which is the array's size.
    unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            words.as_mut_ptr().cast(),
            &mut len,
        );
    }
    words[MEMINFO_DROPS]
}

/// Binds; `scope` is the interface of the address, if that is a link-local one: others do not mind.
pub(super) fn bind(fd: &OwnedFd, address: SocketAddr, scope: u32) -> Result<(), NetError> {
    match named(fd, address, scope, libc::bind) {
        Ok(()) => Ok(()),
        Err(libc::EADDRINUSE) => Err(NetError::PortInUse(address)),
        Err(libc::EADDRNOTAVAIL) => Err(NetError::AddressNotLocal(address.ip())),
        Err(errno) => Err(error("bind a socket", address.ip(), errno)),
    }
}

fn connect(fd: &OwnedFd, address: SocketAddr, scope: u32) -> Result<(), NetError> {
    named(fd, address, scope, libc::connect)
        .map_err(|errno| error("connect a socket to the peer", address.ip(), errno))
}

type Named = unsafe extern "C" fn(RawFd, *const libc::sockaddr, libc::socklen_t) -> i32;

fn named(fd: &OwnedFd, address: SocketAddr, scope: u32, call: Named) -> Result<(), i32> {
    let fd = fd.as_raw_fd();
    let result = match address {
        SocketAddr::V4(address) => {
            // SAFETY: zero is valid for sockaddr_in, which is plain data.
            let mut name: libc::sockaddr_in = unsafe { zeroed() };
            name.sin_family = libc::AF_INET as libc::sa_family_t;
            name.sin_port = address.port().to_be();
            name.sin_addr.s_addr = u32::from_ne_bytes(address.ip().octets());
            // SAFETY: the pointer and length are those of `name`, which outlives the call.
            unsafe { call(fd, (&raw const name).cast(), size_of_val(&name) as libc::socklen_t) }
        }
        SocketAddr::V6(address) => {
            // SAFETY: zero is valid for sockaddr_in6, which is plain data.
            let mut name: libc::sockaddr_in6 = unsafe { zeroed() };
            name.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            name.sin6_port = address.port().to_be();
            name.sin6_addr.s6_addr = address.ip().octets();
            name.sin6_scope_id = scope;
            // SAFETY: the pointer and length are those of `name`, which outlives the call.
            unsafe { call(fd, (&raw const name).cast(), size_of_val(&name) as libc::socklen_t) }
        }
    };
    if result == 0 { Ok(()) } else { Err(errno()) }
}

/// Sets an option whose value is a plain C type; an errno if refused.
pub(super) fn set<T: Copy>(fd: &OwnedFd, level: i32, option: i32, value: T) -> Result<(), i32> {
    // SAFETY: pointer and length are those of `value`; the kernel copies it. Where the value
    // holds a pointer itself (a filter program), its caller keeps that alive over the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(errno()) }
}

/// The privileged option goes beyond the system's limit; the other takes what it gets.
fn enlarge(fd: &OwnedFd, forced: i32, plain: i32, bytes: i32) {
    if set(fd, libc::SOL_SOCKET, forced, bytes).is_err() {
        let _ = set(fd, libc::SOL_SOCKET, plain, bytes);
    }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn failed(what: &'static str, address: IpAddr) -> NetError {
    error(what, address, errno())
}

/// A socket error with what was tried.
pub(super) fn error(what: &'static str, address: IpAddr, errno: i32) -> NetError {
    NetError::Socket { what, address, errno }
}
