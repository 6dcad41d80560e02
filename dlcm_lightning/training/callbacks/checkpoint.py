"""Writes a checkpoint every few optimizer steps, at the run's end, and when the run is asked to stop. The last callback
of a step: only between optimizer steps, so no gradient is ever under way.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning.batch import Batch
from dlcm_lightning.cluster.signals import Wish
from dlcm_lightning.training.callbacks.metrics import MetricsWriter
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.persistence import Persistence
from dlcm_lightning.training.stopwatch import Stopwatch

STOPPED_CODE = 75
"""Exit code of a run that was asked to stop and has saved itself: the system's word for "try again later"."""


class Stopped(Exception):
    """The run was asked to leave and has saved itself. Names the signal, or the file."""


class Checkpoints(Callback):
    """Saving, and leaving when asked. At every optimizer step all ranks agree whether any of them was asked."""

    def __init__(self, writer: MetricsWriter, stopwatch: Stopwatch, wish: Wish) -> None:
        self.writer, self.stopwatch, self.wish = writer, stopwatch, wish
        self.persistence: Persistence | None = None

    def take(self, persistence: Persistence) -> None:
        """Comes when all ranks are there."""
        self.persistence = persistence

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, PretrainModule)
        if asked := self._asked():
            raise Stopped(f"{self.wish.named(asked)}: nothing was done behind step {trainer.global_step} of "
                          f"{module.config.total_steps}; the same command continues")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, PretrainModule) and self.persistence is not None
        if not module.finishes_step(batch_idx):
            return
        config, step = module.config, trainer.global_step
        asked = self._asked()
        due = step % config.train.checkpoint_every_steps == 0 or step == config.total_steps
        if due or asked:
            with self.stopwatch.paused("save"):
                self.writer.flush()  # curves up to here are not written again
                self.persistence.save(trainer, module)
        if asked and step < config.total_steps:
            raise Stopped(f"{self.wish.named(asked)}: saved at step {step} of {config.total_steps}; the same command "
                          "continues")

    def _asked(self) -> int:
        """What any rank was asked, on all of them."""
        assert self.persistence is not None
        hosts = self.persistence.hosts
        return hosts.largest(self.wish.noted(look=hosts.rank == 0))
