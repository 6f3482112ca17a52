//! How often each part is read: from the settings to shares, stage by stage, and the exact count of a part's earlier rows.
//!
//! A stage's mix is a list of buckets with fixed weights: a language with a share of its own, a source, a resource group,
//! or simply all the rest. Within a bucket p_l ∝ max(n_l, floor)^α over its languages, and a language's parts (it may come
//! from several sources) share by size. What a part may not take, because it would be repeated too often, goes to the
//! others of its bucket, and to the other buckets once all of its own are full.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::stream::Part;
use crate::stream::shares::{PartOrder, fixed_point, weights};
use crate::{Error, Language, Result};

/// What a run reads how often. [`Sampling::by_size`] has everything but α off.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// p_l ∝ n_l^α: 1 by size, 0 all alike.
    pub alpha: f64,
    /// A language with fewer tokens is sampled as if it had so many; 0: none.
    pub floor: u64,
    /// Languages with fewer tokens, over all sources, are left out; 0: none.
    pub leave_out_below: u64,
    /// Weight of each source, all of them named, summing to 1; empty: sources are not told apart.
    pub sources: BTreeMap<String, f64>,
    /// Languages by size; either all have a weight or none has, and then they serve the table only.
    pub groups: Vec<Group>,
    /// No part is read more often than this in the run, but for up to five rows of one of which this leaves less than three.
    pub max_epochs: Option<f64>,
    /// One after the other; empty: one stage without changes.
    pub stages: Vec<Stage>,
}

/// The languages with at least so many tokens, over all sources, and fewer than the next larger group asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub name: String,
    pub from_tokens: u64,
    pub weight: Option<f64>,
}

/// A stretch of the run; `None` and empty leave what the run's settings say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stage {
    /// How long it is, rounded up to whole rows; `None` only in the last: to the end.
    pub tokens: Option<u64>,
    pub alpha: Option<f64>,
    pub sources: Option<BTreeMap<String, f64>>,
    pub leave_out_below: Option<u64>,
    /// Languages with a fixed share of all rows; the others share the rest.
    pub shares: BTreeMap<Language, Share>,
}

/// A share at a stage's first and last row. Where they differ the share moves in 64 equal steps, so that counting stays exact.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    pub first: f64,
    pub last: f64,
}

/// Steps of a ramp over its stage.
const RAMP_STEPS: u64 = 64;

/// Weights that sum to one up to this are meant to.
const SUM_TOLERANCE: f64 = 1e-6;

impl Sampling {
    /// p_l ∝ n_l^α and nothing else.
    pub fn by_size(alpha: f64) -> Sampling {
        Sampling {
            alpha,
            floor: 0,
            leave_out_below: 0,
            sources: BTreeMap::new(),
            groups: Vec::new(),
            max_epochs: None,
            stages: Vec::new(),
        }
    }

    /// The group of a language with so many tokens over all sources.
    pub fn group(&self, tokens: u64) -> Option<&Group> {
        let at_least = self.groups.iter().filter(|group| group.from_tokens <= tokens);
        at_least.max_by_key(|group| group.from_tokens)
    }
}

/// Which part each row of all stages is from.
pub(crate) struct Schedule {
    segments: Vec<Segment>,
    /// By stage: its first row.
    stages: Vec<u64>,
}

/// A stretch of rows with constant shares.
struct Segment {
    stage: usize,
    first_row: u64,
    /// Its rows up to the run's end.
    rows: u64,
    shares: Vec<f64>,
    order: PartOrder,
    /// For each part, rows before this segment less those the order counts before it; added to what the order counts.
    shift: Vec<u64>,
}

/// A stretch before its shares are known.
struct Stretch {
    stage: usize,
    first_row: u64,
    rows: u64,
    buckets: Vec<Bucket>,
}

/// Parts that share a weight.
struct Bucket {
    weight: f64,
    /// (part, share within the bucket); these sum to 1.
    members: Vec<(usize, f64)>,
}

/// What `max_epochs` leaves a part.
struct Cap {
    /// Rows that its share may come to.
    expected: u64,
    /// Rows of it that the run may have.
    most: u64,
}

impl Cap {
    /// A cap on repetition is not to shut out what is shorter than a row. Where it leaves less than three rows, the share comes to
    /// two: an interval of 2/R holds one to five of R rows, since those that follow the golden ratio lie 0.44/R to 1.9/R apart.
    fn of(part: &Part, epochs: f64) -> Cap {
        match (epochs * part.rows_per_epoch) as u64 {
            0 if part.tokens == 0 => Cap { expected: 0, most: 0 },
            0..=2 => Cap { expected: 2, most: 5 },
            rows => Cap {
                expected: rows,
                most: rows,
            },
        }
    }
}

