//! Stories that random scripts meet seldom or never, told to both sides; and what only the model
//! can show, since the kernel has one limit for all namespaces.

use hypersync::conn::{Connection, Family, State, Tuple};
use hypersync::conntrack::codec::status;
use hypersync::source::{End, SourceEvent};
use hypersync::time::Time;

use crate::common::may_make_namespaces;
use crate::model::tcp::{self, Place, Segment, flag::*};
use crate::model::{By, Nat, Packet, Payload, Settings, Table, Verdict, What};
use crate::play;
use crate::script::{Broken, Play, nat};

const CLIENT: bool = true;
const SERVER: bool = false;

/// Tells a story of one TCP connection over IPv4, if this user may.
fn tell(
    what: &str,
    nat: Option<Nat>,
    story: impl Fn(&mut Play, usize) -> Result<(), Broken> + Sync,
) {
    if !may_make_namespaces(what) {
        return;
    }
    play(what, || {
        let mut play = Play::new(nat, false);
        let flow = play.add_flow("tcp 10.0.1.2:5000 > 10.0.2.2:80");
        let result = story(&mut play, flow).and_then(|()| play.compare_tables());
        (result, play)
    });
}

/// Sends these packets and compares after each.
fn exchange(play: &mut Play, flow: usize, packets: &[(bool, Segment)]) -> Result<(), Broken> {
    for (is_from_client, segment) in packets {
        play.packet(flow, *is_from_client, *segment)?;
        play.compare()?;
    }
    Ok(())
}

fn plain(flags: u8) -> Segment {
    Segment { flags, ..Segment::default() }
}

const fn data() -> Segment {
    Segment { flags: ACK, data: true, place: Place::Right }
}

fn handshake() -> [(bool, Segment); 3] {
    [(CLIENT, plain(SYN)), (SERVER, plain(SYN | ACK)), (CLIENT, plain(ACK))]
}

fn close() -> [(bool, Segment); 4] {
    [
        (CLIENT, plain(FIN | ACK)),
        (SERVER, plain(ACK)),
        (SERVER, plain(FIN | ACK)),
        (CLIENT, plain(ACK)),
    ]
}

fn state(play: &Play, flow: usize) -> (u8, u32) {
    let State { tcp_state, timeout_s, .. } = play.entry(flow).expect("it is there").state;
    (tcp_state, timeout_s.next_multiple_of(5))
}

fn restored(original: &str, port: u16) -> Connection {
    let original: Tuple = original.parse().expect("a tuple");
    let reply =
        Tuple { src: nat(false).v4.expect("an address"), sport: port, ..original }.mirrored();
    let state = State { status: 0x18e, tcp_state: tcp::ESTABLISHED, ..State::default() };
    Connection::new(original, reply, state)
}

#[test]
fn data_that_waits_for_its_acknowledgement_has_a_shorter_timeout() {
    tell("unacknowledged data in the kernel and in the model", Some(nat(false)), |play, flow| {
        exchange(play, flow, &handshake())?;
        assert_eq!(state(play, flow), (tcp::ESTABLISHED, 432_000));
        exchange(play, flow, &[(CLIENT, data())])?;
        assert_eq!(state(play, flow), (tcp::ESTABLISHED, 300));
        exchange(play, flow, &[(SERVER, plain(ACK))])?;
        assert_eq!(state(play, flow), (tcp::ESTABLISHED, 432_000));
        exchange(
            play,
            flow,
            &[(SERVER, data()), (CLIENT, data()), (SERVER, data()), (CLIENT, plain(ACK))],
        )
    });
}

