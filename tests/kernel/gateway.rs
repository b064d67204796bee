//! The real kernel: a gateway in a network namespace of its own, between two tun devices.
//!
//! ```text
//!   client 10.0.1.0/24, fd01::/64 --- gateway --- 10.0.2.0/24, fd02::/64 server
//!                              10.0.3.1, fd03::1 (NAT)
//! ```
//!
//! A packet that is written to a tun device has gone all its way when the call returns, and so have
//! its events.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};

use hypersync::conn::slot::groups;
use hypersync::conn::{Connection, Tuple};
use hypersync::conntrack::codec::{
    self, Decoded, MESSAGE_MAX, TYPE_DONE, TYPE_ERROR, decode, decode_entry, encode_dump,
    encode_get, request_ack,
};
use hypersync::conntrack::netlink::{Mailbox, Socket};
use hypersync::source::SourceEvent;

use crate::model::{By, Event, Nat, What};
use crate::namespace::run;

/// IPCTNL_MSG_CT_NEW and IPCTNL_MSG_CT_DELETE of NFNL_SUBSYS_CTNETLINK.
const NEW: u16 = 0x100;
const DELETE: u16 = 0x102;
const CTA_TIMEOUT: u16 = 7;

pub struct Gateway {
    inside: File,
    outside: File,
    listener: Socket,
    /// The appliance's socket.
    ours: Socket,
    /// An operator's.
    tool: Socket,
    mailbox: Mailbox,
    pieces: Mailbox,
}

