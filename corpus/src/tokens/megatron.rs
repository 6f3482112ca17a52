//! Files that Megatron's preprocessing tool made, taken in without copying: found by their names, checked once from end to
//! end, described in the manifest, and mapped where they lie.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::tokens::TokenFile;
use crate::tokens::indexed::Indexed;
use crate::{Error, Language, Result};

/// Megatron's own ending of a prefix for the field `text`, cut to documents.
const TEXT_DOCUMENT: &str = "_text_document";

/// Tokens or documents looked at together, on one core.
const CHUNK: u64 = 1 << 13;

/// A pair of `.bin` and `.idx`, all of one language.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MegatronFiles {
    /// Without `.bin` and `.idx`.
    pub prefix: PathBuf,
    pub language: Language,
    /// As the config names it.
    pub source: String,
}

impl MegatronFiles {
    /// The pairs in a folder, by name: `<lll_Ssss>.bin` or `<lll_Ssss>_text_document.bin`, each with its `.idx`. A file
    /// of another name that ends in `.bin`, and a folder without any, are errors: nothing is passed over silently.
    pub fn find(folder: &Path, source: &str) -> Result<Vec<MegatronFiles>> {
        let entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::io("list", folder))?.path();
            if path.extension().is_none_or(|extension| extension != "bin") {
                continue;
            }
            let prefix = path.with_extension("");
            let name = prefix.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let language = name.strip_suffix(TEXT_DOCUMENT).unwrap_or(&name).parse();
            let language = language.map_err(|_| Error::MegatronName { path: path.clone() })?;
            found.push(MegatronFiles {
                prefix,
                language,
                source: source.to_owned(),
            });
        }
        if found.is_empty() {
            let rule =
                "a source of Megatron files has <lll_Ssss>.bin and <lll_Ssss>.idx, or <lll_Ssss>_text_document.*";
            let path = folder.to_path_buf();
            return Err(Error::EmptyCorpus { path, rule });
        }
        found.sort_by(|a, b| (&a.language, &a.prefix).cmp(&(&b.language, &b.prefix)));
        if let Some(pair) = found.windows(2).find(|pair| pair[0].language == pair[1].language) {
            return Err(Error::MegatronTwice {
                language: pair[0].language.clone(),
                first: pair[0].prefix.clone(),
                second: pair[1].prefix.clone(),
            });
        }
        Ok(found)
    }

    /// Reads all of it once: a damaged index and an id outside of the vocabulary are found here and not in a run.
    pub(crate) fn check(&self, vocabulary_size: usize) -> Result<TokenFile> {
        let prefix = std::path::absolute(&self.prefix).map_err(Error::io("find", &self.prefix))?;
        let indexed = Indexed::open(&prefix)?;
        let chunks = chunks(indexed.n_documents());
        chunks.try_for_each(|documents| indexed.lengths(documents, &mut Vec::new()).map(drop))?;
        check_ids(&indexed, vocabulary_size)?;
        Ok(TokenFile {
            documents: indexed.n_documents(),
            tokens: indexed.n_tokens(),
            token_type: indexed.token_type(),
            idx_digest: indexed.idx_digest(),
            prefix,
        })
    }
}

impl TokenFile {
    /// Maps the files; they must still have the sizes they had.
    pub(crate) fn open(&self) -> Result<Indexed> {
        let indexed = Indexed::open(&self.prefix)?;
        let now = (indexed.n_documents(), indexed.n_tokens(), indexed.token_type());
        if now == (self.documents, self.tokens, self.token_type) {
            return Ok(indexed);
        }
        let (documents, tokens, token_type) = now;
        let reason = format!(
            "the files were changed: {documents} documents with {tokens} tokens of type {token_type:?} now, {} with {} of \
             type {:?} when they were taken in",
            self.documents, self.tokens, self.token_type
        );
        let path = indexed.idx_path().to_path_buf();
        Err(Error::BadShards { path, reason })
    }
}

/// The first id that the vocabulary does not have is named with its document.
pub(crate) fn check_ids(indexed: &Indexed, vocabulary_size: usize) -> Result<()> {
    let size = vocabulary_size as i64;
    let outside = chunks(indexed.n_tokens()).find_map_first(|range| {
        let mut tokens = Vec::new();
        let first = range.start;
        indexed.copy_tokens(range, &mut tokens);
        let at = tokens.iter().position(|id| !(0..size).contains(id))?;
        Some((first + at as u64, tokens[at]))
    });
    let Some((token, id)) = outside else { return Ok(()) };
    let document = indexed.document_at(token, 0..indexed.n_documents());
    Err(Error::IdOutside {
        path: indexed.bin_path().to_path_buf(),
        id,
        document,
        token: token - indexed.document(document)?.start,
        vocabulary_size,
    })
}

/// `0..n` in stretches, over all cores.
fn chunks(n: u64) -> impl IndexedParallelIterator<Item = std::ops::Range<u64>> {
    (0..n.div_ceil(CHUNK) as usize)
        .into_par_iter()
        .map(move |chunk| chunk as u64 * CHUNK..n.min((chunk as u64 + 1) * CHUNK))
}
