//! The connection table of one gateway's kernel, in simulated time.
//!
//! Pure and deterministic: time comes in with each call, and everything follows from the calls. The
//! test beside it (`main.rs`) plays scripts into a real kernel and into this, and compares entries
//! and events after every step.
//!
//! What it leaves out: sequence numbers and windows (a packet says of itself where its numbers
//! lie), expectations, sequence adjustment, SYN proxy, flow tables, zones of one direction, DNAT by
//! a rule, packets of SCTP, DCCP and GRE, timeout policies, the 300 s of repeated retransmissions
//! and of closed windows, two packets at once on two processors, and the hash: entries are walked
//! in the order of their birth, and a full table gives up its oldest entry that is not assured.
//!
//! What the kernel (6.18) taught, against what was taken for granted:
//!
//! - every event has the mark, its end included, unless it is zero; those of ctnetlink's own writes
//!   have a zero, too
//! - labels that a commit changes are told twice: by its own event, and by the next packet, as if
//!   nobody had written them
//! - with `nf_conntrack_events=2` it is one flag of the whole host that says whether somebody
//!   listens: a listener in another namespace counts (here it is the table's own)

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use hypersync::conn::extra::{Extra, HELPER_NAME, parts};
use hypersync::conn::slot::groups;
use hypersync::conn::tuple::{GRE, ICMP, ICMPV6, TCP, UDP};
use hypersync::conn::{Connection, Family, State, Tuple};
use hypersync::conntrack::codec::{TCP_ESTABLISHED, end_of, status};
use hypersync::source::SourceEvent;
use hypersync::time::Time;

#[path = "tcp.rs"]
pub mod tcp;

use tcp::{Effect, Segment, Tcp};

/// `IPS_*` bits.
pub type Status = u32;

/// `IPS_SRC_NAT_DONE` and `IPS_DST_NAT_DONE`: the NAT rules were asked.
pub const NAT_DONE: Status = 0x180;
/// `IPS_HELPER`: the helper was given by hand.
const HELPER: Status = 1 << 13;
/// Bits of a status that a commit may set; clear it can none.
const SETTABLE: Status = status::SEEN_REPLY | status::ASSURED | status::FIXED_TIMEOUT;

/// Which way a packet goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    Original,
    Reply,
}

impl Direction {
    pub fn other(self) -> Direction {
        match self {
            Direction::Original => Direction::Reply,
            Direction::Reply => Direction::Original,
        }
    }
}

/// What an operator may set, in seconds. Only later packets get it.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// By `TCP_CONNTRACK_*`; 0 is for none.
    pub tcp: [u32; 10],
    pub unacknowledged: u32,
    pub udp: u32,
    pub udp_stream: u32,
    pub icmp: u32,
    pub icmpv6: u32,
}

impl Default for Timeouts {
    /// The kernel's own.
    fn default() -> Timeouts {
        let tcp = [120, 120, 60, 432_000, 120, 60, 30, 120, 10, 120];
        Timeouts { tcp, unacknowledged: 300, udp: 30, udp_stream: 120, icmp: 30, icmpv6: 30 }
    }
}

/// NAT rules: what comes from inside leaves with this source.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Nat {
    pub v4: Option<u128>,
    pub v6: Option<u128>,
    /// Whether the entries go with the address.
    pub is_masquerade: bool,
}

/// How a gateway is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    pub timeouts: Timeouts,
    /// `nf_conntrack_max`.
    pub max: usize,
    /// None without any NAT chain.
    pub nat: Option<Nat>,
    /// `nf_conntrack_events`: whether what is born raises events; never, always, or (2) if somebody
    /// listens then.
    pub events: u8,
    /// The helpers that this kernel has, each with its protocol.
    pub helpers: Vec<(u8, [u8; HELPER_NAME])>,
    /// Whether a rule uses labels, so that entries have room for them.
    pub has_labels: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        let timeouts = Timeouts::default();
        Settings {
            timeouts,
            max: 262_144,
            nat: None,
            events: 2,
            helpers: Vec::new(),
            has_labels: false,
        }
    }
}

