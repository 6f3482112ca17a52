//! The program `panglot` over a pretended worker: exit codes, signals, nothing left behind, results for programs.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::{Duration, Instant};

use launcher::supervise::process_state;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// A tiny corpus of two languages and a base model folder with a tokenizer, so that everything before training is quick
/// and real; only the worker is pretended.
struct Scene {
    folder: TempDir,
    config: PathBuf,
}

const CONFIG: &str = r#"
name: NAME
seed: 1
folders: { prepared: prepared, run: run }
corpus:
  sources: [{ name: texts, kind: folders, path: texts }]
  held_out: 0.2
model: { kind: folder, path: model }
sampling: { alpha: 0.3 }
train:
  steps: 20
  sequence_length: 8
  rows_per_step: 4
  micro_rows: 1
  precision: f32
  recompute: none
  zero: 1
  full: [embed_tokens, lm_head]
optimizer:
  lr_embeddings: 1.0e-3
  beta1: 0.9
  beta2: 0.99
  epsilon: 1.0e-8
  weight_decay: 0
  warmup_steps: 0
  schedule: constant
checkpoint: { every_steps: 5, keep: 2 }
evaluation: { window: 64, stride: 32, tokens_per_batch: 256 }
launch: { ranks: 1 }
"#;

const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
"post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
"model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
"fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": VOCAB, "merges": []}}"#;

impl Scene {
    fn new(name: &str) -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        for language in ["eng_Latn", "deu_Latn"] {
            fs::create_dir_all(here.join("texts").join(language)).unwrap();
            let lines: Vec<_> = (0..40)
                .map(|i| format!("line {i} of {language} {}", "word ".repeat(i % 7)))
                .collect();
            fs::write(here.join("texts").join(language).join("text.txt"), lines.join("\n")).unwrap();
        }
        fs::create_dir(here.join("model")).unwrap();
        // GPT-2's byte alphabet: printable bytes stand for themselves, the others for characters from 256 on.
        let printable = |b: &u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
        let others = (0..=255u8).filter(|b| !printable(b)).count() as u32;
        let letters = (0..=255u8)
            .filter(printable)
            .map(char::from)
            .chain((256..256 + others).filter_map(char::from_u32));
        let vocabulary: serde_json::Map<_, _> = letters.enumerate().map(|(i, c)| (c.to_string(), i.into())).collect();
        let tokenizer = TOKENIZER.replace("VOCAB", &serde_json::to_string(&vocabulary).unwrap());
        fs::write(here.join("model/tokenizer.json"), tokenizer).unwrap();
        fs::write(here.join("model/config.json"), r#"{"vocab_size": 256}"#).unwrap();
        let config = here.join("config.yaml");
        fs::write(&config, CONFIG.replace("NAME", name)).unwrap();
        Scene { folder, config }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_panglot"));
        command.args(words).arg(&self.config).current_dir(self.folder.path());
        command
            .arg("--worker")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-worker.sh"));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Starts training and waits until the worker says that it is ready.
    fn start(&self) -> Running {
        let mut child = self.command(&["train"]).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("ready") {
            line.clear();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "the worker never got ready");
        }
        Running { child, stderr }
    }

    /// A process number that the worker has written.
    fn number(&self, name: &str) -> Pid {
        let file = self.folder.path().join("run").join(name);
        let text = wait_for(|| fs::read_to_string(&file).ok().filter(|text| text.ends_with('\n')));
        Pid::from_raw(text.trim().parse().unwrap())
    }
}

/// `panglot train` on its way.
struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Running {
    fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Its exit code, and what it said until then.
    fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }
}

