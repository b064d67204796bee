//! The checkers: each stands for one promise of the design, has its name, and says what it saw when
//! the promise is broken. The numbers are those of the design's list of what must always hold.

use std::collections::BTreeMap;
use std::time::Duration;

use hypersync::ccp::bytes::Reader;
use hypersync::ccp::header::{Header, OPCODE_SYNC};
use hypersync::ccp::message::{Message, Place};
use hypersync::ccp::sync::SyncHeader;
use hypersync::conn::slot::{Line, groups};
use hypersync::conn::table::On;
use hypersync::conn::{Connection, Coordinate, Generation, Kind, MemberId, Stamp, Tuple, shard_of};
use hypersync::counters::{COUNTERS, Counter, Counters};
use hypersync::source::CommitMode;
use hypersync::sync::stream::{Durable, stream_index};
use hypersync::time::Time;

use crate::truth::{Truth, life_of, serials};
use crate::world::{Copy, Sent, World};

/// Two members that took each other for dead need this long to agree again on what each of them
/// holds.
const RECONCILE: Duration = Duration::from_millis(1500);

/// Bytes by which the memory of one member's protocol may differ from what it had after its start:
/// lists whose length follows the number of members.
const GROWTH_MAX: isize = 16 << 10;

/// What a promise's name is and what broke it.
pub type Broken = String;

macro_rules! broken {
    ($name:literal, $($arg:tt)*) => { Err(format!("{}: {}", $name, format_args!($($arg)*))) };
}

/// What a slot held when it was looked at last.
#[derive(Clone, Copy)]
struct Seen {
    generation: Generation,
    stamp: Stamp,
    /// Whose state it is.
    active: MemberId,
    /// Where its newest state was acknowledged last.
    acknowledged: Option<Coordinate>,
    /// Whether its process was killed since: a copy may be half overwritten, by what was not
    /// acknowledged yet.
    torn: bool,
    connection: Connection,
}

#[derive(Default)]
pub struct Checks {
    seen: BTreeMap<(MemberId, u8), Vec<Option<Seen>>>,
    /// When one member last did not take the other for alive.
    apart: BTreeMap<(MemberId, MemberId), Time>,
    /// Whether two members that run do not take each other for alive right now.
    pub anybody_is_apart: bool,
    /// Whether some members have fewer records for extras than slots. What fits in none is left
    /// out, at either side of a pair, so extras are not compared.
    pub extras_lack: bool,
    next: usize,
    /// The newest number seen on each stream.
    newest: BTreeMap<(MemberId, u8, MemberId, u8, u32, u16), u64>,
}

fn durable_of<'m>(
    world: &World<'m>,
    member: MemberId,
    shard: usize,
    peer: Coordinate,
) -> Durable<'m> {
    Durable(&world.hosts[&member].memory[shard].streams[stream_index(peer.member(), peer.shard())])
}

/// Whether the active's own words say that its newest state is at its backup.
fn is_acknowledged(
    world: &World<'_>,
    member: MemberId,
    shard: usize,
    slot: u32,
    line: &Line,
) -> bool {
    let on = world.hosts[&member].shards[shard].table().on(slot);
    let peer = line.peer();
    peer.is_somewhere()
        && on == On::None
        && line.last().is_passed_by(durable_of(world, member, shard, peer).floor())
}

impl Checks {
    /// A member starts: nothing is known of it.
    pub fn forget(&mut self, member: MemberId) {
        self.seen.retain(|(m, _), _| *m != member);
        self.newest.retain(|(from, ..), _| *from != member);
    }

    /// A process that was killed goes on with its memory.
    pub fn resumed(&mut self, member: MemberId) {
        let of_member = self.seen.iter_mut().filter(|((m, _), _)| *m == member);
        of_member
            .flat_map(|(_, slots)| slots.iter_mut().flatten())
            .for_each(|seen| seen.torn = true);
    }

    /// What holds after every step.
    pub fn after_step(
        &mut self,
        world: &World<'_>,
        truth: &Truth,
        sent: &[Sent],
    ) -> Result<(), Broken> {
        self.note_who_is_apart(world);
        for datagram in sent {
            self.pair_only(world, datagram)?;
        }
        memory_does_not_grow(world)?;
        // Of the tables one after the other, a shard a step.
        let shards: Vec<(MemberId, usize)> = world
            .hosts
            .values()
            .filter(|h| h.running)
            .flat_map(|h| (0..h.shards.len()).map(|shard| (h.member, shard)))
            .collect();
        if shards.is_empty() {
            return Ok(());
        }
        self.next = (self.next + 1) % shards.len();
        let (member, shard) = shards[self.next];
        self.shard(world, truth, member, shard)
    }

