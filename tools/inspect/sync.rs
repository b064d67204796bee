//! `sync`: how far the full sync to each other member is, as this member counts it.
//!
//! Each shard publishes its own figures; here they are added up. A full sync is under way until it
//! is done in every shard.

use std::io::{self, Write};
use std::time::Duration;

use hypersync::conn::MemberId;
use hypersync::limits::MEMBERS_MAX;
use hypersync::shm::RegionView;
use hypersync::sync::full_sync::{Figures, SyncPhase};
use hypersync::sync::stream::{Durable, stream_index};
use hypersync::time::Time;
use serde_json::{Value, json};

use crate::state::span;

/// The full sync of all shards to one member.
struct Row {
    member: MemberId,
    figures: Figures,
    now: Time,
}

impl Row {
    /// `None` if there never was one.
    fn read(view: &RegionView, member: MemberId, now: Time) -> Option<Row> {
        let shards = view.header().sizes.shards;
        let each = (0..shards)
            .map(|shard| Durable(&view.shard(shard).streams[stream_index(member, 0)]).full_sync())
            .filter(|figures| figures.begun != Time(0));
        let figures = each.reduce(together)?;
        Some(Row { member, figures, now })
    }

    fn is_under_way(&self) -> bool {
        self.figures.phase == SyncPhase::Syncing
    }

    fn took(&self) -> Duration {
        let end = if self.is_under_way() { self.now } else { self.figures.ended };
        end.since(self.figures.begun)
    }

    /// Connections a second since it began.
    fn rate(&self) -> f64 {
        let moved = self.figures.done.saturating_sub(self.figures.before) as f64;
        let seconds = self.took().as_secs_f64();
        if seconds > 0.0 { moved / seconds } else { 0.0 }
    }

    /// At the rate so far; `None` if it is over, or nothing has arrived yet.
    fn left(&self) -> Option<Duration> {
        let rate = self.rate();
        (self.is_under_way() && rate > 0.0)
            .then(|| Duration::try_from_secs_f64(self.figures.to_do as f64 / rate).ok())?
    }
}

/// Figures of two shards as one.
fn together(a: Figures, b: Figures) -> Figures {
    // The one that is furthest from done.
    let order = [
        SyncPhase::Done,
        SyncPhase::Full,
        SyncPhase::Idle,
        SyncPhase::Interrupted,
        SyncPhase::Syncing,
    ];
    let rank = |phase| order.iter().position(|p| *p == phase);
    Figures {
        phase: if rank(a.phase) > rank(b.phase) { a.phase } else { b.phase },
        begun: a.begun.min(b.begun),
        ended: a.ended.max(b.ended),
        before: a.before + b.before,
        done: a.done + b.done,
        to_do: a.to_do + b.to_do,
    }
}

/// Prints a line for each member to which there is or was one.
pub fn print(view: &RegionView, json: bool, out: &mut dyn Write) -> io::Result<()> {
    let members = 1..=MEMBERS_MAX as MemberId;
    let now = hypersync::clock::now();
    let rows: Vec<Row> = members.filter_map(|member| Row::read(view, member, now)).collect();
    if json {
        let rows: Vec<Value> = rows.iter().map(to_json).collect();
        return writeln!(out, "{}", json!({ "member": view.header().member, "full_syncs": rows }));
    }
    if rows.is_empty() {
        return writeln!(out, "no member has taken copies of this one yet");
    }
    writeln!(
        out,
        "{:>6} {:<11} {:>12} {:>12} {:>14} {:>9} {:>10} {:>8}",
        "member", "state", "done", "to do", "connections/s", "left", "begun", "took"
    )?;
    for row in &rows {
        let Figures { phase, begun, done, to_do, .. } = row.figures;
        let left = match row.left() {
            Some(left) => span(left),
            None if row.is_under_way() => "?".into(),
            None => "-".into(),
        };
        writeln!(
            out,
            "{:>6} {:<11} {done:>12} {to_do:>12} {:>14.0} {left:>9} {:>10} {:>8}",
            row.member,
            phase.name(),
            row.rate(),
            span(now.since(begun)),
            span(row.took())
        )?;
    }
    Ok(())
}

fn to_json(row: &Row) -> Value {
    let Figures { phase, begun, before, done, to_do, .. } = row.figures;
    json!({
        "member": row.member,
        "state": phase.name(),
        "before": before,
        "done": done,
        "to_do": to_do,
        "connections_per_second": row.rate(),
        "left_ns": row.left().map(|left| left.as_nanos() as u64),
        "begun_age_ns": row.now.since(begun).as_nanos() as u64,
        "took_ns": row.took().as_nanos() as u64,
    })
}
