//! What fuzzing starts from and once found, read by the same functions in every test run.

use std::fs;
use std::path::Path;

use launcher::rendezvous::{fuzz, wire::Message};

#[test]
fn frames_are_read_or_refused() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/regression/rendezvous");
    let mut messages = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        fuzz(&bytes);
        messages += usize::from(Message::decode(&bytes).is_ok());
    }
    assert!(messages >= 3, "{} lost its messages", folder.display());
}
