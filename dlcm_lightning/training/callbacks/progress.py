"""The progress bar: loss, R, tokens/s and the time left."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from dlcm_lightning.training.callbacks.metrics import Metrics
from dlcm_lightning.training.module import PretrainModule

SECONDS_BETWEEN_LINES = 15.0
"""Where the output is a file and not a terminal, a bar is a line, and one every quarter of a minute will do."""


class Progress(Callback):
    """One bar over the optimizer steps of the whole run; a resumed run's bar begins where the run stands."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, PretrainModule)
        if trainer.is_global_zero:
            interval = 0.5 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
            self.bar = tqdm(total=module.config.total_steps, initial=trainer.global_step, desc="pretrain", unit="step",
                            mininterval=interval, maxinterval=max(10.0, interval), smoothing=0.05, dynamic_ncols=True)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        latest = self.metrics.latest
        if latest:
            shown = {"loss": f"{latest['loss']:.3f}", "bpb": f"{latest['bits_per_byte']:.3f}"}
            if "R_sampled" in latest:
                shown["R"] = f"{latest['R_sampled']:.2f}"
            shown["tok/s"] = f"{latest['tokens_per_second']:,.0f}"
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
