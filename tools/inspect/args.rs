//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;

use argh::FromArgs;

/// Shows what a hypersync appliance on this host holds. Reads its shared memory only: it cannot
/// disturb the appliance.
#[derive(FromArgs)]
pub struct Args {
    /// directory of the shared memory (default: /dev/shm/hypersync)
    #[argh(option, default = "PathBuf::from(\"/dev/shm/hypersync\")")]
    pub shm: PathBuf,
    /// what to show
    #[argh(subcommand)]
    pub command: Command,
}

/// What to show.
#[derive(FromArgs)]
#[argh(subcommand)]
pub enum Command {
    /// The member.
    State(State),
    /// One connection.
    Find(Find),
    /// Every connection.
    Connections(Connections),
    /// Every counter.
    Counters(Counters),
    /// Full syncs.
    Sync(Sync),
    /// Whether traffic may be sent here.
    Check(Check),
}

/// The member, its shards, the exposure right now, and the group as this member sees it.
#[derive(FromArgs)]
#[argh(subcommand, name = "state")]
pub struct State {
    /// as JSON
    #[argh(switch)]
    pub json: bool,
}

/// Where the copies of one connection are, by its original or its reply tuple. Exit status 1:
/// nowhere here.
#[derive(FromArgs)]
#[argh(subcommand, name = "find")]
pub struct Find {
    /// as JSON
    #[argh(switch)]
    pub json: bool,
    /// as 'tcp 10.0.0.1:1000 > 10.0.0.2:80', or without quotes: tcp 10.0.0.1:1000 10.0.0.2:80; IPv6
    /// as `[2001:db8::1]:1000`; with 'zone 5' behind if it has one
    #[argh(positional)]
    pub tuple: Vec<String>,
}

/// Every connection, one a line.
#[derive(FromArgs)]
#[argh(subcommand, name = "connections")]
pub struct Connections {
    /// as JSON, one object a line
    #[argh(switch)]
    pub json: bool,
}

/// Every counter, for all shards and for each, with its meaning.
#[derive(FromArgs)]
#[argh(subcommand, name = "counters")]
pub struct Counters {
    /// as JSON
    #[argh(switch)]
    pub json: bool,
}

/// How far the full sync to each other member is: connections that it has, connections to do, rate,
/// time left.
#[derive(FromArgs)]
#[argh(subcommand, name = "sync")]
pub struct Sync {
    /// as JSON
    #[argh(switch)]
    pub json: bool,
}

/// Whether this member can carry the group's traffic, for scripts. Exit status 0: it can; 1: it
/// does not run; 2: it runs and is not ready (starting, syncing, leaving, or it hangs).
#[derive(FromArgs)]
#[argh(subcommand, name = "check")]
pub struct Check {
    /// as JSON
    #[argh(switch)]
    pub json: bool,
}

impl Args {
    /// Reads the command line; otherwise says what is wrong with it (2), or helps (0).
    pub fn from_command_line() -> Result<Args, ExitCode> {
        let words: Vec<String> =
            std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Args::from_args(&["hypersync-inspect"], &words).map_err(|exit| match exit.status {
            Ok(()) => {
                println!("{}", exit.output);
                ExitCode::SUCCESS
            }
            Err(()) => {
                eprintln!("{}\nTry hypersync-inspect --help.", exit.output.trim_end());
                ExitCode::from(2)
            }
        })
    }
}
