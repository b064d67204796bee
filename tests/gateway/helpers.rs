//! Helpers that write translated addresses into a TCP stream, and so make it longer: from there on
//! the kernel shifts the sequence numbers of the connection, and a gateway that takes over must
//! shift them as far.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use hypersync::counters::Counter;

use crate::appliance::{Appliances, Discovery};
use crate::common::may_make_namespaces;
use crate::common::namespace::Namespace;
use crate::one_at_a_time;
use crate::topology::{SERVER, Topology};

/// The address that the client's FTP and SIP have at the server: longer than its own, and so is
/// what is written.
const LONG: &str = "10.3.100.100";
const FTP: u16 = 21;
const SIP: u16 = 5060;

/// An operator's rules: what has a helper, and that it is translated.
const HELPERS: &str = "
table inet helpers {
    ct helper ftp-standard { type \"ftp\" protocol tcp; }
    ct helper sip-standard { type \"sip\" protocol tcp; }
    chain prerouting {
        type filter hook prerouting priority mangle;
        iifname cl0 tcp dport 21 ct helper set \"ftp-standard\"
        iifname cl0 tcp dport 5060 ct helper set \"sip-standard\"
    }
    chain postrouting {
        type nat hook postrouting priority srcnat - 1;
        oifname sv0 ip saddr 10.1.0.0/24 tcp dport { 21, 5060 } snat ip to 10.3.100.100
    }
}
";

/// Longer than TCP takes to send again what was lost in a takeover.
const PATIENCE: Duration = Duration::from_secs(15);

/// A connection through the gateways, both ends of it.
struct Control {
    client: BufReader<TcpStream>,
    server: BufReader<TcpStream>,
}

impl Control {
    fn open(topology: &Topology, port: u16) -> Control {
        let listener = listen(&topology.server, SERVER, port);
        let client =
            topology.client.inside(|| TcpStream::connect((SERVER, port)).expect("the way is open"));
        let (server, _) = listener.accept().expect("the client has connected");
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(PATIENCE)).expect("a time that is not zero");
            stream.set_nodelay(true).expect("a TCP socket has TCP_NODELAY");
        }
        Control { client: BufReader::new(client), server: BufReader::new(server) }
    }

    /// Sends a text from the client, and returns what of it comes out at the server, up to this
    /// last line.
    fn ask(&mut self, text: &str, last: &str) -> String {
        self.client.get_mut().write_all(text.as_bytes()).expect("the client's end is open");
        hear(&mut self.server, last)
    }

    /// The same from the server to the client.
    fn answer(&mut self, text: &str, last: &str) -> String {
        self.server.get_mut().write_all(text.as_bytes()).expect("the server's end is open");
        hear(&mut self.client, last)
    }

    /// A line each way that nobody rewrites, and that must arrive to the last byte.
    fn is_intact(&mut self, n: u32) {
        let (noop, done) =
            (format!("NOOP {n}, every byte of it\r\n"), format!("200 {n} is done\r\n"));
        assert_eq!(self.ask(&noop, &noop), noop, "what the server hears");
        assert_eq!(self.answer(&done, &done), done, "what the client hears");
    }

    /// Active FTP: the client says where it listens, the server connects there.
    fn transfer(&mut self, topology: &Topology) {
        let listener = listen(&topology.client, "10.1.0.10", 0);
        let port = listener.local_addr().expect("it is bound").port();
        let (high, low) = (port >> 8, port & 255);
        let heard = self.ask(&format!("PORT 10,1,0,10,{high},{low}\r\n"), "\r\n");
        let numbers: Vec<u8> = heard
            .trim_end()
            .strip_prefix("PORT ")
            .and_then(|list| list.split(',').map(|n| n.parse().ok()).collect())
            .unwrap_or_default();
        let [a, b, c, d, high, low] = numbers[..] else { panic!("the server heard {heard:?}") };
        let to = SocketAddr::from(([a, b, c, d], u16::from(high) << 8 | u16::from(low)));
        assert_eq!(to.ip().to_string(), LONG, "the helper writes the translated address");
        self.answer("200 PORT is done\r\n", "\r\n");
        let mut data =
            topology.server.inside(|| TcpStream::connect(to).expect("the data connection"));
        let (mut file, _) = listener.accept().expect("the server has connected");
        data.write_all(b"contents")
            .and_then(|()| data.shutdown(std::net::Shutdown::Write))
            .expect("it is open");
        file.set_read_timeout(Some(PATIENCE)).expect("a time that is not zero");
        let mut contents = String::new();
        file.read_to_string(&mut contents).expect("the server sends");
        assert_eq!(contents, "contents");
    }

    /// A request of SIP, in which the helper writes the translated address in several places. It
    /// expects no connection.
    fn options(&mut self, n: u32) {
        let port = self.client.get_ref().local_addr().expect("it is bound").port();
        let text = format!(
            "OPTIONS sip:{SERVER} SIP/2.0\r\nVia: SIP/2.0/TCP 10.1.0.10:{port};branch=z9hG4bK{n}\r\n\
             From: <sip:a@10.1.0.10>;tag={n}\r\nTo: <sip:b@{SERVER}>\r\nCall-ID: {n}@10.1.0.10\r\n\
             CSeq: {n} OPTIONS\r\nContact: <sip:a@10.1.0.10:{port}>\r\nContent-Length: 0\r\n\r\n"
        );
        let heard = self.ask(&text, "\r\n\r\n");
        assert!(heard.starts_with("OPTIONS sip:"), "what the server hears: {heard:?}");
        assert!(heard.contains(&format!("Via: SIP/2.0/TCP {LONG}:")), "the helper writes: {heard}");
        assert!(heard.len() > text.len() && heard.ends_with("\r\n\r\n"), "{heard}");
    }
}

