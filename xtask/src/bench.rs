//! `bench`: criterion benchmarks, with the GPU groups where a GPU is; with `--plot`, a figure of
//! times that were measured.

mod figure;
mod lines;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use xshell::cmd;

use self::lines::{Measured, Shape};
use crate::repo::{Repo, Result};

pub(crate) fn run(repo: &Repo, args: &[String]) -> Result<()> {
    if args.iter().any(|arg| arg == "--plot") {
        return plot(repo, &Plot::new(args)?);
    }
    let features = repo.features()?;
    let sh = &repo.sh;
    cmd!(
        sh,
        "cargo bench --package ep-benches {features...} {args...}"
    )
    .run()?;
    Ok(())
}

/// What is to be plotted, and where to.
#[derive(Debug, PartialEq, Eq)]
struct Plot<'a> {
    /// None: standard input.
    files: Vec<&'a str>,
    out: Option<&'a str>,
}

impl<'a> Plot<'a> {
    fn new(args: &'a [String]) -> Result<Self> {
        let (mut files, mut out) = (Vec::new(), None);
        let mut args = args.iter().map(String::as_str);
        while let Some(arg) = args.next() {
            match arg {
                "--plot" => {}
                "--out" => out = Some(args.next().ok_or("--out needs a value")?),
                _ if arg.starts_with('-') => {
                    return Err(format!("unknown argument {arg:?}; see `cargo xtask help`").into());
                }
                file => files.push(file),
            }
        }
        Ok(Self { files, out })
    }
}

/// Draws a figure of each shape that was measured.
fn plot(repo: &Repo, plot: &Plot<'_>) -> Result<()> {
    let mut measured = Vec::new();
    for &file in &plot.files {
        let text = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
        measured.extend(lines::read(file, &text)?);
    }
    if plot.files.is_empty() && !io::stdin().is_terminal() {
        measured = lines::read("standard input", &io::read_to_string(io::stdin())?)?;
    }
    if measured.is_empty() {
        return Err(
            "there is nothing to plot; give files of what `ep perf` printed, or pipe it".into(),
        );
    }
    let shapes = by_shape(measured)?;
    let out = match plot.out {
        Some(out) => PathBuf::from(out),
        None => repo.root.join("docs/figures/latency.svg"),
    };
    if let Some(folder) = out.parent() {
        fs::create_dir_all(folder)?;
    }
    let names = names(&out, &shapes.keys().collect::<Vec<_>>());
    for ((shape, measured), name) in shapes.iter().zip(names) {
        fs::write(&name, figure::draw(shape, measured))
            .map_err(|error| format!("{}: {error}", name.display()))?;
        println!("{}: {shape}", name.display());
    }
    Ok(())
}

/// Only times of one shape can be compared. Of a library there is one time for each number of tokens.
fn by_shape(measured: Vec<Measured>) -> Result<BTreeMap<Shape, Vec<Measured>>> {
    let mut shapes = BTreeMap::<Shape, Vec<Measured>>::new();
    for measured in measured {
        let shape = shapes.entry(measured.shape.clone()).or_default();
        let same =
            |other: &&Measured| (&other.lib, other.tokens) == (&measured.lib, measured.tokens);
        if let Some(other) = shape.iter().find(same) {
            let (Measured { lib, tokens, .. }, place) = (&measured, &measured.place);
            let first = &other.place;
            return Err(format!(
                "{place}: {lib} at {tokens} tokens is already on {first}; leave one of them out"
            )
            .into());
        }
        shape.push(measured);
    }
    Ok(shapes)
}

/// One shape's figure is `out`; of several each has in its name what the others have differently.
fn names(out: &Path, shapes: &[&Shape]) -> Vec<PathBuf> {
    let words: Vec<_> = shapes.iter().map(|shape| shape.words()).collect();
    let stem = out.file_stem().unwrap_or_default().to_string_lossy();
    words
        .iter()
        .map(|own| {
            let mut name = stem.to_string();
            for (at, word) in own.iter().enumerate() {
                if words.iter().any(|other| other[at] != *word) {
                    name = format!("{name}-{word}");
                }
            }
            out.with_file_name(name + ".svg")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::lines::tests::{PEER, US};
    use super::*;

    fn strings(args: &str) -> Vec<String> {
        args.split_whitespace().map(String::from).collect()
    }

    #[test]
    fn files_and_the_figure_are_named_in_any_order() {
        let args = strings("a.jsonl --plot --out b.svg c.jsonl");
        let expected = Plot {
            files: vec!["a.jsonl", "c.jsonl"],
            out: Some("b.svg"),
        };
        assert_eq!(Plot::new(&args).unwrap(), expected);
        for (args, reason) in [("--plot --out", "--out"), ("--plot --log x", "--log")] {
            let error = Plot::new(&strings(args)).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_figure_of_one_shape_has_the_name_that_was_asked_for() {
        let measured = lines::read("a", &format!("{US}\n{PEER}\n")).unwrap();
        let shapes = by_shape(measured).unwrap();
        let shapes: Vec<_> = shapes.keys().collect();
        assert_eq!(
            names(Path::new("docs/latency.svg"), &shapes),
            [Path::new("docs/latency.svg")]
        );
    }

    #[test]
    fn figures_of_several_shapes_have_the_difference_in_their_names() {
        let graph = US.replace(r#""graph":false"#, r#""graph":true"#);
        let wide = PEER.replace(r#""ranks": 4"#, r#""ranks": 8"#);
        let measured = lines::read("a", &format!("{US}\n{graph}\n{wide}\n{PEER}")).unwrap();
        let shapes = by_shape(measured).unwrap();
        assert_eq!(shapes.values().map(Vec::len).collect::<Vec<_>>(), [2, 1, 1]);
        let shapes: Vec<_> = shapes.keys().collect();
        assert_eq!(
            names(Path::new("latency.svg"), &shapes),
            [
                "latency-4ranks-stream.svg",
                "latency-4ranks-graph.svg",
                "latency-8ranks-stream.svg"
            ]
            .map(Path::new)
        );
    }

    #[test]
    fn a_time_that_is_there_twice_is_refused() {
        let mut measured = lines::read("a", &format!("\n{US}\n")).unwrap();
        measured.extend(lines::read("b", US).unwrap());
        let error = by_shape(measured).unwrap_err().to_string();
        assert!(
            error.starts_with("b:1: ep at 8 tokens is already on a:2"),
            "{error}"
        );
    }
}
