//! The group table: what shard 0 knows of the members, for every shard and every inspector;
//! and one line a shard in which it says how far it is.
//!
//! ```text
//!  byte     0  version: raised by every change of a member (a new "last heard" alone is none)
//!         128  members: 53 records of 128 bytes by member id, the first unused
//!        6912  shards: 64 lines of 128 bytes
//!       15104  unused, to 16384
//!
//!  member  word 0  seqlock (odd: torn)
//!               1  status 8 | hears me 8 | shards 8 | priority 8 | site 8 | family 8 | says 8   (from bit 0)
//!                  says: bit 0 it gives and takes copies, bit 1 this member has all that it should have of it
//!               2  table id            6, 7  address, low word first; IPv4 in the low 32 bits
//!               3  incarnation            8  last heard, ns
//!               4  capacity, slots        9  status since, ns        11.. zero
//!               5  room, slots             10  back by, ns: it restarts; 0: it does not
//!
//!  shard   word 0  last pass, ns
//!               1  version of the group that the shard has acted on
//!               2  version of the group for which its kernel commits have settled
//!               3  of shard 0: the member's standing: 0 starting, 1 ready, 2 leaving, 3 syncing
//!               4  members to which the shard's full sync is done, as bits
//!               5  of shard 0: the members whose full sync to this one is not done, as bits
//!               6  of shard 0: what is wrong: bit 0 nobody is heard who should be, bit 1 not even its own heartbeats come
//!                  back from the multicast group; family << 8 of the address of another host with its number, or 0
//!            7, 8  that address, low word first; IPv4 in the low 32 bits
//! ```
//!
//! One thread writes a record (shard 0) or a line (its shard); anybody reads, without locks. The
//! seqlock is that of `conn::slot`. What the fields mean is said in
//! [`crate::group::view`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::conn::MemberId;
use crate::group::view::{Member, Status};
use crate::limits::{MEMBERS_MAX, SHARDS_MAX};
use crate::time::Time;
use crate::word::Word;

const V4: u64 = 4;
const V6: u64 = 6;
const MEMBER_WORDS: usize = 11;

/// An address as family, low word and high word.
fn address_to_words(address: Option<IpAddr>) -> [u64; 3] {
    match address {
        None => [0; 3],
        Some(IpAddr::V4(a)) => [V4, u32::from(a) as u64, 0],
        Some(IpAddr::V6(a)) => [V6, u128::from(a) as u64, (u128::from(a) >> 64) as u64],
    }
}

fn address_from_words([family, low, high]: [u64; 3]) -> Option<IpAddr> {
    match family {
        V4 => Some(Ipv4Addr::from(low as u32).into()),
        V6 => Some(Ipv6Addr::from((high as u128) << 64 | low as u128).into()),
        _ => None,
    }
}

fn to_words(m: &Member) -> [u64; MEMBER_WORDS] {
    let [family, low, high] = address_to_words(m.address);
    let small = m.status as u64
        | (m.hears_me as u64) << 8
        | (m.shards as u64) << 16
        | (m.priority as u64) << 24
        | (m.site as u64) << 32
        | family << 40
        | (m.has_begun as u64) << 48
        | (m.has_synced_me as u64) << 49;
    [
        0,
        small,
        m.table_id as u64,
        m.incarnation,
        m.capacity,
        m.room,
        low,
        high,
        m.last_heard.0,
        m.since.0,
        m.back_by.0,
    ]
}

fn from_words(w: &[u64; MEMBER_WORDS]) -> Member {
    let byte = |shift: u32| (w[1] >> shift) as u8;
    Member {
        status: Status::from_raw(byte(0)).unwrap_or_default(),
        hears_me: byte(8) != 0,
        has_begun: byte(48) & 1 != 0,
        has_synced_me: byte(48) & 2 != 0,
        shards: byte(16),
        priority: byte(24),
        site: byte(32),
        table_id: w[2] as u32,
        incarnation: w[3],
        capacity: w[4],
        room: w[5],
        address: address_from_words([byte(40) as u64, w[6], w[7]]),
        last_heard: Time(w[8]),
        since: Time(w[9]),
        back_by: Time(w[10]),
    }
}

/// 128 bytes of atomics.
#[repr(C, align(128))]
#[derive(Default)]
struct LineWords<W = AtomicU64>([W; 16]);

