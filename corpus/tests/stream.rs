//! Rows are a pure, even and complete function of seed and index: whatever the mix, the stages and the packing.

#[path = "common/shards.rs"]
mod shards;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use corpus::{
    Attention, Group, Packing, PartPlan, Row, RowsDigest, Sampling, Share, Stage, Stream, StreamSettings, TokenShards,
    TokenType,
};
use proptest::prelude::*;
use shards::{PartOf, index, open, write_manifest, write_shards, write_with_prompts};

const PARTS: [PartOf; 6] = [
    ("", "aaa_Latn", &[30_000, 10_000]),
    ("", "bbb_Cyrl", &[1_000]),
    ("", "ccc_Latn", &[0]),
    ("", "ddd_Arab", &[7]),
    ("", "eee_Latn", &[333]),
    ("", "fff_Thai", &[16]),
];

fn settings(seed: u64, sequence_length: usize) -> StreamSettings {
    StreamSettings {
        seed,
        sequence_length,
        run_rows: 1000,
        sampling: Sampling::by_size(0.3),
        packing: Packing::Cut,
        attention: Attention::Row,
    }
}

fn sampled(folder: &Path, run_rows: u64, sampling: Sampling) -> Result<Stream, String> {
    let settings = StreamSettings {
        run_rows,
        sampling,
        ..settings(5, 16)
    };
    Stream::new(open(folder), settings).map_err(|error| error.to_string())
}

fn stream(folder: &Path, seed: u64, sequence_length: usize) -> Stream {
    Stream::new(open(folder), settings(seed, sequence_length)).unwrap()
}

fn plan_of(stream: &Stream) -> BTreeMap<String, PartPlan> {
    stream
        .plan()
        .into_iter()
        .map(|part| (part.name.clone(), part))
        .collect()
}

#[test]
fn a_row_depends_on_seed_and_index_alone() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &PARTS);
    let (a, b) = (stream(folder.path(), 5, 16), stream(folder.path(), 5, 16));
    let forwards: Vec<_> = (0..300).map(|index| a.row(index)).collect();
    let mut backwards: Vec<_> = (0..300).rev().map(|index| b.row(index)).collect();
    backwards.reverse();
    assert_eq!(forwards, backwards);
    assert_ne!(a.digest(0..300), stream(folder.path(), 6, 16).digest(0..300));
}

/// Golden: a change that is meant to leave the rows alone leaves this alone.
#[test]
fn the_first_ten_thousand_rows_stay_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &PARTS);
    let digest = |packing, attention| {
        let settings = StreamSettings {
            packing,
            attention,
            ..settings(5, 16)
        };
        Stream::new(open(folder.path()), settings)
            .unwrap()
            .digest(0..10_000)
            .to_string()
    };
    assert_eq!(
        [
            digest(Packing::Cut, Attention::Row),
            digest(Packing::Cut, Attention::Document),
            digest(Packing::Documents, Attention::Document),
        ],
        [
            "3aee3e0b683298d0d9087682e64629ab",
            "3963c7b84c972ac2ba4bc0049e281e3d",
            "5cfa372d0484a06eae8706ed96767db1"
        ]
    );
}

#[test]
fn any_number_of_ranks_reads_each_row_once() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &PARTS);
    let stream = stream(folder.path(), 5, 16);
    let rows = 840; // divides by 1 … 8
    let alone = stream.digest(0..rows);
    for world in 1..=8 {
        let mut sum = [0.0; RowsDigest::LIMBS];
        for rank in 0..world {
            let mine = rows / world;
            let limbs = stream.digest(rank * mine..(rank + 1) * mine).limbs();
            sum.iter_mut().zip(limbs).for_each(|(sum, limb)| *sum += limb);
        }
        assert_eq!(RowsDigest::from_limbs(sum).to_string(), alone.to_string());
    }
}

#[test]
fn every_block_is_met_once_an_epoch_and_no_token_is_lost() {
    const T: u64 = 16;
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &PARTS);
    // Stages whose borders fall inside epochs, so that an epoch goes on in the next stage.
    let stage = |tokens, alpha| Stage {
        tokens,
        alpha: Some(alpha),
        ..Stage::default()
    };
    let stages = vec![stage(Some(5_000), 1.0), stage(Some(77_777), 0.0), stage(None, 0.5)];
    for stages in [Vec::new(), stages] {
        let sampling = Sampling {
            stages,
            ..Sampling::by_size(0.3)
        };
        let stream = sampled(folder.path(), 30_000, sampling).unwrap();
        let mut blocks: BTreeMap<usize, Vec<Vec<i64>>> = BTreeMap::new();
        for index in 0..30_000 {
            let row = stream.row(index);
            blocks.entry(row.part).or_default().push(row.tokens);
        }
        for (part, rows) in blocks {
            let range = &stream.shards().manifest().languages[part].tokens;
            let (first, n) = (range.start, range.end - range.start);
            let expected: Vec<Vec<i64>> = (0..n.div_ceil(T))
                .map(|block| (block * T..(block + 1) * T).map(|at| (first + at % n) as i64).collect())
                .collect();
            let mut orders = Vec::new();
            for epoch in rows.chunks_exact(expected.len()) {
                let mut sorted = epoch.to_vec();
                sorted.sort_by_key(|tokens| tokens[0]);
                assert_eq!(sorted, expected, "{}", PARTS[part].1);
                orders.push(epoch.to_vec());
            }
            assert!(orders.len() > 1, "{} was seen more than once", PARTS[part].1);
            assert!(expected.len() < 4 || orders[0] != orders[1], "another order each epoch");
        }
    }
}

