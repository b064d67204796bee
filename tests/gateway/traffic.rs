//! Real traffic: TCP connections that carry numbered data both ways all the time, and check every byte.
//!
//! Each side sends words of 8 bytes that name direction, connection and number; so a lost, altered
//! or repeated byte, and a byte that came out of the wrong connection, all show at once. Progress
//! is published, so that a test can wait for it.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::common::namespace::Namespace;
use crate::common::wait_for;

/// How often every socket is looked at. The gaps that are measured are this coarse.
const TICK: Duration = Duration::from_millis(5);
/// A connection sends a word every so many ticks; connections take turns.
const TICKS_PER_WORD: usize = 4;
/// How long opening one connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

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

/// Who sends a word.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToServer = 1,
    ToClient = 2,
}

/// The `number`th word that a connection carries in a direction.
fn word(direction: Direction, connection: usize, number: u64) -> u64 {
    ((direction as u64) << 56 | (connection as u64) << 40 | number) ^ 0xa5c3_965a_3c69_f00f
}

/// Which connection a word from the client belongs to.
fn connection_of(bytes: [u8; 8]) -> usize {
    ((u64::from_be_bytes(bytes) ^ 0xa5c3_965a_3c69_f00f) >> 40 & 0xffff) as usize
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
    fn new(stream: TcpStream, sends: Direction, hears: Direction, connection: Option<usize>) -> End {
        stream.set_nonblocking(true).expect("a socket can be made non-blocking");
        stream.set_nodelay(true).expect("a TCP socket has TCP_NODELAY");
        let (last_heard, longest_gap) = (Instant::now(), Duration::ZERO);
        let progress = Progress { sent: 0, received: 0, last_heard, longest_gap, fault: None };
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
            let gap = self.progress.last_heard.elapsed();
            self.progress.longest_gap = self.progress.longest_gap.max(gap);
            self.progress.last_heard = Instant::now();
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
struct Shared {
    stop: AtomicBool,
    quiet: AtomicBool,
    client: Mutex<Side>,
    server: Mutex<Side>,
}

/// What one side publishes at every tick.
#[derive(Clone, Default)]
struct Side {
    ends: Vec<Progress>,
    /// It will send no new word.
    quiet: bool,
}

/// Connections between two hosts, with traffic on them until dropped.
pub struct Traffic {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Where the connections begin, as the client's host sees it.
    pub client_addresses: Vec<SocketAddr>,
    /// Where they lead.
    pub server_address: SocketAddr,
}

impl Traffic {
    /// Opens `count` connections; fails the test if one cannot be opened.
    pub fn start(client: &Namespace, server: &Namespace, to: (&str, u16), count: usize) -> Traffic {
        let server_address = SocketAddr::new(to.0.parse().expect("an address"), to.1);
        let listener = server.inside(|| TcpListener::bind(server_address)).expect("a free port");
        listener.set_nonblocking(true).expect("a socket can be made non-blocking");
        let shared = Arc::new(Shared::default());
        let mut threads = Vec::new();
        threads.push(spawn(&shared, move |shared| serve(shared, &listener)));
        let streams: Vec<TcpStream> = client.inside(|| {
            let connect = |_| TcpStream::connect_timeout(&server_address, CONNECT_LIMIT);
            (0..count).map(connect).collect::<Result<_, _>>().expect("a connection through the gateway")
        });
        let client_addresses = streams.iter().map(|s| s.local_addr().expect("it is connected")).collect();
        threads.push(spawn(&shared, move |shared| connect(shared, streams)));
        let traffic = Traffic { shared, threads, client_addresses, server_address };
        traffic.wait_for_more(5, Duration::from_secs(10), "the first words of every connection");
        traffic
    }

    /// What the client's side of every connection has seen.
    pub fn client(&self) -> Vec<Progress> {
        lock(&self.shared.client).ends.clone()
    }

    /// What the server's side of every connection has seen.
    pub fn server(&self) -> Vec<Progress> {
        lock(&self.shared.server).ends.clone()
    }

    /// Waits until each side of every connection has received `words` more than now.
    pub fn wait_for_more(&self, words: u64, limit: Duration, what: &str) {
        let count = self.client_addresses.len();
        let sides = || self.client().into_iter().chain(self.server()).collect::<Vec<_>>();
        // Until all have been accepted there are fewer server sides: those start from 0.
        let mut start: Vec<u64> = sides().iter().map(|side| side.received).collect();
        start.resize(2 * count, 0);
        wait_for(what, limit, || {
            let now = sides();
            let faults: Vec<_> = now.iter().filter_map(|side| side.fault.as_ref()).collect();
            assert!(faults.is_empty(), "{} sides failed, the first: {}", faults.len(), faults[0]);
            now.len() == 2 * count && now.iter().zip(&start).all(|(now, start)| now.received >= start + words)
        });
    }

    /// Stops sending and waits until both sides have every word that was sent.
    pub fn finish(&self, limit: Duration) {
        self.shared.quiet.store(true, Ordering::Relaxed);
        wait_for("every word sent has been received, both ways", limit, || {
            let (client, server) = (lock(&self.shared.client).clone(), lock(&self.shared.server).clone());
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
    let number = |(number, stream)| End::new(stream, Direction::ToServer, Direction::ToClient, Some(number));
    let mut ends: Vec<End> = streams.into_iter().enumerate().map(number).collect();
    every_tick(shared, |tick, quiet| {
        talk(&mut ends, tick, quiet);
        publish(&shared.client, &ends, quiet);
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
        publish(&shared.server, &ends, quiet);
    });
}

fn talk(ends: &mut [End], tick: usize, quiet: bool) {
    for (place, end) in ends.iter_mut().enumerate() {
        end.tick(!quiet && (tick + place).is_multiple_of(TICKS_PER_WORD));
    }
}

fn publish(side: &Mutex<Side>, ends: &[End], quiet: bool) {
    *lock(side) = Side { ends: ends.iter().map(|end| end.progress.clone()).collect(), quiet };
}

fn every_tick(shared: &Shared, mut work: impl FnMut(usize, bool)) {
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
