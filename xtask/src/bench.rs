//! `bench`: criterion benchmarks, with the GPU groups where a GPU is.

use xshell::cmd;

use crate::repo::{Repo, Result};

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    let features = repo.features()?;
    let sh = &repo.sh;
    cmd!(
        sh,
        "cargo bench --package ep-benches {features...} {args...}"
    )
    .run()?;
    Ok(())
}