#[test]
fn shares_hold_over_any_window() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &PARTS);
    let stream = stream(folder.path(), 9, 16);
    let weight = |tokens: u64| if tokens == 0 { 0.0 } else { (tokens as f64).powf(0.3) };
    let shares: Vec<f64> = stream.plan().iter().map(|part| part.shares[0]).collect();
    let tokens: Vec<u64> = stream.parts().iter().map(|part| part.tokens).collect();
    let whole: f64 = tokens.iter().map(|tokens| weight(*tokens)).sum();
    for (tokens, share) in tokens.iter().zip(&shares) {
        assert!((weight(*tokens) / whole - share).abs() < 1e-9);
    }
    for (start, rows) in [(0, 64), (12_345, 1_000), (1 << 40, 10_000)] {
        let mut counts = [0u64; PARTS.len()];
        (start..start + rows).for_each(|index| counts[stream.row(index).part] += 1);
        let mut chi2 = 0.0;
        for (count, share) in counts.iter().zip(&shares) {
            let due = share * rows as f64;
            // Random draws would miss by √due, here 50 rows of 2,500.
            assert!((*count as f64 - due).abs() < 8.0, "{count} rows of {due:.1} in {rows}");
            chi2 += if due > 0.0 {
                (*count as f64 - due).powi(2) / due
            } else {
                0.0
            };
        }
        // Four degrees of freedom: random draws exceed 18.5 once in a thousand.
        assert!(chi2 < 18.5, "{chi2}");
    }
    assert_eq!(
        stream.rows_before(1 << 40, 2),
        0,
        "a language without tokens has no rows"
    );
}

/// Three sources; English is in two of them.
const SOURCES: [PartOf; 6] = [
    ("code", "eng_Latn", &[4_000]),
    ("code", "zxx_Zyyy", &[9_000]),
    ("books", "eng_Latn", &[2_000, 3_000]),
    ("web", "aaa_Latn", &[20_000]),
    ("web", "bbb_Latn", &[1_000]),
    ("web", "ccc_Latn", &[50]),
];

fn weights<const N: usize>(weights: [(&str, f64); N]) -> BTreeMap<String, f64> {
    weights
        .into_iter()
        .map(|(name, weight)| (name.to_owned(), weight))
        .collect()
}

fn shares<const N: usize>(shares: [(&str, f64, f64); N]) -> BTreeMap<corpus::Language, Share> {
    shares
        .into_iter()
        .map(|(name, first, last)| (name.parse().unwrap(), Share { first, last }))
        .collect()
}

fn check_shares(stream: &Stream, stage: usize, expected: &[(&str, f64)]) {
    let plan = plan_of(stream);
    for (name, share) in expected {
        let found = plan[*name].shares[stage];
        assert!(
            (found - share).abs() < 1e-9,
            "{name} in stage {stage}: {found}, expected {share}"
        );
    }
    let whole: f64 = plan.values().map(|part| part.shares[stage]).sum();
    assert!((whole - 1.0).abs() < 1e-9);
}

