//! Stories of groups: members that come, leave, die, come back, or share a number.

use super::*;

const TICK: Duration = Duration::from_millis(100);

fn identity(member: MemberId, incarnation: u64) -> Identity {
    Identity {
        member,
        shards: 2,
        priority: 100,
        site: 0,
        table_id: incarnation as u32,
        incarnation,
        heartbeat: TICK,
        dead_after: 3,
    }
}

fn at(ticks: u64) -> Time {
    Time(1_000_000_000).after(TICK * ticks as u32)
}

fn address(member: MemberId) -> IpAddr {
    IpAddr::from([10, 9, 0, member])
}

const READY: Tables =
    Tables { capacity: 1000, room: 1000, ready: true, syncing: false, synced: 0, leaving: false };

/// Sends one heartbeat from `from` to `to`.
fn beat(from: &mut Group, to: &mut Group, now: Time) {
    let (heartbeat, _) = from.poll_heartbeat(now, &READY).expect("a heartbeat is due");
    to.handle_heartbeat(now, address(heartbeat.from), &heartbeat);
}

fn events(group: &mut Group) -> Vec<Event> {
    std::iter::from_fn(|| group.poll_event()).collect()
}

#[test]
fn a_member_becomes_ready_once_both_hear_each_other() {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    beat(&mut a, &mut b, at(0));
    assert_eq!(b.view().members[1].status, Status::Joining, "a does not hear b yet");
    beat(&mut b, &mut a, at(0));
    assert_eq!(a.view().members[2].status, Status::Ready);
    assert_eq!(events(&mut a), [Event::MemberUp(2), Event::MemberReady(2)]);
    beat(&mut a, &mut b, at(1));
    assert_eq!(b.view().members[1].status, Status::Ready);
}

#[test]
fn silence_is_death_after_three_intervals() {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    beat(&mut b, &mut a, at(0));
    events(&mut a);
    a.tick(at(2));
    assert_eq!(events(&mut a), []);
    assert_eq!(a.poll_at(), at(0), "its own heartbeat is due first");
    a.tick(at(3));
    assert_eq!(events(&mut a), [Event::MemberDead(2)]);
    assert_eq!(a.view().members[2].status, Status::Dead);
    a.tick(at(4));
    assert_eq!(events(&mut a), [], "once");
}

#[test]
fn a_path_that_passes_only_small_heartbeats_makes_no_backup() {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    beat(&mut a, &mut b, at(0));
    for n in 0..20 {
        let (heartbeat, _) = b.poll_heartbeat(at(n), &READY).unwrap();
        // From the fifth interval on, large datagrams are lost.
        if n < 5 || !heartbeat.full_size {
            a.handle_heartbeat(at(n), address(2), &heartbeat);
        }
        a.tick(at(n));
        // The other way everything passes.
        if n > 0 {
            beat(&mut a, &mut b, at(n));
        }
    }
    assert_eq!(a.view().members[2].status, Status::Joining);
    // Nor is this member one for the other: who gets no large datagrams says that it does not hear.
    assert!(a.hears_only_small(at(19), 2) && !b.hears_only_small(at(19), 1));
    assert_eq!(b.view().members[1].status, Status::Joining);
    assert!(!b.view().members[1].hears_me);
    for n in 20..24 {
        beat(&mut b, &mut a, at(n));
        beat(&mut a, &mut b, at(n));
    }
    assert!(!a.hears_only_small(at(23), 2) && b.view().members[1].hears_me);
    assert_eq!([a.view().members[2].status, b.view().members[1].status], [Status::Ready; 2]);
}

#[test]
fn a_second_host_with_the_same_number_changes_nothing_and_is_told_once() {
    let mut a = Group::new(identity(1, 11), at(0));
    let (mut b, mut twin) =
        (Group::new(identity(2, 22), at(0)), Group::new(identity(2, 99), at(0)));
    for n in 0..20 {
        beat(&mut b, &mut a, at(n));
        let (heartbeat, _) = twin.poll_heartbeat(at(n), &READY).unwrap();
        assert!(!a.handle_heartbeat(at(n), address(7), &heartbeat));
    }
    assert_eq!(a.view().members[2].incarnation, 22);
    let duplicates =
        events(&mut a).into_iter().filter(|e| matches!(e, Event::Duplicate { .. })).count();
    assert_eq!(duplicates, 1);
    // And each of the two hears of the other.
    let (heartbeat, _) = twin.poll_heartbeat(at(20), &READY).unwrap();
    assert!(!b.handle_heartbeat(at(20), address(7), &heartbeat));
    assert_eq!(events(&mut b), [Event::Duplicate { member: 2, address: address(7) }]);
}

