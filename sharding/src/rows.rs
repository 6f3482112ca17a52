//! A matrix of which a batch names few rows travels as rows: the embedding's gradient, which has a row for every piece; and
//! the embedding itself where a forward pass would have to wait for all of it.

use configs::planner::traffic::FEW_ROWS;
use tch::{Device, Kind, Tensor};

use crate::adamw::RowGradient;
use crate::layout::Bucket;
use crate::memory::{bf16s, f32s, f32s_mut, i64s};
use crate::{Comm, Pending, Result, Wire};

/// One reduction's exchange, as every rank knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RowPlan {
    /// Rows that this rank's gradient touches, ascending.
    rows: Vec<i64>,
    /// `counts[from][to]`: rows that rank `from` sends to `to`. A row that two slices share goes to both.
    counts: Vec<Vec<usize>>,
    /// As `counts`, elements: fewer than rows × width where a slice begins or ends within a row.
    elements: Vec<Vec<usize>>,
}

/// Bytes of a row's number on the wire.
const NUMBER_BYTES: usize = 8;

/// When a gradient's rows travel; all ranks decide from the same counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// Instead of the whole gradient, where that is more bytes.
    Instead(Wire),
    /// Behind a whole gradient of the same matrix which is on its way already, where they are few beside it.
    Behind,
}

/// Whether every rank's rows are few: at most one of [`FEW_ROWS`] of their matrix's. `counts` as in [`RowPlan`]; a row that goes to several ranks counts for each.
fn few(counts: &[Vec<usize>], bucket: &Bucket) -> bool {
    let of_rank = |to: &Vec<usize>| to.iter().sum::<usize>();
    let most = counts.iter().map(of_rank).max().unwrap_or(0);
    FEW_ROWS * most * width(bucket) <= bucket.numel * copies(bucket, counts.len())
}

/// How many ranks a slice goes to: all where there is one only.
fn copies(bucket: &Bucket, world: usize) -> usize {
    if bucket.slice_len == bucket.padded { world } else { 1 }
}

/// The slice that a rank sums: its own, or the only one.
pub(crate) fn slice_of(bucket: &Bucket, rank: usize) -> usize {
    if bucket.slice_len == bucket.padded { 0 } else { rank }
}

/// For each of a step's reductions the rows to send, or `None` where the gradient travels whole. `rows` are this rank's,
/// ascending, one list a reduction.
pub(crate) fn plan(comm: &dyn Comm, bucket: &Bucket, when: When, rows: Vec<Vec<i64>>) -> Result<Vec<Option<RowPlan>>> {
    let world = comm.world();
    let mine: Vec<u64> = rows
        .iter()
        .flat_map(|rows| (0..world).flat_map(|to| told(bucket, to, rows)))
        .collect();
    let bytes: Vec<u8> = mine.iter().flat_map(|count| count.to_le_bytes()).collect();
    let all = comm.all_gather_bytes(&bytes)?;
    let count = |from: usize, reduction: usize, to: usize, which: usize| {
        let at = ((reduction * world + to) * 2 + which) * 8;
        u64::from_le_bytes(all[from][at..at + 8].try_into().expect("8 bytes")) as usize
    };
    let plans = rows.into_iter().enumerate().map(|(reduction, rows)| {
        let all = |which: usize| -> Vec<Vec<usize>> {
            let from_to = |from| (0..world).map(move |to| count(from, reduction, to, which)).collect();
            (0..world).map(from_to).collect()
        };
        let (counts, elements) = (all(0), all(1));
        let as_rows = match when {
            When::Instead(wire) => pays(between(&counts), between(&elements), bucket, world, wire),
            When::Behind => few(&counts, bucket),
        };
        as_rows.then_some(RowPlan { rows, counts, elements })
    });
    Ok(plans.collect())
}

/// Rows, and their elements, that a rank with these rows sends to `to`.
fn told(bucket: &Bucket, to: usize, rows: &[i64]) -> [u64; 2] {
    let slice = slice_of(bucket, to);
    let rows = rows_of_slice(bucket, slice, rows);
    let elements: usize = rows.iter().map(|row| part(bucket, slice, *row).len()).sum();
    [rows.len() as u64, elements as u64]
}

