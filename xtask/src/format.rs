//! `format`: rustfmt for Rust, clang-format for CUDA.

use std::path::PathBuf;

use xshell::cmd;

use crate::repo::{Options, Repo, Result};
use crate::wheels;

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    let mut options = Options::new(args);
    let check = options.flag("--check");
    options.finish()?;

    let sh = &repo.sh;
    let (rust, cuda): (&[_], &[_]) = if check {
        (&["--check"], &["--dry-run", "--Werror"])
    } else {
        (&[], &["-i"])
    };
    let rust = cmd!(sh, "cargo fmt --all -- {rust...}").run();
    let clang_format = clang_format(repo)?;
    let files = cmd!(sh, "git ls-files --cached --others --exclude-standard")
        .args(["--", "kernels/*.cu", "kernels/*.cuh", "kernels/*.h"])
        .quiet()
        .read()?;
    let files = files.lines();
    let cuda = cmd!(sh, "{clang_format} --style=file {cuda...} {files...}").run();
    rust.and(cuda)
        .map_err(|error| format!("{error}; `cargo xtask format` formats").into())
}

/// Versions of clang-format disagree on details, so the pinned one is used everywhere.
fn clang_format(repo: &Repo) -> Result<PathBuf> {
    let fetched = repo.target.join("clang-format");
    wheels::fetch(&repo.sh, &wheels::CLANG_FORMAT, &fetched)?;
    Ok(fetched.join("clang_format/data/bin/clang-format"))
}
