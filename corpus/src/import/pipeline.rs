//! The road of every source's text into a corpus folder, language by language, twice: first to draw what is held out in
//! any of them, then to drop what repeats or leaks and to write. Memory is bounded, whatever the size of a language.
//!
//!   read       all sources of a language in their order; repeated lines left out where asked for
//!   draw       ranks of passages → threshold → hashes of held-out texts, of all languages together
//!   write      sort by the text's hash: equal texts meet, neighbours are strangers, the sources' order is forgotten

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fingerprint;
use crate::finished::{Unfinished, sync_all, write_synced};
use crate::folder::{DocumentsWriter, Hygiene, MANIFEST, SourceEntry, Unreadable, digest_of_digests, digest_of_file};
use crate::import::contamination::Evaluations;
use crate::import::held_out::{HeldOutTexts, Lottery, Share, TextHash, rank, text_hash};
use crate::import::kept::Kept;
use crate::import::near_duplicates::{NearDuplicates, Similarity};
use crate::import::normalise::nfc;
use crate::import::repeated_lines::{LineCensus, LineFilter};
use crate::import::sorted::Sorter;
use crate::import::units::Unit as TextUnit;
use crate::import::{DrawnWith, ImportSettings, OnUnreadable, Sink, Source, SourceSpec};
use crate::{CorpusManifest, Counts, Document, Error, Language, LanguageEntry, Progress, Result, Split};

/// Grows when what is kept of an interrupted import means something else.
const KEPT_FORMAT: u32 = 1;

/// Which documents share what with which evaluation text, one match a line.
const CONTAMINATION: &str = "contamination.jsonl";

/// So many unreadable places are listed.
const LISTED: usize = 20;

/// More workers than this would each have too little memory to sort in.
const MOST_WORKERS: usize = 8;

/// A source, opened.
pub(crate) struct Opened {
    pub spec: SourceSpec,
    pub source: Box<dyn Source>,
}

/// Opens a source that may keep what it needs in a folder of its own until the import ends.
type Opener<'a> = &'a dyn Fn(&SourceSpec, &Path, Progress) -> Result<Opened>;

/// What one source has of a language.
struct Part {
    /// Index of the source.
    source: usize,
    /// Index of the language within it.
    language: usize,
    /// Of the files it is read from.
    fingerprint: String,
    /// Size of these files: the measure of progress, not of text.
    bytes: u64,
}

/// A language, with all its parts: the unit of work, and of what is kept.
struct Unit {
    language: Language,
    parts: Vec<Part>,
    /// Of all that decides what is read.
    fingerprint: String,
}