#[test]
fn sources_have_the_weights_they_are_given_and_alpha_holds_within() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &SOURCES);
    let sampling = Sampling {
        sources: weights([("code", 0.1), ("books", 0.2), ("web", 0.7)]),
        ..Sampling::by_size(0.5)
    };
    let stream = sampled(folder.path(), 10_000, sampling.clone()).unwrap();
    let root = |n: f64| n.sqrt();
    let (code, web) = (
        root(4_000.0) + root(9_000.0),
        root(20_000.0) + root(1_000.0) + root(50.0),
    );
    let expected = [
        ("code/eng_Latn", 0.1 * root(4_000.0) / code),
        ("code/zxx_Zyyy", 0.1 * root(9_000.0) / code),
        ("books/eng_Latn", 0.2),
        ("web/ccc_Latn", 0.7 * root(50.0) / web),
    ];
    check_shares(&stream, 0, &expected);
    for (name, share) in expected {
        let part = &plan_of(&stream)[name];
        assert!(
            (part.rows as f64 - 10_000.0 * share).abs() < 8.0,
            "{name}: {} rows",
            part.rows
        );
        assert_eq!(part.expected_tokens, (part.epochs * part.tokens as f64).round() as u64);
    }

    // Without weights a language counts once, whatever it comes from, and its parts share by size.
    let stream = sampled(folder.path(), 10_000, Sampling::by_size(0.5)).unwrap();
    let whole = root(9_000.0) * 2.0 + web;
    let english = root(9_000.0) / whole;
    check_shares(
        &stream,
        0,
        &[
            ("code/eng_Latn", english * 4.0 / 9.0),
            ("books/eng_Latn", english * 5.0 / 9.0),
        ],
    );

    let said = |sources| {
        let sampling = Sampling {
            sources,
            ..sampling.clone()
        };
        sampled(folder.path(), 100, sampling).err().unwrap()
    };
    let sentence = said(weights([("code", 0.5), ("web", 0.5)]));
    assert!(
        sentence.contains("the token shards have text of books; give it a weight, 0 to leave it out"),
        "{sentence}"
    );
    let sentence = said(weights([("code", 0.5), ("web", 0.5), ("books", 0.1)]));
    assert!(
        sentence.contains("together 1.100000: weights are between 0 and 1 and sum to 1"),
        "{sentence}"
    );
    let sentence = said(weights([("code", 0.5), ("web", 0.4), ("books", 0.0), ("papers", 0.1)]));
    assert!(
        sentence.contains("sampling.sources.papers = 0.1: no text is there to take this weight"),
        "{sentence}"
    );
}

#[test]
fn a_floor_raises_the_small_and_the_smallest_are_left_out() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &SOURCES);
    let sampling = Sampling {
        floor: 10_000,
        leave_out_below: 100,
        ..Sampling::by_size(1.0)
    };
    let stream = sampled(folder.path(), 1_000, sampling).unwrap();
    check_shares(
        &stream,
        0,
        &[
            ("web/aaa_Latn", 0.4),
            ("web/bbb_Latn", 0.2),
            ("code/zxx_Zyyy", 0.2),
            ("web/ccc_Latn", 0.0),
        ],
    );
    let sampling = Sampling {
        leave_out_below: 20_001,
        ..Sampling::by_size(1.0)
    };
    let sentence = sampled(folder.path(), 1_000, sampling).err().unwrap();
    assert!(
        sentence
            .contains("sampling.leave_out_below = 20001: the largest language has 20000 tokens, so nothing is left"),
        "{sentence}"
    );
}

#[test]
fn resource_groups_take_their_weights_or_only_their_names() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &SOURCES);
    let groups = |weights: [Option<f64>; 2]| {
        let group = |name: &str, from_tokens, weight| Group {
            name: name.into(),
            from_tokens,
            weight,
        };
        vec![group("low", 50, weights[0]), group("high", 9_000, weights[1])]
    };
    let sampling = Sampling {
        groups: groups([Some(0.25), Some(0.75)]),
        ..Sampling::by_size(0.0)
    };
    let stream = sampled(folder.path(), 1_000, sampling).unwrap();
    let third = 0.75 / 3.0;
    check_shares(
        &stream,
        0,
        &[
            ("web/bbb_Latn", 0.125),
            ("web/ccc_Latn", 0.125),
            ("web/aaa_Latn", third),
            ("code/eng_Latn", third * 4.0 / 9.0),
        ],
    );
    let sampling = Sampling {
        groups: groups([None, None]),
        ..Sampling::by_size(0.0)
    };
    let stream = sampled(folder.path(), 1_000, sampling).unwrap();
    check_shares(&stream, 0, &[("web/bbb_Latn", 0.2)]);
    assert_eq!(plan_of(&stream)["web/ccc_Latn"].group.as_deref(), Some("low"));

    let mut sampling = Sampling {
        groups: groups([Some(0.25), Some(0.75)]),
        ..Sampling::by_size(0.0)
    };
    sampling.groups[0].from_tokens = 51;
    let sentence = sampled(folder.path(), 1_000, sampling).err().unwrap();
    assert!(
        sentence.contains("ccc_Latn has 50 tokens, fewer than every group asks for"),
        "{sentence}"
    );
}

