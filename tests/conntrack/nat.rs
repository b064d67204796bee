//! Translated connections other than TCP over IPv4 go on through a restored entry, too.
//!
//! ```text
//!   client fd01::2, 10.0.1.2 --- fd01::1, 10.0.1.1 gateway fd02::1, 10.0.2.1 --- fd02::2, 10.0.2.2 server
//!                                    (SNAT and DNAT)         (no route back to the client)
//! ```

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;

use hypersync::conn::Family;
use hypersync::conn::tuple::{TCP, UDP};
use hypersync::conntrack::commit::is_touched;

use super::*;
use crate::namespace::{DEADLINE, Host, wait_for};

const RULES: &str = "nft -f - <<'END'
table inet t {
  chain pre { type nat hook prerouting priority dstnat;
    ip daddr 10.0.1.1 udp dport 8080 dnat ip to 10.0.2.2:80
    ip6 daddr fd01::1 tcp dport 8080 dnat ip6 to [fd02::2]:80
  }
  chain post { type nat hook postrouting priority srcnat;
    oifname \"server\" meta nfproto ipv4 meta l4proto udp snat ip to 10.0.2.1:20000-20100
    oifname \"server\" meta nfproto ipv6 meta l4proto tcp snat ip6 to [fd02::1]:20000-20100
  }
  chain forward { type filter hook forward priority filter;
    ct state invalid drop
  }
  chain input { type filter hook input priority filter;
    ct state invalid drop
    udp dport 20000-20100 drop
  }
}
END
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.netfilter.nf_conntrack_tcp_loose=0";

/// The gateway between its two hosts.
fn gateway() -> (Host, Host) {
    gateway_with(RULES)
}

fn gateway_with(rules: &str) -> (Host, Host) {
    let (client, server) = (Host::new(), Host::new());
    client.link("client", "10.0.1.1", "10.0.1.2");
    server.link("server", "10.0.2.1", "10.0.2.2");
    run("ip addr add fd01::1/64 dev client nodad; ip addr add fd02::1/64 dev server nodad");
    client
        .inside(|| run("ip addr add fd01::2/64 dev eth0 nodad; ip route add default via 10.0.1.1"));
    client.inside(|| run("ip -6 route add default via fd01::1"));
    server.inside(|| run("ip addr add fd02::2/64 dev eth0 nodad"));
    run(rules);
    (client, server)
}

fn translated(source: &mut Source, family: Family, protocol: u8) -> Connection {
    let mut copy = None;
    wait_for("an answered connection", || {
        for event in events(source) {
            let SourceEvent::Seen { connection, .. } = event else { continue };
            let c = connection.original;
            if (c.family, c.protocol, c.dport) == (family, protocol, 8080) {
                copy = Some(connection);
            }
        }
        copy.filter(|c| c.state.status & 2 != 0)
    })
}

#[test]
fn a_udp_exchange_goes_on_through_a_restored_entry() {
    in_namespace("real UDP through deleted and restored entries", || udp_goes_on(RULES));
}

#[test]
fn a_masqueraded_exchange_goes_on_through_a_restored_entry() {
    let rules = RULES.replace("snat ip to 10.0.2.1:20000-20100", "masquerade to :20000-20100");
    assert_ne!(rules, RULES);
    in_namespace("masqueraded UDP through deleted and restored entries", || udp_goes_on(&rules));
}

/// A socket on either side of the gateway.
fn udp_ends(client: &Host, server: &Host) -> (UdpSocket, UdpSocket) {
    let near = client.inside(|| UdpSocket::bind("10.0.1.2:0").expect("an address"));
    let far = server.inside(|| UdpSocket::bind("10.0.2.2:80").expect("an address"));
    for socket in [&near, &far] {
        socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    }
    (near, far)
}

