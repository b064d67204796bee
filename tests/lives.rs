//! Traffic that moves and comes back, ports that are used again, claims that nobody heard of: what
//! the simulator once found, each as the shortest script of steps that shows it.

#[path = "protocol/world.rs"]
#[allow(dead_code)]
mod world;

use hypersync::ccp::bytes::Reader;
use hypersync::ccp::header::{Header, OPCODE_SYNC};
use hypersync::ccp::message::Message;
use hypersync::ccp::sync::SyncHeader;
use hypersync::conn::{Connection, Kind, MemberId, Tuple, shard_of};
use hypersync::counters::Counter;
use hypersync::limits::{ARENA_MIN, SLOTS_MIN};
use hypersync::memory::MemorySize;
use hypersync::source::{CommitMode, End, SourceEvent};
use world::story::{SECOND, group, kind_at, ms};
use world::{HOLD, REPROTECT, World, address, memories, memories_of};

/// A connection of member 1 that is on two members.
fn protected(world: &mut World<'_>) -> Tuple {
    let tuple = world.open_at(1);
    world.run_for(HOLD + ms(10));
    world.run_until(SECOND, "it is on two members", |w| w.is_quiet());
    tuple
}

/// A packet shows up at this member.
fn move_to(world: &mut World<'_>, tuple: Tuple, member: MemberId) {
    world.open.get_mut(&tuple).expect("it is open").owner = member;
    world.change(tuple);
}

fn all_is_well(world: &mut World<'_>) {
    world.run_for(HOLD + ms(10));
    world.run_until(SECOND * 3, "quiet", |w| w.is_quiet());
    world.run_for(SECOND);
    world.check();
}

/// Who of members 2 and 3 is the connection's backup, and who is not.
fn backup_and_other(world: &World<'_>, tuple: &Tuple) -> (MemberId, MemberId) {
    match kind_at(world, 2, tuple) {
        Some(_) => (2, 3),
        None => (3, 2),
    }
}

/// These members do not hear each other until 1 takes the silent one for dead.
fn cut_off(world: &mut World<'_>, silent: MemberId, from: &[MemberId]) {
    world.cut = from.iter().flat_map(|m| [(*m, silent), (silent, *m)]).collect();
    world.run_until(ms(120), "1 takes it for dead", |w| {
        !w.hosts[&1].group.view().members[silent as usize].status.is_alive()
    });
}

/// The backup of 1's connection is silent for a moment, and the connection turns to the other of 2
/// and 3.
fn turn_elsewhere(world: &mut World<'_>, tuple: Tuple, backup: MemberId, from: &[MemberId]) {
    cut_off(world, backup, from);
    world.change(tuple);
    world.run_until(ms(50), "the third has a copy", |w| kind_at(w, 5 - backup, &tuple).is_some());
}

/// Seeds 2504 and 3409: member 1's last change found the copy at 2 closed, so 1 looked for another
/// place, at 2 again, and there the dead life took the place of the living one.
#[test]
fn a_tuple_that_closes_where_it_moved_and_opens_anew_is_not_taken_by_its_past() {
    let memories = memories(2);
    let mut world = group(1, &memories, 1, &[100, 100]);
    let tuple = protected(&mut world);
    world.change(tuple);
    world.run_for(ms(1)); // On its way to 2 ...
    move_to(&mut world, tuple, 2);
    world.close(tuple);
    world.reopen_at(2, tuple); // ... where it has closed and begun anew by then.
    all_is_well(&mut world);
    assert_eq!(kind_at(&world, 2, &tuple), Some(Kind::Active), "it lives where its traffic is");
}

/// Seed 691: a datagram of before the traffic went to 2 and came back arrives late, and is refused.
/// That says nothing about the connection as it is now.
#[test]
fn a_refusal_of_what_was_before_a_claim_does_not_take_the_backup_away() {
    let memories = memories(2);
    let mut world = group(1, &memories, 1, &[100, 100]);
    let tuple = protected(&mut world);
    move_to(&mut world, tuple, 2);
    world.run_until(ms(20), "turned", |w| w.is_quiet());
    // 1 claims it, and its first word is lost on the way.
    world.cut = vec![(1, 2)];
    world.sent = Some(Vec::new());
    move_to(&mut world, tuple, 1);
    world.run_for(ms(2));
    let is_new = |bytes: &[u8]| {
        let mut r = Reader::new(bytes);
        Header::decode(&mut r, 7).is_ok_and(|header| header.opcode == OPCODE_SYNC)
            && SyncHeader::decode(&mut r).is_ok()
            && matches!(Message::decode(&mut r), Ok(Some(Message::New { .. })))
    };
    let sent = world.sent.take().expect("it was watched");
    let lost = sent
        .into_iter()
        .find(|s| (s.from, s.to) == (1, 2) && is_new(&s.bytes))
        .expect("the claim left");
    world.cut.clear();
    // The next one arrives, 2 claims it back, and 1 once more.
    world.change(tuple);
    world.run_until(ms(5), "1 has it", |w| kind_at(w, 2, &tuple) == Some(Kind::Backup));
    move_to(&mut world, tuple, 2);
    world.run_until(ms(5), "2 has it", |w| kind_at(w, 1, &tuple) == Some(Kind::Backup));
    move_to(&mut world, tuple, 1);
    world.inject(2, address(1), 0, &lost.bytes);
    assert_eq!(world.counter(2, Counter::Refused), 1, "it is older than what 2 has");
    for _ in 0..40 {
        world.step();
        assert_eq!(world.counter(1, Counter::Unprotected), 0, "{}", world.describe());
    }
    assert_eq!(world.counter(1, Counter::RefusedByPeer), 0);
    all_is_well(&mut world);
}

