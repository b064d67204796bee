//! The timeouts that the kernel gives a connection when a packet of it passes: its settings in this
//! network namespace, as they are at the moment. They are read again a few at a time, without
//! waiting and without memory.

use std::fs::File;
use std::io::Read;

use super::codec::status;
use crate::conn::Connection;
use crate::conn::tuple::{DCCP, GRE, ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE};

/// TCP_CONNTRACK_ESTABLISHED.
const ESTABLISHED: usize = 3;

/// Where the settings are, and how their names begin.
const DIRECTORY: &str = "/proc/sys/net/netfilter/nf_conntrack_";

/// The settings, each with the kernel's own default.
macro_rules! settings {
    ($($name:literal: $default:literal,)*) => {
        [$((concat!("/proc/sys/net/netfilter/nf_conntrack_", $name), $default)),*]
    };
}

const SETTINGS: [(&str, u32); COUNT] = settings![
    // TCP_CONNTRACK_SYN_SENT and so on.
    "tcp_timeout_syn_sent": 120,
    "tcp_timeout_syn_recv": 60,
    "tcp_timeout_established": 432_000,
    "tcp_timeout_fin_wait": 120,
    "tcp_timeout_close_wait": 60,
    "tcp_timeout_last_ack": 30,
    "tcp_timeout_time_wait": 120,
    "tcp_timeout_close": 10,
    // Whatever the state: of what is sent again and again, or not acknowledged.
    "tcp_timeout_max_retrans": 300,
    "tcp_timeout_unacknowledged": 300,
    // SCTP_CONNTRACK_CLOSED and so on.
    "sctp_timeout_closed": 10,
    "sctp_timeout_cookie_wait": 3,
    "sctp_timeout_cookie_echoed": 3,
    "sctp_timeout_established": 210,
    "sctp_timeout_shutdown_sent": 3,
    "sctp_timeout_shutdown_recd": 3,
    "sctp_timeout_shutdown_ack_sent": 3,
    "sctp_timeout_heartbeat_sent": 30,
    // CT_DCCP_REQUEST and so on.
    "dccp_timeout_request": 240,
    "dccp_timeout_respond": 480,
    "dccp_timeout_partopen": 480,
    "dccp_timeout_open": 43_200,
    "dccp_timeout_closereq": 64,
    "dccp_timeout_closing": 64,
    "dccp_timeout_timewait": 240,
    "gre_timeout": 30,
    "gre_timeout_stream": 180,
    "udp_timeout": 30,
    "udp_timeout_stream": 120,
    "icmp_timeout": 30,
    "icmpv6_timeout": 30,
    "generic_timeout": 600,
];

const COUNT: usize = 32;
/// Where the settings of a protocol begin: those of its first state, 1.
const TCP_FIRST: usize = 0;
const SCTP_FIRST: usize = 10;
const DCCP_FIRST: usize = 18;
const GRE_FIRST: usize = 25;
const UDP_FIRST: usize = 27;
const ICMP_AT: usize = 29;
const ICMPV6_AT: usize = 30;
const GENERIC: usize = 31;

/// What the kernel gives a flow that it hands to a flowtable, if it has less than half of that
/// (NF_CT_DAY), seconds.
const OFFLOADED_S: u32 = 24 * 3600;

/// The kernel's timeouts, seconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    seconds: [u32; COUNT],
    /// What those of TCP were before they changed; entries may still have that. Beyond so many, the
    /// longest is kept and nothing more is told of the youngest.
    before: [u32; BEFORE_MAX],
    befores: usize,
    next: usize,
}

/// Changes of TCP's timeouts that are remembered.
const BEFORE_MAX: usize = 32;

impl Timeouts {
    /// What the kernel has; its own defaults for what cannot be read.
    pub fn read() -> Timeouts {
        let read = |(path, default)| number(path).unwrap_or(default);
        Timeouts::new(SETTINGS.map(read))
    }

    /// What somebody says of each setting, by its name behind `nf_conntrack_`; the kernel's own
    /// defaults for the rest.
    pub fn told(by: &dyn Fn(&str) -> Option<u32>) -> Timeouts {
        let told = |(path, default): (&'static str, u32)| {
            by(path.trim_start_matches(DIRECTORY)).unwrap_or(default)
        };
        Timeouts::new(SETTINGS.map(told))
    }

    fn new(seconds: [u32; COUNT]) -> Timeouts {
        Timeouts { seconds, before: [0; BEFORE_MAX], befores: 0, next: 0 }
    }

    /// What they are now.
    pub fn set(&mut self, now: &Timeouts) {
        (0..COUNT).for_each(|setting| self.set_one(setting, now.seconds[setting]));
    }

