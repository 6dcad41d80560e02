"""Eq. 22 as the paper prints it, once more and by itself; tables whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from dlcm_lightning.scaling.law.fit import Options, bootstrap, search
from dlcm_lightning.scaling.law.formula import ConceptLaw
from dlcm_lightning.scaling.law.table import Run, runs_of
from dlcm_lightning.scaling.law.terms import Points, points_of

QUICK = Options(starts=4, bootstraps=0)


def printed(c: ConceptLaw, N: float, D: float, R: float, P: float) -> float:
    """Eq. 22, term by term, without a line of the package."""
    token = c.A_tok / math.pow(N * (1 - P) + c.t_tok, c.d1)
    concept = c.A_con * math.pow(R, c.gamma) / math.pow(N * P + c.t_con, c.d2)
    data = c.A_dat / math.pow(D + c.t_dat, c.alpha)
    return c.E0 + token + concept + data


def points(table: pd.DataFrame, options: Options = QUICK) -> Points:
    return points_of([run for run in runs_of(table, 0.05) if run.kind == "dlcm"], late=options.late, skip=options.skip,
                     by_rung=options.offsets == "configuration")


def fitted(table: pd.DataFrame, options: Options = QUICK) -> ConceptLaw:
    some = points(table, options)
    law = some.law(search(some, options)[0].coordinates)
    assert isinstance(law, ConceptLaw)
    return law


def sampled(table: pd.DataFrame, options: Options) -> tuple[Points, np.ndarray, list[np.ndarray]]:
    """Points, optimum, bootstrap."""
    some = points(table, options)
    best, _, noise = search(some, options)
    return some, best.coordinates, bootstrap(some, best, noise, options)


def worst(law: ConceptLaw, truth: ConceptLaw, runs: Sequence[Run], times: float = 1.0) -> float:
    """Largest relative error of the last loss, at `times` the size and the data."""
    return max(abs(law.loss(times * run.N, times * run.tokens[-1], run.R, run.P)
                   / printed(truth, times * run.N, times * run.tokens[-1], run.R, run.P) - 1) for run in runs)
