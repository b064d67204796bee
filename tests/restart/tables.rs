//! When a start goes on with the table that lies there, and when it begins a new one.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use hypersync::shm::FILE;

use crate::common::member::{Lab, Member, SOON, hypersync, with};
use crate::common::wait_for;

/// Starts member 1, alone, and returns it with what it said of its table.
fn start(lab: &Lab, extra: &[&str]) -> (Member, String) {
    let words = with(lab.words(1, &[2]), &["--shards", "2"]);
    let (switches, pairs): (Vec<&str>, Vec<&str>) =
        extra.iter().partition(|word| **word == "--new-table");
    let mut words = with(words, &pairs);
    words.extend(switches.into_iter().map(str::to_owned));
    let log = lab.path("m1.log");
    let lines = || {
        fs::read_to_string(&log).unwrap_or_default().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let before = lines().len();
    let member = Member::start(lab, "m1", 1, hypersync(), &words);
    // The log is written a moment after the member can be read.
    wait_for("it says that it runs", SOON, || {
        lines()[before..].iter().any(|l| l.contains("slots each, sync"))
    });
    let said = lines().split_off(before).into_iter().find(|line| {
        line.contains("starting a new table: ") || line.contains("going on with table")
    });
    let said = said.unwrap_or_default();
    (member, said)
}

fn table_id(member: &Member) -> u32 {
    member.view().header().table_id
}

/// Overwrites a word of the region's header.
fn write(dir: &Path, word: u64, value: u64) {
    let file = fs::File::options().write(true).open(dir.join(FILE)).expect("it lies there");
    file.write_all_at(&value.to_ne_bytes(), 8 * word).expect("it is ours");
}

#[test]
fn a_killed_member_goes_on_with_its_table_unless_something_speaks_against_it() {
    let lab = Lab::new();
    let (mut member, said) = start(&lab, &[]);
    assert_eq!(said, "", "there was nothing to go on with");
    let mut id = table_id(&member);
    for _ in 0..3 {
        member.kill();
        let said;
        (member, said) = start(&lab, &[]);
        assert!(said.contains(&format!("going on with table {id:08x}")), "{said}");
        assert_eq!(table_id(&member), id);
        assert_eq!(member.view().header().pid, member.pid());
    }
    // What depends on no size may change.
    member.kill();
    (member, _) = start(&lab, &["--hold", "2s", "--priority", "7"]);
    assert_eq!(table_id(&member), id);

    for (extra, says) in [
        (&["--capacity", "40000"][..], "--capacity (slots a shard) was 11506 and is 22756"),
        (&["--new-table"], "--new-table asks for it"),
        (&["--shards", "1"], "--shards was 2 and is 1"),
        (&["--arena", "1048576"], "--arena was 524288 and is 1048576"),
        (&["--ring", "8192"], "--ring was 4096 and is 8192"),
        (&["--extras", "500"], "--extras (a shard) was 1439 and is 313"),
        (&["--group", "8"], "--group was 7 and is 8"),
    ] {
        member.kill();
        (member, _) = start(&lab, &["--new-table"]);
        id = table_id(&member);
        member.kill();
        let said;
        (member, said) = start(&lab, extra);
        assert!(said.ends_with(&format!("starting a new table: {says}")), "{said}");
        assert_ne!(table_id(&member), id, "{says}");
    }
}

#[test]
fn a_table_that_ended_or_is_of_another_boot_is_not_taken_up() {
    let lab = Lab::new();
    let (mut member, _) = start(&lab, &[]);
    let mut id = table_id(&member);
    member.signal(libc::SIGTERM);
    assert!(member.end(SOON).success());
    let said;
    (member, said) = start(&lab, &[]);
    assert!(
        said.ends_with("starting a new table: the old one ended when the member left the group"),
        "{said}"
    );
    assert_ne!(table_id(&member), id);

    id = table_id(&member);
    member.kill();
    write(&member.shm, 10, 0);
    let said;
    (member, said) = start(&lab, &[]);
    assert!(
        said.ends_with("starting a new table: the old one is of an earlier boot of this host"),
        "{said}"
    );
    assert_ne!(table_id(&member), id);

    id = table_id(&member);
    member.kill();
    write(&member.shm, 19, 0);
    let (member, said) = start(&lab, &[]);
    assert!(
        said.ends_with(
            "starting a new table: the old one was never ready, or could not be taken up"
        ),
        "{said}"
    );
    assert_ne!(table_id(&member), id);
}
