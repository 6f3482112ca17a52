//! What more nodes win: from the measured steps of one training on several numbers of nodes to speeds, efficiencies with
//! their confidence, memory and waiting. Pure.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::events::StepMetrics;
use crate::text;

/// The first steps touch memory for the first time and connect peers; they are not counted.
pub const WARM_UP: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The global batch grows with the nodes.
    Weak,
    /// The global batch stays.
    Strong,
}

/// One number of nodes, measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub nodes: usize,
    pub ranks: usize,
    pub rows_per_step: usize,
    /// Steps that were counted.
    pub steps: usize,
    pub tokens_per_second: f64,
    /// Half the width of the 95 % interval of the mean.
    pub tokens_per_second_pm: f64,
    /// Of the speed that the smallest number of nodes promises.
    pub efficiency: f64,
    pub efficiency_pm: f64,
    /// Median of a step.
    pub step_seconds: f64,
    /// The largest of a rank.
    pub resident_bytes: u64,
    /// Share of the steps' time that ranks waited for others, where timelines were written.
    pub waiting_share: Option<f64>,
    /// What a rank handed to collectives in a step, at most, and ZeRO's lower bound, which is what the plan says.
    pub bytes_sent: u64,
    pub bytes_planned: u64,
    /// What `panglot plan` says of a step's time, where it says it.
    pub planned_step_seconds: Option<f64>,
}

/// What one run left.
pub struct Measured {
    pub nodes: usize,
    pub ranks: usize,
    pub rows_per_step: usize,
    pub tokens_per_step: usize,
    pub steps: Vec<StepMetrics>,
    pub waiting_share: Option<f64>,
    pub planned_step_seconds: Option<f64>,
}

/// The first is what the others are compared with.
pub fn points(runs: &[Measured]) -> Vec<Point> {
    let mut points: Vec<Point> = runs.iter().map(point).collect();
    let Some(first) = points.first().cloned() else {
        return points;
    };
    let promised = |point: &Point| first.tokens_per_second * point.nodes as f64 / first.nodes as f64;
    for point in &mut points {
        point.efficiency = point.tokens_per_second / promised(point);
        // Both speeds are uncertain; of the first against itself nothing is.
        let relative = |p: &Point| p.tokens_per_second_pm / p.tokens_per_second;
        let both = (relative(point).powi(2) + relative(&first).powi(2)).sqrt();
        point.efficiency_pm = if point.nodes == first.nodes {
            0.0
        } else {
            point.efficiency * both
        };
    }
    points
}

fn point(run: &Measured) -> Point {
    let counted = &run.steps[WARM_UP.min(run.steps.len())..];
    let speeds: Vec<f64> = counted
        .iter()
        .map(|step| run.tokens_per_step as f64 / step.seconds)
        .collect();
    let (mean, half) = mean_and_interval(&speeds);
    let mut seconds: Vec<f64> = counted.iter().map(|step| step.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    let last = counted.last();
    Point {
        nodes: run.nodes,
        ranks: run.ranks,
        rows_per_step: run.rows_per_step,
        steps: counted.len(),
        tokens_per_second: mean,
        tokens_per_second_pm: half,
        efficiency: 1.0,
        efficiency_pm: 0.0,
        step_seconds: seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN),
        resident_bytes: counted.iter().map(|step| step.resident_bytes).max().unwrap_or(0),
        waiting_share: run.waiting_share,
        bytes_sent: last.map_or(0, |step| step.bytes_sent),
        bytes_planned: last.map_or(0, |step| step.bytes_least),
        planned_step_seconds: run.planned_step_seconds,
    }
}

/// Student's 95 % quantile, two-sided, by degrees of freedom from 1 on; 1.96 beyond.
const T_95: [f64; 30] = [
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09,
    2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04,
];

fn mean_and_interval(values: &[f64]) -> (f64, f64) {
    let n = values.len();
    if n == 0 {
        return (f64::NAN, f64::NAN);
    }
    let mean = values.iter().sum::<f64>() / n as f64;
    if n == 1 {
        return (mean, f64::INFINITY);
    }
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
    let quantile = T_95.get(n - 2).copied().unwrap_or(1.96);
    (mean, quantile * (variance / n as f64).sqrt())
}

