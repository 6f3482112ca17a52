//! What is wrong with an input is said in a sentence: value, rule, next move. Nothing panics and nothing goes on.

use std::fs;
use std::path::Path;
use std::process::Command;

use whole_program_tests::{Run, copy_folder, panglot, prepared, text};

/// Runs `command`, which must fail as the user's mistake and say all of `sentence`.
fn check(mut command: Command, sentence: &[&str]) {
    let output = command.output().expect("the program starts");
    let said = text(&output);
    assert!(
        matches!(output.status.code(), Some(2 | 74)),
        "{command:?} ended with {}:\n{said}",
        output.status
    );
    assert!(!said.contains("panicked"), "{said}");
    for part in sentence {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
}

/// A config that is refused before anything is made or read.
fn train(overrides: &[&str]) -> Command {
    let mut command = panglot(&["train", "configs/tiny.yaml"]);
    command.args(overrides);
    command
}

#[test]
fn a_key_that_does_not_exist_names_the_nearest() {
    check(train(&["train.setps=3"]), &["setps", "steps"]);
}

#[test]
fn rows_that_do_not_divide_among_ranks_get_a_number_that_does() {
    check(
        train(&["train.rows_per_step=13", "launch.ranks=2"]),
        &["train.rows_per_step = 13", "try 1"],
    );
}

#[test]
fn a_gpu_that_is_not_there_ends_the_run() {
    if Path::new("/proc/driver/nvidia/version").exists() {
        eprintln!("\nSKIPPED: this machine has a CUDA driver, so that a GPU cannot be missing\n");
        return;
    }
    let run = tempfile::tempdir().expect("a folder");
    // One rank, and two, which would meet through NCCL: each refuses before it waits for the other.
    for ranks in ["1", "2"] {
        let mut command = train(&["train.device=cuda"]);
        command.args(["-n", ranks]);
        command.arg(format!("folders.prepared={}", prepared().display()));
        command.arg(format!("folders.run={}", run.path().join("run").display()));
        check(command, &["no CUDA driver here", "set train.device: cpu"]);
    }
}

#[test]
fn eight_bits_are_for_gpus() {
    let overrides = ["train.frozen_precision=fp8", "train.precision=bf16"];
    check(
        train(&overrides),
        &["train.frozen_precision = fp8", "train.device: cuda"],
    );
}

/// `panglot corpus` on a folder of texts that `fill` writes.
fn corpus(fill: impl Fn(&Path)) -> (Command, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let texts = folder.path().join("texts");
    fs::create_dir_all(&texts).expect("a folder");
    fill(&texts);
    let mut command = panglot(&["corpus", "configs/tiny.yaml", "corpus.sources.0.kind=folders"]);
    command.arg(format!("corpus.sources.0.path={}", texts.display()));
    command.arg(format!("folders.prepared={}", folder.path().join("prepared").display()));
    (command, folder)
}

fn write(texts: &Path, file: &str, contents: &[u8]) {
    let path = texts.join(file);
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::write(path, contents).expect("written");
}

#[test]
fn an_empty_corpus_is_no_corpus() {
    let (command, _folder) = corpus(|_| ());
    check(command, &["texts"]);
}

#[test]
fn bad_utf_8_is_named_by_file_and_line() {
    let (command, _folder) = corpus(|texts| write(texts, "eng_Latn/a.txt", b"good\nb\xff\xfed\n"));
    check(command, &["a.txt", "2", "UTF-8"]);
}

#[test]
fn a_folder_that_is_no_language_is_named() {
    let (command, _folder) = corpus(|texts| write(texts, "english/a.txt", b"good\n"));
    check(command, &["'english' is not a language", "eng_Latn"]);
}

#[test]
fn a_json_line_without_text_is_named_by_file_and_line() {
    let (command, _folder) =
        corpus(|texts| write(texts, "eng_Latn/a.jsonl", b"{\"text\": \"good\"}\n{\"txt\": \"bad\"}\n"));
    check(command, &["a.jsonl", "2", "text"]);
}

/// Training on prepared folders of which `harm` spoils one file.
fn on_harmed(harm: impl Fn(&Path)) -> (Command, Run, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join("prepared");
    copy_folder(&prepared(), &copy);
    harm(&copy);
    let run = Run::new();
    (run.train_in(&copy, &["train.steps=4"]), run, folder)
}

fn truncate(path: &Path) {
    let file = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .expect("a file to truncate");
    let length = file.metadata().expect("a length").len();
    file.set_len(length - length / 3).expect("truncated");
}

#[test]
fn a_truncated_shard_is_named() {
    let (command, _run, _folder) = on_harmed(|prepared| truncate(&prepared.join("tokens/tokens.bin")));
    check(command, &["tokens.bin"]);
}

#[test]
fn a_truncated_shard_index_is_named() {
    let (command, _run, _folder) = on_harmed(|prepared| truncate(&prepared.join("tokens/tokens.idx")));
    check(command, &["tokens.idx"]);
}

#[test]
fn truncated_weights_are_named() {
    let (command, _run, _folder) = on_harmed(|prepared| truncate(&prepared.join("base_model/model.safetensors")));
    check(command, &["model.safetensors"]);
}

#[test]
fn a_lora_target_that_matches_nothing_is_an_error() {
    check(train(&["train.lora.targets=[q_prj]"]), &["q_prj", "q_proj"]);
}
