#![allow(unsafe_code)]
//! Which connections are this host's own, so that they are never copied.
//!
//! A connection is local if this host opened it (the original source is ours) or answers it
//! (the reply comes from us: addressed to us, or redirected to us). Not local is what is
//! forwarded, although our addresses occur in it too: behind SNAT the reply is *addressed*
//! to us, and before DNAT the original was.
//!
//! One thread reads the host's addresses now and then and publishes them; the shards compare
//! a version at each pass and copy the list when it has moved. Nobody waits: a shard that
//! meets a half-written list keeps the one it has and tries again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

use super::KernelError;
use crate::conn::{Connection, Tuple};

/// Addresses that are published. Connections of further ones are taken for forwarded ones,
/// and [`LocalAddresses::is_overfull`] says so.
pub const ADDRESSES_MAX: usize = 256;

/// The addresses of this host, as one thread publishes them.
pub struct LocalAddresses {
    version: AtomicU64, // odd while being written
    count: AtomicUsize,
    words: [AtomicU64; 2 * ADDRESSES_MAX],
    is_overfull: AtomicBool,
}

impl Default for LocalAddresses {
    fn default() -> LocalAddresses {
        LocalAddresses::new()
    }
}

impl LocalAddresses {
    /// An empty list.
    pub const fn new() -> LocalAddresses {
        LocalAddresses {
            version: AtomicU64::new(0),
            count: AtomicUsize::new(0),
            words: [const { AtomicU64::new(0) }; 2 * ADDRESSES_MAX],
            is_overfull: AtomicBool::new(false),
        }
    }

    /// Reads the addresses of the calling thread's network namespace and publishes them. For
    /// one thread only, and not for a shard: it makes system calls and allocates.
    pub fn refresh(&self) -> Result<(), KernelError> {
        self.publish(host_addresses()?);
        Ok(())
    }

    /// Publishes a list. For one thread only.
    pub fn publish(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        let mut list: Vec<u128> = addresses.into_iter().map(number).collect();
        list.sort_unstable();
        list.dedup();
        let is_overfull = list.len() > ADDRESSES_MAX;
        if is_overfull && !self.is_overfull.load(Ordering::Relaxed) {
            log::warn!(
                "this host has {} addresses, {ADDRESSES_MAX} are looked at: connections of the others \
                 are copied like forwarded ones",
                list.len()
            );
        }
        self.is_overfull.store(is_overfull, Ordering::Relaxed);
        list.truncate(ADDRESSES_MAX);
        if list == self.list() {
            return;
        }
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        // Pairs with the acquire fence at the end of `LocalView::follow`.
        fence(Ordering::Release);
        self.count.store(list.len(), Ordering::Relaxed);
        for (i, address) in list.iter().enumerate() {
            self.words[2 * i].store(*address as u64, Ordering::Relaxed);
            self.words[2 * i + 1].store((*address >> 64) as u64, Ordering::Relaxed);
        }
        // Pairs with the first load in `LocalView::follow`.
        self.version.store(version + 2, Ordering::Release);
    }

    /// Whether there are more addresses than [`ADDRESSES_MAX`].
    pub fn is_overfull(&self) -> bool {
        self.is_overfull.load(Ordering::Relaxed)
    }

    fn list(&self) -> Vec<u128> {
        let count = self.count.load(Ordering::Relaxed).min(ADDRESSES_MAX);
        (0..count).map(|i| self.address(i)).collect()
    }

    fn address(&self, i: usize) -> u128 {
        (self.words[2 * i + 1].load(Ordering::Relaxed) as u128) << 64
            | self.words[2 * i].load(Ordering::Relaxed) as u128
    }
}

/// A shard's own copy of the list.
pub struct LocalView {
    version: u64,
    count: usize,
    sorted: [u128; ADDRESSES_MAX],
}

impl Default for LocalView {
    fn default() -> LocalView {
        LocalView::new()
    }
}

impl LocalView {
    /// An empty copy, which follows nothing yet.
    pub const fn new() -> LocalView {
        LocalView { version: 0, count: 0, sorted: [0; ADDRESSES_MAX] }
    }

    /// Takes over the published list if it has changed; one load if it has not. Returns
    /// whether it did.
    pub fn follow(&mut self, published: &LocalAddresses) -> bool {
        let version = published.version.load(Ordering::Acquire);
        if version == self.version || version & 1 == 1 {
            return false;
        }
        let mut fresh = [0; ADDRESSES_MAX];
        let count = published.count.load(Ordering::Relaxed).min(ADDRESSES_MAX);
        for (i, address) in fresh[..count].iter_mut().enumerate() {
            *address = published.address(i);
        }
        fence(Ordering::Acquire);
        if published.version.load(Ordering::Relaxed) != version {
            return false;
        }
        *self = LocalView { version, count, sorted: fresh };
        true
    }

    /// Whether this host opened or answers the connection.
    pub fn is_local(&self, connection: &Connection) -> bool {
        self.is_ours(source(&connection.original)) || self.is_ours(source(&connection.reply))
    }

    fn is_ours(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.sorted[..self.count].binary_search(&number(address)).is_ok()
    }
}

fn source(tuple: &Tuple) -> IpAddr {
    tuple.src_ip()
}

/// IPv4 addresses in the place that IPv6 keeps for them, so that no two are alike.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(a.to_ipv6_mapped()),
        IpAddr::V6(a) => u128::from(a),
    }
}