    fn set_one(&mut self, setting: usize, seconds: u32) {
        let old = std::mem::replace(&mut self.seconds[setting], seconds);
        let is_tcp = (TCP_FIRST..SCTP_FIRST).contains(&setting);
        if old == seconds || !is_tcp || self.before[..self.befores.min(BEFORE_MAX)].contains(&old) {
            return;
        }
        match self.before.get_mut(self.befores) {
            Some(before) => *before = old,
            None => self.before[0] = self.before[0].max(old),
        }
        self.befores = (self.befores + 1).min(BEFORE_MAX + 1);
    }

    /// Reads so many of them again, in turn.
    pub fn read_again(&mut self, count: usize) {
        for _ in 0..count {
            let (path, default) = SETTINGS[self.next];
            self.set_one(self.next, number(path).unwrap_or(default));
            self.next = (self.next + 1) % COUNT;
        }
    }

    /// What the kernel gives a connection in this state when a packet of it passes.
    pub fn of(&self, connection: &Connection) -> u32 {
        let state = &connection.state;
        let is_assured = state.status & status::ASSURED != 0;
        let by_state = |first: usize, states: usize| match connection.extra.protoinfo.state as usize
        {
            state if (1..=states).contains(&state) => first + state - 1,
            // A state that was never reported.
            _ => GENERIC,
        };
        self.seconds[match connection.original.protocol {
            TCP => {
                // Offloaded flows are reported without their state: ASSURED means established.
                let known = if state.tcp_state == 0 && is_assured {
                    ESTABLISHED
                } else {
                    state.tcp_state as usize
                };
                // NONE and SYN_SENT2 are like SYN_SENT.
                if (1..=8).contains(&known) { TCP_FIRST + known - 1 } else { TCP_FIRST }
            }
            UDP | UDPLITE => UDP_FIRST + is_assured as usize,
            ICMP => ICMP_AT,
            ICMPV6 => ICMPV6_AT,
            SCTP => by_state(SCTP_FIRST, 8),
            DCCP => by_state(DCCP_FIRST, 7),
            GRE => GRE_FIRST + is_assured as usize,
            _ => GENERIC,
        }]
    }

    /// The longest that the kernel gives a TCP connection: what an entry lacks of it is the age of
    /// its last packet, at most.
    pub fn longest_tcp_s(&self) -> u32 {
        self.of_tcp().max().unwrap_or(0)
    }

    /// What a TCP connection's entry may have been given, whatever its state.
    fn of_tcp(&self) -> impl Iterator<Item = u32> {
        let before = &self.before[..self.befores.min(BEFORE_MAX)];
        self.seconds[TCP_FIRST..SCTP_FIRST].iter().chain(before).copied()
    }

    /// So many seconds ago, at least, the last packet passed this connection's entry, which has
    /// `left_s` left, as that packet left it. 0 if nothing can be said.
    ///
    /// (The packet gave it the timeout of the state that it was in then, or the one of data that is
    /// not acknowledged. Of what is in a flowtable packets pass that leave nothing. Other entries
    /// than those of TCP run out soon.)
    pub fn youngest_s(&self, entry: &Connection, left_s: u32) -> u32 {
        if entry.original.protocol != TCP
            || entry.state.status & status::OFFLOADED != 0
            || self.befores > BEFORE_MAX
        {
            return 0;
        }
        let given = self.of_tcp().chain([OFFLOADED_S]);
        given.filter_map(|timeout_s| timeout_s.checked_sub(left_s)).min().unwrap_or(0)
    }
}

