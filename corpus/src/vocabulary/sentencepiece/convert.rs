//! From a SentencePiece BPE to a `tokenizer.json` that cuts every string alike. The two engines choose differently:
//! SentencePiece merges any two neighbours whose string is a piece, best score first and the leftmost among equals;
//! `tokenizers` merges listed pairs, lowest rank first and the leftmost among equals.
//!
//! *One pair a piece.* Until a piece is made at some place, no merge has crossed its borders; so what went on inside them
//! is what goes on in the piece's string alone ([`Encoder::parts`]). Hence one pair at most ever makes a piece, wherever it
//! stands, and a list of these pairs by falling score lets `tokenizers` take the very same steps, as long as no two
//! pieces share a score.
//!
//! *Pieces of one score* are taken by place there and by rank here. If no merge above their score waits for one of them,
//! all that happens while their turn lasts is that overlapping pairs exclude each other: x y z with pieces xy and yz.
//! SentencePiece takes xy, so xy must rank before yz, but only if x y z is a state that the string xyz passes through.
//! Where pieces would have to rank before each other, or a merge above their score waits for one and could take away what
//! the other needs, the younger one's score is lowered to the next smaller f32, in both files. Runs of one character are the
//! exception that LLaMA needs: its pieces of 2 to 16 spaces share one score, and each waits for the next space.

use std::collections::{BTreeSet, HashMap, HashSet};

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::vocabulary::llama_pieces::{self, Form};
use crate::vocabulary::sentencepiece::encoder::Encoder;
use crate::vocabulary::sentencepiece::proto::{Kind, ModelProto, Piece};

/// A piece and the two it is made of, by id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Merge {
    pub left: u32,
    pub right: u32,
    pub piece: u32,
}

/// Pairs of pieces that no order suits.
type Conflicts = Vec<(u32, u32)>;

/// The merges of a model, in the order of their ranks, and what it took to have that order.
pub(crate) struct Agreement {
    pub merges: Vec<Merge>,
    /// Pieces whose score was lowered, in the order of their ids.
    pub lowered: Vec<u32>,
}

/// Finds the merges; lowers scores from id `first_new` on where pieces of one score could be taken in different order.
/// Fails with the reason where that does not help, which is only when the base itself has such pieces.
pub(crate) fn agree(model: &mut ModelProto, first_new: usize) -> Result<Agreement, String> {
    let mut lowered = BTreeSet::new();
    loop {
        let encoder = Encoder::new(model);
        let found = merges_by_score(model, &encoder);
        let ordered = in_rank_order(model, &encoder, found);
        let conflicts = match ordered {
            Ok(merges) => {
                return Ok(Agreement {
                    merges,
                    lowered: lowered.into_iter().collect(),
                });
            }
            Err(conflicts) => conflicts,
        };
        // Each conflict is settled by one of its two; a piece that was just lowered settles all of its own.
        let mut now = HashSet::new();
        for (a, b) in conflicts {
            let younger = a.max(b);
            if (younger as usize) < first_new {
                return Err(format!(
                    "its pieces '{}' and '{}' have the same score, and which is merged first depends on where they stand",
                    model.pieces[a as usize].text(),
                    model.pieces[b as usize].text()
                ));
            }
            if !now.contains(&a) && !now.contains(&b) {
                now.insert(younger);
            }
        }
        for id in now {
            let piece = &mut model.pieces[id as usize];
            piece.score = Some(piece.score_or_zero().next_down());
            lowered.insert(id);
        }
    }
}

/// Every piece that can occur, with its pair; best score first, then by id.
fn merges_by_score(model: &ModelProto, encoder: &Encoder) -> Vec<Merge> {
    let merge = |(piece, proto): (u32, &Piece)| {
        if proto.kind() != Kind::Normal {
            return None;
        }
        let (left, right) = encoder.parts(proto.text())?;
        let (left, right) = (encoder.known(left)?, encoder.known(right)?);
        Some(Merge { left, right, piece })
    };
    let pieces: Vec<_> = (0..).zip(&model.pieces).collect();
    let mut merges: Vec<Merge> = pieces.into_par_iter().filter_map(merge).collect();
    merges.sort_by(|a, b| score(model, b.piece).total_cmp(&score(model, a.piece)));
    merges
}

