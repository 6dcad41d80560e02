"""Sizes of an axis, trained for a few steps without Lightning around them, as `dlcm mup check` sees them."""

from __future__ import annotations

import inspect
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dlcm_lightning.batch import Batch
from dlcm_lightning.config import ModelConfig
from dlcm_lightning.training.mup_check.probe import Probe
from dlcm_lightning.training.mup_check.sizes import Axis, sizes_of
from dlcm_lightning.training.mup_check.verdict import Line, Seen, judge
from tests.steps import CONFIG, Steps

MODEL = ModelConfig(vocab_size=257, d_token=64, d_concept=128, encoder_layers=1, backbone_layers=1, decoder_layers=1,
                    heads_token=2, kv_heads_token=1, heads_concept=4, kv_heads_concept=2, head_dim=32, ffn_token=128,
                    ffn_concept=256)
STEPS = 4


def seen_of(axis: Axis, model: ModelConfig = MODEL, train: bool = True, least: int | None = None) -> list[Seen]:
    """train: else only what the optimizer holds is looked at."""
    found = []
    for size in sizes_of(model, axis, least):
        optim = replace(CONFIG.optim, lr_token=2e-3, lr_concept=2e-3, lr_boundary=2e-3, lr_other=2e-3)
        data = replace(CONFIG.data, sequence_length=128)
        steps = Steps(replace(CONFIG, model=size.model, optim=optim, data=data), torch.device("cpu"), torch.float32)
        groups = [{"role": group["name"], "learning_rate": group["lr"], "weight_decay": group["weight_decay"],
                   "epsilon": group["eps"]} for group in steps.optimizer.param_groups]
        batches = [[of_text(batch, CONFIG.micro_batches * number + k) for k, batch in enumerate(steps.batches(number))]
                   for number in range(STEPS)]
        batch = batches[0][0]
        probe = Probe(steps.module.model, batch.tokens, batch.documents, batch.targets)
        if train:
            probe.look(0)
            for number in range(STEPS):
                steps.compute(batches[number])
            probe.look(STEPS)
        found.append(Seen(size, [asdict(one) for one in probe.found], groups))
    return found


def of_text(batch: Batch, number: int) -> Batch:
    """The rows of a step as bytes of a text: random ids have nothing to teach."""
    rows, length = batch.stream.shape
    text = Path(inspect.__file__).read_bytes()[number * rows * length :][: rows * length]
    return replace(batch, stream=torch.frombuffer(bytearray(text), dtype=torch.uint8).view(rows, length).to(
        batch.stream.dtype))


def wrong(axis: Axis, model: ModelConfig = MODEL, train: bool = True, least: int | None = None) -> list[Line]:
    return [line for line in judge(axis, seen_of(axis, model, train, least)) if not line.good]
