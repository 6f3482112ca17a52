//! `panglot report`: what the page and the tables hold, and the page in a real browser: it draws, sorts, filters, can be read by
//! keyboard, on a phone, in both colour schemes, and fetches nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use launcher::report::generated::{self, HOSTILE};
use serde_json::Value;
use whole_program_tests::{Run, panglot, program, root, succeed, text};

const LANGUAGES: usize = 534;
/// What a page of so many languages may weigh.
const MOST_BYTES: u64 = 3_000_000;

/// A run of 534 languages, made once.
fn generated_run() -> &'static Path {
    static RUN: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, run) = RUN.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let run = generated::generate(&program("panglot"), folder.path(), LANGUAGES).expect("a generated run");
        (folder, run)
    });
    run
}

/// `panglot report … --json`.
fn report(arguments: &[&str]) -> Value {
    let output = succeed(panglot(&[&["report", "--json"], arguments].concat()));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A tiny run that was stopped after three of six steps, and went on.
fn tiny_run() -> Run {
    let run = Run::new();
    let steps = ["train.steps=6", "checkpoint.every_steps=2"];
    let stopped = run
        .train(&[&steps[..], &["debug.stop_after=3"]].concat())
        .output()
        .expect("it starts");
    assert_eq!(stopped.status.code(), Some(75), "{}", text(&stopped));
    succeed(run.train(&steps));
    run
}

#[test]
fn a_real_run_is_told_as_it_was() {
    let run = tiny_run();
    let folder = run.folder.path().to_str().expect("UTF-8");
    let all = report(&[folder, "--csv"]);
    let told = &all["runs"][0];
    let list = |name: &str| {
        told[name]
            .as_array()
            .unwrap_or_else(|| panic!("{name} is a list"))
            .clone()
    };

    // Steps, as the metrics have them.
    let metrics = run.metrics();
    let losses = |lines: &[Value]| {
        lines
            .iter()
            .map(|line| line["loss"].as_f64().expect("a loss"))
            .collect::<Vec<_>>()
    };
    assert_eq!(losses(&list("steps")), losses(&metrics));
    assert_eq!(list("steps")[5]["lr_lora"], metrics[5]["lr"]["lora"]);

    // A whole run reads what was planned, to the token.
    let languages = list("languages");
    let rows = metrics
        .iter()
        .flat_map(|line| line["languages"].as_object().expect("rows by language").values());
    assert_eq!(
        rows.map(|rows| rows.as_u64().expect("a count")).sum::<u64>(),
        72,
        "6 steps of 12 rows"
    );
    let read = languages
        .iter()
        .filter(|language| language["realised_tokens"].as_u64() > Some(0));
    assert!(read.count() > 40, "most of 72 rows are in a language of their own");
    for language in &languages {
        assert_eq!(language["planned_tokens"], language["realised_tokens"], "{language}");
    }
    let afar = languages
        .iter()
        .find(|language| language["language"] == "aar_Latn")
        .expect("Afar");
    assert_eq!(
        (&afar["name"], &afar["family"]),
        (&Value::from("Afar"), &Value::from("Afro-Asiatic"))
    );
    assert!(afar["latitude"].is_number(), "the corpus knows where Afar is spoken");

    // Where a language is spoken may be told.
    let unplaced = languages.iter().find(|language| language["latitude"].is_null());
    let unplaced = unplaced.expect("the corpus does not know all")["language"]
        .as_str()
        .expect("a code");
    let places = run.folder.path().join("places.tsv");
    fs::write(&places, format!("{unplaced}\t-4.5\t15.25\n")).expect("a file");
    let again = report(&[folder, "--places", places.to_str().expect("UTF-8")]);
    let placed = again["runs"][0]["languages"].as_array().expect("languages").iter();
    let placed: Vec<&Value> = placed.filter(|language| language["language"] == unplaced).collect();
    assert_eq!(
        (&placed[0]["latitude"], &placed[0]["longitude"]),
        (&Value::from(-4.5), &Value::from(15.25))
    );

    // Two attempts by the clock, and every checkpoint.
    let timeline = list("timeline");
    let of = |kind: &str| {
        timeline
            .iter()
            .filter(|event| event["kind"] == kind)
            .cloned()
            .collect::<Vec<_>>()
    };
    let attempts = of("attempt");
    assert_eq!(
        attempts.iter().map(|it| it["step"].as_u64()).collect::<Vec<_>>(),
        [Some(0), Some(3)]
    );
    assert!(
        attempts[0]["text"]
            .as_str()
            .expect("text")
            .ends_with("ended by itself after step 3"),
        "{timeline:?}"
    );
    assert_eq!(
        of("checkpoint")
            .iter()
            .map(|it| it["step"].as_u64())
            .collect::<Vec<_>>(),
        [2, 3, 4, 6].map(Some)
    );
    let share: f64 = list("time")
        .iter()
        .map(|part| part["share"].as_f64().expect("a share"))
        .sum();
    assert!((share - 1.0).abs() < 1e-6, "the time adds up: {share}");
    let says = |list: &[Value], key: &str| {
        list.iter()
            .find(|row| row["key"] == key)
            .map(|row| row["value"].clone())
    };
    assert_eq!(says(&list("plan"), "train.steps"), Some(Value::from("6")));
    assert!(says(&list("environment"), "processor").is_some());

    // The same as CSV, and the page beside it.
    let csv = fs::read_to_string(run.folder.path().join("report/languages.csv")).expect("languages.csv");
    assert_eq!(csv.lines().count(), languages.len() + 1);
    assert!(
        csv.starts_with("run,language,name,script,family,group,latitude,"),
        "{}",
        &csv[..80]
    );
    assert_eq!(all["csv"].as_array().map(Vec::len), Some(8));
    assert!(run.folder.path().join("report.html").is_file());
}

#[test]
fn what_cannot_be_drawn_is_said() {
    let empty = tempfile::tempdir().expect("a temporary folder");
    let folder = empty.path().to_str().expect("UTF-8");
    let said = |arguments: &[&str]| {
        let output = panglot(&[&["report"], arguments].concat()).output().expect("it starts");
        assert_eq!(output.status.code(), Some(2));
        text(&output)
    };
    assert!(said(&[folder]).contains("plan.json"));
    assert!(said(&[]).contains("CONFIG|RUN"), "which run?");
    assert!(said(&[folder; 7]).contains("name at most 6"));
}

#[test]
fn the_page_works_in_a_browser() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let generated = generated_run().to_str().expect("UTF-8");
    let tiny = tiny_run();
    let out = |name: &str| format!("--out={}", at(name).display());
    report(&[generated, &out("one.html")]);
    report(&[generated, tiny.folder.path().to_str().expect("UTF-8"), &out("two.html")]);
    let page = fs::read_to_string(at("one.html")).expect("a page");
    assert!((page.len() as u64) < MOST_BYTES, "{} bytes", page.len());
    assert_eq!(page.matches("</script").count(), 2, "no data ends a script");
    eprintln!("the page of {LANGUAGES} languages has {} bytes", page.len());
    let Some(browser) = browser() else {
        eprintln!("SKIPPED: no Chromium is here, so nobody looked at the page; `setup/system.sh test` installs one");
        return;
    };
    fs::copy(root().join("tests/report/harness.html"), at("harness.html")).expect("the harness");

    let found = look(&browser, &at("harness.html"), &[]);
    let strings = |name: &str| -> Vec<String> {
        let list = found[name]
            .as_array()
            .unwrap_or_else(|| panic!("{name}: {}", found[name]));
        list.iter()
            .map(|value| value.as_str().unwrap_or_default().to_owned())
            .collect()
    };
    // It draws, all of it, and nothing that is no number.
    let plots = [
        "loss",
        "held-out",
        "rates",
        "norm",
        "changes",
        "strip",
        "map",
        "scatter",
        "fertility",
        "tokens",
        "clock",
        "speed",
        "memory",
        "sent",
    ];
    for plot in plots {
        assert!(found["drawn"][plot].as_u64() > Some(12), "{plot}: {}", found["drawn"]);
    }
    assert!(
        found["drawn"]["map"].as_u64() > Some(LANGUAGES as u64),
        "a dot a language: {}",
        found["drawn"]
    );
    for zero in [
        "broken",
        "broken later",
        "two broken",
        "fetched",
        "images",
        "reachable",
        "unnamed",
        "two overflow",
    ] {
        assert_eq!(found[zero], 0, "{zero}");
    }
    assert_eq!(found["title"], "generated", "no data was run");
    assert_eq!(strings("hostile"), [HOSTILE], "it is shown as the text it is");

    // It sorts: numbers as numbers, names as names, and says so.
    let numbers = |name: &str| -> Vec<f64> {
        let number = |text: &String| {
            text.replace('−', "-")
                .trim_start_matches('+')
                .parse()
                .expect("a number")
        };
        strings(name).iter().map(number).collect()
    };
    assert_eq!(found["rows"], LANGUAGES);
    assert_eq!(
        (&found["sorted at first"], &found["sorted backwards"]),
        (&"ascending".into(), &"descending".into())
    );
    assert_eq!(numbers("differences").len(), LANGUAGES);
    assert!(
        numbers("differences").is_sorted() && numbers("differences")[0] < 0.0,
        "the greatest gain first"
    );
    assert!(numbers("differences backwards").iter().rev().is_sorted());
    assert!(strings("languages").is_sorted());
    assert_eq!(found["sorted by language"], serde_json::json!(["ascending", null]));

    // It filters, the plots too: 17, 117 to 517, and 170 to 179.
    assert_eq!(found["searched"], 16);
    assert_eq!(found["searched says"], "16 of 534 languages");
    assert_eq!(found["dim"], LANGUAGES - 16);
    let of_a_script = strings("of a script");
    assert!(
        of_a_script.len() == 67 && of_a_script.iter().all(|name| name.ends_with("_Ethi")),
        "{of_a_script:?}"
    );
    // What is shown is what is saved.
    let saved = strings("saved");
    assert_eq!(found["saved as"], "languages.csv");
    assert!(saved[0].starts_with("Language,Name,"), "{}", saved[0]);
    let saved: Vec<&str> = saved[1..]
        .iter()
        .filter_map(|line| Some(line.split_once(',')?.0))
        .collect();
    assert_eq!(saved, of_a_script);
    assert_eq!(found["all again"], LANGUAGES);
    assert_eq!(found["strip"], "Before by family");

    // By keys, and aloud.
    assert_eq!(
        (&found["focused"], &found["tip after escape"]),
        (&true.into(), &true.into())
    );
    assert!(
        found["tip"].as_str().expect("text").contains("nats per document"),
        "{}",
        found["tip"]
    );
    assert!(
        found["said"].as_str().expect("text").contains("Language number"),
        "{}",
        found["said"]
    );

    // Light and dark, from a phone on.
    for overflow in found["overflow"].as_object().expect("widths").values() {
        assert_eq!(overflow, 0, "{}", found["overflow"]);
    }
    assert!(found["chart on a phone"].as_f64() < Some(345.0));
    let dark = look(
        &browser,
        &at("harness.html"),
        &["--blink-settings=preferredColorScheme=0"],
    );
    assert_eq!(
        (&found["paper"], &dark["paper"]),
        (&found["paper light"], &found["paper dark"])
    );
    assert_ne!(found["paper"], dark["paper"], "the page follows the reader's system");
    for found in [&found, &dark] {
        for contrast in ["contrast", "contrast light", "contrast dark"] {
            assert!(found[contrast].as_f64() >= Some(4.5), "{contrast}: {}", found[contrast]);
        }
    }

    // Two runs side by side.
    assert_eq!(strings("two runs"), ["generated", "tiny"]);
    let headings = strings("two headings");
    assert!(headings.iter().any(|it| it == "Tokensgenerated: read"), "{headings:?}");
    assert!(headings.iter().any(|it| it == "Tokenstiny: read"), "{headings:?}");
    assert!(found["two drawn"]["loss"].as_u64() > Some(12));
    let [all, differ] = [0, 1].map(|at| found["two differ"][at].as_u64().expect("a count"));
    assert!(0 < differ && differ < all, "{differ} of {all} lines differ");
}

