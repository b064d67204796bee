//! Ten deaths in a row, with traffic on real connections and churn beside it.
//!
//! ```text
//!                   +-- gw1 --+
//!   client -- lan-c-+         +-lan-s -- server       both gateways translate to 10.3.0.1; the routes
//!                   +-- gw2 --+                       of client and server lead to one of them
//! ```

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use hypersync::conn::Tuple;
use hypersync::counters::Counter;

use crate::common::member::{Member, wait_until_ready};
use crate::common::namespace::Namespace;
use crate::common::{may_make_namespaces, run, wait_for};
use crate::conntrack::{Churn, Hand, Plan, Table, connection, connections, difference, table};
use crate::gateways::{Gateways, HOLD, LATEST, check_dumps, print_passes};
use crate::traffic::Traffic;

const TRAFFIC: usize = 50;
/// Where the traffic goes.
pub const SERVER: (&str, u16) = ("10.2.0.10", 7000);
/// New connections a second; one of so many stays open.
const CHURN: Plan = Plan { rate: 20_000, first: 0, open: 2_000, keep_one_of: 200, most: u32::MAX };
const ROUNDS: usize = 10;
/// Long-lived connections that end before each death.
const ENDING: usize = 50;
/// What was opened so long before a death may be lost by it: the hold, and what copying takes on a
/// machine that has no processor to spare.
const YOUNG: Duration = HOLD.saturating_add(Duration::from_secs(1));
/// Connections that open between two deaths: for longer than that.
const BETWEEN: u32 = CHURN.rate * 5 / 2;

/// What a gateway lets through. Without a connection nothing but a new one from the client passes.
const RULES: &str = "
table inet gate {
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state invalid drop
        ct state established,related accept
        iifname cl0 oifname sv0 ct state new accept
    }
}
table ip translate {
    chain postrouting {
        type nat hook postrouting priority srcnat;
        oifname sv0 ip saddr 10.1.0.0/24 snat to 10.3.0.1
    }
}
";

/// How a gateway dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Death {
    /// No power: its links are down, and it comes back with nothing in its kernel or its memory.
    Power,
    /// The appliance only. The kernel keeps its entries, and traffic moves away.
    Process,
    /// The appliance only, and it is started again at once: traffic stays.
    Restart,
}

/// A client and a server behind two gateways, without appliances.
pub struct Site {
    /// The gateways.
    pub gateways: Gateways,
    /// The client's host.
    pub client: Namespace,
    /// The server's host.
    pub server: Namespace,
}

impl Site {
    /// Builds it; no route leads through a gateway yet.
    pub fn build() -> Site {
        let gateways = Gateways::build(2);
        gateways.bridge("lan-c");
        gateways.bridge("lan-s");
        let (client, server) = (gateways.host("client"), gateways.host("server"));
        gateways.plug(&client, "eth0", "lan-c", "10.1.0.10");
        gateways.plug(&server, "eth0", "lan-s", "10.2.0.10");
        for number in [1, 2] {
            let gateway = gateways.gateway(number);
            gateways.plug(gateway, "cl0", "lan-c", &format!("10.1.0.{number}"));
            gateways.plug(gateway, "sv0", "lan-s", &format!("10.2.0.{number}"));
            gateway.sysctl("net/ipv4/ip_forward", "1");
            // With loose pick-up connections survive with no replication at all.
            gateway.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
            gateway.sysctl("net/netfilter/nf_conntrack_tcp_be_liberal", "1");
            gateway.sysctl("net/netfilter/nf_conntrack_events", "1");
            gateway.nft(RULES);
        }
        Site { gateways, client, server }
    }

    /// Makes the routes of client and server lead through this gateway.
    pub fn route_through(&self, number: u8) {
        self.client.ip(&format!("route replace 10.2.0.0/24 via 10.1.0.{number}"));
        self.server.ip(&format!("route replace 10.3.0.1/32 via 10.2.0.{number}"));
    }

    /// Sets all links of a gateway up or down.
    pub fn set_links(&self, number: u8, state: &str) {
        let lines = ["cl0", "sv0", "sy0"].map(|link| format!("link set {link} {state}\n")).concat();
        self.gateways.gateway(number).ip(&lines);
    }

    /// Long-lived entries of a gateway's kernel: neither the churn's young ones nor anything else.
    fn table(&self, number: u8, wanted: &HashSet<Tuple>) -> Table {
        let mut table = table(self.gateways.gateway(number));
        table.retain(|name, _| wanted.contains(name));
        table
    }
}

