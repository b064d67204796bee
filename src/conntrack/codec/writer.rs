//! Writing a request: netlink headers, attributes, and attributes within attributes.

use super::number::NESTED;
use super::{HEADERS, family_number};
use crate::conn::Family;

/// Room that any request fits: the longest, a translated TCP connection over IPv6 that has
/// everything which a connection can have, takes 476 bytes.
pub const MESSAGE_MAX: usize = 512;

/// A message that grows at the start of the caller's buffer.
pub(super) struct RequestWriter<'a> {
    buffer: &'a mut [u8],
    at: usize,
}

impl<'a> RequestWriter<'a> {
    pub(super) fn new(
        buffer: &'a mut [u8],
        kind: u16,
        flags: u16,
        sequence: u32,
        family: Option<Family>,
    ) -> RequestWriter<'a> {
        assert!(buffer.len() >= MESSAGE_MAX, "a request needs room for MESSAGE_MAX bytes");
        buffer[..HEADERS].fill(0);
        buffer[4..6].copy_from_slice(&kind.to_ne_bytes());
        buffer[6..8].copy_from_slice(&flags.to_ne_bytes());
        buffer[8..12].copy_from_slice(&sequence.to_ne_bytes());
        buffer[16] = family.map_or(0, family_number);
        RequestWriter { buffer, at: HEADERS }
    }

    pub(super) fn finish(self) -> usize {
        self.buffer[..4].copy_from_slice(&(self.at as u32).to_ne_bytes());
        self.at
    }

    /// One attribute with its padding.
    pub(super) fn field(&mut self, kind: u16, payload: &[u8]) {
        let end = self.at + 4 + payload.len();
        self.header(self.at, end, kind);
        self.buffer[self.at + 4..end].copy_from_slice(payload);
        let padded = end.next_multiple_of(4);
        self.buffer[end..padded].fill(0);
        self.at = padded;
    }

    /// An attribute that holds what `inside` writes.
    pub(super) fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) {
        let start = self.at;
        self.at += 4;
        inside(self);
        self.header(start, self.at, kind | NESTED);
    }

    fn header(&mut self, start: usize, end: usize, kind: u16) {
        self.buffer[start..start + 2].copy_from_slice(&((end - start) as u16).to_ne_bytes());
        self.buffer[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
    }

    pub(super) fn address(&mut self, v4: u16, v6: u16, family: Family, address: u128) {
        match family {
            Family::V4 => self.field(v4, &(address as u32).to_be_bytes()),
            Family::V6 => self.field(v6, &address.to_be_bytes()),
        }
    }

    pub(super) fn zone(&mut self, kind: u16, zone: u16) {
        if zone != 0 {
            self.field(kind, &zone.to_be_bytes());
        }
    }
}
