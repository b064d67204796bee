//! TCP as the model has it: which packet takes an entry to which state, and what it gives the entry
//! to live.
//!
//! Sequence numbers are not modelled; a packet says of itself where its numbers lie ([`Place`]).

use super::{Direction, Status, Timeouts};
use hypersync::conntrack::codec::status::{ASSURED, SEEN_REPLY};

pub const NONE: u8 = 0;
pub const SYN_SENT: u8 = 1;
pub const SYN_RECV: u8 = 2;
pub const ESTABLISHED: u8 = 3;
pub const FIN_WAIT: u8 = 4;
pub const CLOSE_WAIT: u8 = 5;
pub const LAST_ACK: u8 = 6;
pub const TIME_WAIT: u8 = 7;
pub const CLOSE: u8 = 8;
pub const SYN_SENT2: u8 = 9;

/// `IP_CT_TCP_FLAG_CLOSE_INIT`: this side sent the first FIN.
pub const CLOSE_INIT: u8 = 0x04;
/// `IP_CT_TCP_FLAG_BE_LIBERAL`.
const BE_LIBERAL: u8 = 0x08;
/// `IP_CT_TCP_FLAG_DATA_UNACKNOWLEDGED`.
const UNACKNOWLEDGED: u8 = 0x10;
/// `IP_CT_TCP_FLAG_MAXACK_SET`.
const ACKED: u8 = 0x20;
/// What a commit may change of those.
const CHANGEABLE: u8 = 0x0f;

/// Flags of a packet, as in its header.
pub mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// Where a packet's numbers lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Place {
    /// They are what the other side expects, and acknowledge all that it sent (or the SYN that it
    /// answers).
    #[default]
    Right,
    /// Beyond that: not of this connection, as far as anybody can see.
    Ahead,
    /// Older.
    Behind,
}

/// A segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    pub flags: u8,
    /// Whether it carries data.
    pub data: bool,
    pub place: Place,
}

/// `get_conntrack_index`, for valid combinations (`tcp_valid_flags`) only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sort {
    Syn,
    SynAck,
    Fin,
    Ack,
    Rst,
}

fn sort(flags: u8) -> Option<Sort> {
    use flag::*;
    match flags & (FIN | SYN | RST | ACK) {
        f if f & !ACK == RST => Some(Sort::Rst),
        SYN => Some(Sort::Syn),
        f if f == SYN | ACK => Some(Sort::SynAck),
        f if f == FIN | ACK => Some(Sort::Fin),
        ACK => Some(Sort::Ack),
        _ => None,
    }
}

enum Next {
    State(u8),
    Ignore,
    Invalid,
}

/// What the kernel's table `tcp_conntracks` says.
fn next(direction: Direction, sort: Sort, state: u8) -> Next {
    use Direction::{Original, Reply};
    Next::State(match (direction, sort, state) {
        (_, Sort::Rst, NONE) => return Next::Invalid,
        (_, Sort::Rst, _) => CLOSE,
        (Original, Sort::Syn, NONE | SYN_SENT | TIME_WAIT | CLOSE) => SYN_SENT,
        (_, Sort::Syn, SYN_SENT2) | (Reply, Sort::Syn, SYN_SENT) => SYN_SENT2,
        (Original, Sort::Syn, _) => return Next::Ignore,
        (Reply, Sort::Syn, TIME_WAIT) => SYN_SENT,
        (Original, Sort::SynAck, SYN_RECV) | (_, Sort::SynAck, SYN_SENT2) => SYN_RECV,
        (Reply, Sort::SynAck, SYN_SENT) => SYN_RECV,
        (Reply, Sort::SynAck, SYN_RECV..=CLOSE) => return Next::Ignore,
        (_, Sort::Fin, SYN_RECV | ESTABLISHED) => FIN_WAIT,
        (_, Sort::Fin, FIN_WAIT | CLOSE_WAIT | LAST_ACK) => LAST_ACK,
        (Reply, Sort::Ack, SYN_SENT | SYN_SENT2) => return Next::Ignore,
        (Reply, Sort::Ack, SYN_RECV) => SYN_RECV,
        (Original, Sort::Ack, NONE | SYN_RECV) | (_, Sort::Ack, ESTABLISHED) => ESTABLISHED,
        (_, Sort::Ack, FIN_WAIT | CLOSE_WAIT) => CLOSE_WAIT,
        (_, Sort::Ack, LAST_ACK | TIME_WAIT) | (_, Sort::Fin, TIME_WAIT) => TIME_WAIT,
        (_, Sort::Ack | Sort::Fin, CLOSE) => CLOSE,
        _ => return Next::Invalid,
    })
}

