//! What the new pieces shall be, and which strings may become one. Names and defaults are those of SentencePiece's trainer
//! where it has them.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use unicode_categories::UnicodeCategories;
use unicode_script::{Script, UnicodeScript};

use crate::vocabulary::sentencepiece::encoder::SPACE;
use crate::vocabulary::words::TextSampling;
use crate::{Error, Language, Result};

/// What the new pieces shall be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VocabularySettings {
    /// Exactly so many are learned, or it is an error. Special and user-defined ones come on top.
    pub new_pieces: usize,
    /// How languages share the training text.
    pub sampling: TextSampling,
    /// No piece is longer: one repeated line must not become a token.
    pub max_piece_bytes: usize,
    /// The embedding has a multiple of so many rows.
    pub multiple_of: usize,
    /// Where new pieces stand among the base's.
    #[serde(default)]
    pub scores: Scores,
    /// No new piece occurs in these languages' training text: it is cut as the base cuts it.
    #[serde(default)]
    pub preserve: Vec<Language>,
    /// Tokens that no text spells, appended behind all pieces.
    #[serde(default)]
    pub special: Vec<String>,
    /// Strings that are one token wherever text has them, appended behind the learned pieces.
    #[serde(default)]
    pub user_defined: Vec<String>,
    /// How text is cut before pieces are learned; a byte-level base has its own way.
    #[serde(default)]
    pub words: WordRules,
}

/// Where new pieces stand among the base's when text is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scores {
    /// Learned over the base's own segmentation, and behind all of it: the base's merges always come first.
    #[default]
    AfterBase,
    /// MaLA-500's way: a model of its own is learned from characters and its scores 0, −1, −2, … are kept, so that they
    /// interleave with the base's. Even English is cut differently. For SentencePiece bases only.
    Kept,
}

/// SentencePiece's rules for what may be a piece.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WordRules {
    /// Characters of two scripts never share a piece; kana count as Han.
    pub split_by_unicode_script: bool,
    /// A digit never shares a piece with a letter; without it digits go with any script.
    pub split_by_number: bool,
    /// A space only begins a piece.
    pub split_by_whitespace: bool,
    /// Every digit is its own piece.
    pub split_digits: bool,
    /// No piece has more characters.
    pub max_piece_length: usize,
    /// The share of all characters that pieces shall spell; rarer characters fall back to bytes.
    pub character_coverage: f64,
    /// Characters that become pieces however rare they are.
    pub required_characters: String,
}

impl Default for WordRules {
    fn default() -> Self {
        WordRules {
            split_by_unicode_script: true,
            split_by_number: true,
            split_by_whitespace: true,
            split_digits: false,
            max_piece_length: 16,
            character_coverage: 0.9995,
            required_characters: String::new(),
        }
    }
}

impl VocabularySettings {
    /// Strings that are tokens of their own, hence no learned piece's.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = String> + use<> {
        let all = [self.special.as_slice(), &self.user_defined].concat();
        all.into_iter()
    }

    /// Fails on the first value that no extension can have.
    pub(crate) fn check(&self) -> Result<()> {
        let rules = [
            (
                self.new_pieces == 0,
                "new_pieces",
                self.new_pieces.to_string(),
                "must be at least 1; to keep the base's vocabulary leave `vocabulary` out",
            ),
            (
                self.max_piece_bytes < 2,
                "max_piece_bytes",
                self.max_piece_bytes.to_string(),
                "must be at least 2; try 32",
            ),
            (
                self.multiple_of == 0,
                "multiple_of",
                self.multiple_of.to_string(),
                "must be at least 1; 64 suits GPUs",
            ),
            (
                self.words.max_piece_length < 2,
                "words.max_piece_length",
                self.words.max_piece_length.to_string(),
                "must be at least 2; SentencePiece has 16",
            ),
            (
                !(self.words.character_coverage > 0.9 && self.words.character_coverage <= 1.0),
                "words.character_coverage",
                self.words.character_coverage.to_string(),
                "must be above 0.9 and at most 1; SentencePiece has 0.9995, MaLA-500 uses 1",
            ),
            (
                self.scores == Scores::Kept && !self.preserve.is_empty(),
                "preserve",
                self.preserve
                    .iter()
                    .map(Language::as_str)
                    .collect::<Vec<_>>()
                    .join(", "),
                "cannot hold with scores: kept, where new pieces come before the base's; use scores: after_base",
            ),
        ];
        if let Some((_, setting, value, rule)) = rules.into_iter().find(|(wrong, ..)| *wrong) {
            return Err(Error::VocabularySetting { setting, value, rule });
        }
        self.sampling.check()?;
        check_strings(&self.special, "special")?;
        check_strings(&self.user_defined, "user_defined")?;
        let inside = |a: &String| self.user_defined.iter().any(|b| a != b && b.contains(a.as_str()));
        if let Some(part) = self.user_defined.iter().find(|string| inside(string)) {
            return Err(Error::VocabularySetting {
                setting: "user_defined",
                value: part.clone(),
                rule: "is a part of another one, so that which of them text holds would depend on what follows; leave one out",
            });
        }
        match self.special.iter().find(|s| self.user_defined.contains(s)) {
            None => Ok(()),
            Some(both) => Err(Error::VocabularySetting {
                setting: "special",
                value: both.clone(),
                rule: "is user_defined as well; a token is either in no text or in all that spells it",
            }),
        }
    }
}

