//! What the simulator once found between the feed and its kernel, each as the shortest script that
//! shows it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use hypersync::conn::tuple::{TCP, UDP};
use hypersync::conn::{Family, Kind, MemberId, Tuple};
use hypersync::conntrack::codec::GIVEN_MAX_S;
use hypersync::counters::Counter;
use hypersync::limits::{ARENA_MIN, SLOTS_MIN};
use hypersync::memory::{MemorySize, OwnedMemory};

use super::kernel::{Ends, Kernel};
use super::model::tcp::{ESTABLISHED, Place, Segment, TIME_WAIT, flag};
use super::model::{By, Nat, Packet, Payload, Settings, Verdict};
use crate::world::story::SECOND;
use crate::world::{Timing, World, memories_of};

const HOLD: Duration = Duration::from_millis(400);
/// What connections are translated to, if they are.
const VIP: u128 = 0xcb00_7101;

/// Gateways with a shard each, and their kernels.
struct Gateways<'m> {
    world: World<'m>,
    kernels: BTreeMap<MemberId, Rc<Kernel>>,
}

fn memories(count: usize) -> Vec<OwnedMemory> {
    memories_of(count, MemorySize { extras: SLOTS_MIN, ..MemorySize::new(SLOTS_MIN, ARENA_MIN) })
}

