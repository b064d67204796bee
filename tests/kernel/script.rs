//! Random scripts, played into the kernel and into the model step by step.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use hypersync::conn::extra::{HELPER_NAME, parts};
use hypersync::conn::slot::groups;
use hypersync::conn::tuple::{ICMP, ICMPV6, TCP};
use hypersync::conn::{Connection, Family, State, Tuple};
use hypersync::conntrack::codec::{
    encode_create, encode_delete, encode_get, encode_update, status,
};
use hypersync::load::rng::Rng;
use hypersync::time::Time;

use crate::gateway::Gateway;
use crate::model::tcp::{self, Place, Segment, flag};
use crate::model::{By, Event, Nat, Packet, Payload, Settings, Table, Verdict, What};
use crate::namespace::run;
use crate::packet::{Numbers, bytes};

/// A step may take so long; what was interrupted for longer is played again.
const STALL: Duration = Duration::from_millis(60);
/// So far from every edge a step begins: both sides have it clearly before or clearly behind.
const MARGIN: Duration = Duration::from_millis(90);

/// Why a script came to no end.
#[derive(Debug)]
pub enum Broken {
    /// The machine was too slow to tell.
    Stalled,
    /// Model and kernel differ.
    Differs(String),
}

/// Both sides, and what was done to them.
pub struct Play {
    kernel: Gateway,
    model: Table,
    start: Instant,
    nat: Option<Nat>,
    flows: Vec<Flow>,
    events: [Vec<Event>; 2],
    log: String,
    pub tally: Tally,
}

/// What scripts have shown.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub steps: usize,
    pub compared: usize,
    /// What happened in the kernel, how often.
    pub met: BTreeMap<String, usize>,
}

impl Tally {
    fn meet(&mut self, what: impl Into<String>) {
        *self.met.entry(what.into()).or_default() += 1;
    }

    pub fn add(&mut self, other: &Tally) {
        self.steps += other.steps;
        self.compared += other.compared;
        for (what, count) in &other.met {
            *self.met.entry(what.clone()).or_default() += count;
        }
    }
}

/// A pair of ends that speak to each other now and then.
struct Flow {
    original: Tuple,
    /// The next number of the client and of the server.
    numbers: [u32; 2],
    /// What each has last acknowledged.
    acknowledged: [Option<u32>; 2],
    /// The number of a SYN of either that nothing came of yet.
    pending: [Option<u32>; 2],
    /// Whether both opened it: what they send now has the number of their SYN.
    is_simultaneous: bool,
    /// Whether the kernel has seen all these numbers, so that a reset can be right or wrong.
    is_clear: bool,
}

fn address(text: &str) -> u128 {
    format!("udp {text} > {text}").parse::<Tuple>().expect("an address").src
}

pub fn nat(is_masquerade: bool) -> Nat {
    Nat { v4: Some(address("10.0.3.1:1")), v6: Some(address("[fd03::1]:1")), is_masquerade }
}

impl Play {
    /// A new gateway in the namespace of the calling thread.
    pub fn new(nat: Option<Nat>, has_labels: bool) -> Play {
        let kernel = Gateway::new(nat, has_labels);
        let helpers = vec![(TCP, helper("ftp"))];
        let mut model =
            Table::new(Settings { nat, helpers, has_labels, events: 1, ..Settings::default() });
        model.listen(Some(1 << 20));
        let start = Instant::now();
        let (flows, events, log, tally) =
            (Vec::new(), Default::default(), String::new(), Tally::default());
        Play { kernel, model, start, nat, flows, events, log, tally }
    }

    /// Ends that speak to each other; returns what the flow is called by.
    pub fn add_flow(&mut self, original: &str) -> usize {
        let original = original.parse().expect("a tuple");
        self.flows.push(Flow {
            original,
            numbers: [1000; 2],
            acknowledged: [None; 2],
            pending: [None; 2],
            is_clear: false,
            is_simultaneous: false,
        });
        self.flows.len() - 1
    }

