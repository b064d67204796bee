//! The filter on an event socket: a shard takes from the kernel only what is its own.
//!
//! A classic BPF program that the kernel runs on every conntrack event before it is queued.
//! It drops the echo of our own commits (every shard's commit socket, not only this one's)
//! and the connections of other shards, and passes everything that it does not understand:
//! whoever reads the socket checks the shard again. Expectations pass: they are messages of
//! another kind, with other things where a connection has its tuple.
//!
//! The program computes [`shard_of`](crate::conn::shard_of) from fixed offsets into the
//! message. They hold because ctnetlink always writes the original tuple first, addresses
//! before ports, with nothing in between:
//!
//! ```text
//!          source  destination  protocol  source port  destination port   ends at
//!  IPv4      32        40          52         60              68             70
//!  IPv6      32        52          76         84              92             94
//! ```
//!
//! Classic BPF loads are big-endian whatever the host: right for tuples, so the port ids,
//! which are in the host's order, are compared with their bytes turned.

use super::codec;
use crate::conn::tuple::{DCCP, SCTP, SHARD_MULTIPLIERS, TCP, UDP, UDPLITE};

/// One classic BPF instruction, laid out as the kernel's `struct sock_filter`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Instruction {
    /// What to do.
    pub code: u16,
    /// How many instructions to skip if a comparison holds.
    pub if_true: u8,
    /// How many to skip if it does not.
    pub if_false: u8,
    /// The operand.
    pub operand: u32,
}

/// The instructions used here: `A` is the accumulator, `X` the index register.
pub mod code {
    /// A = 4 bytes at the operand.
    pub const LOAD_WORD: u16 = 0x20;
    /// A = 2 bytes at the operand.
    pub const LOAD_HALF: u16 = 0x28;
    /// A = the byte at the operand.
    pub const LOAD_BYTE: u16 = 0x30;
    /// A = length of the message.
    pub const LOAD_LENGTH: u16 = 0x80;
    /// A = operand.
    pub const LOAD_CONSTANT: u16 = 0x00;
    /// A = scratch word.
    pub const LOAD_SCRATCH: u16 = 0x60;
    /// Scratch word = A.
    pub const STORE: u16 = 0x02;
    /// X = A.
    pub const TO_X: u16 = 0x07;
    /// A += X.
    pub const ADD_X: u16 = 0x0c;
    /// A |= X.
    pub const OR_X: u16 = 0x4c;
    /// A ^= X.
    pub const XOR_X: u16 = 0xac;
    /// A *= operand.
    pub const MULTIPLY: u16 = 0x24;
    /// A %= operand.
    pub const MODULO: u16 = 0x94;
    /// A <<= operand.
    pub const SHIFT_LEFT: u16 = 0x64;
    /// A >>= operand.
    pub const SHIFT_RIGHT: u16 = 0x74;
    /// Skip `operand` instructions.
    pub const JUMP: u16 = 0x05;
    /// Compare A with the operand.
    pub const IF_EQUAL: u16 = 0x15;
    /// Compare A with the operand, unsigned.
    pub const IF_AT_LEAST: u16 = 0x35;
    /// Keep the message's first `operand` bytes; 0 drops it.
    pub const RETURN: u16 = 0x06;
}

use code::*;

const DROP: Instruction = plain(RETURN, 0);
const PASS: Instruction = plain(RETURN, u32::MAX);

const fn plain(code: u16, operand: u32) -> Instruction {
    Instruction { code, if_true: 0, if_false: 0, operand }
}

const fn test(code: u16, operand: u32, if_true: u8, if_false: u8) -> Instruction {
    Instruction { code, if_true, if_false, operand }
}

/// Where one family has its tuple.
struct Layout {
    destination: u32,
    address_words: u32,
    protocol: u32,
    source_port: u32,
    destination_port: u32,
}

/// Where the subsystem is: in the high byte of the type, which is in the host's order.
const SUBSYSTEM: u32 = if cfg!(target_endian = "little") { 5 } else { 4 };
const SOURCE: u32 = 32;
const V4: Layout = Layout {
    destination: 40,
    address_words: 1,
    protocol: 52,
    source_port: 60,
    destination_port: 68,
};
const V6: Layout = Layout {
    destination: 52,
    address_words: 4,
    protocol: 76,
    source_port: 84,
    destination_port: 92,
};

