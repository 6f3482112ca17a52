"""What this machine's libtorch can do: large GEMMs in f32 and bf16 (FLOP/s), and the peer of `adamw_100m`, torch's fused AdamW.

Usage: torch_floor.py gemm THREADS | adamw THREADS PARAMETERS UPDATES
"""

import sys
import time

import torch
from measure import report

what, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
if what == "gemm":
    peaks = {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
        best = float("inf")
        for _ in range(12):
            started = time.perf_counter()
            a @ b.T
            best = min(best, time.perf_counter() - started)
        peaks[name] = 2 * 2048**3 / best
    report(0.0, **peaks)
else:
    n, updates = int(sys.argv[3]), int(sys.argv[4])
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(n, generator=generator))
    parameter.grad = torch.randn(n, generator=generator)
    adamw = torch.optim.AdamW([parameter], lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    seconds = []
    for _ in range(updates + 1):
        started = time.perf_counter()
        adamw.step()
        seconds.append(time.perf_counter() - started)
    # The first one makes the moments.
    report(sum(seconds[1:]), steps=seconds[1:])
