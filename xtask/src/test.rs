//! `test`: every test that this host can run.

use xshell::cmd;

use crate::repo::{Options, Repo, Result};

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    Options::new(args).finish()?;
    let features = repo.features()?;
    let sh = &repo.sh;

    let nextest = cmd!(sh, "cargo nextest --version")
        .quiet()
        .ignore_stdout()
        .ignore_stderr()
        .run();
    let tests = match nextest {
        Ok(()) => cmd!(sh, "cargo nextest run --workspace {features...}").run(),
        Err(_) => {
            let targets = ["--lib", "--bins", "--tests", "--examples"];
            // nextest.toml keeps tests from disturbing each other on the GPUs; here, this does.
            let threads: &[_] = if features.is_empty() {
                &[]
            } else {
                &["--", "--test-threads=1"]
            };
            cmd!(
                sh,
                "cargo test --workspace --no-fail-fast {targets...} {features...} {threads...}"
            )
            .run()
        }
    };
    let doctests = cmd!(
        sh,
        "cargo test --workspace --no-fail-fast --doc {features...}"
    )
    .run();

    let kernels = if features.is_empty() {
        "host kernels only"
    } else {
        "host and CUDA kernels"
    };
    println!();
    println!("tests:    {} ({kernels})", verdict(tests.is_ok()));
    println!("doctests: {}", verdict(doctests.is_ok()));
    tests.and(doctests)?;
    Ok(())
}

fn verdict(ok: bool) -> &'static str {
    if ok { "passed" } else { "FAILED" }
}
