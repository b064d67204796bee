//! Chores: releases, offers and declines, the messages that belong to no single connection's delta.
//!
//! A **release** tells a previous backup to let its copy go, once the new backup has
//! acknowledged its own (make before break), or tells a member that its copy was superseded. An
//! **offer** asks a former active, after a stream was lost, whether a copy still stands. A
//! **decline** tells an active whether the backup's kernel has its copy. All of them must arrive, so they travel in sequenced datagrams and are sent again if a datagram is
//! given up. There is a fixed number of them; who finds none free waits, which paces walks.

use super::history::Content;
use super::mutation::{Mutation, is};
use super::replica::Replica;
use crate::ccp::message::{Fault, Message, Place};
use crate::conn::table::On;
use crate::conn::{Coordinate, Kind, MemberId, Stamp};
use crate::limits::MOVES_MAX;
use crate::seq::Seq;
use crate::time::Time;

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Task {
    /// Make the copy at `target` go. With `of`, it is the previous backup of the connection there.
    Release { of: Option<Place>, stamp: Stamp },
    /// Ask whether the copy in this slot still stands.
    Offer { own: Place, claimed: bool },
    /// Tell the active whether the kernel has its copy in this slot.
    Decline { own: Place, number: u32, fault: Option<Fault> },
}

/// What a chore is for, least urgent first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rank {
    /// Offers and moves, which walks begin.
    Question,
    /// The answer to an offer.
    Answer,
    /// A release that something applied brings about: nothing waits for more once it is applied.
    Consequence,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// A release waits until the new backup has acknowledged its copy.
    AwaitBackup,
    /// To be sent.
    Send,
    /// Sent in this datagram.
    Sent(Seq),
}

#[derive(Clone, Copy, Debug)]
struct Chore {
    task: Task,
    target: Coordinate,
    phase: Phase,
}

/// The chores under way.
pub(super) struct Chores {
    chores: Vec<Option<Chore>>,
    free: Vec<u32>,
}

impl Chores {
    pub(super) fn new() -> Chores {
        Chores { chores: vec![None; MOVES_MAX], free: (0..MOVES_MAX as u32).rev().collect() }
    }

    /// Whether a chore of this rank may begin. Ranks keep room for what others wait for: answers must
    /// not wait for questions, nor the releases that an answer brings about for other answers.
    pub(super) fn has_room(&self, rank: Rank) -> bool {
        let kept = match rank {
            Rank::Question => MOVES_MAX / 2,
            Rank::Answer => MOVES_MAX / 4,
            Rank::Consequence => 0,
        };
        self.free.len() > kept
    }

    /// Chores under way.
    pub(super) fn len(&self) -> usize {
        self.chores.len() - self.free.len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn ids(&self) -> impl Iterator<Item = u32> + use<> {
        0..if self.is_empty() { 0 } else { self.chores.len() as u32 }
    }

    /// Connections of ours that are moving away from a backup, and that one, as long as it was not released.
    pub(super) fn previous_backups(&self) -> impl Iterator<Item = (Place, Coordinate)> + '_ {
        let chores = self.ids().filter_map(|id| self.chores[id as usize]);
        chores.filter_map(|chore| match chore.task {
            Task::Release { of: Some(of), .. } => Some((of, chore.target)),
            _ => None,
        })
    }

    fn remove(&mut self, id: u32) {
        assert!(self.chores[id as usize].take().is_some(), "chore {id} was done before");
        self.free.push(id);
    }
}