#[test]
fn a_restart_within_the_dead_time_with_an_empty_table_is_a_death_all_the_same() {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    beat(&mut b, &mut a, at(0));
    events(&mut a);
    let mut again = Group::new(identity(2, 23), at(2));
    beat(&mut again, &mut a, at(2));
    assert_eq!(events(&mut a), [Event::MemberDead(2), Event::MemberUp(2)]);
    assert_eq!(a.view().members[2].table_id, 23);
}

#[test]
fn a_member_with_a_slower_rhythm_is_not_dead_between_its_heartbeats() {
    let slow = Identity { heartbeat: TICK * 10, ..identity(2, 22) };
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(slow, at(0)));
    beat(&mut b, &mut a, at(0));
    events(&mut a);
    a.tick(at(29));
    assert_eq!(events(&mut a), []);
    a.tick(at(30));
    assert_eq!(events(&mut a), [Event::MemberDead(2)]);
}

#[test]
fn who_could_not_listen_calls_nobody_dead_at_once() {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    beat(&mut b, &mut a, at(0));
    events(&mut a);
    pass(&mut a, at(50));
    assert_eq!(events(&mut a), []);
    pass(&mut a, at(51));
    assert_eq!(events(&mut a), [Event::MemberDead(2)]);
}

/// What a loop does in each pass, besides listening.
fn pass(group: &mut Group, now: Time) {
    group.begin_pass(now, false);
    group.tick(now);
    group.poll_heartbeat(now, &READY);
}

/// Passes of a member whose only peer is dead, each at the time that `wake` makes of the one asked
/// for; when the death is noticed.
fn noticed_at(wake: impl Fn(u32, Time) -> Time) -> Time {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    beat(&mut b, &mut a, at(0));
    pass(&mut a, at(0));
    events(&mut a);
    let mut now = at(0);
    for n in 0..100 {
        now = wake(n, a.poll_at().max(now));
        pass(&mut a, now);
        if events(&mut a) == [Event::MemberDead(2)] {
            return now;
        }
    }
    panic!("the dead member was excused for ever");
}

#[test]
fn a_loop_that_wakes_a_little_late_finds_the_dead_in_time() {
    let late = TICK / 5;
    let noticed = noticed_at(|n, asked| if n % 2 == 0 { asked.after(late) } else { asked });
    assert!(noticed <= at(3).after(late), "after {:?}", noticed.since(at(0)));
}

#[test]
fn a_loop_that_always_is_late_finds_the_dead_all_the_same() {
    let noticed = noticed_at(|_, asked| asked.after(TICK / 2));
    assert!(noticed <= at(9), "after {:?}", noticed.since(at(0)));
}

#[test]
fn goodbye_is_no_death() {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    beat(&mut b, &mut a, at(0));
    events(&mut a);
    a.handle_goodbye(at(1), 2);
    beat(&mut b, &mut a, at(1)); // It was on its way.
    a.tick(at(9));
    assert_eq!(events(&mut a), [Event::MemberLeft(2)]);
}

/// A pair whose second member has said, at the tick 1, that it restarts and is back within this
/// time.
fn announced(back: Duration) -> (Group, Group) {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    beat(&mut a, &mut b, at(0));
    beat(&mut b, &mut a, at(0));
    events(&mut a);
    b.announce_restart(at(1), back);
    let mut said = 0;
    let mut now = at(1);
    while !b.has_announced(now) {
        if let Some((heartbeat, _)) = b.poll_heartbeat(now, &READY) {
            a.handle_heartbeat(now, address(2), &heartbeat);
            said += 1;
        }
        now = now.after(Duration::from_millis(1));
    }
    assert_eq!((said, now), (3, at(1).after(Duration::from_millis(30))), "ten milliseconds apart");
    assert!(b.poll_heartbeat(now, &READY).is_none(), "it is silent from then on");
    assert_eq!(a.view().members[2].standing(), "restarting");
    (a, b)
}