    /// 1: what digests compare is what the tables hold, whatever happened before.
    pub fn sums_are_true(world: &World<'_>) -> Result<(), Broken> {
        #[cfg(feature = "mutations")]
        for host in world.hosts.values().filter(|host| host.running) {
            for (shard, replica) in host.shards.iter().enumerate() {
                if let Err(what) = replica.check_sums() {
                    return broken!(
                        "1 digests are true",
                        "shard {shard} of {}: {what}",
                        host.member
                    );
                }
            }
        }
        let _ = world;
        Ok(())
    }

    /// All that holds of one shard's table at any time.
    pub fn shard(
        &mut self,
        world: &World<'_>,
        truth: &Truth,
        member: MemberId,
        shard: usize,
    ) -> Result<(), Broken> {
        let replica = &world.hosts[&member].shards[shard];
        let table = replica.table();
        let mut seen = self.seen.remove(&(member, shard as u8)).unwrap_or_default();
        seen.resize(table.capacity() as usize, None);
        let mut exposed = 0;
        for slot in 0..table.capacity() {
            let line = table.line(slot);
            if !line.kind().is_connection() {
                seen[slot as usize] = None;
                continue;
            }
            let connection = table.connection(slot);
            closed_stays_closed(truth, member, slot, &connection)?;
            if line.kind() == Kind::Held {
                continue;
            }
            let active = if line.kind() == Kind::Active { member } else { line.peer().member() };
            let acknowledged = seen[slot as usize]
                .filter(|s| s.generation == line.generation())
                .and_then(|s| s.acknowledged);
            let mut now = Seen {
                acknowledged,
                active,
                generation: line.generation(),
                stamp: line.stamp(),
                torn: false,
                connection,
            };
            if let Some(before) = seen[slot as usize] {
                self.newer_stays(truth, member, slot, &before, &now)?;
                let former = table.former(slot);
                let is_presumed = line.kind() == Kind::Active
                    && !line.is_claimed()
                    && !table.is_moving(slot)
                    && before.active == former.member()
                    && before.active != member;
                if is_presumed
                    && before.generation == now.generation
                    && now.stamp.epoch > before.stamp.epoch
                    && !epoch_was_there(world, former, now.stamp.epoch)
                {
                    return broken!(
                        "4 what is presumed is no claim",
                        "slot {slot} of {member}: {:?} after {:?}",
                        now.stamp,
                        before.stamp
                    );
                }
            }
            if line.kind() == Kind::Active && is_acknowledged(world, member, shard, slot, &line) {
                now.acknowledged = Some(line.peer());
                self.acknowledged_is_held(world, truth, member, shard, slot, &line, &connection)?;
            } else if line.kind() == Kind::Active {
                exposed += 1;
                // Until the new backup has acknowledged once, every delta is a whole one.
                let is_new = line.groups() & groups::TUPLES != 0;
                let former = table.former(slot);
                // Who takes over as the new backup may let the previous one go.
                let together = self.are_together(world, member, line.peer().member());
                if table.is_moving(slot) && is_new && acknowledged == Some(former) && together {
                    self.previous_is_kept(
                        world,
                        truth,
                        (member, shard),
                        slot,
                        former,
                        &connection,
                    )?;
                }
            }
            seen[slot as usize] = Some(now);
        }
        self.seen.insert((member, shard as u8), seen);
        if replica.exposure() < exposed {
            return broken!(
                "9 exposure is true",
                "shard {shard} of {member} claims {} and has {exposed}",
                replica.exposure()
            );
        }
        Ok(())
    }

    fn note_who_is_apart(&mut self, world: &World<'_>) {
        self.anybody_is_apart = false;
        for host in world.hosts.values() {
            for other in world.hosts.keys().filter(|other| **other != host.member) {
                let seen = &host.group.view().members[*other as usize];
                let together = host.running
                    && !host.paused
                    && seen.status.is_alive()
                    && seen.hears_me
                    && seen.table_id == world.hosts[other].table_id;
                if !together {
                    self.anybody_is_apart |= host.running && world.hosts[other].running;
                    self.apart.insert((host.member, *other), world.now);
                    self.apart.insert((*other, host.member), world.now);
                }
            }
        }
    }

    /// Whether two members never took each other for dead lately, so that what they agreed on
    /// holds.
    fn are_together(&self, world: &World<'_>, a: MemberId, b: MemberId) -> bool {
        let apart = self.apart.get(&(a, b));
        world.hosts.get(&b).is_some_and(|host| host.running)
            && apart.is_none_or(|at| world.now.since(*at) > RECONCILE)
    }