/// What a packet does to an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// It is of no connection.
    Invalid,
    /// It passes; the entry stays as it is.
    Ignored,
    /// It opens the connection again: the entry goes, and the packet is looked at anew.
    Reopens,
    /// It passes, and the entry goes: a refusal is all that was ever answered.
    Kills,
    /// It passes.
    Passes {
        /// Whether the state is another one now.
        changed: bool,
        /// Whether the entry is assured from now on.
        assured: bool,
        /// What the entry has to live now, in seconds; none if it keeps what it has.
        timeout_s: Option<u32>,
    },
}

/// `struct ip_ct_tcp`, of an entry.
#[derive(Clone, Debug)]
pub struct Tcp {
    pub state: u8,
    /// Of each direction.
    pub flags: [u8; 2],
    pub scale: u8,
    /// Whether a packet of each direction was seen that the kernel took numbers from.
    seen: [bool; 2],
    last: (Sort, Direction),
    /// Whether the last packet was a SYN that was let through and noted.
    is_syn_noted: bool,
    expects_challenge_ack: bool,
    is_simultaneous: bool,
}

impl Tcp {
    /// What a commit leaves: all zero, which as the last packet means a SYN.
    pub fn committed() -> Tcp {
        Tcp {
            state: NONE,
            flags: [0; 2],
            scale: 0,
            seen: [false; 2],
            last: (Sort::Syn, Direction::Original),
            is_syn_noted: false,
            expects_challenge_ack: false,
            is_simultaneous: false,
        }
    }

    /// `tcp_new`, without `tcp_loose`: a connection begins with a SYN.
    pub fn born(segment: &Segment) -> Option<Tcp> {
        let tcp = Tcp { seen: [true, false], ..Tcp::committed() };
        (sort(segment.flags) == Some(Sort::Syn)).then_some(tcp)
    }

    /// `nlattr_to_tcp`.
    pub fn change(&mut self, state: u8, flags: [u8; 2], scale: u8) {
        self.state = state;
        for (mine, given) in self.flags.iter_mut().zip(flags) {
            *mine = *mine & !CHANGEABLE | given & CHANGEABLE;
        }
        if self.flags[0] & self.flags[1] & 1 != 0 {
            self.scale = scale;
        }
    }

