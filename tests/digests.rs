//! Digests under hostile hands: what they find, what they repair, and what they must not do
//! meanwhile.

#[allow(dead_code)]
#[path = "protocol/world.rs"]
mod world;

use hypersync::ccp::bytes::Writer;
use hypersync::ccp::header::{Header, OPCODE_SYNC};
use hypersync::ccp::message::{Message, Place};
use hypersync::ccp::sync::SyncHeader;
use hypersync::conn::{Coordinate, Kind, MemberId, Stamp};
use hypersync::counters::Counter;
use hypersync::memory::OwnedMemory;
use hypersync::seq::Seq;
use hypersync::sync::Finding;
use hypersync::sync::stream::{Durable, stream_index};
use world::story::{exposure, group, ms};
use world::{World, address, memories};

/// So many connections of a member, at rest.
fn filled<'m>(seed: u64, memories: &'m [OwnedMemory], connections: u32) -> World<'m> {
    let mut world = group(seed, memories, 1, &[100, 100]);
    for _ in 0..connections {
        world.open_at(1);
        world.step();
    }
    world.run_for(ms(100));
    world.run_until(ms(3000), "everything is protected", |w| w.is_quiet());
    world
}

fn durable<'m>(world: &World<'m>, at: MemberId, peer: MemberId) -> Durable<'m> {
    Durable(&world.hosts[&at].memory[0].streams[stream_index(peer, 0)])
}

/// A datagram from shard 0 of one member to shard 0 of another, as nobody sent it.
fn inject(world: &mut World<'_>, from: MemberId, to: MemberId, seq: Seq, messages: &[Message<'_>]) {
    let mut bytes = vec![0; 1448];
    let mut w = Writer::new(&mut bytes);
    let header = Header { group: 7, opcode: OPCODE_SYNC, from, to: Some(to), to_shard: 0 };
    let sync = SyncHeader {
        from_shard: 0,
        from_table: world.hosts[&from].table_id,
        to_table: world.hosts[&to].table_id,
        session: durable(world, from, to).session(),
        seq,
    };
    sync.encode(&header, &mut w);
    messages.iter().for_each(|message| message.encode(&mut w));
    let len = w.len();
    bytes.truncate(len);
    world.inject(to, address(from), 0, &bytes);
}

fn findings(world: &mut World<'_>, member: MemberId) -> Vec<Finding> {
    let shard = &mut world.host(member).shards[0];
    let all = std::iter::from_fn(|| shard.poll_finding());
    all.filter(|(_, expected)| !expected).map(|(finding, _)| finding).collect()
}

/// A copy at a member and where its active has the connection.
fn copies(world: &World<'_>, member: MemberId) -> Vec<(Coordinate, Coordinate)> {
    let shard = &world.hosts[&member].shards[0];
    let slots =
        (0..shard.table().capacity()).filter(|slot| shard.table().kind(*slot) == Kind::Backup);
    slots.map(|slot| (shard.coordinate(slot), shard.table().line(slot).peer())).collect()
}

