//! Flows: a client and a server that speak to each other, packet by packet, through whichever
//! gateway the routes name.

use std::time::Duration;

use hypersync::conn::tuple::TCP;
use hypersync::conn::{MemberId, Tuple};
use hypersync::time::Time;

use super::model::tcp::{Place, Segment, flag};
use super::model::{Packet, Payload};
use crate::world::Rng;

/// Both ends give up after so long without an answer.
pub const GIVES_UP: Duration = Duration::from_secs(12);

/// Who speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    Client,
    Server,
}

/// What a flow does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Syn,
    SynAck,
    FirstAck,
    /// Something is said by one end, and answered by the other.
    Say(End),
    Answer(End),
    /// The first FIN comes from this end; the other acknowledges it, goes on to speak, and says FIN
    /// itself.
    Fin(End),
    FinAck(End),
    /// The other end's FIN, and the last acknowledgement.
    LastFin(End),
    LastAck(End),
    Reset(End),
    /// Nothing more is said.
    Over,
}

/// How a flow ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    Fin(End),
    /// The end that did not close speaks on for a while.
    Half(End),
    Reset(End),
    Silence,
}

/// One connection, from its first packet to its last.
#[derive(Clone, Debug)]
pub struct Flow {
    pub original: Tuple,
    /// Which life of its tuple this is.
    pub number: u32,
    /// Whose routes it takes.
    pub route: usize,
    pub step: Step,
    /// Exchanges that are still to come before it ends, and behind the first FIN.
    pub exchanges: u64,
    pub rest: u64,
    pub manner: Manner,
    /// Pause between two exchanges, at most.
    pub pause: Duration,
    /// When the next packet is sent, and how often it was sent before.
    pub at: Time,
    pub tries: u32,
    /// SYNs that had to be sent again, for their answers did not pass.
    pub syns: u32,
    /// Since when this packet is tried.
    pub since: Time,
    /// The gateway that its packets take, and which one the routes named when that was decided.
    pub way: Option<(MemberId, MemberId)>,
    /// How its packets leave.
    pub leaving: Option<Tuple>,
    /// When both ends had said something.
    pub established: Option<Time>,
    /// When the last packet passed, and where.
    pub passed: Option<(Time, MemberId)>,
    /// When it was over for both ends, and whether a kernel could see that.
    pub ended: Option<Time>,
    /// Whether all of its packets took one gateway, to which nothing happened.
    pub is_intact: bool,
    /// Whether it had two copies before whatever is going on began.
    pub is_safe: bool,
    /// Whether a kernel refused its packets while that was not promised to go well, or took them
    /// for another connection's: from then on they confirm that state there, and being the latest
    /// they win; or it goes on by chance, on an entry that nobody has in a table.
    pub is_mistaken: bool,
    /// Members that lost its entry since: they may need a moment to have it again.
    pub lacking: Vec<MemberId>,
    /// When its address left the gateway that it passed.
    pub left: Option<Time>,
}

impl Flow {
    pub fn is_tcp(&self) -> bool {
        self.original.protocol == TCP
    }

    /// Both ends have it open, and neither has begun to close it.
    pub fn is_talking(&self) -> bool {
        matches!(self.step, Step::Say(_) | Step::Answer(_)) && self.exchanges > 0
    }

    /// Who sends the next packet, and what.
    pub fn packet(&self) -> Option<(End, Packet)> {
        use flag::{ACK, FIN, RST, SYN};
        let (end, flags, data) = match self.step {
            Step::Syn => (End::Client, SYN, false),
            Step::SynAck => (End::Server, SYN | ACK, false),
            Step::FirstAck => (End::Client, ACK, false),
            Step::Say(end) => (end, ACK, true),
            Step::Answer(end) | Step::FinAck(end) | Step::LastAck(end) => (end, ACK, false),
            Step::Fin(end) | Step::LastFin(end) => (end, FIN | ACK, false),
            Step::Reset(end) => (end, RST | ACK, false),
            Step::Over => return None,
        };
        let tuple = match end {
            End::Client => self.original,
            End::Server => self.leaving.unwrap_or(self.original).mirrored(),
        };
        let payload = match self.is_tcp() {
            true => Payload::Tcp(Segment { flags, data, place: Place::Right }),
            false => Payload::Other,
        };
        Some((end, Packet { tuple, payload, is_from_inside: end == End::Client }))
    }

    /// The packet arrived: what comes next, and how soon.
    pub fn arrived(&mut self, now: Time, at: MemberId, rng: &mut Rng) {
        self.passed = Some((now, at));
        (self.tries, self.since) = (0, now);
        let soon = Duration::from_micros(200 + rng.below(20_000));
        let later = soon + self.pause.mul_f64(rng.below(1000) as f64 / 1000.0);
        let (next, pause) = match self.step {
            Step::Syn => (Step::SynAck, soon),
            Step::SynAck => (Step::FirstAck, soon),
            Step::FirstAck => {
                self.established = Some(now);
                (self.next_exchange(rng), soon)
            }
            Step::Say(end) => (Step::Answer(other(end)), soon),
            Step::Answer(_) => {
                self.established.get_or_insert(now);
                if self.exchanges > 0 {
                    self.exchanges -= 1;
                    (self.next_exchange(rng), later)
                } else {
                    self.rest = self.rest.saturating_sub(1);
                    (self.next_after_fin(), later)
                }
            }
            Step::Fin(end) => (Step::FinAck(other(end)), soon),
            Step::FinAck(_) => (self.next_after_fin(), soon),
            Step::LastFin(end) => (Step::LastAck(other(end)), soon),
            Step::LastAck(_) | Step::Reset(_) | Step::Over => {
                self.ended = Some(now);
                (Step::Over, soon)
            }
        };
        if next == Step::Over {
            self.ended.get_or_insert(now);
        }
        (self.step, self.at) = (next, now.after(pause));
    }

    fn next_exchange(&self, rng: &mut Rng) -> Step {
        match (self.exchanges, self.manner) {
            (0, Manner::Fin(end) | Manner::Half(end)) if self.is_tcp() => Step::Fin(end),
            (0, Manner::Reset(end)) if self.is_tcp() => Step::Reset(end),
            (0, _) => Step::Over,
            _ if !self.is_tcp() || rng.chance(60) => Step::Say(End::Client),
            _ => Step::Say(End::Server),
        }
    }

    fn next_after_fin(&self) -> Step {
        match self.manner {
            Manner::Half(end) if self.rest > 0 => Step::Say(other(end)),
            Manner::Fin(end) | Manner::Half(end) => Step::LastFin(other(end)),
            _ => Step::Over,
        }
    }

    /// The packet was lost, or dropped: it is sent again, further and further apart.
    pub fn lost(&mut self, now: Time) {
        self.tries += 1;
        let pause = Duration::from_millis(200 << self.tries.min(3));
        self.at = now.after(pause);
    }
}

fn other(end: End) -> End {
    match end {
        End::Client => End::Server,
        End::Server => End::Client,
    }
}
