//! The reader's side: a mapping of a region through which nothing can be changed.
//!
//! An inspector maps the file read-only and loads words; the appliance never notices. The
//! mapping keeps the memory alive: after the appliance was killed, or has put a new region in
//! the old one's place, a view still reads what was there.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::group::GroupWords;
use super::ingest::Ring;
use super::layout::{
    self, GROUP, HEADER, HEADER_BYTES, Header, NotAHeader, ShardLayout, shard_layout,
};
use super::mapping::{Mapping, Words};
use super::old_values::OldValues;
use super::{FILE, ShmError};
use crate::memory::Memory;
use crate::word::{ReadWord, Word};

/// A region, mapped. What comes out of it is of its words `W`: those of a view that was opened can
/// only be loaded.
///
/// ```
/// use hypersync::{counters::{Counter, Counters}, shm::RegionView, word::Word};
///
/// fn look(view: &RegionView) -> u64 {
///     view.shard(0).slots[0].snapshot();
///     view.group().shard(0).last_pass();
///     Counters::new(view.shard(0).counters).get(Counter::Passes) + view.shard(0).former[0].get()
/// }
/// ```
///
/// Only the appliance's own [`Region`](super::Region) has a way to store:
///
/// ```compile_fail,E0599
/// fn disturb(view: &hypersync::shm::RegionView) {
///     view.shard(0).former[0].store(0, std::sync::atomic::Ordering::Relaxed);
/// }
/// ```
///
/// ```compile_fail,E0599
/// fn disturb(view: &hypersync::shm::RegionView) {
///     let slot = &view.shard(0).slots[0];
///     slot.store(&slot.line());
/// }
/// ```
///
/// ```compile_fail,E0599
/// fn disturb(view: &hypersync::shm::RegionView) {
///     view.group().shard(0).set_synced(0);
/// }
/// ```
///
/// ```compile_fail,E0599
/// use hypersync::counters::{Counter, Counters};
///
/// fn disturb(view: &hypersync::shm::RegionView) {
///     Counters::new(view.shard(0).counters).count(Counter::Passes);
/// }
/// ```
///
/// ```compile_fail,E0599
/// fn disturb(view: &hypersync::shm::RegionView) {
///     hypersync::shm::ingest::Consumer::new(view.ring(0)).awake();
/// }
/// ```
pub struct RegionView<W: Word = ReadWord> {
    mapping: Mapping<W>,
    header: Header,
}

impl RegionView {
    /// Opens the region in `dir`.
    ///
    /// # Errors
    /// There is none, it may not be read, it is not a region of this layout version and build,
    /// or it is not ready yet, or never will be.
    pub fn open(dir: &Path) -> Result<RegionView, ShmError> {
        let path = dir.join(FILE);
        let file = open_file(&path, OpenOptions::new().read(true))?;
        RegionView::over(&file, &path)
    }

    /// A view over an open file; `path` is for messages.
    pub(super) fn over(file: &File, path: &Path) -> Result<RegionView, ShmError> {
        let bytes = file_bytes(file, path)?;
        let mapping =
            Mapping::read_only(file, bytes as usize).map_err(ShmError::io("map", path))?;
        let words = mapping.slice::<ReadWord>(HEADER);
        let ready = layout::is_ready(words);
        let header =
            Header::read(&layout::copy_words(words), bytes).map_err(|e| refusal(e, path, bytes))?;
        // A start that takes the region up withdraws READY before it writes the header.
        fence(Ordering::Acquire);
        let ready = ready && layout::is_ready(words);
        let view = RegionView { mapping, header };
        match ready {
            true => Ok(view),
            false if view.is_running() => Err(ShmError::NotReady(path.into())),
            false => Err(ShmError::Abandoned { path: path.into(), pid: header.pid }),
        }
    }
}

impl RegionView<AtomicU64> {
    /// The appliance's own mapping.
    pub(super) fn of_creator(mapping: Mapping<AtomicU64>, header: Header) -> RegionView<AtomicU64> {
        RegionView { mapping, header }
    }

    /// A shard's ingest ring.
    pub fn ring(&self, shard: u8) -> Ring<'_> {
        let l = self.layout(shard);
        Ring {
            words: &self.mapping.slice(l.ring)[0],
            records: self.mapping.slice(l.records),
            shard,
            shards: self.header.sizes.shards,
        }
    }
}

