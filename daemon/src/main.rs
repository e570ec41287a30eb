//! The program `apollod`: see its library.

use std::process::ExitCode;

use apollod::cli;
use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli::start_logging(cli.log_format).and_then(|()| cli.run()).unwrap_or_else(|error| {
        eprintln!("apollod: {}", cli::words(&error));
        ExitCode::FAILURE
    })
}
