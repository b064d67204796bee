//! The ledger: what stands in each slot, in which list, and what all of it adds up to.
//!
//! A slot changes its kind, its life or its other copy's place by one of the transitions here and
//! by nothing else. Each keeps the counts and the sums of the stream that it concerns; what is to
//! be told to whom is the caller's. The table itself can be read by all, and changed by nobody.
//!
//! What always holds:
//!
//! 1. *Counts are what the slots say*: of each stream its actives, its copies, and those actives
//!    that are dirty.
//! 2. *Sums are what the slots say*: a copy held, and a connection that was sent, is added up as it
//!    was when it last changed, or was last sent; nothing else is.
//! 3. *A slot stands in one list at most*, and in none when it is let go.
//! 4. *What opens over a life that is known here begins above it*, and in the highest epoch of all
//!    that was here.
//!
//! [`check`](Ledger::check) counts everything anew; the simulator calls it all the time.

use std::ops::Deref;

use super::mutation::{Mutation, is};
use super::stream::stream_index;
use super::sums::{Sums, hash};
use crate::ccp::message::Place;
use crate::conn::slot::{Line, groups};
use crate::conn::table::{DeclineOrder, List, On, Table, Written};
use crate::conn::{Connection, Coordinate, Extra, Kind, Stamp, State};
use crate::limits::STREAMS_MAX;
use crate::seq::Seq;
use crate::source::End;
use crate::time::Time;

/// In place of the time until which packets had passed an entry: its address has left.
const LEFT: u32 = u32::MAX;

/// A stream's share.
#[derive(Clone, Default)]
struct Share {
    /// Connections (and closes) that wait to be sent.
    dirty: List,
    /// How many of these are connections.
    dirty_actives: u64,
    /// Closes sent and not yet acknowledged, in order.
    closing: List,
    /// Own connections whose backup lies there.
    actives: u64,
    /// Copies held here for the peer.
    copies: u64,
}

/// What may be changed of a slot without a transition: nothing that lists, counts or sums go by.
pub(super) struct Amend<'a>(&'a mut Line);

impl Amend<'_> {
    pub(super) fn stamp(&self) -> Stamp {
        self.0.stamp()
    }

    pub(super) fn set_stamp(&mut self, stamp: Stamp) {
        self.0.set_stamp(stamp);
    }

    pub(super) fn set_state(&mut self, state: &State) {
        self.0.set_state(state);
    }

    pub(super) fn set_groups(&mut self, groups: u8) {
        self.0.set_groups(groups);
    }

    pub(super) fn set_last(&mut self, last: Seq) {
        self.0.set_last(last);
    }

    pub(super) fn set_session(&mut self, session: u16) {
        self.0.set_session(session);
    }

    pub(super) fn set_claimed(&mut self, claimed: bool) {
        self.0.set_claimed(claimed);
    }

    pub(super) fn set_unseen(&mut self, unseen: bool) {
        self.0.set_unseen(unseen);
    }

    pub(super) fn set_spent(&mut self, spent: bool) {
        self.0.set_spent(spent);
    }
}

/// The slots of a shard, and what they add up to.
pub(super) struct Ledger<'m> {
    table: Table<'m>,
    held: List,
    waiting: List,
    backing_off: List,
    missing: List,
    shares: Vec<Share>,
    /// Active connections that stand in a dirty list.
    dirty_actives: u64,
    /// Active connections whose backup's kernel refused them, and since when there are any.
    declined: u64,
    declined_since: Time,
    /// Of copies sent, and of copies held.
    sent: Sums,
    copy_sums: Sums,
    /// In which connections begin: the highest epoch of all that was held here, and two more for
    /// each member that fell silent since (one for a claim of its that nobody heard of, one to be
    /// above that). What that one still takes for alive when it is back is older than what began on
    /// its port meanwhile.
    epoch: u32,
}

/// The table can be read as it is.
impl<'m> Deref for Ledger<'m> {
    type Target = Table<'m>;

    fn deref(&self) -> &Table<'m> {
        &self.table
    }
}

fn stream_of(peer: Coordinate) -> usize {
    stream_index(peer.member(), peer.shard())
}

