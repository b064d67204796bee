//! A reader that knows docs/SHARED-MEMORY.md and nothing else finds what the appliance wrote.
//!
//! Values are written by the appliance's own code into a region, and read from the file's bytes
//! where the document's pictures say that they lie. Each field of a picture is asked for, so none
//! can be wrong or be forgotten here.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use hypersync::ccp::message::Place;
use hypersync::conn::extra::{Extra, ProtoInfo, SeqAdj, Synproxy, parts};
use hypersync::conn::extras::Extras;
use hypersync::conn::index::Index;
use hypersync::conn::slot::groups;
use hypersync::conn::{Connection, Coordinate, Generation, Kind, Stamp, State, Tuple};
use hypersync::counters::{COUNTERS, Counters, DELAY_BUCKETS};
use hypersync::group::view::{Member, Status};
use hypersync::limits::{ARENA_MIN, CONTROL_BUFFER_SIZE, CONTROL_BUFFERS, WINDOW};
use hypersync::memory::{self, MemorySize};
use hypersync::seq::Seq;
use hypersync::shm::group::{Standing, Troubles};
use hypersync::shm::ingest::{Consumer, Producer};
use hypersync::shm::layout::{VERSION, shard_layout};
use hypersync::shm::{FILE, Region, RegionConfig, Sizes, ask_back_within};
use hypersync::source::SourceEvent;
use hypersync::sync::full_sync::{Figures, SyncPhase};
use hypersync::sync::history::{Content, Datagram, EpochBits, History};
use hypersync::sync::lease::{LeaseList, LeasePool};
use hypersync::sync::stream::Durable;
use hypersync::time::Time;

const DOCUMENT: &str = include_str!("../docs/SHARED-MEMORY.md");

/// The shard that is looked at: not the first, so that what lies before it counts.
const SHARD: u8 = 1;

struct Lab {
    dir: PathBuf,
    region: Region,
}

impl Lab {
    fn new(name: &str) -> Lab {
        let dir = PathBuf::from(format!("/dev/shm/hypersync-layout-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        let memory = MemorySize { capacity: 1000, arena: ARENA_MIN, extras: 77 };
        let region = Region::create(
            &dir,
            &RegionConfig {
                sizes: Sizes { shards: 3, memory, ring_records: 64 },
                group: 7,
                member: 3,
                incarnation: 0x1122_3344_5566,
                started: Time(123_456_789),
            },
        );
        let region = region.expect("there is room for a small region");
        region.publish_ready();
        Lab { dir, region }
    }

    fn read(&self) -> Bytes {
        Bytes(fs::read(self.dir.join(FILE)).expect("it is our file"))
    }

    fn memory(&self) -> memory::Memory<'_> {
        self.region.shard(SHARD)
    }

    /// Where a part of the shard begins, as the document has it.
    fn part(&self, name: &str) -> usize {
        let (_, offsets, _) = documented_parts(&self.region.header().sizes, SHARD);
        offsets
            .into_iter()
            .find(|(part, ..)| part == name)
            .unwrap_or_else(|| panic!("no part {name}"))
            .1
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The region's file.
struct Bytes(Vec<u8>);

impl Bytes {
    fn word(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.0[at..at + 8].try_into().expect("eight bytes"))
    }

    fn half(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }

    /// Compares every field of a picture, laid over the bytes at `base`; what is called zero is
    /// zero.
    fn assert_fields(&self, picture: &str, base: usize, expected: &[(&str, u64)]) {
        let mut asked = BTreeSet::new();
        for field in fields_of(picture) {
            let word = self.word(base + 8 * field.word);
            let value = word << (64 - field.shift - field.bits) >> (64 - field.bits);
            let is_named = |name: &str| {
                field
                    .name
                    .strip_prefix(name)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with([':', ',', ';']))
            };
            let what = format!("{picture}, word {}: {}", field.word, field.name);
            if is_named("zero") {
                assert_eq!(value, 0, "{what}");
                continue;
            }
            let (name, right) = expected
                .iter()
                .find(|(name, _)| is_named(name))
                .unwrap_or_else(|| panic!("{what} is not tested"));
            assert_eq!(value, *right, "{what} ({word:#018x})");
            assert!(asked.insert(*name), "{what} is there twice");
        }
        let all: BTreeSet<&str> = expected.iter().map(|(name, _)| *name).collect();
        assert_eq!(asked, all, "{picture}");
    }
}

struct Field {
    word: usize,
    name: String,
    shift: usize,
    bits: usize,
}

/// The lines of an indented block, from behind the one that begins with `name` to the next empty
/// one.
fn block(name: &str) -> Vec<&'static str> {
    let mut lines = DOCUMENT.lines();
    let is_it = |line: &&str| {
        line.strip_prefix("    ")
            .and_then(|line| line.strip_prefix(name))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
    };
    lines.find(is_it).unwrap_or_else(|| panic!("the document has no {name}"));
    lines.take_while(|line| !line.trim().is_empty()).collect()
}

