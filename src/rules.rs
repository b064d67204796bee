//! Rules: which connections are copied at all.
//!
//! A rule is `copy` or `skip` and conditions that must all hold; the first rule that matches
//! decides, and after the last one come two that are built in: `skip local`, then `copy`. So
//! without rules everything is copied but this host's own connections.
//!
//! ```text
//! rule      = ("copy" | "skip") condition*
//! condition = "proto" (name | number)      "src" prefix          "dst" prefix
//!           | "sport" port ["-" port]      "dport" port ["-" port]
//!           | "zone" number                "mark" value ["/" mask]
//!           | "address" interface          "local"
//! ```
//!
//! Addresses, ports and the zone are those of the original tuple: as the first packet arrived.
//! A rule is evaluated at events of the source, so it allocates nothing, and what no rule asks for
//! costs nothing. What can never match, and is therefore a mistake, is refused when it is read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::conn::tuple::{DCCP, ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE, has_ports};
use crate::conn::{Connection, Family};
use crate::conntrack::local::{Interfaces, LocalView};
use crate::limits::{RULE_INTERFACES_MAX, RULES_MAX};

/// Protocols by name; any other is written as its number.
const PROTOCOLS: [(&str, u8); 9] = [
    ("tcp", TCP),
    ("udp", UDP),
    ("icmp", ICMP),
    ("icmpv6", ICMPV6),
    ("sctp", SCTP),
    ("dccp", DCCP),
    ("udplite", UDPLITE),
    ("gre", 47),
    ("esp", 50),
];

/// Longest name of an interface, bytes: IFNAMSIZ without the zero byte.
const INTERFACE_NAME_MAX: usize = 15;

/// What becomes of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It is copied.
    Copy,
    /// It is this host's own, and no rule speaks of it: not copied.
    Local,
    /// A rule skips it.
    Skipped,
}

/// The rules in their order.
#[derive(Clone, Default, Debug)]
pub struct Rules {
    rules: Vec<Rule>,
    /// Those that `address` names; a rule has the bit of its position here.
    interfaces: Vec<String>,
}

#[derive(Clone, Debug)]
struct Rule {
    is_copy: bool,
    conditions: Box<[Condition]>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Condition {
    Protocol(u8),
    Source(Prefix),
    Destination(Prefix),
    SourcePort(Ports),
    DestinationPort(Ports),
    Zone(u16),
    Mark { value: u32, mask: u32 },
    Address(Interfaces),
    Local,
}

impl Rules {
    /// Reads one rule and puts it behind those that are there. An error is one line that names the
    /// rule, the word and what to write; then nothing has changed.
    pub fn add(&mut self, text: &str) -> Result<(), String> {
        let known = self.interfaces.len();
        let rule = self.read(text).map_err(|e| {
            let words: Vec<&str> = text.split_whitespace().collect();
            format!("rule '{}': {e}", words.join(" "))
        });
        if rule.is_err() {
            self.interfaces.truncate(known);
        }
        self.rules.push(rule?);
        Ok(())
    }

    /// Reads the rules of a file: one a line, from `#` to the line's end a comment. An error names
    /// the line.
    pub fn add_lines(&mut self, text: &str) -> Result<(), String> {
        for (i, line) in text.lines().enumerate() {
            let rule = line.split('#').next().unwrap_or_default().trim();
            if !rule.is_empty() {
                self.add(rule).map_err(|e| format!("line {}: {e}", i + 1))?;
            }
        }
        Ok(())
    }

    /// What becomes of the connection. `local` is what is known of this host's addresses; `None`
    /// where the source's connections are not this host's: then none is local, by a rule or
    /// without.
    pub fn verdict(&self, connection: &Connection, local: Option<&LocalView>) -> Verdict {
        match self.rules.iter().find(|rule| rule.matches(connection, local)) {
            Some(rule) if rule.is_copy => Verdict::Copy,
            Some(_) => Verdict::Skipped,
            None if local.is_some_and(|view| view.is_local(connection)) => Verdict::Local,
            None => Verdict::Copy,
        }
    }

    /// Whether a verdict can depend on the mark. A mark is often set after the first event of a
    /// connection: then the verdict has to be asked for again when an event tells the mark, and
    /// until then is that of the mark 0.
    pub fn uses_mark(&self) -> bool {
        self.any(|condition| matches!(condition, Condition::Mark { .. }))
    }

    /// Whether a rule asks for this host's addresses. They come and go: a verdict may be another
    /// later.
    pub fn uses_addresses(&self) -> bool {
        self.any(|condition| matches!(condition, Condition::Address(_) | Condition::Local))
    }

