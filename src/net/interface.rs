//! Which interface carries an address, and how large its packets may be.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ptr;

use super::address::is_link_local;
use super::error::NetError;
use crate::limits::MTU_MIN;

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its MTU, bytes.
    pub mtu: u32,
}

impl Interface {
    /// The interface of that name.
    pub fn named(name: &str) -> Result<Interface, NetError> {
        let unknown = || NetError::NoInterface(name.to_owned());
        // The name is looked up in a directory below.
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(unknown());
        }
        let c_name = CString::new(name).map_err(|_| unknown())?;
        // SAFETY: a string that ends in a zero byte and outlives the call.
        let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
        if index == 0 {
            return Err(unknown());
        }
        Ok(Interface { name: name.to_owned(), index, mtu: mtu_of(&c_name).ok_or_else(unknown)? })
    }

    /// An error unless full datagrams fit.
    pub fn check_mtu(&self) -> Result<(), NetError> {
        if (self.mtu as usize) < MTU_MIN {
            return Err(NetError::MtuTooSmall { interface: self.name.clone(), mtu: self.mtu });
        }
        Ok(())
    }
}

/// The interface that owns a local address. Of a link-local one, which many may have, it is the
/// `wanted` one.
pub fn interface_of(address: IpAddr, wanted: Option<&str>) -> Result<Interface, NetError> {
    let mut names = names_of(address);
    if is_link_local(address) {
        match wanted {
            Some(wanted) => names.retain(|name| name == wanted),
            None if names.len() > 1 => return Err(NetError::AddressAmbiguous(address, names)),
            None => {}
        }
    }
    match names.first() {
        Some(name) => Interface::named(name),
        // All of 127.0.0.0/8 is local without being listed.
        None if address.is_loopback() => Interface::named("lo"),
        None => Err(match wanted.map(Interface::named) {
            Some(Err(no_interface)) => no_interface,
            _ => NetError::AddressNotLocal(address),
        }),
    }
}

fn names_of(address: IpAddr) -> Vec<String> {
    let mut found = Vec::new();
    let mut list = ptr::null_mut();
    // SAFETY: the call stores a list in `list`, or nothing if it fails.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return found;
    }
    let mut next = list;
    while !next.is_null() {
        // SAFETY: an element of the list, which is freed below, after the last use.
        let element = unsafe { &*next };
        // SAFETY: ifa_addr is null or a sockaddr of the size that its family demands.
        if unsafe { address_of(element.ifa_addr) } == Some(address) {
            // SAFETY: ifa_name is a string that ends in a zero byte.
            let name = unsafe { CStr::from_ptr(element.ifa_name) }.to_string_lossy();
            // An IPv4 address may be listed under a label such as eth0:1.
            found.extend(name.split(':').next().map(str::to_owned));
        }
        next = element.ifa_next;
    }
    // SAFETY: the list came from getifaddrs and nothing of it is used any more.
    unsafe { libc::freeifaddrs(list) };
    found
}

/// # Safety
///
/// `name` is null or points to a sockaddr that is as large as its family demands.
unsafe fn address_of(name: *const libc::sockaddr) -> Option<IpAddr> {
    if name.is_null() {
        return None;
    }
    // SAFETY: by the caller's promise, for both casts: the family says which type it is.
    unsafe {
        match i32::from((*name).sa_family) {
            libc::AF_INET => {
                let bits = (*name.cast::<libc::sockaddr_in>()).sin_addr.s_addr;
                Some(Ipv4Addr::from(bits.to_ne_bytes()).into())
            }
            libc::AF_INET6 => {
                let octets = (*name.cast::<libc::sockaddr_in6>()).sin6_addr.s6_addr;
                Some(Ipv6Addr::from(octets).into())
            }
            _ => None,
        }
    }
}

fn mtu_of(name: &CStr) -> Option<u32> {
    // SAFETY: zero is valid for ifreq, which is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.to_bytes();
    if bytes.len() >= request.ifr_name.len() {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let socket = super::sockets::udp(Ipv4Addr::LOCALHOST.into(), 0).ok()?;
    // SAFETY: SIOCGIFMTU reads the name and writes the MTU into the ifreq, both within it.
    let result = unsafe {
        libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCGIFMTU, &mut request)
    };
    // SAFETY: after success the union holds the MTU, before it zeroes, and an integer takes any
    // bits.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu } as u32;
    (result == 0).then_some(mtu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_addresses_belong_to_lo_and_strangers_to_nobody() {
        for address in ["127.0.0.1", "127.201.3.9", "::1"] {
            let interface = interface_of(address.parse().unwrap(), None).unwrap();
            assert_eq!(interface.name, "lo");
            assert!(interface.check_mtu().is_ok());
        }
        let stranger: IpAddr = "192.0.2.1".parse().unwrap();
        assert_eq!(interface_of(stranger, None), Err(NetError::AddressNotLocal(stranger)));
        assert!(matches!(Interface::named("nosuch0"), Err(NetError::NoInterface(_))));
        let small = Interface { name: "wg0".into(), index: 9, mtu: 1420 };
        assert!(small.check_mtu().unwrap_err().to_string().contains("ip link set wg0 mtu 1500"));
    }
}
