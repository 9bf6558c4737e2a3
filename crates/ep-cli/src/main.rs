//! The command `ep`.
//!
//! `ep run` runs one mixture-of-experts layer over several ranks and checks its result against a
//! float64 reference: on GPUs where there are enough, on a simulated cluster elsewhere.
//!
//! Everything here is the command's own; the library is the crate `ep`.

mod run;

use std::io;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

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
    /// One rank of `ep run`, told what to do on standard input
    #[command(hide = true, name = run::RANK_COMMAND)]
    Rank,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Standard output is for results, and for what ranks tell the head.
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::from_default_env())
        .with_writer(io::stderr)
        .init();
    match cli.command {
        Command::Run(args) => run::head(&args),
        Command::Rank => run::rank(),
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
