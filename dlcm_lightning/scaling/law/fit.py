"""A law fitted to points: many starts, one Huber loss, a bootstrap over runs.

What is minimised is the weighted Huber loss of log(predicted / measured):

- logarithms, because an error of 1 % is as bad at a loss of 4 as at one of 2; in nats, size and data would be fitted
  where the loss is large, in small models early on;
- Huber with its bend at 1e-3, as Hoffmann et al. (2022, appendix D.3) fit theirs: a spike, or the noise of one
  validation, pulls with bounded force. Far above the noise it would be least squares, far below absolute values;
- late points weigh more, (D / D at the run's end)^late: what a law is asked for is the loss at the end of runs. Every
  run has the same total weight;
- starts: exponents, gamma and offsets are drawn; contributions and E0, in which Eq. 22 is linear, follow from them by
  non-negative least squares. So no start is absurd;
- the bootstrap draws *runs* with replacement, not points: points of a run share its seed, its order of data and its
  realised R, and would call each other's error small. A draw has as many runs as the ladder has beyond the number of
  constants, but at least two thirds: a fit of p constants to n runs follows some of their noise, and draws of all n
  would make intervals too narrow by about (1 - p / n)^0.5. It keeps two sizes, two R and two P where the grid has them.

Offsets by configuration have a Gaussian prior of `PRIOR` on u, how far they differ from the common ones, as heavy as
one whole run with this ladder's noise: see `terms.py` for why there has to be one. They are not the default:
`identifiability.py` compares both. A looser prior lets offsets take up the noise of seeds, which moves d1 and makes
intervals too narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import least_squares, nnls

from dlcm_lightning.config.checks import require_member, require_range
from dlcm_lightning.progress import progress_bar
from dlcm_lightning.scaling.law.table import SAME_SIZE
from dlcm_lightning.scaling.law.terms import GAMMA, Points

HUBER = 1e-3
"""Where the loss bends, in log(predicted / measured)."""
PRIOR = 0.02
"""Standard deviation of u, by which one configuration's offset differs from the common one: 2 % of its size or data."""
LEAST_NOISE = 1e-5
TOLERANCE = 1e-11
MOST_EVALUATIONS = 200
SAME_OPTIMUM = 1.01
"""Starts whose loss is within this factor of the best one found the same optimum."""
NUMERICALLY_ZERO = 1e-7
"""Root mean square of log(predicted / measured) below which two fits are the same: synthetic data without noise."""
MOST_DRAWS = 1000
OffsetsBy = Literal["shared", "configuration"]


@dataclass(frozen=True)
class Options:
    """How a law is fitted."""

    seed: int = 0
    starts: int = 32
    bootstraps: int = 200
    """0: no intervals."""
    late: float = 1.0
    """A point's weight is (D / D at the end of its run) to this power; 0: all the same."""
    skip: float = 0.05
    """Share of a run's tokens before which points are left out."""
    offsets: OffsetsBy = "shared"
    """shared: one t_tok, t_con, t_dat for all. configuration: each has its own, around the common ones."""

    def __post_init__(self) -> None:
        require_range("--seed", self.seed, 0, 2**63 - 1)
        require_range("--starts", self.starts, 1, 100_000)
        require_range("--bootstraps", self.bootstraps, 0, 1_000_000)
        require_range("--late", self.late, 0, 10)
        require_range("--skip", self.skip, 0, 0.9)
        require_member("--offsets", self.offsets, OffsetsBy)


@dataclass(frozen=True)
class Solution:
    """An optimum."""

    coordinates: np.ndarray
    cost: float
    """The weighted mean of the Huber loss, plus the prior's."""


@dataclass(frozen=True)
class Spread:
    """How the starts ended."""

    starts: int
    reached: int
    """Those that found the best optimum."""
    worst: float
    """The largest loss over the smallest."""


@dataclass(frozen=True)
class _Objective:
    """Residuals of the points that count, after them those of the prior."""

    points: Points
    chosen: np.ndarray
    """Indices of points."""
    weight: np.ndarray
    """Of the chosen points, sum 1."""
    prior: float
    """Factor on deviations of offsets, 0 without any."""

    def residuals(self, coordinates: np.ndarray) -> np.ndarray:
        values, _ = self.points.evaluate(coordinates)
        errors = np.log(values[self.chosen] / self.points.loss[self.chosen])
        return np.concatenate([errors, self.prior * coordinates[len(self.points.names):]])

    def jacobian(self, coordinates: np.ndarray) -> np.ndarray:
        values, slopes = self.points.evaluate(coordinates, jacobian=True)
        extra = self.points.size - len(self.points.names)
        prior = np.zeros((extra, self.points.size))
        prior[:, len(self.points.names):] = self.prior * np.eye(extra)
        return np.concatenate([slopes[self.chosen] / values[self.chosen, None], prior])

    def loss(self, squares: np.ndarray) -> np.ndarray:
        """rho and its two derivatives by (residual / HUBER)^2, as SciPy wants them."""
        rho = np.stack([squares, np.ones_like(squares), np.zeros_like(squares)])
        count = len(self.chosen)
        far = np.flatnonzero(squares[:count] > 1)
        root = np.sqrt(squares[far])
        rho[:, far] = np.stack([2 * root - 1, 1 / root, -0.5 / root**3])
        rho[:, :count] *= self.weight
        return rho

    def solve(self, start: np.ndarray) -> Solution:
        low, high = self.points.bounds
        inside = 1e-6 * (high - low)
        found = least_squares(self.residuals, np.clip(start, low + inside, high - inside), self.jacobian, (low, high),
                              loss=self.loss, f_scale=HUBER, ftol=TOLERANCE, xtol=TOLERANCE, gtol=1e-15,
                              max_nfev=MOST_EVALUATIONS)
        return Solution(found.x, float(found.cost))