/// What a packet carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Payload {
    Tcp(Segment),
    /// UDP, or an echo request or reply.
    Other,
}

/// A packet as it arrives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    pub tuple: Tuple,
    pub payload: Payload,
    /// Whether it comes from where the NAT rules are for.
    pub is_from_inside: bool,
}

/// What became of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It goes on like this.
    Passed(Tuple),
    /// It belongs to nothing: every sensible ruleset drops it.
    Invalid,
    /// The table is full, or the packet is for the gateway itself.
    Dropped,
}

/// Who caused an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum By {
    /// A packet, the collector or the kernel itself: no port id.
    Kernel,
    /// The appliance's own socket: an echo, which its filter keeps out.
    Ours,
    /// Another program.
    Tool,
}

/// What an event says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum What {
    New,
    Update,
    Destroy,
}

/// A message to the listeners.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    pub what: What,
    pub by: By,
    /// The entry as it was. Of what is not `known` the kernel says nothing.
    pub connection: Connection,
    /// Groups that the message has, as [`SourceEvent`] has them.
    pub known: u8,
}

impl Event {
    /// What the appliance's source makes of it.
    pub fn seen(&self) -> SourceEvent {
        match self.what {
            What::Destroy => SourceEvent::Gone {
                original: self.connection.original,
                end: end_of(&self.connection),
            },
            _ => SourceEvent::Seen { connection: self.connection, known: self.known },
        }
    }
}

/// Parts of an event besides status and timeout, which nearly all have.
mod about {
    pub const STATE: u8 = 1;
    pub const MARK: u8 = 2;
    pub const LABELS: u8 = 4;
    /// What ctnetlink puts into the events of its own writes.
    pub const WRITTEN: u8 = STATE | MARK | LABELS;
}

#[derive(Clone, Debug)]
struct Entry {
    original: Tuple,
    reply: Tuple,
    status: Status,
    expires: Time,
    mark: u32,
    tcp: Tcp,
    /// UDP: traffic both ways after this is a stream.
    stream_after: Time,
    extra: Extra,
    /// What the next packet tells, since it was changed without one.
    unsaid: u8,
    is_masqueraded: bool,
    /// Whether it raises events.
    is_heard: bool,
}

impl Entry {
    fn new(original: Tuple, reply: Tuple, status: Status, tcp: Tcp) -> Entry {
        Entry {
            original,
            reply,
            status,
            expires: Time(0),
            mark: 0,
            tcp,
            stream_after: Time(0),
            extra: Extra::NONE,
            unsaid: 0,
            is_masqueraded: false,
            is_heard: true,
        }
    }

    fn is_tcp(&self) -> bool {
        self.original.protocol == TCP
    }

    /// `nf_ct_refresh_acct`.
    fn refresh(&mut self, now: Time, timeout_s: u32) {
        if self.status & status::FIXED_TIMEOUT == 0 {
            self.expires = now.after(seconds(timeout_s));
        }
    }

    fn connection(&self, now: Time) -> Connection {
        let mut state = State { status: self.status, mark: self.mark, ..State::default() };
        state.timeout_s = self.expires.since(now).as_secs() as u32;
        if self.is_tcp() {
            (state.tcp_state, state.tcp_scale) = (self.tcp.state, self.tcp.scale);
            [state.tcp_flags_original, state.tcp_flags_reply] = self.tcp.flags;
        }
        Connection { original: self.original, reply: self.reply, state, extra: self.extra }
    }

    /// How a packet of this direction leaves.
    fn leaving(&self, direction: Direction) -> Tuple {
        match direction {
            Direction::Original => self.reply.mirrored(),
            Direction::Reply => self.original.mirrored(),
        }
    }

