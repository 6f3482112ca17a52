//! What can be wrong with a config. Every sentence tells the value, the rule and the next move.

use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the config {}: {source}; a ready one is configs/tiny.yaml", file.display())]
    Read { file: PathBuf, source: std::io::Error },
    /// The YAML itself, or its shape.
    #[error("{}:{line}:{column}: {sentence}", file.display())]
    Shape {
        file: PathBuf,
        line: u64,
        column: u64,
        sentence: String,
    },
    #[error("`{text}` on the command line: {sentence}")]
    Override { text: String, sentence: String },
    /// Well-formed, but no run can be made of it.
    #[error("{}: {}", file.display(), as_list(sentences))]
    Rules { file: PathBuf, sentences: Vec<String> },
}

impl ConfigError {
    pub(crate) fn rules(file: &Path, sentences: Vec<String>) -> ConfigError {
        ConfigError::Rules {
            file: file.to_owned(),
            sentences,
        }
    }

    pub(crate) fn shape(file: &Path, yaml: &str, error: &serde_saphyr::Error) -> ConfigError {
        let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
        let mut sentence = sentence(error);
        // The value is in the source only; the parser's message has the type it wanted.
        if let Some(typed) = yaml.lines().nth(line.saturating_sub(1) as usize)
            && !sentence.contains('`')
        {
            sentence = format!("`{}`: {sentence}", typed.trim());
        }
        ConfigError::Shape {
            file: file.to_owned(),
            line,
            column,
            sentence,
        }
    }
}

/// One sentence stays on its line; several are listed below the file's name.
fn as_list(sentences: &[String]) -> String {
    match sentences {
        [one] => one.clone(),
        many => many
            .iter()
            .fold(format!("{} settings cannot run:", many.len()), |text, next| {
                text + "\n  - " + next
            }),
    }
}

/// The parser's complaint in our words; unknown names come with the nearest known one.
pub(crate) fn sentence(error: &serde_saphyr::Error) -> String {
    use serde_saphyr::Error;
    match error.without_snippet() {
        Error::SerdeUnknownField { field, expected, .. } => {
            format!("unknown key `{field}`; {}", remedy(field, expected, "key"))
        }
        Error::SerdeUnknownVariant { variant, expected, .. } => {
            format!("unknown value `{variant}`; {}", remedy(variant, expected, "value"))
        }
        Error::SerdeMissingField { field, .. } => {
            format!("the key `{field}` is missing here; a recipe is complete in itself, so add it")
        }
        Error::DuplicateMappingKey { key, .. } => {
            format!(
                "the key `{}` stands here twice; keep one",
                key.as_deref().unwrap_or("?")
            )
        }
        other => in_yaml_terms(other),
    }
}

/// Rust's names of types are no help to whoever writes YAML.
fn in_yaml_terms(error: &serde_saphyr::Error) -> String {
    let text = error.render_with_formatter(&serde_saphyr::UserMessageFormatter);
    let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    // The caller prints the place before the sentence.
    let message = first
        .rsplit_once(" at line ")
        .map_or(first, |(message, _)| message.trim_end_matches(','));
    match message {
        "invalid u64" | "invalid usize" | "invalid u8" => "a whole number, 0 or more, belongs here".to_owned(),
        "invalid f64" | "invalid floating point" => "a number belongs here".to_owned(),
        "expected string scalar" => "one piece of text belongs here".to_owned(),
        other => other.to_owned(),
    }
}

fn remedy(typed: &str, known: &[&str], what: &str) -> String {
    let nearest = known
        .iter()
        .max_by(|a, b| likeness(typed, a).total_cmp(&likeness(typed, b)));
    match nearest {
        Some(name) if likeness(typed, name) >= 0.7 => format!("the nearest known {what} is `{name}`"),
        _ => format!("known here: {}", known.join(", ")),
    }
}

fn likeness(a: &str, b: &str) -> f64 {
    strsim::jaro_winkler(a, b)
}
