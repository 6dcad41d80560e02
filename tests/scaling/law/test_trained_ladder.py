"""The ladder that was trained for real: its table is in the repository, and says what docs/scaling.md says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlcm_lightning.scaling.law.fit import Options, search
from dlcm_lightning.scaling.law.fit_table import fit_table
from dlcm_lightning.scaling.law.held_out import largest_size, root_mean_square
from dlcm_lightning.scaling.law.table import Run, read_table, sizes_of
from dlcm_lightning.scaling.law.terms import points_of

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
WITHIN = 0.02
"""Relative error of the loss of the largest size."""


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [run for run in read_table(RESULTS / "ladder_cpu.csv", off_target=0.05) if run.kind == "dlcm"]


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / "ladder_cpu.json").read_text())
    return content


def test_it_is_the_grid_that_was_promised(runs: list[Run]) -> None:
    sizes = sizes_of(runs)
    assert [len(size) for size in sizes] == [6] * 4
    for size in sizes:
        assert sorted({run.R_target for run in size}) == [2, 4, 8]
        assert len({round(run.P, 2) for run in size}) == 2
        assert all(len(run.decayed) == 1 for run in size)


def test_the_largest_size_is_predicted_by_the_smaller_ones(runs: list[Run], written: dict[str, Any]) -> None:
    """A few starts find what the whole fit has written."""
    options = Options(starts=4, bootstraps=0)
    points = points_of(runs, late=options.late, skip=options.skip, by_rung=False)
    best, _, noise = search(points, options)
    found = {one.run: one for one in largest_size(points, options, best, noise)}
    assert {one["run"] for one in written["dlcm"]["quality"]["largest"]} == set(found)
    for one in written["dlcm"]["quality"]["largest"]:
        assert found[one["run"]].measured == one["measured"]
        assert found[one["run"]].predicted == pytest.approx(one["predicted"], rel=2e-3)
        assert abs(found[one["run"]].relative) <= WITHIN
    assert root_mean_square(found.values()) == pytest.approx(written["dlcm"]["quality"]["rms_largest"], abs=1e-3)


def test_what_the_ladder_does_not_reach_is_said_and_not_drawn(tmp_path: Path) -> None:
    """Its best N and D lie at the edge of what was trained: a picture would be empty, one of before would be wrong."""
    for name in ("savings.png", "best-ratio.svg"):
        (tmp_path / name).write_text("of another fit")
    fitted = fit_table(RESULTS / "ladder_cpu.csv", tmp_path, starts=1, bootstraps=0, log=lambda line: None)
    assert {file.name for file in fitted.files} == {file.name for file in tmp_path.iterdir()} == {
        "law.json", "fit.md", *(f"{name}.{suffix}" for suffix in ("png", "svg")
                                for name in ("trajectories-dlcm", "trajectories-dense", "loss-over-share"))}
    page = (tmp_path / "fit.md").read_text()
    assert "- No best R: " in page and "- No savings: " in page and "## The best R" not in page


def test_the_page_says_what_was_written(written: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for kind in ("dlcm", "dense"):
        assert f"{100 * written[kind]['quality']['rms_largest']:.2f} %" in page
        for one in written[kind]["quality"]["largest"]:
            off = 100 * (one["predicted"] / one["measured"] - 1)
            assert f"| {one['measured']:.3f} | {one['predicted']:.3f} | {off:+.2f} % |" in page
