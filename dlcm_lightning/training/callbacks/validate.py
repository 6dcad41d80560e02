"""Validation every few steps, before the checkpoint of the same step is written.

Not Lightning's own loop: resumed from a checkpoint that was written before a validation, that loop skips it, and the
curves of a stopped run would lack a point.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning.batch import Batch
from dlcm_lightning.training.callbacks.metrics import MetricsWriter
from dlcm_lightning.training.datamodule import PretrainData
from dlcm_lightning.training.metrics import metrics_of
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.stopwatch import Stopwatch
from dlcm_lightning.training.validation import validate


class Validate(Callback):
    """Writes a validation line every `validate_every_steps` optimizer steps; the run's end is validated by the run."""

    def __init__(self, writer: MetricsWriter, stopwatch: Stopwatch) -> None:
        self.writer, self.stopwatch = writer, stopwatch

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, PretrainModule)
        config, step = module.config, trainer.global_step
        due = module.finishes_step(batch_idx) and step % config.train.validate_every_steps == 0
        if not due or step == config.total_steps:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, PretrainData)
        with self.stopwatch.paused("validate"):
            tally = validate(module, data.validation_loader(), progress=trainer.is_global_zero)
        if trainer.is_global_zero:
            metrics = metrics_of(tally, config.data.domains, module.boundary)
            self.writer.write("validation", step, module.consumed_tokens, metrics)
