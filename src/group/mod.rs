//! The group: who is there, who is ready, who is dead.
//!
//! Shard 0 of a member runs one [`Group`]. Heartbeats and the passing of time go in; a
//! [`View`] and events come out. The view is what every shard acts on: a copy's role is read
//! from it, so a death costs no work per connection.

pub mod detector;
pub mod drain;
pub mod hearing;
pub mod readiness;
pub mod selection;
pub mod view;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use crate::ccp::heartbeat::{Accepted, Heartbeat, Shown};
use crate::conn::MemberId;
use crate::few::Few;
use crate::limits::{MEMBERS_MAX, NOTIFY_QUEUE};
use crate::time::Time;
use detector::Detector;
use view::{Member, Status, View};

/// Every how many heartbeats one is padded to full size.
pub const FULL_SIZE_EVERY: u32 = 4;

/// How many such heartbeats may be missing in a row before the sender is no backup any more.
pub const FULL_SIZE_MISSED: u32 = 3;

/// How far apart the heartbeats are with which a member says that it restarts, and how many they
/// are.
const ANNOUNCE_PAUSE: Duration = Duration::from_millis(10);
const ANNOUNCEMENTS: u8 = 3;

/// The longest that a member which restarts is waited for, whatever it says.
pub const BACK_MAX: Duration = Duration::from_secs(120);

/// Something that the notify command may want to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A member was heard that was not there before.
    MemberUp(MemberId),
    /// A member can hold copies and take over.
    MemberReady(MemberId),
    /// A member is about to leave.
    MemberLeaving(MemberId),
    /// A member said goodbye.
    MemberLeft(MemberId),
    /// A member fell silent, or came back with an empty table.
    MemberDead(MemberId),
    /// Another host uses this member's number.
    Duplicate {
        /// The number.
        member: MemberId,
        /// The other host.
        address: IpAddr,
    },
}

/// What a member says about itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// This member's number.
    pub member: MemberId,
    /// Shards of this member.
    pub shards: u8,
    /// Its priority as a backup.
    pub priority: u8,
    /// Its site, 0 if unused.
    pub site: u8,
    /// This life of its table.
    pub table_id: u32,
    /// This run of its process.
    pub incarnation: u64,
    /// How often it sends heartbeats.
    pub heartbeat: Duration,
    /// How many may be missing before a member is dead.
    pub dead_after: u32,
}

/// What a member's tables look like right now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tables {
    /// Slots of all shards.
    pub capacity: u64,
    /// Empty slots of all shards: free, or leased and not filled.
    pub room: u64,
    /// Whether the member can take over and hold copies.
    pub ready: bool,
    /// Whether it can hold copies and does not have all yet that it should have.
    pub syncing: bool,
    /// Bit m: member m has every copy that this member wants it to have.
    pub synced: u64,
    /// Whether it is about to leave.
    pub leaving: bool,
}

/// The group as one member sees it.
pub struct Group {
    me: Identity,
    view: View,
    detectors: Vec<Detector>,
    rivals: Vec<Option<Rival>>,
    events: VecDeque<Event>,
    next_heartbeat: Time,
    sent: u32,
    own_duplicate_at: Time,
    namesake: Option<Namesake>,
    /// When this member's own heartbeats came back last, as they do with multicast.
    own_heard: Time,
    /// Members of which it was told that they are ready, and that have not said otherwise since, as
    /// bits.
    told_ready: u64,
    /// Within which time this member said that it will be back, and how often it has said it.
    restart: Option<(Duration, u8)>,
}

/// A second sender under one member number: a restarted process, or another host.
#[derive(Clone, Copy)]
struct Rival {
    incarnation: u64,
    since: Time,
    last: Time,
    told: bool,
}

/// Another host with this member's number.
#[derive(Clone, Copy)]
struct Namesake {
    address: IpAddr,
    /// Since when it is heard, and when it was last.
    since: Time,
    last: Time,
    /// Without a heartbeat for so long it is gone.
    silence: Duration,
    /// When another member said last that it takes this one, and not the other, for the member.
    confirmed: Option<Time>,
}

