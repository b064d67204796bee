//! Full sync without sockets: when a joining member says that it is ready, what an interruption
//! costs, and what live changes notice of it.

#[path = "protocol/world.rs"]
#[allow(dead_code)]
mod world;

use std::time::Duration;

use hypersync::conn::{MemberId, Tuple};
use hypersync::counters::{Counter, Counters, delay_percentile};
use hypersync::group::readiness::{STALL, Stage};
use hypersync::group::view::Status;
use hypersync::limits::ARENA_MIN;
use hypersync::memory::{MemorySize, OwnedMemory};
use hypersync::sync::full_sync::{Figures, SyncPhase};
use hypersync::sync::stream::{Durable, stream_index};
use world::story::{SECOND, ms};
use world::{HOLD, Network, World, memories, memories_of};

/// What may be dirty or unacknowledged in a shard before what waits for a backup has to wait, and a
/// little more.
const AHEAD: u64 = 2048 + 64;

fn large(n: usize) -> Vec<OwnedMemory> {
    memories_of(n, MemorySize::new(32_768, ARENA_MIN * 8))
}

fn stage(world: &World<'_>, member: MemberId) -> Stage {
    world.hosts[&member].readiness.stage()
}

fn copies(world: &World<'_>, member: MemberId) -> u64 {
    world.counter(member, Counter::ConnectionsBackup)
}

/// The full sync of `from` to `to`, a shard each.
fn figures(world: &World<'_>, from: MemberId, to: MemberId) -> Vec<Figures> {
    let streams = world.hosts[&from].memory.iter().map(|m| &m.streams[stream_index(to, 0)]);
    streams.map(|words| Durable(words).full_sync()).collect()
}

/// A member with so many connections that nobody else has.
fn alone<'m>(
    seed: u64,
    memories: &'m [OwnedMemory],
    shards: u8,
    connections: u32,
) -> (World<'m>, Vec<Tuple>) {
    let mut world = World::new(seed, memories);
    world.start(1, shards, 100);
    let tuples = (0..connections).map(|_| world.open_at(1)).collect();
    world.run_for(HOLD * 2);
    assert_eq!(stage(&world, 1), Stage::Ready, "it has nobody to wait for");
    (world, tuples)
}

fn run_until_ready(world: &mut World<'_>, member: MemberId, limit: Duration) {
    world.run_until(limit, "it is ready", |w| stage(w, member) == Stage::Ready);
}

#[test]
fn a_joining_member_is_not_ready_before_it_has_everything() {
    for (seed, network) in
        [(1, Network::default()), (2, Network { loss: 15, repeats: 10, late: 20, refusals: 0 })]
    {
        let memories = memories(4);
        let (mut world, _) = alone(seed, &memories, 2, 3000);
        world.network = network;
        world.start(2, 2, 100);
        let mut partial = 0;
        world.run_until(SECOND * 5, "member 2 is ready", |w| {
            partial += (stage(w, 2) == Stage::Syncing && (1..3000).contains(&copies(w, 2))) as u32;
            assert!(
                stage(w, 2) != Stage::Starting || copies(w, 2) == 0,
                "a starting member takes none"
            );
            stage(w, 2) == Stage::Ready
        });
        assert!(partial > 2, "it took a while: {partial} steps");
        assert_eq!(copies(&world, 2), 3000);
        world.check();
        assert!(figures(&world, 1, 2).iter().all(|f| f.phase == SyncPhase::Done && f.to_do == 0));
        assert_eq!(figures(&world, 1, 2).iter().map(|f| f.done).sum::<u64>(), 3000);
        world.run_until(SECOND, "member 1 hears that it is ready", |w| {
            w.hosts[&1].group.view().members[2].status == Status::Ready
        });
    }
}

#[test]
fn it_is_not_ready_before_its_kernel_has_the_copies() {
    let memories = memories(4);
    let (mut world, _) = alone(3, &memories, 2, 500);
    world.start(2, 2, 100);
    world.host(2).stalled = true;
    world.run_until(SECOND, "the copies are there", |w| copies(w, 2) == 500);
    world.run_until(SECOND, "member 1 says so", |w| {
        w.hosts[&2].group.view().members[1].has_synced_me
    });
    world.run_for(ms(200));
    assert_eq!((stage(&world, 2), world.hosts[&2].kernel.len()), (Stage::Syncing, 0));
    world.host(2).stalled = false;
    run_until_ready(&mut world, 2, ms(100));
    assert_eq!(world.hosts[&2].kernel.len(), 500);
}

