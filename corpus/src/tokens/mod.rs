//! Token shards: the training half of a corpus as token ids, documents grouped by source and language, and a manifest.
//! `tokens.bin` and `tokens.idx` are Megatron's format; files of Megatron's own tool stand beside them where they are.

pub(crate) mod indexed;
mod megatron;

use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::finished::{Unfinished, read_manifest, write_synced};
use crate::tokens::indexed::{Counts, CountsWriter, Indexed, IndexedWriter, update_with_file};
pub use crate::tokens::megatron::MegatronFiles;
use crate::{Corpus, Document, Error, Language, Progress, Result, Split, TokenType, Tokenizer};

const MANIFEST: &str = "manifest.json";
const PREFIX: &str = "tokens";
/// Beside them where some document has a prompt: for each document a u32, its leading tokens that are read, not learned.
const PROMPTS: &str = "tokens.prompts";

/// `manifest.json`: what the shards hold and from what they were made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensManifest {
    /// Version of this layout.
    pub format: u32,
    /// The parts, in their order in the files: those of `tokens.bin`, then one for each of `files`.
    pub languages: Vec<LanguageTokens>,
    /// Over all files.
    pub documents: u64,
    pub tokens: u64,
    /// Of `tokens.bin`.
    pub token_type: TokenType,
    /// Rows the embedding needs at least.
    pub vocabulary_size: usize,
    /// Ids written before and after every document.
    pub document_start: Option<u32>,
    pub document_end: Option<u32>,
    /// BLAKE3 of the `tokenizer.json` used.
    pub tokenizer_digest: String,
    pub corpus_digest: String,
    /// Whether `tokens.prompts` is there.
    #[serde(default)]
    pub has_prompts: bool,
    /// Files of Megatron's preprocessing tool, used where they lie.
    #[serde(default)]
    pub files: Vec<TokenFile>,
    /// BLAKE3 over `tokens.bin`, `tokens.idx`, `tokens.prompts` and the entries of `files`.
    pub digest: String,
}

/// One part: the text of one language from one source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanguageTokens {
    pub language: Language,
    /// Where the text is from, as the config names it; empty in shards made before sources had names.
    #[serde(default)]
    pub source: String,
    /// Counted over all files.
    pub documents: Range<u64>,
    /// Positions over all files end to end, in tokens.
    pub tokens: Range<u64>,
}

impl LanguageTokens {
    /// Tokens of the part.
    pub fn n_tokens(&self) -> u64 {
        self.tokens.end - self.tokens.start
    }
}

/// A pair of files that are not ours and stay where they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenFile {
    /// Without `.bin` and `.idx`.
    pub prefix: PathBuf,
    pub documents: u64,
    pub tokens: u64,
    pub token_type: TokenType,
    /// BLAKE3 of `.idx`.
    pub idx_digest: String,
}

/// What is written around documents, and which finished files are taken in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizeSettings {
    /// The special token before every document.
    pub document_start: Option<String>,
    /// The special token after every document.
    pub document_end: Option<String>,
    /// Must have been made with the same tokenizer: an id outside of its vocabulary is an error, more cannot be seen.
    pub megatron: Vec<MegatronFiles>,
}

