//! Documents that nearly repeat an earlier one: MinHash (Broder 1997) over shingles of five units, found by LSH banding
//! (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4), each candidate checked by its whole signature.
//!
//! A document is dropped if an earlier one of its language (held-out ones count as earlier than all others) shares a band with it and has at
//! least the similarity asked for; the first of any group of them is kept. What is dropped is a function
//! of the documents and their order alone.
//!
//! Memory: beyond `memory_bytes` everything goes to the scratch folder, so that it costs `n_bands · 16 + 128` bytes of disk a
//! document (464 at 0.8) and one bit of memory. Dividing the bands in 1,024 files keeps each at 21 MB for the largest language of
//! Glot500-c (63 million sentences).

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::finished::remove_folder;
use crate::import::units::{Unit, hash, unit_hashes};
use crate::splitmix::mix;
use crate::{Error, Result};

/// Units in a shingle.
const SHINGLE: usize = 5;
/// Hash functions: the similarity of two documents is known to about ±0.035 (one standard deviation at 0.8).
const N_HASHES: usize = 128;
/// At the similarity asked for, this share of pairs shares a band.
const RECALL: f64 = 0.99;
/// In one band, a document is compared with so many different ones at most: bounds the work on boilerplate.
const MOST_COMPARED: usize = 32;
/// Set in the number of a document that does not go first, so that it is sorted behind those that do.
const LATER: u64 = 1 << 63;
/// Files that the bands are divided in on disk.
const N_PARTS: u64 = 1024;

/// How similarity is judged: 128 hashes cut into bands of `n_rows` each.
#[derive(Clone, Debug)]
pub(crate) struct Similarity {
    least: f64,
    n_rows: usize,
    /// Multiplier and summand of each hash function.
    functions: Vec<(u64, u64)>,
}

/// For each hash function the least value that any shingle of the document has.
struct Signature([u32; N_HASHES]);

impl Similarity {
    /// `least`: share of the two documents' different shingles that both have, from which on they are near duplicates.
    pub fn new(least: f64) -> Result<Similarity> {
        if !(0.5..=1.0).contains(&least) {
            return Err(Error::HygieneSetting {
                setting: "near_duplicates",
                value: least.to_string(),
                rule: "a similarity from 0.5 to 1 is expected, the share of word 5-grams in common; try 0.8",
            });
        }
        let shares_a_band = |n_rows: usize| {
            let n_bands = (N_HASHES / n_rows) as i32;
            1.0 - (1.0 - least.powi(n_rows as i32)).powi(n_bands)
        };
        // The longest bands, hence the fewest candidates, that find nearly all.
        let n_rows = (1..=N_HASHES).rev().find(|n_rows| shares_a_band(*n_rows) >= RECALL);
        let function = |i: u64| (mix(2 * i + 1) | 1, mix(2 * i + 2));
        Ok(Similarity {
            least,
            n_rows: n_rows.unwrap_or(1),
            functions: (0..N_HASHES as u64).map(function).collect(),
        })
    }

    /// The signature of a text; texts of fewer than five units are one shingle.
    fn signature(&self, text: &str, unit: Unit) -> Signature {
        let mut units = unit_hashes(text, unit);
        if units.is_empty() {
            // Only punctuation: near nothing but itself.
            units.push(hash(text.as_bytes()));
        }
        let mut least = [u32::MAX; N_HASHES];
        for shingle in units.windows(SHINGLE.min(units.len())) {
            let shingle = shingle.iter().fold(0, |all, unit| mix(all ^ unit));
            for (least, (factor, summand)) in least.iter_mut().zip(&self.functions) {
                let value = (shingle.wrapping_mul(*factor).wrapping_add(*summand) >> 32) as u32;
                *least = value.min(*least);
            }
        }
        Signature(least)
    }

    fn bands(&self, signature: &Signature) -> impl Iterator<Item = u64> {
        let bands = signature.0.chunks_exact(self.n_rows).zip(1..);
        bands.map(|(rows, band)| rows.iter().fold(mix(band), |all, row| mix(all ^ u64::from(*row))))
    }

