"""Writes a checkpoint every few optimizer steps and at the run's end. The last callback of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dlcm_lightning.batch import Batch
from dlcm_lightning.training.checkpoints import Identity, sweep, unfinished_state, write_checkpoint
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.stopwatch import Stopwatch


class StraightToDisk(TorchCheckpointIO):
    """Writes where it is told. Lightning's own writes to /tmp first and copies, for an atomicity that we have."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        torch.save(checkpoint, path)


class WriteCheckpoints(Callback):
    """Only between optimizer steps: no gradient is ever under way in a checkpoint."""

    def __init__(self, run: Path, identity: Identity, stopwatch: Stopwatch) -> None:
        self.run, self.identity, self.stopwatch = run, identity, stopwatch

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, PretrainModule)
        config, step = module.config, trainer.global_step
        due = step % config.train.checkpoint_every_steps == 0 or step == config.total_steps
        if not (due and module.finishes_step(batch_idx)):
            return
        with self.stopwatch.paused():  # saving the state is collective, the rest is rank 0's
            if trainer.is_global_zero:
                write_checkpoint(self.run, step, config, self.identity, lambda file: trainer.save_checkpoint(file))
                sweep(self.run, config.train.keep_last)
            else:
                trainer.save_checkpoint(unfinished_state(self.run, step))
            trainer.strategy.barrier()
