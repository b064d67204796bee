//! What `hypersync run` is told, checked. Every error is one line that says what to do.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use argh::FromArgs;

use crate::limits::{
    ARENA_MAX, ARENA_MIN, EVENT_BUFFER_MAX, EVENT_BUFFER_MIN, INGEST_RECORDS_MAX,
    INGEST_RECORDS_MIN, MEMBERS_MAX, PEERS_MAX, SHARDS_MAX, SLOTS_MAX, SLOTS_MIN,
};
use crate::memory::MemorySize;
use crate::net::{ScopedAddress, SendMode};
use crate::ring::Features;
use crate::rules::Rules;
use crate::shm::Sizes;
use crate::source::CommitMode;

/// Exit code of bad usage: nothing was started, nothing is damaged.
pub const EXIT_USAGE: u8 = 2;

/// The directory of the shared memory if none is given.
pub const DEFAULT_SHM: &str = "/dev/shm/hypersync";

/// The multicast group if neither it nor peers are given.
pub const DEFAULT_MULTICAST: IpAddr = IpAddr::V4(Ipv4Addr::new(224, 0, 0, 116));

/// Runs a member of the group. Times are written as 100ms, 3s or 2min.
#[derive(FromArgs, Clone, Debug)]
#[argh(subcommand, name = "run")]
pub struct RunOptions {
    /// the group's number, 1 to 65535; members of other groups are not heard (default 1)
    #[argh(option, default = "1")]
    pub group: u16,
    /// this member's number in the group, 1 to 52
    #[argh(option)]
    pub member: u8,
    /// this member's address on the sync link; a link-local one with --interface or as
    /// fe80::1%INTERFACE
    #[argh(option)]
    pub sync: ScopedAddress,
    /// the sync link's interface (default: the one that has the sync address)
    #[argh(option)]
    pub interface: Option<String>,
    /// multicast group of the heartbeats (default 224.0.0.116 unless peers are given)
    #[argh(option)]
    pub multicast: Option<ScopedAddress>,
    /// sync address of another member; once for each of them, in place of multicast
    #[argh(option)]
    pub peer: Vec<ScopedAddress>,
    /// threads, each with its slice of the table, 1 to 64; members may differ (default: processors,
    /// at most 8)
    #[argh(option)]
    pub shards: Option<u8>,
    /// connections and copies that the table has room for, in all shards together (default 1000000)
    #[argh(option, default = "1_000_000")]
    pub capacity: usize,
    /// connections of these that may have labels, a helper or the like (default: one in eight)
    #[argh(option)]
    pub extras: Option<usize>,
    /// who tells of connections: kernel (conntrack) or ring (shared memory) (default kernel)
    #[argh(option, default = "SourceKind::Kernel")]
    pub source: SourceKind,
    /// when copies are written to this host's kernel: eager (at once), takeover (when their active
    /// has died) or off (default eager with the kernel source, off with the ring)
    #[argh(option)]
    pub commit: Option<CommitMode>,
    /// how long a walk takes that asks the kernel for the entry of every copy, with --commit eager:
    /// 1s to 24h, or 0s for no walk (default 10m)
    #[argh(option, default = "Duration::from_secs(600)", from_str_fn(span))]
    pub verify: Duration,
    /// what is copied: copy or skip, then conditions (see docs/OPERATIONS.md); repeatable, the
    /// first rule that matches decides
    #[argh(option)]
    pub rule: Vec<String>,
    /// file with further rules, one a line, tried after those of --rule
    #[argh(option)]
    pub rules: Option<PathBuf>,
    /// how long a connection must live before it is sent, 0s to 1h (default 3s)
    #[argh(option, default = "Duration::from_secs(3)", from_str_fn(span))]
    pub hold: Duration,
    /// time between heartbeats, 10ms to 10s (default 100ms)
    #[argh(option, default = "Duration::from_millis(100)", from_str_fn(span))]
    pub heartbeat: Duration,
    /// heartbeats that may be missing before a member is dead, 2 to 100 (default 3)
    #[argh(option, default = "3")]
    pub dead_after: u32,
    /// how long after a death its connections get new backups (default 2s)
    #[argh(option, default = "Duration::from_secs(2)", from_str_fn(span))]
    pub reprotect_after: Duration,
    /// priority as a backup, 0 to 255: the live member with the highest is preferred (default 100)
    #[argh(option, default = "100")]
    pub priority: u8,
    /// site of this member, 0 to 255: among equal priorities a backup at another site is preferred;
    /// 0 means that sites do not count (default 0)
    #[argh(option, default = "0")]
    pub site: u8,
    /// directory of the shared memory, on tmpfs (default /dev/shm/hypersync)
    #[argh(option, default = "PathBuf::from(DEFAULT_SHM)")]
    pub shm: PathBuf,
    /// begin with an empty table even if one is there that could be taken up again
    #[argh(switch)]
    pub new_table: bool,
    /// command to run as COMMAND EVENT MEMBER when something happens in the group
    #[argh(option)]
    pub notify: Option<PathBuf>,
    /// how long the command may run before it is killed (default 10s)
    #[argh(option, default = "Duration::from_secs(10)", from_str_fn(span))]
    pub notify_limit: Duration,
    /// how long a member that was told to end waits for its traffic to move and for everything to
    /// have a copy, 0s to 1h (default 10s)
    #[argh(option, default = "Duration::from_secs(10)", from_str_fn(span))]
    pub drain_limit: Duration,
    /// how datagrams are sent: fixed, zc, copy or auto (default auto)
    #[argh(option, default = "SendMode::Auto", from_str_fn(send_mode))]
    pub send: SendMode,
    /// send arena of a shard, bytes: what was sent lately stays in it (default 4194304)
    #[argh(option, default = "4 << 20")]
    pub arena: usize,
    /// records of a shard's ingest ring, a power of two (default 16384)
    #[argh(option, default = "16_384")]
    pub ring: usize,
    /// bytes of kernel events that may wait for one shard; an event takes about 1300
    /// (default 67108864)
    #[argh(option, default = "64 << 20")]
    pub event_buffer: usize,
    /// optional features of the kernel: all that it has, or none, for tests (default all)
    #[argh(option, default = "Features::all()", from_str_fn(features))]
    pub features: Features,
    /// the sysctls that restored connections need: set them (and put them back at the end) or leave
    /// them, with a warning (default set)
    #[argh(option, default = "SysctlMode::Set")]
    pub sysctl: SysctlMode,
}