/// The number in a file of /proc/sys, whose reading never waits.
fn number(path: &str) -> Option<u32> {
    let mut text = [0; 24];
    let length = File::open(path).and_then(|mut file| file.read(&mut text)).ok()?;
    let seconds: u64 = std::str::from_utf8(&text[..length]).ok()?.trim().parse().ok()?;
    Some(seconds.min(u32::MAX as u64) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::extra::{Extra, ProtoInfo};
    use crate::conn::{State, Tuple};

    #[test]
    fn every_state_has_its_own_setting() {
        let timeouts = Timeouts::new(std::array::from_fn(|i| 1000 + i as u32));
        let setting = |protocol: u8, tcp_state: u8, status: u32, state: u8| {
            let original = Tuple {
                protocol,
                ..Tuple::v4(TCP, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2))
            };
            let of = State { tcp_state, status, ..State::default() };
            let mut connection = Connection::new(original, original.mirrored(), of);
            connection.extra =
                Extra { protoinfo: ProtoInfo { state, ..ProtoInfo::default() }, ..Extra::NONE };
            let (path, _) = SETTINGS[timeouts.of(&connection) as usize - 1000];
            path.trim_start_matches(DIRECTORY)
        };
        for (tcp_state, name) in [
            (0, "syn_sent"),
            (1, "syn_sent"),
            (2, "syn_recv"),
            (3, "established"),
            (4, "fin_wait"),
            (5, "close_wait"),
            (6, "last_ack"),
            (7, "time_wait"),
            (8, "close"),
            (9, "syn_sent"),
            (200, "syn_sent"),
        ] {
            assert_eq!(setting(TCP, tcp_state, 0, 0), format!("tcp_timeout_{name}"));
        }
        assert_eq!(setting(TCP, 0, status::ASSURED, 0), "tcp_timeout_established");
        for (protocol, state, name) in [
            (SCTP, 1, "sctp_timeout_closed"),
            (SCTP, 4, "sctp_timeout_established"),
            (SCTP, 8, "sctp_timeout_heartbeat_sent"),
            (SCTP, 0, "generic_timeout"),
            (SCTP, 9, "generic_timeout"),
            (DCCP, 1, "dccp_timeout_request"),
            (DCCP, 7, "dccp_timeout_timewait"),
            (DCCP, 8, "generic_timeout"),
            (UDP, 0, "udp_timeout"),
            (GRE, 0, "gre_timeout"),
            (ICMP, 0, "icmp_timeout"),
            (ICMPV6, 0, "icmpv6_timeout"),
            (50, 0, "generic_timeout"),
        ] {
            assert_eq!(setting(protocol, 0, 0, state), name);
        }
        assert_eq!(setting(UDPLITE, 0, status::ASSURED, 0), "udp_timeout_stream");
        assert_eq!(setting(GRE, 0, status::ASSURED, 0), "gre_timeout_stream");
    }

    #[test]
    fn an_entry_tells_how_old_its_last_packet_is_at_least_and_at_most() {
        let established = |seconds: u32| {
            Timeouts::told(&|name| (name == "tcp_timeout_established").then_some(seconds))
        };
        let of = |protocol, status| {
            let original = Tuple {
                protocol,
                ..Tuple::v4(TCP, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2))
            };
            let state = State { status, ..State::default() };
            Connection::new(original, original.mirrored(), state)
        };
        let mut timeouts = established(432_000);
        for (left_s, youngest_s) in [
            (432_000, 0),
            (431_000, 1000),
            (432_001, 0), // What nobody gives here.
            (290, 10),    // Perhaps its data was not acknowledged.
            (119, 1),
            (86_000, 400), // Perhaps it was in a flowtable.
        ] {
            assert_eq!(timeouts.youngest_s(&of(TCP, 0), left_s), youngest_s, "{left_s}");
            assert_eq!(timeouts.youngest_s(&of(TCP, status::OFFLOADED), left_s), 0);
            assert_eq!(timeouts.youngest_s(&of(UDP, 0), left_s), 0);
        }
        assert_eq!(timeouts.longest_tcp_s(), 432_000);
        timeouts.set(&established(3600));
        timeouts.set(&established(3600));
        assert_eq!(timeouts.youngest_s(&of(TCP, 0), 431_000), 1000, "from before");
        assert_eq!(timeouts.youngest_s(&of(TCP, 0), 3000), 600);
        assert_eq!(timeouts.longest_tcp_s(), 432_000, "some entries were given that");
    }

    /// What an entry was given may be of any time since the start; if that is too much to remember,
    /// nothing is said of how young its last packet can be.
    #[test]
    fn every_setting_since_the_start_counts() {
        let mut timeouts = Timeouts::told(&|_| None);
        let original = Tuple::v4(TCP, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2));
        let entry = Connection::new(original, original.mirrored(), State::default());
        let set = |timeouts: &mut Timeouts, seconds: u32| {
            let name = "tcp_timeout_established";
            timeouts.set(&Timeouts::told(&|of| (of == name).then_some(seconds)));
        };
        [3600, 7200, 432_000].iter().for_each(|seconds| set(&mut timeouts, *seconds));
        assert_eq!(timeouts.youngest_s(&entry, 3590), 10);
        assert_eq!(timeouts.youngest_s(&entry, 7000), 200);
        (0..BEFORE_MAX as u32).for_each(|n| set(&mut timeouts, 500_000 + n));
        assert_eq!(timeouts.youngest_s(&entry, 3590), 0);
        assert_eq!(timeouts.longest_tcp_s(), 500_000 + BEFORE_MAX as u32 - 1);
    }
}
