//! Settings of conntrack in this network namespace, as far as hypersync needs them.
//!
//! Two settings must have a certain value for restored connections to work; they are set at
//! the start and put back at the end. The others are read: the table's limit, and the timeouts
//! that the kernel would have given a connection.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::KernelError;
use crate::conn::Connection;
use crate::conn::tuple::{ICMP, ICMPV6, TCP, UDP, UDPLITE};

/// Which connections raise events: 0 none, 1 all, 2 those that are born while somebody listens.
pub const EVENTS: &str = "net.netfilter.nf_conntrack_events";

/// What restored connections need.
///
/// - `nf_conntrack_events=1`: with the default, 2, a connection born while nobody listened
///   never raises an event, not even when it closes.
/// - `nf_conntrack_tcp_be_liberal=1`: TCP windows are not replicated, and a flow that moves to
///   another gateway and back would be judged by old ones.
pub const NEEDED: [(&str, u64); 2] = [(EVENTS, 1), ("net.netfilter.nf_conntrack_tcp_be_liberal", 1)];

/// Inserts stop when the table is this full, per cent: what is left is for the gateway's own traffic.
pub const FILL_MAX_PERCENT: u64 = 90;

fn path(name: &str) -> String {
    format!("/proc/sys/{}", name.replace('.', "/"))
}

/// Reads a numeric setting.
pub fn read(name: &'static str) -> Result<u64, KernelError> {
    let text = std::fs::read_to_string(path(name)).map_err(|e| failed(name, &e))?;
    text.trim().parse().map_err(|_| KernelError::Setting { name, errno: libc::EINVAL })
}

/// Writes a numeric setting.
pub fn write(name: &'static str, value: u64) -> Result<(), KernelError> {
    std::fs::write(path(name), value.to_string()).map_err(|e| failed(name, &e))
}

fn failed(name: &'static str, error: &io::Error) -> KernelError {
    KernelError::Setting { name, errno: error.raw_os_error().unwrap_or(libc::EIO) }
}