/// Who tells of connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SourceKind {
    /// The kernel's conntrack.
    Kernel,
    /// The ingest ring in shared memory.
    Ring,
}

/// Whether hypersync sets sysctls.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SysctlMode {
    /// At the start, and back at the end.
    Set,
    /// Only warn.
    Leave,
}

macro_rules! words {
    ($type:ty, $what:literal, $($word:literal => $value:expr),+) => {
        impl std::str::FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<$type, String> {
                match text {
                    $($word => Ok($value),)+
                    _ => Err(format!(concat!("'{}' is not ", $what), text)),
                }
            }
        }
    };
}

words!(SourceKind, "a source: write kernel or ring", "kernel" => SourceKind::Kernel, "ring" => SourceKind::Ring);
words!(
    CommitMode, "a commit mode: write eager, takeover or off",
    "eager" => CommitMode::Eager, "takeover" => CommitMode::Takeover, "off" => CommitMode::Off
);
words!(SysctlMode, "a choice: write set or leave", "set" => SysctlMode::Set, "leave" => SysctlMode::Leave);

/// Reads a time; also for the restart.
pub fn span(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|e| format!("'{text}' is not a time: {e}; write it as 100ms, 3s or 2min"))
}

/// Reads a send mode; also for the demo.
pub fn send_mode(text: &str) -> Result<SendMode, String> {
    match text {
        "fixed" => Ok(SendMode::Fixed),
        "zc" => Ok(SendMode::ZeroCopy),
        "copy" => Ok(SendMode::Copy),
        "auto" => Ok(SendMode::Auto),
        _ => Err(format!("'{text}' is not a send mode: write fixed, zc, copy or auto")),
    }
}

/// Reads a set of kernel features; also for the demo.
pub fn features(text: &str) -> Result<Features, String> {
    match text {
        "all" => Ok(Features::all()),
        "none" => Ok(Features::none()),
        _ => Err(format!("'{text}' is not a set of features: write all or none")),
    }
}

/// The checked configuration of a member.
#[derive(Clone, Debug)]
pub struct Config {
    /// What was asked for.
    pub options: RunOptions,
    /// Threads.
    pub shards: u8,
    /// This member's address on the sync link.
    pub sync: IpAddr,
    /// The sync link's interface, if it was named in any way.
    pub interface: Option<String>,
    /// The peers that were named.
    pub peers: Vec<IpAddr>,
    /// The multicast group, if heartbeats go to one.
    pub multicast: Option<IpAddr>,
    /// When copies are written to the kernel.
    pub commit: CommitMode,
    /// What is copied.
    pub rules: Rules,
    /// Sizes of the shared memory.
    pub sizes: Sizes,
}

