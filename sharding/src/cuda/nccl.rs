//! The door to NCCL: collectives between GPUs, on a stream of their own. What is on the host (a few numbers, names, the unique
//! id) goes through another engine, MPI, which also brought the ranks together.
//!
//! Order is kept by events both ways: NCCL's stream waits for what libtorch's stream was given before a collective is
//! started, and libtorch's stream waits for the collective when its [`Pending`] is waited for; the host waits for neither.
//! A thread asks every second for asynchronous errors: a peer that is gone would else leave this rank's stream waiting for
//! ever. It aborts the communicator, which ends the kernels under way. While a call is inside NCCL (the first that meets a peer
//! connects to it) it cannot: there the ranks' own watch over each other ends the process.
//!
//! What NCCL's types are, cudarc's `nccl` module says. Its functions are called by name from the libnccl.so.2 that libtorch itself
//! loads: cudarc looks for other file names, and a second copy of NCCL would be another library than the one that is reported.
//! (cudarc's `Comm` besides aborts when it is dropped and panics where that fails, and its errors print no code.)

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use cudarc::driver::sys::{CUevent_flags, CUstream};
use cudarc::driver::{CudaContext, CudaStream};
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Kind, Tensor};

use super::{context, driver, index_of, stream};
use crate::comm::{Sent, Wire};
use crate::{Comm, Error, Pending, Result};

const WATCH_EVERY: Duration = Duration::from_secs(1);

/// As a number, which cudarc's `ncclResult_t` is not: a newer NCCL may answer what that has no name for.
type Code = c_int;

/// Rank 0 makes one, and every rank joins with it: whatever brought the ranks together carries its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniqueId(ncclUniqueId);

impl UniqueId {
    pub const BYTES: usize = 128;

    /// A new one. It names an address of this machine's where the others find this process: rank 0 keeps running until all
    /// have joined.
    ///
    /// # Errors
    /// When NCCL is not there, or finds no network interface.
    pub fn new() -> Result<UniqueId> {
        let functions = Functions::load()?;
        let mut id = UniqueId::from([0; UniqueId::BYTES]);
        // SAFETY: writes one id.
        functions.check("ncclGetUniqueId", unsafe { (functions.get_unique_id)(&mut id.0) })?;
        Ok(id)
    }

    pub fn bytes(&self) -> [u8; UniqueId::BYTES] {
        self.0.internal.map(|byte| byte as u8)
    }
}

impl From<[u8; UniqueId::BYTES]> for UniqueId {
    fn from(bytes: [u8; UniqueId::BYTES]) -> UniqueId {
        UniqueId(ncclUniqueId {
            internal: bytes.map(|byte| byte as c_char),
        })
    }
}

const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;
/// What is only moved travels as bytes.
const BYTES: ncclDataType_t = ncclDataType_t::ncclUint8;
const FLOAT: ncclDataType_t = ncclDataType_t::ncclFloat32;
const SUM: ncclRedOp_t = ncclRedOp_t::ncclSum;

type Reduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, CUstream) -> Code;

/// NCCL 2's functions, as nccl.h declares them.
#[derive(Clone, Copy)]
struct Functions {
    get_version: unsafe extern "C" fn(*mut c_int) -> Code,
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> Code,
    comm_init_rank: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> Code,
    comm_destroy: unsafe extern "C" fn(ncclComm_t) -> Code,
    comm_abort: unsafe extern "C" fn(ncclComm_t) -> Code,
    get_async_error: unsafe extern "C" fn(ncclComm_t, *mut Code) -> Code,
    get_error_string: unsafe extern "C" fn(Code) -> *const c_char,
    all_reduce: Reduce,
    reduce_scatter: Reduce,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, CUstream) -> Code,
    broadcast:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, CUstream) -> Code,
    send: unsafe extern "C" fn(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, CUstream) -> Code,
    recv: unsafe extern "C" fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, CUstream) -> Code,
    group_start: unsafe extern "C" fn() -> Code,
    group_end: unsafe extern "C" fn() -> Code,
}