impl Unit {
    fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

/// First pass, one language: what is held out by its own lottery. Its texts' hashes lie beside, as do the ranks and
/// hashes of parallel sources' passages, whose lottery is held when all languages are known.
#[derive(Serialize, Deserialize)]
struct Choice {
    below: u64,
    /// Of both files.
    digests: [String; 2],
}

/// Second pass, one language.
#[derive(Serialize, Deserialize)]
struct Written {
    entries: Vec<LanguageEntry>,
    /// The first unreadable places.
    unreadable: Vec<String>,
    /// Digest of the file of what documents share with evaluation texts, where that was looked for.
    evidence: Option<String>,
}

/// Imports sources into `out`, going on where an interrupted import with the same settings was.
pub(crate) fn run(
    sources: &[SourceSpec],
    open: Opener,
    settings: &ImportSettings,
    out: &Path,
    progress: Progress,
) -> Result<CorpusManifest> {
    let checks = Checks::new(settings)?;
    let folder = Unfinished::resume(out, MANIFEST)?;
    let all = digest_of_json(&(KEPT_FORMAT, settings, &checks.fingerprint, sources));
    let kept = Kept::open(folder.path(), &all, settings.afresh)?;
    let made = make(sources, open, settings, &checks, folder.path(), &kept, progress);
    match made {
        Ok(manifest) => {
            kept.remove()?;
            folder.finish()?;
            Ok(manifest)
        }
        Err(error) => {
            if matches!(error, Error::EmptyCorpus { .. }) || !kept.is_worth_keeping() {
                folder.discard();
            }
            Err(error)
        }
    }
}

fn make(
    sources: &[SourceSpec],
    open: Opener,
    settings: &ImportSettings,
    checks: &Checks,
    folder: &Path,
    kept: &Kept,
    progress: Progress,
) -> Result<CorpusManifest> {
    let mut open = |spec: &SourceSpec| open(spec, &kept.path(&format!("{}.rows", spec.name)), progress);
    let sources = &sources.iter().map(&mut open).collect::<Result<Vec<_>>>()?;
    let units = units(sources, settings)?;
    let n_workers = rayon::current_num_threads().clamp(1, MOST_WORKERS);
    let run = Run {
        sources,
        settings,
        checks,
        units: &units,
        folder,
        kept,
        n_workers,
        budget: sorters_bytes(settings.memory_bytes, checks) / n_workers / 2,
        stop: AtomicBool::new(false),
        done: AtomicU64::new(0),
    };
    run.make(progress)
}

/// What the n-grams of evaluation texts leave of the memory; a quarter at least, or sorting would go by ever smaller runs.
fn sorters_bytes(memory_bytes: usize, checks: &Checks) -> usize {
    let index = checks.evaluations.as_ref().map_or(0, Evaluations::bytes);
    memory_bytes.saturating_sub(index).max(memory_bytes / 4)
}

/// What is looked for beside equal texts, made ready.
struct Checks {
    similarity: Option<Similarity>,
    evaluations: Option<Evaluations>,
    /// Of the evaluation files.
    fingerprint: String,
}

impl Checks {
    fn new(settings: &ImportSettings) -> Result<Checks> {
        let files = settings.contamination.iter().flat_map(|c| &c.files).cloned();
        Ok(Checks {
            similarity: settings.near_duplicates.map(Similarity::new).transpose()?,
            fingerprint: fingerprint_of(&files.collect::<Vec<_>>())?.0,
            evaluations: settings
                .contamination
                .as_ref()
                .map(|c| Evaluations::read(&c.files, c.n_grams))
                .transpose()?,
        })
    }
}

/// Languages in the order of their names, their parts in the order of the sources.
fn units(sources: &[Opened], settings: &ImportSettings) -> Result<Vec<Unit>> {
    let mut parts: BTreeMap<Language, Vec<Part>> = BTreeMap::new();
    for (number, Opened { spec, source }) in sources.iter().enumerate() {
        let path = || source.path().to_path_buf();
        let mut seen = BTreeSet::new();
        // Of a source whose languages share files.
        let mut whole: Option<(String, u64)> = None;
        for (index, about) in source.languages().iter().enumerate() {
            let language = &about.language;
            if !seen.insert(language) {
                return Err(Error::LanguageTwice {
                    language: language.clone(),
                    source_name: spec.name.clone(),
                    path: path(),
                });
            }
            if let Some(rule) = language.unknown_code() {
                return Err(Error::UnknownCode {
                    language: language.clone(),
                    path: path(),
                    rule,
                });
            }
            let (fingerprint, bytes) = match source.files(index) {
                Some(files) => fingerprint_of(&files)?,
                None => {
                    if whole.is_none() {
                        let (fingerprint, bytes) = fingerprint_of(&spec.kind.paths())?;
                        whole = Some((fingerprint, bytes.div_ceil(source.languages().len() as u64)));
                    }
                    whole.clone().expect("just made")
                }
            };
            parts.entry(language.clone()).or_default().push(Part {
                source: number,
                language: index,
                fingerprint,
                bytes,
            });
        }
    }
    let unit = |(language, parts): (Language, Vec<Part>)| {
        let fingerprints: Vec<_> = parts.iter().map(|part| (part.source, &part.fingerprint)).collect();
        let fingerprint = digest_of_json(&(KEPT_FORMAT, settings, &language, fingerprints));
        Unit {
            language,
            parts,
            fingerprint,
        }
    };
    Ok(parts.into_iter().map(unit).collect())
}

fn fingerprint_of(files: &[PathBuf]) -> Result<(String, u64)> {
    let of = |file: &PathBuf| Ok((fingerprint::fingerprint(file)?, fingerprint::size(file)?));
    let each = files.iter().map(of).collect::<Result<Vec<_>>>()?;
    Ok((digest_of_json(&each), each.iter().map(|(_, bytes)| bytes).sum()))
}

fn digest_of_json(value: &impl Serialize) -> String {
    crate::folder::digest_of(&serde_json::to_vec(value).expect("plain data"))
}

/// One import under way.
struct Run<'a> {
    sources: &'a [Opened],
    settings: &'a ImportSettings,
    checks: &'a Checks,
    units: &'a [Unit],
    folder: &'a Path,
    kept: &'a Kept,
    n_workers: usize,
    /// Bytes that one sorter of one worker may hold; a worker has two at most.
    budget: usize,
    /// Somebody failed: the others end too.
    stop: AtomicBool,
    /// Bytes of input behind us.
    done: AtomicU64,
}