    /// Ends: two clients with the same ports, which NAT has to tell apart, and two servers.
    pub fn add_flows(&mut self) {
        let mut add = |text: &str| _ = self.add_flow(text);
        for (client, server) in
            [("10.0.1.2", "10.0.2.2"), ("10.0.1.3", "10.0.2.2"), ("10.0.1.2", "10.0.2.3")]
        {
            add(&format!("tcp {client}:5000 > {server}:80"));
            add(&format!("udp {client}:5000 > {server}:53"));
        }
        add("tcp 10.0.1.2:5001 > 10.0.2.2:80");
        for (client, server) in [("fd01::2", "fd02::2"), ("fd01::3", "fd02::2")] {
            add(&format!("tcp [{client}]:5000 > [{server}]:80"));
            add(&format!("udp [{client}]:5000 > [{server}]:53"));
        }
        add("icmp 10.0.1.2:77 > 10.0.2.2:2048");
        add("icmpv6 [fd01::2]:77 > [fd02::2]:32768");
    }

    fn now(&self) -> Time {
        Time(1_000_000_000).after(self.start.elapsed())
    }

    fn say(&mut self, text: &str) {
        let at = self.start.elapsed().as_secs_f32();
        writeln!(self.log, "{at:7.3} {text}").expect("a string grows");
    }

    /// Does one step on both sides, at a time at which nothing else happens.
    fn step<T>(
        &mut self,
        text: &str,
        on_kernel: impl FnOnce(&mut Gateway) -> T,
        on_model: impl FnOnce(&mut Table, Time, &T, &[Event]) -> T,
    ) -> Result<T, Broken>
    where
        T: PartialEq + std::fmt::Debug,
    {
        self.step_within(STALL, text, on_kernel, on_model)
    }

    fn step_within<T>(
        &mut self,
        limit: Duration,
        text: &str,
        on_kernel: impl FnOnce(&mut Gateway) -> T,
        on_model: impl FnOnce(&mut Table, Time, &T, &[Event]) -> T,
    ) -> Result<T, Broken>
    where
        T: PartialEq + std::fmt::Debug,
    {
        self.keep_clear(MARGIN);
        self.tally.steps += 1;
        self.say(text);
        let now = self.now();
        let real = on_kernel(&mut self.kernel);
        let end = self.now();
        if end.since(now) > limit
            || self.model.edges().any(|edge| now < edge && edge < end.after(MARGIN / 3))
        {
            return Err(Broken::Stalled);
        }
        let events = self.kernel.events();
        events.iter().for_each(|event| self.note(now, event, &events));
        let modelled = on_model(&mut self.model, now, &real, &events);
        self.events[0].extend(events);
        while let Some(event) = self.model.next_event() {
            self.events[1].push(event);
        }
        if real != modelled {
            return Err(self.differs(&format!("kernel: {real:?}\n model: {modelled:?}")));
        }
        Ok(real)
    }

    /// Counts an event by what it shows; the model is still as it was before.
    fn note(&mut self, now: Time, event: &Event, with: &[Event]) {
        let Connection { original, reply, state, .. } = event.connection;
        let before = self.model.entries(now).find(|c| c.original == original);
        let tcp_before = before.map_or(0, |before| before.state.tcp_state);
        let is_reborn =
            with.iter().any(|e| e.what == What::New && e.connection.original == original);
        self.tally.meet(match event.what {
            What::New if state.status & status::SRC_NAT != 0 && reply.dport != original.sport => {
                "new, other port"
            }
            What::New => "new",
            What::Update if state.tcp_state == tcp::SYN_RECV && tcp_before > tcp::SYN_RECV => {
                "in sync again"
            }
            What::Update if original.protocol == TCP && event.known & groups::STATE != 0 => {
                "update, TCP state"
            }
            What::Update => "update",
            What::Destroy if is_reborn && tcp_before >= tcp::TIME_WAIT => "opened again",
            What::Destroy if is_reborn => "ran out, met by a packet",
            What::Destroy if event.by != By::Kernel => "removed",
            What::Destroy if state.timeout_s > 0 => "refused",
            What::Destroy => "ran out",
        });
        if event.what == What::Update
            && event.known & groups::STATE != 0
            && original.protocol == TCP
        {
            self.tally.meet(format!("state {} to {}", tcp_before, state.tcp_state));
        }
    }

