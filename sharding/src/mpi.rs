//! The door to MPI: collectives between CPU ranks, driven by one thread that makes every MPI call of the process.
//!
//! Open MPI 4.1 moves nothing between a non-blocking call and the wait for it: of a reduce-scatter of 64 MiB between two
//! ranks, 54.1 ms alone, 54.7 ms were left after half a second of computing. So a thread of our own polls, sleeps in
//! between, and computes what belongs to the exchange (packing, sums). MPI is initialised there, with the weakest thread
//! support.
//!
//! MPI has no bf16, promises no order of summation, and Open MPI's non-blocking reduce-scatter is a reduction to rank 0
//! followed by a scatter. Sums are therefore made here: each rank sends every other rank's slice to it (all-to-all, in
//! pieces of bounded size), and adds up what it received for its own slice, in rank order, in f32. No element is sent
//! twice, and no timing changes a bit.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use configs::planner::memory::STAGING_BYTES;
use half::bf16;
use mpi::ffi;
use mpi::topology::{AsCommunicator, SimpleCommunicator};
use mpi::traits::{AsRaw, Communicator};
use tch::{Kind, Tensor};

use crate::comm::{Sent, Wire};
use crate::memory::{f32s, f32s_mut};
use crate::{Comm, Error, Pending, Result};

/// What is small does not queue behind buckets: it has a communicator of its own.
const SMALL_BYTES: usize = 64 << 10;
/// Polls without a result before the thread begins to sleep in between. A rank's cores are busy computing.
const POLLS: u32 = 4;
/// The least and the longest sleep between two polls: on a slow link polling alone took 8 % of a core at the least.
const SLEEP: Range<Duration> = Duration::from_micros(50)..Duration::from_millis(4);
/// Where something has usually moved after a time t, or for a time t nothing has, the next look is after t over this: every look
/// costs a switch of threads and what the compute had in its caches. Meanwhile no more passes than this part of a piece, of
/// which [`FLYING`] are under way: the link is never idle.
const LATE: u32 = 4;

pub(crate) struct Mpi {
    rank: usize,
    world: usize,
    engine: String,
    sent: Sent,
    /// Callers that wait for a job's end now.
    waiting: Arc<AtomicUsize>,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

/// Jobs of a queue that are under way at a time: the round trips of small ones, such as the LoRA matrices of every layer,
/// pass together.
const MOST_JOBS: usize = 32;

/// The two queues; each is served in order, and on its own communicator.
#[derive(Clone, Copy)]
enum Lane {
    Small,
    Bulk,
}

enum Command {
    /// Made on the thread, since requests cannot move between threads.
    Start(Lane, Box<dyn FnOnce() -> Box<dyn Job> + Send>, Answer),
    Abort(i32),
}

/// Where whoever started a job hears of its end.
struct Answer(Arc<AtomicBool>, Sender<Result<()>>);

impl Answer {
    fn give(self, result: Result<()>) {
        // Nobody listens where the caller was ended by another error.
        let _ = self.1.send(result);
        self.0.store(true, Ordering::Release);
    }
}

impl Mpi {
    pub(crate) fn join(placed: usize) -> Result<Mpi> {
        let (commands, inbox) = mpsc::channel();
        let (tell, met) = mpsc::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let waiting_there = Arc::clone(&waiting);
        let thread = std::thread::Builder::new()
            .name("collectives".into())
            .spawn(move || {
                let (universe, _) = mpi::initialize_with_threading(mpi::Threading::Funneled)
                    .expect("MPI is initialised once, at the worker's start");
                let world = universe.world();
                let (rank, size) = (world.rank() as usize, world.size() as usize);
                let engine = mpi::environment::library_version().unwrap_or_else(|_| "an MPI library".into());
                let line = || Line::new(&world);
                // A collective call: this rank has not arrived before the others make it.
                let lines = (size == placed).then(|| [line(), line()]);
                let _ = tell.send((rank, size, engine));
                if let Some(lines) = lines {
                    serve(&lines, &inbox, &waiting_there);
                }
                // Finalises MPI, after the communicators are gone.
                drop(universe);
            })
            .map_err(|_| Error::NoThread)?;
        let (rank, size, engine) = met.recv().map_err(|_| Error::Gone)?;
        if size != placed {
            return Err(Error::WorldMismatch { placed, mpi: size });
        }
        Ok(Mpi {
            rank,
            world: size,
            engine: engine
                .trim_end_matches(['\0', ' '])
                .lines()
                .next()
                .unwrap_or_default()
                .into(),
            sent: Sent::default(),
            waiting,
            commands,
            thread: Some(thread),
        })
    }

