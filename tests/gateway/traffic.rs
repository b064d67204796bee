//! Real traffic: TCP connections and UDP flows that carry numbered data both ways all the time, and
//! check every byte.
//!
//! Each side sends words of 8 bytes that name direction, connection and number; so a lost, altered
//! or repeated byte, and a byte that came out of the wrong connection, all show at once. (In UDP,
//! where a word is a datagram, words may be lost.) Progress is published, so that a test can wait
//! for it.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hypersync::conn::tuple::{TCP, UDP};

use crate::common::namespace::Namespace;
use crate::common::wait_for;
use crate::datagrams;

/// How often every socket is looked at. The gaps that are measured are this coarse.
const TICK: Duration = Duration::from_millis(5);
/// A connection sends a word every so many ticks; connections take turns.
const TICKS_PER_WORD: usize = 4;
/// How long opening one connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Makes words that do not look like counters.
const SCRAMBLE: u64 = 0xa5c3_965a_3c69_f00f;

/// What one side of a connection has seen.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Words given to the socket.
    pub sent: u64,
    /// Words received, in order and unaltered.
    pub received: u64,
    /// When the latest arrived.
    pub last_heard: Instant,
    /// The longest time between two arrivals.
    pub longest_gap: Duration,
    /// Why this side gave the connection up.
    pub fault: Option<String>,
}

impl Progress {
    /// Nothing yet.
    pub fn new() -> Progress {
        Progress {
            sent: 0,
            received: 0,
            last_heard: Instant::now(),
            longest_gap: Duration::ZERO,
            fault: None,
        }
    }

    /// Notes that something arrived.
    pub fn hear(&mut self) {
        self.longest_gap = self.longest_gap.max(self.last_heard.elapsed());
        self.last_heard = Instant::now();
    }

    /// Whether this side gave up, or has heard nothing for so long.
    pub fn is_broken(&self, silence: Duration) -> bool {
        self.fault.is_some() || self.last_heard.elapsed() > silence
    }
}

/// Who sends a word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    ToServer = 1,
    ToClient = 2,
}

/// The `number`th word that a connection carries in a direction.
pub fn word(direction: Direction, connection: usize, number: u64) -> u64 {
    ((direction as u64) << 56 | (connection as u64) << 40 | number) ^ SCRAMBLE
}

/// Which connection a word from the client belongs to.
pub fn connection_of(bytes: [u8; 8]) -> usize {
    ((u64::from_be_bytes(bytes) ^ SCRAMBLE) >> 40 & 0xffff) as usize
}

/// Which word of its connection and direction it is.
pub fn number_of(bytes: [u8; 8]) -> u64 {
    (u64::from_be_bytes(bytes) ^ SCRAMBLE) & 0xff_ffff_ffff
}

/// One side of a connection.
struct End {
    stream: TcpStream,
    sends: Direction,
    hears: Direction,
    /// Its number; the server's side learns it from the first word.
    connection: Option<usize>,
    unsent: Vec<u8>,
    unread: Vec<u8>,
    progress: Progress,
}

impl End {
    fn new(
        stream: TcpStream,
        sends: Direction,
        hears: Direction,
        connection: Option<usize>,
    ) -> End {
        stream.set_nonblocking(true).expect("a socket can be made non-blocking");
        stream.set_nodelay(true).expect("a TCP socket has TCP_NODELAY");
        let progress = Progress::new();
        End { stream, sends, hears, connection, unsent: Vec::new(), unread: Vec::new(), progress }
    }

    /// Receives and checks what there is, sends what is due.
    fn tick(&mut self, send: bool) {
        if self.progress.fault.is_none() {
            let outcome = self.receive().and_then(|()| self.send(send));
            self.progress.fault = outcome.err();
        }
    }

    fn receive(&mut self) -> Result<(), String> {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err("closed by the other side".to_owned()),
                Ok(length) => self.unread.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.to_string()),
            }
        }
        let (words, rest) = self.unread.as_chunks::<8>();
        for &bytes in words {
            let connection = *self.connection.get_or_insert_with(|| connection_of(bytes));
            let expected = word(self.hears, connection, self.progress.received).to_be_bytes();
            if bytes != expected {
                let number = self.progress.received;
                return Err(format!("word {number} is {bytes:02x?} instead of {expected:02x?}"));
            }
            self.progress.received += 1;
        }
        let heard = !words.is_empty();
        self.unread = rest.to_vec();
        if heard {
            self.progress.hear();
        }
        Ok(())
    }

    fn send(&mut self, next: bool) -> Result<(), String> {
        if let Some(connection) = self.connection.filter(|_| next) {
            let word = word(self.sends, connection, self.progress.sent);
            self.unsent.extend_from_slice(&word.to_be_bytes());
            self.progress.sent += 1;
        }
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }
}

