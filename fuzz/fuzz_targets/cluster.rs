//! Bytes for a cluster file; what must hold is in `properties/cluster.rs`.

#![no_main]

#[path = "../properties/cluster.rs"]
mod cluster;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cluster::check(bytes));
