//! Commands of `ep`, as a user runs them.

use std::fs;
use std::process::Command;

/// A command without the environment's opinions.
pub(crate) fn ep(subcommand: &str, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ep"));
    command.arg(subcommand).args(line.split_whitespace());
    for variable in [
        "EP_ALLOC",
        "EP_DEADLINE_MS",
        "EP_PORT",
        "EP_RUN_ID",
        "EP_TIMEOUT_MS",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "MC_USE_NVLINK_IPC",
        "RANK",
        "WORLD_SIZE",
    ] {
        command.env_remove(variable);
    }
    command
}

/// Processes that `parent` started.
#[allow(dead_code, reason = "not every test looks for processes")]
pub(crate) fn children(parent: u32) -> Vec<u32> {
    fs::read_dir(format!("/proc/{parent}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .map(|pid| pid.parse().unwrap())
                .collect::<Vec<_>>()
        })
        .collect()
}