impl Functions {
    fn load() -> Result<Functions> {
        let refused = |error: libloading::Error| Error::NoNccl(error.to_string());
        // It stays for good: `ncclGetUniqueId` leaves a thread behind, which runs on, and these functions are copied freely.
        const RTLD_NODELETE: i32 = 0x1000;
        let how = RTLD_NOW | RTLD_GLOBAL | RTLD_NODELETE;
        // SAFETY: NCCL's own library, whose initialisers only read its environment; it is never closed.
        let library = unsafe { Library::open(Some("libnccl.so.2"), how) }.map_err(refused)?;
        macro_rules! named {
            ($name:literal) => {
                // SAFETY: the field's type is the function's declaration in nccl.h.
                *unsafe { library.get($name) }.map_err(refused)?
            };
        }
        Ok(Functions {
            get_version: named!(b"ncclGetVersion"),
            get_unique_id: named!(b"ncclGetUniqueId"),
            comm_init_rank: named!(b"ncclCommInitRank"),
            comm_destroy: named!(b"ncclCommDestroy"),
            comm_abort: named!(b"ncclCommAbort"),
            get_async_error: named!(b"ncclCommGetAsyncError"),
            get_error_string: named!(b"ncclGetErrorString"),
            all_reduce: named!(b"ncclAllReduce"),
            reduce_scatter: named!(b"ncclReduceScatter"),
            all_gather: named!(b"ncclAllGather"),
            broadcast: named!(b"ncclBroadcast"),
            send: named!(b"ncclSend"),
            recv: named!(b"ncclRecv"),
            group_start: named!(b"ncclGroupStart"),
            group_end: named!(b"ncclGroupEnd"),
        })
    }

    fn check(&self, call: &'static str, code: Code) -> Result<()> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: NCCL hands out a constant of its own for every code.
        let text = unsafe { CStr::from_ptr((self.get_error_string)(code)) };
        Err(Error::Nccl {
            call,
            code,
            text: text.to_string_lossy().into_owned(),
        })
    }

    /// "2.28.9"
    fn version(&self) -> Result<String> {
        let mut version = 0;
        // SAFETY: writes one number.
        self.check("ncclGetVersion", unsafe { (self.get_version)(&mut version) })?;
        Ok(format!(
            "{}.{}.{}",
            version / 10_000,
            version / 100 % 100,
            version % 100
        ))
    }
}

/// The loaded NCCL's version and file.
pub fn library() -> Result<String> {
    // Its file is known while it is loaded.
    let functions = Functions::load()?;
    Ok(format!("NCCL {}, {}", functions.version()?, file_of("libnccl.so")))
}

/// The file that a loaded library of this name came from.
fn file_of(name: &str) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    let found = paths
        .into_iter()
        .find(|path| path.rsplit('/').next().is_some_and(|file| file.starts_with(name)));
    found.unwrap_or("from an unknown file").to_owned()
}

/// The communicator; `None` once it was aborted.
struct Communicator(Option<ncclComm_t>);

// SAFETY: NCCL allows a communicator's functions to be called from any thread, one at a time: the mutex around it sees to that.
unsafe impl Send for Communicator {}

impl Communicator {
    fn alive(&self) -> Result<ncclComm_t> {
        self.0.ok_or(Error::NcclAborted)
    }
}

/// Collectives between the GPUs of a run, one a rank.
pub struct Nccl {
    connection: Connection,
    index: usize,
    /// Every f32 sum is made in rank order, as bf16's always are.
    ordered: bool,
    engine: String,
    host: Box<dyn Comm>,
}

/// Why this rank did not meet the others through NCCL, and the engine through which it had met them before.
pub struct Refused {
    pub error: Error,
    host: Box<dyn Comm>,
}

impl Refused {
    /// Ends all ranks at once.
    pub fn abort(self, code: i32) -> ! {
        self.host.abort(code)
    }
}

/// NCCL's part of a rank: library, communicator, stream, and the thread that watches them.
struct Connection {
    functions: Functions,
    communicator: Arc<Mutex<Communicator>>,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    version: String,
    watching: Arc<AtomicBool>,
    watch: Option<JoinHandle<()>>,
}

