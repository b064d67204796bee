//! Faults that once broke the protocol's promises, each as the shortest story that shows it: walks
//! that wait for each other, conflicts that never end, one-way silence, deaths in the middle of a
//! move.

#[path = "protocol/world.rs"]
#[allow(dead_code)]
mod world;

use hypersync::conn::Kind;
use hypersync::counters::Counter;
use hypersync::group::Event;
use hypersync::limits::ARENA_MIN;
use hypersync::memory::MemorySize;
use hypersync::source::SourceEvent;
use world::story::{SECOND, group, ms, open_hundreds, settle};
use world::{HOLD, Link, Network, World, memories, memories_of};

#[test]
fn more_offers_than_requests_on_both_sides_end() {
    let size = MemorySize::new(16_384, ARENA_MIN);
    let memories = memories_of(4, size);
    let mut world = group(1, &memories, 2, &[100, 100]);
    let tuples = open_hundreds(&mut world, 1, 100, ms(10));
    settle(&mut world, SECOND * 2);
    world.check();
    world.cut = vec![(1, 2), (2, 1)];
    world.run_for(ms(1500));
    for tuple in tuples {
        world.close(tuple);
    }
    world.run_for(ms(50));
    world.cut.clear();
    world.run_for(ms(300));
    world.run_until(SECOND * 5, "quiet", |w| w.is_quiet());
    world.run_for(SECOND);
    world.check();
}

#[test]
fn offers_answered_by_busy_do_not_lease_a_slot_twice() {
    let size = MemorySize::new(16_384, ARENA_MIN);
    let memories = memories_of(4, size);
    let mut world = group(1, &memories, 2, &[100, 100]);
    let tuples = open_hundreds(&mut world, 1, 60, ms(10));
    settle(&mut world, SECOND * 2);
    world.cut = vec![(1, 2), (2, 1)];
    world.run_for(ms(1500));
    for tuple in tuples {
        world.close(tuple);
    }
    world.run_for(ms(50));
    world.cut.clear();
    world.run_for(SECOND * 3);
    world.check();
    // Whatever places came back are used up by these.
    open_hundreds(&mut world, 1, 90, ms(10));
    settle(&mut world, SECOND * 5);
    world.run_for(SECOND * 2);
    println!("refused {}", world.counter(2, Counter::Refused));
    world.check();
}

#[test]
fn a_conflict_with_a_newer_state_elsewhere_ends() {
    let memories = memories(6);
    let mut world = group(2, &memories, 2, &[100, 200, 150]);
    let tuple = world.fresh_tuple();
    world.reopen_at(1, tuple);
    world.reopen_at(2, tuple);
    world.run_for(HOLD + ms(50));
    for _ in 0..3 {
        world.change(tuple); // at 2: its version is the higher one
        world.run_for(ms(5));
    }
    world.run_for(SECOND);
    let refused = world.counter(2, Counter::Refused);
    let leased = world.counter(2, Counter::SlotsLeased);
    assert!(refused < 20 && leased < 1000, "refused {refused}, leased {leased}");
}

#[test]
fn a_held_connection_that_refuses_its_twin_does_not_eat_slots() {
    let memories = memories(4);
    let mut world = group(2, &memories, 2, &[100, 100]);
    let first = world.open_at(1);
    let _ = first;
    settle(&mut world, SECOND);
    let tuple = world.fresh_tuple();
    world.reopen_at(1, tuple);
    world.run_for(HOLD - ms(1));
    world.reopen_at(2, tuple); // held here while member 1 sends it
    world.run_for(HOLD + ms(100));
    let refused = world.counter(2, Counter::Refused);
    let granted = world.counter(2, Counter::LeasesGranted);
    assert!(refused < 5, "refused {refused}, granted {granted}");
}

#[test]
fn one_way_silence_with_grants_outstanding_is_survived() {
    for seed in 0..100 {
        let memories = memories(4);
        let mut world = group(1000 + seed, &memories, 2, &[100, 100]);
        let tuples: Vec<_> = (0..50).map(|_| world.open_at(1)).collect();
        settle(&mut world, SECOND);
        for _ in 0..100 {
            world.open_at(2);
        }
        world.run_for(ms(40));
        world.cut = vec![(1, 2)];
        world.run_for(ms(25));
        for tuple in &tuples {
            world.change(*tuple);
        }
        world.run_for(ms(800));
        world.network.loss = 40;
        world.cut.clear();
        world.run_for(ms(500));
        world.network.loss = 0;
        world.run_for(ms(500));
        world.run_until(SECOND * 3, "quiet", |w| w.is_quiet());
        world.check();
    }
}

