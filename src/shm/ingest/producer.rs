//! A data plane's end of a ring.
//!
//! Opens the appliance's region and maps for writing only the pages of its ring. Records are
//! written at once and published in batches: call [`Producer::flush`] when a batch is whole, or
//! before going to sleep.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::record::encode;
use super::{ASLEEP, AWAKE, RecordWords, RingWords};
use crate::conn::shard_of;
use crate::shm::layout::{Part, ShardLayout};
use crate::shm::mapping::Mapping;
use crate::shm::view::open_file;
use crate::shm::{FILE, RegionView, ShmError};
use crate::source::SourceEvent;

/// The ring is full: the event was not taken. What was pushed before has been published, so the
/// shard will make room; push again later, or give the event up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// The only writer of a shard's ring.
pub struct Producer {
    mapping: Mapping<AtomicU64>,
    ring: Part,
    records: Part,
    shards: u8,
    /// The next record to write.
    head: u64,
    /// What the consumer knows of it.
    published: u64,
    /// The consumer's position when last looked at.
    tail: u64,
    path: PathBuf,
    /// Closing it gives the claim back.
    file: File,
}

impl Producer {
    /// Becomes the producer of a shard's ring of the appliance in `dir`, going on where a dead one
    /// ended: what that one had not published is lost.
    ///
    /// # Errors
    /// As for [`RegionView::open`]; or the ring has a producer that lives; or there is no such
    /// shard.
    pub fn open(dir: &Path, shard: u8) -> Result<Producer, ShmError> {
        let path = dir.join(FILE);
        let file = open_file(&path, OpenOptions::new().read(true).write(true))?;
        let view = RegionView::over(&file, &path)?;
        let shards = view.header().sizes.shards;
        if shard >= shards {
            return Err(ShmError::NoSuchShard { shard, shards });
        }
        let ShardLayout { ring, records, end, .. } = view.layout(shard);
        let mapping = Mapping::read_write(&file, ring.offset, end - ring.offset)
            .map_err(ShmError::io("map", &path))?;
        let words = &mapping.slice::<RingWords>(ring)[0];
        if !claim(&file, ring.offset).map_err(ShmError::io("claim a ring of", &path))? {
            return Err(ShmError::RingTaken { shard, pid: words.pid.load(Ordering::Relaxed) });
        }
        words.pid.store(std::process::id(), Ordering::Relaxed);
        let head = words.head.load(Ordering::Relaxed);
        let tail = words.tail.load(Ordering::Acquire);
        let producer =
            Producer { mapping, ring, records, shards, head, published: head, tail, path, file };
        // The one before may have died between publishing and ringing.
        producer.wake();
        Ok(producer)
    }

    /// How many shards the appliance has.
    pub fn shards(&self) -> u8 {
        self.shards
    }

    /// Writes an event. The consumer sees it after the next [`flush`](Producer::flush).
    ///
    /// # Errors
    /// The ring is full.
    pub fn push(&mut self, event: &SourceEvent) -> Result<(), Full> {
        let size = self.records.items as u64;
        if self.head.wrapping_sub(self.tail) >= size {
            // Pairs with the release in `Consumer::move_to`: what we overwrite has been read.
            self.tail = self.words().tail.load(Ordering::Acquire);
            if self.head.wrapping_sub(self.tail) >= size {
                self.flush();
                return Err(Full);
            }
        }
        let record = &self.mapping.slice::<RecordWords>(self.records)
            [self.head as usize & (self.records.items - 1)];
        for (word, value) in record.0.iter().zip(encode(event, self.head)) {
            word.store(value, Ordering::Relaxed);
        }
        self.head = self.head.wrapping_add(1);
        Ok(())
    }

    /// Publishes what was pushed, and wakes the shard if it sleeps.
    pub fn flush(&mut self) {
        if self.head == self.published {
            return;
        }
        // Pairs with the acquire in `Consumer::drain`.
        self.words().head.store(self.head, Ordering::Release);
        self.published = self.head;
        self.wake();
    }

    /// Whether this is still the appliance's region. A restart takes it up again, and the ring with
    /// it; a new table is in a new one, and then nobody reads this ring any more. Asks the file
    /// system, so not for every record.
    pub fn is_current(&self) -> bool {
        let id = |about: std::fs::Metadata| (about.dev(), about.ino());
        match (self.file.metadata().map(id), std::fs::metadata(&self.path).map(id)) {
            (Ok(mine), Ok(there)) => mine == there,
            _ => false,
        }
    }

    fn words(&self) -> &RingWords {
        &self.mapping.slice(self.ring)[0]
    }

    fn wake(&self) {
        let doorbell = &self.words().doorbell;
        // Pairs with the fence in `Consumer::prepare_sleep`: either it sees our head or we see its
        // doorbell.
        fence(Ordering::SeqCst);
        if doorbell.load(Ordering::Relaxed) == ASLEEP
            && doorbell.swap(AWAKE, Ordering::Relaxed) == ASLEEP
        {
            futex_wake(doorbell);
        }
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Takes the ring's lock, if nobody has it. It belongs to the open file: the kernel takes it back
/// when the last descriptor is closed, however the process ends, in whatever pid namespace.
fn claim(file: &File, at: usize) -> io::Result<bool> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: at as i64,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `lock` a valid flock that the call only reads.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word lies in a live mapping; FUTEX_WAKE takes its address as a name and touches
    // nothing. It cannot fail for such a word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// The producers of all shards' rings, for a data plane with one thread.
pub struct Producers(Vec<Producer>);

impl Producers {
    /// Becomes the producer of every ring of the appliance in `dir`.
    ///
    /// # Errors
    /// As for [`Producer::open`].
    pub fn open(dir: &Path) -> Result<Producers, ShmError> {
        let first = Producer::open(dir, 0)?;
        let shards = first.shards();
        let mut all = vec![first];
        for shard in 1..shards {
            all.push(Producer::open(dir, shard)?);
        }
        Ok(Producers(all))
    }

    /// Writes an event into the ring of the shard that it belongs to.
    ///
    /// # Errors
    /// That ring is full.
    pub fn push(&mut self, event: &SourceEvent) -> Result<(), Full> {
        let original = match event {
            SourceEvent::Seen { connection, .. } => &connection.original,
            SourceEvent::Gone { original, .. } => original,
        };
        let shard = shard_of(original, self.shards());
        self.0[shard as usize].push(event)
    }

    /// Publishes what was pushed to any ring.
    pub fn flush(&mut self) {
        for producer in &mut self.0 {
            producer.flush();
        }
    }

    /// How many shards the appliance has.
    pub fn shards(&self) -> u8 {
        self.0[0].shards()
    }

    /// See [`Producer::is_current`].
    pub fn is_current(&self) -> bool {
        self.0[0].is_current()
    }
}
