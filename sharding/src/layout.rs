//! The flat layout of what trains: parameters in registration order, a bucket a stage, each bucket cut into equal padded
//! slices. Pure arithmetic; the plan and the run use the same functions.
//! Source: Rajbhandari et al. 2020, "ZeRO", §5 (partitioning of optimizer state).

use std::ops::Range;

pub use configs::planner::memory::slice_len;

/// A trainable parameter as its module registers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    pub name: String,
    pub shape: Vec<i64>,
    /// Index of the parameter group: its learning rate and weight decay.
    pub group: usize,
}

impl ParamSpec {
    pub fn numel(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }
}

/// Parameters whose gradients are ready at the same moment of the backward pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketSpec {
    pub name: String,
    pub params: Vec<ParamSpec>,
}

/// A bucket with its place computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    pub name: String,
    pub params: Vec<ParamSpec>,
    /// Where each parameter lies in the flat bucket; contiguous, from 0.
    pub ranges: Vec<Range<usize>>,
    /// Elements without padding.
    pub numel: usize,
    /// Elements with padding: `n_slices` equal slices.
    pub padded: usize,
    pub slice_len: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub buckets: Vec<Bucket>,
    /// How many slices each bucket is cut into.
    pub n_slices: usize,
}

impl Layout {
    /// Lays `specs` out in the order given, each bucket in `n_slices` equal slices.
    pub fn new(specs: &[BucketSpec], n_slices: usize) -> Layout {
        let buckets = specs.iter().map(|spec| Bucket::new(spec.clone(), n_slices));
        Layout {
            buckets: buckets.collect(),
            n_slices,
        }
    }

    /// Trained elements, padding not counted.
    pub fn numel(&self) -> usize {
        self.buckets.iter().map(|bucket| bucket.numel).sum()
    }

    /// Names, shapes and groups in order, one line a parameter: equal on two ranks exactly when they train the same.
    pub fn describe(&self) -> String {
        self.buckets.iter().map(Bucket::describe).collect()
    }
}

impl Bucket {
    pub fn new(spec: BucketSpec, n_slices: usize) -> Bucket {
        let mut end = 0;
        let range = |param: &ParamSpec| {
            let start = end;
            end += param.numel();
            start..end
        };
        let ranges = spec.params.iter().map(range).collect();
        let slice_len = slice_len(end, n_slices);
        Bucket {
            name: spec.name,
            params: spec.params,
            ranges,
            numel: end,
            padded: slice_len * n_slices,
            slice_len,
        }
    }

    /// A line a parameter: bucket, name, shape, group.
    pub fn describe(&self) -> String {
        let line = |param: &ParamSpec| format!("{} {} {:?} {}\n", self.name, param.name, param.shape, param.group);
        self.params.iter().map(line).collect()
    }

    /// The elements of slice `index` that are not padding, in bucket coordinates.
    pub fn slice(&self, index: usize) -> Range<usize> {
        let start = (index * self.slice_len).min(self.numel);
        let end = ((index + 1) * self.slice_len).min(self.numel);
        start..end
    }

    /// The parts of slice `index` by parameter group, in slice coordinates.
    pub fn groups_in_slice(&self, index: usize) -> Vec<(Range<usize>, usize)> {
        let slice = self.slice(index);
        let mut parts: Vec<(Range<usize>, usize)> = Vec::new();
        for (range, param) in self.ranges.iter().zip(&self.params) {
            let (start, end) = (range.start.max(slice.start), range.end.min(slice.end));
            if start >= end {
                continue;
            }
            let part = start - slice.start..end - slice.start;
            match parts.last_mut() {
                Some((last, group)) if *group == param.group && last.end == part.start => last.end = part.end,
                _ => parts.push((part, param.group)),
            }
        }
        parts
    }
}

