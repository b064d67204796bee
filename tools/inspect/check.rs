//! `check`: may traffic be sent to this member? For scripts: the exit status is the answer, and one
//! line says why.
//!
//! A verdict of "ready" is only as good as it is fresh, so it takes a process that exists and whose
//! every shard has made a pass a moment ago: a process that hangs, is stopped, or whose number
//! another process has by now, says nothing of today.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use hypersync::conn::MemberId;
use hypersync::counters::Counter;
use hypersync::group::view::Status;
use hypersync::limits::MEMBERS_MAX;
use hypersync::shm::group::{Standing, Troubles};
use hypersync::shm::{RegionView, ShmError};
use serde_json::{Value, json};

use crate::counters::of_shards;

/// A shard makes a pass at least every 50 ms. One that has made none for so long is no longer good
/// for a verdict; a busy host takes a few hundred milliseconds now and then.
const STALE_AFTER: Duration = Duration::from_secs(1);

/// The answer, from bad to good.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// There is no appliance, or only what one left behind.
    NotRunning,
    /// It runs, and its shards do not.
    Stale,
    /// It runs, and must not be given traffic now.
    NotReady,
    /// It can carry the group's traffic.
    Ready,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::NotRunning => "not-running",
            Verdict::Stale => "stale",
            Verdict::NotReady => "not-ready",
            Verdict::Ready => "ready",
        }
    }

    fn status(self) -> u8 {
        match self {
            Verdict::Ready => 0,
            Verdict::NotRunning => 1,
            Verdict::Stale | Verdict::NotReady => 2,
        }
    }
}

/// Prints the answer.
pub fn print(
    view: &Result<RegionView, ShmError>,
    json: bool,
    out: &mut dyn Write,
) -> io::Result<ExitCode> {
    let (verdict, why) = match view {
        Ok(view) => judge(view),
        Err(error @ ShmError::NotReady(_)) => (Verdict::NotReady, error.to_string()),
        Err(error) => (Verdict::NotRunning, error.to_string()),
    };
    match json {
        true => {
            let header = view.as_ref().map(RegionView::header).ok();
            let answer = json!({
                "status": verdict.name(),
                "why": why,
                "member": header.map_or(Value::Null, |h| h.member.into()),
                "group": header.map_or(Value::Null, |h| h.group.into()),
                "pid": header.map_or(Value::Null, |h| h.pid.into()),
            });
            writeln!(out, "{answer}")?;
        }
        false => writeln!(out, "{}: {why}", verdict.name())?,
    }
    Ok(ExitCode::from(verdict.status()))
}

fn judge(view: &RegionView) -> (Verdict, String) {
    let h = view.header();
    let whom = format!("member {} of group {}", h.member, h.group);
    if !view.is_running() {
        return (Verdict::NotRunning, format!("{whom}, process {}, is gone", h.pid));
    }
    let standing = view.group().shard(0).standing();
    let (slowest, pass) = (0..h.sizes.shards)
        .map(|shard| (shard, view.group().shard(shard).last_pass()))
        .min_by_key(|(_, pass)| *pass)
        .expect("there is at least one shard");
    // Read last: nothing that was read can be younger. Before its first pass a shard is as old as
    // the process.
    let silent = hypersync::clock::now().since(pass.max(h.started));
    if silent > STALE_AFTER {
        let seconds = silent.as_secs();
        let why =
            format!("{whom}, process {}: shard {slowest} has done nothing for {seconds} s", h.pid);
        return (Verdict::Stale, why);
    }
    let troubles = view.group().shard(0).troubles();
    if let Some(address) = troubles.namesake {
        let member = h.member;
        let why = format!(
            "{whom}: another host, {address}, also is member {member}, and nobody says that it takes this one for \
             the member: give one of them another --member"
        );
        return (Verdict::NotReady, why);
    }
    match standing {
        Standing::Starting => {
            let why = "is starting: it has not yet read the connections that there are, or not yet listened for the others";
            (Verdict::NotReady, format!("{whom} {why}"))
        }
        Standing::Syncing => (Verdict::NotReady, format!("{whom} is syncing: {}", syncing(view))),
        Standing::Leaving => (Verdict::NotReady, format!("{whom} is leaving the group")),
        Standing::Ready => (
            Verdict::Ready,
            format!("{whom} can carry the group's traffic{}", hears_nobody(view, &troubles)),
        ),
    }
}

/// That nobody is heard, if so. It may be that the others are dead, so it makes nobody less ready.
fn hears_nobody(view: &RegionView, troubles: &Troubles) -> String {
    let now = hypersync::clock::now();
    let known = (1..=MEMBERS_MAX as MemberId).filter_map(|id| Some((id, view.group().read(id)?)));
    let last = known.filter(|(_, m)| m.status == Status::Dead).max_by_key(|(_, m)| m.last_heard);
    match last {
        _ if troubles.deaf => {
            ", but hears nobody, and not even its own heartbeats come back from the multicast group"
                .into()
        }
        _ if !troubles.lonely => String::new(),
        Some((id, m)) => {
            let seconds = now.since(m.last_heard).as_secs();
            format!(", but hears nobody; the last was member {id}, {seconds} s ago")
        }
        None => ", but none of its peers was heard yet".into(),
    }
}

/// What there is so far, and whose rest is missing.
fn syncing(view: &RegionView) -> String {
    let copies: u64 = of_shards(view, Counter::ConnectionsBackup).iter().sum();
    let awaited = view.group().shard(0).awaited();
    let members: Vec<String> =
        (1..=MEMBERS_MAX).filter(|m| awaited >> m & 1 == 1).map(|m| m.to_string()).collect();
    match members.len() {
        0 => format!(
            "{copies} copies so far; the last are being written to the kernel, or nobody else is heard"
        ),
        1 => format!("{copies} copies so far, not yet all of member {}", members[0]),
        _ => format!("{copies} copies so far, not yet all of members {}", members.join(", ")),
    }
}
