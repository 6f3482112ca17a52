"""torch's asynchronous distributed checkpoint on the same state: how long a save holds training up, and until it is on disk.

save ELEMENTS ROUNDS FOLDER · load ELEMENTS FOLDER
"""

import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from measure import report

warnings.filterwarnings("ignore")


def state(elements: int) -> dict:
    """Master weights and two moments, as AdamW keeps them."""
    return {name: torch.full((elements,), float(index)) for index, name in enumerate(("theta", "m", "v"))}


def join() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def save(elements: int, rounds: int, folder: Path) -> None:
    saved = state(elements)
    stalls, durables, size = [], [], 0
    for number in range(rounds + 1):
        target = folder / f"dcp-{number}"
        # As its documentation advises for repeated saves: staging memory is kept, files are synced.
        writer = dcp.FileSystemWriter(target, sync_files=True)
        started = time.perf_counter()
        future = dcp.async_save(saved, checkpoint_id=target, storage_writer=writer)
        stall = time.perf_counter() - started
        getattr(future, "upload_completion", future).result()
        durable = time.perf_counter() - started
        size = sum(file.stat().st_size for file in target.iterdir())
        # The first makes room and does not count.
        if number > 0:
            stalls.append(stall)
            durables.append(durable)
        if number < rounds:
            shutil.rmtree(target)
        else:
            shutil.rmtree(folder / "dcp", ignore_errors=True)
            target.rename(folder / "dcp")
    middle = sorted(durables)[len(durables) // 2]
    report(middle, stall=sorted(stalls)[len(stalls) // 2], bytes=size)


def load(elements: int, folder: Path) -> None:
    started = time.perf_counter()
    into = state(elements)
    dcp.load(into, checkpoint_id=folder / "dcp")
    report(time.perf_counter() - started)


if __name__ == "__main__":
    torch.set_num_threads(2)
    join()
    what, elements, *rest = sys.argv[1:]
    if what == "save":
        save(int(elements), int(rest[0]), Path(rest[1]))
    else:
        load(int(elements), Path(rest[0]))
