//! Reading conntrack's entries as `conntrack -L` prints them:
//!
//! ```text
//! tcp 6 431999 ESTABLISHED src=10.1.0.10 dst=10.2.0.10 sport=40000 dport=7000 \
//!     src=10.2.0.10 dst=10.3.0.1 sport=7000 dport=40000 [ASSURED] mark=0 use=1
//! ```

use std::net::SocketAddr;

use crate::traffic::Traffic;

/// Whether there is an established and assured entry for every connection of the traffic, and each
/// translates the client's address to `shared`.
pub fn are_replicated(entries: &[String], traffic: &Traffic, shared: &str) -> bool {
    let translated = format!(" dst={shared} ");
    traffic.client_addresses.iter().all(|&from| {
        find(entries, from, traffic.server_address).is_some_and(|entry| {
            entry.contains("ESTABLISHED") && entry.contains("[ASSURED]") && entry.contains(&translated)
        })
    })
}

/// Whether there is an entry with this original tuple.
pub fn has_entry(entries: &[String], from: SocketAddr, to: SocketAddr) -> bool {
    find(entries, from, to).is_some()
}

fn find(entries: &[String], from: SocketAddr, to: SocketAddr) -> Option<&String> {
    let original = format!("src={} dst={} sport={} dport={} ", from.ip(), to.ip(), from.port(), to.port());
    // The original tuple comes first, so an entry that has these addresses the other way does not count.
    entries.iter().find(|e| e.find("src=").is_some_and(|at| e[at..].starts_with(&original)))
}

#[test]
fn an_entry_is_found_by_its_original_tuple_only() {
    let entry = "tcp 6 431999 ESTABLISHED src=10.1.0.10 dst=10.2.0.10 sport=40000 dport=7000 \
                 src=10.2.0.10 dst=10.3.0.1 sport=7000 dport=40000 [ASSURED] mark=0 use=1";
    let entries = [entry.to_owned()];
    let address = |text: &str| text.parse().expect("an address and port");
    assert!(has_entry(&entries, address("10.1.0.10:40000"), address("10.2.0.10:7000")));
    assert!(!has_entry(&entries, address("10.2.0.10:7000"), address("10.3.0.1:40000")));
    assert!(!has_entry(&entries, address("10.1.0.10:4000"), address("10.2.0.10:7000")));
}
