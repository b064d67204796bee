//! SIGKILL and a new start, under a load whose producer notices nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;

use hypersync::conn::{Kind, Slot};
use hypersync::counters::Counter;
use hypersync::shm::group::Standing;
use hypersync::shm::layout::shard_layout;
use hypersync::shm::{FILE, RegionView};
use hypersync::source::SourceEvent;

use crate::common::copies::{
    Wanted, agree, connection, connections, copies, push, push_all, wait_for_agreement,
};
use crate::common::member::{Lab, Member, SOON, wait_until_ready};
use crate::common::wait_for;
use crate::load::{LASTING, Load, same_places, stable};

fn is_ready(member: &Member) -> bool {
    member.view().group().shard(0).standing() == Standing::Ready
}

#[test]
fn within_the_dead_time_a_kill_is_a_pause() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2], &["--shards", "2", "--dead-after", "50"]);
    let mut two = lab.start(2, &[1], &["--shards", "1", "--dead-after", "50"]);
    wait_until_ready(&[&one, &two]);
    let (mut load, places) = Load::at_rest(&one, &two);
    load.change();
    wait_for("the load runs", SOON, || load.rounds() > 3);

    // Both roles: the one that sees the traffic, and the one that has the copies.
    for round in 0..6 {
        let (victim, id, shards, other) =
            if round % 2 == 0 { (&mut one, 1, "2", 2) } else { (&mut two, 2, "1", 1) };
        let table = victim.view().header().table_id;
        victim.kill();
        *victim = lab.start(id, &[other], &["--shards", shards, "--dead-after", "50"]);
        assert_eq!(victim.view().header().table_id, table);
        let rounds = load.rounds();
        wait_for("the producer goes on, and was not asked to", SOON, || load.rounds() > rounds + 3);
    }
    let wanted = load.stop();
    wait_for_agreement("both have the newest", &[&one, &two], &wanted, SOON);
    same_places(&places[0], &copies(&one).unwrap());
    same_places(&places[1], &copies(&two).unwrap());
    wait_for("both are ready again", SOON, || is_ready(&one) && is_ready(&two));
    for member in [&one, &two] {
        assert_eq!(
            (member.counter(Counter::MembersDied), member.counter(Counter::StreamsLost)),
            (0, 0)
        );
        assert!(
            !member.events().iter().any(|event| event.contains("dead")),
            "{:?}",
            member.events()
        );
    }
}

#[test]
fn after_the_dead_time_the_pair_compares_and_sends_differences_only() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2], &["--shards", "2"]);
    let two = lab.start(2, &[1], &["--shards", "1"]);
    wait_until_ready(&[&one, &two]);
    let (mut load, places) = Load::at_rest(&one, &two);
    let table = one.view().header().table_id;
    one.kill();
    wait_for("member 2 is told of the death", SOON, || two.was_told("member-dead 1"));
    let before = two.counter(Counter::DeltasApplied);
    one = lab.start(1, &[2], &["--shards", "2"]);
    assert_eq!(one.view().header().table_id, table);
    let sent = one.counter(Counter::DeltasNew);
    wait_for_agreement("they agree again", &[&one, &two], &stable(), SOON);
    same_places(&places[0], &copies(&one).unwrap());
    same_places(&places[1], &copies(&two).unwrap());
    let again = two.counter(Counter::DeltasApplied) - before;
    assert!(again < u64::from(LASTING) / 10, "{again} deltas for what had not changed");
    assert!(one.counter(Counter::DeltasNew) - sent < u64::from(LASTING) / 10);

    load.change();
    wait_for("the producer goes on", SOON, || load.rounds() > 3);
    let wanted = load.stop();
    wait_for_agreement("both have the newest", &[&one, &two], &wanted, SOON);
}

#[test]
fn who_comes_back_after_its_streams_were_lost_keeps_what_had_no_traffic_elsewhere() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2], &["--shards", "2"]);
    let two = lab.start(2, &[1], &["--shards", "1"]);
    wait_until_ready(&[&one, &two]);
    let mut wanted = stable();
    push_all(&mut one.producers(), wanted.values());
    wait_for_agreement("they are on both", &[&one, &two], &wanted, SOON);
    let table = one.view().header().table_id;
    one.kill();
    wait_for("member 2 gives the stream to member 1 up", SOON, || {
        two.counter(Counter::StreamsLost) > 0
    });
    // Meanwhile some have traffic at member 2.
    let mut producers = two.producers();
    for n in (0..300).step_by(3) {
        let mut c = connection(n);
        c.state.mark ^= 0xff_0000;
        push(&mut producers, &SourceEvent::seen(c));
        wanted.insert(c.original, c);
    }
    producers.flush();
    wait_for("member 2 knows", SOON, || two.counter(Counter::Claims) == 100);
    one = lab.start(1, &[2], &["--shards", "2"]);
    assert_eq!(one.view().header().table_id, table);
    wait_for_agreement("they agree again", &[&one, &two], &wanted, SOON);
    let at_two = copies(&two).unwrap();
    for n in 0..300 {
        let kind = at_two[&connection(n).original].kind;
        let expected = if n % 3 == 0 { Kind::Active } else { Kind::Backup };
        assert_eq!(kind, expected, "connection {n}: traffic decides, and nothing else");
    }
}