impl Namesake {
    fn is_there(&self, now: Time) -> bool {
        now.since(self.last) < self.silence
    }
}

impl Group {
    /// A group of one, until others are heard.
    pub fn new(me: Identity, now: Time) -> Group {
        let silence = me.heartbeat * me.dead_after;
        let full_size = me.heartbeat * FULL_SIZE_EVERY * FULL_SIZE_MISSED;
        Group {
            view: View::new(me.member),
            detectors: vec![Detector::new(silence, full_size); MEMBERS_MAX + 1],
            rivals: vec![None; MEMBERS_MAX + 1],
            events: VecDeque::with_capacity(NOTIFY_QUEUE),
            next_heartbeat: now,
            sent: 0,
            own_duplicate_at: Time(0),
            namesake: None,
            own_heard: now,
            told_ready: 0,
            restart: None,
            me,
        }
    }

    /// What this member's last process knew of another: one that was alive has its dead time to be
    /// heard again. For the start only.
    pub fn remember(&mut self, now: Time, id: MemberId, known: &Member) {
        if id == self.me.member || known.status == Status::Absent {
            return;
        }
        let mut member = *known;
        if known.status.is_alive() {
            member.status = Status::Joining;
            member.last_heard = now;
            // Whether it hears this member is asked anew: what was so in between counts for
            // nothing.
            member.since = now;
            self.told_ready |= u64::from(known.status == Status::Ready) << id;
            self.detectors[id as usize].heard(now, false);
        }
        self.view.set(id, member);
    }

    /// From now on heartbeats say that this member restarts and is back within this time.
    pub fn announce_restart(&mut self, now: Time, back: Duration) {
        self.restart = Some((back.min(BACK_MAX), 0));
        self.next_heartbeat = now;
    }

    /// This member has something to say in its heartbeats that must not wait for the next one.
    pub fn hasten(&mut self, now: Time) {
        self.next_heartbeat = now;
    }

    /// Whether it was said often enough.
    pub fn has_announced(&self, now: Time) -> bool {
        self.restart.is_some_and(|(_, said)| said == ANNOUNCEMENTS)
            && self.next_heartbeat.reached(now)
    }

    /// The view now.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// The next event, if any.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`tick`](Self::tick) has something to do next.
    pub fn poll_at(&self) -> Time {
        let alive = (1..=MEMBERS_MAX).filter(|m| self.view.members[*m].status.is_alive());
        alive.fold(self.next_heartbeat, |at, m| {
            let ready =
                self.view.members[m].status.is_able() && !self.view.members[m].is_restarting();
            let missed = self.detectors[m].full_size_missed_at().filter(|_| ready);
            at.min(self.dead_at(m)).min(missed.unwrap_or(Time::NEVER))
        })
    }

    /// When a member is dead unless it is heard before.
    fn dead_at(&self, id: usize) -> Time {
        self.detectors[id].silent_at().max(self.view.members[id].back_by)
    }

