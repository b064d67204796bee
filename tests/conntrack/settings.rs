//! Settings of the namespace, and what is said when something is missing.

use std::sync::atomic::AtomicU64;

use hypersync::conntrack::{KernelError, sysctl};
use hypersync::shm::old_values::{OLD_VALUES_WORDS, OldValues};

use super::*;

#[test]
fn settings_are_set_and_put_back() {
    in_namespace("conntrack settings", || {
        let [(events, _), (liberal, _)] = sysctl::NEEDED;
        assert_eq!(sysctl::unmet(), Ok(vec![(events, 2), (liberal, 0)]));
        let words = [const { AtomicU64::new(0) }; OLD_VALUES_WORDS];
        let record = OldValues::new(&words);
        let noted = || [record.get(0), record.get(1)];
        let changed = sysctl::set_needed(record).expect("settings");
        assert_eq!((sysctl::unmet(), noted()), (Ok(vec![]), [Some(2), Some(0)]));
        // Killed: the next run knows what they were.
        drop(changed);
        let changed = sysctl::set_needed(record).expect("settings");
        assert_eq!((sysctl::unmet(), noted()), (Ok(vec![]), [Some(2), Some(0)]));
        assert_eq!(changed.put_back(), Ok(()));
        assert_eq!((sysctl::unmet(), noted()), (Ok(vec![(events, 2), (liberal, 0)]), [None, None]));
        // Killed again, and then one is set by hand: that counts.
        drop(sysctl::set_needed(record).expect("settings"));
        sysctl::write(events, 0).expect("settings");
        sysctl::set_needed(record).expect("settings").put_back().expect("settings");
        assert_eq!(sysctl::unmet(), Ok(vec![(events, 0), (liberal, 0)]));
        // What is as it should be is nobody's business; what was noted elsewhere does not count
        // here.
        sysctl::write(events, 1).expect("settings");
        record.begin(record.namespace() + 1);
        record.set(0, Some(2));
        sysctl::set_needed(record).expect("settings").put_back().expect("settings");
        assert_eq!(sysctl::unmet(), Ok(vec![(liberal, 0)]));
        let fill = hypersync::conntrack::fill::TableFill::open().expect("figures");
        write_all(&mut Committer::open().expect("conntrack"), 0..10);
        assert_eq!(fill.limit_and_count().1, 10, "of this namespace");
        assert!(fill.room() < fill.limit_and_count().0);
    });
}

#[test]
fn a_setting_that_cannot_be_written_is_not_recorded_as_changed() {
    in_namespace("settings that may not be written", || {
        let words = [const { AtomicU64::new(0) }; OLD_VALUES_WORDS];
        let record = OldValues::new(&words);
        // SAFETY: the bare system call changes this thread only, and no memory.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) }, 0);
        assert!(matches!(sysctl::set_needed(record), Err(KernelError::Setting { .. })));
        assert_eq!([record.get(0), record.get(1)], [None, None], "there is nothing to put back");
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
