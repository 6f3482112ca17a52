//! Measures of written text: BLEU and chrF++ as sacreBLEU computes them, Self-BLEU of each text against all others, the share of
//! n-grams that are distinct, and the share of texts in the language that was asked for.
//! Sources: Papineni et al. 2002; Post 2018; Popović 2017; Zhu et al. 2018, "Texygen"; Li et al. 2016.

use std::collections::{HashMap, HashSet};

/// BLEU's orders.
const ORDERS: usize = 4;
const CHARACTER_ORDERS: usize = 6;
const WORD_ORDERS: usize = 2;
/// chrF's β: recall counts twice.
const BETA: f64 = 2.0;

/// How BLEU cuts text: by the rules of mteval-v13a, or into characters where a script sets no spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    V13a,
    Characters,
}

impl Cut {
    /// Characters where words are not spaced.
    pub fn of_script(script: &str) -> Cut {
        let unspaced = [
            "Hans", "Hant", "Hani", "Jpan", "Hira", "Kana", "Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Yiii", "Lana",
            "Talu", "Java", "Bali",
        ];
        if unspaced.contains(&script) {
            Cut::Characters
        } else {
            Cut::V13a
        }
    }

    pub fn tokens(self, text: &str) -> Vec<String> {
        match self {
            Cut::V13a => v13a(text.trim_end()),
            Cut::Characters => text.chars().filter(|c| !c.is_whitespace()).map(String::from).collect(),
        }
    }
}

/// The rules: entities are resolved, symbols stand alone, a period or comma does unless digits are on both sides, and a dash
/// behind a digit.
fn v13a(text: &str) -> Vec<String> {
    let text = text.replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    let text = text
        .replace("&quot;", "\"")
        .replace("&amp;", "&")
        .replace("&lt;", "<")
        .replace("&gt;", ">");
    let is_symbol = |c: char| matches!(c, '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/');
    let mut spaced = String::from(" ");
    for c in text.chars() {
        if is_symbol(c) {
            spaced.extend([' ', c, ' ']);
        } else {
            spaced.push(c);
        }
    }
    spaced.push(' ');
    let (digit, point) = (|c: char| c.is_ascii_digit(), |c: char| c == '.' || c == ',');
    let spaced = pairs(&spaced, |c| !digit(c), point, |a, b| [a, ' ', b, ' ']);
    let spaced = pairs(&spaced, point, |c| !digit(c), |a, b| [' ', a, ' ', b]);
    let spaced = pairs(&spaced, digit, |c| c == '-', |a, b| [a, ' ', b, ' ']);
    spaced.split_whitespace().map(str::to_owned).collect()
}

/// Replaces pairs of characters from left to right; a character is in one pair at most.
fn pairs(
    text: &str,
    first: impl Fn(char) -> bool,
    second: impl Fn(char) -> bool,
    to: impl Fn(char, char) -> [char; 4],
) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    let mut rest = text.chars().peekable();
    while let Some(a) = rest.next() {
        match rest.next_if(|b| first(a) && second(*b)) {
            Some(b) => out.extend(to(a, b)),
            None => out.push(a),
        }
    }
    out
}

type Counts<'a, T> = HashMap<&'a [T], usize>;

fn n_grams<T: std::hash::Hash + Eq>(tokens: &[T], order: usize) -> Counts<'_, T> {
    let mut counts = HashMap::new();
    for n_gram in tokens.windows(order) {
        *counts.entry(n_gram).or_insert(0) += 1;
    }
    counts
}

/// What BLEU adds up over sentences.
#[derive(Clone, Debug, Default)]
struct BleuCounts {
    right: [usize; ORDERS],
    all: [usize; ORDERS],
    length: usize,
    reference_length: usize,
}

impl BleuCounts {
    fn of(tokens: &[String], references: &[&[String]]) -> BleuCounts {
        let closest = references
            .iter()
            .map(|reference| reference.len())
            .min_by_key(|n| (n.abs_diff(tokens.len()), *n));
        let mut counts = BleuCounts {
            length: tokens.len(),
            reference_length: closest.unwrap_or(0),
            ..BleuCounts::default()
        };
        for order in 1..=ORDERS {
            let mut most: Counts<String> = HashMap::new();
            for reference in references {
                for (n_gram, count) in n_grams(reference, order) {
                    let most = most.entry(n_gram).or_insert(0);
                    *most = count.max(*most);
                }
            }
            for (n_gram, count) in n_grams(tokens, order) {
                counts.all[order - 1] += count;
                counts.right[order - 1] += count.min(most.get(n_gram).copied().unwrap_or(0));
            }
        }
        counts
    }

