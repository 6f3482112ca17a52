//! The stream of training rows: `row(index)` is a pure function of the token shards, the settings and the index.
//! No buffers and no state: any rank of any world size reads any row at once, so a resumed run has nothing to restore.
//!
//!   p = part(i)                          shares from the settings, evenly spread (sampling.rs, shares.rs)
//!   k = rows of p before i               exact, over all stages
//!   e, j = k div B_p, k mod B_p          B_p blocks of T tokens: documents end to end, or whole documents (packing.rs)
//!   row  = block π_{p,e}(j)              a new permutation each epoch: no block twice before all were seen
//!
//! A part is the text of one language from one source.

mod digest;
mod packing;
mod permutation;
mod sampling;
pub(crate) mod shares;

use std::collections::BTreeMap;
use std::ops::Range;

use rayon::prelude::*;

pub use crate::stream::digest::RowsDigest;
use crate::stream::packing::{Blocks, Piece};
use crate::stream::permutation::{Permutation, mix};
use crate::stream::sampling::Schedule;
pub use crate::stream::sampling::{Group, Sampling, Share, Stage};
use crate::{Error, Language, LanguageTokens, Result, TokenShards};

/// Everything that decides the rows beside the shards.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamSettings {
    pub seed: u64,
    /// Tokens in a row, T.
    pub sequence_length: usize,
    /// Rows of the whole run: what `max_epochs` counts and where a ramp of the last stage ends.
    pub run_rows: u64,
    pub sampling: Sampling,
    pub packing: Packing,
    pub attention: Attention,
}

/// How documents become rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Packing {
    /// End to end, cut every T tokens, as MaLA-500 has it: every position is used.
    #[default]
    Cut,
    /// Rows of whole documents, padded; only documents longer than a row are cut.
    Documents,
}

/// What a token may see of its row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attention {
    /// All that stands before it.
    #[default]
    Row,
    /// What stands before it of its own document.
    Document,
}

/// The text of one language from one source.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// `lll_Ssss`, with `source/` before it where the shards have several sources. Counts and tables go by it.
    pub name: String,
    pub source: String,
    pub language: Language,
    pub documents: u64,
    pub tokens: u64,
    /// Of the language, over all sources.
    pub language_tokens: u64,
    /// Rows that have as many of the part's tokens as it has: of documents laid end to end no whole number, since the last
    /// row of an epoch goes on at the part's start.
    pub rows_per_epoch: f64,
}

/// Language-sampled rows of equal length over token shards.
pub struct Stream {
    shards: TokenShards,
    settings: StreamSettings,
    parts: Vec<Part>,
    blocks: Vec<Blocks>,
    schedule: Schedule,
    /// One key a part: of the seed and the part's names, not of its place in the list.
    keys: Vec<u64>,
    /// Fills rows of whole documents. Never a target, and nothing that is one sees it.
    padding: i64,
}

/// One row of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Index into [`Stream::parts`].
    pub part: usize,
    /// T ids.
    pub tokens: Vec<i64>,
    /// Whether the model learns to predict the token: not the first of a row, no padding, no prompt, and, where attention
    /// stays within documents, not the first of a document.
    pub is_target: Vec<bool>,
    /// Positions behind which nothing before is seen, from 0 on, padding included; empty with [`Attention::Row`].
    pub document_starts: Vec<u32>,
}

impl Row {
    /// Tokens that the model learns to predict.
    pub fn n_targets(&self) -> usize {
        self.is_target.iter().filter(|target| **target).count()
    }
}

/// A part in the run that is planned.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PartPlan {
    pub name: String,
    pub source: String,
    pub language: Language,
    /// By the settings' thresholds.
    pub group: Option<String>,
    pub documents: u64,
    pub tokens: u64,
    /// Probability in each stage; the mean where it moves.
    pub shares: Vec<f64>,
    /// In the run, exactly.
    pub rows: u64,
    /// Tokens of the part in those rows, without padding.
    pub expected_tokens: u64,
    /// How often each of its tokens is read.
    pub epochs: f64,
}

