"""The mean of checkpoints as a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlcm_lightning.checkpoint.folder import open_checkpoint
from dlcm_lightning.checkpoint.probe import Probe
from dlcm_lightning.cli import main
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.export.merge import merge_checkpoints
from dlcm_lightning.export.portable import about, load_model, load_state, model_state
from dlcm_lightning.training.run import pretrain


@pytest.fixture
def run(run_config: Config) -> Path:
    config = replace(run_config, train=replace(run_config.train, keep_last=9))
    pretrain(config, lambda _: None)
    return Path(config.train.output_dir) / config.name


def test_every_number_is_the_mean_of_the_checkpoints(run: Path, tmp_path: Path) -> None:
    merged = merge_checkpoints(run, tmp_path / "out", last=3)
    states = [model_state(open_checkpoint(run, step)) for step in (6, 9, 12)]
    found = load_state(tmp_path / "out")
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        expected = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-9)
        if name == "embedding.weight":
            assert all(not torch.equal(tensor, state[name]) for state in states)
    assert found["boundary.threshold"] != 0, "or it would not be noticed"
    assert about(tmp_path / "out")["merged"] == [6, 9, 12] == list(merged.merged)
    assert about(tmp_path / "out")["step"] == 12


def test_it_says_of_the_probe_text_what_its_own_weights_say(run: Path, tmp_path: Path) -> None:
    merged = merge_checkpoints(run, tmp_path / "out", steps=[12, 3])
    model = load_model(tmp_path / "out")
    said = Probe(Tokenizer.load(run)).fingerprint(model, torch.device("cpu"))
    assert said.loss == pytest.approx(merged.fingerprint.loss, rel=1e-6)
    assert said.loss != pytest.approx(open_checkpoint(run, 12).manifest.fingerprint.loss, rel=1e-4)


def test_it_can_be_used_as_any_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["merge", str(run), out, "--last", "2", "--dtype", "bf16"]) == 0
    assert "steps 9, 12" in capsys.readouterr().out
    assert main(["generate", out, "--prompt", "the cat", "--greedy", "--max-tokens", "4"]) == 0
    again = str(tmp_path / "again")
    assert main(["export", out, again]) == 0 and about(again)["merged"] == [9, 12]


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, ConfigError, "--last K or --steps"), ({"last": 2, "steps": [3, 6]}, ConfigError, "--last K or --steps"),
        ({"steps": [6, 3, 6]}, ConfigError, "twice"), ({"steps": [3, 7]}, CheckpointError, "no checkpoint of step 7"),
        ({"last": 8}, CheckpointError, "keeps 4 checkpoints.*keep_every_tokens"),
    ]
    for given, error, said in refused:
        with pytest.raises(error, match=said):
            merge_checkpoints(run, out, **given)
        assert not out.exists() and not list(tmp_path.glob(".*unfinished"))
