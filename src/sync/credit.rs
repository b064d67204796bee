//! Credit: the slots at peers that this member may fill, and those here that peers may.
//!
//! Each stream has an account. A lessee asks for slots before it runs out, for as many as it will
//! soon need, and gives back what it turns out not to need; a lessor grants what is asked for. What
//! lies in memory that outlives the process is the pool of leases ([`super::lease`]) and, of each
//! stream, how many slots were granted either way; the rest is built again.
//!
//! What always holds, and is asserted where it could break:
//!
//! 1. *A wish is a total.* `want` counts from the session's begin, as `granted_to_us` does, so that
//!    one that is said twice grants once. It grows until both begin anew, and a wish for no more
//!    than was granted is none.
//! 2. *Nobody is asked in vain too often*: the pause doubles until what was asked for is there.
//! 3. *What is given back lies in the lease*: never more than its length.
//! 4. *A lessor owes no more than was asked for*, and a grant lowers what it owes.

use std::time::Duration;

use super::lease::{LeaseList, LeasePool};
use super::stream::Durable;
use crate::ccp::message::Place;
use crate::limits::{LEASE_WANT_MAX, LEASE_WANT_MIN, STREAMS_MAX};
use crate::memory::{LeaseWords, StreamWords};
use crate::time::Time;

/// How long after it a member that did not grant what was wanted is asked again: twice as long each
/// time, up to 16 times.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// How often leases are reviewed: what was not needed for so long is given back.
const REVIEW: Duration = Duration::from_secs(1);

/// The time over which it is counted how many slots a stream takes.
const RATE: Duration = Duration::from_millis(100);

/// One stream's account.
struct Account {
    /// Slots leased to this member.
    lease: LeaseList,
    /// Slots that this member wants to have been granted in this session.
    want: u64,
    /// What `want` was when this member asked last.
    asked: u64,
    /// How often it asked for that.
    asked_in_vain: u32,
    /// When to ask (again).
    ask_at: Time,
    /// When this member first found no leased slot here and got none since.
    starved_since: Option<Time>,
    /// Slots taken from the lease since `rate_since`.
    taken: u64,
    /// Slots taken in the interval before.
    taken_before: u64,
    /// When `taken` began to count.
    rate_since: Time,
    /// Whether any slot was taken since the lease was reviewed.
    is_used: bool,
    /// The fewest slots in the lease since it was reviewed.
    low: u32,
    /// Slots of the lease that are not needed: to be given back.
    give_back: u32,
    /// Slots that the peer asked for and that were not granted yet.
    owed: u64,
}

impl Account {
    fn new() -> Account {
        Account {
            lease: LeaseList::default(),
            want: 0,
            asked: 0,
            asked_in_vain: 0,
            ask_at: Time::NEVER,
            starved_since: None,
            taken: 0,
            taken_before: 0,
            rate_since: Time(0),
            is_used: false,
            low: 0,
            give_back: 0,
            owed: 0,
        }
    }

    /// How many slots the lease should have: twice what was taken in a tenth of a second, and what
    /// waits for a backup.
    fn target(&mut self, now: Time, waiting: u64) -> u64 {
        if now.since(self.rate_since) >= RATE {
            (self.taken_before, self.taken, self.rate_since) = (self.taken, 0, now);
        }
        let rate = 2 * self.taken.max(self.taken_before);
        (rate + waiting).clamp(LEASE_WANT_MIN, LEASE_WANT_MAX)
    }

    fn to_give_back(&self) -> u32 {
        self.give_back.min(self.lease.len())
    }

    fn note_low(&mut self) {
        self.low = self.low.min(self.lease.len());
    }
}

/// All accounts of a shard.
pub(super) struct Credit<'m> {
    pool: LeasePool<'m>,
    words: &'m [StreamWords],
    accounts: Vec<Account>,
    review_at: Time,
}