impl Run<'_> {
    fn make(&self, progress: Progress) -> Result<CorpusManifest> {
        let passes = if self.settings.deduplicate_lines { 3 } else { 2 };
        let total = passes * self.units.iter().map(Unit::bytes).sum::<u64>();
        let tick = &mut |done: u64| progress(done.min(total), total);

        if self.settings.deduplicate_lines {
            self.each_unit(tick, |unit| self.take_census(unit))?;
        }
        let choices = self.each_unit(tick, |unit| self.choose(unit))?;
        let held_out = self.held_out(choices)?;
        self.remove_strangers()?;
        let written = self.each_unit(tick, |unit| self.write(unit, &held_out))?;
        self.finish(written)
    }

    /// The manifest, written.
    fn finish(&self, written: Vec<Written>) -> Result<CorpusManifest> {
        let (entries, places): (Vec<_>, Vec<_>) = written.into_iter().map(|w| (w.entries, w.unreadable)).unzip();
        let languages: Vec<LanguageEntry> = entries.into_iter().flatten().collect();
        let sources = self.sources.iter().map(|Opened { spec, source }| SourceEntry {
            name: spec.name.clone(),
            kind: source.name().to_owned(),
            licence: spec.licence.clone(),
        });
        let manifest = CorpusManifest {
            format: 2,
            sources: sources.collect(),
            seed: self.settings.seed,
            held_out_share: self.settings.held_out,
            held_out_most: self.settings.held_out_most,
            deduplicate_lines: self.settings.deduplicate_lines,
            hygiene: Hygiene {
                nfc: self.settings.nfc,
                near_duplicates: self.settings.near_duplicates,
                evaluations: self.checks.evaluations.as_ref().map(Evaluations::entry),
            },
            digest: CorpusManifest::digest_of(&languages),
            unreadable: Unreadable {
                places: languages.iter().map(|entry| entry.unreadable).sum(),
                first: places.into_iter().flatten().take(LISTED).collect(),
            },
            languages,
            skipped: self
                .sources
                .iter()
                .flat_map(|opened| opened.source.skipped().to_vec())
                .collect(),
        };
        if let Some(first) = self.sources.first()
            && manifest.total(Split::Train).0 == 0
        {
            let rule = "training needs at least two different documents";
            return Err(Error::EmptyCorpus {
                path: first.source.path().to_path_buf(),
                rule,
            });
        }
        let mut written = Vec::new();
        for entry in &manifest.languages {
            let folder = entry.folder(self.folder);
            written.extend([Split::Train, Split::HeldOut].map(|split| folder.join(split.file_name())));
            written.push(folder);
        }
        let folders = manifest.sources.iter().map(|source| self.folder.join(&source.name));
        written.extend(folders.filter(|folder| folder.is_dir()));
        written.extend(self.list_contamination()?);
        sync_all(&written)?;
        let path = self.folder.join(MANIFEST);
        write_synced(
            &path,
            &serde_json::to_vec_pretty(&manifest).map_err(Error::json(&path))?,
        )?;
        Ok(manifest)
    }

    /// All languages' evidence in one file, if any was looked for.
    fn list_contamination(&self) -> Result<Option<PathBuf>> {
        if self.checks.evaluations.is_none() {
            return Ok(None);
        }
        let path = self.folder.join(CONTAMINATION);
        let mut all = create(&path)?;
        for unit in self.units {
            let part = self.evidence(unit);
            let mut file = File::open(&part).map_err(Error::io("open", &part))?;
            std::io::copy(&mut file, &mut all).map_err(Error::io("write", &path))?;
        }
        all.flush().map_err(Error::io("write", &path))?;
        Ok(Some(path))
    }

    /// Before the first pass, where lines are deduplicated: the numbers of the repeated ones.
    fn take_census(&self, unit: &Unit) -> Result<()> {
        let name = format!("{}.lines", unit.language);
        let path = self.kept.path(&name);
        let kept: Option<String> = self.kept.get(&name, &unit.fingerprint);
        if kept.is_some_and(|digest| has_digest(&path, &digest)) {
            self.pass_by(unit);
            return Ok(());
        }
        let mut census = LineCensus::new(&self.work(unit), self.budget);
        self.read(unit, None, &mut |part, document| {
            if self.lines_stand_alone(unit, part, &document) {
                census.document(&document.text)?;
            }
            Ok(())
        })?;
        census.finish(&path)?;
        self.kept.put(&name, &unit.fingerprint, &digest_of_file(&path)?)
    }

    /// First pass, one language.
    fn choose(&self, unit: &Unit) -> Result<Choice> {
        let name = format!("{}.choice", unit.language);
        let (drawn_path, passages_path) = self.choice_files(unit);
        let kept: Option<Choice> = self.kept.get(&name, &unit.fingerprint);
        let whole = |choice: &Choice| {
            let [drawn, passages] = &choice.digests;
            has_digest(&drawn_path, drawn) && has_digest(&passages_path, passages)
        };
        if let Some(choice) = kept.filter(whole) {
            self.pass_by(unit);
            return Ok(choice);
        }
        let mut lottery = Lottery::new(&self.work(unit).with_extension("ranks"), self.budget);
        let mut passages = create(&passages_path)?;
        self.read(unit, self.line_filter(unit)?, &mut |part, document| {
            let number = unit.parts[part].source;
            let (rank, text) = (rank(self.settings.seed, document.passage()), text_hash(&document.text));
            if let Some(number) = self.drawn_as(number) {
                let passage = Passage { number, rank, text }.to_bytes();
                return passages.write_all(&passage).map_err(Error::io("write", &passages_path));
            }
            lottery.enter(rank, text)
        })?;
        passages.flush().map_err(Error::io("write", &passages_path))?;
        let drawn = lottery.draw(self.share())?;
        let below = drawn.below;
        let mut texts = create(&drawn_path)?;
        drawn.texts(|text| {
            texts
                .write_all(&text.to_be_bytes())
                .map_err(Error::io("write", &drawn_path))
        })?;
        texts.flush().map_err(Error::io("write", &drawn_path))?;
        let digests = [digest_of_file(&drawn_path)?, digest_of_file(&passages_path)?];
        let choice = Choice { below, digests };
        self.kept.put(&name, &unit.fingerprint, &choice)?;
        Ok(choice)
    }

    /// The first source with which this one's passages are drawn; `None` where each language draws its own.
    fn drawn_as(&self, number: usize) -> Option<usize> {
        let with = |number: usize| -> DrawnWith { self.sources[number].source.drawn_with() };
        match with(number) {
            DrawnWith::Language => None,
            DrawnWith::Source => Some(number),
            pairs => (0..=number).find(|first| with(*first) == pairs),
        }
    }

    /// Between the passes: parallel sources' lotteries, and the texts that any lottery drew.
    fn held_out(&self, choices: Vec<Choice>) -> Result<HeldOut> {
        let budget = sorters_bytes(self.settings.memory_bytes, self.checks) / 4;
        let mut texts = Sorter::new(self.kept.path("all-texts"), budget);
        let records = |path: &Path, length: usize, each: &mut dyn FnMut(&[u8]) -> Result<()>| -> Result<()> {
            let mut file = BufReader::new(File::open(path).map_err(Error::io("open", path))?);
            let mut record = vec![0; length];
            loop {
                match file.read_exact(&mut record) {
                    Ok(()) => each(&record)?,
                    Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
                    Err(e) => return Err(Error::io("read", path)(e)),
                }
            }
        };
        let mut of_source: Vec<Option<u64>> = Vec::new();
        for number in 0..self.sources.len() {
            match self.drawn_as(number) {
                Some(first) if first == number => {}
                with_another => {
                    of_source.push(with_another.and_then(|first| of_source[first]));
                    continue;
                }
            }
            let mut lottery = Lottery::new(&self.kept.path("all-ranks"), budget);
            for unit in self.units {
                records(
                    &self.choice_files(unit).1,
                    Passage::BYTES,
                    &mut |bytes| match Passage::from_bytes(bytes) {
                        passage if passage.number == number => lottery.enter(passage.rank, passage.text),
                        _ => Ok(()),
                    },
                )?;
            }
            let drawn = lottery.draw(self.share())?;
            of_source.push(Some(drawn.below));
            drawn.texts(|text| texts.push(text, &[]))?;
        }
        for unit in self.units {
            records(&self.choice_files(unit).0, 16, &mut |bytes| {
                texts.push(u128::from_be_bytes(bytes.try_into().expect("16 bytes")), &[])
            })?;
        }
        let path = self.kept.path("held-out-texts");
        let texts = HeldOutTexts::write(&path, texts.finish()?)?;
        let of_unit = |(unit, choice): (&Unit, Choice)| (unit.language.clone(), choice.below);
        let of_language = self.units.iter().zip(choices).map(of_unit).collect();
        Ok(HeldOut {
            of_source,
            of_language,
            texts,
            path,
        })
    }

    /// Second pass, one language.
    fn write(&self, unit: &Unit, held_out: &HeldOut) -> Result<Written> {
        let name = format!("{}.written", unit.language);
        let fingerprint = digest_of_json(&(&unit.fingerprint, &held_out.of_source, &held_out.texts.digest));
        let kept: Option<Written> = self.kept.get(&name, &fingerprint);
        let evidence_path = self.evidence(unit);
        let whole = |written: &Written| {
            let entries = written.entries.iter().all(|entry| {
                let folder = entry.folder(self.folder);
                [Split::Train, Split::HeldOut]
                    .iter()
                    .all(|split| has_digest(&folder.join(split.file_name()), &entry.counts(*split).digest))
            });
            let evidence = written.evidence.iter().all(|digest| has_digest(&evidence_path, digest));
            entries && evidence
        };
        if let Some(written) = kept.filter(whole) {
            self.pass_by(unit);
            return Ok(written);
        }
        let mut sorter = Sorter::new(self.work(unit).with_extension("documents"), self.budget);
        let near = |similarity| {
            let (text_unit, folder) = (TextUnit::of(&unit.language), self.work(unit).with_extension("near"));
            // Half: a vector may have reserved twice what it holds.
            NearDuplicates::new(similarity, text_unit, self.budget / 2, &folder)
        };
        let mut near = self.checks.similarity.as_ref().map(near);
        let mut record = Vec::new();
        let found = self.read(unit, self.line_filter(unit)?, &mut |part, document| {
            let mut number = 0;
            if let Some(near) = &mut near {
                number = near.add(&document.text, held_out.holds(self, unit, part, &document.key))?;
            }
            encode(part, number, &document, &mut record);
            sorter.push(text_hash(&document.text), &record)
        })?;
        let near = near.map(NearDuplicates::finish).transpose()?;

        let mut parts = unit
            .parts
            .iter()
            .zip(found.parts)
            .map(|(part, found)| self.begin_part(part, found))
            .collect::<Result<Vec<_>>>()?;
        let evidence = self.checks.evaluations.as_ref().map(|_| create(&evidence_path));
        let mut evidence = evidence.transpose()?;
        let mut leaks = held_out.texts.questions(&held_out.path);
        let mut sorted = sorter.finish()?;
        // Of equal texts the first stays, but a held-out one goes before all others: it may not be trained on anyway.
        let mut group: Option<(TextHash, bool, Vec<u8>)> = None;
        loop {
            let next = sorted.next()?;
            match (&mut group, next) {
                (Some((hash, held, best)), Some((next, record))) if *hash == next => {
                    let document = decode(record)?;
                    let mut dropped = document.part;
                    if !*held && held_out.holds(self, unit, document.part, document.key) {
                        dropped = decode(best)?.part;
                        *held = true;
                        best.clear();
                        best.extend_from_slice(record);
                    }
                    parts[dropped].entry.duplicates += 1;
                }
                (group, next) => {
                    if let Some((hash, held, best)) = group.take() {
                        self.check_stop()?;
                        let document = decode(&best)?;
                        let part = &mut parts[document.part];
                        let split = if held { Split::HeldOut } else { Split::Train };
                        if !held && leaks.contains(hash)? {
                            part.entry.contaminated += 1;
                        } else if near.as_ref().is_some_and(|near| near.contains(document.number)) {
                            part.entry.near_duplicates += 1;
                        } else if !held && self.is_in_evaluations(&part.entry, &document, evidence.as_mut())? {
                            part.entry.in_evaluations += 1;
                        } else {
                            let writer = &mut part.writers[usize::from(split == Split::HeldOut)];
                            writer.write(document.key, document.text, document.loss_from)?;
                        }
                    }
                    let Some((hash, record)) = next else { break };
                    let next = decode(record)?;
                    let held = held_out.holds(self, unit, next.part, next.key);
                    *group = Some((hash, held, record.to_vec()));
                }
            }
        }
        let entries = parts.into_iter().map(PartWriter::finish).collect::<Result<_>>()?;
        let close = |mut evidence: BufWriter<File>| {
            evidence.flush().map_err(Error::io("write", &evidence_path))?;
            digest_of_file(&evidence_path)
        };
        let evidence = evidence.map(close).transpose()?;
        let written = Written {
            entries,
            unreadable: found.unreadable,
            evidence,
        };
        self.kept.put(&name, &fingerprint, &written)?;
        Ok(written)
    }

    /// Whether an evaluation text shares an n-gram with the document; if so, which goes to the evidence.
    fn is_in_evaluations(
        &self,
        entry: &LanguageEntry,
        document: &Record,
        evidence: Option<&mut BufWriter<File>>,
    ) -> Result<bool> {
        let (Some(evaluations), Some(evidence)) = (&self.checks.evaluations, evidence) else {
            return Ok(false);
        };
        let matches = evaluations.matches(&entry.language, document.text);
        for found in &matches {
            let line = serde_json::json!({
                "source": entry.source,
                "language": entry.language,
                "key": document.key,
                "evaluation": found.evaluation,
                "ngram": found.ngram,
            });
            writeln!(evidence, "{line}").map_err(Error::io("write", &self.folder.join(CONTAMINATION)))?;
        }
        Ok(!matches.is_empty())
    }

    fn begin_part(&self, part: &Part, found: PartFound) -> Result<PartWriter> {
        let Opened { spec, source } = &self.sources[part.source];
        let about = source.languages()[part.language].clone();
        let folder = self.folder.join(&spec.name).join(about.language.as_str());
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let writers = [
            DocumentsWriter::create(&folder, Split::Train)?,
            DocumentsWriter::create(&folder, Split::HeldOut)?,
        ];
        let entry = LanguageEntry {
            source: spec.name.clone(),
            language: about.language,
            name: about.name,
            duplicates: found.emptied,
            lines_dropped: found.lines_dropped,
            unreadable: found.unreadable,
            near_duplicates: 0,
            in_evaluations: 0,
            contaminated: 0,
            latitude: about.latitude,
            longitude: about.longitude,
            train: Counts::default(),
            held_out: Counts::default(),
            digest: String::new(),
        };
        Ok(PartWriter { entry, writers })
    }

    /// Folders of languages that a source no longer has, left by an interrupted import.
    fn remove_strangers(&self) -> Result<()> {
        for (number, opened) in self.sources.iter().enumerate() {
            let folder = self.folder.join(&opened.spec.name);
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let known = self.units.iter().any(|unit| {
                    *unit.language.as_str() == *name && unit.parts.iter().any(|part| part.source == number)
                });
                if !known {
                    fs::remove_dir_all(entry.path()).map_err(Error::io("remove", &entry.path()))?;
                }
            }
        }
        Ok(())
    }

    /// Reads a language's documents in the order of its parts. The closure gets the part's index.
    fn read(
        &self,
        unit: &Unit,
        lines: Option<LineFilter>,
        each: &mut dyn FnMut(usize, Document) -> Result<()>,
    ) -> Result<Found> {
        let mut reading = Reading {
            run: self,
            unit,
            part: 0,
            lines,
            each,
            bytes_left: unit.bytes(),
            found: Found {
                parts: unit.parts.iter().map(|_| PartFound::default()).collect(),
                unreadable: Vec::new(),
            },
        };
        for (index, part) in unit.parts.iter().enumerate() {
            reading.part = index;
            self.sources[part.source].source.read(part.language, &mut reading)?;
        }
        self.done.fetch_add(reading.bytes_left, Ordering::Relaxed);
        Ok(reading.found)
    }

    fn line_filter(&self, unit: &Unit) -> Result<Option<LineFilter>> {
        let path = self.kept.path(&format!("{}.lines", unit.language));
        self.settings
            .deduplicate_lines
            .then(|| LineFilter::open(&path))
            .transpose()
    }

    /// An instruction or a pair of translations is no heap of lines.
    fn lines_stand_alone(&self, unit: &Unit, part: usize, document: &Document) -> bool {
        let spec = &self.sources[unit.parts[part].source].spec;
        document.loss_from == 0 && spec.kind.lines_stand_alone()
    }

    /// A language that an earlier import did.
    fn pass_by(&self, unit: &Unit) {
        self.done.fetch_add(unit.bytes(), Ordering::Relaxed);
    }

    fn check_stop(&self) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::Stopped),
            false => Ok(()),
        }
    }

    fn share(&self) -> Share {
        Share {
            share: self.settings.held_out,
            most: self.settings.held_out_most,
        }
    }

    fn work(&self, unit: &Unit) -> PathBuf {
        self.kept.path(unit.language.as_str())
    }

    /// What a language's documents share with evaluation texts.
    fn evidence(&self, unit: &Unit) -> PathBuf {
        self.work(unit).with_extension("evidence")
    }

    /// Held-out texts of its own lottery; ranks and texts of parallel sources' passages.
    fn choice_files(&self, unit: &Unit) -> (PathBuf, PathBuf) {
        let work = self.work(unit);
        (work.with_extension("drawn"), work.with_extension("passages"))
    }

    /// Does the work for every language, the largest first, and gives back the results in the languages' order. The
    /// first error ends all of it.
    fn each_unit<T: Send>(
        &self,
        tick: &mut dyn FnMut(u64),
        work: impl Fn(&Unit) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let mut order: Vec<usize> = (0..self.units.len()).collect();
        order.sort_by_key(|&unit| std::cmp::Reverse(self.units[unit].bytes()));
        let next = AtomicUsize::new(0);
        let results: Mutex<BTreeMap<usize, Result<T>>> = Mutex::new(BTreeMap::new());
        let (ended, all_ended) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            for _ in 0..self.n_workers.min(order.len()) {
                let ended = ended.clone();
                let (next, order, results, work) = (&next, &order, &results, &work);
                scope.spawn(move || {
                    let _ended = ended;
                    while let Some(&unit) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = self.check_stop().and_then(|()| work(&self.units[unit]));
                        if result.is_err() {
                            self.stop.store(true, Ordering::Relaxed);
                        }
                        results.lock().expect("nobody panics with it").insert(unit, result);
                    }
                });
            }
            drop(ended);
            while let Err(mpsc::RecvTimeoutError::Timeout) = all_ended.recv_timeout(TICK) {
                tick(self.done.load(Ordering::Relaxed));
            }
        });
        tick(self.done.load(Ordering::Relaxed));
        let results = results.into_inner().expect("nobody panics with it");
        let mut done = Vec::with_capacity(results.len());
        let mut stopped = false;
        for result in results.into_values() {
            match result {
                Ok(result) => done.push(result),
                // Not why the import ends: whoever made the others stop says that.
                Err(Error::Stopped) => stopped = true,
                Err(error) => return Err(error),
            }
        }
        if stopped { Err(Error::Stopped) } else { Ok(done) }
    }
}