/// Numbers and texts that two spaces or more part.
fn columns(line: &str) -> Vec<&str> {
    line.split("  ").map(str::trim).filter(|text| !text.is_empty()).collect()
}

/// The fields of a picture. The rows with bars must account for all 64 bits.
fn fields_of(picture: &str) -> Vec<Field> {
    let mut fields = Vec::new();
    for line in block(picture) {
        if let Some((word, cells)) = line.split_once('|') {
            let word = word.trim().parse().unwrap_or_else(|_| panic!("no word number: {line}"));
            let mut shift = 64;
            for cell in cells.trim().trim_end_matches('|').split('|') {
                let (name, bits) =
                    cell.trim().rsplit_once(' ').unwrap_or_else(|| panic!("no width: {line}"));
                let bits: usize =
                    bits.parse().unwrap_or_else(|_| panic!("no width behind {cell}: {line}"));
                shift -= bits;
                fields.push(Field { word, name: name.trim().into(), shift, bits });
            }
            assert_eq!(shift, 0, "bits are missing: {line}");
        } else {
            for pair in columns(line).chunks(2) {
                // A range of words is described in words; it is tested for itself.
                let Ok(word) = pair[0].parse() else { continue };
                fields.push(Field { word, name: pair[1].into(), shift: 0, bits: 64 });
            }
        }
    }
    assert!(!fields.is_empty(), "{picture} has no fields");
    fields
}

/// What the document says at a byte of a block such as "byte     0  word: version".
fn byte_of(block_name: &str, what: &str) -> usize {
    let all = DOCUMENT.lines().skip_while(|line| !line.starts_with(&format!("## {block_name}")));
    for line in all {
        let line = line.trim().trim_start_matches("byte").trim();
        if let Some((at, text)) = line.split_once("  ")
            && text.trim().starts_with(what)
        {
            return at.trim().parse().unwrap_or_else(|_| panic!("no byte: {line}"));
        }
    }
    panic!("{block_name} has no {what}");
}

/// A sum of products as the document writes them, such as "16 x (capacity + capacity / 4 + 1024)".
fn evaluate(text: &str, sizes: &Sizes) -> usize {
    if let Some((before, inner)) = text.split_once('(') {
        let inner = inner.trim_end().trim_end_matches(')');
        let value = match inner.strip_suffix(", rounded up to a power of two") {
            Some(inner) => evaluate(inner, sizes).next_power_of_two(),
            None => evaluate(inner, sizes),
        };
        return evaluate(&format!("{before}{value}"), sizes);
    }
    let product = |text: &str| {
        let mut value = 1;
        let mut divide = false;
        for token in text.replace("ring records", "ring_records").split_whitespace() {
            let number = match token {
                "x" => continue,
                "/" => {
                    divide = true;
                    continue;
                }
                "capacity" => sizes.memory.capacity,
                "extras" => sizes.memory.extras,
                "arena" => sizes.memory.arena,
                "counters" => COUNTERS.len(),
                "ring_records" => sizes.ring_records,
                number => number
                    .parse()
                    .unwrap_or_else(|_| panic!("neither a number nor a size: {number} in {text}")),
            };
            value = if std::mem::take(&mut divide) { value / number } else { value * number };
        }
        value
    };
    text.split('+').map(product).sum()
}

/// Where a shard begins, its parts (name, offset, bytes) and where it ends, as the document has
/// them.
fn documented_parts(sizes: &Sizes, shard: u8) -> (usize, Vec<(String, usize, usize)>, usize) {
    let first = byte_of("The region", "shard 0");
    let rows = block("  part");
    let at = |start: usize| {
        let mut end = start;
        let parts: Vec<(String, usize, usize)> = rows
            .iter()
            .map(|row| {
                let columns = columns(row);
                let bytes = evaluate(columns[1], sizes);
                let offset = end.next_multiple_of(4096);
                end = offset + bytes;
                (columns[0].to_owned(), offset, bytes)
            })
            .collect();
        (start, parts, end.next_multiple_of(4096))
    };
    let bytes = at(first).2 - first;
    at(first + shard as usize * bytes)
}

