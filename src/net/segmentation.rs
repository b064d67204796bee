//! Received trains, taken apart.
//!
//! GRO merges datagrams of one sender into one buffer and says in a control message how
//! long each was; all but the last have that length. A [`Train`] is such a buffer with a
//! position in it, so that a pass can stop in the middle.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use io_uring::types::RecvMsgOut;

use super::sockets::UDP_GRO;
use crate::ring::{Buffer, CONTROL_ROOM, NAME_ROOM};

/// Bytes of a control message's header (struct cmsghdr): length, level, type.
const CONTROL_HEADER: usize = size_of::<libc::cmsghdr>();

/// Why a buffer was dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Broken {
    /// Longer than the buffer; part of it is lost.
    Truncated,
    /// No sender that we understand; the kernel does not do that.
    Senseless,
}

/// Datagrams that arrived in one buffer from one sender.
pub(super) struct Train {
    buffer: Buffer,
    source: IpAddr,
    position: usize,
    end: usize,
    segment: usize,
}

/// The header that goes with the receive operation: how much room name and control data have.
pub(super) fn receive_header() -> libc::msghdr {
    libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: NAME_ROOM as libc::socklen_t,
        msg_iov: std::ptr::null_mut(),
        msg_iovlen: 0,
        msg_control: std::ptr::null_mut(),
        msg_controllen: CONTROL_ROOM,
        msg_flags: 0,
    }
}

impl Train {
    /// What the kernel wrote, checked once.
    pub(super) fn new(buffer: Buffer, header: &libc::msghdr) -> Result<Train, Broken> {
        let bytes = buffer.bytes();
        let message = RecvMsgOut::parse(bytes, header).map_err(|()| Broken::Senseless)?;
        if message.is_payload_truncated() {
            return Err(Broken::Truncated);
        }
        let source = source(message.name_data()).ok_or(Broken::Senseless)?;
        let payload = message.payload_data();
        let position = bytes.len() - payload.len();
        let segment = gro_size(message.control_data()).unwrap_or(payload.len()).max(1);
        let end = bytes.len();
        Ok(Train { buffer, source, position, end, segment })
    }

    /// Who sent it.
    pub(super) fn source(&self) -> IpAddr {
        self.source
    }

    /// The next datagram, if one is left.
    pub(super) fn next(&mut self) -> Option<&[u8]> {
        if self.position == self.end {
            return None;
        }
        let start = self.position;
        self.position = (start + self.segment).min(self.end);
        Some(&self.buffer.bytes()[start..self.position])
    }

    /// Whether none is left.
    pub(super) fn is_done(&self) -> bool {
        self.position == self.end
    }
}

/// The address in a sockaddr_in or sockaddr_in6, whose port (always at 2) says nothing to us.
fn source(name: &[u8]) -> Option<IpAddr> {
    let family = u16::from_ne_bytes(name.get(..2)?.try_into().ok()?);
    match i32::from(family) {
        libc::AF_INET => {
            let octets: [u8; 4] = name.get(4..8)?.try_into().ok()?;
            Some(Ipv4Addr::from(octets).into())
        }
        libc::AF_INET6 => {
            let octets: [u8; 16] = name.get(8..24)?.try_into().ok()?;
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

/// The segment size, if the kernel merged anything. We ask for no other control message, so only
/// the first is looked at.
fn gro_size(control: &[u8]) -> Option<usize> {
    let word = |at: usize| Some(i32::from_ne_bytes(control.get(at..at + 4)?.try_into().ok()?));
    let level = word(CONTROL_HEADER - 8)?;
    let kind = word(CONTROL_HEADER - 4)?;
    let size = word(CONTROL_HEADER)?;
    (level == libc::IPPROTO_UDP && kind == UDP_GRO && size > 0).then_some(size as usize)
}
