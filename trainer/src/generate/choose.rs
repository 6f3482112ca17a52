//! Which token comes next, from the logits: a pure function of them, the tokens so far, the settings and one random number.
//! Filters come in `transformers`' order: repetition penalty, temperature, top-k, top-p.

use launcher::measurement::Sampling;

/// `logits` of all pieces, which the penalty changes; `seen` are the prompt's and the text's tokens; `uniform` in [0, 1).
pub fn choose(logits: &mut [f32], seen: &[u32], how: &Sampling, uniform: f64) -> u32 {
    if how.repetition_penalty != 1.0 {
        penalise(logits, seen, how.repetition_penalty as f32);
    }
    if how.temperature == 0.0 {
        return likeliest(logits);
    }
    let mut candidates = candidates(logits, how);
    let total: f64 = candidates.iter().map(|(_, p)| p).sum();
    let mut left = uniform * total;
    let last = candidates.pop().expect("a model has pieces");
    let drawn = candidates.iter().find(|(_, p)| {
        left -= p;
        left < 0.0
    });
    drawn.map_or(last.0, |(id, _)| *id)
}

/// The first of the largest.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (id, *logit);
        }
    }
    best.0 as u32
}

fn penalise(logits: &mut [f32], seen: &[u32], penalty: f32) {
    let mut seen: Vec<u32> = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for id in seen {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit < 0.0 {
                *logit * penalty
            } else {
                *logit / penalty
            };
        }
    }
}

/// Tokens that may be drawn, with e^((logit − most) / temperature); never none.
fn candidates(logits: &[f32], how: &Sampling) -> Vec<(u32, f64)> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - most) / how.temperature).exp();
    let all = logits.iter().enumerate().map(|(id, logit)| (id as u32, weight(*logit)));
    let mut all: Vec<(u32, f64)> = all.collect();
    let falling = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if how.top_k > 0 && how.top_k < all.len() {
        let mut ranked = all.clone();
        let (_, (_, least), _) = ranked.select_nth_unstable_by(how.top_k - 1, falling);
        // Ties with the last of them stay.
        let least = *least;
        all.retain(|(_, w)| *w >= least);
    }
    if how.top_p < 1.0 {
        let total: f64 = all.iter().map(|(_, w)| w).sum();
        // Those below this cannot matter: all of them together have less than 1 − p.
        let floor = total * (1.0 - how.top_p) / all.len() as f64;
        all.retain(|(_, w)| *w >= floor);
        all.sort_unstable_by(falling);
        let mut mass = 0.0;
        let enough = all.iter().position(|(_, w)| {
            mass += w;
            mass >= how.top_p * total
        });
        all.truncate(enough.map_or(all.len(), |last| last + 1).max(1));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(how: &Sampling, logits: &[f32], seen: &[u32]) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for i in 0..1000 {
            counts[choose(&mut logits.to_vec(), seen, how, f64::from(i) / 1000.0) as usize] += 1;
        }
        counts
    }

    fn how() -> Sampling {
        Sampling {
            temperature: 1.0,
            ..Sampling::default()
        }
    }

    #[test]
    fn tokens_are_drawn_as_often_as_the_model_says() {
        // Probabilities 0.5, 0.25, 0.15, 0.1.
        let logits = [0.5f32, 0.25, 0.15, 0.1].map(f32::ln);
        let near = |how: &Sampling, seen: &[u32], expected: [usize; 4]| {
            let counts = drawn(how, &logits, seen);
            let off = counts
                .iter()
                .zip(expected)
                .all(|(count, expected)| count.abs_diff(expected) <= 2);
            assert!(off, "{how:?}: {counts:?} for {expected:?}");
        };
        near(&how(), &[], [500, 250, 150, 100]);
        let top_k = Sampling { top_k: 2, ..how() };
        near(&top_k, &[], [667, 333, 0, 0]);
        let top_p = Sampling { top_p: 0.7, ..how() };
        near(&top_p, &[], [667, 333, 0, 0]);
        let least = Sampling { top_p: 0.01, ..how() };
        near(&least, &[], [1000, 0, 0, 0]);
        // Squares: 0.25, 0.0625, 0.0225, 0.01.
        let cold = Sampling {
            temperature: 0.5,
            ..how()
        };
        near(&cold, &[], [725, 181, 65, 29]);
        // ln p is negative: the penalty 2 squares p, for what was seen only.
        let penalised = Sampling {
            repetition_penalty: 2.0,
            ..how()
        };
        near(&penalised, &[0, 0], [333, 333, 200, 133]);
        let greedy = Sampling::default();
        near(&greedy, &[], [1000, 0, 0, 0]);
        near(
            &Sampling {
                repetition_penalty: 3.0,
                ..greedy
            },
            &[0],
            [0, 1000, 0, 0],
        );
    }
}