#[test]
fn every_part_lies_where_the_document_says() {
    let lab = Lab::new("parts");
    let sizes = lab.region.header().sizes;
    for shard in 0..3 {
        let (_, documented, end) = documented_parts(&sizes, shard);
        let l = shard_layout(&sizes, shard);
        let parts = [
            ("slots", l.slots),
            ("former", l.former),
            ("extra of", l.extra_of),
            ("extras", l.extras),
            ("index", l.index),
            ("streams", l.streams),
            ("leases", l.leases),
            ("history", l.history),
            ("manifest", l.manifest),
            ("journal", l.journal),
            ("arena", l.arena),
            ("counters", l.counters),
            ("ring", l.ring),
            ("records", l.records),
        ];
        assert_eq!(documented.len(), parts.len());
        for ((name, offset, _), (own, part)) in documented.iter().zip(parts) {
            assert_eq!((name.as_str(), *offset), (own, part.offset), "shard {shard}");
        }
        assert_eq!(end, l.end);
    }
    assert_eq!(lab.read().0.len(), documented_parts(&sizes, 2).2);
    let m = lab.memory();
    let lengths = [
        ("slots", size_of_val(m.slots)),
        ("former", size_of_val(m.former)),
        ("extra of", size_of_val(m.extra_of)),
        ("extras", size_of_val(m.extras)),
        ("index", size_of_val(m.index)),
        ("streams", size_of_val(m.streams)),
        ("leases", size_of_val(m.leases)),
        ("history", size_of_val(m.history)),
        ("manifest", size_of_val(m.manifest)),
        ("journal", size_of_val(m.journal)),
        ("arena", size_of_val(m.arena)),
        ("counters", size_of_val(m.counters)),
    ];
    let (_, documented, _) = documented_parts(&sizes, SHARD);
    for ((name, _, bytes), (own, length)) in documented.iter().zip(lengths) {
        assert_eq!((name.as_str(), *bytes), (own, length));
    }
    assert!(
        DOCUMENT
            .contains(&format!("{CONTROL_BUFFERS} control buffers of {CONTROL_BUFFER_SIZE} bytes"))
    );
    assert!(DOCUMENT.contains(&format!("Layout version {VERSION}.")));
}

#[test]
fn the_header_says_what_the_document_says() {
    let lab = Lab::new("header");
    let h = *lab.region.header();
    ask_back_within(&lab.dir, std::time::Duration::from_millis(1500)).expect("it is ours");
    lab.region.end();
    lab.region.old_values().begin(0xc00c1e);
    lab.region.old_values().set(0, Some(4));
    lab.region.old_values().set(1, Some(0));
    let boot = u128::from_be_bytes(h.boot_id);
    let bytes = lab.read();
    bytes.assert_fields(
        "header",
        byte_of("The region", "header"),
        &[
            ("magic", u64::from_be_bytes(*b"hypersnc")),
            ("layout version", VERSION),
            ("bytes of the region", bytes.0.len() as u64),
            ("bytes of this header", 4096),
            ("shards", 3),
            ("slots a shard", 1000),
            ("arena bytes a shard", ARENA_MIN as u64),
            ("ring records a shard", 64),
            ("counter words a shard", (COUNTERS.len() + DELAY_BUCKETS) as u64),
            ("pid of the appliance", u64::from(std::process::id())),
            ("boot id, first 8 bytes", (boot >> 64) as u64),
            ("boot id, last 8 bytes", boot as u64),
            ("table id", u64::from(h.table_id)),
            ("incarnation", h.incarnation),
            ("key of the index", h.index_key),
            ("group", 7),
            ("member", 3),
            ("started", 123_456_789),
            ("extras a shard", 77),
            ("READY", u64::from_be_bytes(*b"ready\0\0\0")),
            ("cookie (SO_NETNS_COOKIE) of the network namespace of the next two", 0xc00c1e),
            ("net.netfilter.nf_conntrack_events before the appliance changed it", 5),
            ("net.netfilter.nf_conntrack_tcp_be_liberal likewise", 1),
            ("ended", 1),
            ("back within", 1500),
        ],
    );
}