/// The first Chromium by its usual names.
fn browser() -> Option<PathBuf> {
    let starts = |name: &&str| {
        Command::new(name)
            .arg("--version")
            .output()
            .is_ok_and(|it| it.status.success())
    };
    let names = ["chromium-headless-shell", "chromium", "google-chrome"];
    names.iter().find(|name| starts(name)).map(PathBuf::from)
}

/// What the harness found; the console must have its own line and no other.
fn look(browser: &Path, harness: &Path, options: &[&str]) -> Value {
    let profile = tempfile::tempdir().expect("a temporary folder");
    let mut command = Command::new(browser);
    command
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
        ])
        .args(["--virtual-time-budget=15000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(options)
        .arg(format!("file://{}", harness.display()));
    let output = succeed(command);
    let dom = String::from_utf8_lossy(&output.stdout);
    let console: Vec<String> = String::from_utf8_lossy(&output.stderr)
        .lines()
        .filter(|line| line.contains("CONSOLE"))
        .map(str::to_owned)
        .collect();
    let found = dom
        .split_once("<pre id=\"found\">")
        .and_then(|(_, rest)| Some(rest.split_once("</pre>")?.0));
    let found = decoded(found.unwrap_or_else(|| panic!("the harness wrote nothing: {console:?}")));
    let found: Value = serde_json::from_str(&found).unwrap_or_else(|error| panic!("{error}: {console:?}"));
    assert_eq!(found["failed"], Value::Null, "{console:?}");
    assert!(
        console.len() == 1 && console[0].contains("the harness speaks"),
        "{console:?}"
    );
    found
}

/// Of `encodeURIComponent`.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit =
                    |byte: Option<u8>| (byte.expect("two digits") as char).to_digit(16).expect("hexadecimal") as u8;
                16 * digit(rest.next()) + digit(rest.next())
            }
            other => other,
        });
    }
    String::from_utf8(bytes).expect("UTF-8")
}
