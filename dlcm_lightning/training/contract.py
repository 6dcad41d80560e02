"""What a Trainer has to be so that it trains what the configuration says: `check_trainer` refuses any other.

A `Config` fixes how an optimizer step is made of rows, hence how many micro-batches it has on so many ranks, how
gradients are clipped, how long the run is and in which precision is multiplied. A Trainer says these things again, and
where the two disagree Lightning would follow the Trainer without a word. `trainer_arguments` gives what agrees. The
same of the rows, where they come from a datamodule of another configuration, and of callbacks that are given to the
command, which is no plain Trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    GradientAccumulationScheduler,
    ProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from dlcm_lightning.compose import differences
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.training.strategies.full_state import FullStateStrategy

WHERE_FROM = ("data.root", "data.corpus", "data.workers", "data.cache_megabytes", "data.read_ahead_steps",
              "data.validation_rows")
"""Fields that say where rows come from and how they are fetched, but not which are trained on."""
OWN_RATES = ("it sets learning rates of its own, and those of the roles and their schedule would no longer hold; leave "
             "it out (EMAWeightAveraging keeps them, and dlcm merge averages checkpoints)")


def _keeps_its_own_state(callback: Callback) -> bool:
    return any(name in vars(callback) or getattr(type(callback), name) is not getattr(Callback, name)
               for name in ("on_save_checkpoint", "on_load_checkpoint"))


UNFIT: tuple[tuple[Callable[[Callback], bool], str], ...] = (
    (lambda one: isinstance(one, Checkpoint),
     "a run saves by itself (train.checkpoint_every_steps, train.keep_last, train.keep_every_tokens); leave it out, or "
     "name a subclass of dlcm_lightning.training.callbacks.checkpoint.Checkpoints"),
    (lambda one: isinstance(one, ProgressBar), "a run shows its own; leave it out"),
    (lambda one: isinstance(one, StochasticWeightAveraging), OWN_RATES),
    (_keeps_its_own_state,
     "it writes into Lightning's checkpoints (on_save_checkpoint), which this command does not write, so that a run "
     "which continues would lose it; keep it in state_dict, or use it with a plain Trainer"),
)
"""Callbacks that the command refuses, and what to do instead."""


def trainer_arguments(config: Config) -> dict[str, Any]:
    """Keyword arguments of `lightning.Trainer` that follow from the configuration; add devices, loggers, callbacks.

    With several devices, `train.devices` and `train.nodes` have to be set: the number of micro-batches depends on them.
    """
    return {
        "max_steps": config.total_steps,
        "accumulate_grad_batches": config.micro_batches,
        "val_check_interval": config.train.validate_every_steps * config.micro_batches,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": config.train.log_every_steps,
    }


def check_trainer(trainer: Trainer, config: Config, fitting: bool) -> Config:
    """The configuration with `train.devices` and `train.nodes` as the Trainer has them.

    ConfigError: the Trainer would compute something else than the configuration says; it names both and the remedy.
    fitting: it will train, and not only validate or test.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, (FullStateStrategy, SingleDeviceStrategy, DDPStrategy)):
        raise ConfigError(f"Trainer(strategy={type(strategy).__name__}): one device and DDP are known here; to spread "
                          "the model use train.strategy = fsdp2, zero1, zero2 or zero3 with `dlcm pretrain` or "
                          "`dlcm_lightning.pretrain`")
    if trainer.precision != "32-true":
        raise ConfigError(f"Trainer(precision={trainer.precision!r}): the model casts what it multiplies by "
                          f"train.precision = {config.train.precision!r}; leave the Trainer at '32-true'")
    config = with_ranks(trainer, config)
    if strategy.root_device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        rank_zero_warn("torch.backends.cuda.matmul.allow_tf32 is True, which would decide boundaries in TF32; it is "
                       "set to False")
        torch.backends.cuda.matmul.allow_tf32 = False
    if fitting:
        _check_steps(trainer, config)
        _check_length(trainer, config)
    return config


