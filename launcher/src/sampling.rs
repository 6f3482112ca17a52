//! From a plan to its stream of rows, and the table of what a run will read of each part.

use std::collections::BTreeMap;

use configs::Plan;
use corpus::{PartPlan, Stream, StreamSettings, TokenShards};

use crate::text;

/// The rows that the plan's run reads, from the plan's token shards.
pub fn stream(plan: &Plan) -> corpus::Result<Stream> {
    Stream::new(TokenShards::open(&plan.folders.tokens)?, settings(plan)?)
}

fn settings(plan: &Plan) -> corpus::Result<StreamSettings> {
    let sampling = &plan.sampling;
    let stage = |stage: &configs::SamplingStage| {
        let shares = stage.shares.iter().map(|(language, share)| {
            let [first, last] = share.ends();
            Ok((language.parse()?, corpus::Share { first, last }))
        });
        Ok(corpus::Stage {
            tokens: stage.tokens,
            alpha: stage.alpha,
            sources: stage.sources.clone(),
            leave_out_below: stage.leave_out_below,
            shares: shares.collect::<corpus::Result<_>>()?,
        })
    };
    let group = |group: &configs::ResourceGroup| corpus::Group {
        name: group.name.clone(),
        from_tokens: group.from_tokens,
        weight: group.weight,
    };
    Ok(StreamSettings {
        seed: plan.seed,
        sequence_length: plan.train.sequence_length,
        run_rows: plan.train.rows(),
        sampling: corpus::Sampling {
            alpha: sampling.alpha,
            floor: sampling.floor.unwrap_or(0),
            leave_out_below: sampling.leave_out_below.unwrap_or(0),
            sources: sampling.sources.clone().unwrap_or_default(),
            groups: sampling.groups.iter().map(group).collect(),
            max_epochs: sampling.max_epochs,
            stages: sampling.stages.iter().map(stage).collect::<corpus::Result<_>>()?,
        },
        packing: match sampling.packing {
            configs::Packing::Cut => corpus::Packing::Cut,
            configs::Packing::Documents => corpus::Packing::Documents,
        },
        attention: match sampling.attention {
            configs::Attention::Row => corpus::Attention::Row,
            configs::Attention::Document => corpus::Attention::Document,
        },
    })
}

/// The parts of a run from the largest share to the least, with a line for each stage, group and warning.
/// At most `most` parts are shown.
pub fn table(plan: &Plan, stream: &Stream, most: usize) -> String {
    let mut parts = stream.plan();
    parts.sort_by(|a, b| b.rows.cmp(&a.rows).then_with(|| a.name.cmp(&b.name)));
    let stages = stream.stages();
    let has_groups = !plan.sampling.groups.is_empty();
    let mut header = vec!["part".to_owned()];
    if has_groups {
        header.push("group".to_owned());
    }
    header.push(">tokens".to_owned());
    match stages.len() {
        1 => header.push(">share".to_owned()),
        n => header.extend((1..=n).map(|stage| format!(">stage {stage}"))),
    }
    header.extend([">read".to_owned(), ">epochs".to_owned(), String::new()]);
    let row = |part: &PartPlan| {
        let mut row = vec![part.name.clone()];
        if has_groups {
            row.push(part.group.clone().unwrap_or_default());
        }
        row.push(text::count(part.tokens));
        row.extend(part.shares.iter().map(|share| format!("{:.3} %", 100.0 * share)));
        row.extend([text::count(part.expected_tokens), format!("{:.2}", part.epochs)]);
        row.push(if repeats(plan, part) { "repeats" } else { "" }.to_owned());
        row
    };
    let rows = parts.iter().map(row).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let mut lines = vec![text::table(&header, text::ends(rows, most / 2))];
    for (stage, first) in stages.iter().enumerate().skip(1) {
        let reached = *first < plan.train.rows();
        lines.push(format!(
            "stage {} begins at row {}, in step {}{}",
            stage + 1,
            text::count(*first),
            text::count(first / plan.train.rows_per_step as u64),
            if reached { "" } else { ": this run does not get there" },
        ));
    }
    lines.push(summary(plan, &parts));
    lines.join("\n")
}

