//! The other end of what `tools/measure/events` measures; run in a gateway's network namespace.
//!
//! ```text
//! measure-conntrack insert RATE COUNT   writes translated TCP connections into the kernel's table
//! measure-conntrack delete RATE COUNT   removes them
//! measure-conntrack read COUNT          the floor: reads that many events in batches, does nothing
//!                                       with them, and prints the processor time of each, ns
//! ```
//!
//! The port id of what is written here is not the appliance's: to the appliance it is traffic.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use hypersync::conn::{Connection, State, Tuple};
use hypersync::conntrack::commit::{Committer, Lifetime, Outcome};
use hypersync::conntrack::events::Source;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize| words.get(i).and_then(|word| word.parse::<u32>().ok());
    let outcome = match (words.first().map(String::as_str), number(1), number(2)) {
        (Some("insert"), Some(rate), Some(count)) => write(rate, count, false),
        (Some("delete"), Some(rate), Some(count)) => write(rate, count, true),
        (Some("read"), Some(count), None) => read(count),
        _ => Err("usage: measure-conntrack insert|delete RATE COUNT, or read COUNT".into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("measure-conntrack: {line}");
            ExitCode::FAILURE
        }
    }
}

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

fn write(rate: u32, count: u32, is_delete: bool) -> Result<(), String> {
    let mut committer = Committer::open().map_err(|e| e.to_string())?;
    let started = Instant::now();
    let mut failed = 0;
    let mut n = 0;
    while n < count {
        // A millisecond's worth at a time, then wait until it is due.
        let end = count.min(n + rate.div_ceil(1000));
        while n < end {
            while n < end && committer.pending() < Committer::BATCH {
                let c = connection(n);
                let taken = match is_delete {
                    true => committer.delete(&c.original),
                    false => committer.write(&c, Lifetime::Normal),
                };
                taken.map_err(|_| "one connection twice in a batch")?;
                n += 1;
            }
            committer.flush(&mut |result| {
                failed += !matches!(result.outcome, Outcome::Written | Outcome::Removed) as u32;
            });
        }
        let due = started + Duration::from_secs_f64(n as f64 / rate as f64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    println!("{} {failed}", (count as f64 / started.elapsed().as_secs_f64()) as u64);
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