const TICK: Duration = Duration::from_millis(100);

/// The thresholds below which passages are held out, and what no language may train on.
struct HeldOut {
    /// Of each source whose passages are drawn together in all its languages.
    of_source: Vec<Option<u64>>,
    of_language: BTreeMap<Language, u64>,
    texts: HeldOutTexts,
    path: PathBuf,
}

impl HeldOut {
    fn holds(&self, run: &Run, unit: &Unit, part: usize, key: &str) -> bool {
        let source = unit.parts[part].source;
        let below = self.of_source[source].unwrap_or_else(|| self.of_language[&unit.language]);
        rank(run.settings.seed, Document::passage_of(key)) < below
    }
}

/// What reading a language came upon.
struct Found {
    parts: Vec<PartFound>,
    unreadable: Vec<String>,
}

#[derive(Default)]
struct PartFound {
    unreadable: u64,
    lines_dropped: u64,
    /// Documents of which no line is left.
    emptied: u64,
}

/// Stands between a source and what is done with its documents.
struct Reading<'a> {
    run: &'a Run<'a>,
    unit: &'a Unit,
    part: usize,
    lines: Option<LineFilter>,
    each: &'a mut dyn FnMut(usize, Document) -> Result<()>,
    /// Of the unit's bytes, those that progress does not count yet.
    bytes_left: u64,
    found: Found,
}

