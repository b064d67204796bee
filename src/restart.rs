//! Restarting without leaving the group: `hypersync restart` asks the running process, and that
//! becomes the next one.
//!
//! ```text
//!  hypersync restart                      the appliance                         the others
//!  same layout version? --within-->
//!  SIGHUP ------------------------------> heartbeats: back within T ----------> roles stay as they are
//!                                         threads end, no goodbye
//!                                         exec, same pid and words
//!                                         takes the table up, READY
//!  a new incarnation, the same table <--- heartbeats ------------------------> it is back
//! ```

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use argh::FromArgs;

use crate::config::{DEFAULT_SHM, EXIT_USAGE, span};
use crate::group::BACK_MAX;
use crate::holder;
use crate::shm::{RegionView, ask_back_within};

/// How long a restart may take if nobody says.
const DEFAULT_WITHIN: Duration = Duration::from_secs(30);

/// The shortest time that can be announced: the dead time of most groups, so that it means
/// something.
const WITHIN_MIN: Duration = Duration::from_secs(1);

/// The switch that must not be handed on: it was meant for one start.
const NEW_TABLE: &str = "--new-table";

/// Restarts the member that runs here, with its table: the others are told, and wait. After an
/// upgrade this starts the new program.
#[derive(FromArgs, Clone, Debug)]
#[argh(subcommand, name = "restart")]
pub struct RestartOptions {
    /// directory of the shared memory (default /dev/shm/hypersync)
    #[argh(option, default = "PathBuf::from(DEFAULT_SHM)")]
    pub shm: PathBuf,
    /// how long the others wait for it, 1s to 2min (default 30s)
    #[argh(option, default = "DEFAULT_WITHIN", from_str_fn(span))]
    pub within: Duration,
}

/// Runs `hypersync restart`. Exit status 0: a new process is ready with the same table.
pub fn main(options: &RestartOptions) -> ExitCode {
    if !(WITHIN_MIN..=BACK_MAX).contains(&options.within) {
        let shown = humantime::format_duration;
        let (low, high) = (shown(WITHIN_MIN), shown(BACK_MAX));
        eprintln!("hypersync: --within {} is out of range: {low} to {high}", shown(options.within));
        return ExitCode::from(EXIT_USAGE);
    }
    holder::tell(ask(options))
}

/// Asks the running process to restart, and waits for the next one.
fn ask(options: &RestartOptions) -> Result<String, String> {
    let dir = &options.shm;
    // This program takes the running one's place, as far as can be known: what it cannot read it
    // cannot take up.
    let (pid, old) = holder::find(dir, "restart")?;
    let header = *old.header();
    ask_back_within(dir, options.within).map_err(|e| e.to_string())?;
    let asked = Instant::now();
    holder::signal(pid, libc::SIGHUP)?;
    while asked.elapsed() < options.within {
        // Not readable: it is just starting. READY is what ends that.
        if let Ok(new) = RegionView::open(dir)
            && new.header().incarnation != header.incarnation
        {
            let (member, table) = (header.member, new.header().table_id);
            return match table == header.table_id {
                true => Ok(format!(
                    "member {member} is back after {} ms, process {}, with table {table:08x}",
                    asked.elapsed().as_millis(),
                    new.header().pid
                )),
                false => Err(format!(
                    "member {member} is back, but with a new table, {table:08x}: its log says why"
                )),
            };
        }
        if holder::is_gone(pid) {
            return Err(format!("process {pid} ended and was not replaced: its log says why"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(format!(
        "process {pid} did not come back within {}: its log says why",
        humantime::format_duration(options.within)
    ))
}

/// What a word of the header, in ms, means for a restart.
pub fn back_within(ms: u64) -> Duration {
    match ms {
        0 => DEFAULT_WITHIN,
        ms => Duration::from_millis(ms).clamp(WITHIN_MIN, BACK_MAX),
    }
}

/// Makes this process the next run of the program that it was started as, with the same words.
/// Returns only if that fails: what to say then.
pub fn exec() -> String {
    let mut words = std::env::args_os();
    let name = words.next().unwrap_or_default();
    let program = match program(&name) {
        Ok(program) => program,
        Err(e) => return format!("cannot restart: no program is found as {}: {e}", name.display()),
    };
    let words = words.filter(|word| word != NEW_TABLE);
    let error = Command::new(&program).arg0(&name).args(words).exec();
    format!("cannot restart as {}: {error}", program.display())
}

/// Where the program lies now: looked up as it was at the start, so that a new version that was put
/// there is taken; else where this one was started from.
fn program(name: &OsStr) -> io::Result<PathBuf> {
    let is_program = |path: &PathBuf| {
        path.metadata()
            .is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
    };
    let found = if name.as_bytes().contains(&b'/') {
        Some(PathBuf::from(name)).filter(is_program)
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|dir| dir.join(name)).find(is_program)
    };
    match found {
        Some(path) => Ok(path),
        None => std::fs::read_link("/proc/self/exe").map(without_deleted),
    }
}

/// A program that was replaced has these words behind its path; the new one lies at the path
/// itself.
fn without_deleted(link: PathBuf) -> PathBuf {
    match link.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(path) => OsString::from_vec(path.to_vec()).into(),
        None => link,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_program_is_looked_up_as_it_was_started() {
        let program = |name: &str| program(OsStr::new(name)).unwrap();
        assert_eq!(program("/bin/sh"), Path::new("/bin/sh"));
        assert!(program("sh").ends_with("sh") && program("sh").is_absolute());
        let own = std::env::current_exe().unwrap();
        assert_eq!(program("no such program"), own);
        assert_eq!(program("/etc/passwd"), own, "nobody can run it");
        let link = PathBuf::from("/usr/sbin/hypersync (deleted)");
        assert_eq!(without_deleted(link), Path::new("/usr/sbin/hypersync"));
    }

    #[test]
    fn nonsense_in_the_header_is_no_time_to_announce() {
        let times = [0, 1, 5000, u64::MAX].map(back_within);
        assert_eq!(times, [30, 1, 5, 120].map(Duration::from_secs));
    }
}
