//! What an extension did for each language: tokens per byte, character and word of held-out text, and bytes that stand for
//! characters without a piece. Measured with both tokenizers on the same text.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Corpus, Language, Result, Tokenizer};

/// What one language's held-out text is, and the tokens it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fertility {
    pub language: Language,
    pub documents: u64,
    /// Of UTF-8 text.
    pub bytes: u64,
    /// Unicode scalar values.
    pub characters: u64,
    /// Runs without white space.
    pub words: u64,
    /// With the base tokenizer.
    pub tokens_before: u64,
    /// With the extended one.
    pub tokens_after: u64,
    /// Tokens that are single bytes of a longer character, with the base tokenizer.
    pub byte_tokens_before: u64,
    /// The same with the extended one.
    pub byte_tokens_after: u64,
    /// Documents that both tokenizers cut alike.
    pub documents_unchanged: u64,
    /// Tokens of the extended tokenizer that are the base's.
    pub base_tokens_after: u64,
}

/// Counts the tokens of every language's held-out text with both tokenizers. Languages without such text are left out.
pub fn fertility(corpus: &Corpus, base: &Tokenizer, extended: &Tokenizer) -> Result<Vec<Fertility>> {
    let is_byte = [byte_tokens(base), byte_tokens(extended)];
    let n_base = base.size() as u32;
    let measure = |language: &Language| -> Result<Fertility> {
        let mut all = Fertility::of_nothing(language);
        for document in corpus.held_out(language)? {
            let (before, after) = (base.encode(&document.text)?, extended.encode(&document.text)?);
            let bytes_in =
                |ids: &[u32], is_byte: &[bool]| ids.iter().filter(|id| is_byte[**id as usize]).count() as u64;
            all.documents += 1;
            all.bytes += document.text.len() as u64;
            all.characters += document.text.chars().count() as u64;
            all.words += document.text.split_whitespace().count() as u64;
            all.tokens_before += before.len() as u64;
            all.tokens_after += after.len() as u64;
            all.byte_tokens_before += bytes_in(&before, &is_byte[0]);
            all.byte_tokens_after += bytes_in(&after, &is_byte[1]);
            all.documents_unchanged += u64::from(before == after);
            all.base_tokens_after += after.iter().filter(|id| **id < n_base).count() as u64;
        }
        Ok(all)
    };
    let has_text = |language: &&Language| corpus.entries(language).any(|entry| entry.held_out.documents > 0);
    let languages = corpus.languages();
    languages.par_iter().filter(has_text).map(measure).collect()
}

impl Fertility {
    fn of_nothing(language: &Language) -> Fertility {
        Fertility {
            language: language.clone(),
            documents: 0,
            bytes: 0,
            characters: 0,
            words: 0,
            tokens_before: 0,
            tokens_after: 0,
            byte_tokens_before: 0,
            byte_tokens_after: 0,
            documents_unchanged: 0,
            base_tokens_after: 0,
        }
    }
}

/// By id, whether a token is one byte of a character that has more: `<0xE1>`, or a letter of the byte-level alphabet that
/// stands for a byte above 127.
fn byte_tokens(tokenizer: &Tokenizer) -> Vec<bool> {
    let falls_back = tokenizer.id("<0x00>").is_some();
    let is_byte = |piece: &str| match falls_back {
        true => piece.len() == 6 && piece.starts_with("<0x") && piece.ends_with('>') && piece >= "<0x80>",
        // GPT-2's alphabet: Latin-1 letters stand for themselves, U+0122 … U+0143 for the bytes that have none.
        false => {
            let mut letters = piece.chars();
            let first = letters.next();
            first.is_some_and(|c| matches!(c, '¡'..='ÿ' | '\u{122}'..='\u{143}')) && letters.next().is_none()
        }
    };
    (0..tokenizer.size() as u32)
        .map(|id| tokenizer.piece(id).is_some_and(|piece| is_byte(&piece)))
        .collect()
}
