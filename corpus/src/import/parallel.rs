//! Reads parallel text, two aligned files or one of two columns, into bilingual documents (PolyLM, section on data).
//! A pair is one document of the target language, put together by a template.

use std::path::{Path, PathBuf};

use crate::import::lines::Lines;
use crate::import::records::Place;
use crate::import::template::Template;
use crate::import::texts::key_of;
use crate::import::{DrawnWith, Sides, Sink, Source, SourceLanguage};
use crate::{Document, Error, Language, Result};

const NAMES: [&str; 4] = ["source", "target", "source_language", "target_language"];

/// Aligned text in two languages.
///
/// A document belongs to the target language, whose share of training it is counted in. Its key is made of both sides and
/// says nothing of which is the source: the pair in the other direction has the same, so both are held out or neither.
pub(crate) struct Parallel {
    source_path: PathBuf,
    /// None: `source_path` has both sides, divided by a tab.
    target_path: Option<PathBuf>,
    source: Language,
    target: [SourceLanguage; 1],
    template: Template,
}

impl Parallel {
    /// Checks that the files are there and the template can be filled. `template` may say `{source_language}` and
    /// `{target_language}`, as `lll_Ssss`, beside `{source}` and `{target}`.
    pub fn open(sides: &Sides, [source, target]: &[Language; 2], template: &str) -> Result<Parallel> {
        let (source_path, target_path) = match sides {
            Sides::Tsv(path) => (path, None),
            Sides::Files { source, target } => (source, Some(target)),
        };
        for path in [Some(source_path), target_path].into_iter().flatten() {
            Lines::open(path)?;
        }
        Ok(Parallel {
            source_path: source_path.clone(),
            target_path: target_path.cloned(),
            source: source.clone(),
            target: [SourceLanguage::named_by_its_code(target.clone())],
            template: Template::parse("corpus.sources: template", template, &NAMES, 2)?,
        })
    }

    /// One pair. Both sides empty is an empty line, one side empty is a fault.
    fn hand_on(&self, place: &Place, source: &str, target: &str, sink: &mut dyn Sink) -> Result<()> {
        let (source, target) = (source.trim(), target.trim());
        let (from, to) = (&self.source, &self.target[0].language);
        match (source.is_empty(), target.is_empty()) {
            (false, false) => {}
            (true, true) => return Ok(()),
            (source_is_empty, _) => {
                let side = if source_is_empty { from } else { to };
                let reason = format!("the {side} side of the pair is empty; remove the pair from both sides");
                return sink.unreadable(place.error(reason));
            }
        }
        let (first, second) = if from <= to { (source, target) } else { (target, source) };
        let values = [source, target, from.as_str(), to.as_str()];
        sink.document(Document {
            language: to.clone(),
            // Nothing in a line is a line break, so no two pairs are joined alike.
            key: key_of(format!("{first}\n{second}").as_bytes()),
            text: self.template.fill(&values),
            loss_from: 0,
        })
    }

    fn read_columns(&self, sink: &mut dyn Sink) -> Result<()> {
        let mut lines = Lines::open(&self.source_path)?;
        while let Some(line) = lines.next_line()? {
            let place = self.place(line.number);
            let text = match line.text {
                Ok(text) => text,
                Err(error) => {
                    sink.unreadable(error)?;
                    continue;
                }
            };
            match text.split('\t').collect::<Vec<_>>()[..] {
                [source, target] => self.hand_on(&place, source, target, sink)?,
                [only] if only.trim().is_empty() => {}
                ref columns => sink.unreadable(place.error(format!(
                    "{} columns; each line must be a text, one tab and its translation",
                    columns.len()
                )))?,
            }
        }
        Ok(())
    }

    fn read_sides(&self, target_path: &Path, sink: &mut dyn Sink) -> Result<()> {
        let (mut sources, mut targets) = (Lines::open(&self.source_path)?, Lines::open(target_path)?);
        loop {
            let (source, target) = match (sources.next_line()?, targets.next_line()?) {
                (Some(source), Some(target)) => (source, target),
                (None, None) => return Ok(()),
                (source, _) => {
                    let read = source.is_some();
                    // A damaged archive has ended its side already, and has been told of.
                    let (source_lines, target_lines) = (sources.count()?, targets.count()?);
                    debug_assert!(read == (source_lines > target_lines));
                    return Err(Error::UnequalSides {
                        source_path: self.source_path.clone(),
                        source_lines,
                        target_path: target_path.to_path_buf(),
                        target_lines,
                    });
                }
            };
            let place = self.place(source.number);
            match (source.text, target.text) {
                (Ok(source), Ok(target)) => self.hand_on(&place, source, target, sink)?,
                (source, target) => {
                    let errors = [source.err(), target.err()].into_iter().flatten();
                    let mut ends = false;
                    for error in errors {
                        ends |= matches!(error, Error::DamagedArchive { .. });
                        sink.unreadable(error)?;
                    }
                    if ends {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn place(&self, line: usize) -> Place {
        Place {
            path: self.source_path.clone(),
            number: line,
            is_row: false,
        }
    }
}

impl Source for Parallel {
    fn drawn_with(&self) -> DrawnWith {
        let mut languages = [self.source.clone(), self.target[0].language.clone()];
        languages.sort();
        DrawnWith::Pairs(languages)
    }

    fn name(&self) -> &'static str {
        "parallel"
    }

    fn languages(&self) -> &[SourceLanguage] {
        &self.target
    }

    fn read(&self, _language: usize, sink: &mut dyn Sink) -> Result<()> {
        match &self.target_path {
            Some(target_path) => self.read_sides(target_path, sink),
            None => self.read_columns(sink),
        }
    }

    /// Of several languages, that is: this has one.
    fn path(&self) -> &Path {
        &self.source_path
    }
}
