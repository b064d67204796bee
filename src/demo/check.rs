//! The checker: does what the survivors hold agree with what the load told and with what the
//! victim knew to be acknowledged? A pure function over copies of three tables and the load.
//!
//! For a connection of the **victim** its own memory decides what may be asked for:
//!
//! ```text
//!  in the victim's memory                the survivors must hold
//!  active, newest state acknowledged     that state, on both; if the load had told more than the
//!                                        victim had read, the connection counts as exposed
//!  active, an earlier one acknowledged   some state that it had, on both: exposed
//!  active, nothing acknowledged          the same, or nothing at all: exposed
//!  half written                          the same, or nothing at all: exposed
//!  held                                  nothing: too young to have been sent
//!  not there, but open                   nothing: its opening was not read yet
//!  closing, not acknowledged             some copy on both, or nothing: an exposed close
//!  closed and gone, or acknowledged      nothing
//! ```
//!
//! A connection of a **survivor** must be active there and backed up at the other one, both exactly
//! as the load told last; a closed one must be nowhere; no short-lived one may have a copy
//! anywhere.

use std::collections::HashMap;

use super::table::{Acknowledged, Found, TableCopy};
use crate::conn::{Connection, Kind, MemberId, Tuple};
use crate::load::Flow;
use crate::load::flow::is_short;

/// The number that no member has.
const NOBODY: MemberId = 0;

/// A connection that is open, as the load told it.
#[derive(Clone, Copy)]
pub struct Open<'a> {
    /// To whom.
    pub member: MemberId,
    /// The connection.
    pub flow: &'a Flow,
    /// It opened so shortly before the kill that its member may not have read of it.
    pub is_recent: bool,
}

/// What is wrong with a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wrong {
    /// A copy is missing.
    Missing,
    /// There is a further copy.
    Further,
    /// A copy is older than it may be.
    Older,
    /// A copy holds what the connection never was.
    Differs,
    /// It is closed, or never was sent, and yet there is a copy.
    ClosedPresent,
    /// It is short-lived and was copied.
    ShortCopied,
    /// The two copies are not one active and one backup that name each other.
    Roles,
}

/// Something that does not hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Of which connection.
    pub original: Tuple,
    /// What.
    pub wrong: Wrong,
    /// What was found, for people.
    pub found: String,
}

/// What was checked, and what does not hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// The victim's connections whose newest state was acknowledged.
    pub protected: u64,
    /// ... whose newest state was not, but an earlier one was.
    pub exposed_state: u64,
    /// ... of which nothing was acknowledged.
    pub exposed_whole: u64,
    /// ... of which the load had told more than the victim had read.
    pub exposed_unread: u64,
    /// Of those three, connections that live on in some state that they had.
    pub exposed_alive: u64,
    /// The victim's closes that were not acknowledged.
    pub exposed_closes: u64,
    /// The victim's connections younger than the hold time, which nobody else knows.
    pub young: u64,
    /// Half-written slots in the victim's memory.
    pub torn: u64,
    /// The survivors' own connections.
    pub own: u64,
    /// Copies on the survivors that were compared field by field.
    pub compared: u64,
    /// Everything that does not hold.
    pub violations: Vec<Violation>,
}

impl Report {
    /// The victim's connections whose newest state was not acknowledged.
    pub fn exposed(&self) -> u64 {
        self.exposed_state + self.exposed_whole + self.exposed_unread
    }

    fn blame(&mut self, original: &Tuple, wrong: Wrong, found: String) {
        self.violations.push(Violation { original: *original, wrong, found });
    }
}

/// Where the living hold a connection: at two different members, as it should be, and what there is
/// beside.
#[derive(Default)]
struct Holders<'a> {
    copies: [Option<&'a Found>; 2],
    further: Option<&'a Found>,
    is_open: bool,
}

impl<'a> Holders<'a> {
    fn note(&mut self, found: &'a Found) {
        let is_twice =
            self.copies.iter().flatten().any(|copy| copy.at.member() == found.at.member());
        match self.copies.iter_mut().find(|copy| copy.is_none()) {
            Some(copy) if !is_twice => *copy = Some(found),
            _ => self.further = Some(found),
        }
    }

    fn both(&self) -> Option<[&'a Found; 2]> {
        Some([self.copies[0]?, self.copies[1]?])
    }

