#!/usr/bin/env bash
# The system packages the build needs, by apt, and a look at Rust. When all is there it calls neither apt nor the network.
# `setup/system.sh test`: those of the tests, a Slurm cluster's and a browser; without them (or root to use them) its tests are skipped.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

main() {
    local missing=() find_missing=find_missing
    if [[ ${1:-} == test ]]; then
        find_missing=find_missing_for_tests
        may_install || return 0
    else
        check_rust
    fi
    "$find_missing"
    [[ ${#missing[@]} -gt 0 ]] || return 0
    install "${missing[@]}"
    local installed=("${missing[@]}")
    missing=()
    "$find_missing"
    [[ ${#missing[@]} -eq 0 ]] ||
        stop "apt installed ${installed[*]}, but what should come with ${missing[*]} is still not found; is another python3 or mpicc first on PATH?"
}

# By what each package is for and not by its name, so that a cluster's own MPI or LLVM modules do as well.
find_missing() {
    have cc && have c++ && have make || missing+=(build-essential)
    have pkg-config || missing+=(pkg-config)
    have mpicc || missing+=(libopenmpi-dev)
    have mpirun || missing+=(openmpi-bin)
    has_libclang || missing+=(libclang-dev)     # bindgen reads mpi.h with it
    have npm || missing+=(npm)
    have strace || missing+=(strace)            # the tests kill writers with it, call by call
    have python3 || missing+=(python3)
    python_has pip || missing+=(python3-pip)
    python_has ensurepip || missing+=(python3-venv)
}

# Tests bring up a cluster in namespaces of its own, as root, and inject its faults; nothing of it runs as a service.
find_missing_for_tests() {
    have slurmctld && have slurmd && have sbatch || missing+=(slurm-wlm)
    have munged || missing+=(munge)
    have ip && have tc || missing+=(iproute2)
    have unshare && have nsenter || missing+=(util-linux)
    have shellcheck || missing+=(shellcheck)
    # Without a desktop's libraries where there is none; any Chromium does.
    have chromium-headless-shell || have chromium || have google-chrome || missing+=(chromium-headless-shell)
}

may_install() {
    { [[ $EUID -eq 0 ]] && have apt-get; } ||
        { echo "Neither root nor apt: the tests on a Slurm cluster, and in a browser where there is none, will be skipped."; return 1; }
}

have() { command -v "$1" > /dev/null; }

python_has() { have python3 && python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

has_libclang() {
    [[ -n ${LIBCLANG_PATH:-} ]] || compgen -G '/usr/lib/llvm-*/lib/libclang.so' > /dev/null ||
        compgen -G '/usr/lib*/libclang.so' > /dev/null
}

check_rust() {
    local needed found
    needed="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)"
    have cargo || stop "Rust is missing: install Rust $needed or newer with rustup, open a new shell and run make again."
    found="$(cargo --version | cut -d ' ' -f 2)"
    [[ "$(printf '%s\n' "$needed" "$found" | sort --version-sort | head -n 1)" == "$needed" ]] ||
        stop "Rust is $found and $needed or newer is needed: run \`rustup update stable\` and make again."
}

install() {
    have apt-get || stop "This system has no apt; install what Debian calls $* with its own package manager and run make again."
    local as_root=()
    if [[ $EUID -ne 0 ]]; then
        have sudo || stop "Neither root nor sudo: ask an administrator for \`apt-get install $*\` and run make again."
        as_root=(sudo)
    fi
    echo "Installing by apt: $*"
    local began=$SECONDS
    log="$(mktemp)"     # not local: the trap still needs it when the function is over
    trap 'rm -f -- "$log"' EXIT
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
    # Debian images often come without package lists, and old lists name files that are gone.
    "${apt[@]}" update > "$log" 2>&1 || apt_failed
    "${apt[@]}" install --yes --no-install-recommends "$@" > "$log" 2>&1 < /dev/null || apt_failed
    echo "  installed in $((SECONDS - began)) s"
}

apt_failed() {
    tail -n 5 "$log" >&2
    stop "apt-get failed (its last words are above): check the network and /etc/apt, then run make again."
}

stop() {
    echo "Stopped: $*" >&2
    exit 1
}

main "$@"