impl<'m> Gateways<'m> {
    /// Kernels of so many gateways, and no process yet. Who is born while none listens raises no
    /// events.
    fn boot(memories: &'m [OwnedMemory], count: MemberId) -> Gateways<'m> {
        let mut world = World::new(1, memories);
        world.as_announced = true;
        world.highest = count;
        world.timing =
            Timing { heartbeat: SECOND / 10, hold: HOLD, reprotect_after: SECOND, compare: SECOND };
        let settings = || Settings { events: 2, ..Settings::default() };
        let kernels: BTreeMap<_, _> =
            (1..=count).map(|member| (member, Kernel::new(member, settings(), 4096))).collect();
        let of_feeds = RefCell::new(kernels.clone());
        world.make_feed = Some(Box::new(move |member, shard, shards, capacity, resumed| {
            let kernel = of_feeds.borrow()[&member].clone();
            kernel.listen(shards);
            Box::new(Ends::new(kernel, shard, shards, capacity, resumed, true))
        }));
        Gateways { world, kernels }
    }

    /// Two, with their processes.
    fn pair(memories: &'m [OwnedMemory]) -> Gateways<'m> {
        let mut gateways = Gateways::boot(memories, 2);
        gateways.world.start(1, 1, 100);
        gateways.world.start(2, 1, 100);
        gateways.run_for(SECOND);
        gateways
    }

    fn pass(&mut self, tuple: Tuple, payload: Payload, is_from_inside: bool, member: MemberId) {
        let tuple = if is_from_inside { tuple } else { tuple.mirrored() };
        let packet = Packet { tuple, payload, is_from_inside };
        let verdict =
            self.kernels[&member].act(self.world.now, |table, now| table.packet(now, &packet));
        assert!(matches!(verdict, Verdict::Passed(_)), "{tuple} passes {member}: {verdict:?}");
    }

    /// An answer to what left the gateway for this connection passes it.
    fn answer(&mut self, tuple: Tuple, payload: Payload, member: MemberId) {
        let now = self.world.now;
        let entry = self.kernels[&member].act(now, |table, now| table.get(now, &tuple));
        let reply = entry.expect("something left it").reply;
        self.pass(reply.mirrored(), payload, false, member);
    }

    /// The gateways translate what leaves them.
    fn hide_behind_vip(&mut self, is_masquerade: bool) {
        let nat = Nat { v4: Some(VIP), v6: None, is_masquerade };
        for kernel in self.kernels.values() {
            kernel.act(self.world.now, |table, _| table.settings().nat = Some(nat));
        }
    }

    /// A TCP connection opens behind that address.
    fn open_behind_vip(&mut self, tuple: Tuple, member: MemberId) {
        self.pass(tuple, segment(flag::SYN, false), true, member);
        self.answer(tuple, segment(flag::SYN | flag::ACK, false), member);
        self.pass(tuple, segment(flag::ACK, false), true, member);
    }

    /// A word and its answer pass a gateway.
    fn talk(&mut self, tuple: Tuple, member: MemberId) {
        let payload = match tuple.protocol {
            TCP => segment(flag::ACK, true),
            _ => Payload::Other,
        };
        for is_from_inside in [true, false] {
            self.pass(tuple, payload, is_from_inside, member);
        }
        self.run_for(SECOND);
    }

    /// A word and its answer, and nothing that is not acknowledged: while there is such data an
    /// entry's time is short, and tells nothing.
    fn say_the_last_word(&mut self, member: MemberId) {
        self.talk(tcp(), member);
        self.pass(tcp(), segment(flag::ACK, false), true, member);
    }

    /// A TCP connection opens, or closes.
    fn shake(&mut self, tuple: Tuple, flags: u8, member: MemberId) {
        for (flags, is_from_inside) in
            [(flags, true), (flags | flag::ACK, false), (flag::ACK, true)]
        {
            self.pass(tuple, segment(flags, false), is_from_inside, member);
        }
    }

    fn run_for(&mut self, span: Duration) {
        let end = self.world.now.after(span);
        let mut collect_at = self.world.now;
        while !end.reached(self.world.now) {
            let at = self.world.next_at().min(collect_at).min(end).max(self.world.now);
            self.world.step_to(at);
            if collect_at.reached(at) {
                collect_at = at.after(SECOND);
                self.kernels
                    .values()
                    .for_each(|kernel| kernel.act(at, |table, now| table.collect(now)));
            }
            for member in self.world.live() {
                self.world.hear(member);
            }
        }
    }

    /// The process of 1 stands still until 2 has given its copy the normal timeout.
    fn sleep_until_taken_over(&mut self, tuple: Tuple) {
        self.world.pause(1, true);
        while self.left(2, tuple).is_none_or(|left| left > GIVEN_MAX_S) {
            self.run_for(SECOND / 10);
        }
    }

    /// The process of 1 dies, and 2 has just come to know it.
    fn kill_and_wait_until_silent(&mut self) {
        self.world.kill(1);
        let is_silent = |of: &Self| !of.world.hosts[&2].group.view().members[1].status.is_alive();
        let deadline = self.world.now.after(SECOND * 5);
        while !is_silent(self) {
            assert!(!deadline.reached(self.world.now), "1 is taken for dead");
            self.run_for(Duration::from_millis(1));
        }
    }

    /// A kernel gives established connections so many seconds from now on.
    fn set_established(&self, member: MemberId, seconds: u32) {
        self.kernels[&member].act(self.world.now, |table, _| {
            table.settings().timeouts.tcp[ESTABLISHED as usize] = seconds;
        });
    }

    /// Another program deletes an entry.
    fn delete(&self, member: MemberId, tuple: Tuple) {
        let deleted = self.kernels[&member]
            .act(self.world.now, |table, now| table.delete(now, By::Tool, &tuple));
        assert_eq!(deleted, Ok(()));
    }

    /// Another program marks an entry.
    fn mark(&self, member: MemberId, tuple: Tuple, mark: u32) {
        let written = self.kernels[&member].act(self.world.now, |table, now| {
            let mut entry = table.get(now, &tuple).expect("it is there");
            entry.state.mark = mark;
            table.update(now, By::Tool, &entry, entry.state.timeout_s, entry.state.status)
        });
        assert_eq!(written, Ok(()));
    }

    /// The seconds that a kernel's entry has left.
    fn left(&self, member: MemberId, tuple: Tuple) -> Option<u32> {
        let entries = self.kernels[&member].entries(self.world.now);
        entries.iter().find(|entry| entry.original == tuple).map(|entry| entry.state.timeout_s)
    }

    /// No table and no kernel has it any more.
    fn assert_gone(&self, tuple: Tuple) {
        for member in self.kernels.keys() {
            assert_eq!(self.kind(*member, tuple), None, "at {member}");
            assert_eq!(self.left(*member, tuple), None, "in the kernel of {member}");
        }
    }

    /// 1 carries the connection on, and has found its copy a place over the entry that 2's kernel
    /// has had from before anybody listened.
    fn settle_over_an_unheard_entry(&mut self, tuple: Tuple) {
        self.world.start(2, 1, 100);
        // 2 finds its entry, and carries it on as well: who has the packets has the connection.
        (0..12).for_each(|_| self.talk(tuple, 1));
        assert_eq!([1, 2].map(|m| self.kind(m, tuple)), [Some(Kind::Active), Some(Kind::Backup)]);
    }

    fn kind(&self, member: MemberId, tuple: Tuple) -> Option<Kind> {
        let table = self.world.hosts[&member].shards[0].table();
        table.find_original(&tuple).map(|slot| table.kind(slot))
    }
}

fn segment(flags: u8, data: bool) -> Payload {
    Payload::Tcp(Segment { flags, data, place: Place::Right })
}

fn tcp() -> Tuple {
    Tuple::v4(TCP, ([10, 0, 0, 1].into(), 5000), ([192, 0, 2, 1].into(), 80))
}

/// Another one.
fn idle() -> Tuple {
    Tuple { sport: 6000, ..tcp() }
}

fn udp() -> Tuple {
    Tuple::v4(UDP, ([10, 0, 0, 1].into(), 5000), ([192, 0, 2, 1].into(), 53))
}

/// Traffic seeds 700000026, 600001368, 600001870: an entry that was born before the process of its
/// gateway raises no events. As a copy it became another slot's when packets were found to pass it,
/// and then nobody asked for it: when it had run out the pair stayed for good.
#[test]
fn an_entry_that_raises_no_events_is_asked_for_whatever_slot_it_has() {
    let memories = memories(2);
    let mut gateways = Gateways::boot(&memories, 2);
    gateways.talk(udp(), 2);
    gateways.world.start(1, 1, 100);
    (0..4).for_each(|_| gateways.talk(udp(), 1));
    gateways.settle_over_an_unheard_entry(udp());
    // It goes where packets pass, of which no event tells.
    let idle = Settings::default().timeouts.udp_stream;
    gateways.talk(udp(), 2);
    (1..idle / 10).for_each(|_| {
        gateways.run_for(SECOND * 9);
        gateways.talk(udp(), 2);
    });
    gateways.run_for(SECOND * 30);
    assert_eq!(gateways.kind(2, udp()), Some(Kind::Active), "its last packets passed here");
    gateways.run_for(SECOND * (idle + 70));
    gateways.assert_gone(udp());
}

/// Traffic seed 600001843: the walk over the copies gave such an entry its copy's state again,
/// though packets had changed it since: here a connection that had closed, there the next one from
/// its port.
#[test]
fn an_entry_that_packets_have_changed_is_not_given_its_copys_state_again() {
    let memories = memories(2);
    let mut gateways = Gateways::boot(&memories, 2);
    gateways.shake(tcp(), flag::SYN, 2);
    gateways.world.start(1, 1, 100);
    gateways.run_for(SECOND);
    gateways.shake(tcp(), flag::SYN, 1);
    gateways.talk(tcp(), 1);
    gateways.settle_over_an_unheard_entry(tcp());
    gateways.shake(tcp(), flag::FIN | flag::ACK, 2);
    let lingers = Settings::default().timeouts.tcp[TIME_WAIT as usize];
    gateways.run_for(SECOND * (lingers + 30));
    gateways.assert_gone(tcp());
}

/// Traffic seeds 600000676, 600001812: a copy that was given its normal timeout while its active
/// was silent was left with it, as if packets had passed: it ran out, and was not there when the
/// active died.
#[test]
fn a_copy_whose_active_was_silent_for_a_while_lasts_as_a_copy_again() {
    for has_packets in [false, true] {
        let memories = memories(2);
        let mut gateways = Gateways::pair(&memories);
        (0..3).for_each(|_| gateways.talk(udp(), 1));
        assert!(gateways.left(2, udp()).is_some_and(|left| left > GIVEN_MAX_S), "it is a copy");
        gateways.world.pause(1, true);
        gateways.run_for(SECOND * 4);
        assert!(
            gateways.left(2, udp()).is_some_and(|left| left <= GIVEN_MAX_S),
            "it was taken over"
        );
        if has_packets {
            gateways.talk(udp(), 2);
        }
        gateways.world.pause(1, false);
        gateways.run_for(SECOND * 3);
        let is_copys = gateways.left(2, udp()).is_some_and(|left| left > GIVEN_MAX_S);
        assert_eq!(
            is_copys, !has_packets,
            "its own packets tell that it may be needed: {has_packets}"
        );
    }
}

/// Traffic seeds 920001082, 920002557, 961000933: packets that had passed within three seconds
/// after a takeover were not seen when the active was heard again.
#[test]
fn packets_soon_after_a_takeover_tell_as_well_that_the_entry_may_be_needed() {
    for (offset, after) in
        (0..10).flat_map(|offset| [0, 3, 7, 14, 18, 22].map(|after| (offset, after)))
    {
        let memories = memories(2);
        let mut gateways = Gateways::pair(&memories);
        gateways.shake(tcp(), flag::SYN, 1);
        gateways.talk(tcp(), 1);
        gateways.run_for(SECOND * offset / 10);
        gateways.sleep_until_taken_over(tcp());
        gateways.run_for(SECOND * after / 10);
        for is_from_inside in [true, false] {
            gateways.pass(tcp(), segment(flag::ACK, true), is_from_inside, 2);
        }
        gateways.world.pause(1, false);
        gateways.run_for(SECOND / 2);
        assert!(
            gateways.left(2, tcp()).is_some_and(|left| left <= GIVEN_MAX_S),
            "{offset}, {after}"
        );
    }
}

/// Traffic seed 965000238: packets after a takeover had left the entry less than it was given then,
/// which was its active's, and did not count.
#[test]
fn packets_that_left_an_entry_less_than_its_takeover_tell_that_it_may_be_needed() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.shake(tcp(), flag::SYN, 1);
    gateways.talk(tcp(), 1);
    gateways.set_established(2, 3000);
    gateways.sleep_until_taken_over(tcp());
    assert!(
        gateways.left(2, tcp()).is_some_and(|left| left > 3000),
        "what its active's kernel gave it"
    );
    (0..3).for_each(|_| gateways.talk(tcp(), 2));
    gateways.world.pause(1, false);
    gateways.run_for(SECOND / 2);
    assert!(gateways.left(2, tcp()).is_some_and(|left| left <= 3000), "it may be needed as it is");
}

/// Traffic seed 965000470: somebody gave the entry of a copy a short timeout, which looked like a
/// packet: the copy was claimed, its entry ran out, and the connection was deleted where it lived.
#[test]
fn what_a_program_writes_into_the_entry_of_a_copy_is_no_packet() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.shake(tcp(), flag::SYN, 1);
    gateways.talk(tcp(), 1);
    let written = gateways.kernels[&2]
        .act(gateways.world.now, |table, now| table.set_timeout(now, By::Tool, &tcp(), 1));
    assert_eq!(written, Ok(()));
    gateways.run_for(SECOND * 3);
    assert_eq!([1, 2].map(|m| gateways.kind(m, tcp())), [Some(Kind::Active), Some(Kind::Backup)]);
    assert!(
        gateways.left(1, tcp()).is_some_and(|left| left <= GIVEN_MAX_S),
        "its packets pass here"
    );
    assert!(
        gateways.left(2, tcp()).is_some_and(|left| left > GIVEN_MAX_S),
        "it is a copy as before"
    );
}

