//! Every kind of flow that a gateway carries, at once: TCP and UDP, IPv4 and IPv6, with each
//! translation.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hypersync::conn::tuple::{TCP, UDP};

use crate::common::namespace::Namespace;
use crate::common::wait_for;
use crate::entries::{self, Entries};
use crate::entries::{Entry, Tuple, originals};
use crate::topology::{SERVER, SERVER_V6, SERVICE, SERVICE_V6, Topology};
use crate::traffic::{Hearers, Progress, Traffic};

/// What gateways do to addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Translation {
    /// Nothing: routed only.
    None,
    /// The client's becomes the shared one.
    Source,
    /// The service's becomes the server's, with another port.
    Destination,
    /// Both.
    Both,
}

/// A kind of flow, and where the rules of the gateways expect it.
#[derive(Clone, Copy)]
struct Class {
    protocol: u8,
    is_v6: bool,
    translation: Translation,
}

impl Class {
    fn all() -> impl Iterator<Item = Class> {
        use Translation::*;
        let translations = [None, Source, Destination, Both];
        let families = translations
            .into_iter()
            .flat_map(|translation| [false, true].map(|is_v6| (translation, is_v6)));
        families.flat_map(|(translation, is_v6)| {
            [TCP, UDP].map(|protocol| Class { protocol, is_v6, translation })
        })
    }

    /// Where the client sends to.
    fn reached_at(&self) -> SocketAddr {
        match self.translation {
            Translation::None | Translation::Source => self.listens(),
            Translation::Destination => self.at([SERVICE, SERVICE_V6], 81),
            Translation::Both => self.at([SERVICE, SERVICE_V6], 80),
        }
    }

    /// Where the server hears it.
    fn listens(&self) -> SocketAddr {
        let port = match self.translation {
            Translation::None => 8000,
            Translation::Source => 7000,
            Translation::Destination => 8080,
            Translation::Both => 7080,
        };
        self.at([SERVER, SERVER_V6], port)
    }

    fn at(&self, addresses: [&str; 2], port: u16) -> SocketAddr {
        let address: IpAddr = addresses[usize::from(self.is_v6)].parse().expect("an address");
        SocketAddr::new(address, port)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.protocol == TCP { "TCP" } else { "UDP" };
        let family = if self.is_v6 { "IPv6" } else { "IPv4" };
        write!(f, "{protocol} {family}, translation {:?}", self.translation)
    }
}

/// The flows, by kind.
pub struct Mix {
    flows: Vec<(Class, Traffic)>,
}

impl Mix {
    /// Starts so many connections of each protocol, spread over all kinds.
    pub fn start(topology: &Topology, tcp: usize, udp: usize) -> Mix {
        let (client, server) = (&topology.client, &topology.server);
        let kinds = Class::all().count() / 2;
        let flows = Class::all().enumerate().map(|(place, class)| {
            let share = |total: usize| total / kinds + usize::from(place / 2 < total % kinds);
            let (to, listens) = (class.reached_at(), class.listens());
            let traffic = match class.protocol {
                TCP => Traffic::connect(client, server, to, listens, share(tcp)),
                _ => Traffic::send_datagrams(client, server, to, listens, share(udp)),
            };
            (class, traffic)
        });
        Mix { flows: flows.collect() }
    }

    fn udp(&self) -> impl Iterator<Item = &(Class, Traffic)> {
        self.flows.iter().filter(|(class, _)| class.protocol == UDP)
    }

    /// Lets the clients of the UDP flows send or not. What a client sends makes a new entry where
    /// there is none, so that only a server that speaks first shows whether the old one is there.
    pub fn silence_udp_clients(&self, is_silent: bool) {
        self.udp().for_each(|(_, traffic)| traffic.silence_client(is_silent));
    }

    /// Waits until each side of every flow has received `words` more than now.
    pub fn wait_for_more(&self, words: u64, limit: Duration, what: &str) {
        wait_for_all(self.flows.iter(), Hearers::Both, words, limit, what);
    }

    /// Waits until every UDP client has received `words` more than now.
    pub fn wait_for_more_at_udp_clients(&self, words: u64, limit: Duration, what: &str) {
        wait_for_all(self.udp(), Hearers::Client, words, limit, what);
    }

    /// The same of every client, whose servers may hear nothing.
    pub fn wait_for_more_at_clients(&self, words: u64, limit: Duration, what: &str) {
        wait_for_all(self.flows.iter(), Hearers::Client, words, limit, what);
    }

    /// How many flows there are.
    pub fn count(&self) -> usize {
        self.flows.iter().map(|(_, traffic)| traffic.client_addresses.len()).sum()
    }