    fn differs(&self, what: &str) -> Broken {
        let events = |events: &[Event]| {
            events.iter().map(|e| format!("  {}\n", shown(e))).collect::<String>()
        };
        Broken::Differs(format!(
            "{}\n{what}\nevents since they were compared last, kernel:\n{}model:\n{}",
            self.log,
            events(&self.events[0]),
            events(&self.events[1]),
        ))
    }

    /// Waits until nothing happens by itself from [`MARGIN`] ago until `ahead` from now.
    fn keep_clear(&self, ahead: Duration) {
        loop {
            let now = self.now();
            let (low, high) = (Time(now.0 - MARGIN.as_nanos() as u64), now.after(ahead));
            let Some(edge) = self.model.edges().filter(|edge| low < *edge && *edge < high).max()
            else {
                return;
            };
            std::thread::sleep(edge.after(MARGIN).since(now) + Duration::from_millis(1));
        }
    }

    /// Compares, which collects on both sides what has run out, at a time at which a step can
    /// follow at once.
    fn collect(&mut self) -> Result<(), Broken> {
        self.keep_clear(2 * MARGIN);
        self.compare()
    }

    /// Compares the entries of all flows, and the events of each connection.
    pub fn compare(&mut self) -> Result<(), Broken> {
        let names: Vec<Tuple> = self.flows.iter().map(|flow| flow.original).collect();
        let entries = self.step(
            "compare",
            |kernel| {
                let get = |name| kernel.request(By::Ours, |b| encode_get(b, 1, name)).1.map(Rough);
                names.iter().filter_map(get).collect::<Vec<_>>()
            },
            |model, now, _, _| {
                names.iter().filter_map(|name| model.get(now, name).map(Rough)).collect()
            },
        )?;
        self.tally.compared += entries.len();
        self.compare_events()
    }

    /// Compares all that is in both tables, which takes longer: the kernel walks its whole hash.
    pub fn compare_tables(&mut self) -> Result<(), Broken> {
        let by_name = |entries: Vec<Connection>| -> BTreeMap<Tuple, Rough> {
            entries.into_iter().map(|c| (c.original, Rough(c))).collect()
        };
        let entries = self.step_within(
            Duration::from_secs(1),
            "compare tables",
            |kernel| by_name(kernel.dump()),
            |model, now, _, _| by_name(model.dump(now)),
        )?;
        self.tally.compared += entries.len();
        self.compare_events()
    }

    fn compare_events(&mut self) -> Result<(), Broken> {
        let [of_kernel, of_model] = &self.events;
        if !is_alike(&by_connection(of_kernel), &by_connection(of_model)) {
            return Err(self.differs("events"));
        }
        self.tally.compared += of_kernel.len();
        self.events = Default::default();
        Ok(())
    }

    pub fn set_timeout_of_state(&mut self, name: &str, seconds: u32) -> Result<(), Broken> {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        let set = |_: &mut Gateway| std::fs::write(&path, seconds.to_string()).expect("a sysctl");
        self.step(&format!("{name} is {seconds} s"), set, |model, _, (), _| {
            let timeouts = &mut model.settings().timeouts;
            let state = |name| {
                [
                    "syn_sent",
                    "syn_recv",
                    "established",
                    "fin_wait",
                    "close_wait",
                    "last_ack",
                    "time_wait",
                    "close",
                ]
                .iter()
                .position(|state| *state == name)
                .expect("a state")
            };
            *match name {
                "udp_timeout" => &mut timeouts.udp,
                "udp_timeout_stream" => &mut timeouts.udp_stream,
                "icmp_timeout" => &mut timeouts.icmp,
                "icmpv6_timeout" => &mut timeouts.icmpv6,
                "tcp_timeout_unacknowledged" => &mut timeouts.unacknowledged,
                _ => {
                    &mut timeouts.tcp[1 + state(name.strip_prefix("tcp_timeout_").expect("of TCP"))]
                }
            } = seconds;
        })
    }

