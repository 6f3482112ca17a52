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

impl<'a> TextStream<'a> {
    pub fn behind(tokenizer: &'a Tokenizer, prompt: &[u32]) -> TextStream<'a> {
        let ids: Vec<u32> = prompt[prompt.len().saturating_sub(BEFORE)..].to_vec();
        let ids: Vec<u32> = ids.into_iter().filter(|id| !tokenizer.is_special(*id)).collect();
        TextStream {
            tokenizer,
            told: (0, ids.len()),
            ids,
            text: String::new(),
        }
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
        if let Some(new) = whole.strip_prefix(before.as_str())
            && !new.is_empty()
        {
            self.text.push_str(new);
            self.told = (next, self.ids.len());
        }
        Ok(())
    }
}
