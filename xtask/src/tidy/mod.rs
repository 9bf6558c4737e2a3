//! `tidy`: the repository's rules that no other tool checks.

mod cuda;
mod graph;
mod hygiene;
mod lexer;
mod licences;
mod rust;

use std::fmt;
use std::fs;
use std::io;

use serde_json::Value;
use xshell::cmd;

use crate::repo::{Options, Repo, Result};

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    Options::new(args).finish()?;
    let files = files(repo)?;
    let metadata = metadata(repo)?;

    let mut problems = graph::check(&metadata);
    problems.extend(licences::check(&metadata));
    problems.extend(rust::check(&files));
    problems.extend(cuda::check_launchers(&files));
    for file in &files {
        problems.extend(hygiene::check(file));
        problems.extend(cuda::check(file));
    }

    for problem in &problems {
        eprintln!("{problem}");
    }
    match problems.len() {
        0 => {
            println!("{} files are tidy", files.len());
            Ok(())
        }
        count => Err(format!("{count} broken rules").into()),
    }
}

/// A file of the repository.
struct File {
    /// From the root, with `/`.
    path: String,
    text: String,
}

/// A rule that is broken, and where.
#[derive(Debug, PartialEq, Eq)]
struct Problem {
    place: String,
    rule: String,
}

impl Problem {
    /// `offset` is in bytes.
    fn at(file: &File, offset: usize, rule: impl Into<String>) -> Self {
        let line = 1 + file.text[..offset].matches('\n').count();
        Self {
            place: format!("{}:{line}", file.path),
            rule: rule.into(),
        }
    }

    fn of(place: impl Into<String>, rule: impl Into<String>) -> Self {
        Self {
            place: place.into(),
            rule: rule.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.rule)
    }
}

/// Inputs for parsers: what is wrong with them is their purpose.
const CORPORA: &str = "fuzz/corpus/";

/// All text files that git knows or would add, and that somebody writes for others to read.
fn files(repo: &Repo) -> Result<Vec<File>> {
    let list = cmd!(repo.sh, "git ls-files --cached --others --exclude-standard")
        .quiet()
        .read()?;
    let mut files = Vec::new();
    for path in list.lines().filter(|path| !path.starts_with(CORPORA)) {
        match fs::read_to_string(repo.root.join(path)) {
            Ok(text) => files.push(File {
                path: path.into(),
                text,
            }),
            // A deleted file is listed until the deletion is committed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // No rule could look at it.
            Err(error) => return Err(format!("{path}: {error}").into()),
        }
    }
    Ok(files)
}

/// Every package that this platform builds, with all features.
fn metadata(repo: &Repo) -> Result<Value> {
    let sh = &repo.sh;
    let version = cmd!(sh, "rustc -vV").quiet().read()?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.ok_or("rustc -vV names no host")?;
    let json = cmd!(
        sh,
        "cargo metadata --format-version 1 --all-features --filter-platform {host}"
    );
    Ok(serde_json::from_str(&json.quiet().read()?)?)
}

#[cfg(test)]
fn file(path: &str, text: &str) -> File {
    File {
        path: path.into(),
        text: text.into(),
    }
}