impl Stream {
    /// Opens the stream; all that the settings ask for must be possible with these shards.
    pub fn new(shards: TokenShards, settings: StreamSettings) -> Result<Stream> {
        if settings.sequence_length == 0 || settings.sequence_length > i32::MAX as usize {
            return Err(Error::SequenceLength {
                value: settings.sequence_length,
            });
        }
        let manifest = shards.manifest();
        if manifest.tokens == 0 {
            return Err(Error::NoTokens {
                path: shards.folder().to_path_buf(),
            });
        }
        let length = settings.sequence_length as u64;
        let documents_matter = settings.attention == Attention::Document || manifest.has_prompts;
        let blocks = manifest
            .languages
            .par_iter()
            .map(|part| Blocks::new(&shards, part, settings.packing, length, documents_matter))
            .collect::<Result<Vec<_>>>()?;
        let parts = parts(&manifest.languages, &blocks, length);
        let key = |purpose: &str| key(settings.seed, purpose);
        let offset = key("offset of the first row");
        Ok(Stream {
            schedule: Schedule::new(&parts, &settings.sampling, length, settings.run_rows, offset)?,
            keys: parts
                .iter()
                .map(|part| key(&format!("{}\0{}", part.source, part.language)))
                .collect(),
            padding: i64::from(manifest.document_end.or(manifest.document_start).unwrap_or(0)),
            blocks,
            parts,
            settings,
            shards,
        })
    }

    /// The row with this number, counted over all ranks and steps. `index` stays below 2⁶².
    pub fn row(&self, index: u64) -> Row {
        let part = self.schedule.part(index);
        let turn = self.schedule.rows_before(index, part);
        let n_blocks = self.blocks[part].len();
        let (epoch, turn) = (turn / n_blocks, turn % n_blocks);
        let block = Permutation::new(n_blocks, mix(self.keys[part] ^ mix(epoch))).apply(turn);
        match &self.blocks[part] {
            Blocks::Cut(_) => self.cut(part, block),
            Blocks::Packed(windows) => {
                let pieces = windows.pieces(&self.shards, block, self.settings.sequence_length as u64);
                self.packed(part, &pieces)
            }
        }
    }

    /// The part of a row, without reading it.
    pub fn part(&self, index: u64) -> usize {
        self.schedule.part(index)
    }

    /// The parts, in the order of the shards; those that are never read are among them.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// How many of the rows `0..index` are of a part: what a run has read so far.
    pub fn rows_before(&self, index: u64, part: usize) -> u64 {
        self.schedule.rows_before(index, part)
    }

    /// Digest of the rows in a range.
    pub fn digest(&self, rows: Range<u64>) -> RowsDigest {
        let mut digest = RowsDigest::default();
        rows.for_each(|index| digest.add(index, &self.row(index)));
        digest
    }

    /// The first row of each stage; one that the run does not reach begins behind its end.
    pub fn stages(&self) -> &[u64] {
        self.schedule.stages()
    }

    /// What the run will read of each part.
    pub fn plan(&self) -> Vec<PartPlan> {
        let by_stage: Vec<Vec<f64>> = (0..self.stages().len())
            .map(|stage| self.schedule.shares(stage))
            .collect();
        let rows = self.schedule.all_rows_before(self.settings.run_rows);
        let plan = |(part, rows): (usize, u64)| {
            let Part {
                name,
                source,
                language,
                documents,
                tokens,
                language_tokens,
                rows_per_epoch,
            } = self.parts[part].clone();
            let epochs = if rows == 0 { 0.0 } else { rows as f64 / rows_per_epoch };
            PartPlan {
                group: self
                    .settings
                    .sampling
                    .group(language_tokens)
                    .map(|group| group.name.clone()),
                shares: by_stage.iter().map(|shares| shares[part]).collect(),
                expected_tokens: (epochs * tokens as f64).round() as u64,
                name,
                source,
                language,
                documents,
                tokens,
                rows,
                epochs,
            }
        };
        rows.into_iter().enumerate().map(plan).collect()
    }

    pub fn settings(&self) -> &StreamSettings {
        &self.settings
    }

    /// The shards the rows are cut from.
    pub fn shards(&self) -> &TokenShards {
        &self.shards
    }

