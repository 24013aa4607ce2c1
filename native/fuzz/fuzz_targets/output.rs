//! See `sandgate_fuzz::targets::output`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sandgate_fuzz::targets::output(input));