    /// 2: what was acknowledged is at the backup, unless it was closed since.
    #[allow(clippy::too_many_arguments)]
    fn acknowledged_is_held(
        &self,
        world: &World<'_>,
        truth: &Truth,
        member: MemberId,
        shard: usize,
        slot: u32,
        line: &Line,
        connection: &Connection,
    ) -> Result<(), Broken> {
        let peer = line.peer();
        if !self.are_together(world, member, peer.member())
            || truth.closed.contains(&life_of(connection))
        {
            return Ok(());
        }
        if truth.strayed.contains(&connection.original) {
            return Ok(()); // It is on two pairs: a copy of the one gives way to what is newer of the other.
        }
        let host = &world.hosts[&peer.member()];
        let at = || format!("{} in slot {slot} of shard {shard} of {member}", connection.original);
        let Some(replica) = host.shards.get(peer.shard() as usize) else {
            return broken!("2 acknowledged is held", "{}: no such shard {peer:?}", at());
        };
        let there = replica.table().line(peer.slot());
        let other = replica.table().connection(peer.slot());
        let is_there = there.generation() == peer.generation()
            && matches!(there.kind(), Kind::Backup | Kind::Active)
            && (other.original, other.reply) == (connection.original, connection.reply);
        // Its traffic has moved on, twice within a round trip: the release is under way.
        let is_outdone = || {
            let copies = world.copies_of(&connection.original);
            let life = life_of(connection);
            copies
                .iter()
                .any(|c| life_of(&c.connection) == life && c.stamp.epoch > line.stamp().epoch)
        };
        if !is_there && is_outdone() {
            return Ok(());
        }
        if !is_there {
            return broken!(
                "2 acknowledged is held",
                "{} is not at {peer:?}: {:?} life {}",
                at(),
                there.kind(),
                there.generation().raw()
            );
        }
        if there.stamp() < line.stamp() {
            return broken!(
                "2 acknowledged is held",
                "{} is older at {peer:?}: {:?} < {:?}",
                at(),
                there.stamp(),
                line.stamp()
            );
        }
        // Of two that claimed it in the same state, and have their backup in common, either may
        // have its state there.
        let is_anothers = there.kind() == Kind::Backup && there.peer().member() != member;
        let is_contended = is_anothers && truth.contended.contains(&connection.original);
        if there.stamp() == line.stamp() && !is_contended && !self.alike(&other, connection) {
            return broken!(
                "1 two copies agree",
                "{}: {connection:?} but at {peer:?} {other:?}",
                at()
            );
        }
        Ok(())
    }

    /// 2: make before break: the previous backup keeps its copy until the new one has acknowledged.
    fn previous_is_kept(
        &self,
        world: &World<'_>,
        truth: &Truth,
        (member, shard): (MemberId, usize),
        slot: u32,
        previous: Coordinate,
        connection: &Connection,
    ) -> Result<(), Broken> {
        let life = life_of(connection);
        let has_ended =
            truth.closed.contains(&life) || truth.expired.contains(&(previous.member(), life));
        if has_ended || !self.are_together(world, member, previous.member()) {
            return Ok(());
        }
        let table = world.hosts[&previous.member()].shards[previous.shard() as usize].table();
        let line = table.line(previous.slot());
        // The new one has it, and told the previous one so itself: that is this one's rival there.
        let is_at_the_new_one = || {
            let peer = world.hosts[&member].shards[shard].table().line(slot).peer().raw();
            let copies = world.copies_of(&connection.original);
            copies.iter().any(|copy| copy.place == peer && copy.kind == Kind::Backup)
        };
        let is_kept = line.generation() == previous.generation() && line.kind().is_connection();
        if !is_kept && !is_at_the_new_one() {
            return broken!(
                "2 make before break",
                "{} in slot {slot} of {member} moves, and its copy at {previous:?} is gone",
                connection.original
            );
        }
        Ok(())
    }

