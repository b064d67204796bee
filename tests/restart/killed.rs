//! SIGKILL and a new start, under a load whose producer notices nothing.

use hypersync::conn::Kind;
use hypersync::counters::Counter;
use hypersync::shm::group::Standing;
use hypersync::source::SourceEvent;

use crate::common::copies::{connection, copies, push, push_all, wait_for_agreement};
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
    let mut load = Load::start(&one);
    wait_for_agreement("the lasting ones are on both", &[&one, &two], &stable(), SOON);
    let places = [copies(&one), copies(&two)].map(|all| all.unwrap());
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
        assert_eq!((member.counter(Counter::MembersDied), member.counter(Counter::StreamsLost)), (0, 0));
        assert!(!member.events().iter().any(|event| event.contains("dead")), "{:?}", member.events());
    }
}

#[test]
fn after_the_dead_time_the_pair_compares_and_sends_differences_only() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2], &["--shards", "2"]);
    let two = lab.start(2, &[1], &["--shards", "1"]);
    wait_until_ready(&[&one, &two]);
    let mut load = Load::start(&one);
    wait_for_agreement("the lasting ones are on both", &[&one, &two], &stable(), SOON);
    let places = [copies(&one), copies(&two)].map(|all| all.unwrap());
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
    wait_for("member 2 gives the stream to member 1 up", SOON, || two.counter(Counter::StreamsLost) > 0);
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
