//! `hypersync run` in a gateway's namespace, with what an operator would put around it: a notify
//! script that moves the routes, and a log.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use hypersync::counters::{Counter, Counters};
use hypersync::shm::RegionView;

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

/// Priorities of gateways 1, 2 and 3: the next in turn is the backup, and gets the traffic.
const PRIORITIES: [u8; 3] = [150, 120, 100];

/// The running appliances of all gateways; dropped while a test fails, they tell what they saw.
pub struct Appliances<'a> {
    topology: &'a Topology,
    directory: PathBuf,
    memory: PathBuf,
    /// By gateway; none where it was powered off.
    children: Vec<Option<Child>>,
}

impl<'a> Appliances<'a> {
    /// Starts one appliance in each gateway, with these numbers of shards.
    pub fn start(topology: &'a Topology, discovery: Discovery, shards: &[u8]) -> Appliances<'a> {
        Appliances::start_with(topology, discovery, shards, &[])
    }

    /// The same with further flags.
    pub fn start_with(
        topology: &'a Topology,
        discovery: Discovery,
        shards: &[u8],
        extra: &[&str],
    ) -> Appliances<'a> {
        assert_eq!(shards.len(), topology.gateways.len(), "a number of shards for each gateway");
        let directory = std::env::temp_dir().join(&topology.prefix);
        let memory = Path::new("/dev/shm").join(&topology.prefix);
        let children = topology.members().map(|member| {
            let place = usize::from(member) - 1;
            let shared_memory = memory.join(format!("gw{member}"));
            for needed in [&directory, &shared_memory] {
                std::fs::create_dir_all(needed)
                    .unwrap_or_else(|e| panic!("{}: {e}", needed.display()));
            }
            let notify = write_notify_script(topology, &directory, member);
            let log =
                File::create(log_of(&directory, member)).expect("the directory was just made");
            let mut command = topology.gateway(member).command(env!("CARGO_BIN_EXE_hypersync"));
            command.args(["run", "--group", "7", "--member", &member.to_string()]);
            command.args(["--sync", &format!("10.9.0.{member}"), "--interface", "sy0"]);
            match discovery {
                Discovery::Multicast => command.args(["--multicast", "224.0.0.116"]),
                Discovery::Peers => {
                    let others = topology.members().filter(|other| *other != member);
                    command
                        .args(others.flat_map(|other| ["--peer".into(), format!("10.9.0.{other}")]))
                }
            };
            command.args(["--shards", &shards[place].to_string()]);
            command.args(["--source", "kernel", "--commit", "eager", "--capacity", "20000"]);
            command.args(["--hold", "1s", "--heartbeat", "100ms", "--dead-after", "3"]);
            command.args(["--reprotect-after", "2s", "--priority", &PRIORITIES[place].to_string()]);
            command
                .arg("--shm")
                .arg(shared_memory)
                .arg("--notify")
                .arg(notify)
                .args(forced_flags());
            command.args(extra);
            command
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("a file can be cloned"))
                .stderr(log);
            // SAFETY: prctl(PR_SET_PDEATHSIG) is one system call without pointers, allowed between
            // fork and exec. It covers a test that is killed before it can stop its children.
            unsafe {
                command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                })
            };
            Some(command.spawn().expect("iproute2 is installed"))
        });
        Appliances { children: children.collect(), topology, directory, memory }
    }

    /// Waits for a condition, and fails early if an appliance ends meanwhile.
    pub fn wait_for(&mut self, what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
        wait_for(what, limit, || {
            self.assert_running(what);
            condition()
        });
    }

    /// Waits until every appliance has found the others and can be a backup.
    pub fn wait_until_ready(&mut self) {
        let topology = self.topology;
        wait_for("every appliance is ready", Duration::from_secs(20), || {
            topology
                .members()
                .all(|member| self.events(member).contains(&format!("self-ready {member}")))
        });
        self.assert_running("all are ready");
    }

    /// Fails the test if an appliance has ended that was not powered off.
    pub fn assert_running(&mut self, what: &str) {
        for (member, child) in self.topology.members().zip(&mut self.children) {
            let Some(child) = child else { continue };
            let ended = child.try_wait().expect("a child can be asked for its status");
            assert_eq!(ended, None, "appliance {member} ended: {what}");
        }
    }

    /// A counter of an appliance, over all its shards.
    pub fn counter(&self, member: u8, counter: Counter) -> u64 {
        let view =
            RegionView::open(&self.memory.join(format!("gw{member}"))).expect("it is running");
        let shards = view.header().sizes.shards;
        (0..shards).map(|shard| Counters::new(view.shard(shard).counters).get(counter)).sum()
    }

    /// Sends a signal to one appliance, such as SIGSTOP: its gateway's kernel forwards on without
    /// it.
    pub fn signal(&self, member: u8, signal: i32) {
        // SAFETY: numbers only; the child is ours, and was not waited for.
        assert_eq!(unsafe { libc::kill(self.pid(member) as i32, signal) }, 0, "the appliance runs");
    }

    /// The processor time that an appliance has taken so far, with all its threads.
    pub fn processor_time(&self, member: u8) -> Duration {
        let threads =
            std::fs::read_dir(format!("/proc/{}/task", self.pid(member))).expect("it runs");
        let taken = threads.map(|thread| {
            let path = thread.expect("it runs").path().join("schedstat");
            let line = std::fs::read_to_string(&path).expect("the kernel counts");
            line.split_whitespace()
                .next()
                .and_then(|n| n.parse::<u64>().ok())
                .expect("nanoseconds come first")
        });
        Duration::from_nanos(taken.sum())
    }

    fn pid(&self, member: u8) -> u32 {
        self.children[usize::from(member) - 1].as_ref().expect("it was not powered off").id()
    }

    /// Tells one appliance to end by `hypersync drain`, and returns whether nothing was left
    /// exposed, and what it said.
    pub fn drain(&mut self, member: u8) -> (bool, String) {
        let mut child =
            self.children[usize::from(member) - 1].take().expect("it was not powered off before");
        let mut command = self.topology.gateway(member).command(env!("CARGO_BIN_EXE_hypersync"));
        command.arg("drain").arg("--shm").arg(self.memory.join(format!("gw{member}")));
        let output = command.output().expect("iproute2 is installed");
        child.wait().expect("it was told to end");
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).trim().to_owned())
    }

    /// Kills one appliance without a warning and unplugs its gateway at the same moment.
    pub fn power_off(&mut self, member: u8) {
        let mut child =
            self.children[usize::from(member) - 1].take().expect("it was not powered off before");
        child.kill().expect("it was running");
        self.topology.unplug(member);
        child.wait().expect("it was killed");
    }

    /// Waits until a gateway's notify script has been told of a death and has moved the routes.
    pub fn wait_until_told_dead(&mut self, member: u8, dead: u8) {
        let what = format!("gateway {member} tells of the death of {dead}, its copies ready");
        wait_for(&what, Duration::from_secs(10), || self.is_told_dead(member, dead));
        self.assert_running("a survivor survives");
    }

    /// The events that a gateway's notify script was called with, such as `member-dead 1`.
    fn events(&self, member: u8) -> Vec<String> {
        let events =
            std::fs::read_to_string(events_of(&self.directory, member)).unwrap_or_default();
        events.lines().map(str::to_owned).collect()
    }

    /// Whether a gateway's notify script was told that the other member is dead.
    pub fn is_told_dead(&self, member: u8, dead: u8) -> bool {
        self.deaths_told(member, dead) > 0
    }

    /// How many times it was.
    pub fn deaths_told(&self, member: u8, dead: u8) -> usize {
        self.events(member).iter().filter(|event| **event == format!("member-dead {dead}")).count()
    }

    fn tell_what_they_saw(&self) {
        for member in self.topology.members() {
            let log = std::fs::read_to_string(log_of(&self.directory, member)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            println!("--- the last lines of appliance {member}:");
            println!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
            println!("--- its events: {:?}", self.events(member));
            let entries = self.topology.gateway(member).command("conntrack").arg("-L").output();
            let entries = entries
                .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
                .unwrap_or_default();
            let some: Vec<&str> = entries.lines().take(20).collect();
            println!(
                "--- {} of {} entries of gateway {member}:",
                some.len(),
                entries.lines().count()
            );
            println!("{}", some.join("\n"));
        }
    }
}

impl Drop for Appliances<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell_what_they_saw();
        }
        for child in self.children.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
        let _ = std::fs::remove_dir_all(&self.memory);
    }
}

/// A gateway's script: it notes each event, and once its copies of the gateway before it, which
/// died, can carry traffic, or once that one leaves, it moves the routes.
fn write_notify_script(topology: &Topology, directory: &Path, member: u8) -> PathBuf {
    let path = directory.join(format!("notify{member}"));
    let script = format!(
        "#!/bin/sh\nset -e\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
         case \"$1 $2\" in \"member-dead {0}\" | \"member-leaving {0}\" | \"member-left {0}\")\n{1};; esac\necho \"$1 $2\" >> {2}\n",
        member - 1,
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
