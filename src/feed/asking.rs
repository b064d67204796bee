//! What all share that ask the kernel: how often, how much, and what an answer tells.

use std::time::Duration;

use crate::conn::Connection;
use crate::conn::slot::groups;
use crate::conn::tuple::TCP;
use crate::sync::Replica;

/// Pause between two batches of kernel events under load, and between two of questions.
pub(super) const BATCH_PAUSE: Duration = Duration::from_millis(1);

/// How often overruns, and settings of the kernel, are looked at.
pub(super) const CHECK_PERIOD: Duration = Duration::from_millis(100);

/// Look-ups that may wait.
pub(super) const LOOKS_MAX: usize = 8192;

/// What the answer to a question tells of the connection in this slot, besides its mark and extra.
/// Its timeout says nothing new: it runs down, and grows with every packet; but one that has gone
/// over to another state has that state's. The kernel tells neither of offloaded flows.
pub(super) fn told_by_answer(slot: u32, there: &Connection, replica: &Replica<'_>) -> u8 {
    let known = replica.table().line(slot).state();
    if there.original.protocol == TCP && there.state.tcp_state == 0 {
        return groups::TUPLES;
    }
    let is_same = (known.tcp_state, known.status) == (there.state.tcp_state, there.state.status);
    groups::TUPLES | groups::STATE | if is_same { 0 } else { groups::TIMEOUT }
}
