//! The appliance's command line: `hypersync run`, `hypersync restart`, `hypersync drain` and
//! `hypersync demo`.

use std::io::Write;
use std::process::ExitCode;

use argh::FromArgs;
use hypersync::appliance;
use hypersync::config::EXIT_USAGE;
use hypersync::config::{Config, RunOptions};
use hypersync::drain;
use hypersync::restart;

/// Keeps every connection of a group of stateful gateways on exactly two of them.
#[derive(FromArgs)]
struct Options {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs)]
#[argh(subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one, and it is taken apart at once")]
enum Command {
    Run(RunOptions),
    Restart(restart::RestartOptions),
    Drain(drain::DrainOptions),
    Demo(hypersync::demo::DemoOptions),
}

fn main() -> ExitCode {
    let words: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let options = match Options::from_args(&["hypersync"], words.get(1..).unwrap_or_default()) {
        Ok(options) => options,
        Err(exit) => {
            return match exit.status {
                Ok(()) => {
                    // Whoever closed the pipe has read enough.
                    let _ = writeln!(std::io::stdout(), "{}", exit.output);
                    ExitCode::SUCCESS
                }
                Err(()) => {
                    let of = match words.get(1) {
                        Some(&command @ ("run" | "restart" | "drain" | "demo")) => {
                            format!(" {command}")
                        }
                        _ => String::new(),
                    };
                    let line: Vec<&str> = exit.output.split_whitespace().collect();
                    eprintln!("hypersync: {} (hypersync{of} --help says more)", line.join(" "));
                    ExitCode::from(EXIT_USAGE)
                }
            };
        }
    };
    match options.command {
        Command::Restart(options) => restart::main(&options),
        Command::Drain(options) => drain::main(&options),
        Command::Demo(options) => hypersync::demo::main(options),
        Command::Run(options) => match Config::check(options) {
            Ok(config) => appliance::run(&config),
            Err(line) => {
                eprintln!("hypersync: {line}");
                ExitCode::from(EXIT_USAGE)
            }
        },
    }
}
