//! Control requests: releases, offers and declines, the messages that belong to no single
//! connection's delta.
//!
//! A **release** tells a previous backup to let its copy go, once the new backup has acknowledged
//! its own (make before break), or tells a member that its copy was superseded. An **offer** asks a
//! former active, after a stream was lost, whether a copy still stands. A **decline** tells an
//! active whether the backup's kernel has its copy. All of them must arrive, so they travel in
//! sequenced datagrams, and are sent again if a datagram is given up.
//!
//! What always holds, and is asserted where it could break:
//!
//! 1. *There is a fixed number of them.* Who finds no room waits, which paces walks; and each
//!    [`Rank`] keeps room for what others wait for.
//! 2. *Each is under way from when it is asked for until it is [removed](Requests::remove)*, once:
//!    it waits for a new backup, or stands in the queue of its stream, or is in a datagram.
//! 3. *A stream sends them in the order in which they may be sent.*

use crate::ccp::message::{Fault, Place};
use crate::conn::{Coordinate, MemberId, Stamp};
use crate::limits::{MOVES_MAX, STREAMS_MAX};
use crate::seq::Seq;

use super::stream::stream_index;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Task {
    /// Make the copy at the target go. With `of`, it is the previous backup of the connection
    /// there.
    Release { of: Option<Place>, stamp: Stamp },
    /// Ask whether the copy in this slot still stands.
    Offer { own: Place, claimed: bool },
    /// Tell the active whether the kernel has its copy in this slot.
    Decline { own: Place, number: u32, fault: Option<Fault> },
}

/// What a request is for, least urgent first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rank {
    /// Offers and moves, which walks begin.
    Question,
    /// The answer to an offer.
    Answer,
    /// A release that something applied brings about: nothing waits for more once it is applied.
    Consequence,
}

/// How far a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Delivery {
    /// A release waits until the new backup has acknowledged its copy.
    AwaitBackup,
    /// To be sent.
    Due,
    /// Sent in this datagram.
    Sent(Seq),
}

/// A request under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Request {
    pub(super) task: Task,
    pub(super) target: Coordinate,
    pub(super) delivery: Delivery,
}

impl Request {
    /// The stream that it travels on.
    pub(super) fn stream(&self) -> usize {
        stream_index(self.target.member(), self.target.shard())
    }

    /// Whose backup the target was, of a release that is part of a move.
    pub(super) fn moved(&self) -> Option<Place> {
        match self.task {
            Task::Release { of, .. } => of,
            Task::Offer { .. } | Task::Decline { .. } => None,
        }
    }
}

const NIL: u32 = u32::MAX;
const WORDS: usize = MOVES_MAX.div_ceil(64);

/// Those of one stream that are due: the first and the last.
#[derive(Clone, Copy)]
struct Queue {
    first: u32,
    last: u32,
}

const EMPTY: Queue = Queue { first: NIL, last: NIL };

/// The requests under way.
pub(super) struct Requests {
    requests: Vec<Option<Request>>,
    /// The next one in the queue of the same stream.
    next: Vec<u32>,
    free: Vec<u32>,
    /// Numbers under way, as bits.
    under_way: [u64; WORDS],
    due: Vec<Queue>,
}

impl Requests {
    pub(super) fn new() -> Requests {
        Requests {
            requests: vec![None; MOVES_MAX],
            next: vec![NIL; MOVES_MAX],
            free: (0..MOVES_MAX as u32).rev().collect(),
            under_way: [0; WORDS],
            due: vec![EMPTY; STREAMS_MAX],
        }
    }

    /// Whether a request of this rank may begin. Ranks keep room for what others wait for: answers
    /// must not wait for questions, nor the releases that an answer brings about for other answers.
    pub(super) fn has_room(&self, rank: Rank) -> bool {
        let kept = match rank {
            Rank::Question => MOVES_MAX / 2,
            Rank::Answer => MOVES_MAX / 4,
            Rank::Consequence => 0,
        };
        self.free.len() > kept
    }

    /// Requests under way.
    pub(super) fn len(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    /// Begins a request: one that is due at once, or one that waits for a new backup. `false` if
    /// there is no room for it.
    pub(super) fn begin(
        &mut self,
        rank: Rank,
        task: Task,
        target: Coordinate,
        is_due: bool,
    ) -> bool {
        if !self.has_room(rank) {
            return false;
        }
        let Some(id) = self.free.pop() else { return false };
        self.requests[id as usize] =
            Some(Request { task, target, delivery: Delivery::AwaitBackup });
        self.under_way[id as usize / 64] |= 1 << (id % 64);
        if is_due {
            self.set_due(id);
        }
        true
    }

    /// The numbers of all that are under way now. It stands for itself: requests may begin and end
    /// meanwhile.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> + use<> {
        let mut words = self.under_way;
        (0..WORDS).flat_map(move |word| {
            std::iter::from_fn(move || {
                let bit = words[word].trailing_zeros();
                words[word] &= words[word].wrapping_sub(1);
                (bit < 64).then_some(word as u32 * 64 + bit)
            })
        })
    }

