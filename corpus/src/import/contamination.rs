//! Finds training documents that share an n-gram with an evaluation text: 13 words (Brown et al. 2020, appendix C), or 50
//! characters where a script sets no spaces. What matched is kept as evidence.
//!
//! Evaluation texts shorter than that are looked for whole, down to 8 words or 30 characters; shorter ones would match by
//! chance and are only counted. The index costs 25 bytes a unit of evaluation text.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::import::lines::{Lines, Packing};
use crate::import::units::{Unit, for_each_unit, has_unspaced, unit_hashes};
use crate::splitmix::mix;
use crate::{Error, EvaluationsEntry, Language, Result};

/// Lengths of the n-grams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NGrams {
    pub n_words: usize,
    /// Where a script sets no spaces.
    pub n_characters: usize,
}

impl Default for NGrams {
    fn default() -> NGrams {
        NGrams {
            n_words: 13,
            n_characters: 50,
        }
    }
}

impl NGrams {
    /// The length, and the least length of a text that is looked for whole.
    fn lengths(self, unit: Unit) -> (usize, usize) {
        let n = match unit {
            Unit::Word => self.n_words,
            Unit::Character => self.n_characters,
        };
        (n, (3 * n).div_ceil(5))
    }
}

/// Evidence: a stretch of a document that stands in an evaluation text too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Match {
    /// File and line.
    pub evaluation: String,
    /// As compared: lower case, without punctuation.
    pub ngram: String,
}

/// A document's evidence ends here: one is enough to drop it.
const MOST_MATCHES: usize = 8;

/// The n-grams of all evaluation texts.
pub(crate) struct Evaluations {
    n_grams: NGrams,
    files: Vec<PathBuf>,
    /// File and line of each text.
    places: Vec<(u32, u32)>,
    words: Index,
    characters: Index,
    /// Texts below the least length.
    n_too_short: u64,
}

impl Evaluations {
    /// Reads evaluation files, all of every one: each line of `.txt`, each column of `.tsv`, each string anywhere in an
    /// object of `.jsonl` is a text; also with `.gz` and `.zst`.
    pub fn read(files: &[PathBuf], n_grams: NGrams) -> Result<Evaluations> {
        for (setting, value) in [("words", n_grams.n_words), ("characters", n_grams.n_characters)] {
            if value < 5 {
                return Err(Error::HygieneSetting {
                    setting: "contamination.n_grams",
                    value: format!("{value} {setting}"),
                    rule: "so few stand in common by chance; try 13 words and 50 characters",
                });
            }
        }
        let mut all = Evaluations {
            n_grams,
            files: files.to_vec(),
            places: Vec::new(),
            words: Index::default(),
            characters: Index::default(),
            n_too_short: 0,
        };
        for (file, path) in files.iter().enumerate() {
            for_each_text(path, &mut |line, text| all.add(file as u32, line as u32, text))?;
        }
        all.words.sort();
        all.characters.sort();
        Ok(all)
    }

    /// What a text shares with evaluation texts; empty for a clean one.
    pub fn matches(&self, language: &Language, text: &str) -> Vec<Match> {
        let unit = Unit::of(language);
        let (n, shortest) = self.n_grams.lengths(unit);
        let index = match unit {
            Unit::Word => &self.words,
            Unit::Character => &self.characters,
        };
        let sums = Sums::new(&unit_hashes(text, unit));
        let mut found: Vec<(usize, &Gram)> = Vec::new();
        let n_starts = (sums.len() + 1).saturating_sub(shortest);
        for start in 0..n_starts {
            let head = sums.gram(start, shortest);
            for gram in index.starting_with(head) {
                let length = gram.length as usize;
                let is_here = start + length <= sums.len() && sums.gram(start, length) == gram.whole;
                if is_here && found.iter().all(|(_, known)| known.place != gram.place) {
                    found.push((start, gram));
                }
            }
            if found.len() >= MOST_MATCHES {
                break;
            }
        }
        if found.is_empty() {
            return Vec::new();
        }
        debug_assert!(found.iter().all(|(_, gram)| gram.length as usize <= n));
        let mut units = Vec::new();
        for_each_unit(text, unit, &mut |unit| units.push(unit.to_owned()));
        let evidence = |(start, gram): (usize, &Gram)| {
            let (file, line) = self.places[gram.place as usize];
            let between = if unit == Unit::Word { " " } else { "" };
            Match {
                evaluation: format!("{}:{line}", self.files[file as usize].display()),
                ngram: units[start..start + gram.length as usize].join(between),
            }
        };
        found.into_iter().map(evidence).collect()
    }

    /// What it holds in memory.
    pub fn bytes(&self) -> usize {
        let index = |index: &Index| size_of_val(&index.grams[..]) + size_of_val(&index.begins[..]);
        index(&self.words) + index(&self.characters) + size_of_val(&self.places[..])
    }

    /// For the manifest.
    pub fn entry(&self) -> EvaluationsEntry {
        EvaluationsEntry {
            files: self.files.clone(),
            n_grams: self.n_grams,
            texts: self.places.len() as u64,
            too_short: self.n_too_short,
        }
    }

