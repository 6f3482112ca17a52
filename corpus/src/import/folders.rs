//! Reads one folder per `lll_Ssss`, or one file: text, JSONL, Parquet or Arrow, packed or not, at any depth.
//! What lies there and is no text is listed as skipped; what should be a language and is none ends the import.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::import::records::Format;
use crate::import::texts::{OneDocument, read_texts};
use crate::import::{Sink, Source, SourceLanguage};
use crate::{Error, Language, Result, Skipped};

/// Deeper folders are a link to somewhere above, not a corpus.
const DEEPEST: usize = 8;

/// A folder of languages, listed but not yet read.
pub(crate) struct Folders {
    listing: Listing,
    text_column: String,
    one_document: OneDocument,
}

impl Folders {
    /// Lists the languages under `root`.
    ///
    /// `<root>/<lll_Ssss>/…` holds a language's files at any depth: `text.txt`, the `train.jsonl`, `validation.jsonl` and
    /// `<lll_Ssss>_part_0.jsonl` of EMMA-500, the `train/data-00000-of-00001.arrow` of Glot500-c. All of them are read, also
    /// what is called validation or test: this corpus holds out its own share, of every file alike.
    /// `<root>/<lll_Ssss>.jsonl` is a language in one file, `<root>/<lll_Ssss>_part_0.jsonl` one in several.
    pub fn open(root: &Path, text_column: &str, one_document: OneDocument) -> Result<Folders> {
        Ok(Folders {
            listing: Listing::of(root)?,
            text_column: text_column.to_owned(),
            one_document,
        })
    }
}

impl Source for Folders {
    fn name(&self) -> &'static str {
        "folders"
    }

    fn languages(&self) -> &[SourceLanguage] {
        &self.listing.languages
    }

    fn read(&self, language: usize, sink: &mut dyn Sink) -> Result<()> {
        let files = &self.listing.files[language];
        let language = &self.listing.languages[language].language;
        files.iter().try_for_each(|(path, format)| {
            read_texts(path, *format, &self.text_column, self.one_document, language, sink)
        })
    }

    fn skipped(&self) -> &[Skipped] {
        &self.listing.skipped
    }

    fn path(&self) -> &Path {
        &self.listing.root
    }

    fn files(&self, language: usize) -> Option<Vec<PathBuf>> {
        Some(
            self.listing.files[language]
                .iter()
                .map(|(path, _)| path.clone())
                .collect(),
        )
    }
}

/// Which files belong to which language.
pub(crate) struct Listing {
    pub root: PathBuf,
    /// In the order of their names.
    pub languages: Vec<SourceLanguage>,
    /// For each language, its files in the order of their names.
    pub files: Vec<Vec<(PathBuf, Format)>>,
    pub skipped: Vec<Skipped>,
}

impl Listing {
    /// Hidden entries are passed over. Files of another kind are listed as skipped.
    pub fn of(root: &Path) -> Result<Listing> {
        let mut found: BTreeMap<Language, Vec<(PathBuf, Format)>> = BTreeMap::new();
        let mut folder_of: BTreeMap<Language, PathBuf> = BTreeMap::new();
        let mut whole_file_of: BTreeMap<Language, PathBuf> = BTreeMap::new();
        let mut skipped = Vec::new();
        for path in sorted_entries(root)? {
            if path.is_dir() {
                let language: Language = name_of(&path).parse()?;
                let mut files = Vec::new();
                list_files(root, &path, 1, &mut files, &mut skipped)?;
                if files.is_empty() {
                    return Err(Error::EmptyCorpus {
                        path,
                        rule: "expected files ending in .txt, .jsonl (also with .gz or .zst), .parquet or .arrow",
                    });
                }
                folder_of.insert(language.clone(), path);
                found.insert(language, files);
            } else if let Some(format) = Format::of(&path) {
                let (language, is_whole) = language_of_file(&path)?;
                let twice = match is_whole {
                    true => whole_file_of.insert(language.clone(), path.clone()),
                    false => None,
                };
                if let Some(first) = twice.or_else(|| folder_of.get(&language).cloned()) {
                    return Err(Error::LanguageInTwoPlaces {
                        language,
                        first,
                        second: path,
                    });
                }
                found.entry(language).or_default().push((path, format));
            } else {
                skipped.push(no_text(root, &path));
            }
        }
        if found.is_empty() {
            let rule = "expected one folder per language, named like eng_Latn, or one file like eng_Latn.jsonl";
            return Err(Error::EmptyCorpus {
                path: root.to_path_buf(),
                rule,
            });
        }
        let (languages, files) = found
            .into_iter()
            .map(|(language, files)| (SourceLanguage::named_by_its_code(language), files))
            .unzip();
        Ok(Listing {
            root: root.to_path_buf(),
            languages,
            files,
            skipped,
        })
    }
}

impl SourceLanguage {
    /// A language of which nothing is known but `lll_Ssss`.
    pub fn named_by_its_code(language: Language) -> SourceLanguage {
        SourceLanguage {
            name: language.to_string(),
            language,
            latitude: None,
            longitude: None,
        }
    }
}

fn list_files(
    root: &Path,
    folder: &Path,
    depth: usize,
    files: &mut Vec<(PathBuf, Format)>,
    skipped: &mut Vec<Skipped>,
) -> Result<()> {
    for path in sorted_entries(folder)? {
        if path.is_dir() && depth < DEEPEST {
            list_files(root, &path, depth + 1, files, skipped)?;
        } else if let Some(format) = Format::of(&path).filter(|_| path.is_file()) {
            files.push((path, format));
        } else {
            skipped.push(no_text(root, &path));
        }
    }
    Ok(())
}

fn no_text(root: &Path, path: &Path) -> Skipped {
    Skipped {
        what: path.strip_prefix(root).unwrap_or(path).display().to_string(),
        why: format!("not a file ending in {}", Format::ENDINGS),
    }
}

/// The language a loose file names, and whether it says to be all of it: `eng_Latn.jsonl` does, `eng_Latn_part_0.jsonl`
/// and `eng_Latn-00000-of-00002.parquet` do not.
fn language_of_file(path: &Path) -> Result<(Language, bool)> {
    let name = name_of(path);
    let stem = name.split('.').next().unwrap_or_default();
    let (language, part) = stem.split_at_checked("lll_Ssss".len()).unwrap_or((stem, ""));
    match language.parse() {
        Ok(language) if !part.starts_with(char::is_alphanumeric) => Ok((language, part.is_empty())),
        _ => Err(Error::FileWithoutLanguage {
            path: path.to_path_buf(),
        }),
    }
}

fn sorted_entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    let paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<Vec<_>>>();
    let mut paths = paths.map_err(Error::io("list", folder))?;
    paths.retain(|path| !name_of(path).starts_with('.'));
    paths.sort();
    Ok(paths)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
