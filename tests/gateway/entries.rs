//! A kernel's conntrack entries, asked for over ctnetlink and read here with no help from the
//! crate: the tests judge by them what the crate has written.

use std::collections::HashMap;
use std::io::Error;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use hypersync::conn::tuple::{TCP, UDP};

use crate::common::namespace::Namespace;
use crate::traffic::Traffic;

// Bits of an entry's status.
const SEEN_REPLY: u32 = 1 << 1;
/// The entry's connection is established: it is not dropped early.
pub const ASSURED: u32 = 1 << 2;
const CONFIRMED: u32 = 1 << 3;
const SRC_NAT: u32 = 1 << 4;
const DST_NAT: u32 = 1 << 5;
const SRC_NAT_DONE: u32 = 1 << 7;
const DST_NAT_DONE: u32 = 1 << 8;
/// What is translated; it never changes.
const TRANSLATION: u32 = SRC_NAT | DST_NAT;
/// That there is no more to decide about translation. An entry that was written into the kernel
/// without a translation lacks these bits, and needs them as little: it is confirmed.
const DECIDED: u32 = SRC_NAT_DONE | DST_NAT_DONE;
/// What grows while traffic flows.
const CLAIMS: u32 = SEEN_REPLY | ASSURED;

/// `TCP_CONNTRACK_ESTABLISHED`.
const ESTABLISHED: u8 = 3;
/// The TCP flags that the handshake settled: window scaling, and selective acknowledgements.
const HANDSHAKE_FLAGS: u8 = 0x03;

/// One direction of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Tuple {
    /// 6 or 17.
    pub protocol: u8,
    /// Source.
    pub from: SocketAddr,
    /// Destination.
    pub to: SocketAddr,
}

/// A kernel's entry of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The packets of who opened it.
    pub original: Tuple,
    /// The packets that answer, as they arrive: translation shows here.
    pub reply: Tuple,
    /// The zone of each direction.
    pub zones: [u16; 2],
    /// The status bits.
    pub status: u32,
    /// The mark.
    pub mark: u32,
    /// The labels, as many bytes as are not zero.
    pub labels: Vec<u8>,
    /// The seconds that it has left.
    pub timeout_s: u32,
    /// TCP: the state.
    pub tcp_state: u8,
    /// TCP: the window scales, original and reply.
    pub tcp_scales: [u8; 2],
    /// TCP: the flags, original and reply.
    pub tcp_flags: [u8; 2],
    /// How sequence numbers are shifted, original and reply: where the latest shift begins, and by
    /// how much before and behind it.
    pub shifts: [[u32; 3]; 2],
}

/// Every TCP and UDP entry of a kernel, by the original tuple.
pub type Entries = HashMap<Tuple, Entry>;

impl Entry {
    /// Whether traffic has been seen both ways, for TCP with the handshake done.
    pub fn is_established(&self) -> bool {
        self.status & ASSURED != 0
            && (self.original.protocol != TCP || self.tcp_state == ESTABLISHED)
    }

    /// The status bits that this entry claims and the other does not: a copy may never claim more
    /// than its active had.
    pub fn claims_beyond(&self, active: &Entry) -> u32 {
        self.status & !active.status & CLAIMS
    }

    /// What this copy has not, or has otherwise than its active. Windows, timeouts and ids are a
    /// kernel's own.
    pub fn difference(&self, active: &Entry) -> Option<String> {
        let tcp = |e: &Entry| {
            (e.tcp_state, e.tcp_scales, e.tcp_flags.map(|flags| flags & HANDSHAKE_FLAGS))
        };
        let decided = if active.status & TRANSLATION == 0 { 0 } else { DECIDED };
        let status = |e: &Entry| e.status & (CONFIRMED | CLAIMS | TRANSLATION | decided);
        let fields = [
            ("original tuple", self.original == active.original),
            ("reply tuple", self.reply == active.reply),
            ("zones", self.zones == active.zones),
            ("status", status(self) == status(active)),
            ("mark", self.mark == active.mark),
            ("labels", self.labels == active.labels),
            ("TCP state, scales or flags", tcp(self) == tcp(active)),
        ];
        let different: Vec<_> =
            fields.iter().filter(|(_, same)| !same).map(|(name, _)| *name).collect();
        (!different.is_empty())
            .then(|| format!("{} differ: {active:x?}, copy {self:x?}", different.join(", ")))
    }
}

