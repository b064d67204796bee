//! Conntrack on the real kernel: every test in a network namespace of its own, which nothing
//! outside of it notices.
//!
//! ```text
//!   client 10.0.1.2 --- 10.0.1.1 gateway 10.0.2.1 --- 10.0.2.2 server
//!                         (SNAT and DNAT)           (no route back to 10.0.1.0/24)
//! ```

mod gateway;

use std::collections::{HashMap, HashSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use gateway::{DEADLINE, Host, in_namespace, run, wait_for};
use hypersync::conn::{Connection, State, Tuple, shard_of};
use hypersync::conntrack::commit::{CommitResult, Committer, FlushFirst, KEPT_TIMEOUT_S, Lifetime, Outcome};
use hypersync::conntrack::dump::{DumpProgress, DumpState};
use hypersync::conntrack::events::Source;
use hypersync::conntrack::local::{LocalAddresses, LocalView};
use hypersync::conntrack::{KernelError, sysctl};
use hypersync::source::SourceEvent;

const BUFFER: usize = 8 << 20;

fn connection(original: &str, reply: &str) -> Connection {
    let state = State {
        status: 0x19e,
        tcp_state: 3,
        tcp_scale: 0x7a,
        tcp_flags_original: 0x23,
        tcp_flags_reply: 0x23,
        timeout_s: 1,
        mark: 7,
    };
    let tuple = |text: &str| text.parse().expect("a tuple");
    Connection { original: tuple(original), reply: tuple(reply), state }
}

/// One of many connections behind one address.
fn numbered(n: u16) -> Connection {
    let client = Ipv4Addr::from(0x0a00_0100 + n as u32 % 50);
    connection(
        &format!("tcp {client}:{} > 198.51.100.7:443", 1000 + n),
        &format!("tcp 198.51.100.7:443 > 203.0.113.1:{}", 20_000 + n),
    )
}

fn outcomes(committer: &mut Committer) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    committer.flush(&mut |CommitResult { index, outcome, .. }| {
        assert_eq!(index, outcomes.len());
        outcomes.push(outcome);
    });
    outcomes
}

fn write(committer: &mut Committer, connection: &Connection) -> Outcome {
    committer.write(connection, Lifetime::Kept).expect("an empty batch");
    outcomes(committer)[0]
}

fn delete(committer: &mut Committer, original: &Tuple) -> Outcome {
    committer.delete(original).expect("an empty batch");
    outcomes(committer)[0]
}

fn write_all(committer: &mut Committer, numbers: std::ops::Range<u16>) {
    for n in numbers {
        if committer.write(&numbered(n), Lifetime::Kept) == Err(FlushFirst) {
            assert!(outcomes(committer).iter().all(|o| *o == Outcome::Written));
            committer.write(&numbered(n), Lifetime::Kept).expect("an empty batch");
        }
    }
    assert!(outcomes(committer).iter().all(|o| *o == Outcome::Written));
}

fn delete_all(committer: &mut Committer, numbers: std::ops::Range<u16>) {
    for n in numbers {
        assert_eq!(delete(committer, &numbered(n).original), Outcome::Removed);
    }
}

/// What is waiting now: events come with the request that caused them, so nothing is late.
fn events(source: &mut Source) -> Vec<SourceEvent> {
    let mut events = Vec::new();
    let drained = source.drain(100_000, &mut |event| events.push(event));
    assert_eq!((drained.events, drained.malformed, drained.more), (events.len(), 0, false));
    events
}

fn dump(source: &mut Source) -> Vec<Connection> {
    assert_eq!(source.start_dump(), Ok(true));
    let mut found = Vec::new();
    loop {
        let DumpProgress { malformed, state, .. } = source.drain_dump(100, &mut |event| match event {
            SourceEvent::Seen { connection, .. } => found.push(connection),
            SourceEvent::Gone { .. } => panic!("a dump has no ends"),
        });
        assert_eq!(malformed, 0);
        match state {
            DumpState::Done => return found,
            DumpState::Running => {}
            DumpState::Failed(errno) => panic!("errno {errno}"),
        }
    }
}