impl Sink for Reading<'_> {
    fn document(&mut self, mut document: Document) -> Result<()> {
        self.run.check_stop()?;
        // Compressed text is longer than its file: the rest is counted at the end.
        let bytes = (document.text.len() as u64).min(self.bytes_left);
        self.bytes_left -= bytes;
        self.run.done.fetch_add(bytes, Ordering::Relaxed);
        if self.run.settings.nfc
            && let Some((text, loss_from)) = nfc(&document.text, document.loss_from)
        {
            (document.text, document.loss_from) = (text, loss_from);
        }
        let alone = self.run.lines_stand_alone(self.unit, self.part, &document);
        if let Some(lines) = self.lines.as_mut().filter(|_| alone) {
            let before = lines.dropped;
            document.text = lines.document(document.text)?;
            let found = &mut self.found.parts[self.part];
            found.lines_dropped += lines.dropped - before;
            if document.text.is_empty() {
                found.emptied += 1;
                return Ok(());
            }
        }
        (self.each)(self.part, document)
    }

    fn unreadable(&mut self, error: Error) -> Result<()> {
        self.run.check_stop()?;
        match self.run.settings.on_unreadable {
            OnUnreadable::Stop => Err(error),
            OnUnreadable::Skip => {
                self.found.parts[self.part].unreadable += 1;
                if self.found.unreadable.len() < LISTED {
                    self.found.unreadable.push(error.to_string());
                }
                Ok(())
            }
        }
    }
}

