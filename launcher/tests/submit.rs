//! The job scripts that `panglot submit` writes: what stands in them, that bash takes them, and that nothing in them is executed
//! that was a value.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use configs::Device;
use launcher::submit::{Settings, Submission, SubmitError, script};

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn job(settings: &str) -> Submission {
    let (settings, overrides) = Settings::take(&words(settings)).unwrap();
    Submission {
        settings,
        overrides,
        config: "configs/tiny.yaml".to_owned(),
        name: "tiny".to_owned(),
        panglot: "panglot".to_owned(),
        nonce: "5eed".to_owned(),
        ..Submission::default()
    }
}

/// The ready scripts in slurm/, and how each was made: `panglot submit CONFIG SETTINGS --program panglot --dry-run`.
fn ready() -> Vec<(&'static str, Submission)> {
    let of = |recipe: &str, settings: &str| Submission {
        config: format!("configs/{recipe}.yaml"),
        name: recipe.to_owned(),
        device: Some(Device::Cuda),
        environment_file: Some("slurm/nccl.env".to_owned()),
        doctor: true,
        ..job(settings)
    };
    vec![
        (
            "mala500-7b",
            of("mala500-7b", "nodes=4 ranks_per_node=4 cpus_per_rank=8 time=1-00:00:00"),
        ),
        (
            "emma500-7b",
            of(
                "emma500-7b",
                "nodes=64 ranks_per_node=4 cpus_per_rank=8 time=1-00:00:00",
            ),
        ),
        (
            "polylm-1.7b",
            of(
                "polylm-1.7b",
                "nodes=4 ranks_per_node=4 cpus_per_rank=8 time=1-00:00:00",
            ),
        ),
        (
            "polylm-13b",
            of(
                "polylm-13b",
                "nodes=64 ranks_per_node=4 cpus_per_rank=8 time=1-00:00:00",
            ),
        ),
    ]
}

#[test]
fn the_ready_scripts_are_what_submit_writes() {
    for (name, job) in ready() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../slurm/{name}.sbatch"));
        let (made, kept) = (
            script(&job).unwrap(),
            std::fs::read_to_string(&file).unwrap_or_default(),
        );
        if made != kept {
            let beside = std::env::temp_dir().join(format!("{name}.sbatch"));
            std::fs::write(&beside, &made).unwrap();
            panic!(
                "{} differs from what is written now; that is in {}",
                file.display(),
                beside.display()
            );
        }
    }
}

#[test]
fn every_script_is_bash_without_a_complaint() {
    let mut all: Vec<Submission> = ready().into_iter().map(|(_, job)| job).collect();
    all.push(Submission {
        array: Some(10),
        ..job("nodes=2")
    });
    all.push(Submission {
        chain: Some(10),
        ..job("nodes=2 time=30")
    });
    all.push(Submission {
        apptainer: Some("my image.sif".to_owned()),
        binds: vec!["/scratch:/scratch".to_owned()],
        modules: vec!["OpenMPI/4.1".to_owned(), "it's".to_owned()],
        device: Some(Device::Cuda),
        ..job("nodes=2")
    });
    for job in all {
        let script = script(&job).unwrap();
        let check = |program: &str, arguments: &[&str]| {
            let child = Command::new(program)
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn();
            let Ok(mut child) = child else {
                eprintln!("SKIPPED: {program} is not installed");
                return;
            };
            child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{program}: {said}\n{script}");
        };
        check("bash", &["-n"]);
        // 1090: the user's own file is not ours to follow.
        check("shellcheck", &["--exclude=SC1090,SC1091", "-"]);
    }
}

#[test]
fn the_options_are_where_slurm_looks_for_them() {
    let script = script(&Submission {
        array: Some(10),
        ..job("time=12:00:00 nodes=4 account=p_1 partition=a,b seed=3 train.steps=5")
    });
    let script = script.unwrap();
    let directives: Vec<&str> = script
        .lines()
        .filter_map(|line| line.strip_prefix("#SBATCH --"))
        .collect();
    assert_eq!(
        directives,
        [
            "nodes=4",
            "ntasks-per-node=1",
            "time=12:00:00",
            "account=p_1",
            "partition=a,b",
            "job-name=tiny",
            "output=panglot-%j.out",
            "open-mode=append",
            "signal=USR1@120",
            "array=1-10%1",
            "no-requeue"
        ]
    );
    assert!(
        script.contains("run=('configs/tiny.yaml' 'seed=3' 'train.steps=5')"),
        "{script}"
    );
}

#[test]
fn values_that_mean_harm_mean_nothing() {
    let hostile = "$(touch /tmp/no) `id`; '\"\\ {{run}} \u{e9}";
    let script = script(&Submission {
        config: hostile.to_owned(),
        modules: vec![hostile.to_owned()],
        ..job("")
    });
    // Bash itself says what the words are.
    let script = script.unwrap();
    let line = script.lines().find(|line| line.starts_with("run=")).unwrap();
    let output = Command::new("bash")
        .args(["-c", &format!("{line}; printf %s \"${{run[0]}}\"")])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), hostile);
}

