//! Network namespaces that go away again: named after this process, deleted when dropped, and
//! those of test runs that were killed are deleted at the next start.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Everything that these tests leave in the system for a while is called `hstest-PID-RUN...`.
const PREFIX: &str = "hstest-";

/// A prefix that no other test run uses, this process's earlier ones included.
pub fn unique_prefix() -> String {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    format!("{PREFIX}{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed))
}

/// A named network namespace.
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes the namespace `PREFIX-PLACE` and raises its loopback interface.
    pub fn new(prefix: &str, place: &str) -> Namespace {
        let name = format!("{prefix}-{place}");
        super::run(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Namespace { name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run inside. `ip netns exec` becomes the program, so its pid is the
    /// child's.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Gives lines of `ip` commands to one `ip` process that works on this namespace.
    pub fn ip(&self, lines: &str) {
        feed(Command::new("ip").args(["-n", &self.name, "-batch", "-"]), lines);
    }

    /// Loads an nftables ruleset.
    pub fn nft(&self, ruleset: &str) {
        feed(self.command("nft").args(["-f", "-"]), ruleset);
    }

    /// Sets a sysctl, named by its path below /proc/sys.
    pub fn sysctl(&self, path: &str, value: &str) {
        let path = Path::new("/proc/sys").join(path);
        self.inside(|| {
            std::fs::write(&path, value)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        });
    }

    /// What `conntrack -L -p tcp` lists, a line an entry.
    pub fn tcp_entries(&self) -> Vec<String> {
        let list = super::run(self.command("conntrack").args(["-L", "-p", "tcp"]));
        list.lines().map(str::to_owned).collect()
    }

    /// Calls `work` on a thread of this namespace. A socket stays where it was made, so what comes
    /// back may be used on any thread.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let place = Path::new("/run/netns").join(&self.name);
        let file =
            std::fs::File::open(&place).unwrap_or_else(|e| panic!("{}: {e}", place.display()));
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                // SAFETY: setns reads only its arguments; the descriptor is open until `file` is
                // dropped, and only this thread, which ends here, changes its namespace.
                let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(result, 0, "setns: {}", std::io::Error::last_os_error());
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Two hosts on one link, `sy0`, as 10.9.0.1 and .2, fd00::1 and ::2.
pub fn two_hosts() -> [Namespace; 2] {
    let prefix = unique_prefix();
    let hosts = [1, 2].map(|n| Namespace::new(&prefix, &format!("host{n}")));
    hosts[0].ip(&format!("link add sy0 type veth peer name sy0 netns {}", hosts[1].name()));
    for (host, n) in hosts.iter().zip(1..) {
        host.ip(&format!(
            "address add 10.9.0.{n}/24 dev sy0\naddress add fd00::{n}/64 dev sy0 nodad\nlink set sy0 up"
        ));
    }
    hosts
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// Deletes what test runs that were killed have left: namespaces and directories named after
/// processes that no longer exist.
pub fn remove_stale() {
    let is_stale = |name: &str| {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
    };
    let names = |directory: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter(|e| e.file_name().to_str().is_some_and(is_stale)).map(|e| e.path()).collect()
    };
    for namespace in names(Path::new("/run/netns")) {
        let name = namespace.file_name().unwrap_or_default();
        let _ = Command::new("ip").args(["netns", "del"]).arg(name).output();
    }
    for directory in names(&std::env::temp_dir()).into_iter().chain(names(Path::new("/dev/shm"))) {
        let _ = std::fs::remove_dir_all(directory);
    }
}

/// Runs a command with `input` on its stdin; fails the test if the command fails.
fn feed(command: &mut Command, input: &str) {
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child =
        command.spawn().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("stdin was asked for");
    stdin
        .write_all(input.as_bytes())
        .unwrap_or_else(|error| panic!("{command:?} does not read: {error}"));
    drop(stdin);
    let output = child.wait_with_output().expect("a child can be waited for once");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} refused its input: {complaint}\n{input}");
}
