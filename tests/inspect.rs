//! The inspector over a region that this test fills by hand: what it says, and how it fails.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::Ordering;
use std::time::Duration;

use hypersync::clock;
use hypersync::conn::extra::{ProtoInfo, SeqAdj, Synproxy, parts};
use hypersync::conn::extras::Extras;
use hypersync::conn::index::Index;
use hypersync::conn::{
    Connection, Coordinate, Extra, Generation, Kind, Stamp, State, Tuple, shard_of,
};
use hypersync::counters::{COUNTERS, Counter, Counters};
use hypersync::group::view::{Member, Status};
use hypersync::limits::ARENA_MIN;
use hypersync::memory::MemorySize;
use hypersync::seq::Seq;
use hypersync::shm::group::Standing;
use hypersync::shm::layout::shard_layout;
use hypersync::shm::{FILE, Region, RegionConfig, Sizes};
use hypersync::sync::stream::{WORD_SEND_FLOOR, stream_index};
use hypersync::time::Time;
use serde_json::Value;

struct Appliance {
    dir: PathBuf,
    region: Region,
}

impl Drop for Appliance {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn appliance(name: &str) -> Appliance {
    let dir =
        PathBuf::from(format!("/dev/shm/hypersync-inspect-test-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    let region = Region::create(&dir, &config()).unwrap();
    region.publish_ready();
    Appliance { dir, region }
}

fn config() -> RegionConfig {
    RegionConfig {
        sizes: Sizes { shards: 2, memory: MemorySize::new(64, ARENA_MIN), ring_records: 64 },
        group: 7,
        member: 3,
        incarnation: 1,
        started: Time(clock::now().0 - 5_000_000_000),
    }
}

/// A translated TCP connection.
fn connection(n: u8) -> Connection {
    let original = Tuple::v4(6, ([10, 0, 0, n].into(), 1000), ([10, 0, 0, 200].into(), 80));
    let reply = Tuple { dst: u32::from_be_bytes([192, 0, 2, n]) as u128, ..original.mirrored() };
    let state =
        State { tcp_state: 3, timeout_s: 432_000, mark: 5, status: 0x19e, ..State::default() };
    Connection::new(original, reply, state)
}

impl Appliance {
    /// Puts a connection where it belongs; its newest state is in datagram 12.
    fn put(&self, slot: u32, c: &Connection, kind: Kind, peer: Coordinate) -> u8 {
        let shard = shard_of(&c.original, 2);
        let memory = self.region.shard(shard);
        let slot_words = &memory.slots[slot as usize];
        let mut line = slot_words.line();
        line.set_kind(kind);
        line.set_generation(Generation::from_low_bits(4));
        line.set_stamp(Stamp { epoch: 1, version: 9 });
        line.set_peer(peer);
        line.set_last(Seq::from_raw(12).unwrap());
        line.set_state(&c.state);
        let addresses = line.set_tuples(&c.original, &c.reply);
        slot_words.store_with(&line, &addresses);
        let index = Index::new(memory.index, self.region.header().index_key);
        index.insert(&c.original, slot);
        index.insert(&c.reply, slot);
        shard
    }

    fn run(&self, words: &[&str]) -> Output {
        inspect(self.dir.to_str().unwrap(), words)
    }

    fn json(&self, words: &[&str]) -> Value {
        let output = self.run(words);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn inspect(dir: &str, words: &[&str]) -> Output {
    let inspector = env!("CARGO_BIN_EXE_hypersync-inspect");
    Command::new(inspector).args(["--shm", dir]).args(words).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_connection_is_found_by_either_tuple_with_its_other_copy() {
    let a = appliance("find");
    let c = connection(1);
    let backup = Coordinate::new(9, 1, 33, Generation::from_low_bits(2));
    let shard = a.put(5, &c, Kind::Active, backup);

    let said = text(&a.run(&["find", &c.original.to_string()]));
    assert!(said.starts_with("tcp 10.0.0.1:1000 > 10.0.0.200:80\n"), "{said}");
    for line in [
        "  reply         tcp 10.0.0.200:80 > 192.0.2.1:1000",
        "  kind          active",
        &format!("  coordinate    3/{shard}/5.4 "),
        "  other copy    9/1/33.2",
        "  stamp         epoch 1, version 9",
        "  acknowledged  no   (newest state in datagram 12, floor 0)",
        "  state         established, status 0x19e, mark 0x5, timeout 432000 s",
    ] {
        assert!(said.contains(line), "{line} is not in\n{said}");
    }

    // The backup acknowledges: the floor of the stream to 9/1 passes datagram 12.
    a.region.shard(shard).streams[stream_index(9, 1)].0[WORD_SEND_FLOOR]
        .store(12, Ordering::Relaxed);
    for words in [
        vec!["find", "--json", "tcp", "10.0.0.1:1000", ">", "10.0.0.200:80"],
        vec!["find", "tcp", "10.0.0.200:80", "192.0.2.1:1000", "--json"],
    ] {
        let found = a.json(&words);
        assert_eq!(found.as_array().unwrap().len(), 1);
        let found = &found[0];
        assert_eq!((&found["acknowledged"], &found["translated"]), (&true.into(), &true.into()));
        assert_eq!((&found["last"], &found["floor"]), (&12.into(), &12.into()));
        assert_eq!(found["coordinate"]["text"], format!("3/{shard}/5.4"));
        assert_eq!(found["other"]["member"], 9);
        assert_eq!(found["former"], Value::Null);
        assert_eq!(found["state"]["mark"], 5);
    }

    let missing = a.run(&["find", "tcp 10.0.0.2:1000 > 10.0.0.200:80"]);
    assert_eq!(missing.status.code(), Some(1));
    let missing = a.run(&["find", "--json", "tcp 10.0.0.2:1000 > 10.0.0.200:80"]);
    assert_eq!((missing.status.code(), text(&missing).as_str()), (Some(1), "[]\n"));
}

#[test]
fn what_only_few_connections_have_is_shown_with_them() {
    let a = appliance("extra");
    let (tcp, plain, other) = (connection(1), connection(2), connection(3));
    let sctp = Connection::new(
        Tuple { protocol: 132, ..connection(4).original },
        Tuple { protocol: 132, ..connection(4).reply },
        State::default(),
    );
    let mut helper = [0; 16];
    helper[..3].copy_from_slice(b"ftp");
    let seqadj = [
        SeqAdj { correction_position: 9, offset_before: 0, offset_after: (-3i32) as u32 },
        SeqAdj { correction_position: 8, offset_before: 1, offset_after: 2 },
    ];
    let full = Extra {
        parts: parts::ALL & !parts::PROTOINFO,
        labels: std::array::from_fn(|i| i as u8),
        helper,
        seqadj,
        synproxy: Synproxy { isn: 10, its: 11, tsoff: 12 },
        ..Extra::NONE
    };
    let vtags = ProtoInfo { state: 3, role: 0, value: 0xdead_beef_0000_0001 };
    let of_sctp = Extra { parts: parts::PROTOINFO, protoinfo: vtags, ..Extra::NONE };
    let mut pools: Vec<Extras<'_>> = (0..2)
        .map(|shard| a.region.shard(shard))
        .map(|memory| Extras::new(memory.extras, memory.extra_of))
        .collect();
    for (slot, c, extra) in
        [(1, &tcp, full), (2, &plain, Extra::NONE), (3, &other, full), (4, &sctp, of_sctp)]
    {
        let shard = a.put(slot, c, Kind::Active, Coordinate::NOWHERE);
        assert!(pools[shard as usize].set(slot, &extra));
    }

    let page = |c: &Connection| text(&a.run(&["find", &c.original.to_string()]));
    let said = page(&tcp);
    for line in [
        "  labels        000102030405060708090a0b0c0d0e0f",
        "  helper        ftp",
        "  seqadj        original +0/-3@9, reply +1/+2@8",
        "  synproxy      isn 10, its 11, tsoff 12",
    ] {
        assert!(said.lines().any(|l| l == line), "{line} is not in\n{said}");
    }
    assert!(
        page(&sctp).contains("  sctp          state 3, tags 0xdeadbeef 0x00000001\n"),
        "{}",
        page(&sctp)
    );
    assert!(page(&plain).ends_with("timeout 432000 s\n"), "{}", page(&plain));

    let extra =
        |c: &Connection| a.json(&["find", "--json", &c.original.to_string()])[0]["extra"].clone();
    assert_eq!(extra(&plain), serde_json::json!({}));
    let tags = serde_json::json!({"state": 3, "vtag_original": 0xdead_beef_u32, "vtag_reply": 1});
    assert_eq!(extra(&sctp), serde_json::json!({ "sctp": tags }));
    let shown = extra(&tcp);
    assert_eq!(
        (&shown["helper"], &shown["labels"]),
        (&"ftp".into(), &"000102030405060708090a0b0c0d0e0f".into())
    );
    assert_eq!(
        (&shown["seqadj"]["original"]["offset_after"], &shown["synproxy"]["tsoff"]),
        (&(-3).into(), &12.into())
    );

    // Of what member 1 had, 2, 4 and 6 are copies here, and it is silent.
    for (member, status) in [(1, Status::Dead), (2, Status::Leaving)] {
        a.region.group().write(member, &Member { status, ..Member::default() });
    }
    // A crash in the middle of a write leaves an odd count in the record: the connection is still
    // shown.
    let memory = a.region.shard(shard_of(&other.original, 2));
    let record = memory.extra_of[3].load(Ordering::Relaxed) as usize - 1;
    let count = &memory.extras[record].0[0];
    count.store(count.load(Ordering::Relaxed) | 1, Ordering::Relaxed);
    assert_eq!(extra(&other), Value::Null);
    let list = text(&a.run(&["connections"]));
    assert_eq!(list.lines().count(), 1 + 4, "{list}");
    let line = |words: &str| list.lines().any(|l| l.contains("10.0.0.") && l.ends_with(words));
    assert!(
        line("  extra half written") && line("  sctp state 3, tags 0xdeadbeef 0x00000001"),
        "{list}"
    );
    assert!(line("reply +1/+2@8  synproxy isn 10, its 11, tsoff 12"), "{list}");
}

#[test]
fn every_connection_is_listed_once_and_a_torn_slot_never() {
    let a = appliance("connections");
    for n in 1..=20 {
        let kind = if n % 2 == 0 { Kind::Backup } else { Kind::Active };
        let member = if n < 7 { 1 } else { 2 };
        a.put(
            n as u32,
            &connection(n),
            kind,
            Coordinate::new(member, 0, n as u32, Generation::default()),
        );
    }
    // Of what member 1 had, 2, 4 and 6 are copies here, and it is silent.
    for (member, status) in [(1, Status::Dead), (2, Status::Leaving)] {
        a.region.group().write(member, &Member { status, ..Member::default() });
    }
    // A crash in the middle of a write leaves an odd count in the slot's first word.
    let shard = shard_of(&connection(3).original, 2);
    let at =
        shard_layout(&a.region.header().sizes, shard).slots.offset + 3 * size_of::<[u64; 16]>();
    let file = fs::OpenOptions::new().write(true).open(a.dir.join(FILE)).unwrap();
    file.write_all_at(&3u32.to_ne_bytes(), at as u64).unwrap();
    assert!(a.region.shard(shard).slots[3].is_torn());

    let said = text(&a.run(&["connections"]));
    assert_eq!(said.lines().count(), 1 + 19, "{said}");
    assert!(!said.contains("10.0.0.3:1000 >"));
    let wanted = |line: &str| {
        line.starts_with("presumed ") && line.contains(" 10.0.0.4:1000 > 10.0.0.200:80  reply")
    };
    assert!(said.lines().any(wanted), "{said}");
    let lines = text(&a.run(&["connections", "--json"]));
    let kinds: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["kind"].clone())
        .collect();
    let count = |kind: &str| kinds.iter().filter(|k| *k == kind).count();
    assert_eq!((count("backup"), count("presumed")), (7, 3));
    assert!(
        text(&a.run(&["find", &connection(4).original.to_string()]))
            .contains("  kind          presumed\n")
    );
    let of = a.json(&["state", "--json"]);
    let slots = |kind: &str| -> u64 {
        of["shards"].as_array().unwrap().iter().map(|s| s["slots"][kind].as_u64().unwrap()).sum()
    };
    assert_eq!((slots("active"), slots("backup"), slots("presumed")), (9, 7, 3));
    assert_eq!(slots("free"), 2 * 64 - 20, "the torn one is in none");
    assert_eq!(kinds.len(), 19);
}

#[test]
fn the_state_tells_slots_exposure_and_group() {
    let a = appliance("state");
    let shard = a.put(1, &connection(1), Kind::Active, Coordinate::NOWHERE);
    let counters = Counters::new(a.region.shard(shard).counters);
    counters.set(Counter::Exposure, 1);
    counters.set(Counter::ExposureOldestUs, 2500);
    counters.delay(100, 9);
    let line = a.region.group().shard(shard);
    line.set_last_pass(clock::now());
    line.set_view_version(1);
    let member = Member {
        status: Status::Ready,
        table_id: 0xabcd,
        shards: 4,
        priority: 200,
        room: 77,
        address: Some("2001:db8::9".parse().unwrap()),
        hears_me: true,
        last_heard: clock::now(),
        ..Member::default()
    };
    a.region.group().write(9, &member);

    let said = text(&a.run(&["state"]));
    println!("{said}");
    let first = format!("member 3 of group 7, pid {}, table", std::process::id());
    assert!(said.starts_with(&first) && said.contains(", up "), "{said}");
    assert!(said.contains("half within 112 us") && said.contains("2500us"), "{said}");
    let line = said.lines().find(|line| line.starts_with("     9 ready      2001:db8::9")).unwrap();
    assert!(line.ends_with("yes      0000abcd"), "{line}");

    let state = a.json(&["state", "--json"]);
    assert_eq!(
        (&state["running"], &state["member"], &state["group"]),
        (&true.into(), &3.into(), &7.into())
    );
    let uptime = Duration::from_nanos(state["uptime_ns"].as_u64().unwrap());
    assert!(uptime >= Duration::from_secs(5) && uptime < Duration::from_secs(600));
    let here = &state["shards"][shard as usize];
    assert_eq!((&here["slots"]["active"], &here["slots"]["free"]), (&1.into(), &63.into()));
    assert_eq!((&here["exposure"], &here["exposure_oldest_us"]), (&1.into(), &2500.into()));
    assert_eq!(here["view_version"], 1);
    assert!(here["last_pass_age_ns"].as_u64().unwrap() < 600_000_000_000);
    assert_eq!(state["shards"][1 - shard as usize]["last_pass_age_ns"], Value::Null);
    assert_eq!(
        (&state["group_version"], state["members"].as_array().unwrap().len()),
        (&1.into(), 1)
    );
    assert_eq!(
        (&state["members"][0]["member"], &state["members"][0]["room"]),
        (&9.into(), &77.into())
    );
    assert_eq!(state["members"][0]["restarting"], false);

    a.region.group().write(9, &Member { back_by: Time(clock::now().0 + 1), ..member });
    assert!(text(&a.run(&["state"])).contains("     9 restarting 2001:db8::9"));
    let state = a.json(&["state", "--json"]);
    assert_eq!(
        (&state["members"][0]["status"], &state["members"][0]["restarting"]),
        (&"ready".into(), &true.into())
    );
}

#[test]
fn counters_are_summed_where_a_sum_means_something() {
    let a = appliance("counters");
    for (shard, n) in [(0, 5), (1, 7)] {
        let counters = Counters::new(a.region.shard(shard).counters);
        counters.add(Counter::DeltasNew, n);
        counters.set(Counter::ExposureOldestUs, n);
        counters.delay(100, n);
    }
    let all = a.json(&["counters", "--json"]);
    assert_eq!(all["delay_p50_us"], 112, "the upper edge of its bucket");
    assert_eq!(all["delay_p999_us"], 112);
    let list = all["counters"].as_array().unwrap();
    assert_eq!(list.len(), COUNTERS.len());
    let of = |name: &str| list.iter().find(|c| c["name"] == name).unwrap();
    assert_eq!(of("deltas_new")["all"], 12);
    assert_eq!(of("deltas_new")["shards"], serde_json::json!([5, 7]));
    assert_eq!(of("exposure_oldest_us")["all"], 7);
    let said = text(&a.run(&["counters"]));
    assert_eq!(
        said.lines().count(),
        1 + COUNTERS.len() + 3,
        "three percentiles behind the counters"
    );
    assert!(said.lines().any(|l| l.starts_with("delay_p99_us ") && l.contains(" 112 ")), "{said}");
    let wanted = |l: &str| {
        l.starts_with("deltas_new ") && l.ends_with("  deltas sent that carry a whole connection")
    };
    assert!(said.lines().any(wanted), "{said}");
}

#[test]
fn the_check_says_ready_only_of_a_member_that_is_so_now() {
    let a = appliance("check");
    let group = a.region.group();
    let pass = |shard, seconds_ago: u64| {
        group.shard(shard).set_last_pass(Time(clock::now().0 - seconds_ago * 1_000_000_000));
    };
    // Whatever this machine does meanwhile, a pass "now" was made at most a moment ago.
    let check = |status: i32, name: &str, why: &str, last: [u64; 2]| {
        let mut said = (None, String::new());
        for _ in 0..20 {
            last.iter().enumerate().for_each(|(shard, ago)| pass(shard as u8, *ago));
            let output = a.run(&["check"]);
            said = (output.status.code(), text(&output));
            if said.0 == Some(status) && said.1.contains(why) {
                break;
            }
        }
        assert_eq!(said.0, Some(status), "{said:?}");
        assert!(said.1.starts_with(&format!("{name}: member 3 of group 7")), "{said:?}");
        assert!(said.1.contains(why) && said.1.lines().count() == 1, "{said:?}");
    };
    check(2, "not-ready", "is starting", [0, 0]);
    group.shard(0).set_standing(Standing::Syncing);
    group.shard(0).set_awaited(1 << 1 | 1 << 4);
    // What the table of this test holds, a connection or two.
    check(2, "not-ready", "is syncing: ", [0, 0]);
    check(2, "not-ready", "copies so far, not yet all of members 1, 4", [0, 0]);
    group.shard(0).set_standing(Standing::Ready);
    check(0, "ready", "can carry", [0, 0]);
    // One shard of two hangs: half of the connections are not cared for.
    check(2, "stale", "shard 1 has done nothing for 3 s", [0, 3]);
    group.shard(0).set_standing(Standing::Leaving);
    check(2, "not-ready", "is leaving", [0, 0]);

    let output = a.run(&["check", "--json"]);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&answer["member"], &answer["group"]), (&3.into(), &7.into()));
    assert!(["not-ready", "stale"].contains(&answer["status"].as_str().unwrap()), "{answer}");

    // Nothing to read, and not ours: there is no appliance, as far as can be told.
    let none = inspect("/nonexistent", &["check"]);
    assert_eq!(none.status.code(), Some(1));
    assert!(text(&none).starts_with("not-running: there is no "), "{none:?}");
    let none = inspect("/nonexistent", &["check", "--json"]);
    assert_eq!(none.status.code(), Some(1));
    let answer: Value = serde_json::from_slice(&none.stdout).unwrap();
    assert_eq!((&answer["status"], &answer["member"]), (&"not-running".into(), &Value::Null));
    assert_eq!(a.run(&["check", "it"]).status.code(), Some(2), "a wrong call is never a yes");
}

#[test]
fn a_wrong_call_and_a_missing_appliance_are_one_line_and_status_2() {
    let a = appliance("wrong");
    let refused = |output: Output, words: &str| {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(words), "{said}");
        said.lines().count()
    };
    refused(a.run(&[]), "Try hypersync-inspect --help");
    refused(a.run(&["states"]), "states");
    assert_eq!(refused(a.run(&["find", "tcp", "10.0.0.1"]), "not a tuple"), 1);
    assert_eq!(refused(a.run(&["find"]), "not a tuple"), 1);
    assert_eq!(refused(inspect("/nonexistent", &["state"]), "is hypersync running"), 1);
    // Another file in its place: the appliance's own goes on under its mapping.
    fs::remove_file(a.dir.join(FILE)).unwrap();
    fs::write(a.dir.join(FILE), "something else").unwrap();
    assert_eq!(refused(a.run(&["state"]), "not shared memory of hypersync"), 1);
    let help = a.run(&["--help"]);
    assert!(help.status.success() && text(&help).contains("connections"));
}

#[test]
fn the_checks_status_is_the_answer_even_if_nobody_reads_its_line() {
    let a = appliance("unread");
    let check = |dir: &str| {
        let (nobody, line) = std::io::pipe().unwrap();
        drop(nobody);
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypersync-inspect"));
        command.args(["--shm", dir, "check"]).stdout(line).status().unwrap().code()
    };
    assert_eq!(check("/nonexistent"), Some(1), "a reader that is gone makes no yes of it");
    let dir = a.dir.to_str().unwrap();
    for shard in 0..2 {
        a.region.group().shard(shard).set_last_pass(clock::now());
    }
    assert_eq!(check(dir), Some(2), "it is starting");
    a.region.group().shard(0).set_standing(Standing::Ready);
    assert_eq!(check(dir), Some(0));
}

#[test]
fn a_start_that_failed_is_not_taken_for_one_under_way() {
    let a = appliance("abandoned");
    let dir = a.dir.join("starting");
    drop(Region::create(&dir, &config()).unwrap());
    let check = || {
        let output = inspect(dir.to_str().unwrap(), &["check"]);
        (output.status.code(), text(&output))
    };
    let (status, said) = check();
    assert!(
        status == Some(2) && said.starts_with("not-ready: ") && said.contains("is starting"),
        "{said}"
    );
    // The same memory, of a process that is gone.
    let mut gone = Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    let file = fs::File::options().write(true).open(dir.join(FILE)).unwrap();
    file.write_all_at(&(gone.id() as u64).to_ne_bytes(), 8 * 9).unwrap();
    let (status, said) = check();
    assert!(
        status == Some(1) && said.starts_with("not-running: ") && said.contains(" is gone"),
        "{said}"
    );
    assert_eq!(inspect(dir.to_str().unwrap(), &["state"]).status.code(), Some(2));
}
