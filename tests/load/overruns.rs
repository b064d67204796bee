//! Events that are lost, and events that are many.

use std::collections::HashSet;
use std::time::Duration;

use hypersync::conn::{Kind, Tuple};
use hypersync::counters::Counter;

use crate::common::copies::copies;
use crate::common::member::{Member, wait_until_ready};
use crate::common::{may_make_namespaces, wait_for};
use crate::conntrack::{Churn, Hand, Plan, Table, connections, difference, table};
use crate::gateways::{Gateways, LATEST, SHARDS, check_dumps, is_protected, print_passes, stays};

/// What a member's table holds as its own connections.
fn own(member: &Member) -> Result<HashSet<Tuple>, String> {
    let is_own = |kind| matches!(kind, Kind::Held | Kind::Active);
    Ok(copies(member)?
        .into_iter()
        .filter(|(_, copy)| is_own(copy.kind))
        .map(|(name, _)| name)
        .collect())
}

fn names(table: &Table) -> HashSet<Tuple> {
    table.keys().copied().collect()
}

/// Nothing of this member is left to dump, and for two seconds nothing is.
fn no_more_dumps(member: &Member) {
    let dumps = member.counter(Counter::SourceDumps);
    stays("no dump without a loss", Duration::from_secs(2), || {
        member.counter(Counter::SourceDumps) == dumps
    });
    println!(
        "member {}: {} events lost, {dumps} dumps",
        member.id,
        member.counter(Counter::SourceOverruns)
    );
}

#[test]
fn lost_events_are_repaired_in_both_directions_at_both_gateways() {
    if !may_make_namespaces("events that are lost") {
        return;
    }
    let gateways = Gateways::build(2);
    // The buffer takes about a hundred events; so that the loss is certain, the process stands
    // still while they come, for less than the dead time.
    let extra = ["--event-buffer", "65536", "--dead-after", "20"];
    let (one, two) = (gateways.start(1, &extra), gateways.start(2, &extra));
    wait_until_ready(&[&one, &two]);
    let (kernel1, kernel2) = (gateways.gateway(1), gateways.gateway(2));
    let mut hand = Hand::on(kernel1);
    let paused = |member: &Member, work: &mut dyn FnMut()| {
        member.signal(libc::SIGSTOP);
        work();
        member.signal(libc::SIGCONT);
    };
    let is_whole = |count: usize| {
        is_protected(&one, count as u64)
            && two.counter(Counter::CommitMissing) == 0
            && two.counter(Counter::ConnectionsBackup) == count as u64
            && table(kernel1).len() == count
            && difference(&table(kernel1), &table(kernel2)).is_none()
    };
    // Only opened a few at a time, so that nothing is lost yet.
    for some in 0..40 {
        hand.open(connections(some * 50..some * 50 + 50));
        wait_for("these are read", LATEST, || {
            own(&one).is_ok_and(|o| o.len() == (some as usize + 1) * 50)
        });
    }
    wait_for("the first connections are copied", LATEST, || is_whole(2000));
    let lost = || one.counter(Counter::SourceOverruns);
    assert_eq!((lost(), one.counter(Counter::SourceDumps)), (0, SHARDS), "nothing was lost so far");

    paused(&one, &mut || {
        hand.close(connections(0..1000));
        hand.open(connections(2000..5000));
        hand.close(connections(2000..3000));
    });
    wait_for("both kernels have what was opened, and not what was closed", LATEST, || {
        is_whole(3000)
    });
    let wanted: HashSet<Tuple> =
        connections((1000..2000).chain(3000..5000)).map(|c| c.original).collect();
    assert_eq!(names(&table(kernel1)), wanted);
    assert_eq!(own(&one).as_ref(), Ok(&wanted));
    assert!(lost() > 2500, "{} events were lost", lost());
    assert!(one.counter(Counter::SourceDumps) > SHARDS);
    no_more_dumps(&one);

    // At the backup the lost events tell that entries of copies are gone.
    let mut stranger = Hand::on(kernel2);
    paused(&two, &mut || stranger.close(connections(1000..2000)));
    wait_for("the backup writes again what was removed", LATEST, || is_whole(3000));
    assert!(two.counter(Counter::SourceOverruns) > 100);
    no_more_dumps(&two);
    assert_eq!(own(&two), Ok(HashSet::new()), "nothing was claimed");
    assert_eq!(one.counter(Counter::ConnectionsActive), 3000, "and nothing was closed");
    print_passes(&one);
    print_passes(&two);
}

#[test]
fn of_a_hundred_thousand_events_a_second_none_stays_lost() {
    if !may_make_namespaces("a hundred thousand events a second") {
        return;
    }
    const WRITERS: u32 = 2;
    const EACH: u32 = 120_000;
    let gateways = Gateways::build(2);
    let (one, two) = (gateways.start(1, &[]), gateways.start(2, &[]));
    wait_until_ready(&[&one, &two]);
    let plan = Plan { rate: 30_000, first: 0, open: 3_000, keep_one_of: 50, most: EACH };
    let churns: Vec<Churn> = (0..WRITERS)
        .map(|n| Churn::start(gateways.gateway(1), Plan { first: n * EACH, ..plan }))
        .collect();
    let mut rate = 0.0;
    let mut kept = HashSet::new();
    for churn in churns {
        let done = churn.wait();
        rate += (done.opened + done.closed) as f64 / done.took.as_secs_f64();
        kept.extend(connections(done.kept.iter().map(|(n, _)| *n)).map(|c| c.original));
    }
    println!("{} events a second were made, for {} connections", rate as u64, WRITERS * EACH);
    let kernel = table(gateways.gateway(1));
    assert_eq!(names(&kernel), kept, "the kernel has what was kept");
    wait_for("the appliance's table equals the kernel's", LATEST, || {
        own(&one).is_ok_and(|own| own == kept)
    });
    wait_for("everything is copied", LATEST, || is_protected(&one, kept.len() as u64));
    wait_for("and in the backup's kernel", LATEST, || {
        difference(&kernel, &table(gateways.gateway(2))).is_none()
    });
    println!(
        "{} events read, {} connections closed within the hold, {} copied",
        one.counter(Counter::SourceEvents),
        one.counter(Counter::SourceShort),
        kept.len()
    );
    check_dumps(&[&one, &two]);
    print_passes(&one);
    print_passes(&two);
}
