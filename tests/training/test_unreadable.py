"""Rows that cannot be read, and weights that change, in whole runs: counted, logged, bounded, and exact on resuming."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlcm_lightning.config import Config, ConfigError, SourceConfig, WeightChange
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log
from dlcm_lightning.run_directory import folders
from dlcm_lightning.training.callbacks.metrics import TIMED
from dlcm_lightning.training.run import pretrain
from tests.synthetic import VOCABULARY


def quiet(message: str) -> None:
    del message


def lines(config: Config, kind: str = "train") -> list[dict[str, Any]]:
    text = (Path(config.train.output_dir) / config.name / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found
            if line["kind"] == kind]


def recorded(config: Config) -> list[int]:
    files = sorted((Path(config.train.output_dir) / config.name).glob("unreadable-*.jsonl"))
    return [json.loads(line)["sample"] for file in files for line in file.read_text().splitlines()]


def stopped_after(config: Config, step: int, log: Log = quiet) -> None:
    """Trains, and leaves the directory as a kill after the checkpoint of `step` leaves it."""
    pretrain(config, log)
    run = Path(config.train.output_dir) / config.name
    for folder in folders(run):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (run / "report.json").unlink()


@pytest.fixture
def masking(run_config: Config, tmp_path: Path) -> Config:
    """The run on a corpus that lacks a shard."""
    root = tmp_path / "damaged"
    shutil.copytree(run_config.data.root, root)
    sorted((root / "a" / "train").glob("*.tar"))[1].unlink()
    data = replace(run_config.data, root=str(root), unreadable="mask", max_unreadable=0.9)
    return replace(run_config, data=data, train=replace(run_config.train, keep_last=9))


def missing_samples(config: Config) -> list[int]:
    reader = Reader(config.data, config.seed, VOCABULARY, log=quiet)
    return [missed.sample for _, missed in reader.read_steps(0, config.total_steps).unreadable]


def test_by_default_a_lost_shard_ends_the_run_with_its_name(masking: Config) -> None:
    with pytest.raises(DataError, match=r"a/train/.*\.tar: missing"):
        pretrain(replace(masking, data=replace(masking.data, unreadable="stop")), quiet)


def test_masked_rows_are_counted_logged_and_recorded_once(masking: Config) -> None:
    said: list[str] = []
    pretrain(masking, said.append)
    missing = missing_samples(masking)
    assert recorded(masking) == missing and len(missing) > 3
    logged = lines(masking)
    assert sum(line["unreadable_rows"] for line in logged) == len(missing)
    assert all(np.isfinite(line["loss"]) for line in logged)
    assert sum("unreadable: sample" in text for text in said) == len(missing)


def test_a_run_with_masked_rows_continues_as_if_never_stopped(masking: Config) -> None:
    whole = replace(masking, name="whole")
    pretrain(whole, quiet)
    stopped_after(masking, 6)
    assert len(recorded(masking)) == len(missing_samples(masking))
    pretrain(masking, quiet)
    assert lines(masking) == lines(whole) and lines(masking, "validation") == lines(whole, "validation")
    assert recorded(masking) == missing_samples(masking)


def test_other_rows_stay_where_they_are(masking: Config, run_config: Config) -> None:
    """Up to the first step with a masked row, training is that of the sound corpus."""
    first = missing_samples(masking)[0] // masking.data.global_batch_size
    sound, damaged = (Reader(config.data, config.seed, VOCABULARY, log=quiet) for config in (run_config, masking))
    for step in range(masking.total_steps):
        one, other = sound.read_steps(step, step + 1), damaged.read_steps(step, step + 1)
        kept = other.samples >= 0
        assert one.samples[kept].tolist() == other.samples[kept].tolist()
        assert one.stream[kept].tolist() == other.stream[kept].tolist()
        assert kept.all() or step >= first


def test_too_many_masked_rows_end_the_run(masking: Config) -> None:
    missing = missing_samples(masking)
    bound = (len(missing) - 0.5) / (masking.total_steps * masking.data.global_batch_size)
    with pytest.raises(DataError, match=r"data\.max_unreadable = .*: \d+ of \d+ rows could not be read"):
        pretrain(replace(masking, data=replace(masking.data, max_unreadable=bound)), quiet)


def test_rows_missed_before_a_stop_count_towards_the_bound_after_it(masking: Config) -> None:
    missing = missing_samples(masking)
    before = sum(sample < 6 * masking.data.global_batch_size for sample in missing)
    assert before >= len(missing) - before > 0, "neither attempt alone may reach the bound"
    stopped_after(masking, 6)
    bound = (before + 0.5) / (masking.total_steps * masking.data.global_batch_size)
    with pytest.raises(DataError, match=rf"data\.max_unreadable = .*: {before + 1} of"):
        pretrain(replace(masking, data=replace(masking.data, max_unreadable=bound)), quiet)


def test_a_step_without_any_readable_row_changes_nothing_but_the_schedule(masking: Config) -> None:
    data = replace(masking.data, global_batch_size=1, micro_batch_size=1)
    config = replace(masking, data=data, optim=replace(masking.optim, total_tokens=64 * 12, warmup_tokens=64),
                     train=replace(masking.train, log_every_steps=1))
    pretrain(config, quiet)
    missing = missing_samples(config)
    assert missing
    for line in lines(config):
        if line["step"] - 1 in missing:
            assert line["grad_norm"] == 0 and np.isnan(line["loss"])
        else:
            assert np.isfinite(line["loss"]) and line["grad_norm"] > 0


# Weights


def with_changes(config: Config, *changes: WeightChange) -> Config:
    return replace(config, data=replace(config.data, weight_changes=list(changes)))


def test_a_change_of_weights_that_lies_ahead_may_be_made_when_a_run_continues(run_config: Config) -> None:
    config = replace(run_config, train=replace(run_config.train, keep_last=9))
    step = config.data.tokens_per_step
    change = WeightChange(6 * step + 1, {"a": 0.1, "b": 0.9})
    whole = with_changes(replace(config, name="whole"), change)
    pretrain(whole, quiet)
    stopped_after(config, 6)
    pretrain(with_changes(config, change), quiet)
    assert lines(config) == lines(whole)
    stopped_after(with_changes(config, change), 9)
    with pytest.raises(ConfigError, match=r"differs in data\.weight_changes"):
        pretrain(config, quiet)
    with pytest.raises(ConfigError, match=r"differs in data\.weight_changes"):
        pretrain(with_changes(config, replace(change, weights={"a": 0.2, "b": 0.8})), quiet)


def test_sources_that_end_before_the_budget_are_refused_before_training(run_config: Config) -> None:
    sources = [replace(source, max_epochs=0.01) for source in run_config.data.sources]
    with pytest.raises(DataError, match=r"every source has been read max_epochs times after \d+ rows"):
        pretrain(replace(run_config, data=replace(run_config.data, sources=sources)), quiet)
    assert isinstance(sources[0], SourceConfig)
