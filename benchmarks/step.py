"""Where the time of a training step goes: `python -m benchmarks.step [CONFIG] [field=value ...]`.

Real rows of the configured corpus, forward, backward, clipping and optimizer, without Lightning around them. Prints
tokens/s, the share of the machine's matrix-product rate (measured before and after, in the same process), and the
self time of operators in groups, from torch's profiler over a few more steps. Under two minutes for the quickstart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from dlcm_lightning.compose import load_config
from dlcm_lightning.data.preprocessing.prepare import prepare_sample_corpus
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.flops import training_flops_per_token
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.training.device import (
    choose_device,
    describe_hardware,
    keep_large_buffers,
    matrix_product_rate,
    resolve_precision,
)
from dlcm_lightning.training.module import PretrainModule

WARMUP, STEPS, PROFILED = 5, 20, 5
RESULTS = Path("benchmarks/results/step.json")
GROUPS = {
    "matrix products of layers and head": ("aten::mm", "aten::addmm"),
    "products inside attention": ("aten::bmm", "aten::baddbmm"),
    "copies, casts, gathers": (
        "aten::copy_", "aten::cat", "aten::index", "aten::index_select", "aten::_index_put_impl_", "aten::fill_"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/run/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    device = choose_device()
    if device.type == "cpu":
        keep_large_buffers()
    dtype = resolve_precision(config.train.precision, device)[0]
    if config.data.corpus == "sample":
        prepare_sample_corpus(config.data, config.model.vocab_size)
    reader = Reader(config.data, config.seed, config.model.vocab_size)
    backend = choose_backend(config.model.attention, device, dtype)
    module = PretrainModule(config, dtype, backend, torch.from_numpy(reader.token_bytes))
    module.configure_model()
    module.to(device)
    optimizer = module.configure_optimizers()["optimizer"]
    rate_before = matrix_product_rate(dtype, device)

    def step(number: int) -> float:
        batches = [batch.to(device) for batch in reader.step_batches(number)]
        began = time.perf_counter()
        for k, batch in enumerate(batches):
            (module.training_step(batch, k) / config.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(module.model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        module.after_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds = [step(number) for number in tqdm(range(WARMUP + STEPS), desc="steps", unit="step")][WARMUP:]
    assert module.last_step is not None
    rate = (rate_before + matrix_product_rate(dtype, device)) / 2
    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as trace:
        for number in range(PROFILED):
            step(WARMUP + STEPS + number)

    tokens = config.data.tokens_per_step
    per_second = tokens / statistics.median(seconds)
    document = module.last_step.scalar("squared_lengths").item() / tokens
    concepts = module.last_step.rate.item() if config.model.kind == "dlcm" else None
    flops = training_flops_per_token(config.model, document, concepts)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, attribute) for event in trace.key_averages()}
    total = sum(times.values())
    shares = {group: sum(times.get(name, 0) for name in names) / total for group, names in GROUPS.items()}
    shares["everything else (norms, activations, softmax, rotary, scan, optimizer, Python)"] = 1 - sum(shares.values())
    result = {
        "about": {"command": " ".join(["python -m benchmarks.step", arguments.config, *arguments.overrides]),
                  "hardware": describe_hardware(config.train, device), "torch": torch.__version__,
                  "python": platform.python_version(), "dtype": str(dtype), "attention": backend},
        "tokens_per_second": per_second, "flops_per_token": flops, "matrix_product_rate": rate,
        "share_of_rate": per_second * flops / rate, "time_shares": shares,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{per_second:,.0f} tokens/s x {flops / 1e6:.1f} MFLOP/token = {100 * per_second * flops / rate:.0f} % of "
          f"{rate / 1e9:,.0f} GFLOP/s")
    for group, share in shares.items():
        print(f"{100 * share:5.1f} %  {group}")


if __name__ == "__main__":
    main()
