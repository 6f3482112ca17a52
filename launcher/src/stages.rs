//! What training reads: corpus, base model, vocabulary, token shards. Each is made once into a folder of its own, beside
//! it a stamp with a digest of everything it was made from; while that digest stands, the folder is kept.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use configs::{Model, OnUnreadable, Pieces, Plan, digest};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::events::Event;
use crate::worker::{Job, Worker};
use crate::{files, text};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Corpus,
    Model,
    Vocabulary,
    Tokens,
}

/// In the order in which each needs those before it.
pub const STAGES: [Stage; 4] = [Stage::Corpus, Stage::Model, Stage::Vocabulary, Stage::Tokens];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Its inputs have not changed.
    Kept,
    Made(Duration),
}

/// How stages are made.
pub struct Maker<'a> {
    pub plan: &'a Plan,
    /// Only models need it, so that a login node without libtorch can do the rest.
    pub worker: &'a dyn Fn() -> anyhow::Result<Worker>,
    /// Runs a worker to its end and fails unless it finished.
    pub run: &'a mut dyn FnMut(&Job) -> anyhow::Result<()>,
    pub show: &'a mut dyn FnMut(&Event),
    /// Make it even if nothing has changed.
    pub force: bool,
}

impl Maker<'_> {
    /// Makes `stage` unless it is there and fresh; the stages before it must be.
    pub fn make(&mut self, stage: Stage) -> anyhow::Result<Outcome> {
        let folder = stage.folder(self.plan);
        if stage == Stage::Model && matches!(self.plan.model, Model::Folder { .. }) {
            check_model_folder(&folder)?;
            return Ok(Outcome::Kept);
        }
        let inputs = stage.inputs(self.plan)?;
        match Stamp::read(&folder)? {
            Some(stamp) if stamp.inputs == inputs && !self.force => return Ok(Outcome::Kept),
            Some(_) => {}
            None => ensure!(
                is_empty(&folder),
                "{} exists, but Panglot did not make it and will not replace it; move it away, or set another folder in the \
                 config",
                files::shown(&folder)
            ),
        }
        let started = Instant::now();
        let partial = files::beside(&folder, "partial");
        files::remove_folder(&partial)?;
        if let Some(parent) = folder.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        (self.show)(&Event::Phase {
            name: stage.doing().to_owned(),
        });
        self.build(stage, &partial)
            .with_context(|| format!("{} failed", stage.doing()))?;
        Stamp {
            stage,
            inputs,
            made_by: MADE_BY.to_owned(),
        }
        .write(&partial)?;
        replace(&folder, &partial)?;
        Ok(Outcome::Made(started.elapsed()))
    }

    fn build(&mut self, stage: Stage, out: &Path) -> anyhow::Result<()> {
        let plan = self.plan;
        let unit = stage.unit();
        let show = &mut self.show;
        let mut progress = |done, total| {
            show(&Event::Progress {
                done,
                total,
                unit: unit.to_owned(),
            })
        };
        let folders = &plan.folders;
        match stage {
            Stage::Corpus => {
                let (sources, settings) = import_of(plan, self.force)?;
                corpus::import(&sources, &settings, out, &mut progress)?;
            }
            Stage::Model => return self.build_model(out),
            Stage::Vocabulary => {
                let corpus = corpus::Corpus::open(&folders.corpus)?;
                let settings = plan.vocabulary.as_ref().map(vocabulary_settings);
                let settings = settings.transpose()?;
                corpus::extend(&corpus, &folders.base_model, settings.as_ref(), out, &mut progress)?;
            }
            Stage::Tokens => {
                let corpus = corpus::Corpus::open(&folders.corpus)?;
                let settings = corpus::TokenizeSettings {
                    document_start: plan.corpus.document_start.clone(),
                    document_end: plan.corpus.document_end.clone(),
                    megatron: megatron_files(plan)?,
                };
                corpus::tokenize(&corpus, &folders.vocabulary, out, &settings, &mut progress)?;
            }
        }
        Ok(())
    }

    fn build_model(&mut self, out: &Path) -> anyhow::Result<()> {
        let worker = (self.worker)()?;
        let args: Vec<OsString> = match &self.plan.model {
            Model::Folder { .. } => unreachable!("a folder is used as it is"),
            Model::Gguf { path } => {
                vec![
                    "import-gguf".into(),
                    "--gguf".into(),
                    path.into(),
                    "--out".into(),
                    out.into(),
                ]
            }
            Model::Scratch { .. } => {
                // The worker writes where the plan says, and the plan says the partial folder.
                let mut plan = self.plan.clone();
                plan.folders.base_model = out.to_owned();
                let file = files::beside(out, "plan.json");
                files::write_json(&file, &plan)?;
                vec!["init-model".into(), "--plan".into(), file.into()]
            }
        };
        (self.run)(&worker.alone(None, args))
    }
}

