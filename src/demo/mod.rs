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
mod options;
pub mod process;
pub mod story;
pub mod table;

use std::io::Write;
use std::process::ExitCode;

pub use options::{DemoOptions, HOLD, MEMBERS, SHARDS, SURVIVORS, VICTIM};

use crate::load::interrupt;

/// Tells the story; success only if everything holds that it claims.
pub fn main(options: DemoOptions) -> ExitCode {
    if options.connections < 300 || options.connections > 10_000_000 || options.rate < 300 {
        eprintln!(
            "hypersync demo: it takes 300 to 10000000 connections and at least 300 events a second"
        );
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
