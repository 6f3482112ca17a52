//! The door to CUDA: whether there is a driver, libtorch's CUDA half, the GPU of a rank, kernels of our own (`kernels.rs`),
//! attention (`attention.rs`) and collectives between GPUs (`nccl.rs`). Everything is found when the program runs, so one program serves machines with and
//! without GPUs. A GPU that was asked for and is not there is an error, never a reason to compute elsewhere.
#![allow(unsafe_code)]

pub mod attention;
pub mod emulator;
pub mod kernels;
pub mod nccl;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::{CudaContext, sys};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Cuda, Device, Tensor};

/// What can be missing or fail between us and a GPU.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "train.device = cuda, but there is no CUDA driver here (libcuda.so.1 is not found); run on a machine with an NVIDIA GPU, \
         or set train.device: cpu"
    )]
    NoDriver,
    #[error(
        "train.device = cuda, but the CUDA driver here shows this process no GPU; ask the scheduler for one (slurm: --gpus), \
         see that CUDA_VISIBLE_DEVICES does not hide it, or set train.device: cpu"
    )]
    NoGpu,
    #[error(
        "libtorch's CUDA half cannot be loaded ({0}); let LD_LIBRARY_PATH name the lib folder of a torch {torch} that was \
         built for CUDA",
        torch = TORCH
    )]
    NoLibtorchCuda(String),
    #[error("there is no GPU {index}: the driver shows this process {visible}, numbered from 0")]
    NoSuchGpu { index: usize, visible: usize },
    #[error(
        "NVRTC, which compiles the kernels, is not found (libnvrtc.so.13); let LD_LIBRARY_PATH name its folder, \
         nvidia/cu13/lib beside torch"
    )]
    NoNvrtc,
    #[error(
        "the kernels' compiler is NVRTC {}.{}, newer than this driver, which knows CUDA {}.{} and could not load what it makes; let \
         LD_LIBRARY_PATH begin with the folder of the libnvrtc.so.13 that came with torch {torch} (nvidia/cu13/lib beside it)",
        compiler.0, compiler.1, driver.0, driver.1, torch = TORCH
    )]
    NewerNvrtc { compiler: (i32, i32), driver: (i32, i32) },
    #[error("{file} does not compile for {architecture}; this is a defect:\n{log}")]
    Compile {
        file: &'static str,
        architecture: String,
        log: String,
    },
    #[error(
        "train.frozen_precision = fp8, but {name} has compute capability {major}.{minor} and units for FP8 came with 8.9; \
         leave frozen_precision out"
    )]
    NoFp8 { name: String, major: i32, minor: i32 },
    #[error("CUDA's driver: {call}: {error}")]
    Driver { call: String, error: String },
}

pub type Result<T> = std::result::Result<T, Error>;

/// The libtorch that `tch` is made for.
const TORCH: &str = "2.11.0";

/// What a GPU is.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub name: String,
    /// Major and minor: (9, 0) is Hopper's.
    pub compute_capability: (i32, i32),
    pub memory_bytes: u64,
}

