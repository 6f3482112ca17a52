# shellcheck shell=bash
# The environment of the build and of the programs, in one place. For a shell: `. setup/env.sh` (Bash).
# Sets variables only: it fetches nothing, writes nothing, and may be read any number of times.

PANGLOT_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
export PANGLOT_ROOT
export PANGLOT_PACKAGES="$PANGLOT_ROOT/.panglot"

# tch builds against the libtorch inside the torch wheel, of the version that pins.txt names; no Python is involved.
while read -r _ _ panglot_name panglot_version _; do
    [[ $panglot_name != torch ]] || PANGLOT_TORCH="$PANGLOT_PACKAGES/pypi/torch-$panglot_version"
done < "$PANGLOT_ROOT/setup/pins.txt"
unset panglot_name panglot_version
export LIBTORCH="$PANGLOT_TORCH/torch"
# Left over in a shell, these would send tch to another torch than the one all else here is checked with.
unset LIBTORCH_USE_PYTORCH LIBTORCH_INCLUDE LIBTORCH_LIB LIBTORCH_STATIC LIBTORCH_CXX11_ABI

# The trainer's build script writes these folders into its binary, so that a built worker starts without this file.
# libtorch finds CUDA's libraries by itself (its own RPATH leads to ../../nvidia); cudarc opens NVRTC and NCCL by name.
export PANGLOT_RPATH="$LIBTORCH/lib:$PANGLOT_TORCH/nvidia/cu13/lib:$PANGLOT_TORCH/nvidia/nccl/lib"
# Test binaries have no such folders written in.
case ":${LD_LIBRARY_PATH:-}:" in
    *":$PANGLOT_RPATH:"*) ;;
    *) export LD_LIBRARY_PATH="$PANGLOT_RPATH${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ;;
esac

# The Python that the tests compare against; there only after `make setup-test`.
export PANGLOT_PYTHON="$PANGLOT_PACKAGES/venv/bin/python"
# Set-up has fetched what there is to fetch: a test that reaches for a hub is wrong, and must not pass by luck.
export HF_HUB_OFFLINE=1

# mpirun refuses to run as root unless both are set; in containers and CI, root is who one is.
if [[ $EUID -eq 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# `panglot` by its name, once it is built.
panglot_programs="${CARGO_TARGET_DIR:-$PANGLOT_ROOT/target}/release"
case ":$PATH:" in
    *":$panglot_programs:"*) ;;
    *) export PATH="$panglot_programs:$PATH" ;;
esac
unset panglot_programs
