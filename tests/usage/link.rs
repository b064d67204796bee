//! The sync link as networks have it: it is there later than the member, its address is link-local,
//! tools delete it and make it anew.

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hypersync::group::view::Status;

use crate::common::copies::{connections, push_all, wait_for_agreement};
use crate::common::member::{
    Lab, Member, SOON, dies_with_us, hypersync, wait_until_ready, with, words,
};
use crate::common::namespace::{Namespace, two_hosts, unique_prefix};
use crate::common::{may_make_namespaces, wait_for};

/// The words of member n, with these flags in place of the usual ones.
fn words_of(n: u8, sync: &str, extra: &[&str]) -> Vec<String> {
    let unused = [127, 0, 0, 1].into();
    let words = with(words(n, unused), &["--sync", sync, "--shards", &n.to_string()]);
    with(words, extra)
}

fn command(host: &Namespace) -> Command {
    let mut command = host.command("env");
    command.arg(hypersync().get_program());
    command
}

fn start(lab: &Lab, host: &Namespace, n: u8, sync: &str, extra: &[&str]) -> Member {
    Member::start(lab, &format!("m{n}"), n, command(host), &words_of(n, sync, extra))
}

/// How member n is called: its sync address and how it finds the other one.
struct Way {
    what: &'static str,
    words: [(&'static str, &'static [&'static str]); 2],
}

const LINK_LOCAL: [Way; 3] = [
    Way {
        what: "link-local peers, the interface named apart",
        words: [
            ("fe80::1", &["--interface", "sy0", "--peer", "fe80::2"]),
            ("fe80::2", &["--interface", "sy0", "--peer", "fe80::1"]),
        ],
    },
    Way {
        what: "link-local peers, the interface behind each address",
        words: [
            ("fe80::1%sy0", &["--peer", "fe80::2%sy0"]),
            ("fe80::2%sy0", &["--peer", "fe80::1%sy0"]),
        ],
    },
    Way {
        what: "link-local multicast",
        words: [
            ("fe80::1%sy0", &["--multicast", "ff02::74"]),
            ("fe80::2", &["--interface", "sy0", "--multicast", "ff02::74%sy0"]),
        ],
    },
];

#[test]
fn a_link_local_sync_address_works_in_both_spellings() {
    if !may_make_namespaces("link-local sync addresses") {
        return;
    }
    for way in LINK_LOCAL {
        println!("{}", way.what);
        let (lab, hosts) = (Lab::new(), two_hosts());
        for (host, n) in hosts.iter().zip(1..) {
            host.ip(&format!("address add fe80::{n}/64 dev sy0 nodad"));
        }
        let [one, two] =
            [0, 1].map(|i| start(&lab, &hosts[i], i as u8 + 1, way.words[i].0, way.words[i].1));
        wait_until_ready(&[&one, &two]);
        let wanted = connections(0..500);
        push_all(&mut one.producers(), wanted.values());
        wait_for_agreement(way.what, &[&one, &two], &wanted, SOON);
    }
}

/// Makes the sync link of host n, a bridge with one port, with all its addresses.
fn make_link(host: &Namespace, n: u8) {
    host.ip(&format!(
        "link add br-sy type bridge forward_delay 0 mcast_snooping 0\n\
         link set sy0 master br-sy\nlink set br-sy up\naddress add 10.8.0.{n}/24 dev br-sy\n\
         address add fd08::{n}/64 dev br-sy nodad\naddress add fe80::8:{n}/64 dev br-sy nodad"
    ));
}

const REBUILT: [Way; 5] = [
    Way {
        what: "multicast",
        words: [("10.8.0.1", &["--interface", "br-sy"]), ("10.8.0.2", &["--interface", "br-sy"])],
    },
    Way {
        what: "IPv6 multicast",
        words: [
            ("fd08::1", &["--multicast", "ff02::74"]),
            ("fd08::2", &["--multicast", "ff02::74"]),
        ],
    },
    Way {
        what: "link-local multicast",
        words: [
            ("fe80::8:1%br-sy", &["--multicast", "ff02::74"]),
            ("fe80::8:2%br-sy", &["--multicast", "ff02::74"]),
        ],
    },
    Way {
        what: "link-local peers",
        words: [
            ("fe80::8:1%br-sy", &["--peer", "fe80::8:2"]),
            ("fe80::8:2%br-sy", &["--peer", "fe80::8:1"]),
        ],
    },
    Way {
        what: "peers",
        words: [("10.8.0.1", &["--peer", "10.8.0.2"]), ("10.8.0.2", &["--peer", "10.8.0.1"])],
    },
];

#[test]
fn a_sync_link_that_is_deleted_and_made_anew_is_heard_again_within_a_second() {
    if !may_make_namespaces("a sync link that is made anew") {
        return;
    }
    for way in REBUILT {
        let (lab, hosts) = (Lab::new(), two_hosts());
        for (host, n) in hosts.iter().zip(1..) {
            make_link(host, n);
        }
        let [one, two] =
            [0, 1].map(|i| start(&lab, &hosts[i], i as u8 + 1, way.words[i].0, way.words[i].1));
        wait_until_ready(&[&one, &two]);
        let mut wanted = connections(0..500);
        let mut producers = one.producers();
        push_all(&mut producers, wanted.values());
        wait_for_agreement(way.what, &[&one, &two], &wanted, SOON);

        let mut quickest = Duration::MAX;
        for _ in 0..3 {
            hosts[1].ip("link del br-sy");
            wait_for("each is dead for the other", SOON, || {
                one.sees(2) == Status::Dead && two.sees(1) == Status::Dead
            });
            for (member, other) in [(&one, 2), (&two, 1)] {
                let (status, line) = member.check();
                assert_eq!(status, Some(0), "it carries on: {line}");
                let last = format!("but hears nobody; the last was member {other}");
                assert!(line.contains(&last) || line.contains("not even its own"), "{line}");
            }
            make_link(&hosts[1], 2);
            let made = Instant::now();
            wait_for(&format!("{}: each hears the other again", way.what), SOON, || {
                one.sees(2).is_alive() && two.sees(1).is_alive()
            });
            quickest = quickest.min(made.elapsed());
        }
        println!("{}: heard again {} ms after the link was there", way.what, quickest.as_millis());
        assert!(quickest < Duration::from_secs(1), "{}: {quickest:?}", way.what);
        wait_for("each can use the other as a backup", SOON, || {
            one.sees(2) == Status::Ready && two.sees(1) == Status::Ready
        });
        let more = connections(500..1000);
        push_all(&mut producers, more.values());
        wanted.extend(more);
        wait_for_agreement(way.what, &[&one, &two], &wanted, SOON);
        for member in [&one, &two] {
            let (status, line) = member.check();
            assert!(status == Some(0) && !line.contains("nobody"), "{line}");
        }
    }
}

#[test]
fn a_multicast_group_that_the_kernel_forgot_is_joined_again() {
    if !may_make_namespaces("a multicast group that the kernel forgot") {
        return;
    }
    let (lab, hosts) = (Lab::new(), two_hosts());
    let [one, two] = [1, 2].map(|n| {
        start(
            &lab,
            &hosts[usize::from(n) - 1],
            n,
            &format!("fd00::{n}"),
            &["--multicast", "ff02::74"],
        )
    });
    wait_until_ready(&[&one, &two]);
    // IPv6 needs an MTU of 1280: below, the kernel takes it off the interface, groups included. The
    // interface keeps its index.
    hosts[1].ip("link set sy0 mtu 1200");
    wait_for("each is dead for the other", SOON, || {
        one.sees(2) == Status::Dead && two.sees(1) == Status::Dead
    });
    hosts[1].ip("link set sy0 mtu 1500\naddress add fd00::2/64 dev sy0 nodad");
    wait_for("each can use the other as a backup", SOON, || {
        one.sees(2) == Status::Ready && two.sees(1) == Status::Ready
    });
}

#[test]
fn a_member_that_hears_nobody_any_more_says_so() {
    if !may_make_namespaces("a member that hears nobody any more") {
        return;
    }
    let (lab, hosts) = (Lab::new(), two_hosts());
    let [one, two] = [1, 2].map(|n| {
        start(&lab, &hosts[usize::from(n) - 1], n, &format!("10.9.0.{n}"), &["--interface", "sy0"])
    });
    wait_until_ready(&[&one, &two]);
    hosts[0].ip("link set sy0 down");
    let lines = |member: &Member, words: &str| {
        member.log().lines().filter(|line| line.contains(words)).count()
    };
    let own = "not even this member's own to the multicast group";
    wait_for("member 1 says that not even its own heartbeats come back", SOON, || {
        lines(&one, own) == 1
    });
    let nobody = "no heartbeat of any other member of group 7: nothing is copied";
    wait_for("member 2 says that nobody is heard", SOON, || lines(&two, nobody) == 1);
    let (status, line) = one.check();
    assert!(status == Some(0) && line.contains("not even its own heartbeats come back"), "{line}");
    hosts[0].ip("link set sy0 up");
    wait_for("each can use the other as a backup", SOON, || {
        one.sees(2) == Status::Ready && two.sees(1) == Status::Ready
    });
    assert_eq!((lines(&one, own), lines(&two, nobody)), (1, 1));
}

/// A host without a sync link.
fn lone_host() -> Namespace {
    Namespace::new(&unique_prefix(), "host")
}

/// Starts a member that waits, with its log where [`Member::start`] would have it.
fn start_waiting(lab: &Lab, host: &Namespace, sync: &str, extra: &[&str]) -> Child {
    let log = File::create(lab.path("m1.log")).expect("the directory is ours");
    let mut command = command(host);
    command.args(words_of(1, sync, extra)).arg("--shm").arg(lab.path("m1"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    dies_with_us(&mut command).spawn().expect("the program is built")
}

/// Lines of the waiting member's log with these words.
fn said(lab: &Lab, words: &str) -> usize {
    let log = fs::read_to_string(lab.path("m1.log")).unwrap_or_default();
    log.lines().filter(|line| line.contains(words)).count()
}

#[test]
fn a_member_started_before_its_link_waits_and_goes_on_by_itself() {
    if !may_make_namespaces("a member started before its link") {
        return;
    }
    for named in [true, false] {
        let (lab, host) = (Lab::new(), lone_host());
        let interface: &[&str] = if named { &["--interface", "sy0"] } else { &[] };
        let member = std::thread::scope(|scope| {
            let steps = scope.spawn(|| {
                let missing = "there is no interface sy0";
                let address = "10.9.0.1 is not an address of this host";
                let first = if named { missing } else { address };
                wait_for("it says what it waits for", SOON, || said(&lab, first) == 1);
                assert_eq!(said(&lab, "waiting for the sync link, not ready"), 1);
                host.ip("link add sy0 type veth peer name sy1\nlink set sy0 up\nlink set sy1 up");
                wait_for("it says that the address is missing", SOON, || said(&lab, address) == 1);
                let mut inspect = Command::new(env!("CARGO_BIN_EXE_hypersync-inspect"));
                let checked = inspect.arg("--shm").arg(lab.path("m1")).arg("check").output();
                let checked = checked.expect("the inspector is built");
                assert_eq!(
                    checked.status.code(),
                    Some(1),
                    "{}",
                    String::from_utf8_lossy(&checked.stdout)
                );
                host.ip("address add 10.9.0.1/24 dev sy0");
            });
            // It returns once the member's memory can be read. The member dies with the thread that
            // starts it.
            let member = start(&lab, &host, 1, "10.9.0.1", interface);
            steps.join().expect("its failure was told");
            member
        });
        wait_for("it is ready", SOON, || member.was_told("self-ready 1"));
        assert_eq!(said(&lab, "10.9.0.1 is not an address of this host"), 1, "once");
        assert_eq!(said(&lab, "the sync link is there, on sy0"), 1);
        assert_eq!(member.check().0, Some(0));
    }
}

#[test]
fn a_member_started_while_its_address_is_tentative_waits_for_it() {
    if !may_make_namespaces("a tentative address") {
        return;
    }
    let (lab, host) = (Lab::new(), lone_host());
    host.ip("link add sy0 type veth peer name sy1\nlink set sy1 up\nlink set sy0 up");
    host.sysctl("net/ipv6/conf/sy0/dad_transmits", "3");
    host.ip("address add fd00::1/64 dev sy0");
    let member = start(&lab, &host, 1, "fd00::1", &["--multicast", "ff02::74"]);
    let waited = "fd00::1 cannot be used: the kernel still looks whether another host has it";
    assert_eq!(said(&lab, waited), 1, "once");
    wait_for("it is ready", SOON, || member.was_told("self-ready 1"));
}

#[test]
fn a_member_that_waits_ends_when_it_is_told_to() {
    let lab = Lab::new();
    let here = |sync: &str, extra: &[&str]| {
        let log = File::create(lab.path("m1.log")).expect("the directory is ours");
        let mut command = hypersync();
        command.args(words_of(1, sync, extra)).arg("--shm").arg(lab.path("m1"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        dies_with_us(&mut command).spawn().expect("the program is built")
    };
    for (sync, extra, says) in [
        (
            "192.0.2.1",
            &["--peer", "192.0.2.2"] as &[&str],
            "192.0.2.1 is not an address of this host",
        ),
        ("127.0.0.1", &["--interface", "nosuch0"], "there is no interface nosuch0"),
        ("fe80::1%nosuch0", &["--peer", "fe80::2"], "there is no interface nosuch0"),
    ] {
        let mut child = here(sync, extra);
        wait_for("it says what it waits for", SOON, || said(&lab, says) == 1);
        // SAFETY: kill has no memory arguments; the child was not waited for, so the number is its
        // own.
        assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
        let mut status = None;
        wait_for("it ends", SOON, || {
            status = child.try_wait().expect("a child can be asked");
            status.is_some()
        });
        assert!(status.is_some_and(|status| status.success()), "{status:?}");
        assert_eq!(said(&lab, "waiting for the sync link"), 1, "once");
    }
}

#[test]
fn a_link_local_address_of_two_links_must_be_told_apart() {
    if !may_make_namespaces("a link-local address of two links") {
        return;
    }
    let (lab, host) = (Lab::new(), lone_host());
    host.ip("link add sy0 type veth peer name sy1\nlink set sy0 up\nlink set sy1 up");
    host.ip("address add fe80::1/64 dev sy0 nodad\naddress add fe80::1/64 dev sy1 nodad");
    let mut child = start_waiting(&lab, &host, "fe80::1", &["--peer", "fe80::2"]);
    let mut status = None;
    wait_for("it ends", SOON, || {
        status = child.try_wait().expect("a child can be asked");
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(2));
    assert_eq!(said(&lab, "name the sync link with --interface, or write fe80::1%sy"), 1);
    assert_eq!(said(&lab, "fe80::1 is an address of sy"), 1);
}
