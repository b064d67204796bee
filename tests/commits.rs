//! Commits, as the protocol asks for them: what the kernel refuses, what waits for a takeover, what
//! is written again before it runs out.

#[path = "protocol/world.rs"]
#[allow(dead_code)]
mod world;

use hypersync::conn::{Extra, Kind};
use hypersync::counters::Counter;
use hypersync::limits::ARENA_MIN;
use hypersync::memory::MemorySize;
use hypersync::source::{Commit, CommitMode};
use hypersync::sync::REWRITE_PERIOD;
use world::story::{self, SECOND};
use world::{HOLD, World, memories, memories_of};

const CONNECTIONS: u64 = 100;

/// Members with these priorities; member 1 has connections that are older than the hold time.
fn group<'m>(
    memories: &'m [hypersync::memory::OwnedMemory],
    priorities: &[u8],
    mode: CommitMode,
) -> World<'m> {
    let mut world = World::new(1, memories);
    world.commit = mode;
    story::start(&mut world, 2, priorities);
    world
}

fn open(world: &mut World<'_>) {
    for _ in 0..CONNECTIONS {
        world.open_at(1);
    }
    world.run_for(HOLD + SECOND / 50);
}

/// A pair of which the backup's kernel refuses every copy, and the active knows.
fn all_declined(memories: &[hypersync::memory::OwnedMemory]) -> World<'_> {
    let mut world = group(memories, &[100, 100], CommitMode::Eager);
    world.host(2).full = true;
    open(&mut world);
    world.run_for(SECOND);
    assert_eq!(world.counter(1, Counter::Declined), CONNECTIONS);
    world
}

#[test]
fn a_copy_that_the_kernel_refuses_counts_as_exposed_until_it_is_there() {
    let memories = memories(4);
    let mut world = group(&memories, &[100, 100], CommitMode::Eager);
    world.host(2).full = true;
    open(&mut world);
    world.run_for(SECOND * 3);
    assert_eq!(world.counter(2, Counter::ConnectionsBackup), CONNECTIONS, "the table keeps it");
    assert_eq!(world.counter(1, Counter::Declined), CONNECTIONS);
    assert_eq!(world.counter(1, Counter::Exposure), CONNECTIONS);
    assert!(world.counter(1, Counter::ExposureOldestUs) > 2_000_000);
    assert!(world.host(2).kernel.is_empty());
    // What is closed meanwhile is exposed no more.
    for _ in 0..CONNECTIONS / 2 {
        let tuple = world.any_open().expect("some are open");
        world.close(tuple);
    }
    world.run_for(SECOND / 10);
    assert_eq!(world.counter(1, Counter::Declined), CONNECTIONS / 2);
    world.host(2).full = false;
    world.run_until(SECOND * 5, "the copies are there after all", |w| w.is_quiet());
    assert_eq!(
        (world.counter(1, Counter::Declined), world.counter(2, Counter::CommitMissing)),
        (0, 0)
    );
    world.check();
}

#[test]
fn a_copy_that_one_kernel_refuses_finds_another_member() {
    let memories = memories(6);
    let mut world = group(&memories, &[100, 200, 50], CommitMode::Eager);
    world.host(2).full = true;
    open(&mut world);
    world.run_until(SECOND * 10, "member 3 has all copies", |w| {
        w.is_quiet() && w.counter(3, Counter::ConnectionsBackup) == CONNECTIONS
    });
    assert_eq!(world.counter(2, Counter::ConnectionsBackup), 0, "member 2 was released");
    world.check();
}

#[test]
fn without_room_in_the_kernel_no_slots_are_leased() {
    let memories = memories(6);
    let mut world = group(&memories, &[100, 200, 50], CommitMode::Eager);
    for shard in &mut world.host(2).shards {
        shard.set_kernel_room(false);
    }
    // What was leased before may still be filled.
    let leased = world.counter(2, Counter::SlotsLeased);
    for _ in 0..8 {
        open(&mut world);
    }
    world.run_until(SECOND * 5, "all are protected", |w| w.is_quiet());
    assert!(world.counter(2, Counter::ConnectionsBackup) <= leased);
    assert!(world.counter(3, Counter::ConnectionsBackup) >= 8 * CONNECTIONS - leased);
    world.check();
}

