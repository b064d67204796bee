//! A warm restart, as a shard's end of the kernel sees it: the table is there, nobody listened for
//! a while, and what waited to be written or removed in the process before is lost.
//!
//! The table is that of a member of a pair in one process, whose commits went nowhere; the kernel
//! is real.

use std::time::Duration;

use hypersync::conn::Kind;
use hypersync::conntrack::commit::KEPT_TIMEOUT_S;
use hypersync::conntrack::local::LocalAddresses;
use hypersync::counters::{Counter, Counters};
use hypersync::feed::{Feed, KernelParts};
use hypersync::memory::OwnedMemory;
use hypersync::rules::Rules;
use hypersync::source::CommitMode;
use hypersync::time::Time;

use super::world::{HOLD, World, memories};
use super::*;

static ADDRESSES: LocalAddresses = LocalAddresses::new();

/// The kernel's timeout of an established connection.
const ESTABLISHED_S: u32 = 432_000;

/// Members 1 and 2, with 20 connections at the first and 10 at the second.
fn pair(memories: &[OwnedMemory]) -> World<'_> {
    let mut world = World::new(7, memories);
    world.start(1, 1, 100);
    world.start(2, 1, 100);
    world.run_for(Duration::from_millis(500));
    (0..20).for_each(|_| _ = world.open_at(1));
    (0..10).for_each(|_| _ = world.open_at(2));
    world.run_for(HOLD + Duration::from_millis(100));
    world
}

/// The connections of this kind at member 2, in the order of their slots.
fn at_two(world: &World<'_>, kind: Kind) -> Vec<Connection> {
    let table = world.hosts[&2].shards[0].table();
    (0..table.capacity()).filter(|s| table.kind(*s) == kind).map(|s| table.connection(s)).collect()
}

fn counter(world: &World<'_>, counter: Counter) -> u64 {
    Counters::new(world.hosts[&2].memory[0].counters).get(counter)
}

