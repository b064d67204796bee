#![allow(unsafe_code)]
//! Reading the addresses of this host, for [`local`](super::local).

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::KernelError;
use super::local::{ADDRESSES_MAX, Interfaces, LocalAddresses};

impl LocalAddresses {
    /// Reads the addresses of the calling thread's network namespace and publishes them. For
    /// one thread only, and not for a shard: it makes system calls and allocates.
    pub fn refresh(&self) -> Result<(), KernelError> {
        let was_overfull = self.is_overfull();
        self.publish(self.host_addresses()?);
        if self.is_overfull() && !was_overfull {
            log::warn!(
                "this host has more than {ADDRESSES_MAX} addresses: connections of the others are copied \
                 like forwarded ones, and no rule knows their interfaces"
            );
        }
        Ok(())
    }

    fn host_addresses(&self) -> Result<Vec<(IpAddr, Interfaces)>, KernelError> {
        let Listed { addresses, interfaces } = list()?;
        let of = |name: &str| self.bit_of(interface_of(name, &interfaces));
        Ok(addresses.into_iter().map(|a| (a.address, of(&a.name))).collect())
    }
}

/// Whether an interface of the calling thread's network namespace that is up has this address now.
pub(super) fn has_address(address: IpAddr) -> Result<bool, KernelError> {
    Ok(list()?.addresses.iter().any(|listed| listed.is_up && listed.address == address))
}

/// An address of this host.
struct HostAddress {
    address: IpAddr,
    /// Its label.
    name: String,
    /// Whether its interface is up.
    is_up: bool,
}

/// What getifaddrs lists.
struct Listed {
    addresses: Vec<HostAddress>,
    /// The names of the interfaces.
    interfaces: Vec<String>,
}

fn list() -> Result<Listed, KernelError> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `first` is a valid place for the result.
    if unsafe { libc::getifaddrs(&mut first) } < 0 {
        return Err(KernelError::last("read this host's addresses"));
    }
    let mut addresses = Vec::new();
    let mut interfaces = Vec::new();
    let mut next = first;
    // SAFETY: getifaddrs succeeded: `first` is a list of valid entries that ends with null and
    // is ours until freeifaddrs. It may be null when there is nothing.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        let is_up = entry.ifa_flags & libc::IFF_UP as libc::c_uint != 0;
        // SAFETY: `ifa_addr` is null or points to an address of the list.
        let family = unsafe { entry.ifa_addr.as_ref() }.map(|a| a.sa_family as i32);
        // SAFETY: an entry of the list has a name that ends in a zero byte, and lives as long
        // as it.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy().into_owned();
        let address = match family {
            Some(libc::AF_INET) => {
                // SAFETY: an address of this family is a sockaddr_in; unaligned reads ask
                // nothing of the list.
                let a = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
                IpAddr::V4(Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr)))
            }
            Some(libc::AF_INET6) => {
                // SAFETY: an address of this family is a sockaddr_in6.
                let a = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
                IpAddr::V6(Ipv6Addr::from(a.sin6_addr.s6_addr))
            }
            // An interface itself, under its own name; a tunnel has no address of its kind.
            Some(libc::AF_PACKET) | None => {
                interfaces.push(name);
                continue;
            }
            Some(_) => continue,
        };
        addresses.push(HostAddress { address, name, is_up });
    }
    // SAFETY: `first` came from getifaddrs, and nothing refers to the list any more.
    unsafe { libc::freeifaddrs(first) };
    Ok(Listed { addresses, interfaces })
}

/// The interface that a name of the list means. An IPv4 address with a label is listed under that,
/// and labels are the interface's name with something behind, mostly but not always `:something`.
fn interface_of<'n>(name: &'n str, interfaces: &'n [String]) -> &'n str {
    let begins = interfaces.iter().filter(|interface| name.starts_with(interface.as_str()));
    begins.max_by_key(|interface| interface.len()).map_or(name, String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::{Connection, State};
    use crate::conntrack::local::LocalView;

    #[test]
    fn this_hosts_loopback_address_is_of_its_loopback_interface() {
        let published = LocalAddresses::new();
        published.watch(&["nosuch0".into(), "lo".into()]);
        published.refresh().expect("getifaddrs works everywhere");
        let mut view = LocalView::new();
        assert!(view.follow(&published));
        let parse = |t: &str| t.parse().expect("a tuple");
        let within = Connection::new(
            parse("tcp 127.0.0.1:1 > 127.0.0.1:2"),
            parse("tcp 127.0.0.1:2 > 127.0.0.1:1"),
            State::default(),
        );
        assert!(view.is_of(0b10, &within) && !view.is_of(0b01, &within));
        let has = |address: &str| has_address(address.parse().expect("an address"));
        assert_eq!((has("127.0.0.1"), has("192.0.2.77")), (Ok(true), Ok(false)));
    }

    #[test]
    fn a_label_is_its_interfaces_address() {
        let interfaces = ["eth0.5", "eth", "eth0", "lo"].map(String::from);
        for (name, interface) in [
            ("eth0", "eth0"),
            ("eth0:vip", "eth0"),
            ("eth0vip", "eth0"),
            ("eth0.5", "eth0.5"),
            ("lo", "lo"),
        ] {
            assert_eq!(interface_of(name, &interfaces), interface);
        }
        assert_eq!(interface_of("gone0", &interfaces), "gone0");
    }
}
