//! With feature `cuda`: compiles every `cuda/*.cu` with nvcc and links it. Without: nothing.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

mod toolkit;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=toolkit.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=include");
    for variable in ["NVCC", "CUDA_HOME", "EP_CUDA_ARCHS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if let Err(message) = compile_kernels() {
        println!("cargo::error={message}");
    }
}

fn compile_kernels() -> Result<(), String> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR").map_err(|e| e.to_string())?);
    let out_dir = PathBuf::from(env::var("OUT_DIR").map_err(|e| e.to_string())?);
    let list = env::var("EP_CUDA_ARCHS").unwrap_or_else(|_| toolkit::DEFAULT_ARCHS.into());
    let archs = toolkit::parse_archs(&list).map_err(|error| format!("EP_CUDA_ARCHS: {error}"))?;
    let toolkit = toolkit::find(&fetched_toolkit(&out_dir))?.ok_or(
        "no nvcc of CUDA 12.8 or newer in NVCC, CUDA_HOME, PATH or /usr/local/cuda; \
         run `cargo xtask build-kernels` once, which fetches one, or set CUDA_HOME",
    )?;

    for source in toolkit::sources(&package)? {
        compile(&source, &package, &toolkit, &archs)?;
    }
    link_runtime(&toolkit);
    Ok(())
}

/// `cargo xtask` fetches into `<target>/cuda-toolkit`, and `OUT_DIR` lies somewhere below `<target>`.
fn fetched_toolkit(out_dir: &Path) -> PathBuf {
    out_dir
        .ancestors()
        .map(|folder| folder.join("cuda-toolkit"))
        .find(|folder| folder.is_dir())
        .unwrap_or_default()
}

/// One source, one `cc::Build`, one archive: with two sources in a build cc asks for relocatable
/// device code, which is slower.
fn compile(
    source: &Path,
    package: &Path,
    toolkit: &toolkit::Toolkit,
    archs: &[&str],
) -> Result<(), String> {
    let name = source.file_stem().unwrap_or_default().to_string_lossy();
    let mut build = cc::Build::new();
    build
        .cuda(true)
        // Linked below: cc knows only the lay-out of installed toolkits, not that of the wheels.
        .cudart("none")
        // Debug information would mean `-G`, unoptimised device code, in the dev profile.
        .debug(false)
        .opt_level(3)
        .warnings(false)
        .env("PATH", search_path(toolkit))
        .includes(toolkit::includes(package))
        .file(source);
    for flag in toolkit::FLAGS {
        build.flag(flag);
    }
    for arch in archs {
        build.flags(toolkit::gencode(arch));
    }
    build
        .try_compile(&format!("ep_cuda_{name}"))
        .map_err(|error| format!("{} does not compile: {error}", source.display()))
}

/// cc starts `nvcc` by name; this makes it the one that was found.
fn search_path(toolkit: &toolkit::Toolkit) -> OsString {
    let programs = toolkit.nvcc.parent().map(Path::to_owned);
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths(programs.into_iter().chain(env::split_paths(&path))).unwrap_or(path)
}

/// The runtime is linked statically, so that the result starts on a machine without CUDA and says
/// there what is missing.
fn link_runtime(toolkit: &toolkit::Toolkit) {
    let nvcc = toolkit
        .nvcc
        .canonicalize()
        .unwrap_or_else(|_| toolkit.nvcc.clone());
    let root = nvcc.ancestors().nth(2).unwrap_or(&nvcc);
    let folder = [
        "lib64",
        "lib",
        "targets/x86_64-linux/lib",
        "targets/sbsa-linux/lib",
    ]
    .map(|folder| root.join(folder))
    .into_iter()
    .find(|folder| folder.join("libcudart_static.a").is_file());
    match folder {
        Some(folder) => {
            println!("cargo::rustc-link-search=native={}", folder.display());
            println!("cargo::rustc-link-lib=static=cudart_static");
        }
        // Packaged by a distribution: among the system's libraries, where only the linker looks.
        None => println!("cargo::rustc-link-lib=cudart_static"),
    }
    for library in ["rt", "pthread", "dl"] {
        println!("cargo::rustc-link-lib={library}");
    }
}
