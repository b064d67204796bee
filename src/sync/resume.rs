//! Resume: the memory that a killed process left behind becomes a shard's again.
//!
//! Slots, coordinates, leases, streams and the history lie in memory and are as they were; lists,
//! counts and whatever else is private follows from them. A process can be killed between any two
//! stores, so everything is written in an order in which the half of it that was done is something
//! that the protocol repairs anyway:
//!
//! - a slot that was being written is freed two lives later, and its other copy finds that out;
//! - a delta in a datagram that was never entered into the history is dirty again;
//! - slots given back in a datagram of the history are no lease any more, though they may still
//!   stand in one;
//! - what the kernel was owed is found by the look-ups that follow a resume;
//! - releases, offers and declines under way are forgotten: moves begin anew from the slots, the
//!   rest is found by comparing digests.
//!
//! What a killed process had taken out of one place and not yet put into another (a leased slot)
//! stays unused until the stream's next session: one slot at most.

use std::collections::HashSet;

use super::credit::Credit;
use super::history::{Content, Datagram, History};
use super::peers::PeerState;
use super::replica::{Replica, ReplicaConfig};
use super::stream::{Durable, stream_index};
use super::walks::Walk;
use crate::conn::table::{Table, Written};
use crate::conn::{Kind, MemberId};
use crate::limits::{MEMBERS_MAX, SHARDS_MAX, STREAMS_MAX};
use crate::memory::Memory;
use crate::seq::Seq;
use crate::source::{Commit, CommitMode, Elsewhere};
use crate::time::Time;

impl<'m> Replica<'m> {
    /// A shard over the memory that a killed process left behind; the configuration's table id and
    /// key are those of then. Every member counts as silent until a view says something else.
    /// Returns how many slots were being written at that moment and are lost.
    pub fn resume(config: ReplicaConfig, memory: Memory<'m>, now: Time) -> (Replica<'m>, u32) {
        let (table, torn) = Table::resume(&memory, config.index_key);
        let mut used = HashSet::new();
        for slot in 0..table.capacity() {
            let line = table.line(slot);
            if matches!(line.kind(), Kind::Active | Kind::Closing) && line.peer().is_plausible() {
                used.insert((
                    stream_index(line.peer().member(), line.peer().shard()),
                    line.peer().slot(),
                ));
            }
        }
        let history = History::resume(&memory, |entry| {
            let durable = Durable(&memory.streams[entry.stream]);
            entry.session != durable.session() || !entry.seq.is_after(durable.sent())
        });
        let mut given_back = HashSet::new();
        for id in history.ids() {
            let Datagram { stream, session, seq, .. } = history.entry(id);
            if is_outstanding(Durable(&memory.streams[stream]), session, seq) {
                given_back.extend(history.contents(id).filter_map(|content| match content {
                    Content::GivenBack(place) => Some((stream, place.slot, place.generation.raw())),
                    _ => None,
                }));
            }
        }
        // A lease that was used, or came back, or was given back, just then must not stand here
        // twice.
        let credit = Credit::resume(memory.leases, memory.streams, |stream, place| {
            !given_back.contains(&(stream, place.slot, place.generation.raw()))
                && used.insert((stream, place.slot))
        });
        drop((used, given_back));
        let mut replica = Replica::over(config, memory, table, credit, history);
        replica.commits.resume();
        replica.resume_history();
        replica.resume_slots(now);
        replica.resume_digests();
        replica.resume_peers(now);
        (replica, torn)
    }

    /// Datagrams that are not acknowledged wait for that again.
    fn resume_history(&mut self) {
        let mut found = vec![0; STREAMS_MAX];
        for id in self.outbox.ids() {
            let entry = self.outbox.entry(id);
            let durable = self.durable(entry.stream);
            if !is_outstanding(durable, entry.session, entry.seq) {
                continue;
            }
            let carried = |content: &Content| match content {
                Content::Delta { place, .. } => {
                    let line = self.ledger.line(place.slot);
                    line.generation() == place.generation
                        && line.kind() == Kind::Active
                        && line.last() == entry.seq
                }
                _ => false,
            };
            let connections = self.outbox.contents(id).filter(carried).count() as u32;
            // Killed before they were lent: nobody may take the name for another connection's
            // place.
            let granted = self.outbox.contents(id).filter_map(|content| match content {
                Content::Granted(place) => Some(place),
                _ => None,
            });
            for place in granted {
                let line = self.ledger.line(place.slot);
                if line.kind() == Kind::Free && line.generation() == place.generation {
                    self.ledger.skip_lives(place.slot);
                }
            }
            self.outbox.take_up(id, connections);
            found[entry.stream] += 1;
        }
        for (stream, found) in found.into_iter().enumerate() {
            let durable = self.durable(stream);
            let retired = durable.floor().max(durable.given_up());
            assert!(
                found == durable.sent().beyond(retired),
                "stream {stream} has {found} datagrams after {retired:?} and sent {:?}",
                durable.sent()
            );
        }
    }