    /// `nf_conntrack_handle_packet`.
    fn packet(
        &mut self,
        now: Time,
        direction: Direction,
        payload: &Payload,
        timeouts: &Timeouts,
    ) -> Effect {
        let passes = |assured, timeout_s| Effect::Passes {
            changed: false,
            assured,
            timeout_s: Some(timeout_s),
        };
        match (self.original.protocol, payload) {
            (TCP, Payload::Tcp(segment)) => {
                self.tcp.packet(direction, segment, self.status, timeouts)
            }
            // nf_conntrack_udp_packet
            (UDP, _) if self.status & status::SEEN_REPLY != 0 && now > self.stream_after => {
                passes(self.status & status::ASSURED == 0, timeouts.udp_stream)
            }
            (UDP, _) => passes(false, timeouts.udp),
            (ICMP, _) => passes(false, timeouts.icmp),
            (ICMPV6, _) => passes(false, timeouts.icmpv6),
            _ => Effect::Invalid,
        }
    }
}

/// The table.
#[derive(Clone, Debug)]
pub struct Table {
    settings: Settings,
    entries: BTreeMap<u64, Entry>,
    names: BTreeMap<Tuple, (u64, Direction)>,
    born: u64,
    /// The port that the next connection gets which cannot keep its own.
    pub next_port: u16,
    events: VecDeque<Event>,
    /// Events that may wait; none while nobody listens.
    queue: Option<usize>,
    lost: u64,
}

impl Table {
    pub fn new(settings: Settings) -> Table {
        Table {
            settings,
            entries: BTreeMap::new(),
            names: BTreeMap::new(),
            born: 0,
            next_port: 1024,
            events: VecDeque::new(),
            queue: None,
            lost: 0,
        }
    }

    /// How the gateway is set up, to be changed by an operator.
    pub fn settings(&mut self) -> &mut Settings {
        &mut self.settings
    }

    /// Somebody listens from now on, with room for so many events; or nobody does. What waited is
    /// forgotten.
    pub fn listen(&mut self, queue: Option<usize>) {
        self.queue = queue;
        self.events.clear();
        self.lost = 0;
    }

    /// The next event that waits.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Events that were lost because too many waited, since [`listen`](Self::listen).
    pub fn overruns(&self) -> u64 {
        self.lost
    }

    /// The entries in the order of their birth, as they are: nothing is collected.
    pub fn entries(&self, now: Time) -> impl Iterator<Item = Connection> {
        self.entries.values().map(move |entry| entry.connection(now))
    }

    /// Times at which something changes by itself: an entry runs out, a UDP exchange can become a
    /// stream.
    pub fn edges(&self) -> impl Iterator<Item = Time> {
        self.entries.values().flat_map(|entry| [entry.expires, entry.stream_after])
    }

    /// A packet arrives (`nf_conntrack_in`), and goes on, if it is let through.
    pub fn packet(&mut self, now: Time, packet: &Packet) -> Verdict {
        let Some((id, direction)) = self.find(now, &packet.tuple) else {
            return self.open(now, packet);
        };
        let entry = self.entries.get_mut(&id).expect("a name has an entry");
        let leaving = entry.leaving(direction);
        let mut about = 0;
        let mut is_news = false;
        match entry.packet(now, direction, &packet.payload, &self.settings.timeouts) {
            Effect::Invalid => return Verdict::Invalid,
            Effect::Ignored => {}
            Effect::Reopens => {
                self.remove(now, id, By::Kernel);
                return self.packet(now, packet);
            }
            Effect::Kills => {
                self.remove(now, id, By::Kernel);
                return Verdict::Passed(leaving);
            }
            Effect::Passes { changed, assured, timeout_s } => {
                timeout_s.into_iter().for_each(|timeout_s| entry.refresh(now, timeout_s));
                if assured {
                    entry.status |= status::ASSURED;
                }
                if changed {
                    about |= about::STATE;
                }
                is_news = assured;
            }
        }
        if direction == Direction::Reply && entry.status & status::SEEN_REPLY == 0 {
            entry.status |= status::SEEN_REPLY;
            is_news = true;
        }
        about |= std::mem::take(&mut entry.unsaid);
        if is_news || about != 0 {
            self.tell(now, id, What::Update, By::Kernel, about);
        }
        Verdict::Passed(leaving)
    }

