//! `codegen`: the committed bindings of the kernels' header.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use xshell::cmd;

use crate::repo::{Options, Repo, Result};
use crate::wheels;

const BANNER: &str = r#"//! Generated from `include/ep_kernels.h` by `cargo xtask codegen`; do not edit.

#![allow(
    clippy::allow_attributes_without_reason,
    unsafe_code,
    reason = "what bindgen writes; the functions are unsafe to call"
)]"#;

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    let mut options = Options::new(args);
    let check = options.flag("--check");
    options.finish()?;

    let committed = repo.kernels().join("src/bindings.rs");
    let generated = generate(repo)?;
    if fs::read_to_string(&committed).is_ok_and(|text| text == generated) {
        println!("{} is up to date", committed.display());
        return Ok(());
    }
    if check {
        let fresh = repo.target.join("bindings.rs");
        fs::write(&fresh, generated)?;
        // Shows the difference; `diff` reports it with its status, which says nothing new.
        let _ = cmd!(repo.sh, "diff -u {committed} {fresh}")
            .quiet()
            .ignore_status()
            .run();
        return Err("bindings.rs and ep_kernels.h differ; run `cargo xtask codegen`".into());
    }
    fs::write(&committed, generated)?;
    println!("{} is written", committed.display());
    Ok(())
}

fn generate(repo: &Repo) -> Result<String> {
    let sh = &repo.sh;
    let header = repo.kernels().join("include/ep_kernels.h");
    let libclang = libclang(repo)?;
    // The wheel of libclang has no headers of its own; those of the system's compiler do.
    let builtin = cmd!(sh, "cc -print-file-name=include").quiet().read()?;
    let bindings = cmd!(
        sh,
        "cargo run --quiet --package xtask --features bindgen --bin bindings --"
    )
    .args([header.as_os_str(), "-isystem".as_ref(), builtin.as_ref()])
    .env("LIBCLANG_PATH", libclang)
    .read()?;
    // The launchers exist where the CUDA kernels are linked.
    let bindings = bindings.replace("unsafe extern", "#[cfg(feature = \"cuda\")] unsafe extern");
    let formatted = cmd!(sh, "rustfmt --edition 2024 --emit stdout")
        .stdin(bindings)
        .quiet()
        .read()?;
    Ok(format!("{BANNER}\n\n{formatted}\n"))
}

/// The folder of libclang: the one that `LIBCLANG_PATH` orders, the system's, or a fetched one.
fn libclang(repo: &Repo) -> Result<PathBuf> {
    if let Some(ordered) = env::var_os("LIBCLANG_PATH") {
        return Ok(ordered.into());
    }
    if let Ok(system) = cmd!(repo.sh, "llvm-config --libdir")
        .quiet()
        .ignore_stderr()
        .read()
        && Path::new(&system).join("libclang.so").exists()
    {
        return Ok(system.into());
    }
    let fetched = repo.target.join("libclang");
    wheels::fetch(&repo.sh, &wheels::LIBCLANG, &fetched)?;
    Ok(fetched.join("clang/native"))
}
