//! Gateways on one bridge, and the appliances in them.

use std::time::{Duration, Instant};

use hypersync::counters::{Counter, Counters};

use crate::common::member::{Lab, Member, hypersync, with, words};
use crate::common::namespace::{Namespace, unique_prefix};

/// Shards of every member.
pub const SHARDS: u64 = 2;
/// The hold time of every member.
pub const HOLD: Duration = Duration::from_millis(500);
/// Connections past it are given a backup again this long after a death.
pub const REPROTECT_AFTER: Duration = Duration::from_secs(1);
/// How long anything may take that a busy machine does in a few seconds.
pub const LATEST: Duration = Duration::from_secs(30);

/// Gateways 1, 2, .. at 10.9.0.1, 10.9.0.2, .. on a bridge.
pub struct Gateways {
    lab: Lab,
    hosts: Vec<Namespace>,
    switch: Namespace,
    prefix: String,
}

impl Gateways {
    pub fn build(count: u8) -> Gateways {
        let lab = Lab::new(); // it removes what killed runs have left
        let prefix = unique_prefix();
        let switch = Namespace::new(&prefix, "switch");
        let mut gateways = Gateways { lab, hosts: Vec::new(), switch, prefix };
        gateways.bridge("lan-y");
        for number in 1..=count {
            let host = gateways.host(&format!("gw{number}"));
            gateways.plug(&host, "sy0", "lan-y", &format!("10.9.0.{number}"));
            gateways.hosts.push(host);
        }
        gateways
    }

    /// Another bridge.
    pub fn bridge(&self, name: &str) {
        self.switch.ip(&format!(
            "link add {name} type bridge forward_delay 0 mcast_snooping 0\nlink set {name} up"
        ));
    }

    /// Another host.
    pub fn host(&self, name: &str) -> Namespace {
        Namespace::new(&self.prefix, name)
    }

    /// Joins a host to a bridge.
    pub fn plug(&self, host: &Namespace, link: &str, bridge: &str, address: &str) {
        let port = format!("{}-{bridge}", host.name().rsplit('-').next().expect("a name"));
        host.ip(&format!(
            "link add {link} type veth peer name {port} netns {}",
            self.switch.name()
        ));
        self.switch.ip(&format!("link set {port} master {bridge} up"));
        host.ip(&format!("address add {address}/24 dev {link}\nlink set {link} up"));
    }

    /// A gateway, by its number.
    pub fn gateway(&self, number: u8) -> &Namespace {
        &self.hosts[usize::from(number) - 1]
    }

    /// Starts the appliance of a gateway, with these flags and values in place of the usual ones.
    pub fn start(&self, member: u8, extra: &[&str]) -> Member {
        let address = |n: u8| std::net::IpAddr::from([10, 9, 0, n]);
        let (hold, reprotect) = (format!("{}ms", HOLD.as_millis()), REPROTECT_AFTER.as_millis());
        let mut words = words(member, address(member));
        words.extend(
            ["--interface", "sy0", "--shards", "2", "--commit", "eager"].map(str::to_owned),
        );
        for other in (1..=self.hosts.len() as u8).filter(|other| *other != member) {
            words.extend(["--peer".to_owned(), address(other).to_string()]);
        }
        let usual =
            ["--source", "kernel", "--capacity", "150000", "--arena", "4194304", "--hold", &hold];
        // Dead after 0.8 s: a machine whose processors are shared stands still for half a second
        // now and then.
        let reprotect = format!("{reprotect}ms");
        let words =
            with(with(words, &usual), &["--reprotect-after", &reprotect, "--dead-after", "8"]);
        let command = {
            let mut command = self.gateway(member).command(hypersync().get_program());
            command.env("RUST_BACKTRACE", "1");
            command
        };
        Member::start(&self.lab, &format!("m{member}"), member, command, &with(words, extra))
    }
}

/// Fails the test if `condition` does not hold all this time.
pub fn stays(what: &str, time: Duration, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while start.elapsed() < time {
        assert!(condition(), "after {:?} this was no more so: {what}", start.elapsed());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Members that lost no event have made the one dump of each shard at each start with their table.
pub fn check_dumps(members: &[&Member]) {
    for member in members {
        let (overruns, dumps) =
            (member.counter(Counter::SourceOverruns), member.counter(Counter::SourceDumps));
        let table = format!("of group 7: {SHARDS} shards");
        let id = format!("table {:08x}", member.view().header().table_id);
        let starts =
            member.log().lines().filter(|l| l.contains(&table) && l.ends_with(&id)).count() as u64;
        println!("member {}: {overruns} events lost, {dumps} dumps in {starts} starts", member.id);
        assert!(
            overruns > 0 || starts > 0 && dumps == SHARDS * starts,
            "{dumps} dumps, {starts} starts"
        );
    }
}

/// What a member's loops were like, for the reader of the test's output.
pub fn print_passes(member: &Member) {
    let longest =
        |shard| Counters::new(member.view().shard(shard).counters).get(Counter::PassLongestUs);
    println!(
        "member {}: {} passes, {} of them later than 10 ms, the longest {} us",
        member.id,
        member.counter(Counter::Passes),
        member.counter(Counter::PassesLate),
        (0..SHARDS as u8).map(longest).max().unwrap_or_default(),
    );
}

/// Of all connections of an active, none is without a copy in its backup's kernel.
pub fn is_protected(active: &Member, count: u64) -> bool {
    active.counter(Counter::ConnectionsActive) == count && active.counter(Counter::Exposure) == 0
}
