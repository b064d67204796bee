//! The hosts and links that the picture in `gateway.rs` shows, and what the gateways are told to
//! do.

use crate::common::namespace::{Namespace, remove_stale, unique_prefix};

/// The address that every translated connection has at the server, whichever gateway carries it.
pub const SHARED: &str = "10.3.0.1";
/// The server's address.
pub const SERVER: &str = "10.2.0.10";
/// The server's address, IPv6.
pub const SERVER_V6: &str = "fd00:2::10";
/// The address under which the gateways offer the server's services.
pub const SERVICE: &str = "10.4.0.1";
/// The same, IPv6.
pub const SERVICE_V6: &str = "fd00:4::1";
/// The links of a gateway.
const LINKS: [&str; 3] = ["cl0", "sv0", "sy0"];

/// What every gateway does: no packet passes without a connection. The client's connections to
/// ports below 8000 leave with the shared address, those to higher ports are only routed. What is
/// addressed to the service goes to the server, to another port. A mark says which way it was
/// taken.
const RULES: &str = "
table inet gate {
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state invalid drop
        ct state established,related accept
        ct mark set th dport map { 7000 : 0x11, 7080 : 0x22, 8000 : 0x33, 8080 : 0x80000044 }
        iifname cl0 oifname sv0 ct state new accept
    }
}
table inet translate {
    chain prerouting {
        type nat hook prerouting priority dstnat;
        iifname cl0 ip daddr 10.4.0.1 meta l4proto { tcp, udp } th dport 80 dnat ip to 10.2.0.10:7080
        iifname cl0 ip daddr 10.4.0.1 meta l4proto { tcp, udp } th dport 81 dnat ip to 10.2.0.10:8080
        iifname cl0 ip6 daddr fd00:4::1 meta l4proto { tcp, udp } th dport 80 dnat ip6 to [fd00:2::10]:7080
        iifname cl0 ip6 daddr fd00:4::1 meta l4proto { tcp, udp } th dport 81 dnat ip6 to [fd00:2::10]:8080
    }
    chain postrouting {
        type nat hook postrouting priority srcnat;
        oifname sv0 ip saddr 10.1.0.0/24 th dport < 8000 snat ip to 10.3.0.1
        oifname sv0 ip6 saddr fd00:1::/64 th dport < 8000 snat ip6 to fd00:3::1
    }
}
";

/// Zones, in addition: IPv4 to port 7000 is in zone 5 both ways, IPv6 to port 8000 in zone 6 both
/// ways; what is addressed to the service has a zone on the way there only, as with tenants that
/// share an uplink.
pub const ZONES: &str = "
table inet zones {
    chain prerouting {
        type filter hook prerouting priority raw;
        iifname cl0 meta nfproto ipv4 th dport 7000 ct zone set 5
        iifname sv0 meta nfproto ipv4 th sport 7000 ct zone set 5
        iifname cl0 meta nfproto ipv6 th dport 8000 ct zone set 6
        iifname sv0 meta nfproto ipv6 th sport 8000 ct zone set 6
        iifname cl0 th dport 80 ct original zone set 7
        iifname cl0 th dport 81 ct original zone set 8
    }
}
";

/// Labels, in addition: two bits of their own for each port.
pub const LABELS: &str = "
table inet labels {
    chain forward {
        type filter hook forward priority filter - 1;
        ct state new th dport 7000 ct label set 0 ct label set 100
        ct state new th dport 7080 ct label set 1 ct label set 63
        ct state new th dport 8000 ct label set 2 ct label set 64
        ct state new th dport 8080 ct label set 3 ct label set 126
    }
}
";

/// A client, some gateways, a server, and the switch that joins them.
pub struct Topology {
    /// Names of this run's files begin with it.
    pub prefix: String,
    /// The host that opens the connections.
    pub client: Namespace,
    /// The host that answers.
    pub server: Namespace,
    /// Gateways 1 to the last; traffic starts at gateway 1.
    pub gateways: Vec<Namespace>,
    _switch: Namespace,
}

impl Topology {
    /// Builds everything and sends the traffic through gateway 1.
    pub fn build(gateways: u8) -> Topology {
        Topology::build_with(gateways, &[])
    }

