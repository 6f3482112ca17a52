//! Results of `panglot eval`, two of them compared language by language, and what a vocabulary costs before any step.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{files, text};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Evaluation {
    /// The folder that was measured.
    pub model: String,
    pub precision: String,
    pub languages: Vec<LanguageResult>,
    /// Mean over languages, each counting once.
    pub macro_bits_per_byte: f64,
    pub macro_nats_per_document: f64,
    pub tokens: u64,
    pub seconds: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LanguageResult {
    pub language: String,
    pub documents: u64,
    pub bytes: u64,
    pub characters: u64,
    /// Targets that were scored.
    pub tokens: u64,
    /// Summed negative log-likelihood.
    pub nats: f64,
    pub bits_per_byte: f64,
}

/// The base and, on the same text, the extended model that no step has trained: once for each start of its new rows, by
/// whose name it goes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DayZero {
    pub base: Evaluation,
    pub extended: Vec<Evaluation>,
}

/// One language before and after, in bits per byte: independent of the tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    pub language: String,
    pub before: f64,
    pub after: f64,
}

impl Change {
    pub fn delta(&self) -> f64 {
        self.after - self.before
    }

    pub fn improved(&self) -> bool {
        self.after < self.before
    }
}

/// Two evaluations over the languages that both have.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// From the greatest gain to the greatest loss.
    pub changes: Vec<Change>,
    pub before: f64,
    pub after: f64,
}

impl Evaluation {
    pub fn read(file: &Path) -> anyhow::Result<Evaluation> {
        files::read_json(file)
    }

    /// Best, median and worst languages and the mean.
    pub fn table(&self) -> String {
        let mut languages: Vec<_> = self.languages.iter().collect();
        languages.sort_by(|a, b| a.bits_per_byte.total_cmp(&b.bits_per_byte));
        let row = |place: &str, result: &LanguageResult| {
            vec![
                place.to_owned(),
                result.language.clone(),
                text::count(result.documents),
                text::count(result.bytes),
                text::count(result.tokens),
                format!("{:.3}", result.bits_per_byte),
            ]
        };
        let mut rows = Vec::new();
        let n = languages.len();
        rows.extend(languages.iter().take(3).map(|result| row("best", result)));
        if n > 6 {
            rows.push(row("median", languages[n / 2]));
        }
        rows.extend(
            languages
                .iter()
                .skip(3.max(n.saturating_sub(3)))
                .map(|result| row("worst", result)),
        );
        let mean = format!("{:.3}", self.macro_bits_per_byte);
        rows.push(vec![
            "mean".to_owned(),
            text::counted(n, "language"),
            String::new(),
            String::new(),
            text::count(self.tokens),
            mean,
        ]);
        text::table(
            &["", "language", ">documents", ">bytes", ">tokens", ">bits per byte"],
            rows,
        )
    }
}

impl DayZero {
    /// Means over languages, each counting once.
    pub fn table(&self) -> String {
        let base = self.base.macro_bits_per_byte;
        let row = |name: String, measured: &Evaluation, change: String| {
            let bits = measured.macro_bits_per_byte;
            let nats = bits * std::f64::consts::LN_2;
            vec![
                name,
                format!("{nats:.3}"),
                format!("{bits:.3}"),
                change,
                text::count(measured.tokens),
            ]
        };
        let mut rows = vec![row("the base, its own pieces".to_owned(), &self.base, String::new())];
        rows.extend(self.extended.iter().map(|measured| {
            let change = text::change(base, measured.macro_bits_per_byte);
            row(format!("extended, new_rows: {}", measured.model), measured, change)
        }));
        let header = [
            "before any step",
            ">nats per byte",
            ">bits per byte",
            ">change",
            ">tokens",
        ];
        let languages = text::counted(self.base.languages.len(), "language");
        let bytes: u64 = self.base.languages.iter().map(|language| language.bytes).sum();
        format!(
            "{}\nMean over {languages}, {} of held-out text",
            text::table(&header, rows),
            text::bytes(bytes)
        )
    }
}