    /// `nf_conntrack_tcp_packet`.
    pub fn packet(
        &mut self,
        direction: Direction,
        segment: &Segment,
        status: Status,
        timeouts: &Timeouts,
    ) -> Effect {
        let Some(sort) = sort(segment.flags) else { return Effect::Invalid };
        let mut old = self.state;
        let mut new = match next(direction, sort, old) {
            Next::Invalid => return Effect::Invalid,
            Next::Ignore => NONE,
            Next::State(SYN_SENT) if old >= TIME_WAIT => {
                let is_closed = (self.flags[0] | self.flags[1]) & CLOSE_INIT != 0;
                if is_closed || self.last == (Sort::Rst, direction) {
                    return Effect::Reopens;
                }
                NONE
            }
            Next::State(state) => state,
        };
        if new == NONE {
            let answers =
                self.is_syn_noted && self.last.1 != direction && segment.place == Place::Right;
            if sort != Sort::SynAck || !answers {
                return self.ignore(direction, sort);
            }
            // The SYN that was let through is answered: both ends are in another connection than
            // this entry.
            (old, new) = (SYN_SENT, SYN_RECV);
            self.flags[direction.other() as usize] = 0;
            self.flags[direction as usize] &= BE_LIBERAL;
            self.seen[direction as usize] = false;
            self.expects_challenge_ack = false;
        }
        match new {
            TIME_WAIT
                if old == LAST_ACK
                    && sort == Sort::Ack
                    && self.last == (Sort::Syn, direction.other())
                    && self.expects_challenge_ack =>
            {
                self.expects_challenge_ack = false;
                return Effect::Ignored;
            }
            SYN_SENT2 => self.is_simultaneous = true,
            SYN_RECV
                if direction == Direction::Reply && sort == Sort::Ack && self.is_simultaneous =>
            {
                new = ESTABLISHED;
            }
            CLOSE if sort == Sort::Rst && old < FIN_WAIT => {
                match self.reset(direction, segment, status) {
                    Some(state) => new = state,
                    None => return Effect::Invalid,
                }
            }
            _ => {}
        }
        self.count(direction, sort, segment);
        self.last = (sort, direction);
        self.is_syn_noted = false;
        self.state = new;
        if old != new && new == FIN_WAIT {
            self.flags[direction as usize] |= CLOSE_INIT;
        }
        let is_unacknowledged = (self.flags[0] | self.flags[1]) & UNACKNOWLEDGED != 0;
        let mut timeout_s = match sort {
            Sort::Rst => timeouts.tcp[CLOSE as usize],
            _ if is_unacknowledged => timeouts.tcp[new as usize].min(timeouts.unacknowledged),
            _ => timeouts.tcp[new as usize],
        };
        let mut assured = false;
        if status & SEEN_REPLY == 0 {
            if sort == Sort::Rst {
                return Effect::Kills;
            }
            if sort == Sort::Syn && old == SYN_SENT {
                return Effect::Passes { changed: new != old, assured, timeout_s: None };
            }
            if new == ESTABLISHED {
                timeout_s = timeout_s.min(timeouts.unacknowledged);
            }
        } else {
            assured = status & ASSURED == 0
                && matches!(old, SYN_RECV | ESTABLISHED)
                && new == ESTABLISHED;
        }
        Effect::Passes { changed: new != old, assured, timeout_s: Some(timeout_s) }
    }

    /// What the entry does not understand, but the ends may.
    fn ignore(&mut self, direction: Direction, sort: Sort) -> Effect {
        self.last = (sort, direction);
        self.is_syn_noted = sort == Sort::Syn;
        if self.is_syn_noted && direction == Direction::Original {
            self.is_simultaneous = false;
            self.expects_challenge_ack = self.state == LAST_ACK;
        }
        Effect::Ignored
    }

    /// The state after a RST, or none if it is older than what the other side acknowledged. One
    /// that is beyond it may be answered by a challenge ACK: the entry stays established, but not
    /// for long.
    fn reset(&self, direction: Direction, segment: &Segment, status: Status) -> Option<u8> {
        let is_established = self.state == ESTABLISHED && status & ASSURED != 0;
        if self.flags[direction.other() as usize] & ACKED == 0 || self.last.0 == Sort::Syn {
            return Some(CLOSE);
        }
        match segment.place {
            Place::Behind => None,
            Place::Ahead if is_established => Some(ESTABLISHED),
            Place::Ahead | Place::Right => Some(CLOSE),
        }
    }

    /// `tcp_in_window` with `be_liberal`, as far as it is not about windows: data that waits for
    /// its acknowledgement.
    fn count(&mut self, direction: Direction, sort: Sort, segment: &Segment) {
        let (own, other) = (direction as usize, direction.other() as usize);
        let is_first = !std::mem::replace(&mut self.seen[own], true);
        if segment.place != Place::Right {
            return;
        }
        if (segment.data || sort == Sort::Fin) && !is_first {
            self.flags[own] |= UNACKNOWLEDGED;
        }
        if segment.flags & flag::ACK != 0 {
            self.flags[own] |= ACKED;
            self.flags[other] &= !UNACKNOWLEDGED;
        }
    }
}
