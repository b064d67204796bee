//! What a receiver does: the table of docs/PROTOCOL.md, row by row.
//!
//! Every state that a slot can be in meets every delta of member 2's stream; what comes of it is
//! the delta's result, what the slot is afterwards, and how many lives it has gone on.

use super::*;
use crate::ccp::message::Ended;
use crate::ccp::message::Reason::{NotHere, NotLeased, Superseded};
use crate::conn::Kind::{Active, Backup, Closing, Free, Held, Leased};
use crate::conn::slot::groups;
use crate::conn::{Connection, Coordinate, Extra, Kind, Stamp, State, Tuple};
use crate::group::view::{Member, Status, View};
use crate::memory::{MemorySize, OwnedMemory};
use crate::source::End;
use crate::sync::delta::DeltaResult::{self, Applied, Refused};
use crate::sync::delta::New;
use crate::sync::stream::stream_index;
use crate::sync::test_config;

const NOW: Time = Time(1);
/// Where the sender has the connection, or its copy of ours.
const SENDERS: u32 = 5;
/// The stamp of whatever is in the slot.
const HERE: Stamp = Stamp { epoch: 4, version: 5 };
const LOWER: Stamp = Stamp { epoch: 4, version: 4 };
const HIGHER: Stamp = Stamp { epoch: 4, version: 6 };
const CLAIMED: Stamp = Stamp { epoch: 5, version: 1 };
const EARLIER: Stamp = Stamp { epoch: 3, version: 9 };

/// What is in the slot.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Is {
    LeasedToIt,
    LeasedToAnother,
    Free,
    Held,
    /// A copy of the sender's, of this connection, or of another one.
    ItsCopy,
    ItsCopyOfAnother,
    /// A copy of member 3's.
    AnothersCopy,
    /// Active with traffic; its backup is at the sender.
    OursWithIt,
    /// The same; its backup is at member 3.
    OursWithAnother,
    /// Taken over from the sender.
    PresumedFromIt,
    Closing,
}

/// What the sender says.
#[derive(Clone, Copy, Debug)]
enum Says {
    New(Stamp),
    Update(Stamp),
    Close(Stamp),
    Release(Stamp),
}

use Says::{Close, New as SaysNew, Release, Update};

fn connection(port: u16) -> Connection {
    let original = Tuple::v4(6, ([10, 0, 0, 1].into(), port), ([10, 0, 0, 2].into(), 80));
    let state = State { tcp_state: 3, timeout_s: 300, ..State::default() };
    Connection::new(original, original.mirrored(), state)
}

fn place(member: u8) -> Coordinate {
    Coordinate::new(member, 0, SENDERS, Default::default())
}

/// A shard with such a slot.
fn replica_with(memory: &OwnedMemory, is: Is) -> (Replica<'_>, u32) {
    let mut replica = Replica::new(test_config(), memory.parts());
    let mut view = View::new(1);
    for member in 2..=3 {
        let there =
            Member { status: Status::Ready, table_id: 7, shards: 1, room: 1, ..Member::default() };
        view.set(member, there);
    }
    replica.handle_view(NOW, &view);
    let ours = |replica: &mut Replica<'_>| {
        let slot = replica.ledger.open(&connection(1), None, false).expect("there is room");
        replica.ledger.amend(slot, |line| line.set_stamp(HERE));
        slot
    };
    let active = |replica: &mut Replica<'_>, backup: Coordinate| {
        let slot = ours(replica);
        replica.ledger.activate(slot);
        replica.ledger.amend(slot, |line| line.set_claimed(true));
        replica.assign(NOW, slot, backup);
        slot
    };
    let leased = |replica: &mut Replica<'_>, member: u8| {
        let slot = replica.ledger.allocate().expect("there is room");
        let session = replica.durable(stream_index(member, 0)).peer_session();
        replica.ledger.lend(slot, Coordinate::new(member, 0, 0, Default::default()), session);
        slot
    };
    let copy = |replica: &mut Replica<'_>, of: Coordinate, port: u16| {
        let slot = leased(replica, of.member());
        let nobody = Coordinate::NOWHERE;
        replica.ledger.fill_copy(slot, (of, HERE), false, nobody, &connection(port));
        replica.begin_copy(slot);
        slot
    };
    let slot = match is {
        Is::LeasedToIt => leased(&mut replica, 2),
        Is::LeasedToAnother => leased(&mut replica, 3),
        Is::Free => {
            let slot = leased(&mut replica, 2);
            replica.ledger.free(slot);
            slot
        }
        Is::Held => ours(&mut replica),
        Is::ItsCopy => copy(&mut replica, place(2), 1),
        Is::ItsCopyOfAnother => copy(&mut replica, place(2), 9),
        Is::AnothersCopy => copy(&mut replica, place(3), 1),
        Is::OursWithIt => active(&mut replica, place(2)),
        Is::OursWithAnother => active(&mut replica, place(3)),
        Is::PresumedFromIt => {
            let slot = ours(&mut replica);
            replica.ledger.activate(slot);
            replica.ledger.set_former(slot, place(2));
            assert!(replica.is_presumed(slot));
            slot
        }
        Is::Closing => {
            let slot = active(&mut replica, place(2));
            replica.ledger.begin_closing(slot, NOW, End::Seen);
            slot
        }
    };
    (replica, slot)
}

