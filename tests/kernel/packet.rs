//! Packets as bytes, for a tun device: made from a tuple, and read as one.

use hypersync::conn::tuple::{ICMP, ICMPV6, TCP, UDP};
use hypersync::conn::{Family, Tuple};

/// What a TCP header has besides ports.
#[derive(Clone, Copy, Default)]
pub struct Numbers {
    pub flags: u8,
    pub sequence: u32,
    pub acknowledged: u32,
    /// Bytes of data.
    pub length: usize,
}

/// A packet with this tuple. Checksums are left out but for that of the IPv4 header.
pub fn bytes(tuple: &Tuple, numbers: &Numbers) -> Vec<u8> {
    let mut payload = Vec::new();
    let [kind, code] = tuple.dport.to_be_bytes();
    match tuple.protocol {
        TCP => {
            for port in [tuple.sport, tuple.dport] {
                payload.extend(port.to_be_bytes());
            }
            payload.extend(numbers.sequence.to_be_bytes());
            payload.extend(numbers.acknowledged.to_be_bytes());
            payload.extend([5 << 4, numbers.flags, 0xff, 0xff, 0, 0, 0, 0]);
            payload.resize(20 + numbers.length, b'x');
        }
        UDP => {
            for field in [tuple.sport, tuple.dport, 8, 0] {
                payload.extend(field.to_be_bytes());
            }
        }
        ICMP | ICMPV6 => {
            payload.extend([kind, code, 0, 0]);
            payload.extend(tuple.sport.to_be_bytes());
            payload.extend([0, 1]);
        }
        other => panic!("no packets of protocol {other} are made here"),
    }
    let mut packet = Vec::new();
    match tuple.family {
        Family::V4 => {
            let length = (20 + payload.len()) as u16;
            packet.extend([0x45, 0, length.to_be_bytes()[0], length.to_be_bytes()[1]]);
            packet.extend([0, 0, 0, 0, 64, tuple.protocol, 0, 0]);
            packet.extend((tuple.src as u32).to_be_bytes());
            packet.extend((tuple.dst as u32).to_be_bytes());
            let sum: u32 =
                packet.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]) as u32).sum();
            let folded = (sum & 0xffff) + (sum >> 16);
            packet[10..12]
                .copy_from_slice(&(!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes());
        }
        Family::V6 => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((payload.len() as u16).to_be_bytes());
            packet.extend([tuple.protocol, 64]);
            packet.extend(tuple.src.to_be_bytes());
            packet.extend(tuple.dst.to_be_bytes());
        }
    }
    packet.extend(payload);
    packet
}

/// The tuple of a packet; none of what the kernel sends on its own.
pub fn tuple(packet: &[u8]) -> Option<Tuple> {
    let word = |at: usize| Some(u32::from_be_bytes(packet.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u128::from_be_bytes(packet.get(at..at + 16)?.try_into().ok()?));
    let half = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    let (family, protocol, src, dst, rest) = match packet.first()? >> 4 {
        4 => (Family::V4, packet[9], word(12)? as u128, word(16)? as u128, 20),
        6 => (Family::V6, *packet.get(6)?, long(8)?, long(24)?, 40),
        _ => return None,
    };
    let (sport, dport) = match (protocol, half(rest)?) {
        (TCP | UDP, sport) => (sport, half(rest + 2)?),
        (ICMP, kind @ (0 | 0x800)) | (ICMPV6, kind @ (0x8000 | 0x8100)) => (half(rest + 4)?, kind),
        _ => return None,
    };
    Some(Tuple { src, dst, sport, dport, zone: 0, protocol, family })
}