impl Gateway {
    /// Sets up the namespace of the calling thread.
    pub fn new(nat: Option<Nat>, has_labels: bool) -> Gateway {
        let [inside, outside] = ["inside", "outside"].map(tun);
        let rule = match nat {
            None => "",
            Some(Nat { is_masquerade: true, .. }) => {
                "chain post { type nat hook postrouting priority srcnat
                    iifname \"inside\" oifname \"outside\" masquerade
                  }"
            }
            Some(_) => {
                "chain post { type nat hook postrouting priority srcnat
                    iifname \"inside\" oifname \"outside\" meta nfproto ipv4 snat ip to 10.0.3.1
                    iifname \"inside\" oifname \"outside\" meta nfproto ipv6 snat ip6 to fd03::1
                  }"
            }
        };
        let labels = if has_labels { "chain unhooked { ct label set 127; }" } else { "" };
        run(&format!(
            "ip link set inside up addrgenmode none; ip link set outside up addrgenmode none
             ip addr add 10.0.1.1/24 dev inside; ip addr add fd01::1/64 dev inside nodad
             ip addr add 10.0.3.1/32 dev outside; ip addr add fd03::1/128 dev outside nodad
             ip route add 10.0.2.0/24 dev outside; ip -6 route add fd02::/64 dev outside
             sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.netfilter.nf_conntrack_checksum=0 \
                net.netfilter.nf_conntrack_events=1 \
                net.netfilter.nf_conntrack_tcp_loose=0 net.netfilter.nf_conntrack_tcp_be_liberal=1
             nft -f - <<'END'
table inet t {{
  {rule}
  chain forward {{ type filter hook forward priority filter
    ct state invalid drop
  }}
  {labels}
  chain input {{ type filter hook input priority filter; policy drop; }}
}}
END"
        ));
        let socket = || {
            let socket = Socket::open().expect("conntrack");
            socket.set_netlink_option(libc::NETLINK_CAP_ACK, 1, "set up").expect("to set up");
            socket
        };
        let mailbox = Mailbox::new(Mailbox::BATCH, 4096);
        let pieces = Mailbox::new(1, 32 << 10);
        let listener = listener();
        Gateway { inside, outside, listener, ours: socket(), tool: socket(), mailbox, pieces }
    }

    /// Sends a packet in, and tells how it left.
    pub fn packet(&mut self, packet: &[u8], is_from_inside: bool) -> Option<Tuple> {
        let Gateway { inside, outside, .. } = self;
        let mut device: &File = if is_from_inside { inside } else { outside };
        device.write_all(packet).expect("a tun device takes packets");
        self.left()
    }

    /// Whatever waits at either device.
    fn left(&mut self) -> Option<Tuple> {
        let mut left = None;
        let mut buffer = [0; 2048];
        for mut device in [&self.inside, &self.outside] {
            while let Ok(length) = device.read(&mut buffer) {
                left = left.or(crate::packet::tuple(&buffer[..length]));
            }
        }
        left
    }

    fn socket(&self, by: By) -> &Socket {
        match by {
            By::Ours => &self.ours,
            By::Tool => &self.tool,
            By::Kernel => panic!("the kernel asks nobody"),
        }
    }

    /// Sends a request that `encode` writes, and returns the kernel's errno and the entry that it
    /// told.
    pub fn request(
        &mut self,
        by: By,
        encode: impl FnOnce(&mut [u8]) -> usize,
    ) -> (i32, Option<Connection>) {
        let mut request = [0; 2 * MESSAGE_MAX];
        let length = encode(&mut request);
        request_ack(&mut request);
        self.socket(by).send(&request[..length]).expect("netlink takes requests");
        let mut mailbox = std::mem::replace(&mut self.mailbox, Mailbox::new(1, 1));
        let mut found = None;
        let mut errno = None;
        while errno.is_none()
            && mailbox.receive(self.socket(by), Mailbox::BATCH).expect("netlink answers") > 0
        {
            for message in mailbox.messages() {
                match codec::answer(message) {
                    Some(answer) if answer.kind == TYPE_ERROR => errno = Some(answer.errno),
                    _ => found = decode_entry(message).ok().and_then(connection),
                }
            }
        }
        self.mailbox = mailbox;
        (errno.expect("an answer is waiting"), found)
    }

    /// Sets an entry's timeout, like `conntrack -U -t`.
    pub fn set_timeout(&mut self, by: By, original: &Tuple, timeout_s: u32) -> i32 {
        let encode = |buffer: &mut [u8]| {
            let length = encode_get(buffer, 1, original);
            let [size, kind] = [8u16, CTA_TIMEOUT].map(u16::to_ne_bytes);
            buffer[length..length + 4].copy_from_slice(&[size[0], size[1], kind[0], kind[1]]);
            buffer[length + 4..length + 8].copy_from_slice(&timeout_s.to_be_bytes());
            buffer[..4].copy_from_slice(&(length as u32 + 8).to_ne_bytes());
            buffer[4..6].copy_from_slice(&NEW.to_ne_bytes());
            length + 8
        };
        self.request(by, encode).0
    }

    /// Removes every entry, like `conntrack -F`.
    pub fn flush(&mut self, by: By) {
        let encode = |buffer: &mut [u8]| {
            let length = codec::encode_statistics(buffer, 1);
            buffer[4..6].copy_from_slice(&DELETE.to_ne_bytes());
            length
        };
        assert_eq!(self.request(by, encode).0, 0, "a flush");
    }

    /// The whole table.
    pub fn dump(&mut self) -> Vec<Connection> {
        let mut request = [0; MESSAGE_MAX];
        let length = encode_dump(&mut request, 2, None);
        self.tool.send(&request[..length]).expect("netlink takes requests");
        let mut entries = Vec::new();
        loop {
            assert_ne!(
                self.pieces.receive(&self.tool, 1).expect("netlink answers"),
                0,
                "a dump ends with an end"
            );
            for message in self.pieces.messages() {
                match codec::answer(message).expect("a message").kind {
                    TYPE_DONE => return entries,
                    _ => entries.extend(connection(decode_entry(message).expect("an entry"))),
                }
            }
        }
    }

    /// The events that wait.
    pub fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        let (ours, tool) = (self.ours.port_id(), self.tool.port_id());
        while self.mailbox.receive(&self.listener, Mailbox::BATCH).expect("events") > 0 {
            for message in self.mailbox.messages() {
                let word = |at: usize| {
                    u32::from_ne_bytes(message[at..at + 4].try_into().expect("four bytes"))
                };
                let by = match word(12) {
                    0 => By::Kernel,
                    port if port == ours => By::Ours,
                    port => {
                        assert_eq!(port, tool, "nobody else writes here");
                        By::Tool
                    }
                };
                let (kind, flags) = (word(4) as u16, word(4) >> 16);
                let what = match kind {
                    DELETE => What::Destroy,
                    _ if flags & libc::NLM_F_CREATE as u32 != 0 => What::New,
                    _ => What::Update,
                };
                // Of an end the product's decoder wants no more than the name; there is more in it.
                let mut message = message.to_vec();
                message[4..6].copy_from_slice(&NEW.to_ne_bytes());
                let Decoded { event, skipped } = decode(&message).expect("an event");
                assert_eq!(skipped, 0);
                let SourceEvent::Seen { connection, known } = event else {
                    panic!("not an end any more")
                };
                events.push(Event { what, by, connection, known: known & groups::ALL });
            }
        }
        events
    }
}

fn connection(decoded: Decoded) -> Option<Connection> {
    match decoded.event {
        SourceEvent::Seen { connection, .. } => Some(connection),
        SourceEvent::Gone { .. } => None,
    }
}

/// A socket that hears all events.
fn listener() -> Socket {
    let listener = Socket::open().expect("conntrack");
    listener.set_receive_buffer(8 << 20).expect("a buffer");
    for group in 1..=3 {
        listener
            .set_netlink_option(libc::NETLINK_ADD_MEMBERSHIP, group, "listen")
            .expect("to listen");
    }
    listener
}

/// A tun device of this name.
fn tun(name: &str) -> File {
    // SAFETY: the path is a string that ends with zero.
    let fd = unsafe {
        libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC)
    };
    assert!(fd >= 0, "/dev/net/tun: {}", std::io::Error::last_os_error());
    // SAFETY: `fd` was just made, and nobody else knows it.
    let file = unsafe { File::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: `request` is what TUNSETIFF takes, and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
    assert_eq!(result, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    file
}
