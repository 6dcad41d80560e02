"""The whole of `dlcm ladder fit`: what it writes and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.scaling.law.fit import Options
from dlcm_lightning.scaling.law.fit_table import fit_table
from dlcm_lightning.scaling.law.formula import LadderLaws
from dlcm_lightning.scaling.law.identifiability import Grid, lines
from dlcm_lightning.scaling.law.synthetic import ladder

QUICK = {"starts": 2, "bootstraps": 6}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("ladder")
    table = ladder(points=6, sizes=(87e6, 274e6, 833e6), shares=(0.3, 0.7), ratios=(2, 8))
    table.to_csv(folder / "ladder.csv", index=False)
    said: list[str] = []
    fit_table(folder / "ladder.csv", folder / "fit", **QUICK, log=said.append)  # type: ignore[arg-type]
    return folder, said


def test_law_page_and_pictures_are_written(written: tuple[Path, list[str]]) -> None:
    folder, said = written
    names = {file.name for file in (folder / "fit").iterdir()}
    assert names == {"law.json", "fit.md", *(f"{name}.{suffix}" for name in (
        "trajectories-dlcm", "trajectories-dense", "loss-over-share", "savings", "best-ratio")
        for suffix in ("png", "svg"))}
    laws = LadderLaws.read(folder / "fit" / "law.json")
    assert laws.concept and laws.dense and laws.decay and len(laws.concept.samples) == 6
    page = (folder / "fit" / "fit.md").read_text()
    for words in ("a rung left out", "the largest size from the smaller ones", "cannot tell apart", "R^2 of the last",
                  "starts reached the best optimum", "Eq. 23", "The best R"):
        assert words in page
    assert said[0].startswith("DLCM: 12 runs, R^2 0.99") and said[-1].endswith("law.json is the law")


def test_same_table_same_bytes(written: tuple[Path, list[str]]) -> None:
    folder, _ = written
    fit_table(folder / "ladder.csv", folder / "again", **QUICK, log=lambda _: None)  # type: ignore[arg-type]
    for file in (folder / "fit").iterdir():
        assert file.read_bytes() == (folder / "again" / file.name).read_bytes(), file.name


def test_law_of_the_file_predicts_and_refuses(written: tuple[Path, list[str]]) -> None:
    law = LadderLaws.read(written[0] / "fit" / "law.json").concept
    assert law is not None
    inside = law.predict(4e8, 8e9, 4, 0.6)
    assert inside.low <= inside.loss <= inside.high and inside.factor == 1
    with pytest.raises(ConfigError, match="--extrapolation"):
        law.predict(1.9e9, 1e12, 4, 0.7)
    assert law.predict(1.9e9, 1e12, 4, 0.7, extrapolation=100).factor > 50


def test_ladder_without_dense_runs_is_fitted_and_says_what_is_missing(tmp_path: Path) -> None:
    table = ladder(dense=None, decay=None, points=4, shares=(0.5,), ratios=(2, 8), ratio_noise=0)
    table.to_csv(tmp_path / "a.csv", index=False)
    found = fit_table(tmp_path / "a.csv", tmp_path / "fit", starts=2, bootstraps=0, log=lambda _: None)
    assert found.laws.dense is None and found.laws.decay is None
    assert any("no dense runs" in note for note in found.notes) and any("No Eq. 23" in note for note in found.notes)
    assert not (tmp_path / "fit" / "savings.png").exists()
    assert "not drawn" in (tmp_path / "fit" / "fit.md").read_text()


def test_dense_runs_alone_are_fitted(tmp_path: Path) -> None:
    ladder(law=None, decay=None, points=5).to_csv(tmp_path / "a.csv", index=False)
    found = fit_table(tmp_path / "a.csv", tmp_path / "fit", starts=2, bootstraps=0, log=lambda _: None)
    assert found.laws.concept is None and found.laws.dense is not None


def test_narrow_ladder_says_that_no_optimum_lies_inside(tmp_path: Path) -> None:
    ladder(points=5, sizes=(87e6, 130e6), shares=(0.5,)).to_csv(tmp_path / "a.csv", index=False)
    found = fit_table(tmp_path / "a.csv", tmp_path / "fit", starts=2, bootstraps=0, extrapolation=1.0,
                      log=lambda _: None)
    assert any("No best R" in note for note in found.notes)
    assert any("No dense law" in note for note in found.notes)


@pytest.mark.parametrize("given, words", [({"off_target": 1e-4}, "misses its target"),
                                          ({"off_target": -1.0}, "--off-target"), ({"extrapolation": 0.5}, "--extrap")])
def test_refusals_name_the_option(written: tuple[Path, list[str]], given: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fit_table(written[0] / "ladder.csv", written[0] / "no", **given, log=print)  # type: ignore[arg-type]
    assert not (written[0] / "no").exists()


def test_identifiability_of_a_grid_is_a_table() -> None:
    grid = Grid("small", sizes=(87e6, 274e6), shares=(0.7,))
    text = "\n".join(lines(1, Options(starts=2, bootstraps=5), (grid,)))
    assert "| E0 |" in text and "loss at 4 x the size" in text and "- small: not known in" in text
