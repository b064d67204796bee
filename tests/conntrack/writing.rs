//! Entries in the kernel: created, brought up to date, replaced, refused, removed.

use std::collections::HashSet;

use hypersync::conn::Extra;
use hypersync::conn::extra::{HELPER_NAME, SeqAdj, parts};
use hypersync::conntrack::codec::status;
use hypersync::conntrack::commit::KEPT_TIMEOUT_S;
use hypersync::conntrack::fill::{FILL_MAX_PERCENT, TableFill};
use hypersync::conntrack::sysctl;
use hypersync::conntrack::timeouts::Timeouts;

use super::*;

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
        // Status 0x19e: SRC_NAT is set, so the entry translates; flags got BE_LIBERAL, as windows
        // are not copied.
        let found = dump(&mut source);
        let [there] = found[..] else { panic!("one entry: {found:?}") };
        assert_eq!(
            (there.original, there.reply, there.state.status),
            (snat.original, snat.reply, 0x19e)
        );
        assert!((KEPT_TIMEOUT_S - 30..=KEPT_TIMEOUT_S).contains(&there.state.timeout_s));
        // So a later run of the appliance can tell it from a connection whose packets pass here.
        assert!(there.state.timeout_s > Timeouts::read().of(&there));
        let State { tcp_state, tcp_scale, tcp_flags_original, tcp_flags_reply, mark, .. } =
            there.state;
        assert_eq!((tcp_state, tcp_scale, mark), (3, 0x7a, 7));
        assert_eq!((tcp_flags_original, tcp_flags_reply), (0x0b, 0x0b));

        // Its active dies: the timeout that the kernel would have given it.
        committer.write(&snat, Lifetime::Normal).expect("an empty batch");
        assert_eq!(outcomes(&mut committer), [Outcome::Written]);
        let normal =
            sysctl::read("net.netfilter.nf_conntrack_tcp_timeout_established").expect("a setting");
        assert!(
            (normal as u32 - 30..=normal as u32).contains(&dump(&mut source)[0].state.timeout_s)
        );
    });
}

#[test]
fn what_another_program_does_says_that_a_program_did_it() {
    in_namespace("who caused a conntrack event", || {
        let mut other = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[], BUFFER).expect("conntrack");
        assert_eq!(write(&mut other, &numbered(0)), Outcome::Written);
        run(&format!(
            "conntrack -U -s {} -t 60",
            std::net::Ipv4Addr::from(numbered(0).original.src as u32)
        ));
        assert_eq!(delete(&mut other, &numbered(0).original), Outcome::Absent);
        let heard = heard(&mut source);
        assert!(
            matches!(
                heard[..],
                [
                    (SourceEvent::Seen { .. }, Origin::Program),
                    (
                        SourceEvent::Seen {
                            connection: Connection { state: State { timeout_s: 59..=60, .. }, .. },
                            ..
                        },
                        Origin::Program
                    ),
                    (SourceEvent::Gone { .. }, Origin::Program)
                ]
            ),
            "{heard:?}"
        );
    });
}

#[test]
fn a_helper_or_labels_that_this_host_cannot_give_cost_nothing_else() {
    in_namespace("helpers and labels that conntrack refuses", || {
        let mut committer = Committer::open().expect("conntrack");
        let mut source = Source::open(0, 1, &[], BUFFER).expect("conntrack");
        let mut write = |c: &Connection| {
            committer.write(c, Lifetime::Kept).expect("an empty batch");
            let mut outcome = None;
            let tally = committer.flush(&mut |result| outcome = Some(result.outcome));
            assert_eq!(outcome, Some(Outcome::Written));
            tally
        };
        let named = |name: &[u8]| {
            let mut helper = [0; HELPER_NAME];
            helper[..name.len()].copy_from_slice(name);
            Extra { parts: parts::HELPER, helper, ..Extra::NONE }
        };
        // One that this kernel does not have: remembered, so that the entry is not made anew each
        // time.
        let unknown = Connection { extra: named(b"nobody"), ..numbered(0) };
        for round in 0..3 {
            let tally = write(&unknown);
            assert_eq!((tally.without_helper, tally.updated), (1, (round > 0) as u64));
        }
        assert!(
            events(&mut source).iter().all(|e| matches!(e, SourceEvent::Seen { .. })),
            "never removed"
        );
        // One that the entry which is there lacks: it is made anew once.
        let mut plain = numbered(1);
        (plain.original.dport, plain.reply.sport) = (21, 21);
        write(&plain);
        let tallies = [0; 2].map(|_| write(&Connection { extra: named(b"ftp"), ..plain }));
        assert_eq!(tallies.map(|t| (t.replaced, t.updated)), [(1, 0), (0, 1)]);
        // Labels that no rule here uses: the rest is brought up to date.
        let labels = Extra { parts: parts::LABELS, labels: [1; 16], ..Extra::NONE };
        let mut labelled = Connection { extra: labels, ..numbered(2) };
        write(&labelled);
        labelled.state.mark = 99;
        assert_eq!(write(&labelled).without_labels, 1);
        let marks: Vec<u32> = dump(&mut source).iter().map(|c| c.state.mark).collect();
        assert!(marks.contains(&99), "{marks:?}");
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
            Outcome::Absent,
            Outcome::Written,              // now that the tuple is free
            Outcome::Absent,               // was never there
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
        assert_eq!(
            there,
            [plain, both, original_only].iter().map(|c| (c.original, c.reply)).collect()
        );
        for c in [original_only, both, plain] {
            assert_eq!(delete(&mut committer, &c.original), Outcome::Absent);
        }
        assert_eq!(dump(&mut source), []);
    });
}

