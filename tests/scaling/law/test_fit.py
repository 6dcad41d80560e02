"""Planted constants come back, mutants are caught, what a grid cannot tell is said."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.scaling.law.decay import fit_decay
from dlcm_lightning.scaling.law.diagnostics import constant_intervals, identifiability
from dlcm_lightning.scaling.law.fit import Options, bootstrap, draw_runs, objective, search
from dlcm_lightning.scaling.law.fit_table import fit_runs
from dlcm_lightning.scaling.law.formula import ConceptLaw
from dlcm_lightning.scaling.law.held_out import each_rung, largest_size
from dlcm_lightning.scaling.law.synthetic import PLANTED, PLANTED_DECAY, PLANTED_DENSE, ladder
from dlcm_lightning.scaling.law.table import runs_of
from dlcm_lightning.scaling.law.terms import points_of
from tests.scaling.law.ladders import QUICK, fitted, points, printed, sampled, worst

PREDICTION = 1e-3
EXACT = {"run_noise": 0.0, "noise": 0.0, "ratio_noise": 0.0}


def clean(law: ConceptLaw = PLANTED) -> pd.DataFrame:
    return ladder(law, None, decay=None, points=12, **EXACT)


def test_without_noise_the_law_comes_back() -> None:
    law = fitted(clean())
    runs = runs_of(clean(), 0.05)
    assert worst(law, PLANTED, runs) < 1e-9 and worst(law, PLANTED, runs, times=10) < PREDICTION
    assert asdict(law) == pytest.approx(asdict(PLANTED), rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_other_constants_come_back_as_well(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth = ConceptLaw(E0=draw.uniform(1, 2), A_tok=draw.uniform(100, 500), t_tok=draw.uniform(1e6, 3e7),
                       d1=draw.uniform(0.3, 0.45), A_con=draw.uniform(30, 90), gamma=draw.uniform(-0.1, 0.6),
                       t_con=draw.uniform(1e6, 3e7), d2=draw.uniform(0.25, 0.4), A_dat=draw.uniform(400, 1500),
                       t_dat=draw.uniform(1e6, 1e8), alpha=draw.uniform(0.28, 0.4))
    assert worst(fitted(clean(truth)), truth, runs_of(clean(), 0.05), times=4) < PREDICTION


def test_planted_constants_lie_within_their_intervals() -> None:
    """Of the paper's grid, over several noisy ladders. How often exactly: `identifiability.py`, over more of them."""
    held: dict[str, list[bool]] = {name: [] for name in asdict(PLANTED)}
    for seed in range(4):
        some, _, samples = sampled(ladder(PLANTED, None, decay=None, points=8, seed=seed),
                                   replace(QUICK, starts=1, bootstraps=30, seed=seed))
        ends = constant_intervals(some, samples)
        for name, value in asdict(PLANTED).items():
            held[name].append(ends[name][0] <= value <= ends[name][1])
    assert np.mean(list(held.values())) >= 0.9, held
    assert all(np.mean(one) >= 0.7 for one in held.values()), held


def _mutant(kind: str, N: float, D: float, R: float, P: float) -> float:
    return printed(PLANTED, N, D, 1 / R, P) if kind == "R below" else printed(PLANTED, N, D, R, 1 - P)


@pytest.mark.parametrize("kind", ["R below", "P swapped"])
def test_trajectories_of_a_mutant_law_are_told_from_those_of_eq_22(kind: str) -> None:
    table = clean()
    table["loss"] = [_mutant(kind, *row) for row in table[["N", "tokens", "R", "P"]].to_numpy()]
    law, known = fitted(table), fitted(clean())
    if kind == "R below":
        assert law.gamma == pytest.approx(-PLANTED.gamma, rel=1e-3) and known.gamma > 0
    else:
        assert worst(law, PLANTED, runs_of(clean(), 0.05)) > 10 * PREDICTION


