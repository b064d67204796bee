//! The table slice of one shard: slots, the index over them, and the lists they stand in.
//!
//! Each slot stands in at most one list at a time, so two links a slot are enough: the free
//! slots, the held connections in order of age, the connections that wait for a backup, and
//! per stream what is dirty and what is closing. The lists are private and can be built again
//! from the slots; everything else lies in the shard's memory.

use std::sync::atomic::{AtomicU64, Ordering};

use super::coordinate::Coordinate;
use super::extra::Extra;
use super::extras::Extras;
use super::index::Index;
use super::slot::{Addresses, Connection, Kind, Line, Slot, Stamp};
use super::tuple::Tuple;
use crate::counters::{Counter, Counters};
use crate::kill::kill_point;
use crate::memory::Memory;
use crate::time::Time;

const NIL: u32 = u32::MAX;

/// Which list a slot stands in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum On {
    /// In none.
    #[default]
    None,
    /// Free slots, oldest first.
    Free,
    /// Connections younger than the hold time, oldest first.
    Held,
    /// Connections that have no backup, longest waiting first.
    Waiting,
    /// Connections that were refused because the other side holds a newer state, longest first.
    BackingOff,
    /// Connections and closes that a stream must send.
    Dirty,
    /// Copies whose entry the kernel does not have, longest first.
    Missing,
    /// Closes sent on a stream and not yet acknowledged, in the order of sending.
    Closing,
}

/// What a decline that arrives is among those of its pair of copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeclineOrder {
    /// A later one was heard before.
    Overtaken,
    /// The latest.
    Newest,
    /// The latest of those that this process heard; the one before it, which was killed, may have
    /// heard a later one.
    PerhapsNewest,
}

/// A list of slots; its links are in the table.
#[derive(Clone, Copy, Debug)]
pub struct List {
    head: u32,
    tail: u32,
    len: u32,
}

impl Default for List {
    fn default() -> Self {
        List { head: NIL, tail: NIL, len: 0 }
    }
}

impl List {
    /// The first slot.
    pub fn first(&self) -> Option<u32> {
        (self.head != NIL).then_some(self.head)
    }

    /// How many slots stand in it.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether none does.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// What the kernel's entry of a copy tells of packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// Nothing: it was not written since it is a copy's.
    No,
    /// Nothing yet: it has its normal timeout since its active fell silent.
    Normal,
    /// Perhaps something: it was there, without the timeout of copies, which a packet took from it
    /// or a takeover.
    AsItWas,
    /// The same as with [`Yes`](Self::Yes), but this process was not there all the time, or lost
    /// events: what has passed it may have been another connection, which its own end does not end.
    Resumed,
    /// What has passed it since it was written shows in its timeout.
    Yes,
}

/// Of a connection: its backup's kernel refused it. Of a copy: its active was told that.
const DECLINED: u8 = 1;
/// Of a connection: a process that was killed may have heard a later decline.
const UNSURE: u8 = 2;
/// It was here before this process.
const TAKEN_UP: u8 = 4;

#[derive(Clone, Copy)]
struct Side {
    next: u32,
    prev: u32,
    on: On,
    /// [`DECLINED`], [`UNSURE`], [`TAKEN_UP`].
    flags: u8,
    /// Of a copy: how the kernel has taken its entry since it is one.
    written: Written,
    /// Of a copy: the comparison in which its active named it last.
    seen: u8,
    /// Of a connection: the number of the latest decline by its backup; 0: none. Of a copy, and of
    /// what is left of one: the second in which this process last wrote its entry; 0: not known.
    heard_or_written_at: u32,
    /// Of a copy: until when its entry would last, as packets had left it when it was last written
    /// over, in whole seconds, begun ones counted; 0: none had passed. Of what was taken over and
    /// has no entry, and of what is closed: until when that would last.
    passed_until: u32,
    /// What the digests have added up of it.
    digest: u32,
    since: Time,
}

const _: () = assert!(size_of::<Side>() == 32);

/// One shard's slots.
pub struct Table<'m> {
    slots: &'m [Slot],
    former: &'m [AtomicU64],
    extras: Extras<'m>,
    /// From tuples to slots.
    pub index: Index<'m>,
    counters: Counters<'m>,
    side: Vec<Side>,
    free: List,
}