#[test]
fn with_commit_takeover_copies_are_written_when_their_active_dies_and_not_before() {
    let memories = memories(6);
    let mut world = group(&memories, &[100, 200, 50], CommitMode::Takeover);
    open(&mut world);
    world.run_until(SECOND, "copied", |w| w.is_quiet());
    let tuple = world.any_open().expect("some are open");
    world.close(tuple);
    world.run_for(SECOND / 10);
    assert!(world.host(2).kernel.is_empty(), "the active lives");
    world.kill(1);
    world.run_until(SECOND, "the copies are written", |w| {
        let host = &w.hosts[&2];
        host.kernel.len() as u64 == CONNECTIONS - 1
            && !host.shards.iter().any(|s| s.is_taking_over())
    });
    assert_eq!(world.counter(2, Counter::Promotions), 0, "long before they get new backups");
    assert!(world.hosts[&3].kernel.is_empty());
}

#[test]
fn every_copy_is_written_again_before_its_timeout_can_run_out() {
    let memories = memories(4);
    let mut world = group(&memories, &[100, 100], CommitMode::Eager);
    open(&mut world);
    world.run_until(SECOND, "copied", |w| w.is_quiet());
    let mut now = world.now;
    let end = now.after(REWRITE_PERIOD).after(REWRITE_PERIOD / 50);
    let mut written = 0;
    while !end.reached(now) {
        now = now.after(REWRITE_PERIOD / 1000);
        for shard in &mut world.host(2).shards {
            shard.tick(now);
            let mut asked = 0;
            while let Some(commit) = shard.poll_commit(true) {
                assert!(matches!(commit, Commit::Again { .. }));
                asked += 1;
            }
            assert!(asked <= 64, "{asked} at once");
            written += asked;
        }
    }
    assert!((CONNECTIONS..=CONNECTIONS * 3 / 2).contains(&written), "{written} writes");
}

#[test]
fn what_the_kernel_took_while_the_active_was_silent_is_told_when_it_is_back() {
    let memories = memories(4);
    let mut world = all_declined(&memories);
    // They are tried again while nobody hears the other: not for long enough to let go of anything.
    world.host(2).stalled = true;
    world.run_for(SECOND);
    world.cut = vec![(1, 2), (2, 1)];
    world.run_for(world::REPROTECT / 2);
    (world.host(2).stalled, world.host(2).full) = (false, false);
    world.run_for(SECOND / 50);
    assert_eq!(world.hosts[&2].kernel.len() as u64, CONNECTIONS);
    world.cut.clear();
    world.run_until(SECOND * 5, "member 1 knows", |w| w.is_quiet());
    assert_eq!(world.counter(2, Counter::Promotions), 0);
    world.check();
}

/// Seed 993001313: it was said on a link that was cut just then, and the link stayed cut until the
/// member was given up.
#[test]
fn what_was_said_to_a_member_that_was_lost_before_it_heard_is_said_again() {
    let memories = memories(4);
    let mut world = all_declined(&memories);
    world.cut = vec![(2, 1)];
    world.host(2).full = false;
    world.run_until(SECOND * 2, "its kernel has them", |w| {
        w.hosts[&2].kernel.len() as u64 == CONNECTIONS
    });
    world.run_for(SECOND / 20);
    world.cut = vec![(1, 2), (2, 1)];
    world.run_until(SECOND * 5, "each gave up the other", |w| {
        w.counter(1, Counter::StreamsLost) > 0 && w.counter(2, Counter::StreamsLost) > 0
    });
    world.cut.clear();
    world.run_until(SECOND * 5, "member 1 knows", |w| {
        w.is_quiet() && w.counter(1, Counter::Declined) == 0
    });
    world.check();
}

#[test]
fn a_slot_that_heard_declines_of_one_pair_hears_those_of_the_next() {
    let memories = memories_of(3, MemorySize::new(256, ARENA_MIN));
    let mut world = World::new(1, &memories);
    world.start(1, 1, 100);
    world.start(2, 1, 100);
    world.run_for(SECOND / 10);
    world.host(2).full = true;
    open(&mut world);
    world.run_for(SECOND * 20);
    for tuple in world.open.keys().copied().collect::<Vec<_>>() {
        world.close(tuple);
    }
    world.kill(2);
    world.run_for(SECOND * 4);
    // It counts from 1 again. Its connections' copies fill slots of member 1 that heard more
    // before.
    world.start(2, 1, 100);
    world.run_for(SECOND);
    for _ in 0..190 {
        world.open_at(2);
    }
    world.run_until(SECOND * 5, "copied", |w| {
        w.counter(1, Counter::ConnectionsBackup) == 190 && w.is_quiet()
    });
    world.host(2).full = true;
    for tuple in world.open.keys().copied().collect::<Vec<_>>() {
        world.open.get_mut(&tuple).expect("it is open").owner = 1;
        world.change(tuple);
    }
    world.run_for(SECOND / 2);
    assert_eq!(world.counter(2, Counter::CommitMissing), 190);
    assert_eq!(world.counter(1, Counter::Declined), 190);
}

