//! Why a ring could not be had, in one line that says what to do about it.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fmt;
use std::fs;
use std::io;

/// A failure of the environment to give us a working ring.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RingError {
    /// io_uring_setup was refused.
    Refused {
        /// The kernel's answer.
        errno: i32,
        /// What `kernel.io_uring_disabled` says, if it exists.
        sysctl: Option<String>,
        /// The running kernel's release.
        kernel: String,
    },
    /// Memory could not be locked for the kernel.
    MemoryLock {
        /// What it was needed for.
        what: &'static str,
        /// How much, bytes.
        needed: u64,
        /// RLIMIT_MEMLOCK of this process, bytes; `u64::MAX` means unlimited.
        limit: u64,
    },
    /// The kernel refused to register something else.
    Register {
        /// What.
        what: &'static str,
        /// The kernel's answer.
        errno: i32,
        /// The running kernel's release.
        kernel: String,
    },
    /// An operation without which hypersync cannot work does not exist here.
    Missing {
        /// Its name.
        what: &'static str,
        /// The running kernel's release.
        kernel: String,
    },
    /// io_uring_enter failed in a way that is no part of normal work.
    Enter {
        /// The kernel's answer.
        errno: i32,
    },
}

impl RingError {
    /// A refused setup, with what an operator needs to know about it.
    pub(super) fn refused(error: &io::Error) -> RingError {
        let errno = errno_of(error);
        if errno == libc::ENOMEM {
            return RingError::memory_lock("the ring's queues", 128 << 10);
        }
        let sysctl = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
        RingError::Refused {
            errno,
            sysctl: sysctl.map(|s| s.trim().to_owned()),
            kernel: kernel_release(),
        }
    }

    /// A refused registration of `needed` bytes for `what`.
    pub(super) fn register(what: &'static str, needed: u64, error: &io::Error) -> RingError {
        match errno_of(error) {
            libc::ENOMEM => RingError::memory_lock(what, needed),
            errno => RingError::Register { what, errno, kernel: kernel_release() },
        }
    }

    /// An operation that this kernel lacks.
    pub(super) fn missing(what: &'static str) -> RingError {
        RingError::Missing { what, kernel: kernel_release() }
    }

    fn memory_lock(what: &'static str, needed: u64) -> RingError {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the kernel writes one rlimit into the place just made for it.
        unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
        RingError::MemoryLock { what, needed, limit: limit.rlim_cur }
    }
}

/// The errno of an error that came from a system call.
pub(super) fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

fn kernel_release() -> String {
    // SAFETY: utsname is plain bytes, for which zero is valid; the kernel fills it with
    // strings that end in a zero byte within their arrays.
    unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        libc::uname(&mut name);
        CStr::from_ptr(name.release.as_ptr()).to_string_lossy().into_owned()
    }
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RingError::Refused { errno, sysctl, kernel } => {
                let sysctl = sysctl.as_deref().unwrap_or("absent");
                let advice = match *errno {
                    libc::EPERM if sysctl != "0" => {
                        "run `sysctl kernel.io_uring_disabled=0`, or with =1 run as root or in the group of kernel.io_uring_group"
                    }
                    libc::EPERM => {
                        "a seccomp profile forbids it: allow io_uring_setup, io_uring_enter and io_uring_register in the container"
                    }
                    libc::ENOSYS => {
                        "the kernel is built without it, or a seccomp profile hides it: allow the io_uring calls in the container"
                    }
                    libc::EMFILE | libc::ENFILE => {
                        "raise the limit of open files (ulimit -n, or LimitNOFILE= in the unit)"
                    }
                    _ => "hypersync needs Linux 6.1 or later with io_uring",
                };
                write!(
                    f,
                    "io_uring was refused: {} (kernel.io_uring_disabled={sysctl}, Linux {kernel}); {advice}",
                    io::Error::from_raw_os_error(*errno)
                )
            }
            RingError::MemoryLock { what, needed, limit } => {
                let limit = match *limit {
                    u64::MAX => "unlimited".to_owned(),
                    bytes => format!("{bytes} bytes"),
                };
                write!(
                    f,
                    "not enough lockable memory for {what}: {needed} bytes needed, RLIMIT_MEMLOCK is {limit} for all processes of this user together; \
                     grant CAP_IPC_LOCK, raise the limit (ulimit -l, or LimitMEMLOCK= in the unit), or make the arena smaller"
                )
            }
            RingError::Register { what, errno, kernel } => {
                let advice = match *errno {
                    libc::EFAULT | libc::EOPNOTSUPP => {
                        "its memory must be anonymous or on tmpfs or hugetlbfs: use a directory in /dev/shm"
                    }
                    _ => "hypersync needs Linux 6.1 or later",
                };
                write!(
                    f,
                    "io_uring could not register {what}: {} (Linux {kernel}); {advice}",
                    io::Error::from_raw_os_error(*errno)
                )
            }
            RingError::Missing { what, kernel } => {
                write!(
                    f,
                    "io_uring on Linux {kernel} has no {what}; hypersync needs Linux 6.1 or later"
                )
            }
            RingError::Enter { errno } => write!(
                f,
                "io_uring_enter failed: {}; restart hypersync, and report this: it should not happen",
                io::Error::from_raw_os_error(*errno)
            ),
        }
    }
}

impl std::error::Error for RingError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_is_one_line_that_says_what_to_do() {
        let refused = RingError::refused(&io::Error::from_raw_os_error(libc::EPERM)).to_string();
        assert!(
            refused.contains("os error 1") && refused.contains("kernel.io_uring_disabled="),
            "{refused}"
        );
        let memory =
            RingError::register("the arena", 16 << 20, &io::Error::from_raw_os_error(libc::ENOMEM));
        let memory = memory.to_string();
        assert!(
            memory.contains("16777216")
                && memory.contains("RLIMIT_MEMLOCK")
                && memory.contains("CAP_IPC_LOCK")
        );
        for line in [
            refused,
            memory,
            RingError::missing("SEND").to_string(),
            RingError::Enter { errno: 5 }.to_string(),
        ] {
            assert!(!line.contains('\n'));
        }
    }
}