/// Seed 3261: 2 claims what 1 has, 1 does not hear of it, and 2 turns to 3. When 1 is back it must
/// learn that.
#[test]
fn a_claim_that_was_not_heard_of_is_told_when_the_former_active_is_back() {
    for closes in [false, true] {
        let memories = memories(3);
        let mut world = group(1, &memories, 1, &[100, 200, 100]);
        let tuple = protected(&mut world);
        world.cut = vec![(1, 2), (2, 1)];
        move_to(&mut world, tuple, 2);
        world.run_until(ms(100), "2 takes 1 for dead", |w| {
            !w.hosts[&2].group.view().members[1].status.is_alive()
        });
        world.change(tuple);
        world.run_until(ms(20), "3 has a copy", |w| kind_at(w, 3, &tuple).is_some());
        assert_eq!(kind_at(&world, 1, &tuple), Some(Kind::Active), "1 knows of nothing");
        if closes {
            world.close(tuple);
        }
        world.run_for(ms(5));
        world.cut.clear();
        all_is_well(&mut world);
    }
}

/// The same with a member that is heard and does not hear: what is claimed from it meanwhile goes
/// to somebody else.
#[test]
fn a_claim_from_a_deaf_member_is_told_when_it_hears_again() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 200, 100]);
    let tuple = protected(&mut world);
    world.cut = vec![(2, 1)];
    move_to(&mut world, tuple, 2);
    world.run_for(REPROTECT + ms(150));
    world.run_until(ms(100), "3 has a copy", |w| kind_at(w, 3, &tuple).is_some());
    world.cut.clear();
    all_is_well(&mut world);
}

/// Seeds 897 and 1103: a backup was silent for a moment, and its connection went elsewhere. What
/// was on its way to it must not make a copy there that nobody counts on.
#[test]
fn what_waited_for_a_silent_backup_does_not_arrive_after_its_connection_has_gone_elsewhere() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 100, 100]);
    let first = protected(&mut world); // Slots are leased now.
    let backup = if kind_at(&world, 2, &first).is_some() { 2 } else { 3 };
    let (other, before) = (5 - backup, world.counter(1, Counter::DeltasNew));
    let tuple = world.open_at(1);
    world.run_for(HOLD - ms(5));
    cut_off(&mut world, backup, &[1]);
    assert_eq!(world.counter(1, Counter::DeltasNew), before + 1, "it is on its way");
    world.change(tuple);
    world.run_until(ms(20), "the third has a copy", |w| kind_at(w, other, &tuple).is_some());
    world.cut.clear();
    let end = world.now.after(SECOND);
    while !end.reached(world.now) {
        world.step();
        assert_eq!(kind_at(&world, backup, &tuple), None, "nobody counts on a copy there");
    }
    all_is_well(&mut world);
}

/// Seed 4370: a backup was silent for a moment, its connection went elsewhere and came back to it,
/// beside the copy of before. Traffic that shows up there claims the newer one.
#[test]
fn a_connection_that_comes_back_to_a_backup_finds_no_older_copy_of_itself() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 100, 100]);
    let tuple = protected(&mut world);
    let (backup, other) = backup_and_other(&world, &tuple);
    turn_elsewhere(&mut world, tuple, backup, &[1]);
    // Now that one is silent as well, as soon as the first is back.
    world.cut = vec![(1, other), (other, 1)];
    world.run_until(ms(120), "1 takes the third for dead", |w| {
        let seen = w.hosts[&1].group.view();
        !seen.members[other as usize].status.is_alive()
            && seen.members[backup as usize].status.is_alive()
    });
    let at_backup = |w: &World<'_>| {
        let found = w.copies().remove(&tuple).unwrap_or_default();
        found
            .into_iter()
            .filter(|c| c.member == backup)
            .map(|c| c.connection.state.mark)
            .collect::<Vec<_>>()
    };
    world.change(tuple);
    let newest = world.open[&tuple].mark;
    world.run_until(ms(50), "it is back", |w| at_backup(w).contains(&newest));
    assert_eq!(at_backup(&world), [newest], "the older copy is gone");
    move_to(&mut world, tuple, backup);
    world.cut.clear();
    all_is_well(&mut world);
}

/// Seed 3923: an active turned to another backup, which its former one did not hear of, and left.
/// Both carry its connection on. The one that knows it better has its backup; the other one gives
/// way when it asks.
#[test]
fn of_two_that_presume_the_one_that_knows_less_gives_way() {
    let memories = memories(4);
    let mut world = group(1, &memories, 1, &[100, 100, 100, 50]);
    let tuple = protected(&mut world);
    let (backup, other) = backup_and_other(&world, &tuple);
    turn_elsewhere(&mut world, tuple, backup, &[1]);
    world.kill(1);
    world.open.get_mut(&tuple).expect("it is open").owner = other;
    world.run_for(REPROTECT + ms(300));
    all_is_well(&mut world);
}

