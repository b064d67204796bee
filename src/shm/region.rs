//! The appliance's side: making the region, and being the only one that does.
//!
//! A lock file (flock, released by the kernel however the process ends) keeps a second
//! appliance out. A new region is written beside the old one and renamed into its place, so
//! whoever still has the old one mapped goes on reading it. All memory is reserved before it
//! is mapped: tmpfs answers a lack of memory with SIGBUS otherwise. What is not ours, or of
//! another layout version, is refused and left alone.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::layout::{self, HEADER, HEADER_BYTES, Header, Sizes, total_bytes};
use super::mapping::Mapping;
use super::old_values::{OLD_VALUES_WORDS, OldValues};
use super::view::{RegionView, boot_id, file_bytes, open_file, refusal};
use super::{FILE, LOCK, ShmError};
use crate::conn::MemberId;
use crate::time::Time;

/// What the appliance says about its region.
#[derive(Clone, Copy, Debug)]
pub struct RegionConfig {
    /// Sizes, within the limits.
    pub sizes: Sizes,
    /// The group's id.
    pub group: u16,
    /// This member's id, 1 to 52.
    pub member: MemberId,
    /// Which run of the process this is.
    pub incarnation: u64,
    /// When the appliance started.
    pub started: Time,
    /// Whether to ask for huge pages.
    pub huge_pages: bool,
}

/// The appliance's region. Everything that a view reads, and the right to write it: the
/// [`Memory`](crate::memory::Memory) it hands out lies in a writable mapping. The lock is held as
/// long as this lives; the file stays behind.
pub struct Region {
    view: RegionView,
    /// Closing it gives the lock back, so it comes after the mapping.
    _lock: File,
}

impl Deref for Region {
    type Target = RegionView;

    fn deref(&self) -> &RegionView {
        &self.view
    }
}

/// The right to put a region into a directory: nobody else has it as long as this lives. What lies there
/// is as it was until [`Region::create_in`].
pub struct Place {
    dir: PathBuf,
    lock: File,
    /// What the region that lies there says of sysctls; zeros if there is none.
    old_values: [u64; OLD_VALUES_WORDS],
}

impl Place {
    /// Takes the directory, which is made (0700) if it is missing.
    ///
    /// # Errors
    /// Another appliance has it; an existing file is not a region of this layout version; or the system
    /// refuses.
    pub fn claim(dir: &Path) -> Result<Place, ShmError> {
        make_directory(dir)?;
        let lock = take_lock(dir)?;
        let old_values = check_replaceable(&dir.join(FILE))?;
        Ok(Place { dir: dir.into(), lock, old_values })
    }
}

impl Region {
    /// [`Place::claim`] and [`Region::create_in`] in one.
    ///
    /// # Errors
    /// Those of both.
    pub fn create(dir: &Path, config: &RegionConfig) -> Result<Region, ShmError> {
        Region::create_in(Place::claim(dir)?, config)
    }

    /// Makes a new, zeroed region with a new table id, in the place of the one that may be there. Only
    /// [what sysctls were](super::old_values) is taken over from that.
    /// Readers refuse it until [`publish_ready`](Region::publish_ready).
    ///
    /// # Errors
    /// There is not enough memory, or the system refuses.
    ///
    /// # Panics
    /// If the sizes or the member id lie outside the limits: the configuration has checked them.
    pub fn create_in(place: Place, config: &RegionConfig) -> Result<Region, ShmError> {
        assert!(config.sizes.is_valid() && config.member >= 1);
        assert!(config.member as usize <= crate::limits::MEMBERS_MAX);
        let Place { dir, lock, old_values } = place;
        let path = dir.join(FILE);

        let mut random = [0; 12];
        fill_random(&mut random).map_err(ShmError::io("get random bytes for", &path))?;
        let [a, b, c, d, key @ ..] = random;
        let header = Header {
            sizes: config.sizes,
            pid: std::process::id(),
            boot_id: boot_id()?,
            // Zero means "no table"; one in four billion lives is called 1 instead.
            table_id: u32::from_ne_bytes([a, b, c, d]).max(1),
            incarnation: config.incarnation,
            index_key: u64::from_ne_bytes(key),
            group: config.group,
            member: config.member,
            started: config.started,
        };
        // Under the lock, so a file of this name is what a killed start left.
        let fresh = dir.join(format!("{FILE}.new"));
        let mapping = write_file(&fresh, &header, &old_values).and_then(|mapping| {
            fs::rename(&fresh, &path).map_err(ShmError::io("put the new region in the place of", &path))?;
            Ok(mapping)
        });
        if mapping.is_err() {
            let _ = fs::remove_file(&fresh);
        }
        let mapping = mapping?;
        if config.huge_pages {
            mapping.advise_huge_pages();
        }
        Ok(Region { view: RegionView::of_creator(mapping, header), _lock: lock })
    }

    /// Says that the region may be read.
    pub fn publish_ready(&self) {
        layout::publish_ready(self.view.mapping().slice(HEADER));
    }