#[test]
fn a_restored_entry_gets_its_normal_timeout_by_the_first_packet_and_the_shorter_one_by_the_second()
{
    tell(
        "packets through a restored entry in the kernel and in the model",
        Some(nat(false)),
        |play, flow| {
            let copy = restored("tcp 10.0.1.2:5000 > 10.0.2.2:80", 5000);
            for side in [CLIENT, SERVER] {
                play.create(By::Ours, &copy, 2_073_600)?;
                exchange(play, flow, &[(side, data())])?;
                assert_eq!(state(play, flow), (tcp::ESTABLISHED, 432_000));
                exchange(play, flow, &[(side, data())])?;
                assert_eq!(state(play, flow), (tcp::ESTABLISHED, 300));
                exchange(
                    play,
                    flow,
                    &[(!side, plain(ACK)), (side, plain(ACK)), (SERVER, plain(RST))],
                )?;
                play.delete(By::Ours, &copy.original)?;
            }
            Ok(())
        },
    );
}

#[test]
fn a_port_that_is_used_again_keeps_its_entry_or_gets_a_new_one_as_the_old_connection_ended() {
    tell("ports used again in the kernel and in the model", Some(nat(false)), |play, flow| {
        // The old one never ended here: the same entry, in sync again.
        exchange(play, flow, &handshake())?;
        exchange(play, flow, &handshake())?;
        assert_eq!(state(play, flow).0, tcp::ESTABLISHED);
        // A SYN/ACK that answers something else changes nothing.
        let stray = Segment { flags: SYN | ACK, data: false, place: Place::Ahead };
        exchange(play, flow, &[(CLIENT, plain(SYN)), (SERVER, stray), (CLIENT, plain(SYN))])?;
        exchange(play, flow, &[(SERVER, plain(SYN | ACK)), (CLIENT, plain(ACK))])?;
        // Closed by both: another entry.
        exchange(play, flow, &close())?;
        assert_eq!(state(play, flow).0, tcp::TIME_WAIT);
        exchange(play, flow, &handshake())?;
        // Reset by the client: another entry. By the server: the same one.
        exchange(play, flow, &[(CLIENT, plain(RST | ACK))])?;
        exchange(play, flow, &handshake())?;
        exchange(play, flow, &[(SERVER, plain(RST | ACK))])?;
        exchange(play, flow, &handshake())?;
        // A reset that is a little off leaves it established, with the timeout of a closed one.
        exchange(
            play,
            flow,
            &[(SERVER, Segment { flags: RST, data: false, place: Place::Ahead })],
        )?;
        assert_eq!(state(play, flow), (tcp::ESTABLISHED, 10));
        // A SYN while the last ACK is due: its challenge ACK is not taken for that.
        exchange(play, flow, &close()[..3])?;
        exchange(play, flow, &[(CLIENT, plain(SYN)), (SERVER, plain(ACK))])?;
        assert_eq!(state(play, flow).0, tcp::LAST_ACK);
        exchange(
            play,
            flow,
            &[(CLIENT, plain(ACK)), (CLIENT, plain(SYN)), (SERVER, plain(RST | ACK))],
        )?;
        // Both open it at once.
        exchange(
            play,
            flow,
            &[(CLIENT, plain(SYN)), (SERVER, plain(SYN)), (CLIENT, plain(SYN | ACK))],
        )?;
        exchange(play, flow, &[(SERVER, plain(ACK)), (CLIENT, plain(ACK))])
    });
}

#[test]
fn what_has_run_out_is_collected_by_the_packet_or_the_request_that_meets_it() {
    tell(
        "entries that are met when they have run out, in the kernel and in the model",
        None,
        |play, flow| {
            let name: Tuple = "tcp 10.0.1.2:5000 > 10.0.2.2:80".parse().expect("a tuple");
            play.set_timeout_of_state("tcp_timeout_syn_sent", 1)?;
            type Meet = fn(&mut Play, &Tuple) -> Result<(), Broken>;
            let met_by: [Meet; 3] = [
                |play, _| play.packet(0, CLIENT, plain(SYN)),
                |play, name| play.get(name),
                |play, name| play.delete(By::Tool, name),
            ];
            for meet in met_by {
                play.packet(flow, CLIENT, plain(SYN))?;
                play.wait(500);
                // It is not renewed by the same packet again.
                play.packet(flow, CLIENT, plain(SYN))?;
                play.wait(700);
                meet(play, &name)?;
                play.compare()?;
            }
            Ok(())
        },
    );
}

