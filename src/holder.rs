#![allow(unsafe_code)]
//! The process that runs here, for the commands that ask something of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitCode;

use crate::shm::{LOCK, RegionView};

/// The process that runs with this directory of the shared memory, and its memory. An error is one
/// line: that there is nothing `to_do`, or why it cannot be told.
pub fn find(dir: &Path, to_do: &str) -> Result<(u32, RegionView), String> {
    let pid = pid(dir, to_do)?;
    // This program speaks to the running one as far as it can read it.
    let region = RegionView::open(dir).map_err(|e| e.to_string())?;
    match region.header().pid == pid {
        true => Ok((pid, region)),
        false => Err(format!("process {pid} is just starting in {}: try again", dir.display())),
    }
}

/// Says how a command went, and tells its exit status.
pub fn tell(outcome: Result<String, String>) -> ExitCode {
    match outcome {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(line) => {
            eprintln!("hypersync: {line}");
            ExitCode::FAILURE
        }
    }
}

/// The process that holds the directory.
fn pid(dir: &Path, to_do: &str) -> Result<u32, String> {
    let path = dir.join(LOCK);
    let nobody =
        || format!("no hypersync runs with --shm {}: there is nothing to {to_do}", dir.display());
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(nobody()),
        other => other.map_err(|e| format!("cannot read {}: {e}", path.display()))?,
    };
    let lock = File::open(&path).map_err(|e| format!("cannot open {}: {e}", path.display()))?;
    // SAFETY: flock has no memory arguments; the descriptor is open, and closing it gives back what
    // was had.
    if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) } == 0 {
        return Err(nobody());
    }
    text.trim().parse().map_err(|_| {
        format!("{} is in use by a process that is just starting: try again", dir.display())
    })
}

/// Sends a signal to the process that [`find`] has named.
pub fn signal(pid: u32, signal: i32) -> Result<(), String> {
    // SAFETY: kill has no memory arguments. The process holds the lock, so the number is its own.
    match unsafe { libc::kill(pid as i32, signal) } {
        0 => Ok(()),
        _ => Err(format!("cannot signal process {pid}: {}", io::Error::last_os_error())),
    }
}

/// Whether a process has ended, also if nobody has taken note of it yet.
pub fn is_gone(pid: u32) -> bool {
    // "7 (name) Z ...": the name may have anything in it but ends at the last bracket.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| {
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['Z', 'X']))
    })
}