pub fn csv(points: &[Point]) -> String {
    let mut out = String::from(
        "nodes,ranks,rows_per_step,steps,tokens_per_second,tokens_per_second_pm,efficiency,efficiency_pm,step_seconds,\
         planned_step_seconds,resident_bytes,waiting_share,bytes_sent,bytes_planned\n",
    );
    let maybe = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.6}"));
    for p in points {
        let _ = writeln!(
            out,
            "{},{},{},{},{:.3},{:.3},{:.5},{:.5},{:.6},{},{},{},{},{}",
            p.nodes,
            p.ranks,
            p.rows_per_step,
            p.steps,
            p.tokens_per_second,
            p.tokens_per_second_pm,
            p.efficiency,
            p.efficiency_pm,
            p.step_seconds,
            maybe(p.planned_step_seconds),
            p.resident_bytes,
            maybe(p.waiting_share),
            p.bytes_sent,
            p.bytes_planned
        );
    }
    out
}

pub fn table(points: &[Point]) -> String {
    let share = |value: Option<f64>| value.map_or("?".to_owned(), |value| format!("{:.1} %", 100.0 * value));
    let row = |p: &Point| {
        vec![
            p.nodes.to_string(),
            p.ranks.to_string(),
            p.rows_per_step.to_string(),
            format!(
                "{} ± {}",
                text::count(p.tokens_per_second.round() as u64),
                text::count(p.tokens_per_second_pm.round() as u64)
            ),
            format!("{:.1} ± {:.1} %", 100.0 * p.efficiency, 100.0 * p.efficiency_pm),
            format!("{:.3} s", p.step_seconds),
            p.planned_step_seconds
                .map_or("?".to_owned(), |seconds| format!("{seconds:.3} s")),
            share(p.waiting_share),
            text::bytes(p.resident_bytes),
            text::bytes(p.bytes_sent),
            text::bytes(p.bytes_planned),
        ]
    };
    let head = [
        "nodes",
        "ranks",
        "rows",
        "tokens/s",
        "efficiency",
        "step",
        "planned",
        "waiting",
        "memory",
        "sent",
        "least to send",
    ];
    text::table(&head, points.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(nodes: usize, seconds: &[f64]) -> Measured {
        let step = |(step, seconds): (usize, &f64)| {
            serde_json::from_value(serde_json::json!({
                "step": step, "steps": 9, "loss": 1.0, "grad_norm": 1.0, "skipped": false, "lr": {}, "targets": 1,
                "targets_so_far": 1, "seconds": seconds, "tokens_per_second": 1.0, "resident_bytes": 1000 + step,
                "rows_digest": "", "languages": {}, "unix_time": 0.0, "bytes_sent": 10, "bytes_least": 9
            }))
            .unwrap()
        };
        Measured {
            nodes,
            ranks: 2 * nodes,
            rows_per_step: 8 * nodes,
            tokens_per_step: 100 * nodes,
            steps: seconds.iter().enumerate().map(step).collect(),
            waiting_share: Some(0.25),
            planned_step_seconds: None,
        }
    }

    #[test]
    fn efficiency_is_against_the_smallest_and_has_an_interval() {
        let runs = [run(1, &[9.0, 9.0, 1.0, 1.0, 1.0]), run(4, &[9.0, 9.0, 1.2, 1.25, 1.3])];
        let points = points(&runs);
        assert_eq!(
            (
                points[0].tokens_per_second,
                points[0].efficiency,
                points[0].efficiency_pm
            ),
            (100.0, 1.0, 0.0)
        );
        let speeds = [400.0 / 1.2, 400.0 / 1.25, 400.0 / 1.3f64];
        let mean = speeds.iter().sum::<f64>() / 3.0;
        assert!((points[1].efficiency - mean / 400.0).abs() < 1e-12);
        // s / √3 × 4.30, by hand.
        let s = (speeds.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 2.0).sqrt();
        assert!((points[1].tokens_per_second_pm - 4.30 * s / 3f64.sqrt()).abs() < 1e-9);
        assert_eq!(
            (points[1].steps, points[1].step_seconds, points[1].resident_bytes),
            (3, 1.25, 1004)
        );
    }

    #[test]
    fn one_step_has_no_interval() {
        assert_eq!(mean_and_interval(&[3.0]), (3.0, f64::INFINITY));
        assert!(mean_and_interval(&[]).0.is_nan());
    }

    #[test]
    fn a_line_a_number_of_nodes() {
        let points = points(&[run(1, &[9.0, 9.0, 1.0, 1.0]), run(2, &[9.0, 9.0, 1.0, 1.0])]);
        let csv = csv(&points);
        assert_eq!(csv.lines().count(), 3);
        assert_eq!(
            csv.lines().nth(2),
            Some("2,4,16,2,200.000,0.000,1.00000,0.00000,1.000000,,1003,0.250000,10,9")
        );
        assert!(table(&points).contains("100.0 ± 0.0 %"), "{}", table(&points));
    }
}