/// Whether this machine has NVIDIA's driver.
pub fn driver_is_there() -> bool {
    // Asked once: it looks for the file under seventeen names, and every launch of a kernel comes by here.
    static THERE: OnceLock<bool> = OnceLock::new();
    // SAFETY: opens libcuda.so, whose initialisers are the driver's own, and looks at whether it could.
    *THERE.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// Loads libtorch's CUDA half, once, and says how many GPUs it sees. Before the first tensor: libtorch asks once whether
/// CUDA is there and keeps the answer.
///
/// # Errors
/// When there is no driver, or libtorch has no CUDA half or does not see a GPU.
pub fn load() -> Result<usize> {
    static SEEN: OnceLock<Result<usize>> = OnceLock::new();
    let load = || {
        if !driver_is_there() {
            return Err(Error::NoDriver);
        }
        check_libtorch()?;
        match Cuda::device_count() {
            n if n > 0 && Cuda::is_available() => {
                keep_sums_in_f32();
                Ok(n as usize)
            }
            _ => Err(Error::NoGpu),
        }
    };
    SEEN.get_or_init(load).clone()
}

/// The GPU with this index among those that the driver shows, ready for tensors and kernels.
///
/// # Errors
/// As [`load`]'s; when there is none; when kernels could not be compiled there.
pub fn device(index: usize) -> Result<Device> {
    let visible = load()?;
    if index >= visible {
        return Err(Error::NoSuchGpu { index, visible });
    }
    if !kernels::compiler_is_there() {
        return Err(Error::NoNvrtc);
    }
    context(index)?;
    Ok(Device::Cuda(index))
}

/// What the GPU with this index is.
pub fn gpu(index: usize) -> Result<Gpu> {
    let context = context(index)?;
    Ok(Gpu {
        name: context.name().map_err(driver("cuDeviceGetName"))?,
        compute_capability: context.compute_capability().map_err(driver("cuDeviceGetAttribute"))?,
        memory_bytes: context.total_mem().map_err(driver("cuDeviceTotalMem"))? as u64,
    })
}

/// # Errors
/// When the device has no units for 8-bit floating-point numbers.
pub fn check_fp8(device: Device) -> Result<()> {
    let index = match device {
        Device::Cuda(index) => index,
        _ => return Err(Error::NoGpu),
    };
    let Gpu {
        name,
        compute_capability: (major, minor),
        ..
    } = gpu(index)?;
    if (major, minor) < (8, 9) {
        return Err(Error::NoFp8 { name, major, minor });
    }
    Ok(())
}

/// Bytes of the GPU's memory that are taken, by anyone. libtorch keeps what it once took, so that after a step this is
/// the most that the step needed, with what CUDA itself takes.
pub fn memory_used(index: usize) -> Result<u64> {
    let (free, total) = context(index)?.mem_get_info().map_err(driver("cuMemGetInfo"))?;
    Ok((total - free) as u64)
}

/// Returns when all that was started on `device` is done; at once on the CPU.
pub fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// Has libtorch take algorithms whose sums have one order, on any device, for the rest of the process; an operation that has
/// none fails.
pub fn use_deterministic_algorithms() {
    // SAFETY: libtorch's one global context, whose switches are plain flags; its functions as ATen/Context.h declares them,
    // in the C++ ABI of the platform, by which a method takes its object first.
    unsafe {
        let context = global_context();
        set_deterministic_algorithms(context, true, false);
        set_deterministic_mkldnn(context, true);
        // It would fill what is about to be written.
        set_deterministic_fill(context, false);
    }
}

/// Whether f32 is multiplied as TF32, of 10 bits, is otherwise for an environment variable to say (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE,
/// which some containers set); and partial sums of a bf16 product that is cut along the summed axis would be added in bf16.
fn keep_sums_in_f32() {
    // SAFETY: as above. The last argument allows such cuts.
    unsafe {
        set_allow_tf32(global_context(), false);
        set_allow_bf16_sums(global_context(), false, true);
    }
}

/// Whether libtorch takes such algorithms.
pub fn algorithms_are_deterministic() -> bool {
    // SAFETY: as above.
    unsafe { deterministic_algorithms(global_context()) }
}

unsafe extern "C" {
    #[link_name = "_ZN2at13globalContextEv"]
    fn global_context() -> *mut c_void;
    #[link_name = "_ZN2at7Context26setDeterministicAlgorithmsEbb"]
    fn set_deterministic_algorithms(context: *mut c_void, on: bool, warn_only: bool);
    #[link_name = "_ZN2at7Context22setDeterministicMkldnnEb"]
    fn set_deterministic_mkldnn(context: *mut c_void, on: bool);
    #[link_name = "_ZN2at7Context39setDeterministicFillUninitializedMemoryEb"]
    fn set_deterministic_fill(context: *mut c_void, on: bool);
    #[link_name = "_ZN2at7Context18setAllowTF32CuBLASEb"]
    fn set_allow_tf32(context: *mut c_void, on: bool);
    #[link_name = "_ZN2at7Context27setAllowBF16ReductionCuBLASEbb"]
    fn set_allow_bf16_sums(context: *mut c_void, on: bool, splits: bool);
    #[link_name = "_ZNK2at7Context23deterministicAlgorithmsEv"]
    fn deterministic_algorithms(context: *const c_void) -> bool;
}

/// The context that libtorch uses too: each device has one primary context a process.
fn context(index: usize) -> Result<Arc<CudaContext>> {
    static CONTEXTS: Mutex<BTreeMap<usize, Arc<CudaContext>>> = Mutex::new(BTreeMap::new());
    if !driver_is_there() {
        return Err(Error::NoDriver);
    }
    let mut contexts = CONTEXTS.lock().expect("nobody panics while holding it");
    if let Some(context) = contexts.get(&index) {
        return Ok(Arc::clone(context));
    }
    let context = CudaContext::new(index).map_err(driver("cuDevicePrimaryCtxRetain"))?;
    contexts.insert(index, Arc::clone(&context));
    Ok(context)
}

/// The stream that libtorch's operations on this device go to now. What is launched there runs after what was launched
/// before and ahead of what will be: no other order is needed.
fn stream(index: usize) -> Result<sys::CUstream> {
    type GetStream = unsafe extern "C" fn(i32, *mut *mut c_void) -> i32;
    let mut stream = std::ptr::null_mut();
    // SAFETY: the function's declaration in libtorch's c/shim.h; it writes one pointer.
    let code = unsafe { symbol::<GetStream>(GET_STREAM)?(index as i32, &mut stream) };
    if code == 0 {
        Ok(stream.cast())
    } else {
        Err(Error::Driver {
            call: GET_STREAM.into(),
            error: format!("code {code}"),
        })
    }
}

/// # Errors
/// When this libtorch has not the functions that are called by name.
fn check_libtorch() -> Result<()> {
    // SAFETY: the address is only looked up.
    unsafe { symbol::<*const c_void>(GET_STREAM).and_then(|_| symbol::<*const c_void>(attention::FORWARD)) }.map(drop)
}

const GET_STREAM: &str = "aoti_torch_get_current_cuda_stream";

/// libtorch_cuda.so, its names visible to libtorch.
fn libtorch_cuda() -> Result<&'static Library> {
    static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
    let open = || {
        // SAFETY: libtorch's own library, whose initialisers register its operations; it is never closed.
        unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) }.map_err(|error| error.to_string())
    };
    LIBRARY
        .get_or_init(open)
        .as_ref()
        .map_err(|error| Error::NoLibtorchCuda(error.clone()))
}