    /// A heartbeat of this group arrived. `false` if it came from another host with a number in
    /// use.
    pub fn handle_heartbeat(&mut self, now: Time, source: IpAddr, heartbeat: &Heartbeat) -> bool {
        let id = heartbeat.from;
        if id == self.me.member {
            if heartbeat.incarnation == self.me.incarnation {
                self.own_heard = now; // Multicast brings our own back.
                return true;
            }
            self.note_namesake(now, source, heartbeat);
            if self.own_duplicate_at.reached(now) {
                self.own_duplicate_at = now.after(Duration::from_secs(10));
                self.push(Event::Duplicate { member: id, address: source });
            }
            return false;
        }
        let known = self.view.members[id as usize];
        if known.status == Status::Left && known.incarnation == heartbeat.incarnation {
            return true; // Said before its goodbye, or between two of them.
        }
        if known.status.is_alive() && known.incarnation != heartbeat.incarnation {
            if !self.admit_rival(now, source, heartbeat) {
                return false;
            }
            self.rivals[id as usize] = None;
            if known.table_id != heartbeat.table_id {
                // The process came back with an empty table before anybody missed it.
                self.leave(now, id, Status::Dead);
                self.push(Event::MemberDead(id));
            }
        } else if known.incarnation == heartbeat.incarnation
            && known.status.is_alive()
            && known.address != Some(source)
        {
            return false; // One incarnation speaks from one address.
        }
        let rhythm = self.rhythm(heartbeat);
        let full_size = rhythm * FULL_SIZE_EVERY * FULL_SIZE_MISSED;
        self.detectors[id as usize].expect(rhythm * self.me.dead_after, full_size);
        self.detectors[id as usize].heard(now, heartbeat.full_size);
        self.admit(now, source, heartbeat);
        let is_me = heartbeat.accepted == Some(Accepted::new(self.me.member, self.me.incarnation));
        if let Some(namesake) = self.namesake.as_mut().filter(|_| is_me) {
            namesake.confirmed = Some(now);
        }
        true
    }

    /// The longer of two rhythms: the listener's and the sender's.
    fn rhythm(&self, heartbeat: &Heartbeat) -> Duration {
        self.me.heartbeat.max(Duration::from_millis(heartbeat.interval_ms.min(10_000) as u64))
    }

    fn note_namesake(&mut self, now: Time, address: IpAddr, heartbeat: &Heartbeat) {
        let known = self.namesake.filter(|namesake| namesake.is_there(now));
        let (since, confirmed) = known.map_or((now, None), |known| (known.since, known.confirmed));
        let silence = self.rhythm(heartbeat) * self.me.dead_after;
        self.namesake = Some(Namesake { address, since, last: now, silence, confirmed });
    }

    /// Another host that has this member's number, and since when it is heard, unless the others
    /// take this one for the member. They say so within one of the other's dead times.
    pub fn namesake(&self, now: Time) -> Option<(IpAddr, Time)> {
        let namesake = self.namesake.filter(|namesake| namesake.is_there(now))?;
        let is_confirmed = namesake.confirmed.is_some_and(|at| now.since(at) < namesake.silence);
        (!is_confirmed).then_some((namesake.address, namesake.since))
    }

    /// When this member heard its own heartbeats last, as it does where they go to a multicast
    /// group.
    pub fn own_heard(&self) -> Time {
        self.own_heard
    }

    /// Which of two hosts with one number is heard here: of all such numbers, another at each
    /// heartbeat.
    fn accepted(&self, now: Time) -> Option<Accepted> {
        let is_there = |id: &usize| {
            let rival = self.rivals[*id].filter(|_| self.view.members[*id].status.is_alive());
            rival
                .is_some_and(|rival| now.since(rival.last) < self.me.heartbeat * self.me.dead_after)
        };
        let numbers = (1..=MEMBERS_MAX).filter(is_there).count();
        let id = (1..=MEMBERS_MAX).filter(is_there).nth(self.sent as usize % numbers.max(1))?;
        Some(Accepted::new(id as MemberId, self.view.members[id].incarnation))
    }

    /// Whether a new incarnation may replace the known one: only once that has missed a heartbeat,
    /// or if it said that it restarts, and this has its table.
    fn admit_rival(&mut self, now: Time, source: IpAddr, heartbeat: &Heartbeat) -> bool {
        let id = heartbeat.from as usize;
        let known = &self.view.members[id];
        if known.is_restarting() && known.table_id == heartbeat.table_id {
            return true;
        }
        let patience =
            self.me.heartbeat.max(Duration::from_millis(heartbeat.interval_ms as u64)) * 3 / 2;
        if now.since(self.detectors[id].last_heard()) > patience {
            return true;
        }
        let rival = match self.rivals[id] {
            Some(rival) if rival.incarnation == heartbeat.incarnation => {
                Rival { last: now, ..rival }
            }
            _ => Rival { incarnation: heartbeat.incarnation, since: now, last: now, told: false },
        };
        let tell = !rival.told && now.since(rival.since) > patience * 2;
        self.rivals[id] = Some(Rival { told: rival.told || tell, ..rival });
        if tell {
            self.push(Event::Duplicate { member: heartbeat.from, address: source });
        }
        false
    }

