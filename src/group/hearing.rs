//! Why members do not find each other, as far as heartbeats tell.
//!
//! A heartbeat says whom its sender hears. So a member that is heard but does not hear this one
//! points at the way there, and one that was named as a peer and never was heard points at the way
//! back. One of which only small heartbeats arrive points at an MTU that is too small. Each is told
//! once, when it has lasted too long to be the start of somebody or a lost datagram. That nobody at
//! all is heard who should be is told again and again, for nothing is copied as long as it lasts.

use std::net::IpAddr;
use std::time::Duration;

use super::view::{Status, View};
use crate::conn::MemberId;
use crate::limits::MEMBERS_MAX;
use crate::time::Time;

/// The shortest time after the start by which the others should have been heard.
const EXPECTED_MIN: Duration = Duration::from_secs(10);

/// The shortest time after which a member should hear this one, and its full-size heartbeats should
/// arrive.
const DEAF_MIN: Duration = Duration::from_secs(2);

/// How often it is told that nobody is heard.
const REMIND: Duration = Duration::from_secs(600);

/// What does not work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// A member is heard but does not hear this one.
    NotHeardBy {
        /// The member.
        member: MemberId,
        /// Where it is.
        address: IpAddr,
    },
    /// Of a member's heartbeats only the small ones arrive.
    OnlySmallFrom {
        /// The member.
        member: MemberId,
        /// Where it is.
        address: IpAddr,
    },
    /// A peer from which no heartbeat ever came.
    NothingFrom(IpAddr),
    /// Without a list of peers: nobody was ever heard.
    Alone,
    /// Nobody is heard, of those who were heard before or are named as peers.
    Nobody,
    /// Nobody is heard, and this member's own heartbeats to the multicast group do not come back.
    Deaf,
}

/// Who should be heard, and who should hear.
pub struct Hearing {
    started: Time,
    patience: Duration,
    /// Peers that were not heard yet, or nothing once that was told.
    awaited: Vec<IpAddr>,
    /// Without a list of peers: whether anybody is awaited.
    anybody: bool,
    /// Members that are heard and do not hear this one.
    one_way: [Lasting; MEMBERS_MAX + 1],
    /// Members of which only small heartbeats arrive.
    small: [Lasting; MEMBERS_MAX + 1],
    /// Whether peers were named, so that they should be heard from the start.
    named: bool,
    silence: Duration,
    lonely: Lasting,
    lonely_told: Time,
    is_lonely: bool,
    is_deaf: bool,
}

/// Since when something has been so, and whether that was told.
#[derive(Clone, Copy, Default)]
struct Lasting(Option<(Time, bool)>);

impl Lasting {
    /// Notes whether it is so; returns whether it has lasted long enough to be told now.
    fn note(&mut self, is_so: bool, now: Time, patience: Duration) -> bool {
        if !is_so {
            self.0 = None;
            return false;
        }
        let (since, told) = self.0.get_or_insert((now, false));
        let is_due = !*told && now.since(*since) > patience;
        *told |= is_due;
        is_due
    }

    fn is_told(&self) -> bool {
        self.0.is_some_and(|(_, told)| told)
    }
}

impl Hearing {
    /// These peers should be heard, or anybody if there is no list. `silence`: after which a member
    /// is dead.
    pub fn new(peers: Vec<IpAddr>, silence: Duration, now: Time) -> Hearing {
        Hearing {
            started: now,
            patience: DEAF_MIN.max(silence * 3),
            anybody: peers.is_empty(),
            named: !peers.is_empty(),
            silence,
            lonely: Lasting::default(),
            lonely_told: now,
            is_lonely: false,
            is_deaf: false,
            awaited: peers,
            one_way: [Lasting::default(); MEMBERS_MAX + 1],
            small: [Lasting::default(); MEMBERS_MAX + 1],
        }
    }

    /// How long after the start the others should have been heard.
    pub fn expected(&self) -> Duration {
        EXPECTED_MIN.max(self.patience)
    }

    /// Whether nobody is heard, although somebody should be.
    pub fn is_lonely(&self) -> bool {
        self.is_lonely
    }

    /// Whether nobody is heard, and not even this member's own heartbeats come back from the
    /// multicast group.
    pub fn is_deaf(&self) -> bool {
        self.is_deaf
    }

