//! The proof that matters: a TCP connection goes on through a restored entry, and does not without.
//!
//! ```text
//!   client 10.0.1.2 --- 10.0.1.1 gateway 10.0.2.1 --- 10.0.2.2 server
//!                         (SNAT and DNAT)             (no route back to 10.0.1.0/24)
//! ```

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hypersync::conntrack::local::{LocalAddresses, LocalView};
use hypersync::conntrack::sysctl;
use hypersync::shm::old_values::{OLD_VALUES_WORDS, OldValues};

use super::*;
use crate::namespace::{DEADLINE, Host, wait_for};

/// The gateway's rules: SNAT to other ports, DNAT, and no mercy for what conntrack does not know.
/// (Without the input chain the gateway itself would answer packets of a lost DNAT with a reset.)
const RULES: &str = "nft -f - <<'END'
table ip t {
  chain pre { type nat hook prerouting priority dstnat;
    ip daddr 10.0.1.1 tcp dport 8080 dnat to 10.0.2.2:80;
  }
  chain post { type nat hook postrouting priority srcnat;
    oifname \"server\" meta l4proto tcp snat to 10.0.2.1:20000-20100;
  }
  chain forward { type filter hook forward priority 0;
    ct state invalid drop;
  }
  chain input { type filter hook input priority 0;
    ct state invalid drop;
  }
}
END
sysctl -qw net.ipv4.ip_forward=1 net.netfilter.nf_conntrack_tcp_loose=0";

fn exchange(from: &mut TcpStream, to: &mut TcpStream, word: &[u8; 4]) -> std::io::Result<()> {
    from.write_all(word)?;
    let mut got = [0; 4];
    to.read_exact(&mut got)?;
    assert_eq!(&got, word);
    Ok(())
}

#[test]
fn a_tcp_connection_goes_on_through_a_restored_entry() {
    in_namespace("real TCP through deleted and restored entries", || {
        let (client, server) = (Host::new(), Host::new());
        client.link("client", "10.0.1.1", "10.0.1.2");
        server.link("server", "10.0.2.1", "10.0.2.2");
        client.inside(|| run("ip route add default via 10.0.1.1"));
        run(RULES);
        let record = [const { AtomicU64::new(0) }; OLD_VALUES_WORDS];
        let changed = sysctl::set_needed(OldValues::new(&record)).expect("settings");
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack");
        let addresses = LocalAddresses::new();
        addresses.refresh().expect("addresses");
        let mut local = LocalView::new();
        assert!(local.follow(&addresses));

        let listener = server.listen("10.0.2.2:80");
        for (service, status) in [("10.0.2.2:80", 0x19e), ("10.0.1.1:8080", 0x1be)] {
            let mut near = client.connect(service);
            let (mut far, peer) = listener.accept().expect("a connection");
            assert_eq!(peer.ip(), Ipv4Addr::new(10, 0, 2, 1), "translated");
            assert_ne!(peer.port(), near.local_addr().expect("an address").port(), "and its port");
            for stream in [&near, &far] {
                stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
            }
            exchange(&mut near, &mut far, b"one.").expect("to arrive");

            // The active's side: what the events say.
            let mut copy = None;
            let copy = wait_for("the connection is assured", || {
                for (event, origin) in heard(&mut source) {
                    let SourceEvent::Seen { connection, .. } = event else { panic!("{event:?}") };
                    assert_eq!(origin, Origin::Kernel, "packets: {event:?}");
                    copy = Some(connection);
                }
                copy.filter(|c| c.state.status & 4 != 0)
            });
            assert_eq!((copy.state.status, copy.state.tcp_state), (status, 3));
            assert!(!local.is_local(&copy), "forwarded, although our address is in it");

            // Its gateway dies: without the entry nothing passes in either direction.
            assert_eq!(delete(&mut committer, &copy.original), Outcome::Absent);
            far.set_read_timeout(Some(Duration::from_millis(700))).expect("a timeout");
            let error =
                exchange(&mut near, &mut far, b"two.").expect_err("a gateway that knows nothing");
            assert_eq!(error.kind(), ErrorKind::WouldBlock);

            // The backup's side: the entry is restored, and TCP's own repetition arrives.
            assert_eq!(write(&mut committer, &copy), Outcome::Written);
            far.set_read_timeout(Some(DEADLINE)).expect("a timeout");
            let mut got = [0; 4];
            far.read_exact(&mut got).expect("the connection goes on");
            assert_eq!(&got, b"two.");
            exchange(&mut far, &mut near, b"back").expect("the other way");
            exchange(&mut near, &mut far, b"thre").expect("and again");

            let there = dump(&mut source);
            assert!(
                there.iter().any(|c| (c.original, c.reply) == (copy.original, copy.reply)),
                "{there:?}"
            );
            drop((near, far));
            wait_for("the end is seen", || {
                events(&mut source).iter().find_map(|event| match event {
                    SourceEvent::Seen { connection, .. } => {
                        (connection.state.tcp_state == 7).then_some(())
                    }
                    SourceEvent::Gone { .. } => None,
                })
            });
            assert_eq!(delete(&mut committer, &copy.original), Outcome::Absent);
        }
        changed.put_back().expect("settings");
    });
}
