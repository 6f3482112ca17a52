//! Which steps are left out: those whose numbers are not finite, and outliers where the plan guards against them. Every rank
//! judges the same numbers and judges alike.
//! Source: the z-scores of Karpathy's llm.c (`outlier_detector.h`) and of OLMo-core's `SkipStepOptimizer`.

use std::collections::VecDeque;
use std::fmt;

use configs::Guard as Settings;

/// This many skipped steps in a row end a run that says nothing else.
const SKIPS_IN_A_ROW: u32 = 10;

/// Why a step was left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Why {
    NotFinite,
    Outlier {
        what: &'static str,
        value: f64,
        mean: f64,
        sigmas: f64,
        window: usize,
    },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Why::NotFinite => write!(f, "the loss or its gradient is not finite"),
            Why::Outlier {
                what,
                value,
                mean,
                sigmas,
                window,
            } => write!(
                f,
                "the {what} {value:.4} is {sigmas:.1} standard deviations above the mean {mean:.4} of the last {window} steps"
            ),
        }
    }
}

/// The numbers that steps are compared with, as checkpoints keep them.
pub use launcher::checkpoint::GuardState as State;

#[derive(Clone, Debug, Default)]
pub struct Guard {
    settings: Option<Settings>,
    pub state: State,
}

impl Guard {
    pub fn new(settings: Option<Settings>) -> Guard {
        Guard {
            settings,
            state: State::default(),
        }
    }

    /// Whether a step with this loss and gradient norm is left out, and why. What is finite joins the window either way, so
    /// that a level that stays is no outlier for ever.
    pub fn judge(&mut self, loss: f64, grad_norm: f64, finite: bool) -> Option<Why> {
        let why = if finite {
            self.outlier(loss, grad_norm)
        } else {
            Some(Why::NotFinite)
        };
        self.state.skips_in_a_row = if why.is_some() {
            self.state.skips_in_a_row + 1
        } else {
            0
        };
        why
    }

    fn outlier(&mut self, loss: f64, grad_norm: f64) -> Option<Why> {
        let settings = self.settings?;
        let state = &mut self.state;
        let of_loss = join(&mut state.losses, settings.window, "loss", loss, settings.loss_sigmas);
        let of_norm = join(
            &mut state.norms,
            settings.window,
            "gradient norm",
            grad_norm,
            settings.norm_sigmas,
        );
        of_loss.or(of_norm)
    }

    /// How many skips in a row end the run.
    pub fn most_skips(&self) -> u32 {
        self.settings.map_or(SKIPS_IN_A_ROW, |settings| settings.skips_in_a_row)
    }
}

fn join(seen: &mut VecDeque<u64>, window: usize, what: &'static str, value: f64, most: Option<f64>) -> Option<Why> {
    let full = seen.len() >= window;
    let values = || seen.iter().map(|bits| f64::from_bits(*bits));
    let mean = values().sum::<f64>() / seen.len().max(1) as f64;
    let variance = values().map(|value| (value - mean).powi(2)).sum::<f64>() / seen.len().max(1) as f64;
    let sigmas = (value - mean) / variance.sqrt();
    while seen.len() >= window {
        seen.pop_front();
    }
    seen.push_back(value.to_bits());
    // Where nothing varied there is no measure; the comparison is false for a NaN.
    let outlier = full && sigmas.is_finite() && most.is_some_and(|most| sigmas > most);
    outlier.then_some(Why::Outlier {
        what,
        value,
        mean,
        sigmas,
        window,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(loss_sigmas: Option<f64>, norm_sigmas: Option<f64>) -> Guard {
        let mut guard = Guard::new(Some(Settings {
            window: 16,
            loss_sigmas,
            norm_sigmas,
            skips_in_a_row: 3,
        }));
        // Means 5 and 1, standard deviations 0.1 and 0.2.
        for step in 0..16 {
            let sign = if step % 2 == 0 { 1.0 } else { -1.0 };
            assert_eq!(guard.judge(5.0 + 0.1 * sign, 1.0 + 0.2 * sign, true), None);
        }
        guard
    }

    #[test]
    fn a_step_far_above_the_window_is_left_out_and_one_below_is_not() {
        assert_eq!(guard(Some(6.0), Some(6.0)).judge(5.5, 2.0, true), None);
        assert_eq!(guard(Some(6.0), Some(6.0)).judge(1.0, 0.0, true), None);
        let why = guard(Some(6.0), Some(6.0)).judge(5.7, 1.0, true).unwrap();
        assert_eq!(
            why.to_string(),
            "the loss 5.7000 is 7.0 standard deviations above the mean 5.0000 of the last 16 steps"
        );
        assert!(matches!(
            guard(None, Some(6.0)).judge(500.0, 2.4, true),
            Some(Why::Outlier {
                what: "gradient norm",
                ..
            })
        ));
        assert_eq!(guard(Some(6.0), None).judge(5.0, 1e9, true), None);
    }

    #[test]
    fn nothing_is_compared_before_the_window_is_full_nor_without_a_guard() {
        let mut young = Guard::new(guard(Some(6.0), None).settings);
        assert_eq!(young.judge(5.0, 1.0, true), None);
        assert_eq!(young.judge(1e9, 1.0, true), None);
        let mut none = Guard::new(None);
        assert!((0..200).all(|step| none.judge(f64::from(step * step), 1.0, true).is_none()));
        assert_eq!(none.judge(f64::NAN, 1.0, false), Some(Why::NotFinite));
    }

    #[test]
    fn a_level_that_stays_is_an_outlier_only_at_first_and_skips_are_counted() {
        let mut guard = guard(Some(6.0), None);
        let skipped = (0..10).filter(|_| guard.judge(6.0, 1.0, true).is_some()).count();
        assert!((1..4).contains(&skipped), "{skipped}");
        assert_eq!(guard.state.skips_in_a_row, 0);
        (1..=3).for_each(|skips| {
            guard.judge(f64::NAN, 1.0, false);
            assert_eq!(guard.state.skips_in_a_row, skips);
        });
        assert_eq!(guard.most_skips(), 3);
    }

    #[test]
    fn a_guard_that_was_saved_goes_on_as_it_was() {
        let mut whole = guard(Some(6.0), Some(6.0));
        whole.judge(5.1 + 1e-16, 0.1 + 0.2, true);
        let text = serde_json::to_string(&whole.state).unwrap();
        assert_eq!(serde_json::from_str::<State>(&text).unwrap(), whole.state);
    }
}
