//! What fuzzing starts from and once found, read by the same functions in every test run.

use std::fs;
use std::path::Path;

use launcher::rendezvous::{fuzz, wire::Message};

#[test]
fn frames_are_read_or_refused() {
    let mut messages = 0;
    for bytes in seeds() {
        fuzz(&bytes);
        messages += usize::from(Message::decode(&bytes).is_ok());
    }
    assert!(messages >= 3, "the seeds' messages are gone");
}

/// A little of what `make fuzz` does at length: the seeds with a few bytes changed, cut or doubled.
#[test]
fn damaged_frames_are_refused() {
    let mut state = 7u64;
    let mut random = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below.max(1)
    };
    for seed in seeds() {
        for _ in 0..5_000 {
            let mut bytes = seed.clone();
            for _ in 0..1 + random(4) {
                let at = random(bytes.len());
                match random(3) {
                    0 => bytes.truncate(at),
                    1 => bytes.extend_from_within(at..),
                    _ if at < bytes.len() => bytes[at] = random(256) as u8,
                    _ => {}
                }
            }
            fuzz(&bytes);
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/regression/rendezvous");
    fs::read_dir(&folder)
        .unwrap()
        .map(|entry| fs::read(entry.unwrap().path()).unwrap())
        .collect()
}
