"""Attention backends beside each other: `python -m benchmarks.attention` (under a minute on 2 cores).

Forward and backward of one call over 4,096 packed tokens, 4 query heads, 2 key heads, width 64, cut into documents of
one length. `products` and `torch kernel` are the two halves of the backend `sdpa`: explicit batched products, which a
CPU uses for documents up to `SHORT` positions, and torch's scaled_dot_product_attention. `masked` is one call over
everything under a document mask, which is what packing costs without varlen. Medians; the ratios are what counts.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dlcm_lightning.config import TrainConfig
from dlcm_lightning.ops import attention as backends
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.device import choose_device, describe_hardware, keep_large_buffers, resolve_precision

TOKENS, HEADS, KV_HEADS, WIDTH = 4096, 4, 2, 64
LENGTHS = (64, 128, 256, 512, 1024)
REPEATS = 7
RESULTS = Path("benchmarks/results/attention.json")


def masked(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    ids = segments.ids(query.shape[0])
    mask = (ids[:, None] == ids[None, :]).tril()
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def sdpa_with(short: int) -> Callable[[Tensor, Tensor, Tensor, Segments], Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        backends.SHORT = short
        return backends.sdpa(query, key, value, segments)

    return run


def milliseconds(run: Callable[[Tensor, Tensor, Tensor, Segments], Tensor], length: int, dtype: torch.dtype,
                 device: torch.device) -> float:
    """Median time of a forward and a backward."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, HEADS, WIDTH), (TOKENS, KV_HEADS, WIDTH), (TOKENS, KV_HEADS, WIDTH)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    segments = Segments.from_lengths([length] * (TOKENS // length), device)
    times = []
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        out = run(*inputs, segments)
        torch.autograd.grad(out, inputs, out.detach())
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def main() -> None:
    device = choose_device()
    dtype = resolve_precision("auto", device)[0]
    if device.type == "cpu":
        keep_large_buffers()
    runs: dict[str, Callable[[Tensor, Tensor, Tensor, Segments], Tensor]] = {"masked": masked}
    for name in ("flash", "varlen"):
        if backends.why_not(name, device, dtype) is None:
            runs[name] = backends.BACKENDS[name]
    if device.type == "cpu":
        runs |= {"torch kernel": sdpa_with(0), "products": sdpa_with(max(LENGTHS))}
    else:
        runs["sdpa"] = backends.sdpa
    table = {name: {length: milliseconds(run, length, dtype, device) for length in LENGTHS}
             for name, run in tqdm(runs.items(), desc="attention", unit="backend")}
    about = {"command": "python -m benchmarks.attention", "hardware": describe_hardware(TrainConfig(), device),
             "torch": torch.__version__, "python": platform.python_version(), "dtype": str(dtype)}
    RESULTS.write_text(json.dumps({"about": about, "milliseconds": table}, indent=1) + "\n")
    print(f"{'ms, documents of':<18}" + "".join(f"{length:>8}" for length in LENGTHS))
    for name, times in table.items():
        print(f"{name:<18}" + "".join(f"{times[length]:>8.1f}" for length in LENGTHS))


if __name__ == "__main__":
    main()