/// The program for one shard of `shards`. `own_port_ids` are those of every socket in this
/// process that writes to conntrack.
pub fn program(own_port_ids: &[u32], shard: u8, shards: u8) -> Vec<Instruction> {
    assert!(shard < shards, "shard {shard} of {shards}");
    let mut p = Vec::new();
    // Anything shorter than a tuple passes: a load beyond the end would drop it.
    p.extend([plain(LOAD_LENGTH, 0), test(IF_AT_LEAST, 20, 1, 0), PASS]);
    p.push(plain(LOAD_WORD, 12));
    for id in own_port_ids {
        p.extend([test(IF_EQUAL, u32::from_be_bytes(id.to_ne_bytes()), 0, 1), DROP]);
    }
    if shards > 1 {
        let expectation = codec::SUBSYSTEM_EXPECT as u32;
        p.extend([plain(LOAD_BYTE, SUBSYSTEM), test(IF_EQUAL, expectation, 0, 1), PASS]);
        let v4 = shard_test(&V4, shard, shards);
        p.extend([plain(LOAD_BYTE, 16), test(IF_EQUAL, libc::AF_INET as u32, 1, 0)]);
        p.push(plain(JUMP, v4.len() as u32));
        p.extend(v4);
        p.extend([plain(LOAD_BYTE, 16), test(IF_EQUAL, libc::AF_INET6 as u32, 1, 0), PASS]);
        p.extend(shard_test(&V6, shard, shards));
    }
    p.push(PASS);
    p
}

