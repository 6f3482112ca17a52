//! A document, the unit of text that stays together, and the two halves of a corpus.
//! Held-out text is set apart by the document's key, so that translations of one passage always fall on the same side.

use serde::{Deserialize, Serialize};

use crate::Language;

/// A text in one language, UTF-8, never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    pub language: Language,
    /// Names the passage: `article-12`, the same in every language; `article-12/deu_1996` where a language has several translations.
    pub key: String,
    pub text: String,
    /// Byte offset in `text` from which on the model learns to predict it; 0 in plain text. In an instruction it is where
    /// the answer begins: what stands before is read, not learned.
    pub loss_from: usize,
}

impl Document {
    /// The part of the key that decides the split: what stands before `/`.
    pub fn passage(&self) -> &str {
        Document::passage_of(&self.key)
    }

    /// The same of a key alone.
    pub(crate) fn passage_of(key: &str) -> &str {
        key.split('/').next().unwrap_or(key)
    }
}

/// Which half of a corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Trained on.
    Train,
    /// Never trained on: it measures.
    HeldOut,
}

impl Split {
    /// The file of this half inside a language's folder.
    pub fn file_name(self) -> &'static str {
        match self {
            Split::Train => "train.jsonl",
            Split::HeldOut => "held_out.jsonl",
        }
    }
}