#[test]
fn after_one_way_silence_what_the_backup_let_go_is_copied_again() {
    let memories = memories(4);
    let mut world = group(4, &memories, 2, &[100, 100]);
    let tuple = world.open_at(1);
    settle(&mut world, SECOND);
    world.cut = vec![(1, 2)];
    world.run_for(ms(600));
    assert!(world.counter(2, Counter::StreamsLost) > 0);
    // The backup's kernel entry has the normal timeout now, and no traffic: it expires.
    world.tell(2, &SourceEvent::gone(tuple));
    world.run_for(ms(100));
    world.cut.clear();
    world.run_for(ms(500));
    world.run_until(SECOND * 3, "quiet", |w| w.is_quiet());
    world.check();
}

#[test]
fn a_peer_that_does_not_hear_me_is_left_for_another() {
    let memories = memories(6);
    let mut world = group(5, &memories, 2, &[100, 100, 100]);
    let tuples: Vec<_> = (0..50).map(|_| world.open_at(1)).collect();
    settle(&mut world, SECOND);
    world.cut = vec![(1, 2)];
    for tuple in &tuples {
        world.change(*tuple);
    }
    world.run_for(SECOND * 2);
    assert_eq!(world.counter(1, Counter::Exposure), 0, "member 3 could hold them");
}

#[test]
fn traffic_at_a_promoted_copy_outranks_what_the_former_active_forgot() {
    let memories = memories(4);
    let mut world = group(6, &memories, 2, &[100, 100]);
    let tuple = world.open_at(1);
    settle(&mut world, SECOND);
    world.cut = vec![(1, 2), (2, 1)];
    world.run_for(ms(500));
    assert!(world.counter(2, Counter::StreamsLost) > 0);
    // The traffic moved to member 2.
    let known = world.open.get_mut(&tuple).unwrap();
    known.owner = 2;
    world.change(tuple);
    world.run_for(ms(50));
    // The former active's entry expires without traffic.
    world.tell(1, &SourceEvent::gone(tuple));
    world.run_for(ms(50));
    world.cut.clear();
    world.run_for(ms(500));
    world.run_until(SECOND * 3, "quiet", |w| w.is_quiet());
    world.check();
}

#[test]
fn a_death_in_the_middle_of_a_move_leaves_one_active() {
    for seed in 0..100u64 {
        let memories = memories(8);
        let mut world = group(100 + seed, &memories, 2, &[100, 100]);
        let tuples: Vec<_> = (0..100).map(|_| world.open_at(1)).collect();
        settle(&mut world, SECOND);
        world.start(3, 2, 200);
        let seen = |w: &World<'_>| w.counter(1, Counter::DeltasRelease);
        // Up to the moment at which the first releases leave; then a little on.
        world.run_until(SECOND * 2, "moves", |w| w.counter(3, Counter::ConnectionsBackup) > 0);
        world.network.late = 20;
        for _ in 0..seed % 10 {
            world.step();
        }
        let released = seen(&world);
        world.kill(1);
        for tuple in &tuples {
            world.open.get_mut(tuple).unwrap().owner = 3;
        }
        world.run_for(ms(600));
        let refused = world.counter(2, Counter::Refused) + world.counter(3, Counter::Refused);
        assert!(refused < 500, "seed {seed}: {released} released, {refused} refused");
        settle(&mut world, SECOND * 3);
        world.check();
    }
}

/// Member 2 does not hear member 1 and takes its connections over; both have their copies at
/// member 3. Then the one dies whose state is the newer one.
#[test]
fn the_newest_state_survives_at_the_common_backup_of_two_actives() {
    for is_leaving in [false, true] {
        let memories = memories(8);
        let mut world = group(12, &memories, 2, &[100, 100]);
        let tuples: Vec<_> = (0..20).map(|_| world.open_at(1)).collect();
        settle(&mut world, SECOND);
        world.start(3, 2, 100);
        world.run_for(ms(100));
        world.cut = vec![(1, 2)];
        world.run_until(SECOND * 2, "both have their copies at member 3", |w| {
            w.counter(3, Counter::ConnectionsBackup) == 2 * tuples.len() as u64
        });
        for tuple in &tuples {
            world.change(*tuple);
        }
        world.run_for(ms(50));
        match is_leaving {
            true => world.goodbye(1),
            false => world.kill(1),
        }
        for tuple in &tuples {
            world.open.get_mut(tuple).unwrap().owner = 3;
        }
        world.cut.clear();
        world.run_for(ms(500));
        settle(&mut world, SECOND * 3);
        world.check();
    }
}

