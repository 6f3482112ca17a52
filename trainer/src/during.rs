//! Held-out text measured while training: a fixed sample, every so many steps, by the model as it trains. What is best on it
//! names the checkpoint that stays.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use configs::{Plan, Recompute};
use corpus::Tokenizer;
use launcher::checkpoint::Best;
use launcher::evaluation::LanguageResult;
use launcher::events::{Event, HeldOut};
use launcher::files;
use sharding::Pass as Stages;
use tch::Tensor;

use crate::evaluate::{self, Passes, Prepared};
use crate::model::{Model, Pass, embedding_weights};
use crate::step::Trainer;

pub struct During {
    sample: Vec<Prepared>,
    every: u64,
    steps: u64,
    tokens_per_batch: usize,
    /// One line a measurement: bits per byte by language.
    lines: PathBuf,
}

impl During {
    /// `None` where the plan wants none. `step` is the next one: lines of measurements that will be made again go.
    pub fn prepare(plan: &Plan, model: &Model, rank: usize, step: u64) -> Result<Option<During>> {
        let Some(every) = plan.evaluation.every_steps else {
            return Ok(None);
        };
        let tokenizer = Tokenizer::open(&plan.folders.vocabulary)?;
        let start = plan.before_document();
        let sample = evaluate::sample(plan, plan.evaluation.sample_bytes)?
            .iter()
            .map(|(language, documents)| evaluate::prepare(language, documents, &tokenizer, &plan.evaluation, start))
            .collect::<Result<Vec<_>>>()?;
        let during = During {
            sample: sample
                .into_iter()
                .filter(|prepared| !prepared.documents.is_empty())
                .collect(),
            every,
            steps: plan.train.steps,
            tokens_per_batch: plan.evaluation.tokens_per_batch,
            lines: plan.folders.run.join("evaluations/during.jsonl"),
        };
        anyhow::ensure!(
            !during.sample.is_empty(),
            "evaluation.every_steps is set, but {} holds no held-out text; set corpus.held_out above 0",
            plan.folders.corpus.display()
        );
        let longest = during.sample.iter().map(Prepared::longest).max().unwrap_or(0);
        model.check_length(longest, "evaluation.window")?;
        if rank == 0 {
            files::keep_steps_before(&during.lines, step + 1)?;
        }
        Ok(Some(during))
    }

    /// Whether to measure after so many steps: each `every`, and at the end.
    pub fn is_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.every) || step == self.steps
    }

    /// Measures; and this step, if it does better than what was `best` before. The same on every rank.
    pub fn measure(&mut self, trainer: &mut Trainer, best: Option<Best>) -> Result<(HeldOut, Option<Best>)> {
        let started = Instant::now();
        // What is measured has logits of its own.
        trainer.model.head.room = None;
        let (comm, device, step) = (trainer.comm, trainer.model.device, trainer.step);
        for document in self.sample.iter_mut().flat_map(|prepared| &mut prepared.documents) {
            document.nats = 0.0;
        }
        let mut nll = |ids: &Tensor, targets: &Tensor| nll(trainer, ids, targets);
        // Entering a stage may be a collective: all ranks make as many passes.
        evaluate::add_nats(
            &mut self.sample,
            self.tokens_per_batch,
            device,
            comm,
            &mut nll,
            Passes::AsManyOnAllRanks,
            &|_| {},
        )?;
        let of = |prepared: &Prepared| LanguageResult::of(&prepared.documents[0].language, &prepared.documents);
        let languages: Vec<LanguageResult> = self.sample.iter().map(of).collect();
        let sum: f64 = languages.iter().map(|language| language.bits_per_byte).sum();
        let held_out = HeldOut {
            macro_bits_per_byte: sum / languages.len() as f64,
            languages: languages.len(),
            tokens: languages.iter().map(|language| language.tokens).sum(),
            seconds: started.elapsed().as_secs_f64(),
        };
        let bits = held_out.macro_bits_per_byte;
        let beats = |best: Best| bits < best.macro_bits_per_byte;
        let new_best = (bits.is_finite() && best.is_none_or(beats)).then_some(Best {
            step,
            macro_bits_per_byte: bits,
        });
        if comm.rank() == 0 {
            if let Err(error) = self.write_line(step, &held_out, &languages) {
                let text = format!("what was measured by language after step {step} is not written: {error:#}");
                Event::Note { text }.emit();
            }
            let best = new_best.map_or("", |_| ", the best so far");
            let text = format!(
                "after step {step}: {bits:.4} bits per byte of held-out text in {} languages{best} ({:.1} s)",
                held_out.languages, held_out.seconds
            );
            Event::Note { text }.emit();
        }
        Ok((held_out, new_best))
    }

    fn write_line(&self, step: u64, held_out: &HeldOut, languages: &[LanguageResult]) -> Result<()> {
        let by_language: BTreeMap<&str, f64> = languages
            .iter()
            .map(|language| (language.language.as_str(), language.bits_per_byte))
            .collect();
        let line = serde_json::json!({ "step": step, "held_out": held_out, "bits_per_byte": by_language });
        let folder = self.lines.parent().context("a file lies in a folder")?;
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(folder)?;
            let mut file = OpenOptions::new().create(true).append(true).open(&self.lines)?;
            writeln!(file, "{line}")
        };
        write().with_context(|| self.lines.display().to_string())
    }
}

/// −ln p of every target by the model as it trains, stage by stage: parameters that are divided among ranks come and go.
fn nll(trainer: &mut Trainer, ids_bt: &Tensor, targets_bt: &Tensor) -> Result<Tensor> {
    let (model, zero, comm) = (&mut trainer.model, &mut trainer.zero, trainer.comm);
    let pass = Pass {
        rotary: &model.rotary,
        recompute: Recompute::Full,
        dropout: None,
        documents: None,
    };
    let head_stage = model.layers.len() + 1;
    zero.begin_reading(comm, &model.embedding.name, ids_bt)?;
    let of_embedding = embedding_weights(&mut model.embedding, &mut model.positions_td);
    zero.enter(comm, 0, Stages::Forward, of_embedding)?;
    let mut hidden_btd = model.embed(&zero.embedding_ids(ids_bt));
    let of_embedding = embedding_weights(&mut model.embedding, &mut model.positions_td);
    zero.leave(comm, 0, Stages::Forward, of_embedding)?;
    for (layer, stage) in model.layers.iter_mut().zip(1..head_stage) {
        zero.enter(comm, stage, Stages::Forward, layer.weights_mut())?;
        hidden_btd = layer.forward(hidden_btd, &pass).0;
        zero.leave(comm, stage, Stages::Forward, layer.weights_mut())?;
    }
    let matrix = model.head_weight.as_mut().unwrap_or(&mut model.embedding);
    zero.enter(comm, head_stage, Stages::Forward, model.head.weights_mut(matrix))?;
    let nll_bt = model.head.nll(matrix, &hidden_btd, targets_bt);
    zero.leave(comm, head_stage, Stages::Forward, model.head.weights_mut(matrix))?;
    Ok(nll_bt)
}
