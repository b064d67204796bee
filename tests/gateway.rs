//! Gateways with one shared SNAT address; one dies, and its connections go on through another.
//!
//! Every box is a network namespace with its own kernel conntrack, and the links are veth pairs
//! on three bridges. IPv6 is the same with `fd00:1::` for 10.1.0 and so on.
//!
//! ```text
//!                          +----------- gw1 ------------+
//!               10.1.0.1   | SNAT to 10.3.0.1           |   10.2.0.1
//!            +--------- cl0| DNAT from 10.4.0.1         |sv0 --------+
//!            |             | no passage without a       |            |
//!            |             | connection                 |            |
//!   client --+             +------------ sy0 -----------+            +-- server
//!   .10      |                            | 10.9.0.1                 |    .10
//!            |              hypersync, UDP 8116                      |
//! 10.1.0.0/24|                            | 10.9.0.2                 |10.2.0.0/24
//!            |             +------------ sy0 -----------+            |
//!            +--------- cl0| the same rules             |sv0 --------+
//!            |  10.1.0.2   |                            |   10.2.0.2 |
//!            |             +----------- gw2 ------------+            |
//!            :                     gw3, if any                       :
//!
//!   client: 10.2.0.0/24, 10.4.0.1 via 10.1.0.1     these routes are moved to gw2 by gw2's notify
//!   server: 10.1.0.0/24, 10.3.0.0/16 via 10.2.0.1  script on `member-dead 1` (or `member-leaving 1`), then to gw3 by gw3's
//! ```
//!
//! The gateways do not pick up connections in the middle (`tcp_loose=0`) and drop what is INVALID.
//! Without that a failover test passes with no replication at all, so the first tests show that
//! here every kind of flow does break when nobody replicates it.

#[path = "gateway/appliance.rs"]
mod appliance;
#[path = "gateway/calls.rs"]
mod calls;
mod common;
#[path = "gateway/counted.rs"]
mod counted;
#[path = "gateway/datagrams.rs"]
mod datagrams;
#[path = "gateway/detour.rs"]
mod detour;
#[path = "gateway/drained.rs"]
mod drained;
#[path = "gateway/entries.rs"]
mod entries;
#[path = "gateway/helpers.rs"]
mod helpers;
#[path = "gateway/kinds.rs"]
mod kinds;
#[path = "gateway/load.rs"]
mod load;
#[path = "gateway/masqueraded.rs"]
mod masqueraded;
#[path = "gateway/mix.rs"]
mod mix;
#[path = "gateway/moved.rs"]
mod moved;
#[path = "gateway/pair.rs"]
mod pair;
#[path = "gateway/reused.rs"]
mod reused;
#[path = "gateway/short.rs"]
mod short;
#[path = "gateway/three.rs"]
mod three;
#[path = "gateway/timeouts.rs"]
mod timeouts;
#[path = "gateway/topology.rs"]
mod topology;
#[path = "gateway/traffic.rs"]
mod traffic;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const CONNECTIONS: usize = 100;
const PORT: u16 = 7000;

/// A connection on which nothing was heard for so long counts as broken: TCP has sent again three
/// or four times by then.
const SILENCE: Duration = Duration::from_secs(5);

/// How long the client may have heard nothing when a gateway died: the dead time of 300 ms, and
/// TCP's own wait before it sends again, which doubles each time it was in vain. Less than a second
/// on a machine that has nothing else to do; the figure is printed, and this only says that nothing
/// hung.
const GAP_MAX: Duration = Duration::from_secs(12);

/// The tests measure time, so they take turns.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
