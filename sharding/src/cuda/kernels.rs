//! Kernels of our own: CUDA C++ compiled for the GPU at hand by NVRTC, once a process, and launched on libtorch's stream.
//! What a launch says (kernel, grid, block, arguments) is the same for a GPU and for `emulator.rs`, by which tests run it
//! without one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaFunction, CudaModule, result, sys};
use cudarc::nvrtc::{CompileError, CompileOptions, Ptx, compile_ptx_with_opts};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Kind, Tensor};

use super::{Error, Result, context, driver, emulator, index_of, stream};

/// Element types, wide loads, sums over a block.
const PRELUDE: &str = include_str!("prelude.cuh");

/// What tests compile for: A100, L40 and RTX 4090, H100 and H200, B200.
pub const ARCHITECTURES: [&str; 4] = ["compute_80", "compute_89", "compute_90", "compute_100"];

/// A file of kernels.
#[derive(Debug)]
pub struct Source {
    /// What it is called in messages; each file's own.
    pub file: &'static str,
    /// CUDA C++ behind `prelude.cuh`. A line that begins with `KERNEL` declares a kernel.
    pub text: &'static str,
}

/// One argument of a kernel. Tensors are contiguous and on one device.
pub enum Argument<'a> {
    Read(&'a Tensor),
    Write(&'a mut Tensor),
    /// A null pointer.
    Absent,
    /// `long long`
    Whole(i64),
    /// `float`
    Real(f32),
}

/// Blocks of a launch, by axis.
pub type Grid = [usize; 2];

/// A kernel with all that it is started with.
pub struct Launch<'a> {
    pub source: &'static Source,
    /// Without the ending that names the elements' type.
    pub kernel: &'static str,
    pub kind: Kind,
    pub grid: Grid,
    /// Threads of a block.
    pub block: usize,
    pub arguments: Vec<Argument<'a>>,
}

impl Launch<'_> {
    /// Starts the kernel on the GPU where the tensors lie; returns before it is done. On tensors of the CPU it is emulated,
    /// which only tests do.
    ///
    /// # Panics
    /// When a tensor is not contiguous or lies elsewhere than the others, and when the driver refuses the launch: both are
    /// defects of the caller.
    pub fn start(self) {
        let name = format!("{}_{}", self.kernel, ending(self.kind));
        let index = self.device();
        if self.grid.contains(&0) {
            return;
        }
        let started = match index {
            Some(index) => self.on_gpu(&name, index),
            None => {
                emulator::run(self, &name);
                Ok(())
            }
        };
        if let Err(error) = started {
            panic!("{name}: {error}");
        }
    }

    /// The GPU where all tensors lie; `None`: the CPU.
    fn device(&self) -> Option<usize> {
        let tensors = self.arguments.iter().filter_map(|argument| match argument {
            Argument::Read(tensor) => Some(*tensor),
            Argument::Write(tensor) => Some(&**tensor),
            _ => None,
        });
        let mut devices = tensors.map(|tensor| {
            assert!(
                tensor.is_contiguous(),
                "{}: kernels read contiguous tensors only",
                self.kernel
            );
            index_of(tensor)
        });
        let first = devices.next().expect("every kernel reads or writes a tensor");
        assert!(
            devices.all(|device| device == first),
            "{}: all tensors lie on one device",
            self.kernel
        );
        first
    }

    fn on_gpu(&self, name: &str, index: usize) -> Result<()> {
        let function = self.source.function(name, index)?;
        // A thread that has not used the GPU yet has no context.
        context(index)?.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        // Pointers, whole numbers and f32 (in the first four bytes): each argument's bytes, and an address for each.
        let mut values: Vec<u64> = self.arguments.iter().map(Argument::bits).collect();
        let sizes: Vec<usize> = self.arguments.iter().map(Argument::size).collect();
        assert_eq!(
            *function.parameters, *sizes,
            "{name}: sizes of the kernel's parameters and of the arguments"
        );
        let mut addresses: Vec<*mut std::ffi::c_void> = values
            .iter_mut()
            .map(|value| std::ptr::from_mut(value).cast())
            .collect();
        let side = |blocks: usize| u32::try_from(blocks).expect("a grid fits its axis");
        // SAFETY: the function belongs to a module that is never unloaded. Its parameters are as many and as wide as the
        // arguments (checked above). The pointers are those of tensors that the caller borrows for the call; the kernel may
        // run after this returns, but in libtorch's stream, where their memory is not given to anyone else before it has
        // run. What the kernels read and write lies within the tensors: that is what the tests on the emulator are for.
        unsafe {
            result::launch_kernel(
                function.function.cu_function(),
                (side(self.grid[0]), side(self.grid[1]), 1),
                (side(self.block), 1, 1),
                0,
                stream(index)?,
                &mut addresses,
            )
        }
        .map_err(driver("cuLaunchKernel"))
    }
}

impl Argument<'_> {
    fn bits(&self) -> u64 {
        match self {
            Argument::Read(tensor) => tensor.data_ptr() as u64,
            Argument::Write(tensor) => tensor.data_ptr() as u64,
            Argument::Absent => 0,
            Argument::Whole(number) => *number as u64,
            Argument::Real(number) => u64::from(number.to_bits()),
        }
    }

    fn size(&self) -> usize {
        match self {
            Argument::Real(_) => 4,
            _ => 8,
        }
    }
}

/// A kernel that is loaded on a device.
struct Loaded {
    function: CudaFunction,
    /// Bytes of each parameter.
    parameters: Vec<usize>,
}