fn udp_goes_on(rules: &str) {
    let (client, server) = gateway_with(rules);
    let mut committer = Committer::open().expect("conntrack");
    let mut source = Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack");
    let (near, far) = udp_ends(&client, &server);
    let mut got = [0; 4];
    near.send_to(b"one.", "10.0.1.1:8080").expect("to send");
    let (_, peer) = far.recv_from(&mut got).expect("to arrive");
    far.send_to(b"two.", peer).expect("to send");
    near.recv_from(&mut got).expect("to arrive");
    let copy = translated(&mut source, Family::V4, UDP);
    assert_eq!((copy.reply.dport, copy.state.status & 0x30), (peer.port(), 0x30));

    // Without the entry no answer finds its way.
    assert_eq!(delete(&mut committer, &copy.original), Outcome::Absent);
    near.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
    far.send_to(b"lost", peer).expect("to send");
    assert!(near.recv_from(&mut got).is_err());
    near.set_read_timeout(Some(DEADLINE)).expect("a timeout");

    assert_eq!(write(&mut committer, &copy), Outcome::Written);
    far.send_to(b"back", peer).expect("to send");
    let (_, from) = near.recv_from(&mut got).expect("to arrive");
    assert_eq!((&got, from.to_string().as_str()), (b"back", "10.0.1.1:8080"));
    near.send_to(b"more", "10.0.1.1:8080").expect("to send");
    assert_eq!(far.recv_from(&mut got).expect("to arrive").1, peer, "the same translation");
}

#[test]
fn what_packets_have_passed_is_neither_written_again_nor_removed_for_another_connections_copy() {
    in_namespace("copies over entries with and without packets", || {
        let (client, server) = gateway();
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack");
        let (near, far) = udp_ends(&client, &server);
        let mut got = [0; 4];
        let mut exchange = || {
            near.send_to(b"one.", "10.0.1.1:8080").expect("to send");
            let (_, peer) = far.recv_from(&mut got).expect("to arrive");
            far.send_to(b"two.", peer).expect("to send");
            near.recv_from(&mut got).expect("to arrive");
            peer
        };
        let peer = exchange();
        let copy = translated(&mut source, Family::V4, UDP);
        let keep = |committer: &mut Committer, connection: &Connection| {
            committer.keep(connection, Lifetime::Kept, 0).expect("an empty batch");
            outcomes(committer)[0]
        };
        let look = |committer: &mut Committer| {
            committer.look(&copy.original).expect("an empty batch");
            match outcomes(committer)[0] {
                Outcome::Present(there) => Some(there),
                _ => None,
            }
        };
        // As it was written it is written again; as packets left it it stays; where it is gone it
        // is made.
        assert_eq!(write(&mut committer, &copy), Outcome::Written);
        let marked = Connection { state: State { mark: 5, ..copy.state }, ..copy };
        assert_eq!(keep(&mut committer, &marked), Outcome::Written);
        let there = look(&mut committer).expect("it is there");
        assert_eq!((there.state.mark, is_touched(&there)), (5, false));
        assert_eq!(exchange(), peer);
        assert_eq!(keep(&mut committer, &copy), Outcome::AsItWas);
        let there = look(&mut committer).expect("it is there");
        assert_eq!((there.state.mark, is_touched(&there)), (5, true));

        // Another connection's copy is kept out, and this one goes on in its translation. So it
        // does if that connection was taken over, for a packet has passed just now.
        let mut other = copy;
        other.reply.dport += 1000;
        let there = |outcome| match outcome {
            Outcome::Another(there) => there.reply,
            outcome => panic!("{outcome:?}"),
        };
        assert_eq!(there(write(&mut committer, &other)), copy.reply);
        assert_eq!(exchange(), peer);
        committer.keep(&other, Lifetime::Normal, 0).expect("an empty batch");
        assert_eq!(there(outcomes(&mut committer)[0]), copy.reply);
        assert_eq!(exchange(), peer);
        // A takeover lets it last as long as a new one: here as the dead gateway's kernel had last
        // given it. No less than it has.
        for (given_s, outcome) in
            [(5, Outcome::AsItWas), (1000, Outcome::Written), (500, Outcome::AsItWas)]
        {
            let given = Connection { state: State { timeout_s: given_s, ..copy.state }, ..copy };
            committer.keep(&given, Lifetime::Normal, 0).expect("an empty batch");
            assert_eq!(outcomes(&mut committer), [outcome], "{given_s} s");
        }
        let there = look(&mut committer).expect("it is there");
        assert!(
            (990..=1000).contains(&there.state.timeout_s) && there.state.mark == 5,
            "{there:?}"
        );
        // One that no packet has passed is dead weight.
        assert_eq!(write(&mut committer, &copy), Outcome::Written);
        assert_eq!(write(&mut committer, &other), Outcome::Written);
        assert_eq!(look(&mut committer).map(|there| there.reply), Some(other.reply));
        assert_eq!(delete(&mut committer, &copy.original), Outcome::Absent);
        assert_eq!(keep(&mut committer, &copy), Outcome::Written);
        assert_eq!(exchange(), peer);
    });
}

