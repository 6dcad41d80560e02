"""What the replaced classes rely on in Lightning's private parts: each would go wrong in silence."""

from __future__ import annotations

import inspect
import signal
from dataclasses import replace
from typing import Any

import lightning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from dlcm_lightning.config import Config
from dlcm_lightning.training import loop
from dlcm_lightning.training.run import pretrain

SEEN_IN = "2.6"
"""The version of Lightning whose code these classes were written against."""


def test_lightning_still_has_what_is_replaced_and_calls_it() -> None:
    assert lightning.__version__.startswith(SEEN_IN), f"read loop.py beside this version's code, then raise {SEEN_IN}"
    for replacing, replaced in ((loop.StepLoop, _TrainingEpochLoop), (loop.NoSignals, _SignalConnector),
                                (loop.CountingFromOne, _LoggerConnector)):
        for name in vars(replacing):
            if not name.startswith("__") and name != "validate":
                assert name in vars(replaced), f"{replaced.__name__}.{name} is gone"
    source = inspect.getsource(_TrainingEpochLoop)
    assert "self._broadcast_sigterm_tensor()" in source
    assert "self._should_check_val_fx(data_fetcher)" in source
    assert "self._batches_that_stepped += 1" in source
    assert "_batches_that_stepped + 1" in inspect.getsource(_LoggerConnector.should_update_logs.fget)
    assert "self._signal_connector.register_signal_handlers()" in inspect.getsource(Trainer._run)


class Look(Callback):
    """What a callback sees of a run."""

    def __init__(self) -> None:
        self.validated: list[tuple[int, bool]] = []
        self.handler: Any = None
        self.loop: Any = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.handler, self.loop = signal.getsignal(signal.SIGTERM), trainer.fit_loop.epoch_loop
        assert trainer.training and not trainer.validating  # also after a validation

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert "val/bits_per_byte/en" in trainer.callback_metrics and not module.training
        self.validated.append((trainer.global_step, trainer.validating))


def test_a_run_validates_by_lightnings_loop_when_told_to_and_keeps_its_signal_handlers(run_config: Config) -> None:
    look = Look()
    config = replace(run_config, train=replace(run_config.train, validate_every_steps=4))
    pretrain(config, lambda _: None, callbacks=[look])
    assert look.validated == [(4, True), (8, True)]
    assert isinstance(look.loop, loop.StepLoop)
    assert look.handler.__func__.__module__ == "dlcm_lightning.cluster.signals"
