//! What cannot work is refused before anything begins: one line that says what to do, status 2,
//! and nothing that was there is damaged.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use hypersync::ccp::UDP_PORT;
use hypersync::shm::{FILE, RegionView};

use crate::common::member::{Lab, SOON, dies_with_us, hypersync, wait_until_ready, with};
use crate::common::{bind, run};

/// Runs a member that must be refused; returns the line.
fn refused(command: &mut Command) -> String {
    let mut child = dies_with_us(command)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the program is built");
    let mut status = None;
    let start = std::time::Instant::now();
    while status.is_none() && start.elapsed() < SOON {
        status = child.try_wait().expect("a child can be asked");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let _ = child.kill();
    let output = child.wait_with_output().expect("a child can be waited for");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(status.is_some(), "{command:?} was not refused: {said}");
    assert_eq!(output.status.code(), Some(2), "{command:?}: {said}");
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "{command:?} should say one line:\n{said}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    println!("{}", lines[0]);
    lines[0].to_owned()
}

/// A member's command with its own directory `m1`.
fn member(lab: &Lab, extra: &[&str]) -> Command {
    let mut command = hypersync();
    command.args(with(lab.words(1, &[2]), extra)).arg("--shm").arg(lab.path("m1"));
    command
}

/// The program, run by a user who may nothing (or by this one, if that is not root).
fn as_nobody(lab: &Lab) -> Command {
    // SAFETY: geteuid has no arguments, no preconditions and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return hypersync();
    }
    // The program may lie where only root can go: it is opened before the user changes.
    let program = lab.path("hypersync");
    // Copied by another process: a writing descriptor that leaked into a child would make it busy.
    run(Command::new("cp").arg(env!("CARGO_BIN_EXE_hypersync")).arg(&program));
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new(&program);
    command.uid(65534).gid(65534);
    command
}

fn assert_says(line: &str, words: &[&str]) {
    for word in words {
        assert!(line.contains(word), "'{word}' is not in: {line}");
    }
}

#[test]
fn flags_that_make_no_sense_are_named_with_their_range() {
    let lab = Lab::new();
    for (flag, value, says) in [
        ("--member", "0", "1 to 52"),
        ("--member", "53", "1 to 52"),
        ("--member", "many", "many"),
        ("--group", "0", "1 to 65535"),
        ("--shards", "0", "1 to 64"),
        ("--shards", "65", "1 to 64"),
        ("--capacity", "1", "is out of range"),
        ("--extras", "0", "--extras 0 is out of range: 1 to 20000"),
        ("--extras", "20001", "1 to 20000"),
        ("--arena", "4096", "524288 to 1073741824"),
        ("--ring", "1000", "power of two"),
        ("--heartbeat", "1ms", "1ms is out of range: 10ms to 10s"),
        ("--heartbeat", "fast", "100ms"),
        ("--dead-after", "1", "2 to 100"),
        ("--hold", "2h", "2h is out of range: 0s to 1h"),
        ("--priority", "256", "256"),
        ("--sync", "0.0.0.0", "no address of this host"),
        ("--sync", "here", "here"),
        ("--peer", "::1", "same family"),
        ("--sync", "fe80::1%3", "write the interface's name behind the %, not its number"),
        ("--sync", "127.0.0.1%lo", "leave %lo out"),
        ("--multicast", "ff02::74%", "write the interface's name behind the %"),
        ("--multicast", "224.0.0.116", "exclude each other"),
        ("--source", "disk", "kernel or ring"),
        ("--commit", "eager", "--source kernel"),
        ("--send", "slow", "fixed, zc, copy or auto"),
        ("--features", "some", "all or none"),
        ("--sysctl", "maybe", "set or leave"),
        ("--rule", "skip proto tpc", "rule 'skip proto tpc': 'tpc' is no protocol: write tcp"),
        ("--rule", "allow dport 53", "'allow' is no verdict: begin with copy or skip"),
        ("--rule", "skip local", "--source kernel"),
        ("--rules", "/nosuch/rules", "--rules /nosuch/rules: No such file"),
    ] {
        assert_says(&refused(&mut member(&lab, &[flag, value])), &[says]);
    }
    refused(&mut member(&lab, &["--colour", "blue"]));
    for (extra, says) in [
        (["--interface", "sy1"], "--interface sy1 and --sync fe80::1%sy0 contradict each other"),
        (
            ["--peer", "fe80::3%sy1"],
            "--sync fe80::1%sy0 and --peer fe80::3%sy1 contradict each other",
        ),
    ] {
        let mut command = hypersync();
        let words = [
            "run",
            "--member",
            "1",
            "--source",
            "ring",
            "--sync",
            "fe80::1%sy0",
            "--peer",
            "fe80::2",
        ];
        command.args(words).args(extra).arg("--shm").arg(lab.path("m1"));
        assert_says(&refused(&mut command), &[says]);
    }
    assert!(!lab.path("m1").exists(), "nothing was made");
}

