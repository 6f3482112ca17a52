//! Text in hundreds of languages, from documents to training rows: import → corpus folder → vocabulary → token shards → stream.
//! No libtorch and no MPI here; everything a run needs from this crate is a pure function of files and a seed.
//!
//! | step | in | out |
//! |---|---|---|
//! | [`import_udhr`], [`import_folders`] | what people have | a corpus folder: deduplicated, held-out text set apart |
//! | [`extend`] | corpus, base tokenizer | a tokenizer whose base ids never move |
//! | [`tokenize`] | corpus, tokenizer | token shards in Megatron's indexed format, with a manifest of languages |
//! | [`Stream`] | token shards, seed | `row(index)`, a pure function |

mod continued_bpe;
mod document;
mod error;
mod finished;
mod folder;
mod folders;
mod import;
mod indexed;
mod language;
mod llama_pieces;
mod permutation;
mod script;
mod shards;
mod shares;
mod stream;
mod tokenizer;
mod udhr;
mod vocabulary;

pub use document::{Document, Split};
pub use error::Error;
pub use folder::{Corpus, CorpusManifest, Counts, LanguageEntry, Skipped};
pub use import::{import_folders, import_udhr};
pub use indexed::TokenType;
pub use language::Language;
pub use llama_pieces::write_llama_tokenizer;
pub use shards::{LanguageTokens, TokenShards, TokensManifest, tokenize};
pub use stream::{Row, Stream};
pub use tokenizer::Tokenizer;
pub use vocabulary::{Fertility, NewPiece, Vocabulary, VocabularySettings, extend, fertility};

/// What this crate's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Called with (done, total) as a long step moves on; the unit is the step's own (languages, pieces).
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);
