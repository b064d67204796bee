//! Events, dumps, and what happens when there are too many.

use std::collections::{HashMap, HashSet};

use hypersync::conn::extra::{HELPER_NAME, parts};
use hypersync::conn::{Extra, shard_of};

use super::*;

#[test]
fn each_shard_hears_its_own_connections_and_no_echo() {
    in_namespace("conntrack events, filtered", || {
        const COUNT: u16 = 300;
        let mut own =
            [Committer::open().expect("conntrack"), Committer::open().expect("conntrack")];
        let mut stranger = Committer::open().expect("conntrack");
        let ids = [own[0].port_id(), own[1].port_id()];
        let mut sources =
            [0, 1].map(|shard| Source::open(shard, 2, &ids, BUFFER).expect("conntrack"));

        write_all(&mut own[0], 1000..1050);
        delete_all(&mut own[1], 1000..1050);
        write_all(&mut stranger, 0..COUNT);
        run(
            "conntrack -I -s 10.0.0.1 -d 10.0.0.2 -p udp --sport 5 --dport 53 --timeout 60 2>/dev/null",
        );
        run("conntrack -U -s 10.0.1.0 -m 99 2>/dev/null"); // six of them
        delete_all(&mut stranger, 0..COUNT);

        let (mut seen, mut marked, mut gone) = (HashMap::new(), 0, HashSet::new());
        for (shard, source) in sources.iter_mut().enumerate() {
            for event in events(source) {
                let original = match event {
                    SourceEvent::Seen { connection, .. } => {
                        let first = seen.insert(connection.original, shard).is_none();
                        marked += (connection.state.mark == 99) as u32;
                        assert!(
                            first || connection.state.mark == 99,
                            "one event for one new entry"
                        );
                        connection.original
                    }
                    SourceEvent::Gone { original, .. } => {
                        assert!(gone.insert(original));
                        original
                    }
                };
                assert_eq!(
                    shard_of(&original, 2) as usize,
                    shard,
                    "the filter in the kernel agrees"
                );
            }
            assert_eq!(source.overruns(), 0);
        }
        let all: HashSet<Tuple> = (0..COUNT).map(|n| numbered(n).original).collect();
        let datagrams = "udp 10.0.0.1:5 > 10.0.0.2:53".parse().expect("a tuple");
        assert!(seen.remove(&datagrams).is_some());
        assert!(seen.keys().copied().collect::<HashSet<_>>() == all);
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
        let mut sources =
            [0, 1].map(|shard| Source::open(shard, 2, &ids, BUFFER).expect("conntrack"));
        write_all(&mut committer, 0..COUNT);
        run(
            "conntrack -I -s 10.0.0.1 -d 10.0.0.2 -p udp --sport 5 --dport 53 --timeout 60 2>/dev/null",
        );
        let mut all = HashSet::new();
        for (shard, source) in sources.iter_mut().enumerate() {
            for connection in dump(source) {
                assert_eq!(shard_of(&connection.original, 2) as usize, shard);
                assert!(all.insert(connection.original));
            }
        }
        assert!(all.remove(&"udp 10.0.0.1:5 > 10.0.0.2:53".parse().expect("a tuple")));
        assert!(all == (0..COUNT).map(|n| numbered(n).original).collect());
    });
}

#[test]
fn each_shard_is_told_which_of_its_connections_expects_another() {
    in_namespace("expectations", || {
        const COUNT: u16 = 50; // each has a client of its own
        let mut stranger = Committer::open().expect("conntrack");
        let mut sources =
            [0, 1].map(|shard| Source::open(shard, 2, &[], BUFFER).expect("conntrack"));
        for n in 0..COUNT {
            let connection = Connection { extra: ftp(), ..numbered(n) };
            assert_eq!(write(&mut stranger, &connection), Outcome::Written);
        }
        run(&format!(
            "for n in $(seq 0 {}); do client=10.0.1.$((n % 50)) port=$((1000 + n))
             conntrack -I expect -t 100 -p tcp --orig-src $client --orig-dst 198.51.100.7 --orig-port-src $port \
             --orig-port-dst 443 --tuple-src 198.51.100.7 --tuple-dst $client --tuple-port-src 20 \
             --tuple-port-dst $port --mask-src 255.255.255.255 --mask-dst 255.255.255.255 --mask-port-src 0 \
             --mask-port-dst 65535
             done",
            COUNT - 1
        ));
        for (shard, source) in (0..).zip(&mut sources) {
            let (mut told, mut counted) = (HashSet::new(), 0);
            loop {
                let drained = source.drain(usize::MAX, &mut |_, _| {});
                assert_eq!(drained.malformed, 0);
                counted += drained.expectations;
                told.extend(std::iter::from_fn(|| source.next_expecting()));
                if !drained.more {
                    break;
                }
            }
            let originals = (0..COUNT).map(|n| numbered(n).original);
            let ours: HashSet<Tuple> = originals.filter(|o| shard_of(o, 2) == shard).collect();
            assert!(ours.len() > 10 && counted == ours.len());
            assert_eq!(told, ours);
        }
    });
}

fn ftp() -> Extra {
    let mut helper = [0; HELPER_NAME];
    helper[..3].copy_from_slice(b"ftp");
    Extra { parts: parts::HELPER, helper, ..Extra::NONE }
}

#[test]
fn a_dump_does_not_bring_back_what_closed_meanwhile() {
    // The kernel prepares a piece of the dump before it is asked for; a close drained in between is
    // newer.
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
            let progress =
                source.drain_dump(1, &mut |event| panic!("back from the dead: {event:?}"));
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
        let mut heard = source.drain(usize::MAX, &mut |_, _| {});
        assert!(heard.more && heard.events < 3000, "{heard:?}");
        assert_eq!(source.drain(usize::MAX, &mut |_, _| {}).events, 0);
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
