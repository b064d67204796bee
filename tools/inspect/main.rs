//! hypersync-inspect: what an appliance of this host holds, read from its shared memory.
//!
//! It maps the memory read-only and loads words, so it cannot disturb the appliance, and works
//! as well on what a killed one left behind. A record that is being written is read again,
//! never shown torn. Exit status: 0; 1 if `find` finds nothing; 2 if it was called wrongly or
//! there is nothing to read (one line on standard error says what). `check` answers by its status
//! alone: 0 ready, 1 not running, 2 not ready; what there is to say it says on standard output.

mod args;
mod check;
mod connections;
mod counters;
mod state;
mod sync;

use std::io::{self, BufWriter, ErrorKind, Write};
use std::process::ExitCode;

use args::{Args, Command};
use hypersync::shm::RegionView;

fn main() -> ExitCode {
    let args = match Args::from_command_line() {
        Ok(args) => args,
        Err(status) => return status,
    };
    let view = RegionView::open(&args.shm);
    let mut out = BufWriter::new(io::stdout().lock());
    let outcome = match (&args.command, &view) {
        (Command::Check(c), view) => check::print(view, c.json, &mut out),
        (command, Ok(view)) => run(view, command, &mut out),
        (_, Err(error)) => {
            eprintln!("hypersync-inspect: {error}");
            return ExitCode::from(2);
        }
    };
    // A reader that is gone has seen enough of a list; what the status answers stays true.
    let (status, written) = match outcome {
        Ok(status) => (status, out.flush()),
        Err(error) => (ExitCode::SUCCESS, Err(error)),
    };
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("hypersync-inspect: cannot write the answer: {error}");
            ExitCode::from(2)
        }
        _ => status,
    }
}

fn run(view: &RegionView, command: &Command, out: &mut dyn Write) -> io::Result<ExitCode> {
    match command {
        Command::State(c) => state::print(view, c.json, out)?,
        Command::Connections(c) => connections::print_all(view, c.json, out)?,
        Command::Counters(c) => counters::print(view, c.json, out)?,
        Command::Sync(c) => sync::print(view, c.json, out)?,
        Command::Check(_) => unreachable!("it is answered without a region, too"),
        Command::Find(c) => match c.tuple.join(" ").parse() {
            Ok(tuple) => return connections::print_found(view, &tuple, c.json, out),
            Err(error) => {
                eprintln!("hypersync-inspect: {error}");
                return Ok(ExitCode::from(2));
            }
        },
    }
    Ok(ExitCode::SUCCESS)
}