impl Stage {
    pub fn folder(self, plan: &Plan) -> PathBuf {
        let folders = &plan.folders;
        match self {
            Stage::Corpus => &folders.corpus,
            Stage::Model => &folders.base_model,
            Stage::Vocabulary => &folders.vocabulary,
            Stage::Tokens => &folders.tokens,
        }
        .clone()
    }

    /// What the user types to make it.
    pub fn command(self) -> &'static str {
        match self {
            Stage::Corpus => "corpus",
            Stage::Model => "model prepare",
            Stage::Vocabulary => "vocab",
            Stage::Tokens => "tokenize",
        }
    }

    /// Fails with the command to type unless the stage is there and made from what it would be made from now.
    pub fn require(self, plan: &Plan) -> anyhow::Result<()> {
        let folder = self.folder(plan);
        if self == Stage::Model && matches!(plan.model, Model::Folder { .. }) {
            return check_model_folder(&folder);
        }
        let Some(stamp) = Stamp::read(&folder)? else {
            bail!(
                "{self} is not there yet ({}); run `panglot {}` first",
                files::shown(&folder),
                self.command()
            );
        };
        ensure!(
            stamp.inputs == self.inputs(plan)?,
            "{self} in {} was made from other settings or files; run `panglot {}` again",
            files::shown(&folder),
            self.command()
        );
        Ok(())
    }

    /// Digest of everything that decides the stage's content.
    fn inputs(self, plan: &Plan) -> anyhow::Result<String> {
        let inputs = match self {
            Stage::Corpus => {
                let (sources, settings) = import_of(plan, false)?;
                let paths = sources.iter().flat_map(|source| source.kind.paths());
                let paths = paths.chain(settings.contamination.iter().flat_map(|c| c.files.clone()));
                let files = paths
                    .map(|path| fingerprint(&path))
                    .collect::<anyhow::Result<Vec<_>>>()?;
                json!([sources, settings, files])
            }
            Stage::Model => match &plan.model {
                Model::Folder { .. } => json!(null),
                Model::Gguf { path } => json!([fingerprint(path)?]),
                Model::Scratch {
                    shape,
                    init_std,
                    tokenizer,
                } => {
                    let made_from = match tokenizer {
                        Pieces::Folder { path } | Pieces::LlamaTokenizerJs { path } => fingerprint(path)?,
                        Pieces::Train { .. } => corpus_digest(plan)?,
                    };
                    json!([shape, init_std, tokenizer, plan.seed, made_from])
                }
            },
            Stage::Vocabulary => {
                // How rows start is the model's business, not the tokenizer's.
                let settings = plan.vocabulary.as_ref().map(vocabulary_settings);
                let settings = settings.transpose()?;
                json!([settings, corpus_digest(plan)?, tokenizer_digest(Stage::Model, plan)?])
            }
            Stage::Tokens => {
                let corpus = &plan.corpus;
                let documents = json!([corpus.document_start, corpus.document_end]);
                let tokenised = corpus.sources.iter().filter_map(|source| match &source.kind {
                    configs::SourceKind::Megatron { path } => {
                        Some(fingerprint(path).map(|files| json!([source.name, files])))
                    }
                    _ => None,
                });
                json!([
                    documents,
                    tokenised.collect::<anyhow::Result<Vec<_>>>()?,
                    corpus_digest(plan)?,
                    tokenizer_digest(Stage::Vocabulary, plan)?
                ])
            }
        };
        Ok(digest(&json!([self, MADE_BY, inputs])))
    }

    fn doing(self) -> &'static str {
        match self {
            Stage::Corpus => "importing the corpus",
            Stage::Model => "making the base model",
            Stage::Vocabulary => "learning the vocabulary",
            Stage::Tokens => "tokenising",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Stage::Corpus => "bytes",
            Stage::Tokens => "languages",
            Stage::Model => "tensors",
            Stage::Vocabulary => "pieces",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Stage::Corpus => "the corpus",
            Stage::Model => "the base model",
            Stage::Vocabulary => "the vocabulary",
            Stage::Tokens => "the tokens",
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Kept => f.write_str("kept: its inputs are unchanged"),
            Outcome::Made(time) => write!(f, "made in {}", text::duration(*time)),
        }
    }
}

