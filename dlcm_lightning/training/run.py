"""One run from its configuration to its report: `pretrain` begins it, continues it, or says that it is finished.

What stands in the run's directory is described in run_directory.py.

Everything random is a function of the seed (initialisation), of the sample's index (order, noise) or of nothing, so
that continuing from a checkpoint is the same computation as never having stopped, bit for bit on the same machine. How
many processes share it, and under which strategy, enters nowhere but here.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from dlcm_lightning.checkpoint.folder import CONFIG, Checkpoint, Identity, Manifest
from dlcm_lightning.cluster.attempts import NOTICE, this_attempt
from dlcm_lightning.cluster.heartbeat import HEARTBEATS, HeartbeatWriter
from dlcm_lightning.cluster.launch import OtherRanks
from dlcm_lightning.cluster.signals import StopRequest
from dlcm_lightning.cluster.world import World, configure_world
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.errors import DamagedCheckpoint, RunError
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.ops.collectives import ControlGroup
from dlcm_lightning.progress import Log
from dlcm_lightning.run_directory import STOP, folders
from dlcm_lightning.training.callbacks.boundaries import ShowBoundaries
from dlcm_lightning.training.callbacks.checkpoint import Checkpoints
from dlcm_lightning.training.callbacks.final_report import FinalReport
from dlcm_lightning.training.callbacks.heartbeat import Heartbeat
from dlcm_lightning.training.callbacks.metrics import Metrics
from dlcm_lightning.training.callbacks.progress import Progress
from dlcm_lightning.training.callbacks.resume import ResumeRun
from dlcm_lightning.training.callbacks.unreadable import WatchUnreadable
from dlcm_lightning.training.callbacks.validate import Validate
from dlcm_lightning.training.contract import check_callbacks, trainer_arguments
from dlcm_lightning.training.datamodule import PretrainData
from dlcm_lightning.training.device import (
    choose_device,
    compute_exactly,
    describe_hardware,
    device_identity,
    keep_large_buffers,
    matrix_product_rate,
    peak_flops,
    resolve_precision,
)
from dlcm_lightning.training.loggers import JsonLinesLogger, RunTensorBoardLogger
from dlcm_lightning.training.loop import install
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.rendezvous import leave_group, meet
from dlcm_lightning.training.report import Report, summary
from dlcm_lightning.training.run_lock import RunLock, check_same_run
from dlcm_lightning.training.stopwatch import Stopwatch
from dlcm_lightning.training.strategies.choice import RunEnvironment, choose_strategy, needs_group
from dlcm_lightning.training.strategies.full_state import FullStateStrategy
from dlcm_lightning.training.user_classes import build_all

LOGGER: type[Any] = Logger  # an abstract class, which may be asked for none the less


def quiet_libraries() -> None:
    """Silences Lightning's banner, and warnings that it and torch's compiler cause and that no user can mend."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    deprecated = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")  # torch.compile's
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")


def build_trainer(config: Config, where: torch.device, engine: FullStateStrategy, world: World,
                  callbacks: list[Callback],
                  loggers: list[Logger] | None = None) -> Trainer:
    """Lightning's loop over the whole run as one epoch. What it would do for a checkpoint, a progress bar or a signal
    is done by callbacks here. Each process has one device, whatever others its node has."""
    trainer = Trainer(
        accelerator="gpu" if where.type == "cuda" else "cpu",
        strategy=cast(Strategy, engine),
        devices=[where.index] if where.type == "cuda" else 1,
        num_nodes=config.train.nodes,
        plugins=RunEnvironment(world),
        logger=loggers or False,
        callbacks=callbacks,
        **trainer_arguments(config),
        max_epochs=-1,
        gradient_clip_val=config.optim.max_grad_norm or float("inf"),
        num_sanity_val_steps=0,
        inference_mode=False,  # whose tensors FSDP2 could not use in the next backward
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        deterministic=True,  # Lightning's own default would turn it off
    )
    install(trainer, config.total_steps)
    return trainer


@dataclass(frozen=True)
class Extra:
    """What is added to a run's own."""

    callbacks: Sequence[Callback] = ()
    loggers: Sequence[Logger] = ()


def pretrain(config: Config, log: Log = print, *, callbacks: Sequence[Callback] = (),
             loggers: Sequence[Logger] = ()) -> Report:
    """Trains to `optim.total_tokens`, from the newest checkpoint where there is one, and validates.

    Every process of the run calls it; a process that no launcher has started as one of several starts the others of its
    node itself (`train.devices`). callbacks, loggers: beside those of `train.callbacks` and `train.loggers`; the
    processes that this one starts do not have them.

    Raises a UserError, whose message says what to do: ConfigError, DataError, CheckpointError, RunError, or Stopped
    when it was asked to leave and has saved itself.
    """
    check_callbacks("callbacks", callbacks)
    config, world = configure_world(config)
    quiet_libraries()
    compute_exactly()
    run = Path(config.train.output_dir) / config.name
    log = log if world.rank == 0 else _nothing
    attempt = this_attempt()
    files = [*([attempt / NOTICE] if attempt else []), run / STOP]
    with (OtherRanks(world), StopRequest(*files, speaks=world.rank == 0) as stop, RunLock(run) as lock,
          _heartbeat(config, attempt, world.rank) as heartbeat):
        world, group = meet(world, config, needs_group(config.train))
        try:
            train = replace(config.train, devices=world.local_size or 1, nodes=world.nodes)
            named = build_all("train.callbacks", config.train.callbacks, Callback)
            check_callbacks("train.callbacks", named)
            extra = Extra([*named, *callbacks],
                          [*build_all("train.loggers", config.train.loggers, LOGGER), *loggers])
            return _run(replace(config, train=train), run, world, group, lock, stop, heartbeat, log, extra)
        finally:
            leave_group()