fn score(model: &ModelProto, id: u32) -> f32 {
    model.pieces[id as usize].score_or_zero()
}

/// Orders the merges of each score among themselves, or names the pairs of pieces that cannot be ordered.
fn in_rank_order(model: &ModelProto, encoder: &Encoder, merges: Vec<Merge>) -> Result<Vec<Merge>, Conflicts> {
    let waiting = Waiting::new(model, &merges);
    let classes: Vec<&[Merge]> = merges
        .chunk_by(|a, b| score(model, a.piece) == score(model, b.piece))
        .collect();
    let ordered: Vec<Result<Vec<Merge>, Conflicts>> = classes
        .into_par_iter()
        .map(|class| match class {
            [_] => Ok(class.to_vec()),
            _ => order_class(model, encoder, &waiting, class),
        })
        .collect();
    let mut all = Vec::with_capacity(merges.len());
    let mut conflicts = Vec::new();
    for class in ordered {
        match class {
            Ok(class) => all.extend(class),
            Err(pairs) => conflicts.extend(pairs),
        }
    }
    if conflicts.is_empty() { Ok(all) } else { Err(conflicts) }
}

/// Pieces of one score: a topological order of "must rank before".
fn order_class(
    model: &ModelProto,
    encoder: &Encoder,
    waiting: &Waiting,
    class: &[Merge],
) -> Result<Vec<Merge>, Conflicts> {
    if let Some(ordered) = order_runs(model, encoder, waiting, class) {
        return Ok(ordered);
    }
    let rivals = waiting.rivals(class);
    if !rivals.is_empty() {
        return Err(rivals);
    }
    let mut by_left: HashMap<u32, Vec<usize>> = HashMap::new();
    for (index, merge) in class.iter().enumerate() {
        by_left.entry(merge.left).or_default().push(index);
    }
    // before[i] holds those that must rank after i; n_before counts those that must rank before.
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); class.len()];
    let mut n_before = vec![0usize; class.len()];
    for (first, merge) in class.iter().enumerate() {
        for &second in by_left.get(&merge.right).into_iter().flatten() {
            if first != second && overlap(model, encoder, merge, &class[second]) {
                before[first].push(second);
                n_before[second] += 1;
            }
        }
    }
    // The lowest id that may be next: the result depends on nothing else.
    let mut ready: BTreeSet<(u32, usize)> = (0..class.len())
        .filter(|i| n_before[*i] == 0)
        .map(|i| (class[i].piece, i))
        .collect();
    let mut ordered = Vec::with_capacity(class.len());
    while let Some((_, index)) = ready.pop_first() {
        ordered.push(class[index]);
        for &after in &before[index] {
            n_before[after] -= 1;
            if n_before[after] == 0 {
                ready.insert((class[after].piece, after));
            }
        }
    }
    if ordered.len() == class.len() {
        return Ok(ordered);
    }
    // What is left lies on cycles or behind them; each edge inside it is a conflict that lowering one piece settles.
    let left = |index: usize| n_before[index] > 0;
    let conflicts = (0..class.len())
        .filter(|i| left(*i))
        .flat_map(|i| before[i].iter().filter(|j| left(**j)).map(move |j| (i, *j)));
    Err(conflicts.map(|(i, j)| (class[i].piece, class[j].piece)).collect())
}

