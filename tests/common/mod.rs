//! What the tests that run whole processes share: waiting for a condition, asking whether this
//! user may make network namespaces, and the modes that `tests/run` forces through the environment.

// Every test program compiles its own copy of this module, and not each needs all of it.
#![allow(dead_code)]

pub mod copies;
pub mod member;
pub mod namespace;

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

/// Waits until `condition` holds; fails the test, saying `what` never came, once `limit` has
/// passed.
pub fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether this process may make network namespaces. If not, the test says in one line what it
/// leaves out and passes, except under `CI=true`, where nothing may be skipped unseen.
pub fn may_make_namespaces(left_out: &str) -> bool {
    // SAFETY: geteuid has no arguments, no preconditions and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must run as root: {left_out}");
        println!("left out, needs root for network namespaces: {left_out}");
    }
    root
}

/// Flags for the appliance that `tests/run` asks for, so that the same tests run once with every
/// send opcode forced (`HYPERSYNC_SEND`) and once without optional kernel features
/// (`HYPERSYNC_FEATURES`).
pub fn forced_flags() -> Vec<String> {
    let mut flags = Vec::new();
    for (variable, flag) in [("HYPERSYNC_SEND", "--send"), ("HYPERSYNC_FEATURES", "--features")] {
        if let Some(value) = std::env::var(variable).ok().filter(|value| !value.is_empty()) {
            flags.extend([flag.to_owned(), value]);
        }
    }
    flags
}

/// Runs a tool to its end and returns what it printed; fails the test if the tool fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} failed with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A UDP socket at an address that a member may have had: the kernel gives it back a moment after a
/// process with io_uring was killed.
pub fn bind(address: SocketAddr) -> UdpSocket {
    let mut socket = None;
    wait_for(&format!("{address} is free"), Duration::from_secs(5), || {
        socket = UdpSocket::bind(address).ok();
        socket.is_some()
    });
    socket.expect("that was waited for")
}