    /// Whether two sketches are similar enough. Two different values agree in their last byte once in 256, which is allowed for.
    fn are_near(&self, a: &Sketch, b: &Sketch) -> bool {
        let agree = a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / N_HASHES as f64;
        let by_chance = 1.0 / 256.0;
        (agree - by_chance) / (1.0 - by_chance) >= self.least - 1e-9
    }
}

/// A signature's last bytes: enough to check a candidate by (b-bit MinHash, Li and König 2010).
type Sketch = [u8; N_HASHES];

/// The documents of one language, as far as they are needed to find near duplicates among them.
pub(crate) struct NearDuplicates<'a> {
    similarity: &'a Similarity,
    unit: Unit,
    memory_bytes: usize,
    scratch: PathBuf,
    n_documents: u64,
    /// (band with its values, document, perhaps with `LATER`)
    bands: Vec<(u64, u64)>,
    sketches: Vec<u8>,
    /// Holds the sketches before `sketches`.
    spilled: Option<File>,
}

impl<'a> NearDuplicates<'a> {
    /// `scratch`: a folder for what `memory_bytes` does not hold; made when it is needed, removed in the end.
    pub fn new(similarity: &'a Similarity, unit: Unit, memory_bytes: usize, scratch: &Path) -> NearDuplicates<'a> {
        NearDuplicates {
            similarity,
            unit,
            memory_bytes,
            scratch: scratch.to_path_buf(),
            n_documents: 0,
            bands: Vec::new(),
            sketches: Vec::new(),
            spilled: None,
        }
    }

    /// The next document. One that `goes_first` stays before all that do not, whatever their order. Returns its number.
    pub fn add(&mut self, text: &str, goes_first: bool) -> Result<u64> {
        let signature = self.similarity.signature(text, self.unit);
        let number = self.n_documents;
        let document = if goes_first { number } else { number | LATER };
        self.bands
            .extend(self.similarity.bands(&signature).map(|band| (band, document)));
        self.sketches.extend(signature.0.iter().map(|value| *value as u8));
        self.n_documents += 1;
        if self.bands.len() * size_of::<(u64, u64)>() + self.sketches.len() >= self.memory_bytes {
            self.spill()?;
        }
        Ok(number)
    }

    /// Which documents are to be dropped.
    pub fn finish(mut self) -> Result<Documents> {
        let mut dropped = Documents::none(self.n_documents);
        if self.spilled.is_some() {
            self.spill()?;
            for part in 0..N_PARTS {
                let path = self.part(part);
                let bytes = match fs::read(&path) {
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                    bytes => bytes.map_err(Error::io("read", &path))?,
                };
                let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
                let pairs = bytes.chunks_exact(16).map(|pair| (word(&pair[..8]), word(&pair[8..])));
                self.drop_in(pairs.collect(), &mut dropped)?;
            }
            remove_folder(&self.scratch)?;
        } else {
            let bands = std::mem::take(&mut self.bands);
            self.drop_in(bands, &mut dropped)?;
        }
        Ok(dropped)
    }

    /// Goes through groups of documents that share a band. Each group is judged by itself, so their order does not matter.
    fn drop_in(&self, mut bands: Vec<(u64, u64)>, dropped: &mut Documents) -> Result<()> {
        bands.sort_unstable();
        for group in bands.chunk_by(|a, b| a.0 == b.0).filter(|group| group.len() > 1) {
            let mut firsts: Vec<Sketch> = Vec::new();
            for document in group.iter().map(|(_, document)| document & !LATER) {
                let sketch = self.sketch(document)?;
                if firsts.iter().any(|first| self.similarity.are_near(first, &sketch)) {
                    dropped.insert(document);
                } else if firsts.len() < MOST_COMPARED {
                    firsts.push(sketch);
                }
            }
        }
        Ok(())
    }

    fn sketch(&self, document: u64) -> Result<Sketch> {
        let mut sketch = [0; N_HASHES];
        let at = document * N_HASHES as u64;
        match &self.spilled {
            Some(file) => file
                .read_exact_at(&mut sketch, at)
                .map_err(Error::io("read", &self.sketch_file()))?,
            None => sketch.copy_from_slice(&self.sketches[at as usize..at as usize + N_HASHES]),
        }
        Ok(sketch)
    }

    fn spill(&mut self) -> Result<()> {
        if self.spilled.is_none() {
            // An import that was killed may have left its own.
            remove_folder(&self.scratch)?;
            fs::create_dir_all(&self.scratch).map_err(Error::io("create", &self.scratch))?;
            let path = self.sketch_file();
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(true).open(&path);
            self.spilled = Some(file.map_err(Error::io("create", &path))?);
        }
        let path = self.sketch_file();
        let file = self.spilled.as_mut().expect("opened above");
        file.write_all(&self.sketches).map_err(Error::io("write", &path))?;
        self.sketches.clear();

        let part_of = |band: u64| band >> (64 - N_PARTS.trailing_zeros());
        self.bands.sort_unstable();
        for part in self.bands.chunk_by(|a, b| part_of(a.0) == part_of(b.0)) {
            let path = self.part(part_of(part[0].0));
            let bytes: Vec<u8> = part
                .iter()
                .flat_map(|(band, document)| [band.to_le_bytes(), document.to_le_bytes()])
                .flatten()
                .collect();
            let file = OpenOptions::new().create(true).append(true).open(&path);
            file.and_then(|mut file| file.write_all(&bytes))
                .map_err(Error::io("write", &path))?;
        }
        self.bands.clear();
        Ok(())
    }

    fn part(&self, part: u64) -> PathBuf {
        self.scratch.join(format!("bands-{part:04}"))
    }

    fn sketch_file(&self) -> PathBuf {
        self.scratch.join("sketches")
    }
}

/// A set of documents by their numbers, a bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Documents(Vec<u64>);

impl Documents {
    fn none(n_documents: u64) -> Documents {
        Documents(vec![0; n_documents.div_ceil(64) as usize])
    }