impl Comparison {
    /// `None` where no language is in both.
    pub fn of(before: &Evaluation, after: &Evaluation) -> Option<Comparison> {
        let then: BTreeMap<_, _> = before
            .languages
            .iter()
            .map(|result| (&result.language, result))
            .collect();
        let mut changes: Vec<_> = (after.languages.iter())
            .filter_map(|now| {
                let before = then.get(&now.language)?.bits_per_byte;
                Some(Change {
                    language: now.language.clone(),
                    before,
                    after: now.bits_per_byte,
                })
            })
            .collect();
        changes.sort_by(|a, b| a.delta().total_cmp(&b.delta()));
        let mean = |of: fn(&Change) -> f64| changes.iter().map(of).sum::<f64>() / changes.len() as f64;
        let (before, after) = (mean(|change| change.before), mean(|change| change.after));
        (!changes.is_empty()).then_some(Comparison { changes, before, after })
    }

    pub fn improved(&self) -> usize {
        self.changes.iter().filter(|change| change.improved()).count()
    }

    pub fn median(&self) -> &Change {
        &self.changes[self.changes.len() / 2]
    }

    /// Greatest gains, median, least gains, mean.
    pub fn table(&self) -> String {
        let numbers = |before: f64, after: f64| {
            [
                format!("{before:.3}"),
                format!("{after:.3}"),
                format!("{:+.3}", after - before),
                text::change(before, after),
            ]
        };
        let row = |place: &str, language: String, before, after| {
            [place.to_owned(), language]
                .into_iter()
                .chain(numbers(before, after))
                .collect::<Vec<_>>()
        };
        let of = |place, change: &Change| row(place, change.language.clone(), change.before, change.after);
        let n = self.changes.len();
        let mut rows: Vec<_> = self.changes.iter().take(4).map(|change| of("best", change)).collect();
        if n > 8 {
            rows.push(of("median", self.median()));
        }
        rows.extend(
            self.changes
                .iter()
                .skip(4.max(n.saturating_sub(4)))
                .map(|change| of("worst", change)),
        );
        rows.push(row("mean", text::counted(n, "language"), self.before, self.after));
        text::table(
            &["", "language", ">before", ">after", ">bits per byte", ">change"],
            rows,
        )
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn evaluation(bits_per_byte: &[(&str, f64)]) -> Evaluation {
        let languages: Vec<_> = bits_per_byte
            .iter()
            .map(|&(language, bits_per_byte)| LanguageResult {
                language: language.to_owned(),
                documents: 3,
                bytes: 1000,
                characters: 900,
                tokens: 300,
                nats: bits_per_byte * 1000.0 * std::f64::consts::LN_2,
                bits_per_byte,
            })
            .collect();
        Evaluation {
            model: "base".to_owned(),
            precision: "f32".to_owned(),
            macro_bits_per_byte: bits_per_byte.iter().map(|(_, b)| b).sum::<f64>() / bits_per_byte.len() as f64,
            macro_nats_per_document: 1.0,
            tokens: 300 * bits_per_byte.len() as u64,
            seconds: 1.0,
            languages,
        }
    }

    #[test]
    fn languages_are_compared_by_name_and_sorted_by_gain() {
        let before = evaluation(&[("eng_Latn", 1.0), ("yor_Latn", 4.0), ("gone_Latn", 9.0)]);
        let after = evaluation(&[("yor_Latn", 3.0), ("eng_Latn", 1.5), ("new_Latn", 9.0)]);
        let comparison = Comparison::of(&before, &after).unwrap();
        assert_eq!(
            comparison
                .changes
                .iter()
                .map(|c| c.language.as_str())
                .collect::<Vec<_>>(),
            ["yor_Latn", "eng_Latn"]
        );
        assert_eq!(
            (comparison.before, comparison.after, comparison.improved()),
            (2.5, 2.25, 1)
        );
        assert!(comparison.table().contains("-25.0 %"), "{}", comparison.table());
        assert!(Comparison::of(&before, &evaluation(&[("new_Latn", 1.0)])).is_none());
    }
}
