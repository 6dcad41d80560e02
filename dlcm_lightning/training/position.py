"""Lightning's counters, as they stand between two optimizer steps."""

from __future__ import annotations

from typing import Any


def at_optimizer_step(fit_loop: dict[str, Any], step: int, micro_batches: int) -> None:
    """Sets the state of a fit loop to the end of the last micro-batch of optimizer step `step`, whose hooks are run.

    What lies after it, micro-batches of a step under way, is trained again when the state is loaded: their gradients
    are in no checkpoint.
    """
    done = step * micro_batches
    for when in ("total", "current"):
        fit_loop["epoch_progress"][when] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        fit_loop["epoch_loop.batch_progress"][when] = {
            "ready": done, "started": done, "processed": done, "completed": max(0, done - 1)}
        taken = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        taken["step"][when] = {"ready": step, "completed": step}
        taken["zero_grad"][when] = {"ready": step, "started": step, "completed": step}
        fit_loop["epoch_loop.scheduler_progress"][when] = {"ready": step, "completed": step}
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = max(0, step - 1)  # the loop adds the last one
