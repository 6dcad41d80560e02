"""Writes a checkpoint every few optimizer steps, at the run's end, and when the run is asked to stop. The last callback
of a step: only between optimizer steps, so no gradient is ever under way.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning.batch import Batch
from dlcm_lightning.cluster.signals import StopRequest
from dlcm_lightning.errors import Stopped
from dlcm_lightning.training.checkpoint_manager import CheckpointManager
from dlcm_lightning.training.loop import log_step
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.stopwatch import Stopwatch


class Checkpoints(Callback):
    """Saving, and leaving when asked. At every optimizer step all ranks agree whether any of them was asked.

    A subclass among the callbacks of a run (`train.callbacks`, `pretrain(callbacks=...)`) takes this one's place: it
    says when a checkpoint is `due`, or does more when it is to `save`, such as copying the newest folder elsewhere.
    """

    def __init__(self) -> None:
        self.stopwatch = Stopwatch()
        self.stop: StopRequest | None = None
        self.checkpoint_manager: CheckpointManager | None = None

    def attach(self, stopwatch: Stopwatch, stop: StopRequest) -> None:
        """To a run, before it trains."""
        self.stopwatch, self.stop = stopwatch, stop

    def due(self, trainer: Trainer, module: PretrainModule) -> bool:
        """Whether the optimizer step that has just ended is saved; the same on every rank."""
        config, step = module.config, trainer.global_step
        return step % config.train.checkpoint_every_steps == 0 or step == config.total_steps or trainer.should_stop

    def save(self, trainer: Trainer, module: PretrainModule) -> None:
        """Writes a checkpoint. Comes on all ranks, when one is due and when the run is asked to leave. RunError: the
        gradient of a step since the last line of the log was not finite."""
        assert self.checkpoint_manager is not None
        module.grad_norms.check(trainer.global_step)
        log_step(trainer)
        for logger in trainer.loggers:
            logger.save()  # curves up to here are not written again
        self.checkpoint_manager.save(trainer, module)

    def take(self, checkpoint_manager: CheckpointManager) -> None:
        """Comes when all ranks are there."""
        self.checkpoint_manager = checkpoint_manager

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, PretrainModule) and self.stop is not None
        self.stop.phase = "training"
        if asked := self._asked():
            raise Stopped(f"{self.stop.named(asked)}: nothing was done after step {trainer.global_step} of "
                          f"{module.config.total_steps}; the same command continues")
        assert self.checkpoint_manager is not None
        self.checkpoint_manager.check_callbacks(trainer)  # after their own on_train_start, and before any step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, PretrainModule) and self.stop is not None
        if not module.finishes_step(batch_idx):
            return
        config, step = module.config, trainer.global_step
        asked = self._asked()
        if self.due(trainer, module) or asked:
            with self.stopwatch.paused("save"):
                self.save(trainer, module)
        if step == config.total_steps:
            self.stop.phase = "closing"
        elif asked:
            raise Stopped(f"{self.stop.named(asked)}: saved at step {step} of {config.total_steps}; the same command "
                          "continues")

    def _asked(self) -> int:
        """What any rank was asked, on all of them."""
        assert self.checkpoint_manager is not None and self.stop is not None
        group = self.checkpoint_manager.group
        return group.all_reduce_max(self.stop.requested(look=group.rank == 0))
