#!/usr/bin/env python3
"""Fetches the pinned packages into .panglot/ and builds the tests' virtual environment.

    setup/packages.py build     what building, the demo and (on a GPU machine) CUDA need
    setup/packages.py test      besides that, the Python environment the tests compare against
    setup/packages.py eval      besides that, lm-evaluation-harness, which only `make bench-eval` runs

The order that must hold: download, check the SHA-256, unpack beside, rename. A package folder that exists under its own
name is therefore complete, and its stamp says from which file it came; such a folder costs one small read and no network.
Only the standard library, so that it runs before anything is installed.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / ".panglot"
PINS = ROOT / "setup" / "pins.txt"
REQUIREMENTS = ROOT / "setup" / "requirements.txt"
LM_EVAL = ROOT / "setup" / "requirements-lm-eval.txt"
STAMP = ".fetched"
PARTIAL = ".partial-"
TEST_PYTHONS = ("3.11", "3.12", "3.13")


def main(arguments):
    if arguments not in (["build"], ["test"], ["eval"]):
        raise Stop("Say `setup/packages.py build`, `setup/packages.py test` or `setup/packages.py eval`.")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Stop(f"This is {platform.system()} on {platform.machine()}, and libtorch is pinned for Linux on x86_64 only.")
    for_tests = arguments != ["build"]
    if for_tests and python_version() not in TEST_PYTHONS:
        raise Stop(f"The tests' environment is pinned for Python {', '.join(TEST_PYTHONS)} and python3 is "
                   f"{python_version()}; put one of those first on PATH as python3 and run `make setup-test` again.")

    started = time.monotonic()
    with only_one_set_up():
        pins = [pin for pin in read_pins() if pin.group in wanted_groups(for_tests)]
        missing = [pin for pin in pins if not is_there(pin)]
        if missing:
            print(f"Fetching {len(missing)} of {len(pins)} packages into .panglot/", flush=True)
        for pin in missing:
            fetch(pin, pins)
        link_cuda_into_torch(pins)
        new_environment = for_tests and make_environment(pins)
        if arguments == ["eval"]:
            install_lm_eval()
    if missing or new_environment:
        print(f"{len(pins)} packages in place after {time.monotonic() - started:.1f} s", flush=True)
    else:
        print(f"{len(pins)} packages{' and the Python environment' if for_tests else ''} already in place", flush=True)


class Stop(Exception):
    """One sentence for the person: what is wrong, and the remedy."""


class Pin(NamedTuple):
    group: str    # build: always · cuda: Python's `import torch`, and any GPU · gpu: only where there is a GPU
    kind: str     # npm or pypi
    name: str
    version: str
    file: str
    sha256: str

    @property
    def folder(self):
        return STORE / self.kind / f"{self.name}-{self.version}"


def read_pins():
    """One pin a package. torch has one wheel per Python (the libtorch inside is the same): this Python's is taken, or
    the first where none is made for it, which still builds and trains but cannot be imported."""
    chosen = {}
    for line in PINS.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Pin(*line.split())
        if pin.name not in chosen or f"-{this_python()}-" in pin.file:
            chosen[pin.name] = pin
    return list(chosen.values())


def wanted_groups(for_tests):
    if Path("/proc/driver/nvidia/version").exists():
        return {"build", "cuda", "gpu"}
    return {"build", "cuda"} if for_tests else {"build"}


def is_there(pin):
    with contextlib.suppress(FileNotFoundError):
        return (pin.folder / STAMP).read_text() == pin.sha256
    return False


def fetch(pin, pins):
    print(f"  {pin.name} {pin.version} ({pin.kind})", end="", flush=True)
    with partial_folder() as partial:
        began = time.monotonic()
        archive = (download_npm if pin.kind == "npm" else download_pypi)(pin, partial)
        got = sha256(archive)
        if got != pin.sha256:
            raise Stop(f"{pin.file} has SHA-256 {got}, but setup/pins.txt says {pin.sha256}, so it was not used; run "
                       "`make setup` again, and if it differs again, ask who changed the package or what sits between.")
        downloaded = time.monotonic()
        tree = unpack(archive, partial)
        if pin.name == "torch":
            # Before it gets its name, so that a libtorch without its libcudart is never seen.
            merge_cuda(tree / "nvidia", cuda_packages(pins))
        (tree / STAMP).write_text(pin.sha256)
        replace(tree, pin.folder)
        print(f": {archive.stat().st_size / 2**20:.1f} MiB in {downloaded - began:.1f} s, "
              f"unpacked in {time.monotonic() - downloaded:.1f} s", flush=True)


def download_npm(pin, partial):
    run(pin, ["npm", "pack", "--silent", "--ignore-scripts", "--fetch-retries=2", "--fetch-retry-mintimeout=1000",
              "--fetch-retry-maxtimeout=2000", f"{pin.name}@{pin.version}"], partial)
    return the_file(pin, partial)


def download_pypi(pin, partial):
    # The tags of the pinned file, and not this machine's, so that every machine gets the same file.
    *_, python, _abi, platforms = pin.file.removesuffix(".whl").split("-")
    version = f"{python[2]}.{python[3:]}" if python.startswith("cp") else "3.11"
    # A cache would keep every one of these gigabytes a second time.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
               "--no-cache-dir", "--retries", "2", "--no-deps", "--only-binary=:all:", "--python-version", version]
    for tag in platforms.split("."):
        command += ["--platform", tag]
    run(pin, [*command, f"{pin.name}=={pin.version}"], partial)
    return the_file(pin, partial)


def the_file(pin, partial):
    archive = partial / pin.file
    if not archive.exists():
        got = ", ".join(sorted(path.name for path in partial.iterdir())) or "nothing"
        raise Stop(f"Asked for {pin.file} and got {got}; correct setup/pins.txt if the package was published anew.")
    return archive


def unpack(archive, partial):
    tree = partial / "tree"
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            # Python 3.11.2, Debian 12's, has no filters yet; the checksum has vouched for the content.
            tar.extractall(tree, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        return tree / "package"
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.infolist():
            path = wheel.extract(member, tree)
            if member.external_attr >> 16 & 0o111 and not member.is_dir():
                os.chmod(path, 0o755)
    return tree


def link_cuda_into_torch(pins):
    """libtorch looks for CUDA's libraries in ../../nvidia from its own folder (its RPATH), as pip would lay them out.
    Hard links put them there without a second copy."""
    torch = next(pin for pin in pins if pin.name == "torch")
    packages = cuda_packages(pins)
    with contextlib.suppress(FileNotFoundError):
        linked = set((torch.folder / "nvidia" / STAMP).read_text().split())
        if linked >= {package.sha256 for package in packages}:
            return
    with partial_folder() as partial:
        merge_cuda(partial / "nvidia", cuda_packages(read_pins()))
        replace(partial / "nvidia", torch.folder / "nvidia")


def cuda_packages(pins):
    return [pin for pin in pins if pin.name.startswith("nvidia-") and is_there(pin)]


def merge_cuda(target, packages):
    for package in packages:
        shutil.copytree(package.folder / "nvidia", target, copy_function=link_or_copy, dirs_exist_ok=True)
    target.mkdir(exist_ok=True)
    (target / STAMP).write_text("\n".join(package.sha256 for package in packages))


def link_or_copy(source, target):
    """The wheels share a few paths (licences, an empty __init__.py): the first one stays."""
    if os.path.exists(target):
        return
    try:
        os.link(source, target)
    except OSError:     # a file system without hard links
        shutil.copy2(source, target)


def make_environment(pins):
    """The tests' Python environment: requirements.txt besides the torch already unpacked. Built under a name of its
    own and published by moving the link .panglot/venv. Returns whether there was anything to do."""
    torch = next(pin for pin in pins if pin.name == "torch")
    recipe = "\n".join([REQUIREMENTS.read_text(), torch.sha256, sys.version, str(STORE)])
    folder = STORE / f"venv-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    link = STORE / "venv"
    if (folder / STAMP).exists() and link.resolve() == folder.resolve():
        return False

    print("  Python environment for the tests", end="", flush=True)
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    run(None, [sys.executable, "-m", "venv", str(folder)], STORE)
    python = str(folder / "bin" / "python")
    # --no-compile: most of transformers' thousands of modules are never imported, and compiling them all doubles the time.
    run(None, [python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir",
               "--retries", "2", "--no-compile", "--no-deps", "--only-binary=:all:", "--require-hashes",
               "-r", str(REQUIREMENTS)], STORE)
    site = next((folder / "lib").glob("python3*/site-packages"))
    (site / "panglot_torch.pth").write_text(f"{torch.folder}\n")
    run(None, [python, "-c", "import torch, transformers, peft, tensorboard"], STORE)
    (folder / STAMP).write_text("")

    with partial_folder() as partial:
        (partial / "venv").symlink_to(folder.name)
        if link.is_dir() and not link.is_symlink():
            link.rename(partial / "old")
        os.replace(partial / "venv", link)
    for old in STORE.glob("venv-*"):
        if old != folder:
            shutil.rmtree(old)
    print(f": made in {time.monotonic() - began:.1f} s", flush=True)
    return True


def install_lm_eval():
    """lm-evaluation-harness in a folder of its own, for the end of the environment's path: the tests' set-up stays small."""
    folder, recipe = STORE / "lm-eval", sha256(LM_EVAL) + sys.version
    with contextlib.suppress(FileNotFoundError):
        if (folder / STAMP).read_text() == recipe:
            return
    print("  lm-evaluation-harness", flush=True)
    with partial_folder() as partial:
        tree = partial / "tree"
        run(None, [str(STORE / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input",
                   "--disable-pip-version-check", "--no-cache-dir", "--retries", "2", "--no-compile", "--no-deps",
                   "--only-binary=:all:", "--require-hashes", "--target", str(tree), "-r", str(LM_EVAL)], STORE)
        (tree / STAMP).write_text(recipe)
        replace(tree, folder)


def run(pin, command, folder):
    """Runs a client quietly; where it fails, its last words become part of the one sentence."""
    client = "pip" if "pip" in command else Path(command[0]).name
    what = f"{pin.name} {pin.version} could not be fetched" if pin else "The Python environment could not be made"
    try:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace")
    except FileNotFoundError:
        raise Stop(f"{what}: there is no `{command[0]}` on PATH; install it and run `make setup` again.") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit status {done.returncode}"]
        raise Stop(f"{what} ({client}: {errors[-1].removeprefix('ERROR: ').rstrip('.')}); check the network and its proxy settings, "
                   "then run the same make command again: what is already there stays.")


@contextlib.contextmanager
def only_one_set_up():
    """Two at a time would fetch everything twice. What a killed one left half done is swept away."""
    STORE.mkdir(exist_ok=True)
    with open(STORE / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up in this folder to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in STORE.glob(f"{PARTIAL}*"):
            shutil.rmtree(left)
        yield


@contextlib.contextmanager
def partial_folder():
    """Inside .panglot/, so that a rename out of it stays on one file system."""
    folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=STORE))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def replace(new, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder() as partial:
        with contextlib.suppress(FileNotFoundError):
            target.rename(partial / "old")
        new.rename(target)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def python_version():
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def this_python():
    return f"cp{sys.version_info.major}{sys.version_info.minor}"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Stop as stop:
        sys.exit(f"\nStopped: {stop}")
    except OSError as error:
        sys.exit(f"\nStopped: {error.filename or 'the disk'}: {error.strerror}; free space or mend the permissions, then run "
                 "the same make command again.")
    except KeyboardInterrupt:
        sys.exit("\nStopped by hand; the same make command goes on from here.")
