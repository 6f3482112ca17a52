//! The evaluation of written text, as PolyWrite's: prompts by language, what a model writes behind them, and how varied, how near
//! its references and how much in the right language that is.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use crate::families::family;
use crate::measurement::{Generated, MadeBy, Request, Sampling};
use crate::statistics::mean;
use crate::text;
use crate::textmetrics::{Cut, bleu, chrf_plus_plus, distinct, in_language, self_bleu};

/// A line of the prompts' file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prompt {
    /// `lll_Ssss`, or the ISO 639-3 code alone.
    pub language: String,
    pub prompt: String,
    /// What it might be answered; none: only variety and language are measured.
    #[serde(default)]
    pub references: Vec<String>,
    #[serde(default)]
    pub id: serde_json::Value,
}

/// Reads prompts, a JSON object a line.
pub fn prompts(file: &Path) -> anyhow::Result<Vec<Prompt>> {
    let read = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let lines = read.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts: Vec<Prompt> = lines
        .map(|(number, line)| {
            serde_json::from_str(line).with_context(|| {
                format!(
                    "{}, line {}: not {{\"language\": …, \"prompt\": …, \"references\": […]}}",
                    file.display(),
                    number + 1
                )
            })
        })
        .collect::<anyhow::Result<_>>()?;
    ensure!(!prompts.is_empty(), "{} holds no prompt", file.display());
    Ok(prompts)
}

/// As requests, named by their line.
pub fn requests(prompts: &[Prompt]) -> Vec<Request> {
    let request = |(number, prompt): (usize, &Prompt)| Request {
        id: if prompt.id.is_null() {
            number.into()
        } else {
            prompt.id.clone()
        },
        prompt: prompt.prompt.clone(),
        max_new_tokens: None,
    };
    prompts.iter().enumerate().map(request).collect()
}

/// One language; a measure is `None` where it cannot be had: variety of one text, likeness without references, a language that
/// the identifier does not know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LanguageWriting {
    pub language: String,
    pub texts: usize,
    /// Tokens a text.
    pub mean_tokens: f64,
    /// Each text against all others of the language.
    pub self_bleu: Option<f64>,
    pub distinct_1: Option<f64>,
    pub distinct_2: Option<f64>,
    pub bleu: Option<f64>,
    pub chrf_plus_plus: Option<f64>,
    pub in_language: Option<f64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WritingResult {
    pub made_by: MadeBy,
    pub sampling: Sampling,
    /// Means over the languages that have the measure.
    pub all: Means,
    pub by_family: BTreeMap<String, Means>,
    pub languages: Vec<LanguageWriting>,
    pub seconds: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Means {
    pub languages: usize,
    pub self_bleu: Option<f64>,
    pub distinct_1: Option<f64>,
    pub distinct_2: Option<f64>,
    pub bleu: Option<f64>,
    pub chrf_plus_plus: Option<f64>,
    pub in_language: Option<f64>,
}

impl Means {
    fn of(languages: &[&LanguageWriting]) -> Means {
        let over = |of: fn(&LanguageWriting) -> Option<f64>| {
            let values: Vec<f64> = languages.iter().filter_map(|language| of(language)).collect();
            (!values.is_empty()).then(|| mean(values.into_iter()))
        };
        Means {
            languages: languages.len(),
            self_bleu: over(|l| l.self_bleu),
            distinct_1: over(|l| l.distinct_1),
            distinct_2: over(|l| l.distinct_2),
            bleu: over(|l| l.bleu),
            chrf_plus_plus: over(|l| l.chrf_plus_plus),
            in_language: over(|l| l.in_language),
        }
    }
}

impl LanguageWriting {
    fn of(language: &str, texts: &[(&Prompt, &Generated)]) -> LanguageWriting {
        let (code, script) = language.split_once('_').unwrap_or((language, ""));
        let cut = Cut::of_script(script);
        let written: Vec<&str> = texts.iter().map(|(_, generated)| generated.text.as_str()).collect();
        let compared: Vec<(&str, Vec<&str>)> = texts
            .iter()
            .filter(|(prompt, _)| !prompt.references.is_empty())
            .map(|(prompt, generated)| {
                (
                    generated.text.as_str(),
                    prompt.references.iter().map(String::as_str).collect(),
                )
            })
            .collect();
        let finite = |value: f64| value.is_finite().then_some(value);
        LanguageWriting {
            language: language.to_owned(),
            texts: texts.len(),
            mean_tokens: mean(texts.iter().map(|(_, generated)| generated.tokens.len() as f64)),
            self_bleu: self_bleu(&written, cut),
            distinct_1: finite(distinct(&written, 1, cut)),
            distinct_2: finite(distinct(&written, 2, cut)),
            bleu: (!compared.is_empty()).then(|| bleu(&compared, cut)),
            chrf_plus_plus: (!compared.is_empty()).then(|| chrf_plus_plus(&compared)),
            in_language: in_language(&written, code),
        }
    }
}

impl WritingResult {
    /// `texts` in the prompts' order.
    pub fn of(
        prompts: &[Prompt],
        texts: &[Generated],
        sampling: Sampling,
        made_by: MadeBy,
        seconds: f64,
    ) -> WritingResult {
        let mut by_language: BTreeMap<&str, Vec<(&Prompt, &Generated)>> = BTreeMap::new();
        for pair in prompts.iter().zip(texts) {
            by_language.entry(&pair.0.language).or_default().push(pair);
        }
        let languages: Vec<LanguageWriting> = by_language
            .iter()
            .map(|(language, texts)| LanguageWriting::of(language, texts))
            .collect();
        let mut families: BTreeMap<String, Vec<&LanguageWriting>> = BTreeMap::new();
        for language in &languages {
            let code = language.language.get(..3).unwrap_or_default();
            families.entry(family(code).to_owned()).or_default().push(language);
        }
        WritingResult {
            made_by,
            sampling,
            all: Means::of(&languages.iter().collect::<Vec<_>>()),
            by_family: families.into_iter().map(|(name, of)| (name, Means::of(&of))).collect(),
            seconds,
            languages,
        }
    }

    pub fn table(&self) -> String {
        let number =
            |value: Option<f64>, factor: f64| value.map_or("–".to_owned(), |value| format!("{:.1}", factor * value));
        let row = |l: &LanguageWriting| {
            vec![
                l.language.clone(),
                text::count(l.texts),
                number(l.self_bleu, 1.0),
                number(l.distinct_2, 100.0),
                number(l.bleu, 1.0),
                number(l.chrf_plus_plus, 1.0),
                number(l.in_language, 100.0),
            ]
        };
        let mut rows: Vec<_> = self.languages.iter().take(20).map(row).collect();
        let (n, all) = (self.languages.len(), &self.all);
        rows.push(vec![
            format!("mean of {}", text::counted(n, "language")),
            String::new(),
            number(all.self_bleu, 1.0),
            number(all.distinct_2, 100.0),
            number(all.bleu, 1.0),
            number(all.chrf_plus_plus, 1.0),
            number(all.in_language, 100.0),
        ]);
        let header = [
            "",
            ">texts",
            ">Self-BLEU",
            ">distinct-2 %",
            ">BLEU",
            ">chrF++",
            ">in language %",
        ];
        text::table(&header, rows)
    }
}