impl Config {
    /// Checks the options. An error is one line.
    pub fn check(options: RunOptions) -> Result<Config, String> {
        let o = &options;
        let within =
            |name: &str, value: u64, low: u64, high: u64| match (low..=high).contains(&value) {
                true => Ok(()),
                false => Err(format!("--{name} {value} is out of range: {low} to {high}")),
            };
        within("group", o.group as u64, 1, u16::MAX as u64)?;
        within("member", o.member as u64, 1, MEMBERS_MAX as u64)?;
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8) as u8;
        let shards = o.shards.unwrap_or(processors);
        within("shards", shards as u64, 1, SHARDS_MAX as u64)?;
        let lasting = |name: &str, value: Duration, low: Duration, high: Duration| {
            let shown = humantime::format_duration;
            match (low..=high).contains(&value) {
                true => Ok(()),
                false => Err(format!(
                    "--{name} {} is out of range: {} to {}",
                    shown(value),
                    shown(low),
                    shown(high)
                )),
            }
        };
        let hour = Duration::from_secs(3600);
        lasting("heartbeat", o.heartbeat, Duration::from_millis(10), Duration::from_secs(10))?;
        within("dead-after", o.dead_after as u64, 2, 100)?;
        lasting("notify-limit", o.notify_limit, Duration::from_millis(100), hour)?;
        lasting("drain-limit", o.drain_limit, Duration::ZERO, hour)?;
        if let Some(command) = &o.notify
            && !command.exists()
        {
            return Err(format!(
                "--notify {} does not exist: name a command that can be run",
                command.display()
            ));
        }
        lasting("hold", o.hold, Duration::ZERO, hour)?;
        lasting("reprotect-after", o.reprotect_after, Duration::ZERO, hour)?;
        if !o.verify.is_zero() {
            lasting("verify", o.verify, Duration::from_secs(1), 24 * hour)?;
        }
        within("arena", o.arena as u64, ARENA_MIN as u64, ARENA_MAX as u64)?;
        within("event-buffer", o.event_buffer as u64, EVENT_BUFFER_MIN, EVENT_BUFFER_MAX)?;
        within("ring", o.ring as u64, INGEST_RECORDS_MIN as u64, INGEST_RECORDS_MAX as u64)?;
        if !o.ring.is_power_of_two() {
            return Err(format!("--ring {} is no power of two", o.ring));
        }
        let highest = (SLOTS_MAX / 9 * 8) as u64 * shards as u64;
        within("capacity", o.capacity as u64, SLOTS_MIN as u64 * shards as u64, highest)?;
        if let Some(extras) = o.extras {
            within("extras", extras as u64, 1, o.capacity as u64)?;
        }
        let sync = o.sync.ip;
        if sync.is_unspecified() || sync.is_multicast() {
            return Err(format!("--sync {sync} is no address of this host"));
        }
        let interface = sync_interface(o)?;
        if o.peer.len() > PEERS_MAX {
            return Err(format!(
                "{} peers are too many: a group has at most {MEMBERS_MAX} members",
                o.peer.len()
            ));
        }
        if o.multicast.is_some() && !o.peer.is_empty() {
            return Err(
                "--multicast and --peer exclude each other: name the peers only where there is no multicast"
                    .into(),
            );
        }
        let peers: Vec<IpAddr> = o.peer.iter().map(|peer| peer.ip).collect();
        if let Some(address) = peers.iter().find(|a| **a == sync || a.is_ipv4() != sync.is_ipv4()) {
            return Err(format!(
                "--peer {address} does not fit --sync {sync}: another address of the same family"
            ));
        }
        let multicast = match o.multicast.as_ref().map(|group| group.ip) {
            Some(address) if !address.is_multicast() || address.is_ipv4() != sync.is_ipv4() => {
                return Err(format!(
                    "--multicast {address} is no multicast address of the family of --sync {sync}"
                ));
            }
            Some(address) => Some(address),
            None if !o.peer.is_empty() => None,
            None if sync.is_ipv4() => Some(DEFAULT_MULTICAST),
            None => {
                return Err(
                    "with an IPv6 --sync address, name --multicast (ff02::74, say) or every --peer"
                        .into(),
                );
            }
        };
        let commit = o.commit.unwrap_or(match o.source {
            SourceKind::Kernel => CommitMode::Eager,
            SourceKind::Ring => CommitMode::Off,
        });
        if commit != CommitMode::Off && o.source == SourceKind::Ring {
            return Err(
                "--commit needs --source kernel: the ring's connections are not this kernel's"
                    .into(),
            );
        }
        let rules = rules(o)?;
        // A shard's share is not exactly even, and slots are also leased ahead: an eighth more.
        let with_reserve = |all: usize, least: usize| {
            let share = all.div_ceil(shards as usize);
            share + share / 8 + least
        };
        let slots = with_reserve(o.capacity, 256).min(SLOTS_MAX);
        let mut memory = MemorySize::new(slots, o.arena.next_multiple_of(4096));
        if let Some(extras) = o.extras {
            memory.extras = with_reserve(extras, 32).min(slots);
        }
        Ok(Config {
            shards,
            sync,
            interface,
            peers,
            multicast,
            commit,
            rules,
            sizes: Sizes { shards, memory, ring_records: o.ring },
            options,
        })
    }
}

