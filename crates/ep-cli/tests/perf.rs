//! `ep perf` as a user runs it: real processes on the simulated cluster.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const SMALL: &str = "--backend sim --ranks 2 --hidden 256 --experts 16 --top-k 4 --iters 5";

fn ep(line: &str) -> Output {
    common::ep("perf", line).output().unwrap()
}

fn lines(line: &str) -> Vec<Value> {
    let output = ep(line);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {errors}");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn every_shape_has_its_line() {
    // One shape twice, and more calls than are made between two waits for the stream.
    let lines = lines(&format!("{SMALL} --tokens 1,9,9,0 --iters 1000"));
    let tokens: Vec<&Value> = lines.iter().map(|line| &line["tokens"]).collect();
    assert_eq!(tokens, [1, 9, 9, 0]);
    for line in &lines {
        assert_eq!(
            (&line["lib"], &line["backend"]),
            (&"ep".into(), &"sim".into())
        );
        assert_eq!((&line["ranks"], &line["iters"]), (&2.into(), &1000.into()));
        assert_eq!(
            (&line["fp8"], &line["graph"]),
            (&true.into(), &false.into())
        );
        assert_eq!(line["sms"], 132);
        for (median, p99) in [
            ("dispatch_us", "dispatch_p99_us"),
            ("combine_us", "combine_p99_us"),
        ] {
            let time = |key: &str| line[key].as_f64().unwrap();
            assert!(time(median) > 0.0 && time(p99) >= time(median), "{line}");
        }
        let empty = line["empty_us"].as_f64().unwrap();
        assert!(empty > 0.0 && empty.is_finite(), "{line}");
    }
    // The routing is the same: so are the bytes.
    assert_eq!(lines[1]["combine_floor_us"], lines[2]["combine_floor_us"]);
    assert_eq!(lines[3]["combine_wire_gbs"], 0.0);
}

#[test]
fn every_way_of_dispatching_is_timed() {
    for options in [
        "--dtype bf16 --weights combine --sms 16",
        "--routing one --weights none",
        "--routing zipf --weights combine --warmup 0",
        "--routing hot --ranks 1",
        "--spawn threads",
    ] {
        let lines = lines(&format!("{SMALL} --tokens 8 {options}"));
        assert_eq!(lines.len(), 1, "{options}");
        let capped = options.contains("--sms");
        assert_eq!(lines[0]["sms"], if capped { 16 } else { 132 });
        assert_eq!(lines[0]["fp8"], !options.contains("bf16"), "{options}");
    }
}

#[test]
fn a_rank_that_stops_is_named() {
    let start = Instant::now();
    let mut child = common::ep("perf", &format!("{SMALL} --tokens 8 --iters 1000000"))
        .env("EP_TIMEOUT_MS", "300")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("] 8 tokens") {
        line.clear();
        assert_ne!(errors.read_line(&mut line).unwrap(), 0, "it ended");
    }
    let ranks = common::children(child.id());
    let stopped = Command::new("kill")
        .args(["-STOP", &ranks[1].to_string()])
        .status();
    assert!(stopped.unwrap().success());
    line.clear();
    errors.read_to_string(&mut line).unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(
        line.contains("error: rank 0: operations reported: ") && line.contains("rank 1"),
        "{line}"
    );
    // The stopped rank has said nothing within the grace, and was ended.
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn what_cannot_be_measured_is_refused() {
    for (options, reason) in [
        ("--hidden 200", "--hidden is 200"),
        ("--graph", "only GPUs replay CUDA graphs"),
    ] {
        let output = ep(&format!("{SMALL} {options}"));
        assert!(!output.status.success(), "{options}");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains(reason), "{options}: {errors}");
        assert!(output.stdout.is_empty(), "{options}");
    }
}
