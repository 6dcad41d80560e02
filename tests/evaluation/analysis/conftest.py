"""Tiny trained runs, and what `analyze` says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlcm_lightning.config import Config, DataConfig, OptimConfig, TrainConfig
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.evaluation.analysis import analyze
from dlcm_lightning.export.portable import export, model_of, open_trained
from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.run import pretrain
from tests.conftest import MODEL

STEPS = 9


def quiet(message: str) -> None:
    del message


@dataclass(frozen=True)
class Analysed:
    """What `analyze` left."""

    page: str
    found: dict[str, Any]
    file: Path


def analysed(file: Path) -> Analysed:
    return Analysed(file.read_text(encoding="utf-8"), json.loads(file.with_suffix(".json").read_bytes()), file)


@pytest.fixture(scope="session")
def train(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of nine steps, its last three checkpoints kept; named as its kind."""
    folder = tmp_path_factory.mktemp("runs")

    def trained(name: str, root: str = config.root, **model: Any) -> Path:
        data = replace(config, root=root, global_batch_size=4, micro_batch_size=4)
        pretrain(Config(
            name=name, seed=3, model=replace(MODEL, **model), data=data,
            optim=OptimConfig(total_tokens=data.tokens_per_step * STEPS, warmup_tokens=2 * data.tokens_per_step),
            train=TrainConfig(output_dir=str(folder), precision="fp32", devices=1, nodes=1, log_every_steps=2,
                              validate_every_steps=9, checkpoint_every_steps=3, keep_last=3)), quiet)
        return folder / name

    return trained


@pytest.fixture(scope="session")
def run(train: Callable[..., Path]) -> Path:
    return train("segmented")


@pytest.fixture(scope="session")
def dense_run(train: Callable[..., Path]) -> Path:
    return train("dense", kind="dense", decoder_layers=2)


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="session")
def report(run: Path, dense_run: Path) -> Analysed:
    """Of the run, against the dense one."""
    return analysed(analyze(run, against=dense_run, log=quiet))


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one, as it stands in a row, and what a model says of it alone: plain lists."""

    ids: list[int]
    targets: list[int]
    """-1 where nothing is predicted."""
    domain: str
    document: int
    nll: list[float]
    p: list[float]
    b: list[bool]
    other: list[float]
    """nll of the other model."""


def answer_of(model: LanguageModel, ids: list[int], targets: list[int]) -> tuple[list[float], list[float], list[bool]]:
    tokens = torch.tensor(ids)
    output = model(tokens, Segments.from_lengths([len(ids)]))
    logits = model.logits(output.hidden).double().log_softmax(-1)
    nll = [-logits[place, target].item() if target >= 0 else 0.0 for place, target in enumerate(targets)]
    if output.segmentation is None:
        return nll, [], []
    return nll, output.segmentation.probabilities.tolist(), output.segmentation.boundaries.tolist()


@pytest.fixture(scope="session")
def pieces(run: Path, dense_run: Path) -> list[Piece]:
    """All validation rows, piece by piece, each through the models on its own: no batch, no packing."""
    trained, other = open_trained(run), open_trained(dense_run)
    models = [model_of(one.config, one.state, torch.float32, torch.device("cpu"), "") for one in (trained, other)]
    reader = Reader(trained.config.data, trained.config.seed, trained.config.model.vocab_size, log=quiet)
    found: list[Piece] = []
    document = -1
    with torch.no_grad():
        for source in reader.sources:
            ((stream, rows),) = [(stream, rows) for stream, rows in reader.validation_stream(source.domain)]
            length = reader.config.sequence_length
            for row in range(rows):
                ids = stream.read(row * length, length + 1)[0].tolist()
                begins = sorted({0, *(place for place in range(length) if ids[place] == reader.bos_id)})
                for begin, end in zip(begins, [*begins[1:], length], strict=True):
                    if ids[begin] == reader.bos_id or row == 0:
                        document += 1
                    targets = ids[begin + 1:end + 1]
                    if targets[-1] == reader.bos_id:
                        targets[-1] = -1
                    nll, p, b = answer_of(models[0], ids[begin:end], targets)
                    found.append(Piece(ids[begin:end], targets, source.domain, document, nll, p, b,
                                       answer_of(models[1], ids[begin:end], targets)[0]))
    return found


def close(value: float | None, expected: float | None, relative: float = 1e-5) -> bool:
    """fp32 in batches and alone differ in the last digits."""
    if value is None or expected is None:
        return value is expected
    return bool(np.isclose(value, expected, rtol=relative, atol=1e-9))