/// Traffic seed 996001893: a program set a mark on the entry of a copy whose active had just fallen
/// silent, which was taken for traffic: the copy was claimed, and its entry kept the timeout of
/// copies for good.
#[test]
fn what_a_program_writes_while_the_active_is_silent_is_no_packet_either() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.shake(tcp(), flag::SYN, 1);
    gateways.talk(tcp(), 1);
    gateways.run_for(SECOND);
    assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup));
    gateways.kill_and_wait_until_silent();
    assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup), "presumed");
    gateways.mark(2, tcp(), 7);
    gateways.run_for(SECOND * 4);
    assert_eq!(gateways.world.counter(2, Counter::Claims), 0);
    assert!(
        gateways.left(2, tcp()).is_some_and(|left| left <= GIVEN_MAX_S),
        "it is no copy any more"
    );
}

/// Traffic seeds 965000262, 960001055: a process began anew over entries that the one before had
/// left, and traffic moved there, whose entry at the other gateway went at that moment. Nobody knew
/// of the connection any more, and of its packets no event told.
#[test]
fn an_entry_that_an_earlier_process_left_is_a_connection_when_packets_pass_it() {
    let memories = memories(3);
    let mut gateways = Gateways::pair(&memories);
    gateways.shake(tcp(), flag::SYN, 1);
    (0..3).for_each(|_| gateways.talk(tcp(), 1));
    gateways.shake(idle(), flag::SYN, 1);
    gateways.run_for(SECOND * 2);
    assert_eq!([tcp(), idle()].map(|t| gateways.kind(2, t)), [Some(Kind::Backup); 2]);
    gateways.world.kill(2);
    gateways.kernels[&2].listen(0);
    gateways.run_for(SECOND * 2);
    gateways.world.start(2, 1, 100);
    for tuple in [tcp(), idle()] {
        let gone = gateways.kernels[&1]
            .act(gateways.world.now, |table, now| table.delete(now, By::Kernel, &tuple));
        assert_eq!(gone, Ok(()));
    }
    (0..7).for_each(|_| gateways.talk(tcp(), 2));
    assert_eq!([1, 2].map(|m| gateways.kind(m, tcp())), [Some(Kind::Backup), Some(Kind::Active)]);
    assert!(gateways.left(1, tcp()).is_some(), "it is on two again");
    assert_eq!([1, 2].map(|m| gateways.kind(m, idle())), [None; 2], "nobody spoke there");
}

/// Traffic seed 966000034: a connection that outlived its hold while nobody could be its backup,
/// and had one last word to say when somebody could, was sent. There it overwrote the next one from
/// its port.
#[test]
fn what_has_one_last_word_to_say_is_not_sent_to_who_comes_then() {
    let memories = memories(2);
    let mut gateways = Gateways::boot(&memories, 2);
    gateways.world.start(1, 1, 100);
    gateways.shake(tcp(), flag::SYN, 1);
    gateways.talk(tcp(), 1);
    for (flags, is_from_inside) in [(flag::FIN, true), (0, false), (flag::FIN, false)] {
        gateways.pass(tcp(), segment(flags | flag::ACK, false), is_from_inside, 1);
    }
    gateways.run_for(SECOND / 10);
    gateways.world.start(2, 1, 100);
    gateways.run_for(SECOND * 3);
    assert_eq!([1, 2].map(|m| gateways.kind(m, tcp())), [Some(Kind::Held), None]);
    assert_eq!(gateways.left(2, tcp()), None);
    gateways.pass(tcp(), segment(flag::ACK, false), true, 1);
    gateways.run_for(SECOND);
    assert_eq!(gateways.kind(1, tcp()), None, "its end was told");
}

