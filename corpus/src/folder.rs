//! The corpus on disk: `<source>/<lll_Ssss>/train.jsonl` and `held_out.jsonl`, one `{"key", "text"}` a line, `corpus.json`.
//! The manifest carries counts and digests, so that a missing or altered language is named, never trained on.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::finished::read_manifest;
use crate::{Document, Error, Language, NGrams, Progress, Result, Split};

/// The file that says a corpus folder is finished.
pub(crate) const MANIFEST: &str = "corpus.json";

/// `corpus.json`: what the import kept, by language and source, in the order of the languages' names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorpusManifest {
    /// Version of this layout.
    pub format: u32,
    /// In the config's order.
    pub sources: Vec<SourceEntry>,
    pub seed: u64,
    pub held_out_share: f64,
    pub held_out_most: Option<u64>,
    pub deduplicate_lines: bool,
    pub hygiene: Hygiene,
    /// Over every language's digest: the corpus's identity.
    pub digest: String,
    /// A language stands here once for every source that has it.
    pub languages: Vec<LanguageEntry>,
    /// What a source had and the corpus has not, each with its reason.
    pub skipped: Vec<Skipped>,
    pub unreadable: Unreadable,
}

impl CorpusManifest {
    /// Documents and bytes of one half, over all languages.
    pub fn total(&self, split: Split) -> (u64, u64) {
        let counts = self.languages.iter().map(|entry| entry.counts(split));
        counts.fold((0, 0), |(documents, bytes), c| {
            (documents + c.documents, bytes + c.bytes)
        })
    }

    pub(crate) fn digest_of(languages: &[LanguageEntry]) -> String {
        digest_of_digests(
            languages
                .iter()
                .flat_map(|entry| [entry.source.as_str(), entry.language.as_str(), &entry.digest]),
        )
    }
}

/// What was asked for beyond whole duplicates.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Hygiene {
    /// Texts are in Unicode's NFC.
    pub nfc: bool,
    /// Similarity from which on documents are near duplicates; `None`: not looked for.
    pub near_duplicates: Option<f64>,
    /// `None`: not looked for.
    pub evaluations: Option<EvaluationsEntry>,
}

/// Evaluation texts that no training document shares an n-gram with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvaluationsEntry {
    pub files: Vec<PathBuf>,
    pub n_grams: NGrams,
    /// Texts that were looked for, in part or whole.
    pub texts: u64,
    /// Texts too short to be looked for: they would be found by chance.
    pub too_short: u64,
}

/// One source of a corpus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceEntry {
    pub name: String,
    /// The reader: `udhr`, `folders`, ….
    pub kind: String,
    /// As the config says; `None`: it says nothing.
    pub licence: Option<String>,
}

/// One language of one source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LanguageEntry {
    /// The source's name, and its folder.
    pub source: String,
    pub language: Language,
    /// For people to read, as the source names it.
    pub name: String,
    pub train: Counts,
    pub held_out: Counts,
    /// Documents dropped because another of the language has the same text, here or in another source.
    pub duplicates: u64,
    /// Lines left out of documents because they stood in the language before.
    pub lines_dropped: u64,
    /// Documents dropped because one that is nearly the same was kept.
    pub near_duplicates: u64,
    /// Training documents dropped because some language holds out the same text.
    pub contaminated: u64,
    /// Training documents dropped because they share an n-gram with an evaluation text; `contamination.jsonl` lists which.
    pub in_evaluations: u64,
    /// Places that could not be read.
    pub unreadable: u64,
    /// Where the language is at home, in degrees, if the source says so.
    pub latitude: Option<f64>,
    pub longitude: Option<f64>,
    /// Over both files.
    pub digest: String,
}

impl LanguageEntry {
    pub fn counts(&self, split: Split) -> &Counts {
        match split {
            Split::Train => &self.train,
            Split::HeldOut => &self.held_out,
        }
    }

    /// Where its files lie in the corpus folder.
    pub(crate) fn folder(&self, corpus: &Path) -> PathBuf {
        corpus.join(&self.source).join(self.language.as_str())
    }

    /// Documents that were read and not written.
    pub fn dropped(&self) -> u64 {
        self.duplicates + self.near_duplicates + self.contaminated + self.in_evaluations
    }
}

/// The size of one file of documents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub documents: u64,
    /// Of UTF-8 text, without keys and JSON.
    pub bytes: u64,
    /// BLAKE3 of the file.
    pub digest: String,
}

/// Something the source had that could not be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    pub what: String,
    pub why: String,
}

/// Places that could not be read and were skipped because the config says so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unreadable {
    pub places: u64,
    /// The first of them, with file, line and reason.
    pub first: Vec<String>,
}

/// A file of the corpus that is not as the import left it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    pub source: String,
    pub language: Language,
    pub file: PathBuf,
    pub what: String,
}

/// A corpus folder, opened. Only the manifest is read until documents are asked for.
#[derive(Clone, Debug)]
pub struct Corpus {
    folder: PathBuf,
    manifest: CorpusManifest,
}

