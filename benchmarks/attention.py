"""Attention backends beside each other: `python -m benchmarks.attention` (under a minute on 2 cores).

On a GPU: every backend at the shapes of dlcm_2b and dense_1b over three mixes of documents, forward and backward apart,
and the forms of the cross-attention (cross_attention.py) over the paper's Table 6.

On a CPU: forward and backward of one call over 4,096 packed tokens, 4 query heads, 2 key heads, width 64, cut into
documents of one length. `products` and `torch kernel` are the two halves of the backend `sdpa`: explicit batched
products, which a CPU uses for documents up to `SHORT` positions, and torch's scaled_dot_product_attention. `masked` is
one call over everything under a document mask, which is what packing costs without varlen. Medians; the ratios are what
counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from tqdm import tqdm

from benchmarks.cross_attention import Case, compact, masked, replicated, visible
from benchmarks.rows import MIXES, document_lengths
from dlcm_lightning.config import TrainConfig
from dlcm_lightning.ops import attention as backends
from dlcm_lightning.ops.flex import Flex
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.device import choose_device, describe_hardware, keep_large_buffers, resolve_precision

TOKENS, HEADS, KV_HEADS, WIDTH = 4096, 4, 2, 64
LENGTHS = (64, 128, 256, 512, 1024)
REPEATS = 7
RESULTS = Path("benchmarks/results/attention.json")


def one_call(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
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
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def timed(run: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Medians of forward and backward on a GPU, and whether backwards of one forward are the same bits."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a backward is asked for more than once
    out = run()
    weights = torch.randn_like(out)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, weights, retain_graph=True)

    first = backward()
    same = all(torch.equal(one, other) for _ in range(5) for one, other in zip(first, backward(), strict=True))
    found: dict[str, Any] = {"same_bits": same}
    for name, act in (("forward", run), ("backward", backward)):
        times = []
        for _ in range(REPEATS + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            act()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        found[name] = statistics.median(times[2:])
    return found


def tried(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it gives, or why not."""
    try:
        return act()
    except Exception as error:
        return {"error": repr(error)[:300]}


def backends_on_a_gpu(device: torch.device) -> Iterator[dict[str, Any]]:
    """The backends over documents, at the shapes of dlcm_2b and dense_1b; deterministic, and torch's not so."""
    generator = torch.Generator().manual_seed(0)
    for tokens, heads, kv_heads in ((8192, 24, 24), (8192, 24, 12), (2048, 48, 24)):
        inputs = tuple(torch.randn(tokens, number, WIDTH, generator=generator).to(device, torch.bfloat16)
                       .requires_grad_() for number in (heads, kv_heads, kv_heads))
        for mix in (str(tokens), *MIXES):
            lengths = document_lengths(mix, tokens, generator)
            segments = Segments.from_lengths(lengths, device)
            products = 4 * heads * WIDTH * sum(length * (length + 1) / 2 for length in lengths)
            for name in ("flex", "varlen", "varlen, not deterministic", *backends.FLASH):
                backend = name.partition(",")[0]
                if backends.why_not(backend, device, torch.bfloat16) is not None:
                    continue
                torch.use_deterministic_algorithms("," not in name)
                call = Flex() if backend == "flex" else backends.BACKENDS[backend]
                found = tried(lambda call=call, segments=segments, inputs=inputs: timed(
                    lambda: call(*inputs, segments), inputs))
                torch.use_deterministic_algorithms(False)
                if "forward" in found:
                    found |= {"forward_tflops": products / found["forward"] / 1e9,
                              "backward_tflops": 2.5 * products / found["backward"] / 1e9}
                yield {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "documents": mix, "backend": name,
                       **found}


def table_6(device: torch.device) -> Iterator[dict[str, Any]]:
    """Cross-attention as in the paper's Table 6: 32 heads, concepts of 6 tokens, one document."""
    flex = torch.compile(flex_attention, dynamic=False)
    for width in (1024, 2048, 4096):
        for tokens in (2048, 4096, 8192, 16384):
            case = Case.make(tokens, 32, width // 32, 6, tokens, device, torch.bfloat16)
            began = time.perf_counter()
            mask = visible(case)
            torch.cuda.synchronize()
            building = 1e3 * (time.perf_counter() - began)
            forms: dict[str, Callable[[], Tensor]] = {
                "replicated": lambda case=case: replicated(case, "varlen"),
                "masked": lambda case=case, mask=mask: masked(case, mask, flex),
                "compact": lambda case=case, mask=mask: compact(case, mask, flex)}
            for name, form in forms.items():
                found = tried(lambda form=form, case=case: timed(form, case.inputs))
                if name != "replicated":
                    found["mask_ms"] = building
                yield {"tokens": tokens, "width": width, "form": name, **found}


TABLES = {"backends": backends_on_a_gpu, "cross_attention": table_6}


def on_a_gpu(device: torch.device, out: Path, only: str | None) -> None:
    """The tables, or one of them, written line by line."""
    torch._dynamo.config.recompile_limit = 256
    about = {"command": "python -m benchmarks.attention", "hardware": describe_hardware(TrainConfig(), device),
             "torch": torch.__version__, "python": platform.python_version(), "dtype": "bfloat16", "unit": "ms"}
    found: dict[str, Any] = {"about": about}
    for name, lines in TABLES.items():
        if only not in (None, name):
            continue
        for one in lines(device):
            found.setdefault(name, []).append(one)
            out.write_text(json.dumps(found, indent=1) + "\n")
            print("  ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in one.values()),
                  flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=list(TABLES), help="of a GPU's tables")
    arguments = parser.parse_args()
    out: Path = arguments.out
    device = choose_device()
    dtype = resolve_precision("auto", device)[0]
    if device.type == "cuda":
        on_a_gpu(device, out, arguments.only)
        return
    keep_large_buffers()
    runs: dict[str, Callable[[Tensor, Tensor, Tensor, Segments], Tensor]] = {"masked": one_call}
    runs |= {"torch kernel": sdpa_with(0), "products": sdpa_with(max(LENGTHS))}
    table = {name: {length: milliseconds(run, length, dtype, device) for length in LENGTHS}
             for name, run in tqdm(runs.items(), desc="attention", unit="backend")}
    about = {"command": "python -m benchmarks.attention", "hardware": describe_hardware(TrainConfig(), device),
             "torch": torch.__version__, "python": platform.python_version(), "dtype": str(dtype)}
    out.write_text(json.dumps({"about": about, "milliseconds": table}, indent=1) + "\n")
    print(f"{'ms, documents of':<18}" + "".join(f"{length:>8}" for length in LENGTHS))
    for name, times in table.items():
        print(f"{name:<18}" + "".join(f"{times[length]:>8.1f}" for length in LENGTHS))


if __name__ == "__main__":
    main()
