//! Faults of a member: stopped for a second, two with one number; and a group of one.

use std::time::{Duration, Instant};

use hypersync::conn::Kind;
use hypersync::counters::Counter;
use hypersync::group::view::Status;

use crate::churn::{Churn, slots_of};
use crate::common::may_make_namespaces;
use crate::common::member::{SOON, wait_until_ready};
use crate::common::wait_for;
use crate::field::{AGREE_WITHIN, Field, memory_kb, process_state};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_member_that_stands_still_for_a_second_is_taken_for_dead_and_all_agree_after_it() {
    if !may_make_namespaces("a member that is stopped for a second") {
        return;
    }
    // Back before anything agreed was let go, and after it.
    for (reprotect_after, keeps_streams) in [("5s", true), ("300ms", false)] {
        let field = Field::build(2); // In the same place they would go on with the tables of the first time.
        let words = ["--reprotect-after", reprotect_after];
        let (one, two) = (field.start(1, &words), field.start(2, &words));
        let members = [&one, &two];
        wait_until_ready(&members);
        let mut churn = Churn::begin(&members);
        churn.go_on(SECOND);
        let lost = one.counter(Counter::StreamsLost);
        two.signal(libc::SIGSTOP);
        let stopped = Instant::now();
        wait_for("it stands still", SOON, || process_state(two.pid()) == 'T');
        let dead = churn.go_on_until("the other takes it for dead", SOON, || {
            one.sees(2) == Status::Dead && one.was_told("member-dead 2")
        });
        churn.go_on_until("a second has passed", SOON, || {
            let lost = one.counter(Counter::StreamsLost) - lost;
            stopped.elapsed() >= SECOND && (keeps_streams || lost > 0)
        });
        let stood = stopped.elapsed();
        assert_eq!(process_state(two.pid()), 'T');
        two.signal(libc::SIGCONT);
        let ready = churn.go_on_until("both are backups again", SOON, || {
            process_state(two.pid()) != 'T'
                && one.sees(2) == Status::Ready
                && two.sees(1) == Status::Ready
        });
        churn.go_on(SECOND);
        churn.finish(&members);
        println!(
            "stopped for {} ms, reprotect after {reprotect_after}: dead after {} ms, ready {} ms after it went on; \
             streams lost {}",
            stood.as_millis(),
            dead.as_millis(),
            ready.as_millis(),
            one.counter(Counter::StreamsLost) - lost
        );
        churn.settle(
            &format!("stopped, reprotect after {reprotect_after}"),
            &members,
            AGREE_WITHIN,
        );
        for member in members {
            assert_eq!(member.counter(Counter::Claims), 0, "no traffic moved");
        }
    }
}

#[test]
fn of_two_with_one_number_the_first_stays_and_the_second_comes_after_its_death() {
    if !may_make_namespaces("two members with one number") {
        return;
    }
    let field = Field::build(3);
    let (one, mut first) = (field.start(1, &[]), field.start(2, &[]));
    wait_until_ready(&[&one, &first]);
    let mut churn = Churn::begin(&[&one, &first]);
    let second = field.start_at(3, 2, &[]);
    let said = format!("two hosts are member 2: {} is ignored", Field::address(3));
    let told = churn.go_on_until("the others say it", SOON, || one.log().contains(&said));
    let own = |address: u8| format!("another host, {}, also is member 2", Field::address(address));
    churn.go_on_until("both of them say it", SOON, || {
        first.log().contains(&own(3)) && second.log().contains(&own(2))
    });
    println!("two with one number: told after {} ms", told.as_millis());
    churn.add(3, &second);
    churn.ramp();
    churn.go_on(SECOND);
    assert!(
        one.counter(Counter::DuplicateMember) > 0 && first.counter(Counter::DuplicateMember) > 0
    );
    assert!(!one.was_told("member-dead 2"), "the first stays");
    assert!(first.counter(Counter::ConnectionsBackup) > 0, "the first is a backup");
    // What the second has is exposed and not copied; it does not disturb the two.
    assert_eq!(slots_of(&second, Kind::Backup), 0, "nobody sends to the second");
    let counted = (second.counter(Counter::Exposure), second.counter(Counter::ConnectionsActive));
    assert!(
        counted.0 > 0 && counted.0 * 10 >= counted.1 * 9,
        "exposed and active at the second: {counted:?}"
    );
    churn.finish(&[&one]);
    wait_for("nothing of the first is exposed", SOON, || {
        first.counter(Counter::Exposure) == 0 && first.counter(Counter::ConnectionsHeld) == 0
    });
    let died = Instant::now();
    first.kill();
    wait_for("the second is let in", SOON, || {
        one.sees(2) == Status::Ready
            && one.view().group().read(2).is_some_and(|m| m.address == Some(Field::address(3)))
            && second.sees(1) == Status::Ready
    });
    println!("two with one number: let in {} ms after the first died", died.elapsed().as_millis());
    assert_eq!(one.counter(Counter::MembersDied), 1, "the first died");
    assert!(!one.was_told("member-dead 2"), "its number lives: {:?}", one.events());
    churn.inherit(2, 1);
    churn.settle("two with one number, one left", &[&one, &second], AGREE_WITHIN);
}

#[test]
fn a_group_of_one_is_ready_exposed_and_flat_until_a_second_comes() {
    if !may_make_namespaces("a group of one") {
        return;
    }
    let field = Field::build(2);
    let one = field.start(1, &[]);
    wait_for("it is ready", SOON, || one.was_told("self-ready 1"));
    let mut churn = Churn::begin(&[&one]);
    churn.go_on(SECOND);
    let before = (memory_kb(one.pid()), slots_of(&one, Kind::Free));
    churn.go_on(SECOND * 4);
    let after = (memory_kb(one.pid()), slots_of(&one, Kind::Free));
    println!(
        "a group of one: RSS (all, private) KB and free slots {before:?}, 4 s later {after:?}"
    );
    assert!(after.0.0 <= before.0.0 + 1024 && after.0.1 <= before.0.1 + 256, "memory grows");
    assert!(after.1 + 100 > before.1, "slots pile up");
    let open = churn.wanted().len() as u64;
    wait_for("all past the hold time is exposed, but what closes early", SOON, || {
        let exposed = one.counter(Counter::Exposure);
        one.counter(Counter::ConnectionsHeld) == 0
            && exposed == one.counter(Counter::ConnectionsActive)
            && exposed > 0
    });
    let (exposed, unprotected) =
        (one.counter(Counter::Exposure), one.counter(Counter::Unprotected));
    println!(
        "a group of one: {open} connections open, {exposed} exposed, {unprotected} of them without a backup"
    );
    assert!(exposed.abs_diff(open) <= 1 && unprotected == exposed, "no more, no less");
    let sent = [Counter::DatagramsSent, Counter::BytesSent, Counter::DeltasNew, Counter::AcksSent];
    assert!(sent.iter().all(|counter| one.counter(*counter) == 0), "there is nobody to send to");
    assert!(one.counter(Counter::HeartbeatsSent) > 0);

    let two = field.start(2, &[]);
    let members = [&one, &two];
    let copied = churn.go_on_until("it is a backup, and everything is copied", SOON, || {
        one.sees(2) == Status::Ready
            && two.counter(Counter::ConnectionsBackup) * 10
                > one.counter(Counter::ConnectionsActive) * 9
    });
    println!(
        "a group of one: nearly all is copied {} ms after the second's start",
        copied.as_millis()
    );
    churn.finish(&members);
    churn.settle("a group of one, then two", &members, AGREE_WITHIN);
}
