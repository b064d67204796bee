//! The story: a group, a load, a death, a recovery, a verdict.

use std::io::Write;
use std::time::Duration;

use super::check::{Open, Report, check};
use super::figures::{Figures, commas, span, sum};
use super::group::Group;
use super::options::{DemoOptions, HOLD, MEMBERS, SURVIVORS, VICTIM};
use super::table::copy;
use crate::clock;
use crate::counters::Counter;
use crate::time::Time;

/// How long figures are taken before the kill.
const STEADY: Duration = Duration::from_secs(4);

/// How long the survivors may take until everything is on both of them again.
const SETTLED_WITHIN: Duration = Duration::from_secs(15);

/// Told so shortly before the kill, an opening may not have been read yet.
const RECENT: Duration = Duration::from_secs(1);

/// Of the rate asked for, so much must be reached.
const RATE_PERCENT: u64 = 90;

/// Violations that are printed.
const SHOWN: usize = 10;

/// What happened after the kill.
struct Recovery {
    killed: Time,
    detected: Time,
    /// The exposure of both survivors was 0 again.
    recovered: Time,
    /// Nothing was young, unread or under way any more.
    at_rest: Time,
    most_exposed: u64,
}

/// Runs the demo; whether everything holds.
///
/// # Errors
/// One line that says why it could not be told to its end.
pub fn tell(options: &DemoOptions, out: &mut dyn Write) -> Result<bool, String> {
    let mut say = |what: &str, text: String| {
        // Who closed the pipe does not want to read on; the exit status is still the answer.
        let _ = writeln!(out, "  {what:<21}{text}").and_then(|()| out.flush());
    };
    let begun = clock::now();
    say("hypersync demo", "three appliances on this machine; one is killed under load".into());
    let mut group = Group::start(options)?;
    introduce(&group, begun, &mut say);

    group.load(options)?;
    let started = clock::now();
    let deadline = started.after(Duration::from_secs(60));
    group.drive(|group, now| {
        group.loads.iter().all(|l| l.flows.is_ramped()) || deadline.reached(now)
    })?;
    say(
        "opened",
        format!("{} connections in {}", commas(group.open()), span(clock::now().since(started))),
    );
    let until = clock::now().after(HOLD);
    group.drive(|_, now| until.reached(now))?;
    let before = group.figures();
    let until = clock::now().after(STEADY);
    group.drive(|_, now| until.reached(now))?;

    let (figures, open) = (group.figures().since(&before), group.open());
    let long_lived: u64 = group.loads.iter().map(|load| load.flows.long_lived() as u64).sum();
    let took = clock::now().since(before.at);
    let recovery = die(&mut group)?;
    let rate = (figures.events as f64 / took.as_secs_f64()) as u64;
    steady(&figures, took, open, &group, &mut say);
    let verdict = audit(&group, &recovery);
    aftermath(&recovery, &verdict, &mut say);
    conclude(&group, &verdict, &mut say);

    let mut failures = Vec::new();
    if long_lived < options.connections as u64 {
        failures.push(format!("only {long_lived} connections were open at the kill"));
    }
    if rate < options.rate as u64 * RATE_PERCENT / 100 {
        failures.push(format!("only {rate} events a second were reached of {}", options.rate));
    }
    if verdict.protected == 0 {
        failures.push("the victim had no acknowledged connection: nothing was shown".into());
    }
    for failure in &failures {
        say("DOES NOT HOLD", failure.clone());
    }
    for v in verdict.violations.iter().take(SHOWN) {
        say("DOES NOT HOLD", format!("{:?}: {}: {}", v.wrong, v.original, v.found));
    }
    let wrong = failures.len() + verdict.violations.len();
    if wrong > 0 {
        clues(&group, &mut say);
    }
    let result = match wrong {
        0 => "everything holds".into(),
        n => format!("{} things do not hold", commas(n as u64)),
    };
    say("result", format!("{result}; {} in all", span(clock::now().since(begun))));
    Ok(wrong == 0)
}

type Say<'a> = &'a mut dyn FnMut(&str, String);

fn introduce(group: &Group, begun: Time, say: Say<'_>) {
    say("members", "1 and 2 with two shards, 3 with three; 127.0.0.1 to .3, UDP port 8116".into());
    say("group complete", format!("after {}", span(clock::now().since(begun))));
    let sizes = group.views[0].header().sizes;
    let slots = sizes.memory.capacity as u64 * sizes.shards as u64;
    let bytes = crate::shm::layout::total_bytes(&sizes) as u64;
    let each = bytes.div_ceil(slots);
    say(
        "memory",
        format!("{each} bytes a slot: {} slots in {} MB at member 1", commas(slots), bytes >> 20),
    );
}

