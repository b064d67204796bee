//! `hypersync run` in a gateway's namespace, with what an operator would put around it: a notify
//! script that moves the routes, and a log.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::common::{forced_flags, wait_for};
use crate::topology::Topology;

/// How the members of the group find each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Discovery {
    /// One multicast group.
    Multicast,
    /// A list of unicast peers.
    Peers,
}

/// The running appliances of both gateways; dropped while a test fails, they tell what they saw.
pub struct Appliances<'a> {
    topology: &'a Topology,
    directory: PathBuf,
    memory: PathBuf,
    children: [Child; 2],
}

impl<'a> Appliances<'a> {
    /// Starts one appliance in each gateway, with these numbers of shards.
    pub fn start(topology: &'a Topology, discovery: Discovery, shards: [u8; 2]) -> Appliances<'a> {
        let directory = std::env::temp_dir().join(&topology.prefix);
        let memory = Path::new("/dev/shm").join(&topology.prefix);
        let children = [1, 2].map(|member| {
            let shared_memory = memory.join(format!("gw{member}"));
            for needed in [&directory, &shared_memory] {
                std::fs::create_dir_all(needed).unwrap_or_else(|e| panic!("{}: {e}", needed.display()));
            }
            let notify = write_notify_script(topology, &directory, member);
            let log = File::create(log_of(&directory, member)).expect("the directory was just made");
            let mut command = topology.gateway(member).command(env!("CARGO_BIN_EXE_hypersync"));
            command.args(["run", "--group", "7", "--member", &member.to_string()]);
            command.args(["--sync", &format!("10.9.0.{member}"), "--interface", "sy0"]);
            match discovery {
                Discovery::Multicast => command.args(["--multicast", "224.0.0.116"]),
                Discovery::Peers => command.args(["--peer", &format!("10.9.0.{}", 3 - member)]),
            };
            command.args(["--shards", &shards[usize::from(member) - 1].to_string()]);
            command.args(["--source", "kernel", "--commit", "eager", "--capacity", "20000"]);
            command.args(["--hold", "1s", "--heartbeat", "100ms", "--dead-after", "3"]);
            command.args(["--reprotect-after", "2s", "--priority", "100"]);
            command.arg("--shm").arg(shared_memory).arg("--notify").arg(notify).args(forced_flags());
            command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file can be cloned")).stderr(log);
            // SAFETY: prctl(PR_SET_PDEATHSIG) is one system call without pointers, allowed between
            // fork and exec. It covers a test that is killed before it can stop its children.
            unsafe {
                command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                })
            };
            command.spawn().expect("iproute2 is installed")
        });
        Appliances { topology, directory, memory, children }
    }

    /// Waits for a condition, and fails early if an appliance ends meanwhile.
    pub fn wait_for(&mut self, what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
        wait_for(what, limit, || {
            for member in [1, 2] {
                assert!(
                    self.is_running(member),
                    "appliance {member} ended while this was waited for: {what}"
                );
            }
            condition()
        });
    }

    /// Whether an appliance's process has not ended.
    pub fn is_running(&mut self, member: u8) -> bool {
        let child = &mut self.children[usize::from(member) - 1];
        child.try_wait().expect("a child can be asked for its status").is_none()
    }

    /// Kills one appliance without a warning and unplugs its gateway at the same moment.
    pub fn power_off(&mut self, member: u8) {
        let child = &mut self.children[usize::from(member) - 1];
        child.kill().expect("it was running");
        self.topology.unplug(member);
        child.wait().expect("it was killed");
    }

    /// The events that a gateway's notify script was called with, such as `member-dead 1`.
    fn events(&self, member: u8) -> Vec<String> {
        let events = std::fs::read_to_string(events_of(&self.directory, member)).unwrap_or_default();
        events.lines().map(str::to_owned).collect()
    }

    /// Whether a gateway's notify script was told that the other member is dead.
    pub fn is_told_dead(&self, member: u8, dead: u8) -> bool {
        self.events(member).iter().any(|event| *event == format!("member-dead {dead}"))
    }

    fn tell_what_they_saw(&self) {
        for member in [1, 2] {
            let log = std::fs::read_to_string(log_of(&self.directory, member)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            println!("--- the last lines of appliance {member}:");
            println!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
            println!("--- its events: {:?}", self.events(member));
            let entries = self.topology.gateway(member).command("conntrack").arg("-L").output();
            let entries =
                entries.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
            let some: Vec<&str> = entries.lines().take(20).collect();
            println!("--- {} of {} entries of gateway {member}:", some.len(), entries.lines().count());
            println!("{}", some.join("\n"));
        }
    }
}

impl Drop for Appliances<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell_what_they_saw();
        }
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
        let _ = std::fs::remove_dir_all(&self.memory);
    }
}

/// The survivor's script: it notes each event, and once the dead member's copies can carry
/// traffic it moves the routes.
fn write_notify_script(topology: &Topology, directory: &Path, member: u8) -> PathBuf {
    let path = directory.join(format!("notify{member}"));
    let script = format!(
        "#!/bin/sh\nset -e\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
         if [ \"$1\" = member-dead ]; then\n{}fi\necho \"$1 $2\" >> {}\n",
        topology.move_routes_script(member),
        events_of(directory, member).display()
    );
    std::fs::write(&path, script).expect("the directory was just made");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("it is our file");
    path
}

fn log_of(directory: &Path, member: u8) -> PathBuf {
    directory.join(format!("log{member}"))
}

fn events_of(directory: &Path, member: u8) -> PathBuf {
    directory.join(format!("events{member}"))
}
