//! Text in hundreds of languages, from documents to training rows: import → corpus folder → vocabulary → token shards → stream.
//! No libtorch and no MPI here; everything a run needs from this crate is a pure function of files and a seed.
//!
//! | step | in | out |
//! |---|---|---|
//! | [`import_udhr`], [`import_folders`] | what people have | a corpus folder: deduplicated, held-out text set apart |
//! | [`extend`] | corpus, base tokenizer | a tokenizer whose base ids never move |
//! | [`tokenize`] | corpus, tokenizer | token shards in Megatron's indexed format, with a manifest of languages |
//! | [`Stream`] | token shards, seed | `row(index)`, a pure function |

mod document;
mod error;
mod finished;
mod folder;
mod import;
mod language;
mod stream;
mod tokens;
mod vocabulary;

pub use document::{Document, Split};
pub use error::Error;
pub use folder::{Corpus, CorpusManifest, Counts, LanguageEntry, Skipped};
pub use import::{import_folders, import_udhr};
pub use language::Language;
pub use stream::{Row, Stream};
pub use tokens::indexed::TokenType;
pub use tokens::{LanguageTokens, TokenShards, TokensManifest, tokenize};
pub use vocabulary::llama_pieces::write_llama_tokenizer;
pub use vocabulary::tokenizer::Tokenizer;
pub use vocabulary::{Fertility, NewPiece, Vocabulary, VocabularySettings, extend, fertility};

/// What this crate's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Called with (done, total) as a long step moves on; the unit is the step's own (languages, pieces).
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);
