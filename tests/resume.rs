//! A member's process is killed and started again over the memory that it left behind: without
//! sockets, in simulated time. With the feature `mutations` it is killed in the middle of stores,
//! too.

#[allow(dead_code)]
#[path = "protocol/world.rs"]
mod world;

use std::collections::HashMap;

use hypersync::ccp::bytes::Reader;
use hypersync::ccp::header::{Header, OPCODE_SYNC};
use hypersync::ccp::message::Message;
use hypersync::ccp::sync::SyncHeader;
use hypersync::conn::{Coordinate, Kind, MemberId, Tuple};
use hypersync::counters::Counter;
use hypersync::source::CommitMode;
#[cfg(feature = "mutations")]
use hypersync::sync::stream::{Durable, stream_index};
use world::story::{group, ms};
use world::{Network, World, memories};

fn churn(world: &mut World<'_>, steps: u32, owners: &[MemberId]) {
    for _ in 0..steps {
        let owner = owners[world.rng.below(owners.len() as u64) as usize];
        if world.hosts[&owner].running {
            match world.rng.below(10) {
                0..4 => drop(world.open_at(owner)),
                4..8 => {
                    let tuple =
                        world.any_open().filter(|t| world.hosts[&world.open[t].owner].running);
                    if let Some(tuple) = tuple {
                        world.change(tuple);
                    }
                }
                _ => {
                    let tuple =
                        world.any_open().filter(|t| world.hosts[&world.open[t].owner].running);
                    if let Some(tuple) = tuple {
                        world.close(tuple);
                    }
                }
            }
        }
        world.step();
    }
}

fn places(world: &World<'_>, member: MemberId) -> HashMap<Tuple, (Kind, Coordinate, Coordinate)> {
    let mut places = HashMap::new();
    for shard in &world.hosts[&member].shards {
        for slot in 0..shard.table().capacity() {
            let line = shard.table().line(slot);
            if matches!(line.kind(), Kind::Active | Kind::Backup) {
                let tuple = shard.table().tuples(slot).0;
                places.insert(tuple, (line.kind(), shard.coordinate(slot), line.peer()));
            }
        }
    }
    places
}

/// What the killed member's users did meanwhile its kernel tells by a dump.
fn dump(world: &mut World<'_>, member: MemberId) {
    let open: Vec<Tuple> =
        world.open.iter().filter(|(_, k)| k.owner == member).map(|(t, _)| *t).collect();
    for tuple in open {
        world.change(tuple);
    }
}

#[test]
fn back_within_the_dead_time_everything_stands_where_it_stood() {
    let memories = memories(8);
    let mut world = group(1, &memories, 2, &[100, 100]);
    world.network = Network { loss: 5, repeats: 5, late: 5, ..Network::default() };
    churn(&mut world, 2000, &[1, 2]);
    world.run_for(ms(100));
    let before: Vec<_> =
        [1, 2].map(|m| (places(&world, m), world.counter(m, Counter::StreamsLost))).into();
    let news = world.counter(1, Counter::DeltasNew) + world.counter(2, Counter::DeltasNew);
    world.kill(1);
    world.run_for(ms(20));
    world.resume(1);
    for member in [1, 2] {
        assert!(
            places(&world, member) == before[member as usize - 1].0,
            "places of member {member} moved"
        );
    }
    dump(&mut world, 1);
    world.run_until(ms(3000), "everything agrees again", |w| w.is_quiet());
    world.run_for(ms(200));
    world.check();
    assert_eq!(world.counter(1, Counter::StreamsLost), 0, "{}", world.describe());
    assert_eq!(world.counter(2, Counter::StreamsLost), 0, "{}", world.describe());
    assert_eq!(world.counter(2, Counter::MembersDied), 0);
    let news = world.counter(1, Counter::DeltasNew) + world.counter(2, Counter::DeltasNew) - news;
    let held = before[0].0.len() as u64;
    assert!(news < held / 4, "{news} whole connections were sent again of {held}");
    churn(&mut world, 1000, &[1, 2]);
    world.network = Network::default();
    world.run_until(ms(3000), "everything agrees again", |w| w.is_quiet());
    world.run_for(ms(200));
    world.check();
}