#[test]
fn members_that_start_together_do_not_wait_for_each_other_for_ever() {
    let memories = memories(9);
    let mut world = World::new(4, &memories);
    for member in 1..=3 {
        world.start(member, member, 100);
        for _ in 0..300 {
            world.open_at(member);
        }
    }
    let began = world.now;
    for member in 1..=3 {
        run_until_ready(&mut world, member, SECOND);
    }
    assert!(world.now.since(began) < ms(400), "{:?}", world.now.since(began));
    world.run_until(SECOND, "two copies", |w| w.is_quiet());
    world.check();
}

#[test]
fn a_member_of_higher_priority_is_ready_once_everything_was_moved_there() {
    let memories = memories(6);
    let (mut world, _) = alone(5, &memories, 2, 1500);
    world.start(2, 2, 100);
    run_until_ready(&mut world, 2, SECOND);
    assert_eq!(copies(&world, 2), 1500);
    world.start(3, 2, 200);
    world.run_until(SECOND * 2, "member 3 syncs", |w| {
        stage(w, 3) == Stage::Syncing
            && figures(w, 1, 3).iter().all(|f| f.phase == SyncPhase::Syncing && f.to_do > 0)
    });
    let whole: u64 = figures(&world, 1, 3).iter().map(|f| f.done + f.to_do).sum();
    assert!((1500..1600).contains(&whole), "what is to be moved is known from the begin: {whole}");
    run_until_ready(&mut world, 3, SECOND * 2);
    assert_eq!(copies(&world, 3), 1500);
    assert_eq!(stage(&world, 2), Stage::Ready, "who gives its copies away stays ready");
    world.run_until(SECOND, "member 2 let them go", |w| copies(w, 2) == 0 && w.is_quiet());
    world.check();
}

#[test]
fn a_member_that_is_full_is_ready_with_what_it_took() {
    let memories = memories(3);
    let (mut world, _) = alone(6, &memories, 2, 2500);
    world.start(2, 1, 100); // Half the slots.
    let began = world.now;
    run_until_ready(&mut world, 2, SECOND * 3);
    assert!(world.now.since(began) < STALL, "member 1 said that it has no more that fits");
    assert!((1500..=2048).contains(&copies(&world, 2)), "{}", copies(&world, 2));
    let left = 2500 - copies(&world, 2);
    assert_eq!(world.counter(1, Counter::Unprotected), left);
    assert!(figures(&world, 1, 2).iter().all(|f| f.phase == SyncPhase::Full));
    assert_eq!(figures(&world, 1, 2).iter().map(|f| f.to_do).sum::<u64>(), left);
}

#[test]
fn a_member_that_does_not_hear_the_newcomer_does_not_keep_it_from_being_ready_for_ever() {
    let memories = memories(4);
    let (mut world, _) = alone(7, &memories, 2, 100);
    world.start(2, 2, 100);
    world.cut = vec![(2, 1)];
    world.run_for(STALL);
    assert_eq!((stage(&world, 2), world.hosts[&2].readiness.awaited()), (Stage::Syncing, 1 << 1));
    run_until_ready(&mut world, 2, ms(200));
    assert_eq!(copies(&world, 2), 0);
}

