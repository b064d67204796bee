//! The group: who is there, who is ready, who is dead.
//!
//! Shard 0 of a member runs one [`Group`]. Heartbeats and the passing of time go in; a
//! [`View`] and events come out. The view is what every shard acts on: a copy's role is read
//! from it, so a death costs no work per connection.

pub mod detector;
pub mod hearing;
pub mod selection;
pub mod view;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use crate::ccp::heartbeat::{Heartbeat, Shown};
use crate::conn::MemberId;
use crate::limits::{MEMBERS_MAX, NOTIFY_QUEUE};
use crate::time::Time;
use detector::Detector;
use view::{Member, Status, View};

/// Every how many heartbeats one is padded to full size.
pub const FULL_SIZE_EVERY: u32 = 4;

/// How many such heartbeats may be missing in a row before the sender is no backup any more.
pub const FULL_SIZE_MISSED: u32 = 3;

/// Something that the notify command may want to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A member was heard that was not there before.
    MemberUp(MemberId),
    /// A member can hold copies and take over.
    MemberReady(MemberId),
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
    /// Free slots of all shards.
    pub room: u64,
    /// Whether the member can take over and hold copies.
    pub ready: bool,
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
}

/// A second sender under one member number: a restarted process, or another host.
#[derive(Clone, Copy)]
struct Rival {
    incarnation: u64,
    since: Time,
    told: bool,
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
            me,
        }
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
            let ready = self.view.members[m].status == Status::Ready;
            let missed = self.detectors[m].full_size_missed_at().filter(|_| ready);
            at.min(self.detectors[m].silent_at()).min(missed.unwrap_or(Time::NEVER))
        })
    }

    /// A heartbeat of this group arrived. `false` if it came from another host with a number in use.
    pub fn handle_heartbeat(&mut self, now: Time, source: IpAddr, heartbeat: &Heartbeat) -> bool {
        let id = heartbeat.from;
        if id == self.me.member {
            if heartbeat.incarnation == self.me.incarnation {
                return true; // Multicast brings our own back.
            }
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
        let rhythm = self.me.heartbeat.max(Duration::from_millis(heartbeat.interval_ms.min(10_000) as u64));
        let full_size = rhythm * FULL_SIZE_EVERY * FULL_SIZE_MISSED;
        self.detectors[id as usize].expect(rhythm * self.me.dead_after, full_size);
        self.detectors[id as usize].heard(now, heartbeat.full_size);
        self.admit(now, source, heartbeat);
        true
    }

    /// Whether a new incarnation may replace the known one: only once that has missed a heartbeat.
    fn admit_rival(&mut self, now: Time, source: IpAddr, heartbeat: &Heartbeat) -> bool {
        let id = heartbeat.from as usize;
        let patience = self.me.heartbeat.max(Duration::from_millis(heartbeat.interval_ms as u64)) * 3 / 2;
        if now.since(self.detectors[id].last_heard()) > patience {
            return true;
        }
        let rival = match self.rivals[id] {
            Some(rival) if rival.incarnation == heartbeat.incarnation => rival,
            _ => Rival { incarnation: heartbeat.incarnation, since: now, told: false },
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
        let usable = heartbeat.ready && hears_me && self.detectors[id as usize].hears_full_size(now);
        let status = match (heartbeat.leaving, usable) {
            (true, _) => Status::Leaving,
            (false, true) => Status::Ready,
            (false, false) => Status::Joining,
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
            last_heard: now,
            since: if status == old.status { old.since } else { now },
        };
        self.view.set(id, new);
        if !old.status.is_alive() {
            self.push(Event::MemberUp(id));
        }
        if status == Status::Ready && old.status != Status::Ready {
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
        self.view.set(member, Member { status, since: now, ..old });
        self.detectors[member as usize].forget();
    }

    /// How often this member sends heartbeats.
    pub fn heartbeat(&self) -> Duration {
        self.me.heartbeat
    }

    /// This member could not listen for a while: everybody gets one more interval to be heard.
    pub fn excuse(&mut self, now: Time) {
        let interval = self.me.heartbeat;
        self.detectors.iter_mut().for_each(|detector| detector.excuse(now, interval));
    }

    /// Finds who fell silent.
    pub fn tick(&mut self, now: Time) {
        for id in 1..=MEMBERS_MAX as MemberId {
            let member = self.view.members[id as usize];
            if !member.status.is_alive() {
                continue;
            }
            let detector = &self.detectors[id as usize];
            if detector.silent_at().reached(now) {
                self.leave(now, id, Status::Dead);
                self.push(Event::MemberDead(id));
            } else if member.status == Status::Ready && !detector.hears_full_size(now) {
                self.view.set(id, Member { status: Status::Joining, since: now, ..member });
            }
        }
    }

    /// This member's heartbeat, if one is due, and what stock decoders shall show of everybody.
    pub fn poll_heartbeat(&mut self, now: Time, tables: &Tables) -> Option<(Heartbeat, Vec<(Shown, u8)>)> {
        if !self.next_heartbeat.reached(now) {
            return None;
        }
        // Keep the rhythm, but never catch up with a burst.
        let next = self.next_heartbeat.after(self.me.heartbeat);
        self.next_heartbeat = if next.reached(now) { now.after(self.me.heartbeat) } else { next };
        let full_size = self.sent.is_multiple_of(FULL_SIZE_EVERY);
        self.sent = self.sent.wrapping_add(1);
        let mut hears = 0;
        let mut shown = Vec::with_capacity(MEMBERS_MAX);
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
            if member.status.is_alive() {
                hears |= 1u64 << id;
            }
            let age = now.since(member.last_heard).as_nanos() / self.me.heartbeat.as_nanos().max(1);
            let state = match member.status {
                Status::Ready => Shown::Active,
                Status::Joining => Shown::Initializing,
                Status::Leaving => Shown::Standby,
                Status::Absent | Status::Left | Status::Dead => Shown::Down,
            };
            shown.push((state, age.min(127) as u8));
        }
        let used = (1..=MEMBERS_MAX)
            .rev()
            .find(|id| *id == self.me.member as usize || self.view.members[*id].status != Status::Absent);
        shown.truncate(used.unwrap_or(1));
        let interval_ms = self.me.heartbeat.as_millis() as u32;
        let heartbeat = Heartbeat {
            from: self.me.member,
            ready: tables.ready,
            syncing: false,
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
            synced: 0,
            back_ms: 0,
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
