//! Flows: which made-up connection opens, changes or closes next. Pure: time is an argument.
//!
//! Events happen on a fixed beat, `rate` a second, and what the n-th event is follows from the seed
//! alone. First the long-lived connections open, over the ramp. Then, of a hundred events, twenty
//! are turnover (one long-lived closes, another opens, short-lived ones open in their share) and
//! the others change a connection; the close of a short-lived one has precedence once its time has
//! come. An event that finds its ring full is kept and offered first the next time, so no order is
//! lost and nothing piles up: the beat then waits, and catches up afterwards.

use std::collections::VecDeque;
use std::time::Duration;

use super::flow::{Flow, Traits};
use super::rng::Rng;
use crate::source::SourceEvent;

/// Of a hundred steady events, so many open or close a connection.
const TURNOVER_PERCENT: u32 = 20;

/// Of a hundred connections, so many are TCP; the others are UDP.
const TCP_PERCENT: u32 = 80;

/// What a load is like.
#[derive(Clone, Debug)]
pub struct FlowsConfig {
    /// Which data plane this is, if there are several: part of every address.
    pub plane: u8,
    /// Everything random follows from this.
    pub seed: u64,
    /// Long-lived connections that are open at any time after the ramp (one less while one is
    /// renewed).
    pub connections: usize,
    /// Events a second after the ramp: opened, changed and closed together.
    pub rate: u32,
    /// How long the long-lived connections take to open.
    pub ramp: Duration,
    /// Of a hundred connections opened after the ramp, so many are short-lived.
    pub short_percent: u32,
    /// How long those live.
    pub short_life: Duration,
    /// Of a hundred connections, so many have their source translated.
    pub nat_percent: u32,
    /// Of a hundred connections, so many are IPv6.
    pub v6_percent: u32,
}

/// What was told so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Told {
    /// Connections opened.
    pub opened: u64,
    /// Of those, short-lived ones.
    pub opened_short: u64,
    /// Changes.
    pub changed: u64,
    /// Connections closed.
    pub closed: u64,
}