impl Replica<'_> {
    /// Begins a chore that is to be sent at once. `false` if there is no room for another.
    pub(super) fn add_chore(&mut self, rank: Rank, task: Task, target: Coordinate) -> bool {
        self.begin_chore(rank, task, target, Phase::Send)
    }

    fn begin_chore(&mut self, rank: Rank, task: Task, target: Coordinate, phase: Phase) -> bool {
        if !self.chores.has_room(rank) {
            return false;
        }
        let Some(id) = self.chores.free.pop() else { return false };
        self.chores.chores[id as usize] = Some(Chore { task, target, phase });
        let stream = self.stream_of(target);
        self.wake(stream);
        true
    }

    /// Tells a member to let its copy go. `false` if there is no room for another chore.
    pub(super) fn release(&mut self, rank: Rank, target: Coordinate, stamp: Stamp) -> bool {
        if !self.may_return(target.member()) {
            return true; // Its table is gone, or asks by itself when it returns.
        }
        self.add_chore(rank, Task::Release { of: None, stamp }, target)
    }

    /// The stamp of the release that a member is still to be told for this place of its, which is no longer needed.
    pub(super) fn released(&self, target: Coordinate) -> Option<Stamp> {
        let mut chores = self.chores.ids().filter_map(|id| self.chores.chores[id as usize]);
        chores.find_map(|chore| match chore.task {
            Task::Release { stamp, .. } if chore.target == target => Some(stamp),
            _ => None,
        })
    }

    /// Asks a former active whether our copy still stands. `false` if there is no room.
    pub(super) fn offer(&mut self, target: Coordinate, own: Place) -> bool {
        let claimed = self.is_claimed_here(own.slot);
        self.add_chore(Rank::Question, Task::Offer { own, claimed }, target)
    }

    /// Whether this member is the active because of traffic here. A copy that its own source saw as well is still
    /// its active's.
    fn is_claimed_here(&self, slot: u32) -> bool {
        let line = self.table.line(slot);
        line.kind() == Kind::Active && line.is_claimed()
    }

    /// Gives the connection a new backup and keeps the previous one until the new one has acknowledged.
    pub(super) fn move_backup(&mut self, now: Time, slot: u32, backup: Coordinate) -> bool {
        let line = self.table.line(slot);
        let (previous, generation) = (line.peer(), line.generation());
        assert!(previous.is_somewhere() && !self.table.is_moving(slot));
        let of = Some(Place { slot, generation });
        let task = Task::Release { of, stamp: line.stamp() };
        if !self.begin_chore(Rank::Question, task, previous, Phase::AwaitBackup) {
            return false;
        }
        self.unassign(slot);
        // A promoted connection remembers its former active there instead, and does not name its
        // previous backup to the new one.
        if !self.table.former(slot).is_somewhere() {
            // Marked as moving before, and until after, it is named: a connection that is not moving and has a former
            // coordinate was taken over from there.
            self.table.set_moving(slot, true);
            self.table.set_former(slot, previous);
        }
        self.assign(now, slot, backup);
        true
    }

    /// The new backup of a connection that is changing it is none, and nobody else is to be had: its previous one, which
    /// was not released yet, goes on. `false` if there is none.
    pub(super) fn go_back(&mut self, now: Time, slot: u32) -> bool {
        if !self.table.former(slot).is_somewhere() {
            return false; // As of nearly all.
        }
        let here = Place { slot, generation: self.table.line(slot).generation() };
        let is_it = |chore: &Chore| {
            chore.phase == Phase::AwaitBackup
                && self.is_up(chore.target.member())
                && matches!(chore.task, Task::Release { of: Some(of), .. } if of == here)
        };
        let mut chores = self.chores.ids().filter_map(|id| Some((id, self.chores.chores[id as usize]?)));
        let found = chores.find(|(_, chore)| is_it(chore)).map(|(id, chore)| (id, chore.target));
        let Some((id, previous)) = found else { return false };
        self.chores.remove(id);
        self.end_move(slot);
        self.assign(now, slot, previous);
        true
    }

    /// The connection goes while it changes its backup. The release of the previous one goes its own way.
    pub(super) fn end_move(&mut self, slot: u32) {
        if self.table.is_moving(slot) {
            self.table.set_former(slot, Coordinate::NOWHERE);
            self.table.set_moving(slot, false);
        }
    }

    /// A connection of memory taken up again was changing its backup: the release of the previous one waits for
    /// the new one, as before.
    pub(super) fn resume_move(&mut self, slot: u32) {
        let (line, previous) = (self.table.line(slot), self.table.former(slot));
        let of = Some(Place { slot, generation: line.generation() });
        let task = Task::Release { of, stamp: line.stamp() };
        if !previous.is_plausible()
            || !self.begin_chore(Rank::Consequence, task, previous, Phase::AwaitBackup)
        {
            self.end_move(slot);
        }
    }

    /// What this member was to be told is about a table that it may not have any more.
    pub(super) fn drop_chores(&mut self, member: MemberId) {
        for id in self.chores.ids() {
            if self.chores.chores[id as usize].is_some_and(|chore| chore.target.member() == member) {
                self.finish(id, false);
            }
        }
    }

    /// Moves on what can move on.
    pub(super) fn tick_chores(&mut self) {
        for id in self.chores.ids() {
            let Some(chore) = self.chores.chores[id as usize] else { continue };
            if !self.may_return(chore.target.member()) {
                self.finish(id, false);
                continue;
            }
            let stream = self.stream_of(chore.target);
            match (chore.phase, chore.task) {
                (Phase::AwaitBackup, Task::Release { of: Some(of), .. }) => {
                    let line = self.table.line(of.slot);
                    let ended = line.generation() != of.generation || line.kind() != Kind::Active;
                    let acknowledged = !ended
                        && self.table.on(of.slot) == On::None
                        && line.last().is_passed_by(self.durable(self.stream_of(line.peer())).floor());
                    if ended || acknowledged || is(Mutation::EarlyRelease) {
                        self.chores.chores[id as usize] = Some(Chore { phase: Phase::Send, ..chore });
                        self.wake(stream);
                    }
                }
                (Phase::AwaitBackup, _) => {
                    unreachable!("only a release of a previous backup waits for a new one")
                }
                (Phase::Sent(seq), _) if seq.is_passed_by(self.durable(stream).floor()) => {
                    self.finish(id, true);
                }
                (Phase::Send | Phase::Sent(_), _) => {}
            }
        }
    }

    fn finish(&mut self, id: u32, arrived: bool) {
        let chore = self.chores.chores[id as usize].expect("the caller saw it");
        self.chores.remove(id);
        let of = match chore.task {
            Task::Release { of, .. } => of,
            Task::Decline { .. } => None,
            Task::Offer { own, claimed } => {
                let line = self.table.line(own.slot);
                let still = line.generation() == own.generation
                    && line.is_claimed()
                    && self.table.former(own.slot) == chore.target
                    && !self.table.is_moving(own.slot);
                if arrived && still && claimed {
                    // Outranked, and it knows.
                    self.table.set_former(own.slot, Coordinate::NOWHERE);
                } else if arrived && still {
                    // Traffic came after the offer left: it has to know that as well.
                    let again = Task::Offer { own, claimed: true };
                    let taken = self.add_chore(Rank::Consequence, again, chore.target);
                    assert!(taken, "the chore that just ended made room");
                }
                return;
            }
        };
        if let Some(of) = of {
            let line = self.table.line(of.slot);
            if line.generation() == of.generation && self.table.is_moving(of.slot) {
                self.table.set_former(of.slot, Coordinate::NOWHERE);
                self.table.set_moving(of.slot, false);
            }
        }
    }

    /// The chores that this stream must send.
    pub(super) fn chores_due(&self, stream: usize) -> impl Iterator<Item = u32> + '_ {
        self.chores.ids().filter(move |id| {
            self.chores.chores[*id as usize]
                .is_some_and(|c| c.phase == Phase::Send && self.stream_of(c.target) == stream)
        })
    }

    /// Whether any chore waits to be sent on this stream.
    pub(super) fn has_chores(&self, stream: usize) -> bool {
        self.chores_due(stream).next().is_some()
    }

    /// The message of a chore that is being sent in datagram `seq`; `None` if it lost its object.
    pub(super) fn send_chore(&mut self, id: u32, seq: Seq) -> Option<Message<'static>> {
        let chore = self.chores.chores[id as usize].expect("the caller saw it");
        let target = Place::of(chore.target);
        let mut task = chore.task;
        let message = match chore.task {
            Task::Release { stamp, .. } => Message::Release { target, stamp },
            Task::Offer { own, .. } => {
                let line = self.table.line(own.slot);
                // Who has become a copy for somebody else meanwhile does not ask a former active any more: the answer would
                // take away what another one counts on.
                let asks = match line.kind() {
                    Kind::Backup => line.peer() == chore.target,
                    Kind::Active => self.table.former(own.slot) == chore.target,
                    _ => false,
                };
                if line.generation() != own.generation || !asks {
                    self.chores.remove(id);
                    return None;
                }
                let claimed = self.is_claimed_here(own.slot);
                task = Task::Offer { own, claimed };
                Message::Offer { target, own, stamp: line.stamp(), claimed }
            }
            Task::Decline { own, number, fault } => Message::Decline { target, own, number, fault },
        };
        self.chores.chores[id as usize] = Some(Chore { task, phase: Phase::Sent(seq), ..chore });
        Some(message)
    }

    /// The datagram that carried a chore was given up.
    pub(super) fn chore_given_up(&mut self, id: u32, seq: Seq) {
        if let Some(chore) = &mut self.chores.chores[id as usize]
            && chore.phase == Phase::Sent(seq)
        {
            chore.phase = Phase::Send;
        }
    }

    /// What a release chore is, for the manifest.
    pub(super) fn chore_content(id: u32) -> Content {
        Content::Release(id)
    }
}