/// Kills the victim and waits until the survivors are at rest.
fn die(group: &mut Group) -> Result<Recovery, String> {
    let killed = group.kill()?;
    group.finish_load();
    group.appliances[VICTIM].reap().map_err(|e| format!("cannot wait for the victim: {e}"))?;
    let (mut detected, mut recovered) = (None, None);
    let mut most_exposed = 0;
    loop {
        let now = clock::now();
        let exposure = group.survivors(Counter::Exposure);
        most_exposed = most_exposed.max(exposure);
        detected = detected.or_else(|| group.detected());
        if detected.is_some() && exposure == 0 {
            recovered = recovered.or(Some(now));
        }
        // At rest: nothing is younger than the hold time, all was read, and nothing is exposed.
        let at_rest = group.is_all_read()
            && group.survivors(Counter::ConnectionsHeld) == 0
            && killed.after(HOLD + Duration::from_millis(200)).reached(now);
        if let (Some(detected), Some(recovered), true, 0) = (detected, recovered, at_rest, exposure)
        {
            // Closes are not exposure: the last ones get a moment to arrive.
            group.pause(Duration::from_millis(300))?;
            return Ok(Recovery { killed, detected, recovered, at_rest: now, most_exposed });
        }
        if now.since(killed) > SETTLED_WITHIN {
            let stage = match (detected, recovered) {
                (None, _) => "the death was not detected",
                (_, None) => "the survivors stayed exposed",
                _ => "the survivors did not come to rest",
            };
            return Err(format!(
                "{stage} within {SETTLED_WITHIN:?}: exposure {exposure}, held {}, all read: {}",
                group.survivors(Counter::ConnectionsHeld),
                group.is_all_read()
            ));
        }
        group.pause(Duration::from_millis(2))?;
    }
}

fn audit(group: &Group, recovery: &Recovery) -> Report {
    let mut open = Vec::new();
    for (member, load) in MEMBERS.into_iter().zip(&group.loads) {
        let kill = load.age(recovery.killed);
        let of = |flow| Open { member, flow, is_recent: false };
        open.extend(
            load.flows
                .open()
                .map(of)
                .map(|o| Open { is_recent: o.flow.opened + RECENT > kill, ..o }),
        );
    }
    let victim = copy(&group.views[VICTIM]);
    let survivors = SURVIVORS.map(|member| copy(&group.views[member]));
    check(&victim, &[&survivors[0], &survivors[1]], &open)
}

fn steady(figures: &Figures, took: Duration, open: u64, group: &Group, say: Say<'_>) {
    let a_second = |n: u64| commas((n as f64 / took.as_secs_f64()) as u64);
    let text =
        format!("{} alive; 30 % of new ones short-lived, 20 % NATed, 10 % IPv6", commas(open));
    say("connections", text);
    let full: u64 = group.loads.iter().map(|load| load.full()).sum();
    let text = format!(
        "{} a second opened, changed or closed; {full} waits for a ring",
        a_second(figures.events)
    );
    say("changes", text);
    let each = figures.bytes as f64 / figures.deltas.max(1) as f64;
    say(
        "deltas",
        format!(
            "{} a second; {each:.1} bytes each, with CCP headers and leases",
            a_second(figures.deltas)
        ),
    );
    let [p50, p99, p999, max] = [0.5, 0.99, 0.999, 1.0].map(|share| span(figures.delay(share)));
    say("change to ack", format!("p50 {p50}, p99 {p99}, p99.9 {p999}, max {max} (bucket edges)"));
}

fn aftermath(r: &Recovery, v: &Report, say: Say<'_>) {
    let after = |at: Time| span(at.since(r.killed));
    say("killed", "member 2, with SIGKILL, in the midst of its load".into());
    let of = v.protected + v.exposed();
    let text = format!(
        "{} of its {} connections had a change not acknowledged",
        commas(v.exposed()),
        commas(of)
    );
    say("exposed at the kill", text);
    let text = format!(
        "{} their newest state, {} all of it, {} not read from the ring; {} live on",
        v.exposed_state, v.exposed_whole, v.exposed_unread, v.exposed_alive
    );
    say("", text);
    say("", format!("{} closes not acknowledged, {} slots half written", v.exposed_closes, v.torn));
    say("detected", format!("after {} by both survivors", after(r.detected)));
    say(
        "two copies again",
        format!("after {} (new backups begin 2 s after a death)", after(r.recovered)),
    );
    say("most exposed", format!("{} connections in between", commas(r.most_exposed)));
    say("at rest", format!("after {}", after(r.at_rest)));
}

/// What may explain why something does not hold.
fn clues(group: &Group, say: Say<'_>) {
    for view in &group.views {
        use Counter::{
            Conflicts, DatagramsGivenUp, DatagramsResent, MembersDied, Refused, StreamsLost,
            TableFull,
        };
        let counters = [
            DatagramsResent,
            DatagramsGivenUp,
            StreamsLost,
            MembersDied,
            Refused,
            Conflicts,
            TableFull,
        ];
        let counted = counters.map(|counter| format!("{counter:?} {}", sum(view, counter)));
        say("clue", format!("member {}: {}", view.header().member, counted.join(", ")));
    }
    for warning in group.appliances.iter().flat_map(|a| a.warnings().into_iter().take(SHOWN)) {
        say("clue", warning);
    }
}

fn conclude(group: &Group, v: &Report, say: Say<'_>) {
    let closed: u64 = group.loads.iter().map(|load| load.flows.told().closed).sum();
    let short: u64 = group.loads.iter().map(|load| load.flows.told().opened_short).sum();
    let text =
        format!("{} acknowledged connections of the victim on both survivors", commas(v.protected));
    say("checked", text);
    say("", format!("{} connections of the survivors on both, as last told", commas(v.own)));
    say("", format!("{} copies compared field by field", commas(v.compared)));
    say("", format!("{} closed connections nowhere, but for exposed closes", commas(closed)));
    say("", format!("{} short-lived ones never copied", commas(short)));
    let text = format!("{} younger than the hold time, known to the victim only", commas(v.young));
    say("not protected", text);
}