/// What goes from one rank to another, in all.
fn between(counts: &[Vec<usize>]) -> usize {
    let sent = counts
        .iter()
        .enumerate()
        .map(|(from, to)| to.iter().sum::<usize>() - to[from]);
    sent.sum()
}

/// Whether sending so many rows and elements of them between ranks, all ranks' together, moves fewer bytes than sending whole
/// slices.
fn pays(rows: usize, elements: usize, bucket: &Bucket, world: usize, wire: Wire) -> bool {
    let dense = world * (world - 1) * bucket.slice_len * wire.bytes();
    rows * NUMBER_BYTES + elements * wire.bytes() < dense
}

/// Elements of a row.
fn width(bucket: &Bucket) -> usize {
    bucket.params[0].shape[1..].iter().product::<i64>() as usize
}

/// Those of `rows`, ascending, of which slice `index` holds a part.
fn rows_of_slice<'a>(bucket: &Bucket, index: usize, rows: &'a [i64]) -> &'a [i64] {
    let (slice, width) = (bucket.slice(index), width(bucket));
    if slice.is_empty() {
        return &[];
    }
    let first = rows.partition_point(|row| (*row as usize + 1) * width <= slice.start);
    let end = rows.partition_point(|row| (*row as usize) * width < slice.end);
    &rows[first..end]
}

/// The elements of `row` that lie in slice `index`, in bucket coordinates.
fn part(bucket: &Bucket, index: usize, row: i64) -> std::ops::Range<usize> {
    let (slice, width) = (bucket.slice(index), width(bucket));
    let start = row as usize * width;
    start.max(slice.start)..(start + width).min(slice.end)
}

/// Rows on their way to the ranks that own them.
pub(crate) struct Arriving {
    numbers: Tensor,
    values: Tensor,
    pending: [Pending; 2],
}

/// Some rows of a matrix: their numbers, ascending, and [rows, width].
pub(crate) struct Rows {
    pub(crate) numbers: Vec<i64>,
    pub(crate) values: Tensor,
}

impl Rows {
    /// Rows of zeros, f32.
    pub(crate) fn zeros(bucket: &Bucket, numbers: Vec<i64>) -> Result<Rows> {
        let shape = [numbers.len() as i64, width(bucket) as i64];
        let values = Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?;
        Ok(Rows { numbers, values })
    }

    /// Rows of the matrix whose f32 values `theta` holds whole, in `kind`.
    pub(crate) fn read(bucket: &Bucket, theta: &Tensor, kind: Kind, numbers: &[i64]) -> Result<Rows> {
        let matrix = theta.narrow(0, 0, bucket.numel as i64).view([-1, width(bucket) as i64]);
        let values = matrix
            .f_index_select(0, &Tensor::from_slice(numbers))?
            .f_to_kind(kind)?;
        let numbers = numbers.to_vec();
        Ok(Rows { numbers, values })
    }

    pub(crate) fn gradient(&self) -> RowGradient<'_> {
        RowGradient {
            numbers: &self.numbers,
            values: f32s(&self.values),
            width: self.values.size()[1] as usize,
        }
    }

    /// Where among these rows each of `ids` stands; all of them are here.
    pub(crate) fn places(&self, ids: &Tensor) -> Tensor {
        let place = |id: &i64| self.numbers.binary_search(id).expect("the step named its rows") as i64;
        let places: Vec<i64> = i64s(ids).iter().map(place).collect();
        Tensor::from_slice(&places).view_as(ids)
    }
}

impl RowPlan {
    pub(crate) fn rows(&self) -> &[i64] {
        &self.rows
    }
}

