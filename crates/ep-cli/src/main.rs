//! The command `ep`.
//!
//! `ep run` runs one mixture-of-experts layer over several ranks and checks its result against a
//! float64 reference: on GPUs where there are enough, on a simulated cluster elsewhere. `ep perf`
//! times dispatch and combine. `ep preflight` says what memory a group would use, and why.
//!
//! Everything here is the command's own; the library is the crate `ep`.

mod cluster_file;
mod failure;
mod layer;
mod output;
mod perf;
mod preflight;
mod ranks;
mod run;
mod session;
mod statistics;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::layer::Job;
use crate::perf::Sweep;
use crate::ranks::Work;

/// Expert-parallel dispatch and combine: demonstrations and measurements.
#[derive(Debug, clap::Parser)]
#[command(name = "ep", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Run(run::Args),
    Perf(perf::Args),
    Preflight(preflight::Args),
    /// One rank of `ep run`, told what to do on standard input
    #[command(hide = true, name = Job::RANK_COMMAND)]
    RunRank,
    /// One rank of `ep perf`, told what to do on standard input
    #[command(hide = true, name = Sweep::RANK_COMMAND)]
    PerfRank,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Standard output is for results, and for what ranks tell the head.
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::from_default_env())
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        .init();
    match cli.command {
        Command::Run(args) => run::main(&args),
        Command::Perf(args) => perf::main(&args),
        Command::Preflight(args) => preflight::main(&args),
        Command::RunRank => ranks::main::<Job>(),
        Command::PerfRank => ranks::main::<Sweep>(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
