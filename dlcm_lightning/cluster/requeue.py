"""Whether a run goes on after an attempt: the one decision, from files and from what SLURM says, never from exit
codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dlcm_lightning.cluster.attempts import Attempt
from dlcm_lightning.errors import NO_PROGRESS, USER_ERROR
from dlcm_lightning.run_directory import STOP

Action = Literal["end", "leave", "again"]
"""end: the run is not started again. leave: SLURM decides. again: requeue, or a job that waits for this one."""


@dataclass(frozen=True)
class Decision:
    """What comes after an attempt."""

    action: Action
    why: str
    code: int = 0
    """Exit code of the batch script."""


def decide_requeue(attempt: Attempt, stop: bool, may_go_on: bool, fruitless: int, limit: int) -> Decision:
    """attempt: that ended just now. stop: somebody wants no more. may_go_on: as SLURM sees the job. fruitless: attempts
    in a row, this one included, that brought no newer checkpoint; limit: so many end the run."""
    if attempt.how == "finished":
        return Decision("end", "the run is finished")
    if attempt.how == "refused":
        return Decision("end", "a mistake that the next attempt would meet again", USER_ERROR)
    if stop:
        return Decision("end", f"{STOP} is there; remove it and submit again to go on")
    if not may_go_on:
        return Decision("leave", "SLURM has ended this job, and decides")
    if fruitless >= limit:
        return Decision("end", f"{fruitless} attempts in a row brought no newer checkpoint than step "
                               f"{attempt.from_step}; the last: {attempt.reason}. When that is mended, submit again",
                        NO_PROGRESS)
    return Decision("again", "goes on from the newest checkpoint")