#[test]
fn who_presumes_and_sees_the_close_closes_the_previous_backup_too() {
    let memories = memories(8);
    let mut world = group(7, &memories, 2, &[100, 100]);
    let tuples: Vec<_> = (0..100).map(|_| world.open_at(1)).collect();
    settle(&mut world, SECOND);
    world.start(3, 2, 200);
    world.run_until(SECOND * 2, "moves", |w| w.counter(3, Counter::ConnectionsBackup) > 0);
    world.kill(1);
    world.run_for(ms(100)); // dead, not yet walked
    let copies = world.copies();
    let mut both = 0;
    for tuple in &tuples {
        let here: Vec<_> = copies[tuple].iter().map(|c| c.member).collect();
        both += (here.len() == 2) as u32;
        let owner = if here.contains(&3) { 3 } else { 2 };
        world.open.get_mut(tuple).unwrap().owner = owner;
        world.close(*tuple);
    }
    world.run_for(SECOND);
    println!("{both} copies were on both");
    world.check();
}

#[test]
fn a_leaving_member_loses_copies_of_promoted_connections_too() {
    let memories = memories(8);
    let mut world = group(8, &memories, 2, &[100, 100, 100, 100]);
    let tuples: Vec<_> = (0..50).map(|_| world.open_at(1)).collect();
    settle(&mut world, SECOND);
    world.kill(1);
    world.run_for(ms(100));
    for tuple in &tuples {
        world.open.get_mut(tuple).unwrap().owner = 2;
    }
    settle(&mut world, SECOND);
    let backup = (3..=4).find(|m| world.counter(*m, Counter::ConnectionsBackup) > 0).unwrap();
    world.host(backup).leaving = true;
    world.run_for(SECOND * 2);
    assert_eq!(world.counter(backup, Counter::ConnectionsBackup), 0, "it is leaving");
}

#[test]
fn a_previous_backup_that_no_group_can_have_is_refused() {
    use hypersync::ccp::bytes::Writer;
    use hypersync::ccp::header::{Header, OPCODE_SYNC};
    use hypersync::ccp::message::{Message, Place};
    use hypersync::ccp::sync::SyncHeader;
    use hypersync::conn::{Coordinate, Extra, State};
    let memories = memories(4);
    let mut world = group(9, &memories, 2, &[100, 100]);
    let tuple = world.open_at(1);
    settle(&mut world, SECOND);
    let copy =
        world.copies()[&tuple].iter().find(|c| c.kind == Kind::Backup).map(|c| c.place).unwrap();
    let copy = Coordinate::from_raw(copy);
    let now = world.now;
    let (from_table, from_shard) = (world.hosts[&1].group.view().members[2].table_id, copy.shard());
    let _ = from_table;
    let own_table = world.hosts[&2].group.view().members[1].table_id;
    let to_table = world.hosts[&1].group.view().members[2].table_id;
    let mut bytes = [0; 256];
    let mut w = Writer::new(&mut bytes);
    let header =
        Header { group: 7, opcode: OPCODE_SYNC, from: 1, to: Some(2), to_shard: copy.shard() };
    let seq = hypersync::seq::Seq::NONE.plus(2);
    SyncHeader { from_shard, from_table: own_table, to_table, session: 1, seq }
        .encode(&header, &mut w);
    let stamp = hypersync::conn::Stamp { epoch: 0, version: 900 };
    Message::Update {
        target: Place::of(copy),
        stamp,
        groups: 8,
        previous: Some(Coordinate::from_raw(u64::MAX)),
        state: State::default(),
        extra: Extra::NONE,
    }
    .encode(&mut w);
    let len = w.len();
    let shard = copy.shard() as usize;
    world.host(2).shards[shard].handle_datagram(
        now,
        Some("10.9.0.1".parse().unwrap()),
        &bytes[..len],
    );
    world.kill(1);
    world.run_for(SECOND);
}

