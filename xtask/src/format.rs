//! `format`: rustfmt for Rust, clang-format for CUDA.

use std::fs;

use xshell::cmd;

use crate::repo::{Options, Repo, Result};
use crate::wheels;

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    let mut options = Options::new(args);
    let check = options.flag("--check");
    options.finish()?;

    let outcomes = [rust(repo, check), cuda(repo, check)];
    let failures: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    for failure in &failures {
        eprintln!("{failure}");
    }
    match failures.is_empty() {
        true => Ok(()),
        false if check => Err("run `cargo xtask format`".into()),
        false => Err("not everything could be formatted".into()),
    }
}

fn rust(repo: &Repo, check: bool) -> Result<()> {
    let check = check.then_some("--check");
    let sh = &repo.sh;
    let outcome = cmd!(sh, "cargo fmt --all -- {check...}").run();
    // A workspace of its own.
    let fuzz = ["--manifest-path", "fuzz/Cargo.toml"];
    outcome.and(cmd!(sh, "cargo fmt {fuzz...} -- {check...}").run())?;
    Ok(())
}

/// Versions of clang-format disagree on details, so the pinned one is used everywhere.
fn cuda(repo: &Repo, check: bool) -> Result<()> {
    let sh = &repo.sh;
    let fetched = repo.target.join("clang-format");
    wheels::fetch(sh, &wheels::CLANG_FORMAT, &fetched)?;
    let clang_format = fetched.join("clang_format/data/bin/clang-format");

    let files = cmd!(sh, "git ls-files --cached --others --exclude-standard")
        .args([
            "--",
            "kernels/*.cu",
            "kernels/*.cuh",
            "kernels/*.cc",
            "kernels/*.h",
        ])
        .quiet()
        .read()?;
    let mut unformatted = Vec::new();
    for file in files.lines() {
        let path = repo.root.join(file);
        let output = cmd!(sh, "{clang_format} --style=file {path}")
            .quiet()
            .output()?;
        if fs::read(&path)? == output.stdout {
            continue;
        }
        unformatted.push(file);
        if !check {
            fs::write(&path, output.stdout)?;
        }
    }
    if check && !unformatted.is_empty() {
        return Err(format!("clang-format would change {}", unformatted.join(", ")).into());
    }
    Ok(())
}