def objective(points: Points, counts: np.ndarray | None = None, noise: float = LEAST_NOISE) -> _Objective:
    """counts: how often each run counts, (runs,); once without. noise: of a run, in log(predicted / measured)."""
    times = np.ones(len(points.runs)) if counts is None else counts
    chosen = np.flatnonzero(times[points.run] > 0)
    of_run = times / np.bincount(points.run, minlength=len(points.runs))  # a run counts once, however many its points
    weight = (points.weight * of_run[points.run])[chosen]
    prior = noise / PRIOR / np.sqrt(times.sum())  # as heavy as one of all the runs
    return _Objective(points, chosen, weight / weight.sum(), prior if points.by_rung else 0.0)


def draw_start(points: Points, generator: np.random.Generator, goal: _Objective) -> np.ndarray:
    """Exponents, offsets and gamma at random, the rest by non-negative least squares."""
    start = np.zeros(points.size)
    place = 1
    for term in points.terms:
        start[place + 1] = np.log(generator.uniform(0.1, 0.8))
        start[place + 2] = generator.uniform(np.log(1e-3), np.log(1.0))
        if term.log_ratio is not None:
            start[place + 3] = generator.uniform(max(GAMMA[0], -0.3), 1.0)
        place += len(term.names)
    _, slopes = points.evaluate(start, jacobian=True)
    linear = np.array([0, *(index for index, name in enumerate(points.names) if name.startswith("c_"))])
    scale = np.sqrt(goal.weight) / points.loss[goal.chosen]
    found, _ = nnls(slopes[np.ix_(goal.chosen, linear)] * scale[:, None], np.sqrt(goal.weight))
    start[linear] += np.log(np.maximum(found, 1e-3))
    return start


def search(points: Points, options: Options, counts: np.ndarray | None = None) -> tuple[Solution, Spread, float]:
    """The best optimum of many starts, how the starts ended, and the noise that is left over.

    Starts search with shared offsets; if offsets vary by configuration, that optimum is the one start of the whole.
    """
    shared = shared_offsets(points)
    goal = objective(shared, counts)
    generator = np.random.default_rng([options.seed, 1])
    starts = [draw_start(shared, generator, goal) for _ in range(options.starts)]
    found = sorted((goal.solve(start) for start in progress_bar(starts, desc="starts", unit="start")),
                   key=lambda one: one.cost)
    best = found[0]
    zero = 0.5 * NUMERICALLY_ZERO**2
    reached = sum(one.cost <= max(best.cost * SAME_OPTIMUM, zero) for one in found)
    spread = Spread(len(found), reached, max(found[-1].cost, zero) / max(best.cost, zero))
    noise = residual_noise(shared, best.coordinates, goal.chosen)
    if points.by_rung:
        extra = np.zeros(points.size - len(points.names))
        best = objective(points, counts, noise).solve(np.concatenate([best.coordinates, extra]))
    return best, spread, noise


def shared_offsets(points: Points) -> Points:
    """The same points, offsets not varying by configuration."""
    return Points(points.runs, points.run, points.rung, points.rungs, points.tokens, points.loss, points.weight,
                  points.terms, by_rung=False)


def residual_noise(points: Points, coordinates: np.ndarray, chosen: np.ndarray) -> float:
    """Of log(measured / predicted), by the median of absolute values, which spikes do not move."""
    values, _ = points.evaluate(coordinates)
    errors = np.log(values[chosen] / points.loss[chosen])
    return max(LEAST_NOISE, 1.4826 * float(np.median(np.abs(errors))))


def bootstrap(points: Points, best: Solution, noise: float, options: Options) -> list[np.ndarray]:
    """Coordinates of the optimum for every draw of runs, found from a start of its own, and from `best` if that ends
    lower. From `best` alone, a draw that leaves a valley of equal optima would stay where it is, and what is not known
    at all would look well known."""
    generator = np.random.default_rng([options.seed, 2])
    shared = shared_offsets(points)
    extra = np.zeros(points.size - len(points.names))
    found = []
    for _ in progress_bar(range(options.bootstraps), desc="bootstrap", unit="draw"):
        counts = draw_runs(points, generator)
        goal = objective(points, counts, noise)
        own = goal.solve(np.concatenate([draw_start(shared, generator, objective(shared, counts)), extra]))
        near = goal.solve(best.coordinates)
        found.append((own if own.cost <= near.cost * SAME_OPTIMUM else near).coordinates)
    return found


def draw_runs(points: Points, generator: np.random.Generator) -> np.ndarray:
    """How often each run was drawn, (runs,): drawn again until it has two of whatever the grid has two of."""
    count = len(points.runs)
    draw = max(count - len(points.names), -(-2 * count // 3))
    levels: list[Callable[[int], float]] = [
        lambda run: round(np.log(points.runs[run].N) / np.log(SAME_SIZE)), lambda run: points.runs[run].P,
        lambda run: points.runs[run].R_target]
    for _ in range(MOST_DRAWS):
        drawn = generator.integers(count, size=draw)
        if all(len({level(int(run)) for run in drawn}) >= min(2, len({level(run) for run in range(count)}))
               for level in levels):
            break
    return np.bincount(drawn, minlength=count).astype(float)
