//! SentencePiece's BPE segmentation, exactly: best score first, the leftmost among equals. What everything is tested against.
//! Source: google/sentencepiece, bpe_model.cc (`Model::SampleEncode` without sampling) and normalizer.cc.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;

use crate::vocabulary::sentencepiece::proto::{Kind, ModelProto};

/// SentencePiece's stand-in for the space.
pub(crate) const SPACE: char = '▁';

/// A BPE model with SentencePiece's semantics, ready to encode from any thread.
pub(crate) struct Encoder {
    /// Pieces that merging can make, or that are there from the start: NORMAL and USER_DEFINED ones.
    known: HashMap<String, u32>,
    /// By id.
    scores: Vec<f32>,
    kinds: Vec<Kind>,
    /// The ids of `<0x00>` … `<0xFF>`; none where there is no byte fallback.
    bytes: Option<Box<[u32; 256]>>,
    unknown: u32,
    dummy_prefix: bool,
    user_defined: UserDefined,
}

/// Pieces that stand for themselves wherever their string does, longest first at each place.
#[derive(Default)]
struct UserDefined {
    /// By first character, longest first.
    strings: HashMap<char, Vec<String>>,
}

/// A run of the text that is one symbol for now. Symbols are a doubly linked list; one that was merged into its left
/// neighbour is empty.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    previous: Option<usize>,
    next: Option<usize>,
    /// User-defined: merges with nothing.
    frozen: bool,
}

/// Two neighbours that could merge. The greatest is next: best score, then leftmost.
#[derive(PartialEq)]
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both; if their sum has changed, one of them has merged elsewhere.
    len: usize,
}

impl Eq for Candidate {}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.score
            .total_cmp(&other.score)
            .then(Reverse(self.left).cmp(&Reverse(other.left)))
    }
}

impl Encoder {
    /// The model must have passed [`check`](super::check).
    pub fn new(model: &ModelProto) -> Encoder {
        let mut known = HashMap::with_capacity(model.pieces.len());
        let mut bytes = Vec::new();
        let mut unknown = 0;
        let mut user_defined = UserDefined::default();
        for (id, piece) in (0..).zip(&model.pieces) {
            match piece.kind() {
                Kind::Normal => {
                    known.insert(piece.text().to_owned(), id);
                }
                Kind::UserDefined => {
                    known.insert(piece.text().to_owned(), id);
                    user_defined.add(piece.text());
                }
                Kind::Byte => bytes.push(id),
                Kind::Unknown => unknown = id,
                Kind::Control | Kind::Unused => {}
            }
        }
        let falls_back = model.trainer.as_ref().is_some_and(|t| t.byte_fallback.unwrap_or(false));
        let normalizer = model.normalizer.clone().unwrap_or_default();
        Encoder {
            known,
            scores: model.pieces.iter().map(|piece| piece.score_or_zero()).collect(),
            kinds: model.pieces.iter().map(|piece| piece.kind()).collect(),
            bytes: bytes.try_into().ok().map(Box::new).filter(|_| falls_back),
            unknown,
            dummy_prefix: normalizer.add_dummy_prefix.unwrap_or(true),
            user_defined,
        }
    }