/// What the two sides' threads and the test share.
#[derive(Default)]
pub struct Shared {
    stop: AtomicBool,
    quiet: AtomicBool,
    client_is_silent: AtomicBool,
    client: Mutex<Side>,
    server: Mutex<Side>,
}

impl Shared {
    /// Whether the client may send a new word.
    pub fn may_client_send(&self) -> bool {
        !self.client_is_silent.load(Ordering::Relaxed)
    }

    /// Shows what a side has seen; `quiet` once it will send no new word.
    pub fn publish(&self, side: Direction, ends: Vec<Progress>, quiet: bool) {
        let place = match side {
            Direction::ToServer => &self.client,
            Direction::ToClient => &self.server,
        };
        *lock(place) = Side { ends, quiet };
    }
}

/// What one side publishes at every tick.
#[derive(Clone, Default)]
struct Side {
    ends: Vec<Progress>,
    /// It will send no new word.
    quiet: bool,
}

/// Whose words are waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hearers {
    /// Client and server.
    Both,
    /// Only the client.
    Client,
}

/// How many words each side is to have received.
pub struct Goal {
    least: Vec<u64>,
}

/// Connections between two hosts, with traffic on them until dropped.
pub struct Traffic {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// The protocol's number.
    pub protocol: u8,
    /// Where the connections begin, as the client's host sees it.
    pub client_addresses: Vec<SocketAddr>,
    /// Where they lead, as the client's host sees it.
    pub server_address: SocketAddr,
}

impl Traffic {
    /// Opens `count` TCP connections to an address of the server; fails the test if one cannot be
    /// opened.
    pub fn start(client: &Namespace, server: &Namespace, to: (&str, u16), count: usize) -> Traffic {
        let to = SocketAddr::new(to.0.parse().expect("an address"), to.1);
        Traffic::connect(client, server, to, to, count)
    }

    /// The same to an address that is translated on the way to the one where the server listens.
    pub fn connect(
        client: &Namespace,
        server: &Namespace,
        to: SocketAddr,
        listens: SocketAddr,
        count: usize,
    ) -> Traffic {
        let listener = server.inside(|| TcpListener::bind(listens)).expect("a free port");
        listener.set_nonblocking(true).expect("a socket can be made non-blocking");
        let shared = Arc::new(Shared::default());
        let serving = spawn(&shared, move |shared| serve(shared, &listener));
        let streams: Vec<TcpStream> = client.inside(|| {
            let connect = |_| TcpStream::connect_timeout(&to, CONNECT_LIMIT);
            (0..count)
                .map(connect)
                .collect::<Result<_, _>>()
                .expect("a connection through the gateway")
        });
        let client_addresses =
            streams.iter().map(|s| s.local_addr().expect("it is connected")).collect();
        let threads = vec![serving, spawn(&shared, move |shared| connect(shared, streams))];
        Traffic { shared, threads, protocol: TCP, client_addresses, server_address: to }.flowing()
    }

    /// Starts `count` UDP flows to an address that may be translated on the way to where the server
    /// listens.
    pub fn send_datagrams(
        client: &Namespace,
        server: &Namespace,
        to: SocketAddr,
        listens: SocketAddr,
        count: usize,
    ) -> Traffic {
        let listener = server.inside(|| UdpSocket::bind(listens)).expect("a free port");
        let from: SocketAddr =
            if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
        let sockets: Vec<UdpSocket> = client.inside(|| {
            let connect =
                |_| UdpSocket::bind(from).and_then(|socket| socket.connect(to).map(|()| socket));
            (0..count).map(connect).collect::<Result<_, _>>().expect("a route to the server")
        });
        let client_addresses =
            sockets.iter().map(|s| s.local_addr().expect("it is connected")).collect();
        let shared = Arc::new(Shared::default());
        let threads = vec![
            spawn(&shared, move |shared| datagrams::serve(shared, &listener)),
            spawn(&shared, move |shared| datagrams::send(shared, &sockets)),
        ];
        Traffic { shared, threads, protocol: UDP, client_addresses, server_address: to }.flowing()
    }

    fn flowing(self) -> Traffic {
        self.wait_for_more(5, Duration::from_secs(10), "the first words of every connection");
        self
    }

    /// Lets the client send new words or not. The server goes on.
    pub fn silence_client(&self, is_silent: bool) {
        self.shared.client_is_silent.store(is_silent, Ordering::Relaxed);
    }

    /// What the client's side of every connection has seen.
    pub fn client(&self) -> Vec<Progress> {
        lock(&self.shared.client).ends.clone()
    }