    /// The interfaces that the rules name, in the order of their bits: for
    /// [`LocalAddresses::watch`](crate::conntrack::local::LocalAddresses::watch).
    pub fn interfaces(&self) -> &[String] {
        &self.interfaces
    }

    fn any(&self, is_it: impl Fn(&Condition) -> bool) -> bool {
        self.rules.iter().any(|rule| rule.conditions.iter().any(&is_it))
    }

    fn read(&mut self, text: &str) -> Result<Rule, String> {
        if self.rules.len() == RULES_MAX {
            return Err(format!("there are {RULES_MAX} rules before it, and more are not allowed"));
        }
        let mut words = text.split_whitespace();
        let is_copy = match words.next() {
            Some("copy") => true,
            Some("skip") => false,
            Some(word) => return Err(format!("'{word}' is no verdict: begin with copy or skip")),
            None => return Err("it is empty: write copy or skip, then conditions".into()),
        };
        let mut conditions = Vec::new();
        let mut names = Vec::new();
        while let Some(name) = words.next() {
            if names.contains(&name) {
                return Err(format!("'{name}' is there twice: write two rules"));
            }
            names.push(name);
            conditions.push(self.condition(name, &mut words)?);
        }
        can_match(&conditions)?;
        Ok(Rule { is_copy, conditions: conditions.into() })
    }

    fn condition<'t>(
        &mut self,
        name: &str,
        words: &mut impl Iterator<Item = &'t str>,
    ) -> Result<Condition, String> {
        let mut value =
            |what: &str| words.next().ok_or_else(|| format!("'{name}' is the last word: {what}"));
        Ok(match name {
            "proto" => Condition::Protocol(protocol(value("write a protocol behind it")?)?),
            "src" => Condition::Source(value("write an address behind it")?.parse()?),
            "dst" => Condition::Destination(value("write an address behind it")?.parse()?),
            "sport" => Condition::SourcePort(value("write a port behind it")?.parse()?),
            "dport" => Condition::DestinationPort(value("write a port behind it")?.parse()?),
            "zone" => {
                let word = value("write a zone's number behind it")?;
                Condition::Zone(
                    word.parse().map_err(|_| format!("'{word}' is no zone: write 0 to 65535"))?,
                )
            }
            "mark" => mark(value("write a mark behind it")?)?,
            "address" => {
                Condition::Address(self.interface(value("write an interface behind it")?)?)
            }
            "local" => Condition::Local,
            _ => {
                return Err(format!(
                    "'{name}' is no condition: write proto, src, dst, sport, dport, zone, mark, address or local"
                ));
            }
        })
    }

    /// The bit of an interface's name; a new name is noted.
    fn interface(&mut self, name: &str) -> Result<Interfaces, String> {
        // What the kernel allows; a colon would be a label (eth0:1), which counts as its interface.
        if name.len() > INTERFACE_NAME_MAX
            || name.contains(['/', ':'])
            || matches!(name, "." | "..")
        {
            return Err(format!("'{name}' is no interface: write a name as 'ip link' shows it"));
        }
        let at =
            self.interfaces.iter().position(|known| known == name).unwrap_or(self.interfaces.len());
        if at == RULE_INTERFACES_MAX {
            return Err(format!(
                "'{name}' is one interface too many: rules may name {RULE_INTERFACES_MAX} different ones"
            ));
        }
        if at == self.interfaces.len() {
            self.interfaces.push(name.to_owned());
        }
        Ok(1 << at)
    }
}

impl Rule {
    fn matches(&self, connection: &Connection, local: Option<&LocalView>) -> bool {
        self.conditions.iter().all(|condition| condition.holds(connection, local))
    }
}

impl Condition {
    fn holds(&self, connection: &Connection, local: Option<&LocalView>) -> bool {
        let t = &connection.original;
        match self {
            Condition::Protocol(protocol) => t.protocol == *protocol,
            Condition::Source(prefix) => prefix.contains(t.family, t.src),
            Condition::Destination(prefix) => prefix.contains(t.family, t.dst),
            Condition::SourcePort(ports) => has_ports(t.protocol) && ports.contains(t.sport),
            Condition::DestinationPort(ports) => has_ports(t.protocol) && ports.contains(t.dport),
            Condition::Zone(zone) => t.zone == *zone,
            Condition::Mark { value, mask } => connection.state.mark & mask == *value,
            Condition::Address(interfaces) => {
                local.is_some_and(|view| view.is_of(*interfaces, connection))
            }
            Condition::Local => local.is_some_and(|view| view.is_local(connection)),
        }
    }
}

