//! A matrix of which a batch names few rows travels as rows: the embedding's gradient, which has a row for every piece; and
//! the embedding itself where a forward pass would have to wait for all of it.

use std::ops::Range;

use configs::planner::traffic::FEW_ROWS;
use tch::{Device, Kind, Tensor};

use crate::adamw::RowGradient;
use crate::layout::Bucket;
use crate::memory::{f32s, i64s};
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

/// Whether no rank sends or receives more than one of [`FEW_ROWS`] of the matrix's rows. `counts` as in [`RowPlan`], or as many the other
/// way; a row that goes to several ranks counts for each.
fn few(counts: &[Vec<usize>], bucket: &Bucket) -> bool {
    let most = busiest(counts.len(), |from, to| counts[from][to]);
    FEW_ROWS * most * width(bucket) <= bucket.numel * copies(bucket, counts.len())
}

/// What the rank sends to others or receives of them, whichever is more, that has most to do: all wait for it. Pieces that every text
/// names may all be one rank's.
fn busiest(world: usize, amount: impl Fn(usize, usize) -> usize) -> usize {
    let of_rank = |rank: usize| -> usize {
        let others = (0..world).filter(|other| *other != rank);
        let [sent, received] = others.fold([0, 0], |[sent, received], other| {
            [sent + amount(rank, other), received + amount(other, rank)]
        });
        sent.max(received)
    };
    (0..world).map(of_rank).max().unwrap_or(0)
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
            // With whole slices every rank sends as much as every other.
            When::Instead(wire) => {
                bytes_as_rows(&counts, &elements, wire) < (world - 1) * bucket.slice_len * wire.bytes()
            }
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

/// Bytes that the busiest rank sends or receives where a gradient travels as rows.
fn bytes_as_rows(rows: &[Vec<usize>], elements: &[Vec<usize>], wire: Wire) -> usize {
    let bytes = |from: usize, to: usize| rows[from][to] * NUMBER_BYTES + elements[from][to] * wire.bytes();
    busiest(rows.len(), bytes)
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
fn part(bucket: &Bucket, index: usize, row: i64) -> Range<usize> {
    let (slice, width) = (bucket.slice(index), width(bucket));
    let start = row as usize * width;
    start.max(slice.start)..(start + width).min(slice.end)
}

/// Which of `rows`, ascending and all with a part in slice `index`, lie in it as a whole: all but the first and the last, and those too
/// where the slice begins and ends with a row.
fn whole(bucket: &Bucket, index: usize, rows: &[i64]) -> Range<usize> {
    let is_cut = |row: &i64| part(bucket, index, *row).len() < width(bucket);
    let begin = usize::from(rows.first().is_some_and(is_cut));
    let end = rows.len() - usize::from(rows.len() > begin && rows.last().is_some_and(is_cut));
    begin..end
}

/// Slice `index`, which lies in `slice`: the part of it that is `row`'s.
fn of_row(bucket: &Bucket, index: usize, slice: &Tensor, row: i64) -> Tensor {
    let part = part(bucket, index, row);
    let start = bucket.slice(index).start;
    slice.narrow(0, (part.start - start) as i64, part.len() as i64)
}

/// The rows that slice `index`, which lies in `slice`, holds as a whole, [rows, width], and the number of the first.
fn matrix(bucket: &Bucket, index: usize, slice: &Tensor) -> (Tensor, i64) {
    let (place, width) = (bucket.slice(index), width(bucket));
    let first = place.start.div_ceil(width);
    let rows = (place.end / width).saturating_sub(first);
    let begin = if rows == 0 { 0 } else { first * width - place.start };
    let flat = slice.narrow(0, begin as i64, (rows * width) as i64);
    (flat.view([-1, width as i64]), first as i64)
}

/// The numbers of rows as an index into a matrix that begins with row `first`, on `device`.
fn index(rows: &[i64], first: i64, device: Device) -> Result<Tensor> {
    Ok((Tensor::from_slice(rows) - first).f_to_device(device)?)
}

/// What slice `index`, which lies in `slice`, holds of `rows`: one row after the other, flat.
fn select(bucket: &Bucket, index: usize, slice: &Tensor, rows: &[i64]) -> Result<Tensor> {
    let whole = whole(bucket, index, rows);
    let cut = |row: &i64| of_row(bucket, index, slice, *row);
    let (matrix, first) = matrix(bucket, index, slice);
    let between = matrix.f_index_select(0, &self::index(&rows[whole.clone()], first, slice.device())?)?;
    let mut parts: Vec<Tensor> = rows[..whole.start].iter().map(cut).collect();
    parts.push(between.view([-1]));
    parts.extend(rows[whole.end..].iter().map(cut));
    Ok(Tensor::f_cat(&parts, 0)?)
}

/// Adds `values`, as [`select`] gives them, to what slice `index`, which lies in `slice`, holds of `rows`, each of which is there
/// once.
fn add(bucket: &Bucket, index: usize, slice: &Tensor, rows: &[i64], values: &Tensor) -> Result<()> {
    let whole = whole(bucket, index, rows);
    let values = values.f_to_kind(slice.kind())?;
    let mut at = 0;
    let mut next = |elements: i64| {
        at += elements;
        values.narrow(0, at - elements, elements)
    };
    for row in &rows[..whole.start] {
        let mut sums = of_row(bucket, index, slice, *row);
        let _ = sums.f_add_(&next(sums.numel() as i64))?;
    }
    if !whole.is_empty() {
        let (mut matrix, first) = matrix(bucket, index, slice);
        let width = width(bucket) as i64;
        let values = next(whole.len() as i64 * width).view([-1, width]);
        let places = self::index(&rows[whole.clone()], first, slice.device())?;
        let _ = matrix.f_index_add_(0, &places, &values)?;
    }
    for row in &rows[whole.end..] {
        let mut sums = of_row(bucket, index, slice, *row);
        let _ = sums.f_add_(&next(sums.numel() as i64))?;
    }
    Ok(())
}

/// Rows on their way to the ranks that own them.
pub(crate) struct Arriving {
    /// On the host.
    numbers: Tensor,
    values: Tensor,
    /// How many rows, and elements of them, come from each rank.
    counts: Vec<[usize; 2]>,
    pending: [Pending; 2],
}

/// Some rows of a matrix: their numbers, ascending, and [rows, width].
pub(crate) struct Rows {
    pub(crate) numbers: Vec<i64>,
    pub(crate) values: Tensor,
}

impl Rows {
    /// Rows of zeros, f32.
    pub(crate) fn zeros(bucket: &Bucket, numbers: Vec<i64>, device: Device) -> Result<Rows> {
        let shape = [numbers.len() as i64, width(bucket) as i64];
        let values = Tensor::f_zeros(shape, (Kind::Float, device))?;
        Ok(Rows { numbers, values })
    }

    /// Rows of the matrix whose f32 values `theta` holds whole, in `kind`.
    pub(crate) fn read(bucket: &Bucket, theta: &Tensor, kind: Kind, numbers: &[i64]) -> Result<Rows> {
        let (matrix, _) = matrix(bucket, 0, theta);
        let values = matrix
            .f_index_select(0, &index(numbers, 0, theta.device())?)?
            .f_to_kind(kind)?;
        let numbers = numbers.to_vec();
        Ok(Rows { numbers, values })
    }

    /// On the CPU.
    pub(crate) fn gradient(&self) -> RowGradient<'_> {
        RowGradient {
            numbers: &self.numbers,
            values: f32s(&self.values),
            width: self.values.size()[1] as usize,
        }
    }

    /// Where among these rows each of `ids` stands; all of them are here.
    pub(crate) fn places(&self, ids: &Tensor) -> Tensor {
        let numbers = Tensor::from_slice(&self.numbers).to_device(ids.device());
        ids.searchsorted(&numbers, false, false, "left", None::<Tensor>)
    }
}

impl RowPlan {
    pub(crate) fn rows(&self) -> &[i64] {
        &self.rows
    }
}

/// The distinct numbers in some ids, ascending.
pub(crate) fn unique(ids: &[&Tensor]) -> Vec<i64> {
    let mut rows: Vec<i64> = ids
        .iter()
        .flat_map(|ids| i64s(&ids.to_device(Device::Cpu)).to_vec())
        .collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// The `wanted` rows, ascending, of the matrix whose slices the ranks hold in f32, in `kind` on `device`; `None` where some rank wants
/// many. All ranks call it, each for rows of its own; returns when they are here.
pub(crate) fn fetch(
    comm: &dyn Comm,
    bucket: &Bucket,
    theta: &Tensor,
    (kind, device): (Kind, Device),
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

    let elements =
        |owner: usize, rows: &[i64]| -> usize { rows.iter().map(|row| part(bucket, owner, *row).len()).sum() };
    let (mut send, mut send_counts) = (Vec::new(), Vec::new());
    let mut their_numbers = i64s(&their_numbers);
    for asked in asked {
        let (rows, others) = their_numbers.split_at(asked);
        send.push(select(bucket, rank, theta, rows)?);
        send_counts.push(elements(rank, rows));
        their_numbers = others;
    }
    let send = Tensor::f_cat(&send, 0)?.f_to_kind(kind)?.f_to_device(device)?;
    let receive_counts: Vec<usize> = mine
        .iter()
        .enumerate()
        .map(|(owner, rows)| elements(owner, rows))
        .collect();
    // One slice ends where the next begins: what the owners send, one after the other, are the rows.
    let mut values = Tensor::f_zeros([wanted.len() as i64, width(bucket) as i64], (kind, device))?;
    comm.all_to_all(&send, &send_counts, &mut values, &receive_counts)?
        .wait()?;
    Ok(Some(Rows {
        numbers: wanted,
        values,
    }))
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
    let (rank, world) = (comm.rank(), comm.world());
    let numbers = (0..world).flat_map(|to| rows_of_slice(bucket, slice_of(bucket, to), &plan.rows));
    let numbers: Vec<i64> = numbers.copied().collect();
    let rows = match only {
        true => grads.shallow_clone(),
        false => {
            let matrix = grads.narrow(0, 0, bucket.numel as i64).view([-1, width(bucket) as i64]);
            matrix.f_index_select(0, &index(&plan.rows, 0, grads.device())?)?
        }
    };
    let kind = match wire {
        Wire::F32 => Kind::Float,
        Wire::Bf16 => Kind::BFloat16,
    };
    // One slice ends where the next begins: the slices' parts, one after the other, are the rows. The only slice is everybody's.
    let values = rows.f_to_kind(kind)?.view([-1]);
    let values = values.f_repeat([copies(bucket, world) as i64])?;
    let counts: Vec<[usize; 2]> = (0..world)
        .map(|from| [plan.counts[from][rank], plan.elements[from][rank]])
        .collect();
    let received: Vec<usize> = counts.iter().map(|[rows, _]| *rows).collect();
    let mut their_numbers = Tensor::f_zeros([received.iter().sum::<usize>() as i64], (Kind::Int64, Device::Cpu))?;
    let sent_numbers = comm.all_to_all(
        &Tensor::from_slice(&numbers),
        &plan.counts[rank],
        &mut their_numbers,
        &received,
    )?;
    let received: Vec<usize> = counts.iter().map(|[_, elements]| *elements).collect();
    let mut their_values = Tensor::f_zeros([received.iter().sum::<usize>() as i64], (kind, grads.device()))?;
    let sent_values = comm.all_to_all(&values, &plan.elements[rank], &mut their_values, &received)?;
    Ok(Arriving {
        numbers: their_numbers,
        values: their_values,
        counts,
        pending: [sent_numbers, sent_values],
    })
}

impl Arriving {
    pub(crate) fn is_over(&self) -> bool {
        self.pending.iter().all(Pending::is_over)
    }

    /// Waits, and adds what came to this rank's slice, rank by rank: the sums of whole slices, without their zeros.
    pub(crate) fn add_to(self, bucket: &Bucket, rank: usize, mine: &Tensor) -> Result<()> {
        self.pending.into_iter().try_for_each(Pending::wait)?;
        let mut numbers = i64s(&self.numbers);
        let mut at = 0;
        for [rows, elements] in self.counts {
            let (rows, others) = numbers.split_at(rows);
            let values = self.values.narrow(0, at, elements as i64);
            add(bucket, slice_of(bucket, rank), mine, rows, &values)?;
            numbers = others;
            at += elements as i64;
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
    fn the_busiest_rank_decides_whether_rows_pay() {
        // Of 1000 × 64 in two slices a whole half is 128,000 bytes in f32; a row and its number 264.
        let of = |counts: [[usize; 2]; 2], wire| {
            let counts: Vec<Vec<usize>> = counts.iter().map(|to| to.to_vec()).collect();
            let elements: Vec<Vec<usize>> = counts
                .iter()
                .map(|to| to.iter().map(|rows| rows * 64).collect())
                .collect();
            bytes_as_rows(&counts, &elements, wire)
        };
        // What stays is not counted.
        assert_eq!(of([[900, 484], [484, 900]], Wire::F32), 127_776);
        assert_eq!(of([[0, 470], [470, 0]], Wire::Bf16), 63_920);
        // One sends little and receives much, as does who has the frequent pieces.
        assert_eq!(of([[400, 10], [600, 5]], Wire::F32), 600 * 264);
    }

    #[test]
    fn what_is_selected_and_added_are_the_elements_of_the_slice() {
        for (rows, width, n_slices) in [(50, 5, 3), (97, 32, 4), (9, 40, 16), (7, 3, 1)] {
            let bucket = bucket(rows, width, n_slices);
            let numel = (rows * width) as usize;
            let all = Tensor::arange(numel as i64, (Kind::Float, Device::Cpu));
            let flat = Tensor::zeros([bucket.padded as i64], (Kind::Float, Device::Cpu));
            flat.narrow(0, 0, numel as i64).copy_(&all);
            // Every other row, the first and the last among them.
            let wanted: Vec<i64> = (0..rows).filter(|row| row % 2 == 0 || row + 1 == rows).collect();
            let mut found = Vec::new();
            for at in 0..n_slices {
                let slice = flat.narrow(0, (at * bucket.slice_len) as i64, bucket.slice_len as i64);
                let here = rows_of_slice(&bucket, at, &wanted);
                let values = select(&bucket, at, &slice, here).unwrap();
                add(&bucket, at, &slice, here, &values).unwrap();
                found.extend(Vec::<f32>::try_from(&values).unwrap());
            }
            let is_wanted = |element: &f32| wanted.contains(&(*element as i64 / width));
            let expected: Vec<f32> = (0..numel).map(|element| element as f32).collect();
            let selected: Vec<f32> = expected.iter().copied().filter(is_wanted).collect();
            assert_eq!(found, selected, "{rows} × {width} in {n_slices}");
            let doubled = expected.iter().map(|x| if is_wanted(x) { 2.0 * x } else { *x });
            let flat: Vec<f32> = Vec::try_from(flat.narrow(0, 0, numel as i64)).unwrap();
            assert_eq!(flat, doubled.collect::<Vec<f32>>(), "{rows} × {width} in {n_slices}");
        }
    }
}