impl<'m> Credit<'m> {
    /// Nothing is leased, and nothing is wanted.
    pub(super) fn new(leases: &'m [LeaseWords], words: &'m [StreamWords]) -> Credit<'m> {
        Credit::over(LeasePool::new(leases), words)
    }

    /// The leases that a killed process left behind; one that `keep` does not want is none any
    /// more.
    pub(super) fn resume(
        leases: &'m [LeaseWords],
        words: &'m [StreamWords],
        keep: impl FnMut(usize, Place) -> bool,
    ) -> Credit<'m> {
        let (pool, lists) = LeasePool::resume(leases, keep);
        let mut credit = Credit::over(pool, words);
        for (account, list) in credit.accounts.iter_mut().zip(lists) {
            account.lease = list;
        }
        credit
    }

    fn over(pool: LeasePool<'m>, words: &'m [StreamWords]) -> Credit<'m> {
        let accounts = (0..STREAMS_MAX).map(|_| Account::new()).collect();
        Credit { pool, words, accounts, review_at: Time(0) }
    }

    fn durable(&self, stream: usize) -> Durable<'m> {
        Durable(&self.words[stream])
    }

    /// Whether the stream has something to ask for, to grant or to give back, now or later.
    pub(super) fn is_busy(&self, stream: usize) -> bool {
        self.accounts[stream].ask_at != Time::NEVER || self.has_places(stream)
    }

    /// Whether places wait to be sent: granted ones, or some to be given back.
    pub(super) fn has_places(&self, stream: usize) -> bool {
        self.owed(stream) > 0 || self.to_give_back(stream) > 0
    }

    // The lessee's side.

    /// Takes the slot that has been in the lease longest. [`replenish`](Self::replenish) follows.
    pub(super) fn take(&mut self, stream: usize) -> Option<Place> {
        let account = &mut self.accounts[stream];
        let place = self.pool.take(&mut account.lease)?;
        account.starved_since = None;
        account.taken += 1;
        account.is_used = true;
        account.note_low();
        Some(place)
    }

    /// What was taken last is no sign of a rate: it had waited, and was asked for by its number.
    pub(super) fn discount(&mut self, stream: usize) {
        self.accounts[stream].taken = self.accounts[stream].taken.saturating_sub(1);
    }

    /// A slot is (again) one that this member may fill: the last to be used. A grant never exceeds
    /// what was asked for, so only a wrong peer overfills the pool, and loses what has no room.
    pub(super) fn put(&mut self, stream: usize, place: Place) {
        self.pool.put(stream, &mut self.accounts[stream].lease, place);
    }

    /// For how long this member has found no leased slot here, beginning now if it had any before.
    pub(super) fn starved_for(&mut self, now: Time, stream: usize) -> Duration {
        now.since(*self.accounts[stream].starved_since.get_or_insert(now))
    }

    /// Wants more before the lease runs out, also for the connections that wait for a backup, of
    /// which `waiting` are this stream's share. Whether it is to be asked for now.
    pub(super) fn replenish(&mut self, now: Time, stream: usize, waiting: u64) -> bool {
        let granted = self.durable(stream).granted_to_us();
        let room = self.pool.room() as u64;
        let account = &mut self.accounts[stream];
        let target = account.target(now, waiting);
        let have = account.lease.len() as u64;
        if have >= target / 2 || target - have > room {
            return false;
        }
        account.want = account.want.max(granted + target - have);
        account.give_back = 0;
        self.ask(now, stream)
    }

    /// What was asked for is here, and more is wanted: it is asked for at once. Otherwise the time
    /// to ask again stands.
    fn ask(&mut self, now: Time, stream: usize) -> bool {
        let granted = self.durable(stream).granted_to_us();
        let account = &mut self.accounts[stream];
        let is_due = account.want > granted && granted >= account.asked;
        if is_due {
            (account.ask_at, account.asked_in_vain) = (account.ask_at.min(now), 0);
        }
        is_due
    }

    /// What is to be asked for now, as a total of this session; moves the time of the next asking.
    pub(super) fn ask_due(&mut self, now: Time, stream: usize) -> Option<u64> {
        let granted = self.durable(stream).granted_to_us();
        let account = &mut self.accounts[stream];
        if granted >= account.want {
            account.ask_at = Time::NEVER;
            return None;
        }
        if !account.ask_at.reached(now) {
            return None;
        }
        account.ask_at = now.after(ASK_AGAIN * (1 << account.asked_in_vain.min(4)));
        account.asked = account.want;
        account.asked_in_vain += 1;
        Some(account.want)
    }

    /// When [`ask_due`](Self::ask_due) has something to ask for.
    pub(super) fn ask_at(&self, stream: usize) -> Time {
        self.accounts[stream].ask_at
    }

    /// These slots were granted. Whether more is to be asked for now.
    pub(super) fn on_grant(
        &mut self,
        now: Time,
        stream: usize,
        places: impl Iterator<Item = Place>,
    ) -> bool {
        let mut count = 0;
        for place in places {
            self.put(stream, place);
            count += 1;
        }
        self.durable(stream).add_granted_to_us(count);
        self.accounts[stream].starved_since = None;
        self.ask(now, stream)
    }

    /// Whether a second has passed since the leases were reviewed. If so, each stream that [has
    /// any](Self::has_leases) is to be [reviewed](Self::review) now.
    pub(super) fn begin_review(&mut self, now: Time) -> bool {
        let is_due = self.review_at.reached(now);
        if is_due {
            self.review_at = now.after(REVIEW);
        }
        is_due
    }

    /// When the leases are reviewed next.
    pub(super) fn review_at(&self) -> Time {
        self.review_at
    }

    /// Whether any slot is leased from the stream's peer.
    pub(super) fn has_leases(&self, stream: usize) -> bool {
        !self.accounts[stream].lease.is_empty()
    }

    /// What the stream has not needed since the last review it gives back: all of it, if none was
    /// used and the member is not the first choice; otherwise what is beyond twice the target.
    /// `waiting`: its share of what waits for a backup. Whether there is something to give back.
    pub(super) fn review(
        &mut self,
        now: Time,
        stream: usize,
        is_first_choice: bool,
        waiting: u64,
    ) -> bool {
        let account = &mut self.accounts[stream];
        let target = account.target(now, waiting) as u32;
        let kept = if account.is_used || is_first_choice { 2 * target } else { 0 };
        let unused = account.low.saturating_sub(kept);
        (account.is_used, account.low) = (false, account.lease.len());
        let is_too_much = unused > kept / 8;
        if is_too_much {
            account.give_back = unused;
        }
        is_too_much
    }

    /// Slots of the lease that are to be given back.
    pub(super) fn to_give_back(&self, stream: usize) -> u32 {
        self.accounts[stream].to_give_back()
    }

    /// The slots to be given back next, as many as there are and `into` has room for. They are
    /// leases until [`given_back`](Self::given_back).
    pub(super) fn first_to_give_back(&self, stream: usize, into: &mut [Place]) -> usize {
        let account = &self.accounts[stream];
        let due = (account.to_give_back() as usize).min(into.len());
        self.pool.first(&account.lease, &mut into[..due])
    }

    /// So many slots, the first of the lease, are on their way back: they are no lease any more.
    pub(super) fn given_back(&mut self, stream: usize, count: usize) {
        let account = &mut self.accounts[stream];
        assert!(count as u32 <= account.to_give_back(), "what is given back lies in the lease");
        for _ in 0..count {
            self.pool.take(&mut account.lease);
        }
        account.give_back -= count as u32;
        account.note_low();
    }

    // The lessor's side.

    /// The peer wants to have been granted so many in this session.
    pub(super) fn on_want(&mut self, stream: usize, total: u64) {
        let due = total.saturating_sub(self.durable(stream).granted_by_us());
        self.accounts[stream].owed = due.min(LEASE_WANT_MAX);
    }

    /// Slots that the peer asked for and that were not granted yet.
    pub(super) fn owed(&self, stream: usize) -> u64 {
        self.accounts[stream].owed
    }

    /// There is no room for what the peer asked for: it asks again.
    pub(super) fn grant_nothing(&mut self, stream: usize) {
        self.accounts[stream].owed = 0;
    }

    /// One of the slots that the peer asked for is its lease from now on.
    pub(super) fn granted(&mut self, stream: usize) {
        self.accounts[stream].owed -= 1;
        self.durable(stream).add_granted_by_us(1);
    }

    /// A slot granted in this session was taken back before the peer could know of it.
    pub(super) fn grant_failed(&self, stream: usize) {
        self.durable(stream).sub_granted_by_us();
    }

    // Sessions.

    /// Our half of the stream begins anew, or ends: what the peer had leased to us it takes back,
    /// and nothing is wanted yet.
    pub(super) fn drop_leases(&mut self, stream: usize) {
        let account = &mut self.accounts[stream];
        self.pool.drop_all(&mut account.lease);
        (account.want, account.asked, account.asked_in_vain, account.ask_at) =
            (0, 0, 0, Time::NEVER);
        (account.low, account.give_back, account.starved_since) = (0, 0, None);
    }

    /// The peer's half begins anew, or the whole stream ends: nothing is owed either.
    pub(super) fn drop_all(&mut self, stream: usize) {
        self.drop_leases(stream);
        self.accounts[stream].owed = 0;
    }

    /// The process was killed and goes on: what was granted until then is what was wanted.
    pub(super) fn resume_want(&mut self, stream: usize) {
        self.accounts[stream].want = self.durable(stream).granted_to_us();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::Generation;

    const STREAM: usize = 5;

    fn at(ms: u64) -> Time {
        Time(1).after(Duration::from_millis(ms))
    }

    fn place(slot: u32) -> Place {
        Place { slot, generation: Generation::default() }
    }

    fn memory() -> (Vec<LeaseWords>, Vec<StreamWords>) {
        let leases = (0..4096).map(|_| LeaseWords(Default::default())).collect();
        (leases, (0..STREAM + 1).map(|_| StreamWords::default()).collect())
    }

    /// What a lessor does that has room for everything.
    fn grant(credit: &mut Credit<'_>, now: Time, n: u64) -> bool {
        credit.on_grant(now, STREAM, (0..n as u32).map(place))
    }

    #[test]
    fn a_lessee_asks_before_it_runs_out_and_is_quiet_once_it_has_what_it_wanted() {
        let (leases, words) = memory();
        let mut credit = Credit::new(&leases, &words);
        assert!(!credit.is_busy(STREAM));
        assert_eq!(credit.take(STREAM), None);
        assert!(credit.replenish(at(0), STREAM, 0));
        let want = credit.ask_due(at(0), STREAM).expect("it has nothing");
        assert_eq!(want, LEASE_WANT_MIN);
        assert_eq!(credit.ask_due(at(1), STREAM), None, "it has just asked");
        assert!(!grant(&mut credit, at(2), want), "all is here");
        assert_eq!(credit.ask_due(at(3), STREAM), None);
        assert!(!credit.is_busy(STREAM));
        for _ in 0..want / 2 {
            assert!(credit.take(STREAM).is_some());
            assert!(!credit.replenish(at(4), STREAM, 0), "half of it is left");
        }
        assert!(credit.take(STREAM).is_some());
        assert!(credit.replenish(at(4), STREAM, 0));
        let more = credit.ask_due(at(4), STREAM).expect("less than half is left");
        // (Twice what was taken in this tenth of a second.)
        assert_eq!(more, want + (2 * (want / 2 + 1)).max(LEASE_WANT_MIN) - (want / 2 - 1));
    }

    #[test]
    fn what_does_not_come_is_asked_for_again_each_time_later_and_as_the_same_total() {
        let (leases, words) = memory();
        let mut credit = Credit::new(&leases, &words);
        assert!(credit.replenish(at(0), STREAM, 200));
        let mut now = at(0);
        for pause in [20, 40, 80, 160, 320, 320] {
            assert_eq!(credit.ask_due(now, STREAM), Some(200));
            let next = now.after(Duration::from_millis(pause));
            assert_eq!(credit.ask_at(STREAM), next);
            assert_eq!(credit.ask_due(Time(next.0 - 1), STREAM), None);
            // More that waits does not shorten the pause.
            assert!(!credit.replenish(now, STREAM, 200));
            now = next;
        }
        assert!(!grant(&mut credit, now, 50), "what was asked for is not all here");
        assert_eq!(credit.ask_due(now, STREAM), Some(200));
    }

    #[test]
    fn who_finds_nothing_is_starved_since_the_first_time_until_a_grant() {
        let (leases, words) = memory();
        let mut credit = Credit::new(&leases, &words);
        assert_eq!(credit.starved_for(at(0), STREAM), Duration::ZERO);
        assert_eq!(credit.starved_for(at(70), STREAM), Duration::from_millis(70));
        grant(&mut credit, at(80), 1);
        assert_eq!(credit.starved_for(at(90), STREAM), Duration::ZERO);
    }

    /// An account with so many slots, which has had its first review.
    fn with(credit: &mut Credit<'_>, n: u64) {
        grant(credit, at(0), n);
        assert!(credit.begin_review(at(0)));
        assert!(!credit.review(at(0), STREAM, true, 0), "nothing has lain there for a second");
    }

    #[test]
    fn what_lay_unused_for_a_second_is_given_back_and_a_first_choice_keeps_twice_its_target() {
        for (is_used, is_first_choice, kept) in [
            (false, false, 0),
            (false, true, 2 * LEASE_WANT_MIN),
            (true, false, 2 * LEASE_WANT_MIN),
        ] {
            let (leases, words) = memory();
            let mut credit = Credit::new(&leases, &words);
            with(&mut credit, 1000);
            let have = if is_used { credit.take(STREAM).map_or(1000, |_| 999) } else { 1000 };
            assert!(!credit.begin_review(at(999)) && credit.begin_review(at(1000)));
            assert!(credit.review(at(1000), STREAM, is_first_choice, 0));
            assert_eq!(
                credit.to_give_back(STREAM) as u64,
                have - kept,
                "{is_used} {is_first_choice}"
            );
            assert!(credit.has_places(STREAM));
        }
    }

    #[test]
    fn what_is_given_back_is_a_lease_until_it_is_on_its_way_and_again_if_that_fails() {
        let (leases, words) = memory();
        let mut credit = Credit::new(&leases, &words);
        with(&mut credit, 100);
        assert!(credit.review(at(1000), STREAM, false, 0));
        let mut places = [place(9999); 30];
        assert_eq!(credit.first_to_give_back(STREAM, &mut places), 30);
        assert_eq!((places[0], credit.to_give_back(STREAM)), (place(0), 100));
        credit.given_back(STREAM, 30);
        assert_eq!(credit.to_give_back(STREAM), 70);
        assert_eq!(credit.take(STREAM), Some(place(30)));
        assert_eq!(credit.to_give_back(STREAM), 69, "never more than there is");
        credit.put(STREAM, places[0]);
        assert_eq!(credit.to_give_back(STREAM), 70);
        // A connection that needs one ends it.
        assert!(credit.replenish(at(1001), STREAM, 1000));
        assert_eq!(credit.to_give_back(STREAM), 0);
    }

    #[test]
    fn a_wish_that_is_said_twice_grants_once_and_one_beyond_all_measure_is_cut() {
        let (leases, words) = memory();
        let mut credit = Credit::new(&leases, &words);
        credit.on_want(STREAM, 3);
        credit.granted(STREAM);
        credit.on_want(STREAM, 3);
        assert_eq!(credit.owed(STREAM), 2);
        credit.granted(STREAM);
        credit.granted(STREAM);
        credit.on_want(STREAM, 3);
        assert_eq!(credit.owed(STREAM), 0);
        credit.grant_failed(STREAM);
        credit.on_want(STREAM, 3);
        assert_eq!(credit.owed(STREAM), 1, "one of them never got there");
        credit.grant_nothing(STREAM);
        assert!(!credit.has_places(STREAM));
        credit.on_want(STREAM, u64::MAX);
        assert_eq!(credit.owed(STREAM), LEASE_WANT_MAX);
    }

    #[test]
    fn a_session_of_ours_ends_what_is_leased_and_one_of_the_peer_what_is_owed_as_well() {
        let (leases, words) = memory();
        let mut credit = Credit::new(&leases, &words);
        grant(&mut credit, at(0), 10);
        credit.replenish(at(0), STREAM, 100);
        credit.on_want(STREAM, 7);
        credit.drop_leases(STREAM);
        assert_eq!(
            (credit.take(STREAM), credit.ask_at(STREAM), credit.owed(STREAM)),
            (None, Time::NEVER, 7)
        );
        credit.drop_all(STREAM);
        assert!(!credit.is_busy(STREAM));
    }

    #[test]
    fn after_a_kill_the_leases_stand_and_no_more_is_wanted_than_was_granted() {
        let (leases, words) = memory();
        let mut credit = Credit::new(&leases, &words);
        grant(&mut credit, at(0), 40);
        let mut credit =
            Credit::resume(&leases, &words, |stream, at| stream == STREAM && at != place(3));
        credit.resume_want(STREAM);
        assert_eq!(credit.ask_due(at(0), STREAM), None);
        let left: Vec<_> =
            std::iter::from_fn(|| credit.take(STREAM)).map(|place| place.slot).collect();
        assert_eq!(left.len(), 39);
        assert!(!left.contains(&3));
    }
}
