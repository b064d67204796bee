//! Reading and writing big-endian fields, bounds checked.

use super::Reject;

/// Reads fields from the front of a slice; what is missing is [`Reject::Short`].
#[derive(Clone, Copy)]
pub struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    /// A reader over these bytes.
    pub fn new(bytes: &'b [u8]) -> Reader<'b> {
        Reader(bytes)
    }

    /// Bytes left.
    pub fn left(&self) -> usize {
        self.0.len()
    }

    /// The next byte, which stays.
    pub fn peek(&self) -> Option<u8> {
        self.0.first().copied()
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Reject> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Reject::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Result<&'b [u8], Reject> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(Reject::Short)?;
        self.0 = rest;
        Ok(head)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, Reject> {
        self.array::<1>().map(|[b]| b)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Result<u16, Reject> {
        self.array().map(u16::from_be_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, Reject> {
        self.array().map(u32::from_be_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, Reject> {
        self.array().map(u64::from_be_bytes)
    }

    /// Sixteen bytes.
    pub fn u128(&mut self) -> Result<u128, Reject> {
        self.array().map(u128::from_be_bytes)
    }

    /// A 32-bit number in one to five bytes: seven bits a byte, least significant first, the top
    /// bit set on all but the last (LEB128).
    pub fn varint(&mut self) -> Result<u32, Reject> {
        let mut value = 0u32;
        for i in 0..5 {
            let byte = self.u8()?;
            let part = (byte & 0x7f) as u32;
            if i == 4 && part > 0xf {
                return Err(Reject::Message);
            }
            value |= part << (7 * i);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Reject::Message)
    }
}

/// Writes fields into a buffer from its front. The caller makes sure of the room: every message
/// has a documented largest size.
pub struct Writer<'b> {
    bytes: &'b mut [u8],
    at: usize,
}

impl<'b> Writer<'b> {
    /// A writer over this buffer.
    pub fn new(bytes: &'b mut [u8]) -> Writer<'b> {
        Writer { bytes, at: 0 }
    }

    /// Bytes written.
    pub fn len(&self) -> usize {
        self.at
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.at == 0
    }

    /// Room left.
    pub fn room(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Some bytes.
    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    /// One byte.
    pub fn u8(&mut self, v: u8) {
        self.put(&[v]);
    }

    /// Two bytes.
    pub fn u16(&mut self, v: u16) {
        self.put(&v.to_be_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, v: u32) {
        self.put(&v.to_be_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, v: u64) {
        self.put(&v.to_be_bytes());
    }

    /// Sixteen bytes.
    pub fn u128(&mut self, v: u128) {
        self.put(&v.to_be_bytes());
    }

    /// A 32-bit number in one to five bytes; see [`Reader::varint`].
    pub fn varint(&mut self, mut v: u32) {
        while v >= 0x80 {
            self.u8(v as u8 | 0x80);
            v >>= 7;
        }
        self.u8(v as u8);
    }

    /// Zeros up to this length.
    pub fn pad_to(&mut self, len: usize) {
        if len > self.at {
            self.bytes[self.at..len].fill(0);
            self.at = len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_keep_every_value_and_refuse_what_is_too_long() {
        for v in [0, 1, 127, 128, 16_383, 16_384, u32::MAX - 1, u32::MAX] {
            let mut buffer = [0xa5; 8];
            let mut w = Writer::new(&mut buffer);
            w.varint(v);
            let len = w.len();
            assert_eq!(Reader::new(&buffer[..len]).varint(), Ok(v));
            assert_eq!(Reader::new(&buffer[..len - 1]).varint(), Err(Reject::Short));
        }
        assert_eq!(Reader::new(&[0xff; 8]).varint(), Err(Reject::Message));
        assert_eq!(Reader::new(&[0x80, 0x80, 0x80, 0x80, 0x10]).varint(), Err(Reject::Message));
    }
}
