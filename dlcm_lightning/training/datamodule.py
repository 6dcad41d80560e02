"""The LightningDataModule: a reader's rows as loaders whose position is one integer.

Lightning is given a loader whose length is that of the whole run and whose iteration begins where the run stands.
With a length it prefetches nothing, and with `state_dict` it saves the position in every checkpoint: the samples that
all ranks together have consumed, the same number on every rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from dlcm_lightning.batch import Batch, StepCounts
from dlcm_lightning.config import Config
from dlcm_lightning.data.errors import DataError
from dlcm_lightning.data.loader import TrainingBatches, ValidationBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.ops.collectives import rank, world_size
from dlcm_lightning.training.stopwatch import Stopwatch


class TrainLoader:
    """This rank's micro-batches of the whole run; iterating begins at `samples`."""

    def __init__(self, reader: Reader, config: Config, pin_memory: bool, stopwatch: Stopwatch) -> None:
        self.reader, self.config, self.pin_memory, self.stopwatch = reader, config, pin_memory, stopwatch
        self.consumed = 0
        """Micro-batches of this rank since the beginning of the run."""

    def __len__(self) -> int:
        return self.config.total_steps * self.config.micro_batches

    def __iter__(self) -> Iterator[Batch]:
        first = self.consumed // self.config.micro_batches
        coming = iter(TrainingBatches(self.reader, rank(), world_size(), first, self.config.total_steps,
                                      self.config.data.workers))
        step, error = self._step(coming)
        while step:
            following, error = ([], error) if error else self._step(coming)
            for batch in step:
                self.consumed += 1
                yield replace(batch, following=following[0].step if following else StepCounts())
            step = following
        if error:
            raise error

    def _step(self, coming: Iterator[Batch]) -> tuple[list[Batch], DataError | None]:
        """The micro-batches of one optimizer step, or none and why. Each names the counts of the step behind it, hence
        a step is read before the one in front of it is trained; what cannot be read is raised in its turn."""
        with self.stopwatch.waiting():
            try:
                step = list(itertools.islice(coming, self.config.micro_batches))
            except DataError as error:
                return [], error
            return [batch.pin_memory() if self.pin_memory else batch for batch in step], None

    def state_dict(self) -> dict[str, int]:
        """The position; checkpoints stand between optimizer steps."""
        return {"samples": self.consumed // self.config.micro_batches * self.config.data.rows_per_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed = state["samples"] // self.config.data.rows_per_step * self.config.micro_batches


class PretrainData(LightningDataModule):
    """Training and validation rows of a run."""

    def __init__(self, config: Config, reader: Reader, pin_memory: bool, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.config, self.reader, self.pin_memory, self.stopwatch = config, reader, pin_memory, stopwatch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(self.reader, self.config, self.pin_memory, self.stopwatch)

    def validation_loader(self) -> DataLoader[Batch]:
        """This rank's validation batches. Not Lightning's `val_dataloader`: see callbacks/validate.py."""
        return DataLoader(ValidationBatches(self.reader, rank(), world_size()), batch_size=None)