impl<'m> Table<'m> {
    /// A table over zeroed memory: every slot is free.
    pub fn new(memory: &Memory<'m>, index_key: u64) -> Table<'m> {
        let extras = Extras::new(memory.extras, memory.extra_of);
        let mut table = Table::over(memory, index_key, extras);
        let mut free = List::default();
        for slot in 0..table.slots.len() as u32 {
            assert!(table.kind(slot) == Kind::Free, "a new table starts in zeroed memory");
            table.push(&mut free, On::Free, slot, Time(0));
        }
        table.free = free;
        table.counters.set(Counter::SlotsFree, table.slots.len() as u64);
        table
    }

    /// The table that a killed process left behind. A slot that was being written is freed, two
    /// lives later: nobody can tell what it held. The index is made anew, and the gauges are
    /// counted. Every slot but the free ones stands in no list. Returns how many slots were torn.
    pub fn resume(memory: &Memory<'m>, index_key: u64) -> (Table<'m>, u32) {
        let mut torn = 0;
        for slot in memory.slots {
            if slot.is_torn() {
                torn += 1;
                slot.update(|line| {
                    line.set_generation(line.generation().next().next());
                    line.set_kind(Kind::Free);
                });
            }
        }
        let is_connection = |slot: u32| memory.slots[slot as usize].line().kind().is_connection();
        let extras = Extras::resume(memory.extras, memory.extra_of, is_connection);
        let mut table = Table::over(memory, index_key, extras);
        table.index.clear();
        let mut free = List::default();
        for kind in KINDS {
            if let Some(gauge) = gauge_of(kind) {
                table.counters.set(gauge, 0);
            }
        }
        for slot in 0..table.slots.len() as u32 {
            let kind = table.kind(slot);
            let unsure = if kind == Kind::Active { UNSURE } else { 0 };
            table.side[slot as usize].flags = TAKEN_UP | unsure;
            if let Some(gauge) = gauge_of(kind) {
                table.counters.count(gauge);
            }
            if kind.is_connection() || kind == Kind::Closing {
                let (original, reply) = table.tuples(slot);
                table.index.insert(&original, slot);
                table.index.insert(&reply, slot);
            } else if kind == Kind::Free {
                table.push(&mut free, On::Free, slot, Time(0));
                table.set_former(slot, Coordinate::NOWHERE);
                table.update(slot, |line| {
                    line.set_peer(Coordinate::NOWHERE);
                    line.set_groups(0);
                    line.set_last(crate::seq::Seq::NONE);
                    line.set_moving(false);
                    line.set_unseen(false);
                    line.set_spent(false);
                });
            }
        }
        table.free = free;
        (table, torn)
    }

    fn over(memory: &Memory<'m>, index_key: u64, extras: Extras<'m>) -> Table<'m> {
        let side = Side {
            next: NIL,
            prev: NIL,
            on: On::None,
            flags: 0,
            written: Written::No,
            seen: 0,
            heard_or_written_at: 0,
            passed_until: 0,
            digest: 0,
            since: Time(0),
        };
        Table {
            slots: memory.slots,
            former: memory.former,
            extras,
            index: Index::new(memory.index, index_key),
            counters: Counters::new(memory.counters),
            side: vec![side; memory.slots.len()],
            free: List::default(),
        }
    }