    fn add(&mut self, other: &BleuCounts) {
        for order in 0..ORDERS {
            self.right[order] += other.right[order];
            self.all[order] += other.all[order];
        }
        self.length += other.length;
        self.reference_length += other.reference_length;
    }

    /// 0 … 100, smoothed where an order has no match ("exp"). `effective`: orders that the text is too short for do not
    /// count, as sacreBLEU has it for single sentences.
    fn score(&self, effective: bool) -> f64 {
        if self.right.iter().all(|right| *right == 0) {
            return 0.0;
        }
        let mut logs = 0.0;
        let mut orders = 0;
        let mut halved = 1.0;
        for order in 0..ORDERS {
            if self.all[order] == 0 {
                break;
            }
            orders = order + 1;
            let all = self.all[order] as f64;
            logs += match self.right[order] {
                0 => {
                    halved *= 2.0;
                    100.0 / (halved * all)
                }
                right => 100.0 * right as f64 / all,
            }
            .ln();
        }
        if !effective && orders < ORDERS {
            return 0.0;
        }
        let (length, reference) = (self.length as f64, self.reference_length as f64);
        let brevity = if length < reference {
            (1.0 - reference / length).exp()
        } else {
            1.0
        };
        brevity * (logs / orders as f64).exp()
    }
}

/// Of a corpus, 0 … 100: each text with its references.
pub fn bleu(texts: &[(&str, Vec<&str>)], cut: Cut) -> f64 {
    let mut sum = BleuCounts::default();
    for (text, references) in texts {
        let references: Vec<Vec<String>> = references.iter().map(|reference| cut.tokens(reference)).collect();
        let references: Vec<&[String]> = references.iter().map(Vec::as_slice).collect();
        sum.add(&BleuCounts::of(&cut.tokens(text), &references));
    }
    sum.score(false)
}

/// How alike texts are, 0 … 100: the mean over texts of a text's BLEU with all the others as its references. `None` of fewer
/// than two.
pub fn self_bleu(texts: &[&str], cut: Cut) -> Option<f64> {
    if texts.len() < 2 {
        return None;
    }
    let tokens: Vec<Vec<String>> = texts.iter().map(|text| cut.tokens(text)).collect();
    let score = |i: usize| {
        let others: Vec<&[String]> = (0..tokens.len())
            .filter(|j| *j != i)
            .map(|j| tokens[j].as_slice())
            .collect();
        BleuCounts::of(&tokens[i], &others).score(true)
    };
    Some((0..tokens.len()).map(score).sum::<f64>() / tokens.len() as f64)
}

/// Distinct n-grams of all texts by their number; NaN where there is none.
pub fn distinct(texts: &[&str], order: usize, cut: Cut) -> f64 {
    let tokens: Vec<Vec<String>> = texts.iter().map(|text| cut.tokens(text)).collect();
    let all: Vec<&[String]> = tokens.iter().flat_map(|tokens| tokens.windows(order)).collect();
    all.iter().collect::<HashSet<_>>().len() as f64 / all.len() as f64
}

/// For every order of characters, then of words: n-grams of the text, of the reference, and in both.
type ChrfCounts = [[usize; 3]; CHARACTER_ORDERS + WORD_ORDERS];

