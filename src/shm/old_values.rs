//! What sysctls were before this member changed them, where a crash cannot lose it.
//!
//! ```text
//!  header word 20     cookie of the network namespace that the values belong to; 0: nothing is recorded
//!              21,22  one for each sysctl of `conntrack::sysctl::NEEDED`: what it was, plus one; 0: nothing
//! ```
//!
//! A value is written down before its sysctl is changed and struck out after it was put back, so
//! whenever the process ends, either nothing is to be done or it says here what. A new region takes
//! the record over from the one whose place it takes, if that is of the same boot: sysctls do not
//! outlive one.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::word::Word;

/// Sysctls that can be recorded.
pub const SYSCTLS: usize = 2;

/// Words of a record.
pub const OLD_VALUES_WORDS: usize = 1 + SYSCTLS;

/// The record. Relaxed order is enough: it is read by the one thread that writes it, and by others
/// once the process is gone.
#[derive(Debug)]
pub struct OldValues<'m, W = AtomicU64>(&'m [W]);

impl<W> Clone for OldValues<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for OldValues<'_, W> {}

impl<'m, W: Word> OldValues<'m, W> {
    /// The record in its words.
    pub fn new(words: &'m [W]) -> OldValues<'m, W> {
        assert_eq!(words.len(), OLD_VALUES_WORDS);
        OldValues(words)
    }

    /// The cookie of the network namespace; 0: nothing was ever recorded.
    pub fn namespace(&self) -> u64 {
        self.0[0].get()
    }

    /// What a sysctl was, if it still has to be put back.
    pub fn get(&self, sysctl: usize) -> Option<u64> {
        self.0[1 + sysctl].get().checked_sub(1)
    }
}

impl OldValues<'_> {
    /// Writes down what a sysctl was, or that nothing has to be put back.
    pub fn set(&self, sysctl: usize, old: Option<u64>) {
        self.0[1 + sysctl].store(old.map_or(0, |old| old.saturating_add(1)), Ordering::Relaxed);
    }

    /// From now on this is about another network namespace: what was recorded is lost.
    pub fn begin(&self, namespace: u64) {
        (0..SYSCTLS).for_each(|sysctl| self.set(sysctl, None));
        self.0[0].store(namespace, Ordering::Relaxed);
    }

    /// Takes over the words of another record.
    pub(super) fn copy_from(&self, words: &[u64; OLD_VALUES_WORDS]) {
        for (word, value) in self.0.iter().zip(words) {
            word.store(*value, Ordering::Relaxed);
        }
    }
}