/// Tokenises the training half of a corpus on all cores, and takes in files of Megatron's tool as they are.
/// Progress counts languages and files.
///
/// Where a document has a prompt ([`Document::loss_from`]), prompt and answer are encoded one by one and joined, so that
/// the border is a token's border: as when the model answers, which sees the prompt's tokens alone.
pub fn tokenize(
    corpus: &Corpus,
    tokenizer_folder: &Path,
    out: &Path,
    settings: &TokenizeSettings,
    progress: Progress,
) -> Result<TokensManifest> {
    let tokenizer = Tokenizer::open(tokenizer_folder)?;
    let named = |token: &Option<String>, place| {
        token
            .as_deref()
            .map(|token| named(&tokenizer, token, place))
            .transpose()
    };
    let start = named(&settings.document_start, "start")?;
    let end = named(&settings.document_end, "end")?;
    let token_type = TokenType::for_size(tokenizer.size());
    let folder = Unfinished::begin(out, MANIFEST)?;
    let mut writer = IndexedWriter::create(&folder.path().join(PREFIX), token_type)?;
    let mut languages = Vec::new();
    let mut prompts = CountsWriter::new(folder.path().join(PROMPTS));
    let (mut documents, mut tokens) = (0, 0);

    let entries = &corpus.manifest().languages;
    let total = (entries.len() + settings.megatron.len()) as u64;
    for entry in entries {
        let (first_document, first_token) = (documents, tokens);
        corpus.documents(entry, Split::Train)?.for_each_batch(&mut |texts| {
            let encode = |document: &Document| encode(&tokenizer, document);
            let encoded: Vec<Encoded> = texts.par_iter().map(encode).collect::<Result<_>>()?;
            for Encoded { ids, prompt } in encoded {
                let ids: Vec<u32> = start.into_iter().chain(ids).chain(end).collect();
                writer.write_document(&ids)?;
                prompts.push(if prompt == 0 {
                    0
                } else {
                    prompt + u32::from(start.is_some())
                })?;
                documents += 1;
                tokens += ids.len() as u64;
            }
            Ok(())
        })?;
        languages.push(LanguageTokens {
            language: entry.language.clone(),
            source: entry.source.clone(),
            documents: first_document..documents,
            tokens: first_token..tokens,
        });
        progress(languages.len() as u64, total);
    }
    let mut files = Vec::new();
    for megatron in &settings.megatron {
        let file = megatron.check(tokenizer.size())?;
        languages.push(LanguageTokens {
            language: megatron.language.clone(),
            source: megatron.source.clone(),
            documents: documents..documents + file.documents,
            tokens: tokens..tokens + file.tokens,
        });
        (documents, tokens) = (documents + file.documents, tokens + file.tokens);
        files.push(file);
        progress(languages.len() as u64, total);
    }

    let mut digest = writer.finish()?;
    let prompts = prompts.finish()?;
    if let Some(path) = &prompts {
        update_with_file(&mut digest, path)?;
    }
    digest.update(&described(&files));
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
        has_prompts: prompts.is_some(),
        files,
        digest: digest.finalize().to_hex().to_string(),
    };
    let path = folder.path().join(MANIFEST);
    write_synced(
        &path,
        &serde_json::to_vec_pretty(&manifest).map_err(Error::json(&path))?,
    )?;
    folder.finish()?;
    Ok(manifest)
}

/// A document's ids and how many of them are its prompt.
struct Encoded {
    ids: Vec<u32>,
    prompt: u32,
}

fn encode(tokenizer: &Tokenizer, document: &Document) -> Result<Encoded> {
    let Some((prompt, answer)) = document.text.split_at_checked(document.loss_from) else {
        return Err(Error::LossFrom {
            language: document.language.clone(),
            key: document.key.clone(),
            value: document.loss_from,
            length: document.text.len(),
        });
    };
    if prompt.is_empty() {
        let ids = tokenizer.encode(answer)?;
        return Ok(Encoded { ids, prompt: 0 });
    }
    let mut ids = tokenizer.encode(prompt)?;
    let n_prompt = ids.len() as u32;
    ids.extend(encode_continuation(tokenizer, answer)?);
    Ok(Encoded { ids, prompt: n_prompt })
}

/// The ids of text that goes on after other text. SentencePiece-style tokenizers put a space before whatever they are
/// given; behind a line break, which is cut off again, they do not.
fn encode_continuation(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let before = tokenizer.encode("\n")?;
    let both = tokenizer.encode(&format!("\n{text}"))?;
    match both.strip_prefix(before.as_slice()) {
        Some(ids) => Ok(ids.to_vec()),
        // The text begins with what joins the line break.
        None => tokenizer.encode(text),
    }
}

