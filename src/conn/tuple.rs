//! Tuples: what names a connection in one direction, and which shard it belongs to.
//!
//! A tuple is addresses, ports, protocol and zone, as conntrack has them. Protocols without
//! ports keep what conntrack uses instead: ICMP and ICMPv6 have the identifier as source
//! port and `type << 8 | code` as destination port; GRE has its two keys, which are the call
//! ids of PPTP and otherwise zero; others have zero.
//!
//! [`shard_of`] is part of the protocol: the kernel's filter (classic BPF), the producer of
//! the ring and the sender of a delta all compute it, so that a copy lies where the events
//! of its connection will arrive. It uses nothing that classic BPF does not have: 32-bit
//! wrapping multiply, add, xor, shift and modulo.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IPPROTO_ICMP.
pub const ICMP: u8 = 1;
/// IPPROTO_TCP.
pub const TCP: u8 = 6;
/// IPPROTO_GRE.
pub const GRE: u8 = 47;
/// IPPROTO_UDP.
pub const UDP: u8 = 17;
/// IPPROTO_DCCP.
pub const DCCP: u8 = 33;
/// IPPROTO_ICMPV6.
pub const ICMPV6: u8 = 58;
/// IPPROTO_SCTP.
pub const SCTP: u8 = 132;
/// IPPROTO_UDPLITE.
pub const UDPLITE: u8 = 136;

/// The address family of both ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Family {
    /// Addresses use the low 32 bits of their `u128`.
    V4,
    /// Addresses use all 128 bits.
    V6,
}

/// One direction of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Tuple {
    /// Source address; IPv4 in the low 32 bits.
    pub src: u128,
    /// Destination address; IPv4 in the low 32 bits.
    pub dst: u128,
    /// Source port, or the ICMP identifier.
    pub sport: u16,
    /// Destination port, or ICMP `type << 8 | code`.
    pub dport: u16,
    /// The conntrack zone of this direction; 0 is the default zone.
    pub zone: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Family of both addresses.
    pub family: Family,
}

/// Whether the protocol has ports that conntrack tracks and `shard_of` may use.
pub fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | DCCP | SCTP | UDPLITE)
}

/// Whether conntrack tells connections of this protocol apart by two numbers that ctnetlink calls
/// ports: real ones, or GRE's keys.
pub fn has_keys(protocol: u8) -> bool {
    has_ports(protocol) || protocol == GRE
}

impl Tuple {
    /// An IPv4 tuple in the default zone.
    pub fn v4(protocol: u8, src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16)) -> Tuple {
        Tuple {
            src: u32::from(src.0) as u128,
            dst: u32::from(dst.0) as u128,
            sport: src.1,
            dport: dst.1,
            zone: 0,
            protocol,
            family: Family::V4,
        }
    }

    /// An IPv6 tuple in the default zone.
    pub fn v6(protocol: u8, src: (Ipv6Addr, u16), dst: (Ipv6Addr, u16)) -> Tuple {
        Tuple {
            src: u128::from(src.0),
            dst: u128::from(dst.0),
            sport: src.1,
            dport: dst.1,
            zone: 0,
            protocol,
            family: Family::V6,
        }
    }

    /// The tuple of an answer if no address is translated: both ends swapped. For ICMP the
    /// answer's type is what conntrack calls the inverse (echo reply for echo request).
    pub fn mirrored(&self) -> Tuple {
        if matches!(self.protocol, ICMP | ICMPV6) {
            let answer = match (self.protocol, self.dport >> 8) {
                (ICMP, 8) => 0,
                (ICMP, 0) => 8,
                (ICMP, 13) => 14,
                (ICMP, 14) => 13,
                (ICMP, 15) => 16,
                (ICMP, 16) => 15,
                (ICMP, 17) => 18,
                (ICMP, 18) => 17,
                (ICMPV6, 128) => 129,
                (ICMPV6, 129) => 128,
                (ICMPV6, 139) => 140,
                (ICMPV6, 140) => 139,
                (_, other) => other,
            };
            return Tuple {
                src: self.dst,
                dst: self.src,
                dport: answer << 8 | self.dport & 0xff,
                ..*self
            };
        }
        Tuple { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, ..*self }
    }

    /// The source as an address of the standard library.
    pub fn src_ip(&self) -> IpAddr {
        address(self.family, self.src)
    }

    /// The destination as an address of the standard library.
    pub fn dst_ip(&self) -> IpAddr {
        address(self.family, self.dst)
    }
}

fn address(family: Family, raw: u128) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from(raw as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(raw)),
    }
}

