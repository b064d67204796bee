//! Sends: what a pass hands to the loop, in order.
//!
//! The verbs that compose datagrams append here; the loop takes one after the other, and gives each
//! token back when the kernel is done with its bytes. What always holds: *no more is appended in a
//! pass than the loop takes* (it says how much that is when the pass begins), so nothing that is
//! composed waits or is lost here.

use std::collections::VecDeque;

use crate::limits::DATAGRAM_MAX;

/// A send for the loop: `len` bytes at `offset` of the arena, to a stream, cut into datagrams of
/// `DATAGRAM_MAX` bytes of which the last may be shorter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transmit {
    /// The stream.
    pub stream: usize,
    /// Bytes from the arena's begin.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
    /// To be given back by [`Replica::on_send_complete`](super::Replica::on_send_complete), exactly
    /// once.
    pub token: Token,
}

/// Names the buffers of a send: history entries, or a control buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token(pub u64);

/// What a token names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Named {
    /// So many entries of the history, from this one on.
    Entries(u32, u32),
    /// This control buffer.
    Control(u16),
}

impl Token {
    pub(super) fn entries(first: u32, count: u32) -> Token {
        Token((count as u64) << 32 | first as u64)
    }

    /// A control buffer's token.
    pub(super) fn control(buffer: u16) -> Token {
        Token(1 << 63 | buffer as u64)
    }

    pub(super) fn names(self) -> Named {
        match self.0 >> 63 {
            1 => Named::Control(self.0 as u16),
            _ => Named::Entries(self.0 as u32, (self.0 >> 32) as u32),
        }
    }
}

/// What a pass sends as a rule, at most.
const SENDS_SOON: usize = 256;

/// What this pass sends.
pub(super) struct Sends {
    queue: VecDeque<Transmit>,
    /// Datagrams that the loop still takes in this pass.
    room: usize,
}

impl Sends {
    pub(super) fn new() -> Sends {
        Sends { queue: VecDeque::with_capacity(SENDS_SOON), room: 0 }
    }

    /// A pass begins: the loop takes so many datagrams.
    pub(super) fn begin(&mut self, room: usize) {
        assert!(self.queue.is_empty(), "the loop took all that the last pass composed");
        self.room = room;
    }

    /// Datagrams that may still be appended.
    pub(super) fn room(&self) -> usize {
        self.room
    }

    /// Appends a send. `false`: the loop takes no more in this pass.
    pub(super) fn push(&mut self, transmit: Transmit) -> bool {
        let Some(room) = self.room.checked_sub((transmit.len as usize).div_ceil(DATAGRAM_MAX))
        else {
            return false;
        };
        self.room = room;
        self.queue.push_back(transmit);
        true
    }

    /// The next one, for the loop.
    pub(super) fn pop(&mut self) -> Option<Transmit> {
        self.queue.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_composed_than_the_loop_takes_and_it_is_taken_in_order() {
        let send = |stream: usize, datagrams: usize| {
            let len = (datagrams * DATAGRAM_MAX) as u32 - 1;
            Transmit { stream, offset: 0, len, token: Token::control(stream as u16) }
        };
        let mut sends = Sends::new();
        assert!(!sends.push(send(1, 1)), "no pass has begun");
        sends.begin(5);
        assert!(sends.push(send(1, 2)));
        assert!(!sends.push(send(2, 4)), "its last datagram would be one too many");
        assert!(sends.push(send(3, 3)));
        assert_eq!(sends.room(), 0);
        let taken: Vec<usize> = std::iter::from_fn(|| sends.pop()).map(|t| t.stream).collect();
        assert_eq!(taken, [1, 3]);
        sends.begin(1);
    }

    #[test]
    fn a_token_names_what_it_was_made_of() {
        for (first, count) in [(0, 1), (u32::MAX, 64)] {
            assert_eq!(Token::entries(first, count).names(), Named::Entries(first, count));
        }
        assert_eq!(Token::control(9).names(), Named::Control(9));
    }
}