    /// Queues a job that moves `bytes` in all.
    fn start<J: Job + 'static>(&self, lane: Lane, make: impl FnOnce() -> J + Send + 'static) -> Result<Pending> {
        let (answer, finished) = mpsc::channel();
        let over = Arc::new(AtomicBool::new(false));
        let answer = Answer(Arc::clone(&over), answer);
        let command = Command::Start(lane, Box::new(|| Box::new(make())), answer);
        self.commands.send(command).map_err(|_| Error::Gone)?;
        let thread = self.thread.as_ref().ok_or(Error::Gone)?.thread().clone();
        thread.unpark();
        let waiting = Arc::clone(&self.waiting);
        let finish = move || {
            if let Ok(result) = finished.try_recv() {
                return result;
            }
            waiting.fetch_add(1, Ordering::Relaxed);
            thread.unpark();
            let result = finished.recv().unwrap_or(Err(Error::Gone));
            waiting.fetch_sub(1, Ordering::Relaxed);
            result
        };
        Ok(Pending::until(move || over.load(Ordering::Acquire), finish))
    }

    /// Queues a job that is one MPI call. `buffers` are kept alive until it is finished.
    fn call(
        &self,
        bytes: usize,
        name: &'static str,
        buffers: Vec<Tensor>,
        call: impl FnOnce(&Line, *mut ffi::MPI_Request) -> i32 + Send + 'static,
    ) -> Result<Pending> {
        let lane = if bytes <= SMALL_BYTES { Lane::Small } else { Lane::Bulk };
        self.start(lane, move || OneCall {
            name,
            _buffers: buffers,
            call: Some(call),
            request: None,
        })
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // The thread ends when nobody can send any more, after what is queued: peers may wait for it.
        self.commands = mpsc::channel().0;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Comm for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn reduce_scatter(&self, full: &Tensor, mine: &mut Tensor, wire: Wire) -> Result<Pending> {
        assert_eq!((full.kind(), mine.kind()), (Kind::Float, Kind::Float));
        assert_eq!(full.numel(), mine.numel() * self.world);
        self.sent.add(mine.numel() * (self.world - 1) * wire.bytes());
        let (full, mine) = (full.shallow_clone(), mine.shallow_clone());
        match wire {
            Wire::F32 => self.start(Lane::Bulk, || ReduceScatter::<f32>::new(full, mine)),
            Wire::Bf16 => self.start(Lane::Bulk, || ReduceScatter::<bf16>::new(full, mine)),
        }
    }

    fn all_reduce(&self, values: &mut Tensor, wire: Wire) -> Result<Pending> {
        assert_eq!(values.kind(), Kind::Float);
        let slice = values.numel().div_ceil(self.world);
        self.sent.add(2 * slice * (self.world - 1) * wire.bytes());
        let (values, world) = (values.shallow_clone(), self.world);
        match wire {
            Wire::F32 => self.start(Lane::Bulk, move || AllReduce::<f32>::new(values, world)),
            Wire::Bf16 => self.start(Lane::Bulk, move || AllReduce::<bf16>::new(values, world)),
        }
    }

    fn all_gather(&self, mine: &Tensor, full: &mut Tensor) -> Result<Pending> {
        assert_eq!(full.kind(), mine.kind());
        assert_eq!(full.numel(), mine.numel() * self.world);
        assert!(full.is_contiguous() && mine.is_contiguous());
        let name = "all-gather";
        let width = mine.kind().elt_size_in_bytes();
        self.sent.add(mine.numel() * (self.world - 1) * width);
        if piece_length(mine.numel(), self.world, width) < mine.numel() {
            let (mine, full) = (mine.shallow_clone(), full.shallow_clone());
            return self.start(Lane::Bulk, || AllGather::new(mine, full));
        }
        let each = count(name, mine.numel())?;
        let buffers = vec![full.shallow_clone(), mine.shallow_clone()];
        let (from, to) = (Address::of(mine), Address::of(full));
        self.call(full.numel() * width, name, buffers, move |line, request| {
            let kind = moved(width);
            // SAFETY: counts were checked above; both buffers are kept by the job until MPI has finished with them, and by
            // the trait's rule nobody touches them meanwhile.
            unsafe { ffi::MPI_Iallgather(from.at(), each, kind, to.at(), each, kind, line.raw(), request) }
        })
    }

    fn all_to_all(
        &self,
        send: &Tensor,
        send_counts: &[usize],
        receive: &mut Tensor,
        receive_counts: &[usize],
    ) -> Result<Pending> {
        assert_eq!(send.kind(), receive.kind());
        assert!(send.is_contiguous() && receive.is_contiguous());
        assert!(send_counts.len() == self.world && receive_counts.len() == self.world);
        assert_eq!(send.numel(), send_counts.iter().sum::<usize>());
        assert_eq!(receive.numel(), receive_counts.iter().sum::<usize>());
        assert_eq!(send_counts[self.rank], receive_counts[self.rank]);
        let name = "all-to-all";
        let width = send.kind().elt_size_in_bytes();
        count(name, send.numel().max(receive.numel()))?;
        self.sent.add((send.numel() - send_counts[self.rank]) * width);
        let (send, receive) = (send.shallow_clone(), receive.shallow_clone());
        let (send_counts, receive_counts) = (send_counts.to_vec(), receive_counts.to_vec());
        // The lengths differ between ranks, so they may not choose the lane.
        self.start(Lane::Bulk, move || {
            AllToAll::new(send, receive, &send_counts, &receive_counts)
        })
    }

    fn broadcast(&self, values: &mut Tensor, root: usize) -> Result<Pending> {
        assert!(values.is_contiguous());
        let name = "broadcast";
        let (elements, width) = (count(name, values.numel())?, values.kind().elt_size_in_bytes());
        if self.rank == root {
            // Through a tree, each rank but one receives it once.
            self.sent.add(values.numel() * width);
        }
        let to = Address::of(values);
        let buffers = vec![values.shallow_clone()];
        self.call(values.numel() * width, name, buffers, move |line, request| {
            // SAFETY: as in all_gather.
            unsafe { ffi::MPI_Ibcast(to.at(), elements, moved(width), root as i32, line.raw(), request) }
        })
    }

    fn barrier(&self) -> Result<()> {
        let pending = self.call(0, "barrier", Vec::new(), |line, request| {
            // SAFETY: no buffers.
            unsafe { ffi::MPI_Ibarrier(line.raw(), request) }
        });
        pending?.wait()
    }

    fn sent(&self) -> &Sent {
        &self.sent
    }

    fn engine(&self) -> String {
        self.engine.clone()
    }

    fn abort(&self, code: i32) -> ! {
        if self.commands.send(Command::Abort(code)).is_err() {
            std::process::exit(code);
        }
        loop {
            std::thread::park();
        }
    }
}

/// A communicator of the thread's own.
struct Line(SimpleCommunicator);

impl Line {
    fn new(world: &SimpleCommunicator) -> Line {
        Line(world.duplicate())
    }

