//! hypersync-load: loads an appliance that listens to the ring source with made-up connections.
//!
//! Prints a line a second and totals at the end. Exit status: 0; 2 if it was called wrongly or
//! there is no appliance to load (one line on standard error says what).

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use argh::FromArgs;
use hypersync::clock;
use hypersync::load::{FlowsConfig, Load, Told, interrupt};
use hypersync::time::Time;

/// How often what is due is told.
const BEAT: Duration = Duration::from_millis(2);

/// How soon an event that found its ring full is offered again: in less than any ring takes to run
/// empty.
const AGAIN: Duration = Duration::from_micros(50);

/// How long the end may take to close what is open while the rings are full.
const CLOSING: Duration = Duration::from_secs(10);

/// Loads a hypersync appliance on this host.
#[derive(FromArgs)]
struct Args {
    /// what to load it with
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Command {
    Flows(FlowsArgs),
}

/// Connections that open, change and close at a constant rate, told through the ingest rings.
#[derive(FromArgs)]
#[argh(subcommand, name = "flows")]
struct FlowsArgs {
    /// directory of the appliance's shared memory (default: /dev/shm/hypersync)
    #[argh(option, default = "PathBuf::from(\"/dev/shm/hypersync\")")]
    shm: PathBuf,
    /// events a second after the ramp: opened, changed and closed together (default: 20000)
    #[argh(option, default = "20_000")]
    rate: u32,
    /// long-lived connections that are open at any time after the ramp (default: 100000)
    #[argh(option, default = "100_000")]
    connections: usize,
    /// how long these take to open, e.g. 500ms (default: 4s)
    #[argh(option, default = "Duration::from_secs(4)", from_str_fn(duration))]
    ramp: Duration,
    /// of the connections opened after the ramp, so many are short-lived, percent (default: 30)
    #[argh(option, default = "30")]
    short_share: u32,
    /// how long those live, e.g. 1s (default: 500ms)
    #[argh(option, default = "Duration::from_millis(500)", from_str_fn(duration))]
    short_life: Duration,
    /// so many connections have their source translated, percent (default: 20)
    #[argh(option, default = "20")]
    nat_share: u32,
    /// so many connections are IPv6, percent (default: 10)
    #[argh(option, default = "10")]
    v6_share: u32,
    /// how long to go on, ramp included, e.g. 1m (default: 10s)
    #[argh(option, default = "Duration::from_secs(10)", from_str_fn(duration))]
    duration: Duration,
    /// everything random follows from this number (default: 1)
    #[argh(option, default = "1")]
    seed: u64,
    /// which data plane this is, 1 to 255: part of every address, so that two never meet
    /// (default: 1)
    #[argh(option, default = "1")]
    plane: u8,
    /// leave the long-lived connections open at the end
    #[argh(switch)]
    keep: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}: write it like 500ms or 10s"))
}

fn main() -> ExitCode {
    let words: Vec<String> =
        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let args = match Args::from_args(&["hypersync-load"], &words) {
        Ok(Args { command: Command::Flows(args) }) => args,
        Err(exit) if exit.status.is_ok() => {
            println!("{}", exit.output);
            return ExitCode::SUCCESS;
        }
        Err(exit) => {
            eprintln!("{}\nTry hypersync-load --help.", exit.output.trim_end());
            return ExitCode::from(2);
        }
    };
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("hypersync-load: {why}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &FlowsArgs) -> Result<(), String> {
    if !(1..=10_000_000).contains(&args.connections) || !(1..=10_000_000).contains(&args.rate) {
        return Err("--connections and --rate are 1 to 10000000".into());
    }
    if [args.short_share, args.nat_share, args.v6_share].iter().any(|share| *share > 100)
        || args.short_share == 100
    {
        return Err("shares are percent: 0 to 100, the short-lived ones below 100".into());
    }
    let config = FlowsConfig {
        plane: args.plane,
        seed: args.seed,
        connections: args.connections,
        rate: args.rate,
        ramp: args.ramp,
        short_percent: args.short_share,
        short_life: args.short_life,
        nat_percent: args.nat_share,
        v6_percent: args.v6_share,
    };
    interrupt::catch();
    let started = clock::now();
    let mut load = Load::open(&args.shm, config, started).map_err(|error| error.to_string())?;
    let end = started.after(args.duration);
    let mut report = Report { at: started, told: Told::default(), full: 0 };
    let _ = writeln!(
        std::io::stdout(),
        "{:>8} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "second",
        "open",
        "opened",
        "changed",
        "closed",
        "ring full"
    );
    let mut beat = started;
    loop {
        let now = clock::now();
        let pause = if load.batch(now) { BEAT } else { AGAIN };
        if now.since(report.at) >= Duration::from_secs(1) {
            report.print(&load, started, now);
            if !load.is_current() {
                return Err(
                    "the appliance began a new table: nobody reads these rings any more".into()
                );
            }
        }
        if end.reached(now) || interrupt::came() {
            break;
        }
        beat = beat.after(pause).max(now);
        std::thread::sleep(beat.since(clock::now()));
    }
    load.flows.finish(args.keep);
    let until = clock::now().after(CLOSING);
    while !load.flows.is_finished() && !until.reached(clock::now()) {
        load.batch(clock::now());
        std::thread::sleep(Duration::from_millis(1));
    }
    let (now, told) = (clock::now(), load.flows.told());
    let _ = writeln!(
        std::io::stdout(),
        "total in {:.1} s: {} opened ({} of them short-lived), {} changed, {} closed, {} open; ring full {} times",
        now.since(started).as_secs_f64(),
        told.opened,
        told.opened_short,
        told.changed,
        told.closed,
        load.flows.open().count(),
        load.full()
    );
    match load.flows.is_finished() {
        true => Ok(()),
        false => {
            Err("the appliance does not read its rings: not every connection was closed".into())
        }
    }
}

/// What the last line has told.
struct Report {
    at: Time,
    told: Told,
    full: u64,
}

impl Report {
    fn print(&mut self, load: &Load, started: Time, now: Time) {
        let (told, full) = (load.flows.told(), load.full());
        let _ = writeln!(
            std::io::stdout(),
            "{:>8.1} {:>10} {:>10} {:>10} {:>10} {:>10}",
            now.since(started).as_secs_f64(),
            load.flows.open().count(),
            told.opened - self.told.opened,
            told.changed - self.told.changed,
            told.closed - self.told.closed,
            full - self.full
        );
        *self = Report { at: now, told, full };
    }
}
