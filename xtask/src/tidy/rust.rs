//! Where `unsafe`, panics, the environment and threads may appear.

use super::lexer::{Keep, blank, braces, words};
use super::{File, Problem};

/// The compiler denies unsafe code wherever no attribute allows it; this says where one may.
///
/// The trait of the kernels' contract, its implementations, its bindings and its tests have or call
/// unsafe functions. cudarc's cuBLAS is unsafe to call, and a borrowed stream to make.
const UNSAFE: [&str; 15] = [
    "crates/ep-cli/src/perf/graph.rs",
    "crates/ep-cli/src/run/cublas.rs",
    "crates/ep-sim/src/memory.rs",
    "crates/ep-sys/src/cuda/",
    "crates/ep-sys/src/nvml/",
    "crates/ep/src/launch.rs",
    "crates/ep/tests/gpu.rs",
    "crates/ep/tests/launches.rs",
    "kernels/emulation/src/lib.rs",
    "kernels/src/bindings.rs",
    "kernels/src/cuda.rs",
    "kernels/src/host/memory.rs",
    "kernels/src/host/mod.rs",
    "kernels/src/lib.rs",
    "kernels/tests/",
];

/// What a user links. Bad input and failing drivers are errors there.
const LIBRARIES: [&str; 6] = [
    "crates/ep-alloc/src/",
    "crates/ep-peers/src/",
    "crates/ep-sim/src/",
    "crates/ep-sys/src/",
    "crates/ep/src/",
    "kernels/src/",
];

/// Libraries below the facade: what they do depends on their arguments alone.
const BELOW: [&str; 4] = [
    "crates/ep-alloc/src/",
    "crates/ep-peers/src/",
    "crates/ep-sys/src/",
    "kernels/src/",
];

const PANICS: [&str; 8] = [
    ".unwrap()",
    ".unwrap_err()",
    ".expect(",
    "::unwrap)",
    "::expect)",
    "panic!",
    "unreachable!",
    "todo!",
];
const ENVIRONMENT: [&str; 2] = ["std::env", "env::"];
const THREADS: [&str; 4] = [
    "thread::spawn",
    "thread::scope",
    "thread::Builder",
    "thread::{",
];

pub(super) fn check(files: &[File]) -> Vec<Problem> {
    let rust = || files.iter().filter(|file| file.path.ends_with(".rs"));
    let test_modules: Vec<_> = rust().flat_map(test_modules).collect();
    let is_test = |path: &str| test_modules.iter().any(|module| path.starts_with(module));

    let mut problems = Vec::new();
    for file in rust() {
        let code = blank(&file.text, Keep::Code);
        problems.extend(check_unsafe(file, &code));
        problems.extend(check_multicast(file));
        if !is_test(&file.path) {
            problems.extend(check_calls(file, &without_tests(&code)));
        }
    }
    problems
}

fn check_unsafe(file: &File, code: &str) -> Vec<Problem> {
    if UNSAFE.iter().any(|place| file.path.starts_with(place)) {
        return Vec::new();
    }
    words(code)
        .filter(|(_, word)| *word == "unsafe")
        .map(|(offset, _)| Problem::at(file, offset, "unsafe code is not for this file"))
        .collect()
}

fn check_calls(file: &File, code: &str) -> Vec<Problem> {
    let rules: [(&[&str], &[&str], _); 3] = [
        (&LIBRARIES, &PANICS, "libraries return errors"),
        (&BELOW, &ENVIRONMENT, "the environment is read in `ep`"),
        (&BELOW, &THREADS, "threads are the caller's"),
    ];
    let mut problems = Vec::new();
    for (places, calls, rule) in rules {
        if !places.iter().any(|place| file.path.starts_with(place)) {
            continue;
        }
        for call in calls {
            for (at, call) in code.match_indices(call) {
                problems.push(Problem::at(file, at, format!("{call}: {rule}")));
            }
        }
    }
    problems
}

/// Multicast objects outlive a process that dies badly and can put a host's GPUs out of service.
fn check_multicast(file: &File) -> Vec<Problem> {
    let shipped = ["crates/", "kernels/", "benches/"]
        .iter()
        .any(|top| file.path.starts_with(top));
    let found = file.text.find("cuMulticastCreate").filter(|_| shipped);
    found
        .map(|at| Problem::at(file, at, "NVLink multicast stays unused"))
        .into_iter()
        .collect()
}

/// Items that stand behind `#[cfg(test)]`: where each begins, and its text.
fn test_items(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.match_indices("#[cfg(test)]").filter_map(|(start, _)| {
        let end = code[start..].find(['{', ';'])? + start;
        let length = if code[end..].starts_with('{') {
            braces(&code[end..])?
        } else {
            1
        };
        Some((start, &code[start..end + length]))
    })
}

