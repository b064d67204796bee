//! The appliance's side: making the region or taking it up again, and being the only one that does.
//!
//! A lock file (flock, released by the kernel however the process ends) keeps a second appliance
//! out. The region of a process that was killed or restarts is [taken up](Region::resume) where it
//! lies, if it fits ([`Fresh`] says when not): table, streams and history go on, and so do
//! producers and readers that have it mapped. Otherwise a new one is written beside the old one and
//! renamed into its place, so whoever still has the old one mapped goes on reading it. All memory
//! is reserved before it is mapped: tmpfs answers a lack of memory with SIGBUS otherwise. What is
//! not ours, or of another layout version, is refused and left alone.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::group::GroupWords;
use super::layout::{self, GROUP, HEADER, HEADER_BYTES, HEADER_WORDS, Header, Sizes, total_bytes};
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
}

/// The appliance's region. Everything that a view reads, and the right to write it: the
/// [`Memory`](crate::memory::Memory) it hands out lies in a writable mapping. The lock is held as
/// long as this lives; the file stays behind.
pub struct Region {
    view: RegionView<AtomicU64>,
    resumed: bool,
    /// Closing it gives the lock back, so it comes after the mapping.
    _lock: File,
}

impl Deref for Region {
    type Target = RegionView<AtomicU64>;

    fn deref(&self) -> &RegionView<AtomicU64> {
        &self.view
    }
}

/// The right to put a region into a directory: nobody else has it as long as this lives. What lies
/// there is as it was until [`Region::create_in`] or [`Region::resume`].
pub struct Location {
    dir: PathBuf,
    lock: File,
    /// The region that lies there.
    lying: Option<Lying>,
}

/// The first words of a region of this layout version, and the length of its file.
struct Lying {
    words: [u64; layout::ENDED + 1],
    bytes: u64,
}

impl Lying {
    fn header(&self) -> [u64; HEADER_WORDS] {
        std::array::from_fn(|i| self.words[i])
    }
}

/// Why a new table is begun although a region may lie in the directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fresh {
    /// There is none.
    Nothing,
    /// The operator wants it.
    Asked,
    /// The member said goodbye: others have taken over what was in it.
    Ended,
    /// The host was started again since.
    Boot,
    /// Starts failed, or were killed, before it was ready.
    Unfinished,
    /// The build has other parts.
    Build,
    /// Something that the table depends on is another.
    Changed {
        /// The option that says it.
        what: &'static str,
        /// Then.
        was: u64,
        /// Now.
        is: u64,
    },
}

impl std::fmt::Display for Fresh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fresh::Nothing => write!(f, "there is none yet"),
            Fresh::Asked => write!(f, "--new-table asks for it"),
            Fresh::Ended => write!(f, "the old one ended when the member left the group"),
            Fresh::Boot => write!(f, "the old one is of an earlier boot of this host"),
            Fresh::Unfinished => write!(f, "the old one was never ready, or could not be taken up"),
            Fresh::Build => write!(f, "the old one was written by another build"),
            Fresh::Changed { what, was, is } => write!(f, "{what} was {was} and is {is}"),
        }
    }
}

impl Location {
    /// Takes the directory, which is made (0700) if it is missing.
    ///
    /// # Errors
    /// Another appliance has it; an existing file is not a region of this layout version; or the
    /// system refuses.
    pub fn claim(dir: &Path) -> Result<Location, ShmError> {
        make_directory(dir)?;
        let lock = take_lock(dir)?;
        let lying = check_replaceable(&dir.join(FILE))?;
        Ok(Location { dir: dir.into(), lock, lying })
    }

    /// Whether the region that lies here can be taken up by an appliance like this, or why it
    /// cannot.
    ///
    /// # Errors
    /// It cannot: make a new one.
    pub fn resumable(&self, config: &RegionConfig) -> Result<(), Fresh> {
        let lying = self.lying.as_ref().ok_or(Fresh::Nothing)?;
        let old = Header::read(&lying.header(), lying.bytes).map_err(|_| Fresh::Build)?;
        if boot_id().ok() != Some(old.boot_id) {
            return Err(Fresh::Boot);
        }
        if lying.words[layout::ENDED] != 0 {
            return Err(Fresh::Ended);
        }
        if !layout::may_resume(lying.words[HEADER_WORDS]) {
            return Err(Fresh::Unfinished);
        }
        let (was, is) = (&old.sizes, &config.sizes);
        for (what, was, is) in [
            ("--group", old.group as u64, config.group as u64),
            ("--member", old.member as u64, config.member as u64),
            ("--shards", was.shards as u64, is.shards as u64),
            ("--capacity (slots a shard)", was.memory.capacity as u64, is.memory.capacity as u64),
            ("--extras (a shard)", was.memory.extras as u64, is.memory.extras as u64),
            ("--arena", was.memory.arena as u64, is.memory.arena as u64),
            ("--ring", was.ring_records as u64, is.ring_records as u64),
        ] {
            if was != is {
                return Err(Fresh::Changed { what, was, is });
            }
        }
        Ok(())
    }

    /// What the region that lies here says of sysctls; zeros if it says nothing that still counts.
    fn old_values(&self) -> Result<[u64; OLD_VALUES_WORDS], ShmError> {
        // Counted in words, not read as a header: another build's region has the record in the same
        // place.
        match &self.lying {
            Some(lying) if layout::boot_id_of(&lying.header()) == boot_id()? => {
                Ok(std::array::from_fn(|i| lying.words[layout::OLD_VALUES.start + i]))
            }
            _ => Ok([0; OLD_VALUES_WORDS]),
        }
    }
}