impl Schedule {
    /// `run_rows` is where ramps of the last stage end and what `max_epochs` counts; the rows behind it go on likewise.
    pub fn new(
        parts: &[Part],
        sampling: &Sampling,
        sequence_length: u64,
        run_rows: u64,
        offset: u64,
    ) -> Result<Schedule> {
        if let Some(schedule) = Schedule::fitting(parts, sampling, sequence_length, run_rows, offset)? {
            return Ok(schedule);
        }
        // Too long for the cap: look for the longest run that is not.
        let (mut fits, mut fits_not) = (0, run_rows);
        while fits_not - fits > 1 + fits / 1024 {
            let middle = fits + (fits_not - fits) / 2;
            match Schedule::fitting(parts, sampling, sequence_length, middle, offset)? {
                Some(_) => fits = middle,
                None => fits_not = middle,
            }
        }
        Err(Error::TooFewTokens {
            max_epochs: sampling.max_epochs.unwrap_or(f64::INFINITY),
            wanted: run_rows.saturating_mul(sequence_length),
            possible: fits * sequence_length,
        })
    }

    /// `None` if `max_epochs` leaves too little for so many rows.
    fn fitting(
        parts: &[Part],
        sampling: &Sampling,
        sequence_length: u64,
        run_rows: u64,
        offset: u64,
    ) -> Result<Option<Schedule>> {
        let (stretches, stages) = stretches(parts, sampling, sequence_length, run_rows)?;
        let caps: Option<Vec<Cap>> = sampling
            .max_epochs
            .map(|epochs| parts.iter().map(|part| Cap::of(part, epochs)).collect());
        let mut allowed: Vec<f64> = match &caps {
            Some(caps) => caps.iter().map(|cap| cap.expected as f64).collect(),
            None => vec![f64::INFINITY; parts.len()],
        };
        // Counts differ from shares times rows by a few rows. Where that breaks a cap, the part is allowed less and all
        // is tried again; less is allowed each time, so this ends.
        loop {
            let Some(shares) = capped_shares(&stretches, &allowed) else {
                return Ok(None);
            };
            let schedule = Schedule::count(&stretches, shares, &stages, offset);
            let Some(caps) = &caps else { return Ok(Some(schedule)) };
            let counts = schedule.all_rows_before(run_rows);
            let mut kept = true;
            for ((count, cap), allowed) in counts.iter().zip(caps).zip(&mut allowed) {
                if *count > cap.most {
                    kept = false;
                    *allowed = (allowed.min(*count as f64) - (count - cap.most) as f64).max(0.0);
                }
            }
            if kept {
                return Ok(Some(schedule));
            }
        }
    }

    /// Orders and counts, segment after segment.
    fn count(stretches: &[Stretch], shares: Vec<Vec<f64>>, stages: &[u64], offset: u64) -> Schedule {
        let orders: Vec<PartOrder> = shares
            .iter()
            .map(|shares| PartOrder::new(&fixed_point(shares), offset))
            .collect();
        // Each order at its first row and, but for the last, at the first row of the next.
        let counts: Vec<(Vec<u64>, Vec<u64>)> = (0..orders.len())
            .into_par_iter()
            .map(|at| {
                let next = stretches
                    .get(at + 1)
                    .map_or(stretches[at].first_row, |next| next.first_row);
                (
                    orders[at].all_rows_before(stretches[at].first_row),
                    orders[at].all_rows_before(next),
                )
            })
            .collect();
        let mut before = vec![0u64; shares[0].len()];
        let mut segments = Vec::with_capacity(stretches.len());
        for (((stretch, shares), order), (first, next)) in stretches.iter().zip(shares).zip(orders).zip(counts) {
            let shift: Vec<u64> = before
                .iter()
                .zip(&first)
                .map(|(before, first)| before.wrapping_sub(*first))
                .collect();
            before = shift
                .iter()
                .zip(&next)
                .map(|(shift, next)| shift.wrapping_add(*next))
                .collect();
            segments.push(Segment {
                stage: stretch.stage,
                first_row: stretch.first_row,
                rows: stretch.rows,
                shares,
                order,
                shift,
            });
        }
        Schedule {
            segments,
            stages: stages.to_vec(),
        }
    }

