"""What a grid cannot tell apart.

A least-squares fit always returns numbers. Whether the data chose them is asked in three ways:

- constants whose 95 % interval is wider than a factor of two;
- constants at the end of their bounds, which the data did not hold;
- the *condition indices* of the Jacobian, columns scaled to length 1, and for each weak direction (index above 30) the
  constants of which it carries more than half the variance (Belsley, Kuh and Welsch 1980). Where one of them is wide or
  at a bound, they are known only together: E0 with the exponent of the token stacks, say, where a slower decline to a
  lower floor looks like a faster one to a higher.

With no more rungs than constants a fit runs through its data and leaves no noise to judge it by. Every constant is
called unclear then.

Predictions inside the grid may be good all the same: what is not known there cancels. Outside it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dlcm_lightning.scaling.law.fit import objective, residual_noise, shared_offsets
from dlcm_lightning.scaling.law.formula import interval
from dlcm_lightning.scaling.law.terms import Points

WEAK_INDEX = 30.0
MOST_OF_VARIANCE = 0.5
WIDE = 2.0
"""Factor between the ends of an interval; for gamma, which may be 0, their difference is compared with log(WIDE)."""
AT_BOUND = 0.02


@dataclass(frozen=True)
class Identifiability:
    """Names as in `Points.names`: c_tok, c_con and c_dat are contributions in the middle of the grid."""

    condition_number: float
    together: tuple[tuple[str, ...], ...]
    """Groups that are known only together, the weakest first, each with one that is unclear by itself."""
    wide: dict[str, float]
    """Name: factor between the ends of its 95 % interval; for gamma exp of their difference."""
    at_bounds: tuple[str, ...]
    too_few_rungs: tuple[str, ...]
    """All constants where there are no more rungs than constants, else none."""

    @property
    def unclear(self) -> tuple[str, ...]:
        """All that a value should not be quoted of."""
        return tuple(sorted({*self.wide, *self.at_bounds, *self.too_few_rungs}))


def identifiability(points: Points, coordinates: np.ndarray, samples: Sequence[np.ndarray]) -> Identifiability:
    """samples: coordinates of the bootstrap; without any, intervals follow from the Jacobian and the noise."""
    points = shared_offsets(points)
    names = points.names
    best = coordinates[:len(names)]
    goal = objective(points)
    slopes = goal.jacobian(best) * np.sqrt(goal.weight)[:, None]
    lengths = np.maximum(np.linalg.norm(slopes, axis=0), 1e-300)
    _, strengths, directions = np.linalg.svd(slopes / lengths, full_matrices=False)
    strengths = np.maximum(strengths, 1e-12 * strengths[0])
    variance = (directions / strengths[:, None])**2
    shares = variance / variance.sum(axis=0)
    together = tuple(
        tuple(name for name, share in zip(names, shares[place], strict=True) if share > MOST_OF_VARIANCE)
        for place in reversed(range(len(strengths))) if strengths[0] / strengths[place] > WEAK_INDEX)
    if samples:
        ends = [interval([float(one[place]) for one in samples]) for place in range(len(names))]
        widths = np.array([high - low for low, high in ends])
    else:
        noise = residual_noise(points, best, goal.chosen) / np.sqrt(len(points.runs))
        widths = 2 * 1.96 * noise * np.sqrt(variance.sum(axis=0)) / lengths
    low, high = (bound[:len(names)] for bound in points.bounds)
    near = np.minimum(best - low, high - best) < AT_BOUND * (high - low)
    wide = {name: float(np.exp(min(width, 50.0))) for name, width in zip(names, widths, strict=True)
            if width > np.log(WIDE)}
    at_bounds = tuple(name for name, one in zip(names, near, strict=True) if one)
    return Identifiability(
        condition_number=float(strengths[0] / strengths[-1]), wide=wide, at_bounds=at_bounds,
        too_few_rungs=names if len(points.rungs) <= len(names) else (),
        together=tuple(one for one in together if len(one) > 1 and {*wide, *at_bounds} & set(one)))


def constant_intervals(points: Points, samples: Sequence[np.ndarray]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the law's constants and of the contributions."""
    if not samples:
        return {}
    values = [asdict(points.law(one)) | points.contributions(one) for one in samples]
    return {name: interval([one[name] for one in values]) for name in values[0]}