/// Seed 40000226: the other member came back with fewer shards, and again with more. What the
/// history holds of the stream that did not exist in between is not of its present session.
#[test]
fn numbers_of_a_stream_that_was_forgotten_are_not_taken_for_those_of_its_next_session() {
    let memories = memories(7);
    let mut world = World::new(1, &memories);
    world.start(1, 2, 100);
    world.start(2, 2, 100);
    world.run_for(ms(150));
    churn(&mut world, 600, &[1]);
    world.run_for(ms(200));
    for shards in [1, 2] {
        world.kill(2);
        world.run_for(ms(300));
        world.start(2, shards, 100);
        world.run_for(ms(600));
    }
    // Numbers that were used before, and none of them acknowledged.
    world.cut.push((2, 1));
    churn(&mut world, 40, &[1]);
    world.kill(1);
    world.resume(1);
    world.cut.clear();
    dump(&mut world, 1);
    world.run_until(ms(6000), "everything agrees again", |w| w.is_quiet());
    world.run_for(ms(1500));
    world.run_until(ms(6000), "everything agrees again", |w| w.is_quiet());
    world.check();
}

/// Seed 60002361: "my kernel refuses it" is lost on the way, "now it has it" arrives, and the
/// active is killed. When it is back the first of the two comes once more.
#[test]
fn an_old_decline_that_comes_after_a_restart_is_not_believed_for_ever() {
    let memories = memories(2);
    let mut world = group(1, &memories, 1, &[100, 100]);
    world.host(2).full = true;
    let tuple = world.open_at(1);
    let declined = |world: &mut World<'_>, fault: bool| {
        let end = world.now.after(ms(200));
        while !end.reached(world.now) {
            world.sent = Some(Vec::new());
            world.step();
            let sent = world.sent.take().expect("it is watched");
            if sent.iter().any(|datagram| declines(&datagram.bytes) == Some(fault)) {
                return;
            }
        }
        panic!("nothing was declined, {}", world.describe());
    };
    declined(&mut world, true);
    let now = world.now;
    world.forget_mail_of(2, now);
    world.host(2).full = false;
    world.change(tuple);
    declined(&mut world, false);
    let received = world.counter(1, Counter::DatagramsReceived);
    world.run_until(ms(1), "that arrives", |w| w.counter(1, Counter::DatagramsReceived) > received);
    assert_eq!(world.counter(1, Counter::DeclinedByPeer), 0, "the first has not come yet");
    world.kill(1);
    world.run_for(ms(1));
    world.resume(1);
    world.run_until(ms(500), "the first has come", |w| w.counter(1, Counter::DeclinedByPeer) > 0);
    world.run_until(ms(500), "it is not believed any more", |w| {
        w.counter(1, Counter::Declined) == 0
    });
}

/// Seed 81007074: the backup has said that its kernel refuses a copy, and is killed when the kernel
/// has just taken it. The process that goes on finds the entry as it should be, and does not know
/// what was said of it.
#[test]
fn what_a_backup_declined_before_it_was_killed_is_told_again_when_its_kernel_has_it() {
    let memories = memories(2);
    let mut world = group(1, &memories, 1, &[100, 100]);
    world.host(2).full = true;
    world.open_at(1);
    world.run_until(ms(200), "it is declined", |w| w.counter(1, Counter::Declined) == 1);
    world.host(2).full = false;
    world.run_until(ms(1500), "its kernel has it", |w| w.hosts[&2].kernel.len() == 1);
    let now = world.now;
    world.forget_mail_of(2, now);
    world.kill(2);
    world.run_for(ms(5));
    world.resume(2);
    world.run_until(ms(500), "1 knows", |w| w.counter(1, Counter::Declined) == 0);
}

/// Whether a datagram tells of a copy that the kernel does not take (`true`), or takes after all.
fn declines(bytes: &[u8]) -> Option<bool> {
    let mut r = Reader::new(bytes);
    let header = Header::decode(&mut r, 7).ok().filter(|header| header.opcode == OPCODE_SYNC)?;
    let _ = (header, SyncHeader::decode(&mut r).ok()?);
    while let Ok(Some(message)) = Message::decode(&mut r) {
        if let Message::Decline { fault, .. } = message {
            return Some(fault.is_some());
        }
    }
    None
}

/// Killed after each of so many stores, in traffic, and back.
#[cfg(feature = "mutations")]
#[test]
fn killed_in_the_middle_of_any_store_it_comes_back_right() {
    let mut killed = 0;
    for n in 0..150u64 {
        let memories = memories(4);
        let mut world = group(n, &memories, 1, &[100, 100]);
        world.network = Network { loss: 3, late: 5, ..Network::default() };
        churn(&mut world, 300, &[1, 2]);
        world.host(1).doomed = Some(n * 17);
        churn(&mut world, 400, &[1, 2]);
        world.host(1).doomed = None;
        match world.hosts[&1].running {
            true => world.kill(1),
            false => killed += 1,
        }
        world.run_for(ms([0, 20, 120, 700][n as usize % 4]));
        world.resume(1);
        // What the source was telling when the process was killed, it tells again.
        dump(&mut world, 1);
        let closed = world.closed.clone();
        for tuple in closed {
            world.tell(1, &hypersync::source::SourceEvent::gone(tuple));
        }
        churn(&mut world, 200, &[1, 2]);
        world.network = Network::default();
        world.run_until(ms(6000), "everything agrees again", |w| w.is_quiet());
        world.run_for(ms(1500));
        world.run_until(ms(6000), "everything agrees again", |w| w.is_quiet());
        world.check();
    }
    assert!(killed > 100, "only {killed} were killed in the middle of something");
}