    /// The same with further rules at the gateways.
    pub fn build_with(gateways: u8, rules: &[&str]) -> Topology {
        remove_stale();
        let prefix = unique_prefix();
        let place = |name: &str| {
            let namespace = Namespace::new(&prefix, name);
            // Addresses are unique here; looking for others first would take seconds.
            namespace.sysctl("net/ipv6/conf/default/accept_dad", "0");
            namespace
        };
        let switch = place("switch");
        for bridge in ["lan-c", "lan-s", "lan-y"] {
            switch.ip(&format!(
                "link add {bridge} type bridge forward_delay 0 mcast_snooping 0\nlink set {bridge} up"
            ));
        }
        // The host with this number on a LAN: 10.LAN.0.HOST and fd00:LAN::HOST.
        let plug = |host: &Namespace, link: &str, port: &str, bridge: &str, lan: u8, number: u8| {
            host.ip(&format!("link add {link} type veth peer name {port} netns {}", switch.name()));
            switch.ip(&format!("link set {port} master {bridge} up"));
            host.ip(&format!(
                "address add 10.{lan}.0.{number}/24 dev {link}\n\
                 address add fd00:{lan}::{number}/64 dev {link} nodad\nlink set {link} up"
            ));
        };
        let (client, server) = (place("client"), place("server"));
        plug(&client, "eth0", "client", "lan-c", 1, 10);
        plug(&server, "eth0", "server", "lan-s", 2, 10);
        let gateways = (1..=gateways).map(|number| {
            let gateway = place(&format!("gw{number}"));
            plug(&gateway, "cl0", &format!("gw{number}-c"), "lan-c", 1, number);
            plug(&gateway, "sv0", &format!("gw{number}-s"), "lan-s", 2, number);
            plug(&gateway, "sy0", &format!("gw{number}-y"), "lan-y", 9, number);
            gateway.sysctl("net/ipv4/ip_forward", "1");
            gateway.sysctl("net/ipv6/conf/all/forwarding", "1");
            // With loose pick-up the kernel carries on any flow it meets in the middle, under a new
            // translation, and a takeover seems to work with no replication at all.
            gateway.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
            // Windows are not replicated: without this a flow that moves back is INVALID.
            gateway.sysctl("net/netfilter/nf_conntrack_tcp_be_liberal", "1");
            // With 2, a connection born while nobody listened never raises an event.
            gateway.sysctl("net/netfilter/nf_conntrack_events", "1");
            gateway.nft(&[RULES].iter().chain(rules).copied().collect::<String>());
            gateway
        });
        let topology =
            Topology { gateways: gateways.collect(), prefix, client, server, _switch: switch };
        topology.route_through(1);
        topology
    }

    /// Sends the traffic of client and server through a gateway, by hand.
    pub fn route_through(&self, gateway: u8) {
        for (namespace, routes) in self.routes_through(gateway) {
            namespace.ip(&routes);
        }
    }

    /// The same as commands for the gateway's own notify script.
    pub fn move_routes_script(&self, gateway: u8) -> String {
        let batch = |(namespace, routes): (&Namespace, String)| {
            format!("ip -n {} -batch - <<END\n{routes}END\n", namespace.name())
        };
        self.routes_through(gateway).into_iter().map(batch).collect()
    }

    fn routes_through(&self, gateway: u8) -> [(&Namespace, String); 2] {
        let routes = |lan: u8, networks: [&str; 2], networks_v6: [&str; 2]| -> String {
            let v4 = networks.map(|to| format!("route replace {to} via 10.{lan}.0.{gateway}\n"));
            let v6 =
                networks_v6.map(|to| format!("route replace {to} via fd00:{lan}::{gateway}\n"));
            v4.into_iter().chain(v6).collect()
        };
        [
            (
                &self.client,
                routes(1, ["10.2.0.0/24", "10.4.0.1/32"], ["fd00:2::/64", "fd00:4::1/128"]),
            ),
            (
                &self.server,
                routes(2, ["10.1.0.0/24", "10.3.0.0/16"], ["fd00:1::/64", "fd00:3::1/128"]),
            ),
        ]
    }

    /// Takes a gateway off all its links at once, as if its power had failed.
    pub fn unplug(&self, gateway: u8) {
        self.gateway(gateway).ip(&LINKS.map(|link| format!("link set {link} down\n")).concat());
    }

    /// A gateway by its number, from 1.
    pub fn gateway(&self, number: u8) -> &Namespace {
        &self.gateways[usize::from(number) - 1]
    }

    /// The numbers of all gateways.
    pub fn members(&self) -> std::ops::RangeInclusive<u8> {
        1..=self.gateways.len() as u8
    }
}
