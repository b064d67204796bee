//! Addresses as people write them: `10.9.0.1`, `fd00::1`, or `fe80::1%sy0`, with the interface on
//! which it means something.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// An address, and its scope if one was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ScopedAddress {
    /// The address.
    pub ip: IpAddr,
    /// The interface's name behind the `%`.
    pub scope: Option<String>,
}

/// Whether an address says nothing without an interface: fe80::/10.
pub fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(a) if a.is_unicast_link_local())
}

/// Whether a multicast address is told apart by interface: ff01:: and ff02::.
fn is_of_a_link(a: Ipv6Addr) -> bool {
    a.is_multicast() && matches!(a.octets()[1] & 0xf, 1 | 2)
}

impl FromStr for ScopedAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<ScopedAddress, String> {
        let (address, scope) = match text.split_once('%') {
            Some((address, scope)) => (address, Some(scope)),
            None => (text, None),
        };
        let ip = IpAddr::from_str(address).map_err(|_| format!("'{text}' is no IP address"))?;
        match scope {
            None => {}
            Some("") => return Err(format!("'{text}': write the interface's name behind the %")),
            // Who deletes an interface and makes it anew gives it another number.
            Some(number) if number.bytes().all(|b| b.is_ascii_digit()) => {
                return Err(format!(
                    "'{text}': write the interface's name behind the %, not its number"
                ));
            }
            Some(_) if is_link_local(ip) || matches!(ip, IpAddr::V6(a) if is_of_a_link(a)) => {}
            Some(scope) => {
                return Err(format!(
                    "'{text}': only link-local IPv6 addresses have an interface behind them; leave %{scope} out"
                ));
            }
        }
        Ok(ScopedAddress { ip, scope: scope.map(str::to_owned) })
    }
}

impl fmt::Display for ScopedAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.scope {
            Some(scope) => write!(f, "{}%{scope}", self.ip),
            None => self.ip.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_stands_behind_link_local_addresses_only_and_by_its_name() {
        for text in ["10.9.0.1", "fd00::1", "fe80::1", "fe80::1%sy0", "ff02::74%br0.7"] {
            assert_eq!(text.parse::<ScopedAddress>().unwrap().to_string(), text);
        }
        for (text, says) in [
            ("here", "no IP address"),
            ("fe80::1%", "name behind the %"),
            ("fe80::1%3", "not its number"),
            ("fd00::1%sy0", "leave %sy0 out"),
            ("10.9.0.1%sy0", "leave %sy0 out"),
        ] {
            let error = text.parse::<ScopedAddress>().unwrap_err();
            assert!(error.contains(says) && error.contains(text), "{error}");
        }
    }
}
