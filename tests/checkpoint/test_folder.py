"""Checkpoints are whole or not there, whatever wrote them."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlcm_lightning.checkpoint import tensors
from dlcm_lightning.checkpoint.folder import (
    CONFIG,
    FORMAT,
    MANIFEST,
    Checkpoint,
    Fingerprint,
    Manifest,
    complete,
    milestones,
    set_aside,
    sweep,
)
from dlcm_lightning.config import Config, DataConfig, SourceConfig
from dlcm_lightning.errors import CheckpointError, DamagedCheckpoint
from dlcm_lightning.run_directory import CHECKPOINTS, finished, folders, unfinished
from tests.checkpoints import OTHER, STATE, leave_checkpoint
from tests.permissions import of_any_user

CONFIGURED = Config(name="x", data=DataConfig(sources=[SourceConfig("a", "d", 1.0)]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        leave_checkpoint(tmp_path, step, CONFIGURED)
    return tmp_path


def test_what_was_written_is_read(run: Path) -> None:
    folder = folders(run)[-1]
    checkpoint = Checkpoint(folder, Manifest.load(folder))
    assert folder == finished(run, 3) and checkpoint.step == 3 and checkpoint.manifest.tokens == 300
    assert checkpoint.manifest.damages(folder) == []
    assert checkpoint.config == CONFIGURED and checkpoint.callbacks == {"Watch": {"rows": 3}}
    with checkpoint.tensors() as stored:
        assert stored.names() == ["buffer/n", "weight/a", "weight/b"] and stored.names("weight/") == ["a", "b"]
        assert torch.equal(stored.get("weight/b"), torch.full((3, 2), 3.0, dtype=torch.float64))
        assert stored.shape("weight/b") == (torch.Size((3, 2)), torch.float64)
        assert stored.shape("buffer/n") == (torch.Size((2,)), torch.int64)
    assert folders(run / "elsewhere") == []


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / OTHER).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / OTHER).write_bytes(content)


def truncate(folder: Path) -> None:
    (folder / STATE).write_bytes((folder / STATE).read_bytes()[:-1])


def lose_a_ranks_file(folder: Path) -> None:
    (folder / OTHER).unlink()


def change_the_config(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("seed: 0", "seed: 1") if "seed: 0" in text else text[:-1] + " ")


@pytest.mark.parametrize(("damage", "said"), [
    (flip_a_bit, f"{OTHER} is damaged: its sha256"),
    (truncate, f"{STATE} has .* bytes instead of"),
    (lose_a_ranks_file, f"{OTHER} is missing"),
    (change_the_config, f"{CONFIG} .*"),
])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_damage_is_named_whoever_shares_the_hashing(run: Path, damage: Callable[[Path], None], said: str,
                                                          parts: int) -> None:
    folder = folders(run)[-1]
    damage(folder)
    manifest = Manifest.load(folder)
    found = [one for part in range(parts) for one in manifest.damages(folder, part, parts)]
    assert len(found) == 1 and re.search(said, found[0])


@pytest.mark.parametrize("content", [f'{{"format": {FORMAT}, "step"', "[]", f'{{"format": {FORMAT}}}', '{"step": 3}'])
def test_a_manifest_that_is_none_is_refused(run: Path, content: str) -> None:
    folder = folders(run)[-1]
    (folder / MANIFEST).write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is damaged"):
        Manifest.load(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is missing"):
        Manifest.load(folder)


def test_another_format_is_refused(run: Path) -> None:
    file = folders(run)[-1] / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match=f"format 99, this version reads {FORMAT}") as refused:
        Manifest.load(file.parent)
    assert not isinstance(refused.value, DamagedCheckpoint)
    assert file.parent in milestones(folders(run), 10**9), "what cannot be asked is not removed"


def test_what_cannot_be_read_is_not_damaged(run: Path) -> None:
    folder = folders(run)[-1]
    manifest = Manifest.load(folder)
    (folder / STATE).chmod(0)
    with of_any_user(), pytest.raises(CheckpointError, match=rf"{STATE} cannot be read .*Permission denied") as refused:
        manifest.damages(folder)
    assert not isinstance(refused.value, DamagedCheckpoint)
    (folder / MANIFEST).chmod(0)
    with of_any_user(), pytest.raises(CheckpointError, match=r"cannot be read .*Permission denied") as refused:
        Manifest.load(folder)
    assert not isinstance(refused.value, DamagedCheckpoint)


def test_a_file_of_tensors_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o007, 0o660), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            tensors.write({"weight/a": torch.zeros(2)}, tmp_path / f"{mask}.safetensors")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{mask}.safetensors").stat().st_mode) == mode


def test_what_a_kill_leaves_behind_is_never_taken_and_swept_away(run: Path) -> None:
    half = unfinished(run, 9)
    half.mkdir()
    (half / STATE).write_bytes(b"half")
    assert folders(run)[-1] == finished(run, 3)
    sweep(run, keep_last=2)
    assert sorted(folder.name for folder in (run / CHECKPOINTS).iterdir()) == ["step-00000002", "step-00000003"]


def test_one_of_the_same_step_is_replaced(run: Path) -> None:
    flip_a_bit(finished(run, 3))
    leave_checkpoint(run, 3, CONFIGURED)
    assert Manifest.load(finished(run, 3)).damages(finished(run, 3)) == []


def test_damaged_ones_are_set_aside_and_no_longer_count_among_those_kept(run: Path) -> None:
    set_aside([finished(run, 3)])
    sweep(run, keep_last=2)
    assert sorted(folder.name for folder in (run / CHECKPOINTS).iterdir()) == [
        "damaged-step-00000003", "step-00000001", "step-00000002"]
    leave_checkpoint(run, 3, CONFIGURED)
    set_aside([finished(run, 3)])
    assert sorted(folder.name for folder in (run / CHECKPOINTS).iterdir()) == [
        "damaged-step-00000003", "step-00000001", "step-00000002"]


def test_the_first_checkpoint_behind_every_so_many_tokens_is_kept_for_good(tmp_path: Path) -> None:
    for step in range(1, 13):
        leave_checkpoint(tmp_path, step, CONFIGURED)
        sweep(tmp_path, keep_last=2, keep_every_tokens=250)
    assert [Manifest.load(folder).tokens for folder in folders(tmp_path)] == [300, 500, 800, 1000, 1100, 1200]
    assert milestones(folders(tmp_path), 0) == set()
    sweep(tmp_path, keep_last=2)
    assert len(folders(tmp_path)) == 2


def test_every_tensor_has_one_writer_and_all_write_about_as_much() -> None:
    sizes = {f"p{number}": 10 + number**2 for number in range(40)}
    for writers in (1, 2, 3, 4, 8):
        owners = tensors.share_out(sizes, writers)
        load = [sum(sizes[name] for name, owner in owners.items() if owner == writer) for writer in range(writers)]
        assert owners.keys() == sizes.keys() and sum(load) == sum(sizes.values())
        assert max(load) - min(load) <= max(sizes.values())
        assert owners == tensors.share_out(dict(reversed(sizes.items())), writers), "whatever the order"


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        tensors.write({"weight/a": torch.zeros(2)}, tmp_path / tensors.file_name(number, 2))
    with pytest.raises(ValueError, match="weight/a is in another file"):
        tensors.Tensors(sorted(tmp_path.iterdir()))
    (tmp_path / "no.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a safetensors file"):
        tensors.Tensors([tmp_path / "no.safetensors"])


def test_a_disk_that_cannot_be_written_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        tensors.write({"weight/a": torch.zeros(2)}, tmp_path / "nowhere" / "x.safetensors")


def test_a_fingerprint_survives_its_json(run: Path) -> None:
    folder = folders(run)[0]
    stored = replace(Manifest.load(folder), fingerprint=Fingerprint(0.1 + 0.2, "0101"))
    (folder / MANIFEST).unlink()
    folder.rename(unfinished(run, 1))
    complete(run, stored)
    assert Manifest.load(folder) == stored