#[test]
fn a_restored_entry_is_what_the_active_had() {
    in_namespace("entries written to conntrack", || {
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack");
        let snat = numbered(0);
        assert_eq!(write(&mut committer, &snat), Outcome::Written);
        let list = run("conntrack -L 2>/dev/null");
        for part in [
            "ESTABLISHED src=10.0.1.0 dst=198.51.100.7 sport=1000 dport=443",
            "src=198.51.100.7 dst=203.0.113.1 sport=443 dport=20000 [ASSURED] mark=7",
        ] {
            assert!(list.contains(part), "{part} in {list}");
        }
        // Status 0x19e: SRC_NAT is set, so the entry translates; flags got BE_LIBERAL, as windows are not copied.
        let found = dump(&mut source);
        let [there] = found[..] else { panic!("one entry: {found:?}") };
        assert_eq!((there.original, there.reply, there.state.status), (snat.original, snat.reply, 0x19e));
        assert!((KEPT_TIMEOUT_S - 30..=KEPT_TIMEOUT_S).contains(&there.state.timeout_s));
        let State { tcp_state, tcp_scale, tcp_flags_original, tcp_flags_reply, mark, .. } = there.state;
        assert_eq!((tcp_state, tcp_scale, mark), (3, 0x7a, 7));
        assert_eq!((tcp_flags_original, tcp_flags_reply), (0x0b, 0x0b));

        // Its active dies: the timeout that the kernel would have given it.
        committer.write(&snat, Lifetime::Normal).expect("an empty batch");
        assert_eq!(outcomes(&mut committer), [Outcome::Written]);
        let normal = sysctl::read("net.netfilter.nf_conntrack_tcp_timeout_established").expect("a setting");
        assert!((normal as u32 - 30..=normal as u32).contains(&dump(&mut source)[0].state.timeout_s));
    });
}

#[test]
fn an_entry_that_is_there_is_brought_up_to_date_or_replaced() {
    in_namespace("updates, replacements, clashes and deletes in conntrack", || {
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[committer.port_id()], BUFFER).expect("conntrack");
        let mut c = numbered(0);
        c.state.status = 0x18a; // not assured yet
        c.state.tcp_state = 2;
        assert_eq!(write(&mut committer, &c), Outcome::Written);
        assert_eq!(dump(&mut source)[0].state.status, 0x19a, "no more than the active had");
        c.state = State { status: 0x19e, tcp_state: 4, mark: 0, ..c.state };
        assert_eq!(write(&mut committer, &c), Outcome::Written);
        let now = dump(&mut source)[0];
        assert_eq!((now.state.status, now.state.tcp_state, now.state.mark), (0x19e, 4, 0));
        c.state = State { status: 0x18a, mark: 9, ..c.state }; // bits that cannot be taken back
        assert_eq!(write(&mut committer, &c), Outcome::Written);
        let now = dump(&mut source)[0];
        assert_eq!((now.state.status, now.state.mark), (0x19e, 9));

        // The same connection with another translation: an update would keep the old one.
        c.reply.dport += 1000;
        assert_eq!(write(&mut committer, &c), Outcome::Written);
        let now = dump(&mut source);
        assert_eq!((now.len(), now[0].reply), (1, c.reply));

        // Another connection that claims the same translated tuple.
        let clash = Connection { reply: c.reply, ..numbered(1) };
        assert_eq!(write(&mut committer, &clash), Outcome::Clash);
        let unchanged = dump(&mut source);
        assert_eq!((unchanged.len(), unchanged[0].reply), (1, c.reply), "nothing has changed");
        // One that is there, with its own translation, and now wants that one.
        assert_eq!(write(&mut committer, &numbered(1)), Outcome::Written);
        assert_eq!(write(&mut committer, &clash), Outcome::Clash);

        // Everything at once, and one of a name at a time.
        committer.delete(&c.original).expect("an empty batch");
        assert_eq!(committer.write(&c, Lifetime::Kept), Err(FlushFirst));
        committer.write(&clash, Lifetime::Kept).expect("room");
        committer.delete(&numbered(2).original).expect("room");
        let bad = Connection { state: State { tcp_state: 200, ..c.state }, ..numbered(3) };
        committer.write(&bad, Lifetime::Kept).expect("room");
        committer.write(&numbered(4), Lifetime::Kept).expect("room");
        let expected = [
            Outcome::Removed,
            Outcome::Written,              // now that the tuple is free
            Outcome::Removed,              // was never there
            Outcome::Failed(libc::ERANGE), // no such TCP state
            Outcome::Written,
        ];
        assert_eq!(outcomes(&mut committer), expected);
        assert_eq!(outcomes(&mut committer), []);
        let there: HashSet<Tuple> = dump(&mut source).iter().map(|c| c.original).collect();
        assert_eq!(there, HashSet::from([clash.original, numbered(4).original]));
        assert_eq!(events(&mut source), [], "all of this was our own");
    });
}

