//! Settings of conntrack in this network namespace, as far as hypersync needs them.
//!
//! Two settings must have a certain value for restored connections to work; they are set at
//! the start and put back at the end, by the next run if this one is killed
//! ([`OldValues`] remembers).

use std::io;

use super::{KernelError, netlink};
use crate::shm::old_values::{OldValues, SYSCTLS};

/// Which connections raise events: 0 none, 1 all, 2 those that are born while somebody listens.
pub const EVENTS: &str = "net.netfilter.nf_conntrack_events";

/// What restored connections need.
///
/// - `nf_conntrack_events=1`: with the default, 2, a connection born while nobody listened
///   never raises an event, not even when it closes.
/// - `nf_conntrack_tcp_be_liberal=1`: TCP windows are not replicated, and a flow that moves to
///   another gateway and back would be judged by old ones.
pub const NEEDED: [(&str, u64); 2] =
    [(EVENTS, 1), ("net.netfilter.nf_conntrack_tcp_be_liberal", 1)];

const _: () = assert!(NEEDED.len() == SYSCTLS);

pub(super) fn path(name: &str) -> String {
    format!("/proc/sys/{}", name.replace('.', "/"))
}

/// Reads a numeric setting.
pub fn read(name: &'static str) -> Result<u64, KernelError> {
    let text = std::fs::read_to_string(path(name)).map_err(|e| failed(name, &e))?;
    text.trim().parse().map_err(|_| KernelError::Setting { name, errno: libc::EINVAL })
}

/// Writes a numeric setting.
pub fn write(name: &'static str, value: u64) -> Result<(), KernelError> {
    std::fs::write(path(name), value.to_string()).map_err(|e| failed(name, &e))
}

pub(super) fn failed(name: &'static str, error: &io::Error) -> KernelError {
    KernelError::Setting { name, errno: error.raw_os_error().unwrap_or(libc::EIO) }
}

/// Settings that must be put back; what they were is in the record.
#[derive(Debug)]
#[must_use = "the settings stay changed without"]
pub struct Changed<'r>(OldValues<'r>);

impl Changed<'_> {
    /// Puts the old values back, in the network namespace of the calling thread, and strikes them
    /// out.
    pub fn put_back(self) -> Result<(), KernelError> {
        // All of them, whatever becomes of one; the first error is told.
        let put_back = |(i, (name, _)): (usize, &(&'static str, u64))| match self.0.get(i) {
            None => Ok(()),
            Some(old) => write(name, old).map(|()| self.0.set(i, None)),
        };
        NEEDED.iter().enumerate().map(put_back).fold(Ok(()), Result::and)
    }
}

/// Gives every setting of [`NEEDED`] its value in the network namespace of the calling thread. What
/// it was is recorded first; or it was by a run that a crash kept from putting it back, and then
/// that counts. If one cannot be set, those before it are put back.
pub fn set_needed(record: OldValues<'_>) -> Result<Changed<'_>, KernelError> {
    let here = netlink::namespace_cookie()?;
    if record.namespace() != here {
        for (i, (name, _)) in NEEDED.iter().enumerate() {
            if let Some(old) = record.get(i) {
                log::warn!(
                    "an earlier run left sysctl {name} changed in another network namespace: it was {old} there"
                );
            }
        }
        record.begin(here);
    }
    for (i, (name, value)) in NEEDED.into_iter().enumerate() {
        if let Err(e) = set(record, i, name, value) {
            if let Err(again) = Changed(record).put_back() {
                log::warn!("{again}");
            }
            return Err(e);
        }
    }
    Ok(Changed(record))
}

fn set(record: OldValues<'_>, i: usize, name: &'static str, value: u64) -> Result<(), KernelError> {
    let now = read(name)?;
    match record.get(i) {
        Some(old) if now == value => {
            log::info!(
                "an earlier run did not put sysctl {name} back: it will be {old} again at the end"
            );
            Ok(())
        }
        _ if now == value => Ok(()),
        _ => {
            record.set(i, Some(now));
            // What could not be changed is not to be put back either.
            write(name, value).inspect_err(|_| record.set(i, None))
        }
    }
}

/// Settings of [`NEEDED`] that have another value than they should: name and value now.
pub fn unmet() -> Result<Vec<(&'static str, u64)>, KernelError> {
    let mut unmet = Vec::new();
    for (name, value) in NEEDED {
        let now = read(name)?;
        if now != value {
            unmet.push((name, now));
        }
    }
    Ok(unmet)
}
