//! The connections that a test opens, and what the members' tables say of them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hypersync::conn::{Connection, Coordinate, Kind, Stamp, State, Tuple};
use hypersync::counters::Counter;
use hypersync::shm::ingest::Producers;
use hypersync::source::SourceEvent;

use super::member::Member;

/// A TCP connection, or for every fourth number a UDP one, for every fifth an IPv6 one; every other
/// one is translated.
pub fn connection(n: u32) -> Connection {
    let protocol = if n % 4 == 3 { 17 } else { 6 };
    let port = 1024 + (n % 50_000) as u16;
    let (original, translated) = if n % 5 == 4 {
        let host = |net: u16, n: u32| {
            std::net::Ipv6Addr::from(((0x2001_0db8_u128) << 96) | (net as u128) << 32 | n as u128)
        };
        (Tuple::v6(protocol, (host(1, n), port), (host(2, 1), 443)), u128::from(host(3, 7)))
    } else {
        let from = std::net::Ipv4Addr::from(0x0a00_0000 | n);
        (Tuple::v4(protocol, (from, port), ([192, 0, 2, 80].into(), 443)), 0xcb00_7107)
    };
    let reply = match n % 2 {
        0 => original.mirrored(),
        _ => Tuple { dst: translated, dport: port ^ 0x5555, ..original.mirrored() },
    };
    let tcp = |value| if protocol == 6 { value } else { 0 };
    let state = State {
        status: 0x18e | (n % 2) << 4,
        tcp_state: tcp(3),
        tcp_scale: tcp(0x77),
        tcp_flags_original: tcp(0x0a),
        tcp_flags_reply: tcp(0x0a),
        timeout_s: 432_000 - n,
        mark: n,
    };
    Connection::new(original, reply, state)
}

/// What should be in the tables: connections by their original tuple.
pub type Wanted = HashMap<Tuple, Connection>;

/// Connections of these numbers.
pub fn connections(numbers: std::ops::Range<u32>) -> Wanted {
    numbers.map(connection).map(|c| (c.original, c)).collect()
}

/// Pushes an event, waiting for room as a data plane could.
pub fn push(producers: &mut Producers, event: &SourceEvent) {
    let start = Instant::now();
    while producers.push(event).is_err() {
        assert!(start.elapsed() < Duration::from_secs(20), "the shard reads its ring");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Pushes all of these as seen.
pub fn push_all<'c>(producers: &mut Producers, all: impl IntoIterator<Item = &'c Connection>) {
    for c in all {
        push(producers, &SourceEvent::seen(*c));
    }
    producers.flush();
}

/// A slot with a connection in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Copy {
    /// Held, active or backup.
    pub kind: Kind,
    /// Epoch and version.
    pub stamp: Stamp,
    /// Where it is.
    pub here: Coordinate,
    /// Where it says that the other one is.
    pub peer: Coordinate,
    /// The connection.
    pub connection: Connection,
}

/// Every copy in a member's tables. An error if a slot could not be read or a connection is there
/// twice.
pub fn copies(member: &Member) -> Result<HashMap<Tuple, Copy>, String> {
    let mut all = HashMap::new();
    for shard in 0..member.view().header().sizes.shards {
        for (slot, words) in member.view().shard(shard).slots.iter().enumerate() {
            let Some((line, addresses)) = words.snapshot() else {
                return Err(format!(
                    "slot {slot} of shard {shard} of member {} is being written",
                    member.id
                ));
            };
            if !line.kind().is_connection() {
                continue;
            }
            let (original, reply) = line.tuples(&addresses);
            let copy = Copy {
                kind: line.kind(),
                stamp: line.stamp(),
                here: Coordinate::new(member.id, shard, slot as u32, line.generation()),
                peer: line.peer(),
                connection: Connection::new(original, reply, line.state()),
            };
            if let Some(other) = all.insert(original, copy) {
                return Err(format!(
                    "{original} is twice at member {}: {copy:?} and {other:?}",
                    member.id
                ));
            }
        }
    }
    Ok(all)
}

/// Whether the living members hold exactly the wanted connections: each on exactly two of them, or
/// on one if there is only one, the same in every field, one copy active, each naming the other;
/// and whether nobody counts anything as exposed.
pub fn agree(members: &[&Member], wanted: &Wanted) -> Result<(), String> {
    let mut found: HashMap<Tuple, Vec<Copy>> = HashMap::new();
    for member in members {
        for (original, copy) in copies(member)? {
            found.entry(original).or_default().push(copy);
        }
    }
    if let Some(original) = found.keys().find(|original| !wanted.contains_key(original)) {
        return Err(format!("{original} should be gone but is there: {:?}", found[original]));
    }
    let on_each = members.len().min(2);
    for (original, connection) in wanted {
        let all = found.get(original).map_or(&[][..], Vec::as_slice);
        let wrong = |what: &str| {
            let n = found.len();
            Err(format!("{original}: {what}: {all:?}, {n} of {} are there", wanted.len()))
        };
        if all.len() != on_each {
            return wrong(&format!("{} copies, not {on_each}", all.len()));
        }
        if all.iter().any(|copy| copy.connection != *connection) {
            return wrong(&format!("not what was seen, {connection:?}"));
        }
        if let [a, b] = all {
            let kinds = [a.kind, b.kind];
            if kinds != [Kind::Active, Kind::Backup] && kinds != [Kind::Backup, Kind::Active] {
                return wrong("not one active and one backup");
            }
            if a.stamp != b.stamp {
                return wrong("the stamps differ");
            }
            if a.peer != b.here || b.peer != a.here {
                return wrong("they do not name each other");
            }
        }
    }
    if on_each == 2
        && let Some(member) = members.iter().find(|member| member.counter(Counter::Exposure) != 0)
    {
        return Err(format!(
            "member {} counts {} as exposed",
            member.id,
            member.counter(Counter::Exposure)
        ));
    }
    Ok(())
}

/// Waits until [`agree`] holds.
pub fn wait_for_agreement(what: &str, members: &[&Member], wanted: &Wanted, limit: Duration) {
    let start = Instant::now();
    while let Err(why) = agree(members, wanted) {
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}: {why}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
