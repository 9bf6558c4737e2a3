//! `ep perf` as a user runs it: real processes on the simulated cluster.

use std::process::Command;

use serde_json::Value;

#[test]
fn each_batch_size_has_its_line() {
    let output = Command::new(env!("CARGO_BIN_EXE_ep"))
        .args("perf --backend sim --ranks 2 --tokens 1,8,4 --hidden 256 --experts 16".split(' '))
        .args("--top-k 4 --iters 5 --sms 20 --routing hot".split(' '))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let tokens: Vec<u64> = lines
        .iter()
        .map(|line| line["tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(tokens, [1, 8, 4]);
    for line in &lines {
        assert_eq!(
            (&line["lib"], &line["backend"]),
            (&"ep".into(), &"sim".into())
        );
        assert_eq!((&line["fp8"], &line["sms"]), (&true.into(), &20.into()));
        for time in ["dispatch_us", "combine_us", "empty_us"] {
            assert!(line[time].as_f64().unwrap() > 0.0, "{time}: {line}");
        }
        for kind in ["dispatch", "combine"] {
            let [median, p99] =
                ["us", "p99_us"].map(|unit| line[format!("{kind}_{unit}")].as_f64());
            assert!(median <= p99, "{line}");
        }
    }
}
