//! The regular expressions that GPT-2's and Llama 3's tokenizers cut words with, written out by hand.
//!
//! What is a letter, a number or a space is asked once of the regular-expression engine they are defined by, for every
//! character, so that its version of Unicode is ours.

use std::sync::LazyLock;

use tokenizers::utils::SysRegex;

/// GPT-2's expression, as `tokenizers` has it built in.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's: at most three digits together.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's: as Llama 3's, digits one by one.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// An expression we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expression {
    Gpt2,
    /// Llama 3's and its kin, with at most so many digits together.
    Llama3 {
        digits: usize,
    },
}

impl Expression {
    /// The expression written like this, if it is one we know.
    pub fn of(pattern: &str) -> Option<Expression> {
        match pattern {
            GPT2 => Some(Expression::Gpt2),
            LLAMA3 => Some(Expression::Llama3 { digits: 3 }),
            QWEN2 => Some(Expression::Llama3 { digits: 1 }),
            _ => None,
        }
    }

    /// Hands on every match in the text; together they are the text.
    #[inline]
    pub fn split<E>(self, text: &str, mut word: impl FnMut(&str) -> Result<(), E>) -> Result<(), E> {
        let classes = &**CLASSES;
        let mut at = 0;
        while at < text.len() {
            let rest = &text[at..];
            let length = match self {
                Expression::Gpt2 => gpt2(rest, classes),
                Expression::Llama3 { digits } => llama3(rest, classes, digits),
            };
            word(&rest[..length])?;
            at += length;
        }
        Ok(())
    }
}

/// `\p{L}`
const LETTER: u8 = 1;
/// `\p{N}`
const NUMBER: u8 = 2;
/// `\s`
const SPACE: u8 = 4;
const OF_A_WORD: u8 = LETTER | NUMBER | SPACE;