/// One part's two files under way.
struct PartWriter {
    entry: LanguageEntry,
    writers: [DocumentsWriter; 2],
}

impl PartWriter {
    fn finish(self) -> Result<LanguageEntry> {
        let [train, held_out] = self.writers;
        let mut entry = self.entry;
        (entry.train, entry.held_out) = (train.finish()?, held_out.finish()?);
        entry.digest = digest_of_digests([entry.train.digest.as_str(), &entry.held_out.digest]);
        Ok(entry)
    }
}

/// A passage of a parallel source.
struct Passage {
    /// Of the first source that it is drawn with.
    number: usize,
    rank: u64,
    text: TextHash,
}

impl Passage {
    const BYTES: usize = 2 + 8 + 16;

    fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..2].copy_from_slice(&(self.number as u16).to_le_bytes());
        bytes[2..10].copy_from_slice(&self.rank.to_le_bytes());
        bytes[10..].copy_from_slice(&self.text.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Passage {
        Passage {
            number: u16::from_le_bytes(bytes[..2].try_into().expect("2 bytes")).into(),
            rank: u64::from_le_bytes(bytes[2..10].try_into().expect("8 bytes")),
            text: u128::from_le_bytes(bytes[10..].try_into().expect("16 bytes")),
        }
    }
}

