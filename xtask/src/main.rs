//! The project's own commands: `cargo xtask help` lists them.

#![forbid(unsafe_code)]

mod bench;
mod build_kernels;
mod bundle;
mod ci;
mod codegen;
mod demo;
mod format;
mod repo;
mod test;
mod tidy;
#[path = "../../kernels/toolkit.rs"]
mod toolkit;
mod wheels;

use std::env;
use std::process::ExitCode;

use repo::{Repo, Result};

const HELP: &str = "\
usage: cargo xtask COMMAND

  demo [ARGS]                    one MoE layer over 4 ranks, checked; ARGS go to `ep run`
  test                           all tests: without a GPU, and on a GPU host also those that need one
  bench [ARGS]                   benchmarks; ARGS go to `cargo bench`
  bench --plot [FILES] [--out SVG]
                                 latency figures of what `ep perf` and other libraries' benchmarks
                                 printed, in FILES or piped; SVG is docs/figures/latency.svg when
                                 not given
  build-kernels [--arch LIST]    compile every kernel, show its resources, fail on spills
  bundle [--arch LIST] [--out DIR]
                                 binaries and tests for a GPU host without Rust
  codegen [--check]              write (or compare) the bindings of the kernels' header
  format [--check]               rustfmt, and clang-format for the kernels
  tidy                           the repository's own rules
  ci                             everything that CI runs

LIST is of compute capabilities, 90a,100a when not given. Commands that compile kernels take nvcc from
NVCC, CUDA_HOME, PATH or /usr/local/cuda, and otherwise fetch it once into the target folder.";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let (command, args) = match args.split_first() {
        Some((command, args)) => (command.as_str(), args),
        None => ("help", args),
    };
    match command {
        "demo" => demo::run(&Repo::open()?, args),
        "test" => test::run(&Repo::open()?, args),
        "bench" => bench::run(&Repo::open()?, args),
        "build-kernels" => build_kernels::run(&Repo::open()?, args),
        "bundle" => bundle::run(&Repo::open()?, args),
        "codegen" => codegen::run(&Repo::open()?, args),
        "format" => format::run(&Repo::open()?, args),
        "tidy" => tidy::run(&Repo::open()?, args),
        "ci" => ci::run(&Repo::open()?, args),
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(())
        }
        unknown => Err(format!("no command {unknown:?}\n\n{HELP}").into()),
    }
}
