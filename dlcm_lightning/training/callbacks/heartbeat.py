"""Notes in which phase of a step this rank is; what is done between steps notes the stopwatch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from dlcm_lightning.batch import Batch
from dlcm_lightning.cluster.heartbeat import HeartbeatWriter


class Heartbeat(Callback):
    """The first callback, so that a phase is noted before what others do in it."""

    def __init__(self, heartbeat: HeartbeatWriter) -> None:
        self.heartbeat = heartbeat

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.heartbeat.enter("start", trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.heartbeat.enter("forward", trainer.global_step)

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self.heartbeat.enter("backward")

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        self.heartbeat.enter("update")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.heartbeat.enter("update", trainer.global_step)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.heartbeat.enter("end", trainer.global_step)