/// chrF++ of a corpus, 0 … 100: each text with its references, of which the best counts.
pub fn chrf_plus_plus(texts: &[(&str, Vec<&str>)]) -> f64 {
    let mut sum = ChrfCounts::default();
    for (text, references) in texts {
        let counts = references.iter().map(|reference| chrf_counts(text, reference));
        let mut best: Option<(f64, ChrfCounts)> = None;
        for counts in counts {
            let score = chrf_score(&counts);
            if best.is_none_or(|(known, _)| score > known) {
                best = Some((score, counts));
            }
        }
        for (sum, counts) in sum.iter_mut().zip(best.map(|(_, counts)| counts).unwrap_or_default()) {
            sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
    }
    chrf_score(&sum)
}

fn chrf_counts(text: &str, reference: &str) -> ChrfCounts {
    fn both<T: std::hash::Hash + Eq>(text: &[T], reference: &[T], order: usize) -> [usize; 3] {
        let (text, reference) = (n_grams(text, order), n_grams(reference, order));
        let shared = text
            .iter()
            .map(|(n_gram, count)| count.min(reference.get(n_gram).unwrap_or(&0)));
        let of_text = if reference.is_empty() { 0 } else { text.values().sum() };
        [of_text, reference.values().sum(), shared.sum()]
    }
    let characters = |text: &str| -> Vec<char> { text.chars().filter(|c| !c.is_whitespace()).collect() };
    let (text_chars, reference_chars) = (characters(text), characters(reference));
    let (text_words, reference_words) = (chrf_words(text), chrf_words(reference));
    std::array::from_fn(|order| match order {
        0..CHARACTER_ORDERS => both(&text_chars, &reference_chars, order + 1),
        _ => both(&text_words, &reference_words, order + 1 - CHARACTER_ORDERS),
    })
}

/// Words, of which one sign of punctuation at the end, or else at the beginning, is a word of its own.
fn chrf_words(text: &str) -> Vec<&str> {
    let punctuation = |c: char| c.is_ascii_punctuation();
    let cut = |word: &str| -> usize {
        let (first, last) = (word.chars().next(), word.chars().next_back());
        match (first, last) {
            _ if word.chars().nth(1).is_none() => 0,
            (_, Some(last)) if punctuation(last) => word.len() - last.len_utf8(),
            (Some(first), _) if punctuation(first) => first.len_utf8(),
            _ => 0,
        }
    };
    let parts = text.split_whitespace().flat_map(|word| {
        let (a, b) = word.split_at(cut(word));
        [a, b]
    });
    parts.filter(|part| !part.is_empty()).collect()
}

fn chrf_score(counts: &ChrfCounts) -> f64 {
    let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
    for [of_text, of_reference, shared] in counts {
        if *of_text > 0 && *of_reference > 0 {
            precision += *shared as f64 / *of_text as f64;
            recall += *shared as f64 / *of_reference as f64;
            orders += 1.0;
        }
    }
    if precision + recall == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (precision / orders, recall / orders);
    100.0 * (1.0 + BETA * BETA) * precision * recall / (BETA * BETA * precision + recall)
}

/// Texts whose language is the one of this ISO 639-3 code, by their number; `None` where the identifier does not know it.
pub fn in_language(texts: &[&str], code: &str) -> Option<f64> {
    let known = identified_as(code);
    let language = whatlang::Lang::from_code(known)?;
    let right = texts
        .iter()
        .filter(|text| whatlang::detect_lang(text) == Some(language))
        .count();
    (!texts.is_empty()).then(|| right as f64 / texts.len() as f64)
}

/// The identifier's name of a language: it knows some by their macrolanguage.
fn identified_as(code: &str) -> &str {
    match code {
        "arb" => "ara",
        "azj" => "aze",
        "ekk" => "est",
        "fil" => "tgl",
        "lvs" => "lav",
        "npi" => "nep",
        "ory" => "ori",
        "twi" => "aka",
        "uzn" => "uzb",
        "ydd" => "yid",
        known => known,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_by_the_rules() {
        let cut = |text: &str| Cut::V13a.tokens(text).join(" ");
        assert_eq!(
            cut("It cost $1,000.50, didn't it? (Yes.)"),
            "It cost $ 1,000.50 , didn't it ? ( Yes . )"
        );
        assert_eq!(
            cut("1990-2000 well-known &quot;x&quot; a/b"),
            "1990 - 2000 well-known \" x \" a / b"
        );
        assert_eq!(Cut::Characters.tokens("你 好"), ["你", "好"]);
    }

    #[test]
    fn self_bleu_compares_with_all_others() {
        let same = ["one two three four five"; 3];
        assert!((self_bleu(&same, Cut::V13a).unwrap() - 100.0).abs() < 1e-9);
        // Each has nothing of its next neighbour, but all of the one after: a comparison with one other text would say 0.
        let pairs = ["a b c d e", "v w x y z", "a b c d e", "v w x y z"];
        assert!((self_bleu(&pairs, Cut::V13a).unwrap() - 100.0).abs() < 1e-9);
        assert_eq!(self_bleu(&["a b c d", "e f g h"], Cut::V13a), Some(0.0));
        assert_eq!(self_bleu(&["alone"], Cut::V13a), None);
        assert_eq!(distinct(&["a b a b", "a b"], 1, Cut::V13a), 2.0 / 6.0);
        assert_eq!(distinct(&["a b a b", "a b"], 2, Cut::V13a), 2.0 / 4.0);
    }

    #[test]
    fn languages_are_told_apart_where_they_are_known() {
        let texts = [
            "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
            "All human beings are born free and equal in dignity and rights.",
        ];
        assert_eq!(in_language(&texts, "deu"), Some(0.5));
        assert_eq!(
            in_language(
                &["Усі люди народжуються вільними і рівними у своїй гідності та правах."],
                "ukr"
            ),
            Some(1.0)
        );
        assert_eq!(in_language(&texts, "quy"), None);
    }
}