impl<W: Word + Words<W>> RegionView<W>
where
    W::Half: Words<W>,
{
    /// What the region is and whose.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The memory of a shard (below `header().sizes.shards`).
    pub fn shard(&self, shard: u8) -> Memory<'_, W> {
        let l = self.layout(shard);
        let memory = Memory {
            slots: self.mapping.slice(l.slots),
            former: self.mapping.slice(l.former),
            extra_of: self.mapping.slice(l.extra_of),
            extras: self.mapping.slice(l.extras),
            index: self.mapping.slice(l.index),
            streams: self.mapping.slice(l.streams),
            leases: self.mapping.slice(l.leases),
            history: self.mapping.slice(l.history),
            manifest: self.mapping.slice(l.manifest),
            journal: self.mapping.slice(l.journal),
            arena: self.mapping.slice(l.arena),
            counters: self.mapping.slice(l.counters),
        };
        memory.assert_size(&self.header.sizes.memory);
        memory
    }

    /// The group table and the shards' lines.
    pub fn group(&self) -> &GroupWords<W> {
        &self.mapping.slice(GROUP)[0]
    }

    /// What sysctls were before the appliance changed them.
    pub fn old_values(&self) -> OldValues<'_, W> {
        OldValues::new(&self.mapping.slice(HEADER)[layout::OLD_VALUES])
    }

    /// Whether the region was made in this boot of the host.
    pub fn is_of_this_boot(&self) -> bool {
        boot_id().is_ok_and(|id| id == self.header.boot_id)
    }

    /// The process that has the region now: that of the header, or one that has taken it up since
    /// this was opened.
    pub fn pid(&self) -> u32 {
        self.word(layout::PID) as u32
    }

    /// Which run of the process has the region now; see [`pid`](RegionView::pid).
    pub fn incarnation(&self) -> u64 {
        self.word(layout::INCARNATION)
    }

    /// Whether the appliance that has this region still runs (as far as this pid namespace tells).
    pub fn is_running(&self) -> bool {
        self.is_of_this_boot() && Path::new("/proc").join(self.pid().to_string()).exists()
    }

    pub(super) fn word(&self, word: usize) -> u64 {
        self.mapping.slice::<W>(HEADER)[word].get()
    }

    pub(super) fn layout(&self, shard: u8) -> ShardLayout {
        shard_layout(&self.header.sizes, shard)
    }

    pub(super) fn mapping(&self) -> &Mapping<W> {
        &self.mapping
    }
}

/// Opens a region's file, never following a link.
pub(super) fn open_file(path: &Path, options: &mut OpenOptions) -> Result<File, ShmError> {
    // NONBLOCK: a pipe put in the file's place must not make us wait.
    match options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(ShmError::Missing(path.into()))
        }
        other => other.map_err(ShmError::io("open", path)),
    }
}

/// Length of a region's file; anything that is too short or no plain file is foreign.
pub(super) fn file_bytes(file: &File, path: &Path) -> Result<u64, ShmError> {
    let about = file.metadata().map_err(ShmError::io("look at", path))?;
    if !about.is_file() || about.len() < HEADER_BYTES as u64 {
        return Err(ShmError::Foreign(path.into()));
    }
    Ok(about.len())
}

/// The error for a header that does not fit.
pub(super) fn refusal(why: NotAHeader, path: &Path, has: u64) -> ShmError {
    let path: PathBuf = path.into();
    match why {
        NotAHeader::Foreign => ShmError::Foreign(path),
        NotAHeader::Version(found) => ShmError::Version { path, found },
        NotAHeader::WrongSize(says) => ShmError::WrongSize { path, says, has },
        NotAHeader::OtherBuild => ShmError::OtherBuild(path),
    }
}

/// The 16 bytes of this boot's id.
pub(super) fn boot_id() -> Result<[u8; 16], ShmError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).map_err(ShmError::io("read", path))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    match u128::from_str_radix(&digits, 16) {
        Ok(id) if digits.len() == 32 => Ok(id.to_be_bytes()),
        _ => Err(ShmError::io("understand", path)(io::ErrorKind::InvalidData.into())),
    }
}
