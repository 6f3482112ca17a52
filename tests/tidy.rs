//! Invariants told as absences: what may not import what, and where each foreign system's one door is.

use std::fs;
use std::path::{Path, PathBuf};

use whole_program_tests::root;

/// Every Rust file that is ours, with its path from the root.
fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for folder in ["configs", "corpus", "sharding", "trainer", "launcher", "tests", "bench"] {
        walk(&root().join(folder), &mut found);
    }
    assert!(found.len() > 40, "only {} sources were found", found.len());
    found
}

fn walk(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(folder).expect("a folder of the repository") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            walk(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source");
            found.push((path.strip_prefix(root()).expect("below the root").to_path_buf(), text));
        }
    }
}

/// Whether `word` stands in `code`, and not as the end of a longer name (`scratch::` is not `tch::`).
fn holds(code: &str, word: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let mut places = code.match_indices(word);
    places.any(|(at, _)| !word.starts_with(is_name) || !code[..at].ends_with(is_name))
}

/// No file but those under `doors` holds any of `words`. Comments do not count.
fn only_in(doors: &[&str], words: &[&str]) {
    for (path, text) in sources() {
        if doors.iter().any(|door| path.starts_with(door)) || path == Path::new("tests/tidy.rs") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for word in words {
                assert!(
                    !holds(code, word),
                    "{}:{}: {word:?} belongs in {doors:?}",
                    path.display(),
                    number + 1
                );
            }
        }
    }
}

#[test]
fn libtorch_is_known_to_sharding_trainer_and_bench_only() {
    only_in(&["sharding", "trainer", "bench"], &["tch::", "use tch"]);
}

#[test]
fn mpi_has_one_door() {
    only_in(
        &["sharding/src/mpi.rs"],
        &["use mpi::", "mpi::ffi", "MPI_I", "MPI_Wait"],
    );
}

#[test]
fn cuda_has_one_door() {
    only_in(&["sharding/src/cuda"], &["cudarc::", "libloading::", "dlopen"]);
}

#[test]
fn each_protobuf_has_one_door() {
    // SentencePiece's model, TensorBoard's events.
    let doors = [
        "corpus/src/vocabulary/sentencepiece/proto.rs",
        "trainer/src/tensorboard.rs",
    ];
    only_in(&doors, &["prost::", "#[prost"]);
}

#[test]
fn unsafe_code_stays_behind_the_doors() {
    let doors = [
        "sharding/src/mpi.rs",
        "sharding/src/cuda",
        "sharding/src/memory.rs",
        "corpus/src/tokens/indexed.rs",
        "trainer/src/hf/weights.rs",
        "trainer/src/model/gemm",
    ];
    only_in(&doors, &["unsafe "]);
    only_in(&doors, &["allow(unsafe"]);
}

#[test]
fn the_environment_is_read_in_one_place() {
    // Build scripts read what set-up gives them; some tests read how they were asked to run.
    let doors = [
        "launcher/src/place.rs",
        "trainer/build.rs",
        "trainer/tests",
        "configs/tests",
        "launcher/src/report",
        "launcher/tests/plan.rs",
    ];
    only_in(&doors, &["env::var"]);
}

#[test]
fn the_model_knows_no_ranks() {
    let model = sources()
        .into_iter()
        .filter(|(path, _)| path.starts_with("trainer/src/model"));
    for (path, text) in model {
        let code: String = text
            .lines()
            .map(|line| line.split("//").next().unwrap_or_default())
            .collect();
        for word in ["Comm", "comm.", "world", ".rank()"] {
            assert!(!code.contains(word), "{} speaks of {word:?}", path.display());
        }
    }
}

#[test]
fn no_command_goes_through_a_shell() {
    only_in(
        &["tests", "launcher/tests", "launcher/src/supervise.rs"],
        &["Command::new(\"sh\")", "Command::new(\"bash\")"],
    );
}

#[test]
fn imports_point_one_way() {
    let ours = ["configs", "corpus", "sharding", "trainer", "launcher"];
    let allowed: [(&str, &[&str]); 6] = [
        ("bench", &["configs", "corpus", "launcher", "sharding", "trainer"]),
        ("configs", &[]),
        ("corpus", &[]),
        ("sharding", &["configs"]),
        ("launcher", &["configs", "corpus"]),
        ("trainer", &["configs", "corpus", "launcher", "sharding"]),
    ];
    for (name, may) in allowed {
        let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).expect("a manifest");
        for other in ours.iter().filter(|other| **other != name && !may.contains(other)) {
            let uses = manifest
                .lines()
                .any(|line| line.starts_with(&format!("{other}.")) || line.starts_with(&format!("{other} ")));
            assert!(!uses, "{name} may not depend on {other}");
        }
    }
}