/// Elements of whole gradients that exist at a time from ZeRO stage 2 on, at most: of the buckets that a stage's backward
/// fills, and of those that the stage before it in backward has filled and whose reduction is under way.
/// `stages[s]`: the buckets that stage s of the model reads, in forward order; `sizes`: padded elements of each bucket.
pub fn most_gradients(stages: &[Vec<usize>], sizes: &[usize]) -> usize {
    // A bucket is open from the highest to the lowest stage that reads it.
    let open = |stage: usize, bucket: usize| {
        let reads = |stages: &[Vec<usize>]| stages.iter().any(|buckets| buckets.contains(&bucket));
        reads(&stages[..=stage]) && reads(&stages[stage..])
    };
    let at = |stage: usize| {
        let before = (stage + 1).min(stages.len() - 1);
        let buckets = (0..sizes.len()).filter(|&bucket| open(stage, bucket) || open(before, bucket));
        buckets.map(|bucket| sizes[bucket]).sum()
    };
    (0..stages.len()).map(at).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use configs::planner::memory::ALIGNMENT;
    use proptest::prelude::*;

    use super::*;

    fn specs() -> impl Strategy<Value = Vec<BucketSpec>> {
        let param = (prop::collection::vec(1i64..9, 1..3), 0usize..3);
        let bucket = prop::collection::vec(param, 1..6);
        prop::collection::vec(bucket, 1..5).prop_map(|buckets| {
            let name_params = |(b, params): (usize, Vec<(Vec<i64>, usize)>)| BucketSpec {
                name: format!("bucket{b}"),
                params: params
                    .into_iter()
                    .enumerate()
                    .map(|(p, (shape, group))| ParamSpec {
                        name: format!("p{p}"),
                        shape,
                        group,
                    })
                    .collect(),
            };
            buckets.into_iter().enumerate().map(name_params).collect()
        })
    }

    #[test]
    fn a_tied_matrix_is_open_all_along_and_an_untied_pair_is_not_open_together() {
        // Embedding (bucket 0), two layers, head (bucket 3).
        let untied = [vec![0], vec![1], vec![2], vec![3]];
        assert_eq!(most_gradients(&untied, &[1000, 10, 20, 1000]), 1020);
        // The head reads bucket 0 and has a norm of its own.
        let tied = [vec![0], vec![1], vec![2], vec![0, 3]];
        assert_eq!(most_gradients(&tied, &[1000, 10, 20, 1]), 1030);
    }

    proptest! {
        #[test]
        fn slices_cover_each_bucket_once_in_order(specs in specs(), n_slices in 1usize..9) {
            let layout = Layout::new(&specs, n_slices);
            for bucket in &layout.buckets {
                let mut next = 0;
                for index in 0..n_slices {
                    let slice = bucket.slice(index);
                    prop_assert!(slice.len() <= bucket.slice_len);
                    if !slice.is_empty() {
                        prop_assert_eq!(slice.start, next);
                        prop_assert_eq!(slice.start, index * bucket.slice_len);
                        next = slice.end;
                    }
                }
                prop_assert_eq!(next, bucket.numel);
                prop_assert_eq!(bucket.padded, bucket.slice_len * n_slices);
                prop_assert_eq!(bucket.slice_len % ALIGNMENT, 0);
            }
        }

        #[test]
        fn groups_cover_each_slice_once(specs in specs(), n_slices in 1usize..9) {
            for bucket in &Layout::new(&specs, n_slices).buckets {
                for index in 0..n_slices {
                    let mut next = 0;
                    for (part, group) in bucket.groups_in_slice(index) {
                        prop_assert_eq!(part.start, next);
                        next = part.end;
                        for element in part {
                            let global = bucket.slice(index).start + element;
                            let owner = bucket.ranges.iter().position(|range| range.contains(&global)).unwrap();
                            prop_assert_eq!(bucket.params[owner].group, group);
                        }
                    }
                    prop_assert_eq!(next, bucket.slice(index).len());
                }
            }
        }
    }
}
