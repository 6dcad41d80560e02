"""What the machine is and can do: precision, memory settings of a CPU, the rate of its matrix products."""

from __future__ import annotations

import ctypes
import platform
import re
import time
from pathlib import Path

import torch

from dlcm_lightning.config import ConfigError, TrainConfig

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def device() -> torch.device:
    """The device a run computes on: a GPU where there is one."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def fast_bf16(where: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones: GPUs since Ampere, CPUs with avx512_bf16 or amx_bf16.

    On other CPUs they are slower.
    """
    if where.type == "cuda":
        return torch.cuda.get_device_capability(where) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(precision: str, where: torch.device) -> torch.dtype:
    """What `train.precision` means here. Raises ConfigError for bf16 on a GPU that has none."""
    if precision == "auto":
        return torch.bfloat16 if fast_bf16(where) else torch.float32
    if precision == "bf16" and where.type == "cuda" and not fast_bf16(where):
        raise ConfigError("train.precision = 'bf16': this GPU has no bf16 units; use fp32 or auto")
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]


def keep_large_buffers() -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel.

    A step on a CPU frees and takes back the same buffers of many megabytes; faulting their pages in each time costs
    more than the arithmetic on them. Elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most glibc accepts
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def matrix_product_rate(dtype: torch.dtype, where: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of large matrix products, measured now: the ceiling of a training step on this machine."""
    size = 8192 if where.type == "cuda" else 1024
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(where, dtype) for _ in range(2))

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            left @ right
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return time.perf_counter() - began

    run(3)
    count = max(1, int(seconds / run(1)))
    return 2 * size**3 * count / run(count)


def describe(train: TrainConfig, where: torch.device) -> str:
    """Processor, threads or GPUs, in words."""
    if where.type == "cuda":
        return f"{train.nodes} x {train.devices} {torch.cuda.get_device_name(where)}"
    named = re.search(r"^model name\s*:\s*(.+)$", _cpu_table(), re.MULTILINE)
    return f"{named[1] if named else platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_table() -> str:
    table = Path("/proc/cpuinfo")
    return table.read_text() if table.is_file() else ""