    /// All requests that are under way, with their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Request)> {
        self.ids().filter_map(|id| Some((id, self.requests[id as usize].as_ref()?)))
    }

    /// This request, if it is (still) under way.
    pub(super) fn get(&self, id: u32) -> Option<Request> {
        self.requests[id as usize]
    }

    /// The request is to be sent, behind the others of its stream.
    pub(super) fn set_due(&mut self, id: u32) {
        let request = self.requests[id as usize].as_mut().expect("it is under way");
        if request.delivery == Delivery::Due {
            return;
        }
        request.delivery = Delivery::Due;
        self.next[id as usize] = NIL;
        let queue = &mut self.due[request.stream()];
        match queue.last {
            NIL => queue.first = id,
            last => self.next[last as usize] = id,
        }
        queue.last = id;
    }

    /// The next one that this stream is to send.
    pub(super) fn first_due(&self, stream: usize) -> Option<(u32, Request)> {
        let id = self.due[stream].first;
        (id != NIL).then(|| (id, self.requests[id as usize].expect("what is due is under way")))
    }

    /// The first that is due on its stream was sent in this datagram, as this.
    pub(super) fn sent(&mut self, id: u32, task: Task, seq: Seq) {
        self.unqueue(id);
        let request = self.requests[id as usize].as_mut().expect("what is due is under way");
        (request.task, request.delivery) = (task, Delivery::Sent(seq));
    }

    /// The datagram that carried it was given up: it is to be sent again.
    pub(super) fn given_up(&mut self, id: u32, seq: Seq) {
        if self.requests[id as usize].is_some_and(|request| request.delivery == Delivery::Sent(seq))
        {
            self.set_due(id);
        }
    }

    /// The request has ended, or is not needed any more.
    pub(super) fn remove(&mut self, id: u32) -> Request {
        let request = self.requests[id as usize].expect("a request ends once");
        if request.delivery == Delivery::Due {
            self.unqueue(id);
        }
        self.requests[id as usize] = None;
        self.under_way[id as usize / 64] &= !(1 << (id % 64));
        self.free.push(id);
        request
    }

    fn unqueue(&mut self, id: u32) {
        let stream = self.requests[id as usize].expect("it is under way").stream();
        let (mut before, mut at) = (NIL, self.due[stream].first);
        while at != id {
            assert!(at != NIL, "what is due stands in its stream's queue");
            (before, at) = (at, self.next[at as usize]);
        }
        let next = self.next[id as usize];
        match before {
            NIL => self.due[stream].first = next,
            before => self.next[before as usize] = next,
        }
        if next == NIL {
            self.due[stream].last = before;
        }
    }

    /// The stamp of the release that a member is still to be told for this place of its, which is
    /// no longer needed.
    pub(super) fn released(&self, target: Coordinate) -> Option<Stamp> {
        self.iter().find_map(|(_, request)| match request.task {
            Task::Release { stamp, .. } if request.target == target => Some(stamp),
            _ => None,
        })
    }

    /// Connections of ours that are moving away from a backup, and that one, as long as it was not
    /// released.
    pub(super) fn previous_backups(&self) -> impl Iterator<Item = (Place, Coordinate)> + '_ {
        self.iter().filter_map(|(_, request)| Some((request.moved()?, request.target)))
    }

    /// The release that waits until the connection in this slot has a new backup, and the previous
    /// one.
    pub(super) fn waiting_for(&self, own: Place) -> Option<(u32, Coordinate)> {
        let is_it = |request: &Request| {
            request.delivery == Delivery::AwaitBackup && request.moved() == Some(own)
        };
        self.iter().find(|(_, request)| is_it(request)).map(|(id, request)| (id, request.target))
    }

    /// The next one that is for this member.
    pub(super) fn first_for(&self, member: MemberId) -> Option<u32> {
        self.iter().find(|(_, request)| request.target.member() == member).map(|(id, _)| id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::Generation;

    const STAMP: Stamp = Stamp { epoch: 3, version: 9 };

    fn at(member: MemberId, slot: u32) -> Coordinate {
        Coordinate::new(member, 0, slot, Generation::default())
    }

    fn own(slot: u32) -> Place {
        Place { slot, generation: Generation::default() }
    }

    fn release(of: Option<Place>) -> Task {
        Task::Release { of, stamp: STAMP }
    }

    fn due(requests: &Requests, member: MemberId) -> Option<Coordinate> {
        requests.first_due(stream_index(member, 0)).map(|(_, request)| request.target)
    }

    fn send(requests: &mut Requests, member: MemberId, seq: u64) -> u32 {
        let (id, request) = requests.first_due(stream_index(member, 0)).expect("something is due");
        requests.sent(id, request.task, Seq::NONE.plus(seq));
        id
    }

    #[test]
    fn each_stream_sends_its_own_in_order() {
        let mut requests = Requests::new();
        for target in [at(2, 1), at(3, 7), at(2, 2)] {
            assert!(requests.begin(Rank::Answer, release(None), target, true));
        }
        assert_eq!((due(&requests, 2), due(&requests, 3)), (Some(at(2, 1)), Some(at(3, 7))));
        send(&mut requests, 2, 1);
        assert_eq!(due(&requests, 2), Some(at(2, 2)));
        send(&mut requests, 2, 1);
        assert_eq!((due(&requests, 2), requests.len()), (None, 3), "sent is not arrived");
    }

    #[test]
    fn what_was_given_up_is_sent_again_and_what_was_sent_anew_since_is_not() {
        let mut requests = Requests::new();
        requests.begin(Rank::Answer, release(None), at(2, 1), true);
        let id = send(&mut requests, 2, 1);
        requests.given_up(id, Seq::NONE.plus(1));
        assert_eq!(send(&mut requests, 2, 5), id);
        requests.given_up(id, Seq::NONE.plus(1));
        assert_eq!(due(&requests, 2), None, "that datagram's was another sending");
    }

    #[test]
    fn a_move_releases_the_previous_backup_once_the_new_one_has_acknowledged() {
        let mut requests = Requests::new();
        assert!(requests.begin(Rank::Question, release(Some(own(5))), at(2, 1), false));
        assert_eq!((due(&requests, 2), requests.released(at(2, 1))), (None, Some(STAMP)));
        assert_eq!(requests.previous_backups().collect::<Vec<_>>(), [(own(5), at(2, 1))]);
        let (id, previous) = requests.waiting_for(own(5)).expect("it moves");
        assert_eq!(previous, at(2, 1));
        requests.set_due(id);
        assert_eq!((due(&requests, 2), requests.waiting_for(own(5))), (Some(at(2, 1)), None));
        let id = send(&mut requests, 2, 1);
        assert_eq!(requests.remove(id).moved(), Some(own(5)));
        assert_eq!((requests.len(), requests.released(at(2, 1))), (0, None));
    }

    #[test]
    fn ranks_keep_room_for_what_others_wait_for() {
        let mut requests = Requests::new();
        let mut fill = |rank| {
            let before = requests.len();
            while requests.begin(rank, release(None), at(2, 1), true) {}
            requests.len() - before
        };
        assert_eq!(fill(Rank::Question), MOVES_MAX / 2);
        assert_eq!(fill(Rank::Answer), MOVES_MAX / 4);
        assert_eq!(fill(Rank::Consequence), MOVES_MAX / 4);
        assert_eq!(requests.ids().collect::<Vec<_>>(), (0..MOVES_MAX as u32).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_removed_from_the_middle_of_a_queue_leaves_the_others_in_order() {
        let mut requests = Requests::new();
        for slot in 0..5 {
            requests.begin(Rank::Answer, release(None), at(2, slot), true);
        }
        let ids: Vec<_> = requests.ids().collect();
        for removed in [2, 0, 4] {
            requests.remove(ids[removed]);
        }
        requests.begin(Rank::Answer, release(None), at(2, 9), true);
        let mut order = Vec::new();
        while let Some((id, request)) = requests.first_due(stream_index(2, 0)) {
            order.push(request.target.slot());
            requests.remove(id);
        }
        assert_eq!((order, requests.len()), (vec![1, 3, 9], 0));
    }

    #[test]
    fn a_member_that_is_gone_is_told_nothing() {
        let mut requests = Requests::new();
        for member in [2, 3, 2] {
            requests.begin(Rank::Answer, release(None), at(member, 1), true);
        }
        while let Some(id) = requests.first_for(2) {
            requests.remove(id);
        }
        assert_eq!(
            (requests.len(), due(&requests, 2), due(&requests, 3)),
            (1, None, Some(at(3, 1)))
        );
    }

    #[test]
    #[should_panic(expected = "a request ends once")]
    fn a_request_ends_once() {
        let mut requests = Requests::new();
        requests.begin(Rank::Answer, release(None), at(2, 1), true);
        requests.remove(0);
        requests.remove(0);
    }
}
