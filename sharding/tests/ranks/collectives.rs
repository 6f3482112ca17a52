//! One set of cases for every engine: what a collective leaves, whatever carries it.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use sharding::{Comm, Wire};
use tch::{Device, Kind, Tensor};

use crate::Case;

pub const CASES: [Case; 12] = [
    ("reduce_scatter_leaves_each_rank_its_slice_of_the_sum", reduce_scatter),
    ("sums_are_made_in_rank_order", rank_order),
    ("an_all_reduce_is_the_same_bits_everywhere", all_reduce),
    ("bf16_rounds_each_share_once", bf16),
    ("all_gather_of_every_kind_is_in_rank_order", all_gather),
    ("all_to_all_moves_unequal_parts", all_to_all),
    ("every_root_broadcasts", broadcast),
    ("small_numbers_combine_alike", combine),
    ("what_is_small_overtakes_what_is_large", lanes),
    ("many_are_under_way_and_each_is_right", many),
    ("an_exchange_goes_on_while_ranks_compute", progress),
    ("bytes_are_counted_at_the_lower_bound", bytes),
];

static DEVICE: OnceLock<Device> = OnceLock::new();

/// Where the cases' tensors lie; the CPU unless it was said otherwise.
pub fn device() -> Device {
    *DEVICE.get_or_init(|| Device::Cpu)
}

pub fn on(device: Device) {
    DEVICE.set(device).expect("said once, before the first case");
}

/// Small whole numbers: their sums are exact in f32 and bf16 alike.
fn numbers(rank: usize, length: usize) -> Tensor {
    let values: Vec<f32> = (0..length).map(|i| ((i * 7 + rank * 3) % 32) as f32 - 12.0).collect();
    Tensor::from_slice(&values).to_device(device())
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_device(Device::Cpu)).unwrap()
}

fn zeros(length: usize, kind: Kind) -> Tensor {
    Tensor::zeros([length as i64], (kind, device()))
}

/// Σ over ranks of `of(rank)`, in rank order, in f32.
fn sum_in_order(world: usize, of: impl Fn(usize) -> Vec<f32>) -> Vec<f32> {
    let mut sum = of(0);
    for rank in 1..world {
        sum.iter_mut().zip(of(rank)).for_each(|(sum, value)| *sum += value);
    }
    sum
}

/// One element, some, and several pieces' worth whose last is shorter.
const SLICES: [usize; 3] = [1, 1000, 2_500_001];

fn reduce_scatter(comm: &dyn Comm, _: &Path) {
    let (rank, world) = (comm.rank(), comm.world());
    for slice in SLICES {
        let full = numbers(rank, slice * world);
        let mut mine = zeros(slice, Kind::Float);
        comm.reduce_scatter(&full, &mut mine, Wire::F32)
            .unwrap()
            .wait()
            .unwrap();
        let expected = sum_in_order(world, |rank| values(&numbers(rank, slice * world)));
        assert_eq!(values(&mine), expected[rank * slice..][..slice], "slices of {slice}");
    }
}

fn rank_order(comm: &dyn Comm, _: &Path) {
    let (rank, world) = (comm.rank(), comm.world());
    // (1e8 + 1) − 1e8 + 1 depends on where one begins.
    let share = |rank: usize| vec![[1e8, 1.0, -1e8, 1.0][rank % 4]; 16 * world];
    let mut mine = zeros(16, Kind::Float);
    for repetition in 0..5 {
        // The first one waits for the last, another one each time.
        thread::sleep(Duration::from_millis(if repetition % world == rank { 20 } else { 0 }));
        let full = Tensor::from_slice(&share(rank)).to_device(device());
        comm.reduce_scatter(&full, &mut mine, Wire::F32)
            .unwrap()
            .wait()
            .unwrap();
        assert_eq!(values(&mine), sum_in_order(world, share)[..16]);
        let mut all = full.copy();
        comm.all_reduce(&mut all, Wire::F32).unwrap().wait().unwrap();
        assert_eq!(values(&all), sum_in_order(world, share));
    }
}