/// Pieces that are runs of one character, of which nothing else grows: the longest ranks first. Runs in a text have nothing to
/// do with each other, so that it suffices that runs of any length are cut alike; they are, if all are that hold the longest
/// piece four times, for what is left of a run begins anew.
fn order_runs(model: &ModelProto, encoder: &Encoder, waiting: &Waiting, class: &[Merge]) -> Option<Vec<Merge>> {
    let text = |merge: &Merge| model.pieces[merge.piece as usize].text();
    let character = text(&class[0]).chars().next()?;
    let members: HashSet<u32> = class.iter().map(|merge| merge.piece).collect();
    let floor = score(model, class[0].piece);
    let alone = class.iter().all(|merge| {
        text(merge).chars().all(|c| c == character) && waiting.growth(merge.piece, floor).symbols.is_subset(&members)
    });
    if !alone {
        return None;
    }
    let mut ordered = class.to_vec();
    ordered.sort_by_key(|merge| std::cmp::Reverse(text(merge).len()));
    // The same pieces without a tie, which is how ranks go.
    let by_rank: Vec<Piece> = ordered
        .iter()
        .zip(0..)
        .map(|(merge, rank)| Piece::new(text(merge), -(rank as f32), Kind::Normal))
        .chain([Piece::new(character, 0.0, Kind::Normal)])
        .collect();
    let by_rank = Encoder::new(&ModelProto {
        pieces: by_rank,
        ..Default::default()
    });
    let longest = ordered.first().map_or(0, |merge| text(merge).chars().count());
    (1..=4 * longest)
        .map(|length| character.to_string().repeat(length))
        .all(|run| encoder.merged(&run, 0) == by_rank.merged(&run, 0))
        .then_some(ordered)
}

/// Whether x y z with xy the first and yz the second is a state that can occur.
fn overlap(model: &ModelProto, encoder: &Encoder, first: &Merge, second: &Merge) -> bool {
    let text = |id: u32| model.pieces[id as usize].text();
    let (x, y, z) = (text(first.left), text(first.right), text(second.right));
    let state = encoder.merged(&[x, y, z].concat(), 3);
    state.len() == 3 && state[0].len() == x.len() && state[1].len() == y.len()
}

/// The merges by their parts, to see what follows at once when a piece is made.
struct Waiting {
    /// For each left part: the piece's score, its right part, itself.
    to_the_right: HashMap<u32, Vec<(f32, u32, u32)>>,
    /// For each right part: the piece's score, its left part, itself.
    to_the_left: HashMap<u32, Vec<(f32, u32, u32)>>,
}

/// What one piece of a class can grow to before the class has its next turn, and what that takes from its neighbourhood.
#[derive(Default)]
struct Growth {
    symbols: HashSet<u32>,
    takes_right: HashSet<u32>,
    takes_left: HashSet<u32>,
}

impl Waiting {
    /// Only the merges above some part of theirs matter, together with what these lead to.
    fn new(model: &ModelProto, merges: &[Merge]) -> Waiting {
        let mut to_the_right: HashMap<u32, Vec<_>> = HashMap::new();
        let mut to_the_left: HashMap<u32, Vec<_>> = HashMap::new();
        for merge in merges {
            let score = score(model, merge.piece);
            to_the_right
                .entry(merge.left)
                .or_default()
                .push((score, merge.right, merge.piece));
            to_the_left
                .entry(merge.right)
                .or_default()
                .push((score, merge.left, merge.piece));
        }
        for list in to_the_right.values_mut().chain(to_the_left.values_mut()) {
            list.sort_by(|a, b| b.0.total_cmp(&a.0));
        }
        Waiting {
            to_the_right,
            to_the_left,
        }
    }

    fn growth(&self, piece: u32, floor: f32) -> Growth {
        let mut growth = Growth::default();
        let mut open = vec![piece];
        while let Some(symbol) = open.pop() {
            if !growth.symbols.insert(symbol) {
                continue;
            }
            for (sides, takes) in [
                (&self.to_the_right, &mut growth.takes_right),
                (&self.to_the_left, &mut growth.takes_left),
            ] {
                let list = sides.get(&symbol).map_or(&[][..], Vec::as_slice);
                for (_, other, made) in list.iter().take_while(|(score, ..)| *score >= floor) {
                    takes.insert(*other);
                    open.push(*made);
                }
            }
        }
        growth
    }