#[test]
fn zones_keep_equal_tuples_apart() {
    in_namespace("conntrack zones", || {
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[], BUFFER).expect("conntrack");
        let plain = numbered(0);
        let (mut both, mut original_only) = (plain, plain);
        (both.original.zone, both.reply.zone) = (5, 5);
        original_only.original.zone = 6;
        original_only.reply.dport += 1; // its replies come back to zone 0, where `plain` holds the other port
        for c in [plain, both, original_only] {
            assert_eq!(write(&mut committer, &c), Outcome::Written, "{}", c.original);
            assert_eq!(write(&mut committer, &c), Outcome::Written, "{} again", c.original);
        }
        let there: HashSet<_> = dump(&mut source).iter().map(|c| (c.original, c.reply)).collect();
        assert_eq!(there, [plain, both, original_only].iter().map(|c| (c.original, c.reply)).collect());
        for c in [original_only, both, plain] {
            assert_eq!(delete(&mut committer, &c.original), Outcome::Removed);
        }
        assert_eq!(dump(&mut source), []);
    });
}

#[test]
fn each_shard_hears_its_own_connections_and_no_echo() {
    in_namespace("conntrack events, filtered", || {
        const COUNT: u16 = 300;
        let mut own = [Committer::open().expect("conntrack"), Committer::open().expect("conntrack")];
        let mut stranger = Committer::open().expect("conntrack");
        let ids = [own[0].port_id(), own[1].port_id()];
        let mut sources = [0, 1].map(|shard| Source::open(shard, 2, &ids, BUFFER).expect("conntrack"));

        write_all(&mut own[0], 1000..1050);
        delete_all(&mut own[1], 1000..1050);
        write_all(&mut stranger, 0..COUNT);
        run("conntrack -I -s 10.0.0.1 -d 10.0.0.2 -p udp --sport 5 --dport 53 --timeout 60 2>/dev/null");
        run("conntrack -U -s 10.0.1.0 -m 99 2>/dev/null"); // six of them
        delete_all(&mut stranger, 0..COUNT);

        let (mut seen, mut marked, mut gone) = (HashMap::new(), 0, HashSet::new());
        for (shard, source) in sources.iter_mut().enumerate() {
            for event in events(source) {
                let original = match event {
                    SourceEvent::Seen { connection, .. } => {
                        let first = seen.insert(connection.original, shard).is_none();
                        marked += (connection.state.mark == 99) as u32;
                        assert!(first || connection.state.mark == 99, "one event for one new entry");
                        connection.original
                    }
                    SourceEvent::Gone { original } => {
                        assert!(gone.insert(original));
                        original
                    }
                };
                assert_eq!(shard_of(&original, 2) as usize, shard, "the filter in the kernel agrees");
            }
            assert_eq!(source.overruns(), 0);
        }
        let all: HashSet<Tuple> = (0..COUNT).map(|n| numbered(n).original).collect();
        assert_eq!(seen.keys().copied().collect::<HashSet<_>>(), all);
        assert_eq!((gone, marked), (all, 6));
        assert!(seen.values().any(|s| *s == 0) && seen.values().any(|s| *s == 1));
    });
}