    /// The entry of a flow, as the model has it, whoever opened it.
    pub fn entry(&self, flow: usize) -> Option<Connection> {
        let name = self.flows[flow].original;
        self.model.entries(self.now()).find(|c| c.original == name || c.original == name.mirrored())
    }

    /// A packet of a flow; of TCP with this segment. One from the server goes to where the client
    /// seems to be.
    pub fn packet(
        &mut self,
        flow: usize,
        is_from_client: bool,
        segment: Segment,
    ) -> Result<(), Broken> {
        let original = self.flows[flow].original;
        let entry = self.entry(flow);
        if entry.is_none_or(|entry| entry.state.timeout_s == 0) && self.nat.is_some() {
            self.collect()?; // an entry that has run out, and perhaps is not collected, might lend its port
        }
        let tuple = match is_from_client {
            true => original,
            false => match entry {
                Some(entry) if entry.original == original => entry.reply,
                _ => original.mirrored(),
            },
        };
        let (payload, numbers) = match tuple.protocol {
            TCP => (Payload::Tcp(segment), self.flows[flow].number(is_from_client, &segment)),
            _ => (Payload::Other, Numbers::default()),
        };
        let packet = Packet { tuple, payload, is_from_inside: is_from_client };
        let bytes = bytes(&tuple, &numbers);
        let left = self.step(
            &format!("{tuple} {}", shown_payload(&payload)),
            |kernel| kernel.packet(&bytes, is_from_client),
            |model, now, _, events| {
                // Which port the kernel takes, if it has to take another one, is random.
                if let Some(born) = events.iter().find(|e| e.what == What::New) {
                    let Connection { original, reply, .. } = born.connection;
                    model.next_port = if matches!(original.protocol, ICMP | ICMPV6) {
                        reply.sport
                    } else {
                        reply.dport
                    };
                }
                match model.packet(now, &packet) {
                    Verdict::Passed(tuple) => Some(tuple),
                    Verdict::Invalid | Verdict::Dropped => None,
                }
            },
        )?;
        if left.is_some() && tuple.protocol == TCP {
            let after = self.entry(flow).map_or(tcp::NONE, |entry| entry.state.tcp_state);
            let states = (entry.map_or(tcp::NONE, |entry| entry.state.tcp_state), after);
            let is_original = entry.is_none_or(|entry| entry.original == tuple);
            self.flows[flow].passed(is_from_client, is_original, &segment, &numbers, states);
        }
        Ok(())
    }

    /// A request by netlink, whose error both sides have.
    fn request(
        &mut self,
        text: &str,
        on_kernel: impl FnOnce(&mut Gateway) -> i32,
        on_model: impl FnOnce(&mut Table, Time) -> Result<(), i32>,
    ) -> Result<(), Broken> {
        let errno =
            self.step(text, on_kernel, |model, now, _, _| on_model(model, now).err().unwrap_or(0))?;
        let what = text.split(' ').next().unwrap_or_default();
        self.tally.meet(match errno {
            0 => what.to_owned(),
            errno => format!("{what}: {}", std::io::Error::from_raw_os_error(errno)),
        });
        Ok(())
    }

    pub fn flush(&mut self) -> Result<(), Broken> {
        self.collect()?; // who removes what has run out is open
        self.step(
            "flush",
            |kernel| kernel.flush(By::Tool),
            |model, now, (), _| model.flush(now, By::Tool),
        )
    }

    pub fn delete(&mut self, by: By, name: &Tuple) -> Result<(), Broken> {
        self.request(
            &format!("delete {name} {by:?}"),
            |kernel| kernel.request(by, |b| encode_delete(b, 1, name)).0,
            |model, now| model.delete(now, by, name),
        )
    }

    pub fn get(&mut self, name: &Tuple) -> Result<(), Broken> {
        self.step(
            &format!("get {name}"),
            |kernel| kernel.request(By::Ours, |b| encode_get(b, 1, name)).1.map(Rough),
            |model, now, _, _| model.get(now, name).map(Rough),
        )?;
        Ok(())
    }

