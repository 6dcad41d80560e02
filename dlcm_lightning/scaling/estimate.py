"""`dlcm estimate`: what a run would need on a machine that is not there: parameters, FLOPs, memory, time, space, and
the line that submits it.

Counted from shapes: parameters and FLOPs exactly, memory as `memory.py` says. Time is FLOPs over what the GPUs would
give: a peak and a share of it (model FLOPs utilisation) that whoever asks has to state. `dlcm plan` says the same of
the runs that it plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from dlcm_lightning.config import Config, ConfigError, Strategy, TrainConfig
from dlcm_lightning.flops import forward_flops, matrix_parameters, training_flops_per_token
from dlcm_lightning.scaling.memory import checkpoint_bytes, kept_bytes, parameters, rank_memory

MOST_ROWS = 8
GIGA = 1e9


@dataclass(frozen=True)
class Hardware:
    """What would be there."""

    nodes: int
    gpus_per_node: int
    gpu_bytes: float
    peak_flops: float
    """Of one GPU, dense bf16 products."""
    mfu: float
    """Share of the peak that training is hoped to reach."""
    mfu_origin: str = "stated, not measured"
    """Where `mfu` is from."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


def estimate(config: Config, hardware: Hardware, document_tokens: float, run_file: str, overrides: list[str]
             ) -> Iterator[str]:
    """Lines. document_tokens: mean length, weighted by tokens. ConfigError: more ranks than rows of a step."""
    rows = config.data.global_batch_size
    if hardware.ranks > rows:
        raise ConfigError(f"data.global_batch_size = {rows}: fewer than {hardware.ranks} ranks, so that some would "
                          "only compute padding rows; take fewer nodes, or more rows a step")
    yield from model_lines(config, document_tokens)
    yield ""
    yield from time_lines(config, hardware, document_tokens)
    yield ""
    yield from memory_lines(config, hardware)
    yield ""
    arguments = " ".join([run_file, *overrides])
    shape = f"--nodes={hardware.nodes} --gpus-per-node={hardware.gpus_per_node}"
    yield f"submit       sbatch {shape} slurm/dlcm_1t.sh {arguments}"


def model_lines(config: Config, document_tokens: float) -> Iterator[str]:
    """Parameters and FLOPs."""
    weights, model = matrix_parameters(config.model), config.model
    share = f", backbone {100 * weights.backbone_share:.1f} % of the stacks" if model.kind == "dlcm" else ""
    yield f"parameters   {parameters(model):,}; {weights.non_embedding:,} in matrices outside the embeddings{share}"
    forward = forward_flops(model, document_tokens)
    training = training_flops_per_token(model, document_tokens)
    yield (f"FLOPs        {training:.3e} a token, documents of {document_tokens:,.0f} tokens; forward: body "
           f"{forward.body:.2e}, head {forward.unembedding:.2e}, attention maps {forward.attention_maps:.2e}")
    if model.kind == "dlcm":
        most = training_flops_per_token(model, document_tokens, 1.0)
        yield f"             {most:.3e} while every token is a concept; counted at R = {model.boundary.target_ratio:g}"


def time_lines(config: Config, hardware: Hardware, document_tokens: float) -> Iterator[str]:
    """Steps, time, checkpoints."""
    total = config.total_steps * config.data.tokens_per_step
    flops = total * training_flops_per_token(config.model, document_tokens)
    seconds = flops / (hardware.ranks * hardware.peak_flops * hardware.mfu)
    step = seconds / config.total_steps
    yield f"steps        {config.total_steps:,} of {config.data.tokens_per_step:,} tokens"
    yield (f"time         {duration(seconds)} at {100 * hardware.mfu:g} % of {hardware.ranks} x "
           f"{hardware.peak_flops / 1e12:,.0f} TFLOP/s ({hardware.mfu_origin}): {step:.2f} s a step, "
           f"{total / seconds:,.0f} tokens/s, {flops:.2e} FLOPs, {seconds * hardware.ranks / 3600:,.0f} GPU hours")
    train = config.train
    every = step * train.checkpoint_every_steps
    yield (f"checkpoints  {checkpoint_bytes(config) / GIGA:,.1f} GB each, every {duration(every)}; at most "
           f"{kept_bytes(config) / GIGA:,.0f} GB at once")


def memory_lines(config: Config, hardware: Hardware) -> Iterator[str]:
    """By strategy and rows of a micro-batch, at the target and with every token a concept."""
    segmented = config.model.kind == "dlcm"
    rate = 1 / config.model.boundary.target_ratio
    heads = f"GB at R = {1 / rate:g}{'M = T':>12}" if segmented else "GB"
    yield (f"memory       of a rank in GB of {hardware.gpu_bytes / GIGA:g}, train.recompute = "
           f"{config.train.recompute}; no allocator waste, not measured on a GPU")
    yield f"  {'strategy':<10}{'rows':>6}{'micro-batches':>15}{'state':>10}{heads:>26}{'':>4}"
    for strategy in get_args(Strategy):
        train = replace(config.train, strategy=strategy, devices=hardware.gpus_per_node, nodes=hardware.nodes,
                        offload=False)
        yield from _rows(config, train, hardware, rate, segmented)


def _rows(config: Config, train: TrainConfig, hardware: Hardware, rate: float, segmented: bool) -> Iterator[str]:
    mine = -(-config.data.global_batch_size // hardware.ranks)
    rows = 1
    while rows <= min(mine, MOST_ROWS):
        micro_batches = -(-mine // rows)
        target, most = (rank_memory(config, train, rows, concepts, micro_batches) for concepts in (rate, 1.0))
        chosen = train.strategy == config.train.strategy and rows == config.data.micro_batch_size
        fits = most.total < hardware.gpu_bytes
        word = "fits" if fits else ("fits once R is near its target" if target.total < hardware.gpu_bytes else
                                    "does not fit")
        bound = f"{most.total / GIGA:>12.1f}" if segmented else ""
        yield (f"  {train.strategy:<10}{rows:>6}{micro_batches:>15}{target.state / GIGA:>10.1f}"
               f"{target.total / GIGA:>14.1f}{bound}    {word}{'   <- this configuration' if chosen else ''}")
        rows *= 2


def duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