/// The sources that are tokenised already.
fn megatron_files(plan: &Plan) -> anyhow::Result<Vec<corpus::MegatronFiles>> {
    let mut files = Vec::new();
    for source in &plan.corpus.sources {
        if let configs::SourceKind::Megatron { path } = &source.kind {
            files.extend(corpus::MegatronFiles::find(path, &source.name)?);
        }
    }
    Ok(files)
}

/// What the plan says of the corpus, in the importer's words. Tokenised sources are no text, and are left out.
fn import_of(plan: &Plan, afresh: bool) -> anyhow::Result<(Vec<corpus::SourceSpec>, corpus::ImportSettings)> {
    let mut sources = Vec::new();
    for source in &plan.corpus.sources {
        let kind = match &source.kind {
            configs::SourceKind::Udhr { path } => corpus::SourceKind::Udhr { path: path.clone() },
            configs::SourceKind::Folders {
                path,
                text_column,
                one_document,
            } => corpus::SourceKind::Folders {
                path: path.clone(),
                text_column: text_column.clone(),
                one_document: match one_document {
                    configs::OneDocument::Line => corpus::OneDocument::Line,
                    configs::OneDocument::BlankLine => corpus::OneDocument::BlankLine,
                    configs::OneDocument::File => corpus::OneDocument::File,
                },
            },
            configs::SourceKind::Files {
                paths,
                language,
                text_column,
            } => corpus::SourceKind::Files {
                paths: paths.clone(),
                language: match language {
                    configs::LanguageOf::Fixed(language) => corpus::LanguageOf::Fixed(language.parse()?),
                    configs::LanguageOf::Column(column) => corpus::LanguageOf::Column(column.clone()),
                },
                text_column: text_column.clone(),
            },
            configs::SourceKind::Parallel {
                sides,
                languages: [source, target],
                template,
            } => corpus::SourceKind::Parallel {
                sides: match sides {
                    configs::Sides::Tsv(file) => corpus::Sides::Tsv(file.clone()),
                    configs::Sides::Files { source, target } => corpus::Sides::Files {
                        source: source.clone(),
                        target: target.clone(),
                    },
                },
                languages: [source.parse()?, target.parse()?],
                template: template.clone(),
            },
            configs::SourceKind::Instructions { path, language, prompt } => corpus::SourceKind::Instructions {
                path: path.clone(),
                language: language.as_ref().map(|language| language.parse()).transpose()?,
                prompt: prompt.clone(),
            },
            configs::SourceKind::Megatron { .. } => continue,
        };
        sources.push(corpus::SourceSpec {
            name: source.name.clone(),
            licence: source.licence.clone(),
            kind,
        });
    }
    let mut settings = corpus::ImportSettings::new(plan.corpus.held_out, plan.seed);
    settings.held_out_most = plan.corpus.held_out_most;
    settings.deduplicate_lines = plan.corpus.deduplicate_lines;
    settings.on_unreadable = match plan.corpus.on_unreadable {
        OnUnreadable::Stop => corpus::OnUnreadable::Stop,
        OnUnreadable::Skip => corpus::OnUnreadable::Skip,
    };
    settings.nfc = plan.corpus.nfc;
    settings.near_duplicates = plan.corpus.near_duplicates;
    settings.contamination = plan.corpus.contamination.as_ref().map(|c| corpus::Contamination {
        files: c.files.clone(),
        n_grams: corpus::NGrams {
            n_words: c.words,
            n_characters: c.characters,
        },
    });
    settings.afresh = afresh;
    Ok((sources, settings))
}

/// Beside what was made; the folder is complete if this is in it.
#[derive(Debug, Serialize, Deserialize)]
struct Stamp {
    stage: Stage,
    inputs: String,
    made_by: String,
}

