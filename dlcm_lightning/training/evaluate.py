"""`dlcm evaluate`: the validation table of any checkpoint that is kept, on one process, beside its floors.

The numbers are those that the run itself logs at a validation: bits per byte and tokens per concept by domain. They may
be asked on other rows (`data.validation_rows=...`) or other shards (`data.root=...`) than the run's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dlcm_lightning.checkpoint.folder import CONFIG, open_checkpoint
from dlcm_lightning.compose import load_config
from dlcm_lightning.data.loader import ValidationBatches
from dlcm_lightning.data.ngram import Floor, floors
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.durable import write_atomically
from dlcm_lightning.errors import DataError
from dlcm_lightning.model.mup import tagged_parameters
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.training.device import choose_device, resolve_precision
from dlcm_lightning.training.metrics import metrics_of
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.persistence import saved_buffers
from dlcm_lightning.training.report import validation_table
from dlcm_lightning.training.validation import validate


def evaluate(run: Path, step: int | None, overrides: Sequence[str], report: Callable[[str], None]) -> dict[str, Any]:
    """Metrics of all domains, and of each under "domains"; also written to RUN/evaluation-STEP.json. CheckpointError:
    no such checkpoint, or a damaged one. DataError: the rows cannot be read."""
    checkpoint = open_checkpoint(run, step)
    config = load_config(checkpoint.folder / CONFIG, overrides)
    config = replace(config, train=replace(config.train, devices=1, nodes=1))
    where = choose_device()
    dtype, _ = resolve_precision(config.train.precision, where)
    reader = Reader(config.data, config.seed, config.model.vocab_size, report=report)
    module = PretrainModule(config, dtype, choose_backend(config.model.attention, where, dtype),
                            torch.from_numpy(reader.token_bytes))
    module.configure_model()
    with checkpoint.tensors() as stored, torch.no_grad():
        for name, owner in tagged_parameters(module.model):
            owner.weight.copy_(stored.get(f"weight/{name}"))
        for name, buffer in saved_buffers(module):
            buffer.copy_(stored.get(f"buffer/{name}"))
    module.to(where)
    loader = DataLoader(ValidationBatches(reader), batch_size=None)
    metrics = metrics_of(validate(module, loader, progress=True), config.data.domains, module.target_ratio)
    counted = _floors(reader, report)
    content = {"step": checkpoint.step, "tokens": checkpoint.manifest.tokens, "validation": metrics,
               "floors": [asdict(floor) for floor in counted]}
    file = run / f"evaluation-{checkpoint.step:08d}.json"
    write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())
    report(validation_table(metrics, counted))
    report(f"step {checkpoint.step}, {checkpoint.manifest.tokens:,} tokens; {file}")
    return metrics


def _floors(reader: Reader, report: Callable[[str], None]) -> list[Floor]:
    try:
        return floors(reader)
    except DataError as error:
        report(f"unigram and trigram are left out: {error}")
        return []