/// Seed 40001054: two carry on the connection of a dead member, and neither sends to the other; but
/// they have a backup in common.
#[test]
fn of_two_that_presume_with_a_common_backup_one_gives_way() {
    let memories = memories(4);
    let mut world = group(1, &memories, 1, &[100, 100, 100]);
    let tuple = protected(&mut world);
    let (backup, other) = backup_and_other(&world, &tuple);
    // Its backup is silent for a moment, and it turns to the other one.
    turn_elsewhere(&mut world, tuple, backup, &[1]);
    // A fourth joins, the best backup for everybody, and 1 dies before it could move there.
    world.start(4, 1, 200);
    world.run_for(ms(30));
    world.kill(1);
    world.cut.clear();
    world.open.get_mut(&tuple).expect("it is open").owner = other;
    world.run_for(REPROTECT + ms(400));
    all_is_well(&mut world);
}

/// Seed 40000843: both took over the very same state, so their common backup cannot know which of
/// them should stay. The first packet at either tells.
#[test]
fn of_two_that_presume_the_same_state_the_first_packet_decides() {
    let memories = memories(5);
    let mut world = group(1, &memories, 1, &[100, 100, 100, 50]);
    let tuple = protected(&mut world);
    let (backup, other) = backup_and_other(&world, &tuple);
    let cut = [1, other].into_iter().flat_map(|a| [backup, 4].map(|b| (a, b)));
    world.cut = cut.flat_map(|(a, b)| [(a, b), (b, a)]).collect();
    world.run_for(REPROTECT + ms(300));
    assert_eq!(kind_at(&world, other, &tuple), Some(Kind::Backup), "1 turned there");
    assert_eq!(kind_at(&world, backup, &tuple), Some(Kind::Active), "it presumes, 4 is its backup");
    world.start(5, 1, 200);
    world.kill(1);
    world.cut.clear();
    world.run_for(REPROTECT + ms(400));
    move_to(&mut world, tuple, other);
    all_is_well(&mut world);
}

/// The same when the dead member is back with an empty table, so that nobody can be asked any more:
/// what was never seen to have traffic still gives way.
#[test]
fn who_took_over_from_a_table_that_is_no_more_still_only_presumes() {
    let memories = memories(4);
    let mut world = group(1, &memories, 1, &[100, 100, 100]);
    let tuple = protected(&mut world);
    let (backup, other) = backup_and_other(&world, &tuple);
    turn_elsewhere(&mut world, tuple, backup, &[1, other]);
    world.kill(1);
    world.open.get_mut(&tuple).expect("it is open").owner = other;
    world.run_for(ms(100));
    world.start(1, 1, 200);
    world.cut.clear();
    world.run_for(REPROTECT + ms(400));
    all_is_well(&mut world);
}

/// 1's connections begin to move to a better backup, 3, and it dies before it has them.
fn lose_the_better_one(world: &mut World<'_>) {
    world.start(3, 1, 200);
    world.cut = vec![(3, 1)];
    world.run_for(ms(30));
    world.cut.clear();
    let before = world.counter(1, Counter::DeltasNew);
    world.run_until(SECOND, "they begin to move", |w| w.counter(1, Counter::DeltasNew) > before);
    world.kill(3);
    world.run_for(REPROTECT + ms(200));
    all_is_well(world);
}

/// Seeds 50000409 and 50000506: connections move to a better backup, it dies before it has them,
/// and nobody has room for another copy. The previous backup, which still has one, is the backup
/// again.
#[test]
fn connections_that_cannot_move_go_back_to_the_backup_that_still_has_them() {
    let memories = memories_of(3, MemorySize::new(SLOTS_MIN, ARENA_MIN));
    let mut world = group(1, &memories, 1, &[100, 100]);
    // As many as 2 lends slots: all but an eighth.
    let n = SLOTS_MIN as u64 * 7 / 8;
    for _ in 0..n {
        world.open_at(1);
        world.run_for(ms(2));
    }
    world.run_for(HOLD + ms(20));
    world.run_until(SECOND, "all are on two members", |w| w.is_quiet());
    assert_eq!(world.counter(2, Counter::ConnectionsBackup), n);
    lose_the_better_one(&mut world);
    assert_eq!(world.counter(2, Counter::ConnectionsBackup), n);
}

/// Seed 70000376: a connection closes at 2 while the first word of it is still on its way to 1,
/// where its tuple opens anew in another translation. What arrives late is the elder life, and must
/// not take the younger one's place.
#[test]
fn a_new_that_is_late_does_not_take_the_place_of_the_next_life() {
    let memories = memories(2);
    let mut world = group(1, &memories, 1, &[100, 100]);
    world.open_at(2);
    world.run_for(HOLD + ms(10));
    world.run_until(SECOND, "slots are leased", |w| w.is_quiet());
    let tuple = world.open_at(2);
    world.run_for(HOLD - ms(2));
    world.cut = vec![(2, 1)];
    world.run_for(ms(5));
    let mut next = world.copies()[&tuple][0].connection;
    world.close(tuple);
    next.reply.dport = 10;
    world.tell(1, &SourceEvent::seen(next));
    world.run_for(ms(2));
    world.cut.clear();
    world.run_for(HOLD * 2);
    world.run_until(SECOND * 3, "quiet", |w| w.is_quiet());
    let found = world.copies().remove(&tuple).unwrap_or_default();
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found.iter().all(|c| c.connection == next), "{found:#?}");
}

