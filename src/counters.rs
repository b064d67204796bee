//! The counters: one list with names and meanings, used by the appliance that counts, the
//! inspector that prints and the documentation.
//!
//! A counter is a word in shared memory that one shard writes and anybody reads. Most only
//! grow; a **gauge** says how things are now. Names are stable: scripts read them.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::word::Word;

macro_rules! counters {
    ($($variant:ident, $name:literal, $meaning:literal;)*) => {
        /// A counter of a shard.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(usize)]
        pub enum Counter { $(#[doc = $meaning] $variant),* }

        /// Every counter, in the order of its word.
        pub const COUNTERS: &[CounterInfo] = &[
            $(CounterInfo { counter: Counter::$variant, name: $name, meaning: $meaning }),*
        ];
    };
}

/// What is known of a counter.
pub struct CounterInfo {
    /// Which one.
    pub counter: Counter,
    /// Its stable name.
    pub name: &'static str,
    /// What it counts, for an operator.
    pub meaning: &'static str,
}

counters! {
    // The table and what is exposed right now.
    SlotsFree, "slots_free", "gauge: slots that nobody uses";
    SlotsLeased, "slots_leased", "gauge: empty slots leased to peers";
    ConnectionsHeld, "connections_held", "gauge: connections younger than the hold time, known here only";
    ConnectionsActive, "connections_active", "gauge: connections whose traffic this member sees, past the hold time";
    ConnectionsBackup, "connections_backup", "gauge: copies held for other members";
    Exposure, "exposure", "gauge: connections without an up-to-date acknowledged second copy";
    ExposureOldestUs, "exposure_oldest_us", "gauge: for how long the oldest of them, microseconds";
    Unprotected, "unprotected", "gauge: of those exposed, connections that have no backup at all for now";

    ReleasesPending, "releases_pending", "gauge: releases and offers that their members have not acknowledged yet";

    // The source.
    SourceEvents, "source_events", "events taken from the source";
    SourceOpened, "source_opened", "connections that began here, as far as the source told";
    SourceLeft, "source_left", "connections whose entries the kernel dropped when the address that they were translated to left this host";
    SourceShort, "source_short", "connections that closed within the hold time and were never sent";
    SourceUnknownGone, "source_unknown_gone", "closes of connections that are not in the table";
    SourceRejected, "source_rejected", "source events refused as malformed or for another shard";
    SourceSkipped, "source_skipped", "attributes of the kernel's messages that had another form than expected and were left out";
    SourceExpectations, "source_expectations", "expectations that helpers created here; they are not copied";
    SourceOffloaded, "source_offloaded", "events of offloaded flows, which lack timeout and protocol state: the last known values stay";
    SourceLocal, "source_local", "events of this host's own connections, which are not copied unless a rule says so";
    SourceFiltered, "source_filtered", "events of connections that a rule skips";
    SourceLeftovers, "source_leftovers", "entries in the kernel that an earlier run committed for another member and that no traffic touched since";
    SourceOverruns, "source_overruns", "events that the source lost before they were read";
    SourceErrors, "source_errors", "reads of the kernel's events that failed";
    SourceDumps, "source_dumps", "dumps of the kernel's table";
    SourceDumpsFailed, "source_dumps_failed", "dumps of the kernel's table that could not begin or broke off; each is tried again";
    ExtrasFull, "extras_full", "times that labels, a helper or the like were left out because no record was free";
    KernelFull, "kernel_full", "leases withheld because the kernel's table is full, or as full as it may be made";
    TableFull, "table_full", "connections or copies refused because no slot was free";
    Claims, "claims", "copies claimed here because their traffic showed up";
    ClaimsContested, "claims_contested", "of the claims, those of connections that another member had as well, and knew as much of";
    ClaimsByLook, "claims_by_look", "of the claims, those of connections whose end nobody saw, and whose kernel entry here packets had passed";
    ClaimsUnfounded, "claims_unfounded", "events at copies whose kernel entry no packet had passed: of before, or an operator's";
    ClaimsLost, "claims_lost", "connections given up here because a peer claimed them";
    SlotsWalked, "slots_walked", "slots that walks over the table looked at";
    Promotions, "promotions", "copies of a dead member made active and given a new backup";
    Conflicts, "conflicts", "connections that two members held as active; the older state gave way";

    // Sending.
    DeltasNew, "deltas_new", "deltas sent that carry a whole connection";
    DeltasUpdate, "deltas_update", "deltas sent that carry changed groups";
    DeltasClose, "deltas_close", "closes sent";
    DeltasRelease, "deltas_release", "releases sent";
    DatagramsSent, "datagrams_sent", "sequenced datagrams sent for the first time";
    BytesSent, "bytes_sent", "bytes of those datagrams, from the CPHA header on";
    DatagramsResent, "datagrams_resent", "datagrams sent again from the history";
    DatagramsGivenUp, "datagrams_given_up", "datagrams never acknowledged whose connections were marked for sending again";
    AcksSent, "acks_sent", "acks sent";
    SendsQueued, "sends_queued", "send operations handed to the kernel";
    SendErrors, "send_errors", "send operations that failed";
    ControlFull, "control_full", "control messages postponed because every control buffer was on its way out";
    ArenaFull, "arena_full", "times that sending waited because the arena was full of datagrams still in the kernel";
    WindowFull, "window_full", "times that a stream waited for acks";
    NoLease, "no_lease", "times that a connection waited because no peer had leased a slot";
    StreamsLost, "streams_lost", "streams declared lost";
    DigestsSent, "digests_sent", "digests sent: what a peer's copies of our connections add up to";
    DigestsCompared, "digests_compared", "digests of peers compared with what is held here";
    DigestsDiffered, "digests_differed", "digests that differed and were answered, so that the peer names what it counts on";
    OffersPutOff, "offers_put_off", "offers not answered for lack of room; they are made again";
    DigestsUnresolved, "digests_unresolved", "streams whose sides did not agree after an absence, within ten seconds of comparing";
    CompareItems, "compare_items", "connections named to a backup in buckets that differed";
    CompareResent, "compare_resent", "connections sent again whole because the backup did not hold them as it should";
    CompareOffered, "compare_offered", "copies here that their active did not name, and that were offered to it";
    CatchUpDatagrams, "catch_up_datagrams", "datagrams of the history sent again to a member that came back";

    // Receiving.
    DatagramsReceived, "datagrams_received", "synchronization datagrams accepted";
    DeltasApplied, "deltas_applied", "deltas applied to the table";
    DeltasOld, "deltas_old", "deltas older than the copy here, ignored";
    DeltasClosed, "deltas_closed", "deltas for a copy that was closed before, ignored";
    AcksReceived, "acks_received", "acks received";
    LeasesGranted, "leases_granted", "slots leased to peers since the start";
    LeasesGivenBack, "leases_given_back", "slots that peers had leased here and gave back empty";
    Refused, "refused", "new connections refused to their active";
    Declined, "declined", "gauge: connections whose backup's kernel does not have them; they count as exposed";
    DeclinedByPeer, "declined_by_peer", "times that a backup said that its kernel does not have a copy";
    RefusedByPeer, "refused_by_peer", "new connections that a backup refused";
    ReceiveTrains, "receive_trains", "receives of one datagram, or of a train of them at once";
    ReceiveCut, "receive_cut", "receives dropped because a datagram in them was cut";
    ReceiveSenseless, "receive_senseless", "receives dropped because they made no sense";
    ReceiveNoBuffer, "receive_no_buffer", "times that every receive buffer was in use, so that datagrams waited in the socket";
    ReceiveErrors, "receive_errors", "receives that failed";
    ReceiveDrops, "receive_drops", "datagrams that the kernel dropped because a receive socket was full, looked at once a second";
    Strays, "strays", "datagrams that arrived at the wrong shard and were handed over";
    StraysLost, "strays_lost", "of these, lost because the other shard was behind; they come again";

    // Datagrams that were ignored, by reason.
    RejectShort, "reject_short", "datagrams too short for what they claim to be";
    RejectMagic, "reject_magic", "datagrams that are not CCP";
    RejectGroup, "reject_group", "datagrams of another group";
    RejectVersion, "reject_version", "datagrams of another protocol version";
    RejectOpcode, "reject_opcode", "datagrams with an opcode that is not used here";
    RejectMember, "reject_member", "datagrams from or to a member number that does not fit";
    RejectShard, "reject_shard", "datagrams from or to a shard that does not exist";
    RejectSource, "reject_source", "datagrams from an address that is not the sender's";
    RejectTable, "reject_table", "datagrams for or from a table that is no more";
    RejectRepeated, "reject_repeated", "datagrams received before";
    RejectWindow, "reject_window", "datagrams too far ahead of the floor";
    RejectMessage, "reject_message", "messages that make no sense; the rest of the datagram was ignored";
    RejectTarget, "reject_target", "deltas for a slot that is not the sender's";
    RejectKey, "reject_key", "datagrams whose key id is not configured";

    // The group.
    HeartbeatsSent, "heartbeats_sent", "heartbeats sent";
    HeartbeatsReceived, "heartbeats_received", "heartbeats accepted";
    DuplicateMember, "duplicate_member", "heartbeats of another host with this member's number, or of a second one with another's";
    MembersDied, "members_died", "members found dead";
    LinkRenewals, "link_renewals", "times that the sync link's sockets were made anew: the interface is another, or nobody was heard by multicast";
    NoticesLost, "notices_lost", "events that the notify command was not called for, because it is so far behind";
    NoticesFailed, "notices_failed", "calls of the notify command that could not be made, failed, or were killed after --notify-limit";
    LogLinesLost, "log_lines_lost", "log lines that did not fit the queue";

    // The kernel.
    Commits, "commits", "copies written to the kernel";
    CommitDeletes, "commit_deletes", "entries removed from the kernel";
    CommitUpdates, "commit_updates", "commits that found the entry in the kernel and brought it up to date";
    CommitReplaced, "commit_replaced", "commits that found an entry with another translation, or without its helper or any shift, and replaced it";
    CommitVanished, "commit_vanished", "entries that went away while they were brought up to date";
    CommitBusy, "commit_busy", "entries that changed while they were brought up to date";
    CommitNoRoom, "commit_no_room", "commits refused because the kernel's table is full, or as full as it may be made";
    CommitWithoutHelper, "commit_without_helper", "entries written without their helper, which this kernel does not have";
    CommitWithoutShift, "commit_without_shift", "copies kept out of the kernel because their sequence numbers are shifted and by how much is not known";
    CommitWithoutLabels, "commit_without_labels", "entries without room for their labels: no rule of this host uses labels";
    CommitMissing, "commit_missing", "gauge: copies, and connections taken over, that the kernel does not have; they are tried again";
    CommitOwedFull, "commit_owed_full", "connections taken over without an entry that are not tried again, because too many are: their own traffic or the next sweep decides";
    CommitErrors, "commit_errors", "commits that the kernel refused";
    CommitClashes, "commit_clashes", "commits refused because another connection holds the translated tuple";
    CommitPending, "commit_pending", "gauge: commits waiting";
    LeftoversDeleted, "leftovers_deleted", "entries that an earlier run committed and had no time to remove, removed after a warm restart";
    LeftoversAged, "leftovers_aged", "entries that an earlier run left with the timeout of copies, and that got the normal one";
    EndedFull, "ended_full", "reset connections that the first dump found beyond those that are looked at until their entries are gone";
    LeftoversFull, "leftovers_full", "entries with the timeout of copies that are none and were to go, left in the kernel because there were too many at once: the next start finds them";
    ShiftLooks, "shift_looks", "connections with a helper that the kernel was asked for, to learn how their sequence numbers are shifted";
    Shifts, "shifts", "shifts of sequence numbers learnt by that, which no event tells";
    VerifyWalks, "verify_walks", "walks over the table that asked the kernel for the entry of every copy, completed";
    VerifyLooks, "verify_looks", "entries of copies that such a walk asked the kernel for";
    VerifyMissing, "verify_missing", "of these, entries that were not there: written again";
    VerifyDiffered, "verify_differed", "entries with another translation, mark, label or state than their copy: written again";
    VerifyTouched, "verify_touched", "entries with the timeout that a packet gives, though their active lives elsewhere: traffic may have moved here; left so";
    VerifyWentOn, "verify_went_on", "entries whose TCP state packets have changed since they were written, and no event told: taken like an event";
    VerifyForeign, "verify_foreign", "entries of another connection with a copy's original tuple, with traffic of their own: left alone";
    VerifyFull, "verify_full", "entries of another connection that were not remembered for the next walk, because too many were found in one";

    // The loop.
    Passes, "passes", "passes of the loop";
    Waits, "waits", "passes after which nothing was left to do, so that the shard waited";
    WaitsGathered, "waits_gathered", "of these waits, those in which a lone wake-up waited up to 0.5 ms for others, as passes followed each other closely";
    PassesLate, "passes_late", "passes that took longer than 10 ms, so that heartbeats could be late";
    PassLongestUs, "pass_longest_us", "gauge: the longest pass so far, microseconds";
    DelayUs, "delay_us", "gauge: latest measured time from the oldest change in a datagram to its acknowledgement, microseconds";
}

/// Buckets of the delay histogram: four to an octave of microseconds, up to 2^24 us.
pub const DELAY_BUCKETS: usize = 96;

/// Words of one shard's counters: those of [`COUNTERS`], then the delay histogram.
pub const COUNTER_WORDS: usize = COUNTERS.len() + DELAY_BUCKETS;

/// The bucket of a delay, microseconds.
pub fn delay_bucket(us: u64) -> usize {
    let us = us.max(4);
    let octave = us.ilog2() as usize;
    let quarter = (us >> (octave - 2)) as usize & 3;
    ((octave - 2) * 4 + quarter).min(DELAY_BUCKETS - 1)
}

/// The smallest delay of a bucket, microseconds (of the first: 0 to 4).
pub fn delay_bucket_floor(bucket: usize) -> u64 {
    (4 + bucket as u64 % 4) << (bucket / 4)
}

/// The words of one shard's counters. One thread writes; relaxed order is enough for numbers
/// that stand for themselves.
pub struct Counters<'m, W = AtomicU64>(&'m [W]);

impl<W> Clone for Counters<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for Counters<'_, W> {}

impl<'m, W: Word> Counters<'m, W> {
    /// Counters over their words.
    pub fn new(words: &'m [W]) -> Counters<'m, W> {
        assert_eq!(words.len(), COUNTER_WORDS);
        Counters(words)
    }

    /// The value now.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize].get()
    }

    /// The delay histogram: measurements by bucket.
    pub fn delays(&self) -> [u64; DELAY_BUCKETS] {
        std::array::from_fn(|i| self.0[COUNTERS.len() + i].get())
    }
}

impl Counters<'_> {
    /// Adds one.
    #[inline]
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }

    /// Adds `n`. A plain load and store: there is one writer.
    #[inline]
    pub fn add(&self, counter: Counter, n: u64) {
        let word = &self.0[counter as usize];
        word.store(word.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Takes one off a gauge.
    #[inline]
    pub fn drop_one(&self, counter: Counter) {
        let word = &self.0[counter as usize];
        let value = word.load(Ordering::Relaxed);
        assert!(value > 0, "gauge {counter:?} fell below zero");
        word.store(value - 1, Ordering::Relaxed);
    }

    /// Sets a gauge.
    #[inline]
    pub fn set(&self, counter: Counter, value: u64) {
        self.0[counter as usize].store(value, Ordering::Relaxed);
    }

    /// Enters `n` measurements of a delay, microseconds, into the histogram.
    pub fn delay(&self, us: u64, n: u64) {
        let word = &self.0[COUNTERS.len() + delay_bucket(us)];
        word.store(word.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
}

/// The delay below which a share (0 to 1) of the measurements lies, microseconds; the upper
/// edge of its bucket, so at most a quarter too high. `None` without measurements.
pub fn delay_percentile(delays: &[u64; DELAY_BUCKETS], share: f64) -> Option<u64> {
    let total: u64 = delays.iter().sum();
    if total == 0 {
        return None;
    }
    let rank = ((total as f64 * share).ceil() as u64).clamp(1, total);
    let mut seen = 0;
    for (bucket, n) in delays.iter().enumerate() {
        seen += n;
        if seen >= rank {
            return Some(delay_bucket_floor(bucket + 1));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_lies_within_its_bucket() {
        for us in [4, 5, 7, 8, 9, 100, 1000, 12_345, 1_000_000] {
            let bucket = delay_bucket(us);
            assert!(
                delay_bucket_floor(bucket) <= us && us < delay_bucket_floor(bucket + 1),
                "{us}"
            );
        }
        let mut delays = [0; DELAY_BUCKETS];
        delays[delay_bucket(100)] = 99;
        delays[delay_bucket(5000)] = 1;
        assert_eq!(delay_percentile(&delays, 0.99), Some(112));
        assert!(delay_percentile(&delays, 0.999).unwrap() >= 5000);
    }

    #[test]
    fn the_list_is_in_order_and_names_are_unique() {
        for (i, info) in COUNTERS.iter().enumerate() {
            assert_eq!(info.counter as usize, i);
            assert!(
                COUNTERS.iter().filter(|other| other.name == info.name).count() == 1,
                "{}",
                info.name
            );
        }
    }
}
