//! Logging that never blocks a shard: records go through a bounded queue to a thread that writes
//! them to standard error. What does not fit is counted, and the count is written once there is
//! room again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::limits::LOG_QUEUE;
use log::{Level, Log, Metadata, Record};

struct Line {
    level: Level,
    target: String,
    text: String,
}

enum Item {
    Line(Line),
    Flush(SyncSender<()>),
}

struct Queued {
    filter: env_logger::Logger,
    queue: SyncSender<Item>,
    lost: &'static AtomicU64,
}

static LOST: AtomicU64 = AtomicU64::new(0);

impl Log for Queued {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.filter.matches(record) {
            return;
        }
        let line = Line {
            level: record.level(),
            target: record.target().to_owned(),
            text: record.args().to_string(),
        };
        if self.queue.try_send(Item::Line(line)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {
        let (done, wait) = sync_channel(1);
        if self.queue.send(Item::Flush(done)).is_ok() {
            // An error means that the writer is gone: then there is nothing to wait for.
            let _ = wait.recv();
        }
    }
}

fn logger() -> env_logger::Logger {
    let env = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(env).format_timestamp_millis().format_target(false).build()
}

fn write(items: &Receiver<Item>) {
    let out = logger();
    let mut lost = 0;
    for item in items {
        match item {
            Item::Line(line) => out.log(
                &Record::builder()
                    .level(line.level)
                    .target(&line.target)
                    .args(format_args!("{}", line.text))
                    .build(),
            ),
            Item::Flush(done) => drop(done),
        }
        let now = LOST.load(Ordering::Relaxed);
        if now != lost {
            out.log(
                &Record::builder()
                    .level(Level::Warn)
                    .target("hypersync")
                    .args(format_args!("{} log lines did not fit the queue", now - lost))
                    .build(),
            );
            lost = now;
        }
    }
}

/// Starts logging, at the level that RUST_LOG asks for (info by default).
pub fn start() {
    let (queue, items) = sync_channel(LOG_QUEUE);
    let filter = logger();
    let level = filter.filter();
    let writer = std::thread::Builder::new().name("log".into()).spawn(move || write(&items));
    let logger = Queued { filter, queue, lost: &LOST };
    if writer.is_ok() && log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
}
