//! Text in hundreds of languages, from documents to training rows: import → corpus folder → vocabulary → token shards → stream.
//! No libtorch and no MPI here; everything a run needs from this crate is a pure function of files and a seed.
//!
//! | step | in | out |
//! |---|---|---|
//! | [`import`] | what people have | a corpus folder: deduplicated, held-out text set apart |
//! | [`extend`] | corpus, base tokenizer | a tokenizer whose base ids never move |
//! | [`tokenize`] | corpus, tokenizer, Megatron's files | token shards in Megatron's indexed format, with a manifest of parts |
//! | [`Stream`] | token shards, seed | `row(index)`, a pure function |

mod document;
mod error;
mod fingerprint;
mod finished;
mod folder;
#[doc(hidden)]
pub mod fuzz;
mod import;
mod language;
mod splitmix;
mod stream;
mod tokens;
mod vocabulary;

pub use document::{Document, Split};
pub use error::Error;
pub use fingerprint::fingerprint;
pub use folder::{
    Corpus, CorpusManifest, Counts, Damage, Documents, EvaluationsEntry, Hygiene, LanguageEntry, Skipped, SourceEntry,
    Unreadable,
};
pub use import::{
    Contamination, ImportSettings, LanguageOf, NGrams, OnUnreadable, OneDocument, Sides, SourceKind, SourceSpec,
    import, import_folders, import_udhr,
};
pub use language::Language;
pub use stream::{
    Attention, Group, Packing, Part, PartPlan, Row, RowsDigest, Sampling, Share, Stage, Stream, StreamSettings,
};
pub use tokens::indexed::TokenType;
pub use tokens::{LanguageTokens, MegatronFiles, TokenFile, TokenShards, TokenizeSettings, TokensManifest, tokenize};
pub use vocabulary::from_scratch::{Algorithm, ScratchVocabulary, train_vocabulary};
pub use vocabulary::llama_pieces::write_llama_tokenizer;
pub use vocabulary::plain_bpe::{BpePieces, BpeTraining, LearnedMerge, train_bpe};
pub use vocabulary::report::{Fertility, fertility};
pub use vocabulary::sentencepiece::SentencePiece;
pub use vocabulary::settings::{Scores, VocabularySettings, WordRules};
pub use vocabulary::tokenizer::Tokenizer;
pub use vocabulary::unigram::{ScoredPiece, UnigramTraining, train_unigram, unigram_tokenizer_json};
pub use vocabulary::words::{TextSampling, WordCounts, count_lines, covering_characters};
pub use vocabulary::{NewPiece, Vocabulary, extend};

/// What this crate's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Called with (done, total) as a long step moves on; the unit is the step's own (bytes, languages, pieces).
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);
