"""Metrics of every few steps, sent to the run's loggers.

A line sums over the steps since the line before, and the sum under way is part of every checkpoint, so that a run that
was stopped writes the lines it would have written. Times and rates are the only numbers that may differ.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dlcm_lightning.batch import Batch
from dlcm_lightning.training.loggers import RunTensorBoardLogger, tag
from dlcm_lightning.training.metrics.numbers import metrics_of
from dlcm_lightning.training.metrics.sums import LENGTHS, SCALARS, MetricSums
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.speed import Machine, speed_of
from dlcm_lightning.training.stopwatch import Stopwatch

TIMED = ("tokens_per_second", "mfu", "share_of_product_rate", "step_seconds", "data_wait", "peak_memory_gib",
         "save_seconds", "validation_seconds")
"""The numbers of a line that say how a step went, not what it computed."""
PAUSES = {"save": "save_seconds", "validate": "validation_seconds"}
"""What the pauses of a stopwatch are called."""


def flat(kind: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """What `metrics_of` gives as KIND/NAME and KIND/NAME/DOMAIN, as loggers take it."""
    found = {f"{kind}/{name}": value for name, value in metrics.items() if name != "domains"}
    return found | {f"{kind}/{name}/{domain}": value for domain, values in metrics.get("domains", {}).items()
                    for name, value in values.items()}


def log(trainer: Trainer, kind: str, metrics: dict[str, Any], step: int) -> None:
    """To all loggers of the trainer; on rank 0."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(flat(kind, metrics), step)


def tensorboard(trainer: Trainer) -> RunTensorBoardLogger | None:
    """The run's own, for what is no number; None on other ranks."""
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, RunTensorBoardLogger)), None)


class Metrics(Callback):
    """Sums sums over `log_every_steps` steps and logs a line."""

    state_key = "Metrics"

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.window: MetricSums | None = None
        """Sum of the steps since the last line."""
        self.lengths: Tensor | None = None
        """(LENGTHS,) int64: concepts of this rank by length, since the last line."""
        self.clipped: Tensor | None = None
        """() float64: steps since the last line whose gradient was clipped."""
        self.latest: dict[str, Any] = {}
        """Metrics of the last line."""
        self.trained: MetricSums | None = None
        """Sum of this process's steps up to the last line, for the speed of the run."""
        self.training_seconds = 0.0
        """Time of those steps, without validation and checkpoints."""
        self.waiting_seconds = 0.0
        """Of these, spent waiting for data."""
        self.machine: Machine | None = None
        """Known before the first step."""
        self._recent: MetricSums | None = None
        """Steps of this process since the last line; a window that was resumed holds steps of another."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.stopwatch.lap()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, PretrainModule)
        config = module.config
        if (counts := module.concept_lengths) is not None:
            self.lengths = counts if self.lengths is None else self.lengths.to(counts.device) + counts
        if not module.finishes_step(batch_idx):
            return
        step = module.last_step
        assert step is not None
        self.window = step if self.window is None else self.window.to(step.domains.device) + step
        self._recent = step if self._recent is None else self._recent + step
        clipped = (module.grad_norm > (config.optim.max_grad_norm or torch.inf)).double()
        self.clipped = clipped if self.clipped is None else self.clipped.to(clipped.device) + clipped
        if trainer.global_step % config.train.log_every_steps and trainer.global_step != config.total_steps:
            return
        metrics = self._measure(trainer, module)
        log(trainer, "train", metrics, trainer.global_step)
        if self.lengths is not None:
            self._histogram(trainer, self.lengths.cpu())
        self.latest = metrics
        self.trained = self._recent if self.trained is None else self.trained + self._recent
        self.window = self._recent = self.lengths = self.clipped = None

    def _measure(self, trainer: Trainer, module: PretrainModule) -> dict[str, Any]:
        """The numbers of one line. Reading them waits for the device, so that the lap after it is honest."""
        assert self.window is not None and self._recent is not None and self.clipped is not None
        config = module.config
        metrics = metrics_of(self.window, config.data.domains, module.boundary)
        metrics |= {name: int(self.window.scalar(name)) for name in ("samples", "noise")}
        if config.data.unreadable == "mask":
            metrics["unreadable_rows"] = round(self.window.scalar("unreadable").item())
        metrics["grad_norm"] = module.grad_norm.item()
        module.grad_norms.check(trainer.global_step)
        metrics["clipped"] = self.clipped.item() / max(1.0, self.window.scalar("steps").item())
        metrics |= {f"lr_{role}": rate for role, rate in module.learning_rates.items()}
        if module.device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated(module.device) / 2**30
        seconds, waited = self.stopwatch.lap()
        self.training_seconds += seconds
        self.waiting_seconds += waited
        metrics["data_wait"] = waited / seconds
        metrics["step_seconds"] = seconds / self._recent.scalar("steps").item()
        metrics["tokens_per_second"] = self._recent.total("tokens").item() / seconds
        pace = speed_of(config, self._recent, seconds, waited, self.machine) if self.machine else None
        if pace is not None:
            metrics["share_of_product_rate"] = pace.share
            if pace.mfu is not None:
                metrics["mfu"] = pace.mfu
        for phase, spent in self.stopwatch.pauses.items():
            metrics[PAUSES[phase]] = spent
        self.stopwatch.pauses.clear()
        return metrics

    def _histogram(self, trainer: Trainer, lengths: Tensor) -> None:
        """Concept lengths, a bar per whole number of tokens."""
        if (board := tensorboard(trainer)) is None:
            return
        counts = lengths.double()
        values = torch.arange(1, LENGTHS + 1, dtype=torch.float64)
        board.experiment.add_histogram_raw(
            tag("train/concept_length"), min=1, max=LENGTHS, num=int(counts.sum()), sum=float((counts * values).sum()),
            sum_squares=float((counts * values.square()).sum()), bucket_limits=(values + 0.5).tolist(),
            bucket_counts=counts.tolist(), global_step=trainer.global_step * board.tokens_per_step,
        )

    def state_dict(self) -> dict[str, Any]:
        if self.window is None:
            return {}
        return {"domains": self.window.domains, "scalars": self.window.scalars, "features": self.window.features,
                "lengths": self.lengths, "clipped": self.clipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            scalars = state_dict["scalars"]  # fewer where an older version has saved them
            scalars = torch.cat([scalars, scalars.new_zeros(len(SCALARS) - len(scalars))])
            self.window = MetricSums(state_dict["domains"], scalars, state_dict["features"])
            self.lengths, self.clipped = state_dict.get("lengths"), state_dict.get("clipped")