/// Seed 2546: the copy of a life that has ended is still here when the next life's traffic shows up
/// beside it.
#[test]
fn of_two_copies_of_one_tuple_traffic_claims_that_of_its_own_life() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 200, 100]);
    let tuple = protected(&mut world);
    assert_eq!(kind_at(&world, 2, &tuple), Some(Kind::Backup));
    // 1 closes it, and 2 does not hear of it for a while; 3 opens the tuple anew, in another
    // translation.
    world.cut = vec![(1, 2)];
    world.close(tuple);
    let next = |world: &World<'_>| {
        let table = world.hosts[&2].shards[0].table();
        let mut connection =
            table.connection(table.find_original(&tuple).expect("the copy of before"));
        connection.reply.dport = 10;
        connection.state.mark = 77;
        connection
    };
    let next = next(&world);
    world.tell(3, &SourceEvent::seen(next));
    world.run_until(HOLD + ms(8), "both lives have a copy at 2", |w| {
        w.copies()
            .get(&tuple)
            .is_some_and(|found| found.iter().filter(|c| c.member == 2).count() == 2)
    });
    // Its traffic moves to 2.
    let mut moved = next;
    moved.state.mark = 78;
    world.tell(2, &SourceEvent::seen(moved));
    world.run_for(ms(3));
    world.cut.clear();
    world.run_for(HOLD + ms(20));
    world.run_until(SECOND * 3, "quiet", |w| w.is_quiet());
    let found = world.copies().remove(&tuple).unwrap_or_default();
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found.iter().all(|c| c.connection == moved), "{found:#?}");
    let active = found.iter().find(|c| c.kind == Kind::Active).expect("an active");
    assert_eq!(active.member, 2, "its traffic is there");
}

/// The kernel of 1 has it no more: a timeout, or somebody flushed its table.
fn forget_at(world: &mut World<'_>, tuple: Tuple, member: MemberId) {
    world.tell(member, &SourceEvent::Gone { original: tuple, end: End::UNTOLD });
}

/// Packets pass at a member, of which no event tells.
fn pass_silently(world: &mut World<'_>, tuple: Tuple, member: MemberId) {
    let connection = world.copies()[&tuple][0].connection;
    world.host(member).touched.insert(tuple, connection);
    world.open.get_mut(&tuple).expect("it is open").owner = member;
}

#[test]
fn a_connection_that_its_gateway_has_no_more_goes_on_where_its_packets_pass() {
    let memories = memories(2);
    let mut world = group(1, &memories, 1, &[100, 100]);
    let tuple = protected(&mut world);
    pass_silently(&mut world, tuple, 2);
    forget_at(&mut world, tuple, 1);
    all_is_well(&mut world);
    assert_eq!(kind_at(&world, 2, &tuple), Some(Kind::Active));
    assert_eq!(world.counter(2, Counter::ClaimsByLook), 1);
}

#[test]
fn a_connection_that_its_gateway_has_no_more_ends_where_no_packets_pass() {
    let memories = memories(2);
    let mut world = group(1, &memories, 1, &[100, 100]);
    let tuple = protected(&mut world);
    world.open.remove(&tuple);
    forget_at(&mut world, tuple, 1);
    all_is_well(&mut world);
    assert!(world.hosts[&2].kernel.is_empty(), "its entry is gone");
    assert_eq!(world.counter(2, Counter::ClaimsByLook), 0);
}

#[test]
fn a_backup_that_is_released_keeps_what_has_its_packets_there() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 100]);
    let tuple = protected(&mut world);
    pass_silently(&mut world, tuple, 2);
    world.start(3, 1, 200); // A better backup for 1's connections.
    all_is_well(&mut world);
    assert_eq!(kind_at(&world, 2, &tuple), Some(Kind::Active));
}

/// Seed 82009375: a close arrives where its connection was claimed, and is ignored; who sent it
/// believes that the slot is its lease again. When the connection has come back to it, and closes
/// once more, it is not to have that twice.
#[test]
fn a_slot_whose_close_was_ignored_is_no_lease_after_the_next_one() {
    let memories = memories(2);
    let mut world = group(1, &memories, 1, &[100, 100]);
    let tuple = protected(&mut world);
    move_to(&mut world, tuple, 2);
    world.tell(1, &SourceEvent::gone(tuple)); // Before it has heard of the claim.
    world.run_until(SECOND, "2 has found another place for the copy", |w| {
        w.is_quiet() && w.copies()[&tuple].len() == 2
    });
    move_to(&mut world, tuple, 1);
    world.run_until(SECOND, "turned", |w| w.is_quiet());
    world.close(tuple);
    for _ in 0..400 {
        world.open_at(1);
        world.run_for(ms(1));
        let table = world.hosts[&1].shards[0].table();
        let mut peers: Vec<_> = (0..table.capacity())
            .filter(|slot| matches!(table.kind(*slot), Kind::Active | Kind::Closing))
            .map(|slot| table.line(slot).peer())
            .filter(|peer| peer.is_somewhere())
            .map(|peer| peer.raw())
            .collect();
        let all = peers.len();
        peers.sort();
        peers.dedup();
        assert_eq!(peers.len(), all, "two connections have their copy in one slot");
    }
    all_is_well(&mut world);
}