    fn insert(&mut self, document: u64) {
        self.0[(document / 64) as usize] |= 1 << (document % 64);
    }

    pub fn contains(&self, document: u64) -> bool {
        self.0[(document / 64) as usize] >> (document % 64) & 1 == 1
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.iter().map(|bits| bits.count_ones() as usize).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words of a language nobody speaks, a function of the number.
    fn word(n: u64) -> String {
        format!("w{:x}", mix(n) % 1_000_000)
    }

    fn words(from: u64, n: u64) -> Vec<String> {
        (from..from + n).map(word).collect()
    }

    /// A copy with `n_changed` words changed, evenly spread, and the Jaccard similarity of its 5-grams with the original's.
    fn changed(original: &[String], n_changed: usize, salt: u64) -> (String, f64) {
        let mut copy = original.to_vec();
        for i in 0..n_changed {
            copy[(2 * i + 1) * original.len() / (2 * n_changed)] = word(mix(salt) ^ i as u64);
        }
        let grams = |words: &[String]| -> std::collections::HashSet<Vec<String>> {
            words.windows(SHINGLE).map(<[String]>::to_vec).collect()
        };
        let (a, b) = (grams(original), grams(&copy));
        let both = a.intersection(&b).count() as f64;
        (
            copy.join(" "),
            both / (a.len() + b.len()) as f64 / (1.0 - both / (a.len() + b.len()) as f64),
        )
    }

    fn dropped(texts: &[String], least: f64, memory_bytes: usize) -> Documents {
        let scratch = tempfile::tempdir().unwrap();
        let similarity = Similarity::new(least).unwrap();
        let mut near = NearDuplicates::new(&similarity, Unit::Word, memory_bytes, scratch.path());
        for text in texts {
            near.add(text, false).unwrap();
        }
        near.finish().unwrap()
    }

    /// Originals of 200 words, each followed at once by a copy; per number of changed words how many copies are dropped.
    #[test]
    fn planted_copies_are_dropped_by_their_similarity() {
        let n_copies = 100;
        for (n_changed, least, expected) in [
            // 4 of 200 words changed leave 176 of 196 5-grams: 0.815. 5: 0.77.
            (0, 0.8, 100..=100),
            (1, 0.8, 100..=100),
            (3, 0.8, 95..=100),
            (6, 0.8, 0..=30),
            (10, 0.8, 0..=0),
            (40, 0.8, 0..=0),
            (8, 0.5, 95..=100),
            (20, 0.5, 0..=5),
        ] {
            let mut texts = Vec::new();
            let mut similarity = 0.0;
            for i in 0..n_copies {
                let original = words(1000 * i, 200);
                let (copy, jaccard) = changed(&original, n_changed, i + 7);
                similarity += jaccard / n_copies as f64;
                texts.extend([original.join(" "), copy]);
            }
            let dropped = dropped(&texts, least, 1 << 30);
            let originals = (0..n_copies).filter(|i| dropped.contains(2 * i)).count();
            assert_eq!(originals, 0, "the first of a pair stays");
            let n = dropped.len();
            println!("{n_changed} words changed, similarity {similarity:.3}: {n} of {n_copies} dropped at {least}");
            assert!(expected.contains(&n), "{n_changed} changed at {least}: {n} dropped");
        }
    }

    #[test]
    fn estimated_similarity_is_the_jaccard_similarity() {
        let scheme = Similarity::new(0.8).unwrap();
        let mut worst: f64 = 0.0;
        let mut sum = 0.0;
        for i in 0..200 {
            let original = words(5000 * i, 300);
            let (copy, jaccard) = changed(&original, (i % 20) as usize, i);
            let [a, b] = [original.join(" "), copy].map(|text| scheme.signature(&text, Unit::Word));
            let agree = a.0.iter().zip(&b.0).filter(|(a, b)| a == b).count() as f64 / N_HASHES as f64;
            worst = worst.max((agree - jaccard).abs());
            sum += agree - jaccard;
        }
        // Standard deviation at most sqrt(0.25 / 128) = 0.044; 200 draws stay within four of them, their mean within 0.01.
        assert!(worst < 0.18 && (sum / 200.0).abs() < 0.01, "{worst} {}", sum / 200.0);
    }

    #[test]
    fn what_does_not_fit_into_memory_changes_nothing() {
        let mut texts = Vec::new();
        for i in 0..300 {
            let original = words(777 * (i % 150), 60);
            texts.push(changed(&original, (i / 150) as usize, i).0);
        }
        texts.extend(["Amen.", "amen", "A-men!", "!!!", "???", "!!!"].map(str::to_owned));
        let inside = dropped(&texts, 0.7, 1 << 30);
        assert_eq!(inside, dropped(&texts, 0.7, 10_000));
        assert!(inside.len() > 100, "{}", inside.len());
        let short: Vec<_> = (300..306).map(|i| inside.contains(i)).collect();
        assert_eq!(short, [false, true, false, false, false, true]);
    }

    #[test]
    fn characters_are_the_units_of_scripts_without_spaces() {
        let scheme = Similarity::new(0.8).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let text = "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。";
        let texts = [
            text.to_owned(),
            text.replace(',', "，") + "！",
            text.replace("自由", "不平等") + "但是",
        ];
        let mut near = NearDuplicates::new(&scheme, Unit::Character, 1 << 20, scratch.path());
        for text in &texts {
            near.add(text, false).unwrap();
        }
        let dropped = near.finish().unwrap();
        assert_eq!([0, 1, 2].map(|i| dropped.contains(i)), [false, true, false]);
    }

    #[test]
    fn what_goes_first_stays_though_it_comes_later() {
        let scheme = Similarity::new(0.8).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        for memory_bytes in [1, 1 << 20] {
            let folder = scratch.path().join(memory_bytes.to_string());
            // As an import that was killed leaves it.
            fs::create_dir_all(&folder).unwrap();
            (0..N_PARTS).for_each(|part| fs::write(folder.join(format!("bands-{part:04}")), [7; 32]).unwrap());
            let mut near = NearDuplicates::new(&scheme, Unit::Word, memory_bytes, &folder);
            let text = words(1, 50).join(" ");
            for (number, goes_first) in [false, true, true, false].into_iter().enumerate() {
                assert_eq!(near.add(&text, goes_first).unwrap(), number as u64);
            }
            let dropped = near.finish().unwrap();
            assert_eq!([0, 1, 2, 3].map(|i| dropped.contains(i)), [true, false, true, true]);
        }
    }

    #[test]
    fn a_similarity_out_of_range_is_refused() {
        for least in [0.0, 0.4, 1.1, f64::NAN] {
            let said = Similarity::new(least).err().unwrap().to_string();
            assert!(
                said.starts_with("corpus.near_duplicates = ") && said.contains("try 0.8"),
                "{said}"
            );
        }
        assert_eq!(Similarity::new(1.0).unwrap().n_rows, N_HASHES);
    }
}
