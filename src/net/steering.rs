//! One port for all shards: each datagram goes to the socket of the shard that it names.
//!
//! The receive sockets form a SO_REUSEPORT group, and a classic BPF program picks the member
//! by the destination-shard byte. The kernel numbers the members in the order in which they
//! were bound, so one thread binds them all, in shard order, and none is closed before
//! the others: that would renumber the rest. The program sees only the first datagram of a
//! merged train, and whoever knows the port can write any byte: the shard is checked again by
//! whoever reads the header.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use super::error::NetError;
use super::sockets;

/// Where the destination shard stands in a datagram: the low byte of the CPHA header's filler.
const SHARD_OFFSET: u32 = 19;

/// The receive sockets of all shards on `local:port`, in shard order. A link-local address is that
/// of the interface with the index `scope`.
///
/// SO_REUSEPORT lets any process of the same user join a group in silence, so a plain bind is
/// tried first, which fails if anybody holds the port. (Two appliances that start at the same
/// moment are kept apart by the lock on the shared memory, which is taken before.)
pub fn bind_group(
    local: IpAddr,
    port: u16,
    shards: u8,
    scope: u32,
) -> Result<Vec<OwnedFd>, NetError> {
    assert!(shards > 0, "a member has at least one shard");
    let address = SocketAddr::new(local, port);
    sockets::bind(&sockets::udp(local, 0)?, address, scope)?;
    let mut group = Vec::with_capacity(usize::from(shards));
    for _ in 0..shards {
        let fd = sockets::receiver(local)?;
        sockets::set(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)
            .map_err(|errno| sockets::error("share the port between shards", local, errno))?;
        sockets::bind(&fd, address, scope)?;
        group.push(fd);
    }
    if shards > 1 {
        attach(&group[0], shards)
            .map_err(|errno| sockets::error("attach the steering program", local, errno))?;
    }
    Ok(group)
}

/// Load the byte, modulo the shards, return. Offset 0 is the UDP payload; a datagram that is too
/// short ends the program and goes to shard 0.
fn attach(fd: &OwnedFd, shards: u8) -> Result<(), i32> {
    let step = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = [
        step(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, SHARD_OFFSET),
        step(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, u32::from(shards)),
        step(libc::BPF_RET | libc::BPF_A, 0),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    sockets::set(fd, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF, program)
}