#[test]
fn members_and_shards_stand_in_the_group_table_as_documented() {
    let lab = Lab::new("group");
    let member = Member {
        status: Status::Syncing,
        hears_me: true,
        has_begun: true,
        has_synced_me: false,
        shards: 64,
        priority: 200,
        site: 9,
        table_id: 0xdead_beef,
        incarnation: 1 << 63 | 5,
        capacity: 1 << 33,
        room: 12,
        address: Some("2001:db8::7".parse().expect("an address")),
        last_heard: Time(5),
        since: Time(4),
        back_by: Time(6),
    };
    let group = lab.region.group();
    group.write(52, &member);
    group.write(
        2,
        &Member {
            has_begun: false,
            has_synced_me: true,
            address: Some([192, 0, 2, 1].into()),
            ..member
        },
    );
    let line = group.shard(63);
    line.set_last_pass(Time(11));
    line.set_view_version(12);
    line.set_settled_version(13);
    line.set_standing(Standing::Syncing);
    line.set_synced(1 << 52);
    line.set_awaited(6);
    let namesake = Some("fe80::7".parse().expect("an address"));
    line.set_troubles(&Troubles { lonely: true, deaf: false, namesake });
    let bytes = lab.read();
    let table = byte_of("The region", "group table");
    let (members, shards) =
        (byte_of("Group table", "53 records of 128"), byte_of("Group table", "64 lines of 128"));
    assert_eq!(bytes.word(table + byte_of("Group table", "word: version")), 2);
    assert_eq!(members + 53 * 128, shards);
    assert_eq!(shards + 64 * 128, byte_of("Group table", "unused, to 16384"));
    assert_eq!(table + 16384, byte_of("The region", "shard 0"));
    let documented = |begun, synced, family, low, high| {
        [
            ("seqlock", 2),
            ("has all", synced),
            ("takes copies", begun),
            ("family", family),
            ("site", 9),
            ("priority", 200),
            ("shards", 64),
            ("hears us", 1),
            ("status", 6),
            ("table id", 0xdead_beef),
            ("incarnation", 1 << 63 | 5),
            ("slots", 1 << 33),
            ("free slots", 12),
            ("address, low word", low),
            ("address, high word", high),
            ("last heard", 5),
            ("this status since", 4),
            ("back by", 6),
        ]
    };
    let v6 = documented(1, 0, 6, 7, 0x2001_0db8 << 32);
    bytes.assert_fields("member", table + members + 52 * 128, &v6);
    bytes.assert_fields("member", table + members + 2 * 128, &documented(0, 1, 4, 0xc000_0201, 0));
    bytes.assert_fields(
        "shard",
        table + shards + 63 * 128,
        &[
            ("begin of its last pass", 11),
            ("version acted on", 12),
            ("version settled", 13),
            ("standing", 3),
            ("synced", 1 << 52),
            ("awaited", 6),
            ("namesake's family", 6),
            ("deaf", 0),
            ("lonely", 1),
            ("namesake's address, low word", 7),
            ("namesake's address, high word", 0xfe80 << 48),
        ],
    );
}

fn connection() -> Connection {
    let mut original = Tuple::v6(
        6,
        ("2001:db8::1".parse().unwrap(), 40_001),
        ("2001:db8::2".parse().unwrap(), 443),
    );
    original.zone = 71;
    let reply = Tuple {
        src: 3 << 100 | 4,
        dst: 5 << 100 | 6,
        sport: 9,
        dport: 10,
        zone: 81,
        ..original.mirrored()
    };
    let state = State {
        status: 0x8000_019e,
        tcp_state: 3,
        tcp_scale: 0x7a,
        tcp_flags_original: 0x23,
        tcp_flags_reply: 0x31,
        timeout_s: 432_000,
        mark: 0xdead_beef,
    };
    Connection::new(original, reply, state)
}

const HIGH: u64 = 0x2001_0db8 << 32;