impl Region {
    /// [`Location::claim`] and [`Region::create_in`] in one.
    ///
    /// # Errors
    /// Those of both.
    pub fn create(dir: &Path, config: &RegionConfig) -> Result<Region, ShmError> {
        Region::create_in(Location::claim(dir)?, config)
    }

    /// Makes a new, zeroed region with a new table id, in the place of the one that may be there.
    /// Only [what sysctls were](super::old_values) is taken over from that. Readers refuse it until
    /// [`publish_ready`](Region::publish_ready).
    ///
    /// # Errors
    /// There is not enough memory, or the system refuses.
    ///
    /// # Panics
    /// If the sizes or the member id lie outside the limits: the configuration has checked them.
    pub fn create_in(place: Location, config: &RegionConfig) -> Result<Region, ShmError> {
        assert!(config.sizes.is_valid() && config.member >= 1);
        assert!(config.member as usize <= crate::limits::MEMBERS_MAX);
        let old_values = place.old_values()?;
        let Location { dir, lock, .. } = place;
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
            fs::rename(&fresh, &path)
                .map_err(ShmError::io("put the new region in the place of", &path))?;
            Ok(mapping)
        });
        if mapping.is_err() {
            let _ = fs::remove_file(&fresh);
        }
        let mapping = mapping?;
        Ok(Region { view: RegionView::of_creator(mapping, header), resumed: false, _lock: lock })
    }

    /// Takes up the region that lies in the place, which is [resumable](Location::resumable) with
    /// this configuration: the same file, table id and index key. Only pid, incarnation and start
    /// are written anew, and what the shards said of their progress. Readers refuse it until
    /// [`publish_ready`](Region::publish_ready); those that have it mapped go on reading.
    ///
    /// # Errors
    /// The system refuses.
    ///
    /// # Panics
    /// If the place is not resumable with this configuration.
    pub fn resume(place: Location, config: &RegionConfig) -> Result<Region, ShmError> {
        assert_eq!(place.resumable(config), Ok(()));
        let Location { dir, lock, .. } = place;
        let path = dir.join(FILE);
        let file = open_file(&path, OpenOptions::new().read(true).write(true))?;
        let bytes = file_bytes(&file, &path)?;
        let mapping =
            Mapping::read_write(&file, 0, bytes as usize).map_err(ShmError::io("map", &path))?;
        let words = mapping.slice(HEADER);
        let old = Header::read(&layout::copy_words(words), bytes)
            .map_err(|why| refusal(why, &path, bytes))?;
        let header = Header {
            pid: std::process::id(),
            incarnation: config.incarnation,
            started: config.started,
            ..old
        };
        layout::begin_resume(words);
        header.write(words);
        words[layout::BACK_WITHIN].store(0, Ordering::Relaxed);
        let group: &GroupWords = &mapping.slice(GROUP)[0];
        group.resume(config.sizes.shards);
        Ok(Region { view: RegionView::of_creator(mapping, header), resumed: true, _lock: lock })
    }

    /// Whether the region was taken up again, with all that is in it.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Says that this table is not to be taken up again: the member leaves the group, or the table
    /// is broken.
    pub fn end(&self) {
        self.view.mapping().slice::<AtomicU64>(HEADER)[layout::ENDED].store(1, Ordering::Relaxed);
    }

    /// How long a restart that was asked for may take, in ms; 0 if nobody has said. Asking forgets
    /// it.
    pub fn take_back_within(&self) -> u64 {
        self.view.mapping().slice::<AtomicU64>(HEADER)[layout::BACK_WITHIN]
            .swap(0, Ordering::Relaxed)
    }

    /// Says that the region may be read.
    pub fn publish_ready(&self) {
        layout::publish_ready(self.view.mapping().slice(HEADER));
    }
}

/// Says in the region of the running appliance in `dir` how long a restart may take.
///
/// # Errors
/// It may not be written.
pub fn ask_back_within(dir: &Path, within: std::time::Duration) -> Result<(), ShmError> {
    let path = dir.join(FILE);
    let file = open_file(&path, OpenOptions::new().write(true))?;
    let ms = within.as_millis() as u64;
    file.write_all_at(&ms.to_ne_bytes(), 8 * layout::BACK_WITHIN as u64)
        .map_err(ShmError::io("write", &path))
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
    // In a public directory, or one of another user's, somebody else could put a file or a link in
    // our place.
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

/// Whether what lies at `path` may be replaced: nothing, or a whole region of this layout version.
fn check_replaceable(path: &Path) -> Result<Option<Lying>, ShmError> {
    let file = match open_file(path, OpenOptions::new().read(true)) {
        Err(ShmError::Missing(_)) => return Ok(None),
        other => other?,
    };
    let bytes = file_bytes(&file, path)?;
    let mut raw = [0; 8 * (layout::ENDED + 1)];
    file.read_exact_at(&mut raw, 0).map_err(ShmError::io("read", path))?;
    let mut words = [0; layout::ENDED + 1];
    for (word, bytes) in words.iter_mut().zip(raw.as_chunks().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    let lying = Lying { words, bytes };
    layout::check_identity(&lying.header(), bytes).map_err(|why| refusal(why, path, bytes))?;
    Ok(Some(lying))
}

/// Makes the file with its header, all of its memory reserved.
fn write_file(
    path: &Path,
    header: &Header,
    old_values: &[u64; OLD_VALUES_WORDS],
) -> Result<Mapping<AtomicU64>, ShmError> {
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
        mapping.slice::<super::ingest::RingWords>(l.ring)[0]
            .set_up(header.sizes.ring_records as u64);
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

const _: () = assert!(8 * (layout::BACK_WITHIN + 1) <= HEADER_BYTES);

#[cfg(test)]
#[path = "region_tests.rs"]
pub(in crate::shm) mod tests;