def with_ranks(trainer: Trainer, config: Config) -> Config:
    """The configuration on the Trainer's processes. ConfigError: it says others."""
    nodes = config.train.nodes or trainer.num_nodes
    devices = config.train.devices or trainer.world_size // nodes
    if devices * nodes != trainer.world_size:
        raise ConfigError(f"Trainer: {trainer.world_size} processes, but train.devices = {devices} on train.nodes = "
                          f"{nodes}; set Trainer(devices=..., num_nodes=...) alike, or leave both fields at 0")
    return replace(config, train=replace(config.train, devices=devices, nodes=nodes))


def check_rows(config: Config, given: Config, fitting: bool) -> None:
    """ConfigError: rows of the configuration `given` are not those that the module's would train on; or, where they are
    only evaluated, none that it understands."""
    fields = [name for name in differences(config, given) if name == "model.vocab_size" or (fitting and (
        (name.startswith("data.") and name not in WHERE_FROM) or name in ("seed", "optim.total_tokens")))]
    if config.data.domains != given.data.domains and not fitting:
        fields.append("data.sources[].domain")
    if fields:
        raise ConfigError(f"PretrainData and PretrainModule are made of configurations that differ in "
                          f"{', '.join(fields)}; make both of one, such as "
                          "PretrainModule.load_from_checkpoint(path, config=config)")


def check_callbacks(field: str, callbacks: Sequence[Callback]) -> None:
    """ConfigError: one that needs what a run of the command does not have; a plain Trainer has it."""
    for number, one in enumerate(callbacks):
        if remedy := next((remedy for unfit, remedy in UNFIT if unfit(one)), ""):
            raise ConfigError(f"{field}[{number}]: {type(one).__name__}: {remedy}")


def _check_steps(trainer: Trainer, config: Config) -> None:
    """What an optimizer step is made of."""
    micro_batches, data = config.micro_batches, config.data
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            raise ConfigError("GradientAccumulationScheduler: a step has data.global_batch_size rows from first to "
                              "last; leave the callback out")
        if isinstance(callback, StochasticWeightAveraging):
            raise ConfigError(f"StochasticWeightAveraging: {OWN_RATES}")
    if trainer.accumulate_grad_batches != micro_batches:
        raise ConfigError(f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}): "
                          f"data.global_batch_size = {data.global_batch_size} in micro-batches of "
                          f"{data.micro_batch_size} are {micro_batches} on {config.train.ranks} ranks; set "
                          f"accumulate_grad_batches={micro_batches}, or Trainer(**trainer_arguments(config), ...)")
    clip, wanted = trainer.gradient_clip_val, config.optim.max_grad_norm
    if clip is not None and float(clip) != (wanted or math.inf):
        raise ConfigError(f"Trainer(gradient_clip_val={clip}): optim.max_grad_norm = {wanted} clips; leave the "
                          "argument out, or change the field")
    if trainer.gradient_clip_algorithm == "value":
        raise ConfigError("Trainer(gradient_clip_algorithm='value'): gradients are clipped by their global norm; leave "
                          "the argument out")


def _check_length(trainer: Trainer, config: Config) -> None:
    """How many steps there are, and that an epoch ends between two of them."""
    if trainer.max_steps > config.total_steps:
        raise ConfigError(f"Trainer(max_steps={trainer.max_steps}): optim.total_tokens = {config.optim.total_tokens} "
                          f"ends after {config.total_steps} steps; raise the field, which the schedule follows, or "
                          "lower the argument")
    if overfit := getattr(trainer, "overfit_batches", 0):
        raise ConfigError(f"Trainer(overfit_batches={overfit}): rows follow from the configuration; "
                          "leave it out, and use data.sources[].max_epochs with a small source")
    limit, argument = trainer.limit_train_batches, "limit_train_batches"
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        argument = "fast_dev_run"
    if isinstance(limit, float):
        limit = int(config.total_steps * config.micro_batches * limit)
    if limit is not None and limit % config.micro_batches:
        raise ConfigError(f"Trainer({argument}={getattr(trainer, argument)}): an epoch would end inside an "
                          f"optimizer step of {config.micro_batches} micro-batches; take {argument}="
                          f"{config.micro_batches}, or a multiple of it")