/// The same member in a new process.
fn again(table_id: u32, now: Time) -> Group {
    Group::new(Identity { table_id, ..identity(2, 23) }, now)
}

#[test]
fn who_said_that_it_restarts_is_awaited_and_admitted_at_once_with_its_table() {
    let (mut a, _) = announced(TICK * 100);
    for n in 2..60 {
        a.tick(at(n));
    }
    assert_eq!(a.view().members[2].status, Status::Ready, "it stays what it was");
    assert_eq!(events(&mut a), []);
    assert!(a.poll_heartbeat(at(60), &READY).unwrap().0.hears(2), "it is told that it is heard");
    beat(&mut again(22, at(60)), &mut a, at(60));
    let seen = a.view().members[2];
    assert_eq!((seen.incarnation, seen.table_id, seen.standing()), (23, 22, "joining"));
    assert_eq!(events(&mut a), [], "nobody came, nobody died");
    // The announcement is over: from now on silence is death again.
    a.tick(at(63));
    assert_eq!(events(&mut a), [Event::MemberDead(2)]);
}

#[test]
fn a_restart_that_takes_no_time_need_not_wait_for_a_missed_heartbeat() {
    let (mut a, _) = announced(TICK * 100);
    let now = at(1).after(Duration::from_millis(31));
    beat(&mut again(22, now), &mut a, now);
    assert_eq!(a.view().members[2].incarnation, 23);
}

#[test]
fn who_does_not_come_back_in_time_is_dead_then() {
    let (mut a, _) = announced(TICK * 100);
    let due = at(101).after(Duration::from_millis(20));
    a.tick(Time(due.0 - 1));
    assert_eq!(events(&mut a), []);
    a.tick(due);
    assert_eq!(events(&mut a), [Event::MemberDead(2)]);
    assert_eq!(a.view().members[2].standing(), "dead");
}

#[test]
fn nobody_is_awaited_longer_than_two_minutes() {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    let (heartbeat, _) = b.poll_heartbeat(at(0), &READY).unwrap();
    a.handle_heartbeat(at(0), address(2), &Heartbeat { back_ms: u32::MAX, ..heartbeat });
    a.tick(Time(at(1200).0 - 1));
    assert!(a.view().members[2].is_restarting());
    a.tick(at(1200));
    assert_eq!(a.view().members[2].status, Status::Dead);
}

#[test]
fn a_late_heartbeat_takes_no_announcement_back_but_a_goodbye_does() {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    let (late, _) = b.poll_heartbeat(at(0), &READY).unwrap();
    a.handle_heartbeat(at(0), address(2), &Heartbeat { back_ms: 30_000, ..late.clone() });
    a.handle_heartbeat(at(0), address(2), &late);
    assert!(a.view().members[2].is_restarting());
    a.tick(at(20));
    events(&mut a);
    a.handle_goodbye(at(20), 2);
    assert_eq!(events(&mut a), [Event::MemberLeft(2)]);
    assert_eq!((a.view().members[2].standing(), a.view().members[2].back_by), ("left", Time(0)));
}

#[test]
fn an_announced_restart_that_loses_the_table_is_a_death() {
    let (mut a, _) = announced(TICK * 100);
    let mut empty = again(33, at(2));
    let (heartbeat, _) = empty.poll_heartbeat(at(2), &READY).unwrap();
    assert!(!a.handle_heartbeat(at(2), address(2), &heartbeat), "as any other incarnation");
    beat(&mut empty, &mut a, at(3));
    assert_eq!(events(&mut a), [Event::MemberDead(2), Event::MemberUp(2)]);
}

#[test]
fn a_process_that_took_the_table_up_gives_those_that_were_there_their_dead_time() {
    let mut a = Group::new(identity(1, 11), at(0));
    let mut b = Group::new(identity(2, 22), at(0));
    beat(&mut b, &mut a, at(0));
    a.handle_goodbye(at(0), 3);
    let mut resumed = Group::new(identity(1, 12), at(1000));
    for (id, member) in a.view().others() {
        resumed.remember(at(1000), id, member);
    }
    let seen = resumed.view().members[2];
    assert_eq!(
        (seen.status, seen.table_id, seen.incarnation),
        (Status::Joining, 22, 22),
        "no backup yet"
    );
    assert_eq!((seen.since, seen.last_heard), (at(1000), at(1000)));
    resumed.tick(at(1002));
    assert_eq!(events(&mut resumed), []);
    resumed.tick(at(1003));
    assert_eq!(events(&mut resumed), [Event::MemberDead(2)]);
}

