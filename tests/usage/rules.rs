//! Which of a kernel's connections a member takes: what the rules say, and what cannot be copied.

use std::net::IpAddr;
use std::process::Command;

use hypersync::conn::Tuple;
use hypersync::conn::extra::{Extra, HELPER_NAME, parts};
use hypersync::conn::{Connection, State};
use hypersync::conntrack::commit::{Committer, Lifetime, Outcome};
use hypersync::counters::Counter;

use crate::common::copies::copies;
use crate::common::member::{Lab, Member, SOON, hypersync, with, words};
use crate::common::namespace::{Namespace, unique_prefix};
use crate::common::{may_make_namespaces, run, wait_for};

fn tuple(text: &str) -> Tuple {
    text.parse().expect("a tuple")
}

/// A host, and a member there that takes what these rules let it take.
fn start(lab: &Lab, rules: &[&str]) -> (Namespace, Member) {
    let host = Namespace::new(&unique_prefix(), "host");
    host.ip("address add 10.9.0.1/24 dev lo");
    let address: IpAddr = "10.9.0.1".parse().expect("an address");
    let file = lab.path("rules");
    std::fs::write(&file, rules.join("\n")).expect("a file in our own directory");
    let file = file.to_str().expect("a path in UTF-8");
    let flags = ["--source", "kernel", "--shards", "2", "--peer", "10.9.0.2", "--rules", file];
    let mut command = host.command("env");
    command.arg(hypersync().get_program());
    let member = Member::start(lab, "m1", 1, command, &with(words(1, address), &flags));
    (host, member)
}

/// Writes a connection as if its traffic had done so.
fn write(host: &Namespace, original: &str, mark: u32, extra: Extra) {
    let original = tuple(original);
    let state = State { status: 0xe, tcp_state: 3, timeout_s: 300, mark, ..State::default() };
    let connection = Connection { extra, ..Connection::new(original, original.mirrored(), state) };
    let outcome = host.inside(|| {
        let mut committer = Committer::open().expect("conntrack");
        committer.write(&connection, Lifetime::Normal).expect("an empty batch");
        let mut outcome = None;
        committer.flush(&mut |result| outcome = Some(result.outcome));
        outcome
    });
    assert_eq!(outcome, Some(Outcome::Written), "{original}");
}

fn taken(member: &Member) -> Vec<String> {
    let Ok(copies) = copies(member) else { return Vec::new() };
    let mut names: Vec<String> = copies.keys().map(Tuple::to_string).collect();
    names.sort();
    names
}

#[test]
fn the_first_rule_that_matches_decides_also_when_a_mark_changes() {
    if !may_make_namespaces("rules with a real kernel") {
        return;
    }
    let lab = Lab::new();
    let rules = [
        "copy dst 10.0.0.53",
        "skip proto udp dport 53",
        "skip mark 0x7/0xf",
        "copy proto tcp dport 179 local",
    ];
    let (host, member) = start(&lab, &rules);
    let all = [
        ("tcp 10.0.0.1:1000 > 10.0.0.2:80", 0, true),
        ("tcp 10.0.0.1:1001 > 10.0.0.2:80", 0x17, false),
        ("udp 10.0.0.1:1000 > 10.0.0.2:53", 0, false),
        ("udp 10.0.0.1:1000 > 10.0.0.53:53", 0, true),
        ("udp [2001:db8::1]:1000 > [2001:db8::2]:53", 0, false),
        ("icmp 10.0.0.1:77 > 10.0.0.2:2048", 0, true),
        ("tcp 10.9.0.1:1000 > 10.0.0.2:179", 0, true),
        ("tcp 10.9.0.1:1001 > 10.0.0.2:80", 0, false),
    ];
    for (original, mark, _) in all {
        write(&host, original, mark, Extra::NONE);
    }
    let mut wanted: Vec<String> = all.iter().filter(|c| c.2).map(|c| c.0.to_owned()).collect();
    wanted.sort();
    // The dump at the start may have shown some of them as well.
    wait_for("every connection was heard", SOON, || {
        let counts = [Counter::SourceFiltered, Counter::SourceLocal].map(|c| member.counter(c));
        counts[0] >= 3 && counts[1] >= 1 && taken(&member).len() >= wanted.len()
    });
    assert_eq!(taken(&member), wanted);

    // A mark that is set later counts from then on, both ways.
    let conntrack = |words: &str| {
        run(host.command("conntrack").args(words.split(' ')));
    };
    conntrack("-U -p tcp --orig-src 10.0.0.1 --orig-port-src 1000 --mark 7");
    conntrack("-U -p tcp --orig-src 10.0.0.1 --orig-port-src 1001 --mark 1");
    let mut wanted: Vec<String> =
        wanted.iter().map(|name| name.replace("tcp 10.0.0.1:1000", "tcp 10.0.0.1:1001")).collect();
    wanted.sort();
    wait_for("the marks decide anew", SOON, || taken(&member) == wanted);
}

#[test]
fn an_expectation_is_not_copied_and_is_counted() {
    if !may_make_namespaces("expectations") {
        return;
    }
    let lab = Lab::new();
    let (host, member) = start(&lab, &[]);
    let mut helper = [0; HELPER_NAME];
    helper[..3].copy_from_slice(b"ftp");
    let ftp = Extra { parts: parts::HELPER, helper, ..Extra::NONE };
    write(&host, "tcp 10.0.0.1:1000 > 10.0.0.2:21", 0, ftp);
    wait_for("the member has the control connection", SOON, || taken(&member).len() == 1);
    let expect = "-I expect --orig-src 10.0.0.1 --orig-dst 10.0.0.2 -p tcp --orig-port-src 1000 --orig-port-dst 21 \
        --tuple-src 10.0.0.2 --tuple-dst 10.0.0.1 --tuple-port-src 20 --tuple-port-dst 8000 \
        --mask-src 255.255.255.255 --mask-dst 255.255.255.255 --mask-port-src 0 --mask-port-dst 65535 -t 100";
    run(host.command("conntrack").args(expect.split_whitespace()));
    wait_for("it is counted", SOON, || member.counter(Counter::SourceExpectations) == 1);
    assert_eq!((taken(&member).len(), member.counter(Counter::SourceRejected)), (1, 0));
    // The helper is shown.
    let mut inspect = Command::new(env!("CARGO_BIN_EXE_hypersync-inspect"));
    inspect.arg("--shm").arg(lab.path("m1")).args(["find", "tcp", "10.0.0.1:1000", "10.0.0.2:21"]);
    assert!(run(&mut inspect).contains("ftp"));
}
