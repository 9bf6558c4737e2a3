//! `ci`: everything that has to pass before a change lands.

use std::time::{Duration, Instant};

use serde_json::Value;
use xshell::cmd;

use crate::repo::{Options, Repo, Result};
use crate::{build_kernels, codegen, demo, format, test, tidy};

type Step = (&'static str, fn(&Repo) -> Result<()>);

/// Cheap ones first. One that fails does not keep the others from reporting.
const STEPS: [Step; 11] = [
    ("format", |repo| format::run(repo, &["--check".into()])),
    ("tidy", |repo| tidy::run(repo, &[])),
    ("clippy", clippy),
    ("fuzzers", fuzzers),
    ("bindings", |repo| codegen::run(repo, &["--check".into()])),
    ("tests", |repo| test::run(repo, &[])),
    ("rustdoc", rustdoc),
    ("kernels", |repo| {
        build_kernels::run(repo, &["--arch".into(), "90a,100a".into()])
    }),
    ("cuda", cuda),
    ("demo", demo),
    ("benches", benches),
];

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    Options::new(args).finish()?;
    let outcomes = STEPS.map(|(name, step)| {
        eprintln!("\n== {name}");
        let start = Instant::now();
        let outcome = step(repo);
        if let Err(error) = &outcome {
            eprintln!("error: {error}");
        }
        (name, outcome.is_ok(), start.elapsed())
    });

    let failed = outcomes.iter().filter(|(_, passed, _)| !passed).count();
    let total: Duration = outcomes.iter().map(|(_, _, time)| *time).sum();
    println!();
    for (name, passed, time) in outcomes {
        println!(
            "{name:10} {} {:6.1} s",
            if passed { "passed" } else { "FAILED" },
            seconds(time)
        );
    }
    println!("{:10}        {:6.1} s", "total", seconds(total));
    println!("steps: {} passed, {failed} failed", STEPS.len() - failed);
    if failed > 0 {
        Err("CI failed".into())
    } else {
        Ok(())
    }
}

fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}

fn clippy(repo: &Repo) -> Result<()> {
    let features = ["--features", "xtask/bindgen"];
    Ok(cmd!(
        repo.sh,
        "cargo clippy --workspace --all-targets {features...} -- -D warnings"
    )
    .run()?)
}

/// The fuzzers' own code, type-checked: libFuzzer stays out of it, as nothing is linked.
fn fuzzers(repo: &Repo) -> Result<()> {
    let target = repo.target.join("fuzz");
    let check = cmd!(
        repo.sh,
        "cargo check --locked --manifest-path fuzz/Cargo.toml --target-dir {target}"
    );
    Ok(check
        .env("CUSTOM_LIBFUZZER_PATH", target.join("libnone.a"))
        .run()?)
}

/// What is compiled with the CUDA kernels only: linted, linked, and started without a driver.
fn cuda(repo: &Repo) -> Result<()> {
    let sh = &repo.sh;
    let features = ["--features", "cuda"];
    // The kernels themselves were compiled for every architecture in a step of their own.
    let _one = sh.push_env("EP_CUDA_ARCHS", "90a");
    cmd!(
        sh,
        "cargo clippy --workspace --all-targets {features...} -- -D warnings"
    )
    .run()?;
    Ok(cmd!(
        sh,
        "cargo run --package ep-cli --bin ep {features...} -- --version"
    )
    .run()?)
}

fn rustdoc(repo: &Repo) -> Result<()> {
    let doc = cmd!(repo.sh, "cargo doc --workspace --no-deps --lib");
    Ok(doc.env("RUSTDOCFLAGS", "-D warnings").run()?)
}

/// The demo says itself whether its result was right; here it must also say so in its last line.
fn demo(repo: &Repo) -> Result<()> {
    let output = demo::read(repo, &["--backend".into(), "sim".into(), "--json".into()])?;
    println!("{output}");
    let line: Value = serde_json::from_str(output.lines().last().unwrap_or_default())?;
    if line["job"] == "moe-layer" && line["verified"] == true {
        Ok(())
    } else {
        Err("the demo's last line does not say that it was verified".into())
    }
}

fn benches(repo: &Repo) -> Result<()> {
    Ok(cmd!(repo.sh, "cargo bench --package ep-benches -- --test").run()?)
}
