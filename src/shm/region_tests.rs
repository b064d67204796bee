//! Stories of two processes that meet at one directory.

use super::*;
use crate::limits::ARENA_MIN;
use crate::memory::MemorySize;
use crate::word::Word;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// A directory that goes away with the test.
pub(in crate::shm) struct TestDir(pub PathBuf);

impl TestDir {
    pub(in crate::shm) fn new(name: &str) -> TestDir {
        let dir = PathBuf::from(format!("/dev/shm/hypersync-test-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        TestDir(dir)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(in crate::shm) fn config() -> RegionConfig {
    let memory = MemorySize::new(64, ARENA_MIN);
    RegionConfig {
        sizes: Sizes { shards: 2, memory, ring_records: 64 },
        group: 7,
        member: 52,
        incarnation: 3,
        started: Time(99),
    }
}

fn refused(dir: &TestDir) -> String {
    let error = Region::create(&dir.0, &config()).err().expect("it is refused").to_string();
    assert!(!error.contains('\n'));
    error
}

fn unreadable(dir: &Path) -> ShmError {
    RegionView::open(dir).err().expect("it is refused")
}

#[test]
fn an_inspector_reads_what_the_appliance_wrote() {
    let dir = TestDir::new("round-trip");
    let region = Region::create(&dir.0, &config()).unwrap();
    assert_eq!(fs::metadata(&dir.0).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(matches!(unreadable(&dir.0), ShmError::NotReady(_)));
    region.shard(1).slots[63].update(|line| line.set_kind(crate::conn::Kind::Held));
    region.shard(1).counters[0].store(5, Ordering::Relaxed);
    region.group().shard(1).set_last_pass(Time(6));
    region.publish_ready();

    let view = RegionView::open(&dir.0).unwrap();
    assert_eq!(view.header(), region.header());
    let h = view.header();
    assert_eq!((h.pid, h.group, h.member, h.incarnation), (std::process::id(), 7, 52, 3));
    assert_eq!((h.started, h.sizes), (Time(99), config().sizes));
    assert!(h.table_id != 0 && h.boot_id != [0; 16] && view.is_running());
    let memory = view.shard(1);
    assert_eq!(memory.slots[63].snapshot().unwrap().0.kind(), crate::conn::Kind::Held);
    assert_eq!(memory.counters[0].get(), 5);
    assert_eq!(view.shard(0).counters[0].get(), 0);
    assert_eq!(view.group().shard(1).last_pass(), Time(6));
    // Where io_uring sends from.
    let arena = region.shard(1).arena;
    assert_eq!((arena.as_ptr() as usize % 4096, size_of_val(arena)), (0, ARENA_MIN));
}

#[test]
fn a_second_appliance_is_refused_by_the_first_ones_pid() {
    let dir = TestDir::new("second");
    let region = Region::create(&dir.0, &config()).unwrap();
    // flock belongs to the open file, so a second open in this process is a second process to it.
    assert!(refused(&dir).contains(&format!("in use by process {}", std::process::id())));
    drop(region);
    Region::create(&dir.0, &config()).unwrap();
}

#[test]
fn a_new_table_takes_the_old_ones_place_and_old_readers_keep_the_old_one() {
    let dir = TestDir::new("restart");
    let region = Region::create(&dir.0, &config()).unwrap();
    region.shard(0).counters[1].store(77, Ordering::Relaxed);
    region.publish_ready();
    let old = RegionView::open(&dir.0).unwrap();
    drop(region);
    // A start that was killed half-way leaves this behind.
    fs::write(dir.0.join("hypersync.shm.new"), "half").unwrap();
    let mut larger = config();
    larger.sizes.memory.capacity = 1000;
    let region = Region::create(&dir.0, &larger).unwrap();
    region.publish_ready();
    assert_eq!(old.shard(0).counters[1].get(), 77);
    let new = RegionView::open(&dir.0).unwrap();
    assert_eq!(new.shard(0).counters[1].get(), 0);
    assert_ne!(new.header().table_id, old.header().table_id);
    assert!(!dir.0.join("hypersync.shm.new").exists());
}

/// Changes the file at `at`, expects both sides to refuse it in these words, and the file
/// untouched.
fn refused_and_untouched(name: &str, spoil: impl FnOnce(&File), words: &str) {
    let dir = TestDir::new(name);
    Region::create(&dir.0, &config()).unwrap().publish_ready();
    let path = dir.0.join(FILE);
    spoil(&OpenOptions::new().write(true).open(&path).unwrap());
    let before = fs::read(&path).unwrap();
    for said in [refused(&dir), unreadable(&dir.0).to_string()] {
        assert!(said.contains(words), "{said}");
    }
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn another_layout_version_is_refused_and_left_alone() {
    refused_and_untouched("version", |f| f.write_all_at(&[9], 8).unwrap(), "layout version 9");
}

#[test]
fn a_foreign_file_is_refused_and_left_alone() {
    let spoil = |f: &File| f.write_all_at(b"notes of mine", 0).unwrap();
    refused_and_untouched("foreign", spoil, "not shared memory of hypersync");
    refused_and_untouched("short", |f| f.set_len(9).unwrap(), "not shared memory of hypersync");
}

#[test]
fn a_file_of_the_wrong_size_is_refused_and_left_alone() {
    refused_and_untouched("size", |f| f.set_len(8192).unwrap(), "it is damaged");
}

#[test]
fn headers_that_make_no_sense_are_refused_by_readers() {
    for word in [3, 4, 5, 6, 7, 8, 16] {
        let dir = TestDir::new("nonsense");
        Region::create(&dir.0, &config()).unwrap().publish_ready();
        let file = OpenOptions::new().write(true).open(dir.0.join(FILE)).unwrap();
        file.write_all_at(&u64::MAX.to_ne_bytes(), 8 * word).unwrap();
        assert!(matches!(unreadable(&dir.0), ShmError::OtherBuild(_)), "word {word}");
    }
}

#[test]
fn places_where_no_region_can_be_say_why() {
    let dir = TestDir::new("places");
    assert!(unreadable(&dir.0).to_string().contains("is hypersync running"));
    fs::write(&dir.0, "a file").unwrap();
    assert!(refused(&dir).contains("use as a directory"));
    fs::remove_file(&dir.0).unwrap();
    fs::create_dir(&dir.0).unwrap();
    fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(refused(&dir).contains("others may write"));
    fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o000)).unwrap();
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        assert!(refused(&dir).contains("Permission denied"));
        assert!(unreadable(&dir.0).to_string().contains("Permission denied"));
    }
    fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir.0.join(FILE)).unwrap();
    assert!(refused(&dir).contains("cannot open"));
}

#[test]
fn a_region_larger_than_memory_is_refused_with_the_bytes_it_needs() {
    let dir = TestDir::new("large");
    let mut large = config();
    large.sizes.shards = 64;
    large.sizes.memory.capacity = crate::limits::SLOTS_MAX;
    let error = Region::create(&dir.0, &large).err().expect("half a terabyte is not there");
    assert!(
        matches!(error, ShmError::NoSpace { needed, .. } if needed == total_bytes(&large.sizes) as u64)
    );
    assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1, "only the lock file stays");
}

