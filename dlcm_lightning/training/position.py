"""Where a fit stands: Lightning's counters between two optimizer steps, and whether there is anything to save."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from dlcm_lightning.errors import CheckpointError


def check_has_begun(trainer: Trainer, made: bool) -> None:
    """CheckpointError: a fit that fails before it begins has nothing to save; callbacks that save on errors would write
    it, perhaps over the very checkpoint that it was to continue. made: whether there is a model."""
    unread = trainer.ckpt_path is not None and not trainer.global_step and trainer.state.fn == TrainerFn.FITTING
    if unread or not made:
        raise CheckpointError("the fit has failed before it began, so no checkpoint of it is written")


def at_optimizer_step(fit_loop: dict[str, Any], step: int, micro_batches: int, short_epochs: bool = False) -> None:
    """Sets the state of a fit loop to the end of the last micro-batch of optimizer step `step`, whose hooks are run.

    What lies after it, micro-batches of a step under way, is trained again when the state is loaded: their gradients
    are in no checkpoint. short_epochs: an epoch is less than the run (`limit_train_batches`), so that it matters how
    many have been.
    """
    done = inside = step * micro_batches
    epoch, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    if short_epochs:
        under_way = batches["total"]["ready"] - done
        inside = batches["current"]["ready"] - under_way
        batches["is_last_batch"] = batches["is_last_batch"] and not under_way
    else:
        for when in ("total", "current"):
            epoch[when] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    taken = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for when, count in (("total", done), ("current", inside)):
        batches[when] = {"ready": count, "started": count, "processed": count, "completed": max(0, count - 1)}
        steps = count // micro_batches
        taken["step"][when] = {"ready": steps, "completed": steps}
        taken["zero_grad"][when] = {"ready": steps, "started": steps, "completed": steps}
        fit_loop["epoch_loop.scheduler_progress"][when] = {"ready": steps, "completed": steps}
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = max(0, step - 1)  # the loop adds the last one