fn check_strings(strings: &[String], setting: &'static str) -> Result<()> {
    for (index, string) in strings.iter().enumerate() {
        let rule = if string.chars().count() < 2 {
            "is too short: a single character is a piece of text, not a token of its own"
        } else if string.contains([' ', SPACE]) {
            "has a space in it, which would have to be the space before the word as well; write it without"
        } else if strings[..index].contains(string) {
            "is named twice"
        } else {
            continue;
        };
        let value = string.clone();
        return Err(Error::VocabularySetting { setting, value, rule });
    }
    Ok(())
}

impl WordRules {
    /// Whether a string, with ▁ for the space, may be a piece: SentencePiece's `IsValidSentencePiece`.
    pub(crate) fn admit(&self, piece: &str, max_bytes: usize) -> bool {
        let length = piece.chars().count();
        if length > self.max_piece_length || piece.len() > max_bytes {
            return false;
        }
        let mut before: Option<Script> = None;
        for (place, c) in piece.chars().enumerate() {
            if matches!(c, '\0' | '\t' | ' ') {
                return false;
            }
            if c == SPACE {
                if place > 0 && (self.split_by_whitespace || place == length - 1) {
                    return false;
                }
                continue;
            }
            let number = c.is_number_decimal_digit();
            if number && self.split_digits && length > 1 {
                return false;
            }
            let script = match c.script() {
                // The mark of a long vowel is written with both.
                Script::Hiragana | Script::Katakana => Some(Script::Han),
                _ if c == 'ー' => Some(Script::Han),
                Script::Inherited => before,
                _ if number && !self.split_by_number => None,
                script => Some(script),
            };
            let changed = script.zip(before).is_some_and(|(now, before)| now != before);
            if changed && self.split_by_unicode_script {
                return false;
            }
            before = script;
        }
        true
    }

    /// The words of a normalised line: each begins at a ▁, as in SentencePiece's `SplitIntoWords`.
    pub(crate) fn words<'a>(&self, line: &'a str) -> Vec<&'a str> {
        if !self.split_by_whitespace {
            return vec![line];
        }
        let mut starts: Vec<usize> = line.match_indices(SPACE).map(|(at, _)| at).collect();
        if starts.first() != Some(&0) {
            starts.insert(0, 0);
        }
        starts.push(line.len());
        starts
            .windows(2)
            .map(|two| &line[two[0]..two[1]])
            .filter(|word| !word.is_empty())
            .collect()
    }
}

impl FromStr for Scores {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "after_base" => Ok(Scores::AfterBase),
            "kept" => Ok(Scores::Kept),
            _ => Err(format!("'{name}' is neither after_base nor kept")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rules: &WordRules, piece: &str, expected: bool) {
        assert_eq!(rules.admit(piece, 48), expected, "{piece:?} under {rules:?}");
    }

    #[test]
    fn pieces_keep_to_one_script_one_word_and_the_length() {
        let rules = WordRules::default();
        for good in ["▁слово", "слово", "▁", "漢字かな", "カー", "e\u{301}a", "2024", "▁12"] {
            check(&rules, good, true);
        }
        for bad in [
            "a漢",
            "aб",
            "a1",
            "don't",
            "a▁b",
            "a▁",
            "▁▁",
            "a\tb",
            "abcdefghijklmnopq",
            "ఉఉఉఉఉఉఉఉఉఉఉఉఉఉఉఉఉ",
        ] {
            check(&rules, bad, false);
        }
    }

    #[test]
    fn each_rule_can_be_turned() {
        let rules = |change: &dyn Fn(&mut WordRules)| {
            let mut rules = WordRules::default();
            change(&mut rules);
            rules
        };
        check(&rules(&|r| r.split_by_unicode_script = false), "aб", true);
        check(&rules(&|r| r.split_by_number = false), "a1", true);
        check(&rules(&|r| r.split_digits = true), "12", false);
        check(&rules(&|r| r.split_digits = true), "1", true);
        check(&rules(&|r| r.split_by_whitespace = false), "a▁b", true);
        check(&rules(&|r| r.split_by_whitespace = false), "a▁", false);
        check(&rules(&|r| r.max_piece_length = 3), "abcd", false);
        assert!(!WordRules::default().admit("слово", 9));
    }

    #[test]
    fn words_begin_at_spaces() {
        let rules = WordRules::default();
        assert_eq!(rules.words("▁a▁▁bc"), ["▁a", "▁", "▁bc"]);
        assert_eq!(rules.words("a▁"), ["a", "▁"]);
        assert!(rules.words("").is_empty());
    }
}
