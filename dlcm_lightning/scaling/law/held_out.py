"""How wrong a law is on rungs that it did not see.

R^2 over trajectories flatters: most of the variance of a trajectory is its early fall. What counts for a plan is the
loss at the end of a run of another configuration. So each rung is left out in turn, with all its runs, and the law of
the others predicts its last stable loss; and the largest size is predicted from the smaller ones, which is what a
ladder is for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from dlcm_lightning.progress import progress_bar
from dlcm_lightning.scaling.law.fit import Options, Solution, objective, search
from dlcm_lightning.scaling.law.table import rungs_of, sizes_of
from dlcm_lightning.scaling.law.terms import Points

STARTS_LEFT_OUT = 1
"""New starts without a rung, beside the optimum of the whole ladder."""
LEAST_SIZES = 3
"""From which the largest is predicted."""


@dataclass(frozen=True)
class LeftOut:
    """The last stable losses of one run, nats a token."""

    run: str
    measured: float
    predicted: float

    @property
    def relative(self) -> float:
        return self.predicted / self.measured - 1


def predict_without(points: Points, options: Options, best: Solution, left_out: Collection[int], noise: float
                    ) -> list[LeftOut]:
    """left_out: indices of runs. The law of all others, from `best` and from a new start, whichever ends lower."""
    counts = np.ones(len(points.runs))
    counts[list(left_out)] = 0
    found, _, _ = search(points, replace(options, starts=min(options.starts, STARTS_LEFT_OUT)), counts)
    found = min(found, objective(points, counts, noise).solve(best.coordinates), key=lambda one: one.cost)
    law = points.law(found.coordinates)
    predictions = []
    for index in left_out:
        run = points.runs[index]
        predictions.append(LeftOut(run.name, float(run.loss[-1]),
                                   law.loss(run.N, float(run.tokens[-1]), run.R, run.P)))
    return predictions


def each_rung(points: Points, options: Options, best: Solution, noise: float) -> list[LeftOut]:
    """Every rung, left out in turn. Empty where two rungs or fewer would be left."""
    rungs = list(rungs_of(points.runs).values())
    if len(rungs) <= 3:
        return []
    found = []
    for rung in progress_bar(rungs, desc="leaving out rungs", unit="rung"):
        names = {run.name for run in rung}
        found += predict_without(points, options, best,
                                 [index for index, run in enumerate(points.runs) if run.name in names], noise)
    return found


def largest_size(points: Points, options: Options, best: Solution, noise: float) -> list[LeftOut]:
    """All runs of the largest size, predicted from the smaller ones. Empty with fewer than three sizes."""
    sizes = sizes_of(points.runs)
    if len(sizes) < LEAST_SIZES:
        return []
    names = {run.name for run in sizes[-1]}
    return predict_without(points, options, best,
                           [index for index, run in enumerate(points.runs) if run.name in names], noise)


def root_mean_square(errors: Collection[LeftOut]) -> float:
    """Of the relative errors."""
    return float(np.sqrt(np.mean([one.relative**2 for one in errors])))
