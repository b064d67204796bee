//! What many stories begin and end with.

use std::time::Duration;

use hypersync::conn::{Kind, MemberId, Tuple, shard_of};
use hypersync::memory::OwnedMemory;

use super::{HOLD, World};

pub const SECOND: Duration = Duration::from_secs(1);

pub fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Members 1, 2 and so on with these priorities (the higher, the rather a member is the backup),
/// past the time in which they get to know each other.
pub fn group<'m>(
    seed: u64,
    memories: &'m [OwnedMemory],
    shards: u8,
    priorities: &[u8],
) -> World<'m> {
    let mut world = World::new(seed, memories);
    start(&mut world, shards, priorities);
    world
}

/// The same in a world that was made ready otherwise.
pub fn start(world: &mut World<'_>, shards: u8, priorities: &[u8]) {
    for (i, priority) in priorities.iter().enumerate() {
        world.start(i as MemberId + 1, shards, *priority);
    }
    world.run_for(ms(100));
}

/// So many connections of this member, a hundred every so often.
pub fn open_hundreds(
    world: &mut World<'_>,
    member: MemberId,
    hundreds: u32,
    pause: Duration,
) -> Vec<Tuple> {
    let mut tuples = Vec::new();
    for _ in 0..hundreds {
        tuples.extend((0..100).map(|_| world.open_at(member)));
        world.run_for(pause);
    }
    tuples
}

/// What was just opened is past its hold; then everything is on two members within the limit.
pub fn settle(world: &mut World<'_>, limit: Duration) {
    world.run_for(HOLD + ms(10));
    world.run_until(limit, "every connection is on two members", |w| w.is_quiet());
}

/// What this member has of the connection, if anything.
pub fn kind_at(world: &World<'_>, member: MemberId, tuple: &Tuple) -> Option<Kind> {
    let shards = &world.hosts[&member].shards;
    let table = shards[shard_of(tuple, shards.len() as u8) as usize].table();
    table.find_original(tuple).map(|slot| table.kind(slot))
}

/// The member's connections that have no up-to-date second copy.
pub fn exposure(world: &World<'_>, member: MemberId) -> u64 {
    world.hosts[&member].shards.iter().map(|shard| shard.exposure()).sum()
}