/// PolyLM's curriculum: 70 % English at first, then 40 %.
#[test]
fn stages_change_shares_at_their_border_and_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &SOURCES);
    let sampling = Sampling {
        stages: vec![
            Stage {
                tokens: Some(16 * 2_000 - 5),
                shares: shares([("eng_Latn", 0.7, 0.7)]),
                ..Stage::default()
            },
            Stage {
                shares: shares([("eng_Latn", 0.4, 0.4)]),
                alpha: Some(1.0),
                ..Stage::default()
            },
        ],
        ..Sampling::by_size(0.0)
    };
    let stream = sampled(folder.path(), 5_000, sampling).unwrap();
    assert_eq!(stream.stages(), [0, 2_000], "rounded up to whole rows");
    check_shares(
        &stream,
        0,
        &[("web/bbb_Latn", 0.3 / 4.0), ("code/eng_Latn", 0.7 * 4.0 / 9.0)],
    );
    check_shares(
        &stream,
        1,
        &[("web/bbb_Latn", 0.6 * 1.0 / 30.05), ("code/eng_Latn", 0.4 * 4.0 / 9.0)],
    );
    let is_english = |row: u64| stream.parts()[stream.part(row)].language.as_str() == "eng_Latn";
    for (rows, share) in [
        (0..2_000, 0.7),
        (1_900..2_000, 0.7),
        (2_000..2_100, 0.4),
        (2_000..9_000, 0.4),
    ] {
        let n = (rows.end - rows.start) as f64;
        let found = rows.clone().filter(|row| is_english(*row)).count() as f64;
        assert!((found - share * n).abs() < 6.0, "{found} of {n} rows in {rows:?}");
    }
    // The counting function knows the stages: it is the count, at and around the border and behind the run's end.
    let mut counted = vec![0u64; stream.parts().len()];
    for row in 0..9_000 {
        if row % 97 == 0 || (1_995..2_005).contains(&row) {
            (0..counted.len()).for_each(|part| assert_eq!(stream.rows_before(row, part), counted[part]));
        }
        counted[stream.part(row)] += 1;
    }
}

#[test]
fn a_ramp_moves_a_share_evenly_from_its_first_to_its_last() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &SOURCES);
    let stages = |tokens| {
        let ramp = Stage {
            tokens,
            shares: shares([("eng_Latn", 0.8, 0.2)]),
            ..Stage::default()
        };
        let mut stages = vec![ramp];
        stages.extend(tokens.map(|_| Stage::default()));
        stages
    };
    // As long as said, or to the run's end.
    for tokens in [Some(6_400 * 16), None] {
        let sampling = Sampling {
            stages: stages(tokens),
            ..Sampling::by_size(0.0)
        };
        let stream = sampled(folder.path(), 6_400, sampling).unwrap();
        let is_english = |row: u64| stream.parts()[stream.part(row)].language.as_str() == "eng_Latn";
        for tenth in 0..10 {
            let found = (tenth * 640..(tenth + 1) * 640).filter(|row| is_english(*row)).count() as f64;
            let due = 640.0 * (0.8 - 0.06 * (tenth as f64 + 0.5));
            assert!((found - due).abs() < 12.0, "tenth {tenth}: {found} rows, {due} due");
        }
        let whole: u64 = plan_of(&stream)
            .values()
            .filter(|p| p.language.as_str() == "eng_Latn")
            .map(|p| p.rows)
            .sum();
        assert!((whole as f64 - 3_200.0).abs() < 8.0, "{whole}");
        check_shares(&stream, 0, &[("code/eng_Latn", 0.5 * 4.0 / 9.0)]);
        assert_eq!((0..6_400).filter(|row| is_english(*row)).count() as u64, whole);
    }
    // A run of fewer rows than the ramp has steps, and a stage that is never reached.
    let sampling = Sampling {
        stages: stages(Some(16 * 10)),
        ..Sampling::by_size(0.0)
    };
    assert_eq!(
        plan_of(&sampled(folder.path(), 5, sampling).unwrap())
            .values()
            .map(|part| part.rows)
            .sum::<u64>(),
        5
    );
}

#[test]
fn no_part_is_read_more_often_than_the_cap_and_the_others_take_its_rows() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &PARTS);
    let capped = |run_rows, max_epochs, stages| {
        let sampling = Sampling {
            max_epochs: Some(max_epochs),
            stages,
            ..Sampling::by_size(0.3)
        };
        sampled(folder.path(), run_rows, sampling)
    };
    let two_stages = vec![
        Stage {
            tokens: Some(1_000 * 16),
            alpha: Some(0.0),
            ..Stage::default()
        },
        Stage::default(),
    ];
    for stages in [Vec::new(), two_stages] {
        for max_epochs in [1.0, 1.5, 2.0, 4.0] {
            let stream = capped(2_400, max_epochs, stages.clone()).unwrap();
            let uncapped = plan_of(&capped(2_400, 1e9, stages.clone()).unwrap());
            let plan = plan_of(&stream);
            assert_eq!(plan.values().map(|part| part.rows).sum::<u64>(), 2_400);
            for part in plan.values() {
                assert!(
                    part.epochs <= max_epochs || part.rows <= 5,
                    "{}: {} epochs of {max_epochs}",
                    part.name,
                    part.epochs
                );
                // Capped parts get nearly all they may, the others more than without a cap.
                let before = uncapped[&part.name].epochs;
                assert!(
                    part.epochs >= before.min(max_epochs) * 0.9 - 2.0 / 21.0 || part.rows < 4,
                    "{part:?}, {before}"
                );
            }
        }
    }
    // Aaa has 2,500 blocks, all together 2,586.
    let sentence = capped(6_000, 2.0, Vec::new()).err().unwrap();
    assert!(sentence.contains("sampling.max_epochs = 2 leaves about"), "{sentence}");
    assert!(sentence.contains("the run wants 96000"), "{sentence}");
    let possible: u64 = sentence.split_whitespace().nth(5).unwrap().parse().unwrap();
    assert!(
        ((2 * 2_586 - 60) * 16..=2 * 2_586 * 16).contains(&possible),
        "{sentence}"
    );
    capped(possible / 16, 2.0, Vec::new()).unwrap();
}

