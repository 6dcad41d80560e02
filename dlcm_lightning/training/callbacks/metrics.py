"""Metrics of every few steps to TensorBoard and to `metrics.jsonl`, on an axis of consumed tokens.

A line sums over the steps since the line before, and the sum under way is part of every checkpoint, so that a run that
was stopped writes the lines it would have written. `metrics.jsonl` is cut back to the checkpoint on resuming, and
TensorBoard is told to purge what lies behind it. Times and rates are the only numbers that may differ.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from dlcm_lightning.batch import Batch
from dlcm_lightning.training.metrics import metrics_of
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.objective import Tally

LENGTHS = 32
"""Concept lengths that the histogram tells apart; longer ones count as the last."""


class MetricsWriter:
    """`metrics.jsonl` and TensorBoard, fed by rank 0 alone."""

    def __init__(self, run: Path, logger: TensorBoardLogger) -> None:
        self.file = run / "metrics.jsonl"
        self.logger = logger

    def cut_back(self, step: int) -> None:
        """Drops the lines behind optimizer step `step`, and a half-written last one."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                break
        temporary = self.file.with_suffix(".part")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self.file)

    def write(self, kind: str, step: int, tokens: int, metrics: dict[str, Any]) -> None:
        """One line; kind is train or validation."""
        with self.file.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "tokens": tokens, **metrics}) + "\n")
        for name, value in metrics.items():
            if name == "domains":
                for domain, values in value.items():
                    for key, number in values.items():
                        self.logger.experiment.add_scalar(f"{kind}_{key}/{domain}", number, tokens)
            elif isinstance(value, (int, float)):
                self.logger.experiment.add_scalar(f"{kind}/{name}", value, tokens)


class Metrics(Callback):
    """Sums tallies over `log_every_steps` steps and writes a line."""

    def __init__(self, writer: MetricsWriter) -> None:
        self.writer = writer
        self.window: Tally | None = None
        self.lengths = torch.zeros(LENGTHS + 1, dtype=torch.int64)
        """Concepts of this rank by length, since the last line."""
        self.latest: dict[str, Any] = {}
        """The last line's metrics, for the progress bar."""
        self.training_seconds = 0.0
        """Time that this process spent in steps, without validation and checkpoints."""
        self.trained: Tally | None = None
        """The tally of those steps."""
        self._began = 0.0
        self._window_seconds = 0.0
        self._window_tokens = 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, PretrainModule)
        config = module.config
        self._window_seconds += time.perf_counter() - self._began
        if (batch_idx + 1) % config.micro_batches:
            return
        step = module.last_step
        assert step is not None
        self.window = step if self.window is None else self.window + step
        self._window_tokens += config.data.tokens_per_step
        if module.concept_lengths is not None:
            self.lengths += torch.bincount(module.concept_lengths.clamp(max=LENGTHS), minlength=LENGTHS + 1).cpu()
        if trainer.global_step % config.train.log_every_steps and trainer.global_step != config.total_steps:
            return
        if trainer.is_global_zero:
            self._write(trainer, module)
        self.training_seconds += self._window_seconds
        self.trained = self.window if self.trained is None else self.trained + self.window
        self.window = None
        self.lengths.zero_()
        self._window_seconds = self._window_tokens = 0

    def _write(self, trainer: Trainer, module: PretrainModule) -> None:
        assert self.window is not None
        config = module.config
        ratio = config.model.boundary.target_ratio if config.model.kind == "dlcm" else None
        metrics = metrics_of(self.window, config.data.domains, ratio)
        metrics["gradient_norm"] = module.gradient_norm.item()
        for group in trainer.optimizers[0].param_groups:
            metrics[f"learning_rate_{group['role']}"] = group["lr"]
        metrics["tokens_per_second"] = self._window_tokens / max(self._window_seconds, 1e-9)
        tokens = module.consumed_tokens
        self.writer.write("train", trainer.global_step, tokens, metrics)
        if self.lengths.sum() > 0:
            self._histogram(tokens)
        self.latest = metrics

    def _histogram(self, tokens: int) -> None:
        """Concept lengths, a bar per whole number of tokens."""
        counts = self.lengths[1:].double()
        edges = torch.arange(1, LENGTHS + 1, dtype=torch.float64) + 0.5
        values = torch.arange(1, LENGTHS + 1, dtype=torch.float64)
        self.writer.logger.experiment.add_histogram_raw(
            "train/concept_length", min=1, max=LENGTHS, num=int(counts.sum()), sum=float((counts * values).sum()),
            sum_squares=float((counts * values.square()).sum()), bucket_limits=edges.tolist(),
            bucket_counts=counts.tolist(), global_step=tokens,
        )

    def state_dict(self) -> dict[str, Any]:
        if self.window is None:
            return {}
        return {"domains": self.window.domains, "scalars": self.window.scalars, "features": self.window.features,
                "lengths": self.lengths.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.window = Tally(state_dict["domains"], state_dict["scalars"], state_dict["features"])
            self.lengths = state_dict["lengths"]
