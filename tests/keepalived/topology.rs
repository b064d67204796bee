//! The hosts and links of the picture in `keepalived.rs`, with the rules and settings of the
//! example.

use crate::common::namespace::{Namespace, remove_stale, unique_prefix};

/// The address that moves on the inside: the client's gateway.
pub const INSIDE: &str = "10.1.0.1";
/// The address that moves on the outside: what the server sees of every connection.
pub const OUTSIDE: &str = "203.0.113.1";
/// The server's address.
pub const SERVER: &str = "203.0.113.10";

const RULES: &str = include_str!("../../docs/examples/keepalived/nftables.conf");
const SETTINGS: &str = include_str!("../../docs/examples/keepalived/sysctl.conf");

/// A client inside, a server outside, two gateways, and the switch that joins them.
pub struct Topology {
    /// Names of this run's files begin with it.
    pub prefix: String,
    /// The host that opens the connections.
    pub client: Namespace,
    /// The host that answers.
    pub server: Namespace,
    gateways: [Namespace; 2],
    _switch: Namespace,
}

impl Topology {
    /// Builds everything; nobody has the addresses that move yet.
    pub fn build() -> Topology {
        remove_stale();
        let prefix = unique_prefix();
        let place = |name: &str| Namespace::new(&prefix, name);
        let switch = place("switch");
        for bridge in ["lan", "wan", "sync"] {
            switch.ip(&format!(
                "link add {bridge} type bridge forward_delay 0 mcast_snooping 0\nlink set {bridge} up"
            ));
        }
        let plug = |host: &Namespace, link: &str, port: &str, bridge: &str, address: &str| {
            host.ip(&format!("link add {link} type veth peer name {port} netns {}", switch.name()));
            switch.ip(&format!("link set {port} master {bridge} up"));
            host.ip(&format!("address add {address}/24 dev {link}\nlink set {link} up"));
        };
        let (client, server) = (place("client"), place("server"));
        plug(&client, "eth0", "client", "lan", "10.1.0.10");
        plug(&server, "eth0", "server", "wan", SERVER);
        client.ip(&format!("route add default via {INSIDE}"));
        let gateways = [1, 2].map(|number| {
            let gateway = place(&format!("gw{number}"));
            let own = number + 1;
            plug(&gateway, "lan0", &format!("gw{number}-l"), "lan", &format!("10.1.0.{own}"));
            plug(&gateway, "wan0", &format!("gw{number}-w"), "wan", &format!("203.0.113.{own}"));
            plug(&gateway, "sync0", &format!("gw{number}-s"), "sync", &format!("10.9.0.{number}"));
            let settings = SETTINGS.lines().filter(|line| !line.starts_with('#'));
            for (name, value) in settings.filter_map(|line| line.split_once(" = ")) {
                gateway.sysctl(&name.replace('.', "/"), value);
            }
            gateway.nft(RULES);
            gateway
        });
        Topology { prefix, client, server, gateways, _switch: switch }
    }

    /// Gateway 1 or 2.
    pub fn gateway(&self, number: u8) -> &Namespace {
        &self.gateways[usize::from(number) - 1]
    }

    /// Whether a gateway has both addresses that move.
    pub fn has_addresses(&self, gateway: u8) -> bool {
        let addresses =
            crate::common::run(self.gateway(gateway).command("ip").args(["-4", "-o", "address"]));
        [INSIDE, OUTSIDE].iter().all(|address| addresses.contains(&format!(" {address}/24 ")))
    }

    /// Takes a gateway off all its links at once, as if its power had failed.
    pub fn unplug(&self, gateway: u8) {
        self.gateway(gateway).ip("link set lan0 down\nlink set wan0 down\nlink set sync0 down\n");
    }

    /// Whether a gateway's kernel has every connection between these ports, established and
    /// translated.
    pub fn has_entries(&self, gateway: u8, ports: &[(u16, u16)]) -> bool {
        let entries = self.gateway(gateway).tcp_entries();
        ports.iter().all(|(from, to)| {
            let is_it = |e: &&String| e.contains(&format!(" sport={from} dport={to} "));
            entries.iter().find(is_it).is_some_and(|entry| {
                entry.contains("ESTABLISHED")
                    && entry.contains("[ASSURED]")
                    && entry.contains(&format!(" dst={OUTSIDE} "))
            })
        })
    }
}
