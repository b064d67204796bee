//! Why the network could not be used, in one line that says what to do about it.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

use crate::limits::MTU_MIN;
use crate::ring::RingError;

/// A failure of the environment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NetError {
    /// Somebody else is bound to the port.
    PortInUse(SocketAddr),
    /// No interface of this host has the address.
    AddressNotLocal(IpAddr),
    /// There is no interface of that name.
    NoInterface(String),
    /// The link cannot carry full datagrams.
    MtuTooSmall {
        /// The interface's name.
        interface: String,
        /// Its MTU, bytes.
        mtu: u32,
    },
    /// A socket could not be made as it must be.
    Socket {
        /// What was tried.
        what: &'static str,
        /// With which address.
        address: IpAddr,
        /// The kernel's answer.
        errno: i32,
    },
    /// The ring could not be had or failed.
    Ring(RingError),
}

impl NetError {
    /// The errno of a send that could not be made for this reason.
    pub(super) fn errno(&self) -> i32 {
        match self {
            NetError::Socket { errno, .. } => *errno,
            NetError::AddressNotLocal(_) => libc::EADDRNOTAVAIL,
            _ => libc::ENOTCONN,
        }
    }
}

impl From<RingError> for NetError {
    fn from(error: RingError) -> NetError {
        NetError::Ring(error)
    }
}

impl fmt::Display for NetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetError::PortInUse(address) => write!(
                f,
                "UDP {address} is in use; find who holds it with `ss -lunp sport = :{}`, stop it or choose another port for the whole group",
                address.port()
            ),
            NetError::AddressNotLocal(address) => write!(
                f,
                "{address} is not an address of this host; give an address that `ip address` shows, on the link to the other members"
            ),
            NetError::NoInterface(name) => {
                write!(
                    f,
                    "there is no interface {name}; give one that `ip link` shows, on the link to the other members"
                )
            }
            NetError::MtuTooSmall { interface, mtu } => write!(
                f,
                "interface {interface} has an MTU of {mtu}, hypersync needs {MTU_MIN}; run `ip link set {interface} mtu {MTU_MIN}` on every member and switch in between"
            ),
            NetError::Socket { what, address, errno } => {
                let advice = match *errno {
                    libc::EMFILE | libc::ENFILE => {
                        "raise the limit of open files (ulimit -n, or LimitNOFILE= in the unit)"
                    }
                    libc::ENETUNREACH | libc::EHOSTUNREACH => "check the route to it with `ip route get`",
                    libc::EACCES | libc::EPERM => {
                        "a security policy or firewall forbids it: allow UDP for hypersync"
                    }
                    libc::EAFNOSUPPORT => {
                        "use addresses of one family, which the kernel must have switched on (IPv6: sysctl net.ipv6.conf.all.disable_ipv6)"
                    }
                    libc::ENOBUFS | libc::ENOMEM => {
                        "the kernel has no memory left for it: look at net.ipv4.igmp_max_memberships and net.core.optmem_max"
                    }
                    _ => "check the addresses and interfaces in the configuration",
                };
                write!(f, "could not {what} ({address}): {}; {advice}", io::Error::from_raw_os_error(*errno))
            }
            NetError::Ring(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for NetError {}
