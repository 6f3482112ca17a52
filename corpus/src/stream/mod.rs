//! The stream of training rows: `row(index)` is a pure function of the token shards, the settings and the index.
//! No buffers and no state: any rank of any world size reads any row at once, so a resumed run has nothing to restore.
//!
//!   l = language(i)                      shares p_l ∝ n_l^α, evenly spread (shares.rs)
//!   k = rows of l before i
//!   e, j = k div B_l, k mod B_l          B_l = ⌈n_l / T⌉ blocks of T tokens, documents end to end
//!   row  = block π_{l,e}(j)              a new permutation each epoch: no block twice before all were seen

mod permutation;
pub(crate) mod shares;

use crate::stream::permutation::{Permutation, mix};
use crate::stream::shares::{LanguageOrder, shares};
use crate::{Error, Language, Result, TokenShards};

/// Language-sampled rows of equal length over token shards.
pub struct Stream {
    shards: TokenShards,
    sequence_length: usize,
    languages: Vec<Language>,
    shares: Vec<f64>,
    order: LanguageOrder,
    /// One key a language: of the seed and the language's name, not of its place in the list.
    keys: Vec<u64>,
}

/// One row of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Index into [`Stream::languages`].
    pub language: usize,
    /// `sequence_length` ids.
    pub tokens: Vec<i64>,
}

impl Stream {
    /// Samples languages with p_l ∝ n_l^`alpha` over their training tokens n_l.
    pub fn new(shards: TokenShards, seed: u64, alpha: f64, sequence_length: usize) -> Result<Stream> {
        if !(0.0..=1.0).contains(&alpha) {
            return Err(Error::Alpha { value: alpha });
        }
        if sequence_length == 0 {
            return Err(Error::SequenceLength { value: sequence_length });
        }
        let entries = &shards.manifest().languages;
        let languages: Vec<Language> = entries.iter().map(|entry| entry.language.clone()).collect();
        let tokens: Vec<u64> = entries
            .iter()
            .map(|entry| entry.tokens.end - entry.tokens.start)
            .collect();
        let units = shares(&tokens, alpha);
        if units.iter().all(|units| *units == 0) {
            return Err(Error::NoTokens {
                path: shards.folder().to_path_buf(),
            });
        }
        Ok(Stream {
            order: LanguageOrder::new(&units, key(seed, "offset of the first row")),
            keys: languages.iter().map(|language| key(seed, language.as_str())).collect(),
            shares: units.iter().map(|units| *units as f64 / 2f64.powi(64)).collect(),
            languages,
            sequence_length,
            shards,
        })
    }

    /// The row with this number, counted over all ranks and steps. `index` stays below 2⁶².
    pub fn row(&self, index: u64) -> Row {
        let language = self.order.language(index);
        let earlier = self.order.rows_before(index, language);
        let range = self.shards.manifest().languages[language].tokens.clone();
        let n_blocks = (range.end - range.start).div_ceil(self.sequence_length as u64);
        let (epoch, turn) = (earlier / n_blocks, earlier % n_blocks);
        let block = Permutation::new(n_blocks, mix(self.keys[language] ^ mix(epoch))).apply(turn);

        // The last block goes on at the language's start; a language shorter than one row goes round several times.
        let mut tokens = Vec::with_capacity(self.sequence_length);
        let mut at = range.start + block * self.sequence_length as u64;
        while tokens.len() < self.sequence_length {
            let missing = (self.sequence_length - tokens.len()) as u64;
            let end = range.end.min(at + missing);
            self.shards.copy_tokens(at..end, &mut tokens);
            at = range.start;
        }
        Row { language, tokens }
    }

    /// The languages of the shards, in their order; those without tokens have share 0.
    pub fn languages(&self) -> &[Language] {
        &self.languages
    }

    /// The probability of each language.
    pub fn shares(&self) -> &[f64] {
        &self.shares
    }

    /// How many of the rows `0..index` are in a language: what a run has seen so far.
    pub fn rows_before(&self, index: u64, language: usize) -> u64 {
        self.order.rows_before(index, language)
    }

    /// Tokens in a row.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// The shards the rows are cut from.
    pub fn shards(&self) -> &TokenShards {
        &self.shards
    }

    /// BLAKE3 over rows, languages and tokens, so that two runs can be compared by eye.
    pub fn digest(&self, first_row: u64, rows: u64) -> String {
        let mut hasher = blake3::Hasher::new();
        for index in first_row..first_row + rows {
            let row = self.row(index);
            hasher.update(self.languages[row.language].as_str().as_bytes());
            row.tokens.iter().for_each(|token| {
                hasher.update(&token.to_le_bytes());
            });
        }
        hasher.finalize().to_hex().to_string()
    }
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
