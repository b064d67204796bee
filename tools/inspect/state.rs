//! `state`: the member, its shards, how exposed it is, and the group as it sees it.
//!
//! Slots by kind are counted by walking the table; everything else is published words. Ages are
//! on this host's monotonic clock.

use std::io::{self, Write};
use std::time::Duration;

use hypersync::conn::MemberId;
use hypersync::conntrack::sysctl::NEEDED;
use hypersync::counters::{Counter, Counters, delay_percentile};
use hypersync::group::view::{Member, Status};
use hypersync::limits::MEMBERS_MAX;
use hypersync::shm::RegionView;
use hypersync::time::Time;
use serde_json::{Value, json};

use crate::connections::{ROLES, role, silent, snapshot};
use crate::counters::delays;

/// Tries to read a member's record that is being written.
const TRIES: u32 = 100_000;

#[derive(Clone, Copy)]
struct Shard {
    /// Slots by what they hold; torn ones (left by a killed appliance) are in none.
    roles: [u64; ROLES.len()],
    exposure: u64,
    exposure_oldest_us: u64,
    unprotected: u64,
    source_events: u64,
    source_rejected: u64,
    source_overruns: u64,
    last_pass: Time,
    view_version: u64,
    settled_version: u64,
}

impl Shard {
    fn read(view: &RegionView, silent: u64, shard: u8) -> Shard {
        let memory = view.shard(shard);
        let mut roles = [0; ROLES.len()];
        for (line, _) in memory.slots.iter().filter_map(snapshot) {
            let role = role(&line, silent);
            roles
                .iter_mut()
                .zip(ROLES)
                .filter(|(_, name)| *name == role)
                .for_each(|(n, _)| *n += 1);
        }
        let counters = Counters::new(memory.counters);
        let status = view.group().shard(shard);
        Shard {
            roles,
            exposure: counters.get(Counter::Exposure),
            exposure_oldest_us: counters.get(Counter::ExposureOldestUs),
            unprotected: counters.get(Counter::Unprotected),
            source_events: counters.get(Counter::SourceEvents),
            source_rejected: counters.get(Counter::SourceRejected),
            source_overruns: counters.get(Counter::SourceOverruns),
            last_pass: status.last_pass(),
            view_version: status.view_version(),
            settled_version: status.settled_version(),
        }
    }

    /// Adds another shard's: sums, the oldest exposure, the pass that is longest ago, the lowest
    /// version.
    fn with(mut self, other: Shard) -> Shard {
        self.roles.iter_mut().zip(other.roles).for_each(|(sum, n)| *sum += n);
        self.exposure += other.exposure;
        self.exposure_oldest_us = self.exposure_oldest_us.max(other.exposure_oldest_us);
        self.unprotected += other.unprotected;
        self.source_events += other.source_events;
        self.source_rejected += other.source_rejected;
        self.source_overruns += other.source_overruns;
        self.last_pass = self.last_pass.min(other.last_pass);
        self.view_version = self.view_version.min(other.view_version);
        self.settled_version = self.settled_version.min(other.settled_version);
        self
    }

    fn write_line(&self, name: &str, now: Time, out: &mut dyn Write) -> io::Result<()> {
        write!(out, "{name:>5}")?;
        for n in self.roles {
            write!(out, " {n:>9}")?;
        }
        writeln!(
            out,
            " {:>9} {:>9} {:>11} {:>12} {:>9} {:>9} {:>10} {:>8} {:>8}",
            self.exposure,
            span(Duration::from_micros(self.exposure_oldest_us)),
            self.unprotected,
            self.source_events,
            self.source_rejected,
            self.source_overruns,
            age(self.last_pass, now),
            self.view_version,
            self.settled_version
        )
    }

    fn to_json(self, now: Time) -> Value {
        let slots: serde_json::Map<String, Value> =
            ROLES.iter().zip(self.roles).map(|(role, n)| ((*role).into(), n.into())).collect();
        json!({
            "slots": slots,
            "exposure": self.exposure,
            "exposure_oldest_us": self.exposure_oldest_us,
            "unprotected": self.unprotected,
            "source_events": self.source_events,
            "source_rejected": self.source_rejected,
            "source_overruns": self.source_overruns,
            "last_pass_age_ns": age_ns(self.last_pass, now),
            "view_version": self.view_version,
            "settled_version": self.settled_version,
        })
    }
}

/// Prints the state.
pub fn print(view: &RegionView, json: bool, out: &mut dyn Write) -> io::Result<()> {
    let silent = silent(view);
    let shards: Vec<Shard> =
        (0..view.header().sizes.shards).map(|shard| Shard::read(view, silent, shard)).collect();
    let members: Vec<(MemberId, Member)> = (1..=MEMBERS_MAX as MemberId)
        .filter_map(|id| Some((id, (0..TRIES).find_map(|_| view.group().read(id))?)))
        .filter(|(_, member)| member.status != Status::Absent)
        .collect();
    // Read last: nothing that was read can be younger.
    let now = hypersync::clock::now();
    match json {
        true => print_json(view, &shards, &members, now, out),
        false => print_text(view, &shards, &members, now, out),
    }
}