fn all_reduce(comm: &dyn Comm, _: &Path) {
    let (rank, world) = (comm.rank(), comm.world());
    for length in [1, 2, 5, 4099, 3_000_017] {
        // Thirds are exact nowhere.
        let share = |rank: usize| values(&(numbers(rank, length) / 3.0));
        let mut all = Tensor::from_slice(&share(rank)).to_device(device());
        comm.all_reduce(&mut all, Wire::F32).unwrap().wait().unwrap();
        assert_eq!(values(&all), sum_in_order(world, share), "{length} elements");
    }
}

fn bf16(comm: &dyn Comm, _: &Path) {
    let (rank, world) = (comm.rank(), comm.world());
    for slice in [3, 70_001] {
        let exact = numbers(rank, slice * world);
        let mut mine = zeros(slice, Kind::Float);
        comm.reduce_scatter(&exact, &mut mine, Wire::Bf16)
            .unwrap()
            .wait()
            .unwrap();
        let expected = sum_in_order(world, |rank| values(&numbers(rank, slice * world)));
        assert_eq!(
            values(&mine),
            expected[rank * slice..][..slice],
            "what bf16 holds exactly arrives exactly"
        );

        // One rank alone sends nothing, and what an engine does then is its own affair.
        if world > 1 {
            let rounded = |rank: usize| {
                let thirds = numbers(rank, slice * world) / 3.0;
                values(&thirds.to_kind(Kind::BFloat16).to_kind(Kind::Float))
            };
            let expected = sum_in_order(world, rounded);
            let thirds = &exact / 3.0;
            comm.reduce_scatter(&thirds, &mut mine, Wire::Bf16)
                .unwrap()
                .wait()
                .unwrap();
            assert_eq!(values(&mine), expected[rank * slice..][..slice]);
            let mut all = thirds.copy();
            comm.all_reduce(&mut all, Wire::Bf16).unwrap().wait().unwrap();
            let sums = Tensor::from_slice(&expected)
                .to_kind(Kind::BFloat16)
                .to_kind(Kind::Float);
            assert_eq!(
                values(&all),
                values(&sums),
                "the sum is rounded once more on its way back"
            );
        }
    }
}

fn all_gather(comm: &dyn Comm, _: &Path) {
    let (rank, world) = (comm.rank(), comm.world());
    for kind in [Kind::Uint8, Kind::BFloat16, Kind::Float, Kind::Double, Kind::Int64] {
        for length in SLICES.map(|slice| slice as i64) {
            let theirs = |rank: usize| {
                (Tensor::arange(length, (Kind::Int64, device())).remainder(50) + rank as i64).to_kind(kind)
            };
            let mut full = zeros(length as usize * world, kind);
            comm.all_gather(&theirs(rank), &mut full).unwrap().wait().unwrap();
            let expected: Vec<Tensor> = (0..world).map(theirs).collect();
            assert_eq!(full, Tensor::cat(&expected, 0), "{kind:?}, {length} elements");
        }
    }
    let texts = comm.all_gather_texts(&vec![b'x'; rank * 3]).unwrap();
    assert_eq!(texts, (0..world).map(|rank| vec![b'x'; rank * 3]).collect::<Vec<_>>());
}

fn all_to_all(comm: &dyn Comm, _: &Path) {
    let (rank, world) = (comm.rank(), comm.world());
    for scale in [1, 10_000] {
        // Some of the parts are empty.
        let count = |from: usize, to: usize| (from * 2 + to) % 3 * scale;
        let part = |from: usize, to: usize| {
            Tensor::full(
                [count(from, to) as i64],
                (10 * from + to) as f64,
                (Kind::Float, device()),
            )
        };
        let send = Tensor::cat(&(0..world).map(|to| part(rank, to)).collect::<Vec<_>>(), 0);
        let expected = Tensor::cat(&(0..world).map(|from| part(from, rank)).collect::<Vec<_>>(), 0);
        let mut receive = expected.zeros_like();
        let counts = |of: &dyn Fn(usize) -> usize| (0..world).map(of).collect::<Vec<_>>();
        let (sent, received) = (counts(&|to| count(rank, to)), counts(&|from| count(from, rank)));
        comm.all_to_all(&send, &sent, &mut receive, &received)
            .unwrap()
            .wait()
            .unwrap();
        assert_eq!(receive, expected);
    }
}

