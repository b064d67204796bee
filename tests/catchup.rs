//! What a return costs, and what finds copies that differ: without sockets, in simulated time.

#[allow(dead_code)]
#[path = "protocol/world.rs"]
mod world;

use hypersync::conn::{Kind, MemberId, Tuple};
use hypersync::counters::Counter;
use hypersync::limits::ARENA_MIN;
use hypersync::memory::{MemorySize, OwnedMemory};
use world::story::{group, ms, open_hundreds};
use world::{World, memories_of};

const N: u64 = 5000;

fn counts(world: &World<'_>, counters: &[Counter]) -> u64 {
    [1, 2].iter().flat_map(|m| counters.iter().map(|c| world.counter(*m, *c))).sum()
}

fn settle(world: &mut World<'_>) {
    world.run_until(ms(6000), "everything agrees", |w| w.is_quiet());
    world.run_for(ms(300));
    world.run_until(ms(6000), "everything agrees", |w| w.is_quiet());
    world.check();
}

/// Two members, and N connections of the first.
fn pair<'m>(memories: &'m [OwnedMemory]) -> (World<'m>, Vec<Tuple>) {
    let mut world = group(3, memories, 1, &[100, 100]);
    let tuples = open_hundreds(&mut world, 1, N as u32 / 100, ms(5));
    settle(&mut world);
    (world, tuples)
}

fn size() -> MemorySize {
    MemorySize::new(16_384, ARENA_MIN * 4)
}

#[test]
fn after_a_long_absence_work_follows_what_changed_not_what_there_is() {
    let memories = memories_of(2, size());
    let (mut world, tuples) = pair(&memories);
    world.cut = vec![(1, 2), (2, 1)];
    world.run_for(ms(1000));
    assert!(counts(&world, &[Counter::StreamsLost]) == 2, "both waited in vain");
    for tuple in &tuples[..50] {
        for _ in 0..5 {
            world.change(*tuple);
        }
    }
    for tuple in &tuples[50..80] {
        world.close(*tuple);
    }
    for _ in 0..20 {
        world.open_at(1);
    }
    world.run_for(ms(100));
    let deltas =
        [Counter::DeltasNew, Counter::DeltasUpdate, Counter::DeltasClose, Counter::DeltasRelease];
    let before = (counts(&world, &deltas), counts(&world, &[Counter::BytesSent]));
    world.cut.clear();
    settle(&mut world);
    let deltas = counts(&world, &deltas) - before.0;
    let items = counts(&world, &[Counter::CompareItems]);
    let bytes = counts(&world, &[Counter::BytesSent]) - before.1;
    println!("100 of {N} changed: {deltas} deltas, {items} items, {bytes} bytes");
    // 50 updates, 20 news, 30 releases.
    assert!((100..=110).contains(&deltas), "{deltas} deltas");
    assert_eq!(counts(&world, &[Counter::CompareOffered]), 30, "what was closed");
    // Thirty closes lie in at most thirty of 256 buckets.
    assert!(items <= 35 * N / 256, "{items} items");
    assert!(bytes < 60_000, "{bytes} bytes: all of it whole is 300,000");
}

#[test]
fn a_short_absence_is_made_up_for_from_the_history() {
    let memories = memories_of(2, size());
    let (mut world, tuples) = pair(&memories);
    world.cut = vec![(1, 2), (2, 1)];
    for tuple in &tuples[..100] {
        world.change(*tuple);
    }
    world.run_for(ms(120));
    let sent = counts(&world, &[Counter::DeltasUpdate, Counter::DeltasNew]);
    world.cut.clear();
    settle(&mut world);
    assert_eq!(
        counts(&world, &[Counter::DeltasUpdate, Counter::DeltasNew]),
        sent,
        "nothing is composed again"
    );
    assert!(counts(&world, &[Counter::CatchUpDatagrams]) > 0);
    assert_eq!(counts(&world, &[Counter::StreamsLost, Counter::CompareItems]), 0);
}

/// The first copy that a member holds.
fn copy_at(world: &World<'_>, member: MemberId) -> u32 {
    let table = world.hosts[&member].shards[0].table();
    (0..table.capacity()).find(|slot| table.kind(*slot) == Kind::Backup).expect("it holds copies")
}

#[test]
fn a_copy_that_memory_altered_is_found_and_sent_again() {
    let memories = memories_of(2, size());
    let (mut world, _) = pair(&memories);
    let slot = copy_at(&world, 2);
    world.kill(2);
    world.hosts[&2].memory[0].slots[slot as usize].update(|line| {
        let mut state = line.state();
        state.mark ^= 1;
        line.set_state(&state);
    });
    world.resume(2);
    world.run_for(ms(50));
    settle(&mut world);
    assert_eq!(counts(&world, &[Counter::CompareResent]), 1, "that one and no other");
    assert_eq!(counts(&world, &[Counter::CompareOffered]), 0);
}

#[test]
fn a_copy_that_its_active_does_not_count_on_goes() {
    let memories = memories_of(2, size());
    let (mut world, _) = pair(&memories);
    let slot = copy_at(&world, 2);
    let active = world.hosts[&2].shards[0].table().line(slot).peer();
    world.kill(1);
    // As after a write that was cut short: freed, two lives later.
    world.hosts[&1].memory[0].slots[active.slot() as usize].update(|line| {
        line.set_generation(line.generation().next().next());
        line.set_kind(Kind::Free);
    });
    let tuple = world.hosts[&2].shards[0].table().tuples(slot).0;
    world.resume(1);
    world.run_for(ms(50));
    // Its source tells of it anew.
    world.change(tuple);
    settle(&mut world);
    assert_eq!(counts(&world, &[Counter::CompareOffered]), 1, "that one and no other");
    assert_eq!(counts(&world, &[Counter::CompareResent]), 0);
}
