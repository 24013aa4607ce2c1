//! See `sandgate_fuzz::targets::file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sandgate_fuzz::targets::file(input));
