"""The end of a run: validation over all ranks, the table, the report. Comes also where only this was missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning.model.mup import role_parameters
from dlcm_lightning.ops.collectives import rank
from dlcm_lightning.progress import Log
from dlcm_lightning.training.callbacks.metrics import Metrics, log
from dlcm_lightning.training.datamodule import PretrainData
from dlcm_lightning.training.device import describe_hardware
from dlcm_lightning.training.metrics.numbers import metrics_of
from dlcm_lightning.training.metrics.table import baselines_of
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.report import Report, summary
from dlcm_lightning.training.speed import Machine, speed_of
from dlcm_lightning.training.validation import validate


class FinalReport(Callback):
    """Made before the first step, when the machine's speed is measured for the first time."""

    def __init__(self, run: Path, data: PretrainData, metrics: Metrics, rate: Callable[[], float], gpus: int,
                 peak: float | None, log: Log) -> None:
        """rate: measures FLOP/s of large products of this process. gpus: how many compute; 1 where processes share the
        cores of a host. peak: of each, see speed.py."""
        self.run, self.data, self.metrics, self.rate, self.print = run, data, metrics, rate, log
        self.gpus, self.peak = gpus, peak
        self.rate_before = self._rate()
        metrics.machine = self._machine(self.rate_before)
        self.outcome: Report | None = None

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, PretrainModule)
        config, model, steps = module.config, module.model, trainer.global_step
        sums = validate(module, self.data.val_dataloader(), progress=trainer.is_global_zero)
        validation = metrics_of(sums, config.data.domains, module.boundary)
        machine = self._machine((self.rate_before + self._rate()) / 2)
        trained = self.metrics.trained
        self.outcome = Report(
            steps=steps, tokens=module.consumed_tokens, hardware=describe_hardware(config.train, module.device),
            precision=str(model.compute_dtype).removeprefix("torch."), attention=model.backend,
            parameters=sum(owner.shape.numel() for _, owner in role_parameters(model)), validation=validation,
            baselines=baselines_of(self.data.reader, self.print) if trainer.is_global_zero else [],
            speed=None if trained is None else speed_of(
                config, trained, self.metrics.training_seconds, self.metrics.waiting_seconds, machine),
        )
        if trainer.is_global_zero:
            log(trainer, "val", validation, steps)
            for logger in trainer.loggers:
                logger.save()
            self.outcome.save(self.run)
            self.print(summary(config, self.outcome))

    def _machine(self, rate: float) -> Machine:
        return Machine(rate * self.gpus, self.peak and self.peak * self.gpus)

    def _rate(self) -> float:
        """Of one process while the others wait, or they would take each other's time."""
        return self.rate() if rank() == 0 else math.inf