#[test]
fn what_does_not_fit_is_refused_with_the_rule() {
    let refused = |word: &str| Settings::take(&[word.to_owned()]).unwrap_err().to_string();
    assert_eq!(
        refused("nodse=4"),
        "nodse is not a setting of the job; the nearest is nodes. Settings of the config have a dot, such as train.steps=5"
    );
    assert_eq!(
        refused("nodes=0"),
        "nodes = \"0\" is not a whole number above 0; write it in digits"
    );
    assert!(refused("time=soon").contains("D-HH:MM:SS"));
    assert!(refused("account=a b").contains("characters that no such name has"));
    assert!(refused("partition=--wrap=id").contains("characters"));
    assert!(refused("job_name=a\nb").contains("line break"));
    for mpi in ["pmix&id", "pmix|id", "(id)"] {
        assert!(refused(&format!("mpi={mpi}")).contains("is no such name"), "{mpi}");
    }
    for name in ["a b", "a'b", "$(id)", "a#b", "a\\b"] {
        assert!(
            refused(&format!("job_name={name}")).contains("cannot stand in a line of #SBATCH"),
            "{name}"
        );
    }
    let broken = Submission {
        config: "a\n#SBATCH --wrap=id".to_owned(),
        ..job("")
    };
    assert!(script(&broken).unwrap_err().to_string().contains("line break"));
    let both = Submission {
        array: Some(2),
        chain: Some(2),
        ..job("")
    };
    assert_eq!(script(&both), Err(SubmitError::ArrayAndChain));
    assert!(
        script(&Submission {
            chain: Some(1),
            ..job("")
        })
        .is_err()
    );
}

#[test]
fn chains_wait_for_their_own_jobs_alone() {
    for settings in ["nodes=2", "nodes=2 job_name=mine"] {
        let name = |nonce: &str| {
            let script = script(&Submission {
                chain: Some(3),
                nonce: nonce.to_owned(),
                ..job(settings)
            });
            let script = script.unwrap();
            let line = script.lines().find_map(|line| line.strip_prefix("#SBATCH --job-name="));
            line.unwrap().to_owned()
        };
        assert!(name("a1").ends_with("-a1"), "{}", name("a1"));
        assert_ne!(name("a1"), name("b2"));
    }
}

#[test]
fn times_are_slurm_s() {
    for good in ["90", "30:00", "12:00:00", "1-12", "1-12:00", "1-12:00:00"] {
        assert!(Settings::take(&[format!("time={good}")]).is_ok(), "{good}");
    }
    for bad in ["", "1h", "1-", "-1", "1:2:3:4", "1-1-1", "9999999"] {
        assert!(Settings::take(&[format!("time={bad}")]).is_err(), "{bad}");
    }
}

/// `panglot` with these arguments in the repository's root, as a rank that these variables name: its code and what it says.
fn panglot(arguments: &str, variables: &[(&str, &str)]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_panglot"))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .args(words(arguments))
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(said).unwrap())
}

#[test]
fn a_job_may_have_other_ranks_than_the_config() {
    let folder = tempfile::tempdir().unwrap();
    let run = format!("folders.run={}", folder.path().join("run").display());
    // 12 rows: five ranks cannot train, but a job of four asks what is left to do.
    let config = format!("configs/tiny.yaml {run} launch.ranks=5 train.micro_rows=1");
    let (code, said) = panglot(&format!("job is-finished {config}"), &[]);
    assert_eq!((code, said.as_str()), (launcher::exit::NOT_DONE, ""));
    let (code, said) = panglot(&format!("submit {config} nodes=4 --dry-run"), &[]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = panglot(&format!("plan {config} nodes=2 gpus=2"), &[]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = panglot(&format!("submit {config} nodes=5 --dry-run"), &[]);
    assert!(code == 2 && said.contains("not a multiple of 5"), "{said}");
    let (code, said) = panglot(&format!("submit {config} --dry-run"), &[]);
    assert!(
        code == 2 && said.contains("launch.ranks = 5, and nothing says where"),
        "{said}"
    );
}

#[test]
fn a_job_that_the_planner_would_not_start_is_warned_of() {
    let submit = "submit configs/polylm-13b.yaml nodes=64 gpus_per_node=4 --dry-run";
    let (code, said) = panglot(submit, &[]);
    assert!(code == 0 && !said.contains("warning"), "{said}");
    assert!(said.contains("#SBATCH --ntasks-per-node=4\n"), "a rank a GPU: {said}");
    let (code, said) = panglot(&format!("{submit} train.zero=1 hardware=h100"), &[]);
    assert!(code == 0 && said.contains("warning: a rank takes "), "{said}");
    let (code, said) = panglot(&format!("{submit} hardware=mi250x"), &[]);
    assert!(
        code == 0 && said.contains("warning: Panglot does not run on mi250x"),
        "{said}"
    );
}

#[test]
fn ranks_of_a_job_do_not_each_prepare_or_measure() {
    let rank = [("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")];
    for command in [
        "prepare configs/tiny.yaml",
        "eval configs/tiny.yaml",
        "export configs/tiny.yaml",
    ] {
        let (code, said) = panglot(command, &rank);
        assert!(code == 2 && said.contains("is started once"), "{command}: {said}");
    }
}
