//! Membership: what shard 0 does for the whole member. It runs the group's state machine, composes
//! the heartbeats, publishes the view for the other shards, and tells the notify command.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::time::Duration;

use crate::ccp::bytes::Writer;
use crate::conn::MemberId;
use crate::counters::{Counter, Counters};
use crate::group::drain::{Drain, Drained, Situation};
use crate::group::hearing::{Hearing, Trouble};
use crate::group::readiness::{Own, Readiness, Stage};
use crate::group::view::Status;
use crate::group::{Event, Group, Tables};
use crate::limits::{DATAGRAM_MAX, MEMBERS_MAX};
use crate::net::{Handover, Refusals};
use crate::notify::{Notice, Notifier};
use crate::shm::Region;
use crate::shm::group::{Standing, Troubles};
use crate::time::Time;

/// How often goodbye is said.
const GOODBYES: u8 = 3;
/// The pause between goodbyes.
const GOODBYE_PAUSE: Duration = Duration::from_millis(10);

/// Words that all threads of the process share.
#[derive(Default)]
pub struct Shared {
    /// The process was asked to end.
    pub stop: AtomicBool,
    /// The process was asked to restart and to be back within so many ms; 0: it was not.
    pub restart: AtomicU32,
    /// That it restarts was said: `finished` means this.
    pub restarts: AtomicBool,
    /// Goodbye, or that it restarts, was said: every shard ends.
    pub finished: AtomicBool,
    /// A shard failed: the process ends without a goodbye, and with an error.
    pub failed: AtomicBool,
    /// Shards whose source is complete.
    pub complete: AtomicU8,
    /// What was told of sends that this host refuses.
    pub refusals: Refusals,
    /// New receive sockets for each shard, when the sync link was made anew.
    pub renewals: Vec<Handover>,
    /// Nobody is heard, this member's own heartbeats to the multicast group included: it should be
    /// joined again.
    pub deaf: AtomicBool,
}

/// How far the way out is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Farewell {
    /// Others still move their copies away, or may not have heard a goodbye yet.
    NotYet,
    /// It is time to say goodbye.
    Goodbye,
    /// That was said often enough.
    Done,
}

/// Shard 0's view of the group, and its duties.
pub struct Membership<'m> {
    group: Group,
    group_number: u16,
    hearing: Hearing,
    region: &'m Region,
    shared: &'m Shared,
    notifier: Notifier,
    counters: Counters<'m>,
    shards: u8,
    me: MemberId,
    readiness: Readiness,
    /// After so long a silence a member is taken for dead.
    dead_time: Duration,
    /// The version of the group with which each member came: what shards say of it counts from then
    /// on.
    came_with: Vec<u64>,
    dead: Vec<(MemberId, u64)>,
    drain_limit: Duration,
    /// The way out.
    drain: Option<Drain>,
    goodbyes_said: u8,
    goodbye_at: Time,
    announced: bool,
    /// The version of the view that is in the group table.
    published: u64,
    /// What was counted of what other threads count: notices lost and failed, log lines lost.
    counted: [u64; 3],
}

/// What the membership is made of.
pub struct MembershipParts<'m> {
    /// The group, as this member sees it.
    pub group: Group,
    /// Its number.
    pub group_number: u16,
    /// Who should be heard.
    pub hearing: Hearing,
    /// The shared memory.
    pub region: &'m Region,
    /// The words that all threads share.
    pub shared: &'m Shared,
    /// Who is told what happens.
    pub notifier: Notifier,
    /// The counters of shard 0.
    pub counters: Counters<'m>,
    /// After so long a silence a member is taken for dead.
    pub dead_time: Duration,
    /// How long this member waits at most before it leaves.
    pub drain_limit: Duration,
}

