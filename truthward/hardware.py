"""What this machine is good at, measured rather than assumed."""

from __future__ import annotations

import functools
import os
import time

import torch

from truthward import products, ranks
from truthward.ledger import Run
from truthward.tables import Model


def use_threads(threads: int) -> None:
    """Set torch's CPU threads; 0 takes this rank's share of all cores. More threads than cores make it many times slower."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // beside))


def device() -> torch.device:
    """This rank's own: a GPU of its host, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@functools.cache
def measure_dtypes(rows: int = 256, width: int = 576, depth: int = 1536) -> dict[str, float]:
    """Speed of a typical matrix product on the device that training uses, GFLOP/s by dtype (best of several)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(rows, width, dtype=dtype, device=device)
        layer = products.Linear(width, depth, bias=False, dtype=dtype, device=device).requires_grad_(False)
        best = float("inf")
        for _ in range(7):
            start = time.perf_counter()
            layer(x)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        speeds[str(dtype).removeprefix("torch.")] = round(2 * rows * width * depth / best / 1e9, 1)
    return speeds


def choose_dtype(wanted: str) -> tuple[torch.dtype, str]:
    """The compute type of a recipe's ``model.dtype`` and why it was chosen.

    bf16 matrix products have been seen 4 times faster than fp32 on one CPU and 200 times slower on another, so ``auto``
    times both and takes bf16 only where it gains at least half again.
    """
    if wanted != "auto":
        return getattr(torch, wanted), "set in the recipe"
    speeds = measure_dtypes()
    text = ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in speeds.items())
    fast = speeds["bfloat16"] >= 1.5 * speeds["float32"]
    return (torch.bfloat16 if fast else torch.float32), f"measured: {text}"


def set_up(model: Model, run: Run) -> tuple[torch.dtype, str]:
    """Threads and compute type of a run, and in words which type and why.

    The type is chosen once and kept on record, so that a resumed run goes on in the same.
    """
    use_threads(model.threads)
    if "dtype" not in run.manifest:
        dtype, reason = ranks.share(choose_dtype(model.dtype))
        run.record(dtype=str(dtype), dtype_reason=reason)
    name = run.manifest["dtype"].removeprefix("torch.")
    return getattr(torch, name), f"{name} ({run.manifest['dtype_reason']})"
