//! Peers: what this shard makes of each member.
//!
//! ```text
//!            heard                 silent                  reprotect_after, goodbye,
//!  Vacant ----------> Up <------------------> Down ------> or another table ----> Purge
//!    ^                        heard again                                           |
//!    +--------------------------- the walk is done --------------------------------+
//! ```
//!
//! What always holds:
//!
//! 1. *A member is in one state*, and the bits say the same as the states: who sweeps over members
//!    looks at those that it means.
//! 2. *The table that is remembered of a member is the one that what is agreed on with it belongs
//!    to.*

use crate::conn::MemberId;
use crate::few::Few;
use crate::group::selection::ranked;
use crate::group::view::{Member, View};
use crate::limits::MEMBERS_MAX;
use crate::time::Time;

/// What this shard makes of a member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PeerState {
    /// Nothing here refers to it.
    Vacant,
    /// Alive, with the table that this shard knows.
    Up,
    /// Silent.
    Down {
        /// Since when.
        since: Time,
        /// Whether something agreed on with it was let go.
        left_behind: bool,
        /// Whether its streams were declared lost: it is silent for long, and there is nobody else
        /// to turn to.
        lost: bool,
    },
    /// A walk lets go of everything agreed on with it.
    Purge,
}

/// Members, as bits.
pub(super) fn members_in(mut bits: u64) -> impl Iterator<Item = MemberId> {
    std::iter::from_fn(move || {
        let member = bits.trailing_zeros();
        bits &= bits.wrapping_sub(1);
        (member < 64).then_some(member as MemberId)
    })
}

/// All members of the group, as this shard sees them.
pub(super) struct Peers {
    states: Vec<PeerState>,
    /// Tables that they had when they were last here.
    tables: Vec<u32>,
    view: View,
    /// Those that can hold copies, the best first.
    ranked: Few<MemberId, MEMBERS_MAX>,
    /// Members that are short of room, as bits.
    short: u64,
    /// Those that are Up, that are Down, and that are purged, as bits.
    up: u64,
    down: u64,
    purged: u64,
}

impl Peers {
    /// A group in which nobody was heard.
    pub(super) fn new(me: MemberId) -> Peers {
        Peers {
            states: vec![PeerState::Vacant; MEMBERS_MAX + 1],
            tables: vec![0; MEMBERS_MAX + 1],
            view: View::new(me),
            ranked: Few::new(),
            short: 0,
            up: 0,
            down: 0,
            purged: 0,
        }
    }

    /// The group looks like this now, from this site.
    pub(super) fn on_view(&mut self, view: &View, site: u8) {
        self.view.clone_from(view);
        self.ranked = ranked(view, site, &mut self.short);
    }

    /// How the group looks.
    pub(super) fn view(&self) -> &View {
        &self.view
    }

    /// How a member looks.
    pub(super) fn seen(&self, member: MemberId) -> &Member {
        &self.view.members[member as usize]
    }

    /// Members that can hold copies, the best first.
    pub(super) fn ranked(&self) -> &[MemberId] {
        &self.ranked
    }

    /// What this shard makes of a member.
    pub(super) fn state(&self, member: MemberId) -> PeerState {
        self.states[member as usize]
    }

    /// The member is in this state from now on.
    pub(super) fn set(&mut self, member: MemberId, state: PeerState) {
        self.states[member as usize] = state;
        let bit = 1 << member;
        for bits in [&mut self.up, &mut self.down, &mut self.purged] {
            *bits &= !bit;
        }
        match state {
            PeerState::Vacant => {}
            PeerState::Up => self.up |= bit,
            PeerState::Down { .. } => self.down |= bit,
            PeerState::Purge => self.purged |= bit,
        }
    }

    /// Whether its table, as far as this shard knows it, still lives.
    pub(super) fn is_up(&self, member: MemberId) -> bool {
        self.up >> member & 1 == 1
    }

