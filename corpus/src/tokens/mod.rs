//! Token shards: the training half of a corpus as token ids, documents grouped by language, and a manifest.
//! `tokens.bin` and `tokens.idx` are Megatron's format; `manifest.json` says which language lies where.

pub(crate) mod indexed;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::finished::{Unfinished, write_synced};
use crate::tokens::indexed::{Indexed, IndexedWriter};
use crate::{Corpus, Document, Error, Language, Progress, Result, Split, TokenType, Tokenizer};

const MANIFEST: &str = "manifest.json";
const PREFIX: &str = "tokens";

/// `manifest.json`: what the shards hold and from what they were made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensManifest {
    /// Version of this layout.
    pub format: u32,
    /// In the order of their names, which is their order in `tokens.bin`.
    pub languages: Vec<LanguageTokens>,
    pub documents: u64,
    pub tokens: u64,
    pub token_type: TokenType,
    /// Rows the embedding needs at least.
    pub vocabulary_size: usize,
    /// Ids written before and after every document.
    pub document_start: Option<u32>,
    pub document_end: Option<u32>,
    /// BLAKE3 of the `tokenizer.json` used.
    pub tokenizer_digest: String,
    pub corpus_digest: String,
    /// BLAKE3 over `tokens.bin` and `tokens.idx`.
    pub digest: String,
}

/// Where one language lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanguageTokens {
    pub language: Language,
    pub documents: Range<u64>,
    /// Positions in `tokens.bin`, in tokens.
    pub tokens: Range<u64>,
}

/// Tokenises the training half of a corpus on all cores. The named tokens are written around every document.
/// Progress counts languages.
pub fn tokenize(
    corpus: &Corpus,
    tokenizer_folder: &Path,
    out: &Path,
    document_start: Option<&str>,
    document_end: Option<&str>,
    progress: Progress,
) -> Result<TokensManifest> {
    let tokenizer = Tokenizer::open(tokenizer_folder)?;
    let start = document_start
        .map(|token| named(&tokenizer, token, "start"))
        .transpose()?;
    let end = document_end.map(|token| named(&tokenizer, token, "end")).transpose()?;
    let token_type = TokenType::for_size(tokenizer.size());
    let folder = Unfinished::begin(out, MANIFEST)?;
    let mut writer = IndexedWriter::create(&folder.path().join(PREFIX), token_type)?;
    let mut languages = Vec::new();
    let (mut documents, mut tokens) = (0, 0);

    let entries = &corpus.manifest().languages;
    for (done, entry) in entries.iter().enumerate() {
        let texts = shuffled(corpus.documents(&entry.language, Split::Train)?);
        let texts: Vec<&str> = texts.iter().map(|document| document.text.as_str()).collect();
        let (first_document, first_token) = (documents, tokens);
        for ids in tokenizer.encode_batch(&texts)? {
            let ids: Vec<u32> = start.into_iter().chain(ids).chain(end).collect();
            writer.write_document(&ids)?;
            documents += 1;
            tokens += ids.len() as u64;
        }
        let language = entry.language.clone();
        languages.push(LanguageTokens {
            language,
            documents: first_document..documents,
            tokens: first_token..tokens,
        });
        progress(done as u64 + 1, entries.len() as u64);
    }
    let manifest = TokensManifest {
        format: 1,
        languages,
        documents,
        tokens,
        token_type,
        vocabulary_size: tokenizer.size(),
        document_start: start,
        document_end: end,
        tokenizer_digest: tokenizer.digest().to_owned(),
        corpus_digest: corpus.digest(),
        digest: writer.finish()?,
    };
    let path = folder.path().join(MANIFEST);
    write_synced(
        &path,
        &serde_json::to_vec_pretty(&manifest).map_err(Error::json(&path))?,
    )?;
    folder.finish()?;
    Ok(manifest)
}

fn named(tokenizer: &Tokenizer, token: &str, place: &'static str) -> Result<u32> {
    let missing = || Error::NoSuchToken {
        path: tokenizer.path().to_path_buf(),
        token: token.to_owned(),
        place,
    };
    tokenizer.id(token).ok_or_else(missing)
}

/// Documents in an order that depends on their names only, so that neighbours in the source are not neighbours here.
fn shuffled(mut documents: Vec<Document>) -> Vec<Document> {
    documents.sort_by_cached_key(|document| (*blake3::hash(document.key.as_bytes()).as_bytes(), document.key.clone()));
    documents
}