/// Traffic seeds 920002725, 960000150: a gateway that had slept read that its connection was closed
/// elsewhere before it read that the next one had begun from that port. The entry that it deleted
/// was that one's.
#[test]
fn what_began_while_its_gateway_slept_keeps_its_entry_when_the_one_before_is_closed_elsewhere() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.shake(tcp(), flag::SYN, 2);
    gateways.talk(tcp(), 2);
    assert_eq!([1, 2].map(|m| gateways.kind(m, tcp())), [Some(Kind::Backup), Some(Kind::Active)]);
    gateways.world.pause(2, true);
    // (The claim is told before the end.)
    for (flags, is_from_inside) in [(flag::FIN, true), (flag::FIN, false), (0, true)] {
        gateways.pass(tcp(), segment(flags | flag::ACK, false), is_from_inside, 1);
        gateways.run_for(SECOND / 20);
    }
    gateways.pass(tcp(), segment(flag::RST | flag::ACK, false), true, 2);
    gateways.shake(tcp(), flag::SYN, 2);
    gateways.world.pause(2, false);
    gateways.run_for(SECOND / 10);
    assert!(gateways.left(2, tcp()).is_some());
    (0..3).for_each(|_| gateways.talk(tcp(), 2));
    assert_eq!([1, 2].map(|m| gateways.kind(m, tcp())), [Some(Kind::Backup), Some(Kind::Active)]);
}

/// Traffic seed 960001948: an entry that packets had passed, and that was left as it was when its
/// active was heard again, ran out within a second after that active's death. It counted as the end
/// of the connection, whose packets had been at the active.
#[test]
fn a_copy_that_was_left_as_it_was_does_not_end_with_its_active() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    (0..5).for_each(|_| gateways.talk(udp(), 2));
    gateways.world.pause(2, true);
    gateways.run_for(SECOND * 4);
    gateways.talk(udp(), 1);
    gateways.world.pause(2, false);
    gateways.run_for(SECOND);
    assert_eq!([1, 2].map(|m| gateways.kind(m, udp())), [Some(Kind::Backup), Some(Kind::Active)]);
    while gateways.left(1, udp()).is_some_and(|left| left > 0 && left <= GIVEN_MAX_S) {
        if gateways.left(1, udp()).is_some_and(|left| left.is_multiple_of(5)) {
            gateways.talk(udp(), 2);
        }
        gateways.run_for(SECOND / 10);
    }
    gateways.run_for(SECOND * 3 / 10);
    gateways.world.pause(2, true);
    gateways.run_for(SECOND * 4);
    assert!(gateways.left(1, udp()).is_some_and(|left| left > 0));
    assert!(gateways.kind(1, udp()).is_some());
}

/// Traffic seeds 996001601, 1000000737: a member that had been silent went on with its table, but
/// without the entry. First it took the connection back from who had taken it over, which deleted
/// its own entry; then it closed the connection, for which that one had no place any more.
#[test]
fn what_was_taken_over_and_is_taken_back_without_an_entry_goes_on_where_its_packets_pass() {
    let memories = memories(3);
    let mut gateways = Gateways::boot(&memories, 3);
    for (member, priority) in [(1, 100), (2, 100), (3, 50)] {
        gateways.world.start(member, 1, priority);
    }
    gateways.run_for(SECOND);
    gateways.shake(tcp(), flag::SYN, 1);
    gateways.talk(tcp(), 1);
    assert_eq!([1, 2].map(|m| gateways.kind(m, tcp())), [Some(Kind::Active), Some(Kind::Backup)]);
    gateways.world.pause(1, true);
    let deadline = gateways.world.now.after(SECOND * 5);
    while gateways.kind(2, tcp()) != Some(Kind::Active) {
        assert!(!deadline.reached(gateways.world.now), "2 takes it over");
        gateways.run_for(SECOND / 10);
    }
    (0..3).for_each(|_| gateways.talk(tcp(), 2));
    gateways.delete(1, tcp());
    gateways.world.pause(1, false);
    for _ in 0..6 {
        gateways.talk(tcp(), 2);
    }
    assert_eq!(gateways.kind(2, tcp()), Some(Kind::Active));
    assert!([1, 3].iter().any(|m| gateways.left(*m, tcp()).is_some()), "it has a copy");
}

/// Traffic seed 1000000282: somebody had shortened the time of a copy's entry, unheard; it ran out
/// just after the active had died, and before the copy was written with its normal timeout: the
/// copy went as well.
#[test]
fn a_copy_whose_entry_goes_between_the_death_and_the_takeover_is_written_again() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.shake(tcp(), flag::SYN, 1);
    gateways.talk(tcp(), 1);
    gateways.kill_and_wait_until_silent();
    gateways.delete(2, tcp());
    gateways.run_for(SECOND / 10);
    assert!(gateways.left(2, tcp()).is_some_and(|left| left <= GIVEN_MAX_S), "as ours");
    gateways.talk(tcp(), 2);
    gateways.delete(2, tcp());
    gateways.run_for(SECOND / 10);
    assert_eq!(gateways.left(2, tcp()), None, "that was its end");
}

/// Traffic seed 1000001897: packets had passed a copy's entry while its active stood still. That
/// one woke, its first change wrote over what they had left, and then it lost its entry: the copy's
/// showed no packets any more, and went.
#[test]
fn packets_that_a_change_of_the_active_has_written_over_count_until_their_time_is_over() {
    const LASTS: u32 = 30;
    for (idle_s, goes_on) in [(0, true), (LASTS, false)] {
        let memories = memories(2);
        let mut gateways = Gateways::pair(&memories);
        [1, 2].iter().for_each(|member| gateways.set_established(*member, LASTS));
        gateways.shake(tcp(), flag::SYN, 1);
        gateways.talk(tcp(), 1);
        assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup));
        (0..2).for_each(|_| gateways.talk(tcp(), 2));
        assert!(gateways.left(2, tcp()).is_some_and(|left| left <= GIVEN_MAX_S));
        gateways.mark(1, tcp(), 7);
        gateways.run_for(SECOND / 10);
        assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup), "no event has told");
        assert!(gateways.left(2, tcp()).is_some_and(|left| left > GIVEN_MAX_S), "written over");
        (0..idle_s).for_each(|_| gateways.talk(tcp(), 1));
        gateways.delete(1, tcp());
        gateways.run_for(SECOND / 10);
        assert_eq!(gateways.left(2, tcp()).is_some(), goes_on);
        if goes_on {
            gateways.talk(tcp(), 2);
            assert_eq!(gateways.kind(2, tcp()), Some(Kind::Active));
            assert!(gateways.left(1, tcp()).is_some(), "it has a copy again");
            gateways.run_for(SECOND * (LASTS + 3));
        }
        gateways.assert_gone(tcp());
    }
}