#[test]
fn what_sysctls_were_survives_a_crash_and_a_start_that_fails_but_no_boot() {
    let dir = TestDir::new("old-values");
    let region = Region::create(&dir.0, &config()).unwrap();
    assert_eq!((region.old_values().namespace(), region.old_values().get(0)), (0, None));
    region.old_values().begin(77);
    region.old_values().set(0, Some(2));
    region.old_values().set(1, Some(0));
    drop(region);
    // One that goes no further than the directory, and one that never becomes ready.
    drop(Location::claim(&dir.0).unwrap());
    drop(Region::create(&dir.0, &config()).unwrap());
    let region = Region::create(&dir.0, &config()).unwrap();
    region.publish_ready();
    let record = region.old_values();
    assert_eq!((record.namespace(), record.get(0), record.get(1)), (77, Some(2), Some(0)));
    assert_eq!(RegionView::open(&dir.0).unwrap().old_values().get(1), Some(0));
    record.begin(78);
    assert_eq!((record.namespace(), record.get(0), record.get(1)), (78, None, None));

    record.set(0, Some(2));
    drop(region);
    let file = OpenOptions::new().write(true).open(dir.0.join(FILE)).unwrap();
    file.write_all_at(&[0; 8], 10 * 8).unwrap(); // another boot's id
    let region = Region::create(&dir.0, &config()).unwrap();
    assert_eq!((region.old_values().namespace(), region.old_values().get(0)), (0, None));
}

/// A table that was ready and that nobody has any more.
fn left_behind(dir: &TestDir) -> Header {
    let region = Region::create(&dir.0, &config()).unwrap();
    region.publish_ready();
    *region.header()
}

/// Why a start like this makes a new table.
fn fresh(dir: &TestDir, config: &RegionConfig) -> Fresh {
    Location::claim(&dir.0).unwrap().resumable(config).expect_err("it is not taken up")
}

