//! Files of Megatron's format, tokenised elsewhere, as the only source of a run: nothing but their tokens is there.

use std::fs;
use std::path::Path;
use std::process::Command;

use whole_program_tests::{Run, panglot, succeed, text};

/// `panglot WORDS configs/tiny.yaml` in a folder of the test's own, with these settings.
fn tiny(words: &[&str], prepared: &Path, run: &Run, settings: &[String]) -> Command {
    let mut command = panglot(words);
    command.arg("configs/tiny.yaml");
    command.arg(format!("folders.prepared={}", prepared.display()));
    command.arg(format!("folders.run={}", run.folder.path().display()));
    command.args(["train.steps=2", "train.sequence_length=16", "optimizer.warmup_steps=1"]);
    command.args(settings);
    command
}

#[test]
fn tokens_alone_train_as_the_text_that_they_are_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("texts/eng_Latn")).expect("a folder");
    let lines: String = (0..120)
        .map(|i| format!("Line {i} says that {} and {} differ.\n", i * i, i + 7))
        .collect();
    fs::write(at("texts/eng_Latn/a.txt"), lines).expect("written");

    let (text_run, from_text) = (Run::new(), at("from_text"));
    let source = |kind: &str, path: &Path| {
        let path = path.display();
        format!("corpus.sources=[{{name: web, kind: {kind}, path: {path}}}]")
    };
    let settings = [source("folders", &at("texts")), "corpus.held_out=0".to_owned()];
    succeed(tiny(&["train"], &from_text, &text_run, &settings));
    fs::create_dir_all(at("files")).expect("a folder");
    for end in ["bin", "idx"] {
        let from = from_text.join(format!("tokens/tokens.{end}"));
        fs::copy(from, at(&format!("files/eng_Latn_text_document.{end}"))).expect("a copy");
    }

    let (run, prepared) = (Run::new(), at("prepared"));
    let mut settings = vec![
        source("megatron", &at("files")),
        "corpus.held_out=0".to_owned(),
        "corpus.document_start=null".to_owned(),
    ];
    succeed(tiny(&["prepare"], &prepared, &run, &settings));
    succeed(tiny(&["vocab"], &prepared, &run, &settings));
    let kept = text(&succeed(tiny(&["train"], &prepared, &run, &settings)));
    assert!(kept.contains("the tokens      kept"), "{kept}");
    assert_eq!(run.losses().len(), 2);
    assert_eq!(run.losses(), text_run.losses());

    let eval = tiny(&["eval", "--model", "base"], &prepared, &run, &settings).output();
    let eval = eval.expect("starts");
    assert_eq!(eval.status.code(), Some(2));
    assert!(text(&eval).contains("holds no held-out text"), "{}", text(&eval));

    // Another file beside them is another set of tokens.
    for end in ["bin", "idx"] {
        let first = at(&format!("files/eng_Latn_text_document.{end}"));
        fs::copy(first, at(&format!("files/fra_Latn.{end}"))).expect("a copy");
    }
    let again = text(&succeed(tiny(&["prepare"], &prepared, &run, &settings)));
    assert!(again.contains("the tokens      made"), "{again}");

    settings[1] = "corpus.held_out=0.1".to_owned();
    let refused = tiny(&["prepare"], &prepared, &run, &settings).output().expect("starts");
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused).contains("corpus.held_out = 0.1"), "{}", text(&refused));
}