/// What a run reads in one line, and in another what it repeats more often than `sampling.warn_epochs`.
pub fn summary(plan: &Plan, parts: &[PartPlan]) -> String {
    let read: Vec<&PartPlan> = parts.iter().filter(|part| part.rows > 0).collect();
    let least = read.iter().map(|part| part.epochs).fold(f64::INFINITY, f64::min);
    let most = read.iter().map(|part| part.epochs).fold(0.0, f64::max);
    let tokens: u64 = read.iter().map(|part| part.expected_tokens).sum();
    let mut text = format!(
        "{} tokens of {}, each read {least:.2} to {most:.2} times",
        text::count(tokens),
        text::counted(read.len(), "part"),
    );
    if read.len() < parts.len() {
        text += &format!("; {} not read", text::counted(parts.len() - read.len(), "part"));
    }
    for (name, tokens) in by_group(&read) {
        text += &format!(
            "\n  group {name}: {:.1} % of the tokens",
            100.0 * tokens as f64 / read_tokens(&read)
        );
    }
    let mut repeated: Vec<&PartPlan> = read.into_iter().filter(|part| repeats(plan, part)).collect();
    repeated.sort_by(|a, b| b.epochs.total_cmp(&a.epochs));
    if !repeated.is_empty() {
        let some = repeated
            .iter()
            .take(5)
            .map(|part| format!("{} {:.1}", part.name, part.epochs));
        let some = some.collect::<Vec<_>>().join(", ");
        text += &format!(
            "\nwarning: {} read more than {} times: {some}{}; sampling.max_epochs caps it",
            text::counted(repeated.len(), "part"),
            plan.sampling.warn_epochs(),
            if repeated.len() > 5 { ", …" } else { "" },
        );
    }
    text
}

fn repeats(plan: &Plan, part: &PartPlan) -> bool {
    // What is shorter than a row or two is read again whatever is asked.
    let capped = plan.sampling.max_epochs.is_some() && part.rows <= 5;
    part.epochs > plan.sampling.warn_epochs() && !capped
}

fn by_group(read: &[&PartPlan]) -> BTreeMap<String, u64> {
    let mut groups = BTreeMap::new();
    for part in read {
        if let Some(group) = &part.group {
            *groups.entry(group.clone()).or_insert(0) += part.expected_tokens;
        }
    }
    groups
}

fn read_tokens(read: &[&PartPlan]) -> f64 {
    read.iter().map(|part| part.expected_tokens).sum::<u64>().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_repeated_too_often_is_warned_of_by_name() {
        let recipe = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
        let plan = configs::load(&recipe, &["sampling.warn_epochs=3".to_owned()]).unwrap();
        let part = |name: &str, tokens: u64, epochs: f64, group: &str| PartPlan {
            name: name.to_owned(),
            source: "web".to_owned(),
            language: "eng_Latn".parse().unwrap(),
            group: Some(group.to_owned()),
            documents: 1,
            tokens,
            shares: vec![0.25],
            rows: epochs.ceil() as u64,
            expected_tokens: (tokens as f64 * epochs) as u64,
            epochs,
        };
        let parts = [
            part("web/eng_Latn", 3_000, 0.5, "high"),
            part("web/deu_Latn", 100, 3.5, "low"),
            part("web/fra_Latn", 10, 15.0, "low"),
            part("web/zzz_Latn", 7, 0.0, "low"),
        ];
        let expected = "2,000 tokens of 3 parts, each read 0.50 to 15.00 times; 1 part not read\n  \
                        group high: 75.0 % of the tokens\n  \
                        group low: 25.0 % of the tokens\n\
                        warning: 2 parts read more than 3 times: web/fra_Latn 15.0, web/deu_Latn 3.5; sampling.max_epochs caps it";
        assert_eq!(summary(&plan, &parts), expected);
    }
}
