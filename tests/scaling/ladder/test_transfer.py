"""The search, the minimum and the verdict on losses whose truth is known; then on runs that are really trained."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlcm_lightning.config import ConfigError
from dlcm_lightning.errors import RunError
from dlcm_lightning.scaling.ladder.descent import Place, descend
from dlcm_lightning.scaling.ladder.minimum import grid_steps, minimum_of
from dlcm_lightning.scaling.ladder.runs import state_of
from dlcm_lightning.scaling.ladder.study_run import Part, jobs_of
from dlcm_lightning.scaling.ladder.sweeps import Runs, proxy_runs, sweep_points
from dlcm_lightning.scaling.ladder.transfer import overview, run_transfer, verdict_of
from dlcm_lightning.scaling.ladder.transfer_page import write_report
from dlcm_lightning.scaling.ladder.transfer_result import Curve, Result
from tests.scaling.ladder.conftest import MakeStudy

FIELDS = ("lr_token", "lr_other")


class Bowl:
    """A loss with one minimum, over powers of two fields that pull at one another."""

    def __init__(self, token: float, other: float, walls: float = 100) -> None:
        self.token, self.other, self.walls = token, other, walls
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, places: Sequence[Place], field: str) -> list[float | None]:
        self.asked += [tuple(place.values()) for place in places]
        return [self.loss(*place.values()) for place in places]

    def loss(self, token: int, other: int) -> float:
        x, y = token - self.token, other - self.other
        return math.inf if token > self.walls else 2 + x * x + y * y + 0.8 * x * y


@pytest.mark.parametrize(("token", "other"), [(0, 0), (3, -2), (-4.2, 4.3), (0.4, 0.4)])
def test_the_search_ends_where_no_field_moves_and_asks_nothing_twice(token: float, other: float) -> None:
    bowl = Bowl(token, other)
    found = descend(FIELDS, 20, bowl)
    assert found.finished and found.settled and len(set(bowl.asked)) == len(bowl.asked)
    best = bowl.loss(*found.place.values())
    for field in FIELDS:
        for move in (-1, 1):
            assert bowl.loss(*{**found.place, field: found.place[field] + move}.values()) > best
    for one in found.searches:
        assert one.chosen not in (min(one.tried), max(one.tried))


def test_the_search_goes_on_while_the_best_lies_at_the_edge() -> None:
    first = descend(FIELDS, 1, Bowl(5, 0)).searches[0]
    assert sorted(first.tried) == [-1, 0, 1, 2, 3, 4, 5, 6] and first.chosen == 5


def test_a_search_that_runs_out_of_rounds_says_so() -> None:
    found = descend(FIELDS, 1, Bowl(3, -2))
    assert found.finished and not found.settled


def test_rates_at_which_training_diverges_are_not_taken() -> None:
    found = descend(FIELDS, 5, Bowl(3, 0, walls=1))
    assert found.place["lr_token"] == 1 and math.isinf(found.searches[0].tried[2])
    with pytest.raises(RunError, match="diverged at every rate"):
        descend(FIELDS, 5, Bowl(0, 0, walls=-50))


def test_a_loss_that_is_missing_ends_the_search_where_it_stands() -> None:
    bowl = Bowl(1, 1)

    def until_other(places: Sequence[Place], field: str) -> list[float | None]:
        return bowl(places, field) if field == "lr_token" else [None] * len(places)

    found = descend(FIELDS, 5, until_other)
    assert not found.finished and [one.field for one in found.searches] == ["lr_token"]


def test_equal_losses_move_no_field() -> None:
    assert descend(FIELDS, 3, lambda places, field: [2.0] * len(places)).place == {"lr_token": 0, "lr_other": 0}


@pytest.mark.parametrize("truth", [0.6, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("factors", [(0.5, 0.7, 1, 1.4, 2, 2.8), (0.25, 0.5, 1, 2, 4)])
def test_a_parabola_in_the_logarithm_is_found_exactly(truth: float, factors: tuple[float, ...]) -> None:
    losses = [3 + 0.2 * math.log(factor / truth)**2 for factor in factors]
    found = minimum_of(factors, losses)
    assert found is not None and not found.at_edge
    assert found.factor == pytest.approx(truth, rel=1e-9) and found.loss == pytest.approx(3, rel=1e-12)


def test_a_lowest_point_without_two_neighbours_is_a_bound() -> None:
    for losses in ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 1.0, math.inf], [None, 1.0, 2.0]):
        found = minimum_of((1, 2, 4), losses)
        assert found is not None and found.at_edge and found.loss == 1.0
    assert minimum_of((1, 2), [None, math.inf]) is None
    flat = minimum_of((1, 2, 4), [1.0, 1.0, 1.0])
    assert flat is not None and flat.loss == 1.0


def curve(width: str, times: float, best: float, variant: str = "muP") -> Curve:
    factors = (0.25, 0.5, 1.0, 2.0, 4.0)
    losses = tuple(3 + 0.1 * math.log2(factor / best)**2 for factor in factors)
    return Curve("D", variant, width, times, 1000, {"lr_token": 1e-3}, factors, losses, (None,) * 5,
                 minimum_of(factors, losses))


def test_the_verdict_counts_grid_steps_between_the_widths() -> None:
    assert grid_steps(1, 0.25, 2) == -2
    found = verdict_of([curve("one", 1, 1.0), curve("two", 2, 0.7), curve("four", 4, 0.5)], 2)
    assert found is not None and found.times == 4 and not found.bound
    assert found.moves == pytest.approx((0, math.log2(0.7), -1)) and found.cost == pytest.approx(0.1)
    assert found.text.startswith("D, muP: the best rates move by -1.00 grid steps over 4 x width")
    edge = verdict_of([curve("one", 1, 1.0), curve("four", 4, 0.2)], 2)
    assert edge is not None and edge.bound and "a bound: the minimum of four" in edge.text
    unknown = verdict_of([curve("one", 1, 0.1), curve("four", 4, 0.2)], 2)
    assert unknown is not None and "are not known" in unknown.text and "give other factors" in unknown.text
    nothing = replace(curve("four", 4, 1), minimum=None)
    assert verdict_of([curve("one", 1, 1.0), nothing], 2) is None


def test_a_minimum_that_seeds_do_not_tell_apart_is_not_known() -> None:
    """Two seeds: two standard errors of a difference are twice the spread."""
    clear = replace(curve("one", 1, 1.0), factors=(0.25, 0.5, 1.0, 2.0, 4.0), losses=(3.4, 3.1, 3.0, 3.1, 3.4))
    low = replace(clear, spreads=(0.04, 0.06, 0.05, 0.05, 0.05))
    assert low.alike(2) == (0.5, 1.0, 2.0) and low.alike(1) == ()
    found = verdict_of([low, replace(low, width="four", times=4)], 2, 2)
    assert found is not None and not found.unclear and "move by +0.00 grid steps" in found.text
    high = replace(clear, width="four", times=4, spreads=(0.25, 0.25, 0.2, 0.2, 0.2))
    lost = verdict_of([low, high], 2, 2)
    assert lost is not None and lost.unclear == ("four",)
    assert "are not known: losses at factors x 0.25 to x 4 at four are no further apart than 2 seeds are" in lost.text
    unasked = verdict_of([low, high], 2)
    assert unasked is not None and "move by" in unasked.text, "one seed says nothing of that"


def test_the_same_result_gives_the_same_files_and_json_holds_no_infinity(tmp_path: Path) -> None:
    high = replace(curve("four", 4, 0.5), losses=(3.1, 3.0, 3.2, math.inf, None),
                   spreads=(0.01, None, 0.02, None, None))
    result = Result("x", 2, 2, 2, None, {}, (curve("one", 1, 1.0), high), (), 1)
    files = {}
    for name in ("a", "b"):
        page = write_report(tmp_path / name, result)
        files[name] = [(file.name, file.read_bytes()) for file in sorted((tmp_path / name).iterdir())]
        assert "| four | 1,000 | 0.001 | 3.1000 +- 0.0100 | 3.0000 | 3.2000 +- 0.0200 | diverged | - |" in (
            page.read_text())
    assert files["a"] == files["b"] and [name for name, _ in files["a"]] == [
        "transfer.json", "transfer.md", "transfer.png"]
    read = json.loads((tmp_path / "a" / "transfer.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert read["curves"][1]["losses"] == [3.1, 3.0, 3.2, "diverged", None]


WIDE = ["model.d_token=64", "model.heads_token=8", "model.kv_heads_token=4"]
SWEEP: dict[str, Any] = {
    "name": "D", "widths": [{"name": "D32"}, {"name": "D64", "times": 2, "overrides": WIDE}],
    "variants": ["muP", {"name": "fixed", "by_width": {"D64": ["optim.lr_token=3.6e-3"]}}], "rates": ["lr_token"]}


def test_points_take_the_rates_of_width_and_variant_times_what_was_found_times_the_factor(make_study: MakeStudy,
                                                                                         tmp_path: Path) -> None:
    study = make_study(tmp_path, seeds=[0, 5], transfer={"sweeps": [SWEEP], "factors": [0.5, 1, 2], "factor": 4})
    runs = Runs()
    points = sweep_points(study, {"lr_other": 1, "lr_token": -1}, runs)
    assert [(one.variant.name, one.width.name, one.factor) for one in points][3:7] == [
        ("muP", "D64", 0.5), ("muP", "D64", 1), ("muP", "D64", 2), ("fixed", "D32", 0.5)]
    for point in points:
        for run, seed in zip(point.runs, (0, 5), strict=True):
            base = 3.6e-3 if (point.variant.name, point.width.name) == ("fixed", "D64") else 1.8e-3
            assert run.config.optim.lr_token == pytest.approx(base / 4 * point.factor)
            assert run.config.optim.lr_other == pytest.approx(3e-3 * 4) and run.config.optim.lr_concept == 1.8e-3
            assert run.config.seed == seed and run.config.model.d_token == 32 * point.width.times
    # 24 points and seeds: `fixed` repeats all of muP at D32, and at D64 those at half the factor.
    assert len(runs.all()) == 24 - 6 - 4


def test_the_proxy_is_a_size_or_overrides(make_study: MakeStudy, tmp_path: Path) -> None:
    by_size = make_study(tmp_path, transfer={"proxy": 52224, "factor": 2})
    run = proxy_runs(by_size, {"lr_token": 2}, Runs())[0]
    assert run.weights.non_embedding == pytest.approx(52224, rel=0.05)
    assert run.name == "t-proxy-token0.0072-concept0.0018-other0.003-boundary0.0018-s0"
    named = make_study(tmp_path, transfer={"proxy": {"name": "small", "overrides": WIDE}})
    assert proxy_runs(named, {}, Runs())[0].config.model.d_token == 64


def test_a_search_is_trained_continued_and_reported(make_study: MakeStudy, tmp_path: Path) -> None:
    """On real runs; rates so high that training diverges are among them."""
    study = make_study(tmp_path, tokens=1024, transfer={
        "proxy": {"name": "small", "overrides": ["model.encoder_layers=1"]}, "fields": ["lr_token"], "factor": 4,
        "rounds": 1, "factors": [0.25, 1, 4], "sweeps": [{"name": "same", "widths": [{"name": "w"}]}]})
    said: list[str] = []
    with pytest.raises(ConfigError, match="--task 0/2: the search on the proxy"):
        run_transfer(study, Part(0, 2), said.append)
    assert run_transfer(study, None, said.append, train=False) and not list(tmp_path.glob("t-*"))
    assert run_transfer(study, None, said.append), said
    read = json.loads((tmp_path / "t" / "transfer.json").read_text())
    search, curves = read["descent"]["searches"][0], read["curves"]
    losses = {int(power): loss for power, loss in search["tried"].items()}
    assert read["descent"]["finished"] and search["chosen"] == min(losses, key=lambda power: losses[power])
    reports = [json.loads(file.read_text())["validation"]["loss"] for file in tmp_path.glob("t-*/report.json")]
    assert set(losses.values()) | set(curves[0]["losses"]) == set(reports) and read["missing"] == 0
    assert curves[0]["losses"][1] == losses[search["chosen"]]  # of the same run, which was not trained twice
    assert curves[0]["rates"]["lr_token"] == pytest.approx(1.8e-3 * 4 ** search["chosen"])
    page = (tmp_path / "t" / "transfer.md").read_bytes()
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("t-*/*")}
    assert run_transfer(study, None, said.append)
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.glob("t-*/*")}
    assert page == (tmp_path / "t" / "transfer.md").read_bytes()
    lines = list(overview(study, None))
    assert len(lines) == 2 + len(reports) and all(line.endswith("finished") for line in lines[1:-1])


def test_a_run_that_diverges_has_an_infinite_loss_and_is_not_tried_again(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(tmp_path, tokens=4096, overrides=["optim.max_grad_norm=0", "optim.warmup_tokens=0"], transfer={
        "factors": [1e-6, 1e-5, 1e-4], "sweeps": [{"name": "high", "rates": ["lr_other"], "widths": [
            {"name": "w", "overrides": ["optim.lr_other=1000", "model.mup.sigma_embedding=1000"]}]}]})
    assert study.transfer is not None
    study = replace(study, transfer=replace(study.transfer, factors=(1e-6, 1e-5, 1.0)))
    said: list[str] = []
    assert run_transfer(study, None, said.append), said
    run = sweep_points(study, {}, Runs())[-1].runs[0]
    job = jobs_of(study, run)[0]
    assert f"{run.name} has diverged: its loss counts as infinite" in said and state_of(job) != "finished"
    log = tmp_path / "t" / "logs" / f"{run.name}.log"
    before = log.stat().st_mtime_ns
    assert run_transfer(study, None, said.append) and log.stat().st_mtime_ns == before
    read = json.loads((tmp_path / "t" / "transfer.json").read_text())
    assert read["curves"][0]["losses"][2] == "diverged" and isinstance(read["curves"][0]["losses"][0], float)
