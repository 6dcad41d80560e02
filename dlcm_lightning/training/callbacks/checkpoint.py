"""Writes a checkpoint every few optimizer steps and at the run's end. The last callback of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning.batch import Batch
from dlcm_lightning.training.callbacks.metrics import Stopwatch
from dlcm_lightning.training.checkpoints import Identity, sweep, unfinished_state, write_checkpoint
from dlcm_lightning.training.module import PretrainModule


class WriteCheckpoints(Callback):
    """Only between optimizer steps: no gradient is ever under way in a checkpoint."""

    def __init__(self, run: Path, identity: Identity, stopwatch: Stopwatch) -> None:
        self.run, self.identity, self.stopwatch = run, identity, stopwatch

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, PretrainModule)
        config, step = module.config, trainer.global_step
        whole_step = (batch_idx + 1) % config.micro_batches == 0
        if not whole_step or (step % config.train.checkpoint_every_steps and step != config.total_steps):
            return
        with self.stopwatch.paused():  # saving the state is collective, the rest is rank 0's
            if trainer.is_global_zero:
                write_checkpoint(self.run, step, config, self.identity, lambda file: trainer.save_checkpoint(file))
                sweep(self.run, config.train.keep_last)
            else:
                trainer.save_checkpoint(unfinished_state(self.run, step))
            trainer.strategy.barrier()