#[test]
fn a_cap_shuts_out_no_part_that_is_shorter_than_a_row() {
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..100u8)
        .map(|i| format!("{}{}b_Latn", (b'a' + i / 26) as char, (b'a' + i % 26) as char))
        .collect();
    let small = names.iter().map(|name| ("", name.as_str(), &[8u32][..]));
    let parts: Vec<PartOf> = small.chain([("", "zzz_Latn", &[1_000_000][..])]).collect();
    write_shards(folder.path(), &parts);
    for alpha in [0.0, 0.3] {
        let sampling = Sampling {
            max_epochs: Some(4.0),
            ..Sampling::by_size(alpha)
        };
        let plan = plan_of(&sampled(folder.path(), 10_000, sampling).unwrap());
        for name in &names {
            let rows = plan[name].rows;
            assert!((1..=5).contains(&rows), "{name}: {rows} rows");
        }
    }
}

#[test]
fn epochs_are_counted_in_tokens_also_of_parts_shorter_than_a_row() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &PARTS);
    for packing in [Packing::Cut, Packing::Documents] {
        let stream = Stream::new(
            open(folder.path()),
            StreamSettings {
                packing,
                ..settings(5, 16)
            },
        )
        .unwrap();
        let mut read: BTreeMap<usize, usize> = BTreeMap::new();
        for row in (0..1000).map(|index| stream.row(index)) {
            // Padding is token 0, which only the first part has.
            let own = row.tokens.iter().filter(|token| row.part == 0 || **token > 0).count();
            *read.entry(row.part).or_default() += own;
        }
        for (part, plan) in stream.plan().into_iter().enumerate().filter(|(part, _)| *part != 0) {
            let own = read.get(&part).map_or(0, |n| *n);
            let of_a_block = if packing == Packing::Cut { 0 } else { 16 };
            assert!(
                own.abs_diff(plan.expected_tokens as usize) <= of_a_block,
                "{plan:?}, {own}"
            );
            let epochs = own as f64 / plan.tokens.max(1) as f64;
            assert!(
                (epochs - plan.epochs).abs() < 0.03 * plan.epochs.max(1.0),
                "{plan:?}, {epochs}"
            );
        }
    }
}

#[test]
fn a_capped_source_fills_up_from_within_before_others_take_more() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &SOURCES);
    let sampling = Sampling {
        sources: weights([("code", 0.3), ("books", 0.2), ("web", 0.5)]),
        max_epochs: Some(1.0),
        ..Sampling::by_size(0.0)
    };
    // ccc_Latn has 4 rows only: bbb_Latn takes what it may, aaa_Latn the rest, and web keeps its half.
    let plan = plan_of(&sampled(folder.path(), 1_000, sampling).unwrap());
    let web: u64 = plan
        .values()
        .filter(|part| part.source == "web")
        .map(|part| part.rows)
        .sum();
    assert!(web.abs_diff(500) < 6, "{web}");
    assert!(plan["web/ccc_Latn"].rows <= 4 && plan["web/bbb_Latn"].rows <= 63);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn caps_hold_for_any_corpus(
        tokens in prop::collection::vec(0u32..3_000, 1..30), max_epochs in 0.5f64..6.0, filled in 0.05f64..0.97,
        alpha in 0.0f64..=1.0, seed: u64,
    ) {
        prop_assume!(tokens.iter().any(|n| *n > 0));
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..tokens.len()).map(|i| format!("{}{}a_Latn", (b'a' + i as u8 / 26) as char, (b'a' + i as u8 % 26) as char)).collect();
        let parts: Vec<PartOf> = names.iter().zip(&tokens).map(|(name, n)| ("", name.as_str(), std::slice::from_ref(n))).collect();
        write_shards(folder.path(), &parts);
        let most: u64 = tokens.iter().map(|n| ((max_epochs * f64::from(*n) / 16.0) as u64).max(2 * u64::from(*n > 0))).sum();
        let run_rows = (most as f64 * filled) as u64;
        let sampling = Sampling { max_epochs: Some(max_epochs), ..Sampling::by_size(alpha) };
        let settings = StreamSettings { run_rows, sampling, ..settings(seed, 16) };
        match Stream::new(open(folder.path()), settings) {
            Ok(stream) => for part in stream.plan() {
                prop_assert!(part.epochs <= max_epochs || part.rows <= 5, "{part:?}");
            },
            // A few rows a part are lost to rounding.
            Err(error) => prop_assert!(most - run_rows < 8 * tokens.len() as u64, "{most} {run_rows} {error}"),
        }
    }
}

