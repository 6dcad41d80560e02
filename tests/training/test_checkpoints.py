"""Checkpoints are whole or not there; damage is named and the one before is taken."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import torch

from dlcm_lightning.config import Config
from dlcm_lightning.training.checkpoints import (
    FOLDER,
    MANIFEST,
    STATE,
    CheckpointError,
    Identity,
    checkpoint_folders,
    newest_checkpoint,
    open_checkpoint,
    sweep,
    write_checkpoint,
)


def save(file: Path) -> None:
    torch.save({"weights": torch.arange(1000)}, file)


@pytest.fixture
def run(tmp_path: Path, run_config: Config) -> Path:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, run_config, IDENTITY, save)
    return tmp_path


IDENTITY = Identity("rows", "float32")


def ignore(message: str) -> None:
    del message


def test_the_newest_whole_checkpoint_is_taken(run: Path, run_config: Config) -> None:
    checkpoint = newest_checkpoint(run, ignore)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.identity, checkpoint.config) == (3, IDENTITY, run_config)
    assert torch.equal(torch.load(checkpoint.state, weights_only=True)["weights"], torch.arange(1000))
    assert newest_checkpoint(run / "elsewhere", ignore) is None


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / STATE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / STATE).write_bytes(content)


def truncate(folder: Path) -> None:
    (folder / STATE).write_bytes((folder / STATE).read_bytes()[:-1])


def lose_the_state(folder: Path) -> None:
    (folder / STATE).unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def garble_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 1, "step"')


@pytest.mark.parametrize(("damage", "said"), [
    (flip_a_bit, "state.ckpt is damaged: its sha256"),
    (truncate, "state.ckpt has .* bytes instead of"),
    (lose_the_state, "state.ckpt is missing"),
    (lose_the_manifest, "manifest.json cannot be read"),
    (garble_the_manifest, "manifest.json cannot be read"),
])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_taken(run: Path, damage, said: str) -> None:  # type: ignore[no-untyped-def]
    newest = checkpoint_folders(run)[-1]
    damage(newest)
    heard: list[str] = []
    checkpoint = newest_checkpoint(run, heard.append)
    assert checkpoint is not None and checkpoint.step == 2
    assert len(heard) == 1 and heard[0].startswith(f"checkpoint {newest.name} is not used")
    assert re.search(said, heard[0])


def test_where_all_are_damaged_nothing_is_begun_anew(run: Path) -> None:
    for folder in checkpoint_folders(run):
        flip_a_bit(folder)
    with pytest.raises(CheckpointError, match=r"all 3 checkpoints .* are damaged; move the folder away"):
        newest_checkpoint(run, ignore)


def test_another_format_is_refused(run: Path) -> None:
    file = checkpoint_folders(run)[-1] / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        open_checkpoint(file.parent)


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
])
def test_a_full_disk_is_a_clear_error_that_loses_nothing(run: Path, run_config: Config, error: Exception) -> None:
    def fill(file: Path) -> None:
        file.write_bytes(b"half")
        raise error

    with pytest.raises(CheckpointError, match=r"step 4 could not be written .*step-00000003.*Free space"):
        write_checkpoint(run, 4, run_config, IDENTITY, fill)
    assert [folder.name for folder in (run / FOLDER).iterdir() if "unfinished" in folder.name] == []
    checkpoint = newest_checkpoint(run, ignore)
    assert checkpoint is not None and checkpoint.step == 3


def test_what_a_kill_leaves_behind_is_never_taken_and_swept_away(run: Path) -> None:
    half = run / FOLDER / ".unfinished-9"
    half.mkdir()
    save(half / STATE)
    checkpoint = newest_checkpoint(run, ignore)
    assert checkpoint is not None and checkpoint.step == 3
    sweep(run, keep_last=2)
    assert sorted(folder.name for folder in (run / FOLDER).iterdir()) == ["step-00000002", "step-00000003"]


def test_a_damaged_one_is_set_aside_and_no_longer_counts_among_those_kept(run: Path, run_config: Config) -> None:
    flip_a_bit(checkpoint_folders(run)[-1])
    newest_checkpoint(run, ignore)
    sweep(run, keep_last=2)
    assert sorted(folder.name for folder in (run / FOLDER).iterdir()) == [
        "damaged-step-00000003", "step-00000001", "step-00000002"]
    write_checkpoint(run, 3, run_config, IDENTITY, save)
    assert open_checkpoint(checkpoint_folders(run)[-1]).step == 3
