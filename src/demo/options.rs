//! What the demo is told, and what it takes for given.

use std::time::Duration;

use argh::FromArgs;

use crate::conn::MemberId;

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

/// Runs a group of three on this machine, kills one under load, and checks what became of its
/// connections.
#[derive(FromArgs, Clone, Debug)]
#[argh(subcommand, name = "demo")]
pub struct DemoOptions {
    /// connections that are open at any time, over the three members (default: 100000)
    #[argh(option, default = "100_000")]
    pub connections: usize,
    /// events a second: connections opened, changed and closed, over the three members
    /// (default: 24000)
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