#[test]
fn dumps_of_two_shards_make_up_the_table() {
    in_namespace("conntrack dumps", || {
        const COUNT: u16 = 1000;
        let mut committer = Committer::open().expect("conntrack");
        let ids = [committer.port_id()];
        let mut sources = [0, 1].map(|shard| Source::open(shard, 2, &ids, BUFFER).expect("conntrack"));
        write_all(&mut committer, 0..COUNT);
        run("conntrack -I -s 10.0.0.1 -d 10.0.0.2 -p udp --sport 5 --dport 53 --timeout 60 2>/dev/null");
        let mut all = HashSet::new();
        for (shard, source) in sources.iter_mut().enumerate() {
            for connection in dump(source) {
                assert_eq!(shard_of(&connection.original, 2) as usize, shard);
                assert!(all.insert(connection.original));
            }
        }
        assert_eq!(all, (0..COUNT).map(|n| numbered(n).original).collect());
    });
}

#[test]
fn a_dump_does_not_bring_back_what_closed_meanwhile() {
    // The kernel prepares a piece of the dump before it is asked for; a close drained in between is newer.
    in_namespace("conntrack dumps while connections close", || {
        let mut stranger = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[], BUFFER).expect("conntrack");
        write_all(&mut stranger, 0..100);
        assert_eq!(events(&mut source).len(), 100);
        assert_eq!(source.start_dump(), Ok(true));
        assert_eq!(source.start_dump(), Ok(false), "one at a time");
        delete_all(&mut stranger, 0..100);
        assert_eq!(events(&mut source).len(), 100, "the closes");
        let mut entries = 0;
        loop {
            let progress = source.drain_dump(1, &mut |event| panic!("back from the dead: {event:?}"));
            entries += progress.entries;
            if progress.state == DumpState::Done {
                break;
            }
        }
        assert!(entries > 0, "the dump did have them");
        assert_eq!(dump(&mut source), []);

        // What is remembered for this is bounded: then the events wait for the dump to be read.
        assert_eq!(source.start_dump(), Ok(true));
        write_all(&mut stranger, 0..3000);
        let mut heard = source.drain(usize::MAX, &mut |_| {});
        assert!(heard.more && heard.events < 3000, "{heard:?}");
        assert_eq!(source.drain(usize::MAX, &mut |_| {}).events, 0);
        source.drain_dump(1, &mut |_| {});
        heard.events += events(&mut source).len();
        assert_eq!(heard.events, 3000);
    });
}

#[test]
fn an_overrun_is_noticed_and_a_dump_repairs_it() {
    in_namespace("overruns of conntrack events", || {
        let mut stranger = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[], 16 << 10).expect("conntrack");
        write_all(&mut stranger, 0..500);
        let heard = events(&mut source).len();
        assert!(
            heard < 500 && source.overruns() as usize == 500 - heard,
            "{heard} and {}",
            source.overruns()
        );
        delete_all(&mut stranger, 0..1);
        assert_eq!(events(&mut source).len(), 1, "it goes on hearing");
        assert_eq!(dump(&mut source).len(), 499);
    });
}

