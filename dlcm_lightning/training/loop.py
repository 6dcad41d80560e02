"""Lightning's loop over micro-batches, without the question that it asks all ranks in every one of them.

Before each micro-batch Lightning broadcasts whether rank 0 has seen a SIGTERM, and waits for the device to learn it.
Here ranks agree once an optimizer step, between their hosts (callbacks/checkpoint.py).
"""

from __future__ import annotations

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class StepLoop(_TrainingEpochLoop):
    """The one epoch of a run."""

    def _broadcast_sigterm_tensor(self) -> None:
        pass