/// Hashes the tuple of one family and returns from the program.
fn shard_test(at: &Layout, shard: u8, shards: u8) -> Vec<Instruction> {
    let [m0, m1, m2, m3] = SHARD_MULTIPLIERS;
    let mut p = vec![plain(LOAD_LENGTH, 0), test(IF_AT_LEAST, at.destination_port + 2, 1, 0), PASS];

    // M[0] = ports * M2, or 0 for protocols without ports.
    p.push(plain(LOAD_BYTE, at.protocol));
    let ports = [
        plain(LOAD_HALF, at.source_port),
        plain(SHIFT_LEFT, 16),
        plain(TO_X, 0),
        plain(LOAD_HALF, at.destination_port),
        plain(OR_X, 0),
        plain(MULTIPLY, m2),
        plain(JUMP, 1),
    ];
    let with_ports = [TCP, UDP, DCCP, SCTP, UDPLITE];
    for (i, protocol) in with_ports.into_iter().enumerate() {
        let is_last = i + 1 == with_ports.len();
        let tests_left = (with_ports.len() - 1 - i) as u8;
        p.push(test(
            IF_EQUAL,
            protocol as u32,
            tests_left,
            if is_last { ports.len() as u8 } else { 0 },
        ));
    }
    p.extend(ports);
    p.extend([plain(LOAD_CONSTANT, 0), plain(STORE, 0)]);

    // M[0] += source * M0 + destination * M1
    for (address, multiplier) in [(SOURCE, m0), (at.destination, m1)] {
        p.push(plain(LOAD_WORD, address));
        for word in 1..at.address_words {
            p.extend([plain(TO_X, 0), plain(LOAD_WORD, address + 4 * word), plain(XOR_X, 0)]);
        }
        p.extend([
            plain(MULTIPLY, multiplier),
            plain(TO_X, 0),
            plain(LOAD_SCRATCH, 0),
            plain(ADD_X, 0),
        ]);
        p.push(plain(STORE, 0));
    }

    // A = the finished hash: twice A ^= A >> n, with a multiplication between.
    for (shift, multiplier) in [(15, Some(m3)), (16, None)] {
        p.extend([plain(TO_X, 0), plain(SHIFT_RIGHT, shift), plain(XOR_X, 0)]);
        p.extend(multiplier.map(|m| plain(MULTIPLY, m)));
    }
    p.extend([plain(MODULO, shards as u32), test(IF_EQUAL, shard as u32, 0, 1), PASS, DROP]);
    p
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::{Connection, State, Tuple, shard_of};
    use crate::conntrack::codec::{MESSAGE_MAX, encode_create};

    /// Runs a program as the kernel does; `None` for a program that the kernel would refuse.
    fn run(program: &[Instruction], message: &[u8]) -> Option<u32> {
        let (mut a, mut x, mut scratch) = (0u32, 0u32, [None; 16]);
        let mut at = 0;
        loop {
            let i = program.get(at)?;
            let k = i.operand;
            at += 1;
            let load = |size: usize| {
                let bytes = message.get(k as usize..)?.get(..size)?;
                Some(bytes.iter().fold(0u32, |value, byte| value << 8 | *byte as u32))
            };
            let loaded = match i.code {
                LOAD_WORD => load(4),
                LOAD_HALF => load(2),
                LOAD_BYTE => load(1),
                _ => Some(a),
            };
            let Some(value) = loaded else { return Some(0) }; // beyond the end: dropped
            a = value;
            match i.code {
                LOAD_WORD | LOAD_HALF | LOAD_BYTE => {}
                LOAD_LENGTH => a = message.len() as u32,
                LOAD_CONSTANT => a = k,
                LOAD_SCRATCH => a = scratch[k as usize]?,
                STORE => scratch[k as usize] = Some(a),
                TO_X => x = a,
                ADD_X => a = a.wrapping_add(x),
                OR_X => a |= x,
                XOR_X => a ^= x,
                MULTIPLY => a = a.wrapping_mul(k),
                MODULO => a %= k,
                SHIFT_LEFT => a <<= k,
                SHIFT_RIGHT => a >>= k,
                JUMP => at += k as usize,
                IF_EQUAL => at += if a == k { i.if_true } else { i.if_false } as usize,
                IF_AT_LEAST => at += if a >= k { i.if_true } else { i.if_false } as usize,
                RETURN => return Some(k),
                _ => return None,
            }
        }
    }

    fn passes(program: &[Instruction], message: &[u8]) -> bool {
        run(program, message).expect("a program that the kernel accepts") != 0
    }

    /// A message about this connection: requests have the tuples where events have them.
    fn message(original: Tuple, from_port_id: u32) -> Vec<u8> {
        let mut buffer = [0xa5; MESSAGE_MAX];
        let connection = Connection::new(original, original.mirrored(), State::default());
        let length = encode_create(&mut buffer, 1, &connection, 1);
        buffer[12..16].copy_from_slice(&from_port_id.to_ne_bytes());
        buffer[..length].to_vec()
    }

    #[test]
    fn a_message_passes_at_its_own_shard_and_nowhere_else() {
        let mut rng = 7u64;
        let mut next = || {
            rng =
                rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            rng >> 16
        };
        for n in 0..20_000u32 {
            let (a, b) = (next() as u128, next() as u128);
            let protocol =
                [TCP, UDP, DCCP, SCTP, UDPLITE, 1, 47, 50, 58, 89, 115][next() as usize % 11];
            let ports = (next() as u16, next() as u16);
            let mut original = match n % 3 {
                0 => Tuple::v6(
                    protocol,
                    ((a << 71 ^ b).into(), ports.0),
                    ((b << 64 | a).into(), ports.1),
                ),
                _ => {
                    Tuple::v4(protocol, ((a as u32).into(), ports.0), ((b as u32).into(), ports.1))
                }
            };
            original.zone = (n % 5) as u16;
            let message = message(original, 0);
            let shards = 1 + (next() % 64) as u8;
            let shard = shard_of(&original, shards);
            assert!(passes(&program(&[5], shard, shards), &message), "{original} in {shards}");
            if shards > 1 {
                let other = (shard + 1 + next() as u8 % (shards - 1)) % shards;
                assert!(!passes(&program(&[5], other, shards), &message), "{original} in {shards}");
            }
        }
    }

    #[test]
    fn no_shard_hears_the_echo_of_any_commit_socket() {
        let own: Vec<u32> = (0..64).map(|n| n * 0x0403_0201 + 1).collect();
        let original: Tuple = "tcp 10.0.0.1:1000 > 10.0.0.2:80".parse().expect("a tuple");
        for shards in [1, 4] {
            let program = program(&own, shard_of(&original, shards), shards);
            assert!(own.iter().all(|id| !passes(&program, &message(original, *id))));
            for other in [0, 2, own[1].swap_bytes(), u32::MAX] {
                assert!(passes(&program, &message(original, other)), "{other}");
            }
        }
    }

    #[test]
    fn an_expectation_passes_at_every_shard_and_is_not_taken_for_a_connection() {
        let original: Tuple = "tcp 10.0.0.1:1000 > 10.0.0.2:80".parse().expect("a tuple");
        for kind in 0..3u16 {
            let mut expectation = message(original, 0);
            let of_subsystem = (codec::SUBSYSTEM_EXPECT as u16) << 8 | kind;
            expectation[4..6].copy_from_slice(&of_subsystem.to_ne_bytes());
            assert!((0..8).all(|shard| passes(&program(&[5], shard, 8), &expectation)));
            assert!(codec::is_expectation(&expectation));
            assert_eq!(codec::decode(&expectation).err(), Some(codec::Malformed::Type));
            assert!(
                !codec::is_expectation(&message(original, 0))
                    && !codec::is_expectation(&expectation[..5])
            );
        }
    }

    #[test]
    fn what_the_filter_does_not_understand_passes() {
        let original: Tuple = "tcp 10.0.0.1:1000 > 10.0.0.2:80".parse().expect("a tuple");
        let program = program(&[5], (shard_of(&original, 8) + 1) % 8, 8);
        let mut strange = message(original, 0);
        assert!(!passes(&program, &strange));
        assert!((0..70).all(|length| passes(&program, &strange[..length])), "too short to judge");
        strange[16] = libc::AF_INET6 as u8;
        assert!((0..94).all(|length| passes(&program, &strange[..length])), "too short to judge");
        strange[16] = 9;
        assert!(passes(&program, &strange), "another family");
        assert!(program.len() < 150, "{}", program.len());
    }
}