    fn raw(&self) -> ffi::MPI_Comm {
        self.0.as_communicator().as_raw()
    }

    fn world(&self) -> usize {
        self.0.size() as usize
    }
}

enum Poll {
    Waiting,
    /// Something was done; there is more.
    Moved,
    Finished,
}

/// A collective that is polled to its end. Which calls it makes, and in which order, may not depend on timing: the ranks'
/// calls must match.
trait Job {
    fn poll(&mut self, line: &Line) -> Result<Poll>;

    /// All its calls are made; those of the next job may follow.
    fn is_started(&self) -> bool;

    /// The most bytes beside its tensors that it keeps, here or where ranks are late.
    fn staging(&self, _line: &Line) -> usize {
        0
    }
}

type Queue = VecDeque<(Box<dyn Job>, Answer)>;

/// Polls a queue's first job, and of those behind it, as far as staging allows, the one with calls to make; whether anything
/// moved. Those that only wait end hardly sooner than the first, and every look at one is a look at all sockets.
fn poll_first(line: &Line, queue: &mut Queue) -> bool {
    let (mut moved, mut staged, mut index) = (false, 0, 0);
    while index < queue.len().min(MOST_JOBS) {
        let job = &mut queue[index].0;
        let needs = job.staging(line);
        if index > 0 && staged + needs > MOST_STAGED {
            break;
        }
        if index > 0 && job.is_started() {
            staged += needs;
            index += 1;
            continue;
        }
        let result = match job.poll(line) {
            Ok(Poll::Waiting) => None,
            Ok(Poll::Moved) => {
                moved = true;
                None
            }
            Ok(Poll::Finished) => Some(Ok(())),
            Err(error) => Some(Err(error)),
        };
        if let Some(result) = result {
            // The buffers go before the caller hears of it: it may count on their memory.
            let (job, answer) = queue.remove(index).expect("it was polled");
            match result {
                Ok(()) => drop(job),
                // MPI may still write to what its other requests name. (By MPI's default it has ended the process before.)
                Err(_) => std::mem::forget(job),
            }
            answer.give(result);
            moved = true;
        } else if job.is_started() {
            staged += needs;
            index += 1;
        } else {
            break;
        }
    }
    moved
}

/// The thread's life: takes commands, polls the queues, sleeps when nothing moves.
fn serve(lines: &[Line; 2], inbox: &Receiver<Command>, waiting: &AtomicUsize) {
    let mut queues: [Queue; 2] = [VecDeque::new(), VecDeque::new()];
    let mut idle_polls = 0;
    // When a sleep last ended with something to do, and the usual time between such ends.
    let (mut last_moved, mut pace) = (Instant::now(), Duration::ZERO);
    let mut open = true;
    loop {
        let sleep = || match waiting.load(Ordering::Relaxed) {
            0 => (last_moved.elapsed().max(pace) / LATE).clamp(SLEEP.start, SLEEP.end),
            // The rank has nothing better to do.
            _ => SLEEP.start,
        };
        let busy = queues.iter().any(|queue| !queue.is_empty());
        if busy && (idle_polls > POLLS || !open) {
            // Whoever starts a job or waits for one ends the sleep.
            std::thread::park_timeout(sleep());
        }
        let command = match (busy, open) {
            (false, false) => return,
            (false, true) => inbox.recv().map_err(|_| TryRecvError::Disconnected),
            (true, _) => inbox.try_recv(),
        };
        match command {
            Ok(Command::Start(lane, make, answer)) => {
                if !busy {
                    last_moved = Instant::now();
                }
                queues[lane as usize].push_back((make(), answer));
                idle_polls = 0;
            }
            Ok(Command::Abort(code)) => lines[0].0.abort(code),
            Err(TryRecvError::Disconnected) => open = false,
            Err(TryRecvError::Empty) => {}
        }
        idle_polls += 1;
        for (line, queue) in lines.iter().zip(&mut queues) {
            if poll_first(line, queue) {
                if idle_polls > POLLS {
                    pace = (3 * pace + last_moved.elapsed()) / 4;
                    last_moved = Instant::now();
                }
                idle_polls = 0;
            }
        }
    }
}

/// A request under way.
struct Request {
    name: &'static str,
    handle: ffi::MPI_Request,
}

impl Request {
    fn start(name: &'static str, call: impl FnOnce(*mut ffi::MPI_Request) -> i32) -> Result<Request> {
        // SAFETY: a constant of the MPI library, valid after initialisation.
        let mut handle = unsafe { ffi::RSMPI_REQUEST_NULL };
        check(name, call(&mut handle))?;
        Ok(Request { name, handle })
    }

