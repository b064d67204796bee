//! What becomes of claims that are refused, and of those that are given way to.

use std::time::Duration;

use super::*;
use crate::conn::Tuple;
use crate::group::view::{Member, Status, View};
use crate::memory::{MemorySize, OwnedMemory};
use crate::source::{CommitMode, SourceEvent};
use crate::sync::inbox::Refusal;
use crate::sync::stream::stream_index;
use crate::sync::{ReplicaConfig, test_config};

const NOW: Time = Time(1);

/// A shard that has a connection with traffic, whose backup is member 2; others are up to 4.
fn with_an_active(memory: &OwnedMemory, config: ReplicaConfig) -> (Replica<'_>, Connection, u32) {
    let mut view = View::new(config.member);
    let mut replica = Replica::new(config, memory.parts());
    for member in 2..=4 {
        let there =
            Member { status: Status::Ready, table_id: 7, shards: 1, room: 1, ..Member::default() };
        view.set(member, there);
    }
    replica.handle_view(NOW, &view);
    let original = Tuple::v4(6, ([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2));
    let state = State { tcp_state: 3, timeout_s: 300, ..State::default() };
    let connection = Connection::new(original, original.mirrored(), state);
    replica.handle_source(NOW, &SourceEvent::seen(connection));
    let slot = replica.ledger.find_original(&original).expect("it is held");
    replica.ledger.unlist(slot);
    replica.ledger.activate(slot);
    replica.ledger.amend(slot, |line| line.set_claimed(true));
    replica.assign(NOW, slot, Coordinate::new(2, 0, 5, Default::default()));
    (replica, connection, slot)
}

/// Seed 984000798: a refused claim was followed by another one and by a release, which came first.
/// There the connection was claimed with the same stamp: the release was taken for an echo, and the
/// claim of the higher member for a copy that nobody sent.
#[test]
fn a_release_after_a_refusal_is_above_an_equal_claim_of_a_lower_member() {
    for (member, is_above) in [(6, true), (1, false)] {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let config = ReplicaConfig { member, ..test_config() };
        let (mut replica, _, slot) = with_an_active(&memory, config);
        let line = replica.ledger.line(slot);
        let (backup, stamp) = (line.peer(), line.stamp());
        let stream = stream_index(backup.member(), 0);
        replica.transmit(NOW.after(Duration::from_millis(10)), usize::MAX);
        let refusal = Refusal {
            seq: replica.durable(stream).sent(),
            target: Place { slot: backup.slot(), generation: backup.generation() },
            reason: Reason::Superseded,
            own: Some(Place { slot, generation: line.generation() }),
        };
        replica.handle_refusal(NOW.after(Duration::from_millis(20)), stream, refusal);
        assert_eq!(
            replica.requests.released(backup),
            Some(if is_above { stamp.changed() } else { stamp }),
            "{member}"
        );
    }
}

/// Seeds 990000121 and 990000647: both members of a pair had claimed. The release of the higher
/// one, above both claims, came back to it with that stamp, for the copy of the one that had given
/// way, and ended its claim as well: nobody had the connection.
#[test]
fn who_gives_way_does_not_release_the_claim_that_it_gives_way_to() {
    let (backup, elsewhere) = (
        Coordinate::new(2, 0, 5, Default::default()),
        Coordinate::new(3, 0, 6, Default::default()),
    );
    for (from, is_back) in [(backup, true), (elsewhere, false)] {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let (mut replica, _, slot) = with_an_active(&memory, test_config());
        let line = replica.ledger.line(slot);
        let above = line.stamp().changed();
        let target = Place { slot, generation: line.generation() };
        let result = replica.apply_release(NOW, stream_index(from.member(), 0), target, above);
        assert!(matches!(result, Applied));
        assert_eq!(
            replica.requests.released(backup),
            Some(if is_back { line.stamp() } else { above }),
            "{from:?}"
        );
    }
}

/// Seed 983001239: it outlived that, and the next packet here raised the epoch for it, of a
/// connection that both agreed on; a claim at the backup at the same moment had the same stamp, and
/// was not told.
#[test]
fn a_contest_is_over_when_the_other_one_is_given_way_to() {
    let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
    let config = ReplicaConfig { member: 6, commit: CommitMode::Eager, ..test_config() };
    let (mut replica, connection, slot) = with_an_active(&memory, config);
    let generation = replica.ledger.line(slot).generation();
    let backup = replica.ledger.line(slot).peer();
    let epoch = replica.ledger.line(slot).stamp().epoch;
    let rival = Rival { stamp: Stamp { epoch, version: 1 }, place: backup };
    assert!(replica.contest(NOW, slot, Some(rival)));
    let target = Place { slot, generation };
    let above = Stamp { epoch: epoch + 1, version: 1 };
    let stream = stream_index(backup.member(), 0);
    let result = replica.apply_new(
        NOW,
        stream,
        &New { target, stamp: above, active: backup, previous: None, connection: &connection },
    );
    assert!(matches!(result, Applied));
    assert_eq!(replica.ledger.kind(slot), Kind::Backup);
    assert!(!replica.contests.has(slot, generation));
}

/// Seeds 980001502 and 980002006: an old claim was refused where the connection had gone on to
/// other epochs, and who had sent it was not told. Seeds 980004041 and 980006249: that one had the
/// previous copy, or was about to have a copy in another slot; 981000656: it had claimed in the
/// same epoch.
#[test]
fn who_comes_with_an_old_claim_is_told_whose_it_is_unless_it_has_a_copy_or_gets_one() {
    let backup = Coordinate::new(2, 0, 5, Default::default());
    let former = Coordinate::new(3, 0, 6, Default::default());
    let elsewhere = Coordinate::new(4, 0, 7, Default::default());
    let in_another_slot = Coordinate::new(2, 0, 8, Default::default());
    let own = Stamp { epoch: 21, version: 17 };
    let (older, of_the_epoch) =
        (Stamp { epoch: 19, version: 12 }, Stamp { epoch: 21, version: 12 });
    let cases = [
        (elsewhere, older, true),
        (elsewhere, own, true),
        (elsewhere, of_the_epoch, false),
        (backup, older, false),
        (former, older, false),
        (in_another_slot, older, false),
    ];
    let all = [CommitMode::Off, CommitMode::Eager]
        .into_iter()
        .flat_map(|commit| cases.map(|case| (commit, case)));
    for (commit, (from, stamp, is_told)) in all {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let config = ReplicaConfig { member: 6, commit, ..test_config() };
        let (mut replica, connection, slot) = with_an_active(&memory, config);
        replica.ledger.set_former(slot, former);
        replica.ledger.unassign(slot);
        replica.assign(NOW, slot, backup);
        replica.ledger.amend(slot, |line| line.set_stamp(own));
        let target = Place { slot, generation: replica.ledger.line(slot).generation() };
        let stream = stream_index(from.member(), 0);
        let result = replica.apply_new(
            NOW,
            stream,
            &New { target, stamp, active: from, previous: None, connection: &connection },
        );
        assert!(matches!(result, Refused(Reason::Superseded)));
        // With a kernel to ask, traffic decides about what may be another connection.
        let waits = commit == CommitMode::Eager && stamp != own;
        let generation = replica.ledger.line(slot).generation();
        assert_eq!(
            replica.requests.released(from).is_some(),
            is_told && !waits,
            "{commit:?} {from:?} {stamp:?}"
        );
        assert_eq!(
            replica.contests.has_rival(slot, generation),
            is_told && waits,
            "{commit:?} {from:?} {stamp:?}"
        );
    }
}

/// Traffic seed 996000891: while the members did not hear each other, the connection ended at one
/// of them, whose port was used again, and was claimed at the other, which saw no end. The dead one
/// had the higher epoch, and its copy overwrote the living one's entry.
#[test]
fn a_higher_epoch_from_elsewhere_says_nothing_unless_it_comes_from_a_copy_of_this_one() {
    let elsewhere = Coordinate::new(4, 0, 9, Default::default());
    for (own, outranks) in
        [(elsewhere, false), (Coordinate::new(2, 0, 5, Default::default()), true)]
    {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let config = ReplicaConfig { commit: CommitMode::Eager, ..test_config() };
        let (mut replica, connection, slot) = with_an_active(&memory, config);
        let stamp = Stamp { epoch: replica.ledger.line(slot).stamp().epoch + 2, version: 1 };
        let given = replica.give_way(NOW, slot, &connection, stamp, own, None);
        assert_eq!(given.is_ok(), outranks, "{own:?}");
        let generation = replica.ledger.line(slot).generation();
        assert_eq!(replica.contests.has(slot, generation), !outranks);
        if !outranks {
            let higher = Stamp { epoch: stamp.epoch + 1, version: 1 };
            let given = replica.give_way(NOW, slot, &connection, higher, own, None);
            assert!(given.is_ok(), "it has shown its traffic since");
        }
    }
}

/// Nobody's packets decide for ever: both would stay without a second copy.
#[test]
fn a_contest_of_epochs_that_no_packets_decide_the_stamp_decides_after_two_minutes() {
    let own = Coordinate::new(4, 0, 9, Default::default());
    let config = ReplicaConfig { commit: CommitMode::Eager, ..test_config() };
    for (is_higher, gives_way) in [(true, true), (false, false)] {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let (mut replica, connection, slot) = with_an_active(&memory, config.clone());
        let here = Stamp { epoch: 7, version: 1 };
        replica.ledger.amend(slot, |line| line.set_stamp(here));
        let stamp = Stamp { epoch: if is_higher { 9 } else { 6 }, version: 1 };
        for seconds in 0..=120 {
            let now = NOW.after(Duration::from_secs(seconds));
            let given = replica.give_way(now, slot, &connection, stamp, own, None);
            assert_eq!(given.is_ok(), gives_way && seconds == 120, "{seconds} {is_higher}");
        }
    }
}

/// Traffic seed 1570000035: a process stood still until events were lost, among them those of the
/// connection that had begun on the entry of a copy, here. The copy of one before it came in beside
/// that copy, and was written over the entry.
#[test]
fn a_copy_that_comes_in_beside_another_one_has_an_entry_that_is_doubted_as_that_ones_was() {
    for (beside, expected) in [(Written::Resumed, Written::Resumed), (Written::Yes, Written::No)] {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let config = ReplicaConfig { commit: CommitMode::Eager, ..test_config() };
        let (mut replica, mut connection, _) = with_an_active(&memory, config);
        connection.original.sport = 9;
        connection.reply = connection.original.mirrored();
        let stream = stream_index(2, 0);
        let take = |replica: &mut Replica<'_>, epoch: u32| {
            let slot = replica.ledger.allocate().expect("there is room");
            let session = replica.durable(stream).peer_session();
            replica.ledger.lend(slot, Coordinate::new(2, 0, 0, Default::default()), session);
            let target = Place { slot, generation: replica.ledger.line(slot).generation() };
            let active = Coordinate::new(2, 0, 10 + epoch, Default::default());
            let stamp = Stamp { epoch, version: 1 };
            let new = New { target, stamp, active, previous: None, connection: &connection };
            assert!(matches!(replica.apply_new(NOW, stream, &new), Applied));
            slot
        };
        let first = take(&mut replica, 8);
        replica.ledger.set_written(first, beside);
        let second = take(&mut replica, 14);
        assert_eq!(replica.ledger.written(second), expected);
    }
}

