//! A language as the corpus knows it: ISO 639-3 code and ISO 15924 script, `lll_Ssss`.
//! The one name used in folder names, manifests, metrics and reports.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// A checked `lll_Ssss`: three lower-case letters, `_`, four letters in title case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Language(String);

impl Language {
    /// The name, `lll_Ssss`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The ISO 639-3 part.
    pub fn code(&self) -> &str {
        &self.0[..3]
    }

    /// The ISO 15924 part.
    pub fn script(&self) -> &str {
        &self.0[4..]
    }
}

impl FromStr for Language {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let well_formed = match name.as_bytes() {
            [code @ .., b'_', initial, rest_a, rest_b, rest_c] if code.len() == 3 => {
                code.iter().all(u8::is_ascii_lowercase)
                    && initial.is_ascii_uppercase()
                    && [rest_a, rest_b, rest_c].into_iter().all(u8::is_ascii_lowercase)
            }
            _ => false,
        };
        if well_formed {
            Ok(Language(name.to_owned()))
        } else {
            Err(Error::LanguageName { value: name.to_owned() })
        }
    }
}

impl TryFrom<String> for Language {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        name.parse()
    }
}

impl From<Language> for String {
    fn from(language: Language) -> String {
        language.0
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_language_is_three_letters_and_a_script() {
        let language: Language = "cmn_Hans".parse().unwrap();
        assert_eq!(
            (language.code(), language.script(), language.to_string().as_str()),
            ("cmn", "Hans", "cmn_Hans")
        );
        for wrong in [
            "",
            "en_Latn",
            "eng-Latn",
            "eng_latn",
            "ENG_Latn",
            "eng_Latin",
            "éng_Lat",
            "eng_Latn ",
        ] {
            let said = wrong.parse::<Language>().unwrap_err().to_string();
            assert!(said.contains(&format!("'{wrong}' is not a language")), "{said}");
        }
    }
}