    /// The first packet of a connection (`init_conntrack`, `nf_nat_inet_fn`,
    /// `__nf_conntrack_confirm`).
    fn open(&mut self, now: Time, packet: &Packet) -> Verdict {
        let original = packet.tuple;
        if !self.has_room(now) {
            return Verdict::Dropped;
        }
        let tcp = match packet.payload {
            Payload::Tcp(segment) if original.protocol == TCP => Tcp::born(&segment),
            // icmp_packet: only a request begins anything.
            Payload::Other
                if matches!(
                    (original.protocol, original.dport >> 8),
                    (ICMP, 8) | (ICMPV6, 128)
                ) =>
            {
                Some(Tcp::committed())
            }
            Payload::Other if original.protocol == UDP => Some(Tcp::committed()),
            _ => None,
        };
        let Some(tcp) = tcp else { return Verdict::Invalid };
        let mut entry = Entry::new(original, original.mirrored(), status::CONFIRMED, tcp);
        entry.stream_after = now.after(seconds(2));
        if let Some(nat) = self.settings.nat {
            let translated = if original.family == Family::V4 { nat.v4 } else { nat.v6 };
            if translated == Some(original.dst) {
                return Verdict::Dropped;
            }
            let address = translated.filter(|_| packet.is_from_inside);
            let Some(leaving) = self.translate(now, &original, address.unwrap_or(original.src))
            else {
                return Verdict::Dropped;
            };
            entry.reply = leaving.mirrored();
            entry.status |= NAT_DONE;
            if (leaving.src, leaving.sport) != (original.src, original.sport) {
                entry.status |= status::SRC_NAT;
            }
            entry.is_masqueraded = address.is_some() && nat.is_masquerade;
        }
        let effect =
            entry.packet(now, Direction::Original, &packet.payload, &self.settings.timeouts);
        let Effect::Passes { timeout_s: Some(timeout_s), .. } = effect else {
            return Verdict::Invalid;
        };
        entry.refresh(now, timeout_s);
        if self.find(now, &entry.reply).is_some() {
            return Verdict::Dropped; // nf_ct_resolve_clash
        }
        let leaving = entry.leaving(Direction::Original);
        self.insert(now, entry, By::Kernel, about::STATE);
        Verdict::Passed(leaving)
    }

    /// How a packet leaves that gets this source address (`get_unique_tuple`): with the port that
    /// the same source has already, its own, or another one.
    fn translate(&mut self, now: Time, original: &Tuple, address: u128) -> Option<Tuple> {
        let kept = Tuple { src: address, ..*original };
        if address == original.src && self.is_free(now, &kept) {
            return Some(kept);
        }
        let first = Tuple {
            dst: 0,
            sport: 0,
            dport: 0,
            zone: 0,
            protocol: 0,
            family: Family::V4,
            ..*original
        };
        let last = Tuple { dst: u128::MAX, sport: u16::MAX, dport: u16::MAX, ..*original };
        let of_same_source =
            self.names.range(first..=last).filter_map(|(name, (id, direction))| {
                let entry = &self.entries[id];
                let leaving = entry.leaving(Direction::Original);
                let is_same = *direction == Direction::Original
                    && *name == Tuple { dst: name.dst, dport: name.dport, ..*original }
                    && entry.status & NAT_DONE != 0
                    && leaving.src == address;
                is_same.then_some((*id, Tuple { sport: leaving.sport, ..kept }))
            });
        let of_same_source = of_same_source.max_by_key(|(id, _)| *id).map(|(_, tuple)| tuple);
        for tuple in of_same_source.into_iter().chain([kept]) {
            if self.is_free(now, &tuple) {
                return Some(tuple);
            }
        }
        for _ in 1024..=u16::MAX {
            let tuple = Tuple { sport: self.next_port, ..kept };
            self.next_port = self.next_port.checked_add(1).unwrap_or(1024);
            if self.is_free(now, &tuple) {
                return Some(tuple);
            }
        }
        None
    }

    /// Whether no entry has the answers to what leaves like this (`nf_conntrack_tuple_taken`).
    fn is_free(&mut self, now: Time, leaving: &Tuple) -> bool {
        self.find(now, &leaving.mirrored()).is_none()
    }