    /// Pairs of a class of which one grows at once when it is made, and could take what the other is made of or grows by.
    /// Cautious: not every such pair can stand in one text.
    fn rivals(&self, class: &[Merge]) -> Conflicts {
        let Some(first) = class.first() else { return Vec::new() };
        let floor = self.score_of(first);
        let growths: Vec<Growth> = class.iter().map(|merge| self.growth(merge.piece, floor)).collect();
        let grows = |index: usize| growths[index].symbols.len() > 1;
        let mut rivals = Vec::new();
        for i in (0..class.len()).filter(|i| grows(*i)) {
            for j in (0..class.len()).filter(|j| *j != i && (!grows(*j) || *j > i)) {
                let both = [(i, j), (j, i)];
                if both
                    .iter()
                    .any(|&(a, b)| growths[a].disturbs(&growths[b], &class[a], &class[b]))
                {
                    rivals.push((class[i].piece, class[j].piece));
                }
            }
        }
        rivals
    }

    fn score_of(&self, merge: &Merge) -> f32 {
        let list = &self.to_the_right[&merge.left];
        list.iter()
            .find(|(_, _, piece)| *piece == merge.piece)
            .map_or(0.0, |entry| entry.0)
    }
}

impl Growth {
    /// Whether this growth, standing left of the other, can meet it.
    fn disturbs(&self, other: &Growth, own: &Merge, others: &Merge) -> bool {
        let meets = |a: &HashSet<u32>, b: &HashSet<u32>| {
            let (small, large) = if a.len() < b.len() { (a, b) } else { (b, a) };
            small.iter().any(|symbol| large.contains(symbol))
        };
        // What we take on our right is the other's first part, the other itself, or what it takes on its left.
        self.takes_right.contains(&others.left)
            || meets(&self.takes_right, &other.symbols)
            || meets(&self.takes_right, &other.takes_left)
            || other.takes_left.contains(&own.right)
            || meets(&other.takes_left, &self.symbols)
            // What we grow to is a part of the other.
            || self.symbols.contains(&others.left)
            || self.symbols.contains(&others.right)
            || other.symbols.contains(&own.left)
            || other.symbols.contains(&own.right)
    }
}