/// One line of a `.jsonl`.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    key: Cow<'a, str>,
    #[serde(borrow)]
    text: Cow<'a, str>,
    /// Left out where it is 0, which is nearly everywhere.
    #[serde(default, skip_serializing_if = "is_zero")]
    loss_from: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Corpus {
    /// Opens a finished corpus folder.
    pub fn open(folder: &Path) -> Result<Corpus> {
        let manifest = read_manifest(folder, MANIFEST, "corpus", "panglot corpus")?;
        Ok(Corpus {
            folder: folder.to_path_buf(),
            manifest,
        })
    }

    pub fn manifest(&self) -> &CorpusManifest {
        &self.manifest
    }

    /// The corpus's identity: changes when any document does.
    pub fn digest(&self) -> String {
        self.manifest.digest.clone()
    }

    /// Each language once, whatever the number of sources that have it, by name.
    pub fn languages(&self) -> Vec<Language> {
        let languages: BTreeSet<_> = self.manifest.languages.iter().map(|entry| &entry.language).collect();
        languages.into_iter().cloned().collect()
    }

    /// One half of a language of a source, document by document in the order of the file: shuffled, and the same in every
    /// import. What was read is trustworthy once the last one has come: a changed file ends with an error in its place.
    pub fn documents(&self, entry: &LanguageEntry, split: Split) -> Result<Documents> {
        let path = self.file(entry, split);
        let file = File::open(&path).map_err(Error::io("read", &path))?;
        Ok(Documents {
            lines: BufReader::with_capacity(1 << 18, file),
            path,
            language: entry.language.clone(),
            expected: entry.counts(split).clone(),
            hasher: blake3::Hasher::new(),
            line: Vec::new(),
            ended: false,
        })
    }

    /// The same at once, for small text.
    pub fn all_documents(&self, entry: &LanguageEntry, split: Split) -> Result<Vec<Document>> {
        self.documents(entry, split)?.collect()
    }

    /// The held-out documents of a language, of all sources in their order.
    pub fn held_out(&self, language: &Language) -> Result<Vec<Document>> {
        self.check_has(language)?;
        let mut documents = Vec::new();
        for entry in self.entries(language) {
            documents.extend(self.all_documents(entry, Split::HeldOut)?);
        }
        Ok(documents)
    }

    /// A language's entries, one a source that has it.
    pub fn entries<'a>(&'a self, language: &'a Language) -> impl Iterator<Item = &'a LanguageEntry> {
        let entries = self.manifest.languages.iter();
        entries.filter(move |entry| entry.language == *language)
    }

    /// # Errors
    /// When no source has text in the language.
    pub fn check_has(&self, language: &Language) -> Result<()> {
        match self.entries(language).next() {
            Some(_) => Ok(()),
            None => Err(Error::NoSuchLanguage {
                language: language.clone(),
                path: self.folder.clone(),
            }),
        }
    }

    /// Reads every file and compares it with the manifest. Progress counts entries of the manifest.
    pub fn verify(&self, progress: Progress) -> Result<Vec<Damage>> {
        let entries = &self.manifest.languages;
        let found = CorpusManifest::digest_of(entries);
        if found != self.manifest.digest {
            return Err(Error::AlteredCorpus {
                path: self.folder.join(MANIFEST),
                expected: self.manifest.digest.clone(),
                found,
            });
        }
        let mut damages = Vec::new();
        let mut done = 0;
        for some in entries.chunks(4 * rayon::current_num_threads()) {
            let of_some: Vec<Vec<Damage>> = some.par_iter().map(|entry| self.damages(entry)).collect();
            damages.extend(of_some.into_iter().flatten());
            done += some.len() as u64;
            progress(done, entries.len() as u64);
        }
        Ok(damages)
    }

    fn damages(&self, entry: &LanguageEntry) -> Vec<Damage> {
        let digests = [entry.train.digest.as_str(), &entry.held_out.digest];
        let mut damages = Vec::new();
        let mut add = |file: PathBuf, what: String| {
            damages.push(Damage {
                source: entry.source.clone(),
                language: entry.language.clone(),
                file,
                what,
            });
        };
        if digest_of_digests(digests) != entry.digest {
            let what = "the manifest's digests of this language contradict each other".to_owned();
            add(self.folder.join(MANIFEST), what);
        }
        for split in [Split::Train, Split::HeldOut] {
            let path = self.file(entry, split);
            let read = if path.is_file() {
                self.documents(entry, split)
                    .and_then(|mut documents| documents.try_for_each(|document| document.map(drop)))
                    .map_err(|error| error.to_string())
            } else {
                Err(format!("{} is missing", path.display()))
            };
            if let Err(what) = read {
                add(path, what);
            }
        }
        damages
    }

    fn file(&self, entry: &LanguageEntry, split: Split) -> PathBuf {
        entry.folder(&self.folder).join(split.file_name())
    }
}