fn without_tests(code: &str) -> String {
    let mut kept = code.as_bytes().to_vec();
    for (start, item) in test_items(code) {
        for byte in &mut kept[start..start + item.len()] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    }
    // Whole items were replaced, so no character was cut in two.
    String::from_utf8_lossy(&kept).into_owned()
}

/// Path prefixes of modules that are compiled for tests only: `#[cfg(test)] mod name;`.
fn test_modules(file: &File) -> Vec<String> {
    let (folder, name) = file.path.rsplit_once('/').unwrap_or_default();
    let folder = match name {
        "lib.rs" | "main.rs" | "mod.rs" => folder.to_owned(),
        name => format!("{folder}/{}", name.trim_end_matches(".rs")),
    };
    let code = blank(&file.text, Keep::Code);
    let mut modules = Vec::new();
    for (_, item) in test_items(&code) {
        if let Some((_, module)) = item.trim_end_matches(';').rsplit_once("mod ") {
            let module = module.trim();
            modules.extend([
                format!("{folder}/{module}.rs"),
                format!("{folder}/{module}/"),
            ]);
        }
    }
    modules
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    fn rules(path: &str, text: &str) -> Vec<String> {
        check(&[file(path, text)])
            .into_iter()
            .map(|problem| problem.to_string())
            .collect()
    }

    #[test]
    fn unsafe_has_its_files() {
        // SAFETY: a text to be checked, not code.
        let text = "fn f() {\n    unsafe { g() }\n}\n";
        assert_eq!(rules("crates/ep-sys/src/cuda/table.rs", text), [""; 0]);
        assert_eq!(
            rules("crates/ep-alloc/src/lib.rs", text),
            ["crates/ep-alloc/src/lib.rs:2: unsafe code is not for this file"]
        );
        let text = "// unsafe\n#![forbid(unsafe_code)]\nconst A: &str = \"unsafe\";\n";
        assert_eq!(rules("crates/ep-alloc/src/lib.rs", text), [""; 0]);
    }

    #[test]
    fn the_environment_and_threads_belong_above() {
        let text = "fn f() {\n    std::env::var_os(\"X\");\n    std::thread::spawn(g);\n}\n";
        assert_eq!(
            rules("crates/ep-peers/src/lib.rs", text),
            [
                "crates/ep-peers/src/lib.rs:2: std::env: the environment is read in `ep`",
                "crates/ep-peers/src/lib.rs:2: env::: the environment is read in `ep`",
                "crates/ep-peers/src/lib.rs:3: thread::spawn: threads are the caller's",
            ]
        );
        for way in [
            "use std::env;",
            "use std::{env::var, fs};",
            "use std::thread::spawn;",
            "use std::thread::{self, spawn};",
        ] {
            assert!(
                !rules("crates/ep-alloc/src/lib.rs", way).is_empty(),
                "{way}"
            );
        }
        assert_eq!(rules("crates/ep/src/lib.rs", text), [""; 0]);
        assert_eq!(rules("crates/ep-peers/tests/a.rs", text), [""; 0]);
    }

    #[test]
    fn libraries_do_not_panic() {
        let text = "/// a.unwrap()\nfn f() {\n    a.unwrap_or(0);\n    b.unwrap();\n}\n";
        assert_eq!(
            rules("crates/ep/src/buffer.rs", text),
            ["crates/ep/src/buffer.rs:4: .unwrap(): libraries return errors"]
        );
        assert_eq!(rules("crates/ep-cli/src/main.rs", text), [""; 0]);
        let text = "fn f() { a.map(Option::unwrap); }\n";
        assert_eq!(rules("crates/ep/src/buffer.rs", text).len(), 1);
    }

    #[test]
    fn tests_may_do_what_libraries_may_not() {
        let text =
            "#[cfg(test)]\nmod tests {\n    fn f() { a.unwrap() }\n}\nfn g() { b.unwrap() }\n";
        assert_eq!(
            rules("crates/ep/src/lib.rs", text),
            ["crates/ep/src/lib.rs:5: .unwrap(): libraries return errors"]
        );
        let library = file("crates/ep/src/a.rs", "#[cfg(test)]\nmod fake;\nmod real;\n");
        let fake = file("crates/ep/src/a/fake.rs", "fn f() { a.unwrap() }\n");
        let real = file("crates/ep/src/a/real.rs", "fn f() { a.unwrap() }\n");
        let places: Vec<_> = check(&[library, fake, real])
            .into_iter()
            .map(|problem| problem.place)
            .collect();
        assert_eq!(places, ["crates/ep/src/a/real.rs:1"]);
    }

    #[test]
    fn multicast_is_found_in_strings_too() {
        let text = "const NAME: &str = \"cuMulticastCreate\";\n";
        assert_eq!(rules("crates/ep-sys/src/cuda/table.rs", text).len(), 1);
        assert_eq!(rules("xtask/src/tidy/rust.rs", text), [""; 0]);
    }
}