/// Token shards, opened: mapped, not read.
pub struct TokenShards {
    folder: PathBuf,
    manifest: TokensManifest,
    indexed: Indexed,
}

impl TokenShards {
    /// Opens a finished folder of token shards and checks the files' sizes against the manifest.
    pub fn open(folder: &Path) -> Result<TokenShards> {
        let path = folder.join(MANIFEST);
        if !path.is_file() {
            let (what, command) = ("folder of token shards", "panglot tokenize");
            return Err(Error::NotFinished {
                path: folder.to_path_buf(),
                what,
                marker: MANIFEST,
                command,
            });
        }
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        let manifest: TokensManifest = serde_json::from_slice(&bytes).map_err(Error::json(&path))?;
        let indexed = Indexed::open(&folder.join(PREFIX))?;
        check(&manifest, &indexed)?;
        Ok(TokenShards {
            folder: folder.to_path_buf(),
            manifest,
            indexed,
        })
    }

    /// Opens `PREFIX.bin` and `PREFIX.idx` as Megatron's preprocessing wrote them: all documents are of one language.
    /// What such files do not say about their vocabulary stays empty in the manifest.
    pub fn open_megatron(prefix: &Path, language: Language) -> Result<TokenShards> {
        let indexed = Indexed::open(prefix)?;
        let (documents, tokens) = (indexed.n_documents(), indexed.n_tokens());
        let manifest = TokensManifest {
            format: 1,
            languages: vec![LanguageTokens {
                language,
                documents: 0..documents,
                tokens: 0..tokens,
            }],
            documents,
            tokens,
            token_type: indexed.token_type(),
            vocabulary_size: 0,
            document_start: None,
            document_end: None,
            tokenizer_digest: String::new(),
            corpus_digest: String::new(),
            digest: String::new(),
        };
        Ok(TokenShards {
            folder: prefix.to_path_buf(),
            manifest,
            indexed,
        })
    }

    pub fn manifest(&self) -> &TokensManifest {
        &self.manifest
    }

    /// Where the shards lie.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The tokens at these positions of `tokens.bin`. The range must lie inside a language's.
    pub fn tokens(&self, range: Range<u64>) -> Vec<i64> {
        let mut tokens = Vec::with_capacity((range.end - range.start) as usize);
        self.copy_tokens(range, &mut tokens);
        tokens
    }

    /// Where one document's tokens lie.
    pub fn document(&self, document: u64) -> Result<Range<u64>> {
        self.indexed.document(document)
    }

    /// Reads everything and compares it with the digest in the manifest.
    pub fn verify(&self) -> Result<()> {
        let found = self.indexed.digest();
        if self.manifest.digest.is_empty() || found == self.manifest.digest {
            return Ok(());
        }
        let reason = format!(
            "the files were changed (digest {found}, the manifest says {})",
            self.manifest.digest
        );
        Err(Error::BadShards {
            path: self.folder.clone(),
            reason,
        })
    }

    pub(crate) fn copy_tokens(&self, range: Range<u64>, into: &mut Vec<i64>) {
        self.indexed.copy_tokens(range, into);
    }
}

/// The manifest against the files it describes.
fn check(manifest: &TokensManifest, indexed: &Indexed) -> Result<()> {
    let differs = |what: &str, says: String, found: String| Error::BadShards {
        path: indexed.bin_path().to_path_buf(),
        reason: format!("the manifest says {what} {says}, the files have {found}: they do not belong together"),
    };
    if manifest.token_type != indexed.token_type() {
        return Err(differs(
            "token type",
            format!("{:?}", manifest.token_type),
            format!("{:?}", indexed.token_type()),
        ));
    }
    if manifest.documents != indexed.n_documents() {
        return Err(differs(
            "documents",
            manifest.documents.to_string(),
            indexed.n_documents().to_string(),
        ));
    }
    if manifest.tokens != indexed.n_tokens() {
        return Err(differs(
            "tokens",
            manifest.tokens.to_string(),
            indexed.n_tokens().to_string(),
        ));
    }
    let (mut documents, mut tokens) = (0, 0);
    for entry in &manifest.languages {
        if entry.documents.start != documents || entry.tokens.start != tokens || entry.tokens.end < tokens {
            return Err(differs("ranges of", entry.language.to_string(), "no such gap".into()));
        }
        (documents, tokens) = (entry.documents.end, entry.tokens.end);
    }
    if (documents, tokens) != (manifest.documents, manifest.tokens) {
        return Err(differs(
            "languages up to token",
            tokens.to_string(),
            manifest.tokens.to_string(),
        ));
    }
    Ok(())
}
