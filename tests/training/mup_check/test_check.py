"""The command, on a user's configuration: what it writes, what it ends with, and that a strategy changes nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlcm_lightning.cli import main
from dlcm_lightning.compose import load_config, save_config
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.model.mup import Role
from dlcm_lightning.training import optimizer as optim_module
from dlcm_lightning.training.mup_check.check import chosen, look_at, shrunk
from dlcm_lightning.training.mup_check.sizes import AXES, sizes_of
from dlcm_lightning.training.mup_check.verdict import Seen, judge, slope
from tests.training.mup_check.test_mutants import rule_mutant

PNG = b"\x89PNG"


@pytest.fixture
def user(run_config: Config) -> Config:
    """Of head widths and FFNs that are not those of other tests."""
    boundary = replace(run_config.model.boundary, previous_rate=True)  # as where one process has two micro-batches
    model = replace(run_config.model, d_token=48, heads_token=6, kv_heads_token=2, head_dim=8, ffn_token=120,
                    boundary=boundary)
    return replace(run_config, name="user", model=model, optim=replace(run_config.optim, lr_other=2e-3))


def test_it_says_shows_and_keeps_what_it_found(user: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                               ) -> None:
    save_config(user, tmp_path / "user.yaml")
    out = tmp_path / "out"
    assert main(["mup", "check", str(tmp_path / "user.yaml"), "--axes", "concept", "--steps", "2", "--out", str(out),
                 ]) == 0
    said = capsys.readouterr().out
    assert "concept width E" in said and "OUT OF BAND" not in said and "the run's own shards" in said
    assert (out / "mup.png").read_bytes().startswith(PNG)
    found = json.loads((out / "mup.json").read_text())
    assert all(line["good"] for line in found["lines"])
    sizes = json.loads((out / "coordinates.json").read_text())
    assert [one["value"] for one in sizes] == [64, 128, 256, 512]
    for size in sizes:
        model = size["model"]
        assert model["d_token"] == 144, "the other width is fixed: a multiple of what three queries a key ask for"
        assert model["heads_token"] == 3 * model["kv_heads_token"] and model["ffn_token"] == 2.5 * model["d_token"]
        assert {one["step"] for one in size["coordinates"]} == {0, 1, 2}
        assert {one["role"] for one in size["coordinates"]} == {*(role.value for role in Role), "stream_token",
                                                                "stream_concept"}


def test_a_broken_rule_ends_it_with_one(user: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    save_config(user, tmp_path / "user.yaml")
    monkeypatch.setattr(optim_module, "hyperparameters_of", rule_mutant(
        Role.CONCEPT, lambda line, s: replace(line, learning_rate=line.learning_rate * s)))
    with pytest.raises(SystemExit) as ended:
        main(["mup", "check", str(tmp_path / "user.yaml"), "--axes", "concept", "--steps", "2", "--out",
              str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert ended.value.code == 1 and said.count("OUT OF BAND") >= 2
    assert any("learning rate" in line and "OUT OF BAND" in line for line in said.splitlines())


def coordinates(seen: Seen) -> dict[tuple[str, int], list[float]]:
    return {(one["module"], one["step"]): [one["size"], one["move"], one["own"]] for one in seen.coordinates}


@pytest.mark.parametrize("strategy", [
    "fsdp2", "zero3", *(pytest.param(name, marks=pytest.mark.whole) for name in ("ddp", "zero1", "zero2"))])
def test_under_every_strategy_it_sees_what_one_process_sees(user: Config, strategy: str, tmp_path: Path) -> None:
    train: Any = replace(user.train, devices=2, strategy=strategy)
    spread, _ = shrunk(replace(user, train=train), tmp_path / "spread", 2)
    alone = replace(spread, train=replace(spread.train, devices=1, strategy="ddp",
                                          output_dir=str(tmp_path / "alone" / "runs")))
    size = next(iter(sizes_of(user.model, "token")))
    for folder in ("alone", "spread"):
        (tmp_path / folder).mkdir()
    mine, theirs = look_at(size, spread, tmp_path / "spread"), look_at(size, alone, tmp_path / "alone")
    assert mine.groups == theirs.groups
    found, expected = coordinates(mine), coordinates(theirs)
    assert found.keys() == expected.keys()
    for place, values in expected.items():
        assert found[place] == pytest.approx(values, rel=2e-3, abs=1e-6), place
    assert any(values[2] > 0.01 for values in found.values())


def test_the_model_keeps_the_users_proportions_on_every_axis() -> None:
    model = load_config("dlcm_2b_1t").model
    for axis in AXES:
        sizes = list(sizes_of(model, axis))
        assert [one.value // sizes[0].value for one in sizes] == [1, 2, 4, 8]
        for one in sizes:
            small = one.model
            assert small.ffn_token == 4 * small.d_token and small.ffn_concept == 2 * small.d_concept
            assert small.heads_token == 2 * small.kv_heads_token and small.heads_concept == 2 * small.kv_heads_concept
            assert small.heads_token * small.head_dim == small.d_token
            assert small.heads_concept * small.head_dim == small.d_concept
            assert (small.mup, small.boundary) == (model.mup, model.boundary)
    dense = load_config("dense_1b_1t")
    assert chosen([], dense) == ["token", "depth"]
    with pytest.raises(ConfigError, match="a dense model has none"):
        next(sizes_of(dense.model, "concept"))
    with pytest.raises(ConfigError, match="multiples of 32; take 96"):
        next(sizes_of(model, "token", 80))


def test_a_slope_is_that_of_a_power() -> None:
    assert slope([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0]) == pytest.approx(1)
    assert slope([1, 2, 4], [4.0, 2.0, 1.0]) == pytest.approx(-1)
    assert math.isnan(slope([1, 2], [1.0, math.nan])) and math.isnan(slope([1, 2], [0.0, 1.0]))


def test_a_number_that_is_none_is_not_as_promised(user: Config) -> None:
    """As where a model of one size has diverged."""
    sizes = list(sizes_of(user.model, "token"))
    one = {"module": "m", "role": "token", "size": 1.0, "move": 1.0, "own": 1.0}
    lost = {**one, "step": 1, "move": math.nan}
    seen = [Seen(size, [{**one, "step": 0}, lost if size is sizes[-1] else {**one, "step": 1}], []) for size in sizes]
    wrong = [line.quantity for line in judge("token", seen) if not line.good]
    assert wrong == ["move"]