/// The fields that a slot and a record of the ring have alike.
fn documented_connection() -> Vec<(&'static str, u64)> {
    vec![
        ("orig. sport", 40_001),
        ("orig. dport", 443),
        ("reply sport", 9),
        ("reply dport", 10),
        ("mark", 0xdead_beef),
        ("timeout", 432_000),
        ("status", 0x8000_019e),
        ("tcp state", 3),
        ("tcp scale", 0x7a),
        ("tcp flags orig.", 0x23),
        ("tcp flags reply", 0x31),
        ("orig. zone", 71),
        ("reply zone", 81),
        ("protocol", 6),
        ("original source, low word", 1),
        ("original source, high word", HIGH),
        ("original destination, low word", 2),
        ("original destination, high word", HIGH),
        ("reply source, low word", 4),
        ("reply source, high word", 3 << 36),
        ("reply destination, low word", 6),
        ("reply destination, high word", 5 << 36),
    ]
}

#[test]
fn a_slot_and_what_stands_beside_it_read_as_documented() {
    let lab = Lab::new("slot");
    let (m, c) = (lab.memory(), connection());
    let peer = Coordinate::new(52, 63, 9, Generation::from_low_bits(8));
    for (slot, moving, claimed, unseen) in
        [(3, true, false, false), (4, false, true, false), (5, false, false, true)]
    {
        let mut line = m.slots[slot].line();
        line.set_kind(Kind::Closing);
        line.set_generation(Generation::from_low_bits(0x3ff_fff0));
        line.set_stamp(Stamp { epoch: 0x1234_5678, version: 0x9abc_def0 });
        line.set_peer(peer);
        line.set_groups(groups::ALL);
        line.set_moving(moving);
        line.set_claimed(claimed);
        line.set_unseen(unseen);
        line.set_spent(unseen);
        line.set_last(Seq::from_raw(0xabcd_ef01_2345).expect("48 bits"));
        line.set_session(0x6789);
        line.set_state(&c.state);
        let addresses = line.set_tuples(&c.original, &c.reply);
        m.slots[slot].store_with(&line, &addresses);
    }
    m.former[3].store(77, Ordering::Relaxed);
    let extra = Extra {
        parts: parts::ALL,
        labels: *b"abcdefghijklmnop",
        seqadj: [1, 4].map(|n| SeqAdj {
            correction_position: n,
            offset_before: n + 1,
            offset_after: n + 2,
        }),
        helper: *b"helper-of-ftp\0\0\0",
        synproxy: Synproxy { isn: 7, its: 8, tsoff: 9 },
        protoinfo: ProtoInfo { state: 10, role: 11, value: 12 << 40 | 13 },
    };
    assert!(Extras::new(m.extras, m.extra_of).set(3, &extra));
    let index = Index::new(m.index, lab.region.header().index_key);
    index.insert(&c.original, 3);

    let bytes = lab.read();
    for (slot, moving, claimed, unseen) in [(3, 1, 0, 0), (4, 0, 1, 0), (5, 0, 0, 1)] {
        let mut documented = documented_connection();
        documented.extend([
            ("kind", 5),
            ("generation", 0x3ff_fff0),
            ("seqlock", 2),
            ("epoch", 0x1234_5678),
            ("version", 0x9abc_def0),
            ("peer", peer.raw()),
            ("family", 1),
            ("groups", 1 | 2 | 4 | 8 | 32),
            ("moving", moving),
            ("claimed", claimed),
            ("unseen", unseen),
            ("spent", unseen),
            ("session", 0x6789),
            ("last", 0xabcd_ef01_2345),
        ]);
        bytes.assert_fields("slot", lab.part("slots") + slot * 128, &documented);
    }
    assert_eq!(bytes.word(lab.part("former") + 3 * 8), 77);
    let record = bytes.half(lab.part("extra of") + 3 * 4) as usize;
    let text = |text: &[u8; 8]| u64::from_ne_bytes(*text);
    bytes.assert_fields(
        "extra",
        lab.part("extras") + (record - 1) * 96,
        &[
            ("parts", 31),
            ("state", 10),
            ("role", 11),
            ("seqlock", 2),
            ("labels, first 8 bytes", text(b"abcdefgh")),
            ("labels, last 8 bytes", text(b"ijklmnop")),
            ("orig. correction position", 1),
            ("orig. offset before", 2),
            ("orig. offset after", 3),
            ("reply correction position", 4),
            ("reply offset before", 5),
            ("reply offset after", 6),
            ("helper's name, first 8 bytes", text(b"helper-o")),
            ("helper's name, last 8 bytes", text(b"f-ftp\0\0\0")),
            ("SYN proxy isn", 7),
            ("SYN proxy its", 8),
            ("SYN proxy tsoff", 9),
            ("owner", 4),
            ("protocol state", 12 << 40 | 13),
        ],
    );
    // The hash itself is not documented, only where it stands: it says where the entry is.
    let buckets = m.index.len();
    let home =
        (0..buckets).find(|b| bytes.word(lab.part("index") + 8 * b) != 0).expect("one entry");
    let hash = bytes.word(lab.part("index") + 8 * home) >> 26 & ((1 << 37) - 1);
    assert_eq!(hash as usize % buckets, home);
    let entry = [("used", 1), ("hash", hash), ("slot", 3)];
    bytes.assert_fields("index", lab.part("index") + 8 * home, &entry);
}