/// Traffic seed 1000025629: a packet within a second after a takeover leaves what no packet leaves.
/// The active was heard again, wrote over that, and lost its entry: the copy's went as well.
#[test]
fn packets_right_after_a_takeover_count_when_the_active_is_back_and_has_lost_its_entry() {
    for after in 0..12 {
        let memories = memories(2);
        let mut gateways = Gateways::pair(&memories);
        gateways.shake(tcp(), flag::SYN, 1);
        gateways.talk(tcp(), 1);
        gateways.sleep_until_taken_over(tcp());
        gateways.run_for(SECOND * after / 10);
        gateways.pass(tcp(), segment(flag::ACK, true), true, 2);
        gateways.run_for(SECOND * 5 / 2);
        gateways.world.pause(1, false);
        gateways.run_for(SECOND / 20);
        gateways.delete(1, tcp());
        gateways.run_for(SECOND / 10);
        assert!(gateways.left(2, tcp()).is_some(), "{after}");
        gateways.talk(tcp(), 2);
        assert_eq!(gateways.kind(2, tcp()), Some(Kind::Active), "{after}");
    }
}

/// Traffic seed 1000021177: an entry was deleted at the moment at which its connection was found to
/// be this member's for good, and was written again. Then the event was read.
#[test]
fn the_end_of_an_entry_that_was_written_again_since_is_none() {
    for after_us in (0..4000).step_by(100) {
        let memories = memories(3);
        let mut gateways = Gateways::pair(&memories);
        gateways.shake(tcp(), flag::SYN, 1);
        gateways.talk(tcp(), 1);
        gateways.kill_and_wait_until_silent();
        gateways.delete(1, tcp());
        gateways.run_for(SECOND * 3);
        assert!(gateways.left(2, tcp()).is_some_and(|left| left <= GIVEN_MAX_S), "taken over");
        gateways.world.start(1, 1, 100);
        gateways.delete(2, tcp());
        let reads_at = gateways.world.now.after(Duration::from_micros(after_us));
        while gateways.world.next_at() < reads_at {
            gateways.world.step();
        }
        gateways.run_for(SECOND);
        let (kind, left) = (gateways.kind(2, tcp()), gateways.left(2, tcp()));
        assert_eq!(kind.is_some(), left.is_some(), "{after_us}: {kind:?}, {left:?}");
    }
}

/// Traffic seed 1300004558: while a process was dead, the connection of its copy ended at the
/// active, and the next one of its port went through the copy's entry, for its kernel made it that
/// one's. What was still on its way of the first one changed the entry, and then removed it.
#[test]
fn what_began_on_a_copys_entry_while_nobody_was_there_outlives_the_end_of_the_one_before() {
    for goes_on in [true, false] {
        let memories = memories(2);
        let mut gateways = Gateways::pair(&memories);
        gateways.shake(tcp(), flag::SYN, 1);
        gateways.talk(tcp(), 1);
        assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup));
        gateways.world.kill(2);
        gateways.kernels[&2].listen(0);
        if goes_on {
            gateways.shake(tcp(), flag::SYN, 2);
            for is_from_inside in [true, false] {
                gateways.pass(tcp(), segment(flag::ACK, true), is_from_inside, 2);
            }
        }
        for (flags, is_from_inside) in [(flag::FIN, true), (flag::FIN, false), (0, true)] {
            gateways.pass(tcp(), segment(flags | flag::ACK, false), is_from_inside, 1);
            gateways.run_for(SECOND / 20);
        }
        gateways.kernels[&2].listen(1);
        gateways.world.resume(2);
        gateways.run_for(SECOND / 10);
        assert_eq!(gateways.left(2, tcp()).is_some(), goes_on);
        if goes_on {
            (0..4).for_each(|_| gateways.talk(tcp(), 2));
            let table = gateways.world.hosts[&2].shards[0].table();
            let slot = table.find_original(&tcp()).expect("it is known");
            assert_eq!((table.kind(slot), table.line(slot).state().tcp_state), (Kind::Active, 3));
        }
    }
}

/// Traffic seed 1300011445: an entry that raises no events was made the next connection's of its
/// port. A dump found that one, for other events had been lost; its end was never noticed.
#[test]
fn what_a_dump_finds_is_asked_for_as_it_may_raise_no_events() {
    let memories = memories(1);
    let mut gateways = Gateways::boot(&memories, 1);
    gateways.world.start(1, 1, 100);
    gateways.run_for(SECOND);
    gateways.kernels[&1].listen(0);
    gateways.shake(tcp(), flag::SYN, 1);
    gateways.kernels[&1].listen(1);
    gateways.run_for(SECOND);
    assert_eq!(gateways.kind(1, tcp()), None, "of its beginning no event told");
    let room = gateways.kernels[&1].room.replace(0);
    gateways.shake(Tuple { sport: 7000, ..tcp() }, flag::SYN, 1);
    gateways.kernels[&1].room.set(room);
    gateways.run_for(SECOND * 2);
    assert!(gateways.kind(1, tcp()).is_some(), "a dump has found it");
    gateways.set_established(1, 5);
    gateways.talk(tcp(), 1);
    gateways.run_for(SECOND * 70);
    assert_eq!(gateways.kind(1, tcp()), None);
}

/// Seen on real kernels: traffic went through the backup for a moment and came back. What was
/// deleted at the active from then on went on at the backup, for as long as its entry had left:
/// days. Who had the later packets has the connection.
#[test]
fn after_a_detour_of_packets_the_age_of_the_last_ones_tells_what_an_unseen_end_ends() {
    for (back_for, away_again_for, is_marked, lives) in [
        (12, 0, false, false),
        (12, 0, true, false), // What the detour had left was written over.
        (1, 0, false, true),  // Too close to tell.
        (12, 12, false, true),
        (12, 12, true, true),
    ] {
        let memories = memories(2);
        let mut gateways = Gateways::pair(&memories);
        gateways.shake(tcp(), flag::SYN, 1);
        (0..2).for_each(|_| gateways.talk(tcp(), 1));
        gateways.talk(tcp(), 2);
        (0..back_for).for_each(|_| gateways.talk(tcp(), 1));
        (0..away_again_for).for_each(|_| gateways.talk(tcp(), 2));
        // While data is not acknowledged an entry's time is short, and tells nothing.
        let last = if away_again_for > 0 { 2 } else { 1 };
        gateways.pass(tcp(), segment(flag::ACK, false), true, last);
        if is_marked {
            gateways.mark(1, tcp(), 7);
            gateways.run_for(SECOND / 5);
        }
        gateways.delete(1, tcp());
        gateways.run_for(SECOND);
        let what = (back_for, away_again_for, is_marked);
        match lives {
            true => assert_eq!(gateways.kind(2, tcp()), Some(Kind::Active), "{what:?}"),
            false => assert_eq!([1, 2].map(|m| gateways.left(m, tcp())), [None; 2], "{what:?}"),
        }
    }
}

