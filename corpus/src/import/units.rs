//! A text as a sequence of comparable units: words, or characters where a script sets no spaces between words.
//! Case, punctuation and Unicode's compatibility variants do not count, so that a copy is known in another dress.

use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;
use unicode_script::{Script, UnicodeScript};

use crate::Language;
use crate::splitmix::mix;

/// What a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Word,
    Character,
}

/// Scripts that are written without spaces between words, by both of their names.
const UNSPACED: [(&str, Script); 18] = [
    ("Hani", Script::Han),
    ("Hira", Script::Hiragana),
    ("Kana", Script::Katakana),
    ("Bopo", Script::Bopomofo),
    ("Thai", Script::Thai),
    ("Laoo", Script::Lao),
    ("Khmr", Script::Khmer),
    ("Mymr", Script::Myanmar),
    ("Tibt", Script::Tibetan),
    ("Lana", Script::Tai_Tham),
    ("Tale", Script::Tai_Le),
    ("Talu", Script::New_Tai_Lue),
    ("Tavt", Script::Tai_Viet),
    ("Java", Script::Javanese),
    ("Bali", Script::Balinese),
    ("Cham", Script::Cham),
    ("Ahom", Script::Ahom),
    ("Yiii", Script::Yi),
];

impl Unit {
    /// Which units the texts of a language are compared by.
    pub fn of(language: &Language) -> Unit {
        let script = language.script();
        let is_mixture = matches!(script, "Hans" | "Hant" | "Jpan" | "Hrkt");
        if is_mixture || UNSPACED.iter().any(|(code, _)| *code == script) {
            Unit::Character
        } else {
            Unit::Word
        }
    }
}

/// Whether any of the text is in a script without spaces.
pub(crate) fn has_unspaced(text: &str) -> bool {
    !text.is_ascii()
        && text
            .chars()
            .any(|c| UNSPACED.iter().any(|(_, script)| c.script() == *script))
}

/// The units one after the other: NFKC, lower case, letters, digits and marks only.
pub(crate) fn for_each_unit(text: &str, unit: Unit, each: &mut dyn FnMut(&str)) {
    if text.is_ascii() {
        walk(
            text.bytes().map(|byte| char::from(byte.to_ascii_lowercase())),
            unit,
            each,
        );
    } else {
        walk(text.nfkc().flat_map(char::to_lowercase), unit, each);
    }
}

/// The units' hashes, the same on every machine.
pub(crate) fn unit_hashes(text: &str, unit: Unit) -> Vec<u64> {
    let mut hashes = Vec::new();
    for_each_unit(text, unit, &mut |unit| hashes.push(hash(unit.as_bytes())));
    hashes
}

/// FNV-1a, its bits mixed afterwards.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    mix(bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    }))
}

fn walk(chars: impl Iterator<Item = char>, unit: Unit, each: &mut dyn FnMut(&str)) {
    let mut word = String::new();
    for c in chars {
        let counts = c.is_alphanumeric() || is_combining_mark(c);
        match unit {
            Unit::Character if counts => each(c.encode_utf8(&mut [0; 4])),
            Unit::Character => {}
            Unit::Word if counts => word.push(c),
            Unit::Word if is_inside_words(c) || word.is_empty() => {}
            Unit::Word => {
                each(&word);
                word.clear();
            }
        }
    }
    if !word.is_empty() {
        each(&word);
    }
}

/// Apostrophes and what nobody sees: soft hyphen, joiners, byte-order mark. Other punctuation divides words.
fn is_inside_words(c: char) -> bool {
    matches!(
        c,
        '\'' | '’' | '‘' | '\u{ad}' | '\u{200b}'..='\u{200d}' | '\u{2060}' | '\u{feff}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, unit: Unit, expected: &[&str]) {
        let mut units = Vec::new();
        for_each_unit(text, unit, &mut |unit| units.push(unit.to_owned()));
        assert_eq!(units, expected, "{text}");
    }

    #[test]
    fn words_and_characters_are_known_in_another_dress() {
        check(
            "Don't — \"DO\" well-known1 ",
            Unit::Word,
            &["dont", "do", "well", "known1"],
        );
        check("ＤＯＮ’Ｔ ﬁne ŞİŞ", Unit::Word, &["dont", "fine", "şi\u{307}ş"]);
        check("कार्य क\u{94d}ष।", Unit::Word, &["कार्य", "क\u{94d}ष"]);
        check(
            "人人 生而，Free",
            Unit::Character,
            &["人", "人", "生", "而", "f", "r", "e", "e"],
        );
        check(" \n…", Unit::Word, &[]);
    }

    #[test]
    fn the_script_says_what_the_units_are() {
        for (language, unit) in [
            ("eng_Latn", Unit::Word),
            ("kor_Kore", Unit::Word),
            ("cmn_Hant", Unit::Character),
            ("jpn_Jpan", Unit::Character),
            ("khm_Khmr", Unit::Character),
        ] {
            assert_eq!(Unit::of(&language.parse().unwrap()), unit, "{language}");
        }
        assert!(has_unspaced("the word ไทย") && !has_unspaced("слово, मानव, 인간"));
    }
}
