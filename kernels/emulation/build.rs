//! Compiles the CUDA kernels as C++: with this package's headers where they have CUDA's, and its
//! `arch` where they have PTX.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

const KERNELS: [&str; 3] = ["barrier", "combine", "dispatch"];

fn main() -> Result<(), Box<dyn Error>> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let kernels = package.join("..");
    for watched in ["src", "include", "arch", "../cuda", "../include"] {
        println!("cargo::rerun-if-changed={watched}");
    }

    // Quoted includes look beside the file first, so the files lie beside this `arch`.
    let copies = PathBuf::from(env::var("OUT_DIR")?).join("cuda");
    copy_files(&kernels.join("cuda"), &copies)?;
    copy_files(&kernels.join("cuda/dispatch"), &copies.join("dispatch"))?;
    copy_files(&package.join("arch"), &copies.join("arch"))?;

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .includes([
            package.join("include"),
            package.join("src"),
            kernels.join("include"),
            copies.clone(),
        ])
        .flags([
            "-x",
            "c++",
            "-fno-strict-aliasing",
            "-ffp-contract=off",
            "-U_FORTIFY_SOURCE",
        ])
        .flags(["-Wno-unknown-pragmas", "-Wno-unused-parameter"])
        .file(package.join("src/emulator.cc"));
    // Names of its own: the kernels for GPUs may be linked, too.
    build.define("ep", "ep_emulated");
    for kernel in KERNELS {
        let name = format!("ep_{kernel}_launch");
        build.define(&name, format!("ep_emulated_{kernel}_launch").as_str());
        build.file(copies.join(format!("{kernel}.cu")));
    }
    build.try_compile("ep_emulation")?;
    Ok(())
}

fn copy_files(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
