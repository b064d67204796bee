//! Where a backup should be: where the traffic will go.
//!
//! Policy `priority`: the able member (syncing or ready) with the highest priority besides this one, as in VRRP:
//! who takes my address takes my connections. Among equals one at another site is preferred,
//! then the one with more room (in eighths, so that the choice does not flap and datagrams to
//! one backup fill up), then the next number after this member's own, so that equals spread.

use super::view::View;
use crate::conn::MemberId;
use crate::limits::MEMBERS_MAX;

/// The members that can be a backup for `view.me`, best first.
pub fn ranked(view: &View, my_site: u8) -> Vec<MemberId> {
    let mut able: Vec<MemberId> =
        view.others().filter(|(_, m)| m.status.is_able() && m.room > 0).map(|(id, _)| id).collect();
    able.sort_by_key(|id| {
        let m = &view.members[*id as usize];
        let other_site = my_site != 0 && m.site != 0 && m.site != my_site;
        let eighths = m.room.saturating_mul(8) / m.capacity.max(1);
        let distance = (*id as usize + MEMBERS_MAX - view.me as usize) % MEMBERS_MAX;
        (std::cmp::Reverse((m.priority, other_site, eighths)), distance)
    });
    able
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::view::{Member, Status};

    #[test]
    fn priority_then_site_then_room_then_the_next_number() {
        let mut view = View::new(2);
        let member = |priority, site, room| Member {
            status: Status::Ready,
            priority,
            site,
            room,
            capacity: 800,
            ..Member::default()
        };
        for (id, m) in [
            (1, member(100, 1, 800)),
            (3, member(100, 1, 799)),
            (4, member(100, 1, 100)),
            (5, member(100, 2, 100)),
            (6, member(200, 1, 1)),
            (7, Member { status: Status::Joining, ..member(255, 2, 800) }),
            (8, member(255, 2, 0)),
            (9, Member { status: Status::Syncing, ..member(150, 1, 800) }),
        ] {
            view.set(id, m);
        }
        assert_eq!(ranked(&view, 1), [6, 9, 5, 1, 3, 4]);
        view.set(1, member(100, 1, 790));
        assert_eq!(ranked(&view, 0), [6, 9, 3, 1, 4, 5], "799 and 790 are the same eighth");
    }
}
