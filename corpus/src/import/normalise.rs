//! Unicode's composed form, NFC: an é is one character, however it was typed.
//! Two spellings of one text then are one document, and one sequence of tokens.

use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// The text in NFC and where its `loss_from` went; `None` if it is in NFC already.
///
/// Where the answer's first character composes with the prompt's last, the composed one is the answer's.
pub(crate) fn nfc(text: &str, loss_from: usize) -> Option<(String, usize)> {
    if text.is_ascii() || is_nfc_quick(text.chars()) == IsNormalized::Yes {
        return None;
    }
    let normalised: String = text.nfc().collect();
    if normalised == text {
        return None;
    }
    let prompt = text[..loss_from].nfc();
    let kept = prompt
        .zip(normalised.chars())
        .take_while(|(alone, within)| alone == within);
    let loss_from = kept.map(|(alone, _)| alone.len_utf8()).sum();
    Some((normalised, loss_from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn composing_moves_where_the_answer_begins() {
        assert_eq!(nfc("é is composed", 4), None);
        assert_eq!(nfc("e\u{301}: a\u{30a}", 4), Some(("é: å".into(), 3)));
        assert_eq!(nfc("e\u{301}: a\u{30a}", 5), Some(("é: å".into(), 4)));
        // The answer begins with the accent of the prompt's last letter.
        assert_eq!(nfc("oe\u{301}", 2), Some(("oé".into(), 1)));
        // Marks come into order across the border.
        assert_eq!(nfc("q\u{307}\u{323}x", 3), Some(("q\u{323}\u{307}x".into(), 1)));
        // Hangul: a syllable whose last consonant is the answer's.
        assert_eq!(nfc("\u{1112}\u{1161}\u{11ab}", 6), Some(("한".into(), 0)));
        // Quick check says "maybe", and the text is in NFC all the same.
        assert_eq!(nfc("\u{301}a", 0), None);
    }

    proptest! {
        #[test]
        fn the_prompt_stays_the_prompt(prompt in "\\PC{0,12}", answer in "\\PC{0,12}") {
            let text = format!("{prompt}{answer}");
            if let Some((normalised, loss_from)) = nfc(&text, prompt.len()) {
                prop_assert_eq!(&normalised, &text.nfc().collect::<String>());
                let alone: String = prompt.nfc().collect();
                prop_assert!(alone.starts_with(&normalised[..loss_from]));
            }
        }
    }
}
