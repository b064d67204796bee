//! What a kernel does not take.

use std::time::Duration;

use hypersync::conn::{Connection, Tuple};
use hypersync::conntrack::commit::Committer;
use hypersync::counters::Counter;

use crate::common::member::{Member, wait_until_ready};
use crate::common::{may_make_namespaces, wait_for};
use crate::conntrack::{Hand, connection, connections, count, difference, established, table};
use crate::gateways::{Gateways, LATEST, SHARDS, check_dumps, is_protected, stays};

/// The limit of every kernel table on this host; put back when dropped.
struct Limit(String);

impl Limit {
    const PATH: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

    fn now() -> Limit {
        Limit(std::fs::read_to_string(Limit::PATH).expect("conntrack"))
    }

    fn set(&self, limit: u64) {
        // Writable in the first namespace only, which is where this process is.
        std::fs::write(Limit::PATH, limit.to_string()).expect("the first namespace");
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        std::fs::write(Limit::PATH, &self.0).expect("it was writable");
    }
}

/// Nobody was taken for dead.
fn all_lived(members: &[&Member]) {
    for member in members {
        assert_eq!(member.counter(Counter::MembersDied), 0, "member {} heard a silence", member.id);
    }
}

#[test]
fn a_full_kernel_table_declines_copies_until_there_is_room() {
    if !may_make_namespaces("a full kernel table") {
        return;
    }
    const OWN: u64 = 40_000;
    const FIRST: u32 = 1000;
    const ALL: u32 = 3000;
    // Two shards that look at the same moment both see the room that is left, for a batch each.
    const ROOM: u64 = 100 + SHARDS * Committer::BATCH as u64;
    let gateways = Gateways::build(2);
    let (one, two) = (gateways.start(1, &[]), gateways.start(2, &[]));
    wait_until_ready(&[&one, &two]);
    let (kernel1, kernel2) = (gateways.gateway(1), gateways.gateway(2));
    // Gateway 2 has many connections of its own, which are never copied.
    let own = |n: u32| {
        let from = ([10, 9, 0, 2].into(), (1024 + n % 50_000) as u16);
        let original = Tuple::v4(6, from, ([10, 8, 0, 1].into(), 443));
        established(original, original.mirrored())
    };
    Hand::on(kernel2).open((0..OWN as u32).map(own));
    let mut hand = Hand::on(kernel1);
    hand.open(connections(0..FIRST));
    wait_for("the first are copied", LATEST, || {
        is_protected(&one, FIRST as u64) && count(kernel2) == OWN + FIRST as u64
    });

    // Room for 100 more below 90 %. The limit is that of all tables on this host: not for longer
    // than needed.
    let limit = Limit::now();
    limit.set((OWN + FIRST as u64 + 100) * 10 / 9);
    hand.open(connections(FIRST..ALL));
    wait_for("copies are refused, and their active knows", LATEST, || {
        let exposed = one.counter(Counter::Exposure);
        let missing = two.counter(Counter::CommitMissing);
        one.counter(Counter::ConnectionsActive) == ALL as u64
            && two.counter(Counter::CommitNoRoom) > 0
            && missing > 0
            && one.counter(Counter::Declined) == missing
            && exposed == missing + one.counter(Counter::Unprotected)
            && exposed >= (ALL - FIRST) as u64 - ROOM
    });
    println!(
        "of {ALL} connections {} have no entry in the backup's kernel: {} declined, {} without a backup; {} refusals",
        one.counter(Counter::Exposure),
        one.counter(Counter::Declined),
        one.counter(Counter::Unprotected),
        two.counter(Counter::CommitNoRoom)
    );
    stays("the table is as full as it may be made, and no fuller", Duration::from_secs(1), || {
        count(kernel2) <= OWN + FIRST as u64 + ROOM
    });
    let there = table(kernel2);
    let is_there = |c: Connection| there.contains_key(&c.original);
    assert!((0..OWN as u32).map(own).all(is_there), "its own connections stay");
    assert!(connections(0..FIRST).all(is_there), "and the copies that it had");
    all_lived(&[&one, &two]);

    drop(limit);
    wait_for("there is room again, and every copy is written", Duration::from_secs(15), || {
        is_protected(&one, ALL as u64)
            && one.counter(Counter::Declined) == 0
            && two.counter(Counter::CommitMissing) == 0
            && count(kernel2) == OWN + ALL as u64
    });
    all_lived(&[&one, &two]);
    check_dumps(&[&one, &two]);
}

