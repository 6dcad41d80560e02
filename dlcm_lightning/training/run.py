"""One run from its configuration to its report: `pretrain` begins it, continues it, or says that it is finished.

A run is a directory, `<train.runs>/<name>`:

    config.yaml      the resolved configuration; a run of another one is refused
    checkpoints/     see checkpoints.py
    metrics.jsonl    one line per logged step and per validation
    tensorboard/     the same as curves, on an axis of consumed tokens; histograms; boundaries as text
    report.json      the table at the end

Everything random is a function of the seed (initialisation), of the sample's index (order, noise) or of nothing, so
that continuing from a checkpoint is the same computation as never having stopped, bit for bit on the same machine.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from dlcm_lightning.compose import differences, load_config, save_config
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.data.ngram import floors
from dlcm_lightning.data.prepare import prepare_sample_corpus
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.training import machine
from dlcm_lightning.training.callbacks.boundaries import ShowBoundaries
from dlcm_lightning.training.callbacks.checkpoint import WriteCheckpoints
from dlcm_lightning.training.callbacks.metrics import Metrics, MetricsWriter
from dlcm_lightning.training.callbacks.progress import Progress
from dlcm_lightning.training.callbacks.validate import Validate
from dlcm_lightning.training.checkpoints import Checkpoint, newest_checkpoint, sweep
from dlcm_lightning.training.datamodule import PretrainData
from dlcm_lightning.training.metrics import metrics_of
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.report import Report, speed, summary
from dlcm_lightning.training.validation import validate

CONFIG_FILE = "config.yaml"
TENSORBOARD = "tensorboard"


def _free_to_change(name: str) -> bool:
    """Whether a field may differ when a run is continued: where and how often, not what is computed."""
    return (name.startswith("train.") and name != "train.precision") or name == "data.workers"


def claim_directory(config: Config) -> Path:
    """Makes the run's directory, or checks that what it holds is this run.

    Raises ConfigError where it belongs to a run of another configuration, naming the fields that differ.
    """
    run = Path(config.train.runs) / config.name
    saved = run / CONFIG_FILE
    if saved.is_file():
        other = load_config(saved)
        fields = [name for name in differences(other, config) if not _free_to_change(name)]
        if fields:
            raise ConfigError(f"name = {config.name!r}: {run} holds a run that differs in {', '.join(fields)}; choose "
                              "another name=..., restore these fields, or move the directory away")
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)
    return run


def check_same_data(checkpoint: Checkpoint, reader: Reader) -> None:
    """Raises ConfigError where the rows are not those the checkpoint was trained on."""
    if checkpoint.data_fingerprint != reader.fingerprint:
        raise ConfigError(f"data.root = {reader.config.root!r}: its shards or their order are not those that "
                          f"{checkpoint.folder} was trained on, so sample i would be another text; restore them, or "
                          "choose another name=... to begin a new run")


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

    Raises ConfigError, DataError or CheckpointError; each message says what to do.
    """
    _quiet()
    where = machine.device()
    if where.type == "cpu":
        machine.keep_large_buffers()
    dtype = machine.compute_dtype(config.train.precision, where)
    backend = choose_backend(config.model.attention, where, dtype)
    # Would cost a write of every buffer; none is read unset. The attribute is dynamic, which types cannot see.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    run = claim_directory(config)
    sweep(run, config.train.keep_last)
    checkpoint = newest_checkpoint(run, report)
    finished = checkpoint is not None and checkpoint.step >= config.total_steps
    if finished and (done := Report.load(run)):
        report(f"{run} is finished: {done.steps} of {config.total_steps} steps. For another run choose name=...")
        report(summary(config, done))
        return done

    if config.data.corpus == "sample":
        prepare_sample_corpus(config.data, config.model.vocab_size, report)
    reader = Reader(config.data, config.seed, config.model.vocab_size, report=report)
    if checkpoint:
        check_same_data(checkpoint, reader)
        report(f"continuing {run} at step {checkpoint.step} of {config.total_steps}")
    report(f"attention {backend}, {str(dtype).removeprefix('torch.')}, {machine.describe(config.train, where)}")

    module = PretrainModule(config, dtype, backend)
    data = PretrainData(config, reader, pin_memory=where.type == "cuda")
    rate_before = machine.matrix_product_rate(dtype, where)
    purge = checkpoint.step * config.data.tokens_per_step + 1 if checkpoint else None
    logger = TensorBoardLogger(run, name="", version=TENSORBOARD, purge_step=purge)
    writer = MetricsWriter(run, logger)
    writer.cut_back(checkpoint.step if checkpoint else 0)
    metrics = Metrics(writer)
    trainer = _trainer(config, where, logger, [
        metrics, Progress(metrics), Validate(writer), ShowBoundaries(reader, logger), WriteCheckpoints(run),
    ])
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint.state if checkpoint else None, weights_only=True)

    module.to(where)
    tally = validate(module, data.validation_loader(), progress=True)
    ratio = config.model.boundary.target_ratio if config.model.kind == "dlcm" else None
    validation = metrics_of(tally, config.data.domains, ratio)
    tokens = config.total_steps * config.data.tokens_per_step
    writer.write("validation", config.total_steps, tokens, validation)
    logger.experiment.flush()
    rate = (rate_before + machine.matrix_product_rate(dtype, where)) / 2
    outcome = Report(
        steps=config.total_steps, tokens=tokens, hardware=machine.describe(config.train, where),
        precision=str(dtype).removeprefix("torch."), attention=backend,
        parameters=sum(parameter.numel() for parameter in module.model.parameters()), validation=validation,
        floors=floors(reader), speed=speed(config, metrics, rate),
    )
    outcome.save(run)
    report(summary(config, outcome))
    return outcome
