//! What `panglot plan` prints for the shipped recipes, before anything of theirs is prepared.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn plan(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_panglot"))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .arg("plan")
        .args(arguments)
        .output()
        .expect("the program starts")
}

fn printed(arguments: &[&str]) -> String {
    let output = plan(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    String::from_utf8(output.stdout).expect("text")
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&printed(&[arguments, &["--json"]].concat())).expect("JSON")
}

const NOWHERE: &str = "folders.prepared=no/such/folder";

/// PANGLOT_BLESS=1 writes them anew; read the difference before committing it.
#[test]
fn the_recipes_plans_are_those_that_were_read() {
    let mut different = Vec::new();
    for (name, arguments) in [
        ("mala500-7b", &["configs/mala500-7b.yaml", NOWHERE][..]),
        ("emma500-7b", &["configs/emma500-7b.yaml", NOWHERE]),
        ("polylm-1.7b", &["configs/polylm-1.7b.yaml", NOWHERE]),
        ("polylm-13b", &["configs/polylm-13b.yaml", NOWHERE]),
        ("mala500-7b-scaling", &["configs/mala500-7b.yaml", NOWHERE, "--scaling"]),
    ] {
        let all = printed(arguments);
        // What the config says is the config's; from here on it is the planner's.
        let follows: String = match all.split_once("# What follows\n") {
            Some((_, follows)) => follows.to_owned(),
            None => all,
        };
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/plans/{name}.txt"));
        if std::env::var_os("PANGLOT_BLESS").is_some() {
            std::fs::write(&file, &follows).expect("written");
        } else if std::fs::read_to_string(&file).unwrap_or_default() != follows {
            different.push(format!("{name} now reads\n{follows}"));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = std::fs::read_to_string(repository.join("docs/scaling.md")).expect("the page on scaling");
    let table = printed(&["configs/mala500-7b.yaml", NOWHERE, "--scaling"]);
    assert!(
        page.contains(table.trim_end()),
        "docs/scaling.md shows another table than:\n{table}"
    );
}

#[test]
fn the_page_on_scaling_shows_what_was_measured_and_what_is_predicted() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = std::fs::read_to_string(repository.join("docs/scaling.md")).expect("the page on scaling");
    let results = std::fs::read_to_string(repository.join("bench/results/model.json")).expect("the bench's results");
    let results: Vec<Value> = serde_json::from_str(&results).expect("JSON");
    for case in results.iter().filter(|case| case["unit"] == "tokens/s") {
        let name = case["name"].as_str().expect("a name");
        let line = page.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let measured = format!("| {:.0} |", case["ours"].as_f64().expect("a figure"));
        assert!(
            line.is_some_and(|line| line.ends_with(&measured)),
            "docs/scaling.md, {name}: {line:?}, but the results have {measured}"
        );
    }
    let predicted = include_str!("plans/mala500-7b-scaling.txt");
    assert!(
        page.contains(predicted.trim_end()),
        "docs/scaling.md shows another table than `panglot plan` prints"
    );
}

#[test]
fn places_and_hardware_are_asked_for_by_name() {
    let of = |more: &[&str]| json(&[&["configs/mala500-7b.yaml", NOWHERE], more].concat());
    let forecast = |plan: &Value| plan["derived"]["forecast"].clone();
    let plan = of(&["nodes=4", "gpus=4", "hardware=a100", "train.recompute=auto"]);
    assert_eq!(
        (&plan["plan"]["launch"]["ranks"], &plan["plan"]["train"]["recompute"]),
        (&16.into(), &"auto".into())
    );
    let a100 = forecast(&plan);
    assert_eq!(
        (&a100["place"]["nodes"], &a100["place"]["ranks_per_node"]),
        (&4.into(), &4.into())
    );
    assert_eq!(a100["hardware"], "a100");
    assert!(
        a100["memory"]["activations"].as_u64() > Some(1 << 30),
        "auto keeps what fits: {a100}"
    );
    let h100 = forecast(&of(&["nodes=2", "train.recompute=auto"]));
    assert_eq!(
        h100["place"]["ranks_per_node"], 8,
        "as many as the hardware's nodes have"
    );
    assert!(h100["tokens_per_second"].as_f64() > a100["tokens_per_second"].as_f64());
    let slower = forecast(&of(&[
        "nodes=2",
        "train.recompute=auto",
        "hardware={name: h100, gemm_share: 0.35}",
    ]));
    assert!(slower["tokens_per_second"].as_f64() < h100["tokens_per_second"].as_f64());

    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("machines.yaml");
    let shipped =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/hardware/shipped.yaml"));
    std::fs::write(&file, shipped.expect("it is shipped").replace("\nh100:", "\nours:")).expect("written");
    let ours = forecast(&of(&[
        "nodes=2",
        &format!("hardware={{file: {}, name: ours}}", file.display()),
    ]));
    assert_eq!(ours["hardware"], "ours");
}

#[test]
fn what_cannot_be_planned_is_said() {
    for (more, sentence) in [
        ("gpus=0", "`gpus=0` is no number of them; write a whole number above 0"),
        (
            "nodes=3",
            "train.rows_per_step = 128 is not a multiple of 24 (24 ranks × 1 micro_rows); try 144",
        ),
        (
            "hardware=h1000",
            "hardware names `h1000`, which no entry is called; known: a100, cpu, h100, h200, mi250x",
        ),
        (
            "hardware={file: no/such.yaml, name: x}",
            "hardware.file = no/such.yaml cannot be read",
        ),
        (
            "train.recompute={full: 33}",
            "names more layers than the model's 32; name at most 32 in all",
        ),
        (
            "model.published=llama-9",
            "model.published = llama-9 is none that the planner knows; known: llama-2-7b",
        ),
    ] {
        let output = plan(&["configs/mala500-7b.yaml", NOWHERE, more]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{more}: {said}");
        assert!(said.contains(sentence), "{more}: {said}");
    }
    let output = plan(&["configs/tiny.yaml", NOWHERE, "--scaling"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("the model's sizes are known once the base model is there"),
        "{said}"
    );
}