    /// Lets MPI work; whether the request is finished.
    fn finished(&mut self) -> Result<bool> {
        let mut flag = 0;
        // SAFETY: the handle came from the call that `start` made; MPI sets it to null when it is finished.
        let code = unsafe { ffi::MPI_Test(&mut self.handle, &mut flag, ffi::RSMPI_STATUS_IGNORE) };
        check(self.name, code)?;
        Ok(flag != 0)
    }
}

fn check(call: &'static str, code: i32) -> Result<()> {
    if code == 0 {
        Ok(())
    } else {
        Err(Error::Mpi { call, code })
    }
}

fn count(call: &'static str, elements: usize) -> Result<i32> {
    i32::try_from(elements).map_err(|_| Error::TooManyElements { call, count: elements })
}

/// MPI's type for elements of this many bytes that are only moved.
fn moved(width: usize) -> ffi::MPI_Datatype {
    // SAFETY: constants of the MPI library, valid after initialisation.
    unsafe {
        match width {
            1 => ffi::RSMPI_UINT8_T,
            2 => ffi::RSMPI_UINT16_T,
            4 => ffi::RSMPI_UINT32_T,
            8 => ffi::RSMPI_UINT64_T,
            other => panic!("no collective moves elements of {other} bytes"),
        }
    }
}

/// Where a tensor's memory begins; the tensor itself is kept by the job.
#[derive(Clone, Copy)]
struct Address(usize);

impl Address {
    fn of(tensor: &Tensor) -> Address {
        assert_eq!(tensor.device(), tch::Device::Cpu, "MPI moves CPU tensors only");
        Address(tensor.data_ptr() as usize)
    }

    fn at(self) -> *mut std::ffi::c_void {
        self.0 as *mut std::ffi::c_void
    }
}

/// A collective that is one MPI call.
struct OneCall<F> {
    name: &'static str,
    /// Kept until MPI has finished with them.
    _buffers: Vec<Tensor>,
    call: Option<F>,
    request: Option<Request>,
}

impl<F: FnOnce(&Line, *mut ffi::MPI_Request) -> i32> Job for OneCall<F> {
    fn poll(&mut self, line: &Line) -> Result<Poll> {
        if let Some(call) = self.call.take() {
            self.request = Some(Request::start(self.name, |request| call(line, request))?);
            return Ok(Poll::Moved);
        }
        poll_request(&mut self.request)
    }