/// Lines behind those of the shards: nothing yet, and no padding.
const UNUSED_LINES: usize = 10;

/// The group table in memory.
#[repr(C, align(4096))]
pub struct GroupWords<W = AtomicU64> {
    version: LineWords<W>,
    members: [LineWords<W>; MEMBERS_MAX + 1],
    shards: [LineWords<W>; SHARDS_MAX],
    _unused: [LineWords<W>; UNUSED_LINES],
}

// No padding: every byte of it is part of an atomic, as `shm::mapping` asks.
const _: () = assert!(size_of::<LineWords>() == 16 * size_of::<AtomicU64>());
const _: () = assert!(
    size_of::<GroupWords>()
        == (1 + MEMBERS_MAX + 1 + SHARDS_MAX + UNUSED_LINES) * size_of::<LineWords>()
);

impl Default for GroupWords {
    /// An empty table, for tests and the simulator.
    fn default() -> GroupWords {
        GroupWords {
            version: LineWords::default(),
            members: std::array::from_fn(|_| LineWords::default()),
            shards: std::array::from_fn(|_| LineWords::default()),
            _unused: Default::default(),
        }
    }
}

impl<W: Word> GroupWords<W> {
    /// Raised by every change; whoever reads a version and then the records sees at least that
    /// change.
    pub fn version(&self) -> u64 {
        let version = self.version.0[0].get();
        // Pairs with the release in `write`.
        fence(Ordering::Acquire);
        version
    }

    /// A member's record; `None` while (or since) a write is unfinished, and for numbers that no
    /// member has. A reader that needs it tries again; a crashed writer's record stays torn.
    pub fn read(&self, member: MemberId) -> Option<Member> {
        let words = &self.members.get(member as usize).filter(|_| member > 0)?.0;
        let before = words[0].get();
        if before & 1 == 1 {
            return None;
        }
        fence(Ordering::Acquire);
        let copy = std::array::from_fn(|i| words[i].get());
        fence(Ordering::Acquire);
        (words[0].get() == before).then(|| from_words(&copy))
    }

    /// A shard's line; `shard` is below 64.
    pub fn shard(&self, shard: u8) -> ShardStatus<'_, W> {
        ShardStatus(&self.shards[shard as usize])
    }
}

impl GroupWords {
    /// Replaces a member's record (1 to 52). Only shard 0 writes.
    pub fn write(&self, member: MemberId, record: &Member) {
        assert!((1..=MEMBERS_MAX).contains(&(member as usize)));
        let words = &self.members[member as usize].0;
        let before = words[0].load(Ordering::Relaxed);
        let old: [u64; MEMBER_WORDS] = std::array::from_fn(|i| words[i].load(Ordering::Relaxed));
        let new = to_words(record);
        let odd = before | 1;
        words[0].store(odd, Ordering::Relaxed);
        // Pairs with the second fence in `read`: whoever sees a word written below also sees the
        // odd count.
        fence(Ordering::Release);
        for i in 1..MEMBER_WORDS {
            words[i].store(new[i], Ordering::Relaxed);
        }
        // Pairs with the first load and fence in `read`.
        words[0].store(odd.wrapping_add(1), Ordering::Release);
        // Heartbeats come all the time: what only they move must not make every shard look again.
        if (1..MEMBER_WORDS).any(|i| i != 8 && old[i] != new[i]) {
            let version = self.version.0[0].load(Ordering::Relaxed);
            self.version.0[0].store(version.wrapping_add(1), Ordering::Release);
        }
    }

    /// A new process goes on with the table of one that is gone: records that it left torn are
    /// taken as they are (each word is of before or of after the write, and heartbeats will tell),
    /// and `shards` shards have done nothing yet. For what the kernel is owed is still known:
    /// `settled_version` stays.
    pub fn resume(&self, shards: u8) {
        for member in &self.members {
            let seqlock = member.0[0].load(Ordering::Relaxed);
            member.0[0].store(seqlock.wrapping_add(seqlock & 1), Ordering::Release);
        }
        for shard in 0..shards {
            let line = self.shard(shard);
            line.set_last_pass(Time(0));
            line.set_view_version(0);
            line.set_standing(Standing::Starting);
            line.set_troubles(&Troubles::default());
        }
    }
}