    /// 10: a delta goes to the pair's other side and to nobody else.
    fn pair_only(&mut self, world: &World<'_>, datagram: &Sent) -> Result<(), Broken> {
        let mut r = Reader::new(&datagram.bytes);
        let Ok(header) = Header::decode(&mut r, 7) else { return Ok(()) };
        if header.opcode != OPCODE_SYNC {
            return Ok(());
        }
        let Ok(sync) = SyncHeader::decode(&mut r) else { return Ok(()) };
        let key = (
            datagram.from,
            sync.from_shard,
            datagram.to,
            header.to_shard,
            sync.to_table,
            sync.session,
        );
        let newest = self.newest.entry(key).or_default();
        if sync.seq.raw() <= *newest {
            return Ok(()); // Sent before, or not sequenced.
        }
        *newest = sync.seq.raw();
        let host = &world.hosts[&datagram.from];
        let table = host.shards[sync.from_shard as usize].table();
        while let Ok(Some(message)) = Message::decode(&mut r) {
            let Message::New { target, own, .. } = message else { continue };
            let line = table.line(own.slot);
            let to = Coordinate::new(datagram.to, header.to_shard, target.slot, target.generation);
            // A datagram that a killed process composed leaves only when its memory was taken up:
            // by then it may be closed.
            let is_ours = line.generation() == own.generation
                && matches!(line.kind(), Kind::Active | Kind::Closing);
            if !is_ours || line.peer() != to {
                return broken!(
                    "10 state goes to the pair only",
                    "{:?} of {} was sent to {to:?}, its peer is {:?}",
                    Place { slot: own.slot, generation: own.generation },
                    datagram.from,
                    line.peer()
                );
            }
        }
        Ok(())
    }

    /// 1, 3, 9: at rest every connection is on two members that agree, nothing else is anywhere,
    /// and nothing is called exposed that is not, or protected that is exposed.
    pub fn at_rest(&mut self, world: &World<'_>, truth: &Truth) -> Result<(), Broken> {
        let live = world.live();
        let copies: BTreeMap<Tuple, _> = world.copies().into_iter().collect();
        let mut unprotected = 0;
        for (tuple, open) in &truth.open {
            let owner = open.owner.expect("somebody sees its traffic");
            let found = copies.get(tuple).map_or(&[][..], |found| &found[..]);
            let is_of_another_life = |copy: &Copy| {
                copy.member != owner && life_of(&copy.connection) != life_of(&open.connection)
            };
            if room(world, owner, tuple) == 0 && found.iter().all(is_of_another_life) {
                continue; // A full table: it was never taken, and nobody was told that an earlier one of this tuple is over.
            }
            if let [one] = found
                && (one.kind == Kind::Active
                    || !live.contains(&Coordinate::from_raw(one.peer).member()))
                && live.iter().all(|other| *other == one.member || is_full(world, *other, tuple))
            {
                unprotected += 1;
                if !self.alike(&one.connection, &open.connection) {
                    return broken!("1 two copies at rest", "{tuple} is old: {open:?}, {one:?}");
                }
                continue;
            }
            let [a, b] = found else {
                return broken!("1 two copies at rest", "{tuple}: {open:?} has {found:#?}");
            };
            if a.member == b.member || a.peer != b.place || b.peer != a.place {
                return broken!("1 two copies at rest", "{tuple}: no pair: {found:#?}");
            }
            if [a.kind, b.kind].iter().filter(|kind| **kind == Kind::Active).count() != 1 {
                return broken!("1 two copies at rest", "{tuple}: not one active: {found:#?}");
            }
            if a.stamp != b.stamp || !self.alike(&a.connection, &b.connection) {
                return broken!("1 two copies agree", "{tuple}: {found:#?}");
            }
            if !self.alike(&a.connection, &open.connection) {
                return broken!("1 the newest version", "{tuple}: {open:?} but {found:#?}");
            }
            let backup = if a.kind == Kind::Backup { a } else { b };
            let entry = world.hosts[&backup.member].kernel.get(tuple);
            if world.commit == CommitMode::Eager && entry != Some(&backup.connection) {
                return broken!(
                    "9 exposure is true",
                    "{tuple}: the kernel of {} has {entry:?}",
                    backup.member
                );
            }
        }
        for (tuple, found) in &copies {
            if !truth.open.contains_key(tuple) {
                return broken!(
                    "3 closed stays closed",
                    "{tuple} is closed and still at {found:#?}"
                );
            }
        }
        let exposure: u64 =
            live.iter().flat_map(|m| &world.hosts[m].shards).map(|shard| shard.exposure()).sum();
        if exposure != unprotected {
            return broken!(
                "9 exposure is true",
                "{exposure} exposed, {unprotected} without a backup"
            );
        }
        let pending: u64 = live.iter().map(|m| world.counter(*m, Counter::ReleasesPending)).sum();
        if pending != 0 {
            return broken!("1 two copies at rest", "{pending} requests are under way");
        }
        Ok(())
    }

    /// Whether two copies are of the same state, as far as there is room for it.
    pub fn alike(&self, a: &Connection, b: &Connection) -> bool {
        let extra = if self.extras_lack { a.extra } else { b.extra };
        *a == Connection { extra, ..*b }
    }

