"""What a fitted law says about compute: the best P at fixed FLOPs, the best R, what is saved against dense models.

FLOPs are those of the body, 6 N (1 - P + P / R) D: backbone parameters meet one token in R. Attention maps and the head
come on top and favour large R and large models a little; `fit.md` says how far the FLOPs of the table lie from it.

Two questions, two comparisons. *At fixed FLOPs and tokens* (as Fig. 6a): a larger P or R makes a token cheaper, so N
grows until the FLOPs are spent. *Compute-optimal*: N and D share the FLOPs as is best for each kind of model, P and R;
savings are 1 - C_dlcm / C_dense at the same loss, each at its own optimum (as Fig. 6b). Everything stays within the
range that the laws have seen, times the factor that they allow; what lies outside is NaN, and so is an optimum of N and
D at the edge of it, which would be one of the edge and not of the law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from dlcm_lightning.scaling.law.formula import DenseLaw, FittedLaw, Law, body_flops_per_token
from dlcm_lightning.scaling.law.table import Run

SIZES, SHARES, RATIOS, BUDGETS = 120, 9, 25, 16
"""Points of each grid."""


def evaluate(law: Law, N: np.ndarray, D: np.ndarray, R: np.ndarray, P: np.ndarray) -> np.ndarray:
    """The law on arrays that broadcast: its arithmetic is that of NumPy too."""
    return np.asarray(law.loss(cast(float, N), cast(float, D), cast(float, R), cast(float, P)))


def budgets(runs: list[Run], extrapolation: float) -> np.ndarray:
    """Body FLOPs from the cheapest run to the dearest one times the factor."""
    spent = [body_flops_per_token(run.N, run.R, run.P) * float(run.tokens[-1]) for run in runs]
    return np.geomspace(min(spent), max(spent) * extrapolation, BUDGETS)


def at_fixed_flops(law: FittedLaw, flops: float, tokens: float, P: np.ndarray, R: float
                   ) -> tuple[np.ndarray, np.ndarray]:
    """N (P,) that spends the FLOPs on the tokens, and the law's loss (P,), NaN outside what it allows."""
    N = flops / tokens / np.asarray(body_flops_per_token(1.0, R, cast(float, P)))
    loss = evaluate(law.law, N, np.full_like(N, tokens), np.full_like(N, R), P)
    return N, np.where(_allowed(law, N, np.full_like(N, tokens), np.full_like(N, R), P), loss, np.nan)


def _allowed(law: FittedLaw, N: np.ndarray, D: np.ndarray, R: np.ndarray, P: np.ndarray) -> np.ndarray:
    values = {"N": N, "D": D}
    if not isinstance(law.law, DenseLaw):
        values |= {"R": R, "token_parameters": N * (1 - P), "concept_parameters": N * P}
    good = np.ones(np.broadcast_shapes(*(value.shape for value in values.values())), bool)
    for name, value in values.items():
        seen, slack = law.seen[name], law.extrapolation * (1 + 1e-9)
        good &= (value >= seen.low / slack) & (value <= seen.high * slack)
    return good


@dataclass(frozen=True)
class Grid:
    """Models of every size, share and ratio within what a law allows, for every budget."""

    N: np.ndarray
    D: np.ndarray
    R: np.ndarray
    P: np.ndarray
    allowed: np.ndarray
    inside: np.ndarray
    """Allowed, and the next smaller and the next larger model too. All (budgets, ratios, shares x sizes) or
    broadcasting to it."""

    def best(self, law: Law) -> np.ndarray:
        """Least loss by budget and R, (budgets, ratios); NaN where the optimum lies at the edge."""
        loss = np.where(self.allowed, evaluate(law, self.N, self.D, self.R, self.P), np.inf)
        place = loss.argmin(axis=2)[..., None]
        inside = np.take_along_axis(self.inside, place, axis=2)[..., 0]
        return np.where(inside, np.take_along_axis(loss, place, axis=2)[..., 0], np.nan)