    /// The ids of a text.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let text = self.normalized(text);
        let mut ids = Vec::new();
        for span in self.merged(&text, 0) {
            let symbol = &text[span];
            match self.known(symbol) {
                Some(id) => ids.push(id),
                None => self.fall_back(symbol, &mut ids),
            }
        }
        ids
    }

    /// The text as the pieces see it: spaces are ▁, and one more stands in front.
    pub fn normalized(&self, text: &str) -> String {
        let mut normalized = String::with_capacity(text.len() + text.len() / 4 + 3);
        if self.dummy_prefix && !text.is_empty() {
            normalized.push(SPACE);
        }
        text.chars()
            .for_each(|c| normalized.push(if c == ' ' { SPACE } else { c }));
        normalized
    }

    /// Merges a normalised text until `enough` symbols are left, or nothing more can merge. Each merge takes one symbol
    /// away, so that a state is known by how many there are.
    pub fn merged(&self, text: &str, enough: usize) -> Vec<Range<usize>> {
        let mut symbols = self.first_symbols(text);
        let mut agenda = BinaryHeap::new();
        let offer =
            |agenda: &mut BinaryHeap<Candidate>, symbols: &[Symbol], left: Option<usize>, right: Option<usize>| {
                let (Some(left), Some(right)) = (left, right) else {
                    return;
                };
                let (a, b) = (&symbols[left], &symbols[right]);
                if a.frozen || b.frozen {
                    return;
                }
                let len = a.len + b.len;
                if let Some(id) = self.known.get(&text[a.start..a.start + len]) {
                    let score = self.scores[*id as usize];
                    agenda.push(Candidate {
                        score,
                        left,
                        right,
                        len,
                    });
                }
            };
        for right in 1..symbols.len() {
            offer(&mut agenda, &symbols, Some(right - 1), Some(right));
        }
        let mut count = symbols.len();
        while count > enough {
            let Some(Candidate { left, right, len, .. }) = agenda.pop() else {
                break;
            };
            let (a, b) = (symbols[left], symbols[right]);
            if a.len == 0 || b.len == 0 || a.len + b.len != len {
                continue;
            }
            symbols[left].len = len;
            symbols[left].next = b.next;
            symbols[right].len = 0;
            if let Some(next) = b.next {
                symbols[next].previous = Some(left);
            }
            count -= 1;
            offer(&mut agenda, &symbols, a.previous, Some(left));
            offer(&mut agenda, &symbols, Some(left), b.next);
        }
        symbols
            .into_iter()
            .filter(|symbol| symbol.len > 0)
            .map(|symbol| symbol.start..symbol.start + symbol.len)
            .collect()
    }

    /// The piece with this string, if it is one that text is made of.
    pub fn known(&self, piece: &str) -> Option<u32> {
        self.known.get(piece).copied()
    }

    /// The bytes of a character that no piece has.
    pub fn fall_back(&self, text: &str, ids: &mut Vec<u32>) {
        match &self.bytes {
            Some(bytes) => ids.extend(text.bytes().map(|byte| bytes[byte as usize])),
            None => ids.push(self.unknown),
        }
    }

    /// The two symbols whose merge makes a piece: its own string, merged until two are left. Whatever stands around it,
    /// no other two can: before the piece is there no merge has crossed its borders, so that inside them everything went
    /// as it goes here. A piece for which there are no such two never occurs.
    pub fn parts<'a>(&self, piece: &'a str) -> Option<(&'a str, &'a str)> {
        match &self.merged(piece, 2)[..] {
            [left, right] if self.can_merge(piece, left) => Some((&piece[left.clone()], &piece[right.clone()])),
            _ => None,
        }
    }

    /// Two symbols that together are `piece` merge if it is a piece and neither is user-defined.
    fn can_merge(&self, piece: &str, left: &Range<usize>) -> bool {
        let frozen = |part: &str| {
            self.known(part)
                .is_some_and(|id| self.kinds[id as usize] == Kind::UserDefined)
        };
        self.known(piece).is_some() && !frozen(&piece[left.clone()]) && !frozen(&piece[left.end..])
    }

    fn first_symbols(&self, text: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = Vec::new();
        let mut start = 0;
        while let Some(c) = text[start..].chars().next() {
            let user_defined = self.user_defined.at(&text[start..], c);
            let index = symbols.len();
            symbols.push(Symbol {
                start,
                len: user_defined.unwrap_or(c.len_utf8()),
                previous: index.checked_sub(1),
                next: Some(index + 1),
                frozen: user_defined.is_some(),
            });
            start += symbols[index].len;
        }
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        symbols
    }
}

impl UserDefined {
    fn add(&mut self, string: &str) {
        let Some(first) = string.chars().next() else { return };
        let same = self.strings.entry(first).or_default();
        let place = same.partition_point(|other| other.len() >= string.len());
        same.insert(place, string.to_owned());
    }

    /// The length of the longest one that the text begins with.
    fn at(&self, text: &str, first: char) -> Option<usize> {
        let strings = self.strings.get(&first)?;
        strings
            .iter()
            .find(|string| text.starts_with(string.as_str()))
            .map(String::len)
    }
}
