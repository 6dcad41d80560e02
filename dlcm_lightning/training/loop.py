"""Lightning's loop over micro-batches, without the question that it asks all ranks in every one of them, and without
its handlers of signals.

Before each micro-batch Lightning broadcasts whether rank 0 has seen a SIGTERM, and waits for the device to learn it;
its handler of SIGTERM broadcasts too, whatever the ranks are doing. Here ranks agree once an optimizer step, between
their hosts (callbacks/checkpoint.py), and a handler notes a number (cluster/signals.py).
"""

from __future__ import annotations

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector


class StepLoop(_TrainingEpochLoop):
    """The one epoch of a run."""

    def _broadcast_sigterm_tensor(self) -> None:
        pass


class NoSignals(_SignalConnector):
    """Handlers stay whose they are."""

    def register_signal_handlers(self) -> None:
        pass