    fn note_lonely(
        &mut self,
        now: Time,
        view: &View,
        own_heard: Time,
        tell: &mut dyn FnMut(Trouble),
    ) {
        let is = |status: fn(Status) -> bool| view.others().any(|(_, m)| status(m.status));
        let nobody = !is(Status::is_alive);
        let never = !is(|status| status != Status::Absent);
        self.is_lonely = nobody && (is(|status| status == Status::Dead) || self.named && never);
        self.is_deaf = nobody && !self.named && now.since(own_heard) > self.silence;
        let expected = self.expected();
        let is_news = self.lonely.note(self.is_lonely || self.is_deaf, now, expected);
        if !is_news && (!self.lonely.is_told() || now.since(self.lonely_told) < REMIND) {
            return;
        }
        self.lonely_told = now;
        if is_news && never && !self.is_deaf {
            return; // Told of each peer, or as being alone.
        }
        tell(if self.is_deaf { Trouble::Deaf } else { Trouble::Nobody });
    }

    /// Tells what has lasted too long by now. `own_heard`: when this member's own heartbeats came
    /// back last, if they go to a multicast group. `only_small`: whether only small heartbeats of a
    /// member arrive.
    pub fn tick(
        &mut self,
        now: Time,
        view: &View,
        own_heard: Time,
        only_small: &dyn Fn(MemberId) -> bool,
        tell: &mut dyn FnMut(Trouble),
    ) {
        for (id, member) in view.others() {
            let Some(address) = member.address else { continue };
            if self.one_way[id as usize].note(is_one_way(member), now, self.patience) {
                tell(Trouble::NotHeardBy { member: id, address });
            }
            if self.small[id as usize].note(only_small(id), now, self.patience) {
                tell(Trouble::OnlySmallFrom { member: id, address });
            }
        }
        self.note_lonely(now, view, own_heard, tell);
        if now.since(self.started) <= self.expected() {
            return;
        }
        let heard = |peer: IpAddr| view.others().any(|(_, m)| m.address == Some(peer));
        self.awaited
            .drain(..)
            .filter(|peer| !heard(*peer))
            .for_each(|p| tell(Trouble::NothingFrom(p)));
        // Who does not even hear itself cannot say so.
        if self.anybody && !self.is_deaf {
            self.anybody = false;
            if view.others().all(|(_, m)| m.status == Status::Absent) {
                tell(Trouble::Alone);
            }
        }
    }
}

