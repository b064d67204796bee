//! Which connections are this host's own, which are not copied unless a rule says so, and which
//! of its interfaces have the address of one of their ends.
//!
//! A connection is local if this host opened it (the original source is ours) or answers it
//! (the reply comes from us: addressed to us, or redirected to us). Not local is what is
//! forwarded, although our addresses occur in it too: behind SNAT the reply is *addressed*
//! to us, and before DNAT the original was.
//!
//! One thread reads the host's addresses now and then and publishes them; the shards compare
//! a version at each pass and copy the list when it has moved. Nobody waits: a shard that
//! meets a half-written list keeps the one it has and tries again. How the addresses are read is
//! the business of [`addresses`](super::addresses).
//!
//! Of the interfaces that have an address only those count that the [rules](crate::rules) name: an
//! address carries a bit for each of them, [`Interfaces`].

use std::net::IpAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

use crate::conn::{Connection, Family};
use crate::limits::RULE_INTERFACES_MAX;

/// Addresses that are published. Connections of further ones are taken for forwarded ones,
/// and [`LocalAddresses::is_overfull`] says so.
pub const ADDRESSES_MAX: usize = 256;

/// Interfaces that have an address: bit `i` is the `i`th of those that are watched.
pub type Interfaces = u32;

const _: () = assert!(RULE_INTERFACES_MAX <= Interfaces::BITS as usize);

/// Words of a published address: its low half, its high half, its interfaces.
const WORDS: usize = 3;

/// The addresses of this host, as one thread publishes them.
pub struct LocalAddresses {
    watched: OnceLock<Vec<String>>,
    version: AtomicU64, // odd while being written
    count: AtomicUsize,
    words: [AtomicU64; WORDS * ADDRESSES_MAX],
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
            watched: OnceLock::new(),
            version: AtomicU64::new(0),
            count: AtomicUsize::new(0),
            words: [const { AtomicU64::new(0) }; WORDS * ADDRESSES_MAX],
            is_overfull: AtomicBool::new(false),
        }
    }

    /// Says which interfaces' addresses are told apart, at most [`RULE_INTERFACES_MAX`]. Once,
    /// before the first list is published; without it none are.
    pub fn watch(&self, interfaces: &[String]) {
        assert!(interfaces.len() <= RULE_INTERFACES_MAX, "the rules name no more");
        assert!(self.watched.set(interfaces.to_vec()).is_ok(), "interfaces are named once");
    }

    /// The bit of an interface; none if it is not watched.
    pub fn bit_of(&self, interface: &str) -> Interfaces {
        let at =
            self.watched.get().and_then(|names| names.iter().position(|name| name == interface));
        at.map_or(0, |at| 1 << at)
    }

    /// Publishes a list: addresses, each with the interfaces that have it. One that occurs more
    /// than once, like a link-local address, has the interfaces of all. For one thread only.
    pub fn publish(&self, addresses: impl IntoIterator<Item = (IpAddr, Interfaces)>) {
        let mut list: Vec<(u128, Interfaces)> =
            addresses.into_iter().map(|(a, i)| (number(a), i)).collect();
        list.sort_unstable();
        list.dedup_by(|later, kept| {
            let is_same = later.0 == kept.0;
            kept.1 |= if is_same { later.1 } else { 0 };
            is_same
        });
        self.is_overfull.store(list.len() > ADDRESSES_MAX, Ordering::Relaxed);
        list.truncate(ADDRESSES_MAX);
        if list == self.list() {
            return;
        }
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        // Pairs with the acquire fence at the end of `LocalView::follow`.
        fence(Ordering::Release);
        self.count.store(list.len(), Ordering::Relaxed);
        for (words, (address, interfaces)) in self.words.chunks_exact(WORDS).zip(&list) {
            words[0].store(*address as u64, Ordering::Relaxed);
            words[1].store((*address >> 64) as u64, Ordering::Relaxed);
            words[2].store(*interfaces as u64, Ordering::Relaxed);
        }
        // Pairs with the first load in `LocalView::follow`.
        self.version.store(version + 2, Ordering::Release);
    }

    /// Whether there are more addresses than [`ADDRESSES_MAX`].
    pub fn is_overfull(&self) -> bool {
        self.is_overfull.load(Ordering::Relaxed)
    }

    fn list(&self) -> Vec<(u128, Interfaces)> {
        let count = self.count.load(Ordering::Relaxed).min(ADDRESSES_MAX);
        (0..count).map(|i| self.entry(i)).collect()
    }

    fn entry(&self, i: usize) -> (u128, Interfaces) {
        let word = |at: usize| self.words[WORDS * i + at].load(Ordering::Relaxed);
        ((word(1) as u128) << 64 | word(0) as u128, word(2) as Interfaces)
    }
}

/// A shard's own copy of the list.
pub struct LocalView {
    version: u64,
    count: usize,
    sorted: [u128; ADDRESSES_MAX],
    interfaces: [Interfaces; ADDRESSES_MAX],
}

impl Default for LocalView {
    fn default() -> LocalView {
        LocalView::new()
    }
}

