//! Forward passes that keep keys and values: what was read once is not read again, by whatever follows it. Any number of
//! sequences share one cache, and what several begin with lies in it once.
//! Axes: n position, s slot of the cache, h head, g key/value head, d dim.

use std::ops::Range;

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::attention::softmax;
use super::gemm::{Into, Matrix, product};
use super::kernels::cpu::{Element, by_kind, dot, exp, largest, sum};
use super::layer::{Layer, Qkv};
use super::linear::Linear;
use super::mlp::{Mlp, Wide};
use super::{Model, thin};
use crate::model::kernels::rotate;
use sharding::vectorized;

/// Keys and values of positions that were read, one a slot, in every layer.
pub struct Cache {
    /// k and v by layer, [s, g, d].
    layers: Vec<[Tensor; 2]>,
    pub slots: usize,
}

/// Tokens to read behind others: a prompt, one more token, the ways in which a text may go on.
#[derive(Clone, Debug)]
pub struct Segment {
    pub ids: Vec<u32>,
    /// What lies before it, in order: slots that were read before, or that a segment before it in the same pass fills.
    pub sees: Vec<Range<usize>>,
    /// Its own first slot; as many follow as it has tokens.
    pub at: usize,
}

impl Segment {
    /// The position of its first token.
    fn position(&self) -> usize {
        self.sees.iter().map(ExactSizeIterator::len).sum()
    }
}

/// How linear maps are computed. The first gives a position the same bits in any company.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    Few,
    Many,
}

impl Cache {
    pub fn new(model: &Model, slots: usize) -> Cache {
        let shape = |layer: &Layer| [slots as i64, layer.kv_heads, layer.head_dim];
        // Zeroed: a slot is read only after it is written, but its memory is touched here, not in the first pass.
        let room = |layer: &Layer| [(); 2].map(|()| Tensor::zeros(shape(layer), (model.kind, model.device)));
        Cache {
            layers: model.layers.iter().map(room).collect(),
            slots,
        }
    }
}

impl Model {
    /// Reads all segments in one pass; what the layers make of every position, in order: [n, d], of the stream's kind.
    /// Segments are not empty and lie within the cache, and none but those that see it shares a slot with another.
    pub fn read(&self, cache: &mut Cache, segments: &[Segment], rows: Rows) -> Tensor {
        let each = || segments.iter();
        for segment in each() {
            assert!(
                !segment.ids.is_empty() && segment.at + segment.ids.len() <= cache.slots,
                "a segment lies within the cache"
            );
        }
        let ids: Vec<i64> = each().flat_map(|s| s.ids.iter().map(|id| i64::from(*id))).collect();
        let positions: Vec<i64> = each()
            .flat_map(|s| (s.position()..s.position() + s.ids.len()).map(|position| position as i64))
            .collect();
        let on = |values: &[i64]| Tensor::from_slice(values).to_device(self.device);
        let (ids_n, positions_n) = (on(&ids), on(&positions));
        let mut x_nd = Tensor::embedding(&self.embedding.value, &ids_n, -1, false, false).to_kind(self.stream);
        if let Some(positions_td) = &self.positions_td {
            x_nd += positions_td.value.index_select(0, &positions_n);
        }
        let angles = self.rotary.as_ref().map(|rotary| rotary.at(&positions_n));
        let reading = Reading { segments, angles, rows };
        for (layer, kept) in self.layers.iter().zip(&mut cache.layers) {
            x_nd = layer.read(x_nd, kept, &reading);
        }
        x_nd
    }

    /// Logits of positions that [`Model::read`] gave, f32: [n, pieces].
    pub fn logits(&self, hidden_nd: &Tensor, rows: Rows) -> Tensor {
        let normed_nd = self.head.norm.forward(hidden_nd);
        let weight_vd = self.head_matrix().value.narrow(0, 0, self.head.pieces);
        match rows {
            Rows::Few if self.device == Device::Cpu => {
                thin::linears(&normed_nd, &[(&weight_vd, None)], Kind::Float).remove(0)
            }
            _ => normed_nd.matmul(&weight_vd.tr()).to_kind(Kind::Float),
        }
    }
}

