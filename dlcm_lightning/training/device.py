"""What this process computes on, and in which precision: device, memory settings of a CPU, rate of matrix products."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import time
from pathlib import Path

import torch

from dlcm_lightning.cluster.world import World
from dlcm_lightning.config import ConfigError, TrainConfig
from dlcm_lightning.ops.device import gpu_of, on_gpu

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "GH200": 989.4e12, "H200": 989.4e12,
         "GB200": 2.5e15, "B200": 2.25e15}
"""FLOP/s of dense bf16 products by the makers' data sheets; the first name that a GPU's own contains counts."""
PROBE_SECONDS = 0.04
"""For which products of a precision are timed, to choose one."""


def choose_device(world: World = World()) -> torch.device:  # noqa: B008 - frozen
    """The device of this process, made the current one: a GPU where there is one, the one that goes with its place
    among the processes of its node. ConfigError: more processes than GPUs."""
    if not on_gpu():
        return torch.device("cpu")
    where = gpu_of(world.local_rank, world.local_size, world.here)
    torch.cuda.set_device(where)
    torch.cuda.init()  # torch's meshes choose a device of their own where nobody has used one yet
    return where


def compute_exactly() -> None:
    """The same bits every time, in this process from now on; before its first matrix product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at that product
    torch.use_deterministic_algorithms(True)
    # Would cost a write of every buffer; none is read unset. The attribute is dynamic, which types cannot see.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # partial sums of a product stay fp32
    torch.set_float32_matmul_precision("highest")  # no TF32, which NVIDIA's containers have torch take


def device_identity(where: torch.device) -> str:
    """What no two processes of a node may share: the serial number of a GPU. Empty for a CPU, which they may."""
    return str(torch.cuda.get_device_properties(where).uuid) if where.type == "cuda" else ""


def resolve_precision(precision: str, where: torch.device, begun: str | None = None) -> tuple[torch.dtype, str]:
    """What `train.precision` means here, and why. begun: the dtype that a run has begun with, which `auto` keeps.

    auto: on a GPU bf16 since Ampere; on a CPU whichever of bf16 and fp32 multiplies faster, timed now, because what a
    CPU says of its instructions does not tell. ConfigError: bf16 on a GPU that has none.
    """
    if precision == "auto" and begun in BY_NAME:
        return BY_NAME[begun], "as the run has begun"
    if where.type == "cuda":
        ampere = torch.cuda.get_device_capability(where) >= (8, 0)
        if precision == "bf16" and not ampere:
            raise ConfigError("train.precision = 'bf16': this GPU has no bf16 units; use fp32 or auto")
        if precision == "auto":
            return (torch.bfloat16 if ampere else torch.float32), f"this GPU has {'' if ampere else 'no '}bf16 units"
    if precision != "auto":
        return DTYPES[precision], "as configured"
    low, full = (_quick_rate(dtype) for dtype in (torch.bfloat16, torch.float32))
    said = f"bf16 multiplies at {low / 1e9:,.0f} GFLOP/s here, fp32 at {full / 1e9:,.0f}"
    return (torch.bfloat16 if low > full else torch.float32), said


def _quick_rate(dtype: torch.dtype) -> float:
    """FLOP/s on the CPU, in some hundredths of a second, also where a precision is very slow."""
    rate = 0.0
    for size in (128, 512):
        left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        if rate and 2 * size**3 / rate > PROBE_SECONDS:
            break
        left @ right
        count, began = 0, time.perf_counter()
        while not count or time.perf_counter() - began < PROBE_SECONDS:
            left @ right
            count += 1
        rate = 2 * size**3 * count / (time.perf_counter() - began)
    return rate


def keep_large_buffers() -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel.

    A step on a CPU frees and takes back the same buffers of many megabytes; faulting their pages in each time costs
    more than the arithmetic on them. Elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most glibc accepts
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def matrix_product_rate(dtype: torch.dtype, where: torch.device, seconds: float = 0.2) -> float:
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

    run(1)
    once = run(1)
    if once > seconds:  # a precision that this machine is slow in
        return 2 * size**3 / once
    count = max(1, int(seconds / once))
    return 2 * size**3 * count / run(count)


def peak_flops(dtype: torch.dtype, where: torch.device) -> float | None:
    """FLOP/s that the data sheet promises; None where it is not known: better no number than a wrong one."""
    if where.type != "cuda" or dtype != torch.bfloat16:
        return None
    called = torch.cuda.get_device_name(where)
    return next((peak for name, peak in PEAKS.items() if name in called), None)


def describe_hardware(train: TrainConfig, where: torch.device) -> str:
    """Processor, threads or GPUs, in words."""
    if where.type == "cuda":
        return f"{train.nodes} x {train.devices} {torch.cuda.get_device_name(where)}"
    named = re.search(r"^model name\s*:\s*(.+)$", _cpu_table(), re.MULTILINE)
    return f"{named[1] if named else platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_table() -> str:
    table = Path("/proc/cpuinfo")
    return table.read_text() if table.is_file() else ""