fn print_text(
    view: &RegionView,
    shards: &[Shard],
    members: &[(MemberId, Member)],
    now: Time,
    out: &mut dyn Write,
) -> io::Result<()> {
    let h = view.header();
    write!(
        out,
        "member {} of group {}, pid {}, table {:08x}, ",
        h.member, h.group, h.pid, h.table_id
    )?;
    match view.is_running() {
        true => writeln!(out, "up {}", span(now.since(h.started)))?,
        false => {
            writeln!(out, "NOT RUNNING: this is what it left behind")?;
            for (name, old) in changed_sysctls(view) {
                writeln!(
                    out,
                    "sysctl {name}: was {old} before; the process ended without putting it back: the next start \
                     takes care of it, or: sysctl -w {name}={old}"
                )?;
            }
        }
    }
    writeln!(
        out,
        "{} shards of {} slots, {} KiB of history, {} ring records each; incarnation {}",
        h.sizes.shards,
        h.sizes.memory.capacity,
        h.sizes.memory.arena >> 10,
        h.sizes.ring_records,
        h.incarnation
    )?;
    if let Some(p50) = delay_percentile(&delays(view), 0.5) {
        let p99 = delay_percentile(&delays(view), 0.99).unwrap_or(p50);
        writeln!(out, "first send to acknowledgement: half within {p50} us, 99 % within {p99} us")?;
    }
    write!(out, "\nshard")?;
    for role in ROLES {
        write!(out, " {role:>9}")?;
    }
    writeln!(
        out,
        " {:>9} {:>9} {:>11} {:>12} {:>9} {:>9} {:>10} {:>8} {:>8}",
        "exposed",
        "oldest",
        "unprotected",
        "events",
        "rejected",
        "overruns",
        "last pass",
        "view",
        "settled"
    )?;
    for (i, shard) in shards.iter().enumerate() {
        shard.write_line(&i.to_string(), now, out)?;
    }
    if let Some(all) = shards.iter().copied().reduce(Shard::with).filter(|_| shards.len() > 1) {
        all.write_line("all", now, out)?;
    }
    writeln!(out, "\ngroup, version {}", view.group().version())?;
    if members.is_empty() {
        return writeln!(out, "  nobody was heard yet");
    }
    writeln!(
        out,
        "{:>6} {:<10} {:<40} {:>6} {:>8} {:>4} {:>10} {:>10} {:>10} {:>10} {:<8} table",
        "member",
        "status",
        "address",
        "shards",
        "priority",
        "site",
        "room",
        "capacity",
        "last heard",
        "since",
        "hears me"
    )?;
    for (id, m) in members {
        writeln!(
            out,
            "{id:>6} {:<10} {:<40} {:>6} {:>8} {:>4} {:>10} {:>10} {:>10} {:>10} {:<8} {:08x}",
            m.standing(),
            m.address.map_or("-".into(), |a| a.to_string()),
            m.shards,
            m.priority,
            m.site,
            m.room,
            m.capacity,
            age(m.last_heard, now),
            age(m.since, now),
            if m.hears_me { "yes" } else { "no" },
            m.table_id
        )?;
    }
    Ok(())
}

fn print_json(
    view: &RegionView,
    shards: &[Shard],
    members: &[(MemberId, Member)],
    now: Time,
    out: &mut dyn Write,
) -> io::Result<()> {
    let h = view.header();
    let boot_id: String = h.boot_id.iter().map(|byte| format!("{byte:02x}")).collect();
    let members: Vec<Value> = members
        .iter()
        .map(|(id, m)| {
            json!({
                "member": id,
                "status": m.status.name(),
                "restarting": m.is_restarting(),
                "address": m.address.map(|a| a.to_string()),
                "shards": m.shards,
                "priority": m.priority,
                "site": m.site,
                "room": m.room,
                "capacity": m.capacity,
                "hears_me": m.hears_me,
                "table_id": m.table_id,
                "incarnation": m.incarnation,
                "last_heard_age_ns": age_ns(m.last_heard, now),
                "since_age_ns": age_ns(m.since, now),
            })
        })
        .collect();
    let sysctls: serde_json::Map<String, Value> =
        changed_sysctls(view).map(|(name, old)| (name.into(), old.into())).collect();
    let delays = delays(view);
    let state = json!({
        "member": h.member,
        "group": h.group,
        "pid": h.pid,
        "running": view.is_running(),
        "standing": view.group().shard(0).standing().name(),
        "boot_id": boot_id,
        "table_id": h.table_id,
        "incarnation": h.incarnation,
        "uptime_ns": now.since(h.started).as_nanos() as u64,
        "capacity_per_shard": h.sizes.memory.capacity,
        "arena_bytes_per_shard": h.sizes.memory.arena,
        "ring_records_per_shard": h.sizes.ring_records,
        "sysctls_before": sysctls,
        "delay_p50_us": delay_percentile(&delays, 0.5),
        "delay_p99_us": delay_percentile(&delays, 0.99),
        "shards": shards.iter().map(|shard| shard.to_json(now)).collect::<Vec<Value>>(),
        "group_version": view.group().version(),
        "members": members,
    });
    writeln!(out, "{state}")
}

/// Sysctls that the member changed and has not put back, with what they were before.
fn changed_sysctls(view: &RegionView) -> impl Iterator<Item = (&'static str, u64)> {
    let record = view.is_of_this_boot().then(|| view.old_values());
    NEEDED.iter().enumerate().filter_map(move |(i, (name, _))| Some((*name, record?.get(i)?)))
}

fn age_ns(at: Time, now: Time) -> Option<u64> {
    (at != Time(0)).then(|| now.since(at).as_nanos() as u64)
}

fn age(at: Time, now: Time) -> String {
    if at == Time(0) { "never".into() } else { span(now.since(at)) }
}

/// A span in the unit that suits it.
pub fn span(span: Duration) -> String {
    let (us, s) = (span.as_micros(), span.as_secs());
    match () {
        () if us == 0 => "0".into(),
        () if us < 10_000 => format!("{us}us"),
        () if us < 10_000_000 => format!("{}ms", us / 1000),
        () if s < 600 => format!("{s}s"),
        () if s < 36_000 => format!("{}m{:02}s", s / 60, s % 60),
        () if s < 864_000 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        () => format!("{}d{:02}h", s / 86_400, s / 3600 % 24),
    }
}