/// What 1 says in a comparison of everything.
fn items(world: &World<'_>, round: u8) -> Vec<Message<'static>> {
    let digest = |here: Coordinate| world.hosts[&2].shards[0].table().digest(here.slot());
    let item = |(here, active)| Message::Item {
        target: Place::of(here),
        own: Place::of(active),
        hash: digest(here),
        round,
    };
    copies(world, 2).into_iter().map(item).collect()
}

#[test]
fn closes_that_wait_for_a_silent_member_hide_nobody_who_is_exposed() {
    let memories = memories(2);
    let mut world = filled(1, &memories, 20);
    world.kill(2);
    world.run_for(ms(100));
    assert_eq!(exposure(&world, 1), 20, "{}", world.describe());
    let open: Vec<_> = world.open.keys().copied().take(8).collect();
    open.into_iter().for_each(|tuple| world.close(tuple));
    world.run_for(ms(2));
    assert_eq!(exposure(&world, 1), 12, "{}", world.describe());
    world.run_for(ms(500));
    assert_eq!(exposure(&world, 1), 12, "{}", world.describe());
}

/// The next datagram from 1 to 2 is acknowledged and never applied: 2 believes to have had it.
fn swallow_next(world: &mut World<'_>) {
    let next = durable(world, 1, 2).sent().next();
    inject(world, 1, 2, next, &[]);
}

#[cfg(feature = "mutations")]
#[test]
fn a_state_that_differs_under_the_same_stamp_is_repaired() {
    use hypersync::sync::mutation::{Mutation, set};
    let memories = memories(2);
    let mut world = filled(2, &memories, 10);
    let tuple = *world.open.keys().next().unwrap();
    set(Some(Mutation::UpdateIncomplete));
    world.change(tuple);
    world.run_for(ms(20));
    set(None);
    world.run_for(ms(2000));
    assert!(!findings(&mut world, 1).is_empty(), "it was found");
    world.check();
}

#[test]
fn what_was_not_verified_before_a_silence_is_not_verified_by_it() {
    let memories = memories(2);
    let mut world = filled(3, &memories, 20);
    world.cut = vec![(1, 2), (2, 1)];
    world.run_for(ms(500)); // Lost.
    world.cut.clear();
    let down = |w: &World<'_>, m: MemberId, of: MemberId| {
        !w.hosts[&m].group.view().members[of as usize].status.is_alive()
    };
    world.run_until(ms(100), "they hear each other", |w| !down(w, 1, 2) && !down(w, 2, 1));
    world.cut = vec![(1, 2), (2, 1)];
    world.run_until(ms(200), "they are silent again", |w| down(w, 1, 2) && down(w, 2, 1));
    world.cut.clear();
    let compared = world.counter(2, Counter::DigestsCompared);
    world.run_until(ms(100), "they hear each other", |w| !down(w, 1, 2) && !down(w, 2, 1));
    let mut exposed = 0;
    while world.counter(2, Counter::DigestsCompared) == compared {
        exposed = exposure(&world, 1);
        assert!(
            exposed >= 20,
            "only {exposed} exposed before a digest agreed\n{}",
            world.describe()
        );
        world.step();
    }
    assert!(exposed > 0);
    world.run_until(ms(2000), "they agree", |w| w.is_quiet());
}

#[test]
fn an_answer_to_a_digest_of_before_verifies_nothing() {
    let memories = memories(2);
    let mut world = filled(4, &memories, 20);
    world.cut = vec![(1, 2), (2, 1)];
    world.run_for(ms(500));
    world.cut.clear();
    let silent = |w: &World<'_>| !w.hosts[&1].group.view().members[2].status.is_alive();
    world.run_until(ms(100), "it is heard", |w| !silent(w));
    assert!(exposure(&world, 1) >= 20);
    let (session, seq) = (durable(&world, 1, 2).session(), durable(&world, 1, 2).sent());
    let sent = world.counter(1, Counter::DigestsSent);
    inject(&mut world, 2, 1, Seq::NONE, &[Message::Differ { session, seq, mask: [0; 4] }]);
    assert_eq!(sent, world.counter(1, Counter::DigestsSent));
    assert!(exposure(&world, 1) >= 20, "verified by an answer to nothing");
}

#[test]
fn a_member_that_says_differ_all_the_time_makes_nobody_walk_all_the_time() {
    let memories = memories(2);
    let mut world = filled(5, &memories, 20);
    let walked = world.counter(1, Counter::SlotsWalked);
    for _ in 0..400 {
        let (session, seq) = (durable(&world, 1, 2).session(), durable(&world, 1, 2).sent());
        inject(
            &mut world,
            2,
            1,
            Seq::NONE,
            &[Message::Differ { session, seq, mask: [u64::MAX; 4] }],
        );
        world.run_for(ms(1));
    }
    let walked = (world.counter(1, Counter::SlotsWalked) - walked) / 2048;
    assert!(walked <= 6, "{walked} walks in 0.4 s, with a digest in each 0.1 s");
}

#[test]
fn a_new_difference_does_not_wait_behind_one_that_stays() {
    let memories = memories(2);
    let mut world = filled(6, &memories, 20);
    // A difference that nothing repairs.
    for _ in 0..100 {
        let (session, seq) = (durable(&world, 1, 2).session(), durable(&world, 1, 2).sent());
        forged_digest(&mut world, session, seq);
        world.step();
    }
    swallow_next(&mut world);
    let tuple = *world.open.keys().next().unwrap();
    world.change(tuple);
    world.run_for(ms(1000));
    world.check();
}

