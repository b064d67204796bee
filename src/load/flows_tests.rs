//! The generator: what it tells, in which shares, at which rate, in which order.

use std::collections::HashMap;
use std::time::Duration;

use super::*;
use crate::conn::{Connection, Family, Tuple};
use crate::load::flow::is_short;

fn config() -> FlowsConfig {
    FlowsConfig {
        plane: 1,
        seed: 42,
        connections: 1000,
        rate: 10_000,
        ramp: Duration::from_secs(1),
        short_percent: 30,
        short_life: Duration::from_millis(500),
        nat_percent: 20,
        v6_percent: 10,
    }
}

/// A data plane's table, which believes everything.
#[derive(Default)]
struct Table(HashMap<Tuple, Connection>);

impl Table {
    fn take(&mut self, event: &SourceEvent) -> bool {
        match event {
            SourceEvent::Seen { connection, .. } => {
                self.0.insert(connection.original, *connection);
            }
            SourceEvent::Gone { original, .. } => {
                assert!(self.0.remove(original).is_some(), "{original} closed without being open");
            }
        }
        true
    }

    fn assert_is(&self, flows: &Flows) {
        assert_eq!(self.0.len(), flows.open().count());
        for flow in flows.open() {
            assert_eq!(self.0[&flow.original], flow.connection());
        }
    }
}

#[test]
fn the_rate_and_the_shares_are_those_asked_for() {
    let mut flows = Flows::new(config());
    let mut table = Table::default();
    assert!(flows.run(Duration::from_millis(500), usize::MAX, &mut |e| table.take(e)));
    assert!(flows.long_lived().abs_diff(500) <= 1 && !flows.is_ramped());
    flows.run(Duration::from_secs(1), usize::MAX, &mut |e| table.take(e));
    let before = flows.told();
    assert_eq!(
        (before.opened, before.changed),
        (1000, before.changed.min(1)),
        "the ramp opens only"
    );
    flows.run(Duration::from_secs(11), usize::MAX, &mut |e| table.take(e));
    let told = flows.told();
    assert!((told.events() - before.events()).abs_diff(100_000) <= 1);
    let (opened, short) = (told.opened - before.opened, told.opened_short);
    assert!((25..35).contains(&(100 * short / opened)), "{short} of {opened} are short-lived");
    assert!(flows.long_lived().abs_diff(1000) <= 1);
    let share =
        |is_it: &dyn Fn(&Flow) -> bool| 100 * flows.open().filter(|f| is_it(f)).count() / 1000;
    assert!((15..26).contains(&share(&|f| f.connection().is_translated())));
    assert!((6..15).contains(&share(&|f| f.original.family == Family::V6)));
    assert!(flows.open().all(|f| f.is_short == is_short(&f.original)));
    table.assert_is(&flows);
}

#[test]
fn a_short_lived_connection_closes_on_time() {
    let mut flows = Flows::new(config());
    for ms in (0..5000).step_by(5) {
        let now = Duration::from_millis(ms);
        flows.run(now, usize::MAX, &mut |_| true);
        let oldest = flows.open().filter(|f| f.is_short).map(|f| f.opened).min();
        // Closes take their turn on the beat: a burst of them may be late by a few beats.
        assert!(oldest.is_none_or(|opened| now - opened <= Duration::from_millis(510)));
    }
}

#[test]
fn a_full_ring_delays_events_but_changes_nothing_about_them() {
    let all = |mut flows: Flows, step: u64, takes: &dyn Fn(u64) -> bool| {
        let mut events = Vec::new();
        let mut offers = 0;
        for ms in (0..8000).step_by(step as usize) {
            flows.run(Duration::from_millis(ms), 100_000, &mut |event| {
                offers += 1;
                let taken = takes(offers);
                if taken {
                    events.push(*event);
                }
                taken
            });
        }
        events
    };
    let smooth = all(Flows::new(config()), 1, &|_| true);
    let rough = all(Flows::new(config()), 3, &|offer| offer % 13 != 0);
    let common = rough.len().min(smooth.len());
    assert!(common > 10_000);
    assert_eq!(smooth[..common], rough[..common]);
}

#[test]
fn at_the_end_it_closes_the_short_lived_ones_or_all() {
    let mut flows = Flows::new(config());
    let mut table = Table::default();
    flows.run(Duration::from_secs(3), usize::MAX, &mut |e| table.take(e));
    assert!(flows.open().any(|f| f.is_short) && !flows.is_finished());
    flows.finish(true);
    flows.run(Duration::from_secs(3), usize::MAX, &mut |e| table.take(e));
    assert!(flows.is_finished() && flows.open().all(|f| !f.is_short));
    table.assert_is(&flows);
    flows.finish(false);
    assert!(!flows.is_finished());
    flows.run(Duration::from_secs(3), usize::MAX, &mut |e| table.take(e));
    assert!(flows.is_finished() && table.0.is_empty());
}
