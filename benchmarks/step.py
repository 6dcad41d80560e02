"""How long a training step takes, and where its time goes: `python -m benchmarks.step [CONFIG] [field=value ...]`.

Forward, backward, clipping and optimizer of one process, without Lightning around them, in torch's deterministic mode,
as a run trains. Prints tokens/s, the share of the device's peak (MFU) and of the rate at which the same device
multiplies large matrices (measured before and after, in the same process), peak memory, how often the host waited for
the device, and the time of kernels in groups, from torch's profiler over a few more steps.

Rows are those of the configured corpus, or random tokens in documents of a given length (`--documents 8192`, or a mix
of benchmarks/rows.py). Under two minutes for the quickstart on 2 cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.rows import MIXES, synthetic_batch
from dlcm_lightning.batch import Batch
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import Config
from dlcm_lightning.data.preprocessing.prepare import prepare_sample_corpus
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.flops import training_flops_per_token
from dlcm_lightning.model.dlcm import DLCM
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.training.device import (
    choose_device,
    compute_exactly,
    describe_hardware,
    keep_large_buffers,
    matrix_product_rate,
    peak_flops,
    resolve_precision,
)
from dlcm_lightning.training.module import PretrainModule

WARMUP, STEPS, PROFILED, SETTLING = 3, 12, 2, 12
RESULTS = Path("benchmarks/results/step.json")
GROUPS = {
    "attention": ("flash", "fmha", "aten::bmm", "aten::baddbmm", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "aten::addmm", "cublas", "sm90", "sm80"),
    "compiled kernels": ("triton",),
    "optimizer and clipping": ("adam", "multi_tensor", "norm_kernel", "lpnorm"),
    "copies, casts, gathers": ("copy", "memcpy", "memset", "catarray", "aten::cat", "index", "gather", "fill"),
    "segment sums": ("segment_reduce",),
}
"""A kernel belongs to the first group one of whose words is in its name, whatever its case."""
REST = "everything else"


class Bench:
    """A module, its optimizer and its rows on one device."""

    def __init__(self, config: Config, documents: str | None) -> None:
        """documents: of random rows; None: the corpus is read."""
        self.config, self.documents = config, documents
        self.device = choose_device()
        if self.device.type == "cpu":
            keep_large_buffers()
        self.dtype = resolve_precision(config.train.precision, self.device)[0]
        self.backend = choose_backend(config.model.attention, self.device, self.dtype, compiled=config.train.compile)
        self.reader: Reader | None = None
        token_bytes = torch.ones(config.model.vocab_size, dtype=torch.int64)
        if documents is None:
            if config.data.corpus == "sample":
                prepare_sample_corpus(config.data, config.model.vocab_size)
            self.reader = Reader(config.data, config.seed, config.model.vocab_size)
            token_bytes = torch.from_numpy(self.reader.token_bytes)
        self.module = PretrainModule(config, self.dtype, self.backend, token_bytes)
        with self.device:
            self.module.configure_model()
        self.module.to(self.device)
        self.optimizer: Any = self.module.configure_optimizers()["optimizer"]
        uses = config.micro_batches > 1 or config.train.recompute != "none"
        self.copies = self.module.model.keep_low_copies() if uses else None
        if config.train.compile or self.backend == "flex":
            self.module.model.prime(config.data.micro_batch_size * config.data.sequence_length, self.device)

    @torch.no_grad()
    def settle(self) -> None:
        """A model that has just been made cuts where chance wants it; its rate bias is moved until the rate is on
        target, where a trained one is."""
        boundary = self.module.boundary
        if boundary is None or not boundary.biased or not isinstance(self.module.model, DLCM):
            return
        batch = self.batches(0)[0]
        for _ in range(SETTLING):
            sums, _ = self.module.measure(batch, batch.noise)
            wanted = torch.log(1 / boundary.target_ratio / sums.rate)
            self.module.model.boundary.rate_bias += 0.5 * wanted.to(torch.float32)

    def batches(self, number: int) -> list[Batch]:
        """Of a step, on the device."""
        if self.reader is not None:
            read = self.reader.step_batches(number)
            read = [replace(batch, following=batch.step) for batch in read]
        else:
            assert self.documents is not None
            count = self.config.micro_batches
            read = [synthetic_batch(self.config, self.documents, number * count + k) for k in range(count)]
        return [batch.to(self.device) for batch in read]

    def compute(self, batches: list[Batch]) -> None:
        """One optimizer step."""
        for k, batch in enumerate(batches):
            (self.module.training_step(batch, k) / self.config.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(self.module.model.parameters(), self.config.optim.max_grad_norm)
        self.optimizer.step()
        if self.copies is not None:
            self.copies.refresh()
        self.optimizer.zero_grad()
        self.module.after_step()

    def seconds(self, number: int) -> float:
        batches = self.batches(number)
        self.synchronize()
        began = time.perf_counter()
        self.compute(batches)
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def waits(self, number: int) -> dict[str, int]:
        """By source line, how often a step makes the host wait for the device."""
        batches = self.batches(number)
        self.synchronize()
        found: Counter[str] = Counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.compute(batches)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for one in said:
            if "synchroniz" in str(one.message):
                found[f"{Path(one.filename).name}:{one.lineno}"] += 1
        return dict(found)


def group_of(kernel: str) -> str:
    low = kernel.lower()
    return next((group for group, words in GROUPS.items() if any(word in low for word in words)), REST)


def measure(config: Config, documents: str | None, steps: int = STEPS, rate: Callable[..., float] = matrix_product_rate
            ) -> dict[str, Any]:
    """Numbers of a configuration; see the module. rate: FLOP/s of large products."""
    bench = Bench(config, documents)
    device, on_gpu = bench.device, bench.device.type == "cuda"
    rate_before = rate(bench.dtype, device)
    if documents is not None:
        bench.settle()
    began = time.perf_counter()
    warm = [bench.seconds(number) for number in range(WARMUP)]
    seconds = [bench.seconds(number) for number in tqdm(range(WARMUP, WARMUP + steps), desc="steps", unit="step")]
    step = bench.module.last_step
    assert step is not None
    tokens = config.data.tokens_per_step
    document = step.scalar("squared_lengths").item() / tokens
    concepts = step.scalar("concepts").item() / tokens if config.model.kind == "dlcm" else None
    flops = training_flops_per_token(config.model, document, concepts)
    per_second = tokens / statistics.median(seconds)
    peak, rate_of = peak_flops(bench.dtype, device), (rate_before + rate(bench.dtype, device)) / 2
    found: dict[str, Any] = {
        "name": config.name, "documents": documents or "corpus", "precision": str(bench.dtype).removeprefix("torch."),
        "attention": bench.backend, "compile": config.train.compile, "recompute": config.train.recompute,
        "rows": config.data.micro_batch_size, "sequence_length": config.data.sequence_length,
        "micro_batches": config.micro_batches, "tokens_per_concept": 1 / concepts if concepts else None,
        "document_tokens": document,
        "step_seconds": statistics.median(seconds), "slowest_seconds": max(seconds), "first_seconds": warm[0],
        "tokens_per_second": per_second, "flops_per_token": flops, "matrix_product_rate": rate_of,
        "share_of_rate": per_second * flops / rate_of, "mfu": per_second * flops / peak if peak else None,
    }
    if on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["waits"] = bench.waits(WARMUP + steps)
    gpu = [ProfilerActivity.CUDA] if on_gpu else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as trace:
        for number in range(PROFILED):
            bench.seconds(WARMUP + steps + number)
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in trace.key_averages() if getattr(event, attribute) > 0
              and (not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA)]
    total = sum(getattr(event, attribute) for event in events) or 1.0
    groups: Counter[str] = Counter()
    for event in events:
        groups[group_of(event.key)] += getattr(event, attribute) / total
    events.sort(key=lambda event: -getattr(event, attribute))
    found |= {
        "time_shares": dict(groups.most_common()), "launches": sum(event.count for event in events) / PROFILED,
        "kernels_above_one_percent": {
            event.key[:100]: {"share": getattr(event, attribute) / total, "calls": event.count / PROFILED}
            for event in events if getattr(event, attribute) / total > 0.01},
        "seconds_in_all": time.perf_counter() - began,
    }
    del bench, trace, events
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def about(config: Config, command: str) -> dict[str, str]:
    """Machine and versions."""
    return {"command": command, "hardware": describe_hardware(config.train, choose_device()),
            "torch": torch.__version__, "python": platform.python_version()}


def line(found: dict[str, Any]) -> str:
    """One measurement in words."""
    said = (f"{found['name']}, documents {found['documents']}: {found['tokens_per_second']:,.0f} tokens/s x "
            f"{found['flops_per_token'] / 1e6:,.1f} MFLOP/token = {100 * found['share_of_rate']:.0f} % of "
            f"{found['matrix_product_rate'] / 1e9:,.0f} GFLOP/s")
    if found["mfu"] is not None:
        said += f", MFU {100 * found['mfu']:.1f} %"
    return said + (f", {found['peak_gib']:.1f} GiB" if "peak_gib" in found else "")


def main() -> None:
    compute_exactly()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/run/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--documents", help=f"random rows in documents of so many tokens, or {' or '.join(MIXES)}")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    found = measure(config, arguments.documents)
    command = " ".join(["python -m benchmarks.step", arguments.config, *arguments.overrides]
                       + (["--documents", arguments.documents] if arguments.documents else []))
    RESULTS.write_text(json.dumps({"about": about(config, command), **found}, indent=1) + "\n")
    print(line(found))
    for group, share in found["time_shares"].items():
        print(f"{100 * share:5.1f} %  {group}")


if __name__ == "__main__":
    main()