    /// Block `block` of the part's documents laid end to end. The last goes on at the part's start; a part shorter than
    /// one row goes round several times.
    fn cut(&self, part: usize, block: u64) -> Row {
        let entry = &self.shards.manifest().languages[part];
        let length = self.settings.sequence_length;
        let mut row = self.empty_row(part);
        let mut at = entry.tokens.start + block * length as u64;
        while row.tokens.len() < length {
            let end = entry.tokens.end.min(at + (length - row.tokens.len()) as u64);
            let first = row.tokens.len();
            self.shards.copy_tokens(at..end, &mut row.tokens);
            row.is_target.resize(row.tokens.len(), true);
            self.mark_documents(&mut row, first, at..end, entry);
            at = entry.tokens.start;
        }
        row.is_target[0] = false;
        row
    }

    /// Finds the documents of a stretch of tokens that stands at `first` in the row, where it matters.
    fn mark_documents(&self, row: &mut Row, first: usize, tokens: Range<u64>, part: &LanguageTokens) {
        let within_documents = self.settings.attention == Attention::Document;
        if !within_documents && !self.shards.manifest().has_prompts {
            return;
        }
        let mut document = self.shards.document_at(tokens.start, part);
        loop {
            let range = self
                .shards
                .document(document)
                .expect("the index was checked at opening");
            let here = range.start.max(tokens.start)..range.end.min(tokens.end);
            if !here.is_empty() {
                let at = first + (here.start - tokens.start) as usize;
                if within_documents {
                    row.document_starts.push(at as u32);
                    row.is_target[at] = false;
                }
                let prompt = (range.start + u64::from(self.shards.prompt(document))).min(here.end);
                let prompt = prompt.saturating_sub(here.start) as usize;
                row.is_target[at..at + prompt].fill(false);
            }
            document += 1;
            if range.end >= tokens.end || document >= part.documents.end {
                return;
            }
        }
    }

    /// A row of whole documents, then padding.
    fn packed(&self, part: usize, pieces: &[Piece]) -> Row {
        let within_documents = self.settings.attention == Attention::Document;
        let mut row = self.empty_row(part);
        for Piece { document, tokens } in pieces {
            let at = row.tokens.len();
            let range = self
                .shards
                .document(*document)
                .expect("the index was checked at opening");
            self.shards
                .copy_tokens(range.start + tokens.start..range.start + tokens.end, &mut row.tokens);
            row.is_target.resize(row.tokens.len(), true);
            let prompt = u64::from(self.shards.prompt(*document)).clamp(tokens.start, tokens.end) - tokens.start;
            row.is_target[at..at + prompt as usize].fill(false);
            if within_documents {
                row.document_starts.push(at as u32);
                row.is_target[at] = false;
            }
        }
        if row.tokens.len() < self.settings.sequence_length && within_documents {
            row.document_starts.push(row.tokens.len() as u32);
        }
        row.tokens.resize(self.settings.sequence_length, self.padding);
        row.is_target.resize(self.settings.sequence_length, false);
        row.is_target[0] = false;
        row
    }

    fn empty_row(&self, part: usize) -> Row {
        Row {
            part,
            tokens: Vec::with_capacity(self.settings.sequence_length),
            is_target: Vec::with_capacity(self.settings.sequence_length),
            document_starts: Vec::new(),
        }
    }
}

fn parts(entries: &[LanguageTokens], blocks: &[Blocks], length: u64) -> Vec<Part> {
    let one_source = entries.windows(2).all(|pair| pair[0].source == pair[1].source);
    let mut by_language: BTreeMap<&Language, u64> = BTreeMap::new();
    for entry in entries {
        *by_language.entry(&entry.language).or_default() += entry.n_tokens();
    }
    let part = |(entry, blocks): (&LanguageTokens, &Blocks)| Part {
        name: match one_source {
            true => entry.language.to_string(),
            false => format!("{}/{}", entry.source, entry.language),
        },
        source: entry.source.clone(),
        language: entry.language.clone(),
        documents: entry.documents.end - entry.documents.start,
        tokens: entry.n_tokens(),
        language_tokens: by_language[&entry.language],
        rows_per_epoch: match blocks {
            Blocks::Cut(_) => entry.n_tokens() as f64 / length as f64,
            Blocks::Packed(_) => blocks.len() as f64,
        },
    };
    entries.iter().zip(blocks).map(part).collect()
}

/// 64 bits out of the seed, for one use.
fn key(seed: u64, purpose: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(purpose.as_bytes());
    u64::from_le_bytes(
        hasher.finalize().as_bytes()[..8]
            .try_into()
            .expect("a digest has 32 bytes"),
    )
}