#[test]
fn copies_that_every_kernel_refuses_do_not_wander_without_rest() {
    let memories = memories(6);
    let mut world = group(&memories, &[100, 200, 50], CommitMode::Eager);
    world.host(2).full = true;
    world.host(3).full = true;
    open(&mut world);
    world.run_for(SECOND * 5);
    let sent = world.counter(1, Counter::DeltasNew);
    assert!(sent <= 8 * CONNECTIONS, "{sent} times a connection was sent");
    world.host(2).full = false;
    world.run_until(SECOND * 10, "one takes them", |w| w.is_quiet());
    world.check();
}

#[test]
fn a_slow_kernel_loses_nothing_when_a_member_says_goodbye() {
    let memories = memories(6);
    let mut world = group(&memories, &[100, 200, 50], CommitMode::Takeover);
    open(&mut world);
    world.run_until(SECOND, "copied", |w| w.is_quiet());
    world.host(2).stalled = true;
    world.goodbye(1);
    world.run_for(SECOND);
    assert_eq!(world.counter(2, Counter::Promotions), 0, "first they are written");
    world.host(2).stalled = false;
    world.run_until(SECOND * 5, "written and promoted", |w| {
        w.counter(2, Counter::Promotions) == CONNECTIONS
    });
    assert_eq!(world.hosts[&2].kernel.len() as u64, CONNECTIONS);
}

#[test]
fn with_commit_takeover_a_former_active_removes_what_its_kernel_still_has() {
    let memories = memories(4);
    let mut world = group(&memories, &[100, 100], CommitMode::Takeover);
    open(&mut world);
    world.run_until(SECOND, "copied", |w| w.is_quiet());
    let tuple = world.any_open().expect("some are open");
    let slot_of = |w: &World<'_>| {
        w.copies()[&tuple].iter().find(|c| c.member == 1).map(|c| (c.kind, c.connection))
    };
    let (_, connection) = slot_of(&world).expect("it is there");
    world.host(1).kernel.insert(tuple, connection);
    world.open.get_mut(&tuple).expect("it is open").owner = 2;
    world.change(tuple);
    world.run_for(SECOND / 10);
    assert_eq!(slot_of(&world).map(|(kind, _)| kind), Some(Kind::Backup));
    world.close(tuple);
    world.run_for(SECOND / 10);
    assert!(!world.hosts[&1].kernel.contains_key(&tuple), "it is closed");
}

#[test]
fn a_connection_that_opens_before_the_old_entry_is_removed_keeps_its_entry() {
    let memories = memories(4);
    let mut world = group(&memories, &[100, 100], CommitMode::Eager);
    open(&mut world);
    world.run_until(SECOND, "copied", |w| w.is_quiet());
    let tuple = world.any_open().expect("some are open");
    world.host(2).stalled = true;
    world.close(tuple);
    world.run_for(SECOND / 10);
    world.reopen_at(2, tuple);
    world.host(2).stalled = false;
    world.run_for(SECOND / 100);
    assert!(world.hosts[&2].kernel.contains_key(&tuple));
}

#[test]
fn what_is_tried_again_does_not_keep_datagrams_waiting() {
    let memories = memories_of(4, MemorySize::new(32_768, ARENA_MIN));
    let mut world = World::new(1, &memories);
    world.start(1, 1, 100);
    world.start(2, 1, 100);
    world.run_for(SECOND / 10);
    world.host(2).full = true;
    for _ in 0..100 {
        for _ in 0..100 {
            world.open_at(1);
        }
        world.run_for(SECOND / 100);
    }
    world.run_until(SECOND * 5, "copied", |w| w.counter(2, Counter::CommitMissing) >= 10_000);
    world.host(2).stalled = true;
    world.run_for(SECOND * 2);
    let room = world.hosts[&2].shards[0].receive_room();
    assert!(room > 32, "room for {room} datagrams");
}