/// Seed 200002015: a backup has copies of two lives of a tuple, and the member of one of them dies.
/// The kernel's entry, which was written for that one last, becomes that of the other one again.
#[test]
fn the_entry_that_a_dead_members_copy_had_is_given_to_the_copy_that_stays() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 100, 200]);
    let tuple = protected(&mut world);
    let living = world.hosts[&3].kernel[&tuple];
    // Another connection of the same tuple, at 2 (its client has come to another gateway, or the
    // address is used twice).
    let reply = Tuple { dport: 10, ..living.reply };
    let dead = Connection { reply, ..living };
    world.tell(2, &SourceEvent::seen(dead));
    world.run_until(SECOND, "3 has both", |w| w.hosts[&3].kernel[&tuple] == dead);
    world.kill(2);
    world.run_for(REPROTECT + ms(300));
    assert_eq!(world.hosts[&3].kernel[&tuple], living);
    all_is_well(&mut world);
}

/// A backup's kernel has another connection under the copy's tuple, with packets, and does not take
/// the copy. When that ends, the other one goes on.
#[test]
fn the_end_of_a_copy_that_the_kernel_did_not_take_ends_no_other_connection() {
    for end in [End::Seen, End::UNTOLD] {
        let memories = memories(2);
        let mut world = group(1, &memories, 1, &[100, 100]);
        let tuple = world.open_at(1);
        let theirs = Tuple { dport: 10, ..tuple.mirrored() };
        let other = Connection::new(tuple, theirs, Default::default());
        let host = world.host(2);
        host.full = true;
        host.touched.insert(tuple, other);
        world.run_until(SECOND, "2 has declined the copy", |w| {
            kind_at(w, 2, &tuple) == Some(Kind::Backup) && w.counter(1, Counter::DeclinedByPeer) > 0
        });
        world.open.remove(&tuple);
        world.tell(1, &SourceEvent::Gone { original: tuple, end });
        world.run_until(SECOND, "nobody has it", |w| w.copies_of(&tuple).is_empty());
        world.run_for(ms(20));
        assert_eq!(world.hosts[&2].touched.get(&tuple), Some(&other), "{end:?}");
    }
}

/// Seed 401436: two claimed the same state, neither having heard of the other. The claim of one was
/// refused, and what the other one sent before arrives late: it is no copy of that one.
#[test]
fn who_had_its_claim_refused_is_no_backup_of_the_other() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 100, 100]);
    let tuple = protected(&mut world);
    let (heir, other) = backup_and_other(&world, &tuple);
    world.kill(1);
    world.open.get_mut(&tuple).expect("it is open").owner = heir;
    world.run_for(REPROTECT + ms(300));
    assert_eq!(kind_at(&world, heir, &tuple), Some(Kind::Active), "presumed");
    // Packets at both. What the heir says of its own is lost for now.
    world.cut = vec![(heir, other)];
    move_to(&mut world, tuple, heir);
    world.change(tuple);
    world.run_for(ms(2));
    world.cut.clear();
    move_to(&mut world, tuple, other);
    world
        .run_until(ms(5), "the claim is refused", |w| w.counter(other, Counter::RefusedByPeer) > 0);
    move_to(&mut world, tuple, other);
    world.run_for(ms(30));
    assert!(world.counter(heir, Counter::Exposure) > 0, "nobody has a copy of what the heir has");
    // Neither came by it from the other: the next packets decide.
    move_to(&mut world, tuple, other);
    all_is_well(&mut world);
}

/// 1's connection moves from its backup to the other one, and both have a copy.
fn turn_with_both(world: &mut World<'_>, tuple: Tuple) -> (MemberId, MemberId) {
    let (backup, other) = backup_and_other(world, &tuple);
    // Its kernel does not take the next state, and 1 turns to the other one.
    world.host(backup).full = true;
    world.change(tuple);
    world.run_until(SECOND * 10, "both have a copy", |w| {
        [backup, other].iter().all(|m| kind_at(w, *m, &tuple) == Some(Kind::Backup))
    });
    world.host(backup).full = false;
    (backup, other)
}

/// Seed 600001560: while a connection moves from one backup to another, packets show up at both.
/// Its active takes the copy of the one, and then that of the other, which is newer: the first one
/// still counts on it, and is told.
#[test]
fn of_two_backups_that_claim_at_once_the_one_that_loses_is_told() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 100, 100]);
    let tuple = protected(&mut world);
    let (backup, other) = turn_with_both(&mut world, tuple);
    move_to(&mut world, tuple, backup);
    world.step();
    move_to(&mut world, tuple, other);
    world.change(tuple);
    all_is_well(&mut world);
    assert_eq!(kind_at(&world, other, &tuple), Some(Kind::Active), "{}", world.describe());
}

