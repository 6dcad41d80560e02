"""Opens the run's directory when all ranks are there, and puts the run where its newest checkpoint ends.

The first callback. What one rank decides (which checkpoint, whether it belongs to this run) is told to all; what it
finds wrong, all raise.
"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning.checkpoint.folder import Identity, sweep
from dlcm_lightning.checkpoint.probe import Probe
from dlcm_lightning.compose import save_config
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.ops.collectives import ControlGroup, wait_alike
from dlcm_lightning.progress import Log
from dlcm_lightning.run_directory import CONFIG_FILE, TOKENIZER_FILE
from dlcm_lightning.training.callbacks.checkpoint import Checkpoints
from dlcm_lightning.training.checkpoint_manager import CheckpointManager
from dlcm_lightning.training.datamodule import PretrainData
from dlcm_lightning.training.loggers import JsonLinesLogger, RunTensorBoardLogger
from dlcm_lightning.training.lr_schedule import SCHEDULE
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.run_lock import check_same_data, check_same_run


class ResumeRun(Callback):
    """Restores, and prepares the directory for the steps to come."""

    def __init__(self, run: Path, identity: Identity, data: PretrainData, checkpoints: Checkpoints,
                 group: ControlGroup, log: Log) -> None:
        self.run, self.identity, self.data, self.group = run, identity, data, group
        self.checkpoints, self.print = checkpoints, log

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, PretrainModule)
        wait_alike()  # the engine has made its groups
        config = module.config
        checkpoint_manager = CheckpointManager(self.run, self.identity, Probe(Tokenizer.load(self.data.reader.store)),
                                               self.group)
        self.checkpoints.take(checkpoint_manager)
        checkpoint = checkpoint_manager.newest(self.print)
        step = 0
        if checkpoint is not None:
            newest = checkpoint

            def check() -> None:
                check_same_run(newest, config, self.identity.precision, self.identity.attention)
                check_same_data(newest, self.identity, config.data.root)

            self.group.on_rank_zero(check)
            checkpoint_manager.restore(checkpoint, trainer, module)
            step = checkpoint.step
            self.print(f"continuing {self.run} at step {step} of {config.total_steps}")
            before, now = checkpoint.config.optim, config.optim
            changed = [f"{name} = {getattr(now, name):,} (was {getattr(before, name):,})" for name in SCHEDULE
                       if getattr(before, name) != getattr(now, name)]
            if changed:
                self.print(f"schedule from here on: {', '.join(changed)}")
        self.group.on_rank_zero(lambda: self._prepare(trainer, module, step))

    def _prepare(self, trainer: Trainer, module: PretrainModule, step: int) -> None:
        config = module.config
        sweep(self.run, config.train.keep_last, config.train.keep_every_tokens)
        save_config(config, self.run / CONFIG_FILE)
        if not (self.run / TOKENIZER_FILE).is_file():
            Tokenizer.load(self.data.reader.store).save(self.run)
        for logger in trainer.loggers:
            if isinstance(logger, JsonLinesLogger):
                logger.begin(step, config.total_steps)
            elif isinstance(logger, RunTensorBoardLogger):
                logger.begin(step)