/// Documents of many lengths, some longer than a row, some empty.
fn lengths(n: u32, most: u32) -> Vec<u32> {
    (0..n)
        .map(|i| i.wrapping_mul(2_654_435_761) % most * (i % 17).min(1))
        .collect()
}

fn packed(folder: &Path, sequence_length: usize, packing: Packing, attention: Attention) -> Stream {
    let settings = StreamSettings {
        packing,
        attention,
        ..settings(5, sequence_length)
    };
    Stream::new(open(folder), settings).unwrap()
}

#[test]
fn rows_of_whole_documents_hold_every_token_once_an_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let (many, few, one) = (lengths(3_000, 90), lengths(40, 30), [5]);
    write_shards(
        folder.path(),
        &[("", "aaa_Latn", &many), ("", "bbb_Latn", &few), ("", "ccc_Latn", &one)],
    );
    let ends = |lengths: &[u32], first: i64| -> BTreeSet<i64> {
        lengths
            .iter()
            .scan(first, |end, n| {
                *end += i64::from(*n);
                Some(*end)
            })
            .collect()
    };
    let n = |lengths: &[u32]| lengths.iter().map(|n| i64::from(*n)).sum::<i64>();
    let mut document_ends = ends(&many, 0);
    document_ends.extend(ends(&few, n(&many)));
    document_ends.extend(ends(&one, n(&many) + n(&few)));

    let stream = packed(folder.path(), 64, Packing::Documents, Attention::Document);
    let mut by_part: BTreeMap<usize, Vec<Row>> = BTreeMap::new();
    for index in 0..20_000 {
        let row = stream.row(index);
        assert_eq!((row.tokens.len(), row.is_target.len()), (64, 64));
        by_part.entry(row.part).or_default().push(row);
    }
    for (part, rows) in by_part {
        let range = &stream.shards().manifest().languages[part].tokens;
        let blocks = stream.parts()[part].rows_per_epoch as usize;
        let mut filled = 0;
        for epoch in rows.chunks_exact(blocks).take(2) {
            let mut seen: BTreeSet<i64> = BTreeSet::new();
            for row in epoch {
                // Pieces, and then padding if there is room.
                let starts: Vec<usize> = row.document_starts.iter().map(|at| *at as usize).collect();
                let mut borders = starts.clone();
                borders.push(64);
                for piece in borders.windows(2).map(|pair| pair[0]..pair[1]) {
                    let tokens = &row.tokens[piece.clone()];
                    assert!(!row.is_target[piece.start], "nothing stands before the first");
                    if piece.len() > 1 && !row.is_target[piece.start + 1] {
                        assert_eq!(piece.end, 64, "padding is at the end");
                        continue;
                    }
                    if tokens == [0i64] && piece.end == 64 {
                        continue; // one token of padding: the document with token 0 is longer
                    }
                    assert!(
                        tokens.windows(2).all(|pair| pair[0] + 1 == pair[1]),
                        "a piece is one stretch"
                    );
                    assert!(row.is_target[piece.start + 1..piece.end].iter().all(|target| *target));
                    let last = tokens[tokens.len() - 1];
                    assert!(
                        tokens.len() == 64 || document_ends.contains(&(last + 1)),
                        "documents are whole"
                    );
                    seen.extend(tokens);
                }
            }
            let missing = (range.start as i64..range.end as i64)
                .filter(|token| !seen.contains(token))
                .count();
            assert!(missing == 0, "{missing} of {range:?} are missing");
            assert_eq!(seen.len() as u64, range.end - range.start);
            filled = seen.len();
        }
        if part == 0 {
            let full = filled as f64 / (64 * blocks) as f64;
            assert!(full > 0.97, "best fit fills rows: {full}");
        }
    }
}

#[test]
fn documents_begin_where_they_begin_in_rows_that_are_cut() {
    let folder = tempfile::tempdir().unwrap();
    let many = lengths(500, 60);
    write_shards(folder.path(), &[("", "aaa_Latn", &[3, 0, 4]), ("", "bbb_Latn", &many)]);
    let mut starts: BTreeSet<i64> = [0, 3].into();
    let mut at = 7;
    for length in &many {
        starts.insert(at);
        at += i64::from(*length);
    }
    let stream = packed(folder.path(), 32, Packing::Cut, Attention::Document);
    let plain = packed(folder.path(), 32, Packing::Cut, Attention::Row);
    for index in 0..2_000 {
        let (row, same) = (stream.row(index), plain.row(index));
        assert_eq!((&row.tokens, row.part), (&same.tokens, same.part));
        assert!(same.document_starts.is_empty());
        assert_eq!(same.n_targets(), 31);
        for (at, token) in row.tokens.iter().enumerate() {
            let begins = at == 0 || starts.contains(token);
            assert_eq!(row.document_starts.contains(&(at as u32)), begins, "token {token}");
            assert_eq!(row.is_target[at], !begins);
        }
    }
}

