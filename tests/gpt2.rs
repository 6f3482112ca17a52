//! The GPT-2 family by the same commands: from random weights on real text, measured and exported.

use std::path::Path;

use whole_program_tests::{Run, panglot, program, succeed, text};

/// `panglot COMMAND configs/tiny-gpt2.yaml` into this run.
fn command(command: &str, run: &Run, overrides: &[&str]) -> std::process::Command {
    let prepared = program("panglot").with_file_name("prepared-tiny-gpt2");
    let mut panglot = panglot(&[command, "configs/tiny-gpt2.yaml"]);
    panglot.arg(format!("folders.prepared={}", prepared.display()));
    panglot.arg(format!("folders.run={}", run.folder.path().display()));
    panglot.args(overrides);
    panglot
}

#[test]
fn polylm_in_small_trains_on_any_ranks_and_is_exported() {
    let run = Run::new();
    succeed(command("train", &run, &[]));
    let losses = run.losses();
    println!("{losses:?}");
    // ln 32,000 = 10.37 at the start; 20 steps learn which pieces are frequent.
    assert!(losses.len() == 20 && (losses[0] - 10.37).abs() < 0.1, "{losses:?}");
    assert!(losses[19] < losses[0] - 1.0, "the loss falls: {losses:?}");

    let parts = Run::new();
    let two_ranks = ["-n", "2"];
    succeed(command(
        "train",
        &parts,
        &[&["train.steps=20"][..], &two_ranks].concat(),
    ));
    for (one, two) in losses.iter().zip(parts.losses()) {
        // bf16 gradients summed in another order.
        assert!((one - two).abs() < 2e-2, "{one} on one rank, {two} on two");
    }

    let said = text(&succeed(command("export", &run, &[])));
    let merged = run.folder.path().join("exports/merged");
    assert!(merged.join("model.safetensors").is_file(), "{said}");
    let config = std::fs::read_to_string(merged.join("config.json")).expect("the export's config");
    assert!(config.contains("GPT2LMHeadModel"), "{config}");
    let shown = merged.display().to_string();
    let inspected = text(&succeed(panglot(&["model", "inspect", &shown])));
    assert!(inspected.contains("transformer.h.*.attn.c_attn.weight"), "{inspected}");
    let evaluated = text(&succeed(command("eval", &run, &["--model", "merged"])));
    assert!(
        Path::new(&run.folder.path().join("evaluations")).is_dir(),
        "{evaluated}"
    );
}
