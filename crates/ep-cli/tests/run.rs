//! `ep run` as a user runs it: real processes on the simulated cluster.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Small enough for a test, with every part of the layer in it.
const SMALL: &str = "--backend sim --tokens 9 --hidden 256 --intermediate 64 --experts 16 \
                     --top-k 4 --iters 3 --json";

fn ep(line: &str) -> Output {
    command(line).output().unwrap()
}

fn command(line: &str) -> Command {
    common::ep("run", line)
}

fn report(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().last().map(serde_json::from_str) {
        Some(Ok(report)) => report,
        _ => panic!("{text}\n{}", errors(output)),
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn verified(line: &str) -> Value {
    let output = ep(line);
    let report = report(&output);
    assert!(
        output.status.success(),
        "{line}: {report}\n{}",
        errors(&output)
    );
    assert_eq!(report["verified"], true, "{line}: {report}");
    report
}

/// A folder of this test; removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ep-run-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn write_npy(path: &Path, shape: [usize; 3], values: &[i64]) {
    let [a, b, c] = shape;
    let header =
        format!("{{'descr': '<i8', 'fortran_order': False, 'shape': ({a}, {b}, {c}), }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    fs::write(path, bytes).unwrap();
}

#[test]
fn four_processes_are_verified_in_both_dtypes() {
    for dtype in ["bf16", "fp8"] {
        let report = verified(&format!("{SMALL} --dtype {dtype}"));
        let keys: Vec<&str> = report
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        for key in [
            "job",
            "backend",
            "alloc",
            "ranks",
            "tokens",
            "hidden",
            "experts",
            "top_k",
            "dtype",
            "dispatch_us",
            "combine_us",
            "rel_err",
            "tolerance",
            "verified",
            "symmetric_bytes",
        ] {
            assert!(keys.contains(&key), "{key} is not in {keys:?}");
        }
        assert_eq!(report["job"], "moe-layer");
        assert_eq!(report["backend"], "sim");
        assert_eq!(report["alloc"], "malloc");
        assert_eq!(
            (&report["ranks"], &report["hidden"]),
            (&4.into(), &256.into())
        );
        assert_eq!(report["dtype"], dtype);
        assert!(report["dispatch_us"].as_f64().unwrap() > 0.0, "{report}");
        assert!(report["rel_err"].as_f64().unwrap() > 0.0, "{report}");
    }
}

#[test]
fn every_routing_is_verified_by_threads_too() {
    for routing in ["zipf", "hot", "one"] {
        verified(&format!("{SMALL} --routing {routing} --seed 3"));
        verified(&format!(
            "{SMALL} --routing {routing} --spawn threads --dtype fp8"
        ));
    }
}

#[test]
fn no_tokens_and_one_rank_are_verified() {
    assert_eq!(verified(&format!("{SMALL} --tokens 0"))["rel_err"], 0.0);
    verified(&format!("{SMALL} --ranks 1 --iters 0"));
}

#[test]
fn another_seed_is_another_layer_and_the_same_seed_the_same() {
    let error = |seed| verified(&format!("{SMALL} --seed {seed}"))["rel_err"].clone();
    let (first, again, other) = (error(1), error(1), error(2));
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[test]
fn recorded_routing_is_followed_or_refused() {
    let folder = Folder::new("recorded");
    let path = folder.0.join("routing.npy");
    let line = format!(
        "--backend sim --hidden 128 --intermediate 64 --experts 8 --iters 0 --json --routing {}",
        path.display()
    );
    // The first rank has a token without experts, the second sends everything to one rank.
    let ids = [0, 7, 3, -1, -1, -1, 5, -1, 2, 4, 5, 6, 6, 5, 4, 7, 6, 5];
    write_npy(&path, [2, 3, 3], &ids);
    let report = verified(&line);
    assert_eq!(
        (&report["ranks"], &report["tokens"], &report["top_k"]),
        (&2.into(), &3.into(), &3.into())
    );

    let mut bad = ids;
    bad[10] = 8;
    write_npy(&path, [2, 3, 3], &bad);
    let output = ep(&line);
    assert!(!output.status.success());
    let text = errors(&output);
    assert!(
        text.starts_with("error: the recorded routing sends token 0 of rank 1 to expert 8"),
        "{text}"
    );
}

#[test]
fn bad_input_is_refused_before_anything_starts() {
    for (line, reason) in [
        (
            "--hidden 200",
            "--hidden is 200; it must be a multiple of 128",
        ),
        ("--ranks 3", "--experts is 64; it must be a multiple of 3"),
        ("--top-k 33", "--top-k is 33; it must be 1 to 32"),
        (
            "--routing missing.npy",
            "missing.npy is no recorded routing",
        ),
        ("--cluster missing.toml", "missing.toml cannot be read"),
    ] {
        let output = ep(line);
        assert!(!output.status.success(), "{line}");
        assert!(
            errors(&output).contains(reason),
            "{line}: {}",
            errors(&output)
        );
        assert!(output.stdout.is_empty(), "{line}");
    }
}

#[test]
fn a_described_cluster_is_simulated() {
    let folder = Folder::new("cluster");
    let path = folder.0.join("cluster.toml");
    fs::write(&path, "[[node]]\nname = \"n0\"\ngpus = 4\n").unwrap();
    verified(&format!("{SMALL} --cluster {}", path.display()));
    let output = ep(&format!("{SMALL} --ranks 8 --cluster {}", path.display()));
    assert!(
        errors(&output).contains("the cluster has 4"),
        "{}",
        errors(&output)
    );
}

#[test]
fn a_forced_memory_is_used_or_refused() {
    let report = report(&command(SMALL).env("EP_ALLOC", "posix-fd").output().unwrap());
    assert_eq!(
        (&report["alloc"], &report["verified"]),
        (&"posix_fd".into(), &true.into())
    );
    let output = command(SMALL).env("EP_ALLOC", "fabric").output().unwrap();
    assert!(!output.status.success());
    let text = errors(&output);
    assert!(text.contains("rank 0: ") && text.contains("800"), "{text}");
}

#[test]
fn a_killed_rank_is_named_and_nothing_is_left() {
    // Long enough that the rank is killed in its midst.
    let child = command(&format!("{SMALL} --iters 1000000"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env("EP_TIMEOUT_MS", "500")
        .spawn()
        .unwrap();
    let ranks = started_ranks(child.id());
    thread::sleep(Duration::from_millis(300));
    let killed = Command::new("kill")
        .args(["-9", &ranks[2].to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    let text = errors(&output);
    assert!(
        text.contains("rank 2: its process ended (signal: 9"),
        "{text}"
    );
    for rank in ranks {
        assert!(
            !Path::new(&format!("/proc/{rank}")).exists(),
            "rank process {rank} is left"
        );
    }
}

#[test]
fn ranks_end_with_their_head_and_leave_nothing() {
    let folder = Folder::new("head");
    let mut child = command(&format!("{SMALL} --iters 1000000"))
        .env("TMPDIR", &folder.0)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let ranks = started_ranks(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while ranks.iter().any(|&rank| threads(rank) > 0) {
        assert!(Instant::now() < deadline, "a rank outlives its head");
        thread::sleep(Duration::from_millis(10));
    }
    let left: Vec<_> = fs::read_dir(&folder.0).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_signal_to_all_processes_leaves_nothing() {
    let folder = Folder::new("group");
    let mut child = command(&format!("{SMALL} --iters 1000000"))
        .env("TMPDIR", &folder.0)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    // Said by rank 0 once the ranks have met.
    let errors = BufReader::new(child.stderr.take().unwrap());
    assert!(
        errors
            .lines()
            .any(|line| line.unwrap().contains("] memory: "))
    );
    let group = format!("-{}", child.id());
    let killed = Command::new("kill").args(["-9", "--", &group]).status();
    assert!(killed.unwrap().success());
    child.wait().unwrap();
    let left: Vec<_> = fs::read_dir(&folder.0).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_result_that_cannot_be_written_is_an_error() {
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = command(SMALL).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = errors(&output);
    assert!(
        text.contains("error: standard output cannot be written; check where it leads: No space"),
        "{text}"
    );
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let output = command(SMALL)
        .env("TMPDIR", "/nonexistent")
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = errors(&output);
    assert!(
        text.contains("cannot be made in /nonexistent; check TMPDIR"),
        "{text}"
    );
}

/// The four ranks of a head, once they have read their tasks.
fn started_ranks(head: u32) -> Vec<u32> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let ranks = common::children(head);
        // The second thread of a rank watches for the end of its head.
        if ranks.len() == 4 && ranks.iter().all(|&rank| threads(rank) >= 2) {
            return ranks;
        }
        assert!(Instant::now() < deadline, "the ranks did not start");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Threads of a process; 0 if it is gone or a zombie.
fn threads(pid: u32) -> usize {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .ok()
        .filter(|status| !status.contains("\nState:\tZ"))
        .and_then(|status| {
            status
                .lines()
                .find_map(|line| line.strip_prefix("Threads:")?.trim().parse().ok())
        })
        .unwrap_or(0)
}