impl Connection {
    fn new(id: &UniqueId, host: &dyn Comm, index: usize) -> Result<Connection> {
        let context = context(index)?;
        let functions = Functions::load()?;
        let version = functions.version()?;
        let stream = context.new_stream().map_err(driver("cuStreamCreate"))?;
        let mut handle = std::ptr::null_mut();
        context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        let (world, rank) = (host.world() as c_int, host.rank() as c_int);
        // SAFETY: writes one handle; every rank calls it with the same id and world, and a rank of its own.
        functions.check("ncclCommInitRank", unsafe {
            (functions.comm_init_rank)(&mut handle, world, id.0, rank)
        })?;
        let communicator = Arc::new(Mutex::new(Communicator(Some(handle))));
        let watching = Arc::new(AtomicBool::new(true));
        let watch = {
            let (functions, communicator, watching) = (functions, communicator.clone(), watching.clone());
            std::thread::Builder::new()
                .name("nccl watch".into())
                .spawn(move || watch(&functions, &communicator, &watching))
                .map_err(|_| Error::NoThread)?
        };
        Ok(Connection {
            functions,
            communicator,
            context,
            stream,
            version,
            watching,
            watch: Some(watch),
        })
    }
}

/// Rank 0's new id, on every rank of `host`.
fn told_id(host: &dyn Comm) -> Result<UniqueId> {
    // What rank 0 cannot make the others must not wait for: they are told zeros.
    let made = (host.rank() == 0).then(UniqueId::new);
    let none = UniqueId::from([0; UniqueId::BYTES]);
    let told = match &made {
        Some(Ok(id)) => *id,
        _ => none,
    };
    let told = host.broadcast_bytes(&told.bytes())?;
    if let Some(made) = made {
        return made;
    }
    let told = UniqueId::from(<[u8; UniqueId::BYTES]>::try_from(told).expect("as many as were sent"));
    match told == none {
        true => Err(Error::NoNccl(
            "rank 0 could not load it or make an id; see its log".into(),
        )),
        false => Ok(told),
    }
}

impl Nccl {
    /// Joins the ranks of `host` through NCCL, this one with GPU `index`; rank 0's id reaches the others through `host`.
    /// `ordered`: sums are made in rank order, whatever algorithm NCCL would choose, for as many bytes and a slice's memory a
    /// rank more.
    ///
    /// # Errors
    /// When rank 0 has no NCCL, which all ranks then say; else as [`Nccl::join_with`]'s.
    pub fn join(host: Box<dyn Comm>, index: usize, ordered: bool) -> std::result::Result<Nccl, Refused> {
        match told_id(host.as_ref()) {
            Ok(id) => Nccl::join_with(&id, host, index, ordered),
            Err(error) => Err(Refused { error, host }),
        }
    }

    /// As [`Nccl::join`], with an id that all ranks have already. Returns when all have come.
    ///
    /// # Errors
    /// When there is no driver, no such GPU or no NCCL, or when a rank cannot be reached. The others may be waiting for this
    /// one: end them with [`Refused::abort`].
    pub fn join_with(
        id: &UniqueId,
        host: Box<dyn Comm>,
        index: usize,
        ordered: bool,
    ) -> std::result::Result<Nccl, Refused> {
        let connection = match Connection::new(id, host.as_ref(), index) {
            Ok(connection) => connection,
            Err(error) => return Err(Refused { error, host }),
        };
        let engine = format!(
            "NCCL {}, {}; {} on the host",
            connection.version,
            file_of("libnccl.so"),
            host.engine()
        );
        Ok(Nccl {
            connection,
            index,
            ordered,
            engine,
            host,
        })
    }

    /// Whether a tensor is on this rank's GPU; else it is the host engine's.
    ///
    /// # Errors
    /// When the communicator was aborted: what the GPU holds since is no sum of anything, and the host may not agree on it.
    fn is_ours(&self, tensor: &Tensor) -> Result<bool> {
        assert!(tensor.is_contiguous());
        self.connection.communicator.lock().map_err(|_| Error::Gone)?.alive()?;
        let index = index_of(tensor);
        assert!(
            index.is_none_or(|index| index == self.index),
            "a rank's tensors lie on its own GPU"
        );
        Ok(index.is_some())
    }