    fn admit(&mut self, now: Time, source: IpAddr, heartbeat: &Heartbeat) {
        let id = heartbeat.from;
        let old = self.view.members[id as usize];
        let hears_me = heartbeat.hears(self.me.member);
        let back_by = match heartbeat.back_ms {
            // A heartbeat of the same process that comes late takes nothing back.
            0 if old.is_restarting() && old.incarnation == heartbeat.incarnation => old.back_by,
            0 => Time(0),
            ms => now.after(Duration::from_millis(ms as u64).min(BACK_MAX)),
        };
        let usable = hears_me && self.detectors[id as usize].hears_full_size(now);
        let status = match () {
            () if heartbeat.leaving => Status::Leaving,
            () if heartbeat.ready && usable => Status::Ready,
            () if heartbeat.syncing && usable => Status::Syncing,
            () => Status::Joining,
        };
        let new = Member {
            status,
            table_id: heartbeat.table_id,
            incarnation: heartbeat.incarnation,
            shards: heartbeat.shards,
            priority: heartbeat.priority,
            site: heartbeat.site,
            capacity: heartbeat.capacity,
            room: heartbeat.room,
            address: Some(source),
            hears_me,
            has_begun: heartbeat.syncing || heartbeat.ready || heartbeat.leaving,
            has_synced_me: heartbeat.synced >> self.me.member & 1 == 1,
            last_heard: now,
            back_by,
            since: if status == old.status { old.since } else { now },
        };
        self.view.set(id, new);
        if !old.status.is_alive() {
            self.push(Event::MemberUp(id));
        }
        if status == Status::Leaving && old.status != Status::Leaving {
            self.push(Event::MemberLeaving(id));
        }
        // Told when it becomes ready. That for a moment either did not hear the other is no news of
        // that kind.
        if !heartbeat.ready || heartbeat.leaving {
            self.told_ready &= !(1 << id);
        } else if status == Status::Ready && self.told_ready >> id & 1 == 0 {
            self.told_ready |= 1 << id;
            self.push(Event::MemberReady(id));
        }
    }

    /// A member said goodbye.
    pub fn handle_goodbye(&mut self, now: Time, member: MemberId) {
        if self.view.members[member as usize].status.is_alive() {
            self.leave(now, member, Status::Left);
            self.push(Event::MemberLeft(member));
        }
    }

    fn leave(&mut self, now: Time, member: MemberId, status: Status) {
        let old = self.view.members[member as usize];
        self.view.set(member, Member { status, since: now, back_by: Time(0), ..old });
        self.detectors[member as usize].forget();
        self.told_ready &= !(1 << member);
    }

    /// Whether a member is heard, but not its full-size heartbeats: the way here passes small
    /// datagrams only.
    pub fn hears_only_small(&self, now: Time, member: MemberId) -> bool {
        self.view.members[member as usize].status.is_alive()
            && self.detectors[member as usize].hears_only_small(now)
    }

    /// A pass begins, before [`tick`](Self::tick) and after what arrived was handled. If this
    /// member could not listen, everybody gets one more interval to be heard: because mail lies
    /// unread (`behind`), or because it was paused. It was if its own heartbeat is overdue:
    /// [`poll_at`](Self::poll_at) asked for a pass by then. That a loop wakes a little late is no
    /// pause, however short the interval is.
    pub fn begin_pass(&mut self, now: Time, behind: bool) {
        let interval = self.me.heartbeat;
        let paused = now.since(self.next_heartbeat) > interval / 4;
        for detector in &mut self.detectors {
            if behind {
                detector.excuse(now, interval);
            } else if paused {
                detector.excuse_pause(now, interval);
            }
        }
    }

