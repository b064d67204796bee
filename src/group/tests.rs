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
    }
    assert_eq!(a.view().members[2].status, Status::Joining);
}

#[test]
fn a_second_host_with_the_same_number_changes_nothing_and_is_told_once() {
    let mut a = Group::new(identity(1, 11), at(0));
    let (mut b, mut twin) = (Group::new(identity(2, 22), at(0)), Group::new(identity(2, 99), at(0)));
    for n in 0..20 {
        beat(&mut b, &mut a, at(n));
        let (heartbeat, _) = twin.poll_heartbeat(at(n), &READY).unwrap();
        assert!(!a.handle_heartbeat(at(n), address(7), &heartbeat));
    }
    assert_eq!(a.view().members[2].incarnation, 22);
    let duplicates = events(&mut a).into_iter().filter(|e| matches!(e, Event::Duplicate { .. })).count();
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
    a.excuse(at(50));
    a.tick(at(50));
    assert_eq!(events(&mut a), []);
    a.tick(at(51));
    assert_eq!(events(&mut a), [Event::MemberDead(2)]);
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