#[test]
fn an_interrupted_sync_goes_on_by_itself_and_sends_nothing_again_that_was_acknowledged() {
    const N: u64 = 20_000;
    let memories = large(4);
    let (mut world, _) = alone(8, &memories, 2, N as u32);
    world.start(2, 2, 100);
    for third in 1..=2 {
        world.run_until(SECOND * 5, "a third is there", |w| copies(w, 2) >= third * N / 3);
        world.cut = vec![(1, 2), (2, 1)];
        // The death is noticed on both sides after 60 ms; nothing is let go before 200 ms more.
        world.run_for(ms(100));
        assert_eq!(world.hosts[&1].group.view().members[2].status, Status::Dead);
        assert_eq!(stage(&world, 2), Stage::Syncing);
        assert!(figures(&world, 1, 2).iter().all(|f| f.phase == SyncPhase::Interrupted));
        assert!(copies(&world, 2) < N);
        world.cut.clear();
    }
    run_until_ready(&mut world, 2, SECOND * 5);
    assert_eq!(copies(&world, 2), N);
    world.check();
    let sent = world.counter(1, Counter::DeltasNew);
    // What was on its way at the cuts goes again from the history, and so is not composed again.
    assert_eq!(sent, N, "each was sent once");
    assert!(
        world.counter(1, Counter::CatchUpDatagrams) > 0,
        "something was on its way at the cuts"
    );
    assert!(figures(&world, 1, 2).iter().all(|f| f.before > 0 && f.phase == SyncPhase::Done));
}

#[test]
fn live_changes_stay_prompt_while_a_member_joins() {
    const N: u64 = 60_000;
    let memories = large(6);
    let (mut world, _) = alone(9, &memories, 3, N as u32);
    world.start(2, 3, 100);
    world.run_until(SECOND, "the first copies", |w| copies(w, 2) >= 100);
    let protected: Vec<Tuple> = world
        .copies()
        .into_iter()
        .filter(|(_, copies)| copies.len() == 2)
        .map(|(tuple, _)| tuple)
        .take(20)
        .collect();
    let began = world.now;
    let (mut changed, mut slowest) = (0, Duration::ZERO);
    while copies(&world, 2) < N {
        let tuple = protected[changed % protected.len()];
        let at = world.now;
        world.change(tuple);
        let mark = world.open[&tuple].mark;
        let arrived =
            |w: &World<'_>| w.hosts[&2].kernel.get(&tuple).is_some_and(|c| c.state.mark == mark);
        world.run_until(SECOND, "the change is at the backup", |w| {
            for shard in &w.hosts[&1].shards {
                let flying = shard.exposure() - shard.waiting();
                assert!(flying <= AHEAD, "{flying} stand before a live change");
            }
            arrived(w)
        });
        slowest = slowest.max(world.now.since(at));
        changed += 1;
    }
    let took = world.now.since(began);
    println!(
        "{N} connections in {took:?} of simulated time; {changed} live changes, the slowest took {slowest:?}"
    );
    assert!(changed > 3 && slowest <= ms(5), "{changed} changes, slowest {slowest:?}");
    assert!(took < ms(200), "a sync keeps its pace: {took:?}");
    let delays = Counters::new(world.hosts[&1].memory[0].counters).delays();
    assert!(
        delay_percentile(&delays, 1.0).is_some_and(|us| us < 10_000),
        "nothing stood in a queue for long"
    );
    run_until_ready(&mut world, 2, SECOND);
    world.run_until(SECOND, "two copies", |w| w.is_quiet());
    world.check();
}

/// Traffic seed 1550001515: a process that went on with its table took a copy, and its end, before
/// it had read what its kernel had. The entry that was written and deleted was that of the next
/// connection from that port, which had begun while nobody listened.
#[test]
fn no_copy_is_taken_before_the_source_was_read() {
    let memories = memories(2);
    let mut world = World::new(1, &memories);
    (1..=2).for_each(|member| world.start(member, 1, 100));
    let set_read = |world: &mut World<'_>, is_read| {
        let host = world.hosts.get_mut(&2).expect("it was started");
        host.shards.iter_mut().for_each(|shard| shard.set_source_read(is_read));
    };
    set_read(&mut world, false);
    world.run_until(SECOND * 2, "they hear each other", |w| {
        (1..=2).all(|member| stage(w, member) == Stage::Ready)
    });
    let tuple = world.open_at(1);
    world.run_for(HOLD * 3);
    assert_eq!(world.copies_of(&tuple).len(), 1, "only the active has it");
    assert_eq!(world.hosts[&1].shards[0].exposure(), 1);
    set_read(&mut world, true);
    world.run_until(SECOND, "it is copied", |w| w.copies_of(&tuple).len() == 2);
    world.run_until(SECOND, "that was acknowledged", |w| w.hosts[&1].shards[0].exposure() == 0);
}
