//! Connections in a gateway's kernel, made and closed by ctnetlink: to the appliance they are
//! traffic.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hypersync::conn::tuple::TCP;
use hypersync::conn::{Connection, State, Tuple};
use hypersync::conntrack::commit::{Committer, FlushFirst, Lifetime, Outcome};
use hypersync::conntrack::dump::DumpState;
use hypersync::conntrack::events::Source;
use hypersync::source::SourceEvent;

use crate::common::namespace::Namespace;

/// The n-th connection, established and translated to 10.3.0.1: 50,000 ports to each server, so
/// that one translated address suffices.
pub fn connection(n: u32) -> Connection {
    let (server, port) = (n / 50_000, (1024 + n % 50_000) as u16);
    let client = (Ipv4Addr::from(0x0a01_0100 + server), port);
    let original = Tuple::v4(TCP, client, (Ipv4Addr::from(0x0a02_0100 + server), 443));
    established(original, Tuple { dst: 0x0a03_0001, ..original.mirrored() })
}

/// An established connection with these tuples: confirmed, seen both ways, assured.
pub fn established(original: Tuple, reply: Tuple) -> Connection {
    let state = State { status: 0xe, tcp_state: 3, timeout_s: 3600, ..State::default() };
    Connection::new(original, reply, state)
}

/// Connections by their original tuples.
pub type Table = HashMap<Tuple, Connection>;

/// The connections of these numbers.
pub fn connections<I>(numbers: I) -> impl Iterator<Item = Connection> + Clone
where
    I: IntoIterator<Item = u32, IntoIter: Clone>,
{
    numbers.into_iter().map(connection)
}

/// A hand on a gateway's kernel. What it writes is nobody's echo.
pub struct Hand {
    committer: Committer,
    failed: u64,
}

impl Hand {
    pub fn on(gateway: &Namespace) -> Hand {
        Hand { committer: gateway.inside(|| Committer::open().expect("conntrack")), failed: 0 }
    }

    fn put(&mut self, mut add: impl FnMut(&mut Committer) -> Result<(), FlushFirst>) {
        if add(&mut self.committer).is_err() {
            self.flush();
            add(&mut self.committer).expect("an empty batch takes everything");
        }
    }

    fn flush(&mut self) {
        let Hand { committer, failed } = self;
        committer.flush(&mut |result| {
            *failed += !matches!(result.outcome, Outcome::Written | Outcome::Absent) as u64;
        });
    }

    /// What was asked for and not done since the last call.
    fn take_failed(&mut self) -> u64 {
        self.flush();
        std::mem::take(&mut self.failed)
    }

    /// Opens these connections; fails the test if the kernel does not take one.
    pub fn open(&mut self, connections: impl IntoIterator<Item = Connection>) {
        // The kernel's own timeout: an entry with a longer one would look like one that was
        // committed.
        self.write(connections, Lifetime::Normal);
    }

    /// The same with another timeout.
    pub fn write(&mut self, connections: impl IntoIterator<Item = Connection>, lifetime: Lifetime) {
        for c in connections {
            self.put(|committer| committer.write(&c, lifetime));
        }
        assert_eq!(self.take_failed(), 0, "the kernel takes every connection");
    }

    /// Ends these connections as TCP does: their last packets change their state, then they are
    /// gone.
    pub fn finish(&mut self, connections: impl Iterator<Item = Connection> + Clone) {
        const TIME_WAIT: u8 = 7;
        self.open(connections.clone().map(|mut c| {
            c.state.tcp_state = TIME_WAIT;
            c
        }));
        self.close(connections);
    }

    /// Closes these connections.
    pub fn close(&mut self, connections: impl IntoIterator<Item = Connection>) {
        for c in connections {
            self.put(|committer| committer.delete(&c.original));
        }
        assert_eq!(self.take_failed(), 0, "the kernel lets every connection go");
    }
}

/// Every TCP connection in a gateway's kernel.
pub fn table(gateway: &Namespace) -> Table {
    gateway.inside(|| {
        let mut source = Source::open(0, 1, &[], 64 << 10).expect("conntrack");
        assert_eq!(source.start_dump(), Ok(true));
        let mut table = Table::new();
        loop {
            let progress = source.drain_dump(100_000, &mut |event| {
                if let SourceEvent::Seen { connection, .. } = event
                    && connection.original.protocol == TCP
                {
                    table.insert(connection.original, connection);
                }
            });
            assert_eq!(progress.malformed, 0);
            match progress.state {
                DumpState::Done => return table,
                DumpState::Running => {}
                DumpState::Failed(errno) => panic!("reading the kernel's table: errno {errno}"),
            }
            // Events that wait for room to be remembered are of no interest.
            source.drain(usize::MAX, &mut |_, _| {});
        }
    })
}