#[test]
fn a_bad_rule_of_a_file_is_named_with_its_line() {
    let lab = Lab::new();
    let file = lab.path("rules");
    fs::write(&file, "# what is copied\n\nskip dport 53 # names\nskip src 10.0.0.1/8\n").unwrap();
    let mut command = member(&lab, &["--rule", "copy proto tcp"]);
    let line = refused(command.arg("--rules").arg(&file));
    assert_says(&line, &[file.to_str().unwrap(), "line 4", "'10.0.0.1/8'", "write 10.0.0.0/8"]);
    assert!(!lab.path("m1").exists(), "nothing was made");
}

#[test]
fn a_missing_member_number_is_usage_too() {
    let output =
        hypersync().args(["run", "--sync", "127.0.0.1"]).output().expect("the program is built");
    assert_eq!(output.status.code(), Some(2));
    assert_says(&String::from_utf8_lossy(&output.stderr), &["--member"]);
}

#[test]
fn a_directory_that_cannot_be_used_is_named() {
    let lab = Lab::new();
    let file = lab.path("file");
    fs::write(&file, "here first").unwrap();
    let within = file.join("shm");
    for place in
        [&file, &within, Path::new("/proc/hypersync"), &lab.path("missing").join("further")]
    {
        let line = refused(hypersync().args(lab.words(1, &[2])).arg("--shm").arg(place));
        assert_says(&line, &[place.to_str().unwrap()]);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "here first");

    let public = lab.path("public");
    fs::create_dir(&public).unwrap();
    fs::set_permissions(&public, PermissionsExt::from_mode(0o777)).unwrap();
    let line = refused(hypersync().args(lab.words(1, &[2])).arg("--shm").arg(&public));
    assert_says(&line, &["others may write to", public.to_str().unwrap()]);
    assert_eq!(fs::read_dir(&public).unwrap().count(), 0, "nothing was put there");
}

#[test]
fn a_directory_of_another_user_is_named() {
    let lab = Lab::new();
    let shut = lab.path("shut");
    fs::create_dir(&shut).unwrap();
    fs::set_permissions(&shut, PermissionsExt::from_mode(0o500)).unwrap();
    let mut command = as_nobody(&lab);
    command.args(lab.words(1, &[2])).arg("--shm").arg(&shut);
    assert_says(&refused(&mut command), &[shut.to_str().unwrap(), "Permission denied"]);
    assert_eq!(fs::read_dir(&shut).unwrap().count(), 0);
}

#[test]
fn a_port_in_use_is_named_with_what_to_do_and_the_table_that_lay_there_stays() {
    let lab = Lab::new();
    drop(lab.start(1, &[2], &["--shards", "1"]));
    let path = lab.path("m1").join(FILE);
    let before = fs::read(&path).unwrap();
    let _taken = bind(SocketAddr::new(lab.address(1), UDP_PORT));
    let address = format!("{}:8116", lab.address(1));
    let line = refused(&mut member(&lab, &["--shards", "1"]));
    assert_says(&line, &[&address, "in use", "another --sync address"]);
    // The advice can be followed: the command is there, and names the process that holds the port.
    let advised = line.split('`').nth(1).expect("a command to call");
    let named = run(Command::new("sh").args(["-c", advised]));
    assert_says(&named, &[&address, &format!("pid={}", std::process::id())]);
    assert!(fs::read(&path).unwrap() == before, "the region was replaced before the port was had");
}