/// Settings that were changed, with their old values.
#[derive(Debug, Default)]
#[must_use = "the old values are lost with this"]
pub struct Changed(Vec<(&'static str, u64)>);

impl Changed {
    /// What was changed: name and old value.
    pub fn old_values(&self) -> &[(&'static str, u64)] {
        &self.0
    }

    /// Puts the old values back, in the network namespace of the calling thread.
    pub fn put_back(self) -> Result<(), KernelError> {
        // All of them, whatever becomes of one; the first error is told.
        self.0.into_iter().map(|(name, old)| write(name, old)).fold(Ok(()), Result::and)
    }
}

/// Gives every setting of [`NEEDED`] its value. If one cannot be set, those before it are put back.
pub fn set_needed() -> Result<Changed, KernelError> {
    let mut changed = Changed::default();
    for (name, value) in NEEDED {
        let set = read(name).and_then(|old| match old == value {
            true => Ok(None),
            false => write(name, value).map(|()| Some((name, old))),
        });
        match set {
            Ok(old) => changed.0.extend(old),
            Err(e) => {
                if let Err(again) = changed.put_back() {
                    log::warn!("{again}");
                }
                return Err(e);
            }
        }
    }
    Ok(changed)
}

/// Settings of [`NEEDED`] that have another value than they should: name and value now.
pub fn unmet() -> Result<Vec<(&'static str, u64)>, KernelError> {
    let mut unmet = Vec::new();
    for (name, value) in NEEDED {
        let now = read(name)?;
        if now != value {
            unmet.push((name, now));
        }
    }
    Ok(unmet)
}

/// TCP_CONNTRACK_ESTABLISHED.
const ESTABLISHED: usize = 3;

/// How full the kernel's table is. The files stay open: asking takes two reads.
#[derive(Debug)]
pub struct TableFill {
    limit: File,
    count: File,
}

impl TableFill {
    /// Opens the figures of the calling thread's network namespace.
    pub fn open() -> Result<TableFill, KernelError> {
        let open = |name| File::open(path(name)).map_err(|e| failed(name, &e));
        Ok(TableFill {
            limit: open("net.netfilter.nf_conntrack_max")?,
            count: open("net.netfilter.nf_conntrack_count")?,
        })
    }

    /// Entries that the kernel allows, and entries that there are.
    pub fn limit_and_count(&self) -> (u64, u64) {
        let number = |file: &File| {
            let mut text = [0; 24];
            let length = file.read_at(&mut text, 0).unwrap_or(0);
            std::str::from_utf8(&text[..length]).ok()?.trim().parse().ok()
        };
        (number(&self.limit).unwrap_or(0), number(&self.count).unwrap_or(0))
    }

    /// Entries that may still be inserted. A limit of 0 means that there is none.
    pub fn room(&self) -> u64 {
        match self.limit_and_count() {
            (0, _) => u64::MAX,
            (limit, count) => (limit * FILL_MAX_PERCENT / 100).saturating_sub(count),
        }
    }
}

/// The kernel's timeouts, seconds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Timeouts {
    tcp: [u32; 10], // by TCP_CONNTRACK_*
    udp: u32,
    udp_stream: u32,
    icmp: u32,
    icmpv6: u32,
    generic: u32,
}

impl Timeouts {
    /// What the kernel has; its own defaults for what cannot be read.
    pub fn read() -> Timeouts {
        let seconds = |name, default| match read(name) {
            Ok(seconds) => seconds.min(u32::MAX as u64) as u32,
            Err(e) => {
                log::debug!("{e} (taking {default} s)");
                default
            }
        };
        let syn_sent = seconds("net.netfilter.nf_conntrack_tcp_timeout_syn_sent", 120);
        Timeouts {
            tcp: [
                syn_sent, // NONE
                syn_sent,
                seconds("net.netfilter.nf_conntrack_tcp_timeout_syn_recv", 60),
                seconds("net.netfilter.nf_conntrack_tcp_timeout_established", 432_000),
                seconds("net.netfilter.nf_conntrack_tcp_timeout_fin_wait", 120),
                seconds("net.netfilter.nf_conntrack_tcp_timeout_close_wait", 60),
                seconds("net.netfilter.nf_conntrack_tcp_timeout_last_ack", 30),
                seconds("net.netfilter.nf_conntrack_tcp_timeout_time_wait", 120),
                seconds("net.netfilter.nf_conntrack_tcp_timeout_close", 10),
                syn_sent, // SYN_SENT2
            ],
            udp: seconds("net.netfilter.nf_conntrack_udp_timeout", 30),
            udp_stream: seconds("net.netfilter.nf_conntrack_udp_timeout_stream", 120),
            icmp: seconds("net.netfilter.nf_conntrack_icmp_timeout", 30),
            icmpv6: seconds("net.netfilter.nf_conntrack_icmpv6_timeout", 30),
            generic: seconds("net.netfilter.nf_conntrack_generic_timeout", 600),
        }
    }

    /// What the kernel gives a connection in this state when a packet of it passes.
    pub fn of(&self, connection: &Connection) -> u32 {
        let state = &connection.state;
        match connection.original.protocol {
            TCP => {
                // Offloaded flows are reported without their state: ASSURED means established.
                let assured = state.status & super::codec::status::ASSURED != 0;
                let known =
                    if state.tcp_state == 0 && assured { ESTABLISHED } else { state.tcp_state as usize };
                self.tcp.get(known).copied().unwrap_or(self.tcp[0])
            }
            UDP | UDPLITE if state.status & super::codec::status::ASSURED != 0 => self.udp_stream,
            UDP | UDPLITE => self.udp,
            ICMP => self.icmp,
            ICMPV6 => self.icmpv6,
            _ => self.generic,
        }
    }
}