fn host_addresses() -> Result<Vec<IpAddr>, KernelError> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `first` is a valid place for the result.
    if unsafe { libc::getifaddrs(&mut first) } < 0 {
        return Err(KernelError::last("read this host's addresses"));
    }
    let mut addresses = Vec::new();
    let mut next = first;
    // SAFETY: getifaddrs succeeded: `first` is a list of valid entries that ends with null and is
    // ours until freeifaddrs. It may be null when there is nothing.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        // SAFETY: `ifa_addr` is null or points to an address of the list.
        let Some(family) = (unsafe { entry.ifa_addr.as_ref() }).map(|a| a.sa_family as i32) else { continue };
        match family {
            libc::AF_INET => {
                // SAFETY: an address of this family is a sockaddr_in; unaligned reads ask nothing of the list.
                let a = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
                addresses.push(IpAddr::V4(Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr))));
            }
            libc::AF_INET6 => {
                // SAFETY: an address of this family is a sockaddr_in6.
                let a = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
                addresses.push(IpAddr::V6(Ipv6Addr::from(a.sin6_addr.s6_addr)));
            }
            _ => {}
        }
    }
    // SAFETY: `first` came from getifaddrs, and nothing refers to the list any more.
    unsafe { libc::freeifaddrs(first) };
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::State;

    const OURS: [u8; 4] = [203, 0, 113, 1];

    fn connection(original: &str, reply: &str) -> Connection {
        let parse = |t: &str| t.parse().expect("a tuple");
        Connection::new(parse(original), parse(reply), State::default())
    }

    fn view() -> LocalView {
        let published = LocalAddresses::new();
        let inside = Ipv4Addr::new(10, 0, 0, 1);
        published.publish([IpAddr::from(OURS), inside.into(), "2001:db8::1".parse().expect("an address")]);
        let mut view = LocalView::new();
        assert!(view.follow(&published) && !view.follow(&published));
        view
    }

    #[test]
    fn forwarded_connections_are_not_local_however_they_are_translated() {
        let view = view();
        for (what, original, reply) in [
            ("routed", "tcp 10.0.0.5:1000 > 198.51.100.7:80", "tcp 198.51.100.7:80 > 10.0.0.5:1000"),
            ("masquerade", "tcp 10.0.0.5:1000 > 198.51.100.7:80", "tcp 198.51.100.7:80 > 203.0.113.1:1000"),
            ("DNAT", "tcp 198.51.100.7:1000 > 203.0.113.1:80", "tcp 10.0.0.5:8080 > 198.51.100.7:1000"),
            ("hairpin", "tcp 10.0.0.5:1000 > 203.0.113.1:80", "tcp 10.0.0.6:80 > 10.0.0.1:1000"),
        ] {
            assert!(!view.is_local(&connection(original, reply)), "{what}");
        }
    }

    #[test]
    fn what_this_host_opens_or_answers_is_local() {
        let view = view();
        for (what, original, reply) in [
            (
                "opened here",
                "tcp 203.0.113.1:1000 > 198.51.100.7:80",
                "tcp 198.51.100.7:80 > 203.0.113.1:1000",
            ),
            ("ssh to us", "tcp 10.0.0.5:1000 > 10.0.0.1:22", "tcp 10.0.0.1:22 > 10.0.0.5:1000"),
            ("redirect", "tcp 10.0.0.5:1000 > 198.51.100.7:80", "tcp 10.0.0.1:3128 > 10.0.0.5:1000"),
            ("loopback", "tcp 127.0.0.1:1000 > 127.0.0.53:53", "tcp 127.0.0.53:53 > 127.0.0.1:1000"),
            ("IPv6", "tcp [2001:db8::9]:1 > [2001:db8::1]:2", "tcp [2001:db8::1]:2 > [2001:db8::9]:1"),
        ] {
            assert!(view.is_local(&connection(original, reply)), "{what}");
        }
    }

    #[test]
    fn more_addresses_than_fit_raise_the_flag() {
        let published = LocalAddresses::new();
        published.publish((0..ADDRESSES_MAX as u32 + 1).map(|n| Ipv4Addr::from(0x0a00_0000 + n).into()));
        assert!(published.is_overfull());
        let mut view = LocalView::new();
        assert!(view.follow(&published));
        assert!(view.is_ours(Ipv4Addr::new(10, 0, 0, 255).into()) && !view.is_ours([10, 0, 1, 0].into()));
        published.publish([Ipv4Addr::new(10, 9, 9, 9).into()]);
        assert!(!published.is_overfull() && view.follow(&published));
        assert!(!view.is_ours(Ipv4Addr::new(10, 0, 0, 255).into()));
    }

    #[test]
    fn a_view_never_mixes_two_lists() {
        let published = LocalAddresses::new();
        let list = |n: u8| (0..50).map(move |i| IpAddr::from([n, n, n, i]));
        std::thread::scope(|scope| {
            scope.spawn(|| (0..5000u32).for_each(|n| published.publish(list((n % 200) as u8))));
            let mut view = LocalView::new();
            for _ in 0..50_000 {
                view.follow(&published);
                let first = view.sorted[0] >> 8;
                assert!(view.sorted[..view.count].iter().all(|a| a >> 8 == first));
            }
        });
    }

    #[test]
    fn this_host_has_addresses_that_can_be_read() {
        let published = LocalAddresses::new();
        published.refresh().expect("getifaddrs works everywhere");
    }
}
