//! The door to tokenizers: text to ids and back, nothing added, cut or padded unasked. Hugging Face's `tokenizers` says
//! what the ids are; where our own engine understands the file, it finds the same ids sooner.
//! Batches are encoded on all cores; the result does not depend on how many there are.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rayon::prelude::*;
use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

use crate::folder::digest_of;
use crate::vocabulary::engine::Engine;
use crate::vocabulary::sentencepiece;
use crate::{Error, Result};

/// The file a tokenizer's folder must hold.
pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// A folder's `tokenizer.json`, or what it would be where there is only SentencePiece's `tokenizer.model`.
pub(crate) fn tokenizer_file(folder: &Path) -> Result<Vec<u8>> {
    let path = folder.join(TOKENIZER);
    match fs::read(&path) {
        Ok(bytes) => Ok(bytes),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && sentencepiece::is_in(folder) => {
            sentencepiece::converted(folder)
        }
        Err(e) => Err(Error::io("read", &path)(e)),
    }
}

/// A tokenizer, ready to encode from any thread.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// `None` if it does not understand this tokenizer.
    engine: Option<Engine>,
    /// The same, but special tokens in a text are read as such; made when a prompt asks for it.
    prompts: OnceLock<tokenizers::Tokenizer>,
    special: HashSet<u32>,
    path: PathBuf,
    digest: String,
    size: usize,
}

impl Tokenizer {
    /// Opens the `tokenizer.json` in a folder. Truncation and padding that it may ask for are switched off: they
    /// would lose text. Text that happens to spell a special token is encoded as the text it is.
    pub fn open(folder: &Path) -> Result<Tokenizer> {
        let path = folder.join(TOKENIZER);
        let bytes = tokenizer_file(folder)?;
        let bad = |e: tokenizers::Error| Error::BadTokenizer {
            path: path.clone(),
            reason: e.to_string(),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(bad)?;
        inner.with_truncation(None).map_err(bad)?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(true);
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id);
        let special = special.collect();
        let size = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        Ok(Tokenizer {
            engine: Engine::understand(&bytes, &inner),
            inner,
            prompts: OnceLock::new(),
            special,
            digest: digest_of(&bytes),
            path,
            size,
        })
    }

    /// The ids of a text, without the special tokens a model may want around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.engine {
            Some(engine) => engine.encode(text, &self.inner).map_err(|e| self.bad(e)),
            None => self.encode_plainly(text),
        }
    }

    /// The ids of a prompt: with what the tokenizer puts around a text (LLaMA's `<s>`), and with special tokens in it read
    /// as such (a chat's turns).
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let prompts = self.prompts.get_or_init(|| {
            let mut prompts = self.inner.clone();
            prompts.set_encode_special_tokens(false);
            prompts
        });
        let encoding = prompts.encode_fast(text, true).map_err(|e| self.bad(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Whether the id is of a special token, which is no part of a text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The same ids by the `tokenizers` crate alone: what [`encode`](Self::encode) must agree with.
    pub fn encode_plainly(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| self.bad(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Whether our own engine encodes, and not the `tokenizers` crate.
    pub fn is_fast(&self) -> bool {
        self.engine.is_some()
    }

    /// Where what each text's first token stands for ends, in bytes; between two characters, also where tokens are bytes. By the
    /// `tokenizers` crate, on all cores.
    pub fn ends_of_first_tokens(&self, texts: &[&str]) -> Result<Vec<usize>> {
        let end = |text: &&str| {
            let encoding = self.inner.encode(*text, false).map_err(|e| self.bad(e))?;
            let second = encoding.get_offsets().get(1).map_or(text.len(), |(begin, _)| *begin);
            Ok((0..=second.min(text.len()))
                .rev()
                .find(|at| text.is_char_boundary(*at))
                .unwrap_or(0))
        };
        texts.par_iter().map(end).collect()
    }

    /// The ids of many texts, in their order, on all cores.
    pub fn encode_batch(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text)).collect()
    }

    /// The text of ids; special tokens are spelled out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|e| self.bad(e))
    }

    /// The id of a piece or special token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The piece or special token of an id, in the vocabulary's own alphabet.
    pub fn piece(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// One more than the largest id: the rows an embedding needs.
    pub fn size(&self) -> usize {
        self.size
    }

    /// BLAKE3 of the `tokenizer.json`.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The `tokenizer.json`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The crate's tokenizer itself.
    pub(crate) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// Hands on the words of a text, as [`spell`](Self::spell) takes them. Added tokens are text here.
    pub(crate) fn each_word(&self, text: &str, word: &mut dyn FnMut(&[u8])) -> Result<()> {
        match &self.engine {
            Some(engine) => engine.each_word(text, &self.inner, word),
            None => self.each_word_plainly(text, word),
        }
        .map_err(|e| self.bad(e))
    }

    /// Appends the ids of one word.
    pub(crate) fn spell(&self, word: &[u8], into: &mut Vec<u32>) -> Result<()> {
        match &self.engine {
            Some(engine) => engine.spell(word, &self.inner, into),
            None => self.spell_plainly(word, into),
        }
        .map_err(|e| self.bad(e))
    }

    fn each_word_plainly(&self, text: &str, word: &mut dyn FnMut(&[u8])) -> tokenizers::Result<()> {
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = self.inner.get_normalizer() {
            normalizer.normalize(&mut normalized)?;
        }
        let mut words = PreTokenizedString::from(normalized);
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut words)?;
        }
        let splits = words.get_splits(OffsetReferential::Normalized, OffsetType::None);
        splits.into_iter().for_each(|(found, _, _)| word(found.as_bytes()));
        Ok(())
    }

    fn spell_plainly(&self, word: &[u8], into: &mut Vec<u32>) -> tokenizers::Result<()> {
        let tokens = self.inner.get_model().tokenize(std::str::from_utf8(word)?)?;
        into.extend(tokens.iter().map(|token| token.id));
        Ok(())
    }

    fn bad(&self, error: tokenizers::Error) -> Error {
        Error::BadTokenizer {
            path: self.path.clone(),
            reason: error.to_string(),
        }
    }
}
