//! Where a backup should be: where the traffic will go.
//!
//! Policy `priority`: the able member (syncing or ready) with the highest priority besides this
//! one, as in VRRP: who takes my address takes my connections. Among equals one at another site is
//! preferred, then one that is not short of room, then the next number after this member's own, so
//! that equals spread.
//!
//! Room counts as enough or not, and not by how much. All members see the same rooms: if each went
//! for the most room, all would go to the same few at once, lease slots there, and go on as soon as
//! those are a little fuller. By the numbers a member that joins, or falls short, concerns the one
//! before it. Datagrams to one backup fill up, too.

use super::view::View;
use crate::conn::MemberId;
use crate::few::Few;
use crate::limits::MEMBERS_MAX;

/// A member whose empty slots are fewer than this is short of room, in 32nds of its table: of 5 it
/// lends one, for an eighth of the table is never lent.
const SHORT: u64 = 5;

/// With so many it is so no longer.
const ENOUGH: u64 = 8;

/// The members that can be a backup for `view.me`, best first. `short`: who was short of room so
/// far, as bits, and is now.
pub fn ranked(view: &View, my_site: u8, short: &mut u64) -> Few<MemberId, MEMBERS_MAX> {
    let mut able = Few::new();
    let with_room = view.others().filter(|(_, m)| m.status.is_able() && m.room > 0);
    with_room.for_each(|(id, _)| able.push(id));
    for id in able.iter() {
        let m = &view.members[*id as usize];
        let room = m.room.saturating_mul(32) / m.capacity.max(1);
        if room < SHORT {
            *short |= 1 << id;
        } else if room >= ENOUGH {
            *short &= !(1 << id);
        }
    }
    // No two are alike, for no two have the same distance.
    able.sort_unstable_by_key(|id| {
        let m = &view.members[*id as usize];
        let other_site = my_site != 0 && m.site != 0 && m.site != my_site;
        let has_enough = *short >> *id & 1 == 0;
        let distance = (*id as usize + MEMBERS_MAX - view.me as usize) % MEMBERS_MAX;
        (std::cmp::Reverse((m.priority, other_site, has_enough)), distance)
    });
    able
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::view::{Member, Status};

    fn member(priority: u8, site: u8, room: u64) -> Member {
        Member { status: Status::Ready, priority, site, room, capacity: 800, ..Member::default() }
    }

    #[test]
    fn priority_then_site_then_enough_room_then_the_next_number() {
        let mut view = View::new(2);
        for (id, m) in [
            (1, member(100, 1, 800)),
            (3, member(100, 1, 124)),
            (4, member(100, 1, 125)),
            (5, member(100, 2, 100)),
            (6, member(200, 1, 1)),
            (7, Member { status: Status::Joining, ..member(255, 2, 800) }),
            (8, member(255, 2, 0)),
            (9, Member { status: Status::Syncing, ..member(150, 1, 800) }),
        ] {
            view.set(id, m);
        }
        assert_eq!(ranked(&view, 1, &mut 0)[..], [6, 9, 5, 4, 1, 3]);
        assert_eq!(ranked(&view, 0, &mut 0)[..], [6, 9, 4, 1, 3, 5]);
    }

    #[test]
    fn a_member_stays_short_until_it_has_clearly_more() {
        let mut view = View::new(1);
        view.set(3, member(100, 0, 130));
        let mut short = 0;
        let mut ranked_with = |room| {
            view.set(2, member(100, 0, room));
            ranked(&view, 0, &mut short)
        };
        assert_eq!(ranked_with(130)[..], [2, 3]);
        assert_eq!(ranked_with(120)[..], [3, 2]);
        assert_eq!(ranked_with(199)[..], [3, 2]);
        assert_eq!(ranked_with(200)[..], [2, 3]);
        assert_eq!(ranked_with(130)[..], [2, 3]);
    }

    #[test]
    fn a_member_that_joins_changes_the_choice_of_one_other() {
        let choice = |me, ids: &[MemberId]| {
            let mut view = View::new(me);
            let others = ids.iter().filter(|id| **id != me);
            others.for_each(|id| view.set(*id, member(100, 0, if *id == 17 { 800 } else { 250 })));
            ranked(&view, 0, &mut 0)[0]
        };
        let (before, after): (Vec<MemberId>, Vec<MemberId>) =
            ((1..=16).collect(), (1..=17).collect());
        let changed = before.iter().filter(|me| choice(**me, &before) != choice(**me, &after));
        assert_eq!(changed.collect::<Vec<_>>(), [&16]);
    }
}
