"""What replaces private classes of Lightning, in one place: the loop over micro-batches and the handlers of signals.

Lightning's loggers count optimizer steps from 0, and a step's numbers stand at the one before it. Lines of a run count
them from 1, as its checkpoints do, and so do those that callbacks of others log into it: the loop's counter for loggers
is the number of the step under way. What a checkpoint's step is not under is written again when the run continues.

Before each micro-batch Lightning broadcasts whether rank 0 has seen a SIGTERM, and waits for the device to learn it;
its handler of SIGTERM broadcasts too, whatever the ranks are doing. Here ranks agree once an optimizer step, between
their hosts (callbacks/checkpoint.py), and a handler notes a number (cluster/signals.py).

At its end Lightning copies to the host what was logged, and so waits for whatever the device still has to do.

Seen in Lightning 2.6; tests/training/test_loop.py says what of it is relied on.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from dlcm_lightning.training.strategies.full_state import FullStateStrategy


def _stays_on_the_device(trainer: Trainer) -> bool:
    """Whether the end of a run must not wait for a device, on which a collective may wait for peers that have gone."""
    return isinstance(trainer.strategy, FullStateStrategy) and trainer.strategy.stays_on_the_device()


class StepLoop(_TrainingEpochLoop):
    """The one epoch of a run. Validates when it is told to, and not by itself."""

    def __init__(self, trainer: Trainer, total_steps: int) -> None:
        super().__init__(trainer, max_steps=total_steps)
        self._batches_that_stepped = 1

    def validate(self) -> None:
        """Lightning's validation, from inside a hook of a training step."""
        trainer = self.trainer
        first = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        self.val_loop.restarting = False
        self.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first

    def _should_check_val_fx(self, data_fetcher: object) -> bool:
        return False

    def _broadcast_sigterm_tensor(self) -> None:
        pass

    def teardown(self) -> None:
        if not _stays_on_the_device(self.trainer):
            super().teardown()
        elif self.val_loop._data_fetcher is not None:
            self.val_loop._data_fetcher.teardown()
            self.val_loop._data_fetcher = None


class CountingFromOne(_LoggerConnector):
    """Knows which number `StepLoop` counts; and logs a step once, before its checkpoint or at its end."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._logged_step = -1

    def update_train_step_metrics(self) -> None:
        step = self.trainer.global_step
        if self._logged_step != step or self.trainer.fit_loop._should_accumulate():
            super().update_train_step_metrics()
            self._logged_step = step

    @property
    def should_update_logs(self) -> bool:
        trainer = self.trainer
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer._active_loop is not trainer.fit_loop or not every:
            return super().should_update_logs
        due = trainer.fit_loop.epoch_loop._batches_that_stepped % every == 0 or trainer.should_stop
        return due and not trainer.fit_loop._should_accumulate()  # once a step, not once a micro-batch

    def teardown(self) -> None:
        if not _stays_on_the_device(self.trainer):
            super().teardown()


class NoSignals(_SignalConnector):
    """Handlers stay whose they are."""

    def register_signal_handlers(self) -> None:
        pass


def log_step(trainer: Trainer) -> None:
    """What was logged in the optimizer step that has just ended goes to the loggers now. A checkpoint may be the last
    thing that this process does, and Lightning would log the step after it."""
    trainer._logger_connector.update_train_step_metrics()


def install(trainer: Trainer, total_steps: int) -> None:
    """Puts them in the place of Lightning's."""
    trainer.fit_loop.epoch_loop = StepLoop(trainer, total_steps)
    trainer._logger_connector = CountingFromOne(trainer)
    trainer._signal_connector = NoSignals(trainer)