    /// An entry is written with `NLM_F_EXCL`, encoded as `encode_create` does
    /// (`ctnetlink_create_conntrack`).
    pub fn create(
        &mut self,
        now: Time,
        by: By,
        connection: &Connection,
        timeout_s: u32,
    ) -> Result<(), i32> {
        let Connection { original, reply, state, extra } = connection;
        if self.find(now, original).is_some() {
            return Err(libc::EEXIST);
        }
        if !self.has_room(now) {
            return Err(libc::ENOMEM);
        }
        if extra.has(parts::HELPER) && !self.has_helper(original.protocol, extra) {
            return Err(libc::EOPNOTSUPP);
        }
        // An entry that ran out and was not collected is in the way, too.
        if self.names.contains_key(original) || self.names.contains_key(reply) {
            return Err(libc::EEXIST);
        }
        let mut entry = Entry::new(*original, *reply, copied(state.status), Tcp::committed());
        if original.protocol == GRE {
            entry.status |= status::FIXED_TIMEOUT;
        }
        if connection.is_translated() {
            let (source, destination) = match original.protocol {
                ICMP | ICMPV6 => (reply.sport, original.dport),
                _ => (reply.dport, reply.sport),
            };
            entry.status |= NAT_DONE;
            if (original.src, original.sport) != (reply.dst, source) {
                entry.status |= status::SRC_NAT;
            }
            if (original.dst, original.dport) != (reply.src, destination) {
                entry.status |= status::DST_NAT;
            }
        }
        write_tcp(&mut entry.tcp, connection);
        entry.expires = now.after(seconds(timeout_s));
        entry.mark = state.mark;
        entry.extra = *extra;
        if extra.has(parts::HELPER) {
            entry.status |= HELPER;
        }
        if !self.settings.has_labels || extra.labels == [0; 16] {
            forget_labels(&mut entry.extra);
        }
        if entry.extra.has(parts::LABELS) {
            entry.unsaid = about::LABELS;
        }
        self.insert(now, entry, by, about::WRITTEN);
        Ok(())
    }

    /// An entry is brought up to date, encoded as `encode_update` does
    /// (`ctnetlink_change_conntrack`). What was changed before an error stays changed, and raises
    /// no event.
    pub fn update(
        &mut self,
        now: Time,
        by: By,
        connection: &Connection,
        timeout_s: u32,
        present: Status,
    ) -> Result<(), i32> {
        let Connection { original, state, extra, .. } = connection;
        let (id, _) = self.find(now, original).ok_or(libc::ENOENT)?;
        let has_labels = self.settings.has_labels;
        let has_helper = self.has_helper(original.protocol, extra);
        let entry = self.entries.get_mut(&id).expect("a name has an entry");
        if extra.has(parts::HELPER) && entry.extra.helper != extra.helper {
            let is_another = entry.extra.has(parts::HELPER) && has_helper;
            return Err(if is_another { libc::EBUSY } else { libc::EOPNOTSUPP });
        }
        if present & status::FIXED_TIMEOUT == 0 {
            if entry.status & status::FIXED_TIMEOUT != 0 {
                return Err(libc::EPERM);
            }
            entry.expires = now.after(seconds(timeout_s));
        }
        // nf_ct_change_status_common
        let wanted = present | copied(state.status);
        let is_cleared = entry.status & !wanted & (status::SEEN_REPLY | status::ASSURED) != 0;
        if (entry.status ^ wanted) & (status::EXPECTED | status::CONFIRMED | status::DYING) != 0
            || is_cleared
        {
            return Err(libc::EBUSY);
        }
        entry.status |= wanted & SETTABLE;
        write_tcp(&mut entry.tcp, connection);
        entry.mark = state.mark;
        if extra.has(parts::LABELS) {
            if !has_labels {
                return Err(libc::ENOSPC);
            }
            if entry.extra.labels != extra.labels {
                entry.unsaid = about::LABELS; // nf_connlabels_replace
            }
            forget_labels(&mut entry.extra);
            if extra.labels != [0; 16] {
                entry.extra.labels = extra.labels;
                entry.extra.parts |= parts::LABELS;
            }
        }
        self.tell(now, id, What::Update, by, about::WRITTEN);
        Ok(())
    }