#[test]
fn prompts_are_read_and_not_learned() {
    let folder = tempfile::tempdir().unwrap();
    let many = lengths(400, 50);
    // A prompt may be all of a document, and may be longer than a row.
    let prompts: Vec<u32> = many.iter().enumerate().map(|(i, n)| n * (i as u32 % 4) / 3).collect();
    write_with_prompts(folder.path(), &[("", "aaa_Latn", &many)], &prompts);
    let mut learned = BTreeMap::new();
    let mut at = 0i64;
    for (length, prompt) in many.iter().zip(&prompts) {
        (0..*length).for_each(|i| {
            learned.insert(at + i64::from(i), i >= *prompt);
        });
        at += i64::from(*length);
    }
    for packing in [Packing::Cut, Packing::Documents] {
        let stream = packed(folder.path(), 32, packing, Attention::Row);
        let mut n_targets = 0;
        for index in 0..stream.parts()[0].rows_per_epoch.ceil() as u64 {
            let row = stream.row(index);
            let end = if packing == Packing::Cut {
                32
            } else {
                row.tokens.iter().rposition(|token| *token > 0).map_or(0, |at| at + 1)
            };
            for at in 1..end {
                assert_eq!(
                    row.is_target[at], learned[&row.tokens[at]],
                    "{packing:?}, token {}",
                    row.tokens[at]
                );
            }
            n_targets += row.n_targets();
        }
        assert!(n_targets > 3_000);
    }
}

#[test]
fn an_index_whose_documents_do_not_hang_together_is_refused_at_opening() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &[("", "aaa_Latn", &[10, 20, 30])]);
    let path = folder.path().join("tokens.idx");
    let mut idx = fs::read(&path).unwrap();
    idx[34] = 11;
    fs::write(&path, idx).unwrap();
    let opened = |packing, attention| {
        let settings = StreamSettings {
            packing,
            attention,
            ..settings(5, 16)
        };
        Stream::new(open(folder.path()), settings)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    opened(Packing::Cut, Attention::Row).unwrap();
    for (packing, attention) in [
        (Packing::Documents, Attention::Row),
        (Packing::Cut, Attention::Document),
    ] {
        let sentence = opened(packing, attention).unwrap_err();
        assert!(
            sentence.contains("sequence 1 does not begin where the one before it ends"),
            "{sentence}"
        );
    }
}

#[test]
fn any_row_is_found_at_once() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &PARTS);
    let stream = stream(folder.path(), 5, 16);
    let hundred_seeks = || {
        let start = Instant::now();
        (0..100).for_each(|i| assert_eq!(stream.row(1_000_000_000 + i).tokens.len(), 16));
        start.elapsed()
    };
    // A hundred seeks in the time allowed for one, the best of five tries, so that a busy machine does not fail it.
    let best = (0..5).map(|_| hundred_seeks()).min().unwrap();
    assert!(best < Duration::from_millis(10), "{best:?}");
}

#[test]
fn impossible_streams_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &PARTS);
    let said = |alpha, length| {
        let settings = StreamSettings {
            sampling: Sampling::by_size(alpha),
            ..settings(1, length)
        };
        Stream::new(open(folder.path()), settings).err().unwrap().to_string()
    };
    assert!(said(1.1, 16).contains("sampling.alpha = 1.1 is not between 0"));
    assert!(said(f64::NAN, 16).contains("sampling.alpha = NaN"));
    assert!(said(0.3, 0).contains("sequence_length = 0 is not between 1"));
    let staged = |stages| {
        let sampling = Sampling {
            stages,
            ..Sampling::by_size(0.3)
        };
        sampled(folder.path(), 100, sampling).err().unwrap()
    };
    let with = |shares| Stage {
        shares,
        ..Stage::default()
    };
    let sentence = staged(vec![with(shares([("zzz_Latn", 0.5, 0.5)]))]);
    assert!(
        sentence.contains("sampling.stages[0].shares.zzz_Latn = 0.5: the token shards have no text"),
        "{sentence}"
    );
    let sentence = staged(vec![with(shares([("aaa_Latn", 0.7, 0.7), ("bbb_Cyrl", 0.7, 0.7)]))]);
    assert!(
        sentence.contains("sampling.stages[0].shares = 1.400000: together they exceed 1"),
        "{sentence}"
    );
    let sentence = staged(vec![Stage::default(), Stage::default()]);
    assert!(
        sentence.contains("sampling.stages[0].tokens = missing: every stage but the last says how long"),
        "{sentence}"
    );
    write_shards(folder.path(), &[("", "aaa_Latn", &[0])]);
    assert!(said(0.3, 16).contains("hold no tokens"));
}