/// The result, what the slot is, and the lives that have gone by.
fn outcome(is: Is, says: Says, is_in_this_life: bool) -> (DeltaResult, Kind, u32) {
    let memory = OwnedMemory::new(&MemorySize::new(64, 512 << 10));
    let (mut replica, slot) = replica_with(&memory, is);
    let before = replica.ledger.line(slot).generation();
    let generation = if is_in_this_life { before } else { before.next() };
    let (stream, target) = (stream_index(2, 0), Place { slot, generation });
    let sent = connection(1);
    let result = match says {
        SaysNew(stamp) => {
            let new = New { target, stamp, active: place(2), previous: None, connection: &sent };
            replica.apply_new(NOW, stream, &new)
        }
        Update(stamp) => {
            let value = (&sent.state, &Extra::NONE);
            replica.apply_update(stream, target, stamp, groups::STATE, None, value)
        }
        Close(stamp) => replica.apply_close(NOW, stream, target, stamp, Ended::Seen),
        Release(stamp) => replica.apply_release(NOW, stream, target, stamp),
    };
    assert_eq!(replica.check_sums(), Ok(()), "{is:?} {says:?}");
    let line = replica.ledger.line(slot);
    let mut lives = 0;
    let mut at = before;
    while at != line.generation() {
        (at, lives) = (at.next(), lives + 1);
        assert!(lives < 5, "{is:?} {says:?}: far more lives");
    }
    (result, line.kind(), lives)
}