    /// Slots of the slice.
    pub fn capacity(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Slots that nobody uses.
    pub fn room(&self) -> u32 {
        self.free.len
    }

    /// The first line of a slot.
    pub fn line(&self, slot: u32) -> Line {
        self.slots[slot as usize].line()
    }

    /// What a slot holds.
    pub fn kind(&self, slot: u32) -> Kind {
        self.line(slot).kind()
    }

    /// Both tuples of a slot.
    pub fn tuples(&self, slot: u32) -> (Tuple, Tuple) {
        self.slots[slot as usize].tuples()
    }

    /// The connection in a slot.
    pub fn connection(&self, slot: u32) -> Connection {
        Connection { extra: self.extras.get(slot), ..self.slots[slot as usize].connection() }
    }

    /// What the connection in a slot has that only few have.
    pub fn extra(&self, slot: u32) -> Extra {
        self.extras.get(slot)
    }

    /// Whether it has anything of that.
    pub fn has_extra(&self, slot: u32) -> bool {
        self.extras.has(slot)
    }

    /// Whether what only few connections have can be replaced; if not, that is counted.
    pub fn may_set_extra(&self, slot: u32) -> bool {
        let may = self.extras.has(slot) || self.extras.room() > 0;
        if !may {
            self.counters.count(Counter::ExtrasFull);
        }
        may
    }

    /// Replaces what only few connections have. If no record is free it stays as it was, which is
    /// counted.
    pub fn set_extra(&mut self, slot: u32, extra: &Extra) {
        if !self.extras.set(slot, extra) {
            self.counters.count(Counter::ExtrasFull);
        }
    }

    /// Asks the processor to fetch a slot's first line.
    pub fn prefetch(&self, slot: u32) {
        if let Some(slot) = self.slots.get(slot as usize) {
            crate::prefetch::prefetch(slot);
        }
    }

    /// Replaces the first line and keeps the gauges of kinds true.
    pub fn store(&mut self, slot: u32, line: &Line) {
        self.recount(self.kind(slot), line.kind());
        self.slots[slot as usize].store(line);
    }

    /// Changes the first line in place.
    pub fn update(&mut self, slot: u32, change: impl FnOnce(&mut Line)) {
        let mut line = self.line(slot);
        change(&mut line);
        self.store(slot, &line);
    }

    /// Fills a slot with a connection and enters it into the index. The line brings everything
    /// but the tuples, the state and the extra.
    pub fn fill(&mut self, slot: u32, mut line: Line, connection: &Connection) {
        let addresses: Addresses = line.set_tuples(&connection.original, &connection.reply);
        line.set_state(&connection.state);
        self.recount(self.kind(slot), line.kind());
        self.set_extra(slot, &connection.extra);
        self.side[slot as usize].flags &= !TAKEN_UP;
        self.slots[slot as usize].store_with(&line, &addresses);
        self.index.insert(&connection.original, slot);
        self.index.insert(&connection.reply, slot);
    }

    /// Takes a slot out of the index: nobody finds its connection any more. One that is closing
    /// stays in it until its close is acknowledged, for [`closing_stamp`](Self::closing_stamp).
    pub fn forget(&mut self, slot: u32) {
        let (original, reply) = self.tuples(slot);
        self.index.remove(&original, slot);
        self.index.remove(&reply, slot);
    }

    /// The connection with this original tuple, one of our own before a copy for another member,
    /// and of several copies the newest.
    pub fn find_original(&self, original: &Tuple) -> Option<u32> {
        let own = |slot| {
            matches!(self.kind(slot), Kind::Held | Kind::Active) && self.tuples(slot).0 == *original
        };
        let copy = |slot| self.kind(slot) == Kind::Backup && self.tuples(slot).0 == *original;
        self.index.find(original, own).or_else(|| self.newest(original, copy))
    }

    /// The connection with both tuples.
    pub fn find_exact(&self, original: &Tuple, reply: &Tuple) -> Option<u32> {
        let is_it =
            |slot| self.kind(slot).is_connection() && self.tuples(slot) == (*original, *reply);
        self.newest(original, is_it)
    }

    /// The highest stamp of the lives of this tuple that ended here and whose close is not
    /// acknowledged yet.
    pub fn closing_stamp(&self, original: &Tuple) -> Option<Stamp> {
        let is_it = |slot| self.kind(slot) == Kind::Closing && self.tuples(slot).0 == *original;
        self.newest(original, is_it).map(|slot| self.line(slot).stamp())
    }

    /// Of the slots with this tuple that are wanted, the one with the highest stamp.
    fn newest(&self, tuple: &Tuple, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        let mut newest: Option<(Stamp, u32)> = None;
        self.index.find(tuple, |slot| {
            if is_it(slot) {
                newest = newest.max(Some((self.line(slot).stamp(), slot)));
            }
            false
        });
        newest.map(|(_, slot)| slot)
    }

    /// Takes the slot that was free longest; it stays `Free` until it is filled or leased.
    pub fn allocate(&mut self) -> Option<u32> {
        let mut free = self.free;
        let slot = self.pop(&mut free);
        self.free = free;
        slot
    }

    /// Frees a slot; it must be in no list and not in the index. Two lives pass: one life on is the
    /// name that a lessee may still believe to be its own, after a close that did not find its
    /// copy.
    pub fn recycle(&mut self, slot: u32) {
        assert!(self.side[slot as usize].digest == 0, "slot {slot} is still part of a digest");
        let mut line = self.line(slot);
        line.set_generation(line.generation().next().next());
        line.set_kind(Kind::Free);
        line.set_peer(Coordinate::NOWHERE);
        line.set_groups(0);
        line.set_moving(false);
        line.set_unseen(false);
        line.set_spent(false);
        line.set_last(crate::seq::Seq::NONE);
        // First it is free: what still holds a connection never lacks what belongs to that.
        self.store(slot, &line);
        self.set_former(slot, Coordinate::NOWHERE);
        self.set_extra(slot, &Extra::NONE);
        let mut free = self.free;
        self.push(&mut free, On::Free, slot, Time(0));
        self.free = free;
    }

    /// The coordinate beside a slot; see [`Memory::former`].
    pub fn former(&self, slot: u32) -> Coordinate {
        Coordinate::from_raw(self.former[slot as usize].load(Ordering::Relaxed))
    }

    /// Sets the coordinate beside a slot.
    pub fn set_former(&mut self, slot: u32, former: Coordinate) {
        kill_point();
        self.former[slot as usize].store(former.raw(), Ordering::Relaxed);
    }

    /// Whether the connection is changing its backup, so that `former` is its previous one.
    pub fn is_moving(&self, slot: u32) -> bool {
        self.line(slot).is_moving()
    }

    /// Marks the connection as changing its backup, or not.
    pub fn set_moving(&mut self, slot: u32, moving: bool) {
        if self.is_moving(slot) != moving {
            self.update(slot, |line| line.set_moving(moving));
        }
    }

    /// Of a connection: whether its backup's kernel refused it. Of a copy: whether its active was
    /// told that.
    pub fn is_declined(&self, slot: u32) -> bool {
        self.side[slot as usize].flags & DECLINED != 0
    }

    /// Sets what [`is_declined`](Self::is_declined) tells.
    pub fn set_declined(&mut self, slot: u32, declined: bool) {
        let flags = &mut self.side[slot as usize].flags;
        *flags = *flags & !DECLINED | if declined { DECLINED } else { 0 };
    }

    /// Of a copy: how the kernel has taken its entry since it is one.
    pub fn written(&self, slot: u32) -> Written {
        self.side[slot as usize].written
    }

    /// Sets what [`written`](Self::written) tells.
    pub fn set_written(&mut self, slot: u32, written: Written) {
        self.side[slot as usize].written = written;
    }

    /// Of a copy, and of what is left of it: until when its entry would last, as packets had left
    /// it when it was last written over. 0: none had passed. Of what is closed: the same of the
    /// entry that is gone; 0: that is not known.
    pub fn passed_until(&self, slot: u32) -> u32 {
        self.side[slot as usize].passed_until
    }

    /// Sets what [`passed_until`](Self::passed_until) tells: seconds of the monotonic clock.
    pub fn set_passed_until(&mut self, slot: u32, second: u32) {
        self.side[slot as usize].passed_until = second;
    }

    /// How many seconds it would last from now on; 0: it would have run out.
    pub fn passed_s(&self, slot: u32, now: Time) -> u32 {
        self.side[slot as usize].passed_until.saturating_sub(now.begun_seconds())
    }

    /// Of a copy, and of what is left of one: the second of the monotonic clock, the begun one
    /// counted, in which this process last wrote its entry; 0: not known.
    pub fn written_at(&self, slot: u32) -> u32 {
        self.side[slot as usize].heard_or_written_at
    }

    /// Sets what [`written_at`](Self::written_at) tells.
    pub fn set_written_at(&mut self, slot: u32, second: u32) {
        self.side[slot as usize].heard_or_written_at = second;
    }

    /// Whether what is in this slot was here before this process.
    pub fn is_taken_up(&self, slot: u32) -> bool {
        self.side[slot as usize].flags & TAKEN_UP != 0
    }

    /// Events were lost: what has passed the entry of any copy may have been another connection's.
    pub fn doubt_written(&mut self) {
        for side in &mut self.side {
            if matches!(side.written, Written::Yes | Written::AsItWas) {
                side.written = Written::Resumed;
            }
        }
    }

    /// Whether a decline is later than every other that was heard of this pair of copies; then it
    /// is remembered.
    pub fn hear_decline(&mut self, slot: u32, number: u32) -> DeclineOrder {
        let side = &mut self.side[slot as usize];
        let is_later = side.heard_or_written_at == 0
            || (1..u32::MAX / 2).contains(&number.wrapping_sub(side.heard_or_written_at));
        if !is_later {
            return DeclineOrder::Overtaken;
        }
        side.heard_or_written_at = number;
        let was_unsure = side.flags & UNSURE != 0;
        side.flags &= !UNSURE;
        match was_unsure {
            true => DeclineOrder::PerhapsNewest,
            false => DeclineOrder::Newest,
        }
    }

    /// What the digests have added up of this slot.
    pub fn digest(&self, slot: u32) -> u32 {
        self.side[slot as usize].digest
    }

    /// Replaces the hash that digests count of this copy; returns the one before.
    pub fn set_digest(&mut self, slot: u32, hash: u32) -> u32 {
        std::mem::replace(&mut self.side[slot as usize].digest, hash)
    }

    /// The round of a comparison in which this copy was named last (see `sync::compare`).
    pub fn seen(&self, slot: u32) -> u8 {
        self.side[slot as usize].seen
    }

    /// Notes the round in which this copy was named.
    pub fn set_seen(&mut self, slot: u32, round: u8) {
        self.side[slot as usize].seen = round;
    }

    /// The connection has another backup: none of its declines was heard.
    pub fn forget_declines(&mut self, slot: u32) {
        let side = &mut self.side[slot as usize];
        side.heard_or_written_at = 0;
        side.flags &= !UNSURE;
    }

    /// The list that a slot stands in.
    pub fn on(&self, slot: u32) -> On {
        self.side[slot as usize].on
    }

    /// Since when it has stood there.
    pub fn since(&self, slot: u32) -> Time {
        self.side[slot as usize].since
    }

    /// Appends a slot that is in no list.
    pub fn push(&mut self, list: &mut List, on: On, slot: u32, now: Time) {
        let side = &mut self.side[slot as usize];
        assert!(
            side.on == On::None && on != On::None,
            "slot {slot} stands in {:?} already",
            side.on
        );
        (side.on, side.since, side.next, side.prev) = (on, now, NIL, list.tail);
        match list.tail {
            NIL => list.head = slot,
            tail => self.side[tail as usize].next = slot,
        }
        list.tail = slot;
        list.len += 1;
    }

    /// Takes a slot out of the list that it stands in.
    pub fn unlink(&mut self, list: &mut List, slot: u32) {
        let Side { next, prev, on, .. } = self.side[slot as usize];
        assert!(on != On::None && list.len > 0, "slot {slot} stands in no list");
        match prev {
            NIL => list.head = next,
            prev => self.side[prev as usize].next = next,
        }
        match next {
            NIL => list.tail = prev,
            next => self.side[next as usize].prev = prev,
        }
        list.len -= 1;
        self.side[slot as usize].on = On::None;
    }

    /// Takes the first slot out of a list.
    pub fn pop(&mut self, list: &mut List) -> Option<u32> {
        let slot = list.first()?;
        self.unlink(list, slot);
        Some(slot)
    }

    fn recount(&self, old: Kind, new: Kind) {
        if old == new {
            return;
        }
        if let Some(gauge) = gauge_of(old) {
            self.counters.drop_one(gauge);
        }
        if let Some(gauge) = gauge_of(new) {
            self.counters.count(gauge);
        }
    }
}

const KINDS: [Kind; 6] =
    [Kind::Free, Kind::Leased, Kind::Held, Kind::Active, Kind::Backup, Kind::Closing];

fn gauge_of(kind: Kind) -> Option<Counter> {
    match kind {
        Kind::Free => Some(Counter::SlotsFree),
        Kind::Leased => Some(Counter::SlotsLeased),
        Kind::Held => Some(Counter::ConnectionsHeld),
        Kind::Active => Some(Counter::ConnectionsActive),
        Kind::Backup => Some(Counter::ConnectionsBackup),
        Kind::Closing => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MemorySize, OwnedMemory};
    use std::net::Ipv4Addr;

    #[test]
    fn slots_are_used_oldest_first_and_gauges_stay_true() {
        let memory = OwnedMemory::new(&MemorySize::new(64, crate::limits::ARENA_MIN));
        let mut table = Table::new(&memory.parts(), 7);
        let original =
            Tuple::v4(6, (Ipv4Addr::new(10, 0, 0, 1), 1), (Ipv4Addr::new(10, 0, 0, 2), 2));
        let connection = Connection::new(original, original.mirrored(), Default::default());
        let first = table.allocate().unwrap();
        let mut line = table.line(first);
        line.set_kind(Kind::Active);
        table.fill(first, line, &connection);
        assert_eq!(table.find_original(&original), Some(first));
        table.forget(first);
        table.recycle(first);
        assert_eq!(table.find_original(&original), None);
        for _ in 0..63 {
            assert_ne!(table.allocate(), Some(first), "the slot freed last comes last");
        }
        assert_eq!(table.allocate(), Some(first));
        assert_eq!(table.line(first).generation().raw(), 2);
        assert_eq!(table.allocate(), None);
        let counters = Counters::new(memory.parts().counters);
        assert_eq!(counters.get(Counter::SlotsFree), 64);
        assert_eq!(counters.get(Counter::ConnectionsActive), 0);
    }
}
