//! The other end of what `tools/measure/events` measures; run in a gateway's network namespace.
//!
//! ```text
//! measure-conntrack insert RATE FROM TO   writes translated TCP connections into the kernel's table
//! measure-conntrack finish RATE FROM TO   ends them as packets would: TIME_WAIT
//! measure-conntrack delete RATE FROM TO   removes them
//! measure-conntrack read COUNT            the floor: reads that many events in batches, does
//!                                         nothing with them, and prints the processor time of
//!                                         each, ns
//! ```
//!
//! The port id of what is written here is not the appliance's: to the appliance it is traffic.

use std::ops::Range;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hypersync::conn::{Connection, State, Tuple};
use hypersync::conntrack::commit::{Committer, Lifetime, Outcome};
use hypersync::conntrack::events::Source;

const USAGE: &str = "usage: measure-conntrack insert|finish|delete RATE FROM TO, or read COUNT";

/// What becomes of the entries.
#[derive(Clone, Copy)]
enum What {
    Insert,
    Finish,
    Delete,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize| words.get(i).and_then(|word| word.parse::<u32>().ok());
    let range = || Some((number(1)?, number(2)?..number(3)?));
    let outcome = match (words.first().map(String::as_str), range()) {
        (Some("insert"), Some((rate, range))) => write(rate, range, What::Insert),
        (Some("finish"), Some((rate, range))) => write(rate, range, What::Finish),
        (Some("delete"), Some((rate, range))) => write(rate, range, What::Delete),
        (Some("read"), None) => number(1).ok_or_else(|| USAGE.to_owned()).and_then(read),
        _ => Err(USAGE.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("measure-conntrack: {line}");
            ExitCode::FAILURE
        }
    }
}

/// `TCP_CONNTRACK_TIME_WAIT`.
const TIME_WAIT: u8 = 7;

/// The n-th connection: 50,000 ports to each server, so that one translated address suffices.
fn connection(n: u32) -> Connection {
    let (server, port) = (n / 50_000, (1024 + n % 50_000) as u16);
    let client = (std::net::Ipv4Addr::from(0x0a01_0100 + server), port);
    let original = Tuple::v4(6, client, (std::net::Ipv4Addr::from(0x0a02_0100 + server), 443));
    let reply = Tuple { dst: 0x0a03_0001, ..original.mirrored() };
    // Confirmed, both directions seen, assured; established.
    let state = State { status: 0xe, tcp_state: 3, timeout_s: 3600, ..State::default() };
    Connection::new(original, reply, state)
}

fn write(rate: u32, range: Range<u32>, what: What) -> Result<(), String> {
    let mut committer = Committer::open().map_err(|e| e.to_string())?;
    let started = Instant::now();
    let mut failed = 0;
    let mut n = range.start;
    while n < range.end {
        // A millisecond's worth at a time, then wait until it is due.
        let end = range.end.min(n + rate.div_ceil(1000));
        while n < end {
            while n < end && committer.pending() < Committer::BATCH {
                let mut c = connection(n);
                let taken = match what {
                    What::Insert => committer.write(&c, Lifetime::Normal),
                    What::Finish => {
                        c.state.tcp_state = TIME_WAIT;
                        committer.update(&c, Lifetime::Normal)
                    }
                    What::Delete => committer.delete(&c.original),
                };
                taken.map_err(|_| "one connection twice in a batch")?;
                n += 1;
            }
            committer.flush(&mut |result| {
                failed += !matches!(result.outcome, Outcome::Written | Outcome::Absent) as u32;
            });
        }
        let done = n - range.start;
        let due = started + Duration::from_secs_f64(done as f64 / rate as f64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let count = range.len() as f64;
    println!("{} {failed}", (count / started.elapsed().as_secs_f64()) as u64);
    Ok(())
}

fn read(count: u32) -> Result<(), String> {
    let mut source = Source::open(0, 1, &[], 64 << 20).map_err(|e| e.to_string())?;
    println!("ready");
    let mut seen = 0;
    let mut quiet = Instant::now();
    let before = processor_time()?;
    while seen < count && quiet.elapsed() < Duration::from_secs(20) {
        let drained = source.drain(4096, &mut |event, _| {
            std::hint::black_box(event);
        });
        seen += drained.events as u32;
        if drained.events > 0 {
            quiet = Instant::now();
        }
        if !drained.more {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let used = processor_time()? - before;
    println!("{seen} {}", used / u64::from(seen.max(1)));
    Ok(())
}

/// Processor time of this thread, ns.
fn processor_time() -> Result<u64, String> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").map_err(|e| e.to_string())?;
    text.split(' ')
        .next()
        .and_then(|word| word.parse().ok())
        .ok_or_else(|| "no schedstat".to_owned())
}