/// 2 is told of a connection in one bucket that nobody has; all others are right.
fn forged_digest(world: &mut World<'_>, session: u16, seq: Seq) {
    let mut bytes = vec![0; 1448];
    let mut w = Writer::new(&mut bytes);
    let header = Header { group: 7, opcode: OPCODE_SYNC, from: 1, to: Some(2), to_shard: 0 };
    let sync = SyncHeader {
        from_shard: 0,
        from_table: world.hosts[&1].table_id,
        to_table: world.hosts[&2].table_id,
        session,
        seq: Seq::NONE,
    };
    sync.encode(&header, &mut w);
    let mut sums = [0; 256];
    for (here, _) in copies(world, 2) {
        sums[here.slot() as usize % 256] ^= world.hosts[&2].shards[0].table().digest(here.slot());
    }
    assert_eq!(sums[200], 0, "no copy lies there");
    sums[200] = 7;
    hypersync::ccp::message::encode_digest(session, seq, false, &sums, &mut w);
    let len = w.len();
    bytes.truncate(len);
    world.inject(2, address(1), 0, &bytes);
}

#[test]
fn an_end_that_overtook_its_items_finds_no_orphans() {
    let memories = memories(2);
    let mut world = filled(7, &memories, 30);
    let second = durable(&world, 1, 2).sent().next().next();
    inject(&mut world, 1, 2, second, &[Message::End { round: 3, mask: [u64::MAX; 4] }]);
    world.run_for(ms(5));
    assert_eq!(findings(&mut world, 2), [], "nothing was named yet, because of a gap");
    assert_eq!(world.counter(2, Counter::CompareOffered), 0);
}

#[test]
fn a_copy_that_came_during_a_comparison_is_no_orphan() {
    let memories = memories(2);
    let mut world = filled(8, &memories, 30);
    let (before, named) = (copies(&world, 2).len(), items(&world, 3));
    world.open_at(1);
    world.run_for(ms(40));
    // 2 asks for a comparison, which 1 does not hear of.
    world.cut = vec![(2, 1)];
    for _ in 0..2 {
        let (session, seq) = (durable(&world, 1, 2).session(), durable(&world, 1, 2).sent());
        forged_digest(&mut world, session, seq);
        world.step();
    }
    assert_eq!(world.counter(2, Counter::DigestsDiffered), 1);
    world.run_until(ms(18), "it came", |w| copies(w, 2).len() > before);
    assert_eq!(copies(&world, 2).len(), before + 1);
    // As the walk at 1 was past its slot by then.
    let sent = durable(&world, 1, 2).sent();
    let mut lines = named;
    lines.push(Message::End { round: 3, mask: [u64::MAX; 4] });
    inject(&mut world, 1, 2, sent.next(), &lines);
    world.run_for(ms(5));
    assert_eq!(findings(&mut world, 2), [], "it came since the comparison was asked for");
    assert_eq!(world.counter(2, Counter::CompareOffered), 0);
}

/// Seed 1714: two comparisons came to their end in one datagram, after a pause in which nothing
/// could be sent, and behind them came a copy. The second end knows as little of it as the first.
#[test]
fn a_copy_that_came_behind_two_ends_is_no_orphan() {
    let memories = memories(2);
    let mut world = filled(9, &memories, 10);
    let everything = [u64::MAX; 4];
    let mut lines = items(&world, 3);
    lines.push(Message::End { round: 3, mask: everything });
    lines.extend(items(&world, 4));
    lines.push(Message::End { round: 4, mask: everything });
    let table = world.hosts[&2].shards[0].table();
    let leased = (0..table.capacity())
        .find(|slot| table.kind(*slot) == Kind::Leased)
        .expect("1 leases some");
    let mut connection = table.connection(copies(&world, 2)[0].0.slot());
    connection.original.sport += 10_000;
    lines.push(Message::New {
        target: Place { slot: leased, generation: table.line(leased).generation() },
        stamp: Stamp { epoch: 0, version: 1 },
        own: Place { slot: 2000, generation: Default::default() },
        previous: None,
        connection,
    });
    let sent = durable(&world, 1, 2).sent();
    inject(&mut world, 1, 2, sent.next(), &lines);
    assert_eq!(copies(&world, 2).len(), 11);
    world.run_for(ms(5));
    assert_eq!(
        findings(&mut world, 2),
        [],
        "its active may have named its copies before it sent that one"
    );
    assert_eq!(world.counter(2, Counter::CompareOffered), 0);
}

