//! Members as processes: `hypersync run --source ring` on loopback addresses or in namespaces, with
//! what an operator would put around each: a log, and a notify script that writes events down.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hypersync::counters::{Counter, Counters};
use hypersync::group::view::Status;
use hypersync::shm::RegionView;
use hypersync::shm::ingest::Producers;

use super::namespace::{remove_stale, unique_prefix};
use super::{forced_flags, wait_for};

/// How long anything may take that needs no more than a few heartbeats. A busy machine is slow.
pub const SOON: Duration = Duration::from_secs(20);

/// Where one test's members live: a directory on tmpfs and, unless they live in namespaces, a /24
/// of loopback addresses that no other test uses.
///
/// Only one exists at a time in a test program: the tests measure time, and what all processes of
/// one user may lock in memory is 8 MB on many systems.
pub struct Lab {
    root: PathBuf,
    net: (u8, u8),
    _turn: MutexGuard<'static, ()>,
}

impl Lab {
    /// A place of its own for the test that calls this.
    pub fn new() -> Lab {
        static NETS: AtomicU8 = AtomicU8::new(1);
        static TURN: Mutex<()> = Mutex::new(());
        // A test that failed has told so itself.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        remove_stale();
        let root = Path::new("/dev/shm").join(unique_prefix());
        fs::create_dir_all(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).expect("it is ours");
        // Test programs that run at the same time differ in their process, tests of one in the
        // counter.
        let net = (64 + (std::process::id() % 128) as u8, NETS.fetch_add(1, Ordering::Relaxed));
        Lab { root, net, _turn: turn }
    }