#[test]
fn a_second_member_on_the_same_address_is_refused_even_with_a_directory_of_its_own() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2], &["--shards", "2"]);
    let mut command = hypersync();
    command.args(lab.words(1, &[2])).args(["--shards", "2"]).arg("--shm").arg(lab.path("other"));
    assert_says(&refused(&mut command), &["in use"]);
    assert!(one.is_running());
}

#[test]
fn shared_memory_of_another_version_or_size_or_kind_is_refused_and_left_alone() {
    let lab = Lab::new();
    drop(lab.start(1, &[2], &["--shards", "1"]));
    let path = lab.path("m1").join(FILE);
    let whole = fs::read(&path).unwrap();
    let refuse = |says: &[&str]| {
        let before = fs::read(&path).unwrap();
        assert_says(&refused(&mut member(&lab, &["--shards", "1"])), says);
        assert!(fs::read(&path).unwrap() == before, "{says:?}: its bytes changed");
        assert!(!path.with_extension("shm.new").exists(), "{says:?}: something was left");
    };
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&99u64.to_ne_bytes(), 8).unwrap();
    let upgrade = ["one member at a time", "SIGTERM", "remove", "new table"];
    refuse(&[&["version 99", "left alone", path.to_str().unwrap()], &upgrade[..]].concat());

    fs::write(&path, &whole[..whole.len() - 4096]).unwrap();
    refuse(&[&whole.len().to_string(), &(whole.len() - 4096).to_string(), "left alone"]);
    fs::write(&path, &whole[..100]).unwrap();
    refuse(&["not shared memory of hypersync"]);
    fs::write(&path, vec![0xa5; 8192]).unwrap();
    refuse(&["not shared memory of hypersync"]);

    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_says(&refused(&mut member(&lab, &["--shards", "1"])), &[path.to_str().unwrap()]);
    fs::remove_dir(&path).unwrap();
    fs::write(&path, &whole).unwrap();
    // A whole one is replaced.
    lab.start(1, &[2], &["--shards", "1"]);
}

#[test]
fn a_killed_member_can_be_started_again_at_once() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2], &["--shards", "2"]);
    for _ in 0..5 {
        // The kernel lets go of a killed ring's sockets a moment after the process is gone.
        one.kill();
        one = lab.start(1, &[2], &["--shards", "2"]);
    }
}

#[test]
fn a_second_process_on_the_same_memory_is_told_the_first_ones_pid() {
    let lab = Lab::new();
    let mut one = lab.start(1, &[2], &["--shards", "1"]);
    let line = refused(&mut member(&lab, &["--shards", "1"]));
    assert_says(&line, &[&format!("process {}", one.pid()), "--shm"]);
    // Another address makes no difference.
    let mut command = hypersync();
    command.args(lab.words(5, &[2])).arg("--shm").arg(lab.path("m1"));
    assert_says(&refused(&mut command), &[&format!("process {}", one.pid())]);
    assert!(one.is_running());
    assert_eq!(RegionView::open(&one.shm).unwrap().header().pid, one.pid());
    let two = lab.start(2, &[1], &["--shards", "1"]);
    wait_until_ready(&[&one, &two]);
}

