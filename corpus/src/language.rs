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

    /// What is wrong with a name that is well-formed: no such language, or no such script. `None`: nothing is.
    pub(crate) fn unknown_code(&self) -> Option<&'static str> {
        let private = |first: &str, last: &str, code: &str| first <= code && code <= last;
        let code = self.code();
        let special = ["mis", "mul", "und", "zxx"].contains(&code) || private("qaa", "qtz", code);
        if !special && isolang::Language::from_639_3(code).is_none() {
            return Some("no language has this ISO 639-3 code; one without a code may take qaa to qtz");
        }
        let script = self.script();
        let special = OTHER_SCRIPTS.contains(&script) || private("Qaaa", "Qabx", script);
        if !special && unicode_script::Script::from_short_name(script).is_none() {
            return Some(
                "no script has this ISO 15924 code; one without a code may take Qaaa to Qabx, and unwritten is Zxxx",
            );
        }
        None
    }
}

/// ISO 15924's codes that are no value of Unicode's script property: mixtures, variants, and scripts not yet encoded.
const OTHER_SCRIPTS: [&str; 41] = [
    "Afak", "Aran", "Blis", "Cirt", "Cyrs", "Egyd", "Egyh", "Geok", "Hanb", "Hans", "Hant", "Hntl", "Hrkt", "Inds",
    "Jamo", "Jpan", "Jurc", "Kore", "Kpel", "Latf", "Latg", "Leke", "Loma", "Maya", "Moon", "Nkdb", "Nkgb", "Pelm",
    "Phlv", "Piqd", "Psin", "Ranj", "Roro", "Sara", "Shui", "Syre", "Syrj", "Syrn", "Visp", "Wole", "Zxxx",
];

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

    #[test]
    fn codes_that_nobody_assigned_are_known_as_such() {
        let said = |name: &str| name.parse::<Language>().unwrap().unknown_code();
        for known in [
            "eng_Latn", "cmn_Hans", "qaa_Latn", "qtz_Qabx", "qua_Latn", "und_Zyyy", "zxx_Zxxx", "hbs_Cyrl", "jpn_Jpan",
        ] {
            assert_eq!(said(known), None, "{known}");
        }
        for (unknown, sentence) in [
            ("xqx_Latn", "639-3"),
            ("qzz_Latn", "639-3"),
            ("eng_Latx", "15924"),
            ("eng_Qaby", "15924"),
        ] {
            assert!(said(unknown).unwrap().contains(sentence), "{unknown}");
        }
    }
}
