//! The two sysctls that hypersync changes are the operator's again once it is gone, however it
//! went.

use std::fs;
use std::process::Command;

use crate::common::may_make_namespaces;
use crate::common::member::{Lab, Member, SOON, hypersync, with, words};
use crate::common::namespace::{Namespace, unique_prefix};
use crate::common::run;

const SYSCTLS: [&str; 2] = ["nf_conntrack_events", "nf_conntrack_tcp_be_liberal"];

/// A host that has a sync address of its own; events are 2, be_liberal is 0.
fn host() -> Namespace {
    let host = Namespace::new(&unique_prefix(), "host");
    host.ip("address add 10.9.0.1/24 dev lo");
    for (name, value) in SYSCTLS.iter().zip(["2", "0"]) {
        host.sysctl(&format!("net/netfilter/{name}"), value);
    }
    host
}

fn settings(host: &Namespace) -> [u64; 2] {
    host.inside(|| {
        SYSCTLS.map(|name| {
            let text =
                fs::read_to_string(format!("/proc/sys/net/netfilter/{name}")).expect("it exists");
            text.trim().parse().expect("a number")
        })
    })
}

fn start(lab: &Lab, host: &Namespace, sysctl: &str) -> Member {
    let address = "10.9.0.1".parse().expect("an address");
    let of_kernel =
        ["--source", "kernel", "--shards", "1", "--peer", "10.9.0.2", "--sysctl", sysctl];
    let mut command = host.command("env");
    command.arg(hypersync().get_program());
    Member::start(lab, "m1", 1, command, &with(words(1, address), &of_kernel))
}

fn stop(mut member: Member) {
    member.signal(libc::SIGTERM);
    assert!(member.end(SOON).success());
}

fn state(lab: &Lab, json: bool) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypersync-inspect"));
    command.arg("--shm").arg(lab.path("m1")).arg("state").args(json.then_some("--json"));
    run(&mut command)
}

#[test]
fn sysctls_that_a_killed_member_changed_are_put_back_by_the_next_one() {
    if !may_make_namespaces("sysctls after a crash") {
        return;
    }
    let (lab, host) = (Lab::new(), host());
    for _ in 0..2 {
        let mut killed = start(&lab, &host, "set");
        assert_eq!(settings(&host), [1, 1]);
        assert!(!state(&lab, false).contains("putting it back"), "all is well as long as it runs");
        killed.kill();
        assert_eq!(settings(&host), [1, 1]);
        let said = state(&lab, false);
        for (name, old) in SYSCTLS.iter().zip([2, 0]) {
            let line = format!(
                "sysctl net.netfilter.{name}: was {old} before; the process ended without putting it back: \
                 the next start takes care of it, or: sysctl -w net.netfilter.{name}={old}"
            );
            assert!(said.lines().any(|l| l == line), "{line} is not in\n{said}");
        }
    }
    // One that is not to touch them leaves them, and what is known of them.
    let leaving = start(&lab, &host, "leave");
    stop(leaving);
    assert_eq!(settings(&host), [1, 1]);
    assert!(
        state(&lab, true).contains(r#""sysctls_before":{"net.netfilter.nf_conntrack_events":2,"#)
    );

    let last = start(&lab, &host, "set");
    assert_eq!(settings(&host), [1, 1]);
    let said = last.log();
    assert!(
        said.contains("did not put sysctl net.netfilter.nf_conntrack_events back: it will be 2"),
        "{said}"
    );
    stop(last);
    assert_eq!(settings(&host), [2, 0]);
    assert!(state(&lab, true).contains(r#""sysctls_before":{}"#), "nothing is left to do");
}

#[test]
fn sysctls_are_left_alone_if_so_told_and_the_log_says_which_are_wrong() {
    if !may_make_namespaces("--sysctl leave") {
        return;
    }
    let (lab, host) = (Lab::new(), host());
    let member = start(&lab, &host, "leave");
    assert_eq!(settings(&host), [2, 0]);
    let said = member.log();
    for (name, now) in SYSCTLS.iter().zip([2, 0]) {
        let line = format!("need sysctl net.netfilter.{name}=1; it is {now}: set it");
        assert!(said.contains(&line), "{line} is not in\n{said}");
    }
    stop(member);
    assert_eq!(settings(&host), [2, 0]);
}

#[test]
fn sysctls_stay_set_through_a_restart_and_the_next_process_puts_them_back() {
    if !may_make_namespaces("sysctls through a restart") {
        return;
    }
    let (lab, host) = (Lab::new(), host());
    let member = start(&lab, &host, "set");
    let mut command = hypersync();
    run(command.arg("restart").arg("--shm").arg(lab.path("m1")));
    assert_eq!(settings(&host), [1, 1]);
    stop(member);
    assert_eq!(settings(&host), [2, 0]);
}
