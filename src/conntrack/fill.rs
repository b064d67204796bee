//! How full the kernel's table is, and how full we may make it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::KernelError;
use super::sysctl::{failed, path};

/// Inserts stop when the table is this full, per cent: what is left is for the gateway's own
/// traffic.
pub const FILL_MAX_PERCENT: u64 = 90;

/// How full the kernel's table is. The files stay open: asking takes two reads.
#[derive(Debug)]
pub struct TableFill {
    limit: File,
    count: File,
}

impl TableFill {
    /// Opens the figures of the calling thread's network namespace.
    pub fn open() -> Result<TableFill, KernelError> {
        let open = |name| File::open(path(name)).map_err(|e| failed(name, &e));
        Ok(TableFill {
            limit: open("net.netfilter.nf_conntrack_max")?,
            count: open("net.netfilter.nf_conntrack_count")?,
        })
    }

    /// Entries that the kernel allows, and entries that there are.
    pub fn limit_and_count(&self) -> (u64, u64) {
        let number = |file: &File| {
            let mut text = [0; 24];
            let length = file.read_at(&mut text, 0).unwrap_or(0);
            std::str::from_utf8(&text[..length]).ok()?.trim().parse().ok()
        };
        (number(&self.limit).unwrap_or(0), number(&self.count).unwrap_or(0))
    }

    /// Entries that may still be inserted. A limit of 0 means that there is none.
    pub fn room(&self) -> u64 {
        match self.limit_and_count() {
            (0, _) => u64::MAX,
            (limit, count) => (limit * FILL_MAX_PERCENT / 100).saturating_sub(count),
        }
    }
}
