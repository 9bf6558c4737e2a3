//! `ep preflight` as an operator runs it, on the cluster files that are shipped.

mod common;

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn ep(line: &str) -> Command {
    common::ep("preflight", line)
}

/// The path of a shipped cluster file.
fn shipped(name: &str) -> String {
    format!("{}/../../clusters/{name}.toml", env!("CARGO_MANIFEST_DIR"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What the command found out, after checks that hold for every report.
fn report(command: &mut Command) -> Value {
    let output = command.arg("--json").output().unwrap();
    let stdout = text(&output.stdout);
    let Ok(report) = serde_json::from_str::<Value>(&stdout) else {
        panic!("{stdout}\n{}", text(&output.stderr));
    };
    check_schema(&report);
    let code = if report["usable"] == true { 0 } else { 1 };
    assert_eq!(output.status.code(), Some(code), "{report}");
    report
}

fn of_cluster(name: &str, more: &str) -> Value {
    report(&mut ep(&format!("--cluster {} {more}", shipped(name))))
}

/// The command, a process for each rank, with a cluster that can be read only once.
fn of_stdin(toml: &[u8], more: &str) -> Output {
    let mut child = ep(&format!("--cluster /dev/stdin --spawn processes {more}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(toml).unwrap();
    child.wait_with_output().unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    keys
}

fn check_schema(report: &Value) {
    assert_eq!(
        keys(report),
        ["backend", "problems", "ranks", "reason", "usable"]
    );
    assert!(report["usable"].is_boolean());
    assert!(["fabric", "posix_fd", "malloc"].contains(&report["backend"].as_str().unwrap()));
    assert_ne!(report["reason"], "");
    let ranks = report["ranks"].as_array().unwrap();
    for (number, rank) in ranks.iter().enumerate() {
        assert_eq!(
            keys(rank),
            ["clique", "fabric_trial", "gpu", "node", "rank", "routes"]
        );
        assert_eq!(rank["rank"], number);
        assert!(rank["node"].is_string() && rank["gpu"].is_u64(), "{rank}");
        assert!(
            rank["clique"].is_string() || rank["clique"].is_null(),
            "{rank}"
        );
        let trial = &rank["fabric_trial"];
        assert_eq!(keys(trial), ["call", "ok", "status"]);
        assert!(
            trial["ok"] == false || trial["call"].is_null() && trial["status"].is_null(),
            "{trial}"
        );
        assert_eq!(rank["routes"].as_array().unwrap().len(), ranks.len());
        for (peer, route) in rank["routes"].as_array().unwrap().iter().enumerate() {
            assert_eq!(route == "self", peer == number, "{rank}");
            assert_eq!(*route, ranks[peer]["routes"][number], "{number}, {peer}");
        }
    }
    for problem in report["problems"].as_array().unwrap() {
        assert_eq!(keys(problem), ["check", "ranks", "what"]);
        assert!(problem["ranks"].is_array(), "{problem}");
        assert_ne!(problem["what"], "");
        assert_ne!(problem["check"], "");
    }
}

/// Checks every route of a report, the own ones left out.
fn check_routes(report: &Value, expected: impl Fn(usize, usize) -> &'static str) {
    for (a, rank) in report["ranks"].as_array().unwrap().iter().enumerate() {
        for (b, route) in rank["routes"].as_array().unwrap().iter().enumerate() {
            if a != b {
                assert_eq!(*route, expected(a, b), "{a}, {b}");
            }
        }
    }
}

/// The ranks that problems with this text name.
fn concerned(report: &Value, what: &str) -> Vec<u64> {
    let problems = report["problems"].as_array().unwrap().iter();
    let named = problems.filter(|problem| problem["what"].as_str().unwrap().contains(what));
    named
        .flat_map(|problem| problem["ranks"].as_array().unwrap())
        .map(|rank| rank.as_u64().unwrap())
        .collect()
}

#[test]
fn one_hgx_h200_uses_malloc_and_says_why_not_fabric() {
    let report = of_cluster("hgx-h200", "");
    assert_eq!(
        (&report["usable"], &report["backend"]),
        (&true.into(), &"malloc".into())
    );
    check_routes(&report, |_, _| "nvlink");
    let reason = report["reason"].as_str().unwrap();
    for part in ["one node", "cuMemCreate returned 800", "no IMEX channel"] {
        assert!(reason.contains(part), "{reason}");
    }
    assert_eq!(report["problems"], Value::Array(Vec::new()));
    let last = &report["ranks"][7];
    assert_eq!((&last["node"], &last["gpu"]), (&"n0".into(), &7.into()));
    assert_eq!(last["clique"], Value::Null);
    assert_eq!(
        last["fabric_trial"],
        serde_json::json!({"ok": false, "call": "cuMemCreate", "status": 800})
    );
}

#[test]
fn gpus_on_pcie_alone_are_not_joined() {
    let report = of_cluster("pcie", "");
    assert_eq!(report["usable"], false);
    check_routes(&report, |_, _| "none");
    for backend in ["malloc", "posix_fd"] {
        let what =
            format!("{backend} refused when rank 0 imports from rank 1 and in 11 more cases");
        assert_eq!(concerned(&report, &what), [0, 1, 2, 3], "{report}");
    }
    let reason = report["reason"].as_str().unwrap();
    assert!(reason.contains("no NVLink joins the GPUs"), "{reason}");
}

#[test]
fn links_that_nvml_does_not_tell_are_noted() {
    let words = |namespace: &str| {
        let toml = format!("[[node]]\nname = \"n0\"\ngpus = 3\nipc_namespace = \"{namespace}\"\n");
        text(&of_stdin(toml.as_bytes(), "").stdout)
    };
    let note = "note: on ranks 0-2 NVML does not tell what joins the GPUs,";
    let private = words("private");
    assert!(
        private.contains(note) && private.contains("\nusable"),
        "{private}"
    );
    let shared = words("shared");
    assert!(
        !shared.contains("note:") && shared.contains("\nusable"),
        "{shared}"
    );
}

/// The case that an attribute check alone gets wrong: the devices of an InfiniBand cluster claim
/// fabric handles, and fabric memory would reach nobody.
#[test]
fn an_infiniband_cluster_uses_malloc_within_hosts_and_the_network_between_them() {
    let report = of_cluster("hgx-h100-infiniband", "");
    assert_eq!(
        (&report["usable"], &report["backend"]),
        (&true.into(), &"malloc".into())
    );
    check_routes(&report, |a, b| match a / 8 == b / 8 {
        true => "nvlink",
        false => "network",
    });
    let reason = report["reason"].as_str().unwrap();
    for part in [
        "no NVLink clique that spans",
        "all zeros",
        "fabric refused on ranks 0-15",
    ] {
        assert!(reason.contains(part), "{reason}");
    }
    assert_eq!(report["problems"], Value::Array(Vec::new()));
    let output = ep(&format!("--cluster {}", shipped("hgx-h100-infiniband")))
        .output()
        .unwrap();
    let words = text(&output.stdout);
    let note = "note: dispatch and combine go over NVLink, which does not join ranks 0-7 | 8-15;";
    assert!(words.contains(note), "{words}");
}

#[test]
fn a_full_nvl72_rack_uses_fabric_between_all_its_ranks() {
    let report = of_cluster("gb200-nvl72", "");
    assert_eq!(
        (&report["usable"], &report["backend"]),
        (&true.into(), &"fabric".into())
    );
    assert_eq!(report["ranks"].as_array().unwrap().len(), 72);
    check_routes(&report, |_, _| "nvlink");
    let last = &report["ranks"][71];
    assert_eq!((&last["node"], &last["gpu"]), (&"n17".into(), &3.into()));
    assert_eq!(last["clique"], "6b1f0c3e-0000-4000-8000-000000000001/1");
    assert_eq!(last["fabric_trial"]["ok"], true);
    assert_eq!(report["problems"], Value::Array(Vec::new()));
}

#[test]
fn two_cliques_use_fabric_within_and_the_network_between() {
    let report = of_cluster("gb200-nvl72-two-cliques", "");
    assert_eq!(
        (&report["usable"], &report["backend"]),
        (&true.into(), &"fabric".into())
    );
    assert_eq!(report["ranks"].as_array().unwrap().len(), 144);
    check_routes(&report, |a, b| match a / 72 == b / 72 {
        true => "nvlink",
        false => "network",
    });
}

#[test]
fn a_broken_rack_is_not_usable_and_every_cause_is_named() {
    let report = of_cluster("gb200-broken", "");
    assert_eq!(report["usable"], false);
    check_routes(&report, |a, b| match a / 4 == b / 4 {
        true => "nvlink",
        false => "none",
    });
    assert_eq!(concerned(&report, "no IMEX channel"), [4, 5, 6, 7]);
    assert_eq!(
        concerned(&report, "registration is in progress"),
        [8, 9, 10, 11]
    );
    assert_eq!(
        concerned(&report, "CUDA IPC does not work"),
        [12, 13, 14, 15]
    );
    assert_eq!(concerned(&report, "no route"), Vec::from_iter(0..16));
    let output = ep(&format!("--cluster {}", shipped("gb200-broken")))
        .output()
        .unwrap();
    let words = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{words}");
    for part in [
        "/dev/nvidia-caps-imex-channels",
        "nvidia-smi -q -d FABRIC",
        "IPC and PID namespaces",
        "rank 15: n3, GPU 3",
        "none to 0-11: ",
        "\nnot usable: ",
    ] {
        assert!(words.contains(part), "{part} is not in {words}");
    }
}

#[test]
fn a_forced_backend_is_used_or_reported_as_unusable() {
    let report = of_cluster("hgx-h200", "--alloc posix-fd");
    assert_eq!(
        (&report["usable"], &report["backend"]),
        (&true.into(), &"posix_fd".into())
    );
    check_routes(&report, |_, _| "nvlink");

    let line = format!("--cluster {}", shipped("hgx-h200"));
    for report in [
        of_cluster("hgx-h200", "--alloc fabric"),
        self::report(ep(&line).env("EP_ALLOC", "fabric")),
    ] {
        assert_eq!(
            (&report["usable"], &report["backend"]),
            (&false.into(), &"fabric".into())
        );
        check_routes(&report, |_, _| "none");
        assert!(
            report["reason"]
                .as_str()
                .unwrap()
                .contains("forced by rank 0"),
            "{report}"
        );
        assert_eq!(
            concerned(&report, "cuMemCreate returned 800"),
            Vec::from_iter(0..8)
        );
    }
    let report = self::report(ep(&line).env("MC_USE_NVLINK_IPC", "1").arg("--alloc=auto"));
    assert_eq!(report["backend"], "malloc");
}

#[test]
fn processes_find_what_threads_find() {
    for more in ["", "--alloc posix-fd", "--alloc fabric"] {
        let threads = of_cluster("hgx-h200", more);
        let processes = of_cluster("hgx-h200", &format!("{more} --spawn processes"));
        assert_eq!(threads, processes, "{more}");
    }
}

/// The ranks of a simulated HGX H200 host, started as a launcher starts them.
fn launched(ranks: std::ops::Range<u32>) -> Vec<Child> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    drop(listener);
    ranks
        .map(|rank| {
            let line = format!("--json --run-key {port} --cluster {}", shipped("hgx-h200"));
            ep(&line)
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", "8")
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", &port)
                .env("EP_DEADLINE_MS", "5000")
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect()
}

#[test]
fn under_a_launcher_rank_0_speaks_for_all() {
    let outputs = launched(0..8).into_iter().map(Child::wait_with_output);
    for (rank, output) in outputs.enumerate() {
        let output = output.unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        if rank == 0 {
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            check_schema(&report);
            assert_eq!(report, of_cluster("hgx-h200", ""));
        } else {
            assert!(output.stdout.is_empty(), "rank {rank} speaks");
        }
    }
}

#[test]
fn a_cluster_that_can_be_read_only_once_is_enough() {
    let toml = fs::read(shipped("hgx-h200")).unwrap();
    let output = of_stdin(&toml, "--json");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report, of_cluster("hgx-h200", ""));
}

#[test]
fn processes_that_end_before_they_meet_are_named_at_once() {
    let start = Instant::now();
    let line = format!("--cluster {} --spawn processes", shipped("hgx-h200"));
    let output = ep(&line).env("EP_DEADLINE_MS", "soon").output().unwrap();
    let error = no_report(output);
    assert!(error.contains("EP_DEADLINE_MS is \"soon\""), "{error}");
    assert!(error.contains("before the ranks met"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_rank_that_does_not_come_is_named_in_time() {
    let start = Instant::now();
    let outputs = launched(0..7).into_iter().map(Child::wait_with_output);
    for output in outputs {
        let error = no_report(output.unwrap());
        assert!(error.contains("rank 7"), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_bad_file_is_refused_with_line_and_name() {
    let path = std::env::temp_dir().join(format!("ep-preflight-{}.toml", std::process::id()));
    let refused = |toml: &str| {
        fs::write(&path, toml).unwrap();
        let output = ep(&format!("--json --cluster {}", path.display())).output();
        no_report(output.unwrap())
    };
    let error = refused("[[node]]\nname = \"n0\"\ngpus = 4\nimex = true\n");
    assert!(error.contains("line 4: unknown key `imex`"), "{error}");
    let error = refused("[[node]]\nname = \"n0\"\ngpus = 4\n[node.gpu]\nclique = 1\n");
    assert!(error.contains("line 5: unknown key `clique`"), "{error}");
    let error = refused("# nothing\n");
    assert!(error.contains("has no nodes"), "{error}");
    fs::remove_file(&path).unwrap();
    let output = ep(&format!("--cluster {}", path.display()))
        .output()
        .unwrap();
    assert!(no_report(output).contains("cannot be read"));
}

#[test]
fn bad_settings_are_refused() {
    let line = format!("--cluster {}", shipped("hgx-h200"));
    let output = ep(&line).env("EP_ALLOC", "cuda").output().unwrap();
    let error = no_report(output);
    assert!(error.contains("EP_ALLOC is \"cuda\""), "{error}");
    let output = ep("--alloc cuda").output().unwrap();
    assert!(text(&output.stderr).contains("posix-fd"));
    let output = ep(&format!("{line} --bandwidth")).output().unwrap();
    assert!(text(&output.stderr).contains("cannot be used with"));
    // Half a launcher is none.
    let output = ep("").env("WORLD_SIZE", "2").output().unwrap();
    let error = no_report(output);
    assert!(error.contains("RANK is not set"), "{error}");
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port().to_string();
    for (size, port, reason) in [
        ("2", "0", "MASTER_PORT is \"0\""),
        ("4000000000", "29500", "check WORLD_SIZE"),
        ("2", &port, "set EP_PORT"),
    ] {
        let mut command = ep("");
        command.env("RANK", "0").env("WORLD_SIZE", size);
        command
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port);
        let error = no_report(command.output().unwrap());
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn without_a_gpu_it_says_so() {
    if Path::new("/dev/nvidiactl").exists() {
        println!("skipped: this host has GPUs");
        return;
    }
    let error = no_report(ep("--json").output().unwrap());
    assert!(error.contains("--cluster FILE.toml"), "{error}");
}

/// The error of a command that found out nothing.
fn no_report(output: Output) -> String {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
    error
}
