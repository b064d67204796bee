//! Two copies of everything, in good days and bad ones.

use std::time::Duration;

use hypersync::conn::Kind;
use hypersync::counters::Counter;
use hypersync::group::view::Status;
use hypersync::source::SourceEvent;

use crate::common::copies::{connection, connections, copies, push, push_all, wait_for_agreement};
use crate::common::member::{Lab, SOON, wait_until_ready};
use crate::common::wait_for;

const CONNECTIONS: u32 = 2000;

#[test]
fn every_connection_is_on_exactly_two_members_through_changes_closes_a_death_and_a_newcomer() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2, 3], &["--shards", "2"]);
    let two = lab.start(2, &[1, 3], &["--shards", "3"]);
    wait_until_ready(&[&one, &two]);

    let mut wanted = connections(0..CONNECTIONS);
    let mut producers = one.producers();
    push_all(&mut producers, wanted.values());
    wait_for_agreement("new connections are on both", &[&one, &two], &wanted, SOON);
    assert!(
        copies(&one).unwrap().values().all(|copy| copy.kind == Kind::Active),
        "their traffic is at member 1"
    );
    assert_eq!(one.counter(Counter::ConnectionsActive), u64::from(CONNECTIONS));
    assert_eq!(two.counter(Counter::ConnectionsBackup), u64::from(CONNECTIONS));

    // Every third changes, every seventh closes, some of the latter right after a change.
    for n in 0..CONNECTIONS {
        let mut c = connection(n);
        if n % 3 == 0 {
            c.state.mark ^= 0xffff_0000;
            // A shorter timeout travels with another change, here of the mark and sometimes of the
            // state.
            c.state.timeout_s = 120;
            if c.original.protocol == 6 {
                c.state.tcp_state = 4;
            }
            push(&mut producers, &SourceEvent::seen(c));
            wanted.insert(c.original, c);
        }
        if n % 7 == 0 {
            push(&mut producers, &SourceEvent::gone(c.original));
            wanted.remove(&c.original);
        }
    }
    producers.flush();
    wait_for_agreement("changes and closes follow", &[&one, &two], &wanted, SOON);

    drop(producers);
    one.kill();
    wait_for("member 2 is told of the death", SOON, || two.was_told("member-dead 1"));
    wait_for_agreement("everything is at member 2", &[&two], &wanted, SOON);

    let three = lab.start(3, &[1, 2], &["--shards", "1"]);
    wait_until_ready(&[&two, &three]);
    wait_for_agreement("everything is on two again", &[&two, &three], &wanted, SOON);
    let actives = copies(&two).unwrap().values().filter(|copy| copy.kind == Kind::Active).count();
    assert_eq!(actives, wanted.len(), "member 2 took them over");
    assert_eq!(two.sees(1), Status::Dead);

    // The survivor's own traffic goes on.
    let mut producers = two.producers();
    let more = connections(CONNECTIONS..CONNECTIONS + 100);
    push_all(&mut producers, more.values());
    wanted.extend(more);
    wait_for_agreement("new ones at the survivor too", &[&two, &three], &wanted, SOON);
}

#[test]
fn a_connection_that_closes_within_the_hold_never_travels() {
    let lab = Lab::new();
    let one = lab.start(1, &[2], &["--shards", "1", "--hold", "1h"]);
    let two = lab.start(2, &[1], &["--shards", "1"]);
    wait_until_ready(&[&one, &two]);
    let mut producers = one.producers();
    for n in 0..500 {
        push(&mut producers, &SourceEvent::seen(connection(n)));
    }
    producers.flush();
    wait_for("they are held", SOON, || one.counter(Counter::ConnectionsHeld) == 500);
    for n in 0..500 {
        push(&mut producers, &SourceEvent::gone(connection(n).original));
    }
    producers.flush();
    wait_for("they are gone", SOON, || one.counter(Counter::SourceShort) == 500);
    assert_eq!(one.counter(Counter::ConnectionsHeld), 0);
    assert_eq!((one.counter(Counter::DeltasNew), two.counter(Counter::DeltasApplied)), (0, 0));
}

#[test]
fn a_full_backup_keeps_what_it_has_and_a_third_member_takes_the_rest() {
    let lab = Lab::new();
    let one = lab.start(1, &[2, 3], &["--shards", "1"]);
    let two = lab.start(2, &[1, 3], &["--shards", "1", "--capacity", "256"]);
    wait_until_ready(&[&one, &two]);
    let wanted = connections(0..1500);
    let mut producers = one.producers();
    push_all(&mut producers, wanted.values());
    wait_for("member 2 is full, and member 1 says how many have no copy", SOON, || {
        let copies = two.counter(Counter::ConnectionsBackup);
        copies > 200
            && two.counter(Counter::TableFull) > 0
            && two.counter(Counter::SlotsLeased) == 0
            && one.counter(Counter::ConnectionsActive) == 1500
            && one.counter(Counter::Exposure) == 1500 - copies
            && one.counter(Counter::NoLease) > 0
    });
    let kept = copies(&two).unwrap();
    assert_eq!(kept.len() as u64, two.counter(Counter::ConnectionsBackup));

    // What it has can still change.
    let mut wanted = wanted;
    for original in kept.keys() {
        let mut c = wanted[original];
        c.state.mark ^= 0x8000_0000;
        wanted.insert(*original, c);
        push(&mut producers, &SourceEvent::seen(c));
    }
    producers.flush();
    wait_for("a full table takes changes", SOON, || {
        copies(&two).is_ok_and(|now| {
            now.len() == kept.len()
                && now.iter().all(|(original, copy)| copy.connection == wanted[original])
        })
    });

    let three = lab.start(3, &[1, 2], &["--shards", "1"]);
    wait_until_ready(&[&one, &three]);
    wait_for_agreement(
        "the rest is at member 3",
        &[&one, &two, &three],
        &wanted,
        Duration::from_secs(30),
    );
}