    pub fn set_timeout(&mut self, by: By, name: &Tuple, timeout_s: u32) -> Result<(), Broken> {
        self.request(
            &format!("timeout of {name} is {timeout_s} s {by:?}"),
            |kernel| kernel.set_timeout(by, name, timeout_s),
            |model, now| model.set_timeout(now, by, name, timeout_s),
        )
    }

    pub fn create(
        &mut self,
        by: By,
        connection: &Connection,
        timeout_s: u32,
    ) -> Result<(), Broken> {
        self.collect()?; // an entry that has run out is in the way until it is collected
        self.request(
            &format!("create {:?} {timeout_s} s", Rough(*connection)).replace('\n', ""),
            |kernel| kernel.request(by, |b| encode_create(b, 1, connection, timeout_s)).0,
            |model, now| model.create(now, by, connection, timeout_s),
        )?;
        self.written(connection);
        Ok(())
    }

    fn written(&mut self, connection: &Connection) {
        let written = self.flows.iter_mut().filter(|flow| flow.original == connection.original);
        written.for_each(|flow| flow.is_clear = false);
    }

    pub fn update(
        &mut self,
        by: By,
        connection: &Connection,
        timeout_s: u32,
        present: u32,
    ) -> Result<(), Broken> {
        self.request(
            &format!("update {:?} {timeout_s} s over {present:#x}", Rough(*connection))
                .replace('\n', ""),
            |kernel| kernel.request(by, |b| encode_update(b, 1, connection, timeout_s, present)).0,
            |model, now| model.update(now, by, connection, timeout_s, present),
        )?;
        self.written(connection);
        Ok(())
    }

    /// Whether what is born from now on raises events.
    pub fn set_events(&mut self, events: u8) -> Result<(), Broken> {
        let set = |_: &mut Gateway| {
            std::fs::write("/proc/sys/net/netfilter/nf_conntrack_events", events.to_string())
                .expect("a sysctl")
        };
        self.step(&format!("events is {events}"), set, |model, _, (), _| {
            model.settings().events = events
        })
    }