#[test]
fn a_masqueraded_connection_goes_with_its_address_and_a_restored_one_stays() {
    tell("an address that goes in the kernel and in the model", Some(nat(true)), |play, flow| {
        exchange(play, flow, &handshake())?;
        let udp = play.add_flow("udp 10.0.1.2:5000 > 10.0.2.2:53");
        exchange(play, udp, &[(CLIENT, Segment::default()), (SERVER, Segment::default())])?;
        let other = play.add_flow("tcp 10.0.1.3:5001 > 10.0.2.2:80");
        play.create(By::Ours, &restored("tcp 10.0.1.3:5001 > 10.0.2.2:80", 5001), 600)?;
        play.drop_address()?;
        assert!(
            play.entry(flow).is_none() && play.entry(udp).is_none() && play.entry(other).is_some()
        );
        Ok(())
    });
}

#[test]
fn what_is_born_without_events_stays_mute() {
    tell(
        "connections that raise no events in the kernel and in the model",
        Some(nat(false)),
        |play, flow| {
            let other = play.add_flow("tcp 10.0.1.3:5001 > 10.0.2.2:80");
            exchange(play, flow, &handshake())?;
            play.set_events(0)?;
            exchange(play, other, &handshake())?;
            exchange(play, flow, &close())?;
            play.set_events(1)?;
            for flow in [flow, other] {
                exchange(play, flow, &[(CLIENT, plain(RST))])?;
            }
            play.flush()
        },
    );
}

fn udp(client: u8) -> Packet {
    let tuple = Tuple::v4(17, ([10, 0, 1, client].into(), 5000), ([10, 0, 2, 2].into(), 53));
    Packet { tuple, payload: Payload::Other, is_from_inside: true }
}

#[test]
fn a_full_table_gives_up_what_is_not_assured_and_takes_no_more_then() {
    let mut table = Table::new(Settings { max: 2, ..Settings::default() });
    let mut copy = Connection::new(udp(1).tuple, udp(1).tuple.mirrored(), State::default());
    copy.state.status = status::SEEN_REPLY | status::ASSURED;
    assert_eq!(table.create(Time(0), By::Ours, &copy, 600), Ok(()));
    assert!(matches!(table.packet(Time(0), &udp(2)), Verdict::Passed(_)));
    assert!(
        matches!(table.packet(Time(0), &udp(3)), Verdict::Passed(_)),
        "the one before it was in vain"
    );
    let names: Vec<Tuple> = table.entries(Time(0)).map(|c| c.original).collect();
    assert_eq!(names, [udp(1).tuple, udp(3).tuple]);
    table.settings().max = 1;
    table.flush(Time(0), By::Tool);
    assert_eq!(table.create(Time(0), By::Ours, &copy, 600), Ok(()));
    assert_eq!(table.packet(Time(0), &udp(2)), Verdict::Dropped);
    copy.original = udp(2).tuple;
    copy.reply = copy.original.mirrored();
    assert_eq!(table.create(Time(0), By::Ours, &copy, 600), Err(libc::ENOMEM));
}

#[test]
fn events_that_nobody_fetches_are_lost_and_counted() {
    let mut table = Table::new(Settings::default());
    table.packet(Time(0), &udp(4)); // unheard, for ever
    table.listen(Some(2));
    for client in 1..=3 {
        table.packet(Time(0), &udp(client));
    }
    table.delete(Time(0), By::Tool, &udp(4).tuple).expect("it is there");
    assert_eq!(table.overruns(), 1);
    let told: Vec<What> =
        std::iter::from_fn(|| table.next_event()).map(|event| event.what).collect();
    assert_eq!(told, [What::New; 2]);
    table.drop_address(Time(0), Family::V4, 1); // nothing is masqueraded
    table.delete(Time(0), By::Tool, &udp(3).tuple).expect("it is there");
    let end = table.next_event().expect("an event");
    assert_eq!(
        (end.by, end.seen()),
        (By::Tool, SourceEvent::Gone { original: udp(3).tuple, end: End::Unseen { left_s: 30 } })
    );
}
