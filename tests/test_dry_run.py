"""A dry run does, once and small, everything that the run will do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning import dry_run
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import Config
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.progress import Log
from dlcm_lightning.training.report import Report

CONFIGS = Path(__file__).parents[1] / "configs"


def test_a_dry_run_trains_saves_loads_and_exports(run_config: Config) -> None:
    lines = "\n".join(dry_run.dry_run(run_config))
    assert "the run's own shards" in lines
    assert "tensors bit-identical" in lines and "exported     and loaded" in lines


def test_the_paper_s_run_is_rehearsed_without_its_shards_under_its_own_strategy() -> None:
    config = load_config(CONFIGS / "run/dlcm_2b_1t.yaml", ["train.strategy=fsdp2"])
    lines = "\n".join(dry_run.dry_run(config))
    assert "2,339,936,384 parameters" in lines and "text of Python's library" in lines and "fsdp2" in lines


def test_what_is_kept_of_a_configuration_is_all_but_its_size(run_config: Config, tmp_path: Path) -> None:
    small, stand_in = dry_run.at_debug_width(replace(run_config, seed=9), tmp_path)
    assert not stand_in and small.seed == 9 and small.data.root == run_config.data.root
    assert small.model.boundary == run_config.model.boundary and small.optim.schedule == run_config.optim.schedule
    assert small.data.sources == run_config.data.sources


def test_a_step_that_comes_out_otherwise_is_noticed(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real, attempts = dry_run.pretrain, iter((1, 2))

    def forgetful(config: Config, log: Log) -> Report:
        if next(attempts) == 2:  # as if the first step had not been saved
            shutil.rmtree(Path(config.train.output_dir) / config.name)
            config = replace(config, seed=4)
        return real(config, log)

    monkeypatch.setattr(dry_run, "pretrain", forgetful)
    with pytest.raises(CheckpointError, match="tensors differ"):
        list(dry_run.dry_run(run_config))
