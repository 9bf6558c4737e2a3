//! Prints Rust bindings of a C header; `cargo xtask codegen` runs it.
//!
//! A program of its own, so that nothing else waits for bindgen to compile.

#![forbid(unsafe_code)]

use std::env;
use std::error::Error;

use bindgen::callbacks::{IntKind, ParseCallbacks};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let header = args.next().ok_or("usage: bindings HEADER [CLANG ARGS]")?;
    let bindings = bindgen::Builder::default()
        .header(header)
        .clang_args(["-x", "c", "-std=c99"])
        .clang_args(args)
        .allowlist_item("(ep|EP)_.*")
        .parse_callbacks(Box::new(LaunchStatus))
        .disable_header_comment()
        .generate_comments(false)
        .derive_default(true)
        .layout_tests(true)
        .merge_extern_blocks(true)
        .rust_target(bindgen::RustTarget::stable(85, 0).map_err(|error| error.to_string())?)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .use_core()
        .formatter(bindgen::Formatter::None)
        .generate()?;
    print!("{bindings}");
    Ok(())
}

/// Launchers return `int32_t`, so the constants they are compared with are `i32`.
#[derive(Debug)]
struct LaunchStatus;

impl ParseCallbacks for LaunchStatus {
    fn int_macro(&self, name: &str, _value: i64) -> Option<IntKind> {
        name.starts_with("EP_LAUNCH_").then_some(IntKind::I32)
    }
}