/// Traffic seed 1610003512: a third member had copies of two connections of one tuple, one after
/// the other, and told the active of the living one that it was outranked. What presumed the dead
/// one wrote its copy over that one's entry before the packets there had shown.
#[test]
fn who_was_outranked_looks_for_packets_before_a_copy_takes_its_entry() {
    let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
    let config = ReplicaConfig { commit: CommitMode::Eager, ..test_config() };
    let (mut replica, connection, slot) = with_an_active(&memory, config);
    let line = replica.ledger.line(slot);
    let above = Stamp { epoch: line.stamp().epoch + 1, version: 1 };
    let target = Place { slot, generation: line.generation() };
    let told = replica.apply_release(NOW, stream_index(2, 0), target, above);
    assert!(matches!(told, Applied));
    let held = replica.ledger.find_original(&connection.original).expect("it is held");
    let generation = replica.ledger.line(held).generation();
    for seconds in 0..6 {
        let now = NOW.after(Duration::from_secs(seconds));
        let mut entry = connection;
        entry.state.timeout_s -= seconds as u32;
        replica.handle_watch(now, held, generation, Some(&entry));
        let active = Coordinate::new(3, 0, 9, Default::default());
        let given = replica.give_way(now, held, &connection, above, active, None);
        match seconds {
            ..4 => assert!(matches!(given, Err(Refused(Reason::InDoubt))), "{seconds}"),
            4.. => assert!(matches!(given, Ok(false)), "{seconds}"),
        }
        if given.is_ok() {
            break;
        }
    }
    assert_eq!(replica.ledger.find_original(&connection.original), None, "it is the copy's");
}

#[test]
fn what_is_in_doubt_elsewhere_stays_with_who_presumes_it() {
    for (reason, stays) in [(Reason::InDoubt, true), (Reason::Superseded, false)] {
        let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
        let config = ReplicaConfig { commit: CommitMode::Eager, ..test_config() };
        let (mut replica, _, slot) = with_an_active(&memory, config);
        replica.ledger.amend(slot, |line| line.set_claimed(false));
        replica.ledger.set_former(slot, Coordinate::new(4, 0, 6, Default::default()));
        let line = replica.ledger.line(slot);
        let (backup, stream) = (line.peer(), stream_index(2, 0));
        replica.transmit(NOW.after(Duration::from_millis(10)), usize::MAX);
        let refusal = Refusal {
            seq: replica.durable(stream).sent(),
            target: Place { slot: backup.slot(), generation: backup.generation() },
            reason,
            own: Some(Place { slot, generation: line.generation() }),
        };
        replica.handle_refusal(NOW.after(Duration::from_millis(20)), stream, refusal);
        assert_eq!(replica.ledger.kind(slot) == Kind::Active, stays, "{reason:?}");
        if stays {
            assert_eq!(replica.ledger.first_backing_off(), Some(slot));
        }
    }
}
