//! Leaving: connections whose translated address has left this host.
//!
//! When an address that connections are masqueraded behind goes, or its interface goes down, the
//! kernel drops their entries: so it is at each switchover by VRRP. That is no end. The packets of
//! these connections come to whoever has the address next, and that member has their copies.
//!
//! What the kernel dropped by itself, while its timeout had time left, is such a connection if the
//! address that it was translated to is not this host's any more. Its end is told five seconds
//! later, when the address has come to another member, and as what it is: the backup goes on with
//! it if it has the address by then, or if packets have passed it. (Told at once, it would end
//! everything that is silent just now, before VRRP has elected anybody.) Until then it is this
//! member's as before; and if the address is back here by then its entry is written again.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::conn::{Generation, Kind, Stamp, Tuple};
use crate::counters::{Counter, Counters};
use crate::source::{End, SourceEvent};
use crate::sync::Replica;
use crate::sync::mutation::{Mutation, is};
use crate::time::Time;

/// How long the end of a connection whose address has left is not told: VRRP elects another master
/// within three advertisements, a second apart by default, and a bit.
const LEFT_FOR: Duration = Duration::from_secs(5);

/// Connections that may wait so. Of further ones the end is told at once.
const LEAVING_MAX: usize = 1 << 18;

/// A connection whose entry is gone: its slot, and what that was then.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Gone {
    slot: u32,
    generation: Generation,
    stamp: Stamp,
}

impl Gone {
    fn at(slot: u32, replica: &Replica<'_>) -> Gone {
        let line = replica.table().line(slot);
        Gone { slot, generation: line.generation(), stamp: line.stamp() }
    }

    /// Its end, if it is still this member's. `false`: that is not known, for it has changed since,
    /// as if it were alive.
    fn tell(&self, now: Time, end: End, replica: &mut Replica<'_>) -> bool {
        let as_it_is = Gone::at(self.slot, replica);
        let is_ours = replica.table().kind(self.slot) == Kind::Active
            && as_it_is.generation == self.generation;
        if is_ours && as_it_is == *self {
            let original = replica.table().tuples(self.slot).0;
            replica.handle_source(now, &SourceEvent::Gone { original, end });
        }
        !is_ours || as_it_is == *self
    }
}

/// A shard's connections whose address has left.
pub(super) struct Leaving {
    /// By slot.
    ends: HashMap<u32, Gone>,
    /// Their slots, and when the end is told.
    waiting: VecDeque<(Time, u32)>,
    /// What ended just now, and what its timeout had left: whether the address has left is not
    /// known yet.
    fresh: Vec<(Gone, u32)>,
    unsure: Vec<(u32, Generation)>,
}

impl Leaving {
    pub(super) fn new() -> Leaving {
        Leaving {
            ends: HashMap::new(),
            waiting: VecDeque::new(),
            fresh: Vec::new(),
            unsure: Vec::new(),
        }
    }

    /// The kernel has this entry no more, and nobody saw why: not a program, as far as is known,
    /// nor its timeout. Whether its address may have left: then [`step`](Self::step) finds out.
    pub(super) fn ended(&mut self, original: &Tuple, left_s: u32, replica: &Replica<'_>) -> bool {
        let Some(slot) = replica.table().find_original(original) else { return false };
        let (line, gone) = (replica.table().line(slot), Gone::at(slot, replica));
        if self.ends.get(&slot) == Some(&gone) {
            return true;
        }
        let is_translated = replica.table().tuples(slot).1.dst != original.src;
        let may_have_left = is_translated
            && !is(Mutation::LeftIsEnded)
            && line.kind() == Kind::Active
            && line.peer().is_somewhere()
            && self.ends.len() + self.fresh.len() < LEAVING_MAX;
        if may_have_left {
            self.fresh.push((gone, left_s));
        }
        may_have_left
    }

    /// The kernel has an entry of this tuple again: the connection that waited is no more.
    pub(super) fn begins(&mut self, now: Time, original: &Tuple, replica: &mut Replica<'_>) {
        if self.ends.is_empty() && self.fresh.is_empty() {
            return;
        }
        let Some(slot) = replica.table().find_original(original) else { return };
        let waited = self.ends.remove(&slot);
        let fresh = self.fresh.iter().position(|(gone, _)| gone.slot == slot);
        let fresh = fresh.map(|at| self.fresh.remove(at).0);
        for gone in [waited, fresh].into_iter().flatten() {
            let _ = gone.tell(now, End::UNTOLD, replica);
        }
    }

    /// What ended just now waits, if its address has left, which `has_address` tells of what
    /// answers it; the end of any other is told, and of what has waited for long enough.
    pub(super) fn step(
        &mut self,
        now: Time,
        has_address: &mut dyn FnMut(&Tuple) -> bool,
        replica: &mut Replica<'_>,
        counters: &Counters<'_>,
    ) {
        self.unsure.clear();
        for (gone, left_s) in self.fresh.drain(..) {
            let (_, reply) = replica.table().tuples(gone.slot);
            if has_address(&reply) {
                let _ = gone.tell(now, End::Unseen { left_s }, replica);
            } else {
                counters.count(Counter::SourceLeft);
                self.ends.insert(gone.slot, gone);
                self.waiting.push_back((now.after(LEFT_FOR), gone.slot));
            }
        }
        while let Some((at, slot)) = self.waiting.front().copied()
            && at.reached(now)
        {
            self.waiting.pop_front();
            let (_, reply) = replica.table().tuples(slot);
            if let Some(gone) = self.ends.remove(&slot) {
                // It is back: so is the entry.
                if gone == Gone::at(slot, replica) && has_address(&reply) {
                    replica.recommit(now, slot);
                    continue;
                }
                if !gone.tell(now, End::Left, replica) {
                    self.unsure.push((slot, gone.generation));
                }
            }
        }
    }

    /// What has waited until just now, and may live: to be looked up.
    pub(super) fn unsure(&self) -> &[(u32, Generation)] {
        &self.unsure
    }

    /// When [`step`](Self::step) has something to tell.
    pub(super) fn wake_at(&self) -> Time {
        match self.fresh.is_empty() {
            true => self.waiting.front().map_or(Time::NEVER, |(at, _)| *at),
            false => Time(0),
        }
    }
}
