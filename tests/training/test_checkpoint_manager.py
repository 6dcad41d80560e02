"""Restoring: what does not belong to the run is refused, however well it loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlcm_lightning.checkpoint import tensors
from dlcm_lightning.checkpoint.folder import MANIFEST, Checkpoint, Manifest, describe_file
from dlcm_lightning.config import Config
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.run_directory import folders
from dlcm_lightning.training.run import pretrain

ONE, OTHER = "weight/encoder.layers.0.attention.out.weight", "weight/decoder.layers.0.attention.out.weight"


def quiet(message: str) -> None:
    del message


@pytest.fixture
def stopped(run_config: Config) -> Path:
    """A run that has ended, without its report, so that it is opened again."""
    pretrain(run_config, quiet)
    run = Path(run_config.train.output_dir) / run_config.name
    (run / "report.json").unlink()
    return run


def rewrite(run: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the newest checkpoint's tensors and gives it a manifest that vouches for them."""
    folder = folders(run)[-1]
    manifest = Manifest.load(folder)
    with Checkpoint(folder, manifest).tensors() as stored:
        found = {name: stored.get(name) for name in stored.names()}
    change(found)
    file = folder / tensors.file_name(0, 1)
    tensors.write(found, file)
    text = json.loads((folder / MANIFEST).read_text())
    text["files"][file.name] = describe_file(file)
    (folder / MANIFEST).write_text(json.dumps(text))
    assert not Manifest.load(folder).damages(folder)


def swap(found: dict[str, Tensor]) -> None:
    assert found[ONE].shape == found[OTHER].shape
    found[ONE], found[OTHER] = found[OTHER], found[ONE]


def scale(found: dict[str, Tensor]) -> None:
    found["weight/unembedding.weight"] = found["weight/unembedding.weight"] * 1.01


def lose_the_bias(found: dict[str, Tensor]) -> None:
    found["buffer/model.boundary.rate_bias"] = torch.tensor(-20.0)


@pytest.mark.parametrize("change", [swap, scale, lose_the_bias])
def test_a_checkpoint_that_loads_but_computes_something_else_is_refused(
    run_config: Config, stopped: Path, change: Callable[[dict[str, Tensor]], None]
) -> None:
    rewrite(stopped, change)
    with pytest.raises(CheckpointError, match=r"loads but computes something else: .*the version that wrote it"):
        pretrain(run_config, quiet)


def drop(found: dict[str, Tensor]) -> None:
    del found["exp_avg/embedding.weight"]


def add(found: dict[str, Tensor]) -> None:
    found["weight/more"] = torch.zeros(2)


@pytest.mark.parametrize(("change", "said"), [(drop, r"exp_avg/embedding\.weight is in the model only"),
                                              (add, "weight/more is in the checkpoint only")])
def test_a_checkpoint_with_other_tensors_is_refused(
    run_config: Config, stopped: Path, change: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    rewrite(stopped, change)
    with pytest.raises(CheckpointError, match=said):
        pretrain(run_config, quiet)


def test_where_all_checkpoints_are_damaged_nothing_is_begun_anew(run_config: Config, stopped: Path) -> None:
    for folder in folders(stopped):
        (folder / "config.yaml").unlink()
    before = sorted(file.name for file in (stopped / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints .* are damaged; move the folder away"):
        pretrain(run_config, quiet)
    assert sorted(file.name for file in (stopped / "checkpoints").iterdir()) == before
    shutil.rmtree(stopped / "checkpoints")
    pretrain(replace(run_config, seed=run_config.seed), quiet)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(run_config: Config, monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
    """Every file of it is flushed, then it is renamed, then its name is flushed: a power failure leaves it whole or not
    at all."""
    happened: list[tuple[str, int]] = []
    flush, rename = os.fsync, Path.rename

    def flushed(handle: int) -> None:
        flush(handle)
        happened.append(("flushed", os.fstat(handle).st_ino))

    def renamed(self: Path, target: Path) -> Path:
        for file in self.iterdir() if self.is_dir() else ():
            assert ("flushed", file.stat().st_ino) in happened, f"{file.name} is not on the disk when it is renamed"
        happened.append(("renamed", self.stat().st_ino))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    pretrain(run_config, quiet)
    for folder in folders(Path(run_config.train.output_dir) / run_config.name):
        named = happened.index(("renamed", folder.stat().st_ino))
        assert ("flushed", folder.parent.stat().st_ino) in happened[named:]
