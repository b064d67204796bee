//! What a sweep asks for, and what the answers bring about; without a kernel.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::*;
use crate::conn::{State, Tuple};
use crate::limits::ARENA_MIN;
use crate::memory::{MemorySize, OwnedMemory};
use crate::sync::{ReplicaConfig, test_config};

const NOW: Time = Time(1_000_000_000);

fn connection(n: u16, tcp_state: u8) -> Connection {
    let original = Tuple::v4(6, (Ipv4Addr::new(10, 0, 0, 1), n), (Ipv4Addr::new(10, 0, 0, 2), 80));
    let state = State { status: 0xe, tcp_state, timeout_s: 300, ..State::default() };
    Connection::new(original, original.mirrored(), state)
}

fn replica(memory: &OwnedMemory) -> Replica<'_> {
    let config =
        ReplicaConfig { hold: Duration::from_secs(1), commit: CommitMode::Eager, ..test_config() };
    Replica::new(config, memory.parts())
}

/// A shard with ten connections, and their slots.
fn ten(replica: &mut Replica<'_>) -> Vec<u32> {
    for n in 0..10 {
        replica.handle_source(NOW, &SourceEvent::seen(connection(n, 3)));
    }
    let slot = |n| replica.table().find_original(&connection(n, 3).original).expect("it was told");
    (0..10).map(slot).collect()
}

#[test]
fn a_sweep_asks_for_what_the_dump_did_not_show_and_believes_the_answer_only() {
    let memory = OwnedMemory::new(&MemorySize::new(64, ARENA_MIN));
    let mut replica = replica(&memory);
    let slots = ten(&mut replica);
    let mut repair = Repair::new(64, false, false, CommitMode::Eager, &Timeouts::told(&|_| None));
    slots[..7].iter().for_each(|slot| set(&mut repair.shown, *slot));
    repair.stage = RepairStage::Sweeping(0);
    repair.sweep(NOW, 0, &replica);
    assert!(repair.stage == RepairStage::Idle);
    let asked: Vec<_> = std::iter::from_fn(|| repair.next_look(&replica)).collect();
    assert_eq!(asked.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), slots[7..]);
    // One is there, in another state; one is gone; one ended and its slot is used again before the
    // answer comes.
    repair.found(
        NOW,
        (asked[0].0, asked[0].1),
        Some(&connection(7, 5)),
        &mut Leaving::new(),
        &mut replica,
    );
    assert_eq!(replica.table().line(asked[0].0).state().tcp_state, 5);
    repair.found(NOW, (asked[1].0, asked[1].1), None, &mut Leaving::new(), &mut replica);
    assert_eq!(replica.table().find_original(&connection(8, 3).original), None);
    replica.handle_source(NOW, &SourceEvent::gone(connection(9, 3).original));
    replica.handle_source(NOW, &SourceEvent::seen(connection(99, 3)));
    repair.found(NOW, (asked[2].0, asked[2].1), None, &mut Leaving::new(), &mut replica);
    assert!(replica.table().find_original(&connection(99, 3).original).is_some());
}

/// When all that raises no events is asked for in one long period.
fn long_after_the_start() -> Repair {
    let mut repair = Repair::new(64, true, false, CommitMode::Eager, &Timeouts::told(&|_| None));
    repair.unheard_period = UNHEARD_PERIOD;
    repair
}

#[test]
fn what_was_opening_at_the_start_and_raises_no_events_is_looked_up_soon() {
    let memory = OwnedMemory::new(&MemorySize::new(64, ARENA_MIN));
    let mut replica = replica(&memory);
    let slots = ten(&mut replica);
    let opening = connection(40, 2);
    replica.handle_source(NOW, &SourceEvent::seen(opening));
    let opening = replica.table().find_original(&opening.original).expect("it has a slot");
    let mut repair = Repair::new(64, true, false, CommitMode::Eager, &Timeouts::told(&|_| None));
    repair.complete = true;
    slots.iter().chain([&opening]).for_each(|slot| set(&mut repair.unheard, *slot));
    let mut rounds = Vec::new();
    while rounds.len() < 8 {
        let at = repair.unheard_at;
        repair.ask_for_the_unheard(at, &replica);
        let asked: Vec<u32> =
            std::iter::from_fn(|| repair.next_look(&replica)).map(|(slot, _)| slot).collect();
        rounds.push((repair.unheard_at.since(at).as_secs(), asked.len(), asked.contains(&opening)));
    }
    let soon = [1, 2, 4, 8, 16, 32].map(|pause| (pause, 1, true));
    assert_eq!(rounds[..6], soon);
    assert_eq!(rounds[6..], [(60, 11, true); 2]);
}