    fn add(&mut self, file: u32, line: u32, text: &str) {
        let place = self.places.len() as u32;
        let by_word = self.words.add(text, Unit::Word, self.n_grams, place);
        // A text's language is not known here: one that mixes scripts is looked for in both ways.
        let by_character = has_unspaced(text) && self.characters.add(text, Unit::Character, self.n_grams, place);
        if by_word || by_character {
            self.places.push((file, line));
        } else {
            self.n_too_short += 1;
        }
    }
}

/// One n-gram of an evaluation text.
#[derive(Clone, Copy)]
struct Gram {
    /// Hash of its first units, as many as the shortest text has that is looked for.
    head: u64,
    whole: u64,
    length: u32,
    place: u32,
}

/// N-grams sorted by head, and a directory of where the heads with the same first bits begin.
#[derive(Default)]
struct Index {
    grams: Vec<Gram>,
    begins: Vec<u32>,
    /// Of a head, to get its entry in the directory.
    shift: u32,
}

impl Index {
    /// Whether the text is long enough to be looked for.
    fn add(&mut self, text: &str, unit: Unit, n_grams: NGrams, place: u32) -> bool {
        let (n, shortest) = n_grams.lengths(unit);
        let sums = Sums::new(&unit_hashes(text, unit));
        if sums.len() < shortest {
            return false;
        }
        let length = n.min(sums.len());
        self.grams.extend((0..=sums.len() - length).map(|start| Gram {
            head: sums.gram(start, shortest),
            whole: sums.gram(start, length),
            length: length as u32,
            place,
        }));
        true
    }

    fn sort(&mut self) {
        self.grams
            .sort_unstable_by_key(|gram| (gram.head, gram.whole, gram.place));
        self.grams.dedup_by_key(|gram| (gram.head, gram.whole));
        self.grams.shrink_to_fit();
        // Four n-grams an entry.
        let bits = (self.grams.len() / 4).max(2).ilog2().max(1);
        self.shift = 64 - bits;
        let begin = |entry: u64| self.grams.partition_point(|gram| gram.head >> self.shift < entry) as u32;
        self.begins = (0..=1 << bits).map(begin).collect();
    }

    fn starting_with(&self, head: u64) -> impl Iterator<Item = &Gram> {
        let entry = (head >> self.shift) as usize;
        let near = &self.grams[self.begins[entry] as usize..self.begins[entry + 1] as usize];
        near.iter().filter(move |gram| gram.head == head)
    }
}

/// Hash of any stretch of units in constant time: a polynomial in a random odd base over 2^64, from prefix sums.
struct Sums {
    /// Σ units[i] · base^(n-1-i) of the first n units.
    sums: Vec<u64>,
    powers: Vec<u64>,
}

impl Sums {
    const BASE: u64 = 0x9e37_79b9_7f4a_7c15;

    fn new(units: &[u64]) -> Sums {
        let (mut sums, mut powers) = (vec![0u64], vec![1u64]);
        for unit in units {
            sums.push(sums[sums.len() - 1].wrapping_mul(Self::BASE).wrapping_add(*unit));
            powers.push(powers[powers.len() - 1].wrapping_mul(Self::BASE));
        }
        Sums { sums, powers }
    }

    /// Number of units.
    fn len(&self) -> usize {
        self.sums.len() - 1
    }

    fn gram(&self, start: usize, length: usize) -> u64 {
        let before = self.sums[start].wrapping_mul(self.powers[length]);
        mix(self.sums[start + length].wrapping_sub(before))
    }
}

/// Every text of an evaluation file with its line. A place that cannot be read ends it: nothing may go unchecked.
fn for_each_text(path: &Path, each: &mut dyn FnMut(usize, &str)) -> Result<()> {
    let (_, name) = Packing::of(path);
    let mut lines = Lines::open(path)?;
    while let Some(line) = lines.next_line()? {
        let text = line.text?;
        match name.extension().and_then(|ending| ending.to_str()) {
            Some("jsonl" | "json" | "ndjson") if !text.trim().is_empty() => {
                let value = serde_json::from_str(text).map_err(|e| Error::BadJsonLine {
                    path: path.to_path_buf(),
                    line: line.number,
                    reason: e.to_string(),
                    expected: "the texts to be looked for".to_owned(),
                })?;
                for_each_string(&value, &mut |text| each(line.number, text));
            }
            Some("tsv") => text.split('\t').for_each(|text| each(line.number, text)),
            _ => each(line.number, text),
        }
    }
    Ok(())
}

