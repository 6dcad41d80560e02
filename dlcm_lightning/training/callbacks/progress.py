"""The progress bar: loss, R, tokens/s, MFU where it is known, and the time left."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from dlcm_lightning.progress import progress_bar
from dlcm_lightning.training.callbacks.metrics import Metrics
from dlcm_lightning.training.module import PretrainModule


class Progress(Callback):
    """One bar over the optimizer steps of the whole run; a resumed run's bar begins where the run stands."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.bar: tqdm[Any] | None = None
        self.validation: tqdm[Any] | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, PretrainModule)
        if trainer.is_global_zero:
            self.bar = progress_bar(total=module.config.total_steps, initial=trainer.global_step, desc="pretrain",
                                    unit="step", smoothing=0.05, delay=0, leave=True)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        latest = self.metrics.latest
        if latest:
            shown = {"loss": f"{latest['loss']:.3f}", "bpb": f"{latest['bits_per_byte']:.3f}"}
            if "R_sampled" in latest:
                shown["R"] = f"{latest['R_sampled']:.2f}"
            shown["tok/s"] = f"{latest['tokens_per_second']:,.0f}"
            if "mfu" in latest:
                shown["mfu"] = f"{100 * latest['mfu']:.1f} %"
                shown["share"] = f"{100 * latest['share_of_product_rate']:.1f} %"
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.validation = progress_bar(total=int(sum(trainer.num_val_batches)), desc="validate", unit="batch")

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.validation is not None:
            self.validation.update()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.validation is not None:
            self.validation.close()
            self.validation = None

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