#[test]
fn inserts_stop_before_the_kernels_table_is_full() {
    in_namespace("the limit of the conntrack table", || {
        let mut committer = Committer::open().expect("conntrack");
        let fill = TableFill::open().expect("figures");
        let (limit, _) = fill.limit_and_count();
        if limit > 300_000 {
            eprintln!(
                "left out, for nf_conntrack_max is {limit}: the limit of the conntrack table"
            );
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
                refused +=
                    outcomes(&mut committer).iter().filter(|o| **o == Outcome::NoRoom).count();
                if refused > 0 {
                    break;
                }
                committer.write(&nth(n), Lifetime::Kept).expect("an empty batch");
            }
        }
        assert_eq!(fill.limit_and_count().1, limit * FILL_MAX_PERCENT / 100);
        assert_eq!(write(&mut committer, &nth(limit)), Outcome::NoRoom);
        assert_eq!(
            write(&mut committer, &nth(5)),
            Outcome::Written,
            "what is there is kept up to date"
        );
    });
}

#[test]
fn an_entry_of_a_dead_active_gets_what_was_last_reported_if_that_is_more_and_a_kernels() {
    in_namespace("timeouts of restored entries", || {
        let setting = "net.netfilter.nf_conntrack_tcp_timeout_established";
        let mut committer = Committer::open().expect("conntrack");
        let mut n = 0;
        let mut given = |committer: &mut Committer, reported: u32| {
            n += 1;
            let mut connection = numbered(n);
            connection.state.timeout_s = reported;
            committer.write(&connection, Lifetime::Normal).expect("an empty batch");
            committer.flush(&mut |result| assert_eq!(result.outcome, Outcome::Written));
            committer.look(&connection.original).expect("an empty batch");
            match outcomes(committer)[..] {
                [Outcome::Present(there)] => there.state.timeout_s,
                ref other => panic!("{other:?}"),
            }
        };
        sysctl::write(setting, 1000).expect("our namespace");
        committer.read_timeouts_again(30);
        // Of the last, only we can have given it: nothing is known.
        for (reported, expected) in
            [(0, 1000), (999, 1000), (5000, 5000), (KEPT_TIMEOUT_S - 3600, 1000)]
        {
            let rest = given(&mut committer, reported);
            assert!((expected - 2..=expected).contains(&rest), "{reported}: {rest}");
        }
        sysctl::write(setting, 2000).expect("our namespace");
        committer.read_timeouts_again(30);
        let rest = given(&mut committer, 999);
        assert!((1998..=2000).contains(&rest), "{rest}");
    });
}

/// Shifted in its original direction, from here on and by so much.
fn shifted(connection: &Connection, correction_position: u32, offset_after: u32) -> Connection {
    let mut shifted = *connection;
    shifted.state.status |= status::SEQ_ADJUST;
    shifted.extra.parts |= parts::SEQADJ;
    shifted.extra.seqadj[0] = SeqAdj { correction_position, offset_before: 0, offset_after };
    shifted
}

#[test]
fn a_shift_is_given_to_an_entry_and_never_taken_back() {
    in_namespace("shifts of sequence numbers", || {
        let mut committer = Committer::open().expect("conntrack");
        let plain = numbered(1);
        let shift_of = |committer: &mut Committer| {
            committer.look(&plain.original).expect("an empty batch");
            match outcomes(committer)[..] {
                [Outcome::Present(there)] => Some(there.extra.seqadj[0]),
                [Outcome::Absent] => None,
                ref other => panic!("{other:?}"),
            }
        };
        let first = shifted(&plain, u32::MAX - 10, 3);
        let second = shifted(&plain, 500, 5);
        for (connection, expected) in
            [(plain, plain), (first, first), (second, second), (first, second), (plain, second)]
        {
            assert_eq!(write(&mut committer, &connection), Outcome::Written);
            assert_eq!(shift_of(&mut committer), Some(expected.extra.seqadj[0]));
        }
    });
}

#[test]
fn what_is_shifted_by_nobody_knows_how_much_is_cut_and_told() {
    in_namespace("a shift that is not known", || {
        let mut committer = Committer::open().expect("conntrack");
        let plain = numbered(1);
        let mut unknown = shifted(&plain, 500, 5);
        unknown.extra = Extra::NONE;
        assert_eq!(write(&mut committer, &plain), Outcome::Written);
        assert_eq!(write(&mut committer, &unknown), Outcome::Unshifted);
        committer.look(&plain.original).expect("an empty batch");
        assert_eq!(outcomes(&mut committer), [Outcome::Absent], "its stream would be altered");
        committer.replace(&unknown, Lifetime::Normal).expect("an empty batch");
        assert_eq!(outcomes(&mut committer), [Outcome::Unshifted]);
        assert_eq!(write(&mut committer, &shifted(&plain, 500, 5)), Outcome::Written);
    });
}
