//! Every limit of hypersync in one place, with what happens on the day it is hit.
//!
//! Relations between the limits are asserted here at compile time. A limit that is
//! part of the wire format or of the shared memory's layout says so: changing it
//! means a new protocol version or layout version.

/// Members of a group. Part of the wire format: a coordinate has 6 bits for the member
/// (ids 1 to 52; 0 means "no member"), and stock CPHA decoders read one byte a member.
pub const MEMBERS_MAX: usize = 52;

/// Shards of a member. Part of the wire format: 6 bits in a coordinate.
pub const SHARDS_MAX: usize = 64;

/// Slots of one shard's table slice. Part of the wire format: 26 bits in a coordinate.
pub const SLOTS_MAX: usize = 1 << 26;

/// Smallest table slice that `hypersync run` accepts, slots.
pub const SLOTS_MIN: usize = 64;

/// Generations of a slot before they wrap. Part of the wire format: 26 bits.
pub const GENERATIONS: u32 = 1 << 26;

/// Streams a shard may have: one to every shard of every member.
pub const STREAMS_MAX: usize = MEMBERS_MAX * SHARDS_MAX;

/// Datagrams a stream may have on the way beyond its floor. A receiver drops and counts
/// what lies beyond; a sender waits for an ack. 2048 datagrams of 1448 bytes are 2.9 MB,
/// which fills 10 Gbit/s at a round trip of 2 ms.
pub const WINDOW: u64 = 2048;

/// Smallest window that loss can push a sender down to, datagrams.
pub const WINDOW_MIN: u64 = 16;

/// Bytes of UDP payload in a full datagram on a 1500-byte link, rounded down to a multiple
/// of 8 so that datagrams of one train stay aligned in the arena: 1500 - 40 (IPv6) - 8 (UDP)
/// = 1452 -> 1448. The same on IPv4 and on links with a larger MTU: the group's members
/// need not agree on anything but this.
pub const DATAGRAM_MAX: usize = 1448;

/// Smallest link MTU on which hypersync runs, bytes.
pub const MTU_MIN: usize = 1500;

/// Segments in one UDP_SEGMENT send. Kernels before 6.9 allow 64, later ones 128.
pub const SEGMENTS_MAX: usize = 44;

/// Bytes in one UDP_SEGMENT send: what one UDP datagram could hold (65,535 - 20 - 8).
pub const TRAIN_MAX: usize = 65_507;

/// Control datagrams (heartbeats, acks, skips) that can be on their way out at once in one
/// shard. When none is free the message waits for the next pass and is counted.
pub const CONTROL_BUFFERS: usize = 128;

/// Bytes of one control buffer: a full datagram, rounded up.
pub const CONTROL_BUFFER_SIZE: usize = 1536;

/// Smallest and largest send arena of a shard, bytes, control buffers included.
pub const ARENA_MIN: usize = 512 << 10;
/// Largest send arena of a shard, bytes: offsets are 32 bits.
pub const ARENA_MAX: usize = 1 << 30;

/// Bytes of the arena for each entry (each datagram) of the history.
pub const HISTORY_BYTES_PER_ENTRY: usize = 512;

/// Slots granted in one lease message: what fits a datagram with room to spare.
pub const LEASE_GRANT_MAX: usize = 128;

/// Smallest number of slots that an active asks for at once.
pub const LEASE_WANT_MIN: u64 = 64;

/// Largest number of unused slots that an active wants to have in one stream's lease.
pub const LEASE_WANT_MAX: u64 = 32_768;

/// Releases under way at once in one shard (make before break). Further ones wait.
pub const MOVES_MAX: usize = 1024;

/// Commits waiting for the kernel in one shard. When full, the receive stage pauses until
/// there is room, so the peer's window is what slows down.
pub const COMMIT_QUEUE: usize = 8192;

/// Slots that one tick looks at when it walks the table for re-protection.
pub const WALK_PER_TICK: usize = 4096;

/// Events waiting for the notify command. When full the newest is dropped and counted.
pub const NOTIFY_QUEUE: usize = 256;

/// Refusals told in one control datagram. Further ones are found again when the datagram is
/// repeated.
pub const REFUSALS_MAX: usize = 32;

/// Datagrams that arrived at the wrong shard and wait for the right one. What does not fit is lost
/// like any other datagram, and repeated.
pub const STRAYS: usize = 64;

/// Log lines that wait to be written. What does not fit is counted, and the count is logged.
pub const LOG_QUEUE: usize = 1024;

/// Bytes of a log line, without time and level. A longer one is cut, and ends in an ellipsis.
pub const LOG_LINE_MAX: usize = 1000;

/// Received datagrams acted on in one pass of a shard.
pub const RECEIVE_PER_PASS: usize = 4096;

/// Source events acted on in one pass of a shard.
pub const INGEST_PER_PASS: usize = 512;

/// Smallest buffer for kernel events that wait for a shard, bytes: a few dozen events. What does
/// not fit is lost, counted (`source_overruns`) and repaired by a dump.
pub const EVENT_BUFFER_MIN: u64 = 64 << 10;

/// Largest such buffer, bytes: the kernel doubles it, and counts in an `int`.
pub const EVENT_BUFFER_MAX: u64 = 512 << 20;

/// Kernel commits in one pass of a shard: an insert is done inline at 3.7 to 4.7 us, so
/// 32 keep a pass under 150 us.
pub const COMMIT_PER_PASS: usize = 32;

/// Deltas encoded in one pass of a shard.
pub const TRANSMIT_PER_PASS: usize = 8192;

/// Smallest ingest ring of a shard, records of 128 bytes; a power of two. A full ring refuses
/// further records (`Full`) until the shard has read some: the producer decides what to do.
pub const INGEST_RECORDS_MIN: usize = 32;

/// Largest ingest ring of a shard, records; a power of two: 128 MB.
pub const INGEST_RECORDS_MAX: usize = 1 << 20;

/// Unicast peers on the command line: every other member.
pub const PEERS_MAX: usize = MEMBERS_MAX - 1;

/// Rules that say what is copied, those of `--rule` and of `--rules` together. More are refused at
/// start.
pub const RULES_MAX: usize = 256;

/// Interfaces that rules name: a bit each in what is known of an address. More are refused at
/// start.
pub const RULE_INTERFACES_MAX: usize = 32;

const _: () = assert!(MEMBERS_MAX < 64 && SHARDS_MAX <= 64);
const _: () = assert!(SLOTS_MAX <= 1 << 26 && GENERATIONS as usize == 1 << 26);
const _: () = assert!(DATAGRAM_MAX.is_multiple_of(8) && DATAGRAM_MAX <= MTU_MIN - 48);
const _: () = assert!(SEGMENTS_MAX <= 64 && SEGMENTS_MAX * DATAGRAM_MAX <= TRAIN_MAX);
const _: () =
    assert!(CONTROL_BUFFER_SIZE >= DATAGRAM_MAX && CONTROL_BUFFER_SIZE.is_multiple_of(64));
const _: () = assert!(CONTROL_BUFFERS * CONTROL_BUFFER_SIZE <= ARENA_MIN / 2);
const _: () = assert!(INGEST_RECORDS_MIN.is_power_of_two() && INGEST_RECORDS_MAX.is_power_of_two());
const _: () = assert!(WINDOW.is_multiple_of(64) && WINDOW_MIN < WINDOW);

/// Lines of a comparison that may wait to be sent.
pub const ITEMS_MAX: usize = 512;

/// Connections that may wait to be asked for again.
pub const RESENDS_MAX: usize = 512;

/// Differences that may wait to be told to the log.
pub const FINDINGS_MAX: usize = 64;