    /// Whether what is sent to it may still be heard: it is up, or it is silent, may come back with
    /// the table that this shard knows, and nothing that was agreed with it has been let go.
    pub(super) fn may_return(&self, member: MemberId) -> bool {
        matches!(self.state(member), PeerState::Up | PeerState::Down { lost: false, .. })
    }

    /// Those that are Up.
    pub(super) fn up(&self) -> impl Iterator<Item = MemberId> + use<> {
        members_in(self.up)
    }

    /// Those that are Up, or among these (bits).
    pub(super) fn up_or(&self, others: u64) -> impl Iterator<Item = MemberId> + use<> {
        members_in(self.up | others)
    }

    /// Those that are silent.
    pub(super) fn down(&self) -> impl Iterator<Item = MemberId> + use<> {
        members_in(self.down)
    }

    /// Those that hold nothing that counts: silent ones, and those that are purged.
    pub(super) fn gone(&self) -> impl Iterator<Item = MemberId> + use<> {
        members_in(self.down | self.purged)
    }

    /// Since when the one that is silent longest is.
    pub(super) fn silent_since(&self) -> Option<Time> {
        let since = |member| match self.state(member) {
            PeerState::Down { since, .. } => Some(since),
            _ => None,
        };
        self.down().filter_map(since).min()
    }

    /// Something agreed on with a silent member was let go.
    pub(super) fn leave_behind(&mut self, member: MemberId) {
        if let PeerState::Down { left_behind, .. } = &mut self.states[member as usize] {
            *left_behind = true;
        }
    }

    /// The streams of a silent member are lost.
    pub(super) fn lose(&mut self, member: MemberId) {
        if let PeerState::Down { left_behind, lost, .. } = &mut self.states[member as usize] {
            (*left_behind, *lost) = (true, true);
        }
    }

    /// The table that a member had when it was last here; 0 before.
    pub(super) fn table(&self, member: MemberId) -> u32 {
        self.tables[member as usize]
    }

    /// It has this table.
    pub(super) fn set_table(&mut self, member: MemberId, table_id: u32) {
        self.tables[member as usize] = table_id;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOWN: PeerState = PeerState::Down { since: Time(7), left_behind: false, lost: false };

    #[test]
    fn the_bits_say_what_the_states_do() {
        let mut peers = Peers::new(1);
        for (member, state) in
            [(2, PeerState::Up), (3, DOWN), (52, PeerState::Purge), (5, PeerState::Up)]
        {
            peers.set(member, state);
        }
        peers.set(5, DOWN);
        assert_eq!(peers.up().collect::<Vec<_>>(), [2]);
        assert_eq!(peers.down().collect::<Vec<_>>(), [3, 5]);
        assert_eq!(peers.gone().collect::<Vec<_>>(), [3, 5, 52]);
        peers.set(52, PeerState::Vacant);
        for member in 1..=MEMBERS_MAX as MemberId {
            let state = peers.state(member);
            assert_eq!(peers.is_up(member), state == PeerState::Up);
            assert_eq!(
                peers.gone().any(|gone| gone == member),
                matches!(state, PeerState::Down { .. })
            );
        }
    }

    #[test]
    fn who_is_lost_does_not_return_with_what_was_agreed() {
        let mut peers = Peers::new(1);
        peers.set(2, DOWN);
        peers.leave_behind(2);
        assert!(peers.may_return(2), "what was let go is compared");
        peers.lose(2);
        assert!(!peers.may_return(2));
        peers.lose(3);
        assert_eq!(peers.state(3), PeerState::Vacant, "it was never here");
        assert!(!peers.may_return(3));
    }

    #[test]
    fn the_longest_silence_counts() {
        let mut peers = Peers::new(1);
        assert_eq!(peers.silent_since(), None);
        peers.set(2, PeerState::Down { since: Time(9), left_behind: false, lost: true });
        peers.set(3, DOWN);
        assert_eq!(peers.silent_since(), Some(Time(7)));
    }
}
