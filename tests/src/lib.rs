//! What the whole-program tests share: the repository, its built programs, and runs of `configs/tiny.yaml` in folders of
//! their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use launcher::checkpoint::FOLDER;
use launcher::checkpoint::manifest::{MANIFEST, step_name};
use serde_json::Value;

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the repository")
}

/// A program beside this test's own: `make build` makes both before the tests.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows where it is");
    let path = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST").join(name);
    assert!(
        path.is_file(),
        "{} is missing; build the workspace first (make build)",
        path.display()
    );
    path
}

/// A folder of this test's own, with a run of `configs/tiny.yaml` in it. What is prepared is shared by all tests.
pub struct Run {
    pub folder: tempfile::TempDir,
}

impl Run {
    pub fn new() -> Run {
        Run {
            folder: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    /// `panglot train configs/tiny.yaml` into this run, ready to start.
    pub fn train(&self, overrides: &[&str]) -> Command {
        self.train_in(&prepared(), overrides)
    }

    /// As [`Run::train`], on prepared folders of the test's own.
    pub fn train_in(&self, prepared: &Path, overrides: &[&str]) -> Command {
        let mut command = panglot(&["train", "configs/tiny.yaml"]);
        command.arg(format!("folders.prepared={}", prepared.display()));
        command.arg(format!("folders.run={}", self.folder.path().display()));
        command.args(overrides);
        command
    }

    /// The lines of `metrics.jsonl` that are whole.
    pub fn metrics(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.folder.path().join("metrics.jsonl")).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// Losses by step; the steps must be 0, 1, 2, … with none missing or doubled.
    pub fn losses(&self) -> Vec<f64> {
        let metrics = self.metrics();
        let steps: Vec<u64> = metrics
            .iter()
            .map(|line| line["step"].as_u64().expect("a step"))
            .collect();
        assert_eq!(
            steps,
            (0..metrics.len() as u64).collect::<Vec<_>>(),
            "each step has one line"
        );
        metrics
            .iter()
            .map(|line| line["loss"].as_f64().expect("a loss"))
            .collect()
    }

    /// Digests of the slices in the checkpoint of `step`.
    pub fn state(&self, step: u64) -> Vec<String> {
        let path = self.folder.path().join(FOLDER).join(step_name(step)).join(MANIFEST);
        let manifest: Value = serde_json::from_str(&fs::read_to_string(&path).expect("a manifest")).expect("JSON");
        let files = manifest["files"].as_array().expect("files");
        files
            .iter()
            .map(|file| file["blake3"].as_str().expect("a digest").to_string())
            .collect()
    }
}

impl Default for Run {
    fn default() -> Self {
        Run::new()
    }
}

/// `panglot` with these arguments, from the repository's root.
pub fn panglot(arguments: &[&str]) -> Command {
    let mut command = Command::new(program("panglot"));
    command.current_dir(root()).args(arguments);
    command
}

/// The tiny config's corpus, model, vocabulary and tokens, in the build folder: made by the first test that asks, kept by
/// `panglot prepare` while its inputs are unchanged. Cargo runs one test program at a time.
pub fn prepared() -> PathBuf {
    static PREPARED: OnceLock<PathBuf> = OnceLock::new();
    let prepare = || {
        let folder = program("panglot").with_file_name("prepared-tiny");
        succeed(panglot(&[
            "prepare",
            "configs/tiny.yaml",
            &format!("folders.prepared={}", folder.display()),
        ]));
        folder
    };
    PREPARED.get_or_init(prepare).clone()
}

/// Runs to the end; the output, if it ended well.
pub fn succeed(mut command: Command) -> Output {
    let output = command.output().expect("the program starts");
    assert!(
        output.status.success(),
        "{command:?} ended with {}:\n{}",
        output.status,
        text(&output)
    );
    output
}

/// Standard output and error together.
pub fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Copies a folder and all below it.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder to copy") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).expect("a copy");
        }
    }
}
