"""What replaces private classes of Lightning, in one place: the loop over micro-batches and the handlers of signals.

Before each micro-batch Lightning broadcasts whether rank 0 has seen a SIGTERM, and waits for the device to learn it;
its handler of SIGTERM broadcasts too, whatever the ranks are doing. Here ranks agree once an optimizer step, between
their hosts (callbacks/checkpoint.py), and a handler notes a number (cluster/signals.py).

Seen in Lightning 2.6; tests/training/test_loop.py says what of it is relied on.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector


class StepLoop(_TrainingEpochLoop):
    """The one epoch of a run. Validates when it is told to, and not by itself."""

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


class NoSignals(_SignalConnector):
    """Handlers stay whose they are."""

    def register_signal_handlers(self) -> None:
        pass


def install(trainer: Trainer, total_steps: int) -> None:
    """Puts them in the place of Lightning's."""
    trainer.fit_loop.epoch_loop = StepLoop(trainer, max_steps=total_steps)
    trainer._signal_connector = NoSignals(trainer)