fn broadcast(comm: &dyn Comm, _: &Path) {
    for root in 0..comm.world() {
        for length in [1, 50_000] {
            let mut tensor = numbers(comm.rank(), length);
            comm.broadcast(&mut tensor, root).unwrap().wait().unwrap();
            assert_eq!(tensor, numbers(root, length));
        }
    }
    let bytes = comm.broadcast_bytes(&[comm.rank() as u8 + 7; 5]).unwrap();
    assert_eq!(bytes, [7; 5]);
}

fn combine(comm: &dyn Comm, _: &Path) {
    let (rank, world) = (comm.rank() as f64, comm.world() as f64);
    assert_eq!(
        comm.sum(&[rank, 0.5]).unwrap(),
        [world * (world - 1.0) / 2.0, world / 2.0]
    );
    assert_eq!(comm.max(&[rank, -rank]).unwrap(), [world - 1.0, 0.0]);
    let last_is_nan = if rank == world - 1.0 { f64::NAN } else { 1.0 };
    assert!(comm.sum(&[last_is_nan]).unwrap()[0].is_nan());
    assert!(comm.max(&[last_is_nan]).unwrap()[0].is_nan());
    let infinite = if rank == 0.0 { f64::INFINITY } else { 1.0 };
    assert_eq!(comm.sum(&[infinite]).unwrap(), [f64::INFINITY]);
}

/// Rank 0 begins its part of what is large after the small ones: were they behind it, nobody would ever have them.
fn lanes(comm: &dyn Comm, _: &Path) {
    let (rank, world) = (comm.rank(), comm.world());
    let slice = 2_000_000;
    let full = numbers(rank, slice * world);
    let mut mine = zeros(slice, Kind::Float);
    let mut large = |now: bool| now.then(|| comm.reduce_scatter(&full, &mut mine, Wire::F32).unwrap());
    let early = large(rank > 0);
    let (tell, over) = mpsc::channel::<()>();
    thread::spawn(move || {
        let waited = over.recv_timeout(Duration::from_secs(60));
        assert_ne!(
            waited,
            Err(RecvTimeoutError::Timeout),
            "what is small waits for what is large"
        );
    });
    for _ in 0..10 {
        assert_eq!(comm.sum(&[1.0]).unwrap(), [world as f64]);
    }
    drop(tell);
    early.or_else(|| large(true)).unwrap().wait().unwrap();
    let expected = sum_in_order(world, |rank| values(&numbers(rank, slice * world)));
    assert_eq!(values(&mine), expected[rank * slice..][..slice]);
}

