"""The LightningDataModule: a reader's rows as loaders whose position is one integer.

Lightning is given a loader whose length is that of the whole run, so that it prefetches nothing, and whose iteration
begins at the optimizer step where the run stands: a number that follows from the checkpoint, is the same on every rank,
and means the same on any number of them.
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
from dlcm_lightning.data.loader import TrainingBatches, ValidationBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.errors import DataError
from dlcm_lightning.ops.collectives import rank, world_size
from dlcm_lightning.training.stopwatch import Stopwatch


class TrainLoader:
    """This rank's micro-batches of the whole run; iterating begins at optimizer step `first_step`."""

    def __init__(self, reader: Reader, config: Config, first_step: int, pin_memory: bool, stopwatch: Stopwatch
                 ) -> None:
        self.reader, self.config, self.first_step = reader, config, first_step
        self.pin_memory, self.stopwatch = pin_memory, stopwatch

    def __len__(self) -> int:
        return self.config.total_steps * self.config.micro_batches

    def __iter__(self) -> Iterator[Batch]:
        coming = iter(TrainingBatches(self.reader, rank(), world_size(), self.first_step, self.config.total_steps,
                                      self.config.data.workers))
        step, error = self._step(coming)
        while step:
            following, error = ([], error) if error else self._step(coming)
            for batch in step:
                yield replace(batch, following=following[0].step if following else StepCounts())
            step = following
        if error:
            raise error

    def state_dict(self) -> dict[str, int]:
        """Lightning asks of a loader whether it can be continued; this one begins where it is told."""
        return {"first_step": self.first_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first_step = state["first_step"]

    def _step(self, coming: Iterator[Batch]) -> tuple[list[Batch], DataError | None]:
        """The micro-batches of one optimizer step, or none and why. Each names the counts of the step behind it, hence
        a step is read before the one in front of it is trained; what cannot be read is raised in its turn."""
        with self.stopwatch.waiting():
            try:
                step = list(itertools.islice(coming, self.config.micro_batches))
            except DataError as error:
                return [], error
            return [batch.pin_memory() if self.pin_memory else batch for batch in step], None


class PretrainData(LightningDataModule):
    """Training and validation rows of a run."""

    def __init__(self, config: Config, reader: Reader, pin_memory: bool, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.config, self.reader, self.pin_memory, self.stopwatch = config, reader, pin_memory, stopwatch
        self.first_step = 0
        """Where training begins, set before the loader is asked for."""

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(self.reader, self.config, self.first_step, self.pin_memory, self.stopwatch)

    def validation_loader(self) -> DataLoader[Batch]:
        """This rank's validation batches. Not Lightning's `val_dataloader`: see callbacks/validate.py."""
        return DataLoader(ValidationBatches(self.reader, rank(), world_size()), batch_size=None)