#[cfg(feature = "mutations")]
fn settle(world: &mut World<'_>) {
    world.network = Network::default();
    for _ in 0..2 {
        world.run_until(ms(6000), "everything agrees again", |w| w.is_quiet());
        world.run_for(ms(1500));
    }
    world.check();
}

/// A datagram that was in the history and not yet counted as sent must not be there twice.
#[cfg(feature = "mutations")]
#[test]
fn killed_twice_between_any_two_stores_the_history_still_adds_up() {
    for n in 0..300u64 {
        let memories = memories(4);
        let mut world = group(1, &memories, 1, &[100, 100]);
        churn(&mut world, 300, &[1, 2]);
        world.host(1).doomed = Some(n);
        churn(&mut world, 100, &[1, 2]);
        assert!(!world.hosts[&1].running);
        world.resume(1);
        // It sends again, and hears no ack before it is killed once more.
        world.run_until(ms(500), "it hears the other", |w| {
            w.hosts[&1].group.view().members[2].status.is_alive()
        });
        world.cut.push((2, 1));
        dump(&mut world, 1);
        world.run_for(ms(5));
        world.kill(1);
        world.resume(1);
        world.cut.clear();
        world.read_kernel(1);
        settle(&mut world);
    }
}

/// What is lent stands in the history before the slots say so and before it is counted: if that
/// datagram is given up when the process is back, no more is counted off than was counted.
#[cfg(feature = "mutations")]
#[test]
fn killed_while_it_lends_its_first_slots_it_counts_them_right() {
    let mut killed = 0;
    for n in 0..300u64 {
        let memories = memories(4);
        let mut world = group(1, &memories, 1, &[100, 100]);
        world.host(2).doomed = Some(n);
        world.open_at(1); // For its copy 1 asks 2 for slots.
        world.run_for(ms(60));
        world.host(2).doomed = None;
        match world.hosts[&2].running {
            true => world.kill(2),
            false => killed += 1,
        }
        world.resume(2);
        settle(&mut world);
    }
    assert!(killed > 100, "only {killed} were killed in the middle of something");
}

/// A start that is killed leaves behind what the next one can take up.
#[cfg(feature = "mutations")]
#[test]
fn killed_while_it_takes_its_table_up_it_takes_it_up_again() {
    let mut killed = 0;
    for n in 0..120u64 {
        let memories = memories(4);
        let mut world = group(n, &memories, 1, &[100, 100]);
        world.network = Network { loss: 3, late: 5, ..Network::default() };
        churn(&mut world, 300, &[1, 2]);
        world.host(1).doomed = Some(n * 31);
        churn(&mut world, 400, &[1, 2]);
        world.host(1).doomed = Some(n * n % 997);
        if world.hosts[&1].running {
            world.kill(1);
        }
        world.resume(1);
        killed += world.hosts[&1].doomed.is_none() as u32;
        world.host(1).doomed = None;
        dump(&mut world, 1);
        for tuple in world.closed.clone() {
            world.tell(1, &hypersync::source::SourceEvent::gone(tuple));
        }
        settle(&mut world);
    }
    assert!(killed > 10, "only {killed} were killed again");
}

/// Not even a connection that was changing its backup at that moment is taken for somebody else's.
#[cfg(feature = "mutations")]
#[test]
fn killed_while_backups_move_it_keeps_every_connection() {
    for n in 0..400u64 {
        let memories = memories(6);
        let mut world = group(3, &memories, 1, &[100, 100]);
        for _ in 0..20 {
            world.open_at(1);
        }
        world.run_for(ms(200));
        world.start(3, 1, 200);
        world.run_until(ms(2000), "the better backup is there", |w| {
            w.hosts[&1].group.view().members[3].status.is_able()
        });
        world.host(1).doomed = Some(n * 7);
        world.run_for(ms(100));
        if world.hosts[&1].running {
            world.host(1).doomed = None;
            assert!(n > 20);
            break;
        }
        world.resume(1);
        world.read_kernel(1);
        world.run_until(ms(6000), "everything agrees again", |w| w.is_quiet());
        world.run_for(ms(1500));
        for tuple in world.open.keys() {
            assert!(world.copies().contains_key(tuple), "{n}: {tuple} is nowhere");
        }
        settle(&mut world);
    }
}

