//! The number of ranks, and how training is divided among them, changes nothing but the order of sums.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;
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
fn a_deterministic_run_asks_libtorch_for_it_and_on_cpus_has_the_bits_of_any_other() {
    let losses = [false, true].map(|deterministic| {
        let run = run(2, &[&format!("debug.deterministic={deterministic}")]);
        let log = std::fs::read_to_string(run.folder.path().join("logs/rank-1.log")).expect("a rank's log");
        let line = format!("libtorch's algorithms deterministic={deterministic}");
        assert!(log.contains(&line), "{log}");
        run.losses()
    });
    assert_eq!(losses[0], losses[1]);
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

/// A bit of a rank's memory is flipped while it trains. Nothing tells two ranks which of them is right, until the same steps are taken
/// again.
#[test]
fn a_flipped_bit_in_one_of_two_ranks_is_found_and_its_rank_named_by_the_attempt_that_follows() {
    let run = Run::new();
    let train = |more: &[&str]| {
        let mut command = run.train(&["train.zero=0", "train.steps=80", "train.check_ranks_every=80"]);
        command.args(more).args(["-n", "2"]);
        command
    };
    let until = |step: u64| {
        let output = train(&[&format!("debug.stop_after={step}")])
            .output()
            .expect("the program starts");
        assert_eq!(output.status.code(), Some(75), "it wants more time: {}", text(&output));
        text(&output)
    };
    until(4);
    let mut command = train(&["checkpoint.every_steps=1000"]);
    let attempt = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut attempt = attempt.expect("the program starts");
    while run.metrics().len() < 8 {
        assert!(attempt.try_wait().expect("it is ours").is_none(), "it ended early");
        thread::sleep(Duration::from_millis(5));
    }
    // No text has this piece, so that its row of the embedding, its master weights too, stays what it was when it was made.
    let row = row_of_the_base(3);
    let flipped = flip_in(worker(&run, 1), &row);
    assert!(flipped > 0, "rank 1 holds the row");
    let said = text(&attempt.wait_with_output().expect("it ends"));
    let both = "rank 0: its master weights differ from others', and no majority says whose are right; rank 1: its master weights differ";
    assert!(
        said.contains("in step 79 ranks differ") && said.contains(both),
        "{said}"
    );
    let began = said.split("start again on as many ranks").next().expect("a text");
    let began = began.rsplit("Step ").next().and_then(|rest| rest.split(' ').next());
    let began: u64 = began
        .and_then(|step| step.parse().ok())
        .unwrap_or_else(|| panic!("no step in {said}"));
    assert!((8..79).contains(&began), "{said}");

    let said = until(began + 1);
    let sentence =
        format!("ranks began step {began} with different master weights; computed again they are those of rank 0 on ");
    assert!(said.contains(&sentence) && said.contains(", so rank 1 on "), "{said}");
    let history = std::fs::read_to_string(run.folder.path().join("history.jsonl")).expect("a history");
    let settled = format!(r#""what":"settled","step":{began}"#);
    assert_eq!(history.matches(&settled).count(), 1, "{history}");
}

/// A row of the base's embedding, as bytes.
fn row_of_the_base(piece: usize) -> Vec<u8> {
    let file = std::fs::read(prepared().join("base_model/model.safetensors")).expect("a base");
    let header = 8 + u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let tensors: Value = serde_json::from_slice(&file[8..header]).expect("JSON");
    let embedding = &tensors["model.embed_tokens.weight"];
    assert_eq!(embedding["dtype"], "F32");
    let number = |value: &Value| value.as_u64().expect("a number") as usize;
    let bytes = 4 * number(&embedding["shape"][1]);
    let start = header + number(&embedding["data_offsets"][0]) + piece * bytes;
    file[start..start + bytes].to_vec()
}

/// The process of a rank of this run.
fn worker(run: &Run, rank: usize) -> u32 {
    let has = |process: &Path, file: &str, text: &str| {
        let found = std::fs::read(process.join(file)).unwrap_or_default();
        found
            .split(|byte| *byte == 0)
            .any(|word| String::from_utf8_lossy(word).contains(text))
    };
    let processes = std::fs::read_dir("/proc")
        .expect("Linux")
        .flatten()
        .map(|entry| entry.path());
    let mut ours = processes.filter(|process| {
        has(process, "cmdline", "panglot-worker")
            && has(process, "cmdline", &run.folder.path().display().to_string())
            && has(process, "environ", &format!("OMPI_COMM_WORLD_RANK={rank}"))
    });
    let found = ours.next().expect("a process of that rank");
    let name = found.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.parse().ok()).expect("a number")
}

/// Changes the lowest bit of each of these bytes' places in a process's memory; how many there are.
fn flip_in(process: u32, bytes: &[u8]) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).expect("a process");
    let memory = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{process}/mem"));
    let memory = memory.expect("the tests may write a child's memory");
    let mut found = 0;
    for line in maps.lines().filter(|line| line.contains(" rw-p ")) {
        let range = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'))
            .expect("a range");
        let [start, end] = [range.0, range.1].map(|at| u64::from_str_radix(at, 16).expect("an address"));
        let mut content = vec![0; (end - start) as usize];
        // What was given back meanwhile, or was never filled.
        if memory.read_exact_at(&mut content, start).is_err() {
            continue;
        }
        let places = (0..content.len().saturating_sub(bytes.len())).step_by(4);
        for at in places.filter(|at| content[*at..].starts_with(bytes)) {
            let flipped = [bytes[0] ^ 1];
            memory
                .write_all_at(&flipped, start + at as u64)
                .expect("it is still there");
            found += 1;
        }
    }
    found
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
    // A model of megabytes beside a program of hundreds: what the allocator and MPI keep is a large part.
    let off = said
        .split("MiB planned (")
        .skip(1)
        .filter_map(|rest| rest.split(" %").next());
    let off: Vec<f64> = off.filter_map(|number| number.parse().ok()).collect();
    assert!(
        off.len() >= 4 && off.iter().all(|percent| percent.abs() < 25.0),
        "{said}"
    );
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
