//! What a seed is about: everything that stays the same for its whole run.

use std::sync::atomic::Ordering;
use std::time::Duration;

use hypersync::conn::Generation;
use hypersync::limits::{ARENA_MIN, GENERATIONS, SLOTS_MIN};
use hypersync::memory::{JOURNAL_DECLINES, Memory, MemorySize, OwnedMemory};
use hypersync::source::CommitMode;
use hypersync::sync::stream::WORD_SESSIONS;

use crate::world::{Network, Rng, memories_of};

/// Drawn from a seed before anything starts.
#[derive(Debug)]
pub struct Plan {
    /// Shards and priority of each member.
    pub members: Vec<(u8, u8)>,
    /// How large the memory of each member's shards is, and what each restart with a new table
    /// starts with.
    pub sizes: Vec<MemorySize>,
    pub restart_sizes: Vec<MemorySize>,
    pub network: Network,
    pub commit: CommitMode,
    /// Faults one after the other.
    pub episodes: u64,
    /// Whether a fault may begin before what the one before it did is repaired.
    pub tangled: bool,
    /// Open connections at most.
    pub open_max: usize,
    /// Traffic: in how many of 1000 steps something happens, and how much at most.
    pub traffic: u64,
    pub burst: u64,
    /// In how many of 1000 events the source misses one.
    pub missed: u64,
    /// Whether clocks run at different rates.
    pub drift: bool,
    /// In how many of 1000 steps a datagram is forged.
    pub forged: u64,
    /// Whether passes are made when something arrives or an announced timer has come, not at every
    /// step.
    pub as_announced: bool,
    /// Whether traffic of a connection may show up at both of its members within a round trip.
    pub at_once: bool,
    /// Whether traffic may move to members that have no copy of its connection.
    pub strays: bool,
    /// Whether a process that was killed may be back only when its connections have long been
    /// others'.
    pub absences: bool,
    /// Whether members have counted for so long that their words are about to wrap.
    pub aged: bool,
}

/// Starts after the first that there is memory for.
pub const RESTARTS: usize = 4;
/// Shards that one of them can have.
pub const SHARDS_OF_RESTART: usize = 3;

/// What members differ in is drawn with this.
const SIZES: u64 = 0x51ce_5000_0000_0001;
/// And this draws whether connections are claimed at two members at once.
const AT_ONCE: u64 = 0x51ce_5000_0000_0002;
/// And this whether their traffic moves to where they are not known.
const STRAYS: u64 = 0x51ce_5000_0000_0003;
/// And this how long processes are gone.
const ABSENCES: u64 = 0x51ce_5000_0000_0004;
/// And this where their words stand.
const AGED: u64 = 0x51ce_5000_0000_0005;

impl Plan {
    pub fn draw(rng: &mut Rng) -> Plan {
        let n = [2, 2, 2, 3, 3, 3, 4, 4, 5, 6, 7, 8][rng.below(12) as usize];
        let shards_max = if n > 5 { 2 } else { 3 };
        let members = (0..n)
            .map(|_| (1 + rng.below(shards_max) as u8, [50, 100, 100, 200][rng.below(4) as usize]));
        let members: Vec<(u8, u8)> = members.collect();
        let capacity = [SLOTS_MIN, 128, 256, 512, 512, 1024][rng.below(6) as usize];
        let mut some = |of: u64| if rng.chance(60) { rng.below(of) } else { 0 };
        let network =
            Network { loss: some(20), repeats: some(20), late: some(30), refusals: some(20) };
        let refusals = if rng.chance(25) { network.refusals } else { 0 };
        let size = MemorySize { extras: capacity, ..MemorySize::new(capacity, ARENA_MIN) };
        let mut plan = Plan {
            sizes: vec![size; members.len()],
            restart_sizes: vec![size; RESTARTS],
            members,
            network: Network { refusals, ..network },
            commit: [CommitMode::Eager, CommitMode::Eager, CommitMode::Takeover, CommitMode::Off]
                [rng.below(4) as usize],
            episodes: 1 + rng.below(4),
            tangled: rng.chance(25),
            open_max: capacity / [8, 4, 2, 1][rng.below(4) as usize],
            traffic: [50, 200, 600, 1000][rng.below(4) as usize],
            burst: [2, 4, 12][rng.below(3) as usize],
            missed: if rng.chance(30) { rng.below(100) } else { 0 },
            drift: rng.chance(50),
            forged: rng.below(60),
            // Not drawn from the same numbers, so that what a seed does does not depend on it
            // otherwise. Nor is what follows.
            as_announced: Rng(!rng.0).chance(50),
            at_once: Rng(rng.0 ^ AT_ONCE).chance(30),
            strays: Rng(rng.0 ^ STRAYS).chance(30),
            absences: Rng(rng.0 ^ ABSENCES).chance(40),
            aged: Rng(rng.0 ^ AGED).chance(40),
        };
        let mut sizes = Rng(rng.0 ^ SIZES);
        if sizes.chance(40) {
            for size in plan.sizes.iter_mut().chain(&mut plan.restart_sizes) {
                let capacity =
                    (capacity / 4 * [1, 2, 3, 4, 8][sizes.below(5) as usize]).max(SLOTS_MIN);
                let arena = ARENA_MIN + [0, 4096, ARENA_MIN][sizes.below(3) as usize];
                let extras = [capacity, capacity, capacity / 8, 1][sizes.below(4) as usize];
                *size = MemorySize { capacity, arena, extras };
            }
        }
        plan
    }

    /// Whether a connection may have to do without its labels.
    pub fn lacks_extras(&self) -> bool {
        self.sizes.iter().chain(&self.restart_sizes).any(|size| size.extras < size.capacity)
    }

    /// The pieces of memory that this plan can need: those of the members one after the other, then
    /// three for each restart with a new table.
    pub fn memories(&self) -> Vec<OwnedMemory> {
        let firsts = self
            .members
            .iter()
            .zip(&self.sizes)
            .map(|((shards, _), size)| (*shards as usize, size));
        let restarts = self.restart_sizes.iter().map(|size| (SHARDS_OF_RESTART, size));
        let memories: Vec<_> =
            firsts.chain(restarts).flat_map(|(n, size)| memories_of(n, *size)).collect();
        if self.aged {
            memories.iter().for_each(|memory| age(&memory.parts()));
        }
        memories
    }
}

/// What was counted through earlier runs, while nothing of them is left: generations of slots,
/// sessions of streams and numbers of declines, all shortly before they begin anew.
fn age(memory: &Memory<'_>) {
    for (n, slot) in memory.slots.iter().enumerate() {
        let generation = Generation::from_low_bits(GENERATIONS - 1 - n as u32 % 7);
        slot.update(|line| line.set_generation(generation));
    }
    for (n, stream) in memory.streams.iter().enumerate() {
        stream.0[WORD_SESSIONS].store(u64::from(u16::MAX) - n as u64 % 3, Ordering::Relaxed);
    }
    memory.journal[JOURNAL_DECLINES].store(u64::from(u32::MAX) - 5, Ordering::Relaxed);
}

/// How long the fault of one episode lasts.
pub fn fault_time(rng: &mut Rng) -> Duration {
    Duration::from_millis(
        [10 + rng.below(40), 60 + rng.below(200), 200 + rng.below(500)][rng.below(3) as usize],
    )
}
