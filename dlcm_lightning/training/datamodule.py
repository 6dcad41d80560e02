"""The LightningDataModule: a reader's rows as loaders whose position is one integer.

Lightning is given a loader whose length is that of the whole run, so that it prefetches nothing, and whose iteration
begins at the optimizer step where the Trainer stands: a number that is the same on every rank and means the same on any
number of them. There is no second counter that could disagree with it. A checkpoint holds it, and a digest of the text.

The loaders are no `DataLoader`s, since Lightning would put its distributed sampler into one: they know their rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer

from dlcm_lightning.batch import Batch, StepCounts
from dlcm_lightning.compose import config_from
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.data.loader import TrainingBatches, ValidationBatches
from dlcm_lightning.data.preprocessing.prepare import prepare_sample_corpus
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.errors import DataError, RunError
from dlcm_lightning.ops.collectives import rank, world_size
from dlcm_lightning.progress import Log
from dlcm_lightning.training.contract import check_rows, with_ranks
from dlcm_lightning.training.stopwatch import Stopwatch


class TrainLoader:
    """This rank's micro-batches, from where the run stands to its end."""

    def __init__(self, reader: Reader, config: Config, completed: Callable[[], int], pin_memory: bool,
                 stopwatch: Stopwatch) -> None:
        """completed: says how many optimizer steps the run has made; asked when the first micro-batch is."""
        self.reader, self.config, self.completed = reader, config, completed
        self.pin_memory, self.stopwatch = pin_memory, stopwatch

    def __len__(self) -> int:
        return self.config.total_steps * self.config.micro_batches

    def __iter__(self) -> Iterator[Batch]:
        coming = iter(TrainingBatches(self.reader, rank(), world_size(), self.completed(), self.config.total_steps,
                                      self.config.data.workers))
        step, error = self._read(coming)
        while step:
            following, error = ([], error) if error else self._read(coming)
            for batch in step:
                yield replace(batch, following=following[0].step if following else StepCounts())
            step = following
        if error:
            raise error

    def state_dict(self) -> dict[str, int]:
        """For people: Lightning takes a loader for resumable that has one."""
        return {"step": self.completed()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: the Trainer's counter is what counts, and is restored by itself."""

    def _read(self, coming: Iterator[Batch]) -> tuple[list[Batch], DataError | None]:
        """The micro-batches of one optimizer step, or none and why. Each names the counts of the step after it, hence
        a step is read before the one in front of it is trained; what cannot be read is raised in its turn."""
        with self.stopwatch.waiting():
            try:
                step = list(itertools.islice(coming, self.config.micro_batches))
            except DataError as error:
                return [], error
            return [batch.pin_memory() if self.pin_memory else batch for batch in step], None


def follow(trainer: Trainer, config: Config) -> None:
    """The Trainer's loader begins where the Trainer stands, whoever has made it. ConfigError: it has other rows than
    `config` says."""
    if isinstance(loader := trainer.train_dataloader, TrainLoader):
        check_rows(config, loader.config, fitting=True)
        loader.completed = lambda: trainer.global_step


class PretrainData(LightningDataModule):
    """Training and validation rows of a run.

    `prepare_data` builds the sample corpus where that is asked for; `setup` opens the shards of `data.root`.
    """

    def __init__(self, config: Config | Mapping[str, Any], stopwatch: Stopwatch | None = None,
                 log: Log = print) -> None:
        """config: a Config, or its plain form, as checkpoints hold it. stopwatch: told of waits for data.
        log: told in words of what takes long or is left out."""
        super().__init__()
        self.config = config if isinstance(config, Config) else config_from(config)
        self.save_hyperparameters({"config": asdict(self.config)}, logger=False)
        self.stopwatch, self.print = stopwatch or Stopwatch(), log
        self._reader: Reader | None = None

    @property
    def reader(self) -> Reader:
        """The opened shards, from `setup` on."""
        if self._reader is None:
            raise RunError("PretrainData: its shards are not open; call open() first, as a Trainer does by "
                           "prepare_data() and setup()")
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        """What a process that is spawned needs: it opens the shards itself, and its Trainer makes itself known."""
        return self.__dict__ | {"_reader": None, "stopwatch": None, "trainer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"stopwatch": Stopwatch()})

    def open(self) -> None:
        """Both, in any process; what Lightning asks for later is done. Errors are those of the two."""
        self.prepare_data()
        self.setup("fit")

    def prepare_data(self) -> None:
        """DataError, RunError: the sample corpus cannot be built."""
        if self.config.data.corpus == "sample" and self._reader is None:
            prepare_sample_corpus(self.config.data, self.config.model.vocab_size, self.print)

    def setup(self, stage: str) -> None:
        """DataError: the shards are missing, damaged, of another tokenizer, or too few for the run. ConfigError: the
        Trainer has other ranks than the configuration says."""
        if self.trainer is not None:
            self.config = with_ranks(self.trainer, self.config)
        if self._reader is None:
            config = self.config
            reader = Reader(config.data, config.seed, config.model.vocab_size, log=self.print)
            reader.check_lasts(config.total_steps * config.data.global_batch_size)
            self._reader = reader

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def train_dataloader(self) -> TrainLoader:
        pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return TrainLoader(self.reader, self.config, self._completed, pin_memory, self.stopwatch)

    def _completed(self) -> int:
        return self.trainer.global_step if self.trainer is not None else 0

    def val_dataloader(self) -> ValidationBatches:
        """This rank's batches of the validation rows of every source."""
        return ValidationBatches(self.reader, rank(), world_size())

    def test_dataloader(self) -> ValidationBatches:
        """The validation rows: none are kept apart for a test."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ValidationBatches:
        """The validation rows, too."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: whole optimizer steps, the samples they consumed, and a digest of text and order, None
        while no shards are open: a fit that fails early may be saved, too."""
        step = self._completed()
        return {"step": step, "samples": step * self.config.data.global_batch_size,
                "data": self._reader.fingerprint if self._reader is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ConfigError: the shards are not those that the checkpoint was trained on."""
        if self._reader is not None and state_dict["data"] not in (None, self.reader.fingerprint):
            raise ConfigError(f"data.root = {self.config.data.root!r}: its shards or their order are not those of the "
                              "checkpoint, so sample i would be another text; restore them, or begin a new run")