    /// Address and bytes of a shard's send arena, for registering it with io_uring. Valid as long as
    /// the region lives.
    pub fn arena_ptr(&self, shard: u8) -> (*const u8, usize) {
        self.view.mapping().bytes_of(self.view.layout(shard).arena, 8)
    }
}

fn make_directory(dir: &Path) -> Result<(), ShmError> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(ShmError::io("make directory", dir)(error));
        }
        _ => {}
    }
    let about = fs::metadata(dir).map_err(ShmError::io("look at", dir))?;
    if !about.is_dir() {
        return Err(ShmError::io("use as a directory", dir)(ErrorKind::NotADirectory.into()));
    }
    // SAFETY: the call takes nothing and only returns a number.
    let us = unsafe { libc::geteuid() };
    // In a public directory, or one of another user's, somebody else could put a file or a link in our place.
    let foreign = about.uid() != us && about.uid() != 0;
    if foreign || about.permissions().mode() & 0o002 != 0 {
        return Err(ShmError::Public(dir.into()));
    }
    Ok(())
}

fn take_lock(dir: &Path) -> Result<File, ShmError> {
    let path = dir.join(LOCK);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600);
    let mut lock = open_file(&path, &mut options)?;
    // SAFETY: flock has no memory arguments; the descriptor is open.
    if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::WouldBlock {
            return Err(ShmError::io("lock", &path)(error));
        }
        let mut holder = String::new();
        let _ = lock.read_to_string(&mut holder);
        return Err(ShmError::Held { dir: dir.into(), pid: holder.trim().parse().ok() });
    }
    lock.set_len(0).map_err(ShmError::io("write", &path))?;
    writeln!(lock, "{}", std::process::id()).map_err(ShmError::io("write", &path))?;
    Ok(lock)
}

/// Whether what lies at `path` may be replaced: nothing, or a whole region of this layout version. Returns its
/// record of sysctls, if that still means something.
fn check_replaceable(path: &Path) -> Result<[u64; OLD_VALUES_WORDS], ShmError> {
    let file = match open_file(path, OpenOptions::new().read(true)) {
        Err(ShmError::Missing(_)) => return Ok([0; OLD_VALUES_WORDS]),
        other => other?,
    };
    let bytes = file_bytes(&file, path)?;
    let mut raw = [0; 8 * layout::OLD_VALUES.end];
    file.read_exact_at(&mut raw, 0).map_err(ShmError::io("read", path))?;
    let mut words = [0; layout::OLD_VALUES.end];
    for (word, bytes) in words.iter_mut().zip(raw.as_chunks().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    let header = std::array::from_fn(|i| words[i]);
    layout::check_identity(&header, bytes).map_err(|why| refusal(why, path, bytes))?;
    // Counted in words, not read as a header: another build's region has the record in the same place.
    match layout::boot_id_of(&header) == boot_id()? {
        true => Ok(std::array::from_fn(|i| words[layout::OLD_VALUES.start + i])),
        false => Ok([0; OLD_VALUES_WORDS]),
    }
}

/// Makes the file with its header, all of its memory reserved.
fn write_file(
    path: &Path,
    header: &Header,
    old_values: &[u64; OLD_VALUES_WORDS],
) -> Result<Mapping, ShmError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(ShmError::io("remove", path)(error));
        }
        _ => {}
    }
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(ShmError::io("make", path))?;
    let bytes = total_bytes(&header.sizes);
    reserve(&file, bytes).map_err(|error| match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            ShmError::NoSpace { path: path.into(), needed: bytes as u64 }
        }
        _ => ShmError::io("reserve memory for", path)(error),
    })?;
    let mapping = Mapping::read_write(&file, 0, bytes).map_err(ShmError::io("map", path))?;
    header.write(mapping.slice(HEADER));
    OldValues::new(&mapping.slice(HEADER)[layout::OLD_VALUES]).copy_from(old_values);
    for shard in 0..header.sizes.shards {
        let l = layout::shard_layout(&header.sizes, shard);
        mapping.slice::<super::ingest::RingWords>(l.ring)[0].set_up(header.sizes.ring_records as u64);
    }
    Ok(mapping)
}

fn reserve(file: &File, bytes: usize) -> io::Result<()> {
    loop {
        // SAFETY: fallocate has no memory arguments; the descriptor is open.
        if unsafe { libc::fallocate64(file.as_raw_fd(), 0, 0, bytes as i64) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn fill_random(into: &mut [u8; 12]) -> io::Result<()> {
    loop {
        // SAFETY: the buffer is writable for the length given.
        let got = unsafe { libc::getrandom(into.as_mut_ptr().cast(), into.len(), 0) };
        // Up to 256 bytes come whole or not at all.
        if got == into.len() as isize {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

const _: () = assert!(8 * layout::OLD_VALUES.end <= HEADER_BYTES);

#[cfg(test)]
#[path = "region_tests.rs"]
pub(in crate::shm) mod tests;
