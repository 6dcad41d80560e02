"""A run with `train.compile`: everything is compiled before its first step, and a life more changes no bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch._dynamo.utils import counters

from dlcm_lightning.config import Config
from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.ops import fused
from dlcm_lightning.training.run import pretrain
from tests.training.test_run import assert_same_end, quiet, stop_after


def forget() -> None:
    """What this process has compiled, as another one would not know of it."""
    fused.compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def compiled_config(run_config: Config) -> Config:
    return replace(run_config, train=replace(run_config.train, compile=True, log_every_steps=1))


class Graphs(Callback):
    """How many there are when the first step begins, and at the end."""

    def __init__(self) -> None:
        self.before: int | None = None
        self.validations = 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.before is None:
            self.before = counters["stats"]["unique_graphs"]

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.validations += 1

    @property
    def since(self) -> int:
        assert self.before is not None
        return counters["stats"]["unique_graphs"] - self.before


def test_a_run_compiles_all_that_it_needs_before_its_first_step(compiled_config: Config,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Graphs()
    pretrain(compiled_config, quiet, callbacks=[seen])
    assert seen.before and seen.before > 10 and not seen.since and seen.validations >= 2
    forget()
    monkeypatch.setattr(LanguageModel, "prime", lambda *_: None)
    seen = Graphs()
    pretrain(replace(compiled_config, name="unprimed"), quiet, callbacks=[seen])
    assert seen.before == 0 and seen.since > 10, "the test above can fail"


def test_a_life_more_changes_no_bit(compiled_config: Config) -> None:
    straight, stopped = (replace(compiled_config, name=name) for name in ("straight", "stopped"))
    pretrain(straight, quiet)
    forget()
    stop_after(stopped, 5)
    forget()
    pretrain(stopped, quiet)
    assert_same_end(straight, stopped)
