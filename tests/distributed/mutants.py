"""Bugs planted by hand, each where many ranks could go wrong. `planted(name)` is a context in which one is alive.

Most act in the processes of a worker; `plant` leaves one in a process for good, for runs of the real command, which
take its name from the environment (tests/distributed/mutant_command.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dlcm_lightning.batch import StepCounts
from dlcm_lightning.config import Config
from dlcm_lightning.ops import collectives
from dlcm_lightning.training import checkpoint_manager, datamodule, module
from dlcm_lightning.training.metrics.sums import MetricSums
from dlcm_lightning.training.strategies.ddp import DdpStrategy
from dlcm_lightning.training.strategies.fsdp2 import Fsdp2Strategy
from dlcm_lightning.training.strategies.single import SingleStrategy


def without_the_factor_w(patch: pytest.MonkeyPatch) -> None:
    """Engines average over ranks; the loss is not multiplied by their number."""
    patch.setattr(module, "world_size", lambda: 1)


def without_the_factor_k(patch: pytest.MonkeyPatch) -> None:
    """Lightning divides by the number of micro-batches; the loss is not multiplied by it."""
    honest = module.PretrainModule.training_step

    def divided(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return honest(self, batch, batch_idx) / self.config.micro_batches

    patch.setattr(module.PretrainModule, "training_step", divided)


def deepspeed_divides_twice(patch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed does unless it is told that Lightning has divided already."""
    from dlcm_lightning.training.strategies import zero

    patch.setattr(zero.ZeroPrecision, "backward",
                  lambda self, tensor, model, optimizer, *args, **kwargs: model.trainer.model.backward(tensor))


def rate_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    """F is what this rank sampled, not the global batch."""
    honest = module.all_reduce_sums

    def local(sums: MetricSums, following: StepCounts) -> tuple[MetricSums, Tensor]:
        whole, counts = honest(sums, following)
        return MetricSums(sums.domains, whole.scalars, whole.features), counts

    patch.setattr(module, "all_reduce_sums", local)


def counts_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    """The loss is divided by this rank's targets times the number of ranks."""
    patch.setattr(module, "all_reduce_sum", lambda tensor: tensor * collectives.world_size())


def rows_of_rank_0(patch: pytest.MonkeyPatch) -> None:
    """Every rank reads what rank 0 reads."""
    patch.setattr(datamodule, "rank", lambda: 0)


def cursor_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    """On resuming, only rank 0 is told where the run stands; the others read from the beginning."""
    honest = module.follow

    def forgetful(trainer: Any, config: Config) -> None:
        honest(trainer, config)
        if collectives.rank():
            trainer.train_dataloader.completed = lambda: 0

    patch.setattr(module, "follow", forgetful)


def a_dropped_shard(patch: pytest.MonkeyPatch) -> None:
    """The second moments that the last rank should write are zeros."""
    honest = checkpoint_manager.CheckpointManager._mine

    def dropping(self: Any, trainer: Any, module: Any) -> Iterator[tuple[str, Tensor]]:
        last = self.group.rank == self.group.ranks - 1
        for name, tensor in honest(self, trainer, module):
            yield name, torch.zeros_like(tensor) if last and name.startswith("exp_avg_sq/") else tensor

    patch.setattr(checkpoint_manager.CheckpointManager, "_mine", dropping)


def a_forgotten_count(patch: pytest.MonkeyPatch) -> None:
    """The moments are restored and AdamW's step count is not."""
    for engine in (SingleStrategy, DdpStrategy, Fsdp2Strategy):
        honest = engine.init_optim_state
        patch.setattr(engine, "init_optim_state", lambda self, steps, honest=honest: honest(self, 0))


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    one.__name__: one for one in (
        without_the_factor_w, without_the_factor_k, deepspeed_divides_twice, rate_of_one_rank, counts_of_one_rank,
        rows_of_rank_0, cursor_of_one_rank, a_dropped_shard, a_forgotten_count)}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """With no name, nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if name:
            MUTANTS[name](patch)
        yield


def plant(name: str) -> None:
    """For the rest of this process."""
    MUTANTS[name](pytest.MonkeyPatch())
