//! The timeouts that the kernel gives a connection when a packet of it passes.

use super::codec::status;
use super::sysctl::read;
use crate::conn::Connection;
use crate::conn::tuple::{DCCP, GRE, ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE};

/// TCP_CONNTRACK_ESTABLISHED.
const ESTABLISHED: usize = 3;

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
        let is_assured = state.status & status::ASSURED != 0;
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