    /// The part of a row.
    pub fn part(&self, row: u64) -> usize {
        self.segment(row).order.part(row)
    }

    /// How many of the rows `0..row` are of a part.
    pub fn rows_before(&self, row: u64, part: usize) -> u64 {
        let segment = self.segment(row);
        segment.shift[part].wrapping_add(segment.order.rows_before(row, part))
    }

    /// The same for all parts at once.
    pub fn all_rows_before(&self, row: u64) -> Vec<u64> {
        let segment = self.segment(row);
        let counts = segment.order.all_rows_before(row);
        segment
            .shift
            .iter()
            .zip(counts)
            .map(|(shift, count)| shift.wrapping_add(count))
            .collect()
    }

    /// The first row of each stage.
    pub fn stages(&self) -> &[u64] {
        &self.stages
    }

    /// The probability of each part in a stage; in a ramp, the mean over the stage.
    pub fn shares(&self, stage: usize) -> Vec<f64> {
        let of_stage = || self.segments.iter().filter(|segment| segment.stage == stage);
        let reached = of_stage().any(|segment| segment.rows > 0);
        let weight = |segment: &Segment| if reached { segment.rows as f64 } else { 1.0 };
        let whole: f64 = of_stage().map(weight).sum();
        let mut mean = vec![0.0; self.segments[0].shares.len()];
        for segment in of_stage() {
            let weight = weight(segment) / whole;
            mean.iter_mut()
                .zip(&segment.shares)
                .for_each(|(mean, share)| *mean += weight * share);
        }
        mean
    }

    fn segment(&self, row: u64) -> &Segment {
        let at = self.segments.partition_point(|segment| segment.first_row <= row);
        &self.segments[at.max(1) - 1]
    }
}

/// Shares by segment and part, such that no part's rows over the whole run are expected to exceed `allowed`. `None` if
/// all parts are full before the run ends.
fn capped_shares(stretches: &[Stretch], allowed: &[f64]) -> Option<Vec<Vec<f64>>> {
    let mut fixed: Vec<Vec<Option<f64>>> = vec![vec![None; allowed.len()]; stretches.len()];
    let free = vec![None; allowed.len()];
    loop {
        let shares: Vec<Vec<f64>> = stretches
            .iter()
            .zip(&fixed)
            // Behind the run's end nothing is capped.
            .map(|(stretch, fixed)| distribute(&stretch.buckets, if stretch.rows > 0 { fixed } else { &free }))
            .collect::<Option<_>>()?;
        let mut changed = false;
        for part in 0..allowed.len() {
            if fixed[0][part].is_some() {
                continue;
            }
            let total: f64 = stretches
                .iter()
                .zip(&shares)
                .map(|(s, shares)| s.rows as f64 * shares[part])
                .sum();
            if total > allowed[part] * (1.0 + 1e-12) {
                let kept = allowed[part] / total;
                fixed
                    .iter_mut()
                    .zip(&shares)
                    .for_each(|(fixed, shares)| fixed[part] = Some(kept * shares[part]));
                changed = true;
            }
        }
        if !changed {
            return Some(shares);
        }
    }
}

/// Shares of a mix in which some parts' are fixed already. Each bucket gets λ times its weight, less what is fixed in it.
/// `None` if all are fixed and leave something.
fn distribute(buckets: &[Bucket], fixed: &[Option<f64>]) -> Option<Vec<f64>> {
    let mut shares: Vec<f64> = fixed.iter().map(|fixed| fixed.unwrap_or(0.0)).collect();
    let (mut open_weight, mut fixed_in_open, mut remaining) = (0.0, 0.0, 1.0);
    let mut open = Vec::new();
    for bucket in buckets {
        let in_bucket: f64 = bucket.members.iter().filter_map(|(part, _)| fixed[*part]).sum();
        let free = bucket.members.iter().filter(|(part, _)| fixed[*part].is_none());
        let free: f64 = free.map(|(_, inner)| inner).sum();
        remaining -= in_bucket;
        if free > 0.0 {
            open_weight += bucket.weight;
            fixed_in_open += in_bucket;
            open.push((bucket, in_bucket, free));
        }
    }
    if open.is_empty() && remaining > 1e-9 {
        return None;
    }
    let level = (remaining + fixed_in_open) / open_weight;
    for (bucket, in_bucket, free) in open {
        let spread = (level * bucket.weight - in_bucket).max(0.0) / free;
        for (part, inner) in &bucket.members {
            if fixed[*part].is_none() {
                shares[*part] = spread * inner;
            }
        }
    }
    // Rounding aside they sum to one already.
    let sum: f64 = shares.iter().sum();
    shares.iter_mut().for_each(|share| *share /= sum);
    Some(shares)
}

