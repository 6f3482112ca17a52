#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| launcher::checkpoint::manifest::fuzz(bytes));