/// What differs between two kernels' tables, timeouts left aside; `None` if nothing does.
pub fn difference(one: &Table, other: &Table) -> Option<String> {
    let lacks = |what: &str, a: &Table, b: &Table| {
        let missing: Vec<&Tuple> = a.keys().filter(|name| !b.contains_key(name)).collect();
        missing
            .first()
            .map(|first| format!("the {what} lacks {} entries, {first} say", missing.len()))
    };
    // The kernel's notes on the packet seen last, and that committed entries are liberal, are of
    // one side only.
    const LASTING: u8 = 0x07;
    let value = |c: &Connection| Connection {
        state: State {
            timeout_s: 0,
            tcp_flags_original: c.state.tcp_flags_original & LASTING,
            tcp_flags_reply: c.state.tcp_flags_reply & LASTING,
            ..c.state
        },
        ..*c
    };
    lacks("second", one, other).or_else(|| lacks("first", other, one)).or_else(|| {
        let other_value = |c: &Connection| value(&other[&c.original]);
        let differs = one.values().find(|c| value(c) != other_value(c));
        differs.map(|c| format!("{:?} is {:?} in the second", value(c), other_value(c)))
    })
}

/// Entries in a gateway's kernel, of every kind.
pub fn count(gateway: &Namespace) -> u64 {
    let path = "/proc/sys/net/netfilter/nf_conntrack_count";
    let text = gateway.inside(|| std::fs::read_to_string(path).expect("conntrack"));
    text.trim().parse().expect("a number")
}

/// What churn is made of.
#[derive(Clone, Copy)]
pub struct Plan {
    /// New connections a second.
    pub rate: u32,
    /// The number of the first.
    pub first: u32,
    /// How many of the newest are open; those before them are closed, one for each that opens.
    pub open: u32,
    /// Of so many connections one stays open.
    pub keep_one_of: u32,
    /// End by itself after so many.
    pub most: u32,
}

/// What churn did.
pub struct Churned {
    /// Connections opened.
    pub opened: u32,
    /// And closed, before the end.
    pub closed: u32,
    /// How long that took.
    pub took: Duration,
    /// The numbers of those that stay open, and when they were opened.
    pub kept: Vec<(u32, Instant)>,
}

/// A thread that opens and closes connections in a gateway's kernel.
pub struct Churn {
    stop: Arc<AtomicBool>,
    opened: Arc<AtomicU32>,
    thread: Option<JoinHandle<Churned>>,
}

impl Churn {
    pub fn start(gateway: &Namespace, plan: Plan) -> Churn {
        let (stop, opened) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let mut hand = Hand::on(gateway);
        let (stopped, counted) = (stop.clone(), opened.clone());
        let thread = std::thread::spawn(move || churn(&mut hand, plan, &stopped, &counted));
        Churn { stop, opened, thread: Some(thread) }
    }

    /// Connections opened so far.
    pub fn opened(&self) -> u32 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Ends it: what was not to be kept is closed.
    pub fn stop(self) -> Churned {
        self.stop.store(true, Ordering::Relaxed);
        self.wait()
    }

    /// Waits until it ends by itself.
    pub fn wait(mut self) -> Churned {
        let thread = self.thread.take().expect("it is waited for once");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn churn(hand: &mut Hand, plan: Plan, stop: &AtomicBool, counted: &AtomicU32) -> Churned {
    let started = Instant::now();
    let mut kept = Vec::new();
    let is_kept = |i: u32| i.is_multiple_of(plan.keep_one_of);
    let (mut opened, mut closed, mut open_until) = (0, 0, 0);
    while opened < plan.most && !stop.load(Ordering::Relaxed) {
        // What is due by now, a few milliseconds' worth at most: then look whether it is to stop.
        let due = (started.elapsed().as_secs_f64() * plan.rate as f64) as u32;
        let end = due.min(plan.most).min(opened + plan.rate.div_ceil(200));
        if end == opened {
            std::thread::sleep(Duration::from_micros(500));
            continue;
        }
        hand.open(connections((opened..end).map(|i| plan.first + i)));
        let now = Instant::now();
        kept.extend((opened..end).filter(|i| is_kept(*i)).map(|i| (plan.first + i, now)));
        opened = end;
        counted.store(opened, Ordering::Relaxed);
        let close_until = opened.saturating_sub(plan.open);
        let closing = (open_until..close_until).filter(|i| !is_kept(*i));
        closed += closing.clone().count() as u32;
        hand.close(connections(closing.map(|i| plan.first + i)));
        open_until = close_until;
    }
    let took = started.elapsed();
    hand.close(connections((open_until..opened).filter(|i| !is_kept(*i)).map(|i| plan.first + i)));
    Churned { opened, closed, took, kept }
}
