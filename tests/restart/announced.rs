//! `hypersync restart`: what it asks, what it refuses, and what the others make of it.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hypersync::counters::Counter;
use hypersync::group::view::Status;
use hypersync::shm::{FILE, RegionView};

use crate::common::copies::{copies, wait_for_agreement};
use crate::common::member::{Lab, Member, SOON, dies_with_us, hypersync, wait_until_ready, with};
use crate::common::{run, wait_for};
use crate::load::{Load, same_places};

/// Runs `hypersync restart`; returns its exit status and the one line that it said.
fn restart(dir: &Path, within: &str) -> (Option<i32>, String) {
    let mut command = hypersync();
    command.arg("restart").arg("--shm").arg(dir).args(["--within", within]);
    let output = dies_with_us(&mut command).output().expect("the program is built");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let said = format!("{out}{err}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(out.is_empty(), !output.status.success(), "{said}");
    (output.status.code(), said.trim().to_owned())
}

/// A copy of the program in the test's directory, which the test may replace.
fn install(lab: &Lab) -> PathBuf {
    let (path, new) = (lab.path("hypersync"), lab.path("hypersync.new"));
    // Copied by another process: a writing descriptor that leaked into a child would make it busy.
    run(Command::new("cp").arg(env!("CARGO_BIN_EXE_hypersync")).arg(&new));
    fs::rename(&new, &path).expect("the directory is ours");
    path
}

/// Puts a script in the program's place.
fn replace(program: &Path, script: &str) {
    let new = program.with_extension("script");
    fs::write(&new, format!("#!/bin/sh\n{script}\n")).expect("the directory is ours");
    fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).expect("it is our file");
    fs::rename(&new, program).expect("the directory is ours");
}

fn start(lab: &Lab, program: &Path, extra: &[&str]) -> Member {
    let words = with(lab.words(1, &[2]), extra);
    Member::start(lab, "m1", 1, Command::new(program), &words)
}

fn descriptors(member: &Member) -> usize {
    fs::read_dir(format!("/proc/{}/fd", member.pid())).expect("it runs").count()
}

#[test]
fn what_cannot_be_restarted_is_refused_and_nothing_is_changed() {
    let lab = Lab::new();
    let dir = lab.path("m1");
    let (status, said) = restart(&dir, "5s");
    assert!(status == Some(1) && said.contains("no hypersync runs with --shm"), "{said}");
    for within in ["500ms", "3min"] {
        let (status, said) = restart(&dir, within);
        assert!(status == Some(2) && said.contains("is out of range: 1s to 2m"), "{said}");
    }
    let mut one = lab.start(1, &[2], &["--shards", "1"]);
    let incarnation = one.view().incarnation();

    let file = fs::File::options().write(true).open(dir.join(FILE)).unwrap();
    file.write_all_at(&99u64.to_ne_bytes(), 8).unwrap();
    let before = fs::read(dir.join(FILE)).unwrap()[..4096].to_vec();
    let (status, said) = restart(&dir, "5s");
    assert_eq!(status, Some(1));
    for words in ["layout version 99", "one member at a time", "SIGTERM", "new table"] {
        assert!(said.contains(words), "{words} is not in: {said}");
    }
    assert!(fs::read(dir.join(FILE)).unwrap()[..4096] == before, "something was written");
    assert!(
        one.is_running()
            && one.view().incarnation() == incarnation
            && !one.log().contains("restarting")
    );

    one.kill();
    let (status, said) = restart(&dir, "5s");
    assert!(status == Some(1) && said.contains("there is nothing to restart"), "{said}");
}

#[test]
fn a_restart_is_the_same_process_with_the_same_table_and_the_program_that_lies_there_now() {
    let lab = Lab::new();
    let program = install(&lab);
    // Handed on, the switch would cost the table at each restart.
    let mut words = with(lab.words(1, &[2]), &["--shards", "2"]);
    words.push("--new-table".into());
    let mut one = Member::start(&lab, "m1", 1, Command::new(&program), &words);
    let old = *one.view().header();
    let open = descriptors(&one);
    for _ in 0..3 {
        install(&lab);
        let (status, said) = restart(&one.shm, "20s");
        assert_eq!(status, Some(0), "{said}");
        assert!(
            said.contains(&format!("process {}, with table {:08x}", one.pid(), old.table_id)),
            "{said}"
        );
        let new = *RegionView::open(&one.shm).unwrap().header();
        assert_eq!(
            (new.pid, new.table_id, new.index_key),
            (one.pid(), old.table_id, old.index_key)
        );
        let running = fs::metadata(format!("/proc/{}/exe", one.pid())).unwrap();
        assert_eq!(
            running.ino(),
            fs::metadata(&program).unwrap().ino(),
            "the program that was put there"
        );
        wait_for("nothing of the process before is left open", SOON, || descriptors(&one) == open);
    }
    // As systemd's ExecReload= asks.
    let before = one.view().incarnation();
    one.signal(libc::SIGHUP);
    wait_for("a signal does it too", SOON, || {
        RegionView::open(&one.shm).is_ok_and(|view| view.header().incarnation != before)
    });
    assert!(one.log().contains("back within 30s"), "{}", one.log());
    one.signal(libc::SIGTERM);
    assert!(one.end(SOON).success(), "it is told to leave as ever");
}

