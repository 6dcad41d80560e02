"""One run from its configuration to its report: `pretrain` begins it, continues it, or says that it is finished.

What stands in the run's directory is described in directory.py.

Everything random is a function of the seed (initialisation), of the sample's index (order, noise) or of nothing, so
that continuing from a checkpoint is the same computation as never having stopped, bit for bit on the same machine.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config
from dlcm_lightning.data.building.prepare import prepare_sample_corpus
from dlcm_lightning.data.errors import DataError
from dlcm_lightning.data.ngram import Floor, floors
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.training import machine
from dlcm_lightning.training.callbacks.boundaries import ShowBoundaries
from dlcm_lightning.training.callbacks.checkpoint import StraightToDisk, WriteCheckpoints
from dlcm_lightning.training.callbacks.metrics import Metrics, MetricsWriter
from dlcm_lightning.training.callbacks.progress import Progress
from dlcm_lightning.training.callbacks.unreadable import WatchUnreadable
from dlcm_lightning.training.callbacks.validate import Validate
from dlcm_lightning.training.checkpoints import Identity, newest_checkpoint, sweep
from dlcm_lightning.training.datamodule import PretrainData
from dlcm_lightning.training.directory import RunError, check_same_data, check_same_run, claimed, first_process
from dlcm_lightning.training.metrics import metrics_of
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.report import Report, speed, summary
from dlcm_lightning.training.stopwatch import Stopwatch
from dlcm_lightning.training.validation import validate

CONFIG_FILE = "config.yaml"
TENSORBOARD = "tensorboard"


def _quiet() -> None:
    """Silences Lightning's banner, and the one warning that it causes inside torch and that no user can mend."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    deprecated = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)


def _trainer(config: Config, where: torch.device, logger: TensorBoardLogger, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        accelerator="gpu" if where.type == "cuda" else "cpu",
        devices=config.train.devices,
        num_nodes=config.train.nodes,
        precision="32-true",  # leaves everything as it is: the model casts for itself
        logger=logger,
        callbacks=callbacks,
        plugins=[StraightToDisk()],
        max_steps=config.total_steps,
        max_epochs=-1,
        log_every_n_steps=1,
        accumulate_grad_batches=config.micro_batches,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        deterministic=True,
    )


def pretrain(config: Config, report: Callable[[str], None] = print) -> Report:
    """Trains to `optim.total_tokens`, from the newest checkpoint where there is one, and validates.

    Raises ConfigError, DataError, CheckpointError or RunError; each message says what to do.
    """
    _quiet()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product
    # Would cost a write of every buffer; none is read unset. The attribute is dynamic, which types cannot see.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    where = machine.device()
    if where.type == "cpu":
        machine.keep_large_buffers()
    dtype = machine.compute_dtype(config.train.precision, where)
    backend = choose_backend(config.model.attention, where, dtype)
    run = Path(config.train.runs) / config.name
    with claimed(run):
        return _claimed_run(config, run, where, dtype, backend, report)


def _claimed_run(
    config: Config, run: Path, where: torch.device, dtype: torch.dtype, backend: str, report: Callable[[str], None]
) -> Report:
    precision = str(dtype).removeprefix("torch.")
    checkpoint = newest_checkpoint(run, report)
    if checkpoint:
        check_same_run(checkpoint, config, precision)
        if checkpoint.step >= config.total_steps and (done := Report.load(run)):
            report(f"{run} is finished: {done.steps} of {config.total_steps} steps. For another run choose name=...")
            report(summary(config, done))
            return done
    if config.data.corpus == "sample":
        prepare_sample_corpus(config.data, config.model.vocab_size, report)
    reader = Reader(config.data, config.seed, config.model.vocab_size, report=report)
    reader.check_lasts(config.total_steps * config.data.rows_per_step)
    identity = Identity(reader.fingerprint, precision)
    if checkpoint:
        check_same_data(checkpoint, identity, config.data.root)
        report(f"continuing {run} at step {checkpoint.step} of {config.total_steps}")
    report(f"attention {backend}, {precision}, {machine.describe(config.train, where)}")
    if config.model.kind == "dlcm" and config.model.boundary.learned:
        report(f"rate loss with F of the {'previous' if config.uses_previous_rate else 'current'} step")

    module = PretrainModule(config, dtype, backend, torch.from_numpy(reader.token_bytes))
    stopwatch = Stopwatch()
    data = PretrainData(config, reader, where.type == "cuda", stopwatch)
    rate_before = machine.matrix_product_rate(dtype, where)
    step = checkpoint.step if checkpoint else 0
    logger = TensorBoardLogger(run, name="", version=TENSORBOARD, purge_step=step * config.data.tokens_per_step + 1)
    writer = MetricsWriter(run, logger)
    if first_process():
        sweep(run, config.train.keep_last)
        save_config(config, run / CONFIG_FILE)
        writer.cut_back(step, config.total_steps)
    metrics = Metrics(writer, stopwatch)
    trainer = _trainer(config, where, logger, [
        metrics, Progress(metrics), Validate(writer, stopwatch), ShowBoundaries(reader, logger, stopwatch),
        WatchUnreadable(run, report), WriteCheckpoints(run, identity, stopwatch),
    ])
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint.state if checkpoint else None, weights_only=True)
    except SystemExit as leaving:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from leaving
    except OSError as error:
        raise RunError(f"{run} could not be written: {error}. Free space or correct the permissions, then start the "
                       "run again: it continues from the newest checkpoint.") from error
    return _conclude(config, run, module, data, metrics, writer, rate_before, report)


def _floors(reader: Reader, report: Callable[[str], None]) -> list[Floor]:
    """None where shards that the floors count are damaged: the model is trained all the same."""
    try:
        return floors(reader)
    except DataError as error:
        report(f"unigram and trigram are left out: {error}")
        return []


def _conclude(
    config: Config, run: Path, module: PretrainModule, data: PretrainData, metrics: Metrics, writer: MetricsWriter,
    rate_before: float, report: Callable[[str], None],
) -> Report:
    """Validates, writes the report and says it."""
    where, dtype = machine.device(), module.model.compute_dtype
    module.to(where)
    tally = validate(module, data.validation_loader(), progress=first_process())
    ratio = config.model.boundary.target_ratio if config.model.kind == "dlcm" else None
    validation = metrics_of(tally, config.data.domains, ratio)
    rate = (rate_before + machine.matrix_product_rate(dtype, where)) / 2
    tokens = config.total_steps * config.data.tokens_per_step
    outcome = Report(
        steps=config.total_steps, tokens=tokens, hardware=machine.describe(config.train, where),
        precision=str(dtype).removeprefix("torch."), attention=module.model.backend,
        parameters=sum(parameter.numel() for parameter in module.model.parameters()), validation=validation,
        floors=_floors(data.reader, report), speed=speed(config, metrics, rate),
    )
    if first_process():
        writer.write("validation", config.total_steps, tokens, validation)
        writer.logger.experiment.flush()
        outcome.save(run)
        report(summary(config, outcome))
    return outcome
