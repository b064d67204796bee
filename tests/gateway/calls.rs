//! Calls: TCP connections from ports that the test chooses, so that it can use them again at once.
//! The client says a word now and then, and the server repeats it. The server closes first, when it
//! is asked to: then the client's port is free.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hypersync::conn::tuple::TCP;
use hypersync::counters::Counter;

use crate::appliance::{Appliances, Discovery};
use crate::common::namespace::Namespace;
use crate::entries::{self, Entries, Entry, Tuple};
use crate::topology::{SERVER, Topology};
use crate::traffic::{Direction, word};

/// Where calls lead. The gateways translate the client's address.
pub const PORT: u16 = 7080;
/// How long one step of a call may take: TCP has sent again five or six times by then.
const PATIENCE: Duration = Duration::from_secs(8);
/// What asks the server to close.
const CLOSE: [u8; 8] = [0; 8];

/// The timeouts of the states in which a connection begins or ends, below /proc/sys/net/netfilter.
const FINAL_STATES: [&str; 5] = ["fin_wait", "close_wait", "last_ack", "time_wait", "close"];
const FIRST_STATES: [&str; 2] = ["syn_sent", "syn_recv"];
/// More than a kernel gives an entry of its own, which is 5 days: only a copy's has so much.
pub const COPYS_TIMEOUT_S: u32 = 6 * 24 * 3600;

/// `TCP_CONNTRACK_ESTABLISHED` and `TCP_CONNTRACK_TIME_WAIT`.
pub const ESTABLISHED: u8 = 3;
pub const TIME_WAIT: u8 = 7;
const STATES: [&str; 10] = [
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
];

/// The server of all calls, until dropped.
pub struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens at the server.
    pub fn start(server: &Namespace) -> Server {
        let to = format!("{SERVER}:{PORT}");
        let listener = server.inside(|| TcpListener::bind(to)).expect("a free port");
        listener.set_nonblocking(true).expect("a socket can be made non-blocking");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut waiting =
                libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            while !stopped.load(Ordering::Relaxed) {
                // SAFETY: one record, which lives.
                unsafe { libc::poll(&mut waiting, 1, 50) };
                while let Ok((stream, _)) = listener.accept() {
                    std::thread::spawn(move || answer(stream));
                }
            }
        });
        Server { stop, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The server's side of one call. What goes wrong shows at the client.
fn answer(mut stream: TcpStream) {
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_nodelay(true);
    let _ = stream.set_read_timeout(Some(2 * PATIENCE));
    let mut word = [0; 8];
    while stream.read_exact(&mut word).is_ok() && word != CLOSE && stream.write_all(&word).is_ok() {
    }
}

/// The client's side of one call.
pub struct Call {
    stream: TcpStream,
    port: u16,
    said: u64,
}

impl Call {
    /// Opens a call from this port; to be called on a thread of the client's namespace.
    pub fn open(port: u16) -> Result<Call> {
        // SAFETY: numbers only.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let stream = unsafe { TcpStream::from_raw_fd(fd) };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // For connecting too.
        stream.set_write_timeout(Some(PATIENCE))?;
        let from = format!("10.1.0.10:{port}").parse().expect("an address");
        let to = format!("{SERVER}:{PORT}").parse().expect("an address");
        let (from, to) = (socket_address(from), socket_address(to));
        let length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        let start = Instant::now();
        // The port is free once the server has acknowledged that the call before is closed.
        // SAFETY: the kernel reads as many bytes as the address has.
        while unsafe { libc::bind(fd, (&raw const from).cast(), length) } < 0 {
            let error = Error::last_os_error();
            if error.kind() != ErrorKind::AddrInUse || start.elapsed() > PATIENCE {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: the same.
        match unsafe { libc::connect(fd, (&raw const to).cast(), length) } {
            0 => Ok(Call { stream, port, said: 0 }),
            _ => Err(Error::last_os_error()),
        }
    }

    /// Says a word and hears it back.
    pub fn say(&mut self) -> Result<()> {
        self.send().and_then(|word| self.hear(word, Instant::now() + PATIENCE))
    }

    fn send(&mut self) -> Result<[u8; 8]> {
        let word = word(Direction::ToServer, self.port.into(), self.said).to_be_bytes();
        self.said += 1;
        self.stream.write_all(&word)?;
        Ok(word)
    }

    fn hear(&mut self, word: [u8; 8], until: Instant) -> Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let mut heard = [0; 8];
        self.stream.read_exact(&mut heard)?;
        self.stream.set_read_timeout(Some(PATIENCE))?;
        match heard == word {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::InvalidData,
                format!("heard {heard:02x?}, not {word:02x?}"),
            )),
        }
    }

    /// Closes the call, both ways.
    pub fn close(mut self) -> Result<()> {
        self.stream.write_all(&CLOSE)?;
        match self.stream.read(&mut [0; 8])? {
            0 => Ok(()),
            _ => Err(Error::new(ErrorKind::InvalidData, "the server said something more")),
        }
    }
}