#[test]
fn peers_wait_for_a_restart_that_takes_longer_than_their_dead_time() {
    let lab = Lab::new();
    let program = install(&lab);
    let mut one = start(&lab, &program, &["--shards", "2"]);
    let two = lab.start(2, &[1], &["--shards", "1"]);
    wait_until_ready(&[&one, &two]);
    let (mut load, places) = Load::at_rest(&one, &two);
    load.change();
    wait_for("the load runs", SOON, || load.rounds() > 3);
    let (table, died) = (one.view().header().table_id, two.counter(Counter::MembersDied));

    // The next process takes a second, twice the dead time of member 2, before it begins.
    let real = env!("CARGO_BIN_EXE_hypersync");
    replace(&program, &format!("sleep 1\nexec {real} \"$@\""));
    let asked = Instant::now();
    let (status, said) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| restart(&one.shm, "30s"));
        wait_for("member 2 knows that it restarts", SOON, || {
            two.view().group().read(1).is_some_and(|member| member.is_restarting())
        });
        assert_eq!(two.sees(1), Status::Ready, "it stays what it was");
        asking.join().expect("it does not fail")
    });
    assert!(asked.elapsed() > Duration::from_secs(1));
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains(&format!("with table {table:08x}")), "{said}");
    wait_for("it is back", SOON, || {
        two.view().group().read(1).is_some_and(|m| m.status == Status::Ready && !m.is_restarting())
    });
    let rounds = load.rounds();
    wait_for("the producer goes on, and was not asked to", SOON, || load.rounds() > rounds + 3);
    let wanted = load.stop();
    wait_for_agreement("both have the newest", &[&one, &two], &wanted, SOON);
    same_places(&places[0], &copies(&one).unwrap());
    same_places(&places[1], &copies(&two).unwrap());
    assert!(
        !two.was_told("member-dead 1") && two.counter(Counter::MembersDied) == died,
        "nobody died"
    );
    assert_eq!(one.counter(Counter::StreamsLost) + two.counter(Counter::StreamsLost), 0);
    assert!(one.is_running());
}

#[test]
fn a_restart_that_never_returns_is_a_death_once_its_time_is_over() {
    let lab = Lab::new();
    let program = install(&lab);
    let mut one = start(&lab, &program, &["--shards", "1"]);
    let two = lab.start(2, &[1], &["--shards", "1"]);
    wait_until_ready(&[&one, &two]);
    replace(&program, "exec sleep 600");
    let asked = Instant::now();
    let (status, said) = restart(&one.shm, "3s");
    assert!(status == Some(1) && said.contains("did not come back within 3s"), "{said}");
    wait_for("member 2 gives it up", SOON, || two.was_told("member-dead 1"));
    assert!(asked.elapsed() >= Duration::from_secs(3), "not before");
    assert_eq!((two.sees(1), two.counter(Counter::MembersDied)), (Status::Dead, 1));
    assert!(one.is_running(), "whatever the operator put there");
}

#[test]
fn a_program_that_cannot_be_run_ends_the_process_with_an_error() {
    let lab = Lab::new();
    let program = install(&lab);
    let mut one = start(&lab, &program, &["--shards", "1"]);
    let id = one.view().header().table_id;
    fs::remove_file(&program).unwrap();
    let (status, said) = restart(&one.shm, "20s");
    assert!(status == Some(1) && said.contains("ended and was not replaced"), "{said}");
    assert_eq!(one.end(SOON).code(), Some(1));
    let line = format!("hypersync: cannot restart as {}: No such file", program.display());
    assert!(one.log().contains(&line), "{}", one.log());
    // The table waits for who starts it again.
    install(&lab);
    let one = start(&lab, &program, &["--shards", "1"]);
    assert_eq!(one.view().header().table_id, id);
}

#[test]
fn a_restart_needs_no_more_lockable_memory_than_a_start() {
    let lab = Lab::new();
    let mut command = hypersync();
    // SAFETY: system calls that may be made between fork and exec; the struct lives on the stack.
    unsafe {
        command.pre_exec(|| {
            // Room for one send arena and the queues, and not for a second.
            let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
            if libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // With CAP_IPC_LOCK (14) there is no limit. Without root there is none to drop.
            if libc::geteuid() == 0 && libc::prctl(libc::PR_CAPBSET_DROP, 14, 0, 0, 0) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        })
    };
    let words = with(lab.words(1, &[2]), &["--shards", "1"]);
    let one = Member::start(&lab, "m1", 1, command, &words);
    for _ in 0..5 {
        let (status, said) = restart(&one.shm, "20s");
        assert_eq!(status, Some(0), "{said}");
    }
}
