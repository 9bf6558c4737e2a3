//! Commands of `ep`, as a user runs them.

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