impl LocalView {
    /// An empty copy, which follows nothing yet.
    pub const fn new() -> LocalView {
        LocalView {
            version: 0,
            count: 0,
            sorted: [0; ADDRESSES_MAX],
            interfaces: [0; ADDRESSES_MAX],
        }
    }

    /// Takes over the published list if it has changed; one load if it has not. Returns
    /// whether it did.
    pub fn follow(&mut self, published: &LocalAddresses) -> bool {
        let version = published.version.load(Ordering::Acquire);
        if version == self.version || version & 1 == 1 {
            return false;
        }
        let mut fresh = LocalView::new();
        fresh.version = version;
        fresh.count = published.count.load(Ordering::Relaxed).min(ADDRESSES_MAX);
        for i in 0..fresh.count {
            (fresh.sorted[i], fresh.interfaces[i]) = published.entry(i);
        }
        fence(Ordering::Acquire);
        if published.version.load(Ordering::Relaxed) != version {
            return false;
        }
        *self = fresh;
        true
    }

    /// Whether this host opened or answers the connection, or it is to many: neighbours' routing
    /// protocols, and the group's own heartbeats, which no address of ours shows.
    pub fn is_local(&self, connection: &Connection) -> bool {
        let (original, reply) = (&connection.original, &connection.reply);
        original.src_ip().is_loopback()
            || reply.src_ip().is_loopback()
            || original.dst_ip().is_multicast()
            || self.find(original.family, original.src).is_some()
            || self.find(reply.family, reply.src).is_some()
    }

    /// Whether one of the connection's ends, before or after translation, is an address of one of
    /// these interfaces.
    pub fn is_of(&self, interfaces: Interfaces, connection: &Connection) -> bool {
        let (original, reply) = (&connection.original, &connection.reply);
        [(original, original.src), (original, original.dst), (reply, reply.src), (reply, reply.dst)]
            .into_iter()
            .filter_map(|(tuple, address)| self.find(tuple.family, address))
            .any(|i| self.interfaces[i] & interfaces != 0)
    }

    /// Where an address is in the list.
    fn find(&self, family: Family, address: u128) -> Option<usize> {
        let number = match family {
            Family::V4 => IPV4 | address,
            Family::V6 => address,
        };
        self.sorted[..self.count].binary_search(&number).ok()
    }
}

/// What stands before an IPv4 address in the place that IPv6 keeps for them, `::ffff:0:0/96`.
const IPV4: u128 = 0xffff << 32;