/// The distinct numbers in some ids, ascending.
pub(crate) fn unique(ids: &[&Tensor]) -> Vec<i64> {
    let mut rows: Vec<i64> = ids.iter().flat_map(|ids| i64s(ids).iter().copied()).collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// The `wanted` rows, ascending, of the matrix whose slices the ranks hold in f32, in `kind`; `None` where some rank wants
/// many. All ranks call it, each for rows of its own; returns when they are here.
pub(crate) fn fetch(
    comm: &dyn Comm,
    bucket: &Bucket,
    theta: &Tensor,
    kind: Kind,
    wanted: Vec<i64>,
) -> Result<Option<Rows>> {
    let (rank, world) = (comm.rank(), comm.world());
    let mine: Vec<&[i64]> = (0..world).map(|owner| rows_of_slice(bucket, owner, &wanted)).collect();
    let words: Vec<u8> = mine.iter().flat_map(|rows| (rows.len() as u64).to_le_bytes()).collect();
    let all = comm.all_gather_bytes(&words)?;
    let count = |word: &[u8]| u64::from_le_bytes(word.try_into().expect("8 bytes")) as usize;
    let counts: Vec<Vec<usize>> = all
        .iter()
        .map(|words| words.chunks_exact(8).map(count).collect())
        .collect();
    if !few(&counts, bucket) {
        return Ok(None);
    }
    let asked: Vec<usize> = counts.iter().map(|of| of[rank]).collect();
    let mut their_numbers = Tensor::f_zeros([asked.iter().sum::<usize>() as i64], (Kind::Int64, Device::Cpu))?;
    let numbers = Tensor::from_slice(&mine.concat());
    comm.all_to_all(&numbers, &counts[rank], &mut their_numbers, &asked)?
        .wait()?;

    let start = bucket.slice(rank).start;
    let (mut send, mut send_counts) = (Vec::new(), Vec::new());
    let mut their_numbers = i64s(&their_numbers).iter();
    for asked in &asked {
        let before = send.len();
        for row in their_numbers.by_ref().take(*asked) {
            let part = part(bucket, rank, *row);
            send.extend_from_slice(&f32s(theta)[part.start - start..part.end - start]);
        }
        send_counts.push(send.len() - before);
    }
    let elements = |owner: usize| mine[owner].iter().map(|row| part(bucket, owner, *row).len()).sum();
    let receive_counts: Vec<usize> = (0..world).map(elements).collect();
    let mut received = Tensor::f_zeros([receive_counts.iter().sum::<usize>() as i64], (kind, Device::Cpu))?;
    let send = Tensor::from_slice(&send).f_to_kind(kind)?;
    comm.all_to_all(&send, &send_counts, &mut received, &receive_counts)?
        .wait()?;

    // Exact both ways: these values had this precision.
    let received = received.f_to_kind(Kind::Float)?;
    let mut received = f32s(&received);
    let mut rows = Rows::zeros(bucket, wanted)?;
    let (numbers, width) = (&rows.numbers, width(bucket));
    let values = f32s_mut(&mut rows.values);
    for owner in 0..world {
        let first = numbers.partition_point(|row| (*row as usize + 1) * width <= bucket.slice(owner).start);
        for (at, row) in rows_of_slice(bucket, owner, numbers).iter().enumerate() {
            let part = part(bucket, owner, *row);
            let to = (first + at) * width + part.start - *row as usize * width;
            let (here, rest) = received.split_at(part.len());
            values[to..to + part.len()].copy_from_slice(here);
            received = rest;
        }
    }
    rows.values = rows.values.f_to_kind(kind)?;
    Ok(Some(rows))
}

/// Starts sending this rank's rows to their owners. `grads` are the whole flat gradient, or `only` the plan's rows of it.
pub(crate) fn start(
    comm: &dyn Comm,
    bucket: &Bucket,
    plan: &RowPlan,
    grads: &Tensor,
    only: bool,
    wire: Wire,
) -> Result<Arriving> {
    let (rank, world, width) = (comm.rank(), comm.world(), width(bucket));
    let elements = f32s(grads);
    let (mut numbers, mut values) = (Vec::new(), Vec::new());
    for to in 0..world {
        let slice = slice_of(bucket, to);
        let rows = rows_of_slice(bucket, slice, &plan.rows);
        numbers.extend_from_slice(rows);
        let first = rows
            .first()
            .map_or(0, |row| plan.rows.partition_point(|other| other < row));
        for (at, row) in rows.iter().enumerate() {
            let part = part(bucket, slice, *row);
            // The row's place among those that are there, instead of in the matrix.
            let moved = if only { (*row as usize - first - at) * width } else { 0 };
            values.extend_from_slice(&elements[part.start - moved..part.end - moved]);
        }
    }
    let kind = match wire {
        Wire::F32 => Kind::Float,
        Wire::Bf16 => Kind::BFloat16,
    };
    let values = Tensor::from_slice(&values).f_to_kind(kind)?;
    let to_here = |counts: &[Vec<usize>]| -> Vec<usize> { counts.iter().map(|to| to[rank]).collect() };
    let received = to_here(&plan.counts);
    let mut their_numbers = Tensor::f_zeros([received.iter().sum::<usize>() as i64], (Kind::Int64, Device::Cpu))?;
    let sent_numbers = comm.all_to_all(
        &Tensor::from_slice(&numbers),
        &plan.counts[rank],
        &mut their_numbers,
        &received,
    )?;
    let received = to_here(&plan.elements);
    let mut their_values = Tensor::f_zeros([received.iter().sum::<usize>() as i64], (kind, Device::Cpu))?;
    let sent_values = comm.all_to_all(&values, &plan.elements[rank], &mut their_values, &received)?;
    Ok(Arriving {
        numbers: their_numbers,
        values: their_values,
        pending: [sent_numbers, sent_values],
    })
}

impl Arriving {
    pub(crate) fn is_over(&self) -> bool {
        self.pending.iter().all(Pending::is_over)
    }

    /// Waits, and adds what came to this rank's slice, rank by rank: the sums of whole slices, without their zeros.
    pub(crate) fn add_to(self, bucket: &Bucket, rank: usize, mine: &mut Tensor) -> Result<()> {
        self.pending.into_iter().try_for_each(Pending::wait)?;
        let rank = slice_of(bucket, rank);
        let start = bucket.slice(rank).start;
        let mine = f32s_mut(mine);
        let mut at = 0;
        for row in i64s(&self.numbers) {
            let part = part(bucket, rank, *row);
            let sums = &mut mine[part.start - start..part.end - start];
            let values = at..at + part.len();
            at = values.end;
            if self.values.kind() == Kind::Float {
                sums.iter_mut()
                    .zip(&f32s(&self.values)[values])
                    .for_each(|(sum, value)| *sum += value);
            } else {
                let values = &bf16s(&self.values)[values];
                sums.iter_mut()
                    .zip(values)
                    .for_each(|(sum, value)| *sum += value.to_f32());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BucketSpec, Layout, ParamSpec};

    fn bucket(rows: i64, width: i64, n_slices: usize) -> Bucket {
        let spec = BucketSpec {
            name: "embedding".into(),
            params: vec![ParamSpec {
                name: "embed".into(),
                shape: vec![rows, width],
                group: 0,
            }],
        };
        Layout::new(&[spec], n_slices).buckets.remove(0)
    }

    #[test]
    fn slices_share_the_rows_between_them_and_nothing_is_left_out() {
        for (rows, width, n_slices) in [(7, 3, 1), (50, 5, 3), (97, 32, 4), (9, 4, 4)] {
            let bucket = bucket(rows, width, n_slices);
            let all: Vec<i64> = (0..rows).collect();
            let mut covered = vec![0; (rows * width) as usize];
            for index in 0..n_slices {
                for row in rows_of_slice(&bucket, index, &all) {
                    let part = part(&bucket, index, *row);
                    assert!(!part.is_empty(), "row {row} has something in slice {index}");
                    part.for_each(|element| covered[element] += 1);
                }
            }
            assert!(
                covered.iter().all(|count| *count == 1),
                "{rows} × {width} in {n_slices}"
            );
        }
    }

    #[test]
    fn few_rows_travel_as_rows_and_many_as_slices() {
        let bucket = bucket(1000, 64, 2);
        let pays = |rows, wire| pays(rows, rows * 64, &bucket, 2, wire);
        // Two half matrices are 256,000 bytes, a row and its number 264.
        assert!(pays(500, Wire::F32) && pays(969, Wire::F32) && !pays(970, Wire::F32));
        // In bf16 128,000 and 136.
        assert!(pays(941, Wire::Bf16) && !pays(942, Wire::Bf16));
    }
}