/// A document as the sorter holds it.
struct Record<'a> {
    part: usize,
    /// In the order of reading, where near duplicates are looked for.
    number: u64,
    key: &'a str,
    text: &'a str,
    loss_from: usize,
}

fn encode(part: usize, number: u64, document: &Document, record: &mut Vec<u8>) {
    record.clear();
    record.extend_from_slice(&number.to_le_bytes());
    for number in [part, document.loss_from, document.key.len()] {
        record.extend_from_slice(&(number as u32).to_le_bytes());
    }
    record.extend_from_slice(document.key.as_bytes());
    record.extend_from_slice(document.text.as_bytes());
}

fn decode(record: &[u8]) -> Result<Record<'_>> {
    let (first, record) = record.split_at(8);
    let number = |index: usize| u32::from_le_bytes(record[4 * index..][..4].try_into().expect("4 bytes")) as usize;
    let (key, text) = record[12..].split_at(number(2));
    let read = |bytes| std::str::from_utf8(bytes).map_err(|_| Error::DamagedWork);
    Ok(Record {
        part: number(0),
        number: u64::from_le_bytes(first.try_into().expect("8 bytes")),
        loss_from: number(1),
        key: read(key)?,
        text: read(text)?,
    })
}

/// Whether a file of an interrupted import is as it was left.
fn has_digest(path: &Path, digest: &str) -> bool {
    digest_of_file(path).is_ok_and(|found| found == digest)
}

