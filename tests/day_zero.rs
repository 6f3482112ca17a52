//! What a vocabulary costs before any step: the base with its own pieces against the extended model, on the same text.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use whole_program_tests::{panglot, succeed, text};

const NEW_PIECES: f64 = 200.0;

/// Eight languages' worth of words, 60 documents each; LLaMA has pieces for few of them.
fn write_texts(folder: &Path) {
    let alphabets = [
        ("eng_Latn", "aeinost"),
        ("deu_Latn", "bdfklmu"),
        ("vie_Latn", "ăâêôơưđ"),
        ("rus_Cyrl", "абвеилн"),
        ("ell_Grek", "αβγδεικ"),
        ("kat_Geor", "აბგდეიკ"),
        ("hin_Deva", "कखगघचछज"),
        ("amh_Ethi", "ሀለሐመሠረሰ"),
    ];
    for (language, letters) in alphabets {
        let letters: Vec<char> = letters.chars().collect();
        let word = |n: usize| -> String { (0..4).map(|place| letters[(n >> place) % 7]).collect() };
        let document = |n: usize| -> String {
            let words: Vec<String> = (0..40).map(|i| word(n * i % 31 + i % 5)).collect();
            words.join(" ") + "\n"
        };
        fs::create_dir_all(folder.join(language)).expect("a folder");
        let documents: String = (1..=60).map(document).collect();
        fs::write(folder.join(language).join("a.txt"), documents).expect("written");
    }
}

fn panglot_on(command: &str, folder: &Path, arguments: &[&str]) -> Command {
    let mut command = panglot(&[command, "configs/tiny.yaml"]);
    let texts = folder.join("texts");
    command.arg(format!("folders.prepared={}", folder.join("prepared").display()));
    command.arg(format!("folders.run={}", folder.join("run").display()));
    command.arg(format!(
        "corpus.sources=[{{name: words, kind: folders, path: {}}}]",
        texts.display()
    ));
    command
        .arg("vocabulary={new_pieces: 200, alpha: 0.3, max_piece_bytes: 32, multiple_of: 64, new_rows: subword_mean}");
    command.args(arguments);
    command
}

/// Nats a token, over all languages.
fn nats_per_token(evaluation: &Value) -> f64 {
    let sum = |key: &str| -> f64 {
        let languages = evaluation["languages"].as_array().expect("languages");
        languages
            .iter()
            .map(|language| language[key].as_f64().expect("a number"))
            .sum()
    };
    sum("nats") / sum("tokens")
}

#[test]
fn a_vocabulary_is_measured_before_any_step_under_every_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    write_texts(&folder.join("texts"));
    let said = text(&succeed(panglot_on("prepare", folder, &[])));
    assert!(said.contains("`panglot vocab --loss`"), "{said}");
    let said = text(&succeed(panglot_on("vocab", folder, &["--loss=all"])));
    for part in [
        "nats per byte",
        "the base, its own pieces",
        "extended, new_rows: noisy_mean",
        "Mean over 8 languages, ",
    ] {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
    let written = fs::read(folder.join("prepared/vocabulary/day_zero.json")).expect("a file");
    let all: Value = serde_json::from_slice(&written).expect("JSON");
    let extended = all["extended"].as_array().expect("a list");
    let names: Vec<&str> = extended
        .iter()
        .map(|one| one["model"].as_str().expect("a name"))
        .collect();
    assert_eq!(names, ["subword_mean", "mean", "noisy_mean", "normal"]);

    // A random model knows nothing: ln(pieces) nats a token. Its logits have a standard deviation of √64 · 0.02 = 0.16,
    // which adds half of its square; the rest of 0.05 is the sample's.
    let near = |evaluation: &Value, pieces: f64| {
        let (nats, expected) = (nats_per_token(evaluation), pieces.ln());
        assert!((nats - expected).abs() < 0.05, "{nats}, expected {expected}");
    };
    near(&all["base"], 32_000.0);
    for one in extended {
        near(one, 32_000.0 + NEW_PIECES);
        // Hence fewer tokens are fewer nats.
        let bits = |evaluation: &Value| evaluation["macro_bits_per_byte"].as_f64().expect("a number");
        assert!(bits(one) < bits(&all["base"]), "{one}");
        assert!(one["tokens"].as_u64() < all["base"]["tokens"].as_u64());
        assert_eq!(one["languages"][7]["bytes"], all["base"]["languages"][7]["bytes"]);
    }
    let nats: Vec<f64> = extended.iter().map(nats_per_token).collect();
    assert!(nats.windows(2).all(|two| two[0] != two[1]), "{nats:?}");

    // The config's own start, on more ranks: the same text and the same numbers, up to the order of sums.
    let own = succeed(panglot_on("vocab", folder, &["--loss", "--json", "launch.ranks=2"]));
    let own: Value = serde_json::from_slice(&own.stdout).expect("JSON");
    let own = own["day_zero"]["extended"].as_array().expect("a list");
    assert_eq!(own.len(), 1);
    assert!((nats_per_token(&own[0]) - nats[0]).abs() < 1e-6, "{own:?}");

    // Nothing is extended or no such start: told before anything is measured.
    let refused = panglot_on("vocab", folder, &["--loss=median"])
        .output()
        .expect("starts");
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        text(&refused).contains("`median` is no start of new rows; known: subword_mean"),
        "{}",
        text(&refused)
    );
    let nothing = panglot_on("vocab", folder, &["--loss", "vocabulary=null"]).output();
    let said = text(&nothing.expect("starts"));
    assert!(said.contains("has no vocabulary section"), "{said}");
}
