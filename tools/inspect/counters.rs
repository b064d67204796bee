//! `counters`: names, meanings, the value for all shards and for each.

use std::io::{self, Write};

use hypersync::counters::{
    COUNTERS, Counter, CounterInfo, Counters, DELAY_BUCKETS, delay_bucket_floor, delay_percentile,
};
use hypersync::shm::RegionView;
use serde_json::{Value, json};

/// The value for all shards together: the sum, or the largest where a sum means nothing.
pub fn total(counter: Counter, each: &[u64]) -> u64 {
    match counter {
        Counter::ExposureOldestUs | Counter::PassLongestUs | Counter::DelayUs => {
            each.iter().copied().max().unwrap_or(0)
        }
        _ => each.iter().fold(0, |sum, n| sum.wrapping_add(*n)),
    }
}

/// A counter of every shard.
pub fn of_shards(view: &RegionView, counter: Counter) -> Vec<u64> {
    (0..view.header().sizes.shards)
        .map(|shard| Counters::new(view.shard(shard).counters).get(counter))
        .collect()
}

/// The delay histogram of all shards.
pub fn delays(view: &RegionView) -> [u64; DELAY_BUCKETS] {
    let mut sum = [0u64; DELAY_BUCKETS];
    for shard in 0..view.header().sizes.shards {
        let each = Counters::new(view.shard(shard).counters).delays();
        sum.iter_mut().zip(each).for_each(|(sum, n)| *sum = sum.wrapping_add(n));
    }
    sum
}

/// Percentiles of the delay from a change to its acknowledged copy, with their names.
const PERCENTILES: [(&str, f64); 3] =
    [("delay_p50_us", 0.50), ("delay_p99_us", 0.99), ("delay_p999_us", 0.999)];

/// Prints all of them.
pub fn print(view: &RegionView, json: bool, out: &mut dyn Write) -> io::Result<()> {
    let shards = view.header().sizes.shards;
    let delays = delays(view);
    let percentiles = PERCENTILES.map(|(name, share)| (name, delay_percentile(&delays, share)));
    if json {
        let counters: Vec<Value> = COUNTERS.iter().map(|info| counter_json(view, info)).collect();
        let buckets: Vec<Value> = delays
            .iter()
            .enumerate()
            .filter(|(_, n)| **n > 0)
            .map(|(i, n)| json!({ "from_us": delay_bucket_floor(i), "count": n }))
            .collect();
        let mut all = json!({ "shards": shards, "counters": counters, "delays": buckets });
        for (name, us) in percentiles {
            all[name] = json!(us);
        }
        return writeln!(out, "{all}");
    }
    let width = COUNTERS.iter().map(|info| info.name.len()).max().unwrap_or(0);
    write!(out, "{:<width$} {:>12}", "counter", "all")?;
    for shard in 0..shards {
        write!(out, " {:>12}", format!("shard {shard}"))?;
    }
    writeln!(out, "  meaning")?;
    for info in COUNTERS {
        let each = of_shards(view, info.counter);
        write!(out, "{:<width$} {:>12}", info.name, total(info.counter, &each))?;
        for n in each {
            write!(out, " {n:>12}")?;
        }
        writeln!(out, "  {}", info.meaning)?;
    }
    for (name, us) in percentiles {
        // What was never measured is no zero.
        let us = us.map_or("-".into(), |us| us.to_string());
        write!(out, "{name:<width$} {us:>12}")?;
        write!(out, "{:1$}", "", 13 * shards as usize)?;
        writeln!(
            out,
            "  from a change to its acknowledged copy, microseconds, at most a quarter too high"
        )?;
    }
    Ok(())
}

fn counter_json(view: &RegionView, info: &CounterInfo) -> Value {
    let each = of_shards(view, info.counter);
    json!({
        "name": info.name,
        "meaning": info.meaning,
        "all": total(info.counter, &each),
        "shards": each,
    })
}