/// A call whose first packets went through 1, before it had a copy, and the other ones, of the next
/// call from that port, through 2. Both members hold it for their own, and no entry tells that
/// packets pass it.
fn contested(world: &mut World<'_>, members: [MemberId; 2]) -> (Tuple, Connection) {
    let [silent, busy] = members;
    let tuple = world.open_at(silent);
    let mut connection = world.hosts[&silent].touched[&tuple];
    connection.state.timeout_s = 0;
    world.tell(busy, &SourceEvent::seen(connection));
    for member in members {
        world.host(member).passing.insert(tuple, connection);
    }
    (tuple, connection)
}

/// Under load, with routes that move: what was left of a call at 1 outlived the next one from its
/// port at 2, and was copied to 2 for good.
#[test]
fn a_contest_that_its_last_packets_decide_ends_at_the_other_one_too() {
    for is_seen_before in [true, false] {
        let memories = memories(2);
        let mut world = group(1, &memories, 1, &[100, 100]);
        let (tuple, connection) = contested(&mut world, [1, 2]);
        let is_refused =
            |w: &World<'_>| [1, 2].iter().all(|m| w.counter(*m, Counter::RefusedByPeer) > 0);
        world.run_until(HOLD + SECOND * 3, "both are refused", is_refused);
        let mut last = connection;
        if is_seen_before {
            last.state.mark += 1;
            world.tell(2, &SourceEvent::seen(last));
        }
        last.state.tcp_state = 7; // TIME_WAIT
        world.tell(2, &SourceEvent::seen(last));
        world.tell(2, &SourceEvent::gone(tuple));
        world.open.remove(&tuple);
        world.run_for(SECOND * 12);
        assert_eq!([1, 2].map(|m| kind_at(&world, m, &tuple)), [None, None], "{is_seen_before}");
        assert!(
            !world.hosts[&1].touched.contains_key(&tuple),
            "its entry at 1 is gone: {is_seen_before}"
        );
        all_is_well(&mut world);
    }
}

/// The one with the packets has a copy elsewhere: no delta of its goes to the other one.
#[test]
fn a_contest_is_told_to_who_is_not_the_backup_as_well() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 200, 100]);
    let (tuple, connection) = contested(&mut world, [3, 1]);
    world.open.get_mut(&tuple).expect("it is open").owner = 1;
    world.cut = vec![(2, 3), (3, 2)];
    world
        .run_until(HOLD + SECOND * 3, "3 is refused", |w| w.counter(3, Counter::RefusedByPeer) > 0);
    assert_eq!(kind_at(&world, 2, &tuple), Some(Kind::Backup), "1 has its copy there");
    let mut next = connection;
    next.state.mark += 1;
    world.open.get_mut(&tuple).expect("it is open").mark = next.state.mark;
    world.tell(1, &SourceEvent::seen(next));
    world.run_until(ms(50), "3 lets it go", |w| kind_at(w, 3, &tuple) != Some(Kind::Active));
}

/// Seed 800000376: 1 and 3 take one connection for theirs, 2 has both copies, and in its kernel the
/// later state. That one's active dies, the other one's does not take it for its own: 2 lets it go,
/// and its kernel gets the other one's.
#[test]
fn a_copy_gets_the_entry_of_one_that_was_taken_over_in_vain() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 200, 100]);
    let tuple = world.open_at(3);
    let living = world.hosts[&3].touched[&tuple];
    world.run_for(ms(1));
    let mut later = living;
    world.tell(1, &SourceEvent::seen(later));
    world.run_for(HOLD + ms(20));
    later.state.mark += 1;
    world.tell(1, &SourceEvent::seen(later));
    world.run_until(SECOND, "2 has the later state in its kernel", |w| {
        w.hosts[&2].kernel.get(&tuple) == Some(&later)
    });
    world.kill(1);
    world.run_until(SECOND * 10, "3 refuses it", |w| w.counter(2, Counter::RefusedByPeer) > 0);
    all_is_well(&mut world);
    assert_eq!(world.hosts[&2].kernel.get(&tuple), Some(&living));
}

/// Seeds 800001965, 930001209: the same with equal stamps: who comes second leaves the copy to the
/// first one, which would not have been told, and is told itself: no packet elsewhere would tell
/// it.
#[test]
fn of_two_backups_that_claim_at_once_with_equal_stamps_the_first_one_keeps_the_copy() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 100, 100]);
    let tuple = protected(&mut world);
    let (backup, other) = turn_with_both(&mut world, tuple);
    move_to(&mut world, tuple, other);
    let same = world.hosts[&other].touched[&tuple];
    world.tell(backup, &SourceEvent::seen(same));
    world.run_for(SECOND * 2);
    let differed = [1, 2, 3].map(|member| world.counter(member, Counter::DigestsDiffered));
    assert_eq!(differed, [0; 3], "{}", world.describe());
    let actives = world.copies()[&tuple].iter().filter(|copy| copy.kind == Kind::Active).count();
    assert_eq!(actives, 1, "{}", world.describe());
    world.change(tuple);
    all_is_well(&mut world);
    assert_eq!(kind_at(&world, other, &tuple), Some(Kind::Active), "{}", world.describe());
}

