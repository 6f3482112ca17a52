//! Token shards written by hand, from the description of the format: tokens count up, so that a token tells its place.
#![allow(dead_code)] // each test file uses a part

use std::fs;
use std::path::Path;

use corpus::{LanguageTokens, TokenShards, TokenType, TokensManifest};

/// One part: source, language, tokens of each document.
pub type PartOf<'a> = (&'a str, &'a str, &'a [u32]);

/// Tokens are 0, 1, 2 …: 16-bit if they fit.
pub fn write_shards(folder: &Path, parts: &[PartOf]) {
    write_with_prompts(folder, parts, &[]);
}

/// `prompts`: leading tokens of each document that are not learned; empty: none anywhere.
pub fn write_with_prompts(folder: &Path, parts: &[PartOf], prompts: &[u32]) {
    let lengths: Vec<u32> = parts
        .iter()
        .flat_map(|(_, _, lengths)| lengths.iter().copied())
        .collect();
    let total: u64 = lengths.iter().map(|n| u64::from(*n)).sum();
    let token_type = TokenType::for_size(total as usize);
    let bin: Vec<u8> = (0..total)
        .flat_map(|id| id.to_le_bytes().into_iter().take(token_type.width() as usize))
        .collect();
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("tokens.bin"), bin).unwrap();
    let code = if token_type == TokenType::Uint16 { 8 } else { 4 };
    fs::write(folder.join("tokens.idx"), index(code, token_type.width(), &lengths)).unwrap();
    if !prompts.is_empty() {
        let bytes: Vec<u8> = prompts.iter().flat_map(|n| n.to_le_bytes()).collect();
        fs::write(folder.join("tokens.prompts"), bytes).unwrap();
    }
    write_manifest(folder, parts, token_type, !prompts.is_empty());
}

/// `.idx` of documents of one sequence each.
pub fn index(code: u8, width: u64, lengths: &[u32]) -> Vec<u8> {
    let n = lengths.len() as u64;
    let mut idx = b"MMIDIDX\x00\x00".to_vec();
    idx.extend(1u64.to_le_bytes());
    idx.push(code);
    idx.extend([n.to_le_bytes(), (n + 1).to_le_bytes()].concat());
    lengths
        .iter()
        .for_each(|tokens| idx.extend((*tokens as i32).to_le_bytes()));
    let mut start = 0u64;
    for tokens in lengths {
        idx.extend((start * width).to_le_bytes());
        start += u64::from(*tokens);
    }
    (0..=n).for_each(|document| idx.extend(document.to_le_bytes()));
    idx
}

pub fn write_manifest(folder: &Path, parts: &[PartOf], token_type: TokenType, has_prompts: bool) {
    let (mut documents, mut tokens) = (0, 0);
    let mut languages = Vec::new();
    for (source, language, lengths) in parts {
        let (first_document, first_token) = (documents, tokens);
        documents += lengths.len() as u64;
        tokens += lengths.iter().map(|n| u64::from(*n)).sum::<u64>();
        languages.push(LanguageTokens {
            language: language.parse().unwrap(),
            source: (*source).to_owned(),
            documents: first_document..documents,
            tokens: first_token..tokens,
        });
    }
    let manifest = TokensManifest {
        format: 1,
        languages,
        documents,
        tokens,
        token_type,
        vocabulary_size: tokens as usize,
        document_start: None,
        document_end: None,
        tokenizer_digest: String::new(),
        corpus_digest: String::new(),
        has_prompts,
        files: Vec::new(),
        digest: String::new(),
    };
    fs::write(folder.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
}

pub fn open(folder: &Path) -> TokenShards {
    TokenShards::open(folder).unwrap()
}
