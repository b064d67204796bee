//! The kernel's connection table: what it tells us, and what we write into it.
//!
//! ```text
//!  kernel --events--> filter --> events::Source --SourceEvent--> shard
//!                                   ^ dump                         |
//!  kernel <------- requests ------ commit::Committer <--Connection-+
//! ```
//!
//! - [`codec`]: messages, bytes to meaning and back; pure
//! - [`filter`]: the program by which the kernel gives each shard its own connections only
//! - [`netlink`]: the socket's system calls
//! - [`queue`], [`dump`]: the kernel's events, and its whole table; [`events`]: what a shard makes
//!   of them
//! - [`entries`]: requests to the kernel; [`commit`]: what is to be asked, and what became of it
//! - [`local`]: which connections are this host's own; pure. [`addresses`] reads what makes them so
//! - [`sysctl`]: settings that restored connections need
//! - [`fill`]: how full the kernel's table is
//! - [`timeouts`]: what the kernel gives a connection
//!
//! Everything concerns the network namespace of the thread that opens it.

pub mod addresses;
pub mod codec;
pub mod commit;
pub mod dump;
pub mod entries;
pub mod events;
pub mod fill;
pub mod filter;
pub mod local;
pub mod netlink;
pub mod queue;
pub mod sysctl;
pub mod timeouts;

/// Why the kernel does not do what we need.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KernelError {
    /// A capability is missing.
    NotPermitted {
        /// What was tried.
        doing: &'static str,
    },
    /// This kernel has no conntrack, or no netlink access to it.
    NoConntrack {
        /// What was tried.
        doing: &'static str,
    },
    /// Any other refusal.
    Refused {
        /// What was tried.
        doing: &'static str,
        /// The kernel's reason.
        errno: i32,
    },
    /// A sysctl cannot be read or written.
    Setting {
        /// Its name.
        name: &'static str,
        /// The kernel's reason.
        errno: i32,
    },
}

impl KernelError {
    fn new(doing: &'static str, error: &std::io::Error) -> KernelError {
        KernelError::from_errno(doing, error.raw_os_error().unwrap_or(libc::EIO))
    }

    fn last(doing: &'static str) -> KernelError {
        KernelError::new(doing, &std::io::Error::last_os_error())
    }

    fn from_errno(doing: &'static str, errno: i32) -> KernelError {
        match errno {
            libc::EPERM | libc::EACCES => KernelError::NotPermitted { doing },
            libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT => KernelError::NoConntrack { doing },
            errno => KernelError::Refused { doing, errno },
        }
    }
}

impl std::fmt::Display for KernelError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KernelError::NotPermitted { doing } => {
                write!(
                    f,
                    "cannot {doing}: CAP_NET_ADMIN is missing; run as root or grant it to the process"
                )
            }
            KernelError::NoConntrack { doing } => write!(
                f,
                "cannot {doing}: this kernel has no ctnetlink; load nf_conntrack and \
                 nf_conntrack_netlink, or use another source than 'kernel'"
            ),
            KernelError::Refused { doing, errno } => {
                let reason = std::io::Error::from_raw_os_error(*errno);
                write!(
                    f,
                    "cannot {doing}: {reason}; netlink may be closed to this process by seccomp or LSM"
                )
            }
            KernelError::Setting { name, errno } => {
                let reason = std::io::Error::from_raw_os_error(*errno);
                write!(
                    f,
                    "cannot access sysctl {name}: {reason}; set it in this network namespace \
                     yourself and run with '--sysctl leave'"
                )
            }
        }
    }
}

impl std::error::Error for KernelError {}