#[test]
fn of_more_look_ups_than_can_wait_none_is_left_out() {
    let memory = OwnedMemory::new(&MemorySize::new(64, ARENA_MIN));
    let mut replica = replica(&memory);
    let slots = ten(&mut replica);
    let mut repair = long_after_the_start();
    slots.iter().for_each(|slot| set(&mut repair.unheard, *slot));
    let generation = replica.table().line(slots[0]).generation();
    repair.looks.extend(std::iter::repeat_n((slots[0], generation), LOOKS_MAX - 4));
    repair.ask_for_the_unheard(NOW, &replica);
    assert_eq!((repair.looks_waiting(), repair.unheard_at), (LOOKS_MAX, NOW.after(BATCH_PAUSE)));
    repair.looks.drain(..LOOKS_MAX - 4);
    repair.ask_for_the_unheard(repair.unheard_at, &replica);
    let mut asked: Vec<u32> = repair.looks.iter().map(|(slot, _)| *slot).collect();
    asked.sort_unstable();
    let mut expected = slots.clone();
    expected.sort_unstable();
    assert_eq!(asked, expected);
    assert!(repair.unheard_at > NOW.after(UNHEARD_PERIOD));
}

#[test]
fn an_answer_tells_a_timeout_only_of_another_state() {
    let memory = OwnedMemory::new(&MemorySize::new(64, ARENA_MIN));
    let mut replica = replica(&memory);
    let slot = ten(&mut replica)[0];
    let generation = replica.table().line(slot).generation();
    let mut repair = Repair::new(64, false, false, CommitMode::Eager, &Timeouts::told(&|_| None));
    // Run down; closing, with the time of that state; and a flow that is offloaded, of which the
    // state is not told.
    for (tcp_state, timeout_s, expected) in
        [(3, 100, (3, 300)), (3, 400, (3, 300)), (5, 60, (5, 60)), (0, 0, (5, 60))]
    {
        let mut there = connection(0, tcp_state);
        there.state.timeout_s = timeout_s;
        repair.found(NOW, (slot, generation), Some(&there), &mut Leaving::new(), &mut replica);
        let state = replica.table().line(slot).state();
        assert_eq!((state.tcp_state, state.timeout_s), expected);
    }
}

#[test]
fn events_lost_during_a_sweep_bring_another_dump() {
    let memory = OwnedMemory::new(&MemorySize::new(64, ARENA_MIN));
    let replica = replica(&memory);
    let mut repair = Repair::new(64, false, false, CommitMode::Eager, &Timeouts::told(&|_| None));
    repair.stage = RepairStage::Sweeping(0);
    repair.want();
    repair.sweep(NOW, 0, &replica);
    assert!(repair.stage == RepairStage::Wanted && repair.wake_at(NOW) == NOW.after(DUMP_PAUSE));
}

#[test]
fn connections_that_raise_no_events_are_looked_up_once_a_period() {
    let memory = OwnedMemory::new(&MemorySize::new(64, ARENA_MIN));
    let mut replica = replica(&memory);
    let slots = ten(&mut replica);
    let mut repair = long_after_the_start();
    slots[..4].iter().for_each(|slot| set(&mut repair.unheard, *slot));
    replica.handle_source(NOW, &SourceEvent::gone(connection(3, 3).original));
    repair.ask_for_the_unheard(NOW, &replica);
    assert_eq!(repair.unheard_at, NOW.after(UNHEARD_PERIOD));
    let asked: Vec<_> = std::iter::from_fn(|| repair.next_look(&replica)).collect();
    assert_eq!(asked.len(), 3, "one is gone");
    repair.found(NOW, (asked[0].0, asked[0].1), None, &mut Leaving::new(), &mut replica);
    repair.ask_for_the_unheard(repair.unheard_at, &replica);
    assert_eq!(repair.looks_waiting(), 2);
}

/// Traffic seed 1000008503: a gateway had a connection of its own, and gave way to another one's
/// with another translation, whose copy its entry was in the way of. That one ended; its packets
/// were here by then, and passed an entry that nobody had.
#[test]
fn an_entry_with_packets_that_was_in_the_way_of_a_copy_is_a_connection() {
    for (there, is_one) in [(connection(1, 3), true), (connection(1, 7), false)] {
        let memory = OwnedMemory::new(&MemorySize::new(64, ARENA_MIN));
        let mut replica = replica(&memory);
        let mut repair =
            Repair::new(64, true, false, CommitMode::Eager, &Timeouts::told(&|_| None));
        repair.found_besides(NOW, &there, &mut replica);
        let slot = replica.table().find_original(&there.original);
        assert_eq!(slot.is_some(), is_one);
        if let Some(slot) = slot {
            assert!(is_set(&repair.unheard, slot), "of its packets no event tells");
            assert_eq!(replica.table().kind(slot), Kind::Held);
            repair.found_besides(NOW, &connection(1, 4), &mut replica);
            assert_eq!(replica.table().line(slot).state().tcp_state, 3, "it is known by now");
        }
    }
}