/// `cargo test --release -p corpus --test stream -- --ignored --nocapture`: 534 languages, 10 million documents.
#[test]
#[ignore = "writes 200 MB and measures"]
fn a_large_corpus_opens_in_less_than_a_second() {
    let folder = tempfile::tempdir().unwrap();
    let all: Vec<u32> = (0..10_000_000u32)
        .map(|i| 20 + i.wrapping_mul(2_654_435_761) % 200)
        .collect();
    // Sizes as in the wild: the largest language has a thousand times the smallest.
    let weights: Vec<f64> = (0..534).map(|l| 1000f64.powf(-f64::from(l) / 533.0)).collect();
    let whole: f64 = weights.iter().sum();
    let (mut end, mut start) = (0.0, 0);
    let ranges: Vec<_> = weights
        .iter()
        .map(|weight| {
            end += weight / whole * all.len() as f64;
            let range = start..(end.round() as usize).min(all.len());
            start = range.end;
            range
        })
        .collect();
    let letter = |n: usize| (b'a' + n as u8) as char;
    let names: Vec<String> = (0..534)
        .map(|l| format!("{}{}{}_Latn", letter(l / 26), letter(l % 26), letter(l % 7)))
        .collect();
    let parts: Vec<PartOf> = names
        .iter()
        .zip(&ranges)
        .map(|(name, range)| ("", name.as_str(), &all[range.clone()]))
        .collect();
    let all: Vec<u32> = parts
        .iter()
        .flat_map(|(_, _, lengths)| lengths.iter().copied())
        .collect();
    let total: u64 = all.iter().map(|n| u64::from(*n)).sum();
    fs::write(folder.path().join("tokens.idx"), index(4, 4, &all)).unwrap();
    // A hole instead of tokens: they are all zero and take no room.
    fs::File::create(folder.path().join("tokens.bin"))
        .unwrap()
        .set_len(4 * total)
        .unwrap();
    write_manifest(folder.path(), &parts, TokenType::Int32, false);
    println!("{} documents, {total} tokens", all.len());
    drop((parts, all));

    let resident = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS"))
            .unwrap()
            .to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    };
    // Seconds of all cores: what the machine's other work does not change.
    let core_seconds = || {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let after_name = stat.rsplit_once(')').unwrap().1.to_owned();
        let ticks = after_name.split_whitespace().skip(11).take(2);
        ticks.map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>() / 100.0
    };
    let ramp = Sampling {
        stages: vec![Stage {
            shares: shares([(names[0].as_str(), 0.7, 0.4)]),
            ..Stage::default()
        }],
        max_epochs: Some(50.0),
        ..Sampling::by_size(0.3)
    };
    for (packing, attention, sampling, sequence_length) in [
        (Packing::Cut, Attention::Row, Sampling::by_size(0.3), 4096),
        (Packing::Cut, Attention::Row, ramp.clone(), 4096),
        (Packing::Cut, Attention::Document, Sampling::by_size(0.3), 4096),
        (Packing::Documents, Attention::Document, Sampling::by_size(0.3), 4096),
        (Packing::Documents, Attention::Document, ramp, 512),
    ] {
        let (before, cores_before) = (resident(), core_seconds());
        let started = Instant::now();
        let settings = StreamSettings {
            run_rows: 100_000,
            sampling: sampling.clone(),
            packing,
            attention,
            ..settings(1, sequence_length)
        };
        let stream = Stream::new(TokenShards::open(folder.path()).unwrap(), settings).unwrap();
        let (opened, cores) = (started.elapsed(), core_seconds() - cores_before);
        let opened_mib = resident().saturating_sub(before);
        let started = Instant::now();
        let first = stream.row(1_000_000_000);
        let seek = started.elapsed();
        let started = Instant::now();
        let rows = 2_000;
        let mut targets = first.n_targets();
        (0..rows).for_each(|index| targets += stream.row(1_000_000_000 + index).n_targets());
        let rate = (rows as usize * sequence_length) as f64 / started.elapsed().as_secs_f64();
        println!(
            "{packing:?} {attention:?} {} stages T={sequence_length}: open {opened:.0?} ({cores:.2} core seconds) +{opened_mib} MiB, seek {seek:.1?}, {:.1} M tokens/s, {:.1} % targets",
            sampling.stages.len(),
            rate / 1e6,
            100.0 * targets as f64 / ((rows as usize + 1) * sequence_length) as f64,
        );
        assert!(cores < 1.0 && opened_mib < 200 && seek < Duration::from_millis(10) && rate > 1e6);
    }
}