    /// An entry's timeout is set, and nothing else.
    pub fn set_timeout(
        &mut self,
        now: Time,
        by: By,
        name: &Tuple,
        timeout_s: u32,
    ) -> Result<(), i32> {
        let (id, _) = self.find(now, name).ok_or(libc::ENOENT)?;
        let entry = self.entries.get_mut(&id).expect("a name has an entry");
        if entry.status & status::FIXED_TIMEOUT != 0 {
            return Err(libc::EPERM);
        }
        entry.expires = now.after(seconds(timeout_s));
        self.tell(now, id, What::Update, by, about::WRITTEN);
        Ok(())
    }

    /// An entry is removed, named by one of its tuples (`ctnetlink_del_conntrack`).
    pub fn delete(&mut self, now: Time, by: By, name: &Tuple) -> Result<(), i32> {
        let (id, _) = self.find(now, name).ok_or(libc::ENOENT)?;
        self.remove(now, id, by);
        Ok(())
    }

    /// The entry that has this tuple, in either direction (`ctnetlink_get_conntrack`).
    pub fn get(&mut self, now: Time, name: &Tuple) -> Option<Connection> {
        let (id, _) = self.find(now, name)?;
        self.entries.get(&id).map(|entry| entry.connection(now))
    }

    #[allow(dead_code)] // For the simulator: a kernel does not tell.
    /// Whether this entry raises events.
    pub fn is_heard(&mut self, now: Time, name: &Tuple) -> bool {
        self.find(now, name).is_some_and(|(id, _)| self.entries[&id].is_heard)
    }

    /// The whole table (`ctnetlink_dump_table`), which collects what has run out.
    pub fn dump(&mut self, now: Time) -> Vec<Connection> {
        self.collect(now);
        self.entries.values().map(|entry| entry.connection(now)).collect()
    }

    #[allow(dead_code)] // The simulator dumps in pieces, the comparison does not.
    /// A piece of the table: up to so many entries from the one with this number on, and the number
    /// of the next.
    pub fn dump_piece(
        &mut self,
        now: Time,
        from: u64,
        most: usize,
    ) -> (Vec<Connection>, Option<u64>) {
        self.remove_all(now, By::Kernel, |entry| entry.expires.reached(now));
        let mut rest = self.entries.range(from..);
        let piece = rest.by_ref().take(most).map(|(_, entry)| entry.connection(now)).collect();
        (piece, rest.next().map(|(id, _)| *id))
    }

    /// Every entry is removed (`ctnetlink_flush_conntrack`).
    pub fn flush(&mut self, now: Time, by: By) {
        self.remove_all(now, by, |_| true);
    }

    /// An address goes, or its interface: so do the connections that are masqueraded behind it
    /// (`nf_nat_masquerade_inet_event`). Restored ones stay: that a rule masqueraded them nobody
    /// told this kernel.
    pub fn drop_address(&mut self, now: Time, family: Family, address: u128) {
        self.remove_all(now, By::Kernel, |entry| {
            entry.is_masqueraded && (entry.reply.family, entry.reply.dst) == (family, address)
        });
    }

    /// What has run out is collected (`gc_worker`).
    pub fn collect(&mut self, now: Time) {
        self.remove_all(now, By::Kernel, |entry| entry.expires.reached(now));
    }

    /// The entry with this tuple. One that has run out is collected as it is met
    /// (`____nf_conntrack_find`).
    fn find(&mut self, now: Time, name: &Tuple) -> Option<(u64, Direction)> {
        let (id, direction) = *self.names.get(name)?;
        if self.entries[&id].expires.reached(now) {
            self.remove(now, id, By::Kernel);
            return None;
        }
        Some((id, direction))
    }

