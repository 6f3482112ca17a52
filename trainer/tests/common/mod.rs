//! What several tests of the trainer make for themselves.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A tokenizer of so many pieces that `transformers` loads.
pub fn write_tokenizer(folder: &Path, pieces: usize) {
    let vocabulary: BTreeMap<String, usize> = (0..pieces).map(|id| (format!("piece{id}"), id)).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": { "type": "Whitespace" },
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "piece0" },
    });
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let settings = serde_json::json!({ "tokenizer_class": "PreTrainedTokenizerFast" });
    fs::write(folder.join("tokenizer_config.json"), settings.to_string()).unwrap();
}