/// Seed 1224: what a comparison names arrives late, when the other side has claimed the connection,
/// closed it, and freed its slot. Nothing is wrong, and nothing is said.
#[test]
fn a_copy_that_was_claimed_and_closed_while_it_was_named_does_not_differ() {
    let memories = memories(2);
    let mut world = filled(10, &memories, 3);
    let named = items(&world, 3);
    let tuple = *world.open.keys().next().expect("three are open");
    world.open.get_mut(&tuple).expect("it is open").owner = 2;
    world.change(tuple);
    world.close(tuple);
    world.run_until(ms(50), "it is closed at both", |w| {
        w.counter(1, Counter::ConnectionsActive) == 2
            && w.counter(2, Counter::ConnectionsBackup) == 2
    });
    world.run_for(ms(5));
    let sent = durable(&world, 1, 2).sent();
    inject(&mut world, 1, 2, sent.next(), &named);
    world.run_for(ms(20));
    assert_eq!(findings(&mut world, 2), []);
    assert_eq!(findings(&mut world, 1), []);
    world.check();
}

#[test]
fn a_deaf_member_keeps_nobody_elses_walks_waiting() {
    let memories = memories(3);
    let mut world = World::new(9, &memories);
    (1..=3).for_each(|member| world.start(member, 1, [0, 100, 120, 90][member as usize]));
    world.run_for(ms(150));
    for _ in 0..1200 {
        world.open_at(1);
        world.step();
    }
    world.run_for(ms(100));
    world.run_until(ms(5000), "everything is protected", |w| w.is_quiet());
    let backups = copies(&world, 2).len();
    assert!(backups > 1100, "{backups}");
    // From now on nothing arrives at 2, which is heard. Its last word was that everything differs.
    world.cut = vec![(1, 2)];
    let tuples: Vec<_> = world.open.keys().copied().collect();
    for tuple in &tuples[..600] {
        world.change(*tuple);
        world.step();
    }
    let (session, seq) = (durable(&world, 1, 2).session(), durable(&world, 1, 2).sent());
    inject(&mut world, 2, 1, Seq::NONE, &[Message::Differ { session, seq, mask: [u64::MAX; 4] }]);
    let there = |w: &World<'_>| {
        let table = w.hosts[&1].shards[0].table();
        let lines = (0..table.capacity()).map(|slot| table.line(slot));
        lines.filter(|line| line.kind() == Kind::Active && line.peer().member() == 2).count()
    };
    world.run_until(ms(3000), "nothing of 1 is at 2 any more", |w| there(w) == 0);
}

/// Seed 81000806: a connection was claimed from a member that has not heard of it yet, and moves to
/// a better backup. Until the new one has acknowledged, a comparison with the previous one finds
/// its copy, and that is no fault.
#[test]
fn a_copy_that_waits_for_its_release_is_no_orphan() {
    let memories = memories(4);
    let mut world = World::new(1, &memories);
    world.timing.compare = ms(1);
    for member in 1..=3 {
        world.start(member, 1, 100);
    }
    world.run_for(ms(150));
    let tuple = world.open_at(2);
    world.run_for(ms(100));
    let owner = if copies(&world, 1).is_empty() { 3 } else { 1 };
    let third = 4 - owner;
    world.cut = [1, 3].into_iter().flat_map(|m| [(2, m), (m, 2)]).collect();
    let silent = |w: &World<'_>| !w.hosts[&owner].group.view().members[2].status.is_alive();
    world.run_until(ms(200), "2 is silent", silent);
    world.open.get_mut(&tuple).expect("it is open").owner = owner;
    world.change(tuple);
    world.run_until(ms(50), "the third has a copy", |w| !copies(w, third).is_empty());
    // A better backup, whose acks take their time.
    world.start(4, 1, 200);
    let sent = world.counter(owner, Counter::DeltasNew);
    world.run_until(ms(300), "it moves", |w| w.counter(owner, Counter::DeltasNew) > sent);
    let clogged_until = world.now.after(ms(50));
    world.links.insert((4, owner), world::Link { clogged_until, ..Default::default() });
    let compared = world.counter(owner, Counter::CompareItems);
    world.run_for(ms(50));
    assert_eq!(findings(&mut world, third), [], "{}", world.describe());
    assert!(
        world.counter(owner, Counter::CompareItems) > compared,
        "no comparison fell into the move"
    );
}
