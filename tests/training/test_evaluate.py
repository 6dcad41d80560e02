"""Any checkpoint that is kept has the numbers that the run itself would have logged there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.config import Config
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.layout import folders
from dlcm_lightning.training.evaluate import evaluate
from dlcm_lightning.training.run import pretrain


def run_of(config: Config) -> Path:
    return Path(config.train.runs) / config.name


def quiet(message: str) -> None:
    del message


def test_it_says_of_every_checkpoint_what_the_run_said(run_config: Config) -> None:
    config = replace(run_config, train=replace(run_config.train, validate_every_steps=9, keep_last=3))
    report = pretrain(config, quiet)
    run, lines = run_of(config), list[str]()
    assert evaluate(run, None, [], lines.append) == report.validation
    logged = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
              if line["kind"] == "validation"}
    found = evaluate(run, 9, [], lines.append)
    assert {key: logged[9][key] for key in found} == found
    assert found["bits_per_byte"] != report.validation["bits_per_byte"]
    table = "\n".join(lines)
    assert "bits/byte" in table and "unigram" in table and "step 9," in table
    saved = json.loads((run / "evaluation-00000009.json").read_text())
    assert saved["validation"]["loss"] == found["loss"] and saved["tokens"] == 9 * config.data.tokens_per_step
    fewer = evaluate(run, None, ["data.validation_rows=2"], quiet)
    assert fewer["loss"] != report.validation["loss"]


def test_a_checkpoint_that_is_not_there_or_damaged_is_refused(run_config: Config) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        evaluate(run_of(run_config), None, [], quiet)
    pretrain(run_config, quiet)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are 9, 12"):
        evaluate(run_of(run_config), 3, [], quiet)
    file = next(folders(run_of(run_config))[-1].glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        evaluate(run_of(run_config), None, [], quiet)
