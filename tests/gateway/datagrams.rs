//! UDP flows: every word is a datagram. Words may be lost, but none may be altered, come twice or
//! late, or come out of another flow.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};
use std::net::{SocketAddr, UdpSocket};

use crate::traffic::{
    Direction, Progress, Shared, connection_of, every_tick, is_turn_of, number_of, word,
};

/// The client's side of all flows: a socket each.
pub fn send(shared: &Shared, sockets: &[UdpSocket]) {
    for socket in sockets {
        socket.set_nonblocking(true).expect("a socket can be made non-blocking");
    }
    let mut ends = vec![End::new(Direction::ToServer); sockets.len()];
    every_tick(shared, |tick, quiet| {
        for (flow, (socket, end)) in sockets.iter().zip(&mut ends).enumerate() {
            let mut buffer = [0; 2048];
            loop {
                match socket.recv(&mut buffer) {
                    Ok(length) => end.hear(flow, &buffer[..length]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => break end.fail(&error),
                }
            }
            if !quiet && shared.may_client_send() && is_turn_of(flow, tick) {
                end.say(flow, |bytes| socket.send(bytes));
            }
        }
        shared.publish(
            Direction::ToServer,
            ends.iter().map(|end| end.progress.clone()).collect(),
            quiet,
        );
    });
}

/// The server's side of all flows: one socket, which answers to where the first word came from.
pub fn serve(shared: &Shared, socket: &UdpSocket) {
    socket.set_nonblocking(true).expect("a socket can be made non-blocking");
    let mut ends: BTreeMap<usize, (SocketAddr, End)> = BTreeMap::new();
    every_tick(shared, |tick, quiet| {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let Some(&bytes) = buffer[..length].first_chunk() else { continue };
            let flow = connection_of(bytes);
            let (peer, end) =
                ends.entry(flow).or_insert_with(|| (from, End::new(Direction::ToClient)));
            end.hear(flow, &buffer[..length]);
            if *peer != from {
                end.progress.fault.get_or_insert(format!("came from {from} after {peer}"));
            }
        }
        for (&flow, (peer, end)) in &mut ends {
            if !quiet && is_turn_of(flow, tick) {
                end.say(flow, |bytes| socket.send_to(bytes, *peer));
            }
        }
        let progress = ends.values().map(|(_, end)| end.progress.clone()).collect();
        shared.publish(Direction::ToClient, progress, quiet);
    });
}

/// One side of a flow.
#[derive(Clone)]
struct End {
    sends: Direction,
    /// The number of the next word to be heard, unless some are lost.
    expected: u64,
    progress: Progress,
}

impl End {
    fn new(sends: Direction) -> End {
        End { sends, expected: 0, progress: Progress::new() }
    }

    fn hear(&mut self, flow: usize, bytes: &[u8]) {
        let hears = match self.sends {
            Direction::ToServer => Direction::ToClient,
            Direction::ToClient => Direction::ToServer,
        };
        let number = bytes.try_into().map_or(0, number_of);
        if bytes != word(hears, flow, number).to_be_bytes() || number < self.expected {
            self.progress
                .fault
                .get_or_insert(format!("word {bytes:02x?}, expected {}", self.expected));
            return;
        }
        self.expected = number + 1;
        self.progress.received += 1;
        self.progress.hear();
    }

    fn say(&mut self, flow: usize, send: impl Fn(&[u8]) -> std::io::Result<usize>) {
        match send(&word(self.sends, flow, self.progress.sent).to_be_bytes()) {
            Ok(_) => self.progress.sent += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &Error) {
        self.progress.fault.get_or_insert(error.to_string());
    }
}
