"""Prefill and decoding of a DLCM beside a dense model of equal FLOPs: `python -m benchmarks.decode` (minutes).

Both models have drawn weights, one width and one vocabulary; the dense one is as deep as makes its FLOPs per decoded
token those of the DLCM at R tokens per concept (`dense_partner`). Concepts end every R tokens (form
`fixed`), so that the ratio is exact. Sequences of a batch are a token apart, so that every step closes concepts in
about 1 / R of them, as with learned boundaries; `--aligned` lets all of them close at once.

For each batch and context: prompts are prefilled, then steps are timed in turns, some of one model, some of the other.
`predicted` is what a step takes if it reads its weights and caches at this machine's bandwidth, or computes its FLOPs
at its rate, whichever is longer: nothing is added for launches. The backbone's weights are read in each step in which
any sequence closes a concept. What would take too long or too much memory here is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dlcm_lightning.compose import load_config
from dlcm_lightning.config import ModelConfig
from dlcm_lightning.export.portable import model_of
from dlcm_lightning.flops import matrix_parameters
from dlcm_lightning.model.cache import DecodingState
from dlcm_lightning.model.dlcm import LanguageModel, build_model
from dlcm_lightning.training.device import (
    choose_device,
    describe_hardware,
    keep_large_buffers,
    matrix_product_rate,
    resolve_precision,
)

BATCHES, CONTEXTS = (1, 8, 64), (512, 2048, 8192)
ROUNDS, STEPS = 3, 16
"""Turns of each model, and steps of a turn."""
PREFILL_TOKENS = 8192
LIMIT_SECONDS, LIMIT_BYTES = 60.0, 10e9
"""Of one prefill, and of the caches: beyond, a case is left out on a CPU."""
RESULTS = Path("benchmarks/results/decode.json")


@dataclass(frozen=True)
class Cost:
    """Of one decoding step of a batch, by counting."""

    flops_per_token: float
    weight_bytes: float
    cache_bytes: float
    """Read: keys and values of all sequences."""
    cache_bytes_per_token: float
    """Held for each token of context."""

    def seconds(self, batch: int, rate: float, bandwidth: float) -> float:
        return max(batch * self.flops_per_token / rate, (self.weight_bytes + self.cache_bytes) / bandwidth)


def cost(config: ModelConfig, batch: int, context: int, width: int, backbone_share: float) -> Cost:
    """width: bytes of a number. backbone_share: of steps in which the backbone runs."""
    weights = matrix_parameters(config)
    kv_token = 2 * config.kv_heads_token * config.head_dim
    per_key_token, per_key_concept = (4 * one * config.head_dim for one in (config.heads_token, config.heads_concept))
    if config.kind == "dense":
        flops = 2 * (weights.decoder + weights.unembedding) + config.decoder_layers * per_key_token * context
        held = config.decoder_layers * kv_token * width
        return Cost(flops, (weights.decoder + weights.unembedding) * width, batch * context * held, held)
    ratio, layers = config.boundary.target_ratio, config.encoder_layers + config.decoder_layers
    kv_concept = 2 * config.kv_heads_concept * config.head_dim
    token = weights.encoder + weights.decoder + weights.boundary + weights.cross_query_output + weights.unembedding
    concept = weights.backbone + weights.up_projection + weights.cross_key_value
    maps = (layers + 1 / ratio) * per_key_token * context  # the cross-attention reads a key a concept
    maps += config.backbone_layers / ratio * per_key_concept * context / ratio
    held_token, held_concept = layers * kv_token * width, config.backbone_layers * kv_concept * width / ratio
    held_memory = kv_token * width / ratio
    read = batch * context * (held_token + held_memory + held_concept / ratio)
    return Cost(2 * (token + concept / ratio) + maps, (token + backbone_share * concept) * width, read,
                held_token + held_concept + held_memory)


def dense_partner(config: ModelConfig, context: int) -> ModelConfig:
    """Of the same width, heads and vocabulary, and as deep as makes its FLOPs per token equal, with an FFN of about 8/3
    of its width: the shape of the paper's baseline, but for keys, of which that has one a head and this as few as the
    DLCM."""
    wanted = cost(config, 1, context, 4, 1).flops_per_token

    def with_layers(layers: int, ffn: int) -> ModelConfig:
        return replace(config, kind="dense", decoder_layers=layers, encoder_layers=0, backbone_layers=0, ffn_token=ffn)

    def flops(layers: int, ffn: int) -> float:
        return cost(with_layers(layers, ffn), 1, context, 4, 1).flops_per_token

    usual = 8 * config.d_token // 3
    one, two = (flops(layers, usual) for layers in (1, 2))
    layers = max(1, round(1 + (wanted - one) / (two - one)))
    ffn = min(range(64, 4 * config.ffn_token, 64), key=lambda ffn: abs(flops(layers, ffn) - wanted))
    return with_layers(layers, ffn)


def bandwidth(device: torch.device) -> float:
    """Bytes a second of reading memory that no cache holds."""
    numbers = torch.ones((2 if device.type == "cuda" else 1) * 2**28, dtype=torch.float32, device=device)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum().item()
        times.append(time.perf_counter() - began)
    return numbers.numel() * 4 / min(times)


class Runner:
    """A model that decodes one batch."""

    def __init__(self, model: LanguageModel, batch: int, context: int, aligned: bool) -> None:
        ratio = int(model.config.boundary.target_ratio)
        self.model = model
        self.lengths = [context - (0 if aligned else row % ratio) for row in range(batch)]
        self.state: DecodingState = model.new_state(batch, context + ROUNDS * STEPS + 8)
        self.rows = list(range(batch))
        self.tokens = torch.zeros(batch, dtype=torch.long, device=model.where)
        self.passes = self.closed = self.steps = 0

    def synchronize(self) -> None:
        if self.model.where.type == "cuda":
            torch.cuda.synchronize()

    def prefill(self) -> float:
        """Seconds for all prompts."""
        generator = torch.Generator().manual_seed(0)
        began = time.perf_counter()
        at_once = max(1, PREFILL_TOKENS // max(self.lengths))
        for first in range(0, len(self.rows), at_once):
            rows = self.rows[first:first + at_once]
            counts = [self.lengths[row] for row in rows]
            tokens = torch.randint(self.model.config.vocab_size, (sum(counts),), generator=generator)
            out = self.model.prefill(tokens.to(self.model.where), counts, rows, self.state)
            ends = torch.tensor(counts).cumsum(0) - 1
            self.tokens[first:first + at_once] = self.model.logits(out.hidden[ends.to(out.hidden.device)]).argmax(-1)
        self.synchronize()
        return time.perf_counter() - began

    def decode(self) -> float:
        """Seconds of a step, over STEPS of them."""
        closed = []
        began = time.perf_counter()
        for _ in range(STEPS):
            out = self.model.step(self.tokens, self.rows, self.state)
            self.tokens = self.model.logits(out.hidden).argmax(-1)
            if out.segmentation is not None:
                closed.append(out.segmentation.boundaries)
        self.synchronize()
        seconds = (time.perf_counter() - began) / STEPS
        self.steps += STEPS
        self.closed += sum(int(one.sum()) for one in closed)
        self.passes += sum(bool(one.any()) for one in closed)
        return seconds


def measure(models: dict[str, LanguageModel], batch: int, context: int, aligned: bool, rate: float, speed: float
            ) -> dict[str, Any]:
    """One batch and context: what each model needs, in turns."""
    runners = {name: Runner(model, batch, context, aligned) for name, model in models.items()}
    prefill = {name: runner.prefill() for name, runner in runners.items()}
    for runner in runners.values():
        runner.decode()  # warm
        runner.passes = runner.closed = runner.steps = 0
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS - 1):
        for name, runner in runners.items():
            times[name].append(runner.decode())
    found: dict[str, Any] = {"batch": batch, "context": context}
    for name, runner in runners.items():
        seconds = statistics.median(times[name])
        share = runner.passes / runner.steps
        counted = cost(runner.model.config, batch, context, runner.model.compute_dtype.itemsize, share)
        found[name] = {
            "prefill_tokens_per_second": sum(runner.lengths) / prefill[name],
            "decode_tokens_per_second": batch / seconds,
            "predicted_tokens_per_second": batch / counted.seconds(batch, rate, speed),
            "backbone_steps_per_token": runner.closed / (runner.steps * batch),
            "steps_with_backbone": share,
            "cache_bytes_per_token": counted.cache_bytes_per_token,
            "flops_per_token": counted.flops_per_token,
            "weight_bytes_per_step": counted.weight_bytes, "cache_bytes_per_step": counted.cache_bytes}
    found["ratio"] = found["dlcm"]["decode_tokens_per_second"] / found["dense"]["decode_tokens_per_second"]
    return found


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{found['batch']:5d} {found['context']:7,d}"]
    for name in ("dlcm", "dense"):
        one = found[name]
        cells.append(f"{one['prefill_tokens_per_second']:9,.0f} {one['decode_tokens_per_second']:8,.1f} "
                     f"{one['predicted_tokens_per_second']:9,.1f}")
    cells.append(f"{found['ratio']:5.2f} {found['dlcm']['backbone_steps_per_token']:6.3f} "
                 f"{found['dlcm']['steps_with_backbone']:5.0%}")
    return "  ".join(cells)


HEAD = ("                      DLCM                          dense\n"
        "batch context    prefill   decode predicted    prefill   decode predicted  ratio  steps/token, with backbone")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", help="run file whose model is measured (quickstart; dlcm_2b_1t on a GPU)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--aligned", action="store_true", help="all sequences close their concepts in the same steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="", help="of this measurement in the results")
    arguments = parser.parse_args()
    device = choose_device()
    keep_large_buffers()
    gpu = device.type == "cuda"
    dtype, _ = resolve_precision("bf16" if gpu else "fp32", device)
    config = load_config(arguments.config or ("dlcm_2b_1t" if gpu else "quickstart"), ["model.boundary.form=fixed"])
    shapes = {"dlcm": config.model, "dense": dense_partner(config.model, 2048)}
    models = {}
    for name, shape in shapes.items():
        state = build_model(shape, torch.float32, "sdpa", seed=0).state_dict()
        models[name] = model_of(replace(config, model=shape), state, dtype, device, name)
    rate, speed = matrix_product_rate(dtype, device), bandwidth(device)
    hardware = (f"{describe_hardware(config.train, device)}: {rate / 1e9:,.0f} GFLOP/s, reads {speed / 1e9:,.1f} GB/s, "
                f"{dtype}")
    dense = shapes["dense"]
    print(f"{hardware}\n{config.name}: R = {config.model.boundary.target_ratio:g}; dense: {dense.decoder_layers} "
          f"layers, FFN {dense.ffn_token}")
    each = {name: cost(shape, 1, 2048, dtype.itemsize, 1) for name, shape in shapes.items()}
    print("; ".join(f"{name} {one.flops_per_token:.3g} FLOPs a token at 2,048, cache {one.cache_bytes_per_token:,.0f} "
                    "bytes a token" for name, one in each.items()) + f"\n{HEAD}")
    cases = [(batch, context) for batch in arguments.batches for context in arguments.contexts]
    found, left_out = [], []
    for batch, context in tqdm(cases, desc="decode", unit="case", disable=None):
        counted = [cost(shape, batch, context, dtype.itemsize, 1) for shape in shapes.values()]
        seconds = sum(batch * context * one.flops_per_token for one in counted) / rate
        held = sum(batch * context * one.cache_bytes_per_token for one in counted)
        if not gpu and (seconds > LIMIT_SECONDS or held > LIMIT_BYTES):
            left_out.append(f"batch {batch}, context {context:,}: prefill would take {seconds:,.0f} s here, caches "
                            f"{held / 1e9:,.1f} GB")
            continue
        with torch.inference_mode():
            found.append(measure(models, batch, context, arguments.aligned, rate, speed))
        print(line(found[-1]), flush=True)
    for one in left_out:
        print(f"left out: {one}")
    keep = {"hardware": hardware, "torch": torch.__version__,
            "models": {name: asdict(one) for name, one in shapes.items()}, "aligned": arguments.aligned,
            "cases": found, "left_out": left_out}
    name = arguments.name or (config.name + ("-aligned" if arguments.aligned else ""))
    kept = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    arguments.out.write_text(json.dumps(kept | {name: keep}, indent=1) + "\n")
    print(f"{arguments.out} holds it as {name!r}")


if __name__ == "__main__":
    main()