const CONNECTIONS: u32 = 1000;
const CLASHING: u32 = 200;

/// A connection of gateway 2 itself that has the translated tuple of the n-th connection.
fn rival(n: u32) -> Connection {
    let reply = connection(n).reply;
    established(reply.mirrored(), reply)
}

/// Makes gateway 2's kernel hold what the first copies would be translated to.
fn occupy(gateways: &Gateways) -> Hand {
    let kernel2 = gateways.gateway(2);
    kernel2.ip("address add 10.3.0.1/32 dev lo");
    let mut hand = Hand::on(kernel2);
    hand.open((0..CLASHING).map(rival));
    hand
}

#[test]
fn copies_whose_translation_is_in_use_are_exposed_until_it_is_free() {
    if !may_make_namespaces("clashing translations") {
        return;
    }
    let gateways = Gateways::build(2);
    let mut rivals = occupy(&gateways);
    let (one, two) = (gateways.start(1, &[]), gateways.start(2, &[]));
    wait_until_ready(&[&one, &two]);
    let (kernel1, kernel2) = (gateways.gateway(1), gateways.gateway(2));
    Hand::on(kernel1).open(connections(0..CONNECTIONS));
    let clashing = CLASHING as u64;
    let is_told = || {
        one.counter(Counter::ConnectionsActive) == CONNECTIONS as u64
            && one.counter(Counter::Declined) == clashing
            && one.counter(Counter::Exposure) == clashing
    };
    // While copies are tried again they do not count as missing for a moment, and the kernel counts
    // them.
    wait_for("the clashes are told, the other copies written", LATEST, || {
        is_told()
            && two.counter(Counter::CommitMissing) == clashing
            && count(kernel2) == CONNECTIONS as u64
    });
    stays("they stay exposed", Duration::from_secs(2), is_told);
    assert!(two.counter(Counter::CommitClashes) >= clashing);
    println!("{} clashes counted for {CLASHING} copies", two.counter(Counter::CommitClashes));

    rivals.close((0..CLASHING).map(rival));
    wait_for(
        "the translations are free, and the copies are written",
        Duration::from_secs(15),
        || is_protected(&one, CONNECTIONS as u64) && two.counter(Counter::CommitMissing) == 0,
    );
    assert_eq!(difference(&table(kernel1), &table(kernel2)), None);
    check_dumps(&[&one, &two]);
}

#[test]
fn copies_whose_translation_is_in_use_move_to_a_third_member() {
    if !may_make_namespaces("clashing translations among three") {
        return;
    }
    let gateways = Gateways::build(3);
    let _rivals = occupy(&gateways);
    let (one, two) = (gateways.start(1, &[]), gateways.start(2, &["--priority", "200"]));
    let three = gateways.start(3, &["--priority", "50"]);
    wait_until_ready(&[&one, &two, &three]);
    Hand::on(gateways.gateway(1)).open(connections(0..CONNECTIONS));
    wait_for("every connection has a copy that can carry it", LATEST, || {
        is_protected(&one, CONNECTIONS as u64) && three.counter(Counter::CommitMissing) == 0
    });
    assert!(two.counter(Counter::CommitClashes) > 0);
    let (second, third) = (table(gateways.gateway(2)), table(gateways.gateway(3)));
    for c in connections(0..CLASHING) {
        let is_copied = third.get(&c.original).is_some_and(|there| there.reply == c.reply);
        assert!(is_copied, "the third member's kernel has {}", c.original);
    }
    for c in connections(CLASHING..CONNECTIONS) {
        assert!(
            second.contains_key(&c.original) != third.contains_key(&c.original),
            "{} is in one of them",
            c.original
        );
    }
    println!(
        "of {CONNECTIONS} copies, {CLASHING} clashing, {} are at the third member",
        third.len()
    );
    check_dumps(&[&one, &two, &three]);
}
