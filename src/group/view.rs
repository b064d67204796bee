//! The view: what one member knows of every other. Shard 0 makes it, all shards act on it.

use std::net::IpAddr;

use crate::conn::MemberId;
use crate::limits::MEMBERS_MAX;
use crate::time::Time;

/// Where a member stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Status {
    /// Never heard.
    #[default]
    Absent = 0,
    /// Heard, but not a backup: it is starting, does not hear this member, or only its small
    /// heartbeats arrive.
    Joining = 1,
    /// Can be a backup and carry traffic.
    Ready = 2,
    /// Is about to leave: its copies are moved away.
    Leaving = 3,
    /// Said goodbye.
    Left = 4,
    /// Fell silent.
    Dead = 5,
    /// Can be a backup, and does not have all yet that it should have.
    Syncing = 6,
}

impl Status {
    /// The status that a number stands for.
    pub fn from_raw(raw: u8) -> Option<Status> {
        Some(match raw {
            0 => Status::Absent,
            1 => Status::Joining,
            2 => Status::Ready,
            3 => Status::Leaving,
            4 => Status::Left,
            5 => Status::Dead,
            6 => Status::Syncing,
            _ => return None,
        })
    }

    /// Whether the member is heard.
    pub fn is_alive(self) -> bool {
        matches!(self, Status::Joining | Status::Syncing | Status::Ready | Status::Leaving)
    }

    /// Whether the member takes new copies.
    pub fn is_able(self) -> bool {
        matches!(self, Status::Syncing | Status::Ready)
    }

    /// The word for an operator.
    pub fn name(self) -> &'static str {
        match self {
            Status::Absent => "absent",
            Status::Joining => "joining",
            Status::Ready => "ready",
            Status::Leaving => "leaving",
            Status::Left => "left",
            Status::Dead => "dead",
            Status::Syncing => "syncing",
        }
    }
}

/// What is known of one member.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Member {
    /// Where it stands.
    pub status: Status,
    /// This life of its table; 0 if it was never heard.
    pub table_id: u32,
    /// This run of its process.
    pub incarnation: u64,
    /// Its shards.
    pub shards: u8,
    /// Its priority as a backup.
    pub priority: u8,
    /// Its site, 0 if unused.
    pub site: u8,
    /// Its slots.
    pub capacity: u64,
    /// Its free slots.
    pub room: u64,
    /// Where its heartbeats come from, and where synchronization goes.
    pub address: Option<IpAddr>,
    /// Whether it says that it hears this member.
    pub hears_me: bool,
    /// Whether it says that it gives and takes copies, whatever of it can be heard: it is syncing,
    /// ready or leaving.
    pub has_begun: bool,
    /// Whether it says that this member has every copy that it should have of it.
    pub has_synced_me: bool,
    /// When it was heard last.
    pub last_heard: Time,
    /// Since when it has this status.
    pub since: Time,
    /// It said that it restarts with its table and is back by then: until then its silence is no
    /// death, and it stays what it was. `Time(0)`: it did not.
    pub back_by: Time,
}

impl Member {
    /// Whether it said that it restarts, and is awaited.
    pub fn is_restarting(&self) -> bool {
        self.status.is_alive() && self.back_by != Time(0)
    }

    /// The word for an operator: its status, or that it restarts.
    pub fn standing(&self) -> &'static str {
        if self.is_restarting() { "restarting" } else { self.status.name() }
    }
}

/// Every member, by number; entry 0 is unused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct View {
    /// Moves on with every change.
    pub version: u64,
    /// This member.
    pub me: MemberId,
    /// The others.
    pub members: [Member; MEMBERS_MAX + 1],
}

impl View {
    /// A view in which nobody else was heard.
    pub fn new(me: MemberId) -> View {
        View { version: 0, me, members: [Member::default(); MEMBERS_MAX + 1] }
    }

    /// Replaces what is known of a member.
    pub fn set(&mut self, id: MemberId, member: Member) {
        if self.members[id as usize] != member {
            self.members[id as usize] = member;
            self.version += 1;
        }
    }

    /// The other members, with their numbers.
    pub fn others(&self) -> impl Iterator<Item = (MemberId, &Member)> {
        (1..=MEMBERS_MAX as MemberId)
            .filter(|id| *id != self.me)
            .map(|id| (id, &self.members[id as usize]))
    }
}
