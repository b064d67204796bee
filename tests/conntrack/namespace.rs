//! Network namespaces for tests: they come with the test and go with it, however it ends.

use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Runs `test` in a network namespace of its own, on a thread of its own. Without root it
/// says what is left out instead.
pub fn in_namespace(what: &str, test: impl FnOnce() + Send) {
    // SAFETY: no arguments, no memory.
    if unsafe { libc::geteuid() } != 0 {
        let line = format!("left out, for it needs root: {what}\n"); // in one piece
        eprint!("{line}");
        return;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: no memory is involved; only this thread moves.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "unshare: {what}");
            run("ip link set lo up");
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Runs a shell command in the namespace of the calling thread and returns what it printed.
pub fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().expect("a shell");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Repeats `attempt` until it yields something; fails after [`DEADLINE`].
pub fn wait_for<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < end, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A host: a namespace that lives as long as a `cat` that waits for the end of its input,
/// which comes when this value is dropped or the test process dies.
pub struct Host(Child);

impl Host {
    pub fn new() -> Host {
        let cat = Command::new("unshare")
            .args(["-n", "cat"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("unshare");
        let host = Host(cat);
        let own = std::fs::read_link("/proc/thread-self/ns/net").expect("a namespace");
        wait_for("a new namespace", || {
            (std::fs::read_link(host.path()).ok()? != own).then_some(())
        });
        host
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    /// Joins this host to the calling thread's namespace: `near` there with `near_address`,
    /// `eth0` here with `address`.
    pub fn link(&self, near: &str, near_address: &str, address: &str) {
        let pid = self.0.id();
        run(&format!(
            "ip link add {near} type veth peer name eth0 netns {pid}; ip addr add {near_address}/24 dev {near}
             ip link set {near} up"
        ));
        self.inside(|| {
            run(&format!(
                "ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up"
            ))
        });
    }

    /// Runs `f` on a thread in this host. Sockets made there stay there.
    pub fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(self.path()).expect("the host lives");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: no memory is involved; only this thread moves.
                assert_eq!(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
                f()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub fn listen(&self, address: &str) -> TcpListener {
        self.inside(|| TcpListener::bind(address).expect("to listen"))
    }

    pub fn connect(&self, address: &str) -> TcpStream {
        let address: SocketAddr = address.parse().expect("an address");
        self.inside(|| TcpStream::connect_timeout(&address, DEADLINE).expect("to connect"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
