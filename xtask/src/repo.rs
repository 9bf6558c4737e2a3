//! The repository, the machine, and arguments: what the commands share.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use xshell::{Shell, cmd};

use crate::{toolkit, wheels};

pub(crate) type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// The checkout that the command works on. The shell's working directory is its root.
pub(crate) struct Repo {
    pub(crate) sh: Shell,
    pub(crate) root: PathBuf,
    /// Cargo's target folder.
    pub(crate) target: PathBuf,
    /// `cargo metadata` of the workspace's own packages.
    pub(crate) metadata: Value,
}

impl Repo {
    pub(crate) fn open() -> Result<Self> {
        let xtask = env::var_os("CARGO_MANIFEST_DIR").ok_or("start it as `cargo xtask`")?;
        let root = Path::new(&xtask)
            .parent()
            .ok_or("xtask has no parent folder")?
            .to_owned();
        let sh = Shell::new()?;
        sh.change_dir(&root);
        let metadata = cmd!(sh, "cargo metadata --format-version 1 --no-deps")
            .quiet()
            .read()?;
        let metadata: Value = serde_json::from_str(&metadata)?;
        let target = text(&metadata, "target_directory")?.into();
        Ok(Self {
            sh,
            root,
            target,
            metadata,
        })
    }

    /// The package of the kernels.
    pub(crate) fn kernels(&self) -> PathBuf {
        self.root.join("kernels")
    }

    /// A toolkit that compiles the kernels, fetched if the machine has none.
    pub(crate) fn toolkit(&self) -> Result<toolkit::Toolkit> {
        let fetched = self.target.join("cuda-toolkit");
        if let Some(toolkit) = toolkit::find(&fetched)? {
            return Ok(toolkit);
        }
        wheels::fetch(&self.sh, &wheels::CUDA, &fetched)?;
        Ok(toolkit::find(&fetched)?.ok_or("the fetched nvcc does not run on this machine")?)
    }

    /// Cargo's arguments for what this host can run: with the CUDA kernels where a GPU is.
    pub(crate) fn features(&self) -> Result<&'static [&'static str]> {
        if !gpu_present() {
            eprintln!("no NVIDIA GPU here: building without the CUDA kernels");
            return Ok(&[]);
        }
        eprintln!(
            "NVIDIA GPU found: building the CUDA kernels with {}",
            self.toolkit()?
        );
        Ok(&["--features", "cuda"])
    }
}

/// Whether this host shows an NVIDIA GPU. It decides only what is built: whether the driver works is
/// found out at run time, and reported there.
pub(crate) fn gpu_present() -> bool {
    let device_node = fs::read_dir("/dev")
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| {
            entry
                .file_name()
                .to_str()
                .and_then(|name| name.strip_prefix("nvidia"))
                .is_some_and(|number| {
                    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
                })
        });
    device_node || {
        let listed = std::process::Command::new("nvidia-smi").arg("-L").output();
        listed.is_ok_and(|output| output.stdout.starts_with(b"GPU "))
    }
}

/// Reads `--NAME VALUE` options and bare `--NAME` flags; anything else is an error.
pub(crate) struct Options<'a> {
    args: &'a [String],
    taken: Vec<bool>,
}

impl<'a> Options<'a> {
    pub(crate) fn new(args: &'a [String]) -> Self {
        Self {
            args,
            taken: vec![false; args.len()],
        }
    }

    pub(crate) fn flag(&mut self, name: &str) -> bool {
        match self.args.iter().position(|arg| arg == name) {
            Some(at) => {
                self.taken[at] = true;
                true
            }
            None => false,
        }
    }

    pub(crate) fn value(&mut self, name: &str) -> Result<Option<&'a str>> {
        let Some(at) = self.args.iter().position(|arg| arg == name) else {
            return Ok(None);
        };
        let value = self
            .args
            .get(at + 1)
            .ok_or_else(|| format!("{name} needs a value"))?;
        self.taken[at..=at + 1].fill(true);
        Ok(Some(value))
    }

    pub(crate) fn finish(self) -> Result<()> {
        match self.args.iter().zip(self.taken).find(|(_, taken)| !taken) {
            Some((arg, _)) => {
                Err(format!("unknown argument {arg:?}; see `cargo xtask help`").into())
            }
            None => Ok(()),
        }
    }
}

/// A string field of a JSON object.
pub(crate) fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    Ok(value[field]
        .as_str()
        .ok_or_else(|| format!("cargo's JSON has no string {field:?}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(args: &[&str]) -> Vec<String> {
        args.iter().map(|&arg| arg.into()).collect()
    }

    #[test]
    fn options_are_read_in_any_order() {
        let args = strings(&["--check", "--arch", "90a"]);
        let mut options = Options::new(&args);
        assert_eq!(options.value("--arch").unwrap(), Some("90a"));
        assert!(options.flag("--check"));
        assert!(!options.flag("--out"));
        options.finish().unwrap();
    }

    #[test]
    fn what_is_not_an_option_is_refused() {
        let args = strings(&["--check", "--chekc"]);
        let mut options = Options::new(&args);
        assert!(options.flag("--check"));
        assert!(
            options
                .finish()
                .unwrap_err()
                .to_string()
                .contains("--chekc")
        );
        let args = strings(&["--arch"]);
        assert!(Options::new(&args).value("--arch").is_err());
    }
}