fn for_each_string(value: &serde_json::Value, each: &mut dyn FnMut(&str)) {
    match value {
        serde_json::Value::String(text) => each(text),
        serde_json::Value::Array(values) => values.iter().for_each(|value| for_each_string(value, each)),
        serde_json::Value::Object(fields) => fields.values().for_each(|value| for_each_string(value, each)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const ARTICLE: &str = "No one shall be held in slavery or servitude; slavery and the slave trade shall be prohibited in all their forms.";

    fn matches(evaluations: &Evaluations, language: &str, text: &str) -> Vec<Match> {
        evaluations.matches(&language.parse().unwrap(), text)
    }

    #[test]
    fn memory_is_what_the_settings_say_it_is() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("a.txt");
        let n_words = 40_000;
        let words: Vec<String> = (0..n_words).map(|i| format!("word{i}")).collect();
        let lines: Vec<String> = words.chunks(2000).map(|line| line.join(" ")).collect();
        fs::write(&file, lines.join("\n")).unwrap();
        let all = Evaluations::read(&[file], NGrams::default()).unwrap();
        let bytes_a_word = all.bytes() as f64 / f64::from(n_words);
        assert!((24.0..26.0).contains(&bytes_a_word), "{bytes_a_word}");
    }

    #[test]
    fn a_shared_stretch_is_found_in_another_dress_and_shown() {
        let temp = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            fs::write(temp.path().join(name), text).unwrap();
            temp.path().join(name)
        };
        let chinese =
            "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。人人有资格享受";
        let files = [
            file("a.txt", &format!("short line\n\n{ARTICLE}\n")),
            file(
                "b.jsonl",
                &format!("{{\"id\": 1}}\n{{\"x\": [{{\"q\": {chinese:?}}}], \"y\": \"brown\"}}\n"),
            ),
            file("c.tsv", "12\tOnly nine words are in this short little line\tx\n"),
        ];
        let all = Evaluations::read(&files, NGrams::default()).unwrap();
        assert_eq!(all.n_too_short, 5);

        let found = matches(
            &all,
            "eng_Latn",
            "They said: “NO ONE shall be held in slavery, or servitude. Slavery and the slave-trade!” and more",
        );
        assert_eq!(found.len(), 1);
        assert!(found[0].evaluation.ends_with("a.txt:3"), "{found:?}");
        assert_eq!(
            found[0].ngram,
            "no one shall be held in slavery or servitude slavery and the slave"
        );

        // Twelve words in common are not thirteen.
        let almost = "one shall be held in slavery or servitude slavery and the slave";
        assert_eq!(matches(&all, "eng_Latn", &format!("x {almost} x")), []);
        // A short text is found whole only.
        let short = matches(
            &all,
            "eng_Latn",
            "yes only nine words are in this short little line indeed",
        );
        assert_eq!(short[0].ngram, "only nine words are in this short little line");
        assert_eq!(
            matches(&all, "eng_Latn", "nine words are in this short little line"),
            []
        );

        let copy: String = format!("他说{}吧", chinese.replace(',', "、"));
        let found = matches(&all, "cmn_Hans", &copy);
        assert!(found[0].evaluation.ends_with("b.jsonl:2"), "{found:?}");
        let compared: String = chinese.chars().filter(|c| c.is_alphabetic()).collect();
        assert_eq!(found[0].ngram, compared, "46 characters, so looked for whole");
        let half: String = chinese.chars().skip(20).collect();
        assert_eq!(matches(&all, "cmn_Hans", &half), []);
    }

    #[test]
    fn a_found_stretch_is_one_that_plain_search_finds() {
        // Random texts over few words, so that stretches of six in common are frequent.
        let text =
            |seed: u64, n: u64| -> Vec<String> { (0..n).map(|i| format!("w{}", mix(seed * 1000 + i) % 3)).collect() };
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("e.txt");
        let lines: Vec<_> = (0..20).map(|i| text(i, 5 + i % 6)).collect();
        fs::write(
            &path,
            lines.iter().map(|line| line.join(" ") + "\n").collect::<String>(),
        )
        .unwrap();
        let n_grams = NGrams {
            n_words: 8,
            n_characters: 50,
        };
        let all = Evaluations::read(&[path], n_grams).unwrap();
        let mut n_found = 0;
        for seed in 100..400 {
            let document = text(seed, 30);
            let shares = |line: &Vec<String>| {
                line.len() >= 5
                    && line
                        .windows(line.len().min(8))
                        .any(|gram| document.windows(gram.len()).any(|other| other == gram))
            };
            let found = matches(&all, "eng_Latn", &document.join(" "));
            assert_eq!(!found.is_empty(), lines.iter().any(shares), "{document:?}");
            n_found += usize::from(!found.is_empty());
        }
        assert!((50..=280).contains(&n_found), "both happen: {n_found}");
    }

    #[test]
    fn what_cannot_be_checked_ends_the_check() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("e.jsonl");
        fs::write(&path, "{\"text\": \"fine\"}\nnot json").unwrap();
        let said = Evaluations::read(std::slice::from_ref(&path), NGrams::default())
            .err()
            .unwrap()
            .to_string();
        assert!(said.contains("e.jsonl:2: "), "{said}");
        let few = NGrams {
            n_words: 2,
            n_characters: 50,
        };
        let said = Evaluations::read(&[path], few).err().unwrap().to_string();
        assert!(said.contains("2 words: so few stand in common by chance"), "{said}");
    }
}
