//! Who is asked for, when, and what the answers bring about; without a kernel.

use std::net::Ipv4Addr;

use super::*;
use crate::conn::extra::{Extra, SeqAdj};
use crate::conn::{State, Tuple};
use crate::limits::ARENA_MIN;
use crate::memory::{MemorySize, OwnedMemory};
use crate::source::CommitMode;
use crate::sync::{ReplicaConfig, test_config};

const NOW: Time = Time(1_000_000_000);
const SLOTS: usize = 4096;

/// A translated connection, with a helper.
fn helped(n: u16) -> Connection {
    let original = Tuple::v4(6, (Ipv4Addr::new(10, 0, 0, 1), n), (Ipv4Addr::new(10, 0, 0, 2), 21));
    let reply =
        Tuple { dst: u32::from(Ipv4Addr::new(203, 0, 113, 1)) as u128, ..original.mirrored() };
    let state = State { status: 0x19e, tcp_state: 3, timeout_s: 300, ..State::default() };
    let mut extra = Extra { parts: parts::HELPER, ..Extra::NONE };
    extra.helper[..3].copy_from_slice(b"ftp");
    Connection { extra, ..Connection::new(original, reply, state) }
}

/// The same, shifted.
fn shifted(n: u16, by: u32) -> Connection {
    let mut connection = helped(n);
    connection.state.status |= status::SEQ_ADJUST;
    connection.extra.parts |= parts::SEQADJ;
    connection.extra.seqadj[0] =
        SeqAdj { correction_position: 1000 * by, offset_before: 0, offset_after: by };
    connection
}

struct World<'m> {
    replica: Replica<'m>,
    shifts: Shifts,
    counters: Counters<'m>,
}

impl<'m> World<'m> {
    fn new(memory: &'m OwnedMemory) -> World<'m> {
        let config = ReplicaConfig {
            hold: Duration::from_secs(1),
            commit: CommitMode::Eager,
            ..test_config()
        };
        let counters = Counters::new(memory.parts().counters);
        World {
            replica: Replica::new(config, memory.parts()),
            shifts: Shifts::new(SLOTS as u32),
            counters,
        }
    }

    /// An event, as the feed acts on it.
    fn event(&mut self, now: Time, connection: Connection) {
        self.replica.handle_source(now, &SourceEvent::seen(connection));
        self.shifts.saw(now, &connection, &self.replica);
    }

    /// The ports of those that are asked for up to this time, in passes as they are announced.
    fn asked(&mut self, from: Time, to: Time) -> Vec<u16> {
        let (mut now, mut asked) = (from, Vec::new());
        while now <= to {
            while let Some((slot, _)) = self.shifts.next_look(now, &self.replica) {
                asked.push(self.replica.table().tuples(slot).0.sport);
            }
            let next = self.shifts.wake_at();
            assert!(next > now, "it would be looked at again at once");
            now = next;
        }
        asked
    }

    fn answer(&mut self, now: Time, there: &Connection) {
        let slot = self.replica.table().find_original(&there.original).expect("it was told");
        let generation = self.replica.table().line(slot).generation();
        self.shifts.found(now, (slot, generation), there, &mut self.replica, &self.counters);
    }

    fn extra(&self, n: u16) -> Extra {
        let slot = self.replica.table().find_original(&helped(n).original).expect("it was told");
        self.replica.table().extra(slot)
    }
}

fn after(ms: u64) -> Time {
    NOW.after(Duration::from_millis(ms))
}

fn memory() -> OwnedMemory {
    OwnedMemory::new(&MemorySize { extras: SLOTS, ..MemorySize::new(SLOTS, ARENA_MIN) })
}

#[test]
fn what_has_a_helper_and_is_translated_is_asked_for_once_a_second_and_nobody_else() {
    let memory = memory();
    let mut world = World::new(&memory);
    let mut untranslated = helped(2);
    untranslated.reply = untranslated.original.mirrored();
    let plain = Connection { extra: Extra::NONE, ..helped(3) };
    for connection in [helped(1), untranslated, plain] {
        world.event(NOW, connection);
    }
    assert_eq!(world.asked(NOW, after(999)), []);
    assert_eq!(world.asked(after(1000), after(4500)), [1, 1, 1, 1]);
    world.replica.handle_source(after(4500), &SourceEvent::gone(helped(1).original));
    assert_eq!(world.asked(after(4500), after(9000)), []);
    assert_eq!(world.shifts.wake_at(), Time::NEVER, "nobody has a helper");
}

#[test]
fn an_expectation_and_an_event_of_one_that_is_shifted_make_it_be_asked_for_soon() {
    let memory = memory();
    let mut world = World::new(&memory);
    for n in 1..=3 {
        world.event(NOW, helped(n));
    }
    for n in [2, 2, 3] {
        world.shifts.expected(NOW, &helped(n).original, &world.replica);
    }
    assert_eq!(world.asked(NOW, after(1)), [], "the helper has not shifted yet");
    assert_eq!(world.asked(after(2), after(2)), [2, 3]);
    // An event that says that it is shifted and not by how much; one that does say.
    let mut closing = helped(1);
    closing.state.status |= status::SEQ_ADJUST;
    world.event(after(3), closing);
    world.event(after(3), shifted(3, 7));
    assert_eq!(world.asked(after(3), after(3)), [1], "before the change travels");
}

#[test]
fn the_answer_is_news_once() {
    let memory = memory();
    let mut world = World::new(&memory);
    world.event(NOW, helped(1));
    world.answer(NOW, &helped(1));
    assert_eq!((world.extra(1), world.counters.get(Counter::Shifts)), (helped(1).extra, 0));
    for there in [shifted(1, 2), shifted(1, 2), shifted(1, 4)] {
        world.answer(NOW, &there);
        assert_eq!(world.extra(1), there.extra);
    }
    assert_eq!(world.counters.get(Counter::Shifts), 2);
    // Another connection has its name by now.
    let mut other = shifted(1, 9);
    other.reply.dport += 1;
    world.answer(NOW, &other);
    assert_eq!(world.extra(1), shifted(1, 4).extra);
}

#[test]
fn of_more_expectations_than_can_wait_none_is_forgotten() {
    let memory = memory();
    let mut world = World::new(&memory);
    let many = DUE_MAX as u16 + 100;
    for n in 0..many {
        world.event(NOW, helped(n));
    }
    // The walk of before is over, and the next one is not due for long.
    world.asked(NOW, after(1000));
    let (begun, end) = (world.shifts.begun, world.shifts.begun.after(Duration::from_secs(4)));
    let mut walked = world.asked(begun, end);
    walked.sort_unstable();
    walked.dedup();
    assert_eq!(walked.len(), many as usize, "500 a second");
    let now = end;
    for n in 0..many {
        world.shifts.expected(now, &helped(n).original, &world.replica);
    }
    let mut asked = world.asked(now, now.after(Duration::from_secs(4)));
    asked.sort_unstable();
    asked.dedup();
    assert_eq!(asked.len(), many as usize);
}
