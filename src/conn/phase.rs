//! What a connection's state says about its end.
//!
//! The kernel keeps an entry for minutes after its connection has ended: what is still in its table
//! is not alive for that. The numbers of states are those of `enum tcp_conntrack`, `sctp_conntrack`
//! and `ct_dccp_states`.

use super::extra::parts;
use super::tuple::{DCCP, SCTP, TCP};
use super::{Connection, State};

/// How near its end a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// It may go on for ever: also half-closed, or in a state that nobody has reported.
    Open,
    /// Both sides have said that they are done, and a last answer is due: LAST_ACK,
    /// SHUTDOWN_ACK_SENT, CLOSING.
    Ending,
    /// It has ended: TIME_WAIT, CLOSE (of TCP), CLOSED (of SCTP).
    Over,
}

impl Connection {
    /// What its state says about its end.
    pub fn phase(&self) -> Phase {
        let protocol_state =
            if self.extra.has(parts::PROTOINFO) { self.extra.protoinfo.state } else { 0 };
        match (self.original.protocol, self.state.tcp_state, protocol_state) {
            (TCP, 7 | 8, _) | (SCTP, _, 1) | (DCCP, _, 7) => Phase::Over,
            (TCP, 6, _) | (SCTP, _, 7) | (DCCP, _, 6) => Phase::Ending,
            _ => Phase::Open,
        }
    }

    /// Whether its state says that it is being opened: SYN_SENT, SYN_RECV; COOKIE_WAIT,
    /// COOKIE_ECHOED; REQUEST, RESPOND, PARTOPEN.
    pub fn is_opening(&self) -> bool {
        let protocol_state =
            if self.extra.has(parts::PROTOINFO) { self.extra.protoinfo.state } else { 0 };
        match self.original.protocol {
            TCP => matches!(self.state.tcp_state, 1 | 2 | 9),
            SCTP => matches!(protocol_state, 2 | 3),
            DCCP => matches!(protocol_state, 1..=3),
            _ => false,
        }
    }
}

/// Whether a TCP entry that was open went back to its beginning. The port was used again, and the
/// entry of the one before stood in the way: as soon as the server has answered the SYN, the kernel
/// makes it the next one's.
pub fn begins_anew(old: &State, new: &State) -> bool {
    const SYN_RECV: u8 = 2;
    const SYN_SENT2: u8 = 9;
    old.tcp_state > SYN_RECV && old.tcp_state != SYN_SENT2 && new.tcp_state == SYN_RECV
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::Tuple;
    use crate::conn::extra::{Extra, ProtoInfo};

    #[test]
    fn a_syn_that_was_answered_over_an_open_entry_begins_another_connection() {
        let begins = |old: u8, new: u8| {
            let [old, new] = [old, new].map(|tcp_state| State { tcp_state, ..State::default() });
            begins_anew(&old, &new)
        };
        // SYN_RECV after ESTABLISHED and later; not on the ways to it: SYN_SENT, SYN_RECV, both
        // sides' SYNs.
        let over: Vec<u8> = (0..10).filter(|old| begins(*old, 2)).collect();
        assert_eq!(over, [3, 4, 5, 6, 7, 8]);
        assert!((0..10).all(|old| (0..10).filter(|new| *new != 2).all(|new| !begins(old, new))));
    }

    #[test]
    fn what_is_being_opened_is_known_by_the_state_of_its_protocol() {
        let opening = |protocol: u8, is_extra: bool| -> Vec<u8> {
            let is_it = |state: &u8| {
                let original = Tuple {
                    protocol,
                    ..Tuple::v4(TCP, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2))
                };
                let tcp_state = if is_extra { 0 } else { *state };
                let of = State { tcp_state, ..State::default() };
                let mut connection = Connection::new(original, original.mirrored(), of);
                if is_extra {
                    connection.extra = Extra {
                        parts: parts::PROTOINFO,
                        protoinfo: ProtoInfo { state: *state, ..ProtoInfo::default() },
                        ..Extra::NONE
                    };
                }
                connection.is_opening()
            };
            (0..12).filter(is_it).collect()
        };
        assert_eq!(opening(TCP, false), [1, 2, 9]);
        assert_eq!(opening(SCTP, true), [2, 3]);
        assert_eq!(opening(DCCP, true), [1, 2, 3]);
        assert!(opening(17, false).is_empty() && opening(17, true).is_empty());
    }

    #[test]
    fn half_closed_connections_are_open_and_lingering_ones_are_over() {
        let phase = |protocol: u8, tcp_state: u8, state: u8| {
            let original = Tuple {
                protocol,
                ..Tuple::v4(TCP, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2))
            };
            let state_of = State { tcp_state, ..State::default() };
            let mut connection = Connection::new(original, original.mirrored(), state_of);
            connection.extra = Extra {
                parts: parts::PROTOINFO,
                protoinfo: ProtoInfo { state, ..ProtoInfo::default() },
                ..Extra::NONE
            };
            connection.phase()
        };
        for open in [0, 1, 2, 3, 4, 5, 9] {
            assert_eq!(phase(TCP, open, 0), Phase::Open);
        }
        assert_eq!(
            [6, 7, 8].map(|state| phase(TCP, state, 0)),
            [Phase::Ending, Phase::Over, Phase::Over]
        );
        assert_eq!(
            [4, 7, 1].map(|state| phase(SCTP, 0, state)),
            [Phase::Open, Phase::Ending, Phase::Over]
        );
        assert_eq!(
            [4, 6, 7].map(|state| phase(DCCP, 0, state)),
            [Phase::Open, Phase::Ending, Phase::Over]
        );
        assert_eq!(phase(17, 7, 1), Phase::Open, "UDP has no states");
    }
}