/// An error if no connection can fulfil all of them.
fn can_match(conditions: &[Condition]) -> Result<(), String> {
    let mut portless = None;
    let mut asks_port = false;
    let mut families = [None, None];
    for condition in conditions {
        match condition {
            Condition::Protocol(protocol) if !has_ports(*protocol) => portless = Some(*protocol),
            Condition::SourcePort(_) | Condition::DestinationPort(_) => asks_port = true,
            Condition::Source(prefix) => families[0] = Some(prefix.family),
            Condition::Destination(prefix) => families[1] = Some(prefix.family),
            _ => {}
        }
    }
    if let (Some(protocol), true) = (portless, asks_port) {
        let name = PROTOCOLS.iter().find(|(_, number)| *number == protocol).map(|(name, _)| *name);
        let name = name.map_or(protocol.to_string(), str::to_owned);
        return Err(format!(
            "'{name}' has no ports, so it never matches: leave out sport and dport"
        ));
    }
    if let [Some(src), Some(dst)] = families
        && src != dst
    {
        return Err(
            "'src' and 'dst' are of two families, so it never matches: write two rules".into()
        );
    }
    Ok(())
}

fn protocol(word: &str) -> Result<u8, String> {
    let named = PROTOCOLS.iter().find(|(name, _)| *name == word).map(|(_, number)| *number);
    named.or_else(|| word.parse().ok()).ok_or_else(|| {
        let names: Vec<&str> = PROTOCOLS.iter().map(|(name, _)| *name).collect();
        format!("'{word}' is no protocol: write {} or 0 to 255", names.join(", "))
    })
}

fn mark(word: &str) -> Result<Condition, String> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let (value, mask) = match word.split_once('/') {
        Some((value, mask)) => (number(value), number(mask)),
        None => (number(word), Some(u32::MAX)),
    };
    match (value, mask) {
        (Some(value), Some(mask)) if value & !mask != 0 => Err(format!(
            "'{word}' never matches, its value has bits outside of its mask: write a wider mask"
        )),
        (Some(value), Some(mask)) => Ok(Condition::Mark { value, mask }),
        _ => Err(format!("'{word}' is no mark: write 5, 0x5 or 0x5/0xff")),
    }
}

/// Addresses that begin alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Prefix {
    family: Family,
    address: u128,
    mask: u128,
}

impl Prefix {
    fn contains(&self, family: Family, address: u128) -> bool {
        family == self.family && address & self.mask == self.address
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(word: &str) -> Result<Prefix, String> {
        let wrong = || {
            format!(
                "'{word}' is no address: write it as 10.0.0.1, 10.0.0.0/8, 2001:db8::1 or 2001:db8::/32"
            )
        };
        let (address, length) = match word.split_once('/') {
            Some((address, length)) => (address, Some(length.parse::<u32>().map_err(|_| wrong())?)),
            None => (word, None),
        };
        let (family, width, address) = match address.parse().map_err(|_| wrong())? {
            IpAddr::V4(a) => (Family::V4, u32::BITS, u32::from(a) as u128),
            IpAddr::V6(a) => (Family::V6, u128::BITS, u128::from(a)),
        };
        let length = length.unwrap_or(width);
        if length > width {
            return Err(format!(
                "'{word}' is longer than an address of its family: write /0 to /{width}"
            ));
        }
        // An IPv4 address has zeros before it, and the mask may have ones there.
        let mask = u128::MAX.checked_shl(width - length).unwrap_or(0);
        if address & !mask != 0 {
            let network = match family {
                Family::V4 => IpAddr::from(Ipv4Addr::from((address & mask) as u32)),
                Family::V6 => IpAddr::from(Ipv6Addr::from(address & mask)),
            };
            return Err(format!(
                "'{word}' has bits set behind its length: write {network}/{length}"
            ));
        }
        Ok(Prefix { family, address, mask })
    }
}

/// Ports from the first to the last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Ports {
    first: u16,
    last: u16,
}

impl Ports {
    fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(word: &str) -> Result<Ports, String> {
        let (first, last) = word.split_once('-').unwrap_or((word, word));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => Ok(Ports { first, last }),
            (Ok(_), Ok(_)) => {
                Err(format!("'{word}' ends before it begins: write the lower port first"))
            }
            _ => Err(format!("'{word}' is no port: write 0 to 65535, or two of them as 1000-2000")),
        }
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
