//! Settings of the namespace, and what is said when something is missing.

use hypersync::conntrack::{KernelError, sysctl};

use super::*;

#[test]
fn settings_are_set_and_put_back() {
    in_namespace("conntrack settings", || {
        let [(events, _), (liberal, _)] = sysctl::NEEDED;
        assert_eq!(sysctl::unmet(), Ok(vec![(events, 2), (liberal, 0)]));
        let changed = sysctl::set_needed().expect("settings");
        assert_eq!(sysctl::unmet(), Ok(vec![]));
        assert_eq!(changed.old_values(), [(events, 2), (liberal, 0)]);
        assert_eq!(sysctl::set_needed().expect("settings").old_values(), []);
        assert_eq!(changed.put_back(), Ok(()));
        assert_eq!(sysctl::unmet(), Ok(vec![(events, 2), (liberal, 0)]));
        let fill = sysctl::TableFill::open().expect("figures");
        write_all(&mut Committer::open().expect("conntrack"), 0..10);
        assert_eq!(fill.limit_and_count().1, 10, "of this namespace");
        assert!(fill.room() < fill.limit_and_count().0);
    });
}

#[test]
fn without_the_capability_the_error_says_so() {
    in_namespace("errors without CAP_NET_ADMIN", || {
        // SAFETY: the bare system call changes this thread only, and no memory.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) }, 0);
        let errors = [Committer::open().err(), Source::open(0, 1, &[], BUFFER).err()];
        for error in errors {
            let error = error.expect("not permitted");
            assert!(matches!(error, KernelError::NotPermitted { .. }), "{error:?}");
            assert!(error.to_string().contains("CAP_NET_ADMIN is missing; run as root"), "{error}");
        }
    });
}