/// The tuples under which the client's kernel knows the connections, which are their names
/// everywhere.
pub fn originals(traffic: &Traffic) -> impl Iterator<Item = Tuple> {
    let (protocol, to) = (traffic.protocol, traffic.server_address);
    traffic.client_addresses.iter().map(move |&from| Tuple { protocol, from, to })
}

/// Whether there is an established and assured entry for every connection of the traffic, and each
/// translates the client's address to `shared`.
pub fn are_replicated(entries: &Entries, traffic: &Traffic, shared: &str) -> bool {
    let shared: IpAddr = shared.parse().expect("an address");
    let mut originals = originals(traffic);
    originals
        .all(|o| entries.get(&o).is_some_and(|e| e.is_established() && e.reply.to.ip() == shared))
}

/// How many connections of the traffic have an entry.
pub fn count(entries: &Entries, traffic: &Traffic) -> usize {
    originals(traffic).filter(|original| entries.contains_key(original)).count()
}

/// Reads the TCP and UDP entries of a namespace's kernel, both families.
pub fn read(namespace: &Namespace) -> Entries {
    let socket = namespace.inside(|| {
        // SAFETY: numbers only.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::NETLINK_NETFILTER,
            )
        };
        assert!(fd >= 0, "a netlink socket: {}", Error::last_os_error());
        // SAFETY: the descriptor is new and nobody else's.
        unsafe { OwnedFd::from_raw_fd(fd) }
    });
    // nlmsghdr: 20 bytes, "get entries" of the conntrack subsystem, request for a dump; nfgenmsg:
    // all families.
    let mut request = Vec::new();
    request.extend(20u32.to_ne_bytes());
    request.extend(0x0101u16.to_ne_bytes());
    request.extend((libc::NLM_F_REQUEST as u16 | libc::NLM_F_DUMP as u16).to_ne_bytes());
    request.extend([0; 12]);
    // SAFETY: the kernel reads as many bytes as there are.
    let sent = unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    assert_eq!(sent, request.len() as isize, "asking for a dump: {}", Error::last_os_error());
    let mut entries = Entries::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        // SAFETY: the kernel writes at most as many bytes as there are.
        let length =
            unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        assert!(length > 0, "reading a dump: {}", Error::last_os_error());
        let mut rest = &buffer[..length as usize];
        while rest.len() >= 16 {
            let length = u32::from_ne_bytes(rest[..4].try_into().expect("4 bytes")) as usize;
            match i32::from(u16::from_ne_bytes([rest[4], rest[5]])) {
                libc::NLMSG_DONE => return entries,
                libc::NLMSG_ERROR => panic!("the kernel refuses a dump: {:x?}", &rest[..length]),
                _ => entries.extend(entry(&rest[20..length]).map(|entry| (entry.original, entry))),
            }
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
    }
}

/// The attributes in some bytes: number and contents.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, bytes[1]]));
        let kind = u16::from_ne_bytes([bytes[2], bytes[3]]) & 0x3fff; // less the flags for "nested"
        let contents = &bytes[4..length];
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
        Some((kind, contents))
    })
}

/// The contents of an attribute below others, named by its path.
fn find<'a>(bytes: &'a [u8], path: &[u16]) -> Option<&'a [u8]> {
    path.iter().try_fold(bytes, |within, wanted| {
        attributes(within).find(|(kind, _)| kind == wanted).map(|a| a.1)
    })
}