def grid_of(law: FittedLaw, flops: np.ndarray, ratios: np.ndarray) -> Grid:
    """flops: of each budget. ratios: R that are compared; [1] for a dense law."""
    seen = law.seen
    sizes = np.geomspace(seen["N"].low / law.extrapolation, seen["N"].high * law.extrapolation, SIZES)
    shares = np.zeros(1) if isinstance(law.law, DenseLaw) else np.linspace(seen["P"].low, seen["P"].high, SHARES)
    P, N = (one.reshape(1, 1, -1) for one in np.meshgrid(shares, sizes, indexing="ij"))
    R = ratios.reshape(1, -1, 1)
    per_token = np.asarray(body_flops_per_token(cast(float, N), cast(float, R), cast(float, P)))
    D = flops.reshape(-1, 1, 1) / per_token
    allowed = _allowed(law, N, D, R, P)
    by_size = allowed.reshape(*allowed.shape[:2], len(shares), SIZES)
    inside = np.zeros_like(by_size)
    inside[..., 1:-1] = by_size[..., :-2] & by_size[..., 1:-1] & by_size[..., 2:]
    return Grid(N, D, R, P, allowed, inside.reshape(allowed.shape))


@dataclass(frozen=True)
class BestRatio:
    """The best R by compute, N, D and P being the best for each."""

    flops: np.ndarray
    """(budgets,)"""
    R: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """95 % interval by the bootstrap, (budgets,)."""
    ratios: tuple[float, float]
    """The range that was searched, which is what the ladder has seen: a best R at one of its ends is a bound only."""

    @property
    def at_edge(self) -> np.ndarray:
        """Where the best R is the least or the largest of the ladder, (budgets,)."""
        low, high = self.ratios
        return np.asarray((self.R / low < 1.001) | (self.R / high > 0.999))


def best_ratio(law: FittedLaw, flops: np.ndarray) -> BestRatio:
    """R within what the ladder has seen, not beyond: that is what it disputes."""
    ratios = np.geomspace(law.seen["R"].low, law.seen["R"].high, RATIOS)
    grid = grid_of(law, flops, ratios)

    def chosen(one: Law) -> np.ndarray:
        return np.array([_lowest(np.log(ratios), loss) for loss in grid.best(one)])

    best = chosen(law.law)
    samples = np.stack([chosen(one) for one in law.samples]) if law.samples else best[None]
    return BestRatio(flops, best, *_ends(samples, best), (float(ratios[0]), float(ratios[-1])))


def _lowest(log_ratios: np.ndarray, loss: np.ndarray) -> float:
    """R at the vertex of the parabola through the least loss and its neighbours; NaN if some loss is not known."""
    if not np.isfinite(loss).all():
        return float("nan")
    place = int(loss.argmin())
    if 0 < place < len(loss) - 1:
        before, here, after = loss[place - 1:place + 2]
        move = 0.5 * (before - after) / (before - 2 * here + after) if before + after > 2 * here else 0.0
        return float(np.exp(log_ratios[place] + move * (log_ratios[1] - log_ratios[0])))
    return float(np.exp(log_ratios[place]))


def _ends(samples: np.ndarray, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval over samples (draws, budgets) where there is a best value, else NaN."""
    there = np.isfinite(samples).any(axis=0) & np.isfinite(best)
    low, high = np.full_like(best, np.nan), np.full_like(best, np.nan)
    if there.any():
        low[there], high[there] = np.nanpercentile(samples[:, there], [2.5, 97.5], axis=0)
    return low, high


@dataclass(frozen=True)
class Savings:
    """1 - C_dlcm / C_dense at equal loss, (budgets,); negative where dense is cheaper, NaN where no dense model
    that its law allows reaches the loss."""

    R: float
    flops: np.ndarray
    """Of the DLCM."""
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """95 % interval: bootstrap laws of both kinds, paired by draw."""


def savings(law: FittedLaw, dense: FittedLaw, flops: np.ndarray, R: float) -> Savings:
    """Each kind at its own best N and D, DLCM at its best P."""
    wide = np.geomspace(flops.min() / 100, flops.max() * 100, 8 * BUDGETS)
    grid, dense_grid = grid_of(law, flops, np.array([R])), grid_of(dense, wide, np.ones(1))

    def saved(one: Law, other: Law) -> np.ndarray:
        loss, dense_loss = grid.best(one)[:, 0], dense_grid.best(other)[:, 0]
        known = np.isfinite(dense_loss)
        if not known.any():
            return np.full_like(flops, np.nan)
        falling = np.minimum.accumulate(dense_loss[known])
        cost = np.interp(-loss, -falling, np.log(wide[known]), left=np.nan, right=np.nan)
        return np.asarray(1 - flops / np.exp(cost))

    best = saved(law.law, dense.law)
    samples = np.stack([saved(*pair) for pair in zip(law.samples, dense.samples, strict=False)] or [best])
    return Savings(R, flops, best, *_ends(samples, best))
