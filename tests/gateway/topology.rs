//! The hosts and links that the picture in `gateway.rs` shows.

use crate::common::namespace::{Namespace, remove_stale, unique_prefix};

/// The address that every connection of the client has at the server, whichever gateway carries it.
pub const SHARED: &str = "10.3.0.1";
/// The client's address.
pub const CLIENT: &str = "10.1.0.10";
/// The server's address.
pub const SERVER: &str = "10.2.0.10";
/// The links of a gateway.
const LINKS: [&str; 3] = ["cl0", "sv0", "sy0"];

/// What both gateways do: no packet passes without a connection, and every connection of the client
/// leaves with the shared address.
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

/// A client, two gateways, a server, and the switch that joins them.
pub struct Topology {
    /// Names of this run's files begin with it.
    pub prefix: String,
    /// The host that opens the connections.
    pub client: Namespace,
    /// The host that answers.
    pub server: Namespace,
    /// Gateways 1 and 2; traffic starts at gateway 1.
    pub gateways: [Namespace; 2],
    _switch: Namespace,
}

impl Topology {
    /// Builds everything and sends the traffic through gateway 1.
    pub fn build() -> Topology {
        remove_stale();
        let prefix = unique_prefix();
        let place = |name: &str| Namespace::new(&prefix, name);
        let switch = place("switch");
        for bridge in ["lan-c", "lan-s", "lan-y"] {
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
        plug(&client, "eth0", "client", "lan-c", CLIENT);
        plug(&server, "eth0", "server", "lan-s", SERVER);
        let gateways = [1, 2].map(|number| {
            let gateway = place(&format!("gw{number}"));
            plug(&gateway, "cl0", &format!("gw{number}-c"), "lan-c", &format!("10.1.0.{number}"));
            plug(&gateway, "sv0", &format!("gw{number}-s"), "lan-s", &format!("10.2.0.{number}"));
            plug(&gateway, "sy0", &format!("gw{number}-y"), "lan-y", &format!("10.9.0.{number}"));
            gateway.sysctl("net/ipv4/ip_forward", "1");
            // With loose pick-up the kernel carries on any flow it meets in the middle, under a new
            // translation, and a takeover seems to work with no replication at all.
            gateway.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
            // Windows are not replicated: without this a flow that moves back is INVALID.
            gateway.sysctl("net/netfilter/nf_conntrack_tcp_be_liberal", "1");
            // With 2, a connection born while nobody listened never raises an event.
            gateway.sysctl("net/netfilter/nf_conntrack_events", "1");
            gateway.nft(RULES);
            gateway
        });
        let topology = Topology { prefix, client, server, gateways, _switch: switch };
        topology.route_through(1);
        topology
    }

    /// Sends the traffic of client and server through a gateway, by hand.
    pub fn route_through(&self, gateway: u8) {
        for (namespace, route) in self.routes_through(gateway) {
            namespace.ip(&route);
        }
    }

    /// The same as commands for the gateway's own notify script.
    pub fn move_routes_script(&self, gateway: u8) -> String {
        let line = |(namespace, route): (&Namespace, String)| format!("ip -n {} {route}\n", namespace.name());
        self.routes_through(gateway).into_iter().map(line).collect()
    }

    fn routes_through(&self, gateway: u8) -> [(&Namespace, String); 2] {
        [
            (&self.client, format!("route replace 10.2.0.0/24 via 10.1.0.{gateway}")),
            (&self.server, format!("route replace {SHARED}/32 via 10.2.0.{gateway}")),
        ]
    }

    /// Takes a gateway off all its links at once, as if its power had failed.
    pub fn unplug(&self, gateway: u8) {
        self.gateway(gateway).ip(&LINKS.map(|link| format!("link set {link} down\n")).concat());
    }

    /// Gateway 1 or 2.
    pub fn gateway(&self, number: u8) -> &Namespace {
        &self.gateways[usize::from(number) - 1]
    }
}