    fn resume_slots(&mut self, now: Time) {
        let mut closing: Vec<(usize, Seq, u32)> = Vec::new();
        for slot in 0..self.ledger.capacity() {
            let line = self.ledger.line(slot);
            if line.kind().is_connection() {
                self.ledger.raise_epoch(line.stamp().epoch);
            }
            let peer = line.peer();
            if peer.is_somewhere() && (!peer.is_plausible() || peer.member() == self.config.member)
            {
                unreachable!("slot {slot} has its other copy at {peer}");
            }
            let stream = if peer.is_somewhere() { self.stream_of(peer) } else { 0 };
            match line.kind() {
                // The walk that takes back what was lent in an earlier session did not come to its
                // end.
                Kind::Leased if line.session() != self.durable(stream).peer_session() => {
                    self.ledger.free(slot)
                }
                Kind::Free | Kind::Leased => {}
                Kind::Held if line.is_unseen() && self.config.commit == CommitMode::Eager => {
                    let generation = line.generation();
                    self.ask_commit(Commit::Look {
                        slot,
                        generation,
                        elsewhere: Elsewhere::Unknown,
                    });
                }
                Kind::Held => self.ledger.hold(now, slot),
                Kind::Active if !peer.is_somewhere() => self.ledger.wait(now, slot),
                Kind::Active | Kind::Closing => {
                    let durable = self.durable(stream);
                    let is_sent = line.last() != Seq::NONE && !line.last().is_after(durable.sent());
                    if line.kind() == Kind::Active {
                        self.ledger.take_up_active(slot);
                    }
                    if !is_sent {
                        self.ledger.amend(slot, |line| line.set_last(Seq::NONE));
                        let was_empty = self.ledger.dirty(stream) == 0;
                        self.ledger.push_dirty(now, slot);
                        self.send_soon(now, stream, was_empty);
                    } else if line.kind() == Kind::Closing {
                        closing.push((stream, line.last(), slot));
                    }
                }
                Kind::Backup => {
                    // Whether it was is not known any more; what was not can only be asked for too
                    // much.
                    let is_eager = self.config.commit == CommitMode::Eager;
                    self.ledger
                        .take_up_copy(slot, if is_eager { Written::Resumed } else { Written::No });
                }
            }
            if line.is_moving() {
                match line.kind() {
                    Kind::Active => self.resume_move(slot),
                    _ => self.ledger.forget_move(slot),
                }
            }
        }
        closing.sort_by_key(|(stream, seq, _)| (*stream, seq.raw()));
        for (_, _, slot) in closing {
            self.ledger.await_ack(now, slot);
        }
    }

    /// Who was there is silent for now. What was being let go goes on being let go.
    fn resume_peers(&mut self, now: Time) {
        let me = self.config.member;
        for member in (1..=MEMBERS_MAX as MemberId).filter(|m| *m != me) {
            let streams = (0..SHARDS_MAX as u8).map(|shard| stream_index(member, shard));
            let known: Vec<Durable<'_>> =
                streams.map(|s| self.durable(s)).filter(Durable::is_known).collect();
            let is_forgetting = self.durable(stream_index(member, 0)).is_forgetting();
            let tables = || known.iter().map(Durable::peer_table).filter(|table| *table != 0);
            // New sessions begin one stream after the other: the last one may still be with the
            // table before.
            let (Some(first), Some(table)) = (tables().next(), tables().next_back()) else {
                if is_forgetting {
                    self.walks.push(Walk::Forget { member });
                }
                continue;
            };
            let let_go = first != table || known.iter().any(Durable::is_let_go);
            self.peers.set_table(member, table);
            self.peers.set(member, PeerState::Down { since: now, left_behind: true, lost: false });
            if self.config.commit == CommitMode::Takeover {
                self.unwritten |= 1 << member;
            }
            if let_go {
                self.write_copies(member);
                self.purge(now, member);
            }
            // Behind the purge, and before anything is offered.
            if is_forgetting {
                self.walks.push(Walk::Forget { member });
            }
        }
        for stream in 0..STREAMS_MAX {
            let durable = self.durable(stream);
            if !durable.is_known() {
                continue;
            }
            self.inbox.resume(stream);
            let floor = durable.floor();
            self.outbox.resume_session(now, stream);
            self.credit.resume_want(stream);
            self.free_closed(stream, floor);
            self.enqueue(stream);
        }
        for slot in 0..self.ledger.capacity() {
            let line = self.ledger.line(slot);
            let member = line.peer().member();
            let refers = line.peer().is_somewhere() && line.kind() != Kind::Free;
            assert!(
                !refers || !matches!(self.peers.state(member), PeerState::Vacant),
                "slot {slot} refers to member {member}, which nothing is known of"
            );
        }
    }
}

/// Whether a datagram of the history was sent, and neither acknowledged nor given up.
fn is_outstanding(durable: Durable<'_>, session: u16, seq: Seq) -> bool {
    session == durable.session()
        && !seq.is_passed_by(durable.floor())
        && !seq.is_passed_by(durable.given_up())
        && !seq.is_after(durable.sent())
}
