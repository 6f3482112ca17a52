//! Stopped and resumed is the same run: to the bit on as many ranks, within the order of sums on others.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use whole_program_tests::{Run, succeed, text};

/// Some seconds of steps: a job takes about one second to die of SIGTERM, and must be half-way when it does.
const STEPS: u64 = 40;
const SETTINGS: [&str; 2] = ["train.steps=40", "checkpoint.every_steps=4"];

fn undisturbed(ranks: &str) -> Run {
    let run = Run::new();
    succeed(with_ranks(run.train(&SETTINGS), ranks));
    run
}

fn with_ranks(mut command: Command, ranks: &str) -> Command {
    command.args(["-n", ranks]);
    command
}

/// Starts the run, waits until `step` has been taken, sends `signal` to the launcher and waits for its end.
fn interrupted(run: &Run, ranks: &str, step: usize, signal: Signal) -> std::process::ExitStatus {
    let mut command = with_ranks(run.train(&SETTINGS), ranks);
    // It changes no number, and slows the steps down.
    command.args(["debug.check_ranks_equal=true"]);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    wait_for_step(run, step, &mut child);
    let pid = Pid::from_raw(child.id().try_into().expect("a process number"));
    kill(pid, signal).expect("the program is there");
    let status = child.wait().expect("the program ends");
    let last = run.metrics().len() as u64;
    assert!(last < STEPS, "the signal came in time, after {last} steps");
    status
}

fn wait_for_step(run: &Run, step: usize, child: &mut Child) {
    let started = Instant::now();
    while run.metrics().len() <= step {
        assert!(
            started.elapsed() < Duration::from_secs(120),
            "step {step} was never taken"
        );
        assert!(
            child.try_wait().expect("a child").is_none(),
            "the run ended before step {step}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn resumed(run: &Run, ranks: &str) -> String {
    text(&succeed(with_ranks(run.train(&SETTINGS), ranks)))
}

#[test]
fn killed_and_resumed_equals_undisturbed_to_the_bit() {
    for ranks in ["1", "2"] {
        let whole = undisturbed(ranks);
        let run = Run::new();
        let status = interrupted(&run, ranks, 6, Signal::SIGTERM);
        assert!(!status.success());
        let said = resumed(&run, ranks);
        assert!(said.contains("resumed from step "), "{said}");
        assert_eq!(run.losses(), whole.losses(), "on {ranks} ranks");
        assert_eq!(run.state(STEPS), whole.state(STEPS), "on {ranks} ranks");
    }
}

#[test]
fn asked_to_stop_it_saves_that_step_and_says_that_it_wants_more_time() {
    let whole = undisturbed("2");
    let run = Run::new();
    let status = interrupted(&run, "2", 3, Signal::SIGUSR1);
    assert_eq!(status.code(), Some(75));
    let steps_before = run.metrics().len();
    let said = resumed(&run, "2");
    assert!(
        said.contains(&format!("resumed from step {steps_before} ")),
        "nothing is taken twice: {said}"
    );
    assert_eq!(run.losses(), whole.losses());
}

#[test]
fn a_checkpoint_of_two_ranks_is_read_by_three_and_by_one() {
    let whole = undisturbed("1");
    for reader in ["3", "1"] {
        let run = Run::new();
        interrupted(&run, "2", 6, Signal::SIGTERM);
        resumed(&run, reader);
        assert_eq!(run.losses().len() as u64, STEPS);
        // The order of f32 sums differs between 2, 3 and 1 ranks; see ranks.rs. Later steps are not compared: AdamW divides
        // a gradient that is rounding alone by itself, and after some 35 steps such elements part the runs.
        for (step, (a, b)) in whole.losses().iter().zip(run.losses()).enumerate().take(24) {
            assert!(
                (a - b).abs() < 5e-5,
                "step {step}: {a} undisturbed, {b} over 2 → {reader} ranks"
            );
        }
    }
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_is_taken() {
    let run = Run::new();
    succeed(with_ranks(
        run.train(&["train.steps=6", "checkpoint.every_steps=3"]),
        "2",
    ));
    let newest = run
        .folder
        .path()
        .join("checkpoints/step-00000006/slice-00001-of-00002.safetensors");
    let mut bytes = std::fs::read(&newest).expect("a slice");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&newest, bytes).expect("written");
    let output = succeed(with_ranks(
        run.train(&["train.steps=6", "checkpoint.every_steps=3"]),
        "2",
    ));
    let said = text(&output);
    assert!(
        said.contains("slice-00001-of-00002.safetensors does not match its digest"),
        "{said}"
    );
    assert!(said.contains("resumed from step 3"), "{said}");
}

#[test]
fn another_learning_rate_is_another_run_and_refused() {
    let run = Run::new();
    succeed(run.train(&["train.steps=3", "checkpoint.every_steps=3"]));
    let output = run
        .train(&["train.steps=3", "checkpoint.every_steps=3", "optimizer.lr_lora=0.001"])
        .output()
        .expect("starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output).contains("optimizer.groups.lora.lr: 0.005 → 0.001"),
        "{}",
        text(&output)
    );
    assert!(
        text(&output).contains("checkpoint.allow_changed: [optimizer.groups.lora.lr]"),
        "what to write is said: {}",
        text(&output)
    );
    let said = text(&succeed(run.train(&[
        "train.steps=3",
        "checkpoint.every_steps=3",
        "optimizer.lr_lora=0.001",
        "checkpoint.allow_changed=[optimizer.groups.lora.lr]",
    ])));
    assert!(
        said.contains("changed and allowed: optimizer.groups.lora.lr: 0.005 → 0.001"),
        "{said}"
    );
}