fn socket_address(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    }
}

/// Opens a call from each of these ports, and says a word on it.
pub fn open_all(topology: &Topology, ports: Range<u16>) -> Vec<Call> {
    let open = |port| {
        let mut call = Call::open(port)?;
        call.say()?;
        Ok(call)
    };
    let calls: Result<_> = topology.client.inside(|| ports.map(open).collect());
    calls.expect("the way is open")
}

/// Says a word on every call at once. Returns why some are cut.
pub fn cut(calls: &mut [Call]) -> Vec<Error> {
    let said: Vec<Result<[u8; 8]>> = calls.iter_mut().map(Call::send).collect();
    let until = Instant::now() + PATIENCE;
    let heard = calls.iter_mut().zip(said).map(|(call, word)| call.hear(word?, until));
    heard.filter_map(Result::err).collect()
}

/// The same; fails the test if one is cut.
pub fn say_all(calls: &mut [Call], what: &str) {
    let cut = cut(calls);
    assert!(cut.is_empty(), "{what}: {} of {} calls are cut: {}", cut.len(), calls.len(), cut[0]);
}

/// Closes every call.
pub fn close_all(calls: Vec<Call>) {
    calls.into_iter().for_each(|call| call.close().expect("the way is open"));
}

/// The name of the call from this port.
pub fn original(port: u16) -> Tuple {
    let at = |text: String| text.parse().expect("an address");
    Tuple {
        protocol: TCP,
        from: at(format!("10.1.0.10:{port}")),
        to: at(format!("{SERVER}:{PORT}")),
    }
}

/// The entries of calls.
pub fn of_calls(entries: Entries) -> Vec<Entry> {
    let calls = entries.into_values().filter(|entry| entry.original.to.port() == PORT);
    calls.collect()
}

/// Whether a gateway's kernel has an entry of the call from each of these ports, established.
pub fn are_established(topology: &Topology, gateway: u8, mut ports: Range<u16>) -> bool {
    let entries = entries::read(topology.gateway(gateway));
    ports.all(|port| entries.get(&original(port)).is_some_and(Entry::is_established))
}

/// Appliances on both gateways and the server behind them; states in which a connection begins or
/// ends last so many seconds.
pub fn start_pair(topology: &Topology, seconds: u32) -> (Appliances<'_>, Server) {
    shorten_states(topology, seconds);
    let appliances = Appliances::start(topology, Discovery::Peers, &[2, 2]);
    (appliances, Server::start(&topology.server))
}

/// Gives the states in which connections begin and end so many seconds at every gateway, so that a
/// test sees them run out.
pub fn shorten_states(topology: &Topology, seconds: u32) {
    for gateway in &topology.gateways {
        for state in FINAL_STATES.iter().chain(&FIRST_STATES) {
            gateway.sysctl(
                &format!("net/netfilter/nf_conntrack_tcp_timeout_{state}"),
                &seconds.to_string(),
            );
        }
    }
}

/// How many of these entries there are of each state, and how many have the timeout of a copy.
pub fn describe(entries: &[Entry]) -> String {
    let in_state = |(number, state): (usize, &&str)| {
        let count = entries.iter().filter(|entry| usize::from(entry.tcp_state) == number).count();
        (count > 0).then(|| format!("{count} {state}"))
    };
    let states: Vec<String> = STATES.iter().enumerate().filter_map(in_state).collect();
    let copies = entries.iter().filter(|entry| entry.timeout_s > COPYS_TIMEOUT_S).count();
    format!("{} entries ({}), {copies} with a copy's timeout", entries.len(), states.join(", "))
}

/// Waits until no kernel has an entry of a call and no table a connection. Entries that `is_known`
/// are left out of account.
pub fn wait_until_all_are_gone(
    topology: &Topology,
    appliances: &mut Appliances,
    limit: Duration,
    is_known: impl Fn(&Entry) -> bool,
) {
    const COUNTERS: [Counter; 3] =
        [Counter::ConnectionsHeld, Counter::ConnectionsActive, Counter::ConnectionsBackup];
    let start = Instant::now();
    loop {
        appliances.assert_running("nothing is left of the calls");
        let mut gone = true;
        let mut found = Vec::new();
        for gateway in topology.members() {
            let calls = of_calls(entries::read(topology.gateway(gateway)));
            let (known, left): (Vec<Entry>, Vec<Entry>) = calls.into_iter().partition(&is_known);
            let table = COUNTERS.map(|counter| appliances.counter(gateway, counter));
            gone &= left.is_empty() && table.iter().sum::<u64>() <= known.len() as u64;
            let first =
                left.first().map(|entry| entry.original.from.to_string()).unwrap_or_default();
            found.push(format!(
                "kernel {gateway} {}, table {gateway} {table:?} (held, active, backup) {first}",
                describe(&left)
            ));
        }
        if gone {
            return;
        }
        assert!(
            start.elapsed() < limit,
            "{limit:?} after the last call ended there are left: {found:#?}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}