def test_late_points_weigh_more_and_every_run_the_same() -> None:
    table = ladder(PLANTED, None, decay=None, points=8)
    table = table.drop(table.index[3:6])  # one run has fewer points
    some = points(table, replace(QUICK, late=2.0, skip=0.0))
    weight = objective(some).weight
    for index, run in enumerate(some.runs):
        mine = weight[some.run == index]
        expected = [(one / run.tokens[-1])**2 for one in run.tokens]
        assert mine == pytest.approx(np.array(expected) / sum(expected) / len(some.runs))


def test_weights_keep_a_distorted_beginning_from_moving_the_end() -> None:
    """The first third of every run is 2 % worse than its law says: with late weights the end is predicted better."""
    table = clean()
    early = table["tokens"] < 0.34 * table.groupby("run")["tokens"].transform("max")
    table.loc[early, "loss"] *= 1.02
    runs = runs_of(clean(), 0.05)
    late, equal = (worst(fitted(table, replace(QUICK, late=power)), PLANTED, runs, times=2) for power in (3.0, 0.0))
    assert late < 0.5 * equal


def test_a_spike_moves_the_law_little() -> None:
    table = clean()
    table.loc[table.index[10::97], "loss"] *= 1.5
    assert worst(fitted(table), PLANTED, runs_of(clean(), 0.05)) < PREDICTION


@pytest.mark.parametrize("offsets", ["shared", "configuration"])
def test_jacobian_is_that_of_finite_differences(offsets: str) -> None:
    some = points_of(runs_of(ladder(PLANTED, None, decay=None, points=4, sizes=(87e6, 274e6)), 0.05), late=1, skip=0,
                     by_rung=offsets == "configuration")
    goal = objective(some)
    at = np.random.default_rng(0).normal(-1, 0.3, some.size)
    step = 1e-6
    slopes = np.stack([(goal.residuals(at + step * one) - goal.residuals(at - step * one)) / (2 * step)
                       for one in np.eye(some.size)], axis=1)
    assert goal.jacobian(at) == pytest.approx(slopes, abs=1e-7)


def test_huber_is_that_of_its_definition() -> None:
    goal = objective(points(clean()))
    squares = np.linspace(0, 9, len(goal.chosen))
    slow = [w * (z if z <= 1 else 2 * z**0.5 - 1) for z, w in zip(squares, goal.weight, strict=True)]
    rho = goal.loss(squares)
    assert rho[0] == pytest.approx(slow)
    assert rho[1, 1:-1] == pytest.approx((goal.loss(squares + 1e-6)[0] - goal.loss(squares - 1e-6)[0])[1:-1] / 2e-6,
                                         rel=1e-4)


def test_offsets_that_vary_by_configuration_are_found() -> None:
    """One configuration has its own t_dat; the others share theirs."""
    own = replace(PLANTED, t_dat=3 * PLANTED.t_dat)
    table = ladder(PLANTED, None, decay=None, points=12, sizes=(87e6, 274e6), **EXACT)
    odd = table["run"] == "dlcm-87m-p50-r4-s0"
    table.loc[odd, "loss"] = [own.loss(*row) for row in table.loc[odd, ["N", "tokens", "R", "P"]].to_numpy()]
    options = replace(QUICK, offsets="configuration", starts=2, skip=0.0)
    some = points(table, options)
    found = {(one.N, one.P, one.R): one.offsets["t_dat"] for one in some.offsets(search(some, options)[0].coordinates)}
    others = [value for key, value in found.items() if key != (87e6, 0.5, 4.0)]
    assert found[(87e6, 0.5, 4.0)] > 1.5 * max(others)


def test_same_seed_same_law_another_order_of_rows_too() -> None:
    table = ladder(PLANTED, None, decay=None, points=5, sizes=(87e6, 274e6, 833e6), shares=(0.3, 0.7), ratios=(2, 8))
    options = replace(QUICK, bootstraps=3)
    one, same, other = (fit_runs(runs_of(rows, 0.05), chosen, 4.0) for rows, chosen in (
        (table, options), (table.sample(frac=1, random_state=1), options), (table, replace(options, seed=9))))
    assert one == same
    assert one.samples != other.samples
    assert asdict(one.law) == pytest.approx(asdict(other.law), rel=1e-3)  # the optimum is not a matter of luck