#[test]
fn streams_leases_and_history_read_as_documented() {
    let lab = Lab::new("streams");
    let m = lab.memory();
    // "stream to member m, shard s: number (m - 1) x 64 + s"
    let number = 51 * 64 + 63;
    assert_eq!(hypersync::sync::stream::stream_index(52, 63), number);
    let d = Durable(&m.streams[number]);
    let seq = |n| Seq::from_raw(n).expect("48 bits");
    d.begin_session(0x7ab1e);
    d.begin_peer_session(0x8001);
    d.set_sent(seq(30));
    d.set_floor(seq(20));
    d.set_given_up(seq(10));
    d.add_granted_to_us(40);
    d.add_granted_by_us(50);
    d.receive(seq(1));
    d.receive(seq(WINDOW));
    d.let_go();
    d.set_forgetting(true);
    let (begun, ended) = (Time(61), Time(62));
    d.set_full_sync(&Figures {
        phase: SyncPhase::Interrupted,
        begun,
        ended,
        before: 63,
        done: 64,
        to_do: 65,
    });
    let place =
        |slot, generation| Place { slot, generation: Generation::from_low_bits(generation) };
    let mut list = LeaseList::default();
    let mut pool = LeasePool::new(m.leases);
    assert!(pool.put(number, &mut list, place(0x3ff_fffe, 0x2aa_aaab)));
    assert!(pool.put(number, &mut list, place(5, 6)));
    let mut history = History::new(&m);
    let mut offset = 0;
    for n in 1..=2 {
        offset = history.make_room().expect("it is empty");
        let epoch = EpochBits::of(Stamp { epoch: 0xffff_fa55, version: 1 });
        history.note(Content::Delta { place: place(0x3ff_fffe, 0x2aa_aaab), epoch });
        history.note(Content::Granted(place(1, 2)));
        history.note(Content::Request(0x89ab_cdef));
        history.note(Content::GivenBack(place(3, 4)));
        let first_sent = Time(70 + n);
        let entry = Datagram {
            stream: number,
            session: 0x6789,
            seq: seq(1 << 47 | n),
            offset,
            len: 9,
            first_sent,
        };
        history.append(&entry, b"datagrams", 9, Time(1), 1);
    }
    m.journal[memory::JOURNAL_TAIL].store(81, Ordering::Relaxed);
    m.journal[memory::JOURNAL_MANIFEST_TAIL].store(82, Ordering::Relaxed);
    m.journal[memory::JOURNAL_DECLINES].store(83, Ordering::Relaxed);

    let bytes = lab.read();
    let stream = lab.part("streams") + number * 384;
    bytes.assert_fields(
        "stream",
        stream,
        &[
            ("session of the receiving half", 0x8001),
            ("session of the sending half", 1),
            ("number sent last", 30),
            ("send floor", 20),
            ("given up to here", 10),
            ("slots granted to us", 40),
            ("table id of the peer", 0x7ab1e),
            ("let go", 1),
            ("forgetting", 1),
            ("receive floor", 1),
            ("slots granted to the peer", 50),
            ("phase of the full sync", 4),
            ("full sync begun", 61),
            ("full sync ended", 62),
            ("connections before", 63),
            ("connections now", 64),
            ("connections to do", 65),
        ],
    );
    // "16..47 one bit for each number beyond the receive floor; number n at bit n modulo 2048"
    let bits: Vec<u64> = (16..48).map(|word| bytes.word(stream + 8 * word)).collect();
    assert_eq!((bits[0], bits[1..].iter().sum::<u64>(), 32 * 64), (1, 0, WINDOW));
    let lease = |n: usize| lab.part("leases") + 16 * n;
    let first = [
        ("slot", 0x3ff_fffe),
        ("generation", 0x2aa_aaab),
        ("stream", number as u64 + 1),
        ("next", 2),
    ];
    bytes.assert_fields("lease", lease(0), &first);
    let last = [("slot", 5), ("generation", 6), ("stream", number as u64 + 1), ("next", 0)];
    bytes.assert_fields("lease", lease(1), &last);
    bytes.assert_fields(
        "history",
        lab.part("history") + 32,
        &[
            ("stream", number as u64),
            ("length", 9),
            ("offset in the arena", u64::from(offset)),
            ("session", 0x6789),
            ("number", 1 << 47 | 2),
            ("first sent", 72),
            ("manifest words", 8),
        ],
    );
    assert_eq!(&bytes.0[lab.part("arena") + offset as usize..][..9], b"datagrams");
    let request = 0x89ab_cdef_u64;
    let contents = [
        (0, 0x255, 0x3ff_fffe, 0x2aa_aaab),
        (1, 0, 1, 2),
        (2, 0, request >> 26, request & ((1 << 26) - 1)),
        (3, 0, 3, 4),
    ];
    for (n, (content, epoch, slot, generation)) in contents.into_iter().enumerate() {
        let fields =
            [("content", content), ("epoch", epoch), ("slot", slot), ("generation", generation)];
        bytes.assert_fields("manifest", lab.part("manifest") + 8 * n, &fields);
    }
    let journal = [
        ("datagrams entered", 2),
        ("datagrams retired", 81),
        ("manifest words retired", 82),
        ("last decline", 83),
    ];
    bytes.assert_fields("journal", lab.part("journal"), &journal);
}

