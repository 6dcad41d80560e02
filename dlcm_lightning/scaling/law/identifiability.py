"""`python -m dlcm_lightning.scaling.law.identifiability`: which constants a ladder can tell, before it is trained.

Constants are planted (`synthetic.py`), a ladder of noisy trajectories is drawn from them and fitted, several times. For
each grid the tables say how often the 95 % interval of a constant holds the planted value, how wide the interval is,
and what matters more: how far the fitted law is off at 4 times the largest size. A grid whose constants are wide may
still predict; one whose intervals miss must not be believed.

The truth here is Eq. 22 itself. Real losses need not follow it: this shows the best that a grid can do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dlcm_lightning.progress import progress_bar
from dlcm_lightning.scaling.law.diagnostics import constant_intervals, identifiability
from dlcm_lightning.scaling.law.fit import Options, bootstrap, search
from dlcm_lightning.scaling.law.formula import ConceptLaw
from dlcm_lightning.scaling.law.synthetic import PLANTED, RATIOS, SHARES, SIZES, TOKENS_PER_PARAMETER, ladder
from dlcm_lightning.scaling.law.table import runs_of
from dlcm_lightning.scaling.law.terms import points_of

BEYOND = 4.0


@dataclass(frozen=True)
class Grid:
    """A ladder of DLCMs that could be trained."""

    name: str
    sizes: tuple[float, ...] = SIZES
    shares: tuple[float, ...] = SHARES
    ratios: tuple[float, ...] = RATIOS
    seeds: int = 1
    tokens_per_parameter: float = TOKENS_PER_PARAMETER
    offsets: str = "shared"


GRIDS = (
    Grid("the paper's grid"),
    Grid("the same, two seeds", seeds=2),
    Grid("the same, 4 tokens a parameter", tokens_per_parameter=4.0),
    Grid("P = 70 % only", shares=(0.7,)),
    Grid("R = 2 and 4 only", ratios=(2.0, 4.0)),
    Grid("three sizes up to 468M, P = 70 %, R = 2 and 4", sizes=SIZES[:3], shares=(0.7,), ratios=(2.0, 4.0)),
)


@dataclass(frozen=True)
class Trial:
    """One synthetic ladder, fitted."""

    holds: dict[str, bool]
    """Whether the interval of a constant has the planted value."""
    widths: dict[str, float]
    """High over low; for gamma high minus low."""
    unclear: tuple[str, ...]
    together: tuple[tuple[str, ...], ...]
    beyond: float
    """Root mean square of log(predicted / true) at BEYOND times the largest size."""


def trial(grid: Grid, options: Options, law: ConceptLaw = PLANTED, noise: float = 0.002) -> Trial:
    """options.seed is that of the ladder too."""
    table = ladder(law, None, sizes=grid.sizes, shares=grid.shares, ratios=grid.ratios, decay=None, seeds=grid.seeds,
                   tokens_per_parameter=grid.tokens_per_parameter, run_noise=noise, noise=noise, seed=options.seed)
    points = points_of(runs_of(table, 0.05), late=options.late, skip=options.skip,
                       by_rung=options.offsets == "configuration")
    best, _, left = search(points, options)
    samples = bootstrap(points, best, left, options)
    intervals = constant_intervals(points, samples)
    known = identifiability(points, best.coordinates, samples)
    planted: dict[str, float] = asdict(law)
    fitted, N = points.law(best.coordinates), BEYOND * max(grid.sizes)
    errors = [np.log(fitted.loss(N, grid.tokens_per_parameter * N, R, P)
                     / law.loss(N, grid.tokens_per_parameter * N, R, P)) for R in grid.ratios for P in grid.shares]
    return Trial(
        {name: intervals[name][0] <= value <= intervals[name][1] for name, value in planted.items()},
        {name: intervals[name][1] - intervals[name][0] if name == "gamma" else intervals[name][1] / intervals[name][0]
         for name in planted},
        known.unclear, known.together, float(np.sqrt(np.mean(np.square(errors)))))


def lines(trials: int, options: Options, grids: tuple[Grid, ...]) -> Iterator[str]:
    """The tables, in Markdown."""
    found: dict[str, list[Trial]] = {}
    work = [(grid, seed) for grid in grids for seed in range(trials)]
    for grid, seed in progress_bar(work, desc="synthetic ladders", unit="ladder"):
        chosen: Any = grid.offsets
        found.setdefault(grid.name, []).append(trial(grid, replace(options, seed=seed, offsets=chosen)))
    yield f"{trials} ladders of each grid, {options.bootstraps} draws of runs, {options.starts} starts."
    yield ""
    yield "Median width of the 95 % interval: high / low, of gamma high - low; in brackets how often it has the truth."
    yield ""
    names = list(asdict(PLANTED))
    yield "| constant |" + "".join(f" {grid.name} |" for grid in grids)
    yield "|---|" + "---|" * len(grids)
    for name in names:
        row = f"| {name} |"
        for grid in grids:
            some = found[grid.name]
            width = float(np.median([one.widths[name] for one in some]))
            row += f" {width:.3g} ({100 * float(np.mean([one.holds[name] for one in some])):.0f} %) |"
        yield row
    held = [np.mean([list(one.holds.values()) for one in found[grid.name]]) for grid in grids]
    yield "| **all** |" + "".join(f" ({100 * one:.0f} %) |" for one in held)
    yield (f"| **loss at {BEYOND:g} x the size** |"
           + "".join(f" {100 * np.median([one.beyond for one in found[grid.name]]):.2f} % off |" for grid in grids))
    yield ""
    for grid in grids:
        some = found[grid.name]
        unclear = {name: sum(name in one.unclear for one in some) for name in ("E0", "c_tok", "d1", "t_tok", "c_con",
                   "gamma", "d2", "t_con", "c_dat", "alpha", "t_dat")}
        groups: dict[tuple[str, ...], int] = {}
        for one in some:
            for group in one.together:
                groups[group] = groups.get(group, 0) + 1
        often = sorted(groups, key=lambda group: (-groups[group], group))[:3]
        yield (f"- {grid.name}: not known in "
               + (", ".join(f"{name} {count}" for name, count in unclear.items() if count) or "none")
               + f" of {trials}; known only together: "
               + ("; ".join(f"{', '.join(group)} ({groups[group]})" for group in often) or "none"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Which constants of Eq. 22 a ladder can tell, on synthetic ladders.")
    parser.add_argument("--trials", type=int, default=8, help="ladders of each grid (8)")
    parser.add_argument("--bootstraps", type=int, default=60, help="draws of runs (60)")
    parser.add_argument("--starts", type=int, default=4, help="of each fit (4)")
    parser.add_argument("--offsets", action="store_true", help="compare shared offsets with offsets by configuration")
    arguments = parser.parse_args()
    options = Options(starts=arguments.starts, bootstraps=arguments.bootstraps)
    grids: tuple[Grid, ...] = GRIDS
    if arguments.offsets:
        grids = (Grid("shared offsets"), Grid("offsets by configuration", offsets="configuration"))
    for line in lines(arguments.trials, options, grids):
        print(line, flush=True)


if __name__ == "__main__":
    main()