#[test]
fn a_pair_with_many_connections_survives_the_death_of_one() {
    let size = MemorySize::new(32_768, ARENA_MIN * 4);
    let memories = memories_of(3, size);
    let mut world = group(1, &memories, 1, &[100, 100]);
    open_hundreds(&mut world, 1, 100, ms(10));
    settle(&mut world, SECOND * 3);
    world.kill(2);
    world.run_for(SECOND);
    world.start(2, 1, 100);
    world.run_for(ms(500));
    settle(&mut world, SECOND * 10);
    world.check();
}

/// The same, seen by the survivor: more copies than WALK_AHEAD change roles.
#[test]
fn the_survivor_of_a_pair_promotes_all_and_takes_the_other_back() {
    let size = MemorySize::new(32_768, ARENA_MIN * 4);
    let memories = memories_of(3, size);
    let mut world = group(1, &memories, 1, &[100, 100]);
    open_hundreds(&mut world, 1, 100, ms(10));
    settle(&mut world, SECOND * 3);
    world.kill(1);
    for known in world.open.values_mut() {
        known.owner = 2;
    }
    world.run_for(SECOND);
    assert_eq!(world.counter(2, Counter::StreamsLost), 1);
    world.start(1, 1, 100);
    world.run_for(ms(500));
    settle(&mut world, SECOND * 10);
    world.check();
}

/// Two members presume the same connection and pick the same third as backup: nobody resolves it.
#[test]
fn a_silent_peer_does_not_spin_the_loop() {
    let memories = memories(2);
    let mut world = group(1, &memories, 1, &[100, 100]);
    let t = world.open_at(1);
    settle(&mut world, SECOND);
    world.kill(2);
    world.change(t);
    world.run_for(ms(120));
    let now = world.now;
    assert!(
        world.host(1).shards[0].poll_at() > now,
        "poll_at {:?} now {now:?}",
        world.host(1).shards[0].poll_at()
    );
}

/// A third member also takes a conflicting second copy when two members opened the same tuple.
#[test]
fn an_oversized_datagram_is_refused() {
    use hypersync::ccp::bytes::Writer;
    use hypersync::ccp::header::{Header, OPCODE_SYNC};
    use hypersync::ccp::message::{Message, Place};
    use hypersync::ccp::sync::SyncHeader;
    use hypersync::conn::{Coordinate, Extra, Stamp, State};
    let memories = memories(2);
    let mut world = group(9, &memories, 1, &[100, 100]);
    let tuple = world.open_at(1);
    settle(&mut world, SECOND);
    let copy =
        world.copies()[&tuple].iter().find(|c| c.kind == Kind::Backup).map(|c| c.place).unwrap();
    let now = world.now;
    let from_table = world.hosts[&2].group.view().members[1].table_id;
    let to_table = world.hosts[&1].group.view().members[2].table_id;
    for n in 0..3u32 {
        let mut bytes = vec![0; 65_000];
        let mut w = Writer::new(&mut bytes);
        let header = Header { group: 7, opcode: OPCODE_SYNC, from: 1, to: Some(2), to_shard: 0 };
        let seq = hypersync::seq::Seq::NONE.plus(10 + n as u64);
        SyncHeader { from_shard: 0, from_table, to_table, session: 1, seq }.encode(&header, &mut w);
        for i in 0..4000 {
            let stamp = Stamp { epoch: 0, version: 900 + n * 4000 + i };
            Message::Update {
                target: Place::of(Coordinate::from_raw(copy)),
                stamp,
                groups: 8,
                previous: None,
                state: State::default(),
                extra: Extra::NONE,
            }
            .encode(&mut w);
        }
        let len = w.len();
        world.host(2).shards[0].handle_datagram(
            now,
            Some("10.9.0.1".parse().unwrap()),
            &bytes[..len],
        );
        println!("commits {}", world.host(2).shards[0].commits_waiting());
    }
    let room = world.host(2).shards[0].receive_room();
    assert!(room <= 56, "room {room}");
}

