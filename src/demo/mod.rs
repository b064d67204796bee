//! `hypersync demo`: a group of three appliances on this machine, a death under load, and what
//! became of the connections.
//!
//! The appliances are real processes that talk over the loopback; the parent is their data plane
//! (through the ingest rings) and their auditor (through their shared memory, the dead one's too).
//! Reading order: [`story`] (what happens, in order), [`group`] (the three and their load),
//! [`figures`] (counters, summed), [`table`] and [`check`] (what must hold afterwards),
//! [`process`] (children and their directory).

pub mod check;
pub mod figures;
pub mod group;
pub mod process;
pub mod story;
pub mod table;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use argh::FromArgs;

use crate::conn::MemberId;
use crate::load::interrupt;

/// The members, by number.
pub const MEMBERS: [MemberId; 3] = [1, 2, 3];

/// Their shards.
pub const SHARDS: [u8; 3] = [2, 2, 3];

/// Which of them is killed: its place in [`MEMBERS`].
pub const VICTIM: usize = 1;

/// The two others.
pub const SURVIVORS: [usize; 2] = [0, 2];

/// The hold time that the appliances are given.
pub const HOLD: Duration = Duration::from_secs(3);

/// Runs a group of three on this machine, kills one under load, and checks what became of its connections.
#[derive(FromArgs, Clone, Debug)]
#[argh(subcommand, name = "demo")]
pub struct DemoOptions {
    /// connections that are open at any time, over the three members (default: 100000)
    #[argh(option, default = "100_000")]
    pub connections: usize,
    /// events a second: connections opened, changed and closed, over the three members (default: 24000)
    #[argh(option, default = "24_000")]
    pub rate: u32,
    /// everything random follows from this number (default: 1)
    #[argh(option, default = "1")]
    pub seed: u64,
    /// passed on to the appliances: how datagrams are sent
    #[argh(option)]
    pub send: Option<String>,
    /// passed on to the appliances: "none" for no optional kernel feature
    #[argh(option)]
    pub features: Option<String>,
    /// leave the directory with the memory and the logs behind
    #[argh(switch)]
    pub keep: bool,
}

/// Tells the story; success only if everything holds that it claims.
pub fn main(options: DemoOptions) -> ExitCode {
    if options.connections < 300 || options.connections > 10_000_000 || options.rate < 300 {
        eprintln!("hypersync demo: it takes 300 to 10000000 connections and at least 300 events a second");
        return ExitCode::from(2);
    }
    interrupt::catch();
    let mut out = std::io::stdout();
    match story::tell(&options, &mut out) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            let _ = out.flush();
            eprintln!("hypersync demo: {why}");
            ExitCode::FAILURE
        }
    }
}