/// Member 2 falls silent, or deaf, while member 1 has ever more changes for it.
fn many_changes_for_member_2(fail: impl Fn(&mut World<'_>)) {
    let memories = memories_of(3, MemorySize::new(1 << 17, 16 << 20));
    let mut world = World::new(1, &memories);
    for (member, priority) in [(1, 100), (2, 200), (3, 50)] {
        world.start(member, 1, priority);
    }
    world.run_for(SECOND / 10);
    for _ in 0..100 {
        for _ in 0..100 {
            world.open_at(1);
        }
        world.run_for(SECOND / 100);
    }
    world.run_until(SECOND * 5, "copied", |w| w.is_quiet());
    fail(&mut world);
    let tuples: Vec<_> = world.open.keys().copied().collect();
    for _ in 0..4 {
        for tuple in &tuples {
            world.change(*tuple);
        }
        world.run_for(SECOND / 50);
    }
    world.run_until(SECOND * 10, "member 3 has all copies", |w| {
        w.counter(3, Counter::ConnectionsBackup) >= 10_000 && w.counter(1, Counter::Exposure) == 0
    });
}

#[test]
fn many_changes_for_a_dead_member_do_not_hold_up_its_takeover() {
    many_changes_for_member_2(|world| world.kill(2));
}

#[test]
fn many_changes_for_a_deaf_member_do_not_hold_up_that_it_is_left() {
    many_changes_for_member_2(|world| world.cut = vec![(1, 2)]);
}

#[test]
fn a_closed_copy_gives_its_record_back() {
    let memories = memories(4);
    let mut world = group(&memories, &[100, 100], CommitMode::Eager);
    for _ in 0..8 {
        open(&mut world);
    }
    let tuples: Vec<_> = world.open.keys().copied().collect();
    for tuple in tuples {
        world.close(tuple);
    }
    world.run_for(SECOND / 10);
    for shard in &world.hosts[&2].shards {
        for slot in 0..shard.table().capacity() {
            assert_eq!(shard.table().extra(slot), Extra::NONE, "{:?}", shard.table().kind(slot));
        }
    }
}

#[test]
fn a_connection_taken_over_without_an_entry_gets_it_as_soon_as_the_kernel_takes_it() {
    for mode in [CommitMode::Eager, CommitMode::Takeover] {
        let memories = memories(4);
        let mut world = group(&memories, &[100, 100], mode);
        world.host(2).full = true;
        open(&mut world);
        world.run_for(SECOND / 10);
        world.kill(1);
        world.run_until(SECOND * 3, "taken over", |w| w.counter(2, Counter::StreamsLost) > 0);
        // Not at the moment at which they are tried again.
        world.run_for(SECOND * 7 / 2);
        assert!(world.host(2).kernel.is_empty());
        assert_eq!(world.counter(2, Counter::CommitMissing), CONNECTIONS, "{mode:?}");
        world.host(2).full = false;
        world.run_for(SECOND * 2);
        assert_eq!(world.host(2).kernel.len() as u64, CONNECTIONS, "{mode:?}");
        assert_eq!(world.counter(2, Counter::CommitMissing), 0);
    }
}

#[test]
fn more_connections_taken_over_without_an_entry_than_can_be_tried_again_are_counted() {
    const MORE: u64 = 5000;
    const TRIED: u64 = 4096;
    for mode in [CommitMode::Eager, CommitMode::Takeover] {
        let memories = memories_of(3, MemorySize::new(16_384, ARENA_MIN * 4));
        let mut world = World::new(1, &memories);
        world.commit = mode;
        world.start(1, 1, 100);
        world.start(2, 1, 100);
        world.run_for(SECOND / 10);
        world.host(2).full = true;
        for _ in 0..MORE / 100 {
            for _ in 0..100 {
                world.open_at(1);
            }
            world.run_for(SECOND / 100);
        }
        world.run_until(SECOND * 3, "copied", |w| w.counter(2, Counter::ConnectionsBackup) == MORE);
        world.kill(1);
        world.start(3, 1, 100); // Somebody to turn to, so that they are taken over.
        world.run_until(SECOND * 3, "taken over", |w| w.counter(2, Counter::Promotions) == MORE);
        world.run_for(SECOND);
        assert_eq!(world.counter(2, Counter::CommitOwedFull), MORE - TRIED, "{mode:?}");
        world.host(2).full = false;
        world.run_until(SECOND * 3, "nothing is tried again any more", |w| {
            w.counter(2, Counter::CommitMissing) == 0
        });
        // The others get theirs by their own traffic, or by the feed's sweep, which is not of this
        // world.
        assert_eq!(world.hosts[&2].kernel.len() as u64, TRIED, "{mode:?}");
    }
}
