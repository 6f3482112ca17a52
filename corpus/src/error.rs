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

    #[error("{}: {language} is unknown: {rule}", path.display())]
    UnknownCode {
        language: Language,
        path: PathBuf,
        rule: &'static str,
    },

    #[error("{}: the source {source_name} has the language {language} twice; put both into one", path.display())]
    LanguageTwice {
        language: Language,
        source_name: String,
        path: PathBuf,
    },

    #[error("two sources are named {name}; give each a name of its own")]
    SourceTwice { name: String },

    #[error("the source name '{name}' is not plain: use a-z, 0-9 and '-', such as glot500")]
    SourceName { name: String },

    #[error("another import writes {}; wait for its end, or stop it", path.display())]
    ImportRuns { path: PathBuf },

    #[error("the import was stopped because another language failed")]
    Stopped,

    #[error("a temporary file of the import came back changed; look after the disk, and import again")]
    DamagedWork,

    #[error("{}:{line}: the text is not UTF-8 (first bad byte at column {column}); convert the file, e.g. with iconv", path.display())]
    NotUtf8 { path: PathBuf, line: usize, column: usize },

    #[error("{}:{line}: {reason}; each line must be a JSON object with {expected}", path.display())]
    BadJsonLine {
        path: PathBuf,
        line: usize,
        reason: String,
        expected: String,
    },

    #[error("{}:{line}: {reason}", path.display())]
    BadLine { path: PathBuf, line: usize, reason: String },

    #[error("{}: row {row}: {reason}", path.display())]
    BadRow { path: PathBuf, row: usize, reason: String },

    #[error("{}:{line}: the line is longer than {most_mebibytes} MiB; is the file text? If so, break it into lines", path.display())]
    LineTooLong {
        path: PathBuf,
        line: usize,
        most_mebibytes: usize,
    },

    #[error("{}: the archive is damaged or cut off behind line {last_line} ({reason}); make or fetch it again", path.display())]
    DamagedArchive {
        path: PathBuf,
        last_line: usize,
        reason: String,
    },

    #[error("{}: the table is damaged or cut off behind row {last_row} ({reason}); make or fetch it again", path.display())]
    DamagedTable {
        path: PathBuf,
        last_row: usize,
        reason: String,
    },

    #[error("{} has no column '{column}'; its columns are: {columns}", path.display())]
    NoSuchColumn {
        path: PathBuf,
        column: String,
        columns: String,
    },

    #[error("{}: column '{column}' holds {found}, not text; name a column of strings", path.display())]
    ColumnWithoutText {
        path: PathBuf,
        column: String,
        found: String,
    },

    #[error("{} does not hold records by its name; expected .jsonl, .json or .ndjson (also with .gz or .zst), .parquet or .arrow", path.display())]
    NoRecords { path: PathBuf },

    #[error("{} names no language; call it like eng_Latn.jsonl, put it into a folder like eng_Latn, or move it away", path.display())]
    FileWithoutLanguage { path: PathBuf },

    #[error("language {language} is there twice, as {} and {}; put both into one folder named {language}, or move one away", first.display(), second.display())]
    LanguageInTwoPlaces {
        language: Language,
        first: PathBuf,
        second: PathBuf,
    },

    #[error("{setting} = \"{template}\": {reason}")]
    BadTemplate {
        setting: &'static str,
        template: String,
        reason: String,
    },

    #[error("{} has {source_lines} lines and {} has {target_lines}; the two sides of parallel text must have one line for each other", source_path.display(), target_path.display())]
    UnequalSides {
        source_path: PathBuf,
        source_lines: usize,
        target_path: PathBuf,
        target_lines: usize,
    },

    /// What was said of a place when its file was divided by language, said again when the language is read.
    #[error("{sentence}")]
    Unreadable { sentence: String },

    #[error("corpus.{setting} = {value}: {rule}")]
    HygieneSetting {
        setting: &'static str,
        value: String,
        rule: &'static str,
    },

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

    #[error("held_out = {value} is not a share, 0 ≤ held_out < 1; try 0.1")]
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

    #[error("the unigram vocabulary cannot be trained: {reason}; try more pieces than the text has characters")]
    Unigram { reason: String },

    #[error(
        "vocabulary.new_pieces = {wanted}, but the text has {characters} characters that the base has no piece for; try more, or \
         a lower words.character_coverage"
    )]
    TooManyCharacters { wanted: usize, characters: usize },

    #[error("{} is not a SentencePiece model: {reason}; copy it again from where it came", path.display())]
    BadSentencePiece { path: PathBuf, reason: String },

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

    #[error("sampling.{key} = {value}: {rule}")]
    Sampling { key: String, value: String, rule: String },

    #[error(
        "sampling.max_epochs = {max_epochs} leaves about {possible} tokens to read, the run wants {wanted}; shorten the run to that, \
         raise max_epochs, or add text"
    )]
    TooFewTokens {
        max_epochs: f64,
        wanted: u64,
        possible: u64,
    },

    #[error(
        "document {key} of {language}: loss_from = {value} is not a place between two characters of its {length} bytes; \
         import the corpus again"
    )]
    LossFrom {
        language: Language,
        key: String,
        value: usize,
        length: usize,
    },

    #[error(
        "{}: the name says no language; a source of Megatron files has <lll_Ssss>.bin or <lll_Ssss>_text_document.bin, \
         as in eng_Latn.bin: rename or remove it",
        path.display()
    )]
    MegatronName { path: PathBuf },

    #[error("{} and {} are both of {language}; keep one of them, or make them two sources", first.display(), second.display())]
    MegatronTwice {
        language: Language,
        first: PathBuf,
        second: PathBuf,
    },

    #[error(
        "{}: token {token} of document {document} is {id}, and the vocabulary has ids 0 to {} only; the file was made with \
         another tokenizer: make it again with this one",
        path.display(), vocabulary_size.saturating_sub(1)
    )]
    IdOutside {
        path: PathBuf,
        id: i64,
        /// Counted from 0, as the token within it.
        document: u64,
        token: u64,
        vocabulary_size: usize,
    },

    #[error("sequence_length = {value} is not between 1 and 2,147,483,647 tokens")]
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
