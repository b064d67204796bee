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
    /// An interface has the address, and it cannot be used.
    AddressTentative(IpAddr),
    /// More than one interface has the address.
    AddressAmbiguous(IpAddr, Vec<String>),
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
    /// Whether that can come right by itself, as at boot: an interface or address that is not there
    /// yet.
    pub fn can_come_right(&self) -> bool {
        match self {
            NetError::NoInterface(_)
            | NetError::AddressNotLocal(_)
            | NetError::AddressTentative(_) => true,
            // The interface went away, or has no addresses of the family yet.
            NetError::Socket { errno, .. } => matches!(*errno, libc::ENODEV | libc::EADDRNOTAVAIL),
            _ => false,
        }
    }

    /// The errno of a send that could not be made for this reason.
    pub(super) fn errno(&self) -> i32 {
        match self {
            NetError::Socket { errno, .. } => *errno,
            NetError::AddressNotLocal(_) | NetError::AddressTentative(_) => libc::EADDRNOTAVAIL,
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
                "UDP {address} is in use; `ss -ulpn sport = :{}` names the process that holds it: stop that, or give this member another --sync address",
                address.port()
            ),
            NetError::AddressNotLocal(address) => write!(
                f,
                "{address} is not an address of this host; give an address that `ip address` shows, on the link to the other members"
            ),
            NetError::AddressTentative(address) => write!(
                f,
                "{address} cannot be used: the kernel still looks whether another host has it (tentative), or has found one (dadfailed); `ip -6 address` shows which"
            ),
            NetError::AddressAmbiguous(address, interfaces) => write!(
                f,
                "{address} is an address of {}; name the sync link with --interface, or write {address}%{}",
                interfaces.join(" and "),
                interfaces.first().map_or("INTERFACE", String::as_str)
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
                    libc::ENETUNREACH | libc::EHOSTUNREACH => {
                        "check the route to it with `ip route get`"
                    }
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
                write!(
                    f,
                    "could not {what} ({address}): {}; {advice}",
                    io::Error::from_raw_os_error(*errno)
                )
            }
            NetError::Ring(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for NetError {}
