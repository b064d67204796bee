//! Members that do not hear each other say why: the line that an operator needs, once.

use std::net::IpAddr;
use std::time::Duration;

use crate::common::member::{Lab, Member, SOON, hypersync, wait_until_ready, words};
use crate::common::namespace::{Namespace, two_hosts};
use crate::common::{may_make_namespaces, wait_for};

/// Member n of the group on its host; `discovery` says how it looks for the others.
fn start(lab: &Lab, hosts: &[Namespace; 2], n: u8, discovery: [&str; 2]) -> Member {
    let mut words = words(n, IpAddr::from([10, 9, 0, n]));
    words.extend(discovery.map(str::to_owned));
    words.extend(["--interface", "sy0", "--shards", "2"].map(str::to_owned));
    let mut command = hosts[usize::from(n) - 1].command("env");
    command.arg(hypersync().get_program());
    Member::start(lab, &format!("m{n}"), n, command, &words)
}

fn pair(lab: &Lab, hosts: &[Namespace; 2]) -> [Member; 2] {
    [start(lab, hosts, 1, ["--peer", "10.9.0.2"]), start(lab, hosts, 2, ["--peer", "10.9.0.1"])]
}

fn block(host: &Namespace, hook: &str, verdict: &str) {
    host.nft(&format!(
        "table ip block {{\n chain {hook} {{\n type filter hook {hook} priority 0\n \
         udp dport 8116 {verdict}\n }}\n }}"
    ));
}

/// How many lines of the log have these words in them.
fn lines_with(member: &Member, words: &str) -> usize {
    member.log().lines().filter(|line| line.contains(words)).count()
}

const REFUSED: &str =
    "sending to 10.9.0.2 is refused by this host's packet filter: let UDP port 8116 out";
const DEAF: &str =
    "member 2 at 10.9.0.2 does not hear this member: UDP port 8116 is blocked on the way there";

#[test]
fn output_rules_that_drop_our_port_are_told_once_at_both_ends() {
    if !may_make_namespaces("output rules that drop the port") {
        return;
    }
    let (lab, hosts) = (Lab::new(), two_hosts());
    block(&hosts[0], "output", "drop");
    let [one, two] = pair(&lab, &hosts);
    wait_for("member 1 says that its host refuses", SOON, || lines_with(&one, REFUSED) == 1);
    wait_for("member 1 says that it is not heard", SOON, || lines_with(&one, DEAF) == 1);
    let silent = "no heartbeat of group 7 from peer 10.9.0.1 yet";
    assert_eq!(lines_with(&two, silent), 0, "it may be about to start");
    wait_for("member 2 says that it hears nothing", SOON, || lines_with(&two, silent) == 1);
    assert_eq!((lines_with(&one, REFUSED), lines_with(&one, DEAF)), (1, 1), "not once a datagram");
    assert_eq!(lines_with(&two, "refused by this host"), 0);

    hosts[0].nft("delete table ip block");
    wait_until_ready(&[&one, &two]);
    assert_eq!(lines_with(&two, silent), 1);
}

#[test]
fn input_rules_that_drop_our_port_are_told_at_the_other_end() {
    if !may_make_namespaces("input rules that drop the port") {
        return;
    }
    let (lab, hosts) = (Lab::new(), two_hosts());
    let [one, two] = pair(&lab, &hosts);
    wait_until_ready(&[&one, &two]);
    assert_eq!(lines_with(&one, DEAF), 0);
    block(&hosts[1], "input", "drop");
    wait_for("member 1 says that it is not heard", SOON, || lines_with(&one, DEAF) == 1);
    assert_eq!(lines_with(&one, "packet filter"), 0, "its own lets everything out");
    // Another episode is another line.
    hosts[1].nft("delete table ip block");
    wait_until_ready(&[&one, &two]);
    let ready = one.events().iter().filter(|event| *event == "member-ready 2").count();
    assert_eq!(ready, 1, "it was ready all the time: {:?}", one.events());
    block(&hosts[1], "input", "drop");
    wait_for("member 1 says so again", SOON, || lines_with(&one, DEAF) == 2);
}

#[test]
fn a_sync_link_that_goes_down_is_told() {
    if !may_make_namespaces("a sync link that goes down") {
        return;
    }
    let (lab, hosts) = (Lab::new(), two_hosts());
    let [one, two] = pair(&lab, &hosts);
    wait_until_ready(&[&one, &two]);
    hosts[0].ip("link set sy0 down");
    wait_for("member 1 says that there is no way", SOON, || {
        lines_with(&one, "sending to 10.9.0.2 fails, there is no route: is the sync link up") == 1
    });
    hosts[0].ip("link set sy0 up");
    wait_for("they find each other again", SOON, || {
        one.sees(2) == two.sees(1) && one.sees(2) == hypersync::group::view::Status::Ready
    });
}

#[test]
fn a_member_that_hears_nobody_by_multicast_says_that_it_is_alone() {
    if !may_make_namespaces("a lone member") {
        return;
    }
    let (lab, hosts) = (Lab::new(), two_hosts());
    let one = start(&lab, &hosts, 1, ["--multicast", "224.0.0.116"]);
    let alone = "alone in group 7 so far: no heartbeat of another member in 10 s";
    wait_for("it says so", SOON, || lines_with(&one, alone) == 1);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(lines_with(&one, alone), 1);
    let two = start(&lab, &hosts, 2, ["--multicast", "224.0.0.116"]);
    wait_until_ready(&[&one, &two]);
    assert_eq!(lines_with(&two, alone), 0);
}
