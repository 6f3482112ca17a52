//! A run of the tiny config as a job of the test's cluster: submitted, waited for, compared with an undisturbed one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use whole_program_tests::{Run, prepared, program, text};

use crate::fixture::Cluster;

pub const MINUTE: Duration = Duration::from_secs(60);
/// Of a run that is disturbed and then compared, four ranks with these settings.
pub const STEPS: u64 = 40;
pub const SETTINGS: [&str; 2] = ["train.steps=40", "checkpoint.every_steps=4"];
/// Steps that come slowly enough to be disturbed; the rows, and so the losses, are the same.
pub const SLOWLY: &str = "debug.check_ranks_equal=true";

/// A run of the tiny config on this cluster. `settings` go to every command about it.
pub struct Training<'a> {
    pub cluster: &'a Cluster,
    pub run: Run,
    pub settings: Vec<String>,
}

impl<'a> Training<'a> {
    pub fn new(cluster: &'a Cluster, settings: &[&str]) -> Training<'a> {
        let run = Run::new();
        let mut all = vec![
            format!("folders.prepared={}", prepared().display()),
            format!("folders.run={}", run.folder.path().display()),
            // 12 rows divide among 4 ranks.
            "train.micro_rows=1".to_owned(),
            // The nodes share the cores of one machine.
            "launch.threads_per_rank=1".to_owned(),
        ];
        all.extend(settings.iter().map(|setting| (*setting).to_owned()));
        Training {
            cluster,
            run,
            settings: all,
        }
    }

    /// `panglot WORDS configs/tiny.yaml SETTINGS` on the login node.
    pub fn panglot(&self, words: &[&str], more: &[&str]) -> Command {
        let mut command = self.cluster.login(program("panglot"));
        command
            .args(words)
            .arg("configs/tiny.yaml")
            .args(&self.settings)
            .args(more);
        command
    }

    /// Submitted by `panglot submit`.
    pub fn submit(&self, more: &[&str]) -> u32 {
        let output = format!("output={}", self.out().display());
        let mut command = self.panglot(&["submit"], more);
        command.arg(&output).arg("--json");
        let output = command.output().expect("nsenter starts");
        let said: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
        said["jobs"][0].as_u64().expect("a job's number") as u32
    }

    /// As `submit`, with something in the script replaced.
    pub fn submit_changed(&self, more: &[&str], changes: &[(&str, &str)]) -> u32 {
        let script = self.write_script(more, changes);
        self.cluster.sbatch(&[&script.display().to_string()])
    }

    /// The script that `submit` would hand to Slurm.
    pub fn write_script(&self, more: &[&str], changes: &[(&str, &str)]) -> PathBuf {
        let output = format!("output={}", self.out().display());
        let mut command = self.panglot(&["submit", "--dry-run"], more);
        let output = command.arg(&output).output().expect("nsenter starts");
        assert!(output.status.success(), "{}", text(&output));
        let mut content = String::from_utf8_lossy(&output.stdout).into_owned();
        for (from, to) in changes {
            assert!(content.contains(from), "{content}");
            content = content.replace(from, to);
        }
        let script = self.run.folder.path().join("changed.sbatch");
        fs::write(&script, content).expect("a script");
        script
    }

    /// A script of the test's own as a job, on `nodes` nodes of `ranks` ranks; `$panglot` and `$settings` are set in it.
    pub fn sbatch(&self, nodes: &str, ranks: &str, lines: &str) -> u32 {
        self.sbatch_with(&["--nodes", nodes, "--ntasks-per-node", ranks], lines)
    }

    /// As `sbatch`, with these options.
    pub fn sbatch_with(&self, options: &[&str], lines: &str) -> u32 {
        let script = self.run.folder.path().join("test.sbatch");
        let settings: Vec<String> = self.settings.iter().map(|setting| format!("'{setting}'")).collect();
        let content = format!(
            "#!/bin/bash\npanglot='{}'\nsettings=(configs/tiny.yaml {})\n{lines}\n",
            program("panglot").display(),
            settings.join(" ")
        );
        fs::write(&script, content).expect("a script");
        let out = self.out().display().to_string();
        let script = script.display().to_string();
        self.cluster
            .sbatch(&[options, &["--output", &out, "--open-mode=append", &script]].concat())
    }

    pub fn out(&self) -> PathBuf {
        self.run.folder.path().join("job.out")
    }

    pub fn said(&self) -> String {
        fs::read_to_string(self.out()).unwrap_or_default()
    }

    pub fn wait_for_step(&self, step: usize) {
        self.cluster
            .wait_until(&format!("step {step}"), 2 * MINUTE, || self.run.metrics().len() > step);
    }

    pub fn wait_for_words(&self, words: &str, limit: Duration) {
        self.cluster
            .wait_until(&format!("{words:?}"), limit, || self.said().contains(words));
    }

    pub fn check_completed(&self, job: u32, limit: Duration) {
        self.check_ended(job, limit, ("COMPLETED", 0));
    }

    /// The job's state and its script's exit code.
    pub fn check_ended(&self, job: u32, limit: Duration, expected: (&str, i32)) {
        let ended = self.cluster.ended(job, limit);
        assert_eq!((ended.state.as_str(), ended.code), expected, "{}", self.said());
    }

    /// After whatever happened: the losses and the weights of four ranks that nothing happened to.
    pub fn check_equals_undisturbed(&self) {
        let whole = undisturbed(self.cluster);
        assert_eq!(self.run.losses(), whole.losses, "{}", self.said());
        assert_eq!(self.digests(STEPS), whole.digests, "{}", self.said());
    }

    /// The digests of the last checkpoint's slices.
    pub fn digests(&self, steps: u64) -> Vec<String> {
        self.run.state(steps)
    }
}

/// What [`STEPS`] steps on four ranks come to, wherever the ranks are.
pub struct Undisturbed {
    losses: Vec<f64>,
    digests: Vec<String>,
}

/// Run once, by the job script that people copy.
pub fn undisturbed(cluster: &Cluster) -> &'static Undisturbed {
    static WHOLE: OnceLock<Undisturbed> = OnceLock::new();
    WHOLE.get_or_init(|| {
        let training = Training::new(cluster, &SETTINGS);
        let job = copied_script(&training, "4", "1");
        training.check_completed(job, 3 * MINUTE);
        Undisturbed {
            losses: training.run.losses(),
            digests: training.digests(STEPS),
        }
    })
}