/// What is wrong with a member, as far as it knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Troubles {
    /// Nobody is heard, of those who were heard before or are named as peers.
    pub lonely: bool,
    /// Nobody is heard, and its own heartbeats do not come back from the multicast group.
    pub deaf: bool,
    /// Another host has its number, and nobody says that it takes this one for the member.
    pub namesake: Option<IpAddr>,
}

/// Whether this member can carry the group's traffic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Not yet.
    Starting,
    /// It can.
    Ready,
    /// No longer: it was told to end.
    Leaving,
    /// It takes copies, and does not have all yet that it should have.
    Syncing,
}

impl Standing {
    /// The word for an operator.
    pub fn name(self) -> &'static str {
        match self {
            Standing::Starting => "starting",
            Standing::Ready => "ready",
            Standing::Leaving => "leaving",
            Standing::Syncing => "syncing",
        }
    }
}

/// How far a shard is. Its shard writes, anybody reads.
pub struct ShardStatus<'m, W = AtomicU64>(&'m LineWords<W>);

impl<W: Word> ShardStatus<'_, W> {
    /// When the shard's loop began its last pass; 0 before the first.
    pub fn last_pass(&self) -> Time {
        Time(self.0.0[0].get())
    }

    /// The version of the group that the shard has acted on: its effects are visible.
    pub fn view_version(&self) -> u64 {
        self.load(1)
    }

    /// The version of the group for which everything that had to be committed to the kernel was.
    pub fn settled_version(&self) -> u64 {
        self.load(2)
    }

    /// The member's standing, on the line of shard 0.
    pub fn standing(&self) -> Standing {
        match self.load(3) {
            1 => Standing::Ready,
            2 => Standing::Leaving,
            3 => Standing::Syncing,
            _ => Standing::Starting,
        }
    }

    /// The members to which this shard's full sync is done, as bits.
    pub fn synced(&self) -> u64 {
        self.load(4)
    }

    /// The members whose full sync to this one is not done, as bits; on the line of shard 0.
    pub fn awaited(&self) -> u64 {
        self.load(5)
    }

    /// What is wrong with the member, on the line of shard 0.
    pub fn troubles(&self) -> Troubles {
        let word = self.load(6);
        Troubles {
            lonely: word & 1 != 0,
            deaf: word & 2 != 0,
            namesake: address_from_words([word >> 8, self.load(7), self.load(8)]),
        }
    }

    fn load(&self, word: usize) -> u64 {
        let value = self.0.0[word].get();
        // Pairs with the release in the setter.
        fence(Ordering::Acquire);
        value
    }
}

