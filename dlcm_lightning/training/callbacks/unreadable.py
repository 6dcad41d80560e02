"""Keeps account of rows that could not be read (`data.unreadable: mask`) and ends the run when they are too many.

Every rank appends the rows it missed to `unreadable-<rank>.jsonl` in the run's directory: sample, source, reason. The
count that decides is the one all ranks know, summed with the statistics of the step and saved with every checkpoint, so
that all of them stop at the same step and nobody waits for the others. On resuming, lines after the checkpoint are
dropped: their samples are read again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.batch import Batch
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log
from dlcm_lightning.training.module import PretrainModule


class WatchUnreadable(Callback):
    """Counts, records, and stops the run above `data.max_unreadable`."""

    state_key = "WatchUnreadable"

    def __init__(self, run: Path, log: Log) -> None:
        self.run, self.print = run, log
        self.rows = 0
        """Rows of all ranks that were not read, since the beginning of the run."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, PretrainModule)
        if not trainer.is_global_zero:
            return  # the others write only after a step, which needs this rank
        consumed = trainer.global_step * module.config.data.global_batch_size
        for file in self.run.glob("unreadable-*.jsonl"):
            kept = [line for line in file.read_text().splitlines() if line.endswith("}")
                    and json.loads(line)["sample"] < consumed]
            write_atomically(file, "".join(f"{line}\n" for line in kept).encode())

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, PretrainModule)
        data = module.config.data
        if data.unreadable == "stop" or not module.finishes_step(batch_idx):
            return
        if batch.step.unreadable:
            with (self.run / f"unreadable-{trainer.global_rank:05d}.jsonl").open("a") as file:
                for row in batch.step.unreadable:
                    file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
                    self.print(f"unreadable: sample {row.sample} of {row.source!r}: {row.reason}")
        assert module.last_step is not None
        self.rows += round(module.last_step.scalar("unreadable").item())
        consumed = trainer.global_step * data.global_batch_size
        if self.rows > data.max_unreadable * max(consumed, data.block_rows):
            raise DataError(f"data.max_unreadable = {data.max_unreadable}: {self.rows} of {consumed} rows could not be "
                            f"read, see unreadable-*.jsonl in {self.run}; repair the shards (dlcm data verify), or "
                            "raise the bound, and start the run again: it continues from the newest checkpoint")

    def state_dict(self) -> dict[str, int]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.rows = state_dict["rows"]
