"""What the laws say about compute, against brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from dlcm_lightning.scaling.law.compute import at_fixed_flops, best_ratio, budgets, grid_of, savings
from dlcm_lightning.scaling.law.formula import DenseLaw, FittedLaw, Range, body_flops_per_token
from dlcm_lightning.scaling.law.synthetic import PLANTED, PLANTED_DENSE, ladder
from dlcm_lightning.scaling.law.table import runs_of

WIDE = {name: Range(1e6, 1e12) for name in ("N", "D", "token_parameters", "concept_parameters")} | {
    "R": Range(2, 8), "P": Range(0.3, 0.7)}
LAW = FittedLaw(PLANTED, {}, (PLANTED, replace(PLANTED, gamma=0.2), replace(PLANTED, gamma=0.3)), WIDE, 1.0, {})
DENSE = FittedLaw(PLANTED_DENSE, {}, (), WIDE, 1.0, {})
FLOPS = np.geomspace(5e18, 2e20, 4)


def brute(flops: float, R: float) -> float:
    """Least loss over N and P, by a search of its own."""
    def loss(at: np.ndarray) -> float:
        N, P = np.exp(at[0]), at[1]
        return PLANTED.loss(N, flops / body_flops_per_token(N, R, P), R, P)
    found = [minimize(loss, [np.log(N), P], method="Nelder-Mead", bounds=[(np.log(1e7), np.log(1e10)), (0.3, 0.7)],
                      options={"xatol": 1e-6, "fatol": 1e-12}).fun for N in (1e8, 1e9) for P in (0.4, 0.6)]
    return float(min(found))


@pytest.mark.parametrize("R", [2.0, 5.0, 8.0])
def test_least_loss_is_that_of_brute_force(R: float) -> None:
    found = grid_of(LAW, FLOPS, np.array([R])).best(PLANTED)[:, 0]
    assert found == pytest.approx([brute(flops, R) for flops in FLOPS], rel=3e-4)


def test_best_ratio_is_where_the_loss_is_least() -> None:
    found = best_ratio(LAW, FLOPS)
    for flops, R in zip(FLOPS, found.R, strict=True):
        assert brute(flops, R) <= min(brute(flops, other) for other in (max(2, 0.8 * R), min(8, 1.25 * R))) + 1e-6
    assert (found.low <= found.R).all() and (found.high >= found.R).all()
    assert not found.at_edge.any()


def test_best_ratio_at_the_end_of_the_ladder_is_called_a_bound() -> None:
    dear, cheap = (best_ratio(replace(LAW, law=replace(PLANTED, gamma=gamma), samples=()), FLOPS)
                   for gamma in (1.0, -0.2))
    assert (pytest.approx(2) == dear.R) and dear.at_edge.all()
    assert (pytest.approx(8) == cheap.R) and cheap.at_edge.all()


def test_fixed_flops_are_spent() -> None:
    P = np.linspace(0.3, 0.7, 5)
    N, loss = at_fixed_flops(LAW, 1e20, 1e10, P, 4.0)
    for n, p, value in zip(N, P, loss, strict=True):
        assert body_flops_per_token(n, 4.0, p) * 1e10 == pytest.approx(1e20)
        assert value == pytest.approx(PLANTED.loss(n, 1e10, 4.0, p))


def test_savings_are_of_equal_loss() -> None:
    found = savings(LAW, DENSE, FLOPS, 4.0)
    for flops, share in zip(FLOPS, found.share, strict=True):
        dense = flops / (1 - share)
        least = min(PLANTED_DENSE.loss(N, dense / 6 / N) for N in np.geomspace(1e7, 1e10, 3000))
        assert least == pytest.approx(brute(flops, 4.0), rel=5e-4)


def test_a_model_as_good_as_dense_saves_nothing() -> None:
    """Without a concept term and with P near 0, a DLCM is the dense model."""
    law = FittedLaw(replace(PLANTED, A_con=0.0), {}, (), WIDE | {"P": Range(1e-9, 2e-9), "concept_parameters": Range(
        1e-9, 1e12)}, 1.0, {})
    dense = DenseLaw(PLANTED.E0, PLANTED.A_tok, PLANTED.t_tok, PLANTED.d1, PLANTED.A_dat, PLANTED.t_dat, PLANTED.alpha)
    assert savings(law, replace(DENSE, law=dense), FLOPS, 4.0).share == pytest.approx(0, abs=2e-3)


def test_nothing_is_said_outside_of_what_was_seen() -> None:
    narrow = replace(LAW, seen=WIDE | {"D": Range(1e9, 2e9)})
    assert np.isnan(at_fixed_flops(narrow, 1e20, 1e10, np.array([0.5]), 4.0)[1]).all()
    assert np.isnan(best_ratio(narrow, FLOPS).R).all()  # the best N and D lie at the edge
    assert np.isnan(savings(narrow, DENSE, FLOPS, 4.0).share).all()


def test_budgets_reach_from_the_cheapest_run_to_the_factor() -> None:
    runs = [run for run in runs_of(ladder(points=4), 0.05) if run.kind == "dlcm"]
    spent = [body_flops_per_token(run.N, run.R, run.P) * run.tokens[-1] for run in runs]
    found = budgets(runs, 4.0)
    assert found[0] == pytest.approx(min(spent)) and found[-1] == pytest.approx(4 * max(spent))