#[test]
fn a_redirected_exchange_goes_on_through_a_restored_entry() {
    // Redirected to the gateway itself: what only a rule makes a member copy.
    in_namespace("redirected UDP through deleted and restored entries", || {
        let (client, _server) = gateway();
        run("nft add rule inet t pre udp dport 8081 redirect to :81");
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack");
        let near = client.inside(|| UdpSocket::bind("10.0.1.2:0").expect("an address"));
        let proxy = UdpSocket::bind("10.0.1.1:81").expect("an address");
        for socket in [&near, &proxy] {
            socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        }
        let mut got = [0; 4];
        near.send_to(b"one.", "10.0.2.2:8081").expect("to send");
        let (_, peer) = proxy.recv_from(&mut got).expect("to arrive");
        proxy.send_to(b"two.", peer).expect("to send");
        assert_eq!(near.recv_from(&mut got).expect("to arrive").1.to_string(), "10.0.2.2:8081");
        let copy = wait_for("the redirected connection", || {
            events(&mut source).into_iter().find_map(|event| match event {
                SourceEvent::Seen { connection: c, .. } if c.original.dport == 8081 => Some(c),
                _ => None,
            })
        });
        assert_eq!(delete(&mut committer, &copy.original), Outcome::Absent);
        assert_eq!(write(&mut committer, &copy), Outcome::Written);
        proxy.send_to(b"back", peer).expect("to send");
        let (_, from) = near.recv_from(&mut got).expect("to arrive");
        assert_eq!(
            (&got, from.to_string().as_str()),
            (b"back", "10.0.2.2:8081"),
            "translated back"
        );
    });
}

#[test]
fn an_ipv6_connection_goes_on_through_a_restored_entry() {
    in_namespace("real TCP over IPv6 through deleted and restored entries", || {
        let (client, server) = gateway();
        run("sysctl -qw net.netfilter.nf_conntrack_tcp_be_liberal=1");
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack");
        let listener = server.listen("[fd02::2]:80");
        let mut near: TcpStream = client.connect("[fd01::1]:8080");
        let (mut far, peer) = listener.accept().expect("a connection");
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        }
        let mut got = [0; 4];
        let copy = wait_for("it is established", || {
            let copy = translated(&mut source, Family::V6, TCP);
            (copy.state.tcp_state == 3).then_some(copy)
        });
        assert_eq!((copy.reply.dport, copy.state.status & 0x30), (peer.port(), 0x30));

        assert_eq!(delete(&mut committer, &copy.original), Outcome::Absent);
        near.write_all(b"lost").expect("to send");
        far.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
        assert!(far.read_exact(&mut got).is_err(), "a gateway that knows nothing");
        far.set_read_timeout(Some(DEADLINE)).expect("a timeout");

        assert_eq!(write(&mut committer, &copy), Outcome::Written);
        far.read_exact(&mut got).expect("TCP sends it again");
        far.write_all(b"back").expect("to send");
        near.read_exact(&mut got).expect("to arrive");
        assert_eq!(&got, b"back");
    });
}