fn create(path: &Path) -> Result<BufWriter<File>> {
    Ok(BufWriter::new(File::create(path).map_err(Error::io("create", path))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::{SourceKind, SourceLanguage};

    /// Passages in memory; the same in all languages.
    struct Parallel(
        Vec<(SourceLanguage, Vec<(&'static str, &'static str)>)>,
        Vec<SourceLanguage>,
    );

    impl Source for Parallel {
        fn name(&self) -> &'static str {
            "parallel"
        }

        fn languages(&self) -> &[SourceLanguage] {
            &self.1
        }

        fn read(&self, language: usize, sink: &mut dyn Sink) -> Result<()> {
            let (about, passages) = &self.0[language];
            passages.iter().try_for_each(|(key, text)| {
                sink.document(Document {
                    language: about.language.clone(),
                    key: (*key).to_owned(),
                    text: (*text).to_owned(),
                    loss_from: text.len() / 2,
                })
            })
        }

        fn drawn_with(&self) -> DrawnWith {
            DrawnWith::Source
        }

        fn skipped(&self) -> &[crate::Skipped] {
            &[]
        }

        fn path(&self) -> &Path {
            Path::new("passages")
        }
    }

    fn import(source: [Opened; 1], settings: &ImportSettings, out: &Path) -> Result<CorpusManifest> {
        let specs = [source[0].spec.clone()];
        let source = std::cell::RefCell::new(source.into_iter());
        let open = |_: &SourceSpec, _: &Path, _: Progress| Ok(source.borrow_mut().next().expect("opened once"));
        run(&specs, &open, settings, out, &mut |_, _| {})
    }

    fn parallel(folder: &Path, languages: &[(&str, &[(&'static str, &'static str)])]) -> [Opened; 1] {
        let about = |name: &str| SourceLanguage {
            language: name.parse().unwrap(),
            name: name.to_owned(),
            latitude: None,
            longitude: None,
        };
        let all: Vec<_> = languages
            .iter()
            .map(|(name, passages)| (about(name), passages.to_vec()))
            .collect();
        let about = all.iter().map(|(about, _)| about.clone()).collect();
        let path = folder.to_path_buf();
        [Opened {
            spec: SourceSpec::new("parallel", SourceKind::folders(path)),
            source: Box::new(Parallel(all, about)),
        }]
    }

    #[test]
    fn a_language_twice_in_one_source_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let source = parallel(temp.path(), &[("eng_Latn", &[]), ("deu_Latn", &[]), ("eng_Latn", &[])]);
        let out = temp.path().join("corpus");
        let said = import(source, &ImportSettings::new(0.5, 1), &out).unwrap_err();
        let said = said.to_string();
        assert!(
            said.contains("the source parallel has the language eng_Latn twice"),
            "{said}"
        );
    }

    #[test]
    fn of_equal_texts_the_held_out_one_stays() {
        let temp = tempfile::tempdir().unwrap();
        let passages: &[_] = &[
            ("a", "same"),
            ("b", "other"),
            ("c", "same"),
            ("d/1", "more"),
            ("d/2", "same"),
        ];
        for seed in 0..20 {
            let out = temp.path().join(format!("corpus{seed}"));
            let source = parallel(
                temp.path(),
                &[("eng_Latn", passages), ("deu_Latn", &[("c", "gleich"), ("b", "same")])],
            );
            let Ok(manifest) = import(source, &ImportSettings::new(0.25, seed), &out) else {
                panic!("something is left to train on");
            };
            let corpus = crate::Corpus::open(&out).unwrap();
            let english = &manifest.languages[1];
            let of = |split| corpus.all_documents(english, split).unwrap();
            let measured = of(Split::HeldOut);
            let passage = measured[0].passage().to_owned();
            assert!(
                measured.iter().all(|document| document.passage() == passage),
                "one of four is held out"
            );
            let holds_same = passages
                .iter()
                .any(|(key, text)| key.starts_with(&passage) && *text == "same");
            assert_eq!(measured.iter().any(|document| document.text == "same"), holds_same);
            assert!(
                of(Split::Train)
                    .iter()
                    .all(|document| document.text != "same" || !holds_same)
            );
            assert_eq!(english.duplicates, 2);
            assert!(
                of(Split::Train)
                    .iter()
                    .chain(&measured)
                    .all(|d| d.loss_from == d.text.len() / 2)
            );
        }
    }
}
