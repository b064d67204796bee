//! hypersync keeps every connection of a group of stateful gateways on exactly two of them: the one
//! that sees its traffic, its *active*, and one other, its *backup*, which the active picks while
//! traffic flows. When a gateway dies, its connections go on at their backups. This is the page to
//! read first.
//!
//! ```text
//!   kernel conntrack events ──┐                                    ┌─> kernel conntrack
//!   shm ingest ring ──────────┤                                    │   (commit)
//!                             v                                    │
//!       source -> table slice -> dirty list -> delta -> train ─UDP─> decode -> table slice
//!                 (hold timer)   (bounded)     (registered arena     (peer's shard)  │
//!                                              = history)   <───────── ack ──────────┘
//!
//!   heartbeats -> group view -> a member dies -> its backups are the actives -> new backups
//! ```
//!
//! One process, one thread a core. Each thread is a **shard**: one io_uring loop and one slice of
//! the table, which lies in shared memory. Shards share nothing but words that one of them writes.
//! A pass of the loop is the data flow and reads like it ([`shard`]): reap, ingest, receive, tick,
//! commit, transmit, publish, and one wait.
//!
//! # Words
//!
//! One word, one meaning, here, in the code and in the manuals:
//!
//! | word | meaning |
//! |---|---|
//! | group, member | the hosts that share one group number; one host that runs the appliance |
//! | slot, generation | a place in a shard's slice of the table; the life of that place, so that a closed connection's name never means another |
//! | coordinate | member, shard, slot and generation: where one copy of a connection lives |
//! | active, backup | the copy whose member sees the traffic; the other one |
//! | presumed, claimed | active because the former active is silent; active because traffic showed up here. Only traffic outranks |
//! | hold | the time a connection must outlive before anybody else hears of it |
//! | delta | what a member is told of one connection: new (all of it), update (the newest value of every group of fields that changed since the last acknowledged delta), close or release |
//! | train | datagrams that leave in one send: side by side in the arena, all full but the last |
//! | stream, session | one shard to one shard of a peer; the time in which numbers, floor and leases of a stream mean something |
//! | floor | every datagram up to it is acknowledged, and an ack means applied |
//! | lease | empty slots of a backup that an active may fill |
//! | release, offer | "your copy is no longer needed"; "does my copy still stand?" Together: control requests |
//! | history | the datagrams sent lately, byte for byte, in the memory that io_uring sends from |
//! | stamp | epoch and version, which decide what is newer; a claim raises the epoch, a change the version |
//! | commit | what is asked of the kernel for a copy: to write its entry, to look at it, to delete it. Nothing else is called so |
//! | exposure | connections that have no up-to-date acknowledged second copy right now |
//! | drain | the way out: nothing is held back any more, until nothing is exposed and nothing begins here |
//! | incarnation, table id | one run of the process; one life of its table |
//!
//! # Reading order
//!
//! 1. [`limits`], [`time`], [`seq`], [`counters`]: what everything else is counted in.
//! 2. [`conn`]: tuples, coordinates, the slot's 128 bytes, the table.
//! 3. [`ccp`]: the bytes on the wire, and nothing else. docs/PROTOCOL.md draws them.
//! 4. [`group`]: who is there, who is dead, who should be a backup.
//! 5. [`sync`]: the protocol of one shard, [`Replica`](sync::Replica); its page says in which
//!    order.
//! 6. [`source`], [`rules`], [`memory`]: what goes in and out of it, what is copied at all, and
//!    what it stands on.
//! 7. [`shm`], [`ring`], [`net`], [`conntrack`]: the edges. [`feed`] and [`shard`] are where they
//!    meet; [`pace`] says when a shard waits.
//! 8. [`membership`], [`notify`], [`config`], [`appliance`], [`restart`], [`drain`]: the process
//!    around the shards.
//!
//! Steps 1 to 6 are the pure part: no clock, socket, thread or `unsafe` (a prefetch hint excepted);
//! time and bytes come in as arguments. `tests/protocol.rs` drives it over a network that loses,
//! repeats and reorders.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod appliance;
pub mod ccp;
pub mod clock;
pub mod config;
pub mod conn;
pub mod conntrack;
pub mod counters;
pub mod demo;
pub mod doorbell;
pub mod drain;
pub mod feed;
pub mod few;
pub mod group;
pub mod holder;
pub mod kill;
pub mod limits;
pub mod load;
pub mod logging;
pub mod membership;
pub mod memory;
pub mod net;
pub mod notify;
pub mod pace;
pub mod prefetch;
pub mod restart;
pub mod ring;
pub mod rules;
pub mod seq;
pub mod shard;
pub mod shm;
pub mod source;
pub mod sync;
pub mod time;
pub mod word;
