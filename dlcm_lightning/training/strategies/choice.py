"""From `train.strategy` to an engine, and a run's processes in Lightning's words."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from dlcm_lightning.cluster.world import World
from dlcm_lightning.config import ConfigError, TrainConfig
from dlcm_lightning.training.strategies.ddp import DdpStrategy
from dlcm_lightning.training.strategies.fsdp2 import Fsdp2Strategy
from dlcm_lightning.training.strategies.full_state import FullStateStrategy
from dlcm_lightning.training.strategies.single import SingleStrategy


def needs_group(train: TrainConfig) -> bool:
    """Whether an engine needs a process group even for one process."""
    return train.strategy != "ddp"


def choose_strategy(train: TrainConfig, where: torch.device) -> FullStateStrategy:
    """A Lightning strategy. ConfigError: ZeRO without deepspeed, ranks that cannot be divided as configured."""
    if train.strategy == "ddp":
        return SingleStrategy(where) if train.ranks == 1 else DdpStrategy(where)
    if train.strategy == "fsdp2":
        if train.shard_ranks and train.ranks % train.shard_ranks:
            raise ConfigError(f"train.shard_ranks = {train.shard_ranks}: must divide the {train.ranks} ranks; take "
                              "those of a node, or 0 for all")
        return Fsdp2Strategy(train.ranks, where, train.shard_ranks)
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"train.strategy = {train.strategy!r}: needs DeepSpeed, which is not installed; "
                          "pip install 'dlcm-lightning[deepspeed]', or choose ddp or fsdp2")
    zero = importlib.import_module("dlcm_lightning.training.strategies.zero")
    engine: FullStateStrategy = zero.ZeroStrategy(int(train.strategy[-1]), train.offload, where)
    return engine


class RunEnvironment(ClusterEnvironment):
    """What Lightning asks of who started the processes. They have met before it is asked, so it starts none, finds none
    and requeues no job: its own guesses take some processes that SLURM did not start for SLURM's."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.world.address

    @property
    def main_port(self) -> int:
        return self.world.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.world.size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.world.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.world.local_rank or 0

    def node_rank(self) -> int:
        return self.world.node if self.world.node is not None else self.world.rank // (self.world.local_size or 1)
