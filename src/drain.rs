//! Draining: `hypersync drain` asks the running process to leave the group, and says when it has
//! left and what was left behind. What it waits for is [`group::drain`](crate::group::drain)'s.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use argh::FromArgs;

use crate::config::DEFAULT_SHM;
use crate::counters::{Counter, Counters};
use crate::holder;

/// How often the process is looked at.
const PAUSE: Duration = Duration::from_millis(5);

/// Ends the member that runs here once its traffic has moved and everything has a copy, as SIGTERM
/// does, and says how that went.
#[derive(FromArgs, Clone, Debug)]
#[argh(subcommand, name = "drain")]
pub struct DrainOptions {
    /// directory of the shared memory (default /dev/shm/hypersync)
    #[argh(option, default = "PathBuf::from(DEFAULT_SHM)")]
    pub shm: PathBuf,
}

/// Runs `hypersync drain`. Exit status 0: it has left, and nothing was exposed.
pub fn main(options: &DrainOptions) -> ExitCode {
    holder::tell(ask(options))
}

/// Asks the running process to leave, and waits for its end: that has a limit of its own
/// (`--drain-limit` of `hypersync run`).
fn ask(options: &DrainOptions) -> Result<String, String> {
    let (pid, region) = holder::find(&options.shm, "drain")?;
    let header = *region.header();
    let asked = Instant::now();
    holder::signal(pid, libc::SIGTERM)?;
    while !holder::is_gone(pid) {
        std::thread::sleep(PAUSE);
    }
    // What it counted last stays in the memory.
    let shards = (0..header.sizes.shards).map(|shard| Counters::new(region.shard(shard).counters));
    let exposed: u64 = shards.map(|counters| counters.get(Counter::Exposure)).sum();
    let (member, lasted) = (header.member, asked.elapsed());
    match exposed {
        0 => Ok(format!("member {member} has left after {lasted:.1?}, and nothing was exposed")),
        _ => Err(format!(
            "member {member} has left after {lasted:.1?}; {exposed} connections had no copy: its log says why"
        )),
    }
}