#[test]
fn that_a_member_is_ready_is_told_once_however_well_the_two_hear_each_other_meanwhile() {
    let (mut a, mut b) = (Group::new(identity(1, 11), at(0)), Group::new(identity(2, 22), at(0)));
    beat(&mut a, &mut b, at(0));
    let heartbeat = b.poll_heartbeat(at(0), &READY).unwrap().0;
    let one_way = Heartbeat { hears: 0, ..heartbeat.clone() };
    for said in [&one_way, &heartbeat, &one_way, &heartbeat, &heartbeat] {
        a.handle_heartbeat(at(0), address(2), said);
    }
    assert_eq!(events(&mut a), [Event::MemberUp(2), Event::MemberReady(2)]);
    // Small ones only for a while, then large ones again.
    a.handle_heartbeat(at(12), address(2), &Heartbeat { full_size: false, ..heartbeat.clone() });
    a.tick(at(12));
    assert_eq!(a.view().members[2].status, Status::Joining);
    a.handle_heartbeat(at(13), address(2), &heartbeat);
    assert_eq!((a.view().members[2].status, events(&mut a)), (Status::Ready, vec![]));
    // Not ready by its own word, and ready again: that is news.
    a.handle_heartbeat(at(13), address(2), &Heartbeat { ready: false, ..heartbeat.clone() });
    a.handle_heartbeat(at(13), address(2), &heartbeat);
    assert_eq!(events(&mut a), [Event::MemberReady(2)]);
    // A process that goes on with the table of one that told it does not tell it again.
    let known = a.view().members[2];
    let mut next = Group::new(identity(1, 12), at(14));
    next.remember(at(14), 2, &known);
    next.handle_heartbeat(at(14), address(2), &heartbeat);
    assert_eq!((next.view().members[2].status, events(&mut next)), (Status::Ready, vec![]));
    // A death ends it.
    next.tick(at(17));
    next.handle_heartbeat(at(17), address(2), &heartbeat);
    assert_eq!(
        events(&mut next),
        [Event::MemberDead(2), Event::MemberUp(2), Event::MemberReady(2)]
    );
}

#[test]
fn of_two_hosts_with_one_number_the_one_that_others_hear_learns_it_and_the_other_does_not() {
    let mut one = Group::new(identity(1, 11), at(0));
    let (mut first, mut second) =
        (Group::new(identity(2, 22), at(0)), Group::new(identity(2, 99), at(0)));
    beat(&mut first, &mut one, at(0));
    for n in 1..10 {
        for from in [2, 7] {
            let [sender, other] =
                if from == 2 { [&mut first, &mut second] } else { [&mut second, &mut first] };
            let (heartbeat, _) = sender.poll_heartbeat(at(n), &READY).unwrap();
            one.handle_heartbeat(at(n), address(from), &heartbeat);
            other.handle_heartbeat(at(n), address(from), &heartbeat);
        }
        let (heartbeat, _) = one.poll_heartbeat(at(n), &READY).unwrap();
        first.handle_heartbeat(at(n), address(1), &heartbeat);
        second.handle_heartbeat(at(n), address(1), &heartbeat);
        assert_eq!(first.namesake(at(n)), None, "member 1 says that it hears this one");
        assert_eq!(second.namesake(at(n)), Some((address(2), at(1))));
    }
    // The third is gone: neither knows that it is the member, and they are alone with each other.
    for n in 10..14 {
        let (heartbeat, _) = first.poll_heartbeat(at(n), &READY).unwrap();
        second.handle_heartbeat(at(n), address(2), &heartbeat);
        let (heartbeat, _) = second.poll_heartbeat(at(n), &READY).unwrap();
        first.handle_heartbeat(at(n), address(7), &heartbeat);
    }
    assert_eq!(first.namesake(at(13)), Some((address(7), at(1))));
    // And when the second is gone, it is forgotten.
    assert_eq!((first.namesake(at(15)).is_some(), first.namesake(at(16))), (true, None));
}