/// What each character is.
static CLASSES: LazyLock<Box<[u8]>> = LazyLock::new(|| {
    let mut classes = vec![0; char::MAX as usize + 1].into_boxed_slice();
    for (class, pattern) in [(LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (SPACE, r"\s+")] {
        for character in characters_of(pattern) {
            classes[character as usize] |= class;
        }
    }
    classes
});

/// What `(?i:…)` takes for the letters after an apostrophe.
struct Contractions {
    /// One of s, t, m, d.
    alone: Vec<char>,
    /// First and second letter of re, ve, ll.
    pairs: [(Vec<char>, Vec<char>); 3],
}

static CONTRACTIONS: LazyLock<Contractions> = LazyLock::new(|| {
    let [r, e, v, l] = ["(?i:r)", "(?i:e)", "(?i:v)", "(?i:l)"].map(characters_of);
    Contractions {
        alone: characters_of("(?i:s|t|m|d)"),
        pairs: [(r, e.clone()), (v, e), (l.clone(), l)],
    }
});

/// Every character that the expression matches.
fn characters_of(pattern: &str) -> Vec<char> {
    static ALL: LazyLock<String> = LazyLock::new(|| (char::MIN..=char::MAX).collect());
    let expression = SysRegex::new(pattern).expect("our own expressions are well formed");
    let found = expression.find_iter(&ALL);
    found.flat_map(|(start, end)| ALL[start..end].chars()).collect()
}

#[inline]
fn class(character: char, classes: &[u8]) -> u8 {
    classes[character as usize]
}

/// Bytes of the characters at the start of the text that the predicate takes.
#[inline]
fn run(text: &str, mut takes: impl FnMut(char) -> bool) -> usize {
    text.char_indices()
        .find(|(_, character)| !takes(*character))
        .map_or(text.len(), |(at, _)| at)
}

/// Length in bytes of the match at the start of a text that is not empty.
#[inline]
fn gpt2(text: &str, classes: &[u8]) -> usize {
    let bytes = text.as_bytes();
    if bytes[0] == b'\'' {
        match bytes.get(1..) {
            Some([b's' | b't' | b'm' | b'd', ..]) => return 2,
            Some([b'r' | b'v', b'e', ..] | [b'l', b'l', ..]) => return 3,
            _ => {}
        }
    }
    // A space goes along with what follows it, unless that is a space.
    let lead = usize::from(bytes[0] == b' ');
    if let Some(first) = text[lead..].chars().next() {
        let kind = class(first, classes) & OF_A_WORD;
        if kind != SPACE {
            return lead + run(&text[lead..], |c| class(c, classes) & OF_A_WORD == kind);
        }
    }
    spaces(text, classes)
}

/// `\s+(?!\S)|\s+`: a run of spaces, without its last if a word follows and another is left.
#[inline]
fn spaces(text: &str, classes: &[u8]) -> usize {
    let (mut last, mut length) = (0, 0);
    for (at, character) in text.char_indices() {
        if class(character, classes) & SPACE == 0 {
            return if last > 0 { last } else { length };
        }
        (last, length) = (at, at + character.len_utf8());
    }
    length
}

#[inline]
fn llama3(text: &str, classes: &[u8], digits: usize) -> usize {
    let mut characters = text.chars();
    let Some(first) = characters.next() else {
        return 0;
    };
    if first == '\''
        && let Some(length) = contraction(characters.as_str())
    {
        return 1 + length;
    }
    let rest = characters.as_str();
    let kind = class(first, classes);
    let is = |wanted: u8| move |c: char| class(c, classes) & wanted != 0;
    let lead = first.len_utf8();
    if kind & LETTER != 0 {
        return lead + run(rest, is(LETTER));
    }
    if kind & NUMBER == 0 && !matches!(first, '\r' | '\n') {
        let letters = run(rest, is(LETTER));
        if letters > 0 {
            return lead + letters;
        }
    }
    if kind & NUMBER != 0 {
        let mut left = digits - 1;
        return lead
            + run(rest, |c| {
                let takes = left > 0 && class(c, classes) & NUMBER != 0;
                left = left.saturating_sub(1);
                takes
            });
    }
    let from = if first == ' ' { lead } else { 0 };
    let others = run(&text[from..], |c| class(c, classes) & OF_A_WORD == 0);
    if others > 0 {
        let end = from + others;
        return end + run(&text[end..], |c| matches!(c, '\r' | '\n'));
    }
    // Only spaces are left: through the last line break of their run, if there is one.
    let run_length = run(text, is(SPACE));
    match text[..run_length].rfind(['\r', '\n']) {
        Some(at) => at + 1,
        None => spaces(text, classes),
    }
}

/// Bytes of the letters after an apostrophe that are cut with it.
fn contraction(text: &str) -> Option<usize> {
    let mut characters = text.chars();
    let first = characters.next()?;
    if CONTRACTIONS.alone.contains(&first) {
        return Some(first.len_utf8());
    }
    let second = characters.next()?;
    let found = CONTRACTIONS
        .pairs
        .iter()
        .any(|(firsts, seconds)| firsts.contains(&first) && seconds.contains(&second));
    found.then(|| first.len_utf8() + second.len_utf8())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(pattern: &str, text: &str) {
        let expression = Expression::of(pattern).unwrap();
        let expected: Vec<&str> = SysRegex::new(pattern)
            .unwrap()
            .find_iter(text)
            .map(|(start, end)| &text[start..end])
            .collect();
        let mut found = Vec::new();
        expression
            .split(text, |word| {
                found.push(word.to_owned());
                Ok::<_, ()>(())
            })
            .unwrap();
        assert_eq!(found, expected, "{pattern} {text:?}");
    }

    /// Any characters, and those that the expressions name more often than chance would.
    fn text() -> impl Strategy<Value = String> {
        let named = r"('s|'S|'ſ|'Re|'vE|'ll|'lL|'m|''|'|s|t|re|l| |  |\n|\r|\r\n|\t|\u{a0}|\u{3000}|\u{2028}|\u{85}|\u{200b}|1|23|²|Ⅷ|٣|a|é|ж|語|ำ|\u{301}|_|-|\.|▁|🦙)";
        prop::collection::vec(prop_oneof![3 => named.prop_map(|s| s), 1 => any::<String>()], 0..24)
            .prop_map(|v| v.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn words_are_cut_as_by_the_expressions(text in text()) {
            [GPT2, LLAMA3, QWEN2].into_iter().for_each(|pattern| check(pattern, &text));
        }
    }

    #[test]
    fn every_character_is_cut_as_by_the_expressions() {
        for pattern in [GPT2, LLAMA3] {
            for before in ["'", " ", "\n"] {
                let all: String = (char::MIN..=char::MAX)
                    .flat_map(|c| before.chars().chain([c, 'x']))
                    .collect();
                check(pattern, &all);
            }
        }
    }
}