def test_a_rung_left_out_is_predicted_as_by_a_table_without_it() -> None:
    table = ladder(PLANTED, None, decay=None, points=8, shares=(0.3, 0.7), ratios=(2, 8))
    some = points(table)
    best, _, noise = search(some, QUICK)
    errors = {one.run: one for one in each_rung(some, QUICK, best, noise)}
    assert len(errors) == len(some.runs)
    for name in ("dlcm-87m-p30-r2-s0", "dlcm-833m-p70-r8-s0", "dlcm-274m-p70-r2-s0"):
        law = fitted(table[table["run"] != name])
        run = next(run for run in some.runs if run.name == name)
        assert errors[name].measured == run.loss[-1]
        assert errors[name].predicted == pytest.approx(printed(law, run.N, run.tokens[-1], run.R, run.P), rel=1e-5)


def test_largest_size_is_predicted_as_by_a_table_without_it() -> None:
    table = ladder(PLANTED, None, decay=None, points=8)
    some = points(table)
    best, _, noise = search(some, QUICK)
    law = fitted(table[table["N"] < 8e8])
    errors = largest_size(some, QUICK, best, noise)
    assert {one.run for one in errors} == {run.name for run in some.runs if run.N > 8e8}
    for one in errors:
        run = next(run for run in some.runs if run.name == one.run)
        assert one.predicted == pytest.approx(printed(law, run.N, run.tokens[-1], run.R, run.P), rel=1e-5)
        assert one.relative == pytest.approx(one.predicted / run.loss[-1] - 1)


def test_bootstrap_draws_runs_not_points() -> None:
    some = points(ladder(PLANTED, None, decay=None, points=6))
    counts = draw_runs(some, np.random.default_rng(0))
    assert counts.sum() == 25 and counts.max() > 1 and counts.min() == 0
    goal = objective(some, counts)
    by_run = np.bincount(some.run[goal.chosen], weights=goal.weight, minlength=len(counts))
    assert by_run == pytest.approx(counts / counts.sum())


def test_draws_keep_two_of_whatever_the_grid_has() -> None:
    some = points(ladder(PLANTED, None, decay=None, points=4, sizes=(87e6, 833e6), shares=(0.5,), ratios=(2, 8)))
    generator = np.random.default_rng(0)
    for _ in range(50):
        drawn = [run for run, count in zip(some.runs, draw_runs(some, generator), strict=True) if count]
        assert len({run.N for run in drawn}) == 2 and len({run.R_target for run in drawn}) == 2


def test_small_grid_says_what_it_cannot_tell_and_a_large_one_says_less() -> None:
    options = replace(QUICK, bootstraps=12)
    grids = (((87e6, 274e6, 468e6), (0.7,)), ((87e6, 274e6, 468e6, 833e6, 3e9), (0.1, 0.5, 0.9)))
    small, large = (sampled(ladder(PLANTED, None, decay=None, points=10, sizes=sizes, shares=shares), options)
                    for sizes, shares in grids)
    unclear, clear = identifiability(*small), identifiability(*large)
    assert {"d1", "c_tok", "t_tok"} <= set(unclear.unclear)  # one P: both stacks grow in step
    assert any("c_tok" in group for group in unclear.together)
    assert len(clear.unclear) < len(unclear.unclear)
    without = identifiability(small[0], small[1], [])  # by the Jacobian, where nothing was drawn
    assert {"d1", "c_tok", "t_tok"} <= set(without.unclear)


def test_no_constant_is_known_from_as_many_rungs_as_constants() -> None:
    table = ladder(PLANTED, None, decay=None, points=5, sizes=(87e6, 274e6, 468e6), shares=(0.7,), ratios=(2, 4))
    some, best, _ = sampled(table, QUICK)
    found = identifiability(some, best, [])
    assert found.unclear == tuple(sorted(some.names)) and found.too_few_rungs