    /// How many flows of a kind are cut: a side gave up, or heard nothing for so long. UDP servers
    /// do not count, for their clients may be silent.
    pub fn cut(&self, silence: Duration) -> BTreeMap<String, usize> {
        let cut = |class: &Class, traffic: &Traffic| {
            let broken =
                |sides: Vec<Progress>| sides.iter().filter(|side| side.is_broken(silence)).count();
            let servers = if class.protocol == TCP { broken(traffic.server()) } else { 0 };
            broken(traffic.client()).max(servers)
        };
        let all =
            self.flows.iter().map(|(class, traffic)| (class.to_string(), cut(class, traffic)));
        all.filter(|(_, cut)| *cut > 0).collect()
    }

    /// Stops sending and waits until every byte has been received where that can be expected.
    pub fn finish(&self, limit: Duration) {
        self.flows
            .iter()
            .filter(|(class, _)| class.protocol == TCP)
            .for_each(|(_, traffic)| traffic.finish(limit));
    }

    /// The kinds of which a flow still works: nobody gave up, and something was heard lately. UDP
    /// servers do not count, for their clients may be silent.
    pub fn working(&self, silence: Duration) -> Vec<String> {
        let works = |class: &Class, traffic: &Traffic| {
            traffic.client().iter().any(|side| !side.is_broken(silence))
                || class.protocol == TCP
                    && traffic.server().iter().any(|side| !side.is_broken(silence))
        };
        self.flows
            .iter()
            .filter(|(class, traffic)| works(class, traffic))
            .map(|(c, _)| c.to_string())
            .collect()
    }

    /// The longest time that a client heard nothing: of TCP, and of UDP.
    pub fn longest_gaps(&self) -> [Duration; 2] {
        [TCP, UDP].map(|protocol| {
            let flows = self.flows.iter().filter(|(class, _)| class.protocol == protocol);
            flows.map(|(_, traffic)| traffic.longest_gap()).max().unwrap_or_default()
        })
    }

    /// The names of all flows, with their kind.
    fn originals(&self) -> impl Iterator<Item = (Tuple, &Class)> {
        self.flows
            .iter()
            .flat_map(|(class, traffic)| originals(traffic).map(move |original| (original, class)))
    }

    /// The entries of these flows.
    pub fn entries<'e>(&self, entries: &'e Entries) -> Vec<&'e Entry> {
        self.originals().filter_map(|(original, _)| entries.get(&original)).collect()
    }

    /// Whether this gateway has an established entry of every flow, translated as it should be.
    pub fn are_established(&self, entries: &Entries) -> bool {
        self.originals().all(|(original, class)| {
            entries.get(&original).is_some_and(|entry| {
                assert_eq!(is_translated(entry), class.translation, "{class}: {entry:?}");
                entry.is_established()
            })
        })
    }

    /// What is missing or different at a backup, by kind: how many flows, and one of them. Fails
    /// the test if a copy claims more than its active has, whenever that is.
    pub fn differences(
        &self,
        active: &Namespace,
        backup: &Namespace,
    ) -> HashMap<String, (usize, String)> {
        // In this order: what the active has can only grow.
        let copies = entries::read(backup);
        let actives = entries::read(active);
        let mut all = HashMap::new();
        for (original, class) in self.originals() {
            let difference = match (actives.get(&original), copies.get(&original)) {
                (None, _) => Some(format!("{original:?} is not at the active")),
                (_, None) => Some(format!("{original:?} is not at the backup")),
                (Some(active), Some(copy)) => {
                    assert_eq!(
                        copy.claims_beyond(active),
                        0,
                        "{class}: {copy:x?} claims more than {active:x?}"
                    );
                    copy.difference(active)
                }
            };
            if let Some(difference) = difference {
                all.entry(class.to_string()).or_insert((0, difference)).0 += 1;
            }
        }
        all
    }
}

fn wait_for_all<'m>(
    flows: impl Iterator<Item = &'m (Class, Traffic)>,
    hearers: Hearers,
    words: u64,
    limit: Duration,
    what: &str,
) {
    // All from now on, and one after another only to tell which is late.
    let goals: Vec<_> =
        flows.map(|(class, traffic)| (class, traffic, traffic.more(hearers, words))).collect();
    for (class, traffic, goal) in &goals {
        wait_for(&format!("{class}: {what}"), limit, || traffic.has_reached(goal));
    }
}

/// What an entry's tuples say.
fn is_translated(entry: &Entry) -> Translation {
    let (original, reply) = (entry.original, entry.reply);
    match (original.from != reply.to, original.to != reply.from) {
        (false, false) => Translation::None,
        (true, false) => Translation::Source,
        (false, true) => Translation::Destination,
        (true, true) => Translation::Both,
    }
}
