//! No allocation after start: whole members, under traffic, through a death and a return, with an
//! allocator that counts what the shards' threads ask for. The members are this program itself,
//! started again as [`member`].

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::net::{IpAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::time::Duration;

use argh::FromArgs;
use hypersync::ccp::UDP_PORT;
use hypersync::ccp::header::SHARD_OFFSET;
use hypersync::clock;
use hypersync::config::{Config, RunOptions};
use hypersync::conntrack::commit::{Committer, Lifetime};
use hypersync::counters::{Counter, Counters};
use hypersync::load::{FlowsConfig, Load};
use memmap2::MmapMut;

mod common;

use common::copies::connection;
use common::member::{Lab, Member, SOON, wait_until_ready, with, words};
use common::namespace::two_hosts;
use common::{may_make_namespaces, wait_for};

/// Names the file in which a member counts.
const COUNTS: &str = "HYPERSYNC_TEST_COUNTS";

/// Set by hand, it makes a member say where it allocates.
const TRACE: &str = "HYPERSYNC_TEST_TRACE";

/// Shards that can be counted: a word each.
const SHARDS: usize = 4;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Counting;

/// Where allocations are counted, if this process is a member.
static WORDS: AtomicPtr<AtomicU64> = AtomicPtr::new(null_mut());

thread_local! {
    /// The shard whose thread this is, once that is known.
    static SHARD: Cell<Option<usize>> = const { Cell::new(None) };
    static IS_TRACING: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: everything is handed on to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

fn count() {
    let words = WORDS.load(Ordering::Relaxed);
    if words.is_null() {
        return;
    }
    let Some(shard) = SHARD.get().or_else(shard_by_name) else { return };
    SHARD.set(Some(shard));
    // SAFETY: the mapping has a page, which is never unmapped.
    unsafe { &*words.add(shard) }.fetch_add(1, Ordering::Relaxed);
    if !IS_TRACING.replace(true) {
        if std::env::var_os(TRACE).is_some() {
            eprintln!("shard {shard} allocates:\n{}", std::backtrace::Backtrace::force_capture());
        }
        IS_TRACING.set(false);
    }
}

/// The shard that this thread is named after.
fn shard_by_name() -> Option<usize> {
    let mut name = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let digit = name.strip_prefix(b"shard-")?[0];
    Some(usize::from(digit - b'0')).filter(|shard| *shard < SHARDS)
}

fn map(path: &Path) -> MmapMut {
    let file = File::options().read(true).write(true).open(path).expect("the counts of a member");
    // SAFETY: the file is used by this test alone, and only through atomics.
    unsafe { MmapMut::map_mut(&file) }.expect("a small file can be mapped")
}

#[test]
#[ignore = "what the other test starts as a member"]
fn member() {
    let path = std::env::var_os(COUNTS).expect("started by the other test");
    let mut counts = map(Path::new(&path));
    WORDS.store(counts.as_mut_ptr().cast(), Ordering::Relaxed);
    let words: Vec<String> = std::env::args().skip_while(|word| word != "--").skip(2).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let options =
        RunOptions::from_args(&["hypersync", "run"], &words).expect("the words of a member");
    let _ = hypersync::appliance::run(&Config::check(options).expect("the words of a member"));
    std::mem::forget(counts);
}

/// A member that counts.
struct Counted {
    member: Member,
    counts: MmapMut,
    at_start: [u64; SHARDS],
}

impl Counted {
    /// On loopback.
    fn start(lab: &Lab, id: u8, others: &[u8]) -> Counted {
        let command = Command::new(std::env::current_exe().expect("this program"));
        Counted::run(lab, id, command, &with(lab.words(id, others), &["--shards", "2"]))
    }

    fn run(lab: &Lab, id: u8, mut command: Command, words: &[String]) -> Counted {
        let path = lab.path(&format!("m{id}.counts"));
        File::create(&path).and_then(|file| file.set_len(4096)).expect("the directory is ours");
        command.args(["member", "--exact", "--ignored", "--nocapture", "--"]).env(COUNTS, &path);
        let member = Member::start(lab, &format!("m{id}"), id, command, words);
        wait_for("every shard makes passes", SOON, || {
            (0..2).all(|s| Counters::new(member.view().shard(s).counters).get(Counter::Passes) > 0)
        });
        let mut counted = Counted { member, counts: map(&path), at_start: [0; SHARDS] };
        counted.at_start = counted.allocations();
        assert!(
            counted.at_start[..2].iter().all(|n| *n > 0),
            "a start allocates: {:?}",
            counted.at_start
        );
        counted
    }

    /// What the shards' threads have allocated so far.
    fn allocations(&self) -> [u64; SHARDS] {
        let words = self.counts.as_ptr().cast::<AtomicU64>();
        // SAFETY: the mapping is a page long, and nobody accesses it but by atomics.
        std::array::from_fn(|shard| unsafe { &*words.add(shard) }.load(Ordering::Relaxed))
    }

    fn check(&self, when: &str) {
        let now = self.allocations();
        assert_eq!(
            now, self.at_start,
            "member {} allocated after its start: {when}",
            self.member.id
        );
    }
}

/// A train whose second datagram is for another shard than the first one, by which the whole is
/// steered.
fn send_strays(lab: &Lab, to: u8) {
    let socket = UdpSocket::bind((lab.address(9), 0)).expect("an address of ours");
    let (size, len) = (64_i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the option's value is an i32, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const size).cast(),
            len,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    let mut train = [0; 128];
    train[64 + SHARD_OFFSET] = 1;
    socket.send_to(&train, (lab.address(to), UDP_PORT)).expect("loopback takes it");
}

#[test]
fn no_shard_allocates_after_its_start_neither_under_traffic_nor_through_a_death_and_a_return() {
    let lab = Lab::new();
    let mut one = Counted::start(&lab, 1, &[2, 3]);
    let two = Counted::start(&lab, 2, &[1, 3]);
    let three = Counted::start(&lab, 3, &[1, 2]);
    wait_until_ready(&[&one.member, &two.member, &three.member]);
    [&one, &two, &three].iter().for_each(|counted| counted.check("joining"));

    let config = |plane| FlowsConfig {
        plane,
        seed: 1,
        connections: 3000,
        rate: 5000,
        ramp: Duration::from_millis(500),
        short_percent: 30,
        short_life: Duration::from_millis(50),
        nat_percent: 20,
        v6_percent: 10,
    };
    let load = |counted: &Counted, plane| {
        Load::open(&counted.member.shm, config(plane), clock::now()).expect("its rings are free")
    };
    let mut loads = [load(&one, 1), load(&two, 2)];
    let drive = |loads: &mut [Load], what: &str, until: &dyn Fn() -> bool| {
        wait_for(what, SOON, || {
            loads.iter_mut().for_each(|load| _ = load.batch(clock::now()));
            until()
        });
    };
    // Each one's copies are at the next one.
    drive(&mut loads, "traffic at both, and copies of it", &|| {
        [&one, &two].iter().all(|counted| counted.member.counter(Counter::SourceEvents) > 10_000)
            && [&two, &three]
                .iter()
                .all(|counted| counted.member.counter(Counter::ConnectionsBackup) > 1000)
    });
    [&one, &two, &three].iter().for_each(|counted| counted.check("traffic"));

    send_strays(&lab, 2);
    drive(&mut loads, "datagrams that arrived at the wrong shard", &|| {
        two.member.counter(Counter::Strays) > 0 && two.member.counter(Counter::RejectMagic) > 0
    });
    two.check("strays");

    one.member.kill();
    let [_, rest] = loads;
    let mut loads = [rest];
    drive(&mut loads, "what the dead one had is taken over, and has copies again", &|| {
        [&two, &three].iter().all(|counted| counted.member.was_told("member-dead 1"))
            && two.member.counter(Counter::Promotions) > 1000
            && two.member.counter(Counter::Unprotected) == 0
            && three.member.counter(Counter::ConnectionsBackup) > 3000
    });
    [&two, &three].iter().for_each(|counted| counted.check("a death"));

    drop(one);
    let one = Counted::start(&lab, 1, &[2, 3]);
    drive(&mut loads, "member 1 is back", &|| {
        one.member.was_told("self-ready 1") && two.member.was_told("member-ready 1")
    });
    [&one, &two, &three].iter().for_each(|counted| counted.check("a return"));
}

/// Writes the connections of these numbers into the kernel's table, with this mark: to its
/// appliance they are traffic.
fn write(pen: &mut Committer, numbers: Range<u32>, mark: u32) {
    for n in numbers {
        let mut connection = connection(n);
        connection.state.mark = mark;
        if pen.write(&connection, Lifetime::Normal).is_err() {
            pen.flush(&mut |_| {});
            pen.write(&connection, Lifetime::Normal).expect("an empty batch takes everything");
        }
    }
    pen.flush(&mut |_| {});
}

#[test]
fn with_the_kernel_as_source_and_copies_in_it_no_shard_allocates_either() {
    if !may_make_namespaces("allocations with the kernel's conntrack") {
        return;
    }
    let lab = Lab::new();
    let hosts = two_hosts();
    let start = |id: u8| {
        let address = |id: u8| IpAddr::from([10, 9, 0, id]);
        let peer = address(3 - id).to_string();
        let flags = [
            "--shards", "2", "--source", "kernel", "--commit", "eager", "--verify", "1s", "--peer",
            &peer,
        ];
        let command =
            hosts[usize::from(id) - 1].command(std::env::current_exe().expect("this program"));
        Counted::run(&lab, id, command, &with(words(id, address(id)), &flags))
    };
    let (mut one, two) = (start(1), start(2));
    wait_until_ready(&[&one.member, &two.member]);
    [&one, &two].iter().for_each(|counted| counted.check("joining"));

    let mut pen = hosts[0].inside(|| Committer::open().expect("conntrack"));
    write(&mut pen, 0..2000, 1);
    wait_for("copies are in the other kernel", SOON, || {
        two.member.counter(Counter::Commits) >= 2000
    });
    write(&mut pen, 0..1000, 2);
    for n in 1000..1500 {
        pen.delete(&connection(n).original).expect("a batch takes so many");
        pen.flush(&mut |_| {});
    }
    wait_for("changes and closes follow, and entries were verified", SOON, || {
        let backup = |counter| two.member.counter(counter);
        backup(Counter::Commits) >= 3000
            && backup(Counter::CommitDeletes) >= 500
            && backup(Counter::VerifyWalks) > 2
            && backup(Counter::ConnectionsBackup) == 1500
    });
    [&one, &two]
        .iter()
        .for_each(|counted| counted.check("events, commits and the walk that verifies"));

    let commits = two.member.counter(Counter::Commits);
    one.member.kill();
    wait_for("entries have the timeouts of the living", SOON, || {
        two.member.was_told("member-dead 1")
            && two.member.counter(Counter::Commits) >= commits + 1500
    });
    two.check("a death");
}
