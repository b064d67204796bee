//! What really is: which connections are open, whose traffic they are, and what their newest state
//! is.
//!
//! Every change draws the next serial number and writes it into one group of the connection's state
//! (status, mark, timeout or labels). So of two states of one connection the older one shows in
//! every group, and a group that a lost delta left behind shows as well. The translated address
//! says which life of its tuple a connection is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use hypersync::conn::extra::{Extra, parts};
use hypersync::conn::slot::groups;
use hypersync::conn::{Connection, MemberId, State, Tuple};
use hypersync::source::SourceEvent;
use hypersync::time::Time;

/// A connection that is open.
#[derive(Clone, Copy)]
pub struct Open {
    /// Who sees its traffic; nobody between a death and the next packet.
    pub owner: Option<MemberId>,
    /// Which life of its tuple.
    pub life: u32,
    /// Its newest state.
    pub connection: Connection,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let State { status, mark, timeout_s, .. } = self.connection.state;
        write!(f, "owner {:?}, status {status} mark {mark} timeout {timeout_s} ", self.owner)?;
        write!(f, "reply {:#x}", self.connection.reply.dst)
    }
}

#[derive(Default)]
pub struct Truth {
    pub open: BTreeMap<Tuple, Open>,
    /// Lives that ended, and those of them that were seen to be gone everywhere.
    pub closed: BTreeSet<u32>,
    pub buried: BTreeSet<u32>,
    /// Tuples of which somebody may hold what nobody can tell it to let go: a close died with the
    /// member that knew of it, or traffic moved away from a member that could not be told. Its
    /// kernel forgets it in time.
    pub expiring: BTreeSet<Tuple>,
    /// Lives whose traffic left a member while its process was gone. When they end elsewhere nobody
    /// remembers that for it: its own kernel forgets them in time.
    pub left: BTreeSet<u32>,
    /// Tuples whose traffic showed up at two members at once: what the one that loses saw since is
    /// lost.
    pub contended: BTreeSet<Tuple>,
    /// Of them, those that two claimed in the same state who have a backup in common: whose word it
    /// heard first has them.
    pub tied: BTreeSet<Tuple>,
    /// Entries that ran out, each with its kernel, while another member had the connection as well.
    pub expired: BTreeSet<(MemberId, u32)>,
    /// Tuples whose traffic moved to a member that had no copy. Nobody tells the pair; its kernels,
    /// which see no packets any more, forget the connection in time.
    pub strayed: BTreeSet<Tuple>,
    lives: u32,
    serial: u32,
    tuples: u32,
}

const LIVES_AT: u32 = 0x6400_0000;

/// Which life of its tuple this is.
pub fn life_of(connection: &Connection) -> u32 {
    connection.reply.dst as u32 - LIVES_AT
}

/// The serial numbers in a state, group by group: none ever falls.
pub fn serials(connection: &Connection) -> [u32; 4] {
    let State { status, mark, timeout_s, .. } = connection.state;
    [
        status,
        mark,
        timeout_s,
        u32::from_le_bytes(connection.extra.labels[..4].try_into().expect("four bytes")),
    ]
}

impl Truth {
    fn next_serial(&mut self) -> u32 {
        self.serial += 1;
        self.serial
    }

    /// A tuple that no connection ever had.
    pub fn fresh_tuple(&mut self) -> Tuple {
        self.tuples += 1;
        let client = Ipv4Addr::from(0x0a00_0000 + self.tuples);
        Tuple::v4(
            6,
            (client, 1024 + self.tuples as u16 % 50_000),
            (Ipv4Addr::new(192, 0, 2, 1), 443),
        )
    }

    /// A connection opens.
    pub fn open(&mut self, tuple: Tuple, owner: MemberId) -> SourceEvent {
        let serial = self.next_serial();
        self.lives += 1;
        let state = State {
            status: serial,
            tcp_state: 3,
            timeout_s: serial,
            mark: serial,
            ..State::default()
        };
        let client = Ipv4Addr::from(LIVES_AT + self.lives);
        let reply = Tuple::v4(6, (Ipv4Addr::new(192, 0, 2, 1), 443), (client, tuple.sport));
        let mut connection = Connection::new(tuple, reply, state);
        if self.lives.is_multiple_of(8) {
            let labels = u128::from(serial);
            connection.extra =
                Extra { parts: parts::LABELS, labels: labels.to_le_bytes(), ..Extra::NONE };
        }
        self.open.insert(tuple, Open { owner: Some(owner), life: self.lives, connection });
        SourceEvent::seen(connection)
    }

    /// One group of it changes, the `n`th.
    pub fn change(&mut self, tuple: Tuple, n: u64) -> SourceEvent {
        let serial = self.next_serial();
        let connection = &mut self.open.get_mut(&tuple).expect("it is open").connection;
        let has_labels = !connection.extra.is_none();
        let known = match n % 4 {
            0 => {
                connection.state.status = serial;
                groups::STATE
            }
            1 => {
                connection.state.timeout_s = serial;
                groups::TIMEOUT
            }
            2 if has_labels => {
                connection.extra.labels = u128::from(serial).to_le_bytes();
                groups::EXTRA
            }
            _ => {
                connection.state.mark = serial;
                groups::MARK
            }
        };
        // The pair's older state may have been written over what the kernel had. A packet there
        // tells all of it again.
        let whole = n.is_multiple_of(3) || self.strayed.contains(&tuple);
        let known = if whole { groups::ALL } else { known | groups::TUPLES };
        SourceEvent::Seen { connection: *connection, known }
    }

    /// It closes.
    pub fn close(&mut self, tuple: Tuple) -> SourceEvent {
        let open = self.open.remove(&tuple).expect("it is open");
        self.closed.insert(open.life);
        SourceEvent::gone(tuple)
    }

    /// What a dump says of a tuple.
    pub fn dumped(&self, tuple: Tuple) -> SourceEvent {
        match self.open.get(&tuple) {
            Some(open) => SourceEvent::seen(open.connection),
            None => SourceEvent::gone(tuple),
        }
    }
}

/// When a source that missed something finds out.
#[derive(Clone, Copy, Debug)]
pub struct Repair {
    pub at: Time,
    pub member: MemberId,
    pub tuple: Tuple,
}
