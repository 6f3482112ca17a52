//! The documents of a file whose text is all in one language: plain text, JSONL, Parquet or Arrow.
//! Keys are hashes of the text, so that reordering or adding files moves no document between the halves of a corpus.

use std::path::Path;

use crate::import::Sink;
use crate::import::lines::Lines;
use crate::import::records::{Column, Format, read_records};
use crate::{Document, Error, Language, Result};

/// What a document is in a plain text file. In the other formats it is a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OneDocument {
    /// One sentence or one document a line.
    #[default]
    Line,
    /// Documents are separated by empty lines.
    BlankLine,
    File,
}

/// Documents beyond this are refused, as lines are: they are held in memory while they are read.
const MOST_BYTES: usize = 64 << 20;

/// Hands on the documents of one file. Texts lose the white space around them; empty ones are none.
pub(crate) fn read_texts(
    path: &Path,
    format: Format,
    text_column: &str,
    one_document: OneDocument,
    language: &Language,
    sink: &mut dyn Sink,
) -> Result<()> {
    match (format, one_document) {
        (Format::Text, OneDocument::Line) => read_lines(path, language, sink),
        (Format::Text, one_document) => read_paragraphs(path, one_document, language, sink),
        (format, _) => read_records(
            path,
            format,
            &[Column::required(text_column)],
            sink,
            &mut |record, sink| hand_on(record.text(0), language, sink),
        ),
    }
}

/// A text as a document of its own; nothing if there is only white space.
pub(crate) fn hand_on(text: &str, language: &Language, sink: &mut dyn Sink) -> Result<()> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(());
    }
    sink.document(Document {
        language: language.clone(),
        key: key_of(text.as_bytes()),
        text: text.to_owned(),
        loss_from: 0,
    })
}

/// 64 bits of a hash: the same wherever the text stands.
pub(crate) fn key_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

fn read_lines(path: &Path, language: &Language, sink: &mut dyn Sink) -> Result<()> {
    let mut lines = Lines::open(path)?;
    while let Some(line) = lines.next_line()? {
        match line.text {
            Ok(text) => hand_on(text, language, sink)?,
            Err(error) => sink.unreadable(error)?,
        }
    }
    Ok(())
}

/// Several lines a document. One with an unreadable line in it is left out as a whole: half a document is another one.
fn read_paragraphs(path: &Path, one_document: OneDocument, language: &Language, sink: &mut dyn Sink) -> Result<()> {
    let mut lines = Lines::open(path)?;
    let mut document = String::new();
    let mut whole = true;
    while let Some(line) = lines.next_line()? {
        match line.text {
            Ok(text) if text.trim().is_empty() && one_document == OneDocument::BlankLine => {
                if whole {
                    hand_on(&document, language, sink)?;
                }
                document.clear();
                whole = true;
            }
            Ok(_) if !whole => {}
            Ok(text) => {
                document.push_str(text);
                document.push('\n');
                if document.len() > MOST_BYTES {
                    whole = false;
                    sink.unreadable(Error::BadLine {
                        path: path.to_path_buf(),
                        line: line.number,
                        reason: format!(
                            "the document that ends behind this line is longer than {} MiB; set one_document to line or blank_line",
                            MOST_BYTES >> 20
                        ),
                    })?;
                    document = String::new();
                }
            }
            Err(error) => {
                whole = false;
                sink.unreadable(error)?;
            }
        }
    }
    if whole {
        hand_on(&document, language, sink)
    } else {
        Ok(())
    }
}