    /// The gateway loses its address for NAT.
    pub fn drop_address(&mut self) -> Result<(), Broken> {
        self.compare()?;
        self.say("the address goes");
        let now = self.now();
        run("ip addr del 10.0.3.1/32 dev outside");
        self.model.drop_address(now, Family::V4, self.nat.and_then(|nat| nat.v4).expect("NAT"));
        self.events[1].extend(std::iter::from_fn(|| self.model.next_event()));
        let due = self.events[1].len();
        // The kernel does that a little later.
        let end = Instant::now() + Duration::from_secs(20);
        while self.events[0].len() < due && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
            let events = self.kernel.events();
            self.events[0].extend(events);
        }
        self.compare()
    }

    pub fn wait(&mut self, ms: u64) {
        self.say(&format!("wait {ms} ms"));
        std::thread::sleep(Duration::from_millis(ms));
    }

    /// One random step.
    pub fn random(&mut self, rng: &mut Rng) -> Result<(), Broken> {
        let flow = rng.below(self.flows.len() as u32) as usize;
        let original = self.flows[flow].original;
        let entry = self.entry(flow);
        let by = if rng.below(2) == 0 { By::Ours } else { By::Tool };
        let name = match (rng.below(3), entry) {
            (0, Some(entry)) => entry.reply,
            _ => original,
        };
        match rng.below(100) {
            0..70 => {
                // A few packets of one flow, most of them as sensible ends would send them.
                for _ in 0..1 + rng.below(4) {
                    let (is_from_client, segment) = self.likely(flow, rng);
                    self.packet(flow, is_from_client, segment)?;
                }
            }
            70..75 => {
                self.create(by, &self.wanted(flow, rng), pick(rng, &[1, 2, 3, 600, 2_073_600]))?
            }
            75..82 => {
                let present = match rng.below(4) {
                    0 => pick(rng, &[0, status::CONFIRMED, 0x208, 0x18a, 0x9]),
                    _ => entry.map_or(status::CONFIRMED, |entry| entry.state.status),
                };
                self.update(by, &self.wanted(flow, rng), pick(rng, &[1, 2, 3, 600]), present)?;
            }
            82..85 => self.delete(by, &name)?,
            85..88 => self.get(&name)?,
            88..90 => self.set_timeout(by, &name, pick(rng, &[0, 1, 2, 3, 600]))?,
            90..91 => self.flush()?,
            91..94 => {
                let setting = pick(rng, &SETTINGS);
                self.set_timeout_of_state(setting, pick(rng, &[1, 2, 3, 100]))?;
            }
            _ => self.wait(u64::from(200 + rng.below(900))),
        }
        match rng.below(12) {
            0 => self.compare_tables(),
            1..8 => self.compare(),
            _ => Ok(()),
        }
    }

    /// What somebody would commit.
    fn wanted(&self, flow: usize, rng: &mut Rng) -> Connection {
        let original = self.flows[flow].original;
        let mut reply = original.mirrored();
        let translated = |nat: Nat| if original.src >> 32 == 0 { nat.v4 } else { nat.v6 };
        if let Some(address) = self.nat.and_then(translated).filter(|_| rng.below(4) != 0) {
            let port = if rng.below(3) == 0 { 6000 } else { original.sport };
            reply = Tuple { src: address, sport: port, ..original }.mirrored();
        }
        let is_tcp = original.protocol == TCP;
        let state = State {
            status: pick(rng, &[status::CONFIRMED, 0x18a, 0x18e, 0x1de]),
            tcp_state: if is_tcp { rng.below(9) as u8 } else { 0 },
            tcp_flags_original: pick(rng, &[0, 4, 0x23]),
            tcp_flags_reply: pick(rng, &[0, 4, 0x23]),
            tcp_scale: 0x7a,
            mark: rng.below(2) * 7,
            timeout_s: 0,
        };
        let mut connection = Connection::new(original, reply, state);
        if rng.below(8) == 0 {
            connection.extra.helper = helper(pick(rng, &["ftp", "ftp", "nobodys"]));
            connection.extra.parts |= parts::HELPER;
        }
        if rng.below(3) == 0 {
            connection.extra.labels[rng.below(16) as usize] = rng.below(2) as u8;
            connection.extra.parts |= parts::LABELS;
        }
        connection
    }

    /// What comes next on this flow: mostly what its state suggests.
    fn likely(&self, flow: usize, rng: &mut Rng) -> (bool, Segment) {
        use flag::*;
        if self.flows[flow].original.protocol != TCP {
            return (rng.below(2) == 0, Segment::default());
        }
        let state = self.entry(flow).map_or(tcp::NONE, |entry| entry.state.tcp_state);
        let any = [SYN, SYN | ACK, ACK, ACK, FIN | ACK, RST, RST | ACK, FIN, SYN | FIN, 0];
        let (is_from_client, flags) = match (rng.below(10), state) {
            (0 | 1, _) => (rng.below(2) == 0, pick(rng, &any)),
            // Somebody opens the connection again.
            (2, _) | (_, tcp::NONE) => (true, SYN),
            (3, tcp::FIN_WAIT..) => (true, SYN),
            (_, tcp::SYN_SENT) => (false, SYN | ACK),
            (3, _) => (false, pick(rng, &[SYN | ACK, RST, ACK])),
            (_, tcp::SYN_RECV) => (true, ACK),
            (4..8, tcp::ESTABLISHED) => (rng.below(2) == 0, ACK),
            (_, tcp::ESTABLISHED) => (rng.below(2) == 0, FIN | ACK),
            (_, tcp::TIME_WAIT | tcp::CLOSE) => (true, pick(rng, &[SYN, ACK])),
            _ => (rng.below(2) == 0, pick(rng, &[ACK, FIN | ACK, ACK])),
        };
        // What somebody wrote has no numbers.
        let flags = if self.flows[flow].is_clear { flags } else { flags & !RST };
        let place = match flags {
            f if f & RST != 0 => {
                pick(rng, &[Place::Right, Place::Right, Place::Ahead, Place::Behind])
            }
            f if f == SYN | ACK => {
                pick(rng, &[Place::Right, Place::Right, Place::Right, Place::Ahead])
            }
            _ => Place::Right,
        };
        (is_from_client, Segment { flags, data: flags == ACK && rng.below(2) == 0, place })
    }
}