/// The name of the sync link's interface: that of `--interface`, and of whatever stands behind a
/// `%`.
fn sync_interface(options: &RunOptions) -> Result<Option<String>, String> {
    let addresses = [("--sync", &options.sync)].into_iter();
    let addresses = addresses.chain(options.multicast.iter().map(|group| ("--multicast", group)));
    let addresses = addresses.chain(options.peer.iter().map(|peer| ("--peer", peer)));
    let named = options.interface.iter().map(|name| (format!("--interface {name}"), name));
    let scopes = addresses
        .filter_map(|(flag, address)| Some((format!("{flag} {address}"), address.scope.as_ref()?)));
    let mut all = named.chain(scopes);
    let Some((first, interface)) = all.next() else { return Ok(None) };
    match all.find(|(_, name)| *name != interface) {
        None => Ok(Some(interface.clone())),
        Some((other, _)) => Err(format!(
            "{first} and {other} contradict each other: the sync link is one interface"
        )),
    }
}

fn rules(options: &RunOptions) -> Result<Rules, String> {
    let mut rules = Rules::default();
    for rule in &options.rule {
        rules.add(rule).map_err(|e| format!("--rule: {e}"))?;
    }
    if let Some(file) = &options.rules {
        let named = |e: &dyn std::fmt::Display| format!("--rules {}: {e}", file.display());
        let text = std::fs::read_to_string(file).map_err(|e| named(&e))?;
        rules.add_lines(&text).map_err(|e| named(&e))?;
    }
    if options.source == SourceKind::Ring && rules.uses_addresses() {
        return Err(
            "rules with address or local need --source kernel: the ring's connections are not \
                    this host's"
                .into(),
        );
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(extra: &[&str]) -> Result<Config, String> {
        let mut words = vec!["--member", "1", "--sync", "10.9.0.1"];
        words.extend(extra);
        let options = RunOptions::from_args(&["hypersync", "run"], &words).map_err(|e| e.output)?;
        Config::check(options)
    }

    #[test]
    fn defaults_are_those_of_the_manual() {
        let config = check(&[]).unwrap();
        assert_eq!(config.multicast, Some(DEFAULT_MULTICAST));
        assert_eq!(config.commit, CommitMode::Eager);
        assert_eq!(config.options.hold, Duration::from_secs(3));
        let ring = check(&["--source", "ring", "--peer", "10.9.0.2"]).unwrap();
        assert_eq!((ring.multicast, ring.commit), (None, CommitMode::Off));
        let rare = |words: &[&str]| {
            let memory = check(&[words, &["--shards", "2", "--capacity", "8000"]].concat())
                .unwrap()
                .sizes
                .memory;
            (memory.capacity, memory.extras)
        };
        assert_eq!(rare(&[]), (4756, 595), "one in eight");
        assert_eq!(rare(&["--extras", "1"]), (4756, 33));
        assert_eq!(rare(&["--extras", "8000"]), (4756, 4532));
    }

    #[test]
    fn every_flag_out_of_range_is_named() {
        for (flag, value) in [
            ("--member", "0"),
            ("--member", "53"),
            ("--shards", "65"),
            ("--shards", "0"),
            ("--capacity", "1"),
            ("--extras", "0"),
            ("--extras", "1000001"),
            ("--heartbeat", "1ms"),
            ("--heartbeat", "fast"),
            ("--verify", "1ms"),
            ("--verify", "2days"),
            ("--dead-after", "1"),
            ("--arena", "4096"),
            ("--ring", "1000"),
            ("--event-buffer", "1000"),
            ("--sync", "0.0.0.0"),
            ("--multicast", "10.0.0.1"),
            ("--multicast", "ff02::74"),
            ("--peer", "10.9.0.1"),
            ("--peer", "::1"),
            ("--source", "disk"),
            ("--commit", "later"),
            ("--send", "slow"),
            ("--features", "some"),
            ("--rule", "allow"),
            ("--rules", "/nosuch/rules"),
        ] {
            let error = match flag {
                // Given twice it would be refused for that.
                "--member" | "--sync" => {
                    let mut words = vec!["--member", "1", "--sync", "10.9.0.1"];
                    let at = words.iter().position(|w| *w == flag).unwrap();
                    words[at + 1] = value;
                    let options = RunOptions::from_args(&["hypersync", "run"], &words);
                    options.map_err(|e| e.output).and_then(|o| Config::check(o).map(|_| ()))
                }
                _ => check(&[flag, value]).map(|_| ()),
            };
            let error = error.expect_err(flag);
            assert!(
                error.contains(value) || error.contains("multicast"),
                "{flag} {value}: {error}"
            );
        }
    }
}