/// Reads one file of documents; see [`Corpus::documents`].
pub struct Documents {
    lines: BufReader<File>,
    path: PathBuf,
    language: Language,
    /// What is still to come, and the digest of all.
    expected: Counts,
    hasher: blake3::Hasher,
    line: Vec<u8>,
    ended: bool,
}

/// Text that is worked on at a time: much to share among cores, little to hold in memory.
const BATCH_BYTES: usize = 16 << 20;

impl Documents {
    /// Hands the documents on by batches of some megabytes, in their order.
    pub(crate) fn for_each_batch(self, each: &mut dyn FnMut(&[Document]) -> Result<()>) -> Result<()> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        for document in self {
            let document = document?;
            bytes += document.text.len();
            batch.push(document);
            if bytes >= BATCH_BYTES {
                each(&batch)?;
                batch.clear();
                bytes = 0;
            }
        }
        each(&batch)
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Result<Document>> {
        if self.ended {
            return None;
        }
        let next = self.read();
        self.ended = !matches!(next, Ok(Some(_)));
        next.transpose()
    }
}

impl Documents {
    fn read(&mut self) -> Result<Option<Document>> {
        self.line.clear();
        let read = self.lines.read_until(b'\n', &mut self.line);
        if read.map_err(Error::io("read", &self.path))? == 0 {
            return self.check(None).map(|()| None);
        }
        self.hasher.update(&self.line);
        let line: Line<'_> = match serde_json::from_slice(&self.line) {
            Ok(line) => line,
            Err(error) => {
                let error = Error::json(&self.path)(error);
                return self.check(Some(error)).map(|()| None);
            }
        };
        let (documents, bytes) = (&mut self.expected.documents, &mut self.expected.bytes);
        // Fewer than none are a contradiction that the end tells.
        *documents = documents.wrapping_sub(1);
        *bytes = bytes.wrapping_sub(line.text.len() as u64);
        Ok(Some(Document {
            language: self.language.clone(),
            key: line.key.into_owned(),
            text: line.text.into_owned(),
            loss_from: line.loss_from,
        }))
    }

    /// Compares the whole file with the manifest; a changed one is said to be changed before `error` is told.
    fn check(&mut self, error: Option<Error>) -> Result<()> {
        loop {
            let rest = self.lines.fill_buf().map_err(Error::io("read", &self.path))?;
            if rest.is_empty() {
                break;
            }
            self.hasher.update(rest);
            let length = rest.len();
            self.lines.consume(length);
        }
        let found = self.hasher.finalize().to_hex().to_string();
        let Counts {
            documents,
            bytes,
            digest,
        } = &self.expected;
        if found != *digest {
            return Err(Error::AlteredCorpus {
                path: self.path.clone(),
                expected: digest.clone(),
                found,
            });
        }
        if let Some(error) = error {
            return Err(error);
        }
        if (*documents, *bytes) != (0, 0) {
            return Err(Error::BadJson {
                path: self.path.clone(),
                reason: format!(
                    "the manifest counts {} documents and {} bytes more than are here; import the corpus again",
                    *documents as i64, *bytes as i64
                ),
            });
        }
        Ok(())
    }
}

/// Writes one half of a language into an unfinished corpus folder.
pub(crate) struct DocumentsWriter {
    file: BufWriter<File>,
    path: PathBuf,
    counts: Counts,
    hasher: blake3::Hasher,
    line: Vec<u8>,
}

impl DocumentsWriter {
    pub fn create(folder: &Path, split: Split) -> Result<DocumentsWriter> {
        let path = folder.join(split.file_name());
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        Ok(DocumentsWriter {
            file: BufWriter::with_capacity(1 << 18, file),
            path,
            counts: Counts::default(),
            hasher: blake3::Hasher::new(),
            line: Vec::new(),
        })
    }

    pub fn write(&mut self, key: &str, text: &str, loss_from: usize) -> Result<()> {
        self.counts.documents += 1;
        self.counts.bytes += text.len() as u64;
        let line = Line {
            key: key.into(),
            text: text.into(),
            loss_from,
        };
        self.line.clear();
        serde_json::to_writer(&mut self.line, &line).expect("strings are JSON, and a Vec takes every byte");
        self.line.push(b'\n');
        self.hasher.update(&self.line);
        self.file.write_all(&self.line).map_err(Error::io("write", &self.path))
    }

    /// What was written; not yet synced.
    pub fn finish(mut self) -> Result<Counts> {
        self.counts.digest = self.hasher.finalize().to_hex().to_string();
        self.file.flush().map_err(Error::io("write", &self.path))?;
        Ok(self.counts)
    }
}

/// Digest of several digests, in order: a language's over its files, a corpus's over its languages.
pub(crate) fn digest_of_digests<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part.as_bytes()).update(b"\n");
    }
    hasher.finalize().to_hex().to_string()
}

/// [`digest_of`] a file's bytes, read as they stream.
pub(crate) fn digest_of_file(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    File::open(path)
        .and_then(|file| hasher.update_reader(file).map(drop))
        .map_err(Error::io("read", path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// BLAKE3 in hexadecimal.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}
