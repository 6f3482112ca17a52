//! What fuzzing starts from and once found, read by the same functions in every test run.

use std::fs;
use std::path::Path;

use launcher::checkpoint::{Manifest, manifest, read};
use launcher::rendezvous::{fuzz, wire::Message};

#[test]
fn frames_are_read_or_refused() {
    let mut messages = 0;
    for bytes in seeds("rendezvous") {
        fuzz(&bytes);
        messages += usize::from(Message::decode(&bytes).is_ok());
    }
    assert!(messages >= 3, "the seeds' messages are gone");
}

#[test]
fn manifests_and_headers_of_slices_are_read_or_refused() {
    let mut whole = 0;
    for bytes in seeds("manifest") {
        manifest::fuzz(&bytes);
        let sealed = serde_json::from_slice::<Manifest>(&bytes).map(|it| it.seal().unwrap());
        whole += usize::from(sealed.is_ok_and(|text| Manifest::unseal(&text).is_ok()));
    }
    assert_eq!(whole, 1, "one seed is a manifest, the others are damaged");
    seeds("slice").iter().for_each(|bytes| read::fuzz(bytes));
}

/// A little of what `make fuzz` does at length: the seeds with a few bytes changed, cut or doubled.
#[test]
fn damaged_bytes_are_refused() {
    let mut state = 7u64;
    let mut random = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below.max(1)
    };
    type Reader = (&'static str, fn(&[u8]));
    let readers: [Reader; 3] = [
        ("rendezvous", fuzz),
        ("manifest", manifest::fuzz),
        ("slice", read::fuzz),
    ];
    for (name, reader) in readers {
        for seed in seeds(name) {
            for _ in 0..3_000 {
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
                reader(&bytes);
            }
        }
    }
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fuzz/regression")
        .join(target);
    fs::read_dir(&folder)
        .unwrap()
        .map(|entry| fs::read(entry.unwrap().path()).unwrap())
        .collect()
}
