//! Warm restarts under churn: a member's process is killed, or asked to restart, and the next one
//! goes on with its table. Nobody asks the producers to do anything, and nothing is sent that the
//! others have.

use std::process::ExitStatus;
use std::time::Duration;

use hypersync::counters::Counter;
use hypersync::group::view::Status;

use crate::churn::{CONNECTIONS, Churn};
use crate::common::may_make_namespaces;
use crate::common::member::{Member, SOON, dies_with_us, hypersync, wait_until_ready};
use crate::field::{AGREE_WITHIN, Field};

const SECOND: Duration = Duration::from_secs(1);

/// What tells a full sync from a comparison, of one member; these live as long as its table.
const COUNTED: [(&str, Counter); 6] = [
    ("deltas_new", Counter::DeltasNew),
    ("compare_items", Counter::CompareItems),
    ("compare_resent", Counter::CompareResent),
    ("compare_offered", Counter::CompareOffered),
    ("catch_up_datagrams", Counter::CatchUpDatagrams),
    ("datagrams_resent", Counter::DatagramsResent),
];

fn counted(member: &Member) -> [u64; COUNTED.len()] {
    COUNTED.map(|(_, counter)| member.counter(counter))
}

/// A pair under churn; member 2 becomes another process meanwhile, as `absence` has it.
fn story(
    what: &str,
    words: &[&str],
    absence: impl FnOnce(&Field, &Member, &mut Member, &mut Churn),
) {
    if !may_make_namespaces(what) {
        return;
    }
    let field = Field::build(2);
    let (one, mut two) = (field.start(1, words), field.start(2, words));
    wait_until_ready(&[&one, &two]);
    let mut churn = Churn::begin(&[&one, &two]);
    churn.go_on(SECOND);
    let (before, opened) = ([counted(&one), counted(&two)], churn.opened());
    let (header, held) = (*two.view().header(), two.counter(Counter::ConnectionsBackup));
    assert!(held > CONNECTIONS as u64 / 2, "there is something to be kept");
    absence(&field, &one, &mut two, &mut churn);
    assert_ne!(two.view().incarnation(), header.incarnation, "it is another process's run");
    assert_eq!(two.view().header().table_id, header.table_id, "with the same table");
    churn.go_on_until("both are ready", SOON, || {
        one.sees(2) == Status::Ready && two.sees(1) == Status::Ready
    });
    churn.go_on(SECOND);
    churn.finish(&[&one, &two]);
    churn.settle(what, &[&one, &two], AGREE_WITHIN);
    let opened = churn.opened() - opened;
    for (member, before) in [(&one, before[0]), (&two, before[1])] {
        let since: [u64; COUNTED.len()] = std::array::from_fn(|i| counted(member)[i] - before[i]);
        let told: [String; COUNTED.len()] =
            std::array::from_fn(|i| format!("{} {}", COUNTED[i].0, since[i]));
        println!(
            "{what}: member {}, {opened} opened at both since: {}",
            member.id,
            told.join(", ")
        );
        let news = since[0];
        // Half of them opened at each; a few are sent twice since they changed before the first was
        // acknowledged.
        let most = opened / 2 + CONNECTIONS as u64 / 2;
        assert!(
            news < most,
            "{news} whole connections were sent: that is a full sync, or half of one"
        );
        let lost = [member.counter(Counter::Claims), member.counter(Counter::Promotions)];
        assert_eq!(lost, [0, 0], "no traffic moved, and nothing was taken over");
    }
}

/// Kills member 2 and starts it again with the same words once `is_over`.
fn kill(
    field: &Field,
    two: &mut Member,
    words: &[&str],
    churn: &mut Churn,
    mut is_over: impl FnMut() -> bool,
) {
    let pid = two.pid();
    two.kill();
    churn.go_on_until("it was away for long enough", SOON, &mut is_over);
    *two = field.start(2, words);
    assert_ne!(two.pid(), pid);
}

#[test]
fn killed_under_churn_and_back_within_the_dead_time() {
    let words = ["--dead-after", "50"];
    story("killed, back within the dead time", &words, |field, one, two, churn| {
        let mut rounds = 0;
        kill(field, two, &words, churn, || {
            rounds += 1;
            rounds > 15
        });
        assert!(one.log().contains("member-ready 2") && one.sees(2).is_alive());
        churn.go_on(SECOND);
        assert_eq!(one.counter(Counter::MembersDied), 0, "it was a pause");
        assert!(!one.was_told("member-dead 2"));
    });
}

#[test]
fn killed_under_churn_and_back_after_the_dead_time() {
    for (what, reprotect_after, is_lost) in [
        ("killed, back after the dead time", "20s", false),
        ("killed, back after its streams were lost", "300ms", true),
    ] {
        let words = ["--reprotect-after", reprotect_after];
        story(what, &words, |field, one, two, churn| {
            kill(field, two, &words, churn, || {
                one.was_told("member-dead 2")
                    && one.sees(2) == Status::Dead
                    && (one.counter(Counter::StreamsLost) > 0) == is_lost
            });
            assert_eq!(one.counter(Counter::MembersDied), 1);
        });
    }
}

#[test]
fn restarted_under_churn_as_announced() {
    story("hypersync restart", &[], |_, one, two, churn| {
        let mut command = hypersync();
        command.arg("restart").arg("--shm").arg(&two.shm).args(["--within", "20s"]);
        // Its line would stand in the middle of the test program's own.
        command.stdout(std::process::Stdio::null());
        let mut asking = dies_with_us(&mut command).spawn().expect("the program is built");
        let mut status: Option<ExitStatus> = None;
        let took = churn.go_on_until("it is back", SOON, || {
            status = asking.try_wait().expect("a child can be asked");
            status.is_some()
        });
        assert!(status.is_some_and(|status| status.success()), "{status:?}");
        println!("hypersync restart: {} ms, process {}", took.as_millis(), two.pid());
        churn.go_on(SECOND);
        assert!(!one.was_told("member-dead 2") && one.counter(Counter::MembersDied) == 0);
    });
}