/// Seed 940017302: one that took over and its backup claim at once, with equal stamps, when the
/// first turns to another backup. The other one was refused and not told, and carried it on as
/// well.
#[test]
fn of_an_active_and_its_backup_that_claim_at_once_one_is_told() {
    let memories = memories(4);
    let mut world = group(1, &memories, 1, &[100, 50, 90, 200]);
    let tuple = world.open_at(2);
    let copy_at = |w: &World<'_>, member| kind_at(w, member, &tuple) == Some(Kind::Backup);
    world.run_until(SECOND, "4 has the copy", |w| copy_at(w, 4));
    world.kill(2);
    world.run_until(REPROTECT * 3, "1 has a copy of what 4 took over", |w| copy_at(w, 1));
    world.run_for(ms(500));
    world.cut = vec![(1, 4)];
    let is_dead = |w: &World<'_>| !w.hosts[&4].group.view().members[1].status.is_alive();
    world.run_until(SECOND, "4 takes 1 for dead", is_dead);
    world.cut.clear();
    world.open.get_mut(&tuple).expect("it is open").owner = 4;
    world.change(tuple);
    let mut other = world.hosts[&4].touched[&tuple];
    other.state.mark += 100;
    world.tell(1, &SourceEvent::seen(other));
    world.run_for(SECOND * 4);
    let actives = world.copies()[&tuple].iter().filter(|copy| copy.kind == Kind::Active).count();
    assert_eq!(actives, 1, "{}", world.describe());
}

/// Seed 940019891: a connection moves to a better backup, which dies before it has it. The previous
/// one, which has its copy still, got a second one, and only that was named when the two compared.
#[test]
fn a_connection_that_cannot_move_finds_the_copy_that_it_has() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 100]);
    let tuple = protected(&mut world);
    let place =
        world.copies()[&tuple].iter().find(|copy| copy.member == 2).expect("2 has the copy").place;
    lose_the_better_one(&mut world);
    let found: Vec<_> =
        world.copies()[&tuple].iter().filter(|c| c.member == 2).map(|c| c.place).collect();
    assert_eq!(found, [place]);
}

/// A connection that 2 and 3 carry both, with a copy at 1 each; as 3 knows it, whose mark is higher
/// by 100.
fn carried_by_2_and_3(world: &mut World<'_>) -> (Tuple, Connection) {
    let tuple = world.open_at(2);
    world.run_until(SECOND, "1 has the copy of 2", |w| copies_at_1(w, &tuple) == 1);
    let mut seen = world.copies()[&tuple][0].connection;
    seen.state.mark += 100;
    world.tell(3, &SourceEvent::seen(seen));
    world.run_until(SECOND, "and that of 3", |w| copies_at_1(w, &tuple) == 2);
    (tuple, seen)
}

fn copies_at_1(world: &World<'_>, tuple: &Tuple) -> usize {
    world.copies_of(tuple).iter().filter(|copy| copy.member == 1).count()
}

/// Seed 983001232: a backup had the copies of two members that carried one connection on. One of
/// them died, its entry ran out, and that of the other one, which lay in the same place, was not
/// written again.
#[test]
fn when_one_of_two_copies_of_a_tuple_ends_the_other_ones_entry_is_written_again() {
    for is_taken_over in [false, true] {
        one_of_two_copies_ends(is_taken_over);
    }
}

/// Seed 991005621: the same, once the dead member's connection had been taken over.
fn one_of_two_copies_ends(is_taken_over: bool) {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[200, 100, 100]);
    let (tuple, mut seen) = carried_by_2_and_3(&mut world);
    let copies_at_1 = |w: &World<'_>| copies_at_1(w, &tuple);
    let mark = seen.state.mark - 100;
    // Of two the newer state is taken over.
    for _ in 0..if is_taken_over { 5 } else { 0 } {
        seen.state.mark += 1;
        world.tell(3, &SourceEvent::seen(seen));
        world.run_for(ms(10));
    }
    world.run_for(ms(10));
    world.kill(3);
    world
        .run_until(SECOND, "3 is dead", |w| !w.hosts[&1].group.view().members[3].status.is_alive());
    if is_taken_over {
        let is_ours = |w: &World<'_>| {
            w.copies()[&tuple].iter().any(|c| (c.member, c.kind) == (1, Kind::Active))
        };
        world.run_until(SECOND * 3, "its connection is 1's", is_ours);
    }
    world.host(1).kernel.remove(&tuple);
    world.tell(1, &SourceEvent::Gone { original: tuple, end: End::UNTOLD });
    world.run_for(ms(10));
    assert_eq!(copies_at_1(&world), 1, "that of 2 is left");
    let there = world.hosts[&1].kernel.get(&tuple).map(|there| there.state.mark);
    assert_eq!(there, Some(mark), "and in the kernel");
}

/// Seed 993001749: nobody could take the place of a dead member, which was waited for; its copy of
/// a connection that went on here in another slot stayed, and counted as exposed.
#[test]
fn a_copy_of_a_member_that_is_lost_goes_if_its_connection_goes_on_here() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[200, 100, 100]);
    let (tuple, mut seen) = carried_by_2_and_3(&mut world);
    let copies_at_1 = |w: &World<'_>| copies_at_1(w, &tuple);
    world.run_for(ms(10));
    world.kill(2);
    seen.state.mark += 100;
    world.tell(1, &SourceEvent::seen(seen));
    let is_ours =
        |w: &World<'_>| w.copies()[&tuple].iter().any(|c| (c.member, c.kind) == (1, Kind::Active));
    assert!(is_ours(&world) && copies_at_1(&world) == 2);
    world.kill(3);
    world.run_until(SECOND * 5, "both are given up", |w| w.counter(1, Counter::StreamsLost) == 2);
    world.run_for(ms(50));
    assert_eq!((copies_at_1(&world), world.counter(1, Counter::Exposure)), (1, 1));
}