/// A gateway stood still while another program marked the entries of all its copies. It can ask its
/// kernel about so many events only a little at a time: what it could not ask it took for traffic.
#[test]
fn more_events_about_copies_than_can_be_asked_about_at_once_claim_nothing() {
    const COUNT: u16 = 1500;
    let size = MemorySize { extras: SLOTS_MIN, ..MemorySize::new(4096, ARENA_MIN) };
    let memories = memories_of(2, size);
    let mut gateways = Gateways::pair(&memories);
    let flows = || (0..COUNT).map(|n| Tuple { sport: 10_000 + n, ..tcp() });
    flows().for_each(|tuple| gateways.shake(tuple, flag::SYN, 1));
    gateways.run_for(SECOND * 3);
    let copies = |gateways: &Gateways<'_>| {
        flows().filter(|tuple| gateways.kind(2, *tuple) == Some(Kind::Backup)).count()
    };
    assert_eq!(copies(&gateways), COUNT as usize);
    gateways.world.pause(2, true);
    flows().for_each(|tuple| gateways.mark(2, tuple, 7));
    gateways.world.pause(2, false);
    gateways.run_for(SECOND);
    assert_eq!(copies(&gateways), COUNT as usize, "no packet has passed");
}

/// Seen on real kernels, and traffic seed 453: a gateway stood still for a moment. Meanwhile a
/// connection ended at the other one, and the next one of its port came here, on the entry of the
/// copy. What its active told of the copy was done to that entry before the kernel was asked what
/// the entry's events meant, or although they had been lost.
#[test]
fn what_begins_on_a_copys_entry_while_its_gateway_stands_still_outlives_the_copy() {
    for (is_over, is_lost) in [(true, false), (false, false), (true, true), (false, true)] {
        let memories = memories(2);
        let mut gateways = Gateways::pair(&memories);
        gateways.shake(tcp(), flag::SYN, 1);
        (0..2).for_each(|_| gateways.talk(tcp(), 1));
        assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup));
        gateways.world.pause(2, true);
        let last = if is_over { flag::RST } else { flag::FIN };
        gateways.pass(tcp(), segment(last | flag::ACK, false), true, 1);
        gateways.run_for(SECOND / 10);
        let room = gateways.kernels[&2].room.get();
        gateways.kernels[&2].room.set(if is_lost { 0 } else { room });
        gateways.shake(tcp(), flag::SYN, 2);
        gateways.kernels[&2].room.set(room);
        gateways.run_for(SECOND / 10);
        gateways.world.pause(2, false);
        gateways.run_for(SECOND / 2);
        (0..3).for_each(|_| gateways.talk(tcp(), 2));
        let what = (is_over, is_lost);
        let state = |member: MemberId| {
            let entries = gateways.kernels[&member].entries(gateways.world.now);
            entries.iter().find(|entry| entry.original == tcp()).map(|entry| entry.state.tcp_state)
        };
        assert_eq!(state(2), Some(ESTABLISHED), "{what:?}");
        assert_eq!(gateways.kind(2, tcp()), Some(Kind::Active), "{what:?}");
        assert_eq!(gateways.kind(1, tcp()), Some(Kind::Backup), "{what:?}");
        assert_eq!(state(1), Some(ESTABLISHED), "{what:?}");
    }
}

/// Seen on real kernels: the age of the active's last packet was told too young, or that of the
/// backup's own taken for too old, and what had packets at the backup, a while ago, was ended.
/// Whatever delays the news of an end, or hides what the kernel gave an entry, the packet that came
/// last counts.
#[test]
fn an_age_that_is_not_known_for_certain_ends_nothing() {
    type Story = fn(&mut Gateways<'_>);
    let stories: [(&str, Story); 5] = [
        ("the active's process stands still", |gateways| {
            gateways.world.pause(1, true);
            gateways.say_the_last_word(2);
            gateways.delete(1, tcp());
            gateways.run_for(SECOND * 9);
            gateways.world.pause(1, false);
        }),
        ("the backup's process stands still", |gateways| {
            // (Before the other one has taken it for dead: the close is sent.)
            gateways.world.pause(2, true);
            gateways.pass(tcp(), segment(flag::ACK, false), true, 2);
            gateways.delete(1, tcp());
            gateways.run_for(SECOND * 9);
            gateways.world.pause(2, false);
        }),
        ("nothing is heard of it for a while", |gateways| {
            gateways.say_the_last_word(2);
            gateways.world.cut = vec![(1, 2), (2, 1)];
            gateways.delete(1, tcp());
            gateways.run_for(SECOND * 9);
            gateways.world.cut.clear();
        }),
        ("the backup's kernel was set twice", |gateways| {
            gateways.run_for(SECOND * 30);
            gateways.pass(tcp(), segment(flag::ACK, false), true, 1);
            gateways.set_established(2, 3600);
            gateways.run_for(SECOND);
            gateways.say_the_last_word(2);
            gateways.set_established(2, 3620);
            gateways.run_for(SECOND);
            gateways.set_established(2, 432_000);
            gateways.run_for(SECOND);
            gateways.delete(1, tcp());
        }),
        ("the backup's kernel has a policy", |gateways| {
            gateways.set_established(2, 1000);
            gateways.pass(tcp(), segment(flag::ACK, false), true, 2);
            gateways.set_established(2, 432_000);
            gateways.run_for(SECOND * 2);
            gateways.delete(1, tcp());
        }),
    ];
    for (what, story) in stories {
        let memories = memories(2);
        let mut gateways = Gateways::boot(&memories, 2);
        gateways.world.timing.reprotect_after = SECOND * 30;
        gateways.world.start(1, 1, 100);
        gateways.world.start(2, 1, 100);
        gateways.run_for(SECOND);
        gateways.shake(tcp(), flag::SYN, 1);
        (0..2).for_each(|_| gateways.talk(tcp(), 1));
        gateways.say_the_last_word(1);
        assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup), "{what}");
        story(&mut gateways);
        gateways.run_for(SECOND * 3);
        assert!(gateways.left(2, tcp()).is_some(), "{what}");
        gateways.talk(tcp(), 2);
        assert_eq!(gateways.kind(2, tcp()), Some(Kind::Active), "{what}");
    }
}