#[test]
fn a_receiver_does_what_the_table_says() {
    let stays = |kind| (Applied, kind, 0);
    let no = |reason, kind| (Refused(reason), kind, 0);
    // (is, says, what comes of it)
    let table = [
        (Is::LeasedToIt, SaysNew(HERE), stays(Backup)),
        (Is::LeasedToIt, Update(HERE), no(NotHere, Leased)),
        (Is::LeasedToIt, Close(HERE), (Applied, Leased, 1)),
        (Is::LeasedToIt, Release(HERE), (Applied, Free, 2)),
        (Is::LeasedToAnother, SaysNew(HERE), no(NotLeased, Leased)),
        (Is::LeasedToAnother, Update(HERE), no(NotHere, Leased)),
        (Is::LeasedToAnother, Close(HERE), stays(Leased)),
        (Is::LeasedToAnother, Release(HERE), stays(Leased)),
        (Is::Free, SaysNew(HERE), no(NotLeased, Free)),
        (Is::Free, Update(HERE), no(NotHere, Free)),
        (Is::Free, Close(HERE), stays(Free)),
        (Is::Free, Release(HERE), stays(Free)),
        (Is::Held, SaysNew(CLAIMED), no(NotLeased, Held)),
        (Is::Held, Update(CLAIMED), no(NotHere, Held)),
        (Is::Held, Close(CLAIMED), stays(Held)),
        (Is::Held, Release(CLAIMED), stays(Held)),
        (Is::ItsCopy, SaysNew(HIGHER), stays(Backup)),
        (Is::ItsCopy, SaysNew(LOWER), stays(Backup)),
        (Is::ItsCopy, Update(HIGHER), stays(Backup)),
        (Is::ItsCopy, Update(LOWER), stays(Backup)),
        (Is::ItsCopy, Close(HIGHER), (Applied, Leased, 1)),
        (Is::ItsCopy, Release(HERE), (Applied, Free, 3)),
        (Is::ItsCopy, Release(LOWER), stays(Backup)),
        (Is::ItsCopyOfAnother, SaysNew(CLAIMED), no(NotLeased, Backup)),
        (Is::ItsCopyOfAnother, Update(HIGHER), stays(Backup)),
        (Is::ItsCopyOfAnother, Close(HIGHER), (Applied, Leased, 1)),
        (Is::ItsCopyOfAnother, Release(HERE), (Applied, Free, 3)),
        (Is::AnothersCopy, SaysNew(HIGHER), stays(Backup)),
        (Is::AnothersCopy, SaysNew(LOWER), no(Superseded, Backup)),
        (Is::AnothersCopy, SaysNew(HERE), no(Superseded, Backup)),
        (Is::AnothersCopy, Update(HIGHER), no(NotHere, Backup)),
        (Is::AnothersCopy, Close(HIGHER), stays(Backup)),
        (Is::AnothersCopy, Release(HIGHER), stays(Backup)),
        (Is::OursWithIt, SaysNew(CLAIMED), stays(Backup)),
        (Is::OursWithIt, SaysNew(HIGHER), stays(Backup)),
        (Is::OursWithIt, SaysNew(LOWER), no(Superseded, Active)),
        (Is::OursWithIt, Update(LOWER), stays(Active)),
        (Is::OursWithIt, Update(HIGHER), no(NotHere, Active)),
        (Is::OursWithIt, Close(HIGHER), (Applied, Leased, 1)),
        (Is::OursWithIt, Close(LOWER), stays(Active)),
        (Is::OursWithIt, Release(HIGHER), (Applied, Free, 3)),
        (Is::OursWithIt, Release(LOWER), stays(Active)),
        (Is::OursWithAnother, SaysNew(CLAIMED), stays(Backup)),
        (Is::OursWithAnother, SaysNew(LOWER), no(Superseded, Active)),
        (Is::OursWithAnother, Update(LOWER), no(NotHere, Active)),
        (Is::OursWithAnother, Close(CLAIMED), (Applied, Free, 3)),
        (Is::OursWithAnother, Release(CLAIMED), (Applied, Free, 3)),
        (Is::OursWithAnother, Release(EARLIER), stays(Active)),
        (Is::PresumedFromIt, SaysNew(HERE), stays(Backup)),
        (Is::PresumedFromIt, SaysNew(LOWER), no(Superseded, Active)),
        (Is::PresumedFromIt, Update(LOWER), stays(Active)),
        (Is::PresumedFromIt, Close(LOWER), (Applied, Leased, 1)),
        (Is::PresumedFromIt, Close(EARLIER), stays(Active)),
        (Is::PresumedFromIt, Release(LOWER), (Applied, Free, 3)),
        (Is::PresumedFromIt, Release(EARLIER), stays(Active)),
        (Is::Closing, SaysNew(CLAIMED), no(NotLeased, Closing)),
        (Is::Closing, Update(CLAIMED), no(NotHere, Closing)),
        (Is::Closing, Close(CLAIMED), stays(Closing)),
        (Is::Closing, Release(CLAIMED), stays(Closing)),
    ];
    for (is, says, expected) in table {
        assert_eq!(outcome(is, says, true), expected, "{is:?} {says:?}");
    }
}

/// Place and generation say which connection is meant.
#[test]
fn what_is_for_another_life_of_the_slot_changes_nothing() {
    for is in [
        Is::LeasedToIt,
        Is::LeasedToAnother,
        Is::Free,
        Is::Held,
        Is::ItsCopy,
        Is::AnothersCopy,
        Is::OursWithIt,
        Is::PresumedFromIt,
        Is::Closing,
    ] {
        for says in [SaysNew(CLAIMED), Update(CLAIMED), Close(CLAIMED), Release(CLAIMED)] {
            let (result, _, lives) = outcome(is, says, false);
            let expected = match says {
                SaysNew(_) => Refused(NotLeased),
                Update(_) => Refused(NotHere),
                Close(_) | Release(_) => Applied,
            };
            assert_eq!((result, lives), (expected, 0), "{is:?} {says:?}");
        }
    }
}