/// The `tokenizer.json` of a model that [`agree`] has seen: text is encoded as SentencePiece does. What the base's file puts
/// around a text stays; without one `<s>` goes in front where special tokens are asked for.
pub(crate) fn tokenizer_json(model: &ModelProto, merges: &[Merge], base: Option<&Value>) -> Value {
    let text = |id: u32| model.pieces[id as usize].text();
    let vocabulary: Map<String, Value> = model
        .pieces
        .iter()
        .enumerate()
        .map(|(id, piece)| (piece.text().to_owned(), json!(id)))
        .collect();
    let merges = merges
        .iter()
        .map(|merge| json!([text(merge.left), text(merge.right)]))
        .collect();
    let of_kind = |kinds: &[Kind]| -> Vec<(usize, String)> {
        let all = model.pieces.iter().enumerate();
        all.filter(|(_, piece)| kinds.contains(&piece.kind()))
            .map(|(id, piece)| (id, piece.text().to_owned()))
            .collect()
    };
    let special = of_kind(&[Kind::Control, Kind::Unknown]);
    let bos = model.trainer.as_ref().map_or(1, |trainer| trainer.bos_id.unwrap_or(1));
    let form = Form {
        dummy_prefix: model
            .normalizer
            .as_ref()
            .is_none_or(|n| n.add_dummy_prefix.unwrap_or(true)),
        unknown: of_kind(&[Kind::Unknown])
            .pop()
            .map_or("<unk>".to_owned(), |(_, text)| text),
        bos: special.iter().find(|(id, _)| *id as i32 == bos).cloned(),
        user_defined: of_kind(&[Kind::UserDefined])
            .into_iter()
            .map(|(_, text)| text)
            .collect(),
    };
    let mut file = llama_pieces::tokenizer_json(vocabulary, merges, special, &form);
    if let Some(base) = base {
        file["post_processor"] = base["post_processor"].clone();
    }
    file
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vocabulary::sentencepiece::proto::{NormalizerSpec, TrainerSpec};

    /// The characters a, b, c and these pieces; no space in front.
    fn model(pieces: &[(String, f32)]) -> ModelProto {
        let characters = ["a", "b", "c"].map(|c| Piece::new(c, -100.0, Kind::Normal));
        let unknown = Piece::new("<unk>", 0.0, Kind::Unknown);
        let mut seen = HashSet::new();
        let pieces = pieces.iter().filter(|(text, _)| seen.insert(text.clone()));
        ModelProto {
            pieces: [unknown]
                .into_iter()
                .chain(characters)
                .chain(pieces.map(|(text, score)| Piece::new(text, *score, Kind::Normal)))
                .collect(),
            trainer: Some(TrainerSpec::default()),
            normalizer: Some(NormalizerSpec {
                add_dummy_prefix: Some(false),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn engine(model: &ModelProto, merges: &[Merge]) -> tokenizers::Tokenizer {
        let file = tokenizer_json(model, merges, None).to_string();
        tokenizers::Tokenizer::from_bytes(file.as_bytes()).unwrap()
    }

    fn agreed(mut model: ModelProto) -> (Encoder, tokenizers::Tokenizer, Vec<u32>) {
        let agreement = agree(&mut model, 4).unwrap();
        (
            Encoder::new(&model),
            engine(&model, &agreement.merges),
            agreement.lowered,
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Few scores and few characters: nearly every piece has rivals, and pieces score above what they are made of.
        #[test]
        fn any_scores_agree(
            pieces in prop::collection::vec(("[abc]{2,5}", 0..6), 1..16),
            texts in prop::collection::vec("[abc]{1,14}", 40),
        ) {
            let pieces: Vec<_> = pieces.into_iter().map(|(text, score)| (text, -(score as f32))).collect();
            let (encoder, engine, _) = agreed(model(&pieces));
            for text in texts {
                let ids = engine.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
                prop_assert_eq!(encoder.encode(&text), ids, "{}", text);
            }
        }
    }

    #[test]
    fn pieces_that_would_each_have_to_be_first_are_told_apart_and_others_keep_their_scores() {
        let pieces = |list: &[(&str, f32)]| list.iter().map(|(t, s)| ((*t).to_owned(), *s)).collect::<Vec<_>>();
        // aba is (ab)a and bab is (ba)b there: no order of two merges does both.
        let (encoder, engine, lowered) = agreed(model(&pieces(&[("ab", -1.0), ("ba", -1.0)])));
        assert_eq!(lowered, [5]);
        for text in ["aba", "bab", "abab", "baba", "bababa"] {
            assert_eq!(encoder.encode(text), engine.encode_fast(text, false).unwrap().get_ids());
        }
        // Here an order does: ab before bc.
        let (encoder, engine, lowered) = agreed(model(&pieces(&[("bc", -1.0), ("ab", -1.0)])));
        assert!(lowered.is_empty());
        assert_eq!(encoder.encode("abc"), [5, 3]);
        assert_eq!(engine.encode_fast("abc", false).unwrap().get_ids(), [5, 3]);
    }

    #[test]
    fn runs_of_one_score_grow_from_the_left_as_llamas_spaces_do() {
        let runs: Vec<_> = (2..=5).map(|n| ("a".repeat(n), -9.0)).collect();
        let (encoder, engine, lowered) = agreed(model(&runs));
        assert!(lowered.is_empty());
        for length in 1..40 {
            let text = "a".repeat(length);
            assert_eq!(
                encoder.encode(&text),
                engine.encode_fast(text.as_str(), false).unwrap().get_ids()
            );
        }
    }

    #[test]
    fn a_base_that_no_order_suits_is_refused() {
        let pieces = [("ab".to_owned(), -1.0), ("ba".to_owned(), -1.0)];
        let said = agree(&mut model(&pieces), 6).err().unwrap();
        assert!(said.contains("its pieces 'ab' and 'ba' have the same score"), "{said}");
    }
}