    /// Whether one more entry fits, after one that is not assured has gone for it (`early_drop`).
    fn has_room(&mut self, now: Time) -> bool {
        if self.entries.len() < self.settings.max {
            return true;
        }
        self.collect(now);
        let unassured = self.entries.iter().find(|(_, entry)| entry.status & status::ASSURED == 0);
        if let Some(id) =
            unassured.map(|(id, _)| *id).filter(|_| self.entries.len() >= self.settings.max)
        {
            self.remove(now, id, By::Kernel);
        }
        self.entries.len() < self.settings.max
    }

    fn has_helper(&self, protocol: u8, extra: &Extra) -> bool {
        self.settings.helpers.contains(&(protocol, extra.helper))
    }

    fn insert(&mut self, now: Time, mut entry: Entry, by: By, about: u8) {
        // nf_ct_ecache_ext_add
        entry.is_heard =
            self.settings.events == 1 || self.settings.events == 2 && self.queue.is_some();
        let id = self.born;
        self.born += 1;
        for (name, direction) in
            [(entry.original, Direction::Original), (entry.reply, Direction::Reply)]
        {
            let before = self.names.insert(name, (id, direction));
            assert!(before.is_none(), "{name} has two entries");
        }
        self.entries.insert(id, entry);
        self.tell(now, id, What::New, by, about);
    }

    fn remove_all(&mut self, now: Time, by: By, is_meant: impl Fn(&Entry) -> bool) {
        let meant: Vec<u64> =
            self.entries.iter().filter(|(_, e)| is_meant(e)).map(|(id, _)| *id).collect();
        meant.into_iter().for_each(|id| self.remove(now, id, by));
    }

    /// `nf_ct_delete`.
    fn remove(&mut self, now: Time, id: u64, by: By) {
        self.entries.get_mut(&id).expect("it is in the table").status |= status::DYING;
        self.tell(now, id, What::Destroy, by, about::STATE);
        let entry = self.entries.remove(&id).expect("it is in the table");
        self.names.remove(&entry.original);
        self.names.remove(&entry.reply);
    }

    /// `ctnetlink_conntrack_event`: what is in a message, and what is left out.
    fn tell(&mut self, now: Time, id: u64, what: What, by: By, about: u8) {
        let entry = &self.entries[&id];
        let Some(queue) = self.queue.filter(|_| entry.is_heard) else { return };
        let mut connection = entry.connection(now);
        let Connection { state, extra, .. } = &mut connection;
        let mut known = groups::TUPLES;
        if !entry.is_tcp() || about & about::STATE != 0 {
            known |= groups::STATE;
        }
        if what != What::Destroy || state.timeout_s != 0 {
            known |= groups::TIMEOUT;
        }
        if about & about::MARK != 0 || state.mark != 0 {
            known |= groups::MARK;
        }
        if about & about::LABELS == 0 {
            forget_labels(extra);
        }
        if what == What::Destroy {
            (state.tcp_scale, state.tcp_flags_original, state.tcp_flags_reply) = (0, 0, 0);
            *extra = Extra::NONE;
        }
        if !extra.is_none() {
            known |= groups::EXTRA;
        }
        match self.events.len() < queue {
            true => self.events.push_back(Event { what, by, connection, known }),
            false => self.lost += 1,
        }
    }
}

fn seconds(n: u32) -> Duration {
    Duration::from_secs(n as u64)
}

/// `copied_status` of the codec.
fn copied(active: Status) -> Status {
    status::CONFIRMED | active & (status::SEEN_REPLY | status::ASSURED)
}

/// What the codec tells the kernel of TCP.
fn write_tcp(tcp: &mut Tcp, connection: &Connection) {
    let state = &connection.state;
    let tcp_state = match state.tcp_state {
        0 if state.status & status::ASSURED != 0 => TCP_ESTABLISHED,
        state => state,
    };
    if connection.original.protocol == TCP && tcp_state != 0 {
        let flags = [state.tcp_flags_original, state.tcp_flags_reply].map(|of| of & 7 | 8);
        tcp.change(tcp_state, flags, state.tcp_scale);
    }
}

fn forget_labels(extra: &mut Extra) {
    extra.parts &= !parts::LABELS;
    extra.labels = [0; 16];
}