/// Multipliers of [`shard_of`]: odd, well mixed; those of Murmur3's 32-bit variant and finalizer.
pub const SHARD_MULTIPLIERS: [u32; 4] = [0xcc9e_2d51, 0x1b87_3593, 0x85eb_ca6b, 0xc2b2_ae35];

/// The shard, of `shards`, to which the connection with this original tuple belongs.
///
/// ```text
/// s = source address        (IPv6: the four 32-bit words, xor)
/// d = destination address   (the same)
/// p = source port << 16 | destination port, or 0 for protocols without ports
/// h = s * M0 + d * M1 + p * M2           (all modulo 2^32)
/// h = (h ^ h >> 15) * M3
/// h = h ^ h >> 16
/// shard = h mod shards
/// ```
///
/// Protocol and zone do not enter, so one filter serves them all.
pub fn shard_of(original: &Tuple, shards: u8) -> u8 {
    assert!(shards > 0, "a member has at least one shard");
    let fold = |a: u128| match original.family {
        Family::V4 => a as u32,
        Family::V6 => (a >> 96) as u32 ^ (a >> 64) as u32 ^ (a >> 32) as u32 ^ a as u32,
    };
    let ports = match has_ports(original.protocol) {
        true => (original.sport as u32) << 16 | original.dport as u32,
        false => 0,
    };
    let [m0, m1, m2, m3] = SHARD_MULTIPLIERS;
    let h = fold(original.src)
        .wrapping_mul(m0)
        .wrapping_add(fold(original.dst).wrapping_mul(m1))
        .wrapping_add(ports.wrapping_mul(m2));
    let h = (h ^ h >> 15).wrapping_mul(m3);
    let h = h ^ h >> 16;
    (h % shards as u32) as u8
}

/// Whether a connection of shard `mine` (of `mine_of`) can belong to shard `theirs` (of
/// `theirs_of`) at a peer: both are the same hash, modulo two numbers, so they agree modulo
/// every common divisor.
pub fn shards_can_meet(mine: u8, mine_of: u8, theirs: u8, theirs_of: u8) -> bool {
    let g = gcd(mine_of.max(1), theirs_of.max(1));
    mine % g == theirs % g
}

/// With how many of a peer's shards each shard of a member can share connections: at least 1.
pub fn shards_met(mine_of: u8, theirs_of: u8) -> u8 {
    theirs_of.max(1) / gcd(mine_of.max(1), theirs_of.max(1))
}

fn gcd(a: u8, b: u8) -> u8 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl std::fmt::Display for Tuple {
    /// `tcp 10.0.0.1:1000 > 10.0.0.2:80`, with ` zone 5` behind if there is one.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.protocol {
            TCP => f.write_str("tcp")?,
            UDP => f.write_str("udp")?,
            ICMP => f.write_str("icmp")?,
            ICMPV6 => f.write_str("icmpv6")?,
            SCTP => f.write_str("sctp")?,
            DCCP => f.write_str("dccp")?,
            UDPLITE => f.write_str("udplite")?,
            GRE => f.write_str("gre")?,
            other => write!(f, "{other}")?,
        }
        match self.family {
            Family::V4 => {
                write!(f, " {}:{} > {}:{}", self.src_ip(), self.sport, self.dst_ip(), self.dport)?
            }
            Family::V6 => write!(
                f,
                " [{}]:{} > [{}]:{}",
                self.src_ip(),
                self.sport,
                self.dst_ip(),
                self.dport
            )?,
        }
        match self.zone {
            0 => Ok(()),
            zone => write!(f, " zone {zone}"),
        }
    }
}

/// Why a text is not a tuple.
#[derive(Debug, PartialEq, Eq)]
pub struct NotATuple;

impl std::fmt::Display for NotATuple {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(
            "not a tuple: write it as 'tcp 10.0.0.1:1000 > 10.0.0.2:80', with ' zone 5' behind if it has one",
        )
    }
}

impl std::error::Error for NotATuple {}

impl std::str::FromStr for Tuple {
    type Err = NotATuple;