    fn any(&self) -> Option<&'a Found> {
        self.copies[0].or(self.copies[1])
    }
}

/// Checks the tables of a whole group at rest, of two members at least, against what the load told:
/// nobody died.
pub fn check_at_rest(members: &[&TableCopy], open: &[Open<'_>]) -> Report {
    check(&TableCopy { member: NOBODY, found: Vec::new() }, members, open)
}

/// Checks the survivors' tables at rest against what the load told and what the victim left behind.
pub fn check(victim: &TableCopy, survivors: &[&TableCopy], open: &[Open<'_>]) -> Report {
    let mut verdict = Report::default();
    for found in std::iter::once(&victim).chain(survivors).flat_map(|table| &table.found) {
        if found.kind == Kind::Backup && !found.is_torn && is_short(&found.connection.original) {
            verdict.blame(
                &found.connection.original,
                Wrong::ShortCopied,
                format!("backup at {}", found.at),
            );
        }
    }
    let mut places: HashMap<Tuple, Holders<'_>> = HashMap::new();
    for found in
        survivors.iter().flat_map(|table| &table.found).filter(|found| found.kind.is_connection())
    {
        places.entry(found.connection.original).or_default().note(found);
    }
    let owned = victim.found.iter().filter(|found| found.is_torn || found.kind != Kind::Backup);
    let mut left: HashMap<Tuple, &Found> =
        owned.map(|found| (found.connection.original, found)).collect();
    verdict.torn = victim.found.iter().filter(|found| found.is_torn).count() as u64;

    for open in open {
        let mut none = Holders::default();
        let at = places.get_mut(&open.flow.original).unwrap_or(&mut none);
        at.is_open = true;
        if open.member == victim.member {
            let left = left.remove(&open.flow.original);
            check_victims(&mut verdict, open, left, at);
        } else {
            verdict.own += 1;
            let newest = |found: &Found| compare(found, &open.flow.connection(), open.flow);
            require_pair(&mut verdict, open.flow, at, Some(open.member), "as last told", &newest);
        }
    }
    // What is left in the victim's memory was closed by the load, whether the victim knew or not.
    let unacknowledged = |found: &Found| {
        found.is_torn
            || found.kind == Kind::Active
            || found.kind == Kind::Closing && found.acknowledged != Acknowledged::Newest
    };
    left.retain(|_, found| unacknowledged(found));
    verdict.exposed_closes = left.len() as u64;
    for (original, at) in places.iter().filter(|(_, at)| !at.is_open) {
        let Some(found) = at.any() else { continue };
        if !left.contains_key(original) {
            verdict.blame(
                original,
                Wrong::ClosedPresent,
                format!("{} at {}", found.kind.name(), found.at),
            );
        } else if at.both().is_none() {
            verdict.blame(
                original,
                Wrong::Missing,
                format!("only at {}, its close was exposed", found.at),
            );
        }
    }
    verdict
}

fn check_victims(verdict: &mut Report, open: &Open<'_>, left: Option<&Found>, at: &Holders<'_>) {
    let flow = open.flow;
    let some_state = |found: &Found| compare_any(found, flow);
    let Some(left) = left else {
        if !open.is_recent {
            verdict.blame(
                &flow.original,
                Wrong::Missing,
                "it is not in the victim's own memory".into(),
            );
        }
        verdict.exposed_unread += !flow.is_short as u64;
        return require_none(verdict, flow, at);
    };
    if left.is_torn {
        verdict.exposed_whole += 1;
        return require_pair_or_none(verdict, flow, at, &some_state);
    }
    let state = left.connection;
    match left.kind {
        Kind::Held => {
            verdict.young += 1;
            require_none(verdict, flow, at);
        }
        Kind::Active
            if !flow.had(state.state.mark) || flow.connection_at(state.state.mark) != state =>
        {
            let found = format!("the victim's own memory has {:?}", state.state);
            verdict.blame(&flow.original, Wrong::Differs, found);
        }
        Kind::Active => match left.acknowledged {
            Acknowledged::Newest => {
                match state.state.mark == flow.mark() {
                    true => verdict.protected += 1,
                    false => {
                        verdict.exposed_unread += 1;
                        verdict.exposed_alive += at.both().is_some() as u64;
                    }
                }
                let acknowledged = |found: &Found| match found.stamp.cmp(&left.stamp) {
                    std::cmp::Ordering::Less => Err(Wrong::Older),
                    std::cmp::Ordering::Equal => compare(found, &state, flow),
                    std::cmp::Ordering::Greater => compare_any(found, flow),
                };
                let (epoch, version) = (left.stamp.epoch, left.stamp.version);
                let wanted =
                    format!("acknowledged was {epoch}.{version} {:?}", left.connection.state);
                require_pair(verdict, flow, at, None, &wanted, &acknowledged);
            }
            Acknowledged::Earlier => {
                verdict.exposed_state += 1;
                verdict.exposed_alive += at.both().is_some() as u64;
                require_pair(verdict, flow, at, None, "any state it had", &some_state);
            }
            Acknowledged::Nothing => {
                verdict.exposed_whole += 1;
                verdict.exposed_alive += at.both().is_some() as u64;
                require_pair_or_none(verdict, flow, at, &some_state);
            }
        },
        kind => {
            let found = format!("{} in the victim's own memory, but never closed", kind.name());
            verdict.blame(&flow.original, Wrong::Missing, found);
        }
    }
}

/// Whether a copy is exactly `expected`; otherwise, whether it is an older state or none that ever
/// was.
fn compare(found: &Found, expected: &Connection, flow: &Flow) -> Result<(), Wrong> {
    if found.connection == *expected {
        return Ok(());
    }
    compare_any(found, flow).and(Err(Wrong::Older))
}

/// Whether a copy is some state that the connection had.
fn compare_any(found: &Found, flow: &Flow) -> Result<(), Wrong> {
    let mark = found.connection.state.mark;
    match flow.had(mark) && found.connection == flow.connection_at(mark) {
        true => Ok(()),
        false => Err(Wrong::Differs),
    }
}

fn require_none(verdict: &mut Report, flow: &Flow, at: &Holders<'_>) {
    if let Some(found) = at.any() {
        let found = format!("{} at {}, but it was never sent", found.kind.name(), found.at);
        verdict.blame(&flow.original, Wrong::ClosedPresent, found);
    }
}

type Compare<'a> = &'a dyn Fn(&Found) -> Result<(), Wrong>;

fn require_pair_or_none(verdict: &mut Report, flow: &Flow, at: &Holders<'_>, compare: Compare<'_>) {
    if at.any().is_some() {
        require_pair(verdict, flow, at, None, "any state it had", compare);
    }
}

/// Both survivors hold it, one as active (`active`, if that is said) and one as backup, and both
/// copies pass.
fn require_pair(
    verdict: &mut Report,
    flow: &Flow,
    at: &Holders<'_>,
    active: Option<MemberId>,
    wanted: &str,
    compare: Compare<'_>,
) {
    if let Some(further) = at.further {
        let found = format!("{} at {} as well", further.kind.name(), further.at);
        return verdict.blame(&flow.original, Wrong::Further, found);
    }
    let Some(pair) = at.both() else {
        let found = at.any().map_or("nowhere".into(), |found| format!("only at {}", found.at));
        return verdict.blame(&flow.original, Wrong::Missing, found);
    };
    for found in pair {
        verdict.compared += 1;
        if let Err(wrong) = compare(found) {
            let known = if flow.had(found.connection.state.mark) {
                "a mark it had"
            } else {
                "no mark it had"
            };
            let (a, b) = (pair[0].stamp, pair[1].stamp);
            let found = format!(
                "{} at {} has {:?} ({known}), told was {:?}; {wanted}; stamps {}.{} and {}.{}",
                found.kind.name(),
                found.at,
                found.connection.state,
                flow.connection().state,
                a.epoch,
                a.version,
                b.epoch,
                b.version
            );
            return verdict.blame(&flow.original, wrong, found);
        }
    }
    let [a, b] = if pair[0].kind == Kind::Active { pair } else { [pair[1], pair[0]] };
    let is_pair =
        a.kind == Kind::Active && b.kind == Kind::Backup && a.peer == b.at && b.peer == a.at;
    if !is_pair || active.is_some_and(|member| a.at.member() != member) {
        let of =
            |found: &Found| format!("{} at {} with {}", found.kind.name(), found.at, found.peer);
        verdict.blame(&flow.original, Wrong::Roles, format!("{}, {}", of(pair[0]), of(pair[1])));
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