    /// What the server's side of every connection has seen.
    pub fn server(&self) -> Vec<Progress> {
        lock(&self.shared.server).ends.clone()
    }

    /// The longest time that a client's side heard nothing.
    pub fn longest_gap(&self) -> Duration {
        self.client().iter().map(|side| side.longest_gap).max().unwrap_or_default()
    }

    /// Waits until each side of every connection has received `words` more than now.
    pub fn wait_for_more(&self, words: u64, limit: Duration, what: &str) {
        let goal = self.more(Hearers::Both, words);
        wait_for(what, limit, || self.has_reached(&goal));
    }

    /// That so many more words have been received than now.
    pub fn more(&self, hearers: Hearers, words: u64) -> Goal {
        let count = self.client_addresses.len();
        // Until all have been accepted there are fewer server sides: those start from 0.
        let mut least: Vec<u64> = self.sides().iter().map(|side| side.received + words).collect();
        least.resize(2 * count, words);
        if hearers == Hearers::Client {
            least.truncate(count);
        }
        Goal { least }
    }

    /// Whether every side has what is wanted of it; fails the test if one gave up.
    pub fn has_reached(&self, goal: &Goal) -> bool {
        let sides = self.sides();
        let faults: Vec<_> = sides.iter().filter_map(|side| side.fault.as_ref()).collect();
        assert!(faults.is_empty(), "{} sides failed, the first: {}", faults.len(), faults[0]);
        sides.len() >= goal.least.len()
            && sides.iter().zip(&goal.least).all(|(side, least)| side.received >= *least)
    }

    /// The client's sides, then the server's.
    fn sides(&self) -> Vec<Progress> {
        self.client().into_iter().chain(self.server()).collect()
    }

    /// Stops sending and waits until both sides have every word that was sent; for TCP.
    pub fn finish(&self, limit: Duration) {
        self.shared.quiet.store(true, Ordering::Relaxed);
        wait_for("every word sent has been received, both ways", limit, || {
            let (client, server) =
                (lock(&self.shared.client).clone(), lock(&self.shared.server).clone());
            let mut both = client.ends.iter().zip(&server.ends);
            let all_received = both.all(|(client, server)| {
                let fault = client.fault.as_ref().or(server.fault.as_ref());
                assert_eq!(fault, None, "a connection failed with its last words on the way");
                client.sent == server.received && server.sent == client.received
            });
            client.quiet && server.quiet && all_received
        });
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The client's side of all connections.
fn connect(shared: &Shared, streams: Vec<TcpStream>) {
    let number =
        |(number, stream)| End::new(stream, Direction::ToServer, Direction::ToClient, Some(number));
    let mut ends: Vec<End> = streams.into_iter().enumerate().map(number).collect();
    every_tick(shared, |tick, quiet| {
        talk(&mut ends, tick, quiet || !shared.may_client_send());
        shared.publish(Direction::ToServer, progress(&ends), quiet);
    });
}

/// The server's side of all connections.
fn serve(shared: &Shared, listener: &TcpListener) {
    let mut ends: Vec<End> = Vec::new();
    every_tick(shared, |tick, quiet| {
        while let Ok((stream, _)) = listener.accept() {
            ends.push(End::new(stream, Direction::ToClient, Direction::ToServer, None));
        }
        talk(&mut ends, tick, quiet);
        // By number once all are known: before that, sides are only counted.
        ends.sort_by_key(|end| end.connection);
        shared.publish(Direction::ToClient, progress(&ends), quiet);
    });
}

fn talk(ends: &mut [End], tick: usize, quiet: bool) {
    for (place, end) in ends.iter_mut().enumerate() {
        end.tick(!quiet && is_turn_of(place, tick));
    }
}

fn progress(ends: &[End]) -> Vec<Progress> {
    ends.iter().map(|end| end.progress.clone()).collect()
}

/// Whether the connection in this place sends a word in this tick.
pub fn is_turn_of(place: usize, tick: usize) -> bool {
    (tick + place).is_multiple_of(TICKS_PER_WORD)
}

/// Calls `work` with the tick's number and whether no new word is wanted, until the traffic is
/// dropped.
pub fn every_tick(shared: &Shared, mut work: impl FnMut(usize, bool)) {
    let mut tick = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        work(tick, shared.quiet.load(Ordering::Relaxed));
        tick += 1;
        std::thread::sleep(TICK);
    }
}

fn spawn(shared: &Arc<Shared>, work: impl FnOnce(&Shared) + Send + 'static) -> JoinHandle<()> {
    let shared = shared.clone();
    std::thread::spawn(move || work(&shared))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