/// The stages cut into stretches of constant shares, and the stages' first rows.
fn stretches(
    parts: &[Part],
    sampling: &Sampling,
    sequence_length: u64,
    run_rows: u64,
) -> Result<(Vec<Stretch>, Vec<u64>)> {
    let one = [Stage::default()];
    let stages = if sampling.stages.is_empty() {
        &one
    } else {
        sampling.stages.as_slice()
    };
    let (mut found, mut first_rows, mut first_row) = (Vec::new(), Vec::new(), 0u64);
    for (index, stage) in stages.iter().enumerate() {
        let last = index + 1 == stages.len();
        if stage.tokens.is_some() == last {
            let rule = "every stage but the last says how long it is, and the last goes to the run's end";
            let value = stage.tokens.map_or("missing".to_owned(), |tokens| tokens.to_string());
            return Err(refused(format!("stages[{index}].tokens"), value, rule));
        }
        let rows = match stage.tokens {
            Some(tokens) => tokens.div_ceil(sequence_length),
            None => run_rows.saturating_sub(first_row),
        };
        let steps = if stage.shares.values().any(|share| share.first != share.last) {
            RAMP_STEPS
        } else {
            1
        };
        let border = |step: u64| first_row + (u128::from(rows) * u128::from(step) / u128::from(steps)) as u64;
        first_rows.push(first_row);
        for step in 0..steps {
            let (start, end) = (border(step), border(step + 1));
            // The last stretch is there even if the run ends before it: it has all the rows behind.
            if start < end || (last && step + 1 == steps) {
                found.push(Stretch {
                    stage: index,
                    first_row: start,
                    rows: end.min(run_rows).saturating_sub(start),
                    buckets: buckets(parts, sampling, index, stage, (step as f64 + 0.5) / steps as f64)?,
                });
            }
        }
        first_row = first_row.saturating_add(rows).min(PartOrder::MAX_ROWS - 1);
    }
    Ok((found, first_rows))
}

/// The mix of a stage, `at` so far through it (0 … 1).
fn buckets(parts: &[Part], sampling: &Sampling, index: usize, stage: &Stage, at: f64) -> Result<Vec<Bucket>> {
    let stage_key = |key: &str| match sampling.stages.is_empty() {
        true => key.to_owned(),
        false => format!("stages[{index}].{key}"),
    };
    let alpha = stage.alpha.unwrap_or(sampling.alpha);
    if !(0.0..=1.0).contains(&alpha) {
        return Err(Error::Alpha { value: alpha });
    }
    let below = stage.leave_out_below.unwrap_or(sampling.leave_out_below);
    let inner = |members: Vec<usize>| within(parts, members, alpha, sampling.floor);
    let present: Vec<usize> = (0..parts.len())
        .filter(|part| parts[*part].tokens > 0 && parts[*part].language_tokens >= below)
        .collect();
    if present.is_empty() {
        let most = parts.iter().map(|part| part.language_tokens).max().unwrap_or(0);
        let rule = format!("the largest language has {most} tokens, so nothing is left; lower it");
        return Err(refused(stage_key("leave_out_below"), below.to_string(), rule));
    }

    let mut buckets = Vec::new();
    let mut rest = 1.0;
    for (language, share) in &stage.shares {
        let weight = share.first + (share.last - share.first) * at;
        let members: Vec<usize> = present
            .iter()
            .copied()
            .filter(|part| parts[*part].language == *language)
            .collect();
        if members.is_empty() {
            let rule =
                "the token shards have no text of this language, or it is left out; name another, or remove the line";
            return Err(refused(
                stage_key(&format!("shares.{language}")),
                weight.to_string(),
                rule,
            ));
        }
        if !(weight > 0.0 && weight <= 1.0) {
            let rule = "a share is above 0 and at most 1";
            return Err(refused(
                stage_key(&format!("shares.{language}")),
                weight.to_string(),
                rule,
            ));
        }
        rest -= weight;
        buckets.push(Bucket {
            weight,
            members: inner(members),
        });
    }
    let others: Vec<usize> = present
        .iter()
        .copied()
        .filter(|part| !stage.shares.contains_key(&parts[*part].language))
        .collect();
    if rest < -SUM_TOLERANCE || (rest > SUM_TOLERANCE && others.is_empty()) {
        let rule = if rest < 0.0 {
            "together they exceed 1; lower some"
        } else {
            "no other language is there to take the rest; make them sum to 1"
        };
        return Err(refused(stage_key("shares"), format!("{:.6}", 1.0 - rest), rule));
    }
    if rest > SUM_TOLERANCE {
        let classes = classes(parts, sampling, stage, &others, &stage_key)?;
        buckets.extend(classes.into_iter().map(|(weight, members)| Bucket {
            weight: rest * weight,
            members: inner(members),
        }));
    }
    Ok(buckets)
}

