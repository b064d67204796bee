//! Figures: counters of several members, summed at one moment, and the difference of two moments.

use std::time::Duration;

use crate::counters::{Counter, Counters, DELAY_BUCKETS, delay_percentile};
use crate::shm::RegionView;
use crate::time::Time;

/// Sums over all shards of all members.
#[derive(Clone, Debug)]
pub struct Figures {
    /// When.
    pub at: Time,
    /// Events that the load told.
    pub events: u64,
    /// Deltas of any kind.
    pub deltas: u64,
    /// Bytes of the datagrams that carried them.
    pub bytes: u64,
    /// The histogram of the delay from a change to its acknowledgement.
    pub delays: [u64; DELAY_BUCKETS],
}

/// The sum of one counter over a member's shards.
pub fn sum(view: &RegionView, counter: Counter) -> u64 {
    (0..view.header().sizes.shards)
        .map(|shard| Counters::new(view.shard(shard).counters).get(counter))
        .sum()
}

impl Figures {
    /// What the members have counted by now; `events` is what the load has.
    pub fn of(views: &[RegionView], events: u64, at: Time) -> Figures {
        let mut figures = Figures { at, events, deltas: 0, bytes: 0, delays: [0; DELAY_BUCKETS] };
        use Counter::{DeltasClose, DeltasNew, DeltasRelease, DeltasUpdate};
        for view in views {
            for counter in [DeltasNew, DeltasUpdate, DeltasClose, DeltasRelease] {
                figures.deltas += sum(view, counter);
            }
            figures.bytes += sum(view, Counter::BytesSent);
            for shard in 0..view.header().sizes.shards {
                let delays = Counters::new(view.shard(shard).counters).delays();
                figures.delays.iter_mut().zip(delays).for_each(|(sum, n)| *sum += n);
            }
        }
        figures
    }

    /// What happened since `earlier`.
    pub fn since(&self, earlier: &Figures) -> Figures {
        Figures {
            at: self.at,
            events: self.events - earlier.events,
            deltas: self.deltas - earlier.deltas,
            bytes: self.bytes - earlier.bytes,
            delays: std::array::from_fn(|i| self.delays[i] - earlier.delays[i]),
        }
    }

    /// The delay below which this share of the measurements lies.
    pub fn delay(&self, share: f64) -> Duration {
        Duration::from_micros(delay_percentile(&self.delays, share).unwrap_or(0))
    }
}

/// A number with commas.
pub fn commas(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A span in the unit that suits it.
pub fn span(span: Duration) -> String {
    match span.as_micros() {
        us if us < 1000 => format!("{us} us"),
        us if us < 10_000 => format!("{:.1} ms", us as f64 / 1e3),
        us if us < 1_000_000 => format!("{} ms", us / 1000),
        us => format!("{:.2} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 1234567].map(commas), ["0", "999", "1,000", "1,234,567"]);
        let spans = [112, 1500, 312_000, 2_345_000].map(|us| span(Duration::from_micros(us)));
        assert_eq!(spans, ["112 us", "1.5 ms", "312 ms", "2.35 s"]);
    }
}
