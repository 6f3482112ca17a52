//! What fuzzing once found, and the seeds it starts from, read by the same functions in every test run.

use std::fs;
use std::path::Path;

fn each(target: &str, read: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fuzz/regression")
        .join(target);
    let mut inputs = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        read(&fs::read(entry.unwrap().path()).unwrap());
        inputs += 1;
    }
    assert!(inputs >= 2, "{} lost its inputs", folder.display());
}

#[test]
fn json_lines_are_read_or_refused() {
    each("jsonl", |bytes| {
        let (records, bad) = corpus::fuzz::jsonl(bytes);
        assert!(records + bad > 0);
    });
}

#[test]
fn megatrons_files_are_read_or_refused() {
    each("indexed", corpus::fuzz::indexed);
}

#[test]
fn sentencepiece_models_are_converted_or_refused() {
    each("sentencepiece", corpus::fuzz::sentencepiece);
}