/// Seed 800001095: the other one of a contest comes back with another table, and fewer shards: the
/// place that it had there is nobody's.
#[test]
fn a_contest_with_a_table_that_is_no_more_is_told_to_nobody() {
    let memories = memories(4);
    let mut world = World::new(1, &memories);
    world.start(1, 1, 100);
    world.start(2, 2, 100);
    world.run_for(ms(100));
    let tuple = loop {
        let (tuple, _) = contested(&mut world, [2, 1]);
        if shard_of(&tuple, 2) == 1 {
            break tuple;
        }
        world.tell(1, &SourceEvent::gone(tuple));
        world.close(tuple);
    };
    world.run_until(HOLD + SECOND * 3, "refused", |w| w.counter(1, Counter::RefusedByPeer) > 0);
    world.kill(2);
    world.open.get_mut(&tuple).expect("it is open").owner = 1;
    world
        .run_until(SECOND, "2 is dead", |w| !w.hosts[&1].group.view().members[2].status.is_alive());
    world.start(2, 1, 100);
    world.run_until(SECOND, "2 is back", |w| w.hosts[&1].group.view().members[2].status.is_alive());
    world.change(tuple);
    all_is_well(&mut world);
    assert_eq!(
        [1, 2].map(|m| kind_at(&world, m, &tuple)),
        [Some(Kind::Active), Some(Kind::Backup)]
    );
}

/// Traffic seeds 500000404, 500001446: what is refused because another one began here is refused
/// still when that one's hold is over, whatever the epochs: they say nothing of two connections.
#[test]
fn a_contest_goes_on_when_the_hold_of_the_younger_one_is_over() {
    let memories = memories(2);
    let mut world = group(1, &memories, 1, &[100, 100]);
    let tuple = protected(&mut world);
    world.close(tuple);
    world.reopen_at(1, tuple); // Above the one before.
    world.run_for(HOLD - ms(10));
    let mut connection = world.hosts[&1].touched[&tuple];
    connection.state.timeout_s = 0;
    world.tell(2, &SourceEvent::seen(connection));
    for member in [1, 2] {
        world.host(member).passing.insert(tuple, connection);
    }
    world.open.get_mut(&tuple).expect("it is open").owner = 2;
    world.run_until(SECOND, "it is refused", |w| w.counter(1, Counter::RefusedByPeer) > 0);
    assert_eq!(kind_at(&world, 2, &tuple), Some(Kind::Held));
    world.run_until(SECOND * 3, "it is offered again", |w| w.counter(2, Counter::Refused) > 1);
    assert_eq!(kind_at(&world, 2, &tuple), Some(Kind::Active));
    world.change(tuple);
    all_is_well(&mut world);
    assert_eq!(kind_at(&world, 2, &tuple), Some(Kind::Active), "its packets pass here");
}

/// Seed 930001209: two members carry a connection on, with equal stamps, and no kernel can be asked
/// where its packets pass. The one whose new is refused had no other way to learn of it.
#[test]
fn of_two_with_equal_stamps_one_is_told_where_no_kernel_can_be_asked() {
    let memories = memories(3);
    let mut world = World::new(1, &memories);
    world.commit = CommitMode::Off;
    for (member, priority) in [(1, 100), (2, 200), (3, 150)] {
        world.start(member, 1, priority);
    }
    world.run_for(ms(100));
    let tuple = world.open_at(2);
    let same = world.hosts[&2].touched[&tuple];
    world.tell(1, &SourceEvent::seen(same));
    all_is_well(&mut world);
    assert_eq!([1, 2].map(|m| kind_at(&world, m, &tuple)), [None, Some(Kind::Active)]);
}

/// Seed 800004234: 1's connection moves from its backup to another one, which has the newest state
/// when 1 dies. The one of before takes over first: its older state does not take the place of
/// that, though it is what the copy moved from.
#[test]
fn a_previous_backup_that_takes_over_does_not_outdo_the_newer_copy() {
    let memories = memories(3);
    let mut world = group(1, &memories, 1, &[100, 100, 100]);
    let tuple = protected(&mut world);
    let (backup, other) = turn_with_both(&mut world, tuple);
    world.cut = vec![(1, backup)];
    world.change(tuple);
    let newest = world.open[&tuple].mark;
    let has_newest = |w: &World<'_>| {
        w.copies()[&tuple]
            .iter()
            .any(|copy| copy.member == other && copy.connection.state.mark == newest)
    };
    world.run_until(ms(50), "the other one has the newest state", has_newest);
    let is_dead = |w: &World<'_>| !w.hosts[&backup].group.view().members[1].status.is_alive();
    world.run_until(SECOND, "it takes 1 for dead", is_dead);
    world.run_for(REPROTECT / 2);
    world.kill(1);
    world.open.get_mut(&tuple).expect("it is open").owner = other;
    world.run_for(REPROTECT * 2);
    all_is_well(&mut world);
}