/// What layers need to know of a pass.
struct Reading<'a> {
    segments: &'a [Segment],
    /// cos and sin of every position, where they are rotary.
    angles: Option<(Tensor, Tensor)>,
    rows: Rows,
}

impl Reading<'_> {
    fn linears<const N: usize>(&self, x_nd: &Tensor, linears: [&Linear; N]) -> [Tensor; N] {
        let plain = |linear: &&Linear| linear.lora.is_none() && linear.fp8.is_none();
        if self.rows == Rows::Few && x_nd.device() == Device::Cpu && linears.iter().all(plain) {
            let maps = linears.map(|l| (&l.weight_oi.value, l.bias_o.as_ref().map(|bias| &bias.value)));
            let mut made = thin::linears(x_nd, &maps, x_nd.kind()).into_iter();
            return linears.map(|_| made.next().expect("one a map"));
        }
        linears.map(|linear| linear.forward(x_nd, None))
    }
}

impl Layer {
    fn read(&self, x_nd: Tensor, kept: &mut [Tensor; 2], reading: &Reading) -> Tensor {
        let normed_nd = self.attention_norm.forward(&x_nd);
        let [q, k, v] = match &self.qkv {
            Qkv::Apart { q, k, v } => reading.linears(&normed_nd, [q, k, v]),
            Qkv::Fused(all) => {
                let [all] = reading.linears(&normed_nd, [all]);
                let third = all.size()[1] / 3;
                [0, 1, 2].map(|which| all.narrow(1, which * third, third).contiguous())
            }
        };
        let by_head = |x: Tensor, heads: i64| x.view([1, -1, heads, self.head_dim]);
        let turned = |mut x_bnhd: Tensor| {
            if let Some((cos, sin)) = &reading.angles {
                rotate(&mut x_bnhd, cos, sin, 1.0);
            }
            x_bnhd
        };
        let q_nhd = turned(by_head(q, self.heads)).squeeze_dim(0);
        let k_ngd = turned(by_head(k, self.kv_heads)).squeeze_dim(0);
        let v_ngd = by_head(v, self.kv_heads).squeeze_dim(0);
        let attended_nhd = attend(&q_nhd, [k_ngd, v_ngd], kept, reading.segments);
        let [attended_nd] = reading.linears(&attended_nhd.view([-1, self.heads * self.head_dim]), [&self.o]);
        let middle_nd = x_nd + attended_nd;

        let normed_nd = self.mlp_norm.forward(&middle_nd);
        let (wide, last) = match &self.mlp {
            Mlp::SwiGlu { gate, up, down } => {
                let [gate_nf, up_nf] = reading.linears(&normed_nd, [gate, up]);
                (Wide::SwiGlu { gate_nf, up_nf }, down)
            }
            Mlp::Gelu { fc, proj, .. } => {
                let [fc_nf] = reading.linears(&normed_nd, [fc]);
                (Wide::Gelu { fc_nf }, proj)
            }
        };
        let [out_nd] = reading.linears(&self.mlp.activate(&wide), [last]);
        middle_nd + out_nd
    }
}

/// softmax(q kᵀ / √d + causal) v of every position over what its segment sees and its segment's tokens up to itself. Puts
/// the new keys and values into their slots first.
fn attend(q_nhd: &Tensor, new: [Tensor; 2], kept: &mut [Tensor; 2], segments: &[Segment]) -> Tensor {
    let mut first = 0;
    for segment in segments {
        let length = segment.ids.len() as i64;
        if q_nhd.device() != Device::Cpu {
            for (kept, new) in kept.iter_mut().zip(&new) {
                let mut slots = kept.narrow(0, segment.at as i64, length);
                slots.copy_(&new.narrow(0, first, length));
            }
        }
        first += length;
    }
    if q_nhd.device() != Device::Cpu {
        return by_tensors(q_nhd, kept, segments);
    }
    by_kind!(q_nhd, on_cpu(q_nhd, &new, kept, segments))
}