/// Traffic seed 1500001797: a gateway was cut off from the others, one of which took its traffic
/// and claimed it. When the traffic was back, and raised no event, the claim made the first one let
/// go of what passed it; and when the entry that nothing passed any more was deleted, it was
/// nobody's.
#[test]
fn what_was_claimed_elsewhere_meanwhile_is_looked_for_where_its_packets_are_again() {
    let memories = memories(3);
    let mut gateways = Gateways::boot(&memories, 3);
    (1..=3).for_each(|member| gateways.world.start(member, 1, 100));
    gateways.run_for(SECOND);
    gateways.shake(tcp(), flag::SYN, 1);
    (0..2).for_each(|_| gateways.talk(tcp(), 1));
    let backup = match gateways.kind(2, tcp()) {
        Some(_) => 2,
        None => 3,
    };
    gateways.world.cut = vec![(1, 2), (2, 1), (1, 3), (3, 1)];
    gateways.run_for(SECOND / 2);
    // One side says that it is done: that raises an event.
    gateways.pass(tcp(), segment(flag::FIN | flag::ACK, false), true, backup);
    gateways.run_for(SECOND * 2);
    assert_eq!(gateways.kind(backup, tcp()), Some(Kind::Active), "claimed, and copied elsewhere");
    gateways.world.cut.clear();
    for _ in 0..4 {
        for is_from_inside in [true, false] {
            gateways.pass(tcp(), segment(flag::ACK, true), is_from_inside, 1);
        }
        gateways.run_for(SECOND / 5);
    }
    (0..3).for_each(|_| gateways.talk(tcp(), 1));
    gateways.delete(backup, tcp());
    gateways.run_for(SECOND * 3);
    gateways.talk(tcp(), 1);
    let kinds = [1, 2, 3].map(|member| gateways.kind(member, tcp()));
    assert_eq!(kinds[0], Some(Kind::Active), "{kinds:?}");
    assert!(kinds[1..].contains(&Some(Kind::Backup)), "{kinds:?}");
}

/// Traffic seed 1500000425: a connection was reset while nobody listened, and its entry, which
/// raises no events, served the next one from its port. Nobody heard of that, and the copy of an
/// earlier one, which had been taken over elsewhere, was written over it.
#[test]
fn what_goes_on_with_the_entry_of_one_that_had_ended_before_the_start_is_found() {
    for was_copied in [false, true] {
        let memories = memories(3);
        let mut gateways = Gateways::boot(&memories, 2);
        if was_copied {
            gateways.world.start(1, 1, 100);
            gateways.world.start(2, 1, 100);
            gateways.run_for(SECOND);
            gateways.shake(tcp(), flag::SYN, 1);
            (0..3).for_each(|_| gateways.talk(tcp(), 1));
            assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup));
            gateways.world.kill(1);
            gateways.kernels[&1].listen(0);
            gateways.shake(tcp(), flag::FIN | flag::ACK, 1);
            gateways.run_for(SECOND);
        }
        gateways.shake(tcp(), flag::SYN, 1);
        gateways.pass(tcp(), segment(flag::RST | flag::ACK, false), false, 1);
        gateways.world.start(1, 1, 100);
        if !was_copied {
            gateways.world.start(2, 1, 100);
        }
        gateways.run_for(SECOND / 10);
        gateways.shake(tcp(), flag::SYN, 1);
        (0..4).for_each(|_| gateways.talk(tcp(), 1));
        let kinds = [1, 2].map(|member| gateways.kind(member, tcp()));
        assert_eq!(kinds, [Some(Kind::Active), Some(Kind::Backup)], "{was_copied}");
    }
}

/// Traffic seed 1560009795: a process stood still while the connection whose copy it had ended, and
/// the next one of its port began, in another translation. What was left of the copy was looked
/// for, and nobody took the entry that was there for a connection.
#[test]
fn what_is_there_in_place_of_what_is_left_of_a_copy_goes_on() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.hide_behind_vip(true);
    // Their ports clash, so one of them gets another one.
    let taken = Tuple { src: tcp().src + 1, ..tcp() };
    let translation = |gateways: &Gateways<'_>, member: MemberId| {
        gateways.kernels[&member]
            .act(gateways.world.now, |table, now| table.get(now, &tcp()))
            .map(|entry| entry.reply)
    };
    for tuple in [taken, tcp()] {
        gateways.open_behind_vip(tuple, 1);
    }
    gateways.run_for(SECOND * 2);
    assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup));
    let before = translation(&gateways, 2);
    gateways.world.pause(2, true);
    for member in [1, 2] {
        gateways.delete(member, taken);
        gateways.delete(member, tcp());
    }
    gateways.run_for(SECOND / 10);
    gateways.open_behind_vip(tcp(), 2);
    assert_ne!(translation(&gateways, 2), before, "it is another connection");
    gateways.world.pause(2, false);
    gateways.run_for(SECOND * 3);
    assert_eq!(gateways.kind(2, tcp()), Some(Kind::Active));
    assert_eq!(translation(&gateways, 1), translation(&gateways, 2));
}

/// Traffic seed 1580008629: while a process was away the backup of its connection claimed that, and
/// the next one began on its entry, unheard. The claim, which outranks what this member has in its
/// table, was written over it.
#[test]
fn what_was_claimed_while_the_process_was_away_is_not_written_over_what_passes_here() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.shake(tcp(), flag::SYN, 2);
    (0..3).for_each(|_| gateways.talk(tcp(), 2));
    assert_eq!(gateways.kind(1, tcp()), Some(Kind::Backup));
    gateways.world.kill(2);
    gateways.kernels[&2].listen(0);
    gateways.pass(tcp(), segment(flag::FIN | flag::ACK, false), true, 1);
    gateways.run_for(SECOND / 2);
    assert_eq!(gateways.kind(1, tcp()), Some(Kind::Active));
    gateways.shake(tcp(), flag::FIN | flag::ACK, 2);
    gateways.shake(tcp(), flag::SYN, 2);
    gateways.world.resume(2);
    for _ in 0..5 {
        gateways.run_for(SECOND);
        let entry =
            gateways.kernels[&2].act(gateways.world.now, |table, now| table.get(now, &tcp()));
        assert_eq!(entry.map(|entry| entry.state.tcp_state), Some(ESTABLISHED));
        gateways.talk(tcp(), 2);
    }
    gateways.delete(1, tcp());
    (0..4).for_each(|_| gateways.talk(tcp(), 2));
    assert_eq!(gateways.kind(2, tcp()), Some(Kind::Active));
}

/// Traffic seed 1600007002: a first word passed one gateway and got no answer; the next one passed
/// another, whose process stood still until the events of that were lost. The copy of the first,
/// which had waited there as well, was written over the connection's entry.
#[test]
fn what_began_unheard_is_not_written_over_by_a_copy_that_comes_in_before_the_dump() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.shake(idle(), flag::SYN, 1);
    // The dump will take a few passes to come to it.
    for host in 0..40 {
        gateways.pass(Tuple { dst: udp().dst + host, ..udp() }, Payload::Other, true, 2);
    }
    gateways.run_for(SECOND);
    assert_eq!(gateways.kind(2, idle()), Some(Kind::Backup), "1 has a lease");
    gateways.pass(tcp(), segment(flag::SYN, false), true, 1);
    gateways.run_for(HOLD - SECOND / 20);
    gateways.world.pause(2, true);
    gateways.run_for(SECOND / 10);
    let room = gateways.kernels[&2].room.replace(0);
    gateways.shake(tcp(), flag::SYN, 2);
    gateways.kernels[&2].room.set(room);
    gateways.world.pause(2, false);
    for _ in 0..20 {
        gateways.run_for(SECOND / 10);
        for is_from_inside in [true, false] {
            gateways.pass(tcp(), segment(flag::ACK, true), is_from_inside, 2);
        }
    }
    gateways.run_for(SECOND);
    let kinds = [1, 2].map(|member| gateways.kind(member, tcp()));
    assert_eq!(kinds, [Some(Kind::Backup), Some(Kind::Active)]);
}

