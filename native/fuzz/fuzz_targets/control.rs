//! See `sandgate_fuzz::targets::control`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sandgate_fuzz::targets::control(input));
