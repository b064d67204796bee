//! Logging that never blocks a shard and allocates nothing there: records go, by value, through a
//! bounded queue to a thread that writes them to standard error. What does not fit is counted, and
//! the count is written once there is room again.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use crate::limits::{LOG_LINE_MAX, LOG_QUEUE};
use crate::time::Time;
use log::{Level, Log, Metadata, Record};

/// Lines of one kind, of which many may come at once: the first is written, the others are counted
/// for the next.
pub struct Sparse {
    pause: Duration,
    told_at: Option<Time>,
    untold: u64,
}

impl Sparse {
    /// At most one line in each `pause`.
    pub fn new(pause: Duration) -> Sparse {
        Sparse { pause, told_at: None, untold: 0 }
    }

    /// What to write behind a line that is told now; `None`: it is left out, and counted.
    pub fn tell(&mut self, now: Time) -> Option<Untold> {
        if self.told_at.is_some_and(|at| now.since(at) < self.pause) {
            self.untold += 1;
            return None;
        }
        self.told_at = Some(now);
        Some(Untold(std::mem::take(&mut self.untold)))
    }
}

/// How many lines were left out; nothing if there were none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Untold(u64);

impl fmt::Display for Untold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            n => write!(f, " ({n} more like this since the last such line)"),
        }
    }
}

struct Line {
    level: Level,
    target: &'static str,
    text: Text,
}

/// What stands behind a line that was cut.
const ELLIPSIS: &str = "...";

/// The text of a line, in place.
struct Text {
    bytes: [u8; LOG_LINE_MAX],
    len: usize,
}

impl Text {
    fn new(what: &fmt::Arguments<'_>) -> Text {
        let mut text = Text { bytes: [0; LOG_LINE_MAX], len: 0 };
        if fmt::write(&mut text, *what).is_err() {
            text.put(ELLIPSIS);
        }
        text
    }

    fn put(&mut self, part: &str) {
        self.bytes[self.len..self.len + part.len()].copy_from_slice(part.as_bytes());
        self.len += part.len();
    }

    fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.len]).expect("it was put together from strings")
    }
}

impl fmt::Write for Text {
    /// An error means that no more fits.
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = LOG_LINE_MAX - ELLIPSIS.len() - self.len;
        let mut fitting = part.len().min(room);
        while !part.is_char_boundary(fitting) {
            fitting -= 1;
        }
        self.put(&part[..fitting]);
        if fitting == part.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

#[expect(
    clippy::large_enum_variant,
    reason = "the queue holds lines, and a box would be an allocation"
)]
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
            target: record.module_path_static().unwrap_or("hypersync"),
            text: Text::new(record.args()),
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
                    .target(line.target)
                    .args(format_args!("{}", line.text.as_str()))
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

/// Lines that did not fit the queue, since the start.
pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_lines_the_first_is_told_and_the_next_one_says_how_many_there_were() {
        let mut sparse = Sparse::new(Duration::from_secs(1));
        let mut tell = |ms: u64| sparse.tell(Time(1 + ms * 1_000_000));
        assert_eq!([tell(0), tell(0), tell(999)], [Some(Untold(0)), None, None]);
        assert_eq!(tell(1000).unwrap().to_string(), " (2 more like this since the last such line)");
        assert_eq!([tell(1500), tell(2100)], [None, Some(Untold(1))]);
        assert_eq!(tell(9000).unwrap().to_string(), "", "none was left out");
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_between_two_characters_and_says_so() {
        let whole = |text: &str| Text::new(&format_args!("{text}")).as_str().to_owned();
        assert_eq!(whole("member 2 is dead"), "member 2 is dead");
        let most = "x".repeat(LOG_LINE_MAX - ELLIPSIS.len());
        assert_eq!(whole(&most), most);
        assert_eq!(whole(&format!("{most}y")), format!("{most}..."));
        let wide = whole(&"\u{e9}".repeat(LOG_LINE_MAX));
        assert_eq!(wide, format!("{}...", "\u{e9}".repeat((LOG_LINE_MAX - 3) / 2)));
    }
}