    /// 4: within one life of a slot states only get newer.
    fn newer_stays(
        &self,
        truth: &Truth,
        member: MemberId,
        slot: u32,
        before: &Seen,
        now: &Seen,
    ) -> Result<(), Broken> {
        if before.generation != now.generation {
            return Ok(());
        }
        let (old, new) = (&before.connection, &now.connection);
        let compared = if self.extras_lack { 3 } else { 4 };
        if now.stamp == before.stamp && now.active != before.active {
            return Ok(()); // Two claimed it at once: of equal stamps the higher member's stays.
        }
        // Claimed elsewhere while this process was gone: what it had told nobody is lost.
        let was_left = truth.left.contains(&life_of(new)) && now.stamp.epoch > before.stamp.epoch;
        let fault = if (old.original, old.reply) != (new.original, new.reply) {
            "another connection in the same life of a slot"
        } else if now.stamp < before.stamp {
            "an older stamp"
        } else if !truth.contended.contains(&new.original)
            && !truth.strayed.contains(&new.original)
            && !was_left
            && (0..compared).any(|n| serials(new)[n] < serials(old)[n])
        {
            "an older state"
        } else if now.stamp == before.stamp && !self.alike(old, new) && !before.torn {
            "another state under the same stamp"
        } else {
            return Ok(());
        };
        broken!(
            "4 older never overwrites newer",
            "slot {slot} of {member}, {fault}: {:?} {:?} became {:?} {:?}, {}",
            before.stamp,
            serials(old),
            now.stamp,
            serials(new),
            new.original
        )
    }
}

fn room(world: &World<'_>, member: MemberId, tuple: &Tuple) -> u32 {
    let shards = &world.hosts[&member].shards;
    shards[shard_of(tuple, shards.len() as u8) as usize].room()
}

/// Whether a member leases no slots where this connection belongs.
fn is_full(world: &World<'_>, member: MemberId, tuple: &Tuple) -> bool {
    let shards = &world.hosts[&member].shards;
    let capacity = shards[0].table().capacity();
    room(world, member, tuple) <= capacity / 8
}

/// 3: a life that was gone everywhere never shows up again.
fn closed_stays_closed(
    truth: &Truth,
    member: MemberId,
    slot: u32,
    connection: &Connection,
) -> Result<(), Broken> {
    if truth.buried.contains(&life_of(connection)) {
        return broken!(
            "3 closed stays closed",
            "{} was closed and is back in slot {slot} of {member}",
            connection.original
        );
    }
    Ok(())
}

/// 6: nothing is allocated to stay after the start.
fn memory_does_not_grow(world: &World<'_>) -> Result<(), Broken> {
    for (member, bytes) in &world.grown {
        if *bytes > GROWTH_MAX {
            return broken!("6 memory does not grow", "{member} by {bytes} bytes");
        }
    }
    Ok(())
}

/// Everything that a datagram could change in a member, besides what it makes the member say.
pub fn fingerprint(world: &World<'_>, member: MemberId, shard: usize, peers: &[MemberId]) -> u64 {
    let host = &world.hosts[&member];
    let table = host.shards[shard].table();
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |word: u64| hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
    for slot in 0..table.capacity() {
        let line = table.line(slot);
        add(line.kind() as u64);
        add(line.generation().raw().into());
        add(u64::from(line.stamp().epoch) << 32 | u64::from(line.stamp().version));
        add(line.peer().raw());
        add(table.former(slot).raw());
        add(line.state().mark.into());
        add(line.state().status.into());
    }
    for peer in peers {
        for shard_there in 0..3 {
            for word in &host.memory[shard].streams[stream_index(*peer, shard_there)].0 {
                add(word.load(std::sync::atomic::Ordering::Relaxed));
            }
        }
    }
    hash
}

/// Datagrams that a shard ignored, whatever the reason.
pub fn rejects(world: &World<'_>, member: MemberId, shard: usize) -> u64 {
    let counters = Counters::new(world.hosts[&member].memory[shard].counters);
    let of_rejects = COUNTERS.iter().filter(|info| info.name.starts_with("reject_"));
    of_rejects.map(|info| counters.get(info.counter)).sum()
}

/// Whether the slot at this place has, or had last, a state of this epoch.
fn epoch_was_there(world: &World<'_>, place: Coordinate, epoch: u32) -> bool {
    let memory = &world.hosts[&place.member()].memory;
    memory
        .get(place.shard() as usize)
        .and_then(|memory| memory.slots.get(place.slot() as usize))
        .is_some_and(|slot| slot.line().stamp().epoch >= epoch)
}
