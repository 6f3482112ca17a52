//! Measures of written text: BLEU and chrF++ as sacreBLEU computes them, Self-BLEU of each text against all others, the share of
//! n-grams that are distinct, and the share of texts in the language that was asked for.
//! Sources: Papineni et al. 2002; Post 2018; Popović 2017; Zhu et al. 2018, "Texygen"; Li et al. 2016.

use std::collections::{HashMap, HashSet};

/// BLEU's orders.
const ORDERS: usize = 4;
const CHARACTER_ORDERS: usize = 6;
const WORD_ORDERS: usize = 2;

/// What chrF is made of: how many orders of words besides those of characters, and β, how often recall counts.
#[derive(Clone, Copy)]
struct Chrf {
    word_orders: usize,
    beta: f64,
}

/// chrF++ (Popović 2017).
const PLUS_PLUS: Chrf = Chrf {
    word_orders: WORD_ORDERS,
    beta: 2.0,
};

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
    PLUS_PLUS.score(texts)
}

impl Chrf {
    fn score(self, texts: &[(&str, Vec<&str>)]) -> f64 {
        let mut sum = ChrfCounts::default();
        for (text, references) in texts {
            let counts = references.iter().map(|reference| chrf_counts(text, reference));
            let mut best: Option<(f64, ChrfCounts)> = None;
            for counts in counts {
                let score = self.of_counts(&counts);
                if best.is_none_or(|(known, _)| score > known) {
                    best = Some((score, counts));
                }
            }
            for (sum, counts) in sum.iter_mut().zip(best.map(|(_, counts)| counts).unwrap_or_default()) {
                sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            }
        }
        self.of_counts(&sum)
    }

    fn of_counts(self, counts: &ChrfCounts) -> f64 {
        let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
        for [of_text, of_reference, shared] in &counts[..CHARACTER_ORDERS + self.word_orders] {
            if *of_text > 0 && *of_reference > 0 {
                precision += *shared as f64 / *of_text as f64;
                recall += *shared as f64 / *of_reference as f64;
                orders += 1.0;
            }
        }
        if precision + recall == 0.0 {
            return 0.0;
        }
        let (precision, recall, weight) = (precision / orders, recall / orders, self.beta * self.beta);
        100.0 * (1.0 + weight) * precision * recall / (weight * precision + recall)
    }
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
        "zho" => "cmn",
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

    /// What sacreBLEU's own tests expect (test_bleu.py, test_sentence_bleu.py, test_chrf.py; Apache 2.0), of what is computed here:
    /// "exp" smoothing, no lower-casing. Of the last sentence they smooth chrF as well; without, sacreBLEU gives what stands here.
    #[test]
    fn scores_are_those_that_sacrebleu_tests_itself_with() {
        fn near(ours: f64, theirs: f64, off: f64) {
            assert!((ours - theirs).abs() < off, "{ours}, not {theirs}");
        }
        let hypotheses = [
            "The dog bit the man.",
            "It wasn't surprising.",
            "The man had just bitten him.",
        ];
        let references = [
            ["The dog bit the man.", "The dog had bit the man."],
            ["It was not unexpected.", "No one was surprised."],
            ["The man bit him first.", "The man had bitten the dog."],
        ];
        let with = |hypotheses: [&'static str; 3]| -> Vec<(&str, Vec<&str>)> {
            let pairs = hypotheses.into_iter().zip(&references);
            pairs.map(|(text, references)| (text, references.to_vec())).collect()
        };
        near(bleu(&with(hypotheses), Cut::V13a), 48.530_827, 1e-6);
        near(bleu(&with([""; 3]), Cut::V13a), 0.0, 1e-9);
        let one = |text, reference, cut| bleu(&[(text, vec![reference])], cut);
        near(one("this is a test", "this is a test", Cut::V13a), 100.0, 1e-9);
        let split = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
        let effective = |text: &[String], reference: &[String]| BleuCounts::of(text, &[reference]).score(true);
        near(effective(&split("test"), &split("a test")), 36.787_944_117, 1e-6);
        near(effective(&split("a test"), &split("a test")), 100.0, 1e-9);
        let (text, reference) = (
            "Producția de zahăr primă va fi exprimată în ceea ce privește zahărul alb;",
            "producţia de zahăr brut se exprimă în zahăr alb;",
        );
        let sentence = |cut: Cut| effective(&cut.tokens(text), &cut.tokens(reference));
        near(sentence(Cut::V13a), 8.493, 1e-3);
        near(effective(&split(text), &split(reference)), 7.347, 1e-3);
        // Its `char` keeps spaces out of the count of tokens too.
        near(sentence(Cut::Characters), 40.8759, 1e-3);
        let zero = Cut::V13a.tokens("this is a cat");
        near(effective(&zero, &Cut::V13a.tokens("okay thanks")), 0.0, 1e-9);
        let counted = BleuCounts::of(
            &split("am I am a character sequence"),
            &[&split("I am a symbol string sequence a a")],
        );
        assert_eq!((counted.right, counted.all), ([4, 2, 1, 0], [6, 5, 4, 3]));
        let counts = |right, all, length| BleuCounts {
            right,
            all,
            length,
            reference_length: length,
        };
        near(
            counts([9, 7, 5, 3], [10, 8, 6, 4], 11).score(false),
            83.759_223_97,
            1e-6,
        );
        near(counts([0; 4], [4, 4, 2, 1], 1).score(false), 0.0, 1e-9);

        let of_characters = |beta| Chrf { word_orders: 0, beta };
        let corpus = [
            ("a", "a", 100.0),
            ("", "reference", 0.0),
            ("", "c", 0.0),
            ("a b c", "a b c", 100.0),
            ("a b c", "abc", 100.0),
            ("aa", "ab", 25.0),
            ("abcdefg", "hijklmnop", 0.0),
            (
                " risk assessment must be made of those who are qualified and expertise in the \
                 sector - these are the scientists .",
                "risk assessment has to be undertaken by those who are qualified and expert in that \
                 area - that is the scientists .",
                63.361_730,
            ),
            (
                " Die    Beziehung zwischen  Obama und Netanjahu ist nicht gerade  freundlich. ",
                "Das Verhältnis zwischen Obama und Netanyahu ist nicht gerade freundschaftlich.",
                64.130_269_8,
            ),
        ];
        for (text, reference, expected) in corpus {
            near(of_characters(3.0).score(&[(text, vec![reference])]), expected, 1e-4);
        }
        near(
            of_characters(3.0).score(&[("a", vec!["a"]), ("b", vec!["c"])]),
            50.0,
            1e-4,
        );
        let sentences = [
            (
                "Co nás nejvíc trápí, protože lékaři si vybírají, kdo bude žít a kdo zemře.",
                "Nejvíce smutní jsme z toho, že musíme rozhodovat o tom, kdo bude žít a kdo zemře.",
                39.140_785_09,
            ),
            (
                "Nebo prostě nemají vybavení, které by jim pomohlo, uvedli lékaři.",
                "A někdy nemáme ani potřebný materiál, abychom jim pomohli, popsali lékaři.",
                31.225_570_79,
            ),
            (
                "Lapali po dechu, jejich životy skončily dřív, než skutečně začaly.",
                "Lapali po dechu a pak jejich život skončil - dřív, než skutečně mohl začít, připomněli.",
                57.157_427_51,
            ),
        ];
        for (text, reference, expected) in sentences {
            near(of_characters(2.0).score(&[(text, vec![reference])]), expected, 1e-4);
        }
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