/// A big-endian number.
fn number(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

/// One entry; none for other protocols than TCP and UDP. The numbers are those of `enum
/// ctattr_type` and its companions in linux/netfilter/nfnetlink_conntrack.h.
fn entry(bytes: &[u8]) -> Option<Entry> {
    let tuple = |direction: u16| {
        let address = |v4: u16, v6: u16| -> Option<IpAddr> {
            let v4 =
                find(bytes, &[direction, 1, v4]).map(|a| IpAddr::from(Ipv4Addr::from(number(a))));
            let v6 = || {
                Some(
                    Ipv6Addr::from(<[u8; 16]>::try_from(find(bytes, &[direction, 1, v6])?).ok()?)
                        .into(),
                )
            };
            v4.or_else(v6)
        };
        let port = |attribute: u16| Some(number(find(bytes, &[direction, 2, attribute])?) as u16);
        Some(Tuple {
            protocol: number(find(bytes, &[direction, 2, 1])?) as u8,
            from: SocketAddr::new(address(1, 3)?, port(2)?),
            to: SocketAddr::new(address(2, 4)?, port(3)?),
        })
    };
    let (original, reply) = (tuple(1)?, tuple(2)?);
    if ![TCP, UDP].contains(&original.protocol) {
        return None;
    }
    let zone = |direction: u16| {
        find(bytes, &[18]).or_else(|| find(bytes, &[direction, 3])).map_or(0, number) as u16
    };
    let tcp = |attribute: u16| find(bytes, &[4, 1, attribute]).map_or(0, |value| value[0]);
    let mut labels = find(bytes, &[22]).unwrap_or_default().to_vec();
    labels.truncate(labels.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1));
    Some(Entry {
        original,
        reply,
        zones: [zone(1), zone(2)],
        status: number(find(bytes, &[3])?),
        mark: find(bytes, &[8]).map_or(0, number),
        labels,
        timeout_s: find(bytes, &[7]).map_or(0, number),
        tcp_state: tcp(1),
        tcp_scales: [tcp(2), tcp(3)],
        tcp_flags: [tcp(4), tcp(5)],
        shifts: [15, 16]
            .map(|direction| [1, 2, 3].map(|w| find(bytes, &[direction, w]).map_or(0, number))),
    })
}

#[test]
fn a_copy_that_differs_or_claims_too_much_is_told() {
    let at = |text: &str| text.parse().expect("an address and port");
    let active = Entry {
        original: Tuple { protocol: TCP, from: at("10.1.0.10:40000"), to: at("10.2.0.10:7000") },
        reply: Tuple { protocol: TCP, from: at("10.2.0.10:7000"), to: at("10.3.0.1:40000") },
        zones: [5, 0],
        status: SEEN_REPLY | CONFIRMED | SRC_NAT | SRC_NAT_DONE | DST_NAT_DONE,
        mark: 0x11,
        labels: vec![1],
        timeout_s: 100,
        tcp_state: ESTABLISHED,
        tcp_scales: [7, 7],
        tcp_flags: [0x03, 0x23],
        shifts: [[0; 3]; 2],
    };
    let liberal = Entry { tcp_flags: [0x0b, 0x0b], ..active.clone() };
    assert_eq!(liberal.difference(&active), None, "what a kernel adds for itself does not count");
    let rich = Entry { status: active.status | ASSURED, ..active.clone() };
    assert_eq!((rich.claims_beyond(&active), active.claims_beyond(&rich)), (ASSURED, 0));
    let reply = Tuple { to: at("10.1.0.10:40000"), ..active.reply };
    for wrong in [
        rich,
        Entry { reply, ..active.clone() },
        Entry { zones: [5, 5], ..active.clone() },
        Entry { status: active.status & !SRC_NAT, ..active.clone() },
        Entry { mark: 0, ..active.clone() },
        Entry { labels: vec![], ..active.clone() },
        Entry { tcp_scales: [7, 0], ..active.clone() },
    ] {
        assert!(wrong.difference(&active).is_some(), "{wrong:?}");
    }
}