#[test]
fn ten_deaths_in_a_row_break_nothing_under_churn() {
    if !may_make_namespaces("ten deaths in a row") {
        return;
    }
    let site = Site::build();
    let gateways = &site.gateways;
    let start = |number| gateways.start(number, &["--dead-after", "5"]);
    let mut members = [start(1), start(2)];
    wait_until_ready(&[&members[0], &members[1]]);
    let at = |number: u8| usize::from(number) - 1;
    site.route_through(1);
    let traffic = Traffic::start(&site.client, &site.server, SERVER, TRAFFIC);
    let mut real: HashSet<Tuple> = HashSet::new();
    for from in &traffic.client_addresses {
        let std::net::SocketAddr::V4(from) = from else { panic!("{from} is an IPv4 address") };
        let to = (SERVER.0.parse().expect("an address"), SERVER.1);
        real.insert(Tuple::v4(6, (*from.ip(), from.port()), to));
    }

    let mut active = 1;
    // Those that must be there (opened long enough before the next death), and those that may.
    let mut wanted = real.clone();
    let mut allowed = real.clone();
    // Long-lived ones by number, in the order of their opening.
    let mut lasting: VecDeque<u32> = VecDeque::new();
    let mut finished = 0;
    let mut next = 0;
    let mut opened = 0;
    let mut churned = Duration::ZERO;
    let mut longest_gap = Duration::ZERO;
    let mut churn = Churn::start(gateways.gateway(active), CHURN);
    for round in 0..ROUNDS {
        let death = [Death::Power, Death::Process, Death::Restart][round % 3];
        let before = churn.opened();
        wait_for("connections open and close", LATEST, || churn.opened() >= before + BETWEEN);
        wait_for_two_copies(&site, &members, &wanted);
        // Some end, at whichever gateway has the traffic now; they must never come back.
        let ending: Vec<u32> = lasting.drain(..lasting.len().min(ENDING)).collect();
        Hand::on(gateways.gateway(active)).finish(connections(ending.iter().copied()));
        let ended: HashSet<Tuple> =
            connections(ending.iter().copied()).map(|c| c.original).collect();
        finished += ended.len();
        wanted.retain(|name| !ended.contains(name));
        allowed.retain(|name| !ended.contains(name));
        wait_for("both gateways have let go of what ended", LATEST, || {
            [1, 2].iter().all(|number| site.table(*number, &ended).is_empty())
        });
        let started = Instant::now();
        let victim = active;
        let told = format!("member-dead {victim}");
        let times_told = |members: &[Member; 2]| {
            members[at(3 - victim)].events().iter().filter(|event| **event == told).count()
        };
        let told_before = times_told(&members);
        check_dumps(&[&members[at(victim)]]);
        members[at(victim)].kill();
        let killed = Instant::now();
        if death == Death::Power {
            site.set_links(victim, "down");
        }
        if death == Death::Restart {
            members[at(victim)] = start(victim);
        } else {
            // No packet reaches the victim any more, so nothing opens there.
            let done = churn.stop();
            opened += done.opened;
            churned += done.took;
            next += done.opened;
            let survive = |opened_at: Instant| {
                death == Death::Process || killed.saturating_duration_since(opened_at) > YOUNG
            };
            for (n, opened_at) in done.kept {
                allowed.insert(connection(n).original);
                if survive(opened_at) {
                    wanted.insert(connection(n).original);
                    lasting.push_back(n);
                }
            }
            active = 3 - victim;
            wait_for("the survivor tells of the death", LATEST, || {
                times_told(&members) > told_before
            });
            site.route_through(active);
            churn = Churn::start(gateways.gateway(active), Plan { first: next, ..CHURN });
            traffic.wait_for_more(10, LATEST, "every connection goes on through the survivor");
            if death == Death::Power {
                run(gateways.gateway(victim).command("conntrack").arg("-F"));
                std::fs::remove_dir_all(&members[at(victim)].shm).expect("it is ours");
                site.set_links(victim, "up");
            }
            members[at(victim)] = start(victim);
        }
        wait_until_ready(&[&members[0], &members[1]]);
        traffic.wait_for_more(10, LATEST, "every connection goes on");
        let gap = traffic.client().iter().map(|side| side.longest_gap).max().unwrap_or_default();
        longest_gap = longest_gap.max(gap);
        println!("death {}, {death:?}: {} ms", round + 1, started.elapsed().as_millis());
    }
    wait_for_two_copies(&site, &members, &wanted);
    let done = churn.stop();
    opened += done.opened;
    churned += done.took;
    for (n, _) in done.kept {
        allowed.insert(connection(n).original);
        wanted.insert(connection(n).original);
    }
    traffic.finish(LATEST);
    let mut why = None;
    let mut is_equal = || {
        let tables = [1, 2].map(|number| table(gateways.gateway(number)));
        let lost = wanted.iter().find(|name| !tables[at(active)].contains_key(name));
        let strange = tables[at(active)].keys().find(|name| !allowed.contains(name));
        why = lost
            .map(|name| format!("{name} is lost"))
            .or_else(|| strange.map(|name| format!("{name} should be closed")))
            .or_else(|| difference(&tables[at(active)], &tables[2 - usize::from(active)]))
            .or_else(|| {
                members
                    .iter()
                    .find_map(|m| (m.counter(Counter::Exposure) != 0).then(|| "exposed".into()))
            });
        why.is_none()
    };
    let began = Instant::now();
    while !is_equal() {
        assert!(began.elapsed() < LATEST, "the two kernels' tables differ: {why:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("the tables were equal {} ms after the last packet", began.elapsed().as_millis());
    println!(
        "{ROUNDS} deaths; {opened} connections at {} a second, of them {finished} ended when they were copied, \
         {} in both kernels at the end; the client heard nothing for {} ms at most",
        (opened as f64 / churned.as_secs_f64()) as u64,
        wanted.len(),
        longest_gap.as_millis()
    );
    for member in &members {
        println!(
            "member {}, since it was started last: {} conflicts, {} copies refused to their active",
            member.id,
            member.counter(Counter::Conflicts),
            member.counter(Counter::Refused)
        );
        check_dumps(&[member]);
        print_passes(member);
    }
}

/// Waits until both kernels have all of these.
fn wait_for_two_copies(site: &Site, members: &[Member; 2], wanted: &HashSet<Tuple>) {
    let has_all = |number| site.table(number, wanted).len() == wanted.len();
    let started = Instant::now();
    while !(members.iter().all(|m| m.counter(Counter::Unprotected) == 0)
        && has_all(1)
        && has_all(2))
    {
        assert!(
            started.elapsed() < LATEST,
            "of {} connections the kernels have only {} and {}",
            wanted.len(),
            site.table(1, wanted).len(),
            site.table(2, wanted).len()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}