/// Of all kinds and sizes, begun by ranks that come late, and waited for from the last to the first.
fn many(comm: &dyn Comm, _: &Path) {
    let (rank, world) = (comm.rank(), comm.world());
    thread::sleep(Duration::from_millis(20 * rank as u64));
    // The first is several exchanges long, those behind it are one each, and more than are under way at a time.
    let mut slices = vec![2_500_001, 20_000, 1, 70_000, 30_000, 50_000];
    slices.resize(20, 25_000);
    let fulls: Vec<Tensor> = slices.iter().map(|slice| numbers(rank, slice * world)).collect();
    let sums = |slice: usize| sum_in_order(world, |rank| values(&numbers(rank, slice * world)));
    let mut mines: Vec<Tensor> = slices.iter().map(|slice| zeros(*slice, Kind::Float)).collect();
    let mut gathered: Vec<Tensor> = slices.iter().map(|slice| zeros(slice * world, Kind::Float)).collect();
    let mut summed: Vec<Tensor> = fulls.iter().map(Tensor::copy).collect();
    let mut under_way = Vec::new();
    for (index, full) in fulls.iter().enumerate() {
        under_way.push(comm.reduce_scatter(full, &mut mines[index], Wire::F32).unwrap());
        let mine = full.narrow(0, 0, slices[index] as i64);
        under_way.push(comm.all_gather(&mine, &mut gathered[index]).unwrap());
        under_way.push(comm.all_reduce(&mut summed[index], Wire::F32).unwrap());
    }
    while let Some(pending) = under_way.pop() {
        pending.wait().unwrap();
    }
    for (index, slice) in slices.into_iter().enumerate() {
        let expected = sums(slice);
        assert_eq!(
            values(&mines[index]),
            expected[rank * slice..(rank + 1) * slice],
            "{slice}"
        );
        assert_eq!(values(&summed[index]), expected, "{slice}");
        let parts = (0..world).flat_map(|rank| values(&numbers(rank, slice * world))[..slice].to_vec());
        assert_eq!(values(&gathered[index]), parts.collect::<Vec<f32>>(), "{slice}");
    }
}

/// Rank 0 starts an exchange and then computes until the others say that they have all they need: without progress behind
/// its back they never could, since messages of this size are fetched from their sender.
fn progress(comm: &dyn Comm, shared: &Path) {
    let (rank, world) = (comm.rank(), comm.world());
    let full = numbers(rank, 4_000_000 * world);
    let mut mine = zeros(4_000_000, Kind::Float);
    comm.barrier().unwrap();
    let pending = comm.reduce_scatter(&full, &mut mine, Wire::F32).unwrap();
    let said = |rank: usize| shared.join(format!("rank-{rank}-has-its-sum"));
    if rank == 0 {
        let started = Instant::now();
        let mut busy = 1u64;
        while !(1..world).all(|rank| said(rank).exists()) {
            (0..100_000).for_each(|_| busy = busy.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1));
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "nothing moves while rank 0 computes ({busy})"
            );
        }
        pending.wait().unwrap();
    } else {
        pending.wait().unwrap();
    }
    // On a GPU to wait is to queue what comes behind; whoever reads has waited.
    let sum = values(&mine);
    if rank > 0 {
        std::fs::write(said(rank), []).unwrap();
    }
    let slice = rank * sum.len()..(rank + 1) * sum.len();
    let length = slice.end - slice.start;
    let of = |rank: usize| values(&numbers(rank, length * world).narrow(0, slice.start as i64, length as i64));
    assert!(sum == sum_in_order(world, of), "rank {rank} has another sum");
}

fn bytes(comm: &dyn Comm, _: &Path) {
    let world = comm.world();
    let slice = 1000;
    let full = numbers(0, slice * world);
    let mut mine = zeros(slice, Kind::Float);
    let bytes_of = |call: &mut dyn FnMut()| {
        let before = comm.sent().bytes();
        call();
        comm.sent().bytes() - before
    };
    let others = (world - 1) as u64 * slice as u64;
    let sent = bytes_of(&mut || {
        comm.reduce_scatter(&full, &mut mine, Wire::F32)
            .unwrap()
            .wait()
            .unwrap()
    });
    assert_eq!(sent, 4 * others);
    let sent = bytes_of(&mut || {
        comm.reduce_scatter(&full, &mut mine, Wire::Bf16)
            .unwrap()
            .wait()
            .unwrap()
    });
    assert_eq!(sent, 2 * others);
    let mut all = full.copy();
    let sent = bytes_of(&mut || comm.all_gather(&mine, &mut all).unwrap().wait().unwrap());
    assert_eq!(sent, 4 * others);
    let sent = bytes_of(&mut || comm.all_reduce(&mut all, Wire::F32).unwrap().wait().unwrap());
    assert_eq!(sent, 8 * others);
}
