"""Where the loss over learning rates has its minimum: by a parabola over the logarithm of the rate, through the lowest
point and its two neighbours.

A lowest point without a neighbour on either side is no minimum but a bound: the best rate lies there or beyond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Minimum:
    """Of a loss over factors of a learning rate."""

    factor: float
    loss: float
    """At the vertex of the parabola; at an edge, that of the lowest point."""
    at_edge: bool
    """Whether no loss is known beyond the lowest point on one side: its factor is a bound."""


def minimum_of(factors: Sequence[float], losses: Sequence[float | None]) -> Minimum | None:
    """factors: ascending. losses: None where nothing is known, infinite where training diverged. None where no loss is
    finite."""
    finite = [place for place, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    if not finite:
        return None
    best = min(finite, key=lambda place: _known(losses[place]))
    if best - 1 not in finite or best + 1 not in finite:
        return Minimum(factors[best], _known(losses[best]), True)
    x = [math.log(factors[place] / factors[best]) for place in (best - 1, best + 1)]
    y = [_known(losses[place]) - _known(losses[best]) for place in (best - 1, best + 1)]
    # y = a x^2 + b x through the origin, which is the lowest point
    a = (y[0] / x[0] - y[1] / x[1]) / (x[0] - x[1])
    b = y[0] / x[0] - a * x[0]
    if a <= 0:  # all three are equal
        return Minimum(factors[best], _known(losses[best]), False)
    move = -b / (2 * a)
    return Minimum(factors[best] * math.exp(move), _known(losses[best]) + a * move**2 + b * move, False)


def _known(loss: float | None) -> float:
    assert loss is not None
    return loss


def grid_steps(before: float, after: float, step: float) -> float:
    """By how many steps of a grid a factor has moved. step: ratio of neighbours."""
    return math.log(after / before) / math.log(step)
