//! What this kernel can do, found out by asking it.
//!
//! Version numbers lie (distributions backport, containers forbid), so nothing here looks
//! at one: a setup flag is tried and left out when refused, an operation is looked up in the
//! kernel's own list. Every switch can also be turned off by hand, so that the fallbacks
//! can be tested on any machine.

use io_uring::{IoUring, Probe, opcode};

use super::error::{RingError, errno_of};

/// What is used if the kernel has it. Only what Linux 6.1 may lack or a configuration may
/// refuse; the rest is required.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// Tell the kernel that one thread submits (6.0).
    pub single_issuer: bool,
    /// Let completions wait for us to ask for them (6.1; needs `single_issuer`).
    pub defer_taskrun: bool,
    /// No interrupts between processors for completions (5.19).
    pub coop_taskrun: bool,
    /// No index array before the submission entries (6.6).
    pub no_sqarray: bool,
    /// Deadlines instead of time spans in the wait (6.12).
    pub abs_timer: bool,
    /// Gather completions for a moment before waking up (6.12).
    pub min_wait: bool,
    /// Do not account the wait as waiting for I/O, which would show as pressure (6.15).
    pub no_iowait: bool,
    /// Wait for a word of shared memory (6.7). Without it the owner looks at short intervals.
    pub futex_wait: bool,
    /// Sends that do not copy (6.0).
    pub zero_copy: bool,
    /// One send for many datagrams (UDP_SEGMENT).
    pub gso: bool,
    /// One completion for many received datagrams (UDP_GRO).
    pub gro: bool,
}

impl Features {
    /// Everything, as far as the kernel has it.
    pub fn all() -> Features {
        Features {
            single_issuer: true,
            defer_taskrun: true,
            coop_taskrun: true,
            no_sqarray: true,
            abs_timer: true,
            min_wait: true,
            no_iowait: true,
            futex_wait: true,
            zero_copy: true,
            gso: true,
            gro: true,
        }
    }

    /// Nothing but what hypersync cannot do without.
    pub fn none() -> Features {
        Features {
            single_issuer: false,
            defer_taskrun: false,
            coop_taskrun: false,
            no_sqarray: false,
            abs_timer: false,
            min_wait: false,
            no_iowait: false,
            futex_wait: false,
            zero_copy: false,
            gso: false,
            gro: false,
        }
    }

    /// Drops the newest setup flag that is still wanted; false if none is left.
    fn drop_setup_flag(&mut self) -> bool {
        let newest_first = [
            &mut self.no_sqarray,
            &mut self.defer_taskrun,
            &mut self.single_issuer,
            &mut self.coop_taskrun,
        ];
        for flag in newest_first {
            if *flag {
                *flag = false;
                return true;
            }
        }
        false
    }
}

impl Default for Features {
    fn default() -> Features {
        Features::all()
    }
}

/// A ring with as many of `wanted` as the kernel grants, and which those are.
pub(super) fn build(
    submissions: u32,
    completions: u32,
    wanted: Features,
) -> Result<(IoUring, Features), RingError> {
    let mut features = wanted;
    features.defer_taskrun &= features.single_issuer;
    let ring = loop {
        match attempt(submissions, completions, &features) {
            Ok(ring) => break ring,
            Err(error) if errno_of(&error) == libc::EINVAL && features.drop_setup_flag() => {}
            Err(error) => return Err(RingError::refused(&error)),
        }
    };
    let mut probe = Probe::new();
    if let Err(error) = ring.submitter().register_probe(&mut probe) {
        return Err(RingError::register("a probe", 0, &error));
    }
    let required = [
        (opcode::RecvMsgMulti::CODE, "RECVMSG"),
        (opcode::WriteFixed::CODE, "WRITE_FIXED"),
        (opcode::Send::CODE, "SEND"),
        (opcode::PollAdd::CODE, "POLL_ADD"),
        (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
    ];
    for (code, what) in required {
        if !probe.is_supported(code) {
            return Err(RingError::missing(what));
        }
    }
    let parameters = ring.params();
    if !parameters.is_feature_ext_arg() {
        return Err(RingError::missing("wait with a timeout (EXT_ARG)"));
    }
    features.futex_wait &= probe.is_supported(opcode::FutexWait::CODE);
    features.zero_copy &= probe.is_supported(opcode::SendZc::CODE);
    features.min_wait &= parameters.is_feature_min_timeout();
    // ABS_TIMER has no feature bit of its own; it came in the same release as this one.
    features.abs_timer &= parameters.is_feature_min_timeout();
    features.no_iowait &= parameters.is_feature_no_iowait();
    Ok((ring, features))
}

fn attempt(submissions: u32, completions: u32, features: &Features) -> std::io::Result<IoUring> {
    let mut builder = IoUring::builder();
    // Without SUBMIT_ALL one bad operation would stop the rest of its batch.
    builder.setup_submit_all().setup_cqsize(completions).dontfork();
    if features.single_issuer {
        builder.setup_single_issuer();
    }
    if features.defer_taskrun {
        builder.setup_defer_taskrun();
    }
    if features.coop_taskrun {
        builder.setup_coop_taskrun();
    }
    if features.coop_taskrun || features.defer_taskrun {
        builder.setup_taskrun_flag();
    }
    if features.no_sqarray {
        builder.setup_no_sqarray();
    }
    builder.build(submissions)
}
