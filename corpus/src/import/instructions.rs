//! Reads instructions and answers (MultiAlpaca: `instruction`, `input`, `output`) into documents of which only the
//! answer is learned.

use std::path::{Path, PathBuf};

use crate::import::folders::Listing;
use crate::import::records::{Column, Format, Record, read_records};
use crate::import::template::Template;
use crate::import::texts::key_of;
use crate::import::{Sink, Source, SourceLanguage};
use crate::{Document, Language, Result, Skipped};

const COLUMNS: [Column; 3] = [
    Column {
        name: "instruction",
        optional: false,
    },
    Column {
        name: "input",
        optional: true,
    },
    Column {
        name: "output",
        optional: false,
    },
];

/// Instruction files, each all in one language.
pub(crate) struct Instructions {
    path: PathBuf,
    languages: Vec<SourceLanguage>,
    files: Vec<Vec<(PathBuf, Format)>>,
    skipped: Vec<Skipped>,
    prompt: Template,
}

impl Instructions {
    /// `language`: of the one file at `path`; none where `path` is a folder with one file or folder per `lll_Ssss`.
    pub fn open(path: &Path, language: Option<&Language>, prompt: &str) -> Result<Instructions> {
        let prompt = Template::parse("corpus.sources: prompt", prompt, &["instruction", "input"], 1)?;
        let (languages, files, skipped) = match language {
            Some(language) => {
                let about = SourceLanguage::named_by_its_code(language.clone());
                let file = (path.to_path_buf(), Format::of_records(path)?);
                (vec![about], vec![vec![file]], Vec::new())
            }
            None => {
                let listing = Listing::of(path)?;
                (listing.languages, listing.files, listing.skipped)
            }
        };
        for (path, format) in files.iter().flatten() {
            if *format == Format::Text {
                Format::of_records(path)?;
            }
        }
        Ok(Instructions {
            path: path.to_path_buf(),
            languages,
            files,
            skipped,
            prompt,
        })
    }

    fn hand_on(&self, record: &Record, language: &Language, sink: &mut dyn Sink) -> Result<()> {
        let input = record.values[1].as_deref().unwrap_or_default();
        let (instruction, input, output) = (record.text(0).trim(), input.trim(), record.text(2).trim());
        for (name, text) in [("instruction", instruction), ("output", output)] {
            if text.is_empty() {
                let reason = format!("`{name}` is empty; nothing is to be learned from it, so remove the record");
                return sink.unreadable(record.place.error(reason));
            }
        }
        let prompt = self.prompt.fill(&[instruction, input]);
        let loss_from = prompt.len();
        let text = prompt + output;
        sink.document(Document {
            language: language.clone(),
            key: key_of(text.as_bytes()),
            text,
            loss_from,
        })
    }
}

impl Source for Instructions {
    fn name(&self) -> &'static str {
        "instructions"
    }

    fn languages(&self) -> &[SourceLanguage] {
        &self.languages
    }

    fn read(&self, language: usize, sink: &mut dyn Sink) -> Result<()> {
        let files = &self.files[language];
        let language = &self.languages[language].language;
        files.iter().try_for_each(|(path, format)| {
            read_records(path, *format, &COLUMNS, sink, &mut |record, sink| {
                self.hand_on(&record, language, sink)
            })
        })
    }

    fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn files(&self, language: usize) -> Option<Vec<PathBuf>> {
        Some(self.files[language].iter().map(|(path, _)| path.clone()).collect())
    }
}
