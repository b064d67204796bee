//! hypersync-inspect: what an appliance of this host holds, read from its shared memory.
//!
//! It maps the memory read-only and loads words, so it cannot disturb the appliance, and works
//! as well on what a killed one left behind. A record that is being written is read again,
//! never shown torn. Exit status: 0; 1 if `find` finds nothing; 2 if it was called wrongly or
//! there is nothing to read (one line on standard error says what).

mod args;
mod connections;
mod counters;
mod state;

use std::io::{self, BufWriter, ErrorKind, Write};
use std::process::ExitCode;

use args::{Args, Command};
use hypersync::shm::RegionView;

fn main() -> ExitCode {
    let args = match Args::from_command_line() {
        Ok(args) => args,
        Err(status) => return status,
    };
    let view = match RegionView::open(&args.shm) {
        Ok(view) => view,
        Err(error) => {
            eprintln!("hypersync-inspect: {error}");
            return ExitCode::from(2);
        }
    };
    let mut out = BufWriter::new(io::stdout().lock());
    match run(&view, &args.command, &mut out).and_then(|status| out.flush().map(|()| status)) {
        Ok(status) => status,
        // Whoever reads us has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hypersync-inspect: cannot write the answer: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(view: &RegionView, command: &Command, out: &mut dyn Write) -> io::Result<ExitCode> {
    match command {
        Command::State(c) => state::print(view, c.json, out)?,
        Command::Connections(c) => connections::print_all(view, c.json, out)?,
        Command::Counters(c) => counters::print(view, c.json, out)?,
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