/// Languages without a share of their own, in classes with weights that sum to 1.
fn classes(
    parts: &[Part],
    sampling: &Sampling,
    stage: &Stage,
    others: &[usize],
    stage_key: &dyn Fn(&str) -> String,
) -> Result<Vec<(f64, Vec<usize>)>> {
    let sources = stage.sources.as_ref().unwrap_or(&sampling.sources);
    let weighted = sampling.groups.iter().any(|group| group.weight.is_some());
    if !sources.is_empty() && weighted {
        let rule = "groups have weights as well, and both cannot hold; remove the weights of one";
        return Err(refused(stage_key("sources"), format!("{sources:?}"), rule));
    }
    let (key, named): (String, Vec<(&str, f64)>) = if !sources.is_empty() {
        (
            stage_key("sources"),
            sources.iter().map(|(name, weight)| (name.as_str(), *weight)).collect(),
        )
    } else if weighted {
        let named = sampling
            .groups
            .iter()
            .map(|group| (group.name.as_str(), group.weight.unwrap_or(0.0)));
        ("groups".to_owned(), named.collect())
    } else {
        return Ok(vec![(1.0, others.to_vec())]);
    };
    let class_of = |part: &Part| -> Option<String> {
        match sources.is_empty() {
            true => sampling.group(part.language_tokens).map(|group| group.name.clone()),
            false => Some(part.source.clone()),
        }
    };
    let sum: f64 = named.iter().map(|(_, weight)| weight).sum();
    if named.iter().any(|(_, weight)| !(0.0..=1.0).contains(weight)) || (sum - 1.0).abs() > SUM_TOLERANCE {
        let rule = "weights are between 0 and 1 and sum to 1";
        return Err(refused(key, format!("{named:?}, together {sum:.6}"), rule));
    }
    let mut members: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for part in others {
        let class = class_of(&parts[*part]);
        match class.filter(|class| named.iter().any(|(name, _)| name == class)) {
            Some(class) => members.entry(class).or_default().push(*part),
            None => {
                let Part {
                    source,
                    language,
                    language_tokens,
                    ..
                } = &parts[*part];
                let rule = match sources.is_empty() {
                    true => format!(
                        "{language} has {language_tokens} tokens, fewer than every group asks for; add a group with \
                         from_tokens: 0, or leave it out with leave_out_below"
                    ),
                    false => format!("the token shards have text of {source}; give it a weight, 0 to leave it out"),
                };
                return Err(refused(key, format!("{named:?}"), rule));
            }
        }
    }
    let mut classes = Vec::new();
    for (name, weight) in named.into_iter().filter(|(_, weight)| *weight > 0.0) {
        let Some(members) = members.remove(name) else {
            let rule = "no text is there to take this weight; set it to 0 and share it among the others";
            return Err(refused(format!("{key}.{name}"), weight.to_string(), rule));
        };
        classes.push((weight / sum, members));
    }
    Ok(classes)
}

/// (part, share) of a bucket's members.
fn within(parts: &[Part], members: Vec<usize>, alpha: f64, floor: u64) -> Vec<(usize, f64)> {
    let mut languages: BTreeMap<&Language, u64> = BTreeMap::new();
    for part in &members {
        *languages.entry(&parts[*part].language).or_default() += parts[*part].tokens;
    }
    let tokens: Vec<u64> = languages.values().map(|tokens| (*tokens).max(floor)).collect();
    let weights = weights(&tokens, alpha);
    let whole = weights.iter().sum::<u128>() as f64;
    let of_language: BTreeMap<&Language, f64> = languages
        .iter()
        .zip(weights)
        .map(|((language, tokens), weight)| (*language, weight as f64 / whole / *tokens as f64))
        .collect();
    members
        .into_iter()
        .map(|part| (part, of_language[&parts[part].language] * parts[part].tokens as f64))
        .collect()
}

fn refused(key: String, value: String, rule: impl Into<String>) -> Error {
    Error::Sampling {
        key,
        value,
        rule: rule.into(),
    }
}