#[test]
fn a_close_or_release_that_overtakes_its_claim_counts() {
    for seed in 0..60 {
        let memories = memories(6);
        let mut world = group(300 + seed, &memories, 2, &[100, 100]);
        let tuples: Vec<_> = (0..40).map(|_| world.open_at(1)).collect();
        settle(&mut world, SECOND);
        world.start(3, 2, 200);
        world.run_until(SECOND, "a better backup", |w| {
            w.events.contains(&(2, Event::MemberReady(3)))
        });
        // Traffic moves to member 2 while that moves its copies to member 3; every other one
        // closes.
        for (i, tuple) in tuples.into_iter().enumerate() {
            world.network = Network { loss: 30, late: 50, ..Network::default() };
            if world.hosts[&2].shards.iter().any(|s| s.living_copy(&tuple).is_some()) {
                world.open.get_mut(&tuple).unwrap().owner = 2;
                world.change(tuple);
                for _ in 0..8 {
                    world.step();
                }
                if i % 2 == 0 {
                    world.close(tuple);
                }
            }
            world.run_for(ms(3));
        }
        world.network = Network::default();
        world.run_for(ms(600));
        settle(&mut world, SECOND * 3);
        world.check();
    }
}

#[test]
fn a_pair_cut_apart_under_churn_agrees_again() {
    for (seed, shards) in [(1, [1, 1]), (2, [2, 1]), (3, [2, 2])] {
        let memories = memories_of(4, MemorySize::new(16_384, ARENA_MIN * 4));
        let mut world = World::new(seed, &memories);
        world.start(1, shards[0], 100);
        world.start(2, shards[1], 100);
        world.run_for(ms(100));
        let mut tuples: [Vec<_>; 2] = Default::default();
        for _ in 0..15 {
            for member in [1, 2] {
                tuples[member as usize - 1].extend((0..100).map(|_| world.open_at(member)));
            }
            world.run_for(ms(10));
        }
        settle(&mut world, SECOND * 3);
        world.cut = vec![(1, 2), (2, 1)];
        for n in 0..300 {
            // Two of three are renewed, and more than once each has changed.
            for member in [1u8, 2] {
                let own = &mut tuples[member as usize - 1];
                for i in 0..4 {
                    let at = (n * 7 + i * 389) % own.len();
                    world.close(own[at]);
                    own[at] = world.open_at(member);
                    for j in 0..3 {
                        let len = own.len();
                        world.change(own[(n * 13 + i * 3 + j * 31) % len]);
                    }
                }
            }
            world.run_for(ms(10));
        }
        world.cut.clear();
        world.run_for(ms(300));
        world.run_until(SECOND * 10, "quiet after the cut", |w| w.is_quiet());
        settle(&mut world, SECOND * 3);
        world.check();
    }
}

/// Once the pass ended where one member's window was full, and what was for others waited until
/// that one's acks came.
#[test]
fn a_full_window_towards_one_member_holds_up_no_other() {
    let memories = memories_of(3, MemorySize::new(8192, ARENA_MIN * 8));
    let mut world = World::new(10, &memories);
    world.start(1, 1, 100);
    world.start(3, 1, 100);
    world.run_for(ms(100));
    let at_three = world.open_at(1);
    settle(&mut world, SECOND);
    // Of equals the next number is the first choice: what opens from now on goes to 2.
    world.start(2, 1, 100);
    world.run_for(ms(100));
    let at_two: Vec<_> = (0..2000).map(|_| world.open_at(1)).collect();
    settle(&mut world, SECOND);
    assert_eq!([2, 3].map(|m| world.counter(m, Counter::ConnectionsBackup)), [2000, 1]);
    // For shorter than what makes a member dead.
    let clogged_until = world.now.after(ms(30));
    world.links.insert((2, 1), Link { clogged_until, ..Link::default() });
    while !clogged_until.reached(world.now) {
        at_two.iter().for_each(|tuple| world.change(*tuple));
        world.change(at_three);
        let mark = world.open[&at_three].mark;
        world.run_until(ms(5), "the copy at 3 is up to date", |w| {
            let table = w.hosts[&3].shards[0].table();
            let slot = table.find_original(&at_three).expect("it is there");
            table.connection(slot).state.mark == mark
        });
    }
    assert!(world.counter(1, Counter::WindowFull) > 0, "more than the window holds");
    settle(&mut world, SECOND);
    world.check();
    assert_eq!(world.counter(1, Counter::StreamsLost), 0);
}
