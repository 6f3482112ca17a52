//! The figures that one would quote of a run.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use configs::Plan;
use serde_json::json;

use super::Evaluations;
use super::languages::Language;
use super::steps::Steps;
use super::table::Table;
use crate::evaluation::LanguageResult;
use crate::history::{Happening, What};
use crate::statistics::mean;
use crate::text;

pub fn figures(
    plan: &Plan,
    steps: &Steps,
    languages: &BTreeMap<String, Language>,
    evaluations: &Evaluations,
    history: &[Happening],
    attempts: usize,
) -> Table {
    let mut table = Table::new("figures", &["what", "value", "more"]);
    let mut figure = |what: &str, value: String, more: String| table.push(vec![json!(what), json!(value), json!(more)]);
    let bits: Vec<(&String, [f64; 2])> = languages
        .iter()
        .filter_map(|(code, language)| Some((code, language.bits()?)))
        .collect();
    if bits.is_empty() {
        if let Some(evaluation) = evaluations.after.or(evaluations.before) {
            figure(
                "Bits per byte",
                format!("{:.3}", evaluation.macro_bits_per_byte),
                format!("mean over {}", text::counted(evaluation.languages.len(), "language")),
            );
        }
    } else {
        let over = |at: usize| mean(bits.iter().map(|(_, bits)| bits[at]));
        figure(
            "Bits per byte",
            format!("{:.3} → {:.3}", over(0), over(1)),
            format!(
                "{}, mean over {}",
                text::change(over(0), over(1)),
                text::counted(bits.len(), "language")
            ),
        );
        let better = bits.iter().filter(|(_, [before, after])| after < before).count();
        let change =
            |(code, [before, after]): &(&String, [f64; 2])| format!("{code} {}", text::change(*before, *after));
        let relative = |(_, [before, after]): &(&String, [f64; 2])| (after - before) / before;
        let best = bits.iter().min_by(|a, b| relative(a).total_cmp(&relative(b)));
        let worst = bits.iter().max_by(|a, b| relative(a).total_cmp(&relative(b)));
        let ends: Vec<String> = best.into_iter().chain(worst).map(change).collect();
        figure(
            "Languages better",
            format!("{} of {}", text::count(better), text::count(bits.len())),
            ends.join(", "),
        );
        if let Some(paired) = &evaluations.paired {
            figure(
                "Differences that are real",
                format!(
                    "{} better, {} worse",
                    text::count(paired.better),
                    text::count(paired.worse)
                ),
                format!("95 % a language, against {}", file_stem(&paired.baseline)),
            );
        }
        let per_byte = |result: &Option<LanguageResult>| result.as_ref().map(|it| it.tokens as f64 / it.bytes as f64);
        let over = |one: fn(&Language) -> &Option<LanguageResult>| {
            let both = languages.values().filter(|language| language.bits().is_some());
            mean(both.filter_map(|language| per_byte(one(language))))
        };
        let (before, after) = (over(|language| &language.before), over(|language| &language.after));
        figure(
            "Tokens per byte",
            format!("{before:.3} → {after:.3}"),
            format!("{}: fewer is cheaper", text::change(before, after)),
        );
    }
    if let (Some(first), Some(last)) = (steps.lines.first(), steps.lines.last()) {
        figure(
            "Loss",
            format!("{:.2} → {:.2}", first.loss, last.loss),
            "first and last step, nats per token".to_owned(),
        );
        let best = steps.lines.iter().filter_map(|step| Some((step.held_out?, step.step)));
        if let Some((bits, step)) = best.min_by(|a, b| a.0.total_cmp(&b.0)) {
            figure(
                "Best while training",
                format!("{bits:.3}"),
                format!(
                    "bits per byte of held-out text, after {}",
                    text::counted(step as usize + 1, "step")
                ),
            );
        }
        let taken = last.step + 1;
        figure(
            "Steps",
            match taken >= plan.train.steps {
                true => text::count(taken),
                false => format!("{} of {}", text::count(taken), text::count(plan.train.steps)),
            },
            format!(
                "{} tokens, {} a step",
                text::count(taken * (plan.train.rows_per_step * plan.train.sequence_length) as u64),
                text::count(plan.train.rows_per_step * plan.train.sequence_length)
            ),
        );
        let seconds: f64 = steps.lines.iter().map(|step| step.seconds).sum();
        let tokens: f64 = steps
            .lines
            .iter()
            .map(|step| step.tokens_per_second * step.seconds)
            .sum();
        let ranks = last_environment(history).map_or(plan.launch.ranks, |environment| environment.ranks);
        figure(
            "Tokens per second",
            text::count((tokens / seconds.max(1e-9)) as u64),
            format!("in training steps, {}", text::counted(ranks, "rank")),
        );
        figure(
            "Memory",
            text::bytes(steps.lines.iter().map(|step| step.resident_bytes).max().unwrap_or(0)),
            "of the largest rank, at most".to_owned(),
        );
        let wall = last.unix_time - (first.unix_time - first.seconds);
        figure(
            "Time",
            text::duration(Duration::from_secs_f64(wall.max(0.0))),
            match attempts {
                0 | 1 => "from the first step to the last, in one attempt".to_owned(),
                n => format!("from the first step to the last, in {n} attempts"),
            },
        );
    }
    let saves = history.iter().filter_map(|line| match &line.what {
        What::Saved { bytes, stall, .. } => Some((*bytes, *stall)),
        _ => None,
    });
    let saves: Vec<(u64, f64)> = saves.collect();
    if let Some((bytes, _)) = saves.last() {
        let stall: f64 = saves.iter().map(|(_, stall)| stall).sum();
        figure(
            "Checkpoints",
            text::count(saves.len()),
            format!("{} each; training waited {stall:.2} s for all", text::bytes(*bytes)),
        );
    }
    table
}

fn file_stem(path: &str) -> String {
    Path::new(path)
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn last_environment(history: &[Happening]) -> Option<&crate::history::Environment> {
    history.iter().rev().find_map(|line| match &line.what {
        What::Began { environment, .. } => Some(environment),
        _ => None,
    })
}