    /// Starts `call` on NCCL's stream, behind what libtorch's stream was given. `buffers` live until the waiting is over, and
    /// libtorch reuses their memory behind it.
    fn launch(
        &self,
        name: &'static str,
        buffers: Vec<Tensor>,
        call: impl FnOnce(&Functions, ncclComm_t, CUstream) -> Code,
        then: impl FnOnce() -> Result<()> + 'static,
    ) -> Result<Pending> {
        let torch = self.torch_stream()?;
        let given = torch.record_event(None).map_err(driver("cuEventRecord"))?;
        self.connection
            .stream
            .wait(&given)
            .map_err(driver("cuStreamWaitEvent"))?;
        let communicator = self.connection.communicator.lock().map_err(|_| Error::Gone)?;
        let handle = communicator.alive()?;
        self.connection
            .context
            .bind_to_thread()
            .map_err(driver("cuCtxSetCurrent"))?;
        self.connection.functions.check(
            name,
            call(&self.connection.functions, handle, self.connection.stream.cu_stream()),
        )?;
        drop(communicator);
        let flags = Some(CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let done = Arc::new(
            self.connection
                .stream
                .record_event(flags)
                .map_err(driver("cuEventRecord"))?,
        );
        let asked = Arc::clone(&done);
        Ok(Pending::until(
            move || asked.is_complete(),
            move || {
                torch.wait(&done).map_err(driver("cuStreamWaitEvent"))?;
                drop(buffers);
                then()
            },
        ))
    }

    /// The stream that libtorch's operations on this GPU go to now.
    fn torch_stream(&self) -> Result<Arc<CudaStream>> {
        let torch = stream(self.index)?;
        // SAFETY: libtorch's streams belong to the device's one primary context and are never destroyed.
        Ok(unsafe { self.connection.context.wrap_borrowed_stream(torch.cast()) })
    }

    /// Every rank's share of this rank's slice, one after the other in rank order, as it travelled.
    fn exchange(&self, full: &Tensor, wire: Wire) -> Result<(Tensor, Pending)> {
        let kind = match wire {
            Wire::F32 => Kind::Float,
            Wire::Bf16 => Kind::BFloat16,
        };
        let send = full.f_to_kind(kind)?;
        let mut shares = send.f_empty_like()?;
        let each = vec![full.numel() / self.world(); self.world()];
        let pending = self.move_parts("reduce-scatter", &send, &each, &mut shares, &each)?;
        Ok((shares, pending))
    }

    fn move_parts(
        &self,
        name: &'static str,
        send: &Tensor,
        send_counts: &[usize],
        receive: &mut Tensor,
        receive_counts: &[usize],
    ) -> Result<Pending> {
        let width = send.kind().elt_size_in_bytes();
        let parts = parts(send_counts, width).into_iter().zip(parts(receive_counts, width));
        let parts: Vec<_> = parts.enumerate().collect();
        let (from, to) = (send.data_ptr() as usize, receive.data_ptr() as usize);
        let buffers = vec![send.shallow_clone(), receive.shallow_clone()];
        let call = move |functions: &Functions, handle: ncclComm_t, stream: CUstream| {
            // SAFETY: the parts lie within the two buffers, which live until the stream is through; a group makes the calls
            // of all peers one operation, so that none waits for another.
            unsafe {
                let mut code = (functions.group_start)();
                for (peer, ((start, length), (receive_start, receive_length))) in parts {
                    let peer = peer as c_int;
                    if length > 0 && code == SUCCESS {
                        code = (functions.send)((from + start) as *const c_void, length, BYTES, peer, handle, stream);
                    }
                    if receive_length > 0 && code == SUCCESS {
                        let to = (to + receive_start) as *mut c_void;
                        code = (functions.recv)(to, receive_length, BYTES, peer, handle, stream);
                    }
                }
                let end = (functions.group_end)();
                if code == SUCCESS { end } else { code }
            }
        };
        self.launch(name, buffers, call, || Ok(()))
    }
}

/// Where each part begins, and its length, bytes.
fn parts(counts: &[usize], width: usize) -> Vec<(usize, usize)> {
    let mut end = 0;
    let part = |count: &usize| {
        let start = end;
        end += count * width;
        (start, count * width)
    };
    counts.iter().map(part).collect()
}

/// `mine` = Σ shares, in their order, in f32.
fn add_up(shares: &Tensor, world: usize, mine: &mut Tensor) -> Result<()> {
    let slices = shares.view([world as i64, -1]);
    mine.f_copy_(&slices.get(0))?;
    for rank in 1..world as i64 {
        let _ = mine.f_add_(&slices.get(rank).f_to_kind(Kind::Float)?)?;
    }
    Ok(())
}

/// Asks for errors until the run is over; an error ends the communicator, and with it the kernels that wait for the peer.
fn watch(functions: &Functions, communicator: &Mutex<Communicator>, watching: &AtomicBool) {
    while watching.load(Ordering::Acquire) {
        std::thread::park_timeout(WATCH_EVERY);
        let Ok(mut communicator) = communicator.lock() else {
            return;
        };
        let Some(handle) = communicator.0 else { return };
        let mut error = SUCCESS;
        // SAFETY: the handle is alive: whoever ends it takes it out first, under this lock.
        let asked = unsafe { (functions.get_async_error)(handle, &mut error) };
        if let Err(error) = functions.check("a collective", if asked == SUCCESS { error } else { asked }) {
            eprintln!("panglot-worker: {error}");
            communicator.0 = None;
            // SAFETY: as above; nobody has the handle any more.
            unsafe { (functions.comm_abort)(handle) };
            return;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.watching.store(false, Ordering::Release);
        if let Some(watch) = self.watch.take() {
            watch.thread().unpark();
            let _ = watch.join();
        }
        let handle = self
            .communicator
            .lock()
            .ok()
            .and_then(|mut communicator| communicator.0.take());
        if let Some(handle) = handle {
            let _ = self.stream.synchronize();
            // SAFETY: nothing is under way any more, and nobody else has the handle.
            let _ = unsafe { (self.functions.comm_destroy)(handle) };
        }
    }
}

impl Comm for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world(&self) -> usize {
        self.host.world()
    }

    fn copies_to_reduce(&self, wire: Wire) -> bool {
        wire != Wire::F32 || self.ordered
    }

    fn reduce_scatter(&self, full: &Tensor, mine: &mut Tensor, wire: Wire) -> Result<Pending> {
        if !self.is_ours(full)? {
            return self.host.reduce_scatter(full, mine, wire);
        }
        assert_eq!((full.kind(), mine.kind()), (Kind::Float, Kind::Float));
        assert_eq!(full.numel(), mine.numel() * self.world());
        self.sent().add(mine.numel() * (self.world() - 1) * wire.bytes());
        if wire == Wire::F32 && !self.ordered {
            let (from, to, count) = (full.data_ptr() as usize, mine.data_ptr() as usize, mine.numel());
            let buffers = vec![full.shallow_clone(), mine.shallow_clone()];
            let call = move |functions: &Functions, handle: ncclComm_t, stream: CUstream| {
                // SAFETY: counts were checked; both buffers live until the stream is through.
                unsafe {
                    let (from, to) = (from as *const c_void, to as *mut c_void);
                    (functions.reduce_scatter)(from, to, count, FLOAT, SUM, handle, stream)
                }
            };
            return self.launch("ncclReduceScatter", buffers, call, || Ok(()));
        }
        let (shares, pending) = self.exchange(full, wire)?;
        let (mut mine, world) = (mine.shallow_clone(), self.world());
        let pending = std::rc::Rc::new(std::cell::RefCell::new(Some(pending)));
        let asked = pending.clone();
        Ok(Pending::until(
            move || asked.borrow().as_ref().is_none_or(Pending::is_over),
            move || {
                pending.borrow_mut().take().map_or(Ok(()), Pending::wait)?;
                add_up(&shares, world, &mut mine)
            },
        ))
    }

    fn all_reduce(&self, values: &mut Tensor, wire: Wire) -> Result<Pending> {
        if !self.is_ours(values)? {
            return self.host.all_reduce(values, wire);
        }
        assert_eq!(values.kind(), Kind::Float);
        let (numel, world) = (values.numel(), self.world());
        let slice = numel.div_ceil(world);
        self.sent().add(2 * slice * (world - 1) * wire.bytes());
        if wire == Wire::F32 && !self.ordered {
            let at = values.data_ptr() as usize;
            let call = move |functions: &Functions, handle: ncclComm_t, stream: CUstream| {
                // SAFETY: in place, as NCCL allows; the buffer lives until the stream is through.
                unsafe {
                    (functions.all_reduce)(
                        at as *const c_void,
                        at as *mut c_void,
                        numel,
                        FLOAT,
                        SUM,
                        handle,
                        stream,
                    )
                }
            };
            return self.launch("ncclAllReduce", vec![values.shallow_clone()], call, || Ok(()));
        }
        // Two exchanges with a sum between them: the second is started when the first has been waited for.
        let padding = (slice * world - numel) as i64;
        let padded = values.f_constant_pad_nd([0, padding])?;
        let (shares, pending) = self.exchange(&padded, wire)?;
        pending.wait()?;
        let mut mine = Tensor::f_empty([slice as i64], (Kind::Float, values.device()))?;
        add_up(&shares, world, &mut mine)?;
        let mine = mine.f_to_kind(shares.kind())?;
        let mut all = shares.f_empty_like()?;
        self.gather(&mine, &mut all)?.wait()?;
        values.f_copy_(&all.narrow(0, 0, numel as i64))?;
        Ok(Pending::done())
    }

    fn all_gather(&self, mine: &Tensor, full: &mut Tensor) -> Result<Pending> {
        if !self.is_ours(mine)? {
            return self.host.all_gather(mine, full);
        }
        assert_eq!((full.kind(), full.numel()), (mine.kind(), mine.numel() * self.world()));
        self.sent()
            .add(mine.numel() * (self.world() - 1) * mine.kind().elt_size_in_bytes());
        self.gather(mine, full)
    }

    fn all_to_all(
        &self,
        send: &Tensor,
        send_counts: &[usize],
        receive: &mut Tensor,
        receive_counts: &[usize],
    ) -> Result<Pending> {
        if !self.is_ours(send)? {
            return self.host.all_to_all(send, send_counts, receive, receive_counts);
        }
        assert_eq!(send.kind(), receive.kind());
        assert_eq!(send.numel(), send_counts.iter().sum::<usize>());
        assert_eq!(receive.numel(), receive_counts.iter().sum::<usize>());
        let width = send.kind().elt_size_in_bytes();
        self.sent().add((send.numel() - send_counts[self.rank()]) * width);
        self.move_parts("all-to-all", send, send_counts, receive, receive_counts)
    }

    fn broadcast(&self, values: &mut Tensor, root: usize) -> Result<Pending> {
        if !self.is_ours(values)? {
            return self.host.broadcast(values, root);
        }
        let bytes = values.numel() * values.kind().elt_size_in_bytes();
        if self.rank() == root {
            self.sent().add(bytes);
        }
        let (at, root) = (values.data_ptr() as usize, root as c_int);
        let call = move |functions: &Functions, handle: ncclComm_t, stream: CUstream| {
            // SAFETY: in place; the buffer lives until the stream is through.
            unsafe {
                (functions.broadcast)(
                    at as *const c_void,
                    at as *mut c_void,
                    bytes,
                    BYTES,
                    root,
                    handle,
                    stream,
                )
            }
        };
        self.launch("ncclBroadcast", vec![values.shallow_clone()], call, || Ok(()))
    }

    fn barrier(&self) -> Result<()> {
        self.host.barrier()
    }

    fn sent(&self) -> &Sent {
        self.host.sent()
    }

    fn engine(&self) -> String {
        self.engine.clone()
    }

    fn abort(&self, code: i32) -> ! {
        let handle = self
            .connection
            .communicator
            .lock()
            .ok()
            .and_then(|mut communicator| communicator.0.take());
        if let Some(handle) = handle {
            // SAFETY: nobody else has the handle any more.
            unsafe { (self.connection.functions.comm_abort)(handle) };
        }
        self.host.abort(code)
    }
}

impl Nccl {
    fn gather(&self, mine: &Tensor, full: &mut Tensor) -> Result<Pending> {
        let bytes = mine.numel() * mine.kind().elt_size_in_bytes();
        let (from, to) = (mine.data_ptr() as usize, full.data_ptr() as usize);
        let buffers = vec![mine.shallow_clone(), full.shallow_clone()];
        let call = move |functions: &Functions, handle: ncclComm_t, stream: CUstream| {
            // SAFETY: counts were checked; both buffers live until the stream is through.
            unsafe { (functions.all_gather)(from as *const c_void, to as *mut c_void, bytes, BYTES, handle, stream) }
        };
        self.launch("ncclAllGather", buffers, call, || Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tch::Device;

    use super::*;

    #[test]
    fn an_id_is_new_each_time_and_survives_as_bytes() {
        let id = UniqueId::new().unwrap_or_else(|error| panic!("{error}; `make setup` provides it"));
        assert_ne!(id, UniqueId::from([0; UniqueId::BYTES]));
        assert_ne!(id, UniqueId::new().unwrap(), "each world has its own");
        assert_eq!(UniqueId::from(id.bytes()), id);
    }

    #[test]
    fn after_an_abort_nothing_is_started() {
        let said = Communicator(None).alive().unwrap_err().to_string();
        assert!(said.contains("look at the first rank that stopped"), "{said}");
        assert!(Communicator(Some(std::ptr::dangling_mut())).alive().is_ok());
    }

    #[test]
    fn an_error_that_comes_later_ends_the_communicator() {
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        static ABORTED: AtomicUsize = AtomicUsize::new(0);
        unsafe extern "C" fn remote_error_at_the_third(_: ncclComm_t, error: *mut Code) -> Code {
            let third = ASKED.fetch_add(1, Ordering::Relaxed) == 2;
            // SAFETY: where `watch` wants the answer.
            unsafe { *error = if third { 6 } else { SUCCESS } };
            SUCCESS
        }
        unsafe extern "C" fn abort(communicator: ncclComm_t) -> Code {
            ABORTED.store(communicator as usize, Ordering::Relaxed);
            SUCCESS
        }
        let functions = Functions {
            get_async_error: remote_error_at_the_third,
            comm_abort: abort,
            ..Functions::load().unwrap()
        };
        let handle: ncclComm_t = std::ptr::without_provenance_mut(4096);
        let communicator = Mutex::new(Communicator(Some(handle)));
        watch(&functions, &communicator, &AtomicBool::new(false));
        assert_eq!(ASKED.load(Ordering::Relaxed), 0, "the run was over");
        watch(&functions, &communicator, &AtomicBool::new(true));
        assert_eq!(ASKED.load(Ordering::Relaxed), 3, "once a second, until one is told");
        assert_eq!(ABORTED.load(Ordering::Relaxed), 4096);
        assert!(communicator.lock().unwrap().alive().is_err());
    }

    #[test]
    fn the_library_has_every_function_and_says_its_version_and_file() {
        let said = library().unwrap_or_else(|error| panic!("{error}; `make setup` provides it"));
        assert!(said.starts_with("NCCL 2.") && said.ends_with("libnccl.so.2"), "{said}");
        println!("{said}");
    }

    #[test]
    fn an_error_says_its_code_and_what_it_means() {
        let functions = Functions::load().unwrap();
        assert!(functions.check("ncclAllGather", SUCCESS).is_ok());
        let said = functions.check("ncclAllGather", 5).unwrap_err().to_string();
        assert!(
            said.starts_with("ncclAllGather failed with NCCL error 5 (invalid usage"),
            "{said}"
        );
    }

    #[test]
    fn parts_follow_each_other() {
        assert_eq!(parts(&[3, 0, 2], 4), [(0, 12), (12, 0), (12, 8)]);
    }

    #[test]
    fn shares_are_added_in_rank_order_in_f32() {
        let shares = Tensor::from_slice(&[1e8f32, 1.0, 1.0, 2.0, -1e8, 3.0]);
        let mut mine = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        add_up(&shares, 3, &mut mine).unwrap();
        assert_eq!(Vec::<f32>::try_from(&mine).unwrap(), [(1e8 + 1.0) - 1e8, 6.0]);
        add_up(&shares.to_kind(Kind::BFloat16), 3, &mut mine).unwrap();
        assert_eq!(Vec::<f32>::try_from(&mine).unwrap()[1], 6.0);
    }
}