#[test]
fn a_start_takes_up_what_lies_there_and_whoever_has_it_mapped_goes_on() {
    let dir = TestDir::new("resume");
    assert_eq!(fresh(&dir, &config()), Fresh::Nothing);
    let region = Region::create(&dir.0, &config()).unwrap();
    assert!(!region.is_resumed());
    region.publish_ready();
    region.shard(1).counters[0].store(5, Ordering::Relaxed);
    region.shard(1).journal[63].store(6, Ordering::Relaxed);
    region.old_values().begin(77);
    region.group().shard(0).set_standing(super::super::group::Standing::Ready);
    let (reader, old) = (RegionView::open(&dir.0).unwrap(), *region.header());
    drop(region);
    ask_back_within(&dir.0, std::time::Duration::from_secs(9)).unwrap();

    let later = RegionConfig { incarnation: 4, started: Time(100), ..config() };
    let region = Region::resume(Location::claim(&dir.0).unwrap(), &later).unwrap();
    assert!(region.is_resumed());
    assert_eq!(*region.header(), Header { incarnation: 4, started: Time(100), ..old });
    assert!(matches!(unreadable(&dir.0), ShmError::NotReady(_)), "not before it says so");
    assert_eq!((reader.header().incarnation, reader.incarnation()), (3, 4));
    assert_eq!(reader.pid(), std::process::id());
    assert_eq!(region.shard(1).counters[0].load(Ordering::Relaxed), 5);
    assert_eq!(region.shard(1).journal[63].load(Ordering::Relaxed), 6);
    assert_eq!(region.old_values().namespace(), 77);
    assert_eq!(region.group().shard(0).standing(), super::super::group::Standing::Starting);
    assert_eq!(region.take_back_within(), 0, "that was about an earlier process");
    region.publish_ready();
    let view = RegionView::open(&dir.0).unwrap();
    assert_eq!(view.header(), region.header());
    region.shard(0).counters[1].store(8, Ordering::Relaxed);
    assert_eq!(reader.shard(0).counters[1].get(), 8, "it is the same memory");

    ask_back_within(&dir.0, std::time::Duration::from_secs(9)).unwrap();
    assert_eq!((region.take_back_within(), region.take_back_within()), (9000, 0));
}

#[test]
fn what_does_not_fit_is_not_taken_up_and_the_reason_is_named() {
    let dir = TestDir::new("unfit");
    left_behind(&dir);
    assert_eq!(Location::claim(&dir.0).unwrap().resumable(&config()), Ok(()));
    type Spoil = fn(&mut RegionConfig);
    let changes: [(Spoil, &str); 7] = [
        (|c| c.group = 8, "--group was 7 and is 8"),
        (|c| c.member = 1, "--member was 52 and is 1"),
        (|c| c.sizes.shards = 1, "--shards was 2 and is 1"),
        (|c| c.sizes.memory.capacity = 128, "--capacity (slots a shard) was 64 and is 128"),
        (|c| c.sizes.memory.extras = 9, "--extras (a shard) was 8 and is 9"),
        (|c| c.sizes.memory.arena = 2 * ARENA_MIN, "--arena was 524288 and is 1048576"),
        (|c| c.sizes.ring_records = 128, "--ring was 64 and is 128"),
    ];
    for (change, says) in changes {
        let mut other = config();
        change(&mut other);
        assert_eq!(fresh(&dir, &other).to_string(), says);
    }
    let write = |word: usize, value: u64| {
        let file = OpenOptions::new().write(true).open(dir.0.join(FILE)).unwrap();
        file.write_all_at(&value.to_ne_bytes(), 8 * word as u64).unwrap();
    };
    write(10, 0);
    assert_eq!(fresh(&dir, &config()), Fresh::Boot);
    left_behind(&dir);
    write(8, 1);
    assert_eq!(fresh(&dir, &config()), Fresh::Build);
}

#[test]
fn a_table_that_ended_or_cannot_be_taken_up_is_left_behind() {
    let dir = TestDir::new("ended");
    let region = Region::create(&dir.0, &config()).unwrap();
    drop(region);
    assert_eq!(fresh(&dir, &config()), Fresh::Unfinished, "it never was ready");
    left_behind(&dir);
    let take = || Region::resume(Location::claim(&dir.0).unwrap(), &config()).unwrap();
    for _ in 0..2 {
        // Three starts in a row fail, one in between does not.
        (0..2).for_each(|_| drop(take()));
        take().publish_ready();
    }
    (0..3).for_each(|_| drop(take()));
    assert_eq!(fresh(&dir, &config()), Fresh::Unfinished);

    let region = Region::create(&dir.0, &config()).unwrap();
    region.publish_ready();
    region.end();
    drop(region);
    assert_eq!(fresh(&dir, &config()), Fresh::Ended);
    drop(Region::create(&dir.0, &config()).unwrap());
    assert_eq!(fresh(&dir, &config()), Fresh::Unfinished, "a new table has not ended");
}
