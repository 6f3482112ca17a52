//! The ISO 15924 script of a text, judged by its letters and not by what a tag claims.
//! Chinese, Japanese and Korean are told apart by the codes for their mixtures: Hans, Hant, Jpan, Kore.

use std::collections::BTreeMap;

use unicode_script::{Script, UnicodeScript};

/// Frequent characters whose simplified and traditional forms differ, in the same order.
const SIMPLIFIED: &str = "国权会为与义这们个时来对发实护员财产劳亲爱应难无过动体学习参选济";
const TRADITIONAL: &str = "國權會為與義這們個時來對發實護員財產勞親愛應難無過動體學習參選濟";

/// The code of the script that most letters of the text belong to; `None` if it has no letters of any script.
/// `tagged` is the script subtag a BCP 47 tag gives, which settles what kind of Chinese characters these are.
pub(crate) fn script_of<'a>(
    texts: impl Iterator<Item = &'a str> + Clone,
    tagged: Option<&str>,
) -> Option<&'static str> {
    let mut counts: BTreeMap<&'static str, usize> = BTreeMap::new();
    for c in texts.clone().flat_map(str::chars) {
        let script = c.script();
        if !matches!(script, Script::Common | Script::Inherited | Script::Unknown) {
            *counts.entry(family(script)).or_default() += 1;
        }
    }
    let (script, _) = counts.iter().max_by_key(|(_, count)| **count)?;
    match *script {
        "Hani" if texts.clone().flat_map(str::chars).any(is_kana) => Some("Jpan"),
        "Hani" => Some(chinese(texts, tagged)),
        other => Some(other),
    }
}

/// Scripts that are written together count together.
fn family(script: Script) -> &'static str {
    match script {
        Script::Han | Script::Hiragana | Script::Katakana | Script::Bopomofo => "Hani",
        Script::Hangul => "Kore",
        other => other.short_name(),
    }
}

fn is_kana(c: char) -> bool {
    matches!(c.script(), Script::Hiragana | Script::Katakana)
}

fn chinese<'a>(texts: impl Iterator<Item = &'a str>, tagged: Option<&str>) -> &'static str {
    match tagged {
        Some("Hans") => return "Hans",
        Some("Hant") => return "Hant",
        Some("Hani") => return "Hani",
        _ => {}
    }
    let (mut simplified, mut traditional) = (0, 0);
    for c in texts.flat_map(str::chars) {
        simplified += usize::from(SIMPLIFIED.contains(c));
        traditional += usize::from(TRADITIONAL.contains(c));
    }
    match simplified.cmp(&traditional) {
        std::cmp::Ordering::Greater => "Hans",
        std::cmp::Ordering::Less => "Hant",
        std::cmp::Ordering::Equal => "Hani",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_letters_decide_the_script() {
        for (text, tagged, script) in [
            ("All human beings, 1948", None, Some("Latn")),
            ("Все люди (all) рождаются", Some("Latn"), Some("Cyrl")),
            ("人人生而自由,在尊严和权利上一律平等", None, Some("Hans")),
            ("人人生而自由,在尊嚴和權利上一律平等", None, Some("Hant")),
            ("買𧵑得自由", Some("Hani"), Some("Hani")),
            ("すべての人間は、生れながらにして自由であり", None, Some("Jpan")),
            ("모든 人間은 태어날 때부터", None, Some("Kore")),
            ("ᠬᠦᠮᠦᠨ", None, Some("Mong")),
            ("1948 – …", None, None),
        ] {
            assert_eq!(script_of([text].into_iter(), tagged), script, "{text}");
        }
        assert!(SIMPLIFIED.chars().all(|c| !TRADITIONAL.contains(c)));
        assert_eq!(SIMPLIFIED.chars().count(), TRADITIONAL.chars().count());
    }
}
