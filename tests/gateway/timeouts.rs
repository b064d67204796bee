//! What time a restored entry has when its gateway is dead: a timeout policy's, and settings
//! changed since the start.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use crate::appliance::{Appliances, Discovery};
use crate::common::{may_make_namespaces, run, wait_for};
use crate::entries;
use crate::one_at_a_time;
use crate::topology::{SERVER, SHARED, Topology};
use crate::traffic::Traffic;

/// A timeout policy: only its value can be restored.
const POLICY: &str = "
table inet patience {
    ct timeout patient {
        protocol udp
        l3proto ip
        policy = { unreplied : 300, replied : 300 }
    }
    chain prerouting {
        type filter hook prerouting priority mangle;
        iifname cl0 udp dport 7000 ct timeout set \"patient\"
    }
}
";
const PORT: u16 = 7000;

/// The timeouts that a gateway's entries of connections to this port have now.
fn timeouts(topology: &Topology, gateway: u8, protocol: &str, port: u16) -> Vec<u64> {
    let mut list = topology.gateway(gateway).command("conntrack");
    let list = run(list.args(["-L", "-p", protocol, "--dport", &port.to_string()]));
    list.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse().ok()).collect()
}

#[test]
fn a_flow_with_a_timeout_policy_that_falls_silent_outlives_its_gateway_by_more_than_the_sysctl() {
    if !may_make_namespaces("a ct timeout policy and the death of a gateway") {
        return;
    }
    /// What the kernel gives without the policy; and for how long the flow is silent.
    const SYSCTL_S: u64 = 3;
    let silence = Duration::from_secs(2 * SYSCTL_S);
    let _turn = one_at_a_time();
    let topology = Topology::build_with(2, &[POLICY]);
    for gateway in &topology.gateways {
        for setting in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
            gateway.sysctl(&format!("net/netfilter/{setting}"), &SYSCTL_S.to_string());
        }
    }
    let mut appliances = Appliances::start(&topology, Discovery::Multicast, &[1, 1]);
    let client = topology.client.inside(|| UdpSocket::bind("10.1.0.10:0").expect("its address"));
    let server = topology.server.inside(|| UdpSocket::bind((SERVER, PORT)).expect("its address"));
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a time that is not zero");
    }
    client.connect((SERVER, PORT)).expect("it is bound");
    let say = |from_server: bool| {
        let mut word = [0; 8];
        let (_, peer) = match from_server {
            false => {
                client.send(b"question").expect("the way is open");
                server.recv_from(&mut word).expect("the server is reached")
            }
            true => {
                server
                    .send_to(
                        b"answered",
                        (SHARED, client.local_addr().expect("it is bound").port()),
                    )
                    .expect("the way is open");
                client.recv_from(&mut word).expect("the client is reached")
            }
        };
        assert!(&word == if from_server { b"answered" } else { b"question" });
        peer
    };
    let name = say(false);
    assert_eq!(name.ip().to_string(), SHARED, "it is translated");
    appliances.wait_for("gateway 2 has the flow", Duration::from_secs(20), || {
        (say(true), assert_eq!(say(false), name, "the same flow"));
        let entries = entries::read(topology.gateway(2));
        entries.values().any(|e| e.original.to.port() == PORT && e.is_established())
    });
    assert!(timeouts(&topology, 1, "udp", PORT)[0] > 100, "gateway 1's kernel goes by the policy");

    appliances.power_off(1);
    appliances.wait_until_told_dead(2, 1);
    let dead = Instant::now();
    wait_for(
        "the entry of the dead gateway's flow gets a time of its own",
        Duration::from_secs(10),
        || timeouts(&topology, 2, "udp", PORT)[0] < 1000,
    );
    let rest = timeouts(&topology, 2, "udp", PORT)[0];
    wait_for("a silence longer than the sysctl", 2 * silence, || dead.elapsed() > silence);
    // The server speaks first: only the entry knows where to.
    say(true);
    assert_eq!(say(false), name, "the same translation");
    assert!((250..=300).contains(&rest), "{rest} s: what gateway 1's kernel had given it");
    appliances.assert_running("the survivor survives");
}

#[test]
fn settings_changed_since_the_start_are_those_that_restored_entries_get() {
    if !may_make_namespaces("sysctls changed while hypersync runs") {
        return;
    }
    const CONNECTIONS: usize = 5;
    const CHANGED_S: u64 = 500_000;
    let _turn = one_at_a_time();
    let topology = Topology::build(2);
    let silent;
    let mut appliances = Appliances::start(&topology, Discovery::Multicast, &[1, 2]);
    silent = Traffic::start(&topology.client, &topology.server, (SERVER, PORT), CONNECTIONS);
    appliances.wait_for("gateway 2 has the connections", Duration::from_secs(20), || {
        entries::are_replicated(&entries::read(topology.gateway(2)), &silent, SHARED)
    });
    silent.finish(Duration::from_secs(1));
    topology
        .gateway(2)
        .sysctl("net/netfilter/nf_conntrack_tcp_timeout_established", &CHANGED_S.to_string());
    let changed = Instant::now();
    wait_for("the documented second", Duration::from_secs(5), || {
        changed.elapsed() > Duration::from_secs(1)
    });

    appliances.power_off(1);
    appliances.wait_until_told_dead(2, 1);
    let mut rest = Vec::new();
    wait_for("their entries get a time of their own", Duration::from_secs(10), || {
        rest = timeouts(&topology, 2, "tcp", PORT);
        rest.len() == CONNECTIONS && rest.iter().all(|seconds| *seconds <= CHANGED_S)
    });
    assert!(rest.iter().all(|seconds| *seconds > CHANGED_S - 60), "{rest:?}");
    appliances.assert_running("the survivor survives");
}