#[test]
fn a_memory_lock_limit_that_is_too_small_is_named_with_what_to_do() {
    let lab = Lab::new();
    // SAFETY: geteuid has no arguments, no preconditions and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    // Too little for the ring's queues, and too little for the arena.
    for (limit, needed) in [(64 << 10, "131072"), (1 << 20, "4194304")] {
        let mut command = member(&lab, &["--shards", "1", "--arena", "4194304"]);
        // SAFETY: system calls that may be made between fork and exec; the struct lives on the
        // stack.
        unsafe {
            command.pre_exec(move || {
                let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
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
        let limit = format!("RLIMIT_MEMLOCK is {limit} bytes");
        let line = refused(&mut command);
        assert_says(&line, &[&limit, "bytes needed", "CAP_IPC_LOCK", "ulimit -l"]);
        // Another user's other processes may have used up the rest, so that even less was too much.
        assert!(!root || line.contains(&format!("{needed} bytes needed")), "{line}");
    }
    assert!(RegionView::open(&lab.path("m1")).is_err(), "it never was ready");
}

#[test]
fn io_uring_refused_is_named_with_errno_sysctl_and_kernel() {
    let lab = Lab::new();
    let mut command = member(&lab, &["--shards", "1"]);
    const IO_URING_SETUP: u32 = 425;
    // SAFETY: prctl may be called between fork and exec; the filter and its program live on the
    // stack, and the kernel copies both.
    unsafe {
        command.pre_exec(|| {
            let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
            let mut filter = [
                // The system call's number is the first word.
                step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
                step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, IO_URING_SETUP),
                step(
                    libc::BPF_RET | libc::BPF_K,
                    0,
                    0,
                    libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
                ),
                step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
            ];
            let program =
                libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
            let quiet = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            let set =
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program);
            if quiet != 0 || set != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        })
    };
    let line = refused(&mut command);
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let disabled = format!("kernel.io_uring_disabled={}", disabled.trim());
    assert_says(&line, &["os error 1", &disabled, kernel.trim()]);
    assert!(RegionView::open(&lab.path("m1")).is_err(), "it never was ready");
}

#[test]
fn the_kernel_source_without_cap_net_admin_is_named_with_what_to_do() {
    let lab = Lab::new();
    let own = lab.path("m1");
    fs::create_dir(&own).unwrap();
    fs::set_permissions(&own, PermissionsExt::from_mode(0o700)).unwrap();
    // SAFETY: geteuid has no arguments, no preconditions and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        std::os::unix::fs::chown(&own, Some(65534), Some(65534)).unwrap();
    }
    let mut command = as_nobody(&lab);
    command.args(with(lab.words(1, &[2]), &["--source", "kernel"])).arg("--shm").arg(&own);
    assert_says(&refused(&mut command), &["CAP_NET_ADMIN is missing", "run as root"]);
    assert!(!own.join(FILE).exists(), "what an earlier run left there would have been replaced");
}

#[test]
fn netlink_refused_is_named_with_what_to_do() {
    let lab = Lab::new();
    let ctnetlink = (libc::AF_NETLINK as u32, libc::NETLINK_NETFILTER as u32);
    for (errno, says) in [
        (libc::EPERM, ["Operation not permitted", "seccomp or LSM"]),
        (libc::EPROTONOSUPPORT, ["no ctnetlink", "nf_conntrack_netlink"]),
    ] {
        let mut command = member(&lab, &["--source", "kernel", "--shards", "1"]);
        // SAFETY: as in the test above.
        unsafe {
            command.pre_exec(move || {
                let step =
                    |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
                let load = |offset| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
                let unless =
                    |k, skip| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, k);
                let end = |k| step(libc::BPF_RET | libc::BPF_K, 0, 0, k);
                // The system call's number is the first word; arguments of 8 bytes each begin at
                // byte 16.
                let mut filter = [
                    load(0),
                    unless(libc::SYS_socket as u32, 5),
                    load(16),
                    unless(ctnetlink.0, 3),
                    load(32),
                    unless(ctnetlink.1, 1),
                    end(libc::SECCOMP_RET_ERRNO | errno as u32),
                    end(libc::SECCOMP_RET_ALLOW),
                ];
                let program =
                    libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
                let quiet = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                let set = libc::prctl(
                    libc::PR_SET_SECCOMP,
                    libc::SECCOMP_MODE_FILTER,
                    &raw const program,
                );
                if quiet != 0 || set != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            })
        };
        assert_says(&refused(&mut command), &says);
        let region = lab.path("m1").join(FILE);
        assert!(!region.exists(), "what an earlier run left there would have been replaced");
    }
}