#[test]
fn what_was_closed_during_an_absence_is_closed_everywhere_where_that_can_be_known() {
    // Back before the streams are lost, and after it: then nobody remembers what was claimed and
    // closed.
    for (reprotect_after, is_lost) in [("20s", false), ("300ms", true)] {
        let lab = Lab::new();
        let words = |shards| ["--shards", shards, "--reprotect-after", reprotect_after];
        let mut one = lab.start(1, &[2], &words("2"));
        let two = lab.start(2, &[1], &words("1"));
        wait_until_ready(&[&one, &two]);
        let ended = if is_lost { 100..100 } else { 0..100 };
        let (theirs, own) = (connections(ended.start..400), connections(1000..1200));
        let mut wanted: Wanted = theirs.clone().into_iter().chain(own.clone()).collect();
        push_all(&mut one.producers(), theirs.values());
        let mut producers = two.producers();
        push_all(&mut producers, own.values());
        wait_for_agreement("they are on both", &[&one, &two], &wanted, SOON);
        one.kill();
        wait_for("member 2 is told of the death", SOON, || two.was_told("member-dead 1"));
        wait_for("the stream is lost, or not", SOON, || {
            (two.counter(Counter::StreamsLost) > 0) == is_lost
        });

        let mut changed = |n: u32| {
            let mut c = connection(n);
            c.state.mark ^= 0xff_0000;
            push(&mut producers, &SourceEvent::seen(c));
            c
        };
        // Traffic at member 2, and then the end of it; traffic that goes on.
        ended.clone().for_each(|n| _ = changed(n));
        for c in (100..200).map(&mut changed) {
            wanted.insert(c.original, c);
        }
        // An end without any traffic before it: member 1 has to know. And ends of member 2's own.
        for n in ended.clone().chain(200..300).chain(1000..1100) {
            let original = connection(n).original;
            push(&mut producers, &SourceEvent::gone(original));
            if !(200..300).contains(&n) {
                wanted.remove(&original);
            }
        }
        producers.flush();
        wait_for("member 2 knows", SOON, || copies(&two).is_ok_and(|all| all.len() == 300));
        assert_eq!(two.counter(Counter::Claims), 100 + ended.len() as u64);

        one = lab.start(1, &[2], &words("2"));
        wait_for_agreement("they agree again", &[&one, &two], &wanted, SOON);
        let at_two = copies(&two).unwrap();
        for n in (100..400).chain(1100..1200) {
            let is_active_at_two = at_two[&connection(n).original].kind == Kind::Active;
            assert_eq!(is_active_at_two, (100..200).contains(&n) || n >= 1100, "connection {n}");
        }
        // And nothing comes back later.
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(50));
            agree(&[&one, &two], &wanted).unwrap_or_else(|why| panic!("{why}"));
        }
    }
}

#[test]
fn a_copy_that_was_overwritten_while_its_process_was_dead_is_told_and_sent_again() {
    let lab = Lab::new();
    let words = ["--shards", "1", "--dead-after", "100"];
    let one = lab.start(1, &[2], &words);
    let mut two = lab.start(2, &[1], &words);
    wait_until_ready(&[&one, &two]);
    let wanted = stable();
    push_all(&mut one.producers(), wanted.values());
    wait_for_agreement("they are on both", &[&one, &two], &wanted, SOON);
    two.kill();
    // The marks of ten copies: bits that nobody has sent.
    let view = RegionView::open(&two.shm).expect("it lies there");
    let slots = view.shard(0).slots.iter().enumerate();
    let hurt: Vec<(usize, u32)> = slots
        .filter(|(_, slot)| slot.line().kind() == Kind::Backup)
        .map(|(at, slot)| (at, slot.line().state().mark ^ 0xbad0_0000))
        .take(10)
        .collect();
    let layout = shard_layout(&view.header().sizes, 0);
    let file = File::options().write(true).open(two.shm.join(FILE)).expect("it is ours");
    for (slot, mark) in &hurt {
        let at = layout.slots.offset + slot * size_of::<Slot>() + 4 * 8 + 4;
        file.write_all_at(&mark.to_ne_bytes(), at as u64).expect("it is ours");
        assert_eq!(view.shard(0).slots[*slot].line().state().mark, *mark, "this tests nothing");
    }
    let table = view.header().table_id;
    drop(view);
    two = lab.start(2, &[1], &words);
    assert_eq!(two.view().header().table_id, table);
    wait_for_agreement("what differs is sent again", &[&one, &two], &wanted, SOON);
    assert_eq!(one.counter(Counter::CompareResent), 10);
    assert_eq!(one.counter(Counter::MembersDied), 0, "it was no absence");
    // By the active, which knows for sure that the copy should be there.
    wait_for("it is told", SOON, || one.log().contains("is not what its active 1/0/"));
    let log = one.log();
    let lines: Vec<&str> =
        log.lines().filter(|line| line.contains("is not what its active")).collect();
    println!("{lines:#?}");
    assert!(lines.len() == 1 && lines[0].contains("] copy 2/0/"), "one line a second: {lines:?}");
}