    fn is_started(&self) -> bool {
        self.request.is_some()
    }
}

fn poll_request(request: &mut Option<Request>) -> Result<Poll> {
    let flying = request.as_mut().expect("a job is polled until it is finished");
    Ok(if flying.finished()? {
        *request = None;
        Poll::Finished
    } else {
        Poll::Waiting
    })
}

/// An all-to-all of unequal parts. MPI reads counts and starts until it has finished: they live here.
struct AllToAll {
    send: Tensor,
    receive: Tensor,
    send_counts: Vec<i32>,
    send_starts: Vec<i32>,
    receive_counts: Vec<i32>,
    receive_starts: Vec<i32>,
    request: Option<Request>,
}

impl AllToAll {
    fn new(send: Tensor, receive: Tensor, send_counts: &[usize], receive_counts: &[usize]) -> AllToAll {
        let ints = |counts: &[usize]| -> Vec<i32> { counts.iter().map(|count| *count as i32).collect() };
        let starts = |counts: &[usize]| -> Vec<i32> {
            let running = counts.iter().scan(0, |end, count| {
                let start = *end;
                *end += count;
                Some(start as i32)
            });
            running.collect()
        };
        AllToAll {
            send_counts: ints(send_counts),
            send_starts: starts(send_counts),
            receive_counts: ints(receive_counts),
            receive_starts: starts(receive_counts),
            send,
            receive,
            request: None,
        }
    }
}

impl Job for AllToAll {
    fn poll(&mut self, line: &Line) -> Result<Poll> {
        if self.request.is_some() {
            return poll_request(&mut self.request);
        }
        let kind = moved(self.send.kind().elt_size_in_bytes());
        // SAFETY: counts were checked against the tensors, which this job keeps with the counts until MPI has finished.
        self.request = Some(Request::start("all-to-all", |request| unsafe {
            ffi::MPI_Ialltoallv(
                self.send.data_ptr(),
                self.send_counts.as_ptr(),
                self.send_starts.as_ptr(),
                kind,
                self.receive.data_ptr(),
                self.receive_counts.as_ptr(),
                self.receive_starts.as_ptr(),
                kind,
                line.raw(),
                request,
            )
        })?);
        Ok(Poll::Moved)
    }

    fn is_started(&self) -> bool {
        self.request.is_some()
    }
}

/// An element as it travels.
trait Element: Copy + Default + 'static {
    /// It travels as it lies there, and need not be packed.
    const IS_F32: bool;
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    const IS_F32: bool = true;

