//! The notify command: run away from the shards' threads, in order, one at a time, with a limit.
//!
//! It runs as `COMMAND EVENT MEMBER`; the events are those of [`Notice`].

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use crate::conn::MemberId;
use crate::limits::NOTIFY_QUEUE;

/// Something that the command is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notice {
    /// A member was heard that was not there before.
    MemberUp(MemberId),
    /// A member can hold copies and take over.
    MemberReady(MemberId),
    /// A member was told to end, and waits for its traffic to move.
    MemberLeaving(MemberId),
    /// A member said goodbye.
    MemberLeft(MemberId),
    /// A member is dead, and what it carried is in this host's kernel.
    MemberDead(MemberId),
    /// This member can hold copies and take over.
    SelfReady(MemberId),
    /// This member leaves, or another host has its number.
    SelfNotReady(MemberId),
}

impl Notice {
    /// The command's arguments: what happened, and whom it concerns.
    fn arguments(self) -> (&'static str, MemberId) {
        match self {
            Notice::MemberUp(member) => ("member-up", member),
            Notice::MemberReady(member) => ("member-ready", member),
            Notice::MemberLeaving(member) => ("member-leaving", member),
            Notice::MemberLeft(member) => ("member-left", member),
            Notice::MemberDead(member) => ("member-dead", member),
            Notice::SelfReady(member) => ("self-ready", member),
            Notice::SelfNotReady(member) => ("self-not-ready", member),
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (event, member) = self.arguments();
        write!(f, "{event} {member}")
    }
}

/// What did not reach the command, since the start.
#[derive(Default)]
pub struct NoticeCounts {
    /// Notices that found the queue full.
    pub lost: AtomicU64,
    /// Calls that could not be made, failed, or were killed.
    pub failed: AtomicU64,
}

/// The shard's end: never blocks.
#[derive(Clone)]
pub struct Notifier {
    queue: SyncSender<Notice>,
    counts: Arc<NoticeCounts>,
}

impl Notifier {
    /// Starts the thread that logs every notice and runs the command, if there is one.
    pub fn start(
        command: Option<PathBuf>,
        limit: Duration,
    ) -> io::Result<(Notifier, std::thread::JoinHandle<()>)> {
        let (sender, receiver) = sync_channel(NOTIFY_QUEUE);
        let counts = Arc::<NoticeCounts>::default();
        let counts_there = counts.clone();
        let thread = std::thread::Builder::new()
            .name("notify".into())
            .spawn(move || work(&receiver, command.as_ref(), limit, &counts_there))?;
        Ok((Notifier { queue: sender, counts }, thread))
    }

    /// Queues a notice. If the command is so far behind that the queue is full, it is lost, and the
    /// log says so.
    pub fn tell(&self, notice: Notice) {
        match self.queue.try_send(notice) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(notice)) => {
                self.counts.lost.fetch_add(1, Ordering::Relaxed);
                log::error!("the notify command is too slow: {notice} is lost")
            }
        }
    }

    /// What did not reach the command so far.
    pub fn counts(&self) -> &NoticeCounts {
        &self.counts
    }
}

fn work(
    notices: &Receiver<Notice>,
    command: Option<&PathBuf>,
    limit: Duration,
    counts: &NoticeCounts,
) {
    for notice in notices {
        log::info!("{notice}");
        let Some(command) = command else { continue };
        let outcome = spawn(command, notice).and_then(|child| wait(child, limit));
        if !matches!(&outcome, Ok(Some(status)) if status.success()) {
            counts.failed.fetch_add(1, Ordering::Relaxed);
        }
        match outcome {
            Ok(Some(status)) if status.success() => {}
            Ok(Some(status)) => log::warn!("{} {notice}: {status}", command.display()),
            Ok(None) => log::warn!("{} {notice}: killed after {limit:?}", command.display()),
            Err(e) => log::error!("{} {notice}: {e}", command.display()),
        }
    }
}

/// Starts the command in a process group of its own, so that what it started ends with it, and with
/// no signal blocked: this process blocks those that it waits for.
fn spawn(command: &PathBuf, notice: Notice) -> io::Result<Child> {
    let (event, member) = notice.arguments();
    let mut command = Command::new(command);
    command.arg(event).arg(member.to_string()).stdin(Stdio::null()).process_group(0);
    // SAFETY: between fork and exec only async-signal-safe calls are made, on a set of the child's
    // own stack.
    unsafe {
        command.pre_exec(|| {
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::pthread_sigmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
            Ok(())
        });
    }
    command.spawn()
}

/// Waits for a child, at most `limit`; then it is killed, and there is no status.
fn wait(mut child: Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            // SAFETY: the child leads a group of its own and was not waited for, so the number is
            // still its.
            unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn notices_run_in_order_one_at_a_time_and_a_hanging_one_is_killed() {
        let dir = std::env::temp_dir().join(format!("hypersync-notify-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (script, out) = (dir.join("notify"), dir.join("out"));
        let text = format!(
            "#!/bin/sh\necho \"$1 $2\" >> {}\n[ $1 = member-up ] && exec sleep 60\nexit 0\n",
            out.display()
        );
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let (notifier, thread) = Notifier::start(Some(script), Duration::from_millis(300)).unwrap();
        let started = Instant::now();
        notifier.tell(Notice::MemberUp(2));
        notifier.tell(Notice::MemberReady(2));
        notifier.tell(Notice::MemberDead(3));
        let counts = notifier.counts.clone();
        drop(notifier);
        thread.join().unwrap();
        let counted = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        assert_eq!(
            (counted(&counts.failed), counted(&counts.lost)),
            (1, 0),
            "the one that was killed"
        );
        let said = std::fs::read_to_string(&out).unwrap();
        assert_eq!(said, "member-up 2\nmember-ready 2\nmember-dead 3\n");
        assert!(
            started.elapsed() >= Duration::from_millis(300)
                && started.elapsed() < Duration::from_secs(30)
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