impl Told {
    /// Events of any kind.
    pub fn events(&self) -> u64 {
        self.opened + self.changed + self.closed
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum LoadPhase {
    Ramp,
    Steady,
    CloseShort,
    CloseAll,
}

/// The connections of one data plane.
pub struct Flows {
    config: FlowsConfig,
    rng: Rng,
    phase: LoadPhase,
    /// Long-lived ones, in no order.
    long: Vec<Flow>,
    /// Short-lived ones, oldest first.
    short: VecDeque<Flow>,
    next_number: u64,
    /// When the next event is due.
    due: Duration,
    pending: Option<SourceEvent>,
    told: Told,
}

impl Flows {
    /// No connection is open yet.
    pub fn new(config: FlowsConfig) -> Flows {
        assert!(config.connections > 0 && config.rate > 0);
        Flows {
            rng: Rng::new(config.seed ^ (config.plane as u64) << 56),
            phase: LoadPhase::Ramp,
            long: Vec::with_capacity(config.connections),
            short: VecDeque::new(),
            next_number: 0,
            due: Duration::ZERO,
            pending: None,
            told: Told::default(),
            config,
        }
    }

    /// Every connection that is open, as it was last told.
    pub fn open(&self) -> impl Iterator<Item = &Flow> {
        self.long.iter().chain(&self.short)
    }

    /// Long-lived connections that are open.
    pub fn long_lived(&self) -> usize {
        self.long.len()
    }

    /// What was told so far.
    pub fn told(&self) -> Told {
        self.told
    }

    /// Whether every long-lived connection has opened.
    pub fn is_ramped(&self) -> bool {
        self.phase != LoadPhase::Ramp
    }

    /// No more beat: from now on `run` closes the short-lived connections (`keep`) or all of them,
    /// as fast as they are taken.
    pub fn finish(&mut self, keep: bool) {
        self.phase = if keep { LoadPhase::CloseShort } else { LoadPhase::CloseAll };
    }

    /// Whether the end has begun.
    pub fn is_finishing(&self) -> bool {
        matches!(self.phase, LoadPhase::CloseShort | LoadPhase::CloseAll)
    }

    /// Whether everything was told that `finish` left to tell.
    pub fn is_finished(&self) -> bool {
        let closed = match self.phase {
            LoadPhase::Ramp | LoadPhase::Steady => false,
            LoadPhase::CloseShort => self.short.is_empty(),
            LoadPhase::CloseAll => self.short.is_empty() && self.long.is_empty(),
        };
        closed && self.pending.is_none()
    }

    /// Hands every event that is due at `now` (since the start) to `push`, at most `most`. `push`
    /// says whether it took the event; if not, this one comes first the next time. Returns whether
    /// all were taken.
    pub fn run(
        &mut self,
        now: Duration,
        most: usize,
        push: &mut dyn FnMut(&SourceEvent) -> bool,
    ) -> bool {
        for _ in 0..most {
            let event = match self.pending.take() {
                Some(event) => event,
                None => match self.next(now) {
                    Some(event) => event,
                    None => return true,
                },
            };
            if !push(&event) {
                self.pending = Some(event);
                return false;
            }
        }
        true
    }

    /// The next event, if it is due.
    fn next(&mut self, now: Duration) -> Option<SourceEvent> {
        if self.is_finishing() {
            let last = self.phase == LoadPhase::CloseAll;
            let flow =
                self.short.pop_front().or_else(|| if last { self.long.pop() } else { None })?;
            return Some(self.close(&flow));
        }
        if self.due > now {
            return None;
        }
        let at = self.due;
        if self.phase == LoadPhase::Ramp {
            if self.long.len() < self.config.connections {
                self.due += self.config.ramp / self.config.connections as u32;
                return Some(self.open_one(at, false));
            }
            self.phase = LoadPhase::Steady;
        }
        self.due += Duration::from_secs(1) / self.config.rate;
        if self.short.front().is_some_and(|flow| flow.opened + self.config.short_life <= at)
            && let Some(flow) = self.short.pop_front()
        {
            return Some(self.close(&flow));
        }
        if !self.rng.chance(TURNOVER_PERCENT) {
            return Some(self.change_one());
        }
        // At the full number one closes; until another has opened, short-lived ones open in their
        // share.
        if self.long.len() < self.config.connections {
            let is_short = self.rng.chance(self.config.short_percent);
            return Some(self.open_one(at, is_short));
        }
        let at = self.rng.below(self.long.len() as u32) as usize;
        let flow = self.long.swap_remove(at);
        Some(self.close(&flow))
    }

    fn open_one(&mut self, at: Duration, is_short: bool) -> SourceEvent {
        let traits = Traits {
            is_short,
            is_nat: self.rng.chance(self.config.nat_percent),
            is_v6: self.rng.chance(self.config.v6_percent),
            is_tcp: self.rng.chance(TCP_PERCENT),
        };
        let flow = Flow::new(self.config.plane, self.next_number, traits, at, &mut self.rng);
        self.next_number += 1;
        self.told.opened += 1;
        self.told.opened_short += is_short as u64;
        let event = SourceEvent::seen(flow.connection());
        match is_short {
            true => self.short.push_back(flow),
            false => self.long.push(flow),
        }
        event
    }

    fn change_one(&mut self) -> SourceEvent {
        self.told.changed += 1;
        let all = (self.long.len() + self.short.len()) as u32;
        let at = self.rng.below(all) as usize;
        let flow = match at.checked_sub(self.long.len()) {
            None => &mut self.long[at],
            Some(at) => &mut self.short[at],
        };
        flow.change(&mut self.rng);
        SourceEvent::seen(flow.connection())
    }

    fn close(&mut self, flow: &Flow) -> SourceEvent {
        self.told.closed += 1;
        SourceEvent::gone(flow.original)
    }
}

#[cfg(test)]
#[path = "flows_tests.rs"]
mod tests;
