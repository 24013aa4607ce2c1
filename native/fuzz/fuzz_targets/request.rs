//! See `sandgate_fuzz::targets::request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sandgate_fuzz::targets::request(input));