    /// Finds who fell silent.
    pub fn tick(&mut self, now: Time) {
        for id in 1..=MEMBERS_MAX as MemberId {
            let member = self.view.members[id as usize];
            if !member.status.is_alive() {
                continue;
            }
            if self.dead_at(id as usize).reached(now) {
                self.leave(now, id, Status::Dead);
                self.push(Event::MemberDead(id));
            } else if member.status.is_able()
                && !member.is_restarting()
                && !self.detectors[id as usize].hears_full_size(now)
            {
                self.view.set(id, Member { status: Status::Joining, since: now, ..member });
            }
        }
    }

    /// This member's heartbeat, if one is due, and what stock decoders shall show of everybody.
    pub fn poll_heartbeat(
        &mut self,
        now: Time,
        tables: &Tables,
    ) -> Option<(Heartbeat, Few<(Shown, u8), MEMBERS_MAX>)> {
        if !self.next_heartbeat.reached(now) {
            return None;
        }
        if let Some((_, said)) = &mut self.restart {
            if *said == ANNOUNCEMENTS {
                return None;
            }
            *said += 1;
        }
        // Keep the rhythm, but never catch up with a burst.
        let pause = if self.restart.is_some() { ANNOUNCE_PAUSE } else { self.me.heartbeat };
        let next = self.next_heartbeat.after(pause);
        self.next_heartbeat = if next.reached(now) { now.after(pause) } else { next };
        let full_size = self.sent.is_multiple_of(FULL_SIZE_EVERY);
        self.sent = self.sent.wrapping_add(1);
        let mut hears = 0;
        let mut shown = Few::new();
        for id in 1..=MEMBERS_MAX as MemberId {
            if id == self.me.member {
                let state = match (tables.leaving, tables.ready) {
                    (true, _) => Shown::Standby,
                    (false, true) => Shown::Active,
                    (false, false) => Shown::Initializing,
                };
                shown.push((state, 0));
                continue;
            }
            let member = &self.view.members[id as usize];
            // Whose full-size heartbeats get lost on the way here is told that it is not heard:
            // what it sends gets lost as well.
            let only_small =
                self.detectors[id as usize].hears_only_small(now) && !member.is_restarting();
            if member.status.is_alive() && !only_small {
                hears |= 1u64 << id;
            }
            let age = now.since(member.last_heard).as_nanos() / self.me.heartbeat.as_nanos().max(1);
            let state = match member.status {
                Status::Ready => Shown::Active,
                Status::Joining | Status::Syncing => Shown::Initializing,
                Status::Leaving => Shown::Standby,
                Status::Absent | Status::Left | Status::Dead => Shown::Down,
            };
            shown.push((state, age.min(127) as u8));
        }
        let used = (1..=MEMBERS_MAX).rev().find(|id| {
            *id == self.me.member as usize || self.view.members[*id].status != Status::Absent
        });
        shown.truncate(used.unwrap_or(1));
        let interval_ms = self.me.heartbeat.as_millis() as u32;
        let heartbeat = Heartbeat {
            from: self.me.member,
            ready: tables.ready,
            syncing: tables.syncing,
            leaving: tables.leaving,
            full_size,
            shards: self.me.shards,
            priority: self.me.priority,
            site: self.me.site,
            table_id: self.me.table_id,
            interval_ms,
            dead_ms: interval_ms * self.me.dead_after,
            hears,
            incarnation: self.me.incarnation,
            capacity: tables.capacity,
            room: tables.room,
            synced: tables.synced,
            accepted: self.accepted(now),
            back_ms: self.restart.map_or(0, |(back, _)| back.as_millis().max(1) as u32),
        };
        Some((heartbeat, shown))
    }

    fn push(&mut self, event: Event) {
        // More events than the queue holds means that nobody takes them: the oldest say least.
        if self.events.len() == NOTIFY_QUEUE {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

#[cfg(test)]
mod tests;
