//! Hosts on a switch, the members on them, and faults of the link between.

use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use crate::common::member::{Lab, Member, hypersync, with, words};
use crate::common::namespace::{Namespace, unique_prefix};
use crate::common::run;

/// How long a group may take to agree once its fault is gone and the churn has ended. A busy
/// machine is slow.
pub const AGREE_WITHIN: Duration = Duration::from_secs(30);
/// The hold time of every member.
pub const HOLD: &str = "200ms";

/// Hosts 1, 2, .. at 10.9.0.1, 10.9.0.2, .. on a switch.
pub struct Field {
    lab: Lab,
    hosts: Vec<Namespace>,
    switch: Namespace,
}

impl Field {
    /// This many hosts, without members.
    pub fn build(count: u8) -> Field {
        let lab = Lab::new(); // it removes what killed runs have left
        let prefix = unique_prefix();
        let switch = Namespace::new(&prefix, "switch");
        switch.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0\nlink set br0 up");
        let mut field = Field { lab, hosts: Vec::new(), switch };
        for n in 1..=count {
            let host = Namespace::new(&prefix, &format!("host{n}"));
            host.ip(&format!(
                "link add sy0 type veth peer name port{n} netns {}",
                field.switch.name()
            ));
            field.switch.ip(&format!("link set port{n} master br0 up"));
            host.ip(&format!("address add 10.9.0.{n}/24 dev sy0\nlink set sy0 up"));
            // Datagrams that leave as one send travel one by one, as on a wire: so each is lost by
            // itself.
            run(host.command("ethtool").args(["-K", "sy0", "tx-udp-segmentation", "off"]));
            field.hosts.push(host);
        }
        field
    }

    /// A host, by its number.
    pub fn host(&self, n: u8) -> &Namespace {
        &self.hosts[usize::from(n) - 1]
    }

    /// The address of a host.
    pub fn address(n: u8) -> IpAddr {
        [10, 9, 0, n].into()
    }

    /// Starts a member on the host of its number, with these flags and values in place of the usual
    /// ones.
    pub fn start(&self, member: u8, extra: &[&str]) -> Member {
        self.start_at(member, member, extra)
    }

    /// Starts a member on any host.
    pub fn start_at(&self, host: u8, member: u8, extra: &[&str]) -> Member {
        let mut words = words(member, Field::address(host));
        // Not all have as many shards: their streams cross.
        let shards = if host == 2 { "1" } else { "2" };
        words.extend(["--interface", "sy0", "--shards", shards].map(str::to_owned));
        for other in (1..=self.hosts.len() as u8).filter(|other| *other != host) {
            words.extend(["--peer".to_owned(), Field::address(other).to_string()]);
        }
        let words = with(with(words, &["--hold", HOLD]), extra);
        let mut command = self.host(host).command("env");
        command.arg(hypersync().get_program());
        Member::start(&self.lab, &format!("h{host}"), member, command, &words)
    }

    /// Drops what reaches a host's port 8116 and fits this condition, until the fault is dropped
    /// itself.
    pub fn fault(&self, host: u8, condition: &str) -> Fault<'_> {
        let host = self.host(host);
        host.nft(&format!(
            "table inet fault {{\n counter hits {{ }}\n chain in {{\n type filter hook input priority 0\n \
             udp dport 8116 {condition} counter name hits drop\n }}\n }}"
        ));
        Fault { host }
    }

    /// Makes the switch's port of a host pass no IP packets above this size. The host's own
    /// interface does not know.
    pub fn set_port_mtu(&self, host: u8, mtu: u16) {
        self.switch.ip(&format!("link set port{host} mtu {mtu}"));
    }

    /// Whether packets of this many bytes pass from one host to another, both ways and
    /// unfragmented.
    pub fn passes(&self, from: u8, to: u8, size: u16) -> bool {
        let payload = (size - 28).to_string();
        let mut ping = self.host(from).command("ping");
        ping.args(["-q", "-c", "3", "-i", "0.1", "-W", "1", "-M", "do", "-s", &payload]);
        let output = ping.arg(Field::address(to).to_string()).output().expect("ping is installed");
        output.status.success()
    }
}

/// A fault of the way to a host.
pub struct Fault<'f> {
    host: &'f Namespace,
}

impl Fault<'_> {
    /// Packets dropped so far.
    pub fn hits(&self) -> u64 {
        let text = run(self.host.command("nft").args(["list", "counter", "inet", "fault", "hits"]));
        let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
        words.nth(1).and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no count in {text}"))
    }
}

impl Drop for Fault<'_> {
    fn drop(&mut self) {
        run(self.host.command("nft").args(["delete", "table", "inet", "fault"]));
    }
}

/// What `/proc/PID/stat` says that a process does: `T` is stopped.
pub fn process_state(pid: u32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let behind_the_name = stat.rsplit(") ").next().unwrap_or_default();
    behind_the_name.chars().next().unwrap_or('?')
}

/// Memory that a process has at present, KB: all of it, and of that what is not the shared table.
pub fn memory_kb(pid: u32) -> (u64, u64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
        number.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no {name} in {status}"))
    };
    (field("VmRSS"), field("RssAnon"))
}

/// What `hypersync-inspect` prints of a member.
pub fn inspect(member: &Member, what: &str) -> String {
    run(Command::new(env!("CARGO_BIN_EXE_hypersync-inspect"))
        .arg("--shm")
        .arg(&member.shm)
        .arg(what))
}