#[test]
fn counters_and_the_ring_read_as_documented() {
    let lab = Lab::new("ring");
    let counters = Counters::new(lab.memory().counters);
    for (i, info) in COUNTERS.iter().enumerate() {
        counters.set(info.counter, 1000 + i as u64);
    }
    // "Bucket b begins at (4 + b mod 4) << (b / 4) microseconds; the first also has everything
    // shorter."
    let begin = |b: u64| (4 + b % 4) << (b / 4);
    for bucket in 0..96 {
        counters.delay(begin(bucket), bucket + 1);
    }
    counters.delay(0, 1);

    // The shard to which the connection belongs is whose ring takes it.
    let shard = hypersync::conn::shard_of(&connection().original, 3);
    let mut producer = Producer::open(&lab.dir, shard).expect("nobody else has it");
    for _ in 0..2 {
        let known = groups::ALL & !groups::MARK;
        producer.push(&SourceEvent::Seen { connection: connection(), known }).expect("it is empty");
    }
    producer.flush();
    let mut consumer = Consumer::new(lab.region.ring(shard));
    assert_eq!(consumer.drain(1, &mut |record| assert!(record.is_ok())), 1);

    let bytes = lab.read();
    for word in 0..COUNTERS.len() + 96 {
        let right = match word.checked_sub(COUNTERS.len()) {
            None => 1000 + word as u64,
            Some(0) => 2,
            Some(bucket) => bucket as u64 + 1,
        };
        assert_eq!(bytes.word(lab.part("counters") + 8 * word), right, "word {word}");
    }
    let (_, parts, _) = documented_parts(&lab.region.header().sizes, shard);
    let ring = parts.iter().find(|(name, ..)| name == "ring").expect("it is there").1;
    let at = |what| ring + byte_of("Ingest ring", what);
    assert_eq!(bytes.word(at("magic")), u64::from_be_bytes(*b"hsring01"));
    assert_eq!(bytes.word(at("records, a power")), 64);
    assert_eq!((bytes.word(at("tail")), bytes.word(at("head"))), (1, 2));
    assert_eq!((bytes.half(at("doorbell")), bytes.half(at("u32: pid"))), (0, std::process::id()));
    let record = at("records of 128 bytes") + 128;
    let check = |position: u64| {
        let mix =
            |h: u64, word: u64| (h ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        (0..15).map(|i| bytes.word(record + 8 * i)).fold(position ^ 0x6a09_e667_f3bc_c908, mix)
    };
    let mut documented = documented_connection();
    documented.extend([("family", 6), ("known", 1 | 2 | 4 | 32), ("kind", 1), ("check", check(1))]);
    bytes.assert_fields("record", record, &documented);

    assert!(consumer.drain(9, &mut |_| ()) == 1 && consumer.prepare_sleep().is_some());
    assert_eq!(lab.read().half(at("doorbell")), 1);
}