fn wait_for<T>(mut found: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "waited in vain");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_gone(process: Pid) -> bool {
    // A zombie has ended; only its parent has not asked yet.
    process_state(process).is_none_or(|state| state == 'Z')
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_finished_run_gives_its_result_and_says_what_the_worker_said() {
    let scene = Scene::new("finishes");
    let output = scene.run(&["train", "--json"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("standard output is one JSON result");
    assert_eq!(result, serde_json::json!({ "steps": 20 }));
    for line in ["resumed from step 7", "a library chatters", "pretending"] {
        assert!(said.contains(line), "{line} is missing in {said}");
    }
}

#[test]
fn stages_are_made_once_and_again_when_their_inputs_change() {
    let scene = Scene::new("finishes");
    let stages = |output: &Output| -> Vec<bool> {
        assert!(output.status.success(), "{}", text(&output.stderr));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        result
            .as_array()
            .unwrap()
            .iter()
            .map(|stage| stage["made"].as_bool().unwrap())
            .collect()
    };
    assert_eq!(stages(&scene.run(&["prepare", "--json"])), [true, false, true, true]);
    let again = scene.run(&["prepare", "--json"]);
    assert_eq!(stages(&again), [false, false, false, false]);
    assert!(text(&again.stderr).contains("kept: its inputs are unchanged"));
    // The same text with another date: nothing to do. Another text: everything that is made of it.
    let file = scene.folder.path().join("texts/eng_Latn/text.txt");
    let content = fs::read_to_string(&file).unwrap();
    fs::write(&file, &content).unwrap();
    assert_eq!(stages(&scene.run(&["prepare", "--json"])), [false, false, false, false]);
    fs::write(&file, content + "\none more line").unwrap();
    assert_eq!(stages(&scene.run(&["prepare", "--json"])), [true, false, true, true]);
}

#[test]
fn a_folder_that_is_not_ours_is_not_replaced() {
    let scene = Scene::new("finishes");
    let precious = scene.folder.path().join("prepared/corpus");
    fs::create_dir_all(&precious).unwrap();
    fs::write(precious.join("thesis.txt"), "years").unwrap();
    let output = scene.run(&["corpus"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("exists, but Panglot did not make it"),
        "{}",
        text(&output.stderr)
    );
    assert!(precious.join("thesis.txt").is_file());
}

#[test]
fn a_stage_asks_for_the_one_before_it() {
    let output = Scene::new("finishes").run(&["tokenize"]);
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    assert!(
        said.contains("the corpus is not there yet") && said.contains("run `panglot corpus` first"),
        "{said}"
    );
}

#[test]
fn the_worker_s_exit_code_is_ours() {
    for code in [2, 70, 74, 75, 76] {
        let output = Scene::new(&format!("exits-with-{code}")).run(&["train"]);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains(&format!("training ended with exit code {code}")));
    }
}

#[test]
fn signals_reach_the_worker_and_its_answer_reaches_us() {
    for (signal, name, code) in [(Signal::SIGTERM, "got TERM", 75), (Signal::SIGUSR1, "got USR1", 76)] {
        let scene = Scene::new("waits-for-a-signal");
        let running = scene.start();
        running.send(signal);
        let (ended, said) = running.end();
        assert!(said.contains(name), "{said}");
        assert_eq!(ended, Some(code), "{said}");
    }
}

#[test]
fn who_asks_twice_is_obeyed() {
    let scene = Scene::new("ignores-term");
    let running = scene.start();
    running.send(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(200));
    running.send(Signal::SIGTERM);
    assert_eq!(running.end().0, Some(137));
}

#[test]
fn strays_end_with_their_job() {
    let scene = Scene::new("leaves-a-stray");
    let started = Instant::now();
    let output = scene.run(&["train"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(is_gone(scene.number("stray")));
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_killed_launcher_takes_its_worker_along() {
    let scene = Scene::new("outlives");
    let mut launcher = scene.command(&["train"]).spawn().unwrap();
    let worker = scene.number("worker");
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    wait_for(|| is_gone(worker).then_some(()));
}

/// Ranks on GPUs are processes of `panglot`'s own; here two of them.
fn on_gpus(scene: &Scene) -> Output {
    on_shown_gpus(scene, None)
}

fn on_shown_gpus(scene: &Scene, shown: Option<&str>) -> Output {
    let mut command = scene.command(&["train", "-n", "2"]);
    command.arg("train.device=cuda").env_remove("CUDA_VISIBLE_DEVICES");
    command.envs(shown.map(|shown| ("CUDA_VISIBLE_DEVICES", shown)));
    command.output().unwrap()
}

#[test]
fn ranks_of_our_own_are_nobody_else_s() {
    // As in a step of Slurm's with one task and several GPUs, wired for MPI.
    let scene = Scene::new("says-its-place");
    let mut command = scene.command(&["train", "-n", "2"]);
    command.arg("train.device=cuda").env_remove("CUDA_VISIBLE_DEVICES");
    let step = [
        ("SLURM_JOB_ID", "7"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "0"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_NTASKS", "1"),
        ("PMIX_RANK", "0"),
        ("PMIX_NAMESPACE", "slurm.pmix.7.0"),
    ];
    let output = command.envs(step).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for rank in 0..2 {
        let place = fs::read_to_string(scene.folder.path().join(format!("run/place-{rank}"))).unwrap();
        let expected = format!("LOCAL_RANK={rank}\nRANK={rank}\nSLURM_JOB_ID=7\nSLURM_NTASKS=1\nWORLD_SIZE=2\n");
        assert_eq!(place, expected);
    }
}

#[test]
fn ranks_that_would_share_a_gpu_are_refused() {
    for (shown, expected) in [
        (
            "3",
            "2 ranks would share 1 GPU, all that CUDA_VISIBLE_DEVICES shows; start one rank a GPU (-n 1)",
        ),
        ("NoDevFiles", "CUDA_VISIBLE_DEVICES shows this process no GPU"),
    ] {
        let output = on_shown_gpus(&Scene::new("finishes"), Some(shown));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(expected), "{said}");
    }
    let output = on_shown_gpus(&Scene::new("finishes"), Some("3,GPU-8932f937"));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn of_several_ranks_the_one_that_is_killed_is_named_and_the_others_end() {
    let scene = Scene::new("rank-1-is-killed");
    let started = Instant::now();
    let output = on_gpus(&scene);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(76), "{said}");
    assert!(
        said.contains("panglot: rank 1 (process ") && said.contains("was ended by SIGKILL"),
        "{said}"
    );
    assert!(is_gone(scene.number("worker-0")));
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
}

#[test]
fn a_rank_that_gave_signs_and_is_stopped_is_named_and_killed() {
    let scene = Scene::new("rank-1-stops");
    let started = Instant::now();
    let output = on_gpus(&scene);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(76), "{said}");
    let named = format!(
        "the rank in process {} (1 of this launcher's) gave no sign for 6 s: it is stopped by a signal",
        scene.number("worker-1")
    );
    assert!(said.contains(&named), "{said}");
    assert!(is_gone(scene.number("worker-0")) && is_gone(scene.number("worker-1")));
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[test]
fn the_code_that_the_ranks_agreed_on_is_ours() {
    let output = on_gpus(&Scene::new("finds-rank-2-lost"));
    assert_eq!(output.status.code(), Some(74), "{}", text(&output.stderr));
}

#[test]
fn a_missing_worker_and_a_wrong_config_are_the_user_s_to_mend() {
    let scene = Scene::new("finishes");
    let output = scene
        .command(&["train"])
        .args(["--worker", "/no/worker"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let output = scene.run(&["train", "-n", "3"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("train.rows_per_step = 4 is not a multiple of 3"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn the_command_line_starts_at_once() {
    let fastest = (0..5).map(|_| {
        let started = Instant::now();
        assert!(
            Command::new(env!("CARGO_BIN_EXE_panglot"))
                .arg("--version")
                .output()
                .unwrap()
                .status
                .success()
        );
        started.elapsed()
    });
    // The best of five: the machine may be busy with other tests.
    assert!(fastest.min().unwrap() < Duration::from_millis(50));
}

/// As mpirun does when a signal to it ends its ranks.
#[test]
fn a_run_that_a_signal_ended_says_so_by_its_code() {
    let scene = Scene::new("dies-as-under-mpirun");
    let running = scene.start();
    running.send(Signal::SIGTERM);
    assert_eq!(running.end().0, Some(128 + 15));
}
