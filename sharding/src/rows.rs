//! A gradient that touches few rows of its matrix travels as rows. The first bucket's: the embedding's gradient has a row for
//! every piece, and a step's batch names few of them.

use tch::{Device, Kind, Tensor};

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

/// For each of a step's reductions the rows to send, or `None` where the whole gradient is fewer bytes. `rows` are this
/// rank's, ascending, one list a reduction; all ranks decide from the same counts.
pub(crate) fn plan(comm: &dyn Comm, bucket: &Bucket, wire: Wire, rows: Vec<Vec<i64>>) -> Result<Vec<Option<RowPlan>>> {
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
        pays(between(&counts), between(&elements), bucket, world, wire).then_some(RowPlan { rows, counts, elements })
    });
    Ok(plans.collect())
}

/// Rows, and their elements, that a rank with these rows sends to `to`.
fn told(bucket: &Bucket, to: usize, rows: &[i64]) -> [u64; 2] {
    let rows = rows_of_slice(bucket, to, rows);
    let elements: usize = rows.iter().map(|row| part(bucket, to, *row).len()).sum();
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

/// Starts sending this rank's rows of `grads` to their owners.
pub(crate) fn start(comm: &dyn Comm, bucket: &Bucket, plan: &RowPlan, grads: &Tensor, wire: Wire) -> Result<Arriving> {
    let (rank, world) = (comm.rank(), comm.world());
    let elements = f32s(grads);
    let (mut numbers, mut values) = (Vec::new(), Vec::new());
    for to in 0..world {
        let rows = rows_of_slice(bucket, to, &plan.rows);
        numbers.extend_from_slice(rows);
        rows.iter()
            .for_each(|row| values.extend_from_slice(&elements[part(bucket, to, *row)]));
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