    fn from_f32(value: f32) -> f32 {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const IS_F32: bool = false;

    fn from_f32(value: f32) -> bf16 {
        bf16::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// One all-to-all of equal pieces: what every rank sends this one arrives in `receive`, in rank order.
struct Exchange<W> {
    /// What was packed to be sent, a piece a rank; empty where it lies in a tensor.
    send: Vec<W>,
    /// How it lies there.
    _lies: Option<PieceType>,
    receive: Vec<W>,
    /// What of each slice the piece is.
    piece: Range<usize>,
}

impl<W: Element> Exchange<W> {
    /// Of packed pieces, one after the other. The exchange is kept until the request is finished.
    fn start(line: &Line, send: Vec<W>, receive: Vec<W>, piece: Range<usize>) -> Result<(Request, Exchange<W>)> {
        let (kind, each) = (moved(size_of::<W>()), count("all-reduce", piece.len())?);
        assert_eq!(send.len(), piece.len() * line.world());
        let mut exchange = Exchange {
            send,
            _lies: None,
            receive,
            piece,
        };
        let from = exchange.send.as_ptr().cast_mut().cast();
        // SAFETY: as long as the call says, and kept, unmoved on the heap, until the request is finished.
        let request = unsafe { exchange.request(line, from, each, kind)? };
        Ok((request, exchange))
    }

    /// Of a tensor's slices as they lie, of f32. The tensor too is kept until the request is finished.
    fn start_of(
        line: &Line,
        full: &Tensor,
        slice: usize,
        receive: Vec<W>,
        piece: Range<usize>,
    ) -> Result<(Request, Exchange<W>)> {
        assert!(W::IS_F32 && full.kind() == Kind::Float && full.is_contiguous());
        assert!(full.numel() == slice * line.world() && piece.end <= slice);
        let width = size_of::<W>();
        let lies = PieceType::new(piece.len(), slice, moved(width), width)?;
        let (from, kind) = (Address(Address::of(full).0 + piece.start * width).at(), lies.0);
        let mut exchange = Exchange {
            send: Vec::new(),
            _lies: Some(lies),
            receive,
            piece,
        };
        // SAFETY: the pieces lie within the tensor's slices, an extent apart. By the trait's rule nobody touches it meanwhile.
        let request = unsafe { exchange.request(line, from, 1, kind)? };
        Ok((request, exchange))
    }

    /// # Safety
    /// `from`: so many elements of the type for each rank, to be kept as they are until the request is finished, as `self` is.
    unsafe fn request(
        &mut self,
        line: &Line,
        from: *mut std::ffi::c_void,
        counted: i32,
        kind: ffi::MPI_Datatype,
    ) -> Result<Request> {
        self.receive.resize(self.piece.len() * line.world(), W::default());
        let (arrives, each) = (moved(size_of::<W>()), count("reduce-scatter", self.piece.len())?);
        let to = self.receive.as_mut_ptr().cast();
        // SAFETY: the caller's; what is received is as long as the call says, and is kept, unmoved on the heap.
        Request::start("reduce-scatter", |request| unsafe {
            ffi::MPI_Ialltoall(from, counted, kind, to, each, arrives, line.raw(), request)
        })
    }

    /// Σ over ranks, in their order.
    fn sum_into(&self, mine: &mut [f32]) {
        let mut ranks = self.receive.chunks_exact(self.piece.len());
        let first = ranks.next().expect("at least one rank");
        mine.iter_mut()
            .zip(first)
            .for_each(|(sum, value)| *sum = value.to_f32());
        for values in ranks {
            mine.iter_mut()
                .zip(values)
                .for_each(|(sum, value)| *sum += value.to_f32());
        }
    }
}

/// What is sent and what is received.
const MOST_STAGED: usize = 2 * 2 * STAGING_BYTES;

/// Pieces of a collective that are under way at a time. Each begins with a round trip, in which the others travel: with two, a
/// link of 400 Mbit/s was idle for half of the time.
const FLYING: usize = 8;

/// Elements of a slice that travel in one piece: together they are two times [`STAGING_BYTES`].
fn piece_length(slice: usize, world: usize, width: usize) -> usize {
    (2 * STAGING_BYTES / FLYING / (world * width)).clamp(1, slice.max(1))
}

/// What a collective in pieces does next.
enum Turn<T> {
    /// Start the piece of these elements of every slice.
    Start(Range<usize>),
    /// The oldest piece is still under way.
    Wait,
    /// Take in what has arrived.
    Take(T),
    End,
}

/// A collective's pieces, of which up to [`FLYING`] are under way.
struct Pieces<T> {
    /// Elements of a rank's slice, and bytes of each.
    slice: usize,
    width: usize,
    /// The next piece of every slice begins here.
    next: usize,
    /// The oldest first, each with what is kept until MPI has finished.
    flying: VecDeque<(Request, T)>,
}

impl<T> Pieces<T> {
    fn new(slice: usize, width: usize) -> Pieces<T> {
        Pieces {
            slice,
            width,
            next: 0,
            flying: VecDeque::new(),
        }
    }

    fn turn(&mut self, line: &Line) -> Result<Turn<T>> {
        if !self.are_started() && self.flying.len() < FLYING {
            let end = self.slice.min(self.next + self.length(line));
            return Ok(Turn::Start(self.next..end));
        }
        let Some((request, _)) = self.flying.front_mut() else {
            return Ok(Turn::End);
        };
        if !request.finished()? {
            return Ok(Turn::Wait);
        }
        let (_, kept) = self.flying.pop_front().expect("there is an oldest");
        Ok(Turn::Take(kept))
    }

    /// The piece that `turn` asked for.
    fn started(&mut self, piece: Range<usize>, request: Request, kept: T) {
        self.flying.push_back((request, kept));
        self.next = piece.end;
    }

    fn are_started(&self) -> bool {
        self.next == self.slice
    }

    fn length(&self, line: &Line) -> usize {
        piece_length(self.slice, line.world(), self.width)
    }

    /// Bytes, of all slices, that are under way at most from now on.
    fn staging(&self, line: &Line) -> usize {
        let most = if self.are_started() { self.flying.len() } else { FLYING };
        line.world() * self.width * self.slice.min(most * self.length(line))
    }
}

/// An all-gather in pieces: what was asked for before it is not far behind it in the sockets, and the thread sees that it moves.
struct AllGather {
    mine: Tensor,
    full: Tensor,
    pieces: Pieces<PieceType>,
}

/// MPI's type of one piece of each rank's slice, one slice after the other: with it no number that MPI is given grows with the
/// whole, which may have more elements than an int counts.
struct PieceType(ffi::MPI_Datatype);

impl PieceType {
    fn new(length: usize, slice: usize, kind: ffi::MPI_Datatype, width: usize) -> Result<PieceType> {
        let (name, length) = ("all-gather", count("all-gather", length)?);
        let extent = (slice * width) as ffi::MPI_Aint;
        // SAFETY: a constant of the MPI library, valid after initialisation; the calls below replace it.
        let (mut close, mut spaced) = unsafe { (ffi::RSMPI_DATATYPE_NULL, ffi::RSMPI_DATATYPE_NULL) };
        // SAFETY: each call reads a type that the one before it made, which goes once the last is made of it.
        unsafe {
            check(name, ffi::MPI_Type_contiguous(length, kind, &mut close))?;
            check(name, ffi::MPI_Type_create_resized(close, 0, extent, &mut spaced))?;
            check(name, ffi::MPI_Type_free(&mut close))?;
            check(name, ffi::MPI_Type_commit(&mut spaced))?;
        }
        Ok(PieceType(spaced))
    }
}

impl Drop for PieceType {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and freed once.
        unsafe { ffi::MPI_Type_free(&mut self.0) };
    }
}

impl AllGather {
    fn new(mine: Tensor, full: Tensor) -> AllGather {
        AllGather {
            pieces: Pieces::new(mine.numel(), mine.kind().elt_size_in_bytes()),
            mine,
            full,
        }
    }

    fn start(&mut self, line: &Line, piece: Range<usize>) -> Result<()> {
        let (slice, width) = (self.pieces.slice, self.pieces.width);
        let (kind, each) = (moved(width), count("all-gather", piece.len())?);
        let spaced = PieceType::new(piece.len(), slice, kind, width)?;
        let at = |tensor: &Tensor| Address(Address::of(tensor).0 + piece.start * width).at();
        let (from, to) = (at(&self.mine), at(&self.full));
        // SAFETY: the pieces lie within the tensors, which this job keeps until MPI has finished.
        let request = Request::start("all-gather", |request| unsafe {
            ffi::MPI_Iallgather(from, each, kind, to, 1, spaced.0, line.raw(), request)
        })?;
        self.pieces.started(piece, request, spaced);
        Ok(())
    }
}

impl Job for AllGather {
    fn poll(&mut self, line: &Line) -> Result<Poll> {
        match self.pieces.turn(line)? {
            Turn::Start(piece) => self.start(line, piece)?,
            Turn::Wait => return Ok(Poll::Waiting),
            Turn::Take(_) => {}
            Turn::End => return Ok(Poll::Finished),
        }
        Ok(Poll::Moved)
    }

    fn is_started(&self) -> bool {
        self.pieces.are_started()
    }

    /// Nothing is kept here; but a rank that is late keeps what arrives before it asks for it.
    fn staging(&self, line: &Line) -> usize {
        self.pieces.staging(line)
    }
}

/// A reduce-scatter in pieces: while one's sum is made, the others travel.
struct ReduceScatter<W> {
    full: Tensor,
    mine: Tensor,
    pieces: Pieces<Exchange<W>>,
    /// What earlier pieces were sent from and received in.
    spare: Vec<(Vec<W>, Vec<W>)>,
}

impl<W: Element> ReduceScatter<W> {
    fn new(full: Tensor, mine: Tensor) -> ReduceScatter<W> {
        ReduceScatter {
            pieces: Pieces::new(mine.numel(), size_of::<W>()),
            full,
            mine,
            spare: Vec::new(),
        }
    }

    fn start(&mut self, line: &Line, piece: Range<usize>) -> Result<()> {
        let (mut send, receive) = self.spare.pop().unwrap_or_default();
        let slice = self.pieces.slice;
        let (request, exchange) = if W::IS_F32 {
            Exchange::start_of(line, &self.full, slice, receive, piece.clone())?
        } else {
            send.clear();
            for slice in f32s(&self.full).chunks_exact(slice) {
                send.extend(slice[piece.clone()].iter().map(|value| W::from_f32(*value)));
            }
            Exchange::start(line, send, receive, piece.clone())?
        };
        self.pieces.started(piece, request, exchange);
        Ok(())
    }

    fn take(&mut self, arrived: Exchange<W>) {
        arrived.sum_into(&mut f32s_mut(&mut self.mine)[arrived.piece.clone()]);
        if self.pieces.are_started() {
            self.spare.clear();
        } else {
            self.spare.push((arrived.send, arrived.receive));
        }
    }
}

impl<W: Element> Job for ReduceScatter<W> {
    fn poll(&mut self, line: &Line) -> Result<Poll> {
        match self.pieces.turn(line)? {
            Turn::Start(piece) => self.start(line, piece)?,
            Turn::Wait => return Ok(Poll::Waiting),
            Turn::Take(arrived) => self.take(arrived),
            Turn::End => return Ok(Poll::Finished),
        }
        Ok(Poll::Moved)
    }

    fn is_started(&self) -> bool {
        self.pieces.are_started()
    }

    /// What is received, and what was packed to be sent, or what MPI keeps of it: measured, that is as much.
    fn staging(&self, line: &Line) -> usize {
        2 * self.pieces.staging(line)
    }
}

/// A reduce-scatter and an all-gather of each piece, one piece after the other.
struct AllReduce<W> {
    values: Tensor,
    /// Each rank sums this many elements; the last rank's may be fewer.
    slice: usize,
    /// What of each slice is under way; the next begins where it ends.
    piece: Range<usize>,
    summing: Option<(Request, Exchange<W>)>,
    /// This rank's sum and everybody's.
    gathering: Option<(Request, Vec<W>, Vec<W>)>,
}

impl<W: Element> AllReduce<W> {
    fn new(values: Tensor, world: usize) -> AllReduce<W> {
        AllReduce {
            slice: values.numel().div_ceil(world),
            values,
            piece: 0..0,
            summing: None,
            gathering: None,
        }
    }

    /// Of which one is under way at a time.
    fn piece_length(&self, world: usize) -> usize {
        (STAGING_BYTES / (world * size_of::<W>())).clamp(1, self.slice.max(1))
    }

    /// Where in `values` the piece of a rank's slice is; shorter or empty at the end.
    fn range(&self, rank: usize) -> Range<usize> {
        let end = ((rank + 1) * self.slice).min(self.values.numel());
        let first = (rank * self.slice + self.piece.start).min(end);
        first..(first + self.piece.len()).min(end)
    }
}

impl<W: Element> Job for AllReduce<W> {
    fn poll(&mut self, line: &Line) -> Result<Poll> {
        if let Some((request, _, sums)) = &mut self.gathering {
            if !request.finished()? {
                return Ok(Poll::Waiting);
            }
            let sums = std::mem::take(sums);
            self.gathering = None;
            for (rank, sums) in sums.chunks_exact(self.piece.len()).enumerate() {
                let range = self.range(rank);
                let out = &mut f32s_mut(&mut self.values)[range];
                out.iter_mut().zip(sums).for_each(|(value, sum)| *value = sum.to_f32());
            }
            return Ok(Poll::Moved);
        }
        if let Some((request, exchange)) = &mut self.summing {
            if !request.finished()? {
                return Ok(Poll::Waiting);
            }
            let mut sum = vec![0f32; exchange.piece.len()];
            exchange.sum_into(&mut sum);
            self.summing = None;
            let mine: Vec<W> = sum.into_iter().map(W::from_f32).collect();
            let mut all = vec![W::default(); mine.len() * line.world()];
            let (kind, each) = (moved(size_of::<W>()), count("all-reduce", mine.len())?);
            let (from, to) = (mine.as_ptr().cast(), all.as_mut_ptr().cast());
            // SAFETY: as in `Exchange::start`.
            let request = Request::start("all-reduce", |request| unsafe {
                ffi::MPI_Iallgather(from, each, kind, to, each, kind, line.raw(), request)
            })?;
            self.gathering = Some((request, mine, all));
            return Ok(Poll::Moved);
        }
        let start = self.piece.end;
        if start == self.slice {
            return Ok(Poll::Finished);
        }
        self.piece = start..self.slice.min(start + self.piece_length(line.world()));
        let mut send = Vec::with_capacity(self.piece.len() * line.world());
        for rank in 0..line.world() {
            let values = &f32s(&self.values)[self.range(rank)];
            send.extend(values.iter().map(|value| W::from_f32(*value)));
            send.resize((rank + 1) * self.piece.len(), W::default());
        }
        self.summing = Some(Exchange::start(line, send, Vec::new(), self.piece.clone())?);
        Ok(Poll::Moved)
    }

    fn is_started(&self) -> bool {
        self.piece.end == self.slice && self.gathering.is_some()
    }

    fn staging(&self, line: &Line) -> usize {
        2 * line.world() * size_of::<W>() * self.piece_length(line.world())
    }
}