impl<'m> Membership<'m> {
    /// A member that knows nobody yet, or whom the last process knew, if the region was taken up
    /// from it.
    pub fn new(parts: MembershipParts<'m>, now: Time) -> Membership<'m> {
        let MembershipParts {
            group,
            group_number,
            hearing,
            region,
            shared,
            notifier,
            counters,
            dead_time,
            drain_limit,
        } = parts;
        let me = group.view().me;
        let mut membership = Membership {
            published: 0,
            group,
            group_number,
            hearing,
            region,
            shared,
            notifier,
            counters,
            shards: region.header().sizes.shards,
            me,
            readiness: Readiness::new(dead_time, now),
            dead_time,
            came_with: vec![0; MEMBERS_MAX + 1],
            dead: Vec::with_capacity(MEMBERS_MAX),
            drain_limit,
            drain: None,
            goodbyes_said: 0,
            goodbye_at: Time(0),
            announced: false,
            counted: [0; 3],
        };
        if region.is_resumed() {
            membership.remember(now);
        }
        membership
    }

    /// The group table is that of the last process. What it knew of the others holds until they are
    /// heard, and a death that it did not live to tell is told.
    fn remember(&mut self, now: Time) {
        let table = self.region.group();
        for id in 1..=MEMBERS_MAX as MemberId {
            let Some(known) = table.read(id) else { continue };
            self.group.remember(now, id, &known);
        }
        let is_told = self.settled_version() >= table.version();
        self.publish();
        let dead = self.group.view().others().filter(|(_, m)| m.status == Status::Dead && !is_told);
        self.dead.extend(dead.map(|(id, _)| (id, table.version())));
    }

    /// A heartbeat arrived.
    pub fn handle_heartbeat(&mut self, now: Time, source: IpAddr, bytes: &[u8]) {
        use crate::ccp::bytes::Reader;
        use crate::ccp::header::Header;
        use crate::ccp::heartbeat::Heartbeat;
        let mut r = Reader::new(bytes);
        let heartbeat = Header::decode(&mut r, self.group_number)
            .and_then(|header| Heartbeat::decode(&header, &mut r, bytes.len()));
        match heartbeat {
            Err(reject) => self.counters.count(reject.counter()),
            Ok(heartbeat) => {
                let accepted = self.group.handle_heartbeat(now, source, &heartbeat);
                let counter =
                    if accepted { Counter::HeartbeatsReceived } else { Counter::DuplicateMember };
                self.counters.count(counter);
            }
        }
    }

    /// Members said goodbye, as bits.
    pub fn handle_goodbyes(&mut self, now: Time, members: u64) {
        for member in (1..=MEMBERS_MAX as MemberId).filter(|m| members >> m & 1 == 1) {
            self.group.handle_goodbye(now, member);
        }
    }

    /// Finds the dead, publishes the view, tells what happened. Returns whether the other shards
    /// have something to act on. `behind`: datagrams wait unread.
    pub fn tick(&mut self, now: Time, behind: bool) -> bool {
        let before = self.region.group().version();
        // Nobody is dead because this member could not listen: mail lies unread, or it was paused
        // itself.
        self.group.begin_pass(now, behind);
        self.group.tick(now);
        self.publish();
        while let Some(event) = self.group.poll_event() {
            match event {
                Event::MemberUp(member) => {
                    // A death that was not told yet is history: told later, it would take a living
                    // member's addresses away.
                    self.dead.retain(|(dead, _)| *dead != member);
                    self.came_with[member as usize] = self.region.group().version();
                    self.notifier.tell(Notice::MemberUp(member));
                }
                Event::MemberReady(member) => self.notifier.tell(Notice::MemberReady(member)),
                Event::MemberLeaving(member) => self.notifier.tell(Notice::MemberLeaving(member)),
                Event::MemberLeft(member) => self.notifier.tell(Notice::MemberLeft(member)),
                Event::MemberDead(member) => {
                    self.counters.count(Counter::MembersDied);
                    log::warn!("member {member} is dead");
                    self.dead.push((member, self.region.group().version()));
                }
                Event::Duplicate { member, address } if member == self.me => log::error!(
                    "another host, {address}, also is member {member} of this group: give one of them another --member"
                ),
                Event::Duplicate { member, address } => {
                    log::error!(
                        "two hosts are member {member}: {address} is ignored as long as the first is heard"
                    );
                }
            }
        }
        self.tell_dead();
        self.count_lost();
        self.tell_troubles(now);
        self.review_readiness(now);
        self.region.group().version() != before
    }

    /// Puts what changed into the group table, from which every shard reads.
    fn publish(&mut self) {
        let view = self.group.view();
        if view.version == self.published {
            return;
        }
        for (id, member) in view.others() {
            if self.region.group().read(id) != Some(*member) {
                self.region.group().write(id, member);
            }
        }
        self.published = view.version;
    }

    /// Up to which version of the group the kernel is owed nothing.
    fn settled_version(&self) -> u64 {
        let group = self.region.group();
        (0..self.shards).map(|s| group.shard(s).settled_version()).min().unwrap_or(0)
    }

    /// A death is told once every shard has taken over what it has to.
    fn tell_dead(&mut self) {
        let settled = self.settled_version();
        self.dead.retain(|(member, version)| {
            let done = settled >= *version;
            if done {
                self.notifier.tell(Notice::MemberDead(*member));
            }
            !done
        });
    }

    /// What other threads could not say, into this shard's counters.
    fn count_lost(&mut self) {
        let notices = self.notifier.counts();
        let now = [
            notices.lost.load(Ordering::Relaxed),
            notices.failed.load(Ordering::Relaxed),
            crate::logging::lost(),
        ];
        let counters = [Counter::NoticesLost, Counter::NoticesFailed, Counter::LogLinesLost];
        for ((counter, now), before) in counters.into_iter().zip(now).zip(self.counted) {
            self.counters.add(counter, now - before);
        }
        self.counted = now;
    }

    /// Whoever leaves need not be heard any more.
    fn tell_troubles(&mut self, now: Time) {
        if self.drain.is_some() {
            return;
        }
        let (group, seconds) = (self.group_number, self.hearing.expected().as_secs());
        let group_now = &self.group;
        let only_small = |member| group_now.hears_only_small(now, member);
        let own_heard = group_now.own_heard();
        self.hearing.tick(now, group_now.view(), own_heard, &only_small, &mut |trouble| match trouble {
            Trouble::NotHeardBy { member, address } => log::warn!(
                "member {member} at {address} does not hear this member: UDP port 8116 is blocked on the way \
                 there (this host's output, the network, or that host's input rules), or passes small datagrams only, \
                 which that member's log says then"
            ),
            Trouble::OnlySmallFrom { member, address } => log::warn!(
                "member {member} at {address}: only its small heartbeats arrive, so it is no backup: the path here \
                 does not pass datagrams of {DATAGRAM_MAX} bytes; look at the MTU of every device on the sync link"
            ),
            Trouble::NothingFrom(address) => log::warn!(
                "no heartbeat of group {group} from peer {address} yet: it is not running, or UDP port 8116 is \
                 blocked on the way here"
            ),
            Trouble::Alone => log::info!(
                "alone in group {group} so far: no heartbeat of another member in {seconds} s; none is running, \
                 or multicast to UDP port 8116 does not get here"
            ),
            Trouble::Nobody => log::warn!(
                "no heartbeat of any other member of group {group}: nothing is copied as long as that lasts; are they \
                 running, and is the sync link well?"
            ),
            Trouble::Deaf => log::warn!(
                "no heartbeat of group {group} arrives, not even this member's own to the multicast group: is the sync \
                 link up, and does this host's packet filter let UDP port 8116 in and out there? Nothing is copied \
                 as long as that lasts"
            ),
        });
        self.shared.deaf.store(self.hearing.is_deaf(), Ordering::Relaxed);
    }

    /// The other host with this member's number, if it keeps this one from being ready. One that is
    /// ready waits for what the others say.
    fn namesake(&self, now: Time) -> Option<IpAddr> {
        let patience = match self.readiness.stage() {
            Stage::Ready => self.dead_time,
            Stage::Starting | Stage::Syncing => Duration::ZERO,
        };
        self.group
            .namesake(now)
            .filter(|(_, since)| now.since(*since) >= patience)
            .map(|(address, _)| address)
    }

    /// Moves on towards being ready.
    fn review_readiness(&mut self, now: Time) {
        if self.drain.is_some() {
            return;
        }
        let own = Own {
            complete: self.shared.complete.load(Ordering::Relaxed) == self.shards,
            copies: self.total(Counter::ConnectionsBackup),
            version: self.region.group().version(),
            settled: self.settled_version(),
        };
        let namesake = self.namesake(now);
        let line = self.region.group().shard(0);
        if namesake.is_some() {
            if self.readiness.dispute(now) {
                self.notifier.tell(Notice::SelfNotReady(self.me));
            }
            line.set_standing(Standing::Starting);
        }
        line.set_troubles(&Troubles {
            lonely: self.hearing.is_lonely(),
            deaf: self.hearing.is_deaf(),
            namesake,
        });
        while let Some(stage) = self.readiness.tick(now, self.group.view(), &own) {
            match stage {
                Stage::Starting => {}
                Stage::Syncing => line.set_standing(Standing::Syncing),
                Stage::Ready => {
                    line.set_standing(Standing::Ready);
                    self.notifier.tell(Notice::SelfReady(self.me));
                    self.tell_what_is_missing(own.copies);
                }
            }
        }
        self.region.group().shard(0).set_awaited(self.readiness.awaited());
    }

    fn tell_what_is_missing(&self, copies: u64) {
        for member in (1..=MEMBERS_MAX).filter(|m| self.readiness.awaited() >> m & 1 == 1) {
            log::warn!(
                "ready with {copies} copies, but not with everything of member {member}: it sends no more, and does not \
                 say that all is here; look at `hypersync-inspect sync` there, and whether it hears this member"
            );
        }
        if self.total(Counter::TableFull) > 0 {
            log::warn!(
                "ready with {copies} copies; the table had no room for more slots to be leased: the others may have connections without a copy here \
                 (`hypersync-inspect sync` there says `full`); raise --capacity"
            );
        }
    }

    fn total(&self, counter: Counter) -> u64 {
        (0..self.shards).map(|s| Counters::new(self.region.shard(s).counters).get(counter)).sum()
    }

    fn capacity(&self) -> u64 {
        let sizes = &self.region.header().sizes;
        sizes.memory.capacity as u64 * sizes.shards as u64
    }

    /// The members that have everything that each shard wants them to have, as bits.
    fn synced(&self) -> u64 {
        let lines = (0..self.shards).map(|shard| self.region.group().shard(shard));
        let (seen, synced) = lines.fold((u64::MAX, u64::MAX), |(seen, synced), line| {
            // First the version: the bits are at least as new.
            (seen.min(line.view_version()), synced & line.synced())
        });
        let current = (1..=MEMBERS_MAX).filter(|m| seen >= self.came_with[*m]);
        synced & current.fold(0, |bits, m| bits | 1u64 << m)
    }

    fn tables(&self) -> Tables {
        let stage = self.readiness.stage();
        let leaving = self.drain.is_some();
        Tables {
            capacity: self.capacity(),
            // Empty is empty, leased or not: who asks for more gives back what is not used.
            room: self.total(Counter::SlotsFree) + self.total(Counter::SlotsLeased),
            ready: stage == Stage::Ready && !leaving,
            syncing: stage == Stage::Syncing && !leaving,
            synced: self.synced(),
            leaving,
        }
    }

    /// The heartbeat, if it is due: so many of these bytes.
    pub fn poll_heartbeat(&mut self, now: Time, bytes: &mut [u8; DATAGRAM_MAX]) -> Option<usize> {
        let tables = self.tables();
        let (heartbeat, shown) = self.group.poll_heartbeat(now, &tables)?;
        let mut w = Writer::new(bytes);
        heartbeat.encode(self.group_number, &shown, &mut w);
        self.counters.count(Counter::HeartbeatsSent);
        Some(w.len())
    }

    /// The way out: the traffic moves, others move their copies away, then goodbye.
    pub fn leave(&mut self, now: Time) -> Farewell {
        let view = self.group.view();
        let situation = Situation {
            others: view.others().filter(|(_, m)| m.status.is_alive()).count(),
            able: view.others().filter(|(_, m)| m.status.is_able()).count(),
            copies: self.total(Counter::ConnectionsBackup),
            exposed: self.total(Counter::Exposure),
            opened: self.total(Counter::SourceOpened),
        };
        let (limit, opened) = (self.drain_limit, situation.opened);
        let begins = self.drain.is_none();
        let drain = self.drain.get_or_insert_with(|| Drain::new(now, limit, opened));
        if begins {
            self.group.hasten(now);
            self.region.group().shard(0).set_standing(Standing::Leaving);
            if self.readiness.stage() == Stage::Ready {
                self.notifier.tell(Notice::SelfNotReady(self.me));
            }
        }
        if self.goodbyes_said == 0 {
            let lasted = now.since(drain.since());
            match drain.look(now, &situation) {
                Drained::NotYet => return Farewell::NotYet,
                Drained::Empty if situation.exposed == 0 => {
                    log::info!("drained in {lasted:.1?}: leaving")
                }
                Drained::Empty => log::warn!(
                    "leaving: nobody is there who could take copies of {} connections",
                    situation.exposed
                ),
                Drained::AtLimit => log::warn!(
                    "the limit of {} for draining is reached, and traffic has not left or copies have not moved: \
                     leaving; {} connections have no copy, {} were not to have one yet",
                    humantime::format_duration(limit),
                    situation.exposed,
                    self.total(Counter::ConnectionsHeld)
                ),
            }
        }
        if self.goodbyes_said < GOODBYES && self.goodbye_at.reached(now) {
            self.goodbyes_said += 1;
            // Others take over what is in it: after a goodbye the table is nobody's.
            self.region.end();
            self.goodbye_at = now.after(GOODBYE_PAUSE);
            return Farewell::Goodbye;
        }
        match self.goodbyes_said == GOODBYES && self.goodbye_at.reached(now) {
            true => Farewell::Done,
            false => Farewell::NotYet,
        }
    }

    /// The way out of a process that comes back: the others are told when. Returns whether it was
    /// said often enough. Nobody is told that this member is not ready: the kernel goes on
    /// forwarding.
    pub fn announce_restart(&mut self, now: Time, back: Duration) -> bool {
        if !std::mem::replace(&mut self.announced, true) {
            self.group.announce_restart(now, back);
        }
        self.group.has_announced(now)
    }

    /// When to be called next.
    pub fn poll_at(&self) -> Time {
        match self.drain {
            Some(drain) if self.goodbyes_said == 0 => self.group.poll_at().min(drain.poll_at()),
            Some(_) => self.group.poll_at().min(self.goodbye_at),
            None => self.group.poll_at(),
        }
    }
}