const MADE_BY: &str = concat!("panglot ", env!("CARGO_PKG_VERSION"));

impl Stamp {
    fn file(folder: &Path) -> PathBuf {
        folder.join("made.json")
    }

    fn read(folder: &Path) -> anyhow::Result<Option<Stamp>> {
        files::read_json_if_there(&Stamp::file(folder))
    }

    fn write(&self, folder: &Path) -> anyhow::Result<()> {
        files::write_json(&Stamp::file(folder), self)
    }
}

/// Puts `partial` in the place of `folder`.
fn replace(folder: &Path, partial: &Path) -> anyhow::Result<()> {
    let old = files::beside(folder, "old");
    files::remove_folder(&old)?;
    if folder.exists() {
        fs::rename(folder, &old).with_context(|| format!("cannot move {} aside", folder.display()))?;
    }
    fs::rename(partial, folder).with_context(|| format!("cannot move {} into place", partial.display()))?;
    files::remove_folder(&old)
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none())
}

fn check_model_folder(folder: &Path) -> anyhow::Result<()> {
    for name in ["config.json", "tokenizer.json"] {
        ensure!(
            folder.join(name).is_file(),
            "model.path = {} has no {name}; name a folder as `transformers` saves it",
            files::shown(folder)
        );
    }
    Ok(())
}

fn corpus_digest(plan: &Plan) -> anyhow::Result<String> {
    need(Stage::Corpus, plan)?;
    Ok(corpus::Corpus::open(&plan.folders.corpus)?.digest())
}

/// The config's words as the corpus crate's.
fn vocabulary_settings(settings: &configs::Vocabulary) -> anyhow::Result<corpus::VocabularySettings> {
    let preserve: Result<Vec<corpus::Language>, _> = settings.preserve.iter().map(|name| name.parse()).collect();
    Ok(corpus::VocabularySettings {
        new_pieces: settings.new_pieces,
        sampling: text_sampling(settings.alpha, settings.floor_bytes, settings.cap_bytes),
        max_piece_bytes: settings.max_piece_bytes,
        multiple_of: settings.multiple_of,
        scores: match settings.scores {
            configs::Scores::AfterBase => corpus::Scores::AfterBase,
            configs::Scores::Kept => corpus::Scores::Kept,
        },
        preserve: preserve.context("vocabulary.preserve")?,
        special: settings.special.clone(),
        user_defined: settings.user_defined.clone(),
        words: word_rules(&settings.words),
    })
}

/// How languages share the text that pieces are learned from, in the corpus crate's words.
pub fn text_sampling(alpha: f64, floor_bytes: Option<u64>, cap_bytes: Option<u64>) -> corpus::TextSampling {
    corpus::TextSampling {
        alpha,
        floor_bytes: floor_bytes.unwrap_or(0),
        cap_bytes: cap_bytes.unwrap_or(u64::MAX),
    }
}

/// The config's rules as the corpus crate's.
pub fn word_rules(words: &configs::WordRules) -> corpus::WordRules {
    corpus::WordRules {
        split_by_unicode_script: words.split_by_unicode_script,
        split_by_number: words.split_by_number,
        split_by_whitespace: words.split_by_whitespace,
        split_digits: words.split_digits,
        max_piece_length: words.max_piece_length,
        character_coverage: words.character_coverage,
        required_characters: words.required_characters.clone(),
    }
}

fn tokenizer_digest(of: Stage, plan: &Plan) -> anyhow::Result<String> {
    need(of, plan)?;
    let file = of.folder(plan).join("tokenizer.json");
    let content = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(blake3::hash(&content).to_hex().to_string())
}

fn need(stage: Stage, plan: &Plan) -> anyhow::Result<()> {
    let folder = stage.folder(plan);
    ensure!(
        !is_empty(&folder),
        "{stage} is not there yet ({}); run `panglot {}` first",
        files::shown(&folder),
        stage.command()
    );
    Ok(())
}

/// Digest of a source's files; see [`corpus::fingerprint`].
fn fingerprint(path: &Path) -> anyhow::Result<String> {
    ensure!(
        path.exists(),
        "{} does not exist; fetch it (`make demo` does), or correct the path in the config",
        files::shown(path)
    );
    Ok(corpus::fingerprint(path)?)
}