pub const SETTINGS: [&str; 12] = [
    "tcp_timeout_syn_sent",
    "tcp_timeout_syn_recv",
    "tcp_timeout_established",
    "tcp_timeout_fin_wait",
    "tcp_timeout_close_wait",
    "tcp_timeout_last_ack",
    "tcp_timeout_time_wait",
    "tcp_timeout_close",
    "udp_timeout",
    "udp_timeout_stream",
    "icmp_timeout",
    "icmpv6_timeout",
];

impl Flow {
    /// Numbers for a segment.
    fn number(&self, is_from_client: bool, segment: &Segment) -> Numbers {
        let (own, other) = (!is_from_client as usize, is_from_client as usize);
        let (mut sequence, mut acknowledged) = (self.numbers[own], self.numbers[other]);
        if segment.flags & flag::SYN != 0 {
            sequence = if self.is_simultaneous { sequence - 1 } else { sequence + 100_000 }; // begins anew
            acknowledged = self.pending[other].unwrap_or(acknowledged);
        }
        if segment.flags & flag::RST != 0 {
            sequence = self.acknowledged[other].unwrap_or(sequence);
        }
        let shift: u32 = match segment.place {
            Place::Right => 0,
            Place::Ahead => 1_000_000,
            Place::Behind => 500u32.wrapping_neg(),
        };
        match segment.flags & flag::SYN != 0 {
            true => acknowledged = acknowledged.wrapping_add(shift),
            false => sequence = sequence.wrapping_add(shift),
        }
        let has_ack = segment.flags & flag::ACK != 0;
        let length = if segment.data { 10 } else { 0 };
        Numbers {
            flags: segment.flags,
            sequence,
            acknowledged: if has_ack { acknowledged } else { 0 },
            length,
        }
    }

    /// What both ends have learned once it has passed, and the entry went from one state to
    /// another.
    fn passed(
        &mut self,
        is_from_client: bool,
        is_original: bool,
        segment: &Segment,
        numbers: &Numbers,
        states: (u8, u8),
    ) {
        let (before, state) = states;
        let is_challenge =
            (before, state, segment.flags) == (tcp::LAST_ACK, tcp::LAST_ACK, flag::ACK);
        let (own, other) = (!is_from_client as usize, is_from_client as usize);
        // An answer that is sent again is ignored, unless a SYN was let through in between.
        let is_resync = self.pending[other].is_some() && segment.place == Place::Right;
        let is_answer = state == tcp::SYN_RECV && (before != state || is_resync || is_original);
        let is_syn = segment.flags & flag::SYN != 0;
        let has_ack = segment.flags & flag::ACK != 0;
        let next = numbers.sequence
            + numbers.length as u32
            + (segment.flags & (flag::SYN | flag::FIN) != 0) as u32;
        match (is_syn, has_ack) {
            (true, false) if matches!(state, tcp::SYN_SENT | tcp::SYN_SENT2) => {
                (self.numbers[own], self.pending) = (next, [None; 2]);
                if before != state && state == tcp::SYN_SENT {
                    self.acknowledged = [None; 2]; // another entry
                    self.is_clear = is_from_client;
                }
                self.is_clear &= state == tcp::SYN_SENT;
                self.is_simultaneous = state == tcp::SYN_SENT2;
            }
            (true, false) => {
                self.pending = [None; 2];
                self.pending[own] = Some(next);
            }
            (true, true) if is_answer && segment.place == Place::Right => {
                self.numbers[own] = next;
                self.numbers[other] = numbers.acknowledged;
                if is_resync {
                    self.acknowledged = [None; 2];
                }
                self.acknowledged[own] = Some(numbers.acknowledged);
                self.is_simultaneous = false;
                self.is_clear &= !is_original;
            }
            (true, true) if is_answer => {
                self.numbers[own] = next;
                self.is_clear = false;
            }
            (true, true) => {}
            _ if segment.place == Place::Right => {
                self.numbers[own] = next;
                if has_ack && segment.flags & flag::RST == 0 {
                    self.acknowledged[own] = Some(numbers.acknowledged);
                }
            }
            _ => {}
        }
        if (has_ack || !is_syn) && !is_challenge {
            self.pending = [None; 2]; // the kernel knows the last packet only
        }
    }
}