/// What was taken over from a table that is no more is nobody's to ask back, also if the start of
/// its member and the end of this process fall together.
#[test]
fn killed_while_it_forgets_a_former_table_it_keeps_what_it_took_over() {
    for steps in 0..160 {
        let memories = memories(4);
        let mut world = group(4, &memories, 1, &[100, 100]);
        for _ in 0..10 {
            world.open_at(2);
        }
        world.run_for(ms(200));
        world.kill(2);
        world.run_for(ms(500));
        world.start(2, 1, 100);
        for _ in 0..steps {
            world.step();
        }
        world.kill(1);
        world.resume(1);
        world.run_until(ms(6000), "everything agrees again", |w| w.is_quiet());
        world.run_for(ms(1500));
        let copies = world.copies();
        for tuple in world.open.keys() {
            assert!(copies.contains_key(tuple), "after {steps} steps: {tuple} is nowhere");
        }
    }
}

/// Copies of a member that is dead are written to the kernel, whenever this process ends meanwhile.
#[test]
fn killed_while_it_takes_over_its_kernel_gets_every_entry() {
    for steps in 0..40 {
        let memories = memories(4);
        let mut world = World::new(5, &memories);
        world.commit = CommitMode::Takeover;
        world.start(1, 1, 100);
        world.start(2, 1, 100);
        world.run_for(ms(150));
        for _ in 0..10 {
            world.open_at(2);
        }
        world.run_for(ms(200));
        world.host(1).stalled = true;
        world.kill(2);
        world.run_for(ms(40 + 2 * steps));
        world.kill(1);
        world.resume(1);
        world.host(1).stalled = false;
        world.run_for(ms(1000));
        for tuple in world.open.keys() {
            let entry = world.hosts[&1].kernel.get(tuple);
            assert!(entry.is_some(), "after {steps} times 2 ms: {tuple} is not in the kernel");
        }
    }
}

/// Every slot that is lent is one that its lessee can still fill, and the streams go on, whenever
/// this process ends while the other begins a new session.
#[cfg(feature = "mutations")]
#[test]
fn killed_while_the_other_begins_a_new_session_nothing_lent_is_lost() {
    for n in 0..140u64 {
        let memories = memories(4);
        let mut world = group(6, &memories, 1, &[100, 100]);
        churn(&mut world, 400, &[1, 2]);
        world.run_for(ms(100));
        world.cut.push((2, 1));
        world.run_for(ms(600));
        world.cut.clear();
        let peer_session = |world: &World<'_>| {
            Durable(&world.hosts[&1].memory[0].streams[stream_index(2, 0)]).peer_session()
        };
        let session = peer_session(&world);
        match n {
            0..40 => {
                world.run_until(ms(500), "a new session", |w| peer_session(w) != session);
                (0..n).for_each(|_| world.step());
                world.kill(1);
            }
            _ => {
                let end = (n - 40) * 3;
                world.host(1).doomed = Some(end);
                world.run_for(ms(100));
                world.host(1).doomed = None;
                if world.hosts[&1].running {
                    world.kill(1);
                }
            }
        }
        world.resume(1);
        world.read_kernel(1);
        settle(&mut world);
        let session = peer_session(&world);
        let table = world.hosts[&1].shards[0].table();
        for slot in 0..table.capacity() {
            let line = table.line(slot);
            assert!(
                line.kind() != Kind::Leased || line.session() == session,
                "{n}: slot {slot} was lent in session {}, now is {session}",
                line.session()
            );
        }
    }
}

/// Two members that took over from each other ask each other, whenever this process ends meanwhile.
#[cfg(feature = "mutations")]
#[test]
fn killed_while_it_takes_over_or_gives_way_there_is_one_active_afterwards() {
    for n in 0..240u64 {
        let memories = memories(6);
        let mut world = World::new(7, &memories);
        for member in 1..=3 {
            world.start(member, 1, 100);
        }
        world.run_for(ms(150));
        churn(&mut world, 300, &[1, 2]);
        world.run_for(ms(100));
        world.cut = vec![(1, 2), (2, 1)];
        if n % 2 == 0 {
            world.run_for(ms(200));
            world.host(1).doomed = Some(n * 2);
        }
        world.run_for(ms(400));
        // Some end at the others meanwhile.
        for _ in 0..4 {
            let tuple = world.any_open().filter(|t| world.open[t].owner == 2);
            tuple.into_iter().for_each(|t| world.close(t));
        }
        world.cut.clear();
        if n % 2 == 1 {
            world.host(1).doomed = Some(n * 6);
            world.run_for(ms(300));
        }
        world.host(1).doomed = None;
        if world.hosts[&1].running {
            world.kill(1);
        }
        world.resume(1);
        world.read_kernel(1);
        settle(&mut world);
    }
}