/// Traffic seed 1620007628: a connection ended while its gateway's process stood still, and the
/// next one of its port began on the copy's entry at the gateway that had just taken over. That was
/// taken for a packet of the one before, whose last state came back and was written over it.
#[test]
fn what_begins_on_an_entry_that_was_taken_over_is_another_connection() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.shake(tcp(), flag::SYN, 1);
    (0..3).for_each(|_| gateways.talk(tcp(), 1));
    assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup));
    gateways.world.kill(1);
    gateways.kernels[&1].listen(0);
    gateways.world.resume(1);
    gateways.talk(tcp(), 1);
    assert_eq!(gateways.kind(1, tcp()), Some(Kind::Active));
    gateways.sleep_until_taken_over(tcp());
    let last = segment(flag::FIN | flag::ACK, false);
    gateways.pass(tcp(), last, true, 1);
    gateways.answer(tcp(), last, 1);
    gateways.shake(tcp(), flag::SYN, 2);
    gateways.run_for(SECOND / 10);
    gateways.world.pause(1, false);
    for _ in 0..6 {
        gateways.talk(tcp(), 2);
        let entry =
            gateways.kernels[&2].act(gateways.world.now, |table, now| table.get(now, &tcp()));
        assert_eq!(entry.map(|entry| entry.state.tcp_state), Some(ESTABLISHED));
    }
    assert_eq!(gateways.kind(2, tcp()), Some(Kind::Active));
}

/// A switchover by VRRP: the address that connections are masqueraded behind goes, and the kernel
/// drops their entries. Whoever has it next goes on with them, also with those that were silent; if
/// nobody has, or a program deleted them, they end.
#[test]
fn what_is_masqueraded_goes_where_its_address_goes() {
    for (what, comes_to, is_flushed) in [
        ("to the backup", 2, false),
        ("to nobody", 0, false),
        ("flushed", 2, true),
        ("back", 1, false),
    ] {
        let memories = memories(2);
        let mut gateways = Gateways::pair(&memories);
        gateways.hide_behind_vip(true);
        gateways.kernels[&2].has_address.set(false);
        gateways.open_behind_vip(tcp(), 1);
        gateways.run_for(SECOND * 2);
        assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup), "{what}");
        gateways.kernels[&1].has_address.set(false);
        match is_flushed {
            true => gateways.delete(1, tcp()),
            false => gateways.kernels[&1]
                .act(gateways.world.now, |table, now| table.drop_address(now, Family::V4, VIP)),
        }
        gateways.run_for(SECOND);
        if comes_to > 0 {
            gateways.kernels[&comes_to].has_address.set(true);
        }
        gateways.run_for(SECOND * 6);
        if comes_to == 0 || is_flushed {
            gateways.assert_gone(tcp());
            continue;
        }
        let left = gateways.left(comes_to, tcp());
        assert!(left.is_some_and(|left| left <= GIVEN_MAX_S), "{what}: {left:?}");
        for is_from_inside in [true, false] {
            let payload = segment(flag::ACK, true);
            match is_from_inside {
                true => gateways.pass(tcp(), payload, true, comes_to),
                false => gateways.answer(tcp(), payload, comes_to),
            }
        }
        let other = 3 - comes_to;
        let kinds = [comes_to, other].map(|member| gateways.kind(member, tcp()));
        assert_eq!(kinds, [Some(Kind::Active), Some(Kind::Backup)], "{what}");
        assert!(gateways.left(other, tcp()).is_some(), "{what}: there are two copies");
    }
}

/// The port is used again at once, while the end of what left is not told yet: that is told then.
#[test]
fn what_begins_in_place_of_what_has_left_is_another_connection() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.hide_behind_vip(true);
    gateways.kernels[&2].has_address.set(false);
    gateways.open_behind_vip(tcp(), 1);
    gateways.run_for(SECOND * 2);
    gateways.kernels[&1].has_address.set(false);
    gateways.kernels[&1]
        .act(gateways.world.now, |table, now| table.drop_address(now, Family::V4, VIP));
    gateways.run_for(SECOND);
    gateways.kernels[&1].has_address.set(true);
    gateways.open_behind_vip(tcp(), 1);
    gateways.run_for(SECOND / 10);
    assert_eq!(gateways.kind(2, tcp()), None, "the one before has ended");
    gateways.run_for(SECOND * 10);
    let kinds = [1, 2].map(|member| gateways.kind(member, tcp()));
    assert_eq!(kinds, [Some(Kind::Active), Some(Kind::Backup)]);
    gateways.answer(tcp(), segment(flag::ACK, true), 1);
}

/// Traffic seed 1630014819: what was taken over, or is contested, had another connection's entry in
/// its place, of which no event had told. A dump showed it, and that was taken for no news.
#[test]
fn what_is_there_in_place_of_what_was_taken_over_goes_on() {
    let memories = memories(2);
    let mut gateways = Gateways::pair(&memories);
    gateways.hide_behind_vip(false);
    // Their ports clash, so one of them gets another one.
    let taken = Tuple { src: tcp().src + 1, ..tcp() };
    for tuple in [taken, tcp()] {
        gateways.open_behind_vip(tuple, 1);
    }
    gateways.run_for(SECOND * 2);
    assert_eq!(gateways.kind(2, tcp()), Some(Kind::Backup));
    gateways.sleep_until_taken_over(tcp());
    let room = gateways.kernels[&2].room.replace(0);
    [taken, tcp()].into_iter().for_each(|tuple| gateways.delete(2, tuple));
    gateways.open_behind_vip(tcp(), 2);
    gateways.kernels[&2].room.set(room);
    gateways.run_for(SECOND * 2);
    let entry = gateways.kernels[&2].act(gateways.world.now, |table, now| table.get(now, &tcp()));
    let table = gateways.world.hosts[&2].shards[0].table();
    let slot = table.find_original(&tcp()).expect("it is known");
    assert_eq!(Some(table.tuples(slot).1), entry.map(|entry| entry.reply));
}