fn listen(host: &Namespace, address: &str, port: u16) -> TcpListener {
    host.inside(|| TcpListener::bind((address, port)).expect("the host has this address"))
}

/// Reads whole lines up to one that ends a message like this; what came until nothing more did.
fn hear(from: &mut BufReader<TcpStream>, last: &str) -> String {
    let mut heard = String::new();
    while !heard.ends_with(last) {
        let mut line = Vec::new();
        match from.read_until(b'\n', &mut line) {
            Ok(length) if length > 0 => heard += &String::from_utf8_lossy(&line),
            _ => {
                heard += &String::from_utf8_lossy(&line);
                break;
            }
        }
        if last != "\r\n\r\n" {
            break;
        }
    }
    heard
}

/// How far a gateway's kernel shifts the connections to this port: what `conntrack` does not show,
/// so the attributes themselves are read.
fn shifts(gateway: &Namespace, port: u16) -> Vec<String> {
    crate::entries::read(gateway)
        .into_values()
        .filter(|entry| entry.original.to.port() == port)
        .map(|entry| format!("{:?}", entry.shifts))
        .collect()
}

/// Waits a while until a backup's kernel shifts as far as the active's. What this says is asserted
/// when the bytes were looked at: they are what counts.
fn arrives(topology: &Topology, port: u16, [from, to]: [u8; 2]) -> Result<(), String> {
    let begun = Instant::now();
    loop {
        let [there, here] = [from, to].map(|gateway| shifts(topology.gateway(gateway), port));
        if there.len() == 1 && there == here && begun.elapsed() > Duration::from_millis(100) {
            println!(
                "the shift {there:?} was at gateway {to} after {} ms",
                begun.elapsed().as_millis()
            );
            return Ok(());
        }
        if begun.elapsed() > Duration::from_secs(5) {
            return Err(format!("gateway {from} shifts by {there:?}, gateway {to} by {here:?}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_replicated(topology: &Topology, port: u16, gateway: u8) -> bool {
    let entries = crate::entries::read(topology.gateway(gateway));
    entries.values().any(|entry| entry.original.to.port() == port && entry.is_established())
}

#[test]
fn active_ftp_through_nat_goes_on_with_every_byte_when_its_gateway_dies_and_the_next_one_too() {
    if !may_make_namespaces("active FTP through SNAT, its helper's shifts") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build_with(3, &[HELPERS]);
    let mut control;
    let mut appliances = Appliances::start(&topology, Discovery::Multicast, &[2, 3, 1]);
    control = Control::open(&topology, FTP);
    control.is_intact(0);
    control.transfer(&topology);
    appliances
        .wait_for("gateway 2 has the connection", PATIENCE, || is_replicated(&topology, FTP, 2));
    control.transfer(&topology);
    control.is_intact(1);
    let first = arrives(&topology, FTP, [1, 2]);

    appliances.power_off(1);
    appliances.wait_until_told_dead(2, 1);
    control.is_intact(2);
    first.expect("the shift travels");
    // The survivor's own helper goes on where the other one stopped.
    control.transfer(&topology);
    control.is_intact(3);
    appliances
        .wait_for("gateway 3 has the connection", PATIENCE, || is_replicated(&topology, FTP, 3));
    let second = arrives(&topology, FTP, [2, 3]);

    appliances.power_off(2);
    appliances.wait_until_told_dead(3, 2);
    control.is_intact(4);
    second.expect("the shift travels");
    appliances.assert_running("the last one survives");
}

#[test]
fn a_shift_of_which_no_expectation_tells_travels_within_seconds() {
    if !may_make_namespaces("SIP over TCP through SNAT, its helper's shifts") {
        return;
    }
    let _turn = one_at_a_time();
    let topology = Topology::build_with(2, &[HELPERS]);
    let mut control;
    let mut appliances = Appliances::start(&topology, Discovery::Multicast, &[1, 1]);
    control = Control::open(&topology, SIP);
    control.options(1);
    appliances
        .wait_for("gateway 2 has the connection", PATIENCE, || is_replicated(&topology, SIP, 2));
    control.options(2);
    assert_eq!(appliances.counter(1, Counter::SourceExpectations), 0, "nothing is expected");
    let arrived = arrives(&topology, SIP, [1, 2]);

    appliances.power_off(1);
    appliances.wait_until_told_dead(2, 1);
    control.is_intact(3);
    arrived.expect("the shift travels");
    control.options(4);
    control.is_intact(5);
    appliances.assert_running("the survivor survives");
}
