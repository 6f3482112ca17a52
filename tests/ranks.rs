//! The number of ranks, and how training is divided among them, changes nothing but the order of sums.

use std::process::Command;

use whole_program_tests::{Run, panglot, prepared, succeed, text};

fn run(ranks: u32, overrides: &[&str]) -> Run {
    let run = Run::new();
    train(&run, ranks, overrides);
    run
}

fn train(run: &Run, ranks: u32, overrides: &[&str]) -> String {
    let mut command = run.train(overrides);
    command.args([
        "train.steps=6",
        "debug.check_ranks_equal=true",
        "-n",
        &ranks.to_string(),
    ]);
    text(&succeed(command))
}

fn losses(ranks: u32, overrides: &[&str]) -> Vec<f64> {
    run(ranks, overrides).losses()
}

/// f32 sums in another order differ in the last of 24 bits; six AdamW steps spread that to a few times 1e-6 of a loss
/// near 10. A row left out or a slice updated twice moves losses by 1e-2 and more.
const TOLERANCE_SUM_ORDER: f64 = 5e-5;

fn check_close(one: &[f64], many: &[f64], what: &str) {
    assert_eq!(one.len(), many.len());
    for (step, (a, b)) in one.iter().zip(many).enumerate() {
        assert!(
            (a - b).abs() < TOLERANCE_SUM_ORDER,
            "step {step}: {a} on 1 rank, {b} {what}"
        );
    }
}

/// More cases, on models of a size that allows them, are in trainer/tests/sharded.rs.
#[test]
fn every_stage_on_two_and_three_ranks_gives_the_losses_of_one() {
    let one = losses(1, &[]);
    assert!(one[5] < one[0], "the loss falls: {one:?}");
    // 3 does not divide the trained parameters: padding is used.
    for (ranks, zero) in [(2, 0), (3, 1), (2, 2), (3, 3)] {
        let frozen = if zero == 3 {
            "train.shard_frozen=true"
        } else {
            "train.shard_frozen=false"
        };
        let run = run(ranks, &[&format!("train.zero={zero}"), frozen]);
        check_close(&one, &run.losses(), &format!("on {ranks} at stage {zero}"));
        for line in run.metrics() {
            let (sent, least) = (&line["bytes_sent"], &line["bytes_least"]);
            let (sent, least) = (sent.as_u64().expect("bytes"), least.as_u64().expect("bytes"));
            // 0.1 % is padding and small numbers; what travels as rows is fewer. Stage 0 sends everything whole.
            assert!(
                sent as f64 <= 1.01 * least as f64,
                "stage {zero}: {sent} bytes, at least {least}"
            );
            let rows_travel = zero > 0;
            assert_eq!(
                (sent as f64) < 0.9 * least as f64,
                rows_travel,
                "stage {zero}: {sent} of {least}"
            );
        }
    }
}

#[test]
fn a_checkpoint_of_one_stage_goes_on_at_another_and_is_exported() {
    let one = losses(1, &[]);
    let run = Run::new();
    let mut first = run.train(&[
        "train.steps=6",
        "train.zero=3",
        "train.shard_frozen=true",
        "checkpoint.every_steps=3",
    ]);
    first.args(["-n", "2"]);
    succeed(first);
    // The second half again, at another stage.
    std::fs::remove_dir_all(run.folder.path().join("checkpoints/step-00000006")).expect("the last checkpoint");
    let said = train(&run, 3, &["train.zero=2", "checkpoint.every_steps=3"]);
    assert!(said.contains("resumed from step 3"), "{said}");
    check_close(&one, &run.losses(), "over 2 ranks at stage 3, then 3 at stage 2");

    let folder = run.folder.path();
    let folders = [
        format!("folders.prepared={}", prepared().display()),
        format!("folders.run={}", folder.display()),
    ];
    let mut export = panglot(&["export", "configs/tiny.yaml", "train.steps=6", "train.zero=3"]);
    export.args(&folders);
    let said = text(&succeed(export));
    assert!(folder.join("exports").is_dir(), "{said}");
}

#[test]
fn gradients_in_bf16_on_the_wire_give_nearly_the_same_losses() {
    let (one, two) = (losses(1, &[]), losses(2, &["train.reduce=bf16"]));
    // Each share is rounded to 8 bits: a hundredth of a loss near 10 at most, and not nothing.
    assert!(
        one.iter().zip(&two).all(|(a, b)| (a - b).abs() < 0.1),
        "{one:?}, {two:?}"
    );
    assert_ne!(one, two);
}

#[test]
fn one_large_micro_batch_gives_the_losses_of_many_small_ones() {
    let (small, large) = (losses(1, &["train.micro_rows=1"]), losses(1, &["train.micro_rows=12"]));
    check_close(&small, &large, "in one micro-batch");
}