    /// Reads what [`Display`](std::fmt::Display) writes.
    fn from_str(text: &str) -> Result<Tuple, NotATuple> {
        let words: Vec<&str> = text.split_whitespace().filter(|w| *w != ">").collect();
        let (name, src, dst, zone) = match words[..] {
            [name, src, dst] => (name, src, dst, 0),
            [name, src, dst, "zone", zone] => {
                (name, src, dst, zone.parse().map_err(|_| NotATuple)?)
            }
            _ => return Err(NotATuple),
        };
        let protocol = match name {
            "tcp" => TCP,
            "udp" => UDP,
            "icmp" => ICMP,
            "icmpv6" => ICMPV6,
            "sctp" => SCTP,
            "dccp" => DCCP,
            "udplite" => UDPLITE,
            "gre" => GRE,
            number => number.parse().map_err(|_| NotATuple)?,
        };
        let src: std::net::SocketAddr = src.parse().map_err(|_| NotATuple)?;
        let dst: std::net::SocketAddr = dst.parse().map_err(|_| NotATuple)?;
        let mut tuple = match (src.ip(), dst.ip()) {
            (IpAddr::V4(s), IpAddr::V4(d)) => Tuple::v4(protocol, (s, src.port()), (d, dst.port())),
            (IpAddr::V6(s), IpAddr::V6(d)) => Tuple::v6(protocol, (s, src.port()), (d, dst.port())),
            _ => return Err(NotATuple),
        };
        tuple.zone = zone;
        Ok(tuple)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(n: u32) -> Tuple {
        Tuple::v4(
            TCP,
            (Ipv4Addr::from(0x0a00_0000 + n / 50_000), (n % 50_000) as u16),
            (Ipv4Addr::new(192, 0, 2, 1), 443),
        )
    }

    #[test]
    fn shard_of_is_frozen() {
        // Part of the protocol: these values may never change.
        let t =
            Tuple::v4(TCP, (Ipv4Addr::new(10, 0, 0, 1), 1000), (Ipv4Addr::new(10, 0, 0, 2), 80));
        let six = Tuple::v6(
            UDP,
            ("2001:db8::1".parse().unwrap(), 5353),
            ("2001:db8::2".parse().unwrap(), 53),
        );
        let ping =
            Tuple::v4(ICMP, (Ipv4Addr::new(10, 0, 0, 1), 77), (Ipv4Addr::new(10, 0, 0, 2), 8 << 8));
        let got: Vec<u8> = [t, six, ping].iter().map(|t| shard_of(t, 64)).collect();
        assert_eq!(got, FROZEN);
        assert_eq!(shard_of(&ping, 64), shard_of(&Tuple { sport: 1, dport: 2, ..ping }, 64));
    }
    const FROZEN: [u8; 3] = [7, 52, 40];

    #[test]
    #[cfg_attr(miri, ignore)] // Hundreds of thousands of hashes, and no memory.
    fn every_shard_gets_its_share() {
        for shards in [2u8, 3, 5, 16, 64] {
            let mut count = vec![0u32; shards as usize];
            for n in 0..64_000 {
                count[shard_of(&tuple(n), shards) as usize] += 1;
            }
            let fair = 64_000 / shards as u32;
            for c in count {
                assert!(c > fair * 8 / 10 && c < fair * 12 / 10, "{shards} shards: {c} of {fair}");
            }
        }
    }

    #[test]
    fn two_members_shards_meet_where_the_hash_says() {
        for n in 0..if cfg!(miri) { 50 } else { 2000 } {
            let (a, b) = (shard_of(&tuple(n), 4), shard_of(&tuple(n), 6));
            assert!(shards_can_meet(a, 4, b, 6));
        }
        assert!(!shards_can_meet(0, 2, 1, 2));
        assert!(shards_can_meet(0, 2, 1, 3));
    }

    #[test]
    fn a_tuple_reads_back_as_it_was_written() {
        let mut six =
            Tuple::v6(UDP, ("2001:db8::1".parse().unwrap(), 5353), ("::2".parse().unwrap(), 53));
        six.zone = 9;
        for t in [tuple(3), six] {
            assert_eq!(t.to_string().parse(), Ok(t));
        }
        for bad in [
            "",
            "tcp",
            "tcp 1.2.3.4 5.6.7.8",
            "tcp 1.2.3.4:1 [::1]:2",
            "tcp 1.2.3.4:1 > 1.2.3.4:99999",
        ] {
            assert_eq!(bad.parse::<Tuple>(), Err(NotATuple), "{bad}");
        }
    }

    #[test]
    fn an_echo_request_is_answered_by_an_echo_reply() {
        let ping =
            Tuple::v4(ICMP, (Ipv4Addr::new(10, 0, 0, 1), 77), (Ipv4Addr::new(10, 0, 0, 2), 8 << 8));
        let pong = ping.mirrored();
        assert_eq!((pong.sport, pong.dport, pong.mirrored()), (77, 0, ping));
    }
}
