"""From `train.strategy` to an engine, and from whoever started the processes to Lightning's name for it."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from dlcm_lightning.cluster.placement import launched
from dlcm_lightning.config import ConfigError, TrainConfig
from dlcm_lightning.training.strategies.engine import Engine
from dlcm_lightning.training.strategies.replicated import OneProcess, Replicated
from dlcm_lightning.training.strategies.sharded import Sharded


def choose_engine(train: TrainConfig, where: torch.device) -> Engine:
    """A Lightning strategy. ConfigError: ZeRO without deepspeed."""
    if train.strategy == "ddp":
        return OneProcess(where) if train.ranks == 1 else Replicated()
    if train.strategy == "fsdp2":
        return Sharded(train.ranks)
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"train.strategy = {train.strategy!r}: needs DeepSpeed, which is not installed; "
                          "pip install 'dlcm-lightning[deepspeed]', or choose ddp or fsdp2")
    zero = importlib.import_module("dlcm_lightning.training.strategies.zero")
    engine: Engine = zero.Zero(int(train.strategy[-1]), train.offload, where.type == "cuda")
    return engine


def choose_environment() -> ClusterEnvironment:
    """Lightning's own guess takes some processes that SLURM did not start for its own; and it must not requeue the job,
    which it does inside a signal handler."""
    start = launched()
    if start is None:
        return LightningEnvironment()
    return SLURMEnvironment(auto_requeue=False) if start.by == "srun" else TorchElasticEnvironment()
