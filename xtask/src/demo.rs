//! `demo`: the main job, on the GPUs where there are some and on the simulated cluster elsewhere.

use std::env;

use xshell::{Cmd, cmd};

use crate::repo::{Repo, Result};

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    let command = command(repo, args)?;
    // Paths among the arguments are seen from where the caller stands.
    let _there = repo.sh.push_dir(env::current_dir()?);
    Ok(command.run()?)
}

/// The demo's standard output.
pub(crate) fn read(repo: &Repo, args: &[String]) -> Result<String> {
    Ok(command(repo, args)?.read()?)
}

fn command<'a>(repo: &'a Repo, args: &[String]) -> Result<Cmd<'a>> {
    let features = features(repo, args)?;
    let manifest = repo.root.join("Cargo.toml");
    let build = cmd!(
        repo.sh,
        "cargo run --release --manifest-path {manifest} --package ep-cli --bin ep"
    );
    Ok(build.args(features).args(["--", "run"]).args(args))
}

/// Who names the backend has said what to build.
fn features(repo: &Repo, args: &[String]) -> Result<&'static [&'static str]> {
    match backend(args) {
        Some("sim") => Ok(&[]),
        Some("cuda") => {
            repo.toolkit()?;
            Ok(&["--features", "cuda"])
        }
        _ => repo.features(),
    }
}

fn backend(args: &[String]) -> Option<&str> {
    let at = args.iter().position(|arg| arg.starts_with("--backend"))?;
    match args[at].split_once('=') {
        Some((_, value)) => Some(value),
        None => args.get(at + 1).map(String::as_str),
    }
}

#[cfg(test)]
mod tests {
    use super::backend;

    #[test]
    fn backend_is_read_in_both_spellings() {
        let args = |line: &str| line.split(' ').map(String::from).collect::<Vec<_>>();
        assert_eq!(
            backend(&args("--ranks 2 --backend sim --json")),
            Some("sim")
        );
        assert_eq!(backend(&args("--backend=cuda")), Some("cuda"));
        assert_eq!(backend(&args("--json --backend")), None);
        assert_eq!(backend(&args("--json")), None);
    }
}