fn is_one_way(member: &super::view::Member) -> bool {
    member.status.is_alive() && !member.hears_me
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::view::Member;

    const SECOND: u64 = 1_000_000_000;

    fn troubles(hearing: &mut Hearing, at_s: u64, view: &View) -> Vec<Trouble> {
        let mut told = Vec::new();
        let now = Time(at_s * SECOND);
        hearing.tick(now, view, now, &|_| false, &mut |trouble| told.push(trouble));
        told
    }

    fn heard(view: &mut View, id: MemberId, status: Status, hears_me: bool) -> IpAddr {
        let address = IpAddr::from([10, 9, 0, id]);
        view.set(id, Member { status, hears_me, address: Some(address), ..Member::default() });
        address
    }

    #[test]
    fn a_member_that_does_not_hear_us_is_told_once_until_it_does() {
        let (mut view, start) = (View::new(1), Time(0));
        let mut hearing = Hearing::new(vec![[10, 9, 0, 2].into()], Duration::from_secs(1), start);
        let address = heard(&mut view, 2, Status::Joining, false);
        let one_way = vec![Trouble::NotHeardBy { member: 2, address }];
        assert_eq!(troubles(&mut hearing, 1, &view), []);
        assert_eq!(troubles(&mut hearing, 4, &view), [], "three times the silence");
        assert_eq!(troubles(&mut hearing, 5, &view), one_way);
        assert_eq!(troubles(&mut hearing, 60, &view), []);
        heard(&mut view, 2, Status::Ready, true);
        assert_eq!(troubles(&mut hearing, 61, &view), []);
        heard(&mut view, 2, Status::Joining, false);
        assert_eq!(troubles(&mut hearing, 62, &view), []);
        heard(&mut view, 2, Status::Dead, false);
        assert_eq!(troubles(&mut hearing, 63, &view), []);
        heard(&mut view, 2, Status::Joining, false);
        assert_eq!(troubles(&mut hearing, 64, &view), [], "counted from its return");
        assert_eq!(troubles(&mut hearing, 68, &view), one_way);
    }

    #[test]
    fn a_member_of_which_only_small_heartbeats_arrive_is_told_once_until_large_ones_do() {
        let (mut view, start) = (View::new(1), Time(0));
        let mut hearing = Hearing::new(vec![[10, 9, 0, 2].into()], Duration::from_secs(1), start);
        let address = heard(&mut view, 2, Status::Joining, true);
        let mut told = |at_s: u64, only_small: bool| {
            let mut told = Vec::new();
            let now = Time(at_s * SECOND);
            hearing.tick(now, &view, now, &|id| id == 2 && only_small, &mut |trouble| {
                told.push(trouble)
            });
            told
        };
        let trap = vec![Trouble::OnlySmallFrom { member: 2, address }];
        assert_eq!(told(1, true), []);
        assert_eq!(told(4, true), []);
        assert_eq!(told(5, true), trap);
        assert_eq!(told(60, true), []);
        assert_eq!(told(61, false), []);
        assert_eq!(told(62, true), [], "counted anew");
        assert_eq!(told(66, true), trap);
    }

    #[test]
    fn peers_that_were_never_heard_are_told_once() {
        let mut view = View::new(1);
        let three = IpAddr::from([10, 9, 0, 3]);
        let mut hearing =
            Hearing::new(vec![[10, 9, 0, 2].into(), three], Duration::from_secs(1), Time(0));
        heard(&mut view, 2, Status::Dead, false);
        assert_eq!(troubles(&mut hearing, 10, &view), []);
        assert_eq!(troubles(&mut hearing, 11, &view), [Trouble::NothingFrom(three)]);
        assert_eq!(troubles(&mut hearing, 12, &view), []);
    }

    #[test]
    fn that_nobody_is_heard_any_more_is_told_again_and_again() {
        let mut view = View::new(1);
        let mut hearing = Hearing::new(Vec::new(), Duration::from_secs(1), Time(0));
        heard(&mut view, 2, Status::Ready, true);
        assert_eq!(troubles(&mut hearing, 1, &view), []);
        heard(&mut view, 2, Status::Dead, false);
        assert_eq!(troubles(&mut hearing, 2, &view), []);
        assert!(hearing.is_lonely() && !hearing.is_deaf(), "known at once");
        assert_eq!(troubles(&mut hearing, 12, &view), [], "ten seconds");
        assert_eq!(troubles(&mut hearing, 13, &view), [Trouble::Nobody]);
        assert_eq!(troubles(&mut hearing, 612, &view), []);
        assert_eq!(troubles(&mut hearing, 613, &view), [Trouble::Nobody], "ten minutes");
        assert_eq!(troubles(&mut hearing, 1213, &view), [Trouble::Nobody]);
        heard(&mut view, 2, Status::Ready, true);
        assert_eq!(troubles(&mut hearing, 9999, &view), []);
        heard(&mut view, 2, Status::Left, true);
        assert_eq!(troubles(&mut hearing, 19_999, &view), [], "it said goodbye");
        assert!(!hearing.is_lonely());
    }

    #[test]
    fn who_does_not_hear_itself_by_multicast_is_deaf_unless_others_are_heard() {
        let mut view = View::new(1);
        let mut hearing = Hearing::new(Vec::new(), Duration::from_secs(1), Time(0));
        let mut told = |at_s: u64, own_s: u64, view: &View| {
            let mut told = Vec::new();
            let (now, own) = (Time(at_s * SECOND), Time(own_s * SECOND));
            hearing.tick(now, view, own, &|_| false, &mut |trouble| told.push(trouble));
            (hearing.is_deaf(), told)
        };
        assert_eq!(told(1, 0, &view), (false, vec![]));
        assert_eq!(told(2, 0, &view), (true, vec![]));
        assert_eq!(told(13, 0, &view), (true, vec![Trouble::Deaf]), "not that it is alone");
        assert_eq!(told(14, 14, &view), (false, vec![Trouble::Alone]));
        heard(&mut view, 2, Status::Ready, true);
        assert_eq!(
            told(30, 14, &view),
            (false, vec![]),
            "this host's filter may drop its own only"
        );
    }

    #[test]
    fn a_slow_rhythm_is_no_silence() {
        let view = View::new(1);
        let two = IpAddr::from([10, 9, 0, 2]);
        // A heartbeat every 10 s, dead after 3.
        let mut hearing = Hearing::new(vec![two], Duration::from_secs(30), Time(0));
        assert_eq!(troubles(&mut hearing, 31, &view), []);
        assert_eq!(troubles(&mut hearing, 91, &view), [Trouble::NothingFrom(two)]);
    }

    #[test]
    fn with_multicast_nobody_at_all_is_told_once() {
        let mut view = View::new(1);
        let alone = |view: &View| {
            let mut hearing = Hearing::new(Vec::new(), Duration::from_secs(1), Time(0));
            [10, 11, 12].map(|at_s| troubles(&mut hearing, at_s, view))
        };
        assert_eq!(alone(&view), [vec![], vec![Trouble::Alone], vec![]]);
        heard(&mut view, 2, Status::Left, false);
        assert_eq!(alone(&view), [vec![], vec![], vec![]]);
    }
}
