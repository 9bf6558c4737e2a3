//! Bytes for a handle record; what must hold is in `properties/record.rs`.

#![no_main]

#[path = "../properties/record.rs"]
mod record;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| record::check(bytes));