/// A function of libtorch's C interface (torch/csrc/inductor/aoti_torch/c), which keeps its form within a release.
///
/// # Safety
/// `F` must be the function's type as the header declares it.
unsafe fn symbol<F: Copy>(name: &str) -> Result<F> {
    // SAFETY: the caller's.
    let found = unsafe { libtorch_cuda()?.get::<F>(name.as_bytes()) };
    match found {
        Ok(symbol) => Ok(*symbol),
        Err(error) => Err(Error::NoLibtorchCuda(error.to_string())),
    }
}

fn driver(call: &str) -> impl FnOnce(cudarc::driver::DriverError) -> Error {
    let call = call.to_owned();
    move |error| Error::Driver {
        call,
        error: error.to_string(),
    }
}

/// The GPU on which a tensor lies.
fn index_of(tensor: &Tensor) -> Option<usize> {
    match tensor.device() {
        Device::Cuda(index) => Some(index),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorchs_cuda_half_loads_without_a_driver_and_has_what_is_called_by_name() {
        check_libtorch().unwrap_or_else(|error| panic!("{error}; `make setup-test` provides it"));
    }

    #[test]
    fn a_gpu_that_is_not_there_is_refused_with_the_next_move() {
        if driver_is_there() {
            assert!(device(0).is_ok(), "a driver is here: {:?}", device(0));
            return;
        }
        let said = device(0).unwrap_err().to_string();
        assert!(
            said.contains("no CUDA driver here") && said.contains("set train.device: cpu"),
            "{said}"
        );
    }
}
