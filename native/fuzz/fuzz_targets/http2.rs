//! See `sandgate_fuzz::targets::http2`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sandgate_fuzz::targets::http2(input));
