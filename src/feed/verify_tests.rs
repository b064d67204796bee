//! What the walk makes of what it finds, and its pace; without a kernel.

use std::net::Ipv4Addr;

use super::*;
use crate::conn::{Extra, State};
use crate::conntrack::commit::KEPT_TIMEOUT_S;
use crate::limits::ARENA_MIN;
use crate::memory::{MemorySize, OwnedMemory};

const NOW: Time = Time(1_000_000_000);
/// The kernel's timeout of an established connection.
const NORMAL_S: u32 = 432_000;

fn snat() -> Connection {
    let original =
        Tuple::v4(6, (Ipv4Addr::new(10, 0, 0, 1), 1000), (Ipv4Addr::new(10, 0, 0, 2), 80));
    let reply = Tuple { dst: 0x0a03_0001, ..original.mirrored() };
    let state = State { status: 0x19e, tcp_state: 3, timeout_s: 300, mark: 7, ..State::default() };
    Connection::new(original, reply, state)
}

/// The entry as it is committed.
fn entry() -> Connection {
    Connection { state: State { timeout_s: KEPT_TIMEOUT_S, ..snat().state }, ..snat() }
}

fn with(change: impl Fn(&mut Connection)) -> Connection {
    let mut entry = entry();
    change(&mut entry);
    entry
}

#[test]
fn every_difference_that_matters_is_found_and_no_other() {
    let of = |entry: &Connection| compare(&snat(), entry, true);
    assert_eq!(of(&entry()), VerifyResult::Same);
    for harmless in [
        with(|e| e.state.tcp_flags_original = 0x0b),
        with(|e| e.state.timeout_s -= REWRITTEN_S),
        with(|e| e.state.status |= 1 << 14), // offloaded
        with(|e| e.extra = Extra { parts: parts::LABELS, labels: [3; 16], ..Extra::NONE }),
    ] {
        assert_eq!(of(&harmless), VerifyResult::Same, "{harmless:?}");
    }
    let updated = [
        with(|e| e.state.mark = 8),
        with(|e| e.state.status &= !status::ASSURED),
        with(|e| e.state.tcp_state = 5),
        with(|e| (e.state.mark, e.state.timeout_s) = (0, NORMAL_S)),
    ];
    for entry in updated {
        assert!(matches!(of(&entry), VerifyResult::Differs(_)), "{entry:?}");
    }
    let replaced = [
        with(|e| e.reply.dst += 1),
        with(|e| e.reply.zone = 9),
        with(|e| e.state.status &= !status::SRC_NAT),
    ];
    for entry in replaced {
        assert!(matches!(of(&entry), VerifyResult::MustGo(_)), "{entry:?}");
    }
    // Packets have passed it: the connection is the copy's, or it is not.
    assert_eq!(of(&with(|e| e.state.timeout_s = NORMAL_S)), VerifyResult::Touched);
    assert_eq!(
        of(&with(|e| (e.state.timeout_s, e.reply.dport) = (NORMAL_S, 9))),
        VerifyResult::Foreign
    );
    assert_eq!(
        of(&with(|e| (e.state.timeout_s, e.state.tcp_state) = (60, 1))),
        VerifyResult::WentOn
    );
    let dead = compare(&snat(), &with(|e| e.state.timeout_s = NORMAL_S), false);
    assert_eq!(dead, VerifyResult::Same, "once its active is dead that is its timeout");

    // A copy that was never assured, and an entry that claims to be: by its own packets, or by
    // none.
    let mut young = snat();
    young.state.status &= !status::ASSURED;
    assert!(matches!(compare(&young, &entry(), true), VerifyResult::MustGo(_)));
    let touched = compare(&young, &with(|e| e.state.timeout_s = NORMAL_S), true);
    assert_eq!(touched, VerifyResult::Touched, "this kernel has seen it itself");
}

/// Entries are written again so often.
const REWRITTEN_S: u32 = crate::sync::REWRITE_PERIOD.as_secs() as u32;

#[test]
fn another_connections_entry_is_replaced_only_if_it_was_silent_for_a_walk() {
    let memory = OwnedMemory::new(&MemorySize::new(64, ARENA_MIN));
    let counters = Counters::new(memory.parts().counters);
    let mut verify = Verify::new(64, Duration::from_secs(600), false);
    let at = |seconds: u64, timeout_s: u32| Suspect {
        slot: 3,
        generation: Generation::default(),
        reply: snat().reply,
        timeout_s,
        at: NOW.after(Duration::from_secs(seconds)),
    };
    let mut look = |seconds, timeout_s| {
        let suspicion = verify.suspicion(&at(seconds, timeout_s), false, &counters);
        std::mem::swap(&mut verify.suspects, &mut verify.suspects_before);
        verify.suspects.clear();
        suspicion
    };
    assert_eq!(look(0, 1000), Suspicion::Early);
    assert_eq!(look(2, 998), Suspicion::Early, "too soon to tell");
    assert_eq!(look(600, 900), Suspicion::Alive, "a packet put it back");
    assert_eq!(look(1200, 299), Suspicion::Silent);
    assert_eq!(look(1800, 299), Suspicion::Early, "it was forgotten");
    assert_eq!(look(2400, 300), Suspicion::Alive);
    assert_eq!(look(2410, 8), Suspicion::Alive, "a packet gave it that of a state that ends");
    let offloaded = verify.suspicion(&at(3000, 0), true, &counters);
    assert_eq!(offloaded, Suspicion::Alive, "a flow table forwards it");
    // What is not remembered is counted.
    for slot in 0..SUSPECTS_MAX as u32 + 3 {
        let _ = verify.suspicion(&Suspect { slot, ..at(3600, 9) }, false, &counters);
    }
    assert_eq!(counters.get(Counter::VerifyFull), 3);
}

#[test]
fn the_pace_fits_the_period_and_never_exceeds_its_limit() {
    for (capacity, seconds) in
        [(256, 600), (10_000, 1), (562_756, 600), (562_756, 1), (1 << 26, 600)]
    {
        let period = Duration::from_secs(seconds);
        let (slots, pause) = Verify::new(capacity, period, false).pace();
        assert!(pause >= PAUSE_MIN && slots >= LOOKS_PER_STEP);
        let whole = pause * capacity.div_ceil(slots);
        assert!(whole <= period * 2, "{capacity} slots take {whole:?} for {period:?}");
        assert!(whole >= period * 9 / 10 || pause == PAUSE_MIN, "{capacity} slots take {whole:?}");
    }
    assert_eq!(Verify::new(64, Duration::ZERO, false).wake_at(NOW), Time::NEVER);
    assert_eq!(Verify::new(64, Duration::ZERO, true).wake_at(NOW), Time(0));
    // No time for it: a little later.
    let mut verify = Verify::new(64, Duration::from_secs(1), false);
    verify.step(NOW, false);
    assert_eq!((verify.wake_at(NOW), verify.looks_left), (NOW.after(BATCH_PAUSE), 0));
    verify.step(verify.wake_at(NOW), true);
    assert_eq!(verify.looks_left, LOOKS_PER_STEP);
    // What was found is written as soon, however long it is until the next step.
    let mut verify = Verify::new(64, Duration::from_secs(6000), false);
    verify.step(NOW, true);
    assert!(verify.wake_at(NOW) > NOW.after(Duration::from_secs(1)));
    verify.writes.push_back((3, Generation::default()));
    assert_eq!(verify.wake_at(NOW), NOW.after(BATCH_PAUSE));
}
