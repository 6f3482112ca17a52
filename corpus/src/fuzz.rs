//! Entry points for fuzzing: readers of what the world hands in, on arbitrary bytes. They may refuse, never panic.
//! Not part of the crate's promises.

use std::path::Path;

use crate::import::Sink;
use crate::import::lines::Lines;
use crate::import::records::{Column, read_json_lines};
use crate::tokens::indexed::Indexed;
use crate::{Document, Error, Result};

/// Reads bytes as JSONL with the columns of instructions. Returns how many records and how many bad places it met.
pub fn jsonl(bytes: &[u8]) -> (usize, usize) {
    struct Counter(usize);
    impl Sink for Counter {
        fn document(&mut self, _: Document) -> Result<()> {
            Ok(())
        }

        fn unreadable(&mut self, error: Error) -> Result<()> {
            assert!(!error.to_string().is_empty());
            self.0 += 1;
            Ok(())
        }
    }
    let path = Path::new("fuzz.jsonl");
    let columns = [
        Column::required("instruction"),
        Column::optional("input"),
        Column::required("output"),
    ];
    let mut bad = Counter(0);
    let mut n_records = 0;
    let read = read_json_lines(
        path,
        Lines::of_bytes(path, bytes),
        &columns,
        &mut bad,
        &mut |record, _| {
            n_records += usize::from(record.values.len() == columns.len());
            Ok(())
        },
    );
    read.expect("memory has no faults of its own, and the sink takes every error");
    (n_records, bad.0)
}

/// Opens bytes as Megatron's two files and reads every document, whatever they hold. The first two bytes are the length of
/// the `.idx`, which follows; the rest is the `.bin`.
pub fn indexed(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return;
    };
    let (idx, bin) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
    indexed_files(bin, idx);
}

/// As [`indexed`], with the two files apart.
pub fn indexed_files(bin: &[u8], idx: &[u8]) {
    let Ok(indexed) = Indexed::from_bytes(bin, idx) else {
        return;
    };
    let n_documents = indexed.n_documents();
    let mut tokens = Vec::new();
    for document in 0..n_documents {
        if let Ok(range) = indexed.document(document) {
            tokens.clear();
            indexed.copy_tokens(range, &mut tokens);
        }
    }
    // What passes the whole check hangs together: each document is found from its first token.
    let mut lengths = Vec::new();
    if indexed.lengths(0..n_documents, &mut lengths).is_ok() {
        let mut start = 0;
        for (document, length) in (0..).zip(lengths) {
            assert_eq!(indexed.document(document).ok(), Some(start..start + length));
            if length > 0 {
                assert_eq!(indexed.document_at(start, 0..n_documents), document);
            }
            start += length;
        }
    }
}

/// Reads bytes as a SentencePiece model and, where extending it would be allowed, converts it to `tokenizer.json`, whose
/// text must then be cut as the model cuts it.
pub fn sentencepiece(bytes: &[u8]) {
    crate::vocabulary::sentencepiece::convert_bytes(bytes);
}
