"""Metrics of every few steps to TensorBoard and to `metrics.jsonl`, on an axis of consumed tokens.

A line sums over the steps since the line before, and the sum under way is part of every checkpoint, so that a run that
was stopped writes the lines it would have written. `metrics.jsonl` is cut back to the checkpoint on resuming, and
TensorBoard is told to purge what lies behind it. Times and rates are the only numbers that may differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dlcm_lightning.batch import Batch
from dlcm_lightning.durable import write_atomically
from dlcm_lightning.training.metrics import metrics_of
from dlcm_lightning.training.module import LENGTHS, PretrainModule
from dlcm_lightning.training.objective import SCALARS, Tally
from dlcm_lightning.training.stopwatch import Stopwatch
from dlcm_lightning.training.strategies.engine import Engine

TENSORBOARD = "tensorboard"
TIMED = ("tokens_per_second", "data_wait", "peak_memory_gib")
"""The numbers of a line that say how a step went, not what it computed."""


class MetricsWriter:
    """`metrics.jsonl` and TensorBoard, fed by rank 0 alone."""

    def __init__(self, run: Path) -> None:
        self.file, self.folder = run / "metrics.jsonl", run / TENSORBOARD
        self._board: SummaryWriter | None = None

    @property
    def board(self) -> SummaryWriter:
        """TensorBoard's writer, once the run has begun."""
        assert self._board is not None
        return self._board

    def flush(self) -> None:
        """What was written is on its way to the disk; nothing on other ranks."""
        if self._board is not None:
            self._board.flush()

    def begin(self, step: int, tokens: int, total_steps: int) -> None:
        """The run goes on behind optimizer step `step`: what lies behind it is dropped."""
        self._cut_back(step, total_steps)
        self._board = SummaryWriter(str(self.folder), purge_step=tokens + 1)

    def _cut_back(self, step: int, total_steps: int) -> None:
        """Drops the lines behind optimizer step `step`, the final validation's, and a half-written last one.

        The final validation is written by the end of the run, which is still to come when this is called.
        """
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines():
            try:
                read = json.loads(line)
                if read["step"] <= step and (read["kind"], read["step"]) != ("validation", total_steps):
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                break
        write_atomically(self.file, "".join(f"{line}\n" for line in kept).encode())

    def write(self, kind: str, step: int, tokens: int, metrics: dict[str, Any]) -> None:
        """One line; kind is train or validation."""
        with self.file.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "tokens": tokens, **metrics}) + "\n")
        for name, value in metrics.items():
            if name == "domains":
                for domain, values in value.items():
                    for key, number in values.items():
                        self.board.add_scalar(f"{kind}_{key}/{domain}", number, tokens)
            elif isinstance(value, (int, float)):
                self.board.add_scalar(f"{kind}/{name}", value, tokens)


class Metrics(Callback):
    """Sums tallies over `log_every_steps` steps and writes a line."""

    def __init__(self, writer: MetricsWriter, stopwatch: Stopwatch) -> None:
        self.writer, self.stopwatch = writer, stopwatch
        self.window: Tally | None = None
        """Sum of the steps since the last line."""
        self.lengths: Tensor | None = None
        """(LENGTHS,) int64: concepts of this rank by length, since the last line."""
        self.latest: dict[str, Any] = {}
        """The last line's metrics, for the progress bar."""
        self.trained: Tally | None = None
        """Sum of the steps that this process made, up to the last line."""
        self.training_seconds = 0.0
        """Time that these steps took, without validation and checkpoints."""
        self.waiting_seconds = 0.0
        """Of these, spent waiting for data."""
        self._recent: Tally | None = None
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
        if trainer.global_step % config.train.log_every_steps and trainer.global_step != config.total_steps:
            return
        metrics = self._measure(trainer, module)
        if trainer.is_global_zero:
            self.writer.write("train", trainer.global_step, module.consumed_tokens, metrics)
            if self.lengths is not None:
                self._histogram(self.lengths.cpu(), module.consumed_tokens)
        self.latest = metrics
        self.trained = self._recent if self.trained is None else self.trained + self._recent
        self.window = self._recent = self.lengths = None

    def _measure(self, trainer: Trainer, module: PretrainModule) -> dict[str, Any]:
        """The numbers of one line. Reading them waits for the device, so that the lap behind it is honest."""
        assert self.window is not None and self._recent is not None
        config = module.config
        metrics = metrics_of(self.window, config.data.domains, module.boundary)
        metrics |= {name: int(self.window.scalar(name)) for name in ("samples", "noise")}
        if config.data.unreadable == "mask":
            metrics["unreadable_rows"] = round(self.window.scalar("unreadable").item())
        engine = trainer.strategy
        assert isinstance(engine, Engine)
        metrics["gradient_norm"] = engine.gradient_norm.item()
        for group in trainer.optimizers[0].param_groups:
            metrics[f"learning_rate_{group['role']}"] = group["lr"]
        if module.device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated(module.device) / 2**30
        seconds, waited = self.stopwatch.lap()
        self.training_seconds += seconds
        self.waiting_seconds += waited
        metrics["data_wait"] = waited / seconds
        metrics["tokens_per_second"] = self._recent.total("tokens").item() / seconds
        return metrics

    def _histogram(self, lengths: Tensor, tokens: int) -> None:
        """Concept lengths, a bar per whole number of tokens."""
        counts = lengths.double()
        values = torch.arange(1, LENGTHS + 1, dtype=torch.float64)
        self.writer.board.add_histogram_raw(
            "train/concept_length", min=1, max=LENGTHS, num=int(counts.sum()), sum=float((counts * values).sum()),
            sum_squares=float((counts * values.square()).sum()), bucket_limits=(values + 0.5).tolist(),
            bucket_counts=counts.tolist(), global_step=tokens,
        )

    def state_dict(self) -> dict[str, Any]:
        if self.window is None:
            return {}
        return {"domains": self.window.domains, "scalars": self.window.scalars, "features": self.window.features,
                "lengths": self.lengths}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            scalars = state_dict["scalars"]  # fewer where an older version has saved them
            scalars = torch.cat([scalars, scalars.new_zeros(len(SCALARS) - len(scalars))])
            self.window = Tally(state_dict["domains"], scalars, state_dict["features"])
            self.lengths = state_dict.get("lengths")
