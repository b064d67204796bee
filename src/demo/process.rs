//! Processes and their directory: nothing of a demo outlives it.
//!
//! Each appliance is a child with a handle, which is killed when the handle is dropped; a child
//! whose parent dies in any other way is killed by the kernel (PR_SET_PDEATHSIG). The directory is
//! fresh, private, and removed when dropped.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::conn::MemberId;
use crate::shm::{RegionView, ShmError};

/// A directory in /dev/shm that nobody else can look into.
pub struct Directory {
    path: PathBuf,
    keep: bool,
}

impl Directory {
    /// Makes a fresh one, which stays behind if `keep`.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(keep: bool) -> io::Result<Directory> {
        for n in 0.. {
            let path = PathBuf::from(format!("/dev/shm/hypersync-demo-{}-{n}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Directory { path, keep }),
                // A demo that was killed had our process id once.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && n < 1000 => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// How an appliance is started.
pub struct Start<'a> {
    /// Which member.
    pub member: MemberId,
    /// Its shards.
    pub shards: u8,
    /// Connections that it has room for.
    pub capacity: usize,
    /// Below this its directory is made.
    pub dir: &'a Path,
    /// Further options.
    pub more: &'a [String],
}

/// An appliance that runs as a child.
pub struct Appliance {
    /// Which member.
    pub member: MemberId,
    /// Its shared memory.
    pub shm: PathBuf,
    log: PathBuf,
    child: Child,
}

impl Appliance {
    /// Starts one.
    ///
    /// # Errors
    /// The system refuses.
    pub fn start(start: &Start<'_>) -> io::Result<Appliance> {
        let member = start.member;
        let shm = start.dir.join(format!("member-{member}"));
        let log = start.dir.join(format!("member-{member}.log"));
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["run", "--group", "7", "--source", "ring", "--commit", "off", "--hold", "3s"]);
        command.args(["--heartbeat", "100ms", "--dead-after", "3", "--reprotect-after", "2s"]);
        command.args(["--priority", "100", "--arena", "524288"]);
        command.args(["--member", &member.to_string(), "--sync", &format!("127.0.0.{member}")]);
        for peer in super::MEMBERS.iter().filter(|peer| **peer != member) {
            command.args(["--peer", &format!("127.0.0.{peer}")]);
        }
        command.args([
            "--shards",
            &start.shards.to_string(),
            "--capacity",
            &start.capacity.to_string(),
        ]);
        command.arg("--shm").arg(&shm).args(start.more);
        // A group of its own: Ctrl-C is for the demo, which then ends its children itself.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .process_group(0);
        let parent = std::process::id();
        let follow = move || {
            // SAFETY: prctl with these arguments and getppid touch no memory and are
            // async-signal-safe.
            let parent_now = unsafe {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                libc::getppid()
            };
            // It may have died before the call.
            if parent_now as u32 == parent {
                Ok(())
            } else {
                Err(io::ErrorKind::Interrupted.into())
            }
        };
        // SAFETY: the closure runs between fork and exec and only makes the two calls above; it
        // allocates nothing and takes no lock (an error is made of a number).
        unsafe { command.pre_exec(follow) };
        Ok(Appliance { member, shm, log, child: command.spawn()? })
    }

    /// Its memory, once it is ready; `None` while it starts.
    ///
    /// # Errors
    /// What its memory has is not to be read.
    pub fn try_view(&self) -> Result<Option<RegionView>, ShmError> {
        match RegionView::open(&self.shm) {
            Ok(view) => Ok(Some(view)),
            Err(ShmError::Missing(_) | ShmError::NotReady(_) | ShmError::Abandoned { .. }) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether it ended by itself, and with what last words.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let words =
            log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        Some(format!("member {} ended with {status}: {words}", self.member))
    }

    /// What it warned of, for finding out why something does not hold.
    pub fn warnings(&self) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines = log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR"));
        lines.map(|line| format!("member {}: {line}", self.member)).collect()
    }

    /// Kills it with SIGKILL. It is gone afterwards, but for what [`reap`](Appliance::reap) does.
    ///
    /// # Errors
    /// It was gone before.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()
    }

    /// Waits for its end after a kill: nothing is written to its memory any more.
    ///
    /// # Errors
    /// The system refuses.
    pub fn reap(&mut self) -> io::Result<()> {
        self.child.wait().map(drop)
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
