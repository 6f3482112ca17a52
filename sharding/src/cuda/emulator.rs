//! Runs kernels without a GPU, for tests: the same CUDA text, compiled by the machine's C++ compiler with `emulator.h`,
//! which makes every thread of a block a fibre and runs them in turn from one barrier to the next. Slow, exact, and a
//! thread that misses a barrier or reads outside its tensors ends the program with a sentence.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use tch::Tensor;

use super::kernels::{Argument, Launch, Source};
use crate::memory;

const HEADER: &str = include_str!("emulator.h");

/// Runs a launch whose tensors lie on the CPU.
///
/// # Panics
/// When there is no C++ compiler, or the kernel breaks a rule.
pub(super) fn run(launch: Launch, name: &str) {
    let program = program(launch.source);
    let work = tempfile::tempdir().expect("a temporary folder");
    let mut command = Command::new(program);
    command.args([
        name.to_owned(),
        launch.grid[0].to_string(),
        launch.grid[1].to_string(),
        launch.block.to_string(),
    ]);
    for (index, argument) in launch.arguments.iter().enumerate() {
        let file = work.path().join(index.to_string());
        let keep = |tensor: &Tensor| {
            // The memory's place within 16 bytes: kernels choose wider loads where it is a multiple.
            let place = tensor.data_ptr() as usize % 16;
            fs::write(&file, memory::bytes(tensor)).expect("a temporary file");
            format!("{place}:{}", file.display())
        };
        command.arg(match argument {
            Argument::Read(tensor) => keep(tensor),
            Argument::Write(tensor) => keep(tensor),
            Argument::Absent => "absent".into(),
            Argument::Whole(number) => number.to_string(),
            // All bits of it.
            Argument::Real(number) => format!("{:e}", f64::from(*number)),
        });
    }
    let done = command.output().expect("the emulator runs");
    assert!(
        done.status.success(),
        "{name}: {}: {}",
        done.status,
        String::from_utf8_lossy(&done.stderr)
    );
    for (index, argument) in launch.arguments.into_iter().enumerate() {
        if let Argument::Write(tensor) = argument {
            let bytes = fs::read(work.path().join(index.to_string())).expect("what the emulator wrote");
            if !bytes.is_empty() {
                tensor.copy_(&Tensor::from_data_size(&bytes, &tensor.size(), tensor.kind()));
            }
        }
    }
}

/// The program that runs a source's kernels, compiled once a process.
fn program(source: &'static Source) -> PathBuf {
    static PROGRAMS: Mutex<BTreeMap<&'static str, PathBuf>> = Mutex::new(BTreeMap::new());
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let mut programs = PROGRAMS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    programs
        .entry(source.file)
        .or_insert_with(|| {
            let folder = FOLDER.get_or_init(|| tempfile::tempdir().expect("a temporary folder"));
            compile(source, &folder.path().join(source.file))
        })
        .clone()
}

fn compile(source: &Source, program: &Path) -> PathBuf {
    let (cpp, header) = (program.with_extension("cpp"), program.with_file_name("emulator.h"));
    let cases: String = source
        .kernels()
        .iter()
        .map(|name| format!("    {{\"{name}\", [](const Call &call) {{ launch({name}, call); }}}},\n"))
        .collect();
    let text = format!(
        "#include \"emulator.h\"\n{}\nconst std::map<std::string, void (*)(const Call &)> KERNELS = {{\n{cases}}};\n",
        source.whole()
    );
    fs::write(&cpp, text)
        .and_then(|()| fs::write(header, HEADER))
        .expect("a temporary file");
    let flags = [
        "-std=c++20",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-Wall",
        "-Werror",
    ];
    let done = Command::new("c++")
        .args(flags)
        .arg(&cpp)
        .arg("-o")
        .arg(program)
        .output()
        .expect("a C++ compiler, which set-up provides, emulates the kernels");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    program.into()
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    static WRONG: Source = Source {
        file: "wrong.cu",
        text: "
KERNEL beyond_f32(const float *x, float *y, i64 n) { y[threadIdx.x] = x[threadIdx.x + n]; }
KERNEL apart_f32(const float *x, float *y, i64 n) {
    if (threadIdx.x < 1)
        __syncthreads();
    else
        y[threadIdx.x] = over_block(x[threadIdx.x], 0.0f, Plus{});
}
KERNEL late_f32(const float *x, float *y, i64 n) {
    __shared__ float seen;
    if (threadIdx.x == 31)
        seen = x[0];
    y[threadIdx.x] = seen;
}
",
    };

    fn start(kernel: &'static str, n: i64) -> Tensor {
        let x = Tensor::ones([32], (Kind::Float, Device::Cpu)) * 7.0;
        let mut y = x.zeros_like();
        let arguments = vec![Argument::Read(&x), Argument::Write(&mut y), Argument::Whole(n)];
        Launch {
            source: &WRONG,
            kernel,
            kind: Kind::Float,
            grid: [1, 1],
            block: 32,
            arguments,
        }
        .start();
        y
    }

    #[test]
    fn what_stays_inside_runs() {
        assert_eq!(start("beyond", 0).sum(Kind::Float).double_value(&[]), 7.0 * 32.0);
    }

    #[test]
    #[should_panic(expected = "heap-buffer-overflow")]
    fn a_read_beyond_a_tensor_is_seen() {
        drop(start("beyond", 1));
    }

    #[test]
    #[should_panic(expected = "threads of a block wait at different barriers")]
    fn threads_that_miss_a_barrier_are_seen() {
        drop(start("apart", 0));
    }

    #[test]
    fn a_value_that_is_read_before_it_is_written_is_not_there() {
        assert_eq!(
            start("late", 0).double_value(&[0]),
            0.0,
            "a missing barrier shows as on a GPU"
        );
    }
}
