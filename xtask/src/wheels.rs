//! Tools from PyPI wheels, for machines that have not installed them: pinned, fetched once.

use std::fs;
use std::path::Path;

use xshell::{Shell, cmd};

use crate::repo::Result;

/// What one tool consists of.
pub(crate) struct Wheels {
    name: &'static str,
    requirements: &'static [&'static str],
    /// What helps when there is no pip.
    instead: &'static str,
}

/// nvcc with what it needs to compile and link: no driver, no libraries but the runtime.
pub(crate) const CUDA: Wheels = Wheels {
    name: "nvcc",
    requirements: &[
        "nvidia-cuda-nvcc==13.0.88",
        "nvidia-nvvm==13.0.88",
        "nvidia-cuda-crt==13.0.88",
        "nvidia-cuda-runtime==13.0.96",
        "nvidia-cuda-cccl==13.0.85",
    ],
    instead: "install CUDA 12.8 or newer and set CUDA_HOME",
};

/// libclang, which bindgen opens.
pub(crate) const LIBCLANG: Wheels = Wheels {
    name: "libclang",
    requirements: &["libclang==18.1.1"],
    instead: "install libclang and set LIBCLANG_PATH to its folder",
};

/// For `kernels/cuda` and the header.
pub(crate) const CLANG_FORMAT: Wheels = Wheels {
    name: "clang-format",
    requirements: &["clang-format==18.1.8"],
    instead: "format the CUDA sources by hand; the CI checks it",
};

/// Makes `folder` hold the wheels, unless it does already. It appears whole or not at all.
pub(crate) fn fetch(sh: &Shell, wheels: &Wheels, folder: &Path) -> Result<()> {
    let Wheels {
        name,
        requirements,
        instead,
    } = *wheels;
    let pinned = requirements.join("\n");
    let stamp = "requirements.txt";
    if fs::read_to_string(folder.join(stamp)).is_ok_and(|found| found == pinned) {
        return Ok(());
    }
    if cmd!(sh, "python3 -m pip --version")
        .quiet()
        .ignore_stdout()
        .ignore_stderr()
        .run()
        .is_err()
    {
        return Err(format!(
            "{name} is fetched with `python3 -m pip`, which does not run here; install pip \
             (Debian: apt-get install python3-pip), or {instead}"
        )
        .into());
    }

    eprintln!("fetching {name} into {}", folder.display());
    let partial = folder.with_extension(format!("partial-{}", std::process::id()));
    cmd!(
        sh,
        "python3 -m pip install --quiet --disable-pip-version-check --no-input"
    )
    .args([
        "--no-deps",
        "--only-binary=:all:",
        "--no-compile",
        "--target",
    ])
    .arg(&partial)
    .args(requirements)
    .env("PIP_ROOT_USER_ACTION", "ignore")
    .run()
    .map_err(|error| format!("{error}; with no access to PyPI, {instead}"))?;
    fs::write(partial.join(stamp), pinned)?;
    sh.remove_path(folder)?;
    fs::rename(&partial, folder)?;
    Ok(())
}
