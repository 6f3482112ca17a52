//! Everything that can be wrong with what the world hands to this crate, in one list.
//! Each sentence tells the value, the rule and the next move.

use std::path::{Path, PathBuf};

use crate::Language;

/// What went wrong, as a sentence for the person who started the command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },

    #[error("'{value}' is not a language: expected ISO 639-3 and ISO 15924 joined by '_', as in eng_Latn or zho_Hans")]
    LanguageName { value: String },

    #[error("{}:{line}: the text is not UTF-8 (first bad byte at column {column}); convert the file, e.g. with iconv", path.display())]
    NotUtf8 { path: PathBuf, line: usize, column: usize },

    #[error("{}:{line}: {reason}; each line must be a JSON object with a string field \"text\"", path.display())]
    BadJsonLine { path: PathBuf, line: usize, reason: String },

    #[error("{}: {reason}", path.display())]
    BadJson { path: PathBuf, reason: String },

    #[error("{} holds no text: {rule}", path.display())]
    EmptyCorpus { path: PathBuf, rule: &'static str },

    #[error("{}: {reason}; expected the unpacked npm package {package}", path.display())]
    NotThePackage {
        path: PathBuf,
        package: &'static str,
        reason: String,
    },

    #[error("held_out_share = {value} is not between 0 and 1; try 0.1")]
    HeldOutShare { value: f64 },

    #[error("{} exists and is not a folder this command made (no {marker} in it); name another folder or remove it", path.display())]
    Occupied { path: PathBuf, marker: &'static str },

    #[error("{} is not a finished {what} ({marker} is missing); make it with `{command}`", path.display())]
    NotFinished {
        path: PathBuf,
        what: &'static str,
        marker: &'static str,
        command: &'static str,
    },

    #[error("language {language} is not in the corpus at {}", path.display())]
    NoSuchLanguage { language: Language, path: PathBuf },

    #[error("{} was changed since the import (its digest is {found}, the manifest says {expected}); import the corpus again", path.display())]
    AlteredCorpus {
        path: PathBuf,
        expected: String,
        found: String,
    },

    #[error("the tokenizer at {} cannot be used: {reason}", path.display())]
    BadTokenizer { path: PathBuf, reason: String },

    #[error("the tokenizer at {} cannot be extended: {reason}; keep the base's vocabulary by leaving `vocabulary` out", path.display())]
    CannotExtend { path: PathBuf, reason: String },

    #[error("vocabulary.{setting} = {value}: {rule}")]
    VocabularySetting {
        setting: &'static str,
        value: String,
        rule: &'static str,
    },

    #[error(
        "vocabulary.new_pieces = {wanted}, but the corpus yields only {found} pieces seen at least twice; try new_pieces = {found} or more text"
    )]
    TooFewPieces { wanted: usize, found: usize },

    #[error("the tokenizer at {} has no token '{token}', which was asked for as document {place}; name one of its special tokens", path.display())]
    NoSuchToken {
        path: PathBuf,
        token: String,
        place: &'static str,
    },

    #[error("{}: {reason}; make the token shards again with `panglot tokenize`", path.display())]
    BadShards { path: PathBuf, reason: String },

    #[error("sampling.alpha = {value} is not between 0 (languages alike) and 1 (languages by size); MaLA-500 uses 0.3")]
    Alpha { value: f64 },

    #[error("sequence_length = {value} must be at least 1 token")]
    SequenceLength { value: usize },

    #[error("the token shards at {} hold no tokens, so there is nothing to train on; tokenize a corpus with training text", path.display())]
    NoTokens { path: PathBuf },
}

impl Error {
    /// Wraps an operating-system error with what was being done to which path, for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// Wraps a JSON error of a whole file, for `map_err`.
    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Error {
        let path = path.to_path_buf();
        move |e| Error::BadJson {
            path,
            reason: e.to_string(),
        }
    }
}
