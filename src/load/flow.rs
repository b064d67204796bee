//! A flow: one made-up connection, and every state that it had lately.
//!
//! Each change gives it a fresh random mark, and everything else that changes (TCP flags,
//! timeout) follows from the mark. So a mark found in a table says which state of the connection
//! that was, and all its fields can be checked against it.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::rng::Rng;
use crate::conn::tuple::{TCP, UDP};
use crate::conn::{Connection, State, Tuple};

/// States that a flow remembers, the present one among them.
pub const MARKS: usize = 16;

/// Destination port of short-lived connections: a scan of a table can tell them.
pub const SHORT_PORT: u16 = 8080;

/// Destination port of all others.
pub const LONG_PORT: u16 = 443;

/// Source ports of one made-up client; then the next client follows.
const PORTS: u64 = 60_000;

/// `IPS_SEEN_REPLY | IPS_ASSURED | IPS_CONFIRMED`.
const STATUS: u32 = 1 << 1 | 1 << 2 | 1 << 3;
/// `IPS_SRC_NAT | IPS_SRC_NAT_DONE | IPS_DST_NAT_DONE`.
const STATUS_NAT: u32 = 1 << 4 | 1 << 7 | 1 << 8;

/// A connection that is open.
#[derive(Clone, Debug)]
pub struct Flow {
    /// The direction that opened it.
    pub original: Tuple,
    /// The other, translated or not.
    pub reply: Tuple,
    /// Whether it closes well within the hold time.
    pub is_short: bool,
    /// When it opened, since the start of the load.
    pub opened: Duration,
    marks: [u32; MARKS],
    changes: u32,
}

/// Whether a tuple belongs to a short-lived connection.
pub fn is_short(original: &Tuple) -> bool {
    original.dport == SHORT_PORT
}

/// What a new flow is like besides its number.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// Closes well within the hold time.
    pub is_short: bool,
    /// Its source is translated.
    pub is_nat: bool,
    /// IPv6.
    pub is_v6: bool,
    /// TCP; otherwise UDP.
    pub is_tcp: bool,
}

impl Flow {
    /// Flow number `n` of data plane `plane`. No two numbers or planes share an original or a reply
    /// tuple: client and source port name the number, the second byte of the address names the
    /// plane.
    pub fn new(plane: u8, n: u64, traits: Traits, opened: Duration, rng: &mut Rng) -> Flow {
        let protocol = if traits.is_tcp { TCP } else { UDP };
        let port = 1024 + (n % PORTS) as u16;
        let client = (n / PORTS) as u16;
        let [high, low] = client.to_be_bytes();
        let server = rng.below(1 << 16) as u16;
        let dport = if traits.is_short { SHORT_PORT } else { LONG_PORT };
        let (original, outside) = if traits.is_v6 {
            let of = |prefix, x| Ipv6Addr::new(prefix, 0xdb8, plane as u16, 0, 0, 0, 0, x);
            let original = Tuple::v6(
                protocol,
                (of(0x2001, client), port),
                (of(0x2001, server | 0x8000), dport),
            );
            (original, u128::from(of(0xfd00, client)))
        } else {
            let [s1, s0] = server.to_be_bytes();
            let source = Ipv4Addr::new(10, plane, high, low);
            let original =
                Tuple::v4(protocol, (source, port), (Ipv4Addr::new(198, 18, s1, s0), dport));
            (original, u32::from(Ipv4Addr::new(100, plane, high, low)) as u128)
        };
        let mut reply = original.mirrored();
        if traits.is_nat {
            reply.dst = outside;
        }
        let mut marks = [0; MARKS];
        marks[0] = rng.next_u64() as u32;
        Flow { original, reply, is_short: traits.is_short, opened, marks, changes: 0 }
    }

    /// Gives it another state.
    pub fn change(&mut self, rng: &mut Rng) {
        let old = self.mark();
        let mark = loop {
            match rng.next_u64() as u32 {
                mark if mark == old => {}
                mark => break mark,
            }
        };
        self.changes += 1;
        self.marks[self.changes as usize % MARKS] = mark;
    }

    /// The mark it has now.
    pub fn mark(&self) -> u32 {
        self.marks[self.changes as usize % MARKS]
    }

    /// Whether it has this mark, or had it as one of the last [`MARKS`].
    pub fn had(&self, mark: u32) -> bool {
        self.marks[..MARKS.min(self.changes as usize + 1)].contains(&mark)
    }

    /// What an appliance should hold of it now.
    pub fn connection(&self) -> Connection {
        self.connection_at(self.mark())
    }

    /// What an appliance should have held of it when it had this mark.
    pub fn connection_at(&self, mark: u32) -> Connection {
        let is_nat = self.reply != self.original.mirrored();
        let status = if is_nat { STATUS | STATUS_NAT } else { STATUS };
        let state = if self.original.protocol == TCP {
            State {
                status,
                tcp_state: 3, // TCP_CONNTRACK_ESTABLISHED
                tcp_scale: 0x77,
                tcp_flags_original: 0x03 | (mark & 0x8) as u8, // WINDOW_SCALE, SACK_PERM, maybe BE_LIBERAL
                tcp_flags_reply: 0x03 | (mark >> 1 & 0x8) as u8,
                timeout_s: 432_000 - (mark >> 8) % 1000,
                mark,
            }
        } else {
            State { status, timeout_s: 120 - (mark >> 8) % 60, mark, ..State::default() }
        };
        Connection::new(self.original, self.reply, state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_remembers_its_last_sixteen_states() {
        let traits = Traits { is_short: false, is_nat: true, is_v6: false, is_tcp: true };
        let mut rng = Rng::new(1);
        let mut flow = Flow::new(3, 7, traits, Duration::ZERO, &mut rng);
        assert!(!flow.had(0), "an unused entry is no mark");
        let first = flow.mark();
        for _ in 0..MARKS - 1 {
            flow.change(&mut rng);
        }
        assert!(flow.had(first));
        flow.change(&mut rng);
        assert!(!flow.had(first) && flow.had(flow.mark()));
        assert!(flow.connection().is_translated());
    }

    #[test]
    fn no_two_flows_share_a_tuple_in_either_direction() {
        let mut rng = Rng::new(2);
        let mut seen = std::collections::HashSet::new();
        for plane in 1..4 {
            for n in (0..130_000).step_by(7) {
                let traits = Traits {
                    is_short: rng.chance(30),
                    is_nat: rng.chance(20),
                    is_v6: rng.chance(10),
                    is_tcp: rng.chance(80),
                };
                let flow = Flow::new(plane, n, traits, Duration::ZERO, &mut rng);
                assert!(seen.insert(flow.original) && seen.insert(flow.reply));
            }
        }
    }
}