/// An entry, of which timeouts are alike that differ by a second.
struct Rough(Connection);

impl PartialEq for Rough {
    fn eq(&self, other: &Rough) -> bool {
        let (a, b) = (&self.0, &other.0);
        let exact = |c: &Connection| {
            let State { status, tcp_state, tcp_flags_original, tcp_flags_reply, mark, .. } =
                c.state;
            let flags = [tcp_flags_original & 15, tcp_flags_reply & 15];
            (c.original, c.reply, status, tcp_state, flags, mark, c.extra)
        };
        exact(a) == exact(b) && a.state.timeout_s.abs_diff(b.state.timeout_s) <= 1
    }
}

impl std::fmt::Debug for Rough {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Connection { original, reply, state, .. } = &self.0;
        write!(
            f,
            "\n  {original} / {reply} status {:#x} state {} flags {:x}/{:x} mark {} {} s parts {:#x}",
            state.status,
            state.tcp_state,
            state.tcp_flags_original,
            state.tcp_flags_reply,
            state.mark,
            state.timeout_s,
            self.0.extra.parts
        )
    }
}

fn by_connection(events: &[Event]) -> BTreeMap<Tuple, Vec<&Event>> {
    let mut sorted: BTreeMap<Tuple, Vec<&Event>> = BTreeMap::new();
    for event in events {
        sorted.entry(event.connection.original).or_default().push(event);
    }
    sorted
}

fn is_alike(a: &BTreeMap<Tuple, Vec<&Event>>, b: &BTreeMap<Tuple, Vec<&Event>>) -> bool {
    let is_same = |a: &Event, b: &Event| {
        let mut without = [a.connection, b.connection];
        for (connection, event) in without.iter_mut().zip([a, b]) {
            if event.known & groups::TIMEOUT == 0 {
                connection.state.timeout_s = 0;
            }
            if event.known & groups::STATE == 0 {
                // The status is told all the same.
                (connection.state.tcp_state, connection.state.tcp_scale) = (0, 0);
                (connection.state.tcp_flags_original, connection.state.tcp_flags_reply) = (0, 0);
            }
            if event.known & groups::MARK == 0 {
                connection.state.mark = 0;
            }
        }
        // The last second of a timeout is 0, which an end leaves out.
        let is_end = a.what == What::Destroy;
        let known = |known: u8| if is_end { known & !groups::TIMEOUT } else { known };
        (a.what, a.by, known(a.known)) == (b.what, b.by, known(b.known))
            && Rough(without[0]) == Rough(without[1])
    };
    a.len() == b.len()
        && a.iter().zip(b).all(|((t, a), (u, b))| {
            t == u && a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_same(a, b))
        })
}

fn shown(event: &Event) -> String {
    format!(
        "{:?} {:?} known {:#x} {:?}",
        event.what,
        event.by,
        event.known,
        Rough(event.connection)
    )
    .replace('\n', "")
}

fn shown_payload(payload: &Payload) -> String {
    let Payload::Tcp(segment) = payload else { return String::new() };
    let names =
        [(flag::SYN, "SYN "), (flag::FIN, "FIN "), (flag::RST, "RST "), (flag::ACK, "ACK ")];
    let flags: String =
        names.iter().filter(|(bit, _)| segment.flags & bit != 0).map(|(_, name)| *name).collect();
    format!("{flags}{}{:?}", if segment.data { "data " } else { "" }, segment.place)
}

fn helper(name: &str) -> [u8; HELPER_NAME] {
    std::array::from_fn(|at| *name.as_bytes().get(at).unwrap_or(&0))
}

fn pick<T: Copy>(rng: &mut Rng, list: &[T]) -> T {
    list[rng.below(list.len() as u32) as usize]
}