impl<'m> Ledger<'m> {
    pub(super) fn over(table: Table<'m>) -> Ledger<'m> {
        Ledger {
            table,
            held: List::default(),
            waiting: List::default(),
            backing_off: List::default(),
            missing: List::default(),
            shares: vec![Share::default(); STREAMS_MAX],
            dirty_actives: 0,
            declined: 0,
            declined_since: Time(0),
            sent: Sums::new(),
            copy_sums: Sums::new(),
            epoch: 0,
        }
    }

    // Lists.

    /// The connection, in no list yet, is held: it is younger than the hold time.
    pub(super) fn hold(&mut self, now: Time, slot: u32) {
        self.table.push(&mut self.held, On::Held, slot, now);
    }

    /// The connection that is held longest.
    pub(super) fn first_held(&self) -> Option<u32> {
        self.held.first()
    }

    /// The connection waits for a backup, behind those that do.
    pub(super) fn wait(&mut self, since: Time, slot: u32) {
        self.table.push(&mut self.waiting, On::Waiting, slot, since);
    }

    /// The first that waits for a backup.
    pub(super) fn first_waiting(&self) -> Option<u32> {
        self.waiting.first()
    }

    /// The same, which waits no more.
    pub(super) fn take_waiting(&mut self) -> Option<u32> {
        self.table.pop(&mut self.waiting)
    }

    /// How many wait for a backup.
    pub(super) fn waiting(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// The connection was refused as older than what the other side holds: it waits before it asks
    /// again.
    pub(super) fn back_off(&mut self, now: Time, slot: u32) {
        self.table.push(&mut self.backing_off, On::BackingOff, slot, now);
    }

    /// The first of those.
    pub(super) fn first_backing_off(&self) -> Option<u32> {
        self.backing_off.first()
    }

    /// The same, which asks again.
    pub(super) fn take_backing_off(&mut self) -> Option<u32> {
        self.table.pop(&mut self.backing_off)
    }

    /// Connections without a backup.
    pub(super) fn unprotected(&self) -> u64 {
        (self.waiting.len() + self.backing_off.len()) as u64
    }

    /// The kernel does not have the entry of this copy.
    pub(super) fn miss(&mut self, now: Time, slot: u32) {
        self.table.push(&mut self.missing, On::Missing, slot, now);
    }

    /// The first copy whose entry the kernel does not have.
    pub(super) fn first_missing(&self) -> Option<u32> {
        self.missing.first()
    }

    /// The same, whose entry is tried again.
    pub(super) fn take_missing(&mut self) -> Option<u32> {
        self.table.pop(&mut self.missing)
    }

    /// Copies whose entry the kernel does not have.
    pub(super) fn missing(&self) -> u64 {
        self.missing.len() as u64
    }

    /// A connection, or a close, must be sent to its other copy's place: `changed` groups are new
    /// since the last delta, whose number the peer `is_known` to have passed. Whether it was not
    /// dirty before.
    pub(super) fn mark_dirty(
        &mut self,
        now: Time,
        slot: u32,
        changed: u8,
        is_known: impl FnOnce(Seq) -> bool,
    ) -> bool {
        let mut line = self.table.line(slot);
        let on = self.table.on(slot);
        assert!(matches!(on, On::None | On::Dirty | On::Closing), "slot {slot} stands in {on:?}");
        if on != On::Dirty {
            // The lazy clearing: what the acknowledged delta carried is known to the peer.
            line.set_groups(if is_known(line.last()) { changed } else { line.groups() | changed });
            // In memory, too, it shows that the newest state is in no datagram.
            line.set_last(Seq::NONE);
        } else {
            line.set_groups(line.groups() | changed);
        }
        self.table.store(slot, &line);
        if on == On::Closing {
            self.table.unlink(&mut self.shares[stream_of(line.peer())].closing, slot);
        }
        if on != On::Dirty {
            self.push_dirty(now, slot);
        }
        on != On::Dirty
    }

    /// It is dirty, and was in no list.
    pub(super) fn push_dirty(&mut self, now: Time, slot: u32) {
        let line = self.table.line(slot);
        let share = &mut self.shares[stream_of(line.peer())];
        self.table.push(&mut share.dirty, On::Dirty, slot, now);
        share.dirty_actives += (line.kind() == Kind::Active) as u64;
        self.dirty_actives += (line.kind() == Kind::Active) as u64;
    }

    /// The first that the stream has to send.
    pub(super) fn first_dirty(&self, stream: usize) -> Option<u32> {
        self.shares[stream].dirty.first()
    }

    /// What the stream has to send, closes among it.
    pub(super) fn dirty(&self, stream: usize) -> u32 {
        self.shares[stream].dirty.len()
    }

    /// Connections that the stream has to send.
    pub(super) fn dirty_actives(&self, stream: usize) -> u64 {
        self.shares[stream].dirty_actives
    }

    /// Connections that all streams have to send.
    pub(super) fn all_dirty_actives(&self) -> u64 {
        self.dirty_actives
    }

    /// The close was sent: it stays until it is acknowledged.
    pub(super) fn await_ack(&mut self, now: Time, slot: u32) {
        let stream = stream_of(self.table.line(slot).peer());
        self.table.push(&mut self.shares[stream].closing, On::Closing, slot, now);
    }

    /// The close that the stream sent first, of those that are not acknowledged.
    pub(super) fn first_closing(&self, stream: usize) -> Option<u32> {
        self.shares[stream].closing.first()
    }

    /// Takes a slot out of whichever list it stands in.
    pub(super) fn unlist(&mut self, slot: u32) {
        let line = self.table.line(slot);
        let list = match self.table.on(slot) {
            On::None => return,
            On::Held => &mut self.held,
            On::Waiting => &mut self.waiting,
            On::BackingOff => &mut self.backing_off,
            On::Missing => &mut self.missing,
            On::Dirty => {
                let share = &mut self.shares[stream_of(line.peer())];
                share.dirty_actives -= (line.kind() == Kind::Active) as u64;
                self.dirty_actives -= (line.kind() == Kind::Active) as u64;
                &mut share.dirty
            }
            On::Closing => &mut self.shares[stream_of(line.peer())].closing,
            On::Free => panic!("slot {slot} is free"),
        };
        self.table.unlink(list, slot);
    }

    // Counts.

    /// Own connections whose backup lies on this stream.
    pub(super) fn actives(&self, stream: usize) -> u64 {
        self.shares[stream].actives
    }

    /// Copies held here for this stream's peer.
    pub(super) fn copies(&self, stream: usize) -> u64 {
        self.shares[stream].copies
    }

    /// Whether nothing here has its other copy on this stream.
    pub(super) fn is_without(&self, stream: usize) -> bool {
        let Share { dirty, closing, actives, copies, .. } = &self.shares[stream];
        *actives == 0 && *copies == 0 && dirty.is_empty() && closing.is_empty()
    }

    /// Connections whose backup's kernel refused them, and since when there are any.
    pub(super) fn declined(&self) -> (u64, Time) {
        (self.declined, self.declined_since)
    }

    /// Notes of an active connection whether its backup's kernel refused it.
    pub(super) fn set_declined_by_backup(&mut self, now: Time, slot: u32, is_refused: bool) {
        match (self.table.is_declined(slot), is_refused) {
            (false, true) => {
                if self.declined == 0 {
                    self.declined_since = now;
                }
                self.declined += 1;
            }
            (true, false) => self.declined -= 1,
            _ => return,
        }
        self.table.set_declined(slot, is_refused);
    }

    fn end_declined(&mut self, slot: u32) {
        self.declined -= self.table.is_declined(slot) as u64;
        self.table.set_declined(slot, false);
    }

    /// The epoch in which connections begin.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Somebody has reached this epoch.
    pub(super) fn raise_epoch(&mut self, epoch: u32) {
        self.epoch = self.epoch.max(epoch);
    }

    /// A member fell silent, which may have claimed, unheard.
    pub(super) fn pass_unheard_claim(&mut self) {
        self.epoch = self.epoch.saturating_add(2);
    }

    // Sums.

    /// What was sent, for the digests.
    pub(super) fn sent_sums(&self) -> &Sums {
        &self.sent
    }

    /// What is held, for the digests.
    pub(super) fn copy_sums(&self) -> &Sums {
        &self.copy_sums
    }

    /// The sums take this connection for sent as it is now.
    pub(super) fn account_sent(&mut self, slot: u32) {
        let line = self.table.line(slot);
        let own = Place { slot, generation: line.generation() };
        let hash = hash(Place::of(line.peer()), own, line.stamp(), &self.table.connection(slot));
        self.set_sent(slot, line.peer(), hash);
    }

    /// The sums take this slot's connection for unsent, or for closed there.
    pub(super) fn account_unsent(&mut self, slot: u32) {
        self.set_sent(slot, self.table.line(slot).peer(), 0);
    }

    fn set_sent(&mut self, slot: u32, backup: Coordinate, hash: u32) {
        let old = self.table.set_digest(slot, hash);
        self.sent.replace(stream_of(backup), backup.slot(), old, hash);
    }

    /// The sums take the copy in this slot for what it is now.
    pub(super) fn account_copy(&mut self, slot: u32) {
        if is(Mutation::DigestStands) {
            return;
        }
        let line = self.table.line(slot);
        let own = Place { slot, generation: line.generation() };
        let hash = hash(own, Place::of(line.peer()), line.stamp(), &self.table.connection(slot));
        self.set_held(slot, hash);
    }

    fn set_held(&mut self, slot: u32, hash: u32) {
        let stream = stream_of(self.table.line(slot).peer());
        let old = self.table.set_digest(slot, hash);
        self.copy_sums.replace(stream, slot, old, hash);
    }

    // A connection of our own.

    /// A slot with a connection that is held and stands in no list yet. It begins above `over`, and
    /// above the lives of its tuple that are closing here. `None`: no slot is free.
    pub(super) fn open(
        &mut self,
        connection: &Connection,
        over: Option<Stamp>,
        is_unseen: bool,
    ) -> Option<u32> {
        let over = over.max(self.table.closing_stamp(&connection.original));
        let slot = self.table.allocate()?;
        let mut line = self.table.line(slot);
        line.set_kind(Kind::Held);
        line.set_unseen(is_unseen);
        let mut stamp = over.map_or(Stamp { epoch: 0, version: 1 }, Stamp::claimed);
        stamp.epoch = stamp.epoch.max(self.epoch);
        self.epoch = stamp.epoch;
        line.set_stamp(stamp);
        line.set_peer(Coordinate::NOWHERE);
        line.set_groups(groups::ALL);
        line.set_last(Seq::NONE);
        self.table.fill(slot, line, connection);
        self.table.set_passed_until(slot, 0);
        self.table.set_written(slot, Written::No);
        self.table.set_written_at(slot, 0);
        Some(slot)
    }

    /// What was held, and stands in no list, is active.
    pub(super) fn activate(&mut self, slot: u32) {
        assert!(self.table.kind(slot) == Kind::Held && self.table.on(slot) == On::None);
        self.table.update(slot, |line| line.set_kind(Kind::Active));
    }

    /// The same, of what was held unseen, in one step.
    pub(super) fn activate_unseen(&mut self, slot: u32, amend: impl FnOnce(&mut Amend<'_>)) {
        assert!(self.table.kind(slot) == Kind::Held && self.table.on(slot) == On::None);
        self.table.forget_declines(slot);
        self.table.update(slot, |line| {
            line.set_kind(Kind::Active);
            line.set_unseen(false);
            amend(&mut Amend(line));
        });
    }

    /// An active that nobody has heard of, and that stands in no list, is only held until its end
    /// is told.
    pub(super) fn hold_to_the_end(&mut self, slot: u32) {
        let line = self.table.line(slot);
        assert!(line.kind() == Kind::Active && !line.peer().is_somewhere());
        self.table.update(slot, |line| line.set_kind(Kind::Held));
    }

    /// The connection's backup is there from now on; everything must be sent to it.
    pub(super) fn assign(&mut self, slot: u32, backup: Coordinate, session: u16) {
        assert!(self.table.on(slot) == On::None);
        self.table.forget_declines(slot);
        self.table.update(slot, |line| {
            line.set_peer(backup);
            line.set_groups(groups::ALL);
            line.set_last(Seq::NONE);
            line.set_session(session);
        });
        self.shares[stream_of(backup)].actives += 1;
    }

    /// The connection has no backup from now on; it stands in no list afterwards.
    pub(super) fn unassign(&mut self, slot: u32) {
        self.unlist(slot);
        self.end_declined(slot);
        let peer = self.table.line(slot).peer();
        if peer.is_somewhere() {
            self.account_unsent(slot);
            self.shares[stream_of(peer)].actives -= 1;
            self.table.update(slot, |line| {
                line.set_peer(Coordinate::NOWHERE);
                line.set_last(Seq::NONE);
            });
        }
    }

    /// The connection is over: its backup is still to be told, and it stands in no list. What its
    /// entry had left is told as it is then.
    pub(super) fn begin_closing(&mut self, slot: u32, now: Time, end: End) {
        self.unlist(slot);
        self.end_declined(slot);
        let stream = stream_of(self.table.line(slot).peer());
        self.shares[stream].actives -= 1;
        let passed_until = match end {
            End::Seen => 0,
            End::Unseen { left_s } => now.second_after(left_s),
            End::Left => LEFT,
        };
        self.table.set_passed_until(slot, passed_until);
        self.table.update(slot, |line| {
            line.set_kind(Kind::Closing);
            line.set_unseen(end != End::Seen);
            line.set_stamp(line.stamp().changed());
            line.set_last(Seq::NONE);
        });
    }

    /// What is known of the end of the connection in this slot, which is closing.
    pub(super) fn end_of(&self, slot: u32, now: Time) -> End {
        match (self.table.line(slot).is_unseen(), self.table.passed_until(slot)) {
            (false, _) => End::Seen,
            (true, LEFT) => End::Left,
            (true, _) => End::Unseen { left_s: self.passed_s(slot, now) },
        }
    }

    /// A close that nobody waits for any more.
    pub(super) fn drop_closing(&mut self, slot: u32) {
        self.unlist(slot);
        self.account_unsent(slot);
        self.clear(slot);
    }

    // Copies.

    /// An empty slot that was leased has the copy of this connection.
    pub(super) fn fill_copy(
        &mut self,
        slot: u32,
        (active, stamp): (Coordinate, Stamp),
        is_witnessed: bool,
        previous: Coordinate,
        connection: &Connection,
    ) {
        let mut line = self.table.line(slot);
        line.set_session(0);
        line.set_kind(Kind::Backup);
        line.set_peer(active);
        line.set_stamp(stamp);
        line.set_claimed(is_witnessed);
        line.set_groups(0);
        line.set_last(Seq::NONE);
        self.table.set_former(slot, previous);
        self.table.fill(slot, line, connection);
    }

    /// The connection in this slot, which was demoted, is the copy of what is active there.
    pub(super) fn become_copy(&mut self, slot: u32, active: Coordinate) {
        assert!(self.table.kind(slot) == Kind::Active && self.table.on(slot) == On::None);
        self.table.update(slot, |line| {
            line.set_kind(Kind::Backup);
            line.set_peer(active);
            line.set_claimed(false);
            line.set_groups(0);
        });
        self.table.set_former(slot, Coordinate::NOWHERE);
    }

    /// The copy in this slot counts from now on; `seen` is the comparison that it is as if named
    /// in.
    pub(super) fn begin_copy(&mut self, slot: u32, seen: u8) {
        let stream = stream_of(self.table.line(slot).peer());
        self.shares[stream].copies += 1;
        self.table.set_written(slot, Written::No);
        self.table.set_written_at(slot, 0);
        self.table.set_passed_until(slot, 0);
        self.table.set_seen(slot, seen);
        self.account_copy(slot);
    }

    /// The copy in this slot, whose line still says so, is about to be none.
    pub(super) fn end_copy(&mut self, slot: u32) {
        let stream = stream_of(self.table.line(slot).peer());
        self.shares[stream].copies -= 1;
        self.set_held(slot, 0);
    }

    /// A copy that does not count just now has its active there.
    pub(super) fn turn_to(&mut self, slot: u32, active: Coordinate) {
        assert!(self.table.kind(slot) == Kind::Backup && self.table.digest(slot) == 0);
        self.table.update(slot, |line| line.set_peer(active));
    }

    /// Another state of the copy in this slot, or parts of one.
    pub(super) fn overwrite(
        &mut self,
        slot: u32,
        stamp: Stamp,
        previous: Coordinate,
        change: impl FnOnce(State) -> State,
    ) {
        self.table.set_former(slot, previous);
        self.table.update(slot, |line| {
            line.set_state(&change(line.state()));
            line.set_stamp(stamp);
        });
        self.account_copy(slot);
    }

    /// What was a copy until now is active here, because its active is gone: presumed, without a
    /// backup. Tells its previous backup, if its active had named one.
    pub(super) fn promote(&mut self, slot: u32, amend: impl FnOnce(&mut Amend<'_>)) -> Coordinate {
        self.end_copy(slot);
        self.table.set_passed_until(slot, 0);
        self.table.forget_declines(slot);
        // First where it is taken over from: an active that does not say so is nobody's to ask
        // back.
        let previous = self.table.former(slot);
        self.table.set_former(slot, self.table.line(slot).peer());
        self.table.update(slot, |line| {
            line.set_kind(Kind::Active);
            line.set_peer(Coordinate::NOWHERE);
            line.set_claimed(false);
            amend(&mut Amend(line));
        });
        previous
    }

    /// What was a copy until now is active here, because its traffic is: claimed. If the pair
    /// stays, its former active is the backup. Otherwise tells its previous backup.
    pub(super) fn claim(
        &mut self,
        slot: u32,
        stamp: Stamp,
        session: u16,
        is_pair_kept: bool,
    ) -> Coordinate {
        self.end_copy(slot);
        self.table.set_passed_until(slot, 0);
        self.table.forget_declines(slot);
        let mut line = self.table.line(slot);
        let peer = line.peer();
        line.set_kind(Kind::Active);
        line.set_stamp(stamp);
        self.raise_epoch(stamp.epoch);
        line.set_last(Seq::NONE);
        line.set_groups(groups::ALL);
        line.set_claimed(true);
        line.set_session(session);
        let previous = self.table.former(slot);
        if is_pair_kept {
            self.table.set_former(slot, Coordinate::NOWHERE);
            self.table.store(slot, &line);
            self.shares[stream_of(peer)].actives += 1;
        } else {
            line.set_peer(Coordinate::NOWHERE);
            self.table.set_former(slot, peer);
            self.table.store(slot, &line);
        }
        previous
    }

    // Slots.

    /// A slot that is to be leased; it is nobody's until it is [lent](Self::lend).
    pub(super) fn allocate(&mut self) -> Option<u32> {
        self.table.allocate()
    }

    /// An allocated slot is leased.
    pub(super) fn lend(&mut self, slot: u32, lessee: Coordinate, session: u16) {
        self.table.update(slot, |line| {
            line.set_kind(Kind::Leased);
            line.set_peer(lessee);
            line.set_session(session);
        });
    }

    /// The connection in this slot, which stands in no list and does not count, is no more; one
    /// life later the slot is leased.
    pub(super) fn drop_to_lease(&mut self, slot: u32, lessee: Coordinate, session: u16) {
        self.table.forget(slot);
        self.table.update(slot, |line| {
            line.set_generation(line.generation().next());
            line.set_kind(Kind::Leased);
            line.set_peer(lessee);
            line.set_last(Seq::NONE);
            line.set_session(session);
            line.set_claimed(false);
        });
        self.table.set_former(slot, Coordinate::NOWHERE);
        self.table.set_extra(slot, &Extra::NONE);
    }

    /// What was to come into this leased slot never will: it is in its next life.
    pub(super) fn skip_life(&mut self, slot: u32) {
        assert!(self.table.kind(slot) == Kind::Leased);
        self.table.update(slot, |line| line.set_generation(line.generation().next()));
    }

    /// A free slot was named in a lease that nobody may take for one any more: two lives later.
    pub(super) fn skip_lives(&mut self, slot: u32) {
        assert!(self.table.kind(slot) == Kind::Free);
        self.table.update(slot, |line| line.set_generation(line.generation().next().next()));
    }

    /// Nobody finds the connection in this slot any more, and the slot is free.
    pub(super) fn clear(&mut self, slot: u32) {
        self.table.forget(slot);
        self.table.recycle(slot);
    }

    /// A slot without a connection is free.
    pub(super) fn free(&mut self, slot: u32) {
        self.table.recycle(slot);
    }

    // What stands beside all that.

    /// Changes what no list, count or sum goes by.
    pub(super) fn amend(&mut self, slot: u32, amend: impl FnOnce(&mut Amend<'_>)) {
        self.table.update(slot, |line| amend(&mut Amend(line)));
    }

    /// See [`Table::set_extra`].
    pub(super) fn set_extra(&mut self, slot: u32, extra: &Extra) {
        self.table.set_extra(slot, extra);
    }

    /// See [`Table::former`].
    pub(super) fn set_former(&mut self, slot: u32, former: Coordinate) {
        self.table.set_former(slot, former);
    }

    /// The connection changes its backup: its previous one is remembered until it is released.
    pub(super) fn begin_move(&mut self, slot: u32, previous: Coordinate) {
        // Marked as moving before, and until after, that is named: a connection that is not moving
        // and has a former coordinate was taken over from there.
        self.table.set_moving(slot, true);
        self.table.set_former(slot, previous);
    }

    /// It changes its backup no more.
    pub(super) fn end_move(&mut self, slot: u32) {
        self.table.set_former(slot, Coordinate::NOWHERE);
        self.table.set_moving(slot, false);
    }

    /// What is no active was not changing its backup either when its process was killed.
    pub(super) fn forget_move(&mut self, slot: u32) {
        self.table.set_moving(slot, false);
    }

    /// See [`Table::written`].
    pub(super) fn set_written(&mut self, slot: u32, written: Written) {
        self.table.set_written(slot, written);
    }

    /// See [`Table::written_at`].
    pub(super) fn set_written_at(&mut self, slot: u32, second: u32) {
        self.table.set_written_at(slot, second);
    }

    /// See [`Table::doubt_written`].
    pub(super) fn doubt_written(&mut self) {
        self.table.doubt_written();
    }

    /// See [`Table::passed_until`].
    pub(super) fn set_passed_until(&mut self, slot: u32, second: u32) {
        self.table.set_passed_until(slot, second);
    }

    /// See [`Table::seen`].
    pub(super) fn set_seen(&mut self, slot: u32, round: u8) {
        self.table.set_seen(slot, round);
    }

    /// Of a copy: whether its active may believe that the kernel here does not have it. Then a
    /// commit that succeeds is told as well.
    pub(super) fn set_success_due(&mut self, slot: u32, is_due: bool) {
        assert!(self.table.kind(slot) == Kind::Backup, "of an active it counts");
        self.table.set_declined(slot, is_due);
    }

    /// See [`Table::hear_decline`].
    pub(super) fn hear_decline(&mut self, slot: u32, number: u32) -> DeclineOrder {
        self.table.hear_decline(slot, number)
    }

    // Memory taken up again.

    /// An active with a backup counts as before.
    pub(super) fn take_up_active(&mut self, slot: u32) {
        self.shares[stream_of(self.table.line(slot).peer())].actives += 1;
    }

    /// A copy counts as before.
    pub(super) fn take_up_copy(&mut self, slot: u32, written: Written) {
        self.table.set_written(slot, written);
        self.shares[stream_of(self.table.line(slot).peer())].copies += 1;
        // It may have been told before that the kernel does not have it.
        self.table.set_declined(slot, true);
    }

    /// Whether the sums, and the counts beside them, are what the table says; for tests: it looks
    /// at every slot.
    #[cfg(any(test, feature = "mutations"))]
    pub(super) fn check(&self) -> Result<(), String> {
        let (mut sent, mut held) = (Sums::new(), Sums::new());
        let mut counts = vec![(0u64, 0u64, 0u64); STREAMS_MAX];
        for slot in 0..self.table.capacity() {
            let (line, digest) = (self.table.line(slot), self.table.digest(slot));
            let (peer, own) = (line.peer(), Place { slot, generation: line.generation() });
            let at = || {
                format!("slot {slot}, {:?} of {peer}, on {:?}", line.kind(), self.table.on(slot))
            };
            let now =
                |backup, active| hash(backup, active, line.stamp(), &self.table.connection(slot));
            match line.kind() {
                Kind::Backup => {
                    let stream = stream_of(peer);
                    if digest != now(own, Place::of(peer)) {
                        return Err(format!("{}: a copy that is not what was added up", at()));
                    }
                    held.replace(stream, slot, 0, digest);
                    counts[stream].1 += 1;
                }
                Kind::Active | Kind::Closing if peer.is_somewhere() => {
                    let stream = stream_of(peer);
                    let is_sent = line.kind() == Kind::Active && self.table.on(slot) == On::None;
                    if is_sent && digest != now(Place::of(peer), own) {
                        return Err(format!("{}: what was sent is not what was added up", at()));
                    }
                    sent.replace(stream, peer.slot(), 0, digest);
                    let is_active = line.kind() == Kind::Active;
                    counts[stream].0 += is_active as u64;
                    counts[stream].2 += (is_active && self.table.on(slot) == On::Dirty) as u64;
                }
                _ if digest != 0 => return Err(format!("{}: still part of a digest", at())),
                _ => {}
            }
        }
        if sent != self.sent || held != self.copy_sums {
            return Err("the sums are not those of what was added up".to_owned());
        }
        for (stream, share) in self.shares.iter().enumerate() {
            let is = (share.actives, share.copies, share.dirty_actives);
            if is != counts[stream] {
                return Err(format!("stream {stream} counts {is:?} and has {:?}", counts[stream]));
            }
        }
        let dirty: u64 = counts.iter().map(|(_, _, dirty)| dirty).sum();
        match dirty == self.dirty_actives {
            true => Ok(()),
            false => Err(format!("{} dirty, and has {dirty}", self.dirty_actives)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::conn::Tuple;
    use crate::memory::{MemorySize, OwnedMemory};

    const NOW: Time = Time(1);

    fn ledger(memory: &OwnedMemory) -> Ledger<'_> {
        Ledger::over(Table::new(&memory.parts(), 1))
    }

    fn memory() -> OwnedMemory {
        OwnedMemory::new(&MemorySize::new(64, 512 << 10))
    }

    fn connection(port: u16) -> Connection {
        let original = Tuple::v4(6, ([10, 0, 0, 1].into(), port), ([10, 0, 0, 2].into(), 80));
        Connection::new(original, original.mirrored(), State { tcp_state: 3, ..State::default() })
    }

    fn place(member: u8, slot: u32) -> Coordinate {
        Coordinate::new(member, 0, slot, Default::default())
    }

    fn stream(member: u8) -> usize {
        stream_index(member, 0)
    }

    /// A copy of member 2's connection, in a slot that was leased to it.
    fn copy(ledger: &mut Ledger<'_>, port: u16) -> u32 {
        let slot = ledger.allocate().expect("there is room");
        ledger.lend(slot, place(2, 0), 1);
        let stamp = Stamp { epoch: 3, version: 1 };
        ledger.fill_copy(slot, (place(2, 7), stamp), false, Coordinate::NOWHERE, &connection(port));
        ledger.begin_copy(slot, 0);
        slot
    }

    /// A connection of our own, which was sent to member 2.
    fn sent(ledger: &mut Ledger<'_>, port: u16) -> u32 {
        let slot = ledger.open(&connection(port), None, false).expect("there is room");
        ledger.hold(NOW, slot);
        assert_eq!(ledger.first_held(), Some(slot));
        ledger.unlist(slot);
        ledger.activate(slot);
        ledger.assign(slot, place(2, 9), 1);
        assert!(ledger.mark_dirty(NOW, slot, groups::ALL, |_| true));
        assert_eq!((ledger.dirty(stream(2)), ledger.all_dirty_actives()), (1, 1));
        ledger.unlist(slot);
        ledger.account_sent(slot);
        slot
    }

    #[test]
    fn counts_and_sums_follow_a_connection_from_its_first_delta_to_its_last() {
        let memory = memory();
        let mut ledger = ledger(&memory);
        let slot = sent(&mut ledger, 1);
        assert_eq!((ledger.actives(stream(2)), ledger.all_dirty_actives()), (1, 0));
        assert_eq!(ledger.check(), Ok(()));
        assert!(ledger.mark_dirty(NOW, slot, groups::MARK, |_| true));
        assert!(!ledger.mark_dirty(NOW, slot, groups::STATE, |_| true), "it is dirty already");
        assert_eq!(ledger.line(slot).groups(), groups::MARK | groups::STATE);
        ledger.begin_closing(slot, NOW, End::Seen);
        assert_eq!((ledger.actives(stream(2)), ledger.dirty(stream(2))), (0, 0));
        ledger.push_dirty(NOW, slot);
        assert_eq!((ledger.dirty(stream(2)), ledger.all_dirty_actives()), (1, 0), "a close");
        ledger.unlist(slot);
        ledger.account_unsent(slot);
        ledger.await_ack(NOW, slot);
        assert_eq!(ledger.first_closing(stream(2)), Some(slot));
        assert!(!ledger.is_without(stream(2)));
        ledger.drop_closing(slot);
        assert!(ledger.is_without(stream(2)) && ledger.check() == Ok(()));
    }

    #[test]
    fn a_copy_counts_until_it_is_claimed_or_promoted_or_goes() {
        for what in ["claimed", "claimed from the dead", "promoted", "gone"] {
            let memory = memory();
            let mut ledger = ledger(&memory);
            let slot = copy(&mut ledger, 1);
            assert_eq!((ledger.copies(stream(2)), ledger.check()), (1, Ok(())));
            let stamp = Stamp { epoch: 3, version: 2 };
            ledger.overwrite(slot, stamp, Coordinate::NOWHERE, |old| State { mark: 5, ..old });
            assert_eq!(ledger.check(), Ok(()), "as it is now");
            ledger.set_written_at(slot, 1000);
            let actives = match what {
                "claimed" => {
                    ledger.claim(slot, stamp.claimed(), 1, true);
                    assert_eq!(ledger.line(slot).peer(), place(2, 7), "the pair stays");
                    ledger.push_dirty(NOW, slot); // As what is not sent yet always is.
                    1
                }
                "claimed from the dead" => {
                    ledger.claim(slot, stamp.claimed(), 1, false);
                    assert_eq!(ledger.former(slot), place(2, 7), "to be told when it is back");
                    0
                }
                "promoted" => {
                    ledger.promote(slot, |_| {});
                    assert!(!ledger.line(slot).is_claimed());
                    assert_eq!(ledger.line(slot).stamp(), stamp, "it outdoes nobody");
                    0
                }
                _ => {
                    ledger.end_copy(slot);
                    ledger.drop_to_lease(slot, place(2, 0), 1);
                    0
                }
            };
            assert_eq!((ledger.copies(stream(2)), ledger.actives(stream(2))), (0, actives));
            assert_eq!(ledger.check(), Ok(()), "{what}");
            if what != "gone" {
                let heard = ledger.hear_decline(slot, 1);
                assert_eq!(heard, DeclineOrder::Newest, "when it was written is no decline");
            }
        }
    }

    #[test]
    fn what_changes_without_being_added_up_is_found() {
        let memory = memory();
        let mut ledger = ledger(&memory);
        let slot = copy(&mut ledger, 1);
        ledger.amend(slot, |line| line.set_stamp(line.stamp().changed()));
        assert!(ledger.check().is_err());
        ledger.account_copy(slot);
        assert_eq!(ledger.check(), Ok(()));
    }

    #[test]
    fn who_gives_way_is_a_copy_and_counts_as_one() {
        let memory = memory();
        let mut ledger = ledger(&memory);
        let slot = sent(&mut ledger, 1);
        ledger.unassign(slot);
        ledger.become_copy(slot, place(2, 9));
        ledger.begin_copy(slot, 0);
        assert_eq!((ledger.actives(stream(2)), ledger.copies(stream(2))), (0, 1));
        ledger.end_copy(slot);
        ledger.turn_to(slot, place(3, 4));
        ledger.begin_copy(slot, 0);
        assert_eq!((ledger.copies(stream(2)), ledger.copies(stream(3))), (0, 1));
        assert_eq!(ledger.check(), Ok(()));
    }

    #[test]
    fn what_begins_is_above_what_was_closed_and_in_the_highest_epoch() {
        let memory = memory();
        let mut ledger = ledger(&memory);
        let first = sent(&mut ledger, 1);
        ledger.amend(first, |line| line.set_stamp(Stamp { epoch: 4, version: 9 }));
        ledger.begin_closing(first, NOW, End::Seen);
        let next = ledger.open(&connection(1), None, false).expect("there is room");
        assert_eq!(ledger.line(next).stamp().epoch, 5, "above the one that is closing");
        ledger.raise_epoch(8);
        ledger.pass_unheard_claim();
        let other = ledger.open(&connection(2), None, false).expect("there is room");
        assert_eq!(ledger.line(other).stamp(), Stamp { epoch: 10, version: 1 });
        let over = Some(Stamp { epoch: 12, version: 3 });
        let third = ledger.open(&connection(3), over, true).expect("there is room");
        assert!(ledger.line(third).stamp() > Stamp { epoch: 12, version: 3 });
        assert_eq!(ledger.epoch(), ledger.line(third).stamp().epoch);
    }

    #[test]
    fn what_was_refused_counts_from_the_first_until_the_last_is_taken() {
        let memory = memory();
        let mut ledger = ledger(&memory);
        let (first, second) = (sent(&mut ledger, 1), sent(&mut ledger, 2));
        let later = NOW.after(Duration::from_secs(1));
        ledger.set_declined_by_backup(NOW, first, true);
        ledger.set_declined_by_backup(later, second, true);
        ledger.set_declined_by_backup(later, second, true);
        assert_eq!(ledger.declined(), (2, NOW));
        ledger.set_declined_by_backup(later, first, false);
        ledger.unassign(second);
        assert_eq!(ledger.declined().0, 0, "it has no backup that could have refused it");
        ledger.set_declined_by_backup(later, first, true);
        assert_eq!(ledger.declined(), (1, later));
    }

    #[test]
    fn who_waits_is_taken_in_order_whatever_list_it_waits_in() {
        let memory = memory();
        let mut ledger = ledger(&memory);
        let slots: Vec<u32> = (1..5)
            .map(|port| {
                let slot = ledger.open(&connection(port), None, false).expect("there is room");
                ledger.activate(slot);
                slot
            })
            .collect();
        ledger.wait(NOW, slots[0]);
        ledger.wait(NOW, slots[1]);
        ledger.back_off(NOW, slots[2]);
        assert_eq!((ledger.waiting(), ledger.unprotected()), (2, 3));
        ledger.unlist(slots[0]);
        assert_eq!(ledger.take_waiting(), Some(slots[1]));
        assert_eq!(ledger.first_backing_off(), Some(slots[2]));
        assert_eq!(ledger.take_backing_off(), Some(slots[2]));
        assert_eq!((ledger.take_waiting(), ledger.unprotected()), (None, 0));
        ledger.hold_to_the_end(slots[3]);
        assert_eq!(ledger.kind(slots[3]), Kind::Held);
        let copy = copy(&mut ledger, 9);
        ledger.miss(NOW, copy);
        assert_eq!((ledger.missing(), ledger.first_missing()), (1, Some(copy)));
        assert_eq!(ledger.take_missing(), Some(copy));
    }
}
