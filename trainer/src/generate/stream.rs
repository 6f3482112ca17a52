//! Text from tokens as they come: a character whose bytes lie in several tokens is told when the last of them is there.

use anyhow::Result;
use corpus::Tokenizer;

/// The text behind a prompt, growing.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens whose text is asked for: the prompt's last, then all that came. Special tokens have none.
    ids: Vec<u32>,
    /// Text from the first of these tokens to the second is told; a tokenizer may write a token otherwise where text begins.
    told: (usize, usize),
    pub text: String,
}

/// So many of the prompt's tokens decide how the next one is written.
const BEFORE: usize = 6;
/// Bytes of UTF-8.
const LONGEST_CHARACTER: usize = 4;

impl<'a> TextStream<'a> {
    pub fn behind(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Result<TextStream<'a>> {
        let prompt: Vec<u32> = prompt.iter().copied().filter(|id| !tokenizer.is_special(*id)).collect();
        let mut first = prompt.len().saturating_sub(BEFORE);
        // Not within a character that is spelled in bytes: a decoder gives up all bytes in a row where some make none.
        for _ in 1..LONGEST_CHARACTER {
            if first == 0
                || !tokenizer
                    .decode(&prompt[first..])?
                    .starts_with(char::REPLACEMENT_CHARACTER)
            {
                break;
            }
            first -= 1;
        }
        let ids = prompt[first..].to_vec();
        Ok(TextStream {
            tokenizer,
            told: (0, ids.len()),
            ids,
            text: String::new(),
        })
    }

    /// One more token; `text` has grown by what it completes.
    pub fn push(&mut self, id: u32) -> Result<()> {
        if !self.tokenizer.is_special(id) {
            self.ids.push(id);
            self.tell(false)?;
        }
        Ok(())
    }

    /// No more will come: what is incomplete is told as it is.
    pub fn end(&mut self) -> Result<()> {
        self.tell(true)
    }

    fn tell(&mut self, all: bool) -> Result<()> {
        let (first, next) = self.told;
        let whole = self.tokenizer.decode(&self.ids[first..])?;
        if whole.ends_with(char::REPLACEMENT_CHARACTER) && !all {
            return Ok(());
        }
        let before = self.tokenizer.decode(&self.ids[first..next])?;
        let new = match whole.strip_prefix(before.as_str()) {
            Some(new) => new.to_owned(),
            // A byte behind them that makes no character spoils characters that are told already, where all are spelled in
            // bytes: what is new is written by itself.
            None => self.tokenizer.decode(&self.ids[next..])?,
        };
        if !new.is_empty() {
            self.text.push_str(&new);
            self.told = (next, self.ids.len());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces of a SentencePiece model that spells what it has no piece for in bytes: byte b has number b, then "a" and "b".
    fn tokenizer() -> (tempfile::TempDir, Tokenizer) {
        let mut vocabulary: serde_json::Map<String, serde_json::Value> =
            (0..256).map(|byte| (format!("<0x{byte:02X}>"), byte.into())).collect();
        vocabulary.insert("a".into(), 256.into());
        vocabulary.insert("b".into(), 257.into());
        let folder = tempfile::tempdir().unwrap();
        let described = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null,
            "decoder": { "type": "Sequence", "decoders": [{ "type": "ByteFallback" }, { "type": "Fuse" }] },
            "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocabulary, "merges": [] },
        });
        std::fs::write(folder.path().join("tokenizer.json"), described.to_string()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        (folder, tokenizer)
    }

    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    /// What is told after each token, and at the end.
    fn told(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let mut stream = TextStream::behind(tokenizer, prompt).unwrap();
        let mut told: Vec<String> = ids
            .iter()
            .map(|id| {
                stream.push(*id).unwrap();
                stream.text.clone()
            })
            .collect();
        stream.end().unwrap();
        told.push(stream.text);
        told
    }

    #[test]
    fn a_character_is_told_with_its_last_byte() {
        let (_folder, tokenizer) = tokenizer();
        let ids = [&bytes("€")[..], &[256]].concat();
        assert_eq!(told(&tokenizer, &[257], &ids), ["", "", "€", "€a", "€a"]);
    }

    #[test]
    fn a_byte_that_makes_no_character_spoils_nothing_else() {
        let (_folder, tokenizer) = tokenizer();
        let ids = [&bytes("€")[..], &[0xf0, 256, 257]].concat();
        let last = told(&tokenizer, &[257], &ids).pop().unwrap();
        assert_eq!(last, "€\u{fffd}ab");
    }

    #[test]
    fn a_prompt_of_long_characters_is_not_cut_within_one() {
        let (_folder, tokenizer) = tokenizer();
        for prompt in ["𞤀𞤁", "€€€", "a𞤀𞤁𞤂"] {
            assert_eq!(
                told(&tokenizer, &bytes(prompt), &bytes("𞤃")).pop().unwrap(),
                "𞤃",
                "{prompt}"
            );
        }
    }
}
