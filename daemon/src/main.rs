//! apollod: a daemon that makes a language model learn while it is being served.
//!
//! A reader follows one example: `http` -> `queue` -> `supervisor` -> (the trainer child) `trainer` -> the live
//! weights -> (`schedule`) the model directory.

mod backend;
mod bench;
mod cli;
mod config;
mod demo;
mod doctor;
mod engine;
mod examples;
mod gguf;
mod grads;
mod http;
mod protocol;
mod queue;
mod reading;
mod schedule;
mod supervisor;
mod trainer;
mod weights;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli::start_logging(cli.log_format).and_then(|()| cli.run()).unwrap_or_else(|error| {
        eprintln!("apollod: {}", cli::words(&error));
        ExitCode::FAILURE
    })
}