    /// The loopback address that ends in this number.
    pub fn address(&self, last: u8) -> IpAddr {
        IpAddr::from([127, self.net.0, self.net.1, last])
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// What a member on loopback is called with: small, quick, and with these others as its peers.
    pub fn words(&self, member: u8, others: &[u8]) -> Vec<String> {
        let mut words = words(member, self.address(member));
        for other in others {
            words.extend(["--peer".to_owned(), self.address(*other).to_string()]);
        }
        words
    }

    /// Starts a member on loopback and waits until its memory can be read.
    pub fn start(&self, member: u8, others: &[u8], extra: &[&str]) -> Member {
        let words = with(self.words(member, others), extra);
        Member::start(self, &format!("m{member}"), member, hypersync(), &words)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// The appliance's program.
pub fn hypersync() -> Command {
    Command::new(env!("CARGO_BIN_EXE_hypersync"))
}

/// What every member of these tests is called with.
pub fn words(member: u8, sync: IpAddr) -> Vec<String> {
    let (member, sync) = (member.to_string(), sync.to_string());
    let mut words: Vec<String> = ["run", "--group", "7", "--member", &member, "--sync", &sync]
        .into_iter()
        .chain(["--source", "ring", "--capacity", "20000", "--arena", "524288", "--ring", "4096"])
        .chain([
            "--hold",
            "100ms",
            "--heartbeat",
            "100ms",
            "--dead-after",
            "5",
            "--reprotect-after",
            "300ms",
        ])
        .map(str::to_owned)
        .collect();
    words.extend(forced_flags());
    words
}

/// The words with these flags and values, in place of those that were there.
pub fn with(mut words: Vec<String>, extra: &[&str]) -> Vec<String> {
    for pair in extra.chunks(2) {
        let &[flag, value] = pair else { panic!("{pair:?} is no flag with its value") };
        match words.iter().position(|word| word == flag) {
            Some(at) if flag != "--peer" => words[at + 1] = value.to_owned(),
            _ => words.extend([flag.to_owned(), value.to_owned()]),
        }
    }
    words
}

/// Makes a child die with the thread that started it, so that none outlives a killed test.
pub fn dies_with_us(command: &mut Command) -> &mut Command {
    // SAFETY: prctl(PR_SET_PDEATHSIG) is one system call without pointers, allowed between fork and
    // exec.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    }
}

/// A running member; dropped while a test fails, it tells what it saw.
pub struct Member {
    /// Its number.
    pub id: u8,
    /// Its shared memory.
    pub shm: PathBuf,
    log: PathBuf,
    events: PathBuf,
    child: Child,
    view: RegionView,
}

impl Member {
    /// Runs `command` with these words and a notify script. `name` names its files; `words` hold
    /// the rest.
    pub fn start(lab: &Lab, name: &str, id: u8, mut command: Command, words: &[String]) -> Member {
        let (shm, log, events) =
            (lab.path(name), lab.path(&format!("{name}.log")), lab.path(&format!("{name}.events")));
        let script = lab.path(&format!("{name}.notify"));
        let text = format!("#!/bin/sh\necho \"$1 $2\" >> {}\n", events.display());
        fs::write(&script, text).expect("the directory is ours");
        fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).expect("it is our file");
        let out =
            File::options().create(true).append(true).open(&log).expect("the directory is ours");
        command.args(words).arg("--shm").arg(&shm).arg("--notify").arg(&script);
        command
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a file can be cloned"))
            .stderr(out);
        let mut child = dies_with_us(&mut command).spawn().expect("the program is built");
        let mut view = None;
        let start = Instant::now();
        while view.is_none() {
            // A killed one may have left its region: that is another process's.
            view = RegionView::open(&shm).ok().filter(|view| view.header().pid == child.id());
            let ended = child.try_wait().expect("a child can be asked");
            let said = || fs::read_to_string(&log).unwrap_or_default();
            assert!(ended.is_none(), "member {id} ended at its start with {ended:?}: {}", said());
            assert!(start.elapsed() < SOON, "member {id} never became ready: {}", said());
            std::thread::sleep(Duration::from_millis(5));
        }
        Member { id, shm, log, events, child, view: view.expect("that ended the loop") }
    }

    /// Its memory.
    pub fn view(&self) -> &RegionView {
        &self.view
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A counter, added up over the shards.
    pub fn counter(&self, counter: Counter) -> u64 {
        let shards = self.view.header().sizes.shards;
        (0..shards).map(|shard| Counters::new(self.view.shard(shard).counters).get(counter)).sum()
    }

    /// Where another member stands, as this one sees it.
    pub fn sees(&self, other: u8) -> Status {
        // A record that is being written is read a moment later.
        (0..1000)
            .find_map(|_| self.view.group().read(other))
            .expect("records are torn only for a moment")
            .status
    }

    /// The ends of its rings, of which there can be only one at a time.
    pub fn producers(&self) -> Producers {
        Producers::open(&self.shm).unwrap_or_else(|e| panic!("member {}: {e}", self.id))
    }

    /// What its notify script was called with, such as `member-dead 1`.
    pub fn events(&self) -> Vec<String> {
        fs::read_to_string(&self.events).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// Whether its notify script was called with this.
    pub fn was_told(&self, event: &str) -> bool {
        self.events().iter().any(|told| told == event)
    }

    /// Exit status and line of `hypersync-inspect check`.
    pub fn check(&self) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypersync-inspect"));
        let output = command
            .arg("--shm")
            .arg(&self.shm)
            .arg("check")
            .output()
            .expect("the inspector is built");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What it wrote to standard error (and output).
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_none()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: kill has no memory arguments; the child was not waited for, so the number is
        // still its own.
        let result = unsafe { libc::kill(self.child.id() as i32, signal) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    /// Kills it without a warning.
    pub fn kill(&mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it was killed");
    }

    /// Waits for its end.
    pub fn end(&mut self, limit: Duration) -> ExitStatus {
        let (mut status, id) = (None, self.id);
        wait_for(&format!("member {id} ends"), limit, || {
            status = self.child.try_wait().expect("a child can be asked");
            status.is_some()
        });
        status.expect("that was waited for")
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            println!("--- the last lines of member {}:", self.id);
            println!("{}", lines[lines.len().saturating_sub(20)..].join("\n"));
            println!("--- its events: {:?}", self.events());
            for info in hypersync::counters::COUNTERS {
                match self.counter(info.counter) {
                    0 => {}
                    n => print!("{}={n} ", info.name),
                }
            }
            println!();
        }
    }
}

/// Waits until each of these members can use each other one as a backup.
pub fn wait_until_ready(members: &[&Member]) {
    let ids: Vec<u8> = members.iter().map(|member| member.id).collect();
    wait_for(&format!("members {ids:?} are ready"), SOON, || {
        members.iter().all(|member| {
            let others = || ids.iter().filter(|id| **id != member.id);
            member.was_told(&format!("self-ready {}", member.id))
                && others().all(|other| member.sees(*other) == Status::Ready)
        })
    });
}