impl ShardStatus<'_> {
    /// Says that a pass begins.
    pub fn set_last_pass(&self, now: Time) {
        self.0.0[0].store(now.0, Ordering::Relaxed);
    }

    /// Says that this version of the group was acted on.
    pub fn set_view_version(&self, version: u64) {
        self.0.0[1].store(version, Ordering::Release);
    }

    /// Says that the kernel commits of this version of the group are done.
    pub fn set_settled_version(&self, version: u64) {
        self.0.0[2].store(version, Ordering::Release);
    }

    /// Says what is wrong with the member.
    pub fn set_troubles(&self, troubles: &Troubles) {
        let [family, low, high] = address_to_words(troubles.namesake);
        self.0.0[7].store(low, Ordering::Relaxed);
        self.0.0[8].store(high, Ordering::Relaxed);
        let word = troubles.lonely as u64 | (troubles.deaf as u64) << 1 | family << 8;
        self.0.0[6].store(word, Ordering::Release);
    }

    /// Says how the member stands.
    pub fn set_standing(&self, standing: Standing) {
        self.0.0[3].store(standing as u64, Ordering::Release);
    }

    /// Says to which members the full sync is done, as bits.
    pub fn set_synced(&self, members: u64) {
        self.0.0[4].store(members, Ordering::Release);
    }

    /// Says whose full sync is not done, as bits.
    pub fn set_awaited(&self, members: u64) {
        self.0.0[5].store(members, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Member {
        Member {
            status: Status::Ready,
            hears_me: true,
            has_begun: true,
            has_synced_me: true,
            shards: 64,
            priority: 200,
            site: 3,
            table_id: u32::MAX,
            incarnation: 1 << 63,
            capacity: 1 << 32,
            room: 12,
            address: Some("2001:db8::7".parse().unwrap()),
            last_heard: Time(5),
            since: Time(4),
            back_by: Time(6),
        }
    }

    #[test]
    fn a_record_reads_back_and_raises_the_version_only_if_it_changed() {
        let group = Box::<GroupWords>::default();
        assert_eq!(group.read(52), Some(Member::default()));
        group.write(52, &record());
        assert_eq!((group.read(52), group.version()), (Some(record()), 1));
        let later = Member { last_heard: Time(9), ..record() };
        group.write(52, &later);
        assert_eq!(
            (group.read(52), group.version()),
            (Some(later), 1),
            "a heartbeat changes nothing else"
        );
        let v4 = Member { address: Some("192.0.2.1".parse().unwrap()), ..record() };
        group.write(52, &v4);
        assert_eq!((group.read(52), group.version()), (Some(v4), 2));
        assert_eq!((group.read(0), group.read(53), group.read(255)), (None, None, None));
    }

    #[test]
    fn a_crash_in_mid_write_leaves_a_record_that_nobody_reads() {
        let group = Box::<GroupWords>::default();
        group.members[3].0[0].store(7, Ordering::Relaxed);
        assert_eq!(group.read(3), None);
        group.write(3, &record());
        assert_eq!(group.read(3), Some(record()), "the next write heals it");
    }

    #[test]
    fn a_new_process_reads_what_a_killed_one_left_and_has_done_nothing() {
        let group = Box::<GroupWords>::default();
        group.write(3, &record());
        let line = group.shard(1);
        line.set_last_pass(Time(1));
        line.set_view_version(2);
        line.set_settled_version(2);
        line.set_standing(Standing::Ready);
        group.members[3].0[0].fetch_add(1, Ordering::Relaxed);
        assert_eq!(group.read(3), None, "it was killed in mid-write");
        group.resume(2);
        assert_eq!(group.read(3), Some(record()));
        assert_eq!(
            (line.last_pass(), line.view_version(), line.standing()),
            (Time(0), 0, Standing::Starting)
        );
        assert_eq!((line.settled_version(), group.version()), (2, 1));
    }

    #[test]
    fn readers_see_whole_records() {
        let group = Box::<GroupWords>::default();
        let rounds: u64 = if cfg!(miri) { 300 } else { 100_000 };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 1..=rounds {
                    let r = Member { incarnation: n, capacity: n, since: Time(n), ..record() };
                    group.write(1, &r);
                }
            });
            let mut seen = 0;
            while seen < rounds {
                let version = group.version();
                let Some(r) = group.read(1) else { continue };
                assert!(r.capacity >= version, "a version promises its change");
                assert_eq!((r.incarnation, r.since), (r.capacity, Time(r.capacity)));
                seen = r.capacity;
            }
        });
    }

    #[test]
    fn a_shard_says_how_far_it_is() {
        let group = Box::<GroupWords>::default();
        let line = group.shard(63);
        line.set_last_pass(Time(1));
        line.set_view_version(2);
        line.set_settled_version(3);
        let seen = group.shard(63);
        assert_eq!(
            (seen.last_pass(), seen.view_version(), seen.settled_version()),
            (Time(1), 2, 3)
        );
        assert_eq!(group.shard(0).last_pass(), Time(0));
        line.set_synced(1 << 52);
        line.set_awaited(6);
        assert_eq!((seen.synced(), seen.awaited()), (1 << 52, 6));
        for namesake in ["192.0.2.1", "fe80::1"].map(|address| address.parse().ok()) {
            let troubles = Troubles { lonely: true, deaf: false, namesake };
            line.set_troubles(&troubles);
            assert_eq!(seen.troubles(), troubles);
        }
        line.set_troubles(&Troubles { deaf: true, ..Troubles::default() });
        assert_eq!(seen.troubles(), Troubles { deaf: true, ..Troubles::default() });
        for standing in [Standing::Syncing, Standing::Ready, Standing::Leaving, Standing::Starting]
        {
            line.set_standing(standing);
            assert_eq!(seen.standing(), standing);
        }
    }
}