fn named(tokenizer: &Tokenizer, token: &str, place: &'static str) -> Result<u32> {
    let missing = || Error::NoSuchToken {
        path: tokenizer.path().to_path_buf(),
        token: token.to_owned(),
        place,
    };
    tokenizer.id(token).ok_or_else(missing)
}

/// What the digest of the shards says of files that are not ours: not where they lie.
fn described(files: &[TokenFile]) -> Vec<u8> {
    let line = |file: &TokenFile| format!("{} {}\n", file.idx_digest, file.tokens);
    files.iter().map(line).collect::<String>().into_bytes()
}

/// Token shards, opened: mapped, not read.
pub struct TokenShards {
    folder: PathBuf,
    manifest: TokensManifest,
    files: Vec<File>,
    /// Of the documents of the first file.
    prompts: Option<Counts>,
}

/// One pair of files and where it begins among all.
struct File {
    indexed: Indexed,
    first_document: u64,
    first_token: u64,
}

impl TokenShards {
    /// Opens a finished folder of token shards and checks the files' sizes against the manifest.
    pub fn open(folder: &Path) -> Result<TokenShards> {
        let manifest: TokensManifest = read_manifest(folder, MANIFEST, "folder of token shards", "panglot tokenize")?;
        let own = Indexed::open(&folder.join(PREFIX))?;
        if manifest.token_type != own.token_type() {
            let (says, found) = (format!("{:?}", manifest.token_type), format!("{:?}", own.token_type()));
            return Err(differs(own.bin_path(), "token type", says, found));
        }
        let prompts = manifest
            .has_prompts
            .then(|| Counts::open(&folder.join(PROMPTS), own.n_documents()))
            .transpose()?;
        let others = manifest.files.iter().map(TokenFile::open);
        let all = std::iter::once(Ok(own)).chain(others).collect::<Result<Vec<_>>>()?;
        let shards = TokenShards::new(folder, manifest, all, prompts);
        shards.check()?;
        Ok(shards)
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
                source: String::new(),
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
            has_prompts: false,
            files: Vec::new(),
            digest: String::new(),
        };
        Ok(TokenShards::new(prefix, manifest, vec![indexed], None))
    }

    fn new(folder: &Path, manifest: TokensManifest, all: Vec<Indexed>, prompts: Option<Counts>) -> TokenShards {
        let (mut first_document, mut first_token) = (0, 0);
        let files = all.into_iter().map(|indexed| {
            let file = File {
                first_document,
                first_token,
                indexed,
            };
            first_document += file.indexed.n_documents();
            first_token += file.indexed.n_tokens();
            file
        });
        TokenShards {
            files: files.collect(),
            folder: folder.to_path_buf(),
            manifest,
            prompts,
        }
    }

    pub fn manifest(&self) -> &TokensManifest {
        &self.manifest
    }

    /// Where the shards lie.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The tokens at these positions. The range must lie inside a part's.
    pub fn tokens(&self, range: Range<u64>) -> Vec<i64> {
        let mut tokens = Vec::with_capacity((range.end - range.start) as usize);
        self.copy_tokens(range, &mut tokens);
        tokens
    }

    /// Where one document's tokens lie.
    pub fn document(&self, document: u64) -> Result<Range<u64>> {
        let file = self.file_of_document(document);
        let range = file.indexed.document(document - file.first_document)?;
        Ok(file.first_token + range.start..file.first_token + range.end)
    }

    /// Leading tokens of a document that are read and not learned, 0 in plain text.
    pub fn prompt(&self, document: u64) -> u32 {
        match &self.prompts {
            Some(prompts) if document < self.files[0].indexed.n_documents() => prompts.get(document),
            _ => 0,
        }
    }

    /// Reads everything and compares it with the digests in the manifest; ids against the vocabulary too.
    pub fn verify(&self) -> Result<()> {
        let changed = |path: &Path, found: &str, says: &str| Error::BadShards {
            path: path.to_path_buf(),
            reason: format!("the files were changed (digest {found}, the manifest says {says})"),
        };
        for (file, described) in self.files[1..].iter().zip(&self.manifest.files) {
            let found = file.indexed.idx_digest();
            if found != described.idx_digest {
                return Err(changed(file.indexed.idx_path(), &found, &described.idx_digest));
            }
            megatron::check_ids(&file.indexed, self.manifest.vocabulary_size)?;
        }
        let mut beside = self
            .prompts
            .as_ref()
            .map_or(Vec::new(), |prompts| prompts.bytes().to_vec());
        beside.extend(described(&self.manifest.files));
        let found = self.files[0].indexed.digest(&beside);
        if self.manifest.digest.is_empty() || found == self.manifest.digest {
            return Ok(());
        }
        Err(changed(&self.folder, &found, &self.manifest.digest))
    }

    pub(crate) fn copy_tokens(&self, range: Range<u64>, into: &mut Vec<i64>) {
        let at = self.files.partition_point(|file| file.first_token <= range.start);
        let file = &self.files[at.saturating_sub(1)];
        file.indexed
            .copy_tokens(range.start - file.first_token..range.end - file.first_token, into);
    }

    /// Tokens of each of these documents of one part, appended, and where the first begins; an error where the index is
    /// damaged.
    pub(crate) fn lengths(&self, documents: Range<u64>, into: &mut Vec<u64>) -> Result<u64> {
        let file = self.file_of_document(documents.start);
        let first = file.first_document;
        let begins = file
            .indexed
            .lengths(documents.start - first..documents.end - first, into)?;
        Ok(file.first_token + begins)
    }

    /// The document of a part that holds a token of it. The part's index must have been checked by [`lengths`](Self::lengths).
    pub(crate) fn document_at(&self, token: u64, part: &LanguageTokens) -> u64 {
        let file = self.file_of_document(part.documents.start);
        let first = file.first_document;
        let documents = part.documents.start - first..part.documents.end - first;
        first + file.indexed.document_at(token - file.first_token, documents)
    }

    fn file_of_document(&self, document: u64) -> &File {
        let at = self.files.partition_point(|file| file.first_document <= document);
        &self.files[at.saturating_sub(1)]
    }

    /// The manifest against the files it describes.
    fn check(&self) -> Result<()> {
        let manifest = &self.manifest;
        let differs =
            |what: &str, says: String, found: String| differs(self.files[0].indexed.bin_path(), what, says, found);
        let sum = |of: fn(&Indexed) -> u64| self.files.iter().map(|file| of(&file.indexed)).sum::<u64>();
        let (documents, tokens) = (sum(Indexed::n_documents), sum(Indexed::n_tokens));
        if manifest.documents != documents {
            return Err(differs(
                "documents",
                manifest.documents.to_string(),
                documents.to_string(),
            ));
        }
        if manifest.tokens != tokens {
            return Err(differs("tokens", manifest.tokens.to_string(), tokens.to_string()));
        }
        let (mut documents, mut tokens) = (0, 0);
        for entry in &manifest.languages {
            let (d, t) = (&entry.documents, &entry.tokens);
            if d.start != documents || d.end < documents || t.start != tokens || t.end < tokens {
                return Err(differs("ranges of", entry.language.to_string(), "no such gap".into()));
            }
            // The files that are not ours hold one part each, so that no part crosses from one file to the next.
            let crosses = |file: &File| {
                (tokens < file.first_token && file.first_token < t.end)
                    || (documents < file.first_document && file.first_document < d.end)
            };
            if self.files.iter().any(crosses) {
                return Err(differs("one file for", entry.language.to_string(), "two".into()));
            }
            (documents, tokens) = (d.end, t.end);
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
}

fn differs(path: &Path, what: &str, says: String, found: String) -> Error {
    Error::BadShards {
        path: path.to_path_buf(),
        reason: format!("the manifest says {what} {says}, the files have {found}: they do not belong together"),
    }
}