/// Segment by segment, in libtorch's operations: for GPUs.
fn by_tensors(q_nhd: &Tensor, kept: &[Tensor; 2], segments: &[Segment]) -> Tensor {
    let mut first = 0;
    let one = |segment: &Segment| {
        let length = segment.ids.len();
        let spans = segment
            .sees
            .iter()
            .cloned()
            .chain(std::iter::once(segment.at..segment.at + length));
        let spans: Vec<(i64, i64)> = spans.map(|span| (span.start as i64, span.len() as i64)).collect();
        let [k, v] = kept.each_ref().map(|kept| {
            let parts: Vec<Tensor> = spans
                .iter()
                .map(|(start, length)| kept.narrow(0, *start, *length))
                .collect();
            Tensor::cat(&parts, 0).transpose(0, 1).unsqueeze(0)
        });
        let keys = k.size()[2];
        let options = (Kind::Bool, q_nhd.device());
        let sees = Tensor::ones([length as i64, keys], options).tril(keys - length as i64);
        let q = q_nhd.narrow(0, first, length as i64).transpose(0, 1).unsqueeze(0);
        first += length as i64;
        let out = Tensor::scaled_dot_product_attention(&q, &k, &v, Some(&sees), 0.0, false, None, true);
        out.squeeze_dim(0).transpose(0, 1)
    };
    let out: Vec<Tensor> = segments.iter().map(one).collect();
    Tensor::cat(&out, 0).contiguous()
}

/// Queries of a task.
const QUERIES: usize = 64;

fn on_cpu<E: Element>(q_nhd: &Tensor, new: &[Tensor; 2], kept: &mut [Tensor; 2], segments: &[Segment]) -> Tensor {
    let (size, groups) = (q_nhd.size(), new[0].size()[1] as usize);
    let (heads, dim) = (size[1] as usize, size[2] as usize);
    let width = groups * dim;
    for (kept, new) in kept.iter_mut().zip(new) {
        let (kept, mut new) = (E::of_mut(kept), E::of(new));
        for segment in segments {
            let length = segment.ids.len() * width;
            kept[segment.at * width..][..length].copy_from_slice(&new[..length]);
            new = &new[length..];
        }
    }
    let (k, v) = (E::of(&kept[0]), E::of(&kept[1]));
    let mut out_nhd = q_nhd.empty_like();
    let (mut q, mut out) = (E::of(q_nhd), E::of_mut(&mut out_nhd));
    let mut tasks = Vec::new();
    for segment in segments {
        let length = segment.ids.len();
        for first in (0..length).step_by(QUERIES) {
            let elements = QUERIES.min(length - first) * heads * dim;
            let (q_here, q_rest) = q.split_at(elements);
            let out_here = out.split_off_mut(..elements).expect("as many as q");
            q = q_rest;
            tasks.push((segment, first, q_here, out_here));
        }
    }
    tasks.into_par_iter().for_each_init(Room::default, |room, task| {
        let (segment, first, q, out) = task;
        let queries = q.len() / (heads * dim);
        let own = segment.at..segment.at + first + queries;
        let spans: Vec<Range<usize>> = segment.sees.iter().cloned().chain([own]).collect();
        let keys: usize = spans.iter().map(ExactSizeIterator::len).sum();
        let shared = heads / groups;
        let rows = queries * shared;
        let scale = 1.0 / (dim as f32).sqrt();
        for group in 0..groups {
            // The heads that share these keys, as rows: query by query.
            room.q.clear();
            for q in q.chunks_exact(heads * dim) {
                room.q.extend(
                    q[group * shared * dim..][..shared * dim]
                        .iter()
                        .map(|x| x.widen() * scale),
                );
            }
            room.scores.resize(rows * keys, 0.0);
            room.out.clear();
            room.out.resize(rows * dim, 0.0);
            let part = Part {
                groups,
                group,
                dim,
                keys,
                spans: &spans,
            };
            if queries == 1 {
                of_one(&part, k, v, room);
            } else {
                part.of_many(k, v, room, keys - queries, shared);
            }
            for (query, rows) in room.out.chunks_exact(shared * dim).enumerate() {
                let out = &mut out[query * heads * dim + group * shared * dim..][..shared * dim];
                out.iter_mut().zip(rows).for_each(|(out, x)| *out = E::round(*x));
            }
        }
    });
    out_nhd
}