/// Member 2's end of the kernel of this thread's namespace.
fn feed(world: &World<'_>, resumed: bool) -> Feed<'static> {
    let committer = Committer::open().expect("conntrack");
    Feed::kernel(KernelParts {
        source: Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack"),
        committer,
        addresses: &ADDRESSES,
        rules: Rules::default(),
        commit: CommitMode::Eager,
        may_be_unheard: false,
        verify: Duration::ZERO,
        resumed,
        capacity: world.hosts[&2].shards[0].table().capacity(),
    })
}

/// A second of passes a millisecond apart, with or without the stage that writes and asks.
fn run_passes(world: &mut World<'_>, feed: &mut Feed<'_>, commits: bool) {
    let start = world.now;
    let host = world.host(2);
    let counters = Counters::new(host.memory[0].counters);
    for pass in 1..=1000 {
        let now: Time = start.after(Duration::from_millis(pass));
        feed.ingest(now, &mut host.shards[0], &counters);
        if commits {
            feed.commit(now, &mut host.shards[0], &counters);
        }
    }
    world.now = start.after(Duration::from_secs(1));
}

fn put(connections: &[Connection], lifetime: Lifetime) {
    let mut committer = Committer::open().expect("conntrack");
    for connection in connections {
        committer.write(connection, lifetime).expect("a batch of one");
        assert_eq!(outcomes(&mut committer), [Outcome::Written]);
    }
}

/// The kernel's entry of this connection.
fn entry(original: &Tuple) -> Option<Connection> {
    let mut committer = Committer::open().expect("conntrack");
    committer.look(original).expect("an empty batch");
    match outcomes(&mut committer)[..] {
        [Outcome::Present(connection)] => Some(connection),
        [Outcome::Absent] => None,
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn after_a_warm_restart_the_kernel_and_the_table_are_brought_together() {
    in_namespace("a warm restart on conntrack", || {
        let memories = memories(2);
        let mut world = pair(&memories);
        let (copies, own) = (at_two(&world, Kind::Backup), at_two(&world, Kind::Active));
        assert_eq!((copies.len(), own.len()), (20, 10));
        // Of the copies, some were written, one of them with a mark of long ago; the others waited.
        put(&copies[..10], Lifetime::Kept);
        let old = Connection { state: State { mark: 1234, ..copies[3].state }, ..copies[3] };
        put(&[old], Lifetime::Kept);
        // Of our own one is closed, one closes, and one is new.
        put(&own[1..], Lifetime::Normal);
        let closing = Connection { state: State { tcp_state: 5, ..own[1].state }, ..own[1] };
        put(&[closing], Lifetime::Normal);
        put(&[numbered(0)], Lifetime::Normal);
        // A copy that was closed while its delete waited.
        put(&[numbered(1)], Lifetime::Kept);

        let mut feed = feed(&world, true);
        run_passes(&mut world, &mut feed, false);
        assert!(!feed.is_complete(), "what the dump did not show is not known yet");
        run_passes(&mut world, &mut feed, true);
        assert!(feed.is_complete());

        for copy in &copies {
            let there = entry(&copy.original).expect("every copy is in the kernel");
            assert_eq!((there.reply, there.state.mark), (copy.reply, copy.state.mark));
            assert!(there.state.timeout_s > KEPT_TIMEOUT_S - 60);
        }
        assert_eq!(counter(&world, Counter::VerifyMissing), 10);
        assert_eq!(counter(&world, Counter::VerifyDiffered), 1);
        assert_eq!(
            counter(&world, Counter::VerifyWalks),
            1,
            "without --verify there is this walk only"
        );
        let table = world.hosts[&2].shards[0].table();
        assert_eq!(table.find_original(&own[0].original), None, "it was closed");
        let slot = table.find_original(&own[1].original).expect("it lives");
        assert_eq!(table.line(slot).state().tcp_state, 5);
        let slot = table.find_original(&numbered(0).original).expect("it was found");
        assert_eq!(table.kind(slot), Kind::Held);
        assert_eq!(at_two(&world, Kind::Backup).len(), 20, "an entry in the dump is no claim");
        assert_eq!(entry(&numbered(1).original), None, "the delete that was owed");
        assert_eq!(counter(&world, Counter::LeftoversDeleted), 1);
    });
}

#[test]
fn after_a_cold_start_what_an_earlier_run_left_stays() {
    in_namespace("a cold start on conntrack", || {
        let memories = memories(2);
        let mut world = pair(&memories);
        put(&[numbered(1)], Lifetime::Kept);
        let mut feed = feed(&world, false);
        run_passes(&mut world, &mut feed, true);
        assert!(feed.is_complete());
        assert!(entry(&numbered(1).original).is_some());
        let counted =
            [Counter::SourceLeftovers, Counter::LeftoversDeleted].map(|c| counter(&world, c));
        assert_eq!(counted, [1, 0]);
    });
}

#[test]
fn what_the_kernel_lacks_of_a_silent_members_connections_after_a_warm_restart_is_no_close() {
    // Its copies here are as they were, also when it is lost, for nobody else is there; or they
    // were taken over, with their backups at a third member now, and no traffic has come yet.
    for (silent_for, others, kind) in
        [(120, 1, Kind::Backup), (600, 1, Kind::Backup), (600, 2, Kind::Active)]
    {
        in_namespace("a warm restart beside a silent member", || {
            let memories = memories(1 + others);
            let mut world = pair(&memories);
            if others == 2 {
                world.start(3, 1, 50);
                world.run_for(Duration::from_millis(500));
            }
            let (copies, own) = (at_two(&world, Kind::Backup), at_two(&world, Kind::Active));
            world.kill(1);
            world.run_for(Duration::from_millis(silent_for));
            let slots = |world: &World<'_>| {
                let table = world.hosts[&2].shards[0].table();
                let kinds = copies.iter().filter_map(|c| table.find_original(&c.original));
                kinds.filter(|slot| table.kind(*slot) == kind).count()
            };
            assert_eq!(slots(&world), 20);
            put(&own, Lifetime::Normal);
            put(&copies[..5], Lifetime::Normal);
            // Written when the member was alive; taken over, they must not last for weeks.
            put(
                &copies[5..10],
                if kind == Kind::Active { Lifetime::Kept } else { Lifetime::Normal },
            );
            let mut feed = feed(&world, true);
            run_passes(&mut world, &mut feed, true);
            assert!(feed.is_complete());
            assert_eq!(slots(&world), 20);
            assert_eq!(
                at_two(&world, Kind::Active).len(),
                10 + if kind == Kind::Active { 20 } else { 0 }
            );
            for copy in &copies {
                let there = entry(&copy.original).expect("it is in the kernel");
                assert!(there.state.timeout_s <= ESTABLISHED_S, "nobody but its traffic keeps it");
            }
            assert_eq!(counter(&world, Counter::VerifyMissing), 10);
        });
    }
}