/// `sbatch slurm/train.sbatch configs/tiny.yaml SETTINGS`
pub fn copied_script(training: &Training, nodes: &str, ranks: &str) -> u32 {
    let out = training.out().display().to_string();
    let mut words = vec!["--nodes", nodes, "--ntasks-per-node", ranks, "--output", &out];
    words.extend(["slurm/train.sbatch", "configs/tiny.yaml"]);
    words.extend(training.settings.iter().map(String::as_str));
    training.cluster.sbatch(&words)
}

/// Lines of a job script after which `$panglot` is a script that first does `lines`, such as something on one rank only.
pub fn changed_panglot(training: &Training, lines: &str) -> String {
    let script = training.run.folder.path().join("panglot-changed");
    fs::write(&script, format!("#!/bin/bash\n{lines}\nexec \"$REAL\" \"$@\"\n")).expect("a script");
    executable(&script);
    format!("export REAL=\"$panglot\"; panglot='{}'", script.display())
}

/// A worker that computes the same and is another build: by the id that the linker has left in a note, or by its bytes.
pub fn other_build(training: &Training) -> PathBuf {
    const NOTE: &[u8] = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
    let worker = training.run.folder.path().join("panglot-worker");
    let mut bytes = fs::read(program("panglot-worker")).expect("bytes");
    match bytes.windows(NOTE.len()).position(|window| window == NOTE) {
        Some(note) => bytes[note + NOTE.len()] ^= 1,
        None => bytes.push(0),
    }
    fs::write(&worker, bytes).expect("a copy");
    executable(&worker);
    worker
}

/// The same bytes and one more.
pub fn copy_of(file: &Path, copy: &Path) {
    let mut bytes = fs::read(file).expect("bytes");
    bytes.push(0);
    fs::write(copy, bytes).expect("a copy");
}

pub fn executable(file: &Path) {
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).expect("permissions");
}

/// After whatever happened nothing of ours may be left on any node.
pub fn check_no_orphans(cluster: &Cluster, within: Duration) {
    cluster.wait_until("no process of ours is left", within, || cluster.ours().is_empty());
}
