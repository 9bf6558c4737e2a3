//! Bytes for a frame of the exchange; what must hold is in `properties/frame.rs`.

#![no_main]

#[path = "../properties/frame.rs"]
mod frame;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| frame::check(bytes));