#[test]
fn dropout_depends_on_rows_and_not_on_ranks_or_recomputation() {
    let one = losses(1, &["train.lora.dropout=0.2", "train.recompute=none"]);
    let two = losses(2, &["train.lora.dropout=0.2", "train.recompute=full"]);
    check_close(&one, &two, "on 2 with recomputation");
    assert!((one[5] - losses(1, &[])[5]).abs() > 1e-6, "dropout does something");
}

/// On one batch again and again, with a rate that rises from nothing, the norm is 0.9 ± 0.04 for eight steps; the thirteenth
/// step's is 1.56, sixteen deviations above. That is skipped, so the next one's is the same: now √7 deviations above seven as before
/// and itself.
fn with_an_outlier(run: &Run, guard: &str) -> Command {
    let mut command = run.train(&[
        "train.steps=16",
        "debug.overfit_one_batch=true",
        "optimizer.warmup_steps=12",
        "optimizer.lr_lora=0.01",
        "optimizer.lr_embeddings=0.01",
        guard,
    ]);
    command.args(["-n", "2"]);
    command
}

#[test]
fn skips_in_a_row_end_the_run() {
    let run = Run::new();
    let mut command = with_an_outlier(&run, "train.guard={window: 8, norm_sigmas: 2, skips_in_a_row: 2}");
    let output = command.output().expect("the program starts");
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("2 steps in a row were skipped, the last "), "{said}");
    assert!(said.contains("lower the learning rates"), "{said}");
    let skipped: Vec<bool> = run.metrics().iter().map(|line| line["skipped"] == true).collect();
    assert!(skipped.len() > 3 && skipped.len() < 16, "{skipped:?}");
    let in_a_row = skipped.windows(2).position(|pair| pair == [true, true]);
    assert_eq!(
        in_a_row,
        Some(skipped.len() - 2),
        "it ends with the second, and not before: {skipped:?}"
    );
}

#[test]
fn an_outlier_is_skipped_and_said() {
    let run = Run::new();
    let command = with_an_outlier(&run, "train.guard={window: 8, norm_sigmas: 4, skips_in_a_row: 12}");
    let said = text(&succeed(command));
    let metrics = run.metrics();
    let skipped: Vec<_> = metrics.iter().filter(|line| line["skipped"] == true).collect();
    assert!(!skipped.is_empty() && skipped.len() < metrics.len(), "{metrics:?}");
    assert!(
        skipped[0]["skip_reason"]
            .as_str()
            .expect("a reason")
            .contains("standard deviations above"),
        "{said}"
    );
    assert!(said.contains("was skipped on every rank: the "), "{said}");
    assert!(said.contains("; its rows: "), "{said}");
}

/// That the digests of such a run name the rank is shown in trainer/tests/sharded.rs: here nobody had these.
#[test]
fn a_run_that_reaches_a_step_again_in_which_two_ranks_differed_says_so() {
    let run = Run::new();
    let overrides = ["train.zero=0", "checkpoint.every_steps=3"];
    train(&run, 2, &overrides);
    std::fs::remove_dir_all(run.folder.path().join("checkpoints/step-00000006")).expect("the last checkpoint");
    let history = run.folder.path().join("history.jsonl");
    let mut lines = std::fs::read_to_string(&history).expect("a history");
    lines += r#"{"unix_time": 1.5, "what": "differed", "step": 4, "masters": [1, 2], "nodes": ["a", "b"]}"#;
    lines += "\n";
    std::fs::write(&history, lines).expect("a line more");
    let said = train(&run, 2, &overrides);
    let sentence = "ranks began step 4 with different master weights; computed again they are those of neither";
    assert!(said.contains(sentence), "{said}");
    let lines = std::fs::read_to_string(&history).expect("a history");
    assert_eq!(lines.matches(r#""what":"settled","step":4"#).count(), 1, "{lines}");
}

#[test]
fn a_run_says_what_was_planned_and_what_was_measured() {
    let run = Run::new();
    // At stage 0 nothing travels as rows, so that the bytes are known to the byte.
    let said = train(&run, 2, &["train.recompute=auto", "train.zero=0"]);
    for sentence in [
        "planned for each rank: memory ",
        "recomputed: none in all 2 layers; sent in a step: ",
        "measured after 3 steps: memory ",
        "measured after 6 steps: memory ",
        "(+0.0 %)",
    ] {
        assert!(said.contains(sentence), "{sentence:?} is not in:\n{said}");
    }
    // The same bits, whatever the layers recompute.
    let mixed = self::run(2, &["train.recompute={full: 1, selective: 1}", "train.zero=0"]);
    assert_eq!(run.losses(), mixed.losses());
}

#[test]
fn a_run_that_cannot_fit_is_refused_before_its_first_step() {
    let run = Run::new();
    let mut command = run.train(&["train.recompute=auto", "hardware={name: cpu, memory: 20e6}"]);
    let output = command.output().expect("the program starts");
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output);
    assert!(
        said.contains("train.recompute = auto finds nothing that fits: with every layer recomputed a rank needs "),
        "{said}"
    );
    assert!(said.contains("raise train.zero") && run.metrics().is_empty(), "{said}");
}
