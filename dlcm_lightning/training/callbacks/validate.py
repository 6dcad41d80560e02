"""Validation every few steps, before the checkpoint of the same step is written, and its line for the loggers.

It is Lightning's own loop that validates, with its hooks, so that EarlyStopping and ModelCheckpoint see what they
monitor. Only when is decided here: resumed from a checkpoint that was written before a validation, Lightning would skip
it, and the curves of a stopped run would lack a point.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning.batch import Batch
from dlcm_lightning.training.callbacks.metrics import log
from dlcm_lightning.training.loop import StepLoop
from dlcm_lightning.training.metrics.numbers import metrics_of
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.stopwatch import Stopwatch


class Validate(Callback):
    """Validates every `validate_every_steps` optimizer steps; the run's end is validated by the run."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, PretrainModule)
        config, step = module.config, trainer.global_step
        due = module.finishes_step(batch_idx) and step % config.train.validate_every_steps == 0
        if not due or step == config.total_steps:
            return
        loop = trainer.fit_loop.epoch_loop
        assert isinstance(loop, StepLoop)
        with self.stopwatch.paused("validate"):
            loop.validate()
        assert module.evaluated is not None
        log(trainer, "val", metrics_of(module.evaluated, config.data.domains, module.boundary), step)