def _run(config: Config, run: Path, world: World, group: ControlGroup, lock: RunLock, stop: StopRequest,
         heartbeat: HeartbeatWriter,
         log: Log, extra: Extra) -> Report:
    """The run, when all its processes have met."""
    group.on_rank_zero(lock.acquire)
    where = group.on_all(lambda: choose_device(world))
    _check_devices(group, where)
    if where.type == "cpu":
        keep_large_buffers()
    newest, done = group.on_rank_zero(lambda: _begun(run))
    begun = newest.manifest.identity.precision if newest else None
    dtype, why = group.on_rank_zero(lambda: resolve_precision(config.train.precision, where, begun))
    precision = str(dtype).removeprefix("torch.")
    backend = choose_backend(config.model.attention, where, dtype, compiled=config.train.compile,
                             begun=newest.manifest.identity.attention if newest else "")
    if newest is not None:
        check_same_run(newest, config, precision, backend)
    if (newest is not None and done is not None and newest.step == done.steps
            and newest.config.total_steps == config.total_steps):  # else it was made longer since
        log(f"{run} is finished: {done.steps} of {config.total_steps} steps. For another run choose name=...")
        log(summary(config, done))
        return done
    log(f"{describe_hardware(config.train, where)}; {precision}: {why}")
    try:
        return _train(config, run, world, group, where, dtype, backend, newest is None, stop, heartbeat, log, extra)
    except OSError as error:
        raise RunError(f"{run} could not be written: {error}. Free space or correct the permissions, then start the "
                       "run again: it continues from the newest checkpoint.") from error


def _check_devices(group: ControlGroup, where: torch.device) -> None:
    """RunError: two processes would compute on one GPU, or some on a GPU and some not."""
    found = group.gather((socket.gethostname(), where.type, device_identity(where)))
    if len({kind for _, kind, _ in found}) > 1:
        raise RunError("; ".join(f"rank {rank} on {host}: {kind}" for rank, (host, kind, _) in enumerate(found[:8]))
                       + ": some processes have a GPU and some have none; start as many per node as it has GPUs")
    seen: dict[tuple[str, str], int] = {}
    for rank, (host, _, identity) in enumerate(found):
        if identity and (host, identity) in seen:
            raise RunError(f"ranks {seen[host, identity]} and {rank} on {host} have the same GPU; start one process "
                           "per GPU, each with its own LOCAL_RANK")
        seen[host, identity] = rank


@contextlib.contextmanager
def _heartbeat(config: Config, attempt: Path | None, rank: int) -> Iterator[HeartbeatWriter]:
    """Read by the job, where there is one."""
    heartbeat = HeartbeatWriter(attempt / HEARTBEATS if attempt else None, rank, config.job.heartbeat_seconds)
    yield heartbeat
    heartbeat.end()


def _nothing(message: str) -> None:
    del message


def _begun(run: Path) -> tuple[Checkpoint | None, Report | None]:
    """The newest checkpoint that seems whole, and the report of a run that has reached its end. What is read here is
    small; whether all of a checkpoint is whole is asked when the run opens its directory."""
    for folder in reversed(folders(run)):
        try:
            newest = Checkpoint(folder, Manifest.load(folder))
        except DamagedCheckpoint:
            continue
        if not newest.manifest.damage(folder / CONFIG):
            return newest, Report.load(run)
    return None, None


def checkpoints_of(callbacks: Sequence[Callback]) -> Checkpoints:
    """Who saves: the user's, where there is one. ConfigError: there are several."""
    found = [one for one in callbacks if isinstance(one, Checkpoints)]
    if len(found) > 1:
        raise ConfigError(f"callbacks: {' and '.join(type(one).__name__ for one in found)} both save checkpoints; name "
                          "one")
    return found[0] if found else Checkpoints()


def _train(config: Config, run: Path, world: World, group: ControlGroup, where: torch.device, dtype: torch.dtype,
           backend: str, begins: bool, stop: StopRequest, heartbeat: HeartbeatWriter, log: Log, extra: Extra) -> Report:
    precision = str(dtype).removeprefix("torch.")
    stopwatch = Stopwatch(heartbeat)
    data = PretrainData(config, stopwatch, log)
    group.on_all(data.open)
    log(f"attention {backend}, {config.train.strategy}")
    if config.model.kind == "dlcm" and config.model.boundary.learned:
        log(f"rate loss with F of the {'previous' if config.uses_previous_rate else 'current'} step")

    module = PretrainModule(config, dtype, backend)
    module.steps_go_to_loggers, module.begins = False, begins
    if begins and config.train.init_from:
        log(f"begins with the weights of {config.train.init_from}")
    checkpoints = checkpoints_of(extra.callbacks)
    checkpoints.attach(stopwatch, stop)
    others = [one for one in extra.callbacks if one is not checkpoints]
    module.monitored = bool(others)
    metrics = Metrics(stopwatch)
    final_report = FinalReport(run, data, metrics, partial(matrix_product_rate, dtype, where),
                           config.train.ranks if where.type == "cuda" else 1, peak_flops(dtype, where), log)
    resume = ResumeRun(run, Identity(data.reader.fingerprint, precision, backend), data, checkpoints, group, log)
    trainer = build_trainer(config, where, choose_strategy(config.train, where), world, [
        Heartbeat(heartbeat), resume, metrics, Progress(metrics), Validate(stopwatch),
        ShowBoundaries(data.reader, stopwatch), WatchUnreadable(run, log), *others, checkpoints, final_report,
    ], [JsonLinesLogger(run, config.data.tokens_per_step), RunTensorBoardLogger(run, config), *extra.loggers])
    trainer.fit(module, datamodule=data)
    assert final_report.outcome is not None
    return final_report.outcome
