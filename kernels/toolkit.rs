//! Which CUDA toolkit compiles the kernels, and with which flags.
//!
//! Shared by `build.rs` and `cargo xtask build-kernels`, so that what is linked is what was checked
//! for spills. Standard library only.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compute capabilities compiled for when `EP_CUDA_ARCHS` does not say: Hopper and Blackwell.
pub(crate) const DEFAULT_ARCHS: &str = "90a,100a";

/// Flags of every kernel. nvcc gets the language standard itself: given to the host compiler alone
/// it breaks the parse. Line information makes objects three times as large and compresses well; the
/// driver unpacks it once, when kernels are loaded.
pub(crate) const FLAGS: [&str; 4] = ["-std=c++20", "-O3", "-lineinfo", "-Xfatbin=-compress-all"];

/// The first release that compiles for sm_100a.
const OLDEST: (u32, u32) = (12, 8);

/// An nvcc that runs.
#[derive(Debug)]
pub(crate) struct Toolkit {
    pub(crate) nvcc: PathBuf,
    release: (u32, u32),
    found_by: &'static str,
}

impl std::fmt::Display for Toolkit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (major, minor) = self.release;
        write!(
            f,
            "nvcc {major}.{minor} from {}: {}",
            self.found_by,
            self.nvcc.display()
        )
    }
}

/// Looks for a toolkit in `NVCC`, `CUDA_HOME`, `PATH`, `/usr/local/cuda` and last in `fetched`, the
/// folder that `cargo xtask` fills. `Ok(None)`: nowhere.
///
/// The two variables are orders: one that cannot be followed is an error. The other places are
/// suggestions, and a toolkit that is too old there is passed over.
pub(crate) fn find(fetched: &Path) -> Result<Option<Toolkit>, String> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return ordered("NVCC", nvcc.into()).map(Some);
    }
    if let Some(home) = env::var_os("CUDA_HOME") {
        return ordered("CUDA_HOME", Path::new(&home).join("bin/nvcc")).map(Some);
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let suggestions = env::split_paths(&path)
        .map(|folder| ("PATH", folder.join("nvcc")))
        .chain([
            ("/usr/local/cuda", "/usr/local/cuda/bin/nvcc".into()),
            ("the fetched wheels", fetched.join("nvidia/cu13/bin/nvcc")),
        ]);
    for (found_by, nvcc) in suggestions {
        match release(&nvcc) {
            Some(release) if release >= OLDEST => {
                return Ok(Some(Toolkit {
                    nvcc,
                    release,
                    found_by,
                }));
            }
            _ => {}
        }
    }
    Ok(None)
}

fn ordered(variable: &'static str, nvcc: PathBuf) -> Result<Toolkit, String> {
    let (major, minor) = OLDEST;
    match release(&nvcc) {
        Some(release) if release >= OLDEST => Ok(Toolkit {
            nvcc,
            release,
            found_by: variable,
        }),
        Some((found, found_minor)) => Err(format!(
            "{variable} names {}, which is CUDA {found}.{found_minor}; {major}.{minor} or newer is \
             needed. Name another, or unset {variable}",
            nvcc.display()
        )),
        None => Err(format!(
            "{variable} names {}, which does not run. Correct {variable}, or unset it",
            nvcc.display()
        )),
    }
}

fn release(nvcc: &Path) -> Option<(u32, u32)> {
    let output = Command::new(nvcc).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (_, rest) = text.split_once(", release ")?;
    let (release, _) = rest.split_once(',')?;
    let (major, minor) = release.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// `"90a,100a"` to its parts.
pub(crate) fn parse_archs(list: &str) -> Result<Vec<&str>, String> {
    let archs: Vec<_> = list.split(',').map(str::trim).collect();
    for arch in &archs {
        let digits = arch.trim_end_matches(['a', 'f']);
        if arch.len() > digits.len() + 1 || digits.parse::<u32>().is_err() {
            return Err(format!(
                "{arch:?} is no compute capability; give a list like {DEFAULT_ARCHS}"
            ));
        }
    }
    Ok(archs)
}

/// nvcc's arguments to generate machine code for one compute capability.
pub(crate) fn gencode(arch: &str) -> [String; 2] {
    [
        "-gencode".into(),
        format!("arch=compute_{arch},code=sm_{arch}"),
    ]
}

/// Every kernel source of the package at `package`, in a stable order. Each is its own translation
/// unit.
pub(crate) fn sources(package: &Path) -> Result<Vec<PathBuf>, String> {
    let folder = package.join("cuda");
    let listing = folder
        .read_dir()
        .map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut sources: Vec<_> = listing
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    Ok(sources)
}

/// Where the sources' `#include`s are looked up.
pub(crate) fn includes(package: &Path) -> [PathBuf; 2] {
    [package.join("include"), package.join("cuda")]
}