/// One key/value head of a task.
struct Part<'a> {
    groups: usize,
    group: usize,
    dim: usize,
    keys: usize,
    spans: &'a [Range<usize>],
}

vectorized! {
    /// The last position: it sees all keys. Read once, in order, for all the heads that share them.
    fn of_one<E: Element>(part: &Part<'_>, k: &[E], v: &[E], room: &mut Room) -> () {
        let Part { groups, group, dim, keys, spans } = *part;
        let Room { q, scores, out, .. } = room;
        let row_of = |slot: usize| (slot * groups + group) * dim..(slot * groups + group + 1) * dim;
        let slots = || spans.iter().cloned().flatten();
        for (key, slot) in slots().enumerate() {
            let k = &k[row_of(slot)];
            for (row, q) in q.chunks_exact(dim).enumerate() {
                scores[row * keys + key] = dot(q, k);
            }
        }
        for scores in scores.chunks_exact_mut(keys) {
            let most = largest(scores);
            scores.iter_mut().for_each(|x| *x = exp(*x - most));
            let share = 1.0 / sum(scores, |x| x);
            scores.iter_mut().for_each(|x| *x *= share);
        }
        for (key, slot) in slots().enumerate() {
            let v = &v[row_of(slot)];
            for (row, out) in out.chunks_exact_mut(dim).enumerate() {
                let p = scores[row * keys + key];
                out.iter_mut().zip(v).for_each(|(out, v)| *out += p * v.widen());
            }
        }
    }
}

impl Part<'_> {
    /// Query i of each head sees `before` + i + 1 keys.
    fn of_many<E: Element>(&self, k: &[E], v: &[E], room: &mut Room, before: usize, shared: usize) {
        let Part { dim, keys, spans, .. } = *self;
        let rows = room.q.len() / dim;
        let mut column = 0;
        for span in spans {
            let k = self.matrix(k, span, &mut room.widened);
            let into = Into {
                values: &mut room.scores[column..],
                stride: keys,
                add: false,
            };
            product(Matrix::new(&room.q, rows, dim, dim), k.t(), 1.0, into);
            column += span.len();
        }
        for (row, scores) in room.scores.chunks_exact_mut(keys).enumerate() {
            softmax(scores, before + row / shared + 1);
        }
        let mut column = 0;
        for span in spans {
            let v = self.matrix(v, span, &mut room.widened);
            let into = Into {
                values: &mut room.out,
                stride: dim,
                add: column > 0,
            };
            let p = Matrix::new(&room.scores[column..], rows, span.len(), keys);
            product(p, v, 1.0, into);
            column += span.len();
        }
    }

    /// The slots' keys or values: in place, or widened into `room`.
    fn matrix<'m, E: Element>(&self, x: &'m [E], span: &Range<usize>, room: &'m mut Vec<f32>) -> Matrix<'m> {
        let (width, dim) = (self.groups * self.dim, self.dim);
        let x = &x[span.start * width + self.group * dim..];
        if let Some(plain) = E::plain(x) {
            return Matrix::new(plain, span.len(), dim, width);
        }
        room.clear();
        for row in x.chunks(width).take(span.len()) {
            room.extend(row[..dim].iter().map(|x| x.widen()));
        }
        Matrix::new(room, span.len(), dim, dim)
    }
}

/// What a thread keeps from task to task.
#[derive(Default)]
struct Room {
    q: Vec<f32>,
    widened: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
}