impl Source {
    /// PTX for an architecture such as "compute_90". Needs NVRTC and no GPU.
    pub fn compile(&self, architecture: &str) -> Result<Ptx> {
        if !compiler_is_there() {
            return Err(Error::NoNvrtc);
        }
        let options = CompileOptions {
            name: Some(self.file.into()),
            options: vec![
                format!("--gpu-architecture={architecture}"),
                "--std=c++17".into(),
                // Lambdas inside kernels are the GPU's too.
                "--device-as-default-execution-space".into(),
            ],
            ..CompileOptions::default()
        };
        compile_ptx_with_opts(self.whole(), options).map_err(|error| Error::Compile {
            file: self.file,
            architecture: architecture.into(),
            log: match error {
                CompileError::CompileError { log, .. } => log.to_string_lossy().into_owned(),
                other => other.to_string(),
            },
        })
    }

    /// What is compiled: the beginning that all files share, and the file.
    pub(super) fn whole(&self) -> String {
        let file = self.file;
        format!(
            "#line 1 \"prelude.cuh\"\n{PRELUDE}\n#line 1 \"{file}\"\n{}\n",
            self.text
        )
    }

    /// The names of its kernels.
    pub fn kernels(&self) -> Vec<&'static str> {
        let after = self.text.split("\nKERNEL ").skip(1);
        after.filter_map(|text| text.split('(').next()).collect()
    }

    fn function(&'static self, name: &str, index: usize) -> Result<Arc<Loaded>> {
        type Functions = BTreeMap<(usize, &'static str, String), Arc<Loaded>>;
        static FUNCTIONS: Mutex<Functions> = Mutex::new(BTreeMap::new());
        let mut functions = FUNCTIONS.lock().expect("a panic ends the process");
        let key = (index, self.file, name.to_owned());
        if let Some(function) = functions.get(&key) {
            return Ok(Arc::clone(function));
        }
        let function = self
            .module(index)?
            .load_function(name)
            .map_err(driver(&format!("cuModuleGetFunction {name}")))?;
        let parameters = parameter_sizes(&function);
        let loaded = Arc::new(Loaded { function, parameters });
        functions.insert(key, Arc::clone(&loaded));
        Ok(loaded)
    }

    fn module(&'static self, index: usize) -> Result<Arc<CudaModule>> {
        static MODULES: Mutex<BTreeMap<(usize, &'static str), Arc<CudaModule>>> = Mutex::new(BTreeMap::new());
        let mut modules = MODULES.lock().expect("a panic ends the process");
        if let Some(module) = modules.get(&(index, self.file)) {
            return Ok(Arc::clone(module));
        }
        let context = context(index)?;
        check_compiler()?;
        let (major, minor) = context.compute_capability().map_err(driver("cuDeviceGetAttribute"))?;
        let ptx = self.compile(&format!("compute_{major}{minor}"))?;
        let module = context
            .load_module(ptx)
            .map_err(driver(&format!("cuModuleLoadData {}", self.file)))?;
        modules.insert((index, self.file), Arc::clone(&module));
        Ok(module)
    }
}

fn parameter_sizes(function: &CudaFunction) -> Vec<usize> {
    let size = |index: usize| {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: a function of a loaded module; the call writes two numbers. An index beyond the last is an error code.
        let code = unsafe { sys::cuFuncGetParamInfo(function.cu_function(), index, &mut offset, &mut size) };
        (code == sys::CUresult::CUDA_SUCCESS).then_some(size)
    };
    (0..).map_while(size).collect()
}

/// Whether NVRTC can be loaded.
pub fn compiler_is_there() -> bool {
    // libtorch's own stub knows where its NVRTC lies; where it does not load (no driver), the usual places are left.
    // SAFETY: libtorch's and NVIDIA's libraries; their initialisers are their own, and NVRTC stays loaded.
    unsafe {
        if let Ok(stub) = Library::open(Some("libcaffe2_nvrtc.so"), RTLD_NOW | RTLD_GLOBAL) {
            std::mem::forget(stub);
        }
        cudarc::nvrtc::sys::is_culib_present()
    }
}

/// # Errors
/// When NVRTC is of a newer CUDA than the driver: a toolkit of the machine's own may be found before the one of libtorch's.
fn check_compiler() -> Result<()> {
    let (mut major, mut minor, mut known) = (0, 0, 0);
    // SAFETY: both write the numbers they are given places for; NVRTC was found before, the driver too.
    let codes = unsafe {
        (
            cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor),
            sys::cuDriverGetVersion(&mut known),
        )
    };
    match codes {
        (cudarc::nvrtc::sys::nvrtcResult::NVRTC_SUCCESS, sys::CUresult::CUDA_SUCCESS) => {
            fits((major, minor), (known / 1000, known % 1000 / 10))
        }
        // What cannot be asked shows itself when the kernels are loaded.
        _ => Ok(()),
    }
}

/// PTX is read by drivers of the same CUDA or a later one.
fn fits(compiler: (i32, i32), driver: (i32, i32)) -> Result<()> {
    match compiler > driver {
        true => Err(Error::NewerNvrtc { compiler, driver }),
        false => Ok(()),
    }
}

/// By which a kernel's name says what its tensors are made of.
fn ending(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "f32",
        Kind::BFloat16 => "bf16",
        kind => unreachable!("kernels compute on f32 or bf16, not on {kind:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_newer_than_the_driver_is_refused() {
        for (compiler, driver) in [((13, 0), (13, 0)), ((13, 0), (13, 2)), ((12, 9), (13, 0))] {
            assert!(fits(compiler, driver).is_ok());
        }
        let said = fits((13, 1), (13, 0)).unwrap_err().to_string();
        assert!(
            said.contains("NVRTC 13.1, newer than this driver, which knows CUDA 13.0")
                && said.contains("LD_LIBRARY_PATH"),
            "{said}"
        );
    }
}
