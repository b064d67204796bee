//! What runs in a gateway: hypersync and keepalived, with the files of the examples.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::member::dies_with_us;
use crate::common::{forced_flags, wait_for};
use crate::topology::Topology;

const KEEPALIVED: &str = include_str!("../../docs/examples/keepalived/keepalived.conf");

/// The processes of both gateways; dropped while a test fails, they tell what they saw.
pub struct Gateways<'a> {
    topology: &'a Topology,
    /// On tmpfs: logs, scripts and shared memory.
    directory: PathBuf,
    hypersync: [Option<Child>; 2],
    keepalived: [Option<Child>; 2],
}

impl<'a> Gateways<'a> {
    /// Nothing runs yet.
    pub fn new(topology: &'a Topology) -> Gateways<'a> {
        let directory = Path::new("/dev/shm").join(&topology.prefix);
        fs::create_dir_all(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
        Gateways { topology, directory, hypersync: [None, None], keepalived: [None, None] }
    }

    /// A script of the examples with these words replaced, which also notes each event.
    pub fn script(&self, number: u8, example: &str, replaced: &[(String, String)]) -> PathBuf {
        let path = self.directory.join(format!("notify{number}"));
        let events = self.directory.join(format!("events{number}"));
        let note = format!("#!/bin/sh\necho \"$1 $2\" >> {}\n", events.display());
        let script = substitute(example, replaced);
        let script = script.strip_prefix("#!/bin/sh\n").expect("the examples are for sh");
        fs::write(&path, note + script).expect("the directory is ours");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("it is our file");
        path
    }

    /// Starts a gateway's hypersync, as docs/GATEWAYS.md does but with shorter times, and waits
    /// until it is ready.
    pub fn start_hypersync(&mut self, number: u8, notify: &Path) {
        let mut command = self.topology.gateway(number).command(env!("CARGO_BIN_EXE_hypersync"));
        command.args(["run", "--group", "7", "--member", &number.to_string()]);
        command.args(["--sync", &format!("10.9.0.{number}"), "--interface", "sync0"]);
        command.args(["--peer", &format!("10.9.0.{}", 3 - number), "--shards", "2"]);
        command.args([
            "--source",
            "kernel",
            "--commit",
            "eager",
            "--capacity",
            "20000",
            "--hold",
            "1s",
        ]);
        command.arg("--shm").arg(self.shm(number)).arg("--notify").arg(notify).args(forced_flags());
        self.hypersync[index(number)] =
            Some(self.spawn(&mut command, &format!("hypersync{number}")));
        wait_for("hypersync is ready", Duration::from_secs(20), || self.check(number) == Some(0));
    }

    /// What the check says of a gateway's hypersync.
    pub fn check(&self, number: u8) -> Option<i32> {
        let mut command =
            self.topology.gateway(number).command(env!("CARGO_BIN_EXE_hypersync-inspect"));
        let output = command.arg("--shm").arg(self.shm(number)).arg("check").output();
        output.expect("the inspector is built").status.code()
    }

    /// Starts a gateway's keepalived with the file of the example, in which only the inspector's
    /// place differs.
    pub fn start_keepalived(&mut self, number: u8) {
        let inspector = env!("CARGO_BIN_EXE_hypersync-inspect");
        let check = format!("{inspector} --shm {} check", self.shm(number).display());
        let text =
            substitute(KEEPALIVED, &[("/usr/bin/hypersync-inspect check".to_owned(), check)]);
        let file = |name: &str| self.directory.join(format!("{name}{number}"));
        fs::write(file("keepalived.conf"), text).expect("the directory is ours");
        let mut command = self.topology.gateway(number).command("keepalived");
        command.args(["--dont-fork", "--log-console", "--log-detail", "--vrrp"]);
        command.arg("--use-file").arg(file("keepalived.conf"));
        command.arg("--pid").arg(file("keepalived.pid")).arg("--vrrp_pid").arg(file("vrrp.pid"));
        self.keepalived[index(number)] =
            Some(self.spawn(&mut command, &format!("keepalived{number}")));
    }

    /// Waits until this gateway has both addresses and the other has neither.
    pub fn wait_until_master(&self, number: u8, why: &str) {
        wait_for(
            &format!("gateway {number} has the addresses: {why}"),
            Duration::from_secs(20),
            || self.topology.has_addresses(number),
        );
    }

    /// Cuts a gateway off and kills what runs there without a warning.
    pub fn power_off(&mut self, number: u8) {
        self.topology.unplug(number);
        self.kill_hypersync(number);
        // First the part of keepalived that speaks VRRP: told by its parent's death, it would say
        // goodbye.
        if let Ok(pid) = fs::read_to_string(self.directory.join(format!("vrrp.pid{number}")))
            && let Ok(pid) = pid.trim().parse()
        {
            signal(pid, libc::SIGKILL);
        }
        end(&mut self.keepalived[index(number)], libc::SIGKILL);
    }

    /// Kills a gateway's hypersync; its kernel goes on forwarding.
    pub fn kill_hypersync(&mut self, number: u8) {
        end(&mut self.hypersync[index(number)], libc::SIGKILL);
    }

    /// Tells a gateway's hypersync to leave, and waits for that.
    pub fn stop_hypersync(&mut self, number: u8) {
        end(&mut self.hypersync[index(number)], libc::SIGTERM);
    }

    /// Whether a gateway's script was called with this event.
    pub fn was_told(&self, number: u8, event: &str) -> bool {
        let events =
            fs::read_to_string(self.directory.join(format!("events{number}"))).unwrap_or_default();
        events.lines().any(|told| told == event)
    }

    fn shm(&self, number: u8) -> PathBuf {
        let shm = self.directory.join(format!("shm{number}"));
        // An appliance makes it for its user alone, and so must we if we are first.
        let _ = fs::create_dir(&shm);
        fs::set_permissions(&shm, PermissionsExt::from_mode(0o700)).expect("it is ours");
        shm
    }

    fn spawn(&self, command: &mut Command, name: &str) -> Child {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.directory.join(format!("{name}.log")));
        let log = log.expect("the directory is ours");
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be cloned"))
            .stderr(log);
        dies_with_us(command).process_group(0).spawn().expect("it is installed")
    }

    fn tell_what_they_saw(&self) {
        for number in [1, 2] {
            println!(
                "--- gateway {number} has the addresses: {}",
                self.topology.has_addresses(number)
            );
            for name in ["hypersync", "keepalived"] {
                let log = fs::read_to_string(self.directory.join(format!("{name}{number}.log")));
                let log = log.unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                println!("--- the last lines of {name} {number}:");
                println!("{}", lines[lines.len().saturating_sub(30)..].join("\n"));
            }
            let entries = self.topology.gateway(number).tcp_entries();
            println!(
                "--- {} entries, the first:\n{}",
                entries.len(),
                entries.first().map_or("", |e| e)
            );
        }
    }
}

impl Drop for Gateways<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell_what_they_saw();
        }
        for place in 0..2 {
            // keepalived ends its other process itself when it is told to.
            end(&mut self.keepalived[place], libc::SIGTERM);
            end(&mut self.hypersync[place], libc::SIGKILL);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn index(number: u8) -> usize {
    usize::from(number) - 1
}

/// The text with every left word replaced by its right one; each must occur.
fn substitute(text: &str, replaced: &[(String, String)]) -> String {
    replaced.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "the example no longer has {from}");
        text.replace(from, to)
    })
}

fn signal(pid: i32, signal: i32) {
    // SAFETY: kill has no memory arguments.
    unsafe { libc::kill(pid, signal) };
}

/// Sends a signal to a child, if there is one, and waits for its end; kills it if that takes too
/// long.
fn end(child: &mut Option<Child>, how: i32) {
    let Some(mut child) = child.take() else { return };
    signal(child.id() as i32, how);
    let start = std::time::Instant::now();
    while matches!(child.try_wait(), Ok(None)) {
        if start.elapsed() > Duration::from_secs(10) {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