#[test]
fn inserts_stop_before_the_kernels_table_is_full() {
    in_namespace("the limit of the conntrack table", || {
        let mut committer = Committer::open().expect("conntrack");
        let fill = sysctl::TableFill::open().expect("figures");
        let (limit, _) = fill.limit_and_count();
        if limit > 300_000 {
            eprintln!("left out, for nf_conntrack_max is {limit}: the limit of the conntrack table");
            return;
        }
        let nth = |n: u64| {
            let mut c = numbered(0);
            c.original.src = n as u128;
            c.reply.dst = 0x0100_0000 + n as u128;
            c
        };
        let mut refused = 0;
        for n in 0..limit {
            if committer.write(&nth(n), Lifetime::Kept) == Err(FlushFirst) {
                refused += outcomes(&mut committer).iter().filter(|o| **o == Outcome::NoRoom).count();
                if refused > 0 {
                    break;
                }
                committer.write(&nth(n), Lifetime::Kept).expect("an empty batch");
            }
        }
        assert_eq!(fill.limit_and_count().1, limit * sysctl::FILL_MAX_PERCENT / 100);
        assert_eq!(write(&mut committer, &nth(limit)), Outcome::NoRoom);
        assert_eq!(write(&mut committer, &nth(5)), Outcome::Written, "what is there is kept up to date");
    });
}

#[test]
fn settings_are_set_and_put_back() {
    in_namespace("conntrack settings", || {
        let [(events, _), (liberal, _)] = sysctl::NEEDED;
        assert_eq!(sysctl::unmet(), Ok(vec![(events, 2), (liberal, 0)]));
        let changed = sysctl::set_needed().expect("settings");
        assert_eq!(sysctl::unmet(), Ok(vec![]));
        assert_eq!(changed.old_values(), [(events, 2), (liberal, 0)]);
        assert_eq!(sysctl::set_needed().expect("settings").old_values(), []);
        assert_eq!(changed.put_back(), Ok(()));
        assert_eq!(sysctl::unmet(), Ok(vec![(events, 2), (liberal, 0)]));
        let fill = sysctl::TableFill::open().expect("figures");
        write_all(&mut Committer::open().expect("conntrack"), 0..10);
        assert_eq!(fill.limit_and_count().1, 10, "of this namespace");
        assert!(fill.room() < fill.limit_and_count().0);
    });
}

#[test]
fn without_the_capability_the_error_says_so() {
    in_namespace("errors without CAP_NET_ADMIN", || {
        // SAFETY: the bare system call changes this thread only, and no memory.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) }, 0);
        let errors = [Committer::open().err(), Source::open(0, 1, &[], BUFFER).err()];
        for error in errors {
            let error = error.expect("not permitted");
            assert!(matches!(error, KernelError::NotPermitted { .. }), "{error:?}");
            assert!(error.to_string().contains("CAP_NET_ADMIN is missing; run as root"), "{error}");
        }
    });
}

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
        let changed = sysctl::set_needed().expect("settings");
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
                for event in events(&mut source) {
                    let SourceEvent::Seen { connection, .. } = event else { panic!("{event:?}") };
                    copy = Some(connection);
                }
                copy.filter(|c| c.state.status & 4 != 0)
            });
            assert_eq!((copy.state.status, copy.state.tcp_state), (status, 3));
            assert!(!local.is_local(&copy), "forwarded, although our address is in it");

            // Its gateway dies: without the entry nothing passes in either direction.
            assert_eq!(delete(&mut committer, &copy.original), Outcome::Removed);
            far.set_read_timeout(Some(Duration::from_millis(700))).expect("a timeout");
            let error = exchange(&mut near, &mut far, b"two.").expect_err("a gateway that knows nothing");
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
            assert!(there.iter().any(|c| (c.original, c.reply) == (copy.original, copy.reply)), "{there:?}");
            drop((near, far));
            wait_for("the end is seen", || {
                events(&mut source).iter().find_map(|event| match event {
                    SourceEvent::Seen { connection, .. } => (connection.state.tcp_state == 7).then_some(()),
                    SourceEvent::Gone { .. } => None,
                })
            });
            assert_eq!(delete(&mut committer, &copy.original), Outcome::Removed);
        }
        changed.put_back().expect("settings");
    });
}
