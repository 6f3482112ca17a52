//! The last stage: final norm, vocabulary matrix and cross-entropy, chunk by chunk. Whole logits never exist.
//! Axes: n target positions, v vocabulary, d dim.

use configs::planner::memory::{equal_chunk, most_in_chunk};
use tch::{Device, Kind, Tensor};

use super::Weight;
use super::kernels::{cross_entropy, nll};
use super::norm::Norm;

/// A position whose next token is not known or not to be learned.
pub const IGNORE: i64 = -1;

pub struct Head {
    pub norm: Norm,
    /// Pieces; rows of the matrix beyond it are padding and get no probability.
    pub pieces: i64,
    /// Of the matrix, which is not always here.
    pub rows: i64,
    /// On CPUs, where the logits of one chunk lie after the other, step after step. In a worker's heap, which maps nothing apart, what
    /// is freed of this size is soon too small for the next by the few bytes of a small tensor, and the heap grows by another.
    pub room: Option<Tensor>,
}

pub struct Loss {
    /// Σ −ln p(target), nats, over this micro-batch's targets.
    pub nll: f64,
    pub d_hidden_btd: Tensor,
}

impl Head {
    /// What the head's stage reads: its norm, and `matrix`.
    pub fn weights_mut<'a>(&'a mut self, matrix: &'a mut Weight) -> Vec<&'a mut Weight> {
        self.norm.weights_mut().chain([matrix]).collect()
    }

    /// Loss and its gradients, scaled by 1 / `n_targets` (targets of the global batch). Adds to the gradients of `weight` and
    /// of the norm.
    pub fn loss(&mut self, weight: &mut Weight, hidden_btd: &Tensor, targets_bt: &Tensor, n_targets: f64) -> Loss {
        let dim = *hidden_btd.size().last().expect("three axes");
        let hidden_nd = hidden_btd.view([-1, dim]);
        let positions = known_positions(targets_bt);
        if positions.numel() == 0 {
            // All prompt or padding.
            return Loss {
                nll: 0.0,
                d_hidden_btd: hidden_btd.zeros_like(),
            };
        }
        let targets_n = targets_bt.view([-1]).index_select(0, &positions);
        let unnormed_nd = hidden_nd.index_select(0, &positions);
        let normed_nd = self.norm.forward(&unnormed_nd);
        let mut nll_n = Vec::new();
        let mut d_normed = Vec::new();
        let most = most_positions(targets_bt.numel(), &weight.value);
        for (start, length) in chunks(targets_n.numel(), most) {
            let h_nd = normed_nd.narrow(0, start, length);
            let mut logits_nv = self.logits(&h_nd, &weight.value, most);
            let targets_n = targets_n.narrow(0, start, length);
            nll_n.push(cross_entropy(&mut logits_nv, self.pieces, &targets_n));

            // Not logits any more. 1 / n_targets is applied to the small operands instead.
            let d_logits_nv = logits_nv;
            d_normed.push(d_logits_nv.matmul(&weight.value) * (1.0 / n_targets));
            if weight.grad.is_some() {
                weight.accumulate_product(&d_logits_nv.tr(), &(h_nd * (1.0 / n_targets)));
            }
        }
        let d_normed_nd = Tensor::cat(&d_normed, 0);
        let d_unnormed_nd = self.norm.backward(&unnormed_nd, &d_normed_nd, None);
        let d_hidden_nd = hidden_nd.zeros_like().index_copy(0, &positions, &d_unnormed_nd);
        Loss {
            nll: Tensor::cat(&nll_n, 0).sum(Kind::Double).double_value(&[]),
            d_hidden_btd: d_hidden_nd.view_as(hidden_btd),
        }
    }

    /// A chunk's logits [n, rows]; no chunk has more than `most` positions. With the matrix's padding: rows that begin at
    /// multiples of 128 bytes are what GPUs' GEMMs are quick with.
    fn logits(&mut self, h_nd: &Tensor, weight: &Tensor, most: usize) -> Tensor {
        if weight.device() != Device::Cpu {
            return h_nd.matmul(&weight.tr());
        }
        let (n, most) = (h_nd.size()[0], most as i64);
        let fits = |room: &Tensor| room.kind() == weight.kind() && room.size()[0] >= most;
        let room = self.room.take().filter(fits);
        // What no chunk fills of it is never touched and takes no memory.
        let room = room.unwrap_or_else(|| Tensor::empty([most, weight.size()[0]], (weight.kind(), Device::Cpu)));
        let logits_nv = h_nd.matmul_out(&room.narrow(0, 0, n), &weight.tr());
        self.room = Some(room);
        logits_nv
    }

    /// −ln p(target) of every position, f32, 0 where the target is [`IGNORE`]; the shape of `targets_bt`.
    pub fn nll(&self, weight: &Weight, hidden_btd: &Tensor, targets_bt: &Tensor) -> Tensor {
        let dim = *hidden_btd.size().last().expect("three axes");
        let positions = known_positions(targets_bt);
        let targets_n = targets_bt.view([-1]).index_select(0, &positions);
        let unnormed_nd = hidden_btd.view([-1, dim]).index_select(0, &positions);
        let normed_nd = self.norm.forward(&unnormed_nd);
        let most = most_positions(targets_bt.numel(), &weight.value);
        let chunks = chunks(targets_n.numel(), most).map(|(start, length)| {
            let logits_nv = normed_nd.narrow(0, start, length).matmul(&weight.value.tr());
            let targets_n = targets_n.narrow(0, start, length);
            nll(&logits_nv, self.pieces, &targets_n).to_kind(Kind::Float)
        });
        let chunks: Vec<Tensor> = chunks.collect();
        if chunks.is_empty() {
            return targets_bt.zeros_like().to_kind(Kind::Float);
        }
        let nll_n = Tensor::cat(&chunks, 0);
        let zeros = Tensor::zeros([targets_bt.numel() as i64], (Kind::Float, hidden_btd.device()));
        zeros.index_copy(0, &positions, &nll_n).view_as(targets_bt)
    }

    /// Whole logits [b, t, pieces]: for comparisons with other programs only.
    pub fn whole_logits(&self, weight: &Weight, hidden_btd: &Tensor) -> Tensor {
        let normed = self.norm.forward(hidden_btd);
        normed
            .matmul(&weight.value.narrow(0, 0, self.pieces).tr())
            .to_kind(Kind::Float)
    }
}

/// Positions of a chunk at most, in a micro-batch of `n`.
fn most_positions(n: usize, weight: &Tensor) -> usize {
    let device = match weight.device() {
        Device::Cpu => configs::Device::Cpu,
        _ => configs::Device::Cuda,
    };
    most_in_chunk(n, weight.size()[0] as usize, weight.kind().elt_size_in_bytes(), device)
}

/// (start, length) of equal chunks over `n` positions.
fn chunks(n: usize, most: usize) -> impl Iterator<Item = (i64, i64)> {
    let length = equal_chunk(n, most);
    let starts = (0..n).step_by(length);
    starts.map(move |start| (start as i64, length.min(n - start) as i64))
}

fn known_positions(targets_bt: &Tensor) -> Tensor {
    targets_bt.view([-1]).not_equal(IGNORE).nonzero().view([-1])
}