/// IPv4 addresses in the place that IPv6 keeps for them, so that no two are alike.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(a.to_ipv6_mapped()),
        IpAddr::V6(a) => u128::from(a),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::State;
    use std::net::Ipv4Addr;

    const OURS: [u8; 4] = [203, 0, 113, 1];

    fn connection(original: &str, reply: &str) -> Connection {
        let parse = |t: &str| t.parse().expect("a tuple");
        Connection::new(parse(original), parse(reply), State::default())
    }

    fn view() -> LocalView {
        let published = LocalAddresses::new();
        let inside = Ipv4Addr::new(10, 0, 0, 1);
        published.watch(&["wan0".into(), "lan0".into(), "lan1".into()]);
        let (wan, lan) =
            (published.bit_of("wan0"), published.bit_of("lan0") | published.bit_of("lan1"));
        assert_eq!((wan, lan, published.bit_of("lan")), (0b001, 0b110, 0));
        published.publish([
            (IpAddr::from(OURS), wan),
            (inside.into(), published.bit_of("lan1")),
            (inside.into(), published.bit_of("lan0")),
            ("2001:db8::1".parse().expect("an address"), 0),
            ("2001:db8:1::1".parse().expect("an address"), wan),
        ]);
        let mut view = LocalView::new();
        assert!(view.follow(&published) && !view.follow(&published));
        view
    }

    #[test]
    fn forwarded_connections_are_not_local_however_they_are_translated() {
        let view = view();
        for (what, original, reply) in [
            (
                "routed",
                "tcp 10.0.0.5:1000 > 198.51.100.7:80",
                "tcp 198.51.100.7:80 > 10.0.0.5:1000",
            ),
            (
                "masquerade",
                "tcp 10.0.0.5:1000 > 198.51.100.7:80",
                "tcp 198.51.100.7:80 > 203.0.113.1:1000",
            ),
            (
                "DNAT",
                "tcp 198.51.100.7:1000 > 203.0.113.1:80",
                "tcp 10.0.0.5:8080 > 198.51.100.7:1000",
            ),
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
            (
                "redirect",
                "tcp 10.0.0.5:1000 > 198.51.100.7:80",
                "tcp 10.0.0.1:3128 > 10.0.0.5:1000",
            ),
            (
                "loopback",
                "tcp 127.0.0.1:1000 > 127.0.0.53:53",
                "tcp 127.0.0.53:53 > 127.0.0.1:1000",
            ),
            (
                "heartbeats",
                "udp 10.9.0.2:1000 > 224.0.0.116:8116",
                "udp 224.0.0.116:8116 > 10.9.0.2:1000",
            ),
            (
                "IPv6",
                "tcp [2001:db8::9]:1 > [2001:db8::1]:2",
                "tcp [2001:db8::1]:2 > [2001:db8::9]:1",
            ),
        ] {
            assert!(view.is_local(&connection(original, reply)), "{what}");
        }
    }

    #[test]
    fn an_end_on_either_side_of_a_translation_is_of_the_interface_that_has_its_address() {
        let view = view();
        let (wan, lan0, lan1) = (0b001, 0b010, 0b100);
        for (what, original, reply, interfaces) in [
            (
                "routed",
                "tcp 10.0.0.5:1000 > 198.51.100.7:80",
                "tcp 198.51.100.7:80 > 10.0.0.5:1000",
                0,
            ),
            (
                "masquerade",
                "tcp 10.0.0.5:1000 > 198.51.100.7:80",
                "tcp 198.51.100.7:80 > 203.0.113.1:1",
                wan,
            ),
            (
                "DNAT",
                "tcp 198.51.100.7:1 > 203.0.113.1:80",
                "tcp 10.0.0.5:8080 > 198.51.100.7:1",
                wan,
            ),
            (
                "hairpin",
                "tcp 10.0.0.5:1000 > 203.0.113.1:80",
                "tcp 10.0.0.6:80 > 10.0.0.1:1000",
                wan | lan0 | lan1,
            ),
            (
                "redirect",
                "tcp 10.0.0.5:1 > 198.51.100.7:80",
                "tcp 10.0.0.1:3128 > 10.0.0.5:1",
                lan0 | lan1,
            ),
            (
                "opened here",
                "tcp 203.0.113.1:1 > 198.51.100.7:80",
                "tcp 198.51.100.7:80 > 203.0.113.1:1",
                wan,
            ),
            (
                "loopback",
                "tcp 127.0.0.1:1000 > 127.0.0.53:53",
                "tcp 127.0.0.53:53 > 127.0.0.1:1000",
                0,
            ),
            (
                "IPv6",
                "udp [2001:db8::9]:1 > [2001:db8:1::1]:2",
                "udp [2001:db8:1::1]:2 > [2001:db8::9]:1",
                wan,
            ),
            (
                "IPv6 too",
                "udp [2001:db8::9]:1 > [2001:db8::1]:2",
                "udp [2001:db8::1]:2 > [2001:db8::9]:1",
                0,
            ),
        ] {
            let connection = connection(original, reply);
            for interface in [wan, lan0, lan1, 1 << 31] {
                assert_eq!(
                    view.is_of(interface, &connection),
                    interfaces & interface != 0,
                    "{what} {interface}"
                );
            }
        }
    }

    #[test]
    fn an_address_that_moves_to_another_interface_is_published_again() {
        let published = LocalAddresses::new();
        published.watch(&["a".into(), "b".into()]);
        let mut view = LocalView::new();
        let ours = connection("tcp 10.0.0.5:1 > 203.0.113.1:2", "tcp 203.0.113.1:2 > 10.0.0.5:1");
        for interfaces in [0b01, 0b10, 0b11, 0] {
            published.publish([(IpAddr::from(OURS), interfaces)]);
            assert!(view.follow(&published));
            assert_eq!(
                (view.is_of(0b01, &ours), view.is_of(0b10, &ours)),
                (interfaces & 0b01 != 0, interfaces & 0b10 != 0)
            );
            assert!(view.is_local(&ours), "whatever the interface");
        }
    }

    #[test]
    fn more_addresses_than_fit_raise_the_flag() {
        let published = LocalAddresses::new();
        published.publish(
            (0..ADDRESSES_MAX as u32 + 1).map(|n| (Ipv4Addr::from(0x0a00_0000 + n).into(), 0)),
        );
        assert!(published.is_overfull());
        let mut view = LocalView::new();
        assert!(view.follow(&published));
        let is_ours = |view: &LocalView, address| view.find(Family::V4, address).is_some();
        assert!(is_ours(&view, 0x0a00_00ff) && !is_ours(&view, 0x0a00_0100));
        published.publish([(Ipv4Addr::new(10, 9, 9, 9).into(), 0)]);
        assert!(!published.is_overfull() && view.follow(&published));
        assert!(!is_ours(&view, 0x0a00_00ff));
    }

    #[test]
    fn a_view_never_mixes_two_lists() {
        let published = LocalAddresses::new();
        let list = |n: u8| (0..50).map(move |i| (IpAddr::from([n, n, n, i]), n as Interfaces));
        std::thread::scope(|scope| {
            scope.spawn(|| (0..5000u32).for_each(|n| published.publish(list((n % 200) as u8))));
            let mut view = LocalView::new();
            for _ in 0..50_000 {
                view.follow(&published);
                let first = view.sorted[0] >> 8;
                assert!(view.sorted[..view.count].iter().all(|a| a >> 8 == first));
                assert!(
                    view.interfaces[..view.count].iter().all(|i| *i == first as Interfaces & 0xff)
                );
            }
        });
    }
}
