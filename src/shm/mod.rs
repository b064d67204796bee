//! Shared memory: the one file in which everything lies that others read or that outlives
//! the process.
//!
//! ```text
//!  DIR/hypersync.shm    header | group table | shard 0: slots .. counters, ring | shard 1 | ..
//!  DIR/hypersync.lock   held (flock) by the appliance, with its pid inside
//! ```
//!
//! Reading order: [`layout`] (where what lies), [`mapping`] (the one cast from bytes to atomics),
//! [`region`] (the appliance's side), [`view`] (the reader's side), [`group`] (the table that shard
//! 0 publishes), [`ingest`] (the ring source), [`old_values`] (sysctls to be put back).
//!
//! Everything is a slice of atomics, whoever looks: no reader can make a writer wait, and no
//! writer can make a reader's program undefined. Who may open the file may read and write all
//! of it, so it belongs to one user (0600, in a directory that the world cannot write to).

pub mod group;
pub mod ingest;
pub mod layout;
pub mod mapping;
pub mod old_values;
pub mod region;
pub mod view;

use std::io;
use std::path::{Path, PathBuf};

pub use layout::{Header, Sizes};
pub use old_values::OldValues;
pub use region::{Fresh, Location, Region, RegionConfig, ask_back_within};
pub use view::RegionView;

/// Name of the region's file in its directory.
pub const FILE: &str = "hypersync.shm";

/// Name of the lock file beside it.
pub const LOCK: &str = "hypersync.lock";

/// Why shared memory could not be created or opened. Each reads as one line that says what to do.
#[derive(Debug)]
pub enum ShmError {
    /// A call failed.
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Another appliance runs with this directory.
    Held {
        /// The directory.
        dir: PathBuf,
        /// Its process, if it has said so yet.
        pid: Option<u32>,
    },
    /// Everybody may write to the directory.
    Public(PathBuf),
    /// There is no region.
    Missing(PathBuf),
    /// The file is not a hypersync region.
    Foreign(PathBuf),
    /// The region has another layout.
    Version {
        /// The file.
        path: PathBuf,
        /// Its layout version.
        found: u64,
    },
    /// The file is not as long as it says.
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Bytes that the header says.
        says: u64,
        /// Bytes that there are.
        has: u64,
    },
    /// The region was written by a build with other parts.
    OtherBuild(PathBuf),
    /// The appliance has not finished setting the region up.
    NotReady(PathBuf),
    /// A start failed, or was killed, before the region could be read.
    Abandoned {
        /// The file.
        path: PathBuf,
        /// The process that was setting it up.
        pid: u32,
    },
    /// There is not enough memory.
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
    },
    /// A ring's producer lives.
    RingTaken {
        /// The ring's shard.
        shard: u8,
        /// The producer's process.
        pid: u32,
    },
    /// The appliance has fewer shards.
    NoSuchShard {
        /// The shard asked for.
        shard: u8,
        /// How many there are.
        shards: u8,
    },
}

impl ShmError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ShmError {
        let path = path.to_path_buf();
        move |error| ShmError::Io { what, path, error }
    }
}

impl std::fmt::Display for ShmError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ShmError::Io { what, path, error } => {
                write!(f, "cannot {what} {}: {error}", path.display())
            }
            ShmError::Held { dir, pid: Some(pid) } => write!(
                f,
                "{} is in use by process {pid}: stop that one first, or give this one another --shm",
                dir.display()
            ),
            ShmError::Held { dir, pid: None } => {
                write!(
                    f,
                    "{} is in use by a process that is just starting: try again",
                    dir.display()
                )
            }
            ShmError::Public(dir) => {
                write!(
                    f,
                    "others may write to {}, or own it: give --shm a directory of its own",
                    dir.display()
                )
            }
            ShmError::Missing(path) => {
                write!(
                    f,
                    "there is no {}: is hypersync running, and with this --shm?",
                    path.display()
                )
            }
            ShmError::Foreign(path) => write!(
                f,
                "{} is not shared memory of hypersync: it was left alone; remove it, or give another --shm",
                path.display()
            ),
            ShmError::Version { path, found } => write!(
                f,
                "{0} has layout version {found}, this program knows {1}: it was left alone; to change versions, one \
                 member at a time: stop the hypersync of version {found} with SIGTERM, so that it leaves the group, \
                 remove {0}, and start this one, with a new table",
                path.display(),
                layout::VERSION
            ),
            ShmError::WrongSize { path, says, has } => write!(
                f,
                "{} says that it has {says} bytes but has {has}: it is damaged and was left alone; \
                 remove it, or give another --shm",
                path.display()
            ),
            ShmError::OtherBuild(path) => write!(
                f,
                "{} was written by another build of hypersync: use the tools of that build",
                path.display()
            ),
            ShmError::NotReady(path) => {
                write!(f, "{} is not ready: hypersync is starting, try again", path.display())
            }
            ShmError::Abandoned { path, pid } => write!(
                f,
                "{} was never ready, and process {pid}, which was setting it up, is gone: start hypersync again",
                path.display()
            ),
            ShmError::NoSpace { path, needed } => write!(
                f,
                "no room for {}: it needs {needed} bytes; give it memory, or fewer connections or shards",
                path.display()
            ),
            ShmError::RingTaken { shard, pid } => {
                write!(
                    f,
                    "the ring of shard {shard} has a producer, process {pid}: stop that one first"
                )
            }
            ShmError::NoSuchShard { shard, shards } => {
                write!(f, "there is no shard {shard}: this appliance has {shards}, counted from 0")
            }
        }
    }
}

impl std::error::Error for ShmError {}