def test_floor_is_less_well_known_from_short_runs() -> None:
    """A slower decline to a lower floor looks like a faster one to a higher."""
    widths = []
    for tokens in (2.0, 40.0):
        some, best, _ = sampled(ladder(PLANTED, None, decay=None, points=12, tokens_per_parameter=tokens), QUICK)
        goal = objective(some)
        slopes = goal.jacobian(best) * np.sqrt(goal.weight)[:, None]
        widths.append(float(np.sqrt(np.linalg.inv(slopes.T @ slopes)[0, 0])))
    assert widths[0] > 1.25 * widths[1]


@pytest.mark.parametrize("grid, words", [
    ({"sizes": (87e6,)}, "9 DLCM rungs of 1 sizes"), ({"ratios": (4,)}, "12 DLCM rungs of 4 sizes and 1 R"),
    ({"sizes": (87e6, 833e6), "shares": (0.5,), "ratios": (2, 4)}, "4 DLCM rungs of 2 sizes")])
def test_too_few_rungs_are_refused(grid: dict[str, tuple[float, ...]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fit_runs(runs_of(ladder(PLANTED, None, points=4, **grid), 0.05), QUICK, 4.0)


@pytest.mark.parametrize("options", [{"starts": 0}, {"bootstraps": -1}, {"late": -1}, {"skip": 1}, {"offsets": "none"}])
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(options))}"):
        Options(**options)  # type: ignore[arg-type]


def test_dense_law_comes_back() -> None:
    runs = runs_of(ladder(None, PLANTED_DENSE, points=12, decay=None, **EXACT), 0.05)
    law = fit_runs(runs, QUICK, 4.0).law
    assert asdict(law) == pytest.approx(asdict(PLANTED_DENSE), rel=1e-3)


def test_decay_comes_back_and_lies_within_its_intervals() -> None:
    exact = fit_decay(runs_of(ladder(dense=None, points=4, **EXACT), 0.05), 0, 0)
    assert not isinstance(exact, str)
    assert asdict(exact.law) == pytest.approx(asdict(PLANTED_DECAY), rel=1e-6)
    held = []
    for seed in range(10):
        found = fit_decay(runs_of(ladder(dense=None, points=4, seed=seed), 0.05), seed, 100)
        assert not isinstance(found, str)
        held += [found.intervals[name][0] <= value <= found.intervals[name][1]
                 for name, value in asdict(PLANTED_DECAY).items()]
    assert np.mean(held) >= 0.85


def test_a_decay_that_branches_off_a_run_that_goes_on_is_held_against_the_loss_where_it_began() -> None:
    table = ladder(dense=None, points=6, decay=None, **EXACT)
    branches = []
    for _, rows in table.groupby("run"):
        began, end = rows.iloc[2], rows.iloc[4]  # the run is measured twice more until the branch ends
        gain = PLANTED_DECAY.gain(began["loss"], began["N"], began["R"])
        branches.append({**end, "phase": "decayed", "loss": began["loss"] - gain, "decay_from": began["tokens"]})
    both = pd.concat([table, pd.DataFrame(branches)], ignore_index=True)
    found, without = (fit_decay(runs_of(one, 0.05), 0, 0) for one in (both, both.drop(columns="decay_from")))
    assert not isinstance(found, str)
    assert asdict(found.law) == pytest.approx(asdict(PLANTED_DECAY), rel=1e-6)
    assert isinstance(without, str) or asdict(without.law) != pytest.approx(asdict(PLANTED_DECAY), rel=1e-2)


def test_decay_without_gain_or_with_too_few_runs_says_so() -> None:
    table = ladder(dense=None, points=4)
    few = fit_decay(runs_of(table[table["N"] < 1e8], 0.05), 0, 0)
    assert isinstance(few, str) and "of 1 sizes" in few
    table.loc[table["phase"] == "decayed", "loss"] *= 2
    assert "made the loss no better" in str(fit_decay(runs_of(table, 0.05), 0, 0))


def test_bootstrap_of_nothing_is_empty() -> None:
    some = points(ladder(PLANTED, None, decay=None, points=4))
    best, spread, noise = search(some, QUICK)
    assert bootstrap(some, best, noise, QUICK) == [] and constant_intervals(some, []) == {}
    assert 1 <= spread.reached <= spread.starts == QUICK.starts and spread.worst >= 1
