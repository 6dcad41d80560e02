"""One run from its configuration to its report: `pretrain` begins it, continues it, or says that it is finished.

What stands in the run's directory is described in layout.py.

Everything random is a function of the seed (initialisation), of the sample's index (order, noise) or of nothing, so
that continuing from a checkpoint is the same computation as never having stopped, bit for bit on the same machine. How
many processes share it, and under which strategy, enters nowhere but here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import Strategy

from dlcm_lightning.checkpoint.folder import CONFIG, Checkpoint, CheckpointError, Identity, Manifest
from dlcm_lightning.cluster.heartbeat import HEARTBEATS, Pulse
from dlcm_lightning.cluster.lives import NOTICE, this_life
from dlcm_lightning.cluster.placement import placed
from dlcm_lightning.cluster.processes import first_process
from dlcm_lightning.cluster.signals import Wish
from dlcm_lightning.config import Config
from dlcm_lightning.data.building.prepare import prepare_sample_corpus
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.layout import STOP, folders
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.training import machine
from dlcm_lightning.training.callbacks.boundaries import ShowBoundaries
from dlcm_lightning.training.callbacks.checkpoint import Checkpoints
from dlcm_lightning.training.callbacks.conclusion import Conclude
from dlcm_lightning.training.callbacks.heartbeat import Heartbeat
from dlcm_lightning.training.callbacks.metrics import Metrics, MetricsWriter
from dlcm_lightning.training.callbacks.opening import OpenRun
from dlcm_lightning.training.callbacks.progress import Progress
from dlcm_lightning.training.callbacks.unreadable import WatchUnreadable
from dlcm_lightning.training.callbacks.validate import Validate
from dlcm_lightning.training.datamodule import PretrainData
from dlcm_lightning.training.directory import RunError, check_same_run, claimed
from dlcm_lightning.training.loop import NoSignals, StepLoop
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.report import Report, summary
from dlcm_lightning.training.stopwatch import Stopwatch
from dlcm_lightning.training.strategies.choice import choose_engine, choose_environment
from dlcm_lightning.training.strategies.engine import Engine

Say = Callable[[str], None]


def quiet_libraries() -> None:
    """Silences Lightning's banner, and the one warning that it causes inside torch and that no user can mend."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    deprecated = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)


def build_trainer(config: Config, where: torch.device, engine: Engine, callbacks: list[Callback]) -> Trainer:
    """Lightning's loop over the whole run as one epoch. What it would do for a checkpoint, a logger, a progress bar or
    a signal is done by callbacks here."""
    trainer = Trainer(
        accelerator="gpu" if where.type == "cuda" else "cpu",
        strategy=cast(Strategy, engine),
        devices=config.train.devices,
        num_nodes=config.train.nodes,
        plugins=choose_environment(),
        logger=False,
        callbacks=callbacks,
        max_steps=config.total_steps,
        max_epochs=-1,
        accumulate_grad_batches=config.micro_batches,
        gradient_clip_val=config.optim.clip_norm or float("inf"),
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        deterministic=True,
    )
    trainer.fit_loop.epoch_loop = StepLoop(trainer, max_steps=config.total_steps)
    trainer._signal_connector = NoSignals(trainer)
    return trainer


def pretrain(config: Config, report: Say = print) -> Report:
    """Trains to `optim.total_tokens`, from the newest checkpoint where there is one, and validates.

    Every process of the run calls it. Raises ConfigError, DataError, CheckpointError, RunError or Stopped; each message
    says what to do.
    """
    config = placed(config)
    quiet_libraries()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product
    # Would cost a write of every buffer; none is read unset. The attribute is dynamic, which types cannot see.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    where = machine.device()
    if where.type == "cpu":
        machine.keep_large_buffers()
    dtype = machine.compute_dtype(config.train.precision, where)
    backend = choose_backend(config.model.attention, where, dtype)
    run = Path(config.train.runs) / config.name
    say = report if first_process() else _nothing
    life = this_life()
    with claimed(run), Wish(*([life / NOTICE] if life else []), run / STOP) as wish, _pulse(config, life) as pulse:
        if (done := _finished(config, run, str(dtype).removeprefix("torch."))) is not None:
            say(f"{run} is finished: {done.steps} of {config.total_steps} steps. For another run choose name=...")
            say(summary(config, done))
            return done
        try:
            return _train(config, run, where, dtype, backend, wish, pulse, say)
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()


@contextlib.contextmanager
def _pulse(config: Config, life: Path | None) -> Iterator[Pulse]:
    """Heard by the job, where there is one."""
    pulse = Pulse(life / HEARTBEATS if life else None, int(os.environ.get("SLURM_PROCID", "0")),
                  config.job.heartbeat_seconds)
    yield pulse
    pulse.end()


def _nothing(message: str) -> None:
    del message


def _finished(config: Config, run: Path, precision: str) -> Report | None:
    """The report of a run that has reached its end. ConfigError: the directory holds another run. What is read here is
    small; whether a checkpoint is whole is asked when all ranks are there."""
    for folder in reversed(folders(run)):
        try:
            newest = Checkpoint(folder, Manifest.load(folder))
        except CheckpointError:
            continue
        if newest.manifest.damage(folder / CONFIG):
            continue
        check_same_run(newest, config, precision)
        return Report.load(run) if newest.step >= config.total_steps else None
    return None


def _train(config: Config, run: Path, where: torch.device, dtype: torch.dtype, backend: str, wish: Wish, pulse: Pulse,
           say: Say) -> Report:
    if config.data.corpus == "sample":
        prepare_sample_corpus(config.data, config.model.vocab_size, say)
    reader = Reader(config.data, config.seed, config.model.vocab_size, report=say)
    reader.check_lasts(config.total_steps * config.data.rows_per_step)
    precision = str(dtype).removeprefix("torch.")
    say(f"attention {backend}, {precision}, {config.train.strategy}, {machine.describe(config.train, where)}")
    if config.model.kind == "dlcm" and config.model.boundary.learned:
        say(f"rate loss with F of the {'previous' if config.uses_previous_rate else 'current'} step")

    engine = choose_engine(config.train, where)
    module = PretrainModule(config, dtype, backend, torch.from_numpy(reader.token_bytes), engine.construct)
    stopwatch = Stopwatch(pulse)
    data = PretrainData(config, reader, where.type == "cuda", stopwatch)
    writer = MetricsWriter(run)
    metrics = Metrics(writer, stopwatch)
    checkpoints = Checkpoints(writer, stopwatch, wish)
    conclude = Conclude(run, data, metrics, partial(machine.matrix_product_rate, dtype, where), say)
    opening = OpenRun(run, Identity(reader.fingerprint, precision), reader, data, writer, checkpoints, say)
    trainer = build_trainer(config, where, engine, [
        Heartbeat(pulse), opening, metrics, Progress(metrics), Validate(writer, stopwatch),
        ShowBoundaries(reader, writer, stopwatch), WatchUnreadable(run, say), checkpoints, conclude,
    ])
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit as leaving:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from leaving
    except OSError as error:
        raise RunError(f"{run} could not be written: {error}. Free space or correct the permissions, then start the "
                       "run again: it continues from the newest checkpoint.") from error
    assert conclude.outcome is not None
    return conclude.outcome
