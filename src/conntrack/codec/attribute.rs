//! Netlink attributes, as they are read: one after the other, each length checked where it is used.

use super::number::TYPE_MASK;

/// Why a message makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Malformed {
    /// Shorter than its headers, or than its header says.
    Short,
    /// Neither NEW nor DELETE of conntrack.
    Type,
    /// Neither IPv4 nor IPv6.
    Family,
    /// An attribute that claims to be shorter than its header or longer than what is left.
    AttributeLength,
    /// A field that has not the size of its kind.
    FieldSize,
    /// No original tuple.
    NoOriginal,
    /// No reply tuple, in a message that is not a DELETE.
    NoReply,
    /// A tuple without both addresses.
    NoAddress,
    /// A tuple without a protocol.
    NoProtocol,
    /// Two tuples of different protocols.
    TwoProtocols,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Malformed::Short => "message shorter than it claims",
            Malformed::Type => "not a conntrack message",
            Malformed::Family => "neither IPv4 nor IPv6",
            Malformed::AttributeLength => "attribute with an impossible length",
            Malformed::FieldSize => "field of the wrong size",
            Malformed::NoOriginal => "no original tuple",
            Malformed::NoReply => "no reply tuple",
            Malformed::NoAddress => "tuple without addresses",
            Malformed::NoProtocol => "tuple without a protocol",
            Malformed::TwoProtocols => "tuples of two protocols",
        })
    }
}

impl std::error::Error for Malformed {}

/// The attributes in a piece of a message, one after the other: `(type, payload)`.
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// The attributes in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Attributes<'a> {
        Attributes(bytes)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let rest = std::mem::take(&mut self.0); // after an error the iteration ends
        let Some((header, _)) = rest.split_first_chunk::<4>() else {
            return Some(Err(Malformed::AttributeLength));
        };
        let length = u16::from_ne_bytes([header[0], header[1]]) as usize;
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let Some(payload) = rest.get(4..length) else {
            return Some(Err(Malformed::AttributeLength));
        };
        // The last attribute may come without its padding.
        self.0 = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Ok((kind, payload)))
    }
}

pub(super) fn field<const N: usize>(payload: &[u8]) -> Result<[u8; N], Malformed> {
    payload.try_into().map_err(|_| Malformed::FieldSize)
}

pub(super) fn be16(payload: &[u8]) -> Result<u16, Malformed> {
    field(payload).map(u16::from_be_bytes)
}

pub(super) fn be32(payload: &[u8]) -> Result<u32, Malformed> {
    field(payload).map(u32::from_be_bytes)
}

pub(super) fn byte(payload: &[u8]) -> Result<u8, Malformed> {
    field::<1>(payload).map(|b| b[0])
}
