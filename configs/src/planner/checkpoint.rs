//! How large a checkpoint is, and how often one is worth its time.
//! Source: Young 1974, "A first order approximation to the optimum checkpoint interval"; Daly 2006, "A higher order estimate of
//! the optimum checkpoint interval for restart dumps", equation 37.

use serde::Serialize;

use super::hardware::Hardware;

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Saving {
    /// Of all files: master weights and two moments, f32.
    pub bytes: u64,
    /// Of one node's part, at the entry's rate; the longest that a step can wait for it.
    pub write_seconds: f64,
    /// Between failures, of all nodes together.
    pub mtbf_seconds: f64,
    /// Of training between two checkpoints, at which least is lost.
    pub interval_seconds: f64,
    pub interval_steps: u64,
    /// What writing and repeating cost at the config's interval, as a share of the run.
    pub lost_share: f64,
    /// The same at the best interval.
    pub least_lost_share: f64,
}

impl Saving {
    /// `every_steps`: the config's interval.
    pub fn of(trainable: u64, nodes: usize, hardware: &Hardware, step_seconds: f64, every_steps: u64) -> Saving {
        let bytes = 12 * trainable;
        let write_seconds = bytes as f64 / nodes as f64 / hardware.storage;
        let mtbf_seconds = hardware.mtbf_hours * 3600.0 / nodes as f64;
        let interval_seconds = interval(write_seconds, mtbf_seconds);
        // What a save costs, and half an interval that is repeated after each failure.
        let lost = |interval: f64| write_seconds / interval + (interval / 2.0 + write_seconds) / mtbf_seconds;
        Saving {
            bytes,
            write_seconds,
            mtbf_seconds,
            interval_seconds,
            interval_steps: ((interval_seconds / step_seconds).round() as u64).max(1),
            lost_share: lost(every_steps as f64 * step_seconds),
            least_lost_share: lost(interval_seconds),
        }
    }
}

/// Seconds of work between checkpoints that take `write` seconds each where a failure comes every `mtbf` seconds.
pub fn interval(write: f64, mtbf: f64) -> f64 {
    if write >= 2.0 * mtbf {
        return mtbf;
    }
    let ratio = write / (2.0 * mtbf);
    (2.0 * write * mtbf).sqrt() * (1.0 + ratio.sqrt() / 3.0 + ratio / 9.0) - write
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_young_s_where_failures_are_rare_and_nothing_does_better() {
        // A minute, once a day: √(2 · 60 · 86,400) = 3,220 s.
        let young = (2.0f64 * 60.0 * 86_400.0).sqrt();
        let found = interval(60.0, 86_400.0);
        assert!((found / young - 1.0).abs() < 0.02, "{found}, {young}");
        // Daly's own expectation of the whole time, for work W: M e^{R/M} (e^{(τ+δ)/M} − 1) W / τ.
        let cost = |interval: f64, write: f64, mtbf: f64| mtbf * (((interval + write) / mtbf).exp() - 1.0) / interval;
        for (write, mtbf) in [(60.0, 86_400.0), (600.0, 7200.0), (30.0, 3600.0)] {
            let best = interval(write, mtbf);
            let least = cost(best, write, mtbf);
            for other in [0.5, 0.8, 1.25, 2.0] {
                assert!(
                    cost(best * other, write, mtbf) > least,
                    "{write} s every {mtbf} s, {other} of it"
                );
            }
        }
        assert_eq!(
            interval(100.0, 40.0),
            40.0,
            "where failures come faster than checkpoints"
        );
    }
}
