#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _ = launcher::hostlist::parse(text);
});
