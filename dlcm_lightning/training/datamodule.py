"""The LightningDataModule: a reader's rows as loaders whose position is one integer.

Lightning is given a loader whose length is that of the whole run and whose iteration begins where the run stands.
With a length it prefetches nothing, and with `state_dict` it saves the position in every checkpoint; it is the same
number on every rank.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, SequentialSampler

from dlcm_lightning.batch import Batch
from dlcm_lightning.config import Config
from dlcm_lightning.data.reader import Reader, TrainingBatches, ValidationBatches
from dlcm_lightning.ops.collectives import rank, world_size


def ignore_signals(worker: int) -> None:
    """Loader processes leave when their parent does; signals are for the parent to answer."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class TrainLoader:
    """This rank's micro-batches of the whole run; iterating begins at `consumed`."""

    def __init__(self, reader: Reader, total: int, workers: int, pin_memory: bool) -> None:
        self.reader, self.total, self.workers, self.pin_memory = reader, total, workers, pin_memory
        self.consumed = 0

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        batches = TrainingBatches(self.reader, rank(), world_size(), first=self.consumed, last=self.total)
        loader = DataLoader(
            batches, batch_size=None, sampler=SequentialSampler(batches), num_workers=self.workers,
            pin_memory=self.pin_memory, worker_init_fn=ignore_signals,
        )
        for batch in loader:
            self.consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed = state["consumed"]


class PretrainData(LightningDataModule):
    """Training and validation rows of a run."""

    def __init__(self, config: Config, reader: Reader, pin_memory: bool) -> None:
        super().__init__()
        self.config, self.reader, self.pin_memory = config, reader, pin_memory

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def train_dataloader(self) -> TrainLoader:
        total = self.config.total_steps * self.config.micro_batches
        return TrainLoader(self.reader, total, self.config.data.workers, self.pin_memory)

    def validation_loader(self) -> DataLoader[Batch]:
        """This rank's validation batches. Not Lightning's `val_dataloader`: see callbacks/validate.py."""
        return DataLoader(ValidationBatches(self.reader, rank(), world_size()), batch_size=None)
