//! Deliberate small faults, for the test that the simulator's checkers notice them.
//!
//! They exist with the feature `mutations` only, which nothing that ships is built with: without it
//! [`is`] is the constant `false`, and the places that ask are what they would be without asking.

macro_rules! mutations {
    ($($name:ident, $what:literal;)*) => {
        /// A fault.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Mutation { $(#[doc = $what] $name),* }

        /// All of them, each with what it does.
        pub const MUTATIONS: &[(Mutation, &str)] = &[$((Mutation::$name, $what)),*];
    };
}

mutations! {
    RefusedAcknowledged, "a datagram is acknowledged although a delta in it was refused";
    AckSkipsGap, "an ack says that the number before the first that is missing is the one after it";
    MaskSinceSent, "a delta carries what changed since the last sent one, not since the last acknowledged one";
    NoGenerationCheck, "deltas are applied to a slot whatever life it is in";
    NoTombstone, "a close that finds no copy leaves the slot's generation";
    EarlyReuse, "a closed connection's slots are used again before the close is acknowledged";
    SkipUnmarked, "what was given up is not marked for sending again";
    PromotionOutranks, "promotion raises the epoch as traffic does";
    EarlyRelease, "a previous backup is released before the new one has acknowledged";
    OlderWins, "a copy is overwritten by whatever arrives last";
    VersionStands, "a change does not raise the version";
    ClaimKeepsEpoch, "a claim raises the version only";
    OffersUnanswered, "offers are ignored";
    DeclinedForever, "a copy that the kernel took after all still counts as refused";
    NothingRepeated, "what was lost is not repeated";
    RepeatedApplied, "a repeated datagram is applied again";
    WindowUnchecked, "numbers far ahead are accepted";
    SessionUnchecked, "datagrams of earlier sessions are accepted";
    TableUnchecked, "datagrams for another table are accepted";
    SourceUnchecked, "datagrams from any address are accepted";
    ExposureForgets, "what is sent and not acknowledged does not count as exposed";
    CloseUnsent, "a close is not sent";
    LoserKeepsBackup, "who gives way does not release its backup";
    EarlyCloseIgnored, "a close that overtook its claim is ignored";
    EarlyReleaseIgnored, "a release that overtook its claim is ignored";
    MemoryGrows, "each ack allocates and forgets a little";
    TargetOff, "a new names the slot beside its own";
    DigestStands, "what is held changes without its digest";
    RepeatsUnannounced, "poll_at forgets when something has to be repeated";
    UpdateIncomplete, "an update does not take over the mark";
    LingeringSent, "what is left of a connection in its kernel counts as alive";
    EndsUnasked, "an end that nobody saw is one";
    KeptForever, "what is taken over, or none any more, keeps the timeout of a copy";
    StampsDecide, "of two connections with one tuple, and two members that both carry one, the stamp decides";
    LeftIsEnded, "what leaves with its address has ended";
    KeepOverwrites, "packets that have passed a copy's entry are written over, and forgotten";
}

#[cfg(feature = "mutations")]
thread_local! {
    static CURRENT: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}

/// Switches a fault on in this thread, or all off.
#[cfg(feature = "mutations")]
pub fn set(mutation: Option<Mutation>) {
    CURRENT.set(mutation);
}

/// Whether this fault is switched on.
#[cfg(feature = "mutations")]
pub(crate) fn is(mutation: Mutation) -> bool {
    CURRENT.get() == Some(mutation)
}

/// Whether this fault is switched on: never.
#[cfg(not(feature = "mutations"))]
#[inline(always)]
pub(crate) const fn is(_: Mutation) -> bool {
    false
}
