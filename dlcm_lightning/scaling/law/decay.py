"""Eq. 23: what the decay of the learning rate takes off the loss, delta = k L_stable^a R^b N^c.

log delta is linear in log L_stable, log R and log N, so the fit is ordinary least squares. L_stable is the run's last
stable loss before the decay. L_stable falls with N in any ladder, so a and c are hardly told apart by one; the
condition number says how hardly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dlcm_lightning.scaling.law.formula import DecayLaw, FittedDecay, interval
from dlcm_lightning.scaling.law.table import Run, sizes_of

LEAST_RUNS = 5
COLLINEAR = 5.0
"""Condition number of the centred logarithms, scaled to length 1, above which exponents trade with one another."""


@dataclass(frozen=True)
class _Decayed:
    run: int
    stable: float
    N: float
    R: float
    gain: float


def _gains(runs: Sequence[Run]) -> list[_Decayed]:
    found = []
    for index, run in enumerate(runs):
        for _, loss, begun in run.decayed:
            before = run.loss[run.tokens <= begun]
            if len(before):
                found.append(_Decayed(index, float(before[-1]), run.N, run.R, float(before[-1]) - loss))
    return found


def fit_decay(runs: Sequence[Run], seed: int, bootstraps: int) -> FittedDecay | str:
    """Runs of one kind. A sentence where there is too little to fit."""
    concept = runs[0].kind == "dlcm"
    gains = _gains(runs)
    worse = [runs[one.run].name for one in gains if one.gain <= 0]
    if worse:
        return f"the decay of {worse[0]} made the loss no better, so that its gain has no logarithm"
    have, ratios = len({one.run for one in gains}), len({runs[one.run].R_target for one in gains})
    sizes = len(sizes_of([runs[one.run] for one in gains])) if gains else 0
    if have < LEAST_RUNS - (not concept) or sizes < 2 or (concept and ratios < 2):
        return (f"{have} runs with a decay, of {sizes} sizes and {ratios} R; needed are {LEAST_RUNS - (not concept)} "
                f"runs of two sizes{' and two R' if concept else ''}")
    columns = [np.ones(len(gains)), np.log([one.stable for one in gains]), np.log([one.N for one in gains])]
    if concept:
        columns.append(np.log([one.R for one in gains]))
    design = np.stack(columns, axis=1)
    target = np.log([one.gain for one in gains])
    owner = np.array([one.run for one in gains])
    law = _solve(design, target, concept)
    generator = np.random.default_rng([seed, 3])
    samples = []
    for _ in range(bootstraps):
        drawn = np.concatenate([np.flatnonzero(owner == run) for run in generator.choice(np.unique(owner), have)])
        if np.linalg.matrix_rank(design[drawn]) == design.shape[1]:
            samples.append(_solve(design[drawn], target[drawn], concept))
    predicted = np.log([law.gain(one.stable, one.N, one.R) for one in gains])
    centred = design[:, 1:] - design[:, 1:].mean(axis=0)
    strengths = np.linalg.svd(centred / np.linalg.norm(centred, axis=0), compute_uv=False)
    condition = float(strengths[0] / max(strengths[-1], 1e-12))
    ends = {name: interval([asdict(one)[name] for one in samples]) for name in asdict(law)} if samples else {}
    return FittedDecay(
        law, ends, tuple(samples), {
            "runs": have, "R2_of_log_gain": 1 - float(np.sum((target - predicted)**2) / np.sum(
                (target - target.mean())**2)),
            "condition_number": condition,
            "constants": {name: value for name, value in asdict(law).items() if concept or name != "b"},
            "together": [["k", "a", "c"]] if condition > COLLINEAR else [],
            "unclear": _unclear(ends, concept)})


def _unclear(ends: dict[str, tuple[float, float]], concept: bool) -> list[str]:
    """Exponents whose sign is not known, and k beyond a factor of two."""
    exponents = ("a", "b", "c")
    unclear: list[str] = [name for name in exponents if name in ends and ends[name][0] * ends[name][1] <= 0]
    if "k" in ends and ends["k"][1] > 2 * ends["k"][0]:
        unclear.append("k")
    return [name for name in unclear if concept or name != "b"]


def _solve(design: np.ndarray, target: np.ndarray, concept: bool) -> DecayLaw:
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    return DecayLaw(k=float(np.exp(found[0])), a=float(found[1]), c=float(found[2]),
                    b=float(found[3]) if concept else 0.0)
