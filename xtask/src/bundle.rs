//! `bundle`: a folder of binaries for a GPU host without Rust.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{self, Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use serde_json::Value;
use xshell::cmd;

use crate::repo::{Options, Repo, Result, text};
use crate::toolkit;

/// What some ways of carrying a folder to a GPU host accept.
const MAX_BYTES: u64 = 60 << 20;

/// Tests of the checkout or of the build machine, which a GPU host has not: they start `ep` where
/// cargo put it (the script does that itself), compile the header, or read the fuzzers' corpora.
const PACKAGES_LEFT: [&str; 2] = ["xtask", "ep-cli"];
const TESTS_LEFT: [&str; 3] = ["ep-kernels.abi", "ep-peers.corpus", "ep-sim.corpus"];

const RUN_TESTS: &str = include_str!("run-tests.sh");
const SCRIPT: &str = "run-tests.sh";

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    let mut options = Options::new(args);
    let out = options
        .value("--out")?
        .map_or_else(|| repo.target.join("bundle"), PathBuf::from);
    // The shell's own folder is the repository.
    let out = path::absolute(out)?;
    let archs = options.value("--arch")?;
    options.finish()?;

    refuse_what_is_no_bundle(&out)?;
    toolkit::parse_archs(archs.unwrap_or(toolkit::DEFAULT_ARCHS))?;
    println!("{}", repo.toolkit()?);
    let _archs = archs.map(|list| repo.sh.push_env("EP_CUDA_ARCHS", list));

    let program = built(repo, &["build", "--package", "ep-cli", "--bin", "ep"])?;
    let left = PACKAGES_LEFT
        .iter()
        .flat_map(|package| ["--exclude", package]);
    let test: Vec<_> = ["test", "--no-run", "--workspace"]
        .into_iter()
        .chain(left)
        .collect();
    let tests = built(repo, &test)?;

    repo.sh.remove_path(&out)?;
    let mut bytes = 0;
    for executable in program {
        bytes += install(repo, &executable.path, &out.join("bin/ep"))?;
    }
    for executable in tests.iter().filter(|executable| executable.travels()) {
        let to = out.join("tests").join(&executable.name);
        bytes += install(repo, &executable.path, &to)?;
    }
    let script = out.join(SCRIPT);
    fs::write(&script, RUN_TESTS)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;

    println!("{:8.1} MiB  {}", mebibytes(bytes), out.display());
    if bytes > MAX_BYTES {
        return Err(format!("the bundle is over {} MiB", MAX_BYTES >> 20).into());
    }
    Ok(())
}

/// The folder is emptied first, so it has to be a bundle, or empty, or not there.
fn refuse_what_is_no_bundle(out: &Path) -> Result<()> {
    let is_empty = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(format!("{}: {error}", out.display()).into()),
    };
    if is_empty || out.join(SCRIPT).is_file() {
        return Ok(());
    }
    Err(format!(
        "{} holds something else than a bundle; name another --out",
        out.display()
    )
    .into())
}

/// A program that cargo built.
struct Executable {
    /// Package and target, unique in the workspace.
    name: String,
    path: PathBuf,
    test: bool,
}

impl Executable {
    /// Whether it is a test binary for the bundle, with something in it. One that does not say what
    /// it has is carried.
    fn travels(&self) -> bool {
        if !self.test || TESTS_LEFT.contains(&self.name.as_str()) {
            return false;
        }
        let list = Command::new(&self.path)
            .args(["--list", "--format", "terse"])
            .output();
        !list.is_ok_and(|output| output.status.success() && output.stdout.is_empty())
    }
}

/// Builds with the CUDA kernels in release and returns the executables that came of it.
fn built(repo: &Repo, cargo: &[&str]) -> Result<Vec<Executable>> {
    let sh = &repo.sh;
    let options = [
        "--release",
        "--features",
        "cuda",
        "--message-format",
        "json-render-diagnostics",
    ];
    let messages = cmd!(sh, "cargo {cargo...} {options...}").read()?;
    let mut executables = Vec::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line)?;
        if let Some(path) = message["executable"].as_str() {
            executables.push(Executable {
                name: format!("{}.{}", package(repo, &message)?, target(&message)?),
                path: path.into(),
                test: message["profile"]["test"] == true,
            });
        }
    }
    Ok(executables)
}

fn package<'a>(repo: &'a Repo, message: &Value) -> Result<&'a str> {
    let id = &message["package_id"];
    let packages = repo.metadata["packages"].as_array().into_iter().flatten();
    let package = packages.into_iter().find(|package| package["id"] == *id);
    text(
        package.ok_or_else(|| format!("cargo built {id}, which is not in the workspace"))?,
        "name",
    )
}

/// Unit tests of a library are told from an integration test of the same name.
fn target(message: &Value) -> Result<&str> {
    let target = &message["target"];
    if target["kind"][0] == "lib" {
        Ok("lib")
    } else {
        text(target, "name")
    }
}

/// Copies and strips; returns the size.
fn install(repo: &Repo, from: &Path, to: &Path) -> Result<u64> {
    fs::create_dir_all(to.parent().unwrap_or(to))?;
    fs::copy(from, to)?;
    cmd!(repo.sh, "strip {to}").quiet().run()?;
    let bytes = fs::metadata(to)?.len();
    println!(
        "{:8.1} MiB  {}",
        mebibytes(bytes),
        to.file_name().unwrap_or_default().display()
    );
    Ok(bytes)
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bundle_is_written_over() {
        let folder = std::env::temp_dir().join(format!("ep-bundle-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        refuse_what_is_no_bundle(&folder).unwrap();
        fs::create_dir(&folder).unwrap();
        refuse_what_is_no_bundle(&folder).unwrap();
        fs::write(folder.join("kept"), "").unwrap();
        refuse_what_is_no_bundle(&folder).unwrap_err();
        refuse_what_is_no_bundle(&folder.join("kept")).unwrap_err();
        fs::write(folder.join(SCRIPT), "").unwrap();
        refuse_what_is_no_bundle(&folder).unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }
}
