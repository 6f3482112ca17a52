//! The door to Hugging Face's `tokenizers`: text to ids and back, nothing added, cut or padded unasked.
//! Batches are encoded on all cores; the result does not depend on how many there are.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::folder::digest_of;
use crate::{Error, Result};

/// The file a tokenizer's folder must hold.
pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// A tokenizer, ready to encode from any thread.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    digest: String,
    size: usize,
}

impl Tokenizer {
    /// Opens the `tokenizer.json` in a folder. Truncation and padding that it may ask for are switched off: they
    /// would lose text. Text that happens to spell a special token is encoded as the text it is.
    pub fn open(folder: &Path) -> Result<Tokenizer> {
        let path = folder.join(TOKENIZER);
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        let bad = |e: tokenizers::Error| Error::BadTokenizer {
            path: path.clone(),
            reason: e.to_string(),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(bad)?;
        inner.with_truncation(None).map_err(bad)?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(true);
        let size = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        Ok(Tokenizer {
            inner,
            digest: digest_of(&bytes),
            path,
            size,
        })
    }

    /// The ids of a text, without the special tokens a model may want around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| self.bad(e))?;
        Ok(encoding.get_ids().to_vec())
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

    /// The engine itself, for learning new pieces over it.
    pub(crate) fn engine(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    pub(crate) fn bad(&self, error: tokenizers::Error) -> Error {
        Error::BadTokenizer {
            path: self.path.clone(),
            reason: error.to_string(),
        }
    }
}
