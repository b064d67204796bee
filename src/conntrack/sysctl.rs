//! Settings of conntrack in this network namespace, as far as hypersync needs them.
//!
//! Two settings must have a certain value for restored connections to work; they are set at
//! the start and put back at the end, by the next run if this one is killed
//! ([`OldValues`] remembers). The others are read: the table's limit, and the timeouts that
//! the kernel would have given a connection.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{KernelError, netlink};
use crate::conn::Connection;
use crate::conn::tuple::{DCCP, GRE, ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE};
use crate::shm::old_values::{OldValues, SYSCTLS};

/// Which connections raise events: 0 none, 1 all, 2 those that are born while somebody listens.
pub const EVENTS: &str = "net.netfilter.nf_conntrack_events";

/// What restored connections need.
///
/// - `nf_conntrack_events=1`: with the default, 2, a connection born while nobody listened
///   never raises an event, not even when it closes.
/// - `nf_conntrack_tcp_be_liberal=1`: TCP windows are not replicated, and a flow that moves to
///   another gateway and back would be judged by old ones.
pub const NEEDED: [(&str, u64); 2] = [(EVENTS, 1), ("net.netfilter.nf_conntrack_tcp_be_liberal", 1)];

const _: () = assert!(NEEDED.len() == SYSCTLS);

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

/// Settings that must be put back; what they were is in the record.
#[derive(Debug)]
#[must_use = "the settings stay changed without"]
pub struct Changed<'r>(OldValues<'r>);

impl Changed<'_> {
    /// Puts the old values back, in the network namespace of the calling thread, and strikes them out.
    pub fn put_back(self) -> Result<(), KernelError> {
        // All of them, whatever becomes of one; the first error is told.
        let put_back = |(i, (name, _)): (usize, &(&'static str, u64))| match self.0.get(i) {
            None => Ok(()),
            Some(old) => write(name, old).map(|()| self.0.set(i, None)),
        };
        NEEDED.iter().enumerate().map(put_back).fold(Ok(()), Result::and)
    }
}

/// Gives every setting of [`NEEDED`] its value in the network namespace of the calling thread. What it was is
/// recorded first; or it was by a run that a crash kept from putting it back, and then that counts. If one
/// cannot be set, those before it are put back.
pub fn set_needed(record: OldValues<'_>) -> Result<Changed<'_>, KernelError> {
    let here = netlink::namespace_cookie()?;
    if record.namespace() != here {
        for (i, (name, _)) in NEEDED.iter().enumerate() {
            if let Some(old) = record.get(i) {
                log::warn!(
                    "an earlier run left sysctl {name} changed in another network namespace: it was {old} there"
                );
            }
        }
        record.begin(here);
    }
    for (i, (name, value)) in NEEDED.into_iter().enumerate() {
        if let Err(e) = set(record, i, name, value) {
            if let Err(again) = Changed(record).put_back() {
                log::warn!("{again}");
            }
            return Err(e);
        }
    }
    Ok(Changed(record))
}

fn set(record: OldValues<'_>, i: usize, name: &'static str, value: u64) -> Result<(), KernelError> {
    let now = read(name)?;
    match record.get(i) {
        Some(old) if now == value => {
            log::info!("an earlier run did not put sysctl {name} back: it will be {old} again at the end");
            Ok(())
        }
        _ if now == value => Ok(()),
        _ => {
            record.set(i, Some(now));
            // What could not be changed is not to be put back either.
            write(name, value).inspect_err(|_| record.set(i, None))
        }
    }
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
    sctp: [u32; 9], // by SCTP_CONNTRACK_*
    dccp: [u32; 8], // by CT_DCCP_*
    gre: u32,
    gre_stream: u32,
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
            sctp: [
                0, // NONE: see `of`
                seconds("net.netfilter.nf_conntrack_sctp_timeout_closed", 10),
                seconds("net.netfilter.nf_conntrack_sctp_timeout_cookie_wait", 3),
                seconds("net.netfilter.nf_conntrack_sctp_timeout_cookie_echoed", 3),
                seconds("net.netfilter.nf_conntrack_sctp_timeout_established", 210),
                seconds("net.netfilter.nf_conntrack_sctp_timeout_shutdown_sent", 3),
                seconds("net.netfilter.nf_conntrack_sctp_timeout_shutdown_recd", 3),
                seconds("net.netfilter.nf_conntrack_sctp_timeout_shutdown_ack_sent", 3),
                seconds("net.netfilter.nf_conntrack_sctp_timeout_heartbeat_sent", 30),
            ],
            dccp: [
                0, // NONE: see `of`
                seconds("net.netfilter.nf_conntrack_dccp_timeout_request", 240),
                seconds("net.netfilter.nf_conntrack_dccp_timeout_respond", 480),
                seconds("net.netfilter.nf_conntrack_dccp_timeout_partopen", 480),
                seconds("net.netfilter.nf_conntrack_dccp_timeout_open", 43_200),
                seconds("net.netfilter.nf_conntrack_dccp_timeout_closereq", 64),
                seconds("net.netfilter.nf_conntrack_dccp_timeout_closing", 64),
                seconds("net.netfilter.nf_conntrack_dccp_timeout_timewait", 240),
            ],
            gre: seconds("net.netfilter.nf_conntrack_gre_timeout", 30),
            gre_stream: seconds("net.netfilter.nf_conntrack_gre_timeout_stream", 180),
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
        let is_assured = state.status & super::codec::status::ASSURED != 0;
        let by_state = |timeouts: &[u32]| match timeouts.get(connection.extra.protoinfo.state as usize) {
            // A state that was never reported.
            Some(0) | None => self.generic,
            Some(seconds) => *seconds,
        };
        match connection.original.protocol {
            TCP => {
                // Offloaded flows are reported without their state: ASSURED means established.
                let known =
                    if state.tcp_state == 0 && is_assured { ESTABLISHED } else { state.tcp_state as usize };
                self.tcp.get(known).copied().unwrap_or(self.tcp[0])
            }
            UDP | UDPLITE if is_assured => self.udp_stream,
            UDP | UDPLITE => self.udp,
            ICMP => self.icmp,
            ICMPV6 => self.icmpv6,
            SCTP => by_state(&self.sctp),
            DCCP => by_state(&self.dccp),
            GRE if is_assured => self.gre_stream,
            GRE => self.gre,
            _ => self.generic,
        }
    }
}
