//! What several tests need: a small byte-level base tokenizer, a small corpus, and the fetched packages if they are there.
#![allow(dead_code)] // each test file uses a part

use std::fs;
use std::path::{Path, PathBuf};

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, PreTokenizerWrapper, TokenizerBuilder};

pub const END: &str = "<|endoftext|>";

/// A base like SmolLM2's, only small: digits one by one, then byte-level BPE, special tokens first.
pub fn byte_level_base(folder: &Path, vocabulary_size: usize, text: &[&str]) {
    let byte_level = ByteLevel::new(false, true, true);
    let parts: Vec<PreTokenizerWrapper> = vec![Digits::new(true).into(), byte_level.into()];
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocabulary_size)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![
            AddedToken::from(END, true),
            AddedToken::from("<|im_start|>", true),
        ])
        .build();
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::normalizers::NFC>)
        .with_pre_tokenizer(Some(Sequence::new(parts)))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level))
        .build()
        .unwrap();
    tokenizer.train(&mut trainer, text.iter()).unwrap();
    fs::create_dir_all(folder).unwrap();
    tokenizer.save(folder.join("tokenizer.json"), true).unwrap();
    fs::write(
        folder.join("tokenizer_config.json"),
        r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#,
    )
    .unwrap();
}

/// A fetched package, or `None` after saying loudly that the test is skipped.
pub fn fetched(package: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.panglot").join(package);
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("SKIPPED: {package} is not fetched (run the set-up first)");
    None
}

/// Writes one file per language: `name.txt`, a document a line.
pub fn write_folders(root: &Path, languages: &[(&str, Vec<String>)]) {
    for (language, documents) in languages {
        fs::create_dir_all(root.join(language)).unwrap();
        fs::write(root.join(language).join("text.txt"), documents.join("\n")).unwrap();
    }
}
